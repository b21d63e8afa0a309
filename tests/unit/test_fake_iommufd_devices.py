"""Device nodes of the fake kernel: bind, attach, replace, detach, and how long things live. A sentence a test."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from functools import partial

import pytest

from pyvfio import ioctls
from pyvfio.kernel import IoctlArgument
from pyvfio.testing.fake import Bar, DmaFault, FakeDevice, FakeKernel
from pyvfio.units import MIB, PAGE_SIZE, U64_MAX
from tests.unit.bare_iommufd import BareDevice, BareIommufd, node_of, outcome
from tests.unit.fakes import BDF, OTHER_BDF, PRIVATE, READ_WRITE

SIBLING = "0000:00:02.1"
_CONFIG = ioctls.VFIO_PCI_CONFIG_REGION_INDEX << 40


@pytest.fixture(params=["6.12", "7.3"])
def kernel(request: pytest.FixtureRequest) -> Iterator[FakeKernel]:
    """A kernel with iommufd beside type1. At the end the fake agrees with itself, and nothing is left."""
    with FakeKernel(request.param, iommufd=True) as fake:
        yield fake
        fake._machine._check_state()
    assert (fake.pinned, fake.charged_to_user) == (0, 0)


@pytest.fixture
def iommufd(kernel: FakeKernel) -> BareIommufd:
    """An open /dev/iommu."""
    return BareIommufd(kernel)


@pytest.fixture
def device(kernel: FakeKernel) -> BareDevice:
    """A device that is open, and not bound."""
    return BareDevice(kernel, BDF)


@pytest.fixture
def memory(kernel: FakeKernel) -> int:
    """1 MiB."""
    return kernel.mmap(0, MIB, READ_WRITE, PRIVATE)


def _group(kernel: FakeKernel, number: int = 2) -> int:
    return kernel.open(str(kernel.dev / f"vfio/{number}"), os.O_RDWR)


def _ioctl(kernel: FakeKernel, fd: int, request: int, argument: IoctlArgument = 0) -> object:
    return outcome(partial(kernel.ioctl, fd, request, argument))


# ----------------------------------------------------------------------------------------------------------- tree


def test_a_device_has_a_node_that_sysfs_names(kernel: FakeKernel) -> None:
    assert [node_of(kernel, bdf).name for bdf in kernel.bdfs] == ["vfio0", "vfio1"]
    assert (kernel.sysfs / "bus/pci/devices" / BDF / "vfio-dev/vfio0/dev").read_text() == "510:0\n"
    modes = {name: (kernel.dev / name).stat().st_mode & 0o777 for name in ("iommu", "vfio/vfio", "vfio/devices/vfio0")}
    assert modes["vfio/devices/vfio0"] == 0o600
    assert modes["iommu"] & 0o007 == 0


def test_the_node_goes_with_the_driver(kernel: FakeKernel) -> None:
    record = kernel.sysfs / "bus/pci/devices" / BDF / "vfio-dev"
    kernel.bind(BDF, None)
    assert not record.exists()
    assert not (kernel.dev / "vfio/devices/vfio0").exists()
    kernel.bind(BDF, "vfio-pci")
    assert node_of(kernel, BDF).exists()


def test_a_kernel_without_iommufd_has_the_record_in_sysfs_and_no_number_in_it() -> None:
    with FakeKernel("6.12") as kernel:
        assert os.listdir(kernel.sysfs / "bus/pci/devices" / BDF / "vfio-dev/vfio0") == []
        assert not (kernel.dev / "iommu").exists()
        assert not (kernel.dev / "vfio/devices").exists()


def test_a_kernel_with_iommufd_alone_has_neither_containers_nor_nodes_of_groups() -> None:
    with FakeKernel("7.3", iommufd=True, type1=False) as kernel:
        assert sorted(os.listdir(kernel.dev / "vfio")) == ["devices"]
        assert os.listdir(kernel.sysfs / "class/vfio") == []
        device = BareDevice(kernel, BDF)
        assert device.bind(BareIommufd(kernel).fd) == 1


def test_a_kernel_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linux 6\.1 has no iommufd"):
        FakeKernel("6.1", iommufd=True)
    with pytest.raises(ValueError, match="without type1 and without iommufd"):
        FakeKernel("6.12", type1=False)


# ----------------------------------------------------------------------------------------------------------- bind


def test_before_the_bind_every_other_call_is_einval(
    kernel: FakeKernel, device: BareDevice, iommufd: BareIommufd
) -> None:
    assert outcome(device.info) == "EINVAL"
    assert outcome(device.detach) == "EINVAL"
    assert outcome(partial(device.attach, iommufd.ioas())) == "EINVAL"
    assert _ioctl(kernel, device.fd, 0x3BF0) == "EINVAL"
    assert outcome(partial(kernel.pread, device.fd, 2, _CONFIG)) == "EINVAL"
    assert outcome(partial(kernel.pwrite, device.fd, b"\0", _CONFIG + 4)) == "EINVAL"
    assert outcome(partial(kernel.registers, device.fd, 0, PAGE_SIZE)) == "EINVAL"
    assert outcome(partial(kernel.mmap, 0, PAGE_SIZE, READ_WRITE, 1, fd=device.fd, offset=0)) == "EINVAL"


def test_each_bad_bind_has_its_errno(kernel: FakeKernel, device: BareDevice, iommufd: BareIommufd) -> None:
    container = kernel.open(str(kernel.dev / "vfio/vfio"), os.O_RDWR)
    assert [outcome(partial(device.bind, fd)) for fd in (-1, 9999, container, device.fd)] == [
        "EINVAL",
        "EBADF",
        "EBADFD",
        "EBADFD",
    ]
    assert outcome(partial(device.bind, iommufd.fd, 2)) == "EINVAL"
    assert _ioctl(kernel, device.fd, ioctls.VFIO_DEVICE_BIND_IOMMUFD) == "EFAULT"
    short = bytearray(struct.pack("=IIiI", 12, 0, iommufd.fd, 0))
    assert _ioctl(kernel, device.fd, ioctls.VFIO_DEVICE_BIND_IOMMUFD, short) == "EINVAL"
    assert device.bind(iommufd.fd) == 1
    assert outcome(partial(device.bind, iommufd.fd)) == "EINVAL"


def test_trailing_bytes_of_a_bind_are_refused_since_6_17(
    kernel: FakeKernel, device: BareDevice, iommufd: BareIommufd
) -> None:
    long = bytearray(struct.pack("=IIiIQI", 28, 0, iommufd.fd, 0, 0, 1))
    expected = 0 if kernel.version.name == "6.12" else "E2BIG"
    assert _ioctl(kernel, device.fd, ioctls.VFIO_DEVICE_BIND_IOMMUFD, long) == expected


def test_a_node_can_be_opened_twice_and_bound_once(
    kernel: FakeKernel, device: BareDevice, iommufd: BareIommufd
) -> None:
    second = BareDevice(kernel, BDF)
    device.bind(iommufd.fd)
    assert outcome(partial(second.bind, iommufd.fd)) == "EINVAL"
    assert outcome(partial(second.bind, 9999)) == "EBADF"
    assert outcome(second.info) == "EINVAL"
    device.close()
    assert second.bind(iommufd.fd) == 1


def test_a_group_and_a_device_node_exclude_each_other(
    kernel: FakeKernel, device: BareDevice, iommufd: BareIommufd
) -> None:
    group = _group(kernel)
    assert outcome(partial(device.bind, iommufd.fd)) == "EBUSY"
    kernel.close(group)
    device.bind(iommufd.fd)
    assert outcome(partial(_group, kernel)) == "EBUSY"
    kernel.close(_group(kernel, 3))
    device.close()
    kernel.close(_group(kernel))


def test_a_device_of_an_open_group_cannot_be_bound_after_the_group_is_closed(
    kernel: FakeKernel, device: BareDevice, iommufd: BareIommufd
) -> None:
    container = kernel.open(str(kernel.dev / "vfio/vfio"), os.O_RDWR)
    group = _group(kernel)
    kernel.ioctl(group, ioctls.VFIO_GROUP_SET_CONTAINER, bytearray(struct.pack("=i", container)))
    kernel.ioctl(container, ioctls.VFIO_SET_IOMMU, 3)
    by_group = kernel.ioctl(group, ioctls.VFIO_GROUP_GET_DEVICE_FD, bytearray(BDF.encode() + b"\0"))
    kernel.close(group)
    assert outcome(partial(device.bind, iommufd.fd)) == "EBUSY"
    bind = bytearray(struct.pack("=IIiI", 16, 0, iommufd.fd, 0))
    assert _ioctl(kernel, by_group, ioctls.VFIO_DEVICE_BIND_IOMMUFD, bind) == "EINVAL"
    assert _ioctl(kernel, by_group, ioctls.VFIO_DEVICE_ATTACH_IOMMUFD_PT, bytearray(12)) == "ENOTTY"
    kernel.close(by_group)
    assert device.bind(iommufd.fd) == 1


@pytest.mark.parametrize("iommu", ["amd", "virtio"])
def test_without_interrupt_remapping_a_bind_needs_the_module_parameter(iommu: str) -> None:
    with FakeKernel("7.3", iommu=iommu, iommufd=True) as kernel:
        parameter = kernel.sysfs / "module/iommufd/parameters/allow_unsafe_interrupts"
        device, iommufd = BareDevice(kernel, BDF), BareIommufd(kernel)
        kernel.allow_unsafe_interrupts = False
        assert parameter.read_text() == "N\n"
        assert outcome(partial(device.bind, iommufd.fd)) == "EPERM"
        kernel.allow_unsafe_interrupts = True
        assert parameter.read_text() == "Y\n"
        assert device.bind(iommufd.fd) == 1


def test_intel_remaps_interrupts_and_needs_no_parameter(
    kernel: FakeKernel, device: BareDevice, iommufd: BareIommufd
) -> None:
    kernel.allow_unsafe_interrupts = False
    assert device.bind(iommufd.fd) == 1


def _two_in_a_group(version: str) -> FakeKernel:
    return FakeKernel(version, iommufd=True, groups=[(2, [FakeDevice(BDF), FakeDevice(SIBLING)])])


def test_a_group_belongs_to_one_iommufd_and_must_be_viable(kernel: FakeKernel) -> None:
    with _two_in_a_group(kernel.version.name) as own:
        one, other = BareDevice(own, BDF), BareDevice(own, SIBLING)
        first, second = BareIommufd(own), BareIommufd(own)
        own.bind(SIBLING, "e1000e")
        assert outcome(partial(one.bind, first.fd)) == "EPERM"
        own.bind(SIBLING, "vfio-pci")
        one.bind(first.fd)
        assert outcome(partial(other.bind, second.fd)) == "EPERM"
        assert other.bind(first.fd) == 2
        own._machine._check_state()


def test_a_bound_device_answers_as_one_from_a_group(
    kernel: FakeKernel, device: BareDevice, iommufd: BareIommufd
) -> None:
    device.bind(iommufd.fd)
    assert device.info() == (2, 9, 5)
    kernel.pwrite(device.fd, b"\x06\x00", _CONFIG + 4)
    assert kernel.pread(device.fd, 2, _CONFIG + 4) == b"\x06\x00"
    registers = kernel.registers(device.fd, 0, PAGE_SIZE)
    assert registers.read(0, 4) == 0x010000ED
    assert _ioctl(kernel, device.fd, 0x3BF0) == "ENOTTY"
    registers.close()


# --------------------------------------------------------------------------------------------------------- attach


def test_an_attach_to_a_space_makes_a_page_table_and_answers_with_its_number(
    device: BareDevice, iommufd: BareIommufd
) -> None:
    device.bind(iommufd.fd)
    ioas = iommufd.ioas()
    assert [device.attach(ioas), device.attach(ioas), device.attach(3)] == [3, 3, 3]
    assert [outcome(partial(device.attach, target)) for target in (1, 99)] == ["EINVAL", "ENOENT"]
    assert [outcome(partial(iommufd.destroy, number)) for number in (1, ioas, 3)] == ["EBUSY"] * 3
    device.detach()
    device.detach()
    assert outcome(partial(iommufd.destroy, 3)) == "ENOENT"
    iommufd.destroy(ioas)


def test_two_devices_of_a_space_share_the_page_table_and_the_last_one_takes_it_away(
    kernel: FakeKernel, device: BareDevice, iommufd: BareIommufd, memory: int
) -> None:
    other = BareDevice(kernel, OTHER_BDF)
    device.bind(iommufd.fd)
    other.bind(iommufd.fd)
    ioas = iommufd.ioas()
    iommufd.map(ioas, memory, MIB, 0)
    assert device.attach(ioas) == other.attach(ioas) == 4
    assert kernel.pinned == MIB
    device.close()
    assert kernel.pinned == MIB
    kernel.dma_write(OTHER_BDF, 0, b"there")
    with pytest.raises(DmaFault):
        kernel.dma_write(BDF, 0, b"gone")
    other.detach()
    assert kernel.pinned == 0


def test_devices_of_a_group_use_one_page_table(kernel: FakeKernel) -> None:
    with _two_in_a_group(kernel.version.name) as own:
        iommufd = BareIommufd(own)
        one, other = BareDevice(own, BDF), BareDevice(own, SIBLING)
        one.bind(iommufd.fd)
        other.bind(iommufd.fd)
        first, second = iommufd.ioas(), iommufd.ioas()
        one.attach(first)
        assert outcome(partial(other.attach, second)) == "EINVAL"
        other.attach(first)
        memory = own.mmap(0, PAGE_SIZE, READ_WRITE, PRIVATE)
        iommufd.map(second, memory, PAGE_SIZE, 0)
        one.attach(second)  # replaces the table of both
        own.dma_write(SIBLING, 0, b"both")
        one.detach()
        own.dma_write(SIBLING, 0, b"both")
        assert iommufd.ranges(second)[1] == 2
        own._machine._check_state()


def test_another_attach_replaces_the_space_and_releases_the_former_one(
    kernel: FakeKernel, device: BareDevice, iommufd: BareIommufd, memory: int
) -> None:
    device.bind(iommufd.fd)
    first, second = iommufd.ioas(), iommufd.ioas()
    iommufd.map(first, memory, PAGE_SIZE, 0)
    iommufd.map(second, memory + PAGE_SIZE, PAGE_SIZE, 0)
    device.attach(first)
    kernel.dma_write(BDF, 0, b"one")
    device.attach(second)
    kernel.dma_write(BDF, 0, b"two")
    assert kernel.pinned == PAGE_SIZE
    assert [entry.vaddr for entry in kernel.mappings(BDF)] == [memory + PAGE_SIZE]
    assert iommufd.ranges(first)[0] == [(0, U64_MAX)]
    iommufd.map(first, 0x1000, PAGE_SIZE, PAGE_SIZE)
    assert outcome(partial(device.attach, first)) == "EFAULT"
    kernel.dma_write(BDF, 0, b"two")
    iommufd.unmap(first, PAGE_SIZE, PAGE_SIZE)
    iommufd.map(first, memory, PAGE_SIZE, 0xFEE0_0000)
    assert outcome(partial(device.attach, first)) == "EADDRINUSE"
    assert [entry.vaddr for entry in kernel.mappings(BDF)] == [memory + PAGE_SIZE]


def test_a_page_table_of_the_users_own_pins_before_a_device_is_attached_and_outlives_it(
    kernel: FakeKernel, device: BareDevice, iommufd: BareIommufd, memory: int
) -> None:
    number = device.bind(iommufd.fd)
    ioas = iommufd.ioas()
    iommufd.map(ioas, memory, MIB, 0)
    hwpt = iommufd.hwpt(number, ioas)
    assert (kernel.pinned, kernel.mappings()) == (MIB, ())
    assert iommufd.ranges(ioas)[0] == [(0, 0x7F_FFFF_FFFF)]  # the aperture, and no window for messages
    assert device.attach(hwpt) == hwpt
    assert len(kernel.mappings(BDF)) == 1
    assert device.attach(ioas) != hwpt  # a page table of its own for each automatic attach
    iommufd.destroy(hwpt)
    device.detach()
    assert kernel.pinned == 0


def test_each_page_table_that_no_iommu_of_qemu_has_is_refused(
    kernel: FakeKernel, device: BareDevice, iommufd: BareIommufd
) -> None:
    number, ioas = device.bind(iommufd.fd), iommufd.ioas()
    nest, dirty, pasid = 1, 2, 8
    assert [outcome(partial(iommufd.hwpt, number, ioas, flag)) for flag in (nest, dirty)] == ["EOPNOTSUPP"] * 2
    answer = outcome(partial(iommufd.hwpt, number, ioas, pasid))
    assert answer == ("EOPNOTSUPP" if kernel.version.name == "6.12" else 3)
    assert outcome(partial(iommufd.hwpt, 99, ioas)) == "ENOENT"
    assert outcome(partial(iommufd.hwpt, number, 99)) == "EINVAL"
    assert outcome(partial(iommufd.hwpt, number, number)) == "EINVAL"
    assert outcome(partial(iommufd.hwpt, number, ioas, 0, 1)) == "EINVAL"
    assert outcome(partial(iommufd.hwpt, number, ioas, 0, 1, 8)) == "EOPNOTSUPP"


def test_the_iommu_tells_its_kind_and_fills_the_buffer_with_zeros(device: BareDevice, iommufd: BareIommufd) -> None:
    number = device.bind(iommufd.fd)
    assert iommufd.hw_info(number, 0)[:2] == (24, 1)
    data = iommufd.hw_info(number, 32)[2]
    assert struct.unpack("=IIQQ8s", data) == (1, 0, 0xD2_008C_2226_0286, 0xF00F4A, bytes(8))  # as under QEMU 7.2
    assert outcome(partial(iommufd.hw_info, 99, 0)) == "ENOENT"


# ------------------------------------------------------------------------------------------------------- lifetimes


def test_dma_goes_on_after_the_iommufd_is_closed_until_the_device_is_closed(
    kernel: FakeKernel, device: BareDevice, iommufd: BareIommufd, memory: int
) -> None:
    device.bind(iommufd.fd)
    ioas = iommufd.ioas()
    device.attach(ioas)
    iommufd.map(ioas, memory, MIB, 0)
    iommufd.close()
    kernel.dma_write(BDF, 0, b"on")
    assert device.info() == (2, 9, 5)
    kernel._machine._check_state()
    device.close()
    assert (kernel.pinned, kernel.mappings(), kernel.descriptors) == (0, (), ())


def test_a_duplicate_is_the_same_open_file(
    kernel: FakeKernel, device: BareDevice, iommufd: BareIommufd, memory: int
) -> None:
    ioas = iommufd.ioas()
    iommufd.map(ioas, memory, PAGE_SIZE, 0)
    copy = kernel.dup(iommufd.fd)
    iommufd.close()
    iommufd.fd = copy
    device.bind(copy)
    device.attach(ioas)
    twin = kernel.dup(device.fd)
    device.close()
    device.fd = twin
    assert device.info() == (2, 9, 5)
    kernel.dma_write(BDF, 0, b"on")
    device.close()
    assert kernel.pinned == 0
    assert iommufd.unmap(ioas, 0, PAGE_SIZE) == PAGE_SIZE


def test_a_duplicate_of_an_unbound_device_can_be_bound(
    kernel: FakeKernel, device: BareDevice, iommufd: BareIommufd
) -> None:
    copy = kernel.dup(device.fd)
    device.close()
    device.fd = copy
    assert device.bind(iommufd.fd) == 1
    assert device.info() == (2, 9, 5)


def test_a_device_that_was_closed_past_the_seam_is_unbound(
    kernel: FakeKernel, device: BareDevice, iommufd: BareIommufd
) -> None:
    device.bind(iommufd.fd)
    os.close(device.fd)
    again = BareDevice(kernel, BDF)
    assert again.bind(iommufd.fd) == 1


def test_memory_that_is_released_under_an_attached_space_is_a_violation(
    kernel: FakeKernel, device: BareDevice, iommufd: BareIommufd, memory: int
) -> None:
    device.bind(iommufd.fd)
    ioas = iommufd.ioas()
    device.attach(ioas)
    iommufd.map(ioas, memory, MIB, MIB)
    kernel.munmap(memory, PAGE_SIZE)
    assert [(each.call, each.iova, each.size) for each in kernel.violations] == [("munmap", MIB, PAGE_SIZE)]
    with pytest.raises(AssertionError, match="munmap"):
        kernel.check()
    kernel.violations.clear()


def test_a_mapping_without_read_can_be_read_on_6_12_and_not_on_7_3(
    kernel: FakeKernel, device: BareDevice, iommufd: BareIommufd, memory: int
) -> None:
    device.bind(iommufd.fd)
    ioas = iommufd.ioas()
    device.attach(ioas)
    iommufd.map(ioas, memory, PAGE_SIZE, 0, flags=2)
    iommufd.map(ioas, memory, PAGE_SIZE, PAGE_SIZE, flags=4)
    kernel.dma_write(BDF, 0, b"data")
    with pytest.raises(DmaFault):
        kernel.dma_write(BDF, PAGE_SIZE, b"data")
    if kernel.version.name == "6.12":
        assert kernel.dma_read(BDF, 0, 4) == b"data"
    else:
        with pytest.raises(DmaFault):
            kernel.dma_read(BDF, 0, 4)


def test_a_failure_can_be_planned_for_a_request_of_iommufd(kernel: FakeKernel, iommufd: BareIommufd) -> None:
    kernel.fail(request="IOMMU_IOAS_ALLOC", errno=12)
    assert outcome(iommufd.ioas) == "ENOMEM"
    assert iommufd.ioas() == 1
    assert kernel.trace[-1].request == "IOMMU_IOAS_ALLOC"
    assert kernel.trace[-1].arguments["size"] == 12


def test_what_is_not_modelled_is_listed(kernel: FakeKernel, iommufd: BareIommufd) -> None:
    assert outcome(partial(iommufd.call, 0x3B8E, "III", 0, 0, 0)) == "EOPNOTSUPP"
    group = _group(kernel)
    into = bytearray(struct.pack("=i", iommufd.fd))
    assert _ioctl(kernel, group, ioctls.VFIO_GROUP_SET_CONTAINER, into) == "EBADFD"
    names = [part.name for part in kernel.unmodelled]
    assert names == ["IOMMU_FAULT_QUEUE_ALLOC", "VFIO_GROUP_SET_CONTAINER"]


# ------------------------------------------------------------------------------------------------------- hot reset


def test_a_hot_reset_of_a_device_node_names_the_bound_devices_and_takes_no_groups(kernel: FakeKernel) -> None:
    bdfs = "0000:01:00.0", "0000:01:00.1"
    groups = [(5, [FakeDevice(bdfs[0], bars={0: Bar(MIB)})]), (6, [FakeDevice(bdfs[1], bars={0: Bar(MIB)})])]
    with FakeKernel(kernel.version.name, iommufd=True, groups=groups) as own:
        iommufd, one, other = BareIommufd(own), BareDevice(own, bdfs[0]), BareDevice(own, bdfs[1])
        one.bind(iommufd.fd)
        reset = bytearray(struct.pack("=III", 12, 0, 0))
        assert _hot_reset_info(own, one) == (1, [1, 0xFFFF_FFFF])
        assert _ioctl(own, one.fd, ioctls.VFIO_DEVICE_PCI_HOT_RESET, reset) == "EINVAL"
        other.bind(iommufd.fd)
        assert _hot_reset_info(own, one) == (3, [1, 2])
        with_group = bytearray(struct.pack("=IIIi", 16, 0, 1, 0))
        assert _ioctl(own, one.fd, ioctls.VFIO_DEVICE_PCI_HOT_RESET, with_group) == "EINVAL"
        assert _ioctl(own, one.fd, ioctls.VFIO_DEVICE_PCI_HOT_RESET, reset) == 0


def _hot_reset_info(kernel: FakeKernel, device: BareDevice) -> tuple[int, list[int]]:
    buffer = bytearray(struct.pack("=III", 36, 0, 0) + bytes(24))
    kernel.ioctl(device.fd, ioctls.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, buffer)
    _size, flags, count = struct.unpack_from("=III", buffer)
    return flags, [struct.unpack_from("=I", buffer, 12 + 8 * number)[0] for number in range(count)]


def test_a_page_table_of_virtio_on_6_12_has_no_aperture_before_a_device_is_attached() -> None:
    """`viommu_domain_finalise` was part of the attach: replacing a space with areas, or preparing one, fails."""
    for version, answer in (("6.12", "EADDRINUSE"), ("7.3", 5)):
        with FakeKernel(version, iommu="virtio", iommufd=True) as kernel:
            iommufd, device = BareIommufd(kernel), BareDevice(kernel, BDF)
            number, memory = device.bind(iommufd.fd), kernel.mmap(0, MIB, READ_WRITE, PRIVATE)
            first, second = iommufd.ioas(), iommufd.ioas()
            device.attach(first)
            assert outcome(partial(iommufd.hwpt, number, second)) == 5
            assert iommufd.ranges(second)[0] == [(0, 0 if version == "6.12" else U64_MAX)]
            iommufd.destroy(5)
            iommufd.map(second, memory, MIB, 0)
            assert outcome(partial(device.attach, second)) == answer
