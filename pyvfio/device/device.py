"""An open VFIO PCI device: what it has, whether it may do DMA, how it is reset and closed.

Source: drivers/vfio/pci/vfio_pci_core.c.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from operator import index as as_number
from uuid import UUID

from pyvfio import ioctls, pci
from pyvfio.container import Container, Group, check_kind
from pyvfio.device import hot_reset
from pyvfio.device.capabilities import Capabilities, read_capabilities
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
from pyvfio.errors import ClosedError, DeviceGoneError, IoctlError, UnsupportedError, VfioError
from pyvfio.guard import (
    Guard,
    close_now,
    closing_after_dependents,
    constructing,
    guarded,
    holding,
    making,
    uninterrupted,
)
from pyvfio.handle import Handle, attempt, attempt_all, checked_fd, give_up_fd
from pyvfio.info import DeviceInfo, parse_device_info, parse_irq_info, parse_region_info

_INFO_MAX = 1 << 20


class Device(Handle):
    """An open VFIO PCI device.

    `group` is attached to a container whose IOMMU is set. `vf_token`: as for `open_device`, which does all that comes
    before. Raises IoctlError (ENODEV: not bound to vfio-pci; EACCES: another VF token is wanted); VfioError, also where
    the group has an open Device of that address.

    Synchronization: any thread. Closing waits for the container's lock; registers and interrupts do not.
    """

    @constructing(Handle.close_fd)
    def __init__(self, group: Group, bdf: str, *, vf_token: UUID | str | None = None) -> None:
        bdf = pci.parse_bdf(bdf)
        if not isinstance(group, Group):
            raise TypeError(f"group must be a Group, not {type(group).__name__}")
        _check_not_open(group, bdf)
        self._own(group, bdf, group.get_device_fd(bdf, vf_token=vf_token))
        try:
            self.info = self._get_info()
            self._join()
        except BaseException:
            self.close_fd()
            raise

    def _own(self, group: Group, bdf: str, fd: int) -> None:
        self.bdf = bdf
        self.group = group
        self.opened_with: Container | None = None
        """The container that `open_device` opened for this device alone, and that is closed with it."""
        self._regions: dict[int, Region] = {}
        self.windows = Windows(bdf, self._regions, check_here=group.check_here)
        """The mapped windows of the regions, for a change during which there must be none. For the library."""
        self._irqs: dict[int, Irq] = {}
        what = f"device {bdf}"
        super().__init__(group.kernel, fd, what, guard=Guard(what, lock=group.guard.lock))

    @classmethod
    @uninterrupted(give_up_fd)
    def from_fd(cls, group: Group, bdf: str, fd: int) -> Device:
        """Make a device of a descriptor that is open already: a launcher's with more rights, or a former program's.

        `group` is attached, and `bdf` is the device's address. The descriptor is the object's own from then on, and is
        closed with it; where this raises, it is the caller's as before.

        Raises ValueError where the descriptor is closed or no VFIO device's, TypeError, IoctlError; VfioError where the
        group has an open Device of that address.
        Cost: one ioctl. Source: VFIO_DEVICE_GET_INFO.
        """
        if not isinstance(group, Group):
            raise TypeError(f"group must be a Group, not {type(group).__name__}")
        if group.container is None:
            raise ValueError(f"IOMMU group {group.number} is in no Container: attach() it, or Container.from_fd()")
        bdf, number = pci.parse_bdf(bdf), checked_fd(fd)
        _check_not_open(group, bdf)
        device = cls.__new__(cls)
        device._own(group, bdf, number)
        device.info = check_kind(device, device._get_info, "a VFIO device")
        try:
            device._join()
        except BaseException:
            device.release_fd()
            raise
        return device

    def _join(self) -> None:
        """Enter the device in its group, under the lock: no reset of the bus is under way then."""
        with holding(self.group):
            _check_not_open(self.group, self.bdf)
            self.group.devices.append(self)

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
            kind = ConfigSpace if index == ioctls.VFIO_PCI_CONFIG_REGION_INDEX else Region
            self._regions.setdefault(index, kind(self, parse_region_info(answer)))
        return self._regions[index]

    def all_regions(self) -> tuple[Region, ...]:
        """The regions that were asked for so far."""
        return tuple(self._regions.values())

    @property
    def config(self) -> ConfigSpace:
        """PCI configuration space, as the kernel shows it to users."""
        config = self.region(ioctls.VFIO_PCI_CONFIG_REGION_INDEX)
        if not isinstance(config, ConfigSpace):
            raise TypeError(f"region {config.info.index} is not configuration space")
        return config

    def check_decoding(self, what: str) -> None:
        """Raise VfioError where `what`, a memory BAR, answers no access; DeviceGoneError where the device has gone.

        Cost: two reads of configuration space, and at the first call the capability list.
        """
        if why := self.config.why_silent():
            self.check_present()  # the power state of a device that has just gone reads D3
            raise VfioError(
                f"{self.bdf} {why}, so {what} cannot be reached",
                hint="device.memory_enabled = True; if it stays off, the device may be in a low-power state"
                if "decode" in why
                else "Write 0 to the lowest two bits of its power management control register (PMCSR): D0",
            )

    def check_present(self) -> None:
        """Raise DeviceGoneError where the device seems to have gone. Cost: one read of configuration space."""
        self.config.check_present()

    def drop_windows(self, *, force: bool = False) -> None:
        """Unmap the BARs from this process: the windows of register accesses, and the mappings of `Region.mmap`.

        For a change that pyvfio does not see, after which a touch would be SIGBUS. The next register access maps
        another window, so no other thread may access registers from here to that change.

        Raises BufferError, before anything is unmapped, while a view of a mapping lives; with `force=True` that mapping
        stays. Synchronization: any thread; waits for the lock of the regions.
        """
        self.windows.change(_nothing, keep="maps in use" if force else "no maps")

    @property
    def capabilities(self) -> Capabilities:
        """The PCI capabilities, standard and extended, as a snapshot of this moment.

        Raises CapabilityError for lists that no device can have, DeviceGoneError, IoctlError.
        Cost: two reads of configuration space for each capability, and up to four more for MSI-X and its like.
        """
        self.check_present()
        return read_capabilities(self.config, self.bdf)

    def feature(self, number: int) -> Feature:
        """Return a feature by its number (VFIO_DEVICE_FEATURE_MIGRATION …), to probe, get or set it. No system call.

        Raises TypeError, and ValueError for a number that does not fit 16 bits. Source: VFIO_DEVICE_FEATURE.
        """
        return Feature(self, checked_number(number))

    def set_vf_token(self, token: UUID | str) -> None:
        """Set the token without which no virtual function of this device is opened: see `open_device`.

        Virtual functions that are open stay open. Raises TypeError, and ValueError for text that is no UUID;
        UnsupportedError for a device that is no physical function with SR-IOV; IoctlError.
        Source: VFIO_DEVICE_FEATURE_PCI_VF_TOKEN.
        """
        self.feature(ioctls.VFIO_DEVICE_FEATURE_PCI_VF_TOKEN).set(pci.parse_vf_token(token).bytes)

    def enter_low_power(self, *, wakeup_fd: int | None = None) -> None:
        """Let the kernel suspend the device, to D3hot or D3cold where the machine can, until `exit_low_power`.

        The windows of register accesses are dropped before, and mappings of `Region.mmap` are closed. Meanwhile an
        access of registers or configuration space is a system call, for which the kernel wakes the device and suspends
        it again; the device may lose its state in between.

        `wakeup_fd`: an eventfd, which the kernel signals when the device wakes up. Any access wakes it then, also one
        of this program, and low power is over; call `exit_low_power` all the same.

        Raises TypeError, and ValueError for a `wakeup_fd` that is closed or no eventfd's, before any change.
        Raises BufferError, with nothing changed, while a view of a mapping lives; HandOverError while the device is
        handed over; UnsupportedError (before Linux 6.1), IoctlError (EINVAL: in low power already).
        Source: VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY, `vfio_pci_core_pm_entry`.
        """
        enter_low_power(self, wakeup_fd)

    def exit_low_power(self) -> None:
        """Wake the device, and keep the kernel from suspending it. Does nothing outside of low power.

        Raises IoctlError (EIO: the device does not wake up). Source: VFIO_DEVICE_FEATURE_LOW_POWER_EXIT.
        """
        self.feature(ioctls.VFIO_DEVICE_FEATURE_LOW_POWER_EXIT).set()

    def low_power(self, *, wakeup_fd: int | None = None) -> LowPower:
        """Return a context manager: `enter_low_power`, and `exit_low_power` when the `with` block ends."""
        return LowPower(self, wakeup_fd)

    @making(drop_dma_buf)
    def dma_buf(self, region: Region, ranges: Iterable[tuple[int, int]] | None = None) -> DmaBuf:
        """Make a DMA-buf of a BAR, or of the parts `ranges` of it: offset and size each, in bytes and whole pages.

        Raises TypeError; ValueError for another device's region, one that is no BAR, or parts that it has not;
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

    @property
    def irqs(self) -> tuple[Irq, ...]:
        """The kinds of interrupt that have been asked for with `irq`; no other is enabled."""
        return tuple(self._irqs.values())

    def describe_irqs(self) -> str:
        """How many vectors of each of the three usual kinds there are, in words."""
        kinds = (ioctls.VFIO_PCI_INTX_IRQ_INDEX, ioctls.VFIO_PCI_MSI_IRQ_INDEX, ioctls.VFIO_PCI_MSIX_IRQ_INDEX)
        return ", ".join(
            f"{self.irq(kind).count} {name}" for kind, name in zip(kinds, ("INTx", "MSI", "MSI-X"), strict=True)
        )

    @property
    def bus_master(self) -> bool:
        """Whether the device may do DMA (PCI COMMAND, bit 2). Off when the device is opened; set it to use DMA."""
        return bool(self.config.read_command() & PCI_COMMAND_MASTER)

    @bus_master.setter
    def bus_master(self, on: bool) -> None:
        self.config.change16(PCI_COMMAND, PCI_COMMAND_MASTER, on=on)

    @property
    def memory_enabled(self) -> bool:
        """Whether the device answers in its memory BARs (PCI COMMAND, bit 1). A mapped BAR is SIGBUS if not.

        To clear it closes what is mapped of the BARs; BufferError while a view of a mapping lives, and then nothing has
        changed. `config.change16(PCI_COMMAND, PCI_COMMAND_MEMORY, on=False, force=True)` clears it all the same.
        """
        return bool(self.config.read_command() & PCI_COMMAND_MEMORY)

    @memory_enabled.setter
    def memory_enabled(self, on: bool) -> None:
        self.config.change16(PCI_COMMAND, PCI_COMMAND_MEMORY, on=on)

    @property
    def can_reset(self) -> bool:
        """Whether the device has a reset of its own."""
        return bool(self.info.flags & ioctls.VFIO_DEVICE_FLAGS_RESET)

    @uninterrupted()
    def reset(self) -> None:
        """VFIO_DEVICE_RESET: DMA stops, registers go back; configuration space is kept, and so are DMA mappings.

        Enabled interrupts stay enabled, and bus mastering stays on. Mappings of its BARs for other devices' DMA are
        closed before. The windows of register accesses are dropped before: the next access waits for the end of the
        reset, and maps another one. Mappings of `Region.mmap` stay. Raises UnsupportedError when the device has no
        reset; the error names `hot_reset` where the device's bus can be reset.
        """
        self.check_usable()
        if not self.can_reset:
            raise UnsupportedError(f"{self.bdf} has no reset of its own", hint=self._instead_of_reset())
        self.windows.change(partial(self.ioctl, "VFIO_DEVICE_RESET"), keep="all maps")

    def _instead_of_reset(self) -> str:
        hint = "Clear bus_master to stop its DMA"
        try:
            others = [each.bdf for each in self.get_pci_hot_reset_info() if each.bdf != self.bdf]
        except VfioError:
            return hint
        return f"{hint}, or use hot_reset(), which resets its bus" + f", {', '.join(others)} too" * bool(others)

    @guarded
    def _change_apart(
        self, reached: Sequence[DependentDevice], devices: Sequence[Device], change: Callable[[], object]
    ) -> bool:
        """Make a change during which no other device may reach the BARs of `devices`. Return whether it was made: not
        where another thread has opened or closed one of those that are `reached`."""
        if self._open_devices(reached) != devices:
            return False
        with holding(*(device.windows for device in devices)):
            if any(device.has_dependents for device in devices):
                return False
            change()
            return True

    def get_pci_hot_reset_info(self) -> tuple[DependentDevice, ...]:
        """VFIO_DEVICE_GET_PCI_HOT_RESET_INFO: all devices that a reset of this one's slot or bus reaches, itself too.

        Raises UnsupportedError when neither can be reset (a device on the root bus).
        """
        return hot_reset.get_info(self, self.bdf)

    @property
    def hot_reset_groups(self) -> tuple[int, ...]:
        """The numbers of the IOMMU groups, ascending, that `hot_reset` needs in the device's container.

        Raises as `get_pci_hot_reset_info`. Cost: two ioctls.
        """
        return hot_reset.groups_of(self.get_pci_hot_reset_info())

    @uninterrupted()
    def hot_reset(self) -> None:
        """VFIO_DEVICE_PCI_HOT_RESET: reset the device's slot or bus, and so all devices of `get_pci_hot_reset_info`.

        All of them must be bound to vfio-pci, with their groups in this device's container. Before the reset, of each
        Device that is open there: bus mastering is turned off, register windows and mappings of `Region.mmap` are
        dropped, mappings of its BARs for other devices' DMA are closed. Afterwards registers are as after power-on, and
        bus mastering is off. Memory decoding, BAR addresses, enabled interrupts and DMA mappings are as before.

        Raises UnsupportedError (a device on a root bus), VfioError with the groups and devices that are missing,
        BufferError while a view of a mapped region lives: nothing has changed then. IoctlError: the kernel refuses, or
        the bus did not come back; bus mastering is as before then.

        Synchronization: waits for the container's lock. Register accesses of other threads wait meanwhile.
        Cost: the kernel takes 10 ms to 1 s. Source: `vfio_pci_ioctl_pci_hot_reset`.
        """
        self.check_usable()
        while not self._hot_reset():
            pass  # another thread has mapped a BAR, or opened a device, meanwhile

    def _hot_reset(self) -> bool:
        reached = self.get_pci_hot_reset_info()
        groups = self.container.groups
        hot_reset.check_complete(self.kernel, self.bdf, reached, attached=groups)
        devices = self._open_devices(reached)
        for device in devices:
            device.check_views()
        for device in devices:
            device.close_dependents()
        fds = [groups[number].fd for number in hot_reset.groups_of(reached)]
        return self._change_apart(reached, devices, partial(self._reset_bus, devices, fds))

    def _open_devices(self, reached: Sequence[DependentDevice]) -> list[Device]:
        """The devices that a reset reaches, as far as they are open in this container."""
        bdfs = {each.bdf for each in reached}
        there = [device for group in tuple(self.container.groups.values()) for device in tuple(group.devices)]
        return [device for device in there if isinstance(device, Device) and device.bdf in bdfs]

    def _reset_bus(self, devices: Sequence[Device], group_fds: Sequence[int]) -> None:
        for device in devices:
            device.check_views()
        masters = [device for device in devices if device.bus_master]
        try:
            for device in masters:
                device.bus_master = False  # no transfer may be under way when the bus goes
            for region in [region for device in devices for region in device.all_regions()]:
                region.drop(keep="no maps")
            hot_reset.reset(self, group_fds)
        except BaseException:
            for device in masters:
                attempt(partial(device.config.change16, PCI_COMMAND, PCI_COMMAND_MASTER, on=True), [])
            raise

    @property
    def has_dependents(self) -> bool:
        """Whether another device's DMA reaches a region of it through a mapping."""
        return any(region.has_dependents for region in self.all_regions())

    def close_dependents(self) -> None:
        """As `Handle.close_dependents`. Raises BufferError, before anything is closed, while a view of a mapped region
        lives; and what the closes raise."""
        if not self.closed:
            self.check_views()
            attempt_all(f"unmapping the BARs of {self.bdf}", [region.close_dependents for region in self.all_regions()])
        if (container := self.opened_with) is not None:  # closed with it, and so are other devices
            for device in [each for group in tuple(container.groups.values()) for each in tuple(group.devices)]:
                if device is not self:
                    attempt(device.close_dependents, [])

    @closing_after_dependents
    def close(self) -> None:
        """Stop interrupts and DMA, unmap regions, reset, close; then the group and the container, where `open_device`
        opened them for this device.

        Twice is fine; in a forked child nothing happens. Raises BufferError while a view of a mapped region lives, and
        then nothing has been closed. The same holds where another device cannot be kept from a BAR that is mapped for
        its DMA. Otherwise raises the errors of the steps, after all of them were tried.
        """
        steps: list[Callable[[], object]] = []
        if not self.closed:
            self._check_no_dependents()
            steps += [irq.close for irq in tuple(self._irqs.values())]
            # Nothing may be under way when the mappings go: a device without a reset is kept from the bus.
            steps += [self._stop_dma, *([self._last_reset] if self.can_reset else [])]
            steps += self._drops()
            steps += [self.close_fd, self._leave]
        if (container := self.opened_with) is not None and not container.closed:
            steps += [partial(close_now, container)]
        attempt_all(f"closing device {self.bdf}", steps)

    def end_dependents(self) -> bool:
        """As `Handle.end_dependents`; from then on the device is being closed. Raises BufferError while a view of a
        mapped region lives, HandOverError."""
        if self.closed or self.windows.ended:
            return True
        self.group.check_here()
        self.check_views()
        return self.windows.end()

    def _drops(self) -> list[Callable[[], object]]:
        """The steps that unmap the regions, which no other device reaches any more, from this process."""
        return [partial(region.drop, keep="no maps") for region in self.all_regions()]

    def _check_no_dependents(self) -> None:
        if not self.end_dependents():
            raise VfioError(
                f"{self.bdf} cannot be closed: a BAR of it is mapped for the DMA of another device",
                hint="Close that mapping, which map_region returned; where this fails, the error says why",
            )

    def _stop_dma(self) -> None:
        with suppress(DeviceGoneError):  # it does no DMA any more
            self.bus_master = False

    def _last_reset(self) -> None:
        gone = False
        try:
            self.check_present()
        except DeviceGoneError:
            gone = True  # the reset would take the kernel seconds, and fail
        finally:
            if not gone:
                self._reset_unless_removed()

    def _reset_unless_removed(self) -> None:
        try:
            self.reset()
        except IoctlError as error:
            # Another task holds the device: a removal waits for this close, after which the kernel resets the device.
            if error.errno != errno.EAGAIN:
                raise

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
        steps += [self.windows.end, *self._drops(), self.close_fd]
        attempt_all(f"forgetting device {self.bdf}", steps)


def _check_not_open(group: Group, bdf: str) -> None:
    """Raise VfioError where the group has an open Device of that address: neither would see what the other changes."""
    group.check_here()
    if any(isinstance(device, Device) and device.bdf == bdf for device in tuple(group.devices)):
        raise VfioError(
            f"device {bdf} is open already in IOMMU group {group.number}",
            hint="Use that Device, which group.devices has, or close() it first",
        )


def _nothing() -> None:
    """Change nothing."""
