"""What makes random sequences, compares them and makes them short; the kernels that play them are in tests/vm."""

from __future__ import annotations

import ast
import errno
import importlib
import os
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from pyvfio.testing.fake import VERSIONS
from pyvfio.testing.fake.iommu import iommu_model
from pyvfio.units import PAGE_SIZE, U64_MAX
from tools import comparison, differential, iommufd_sequences, sequences
from tools.comparison import Episode, Op, Outcome, changes, first_difference, play, shortest
from tools.stage import FakeStage

RANGES = iommu_model("intel", VERSIONS["6.12"]).ranges
GOOD = Outcome(0, 0, (), (), 0)
START = (
    Op("open", "c0"),
    Op("open", "g0"),
    Op("ioctl", "g0", "VFIO_GROUP_SET_CONTAINER", "=i", ("c0",)),
    Op("ioctl", "c0", "VFIO_SET_IOMMU", "value", (3,)),
)
MAP = Op("ioctl", "c0", "VFIO_IOMMU_MAP_DMA", "=IIQQQ", (32, 3, "a+0", 0x100000, PAGE_SIZE))
UNMAP = Op("ioctl", "c0", "VFIO_IOMMU_UNMAP_DMA", "=IIQQ", (24, 0, 0x100000, 4 * PAGE_SIZE))


def outcomes(*ops: Op, version: str = "6.12", entry_limit: int = 65535) -> list[Outcome]:
    """What the fake makes of calls behind `START`."""
    stage = FakeStage(version, "intel")
    return list(play(stage, Episode(entry_limit, START + ops)))[len(START) :]


# -------------------------------------------------------------------------------------------------------- the author


def test_the_same_seed_makes_the_same_calls_and_another_others() -> None:
    first, again, other = (sequences.episodes(seed=seed, ops=500, ranges=RANGES) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_same_seed_makes_the_same_calls_on_iommufd_too() -> None:
    first, again, other = (iommufd_sequences.episodes(seed=seed, ops=500, ranges=RANGES) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_there_are_as_many_calls_as_were_asked_for() -> None:
    assert [len(episode.ops) for episode in sequences.episodes(seed=1, ops=250, ranges=RANGES)] == [100, 100, 50]


def test_a_longer_run_begins_like_a_shorter_one() -> None:
    assert sequences.episodes(seed=7, ops=900, ranges=RANGES)[:4] == sequences.episodes(seed=7, ops=400, ranges=RANGES)


def test_each_request_is_made_and_each_kind_of_answer_met() -> None:
    stage, met = FakeStage("7.3", "intel"), Counter[tuple[str, int]]()
    for episode in sequences.episodes(seed=3, ops=6000, ranges=RANGES):
        met.update((op.request, done.errno) for op, done in zip(episode.ops, play(stage, episode), strict=True))
    for number in (
        0,
        errno.EINVAL,
        errno.EEXIST,
        errno.ENOSPC,
        errno.EFAULT,
        errno.ENOMEM,
        errno.EOVERFLOW,
        errno.ENOENT,
    ):
        assert met["VFIO_IOMMU_MAP_DMA", number] > 3, errno.errorcode.get(number)
    for request in ("VFIO_IOMMU_UNMAP_DMA", "VFIO_IOMMU_DIRTY_PAGES", "VFIO_DEVICE_SET_IRQS", "VFIO_IOMMU_GET_INFO"):
        assert met[request, 0] > 10, request


def test_each_request_of_iommufd_is_made_and_each_kind_of_answer_met() -> None:
    stage, met = FakeStage("7.3", "intel", "iommufd"), Counter[tuple[str, int]]()
    for episode in iommufd_sequences.episodes(seed=3, ops=8000, ranges=RANGES):
        met.update((op.request, done.errno) for op, done in zip(episode.ops, play(stage, episode), strict=True))
    for request, numbers in {
        "IOMMU_IOAS_MAP": (0, errno.EINVAL, errno.EEXIST, errno.EFAULT, errno.ENOMEM, errno.EOVERFLOW, errno.ENOENT),
        "IOMMU_IOAS_UNMAP": (0, errno.ENOENT, errno.EINVAL),
        "IOMMU_IOAS_COPY": (0, errno.ENOENT, errno.EEXIST, errno.EPERM),
        "IOMMU_IOAS_MAP_FILE": (0, errno.EINVAL, errno.EBADF),
        "IOMMU_IOAS_CHANGE_PROCESS": (0, errno.EINVAL),
        "VFIO_IOMMU_UNMAP_DMA": (0, errno.ENOENT, errno.EINVAL),
        "VFIO_DEVICE_ATTACH_IOMMUFD_PT": (0, errno.EINVAL, errno.EFAULT, errno.EADDRINUSE, errno.ENOENT),
        "VFIO_DEVICE_BIND_IOMMUFD": (0, errno.EINVAL, errno.EBUSY, errno.EBADFD),
        "IOMMU_DESTROY": (0, errno.EBUSY, errno.ENOENT),
        "IOMMU_IOAS_ALLOW_IOVAS": (0, errno.EINVAL, errno.EADDRINUSE),
    }.items():
        for number in numbers:
            assert met[request, number], (request, errno.errorcode.get(number))


def test_nothing_is_mapped_where_a_kernel_would_lose_it() -> None:
    top = U64_MAX + 1 - PAGE_SIZE
    ranges = iommu_model("virtio", VERSIONS["6.12"]).ranges
    for episode in sequences.episodes(seed=1, ops=5000, ranges=ranges, top=top):
        for op in episode.ops:
            if op.request == "VFIO_IOMMU_MAP_DMA" and op.layout == "=IIQQQ":
                iova, size = int(op.fields[3]), int(op.fields[4])
                assert not top < iova + size <= U64_MAX + 1


# -------------------------------------------------------------------------------------------------------- the player


def test_an_outcome_has_the_value_the_errno_what_was_written_and_what_is_locked() -> None:
    assert outcomes(MAP, MAP, UNMAP, Op("close", "c1")) == [
        Outcome(0, 0, (), (), 1),
        Outcome(0, errno.EEXIST, (), (), 1),
        Outcome(0, 0, ((17, "10"),), (), 0),  # 0x4000 became 0x1000
        Outcome(0, errno.EBADF, (), (), 0),
    ]


def test_what_is_written_behind_the_structure_is_seen() -> None:
    (info,) = outcomes(Op("ioctl", "c0", "VFIO_IOMMU_GET_INFO", "=IIQII", (512, 0, 0, 7, 7)))
    assert info.desk[0][0] == 4
    assert info.desk[-1][0] + len(info.desk[-1][1]) // 2 > 24


def test_the_bitmap_area_is_watched() -> None:
    start = Op("ioctl", "c0", "VFIO_IOMMU_DIRTY_PAGES", "=II", (8, 1))
    get = Op("ioctl", "c0", "VFIO_IOMMU_DIRTY_PAGES", "=IIQQQQQ", (48, 4, 0x100000, PAGE_SIZE, PAGE_SIZE, 8, "b+8"))
    assert outcomes(start, MAP, get)[-1].bitmap == ((8, "0100000000000000"),)


@pytest.mark.parametrize(("room", "number"), [(24, 0), (23, errno.EFAULT)])
def test_behind_the_room_there_is_no_memory(room: int, number: int) -> None:
    assert outcomes(UNMAP._replace(room=room))[0].errno == number


def test_an_answer_cannot_be_written_to_a_desk_that_is_read_only() -> None:
    assert [done.errno for done in outcomes(MAP, UNMAP._replace(desk="ro"), UNMAP)] == [0, errno.EFAULT, 0]


def test_memory_limits_and_entries_are_part_of_the_play() -> None:
    ops = (
        Op("protect", fields=(0, 1, 1)),
        MAP,
        Op("map", fields=(0, 1, "shared file", 3)),
        Op("touch", fields=(0, 1)),
        Op("privilege", fields=(0,)),
        Op("limit", fields=(0,)),
        MAP,
        Op("limit", fields=(-1,)),
        MAP,
        Op("unmap", fields=(0, 1)),
        Op("look", fields=(0, 1)),
    )
    numbers = [done.errno for done in outcomes(*ops)]
    assert numbers == [0, errno.EFAULT, 0, 0, 0, 0, errno.ENOMEM, 0, 0, 0, errno.EFAULT]
    assert outcomes(MAP, entry_limit=0)[0].errno == errno.ENOSPC


@pytest.mark.parametrize("iommu", ["intel", "amd", "virtio"])
def test_each_number_of_a_sequence_fits_the_structure(iommu: str) -> None:
    ranges = iommu_model(iommu, VERSIONS["6.12"]).ranges
    for episode in iommufd_sequences.episodes(seed=51, ops=5000, ranges=ranges):
        for op in episode.ops:
            numbers = [0 if isinstance(field, str) else field for field in op.fields]
            if op.layout.startswith("="):
                assert struct.pack(op.layout, *numbers)
            assert all(number < 1 << 64 for number in numbers)


def test_calls_on_iommufd_are_played_and_pinned_pages_are_part_of_the_outcome() -> None:
    ops = (
        Op("open", "i0"),
        Op("ioctl", "i0", "IOMMU_IOAS_ALLOC", "=III", (12, 0, 0)),
        Op("open", "v0"),
        Op("ioctl", "v0", "VFIO_DEVICE_BIND_IOMMUFD", "=IIiI", (16, 0, "i0", 0)),
        Op("ioctl", "v0", "VFIO_DEVICE_ATTACH_IOMMUFD_PT", "=III", (12, 0, 1)),
        Op("file", "f0", fields=(2,)),
        Op("dup", "i0", into="i1"),
        Op("close", "i0"),
        Op("ioctl", "i1", "IOMMU_IOAS_MAP_FILE", "=IIIiQQQ", (40, 7, 1, "f0", 0, 2 * PAGE_SIZE, 0)),
        Op("poke", fields=(8, 3)),
        Op("ioctl", "i1", "IOMMU_IOAS_IOVA_RANGES", "=IIIIQQ", (32, 1, 1, 0, "b+0", 0)),
        Op("resize", "f0", fields=(0,)),
        Op("open", "g0"),
    )
    found = list(play(FakeStage("7.3", "intel", "iommufd"), Episode(65535, ops)))
    numbers = [done.errno for done in found]
    assert numbers == [0] * 10 + [errno.EMSGSIZE, 0, errno.EBUSY]
    assert [done.pinned for done in found] == [0] * 8 + [2] * 5
    assert found[9].bitmap == ((8, "0300000000000000"),)
    assert found[10].bitmap[0][0] == 0


def test_nothing_of_iommufd_is_left_behind() -> None:
    before = os.listdir("/proc/self/fd")
    for episode in iommufd_sequences.episodes(seed=5, ops=500, ranges=RANGES):
        assert len(list(play(FakeStage("7.3", "intel", "iommufd"), episode))) == len(episode.ops)
    assert os.listdir("/proc/self/fd") == before


def test_nothing_is_left_behind() -> None:
    before = os.listdir("/proc/self/fd")
    for episode in sequences.episodes(seed=5, ops=300, ranges=RANGES):
        assert len(list(play(FakeStage("6.1", "intel"), episode))) == len(episode.ops)
    assert os.listdir("/proc/self/fd") == before


# ------------------------------------------------------------------------------------------------------ the comparison


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        (b"", b"", ()),
        (b"abcd", b"abcd", ()),
        (b"abcd", b"aBCd", ((1, "4243"),)),
        (b"abcd", b"AbcD", ((0, "41"), (3, "44"))),
    ],
)
def test_changed_bytes_are_told_in_runs(before: bytes, after: bytes, found: tuple[tuple[int, str], ...]) -> None:
    assert changes(before, after) == found


def test_the_first_difference_is_found_and_none_where_there_is_none() -> None:
    bad = GOOD._replace(errno=22)
    assert first_difference([GOOD, GOOD], [GOOD, GOOD]) is None
    assert first_difference([GOOD, bad, GOOD], [GOOD, GOOD, bad]) == (1, bad, GOOD)


def test_a_sequence_shrinks_to_what_it_takes() -> None:
    ops = tuple(Op("fill", fields=(number,)) for number in range(60))
    least = shortest(Episode(1, ops), lambda episode: {ops[3], ops[41]} <= set(episode.ops))
    assert least == Episode(1, (ops[3], ops[41]))


def test_two_stages_that_differ_are_reduced_to_the_calls_that_show_it() -> None:
    wraps = MAP._replace(fields=(32, 3, "a+0", U64_MAX - PAGE_SIZE + 1, 2 * PAGE_SIZE))
    noise = [Op("fill", fields=(0,)), MAP, UNMAP, Op("open", "c1")]
    episode = Episode(8, (*noise, *START, *noise, wraps, *noise))
    found = comparison.reduce(episode, FakeStage("6.12", "intel"), FakeStage("7.3", "intel"))
    assert found is not None
    least, one, other = found
    assert [op.call for op in least.ops] == ["open", "open", "ioctl", "ioctl", "ioctl"]
    assert least.ops[-1] == wraps
    assert (one.errno, other.errno) == (errno.EINVAL, errno.EOVERFLOW)


def test_stages_that_do_not_differ_are_reduced_to_nothing() -> None:
    stages = (FakeStage("6.12", "intel"), FakeStage("6.12", "intel"))
    assert comparison.reduce(Episode(8, (*START, MAP)), *stages) is None


def test_episodes_and_outcomes_survive_being_written_down() -> None:
    for episode in sequences.episodes(seed=1, ops=300, ranges=RANGES):
        assert comparison.decode_episode(comparison.encode(episode)) == episode
    outcome = Outcome(3, 22, ((1, "ab"), (9, "00")), ((4, "ff"),), 7)
    assert comparison.decode_outcome(comparison.encode(outcome)) == outcome


def test_the_program_has_the_calls_in_it_and_is_python() -> None:
    episode = Episode(8, (*START, MAP))
    text = comparison.program(episode, version="6.1", iommu="intel", real=GOOD, fake=GOOD._replace(errno=22))
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, each.name) for each in node.names), node.module
    assert "VFIO_IOMMU_MAP_DMA" in text
    assert "fake: EINVAL" in text


# ------------------------------------------------------------------------------------------------------- the command


class Machine(differential.Machine):
    """Plays on a fake, which may answer one call otherwise, and may lose the last ones."""

    answer: Outcome | None = None
    lost = 0
    status = 0
    first: Sequence[str] = ()

    def run(self, task: str, episodes: Sequence[Episode], *, calls: int, first: Sequence[str] = ()) -> tuple[int, str]:
        """As if a kernel had answered."""
        del calls
        stage = FakeStage("7.3", "intel")
        if task == "reduce":
            good = comparison.encode(GOOD)
            return 0, "".join(f"{comparison.encode(episode)}\t{good}\t{good}\n" for episode in episodes)
        self.first = first
        played = [outcome for episode in episodes for outcome in play(stage, episode)]
        if self.answer is not None:
            played[7] = self.answer
        return self.status, "".join(comparison.encode(outcome) + "\n" for outcome in played[: len(played) - self.lost])


def compared(tmp_path: Path, *, answer: Outcome | None = None, lost: int = 0, status: int = 0) -> int:
    """The exit status when that is what the machine does, which also runs pytest."""
    options = differential.parser().parse_args(["--kernel", "7", "--ops", "150", "--", "pytest", "-q", "--bind"])
    machine = Machine(tmp_path, options)
    machine.answer, machine.lost, machine.status = answer, lost, status
    ended = differential.compare(options, machine)
    assert machine.first == ["pytest", "-q", "--bind"]
    return ended


def test_packaged_kernels_have_no_iommufd(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        differential.main(["--space", "iommufd", "--kernel", "6.12"])
    assert "6.12 has no /dev/iommu" in capsys.readouterr().err


def test_no_difference_is_success_unless_the_command_in_the_same_machine_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(tmp_path) == 0
    assert compared(tmp_path, status=1) == 1
    assert "# pytest failed in the virtual machine" in capsys.readouterr().out


@pytest.mark.parametrize("status", [0, 1])
def test_a_difference_is_a_failure_and_is_printed_as_a_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    assert compared(tmp_path, answer=GOOD._replace(value=12345), status=status) == 1
    printed = capsys.readouterr().out
    assert "1 of 2 episodes differ" in printed
    assert "replay(" in printed


@pytest.mark.parametrize("status", [0, 1])
def test_calls_that_are_not_answered_are_an_error(tmp_path: Path, status: int) -> None:
    with pytest.raises(OSError, match="149 of 150 calls"):
        compared(tmp_path, lost=1, status=status)


def test_the_command_in_the_machine_runs_before_the_calls_and_writes_to_stderr(tmp_path: Path) -> None:
    """So that stdout has the outcomes only."""
    episodes = tmp_path / "episodes"
    episodes.write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "tools.differential", "--guest", "record", "--episodes", episodes, "--", "echo", "ran"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr.splitlines()[0]) == ("", "ran")
