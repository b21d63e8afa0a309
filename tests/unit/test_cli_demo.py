"""`scripts/demo` without a machine: every step on the fake, and what a device at work loses, made to happen there."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import pytest

from pyvfio import ioctls
from pyvfio.cli.common import Json, run
from pyvfio.cli.demo import NAME, main
from pyvfio.cli.main_job import Space
from pyvfio.cli.side_by_side import LENGTH, STEP, Figures, Policy, SideBySide, WatchedContainer
from pyvfio.device import open_device
from pyvfio.errors import UnmapSizeError
from pyvfio.extents import Extent
from pyvfio.iommufd_ioctls import IOMMU_IOAS_UNMAP
from pyvfio.kernel import IoctlArgument
from pyvfio.testing.fake import FakeEdu, FakeKernel
from pyvfio.testing.plugin import _FAKE_VERSIONS
from pyvfio.testing.world import FakeWorld, WorldName
from pyvfio.units import PAGE_SIZE
from tests.unit.fakes import BDF, PRIVATE, READ_WRITE

ROOT = Path(__file__).resolve().parents[2]
COMMAND, START = 0x98, 1  # of edu's DMA engine


def demo(*arguments: str, path: str = "/usr/bin:/bin") -> subprocess.CompletedProcess[str]:
    """`python -m pyvfio.cli.demo`."""
    command = [sys.executable, "-m", "pyvfio.cli.demo", *arguments]
    return subprocess.run(command, cwd=ROOT, env={"PATH": path}, capture_output=True, text=True, check=False)


def said(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As `demo`, in this process, for what a process of its own makes no difference to."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        run(partial(main, arguments), name=NAME)
    assert isinstance(ended.value.code, int)
    return subprocess.CompletedProcess(arguments, ended.value.code, out.getvalue(), err.getvalue())


@pytest.mark.parametrize("kernel", _FAKE_VERSIONS)
def test_the_demo_holds_on_the_fake(kernel: str) -> None:
    """Every step, those of the DMA engine too; and it says where it was."""
    done = demo("--fake", "--kernel", kernel)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"world    the fake kernel, as Linux {kernel}, intel IOMMU\n")
    assert "stopped at IOVA" in done.stdout
    assert "Every step held." in done.stdout
    assert done.stdout.count("ok  ") == 13


@pytest.mark.parametrize("kernel", ["6.12", "7.3", "7+iommufd"])
def test_the_main_job_holds_on_iommufd_and_says_which_space_and_why(kernel: str) -> None:
    """The same steps; a name of a virtual machine's kernel goes for the fake, too."""
    done = said("--fake", "--space", "iommufd", "--kernel", kernel)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "I/O address space 1 of iommufd, no limit of mappings; the program asked for iommufd" in done.stdout
    assert done.stdout.count("ok  ") == 13


def test_type1_is_the_default_and_an_explicit_choice_is_named() -> None:
    """With the reason."""
    report_of = {
        words: (answer["space"], answer["why"]) for words in [(), ("--space", "type1")] for answer in [report(*words)]
    }
    assert report_of == {
        (): ("type1", "type1 is the default where the machine has type1"),
        ("--space", "type1"): ("type1", "the program asked for type1"),
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--space", "iommufd", "--kernel", "6.1"], "Linux 6.1 has no iommufd"),
        (["--resize", "cut"], "--resize cut needs --space iommufd"),
        (["--space", "type1", "--resize", "cut"], "--resize cut needs --space iommufd"),
        (["--space", "vfio"], "invalid choice"),
    ],
)
def test_a_space_that_cannot_be_is_wrong_usage(words: list[str], message: str) -> None:
    """With the reason, and without a step."""
    done = said("--fake", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


@pytest.mark.parametrize(("iommu", "seen"), [("intel48", "dma_bits=64: DMA at 0xfffffffff000"), ("intel", "")])
def test_the_demo_lifts_the_limit_of_39_bits_where_the_iommu_has_more(iommu: str, seen: str) -> None:
    """And says so."""
    done = said("--fake", "--iommu", iommu)
    assert done.returncode == 0, done.stdout + done.stderr
    assert seen in done.stdout
    assert ("dma_bits" in done.stdout) == bool(seen)


def test_the_demo_on_the_fake_tells_programs_which_world_it_is() -> None:
    """JSON on stdout and nothing else."""
    done = demo("--fake", "--json")
    assert '"world": "fake"' in done.stdout
    assert (done.stdout[0], done.stderr) == ("{", "")


def test_without_qemu_the_demo_runs_on_the_fake_and_says_so(tmp_path: Path) -> None:
    """Unless the virtual machine was asked for by name."""
    done = demo(path=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("world    the fake kernel")
    assert "qemu-system-x86_64 is missing" in done.stderr
    asked = demo("--vm", path=str(tmp_path))
    assert asked.returncode == 1
    assert "qemu-system-x86" in asked.stderr


def test_a_demo_without_qemu_prints_nothing_but_its_document_where_stderr_is_closed(tmp_path: Path) -> None:
    words = ["/bin/sh", "-c", 'exec "$@" 2>&-', "-", sys.executable, "-m", "pyvfio.cli.demo", "--json"]
    done = subprocess.run(words, cwd=ROOT, env={"PATH": str(tmp_path)}, stdout=subprocess.PIPE, check=False)
    assert done.returncode == 0
    assert json.loads(done.stdout)["world"] == "fake"


@pytest.mark.parametrize("words", [("--fake", "--kernel", "7"), ("--fake", "7"), ("--fake=7.3",)])
def test_the_fake_goes_by_the_names_that_the_virtual_machine_has_for_kernels(words: tuple[str, ...]) -> None:
    """The same `--kernel 7` with QEMU and without, or as `pyvfio plan` has it."""
    done = said(*words, "--iommu", "amd")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("world    the fake kernel, as Linux 7.3, amd IOMMU\n")


def test_a_version_that_the_fake_cannot_be_is_wrong_usage() -> None:
    """With those that it can be. Two names are one too many."""
    for words in (("--kernel", "5.10"), ("5.10",)):
        done = said("--fake", *words)
        assert done.returncode == 2
        assert "6.1, 6.12, 7.3" in done.stderr
    done = said("--fake", "7", "--kernel", "6.1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--fake and --kernel name a kernel each" in done.stderr


# ------------------------------------------------------------------------------------------------------ side by side


def report(*arguments: str) -> dict[str, Json]:
    """What it tells programs."""
    done = said("--fake", "--json", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    answer: dict[str, Json] = json.loads(done.stdout)
    return answer


def test_extend_is_shown_beside_remap_in_pairs_of_steps() -> None:
    """And as a table at the end; with what a fake says nothing of left out, and said to be."""
    done = said("--fake", "--resize", "extend")
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [line[22:] for line in done.stdout.splitlines() if line.startswith("ok  ")]
    assert steps[3:7] == [
        "remap: grow by 2 MiB",
        "extend, granule=2 MiB: grow by 2 MiB",
        "remap: shrink by 2 MiB",
        "extend, granule=2 MiB: shrink by 2 MiB",
    ]
    table = done.stdout.split("\n\n")[-2].splitlines()
    assert table[0].split() == ["remap", "extend,", "granule=2", "MiB"]
    assert [line.split("  ")[0] for line in table[1:]] == [
        "grow by 2 MiB",
        "shrink by 2 MiB",
        "mappings",
        "out of the device's reach",
    ]
    assert "not those of a real kernel" in done.stdout
    assert "completes a copy at once: lost copies are not measured" in done.stdout


def test_programs_are_told_what_each_policy_cost() -> None:
    """Mappings and bytes are those of the container, and nothing is said of copies that were not made."""
    answer = report("--resize", "extend")
    assert isinstance(answer["policies"], list)
    figures = [{key: one[key] for key in one if key not in ("grow_us", "shrink_us")} for one in answer["policies"]]
    nothing = {"copies": None, "copies_lost": None, "resizes_meanwhile": None}
    assert figures == [
        {"policy": "remap", "mappings": 1, "out_of_reach_bytes": LENGTH, **nothing},
        {"policy": "extend, granule=2 MiB", "mappings": LENGTH // STEP, "out_of_reach_bytes": 0, **nothing},
    ]


def test_remap_can_be_shown_alone_and_without_the_option_there_is_nothing_of_it() -> None:
    """Three kinds of output, one command."""
    policies = report("--resize", "remap")["policies"]
    assert isinstance(policies, list)
    assert [one["policy"] for one in policies] == ["remap"]
    assert "policies" not in report()
    assert said("--fake", "--resize", "shrink").returncode == 2


class LateEdu(FakeEdu):
    """Moves the bytes of a transfer when it is told to, as QEMU's moves them some time after it was started."""

    pending = 0

    def read_register(self, bar: int, offset: int, width: int, /) -> int:
        """Busy until then."""
        return self.pending if offset == COMMAND and self.pending else super().read_register(bar, offset, width)

    def write_register(self, bar: int, offset: int, width: int, value: int, /) -> None:
        """The command waits."""
        if offset == COMMAND and value & START:
            self.pending = value
        else:
            super().write_register(bar, offset, width, value)

    def move(self) -> None:
        """Now."""
        command, self.pending = self.pending, 0
        if command:
            super().write_register(0, COMMAND, 8, command)


class WorstMoment(FakeKernel):
    """Has its device move the bytes just when something has been unmapped; `spoil`: all that it moves is lost."""

    def __init__(self, *, spoil: bool = False) -> None:
        self.edu = LateEdu(BDF)
        self.spoil = spoil
        super().__init__("7.3", groups=[(2, [self.edu])], iommufd=True)

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
        """As it is, and then the device."""
        answer = super().ioctl(fd, request, argument)
        if request in (ioctls.VFIO_IOMMU_UNMAP_DMA, IOMMU_IOAS_UNMAP):
            if self.spoil:
                self.edu.buffer[:] = bytes(len(self.edu.buffer))
            self.edu.move()
        return answer


class MachineWorld(FakeWorld):
    """A fake that is taken for a machine whose device takes its time."""

    name = WorldName.VM


@pytest.fixture
def kernel() -> Iterator[WorstMoment]:
    """Nothing is left in it."""
    with WorstMoment() as made:
        yield made
        made.check()
        assert made.memlock().used == 0


def carry_out(kernel: WorstMoment, space: Space = "type1") -> tuple[SideBySide, list[str]]:
    """All steps; those that did not hold, by name. On iommufd, cuts too."""
    ways: tuple[Policy, ...] = ("remap", "extend", "cut") if space == "iommufd" else ("remap", "extend")
    job = SideBySide(BDF, world=MachineWorld(kernel), ways=ways, iommu="intel", space=space)
    return job, [step.name for step in job.steps() if not step.ok]


def test_a_device_at_work_loses_all_under_a_remap_and_nothing_under_granules(kernel: WorstMoment) -> None:
    """When it is at work in the worst moment each time; and no step fails for what a remap is known to do."""
    job, failed = carry_out(kernel)
    remap, extend = job.figures
    assert failed == []
    assert remap.copies is not None
    assert remap.copies.lost == remap.copies.made == 20
    assert extend.copies is not None
    assert (extend.copies.made, extend.copies.lost) == (20, 0)
    assert extend.copies.calls > remap.copies.calls, "a grow unmaps nothing there"


def test_a_copy_that_is_lost_under_granules_is_a_step_that_did_not_hold(kernel: WorstMoment) -> None:
    """The exit status hangs on it."""
    kernel.spoil = True
    job, failed = carry_out(kernel)
    assert failed == ["extend, granule=2 MiB: resize while the device copies"]
    assert job.figures[1].copies is not None
    assert job.figures[1].copies.lost == job.figures[1].copies.made


def test_a_device_at_work_loses_nothing_under_cuts(kernel: WorstMoment) -> None:
    """Nor is a byte that stays unmapped, though the shrink ends inside a mapping."""
    job, failed = carry_out(kernel, "iommufd")
    remap, _extend, cut = job.figures
    assert failed == []
    assert remap.copies is not None
    assert remap.copies.lost == remap.copies.made == 20
    assert cut.copies is not None
    assert (cut.copies.made, cut.copies.lost, cut.out_of_reach) == (20, 0, 0)
    assert any(call.request == "VFIO_IOMMU_UNMAP_DMA" for call in kernel.trace), "cuts are calls of type1"


def test_a_copy_that_is_lost_under_cuts_is_a_step_that_did_not_hold(kernel: WorstMoment) -> None:
    """As under granules."""
    kernel.spoil = True
    _job, failed = carry_out(kernel, "iommufd")
    assert failed == ["extend, granule=2 MiB: resize while the device copies"]
    job = SideBySide(BDF, world=MachineWorld(kernel), ways=("cut",), iommu="intel", space="iommufd")
    assert [step.name for step in job.steps() if not step.ok] == ["cut: resize while the device copies"]


def test_a_byte_that_stays_and_is_unmapped_under_granules_is_a_step_that_did_not_hold(kernel: WorstMoment) -> None:
    """Counted by what the kernel says it unmapped, whoever asked it to."""
    job = SideBySide(BDF, world=MachineWorld(kernel), ways=("extend",), iommu="intel")
    steps = job.steps()
    assert [next(steps).name for _ in range(2)][-1].endswith("map 256 MiB")
    (side,) = job._sides

    class Intruder:
        def ram_block_resized(self, *_given: object) -> None:
            side._space.unmap(iova=side.iova, size=STEP)
            side._space.map(vaddr=side.block.vaddr, iova=side.iova, size=STEP)

    side._blocks.add_notifier(Intruder())
    step = next(steps)
    assert (step.ok, job.figures[0].out_of_reach) == (False, STEP)
    assert "2 MiB of the 256 MiB that stay were unmapped during a resize" in step.seen
    assert list(steps) == []


def test_what_is_noted_as_unmapped_is_what_the_kernel_says(kernel: WorstMoment) -> None:
    """One of two mappings; and nothing where it refuses."""
    with WatchedContainer(kernel=kernel) as container, open_device(BDF, container=container, kernel=kernel):
        memory = kernel.mmap(0, 2 * PAGE_SIZE, READ_WRITE, PRIVATE)
        container.map(vaddr=memory, iova=PAGE_SIZE, size=2 * PAGE_SIZE)
        with pytest.raises(UnmapSizeError):
            container.unmap(iova=PAGE_SIZE, size=PAGE_SIZE)
        assert container.unmapped == []
        container.unmap(iova=PAGE_SIZE, size=2 * PAGE_SIZE)
        assert container.unmapped == [Extent(PAGE_SIZE, 3 * PAGE_SIZE)]
        kernel.munmap(memory, 2 * PAGE_SIZE)


def test_a_device_without_an_engine_is_resized_for_and_nothing_is_said_of_its_dma() -> None:
    """And that is said."""

    class Plain(FakeEdu):
        device = 0x1111

    with FakeKernel(groups=[(2, [Plain(BDF)])]) as kernel:
        job = SideBySide(BDF, world=MachineWorld(kernel), ways=("extend",))
        assert all(step.ok for step in job.steps())
        assert job.figures == [
            Figures("extend, granule=2 MiB", job.figures[0].grow, job.figures[0].shrink, 128, 0, None)
        ]
        assert "cannot drive this device's DMA" in job.notes[0]
