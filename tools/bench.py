"""`scripts/bench`: measure resizes, hot paths, and each operation among n, beside C and plain Python."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from pyvfio import pci
from pyvfio.cli import bars
from pyvfio.cli.common import FAILED, OK, Json, complain, print_json, run
from pyvfio.cli.main_job import iommu_name
from pyvfio.device import Device, open_device
from pyvfio.errors import DeviceNotFoundError
from pyvfio.ioas import Ioas
from pyvfio.kernel import Kernel, LinuxKernel
from pyvfio.pci.cdevs import cdev_node
from pyvfio.testing import kernels, vm
from pyvfio.testing.edu import EDU_ID
from pyvfio.testing.fake import VERSIONS, FakeKernel
from pyvfio.testing.world import FakeWorld, LinuxWorld, World
from pyvfio.units import MIB, format_size
from tools import bare, granule_cost, import_cost, memory_cost, path_cost, plot, resize_cost, scale_cost
from tools.report import Cost, PathRow, Report, ResizeRow, Resizes, ScaleRow, from_json, to_json
from tools.resize_cost import MEMORIES, POLICIES, STEP, policies_of
from tools.show import show
from tools.targets import EXPONENT, NOISE, exponent_on_host, judge

NAME = "bench"
WRONG_USAGE = 2  # argparse's exit status for wrong usage
SIZES = tuple(size * MIB for size in (2, 8, 32, 128, 512))

SPACES = ("type1", "iommufd")
_KERNELS = {"type1": "6.12", "iommufd": "7+iommufd"}
_WARM_UP = 16
_REPEAT = 5
_REPEAT_FILE = 15  # these take longer: of 15, at least one is free of the timer's interrupt
_LONGEST = 1 << 40
_TIMEOUT = 2400.0


class Plan(NamedTuple):
    """The sizes of the blocks to measure for one kind of memory, in bytes."""

    memory: str
    sizes: Sequence[int]
    repeat: int


# ---------------------------------------------------------------------------------------------------------- measuring


def _measure(options: argparse.Namespace, world: World, bdf: str, *, iommu: str) -> Report:
    """Measure the parts that the options select."""
    report = Report(world.name.value, world.release, iommu, options.space)
    if options.granules:
        with _opened(options, world, bdf) as device:
            clock = path_cost.clock_of(fake=options.fake)
            counts = options.counts or granule_cost.COUNTS
            report.granules, report.memory = granule_cost.measure(device.space, clock, counts=counts, fake=options.fake)
        return report
    if options.scale:
        _measure_scale(options, world, bdf, report)
        return report
    for plan in options.plans if not options.paths else ():
        with resize_cost.large_pages("anonymous" if options.fake else plan.memory, size=max(plan.sizes) + 2 * STEP):
            report.resizes.append(_measure_resizes(world, bdf, plan, options))
    if not options.resizes:
        report.paths = _measure_paths(options, world, bdf)
    return report


@contextmanager
def _opened(
    options: argparse.Namespace, world: World, bdf: str, cut: Literal["pages", "replace"] | None = None
) -> Iterator[Device]:
    """Open the device in an address space of the kind that the options select."""
    if options.space == "type1":
        with open_device(bdf, iommu="type1", kernel=world.kernel) as device:
            yield device
    else:
        with Ioas(kernel=world.kernel, cut=cut) as space, open_device(bdf, space=space) as device:
            yield device


def _node(options: argparse.Namespace, kernel: Kernel, bdf: str) -> Path:
    """Return the node through which a program in C opens the device."""
    if options.space == "type1":
        return pci.group_node(pci.group_of(bdf, kernel=kernel), kernel=kernel)
    node = cdev_node(bdf, kernel=kernel)
    if node is None:
        raise DeviceNotFoundError(f"{bdf} has no node below /dev/vfio/devices")
    return node


def _measure_paths(options: argparse.Namespace, world: World, bdf: str) -> list[PathRow]:
    found: dict[str, float] = {}
    if options.guest is not None:
        node = _node(options, world.kernel, bdf)
        found = bare.measure_paths(options.guest, node, bdf, repeat=path_cost.REPEAT)
    with _opened(options, world, bdf) as device:
        return path_cost.measure(device, found, fake=options.fake, repeat=options.repeat or path_cost.REPEAT)


def _measure_resizes(world: World, bdf: str, plan: Plan, options: argparse.Namespace) -> Resizes:
    alone: dict[tuple[str, int], Cost] = {}
    if options.guest is not None:
        node = _node(options, world.kernel, bdf)
        alone = bare.measure_resizes(options.guest, node, bdf, memory=plan.memory, sizes=plan.sizes, repeat=plan.repeat)
    rows, policies = [], policies_of(options.space)
    with bars.bar(len(policies) * len(plan.sizes), what="measuring", unit="row", shown=options.bars or None) as advance:
        for policy in policies:
            with _opened(options, world, bdf, POLICIES[policy].cut) as device:
                space = device.space
                # The interpreter specializes code after some runs. The first row must not contain the specialization.
                resize_cost.measure(space, policy, memory=plan.memory, size=STEP, repeat=_WARM_UP)
                for size in plan.sizes:
                    cost = resize_cost.measure(space, policy, memory=plan.memory, size=size, repeat=plan.repeat)
                    rows.append(ResizeRow(policy, size, cost, alone.get((policy, size))))
                    advance(1)
    return Resizes(plan.memory, rows)


def _measure_scale(options: argparse.Namespace, world: World, bdf: str, report: Report) -> None:
    clock = path_cost.clock_of(fake=options.fake)
    doubtful = may_be_noise if options.fake else _never  # a clock that counts instructions repeats the figures
    counts = options.counts or scale_cost.COUNTS
    with _opened(options, world, bdf) as device:  # tables that have grown hide the size of one more
        report.memory = memory_cost.measure(device.space, count=min(memory_cost.COUNT, max(counts)))
    with (
        _opened(options, world, bdf) as device,
        bars.bar(len(scale_cost.FAMILIES), what="measuring", unit="family", shown=options.bars or None) as advance,
    ):
        report.scale = scale_cost.measure(device.space, clock, counts=counts, done=advance, doubtful=doubtful)


def may_be_noise(row: ScaleRow) -> bool:
    """Return whether a cost exceeds the limit by so little that other work of the machine can be the reason."""
    exponent = exponent_on_host(row)
    return exponent is not None and EXPONENT < exponent <= EXPONENT + NOISE


def _never(_row: ScaleRow) -> bool:
    return False


# --------------------------------------------------------------------------------------------------------------- worlds


def _run_in_vm(options: argparse.Namespace, arguments: Sequence[str]) -> Report:
    """Run this command in a virtual machine, and return the figures, which the command prints there as JSON."""
    kernel, iommu = options.kernel or _KERNELS[options.space], options.iommu or "intel"
    print(
        f"{NAME}: measuring {options.space} on kernel {kernel} with {iommu} IOMMU; some minutes",
        file=sys.stderr,
        flush=True,
    )
    shown = [bars.HIDDEN_OPTION] if bars.wanted() else []
    with tempfile.TemporaryDirectory(prefix="pyvfio-bench-") as directory:
        bare.compile_all(Path(directory))
        try:
            result = vm.run(
                [sys.executable, "-m", "tools.bench", *arguments, "--guest", directory, *shown],
                kernel=kernel,
                iommu=iommu,
                icount=True,
                timeout=_TIMEOUT,
                env={"PYTHONPATH": str(Path(__file__).parents[1])},
                stderr=sys.stderr.buffer,
            )
        except vm.VmError as error:
            if error.log:
                print(*error.log.splitlines()[-40:], sep="\n", file=sys.stderr)
            raise
    if result.status:
        raise OSError(f"the measurement in the virtual machine ended with status {result.status}")
    return from_json(result.stdout.decode())


def _run_in_guest(options: argparse.Namespace) -> Report:
    kernel = LinuxKernel()
    found = [device for device in pci.devices(kernel=kernel) if (device.vendor, device.device) == EDU_ID]
    if not found:
        raise DeviceNotFoundError("this virtual machine has no edu device")
    bdf = found[0].bdf
    with ExitStack() as stack:
        stack.callback(pci.restore, pci.bind(bdf, kernel=kernel), kernel=kernel)
        return _measure(options, LinuxWorld([bdf]), bdf, iommu=options.iommu or iommu_name(kernel))


def _run_on_fake(options: argparse.Namespace) -> Report:
    iommu = options.iommu or "intel"
    version = (options.kernel or _KERNELS[options.space]).removesuffix("+iommufd")
    with FakeKernel(version, iommu=iommu, iommufd=options.space == "iommufd") as fake:
        fake.privileged = True  # so that the limit of locked memory does not apply
        report = _measure(options, FakeWorld(fake), fake.bdfs[0], iommu=iommu)
        fake.check()
    return report


def _finish(options: argparse.Namespace, report: Report) -> int:
    """Show the figures, draw them, and return the exit status."""
    verdicts = list(judge(report))
    if options.json:
        targets: list[Json] = [
            {"about": each.about, "what": each.what, "ok": each.ok, "seen": each.seen} for each in verdicts
        ]
        print_json({**to_json(report), "targets": targets})
    else:
        show(report, verdicts)
        if options.fake:
            print("The fake kernel maps no memory: these figures do not apply to a kernel.")
    if options.svg is not None:
        plot.draw(report, options.svg)
    return FAILED if options.check and not all(verdict.ok for verdict in verdicts) else OK


# ------------------------------------------------------------------------------------------------------------ arguments


def _size(text: str) -> int:
    try:
        size = int(text) * MIB
    except ValueError:
        size = 0
    if not 0 < size <= _LONGEST or size % STEP:
        raise argparse.ArgumentTypeError(f"not a length in MiB that is a multiple of {STEP // MIB}: {text!r}")
    return size


def _sizes(text: str) -> list[int]:
    return [_size(word) for word in text.split(",")]


def _memory(text: str) -> tuple[str, list[int] | None]:
    memory, given, sizes = text.partition("=")
    if memory not in MEMORIES:
        raise argparse.ArgumentTypeError(f"{memory!r} is none of {', '.join(MEMORIES)}")
    return memory, _sizes(sizes) if given else None


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"not a number above 0: {text!r}")
    return int(text)


def _counts(text: str) -> list[int]:
    counts = [_count(word) for word in text.split(",")]
    if max(counts) > granule_cost.COUNTS[-1]:
        raise argparse.ArgumentTypeError(f"a machine cannot hold {max(counts):,} things")
    return counts


_DESCRIPTION = f"""Measures the cost of pyvfio on a real kernel, in a virtual machine whose clock counts instructions,
so that the figures repeat. The resizes grow a block in a device's reach by {format_size(STEP)} and shrink it again, for
each policy and several lengths; the hot paths are those of a driver. Each figure stands beside that of the bare system
calls made from C, and each hot path also beside plain Python. docs/costs.md explains the figures."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=NAME, description=_DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--resizes", action="store_true", help="the resizes alone")
    parts.add_argument("--paths", action="store_true", help="the hot paths alone")
    counts = ",".join(map(str, scale_cost.COUNTS))
    parts.add_argument(
        "--scale",
        action="store_true",
        help="instead: the cost of each operation among n blocks, pieces, holes, mappings and dirty pages; the bytes "
        "of one mapping and of one block; and the import",
    )
    granules = ",".join(map(str, granule_cost.COUNTS))
    parts.add_argument(
        "--granules",
        action="store_true",
        help="instead, with --space iommufd: a block of n granules of a page, more than type1 has mappings",
    )
    add(
        "--counts",
        type=_counts,
        metavar="N,…",
        help=f"with --scale, default: {counts}; with --granules, default: {granules}",
    )
    add("--space", choices=SPACES, default="type1", help="the address space; default: %(default)s")
    add(
        "--fake",
        action="store_true",
        help="the fake kernel. The times do not apply to a kernel; how the times grow with n does",
    )
    default = f"default: 6.12, or 7+iommufd with --space iommufd; of a fake: {', '.join(VERSIONS)}"
    add("--kernel", metavar="|".join([*kernels.LINES, "FILE"]), help=default)
    add("--iommu", choices=list(vm.IOMMUS), help="default: intel")
    default = ",".join(str(size // MIB) for size in SIZES)
    add("--sizes", type=_sizes, default=list(SIZES), metavar="MIB,…", help=f"lengths of the block; default: {default}")
    add(
        "--memory",
        type=_memory,
        action="append",
        metavar="KIND[=MIB,…]",
        help=f"the memory of the block, with lengths for this kind; may be repeated; default: anonymous; "
        f"{', '.join(MEMORIES)}",
    )
    repeats = f"{_REPEAT}, {_REPEAT_FILE} of other than anonymous memory, {path_cost.REPEAT} of hot paths, "
    repeats += f"{import_cost.REPEAT} of the import"
    add("--repeat", type=_count, metavar="N", help=f"measurements, of which the least counts; default: {repeats}")
    add("--json", action="store_true", help="for programs")
    add(
        "--check",
        action="store_true",
        help="exit with status 1 if a figure exceeds the limit; with --fake only for --scale and --granules",
    )
    add("--svg", type=Path, metavar="FILE", help="draw the cost against the size of the block, or against n")
    add("--guest", type=Path, help=argparse.SUPPRESS)
    add(bars.HIDDEN_OPTION, action="store_true", help=argparse.SUPPRESS)
    return parser


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.fake and options.check and not (options.scale or options.granules):
        parser.error(
            "--check goes with a real kernel, or with --scale or --granules: times on the fake do not apply to a kernel"
        )
    if options.granules and options.space != "iommufd":
        parser.error("--granules needs --space iommufd: type1 accepts 65,535 mappings")
    if options.scale and options.counts and max(options.counts) > scale_cost.COUNTS[-1]:
        parser.error(f"--counts of --scale are at most {scale_cost.COUNTS[-1]:,}: a container has 65,535 mappings")
    if options.fake and any(plan.memory == "hugetlb" for plan in options.plans):
        parser.error("--memory hugetlb needs a real kernel: the fake has no pool of huge pages")
    if options.svg is not None and (options.paths or options.granules):
        parser.error("--svg draws a cost against a size: --paths has no sizes, and --granules has no picture")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `scripts/bench`. Return 0, or 1 if a tool is missing or, with `--check`, a figure exceeds the limit."""
    parser = _parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    options.plans = [
        Plan(memory, sizes or options.sizes, options.repeat or (_REPEAT if memory == "anonymous" else _REPEAT_FILE))
        for memory, sizes in options.memory or [("anonymous", None)]
    ]
    _check(parser, options)
    if options.guest is not None:
        print_json(to_json(_run_in_guest(options)))
        return OK
    if options.svg is not None:
        plot.check_installed()  # checked first, before minutes of measuring are lost
    try:
        report = _run_on_fake(options) if options.fake else _run_in_vm(options, arguments)
    except ValueError as error:  # a kernel and an IOMMU that cannot be combined
        complain(NAME, error)
        return WRONG_USAGE
    if options.scale:
        report.imports = import_cost.measure(repeat=options.repeat or import_cost.REPEAT)
    return _finish(options, report)


if __name__ == "__main__":
    run(main, name=NAME)
