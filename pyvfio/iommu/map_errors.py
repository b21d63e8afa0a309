"""The errors of a map: an errno and the facts of the case become an exception with a message and a hint.

This module is for both kinds of address space; `type1_errors` and `ioas_errors` have the rest.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from pyvfio.errors import IoctlError, IovaOverlapError, IovaRangeError, PinLimitError, describe_ranges
from pyvfio.iommu.table import MappingTable, describe_mappings
from pyvfio.kernel import Kernel
from pyvfio.memory import describe, locking
from pyvfio.units import IovaRange, format_size

Error = TypeVar("Error", bound=IoctlError)


@dataclass(frozen=True, slots=True, kw_only=True)
class MapRefusal:
    """A map that failed with `error`: the arguments, and the state of the address space at that time.

    `table`: the existing mappings; `ranges`, `page_size`: those of the IOMMU.
    """

    error: OSError
    vaddr: int
    iova: int
    size: int
    flags: int
    kernel: Kernel
    table: MappingTable
    ranges: tuple[IovaRange, ...]
    page_size: int

    call: ClassVar[str]
    """The ioctl."""

    def explain(self) -> IoctlError:
        """Return the exception to raise `from` the kernel's error.

        Cost: about 50 µs if the limit of locked memory must be read; milliseconds if other address spaces have locked
        memory too.
        """
        with suppress(OSError):  # /proc cannot be read if no file descriptor is left
            known = self.explain_errno(self.error.errno or 0)
            if known is not None:
                return known
        kind = PinLimitError if self.error.errno == errno.ENOMEM else IoctlError
        return self.say(kind, f"{self.error.strerror}")

    def explain_errno(self, number: int) -> IoctlError | None:
        """Return the exception for an errno; None if there is nothing to add to the words of the C library."""
        if number == errno.ENOMEM:
            return self.memory()
        if number == errno.EEXIST:
            return self._overlap()
        if number in (errno.EINVAL, errno.EOVERFLOW):
            return self.arguments()
        return self.fault() if number == errno.EFAULT else None

    def say(self, kind: type[Error], message: str, hint: str = "") -> Error:
        """Return an exception of that kind, with the request and the arguments."""
        return kind.of(self.error, message, request=self.request, arguments=self.given, hint=hint)

    @property
    def request(self) -> str:
        """The ioctl that failed."""
        return self.call

    @property
    def given(self) -> dict[str, int | str]:
        """The arguments of the map."""
        return {"vaddr": self.vaddr, "iova": self.iova, "size": self.size, "flags": self.flags}

    def memory(self) -> PinLimitError:
        """Explain ENOMEM: the limit of the process, or no memory."""
        lock = self.kernel.memlock()
        if locking.suffices(lock, self.size):
            return self.no_memory()
        return locking.limit_error(
            self.error,
            lock,
            self.size,
            kernel=self.kernel,
            request=self.request,
            arguments=self.given,
            mapped=self.table.mapped,
        )

    def no_memory(self) -> PinLimitError:
        """Explain ENOMEM where no limit is the cause."""
        return self.say(
            PinLimitError,
            f"the kernel has no memory to map {format_size(self.size)}",
            "RLIMIT_MEMLOCK is not the cause; free memory, or raise the memory limit of the cgroup",
        )

    def _overlap(self) -> IovaOverlapError:
        overlapping = self.table.overlapping(iova=self.iova, size=self.size)
        explained = self.say(
            IovaOverlapError,
            f"part of the range is mapped already: {describe_mappings(overlapping)}"
            if overlapping
            else "part of the range is mapped already, by another process or another object of the same descriptor",
            "Unmap that part first, or reserve another IOVA",
        )
        explained.existing = tuple(mapping.range for mapping in overlapping)
        return explained

    def arguments(self) -> IoctlError:
        """Explain EINVAL and EOVERFLOW: no range of the IOMMU has the IOVA, or an argument is never right."""
        last = self.iova + self.size - 1
        if self.size <= 0 or any(offered.start <= self.iova and last <= offered.last for offered in self.ranges):
            hint = (
                f"Addresses and size must be multiples of {self.page_size:#x}, the size must not be 0, and read or "
                "write access must be allowed"
            )
            return self.say(IoctlError, f"{self.error.strerror}", hint)
        explained = self.say(
            IovaRangeError,
            f"IOVA {self.iova:#x}-{last:#x} does not lie in one range of the IOMMU",
            f"{describe_ranges(self.ranges)}. Under QEMU an intel-iommu offers more with aw-bits=48",
        )
        explained.ranges = self.ranges
        return explained

    def fault(self) -> IoctlError:
        """Explain EFAULT: the memory cannot be pinned."""
        return self.say(
            IoctlError,
            "the memory cannot be pinned for this access",
            f"{describe(self.vaddr, self.size)}. The memory must be mapped and accessible. If the device may write, "
            "the memory must be writable, and no shared mapping (s) of a file on a disk (since Linux 6.5)",
        )
