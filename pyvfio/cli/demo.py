"""`pyvfio demo`: show the main job, or compare the resize policies.

The demo runs on a device of this machine, on a real kernel in a virtual machine, or on the fake kernel.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO, cast

from pyvfio import pci
from pyvfio.cli.common import FAILED, OK, WRONG_USAGE, Json, bdf_argument, complain, print_document, print_table, run
from pyvfio.cli.guest_pictures import PictureFilter, line_of
from pyvfio.cli.main_job import MainJob, StepResult
from pyvfio.cli.parser import Parser, iommu_argument
from pyvfio.cli.side_by_side import STEP, Figures, Policy, SideBySide
from pyvfio.diagnosis.examination import ADDRESS_SPACES
from pyvfio.errors import DeviceNotFoundError, VfioError
from pyvfio.kernel import LinuxKernel
from pyvfio.picture import Picture, svg_of
from pyvfio.testing import kernels, vm, vm_errors
from pyvfio.testing.edu import EDU_ID
from pyvfio.testing.fake import VERSIONS, FakeKernel
from pyvfio.testing.world import FakeWorld, LinuxWorld, World, WorldName
from pyvfio.units import format_size

NAME = "pyvfio demo"
SCHEMA = "pyvfio.demo/1"
_TIMEOUT = 1500.0
_WAYS: dict[str, tuple[Policy, ...]] = {
    "remap": ("remap",),
    "extend": ("remap", "extend"),
    "cut": ("remap", "extend", "cut"),
}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments."""
    parser = Parser(
        NAME,
        "Show a RAM block that grows and shrinks in an I/O address space: the device reads and writes the block, and "
        "the IOMMU stops a write outside the block. By default, the demo runs on a real kernel in a virtual machine, "
        "or on the fake kernel if QEMU is missing.",
        examples=[
            "pyvfio demo",
            "pyvfio demo --fake",
            "pyvfio demo --device 0000:00:02.0",
            "pyvfio demo --resize remap",
            "pyvfio demo --space iommufd --resize cut",
        ],
    )
    worlds = parser.add_mutually_exclusive_group()
    worlds.add_argument(
        "--device", type=bdf_argument, metavar="BDF", help="a device of this machine that is bound to vfio-pci"
    )
    worlds.add_argument("--vm", action="store_true", help="a virtual machine with an edu device (the default)")
    worlds.add_argument(
        "--fake",
        nargs="?",
        const="",
        metavar="KERNEL",
        help=f"the fake kernel ({', '.join(VERSIONS)}), with a fake edu device; takes a second",
    )
    worlds.add_argument("--guest", action="store_true", help=argparse.SUPPRESS)
    names = "|".join([*kernels.LINES, "FILE"])
    parser.add_argument(
        "--kernel",
        metavar=names,
        help="default: 6.12, or 7+iommufd with --space iommufd; with --fake: as --fake KERNEL",
    )
    parser.add_argument(
        "--iommu",
        type=iommu_argument,
        choices=list(vm.IOMMUS),
        help="the IOMMU of the virtual machine or of the fake kernel, not with --device; default: intel",
    )
    parser.add_argument(
        "--space",
        choices=ADDRESS_SPACES,
        help="the address space; by default type1, or iommufd where the machine has no type1",
    )
    parser.add_argument(
        "--resize",
        choices=list(_WAYS),
        help="measure resizes while the device copies: under remap; under both remap and extend with granules; or "
        "under these and cut, which needs --space iommufd",
    )
    parser.add_argument(
        "--svg", type=Path, metavar="FILE", help="draw the IOVA space before and after a grow and a shrink into FILE"
    )
    parser.add_argument("--guest-pictures", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help=f"print a JSON document, {SCHEMA}")
    return parser


def _run_in_vm(options: argparse.Namespace) -> int:
    default = "7+iommufd" if options.space == "iommufd" else "6.12"
    kernel, iommu = options.kernel or default, options.iommu or "intel"
    words = [sys.executable, "-m", "pyvfio.cli.demo", "--guest", "--iommu", iommu]
    words += ["--space", options.space] if options.space else []
    words += ["--resize", options.resize] if options.resize else []
    words += ["--guest-pictures"] if options.svg else []
    stdout = PictureFilter(sys.stdout.buffer)
    time = "about a minute" if options.resize else "about ten seconds"
    complain(NAME, f"booting kernel {kernel} with {iommu} IOMMU in QEMU: {time}")
    try:
        result = vm.run(
            [*words, *(["--json"] if options.json else [])],
            kernel=kernel,
            iommu=iommu,
            timeout=_TIMEOUT,
            # If PYTHONPATH leads to this package here, Python in the machine needs the same PYTHONPATH.
            env={"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {},
            stdout=cast(BinaryIO, stdout),
            stderr=sys.stderr.buffer,
        )
    except ValueError as error:  # the kernel does not support the IOMMU
        complain(NAME, error)
        return WRONG_USAGE
    except vm.VmError as error:
        if error.log:
            print(*error.log.splitlines()[-40:], sep="\n", file=sys.stderr)
        raise
    _write_svg(options, stdout.finish())
    return result.status


def _write_svg(options: argparse.Namespace, pictures: Sequence[Picture]) -> None:
    if options.svg is not None and pictures:
        options.svg.write_text(svg_of(pictures), encoding="utf-8")


def _job(bdf: str, world: World, options: argparse.Namespace, *, iommu: str | None = None) -> MainJob | SideBySide:
    if options.resize:
        return SideBySide(bdf, world=world, ways=_WAYS[options.resize], iommu=iommu, space=options.space)
    return MainJob(bdf, world=world, iommu=iommu, space=options.space)


def _run_in_guest(options: argparse.Namespace) -> int:
    kernel = LinuxKernel()
    found = [device for device in pci.devices(kernel=kernel) if (device.vendor, device.device) == EDU_ID]
    if not found:
        raise DeviceNotFoundError("this virtual machine has no edu device")
    with ExitStack() as stack:
        stack.callback(pci.restore, pci.bind(found[0].bdf, kernel=kernel), kernel=kernel)
        world = LinuxWorld([found[0].bdf], name=WorldName.VM)
        job = _job(found[0].bdf, world, options, iommu=options.iommu)
        status = _show(job, world="vm", as_json=options.json)
        if options.guest_pictures:
            print(line_of(_pictures(job)), flush=True)
        return status


def _run_on_device(options: argparse.Namespace) -> int:
    job = _job(options.device, LinuxWorld([options.device]), options)
    status = _show(job, world="device", as_json=options.json)
    _write_svg(options, _pictures(job))
    return status


def _run_on_fake(options: argparse.Namespace) -> int:
    try:
        fake = _fake_kernel(options.fake or options.kernel, iommu=options.iommu or "intel", space=options.space)
    except ValueError as error:
        complain(NAME, error)
        return WRONG_USAGE
    with fake:
        job = _job(fake.bdfs[0], FakeWorld(fake), options, iommu=options.iommu or "intel")
        status = _show(job, world="fake", as_json=options.json)
        fake.check()
    _write_svg(options, _pictures(job))
    return status


def _fake_kernel(version: str | None, *, iommu: str = "intel", space: str | None) -> FakeKernel:
    """Return a fake kernel that has the address space. `version` None: the default. Raises as `FakeKernel`."""
    version = version or ("7.3" if space == "iommufd" else "6.12")
    has_iommufd = space == "iommufd" or version.endswith("+iommufd")
    return FakeKernel(version.removesuffix("+iommufd"), iommu=iommu, iommufd=has_iommufd)


def _has_machine() -> bool:
    try:
        vm_errors.find_tool("qemu-system-x86_64", package="qemu-system-x86")
    except vm_errors.MissingToolError as error:
        complain(NAME, f"{error}: the demo runs on the fake kernel instead. {error.hint}")
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
        results.append(StepResult(name="error", ok=False, microseconds=0.0, seen=str(error)))
    ok = all(result.ok for result in results)
    if as_json:
        print_document(SCHEMA, **_report(job, results, world=world, ok=ok))
    else:
        if isinstance(job, SideBySide) and ok:
            _print_figures(job.figures)
        print("\nEvery step held." if ok else "\nThe last step did NOT hold.")
    return OK if ok else FAILED


def _pictures(job: MainJob | SideBySide) -> list[Picture]:
    return job.pictures if isinstance(job, MainJob) else []


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
        "space": job.facts.space,
        "why": job.facts.why,
        "iova_ranges": [{"start": start, "last": last} for start, last in job.facts.iova_ranges],
        "block": dict(job.facts.block),
        "steps": [asdict(result) for result in results],
        "pictures": [cast(Json, picture.to_json()) for picture in _pictures(job)],
        **policies,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `pyvfio demo`. Return 0 if every step held, 1 if a step did not hold or a tool or device is missing."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.svg and options.resize:
        parser.error("--svg draws the main job: leave out --resize")
    if options.resize == "cut" and options.space != "iommufd":
        parser.error("--resize cut needs --space iommufd: type1 cannot unmap part of a mapping")
    if options.device is not None:
        if options.kernel or options.iommu:
            parser.error("--kernel and --iommu choose a virtual machine or a fake kernel: leave them out with --device")
        return _run_on_device(options)
    if options.guest:
        return _run_in_guest(options)
    if options.fake and options.kernel:
        parser.error("--fake and --kernel name a kernel each: leave one out")
    asked_for_vm = options.vm or options.kernel or options.iommu
    if options.fake is not None or not (asked_for_vm or _has_machine()):
        return _run_on_fake(options)
    return _run_in_vm(options)


if __name__ == "__main__":
    run(main, name=NAME)
