"""`scripts/demo`: the main job, or the ways of resizing side by side, on a real device, on a real kernel in a virtual
machine, or on the fake kernel, for a person to see."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict

from pyvfio import pci
from pyvfio.cli.common import FAILED, OK, Json, bdf_argument, complain, print_json, print_table, run
from pyvfio.cli.main_job import MainJob, StepResult
from pyvfio.cli.side_by_side import STEP, Figures, Policy, SideBySide
from pyvfio.errors import DeviceNotFoundError, VfioError
from pyvfio.kernel import LinuxKernel
from pyvfio.testing import kernels, vm, vm_errors
from pyvfio.testing.edu import EDU_ID
from pyvfio.testing.fake import VERSIONS, FakeKernel
from pyvfio.testing.world import FakeWorld, LinuxWorld, World, WorldName
from pyvfio.units import format_size

NAME = "demo"
_TIMEOUT = 1500.0
WRONG_USAGE = 2  # as argparse has it
_WAYS: dict[str, tuple[Policy, ...]] = {"remap": ("remap",), "extend": ("remap", "extend")}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="Shows a RAM block that grows and shrinks in a VFIO container, what a device reads and writes of "
        "it, and what the IOMMU stops. With no option it does so on a real kernel in a virtual machine, or on the fake "
        "kernel where there is no QEMU.",
        allow_abbrev=False,
    )
    worlds = parser.add_mutually_exclusive_group()
    worlds.add_argument(
        "--device", type=bdf_argument, metavar="BDF", help="a device of this machine that is bound to vfio-pci"
    )
    worlds.add_argument("--vm", action="store_true", help="a virtual machine with an edu device (the default)")
    worlds.add_argument("--fake", action="store_true", help="the fake kernel, with a fake edu device; in a second")
    worlds.add_argument("--guest", action="store_true", help=argparse.SUPPRESS)
    names = "|".join([*kernels.LINES, "FILE"])
    parser.add_argument("--kernel", metavar=names, help=f"default: 6.12; of a fake: {', '.join(VERSIONS)}")
    parser.add_argument("--iommu", choices=list(vm.IOMMUS), help="not with --device; default: intel")
    parser.add_argument(
        "--resize",
        choices=list(_WAYS),
        help="what a resize costs a device that is at work: under remap, or under extend with granules beside it",
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser


def _run_in_vm(options: argparse.Namespace) -> int:
    kernel, iommu = options.kernel or "6.12", options.iommu or "intel"
    words = [sys.executable, "-m", "pyvfio.cli.demo", "--guest", "--iommu", iommu]
    words += ["--resize", options.resize] if options.resize else []
    time = "a minute" if options.resize else "some ten seconds"
    complain(NAME, f"booting kernel {kernel} with {iommu} IOMMU in QEMU; {time}")
    try:
        result = vm.run(
            [*words, *(["--json"] if options.json else [])],
            kernel=kernel,
            iommu=iommu,
            timeout=_TIMEOUT,
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


def _job(bdf: str, world: World, options: argparse.Namespace, *, iommu: str | None = None) -> MainJob | SideBySide:
    if options.resize:
        return SideBySide(bdf, world=world, ways=_WAYS[options.resize], iommu=iommu)
    return MainJob(bdf, world=world, iommu=iommu)


def _run_in_guest(options: argparse.Namespace) -> int:
    kernel = LinuxKernel()
    found = [device for device in pci.enumerate_devices(kernel) if (device.vendor, device.device) == EDU_ID]
    if not found:
        raise DeviceNotFoundError("this virtual machine has no edu device")
    with ExitStack() as stack:
        stack.callback(pci.restore, kernel, pci.bind(kernel, found[0].bdf))
        world = LinuxWorld([found[0].bdf], name=WorldName.VM)
        job = _job(found[0].bdf, world, options, iommu=options.iommu)
        return _show(job, world="vm", as_json=options.json)


def _run_on_device(options: argparse.Namespace) -> int:
    job = _job(options.device, LinuxWorld([options.device]), options)
    return _show(job, world="device", as_json=options.json)


def _run_on_fake(options: argparse.Namespace) -> int:
    try:
        fake = FakeKernel(options.kernel or "6.12", iommu=options.iommu or "intel")
    except ValueError as error:
        complain(NAME, error)
        return WRONG_USAGE
    with fake:
        job = _job(fake.bdfs[0], FakeWorld(fake), options, iommu=options.iommu or "intel")
        status = _show(job, world="fake", as_json=options.json)
        fake.check()
    return status


def _has_machine() -> bool:
    try:
        vm_errors.find_tool("qemu-system-x86_64", package="qemu-system-x86")
    except vm_errors.MissingToolError as error:
        complain(NAME, f"{error}; so this is the fake kernel. {error.hint}")
        return False
    return True


_WHERE = {"vm": "in a virtual machine: Linux", "device": "on this machine: Linux", "fake": "the fake kernel, as Linux"}


def _show(job: MainJob | SideBySide, *, world: str, as_json: bool) -> int:
    results: list[StepResult] = []
    if not as_json:
        iommu = "no" if job.facts.iommu == "none" else job.facts.iommu
        print(f"world    {_WHERE[world]} {job.facts.kernel}, {iommu} IOMMU", flush=True)
    try:
        for result in job.steps():
            results.append(result)
            if not as_json:
                _print_step(job, result, first=len(results) == 1)
    except (VfioError, OSError) as error:
        if not as_json:
            raise
        complain(NAME, error)
        results.append(StepResult(name="carry on", ok=False, microseconds=0.0, seen=str(error)))
    ok = all(result.ok for result in results)
    if as_json:
        print_json(_report(job, results, world=world, ok=ok))
    else:
        if isinstance(job, SideBySide) and ok:
            _print_figures(job.figures)
        print("\nEvery step held." if ok else "\nThe last step did NOT hold.")
    return OK if ok else FAILED


def _print_step(job: MainJob | SideBySide, result: StepResult, *, first: bool) -> None:
    if first:
        for note in job.notes:
            print(f"note     {note}")
        for number, (start, last) in enumerate(job.facts.iova_ranges, 1):
            print(
                f"IOVA {number}   {start:#x}-{last:#x}"
                + (f" ({format_size(last - start + 1)})" if last + 1 < 1 << 64 else "")
            )
        print()
    mark = "ok    " if result.ok else "FAILED"
    print(f"{mark} {result.microseconds:>10,.0f} µs  {result.name}", flush=True)
    print(f"                      {result.seen}", flush=True)


def _print_figures(figures: Sequence[Figures]) -> None:
    step = format_size(STEP)
    rows = {
        f"grow by {step}": [f"{one.grow:,.0f} µs" for one in figures],
        f"shrink by {step}": [f"{one.shrink:,.0f} µs" for one in figures],
        "mappings": [str(one.mappings) for one in figures],
        "out of the device's reach": [format_size(one.out_of_reach) for one in figures],
        "copies lost": [f"{one.copies.lost} of {one.copies.made}" if one.copies else "" for one in figures],
    }
    print()
    print_table(["", *(one.policy for one in figures)], [[name, *cells] for name, cells in rows.items() if any(cells)])


def _figures_report(figures: Figures) -> dict[str, Json]:
    copies = figures.copies
    return {
        "policy": figures.policy,
        "grow_us": figures.grow,
        "shrink_us": figures.shrink,
        "mappings": figures.mappings,
        "out_of_reach_bytes": figures.out_of_reach,
        "copies": None if copies is None else copies.made,
        "copies_lost": None if copies is None else copies.lost,
        "resizes_meanwhile": None if copies is None else copies.calls,
    }


def _report(job: MainJob | SideBySide, results: Sequence[StepResult], *, world: str, ok: bool) -> dict[str, Json]:
    policies: dict[str, Json] = {}
    if isinstance(job, SideBySide):
        policies["policies"] = [_figures_report(one) for one in job.figures]
    return {
        "ok": ok,
        "world": world,
        "kernel": job.facts.kernel,
        "iommu": job.facts.iommu,
        "iova_ranges": [{"start": start, "last": last} for start, last in job.facts.iova_ranges],
        "block": dict(job.facts.block),
        "steps": [asdict(result) for result in results],
        **policies,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `scripts/demo`; its exit status: 0 when every step held, 1 when one did not or something is missing."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.device is not None:
        if options.kernel or options.iommu:
            parser.error("--kernel and --iommu belong to a virtual machine or a fake, not to --device")
        return _run_on_device(options)
    if options.guest:
        return _run_in_guest(options)
    asked_for_vm = options.vm or options.kernel or options.iommu
    if options.fake or not (asked_for_vm or _has_machine()):
        return _run_on_fake(options)
    return _run_in_vm(options)


if __name__ == "__main__":
    run(main, name=NAME)
