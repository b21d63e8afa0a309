"""Threads that change everything at once, and hooks that change what is being changed."""

from __future__ import annotations

import mmap
import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import pytest

import pyvfio
from pyvfio.kernel import Kernel
from pyvfio.testing.world import World
from pyvfio.units import MIB, PAGE_SIZE
from tests.hw.rig import SIZE, Rig

THREADS, OPERATIONS = 8, 100


@pytest.fixture
def hurry() -> Iterator[None]:
    """Threads are switched as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def _some_pages(chance: random.Random) -> int:
    return chance.randint(1, 16) * PAGE_SIZE


class _Worker:
    """One thread: a block of its own, one that it shares with another, and a buffer."""

    def __init__(self, rig: Rig, number: int, shared: pyvfio.RamBlock, barrier: threading.Barrier) -> None:
        self._rig = rig
        self._number = number
        self._shared = shared
        self._barrier = barrier
        self._chance = random.Random(number)  # noqa: S311 (nothing secret)

    def run(self) -> int:
        """Whatever comes, so many times; how often."""
        self._barrier.wait()
        self._add()
        changes = (self._resize, self._share, self._discard, self._populate, self._map, self._come_back)
        for _ in range(OPERATIONS):
            self._chance.choice(changes)()
        self._block.remove()
        return OPERATIONS

    def _add(self) -> None:
        used = _some_pages(self._chance)
        self._block = self._rig.blocks.add(f"own{self._number}", used_length=used, max_length=MIB)
        with self._block.view() as view:
            view[:8] = self._number.to_bytes(8, "little")

    def _resize(self) -> None:
        self._block.resize(_some_pages(self._chance))

    def _share(self) -> None:
        change = self._chance.choice((self._shared.discard, self._shared.populate, None))
        if change is None:
            self._shared.resize(_some_pages(self._chance))
        else:
            change(0, PAGE_SIZE)  # which is in use whatever the other thread does

    def _discard(self) -> None:
        self._block.discard(0, PAGE_SIZE)

    def _populate(self) -> None:
        self._block.populate(0, PAGE_SIZE)

    def _map(self) -> None:
        buffer = mmap.mmap(-1, PAGE_SIZE)
        with self._rig.mapper.map_temporary(buffer) as mapping:
            assert self._rig.mapper.translate_iova(mapping.iova, PAGE_SIZE) == mapping.vaddr
        if self._chance.random() < 0.5:
            self._rig.mapper.reset_temporary()

    def _come_back(self) -> None:
        self._block.remove()
        self._add()


@pytest.mark.long
@pytest.mark.parametrize(
    ("resize", "granule"),
    [("remap", None), ("extend", None), ("extend", PAGE_SIZE)],
    ids=["remap", "extend", "granules"],
)
@pytest.mark.usefixtures("hurry")
def test_eight_threads_change_everything_at_once_and_nothing_is_left(
    engine_bdfs: tuple[str, ...], world: World, resize: Literal["remap", "extend"], granule: int | None
) -> None:
    """Blocks of their own, and one that two share; nothing raises, and the device reaches what is in use."""
    locked = world.locked_bytes()
    with Rig(engine_bdfs[0], kernel=world.kernel, resize=resize, granule=granule) as rig:
        entries = rig.space.entries_left
        shared = [
            rig.blocks.add(f"shared{number}", used_length=PAGE_SIZE, max_length=MIB) for number in range(THREADS // 2)
        ]
        barrier = threading.Barrier(THREADS)
        workers = [_Worker(rig, number, shared[number // 2], barrier) for number in range(THREADS)]
        with ThreadPoolExecutor(THREADS) as pool:
            assert sum(pool.map(_Worker.run, workers)) == THREADS * OPERATIONS
        for structure in (rig.blocks, rig.mapper, rig.space, rig.blocks.discards):
            structure._check()
        for block in shared:
            block.populate(0, PAGE_SIZE)
            assert rig.reaches(block, block.used_length - SIZE)
            assert rig.device_reads(rig.mapper.iova(block) + block.used_length) is None
            block.remove()
        assert rig.mapper.reset_temporary() == 0
        assert [block.idstr for block in rig.blocks] == ["desk"]
        assert rig.space.entries_left == entries
        rig.mapper.close()
        assert rig.space.mappings == ()
        assert world.locked_bytes() == locked


class _Meddler:
    """A notifier that does something in the middle of a resize."""

    def __init__(self, action: Callable[[], object]) -> None:
        self._action = action

    def ram_block_resized(self, _block: pyvfio.RamBlock, _old_length: int, _new_length: int) -> None:
        """Do it."""
        self._action()


@pytest.mark.parametrize("length", [4 * MIB, MIB], ids=["grow", "shrink"])
@pytest.mark.parametrize("last", [False, True], ids=["told before the mapper", "told after it"])
def test_a_notifier_that_resizes_from_inside_is_refused_and_all_is_as_before(
    engine_bdfs: tuple[str, ...], kernel: Kernel, length: int, *, last: bool
) -> None:
    """ReentrancyError, not a deadlock; what the device reached it still reaches, and nothing more."""
    with Rig(engine_bdfs[0], kernel=kernel) as rig:
        block = rig.blocks.add("ring", used_length=2 * MIB, max_length=8 * MIB)
        meddler = _Meddler(lambda: block.resize(3 * MIB))
        # The newest is told of a grow first, and of a shrink last.
        if last == (length > 2 * MIB):
            rig.blocks.remove_notifier(rig.mapper)
            rig.blocks.add_notifier(meddler)
            rig.blocks.add_notifier(rig.mapper)
        else:
            rig.blocks.add_notifier(meddler)
        iova, mappings = rig.mapper.iova(block), rig.space.mappings
        with pytest.raises(pyvfio.ReentrancyError):
            block.resize(length)
        assert (block.used_length, rig.mapper.iova(block), rig.space.mappings) == (2 * MIB, iova, mappings)
        assert rig.reaches(block, 2 * MIB - SIZE)
        assert rig.device_reads(iova + 2 * MIB) is None
        rig.mapper._check()
        rig.blocks._check()
        rig.blocks.remove_notifier(meddler)
        block.resize(length)
        assert rig.reaches(block, length - SIZE)


def test_a_change_that_another_thread_makes_meanwhile_waits_until_the_hook_has_returned(rig: Rig) -> None:
    """So that a hook which waits for that thread waits for ever; one that only starts it does not."""
    block = rig.blocks.add("ring", used_length=2 * MIB, max_length=8 * MIB)
    started, done = threading.Event(), threading.Event()

    def change() -> None:
        started.set()
        block.resize(3 * MIB)
        done.set()

    thread = threading.Thread(target=change)

    def start_it_once() -> None:
        if not started.is_set():
            thread.start()
            assert started.wait(60)
            assert not done.wait(0.1), "it was made while another one was under way"

    meddler = _Meddler(start_it_once)
    rig.blocks.add_notifier(meddler)
    block.resize(4 * MIB)
    thread.join()
    assert done.is_set()
    assert block.used_length == 3 * MIB
    assert rig.reaches(block, 3 * MIB - SIZE)
    assert rig.device_reads(rig.mapper.iova(block) + 3 * MIB) is None
    rig.blocks.remove_notifier(meddler)
