"""The devices of the contract: those of a virtual machine with `--devices contract`, and the same on the fake.

A test finds a device by its kind, in sysfs, wherever the device is plugged in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pyvfio import pci
from pyvfio.kernel import Kernel
from pyvfio.testing.edu import EDU_ID
from pyvfio.testing.fake import Bar, FakeDevice, FakeEdu, FakePciDevice
from pyvfio.units import KIB, MIB, PAGE_SIZE

RNG_DRIVER = "virtio-pci"
VFIO = "vfio-pci"


POWER_MANAGEMENT = {6: b"\x10\x00", 0x34: b"\xc8", 0xC8: b"\x01\x00\x22\x00\x00\x00"}
"""Configuration space with one capability: power management, at 0xc8."""


class Id(NamedTuple):
    """A PCI vendor and device."""

    vendor: int
    device: int


EDU = Id(*EDU_ID)
TESTDEV = Id(0x1B36, 0x0005)
XHCI = Id(0x1033, 0x0194)
E1000E = Id(0x8086, 0x10D3)
RNG = Id(0x1AF4, 0x1005)
NIC = Id(0x10EC, 0x8139)
BRIDGE = Id(0x1B36, 0x000E)
ROOT_PORT = Id(0x1B36, 0x000C)
NVME = Id(0x1B36, 0x0010)
FAKE = ("0000:00:03.0", 3)
"""The contract's device on the fake: address and group."""
TO_BIND = (TESTDEV, XHCI, E1000E)
"""Devices without a driver after the boot of the machine. vfio-pci has them while the contract runs."""


class Member(NamedTuple):
    """A device's PCI address and group."""

    bdf: str
    group: int


class Company(NamedTuple):
    """The other devices.

    The second edu; the device with many vectors; both functions of one device; a bridge, a device behind it and the
    sibling there; a root port and the device below, which can be reset; a slot, and the removable device in it.
    """

    edu: Member
    xhci: Member
    functions: tuple[Member, Member]
    bridge: Member
    bridged: Member
    rng: Member
    root_port: Member
    e1000e: Member
    slot: Member
    in_slot: Member


def find_functions(kernel: Kernel) -> list[Member]:
    """Return the functions of a device with SR-IOV, the physical one first; each is in a separate group."""
    found = [device for device in pci.devices(kernel=kernel) if Id(device.vendor, device.device) == NVME]
    return sorted(Member(device.bdf, device.iommu_group) for device in found if device.iommu_group is not None)


def find_company(kernel: Kernel) -> Company | None:
    """Find the other devices of the contract; None if some are missing."""
    found: dict[Id, list[Member]] = {}
    for device in pci.devices(kernel=kernel):
        if device.iommu_group is not None:
            found.setdefault(Id(device.vendor, device.device), []).append(Member(device.bdf, device.iommu_group))
    match [found.get(each, []) for each in (EDU, XHCI, TESTDEV, BRIDGE, RNG, ROOT_PORT, E1000E, NIC)]:
        case [[_, edu], [xhci], [first, second, bridged], [bridge], [rng], [port, slot, *_], [e1000e], [nic]]:
            return Company(edu, xhci, (first, second), bridge, bridged, rng, port, e1000e, slot, nic)
    return None


def _testdev(bdf: str, *, memory: int = 0) -> FakeDevice:
    bars = {0: Bar(PAGE_SIZE), 1: Bar(256, io=True)} | ({2: Bar(memory)} if memory else {})
    return FakeDevice(bdf, vendor=TESTDEV.vendor, device=TESTDEV.device, bars=bars, intx=False, msi=0)


def fake_groups() -> list[tuple[int, Sequence[FakeDevice | FakePciDevice]]]:
    """Return the groups of a fake kernel with the contract's device and the other devices."""
    xhci = FakeDevice(
        "0000:00:05.0",
        vendor=XHCI.vendor,
        device=XHCI.device,
        class_code=0x0C0330,
        bars={0: Bar(16 * KIB)},
        msi=16,
        msix=16,
        msix_bar=0,
        msix_offset=0x3000,
        pcie=True,
    )
    e1000e = FakeDevice(
        "0000:02:00.0",
        vendor=E1000E.vendor,
        device=E1000E.device,
        class_code=0x020000,
        bars={0: Bar(128 * KIB), 1: Bar(128 * KIB), 2: Bar(32, io=True), 3: Bar(16 * KIB)},
        msix=5,
        msix_bar=3,
        resettable=True,
        pcie=True,
        config=POWER_MANAGEMENT,
    )
    in_slot = FakeDevice(
        "0000:03:00.0",
        vendor=NIC.vendor,
        device=NIC.device,
        class_code=0x020000,
        bars={0: Bar(256, io=True), 1: Bar(256, own_page=True)},
        msi=0,
    )
    rng = FakeDevice(
        "0000:01:02.0",
        driver=RNG_DRIVER,
        vendor=RNG.vendor,
        device=RNG.device,
        bars={0: Bar(32, io=True), 1: Bar(PAGE_SIZE), 4: Bar(16 * KIB)},
        msi=0,
        msix=2,
        msix_bar=1,
    )
    return [
        (FAKE[1], [FakeEdu(FAKE[0])]),
        (4, [FakeEdu("0000:00:04.0")]),
        (5, [xhci]),
        (6, [_testdev("0000:00:10.0"), _testdev("0000:00:10.1", memory=128 * MIB)]),
        (7, [_bridge("0000:00:11.0", BRIDGE, None), _testdev("0000:01:01.0"), rng]),
        (8, [_bridge("0000:00:12.0", ROOT_PORT, "pcieport"), e1000e]),
        (9, [_bridge("0000:00:13.0", ROOT_PORT, "pcieport"), in_slot]),
        (10, [_nvme("0000:04:00.0", pf=None)]),
        (11, [_nvme("0000:04:00.1", pf="0000:04:00.0")]),
    ]


# Status, and the lists of capabilities of QEMU 7.2's nvme: MSI-X, power management, PCI Express; ARI, and SR-IOV of the
# physical function.
_NVME_CONFIG = {
    0x06: b"\x10\x00",
    0x34: b"\x40",
    0x60: bytes.fromhex("0100030008000000"),
    0x80: bytes.fromhex("1060020000800010000000001104000000001100"),
}
_NVME_PHYSICAL = {
    0x40: bytes.fromhex("11803e000020000000300000"),
    0x100: bytes.fromhex("0e000112"),
    0x120: bytes.fromhex("10000100"),
}
_NVME_VIRTUAL = {0x40: bytes.fromhex("118000000020000000300000"), 0x100: bytes.fromhex("0e000100")}


def _nvme(bdf: str, *, pf: str | None) -> FakeDevice:
    return FakeDevice(
        bdf,
        vendor=NVME.vendor,
        device=NVME.device,
        class_code=0x010802,
        bars={0: Bar(16 * KIB)},
        intx=pf is None,
        msi=0,
        msix=63 if pf is None else 1,
        resettable=True,
        pcie=True,
        config=_NVME_CONFIG | (_NVME_PHYSICAL if pf is None else _NVME_VIRTUAL),
        sriov=pf is None,
        pf=pf,
    )


def _bridge(bdf: str, identity: Id, driver: str | None) -> FakeDevice:
    return FakeDevice(
        bdf,
        driver=driver,
        vendor=identity.vendor,
        device=identity.device,
        class_code=0x060400,
        bars={},
        intx=False,
        msi=0,
    )
