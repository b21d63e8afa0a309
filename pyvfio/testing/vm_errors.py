"""The errors of the virtual machine, and a search for the tools that the machine needs."""

import os
import shutil
from collections.abc import Mapping

from pyvfio.errors import VfioError


class VmError(VfioError):
    """The virtual machine, or a tool or kernel for the machine, failed. A failure of the command is not an error.

    :attr:`log` is the kernel's log until the failure; empty if nothing was booted.
    """

    def __init__(self, message: str, *, hint: str = "", log: str = "") -> None:
        super().__init__(message, hint=hint)
        self.log = log


class VmLostError(VmError):
    """QEMU ended before the command: the kernel panicked or oopsed (:attr:`panicked`), or QEMU failed."""

    def __init__(self, message: str, *, panicked: bool, log: str = "") -> None:
        super().__init__(message, log=log)
        self.panicked = panicked


class VmTimeoutError(VmError, TimeoutError):
    """The time-out passed before the command ended. The machine has been killed."""


class MissingToolError(VmError):
    """A program is missing; :attr:`package` is the Debian package of the program."""

    def __init__(self, program: str, *, package: str) -> None:
        super().__init__(f"{program} is missing", hint=f"Install it with: apt-get install {package}")
        self.program = program
        self.package = package


class KernelUnavailableError(VmError):
    """The kernel is not in the cache and cannot be fetched."""


class KvmUnavailableError(VmError):
    """KVM was asked for and does not work on this host."""


def find_tool(program: str, *, package: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return the path of a program. The sbin directories are searched too, because users' PATHs often lack them.

    :raises MissingToolError: the program is missing.
    """
    path = os.pathsep.join([environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    found = shutil.which(program, path=path)
    if found is None:
        raise MissingToolError(program, package=package)
    return found
