"""The kind of address space in which tests/hw opens devices: `--space type1` or `--space iommufd`.

With iommufd, tests run on a kernel that shows nothing of type1: a fake without type1, or the running kernel through a
directory of device nodes that has those of iommufd alone. So each test opens the devices as on type1.
"""

from __future__ import annotations

import ctypes
import mmap
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal, TypeAlias

import pytest

import pyvfio
from pyvfio.iommu.iova_space import IovaSpace
from pyvfio.kernel import Kernel, LinuxKernel
from pyvfio.testing.fake import FakeKernel
from pyvfio.testing.fake.declaration import GroupDeclaration
from pyvfio.testing.world import World
from pyvfio.units import PAGE_SIZE

PLENTY = 1 << 46
"""More bytes than any machine of the tests can lock."""

AddressSpace: TypeAlias = pyvfio.Container | pyvfio.Ioas
Cut: TypeAlias = Literal["pages", "replace"] | None

REQUESTS = {
    pyvfio.Container: {
        "map": "VFIO_IOMMU_MAP_DMA",
        "unmap": "VFIO_IOMMU_UNMAP_DMA",
        "info": "VFIO_IOMMU_GET_INFO",
    },
    pyvfio.Ioas: {
        "map": "IOMMU_IOAS_MAP",
        "unmap": "IOMMU_IOAS_UNMAP",
        "info": "IOMMU_IOAS_IOVA_RANGES",
        "cut": "VFIO_IOMMU_UNMAP_DMA",
        "new space": "IOMMU_IOAS_ALLOC",
        "copy": "IOMMU_IOAS_COPY",
        "move": "VFIO_DEVICE_ATTACH_IOMMUFD_PT",
        "old space": "IOMMU_DESTROY",
    },
}
"""The requests of a space, by kind. "cut" is that of cut="pages", and those below are the steps of cut="replace"."""


def is_iommufd(config: pytest.Config) -> bool:
    """Whether the tests open devices through iommufd."""
    return bool(config.getoption("--space") == "iommufd")


def fake_of(config: pytest.Config, groups: Sequence[GroupDeclaration] | None = None) -> FakeKernel:
    """A fake of the version that `--fake` names, with one kind of address space."""
    version: str = config.getoption("--fake")
    iommufd = is_iommufd(config)
    return FakeKernel(version, groups=groups, iommufd=iommufd, type1=not iommufd)


@contextmanager
def linux_of(config: pytest.Config) -> Iterator[LinuxKernel]:
    """The running kernel, with all nodes, or with those of iommufd alone."""
    if not is_iommufd(config):
        yield LinuxKernel()
        return
    with tempfile.TemporaryDirectory(prefix="pyvfio-dev-") as name:
        dev = Path(name)
        (dev / "vfio").mkdir()
        for node in ("iommu", "vfio/devices"):
            (dev / node).symlink_to(Path("/dev", node))
        yield LinuxKernel(dev=dev)


@contextmanager
def charged(config: pytest.Config, world: World) -> Iterator[World]:
    """A world in which each mapping counts against the limit of locked memory.

    type1 counts each one. iommufd does not count those of a process with CAP_IPC_LOCK, so the tests run without.
    """
    privileged = is_iommufd(config) and world.kernel.memlock().privileged
    with world.memlock_limit(PLENTY) if privileged else nullcontext():
        yield world


def new_space(kernel: Kernel, cut: Cut = None) -> AddressSpace:
    """An address space of the kind that the kernel has, with no device. `cut`: as for Ioas; a container has none."""
    type1 = (kernel.dev / "vfio/vfio").exists()
    made: AddressSpace = pyvfio.Container(kernel=kernel) if type1 else pyvfio.Ioas(kernel=kernel, cut=cut)
    return made


def can_replace(space: IovaSpace) -> bool:
    """Whether a space with a device can cut: always, but for cut="replace" behind an IOMMU that moves no device.

    That is tried with two pages. A refusal changes nothing, and the IOMMU has to be such a one: a page table without a
    device has no IOVA for a page.
    """
    if not isinstance(space, pyvfio.Ioas) or space.cut != "replace":
        return space.can_cut
    with mmap.mmap(-1, 2 * PAGE_SIZE) as memory:
        vaddr = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        iova = space.reserve_and_map(vaddr=vaddr, size=2 * PAGE_SIZE)
        before, cuts = space.mappings, True
        try:
            with space.guard.lock:
                space.cut_locked(iova, PAGE_SIZE)
        except pyvfio.UnsupportedError:
            cuts = False
            assert space.mappings == before
            assert not moves_devices(space)
        size = PAGE_SIZE if cuts else 2 * PAGE_SIZE
        space.unmap(iova=iova + 2 * PAGE_SIZE - size, size=size)
        space.release_iova(iova)
    return cuts


def moves_devices(space: pyvfio.Ioas) -> bool:
    """Whether the IOMMU of the space's device gives a page table its IOVA before a device is attached to it."""
    iommufd, dev_id = space.iommufd, space.devices[0].dev_id
    assert dev_id is not None
    empty = iommufd.ioas_alloc()
    hwpt = iommufd.hwpt_alloc(dev_id, empty)
    ranges, _alignment = iommufd.ioas_iova_ranges(empty)
    iommufd.destroy(hwpt)
    iommufd.destroy(empty)
    return any(each.size >= PAGE_SIZE for each in ranges)


def descriptors_of(device: pyvfio.Device) -> tuple[int, ...]:
    """All that are open for a device: its own, and those of the group and the container, or of iommufd."""
    owner = device.iommufd or device.group
    return device.fd, owner.fd, device.space.fd
