"""Run the stages of `scripts/test`, a few at a time, the longest first, and print the time of each.

`python -m tests.stages [--quick] PYTHON...` runs the stages with interpreters that have the packages of the dev extra.
The first interpreter also runs the stages that are independent of the interpreter. The exit status is 0 if each stage
passes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from tests.mutants.mutant import ROOT
from tools.choice import witnesses_of

SILENCE = 1800.0
"""A stage that prints nothing for this many seconds hangs: each test prints at the end, and the longest test takes five
minutes on a slow machine. No other limit applies to the duration of a stage."""

PLACES = min(len(os.sched_getaffinity(0)) + 2, 4)
"""The number of stages that run side by side: two more than processors, since a virtual machine waits for the devices
two thirds of the time (200 of 585 s with the contract are processor time). At most 4: a usual host has memory for four
virtual machines of 2 GiB."""

RANDOM_CALLS = 2000
RANDOM_STEPS = 10000
"""Steps of random lives on the fake. With --quick, pytest's default applies."""

MATRIX = {
    ("6.1", "intel"): "contract",
    ("6.12", "virtio"): "edu",
    ("6.12", "intel48"): "contract",
    ("7", "amd"): "edu",
    ("7", "intel"): "contract",
}
"""Each kernel line at least once and each IOMMU at least once, with the devices of the machine. The contract of a
kernel runs once on each kernel line, and so do tests that are alike under each IOMMU."""

DIFFERENTIAL = (("6.1", "intel"), ("6.1", "amd"), ("6.12", "intel"), ("6.12", "virtio"), ("7", "intel"), ("7", "amd"))
"""Random calls on each kernel line, with intel and one other IOMMU: no answer of the fake may differ. If `MATRIX` has
the same kernel and IOMMU, one machine runs the tests and makes the calls."""

IOMMUFD = {
    ("6.12+iommufd", "intel"): "edu",
    ("7+iommufd", "intel"): "contract",
}
"""The machines whose tests open devices through iommufd. One has the devices for tests that are alike under each IOMMU,
and runs the contract."""

_IOMMUFD_CONTRACT = tuple(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/contract/test_iommufd_*.py")))

IOMMUFD_CALLS = (("6.12+iommufd", "intel"), ("6.12+iommufd", "virtio"), ("7+iommufd", "intel"), ("7+iommufd", "amd"))
"""Random calls on /dev/iommu and on nodes of devices: no answer of the fake may differ."""

FAKES = ("6.1", "6.12", "7.3")
IOMMUFD_FAKES = ("6.12", "7.3")

FAILURES = "tests/unit/test_failures.py"
LINTERS = ("tests/unit/test_linters.py", "tests/unit/test_language.py")
MANY_THREADS = "tests/unit/test_many_threads.py"
"""On the first interpreter, one test that takes as long as half of the unit tests: a stage apart."""
SITE = "tests/unit/test_site.py"
SAMPLES = ("--points=500", "--thread-steps=10000")
"""With --quick, and on all interpreters but the first: a tenth of pytest's defaults."""
SCENES = 20
"""With --quick, the number of operations whose calls are made to fail, of 80."""
TOOLS = tuple(
    f"tests/unit/test_{name}.py"
    for name in (
        *("fake", "fake_notices", "fake_edu", "plugin", "vm", "differential", "mutants", "interruptions"),
        *(
            "example_kvm",
            "virtio_rng",
            "nvme",
            "series",
            "random_mutants",
            "cli_demo",
            "cli_bench",
            "pages",
            "listener_models",
            "live_update",
        ),
        "remap",
    )
)
"""Tests of the testing tools and of the examples, and other long tests."""


class Stage(NamedTuple):
    """A command. `weight` orders stages: about the seconds that the command takes beside others, on two processors.

    `alone`: no other stage runs at the same time. For a command that measures processor time: others take the caches.
    """

    name: str
    weight: int
    command: tuple[str, ...]
    alone: bool = False

    @property
    def file(self) -> str:
        """Return the name of the file for the output."""
        return self.name.replace(" ", "-").replace("/", "-")


class Outcome(NamedTuple):
    """How a stage ended. `cpu` is the processor time of the stage and all its children, in seconds."""

    stage: Stage
    ok: bool
    wall: float
    cpu: float


# ------------------------------------------------------------------------------------------------------ which stages


def _pytest(python: str, *arguments: str, quick: bool = False) -> tuple[str, ...]:
    # scripts/test installs all packages that a test needs, so a skip is a failure. The report is for tests.series.
    report = () if quick else ("--report-documented",)
    return (python, "-m", "pytest", "-q", "--hw-required", "--durations=5", *report, *arguments)


def first_stage(python: str, changed: Sequence[str]) -> Stage | None:
    """Return the stage of --quick that runs before all others, and alone: the tests for the changed files.

    None if no test has the name of a changed file.
    """
    chosen = witnesses_of(changed)
    options = ("--maxfail=10", *SAMPLES)
    return Stage("what has changed", 0, _pytest(python, *options, *chosen, quick=True)) if chosen else None


def changed_files(root: Path = ROOT) -> list[str]:
    """Return the files that differ from the last commit, new ones included. An empty list outside of a repository."""
    found = []
    for words in (["diff", "--name-only", "--relative", "HEAD"], ["ls-files", "--others", "--exclude-standard"]):
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
        found += done.stdout.splitlines()
    return found


def quick_stages(pythons: Sequence[str]) -> Iterator[Stage]:
    """Yield the stages of --quick.

    No test that is marked `long`, and no tests of the testing tools; mypy without pyright; one fake; a tenth of the
    interruptions, collections and steps of threads, and each failing call of some operations.
    """
    first, short = pythons[0], ("-m", "not long")
    yield Stage("linters and types", 1000, _pytest(first, *LINTERS, "-k", "not pyright", quick=True))
    for python in pythons:
        for number, files in enumerate(halves(_unit_files()), 1):
            name = f"unit tests, half {number} of 2, {_version(python)}"
            yield Stage(name, 100, _pytest(python, *short, *SAMPLES, *files, quick=True))
    failures = (FAILURES, "-k", "not step_of_the_undo", f"--scenes={SCENES}")
    yield Stage("each failure of each call", 30, _pytest(first, *failures, quick=True))
    contract = ("tests/property", "tests/contract")
    yield Stage("random sequences, and the contract on the fake", 40, _pytest(first, *short, *contract, quick=True))
    for space in ("type1", "iommufd"):
        command = _pytest(first, *short, "tests/hw", "--fake=6.12", f"--space={space}", quick=True)
        yield Stage(f"devices, on the fake kernel 6.12 with {space}", 25, command)


def _unit_files() -> list[str]:
    """Return the files with tests of the package itself."""
    apart = {*TOOLS, FAILURES, *LINTERS, SITE}
    return [
        name for path in sorted(ROOT.glob("tests/unit/test_*.py")) if (name := str(path.relative_to(ROOT))) not in apart
    ]


def halves(files: Sequence[str], root: Path = ROOT) -> tuple[list[str], list[str]]:
    """Divide files into two lists of about the same number of bytes."""
    parts: tuple[list[str], list[str]] = ([], [])
    sizes = [0, 0]
    for file in sorted(files, key=lambda name: -(root / name).stat().st_size):
        less = sizes.index(min(sizes))
        parts[less].append(file)
        sizes[less] += (root / file).stat().st_size
    return parts


def host_stages(pythons: Sequence[str]) -> Iterator[Stage]:
    """Yield the stages without a virtual machine."""
    first = pythons[0]
    yield Stage("linters and types", 1000, _pytest(first, *LINTERS))
    yield Stage("the site", 40, _pytest(first, SITE))
    for python in pythons:
        samples = () if python == first else SAMPLES
        if python == first:
            yield Stage("eight threads", 60, _pytest(first, MANY_THREADS))
            yield _unit(python, f"--ignore={MANY_THREADS}", weight=430)
        else:
            yield _unit(python, *samples)
        yield Stage(f"each failure of each call, {_version(python)}", 235, _pytest(python, FAILURES))
        tools = 390 if python == first else 225
        yield Stage(f"testing tools and examples, {_version(python)}", tools, _pytest(python, *samples, *TOOLS))
    lives = ("tests/property/test_random_life.py", f"--random-steps={RANDOM_STEPS}")
    yield Stage(f"random lives of {RANDOM_STEPS} steps", 60, _pytest(first, *lives))
    yield from _fakes(first)
    yield Stage("seeded bugs", 1100, (first, "-m", "tests.mutants", "--library", "--jobs=1"))


def _version(python: str) -> str:
    done = subprocess.run([python, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _unit(python: str, *options: str, weight: int = 360) -> Stage:
    left_out = [f"--ignore={name}" for name in (*TOOLS, FAILURES, *LINTERS, SITE)]
    return Stage(f"unit tests, {_version(python)}", weight, _pytest(python, *left_out, *options, "tests/unit"))


def _fakes(python: str) -> Iterator[Stage]:
    contract = ("tests/property", "tests/contract")
    yield Stage("random sequences, and the contract on the fake", 40, _pytest(python, *contract))
    for version in FAKES:
        yield Stage(f"devices, on the fake kernel {version}", 25, _pytest(python, "tests/hw", f"--fake={version}"))
    for version in IOMMUFD_FAKES:
        # The pages promise tests on type1, so tests.series must not count these.
        command = _pytest(python, "tests/hw", f"--fake={version}", "--space=iommufd", quick=True)
        yield Stage(f"devices, on the fake kernel {version} with iommufd", 25, command)


def _random_calls(python: str) -> list[str]:
    return [python, "-m", "tools.differential", "--ops", str(RANDOM_CALLS)]


def machine_stages(python: str) -> Iterator[Stage]:
    """Yield the stages that boot virtual machines."""
    for (kernel, iommu), devices in MATRIX.items():
        machine = ("--kernel", kernel, "--iommu", iommu, "--devices", devices)
        chosen = _chosen(kernel, devices)
        options = ("-p", "no:cacheprovider", "--device", "1234:11e8", "--bind", "--throwaway")
        tests = _pytest(python, *options, "tests/hw", *chosen)
        name, program = f"kernel {kernel}, {iommu} IOMMU", [python, "-m", "pyvfio.cli.vm"]
        if (kernel, iommu) in DIFFERENTIAL:
            name, program = f"{name}, and {RANDOM_CALLS} random calls", _random_calls(python)
        yield Stage(name, 700 if devices == "contract" else 390, (*program, *machine, "--", *tests))
    yield from _iommufd_machines(python)
    for kernel, iommu in DIFFERENTIAL:
        if (kernel, iommu) not in MATRIX:
            command = (*_random_calls(python), "--kernel", kernel, "--iommu", iommu)
            yield Stage(f"{RANDOM_CALLS} random calls, kernel {kernel}, {iommu} IOMMU", 35, command)
    yield Stage("the virtual machine itself", 600, _pytest(python, "tests/vm"))
    yield from _costs()
    yield Stage("the demo", 20, ("scripts/demo",))


def _chosen(kernel: str, devices: str) -> tuple[str, ...]:
    """Return the options that choose tests for a machine: packaged kernels have no iommufd."""
    left_out = ([] if kernel.endswith("+iommufd") else ["iommufd"]) + (["one_iommu"] if devices != "contract" else [])
    marks = ("-m", " and ".join(f"not {mark}" for mark in left_out)) if left_out else ()
    return (*(("tests/contract",) if devices == "contract" else ()), *marks)


def _iommufd_machines(python: str) -> Iterator[Stage]:
    for (kernel, iommu), devices in IOMMUFD.items():
        machine = ("--kernel", kernel, "--iommu", iommu, "--devices", devices)
        chosen = _IOMMUFD_CONTRACT if devices == "contract" else ("-m", "not one_iommu")
        options = ("-p", "no:cacheprovider", "--device", "1234:11e8", "--bind", "--throwaway", "--space=iommufd")
        tests = _pytest(python, *options, "tests/hw", *chosen, quick=True)
        name = f"kernel {kernel}, {iommu} IOMMU"
        weight = 610 if devices == "contract" else 360
        yield Stage(name, weight, (python, "-m", "pyvfio.cli.vm", *machine, "--", *tests))
    for kernel, iommu in IOMMUFD_CALLS:
        command = (*_random_calls(python), "--space", "iommufd", "--kernel", kernel, "--iommu", iommu)
        yield Stage(f"{RANDOM_CALLS} random calls on iommufd, kernel {kernel}, {iommu} IOMMU", 35, command)


def _costs() -> Iterator[Stage]:
    """Yield the stages that hold the figures of docs/costs.md to the limits, and draw the pictures in build/."""
    bench = ("scripts/bench", "--check")
    memories = [f"--memory={memory}" for memory in ("anonymous=2,32,512", "memfd=2", "hugetlb=2", "file=2")]
    yield Stage(
        "what resizes and hot paths cost, kernel 7",
        45,
        (*bench, "--kernel", "7", *memories, "--svg", "build/costs-resizes.svg"),
    )
    yield Stage("what hot paths cost, kernel 6.1", 40, (*bench, "--kernel", "6.1", "--memory=anonymous=2"))
    space = ("--space", "iommufd", "--kernel", "7+iommufd", "--memory=anonymous=2,512", "--memory=memfd=2")
    yield Stage("what resizes and hot paths cost on iommufd, kernel 7", 40, (*bench, *space))
    scale = ("--fake", "--kernel", "6.1", "--scale", "--svg", "build/costs-scale.svg")
    yield Stage("what each operation costs among 10,000", 40, (*bench, *scale), alone=True)


# ---------------------------------------------------------------------------------------------------------- running


class Runner:
    """Runs stages side by side. `close` kills the running stages.

    Synchronization: `run` may be called from several threads. `close` does not wait for the threads.
    """

    def __init__(self, directory: Path, *, silence: float = SILENCE) -> None:
        self._directory = directory
        self._silence = silence
        self._running: set[int] = set()
        self._closed = False

    def run(self, stage: Stage) -> Outcome:
        """Run the stage, and print the whole output at the end of the stage."""
        output = self._directory / stage.file
        start = time.monotonic()
        print(f"-- {stage.name}: started", flush=True)
        with output.open("wb") as file:
            process = subprocess.Popen(
                stage.command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file, process_group=0
            )
            self._running.add(process.pid)
            if self._closed:
                _end(process.pid)
            silent = _wait(process.pid, output, self._silence)
            _, status, usage = os.wait4(process.pid, 0)
            self._running.discard(process.pid)
        process.returncode = os.waitstatus_to_exitcode(status)
        said = output.read_text("utf-8", errors="replace")
        end = f"\nNothing was printed for {self._silence:g} seconds: the stage was killed.\n" if silent else ""
        print(f"\n== {stage.name}\n{said}{end}", flush=True)
        seconds = time.monotonic() - start
        return Outcome(stage, process.returncode == 0, seconds, usage.ru_utime + usage.ru_stime)

    def close(self) -> None:
        """Kill all stages."""
        self._closed = True
        for pid in tuple(self._running):
            _end(pid)


def _wait(pid: int, output: Path, silence: float) -> bool:
    """Wait until the process ends. Return True if the process was killed: no output for `silence` seconds."""
    exited = os.pidfd_open(pid)
    size, heard = 0, time.monotonic()
    try:
        while not select.select([exited], [], [], min(5.0, silence))[0]:
            now = output.stat().st_size
            if now != size:
                size, heard = now, time.monotonic()
            elif time.monotonic() - heard > silence:
                os.killpg(pid, signal.SIGKILL)
                return True
    finally:
        os.close(exited)
    return False


def _end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGTERM)


def table(outcomes: Sequence[Outcome], seconds: float) -> Iterator[str]:
    """Yield a line for each stage, in the order in which the stages ended, and the sums."""
    yield f"{'':6}  {'wall s':>7}  {'cpu s':>7}"
    for stage, ok, wall, cpu in outcomes:
        yield f"{'passed' if ok else 'FAILED'}  {wall:7.1f}  {cpu:7.1f}  {stage.name}"
    yield f"{'':6}  {seconds:7.1f}  {sum(outcome.cpu for outcome in outcomes):7.1f}  all of them"


def run(stages: Sequence[Stage], last: Stage | None, runner: Runner) -> list[Outcome]:
    """Run `stages` side by side, the longest first, then those that run alone, and then `last`."""
    together = sorted((stage for stage in stages if not stage.alone), key=lambda stage: -stage.weight)
    alone = [stage for stage in (*stages, last) if stage is not None and (stage.alone or stage is last)]
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(PLACES) as pool:
        try:
            running = [pool.submit(runner.run, stage) for stage in together]
            outcomes += [future.result() for future in as_completed(running)]
            outcomes += map(runner.run, alone)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            runner.close()
            raise
    return outcomes


def compile_tests(python: str) -> None:
    """Write compiled files of Python and pytest: a virtual machine keeps none, and is twenty times slower."""
    folders = ("tests/hw", "tests/contract", "tests/vm")
    command = [python, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *folders]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)  # errors are for the stages to report
    subprocess.run([python, "-m", "compileall", "-q", "pyvfio", "tools", "examples", "tests"], cwd=ROOT, check=False)


def main() -> int:
    """Return 0 if each stage passed."""
    parser = argparse.ArgumentParser(prog="stages", description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="no virtual machine")
    parser.add_argument("pythons", nargs="+", metavar="PYTHON")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    pythons, start = options.pythons, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pyvfio-stages-") as directory:
        runner, last = Runner(Path(directory)), None
        if options.quick:
            first = first_stage(pythons[0], changed_files())
            if first is not None and not runner.run(first).ok:
                print("These are the tests for the changed files. The other tests were not run.")
                return 1
            stages = list(quick_stages(pythons))
        else:
            compile_tests(pythons[0])
            stages = [*host_stages(pythons), *machine_stages(pythons[0])]
            names = [str(Path(directory, stage.file)) for stage in stages]
            last = Stage("each row of docs/series.md and reports.md", 0, (pythons[0], "-m", "tests.series", *names))
        outcomes = run(stages, last, runner)
    print(*table(outcomes, time.monotonic() - start), sep="\n")
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
