"""Nodes of devices and of iommufd: when they exist, and the error for each refusal of opening or binding them."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvfio import pci
from pyvfio.errors import (
    AccessDeniedError,
    DeviceGoneError,
    DeviceNotFoundError,
    GroupBusyError,
    GroupNotViableError,
    IoctlError,
    NotBoundError,
    UnavailableError,
    UnsupportedError,
    VfioError,
)
from pyvfio.pci.cdevs import explain_bind, explain_cdev, explain_iommufd, has_iommufd, holders_of_cdev, no_cdev
from tests.unit.sysfs import SysfsTree, place_process

BDF, SIBLING, OTHER = "0000:00:02.0", "0000:00:02.1", "0000:00:03.0"
RELEASE = "6.12.9-amd64"
INTERRUPTS_OF_IOMMUFD = "module/iommufd/parameters/allow_unsafe_interrupts"


@pytest.fixture
def tree(tmp_path: Path) -> SysfsTree:
    """A group with two devices bound to VFIO; the first has a node of its own. The program is root."""
    tree = SysfsTree(tmp_path)
    place_process(tree.proc)
    tree.add_device(BDF, driver="vfio-pci", matches="e1000e", group=7)
    tree.add_device(SIBLING, driver="vfio-pci", matches="e1000e", group=7)
    tree.add_cdev(BDF, "vfio0")
    (tree.sysfs / "class/iommu/dmar0").mkdir(parents=True)
    return tree


def failure(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def opened(tree: SysfsTree, number: int) -> VfioError:
    """The error for an open of the device's node that fails."""
    return explain_cdev(tree.kernel, BDF, pci.cdev_node(BDF, kernel=tree.kernel), failure(number))


def bound(tree: SysfsTree, number: int, iommufd: int = 5) -> VfioError:
    """The error for a bind to an iommufd that fails."""
    return explain_bind(tree.kernel, BDF, failure(number), iommufd=iommufd)


def configure(tree: SysfsTree, text: str) -> None:
    """Install the configuration of the running kernel."""
    (tree.proc / "sys/kernel").mkdir(parents=True)
    (tree.proc / "sys/kernel/osrelease").write_text(RELEASE + "\n")
    boot = tree.proc / "self" / "root" / "boot"
    boot.mkdir(parents=True)
    (boot / f"config-{RELEASE}").write_text(text)


# --- Presence


def test_a_device_has_a_node_of_its_own_exactly_if_sysfs_has_its_number(tree: SysfsTree) -> None:
    """A kernel without CONFIG_VFIO_DEVICE_CDEV has the directory too."""
    assert pci.cdev_node(BDF, kernel=tree.kernel) == tree.dev / "vfio/devices/vfio0"
    assert pci.read_device(BDF, kernel=tree.kernel).cdev == "vfio0"
    directory = (tree.pci / "devices" / SIBLING).resolve() / "vfio-dev/vfio1"
    directory.mkdir(parents=True)
    assert pci.cdev_node(SIBLING, kernel=tree.kernel) is None
    (directory / "dev").write_text("511:1\n")
    assert pci.cdev_node(SIBLING, kernel=tree.kernel) == tree.dev / "vfio/devices/vfio1"
    with pytest.raises(DeviceNotFoundError):
        pci.cdev_node(OTHER, kernel=tree.kernel)


def test_a_device_without_an_iommu_has_a_node_that_says_so(tree: SysfsTree) -> None:
    """7.3 names it noiommu-vfioN."""
    directory = (tree.pci / "devices" / SIBLING).resolve() / "vfio-dev/noiommu-vfio0"
    directory.mkdir(parents=True)
    (directory / "dev").write_text("511:1\n")
    assert pci.cdev_node(SIBLING, kernel=tree.kernel) == tree.dev / "vfio/devices/noiommu-vfio0"


def test_a_kernel_has_iommufd_where_sysfs_or_dev_shows_it(tree: SysfsTree) -> None:
    """A static node exists without the module, and is missing in a container whose kernel has the module."""
    assert has_iommufd(tree.kernel)
    (tree.dev / "iommu").unlink()
    assert has_iommufd(tree.kernel)
    (tree.sysfs / "class/misc/iommu/dev").unlink()
    (tree.sysfs / "class/misc/iommu").rmdir()
    assert not has_iommufd(tree.kernel)
    (tree.dev / "iommu").touch()
    assert has_iommufd(tree.kernel)


def test_the_processes_that_have_the_node_of_a_device_open_are_its_holders(tree: SysfsTree) -> None:
    tree.use_real_proc()
    assert holders_of_cdev(BDF, kernel=tree.kernel) == holders_of_cdev(SIBLING, kernel=tree.kernel) == ()
    with (tree.dev / "vfio/devices/vfio0").open():
        (holder,) = holders_of_cdev(BDF, kernel=tree.kernel)
    assert (holder.pid, holder.is_this_process) == (os.getpid(), True)


# --- Opening the node of a device


def test_a_device_that_no_vfio_driver_has_is_not_bound(tree: SysfsTree) -> None:
    tree.add_device(OTHER, driver="e1000e", group=8)
    error = no_cdev(tree.kernel, OTHER)
    assert isinstance(error, NotBoundError)
    assert error.driver == "e1000e"
    assert str(error) == f"{OTHER} is bound to e1000e, not to vfio-pci. pyvfio bind {OTHER}"
    assert isinstance(no_cdev(tree.kernel, "0000:00:04.0"), DeviceNotFoundError)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("# CONFIG_IOMMUFD is not set\n", f"Linux {RELEASE}, built without CONFIG_IOMMUFD, makes none"),
        (
            "CONFIG_IOMMUFD=m\n# CONFIG_VFIO_DEVICE_CDEV is not set\n",
            f"Linux {RELEASE}, built without CONFIG_VFIO_DEVICE_CDEV, makes none",
        ),
        ("CONFIG_IOMMUFD=m\nCONFIG_VFIO_DEVICE_CDEV=y\n", f"Linux {RELEASE} makes none for devices bound to vfio-pci"),
        ("", f"Linux {RELEASE} makes none for devices bound to vfio-pci"),
    ],
)
def test_a_kernel_that_makes_no_nodes_of_devices_is_named_with_the_missing_option(
    tree: SysfsTree, options: str, said: str
) -> None:
    """The hint names the other way to open the device."""
    configure(tree, options)
    error = explain_cdev(tree.kernel, SIBLING, None, failure(errno.ENOENT))
    assert isinstance(error, UnavailableError)
    assert f"{SIBLING} has no node below {tree.dev / 'vfio/devices'}: {said}" in str(error)
    assert 'iommu="type1"' in error.hint


def test_a_user_without_rights_is_told_the_command_that_gives_the_node_of_the_device(tree: SysfsTree) -> None:
    """With the mode, and with the address of the device. In a container the container is started with the user."""
    place_process(tree.proc, user=1000)
    error = opened(tree, errno.EACCES)
    assert isinstance(error, AccessDeniedError)
    assert error.path == str(tree.dev / "vfio/devices/vfio0")
    assert "The mode is -rw-------" in error.hint
    assert f"pyvfio bind --user 1000 {BDF} " in error.hint
    place_process(tree.proc, user=1000, container=True)
    assert "--group-add" in opened(tree, errno.EACCES).hint
    assert f"--device {tree.dev / 'vfio/devices/vfio0'}" in opened(tree, errno.EPERM).hint


def test_root_of_a_user_namespace_is_told_to_take_the_descriptor(tree: SysfsTree) -> None:
    """Each kind of node has the class that takes its descriptor."""
    place_process(tree.proc, uid_map="0 1000 1")
    assert "Device.from_fd" in opened(tree, errno.EACCES).hint
    assert "Iommufd.from_fd" in explain_iommufd(tree.kernel, tree.dev / "iommu", failure(errno.EACCES)).hint


def test_a_node_of_a_device_that_this_dev_lacks_is_made_by_its_number(tree: SysfsTree) -> None:
    """In a container, the container is started with it."""
    node = tree.dev / "vfio/devices/vfio0"
    node.unlink()
    error = opened(tree, errno.ENOENT)
    assert isinstance(error, UnavailableError)
    assert f"there is no {node}, although {BDF} is bound to vfio-pci" in str(error)
    assert f"mknod {node} c 243 0" in error.hint
    place_process(tree.proc, container=True)
    assert f"--device {node}" in opened(tree, errno.ENOENT).hint


def test_a_device_that_is_unbound_or_removed_before_its_node_is_opened_is_called_that(tree: SysfsTree) -> None:
    """ENODEV where VFIO is removing the device, ENOENT afterwards."""
    path = tree.dev / "vfio/devices/vfio0"
    directory = (tree.pci / "devices" / BDF).resolve()
    (directory / "vfio-dev/vfio0").rename(directory / "vfio-dev/vfio1")
    gone = explain_cdev(tree.kernel, BDF, path, failure(errno.ENOENT))
    assert isinstance(gone, DeviceGoneError)
    assert str(gone).startswith(f"{BDF} ")
    assert f"{path} is no longer the node of the device" in str(gone)
    (directory / "vfio-dev/vfio1/dev").unlink()
    (directory / "vfio-dev/vfio1").rmdir()
    (directory / "vfio-dev").rmdir()
    tree.write(tree.pci / "drivers/vfio-pci/unbind", BDF)
    assert isinstance(explain_cdev(tree.kernel, BDF, path, failure(errno.ENODEV)), NotBoundError)
    (tree.pci / "devices" / BDF).unlink()
    assert isinstance(explain_cdev(tree.kernel, BDF, path, failure(errno.ENOENT)), DeviceNotFoundError)


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EINVAL])
def test_a_node_of_a_device_that_is_busy_is_explained_by_its_holders(tree: SysfsTree, number: int) -> None:
    """Where nobody is found, the errno is all that is known."""
    assert isinstance(opened(tree, number), IoctlError)
    tree.use_real_proc()
    with (tree.dev / "vfio/devices/vfio0").open():
        error = opened(tree, number)
    assert isinstance(error, GroupBusyError)
    assert [holder.pid for holder in error.holders] == [os.getpid()]


def test_other_refusals_of_the_node_are_told_with_the_errno(tree: SysfsTree) -> None:
    error = opened(tree, errno.EMFILE)
    assert isinstance(error, IoctlError)
    assert (error.errno, error.request) == (errno.EMFILE, "open")
    assert "ulimit -n" in error.hint


# --- Opening /dev/iommu


def test_a_missing_node_of_iommufd_is_explained_by_module_configuration_or_container(tree: SysfsTree) -> None:
    path = tree.dev / "iommu"
    path.unlink()

    def said() -> str:
        error = explain_iommufd(tree.kernel, path, failure(errno.ENOENT))
        assert isinstance(error, UnavailableError)
        return str(error)

    assert f"mknod {path} c 10 260" in said()
    place_process(tree.proc, container=True)
    assert f"Start the container with --device {path}" in said()
    (tree.sysfs / "class/misc/iommu/dev").unlink()
    (tree.sysfs / "class/misc/iommu").rmdir()
    assert f"modprobe iommufd, on the host, then start the container with --device {path}" in said()
    (tree.proc / "self" / "root" / ".dockerenv").unlink()
    assert said().endswith("the module is not loaded. modprobe iommufd")
    place_process(tree.proc, user=1000)
    assert said().endswith("modprobe iommufd, as root")
    configure(tree, "# CONFIG_IOMMUFD is not set\n")
    assert f"Linux {RELEASE}, built without CONFIG_IOMMUFD, has no iommufd" in said()
    assert "modprobe" not in said()


def test_a_user_without_rights_on_iommufd_is_told_the_command(tree: SysfsTree) -> None:
    place_process(tree.proc, user=1000)
    error = explain_iommufd(tree.kernel, tree.dev / "iommu", failure(errno.EACCES))
    assert isinstance(error, AccessDeniedError)
    assert "The mode is -rw-rw----" in error.hint
    assert "pyvfio bind --user 1000 BDF" in error.hint


# --- Binding to an iommufd


def test_a_bind_while_the_group_is_open_names_who_has_it_open(tree: SysfsTree) -> None:
    """EBUSY; this process has the device's node open and is not blamed for that."""
    node = tree.add_group_node(7)
    tree.use_real_proc()
    with (tree.dev / "vfio/devices/vfio0").open():
        error = bound(tree, errno.EBUSY)
        assert isinstance(error, GroupBusyError)
        assert error.holders == ()
        assert "no process was found that has the group open" in error.hint
        with node.open():
            error = bound(tree, errno.EBUSY)
    assert isinstance(error, GroupBusyError)
    assert f"IOMMU group 7 is already open in {error.holders[0].command} (pid {os.getpid()}, this process)" in str(
        error
    )
    assert "This process has the device open, or the group through type1" in error.hint


def test_another_process_that_has_the_group_open_is_to_close_it(tree: SysfsTree) -> None:
    tree.place_holder(41, tree.add_group_node(7))
    error = bound(tree, errno.EBUSY)
    assert isinstance(error, GroupBusyError)
    assert "already open in qemu (pid 41)" in str(error)
    assert error.hint == (
        "A device is bound to an iommufd only while no other user has the device or the group open: "
        "close the devices of the group in that process, or end the process"
    )


def test_a_bind_of_a_device_that_is_bound_already_names_the_other_process(tree: SysfsTree) -> None:
    """EINVAL; this process alone has it open where it has bound it twice."""
    node = tree.dev / "vfio/devices/vfio0"
    tree.place_holder(41, node)
    error = bound(tree, errno.EINVAL)
    assert isinstance(error, GroupBusyError)
    assert str(error).startswith(f"{BDF} of IOMMU group 7 is already open in qemu (pid 41). ")
    tree.place_holder(42, node, "python")
    (tree.proc / "self").rename(tree.proc / "42/self")
    (tree.proc / "self").symlink_to("42")
    error = bound(tree, errno.EINVAL)
    assert isinstance(error, GroupBusyError)
    assert [(holder.pid, holder.is_this_process) for holder in error.holders] == [(41, False)]
    (tree.proc / "41/fd/3").unlink()
    error = bound(tree, errno.EINVAL)
    assert isinstance(error, GroupBusyError)
    assert [(holder.pid, holder.is_this_process) for holder in error.holders] == [(42, True)]
    assert "gc.collect()" in error.hint


def test_an_iommufd_of_descriptor_0_is_one(tree: SysfsTree) -> None:
    """A daemon that closed its standard input has it: the device is busy, and the descriptor not negative."""
    tree.place_holder(41, tree.dev / "vfio/devices/vfio0")
    assert isinstance(bound(tree, errno.EINVAL, 0), GroupBusyError)


@pytest.mark.parametrize(("number", "iommufd"), [(errno.EINVAL, -1), (errno.EBADF, 3), (errno.ENOMEM, 3)])
def test_a_refusal_that_is_none_of_a_busy_device_names_no_process(tree: SysfsTree, number: int, iommufd: int) -> None:
    """Though another process has the device open: the descriptor is negative, or the errno is another."""
    tree.place_holder(41, tree.dev / "vfio/devices/vfio0")
    error = bound(tree, number, iommufd)
    assert isinstance(error, IoctlError)
    assert (error.errno, error.arguments) == (number, {"device": BDF, "iommufd": iommufd})


def test_a_device_without_an_iommu_is_refused_by_both_ways(tree: SysfsTree) -> None:
    """It has a driver of VFIO, and no node of its own."""
    (tree.sysfs / "kernel/iommu_groups/7/name").write_text("vfio-noiommu\n")
    error = no_cdev(tree.kernel, BDF)
    assert isinstance(error, UnsupportedError)
    assert error.message.startswith(
        f"{BDF} has no IOMMU (no-IOMMU mode), so neither iommufd nor type1 opens the device"
    )


@pytest.mark.parametrize("number", [errno.EPERM, errno.EBUSY])
def test_a_bind_in_a_group_that_is_not_viable_names_the_member_and_its_driver(tree: SysfsTree, number: int) -> None:
    """The kernel answers EPERM, as for interrupts: nobody is told of these."""
    tree.add_device(OTHER, driver="e1000e", group=7)
    error = bound(tree, number)
    assert isinstance(error, GroupNotViableError)
    assert f"{OTHER} (e1000e)" in str(error)
    assert "interrupt" not in str(error)


def test_a_bind_while_another_iommufd_has_a_device_of_the_group_names_its_process(tree: SysfsTree) -> None:
    """EPERM of `iommu_device_claim_dma_owner`."""
    tree.place_holder(41, tree.add_cdev(SIBLING, "vfio1"))
    error = bound(tree, errno.EPERM)
    assert isinstance(error, GroupBusyError)
    assert "(pid 41)" in str(error)
    assert "All devices of a group are bound to one iommufd" in error.hint


@pytest.mark.parametrize(
    ("place", "ends"),
    [
        ({}, ""),
        ({"user": 1000}, ", as root"),
        ({"container": True}, ", on the host"),
    ],
)
def test_a_bind_without_interrupt_remapping_is_told_the_parameter_and_the_risk(
    tree: SysfsTree, place: dict[str, bool], ends: str
) -> None:
    """EPERM; this process has the node of the device open, and is not taken for another user of the group."""
    tree.place_holder(42, tree.dev / "vfio/devices/vfio0", "python")
    place_process(tree.proc, **place)  # type: ignore[arg-type]
    error = bound(tree, errno.EPERM)
    assert isinstance(error, IoctlError)
    assert error.request == "VFIO_DEVICE_BIND_IOMMUFD"
    assert error.arguments == {"device": BDF, "iommufd": 5}
    assert "forge any interrupt" in error.hint
    assert error.hint.endswith(f": echo Y > {tree.sysfs / INTERRUPTS_OF_IOMMUFD}{ends}")


def test_a_risk_that_was_accepted_already_is_not_proposed_again(tree: SysfsTree) -> None:
    (tree.sysfs / INTERRUPTS_OF_IOMMUFD).write_text("Y\n")
    hint = bound(tree, errno.EPERM).hint
    assert "echo" not in hint
    assert "another iommufd may have a device of the group" in hint


def _unbind(tree: SysfsTree) -> None:
    tree.write(tree.pci / "drivers/vfio-pci/unbind", BDF)
    for name in ("vfio-dev/vfio0/dev", "vfio-dev/vfio0", "vfio-dev"):
        place = (tree.pci / "devices" / BDF).resolve() / name
        place.unlink() if place.is_file() else place.rmdir()


def _leave_group(tree: SysfsTree) -> None:
    ((tree.pci / "devices" / BDF).resolve() / "iommu_group").unlink()


def _remove(tree: SysfsTree) -> None:
    (tree.pci / "devices" / BDF).unlink()


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda _tree: None, DeviceGoneError),
        (_unbind, NotBoundError),
        (_leave_group, DeviceNotFoundError),
        (_remove, DeviceNotFoundError),
    ],
)
def test_a_bind_of_a_device_that_leaves_is_told_by_the_state_of_sysfs(
    tree: SysfsTree, change: Callable[[SysfsTree], None], kind: type[VfioError]
) -> None:
    """ENODEV: VFIO removes it, it has another driver, it is in no group, or it has gone."""
    change(tree)
    assert type(bound(tree, errno.ENODEV)) is kind


@pytest.mark.parametrize(
    ("number", "iommufd", "said"),
    [
        (errno.EBADF, 5, "iommufd is closed"),
        (errno.EBADFD, 5, "not of /dev/iommu"),
        (errno.EINVAL, -1, "negative"),
        (errno.EINVAL, 5, "opened through a group"),
        (errno.EMFILE, 5, "ulimit -n"),
        (errno.ENOMEM, 5, ""),
    ],
)
def test_other_refusals_of_a_bind_have_the_errno_and_the_arguments(
    tree: SysfsTree, number: int, iommufd: int, said: str
) -> None:
    error = bound(tree, number, iommufd)
    assert isinstance(error, IoctlError)
    assert not isinstance(error, GroupBusyError)
    assert error.errno == number
    assert re.search(f"VFIO_DEVICE_BIND_IOMMUFD.device={BDF}, iommufd=", str(error))
    assert said in error.hint
