"""The declaration of the IOMMU groups of a fake kernel and of the devices in these groups."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pyvfio.testing.fake.device import FakeDevice
from pyvfio.testing.fake.edu import FakeEdu
from pyvfio.testing.fake.pci_device import FakePciDevice
from pyvfio.testing.fake.versions import KernelVersion

GroupDeclaration = tuple[int, Sequence[FakeDevice | FakePciDevice]]
"""The number of a group, and the devices in the group."""


def default_groups() -> list[GroupDeclaration]:
    """Return two groups with an edu each."""
    return [(2, [FakeEdu("0000:00:02.0")]), (3, [FakeEdu("0000:00:03.0")])]


def listed(groups: Iterable[GroupDeclaration]) -> list[GroupDeclaration]:
    """Return the groups as a list. Raises ValueError for a device, or another object, in place of groups."""
    if not isinstance(groups, Iterable):
        raise ValueError(f"groups are a list of (number, [devices]), not {groups!r}")  # noqa: TRY004 (as other mistakes)
    return list(groups)


def _check_declaration(declaration: object) -> None:
    if not isinstance(declaration, tuple) or len(declaration) != 2:
        raise ValueError(f"a group is declared as (number, [devices]), not {declaration!r}")
    number, devices = declaration
    if not isinstance(number, int) or number < 0:
        raise ValueError(f"an IOMMU group has a number from 0 on, not {number!r}")
    if not isinstance(devices, Sequence):
        raise ValueError(f"IOMMU group {number}: the devices are a list, [device], not {devices!r}")  # noqa: TRY004
    for device in devices:
        what = f"IOMMU group {number}: {type(device).__name__}"
        if not isinstance(device, FakeDevice | FakePciDevice):
            raise ValueError(f"{what} is neither a FakeDevice nor a FakePciDevice")  # noqa: TRY004 (as other mistakes)
        if isinstance(device, FakePciDevice) and not hasattr(device, "declaration"):
            raise ValueError(f"{what} did not call super().__init__(bdf)")


def _check_functions(groups: Sequence[GroupDeclaration]) -> None:
    devices = [device for _number, devices in groups for device in devices if isinstance(device, FakeDevice)]
    physical = {device.bdf for device in devices if device.sriov}
    for device in devices:
        if device.pf is not None and (device.sriov or device.pf not in physical):
            raise ValueError(f"{device.bdf} is a virtual function, and {device.pf} no physical one: FakeDevice(sriov=)")


def check_interfaces(version: KernelVersion, *, iommufd: bool, type1: bool) -> None:
    """Raise ValueError for interfaces that no kernel of that version can have."""
    if iommufd and not version.iommufd_last:
        raise ValueError(f"Linux {version.name} has no iommufd: the fake has it on 6.12 and 7.3")
    if not (iommufd or type1):
        raise ValueError("without type1 and without iommufd no device can be opened: type1=False needs iommufd=True")


def check_alone(groups: Sequence[GroupDeclaration]) -> None:
    """Raise ValueError for a group of several devices on a machine without an IOMMU."""
    for number, devices in groups:
        if len(devices) > 1:
            raise ValueError(f"IOMMU group {number}: without an IOMMU, VFIO makes a group for each device alone")


def check_groups(groups: Sequence[GroupDeclaration]) -> None:
    """Raise ValueError for groups that no machine can have."""
    for declaration in groups:
        _check_declaration(declaration)
    numbers = [number for number, _devices in groups]
    if twice := {number for number in numbers if numbers.count(number) > 1}:
        raise ValueError(f"IOMMU group {min(twice)} is declared twice")
    _check_functions(groups)
    home: dict[str, int] = {}
    for number, devices in groups:
        if not devices:
            raise ValueError(f"IOMMU group {number} has no device")
        for device in devices:
            if device.bdf in home:
                raise ValueError(f"{device.bdf} is declared twice: in IOMMU groups {home[device.bdf]} and {number}")
            home[device.bdf] = number
