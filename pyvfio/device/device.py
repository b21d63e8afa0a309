"""An open VFIO PCI device: what it has, whether it may do DMA, how it is reset and closed.

Source: drivers/vfio/pci/vfio_pci_core.c.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import index as as_number

from pyvfio import ioctls, pci
from pyvfio.container import Container, Group, check_kind
from pyvfio.device.irq import Irq
from pyvfio.device.region import Region
from pyvfio.errors import ClosedError, UnsupportedError, VfioError
from pyvfio.guard import Guard, close_now, closing, constructing, uninterrupted
from pyvfio.handle import Handle, attempt_all, checked_fd, give_up_fd
from pyvfio.info import DeviceInfo, parse_device_info, parse_irq_info, parse_region_info

PCI_COMMAND = 0x04  # linux/pci_regs.h
PCI_COMMAND_MEMORY = 0x2
PCI_COMMAND_MASTER = 0x4

_INFO_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class DependentDevice:
    """A device that a hot reset reaches besides the one that was asked."""

    group: int
    bdf: str


class Device(Handle):
    """An open VFIO PCI device.

    `group` is attached to a container whose IOMMU is set. Raises IoctlError (ENODEV: not bound to vfio-pci), VfioError.
    `open_device` does all that comes before.

    Synchronization: any thread. Closing waits for the container's lock; registers and interrupts do not.
    """

    @constructing(Handle.close_fd)
    def __init__(self, group: Group, bdf: str) -> None:
        bdf = pci.parse_bdf(bdf)
        if not isinstance(group, Group):
            raise TypeError(f"group must be a Group, not {type(group).__name__}")
        self._own(group, bdf, group.get_device_fd(bdf))
        try:
            self.info = self._get_info()
        except BaseException:
            self.close_fd()
            raise
        group.devices.append(self)

    def _own(self, group: Group, bdf: str, fd: int) -> None:
        self.bdf = bdf
        self.group = group
        self.opened_with: Container | None = None
        """The container that `open_device` opened for this device alone, and that is closed with it."""
        self._regions: dict[int, Region] = {}
        self._irqs: dict[int, Irq] = {}
        what = f"device {bdf}"
        super().__init__(group.kernel, fd, what, guard=Guard(what, lock=group.guard.lock))

    @classmethod
    @uninterrupted(give_up_fd)
    def from_fd(cls, group: Group, bdf: str, fd: int) -> Device:
        """Make a device of a descriptor that is open already: a launcher's with more rights, or a former program's.

        `group` is attached, and `bdf` is the device's address. The descriptor is the object's own from then on, and is
        closed with it; where this raises, it is the caller's as before.

        Raises ValueError where the descriptor is closed or no VFIO device's, TypeError, IoctlError.
        Cost: one ioctl. Source: VFIO_DEVICE_GET_INFO.
        """
        if not isinstance(group, Group):
            raise TypeError(f"group must be a Group, not {type(group).__name__}")
        if group.container is None:
            raise ValueError(f"IOMMU group {group.number} is in no Container: attach() it, or Container.from_fd()")
        device = cls.__new__(cls)
        device._own(group, pci.parse_bdf(bdf), checked_fd(fd))
        device.info = check_kind(device, device._get_info, "a VFIO device")
        group.devices.append(device)
        return device

    def release_fd(self) -> int:
        """As `Handle.release_fd`; the group has one device less."""
        if self in self.group.devices:
            self.group.devices.remove(self)
        return super().release_fd()

    def __repr__(self) -> str:
        return f"<Device {self.bdf} in group {self.group.number}{', closed' if self.closed else ''}>"

    @property
    def container(self) -> Container:
        """The container, which is the device's address space. Raises ClosedError."""
        if self.closed or self.group.container is None:
            raise ClosedError(f"device {self.bdf} has been closed")
        return self.group.container

    def _get_info(self) -> DeviceInfo:
        return parse_device_info(self._ask("VFIO_DEVICE_GET_INFO", bytearray(ctypes.sizeof(ioctls.vfio_device_info))))

    def _ask(self, request: str, buffer: bytearray, *, index: int = 0) -> bytearray:
        """Ask until the capabilities fit; argsz is the first word of every structure."""
        while len(buffer) <= _INFO_MAX:
            buffer[:4] = len(buffer).to_bytes(4, "little")
            self.ioctl(request, buffer, index=index)
            needed = int.from_bytes(buffer[:4], "little")
            if needed <= len(buffer):
                return buffer
            buffer.extend(bytes(needed - len(buffer)))
        raise VfioError(f"{request} wants a buffer of {len(buffer)} bytes")

    def region(self, index: int) -> Region:
        """A region by its index (VFIO_PCI_BAR0_REGION_INDEX …). Raises ValueError for an index that the device does
        not have, IoctlError (EINVAL: the VGA region of another device).

        The first call of an index costs an ioctl or two.
        """
        index = as_number(index)
        if index not in self._regions:
            if not 0 <= index < self.info.num_regions:
                raise ValueError(f"{self.bdf} has regions 0 to {self.info.num_regions - 1}, not {index}")
            question = ioctls.vfio_region_info(index=index)
            answer = self._ask("VFIO_DEVICE_GET_REGION_INFO", bytearray(question), index=index)
            self._regions.setdefault(index, Region(self, parse_region_info(answer)))
        return self._regions[index]

    @property
    def config(self) -> Region:
        """PCI configuration space, as the kernel shows it to users."""
        return self.region(ioctls.VFIO_PCI_CONFIG_REGION_INDEX)

    def irq(self, index: int) -> Irq:
        """A kind of interrupt by its index (VFIO_PCI_MSI_IRQ_INDEX …). Raises ValueError for an index that the device
        does not have, IoctlError (EINVAL: the error interrupt of a conventional device)."""
        index = as_number(index)
        if index not in self._irqs:
            if not 0 <= index < self.info.num_irqs:
                raise ValueError(f"{self.bdf} has kinds of interrupt 0 to {self.info.num_irqs - 1}, not {index}")
            question = ioctls.vfio_irq_info(index=index)
            answer = self._ask("VFIO_DEVICE_GET_IRQ_INFO", bytearray(question), index=index)
            self._irqs.setdefault(index, Irq(self, parse_irq_info(answer)))
        return self._irqs[index]

    def describe_irqs(self) -> str:
        """How many vectors of each of the three usual kinds there are, in words."""
        kinds = (ioctls.VFIO_PCI_INTX_IRQ_INDEX, ioctls.VFIO_PCI_MSI_IRQ_INDEX, ioctls.VFIO_PCI_MSIX_IRQ_INDEX)
        return ", ".join(
            f"{self.irq(kind).count} {name}" for kind, name in zip(kinds, ("INTx", "MSI", "MSI-X"), strict=True)
        )

    @property
    def bus_master(self) -> bool:
        """Whether the device may do DMA (PCI COMMAND, bit 2). Off when the device is opened; set it to use DMA."""
        return bool(self.config.read16(PCI_COMMAND) & PCI_COMMAND_MASTER)

    @bus_master.setter
    def bus_master(self, on: bool) -> None:
        self.config.change16(PCI_COMMAND, PCI_COMMAND_MASTER, on=on)

    @property
    def memory_enabled(self) -> bool:
        """Whether the device answers in its memory BARs (PCI COMMAND, bit 1). A mapped BAR is SIGBUS if not."""
        return bool(self.config.read16(PCI_COMMAND) & PCI_COMMAND_MEMORY)

    @memory_enabled.setter
    def memory_enabled(self, on: bool) -> None:
        if not on:
            for region in tuple(self._regions.values()):
                region.close()
        self.config.change16(PCI_COMMAND, PCI_COMMAND_MEMORY, on=on)

    @property
    def can_reset(self) -> bool:
        """Whether the device has a reset of its own."""
        return bool(self.info.flags & ioctls.VFIO_DEVICE_FLAGS_RESET)

    def reset(self) -> None:
        """VFIO_DEVICE_RESET: DMA stops, registers go back; configuration space is kept, and so are DMA mappings.

        Raises UnsupportedError when the device has none.
        """
        self.check_usable()
        if not self.can_reset:
            raise UnsupportedError(
                f"{self.bdf} has no reset of its own", hint="Clear bus_master to stop its DMA, or reset its bus"
            )
        self.ioctl("VFIO_DEVICE_RESET")

    def get_pci_hot_reset_info(self) -> tuple[DependentDevice, ...]:
        """VFIO_DEVICE_GET_PCI_HOT_RESET_INFO: all devices that a reset of this one's slot or bus reaches, itself too.

        Raises UnsupportedError when neither can be reset (a device on the root bus).
        """
        count = 0
        while True:
            answer = ioctls.pci_hot_reset_info(count=count)
            try:
                self.ioctl("VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", answer, count=count)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    raise UnsupportedError(f"neither the slot nor the bus of {self.bdf} can be reset") from error
                if error.errno != errno.ENOSPC or answer.count <= count:
                    raise
                count = answer.count
                continue
            found: Sequence[ioctls.vfio_pci_dependent_device] = getattr(answer, "devices", ())
            return tuple(map(_dependent, found[: answer.count]))

    @closing
    def close(self) -> None:
        """Stop interrupts and DMA, unmap regions, reset, close; then the group and the container, where `open_device`
        opened them for this device.

        Twice is fine; in a forked child nothing happens. Raises BufferError while a view of a mapped region lives, and
        then nothing has been closed; otherwise the errors of the steps, after all of them were tried.
        """
        steps: list[Callable[[], object]] = []
        if not self.closed:
            self.group.check_here()
            self.check_views()
            steps += [irq.close for irq in tuple(self._irqs.values())]
            # Nothing may be under way when the mappings go: a device without a reset is kept from the bus.
            steps += [self._stop_dma, *([self.reset] if self.can_reset else [])]
            steps += [region.close for region in tuple(self._regions.values())]
            steps += [self.close_fd, self._leave]
        if (container := self.opened_with) is not None and not container.closed:
            steps += [partial(close_now, container)]
        attempt_all(f"closing device {self.bdf}", steps)

    def _stop_dma(self) -> None:
        self.bus_master = False

    def _leave(self) -> None:
        group, container = self.group, self.group.container
        if group.leaves and not group.devices and container is not None and not container.must_stay(group):
            close_now(group)

    def check_views(self) -> None:
        """Raise BufferError while a view of a mapped region lives."""
        for region in tuple(self._regions.values()):
            region.check_views()

    def forget(self) -> None:
        """Close this process's share of a device that another process has, without a call that reaches it. For the
        library."""
        if self.closed:
            return
        steps: list[Callable[[], object]] = [irq.forget for irq in tuple(self._irqs.values())]
        steps += [region.close for region in tuple(self._regions.values())]
        steps += [self.close_fd]
        attempt_all(f"forgetting device {self.bdf}", steps)


def _dependent(found: ioctls.vfio_pci_dependent_device) -> DependentDevice:
    slot, function = found.devfn >> 3, found.devfn & 7
    return DependentDevice(found.group_id, f"{found.segment:04x}:{found.bus:02x}:{slot:02x}.{function}")
