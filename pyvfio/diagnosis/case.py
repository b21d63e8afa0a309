"""The case that the checks examine: a machine, perhaps one device of it, and an error that called for the check."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pyvfio.container import Container
from pyvfio.errors import IoctlError, VfioError
from pyvfio.findings import Command, Finding, Status
from pyvfio.kernel import Kernel
from pyvfio.pci.boot import build_options, release, root_directory
from pyvfio.pci.cdevs import has_iommufd
from pyvfio.pci.groups import group_members
from pyvfio.pci.surroundings import Surroundings, look_around
from pyvfio.pci.sysfs import PciDevice, printable, read_device, read_text
from pyvfio.units import MIB

IOMMUFD_OPTIONS = ("IOMMUFD", "VFIO_DEVICE_CDEV")
"""The options of the kernel without which a device cannot be opened through iommufd."""

LEAST_MEMORY = MIB
"""Bytes that a program maps at least, where the caller does not say: queues and a few buffers."""


@dataclass
class Case:
    """Facts that several checks ask for, each read once. Owned by one thread.

    `memory`: bytes that the program is going to map; None: not known. `process`: whose limits the commands raise, a
    shell for instance. `number`: the IOMMU group where no device is given. `error`: the one to explain. `iommu`:
    "type1" or "iommufd", the address space that the program uses; None: as `open_device` chooses.
    """

    kernel: Kernel
    bdf: str | None = None
    memory: int | None = None
    process: int | None = None
    number: int | None = None
    error: VfioError | None = None
    iommu: str | None = None
    taken: bool = False
    """Whether a container took the group, for a moment."""

    @cached_property
    def here(self) -> Surroundings:
        """Where the program runs."""
        return look_around(self.kernel)

    @cached_property
    def root(self) -> Path:
        """The root directory, for the files of the distribution."""
        return root_directory(self.kernel)

    @cached_property
    def release(self) -> str:
        """The kernel's release; empty where procfs does not say."""
        return release(self.kernel)

    @cached_property
    def options(self) -> Mapping[str, str]:
        """The options that the kernel was built with."""
        return build_options(self.kernel)

    @cached_property
    def host(self) -> str:
        """The machine's name; empty where procfs does not say."""
        name = read_text(self.kernel.proc / "sys/kernel/hostname") or ""
        return name if re.fullmatch(r"[\w.-]+", name) else ""

    @cached_property
    def works(self) -> bool:
        """Whether a container can be opened, and has type1. The node is not opened where the kernel has no VFIO yet:
        that would load the module."""
        if not (self.kernel.sysfs / "class/misc/vfio").exists():
            return False
        try:
            Container(kernel=self.kernel).close()
        except VfioError:
            return False
        return True

    @property
    def on_iommufd(self) -> bool:
        """Whether the program uses iommufd: that was asked for, or the kernel has iommufd and no type1."""
        return self._without_type1 if self.iommu is None else self.iommu == "iommufd"

    @cached_property
    def _without_type1(self) -> bool:
        if self.works:
            return False
        if options := self.options:
            return self._is_built_without_type1 and "n" not in {options.get(name, "n") for name in IOMMUFD_OPTIONS}
        # VFIO is loaded, and made neither the node of containers nor the class of groups.
        places = (self.kernel.sysfs / "class/misc/vfio", self.kernel.sysfs / "class/vfio")
        loaded = (self.kernel.sysfs / "module/vfio").exists() and has_iommufd(self.kernel)
        return loaded and not any(place.exists() for place in places)

    @property
    def _is_built_without_type1(self) -> bool:
        no_container = self.options.get("VFIO_CONTAINER") == "n" and self.options.get("IOMMUFD_VFIO_CONTAINER") != "y"
        return no_container or any(self.options.get(name) == "n" for name in ("VFIO_GROUP", "VFIO_IOMMU_TYPE1"))

    @property
    def device(self) -> PciDevice | None:
        """The device as sysfs shows it now. Raises as `read_device`."""
        return None if self.bdf is None else read_device(self.bdf, kernel=self.kernel)

    @property
    def group(self) -> int | None:
        """The IOMMU group of the device, or the group in question."""
        device = self.device
        return self.number if device is None else device.iommu_group

    @cached_property
    def blockers(self) -> tuple[str, ...]:
        """The devices that keep the group from being viable, without the device itself."""
        if self.group is None:
            return ()
        members = group_members(self.group, kernel=self.kernel)
        return tuple(member.bdf for member in members if member.blocks and member.bdf != self.bdf)

    def has(self, name: str) -> bool:
        """Return whether the machine has a file or directory, named from its root."""
        return (self.root / name).exists()

    def has_program(self, name: str) -> bool:
        """Return whether the machine has a program in one of the usual directories."""
        return any(self.has(f"{place}/{name}") for place in ("usr/bin", "usr/sbin", "bin", "sbin", "usr/local/bin"))


def of_error(check: str, error: VfioError | OSError, *, status: Status = "wrong", by_hand: str = "") -> Finding:
    """Return the finding that an error stands for. `by_hand`: in place of the error's hint."""
    if not isinstance(error, VfioError):
        return Finding(check, status, printable(str(error)), by_hand=by_hand)
    text = str(error).removesuffix(f". {error.hint}") if isinstance(error, IoctlError) else error.message
    return Finding(check, status, printable(text), by_hand=by_hand or printable(error.hint))


def write_line(text: str, path: str, comment: str = "") -> Command:
    """Return the command that makes a file of one line."""
    return Command(f"printf '%s\\n' {text} > {path}", comment)
