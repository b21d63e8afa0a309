"""Where the program runs, as far as a hint depends on it: as root or not, in a container, in a service."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from pyvfio.kernel import Kernel
from pyvfio.pci.sysfs import printable, read_text

_MARKS = (".dockerenv", "run/.containerenv", "run/systemd/container")
"""Files below the root of a container: of Docker, of Podman, of systemd-nspawn and others with systemd inside."""
_VARIABLES = ("container=", "KUBERNETES_SERVICE_HOST=")
_CGROUPS = re.compile(r"docker|kubepods|libpod|lxc|machine\.slice")
_SERVICE = re.compile(r"/([^/\n]+\.service)(?=[/\n]|$)")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """A snapshot.

    `user` and `groups` are of the process, `container` says whether it is in one, `service` is the systemd unit that it
    belongs to, and `user_namespace` says whether its user ids are those of a namespace (root has no rights outside).
    """

    user: int = 0
    groups: tuple[int, ...] = ()
    container: bool = False
    service: str | None = None
    user_namespace: bool = False

    @property
    def root(self) -> bool:
        """Whether the process is root."""
        return self.user == 0


def look_around(kernel: Kernel) -> Surroundings:
    """Find out where this process runs.

    A container is known by the files and variables that its runtime leaves there, and by its cgroup; a runtime that
    leaves none is not noticed. Cost: a few small files, so for errors only.
    """
    own = kernel.proc / "self"
    status = read_text(own / "status") or ""
    cgroup = read_text(own / "cgroup") or ""
    variables = (read_text(own / "environ") or "").split("\0")
    services = _SERVICE.findall(cgroup)
    return Surroundings(
        user=_ids(status, "Uid", default=(0, os.geteuid()))[1],
        groups=tuple(sorted(_ids(status, "Groups", default=()))),
        container=any((own / "root" / mark).exists() for mark in _MARKS)
        or any(variable.startswith(_VARIABLES) for variable in variables)
        or _CGROUPS.search(cgroup) is not None,
        service=printable(services[-1]) if services else None,
        user_namespace=(read_text(own / "uid_map") or "0 0 4294967295").split() != ["0", "0", "4294967295"],
    )


def _ids(status: str, name: str, *, default: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers of a line of /proc/self/status: real, effective, saved and file system's user of `Uid`."""
    found = re.search(rf"^{name}:((?:\s+\d+)*)\s*$", status, re.MULTILINE)
    numbers = tuple(map(int, found[1].split())) if found else ()
    return numbers if len(numbers) >= len(default) else default
