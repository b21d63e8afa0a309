"""What can come between a change and its success: calls that fail, listeners that refuse, too little memory to lock."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
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
"""What can fail when it has been made and leave nothing that nobody knows of."""


class FailingCall(NamedTuple):
    """The `nth` call of its name, a system call's or an ioctl's in C, fails. `after`: where it can be, it is made."""

    name: str
    number: int
    nth: int
    after: bool


@dataclass(frozen=True)
class Failing:
    """One call fails, or two, of which the second may be one of the undo."""

    calls: tuple[FailingCall, ...]


@dataclass(frozen=True)
class RefusingListener:
    """The listener with that number raises in its `turn`-th hook."""

    number: int
    turn: int


@dataclass(frozen=True)
class RefusingCallback:
    """A block's own callback raises."""


@dataclass(frozen=True)
class LittleMemory:
    """No more than so many pages can be locked beside those that are."""

    pages: int


Plan: TypeAlias = Failing | RefusingListener | RefusingCallback | LittleMemory | None
"""What is to come between, in words that hold for every world."""


class Trouble:
    """None."""

    happened = False
    """Whether it came to that, in the change that was made under it."""
    certain = True
    """Whether the change has failed when it did."""

    @contextmanager
    def arranged(self) -> Iterator[None]:
        """Make the change inside of this."""
        yield

    def explains(self, error: Exception) -> bool:  # noqa: ARG002 (there is nothing to explain it)
        """Whether it may have come to this error because of the trouble."""
        return False

    def room(self) -> int | None:
        """How many more pages may be locked; None: as many as there are."""
        return None

    def meet(self) -> None:
        """What a block's callback calls."""


class FailingCalls(Trouble):
    """System calls of a fake kernel fail: also one that nothing depends on, and, with `hits_undo`, one of the undo."""

    certain = False

    def __init__(self, kernel: FakeKernel, calls: Sequence[FailingCall], *, hits_undo: bool) -> None:
        self._kernel = kernel
        self._calls = calls
        self._hits_undo = hits_undo

    @contextmanager
    def arranged(self) -> Iterator[None]:
        """Nothing fails afterwards."""
        for name, number, nth, after in self._calls:
            is_ioctl = name.startswith("VFIO")
            self._kernel.fail(
                call="ioctl" if is_ioctl else name,
                request=name if is_ioctl else None,
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
        """What has failed once is undone."""
        return isinstance(error, OSError) or (isinstance(error, RollbackError) and self._hits_undo)


class Refusal(Trouble):
    """A listener raises in its `turn`-th hook from now; 0: in none."""

    def __init__(self, listener: Listener, turn: int) -> None:
        self._listener = listener
        self._turn = turn

    @contextmanager
    def arranged(self) -> Iterator[None]:
        """It refuses nothing afterwards."""
        self._listener.refuse_in, self._listener.refused = self._turn, False
        try:
            yield
        finally:
            self.happened, self._listener.refuse_in = self._listener.refused, 0

    def explains(self, error: Exception) -> bool:
        """Only what it has raised."""
        return isinstance(error, RefusalError)


class CallbackRefusal(Trouble):
    """A block's own callback raises."""

    def __init__(self) -> None:
        self._armed = False

    @contextmanager
    def arranged(self) -> Iterator[None]:
        """From now on."""
        self._armed = True
        try:
            yield
        finally:
            self._armed = False

    def meet(self) -> None:
        """It raises."""
        if self._armed:
            self.happened = True
            raise RefusalError

    def explains(self, error: Exception) -> bool:
        """Only what it has raised."""
        return isinstance(error, RefusalError)


class MemoryLimit(Trouble):
    """No more than `pages` can be locked beside those that are: on the fake as on any kernel."""

    def __init__(self, world: World, pages: int) -> None:
        self._world = world
        self._pages = pages

    @contextmanager
    def arranged(self) -> Iterator[None]:
        """Without the privilege that lifts the limit."""
        with self._world.memlock_limit(self._world.locked_bytes() + self._pages * PAGE_SIZE):
            yield

    def room(self) -> int | None:
        """Exactly."""
        return self._pages


_CALLS = (
    *("VFIO_IOMMU_MAP_DMA", "VFIO_IOMMU_UNMAP_DMA", "mmap") * 2,
    *("VFIO_IOMMU_GET_INFO", "mprotect", "madvise", "munmap"),
)
_ERRNOS = (errno.ENOMEM, errno.ENOSPC, errno.EINVAL, errno.EFAULT)
# The second call is one of the undo: of a remap and a cut piece, of granules that come, and of parts that go.
_PAIRS = [
    Failing((FailingCall(one, errno.EFAULT, nth, False), FailingCall(other, errno.EINVAL, again, False)))  # noqa: FBT003
    for one, nth, other, again in (
        ("VFIO_IOMMU_MAP_DMA", 1, "VFIO_IOMMU_MAP_DMA", 2),
        ("VFIO_IOMMU_MAP_DMA", 2, "VFIO_IOMMU_UNMAP_DMA", 1),
        ("VFIO_IOMMU_MAP_DMA", 3, "VFIO_IOMMU_UNMAP_DMA", 1),
        ("VFIO_IOMMU_UNMAP_DMA", 2, "VFIO_IOMMU_MAP_DMA", 1),
    )
]

_calls = st.builds(
    FailingCall,
    st.sampled_from(_CALLS),
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
"""Nothing, mostly."""
