"""An open VFIO PCI device: regions, interrupts, DMA enable, reset and close.

Source: drivers/vfio/pci/vfio_pci_core.c.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Generic, Self, TypeVar, overload

from pyvfio import ioctls, pci
from pyvfio.container import Group
from pyvfio.device import cdev, hot_reset
from pyvfio.device.attachment import AttachedHandle, Attachment, check_not_open, devices_of
from pyvfio.device.config import PCI_COMMAND, PCI_COMMAND_MASTER, PCI_COMMAND_MEMORY, ConfigSpace
from pyvfio.device.features import (
    DmaBuf,
    Feature,
    LowPower,
    checked_number,
    checked_ranges,
    drop_dma_buf,
    enter_low_power,
)
from pyvfio.device.hot_reset import DependentDevice
from pyvfio.device.irq import Irq
from pyvfio.device.region import Region
from pyvfio.device.windows import Windows
from pyvfio.errors import DeviceGoneError, IoctlError, UnsupportedError, VfioError
from pyvfio.guard import (
    Guard,
    close_now,
    closing_after_dependents,
    constructing,
    making,
    uninterrupted,
)
from pyvfio.handle import attempt, attempt_all, check_kind, checked_fd
from pyvfio.info import DeviceInfo, parse_device_info, parse_irq_info, parse_region_info
from pyvfio.ioas import Ioas
from pyvfio.kernel import Kernel
from pyvfio.units import as_number, as_switch, check_bool

if TYPE_CHECKING:
    from pathlib import Path
    from uuid import UUID

    from pyvfio.container import Container
    from pyvfio.device.capabilities import Capabilities
    from pyvfio.device.recording import Recording
    from pyvfio.noiommu import UnsafeNoIommu


def _attachment_through(through: Group | Ioas | UnsafeNoIommu) -> Attachment:
    if isinstance(through, Group | Ioas):
        return cdev.attachment_through(through)
    from pyvfio.device import noiommu  # noqa: PLC0415 (few programs give up protection)

    return noiommu.attachment_through(through)


def end_recording(recording: Recording) -> None:
    """Close a recording that nobody receives. For the library."""
    recording.close()


def _undo_opening(device: Device) -> None:
    """Undo `Device.__init__`."""
    device.close_fd()
    device.attachment.leave(device)


def _give_up(device: Device) -> int:
    """Undo `Device.from_fd`. The descriptor stays open."""
    attempt(partial(device.attachment.retract, device), [])
    return device.release_fd()


_INFO_MAX = 1 << 20
_SWITCHES = (("busmaster", "bus_master"), ("memoryenable", "memory_enabled"), ("memenable", "memory_enabled"))
"""Letters of misspelt switches, and the switches that are meant."""
_Result = TypeVar("_Result")


class _once(Generic[_Result]):  # noqa: N801 (a decorator)
    """A cached property without the lock that `functools.cached_property` has in Python 3.11.

    An attribute costs half as much as a property. Two threads may compute the value at once, and must find the same.
    """

    def __init__(self, look: Callable[[Device], _Result]) -> None:
        self.__doc__ = look.__doc__
        self._look = look

    @overload
    def __get__(self, device: None, kind: type[Device]) -> Self: ...

    @overload
    def __get__(self, device: Device, kind: type[Device]) -> _Result: ...

    def __get__(self, device: Device | None, kind: type[Device]) -> Self | _Result:
        if device is None:
            return self
        found = self._look(device)
        setattr(device, self._look.__name__, found)  # `vars` would make each attribute of the object slower
        return found


class Device(AttachedHandle):
    """An open VFIO PCI device.

    `through`: a Group that is attached to a container whose IOMMU is set, or an Ioas, to which the device is attached
    by the node of the device. `vf_token`: as for `open_device`, which makes all of these objects.

    Raises IoctlError (ENODEV: not bound to vfio-pci; EACCES: wrong or missing VF token), and the errors of
    `open_device` for a node. Raises VfioError, also if `through` has an open Device of that address.

    Synchronization: any thread. A close waits for the lock of the container; accesses to registers and interrupts do
    not.

    Example:
        >>> import pyvfio
        >>> kernel = pyvfio.testing.FakeKernel()
        >>> device = pyvfio.open_device("0000:00:02.0", kernel=kernel)
        >>> f"{device.config.read16(0):04x}:{device.config.read16(2):04x}"
        '1234:11e8'
        >>> device.region(0).size == pyvfio.MIB
        True
        >>> device.irq(pyvfio.ioctls.VFIO_PCI_MSI_IRQ_INDEX).count
        1
        >>> device.bus_master = True
        >>> device.close()
    """

    if not TYPE_CHECKING:  # a type checker that sees the method would accept any name

        def __setattr__(self, name: str, value: object) -> None:
            """Refuse a misspelt switch: without bus mastering, interrupts are lost without an error."""
            if not hasattr(type(self), name):
                letters = name.replace("_", "").lower()
                for begin, meant in _SWITCHES:
                    if begin in letters:
                        raise AttributeError(
                            f"a Device has no attribute {name!r}; you mean {meant}", name=name, obj=self
                        )
            super().__setattr__(name, value)

    @constructing(_undo_opening)
    def __init__(self, through: Group | Ioas | UnsafeNoIommu, bdf: str, *, vf_token: UUID | str | None = None) -> None:
        bdf, attachment = pci.parse_bdf(bdf), _attachment_through(through)
        check_not_open(attachment, bdf)
        self._own(attachment, bdf, attachment.open(bdf, vf_token))
        try:
            self.info = self._get_info()
            self._join()
        except BaseException:
            self.close_fd()
            raise

    def _own(self, attachment: Attachment, bdf: str, fd: int) -> None:
        self.bdf = bdf
        self.attachment, self.owner = attachment, attachment.owner
        self.opened_with: Container | Ioas | UnsafeNoIommu | None = None
        """The address space that `open_device` opened for this device only. Closed with the device."""
        self._regions: dict[int, Region] = {}
        self.windows = Windows(bdf, self._regions, check_here=self.owner.check_here)
        """The mapped windows of the regions, for a change during which there must be none. For the library."""
        self._irqs: dict[int, Irq] = {}
        self._recorded: Kernel | None = None  # who makes the calls of others, while a recorder makes the device's
        what = f"device {bdf}"
        super().__init__(self.owner.kernel, fd, what, guard=Guard(what, lock=self.owner.guard.lock))

    @classmethod
    @uninterrupted(_give_up)
    def from_fd(cls, through: Group | Ioas, bdf: str, fd: int) -> Device:
        """Make a device from an open descriptor: one of a launcher with more rights, or of a former program.

        `through`: a Group that is attached, for a descriptor of VFIO_GROUP_GET_DEVICE_FD; an Ioas for a descriptor of
        the device's node. The descriptor of a node is bound to the iommufd of the Ioas, if it is not bound yet, and
        attached to the Ioas. One that is bound to another iommufd must not be passed.

        `bdf` is the address of the device. The object owns the descriptor, and closes the descriptor with the device.
        After an error, the caller still owns the descriptor. A descriptor that was bound stays bound until the close.

        Raises ValueError for a descriptor that is closed or not of a VFIO device, TypeError, IoctlError. Raises
        VfioError if `through` has an open Device of that address.
        Cost: one ioctl; three for a node.
        Source: VFIO_DEVICE_GET_INFO.
        """
        return cls._of_fd(_attachment_through(through), bdf, fd)

    @classmethod
    @uninterrupted(_give_up)
    def resume(cls, space: Ioas, bdf: str, fd: int, *, dev_id: int | None) -> Device:
        """Make a device of a descriptor that a former process has bound, and attached to `space`. For the library.

        As `from_fd`, but no call binds, attaches or detaches the device, not even after an error. `dev_id`: the number
        of the device in the iommufd, if known.
        """
        return cls._of_fd(cdev.ResumedAttachment(space, dev_id), bdf, fd)

    @classmethod
    def _of_fd(cls, attachment: Attachment, bdf: str, fd: int) -> Device:
        bdf, number = pci.parse_bdf(bdf), checked_fd(fd)
        check_not_open(attachment, bdf)
        attachment.adopt(bdf, number)
        device = cls.__new__(cls)
        device._own(attachment, bdf, number)
        device.info = check_kind(device, device._get_info, "a VFIO device")
        try:
            device._join()
        except BaseException:
            device.release_fd()
            raise
        return device

    def __repr__(self) -> str:
        return f"<Device {self.bdf} {self.attachment.place}{', closed' if self.closed else ''}>"

    @property
    def kernel(self) -> Kernel:
        """As `Handle.kernel`; not the recorder, while the device is recorded."""
        recorded = self._recorded
        return self._kernel if recorded is None else recorded

    @property
    def seam(self) -> Kernel:
        """Who makes the system calls on the device: `kernel`, or a recorder of these calls. For the library."""
        return self._kernel

    def use_seam(self, seam: Kernel) -> None:
        """Make the system calls on the device through `seam` from now on. For the library; the caller holds the lock of
        the regions."""
        kernel = self.kernel
        self._recorded = None if seam is kernel else kernel
        self._kernel = seam
        for region in self.all_regions():
            region.seam = seam
        for irq in self.irqs:
            irq.use_seam(seam)

    @making(end_recording)
    def record(
        self, path: Path | str | None = None, *, times: bool = False, allow_mmap: bool = False, keep: int = 20
    ) -> Recording:
        """Record accesses of regions and configuration space, resets and interrupts, until the result is closed.

        `path`: the file, which is replaced; without one the last `keep` events are kept in memory alone. `times`: each
        line has the seconds since the first event. `pyvfio.testing.RecordedDevice` replays the file.

        An access through a mapping of `Region.mmap` cannot be seen. So a mapping raises UnsupportedError while the
        device is recorded, and VfioError at the start. With `allow_mmap=True` the record has the mapping, and none of
        the accesses. Data that the device writes to memory is not in the record. An interrupt is recorded when
        `Irq.wait` or `wait_any` returns; the reads of a program's own eventfds are not seen.

        Recordings may overlap. Raises TypeError, ValueError, OSError. Synchronization: any thread.
        Cost: 10 µs to 20 µs for each access while the device is recorded, none otherwise.
        """
        from pyvfio.device.recording import Recording  # noqa: PLC0415 (a program that records nothing imports nothing)

        return Recording(self, path, times=times, allow_mmap=allow_mmap, keep=keep)

    def _get_info(self) -> DeviceInfo:
        return parse_device_info(self._ask("VFIO_DEVICE_GET_INFO", bytearray(ctypes.sizeof(ioctls.vfio_device_info))))

    def _ask(self, request: str, buffer: bytearray, *, index: int = 0) -> bytearray:
        """Repeat the request until the capabilities fit. argsz is the first word of every structure."""
        while len(buffer) <= _INFO_MAX:
            buffer[:4] = len(buffer).to_bytes(4, "little")
            self.ioctl(request, buffer, index=index)
            needed = int.from_bytes(buffer[:4], "little")
            if needed <= len(buffer):
                return buffer
            buffer.extend(bytes(needed - len(buffer)))
        raise VfioError(f"{request} needs a buffer of {len(buffer)} bytes, more than the limit of {_INFO_MAX}")

    def region(self, index: int) -> Region:
        """Return a region by index (VFIO_PCI_BAR0_REGION_INDEX …).

        Raises ValueError for an index that the device does not have, IoctlError (EINVAL: VGA region of a device without
        VGA). Cost: the first call for an index makes one or two ioctls.
        """
        index = as_number(index, "index")
        if index not in self._regions:
            if not 0 <= index < self.info.num_regions:
                raise ValueError(f"{self.bdf} has regions 0 to {self.info.num_regions - 1}, not {index}")
            question = ioctls.vfio_region_info(index=index)
            answer = self._ask("VFIO_DEVICE_GET_REGION_INFO", bytearray(question), index=index)
            kind = ConfigSpace if index == ioctls.VFIO_PCI_CONFIG_REGION_INDEX else Region
            self._regions.setdefault(index, kind(self, parse_region_info(answer)))
        return self._regions[index]

    def all_regions(self) -> tuple[Region, ...]:
        """Return the regions that `region` has returned so far."""
        return tuple(self._regions.values())

    @_once
    def config(self) -> ConfigSpace:
        """PCI configuration space, as the kernel shows the space to user space."""
        config = self.region(ioctls.VFIO_PCI_CONFIG_REGION_INDEX)
        if not isinstance(config, ConfigSpace):
            raise TypeError(f"region {config.info.index} is not configuration space")
        return config

    def check_decoding(self, what: str) -> None:
        """Raise VfioError if `what`, a memory BAR, does not answer; DeviceGoneError for a lost device.

        Cost: two reads of configuration space. The first call also reads the capability list.
        """
        if why := self.config.why_silent():
            self.check_present()  # the power state of a device that has just gone reads D3
            raise VfioError(
                f"{self.bdf} {why}, so {what} cannot be reached",
                hint="device.memory_enabled = True; if the value stays False, the device may be in low power"
                if "decode" in why
                else "Write 0 (D0) to the lowest two bits of the power management control register (PMCSR)",
            )

    def check_present(self) -> None:
        """Raise DeviceGoneError if the device seems to be gone. Cost: one read of configuration space."""
        self.config.check_present()

    def drop_windows(self, *, force: bool = False) -> None:
        """Unmap the BARs from this process: the windows of register accesses, and the mappings of `Region.mmap`.

        Call this before a change that pyvfio does not see and after which an access would be SIGBUS. The next register
        access maps a new window, so no other thread may access registers until the change is made.

        Raises BufferError, before anything is unmapped, while a view of a mapping lives. With `force=True`, that
        mapping stays.
        Synchronization: any thread; waits for the lock of the regions.
        """
        check_bool(force, "force")
        self.windows.change(_nothing, keep="maps in use" if force else "no maps")

    @property
    def capabilities(self) -> Capabilities:
        """The PCI capabilities, standard and extended, as a snapshot.

        Raises CapabilityError for lists that no device can have, DeviceGoneError, IoctlError.
        Cost: two reads of configuration space for each capability, and up to four more for MSI-X and the like.
        """
        from pyvfio.device.capabilities import read_capabilities  # noqa: PLC0415 (few programs look at them)

        self.check_present()
        return read_capabilities(self.config, self.bdf)

    def feature(self, number: int) -> Feature:
        """Return a feature by number (VFIO_DEVICE_FEATURE_MIGRATION …), to probe, get or set the feature.

        Makes no system call. Raises TypeError, and ValueError for a number that does not fit 16 bits.
        Source: VFIO_DEVICE_FEATURE.
        """
        return Feature(self, checked_number(number))

    def set_vf_token(self, token: UUID | str) -> None:
        """Set the token that opening a virtual function of this device requires: see `open_device`.

        Open virtual functions stay open. Raises TypeError, and ValueError for text that is no UUID; UnsupportedError
        for a device that is no physical function with SR-IOV; IoctlError.
        Source: VFIO_DEVICE_FEATURE_PCI_VF_TOKEN.
        """
        self.feature(ioctls.VFIO_DEVICE_FEATURE_PCI_VF_TOKEN).set(pci.parse_vf_token(token).bytes)

    def enter_low_power(self, *, wakeup_fd: int | None = None) -> None:
        """Let the kernel suspend the device, to D3hot or D3cold if the machine can, until `exit_low_power`.

        The windows of register accesses are dropped first, and mappings of `Region.mmap` are closed. In low power, an
        access to registers or configuration space is a system call: the kernel resumes the device and suspends the
        device again. The device may lose state meanwhile.

        `wakeup_fd`: an eventfd that the kernel signals when the device resumes. With an eventfd, any access resumes the
        device for good, also an access of this program. Call `exit_low_power` in this case too.

        Raises TypeError, and ValueError for a `wakeup_fd` that is closed or no eventfd, before any change. Raises
        BufferError, with no change, while a view of a mapping lives. Raises HandOverError while the device is handed
        over; UnsupportedError (before Linux 6.1); IoctlError (EINVAL: in low power already).
        Source: VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY, `vfio_pci_core_pm_entry`.
        """
        enter_low_power(self, wakeup_fd)

    def exit_low_power(self) -> None:
        """Resume the device, and keep the kernel from suspending the device. Does nothing outside low power.

        Raises IoctlError (EIO: the device does not resume).
        Source: VFIO_DEVICE_FEATURE_LOW_POWER_EXIT.
        """
        self.feature(ioctls.VFIO_DEVICE_FEATURE_LOW_POWER_EXIT).set()

    def low_power(self, *, wakeup_fd: int | None = None) -> LowPower:
        """Return a context manager: `enter_low_power`, and `exit_low_power` at the end of the `with` block."""
        return LowPower(self, wakeup_fd)

    @making(drop_dma_buf)
    def dma_buf(self, region: Region, ranges: Iterable[tuple[int, int]] | None = None) -> DmaBuf:
        """Make a DMA-buf of a BAR, or of the parts `ranges`: pairs of offset and size, in bytes and whole pages.

        Raises TypeError; ValueError for a region of another device or that is no BAR, and for parts outside the BAR;
        UnsupportedError (before Linux 6.19); IoctlError (ENODEV, EINVAL: the BAR is not memory).
        Source: VFIO_DEVICE_FEATURE_DMA_BUF, `vfio_pci_core_feature_dma_buf`.
        """
        self.check_usable()
        if not isinstance(region, Region):
            raise TypeError(f"region must be a Region, not {type(region).__name__}")
        bar = region.info.index
        if self._regions.get(bar) is not region or bar > ioctls.VFIO_PCI_BAR5_REGION_INDEX:
            raise ValueError(f"{region!r} is no BAR of {self.bdf}")
        return DmaBuf(self, bar, checked_ranges(ranges, region.size, f"BAR {bar} of {self.bdf}"))

    def irq(self, index: int) -> Irq:
        """Return a kind of interrupt by index (VFIO_PCI_MSI_IRQ_INDEX …).

        Raises ValueError for an index that the device does not have, IoctlError (EINVAL: the error interrupt of a
        conventional device).
        """
        index = as_number(index, "index")
        if index not in self._irqs:
            if not 0 <= index < self.info.num_irqs:
                raise ValueError(f"{self.bdf} has kinds of interrupt 0 to {self.info.num_irqs - 1}, not {index}")
            question = ioctls.vfio_irq_info(index=index)
            answer = self._ask("VFIO_DEVICE_GET_IRQ_INFO", bytearray(question), index=index)
            self._irqs.setdefault(index, Irq(self, parse_irq_info(answer)))
        return self._irqs[index]

    @property
    def irqs(self) -> tuple[Irq, ...]:
        """The kinds of interrupt that `irq` has returned so far. No other kind is enabled."""
        return tuple(self._irqs.values())

    def describe_irqs(self) -> str:
        """Return the number of INTx, MSI and MSI-X vectors, in words."""
        kinds = (ioctls.VFIO_PCI_INTX_IRQ_INDEX, ioctls.VFIO_PCI_MSI_IRQ_INDEX, ioctls.VFIO_PCI_MSIX_IRQ_INDEX)
        return ", ".join(
            f"{self.irq(kind).count} {name}" for kind, name in zip(kinds, ("INTx", "MSI", "MSI-X"), strict=True)
        )

    @property
    def bus_master(self) -> bool:
        """Whether the device may do DMA (PCI COMMAND, bit 2). Off after the device is opened: set this to use DMA."""
        return bool(self.config.read_command() & PCI_COMMAND_MASTER)

    @bus_master.setter
    def bus_master(self, on: bool) -> None:
        self.config.change16(PCI_COMMAND, PCI_COMMAND_MASTER, on=as_switch(on, "bus_master"))  # "off" would be true

    @property
    def memory_enabled(self) -> bool:
        """Whether the memory BARs of the device answer (PCI COMMAND, bit 1). Otherwise a mapped BAR is SIGBUS.

        Setting False closes the mappings of the BARs. While a view of a mapping lives, BufferError is raised, and
        nothing has changed. `config.change16(PCI_COMMAND, PCI_COMMAND_MEMORY, on=False, force=True)` clears the bit
        despite a view.
        """
        return bool(self.config.read_command() & PCI_COMMAND_MEMORY)

    @memory_enabled.setter
    def memory_enabled(self, on: bool) -> None:
        self.config.change16(PCI_COMMAND, PCI_COMMAND_MEMORY, on=as_switch(on, "memory_enabled"))

    @property
    def can_reset(self) -> bool:
        """Whether the device itself can be reset (VFIO_DEVICE_RESET)."""
        return bool(self.info.flags & ioctls.VFIO_DEVICE_FLAGS_RESET)

    @uninterrupted()
    def reset(self) -> None:
        """Reset the device: DMA stops, and registers return to the reset state.

        Configuration space and DMA mappings stay. Enabled interrupts stay enabled, and bus mastering stays on. Before
        the reset, mappings of the BARs for DMA of other devices are closed, and the windows of register accesses are
        dropped. The next register access waits for the end of the reset, and maps a new window. Mappings of
        `Region.mmap` stay.

        Raises UnsupportedError if the device has no reset. The error names `hot_reset` if the bus of the device can be
        reset.
        Source: VFIO_DEVICE_RESET.
        """
        self.check_usable()
        if not self.can_reset:
            raise UnsupportedError(f"{self.bdf} has no reset of its own", hint=self._instead_of_reset())
        self.windows.change(partial(self.ioctl, "VFIO_DEVICE_RESET"), keep="all maps")

    def _instead_of_reset(self) -> str:
        hint = "Clear bus_master to stop DMA"
        try:
            others = [each.bdf for each in self.get_pci_hot_reset_info() if each.bdf != self.bdf]
        except VfioError:
            return hint
        return f"{hint}, or use hot_reset(), which resets the bus" + f" with {', '.join(others)}" * bool(others)

    def get_pci_hot_reset_info(self) -> tuple[DependentDevice, ...]:
        """Return all devices that a reset of the slot or bus reaches, including this one.

        Raises UnsupportedError if neither slot nor bus can be reset (a device on the root bus).
        Source: VFIO_DEVICE_GET_PCI_HOT_RESET_INFO.
        """
        return hot_reset.get_info(self)

    @property
    def hot_reset_groups(self) -> tuple[int, ...]:
        """The numbers of the IOMMU groups, ascending, that `hot_reset` needs in the container or the iommufd.

        Raises as `get_pci_hot_reset_info`. Cost: two ioctls.
        """
        return hot_reset.groups_of(self.get_pci_hot_reset_info())

    @uninterrupted()
    def hot_reset(self) -> None:
        """Reset the slot or bus of the device, and so all devices of `get_pci_hot_reset_info`.

        All these devices must be bound to vfio-pci, with their groups in the container of this device, or bound to the
        iommufd of this device. Before the reset, for each Device that is open there:

        * bus mastering is cleared,
        * register windows and mappings of `Region.mmap` are dropped,
        * mappings of the BARs for DMA of other devices are closed.

        After the reset, registers are as after power-on, and bus mastering is off. Memory decoding, BAR addresses,
        enabled interrupts and DMA mappings are as before.

        Raises UnsupportedError (a device on a root bus), VfioError with the missing groups and devices, and BufferError
        while a view of a mapped region lives; nothing has changed then. Raises IoctlError if the kernel refuses, or the
        bus does not recover; bus mastering is then as before.

        Synchronization: waits for the lock of the container. Register accesses of other threads wait meanwhile.
        Cost: the kernel takes 10 ms to 1 s.
        Source: VFIO_DEVICE_PCI_HOT_RESET, `vfio_pci_ioctl_pci_hot_reset`.
        """
        self.check_usable()
        while not hot_reset.attempt_reset(self):
            pass  # another thread has mapped a BAR or opened a device meanwhile

    def open_neighbours(self) -> list[Device]:
        """Return the open devices that share the lock of this device, with this device. For the library."""
        return [each for each in self.attachment.neighbours() if isinstance(each, Device)]

    @property
    def has_dependents(self) -> bool:
        """Whether DMA of another device reaches a region of this device through a mapping."""
        return any(region.has_dependents for region in self.all_regions())

    def close_dependents(self) -> None:
        """Close dependents as `Handle.close_dependents`.

        Raises BufferError, before anything is closed, while a view of a mapped region lives. Raises the errors of the
        closes.
        """
        if not self.closed:
            self.check_views()
            attempt_all(f"unmapping the BARs of {self.bdf}", [region.close_dependents for region in self.all_regions()])
        if (space := self.opened_with) is not None:  # closed too, with the other devices there
            for device in devices_of(space):
                if device is not self:
                    attempt(device.close_dependents, [])

    @closing_after_dependents
    def close(self) -> None:
        """Close the device: stop interrupts and DMA, reset, unmap regions, and close the descriptor.

        The group and the address space are closed too, if `open_device` opened them for this device. Twice is fine;
        does nothing in a forked child. Raises BufferError while a view of a mapped region lives; nothing is closed
        then. The same holds if a BAR cannot be unmapped from another device. Otherwise raises the errors of the steps,
        after all steps were tried.
        """
        steps: list[Callable[[], object]] = []
        if not self.closed:
            self._check_no_dependents()
            steps += [irq.close for irq in tuple(self._irqs.values())]
            # No access may be in progress when the mappings are closed, so a device without a reset loses bus
            # mastering.
            steps += [self._stop_dma, *([self._last_reset] if self.can_reset else [])]
            steps += self._drops()
            steps += [partial(self.attachment.note_closing, self), self.close_fd]
            steps.append(partial(self.attachment.note_closed, self))
        if (space := self.opened_with) is not None and not space.closed:
            steps += [partial(close_now, space)]
        attempt_all(f"closing device {self.bdf}", steps)

    def end_dependents(self) -> bool:
        """End dependents as `Handle.end_dependents`. From then on the device is being closed.

        Raises BufferError while a view of a mapped region lives, HandOverError.
        """
        if self.closed or self.windows.ended:
            return True
        self.owner.check_here()
        self.check_views()
        return self.windows.end()

    def _drops(self) -> list[Callable[[], object]]:
        """Return the steps that unmap the regions from this process, after all unmaps from other devices."""
        return [partial(region.drop, keep="no maps") for region in self.all_regions()]

    def _check_no_dependents(self) -> None:
        if not self.end_dependents():
            raise VfioError(
                f"{self.bdf} cannot be closed: a BAR of {self.bdf} is mapped for the DMA of another device",
                hint="Close the mapping that map_region returned; if that fails, the error says why",
            )

    def _stop_dma(self) -> None:
        with suppress(DeviceGoneError):  # a device that is gone does no DMA
            self.bus_master = False

    def _last_reset(self) -> None:
        gone = False
        try:
            self.check_present()
        except DeviceGoneError:
            gone = True  # a reset would take seconds in the kernel, and fail
        finally:
            if not gone:
                self._reset_unless_removed()

    def _reset_unless_removed(self) -> None:
        try:
            self.reset()
        except IoctlError as error:
            # Another task holds the device: a removal waits for this close, and then the kernel resets the device.
            if error.errno != errno.EAGAIN:
                raise

    def check_views(self) -> None:
        """Raise BufferError while a view of a mapped region lives."""
        for region in tuple(self._regions.values()):
            region.check_views()

    def forget(self) -> None:
        """Close the objects of this process for a device that another process holds. For the library.

        No call reaches the device.
        """
        if self.closed:
            return
        steps: list[Callable[[], object]] = [irq.forget for irq in tuple(self._irqs.values())]
        steps += [self.windows.end, *self._drops(), self.close_fd]
        attempt_all(f"forgetting device {self.bdf}", steps)


def _nothing() -> None:
    """Change nothing."""
