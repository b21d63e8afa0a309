"""A device at work while a block is resized, processes that die in the middle of it, and a Ctrl-C: who loses what.

What the device does meanwhile, and what counts as lost, is in `pyvfio.testing.under_fire`.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

import pyvfio
from pyvfio.kernel import Kernel
from pyvfio.testing.under_fire import copy_meanwhile
from pyvfio.testing.world import World
from pyvfio.units import GIB, MIB, PAGE_SIZE
from tests.hw.rig import SIZE, Rig, pattern
from tests.spaces import Cut, can_replace

RESIZES, COPIES = 1000, 100


class Setting(NamedTuple):
    """How a mapper follows resizes, and how its address space cuts."""

    resize: Literal["remap", "extend", "cut"]
    granule: int | None = None
    cut: Cut = None

    def rig(self, bdf: str, kernel: Kernel) -> Rig:
        """A device with that mapper."""
        return Rig(bdf, kernel=kernel, resize=self.resize, granule=self.granule, cut=self.cut)


KILLS = 100

CUTS = pytest.mark.only_iommufd("type1 cuts no mapping")
POLICIES = [
    pytest.param(Setting(resize="remap"), id="remap"),
    pytest.param(Setting(resize="extend"), id="extend"),
    pytest.param(Setting(resize="extend", granule=PAGE_SIZE), id="granules"),
    pytest.param(Setting(resize="cut", cut="pages"), id="cut", marks=CUTS),
    pytest.param(Setting(resize="cut", cut="replace"), id="cut by replacing", marks=CUTS),
]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_device_reaches_exactly_what_is_in_use_under_each_policy(
    engine_bdfs: tuple[str, ...], kernel: Kernel, policy: Setting
) -> None:
    """The first and last bytes of it, across pieces, and not the page behind it."""
    with policy.rig(engine_bdfs[0], kernel) as rig:
        block = rig.blocks.add("ring", used_length=2 * PAGE_SIZE, max_length=MIB)
        if policy.resize == "cut" and not can_replace(rig.space):
            rig.refuses(block, lambda: block.resize(PAGE_SIZE))
            return
        iova = rig.mapper.iova(block)
        for pages in (5, 9, 6, 3, 0, 8, 1):
            block.resize(pages * PAGE_SIZE)
            rig.mapper._check()
            assert rig.mapper.iova(block) == iova
            if pages:
                assert rig.reaches(block, pages * PAGE_SIZE - SIZE)
            assert rig.device_reads(iova + pages * PAGE_SIZE) is None
        block.resize(4 * PAGE_SIZE)
        across = pattern()
        with block.view() as view:
            view[2 * PAGE_SIZE - SIZE // 2 :][:SIZE] = across
        assert rig.device_reads(iova + 2 * PAGE_SIZE - SIZE // 2) == across


def _fire(rig: Rig, block: pyvfio.RamBlock, resize: Callable[[], object], *, resizes: int, copies: int) -> int:
    """How many copies did not arrive while `block` was resized."""
    iova = rig.mapper.iova(block)
    done = copy_meanwhile(rig.engine, block, iova=iova, size=SIZE, meanwhile=resize, copies=copies, calls=resizes)
    print(done)
    return done.lost


@pytest.mark.real_kernel("a transfer of the fake edu completes at once: nothing can happen in between")
def test_with_granules_no_transfer_into_what_stays_is_lost(engine_bdfs: tuple[str, ...], kernel: Kernel) -> None:
    """Whatever is mapped and unmapped behind it at the same time."""
    with Rig(engine_bdfs[0], kernel=kernel, resize="extend", granule=64 * PAGE_SIZE) as rig:
        unit = 64 * PAGE_SIZE
        block = rig.blocks.add("ring", used_length=unit, max_length=64 * unit)
        lengths = cycle((2 * unit, 5 * unit, 3 * unit, unit, 4 * unit, 2 * unit))
        assert _fire(rig, block, lambda: block.resize(next(lengths)), resizes=RESIZES, copies=COPIES) == 0
        rig.mapper._check()


@CUTS
@pytest.mark.real_kernel("a transfer of the fake edu completes at once: nothing can happen in between")
@pytest.mark.parametrize("cut", ["pages", "replace"])
def test_cuts_lose_no_transfer_into_what_stays_but_at_the_moment_of_a_move(
    engine_bdfs: tuple[str, ...], kernel: Kernel, cut: Literal["pages", "replace"]
) -> None:
    """At any length, inside of mappings that were made as one; the page behind is stopped in the end.

    The drivers of some IOMMUs block a device before they give the device another page table. That takes microseconds of
    a cut, so a tenth of the copies is more than can fall into these.
    """
    with Setting(resize="cut", cut=cut).rig(engine_bdfs[0], kernel) as rig:
        block = rig.blocks.add("ring", used_length=4 * MIB, max_length=16 * MIB)
        if not can_replace(rig.space):
            rig.refuses(block, lambda: block.resize(MIB))
            return
        lengths = cycle((4 * MIB - PAGE_SIZE, 2 * MIB, 3 * MIB + PAGE_SIZE, 2 * PAGE_SIZE, 16 * MIB, MIB))
        lost = _fire(rig, block, lambda: block.resize(next(lengths)), resizes=RESIZES, copies=COPIES)
        assert lost <= (COPIES // 10 if rig.mapper.space.cut_opens_gap else 0)
        rig.mapper._check()
        block.resize(2 * PAGE_SIZE)
        assert rig.device_reads(rig.mapper.iova(block) + 2 * PAGE_SIZE) is None


@pytest.mark.real_kernel("a transfer of the fake edu completes at once: nothing can happen in between")
def test_a_remap_of_a_large_block_loses_transfers(engine_bdfs: tuple[str, ...], kernel: Kernel) -> None:
    """So that the sentence above is known to see it. How soon depends on how long the IOMMU takes to map."""
    with Rig(engine_bdfs[0], kernel=kernel, resize="remap") as rig:
        block = rig.blocks.add("ring", used_length=256 * MIB, max_length=GIB)
        lengths = cycle((258 * MIB, 256 * MIB))
        rounds = (_fire(rig, block, lambda: block.resize(next(lengths)), resizes=1, copies=10) for _ in range(20))
        assert any(rounds)


# ------------------------------------------------------------------------------------------------ death and Ctrl-C


def _pinned() -> int:
    """How many pages are pinned for devices, by all processes."""
    Path("/proc/sys/vm/stat_refresh").read_bytes()  # what each processor counts for itself is added up
    counts = dict(line.split() for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines())
    return int(counts["nr_foll_pin_acquired"]) - int(counts["nr_foll_pin_released"])


def _resize_for_ever(bdf: str, kernel: Kernel, ready: int) -> None:
    rig = Rig(bdf, kernel=kernel, resize="extend", granule=PAGE_SIZE)
    block = rig.blocks.add("ring", used_length=PAGE_SIZE, max_length=16 * MIB)
    os.write(ready, b"\1")
    for pages in cycle((256, 1, 2, 64, 0)):
        block.resize(pages * PAGE_SIZE)


@pytest.mark.real_kernel("the state of a fake is in one process, and ends with the process")
def test_a_process_that_is_killed_in_the_middle_of_a_resize_leaves_nothing_behind(
    engine_bdfs: tuple[str, ...], kernel: Kernel
) -> None:
    """A hundred times: the group can be opened again at once, and not a page stays pinned."""
    pinned, chance = _pinned(), random.Random(1)  # noqa: S311 (nothing secret)
    for _ in range(KILLS):
        ready, tell = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(ready)
            try:
                _resize_for_ever(engine_bdfs[0], kernel, tell)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(tell)
        assert os.read(ready, 1) == b"\1", "the child could not open the device"
        time.sleep(chance.random() * 0.05)
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        os.close(ready)
        with pyvfio.open_device(engine_bdfs[0], kernel=kernel):
            pass
        assert _pinned() == pinned


@pytest.fixture
def interruption() -> Iterator[Callable[[float], None]]:
    """KeyboardInterrupt in so many seconds, as a Ctrl-C.

    No garbage is collected meanwhile: hypothesis is told of each collection, and Python throws away what a signal
    handler raises in such a callback.
    """
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    gc.disable()
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds) and None
    signal.setitimer(signal.ITIMER_REAL, 0)
    gc.enable()
    signal.signal(signal.SIGALRM, before)


@pytest.mark.real_kernel("the machine decides how long a map takes")
@pytest.mark.parametrize("policy", POLICIES)
def test_a_ctrl_c_during_a_long_grow_leaves_the_block_as_it_was(
    engine_bdfs: tuple[str, ...],
    world: World,
    interruption: Callable[[float], None],
    policy: Setting,
) -> None:
    """Between two pieces, or behind the one call that there is: what had been mapped is unmapped again."""
    with policy._replace(granule=64 * (policy.granule or 0) or None).rig(engine_bdfs[0], world.kernel) as rig:
        block = rig.blocks.add("ring", used_length=2 * MIB, max_length=GIB)
        locked, before = world.locked_bytes(), rig.space.mappings
        interruption(0.02)
        with pytest.raises(KeyboardInterrupt):
            block.resize(512 * MIB)
        rig.mapper._check()
        assert (block.used_length, world.locked_bytes(), rig.space.mappings) == (2 * MIB, locked, before)
        assert rig.reaches(block, 2 * MIB - SIZE)
        assert rig.device_reads(rig.mapper.iova(block) + 2 * MIB) is None
        block.resize(4 * MIB)
        assert rig.reaches(block, 4 * MIB - SIZE)
