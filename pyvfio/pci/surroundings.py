"""The surroundings of the process, for hints that fit: root or another user, a container, a systemd service."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from pyvfio.kernel import Kernel
from pyvfio.pci.sysfs import printable, read_text

_MARKS = (".dockerenv", "run/.containerenv", "run/systemd/container")
"""Files below the root of a container: Docker, Podman, and systemd-nspawn or others with systemd inside."""
_VARIABLES = ("container=", "KUBERNETES_SERVICE_HOST=")
_CGROUPS = re.compile(r"docker|kubepods|libpod|lxc|machine\.slice")
_SERVICE = re.compile(r"/([^/\n]+\.service)(?=[/\n]|$)")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """A snapshot of the surroundings of the process.

    * `user` and `groups` are the effective user and the supplementary groups.
    * `container` tells whether the process is in a container.
    * `service` is the systemd unit of the process, None outside of a service.
    * `user_namespace` tells whether the user ids belong to a user namespace, whose root has no rights outside.
    """

    user: int = 0
    groups: tuple[int, ...] = ()
    container: bool = False
    service: str | None = None
    user_namespace: bool = False

    @property
    def root(self) -> bool:
        """Return whether the process is root."""
        return self.user == 0


def look_around(kernel: Kernel) -> Surroundings:
    """Return the surroundings of this process.

    A container is detected by the files, variables and cgroup names of known runtimes. Other runtimes are not detected.
    Cost: six small files; for errors only.
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
    """Return the numbers of a line of /proc/self/status; `Uid` has real, effective, saved and file system's user."""
    found = re.search(rf"^{name}:((?:\s+[0-9]{{1,10}})*)\s*$", status, re.MULTILINE)
    numbers = tuple(map(int, found[1].split())) if found else ()
    return numbers if len(numbers) >= len(default) else default
