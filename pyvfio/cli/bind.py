"""`pyvfio bind`: bind PCI devices to vfio-pci or another driver, give rights on nodes, and keep bindings at reboot."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from pyvfio import pci
from pyvfio.cli.changes import (
    SCHEMA,
    Change,
    Tools,
    UndoFile,
    as_json,
    as_script,
    failed,
    in_words,
    undo_after,
)
from pyvfio.cli.common import (
    FAILED,
    OK,
    Interruptions,
    Json,
    bdf_argument,
    complain,
    driver_argument,
    print_document,
    print_table,
    run,
)
from pyvfio.cli.parser import Parser
from pyvfio.errors import DeviceNotFoundError, VfioError
from pyvfio.kernel import Kernel, LinuxKernel
from pyvfio.pci.persistence import ETC
from pyvfio.pci.rights import commands_for

NAME = "pyvfio bind"
PERSISTED_SCHEMA = "pyvfio.persisted/1"


def change_parser(name: str, description: str, *, examples: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser with the arguments that bind and unbind have in common."""
    parser = Parser(name, description, examples=examples)
    parser.add_argument("bdf", nargs="*", type=bdf_argument, metavar="BDF", help="PCI address, e.g. 0000:00:02.0")
    parser.add_argument("--group", type=int, metavar="N", help="all devices of IOMMU group N except bridges")
    parser.add_argument("--dry-run", action="store_true", help="print the changes as shell commands, change nothing")
    parser.add_argument(
        "--force", action="store_true", help="change the driver although an interface is up or a disk is in use"
    )
    parser.add_argument("--json", action="store_true", help=f"print a JSON document, {SCHEMA}")
    return parser


def chosen(kernel: Kernel, parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    """Return the devices that a command line names: by address, or all PCI devices of a group except bridges."""
    if bool(options.bdf) == (options.group is not None):
        parser.error("name either devices by their BDF or one --group")
    if options.group is None:
        return list(dict.fromkeys(options.bdf))
    members = {member.bdf for member in pci.group_members(options.group, kernel=kernel)}
    return [device.bdf for device in pci.devices(kernel=kernel) if device.bdf in members and not device.is_bridge]


def change_each(
    name: str,
    choose: Callable[[], Sequence[str]],
    options: argparse.Namespace,
    change: Callable[[str], Change],
    *,
    rights: Callable[[str], Sequence[str]] = lambda _bdf: (),
) -> int:
    """Change each device that `choose` returns, and report each. A failure does not stop the next device.

    The status is 0 if all changes are done. A signal lets the change in progress be finished or undone, and stops the
    rest. With `--json` one document is printed in any case, with a result for each device. `rights` returns the shell
    commands of the rights for `--dry-run`.
    """
    results: list[Json] = []
    status = OK
    with Interruptions() as asked:
        bdfs = _choose(choose, options)
        try:
            for bdf in bdfs:
                try:
                    asked.check(bdf)
                    done = change(bdf)
                except (VfioError, OSError) as error:
                    complain(name, error)
                    results.append(failed(bdf, error))
                    status = FAILED
                else:
                    results.append(as_json(bdf, done, dry_run=options.dry_run))
                    if not options.json:
                        text = as_script(bdf, done, rights(bdf)) if options.dry_run else f"{bdf}: {in_words(done)}"
                        print(text, flush=True)
        finally:
            if options.json:
                print_document(SCHEMA, results=results)
    return asked.status(status)


def _choose(choose: Callable[[], Sequence[str]], options: argparse.Namespace) -> Sequence[str]:
    try:
        return choose()
    except (VfioError, OSError) as error:
        if options.json:
            print_document(SCHEMA, results=[failed(None, error)])
        raise


def warn_of_blockers(kernel: Kernel, bdfs: Sequence[str]) -> None:
    """Write to stderr which groups are not viable yet, and which devices block them."""
    groups = {pci.read_device(bdf, kernel=kernel).iommu_group for bdf in bdfs}
    for group in sorted(group for group in groups if group is not None):
        blockers = [member for member in pci.group_members(group, kernel=kernel) if member.blocks]
        if blockers:
            names = ", ".join(f"{member.bdf} ({member.driver})" for member in blockers)
            complain(NAME, f"group {group} is not viable yet, because of {names}; see pyvfio list --group {group}")


# --- bind --------------------------------------------------------------------------------------------------------


class _Binder:
    """Binds one device after the other as the options say, each wholly or not at all."""

    def __init__(self, options: argparse.Namespace, tools: Tools) -> None:
        self.options = options
        self.tools = tools
        self.rights: pci.Rights | None = None
        self.record: UndoFile | None = None

    def prepare(self) -> None:
        """Look up the user, and check the record. Raises VfioError before the first change."""
        if self.options.user is not None:
            self.rights = pci.Rights.parse(self.options.user)
        if self.options.undo is not None:
            self.record = UndoFile(self.options.undo)

    def __call__(self, bdf: str) -> Change:
        """Bind a device."""
        options, tools = self.options, self.tools
        # A rule that cannot be written is refused before the driver is changed.
        rule = self._persist(bdf, dry_run=True)
        binding = pci.bind(
            bdf,
            options.driver,
            rights=self.rights,
            dry_run=options.dry_run,
            force=options.force,
            kernel=tools.kernel,
            write=tools.write,
            own=tools.own,
        )
        if options.dry_run:
            return Change(binding, rule)
        change = Change(binding)
        try:
            change = Change(binding, self._persist(bdf, dry_run=False))
            if self.record is not None:
                self.record.add(bdf, change)
        except (VfioError, OSError) as error:
            undo_after(error, change, tools)
            raise
        return change

    def _persist(self, bdf: str, *, dry_run: bool) -> pci.RuleChange | None:
        if not self.options.persist:
            return None
        return pci.persist(
            bdf,
            self.options.driver,
            rights=self.rights,
            dry_run=dry_run,
            kernel=self.tools.kernel,
            etc=self.tools.etc,
        )

    def commands(self, bdf: str) -> list[str]:
        """Return the shell commands that give the rights, for a dry run."""
        if self.rights is None:
            return []
        device = pci.read_device(bdf, kernel=self.tools.kernel)
        return commands_for(self.tools.kernel, device, self.rights)


# --- Persistent bindings -----------------------------------------------------------------------------------------


def _driver_now(kernel: Kernel, each: pci.PersistentBinding) -> tuple[bool, str | None]:
    """Return whether the device of a persistent binding is present, and the driver of the device."""
    try:
        device = pci.read_device(each.bdf, kernel=kernel)
    except DeviceNotFoundError:
        return False, None
    return (device.vendor, device.device) == (each.vendor, each.device), device.driver


def _persisted_as_json(kernel: Kernel, each: pci.PersistentBinding, etc: Path) -> dict[str, Json]:
    present, driver = _driver_now(kernel, each)
    return {
        "bdf": each.bdf,
        "vendor": f"{each.vendor:04x}",
        "device": f"{each.device:04x}",
        "driver": each.driver,
        "user": None if each.rights is None else each.rights.user,
        "group": None if each.rights is None else each.rights.group,
        "rule": str(etc / "udev/rules.d" / f"60-pyvfio-{each.bdf}.rules"),
        "present": present,
        "driver_now": driver,
    }


def show_persisted(tools: Tools, *, as_document: bool) -> int:
    """Print all persistent bindings."""
    rows = [_persisted_as_json(tools.kernel, each, tools.etc) for each in pci.persisted(etc=tools.etc)]
    if as_document:
        print_document(PERSISTED_SCHEMA, devices=rows)
        return OK
    header = ("BDF", "ID", "DRIVER", "USER", "GROUP", "NOW")
    table = []
    for row in rows:
        now = (row["driver_now"] or "no driver") if row["present"] else "not present"
        numbers = ["" if row[key] is None else str(row[key]) for key in ("user", "group")]
        table.append([str(row["bdf"]), f"{row['vendor']}:{row['device']}", str(row["driver"]), *numbers, str(now)])
    print_table(header, table)
    return OK


# --- The command -------------------------------------------------------------------------------------------------


def rights_argument(text: str) -> str:
    """Check the form of USER, USER:GROUP or :GROUP, for `type=` of an argument. Unknown names are found later."""
    try:
        pci.Rights.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    except VfioError:
        pass
    return text


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments."""
    parser = change_parser(
        NAME,
        "Bind PCI devices to vfio-pci. Each device is changed wholly or not at all.",
        examples=[
            "pyvfio bind 0000:00:02.0",
            "pyvfio bind --user alice 0000:00:02.0",
            "pyvfio bind --user :kvm --persist --group 7",
            "pyvfio bind --forget 0000:00:02.0",
            "pyvfio bind --undo FILE --group 7",
        ],
    )
    parser.add_argument(
        "--driver",
        default=pci.VFIO_PCI,
        type=driver_argument,
        metavar="D",
        help=f"bind to driver D instead ({pci.NO_DRIVER}: leave without a driver)",
    )
    parser.add_argument(
        "--user",
        type=rights_argument,
        metavar="USER[:GROUP]",
        help="let a user, a group (:GROUP) or both open the device: rights on nodes below /dev/vfio, and on /dev/iommu",
    )
    parser.add_argument(
        "--persist", action="store_true", help="also at each boot and hot-plug, by a rule in /etc/udev/rules.d"
    )
    parser.add_argument("--forget", action="store_true", help="remove the rules of --persist; keep the drivers for now")
    parser.add_argument("--persisted", action="store_true", help="list the devices with rules of --persist")
    parser.add_argument(
        "--undo", type=Path, metavar="FILE", help="write a new FILE for `pyvfio unbind --undo FILE`, which undoes all"
    )
    return parser


def _check_modes(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    binds = options.persist or options.user is not None or options.undo is not None
    if options.persisted and (options.bdf or options.group is not None or options.forget or options.dry_run or binds):
        parser.error("--persisted lists all devices and takes no other argument than --json")
    if options.forget and (binds or options.driver != pci.VFIO_PCI):
        parser.error("--forget removes rules; it takes no --driver, --user, --persist or --undo")
    if options.undo is not None and options.dry_run:
        parser.error("--undo writes FILE after a change, and --dry-run changes nothing")
    if options.undo is not None and not options.bdf and options.group is None:
        parser.error(f"name devices to bind; to undo a bind: pyvfio unbind --undo {options.undo}")


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
    _check_modes(parser, options)
    tools = Tools(kernel or LinuxKernel(), write, own, etc)
    if options.persisted:
        return show_persisted(tools, as_document=options.json)
    if options.forget:
        return _forget(parser, options, tools)
    binder = _Binder(options, tools)
    bdfs: list[str] = []

    def choose() -> list[str]:
        bdfs.extend(chosen(tools.kernel, parser, options))
        binder.prepare()
        return bdfs

    status = change_each(NAME, choose, options, binder, rights=binder.commands)
    if status == OK and options.driver == pci.VFIO_PCI and not options.dry_run:
        warn_of_blockers(tools.kernel, bdfs)
    return status


def _forget(parser: argparse.ArgumentParser, options: argparse.Namespace, tools: Tools) -> int:
    def forget(bdf: str) -> Change:
        return Change(rule=pci.forget(bdf, dry_run=options.dry_run, etc=tools.etc))

    return change_each(NAME, lambda: chosen(tools.kernel, parser, options), options, forget)


if __name__ == "__main__":
    run(main, name=NAME)
