"""Obstacles to the success of a change: failing calls, listeners that refuse, and too little lockable memory."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from hypothesis import strategies as st

from pyvfio.errors import RollbackError
from pyvfio.testing.fake import FakeKernel
from pyvfio.testing.world import World
from pyvfio.units import PAGE_SIZE
from tests.life.listeners import Listener, RefusalError

CAN_FAIL_AFTER = ("madvise", "munmap")
"""The calls that can fail after they were made, without leaving anything that the library does not know of."""


class FailingCall(NamedTuple):
    """The `nth` call with this name fails: a system call, or an ioctl by its kind in tests.spaces.REQUESTS.

    `after`: if possible, the call is made and then fails.
    """

    name: str
    number: int
    nth: int
    after: bool


@dataclass(frozen=True)
class Failing:
    """One call fails, or two, of which the second may belong to the undo."""

    calls: tuple[FailingCall, ...]


@dataclass(frozen=True)
class RefusingListener:
    """The listener with this number raises in its `turn`-th hook."""

    number: int
    turn: int


@dataclass(frozen=True)
class RefusingCallback:
    """The block's own callback raises."""


@dataclass(frozen=True)
class LittleMemory:
    """At most this number of further pages can be locked."""

    pages: int


Plan: TypeAlias = Failing | RefusingListener | RefusingCallback | LittleMemory | None
"""The obstacle to arrange, in terms that are valid for every world."""


class Trouble:
    """No obstacle; base of the others."""

    happened = False
    """Whether the obstacle occurred in the change made under it."""
    certain = True
    """Whether a change fails for certain if the obstacle occurs."""

    @contextmanager
    def arranged(self) -> Iterator[None]:
        """Make the change inside this context manager."""
        yield

    def explains(self, error: Exception) -> bool:  # noqa: ARG002 (no trouble explains no error)
        """Return whether the trouble can be the reason for this error."""
        return False

    def room(self) -> int | None:
        """Return the number of further pages that may be locked; None: no limit."""
        return None

    def meet(self) -> None:
        """Be called by a block's callback."""


class FailingCalls(Trouble):
    """System calls of a fake kernel fail, perhaps irrelevant ones, or with `hits_undo` one of the undo."""

    certain = False

    def __init__(
        self, kernel: FakeKernel, calls: Sequence[FailingCall], requests: Mapping[str, str], *, hits_undo: bool
    ) -> None:
        self._kernel = kernel
        self._calls = calls
        self._requests = requests
        self._hits_undo = hits_undo

    @contextmanager
    def arranged(self) -> Iterator[None]:
        """Arrange the failures, and clear the rest afterwards."""
        for name, number, nth, after in self._calls:
            request = self._requests.get(name)
            self._kernel.fail(
                call=name if request is None else "ioctl",
                request=request,
                errno=number,
                nth=nth,
                after=after and name in CAN_FAIL_AFTER,
            )
        try:
            yield
        finally:
            self.happened = len(self._kernel.planned_failures) < len(self._calls)
            self._kernel.clear_failures()

    def explains(self, error: Exception) -> bool:
        """Return whether a failed call can be the reason: one failure is undone, two may hit the undo."""
        return isinstance(error, OSError) or (isinstance(error, RollbackError) and self._hits_undo)


class Refusal(Trouble):
    """A listener raises in its `turn`-th hook from now on; 0: in none."""

    def __init__(self, listener: Listener, turn: int) -> None:
        self._listener = listener
        self._turn = turn

    @contextmanager
    def arranged(self) -> Iterator[None]:
        """Let the listener refuse during the change only."""
        self._listener.refuse_in, self._listener.refused = self._turn, False
        try:
            yield
        finally:
            self.happened, self._listener.refuse_in = self._listener.refused, 0

    def explains(self, error: Exception) -> bool:
        """Return whether the error is the listener's refusal."""
        return isinstance(error, RefusalError)


class CallbackRefusal(Trouble):
    """A block's own callback raises."""

    def __init__(self) -> None:
        self._armed = False

    @contextmanager
    def arranged(self) -> Iterator[None]:
        """Let the callback raise during the change only."""
        self._armed = True
        try:
            yield
        finally:
            self._armed = False

    def meet(self) -> None:
        """Raise, if armed."""
        if self._armed:
            self.happened = True
            raise RefusalError

    def explains(self, error: Exception) -> bool:
        """Return whether the error is the callback's refusal."""
        return isinstance(error, RefusalError)


class MemoryLimit(Trouble):
    """At most `pages` further pages can be locked, on the fake as on a real kernel."""

    def __init__(self, world: World, pages: int) -> None:
        self._world = world
        self._pages = pages

    @contextmanager
    def arranged(self) -> Iterator[None]:
        """Set the limit, without the privilege that lifts the limit."""
        with self._world.memlock_limit(self._world.locked_bytes() + self._pages * PAGE_SIZE):
            yield

    def room(self) -> int | None:
        """Return the exact number."""
        return self._pages


_CALLS = (
    *("map", "unmap", "mmap") * 2,
    *("info", "mprotect", "madvise", "munmap"),
)
CUTS = ("cut", "new space", "copy", "move", "old space")
"""The kinds of requests by which an I/O address space cuts mappings."""
_ERRNOS = (errno.ENOMEM, errno.ENOSPC, errno.EINVAL, errno.EFAULT)
# The second call belongs to the undo: of a remap and a cut piece, of new granules, and of discarded parts.
_PAIRS = [
    Failing((FailingCall(one, errno.EFAULT, nth, False), FailingCall(other, errno.EINVAL, again, False)))  # noqa: FBT003
    for one, nth, other, again in (
        ("map", 1, "map", 2),
        ("map", 2, "unmap", 1),
        ("map", 3, "unmap", 1),
        ("unmap", 2, "map", 1),
        ("move", 1, "old space", 1),
    )
]

_calls = st.builds(
    FailingCall,
    st.sampled_from((*_CALLS, *CUTS)),
    number=st.sampled_from(_ERRNOS),
    nth=st.sampled_from((1, 1, 1, 2, 2, 3)),
    after=st.booleans(),
)
refusals = st.builds(RefusingListener, st.integers(0, 2), turn=st.integers(1, 3))
plans = st.sampled_from((0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 5, 5)).flatmap(
    (
        st.none(),
        st.builds(Failing, st.tuples(_calls)),
        st.sampled_from(_PAIRS),
        refusals,
        st.just(RefusingCallback()),
        st.builds(LittleMemory, st.integers(0, 8)),
    ).__getitem__
)
"""Mostly no trouble."""
