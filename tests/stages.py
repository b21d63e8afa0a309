"""The stages of `scripts/test`, a few at a time, the longest first; and where the time went.

`python -m tests.stages [--quick] PYTHON...` runs them with interpreters that have what pyvfio needs; the first also
runs what does not depend on the interpreter. The exit status is 0 when each stage passed.
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

SILENCE = 1800.0
"""A stage that has printed nothing for so many seconds hangs: tests print when they end, and the longest of them takes
five minutes on a slow machine. There is no other limit to how long a stage takes."""

PLACES = min(len(os.sched_getaffinity(0)) + 2, 4)
"""How many stages run side by side: two more than there are processors, since a machine waits two thirds of the time
for its devices (200 of 585 s with the contract are processor time). Four machines of 2 GiB are no more than a usual
machine can hold."""

RANDOM_CALLS = 2000
RANDOM_STEPS = 10000
"""Steps of random lives on the fake; with --quick as many as pytest takes by itself."""

MATRIX = {
    ("6.1", "intel"): "contract",
    ("6.12", "virtio"): "edu",
    ("6.12", "intel48"): "contract",
    ("7", "amd"): "edu",
    ("7", "intel"): "contract",
}
"""Each kernel line at least once, each IOMMU at least once, with the devices of the machine. The contract of a kernel,
and tests that are alike under each IOMMU, run once on each kernel line."""

DIFFERENTIAL = (("6.1", "intel"), ("6.1", "amd"), ("6.12", "intel"), ("6.12", "virtio"), ("7", "intel"), ("7", "amd"))
"""Random calls on each kernel line, with intel and one other IOMMU: no answer of the fake may differ. Where `MATRIX`
has that kernel and IOMMU, too, its machine also makes the calls."""

FAKES = ("6.1", "6.12", "7.3")

FAILURES = "tests/unit/test_failures.py"
LINTERS = "tests/unit/test_linters.py"
SAMPLES = ("--points=500", "--thread-steps=10000")
"""With --quick, and on all interpreters but the first: a tenth of what pytest takes by itself."""
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
"""Tests of the testing tools and of the examples, and others that are long."""


class Stage(NamedTuple):
    """A command. `weight` orders stages: about the seconds that it takes on two processors of 2024."""

    name: str
    weight: int
    command: tuple[str, ...]

    @property
    def file(self) -> str:
        """The name of the file that its output is kept in."""
        return self.name.replace(" ", "-").replace("/", "-")


class Outcome(NamedTuple):
    """How a stage ended. `cpu` is the processor time, of its children too, in seconds."""

    stage: Stage
    ok: bool
    wall: float
    cpu: float


# ------------------------------------------------------------------------------------------------------ which stages


def _pytest(python: str, *arguments: str, quick: bool = False) -> tuple[str, ...]:
    # What a test lacks is for scripts/test to provide, so a skip is a failure. The report is for tests.series.
    report = () if quick else ("--report-documented",)
    return (python, "-m", "pytest", "-q", "--hw-required", "--durations=5", *report, *arguments)


def quick_stages(pythons: Sequence[str]) -> Iterator[Stage]:
    """One fake; a call that fails, without each failure in its undo; testing tools on the first interpreter only; mypy,
    and not pyright; a tenth of the interruptions, collections and steps of threads."""
    first = pythons[0]
    yield Stage("linters and types", 1000, _pytest(first, LINTERS, "-k", "not pyright", quick=True))
    yield from (_unit(python, *SAMPLES, quick=True) for python in pythons)
    yield Stage("each failure of each call", 30, _pytest(first, FAILURES, "-k", "not step_of_the_undo", quick=True))
    yield Stage("testing tools and examples", 60, _pytest(first, *SAMPLES, *TOOLS, quick=True))
    yield from _fakes(first, ("6.12",), quick=True)


def host_stages(pythons: Sequence[str]) -> Iterator[Stage]:
    """All that needs no machine."""
    first = pythons[0]
    yield Stage("linters and types", 1000, _pytest(first, LINTERS))
    for python in pythons:
        samples = () if python == first else SAMPLES
        yield _unit(python, *samples)
        yield Stage(f"each failure of each call, {_version(python)}", 75, _pytest(python, FAILURES))
        yield Stage(f"testing tools and examples, {_version(python)}", 60, _pytest(python, *samples, *TOOLS))
    lives = ("tests/property/test_random_life.py", f"--random-steps={RANDOM_STEPS}")
    yield Stage(f"random lives of {RANDOM_STEPS} steps", 60, _pytest(first, *lives))
    yield from _fakes(first, FAKES, quick=False)
    yield Stage("seeded bugs", 450, (first, "-m", "tests.mutants", "--library", "--jobs=1"))


def _version(python: str) -> str:
    done = subprocess.run([python, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _unit(python: str, *samples: str, quick: bool = False) -> Stage:
    left_out = [f"--ignore={name}" for name in (*TOOLS, FAILURES, LINTERS)]
    return Stage(f"unit tests, {_version(python)}", 50, _pytest(python, *left_out, *samples, "tests/unit", quick=quick))


def _fakes(python: str, versions: Sequence[str], *, quick: bool) -> Iterator[Stage]:
    contract = ("tests/property", "tests/contract")
    yield Stage("random sequences, and the contract on the fake", 40, _pytest(python, *contract, quick=quick))
    for version in versions:
        command = _pytest(python, "tests/hw", f"--fake={version}", quick=quick)
        yield Stage(f"devices, on the fake kernel {version}", 25, command)


def _random_calls(python: str) -> list[str]:
    return [python, "-m", "tools.differential", "--ops", str(RANDOM_CALLS)]


def machine_stages(python: str) -> Iterator[Stage]:
    """Those that boot virtual machines."""
    for (kernel, iommu), devices in MATRIX.items():
        machine = ("--kernel", kernel, "--iommu", iommu, "--devices", devices)
        chosen = ("tests/contract",) if devices == "contract" else ("-m", "not one_iommu")
        options = ("-p", "no:cacheprovider", "--device", "1234:11e8", "--bind", "--throwaway")
        tests = _pytest(python, *options, "tests/hw", *chosen)
        name, program = f"kernel {kernel}, {iommu} IOMMU", [python, "-m", "pyvfio.cli.vm"]
        if (kernel, iommu) in DIFFERENTIAL:
            name, program = f"{name}, and {RANDOM_CALLS} random calls", _random_calls(python)
        yield Stage(name, 400 if devices == "contract" else 250, (*program, *machine, "--", *tests))
    for kernel, iommu in DIFFERENTIAL:
        if (kernel, iommu) not in MATRIX:
            command = (*_random_calls(python), "--kernel", kernel, "--iommu", iommu)
            yield Stage(f"{RANDOM_CALLS} random calls, kernel {kernel}, {iommu} IOMMU", 35, command)
    yield Stage("the virtual machine itself", 210, _pytest(python, "tests/vm"))
    memories = [f"--memory={memory}" for memory in ("anonymous=2,512", "memfd=2", "hugetlb=2", "file=2")]
    yield Stage("what a resize costs", 150, ("scripts/bench", "--kernel", "7", "--check", *memories))
    yield Stage("the demo", 20, ("scripts/demo",))


# ---------------------------------------------------------------------------------------------------------- running


class Runner:
    """Runs stages side by side; `close` ends those that run.

    Synchronization: `run` may be called from several threads; `close` waits for none of them.
    """

    def __init__(self, directory: Path, *, silence: float = SILENCE) -> None:
        self._directory = directory
        self._silence = silence
        self._running: set[int] = set()
        self._closed = False

    def run(self, stage: Stage) -> Outcome:
        """Run the stage, and print its output in one piece when the stage is over."""
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
        """End all stages."""
        self._closed = True
        for pid in tuple(self._running):
            _end(pid)


def _wait(pid: int, output: Path, silence: float) -> bool:
    """Wait until the process ends. True: it was killed, since its output did not grow for `silence` seconds."""
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
    """A line for each stage, in the order in which they ended, and the sums."""
    yield f"{'':6}  {'wall s':>7}  {'cpu s':>7}"
    for stage, ok, wall, cpu in outcomes:
        yield f"{'passed' if ok else 'FAILED'}  {wall:7.1f}  {cpu:7.1f}  {stage.name}"
    yield f"{'':6}  {seconds:7.1f}  {sum(outcome.cpu for outcome in outcomes):7.1f}  all of them"


def run(stages: Sequence[Stage], last: Stage | None, runner: Runner) -> list[Outcome]:
    """Run `stages` side by side, the longest first, and `last` when they are over."""
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(PLACES) as pool:
        try:
            ordered = sorted(stages, key=lambda stage: -stage.weight)
            running = [pool.submit(runner.run, stage) for stage in ordered]
            outcomes += [future.result() for future in as_completed(running)]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            runner.close()
            raise
    if last is not None:
        outcomes.append(runner.run(last))
    return outcomes


def compile_tests(python: str) -> None:
    """Have Python and pytest write their compiled files here: a machine, which keeps none, is twenty times slower."""
    folders = ("tests/hw", "tests/contract", "tests/vm")
    command = [python, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *folders]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)  # the stages say what is wrong
    subprocess.run([python, "-m", "compileall", "-q", "pyvfio", "tools", "examples", "tests"], cwd=ROOT, check=False)


def main() -> int:
    """0 when each stage passed."""
    parser = argparse.ArgumentParser(prog="stages", description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="no virtual machine")
    parser.add_argument("pythons", nargs="+", metavar="PYTHON")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    pythons, start = options.pythons, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pyvfio-stages-") as directory:
        if options.quick:
            stages, last = list(quick_stages(pythons)), None
        else:
            compile_tests(pythons[0])
            stages = [*host_stages(pythons), *machine_stages(pythons[0])]
            names = [str(Path(directory, stage.file)) for stage in stages]
            last = Stage("each row of docs/series.md and reports.md", 0, (pythons[0], "-m", "tests.series", *names))
        outcomes = run(stages, last, Runner(Path(directory)))
    print(*table(outcomes, time.monotonic() - start), sep="\n")
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
