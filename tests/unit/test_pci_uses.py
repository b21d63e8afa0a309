"""How the machine uses a device, and the refusals of a change of driver, each with the commands and the price."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from pyvfio import pci
from pyvfio.errors import DeviceNotFoundError, GroupBusyError, RollbackError, UnavailableError, VfioError
from pyvfio.kernel import LinuxKernel
from pyvfio.pci.refusals import is_open_somewhere
from pyvfio.pci.usage import Use, find_uses
from tests.unit.sysfs import BRIDGE, DISK, SysfsTree, link

BDF, OTHER = "0000:00:02.0", "0000:00:02.1"
MOUNT = "36 35 {number} / {place} rw,noatime shared:1 - ext4 {source} rw\n"


@pytest.fixture
def tree(tmp_path: Path) -> SysfsTree:
    """A machine with an IOMMU and one device, bound to ahci."""
    tree = SysfsTree(tmp_path)
    tree.add_device(BDF, driver="ahci", group=7)
    (tree.sysfs / "class/iommu/dmar0").mkdir(parents=True)
    return tree


def place_of(tree: SysfsTree) -> Path:
    """The directory of the device."""
    return (tree.pci / "devices" / BDF).resolve()


def add_disk(tree: SysfsTree, name: str = "sda", number: str = "8:0") -> Path:
    """A disk of the device."""
    return tree.add_disk(place_of(tree) / "ata1/block", name, number)


def bind(tree: SysfsTree, driver: str = "vfio-pci", *, force: bool = False) -> pci.Binding:
    """Change the driver."""
    return pci.bind(BDF, driver, force=force, patience=0.0, write=tree.write, kernel=tree.kernel)


# --- Network interfaces


@pytest.mark.parametrize(
    ("flags", "operstate", "up"),
    [
        ("0x1003", "unknown", True),
        ("0x1", "down", True),
        ("0x1002", "up", True),
        (None, "up", True),
        ("0x1002", "down", False),
        ("0x1002", None, False),
        (None, None, False),
    ],
)
def test_an_interface_is_up_by_its_flags_or_its_state(
    tree: SysfsTree, flags: str | None, operstate: str | None, *, up: bool
) -> None:
    tree.add_interface(BDF, "eth0", up=False)
    for name, text in (("flags", flags), ("operstate", operstate)):
        place = place_of(tree) / "virtio0/net/eth0" / name
        place.unlink()
        if text is not None:
            place.write_text(text + "\n")
    expected = Use("network interface eth0 is up", "ip link set dev eth0 down", "connections")
    assert find_uses(tree.kernel, BDF) == ([expected] if up else [])


def test_an_interface_whose_name_no_shell_takes_has_no_command(tree: SysfsTree) -> None:
    """Quoted where quotes suffice."""
    tree.add_interface(BDF, "a\x1bb", up=True)
    tree.add_interface(BDF, "c;d", up=True)
    assert [(use.text.split()[2], use.command) for use in find_uses(tree.kernel, BDF)] == [
        ("a\\x1bb", ""),
        ("c;d", "ip link set dev 'c;d' down"),
    ]


def test_hidden_interfaces_are_told_with_their_number(tree: SysfsTree) -> None:
    """Of all directories of the device. One that shows its interfaces hides none, if its links say so."""
    for name in ("virtio0", "virtio1"):
        (place_of(tree) / name / "net").mkdir(parents=True)
    (use,) = find_uses(tree.kernel, BDF)
    assert use == Use(
        "2 network interfaces of the device are in another network namespace, and may be up", loss="connections"
    )
    (place_of(tree) / "virtio1/net").rmdir()
    tree.add_interface(BDF, "eth0", up=False)
    assert find_uses(tree.kernel, BDF) == []


# --- Disks


@pytest.mark.parametrize(
    ("name", "mountinfo", "swaps", "use"),
    [
        ("sda", MOUNT.format(number="8:0", place="/srv", source="x"), "", Use("is mounted at /srv", "umount /srv")),
        ("sda", MOUNT.format(number="0:9", place="/", source="/dev/sda"), "", Use("is mounted at /", "umount /")),
        ("sda", MOUNT.format(number="8:0", place="/a\\040b", source="x"), "", Use("is mounted at /a\\040b")),
        ("sda", "", "/dev/sda partition 1 0 -2\n", Use("is swapped to", "swapoff /dev/sda")),
        ("cciss!c0d0", "", "/dev/cciss/c0d0 partition 1\n", Use("is swapped to", "swapoff /dev/cciss/c0d0")),
        ("cciss!c0d0", MOUNT.format(number="0:9", place="/m", source="/dev/cciss/c0d0"), "", Use("", "umount /m")),
        ("sda", MOUNT.format(number="8:1", place="/srv", source="/dev/sdb"), "/dev/sdb\n", None),
    ],
)
def test_the_use_of_a_disk_is_told_with_the_command_that_ends_it(
    tree: SysfsTree, name: str, mountinfo: str, swaps: str, use: Use | None
) -> None:
    """None where the command would need a name that is shown in another way."""
    add_disk(tree, name)
    (tree.dev / "cciss").mkdir()
    (tree.dev / "cciss/c0d0").touch()
    (tree.proc / "self/mountinfo").write_text(mountinfo)
    (tree.proc / "swaps").write_text(swaps)
    found = find_uses(tree.kernel, BDF)
    assert len(found) == (use is not None)
    for each in found:
        assert use is not None
        assert each.command == use.command
        assert each.text.startswith(f"{name} {use.text}")
        assert each.loss == "data"


def test_a_disk_of_several_volumes_names_all(tree: SysfsTree) -> None:
    disk = add_disk(tree)
    for name in ("md1", "dm-0"):
        (disk / "holders" / name).touch()
    assert find_uses(tree.kernel, BDF) == [Use("sda is part of dm-0, md1")]


def test_a_mount_of_this_namespace_precedes_those_of_others(tree: SysfsTree) -> None:
    """Only this one can be unmounted by a command. A namespace that cannot be read is no known one."""
    add_disk(tree)
    link(tree.proc / "self/ns/mnt", Path("mnt:[1]"))
    for pid in (20, 21):
        (tree.proc / str(pid)).mkdir()
        (tree.proc / str(pid) / "mountinfo").write_text("")
    (tree.proc / "21/mountinfo").write_text(MOUNT.format(number="8:0", place="/other", source="x"))
    assert find_uses(tree.kernel, BDF) == [Use("sda is mounted at /other in the mount namespace of ? (pid 21)")]
    (tree.proc / "self/mountinfo").write_text(MOUNT.format(number="8:0", place="/own", source="x"))
    assert find_uses(tree.kernel, BDF) == [Use("sda is mounted at /own", "umount /own")]


def test_a_directory_without_a_number_is_no_disk(tree: SysfsTree) -> None:
    (add_disk(tree) / "dev").unlink()
    (tree.dev / "sda").unlink()
    assert find_uses(tree.kernel, BDF) == []


class Refusing(LinuxKernel):
    """A kernel that refuses to open any node."""

    number = errno.EBUSY
    asked = 0

    def open(self, path: str, flags: int) -> int:
        """Refuse."""
        del flags
        self.asked += 1
        raise OSError(self.number, os.strerror(self.number), path)


@pytest.mark.parametrize("number", [errno.ENOMEDIUM, errno.ENXIO, errno.EACCES, errno.EIO])
def test_a_disk_without_a_medium_is_free(tree: SysfsTree, number: int) -> None:
    """And one that this user may not open: then the user may not bind, either. Root whom a node refuses cannot tell."""
    add_disk(tree)
    kernel = Refusing(sysfs=tree.sysfs, dev=tree.dev, proc=tree.proc)
    kernel.number = number
    free = number in {errno.ENOMEDIUM, errno.ENXIO} or (number == errno.EACCES and os.geteuid() != 0)
    said = f"sda may be in use: {tree.dev}/sda cannot be opened ({os.strerror(number)})"
    assert find_uses(kernel, BDF) == ([] if free else [Use(said)])


def test_a_disk_of_a_subsystem_is_of_the_controllers_alone(tree: SysfsTree) -> None:
    """The subsystem links to them; other directories of it are none."""
    subsystem = tree.sysfs / "devices/virtual/nvme-subsystem/nvme-subsys0"
    tree.add_disk(subsystem, "nvme0n1", "259:0")
    (tree.proc / "swaps").write_text("/dev/nvme0n1\n")
    assert find_uses(tree.kernel, BDF) == []
    controller = place_of(tree) / "nvme/nvme0"
    controller.mkdir(parents=True)
    link(subsystem / "nvme0", controller)
    assert find_uses(tree.kernel, BDF) == [Use("nvme0n1 is swapped to", "swapoff /dev/nvme0n1")]


def make_node(place: Path, kind: int, number: int, instead: str) -> bool:
    """Make a node of a device that this machine need not have. A user without the right gets a link to another."""
    place.parent.mkdir(exist_ok=True)
    try:
        os.mknod(place, kind | 0o600, os.makedev(240, number))
    except PermissionError:
        place.symlink_to(instead)
        return False
    return True


def test_a_disk_whose_node_is_of_another_device_may_be_in_use(tree: SysfsTree) -> None:
    """As in a container with nodes of its own: opening that one would ask for another disk."""
    add_disk(tree, number="240:7")
    (tree.dev / "sda").unlink()
    made = make_node(tree.dev / "sda", stat.S_IFBLK, 8, "/dev/null")
    kernel = Refusing(sysfs=tree.sysfs, dev=tree.dev, proc=tree.proc)
    kernel.number = errno.ENXIO
    said = f"sda may be in use: {tree.dev}/sda cannot be opened (the node is 240:8, not 240:7)"
    assert find_uses(kernel, BDF) == ([Use(said)] if made else [])
    assert kernel.asked == (not made)
    (tree.dev / "sda").unlink()
    make_node(tree.dev / "sda", stat.S_IFBLK, 7, "/dev/null")
    assert find_uses(kernel, BDF) == []
    assert kernel.asked == 1 + (not made)


@pytest.mark.parametrize(("kind", "other"), [(stat.S_IFCHR, stat.S_IFBLK), (stat.S_IFBLK, stat.S_IFCHR)])
def test_a_node_is_known_by_its_kind_and_number(tree: SysfsTree, kind: int, other: int) -> None:
    """Whatever the name in a container. Each has numbers of its own."""
    one, alias, unlike, number = (tree.dev / place / "7" for place in ("a", "b", "c", "d"))
    make_node(one, kind, 7, "/dev/null")
    make_node(alias, kind, 7, "/dev/null")
    make_node(unlike, other, 7, "/dev/zero")
    make_node(number, kind, 8, "/dev/full")
    tree.place_holder(41, one)
    assert [holder.pid for holder in pci.holders_of(alias, kernel=tree.kernel)] == [41]
    assert pci.holders_of(unlike, kernel=tree.kernel) == ()
    assert pci.holders_of(number, kernel=tree.kernel) == ()


# --- Refusals


def test_all_uses_are_told_with_all_commands_and_all_losses(tree: SysfsTree) -> None:
    """One that no command ends is told; each loss once."""
    tree.add_interface(BDF, "eth0", up=True)
    tree.add_interface(BDF, "eth1", up=True)
    add_disk(tree)
    (tree.proc / "swaps").write_text("/dev/sda\n")
    with pytest.raises(VfioError) as caught:
        bind(tree)
    assert caught.value.message == (
        f"{BDF} is in use through ahci: network interface eth0 is up, network interface eth1 is up, sda is swapped to"
    )
    assert caught.value.hint == (
        "End the use: ip link set dev eth0 down; ip link set dev eth1 down; swapoff /dev/sda. "
        "Or pass --force (in Python: force=True) and lose connections and data"
    )
    (place_of(tree) / "virtio0").rename(tree.sysfs / "gone")
    (tree.proc / "swaps").write_text("")
    (tree.sysfs / "class/block/sda/holders/dm-0").touch()
    with pytest.raises(VfioError) as caught:
        bind(tree)
    assert caught.value.hint == ("End the use first. Or pass --force (in Python: force=True) and lose data")


@pytest.mark.parametrize(
    ("driver", "hint"),
    [
        ("vfio-pci", f"modprobe vfio-pci. If there is no such module, pyvfio doctor {BDF} names the remedy"),
        ("mlx5_vfio_pci", f"modprobe mlx5_vfio_pci. If there is no such module, pyvfio doctor {BDF} names the remedy"),
        ("nvme", "modprobe nvme"),
    ],
)
def test_a_driver_that_is_not_loaded_is_told_with_its_module(tree: SysfsTree, driver: str, hint: str) -> None:
    """Of VFIO's drivers alone the doctor knows more."""
    (tree.pci / "drivers/vfio-pci").rename(tree.pci / "elsewhere")
    with pytest.raises(UnavailableError) as caught:
        bind(tree, driver)
    assert caught.value.message == f"no PCI driver {driver} is loaded"
    assert caught.value.hint == f"Load the driver's module: {hint}"


@pytest.mark.parametrize("driver", [7, b"vfio-pci", ["vfio-pci"]])
def test_the_name_of_a_driver_is_text(tree: SysfsTree, driver: object) -> None:
    with pytest.raises(TypeError, match=f"the name of a driver is text, not {type(driver).__name__}"):
        bind(tree, driver)  # type: ignore[arg-type]


def test_a_bridge_takes_drivers_that_are_not_of_vfio(tmp_path: Path) -> None:
    """And no driver at all."""
    tree = SysfsTree(tmp_path)
    tree.add_device(BDF, driver="shpchp", class_code=BRIDGE)
    tree.add_driver("pcieport")
    tree.add_driver("my-vfio-pci")
    with pytest.raises(VfioError, match="is a PCI bridge, and my-vfio-pci binds no bridges"):
        bind(tree, "my-vfio-pci")
    assert bind(tree, "pcieport").driver == "pcieport"
    assert bind(tree, pci.NO_DRIVER).driver is None


@pytest.mark.parametrize("unsafe", [False, True])
def test_a_device_without_a_group_is_bound_without_an_iommu_if_the_machine_accepts_that(
    tmp_path: Path, *, unsafe: bool
) -> None:
    """Another driver than VFIO's needs no group."""
    tree = SysfsTree(tmp_path)
    tree.add_device(BDF, driver="ahci")
    tree.add_driver("other")
    assert bind(tree, "other").driver == "other"
    place = tree.sysfs / "module/vfio/parameters/enable_unsafe_noiommu_mode"
    if unsafe:
        place.parent.mkdir(parents=True)
        place.write_text("Y\n")
        assert bind(tree).driver == "vfio-pci"
    else:
        with pytest.raises(DeviceNotFoundError, match="is in no IOMMU group"):
            bind(tree)
        assert tree.driver_of(BDF) == "other"


@pytest.mark.parametrize(
    ("number", "opened"), [(errno.EBUSY, True), (errno.EACCES, False), (errno.EPERM, False), (errno.ENXIO, False)]
)
def test_a_group_is_open_if_the_kernel_says_busy(tree: SysfsTree, number: int, *, opened: bool) -> None:
    """A node that this user may not open tells nothing, and a missing one is not tried."""
    kernel = Refusing(sysfs=tree.sysfs, dev=tree.dev, proc=tree.proc)
    kernel.number = number
    assert not is_open_somewhere(kernel, tree.dev / "vfio/7")
    assert kernel.asked == 0
    assert is_open_somewhere(kernel, tree.add_group_node(7)) == opened
    assert kernel.asked == 1


def test_the_uses_of_virtual_functions_count_while_a_driver_of_the_kernel_has_them(tree: SysfsTree) -> None:
    """Not those of VFIO's driver, and not those of a function without a driver. All go with the physical function."""
    function = tree.add_device(OTHER, driver="igbvf", group=8)
    link(place_of(tree) / "virtfn0", function)
    (place_of(tree) / "virtfn1").mkdir()
    tree.add_interface(OTHER, "eth9", up=True)
    with pytest.raises(VfioError, match=rf"{OTHER} is in use through igbvf: network interface eth9 is up"):
        bind(tree)
    (function / "driver").unlink()
    assert bind(tree, pci.NO_DRIVER).driver is None
    pci.unbind(BDF, patience=0.0, write=tree.write, kernel=tree.kernel)
    link(function / "driver", tree.pci / "drivers/vfio-pci")
    assert bind(tree).driver == "vfio-pci"


def test_a_device_without_a_driver_is_used_by_nobody(tmp_path: Path) -> None:
    """What sysfs shows of a former driver does not count."""
    tree = SysfsTree(tmp_path)
    tree.add_device(BDF, matches="ahci", group=7, class_code=DISK)
    tree.add_interface(BDF, "eth0", up=True)
    assert bind(tree).driver == "vfio-pci"


# --- Restoring


def test_an_override_is_restored_while_the_device_is_in_use(tree: SysfsTree) -> None:
    """The driver does not change, so nobody loses anything."""
    binding = pci.Binding(BDF, "ahci", "ahci", "ahci", ())
    tree.add_interface(BDF, "eth0", up=True)
    back = pci.restore(binding, write=tree.write, kernel=tree.kernel)
    assert [value for _name, value in tree.writes] == ["ahci\n"]
    assert (back.driver, back.former_override) == ("ahci", None)
    assert pci.restore(binding, write=tree.write, kernel=tree.kernel).steps == ()


def test_a_driver_is_restored_unless_the_device_is_in_use(tree: SysfsTree) -> None:
    """As for a bind, and by force."""
    tree.add_driver("other")
    binding = pci.Binding(BDF, "ahci", "other", None, ())
    tree.add_interface(BDF, "eth0", up=True)
    with pytest.raises(VfioError, match="in use through ahci"):
        pci.restore(binding, write=tree.write, kernel=tree.kernel)
    assert tree.writes == []
    planned = pci.restore(binding, force=True, dry_run=True, write=tree.write, kernel=tree.kernel)
    assert tree.writes == []
    assert (planned.driver, planned.former_driver) == ("other", "ahci")
    done = pci.restore(binding, force=True, write=tree.write, kernel=tree.kernel)
    assert (done.driver, done.former_driver, done.steps) == ("other", "ahci", planned.steps)


@pytest.mark.parametrize(
    ("former", "override", "steps"),
    [
        ((None, None), "vfio-pci", ["unbind vfio-pci", "override "]),
        (("ahci", None), "vfio-pci", ["override ahci", "unbind vfio-pci", "bind ahci", "override "]),
        (("ahci", "ahci"), "ahci", ["unbind vfio-pci", "bind ahci"]),
        (("ahci", "other"), "ahci", ["unbind vfio-pci", "bind ahci", "override other"]),
        (("vfio-pci", None), "vfio-pci", ["override "]),
    ],
)
def test_a_restore_makes_the_writes_that_are_needed_in_a_safe_order(
    tree: SysfsTree, former: tuple[str | None, str | None], override: str, steps: list[str]
) -> None:
    """The override names the former driver before the bind, and is what it was at the end."""
    (place_of(tree) / "driver").unlink()
    link(place_of(tree) / "driver", tree.pci / "drivers/vfio-pci")
    (place_of(tree) / "driver_override").write_text(f"{override}\n")
    pci.restore(pci.Binding(BDF, "vfio-pci", *former, ()), write=tree.write, kernel=tree.kernel)
    made = [
        f"override {value.strip()}" if place.endswith("driver_override") else " ".join(place.split("/")[:2:-1])
        for place, value in tree.writes
    ]
    assert made == steps
    assert (tree.driver_of(BDF), tree.override_of(BDF)) == former


def test_a_device_that_is_gone_in_the_undo_is_told_with_the_first_error(tree: SysfsTree) -> None:
    """Nothing could be restored."""

    def remove(name: str, _value: str) -> OSError | None:
        if not name.endswith("drivers_probe"):
            return None
        (tree.pci / "devices" / BDF).unlink()
        return OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    tree.fail = remove
    with pytest.raises(RollbackError) as caught:
        bind(tree)
    refused, gone = caught.value.exceptions
    assert "ENODEV" in str(refused)
    assert isinstance(gone, DeviceNotFoundError)


CHANGES: list[Callable[..., pci.Binding]] = [
    partial(pci.bind, BDF),
    partial(pci.bind, BDF, pci.NO_DRIVER),
    partial(pci.unbind, BDF),
    partial(pci.unbind, BDF, to="vfio-pci"),
    partial(pci.unbind, BDF, to=pci.NO_DRIVER),
    partial(pci.restore, pci.Binding(BDF, "ahci", "vfio-pci", None, ())),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_device_in_use_is_changed_by_force_alone(tmp_path: Path, change: Callable[..., pci.Binding]) -> None:
    """A dry run writes nothing, and refuses what the change would refuse."""
    tree = SysfsTree(tmp_path)
    tree.add_device(BDF, driver="ahci", matches="igb", override="other", group=7)
    tree.add_interface(BDF, "eth0", up=True)
    call = partial(change, write=tree.write, kernel=tree.kernel)
    for dry_run in (True, False):
        with pytest.raises(VfioError, match="in use through ahci: network interface eth0 is up"):
            call(dry_run=dry_run)
    planned = call(dry_run=True, force=True)
    assert (tree.writes, tree.driver_of(BDF), tree.override_of(BDF)) == ([], "ahci", "other")
    done = call(force=True)
    assert planned.steps == done.steps != ()
    assert tree.driver_of(BDF) == done.driver != "ahci"
    assert (done.bdf, done.former_driver, done.former_override) == (BDF, "ahci", "other")
    assert (planned.bdf, planned.former_driver, planned.former_override) == (BDF, "ahci", "other")


@pytest.mark.parametrize(
    "change",
    [
        partial(pci.bind, BDF, "ahci"),
        partial(pci.unbind, BDF, to="ahci"),
        partial(pci.restore, pci.Binding(BDF, "x", "ahci", "other", ())),
    ],
)
def test_a_device_that_needs_no_change_is_told_as_it_is(tree: SysfsTree, change: Callable[..., pci.Binding]) -> None:
    """With the override, which names another driver."""
    (place_of(tree) / "driver_override").write_text("other\n")
    assert change(write=tree.write, kernel=tree.kernel) == pci.Binding(BDF, "ahci", "ahci", "other", ())
    assert tree.writes == []


@pytest.mark.parametrize("holder", [False, True])
def test_a_group_in_use_is_told_with_what_frees_it(tree: SysfsTree, *, holder: bool) -> None:
    """The process, if one is seen."""
    node = tree.add_group_node(7)
    tree.kernel = Refusing(sysfs=tree.sysfs, dev=tree.dev, proc=tree.proc)
    if holder:
        tree.place_holder(41, node)
    with pytest.raises(GroupBusyError) as caught:
        bind(tree)
    freed = "Close the devices of the group in that process, or end the process"
    assert (caught.value.hint == freed) == holder
    open_ = "No driver of the group can be changed while the group is open, and no process was found"
    assert holder or caught.value.hint.startswith(open_)


def another(tree: SysfsTree, driver: str) -> Callable[[Path, str], None]:
    """A program that binds the device to `driver` as soon as it has none."""

    def write(path: Path, value: str) -> None:
        tree.write(path, value)
        if path.name == "drivers_probe" and tree.driver_of(BDF) is None:
            link(place_of(tree) / "driver", tree.pci / "drivers" / driver)

    return write


@pytest.mark.parametrize(
    ("taker", "said", "hint"),
    [
        ("ahci", "ahci has bound the device again", "ahci matches the device, perhaps by an ids= parameter"),
        ("other", "other has bound the device instead", "Another program, such as driverctl or a udev rule"),
        (None, "no driver has bound the device", "The probe failed; the kernel may have logged the reason"),
    ],
)
def test_a_driver_that_does_not_bind_is_told_with_the_one_that_did(
    tree: SysfsTree, taker: str | None, said: str, hint: str
) -> None:
    """The former driver is back in any case."""
    tree.unwilling = {"vfio-pci"}
    tree.add_driver("other")
    write = tree.write if taker is None else another(tree, taker)
    with pytest.raises(VfioError) as caught:
        pci.bind(BDF, patience=0.0, write=write, kernel=tree.kernel)
    assert caught.value.message == f"{BDF} was to have driver vfio-pci, and {said}"
    assert caught.value.hint.startswith(hint)
    assert (tree.driver_of(BDF), tree.override_of(BDF)) == ("ahci", None)


def test_a_change_is_logged_with_both_drivers(tree: SysfsTree, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pyvfio"):
        bind(tree)
    assert caplog.messages == [f"{BDF}: driver vfio-pci, was ahci"]
