"""What `pyvfio.doctor` says of the nodes of VFIO and iommufd: who is refused by what, and the command that helps."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pyvfio
from pyvfio.findings import Command, Finding
from pyvfio.kernel import Kernel
from pyvfio.testing.fake import FakeDevice, FakeKernel
from tests.unit import machines
from tests.unit.fakes import BDF, PlacedKernel
from tests.unit.machines import NIC, SSD, MachineTree, program_of_root, texts, told
from tests.unit.processes import open_fds
from tests.unit.sysfs import link, place_process

GIVEN = "The rights last until the device is unbound; --persist renews the rights at each boot"


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[PlacedKernel]:
    """A fake kernel whose program is root, in no container and no service."""
    with program_of_root(tmp_path) as made:
        yield made


def of_check(kernel: Kernel, check: str, bdf: str | None = NIC, *, iommu: str | None = None) -> list[Finding]:
    """The findings of a check."""
    return [found for found in pyvfio.doctor(bdf, kernel=kernel, iommu=iommu) if found.check == check]


# --- /dev/vfio/vfio and the group


def test_a_node_that_can_be_opened_is_in_order(kernel: PlacedKernel) -> None:
    """The container and the group; neither is told of a program that uses iommufd."""
    container, group = f"{kernel.dev}/vfio/vfio can be opened", f"{kernel.dev}/vfio/2 can be opened"
    assert told(of_check(kernel, "container-node", BDF)) == [("ok", f"{container}, and has type1")]
    assert told(of_check(kernel, "group-node", BDF)) == [("ok", f"{group}, and a container takes the group")]
    assert of_check(kernel, "group-node", None) == []
    for check in ("container-node", "group-node"):
        assert of_check(kernel, check, BDF, iommu="iommufd") == []


REFUSALS = pytest.mark.parametrize(
    ("number", "process", "helps"),
    [
        (errno.EACCES, {"user": 1000}, True),
        (errno.EPERM, {"user": 1000}, False),
        (errno.EACCES, {"user": 0}, False),
        (errno.EACCES, {"user": 1000, "container": True}, False),
        (errno.EACCES, {"user": 1000, "uid_map": "0 1000 1"}, False),
        (errno.EIO, {"user": 1000}, False),
    ],
)
"""A refusal of a node is mended by a command if the mode alone is in the way: not a device cgroup, not for root, and
not from inside of a container or a user namespace."""


@REFUSALS
def test_a_command_gives_the_node_of_containers_to_all_users(
    tree: MachineTree, number: int, process: dict[str, object], *, helps: bool
) -> None:
    """The node gives no device."""
    machines.virtual_function(tree)
    place_process(tree.proc, **process)  # type: ignore[arg-type]
    kernel = tree.machine
    assert isinstance(kernel, FakeKernel)
    for nth in (1, 2):  # of the look whether there is type1, and of the check
        kernel.fail(call="open", errno=number, nth=nth)
    (found,) = of_check(kernel, "container-node")
    assert found.status == "wrong"
    assert f"{kernel.dev}/vfio/vfio " in found.summary
    assert found.commands == ((Command(f"chmod 666 {kernel.dev}/vfio/vfio"),) if helps else ())
    assert found.by_hand or number == errno.EIO


@REFUSALS
def test_a_command_gives_the_node_of_a_group_to_the_user(
    kernel: PlacedKernel, number: int, process: dict[str, object], *, helps: bool
) -> None:
    """The bind that makes the node renews the rights."""
    place_process(kernel.proc, **process)  # type: ignore[arg-type]
    kernel.fail(call="open", errno=number, nth=3)
    (found,) = of_check(kernel, "group-node", BDF)
    assert found.status == "wrong"
    assert f"{kernel.dev}/vfio/2 " in found.summary
    assert found.commands == ((Command(f"pyvfio bind --user 1000 {BDF}", GIVEN),) if helps else ())


def test_a_node_that_is_missing_in_this_dev_is_made_by_its_number(tree: MachineTree) -> None:
    """Not in a container, whose manager passes the node in; and not without a number in sysfs."""
    machines.plain_root(tree)
    node = tree.dev / "vfio/vfio"
    (found,) = of_check(tree.kernel, "container-node")
    assert texts([found]) == [f"mkdir -p {tree.dev}/vfio && mknod {node} c 10 196"]
    assert found.by_hand
    (tree.sysfs / "class/misc/vfio/dev").unlink()
    assert texts(of_check(tree.kernel, "container-node")) == []
    tree.put("sys/class/misc/vfio/dev", "10:196\n")
    place_process(tree.proc, container=True)
    assert texts(of_check(tree.kernel, "container-node")) == []


def test_a_holder_is_named_and_left_to_a_person(kernel: PlacedKernel) -> None:
    """This process is not told to end itself."""
    kernel.own_proc = None
    node = kernel.dev / "vfio/2"
    with node.open() as own, node.open() as file, subprocess.Popen(["sleep", "1000"], stdin=file) as holder:
        file.close()
        try:
            kernel.fail(call="open", errno=errno.EBUSY, nth=3)
            (found,) = of_check(kernel, "group-node", BDF)
        finally:
            holder.kill()
        assert not own.closed
    assert found.status == "wrong"
    assert found.commands == (Command(f"kill {holder.pid}", "sleep has the group open", risky=True),)
    assert found.by_hand


def test_a_group_that_is_not_viable_is_told_by_the_node_that_was_refused(tmp_path: Path) -> None:
    """As far as an error alone is explained, which names the node and no device."""
    place_process(tmp_path)
    with FakeKernel(groups=[(2, [FakeDevice(BDF), FakeDevice("0000:00:02.1", driver="e1000e")])]) as kernel:
        error = pyvfio.AccessDeniedError(f"{kernel.dev}/vfio/2", hint="")
        (found,) = error.explain(kernel=kernel)
    assert (found.check, found.status) == ("viability", "wrong")
    assert "0000:00:02.1" in found.summary
    assert found.by_hand == "Bind each of them to vfio-pci or to no driver at all"


def test_the_rights_are_given_on_a_bound_device_of_the_group(tmp_path: Path) -> None:
    """Where an error names the group alone: not on one without a driver, and not on what is no PCI device."""
    place_process(tmp_path, user=1000)
    devices = [FakeDevice("0000:00:02.0", driver=None), FakeDevice("0000:00:02.1")]
    with PlacedKernel(groups=[(2, devices)]) as kernel:
        kernel.own_proc = tmp_path
        members = kernel.sysfs / "kernel/iommu_groups/2/devices"
        link(members / "0000:00:01.7", kernel.sysfs / "gone")
        link(members / "dma", kernel.sysfs / "devices/dma")
        kernel.fail(call="open", errno=errno.EACCES, nth=3)
        (found,) = pyvfio.AccessDeniedError(f"{kernel.dev}/vfio/2", hint="").explain(kernel=kernel)
        assert texts([found]) == ["pyvfio bind --user 1000 0000:00:02.1"]


@pytest.mark.parametrize(
    ("shape", "iommu", "check", "node"),
    [
        (machines.forgeable, None, "group-node", "vfio/3"),
        (machines.arm_server, None, "group-node", "vfio/N"),
        (machines.forgeable, "iommufd", "device-node", "vfio/devices/vfioN"),
    ],
)
def test_a_node_to_come_is_named_as_far_as_it_is_known(
    tree: MachineTree, shape: Callable[[MachineTree], None], iommu: str | None, check: str, node: str
) -> None:
    """With the command for this device; the kernel chooses the number of some. Root needs no right."""
    shape(tree)
    assert of_check(tree.machine, check, iommu=iommu) == []
    place_process(tree.proc, user=1000)
    if iommu is not None:
        tree.add_iommufd()
        tree.put("proc/interrupts", machines.REMAPPED)
    (found,) = [each for each in of_check(tree.machine, check, iommu=iommu) if "appears" in each.summary]
    path = f"{tree.machine.dev}/{node}"
    assert told([found]) == [
        ("wrong", f"{path} appears when the device is bound, and belongs to root unless a udev rule gives rights")
    ]
    assert found.commands == (Command(f"pyvfio bind --user 1000 {NIC}", GIVEN),)
    assert f"pyvfio bind --user 1000 {NIC}" in found.why
    assert found.by_hand == ""


def test_root_of_a_user_namespace_gives_no_rights(tree: MachineTree) -> None:
    """The bind is another one's, outside."""
    machines.forgeable(tree)
    place_process(tree.proc, user=1000, uid_map="0 1000 1")
    (found,) = of_check(tree.machine, "group-node")
    assert found.commands == ()
    assert found.by_hand == "Run pyvfio doctor again when the device is bound"


# --- iommufd


def test_the_nodes_of_iommufd_are_in_order_and_closed_again(tree: MachineTree) -> None:
    """Each is opened once. Where type1 is used they are told all the same, if there are any."""
    machines.iommufd_alone(tree)
    (tree.proc / "41/fd/3").unlink()
    before = open_fds()
    for iommu in (None, "type1", "iommufd"):
        expected = [("ok", f"{tree.dev}/iommu can be opened")]
        assert told(of_check(tree.kernel, "iommufd-node", iommu=iommu)) == (expected if iommu != "type1" else [])
    assert told(of_check(tree.kernel, "device-node")) == [("ok", f"{tree.dev}/vfio/devices/vfio0 can be opened")]
    assert open_fds() == before
    assert of_check(tree.kernel, "device-node", None) == []


def test_the_nodes_of_iommufd_are_told_of_a_machine_with_type1_that_has_them(tree: MachineTree) -> None:
    """Not of one without, unless the program uses iommufd; and not where an error of type1 is explained."""
    machines.virtual_function(tree)
    kernel = tree.machine
    assert of_check(kernel, "iommufd-node", SSD) == of_check(kernel, "device-node", SSD) == []
    tree.add_cdev(SSD, "vfio0")
    for check in ("iommufd-node", "device-node"):
        assert [each.status for each in of_check(kernel, check, SSD)] == ["note"]
    error = pyvfio.AccessDeniedError(f"{kernel.dev}/vfio/4", hint="")
    error.bdf = SSD
    assert {each.check for each in error.explain(kernel=kernel)} <= {"group-node"}


def test_a_device_without_a_node_is_an_obstacle_where_the_program_needs_the_node(tree: MachineTree) -> None:
    """It says why the kernel makes none."""
    machines.iommufd_alone(tree)
    (tree.pci / "devices" / NIC / "vfio-dev/vfio0/dev").unlink()
    (found,) = of_check(tree.kernel, "device-node")
    assert found.status == "wrong"
    assert found.summary.startswith(f"{NIC} has no node below {tree.dev}/vfio/devices: ")
    assert "CONFIG_VFIO_DEVICE_CDEV" in found.by_hand
    assert of_check(tree.kernel, "device-node", iommu="type1") == []
