"""`pyvfio.doctor` names each obstacle on machines of many shapes, with the commands that remove it."""

from __future__ import annotations

import errno
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import pyvfio
from pyvfio.errors import PinLimitError, VfioError
from pyvfio.findings import Finding
from pyvfio.kernel import LinuxKernel, Memlock
from pyvfio.testing.fake import FakeDevice, FakeKernel
from tests.unit import machines
from tests.unit.fakes import BDF, PlacedKernel
from tests.unit.machines import NIC, SOUND, SSD, KernelOnTree, MachineTree, program_of_root
from tests.unit.sysfs import BRIDGE, place_process

MODPROBE = "modprobe -a vfio-pci vfio_iommu_type1"


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[PlacedKernel]:
    """A fake kernel whose program is root, in no container and no service."""
    with program_of_root(tmp_path) as made:
        yield made


def wrong(diagnosis: Sequence[Finding] | pyvfio.Diagnosis) -> list[tuple[str, str]]:
    """The obstacles: the check, and the summary."""
    return [(finding.check, finding.summary) for finding in diagnosis if finding.status == "wrong"]


def commands(diagnosis: pyvfio.Diagnosis) -> list[str]:
    """The commands that a script runs."""
    return [each.text for finding in diagnosis.wrong for each in finding.commands if not each.risky]


def finding(diagnosis: pyvfio.Diagnosis, check: str) -> Finding:
    """The only finding of a check."""
    (found,) = [each for each in diagnosis if each.check == check]
    return found


# --- Machines

SHAPES: list[tuple[Callable[[MachineTree], None], list[tuple[str, str]]]] = [
    (
        machines.intel_off,
        [("iommu", "told not to use the IOMMU (intel_iommu=off,sm_on)"), ("modules", "vfio-pci, vfio_iommu_type1 are")],
    ),
    (
        machines.intel_default,
        [("iommu", "not told to use the IOMMU (CONFIG_INTEL_IOMMU_DEFAULT_ON is not set)"), ("modules", "not loaded")],
    ),
    (machines.amd_off, [("iommu", "told not to use the IOMMU (amd_iommu=off)"), ("modules", "not loaded")]),
    (machines.all_off, [("iommu", "told not to use the IOMMU (iommu=off)"), ("modules", "not loaded")]),
    (machines.no_table, [("iommu", "the firmware announces no IOMMU"), ("modules", "not loaded")]),
    (
        machines.firmware_and_line,
        [("iommu", "firmware announces no IOMMU"), ("iommu", "(intel_iommu=off)"), ("modules", "not loaded")],
    ),
    (machines.virtual_without, [("iommu", "this virtual machine has no IOMMU"), ("modules", "not loaded")]),
    (
        machines.virtual_early,
        [("iommu", "(VIOT), and the kernel has not initialized the IOMMU"), ("modules", "not loaded")],
    ),
    (machines.virtual_late, [("interrupts", "not remapped"), ("driver", f"{NIC} is bound to no driver")]),
    (
        machines.acs_trouble,
        [
            ("use", "eth0 is up"),
            ("use", "nvme0n1 is mounted at /data"),
            ("driver", f"{NIC} is bound to e1000e"),
            ("viability", f"{SOUND} of IOMMU group 7 is bound to snd_hda_intel"),
            ("viability", f"{SSD} of IOMMU group 7 is bound to nvme"),
        ],
    ),
    (machines.in_container, [("container-node", "not passed into this container")]),
    (machines.plain_root, [("container-node", "lacks nodes of this machine")]),
    (machines.arm_server, [("driver", f"{NIC} is bound to no driver")]),
    (machines.after_update, [("modules", "6.12.8-amd64 are not installed; there are those of 6.12.9-amd64")]),
    (
        machines.not_loaded,
        [("modules", "/etc/modprobe.d/harden.conf keeps vfio-pci"), ("modules", "not loaded"), ("driver", "e1000e")],
    ),
    (machines.small_cloud, [("modules", "kernel 6.12.9-amd64 has no module vfio"), ("driver", "e1000e")]),
    (machines.without_groups, [("kernel", "built without CONFIG_VFIO_GROUP")]),
    (machines.iommufd_alone, [("device-node", "IOMMU group 3 is already open in qemu (pid 41)")]),
    (machines.forgeable_iommufd, [("interrupts", "so iommufd refuses every device")]),
    (machines.forgeable, [("interrupts", "interrupts are not remapped"), ("driver", "no driver")]),
    (machines.virtual_function, [("driver", "no driver")]),
]


@pytest.mark.parametrize(("shape", "expected"), SHAPES, ids=[shape.__name__ for shape, _ in SHAPES])
def test_each_obstacle_of_a_machine_is_found_in_the_order_of_mending(
    tree: MachineTree, shape: Callable[[MachineTree], None], expected: list[tuple[str, str]]
) -> None:
    """And no other."""
    shape(tree)
    found = wrong(pyvfio.doctor(NIC, kernel=tree.machine))
    assert [check for check, _ in found] == [check for check, _ in expected]
    for (_, summary), (_, words) in zip(found, expected, strict=True):
        assert words in summary


@pytest.mark.parametrize("shape", machines.MACHINES, ids=lambda shape: shape.__name__)
def test_each_obstacle_comes_with_a_way_to_mend_it(tree: MachineTree, shape: Callable[[MachineTree], None]) -> None:
    """Commands of one line each, a step by hand, or a boot; and a script that sh can read."""
    shape(tree)
    diagnosis = pyvfio.doctor(NIC, kernel=tree.machine)
    assert not diagnosis.ok
    assert diagnosis.status == "wrong"
    assert all(finding.commands or finding.by_hand for finding in diagnosis.wrong)
    assert all(command.text.isprintable() for finding in diagnosis for command in finding.commands)
    done = subprocess.run(["sh", "-n"], input=diagnosis.script().encode(), capture_output=True, check=True)
    assert done.stderr == b""


def test_every_shape_of_a_machine_is_judged() -> None:
    """Those that the properties use, and no others."""
    assert {shape for shape, _ in SHAPES} == set(machines.MACHINES)


def test_a_virtual_machine_is_told_of_the_device_that_its_command_line_alone_does_not_make(tree: MachineTree) -> None:
    """The words of the kernel's command line come as well."""
    machines.virtual_without(tree)
    found = finding(pyvfio.doctor(kernel=tree.machine), "iommu")
    assert "-device intel-iommu" in found.by_hand
    assert found.add_arguments == ("intel_iommu=on",)


def test_bridges_with_their_own_driver_are_not_blamed(tree: MachineTree) -> None:
    """Nor the device itself, for which another check speaks. A bridge with another driver is left without one."""
    machines.acs_trouble(tree)
    said = pyvfio.doctor(NIC, kernel=tree.machine).script()
    assert machines.PORT not in said
    tree.add_device("0000:00:1d.0", driver="shpchp", group=7, class_code=BRIDGE)
    assert "pyvfio bind --driver none 0000:00:1d.0" in commands(pyvfio.doctor(NIC, kernel=tree.machine))


def test_a_script_does_not_end_the_use_of_a_device(tree: MachineTree) -> None:
    """The commands that take an interface down or unmount a disk are comments."""
    machines.acs_trouble(tree)
    lines = pyvfio.doctor(NIC, kernel=tree.machine).script().splitlines()
    assert {"# ip link set dev eth0 down", "# umount /data", f"pyvfio bind {NIC}"} <= set(lines)
    assert not any(line.startswith(("ip ", "umount")) for line in lines)


def test_a_script_binds_nothing_that_a_boot_would_undo(tree: MachineTree) -> None:
    """It says that the other checks wait for the boot, and does not boot by itself."""
    machines.intel_off(tree)
    lines = pyvfio.doctor(NIC, kernel=tree.machine).script().splitlines()
    assert not any(line.startswith("pyvfio bind") for line in lines)
    assert lines[-1] == "# reboot"
    assert MODPROBE in lines


def test_without_a_device_the_machine_is_judged(tree: MachineTree) -> None:
    """The device's checks are not made."""
    machines.acs_trouble(tree)
    diagnosis = pyvfio.doctor(kernel=tree.machine)
    assert diagnosis.ok
    assert (diagnosis.bdf, diagnosis.host, diagnosis.kernel) == (None, "box", machines.RELEASE)
    assert {"device", "driver", "viability", "reset"}.isdisjoint(finding.check for finding in diagnosis)
    assert str(diagnosis).endswith("Nothing stands between this machine and pyvfio.open_device.")


def test_a_device_that_is_not_there_and_a_bridge_are_obstacles(tree: MachineTree) -> None:
    """The error of the library says which devices there are."""
    machines.acs_trouble(tree)
    assert wrong(pyvfio.doctor("0000:01:00.7", kernel=tree.machine)) == [
        ("device", "there is no PCI device 0000:01:00.7")
    ]
    assert wrong(pyvfio.doctor(machines.PORT, kernel=tree.machine))[0] == (
        "device",
        f"{machines.PORT} is a PCI bridge, and VFIO takes no bridge",
    )


def test_modules_that_are_built_in_are_there(tree: MachineTree) -> None:
    """A built-in module shows in /sys/module only where it has parameters."""
    machines.not_loaded(tree)
    names = "\n".join(f"kernel/drivers/vfio/{name}" for name in machines.DRIVERS)
    tree.file(f"lib/modules/{machines.RELEASE}/modules.builtin", names)
    assert finding(pyvfio.doctor(kernel=tree.machine), "modules").status == "ok"


@pytest.mark.parametrize(
    ("word", "said"),
    [("module_blacklist=foo,vfio_pci", "module_blacklist=foo,vfio_pci"), ("nomodule", "nomodule")],
)
def test_a_command_line_that_keeps_modules_out_is_named_with_the_word(tree: MachineTree, word: str, said: str) -> None:
    """Until the next boot nothing loads them, so no modprobe is proposed."""
    machines.not_loaded(tree)
    (tree.root / "etc/modprobe.d/harden.conf").unlink()
    tree.cmdline(word)
    diagnosis = pyvfio.doctor(kernel=tree.machine)
    assert finding(diagnosis, "modules").remove_arguments == (said,)
    assert finding(diagnosis, "modules").reboot
    assert not any("modprobe" in command for command in commands(diagnosis))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("intel_iommu=off intel_iommu=on", "the kernel has not initialized the IOMMU"),
        ("intel_iommu=on intel_iommu=off", "was told not to use the IOMMU (intel_iommu=off)"),
        ("intel_iommu=off,on", "the kernel has not initialized the IOMMU"),
        ("intel_iommu=on amd_iommu=off", "the kernel has not initialized the IOMMU"),
        ("amd_iommu=off intel_iommu=sm_on", "was not told to use the IOMMU"),
    ],
)
def test_the_last_word_for_the_machines_own_iommu_decides(tree: MachineTree, words: str, said: str) -> None:
    """As `intel_iommu_setup` reads them one after the other; another maker's word is none for this machine."""
    machines.intel_off(tree)
    tree.cmdline(words)
    assert said in finding(pyvfio.doctor(kernel=tree.machine), "iommu").summary


def test_an_examination_loads_no_module(tree: MachineTree) -> None:
    """An open of /dev/vfio/vfio would load VFIO's, where the node is static and the module is not loaded."""
    machines.not_loaded(tree)
    tree.add_node()
    pyvfio.doctor(NIC, kernel=tree.machine)
    assert isinstance(tree.machine, FakeKernel)
    assert [call for call in tree.machine.trace if call.call == "open"] == []


def test_a_kernel_that_loads_no_more_modules_is_named(tree: MachineTree) -> None:
    """kernel.modules_disabled cannot be taken back before a boot."""
    machines.not_loaded(tree)
    tree.put("proc/sys/kernel/modules_disabled", "1\n")
    found = finding(pyvfio.doctor(kernel=tree.machine), "modules")
    assert "kernel.modules_disabled is 1" in found.summary
    assert "/etc/modules-load.d" in found.by_hand


def test_a_container_is_told_what_to_do_on_its_host(tree: MachineTree) -> None:
    """No command in a container loads a module or changes the kernel's command line."""
    machines.intel_off(tree)
    place_process(tree.proc, container=True)
    iommu, modules = pyvfio.doctor(kernel=tree.machine).wrong
    assert iommu.commands == modules.commands == ()
    assert iommu.by_hand.startswith("On the container's host: Add intel_iommu=on,sm_on")
    assert modules.by_hand.startswith(f"On the host: {MODPROBE}")


def test_a_step_names_each_machine_once(tree: MachineTree) -> None:
    """In a container of a virtual machine: the options of QEMU, and the command line of the container's host."""
    machines.virtual_without(tree)
    place_process(tree.proc, container=True)
    by_hand = finding(pyvfio.doctor(kernel=tree.machine), "iommu").by_hand
    assert by_hand.count("intel_iommu=on") == 1
    assert by_hand.index("for QEMU: ") < by_hand.index("On the container's host: Add intel_iommu=on")
    assert "guest" not in by_hand


@pytest.mark.parametrize("shape", machines.MACHINES, ids=lambda shape: shape.__name__)
def test_each_obstacle_asks_for_one_boot_at_most(tree: MachineTree, shape: Callable[[MachineTree], None]) -> None:
    """A step that names the kernel to boot leaves the reboot to the last line."""
    shape(tree)
    for found in pyvfio.doctor(NIC, kernel=tree.machine).wrong:
        asked = re.findall(r"\b(?:Boot|[Rr]eboot)\b", str(found))
        assert asked == ["reboot"] * found.reboot, str(found)


def test_one_reboot_serves_all_obstacles_that_need_one(tree: MachineTree) -> None:
    """The text asks for the reboot once, behind the last of these obstacles."""
    machines.firmware_and_line(tree)
    diagnosis = pyvfio.doctor(kernel=tree.machine)
    assert sum(found.reboot for found in diagnosis) > 1
    assert diagnosis.text().count("Then reboot.") == 1


def test_the_verdict_counts_the_obstacles_and_names_the_next_command(tree: MachineTree) -> None:
    machines.not_loaded(tree)
    several = pyvfio.doctor(NIC, kernel=tree.machine)
    assert several.verdict == (
        f"{len(several.wrong)} obstacles on {NIC}, in the order in which to remove them. "
        f"Then run pyvfio doctor {NIC} again."
    )
    one = replace(several, findings=several.wrong[:1])
    assert one.verdict == f"1 obstacle on {NIC}. Remove the obstacle, then run pyvfio doctor {NIC} again."


def test_interrupts_that_were_allowed_though_not_remapped_are_a_note(tree: MachineTree) -> None:
    """A device can forge them."""
    machines.forgeable(tree)
    assert finding(pyvfio.doctor(kernel=tree.machine), "interrupts").status == "wrong"
    tree.put("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y\n")
    assert finding(pyvfio.doctor(kernel=tree.machine), "interrupts").status == "note"
    tree.put("proc/interrupts", machines.REMAPPED)
    assert finding(pyvfio.doctor(kernel=tree.machine), "interrupts").status == "ok"


def test_interrupts_that_iommufd_refuses_are_accepted_by_a_parameter_of_iommufd(tree: MachineTree) -> None:
    """The parameter of vfio_iommu_type1 does not count."""
    machines.forgeable_iommufd(tree)
    tree.put("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y\n")
    assert commands(pyvfio.doctor(NIC, kernel=tree.machine)) == [
        "echo Y > /sys/module/iommufd/parameters/allow_unsafe_interrupts",
        "printf '%s\\n' 'options iommufd allow_unsafe_interrupts=1' > /etc/modprobe.d/pyvfio.conf",
    ]
    tree.put("sys/module/iommufd/parameters/allow_unsafe_interrupts", "Y\n")
    assert finding(pyvfio.doctor(NIC, kernel=tree.machine), "interrupts").status == "note"
    tree.put("proc/interrupts", machines.REMAPPED)
    assert finding(pyvfio.doctor(NIC, kernel=tree.machine), "interrupts").status == "ok"


def test_a_kernel_with_iommufd_and_no_type1_lacks_nothing(tree: MachineTree) -> None:
    """By the options, or by sysfs where the options cannot be read. Nothing is said of containers and groups."""
    machines.iommufd_alone(tree)
    (tree.proc / "41/fd/3").unlink()
    for _ in range(2):
        said = pyvfio.doctor(NIC, kernel=tree.machine)
        assert said.ok
        assert finding(said, "modules").summary == "the kernel has vfio, vfio-pci, iommufd"
        assert {"iommufd-node", "device-node"} <= {each.check for each in said}
        assert {"container-node", "group-node", "entries"}.isdisjoint(each.check for each in said)
        (tree.root / f"boot/config-{machines.RELEASE}").unlink(missing_ok=True)


def test_a_group_that_type1_has_open_is_an_obstacle_where_the_device_is_wanted_through_iommufd(
    tree: MachineTree,
) -> None:
    """Whoever holds the group, seen or not: the kernel refuses the bind, and not the open."""
    machines.iommufd_alone(tree)
    (tree.proc / "41/fd/3").unlink()
    node = tree.add_group_node(3)
    assert pyvfio.doctor(NIC, kernel=tree.machine).ok
    tree.place_holder(42, node, "dpdk")
    assert wrong(pyvfio.doctor(NIC, kernel=tree.machine)) == [
        ("device-node", "IOMMU group 3 is already open in dpdk (pid 42)")
    ]
    (tree.proc / "42/fd/3").unlink()
    kernel = KernelWithOpenGroup(sysfs=tree.sysfs, dev=tree.dev, proc=tree.proc)
    (found,) = pyvfio.doctor(NIC, kernel=kernel).wrong
    assert "no process was found that has the group open" in found.by_hand


class KernelWithOpenGroup(LinuxKernel):
    """A kernel whose groups a process of another PID namespace has open."""

    def open(self, path: str, flags: int) -> int:
        """EBUSY for groups."""
        if path.rpartition("/")[2].isdecimal():
            raise OSError(errno.EBUSY, "Device or resource busy")
        return super().open(path, flags)


def test_iommufd_that_is_not_loaded_is_loaded_before_the_nodes_are_tried(tree: MachineTree) -> None:
    """Nothing is opened until then: an open of a static node loads the module."""
    machines.iommufd_alone(tree)
    (tree.sysfs / "class/misc/iommu/dev").unlink()
    (tree.sysfs / "class/misc/iommu").rmdir()
    (tree.sysfs / "module/iommufd").rename(tree.sysfs / "module/other")
    tree.file(f"lib/modules/{machines.RELEASE}/modules.dep", "kernel/drivers/iommu/iommufd/iommufd.ko:\n")
    said = pyvfio.doctor(NIC, kernel=tree.machine)
    assert wrong(said) == [("modules", "iommufd is not loaded")]
    assert "modprobe -a iommufd" in commands(said)


def test_a_kernel_without_iommufd_is_judged_for_a_program_that_wants_it(tree: MachineTree) -> None:
    """The options are named. A kernel with modules that were built apart from the kernel's options is fine."""
    machines.acs_trouble(tree)
    tree.file(f"boot/config-{machines.RELEASE}", "CONFIG_VFIO=m\n# CONFIG_IOMMUFD is not set\n")
    assert pyvfio.doctor(kernel=tree.machine).ok
    missing = wrong(pyvfio.doctor(kernel=tree.machine, iommu="iommufd"))
    assert [summary for check, summary in missing if check == "kernel"] == [
        f"Linux {machines.RELEASE} is built without CONFIG_{name}" for name in ("IOMMUFD", "VFIO_DEVICE_CDEV")
    ]
    tree.add_cdev(SSD, "vfio0")
    assert "kernel" not in dict(wrong(pyvfio.doctor(kernel=tree.machine, iommu="iommufd")))
    with pytest.raises(ValueError, match="iommu is 'type1' or 'iommufd', not 'vfio'"):
        pyvfio.doctor(iommu="vfio")


class Refusing(KernelOnTree):
    """A kernel that lets this user open neither /dev/iommu nor the nodes of devices."""

    def open(self, path: str, flags: int) -> int:
        """EACCES for these nodes."""
        if path.endswith("/iommu") or "/vfio/devices/" in path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return super().open(path, flags)


def test_rights_on_iommufd_and_on_the_node_of_a_device_are_an_obstacle_where_the_program_needs_them(
    tree: MachineTree,
) -> None:
    """With type1 they are notes. The command gives both nodes."""
    machines.virtual_function(tree)
    place_process(tree.proc, user=1000)
    tree.add_cdev(SSD, "vfio0")
    with Refusing(tree) as kernel:
        said = pyvfio.doctor(SSD, kernel=kernel)
        nodes = [each for each in said if each.check in {"iommufd-node", "device-node"}]
        assert [each.status for each in nodes] == ["note", "note"]
        said = pyvfio.doctor(SSD, kernel=kernel, iommu="iommufd")
        assert wrong(said) == [
            ("iommufd-node", f"{kernel.dev}/iommu may not be opened by this user"),
            ("device-node", f"{kernel.dev}/vfio/devices/vfio0 may not be opened by this user"),
        ]
        assert commands(said) == [f"pyvfio bind --user 1000 {SSD}"] * 2
        error = pyvfio.AccessDeniedError(f"{kernel.dev}/vfio/devices/vfio0", hint="")
        error.bdf = SSD
        assert explained(error, kernel) == ["iommufd-node", "device-node"]


def test_a_refused_bind_is_explained_by_the_interrupts_of_iommufd(tree: MachineTree) -> None:
    """Though the machine has type1, which was told to accept the risk."""
    machines.forgeable(tree)
    tree.put("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y\n")
    tree.add_iommufd()
    error = pyvfio.IoctlError(errno.EPERM, "no", request="VFIO_DEVICE_BIND_IOMMUFD", arguments={})
    (found,) = error.explain(kernel=tree.machine)
    assert found.commands[0].text == "echo Y > /sys/module/iommufd/parameters/allow_unsafe_interrupts"


def test_the_risk_of_forged_interrupts_is_for_a_person_to_take(tree: MachineTree) -> None:
    """But in a virtual machine, whose device forges no interrupt of another machine."""
    machines.forgeable(tree)
    said = pyvfio.doctor(kernel=tree.machine)
    assert len([command for command in commands(said) if "allow_unsafe_interrupts" in command]) == 2
    tree.put("proc/cpuinfo", machines.AMD + machines.BARE)
    said = pyvfio.doctor(kernel=tree.machine)
    assert commands(said) == []
    assert "\n# echo Y > /sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts\n" in said.script()


def test_remapping_that_the_command_line_has_off_is_mended_there(tree: MachineTree) -> None:
    """And no risk is proposed."""
    machines.forgeable(tree)
    tree.cmdline("intremap=off")
    diagnosis = pyvfio.doctor(kernel=tree.machine)
    assert finding(diagnosis, "interrupts").remove_arguments == ("intremap=off",)
    assert not any("allow_unsafe" in command for command in commands(diagnosis))


def test_a_virtual_function_may_want_a_token(tree: MachineTree) -> None:
    """Where its physical function is bound to VFIO."""
    machines.virtual_function(tree)
    diagnosis = pyvfio.doctor(NIC, kernel=tree.machine)
    assert "vf_token=" in finding(diagnosis, "token").why
    assert finding(diagnosis, "reset").summary == f"{NIC} can be reset: flr bus"


# --- A kernel with the device bound


def test_a_device_that_can_be_opened_has_no_obstacle(kernel: PlacedKernel) -> None:
    """The group was tried, so the kernel has judged interrupts and the group."""
    diagnosis = pyvfio.doctor(BDF, kernel=kernel)
    assert wrong(diagnosis) == []
    assert {finding.status for finding in diagnosis if finding.check != "reset"} == {"ok"}
    with pyvfio.open_device(BDF, kernel=kernel) as device:
        assert device.bdf == BDF


def test_an_ordinary_user_is_given_the_node(kernel: PlacedKernel) -> None:
    """By the number of the user; a device cgroup is not fixed by that."""
    place_process(kernel.proc, user=1000)
    kernel.fail(call="open", errno=errno.EACCES, nth=3)  # after /dev/vfio/vfio, and once more
    diagnosis = pyvfio.doctor(BDF, kernel=kernel)
    assert wrong(diagnosis) == [("group-node", f"{kernel.dev}/vfio/2 may not be opened by this user")]
    assert commands(diagnosis) == [f"pyvfio bind --user 1000 {BDF}"]
    kernel.fail(call="open", errno=errno.EPERM, nth=3)
    diagnosis = pyvfio.doctor(BDF, kernel=kernel)
    assert wrong(diagnosis) == [("group-node", f"{kernel.dev}/vfio/2 may not be opened by this process")]
    assert "DeviceAllow" in diagnosis.wrong[0].by_hand
    assert commands(diagnosis) == []


def test_an_ordinary_user_is_told_of_the_node_that_is_to_come(tree: MachineTree) -> None:
    """It is root's, when the device is bound; the script binds first."""
    machines.forgeable(tree)
    place_process(tree.proc, user=1000)
    tree.put("proc/interrupts", machines.REMAPPED)
    assert commands(pyvfio.doctor(NIC, kernel=tree.machine)) == [
        f"pyvfio bind {NIC}",
        f"pyvfio bind --user 1000 {NIC}",
    ]


def test_rights_on_a_node_leave_the_driver_of_the_device(kernel: PlacedKernel) -> None:
    """A driver of a vendor keeps the device: the command names that driver."""
    place_process(kernel.proc, user=1000)
    kernel.bind(BDF, "mlx5_vfio_pci")
    kernel.fail(call="open", errno=errno.EACCES, nth=3)
    diagnosis = pyvfio.doctor(BDF, kernel=kernel)
    assert commands(diagnosis) == [f"pyvfio bind --driver mlx5_vfio_pci --user 1000 {BDF}"]


def test_no_command_gives_rights_on_the_host_from_inside_of_a_container(tree: MachineTree) -> None:
    """The user is another one there; the finding names the options that start the container."""
    machines.forgeable(tree)
    place_process(tree.proc, user=1000, container=True)
    found = finding(pyvfio.doctor(NIC, kernel=tree.machine), "group-node")
    assert (found.status, found.commands) == ("wrong", ())
    assert "--group-add" in found.why
    assert found.by_hand


def test_the_process_that_has_the_group_is_named_and_not_killed(kernel: PlacedKernel) -> None:
    """The command that ends it is a comment of the script."""
    kernel.own_proc = None
    node = kernel.dev / "vfio/2"
    with node.open() as file, subprocess.Popen(["sleep", "1000"], stdin=file) as holder:
        file.close()
        try:
            kernel.fail(call="open", errno=errno.EBUSY, nth=3)
            diagnosis = pyvfio.doctor(BDF, kernel=kernel)
        finally:
            holder.kill()
    assert f"IOMMU group 2 is already open in sleep (pid {holder.pid})" in [summary for _, summary in wrong(diagnosis)]
    assert f"# kill {holder.pid}" in diagnosis.script().splitlines()


def test_a_group_that_type1_refuses_for_its_interrupts_is_found_by_trying(kernel: PlacedKernel) -> None:
    """Though /proc/interrupts does not say it."""
    kernel.fail(call="ioctl", request="VFIO_SET_IOMMU", errno=errno.EPERM)
    diagnosis = pyvfio.doctor(BDF, kernel=kernel)
    assert [check for check, _ in wrong(diagnosis)] == ["interrupts"]
    assert any("allow_unsafe_interrupts" in command.text for command in diagnosis.wrong[0].commands)


def test_another_function_of_the_device_keeps_the_group_from_being_viable(tmp_path: Path) -> None:
    """Until its driver leaves it."""
    place_process(tmp_path)
    devices = [FakeDevice(BDF), FakeDevice("0000:00:02.1", driver="e1000e")]
    with PlacedKernel(groups=[(2, devices)]) as kernel:
        kernel.own_proc = tmp_path
        diagnosis = pyvfio.doctor(BDF, kernel=kernel)
        assert ("viability", "0000:00:02.1 of IOMMU group 2 is bound to e1000e") in wrong(diagnosis)
        kernel.bind("0000:00:02.1", None)
        assert "viability" not in dict(wrong(pyvfio.doctor(BDF, kernel=kernel)))


# --- Memory


class Limited(PlacedKernel):
    """A process that may lock some bytes."""

    lock = Memlock(limit=65536, used=4096, privileged=False)

    def memlock(self) -> Memlock:
        """As set."""
        return self.lock


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[Limited]:
    """The process of an ordinary user, on a machine with limits.conf."""
    (tmp_path / "4711").mkdir()
    (tmp_path / "self").symlink_to("4711")
    place_process(tmp_path, user=1000)
    (tmp_path / "self/root" / "etc/security/limits.d").mkdir(parents=True)
    (tmp_path / "self/root" / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nann:x:1000:1000::/:/bin/sh\n")
    with Limited() as made:
        made.own_proc = tmp_path
        yield made


def test_a_small_limit_of_locked_memory_is_raised_for_the_user_and_now(limited: Limited) -> None:
    """For the logins to come, and for this process; in a service and a container its manager does that."""
    diagnosis = pyvfio.doctor(kernel=limited)
    assert "lets this process map 60 KiB" in finding(diagnosis, "memlock").summary
    assert commands(diagnosis)[-2:] == [
        "printf '%s\\n' 'ann - memlock unlimited' > /etc/security/limits.d/90-pyvfio.conf",
        "prlimit --pid 4711 --memlock=unlimited:unlimited",
    ]
    place_process(limited.proc, user=1000, cgroup="0::/system.slice/driver.service")
    assert finding(pyvfio.doctor(kernel=limited), "memlock").commands == ()
    assert "LimitMEMLOCK=" in finding(pyvfio.doctor(kernel=limited), "memlock").by_hand


def test_the_limit_is_held_against_the_memory_that_the_program_maps(limited: Limited) -> None:
    """Exactly so much is asked for; where nothing is said, a usual limit is a note."""
    limited.lock = Memlock(limit=8 << 20, used=4096, privileged=False)
    assert finding(pyvfio.doctor(kernel=limited), "memlock").status == "note"
    assert finding(pyvfio.doctor(kernel=limited, memory=1 << 20), "memlock").status == "ok"
    found = finding(pyvfio.doctor(kernel=limited, memory=8 << 20), "memlock")
    assert found.status == "wrong"
    assert [command.text.split("=", 1)[-1] for command in found.commands[1:]] == ["8392704:8392704"]
    limited.lock = Memlock(limit=8 << 20, used=4096, privileged=True)
    assert finding(pyvfio.doctor(kernel=limited, memory=8 << 20), "memlock").status == "ok"


def test_the_room_in_the_control_group_is_held_against_the_memory_that_the_program_maps(tree: MachineTree) -> None:
    """The kernel would kill a process for it."""
    for name, text in (("max", "1048576"), ("current", "4096"), ("stat", "inactive_file 0")):
        tree.put(f"sys/fs/cgroup/memory.{name}", text + "\n")
    tree.put("proc/meminfo", "SwapFree:  0 kB\n")
    assert finding(pyvfio.doctor(kernel=tree.machine, memory=1 << 20), "room").status == "wrong"
    assert finding(pyvfio.doctor(kernel=tree.machine, memory=1 << 19), "room").status == "ok"


@pytest.mark.parametrize(
    ("file", "text", "check", "status"),
    [
        ("proc/sys/vm/overcommit_memory", "2", "overcommit", "note"),
        ("proc/sys/vm/overcommit_memory", "1", "overcommit", "ok"),
        ("proc/sys/vm/max_map_count", "1024", "maps", "note"),
        ("proc/sys/vm/max_map_count", "1048576", "maps", "ok"),
        ("sys/module/vfio_iommu_type1/parameters/dma_entry_limit", "0", "entries", "wrong"),
        ("sys/module/vfio_iommu_type1/parameters/dma_entry_limit", "100", "entries", "note"),
        ("sys/module/vfio_iommu_type1/parameters/dma_entry_limit", "65535", "entries", "ok"),
    ],
)
def test_limits_of_the_kernel_are_told(tree: MachineTree, file: str, text: str, check: str, status: str) -> None:
    """Those that are lower than usual."""
    machines.acs_trouble(tree)
    tree.put(file, text + "\n")
    assert finding(pyvfio.doctor(kernel=tree.machine), check).status == status


def test_a_pool_of_huge_pages_that_is_used_up_is_a_note(tree: MachineTree) -> None:
    """It is told how many are free."""
    for name, free in (("nr_hugepages", "8"), ("free_hugepages", "3")):
        tree.put(f"sys/kernel/mm/hugepages/hugepages-2048kB/{name}", free + "\n")
    assert finding(pyvfio.doctor(kernel=tree.machine), "hugepages").summary == "3 of 8 pages of 2 MiB are free"
    tree.put("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "0\n")
    assert finding(pyvfio.doctor(kernel=tree.machine), "hugepages").status == "note"


# --- Errors


def explained(error: VfioError, kernel: object) -> list[str]:
    """The checks that fit an error."""
    return [finding.check for finding in error.explain(kernel=kernel)]


def test_an_error_of_open_device_is_explained_by_the_same_checks(tree: MachineTree) -> None:
    """The findings of the whole examination that fit the error, and its device."""
    machines.acs_trouble(tree)
    with pytest.raises(pyvfio.NotBoundError) as caught:
        pyvfio.open_device(NIC, kernel=tree.machine)
    whole = pyvfio.doctor(NIC, kernel=tree.machine)
    assert caught.value.bdf == NIC
    assert explained(caught.value, tree.machine) == ["use", "use", "driver"]
    assert set(caught.value.explain(kernel=tree.machine)) < set(whole)


def test_an_error_without_a_group_is_explained_by_the_reason(tree: MachineTree) -> None:
    """The firmware, or the kernel's command line."""
    machines.intel_off(tree)
    with pytest.raises(pyvfio.DeviceNotFoundError) as caught:
        pyvfio.open_device(NIC, kernel=tree.machine)
    (found,) = caught.value.explain(kernel=tree.machine)
    assert (found.check, found.remove_arguments) == ("iommu", ("intel_iommu=off,sm_on",))


def test_a_group_in_use_or_not_viable_is_explained(tmp_path: Path) -> None:
    """Also when the group alone is known, and when the error was sent to another process."""
    place_process(tmp_path)
    devices = [FakeDevice(BDF), FakeDevice("0000:00:02.1", driver="e1000e")]
    with FakeKernel(groups=[(2, devices)]) as kernel:
        with pytest.raises(pyvfio.GroupNotViableError) as caught:
            pyvfio.open_device(BDF, kernel=kernel)
        again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 (its own)
        assert again.bdf == BDF
        assert explained(again, kernel) == ["viability"]
        assert explained(pyvfio.GroupNotViableError(2, []), kernel) == ["viability"]
        kernel.bind("0000:00:02.1", None)
        assert explained(again, kernel) == []
        with pyvfio.open_device(BDF, kernel=kernel), pytest.raises(pyvfio.GroupBusyError) as busy:
            pyvfio.open_device(BDF, kernel=kernel)
        with pyvfio.open_device(BDF, kernel=kernel):
            assert explained(busy.value, kernel) == ["group-node"]


def test_a_node_that_may_not_be_opened_is_explained_by_that_node(kernel: PlacedKernel) -> None:
    """The group is known by the node's name."""
    place_process(kernel.proc, user=1000)
    error = pyvfio.AccessDeniedError(str(kernel.dev / "vfio/3"), hint="")
    assert explained(error, kernel) == []
    kernel.fail(call="open", errno=errno.EACCES, nth=3)
    (found,) = error.explain(kernel=kernel)
    assert found.commands[0].text == "pyvfio bind --user 1000 0000:00:03.0"


def test_a_limit_is_explained_with_the_memory_that_was_asked_for(limited: Limited) -> None:
    """The commands raise it so far."""
    error = PinLimitError(errno.ENOMEM, "too much", request="VFIO_IOMMU_MAP_DMA", arguments={})
    error.asked = 1 << 20
    (found,) = error.explain(kernel=limited)
    assert (found.check, found.commands[-1].text.split("=", 1)[-1]) == ("memlock", "1052672:1052672")


def test_a_full_container_is_explained_by_its_limit(tree: MachineTree) -> None:
    """Which is the usual one."""
    machines.acs_trouble(tree)
    error = pyvfio.EntryLimitError(errno.ENOSPC, "full", request="VFIO_IOMMU_MAP_DMA", arguments={})
    (found,) = error.explain(kernel=tree.machine)
    assert found.status == "wrong"
    assert found.commands[0].text.startswith("echo 262140 > ")


def test_an_error_of_a_program_is_not_explained(kernel: PlacedKernel) -> None:
    """The machine is not to blame for a handle that was closed."""
    assert pyvfio.ClosedError("closed").explain(kernel=kernel) == ()
    assert pyvfio.IoctlError(22, "no", request="VFIO_IOMMU_MAP_DMA", arguments={}).explain(kernel=kernel) == ()


def test_an_error_costs_none_of_the_checks_before_it_is_explained() -> None:
    """They are imported by `explain`."""
    script = "import sys, pyvfio; pyvfio.VfioError('x'); print('pyvfio.diagnosis' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# --- Arguments


def test_arguments_that_can_never_be_right_are_refused(kernel: PlacedKernel) -> None:
    """Before anything is looked at."""
    for arguments in (("zz",), (7,)):
        with pytest.raises((ValueError, TypeError)):
            pyvfio.doctor(*arguments, kernel=kernel)
    with pytest.raises(ValueError, match="0 or more, not -1"):
        pyvfio.doctor(kernel=kernel, memory=-1)
    with pytest.raises(TypeError):
        pyvfio.doctor(kernel=kernel, memory="1G")  # type: ignore[arg-type]
