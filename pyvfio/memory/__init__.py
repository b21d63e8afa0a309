"""Process memory that can grow and shrink in place: reserve, activate, deactivate, release.

`reservation` has the address space and what of it is in use, `kinds` where the pages come from, `settings` what
madvise(2) is told, `exports` who looks at it, `maps` what the kernel says of it, `locking` what of it may be locked.
"""

from pyvfio.memory.exports import Exports
from pyvfio.memory.kinds import Anonymous, File, Memfd, MemoryKind, Received
from pyvfio.memory.locking import lock_all_memory, unlock_all_memory
from pyvfio.memory.maps import describe
from pyvfio.memory.reservation import ALIGNMENT, Reservation
from pyvfio.memory.settings import MemorySettings, apply_settings

__all__ = [
    "ALIGNMENT",
    "Anonymous",
    "Exports",
    "File",
    "Memfd",
    "MemoryKind",
    "MemorySettings",
    "Received",
    "Reservation",
    "apply_settings",
    "describe",
    "lock_all_memory",
    "unlock_all_memory",
]
