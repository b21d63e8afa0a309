"""The exceptions of pyvfio. Each says which call failed, with the numbers of the case, why, and how to proceed.

`str(error)` contains all of this. `VfioError` is the base of all errors of the machine, of the kernel's answers and of
the order of calls. Invalid arguments raise ValueError or TypeError instead, before any system call. A subclass exists
where a caller would act differently.
"""

from __future__ import annotations

import errno as errnos
import os
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Self

from pyvfio.units import IovaRange, format_ranges

if TYPE_CHECKING:
    from pyvfio.findings import Finding


class VfioError(Exception):
    """The base of all errors of pyvfio. `message` says what failed and why, `hint` how to proceed (can be empty)."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    bdf: str | None = None
    """The device, where `open_device` raised the error."""

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}" if self.hint else self.message

    def explain(self, *, kernel: object = None) -> tuple[Finding, ...]:
        """Run the checks of `pyvfio.doctor` that fit this error, now and for the device or group of the error.

        Returns what is wrong or worth a note, each with the commands that fix it; nothing where another cause is
        likely, or the cause has gone. `kernel`: a `Kernel`, None for the running one. Cost: as `pyvfio.doctor`.
        """
        # By its name, since errors are below all that the checks use, and nobody pays for the checks before an error.
        found: tuple[Finding, ...] = import_module("pyvfio.diagnosis").explain(self, kernel=kernel)
        return found

    def __reduce__(self) -> tuple[Callable[..., VfioError], tuple[object, ...]]:
        """Support copying and pickling: a pool of workers sends errors to another process."""
        return _again, (type(self), self.args, dict(vars(self)))


def _again(kind: type[VfioError], arguments: tuple[object, ...], attributes: Mapping[str, object]) -> VfioError:
    """Rebuild an error without its constructor, whose arguments are not those in `args`."""
    error = kind.__new__(kind, *arguments)
    if isinstance(error, OSError):
        OSError.__init__(error, *arguments)
    vars(error).update(attributes)
    return error


class IoctlError(VfioError, OSError):
    """A system call failed. `errno` and `strerror` are the kernel's.

    `request` is the C name of the call, and `arguments` holds the arguments. The IOVA allocator, which makes no system
    call, raises the same error.
    """

    def __init__(
        self, number: int, message: str, *, request: str, arguments: Mapping[str, int | str], hint: str = ""
    ) -> None:
        OSError.__init__(self, number, os.strerror(number))
        self.message = message
        self.request = request
        self.arguments = dict(arguments)
        self.hint = hint

    def __str__(self) -> str:
        given = ", ".join(f"{k}={v:#x}" if isinstance(v, int) else f"{k}={v}" for k, v in self.arguments.items())
        name = errnos.errorcode.get(self.errno or 0, str(self.errno))
        return f"{self.request}({given}): {name}, {VfioError.__str__(self)}"

    @classmethod
    def of(
        cls, error: OSError, message: str, *, request: str, arguments: Mapping[str, int | str], hint: str = ""
    ) -> Self:
        """Return an IoctlError with the errno of `error` and an explanation; raise it `from error`."""
        return cls(error.errno or 0, message, request=request, arguments=arguments, hint=hint)


class PinLimitError(IoctlError):
    """ENOMEM: the process must not lock that much memory. EAGAIN: mmap(2) under mlockall(2) with MCL_FUTURE.

    All numbers are bytes. `limit` is RLIMIT_MEMLOCK; None: the limit is not the reason. `used` counts against the
    limit. Of `used`, mlock(2) and mlockall(2) account for `mlocked`, and the address space of this call for `mapped`
    (None: no address space is involved). `asked` is the size of the whole change, of all its pieces.

    `by_user`: the limit is for all processes of the user together, as iommufd counts by default. No file shows their
    sum: `used` is then the part of this address space, at least.
    """

    limit: int | None = None
    used: int = 0
    mlocked: int = 0
    mapped: int | None = None
    asked: int = 0
    by_user: bool = False


class EntryLimitError(IoctlError):
    """ENOSPC: the container takes no more mappings. `used` and `limit` count mappings."""

    used: int = 0
    limit: int = 0


class IovaOverlapError(IoctlError):
    """EEXIST: the range overlaps a mapping or a reservation. `existing` lists those that this process made."""

    existing: tuple[IovaRange, ...] = ()


class IovaRangeError(IoctlError):
    """The IOMMU does not offer these I/O virtual addresses, or no free run of them is long enough.

    `ranges` are the ranges of the IOMMU. `largest_free` is the length in bytes of the longest free run, below
    2^`dma_bits` where that limit applies. `largest_free_above` is the longest free run above the limit (0 where no
    limit applied).
    """

    ranges: tuple[IovaRange, ...] = ()
    largest_free: int = 0
    largest_free_above: int = 0


class UnmapSizeError(VfioError):
    """An unmap did not unmap exactly the bytes of the range, or would not have: `asked` and `unmapped` bytes.

    `unmapped` is 0 where the call was not made. The memory behind the range must not be freed or reused.
    """

    def __init__(
        self,
        *,
        iova: int,
        asked: int,
        unmapped: int,
        known: str = "none",
        refused: bool = False,
        request: str = "VFIO_IOMMU_UNMAP_DMA",
    ) -> None:
        """Describe the mismatch.

        `known`: the mappings in the range that were made through the same object, in words. `refused`: pyvfio did not
        make the call, since these mappings show that the call can only fail. `request`: the C name of the call.
        """
        if refused:
            super().__init__(
                f"IOVA {iova:#x}-{iova + asked - 1:#x} cannot be unmapped: the mappings in this range are: {known}",
                hint="Nothing has been unmapped. Unmap whole mappings, without a gap between them",
            )
        else:
            super().__init__(
                f"{request} was asked for {asked:#x} bytes at IOVA {iova:#x} and unmapped {unmapped:#x}",
                hint=f"Known mappings in this range: {known}. Another user of the address space maps or unmaps in it",
            )
        self.iova = iova
        self.asked = asked
        self.unmapped = unmapped


class CapabilityError(VfioError):
    """A capability chain that the kernel returned is malformed."""


class UnsupportedError(VfioError):
    """The kernel or the device cannot do this: an API version, an extension, a reset, an interrupt."""


class UnavailableError(VfioError):
    """VFIO is not available: /dev/vfio/vfio is missing, or the machine has no IOMMU."""


class DeviceNotFoundError(VfioError):
    """The device does not exist, or is in no IOMMU group."""


class DeviceGoneError(VfioError):
    """The device may be gone: configuration space reads all ones, or is unreadable. Close the device."""

    def __init__(self, bdf: str, why: str) -> None:
        super().__init__(
            f"{bdf} may be gone: {why}",
            hint="A device that was removed, or that has lost its link or its power, reads all ones. Close the device",
        )


class RegisterTimeoutError(VfioError, TimeoutError):
    """A register did not reach a value in time. `last` is the last value read; `mask` and `value` are the condition."""

    def __init__(self, message: str, *, last: int, mask: int, value: int) -> None:
        super().__init__(message)
        self.last = last
        self.mask = mask
        self.value = value


class NotBoundError(VfioError):
    """The device is not bound to vfio-pci. `driver` is the name of its driver (None: no driver)."""

    driver: str | None = None


class AccessDeniedError(VfioError, PermissionError):
    """The user (EACCES) or the process (EPERM) must not open `path`, or the file system is read-only (EROFS)."""

    def __init__(self, path: str, *, hint: str, number: int = errnos.EACCES) -> None:
        PermissionError.__init__(self, number, os.strerror(number))
        who = "process" if number == errnos.EPERM else "user"
        self.message = (
            f"{path} cannot be written" if number == errnos.EROFS else f"{path} may not be opened by this {who}"
        )
        self.path = path
        self.hint = hint


@dataclass(frozen=True, slots=True)
class GroupMember:
    """A device of an IOMMU group, and whether its driver keeps the group from being used by VFIO."""

    bdf: str
    driver: str | None
    blocks: bool


class GroupNotViableError(VfioError):
    """A kernel driver owns a device of the group. `members` lists all devices, and which of them block the group."""

    def __init__(self, group: int, members: Sequence[GroupMember]) -> None:
        blockers = [member for member in members if member.blocks]
        names = ", ".join(f"{member.bdf} ({member.driver})" for member in blockers) or "none that sysfs shows"
        super().__init__(
            f"IOMMU group {group} is not viable: kernel drivers own {len(blockers)} of {len(members)} devices: {names}",
            hint="Bind each of them to vfio-pci, or to no driver: pyvfio bind "
            + " ".join(member.bdf for member in blockers),
        )
        self.group = group
        self.members = tuple(members)


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that has a file open, and whether this process is the one."""

    pid: int
    command: str
    is_this_process: bool = False


class GroupBusyError(VfioError):
    """The group is already open. `holders` are the processes that have the group open and that this user can see."""

    def __init__(self, group: int, holders: Sequence[Holder], *, hint: str = "", device: str | None = None) -> None:
        """Describe the holders. `hint` replaces the advice on opening a device of an open group.

        `device`: the device that is already open through the device's own node; None: the group is.
        """
        names = ", ".join(
            f"{holder.command} (pid {holder.pid}{', this process' if holder.is_this_process else ''})"
            for holder in holders
        )
        super().__init__(
            f"{f'{device} of ' if device else ''}IOMMU group {group} is already open"
            + (f" in {names}" if names else ""),
            hint=hint or _how_to_share(holders),
        )
        self.group = group
        self.holders = tuple(holders)


def _how_to_share(holders: Sequence[Holder]) -> str:
    """Return the hint: a group can be open only once, and the devices of the group share one address space."""
    once = "A group can be open only once at a time"
    if any(holder.is_this_process for holder in holders):
        return (
            f"{once}. To open another device of the group, name the address space of the open device: "
            "open_device(..., space=device.space), or container=device.container on type1. Otherwise close the devices "
            "of the group first. An object that was never closed can stay open until gc.collect()"
        )
    if holders:
        return f"{once}: close the devices of the group in that process, or end the process"
    return f"{once}, and {nobody_found()}. Processes that hold only a device descriptor are not found"


def nobody_found() -> str:
    """Return the part of a hint that says where to look for the process that has a group open."""
    others = "" if os.geteuid() == 0 else " as root, or"
    return f"no process was found that has the group open: look{others} from outside this container or PID namespace"


class ClosedError(VfioError):
    """A handle was used after it was closed."""


class ForkedError(VfioError):
    """A handle was used in a forked child of the process that opened the handle.

    The child shares the kernel object with the parent. A call in the child would change the state of the parent.
    """

    def __init__(self, what: str, *, owner: int, child: int | None = None) -> None:
        super().__init__(
            f"{what} belongs to process {owner}, and this is its child{'' if child is None else f' {child}'}",
            hint="Open the device again in the child, after the parent has closed the device",
        )


class DiscardError(VfioError):
    """Memory must not be discarded: a claim forbids discards, or a notifier cannot follow."""


class GapError(VfioError):
    """A change would briefly unmap memory that stays in use, and `allow_gap=False` forbids that."""


class HandOverError(VfioError):
    """A hand-over to another process is impossible, or cannot be taken over as it was handed over.

    Also raised for a change of an object while a hand-over of the object is in progress.
    """


class ReentrancyError(VfioError):
    """A RAM block was added, removed or resized from inside a notifier of the same list."""


class RollbackError(VfioError, ExceptionGroup[Exception]):
    """An operation failed, and the undo failed too. The affected memory is kept.

    `exceptions` holds the failure of the operation first, and then the failures of the undo.
    """

    def __new__(cls, message: str, exceptions: Sequence[Exception], *, hint: str = "") -> RollbackError:
        """Make the group: ExceptionGroup takes the arguments in `__new__`."""
        del hint
        return ExceptionGroup.__new__(cls, message, exceptions)

    def __init__(self, message: str, exceptions: Sequence[Exception], *, hint: str = "") -> None:
        ExceptionGroup.__init__(self, message, exceptions)
        self.hint = hint

    def derive(self, excs: Sequence[Exception]) -> RollbackError:  # type: ignore[override]
        """Return a RollbackError of some of the exceptions, for `split` and `subgroup`."""
        return RollbackError(self.message, excs, hint=self.hint)

    def __str__(self) -> str:
        told = dict.fromkeys(str(error) for error in self.exceptions)  # two failures of one cause are told once
        text = f"{self.message}: " + "; then ".join(told)
        return f"{text}. {self.hint}" if self.hint else text


REACH_UNKNOWN = (RollbackError, UnmapSizeError)
"""After these errors the mappings of a device are unknown, so that memory is kept."""


class CannotBePinnedWarning(RuntimeWarning):
    """A block was made of memory that kernels refuse to pin for a device that writes."""


class UnsafeNoIommuWarning(RuntimeWarning):
    """A device was opened without an IOMMU: nothing keeps the device out of any memory of the machine."""


class PersistenceWarning(RuntimeWarning):
    """Data written to persistent memory can be lost when the machine goes down."""


class MemoryNotReturnedWarning(RuntimeWarning):
    """A block shrank, but the memory could not be returned to the system.

    The memory stays charged to the process, and no device reaches it. A later grow zeroes the memory before use.
    """


def descriptor_hint(number: int) -> str:
    """Return a hint for EMFILE and ENFILE, with the limit; an empty string for any other errno."""
    if number == errnos.EMFILE:
        limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"This process may have {limit} files open: close some, or raise the limit up to {most} (ulimit -n)"
    if number == errnos.ENFILE:
        return "The machine has reached its limit of open files: close some, or raise the sysctl fs.file-max"
    return ""


def as_exception(error: BaseException) -> Exception:
    """Return an exception that a RollbackError can hold.

    ExceptionGroup refuses KeyboardInterrupt and other bare BaseExceptions: a VfioError names them instead.
    """
    return error if isinstance(error, Exception) else VfioError(f"interrupted by {type(error).__name__}")


def raise_collected(message: str, failures: Sequence[Exception]) -> None:
    """Raise the failures of a series of steps: the single failure, or a RollbackError of several.

    Return if there are none.
    """
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise RollbackError(message, failures)


def describe_ranges(ranges: Sequence[IovaRange]) -> str:
    """Return a sentence with the ranges that an IOMMU offers, for hints."""
    return f"The IOMMU offers {format_ranges(ranges)}"
