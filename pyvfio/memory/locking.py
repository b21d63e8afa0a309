"""Memory that this process locks: mlockall(2), the effect on RAM blocks, and the holders of RLIMIT_MEMLOCK.

mlock(2) and VFIO charge the same counter, VmLck, independently of each other. A page that is both locked and mapped for
a device is charged twice. iommufd does so only if memory counts by process. By default, iommufd charges the user:
the limit then holds for the sum of all processes of the user, apart from mlock(2), and no file shows the sum.

Under MCL_FUTURE:

* address space is charged when it is reserved: all of a block's `max_length`, although none of it is memory yet;
* when a block of private memory grows, mprotect(2) populates the new part at once; with `on_fault`, and for a memfd or
  a shared file, the first touch populates a page;
* huge pages of a pool are not charged, because they are never swapped.

Source: `mlockall`, `apply_mlockall_flags` in mm/mlock.c, `mlock_future_ok` in mm/mmap.c (before 6.4
`mlock_future_check`), `mprotect_fixup` in mm/mprotect.c; seen on 6.1, 6.12 and 7.3.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping

from pyvfio.arguments import checked_kernel
from pyvfio.errors import IoctlError, PinLimitError
from pyvfio.kernel import MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT, Kernel, Memlock
from pyvfio.units import check_bool, format_size


def lock_all_memory(*, on_fault: bool = False, kernel: Kernel | None = None) -> None:
    """Lock all present and future memory of this process, so that none of it is swapped out: mlockall(2).

    Present memory is populated first. With `on_fault`, pages are locked when they are touched instead. The lock holds
    until `unlock_all_memory`, for this process and not for its children. Blocks work as before; the description of
    this module lists the charges.

    Raises PinLimitError, with the numbers, if RLIMIT_MEMLOCK is below the size of this process's address space,
    reserved parts of blocks included: the kernel compares these two. Nothing is locked then. Source: `os_mlock` of
    QEMU.
    """
    check_bool(on_fault, "on_fault")
    kernel = checked_kernel(kernel)
    flags = MCL_CURRENT | MCL_FUTURE | (MCL_ONFAULT if on_fault else 0)
    try:
        kernel.mlockall(flags)
    except OSError as error:
        raise _refusal(kernel, error, flags) from error


def unlock_all_memory(*, kernel: Kernel | None = None) -> None:
    """Remove all locks, those of single mlock(2) calls too: munlockall(2).

    Memory mapped for devices stays pinned and charged. Raises IoctlError.
    """
    try:
        checked_kernel(kernel).munlockall()
    except OSError as error:
        raise IoctlError.of(error, f"{error.strerror}", request="munlockall", arguments={}) from error


def _refusal(kernel: Kernel, error: OSError, flags: int) -> IoctlError:
    lock = kernel.memlock()
    if lock.limit is None or lock.privileged or error.errno not in (errno.ENOMEM, errno.EPERM):
        hint = "RLIMIT_MEMLOCK is not the cause"
        return IoctlError.of(error, f"{error.strerror}", request="mlockall", arguments={"flags": flags}, hint=hint)
    message = (
        f"RLIMIT_MEMLOCK lets this process lock {format_size(lock.limit)}, and its address space, the reserved parts "
        f"of RAM blocks included, is {format_size(lock.address_space)}"
    )
    if lock.address_space > lock.limit:
        message += f", so {format_size(lock.address_space - lock.limit)} are missing"
    mlocked = kernel.mlocked() if lock.used else 0
    if (mapped := lock.used - mlocked) > 0:
        message += f"; {format_size(mapped)} mapped for devices are charged in addition"
    hint = raise_limit(lock.address_space + max(mapped, 0))
    refusal = PinLimitError.of(error, message, request="mlockall", arguments={"flags": flags}, hint=hint)
    refusal.limit, refusal.used, refusal.mlocked, refusal.asked = lock.limit, lock.used, mlocked, lock.address_space
    return refusal


def raise_limit(needed: int) -> str:
    """Return the ways to raise RLIMIT_MEMLOCK to `needed` bytes, for hints."""
    return (
        f"ulimit -l {-(-needed // 1024)} (KiB) or more in the shell, memlock in "
        "/etc/security/limits.conf, LimitMEMLOCK=infinity in a systemd unit, --ulimit memlock=-1 for a container; "
        "or CAP_IPC_LOCK"
    )


def suffices(lock: Memlock, size: int) -> bool:
    """Return whether the limit leaves room for `size` more bytes."""
    return lock.limit is None or lock.privileged or lock.used + size <= lock.limit


def limit_error(
    error: OSError,
    lock: Memlock,
    size: int,
    *,
    kernel: Kernel,
    request: str,
    arguments: Mapping[str, int | str],
    mapped: int | None = None,
    why: str = "",
) -> PinLimitError:
    """Return the error for `size` bytes that cannot be locked, with the holders of the limit and a hint.

    `mapped`: the number of bytes that the container in question has mapped. `why`: the beginning of the message.
    """
    mlocked = kernel.mlocked() if lock.used > (mapped or 0) else 0
    limit = lock.limit or 0
    missing = lock.used + size - limit
    hint = raise_limit(lock.used + size)
    if mlocked:
        enough = "is" if mlocked >= missing else "is not"
        hint = (
            f"munlockall (pyvfio.unlock_all_memory) frees {format_size(mlocked)}, which {enough} enough: memory "
            f"that is both locked and mapped for a device is charged twice. Otherwise: {hint}"
        )
    message = (
        f"{why}RLIMIT_MEMLOCK lets this process lock {format_size(limit)}; {format_size(lock.used)} are "
        f"locked{_holders(lock.used, mlocked, mapped)} and {format_size(size)} were asked for, so "
        f"{format_size(missing)} are missing"
    )
    refusal = PinLimitError.of(error, message, request=request, arguments=arguments, hint=hint)
    refusal.limit, refusal.used, refusal.mlocked, refusal.asked = lock.limit, lock.used, mlocked, size
    refusal.mapped = mapped
    return refusal


def user_limit_error(
    error: OSError, limit: int, size: int, *, mapped: int, request: str, arguments: Mapping[str, int | str]
) -> PinLimitError:
    """Return the error for `size` bytes that cannot be pinned, where the limit is for all processes of the user.

    `mapped`: the number of bytes that the address space in question has mapped.
    """
    refusal = PinLimitError.of(
        error,
        f"RLIMIT_MEMLOCK lets the processes of this user pin {format_size(limit)} in all; this address space "
        f"has {format_size(mapped)}, other processes and address spaces of the user have an unknown number, and "
        f"{format_size(size)} were asked for",
        request=request,
        arguments=arguments,
        hint="End other programs of the user that map memory for devices, or raise the limit: "
        f"{raise_limit(mapped + size)}",
    )
    refusal.limit, refusal.used, refusal.asked, refusal.mapped, refusal.by_user = limit, mapped, size, mapped, True
    return refusal


def restate(
    error: PinLimitError, *, kernel: Kernel, size: int, locked: int, arguments: Mapping[str, int | str]
) -> PinLimitError:
    """Return the error for a change that locks `size` bytes in pieces, instead of the error for one piece.

    When the piece was refused, `locked` of the `error.used` bytes belonged to the change itself.
    """
    if error.by_user:
        return user_limit_error(
            error,
            error.limit or 0,
            size,
            mapped=max(error.used - locked, 0),
            request=error.request,
            arguments=arguments,
        )
    return limit_error(
        error,
        Memlock(limit=error.limit, used=error.used - locked, privileged=False),
        size,
        kernel=kernel,
        request=error.request,
        arguments=arguments,
        mapped=None if error.mapped is None else error.mapped - locked,
    )


def _holders(used: int, mlocked: int, mapped: int | None) -> str:
    """Format the holders of locked memory, in brackets."""
    pinned = max(used - mlocked, 0)
    here = min(mapped or 0, pinned)
    others = "mappings for devices" if mapped is None else "mappings elsewhere"
    shares = [(mlocked, "mlock or mlockall"), (here, "mappings of this address space"), (pinned - here, others)]
    said = [f"{format_size(size)} by {whom}" for size, whom in shares if size]
    return f" ({', '.join(said)})" if said else ""
