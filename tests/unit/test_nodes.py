"""Nodes that are not there or may not be opened: the error says why, and what helps where the program runs."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import pytest

import pyvfio
from pyvfio.container import Container, Group
from pyvfio.kernel import LinuxKernel
from pyvfio.pci.nodes import explain_open
from pyvfio.pci.surroundings import Surroundings, look_around
from pyvfio.testing.fake import FakeDevice, FakeKernel
from tests.unit.fakes import BDF, PlacedKernel
from tests.unit.machines import program_of_root
from tests.unit.sysfs import place_process


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[PlacedKernel]:
    """The program is root, in no container and no service."""
    with program_of_root(tmp_path) as made:
        yield made


def opening(kernel: FakeKernel, node: str) -> Callable[[], object]:
    return partial(Container, kernel=kernel) if node == "vfio" else partial(Group, int(node), kernel=kernel)


def denied(kernel: PlacedKernel, node: str, number: int) -> str:
    """What opening a node says when the kernel answers with an errno."""
    kernel.fail(call="open", errno=number)
    with pytest.raises(pyvfio.AccessDeniedError) as caught:
        opening(kernel, node)()
    assert caught.value.path == str(kernel.dev / "vfio" / node)
    assert caught.value.errno == number
    return str(caught.value)


# --------------------------------------------------------------------------------------------------- may not be opened


@pytest.mark.parametrize("node", ["vfio", "2"])
@pytest.mark.parametrize("user", [0, 1000])
def test_a_device_cgroup_is_named_with_what_lifts_it_where_the_program_runs(
    kernel: PlacedKernel, node: str, user: int
) -> None:
    """Being root is of no use, and nobody is told to be."""
    path = kernel.dev / "vfio" / node
    place_process(kernel.proc, user=user)
    anywhere = denied(kernel, node, errno.EPERM)
    assert f"a systemd service needs DeviceAllow={path} rw, a container --device {path}" in anywhere
    place_process(kernel.proc, user=user, cgroup="1:name=systemd:/\n0::/system.slice/driver.service/worker")
    service = denied(kernel, node, errno.EPERM)
    assert f"cgroup of driver.service denies access to every user: add DeviceAllow={path} rw" in service
    place_process(kernel.proc, user=user, container=True)
    container = denied(kernel, node, errno.EPERM)
    assert f"start the container with --device {path}" in container
    for said in (anywhere, service, container):
        assert "may not be opened by this process" in said
        assert "as root" not in said


def test_an_ordinary_user_in_a_container_is_told_how_to_have_a_group(kernel: PlacedKernel) -> None:
    """The container is started with it; no udev rule reaches in there."""
    place_process(kernel.proc, user=1000, container=True)
    assert "--group-add" in (said := denied(kernel, "2", errno.EACCES))
    assert "udev" not in said
    assert "as root" not in said


def test_root_whom_the_mode_cannot_refuse_is_told_who_does(kernel: PlacedKernel) -> None:
    """A mount with nodev, a security module, or the user namespace that it is root of."""
    assert "mount with nodev (see findmnt) or a security module" in (said := denied(kernel, "2", errno.EACCES))
    place_process(kernel.proc, uid_map="0 1000 1")
    assert "root of a user namespace" in (nested := denied(kernel, "2", errno.EACCES))
    assert "as root" not in said + nested


def test_the_group_of_a_device_without_an_iommu_needs_a_capability() -> None:
    """vfio_group_fops_open asks for CAP_SYS_RAWIO, and says EPERM as a device cgroup does."""
    refused = PermissionError(errno.EPERM, "Operation not permitted")
    said = str(explain_open(Path("/dev/vfio/noiommu-7"), refused, Surroundings(container=True)))
    assert "CAP_SYS_RAWIO" in said
    assert "--device" not in said


def test_a_group_without_an_iommu_is_refused_in_words(kernel: PlacedKernel) -> None:
    """Before VFIO_SET_IOMMU says ENODEV; nothing is left open."""
    (kernel.sysfs / "kernel/iommu_groups/2/name").write_text("vfio-noiommu\n")
    (kernel.dev / "vfio/2").rename(kernel.dev / "vfio/noiommu-2")
    with pytest.raises(pyvfio.UnsupportedError, match=r"group 2 has no IOMMU.*enable_unsafe_noiommu_mode"):
        pyvfio.open_device(BDF, kernel=kernel)


@pytest.mark.parametrize("node", ["vfio", "2"])
def test_want_of_descriptors_is_named_with_the_limit(kernel: PlacedKernel, node: str) -> None:
    """The process's own for EMFILE; the machine's for ENFILE."""
    limit, _most = resource.getrlimit(resource.RLIMIT_NOFILE)
    for number, said in ((errno.EMFILE, f"may have {limit} files open.*ulimit -n"), (errno.ENFILE, "fs.file-max")):
        kernel.fail(call="open", errno=number)
        with pytest.raises(pyvfio.IoctlError, match=f"could not be opened.*{said}") as caught:
            opening(kernel, node)()
        assert caught.value.errno == number


def test_want_of_a_descriptor_for_the_device_is_named_with_the_limit(kernel: PlacedKernel) -> None:
    """VFIO_GROUP_GET_DEVICE_FD makes one."""
    limit, _most = resource.getrlimit(resource.RLIMIT_NOFILE)
    kernel.fail(call="ioctl", request="VFIO_GROUP_GET_DEVICE_FD", errno=errno.EMFILE)
    with pytest.raises(pyvfio.IoctlError, match=f"may have {limit} files open"):
        pyvfio.open_device(BDF, kernel=kernel)


# --------------------------------------------------------------------------------------------------- is not there


@pytest.mark.parametrize("node", ["vfio", "2"])
def test_a_node_that_was_not_handed_into_a_container_is_called_that(kernel: PlacedKernel, node: str) -> None:
    """The device is bound, and the module loaded: nothing is said of these. Outside, what is missing is the node."""
    path = kernel.dev / "vfio" / node
    path.unlink()
    place_process(kernel.proc, container=True)
    with pytest.raises(pyvfio.UnavailableError, match=f"not passed into this container.*--device {path}") as caught:
        pyvfio.open_device(BDF, kernel=kernel)
    assert "no device" not in str(caught.value)
    assert "modprobe" not in str(caught.value)
    shutil.rmtree(kernel.proc / "self/root")
    number = "10 196" if node == "vfio" else "511 2"
    with pytest.raises(pyvfio.UnavailableError, match=f"nodes of this machine.*mknod {path} c {number}"):
        pyvfio.open_device(BDF, kernel=kernel)


def test_a_group_of_which_no_device_is_bound_is_called_that(kernel: PlacedKernel) -> None:
    """In a container, too."""
    place_process(kernel.proc, container=True)
    kernel.bind(BDF, "e1000e")
    with pytest.raises(pyvfio.NotBoundError, match=f"no device of IOMMU group 2 is bound.*pyvfio bind {BDF}"):
        Group(2, kernel=kernel)


def test_a_kernel_with_iommufd_alone_is_called_that(kernel: PlacedKernel) -> None:
    """No module is missing: CONFIG_VFIO_CONTAINER is."""
    (kernel.dev / "vfio/vfio").unlink()
    (kernel.sysfs / "class/misc/vfio").unlink()
    (kernel.dev / "iommu").touch()
    said = r"iommu \(iommufd\), and no VFIO containers.*CONFIG_VFIO_CONTAINER"
    with pytest.raises(pyvfio.UnavailableError, match=said):
        Container(kernel=kernel)


def test_a_kernel_with_nodes_of_devices_alone_is_called_that(kernel: PlacedKernel) -> None:
    """The node that it has is named; nobody is told to bind the device again."""
    (kernel.dev / "vfio/2").unlink()
    shutil.rmtree(kernel.sysfs / "class/vfio")
    directory = kernel.sysfs / "bus/pci/devices" / BDF / "vfio-dev/vfio3"
    directory.mkdir(parents=True)
    (directory / "dev").write_text("511:3\n")
    with pytest.raises(pyvfio.UnavailableError, match=r"has .*/vfio/devices/vfio3 for the device.*CONFIG_VFIO_GROUP"):
        Group(2, kernel=kernel)


# --------------------------------------------------------------------------------------------------- is busy


@pytest.mark.parametrize("iommu", ["type1", "iommufd"])
def test_a_group_that_this_process_has_open_is_shared_by_its_address_space(iommu: Literal["type1", "iommufd"]) -> None:
    """The error names the argument, and with that the other function is opened, in either kind of address space."""
    functions = [FakeDevice("0000:00:10.0"), FakeDevice("0000:00:10.1")]
    with (
        FakeKernel("7.3", groups=[(6, functions)], iommufd=True) as kernel,
        pyvfio.open_device("0000:00:10.0", iommu=iommu, kernel=kernel) as device,
    ):
        with pytest.raises(pyvfio.GroupBusyError, match=r"open_device\(\.\.\., space=device\.space\), or container="):
            pyvfio.open_device("0000:00:10.1", kernel=kernel)
        pyvfio.open_device("0000:00:10.1", space=device.space).close()


# --------------------------------------------------------------------------------------------------- surroundings


@pytest.mark.parametrize(
    "place",
    [
        partial(place_process, environ="PATH=/bin\0container=podman\0"),
        partial(place_process, environ="KUBERNETES_SERVICE_HOST=10.0.0.1\0"),
        partial(place_process, cgroup="0::/kubepods.slice/kubepods-pod1.slice/cri-1.scope"),
        partial(place_process, container=True),
    ],
)
def test_a_container_is_known_by_what_its_runtime_leaves(tmp_path: Path, place: Callable[[Path], None]) -> None:
    """Files, variables, or the name of the cgroup."""
    place(tmp_path)
    assert look_around(LinuxKernel(proc=tmp_path)).container


def test_surroundings_are_those_of_the_process(tmp_path: Path) -> None:
    """Its effective user and groups; this one's where procfs is not there."""
    place_process(tmp_path, user=1000, cgroup="0::/user.slice/user@1000.service/app.slice/b.service", uid_map="0 5 1")
    assert look_around(LinuxKernel(proc=tmp_path)) == Surroundings(
        user=1000, groups=(27, 1000), container=False, service="b.service", user_namespace=True
    )
    assert look_around(LinuxKernel(proc=tmp_path / "nothing")) == Surroundings(user=os.geteuid())
    assert look_around(LinuxKernel()).user == os.geteuid()
