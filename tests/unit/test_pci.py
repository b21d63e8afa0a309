"""pyvfio.pci on a tree that looks like sysfs."""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyvfio import pci
from pyvfio.errors import (
    AccessDeniedError,
    DeviceNotFoundError,
    GroupBusyError,
    GroupMember,
    RollbackError,
    UnavailableError,
    UnsupportedError,
    VfioError,
)
from pyvfio.kernel import LinuxKernel
from pyvfio.pci.sysfs import read_text
from pyvfio.pci.usage import hidden_interfaces
from tests.interruptions.points import Walk
from tests.unit.processes import open_fds
from tests.unit.sysfs import BRIDGE, DISK, HOST_BRIDGE, ISA_BRIDGE, SysfsTree, link, place_process

BDF = "0000:00:02.0"
OVERRIDE = f"bus/pci/devices/{BDF}/driver_override"


@pytest.fixture
def tree(tmp_path: Path) -> SysfsTree:
    """A machine with an IOMMU and one network device, bound to e1000e."""
    tree = SysfsTree(tmp_path)
    tree.add_device(BDF, driver="e1000e", group=7)
    (tree.sysfs / "class/iommu/dmar0").mkdir(parents=True)
    return tree


def bind(tree: SysfsTree, driver: str = "vfio-pci", *, force: bool = False, patience: float = 0.0) -> pci.Binding:
    return pci.bind(BDF, driver, force=force, patience=patience, write=tree.write, kernel=tree.kernel)


def unbind(tree: SysfsTree, to: str | None = None) -> pci.Binding:
    return pci.unbind(BDF, to=to, patience=0.0, write=tree.write, kernel=tree.kernel)


def placed(tree: SysfsTree) -> tuple[str | None, str | None]:
    return tree.driver_of(BDF), tree.override_of(BDF)


def failing(number: int, *places: str) -> Callable[[str, str], OSError | None]:
    """Return a failure with this errno for writes to files whose path ends in one of `places`."""
    return lambda path, _value: OSError(number, os.strerror(number)) if path.endswith(places) else None


# --- Addresses


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("0000:00:02.0", "0000:00:02.0"),
        ("00:02.0", "0000:00:02.0"),
        ("00:1F.7", "0000:00:1f.7"),
        (" 10000:E1:00.0\n", "10000:e1:00.0"),
    ],
)
def test_an_address_is_known_in_every_way_it_is_written(text: str, canonical: str) -> None:
    assert pci.parse_bdf(text) == canonical


@pytest.mark.parametrize("text", ["", "00:02", "00:20.0", "00:02.8", "0:00:02.0", "00:02.0.0", "../00:02.0", "eth0"])
def test_what_is_no_address_is_an_error_that_shows_one(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected .* such as 0000:00:02\.0"):
        pci.parse_bdf(text)


# --- Devices


def test_a_device_is_read_as_sysfs_shows_it(tree: SysfsTree) -> None:
    tree.add_device("0000:01:00.0", driver="vfio-pci", group=8, override="vfio-pci", numa_node=1, class_code=DISK)
    assert pci.read_device("01:00.0", kernel=tree.kernel) == pci.PciDevice(
        bdf="0000:01:00.0",
        vendor=0x8086,
        device=0x10D3,
        class_code=DISK,
        driver="vfio-pci",
        driver_override="vfio-pci",
        iommu_group=8,
        numa_node=1,
        is_bridge=False,
        is_vfio=True,
    )


def test_a_device_without_driver_override_and_node_has_none_of_them(tree: SysfsTree) -> None:
    tree.add_device("0000:01:00.0")
    device = pci.read_device("0000:01:00.0", kernel=tree.kernel)
    assert (device.driver, device.driver_override, device.numa_node, device.iommu_group) == (None, None, None, None)


def test_a_file_is_read_to_its_end(tmp_path: Path) -> None:
    """However many reads that takes; a carriage return stays, and a directory has no text."""
    text = "a\rb\x85\u1234" * 5000
    (tmp_path / "file").write_text(text + "\n", encoding="utf-8", newline="")
    assert read_text(tmp_path / "file") == text
    assert read_text(str(tmp_path / "file")) == text
    assert read_text(tmp_path) is None
    assert read_text(tmp_path / "missing") is None


def test_a_missing_device_is_an_error_that_names_those_on_its_bus(tree: SysfsTree) -> None:
    with pytest.raises(DeviceNotFoundError, match=r"no PCI device 0000:00:03\.0\. Bus 0000:00 has .*00:02\.0"):
        pci.read_device("00:03.0", kernel=tree.kernel)


def test_a_missing_bus_is_an_error_that_names_the_nearest_device(tree: SysfsTree) -> None:
    with pytest.raises(DeviceNotFoundError, match=r"no bus 0000:05; the nearest devices are 0000:00:02\.0"):
        pci.read_device("05:02.0", kernel=tree.kernel)


def test_a_machine_without_pci_says_so(tmp_path: Path) -> None:
    kernel = LinuxKernel(sysfs=tmp_path)
    assert pci.devices(kernel=kernel) == ()
    with pytest.raises(DeviceNotFoundError, match=r"has no PCI device at all"):
        pci.read_device(BDF, kernel=kernel)


def test_devices_are_enumerated_in_the_order_of_their_addresses(tree: SysfsTree) -> None:
    for bdf in ("0000:01:00.0", "0000:00:1f.0"):
        tree.add_device(bdf)
    found = [device.bdf for device in pci.devices(kernel=tree.kernel)]
    assert found == [BDF, "0000:00:1f.0", "0000:01:00.0"]


def test_the_running_machine_is_enumerated_as_its_directory_shows_it() -> None:
    directory = Path("/sys/bus/pci/devices")
    if not directory.is_dir():
        pytest.skip("no PCI bus here")
    assert [device.bdf for device in pci.devices(kernel=LinuxKernel())] == sorted(os.listdir(directory))


def test_events_are_the_running_machines_only(tree: SysfsTree) -> None:
    with pytest.raises(ValueError, match="running machine"):
        pci.monitor(kernel=tree.kernel)


def test_watching_ends_when_nothing_happens_for_the_time_given() -> None:
    """In a thread: an endless iterator would hang the test. A minute is the limit."""
    try:
        events = pci.monitor(timeout=0.01, kernel=LinuxKernel())
    except UnsupportedError as error:
        pytest.skip(str(error))
    seen: list[pci.PciEvent] = []
    thread = threading.Thread(target=lambda: seen.extend(events), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()


# --- Groups


def test_a_device_knows_its_group(tree: SysfsTree) -> None:
    assert pci.group_of(BDF, kernel=tree.kernel) == 7


@dataclass(frozen=True)
class Ungrouped:
    """A machine on which no device has a group, and the expected reason and remedy."""

    reason: str
    remedy: str
    units: str = ""
    tables: str = ""
    cmdline: str = "quiet"
    cpuinfo: str = "flags\t\t: fpu lahf_lm\n"
    others: bool = True


UNGROUPED = [
    Ungrouped(r"IOMMUs \(dmar0\) covers the device", "a slot or root port", "dmar0", "DMAR", "intel_iommu=on"),
    Ungrouped("no group for any device", "dmesg", "0000:00:01.0", "VIOT", others=False),
    Ungrouped("told not to .*intel_iommu=off", "Remove the option", tables="DMAR", cmdline="quiet intel_iommu=off"),
    Ungrouped("not told to use the IOMMU", "Add intel_iommu=on", tables="DMAR", cmdline="quiet intel_iommu=sm_on"),
    Ungrouped("has not initialized the IOMMU", "dmesg", tables="DMAR", cmdline="intel_iommu=on,sm_on"),
    Ungrouped(r"announces an IOMMU \(IVRS\)", "dmesg", tables="IVRS"),
    Ungrouped("virtual machine", "-device intel-iommu", cpuinfo="flags\t\t: fpu hypervisor lahf_lm\n"),
    Ungrouped("firmware announces no IOMMU", "VT-d", tables="FACP", cmdline="intel_iommu=on"),
]


@pytest.mark.parametrize("machine", UNGROUPED, ids=lambda machine: machine.remedy)
def test_a_device_without_a_group_is_an_error_that_says_why(tmp_path: Path, machine: Ungrouped) -> None:
    tree = SysfsTree(tmp_path)
    tree.add_device(BDF)
    if machine.others:
        tree.add_device("0000:00:1c.0", driver="pcieport", group=1, class_code=BRIDGE)
    (tree.sysfs / "class/iommu" / machine.units).mkdir(parents=True)
    (tree.sysfs / "firmware/acpi/tables" / machine.tables).mkdir(parents=True)
    (tree.proc / "cmdline").write_text(machine.cmdline + "\n")
    (tree.proc / "cpuinfo").write_text(machine.cpuinfo)
    with pytest.raises(DeviceNotFoundError, match=machine.reason) as caught:
        pci.group_of(BDF, kernel=tree.kernel)
    assert machine.remedy in caught.value.hint


def test_a_device_blocks_its_group_when_its_driver_uses_the_kernels_dma(tree: SysfsTree) -> None:
    tree.add_device("0000:00:02.1", driver="vfio-pci", group=7)
    tree.add_device("0000:00:02.2", group=7)
    tree.add_device("0000:00:02.3", driver="pci-stub", group=7)
    tree.add_device("0000:00:1f.0", driver="lpc_ich", group=7, class_code=ISA_BRIDGE)
    tree.add_device("0000:00:00.0", driver="skx_uncore", group=7, class_code=HOST_BRIDGE)
    assert pci.group_members(7, kernel=tree.kernel) == (
        GroupMember("0000:00:00.0", "skx_uncore", blocks=True),
        GroupMember(BDF, "e1000e", blocks=True),
        GroupMember("0000:00:02.1", "vfio-pci", blocks=False),
        GroupMember("0000:00:02.2", None, blocks=False),
        GroupMember("0000:00:02.3", "pci-stub", blocks=False),
        GroupMember("0000:00:1f.0", "lpc_ich", blocks=True),
    )


@pytest.mark.parametrize("driver", ["pcieport", None])
def test_a_bridge_with_the_ports_own_driver_or_none_does_not_block(tree: SysfsTree, driver: str | None) -> None:
    tree.add_device("0000:00:1c.0", driver=driver, group=9, class_code=BRIDGE)
    assert pci.group_members(9, kernel=tree.kernel) == (GroupMember("0000:00:1c.0", driver, blocks=False),)


def test_a_bridge_blocks_with_a_driver_that_uses_its_registers(tree: SysfsTree) -> None:
    tree.add_device("0000:00:1c.0", driver="shpchp", group=9, class_code=BRIDGE)
    assert pci.group_members(9, kernel=tree.kernel) == (GroupMember("0000:00:1c.0", "shpchp", blocks=True),)


def test_a_variant_driver_of_vfio_does_not_block_whatever_its_name(tree: SysfsTree) -> None:
    device = tree.add_device("0000:00:03.0", driver="acme_live_migration", group=9)
    (device / "vfio-dev/vfio0").mkdir(parents=True)
    assert not pci.group_members(9, kernel=tree.kernel)[0].blocks
    assert pci.read_device("0000:00:03.0", kernel=tree.kernel).is_vfio


def test_a_missing_group_is_an_error_that_names_those_there_are(tree: SysfsTree) -> None:
    with pytest.raises(DeviceNotFoundError, match=r"no IOMMU group 8\. The groups are: 7"):
        pci.group_members(8, kernel=tree.kernel)


def test_a_group_has_a_node_by_its_number(tree: SysfsTree) -> None:
    assert pci.group_node(7, kernel=tree.kernel) == tree.dev / "vfio/7"


def test_a_group_without_an_iommu_has_a_node_that_says_so(tree: SysfsTree) -> None:
    (tree.sysfs / "kernel/iommu_groups/7/name").write_text("vfio-noiommu\n")
    assert pci.group_node(7, kernel=tree.kernel) == tree.dev / "vfio/noiommu-7"


# --- Holders


def test_a_process_that_has_a_file_open_is_a_holder_until_it_closes_it(tree: SysfsTree) -> None:
    tree.use_real_proc()
    node = tree.add_group_node(7)
    with node.open():
        assert [holder.pid for holder in pci.holders_of(node, kernel=tree.kernel)] == [os.getpid()]
    assert pci.holders_of(node, kernel=tree.kernel) == ()


def test_a_file_is_known_by_what_it_is_and_not_by_its_name(tree: SysfsTree, tmp_path: Path) -> None:
    node = tree.add_group_node(7)
    other = tmp_path / node.name
    other.touch()
    with other.open():
        assert pci.holders_of(node, kernel=tree.kernel) == ()


def test_a_device_node_is_known_by_its_number(tree: SysfsTree, tmp_path: Path) -> None:
    tree.use_real_proc()
    alias = tmp_path / "zero"
    alias.symlink_to("/dev/zero")
    other = tmp_path / "full"
    other.symlink_to("/dev/full")
    with open("/dev/zero", "rb"):
        (holder,) = [each for each in pci.holders_of(alias, kernel=tree.kernel) if each.pid == os.getpid()]
        assert holder.command == Path("/proc/self/comm").read_text(encoding="utf-8").strip()
        assert os.getpid() not in [each.pid for each in pci.holders_of(other, kernel=tree.kernel)]


def test_nothing_holds_a_file_that_is_not_there(tree: SysfsTree, tmp_path: Path) -> None:
    assert pci.holders_of(tmp_path / "missing", kernel=tree.kernel) == ()
    assert pci.holders_of(tmp_path, kernel=LinuxKernel(proc=tmp_path / "no-proc")) == ()


# --- Binding


def test_binding_overrides_unbinds_and_probes_in_this_order(tree: SysfsTree) -> None:
    binding = bind(tree)
    assert placed(tree) == ("vfio-pci", "vfio-pci")
    assert tree.writes == [
        (OVERRIDE, "vfio-pci\n"),
        ("bus/pci/drivers/e1000e/unbind", f"{BDF}\n"),
        ("bus/pci/drivers_probe", f"{BDF}\n"),
    ]
    assert (binding.driver, binding.former_driver, binding.former_override) == ("vfio-pci", "e1000e", None)
    assert [str(step.path.relative_to(tree.sysfs)) for step in binding.steps] == [path for path, _value in tree.writes]


def test_a_debug_log_has_each_step(tree: SysfsTree, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="pyvfio"):
        binding = bind(tree)
    assert [record.message for record in caplog.records if record.message.startswith("echo")] == [
        str(step) for step in binding.steps
    ]


def test_a_dry_run_plans_the_same_and_writes_nothing(tree: SysfsTree) -> None:
    planned = pci.bind(BDF, dry_run=True, write=tree.write, kernel=tree.kernel)
    assert tree.writes == []
    assert placed(tree) == ("e1000e", None)
    assert planned == bind(tree)


def test_a_step_reads_as_the_shell_command_that_does_the_same(tree: SysfsTree) -> None:
    assert str(bind(tree).steps[0]) == f"echo vfio-pci > {tree.sysfs / OVERRIDE}"
    assert str(unbind(tree).steps[0]) == f"echo > {tree.sysfs / OVERRIDE}"


def test_what_is_bound_already_is_left_alone(tree: SysfsTree) -> None:
    bind(tree)
    tree.writes.clear()
    assert bind(tree).steps == ()
    assert tree.writes == []


def test_restoring_brings_back_the_former_driver_and_override(tree: SysfsTree) -> None:
    binding = bind(tree)
    back = pci.restore(binding, write=tree.write, kernel=tree.kernel)
    assert placed(tree) == ("e1000e", None)
    assert (back.driver, back.former_driver, back.former_override) == ("e1000e", "vfio-pci", "vfio-pci")


def test_restoring_a_device_that_had_no_driver_leaves_it_without(tmp_path: Path) -> None:
    tree = SysfsTree(tmp_path)
    tree.add_device(BDF, matches="e1000e", override="none", group=7)
    pci.restore(bind(tree), write=tree.write, kernel=tree.kernel)
    assert placed(tree) == (None, "none")


def test_restoring_when_the_former_driver_is_gone_says_so_and_changes_nothing(tree: SysfsTree) -> None:
    binding = bind(tree)
    directory = tree.pci / "drivers/e1000e"
    directory.rename(tree.pci / "e1000e")
    with pytest.raises(UnavailableError, match="modprobe e1000e"):
        pci.restore(binding, write=tree.write, kernel=tree.kernel)
    assert placed(tree) == ("vfio-pci", "vfio-pci")


def test_unbinding_gives_the_device_to_the_driver_that_matches_it(tree: SysfsTree) -> None:
    bind(tree)
    assert unbind(tree).driver == "e1000e"
    assert placed(tree) == ("e1000e", None)


def test_unbinding_a_device_that_no_driver_matches_leaves_it_without(tmp_path: Path) -> None:
    tree = SysfsTree(tmp_path)
    tree.add_device(BDF, group=7)
    bind(tree)
    assert unbind(tree).driver is None
    assert placed(tree) == (None, None)


def test_unbinding_a_device_that_only_an_override_keeps_from_its_driver_frees_it(tmp_path: Path) -> None:
    tree = SysfsTree(tmp_path)
    tree.add_device(BDF, matches="e1000e", override="none", group=7)
    assert unbind(tree).driver == "e1000e"


@pytest.mark.parametrize("driver", ["e1000e", None])
def test_unbinding_a_device_without_driver_and_override_lets_the_kernel_choose(
    tmp_path: Path, driver: str | None
) -> None:
    """The device is probed. No error if no driver matches."""
    tree = SysfsTree(tmp_path)
    tree.add_device(BDF, matches=driver, group=7)
    assert unbind(tree).driver == driver
    assert placed(tree) == (driver, None)
    assert "bus/pci/drivers_probe" in {path for path, _value in tree.writes}


def test_unbinding_to_a_named_driver_or_none_does_that(tree: SysfsTree) -> None:
    tree.add_driver("pci-stub")
    unbind(tree, "pci-stub")
    assert placed(tree) == ("pci-stub", "pci-stub")
    unbind(tree, pci.NO_DRIVER)
    assert placed(tree) == (None, "none")


def test_unbinding_leaves_a_device_that_is_at_home_alone(tree: SysfsTree) -> None:
    assert unbind(tree).steps == ()
    assert tree.writes == []


def test_unbinding_from_a_driver_that_takes_the_device_again_is_an_error(tmp_path: Path) -> None:
    tree = SysfsTree(tmp_path)
    tree.add_device(BDF, driver="vfio-pci", group=7)
    with pytest.raises(VfioError, match=r"vfio-pci has bound the device again.*ids="):
        unbind(tree)
    assert placed(tree) == ("vfio-pci", None)


# --- Nothing stays half done


def test_a_driver_that_does_not_take_the_device_is_an_error_and_the_former_one_is_back(tree: SysfsTree) -> None:
    tree.unwilling.add("vfio-pci")
    with pytest.raises(VfioError, match=r"was to have driver vfio-pci, and no driver has bound the device.*dmesg"):
        bind(tree)
    assert placed(tree) == ("e1000e", None)


def test_a_driver_that_takes_the_device_late_is_waited_for(tree: SysfsTree) -> None:
    tree.probes_ignored = 2
    assert bind(tree, patience=1.0).driver == "vfio-pci"


@pytest.mark.parametrize("place", ["driver_override", "e1000e/unbind", "drivers_probe"])
@pytest.mark.parametrize("override", [None, "e1000e"])
def test_a_step_that_fails_leaves_the_device_as_it_was(tmp_path: Path, place: str, override: str | None) -> None:
    tree = SysfsTree(tmp_path)
    tree.add_device(BDF, driver="e1000e", group=7, override=override)
    tree.fail = failing(errno.EIO, place)
    if place == "driver_override":
        # Only its first write: the undo may use the file again.
        tree.fail = lambda path, value: failing(errno.EIO, place)(path, value) if len(tree.writes) == 1 else None
    with pytest.raises(VfioError, match=re.escape(place)) as caught:
        bind(tree)
    assert "EIO" in str(caught.value)
    assert placed(tree) == ("e1000e", override)


@pytest.mark.parametrize("override", [None, "vfio-pci", "e1000e", "none"])
@pytest.mark.parametrize("driver", ["e1000e", "uio_pci_generic", "vfio-pci", None])
def test_a_device_is_as_it_was_whatever_its_override_names(
    tmp_path: Path, driver: str | None, override: str | None
) -> None:
    """The override can be written or cleared after the bind. The undo and `restore` restore driver and override."""
    tree = SysfsTree(tmp_path)
    tree.add_device(BDF, driver=driver, matches="e1000e", override=override, group=7)
    tree.add_driver("igb")
    binding = bind(tree, "igb")
    assert placed(tree) == ("igb", "igb")
    pci.restore(binding, write=tree.write, kernel=tree.kernel)
    assert placed(tree) == (driver, override)
    tree.unwilling.add("igb")
    with pytest.raises(VfioError, match="igb, and no driver has bound the device") as caught:
        bind(tree, "igb")
    assert not isinstance(caught.value, RollbackError)
    assert placed(tree) == (driver, override)


def test_a_failed_unbind_from_a_driver_whose_override_was_cleared_is_undone(tmp_path: Path) -> None:
    """As dpdk-devbind does: without the override, the driver does not match the device."""
    tree = SysfsTree(tmp_path)
    tree.add_device(BDF, driver="vfio-pci", matches="e1000e", group=7)
    tree.fail = failing(errno.EIO, "drivers_probe")
    with pytest.raises(VfioError, match="EIO") as caught:
        unbind(tree)
    assert not isinstance(caught.value, RollbackError)
    assert placed(tree) == ("vfio-pci", None)


def test_a_failure_after_the_effect_is_undone_too(tree: SysfsTree) -> None:
    def write(path: Path, value: str) -> None:
        tree.write(path, value)
        if path.name == "drivers_probe":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pci.bind(BDF, write=write, kernel=tree.kernel)
    assert placed(tree) == ("e1000e", None)


def test_an_interrupt_whose_undo_fails_stays_an_interrupt_with_a_note(tree: SysfsTree) -> None:
    """A program that ends on KeyboardInterrupt still ends, and says what is left."""

    def write(path: Path, value: str) -> None:
        tree.write(path, value)
        if path.name == "drivers_probe":
            tree.fail = lambda path, _value: OSError(errno.EBUSY, "busy") if path.endswith("e1000e/bind") else None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        pci.bind(BDF, write=write, kernel=tree.kernel)
    (note,) = caught.value.__notes__
    assert note.startswith(f"{BDF} was not restored to driver e1000e, override None; then the kernel refused '{BDF}' ")
    assert "e1000e/bind: EBUSY, busy" in note
    assert placed(tree) == (None, None)


@pytest.mark.parametrize("place", ["driver_override", "e1000e/bind"])
def test_what_could_not_be_undone_is_said_and_the_rest_is_undone(tree: SysfsTree, place: str) -> None:
    def fail(path: str, _value: str) -> OSError | None:
        if path.endswith("drivers_probe"):
            return OSError(errno.EIO, os.strerror(errno.EIO))
        undoing = any(written.endswith("drivers_probe") for written, _ in tree.writes)
        return OSError(errno.EBUSY, os.strerror(errno.EBUSY)) if undoing and path.endswith(place) else None

    tree.fail = fail
    with pytest.raises(RollbackError) as caught:
        bind(tree)
    assert caught.value.message == f"{BDF} was not restored to driver e1000e, override None"
    assert re.search(f"EIO.*then.*{place}: EBUSY", str(caught.value))
    # The override keeps the former driver from binding too; and the override is written twice.
    assert len(caught.value.exceptions) == (4 if place == "driver_override" else 2)
    assert placed(tree) == (None, "vfio-pci" if place == "driver_override" else None)


def test_an_undo_that_the_kernel_accepts_and_does_not_do_is_said(tree: SysfsTree) -> None:
    tree.unwilling |= {"vfio-pci", "e1000e"}
    with pytest.raises(RollbackError) as caught:
        bind(tree)
    assert "the device now has driver None and override None" in str(caught.value)


@dataclass(frozen=True)
class Writer:
    """A process that writes to sysfs, and the expected words of the error."""

    number: int
    said: str
    user: int = 0
    container: bool = False
    uid_map: str = "0 0 4294967295"


WRITERS = [
    Writer(errno.EACCES, "requires root: run as root", user=1000),
    Writer(errno.EPERM, "requires root: run as root", user=1000),
    Writer(errno.EACCES, "security module"),
    Writer(errno.EACCES, "user namespace", uid_map="0 1000 1"),
    Writer(errno.EROFS, "read-only: mount -o remount,rw /sys"),
    Writer(errno.EROFS, "in this container: bind the device outside", container=True),
    Writer(errno.EACCES, "in this container: bind the device outside", container=True),
]


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: f"{writer.number}-{writer.said}")
def test_who_may_not_write_to_sysfs_is_told_what_helps_there(tree: SysfsTree, writer: Writer) -> None:
    """Root is not advised to run as root."""
    place_process(tree.proc, user=writer.user, container=writer.container, uid_map=writer.uid_map)
    tree.fail = failing(writer.number, "driver_override")
    with pytest.raises(
        AccessDeniedError, match=f"driver_override (may not be opened|cannot be).*{writer.said}"
    ) as caught:
        bind(tree)
    assert caught.value.errno == writer.number
    assert ("run as root" in str(caught.value)) == (writer.user != 0)


def test_a_value_reaches_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    pci.write_sysfs(tmp_path / "file", "vfio-pci\n")
    assert (tmp_path / "file").read_text() == "vfio-pci\n"
    with pytest.raises(FileNotFoundError):
        pci.write_sysfs(tmp_path / "missing", "\n")
    assert not (tmp_path / "missing").exists()
    before = open_fds()
    pci.write_sysfs(tmp_path / "file", "\n")
    with pytest.raises(OSError, match="No space left"):
        pci.write_sysfs(Path("/dev/full"), "\n")
    assert open_fds() == before


# --- What is refused


def refused(tree: SysfsTree, error: type[VfioError], match: str, *, driver: str = "vfio-pci") -> None:
    before = placed(tree)
    with pytest.raises(error, match=match):
        bind(tree, driver)
    assert tree.writes == []
    assert placed(tree) == before


def test_a_driver_that_is_not_loaded_is_refused_with_the_command_that_loads_it(tree: SysfsTree) -> None:
    (tree.pci / "drivers/vfio-pci").rename(tree.pci / "elsewhere")
    refused(tree, UnavailableError, f"modprobe vfio-pci. If there is no such module, pyvfio doctor {BDF}")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../devices", "vfio-pci/module", "vfio-pci\n", "\x1b[2J", "x" * 256, "é" * 128]
)
def test_what_is_no_name_of_a_driver_is_refused_before_the_device_is_touched(tree: SysfsTree, name: str) -> None:
    """`..` is a directory below drivers too."""
    for change in (bind, unbind):
        with pytest.raises(ValueError, match="not the name of a driver"):
            change(tree, name)
    assert tree.writes == []
    assert placed(tree) == ("e1000e", None)


def test_a_name_of_255_bytes_is_looked_for(tree: SysfsTree) -> None:
    with pytest.raises(UnavailableError, match=r"no PCI driver é+x is loaded"):
        bind(tree, "é" * 127 + "x")


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("patience", "error"),
    [("1", TypeError), (b"1", TypeError), (None, TypeError), ([], TypeError), (math.nan, ValueError), (-1, ValueError)],
)
def test_a_wrong_patience_is_refused_before_the_device_is_touched(
    tree: SysfsTree, patience: float, error: type[Exception], *, dry_run: bool
) -> None:
    tree.fail = failing(errno.EIO, "driver_override")
    with pytest.raises(error, match="patience is a number of seconds"):
        pci.bind(BDF, patience=patience, dry_run=dry_run, write=tree.write, kernel=tree.kernel)
    for to in ("vfio-pci", None):
        with pytest.raises(error, match="patience is a number of seconds"):
            pci.unbind(BDF, to=to, patience=patience, dry_run=dry_run, write=tree.write, kernel=tree.kernel)
    assert tree.writes == []


@pytest.mark.parametrize("iommu", ["dmar0", "0000:00:01.0"])
def test_vfio_pci_is_not_given_a_device_with_a_driver_and_without_a_group(tmp_path: Path, iommu: str) -> None:
    """Binding the present driver has made no group, with any IOMMU."""
    tree = SysfsTree(tmp_path)
    tree.add_device(BDF, driver="e1000e")
    tree.add_device("0000:00:1c.0", driver="pcieport", group=1, class_code=BRIDGE)
    (tree.sysfs / "class/iommu" / iommu).mkdir(parents=True)
    refused(tree, DeviceNotFoundError, "in no IOMMU group: none of this machine's IOMMUs")
    (tree.sysfs / "module/vfio/parameters").mkdir(parents=True)
    (tree.sysfs / "module/vfio/parameters/enable_unsafe_noiommu_mode").write_text("Y\n")
    assert bind(tree).driver == "vfio-pci"


def test_vfio_pci_is_not_tried_where_there_is_no_iommu(tmp_path: Path) -> None:
    tree = SysfsTree(tmp_path)
    tree.add_device(BDF, matches="e1000e")
    refused(tree, DeviceNotFoundError, "in no IOMMU group: the firmware announces no IOMMU")


def test_a_group_that_comes_with_the_first_driver_is_had_by_binding(tmp_path: Path) -> None:
    """As behind virtio-iommu before Linux 6.15. The error of an open names the command."""
    tree = SysfsTree(tmp_path)
    tree.add_device(BDF, matches="e1000e", late_group=7)
    tree.add_device("0000:00:1c.0", driver="pcieport", group=1, class_code=BRIDGE)
    (tree.sysfs / "class/iommu/0000:00:01.0").mkdir(parents=True)
    assert pci.comes_later(pci.read_device(BDF, kernel=tree.kernel), kernel=tree.kernel)
    with pytest.raises(DeviceNotFoundError, match=f"in no IOMMU group yet.*pyvfio bind {BDF}"):
        pci.group_of(BDF, kernel=tree.kernel)
    assert bind(tree).driver == "vfio-pci"
    assert pci.group_of(BDF, kernel=tree.kernel) == 7


@pytest.mark.parametrize("override", [None, "none"])
def test_where_no_group_comes_the_device_is_as_it_was(tmp_path: Path, override: str | None) -> None:
    """vfio-pci does not bind, and the error names the missing group. Only then is another slot advised."""
    tree = SysfsTree(tmp_path)
    tree.add_device(BDF, matches="e1000e", override=override)
    tree.add_device("0000:00:1c.0", driver="pcieport", group=1, class_code=BRIDGE)
    (tree.sysfs / "class/iommu/0000:00:01.0").mkdir(parents=True)
    with pytest.raises(
        DeviceNotFoundError, match=r"none of this machine's IOMMUs .* covers the device.*a slot or root port"
    ):
        bind(tree)
    assert [path for path, _value in tree.writes][:2] == [OVERRIDE, "bus/pci/drivers_probe"]
    assert placed(tree) == (None, override)


def test_vfio_pci_is_not_given_a_bridge(tmp_path: Path) -> None:
    tree = SysfsTree(tmp_path)
    tree.add_device(BDF, driver="pcieport", group=7, class_code=BRIDGE)
    refused(tree, VfioError, "is a PCI bridge")


@pytest.mark.parametrize("change", [bind, unbind])
def test_a_device_of_an_open_group_is_refused_with_its_holder(
    tmp_path: Path, change: Callable[[SysfsTree], pci.Binding]
) -> None:
    tree = SysfsTree(tmp_path)
    tree.use_real_proc()
    tree.add_device(BDF, driver="e1000e" if change is bind else "vfio-pci", override="vfio-pci", group=7)
    with tree.add_group_node(7).open(), pytest.raises(GroupBusyError, match=rf"\(pid {os.getpid()}, this process\)"):
        change(tree)
    assert tree.writes == []


def test_an_open_group_is_refused_also_when_its_holder_is_not_seen(tree: SysfsTree) -> None:
    class Busy(LinuxKernel):
        """Answer as vfio_group_fops_open for a group that is open in another PID namespace."""

        def open(self, path: str, flags: int) -> int:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path, flags)

    tree.kernel = Busy(sysfs=tree.sysfs, dev=tree.dev, proc=tree.proc)
    tree.add_group_node(7)
    refused(tree, GroupBusyError, "no process was found")


def test_a_device_that_is_open_by_its_own_node_is_refused(tree: SysfsTree) -> None:
    cdev = tree.add_cdev(BDF, "vfio3")
    tree.use_real_proc()
    with cdev.open("w"):
        refused(tree, GroupBusyError, rf"\(pid {os.getpid()}, this process\)", driver=pci.NO_DRIVER)


def test_a_device_is_refused_also_where_another_of_its_group_is_open_by_its_own_node(tree: SysfsTree) -> None:
    tree.add_device("0000:00:02.1", driver="vfio-pci", group=7)
    cdev = tree.add_cdev("0000:00:02.1", "vfio3")
    tree.use_real_proc()
    with cdev.open("w"):
        refused(tree, GroupBusyError, rf"\(pid {os.getpid()}, this process\)")


def test_asking_whether_a_group_is_open_leaves_no_descriptor_behind(tree: SysfsTree) -> None:
    tree.add_group_node(7)
    before = open_fds()
    bind(tree)
    assert open_fds() == before


def test_a_network_interface_that_is_up_keeps_its_device_unless_forced(tree: SysfsTree) -> None:
    tree.add_interface(BDF, "enp0s2", up=True)
    hint = r"End the use: ip link set dev enp0s2 down. Or pass --force \(in Python: force=True\) and lose connections$"
    refused(tree, VfioError, f"in use through e1000e: network interface enp0s2 is up. {hint}")
    assert bind(tree, force=True).driver == "vfio-pci"


def test_a_network_interface_that_is_down_does_not_keep_it(tree: SysfsTree) -> None:
    tree.add_interface(BDF, "enp0s2", up=False)
    assert bind(tree).driver == "vfio-pci"


def test_an_interface_of_another_device_does_not_keep_it(tree: SysfsTree) -> None:
    tree.add_device("0000:00:03.0", driver="e1000e", group=8)
    tree.add_interface("0000:00:03.0", "enp0s3", up=True)
    assert bind(tree).driver == "vfio-pci"


def test_an_interface_behind_a_bridge_does_not_keep_the_bridge(tmp_path: Path) -> None:
    tree = SysfsTree(tmp_path)
    tree.add_device(BDF, driver="shpchp", group=7, class_code=BRIDGE)
    tree.add_interface(BDF, "enp1s0", up=True)
    assert bind(tree, pci.NO_DRIVER).driver is None


MOUNT = "36 35 {number} / /srv rw,noatime shared:1 - ext4 {source} rw\n"


@pytest.mark.parametrize(
    ("mountinfo", "swaps", "reason"),
    [
        (MOUNT.format(number="259:1", source="/dev/root"), "", "nvme0n1p1 is mounted at /srv"),
        (MOUNT.format(number="0:40", source="/dev/nvme0n1p1"), "", "nvme0n1p1 is mounted at /srv"),
        ("", "Filename Type\n/dev/nvme0n1p1 partition 1 0 -2\n", "nvme0n1p1 is swapped to"),
    ],
)
def test_a_disk_that_is_in_use_keeps_its_device(tmp_path: Path, mountinfo: str, swaps: str, reason: str) -> None:
    tree = SysfsTree(tmp_path)
    device = tree.add_device(BDF, driver="nvme", group=7, class_code=DISK)
    disk = tree.add_disk(device / "nvme/nvme0", "nvme0n1", "259:0")
    tree.add_disk(disk, "nvme0n1p1", "259:1")
    (tree.proc / "self/mountinfo").write_text(mountinfo)
    (tree.proc / "swaps").write_text(swaps)
    refused(tree, VfioError, reason)


def test_a_file_system_that_the_host_shares_keeps_its_device_unless_forced(tmp_path: Path) -> None:
    """Unbinding the device of a mounted file system would hang the caller, and a machine with that root."""
    tree = SysfsTree(tmp_path)
    device = tree.add_device(BDF, driver="virtio-pci", group=7)
    (device / "virtio0").mkdir()
    (device / "virtio0/mount_tag").write_text("root\0")
    refused(tree, VfioError, "the host shares file system 'root' through the device")
    assert bind(tree, force=True).driver == "vfio-pci"


def test_a_disk_under_a_volume_keeps_its_device(tmp_path: Path) -> None:
    tree = SysfsTree(tmp_path)
    disk = tree.add_disk(tree.add_device(BDF, driver="ahci", group=7) / "ata1/block", "sda", "8:0")
    (disk / "holders/dm-0").touch()
    refused(tree, VfioError, "sda is part of dm-0")


def test_a_disk_of_a_multipath_subsystem_keeps_each_of_its_controllers(tmp_path: Path) -> None:
    tree = SysfsTree(tmp_path)
    controller = tree.add_device(BDF, driver="nvme", group=7, class_code=DISK) / "nvme/nvme0"
    controller.mkdir(parents=True)
    subsystem = tree.sysfs / "devices/virtual/nvme-subsystem/nvme-subsys0"
    tree.add_disk(subsystem, "nvme0n1", "259:0")
    link(subsystem / "nvme0", controller)
    (tree.proc / "self/mountinfo").write_text(MOUNT.format(number="259:0", source="/dev/nvme0n1"))
    refused(tree, VfioError, "nvme0n1 is mounted at /srv. End the use: umount /srv. Or pass --force .* and lose data$")


def test_a_disk_that_nothing_uses_does_not_keep_its_device(tmp_path: Path) -> None:
    tree = SysfsTree(tmp_path)
    tree.add_disk(tree.add_device(BDF, driver="ahci", group=7) / "ata1/block", "sda", "8:0")
    assert bind(tree).driver == "vfio-pci"


def with_disk(tree: SysfsTree, bdf: str = BDF, group: int = 7) -> Path:
    """A device with a disk."""
    return tree.add_disk(tree.add_device(bdf, driver="ahci", group=group) / "ata1/block", "sda", "8:0")


def test_a_disk_that_is_mounted_in_another_namespace_keeps_its_device(tmp_path: Path) -> None:
    """All mounts are read, once for each namespace. The error names the process, control characters escaped."""
    tree = SysfsTree(tmp_path)
    with_disk(tree)
    link(tree.proc / "self/ns/mnt", Path("mnt:[1]"))
    for pid, namespace in ((1, "mnt:[1]"), (20, "mnt:[2]"), (21, "mnt:[2]"), (30, "mnt:[3]")):
        link(tree.proc / str(pid) / "ns/mnt", Path(namespace))
        (tree.proc / str(pid) / "comm").write_text("evil\x1b[2J\n")
        mount = MOUNT.format(number="8:0", source="/dev/sda") if pid >= 20 else ""
        (tree.proc / str(pid) / "mountinfo").write_text(mount)
    for pid in (1, 21):
        (tree.proc / str(pid) / "mountinfo").write_text("not looked at")
    said = r"sda is mounted at /srv in the mount namespace of evil\\x1b\[2J \(pid 20\)"
    refused(tree, VfioError, said)


class ClaimedKernel(LinuxKernel):
    """A kernel whose disks answer with an errno; `asked` has the flags."""

    def __init__(self, tree: SysfsTree, number: int) -> None:
        super().__init__(sysfs=tree.sysfs, dev=tree.dev, proc=tree.proc)
        self.number = number
        self.asked: list[int] = []

    def open(self, path: str, flags: int) -> int:
        """Refuse the open."""
        self.asked.append(flags)
        raise OSError(self.number, os.strerror(self.number), path)


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EBUSY, "sda is claimed: mounted in a namespace that this process cannot see, swapped to"),
        (errno.EPERM, "sda may be in use: .*/dev/sda cannot be opened"),
        (errno.ENOMEDIUM, None),
    ],
)
def test_a_disk_is_asked_for_by_opening_it_for_oneself_alone(tmp_path: Path, number: int, reason: str | None) -> None:
    """O_EXCL is refused while the disk is mounted anywhere. A disk that cannot be opened counts as in use."""
    tree = SysfsTree(tmp_path)
    with_disk(tree)
    tree.kernel = ClaimedKernel(tree, number)
    if reason is None:
        assert bind(tree).driver == "vfio-pci"
    else:
        refused(tree, VfioError, reason)
        assert bind(tree, force=True).driver == "vfio-pci"
    assert tree.kernel.asked[0] == os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK


def test_a_disk_whose_node_is_not_here_may_be_in_use(tmp_path: Path) -> None:
    """As in a container, from which the uses of the host are not visible."""
    tree = SysfsTree(tmp_path)
    with_disk(tree)
    (tree.dev / "sda").unlink()
    refused(tree, VfioError, "sda may be in use: .*/dev/sda cannot be opened")


def test_a_disk_that_a_process_has_open_keeps_its_device(tmp_path: Path) -> None:
    """As a virtual machine uses a whole disk."""
    tree = SysfsTree(tmp_path)
    with_disk(tree)
    tree.use_real_proc()
    with (tree.dev / "sda").open("rb"):
        refused(tree, VfioError, rf"sda is open in .* \(pid {os.getpid()}\)")
    assert bind(tree).driver == "vfio-pci"


def test_a_mount_point_may_have_any_name(tmp_path: Path) -> None:
    """The kernel escapes blanks and line feeds, and nothing else."""
    tree = SysfsTree(tmp_path)
    with_disk(tree)
    place = b"36 35 8:0 / /srv/\r\xe2\x80\xa8\xff\x1b[2J rw - ext4 /dev/sda rw\n"
    (tree.proc / "self/mountinfo").write_bytes(place)
    refused(tree, VfioError, r"sda is mounted at /srv/\\r\\u2028\ufffd\\x1b\[2J")


def test_a_table_of_mounts_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    """No device counts as idle then."""
    tree = SysfsTree(tmp_path)
    with_disk(tree)
    (tree.proc / "self/mountinfo").write_text("36 35 8:0 / /srv rw\n")
    refused(tree, VfioError, "self/mountinfo has a line that describes no mount: '36 35 8:0 / /srv rw'")


def test_an_interface_in_another_network_namespace_keeps_its_device_unless_forced(tree: SysfsTree) -> None:
    """The directory exists and looks empty: the kernel makes one for interfaces of any namespace."""
    place = (tree.pci / "devices" / BDF).resolve() / "virtio0/net"
    place.mkdir(parents=True)
    refused(tree, VfioError, "1 network interface of the device is in another network namespace, and may be up")
    assert bind(tree, force=True).driver == "vfio-pci"


@pytest.mark.parametrize(
    ("links", "visible", "hidden"),
    [(3, 1, 0), (3, 0, 1), (4, 1, 1), (5, 0, 3), (1, 1, 0), (1, 0, 1)],
)
def test_interfaces_that_are_not_seen_are_counted_by_the_links_of_their_directory(
    links: int, visible: int, hidden: int
) -> None:
    """On a file system that counts one link for each directory, an empty directory still shows hidden interfaces."""
    assert hidden_interfaces(links=links, visible=visible) == hidden


def test_virtual_functions_keep_the_device_that_they_go_with(tmp_path: Path) -> None:
    """If the group is open, always: the kernel would wait. If an interface is up, unless forced."""
    tree = SysfsTree(tmp_path)
    device = tree.add_device(BDF, driver="e1000e", group=7)
    function = tree.add_device("0000:00:02.1", driver="igbvf", group=8)
    link(device / "virtfn0", function)
    tree.use_real_proc()
    with tree.add_group_node(8).open():
        refused(tree, GroupBusyError, "IOMMU group 8 is already open")
        with pytest.raises(GroupBusyError):
            bind(tree, force=True)
    tree.add_interface("0000:00:02.1", "enp0s2v0", up=True)
    refused(tree, VfioError, r"0000:00:02\.1 is in use through igbvf: network interface enp0s2v0 is up")
    assert bind(tree, force=True).driver == "vfio-pci"


# --- Garbage


@pytest.mark.parametrize(
    ("name", "garbage"),
    [("vendor", "x"), ("device", ""), ("class", "0x02\x1b[2J"), ("numa_node", "none"), ("vendor", "0x8086 0x1")],
)
def test_garbage_in_sysfs_is_an_error_that_names_the_file(tree: SysfsTree, name: str, garbage: str) -> None:
    """The error quotes the text, control characters escaped."""
    path = (tree.pci / "devices" / BDF).resolve() / name
    path.write_text(garbage + "\n")
    for use in (lambda: pci.read_device(BDF, kernel=tree.kernel), lambda: pci.devices(kernel=tree.kernel)):
        with pytest.raises(VfioError, match=f"{BDF}/{name} contains '.*', which is not a number") as caught:
            use()
        assert str(caught.value).isprintable()


def test_a_group_that_is_no_number_is_an_error_that_names_the_link(tree: SysfsTree) -> None:
    path = (tree.pci / "devices" / BDF).resolve() / "iommu_group"
    path.unlink()
    link(path, tree.sysfs / "kernel/iommu_groups/seven")
    with pytest.raises(VfioError, match=f"{BDF}/iommu_group contains 'seven', which is not a number"):
        pci.read_device(BDF, kernel=tree.kernel)


def test_a_device_that_has_no_address_is_an_error_that_names_the_directory(tree: SysfsTree) -> None:
    (tree.pci / "devices/lost+found").mkdir()
    with pytest.raises(VfioError, match="bus/pci/devices has an entry 'lost\\+found', which is not a PCI address"):
        pci.devices(kernel=tree.kernel)


def test_a_group_without_a_number_does_not_keep_the_others_from_being_named(tree: SysfsTree) -> None:
    (tree.sysfs / "kernel/iommu_groups/junk").mkdir()
    (tree.sysfs / "kernel/iommu_groups/10").mkdir()
    with pytest.raises(DeviceNotFoundError, match="The groups are: junk, 7, 10"):
        pci.group_members(8, kernel=tree.kernel)


def test_the_flags_of_an_interface_are_a_number(tree: SysfsTree) -> None:
    """Otherwise the interface could be up."""
    tree.add_interface(BDF, "enp0s2", up=False)
    (tree.sysfs / "class/net/enp0s2/flags").write_text("down\n")
    refused(tree, VfioError, "enp0s2/flags contains 'down', which is not a number")


# --- SR-IOV


def test_functions_of_sriov_take_an_address_in_every_way_it_is_written(tmp_path: Path) -> None:
    tree = SysfsTree(tmp_path)
    physical = tree.add_device(BDF, group=7)
    (physical / "sriov_totalvfs").write_text("4\n")
    link(tree.add_device("0000:0a:02.1", group=8) / "physfn", physical)
    for text in (BDF, "00:02.0", " 0000:00:02.0"):
        assert pci.is_physical_function(text, kernel=tree.kernel)
        assert pci.physical_function(text, kernel=tree.kernel) is None
    for text in ("0000:0a:02.1", "0a:02.1", "0A:02.1\n"):
        assert pci.physical_function(text, kernel=tree.kernel) == BDF
        assert not pci.is_physical_function(text, kernel=tree.kernel)


@pytest.mark.parametrize("text", ["", "../devices", "a" * 5000, "\0"])
def test_functions_of_sriov_refuse_text_that_is_no_address(tree: SysfsTree, text: str) -> None:
    for ask in (pci.is_physical_function, pci.physical_function):
        with pytest.raises(ValueError, match="not a PCI address"):
            ask(text, kernel=tree.kernel)


def test_a_link_to_no_pci_device_names_no_physical_function(tmp_path: Path) -> None:
    """As in a directory that is not sysfs: the error names the link."""
    tree = SysfsTree(tmp_path)
    link(tree.add_device(BDF) / "physfn", tmp_path)
    with pytest.raises(VfioError, match=r"physfn names .* not a PCI address"):
        pci.physical_function(BDF, kernel=tree.kernel)


# --- Signals


class HandledError(Exception):
    """Raised by a handler."""


def _handle(_number: int, _frame: object) -> None:
    raise HandledError


@pytest.fixture
def handlers() -> Iterator[None]:
    """The handlers of three signals raise, as the handler of Ctrl-C does."""
    former = {number: signal.signal(number, _handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


def _changed(tree: SysfsTree, what: str) -> Callable[[], pci.Binding]:
    """Return a change of a device that has a driver."""
    tree.add_device(BDF, driver="e1000e", group=7)
    if what == "bind":
        return lambda: bind(tree)
    bound = bind(tree)
    return lambda: unbind(tree) if what == "unbind" else pci.restore(bound, write=tree.write, kernel=tree.kernel)


def _press_all() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.raise_signal(number)


@pytest.mark.long
@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("what", ["bind", "unbind", "restore"])
def test_signals_in_the_middle_of_a_change_leave_the_device_as_it_was(tmp_path: Path, what: str) -> None:
    """Three signals at once, at any point of the change. The handlers raise, so the caller hears of no change."""
    dry = Walk()
    dry.run(_changed(SysfsTree(tmp_path / "dry"), what))
    for point in range(1, dry.count + 1, max(1, dry.count // 100)):
        tree = SysfsTree(tmp_path / str(point))
        change = _changed(tree, what)
        before = placed(tree)
        walk = Walk({point: _press_all})
        try:
            walk.run(change)
        except HandledError:
            assert placed(tree) == before, walk.where
        else:
            assert not walk.where  # this time it had fewer points


@pytest.mark.usefixtures("handlers")
def test_an_undo_that_fails_after_a_handler_raised_is_logged(tree: SysfsTree, caplog: pytest.LogCaptureFixture) -> None:
    """The caller gets the exception of the handler, and the log has the failure."""

    def write(path: Path, value: str) -> None:
        tree.write(path, value)
        if path.name == "drivers_probe":
            tree.fail = lambda path, _value: OSError(errno.EBUSY, "busy") if path.endswith("e1000e/bind") else None
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(HandledError):
        pci.bind(BDF, write=write, kernel=tree.kernel)
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.getMessage().startswith(f"{BDF} was not restored: the kernel refused '{BDF}' written to ")
    assert placed(tree) == (None, None)


def test_a_wait_for_a_driver_can_be_interrupted(tree: SysfsTree) -> None:
    """Between two looks for the driver. The former driver is restored."""

    def write(path: Path, value: str) -> None:
        tree.write(path, value)
        if path.name == "drivers_probe":
            signal.raise_signal(signal.SIGINT)

    tree.probes_ignored = 1000
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell can start this process without
    try:
        with pytest.raises(KeyboardInterrupt):
            pci.bind(BDF, patience=1.0, write=write, kernel=tree.kernel)
    finally:
        signal.signal(signal.SIGINT, former)
    assert placed(tree) == ("e1000e", None)
    assert [path for path, _value in tree.writes].count("bus/pci/drivers_probe") == 1


@pytest.mark.parametrize(
    "look",
    [
        lambda kernel: pci.read_device(BDF, kernel=kernel),
        lambda kernel: pci.devices(kernel=kernel),
        lambda kernel: pci.group_members(7, kernel=kernel),
        lambda kernel: pci.group_node(7, kernel=kernel),
    ],
)
def test_want_of_descriptors_is_not_taken_for_want_of_a_device(
    tree: SysfsTree, look: Callable[[LinuxKernel], object]
) -> None:
    """An unreadable file or directory can exist. The error names the limit to raise."""
    former = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, former[1]))
    try:
        with pytest.raises(VfioError, match="ulimit -n"):
            look(tree.kernel)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, former)
