"""`scripts/bench` without a machine: what it prints, what it refuses, and what it makes of figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pyvfio.device import open_device
from pyvfio.errors import UnsupportedError
from pyvfio.ioas import Ioas
from pyvfio.testing import FakeKernel
from pyvfio.units import MIB
from tests import stages
from tests.mutants.mutant import ROOT
from tools import (
    bare,
    bench,
    granule_cost,
    import_cost,
    memory_cost,
    path_cost,
    plot,
    report,
    resize_cost,
    scale_cost,
    targets,
)
from tools.fit import exponent_of
from tools.report import Cost, ImportCost, MemoryRow, PathRow, Report, ResizeRow, Resizes, ScaleRow
from tools.scale_cost import Run, Scene
from tools.show import show
from tools.targets import IOMMUFD, LIMITS, Limits, judge, limits_of

COSTS = {"remap": (900.0, 60_000.0), "extend": (200.0, 205.0), "granule": (201.0, 203.0)}
LINE = LIMITS["7"]
LEAST = Report(world="vm", kernel="7.3-amd64", iommu="intel")


def rows(memory: str = "anonymous", **changed: tuple[float, float]) -> Resizes:
    """At 2 and 512 MiB; the bare calls take 150 µs in each, and shrinks take as long as grows."""
    return Resizes(
        memory,
        [
            ResizeRow(policy, size, Cost(cost, 100.0, cost), Cost(150.0, 100.0, 150.0))
            for policy, costs in {**COSTS, **changed}.items()
            for size, cost in zip((2 * MIB, 512 * MIB), costs, strict=True)
        ],
    )


def failing(found: Report) -> list[str]:
    """What does not hold."""
    return [verdict.what for verdict in judge(found) if not verdict.ok]


def resizes(memory: str = "anonymous", **changed: tuple[float, float]) -> Report:
    """A report of them alone."""
    return replace(LEAST, resizes=[rows(memory, **changed)])


def paths(**changed: float | None) -> Report:
    """A report of the hot paths alone, each at its limit; those among others take as long as those alone."""
    costs: dict[str, float | None] = {path.key: LINE.paths.get(path.key, 1.0) for path in path_cost.PATHS}
    return replace(LEAST, paths=[PathRow(key, cost, 1.0, 2.0) for key, cost in {**costs, **changed}.items()])


ALL_LIMITS = [
    (space, kernel, limits)
    for space, lines in (("type1", LIMITS), ("iommufd", IOMMUFD))
    for kernel, limits in lines.items()
]
PATH_NAMES = {path.key: path.name for path in path_cost.PATHS}


def at_limits(line: Limits, **changed: float) -> list[PathRow]:
    """The hot paths that have a limit, each at its own; the ratios have room."""
    limits = {**line.paths, **{f"{call}_{n}": 1.0 for call in ("map_dma", "map_buffer") for n in (16, 16384)}}
    return [PathRow(key, cost, None, None) for key, cost in {**limits, **changed}.items()]


def added(grow: float, shrink: float, policy: str) -> Resizes:
    """One row: what pyvfio adds to system calls that take no time."""
    return Resizes("memfd", [ResizeRow(policy, 2 * MIB, Cost(grow, 1.0, shrink), Cost(0.0, 1.0, 0.0))])


def test_on_the_fake_it_prints_a_row_for_each_policy_and_length(capsys: pytest.CaptureFixture[str]) -> None:
    """As JSON, and nothing of the calls that a fake does not make."""
    assert bench.main(["--fake", "--resizes", "--json", "--sizes", "2,4", "--repeat", "1"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["world"] == "fake"
    (found,) = answer["resizes"]
    assert [(row["policy"], row["size"]) for row in found["rows"]] == [
        (policy, size * MIB) for policy in ("remap", "extend", "granule") for size in (2, 4)
    ]
    assert all(row["grow_us"] > 0 and row["shrink_us"] > 0 and row["c_grow_us"] is None for row in found["rows"])


def test_on_iommufd_there_are_rows_for_cuts_too(capsys: pytest.CaptureFixture[str]) -> None:
    """Of both ways to cut."""
    words = ["--fake", "--space", "iommufd", "--resizes", "--json", "--sizes", "2", "--repeat", "1"]
    assert bench.main(words) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["space"], answer["kernel"]) == ("iommufd", "7.3")
    (found,) = answer["resizes"]
    assert [row["policy"] for row in found["rows"]] == ["remap", "extend", "granule", "cut-pages", "cut-replace"]


def test_a_block_of_many_granules_is_measured_and_judged(capsys: pytest.CaptureFixture[str]) -> None:
    """Each operation at each n, and the bytes of one granule."""
    words = ["--fake", "--space", "iommufd", "--granules", "--counts", "100,400", "--json"]
    assert bench.main(words) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {tuple(row["each_us"]) for row in answer["granules"]} == {("100", "400")}
    ((of, size),) = [(row["of"], row["bytes"]) for row in answer["memory"]]
    assert of in targets.OBJECTS
    assert 0 < size <= targets.OBJECTS[of]
    assert {each["about"] for each in answer["targets"]} == {"granules", "objects"}


def test_a_table_says_that_a_fake_says_nothing_of_a_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    """So that nobody quotes it."""
    assert bench.main(["--fake", "--resizes", "--sizes", "2", "--repeat", "1"]) == 0
    assert "do not apply to a kernel" in capsys.readouterr().out


@pytest.mark.parametrize("sizes", ["x", "3", "0", "", "-2", "1" + 40 * "0"])
def test_lengths_that_cannot_be_are_wrong_usage(sizes: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With the word that is wrong."""
    with pytest.raises(SystemExit) as ended:
        bench.main(["--fake", f"--sizes={sizes}"])
    assert ended.value.code == 2
    assert "--sizes" in capsys.readouterr().err


def test_resizes_are_judged_by_the_rows() -> None:
    """Flat, two hundred times cheaper, and little added; each by itself."""
    assert failing(resizes()) == []
    assert failing(resizes(remap=(900.0, 90_000.0), granule=(201.0, 360.0))) == [
        "granule: growing costs the same at every length within 5%",
        "granule: shrinking costs the same at every length within 5%",
        f"granule: pyvfio adds at most {LINE.grow_added:.0f} µs to the system calls of a grow",
        f"granule: pyvfio adds at most {LINE.shrink_added:.0f} µs to the system calls of a shrink",
    ]
    assert failing(resizes(remap=(900.0, 30_000.0))) == [
        f"{policy}: growing is 200 times cheaper than remap at 512 MiB" for policy in ("extend", "granule")
    ]


@pytest.mark.parametrize("memory", ["memfd", "hugetlb", "file"])
def test_memory_of_every_kind_is_held_to_the_same_limit(memory: str) -> None:
    """But not to be cheaper than a remap by so much: filling the pages with zeros is part of both."""
    assert failing(resizes(memory, remap=(900.0, 30_000.0))) == []
    assert failing(resizes(memory, extend=(223.0, 223.0))) == [
        "extend: pyvfio adds at most 62 µs to the system calls of a grow"
    ]


def test_the_verdict_says_what_it_leaves_out() -> None:
    """Populating the memory is the larger part of a grow."""
    seen = [verdict.seen for verdict in judge(resizes()) if "system calls of a grow" in verdict.what]
    assert seen == [
        "55.0 µs; populating 2 MiB, 100.0 µs, is left out",
        "53.0 µs; populating 2 MiB, 100.0 µs, is left out",
    ]


def test_a_hot_path_that_could_not_be_measured_does_not_keep_to_its_limit() -> None:
    """Each by itself."""
    assert failing(paths()) == []
    for key, limit in LINE.paths.items():
        assert failing(paths(**{key: None})) == [f"{PATH_NAMES[key]}: at most {limit:g} µs"]


def test_one_mapping_among_many_is_judged_beside_one_among_few() -> None:
    """By the ratio."""
    assert failing(paths(map_dma_16=50.0, map_dma_16384=58.0)) == []
    assert failing(paths(map_dma_16=50.0, map_dma_16384=58.1)) == [
        "map_dma + close: among 16,384 at most 1.16 times as long as among 16"
    ]


def grown(exponent: float) -> dict[int, float]:
    """The cost of one operation where n of them cost n^exponent."""
    return {n: n ** (exponent - 1) for n in (100, 1000, 10_000)}


EXPONENTS = {**{name: targets.EXPONENT for names in scale_cost.GROUPS.values() for name in names}, **targets.WALKS}


@pytest.mark.parametrize(
    ("good", "bad", "verdict"),
    [
        *(
            (
                replace(LEAST, memory=[MemoryRow(name, limit)]),
                replace(LEAST, memory=[MemoryRow(name, limit + 1)]),
                f"{name}: at most {limit:,} bytes",
            )
            for name, limit in targets.OBJECTS.items()
        ),
        *(
            (
                replace(LEAST, scale=[ScaleRow(name, grown(limit - 0.001))]),
                replace(LEAST, scale=[ScaleRow(name, grown(limit + 0.001))]),
                f"{name}: at most n^{limit} for n",
            )
            for name, limit in EXPONENTS.items()
        ),
        *(
            (
                replace(LEAST, kernel=kernel, space=space, paths=at_limits(limits)),
                replace(LEAST, kernel=kernel, space=space, paths=at_limits(limits, **{key: 1.001 * limit})),
                f"{PATH_NAMES[key]}: at most {limit:g} µs",
            )
            for space, kernel, limits in ALL_LIMITS
            for key, limit in limits.paths.items()
        ),
        *(
            (
                replace(LEAST, kernel=kernel, space=space, resizes=[added(limits.grow_added, shrink, policy)]),
                replace(
                    LEAST,
                    kernel=kernel,
                    space=space,
                    resizes=[added(limits.grow_added + more, shrink + 1 - more, policy)],
                ),
                f"{policy}: pyvfio adds at most {limit:.0f} µs to the system calls of a {verb}",
            )
            for space, kernel, limits in ALL_LIMITS
            for policy, shrink in {
                "extend": limits.shrink_added,
                "granule": limits.shrink_added,
                **limits.cut_added,
            }.items()
            for more, limit, verb in ((1, limits.grow_added, "grow"), (0, shrink, "shrink"))
        ),
        (
            replace(LEAST, imports=ImportCost(targets.IMPORT, 1.0)),
            replace(LEAST, imports=ImportCost(1.01 * targets.IMPORT, 1.0)),
            f"import pyvfio and its first name: at most {targets.IMPORT:g} times the yardstick",
        ),
    ],
)
def test_a_figure_passes_at_its_limit_and_fails_above(good: Report, bad: Report, verdict: str) -> None:
    """Each of them, on each line of kernels."""
    assert failing(good) == []
    assert failing(bad) == [verdict]


@pytest.mark.parametrize(
    ("release", "line"),
    [("6.1.0-44-amd64", "6.1"), ("6.12.9", "6.1"), ("7.3+deb14-amd64", "7"), ("8.0", "7"), ("5.4", "6.1")],
)
def test_a_kernel_is_held_to_the_newest_line_that_is_not_newer(release: str, line: str) -> None:
    """Or to the oldest of all."""
    assert limits_of(release) is LIMITS[line]


@pytest.mark.parametrize(("release", "line"), [("6.12.95-amd64", "6.12"), ("7.3.4+deb13-amd64", "7")])
def test_an_iommufd_has_limits_of_its_own(release: str, line: str) -> None:
    """By line of kernels, too."""
    assert limits_of(release, "iommufd") is IOMMUFD[line]


def test_a_cut_may_take_longer_where_more_stays_if_another_space_replaces_the_first() -> None:
    """The kernel copies what stays; cuts by pages cost the same at every length."""
    rows_of = [
        ResizeRow(policy, size, Cost(cost, 1.0, cost), None)
        for policy in ("cut-pages", "cut-replace")
        for size, cost in ((2 * MIB, 200.0), (512 * MIB, 215.0))
    ]
    found = replace(LEAST, space="iommufd", resizes=[Resizes("anonymous", rows_of)])
    assert failing(found) == [
        "cut-pages: growing costs the same at every length within 5%",
        "cut-pages: shrinking costs the same at every length within 5%",
        "cut-replace: growing costs the same at every length within 5%",
    ]


def test_times_of_the_fake_are_not_judged() -> None:
    """Exponents and bytes are."""
    found = replace(
        resizes(extend=(1e6, 2e6)),
        world="fake",
        paths=paths(container=1e6).paths,
        scale=[ScaleRow("add a block", {100: 1.0, 10_000: 10.0})],
        memory=[MemoryRow("a block", 1001)],
        imports=ImportCost(10.0, 1.0),
    )
    assert failing(found) == [
        "add a block: at most n^1.15 for n",
        "a block: at most 1,000 bytes",
        f"import pyvfio and its first name: at most {targets.IMPORT:g} times the yardstick",
    ]


# ------------------------------------------------------------------------------------------------------------ exponents


@pytest.mark.parametrize(
    ("cost", "expected"),
    [(lambda _n: 3.0, 1.0), (lambda n: 5e-4 * n, 2.0), (lambda n: 1e-6 * n * n, 3.0), (lambda n: n**0.15, 1.15)],
)
def test_the_exponent_is_that_of_n_operations(cost: Callable[[int], float], expected: float) -> None:
    """Given the cost of one."""
    assert exponent_of({n: cost(n) for n in scale_cost.COUNTS}) == pytest.approx(expected)


def test_a_cost_that_is_linear_beside_a_constant_part_shows() -> None:
    """When it has doubled at 10,000; the constant part hides it at a small n."""
    assert exponent_of({n: 50 + 50 * n / 10_000 for n in scale_cost.COUNTS}) == pytest.approx(1.15, abs=0.005)
    assert exponent_of({n: 50 + n / 10_000 for n in scale_cost.COUNTS}) == pytest.approx(1.0, abs=0.01)


def test_the_exponent_of_few_points_is_that_of_the_two_largest() -> None:
    """And of one point there is none."""
    assert exponent_of({1: 1.0, 10: 1.0, 20: 2.0}) == pytest.approx(2.0)
    assert exponent_of({1000: 1.0}) is None


def test_a_small_cost_may_grow_by_some_misses_of_a_busy_processor() -> None:
    """Where the clock is the processor's time; a clock of instructions sees no misses."""
    small = replace(LEAST, scale=[ScaleRow("look up", {100: 1.0, 10_000: 6.0})])
    assert failing(small) == ["look up: at most n^1.15 for n"]
    assert failing(replace(small, world="fake")) == []
    assert failing(replace(small, world="fake", scale=[ScaleRow("add", {100: 50.0, 10_000: 120.0})])) != []


def test_the_fake_walks_over_no_mappings() -> None:
    """So that a walk of the library's own is seen there."""
    (name, limit), *_ = targets.WALKS.items()
    found = replace(LEAST, scale=[ScaleRow(name, {n: 100 * cost for n, cost in grown(limit - 0.01).items()})])
    assert failing(found) == []
    assert failing(replace(found, world="fake")) == [f"{name}: at most n^{targets.EXPONENT} for n"]


def test_a_row_that_was_given_up_is_missed() -> None:
    """However it grew before."""
    found = replace(LEAST, scale=[ScaleRow("one", {100: 1.0, 1000: 1.0}), ScaleRow("other", {100: 1.0, 10_000: 1.0})])
    assert failing(found) == ["one: at most n^1.15 for n"]


class Ticks:
    """A clock that a family moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def measure_with(
    cost: Callable[[int, int], float], doubtful: Callable[[ScaleRow], bool]
) -> tuple[list[ScaleRow], list[int]]:
    """Measure one family whose operations take that many seconds, by n and by the run; the n of each run."""
    clock, ran = Ticks(), []

    def family(_scene: Scene, n: int, run: Run) -> None:
        ran.append(n)

        def operation(_item: int) -> None:
            clock.now += cost(n, len(ran))

        run.each("operation", range(n), operation)

    with FakeKernel() as kernel, open_device(kernel.bdfs[0], kernel=kernel) as device:
        found = scale_cost.measure(device.space, clock, counts=(10, 100, 1000), families=[family], doubtful=doubtful)
    return found, ran


def test_a_family_that_would_take_too_long_is_not_measured_further() -> None:
    """As quadratic operations do."""
    found, ran = measure_with(lambda n, _run: n * n * 1e-5, lambda _row: False)
    assert list(found[0].costs) == [10, 100]
    assert set(ran) == {10, 100}


def test_a_row_that_fails_is_measured_again_and_the_least_counts() -> None:
    """Noise makes costs larger, never smaller."""
    found, _ran = measure_with(lambda n, run: 1e-5 * (10 if n == 1000 and run % 2 else 1), bench.may_be_noise)
    assert found[0].exponent == pytest.approx(1.0)
    worse, few = measure_with(lambda n, _run: 5e-6 * n, bench.may_be_noise)
    assert worse[0].exponent == pytest.approx(2.0)
    always, more = measure_with(lambda n, _run: 1e-5 * n**0.3, bench.may_be_noise)
    assert always[0].exponent == pytest.approx(1.3)
    assert (more.count(1000), few.count(1000)) == (6 * 2, 1)


def test_every_family_is_measured_on_the_fake_and_drawn() -> None:
    """Each operation is in one picture, and has a positive cost at each n."""
    with FakeKernel() as kernel, open_device(kernel.bdfs[0], kernel=kernel) as device:
        kernel.privileged = True
        found = scale_cost.measure(device.space, path_cost.clock_of(fake=False), counts=(2, 4))
        kernel.check()
        assert not kernel.mappings()
        assert device.space.reserved_iova == ()
    assert all(set(row.costs) == {2, 4} and min(row.costs.values()) > 0 for row in found)
    drawn = [name for names in scale_cost.GROUPS.values() for name in names]
    assert sorted({row.name for row in found} | {"vaddr to IOVA in bulk, each"}) == sorted(drawn)


def test_a_table_has_a_row_for_each_hot_path(capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the figures of libvfn, with their source."""
    show(paths(), [])
    printed = capsys.readouterr().out
    assert all(path.name in printed for path in path_cost.PATHS)
    assert path_cost.LIBVFN in printed


def test_scale_is_checked_on_the_fake(capsys: pytest.CaptureFixture[str]) -> None:
    """One n has no exponent, and is no success."""
    assert bench.main(["--fake", "--scale", "--counts", "2", "--repeat", "1", "--check"]) == 1
    assert "measured at one n only" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["--counts=0"], ["--counts=x"], ["--counts=20000"], ["--paths"], ["--check"], ["--granules"]]
)
def test_parts_that_do_not_go_together_are_wrong_usage(arguments: list[str]) -> None:
    """And counts that cannot be."""
    more = {"--paths": ["--scale"], "--check": ["--paths"], "--counts=20000": ["--scale"]}
    given = [*arguments, *more.get(arguments[0], [])]
    with pytest.raises(SystemExit) as ended:
        bench.main(["--fake", *given])
    assert ended.value.code == 2


def test_bytes_are_those_of_the_library_alone() -> None:
    """The fake keeps its own objects for each mapping: none of them counts."""
    with FakeKernel() as kernel, open_device(kernel.bdfs[0], kernel=kernel) as device:
        kernel.privileged = True
        found = {row.name: row.size for row in memory_cost.measure(device.space, count=64)}
    assert set(targets.OBJECTS) - {granule_cost.OBJECTS} < set(found)
    assert all(100 < size < 5000 for size in found.values())


def test_the_import_is_measured_beside_the_yardstick() -> None:
    """Both take time."""
    found = import_cost.measure(repeat=1)
    assert found.yardstick > 0
    assert found.pyvfio > 0


# ------------------------------------------------------------------------------------------------------------ hot paths


@pytest.mark.parametrize("space", bench.SPACES)
def test_hot_paths_of_the_fake_can_be_measured_too(space: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Which shows that the statements run; the figures say nothing."""
    assert bench.main(["--fake", "--space", space, "--paths", "--repeat", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["hot_paths"]
    assert [row["path"] for row in found] == [path.key for path in path_cost.PATHS]
    assert {row["path"] for row in found if row["pyvfio_us"] is None} <= {"translate_numpy"}  # numpy is an extra


def test_the_figures_of_c_are_put_beside_the_paths() -> None:
    """By their names in the program; nothing stands beside a path that it has not."""
    found = path_cost.rows({"read32": 2.0}, {"map": 3.0}, {"config": 4.0})
    assert [row.key for row in found] == [path.key for path in path_cost.PATHS]
    assert {row.key for row in found if row.bare == 3.0} == {"container", "map_dma", "map_buffer"}
    assert {(row.key, row.pyvfio) for row in found if row.pyvfio} == {("read32", 2.0)}
    assert {(row.key, row.plain) for row in found if row.plain} == {("config", 4.0)}


def test_the_clock_of_the_loop_is_subtracted() -> None:
    """So that an empty statement takes nothing."""
    clock = Ticks()
    watch = path_cost.Stopwatch(clock, repeat=3)

    def work(seconds: float) -> None:
        clock.now += seconds

    names: dict[str, object] = {"work": work}
    assert watch.each("work(3)", names, number=4) == pytest.approx(3e6)
    assert watch.each("work(1); work(3)", names, number=4, apart="work(1)", part=2) == pytest.approx(1.5e6)


def test_every_path_in_c_is_one_that_the_program_prints() -> None:
    """By its name in the source."""
    source = bare.PATHS.read_text(encoding="utf-8")
    for path in path_cost.PATHS:
        name = path.bare or ""
        stem, _, count = name.rpartition("_")
        assert f'"{name}"' in source or (f'"{stem}_%zu"' in source and count.isdigit()), path


def test_the_output_of_the_programs_in_c_is_read() -> None:
    """The least of each row counts."""
    text = "2 remap 2000 500 3000\n2 remap 1000 700 4000\n8 granule 1 2 3\n"
    assert dict(bare.parse_resizes(text)) == {
        ("remap", 2 * MIB): Cost(1.0, 0.5, 3.0),
        ("granule", 8 * MIB): Cost(0.001, 0.002, 0.003),
    }
    assert bare.parse_paths("map 2000.5\nload 1.000\nmap 1500.000\n") == {"map": 1.5, "load": 0.001}


# --------------------------------------------------------------------------------------------------- reports, pictures


def full() -> Report:
    """Something of each part."""
    return replace(
        LEAST,
        resizes=[rows(), Resizes("memfd", [ResizeRow("remap", 2 * MIB, Cost(1.0, 2.0, 3.0), None)])],
        paths=[PathRow("config", 1.0, None, 2.5)],
        scale=[ScaleRow("vaddr to IOVA", {10: 1.0, 100: 1.5, 1000: 2.0})],
        granules=[ScaleRow("grow by one more granule", {2000: 1.0})],
        space="iommufd",
        memory=[MemoryRow("a block", 900.5)],
        imports=ImportCost(0.1, 0.05),
    )


def test_a_report_in_json_is_the_same_report() -> None:
    """It is how a virtual machine hands its figures out."""
    assert report.from_json(json.dumps(report.to_json(full()))) == full()
    assert report.from_json(json.dumps(report.to_json(LEAST))) == LEAST


def test_pictures_have_a_line_for_each_way() -> None:
    """And dashed ones for the bare calls where there are any."""
    grow, shrink, translation = plot.panels(full())  # and none of the memory that has one size
    assert [line.name for line in grow.lines] == [
        name for policy in ("remap", "extend", "granule") for name in (policy, f"{policy}, C")
    ]
    assert grow.lines[2].points == {2: 200.0, 512: 205.0}
    assert shrink.lines[1].dashed
    assert translation.lines[0].points == {10: 1.0, 100: 1.5, 1000: 2.0}


def test_the_same_figures_give_the_same_picture(tmp_path: Path) -> None:
    """Without a date or a path in it, and with its words as text."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for name in ("one.svg", "other.svg"):
        plot.draw(full(), tmp_path / name)
    picture = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert picture == (tmp_path / "other.svg").read_text(encoding="utf-8")
    assert "granule, C" in picture
    assert "dc:date" not in picture
    assert str(tmp_path) not in picture


def test_without_matplotlib_a_picture_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the command that installs it."""
    monkeypatch.setattr(plot, "find_spec", lambda _name: None)
    with pytest.raises(UnsupportedError, match="pip install matplotlib"):
        bench.main(["--fake", "--sizes", "2", "--svg", str(tmp_path / "a.svg")])


@pytest.mark.parametrize("memory", ["anonymous", "memfd", "file"])
def test_it_measures_memory_of_the_kind_that_is_asked_for(memory: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And says which, to persons and to programs."""
    given = ["--fake", "--resizes", "--sizes", "2", "--repeat", "1", "--memory", memory]
    assert bench.main([*given, "--json"]) == 0
    assert [each["memory"] for each in json.loads(capsys.readouterr().out)["resizes"]] == [memory]
    assert bench.main(given) == 0
    assert f"memory: {memory}" in capsys.readouterr().out


def test_several_kinds_of_memory_are_measured_in_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Each at the lengths that are given with it, or at those that are given for all."""
    given = ["--fake", "--resizes", "--sizes", "4", "--repeat", "1", "--memory", "anonymous=2,8", "--memory", "memfd"]
    assert bench.main([*given, "--json"]) == 0
    found = [
        (one["memory"], {row["size"] // MIB for row in one["rows"]})
        for one in json.loads(capsys.readouterr().out)["resizes"]
    ]
    assert found == [("anonymous", {2, 8}), ("memfd", {4})]
    assert bench.main(given) == 0
    printed = capsys.readouterr().out
    assert printed.index("memory: anonymous") < printed.index("memory: memfd")


@pytest.mark.parametrize("memory", ["ram", "memfd=", "memfd=3", "=2"])
def test_a_kind_of_memory_that_there_is_not_is_wrong_usage(memory: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Or a length of it that cannot be."""
    with pytest.raises(SystemExit) as ended:
        bench.main(["--fake", "--memory", memory])
    assert ended.value.code == 2
    assert "--memory" in capsys.readouterr().err


def test_huge_pages_are_not_measured_on_the_fake(capsys: pytest.CaptureFixture[str]) -> None:
    """It would take them from this machine's pool."""
    with pytest.raises(SystemExit) as ended:
        bench.main(["--fake", "--memory", "hugetlb"])
    assert ended.value.code == 2
    assert "hugetlb" in capsys.readouterr().err


# The calls that bare_resize.c makes: to grow, and to shrink again.
FILE_GROWS = ["fallocate", "mprotect", "madvise", "VFIO_IOMMU_MAP_DMA"]
SHRINKS = ["VFIO_IOMMU_UNMAP_DMA", "mmap", "madvise", "madvise"]
BARE = {
    "anonymous": (FILE_GROWS[1:], SHRINKS),
    "memfd": (FILE_GROWS, [*SHRINKS, "ftruncate"]),
    "file": (FILE_GROWS, [*SHRINKS, "fallocate"]),
}


@pytest.mark.parametrize("policy", ["extend", "granule"])
@pytest.mark.parametrize("memory", list(BARE))
def test_a_resize_makes_the_calls_of_the_program_in_c_and_no_others(memory: str, policy: str) -> None:
    """So that what it takes beyond them is this package's own."""
    with FakeKernel() as kernel, open_device(kernel.bdfs[0], kernel=kernel) as device:
        resize_cost.measure(device.space, policy, memory=memory, size=4 * MIB, repeat=1)
        made = [call.request or call.call for call in kernel.trace]
    grows, shrinks = BARE[memory]
    once = "".join(f" {name}" for name in [*grows, *shrinks])
    assert 2 * once in "".join(f" {name}" for name in made)  # the first time is not counted


# The calls of type1 and of iommufd, which stand for each other.
IOMMUFD_CALLS = {"VFIO_IOMMU_MAP_DMA": "IOMMU_IOAS_MAP", "VFIO_IOMMU_UNMAP_DMA": "IOMMU_IOAS_UNMAP"}
CUTS = {
    "cut-pages": ["IOMMU_VFIO_IOAS", "VFIO_IOMMU_UNMAP_DMA"],
    "cut-replace": ["IOMMU_IOAS_ALLOC", "IOMMU_IOAS_COPY", "VFIO_DEVICE_ATTACH_IOMMUFD_PT", "IOMMU_DESTROY"],
}


@pytest.mark.parametrize("policy", ["extend", "granule", *CUTS])
@pytest.mark.parametrize(("memory", "version"), [*((memory, "7.3") for memory in BARE), ("memfd", "6.12")])
def test_a_resize_on_iommufd_makes_the_calls_of_the_program_in_c_and_no_others(
    memory: str, version: str, policy: str
) -> None:
    """A file is mapped by the descriptor where the kernel can, and its pages are touched before that."""
    cut = resize_cost.POLICIES[policy].cut
    with (
        FakeKernel(version, iommufd=True) as kernel,
        Ioas(kernel=kernel, cut=cut) as space,
        open_device(kernel.bdfs[0], space=space),
    ):
        resize_cost.measure(space, policy, memory=memory, size=4 * MIB, repeat=1)
        made = "".join(f" {call.request or call.call}" for call in kernel.trace)
    by_file = memory != "anonymous" and version == "7.3"
    calls = {**IOMMUFD_CALLS, **({"VFIO_IOMMU_MAP_DMA": "madvise IOMMU_IOAS_MAP_FILE"} if by_file else {})}
    grows, (unmap, *rest) = ([calls.get(name, name) for name in names] for names in BARE[memory])
    steps = [grows, [unmap, *rest]]
    if cut is not None:  # two steps as one mapping, of which one is cut off, and then the other
        steps += [grows, [*CUTS[policy], *rest], [unmap, *rest]]
    once = "".join(f" {name}" for step in steps for name in step)
    assert 2 * once in made


@pytest.mark.parametrize(
    ("memory", "setting", "former", "value"),
    [
        ("memfd", "transparent_hugepage/shmem_enabled", "always within_size [never] deny", "always"),
        ("file", "transparent_hugepage/shmem_enabled", "always within_size [never] deny", "always"),
        ("hugetlb", "hugepages/hugepages-2048kB/nr_hugepages", "1\n", "5"),
    ],
)
def test_the_machine_has_large_pages_while_it_is_measured(
    tmp_path: Path, memory: str, setting: str, former: str, value: str
) -> None:
    """And what it had before, afterwards."""
    path = tmp_path / setting
    path.parent.mkdir(parents=True)
    path.write_text(former)
    with resize_cost.large_pages(memory, size=10 * MIB, settings=tmp_path):
        assert path.read_text() == value
    assert path.read_text() == ("1" if memory == "hugetlb" else "never")


def test_a_machine_that_gives_no_large_pages_is_an_error(tmp_path: Path) -> None:
    """The figures would say nothing."""
    (tmp_path / "hugepages" / "hugepages-2048kB").mkdir(parents=True)
    (tmp_path / "hugepages" / "hugepages-2048kB" / "nr_hugepages").symlink_to("/dev/null")
    with (
        pytest.raises(OSError, match="no 10 MiB"),
        resize_cost.large_pages("hugetlb", size=10 * MIB, settings=tmp_path),
    ):
        pass


@pytest.mark.parametrize("source", [bare.RESIZES, bare.PATHS], ids=lambda path: path.stem)
def test_the_programs_in_c_are_compiled_without_a_warning(tmp_path: Path, source: Path) -> None:
    """On the compiler of this machine."""
    done = subprocess.run(
        ["gcc", "-Wall", "-Wextra", "-Werror", "-O2", "-o", tmp_path / "bare", source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_terminal_that_has_not_all_letters_shows_others() -> None:
    """A µ is none of ASCII; the command goes on."""
    command = [sys.executable, "-m", "tools.bench", "--fake", "--resizes", "--sizes", "2", "--repeat", "1"]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"remap" in done.stdout


def test_the_page_names_the_commands_that_ci_runs() -> None:
    """The pictures of the page are those of these commands."""
    page = (ROOT / "docs" / "costs.md").read_text(encoding="utf-8")
    pictures = [" ".join(stage.command) for stage in stages.machine_stages(sys.executable) if "--svg" in stage.command]
    assert len(pictures) == 2
    for command in pictures:
        assert sorted(command.split()) in [sorted(line.split()) for line in page.splitlines()]
        assert f"]({Path(command.split()[-1]).name})" in page


def _rows(page: str) -> list[list[str]]:
    """Return the cells of each row of a page's tables."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]


def test_the_page_has_the_limits_of_iommufd() -> None:
    """One column a line of kernels. The other table of resizes has two figures in a cell."""
    rows = _rows((ROOT / "docs" / "costs.md").read_text(encoding="utf-8"))
    first = next(at for at, (name, *_) in enumerate(rows) if name == "limit of pyvfio's part, µs")
    lines = [IOMMUFD[column.removeprefix("Linux ")] for column in rows[first][1:]]
    assert len(lines) == len(IOMMUFD)
    wanted = [
        ("a grow", [line.grow_added for line in lines]),
        ('a shrink, `"extend"` or granules', [line.shrink_added for line in lines]),
        *(
            (f'a shrink, `"cut"`, `Ioas(cut="{way.removeprefix("cut-")}")`', [line.cut_added[way] for line in lines])
            for way in lines[0].cut_added
        ),
    ]
    table = [(name, cells) for name, *cells in rows[first + 2 :][: len(wanted)]]
    assert table == [(name, [f"{limit:g}" for limit in limits]) for name, limits in wanted]


def test_the_page_has_the_limits() -> None:
    """Each number of the table is the one that is checked."""
    page = (ROOT / "docs" / "costs.md").read_text(encoding="utf-8")
    limits = LIMITS["6.1"]
    shown = {name: cells[0] for name, *cells in reversed(_rows(page))}  # the first table has the limits
    wanted = {
        "`map` and `unmap` of the address space, 4 KiB": limits.paths["container"],
        "`map_dma` and `close`": limits.paths["map_dma"],
        "`map_buffer` and `close`": limits.paths["map_buffer"],
        "`map_temporary`, 64 and one `reset_temporary`, each": limits.paths["temporary"],
        "`translate_vaddr`, among 16": limits.paths["translate_16"],
        "`translate_vaddrs`, an array of numpy's of 16,384, each": limits.paths["translate_numpy"],
        "an `array.array`, without numpy": limits.paths["translate_all"],
        "`Region.read32`, `write32`": limits.paths["read32"],
        "`Region.register32`: `read`, `write`": limits.paths["register_read"],
        "`config.read32`": limits.paths["config"],
        "`irq.wait` for a pending interrupt": limits.paths["interrupt"],
        'growing at 512 MiB: cheaper than `"remap"` by a factor of': targets.CHEAPER,
        "pyvfio's part of growing by 2 MiB": limits.grow_added,
        "pyvfio's part of shrinking by 2 MiB": limits.shrink_added,
        "a mapping: `map_dma`, `map_buffer`, `map_temporary`": targets.OBJECTS["a mapping by map_dma"],
        "a block": targets.OBJECTS["a block"],
        granule_cost.OBJECTS: targets.OBJECTS[granule_cost.OBJECTS],
    }
    assert {name: shown.get(name) for name in wanted} == {name: f"{limit:,g}" for name, limit in wanted.items()}
    assert f"n^{targets.EXPONENT}" in page
    assert f"{targets.IMPORT:g} times as long as a yardstick" in page
    assert import_cost.YARDSTICK.removesuffix("enum, json, logging").strip() in page
