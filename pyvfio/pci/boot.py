"""The kernel: the release, the command line and the build options, of the running kernel or of a fake.

Source: /proc/sys/kernel/osrelease, /proc/cmdline; /proc/config.gz (CONFIG_IKCONFIG_PROC), else the file that the
distribution installs with the kernel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from pyvfio.kernel import Kernel
from pyvfio.pci.sysfs import read_text

_MOST = 16 << 20  # bytes of a configuration: a real one has 0.3 MiB
_SET = re.compile(r"^(?:CONFIG_(\w+)=([ym])|# CONFIG_(\w+) is not set)$", re.MULTILINE)
_OTHER_PLACES = ("boot/config-{}", "lib/modules/{}/config", "usr/lib/modules/{}/config", "lib/modules/{}/build/.config")


@runtime_checkable
class Modelled(Protocol):
    """A kernel that is not the running one: the fake, whose procfs is the machine's."""

    @property
    def release(self) -> str:
        """As `release()`."""
        ...

    @property
    def build_options(self) -> Mapping[str, str]:
        """As `build_options()`."""
        ...


def root_directory(kernel: Kernel) -> Path:
    """Return the root directory of this process, from procfs."""
    return kernel.proc / "self/root"


def release(kernel: Kernel) -> str:
    """Return the release of the running kernel, such as `6.12.95+deb12-amd64`; empty if procfs has no release."""
    if isinstance(kernel, Modelled):
        return kernel.release
    text = read_text(kernel.proc / "sys/kernel/osrelease") or ""
    return text if re.fullmatch(r"[\w.+~-]+", text) else ""


def command_line(kernel: Kernel) -> list[str]:
    """Return the words of the kernel's command line, in order."""
    return (read_text(kernel.proc / "cmdline") or "").split()


def build_options(kernel: Kernel) -> Mapping[str, str]:
    """Return the options that the kernel was built with, without CONFIG_: `y`, `m`, or `n` for one that is not set.

    Empty if no configuration can be read. Options that the kernel's sources do not have are left out. Cost: 10 ms.
    """
    if isinstance(kernel, Modelled):
        return kernel.build_options
    return {(name or unset): value or "n" for name, value, unset in _SET.findall(_configuration(kernel))}


def _configuration(kernel: Kernel) -> str:
    packed = kernel.proc / "config.gz"
    try:
        if packed.exists():
            import gzip  # noqa: PLC0415 (a diagnosis alone needs it)

            with gzip.open(packed) as file:
                return file.read(_MOST).decode("utf-8", errors="replace")
    except (OSError, EOFError, ValueError):
        pass  # not a configuration: the distribution's file may be one
    if name := release(kernel):
        for place in _OTHER_PLACES:
            if text := read_text(root_directory(kernel) / place.format(name)):
                return text
    return ""
