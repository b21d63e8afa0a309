"""What it means when type1 refuses a mapping, and what to do about it: an errno and the facts of the case to words.

Source: `vfio_dma_do_map` and `vfio_pin_pages_remote` in drivers/vfio/vfio_iommu_type1.c.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from pyvfio.errors import EntryLimitError, IoctlError, IovaOverlapError, IovaRangeError, PinLimitError, describe_ranges
from pyvfio.iommu.space import Mapping
from pyvfio.kernel import Kernel
from pyvfio.memory import describe, locking
from pyvfio.units import IovaRange, format_ranges, format_size

_Error = TypeVar("_Error", bound=IoctlError)


def describe_mappings(mappings: Sequence[Mapping]) -> str:
    """The IOVAs of mappings, the first eight of them."""
    return format_ranges(mapping.range for mapping in mappings[:8]) + (", …" if len(mappings) > 8 else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class MapRefusal:
    """A VFIO_IOMMU_MAP_DMA that ended in `error`: its arguments, and what the container knew then.

    `overlapping`: the mappings that lie where it should have gone; `made_here`, `entry_limit`: how many mappings there
    are and may be; `mapped`: how many bytes they have; `ranges`, `page_size`: of the IOMMU; `attached`: whether there
    is one.
    """

    error: OSError
    vaddr: int
    iova: int
    size: int
    flags: int
    kernel: Kernel
    overlapping: Sequence[Mapping]
    made_here: int
    entry_limit: int
    mapped: int
    ranges: tuple[IovaRange, ...]
    page_size: int
    attached: bool

    def explain(self) -> IoctlError:
        """The error to raise, `from` the kernel's. Some 50 µs where the limit of locked memory is asked for,
        and milliseconds where others than this container hold of it."""
        known = {
            errno.ENOMEM: self._memory,
            errno.ENOSPC: self._entries,
            errno.EEXIST: self._overlap,
            errno.EINVAL: self._arguments,
            errno.EOVERFLOW: self._arguments,
            errno.EFAULT: self._fault,
        }.get(self.error.errno or 0)
        if known is not None:
            with suppress(OSError):  # no descriptor is left to read /proc with
                return known()
        kind = PinLimitError if self.error.errno == errno.ENOMEM else IoctlError
        return self._say(kind, f"{self.error.strerror}")

    def _say(self, kind: type[_Error], message: str, hint: str = "") -> _Error:
        return kind.of(self.error, message, request="VFIO_IOMMU_MAP_DMA", arguments=self._given, hint=hint)

    @property
    def _given(self) -> dict[str, int | str]:
        return {"vaddr": self.vaddr, "iova": self.iova, "size": self.size, "flags": self.flags}

    def _memory(self) -> PinLimitError:
        lock = self.kernel.memlock()
        if locking.suffices(lock, self.size):
            return self._say(
                PinLimitError,
                f"the kernel has no memory to map {format_size(self.size)}",
                "RLIMIT_MEMLOCK is not what stands in the way; free memory, or look at the cgroup's limit",
            )
        return locking.limit_error(
            self.error,
            lock,
            self.size,
            kernel=self.kernel,
            request="VFIO_IOMMU_MAP_DMA",
            arguments=self._given,
            mapped=self.mapped,
        )

    def _entries(self) -> EntryLimitError:
        explained = self._say(
            EntryLimitError,
            f"all {self.entry_limit} mappings that this container may hold are in use, {self.made_here} of them made "
            "here",
            "Map larger pieces, or raise /sys/module/vfio_iommu_type1/parameters/dma_entry_limit, which a container "
            "reads when its first group is attached",
        )
        explained.used, explained.limit = self.made_here, self.entry_limit
        return explained

    def _overlap(self) -> IovaOverlapError:
        explained = self._say(
            IovaOverlapError,
            f"part of it is mapped already: {describe_mappings(self.overlapping)}"
            if self.overlapping
            else "part of it is mapped already, by another process, or by another Container of the same descriptor",
            "Unmap that first, or reserve another IOVA",
        )
        explained.existing = tuple(mapping.range for mapping in self.overlapping)
        return explained

    def _arguments(self) -> IoctlError:
        last = self.iova + self.size - 1
        if not self.attached:
            return self._say(IoctlError, f"{self.error.strerror}", "The container has no group yet: attach one first")
        if self.size <= 0 or any(offered.start <= self.iova and last <= offered.last for offered in self.ranges):
            hint = (
                f"Addresses and size must be multiples of {self.page_size:#x}, the size not 0, and the device must be "
                "let read or write"
            )
            return self._say(IoctlError, f"{self.error.strerror}", hint)
        explained = self._say(
            IovaRangeError,
            f"IOVA {self.iova:#x}-{last:#x} does not lie in one range of the IOMMU",
            f"{describe_ranges(self.ranges)}. Under QEMU an intel-iommu offers more with aw-bits=48",
        )
        explained.ranges = self.ranges
        return explained

    def _fault(self) -> IoctlError:
        return self._say(
            IoctlError,
            "the memory cannot be pinned for this access",
            f"{describe(self.vaddr, self.size)}. It must be mapped and accessible, and where the device may write, "
            "writable and no shared mapping (s) of a file on a disk (since Linux 6.5)",
        )
