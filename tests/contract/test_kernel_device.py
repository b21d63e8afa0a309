"""The promises of a device's descriptor (kernel: drivers/vfio/pci)."""

from __future__ import annotations

import ctypes
import errno
import struct
from functools import partial

import pytest

from pyvfio import ioctls
from pyvfio.units import KIB, MIB
from tests.contract.world import BAD_ADDRESS, BOTH, PAGE, Attached, World, refused

CONFIG = 7 << 40
PM = 1
MSIX_TABLE = 0x3000  # of xhci, in BAR 0
LIVENESS = 4  # of edu: a read returns the written number inverted
MAP_PRIVATE = 2
REQUESTS = [
    ioctls.VFIO_DEVICE_GET_INFO,
    ioctls.VFIO_DEVICE_GET_REGION_INFO,
    ioctls.VFIO_DEVICE_GET_IRQ_INFO,
    ioctls.VFIO_DEVICE_SET_IRQS,
]


@pytest.fixture
def device(v2: Attached) -> int:
    """The world's device."""
    return v2.world.open_device(v2.group)


@pytest.fixture
def ports(functions: tuple[World, World]) -> int:
    """A device with a page of memory in BAR 0 and I/O ports in BAR 1."""
    return functions[0].open_device(Attached.of(functions[0], ioctls.VFIO_TYPE1v2_IOMMU).group)


def region(world: World, fd: int, index: int, argsz: int = 32) -> ioctls.vfio_region_info:
    """Call VFIO_DEVICE_GET_REGION_INFO."""
    answer = ioctls.vfio_region_info(argsz=argsz, index=index, cap_offset=0xAA)
    world.ioctl(fd, ioctls.VFIO_DEVICE_GET_REGION_INFO, answer)
    return answer


# ------------------------------------------------------------------------------------------------------------- info


def test_a_pci_device_has_nine_regions_and_five_kinds_of_interrupt(v2: Attached, device: int) -> None:
    answer = ioctls.vfio_device_info(argsz=24)
    v2.world.ioctl(device, ioctls.VFIO_DEVICE_GET_INFO, answer)
    assert answer.flags & ioctls.VFIO_DEVICE_FLAGS_PCI
    assert (answer.num_regions, answer.num_irqs) == (9, 5)


@pytest.mark.parametrize("argsz", [16, 19, 20, 23, 24])
def test_the_info_is_written_back_as_far_as_the_kernel_knows_it(v2: Attached, device: int, argsz: int) -> None:
    written = min(argsz, 24) if v2.world.since(6, 6) else (16 if argsz < 20 else 20)
    buffer = (ctypes.c_char * 32).from_buffer_copy(struct.pack("=I", argsz) + b"\xaa" * 28)
    v2.world.ioctl(device, ioctls.VFIO_DEVICE_GET_INFO, buffer)
    assert buffer.raw[written:] == b"\xaa" * (32 - written)


def test_a_short_argsz_is_einval_and_nothing_is_written(v2: Attached, device: int) -> None:
    for request, argsz in zip(REQUESTS, (15, 31, 15, 19), strict=True):
        buffer = bytearray(struct.pack("=I", argsz) + b"\xaa" * 28)
        before = bytes(buffer)
        with refused(errno.EINVAL):
            v2.world.ioctl(device, request, buffer)
        assert buffer == before


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_bad_pointer_is_efault(v2: Attached, device: int, request_: int) -> None:
    with refused(errno.EFAULT):
        v2.world.ioctl(device, request_, BAD_ADDRESS)


def test_an_unknown_request_is_enotty(v2: Attached, device: int) -> None:
    # These requests belong to descriptors of device nodes. Packaged kernels have no device nodes.
    of_nodes = [
        ioctls.VFIO_DEVICE_BIND_IOMMUFD,
        ioctls.VFIO_DEVICE_ATTACH_IOMMUFD_PT,
        ioctls.VFIO_DEVICE_DETACH_IOMMUFD_PT,
    ]
    if (v2.world.kernel.dev / "iommu").exists():
        of_nodes.clear()
    graphics = [ioctls.VFIO_DEVICE_QUERY_GFX_PLANE, ioctls.VFIO_DEVICE_GET_GFX_DMABUF]
    for request in (ioctls.VFIO_GET_API_VERSION, 0x3B64 + 90, *graphics, *of_nodes):
        with refused(errno.ENOTTY):
            v2.world.ioctl(device, request)


def test_a_region_lies_at_its_index_times_2_to_the_40(v2: Attached, device: int) -> None:
    assert [region(v2.world, device, index).offset >> 40 for index in range(8)] == list(range(8))


@pytest.mark.parametrize("index", [8, 9, 100, (1 << 32) - 1])
def test_a_region_that_is_not_there_is_einval(v2: Attached, device: int, index: int) -> None:
    with refused(errno.EINVAL):
        region(v2.world, device, index)


def test_a_region_without_capabilities_leaves_cap_offset_as_it_was(v2: Attached, device: int) -> None:
    assert region(v2.world, device, 7).cap_offset == 0xAA


def test_configuration_space_is_256_or_4096_bytes_to_read_and_write(v2: Attached, device: int) -> None:
    answer = region(v2.world, device, 7)
    assert (answer.size in (256, 4096), answer.flags) == (True, 3)


# ----------------------------------------------------------------------------------------------- reading and writing


def test_the_bus_master_bit_is_clear_at_first_and_can_be_set(v2: Attached, device: int) -> None:
    kernel = v2.world.kernel
    (command,) = struct.unpack("<H", kernel.pread(device, 2, CONFIG + 4))
    assert not command & 4
    assert kernel.pwrite(device, struct.pack("<H", command | 4), CONFIG + 4) == 2
    assert struct.unpack("<H", kernel.pread(device, 2, CONFIG + 4)) == (command | 4,)


def test_the_ids_in_configuration_space_are_those_of_sysfs_and_cannot_be_written(v2: Attached, device: int) -> None:
    kernel = v2.world.kernel
    home = kernel.sysfs / "bus/pci/devices" / v2.world.bdf
    ids = tuple(int((home / name).read_text(), 16) for name in ("vendor", "device"))
    kernel.pwrite(device, b"\0\0\0\0", CONFIG)
    assert struct.unpack("<HH", kernel.pread(device, 4, CONFIG)) == ids


def test_behind_configuration_space_is_efault(v2: Attached, device: int) -> None:
    size = region(v2.world, device, 7).size
    for offset, count in ((size, 4), (size - 2, 4)):
        with refused(errno.EFAULT):
            v2.world.kernel.pread(device, count, CONFIG + offset)


def test_no_bytes_are_no_error_and_no_region_is(v2: Attached, device: int) -> None:
    assert v2.world.kernel.pread(device, 0, CONFIG) == b""
    with refused(errno.EINVAL):
        v2.world.kernel.pread(device, 4, 9 << 40)
    with refused(errno.EINVAL):
        v2.world.kernel.pread(device, 4, 8 << 40)


def test_a_read_is_cut_at_the_end_of_a_bar_and_starts_inside_it(v2: Attached, device: int) -> None:
    kernel = v2.world.kernel
    assert kernel.pwrite(device, b"12345678", MIB - 4) == 4
    assert kernel.pread(device, 16, MIB - 4) == b"\xff" * 4
    for offset in (MIB, 1 << 40):
        with refused(errno.EINVAL):
            kernel.pread(device, 4, offset)
        with refused(errno.EINVAL):
            kernel.pwrite(device, b"1234", offset)


def test_a_bar_is_eio_while_memory_decoding_is_off(v2: Attached, device: int) -> None:
    v2.world.kernel.pwrite(device, b"\0\0", CONFIG + 4)
    with refused(errno.EIO):
        v2.world.kernel.pread(device, 4, 0)
    with refused(errno.EIO):
        v2.world.kernel.pwrite(device, b"1234", 0)


def power_control(world: World, fd: int) -> int:
    """Return the offset of the control register of power management in the device's descriptor."""
    at = world.kernel.pread(fd, 1, CONFIG + 0x34)[0]
    while (header := world.kernel.pread(fd, 2, CONFIG + at))[0] != PM:
        at = header[1]
    return CONFIG + at + 4


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_bar_is_eio_in_d3hot_and_there_again_in_d0_and_after_a_reset(e1000e: World, size: int) -> None:
    fd = e1000e.open_device(Attached.of(e1000e, ioctls.VFIO_TYPE1v2_IOMMU).group)
    e1000e.kernel.pwrite(fd, b"\2\0", CONFIG + 4)
    control = power_control(e1000e, fd)
    for back in (partial(e1000e.kernel.pwrite, fd, bytes(size), control), partial(reset, e1000e, fd)):
        e1000e.kernel.pwrite(fd, b"\3".ljust(size, b"\0"), control)
        assert e1000e.kernel.pread(fd, 1, control)[0] & 3 == 3
        with refused(errno.EIO):
            e1000e.kernel.pread(fd, 4, 0)
        back()
        assert e1000e.kernel.pread(fd, 1, control)[0] & 3 == 0
        assert len(e1000e.kernel.pread(fd, 4, 0)) == 4


def reset(world: World, fd: int) -> None:
    """Call VFIO_DEVICE_RESET."""
    world.ioctl(fd, ioctls.VFIO_DEVICE_RESET)


def test_d1_is_no_state_of_a_device_that_does_not_say_so(e1000e: World) -> None:
    fd = e1000e.open_device(Attached.of(e1000e, ioctls.VFIO_TYPE1v2_IOMMU).group)
    e1000e.kernel.pwrite(fd, b"\2\0", CONFIG + 4)
    control = power_control(e1000e, fd)
    e1000e.kernel.pwrite(fd, b"\1\0", control)
    assert e1000e.kernel.pread(fd, 1, control)[0] & 3 == 0
    assert len(e1000e.kernel.pread(fd, 4, 0)) == 4


def test_a_large_bar_is_mapped_where_it_is_asked_for(functions: tuple[World, World]) -> None:
    world = functions[1]
    fd = world.open_device(Attached.of(world, ioctls.VFIO_TYPE1v2_IOMMU).group)
    world.kernel.pwrite(fd, b"\2\0", CONFIG + 4)
    assert (region(world, fd, 2).flags, region(world, fd, 2).size) == (7, 128 * MIB)
    window = world.kernel.registers(fd, (2 << 40) + 126 * MIB, 2 * MIB)
    window.read(2 * MIB - 4, 4)
    window.close()
    with refused(errno.EINVAL):
        world.kernel.registers(fd, (2 << 40) + 127 * MIB, 2 * MIB)


def test_registers_and_pread_show_the_same_bar(v2: Attached, device: int) -> None:
    window = v2.world.kernel.registers(device, 0, PAGE)
    window.write(LIVENESS, 4, 0x11223344)
    seen = v2.world.kernel.pread(device, 4, LIVENESS)
    window.close()
    assert seen == bytes(byte ^ 0xFF for byte in b"\x44\x33\x22\x11")


@pytest.mark.parametrize(
    ("offset", "size"), [(PAGE, PAGE), (0, 2 * PAGE), (1 << 40, PAGE), (2 << 40, PAGE), (CONFIG, PAGE), (9 << 40, PAGE)]
)
def test_only_what_lies_in_a_memory_bar_can_be_mapped_and_only_shared(
    functions: tuple[World, World], ports: int, offset: int, size: int
) -> None:
    with refused(errno.EINVAL):
        functions[0].kernel.registers(ports, offset, size)
    with refused(errno.EINVAL):
        functions[0].kernel.mmap(0, PAGE, BOTH, MAP_PRIVATE, fd=ports)


def test_what_the_regions_of_a_device_with_memory_and_ports_are(functions: tuple[World, World], ports: int) -> None:
    found = [region(functions[0], ports, index) for index in range(7)]
    assert [(each.flags, each.size) for each in found] == [(7, PAGE), (3, 256), *[(0, 0)] * 5]


def test_the_table_of_msix_vectors_is_read_as_ones_and_not_written(xhci: World) -> None:
    vectors = xhci.open_device(Attached.of(xhci, ioctls.VFIO_TYPE1v2_IOMMU).group)
    assert xhci.kernel.pwrite(vectors, bytes(16), MSIX_TABLE) == 16
    assert xhci.kernel.pread(vectors, 16 * 16, MSIX_TABLE) == b"\xff" * 256


# ------------------------------------------------------------------------------------------------------------ resets


def info_flags(world: World, fd: int) -> int:
    """Return the flags of VFIO_DEVICE_GET_INFO."""
    answer = ioctls.vfio_device_info(argsz=24)
    world.ioctl(fd, ioctls.VFIO_DEVICE_GET_INFO, answer)
    return answer.flags


def test_a_device_that_cannot_be_reset_says_so_and_is_einval(v2: Attached, device: int) -> None:
    assert info_flags(v2.world, device) == ioctls.VFIO_DEVICE_FLAGS_PCI
    with refused(errno.EINVAL):
        v2.world.ioctl(device, ioctls.VFIO_DEVICE_RESET)


def test_a_device_that_can_be_reset_says_so_and_is_and_that_leaves_its_mappings(e1000e: World) -> None:
    attached = Attached.of(e1000e, ioctls.VFIO_TYPE1v2_IOMMU)
    before = attached.locked()
    fd = e1000e.open_device(attached.group)
    attached.map()
    assert info_flags(e1000e, fd) == ioctls.VFIO_DEVICE_FLAGS_PCI | ioctls.VFIO_DEVICE_FLAGS_RESET
    assert e1000e.ioctl(fd, ioctls.VFIO_DEVICE_RESET) == 0
    assert attached.locked() == before + PAGE
    assert attached.unmap() == PAGE


# ------------------------------------------------------------------------------------- what the MSI-X table's BAR says


@pytest.mark.parametrize("argsz", [32, 39, 40, 100])
def test_the_bar_with_the_msix_table_says_that_it_may_be_mapped_to_whom_has_room(e1000e: World, argsz: int) -> None:
    fd = e1000e.open_device(Attached.of(e1000e, ioctls.VFIO_TYPE1v2_IOMMU).group)
    buffer = bytearray(struct.pack("=IIII", argsz, 0, 3, 0xAA) + b"\xaa" * 100)
    e1000e.ioctl(fd, ioctls.VFIO_DEVICE_GET_REGION_INFO, buffer)
    told, flags, _index, cap_offset, size, offset = struct.unpack_from("=IIIIQQ", buffer)
    has_room = argsz >= 40
    assert (flags, size, offset) == (0xF, 16 * KIB, 3 << 40)
    assert (told, cap_offset) == ((argsz, 32) if has_room else (40, 0))
    assert bytes(buffer[32:]) == (struct.pack("=HHI", 3, 1, 0) if has_room else b"\xaa" * 8) + b"\xaa" * 76
