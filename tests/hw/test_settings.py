"""What madvise(2) was told about a block holds for all of its memory, for as long as it lives: in the kernel's words,
/proc/self/smaps, while a device reaches it."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyvfio import Anonymous, Memfd, MemorySettings, RamBlock
from pyvfio.memory import MemoryKind
from pyvfio.units import MIB, PAGE_SIZE
from tests.hw import test_kinds
from tests.hw.rig import SIZE, Rig
from tests.unit.processes import areas

pytestmark = pytest.mark.one_iommu

LONGEST = 16 * MIB
FLAGS = {"dontfork": "dc", "hugepage": "hg", "dontdump": "dd", "mergeable": "mg"}  # Documentation/filesystems/proc.rst
MM = Path("/sys/kernel/mm")
ALL = MemorySettings(dontfork=True, hugepage=True, dontdump=True, mergeable=True)
NONE = MemorySettings(dontfork=False, hugepage=False, dontdump=False, mergeable=False)
SETTINGS = [
    pytest.param(ALL, id="all"),
    pytest.param(NONE, id="none"),
    pytest.param(MemorySettings(dontfork=False, hugepage=True, dontdump=True), id="some"),
]


@contextmanager
def kind(name: str) -> Iterator[MemoryKind]:
    """By its name."""
    if name == "anonymous":
        yield Anonymous()
        return
    with test_kinds.kind(name) as made:
        yield made


def expected(settings: MemorySettings, *, shared: bool) -> set[str]:
    """What of it the kernel shows: KSM and transparent huge pages may not be built in, and KSM takes no shared memory
    (`vma_ksm_compatible`, before that `ksm_madvise`: VM_SHARED is left alone, and madvise succeeds)."""
    shown = {"dc": True, "dd": True, "hg": (MM / "transparent_hugepage").exists()}
    shown["mg"] = (MM / "ksm").exists() and not shared
    return {flag for name, flag in FLAGS.items() if getattr(settings, name) and shown[flag]}


def shown(block: RamBlock) -> set[frozenset[str]]:
    """The flags of each memory area of the block, of those that are settings; all of it is there."""
    found = areas(block.vaddr, block.max_length)
    assert sum(min(a.end, block.vaddr + block.max_length) - max(a.start, block.vaddr) for a in found) == LONGEST
    return {area.flags & frozenset(FLAGS.values()) for area in found}


def touch(block: RamBlock) -> None:
    """Have pages: memory that has them does not merge as memory without any does."""
    ctypes.memset(block.vaddr, 1, block.used_length)


def life(block: RamBlock) -> Iterator[str]:
    """Grow, shrink, discard, populate, grow again; pages are touched at every stage. Yields what has just happened."""
    yield "added"
    steps: list[tuple[str, Callable[[], None]]] = [
        ("grown", lambda: block.resize(8 * MIB)),
        ("shrunk", lambda: block.resize(4 * MIB)),
        ("regrown", lambda: block.resize(12 * MIB)),
        ("emptied", lambda: block.resize(0)),
        ("full", lambda: block.resize(LONGEST)),
        ("shorter", lambda: block.resize(10 * MIB)),
    ]
    if block.state.memory.can_drop:
        steps[3:3] = [
            ("discarded", lambda: block.discard(2 * MIB, 6 * MIB)),
            ("populated in part", lambda: block.populate(4 * MIB, 2 * MIB)),
            ("populated", lambda: block.populate(0, 12 * MIB)),
        ]
    for what, step in steps:
        step()
        yield what
        if not block.discarded:
            touch(block)


def check_life(rig: Rig, memory: MemoryKind, settings: MemorySettings, *, prealloc: int, shared: bool) -> None:
    """The settings, and no others, are on all of the block at every stage, and the device reaches it."""
    wanted = {frozenset(expected(settings, shared=shared))}
    block = rig.blocks.add(
        "ring", used_length=2 * MIB, max_length=LONGEST, memory=memory, settings=settings, prealloc=prealloc
    )
    for stage in life(block):
        assert shown(block) == wanted, stage
    assert rig.reaches(block, 10 * MIB - SIZE)
    assert shown(block) == wanted
    block.remove()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", ["anonymous", "noreserve", "memfd", "file", "private file"])
def test_settings_stay_on_all_of_a_block_whatever_becomes_of_it(rig: Rig, name: str, settings: MemorySettings) -> None:
    """Those that were made and no others, on what is in use and on what is not yet."""
    with kind(name) as memory:
        check_life(rig, memory, settings, prealloc=0, shared=name in ("memfd", "file"))


@pytest.mark.parametrize("name", ["anonymous", "memfd", "private file"])
def test_settings_are_on_memory_before_it_is_populated(rig: Rig, name: str) -> None:
    """Pages that come before the settings would keep it apart from its neighbours, and a dump might have them."""
    with kind(name) as memory:
        check_life(rig, memory, ALL, prealloc=1, shared=name == "memfd")


@pytest.mark.real_kernel("the pool of huge pages belongs to the machine")
@pytest.mark.parametrize("settings", [ALL, NONE], ids=["all", "none"])
def test_settings_stay_on_huge_pages(rig: Rig, throwaway: None, settings: MemorySettings) -> None:
    """The kernel shows them there, too, but for KSM, which takes no shared memory."""
    with test_kinds.huge_pages(LONGEST // (2 * MIB)):
        check_life(rig, Memfd(hugetlb=2 * MIB), settings, prealloc=0, shared=True)


@pytest.mark.long
@pytest.mark.parametrize("settings", [ALL, NONE], ids=["all", "none"])
@pytest.mark.parametrize("noreserve", [False, True], ids=["reserved", "noreserve"])
@pytest.mark.parametrize("prealloc", [0, 1])
def test_private_memory_is_one_area_in_use_and_one_for_the_rest(
    rig: Rig, prealloc: int, settings: MemorySettings, *, noreserve: bool
) -> None:
    """After any number of grows and shrinks, touched or populated beforehand: areas merge, so that a process may have
    as many blocks as it likes (vm.max_map_count)."""
    block = rig.blocks.add(
        "ring",
        used_length=0,
        max_length=LONGEST,
        memory=Anonymous(noreserve=noreserve),
        settings=settings,
        prealloc=prealloc,
    )
    dice = random.Random(4)  # noqa: S311 (any lengths will do)
    for _ in range(30):
        block.resize(dice.randrange(1, LONGEST // PAGE_SIZE) * PAGE_SIZE)
        found = areas(block.vaddr, block.max_length)
        assert [area.permissions for area in found] == ["rw-p", "---p"]
        assert found[0].end == block.vaddr + block.used_length
        if dice.random() < 0.5:
            touch(block)
