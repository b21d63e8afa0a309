"""Process memory that can grow and shrink in place: reserve, activate, deactivate, release.

`reservation` has the address space and the part in use, `kinds` the source of the pages, and `settings` the madvise(2)
advice. `exports` tracks live views, `maps` reads /proc/self/maps, and `locking` handles locked memory.
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
