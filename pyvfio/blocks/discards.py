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

from collections import Counter

from pyvfio.errors import DiscardError
from pyvfio.guard import ContextManager, Guard, closing, making

_EXCLUDES = {
    "disable": ("require", "require_coordinated"),
    "disable_uncoordinated": ("require",),
    "require": ("disable", "disable_uncoordinated"),
    "require_coordinated": ("disable",),
}


class DiscardClaim(ContextManager):
    """A claim that holds until `close`; twice is fine. A context manager."""

    def __init__(self, claims: DiscardGuard, kind: str) -> None:
        self._claims: DiscardGuard | None = claims
        self.kind = kind
        self.guard = claims.guard

    @closing
    def close(self) -> None:
        """Give the claim up."""
        claims, self._claims = self._claims, None
        if claims is not None:
            claims.counts[self.kind] -= 1

    def __repr__(self) -> str:
        return f"<DiscardClaim {self.kind!r}{'' if self._claims is not None else ' closed'}>"


def _close(claim: DiscardClaim) -> None:
    claim.close()


class DiscardGuard:
    """The claims on the blocks of a list. Each method raises DiscardError when a claim that stands excludes it.

    Synchronization: any thread may call anything. Cost: O(1).
    """

    def __init__(self) -> None:
        self.guard = Guard("these claims on discards")
        self.counts: Counter[str] = Counter()
        """How many claims of each kind stand; the library's own."""

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
        """Discards by `RamBlock.discard`, which claims it by itself while it discards."""
        return self._claim("require_coordinated")

    @making(_close)
    def _claim(self, kind: str) -> DiscardClaim:
        if against := [other for other in _EXCLUDES[kind] if self.counts[other]]:
            holders = self.counts[against[0]]
            raise DiscardError(
                f"discards: '{kind}' does not go together with '{against[0]}' "
                f"(held by {holders} {'owner' if holders == 1 else 'owners'})",
                hint="Close that claim first, or its owner",
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
