"""Who may discard memory of blocks, and who rules it out: four claims that do not all go together.

A *coordinated* discard is one that every notifier is told of (`RamBlock.discard`). An *uncoordinated* one happens to a
block's memory unseen: a balloon that calls madvise(2), say. Memory that a device has pinned stays pinned under the
latter, and the process's pages are no longer the device's.

| claim | goes together with |
| --- | --- |
| `disable`: no discards at all | `disable_uncoordinated`, others of its kind |
| `disable_uncoordinated`: none that I am not told of | all but `require` |
| `require`: I discard, coordinated or not | `require_coordinated`, others of its kind |
| `require_coordinated`: I discard, and tell | all but `disable` |

Source: `ram_block_discard_disable`, `ram_block_uncoordinated_discard_disable`, `ram_block_discard_require` and
`ram_block_coordinated_discard_require` (system/physmem.c of QEMU), which answer EBUSY.
"""

from __future__ import annotations

import threading
from collections import Counter
from types import TracebackType
from typing import Self

from pyvfio.errors import DiscardError

_EXCLUDES = {
    "disable": ("require", "require_coordinated"),
    "disable_uncoordinated": ("require",),
    "require": ("disable", "disable_uncoordinated"),
    "require_coordinated": ("disable",),
}


class DiscardClaim:
    """A claim that holds until `close`; twice is fine. A context manager."""

    def __init__(self, guard: DiscardGuard, kind: str) -> None:
        self._guard: DiscardGuard | None = guard
        self.kind = kind

    def close(self) -> None:
        """Give it up."""
        guard, self._guard = self._guard, None
        if guard is not None:
            guard._drop(self.kind)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class DiscardGuard:
    """The claims on the blocks of a list. Each method raises DiscardError when a claim that stands excludes it.

    Synchronization: any thread may call anything. Cost: O(1).
    """

    def __init__(self) -> None:
        self._claims: Counter[str] = Counter()
        self._lock = threading.Lock()

    def disable(self) -> DiscardClaim:
        """No discards at all, for a listener that reaches whole blocks."""
        return self._claim("disable")

    def disable_uncoordinated(self) -> DiscardClaim:
        """No discards that notifiers are not told of; a DmaMapper claims this for as long as it follows blocks."""
        return self._claim("disable_uncoordinated")

    def require(self) -> DiscardClaim:
        """Discards that notifiers are not told of, too."""
        return self._claim("require")

    def require_coordinated(self) -> DiscardClaim:
        """Discards by `RamBlock.discard`, which claims it by itself while a block has discarded parts."""
        return self._claim("require_coordinated")

    def _claim(self, kind: str) -> DiscardClaim:
        with self._lock:
            against = [other for other in _EXCLUDES[kind] if self._claims[other]]
            if against:
                raise DiscardError(
                    f"discards: '{kind}' does not go together with '{against[0]}', which {self._claims[against[0]]} "
                    "hold",
                    hint="Close that claim first, or what holds it",
                )
            self._claims[kind] += 1
        return DiscardClaim(self, kind)

    def _drop(self, kind: str) -> None:
        with self._lock:
            self._claims[kind] -= 1

    def _check(self) -> None:
        assert all(count >= 0 for count in self._claims.values())
        for kind, excluded in _EXCLUDES.items():
            assert not self._claims[kind] or not any(self._claims[other] for other in excluded)
