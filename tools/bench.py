"""`scripts/bench`: the cost of a resize and of a register, in a virtual machine whose clock counts instructions."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pyvfio import pci
from pyvfio.cli import bars
from pyvfio.cli.common import FAILED, OK, Json, complain, print_json, print_table, run
from pyvfio.cli.main_job import iommu_name
from pyvfio.device import open_device
from pyvfio.errors import DeviceNotFoundError
from pyvfio.kernel import LinuxKernel
from pyvfio.testing import kernels, vm
from pyvfio.testing.edu import EDU_ID
from pyvfio.testing.fake import VERSIONS, FakeKernel
from pyvfio.testing.world import FakeWorld, LinuxWorld, World
from pyvfio.units import MIB, format_size
from tools import register_cost, resize_cost
from tools.register_cost import RegisterCost
from tools.resize_cost import MEMORIES, POLICIES, STEP, Cost

NAME = "bench"
WRONG_USAGE = 2  # as argparse has it
SIZES = tuple(size * MIB for size in (2, 8, 32, 128, 512))

FLAT = 0.05
"""Growing costs the same at every length, but for this part of it: extend, granule."""
CHEAPER = 200
"""How many times cheaper than a remap that is, at the largest length, if it is at least `CHEAPER_FROM`."""
CHEAPER_FROM = 512 * MIB
ADDED = 80.0
"""What pyvfio adds to the system calls of one such resize, at most, in microseconds."""
REGISTER = 400.0
"""What an access of a mapped register takes more than that of a ctypes item, at most, in nanoseconds: as many guest
instructions."""
REGISTER_PART = 0.2
"""What part of `Region.read32` it takes, at most."""

_EDU_LIVENESS = 0x04  # holds what was written to it, inverted
_WARM_UP = 16
_REPEAT = 5
_REPEAT_FILE = 15  # longer ones: of so many, one is without the timer's interrupt
_LONGEST = 1 << 40
_TIMEOUT = 2400.0


class Row(NamedTuple):
    """One policy at one length of the block; `bare`: the system calls alone."""

    policy: str
    size: int
    cost: Cost
    bare: Cost | None

    @property
    def added(self) -> float | None:
        """What pyvfio adds to the system calls, in microseconds."""
        return None if self.bare is None else self.cost.resize - self.bare.resize


class Plan(NamedTuple):
    """The blocks of one kind of memory that are measured. `sizes` in bytes."""

    memory: str
    sizes: Sequence[int]
    repeat: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """One thing that must hold, and what was seen."""

    what: str
    ok: bool
    seen: str


# ------------------------------------------------------------------------------------------------------- what is wanted


def judge(rows: Sequence[Row], *, memory: str) -> Iterator[Verdict]:
    """What `rows` say of the three things that must hold; nothing where the rows for it are missing.

    A file's pages are filled with zeros in the resize itself, which costs more than mapping them: how many times
    cheaper it is says nothing there.
    """
    remaps = {row.size: row.cost.resize for row in rows if row.policy == "remap" and memory == "anonymous"}
    for policy in ("extend", "granule"):
        found = [row for row in rows if row.policy == policy]
        costs = [row.cost.resize for row in found]
        if len(found) > 1:
            spread = max(costs) / min(costs) - 1
            seen = f"{min(costs):,.1f} to {max(costs):,.1f} µs, {spread:.1%} apart"
            yield Verdict(f"{policy}: the same at every length within {FLAT:.0%}", spread <= FLAT, seen)
        for row in found:
            if row.size >= CHEAPER_FROM and row.size in remaps:
                times = remaps[row.size] / row.cost.resize
                what = f"{policy}: {CHEAPER} times cheaper than remap at {format_size(row.size)}"
                yield Verdict(what, times >= CHEAPER, f"{times:,.0f} times")
        added = [row.added for row in found if row.added is not None]
        if added:
            what = f"{policy}: pyvfio adds at most {ADDED:.0f} µs to the system calls"
            yield Verdict(what, max(added) <= ADDED, f"{max(added):.1f} µs")


def judge_registers(cost: RegisterCost) -> Iterator[Verdict]:
    """Whether an access of a register object is fast."""
    what = f"a register takes at most {REGISTER:.0f} ns more than an item of an array"
    yield Verdict(what, cost.added <= REGISTER, f"{cost.added:.0f} ns")
    what = f"a register takes at most {REGISTER_PART} of Region.read32"
    yield Verdict(what, cost.part <= REGISTER_PART, f"{cost.part:.3f}")


def _measure(world: World, bdf: str, plan: Plan, bare: Path | None, *, shown: bool | None) -> list[Row]:
    bares: dict[tuple[str, int], Cost] = {}
    if bare is not None:
        node = pci.group_node(world.kernel, pci.group_of(world.kernel, bdf))
        found = resize_cost.measure_bare(bare, node, memory=plan.memory, sizes=plan.sizes, repeat=plan.repeat)
        bares = {(policy, size): cost for policy, size, cost in found}
    rows = []
    steps = len(POLICIES) * len(plan.sizes)
    with (
        open_device(bdf, kernel=world.kernel) as device,
        bars.bar(steps, what="measuring", unit="row", shown=shown) as advance,
    ):
        measure = partial(resize_cost.measure, device.container, memory=plan.memory)
        for policy in POLICIES:
            # The interpreter specializes what it has run some times; that is not to be part of the first row.
            measure(policy, size=STEP, repeat=_WARM_UP)
            for size in plan.sizes:
                cost = measure(policy, size=size, repeat=plan.repeat)
                rows.append(Row(policy, size, cost, bares.get((policy, size))))
                advance(1)
    return rows


# --------------------------------------------------------------------------------------------------------------- output


def _run_plans(options: argparse.Namespace, world: World, bdf: str, *, iommu: str) -> int:
    """Measure each kind of memory, and show the figures. The exit status."""
    reports: list[Json] = []
    missed = False
    for plan in options.plans:
        with resize_cost.large_pages("anonymous" if options.fake else plan.memory, size=max(plan.sizes) + STEP):
            rows = _measure(world, bdf, plan, options.guest, shown=options.bars or None)
        verdicts = [] if options.fake else list(judge(rows, memory=plan.memory))
        missed |= not all(verdict.ok for verdict in verdicts)
        reports.append(_report(rows, verdicts, world, iommu=iommu, memory=plan.memory))
        if not options.json:
            where = "the fake kernel, as" if options.fake else "in a virtual machine:"
            print(f"{where} Linux {world.release}, {iommu} IOMMU; memory: {plan.memory}")
            _show(rows, verdicts)
    if options.json:
        print_json(reports[0] if len(reports) == 1 else reports)
    elif options.fake:
        print("The fake kernel maps nothing: these figures say nothing of a kernel.")
    return FAILED if options.check and missed else OK


def _show(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
    print(f"microseconds to grow by {format_size(STEP)}\n")
    print_table(
        ["POLICY", "BLOCK", "RESIZE", "SYSTEM CALLS", "PYVFIO ADDS", "PREFAULT, APART"],
        [
            [
                row.policy,
                format_size(row.size),
                _number(row.cost.resize),
                _number(None if row.bare is None else row.bare.resize),
                _number(row.added),
                _number(row.cost.prefault),
            ]
            for row in rows
        ],
    )
    print()
    _show_verdicts(verdicts)


def _show_verdicts(verdicts: Sequence[Verdict]) -> None:
    for verdict in verdicts:
        print(f"{'ok    ' if verdict.ok else 'MISSED'}  {verdict.what}: {verdict.seen}", flush=True)


def _number(microseconds: float | None) -> str:
    return "" if microseconds is None else f"{microseconds:,.1f}"


def _report(
    rows: Sequence[Row], verdicts: Sequence[Verdict], world: World, *, iommu: str, memory: str
) -> dict[str, Json]:
    return {
        "world": world.name.value,
        "kernel": world.release,
        "iommu": iommu,
        "memory": memory,
        "step": STEP,
        "rows": [
            {
                "policy": row.policy,
                "size": row.size,
                "resize_us": row.cost.resize,
                "system_calls_us": None if row.bare is None else row.bare.resize,
                "added_us": None if row.added is None else round(row.added, 3),
                "prefault_us": row.cost.prefault,
            }
            for row in rows
        ],
        "targets": [{"what": verdict.what, "ok": verdict.ok, "seen": verdict.seen} for verdict in verdicts],
    }


# --------------------------------------------------------------------------------------------------------------- worlds


def _run_in_vm(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    kernel, iommu = options.kernel or "6.12", options.iommu or "intel"
    print(f"{NAME}: measuring on kernel {kernel} with {iommu} IOMMU; some minutes", file=sys.stderr, flush=True)
    shown = [bars.HIDDEN_OPTION] if bars.wanted() else []
    with tempfile.TemporaryDirectory(prefix="pyvfio-bench-") as directory:
        program = resize_cost.compile_bare(Path(directory))
        try:
            result = vm.run(
                [sys.executable, "-m", "tools.bench", *arguments, "--guest", str(program), *shown],
                kernel=kernel,
                iommu=iommu,
                icount=True,
                timeout=_TIMEOUT,
                env={"PYTHONPATH": str(Path(__file__).parents[1])},
                stdout=sys.stdout.buffer,
                stderr=sys.stderr.buffer,
            )
        except ValueError as error:  # a kernel and an IOMMU that do not go together
            complain(NAME, error)
            return WRONG_USAGE
        except vm.VmError as error:
            if error.log:
                print(*error.log.splitlines()[-40:], sep="\n", file=sys.stderr)
            raise
    return result.status


def _run_in_guest(options: argparse.Namespace) -> int:
    kernel = LinuxKernel()
    found = [device for device in pci.enumerate_devices(kernel) if (device.vendor, device.device) == EDU_ID]
    if not found:
        raise DeviceNotFoundError("this virtual machine has no edu device")
    bdf = found[0].bdf
    with ExitStack() as stack:
        stack.callback(pci.restore, kernel, pci.bind(kernel, bdf))
        status = _run_plans(options, LinuxWorld([bdf]), bdf, iommu=options.iommu or iommu_name(kernel))
        return status if options.json else max(status, _run_registers(options, kernel, bdf))


def _run_registers(options: argparse.Namespace, kernel: LinuxKernel, bdf: str) -> int:
    """Measure a register, and show the figures. The exit status."""
    with open_device(bdf, kernel=kernel) as device:
        cost = register_cost.measure(device, _EDU_LIVENESS)
    verdicts = list(judge_registers(cost))
    print("nanoseconds of an access of a mapped register\n")
    print_table(["ITEM, LOAD", "STORE", "REGISTER, LOAD", "STORE", "READ32"], [[f"{each:,.0f}" for each in cost]])
    print()
    _show_verdicts(verdicts)
    return FAILED if options.check and not all(verdict.ok for verdict in verdicts) else OK


def _run_on_fake(options: argparse.Namespace) -> int:
    iommu = options.iommu or "intel"
    try:
        fake = FakeKernel(options.kernel or "6.12", iommu=iommu)
    except ValueError as error:
        complain(NAME, error)
        return WRONG_USAGE
    with fake:
        status = _run_plans(options, FakeWorld(fake), fake.bdfs[0], iommu=iommu)
        fake.check()
    return status


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME,
        description=f"Measures what it costs to grow a block that a device reaches by {format_size(STEP)}, for each "
        "way of resizing and several lengths, beside the bare system calls made from C: on a real kernel in a virtual "
        "machine whose clock counts instructions, so that the figures repeat.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--fake", action="store_true", help="the fake kernel, in a moment: shows the rows, says nothing of a kernel")
    add("--kernel", metavar="|".join([*kernels.LINES, "FILE"]), help=f"default: 6.12; of a fake: {', '.join(VERSIONS)}")
    add("--iommu", choices=list(vm.IOMMUS), help="default: intel")
    default = ",".join(str(size // MIB) for size in SIZES)
    add("--sizes", type=_sizes, default=list(SIZES), metavar="MIB,…", help=f"lengths of the block; default: {default}")
    add(
        "--memory",
        type=_memory,
        action="append",
        metavar="KIND[=MIB,…]",
        help=f"the memory of the block, and lengths for it alone; may be repeated; default: anonymous; "
        f"{', '.join(MEMORIES)}",
    )
    repeats = f"{_REPEAT}, and {_REPEAT_FILE} of what is no anonymous memory"
    add("--repeat", type=_count, metavar="N", help=f"resizes, of which the least counts; default: {repeats}")
    add("--json", action="store_true", help="for programs")
    add("--check", action="store_true", help="exit status 1 when something that must hold does not; not with --fake")
    add("--guest", type=Path, help=argparse.SUPPRESS)
    add(bars.HIDDEN_OPTION, action="store_true", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `scripts/bench`; its exit status: 0, or 1 when something is missing or, with `--check`, does not hold."""
    parser = _parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    options.plans = [
        Plan(memory, sizes or options.sizes, options.repeat or (_REPEAT if memory == "anonymous" else _REPEAT_FILE))
        for memory, sizes in options.memory or [("anonymous", None)]
    ]
    if options.fake and options.check:
        parser.error("--check goes with a real kernel: what the fake takes says nothing")
    if options.fake and any(plan.memory == "hugetlb" for plan in options.plans):
        parser.error("--memory hugetlb goes with a real kernel: the fake has no pool of huge pages of its own")
    if options.guest is not None:
        return _run_in_guest(options)
    if options.fake:
        return _run_on_fake(options)
    return _run_in_vm(options, arguments)


if __name__ == "__main__":
    run(main, name=NAME)
