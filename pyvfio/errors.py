"""Every exception that pyvfio raises of its own: what is wrong, with the numbers of the case, and what to do.

`str(error)` says all of it. Catch `VfioError` for anything that pyvfio found wrong with the machine, the kernel's
answer or the order of calls. Arguments that can never be right are ValueError or TypeError instead, raised before any
system call. A subclass exists where a caller would act differently.
"""

from __future__ import annotations

import errno as errnos
import os
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from pyvfio.units import IovaRange, format_ranges


class VfioError(Exception):
    """What is wrong, and in `hint` what to do about it (may be empty)."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[Callable[..., VfioError], tuple[object, ...]]:
        """So that it can be copied, and sent to another process: a pool of workers does."""
        return _again, (type(self), self.args, dict(vars(self)))


def _again(kind: type[VfioError], arguments: tuple[object, ...], attributes: Mapping[str, object]) -> VfioError:
    """Without calling its own constructor, which takes other arguments than `args` keeps."""
    error = kind.__new__(kind, *arguments)
    if isinstance(error, OSError):
        OSError.__init__(error, *arguments)
    else:
        BaseException.__init__(error, *arguments)
    vars(error).update(attributes)
    return error


class IoctlError(VfioError, OSError):
    """A system call was refused. `errno` and `strerror` are the kernel's; `request` is the call's name in C,
    `arguments` what it was given. The IOVA allocator, which makes no system call, refuses in the same way."""

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
        """The same errno with an explanation; raise it `from error`."""
        return cls(error.errno or 0, message, request=request, arguments=arguments, hint=hint)


class PinLimitError(IoctlError):
    """ENOMEM, or EAGAIN from mmap(2) where mlockall(2) holds what is to come: so much may not be locked. In bytes:
    `limit` (None: not the limit's doing), `used` of it, of that `mlocked` by mlock and mlockall and `mapped` by the
    address space in question (None: no space was), `asked`: by the whole change, however many pieces it has."""

    limit: int | None = None
    used: int = 0
    mlocked: int = 0
    mapped: int | None = None
    asked: int = 0


class EntryLimitError(IoctlError):
    """ENOSPC: the container holds as many mappings as it may. `used` and `limit` count mappings."""

    used: int = 0
    limit: int = 0


class IovaOverlapError(IoctlError):
    """EEXIST: something is there already. `existing` says what, as far as this process put it there."""

    existing: tuple[IovaRange, ...] = ()


class IovaRangeError(IoctlError):
    """No such I/O virtual addresses, or none left. `ranges` is what the IOMMU offers, `largest_free` the longest run
    of bytes that is still free in it, below 2^`dma_bits` where that is a limit, and `largest_free_above` the longest
    above (0 where that was not the question)."""

    ranges: tuple[IovaRange, ...] = ()
    largest_free: int = 0
    largest_free_above: int = 0


class UnmapSizeError(VfioError):
    """The kernel unmapped another number of bytes than it was asked to, or would have: `asked`, `unmapped` (0 where the
    call was not made). The memory behind the range must not be given back."""

    def __init__(self, *, iova: int, asked: int, unmapped: int, known: str = "none", refused: bool = False) -> None:
        """`known`: the mappings there that were made through the same object, in words. `refused`: they show that the
        call can only fail, so it was not made."""
        if refused:
            super().__init__(
                f"IOVA {iova:#x}-{iova + asked - 1:#x} cannot be unmapped: mapped there are {known}",
                hint="Nothing has been unmapped. Unmap whole mappings, without a gap between them",
            )
        else:
            super().__init__(
                f"VFIO_IOMMU_UNMAP_DMA was asked for {asked:#x} bytes at IOVA {iova:#x} and unmapped {unmapped:#x}",
                hint=f"Known to be mapped there: {known}. Something else maps or unmaps through the same container",
            )
        self.iova = iova
        self.asked = asked
        self.unmapped = unmapped


class CapabilityError(VfioError):
    """A capability chain that the kernel returned is malformed."""


class UnsupportedError(VfioError):
    """The kernel or the device cannot do this: an API version, an extension, a reset, an interrupt."""


class UnavailableError(VfioError):
    """VFIO itself is not there: no /dev/vfio/vfio, or no IOMMU."""


class DeviceNotFoundError(VfioError):
    """No such device, or it is in no IOMMU group."""


class DeviceGoneError(VfioError):
    """The device may have gone: its configuration space reads all ones, or is unreadable. Close the device."""

    def __init__(self, bdf: str, why: str) -> None:
        super().__init__(
            f"{bdf} may have gone: {why}",
            hint="A device that was removed, or that has lost its link or its power, reads all ones. Close the device",
        )


class RegisterTimeoutError(VfioError, TimeoutError):
    """A register did not take the value in time: the `last` value that was read, the `mask`, and the `value` wanted."""

    def __init__(self, message: str, *, last: int, mask: int, value: int) -> None:
        super().__init__(message)
        self.last = last
        self.mask = mask
        self.value = value


class NotBoundError(VfioError):
    """The device is not bound to vfio-pci. `driver` is what it is bound to (None: nothing)."""

    driver: str | None = None


class AccessDeniedError(VfioError, PermissionError):
    """This user (EACCES) or this process (EPERM) may not open `path`, or its file system is read-only (EROFS)."""

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
    """A device of the group belongs to a kernel driver. `members` lists all of them, each with whether it blocks."""

    def __init__(self, group: int, members: Sequence[GroupMember]) -> None:
        blockers = [member for member in members if member.blocks]
        names = ", ".join(f"{member.bdf} ({member.driver})" for member in blockers) or "none that sysfs shows"
        super().__init__(
            f"IOMMU group {group} is not viable: of its {len(members)} devices these belong to kernel drivers: {names}",
            hint="Bind each of them to vfio-pci or to no driver at all: scripts/bind "
            + " ".join(member.bdf for member in blockers),
        )
        self.group = group
        self.members = tuple(members)


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that has a file open, and whether it is this one."""

    pid: int
    command: str
    is_this_process: bool = False


class GroupBusyError(VfioError):
    """The group is open already. `holders` are the processes that have it open, as far as this user may see."""

    def __init__(self, group: int, holders: Sequence[Holder], *, hint: str = "") -> None:
        """`hint`: in place of how to open a device of a group that is open."""
        names = ", ".join(
            f"{holder.command} (pid {holder.pid}{', this process' if holder.is_this_process else ''})"
            for holder in holders
        )
        super().__init__(
            f"IOMMU group {group} is already open" + (f" in {names}" if names else ""),
            hint=hint or _how_to_share(holders),
        )
        self.group = group
        self.holders = tuple(holders)


def _how_to_share(holders: Sequence[Holder]) -> str:
    """A group can be open once at a time, and its devices have one container."""
    once = "A group can be open once at a time"
    if any(holder.is_this_process for holder in holders):
        return (
            f"{once}. To open another device of it, or this one again, name the container that it is in: "
            "open_device(..., container=device.container). Otherwise close its devices first: an object that was "
            "forgotten may be open until gc.collect()"
        )
    if holders:
        return f"{once}: close its devices there, or end that process"
    return f"{once}, and {nobody_found()}. A device descriptor that outlived its group's is not seen either"


def nobody_found() -> str:
    """Where to look for the process that has a group open, for hints."""
    others = "" if os.geteuid() == 0 else " as root, or"
    return f"no process was found that has it open: look{others} from outside of this container or PID namespace"


class ClosedError(VfioError):
    """A handle was used after it was closed."""


class ForkedError(VfioError):
    """A handle was used in a child of the process that opened it. The child shares the kernel's object, so that
    whatever it did would happen to the parent."""

    def __init__(self, what: str, *, owner: int, child: int | None = None) -> None:
        super().__init__(
            f"{what} belongs to process {owner}, and this is its child{'' if child is None else f' {child}'}",
            hint="Open the device anew in the child, after the parent has closed it",
        )


class DiscardError(VfioError):
    """Memory may not be discarded: a claim rules it out, or a notifier could not follow."""


class GapError(VfioError):
    """A resize would take memory that stays out of the device's reach for a moment, and that was not allowed."""


class HandOverError(VfioError):
    """Something cannot be handed to another process, is being handed over and so cannot be changed, or could not be
    taken over as it was handed."""


class ReentrancyError(VfioError):
    """A RAM block was added, removed or resized from inside a notifier of the same list."""


class RollbackError(VfioError, ExceptionGroup[Exception]):
    """An operation failed and so did its undo. `exceptions` holds the first failure, then those of the undo; the
    memory in question is kept."""

    def __new__(cls, message: str, exceptions: Sequence[Exception], *, hint: str = "") -> RollbackError:
        """As ExceptionGroup, which takes its arguments here."""
        del hint
        return ExceptionGroup.__new__(cls, message, exceptions)

    def __init__(self, message: str, exceptions: Sequence[Exception], *, hint: str = "") -> None:
        ExceptionGroup.__init__(self, message, exceptions)
        self.hint = hint

    def derive(self, excs: Sequence[Exception]) -> RollbackError:  # type: ignore[override]
        """A RollbackError of some of its exceptions, for `split` and `subgroup`."""
        return RollbackError(self.message, excs, hint=self.hint)

    def __str__(self) -> str:
        text = f"{self.message}: " + "; then ".join(str(error) for error in self.exceptions)
        return f"{text}. {self.hint}" if self.hint else text


REACH_UNKNOWN = (RollbackError, UnmapSizeError)
"""After these nobody knows what a device still reaches, so that memory is kept."""


class CannotBePinnedWarning(RuntimeWarning):
    """A block was made of memory that kernels do not let a device write to."""


class PersistenceWarning(RuntimeWarning):
    """What is written to persistent memory may be lost when the machine goes down."""


class MemoryNotReturnedWarning(RuntimeWarning):
    """A block shrank, but its memory could not be given back to the system. It stays charged, out of the device's
    reach, and is zeroed before it is seen again."""


def descriptor_hint(number: int) -> str:
    """A hint for EMFILE and ENFILE, with the limit; empty for another errno."""
    if number == errnos.EMFILE:
        limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"This process may have {limit} files open: close some, or raise the limit, up to {most}: ulimit -n"
    if number == errnos.ENFILE:
        return "The machine has as many files open as it may have: close some, or raise the sysctl fs.file-max"
    return ""


def as_exception(error: BaseException) -> Exception:
    """What a RollbackError can hold: KeyboardInterrupt and its like, which no ExceptionGroup takes, in words."""
    return error if isinstance(error, Exception) else VfioError(f"interrupted by {type(error).__name__}")


def raise_collected(message: str, failures: Sequence[Exception]) -> None:
    """Raise what a series of steps, each of which had to be tried, ran into: nothing, the one failure, or all."""
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise RollbackError(message, failures)


def describe_ranges(ranges: Sequence[IovaRange]) -> str:
    """A sentence with the ranges that an IOMMU offers, for hints."""
    return f"The IOMMU offers {format_ranges(ranges)}"
