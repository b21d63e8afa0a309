"""`pyvfio unbind`: return PCI devices to the kernel's own drivers, or undo the changes of `pyvfio bind --undo FILE`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pyvfio import pci
from pyvfio.cli.bind import change_each, change_parser, chosen
from pyvfio.cli.changes import Change, Tools, read_changes, remove_done, undo
from pyvfio.cli.common import OK, complain, driver_argument, run
from pyvfio.errors import VfioError
from pyvfio.kernel import Kernel, LinuxKernel
from pyvfio.pci.persistence import ETC

NAME = "pyvfio unbind"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments."""
    parser = change_parser(
        NAME,
        "Clear the driver_override of PCI devices and let the kernel's own drivers bind them again. Each device is "
        "changed wholly or not at all.",
        examples=["pyvfio unbind 0000:00:02.0", "pyvfio unbind --group 7 --json", "pyvfio unbind --undo FILE"],
    )
    parser.add_argument(
        "--driver",
        type=driver_argument,
        metavar="D",
        help=f"bind to driver D instead ({pci.NO_DRIVER}: leave without a driver)",
    )
    parser.add_argument(
        "--undo",
        type=Path,
        metavar="FILE",
        help="restore the drivers, overrides, rights and rules from before the changes in FILE; remove FILE afterwards",
    )
    return parser


def main(
    arguments: Sequence[str] | None = None,
    *,
    kernel: Kernel | None = None,
    write: pci.SysfsWriter = pci.write_sysfs,
    own: pci.NodeOwner = pci.set_ownership,
    etc: Path = ETC,
) -> int:
    """Run the command. The status is 0 only if all changes are done."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    tools = Tools(kernel or LinuxKernel(), write, own, etc)
    if options.undo is not None:
        return _undo(parser, options, tools)

    def change(bdf: str) -> Change:
        binding = pci.unbind(
            bdf, to=options.driver, dry_run=options.dry_run, force=options.force, kernel=tools.kernel, write=write
        )
        if not options.dry_run:
            _warn_of_rule(bdf, etc)
        return Change(binding)

    return change_each(NAME, lambda: chosen(tools.kernel, parser, options), options, change)


def _undo(parser: argparse.ArgumentParser, options: argparse.Namespace, tools: Tools) -> int:
    if options.bdf or options.group is not None or options.driver is not None:
        parser.error("--undo FILE takes the devices and drivers from FILE: no BDF, --group or --driver")
    changes: dict[str, Change] = {}

    def choose() -> list[str]:
        changes.update(read_changes(options.undo, tools.kernel))
        return list(changes)

    def change(bdf: str) -> Change:
        return undo(changes[bdf], tools, dry_run=options.dry_run, force=options.force)

    status = change_each(NAME, choose, options, change)
    if status == OK and not options.dry_run:
        remove_done(options.undo)
    return status


def _warn_of_rule(bdf: str, etc: Path) -> None:
    """Write to stderr if a rule will bind the device again."""
    try:
        rules = {each.bdf: each for each in pci.persisted(etc=etc)}
    except VfioError as error:
        complain(NAME, error)
        return
    if bdf in rules:
        complain(
            NAME,
            f"{bdf} will be bound to {rules[bdf].driver} at the next boot; to end this: pyvfio bind --forget {bdf}",
        )


if __name__ == "__main__":
    run(main, name=NAME)
