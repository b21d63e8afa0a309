"""The madvise(2) advice for memory, applied to exactly the activated bytes."""

from __future__ import annotations

import errno
import logging
import mmap
from dataclasses import dataclass
from functools import cache
from itertools import compress

from pyvfio.errors import IoctlError
from pyvfio.kernel import Kernel
from pyvfio.units import check_bool

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """The madvise(2) advice for all memory of a block, kept through every resize.

    `dontfork`: a child does not inherit the memory. On by default: copy-on-write after a fork would separate the pages
    of the process from the pages of the device. `hugepage`: transparent huge pages may back the memory. `dontdump`: the
    memory is left out of core dumps. `mergeable`: KSM may merge the memory. Merging moves pages, so leave `mergeable`
    off for memory that a device reaches.
    """

    dontfork: bool = True
    hugepage: bool = True
    dontdump: bool = False
    mergeable: bool = False

    def __post_init__(self) -> None:
        for name in ("dontfork", "hugepage", "dontdump", "mergeable"):
            check_bool(getattr(self, name), name)

    @property
    def advices(self) -> tuple[int, ...]:
        """The madvise advices, in the order of `qemu_ram_apply_settings`."""
        return _advices(self.mergeable, self.dontdump, self.hugepage, self.dontfork)


_ADVICES = (mmap.MADV_MERGEABLE, mmap.MADV_DONTDUMP, mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK)


@cache  # called by each shrink
def _advices(*wanted: bool) -> tuple[int, ...]:
    return tuple(compress(_ADVICES, wanted))


# A kernel without KSM or transparent huge pages returns EINVAL. That is no error: both only save memory or time.
_MAY_BE_MISSING = (mmap.MADV_MERGEABLE, mmap.MADV_HUGEPAGE)


def apply_settings(kernel: Kernel, settings: MemorySettings, *, vaddr: int, size: int) -> None:
    """Apply `settings` to `[vaddr, vaddr + size)`. Raises IoctlError. Cost: up to four system calls."""
    for advice in settings.advices:
        try:
            kernel.madvise(vaddr, size, advice)
        except OSError as error:
            if error.errno != errno.EINVAL or advice not in _MAY_BE_MISSING:
                raise IoctlError.of(
                    error,
                    "this madvise advice could not be applied to a block's memory",
                    request="madvise",
                    arguments={"vaddr": vaddr, "size": size, "advice": advice},
                    hint="The process may have reached its limit of mappings: raise vm.max_map_count",
                ) from error
            logger.debug("madvise(%#x, %#x, %d): not built into this kernel", vaddr, size, advice)
