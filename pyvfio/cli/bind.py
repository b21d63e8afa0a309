"""`scripts/bind`: give PCI devices to vfio-pci, or to another driver, each wholly or not at all."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from pyvfio import pci
from pyvfio.cli.common import (
    FAILED,
    OK,
    Interruptions,
    Json,
    bdf_argument,
    complain,
    driver_argument,
    print_json,
    run,
)
from pyvfio.errors import VfioError
from pyvfio.kernel import Kernel, LinuxKernel
from pyvfio.pci.sysfs import printable

NAME = "bind"


def change_parser(name: str, description: str) -> argparse.ArgumentParser:
    """The arguments that bind and unbind have in common."""
    parser = argparse.ArgumentParser(prog=name, description=description)
    parser.add_argument("bdf", nargs="*", type=bdf_argument, metavar="BDF", help="PCI address, e.g. 0000:00:02.0")
    parser.add_argument("--group", type=int, metavar="N", help="all devices of this IOMMU group but its bridges")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be written to sysfs, and write nothing"
    )
    parser.add_argument("--force", action="store_true", help="although an interface is up or a disk in use on it")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def chosen(kernel: Kernel, parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    """The devices that a command line names: by address, or as the PCI devices of a group, bridges left alone."""
    if bool(options.bdf) == (options.group is not None):
        parser.error("name either devices by their BDF or one --group")
    if options.group is None:
        return list(dict.fromkeys(options.bdf))
    try:
        members = {member.bdf for member in pci.group_members(kernel, options.group)}
        devices = pci.enumerate_devices(kernel)
    except VfioError as error:
        if options.json:
            print_json([_failed(None, error)])
        raise
    return [device.bdf for device in devices if device.bdf in members and not device.is_bridge]


def change_each(
    name: str, choose: Callable[[], Sequence[str]], options: argparse.Namespace, change: Callable[[str], pci.Binding]
) -> int:
    """Change each device that `choose` names, say what came of it, and go on with the next; status 0 when all came
    true.

    When a signal asks for the end, the change that is under way is finished or undone first, and no other is begun. As
    JSON one document is printed in any case, with a result for each device.
    """
    results: list[Json] = []
    status = OK
    with Interruptions() as asked:
        bdfs = choose()
        try:
            for bdf in bdfs:
                try:
                    asked.check(bdf)
                    binding = change(bdf)
                except (VfioError, OSError) as error:
                    complain(name, error)
                    results.append(_failed(bdf, error))
                    status = FAILED
                else:
                    results.append(_as_json(binding, dry_run=options.dry_run))
                    if not options.json:
                        print(_in_words(binding, dry_run=options.dry_run), flush=True)
        finally:
            if options.json:
                print_json(results)
    return asked.status(status)


def _failed(bdf: str | None, error: Exception) -> Json:
    return {"bdf": bdf, "done": False, "error": str(error)}


def _as_json(binding: pci.Binding, *, dry_run: bool) -> Json:
    return {
        "bdf": binding.bdf,
        "done": not dry_run,
        "error": None,
        "driver": binding.driver,
        "former_driver": binding.former_driver,
        "former_override": binding.former_override,
        "steps": [{"path": str(step.path), "value": step.value} for step in binding.steps],
    }


def _in_words(binding: pci.Binding, *, dry_run: bool) -> str:
    driver, former = printable(binding.driver or "no driver"), printable(binding.former_driver or "no driver")
    if not binding.steps:
        return f"{binding.bdf}: {driver} already"
    if dry_run:
        return "\n".join([f"# {binding.bdf}, which has {former}", *map(str, binding.steps)])
    override = f", driver_override {printable(binding.former_override)}" if binding.former_override else ""
    return f"{binding.bdf}: {driver} (was: {former}{override})"


def warn_of_blockers(kernel: Kernel, bdfs: Sequence[str]) -> None:
    """Say on stderr which groups cannot be used yet, and because of which devices."""
    groups = {pci.read_device(kernel, bdf).iommu_group for bdf in bdfs}
    for group in sorted(group for group in groups if group is not None):
        blockers = [member for member in pci.group_members(kernel, group) if member.blocks]
        if blockers:
            names = ", ".join(f"{member.bdf} ({member.driver})" for member in blockers)
            complain(NAME, f"IOMMU group {group} is not viable yet, because of {names}; see {NAME} --group {group}")


def main(
    arguments: Sequence[str] | None = None,
    *,
    kernel: Kernel | None = None,
    write: pci.SysfsWriter = pci.write_sysfs,
) -> int:
    """Bind what was asked for; status 0 only if all came true."""
    parser = change_parser(
        NAME, "Bind PCI devices to vfio-pci. Prints the former driver of each; when one fails, it is as it was before."
    )
    parser.add_argument(
        "--driver",
        default=pci.VFIO_PCI,
        type=driver_argument,
        metavar="D",
        help=f"bind to this driver instead ({pci.NO_DRIVER}: leave without)",
    )
    options = parser.parse_args(arguments)
    kernel = kernel or LinuxKernel()
    bdfs: list[str] = []

    def choose() -> list[str]:
        bdfs.extend(chosen(kernel, parser, options))
        return bdfs

    def change(bdf: str) -> pci.Binding:
        return pci.bind(kernel, bdf, options.driver, dry_run=options.dry_run, force=options.force, write=write)

    status = change_each(NAME, choose, options, change)
    if status == OK and options.driver == pci.VFIO_PCI and not options.dry_run:
        warn_of_blockers(kernel, bdfs)
    return status


if __name__ == "__main__":
    run(main, name=NAME)
