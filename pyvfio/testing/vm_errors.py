"""What can go wrong around a virtual machine, and where its tools are."""

import os
import shutil
from collections.abc import Mapping

from pyvfio.errors import VfioError


class VmError(VfioError):
    """The virtual machine, or something it needs, failed; the command's own failure is never one.

    :attr:`log` is the kernel's log as far as it came, empty when nothing was booted.
    """

    def __init__(self, message: str, *, hint: str = "", log: str = "") -> None:
        super().__init__(message, hint=hint)
        self.log = log


class VmLostError(VmError):
    """QEMU ended before the command had: the kernel panicked or oopsed (:attr:`panicked`), or QEMU failed."""

    def __init__(self, message: str, *, panicked: bool, log: str = "") -> None:
        super().__init__(message, log=log)
        self.panicked = panicked


class VmTimeoutError(VmError, TimeoutError):
    """The time was over before the command was; the machine has been ended."""


class MissingToolError(VmError):
    """A program is not there; :attr:`package` is the Debian package that has it."""

    def __init__(self, program: str, *, package: str) -> None:
        super().__init__(f"{program} is missing", hint=f"Install it with: apt-get install {package}")
        self.program = program
        self.package = package


class KernelUnavailableError(VmError):
    """The kernel asked for is neither in the cache nor to be had."""


def find_tool(program: str, *, package: str, environ: Mapping[str, str] = os.environ) -> str:
    """The path of a program. The sbin directories count, which users' PATHs often lack.

    :raises MissingToolError: it is not there.
    """
    path = os.pathsep.join([environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    found = shutil.which(program, path=path)
    if found is None:
        raise MissingToolError(program, package=package)
    return found
