"""Nodes of VFIO that cannot be opened on a real kernel, on a machine that may be thrown away."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import pyvfio
from pyvfio import pci
from pyvfio.container import Container, Group
from pyvfio.kernel import LinuxKernel
from tests.unit.sysfs import place_process

pytestmark = [
    pytest.mark.usefixtures("throwaway"),
    pytest.mark.one_iommu,
    pytest.mark.only_type1("the nodes are those of a container and a group"),
]


@contextmanager
def device_cgroup(directory: Path, *denied: str) -> Iterator[None]:
    """This process is in a control group that may not open some devices, by their numbers."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "cgroup", "-o", "devices", "cgroup", str(directory)], check=True)
    group = directory / "pyvfio"
    group.mkdir()
    for numbers in denied:
        (group / "devices.deny").write_text(f"c {numbers} rwm", encoding="ascii")
    (group / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
    try:
        yield
    finally:
        (directory / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
        group.rmdir()
        subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.real_kernel("device cgroups and nodes belong to the machine; the nodes of a fake are files")
def test_root_whom_a_device_cgroup_refuses_is_told_of_the_cgroup(bdf: str, tmp_path: Path) -> None:
    """The kernel says EPERM, of the container's node and of the group's."""
    number = pci.group_of(bdf, kernel=LinuxKernel())
    numbers = (Path("/sys/class/vfio") / str(number) / "dev").read_text(encoding="ascii").strip()
    with device_cgroup(tmp_path / "devices", "10:196", numbers):
        for opened in (Container, lambda: Group(number)):
            with pytest.raises(
                pyvfio.AccessDeniedError, match=r"device cgroup denies access to every user.*--device"
            ) as caught:
                opened()
            assert "as root" not in str(caught.value)
    pyvfio.open_device(bdf).close()


@pytest.mark.real_kernel("device cgroups and nodes belong to the machine; the nodes of a fake are files")
def test_a_node_that_is_not_here_is_made_as_the_hint_says(bdf: str, tmp_path: Path) -> None:
    """In a /dev of one's own, without the nodes of the machine: the device is bound, so that nobody is told to bind
    it. The machine's root file system may be a container's, so that procfs says that this is none."""
    kernel = LinuxKernel(dev=tmp_path, proc=tmp_path / "proc")
    place_process(kernel.proc)
    (tmp_path / "vfio").mkdir()
    for _ in range(2):
        with pytest.raises(pyvfio.UnavailableError, match="lacks nodes of this machine") as caught:
            pyvfio.open_device(bdf, kernel=kernel)
        command = caught.value.hint.rpartition("make the node: ")[2].split()
        assert command[0] == "mknod"
        os.mknod(command[1], stat.S_IFCHR | 0o600, os.makedev(*map(int, command[3:])))
    pyvfio.open_device(bdf, kernel=kernel).close()
