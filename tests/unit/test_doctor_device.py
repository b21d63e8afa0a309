"""What `pyvfio.doctor` says of one device: group, uses, driver, the others of its group, resets and tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import pyvfio
from pyvfio.findings import Finding
from pyvfio.kernel import Kernel
from tests.unit import machines
from tests.unit.machines import NIC, PORT, RELEASE, SOUND, SSD, MachineTree, texts, told
from tests.unit.sysfs import BRIDGE, NETWORK, link, place_process

PROGRAMS = {
    *("apt-get", "chmod", "dracut", "echo", "grep", "grubby", "ip", "kill", "mkdir", "modprobe", "printf", "prlimit"),
    *("pyvfio", "sed", "sysctl", "umount", "update-grub", "update-initramfs"),
}


def of_check(tree: MachineTree, check: str, bdf: str | None = NIC, *, kernel: Kernel | None = None) -> list[Finding]:
    """The findings of a check."""
    return [found for found in pyvfio.doctor(bdf, kernel=kernel or tree.machine) if found.check == check]


@pytest.mark.parametrize("user", [0, 1000])
@pytest.mark.parametrize("shape", machines.MACHINES, ids=lambda shape: shape.__name__)
def test_each_part_of_a_finding_is_what_its_name_says(
    tree: MachineTree, shape: Callable[[MachineTree], None], user: int
) -> None:
    """A summary is no sentence; the reason is one or several; a command begins with a program, and its comment does
    not."""
    shape(tree)
    place_process(tree.proc, user=user, container=(tree.root / ".dockerenv").exists())
    tree.put("proc/sys/vm/overcommit_memory", "2\n")
    tree.put("proc/sys/vm/max_map_count", "7\n")
    diagnosis = pyvfio.doctor(NIC, memory=1 << 40, kernel=tree.machine)
    assert len(diagnosis) == len(list(diagnosis)) > 5
    for found in diagnosis:
        assert found.check == found.check.lower()
        assert " " not in found.check
        assert found.status in {"ok", "note", "wrong"}
        assert found.summary
        assert not found.summary.endswith(".")
        assert found.why == "" or found.why.endswith(".")
        assert not found.by_hand.endswith(".")
        for command in found.commands:
            assert command.text.split()[0] in PROGRAMS
            assert command.comment.split(" ")[0] not in PROGRAMS


# --- The group


def test_a_device_is_told_with_its_ids_and_its_group(tree: MachineTree) -> None:
    machines.acs_trouble(tree)
    assert told(of_check(tree, "device")) == [("ok", f"{NIC} is 8086:10d3")]
    assert told(of_check(tree, "group")) == [("ok", f"{NIC} is in IOMMU group 7")]
    assert of_check(tree, "group", None) == of_check(tree, "device", None) == []


def test_a_group_that_vfio_has_made_up_is_an_obstacle(tree: MachineTree) -> None:
    """The device is behind no IOMMU. The checks that the group decides wait."""
    machines.acs_trouble(tree)
    tree.put("sys/kernel/iommu_groups/7/name", "vfio-noiommu\n")
    diagnosis = pyvfio.doctor(NIC, kernel=tree.machine)
    (found,) = [each for each in diagnosis if each.check == "group"]
    assert (found.status, found.summary) == ("wrong", f"{NIC} is behind no IOMMU: VFIO made up group 7")
    assert 'iommu="unsafe-noiommu"' in found.why
    assert "another slot" in found.by_hand
    assert {"driver", "viability"}.isdisjoint(each.check for each in diagnosis)
    tree.put("sys/kernel/iommu_groups/7/name", "other\n")
    assert told(of_check(tree, "group")) == [("ok", f"{NIC} is in IOMMU group 7")]


def test_a_device_without_a_group_is_told_whether_one_comes(tree: MachineTree) -> None:
    """By the first driver, or not at all; nothing is said where the machine has no IOMMU, the other obstacle."""
    machines.arm_server(tree)
    (found,) = of_check(tree, "group")
    assert found.status == "note"
    assert found.summary.startswith(f"{NIC} is in no IOMMU group yet: ")
    tree.add_device(SSD, driver="nvme")
    (found,) = of_check(tree, "group", SSD)
    assert found.status == "wrong"
    assert found.summary.startswith(f"{SSD} is in no IOMMU group: none of this machine's IOMMUs")
    assert "driver" not in {each.check for each in pyvfio.doctor(SSD, kernel=tree.machine)}
    (tree.sysfs / "class/iommu/smmu3.0x000000002b400000").rmdir()
    assert of_check(tree, "group", SSD) == []


# --- Drivers


@pytest.mark.parametrize(
    ("driver", "override", "note"),
    [
        ("vfio-pci", "vfio-pci", None),
        ("vfio-pci", None, None),
        ("vfio-pci", "e1000e", "So that driver binds when the device is found again."),
        ("e1000e", "e1000e", "So pyvfio bind replaces that."),
        (None, "other", "So pyvfio bind replaces that."),
        (None, None, None),
    ],
)
def test_an_override_that_names_another_driver_is_a_note(
    tree: MachineTree, driver: str | None, override: str | None, note: str | None
) -> None:
    """It says which driver binds next."""
    machines.acs_trouble(tree)
    tree.add_device("0000:03:00.0", driver=driver, override=override, group=9)
    *notes, main = sorted(of_check(tree, "driver", "0000:03:00.0"), key=lambda found: found.status == "note")[::-1]
    vfio = driver == "vfio-pci"
    assert told([main]) == [
        ("ok", "0000:03:00.0 is bound to vfio-pci")
        if vfio
        else ("wrong", f"0000:03:00.0 is bound to {driver or 'no driver'}, not to vfio-pci")
    ]
    assert texts([main]) == ([] if vfio else ["pyvfio bind 0000:03:00.0"])
    assert [(each.summary, each.why) for each in notes] == (
        [] if note is None else [(f"driver_override of 0000:03:00.0 is {override}", note)]
    )


def test_a_bridge_has_no_driver_to_change(tree: MachineTree) -> None:
    """Nor a reset to tell."""
    machines.acs_trouble(tree)
    said = pyvfio.doctor(PORT, kernel=tree.machine)
    assert {"driver", "reset", "use"}.isdisjoint(found.check for found in said)
    (found,) = [each for each in said if each.check == "device"]
    assert found.by_hand == "Name a device behind the bridge: pyvfio list shows them"


def test_the_uses_of_the_device_and_of_the_blockers_are_obstacles(tree: MachineTree) -> None:
    """A use that no command ends is ended by hand. A device of VFIO, and one without a driver, has no use."""
    machines.acs_trouble(tree)
    assert told(of_check(tree, "use")) == [
        ("wrong", f"{NIC} is in use through e1000e: network interface eth0 is up"),
        ("wrong", f"{SSD} is in use through nvme: nvme0n1 is mounted at /data"),
    ]
    assert [found.by_hand for found in of_check(tree, "use")] == ["", ""]
    assert all(command.risky for found in of_check(tree, "use") for command in found.commands)
    tree.put("proc/self/mountinfo", "36 25 259:0 / /da\\040ta rw - ext4 /dev/nvme0n1 rw\n")
    (_, disk) = of_check(tree, "use")
    assert (disk.commands, disk.by_hand) == ((), "End that use first")
    (tree.pci / "devices" / NIC / "driver").unlink()
    assert [found.summary.split()[0] for found in of_check(tree, "use")] == [SSD]
    link(tree.pci / "devices" / NIC / "driver", tree.pci / "drivers/vfio-pci")
    assert [found.summary.split()[0] for found in of_check(tree, "use")] == [SSD]
    assert of_check(tree, "use", None) == []


def test_the_others_of_a_group_are_told_with_their_drivers(tree: MachineTree) -> None:
    """And how many devices the group has. The device itself is no obstacle to itself."""
    machines.acs_trouble(tree)
    sound, disk = of_check(tree, "viability")
    assert told([sound, disk]) == [
        ("wrong", f"{SOUND} of IOMMU group 7 is bound to snd_hda_intel"),
        ("wrong", f"{SSD} of IOMMU group 7 is bound to nvme"),
    ]
    assert "the 4 devices of the group" in sound.why
    assert texts([sound, disk]) == [f"pyvfio bind {SOUND}", f"pyvfio bind {SSD}"]
    tree.add_device("0000:03:00.0", driver="igb", group=9, class_code=NETWORK)
    assert told(of_check(tree, "viability", "0000:03:00.0")) == [
        ("ok", "no other device keeps IOMMU group 9 from being viable")
    ]
    assert of_check(tree, "viability", None) == []


def test_a_device_of_another_bus_is_unbound_by_hand(tree: MachineTree) -> None:
    """No command of pyvfio takes one."""
    machines.acs_trouble(tree)
    members = tree.sysfs / "kernel/iommu_groups/7/devices"
    for name, driver in (("28400000.dma", "tegra-dma"), ("0000:05:00.0", "gone")):
        place = tree.sysfs / "devices/platform" / name
        place.mkdir(parents=True)
        link(place / "driver", tree.sysfs / "bus/platform/drivers" / driver)
        link(members / name, place)
    found = {each.summary.split()[0]: each for each in of_check(tree, "viability")}
    for name in ("28400000.dma", "0000:05:00.0"):
        assert found[name].commands == ()
        assert found[name].by_hand.startswith(f"Unbind {name} from the driver by hand")
    assert {each.summary.split()[0] for each in of_check(tree, "use")} == {NIC, SSD}


@pytest.mark.parametrize("container", [False, True])
@pytest.mark.parametrize("writable", [False, True])
def test_drivers_are_changed_on_the_host_where_a_container_cannot_write_sysfs(
    tree: MachineTree, *, container: bool, writable: bool
) -> None:
    """Elsewhere root can write it."""
    machines.acs_trouble(tree)
    tree.add_device("0000:00:1d.0", driver="shpchp", group=7, class_code=BRIDGE)
    place_process(tree.proc, container=container)
    if not writable:
        (tree.pci / "drivers_probe").unlink()
    found = [*of_check(tree, "driver"), *of_check(tree, "viability")]
    wanted = [f"pyvfio bind {NIC}", "pyvfio bind --driver none 0000:00:1d.0", f"pyvfio bind {SOUND}"]
    wanted.append(f"pyvfio bind {SSD}")
    if container and not writable:
        assert texts(found) == []
        assert [each.by_hand for each in found] == [
            f"sysfs cannot be written in this container. On the host: {command}" for command in wanted
        ]
    else:
        assert texts(found) == wanted
        assert [each.by_hand for each in found] == [""] * 4


# --- Resets and tokens


@pytest.mark.parametrize(
    ("files", "status", "said"),
    [
        ({"reset_method": "flr bus\n", "reset": ""}, "ok", "can be reset: flr bus"),
        ({"reset_method": " \n", "reset": ""}, "note", "cannot be reset by itself"),
        ({"reset": ""}, "ok", "can be reset: one that this kernel does not name"),
        ({}, "note", "cannot be reset by itself"),
    ],
)
def test_the_ways_to_reset_a_device_are_told(tree: MachineTree, files: dict[str, str], status: str, said: str) -> None:
    """Before Linux 5.15 a file says no more than that there is one."""
    machines.acs_trouble(tree)
    for name, text in files.items():
        (tree.pci / "devices" / NIC / name).write_text(text)
    (found,) = of_check(tree, "reset")
    assert (found.status, found.summary) == (status, f"{NIC} {said}")
    assert bool(found.why) == (status == "note")
    assert of_check(tree, "reset", None) == []


def test_a_token_is_told_while_the_physical_function_has_a_driver_of_vfio(tree: MachineTree) -> None:
    """Another driver has no token, and a physical function needs none."""
    machines.virtual_function(tree)
    assert told(of_check(tree, "token")) == [("note", f"{SSD}, whose virtual function {NIC} is, is bound to VFIO too")]
    assert of_check(tree, "token", SSD) == []
    (tree.pci / "devices" / SSD / "driver").unlink()
    assert of_check(tree, "token") == []


def test_the_release_stands_in_the_diagnosis(tree: MachineTree) -> None:
    """Beside the host and the device; all are empty where procfs does not say."""
    machines.acs_trouble(tree)
    said = pyvfio.doctor(NIC, kernel=tree.machine)
    assert (said.bdf, said.host, said.kernel) == (NIC, "box", RELEASE)
    tree.put("proc/sys/kernel/hostname", "a b\n")
    (tree.proc / "sys/kernel/osrelease").unlink()
    said = pyvfio.doctor(NIC, kernel=tree.machine)
    assert (said.host, said.kernel) == ("", "")
    assert "# pyvfio doctor 0000:01:00.0\n" in said.script()
