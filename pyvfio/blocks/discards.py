"""Claims on discarding memory of blocks: four kinds of claims, some of which exclude each other.

A *coordinated* discard calls all notifiers (`RamBlock.discard`). An *uncoordinated* discard calls none: for example, a
balloon calls madvise(2) on a block's memory. If a device has pinned the memory, an uncoordinated discard leaves the old
pages pinned: the process then has other pages than the device.

| claim | compatible with |
| --- | --- |
| `disable`: no discards at all | `disable_uncoordinated`, other claims of this kind |
| `disable_uncoordinated`: only discards that notifiers see | all but `require` |
| `require`: the owner discards, coordinated or not | `require_coordinated`, other claims of this kind |
| `require_coordinated`: the owner discards, and calls notifiers | all but `disable` |

Source: `ram_block_discard_disable`, `ram_block_uncoordinated_discard_disable`, `ram_block_discard_require` and
`ram_block_coordinated_discard_require` (system/physmem.c of QEMU), which return EBUSY.
"""

from __future__ import annotations

from collections import Counter

from pyvfio.errors import DiscardError
from pyvfio.guard import ContextManager, Guard, closing, making
from pyvfio.unique import Unique

_EXCLUDES = {
    "disable": ("require", "require_coordinated"),
    "disable_uncoordinated": ("require",),
    "require": ("disable", "disable_uncoordinated"),
    "require_coordinated": ("disable",),
}


class DiscardClaim(ContextManager, Unique):
    """A claim that holds until `close`. A context manager."""

    def __init__(self, claims: DiscardGuard, kind: str) -> None:
        self._claims: DiscardGuard | None = claims
        self.kind = kind
        self.guard = claims.guard

    @closing
    def close(self) -> None:
        """Give the claim up. A second call does nothing."""
        claims, self._claims = self._claims, None
        if claims is not None:
            claims.counts[self.kind] -= 1

    def __repr__(self) -> str:
        return f"<DiscardClaim {self.kind!r}{'' if self._claims is not None else ' closed'}>"


def _close(claim: DiscardClaim) -> None:
    claim.close()


class DiscardGuard(Unique):
    """The claims on the blocks of a list. Each method raises DiscardError if an existing claim excludes the new claim.

    Synchronization: any thread may call any method. Cost: O(1).
    """

    def __init__(self) -> None:
        self.guard = Guard("these claims on discards")
        self.counts: Counter[str] = Counter()
        """The number of claims of each kind. For the library."""

    def disable(self) -> DiscardClaim:
        """Forbid all discards, for a listener that reaches whole blocks."""
        return self._claim("disable")

    def disable_uncoordinated(self) -> DiscardClaim:
        """Forbid discards without notice to notifiers. A DmaMapper claims this while it follows blocks."""
        return self._claim("disable_uncoordinated")

    def require(self) -> DiscardClaim:
        """Allow discards without notice to notifiers."""
        return self._claim("require")

    def require_coordinated(self) -> DiscardClaim:
        """Allow discards by `RamBlock.discard`, which makes this claim itself while it discards."""
        return self._claim("require_coordinated")

    @making(_close)
    def _claim(self, kind: str) -> DiscardClaim:
        if against := [other for other in _EXCLUDES[kind] if self.counts[other]]:
            holders = self.counts[against[0]]
            raise DiscardError(
                f"discards: '{kind}' is not compatible with '{against[0]}' "
                f"(held by {holders} {'owner' if holders == 1 else 'owners'})",
                hint="Close that claim, or its owner, first",
            )
        self.counts[kind] += 1
        return DiscardClaim(self, kind)

    def __repr__(self) -> str:
        standing = ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts.items()) if count)
        return f"<DiscardGuard {standing or 'no claims'}>"

    def _check(self) -> None:
        assert all(count >= 0 for count in self.counts.values())
        for kind, excluded in _EXCLUDES.items():
            assert not self.counts[kind] or not any(self.counts[other] for other in excluded)
