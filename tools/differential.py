"""``scripts/differential``: random calls on a real kernel and on the fake, and the shortest with different outcomes."""

import argparse
import io
import logging
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

from pyvfio import pci
from pyvfio.cli.bars import bar
from pyvfio.cli.common import FAILED, OK, run
from pyvfio.kernel import LinuxKernel
from pyvfio.testing import kernels, vm
from pyvfio.testing.fake import VERSIONS
from pyvfio.testing.fake.iommu import iommu_model
from pyvfio.units import PAGE_SIZE, U64_MAX
from tools import comparison, iommufd_sequences, sequences
from tools.comparison import Episode, Outcome
from tools.stage import SPACES, FakeStage, LinuxStage, Space

NAME = "differential"
_EDU = (0x1234, 0x11E8)
_FAKES = {"6.1": "6.1", "6.12": "6.12", "7": "7.3", "6.12+iommufd": "6.12", "7+iommufd": "7.3"}
_MINUTE_OF_OPS = 6000  # the calls that a virtual machine makes in a minute, at least


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"at least 1, not {number}")
    return number


def parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments."""
    made = argparse.ArgumentParser(
        prog=NAME,
        description="Makes random sequences of VFIO calls, plays them on a real kernel in a virtual machine and on the "
        "fake kernel, and compares each value, errno, written byte and locked page. COMMAND runs first, in the same "
        "virtual machine, with its output on stderr.",
        usage="%(prog)s [options] [-- COMMAND...]",
        epilog="exit status: 0 no difference, 1 a difference, which is on stdout as a program, a failure of COMMAND, "
        "or no virtual machine, 2 wrong arguments",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--kernel", default="6.12", choices=list(kernels.LINES), help="default: %(default)s")
    add("--space", default="type1", choices=SPACES, help="calls on containers, or on iommufd; default: %(default)s")
    add("--iommu", default="intel", choices=list(vm.IOMMUS), help="default: %(default)s; virtio needs 6.12")
    add("--devices", default="edu", choices=list(vm.DEVICES), help="of the virtual machine; default: %(default)s")
    add("--ops", default=2000, type=_count, metavar="N", help="how many calls; default: %(default)s")
    add("--seed", default=1, type=int, metavar="N", help="the same seed makes the same calls; default: %(default)s")
    add(
        "--differences", default=1, type=_count, metavar="N", help="show up to N that look unlike; default: %(default)s"
    )
    add("--guest", choices=["record", "reduce"], help=argparse.SUPPRESS)
    add("--episodes", type=Path, help=argparse.SUPPRESS)
    add("command", nargs="*", metavar="COMMAND", help=argparse.SUPPRESS)
    return made


# ---------------------------------------------------------------------------------------------------- in the machine


@contextmanager
def _linux_stage() -> Iterator[LinuxStage]:
    kernel = LinuxKernel()
    found = [device.bdf for device in pci.devices(kernel=kernel) if (device.vendor, device.device) == _EDU]
    if len(found) < 2:
        raise OSError(f"sequences need two edu devices, and this machine has {len(found)}")
    with ExitStack() as stack:
        for bdf in found[:2]:
            stack.callback(pci.restore, pci.bind(bdf, kernel=kernel), kernel=kernel)
        yield LinuxStage(found)


def _lines(path: Path) -> Iterator[Episode]:
    with path.open(encoding="ascii") as file:
        for line in file:
            yield comparison.decode_episode(line)


def _record(path: Path, command: Sequence[str]) -> int:
    """Run the command, and print the outcomes of the episodes. Return the exit status of the command."""
    status = subprocess.run(command, stdout=sys.stderr, check=False).returncode if command else OK  # noqa: S603
    with _linux_stage() as stage:
        for episode in _lines(path):
            outcomes = [comparison.encode(outcome) for outcome in comparison.play(stage, episode)]
            print("\n".join(outcomes), flush=True)
    return FAILED if status else OK


def _reduce(path: Path, *, version: str, iommu: str, space: Space) -> int:
    with _linux_stage() as stage:
        for episode in _lines(path):
            found = comparison.reduce(episode, stage, FakeStage(version, iommu, space))
            if found is None:
                print(flush=True)
            else:
                print(*(comparison.encode(part) for part in found), sep="\t", flush=True)
    return OK


# ---------------------------------------------------------------------------------------------------------- outside


class Machine:
    """Starts virtual machines that run this module on files in a directory of the machine's own."""

    def __init__(self, directory: Path, options: argparse.Namespace) -> None:
        self._directory = directory
        self._options = options

    def run(self, task: str, episodes: Sequence[Episode], *, calls: int, first: Sequence[str] = ()) -> tuple[int, str]:
        """Run the command `first`, and then `task` on the episodes. Return the exit status and the output of `task`."""
        options = self._options
        path = self._directory / task
        path.write_text("".join(comparison.encode(episode) + "\n" for episode in episodes), encoding="ascii")
        command = [sys.executable, "-m", "tools.differential", "--guest", task, "--episodes", str(path)]
        command += ["--kernel", options.kernel, "--iommu", options.iommu, "--space", options.space, "--", *first]
        stdout = io.BytesIO()
        result = vm.run(
            command,
            kernel=options.kernel,
            iommu=options.iommu,
            devices=options.devices,
            timeout=None if first else 600 + 300 * calls / _MINUTE_OF_OPS,
            env={"PYTHONPATH": str(Path(__file__).parents[1])},
            stdout=stdout,
            stderr=sys.stderr.buffer,
        )
        if result.status and not first:
            raise OSError(f"the recorder in the virtual machine ended with status {result.status}")
        return result.status, stdout.getvalue().decode("ascii")


def _differing(
    episodes: Sequence[Episode], recorded: Iterator[Outcome], stage: FakeStage
) -> Iterator[tuple[Episode, str]]:
    """Yield each episode with a difference, cut behind the difference, and a description of the difference."""
    with bar(len(episodes), what="comparing", unit="episode") as advance:
        for episode in episodes:
            real = list(islice(recorded, len(episode.ops)))
            found = comparison.first_difference(real, comparison.play(stage, episode))
            advance(1)
            if found is not None:
                number, one, other = found
                op = episode.ops[number]
                look = f"{op.call} {op.request}: errno {one.errno} or {other.errno}, value {one.value} or {other.value}"
                yield episode._replace(ops=episode.ops[: number + 1]), look


def _report(machine: Machine, found: Sequence[Episode], options: argparse.Namespace) -> None:
    version = _FAKES[options.kernel]
    plays = sum(len(episode.ops) for episode in found) * 40
    _, text = machine.run("reduce", found, calls=plays)
    for episode, line in zip(found, text.splitlines(), strict=False):
        if line:
            parts = line.split("\t")
            least, real, fake = comparison.decode_episode(parts[0]), *map(comparison.decode_outcome, parts[1:])
            machine_of = {"version": options.kernel, "iommu": options.iommu, "space": options.space}
            print(comparison.program(least, **machine_of, real=real, fake=fake))
        else:
            print(f"# differs on this machine, but not inside the virtual one, with the fake {version}:")
            print("".join(f"# {op}\n" for op in episode.ops))


def _episodes(version: str, options: argparse.Namespace) -> list[Episode]:
    ranges = iommu_model(options.iommu, VERSIONS[version]).ranges
    if options.space == "iommufd":
        return iommufd_sequences.episodes(seed=options.seed, ops=options.ops, ranges=ranges)
    top = U64_MAX + 1 if VERSIONS[version].unmaps_end_of_u64 else U64_MAX + 1 - PAGE_SIZE
    return sequences.episodes(seed=options.seed, ops=options.ops, ranges=ranges, top=top)


def compare(options: argparse.Namespace, machine: Machine) -> int:
    """Play the calls in the machine and on the fake, and print the differences. Return the exit status."""
    # Sequences try everything, so the fake's warnings about calls that it does not model are expected.
    logging.getLogger("pyvfio.testing.fake").setLevel(logging.ERROR)
    version = _FAKES[options.kernel]
    episodes = _episodes(version, options)
    start = time.monotonic()
    status, text = machine.run("record", episodes, calls=options.ops, first=options.command)
    recorded = [comparison.decode_outcome(line) for line in text.splitlines()]
    if len(recorded) != options.ops:
        raise OSError(f"the recorder in the virtual machine ended with {len(recorded)} of {options.ops} calls")
    looks: dict[str, Episode] = {}
    count = 0
    for episode, look in _differing(episodes, iter(recorded), FakeStage(version, options.iommu, options.space)):
        count += 1
        if look not in looks or len(episode.ops) < len(looks[look].ops):
            looks[look] = episode
    seconds = time.monotonic() - start
    what = f"{options.ops} calls on {options.space}, seed {options.seed}, Linux {options.kernel}, {options.iommu} IOMMU"
    print(f"# {what}: {count} of {len(episodes)} episodes differ ({seconds:.0f} s)", flush=True)
    for look in looks:
        print(f"# {look}")
    if looks:
        _report(machine, list(looks.values())[: options.differences], options)
    if status:
        print(f"# {options.command[0]} failed in the virtual machine", flush=True)
    return FAILED if looks or status else OK


def replay(episode: Episode, *, version: str, iommu: str, space: Space = "type1") -> None:
    """Play an episode on the fake and, unless `--fake` is given, on the running kernel; print each call's outcome."""
    theirs = list(comparison.play(FakeStage(_FAKES[version], iommu, space), episode))
    ours: list[Outcome] = []
    if "--fake" not in sys.argv[1:]:
        with _linux_stage() as stage:
            ours = list(comparison.play(stage, episode))
    for number, (op, fake) in enumerate(zip(episode.ops, theirs, strict=True)):
        print(f"{op.call} {op.slot} {op.request} {' '.join(map(str, op.fields))}")
        if ours:
            print(f"    real: {ours[number]}")
        print(f"    fake: {fake}{'    <-- differs' if ours and ours[number] != fake else ''}")


def _dispatch(options: argparse.Namespace) -> int:
    if options.guest == "record":
        return _record(options.episodes, options.command)
    if options.guest == "reduce":
        return _reduce(options.episodes, version=_FAKES[options.kernel], iommu=options.iommu, space=options.space)
    try:
        with tempfile.TemporaryDirectory(prefix="pyvfio-differential-") as directory:
            return compare(options, Machine(Path(directory), options))
    except vm.VmError as error:
        print(*error.log.splitlines()[-40:], sep="\n", file=sys.stderr)
        raise OSError(str(error)) from error


def _end(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``scripts/differential``, and return the exit status."""
    options = parser().parse_args(arguments)
    if options.space == "iommufd" and not options.kernel.endswith("+iommufd"):
        parser().error(f"--space iommufd needs --kernel 6.12+iommufd or 7+iommufd: {options.kernel} has no /dev/iommu")
    if options.iommu == "virtio" and options.kernel == "6.1":
        parser().error("the kernels 6.1 have no driver for the virtio IOMMU")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    return _dispatch(options)


if __name__ == "__main__":
    run(main, name=NAME)
