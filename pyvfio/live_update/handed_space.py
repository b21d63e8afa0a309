"""The address space and the devices in the message between two processes (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from pyvfio import ioctls
from pyvfio.live_update.json_fields import Fields

VERSION = 3
"""The version of the states of spaces of iommufd."""
OF_CONTAINERS = 2
"""The version of the states of containers."""
_IOMMUFD = "iommufd"
_U32 = 1 << 32


@dataclass(frozen=True, slots=True)
class HandedContainer:
    """A container of type1, and the numbers of its groups."""

    iommu_type: ioctls.VfioExtension
    groups: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """A description of each descriptor, in words."""
        return ("the VFIO container", *(f"IOMMU group {number}" for number in self.groups))


@dataclass(frozen=True, slots=True)
class HandedIoas:
    """An address space of an iommufd: the number there, and how parts of mappings are unmapped.

    `charge_moves`: whether the kernel can charge the mappings to another process: see `Iommufd.charge_moves`.
    """

    id: int
    cut: Literal["pages", "replace"] | None
    charge_moves: bool

    names = ("the iommufd", "the agreement of the two processes")


HandedSpace: TypeAlias = HandedContainer | HandedIoas


@dataclass(frozen=True, slots=True)
class HandedDevice:
    """A device, with the number of the group (type1) or the number of the device in the iommufd, if known."""

    bdf: str
    group: int | None
    dev_id: int | None = None


def dump_space(space: HandedSpace) -> dict[str, object]:
    """Return the fields of a space, with the version of the message."""
    if isinstance(space, HandedContainer):
        return {"version": OF_CONTAINERS, "iommu_type": int(space.iommu_type), "groups": space.groups}
    told = {"kind": _IOMMUFD, "id": space.id, "cut": space.cut, "charge_moves": space.charge_moves}
    return {"version": VERSION, "space": told}


def load_space(top: Fields) -> HandedSpace:
    """Parse the fields that `dump_space` returned. Raises ValueError."""
    if top.find("version") == VERSION:
        return _load_ioas(top.inside("space"))
    number = top.number("iommu_type")
    if number not in (ioctls.VFIO_TYPE1_IOMMU, ioctls.VFIO_TYPE1v2_IOMMU):
        raise ValueError(f"the state has an IOMMU of type {number}, which is not type1")
    return HandedContainer(ioctls.VfioExtension(number), tuple(top.numbers("groups")))


def _load_ioas(row: Fields) -> HandedIoas:
    if (kind := row.text("kind")) != _IOMMUFD:
        raise ValueError(f"the state has an address space of kind {kind!r}, which this pyvfio does not know")
    if not 0 < (number := row.number("id")) < _U32:
        raise ValueError(f"the state has an address space of number {number}")
    cut = row.find("cut")
    if cut not in (None, "pages", "replace"):
        raise ValueError(f"the state has an address space with cut={cut!r}")
    return HandedIoas(number, cut, row.flag("charge_moves"))


def dump_device(device: HandedDevice) -> dict[str, object]:
    """Return the fields of a device."""
    if device.group is None:
        return {"bdf": device.bdf, "dev_id": device.dev_id}
    return {"bdf": device.bdf, "group": device.group}


def load_device(row: Fields, space: HandedSpace) -> HandedDevice:
    """Parse the fields that `dump_device` returned. Raises ValueError."""
    if isinstance(space, HandedContainer):
        return HandedDevice(row.text("bdf"), row.number("group"))
    return HandedDevice(row.text("bdf"), None, row.number_or_none("dev_id"))
