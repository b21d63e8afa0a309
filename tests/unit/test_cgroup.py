"""What control groups leave of memory, read from their files, and what is refused before it is populated."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest

import pyvfio
from pyvfio.kernel import MADV_POPULATE_WRITE, LinuxKernel
from pyvfio.memory import MemoryKind
from pyvfio.memory.cgroup import memory_room
from pyvfio.memory.prefault import check_room
from pyvfio.testing.fake import FakeDevice
from pyvfio.units import MIB, PAGE_SIZE
from tests.unit.fakes import BDF, PRIVATE, READ_WRITE, Rig, SpecialKernel
from tests.unit.processes import areas


class Tree:
    """A machine's files: `own` is the group of this process, as /proc/self/cgroup says it; `swap` is free."""

    def __init__(self, root: Path, own: str = "0::/a/b", *, swap: int = 0) -> None:
        self.root = root
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/cgroup").write_text(own + "\n")
        (root / "proc/meminfo").write_text(f"MemTotal: 1 kB\nSwapTotal: 99 kB\nSwapFree: {swap // 1024} kB\n")

    def file(self, path: str, content: object) -> None:
        """Of sysfs."""
        file = self.root / "fs/cgroup" / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}".rstrip("\n") + "\n")

    def group(self, path: str, limit: object, used: int, stat: str = "anon 4096\nfile 0\n") -> None:
        """A group of version 2."""
        self.file(f"{path}/memory.max", limit)
        self.file(f"{path}/memory.current", used)
        self.file(f"{path}/memory.stat", stat)

    def room(self) -> int | None:
        """Bytes."""
        found = memory_room(LinuxKernel(sysfs=self.root), proc=self.root / "proc")
        return None if found is None else found.size

    def limited_by(self) -> str:
        """The file, below the mount."""
        found = memory_room(LinuxKernel(sysfs=self.root), proc=self.root / "proc")
        assert found is not None
        return str(found.limited_by.relative_to(self.root / "fs/cgroup"))


def test_a_group_has_room_for_what_its_limit_leaves(tmp_path: Path) -> None:
    """Less what is in use."""
    tree = Tree(tmp_path)
    tree.group("a/b", 64 * MIB, 10 * MIB)
    assert tree.room() == 54 * MIB


def test_a_group_above_may_be_the_tighter_one(tmp_path: Path) -> None:
    """All of them hold, up to the root of what is mounted."""
    tree = Tree(tmp_path)
    tree.group("a/b", 64 * MIB, 10 * MIB)
    tree.group("a", 100 * MIB, 90 * MIB)
    assert (tree.room(), tree.limited_by()) == (10 * MIB, "a/memory.max")
    tree.group("", 50 * MIB, 45 * MIB)
    assert (tree.room(), tree.limited_by()) == (5 * MIB, "memory.max")
    tree.group("a/b", 64 * MIB, 62 * MIB)
    assert (tree.room(), tree.limited_by()) == (2 * MIB, "a/b/memory.max")


def test_page_cache_can_be_reclaimed_and_memory_of_tmpfs_cannot(tmp_path: Path) -> None:
    """`file` counts shmem, the lists of files do not."""
    tree = Tree(tmp_path)
    stat = (
        f"file {30 * MIB}\nshmem {20 * MIB}\nactive_file {4 * MIB}\ninactive_file {6 * MIB}\nslab_reclaimable {MIB}\n"
    )
    tree.group("a/b", 64 * MIB, 64 * MIB, stat)
    assert tree.room() == 11 * MIB


def test_a_group_above_its_limit_has_no_room(tmp_path: Path) -> None:
    """Not less than none."""
    tree = Tree(tmp_path)
    tree.group("a/b", 64 * MIB, 65 * MIB)
    assert tree.room() == 0


@pytest.mark.parametrize(
    ("limits", "room"),
    [
        ({}, 8 * MIB),
        ({"a/b": (5 * MIB, MIB)}, 4 * MIB),
        ({"a/b": (5 * MIB, 6 * MIB)}, 0),
        ({"a": (3 * MIB, MIB)}, 2 * MIB),
        ({"a/b": ("max", MIB)}, 8 * MIB),
        ({"a/b": (64 * MIB, 0)}, 8 * MIB),
    ],
    ids=["no limit", "its own", "exceeded", "above", "max", "more than there is"],
)
def test_free_swap_is_room_as_far_as_the_group_may_use_it(
    tmp_path: Path, limits: dict[str, tuple[object, int]], room: int
) -> None:
    """8 MiB are free on the machine."""
    tree = Tree(tmp_path, swap=8 * MIB)
    tree.group("a/b", 64 * MIB, 64 * MIB)
    for group, (limit, used) in limits.items():
        tree.file(f"{group}/memory.swap.max", limit)
        tree.file(f"{group}/memory.swap.current", used)
    assert tree.room() == room


def test_room_says_of_what_it_is_made(tmp_path: Path) -> None:
    """For the message of a refusal."""
    tree = Tree(tmp_path, swap=3 * MIB)
    tree.group("a/b", 64 * MIB, 60 * MIB, "active_file 1048576\ninactive_file 1048576\n")
    found = memory_room(LinuxKernel(sysfs=tmp_path), proc=tmp_path / "proc")
    assert str(found).endswith(
        "memory.max is 64 MiB; 60 MiB are in use, of which 2 MiB can be reclaimed, and 3 MiB can be swapped out"
    )


def test_version_1_has_other_files(tmp_path: Path) -> None:
    """Where the memory controller is version 1's, also beside a version 2 without it."""
    tree = Tree(tmp_path, "4:memory,hugetlb:/a/b\n1:name=systemd:/x\n0::/x", swap=MIB)
    tree.group("x", 1, 0)
    tree.file("memory/a/b/memory.limit_in_bytes", 64 * MIB)
    tree.file("memory/a/b/memory.usage_in_bytes", 60 * MIB)
    tree.file("memory/a/b/memory.stat", f"cache 1\ntotal_active_file {MIB}\ntotal_inactive_file {2 * MIB}\n")
    assert (tree.room(), tree.limited_by()) == (8 * MIB, "memory/a/b/memory.limit_in_bytes")


@pytest.mark.parametrize("own", ["0::/", "0::/../other", "0::/gone (deleted)"])
def test_of_a_group_that_is_not_in_sight_those_that_are_hold(tmp_path: Path, own: str) -> None:
    """A namespace, or a container that has its own group mounted as the root."""
    tree = Tree(tmp_path, own)
    tree.group("", 64 * MIB, 60 * MIB)
    tree.group("../other", MIB, MIB)
    assert tree.room() == 4 * MIB


@pytest.mark.parametrize("gone", ["fs/cgroup/a/b/memory.max", "fs/cgroup/a/b/memory.current", "proc/meminfo"])
def test_what_cannot_be_read_is_no_limit(tmp_path: Path, gone: str) -> None:
    """Rather than a refusal that may be wrong."""
    tree = Tree(tmp_path)
    tree.group("a/b", 64 * MIB, 10 * MIB)
    (tmp_path / gone).unlink()
    assert tree.room() is None


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("a/b/memory.max", "max"),
        ("a/b/memory.max", "many"),
        ("a/b/memory.current", ""),
        ("a/b/memory.stat", "nonsense"),
        ("a/b/memory.stat", "active_file x"),
    ],
)
def test_what_is_no_number_is_no_limit(tmp_path: Path, file: str, content: str) -> None:
    """As `max` is none."""
    tree = Tree(tmp_path)
    tree.group("a/b", 64 * MIB, 10 * MIB)
    tree.file(file, content)
    assert tree.room() is None


@pytest.mark.parametrize("own", ["", "3:cpu:/a", "nonsense"])
def test_a_process_without_a_memory_group_has_no_limit(tmp_path: Path, own: str) -> None:
    """As in a machine without control groups, whose /proc/self/cgroup is empty."""
    tree = Tree(tmp_path, own)
    tree.group("", MIB, MIB)
    assert tree.room() is None
    (tmp_path / "proc/self/cgroup").unlink()
    assert tree.room() is None


# ----------------------------------------------------------------------------------------------------- populating


class LimitedKernel(SpecialKernel):
    """A kernel whose root group has a limit."""

    def __init__(self) -> None:
        super().__init__(groups=[(2, [FakeDevice(BDF)])])
        (self.sysfs / "fs/cgroup/memory").mkdir(parents=True)

    def leave(self, size: int) -> None:
        """So much room, by either version's files, and none of it is swap: what is in use is more."""
        swap = next(
            int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "SwapFree" in line
        )
        groups = self.sysfs / "fs/cgroup"
        for limit, used, where in (
            ("memory.max", "memory.current", groups),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", groups / "memory"),
        ):
            (where / limit).write_text(f"{1 << 40}\n")
            (where / used).write_text(f"{(1 << 40) - size + swap * 1024}\n")
            (where / "memory.stat").write_text("active_file 0\n")


@pytest.fixture
def kernel() -> Iterator[LimitedKernel]:
    """With a device."""
    if memory_room(LinuxKernel()) is None and not Path("/proc/self/cgroup").read_bytes().strip():
        pytest.skip("this process is in no control group")
    with LimitedKernel() as made:
        yield made


def rss(block: pyvfio.RamBlock) -> int:
    """What is there of it."""
    return sum(area.rss for area in areas(block.vaddr, block.max_length))


MEMORY = pytest.mark.parametrize("memory", [pyvfio.Anonymous(), pyvfio.Memfd()], ids=["anonymous", "memfd"])


def test_pages_that_the_kernel_does_not_tell_of_count_as_missing(kernel: LimitedKernel) -> None:
    """An error of mincore(2) is none of the block's."""
    kernel.leave(MIB)
    kernel.fail(call="resident", errno=errno.EAGAIN)
    with pyvfio.RamBlockList(kernel=kernel) as blocks, pytest.raises(pyvfio.IoctlError, match="1 MiB more than"):
        blocks.add("ring", used_length=2 * MIB, max_length=2 * MIB, prealloc=1)
    assert not kernel.planned_failures


@MEMORY
def test_what_does_not_fit_is_refused_before_it_is_touched(kernel: LimitedKernel, memory: MemoryKind) -> None:
    """A block that is made, one that grows: nothing was activated, populated or told."""
    kernel.leave(4 * MIB)
    with pyvfio.RamBlockList(kernel=kernel) as blocks:
        kernel.clear_trace()
        with pytest.raises(pyvfio.IoctlError, match="control group") as caught:
            blocks.add("ring", used_length=6 * MIB, max_length=64 * MIB, memory=memory, prealloc=1)
        assert caught.value.errno == errno.ENOMEM
        assert "6 MiB of memory are to be populated, 2 MiB more than" in str(caught.value)
        assert not {"mprotect", "fallocate"} & {call.call for call in kernel.trace}
        assert kernel.areas == []
        assert len(blocks) == 0
        block = blocks.add("ring", used_length=4 * MIB, max_length=64 * MIB, memory=memory, prealloc=1)
        kernel.clear_trace()
        with pytest.raises(pyvfio.IoctlError, match=r"2 MiB more than .*memory\.(max|limit_in_bytes) is") as caught:
            block.resize(10 * MIB)
        part = {"vaddr": block.vaddr + 4 * MIB, "size": 6 * MIB}
        assert (caught.value.request, caught.value.arguments) == ("madvise", part | {"advice": MADV_POPULATE_WRITE})
        assert not {"mprotect", "fallocate"} & {call.call for call in kernel.trace}
        assert (block.used_length, rss(block)) == (4 * MIB, 4 * MIB)
        block._check()
        block.resize(8 * MIB)
        assert rss(block) == 8 * MIB


@MEMORY
def test_what_comes_back_of_a_block_has_to_fit_too(kernel: LimitedKernel, memory: MemoryKind) -> None:
    """It stays discarded."""
    kernel.leave(16 * MIB)
    with pyvfio.RamBlockList(kernel=kernel) as blocks:
        block = blocks.add("ring", used_length=8 * MIB, max_length=64 * MIB, memory=memory, prealloc=1)
        block.discard(0, 8 * MIB)
        kernel.leave(2 * MIB)
        with pytest.raises(pyvfio.IoctlError, match="control group"):
            block.populate(0, 4 * MIB)
        assert (block.discarded, rss(block)) == (((0, 8 * MIB),), 0)
        block.populate(0, 2 * MIB)
        assert rss(block) == 2 * MIB


def test_a_mapper_that_prefaults_counts_what_is_there_already(kernel: LimitedKernel) -> None:
    """Only what is missing has to fit; what does not leaves the block as it was."""
    with Rig(kernel, mapper=partial(pyvfio.DmaMapper, prefault=1)) as rig:
        block = rig.add(used=2 * MIB, maximum=64 * MIB)
        kernel.leave(2 * MIB)
        reached = rig.reached()
        with pytest.raises(pyvfio.IoctlError, match="4 MiB of memory are to be populated, 2 MiB more than"):
            block.resize(6 * MIB)
        assert (block.used_length, rss(block), rig.reached()) == (2 * MIB, 2 * MIB, reached)
        buffer = rig.blocks.add("memfd", used_length=8 * MIB, max_length=8 * MIB, memory=pyvfio.Memfd())
        assert rig.reached() == rig.expected()  # its pages have come by fallocate
        buffer.remove()
        rig.check()


def test_where_nobody_asked_for_pages_nothing_is_looked_at(kernel: LimitedKernel) -> None:
    """They may never be touched."""
    kernel.leave(0)
    with Rig(kernel) as rig:
        rig.add(used=PAGE_SIZE).resize(MIB)
        rig.check()


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "private"])
def test_pages_of_a_file_are_its_own_and_copies_of_them_are_memory(kernel: LimitedKernel, *, shared: bool) -> None:
    """Somebody may have been charged for a file's pages long ago; nobody has for what this process writes of a private
    mapping."""
    kernel.leave(MIB)
    fd = os.memfd_create("file")
    os.truncate(fd, 4 * MIB)
    with pyvfio.RamBlockList(kernel=kernel) as blocks:
        refused = nullcontext() if shared else pytest.raises(pyvfio.IoctlError, match="control group")
        with refused:
            blocks.add(
                "file", used_length=4 * MIB, max_length=4 * MIB, memory=pyvfio.File(fd, shared=shared), prealloc=1
            )
    os.close(fd)


def test_only_pages_that_are_missing_have_to_fit(kernel: LimitedKernel) -> None:
    """To the byte; which are there is asked only where the answer could matter, of each part by itself."""
    vaddr = kernel.mmap(0, 4 * MIB, READ_WRITE, PRIVATE)
    kernel.madvise(vaddr, 4 * MIB, mmap.MADV_NOHUGEPAGE)
    kernel.madvise(vaddr + 2 * MIB, MIB, MADV_POPULATE_WRITE)
    parts = [(MIB, 2 * MIB), (2 * MIB, 4 * MIB)]
    kernel.leave(3 * MIB)
    kernel.clear_trace()
    check_room(kernel, parts, vaddr=vaddr)
    assert "resident" not in [call.call for call in kernel.trace]
    kernel.leave(2 * MIB)
    check_room(kernel, parts, vaddr=vaddr)
    asked = [call.given for call in kernel.trace if call.call == "resident"]
    assert asked == [(vaddr + MIB, MIB), (vaddr + 2 * MIB, 2 * MIB)]
    kernel.leave(2 * MIB - PAGE_SIZE)
    with pytest.raises(pyvfio.IoctlError, match="2 MiB of memory are to be populated, 4 KiB more than") as caught:
        check_room(kernel, parts, vaddr=vaddr)
    assert (caught.value.request, caught.value.arguments) == (
        "madvise",
        {"vaddr": vaddr + MIB, "size": 3 * MIB, "advice": MADV_POPULATE_WRITE},
    )
    kernel.munmap(vaddr, 4 * MIB)


def test_what_is_resident_is_told_in_bytes() -> None:
    """Of memory that can be accessed and of memory that cannot."""
    kernel = LinuxKernel()
    vaddr = kernel.mmap(0, 16 * PAGE_SIZE, 0, PRIVATE)
    assert kernel.resident(vaddr, 16 * PAGE_SIZE) == 0
    kernel.mprotect(vaddr, 4 * PAGE_SIZE, READ_WRITE)
    kernel.madvise(vaddr, 3 * PAGE_SIZE, 23)
    assert kernel.resident(vaddr, 16 * PAGE_SIZE) == 3 * PAGE_SIZE
    assert kernel.resident(vaddr + 2 * PAGE_SIZE, PAGE_SIZE) == PAGE_SIZE
    kernel.munmap(vaddr, 16 * PAGE_SIZE)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        kernel.resident(vaddr, PAGE_SIZE)
