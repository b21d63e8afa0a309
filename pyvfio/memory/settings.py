"""What madvise(2) is told about memory, on exactly what is activated."""

from __future__ import annotations

import errno
import logging
import mmap
from dataclasses import dataclass

from pyvfio.errors import IoctlError
from pyvfio.kernel import Kernel
from pyvfio.units import check_bool

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """What madvise(2) is told about all memory of a block, kept through every resize.

    `dontfork`: a child does not inherit the memory (on by default: copy-on-write after a fork would part the process's
    pages from those the device has). `hugepage`: transparent huge pages may back it. `dontdump`: left out of core
    dumps. `mergeable`: KSM may merge it; merging moves pages, so leave it off for memory that a device reaches.
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
        chosen = (
            (self.mergeable, mmap.MADV_MERGEABLE),
            (self.dontdump, mmap.MADV_DONTDUMP),
            (self.hugepage, mmap.MADV_HUGEPAGE),
            (self.dontfork, mmap.MADV_DONTFORK),
        )
        return tuple(advice for wanted, advice in chosen if wanted)


# A kernel built without KSM or without transparent huge pages answers EINVAL; both only save memory or time.
_MAY_BE_MISSING = (mmap.MADV_MERGEABLE, mmap.MADV_HUGEPAGE)


def apply_settings(kernel: Kernel, settings: MemorySettings, *, vaddr: int, size: int) -> None:
    """Make `settings` on `[vaddr, vaddr + size)`. Raises IoctlError; up to four system calls."""
    for advice in settings.advices:
        try:
            kernel.madvise(vaddr, size, advice)
        except OSError as error:
            if error.errno != errno.EINVAL or advice not in _MAY_BE_MISSING:
                raise IoctlError.of(
                    error,
                    "a setting of a block's memory could not be made",
                    request="madvise",
                    arguments={"vaddr": vaddr, "size": size, "advice": advice},
                    hint="The process may have as many mappings as it may (vm.max_map_count)",
                ) from error
            logger.debug("madvise(%#x, %#x, %d): not built into this kernel", vaddr, size, advice)
