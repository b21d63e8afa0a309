"""`FakeKernel`: what tests see of it and arrange, and calls on descriptors, sent to the object behind each."""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from pyvfio import ioctls
from pyvfio.guard import uninterrupted
from pyvfio.kernel import IoctlArgument, Memlock, Registers
from pyvfio.testing.fake.declaration import GroupDeclaration, check_groups, default_groups
from pyvfio.testing.fake.descriptors import Descriptors
from pyvfio.testing.fake.device import FakeDevice, PciDevice
from pyvfio.testing.fake.dma import DeviceSlot, DmaFault, DmaPath
from pyvfio.testing.fake.feature import makes_descriptor
from pyvfio.testing.fake.group import Container, DeviceHandle, Group, Handler, device_behind
from pyvfio.testing.fake.iommu import IommuModel, iommu_model
from pyvfio.testing.fake.memory import MemoryCalls
from pyvfio.testing.fake.pci_device import FakePciDevice
from pyvfio.testing.fake.pins import Mapped, Pins, Violation
from pyvfio.testing.fake.process import AddressArgument, BufferArgument, FileAreas, refuse
from pyvfio.testing.fake.record import KEPT, Failure, Record
from pyvfio.testing.fake.tree import Tree
from pyvfio.testing.fake.unmodelled import unmodelled_part
from pyvfio.testing.fake.versions import KernelVersion, kernel_version

_GET_DEVICE_FD = ioctls.VFIO_GROUP_GET_DEVICE_FD


class FakeKernel(MemoryCalls):
    """A kernel with VFIO and an IOMMU, for tests on a machine that has none.

    It answers VFIO's system calls as Linux `version` ("6.1", "6.12" or "7.3") does, in the kernel's order of checks;
    calls on process memory are the real ones. `iommu` is "intel" (39 bits), "intel48", "amd", "virtio" or an
    `IommuModel`. `groups` are (number, devices) pairs; without it groups 2 and 3 with an edu each, 0000:00:02.0 and
    0000:00:03.0, bound to vfio-pci. ValueError when they cannot be.

    Descriptors are real, so that a leak shows in /proc/self/fd; one that is closed past the seam (os.close) is noticed
    at the next call, and whatever has its number by then is neither answered for nor closed. `shutdown`, also as a
    context manager's end, closes what is open and removes `sysfs` and `dev`. In a forked child, closing a descriptor
    closes it there and nothing else; other VFIO calls are a RuntimeError, for the fake's state is the parent's.

    Synchronization: one lock; any thread may call anything, and callbacks of devices may call back. As in a kernel, no
    signal handler and no finalizer runs in the middle of a call: it would wait for locks of a thread that waits here.
    """

    def __init__(
        self,
        version: str = "6.12",
        *,
        iommu: IommuModel | str = "intel",
        groups: Sequence[GroupDeclaration] | None = None,
    ) -> None:
        declared = default_groups() if groups is None else list(groups)
        check_groups(declared)
        if not isinstance(iommu, str | IommuModel):
            raise ValueError(f"iommu is intel, intel48, amd, virtio or an IommuModel, not {iommu!r}")  # noqa: TRY004
        self._version = kernel_version(version)
        self._model = iommu_model(iommu, self._version) if isinstance(iommu, str) else iommu
        lock, record = threading.RLock(), Record()
        super().__init__(
            lock=lock,
            descriptors=Descriptors(lock),
            pins=Pins(file_areas=FileAreas() if self._version.refuses_tracked_files else None),
            record=record,
        )
        self._dma = DmaPath(self._pins.violations)
        self._groups = {number: self._group(number, devices) for number, devices in declared}
        self._tree: Tree | None = None
        self._finalizer = weakref.finalize(self, _finalize, self._descriptors, self._pins)
        self.trace = record.trace
        """Each call on the seam, in their order, with what it returned."""
        self.unmodelled = record.unmodelled
        """What was asked for that the fake only seems to do, or does not have: once each, with a warning in the log."""

    def _group(self, number: int, devices: Sequence[FakeDevice | FakePciDevice]) -> Group:
        declared = [device.declaration if isinstance(device, FakePciDevice) else device for device in devices]
        # A weak reference: the group must not keep the kernel, or the finalizer would wait for the garbage collector.
        group = Group(
            number, [PciDevice(device, self._version, self._lock) for device in declared], weakref.proxy(self)
        )
        for device, live in zip(devices, group.devices, strict=True):
            live.on_bars_gone = self._pins.bars_gone
            self._dma.devices[live.bdf] = live
            if isinstance(device, FakePciDevice):
                device._plug(DeviceSlot(self._dma, group, live, self._lock))
        return group

    def __repr__(self) -> str:
        devices = sum(len(group.devices) for group in self._groups.values())
        mapped = [mapping.size for mapping in self.mappings()]
        return (
            f"<{type(self).__name__} {self._version.name}: {devices} devices, "
            f"{len(self.descriptors)} descriptors, {len(mapped)} mappings of {sum(mapped):#x} bytes>"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    @uninterrupted()
    def shutdown(self) -> None:
        """Close every VFIO descriptor that is left and remove `sysfs` and `dev`. Twice is fine; nothing in a child.

        Whoever still holds one of them may close it once: nothing happens then. Any other use is a RuntimeError, but
        for calls on memory and on descriptors that are not VFIO's.
        """
        if self._descriptors.in_child:
            return
        with self._lock:
            self._descriptors.shut_down()
            self._pins.close()
            if self._tree is not None:
                self._tree.remove()
                self._tree = None

    # --------------------------------------------------------------------------------- what tests see and arrange

    @property
    def version(self) -> KernelVersion:
        """Which kernel this is."""
        return self._version

    @property
    def iommu(self) -> IommuModel:
        """The IOMMU in front of every device."""
        return self._model

    @property
    def bdfs(self) -> tuple[str, ...]:
        """The PCI addresses of all devices, in the order of their declaration."""
        return tuple(device.bdf for group in self._groups.values() for device in group.devices)

    @property
    def memlock_limit(self) -> int | None:
        """RLIMIT_MEMLOCK in bytes (None: unlimited, as it is at first); may be set at any time."""
        return self._pins.limit

    @memlock_limit.setter
    def memlock_limit(self, limit: int | None) -> None:
        self._descriptors.check_usable()
        if limit is not None and (not isinstance(limit, int) or limit < 0):
            raise ValueError(f"memlock_limit is a number of bytes or None, not {limit!r}")
        self._pins.limit = limit

    @property
    def privileged(self) -> bool:
        """CAP_IPC_LOCK, which lifts the limit; may be set at any time, False at first."""
        return self._pins.privileged

    @privileged.setter
    def privileged(self, privileged: bool) -> None:
        self._pins.privileged = privileged

    @property
    def dma_entry_limit(self) -> int:
        """How many mappings a container holds whose IOMMU is set from now on; may be set at any time."""
        return self._model.dma_entry_limit

    @dma_entry_limit.setter
    def dma_entry_limit(self, limit: int) -> None:
        self._model = replace(self._model, dma_entry_limit=limit)

    @property
    def violations(self) -> list[Violation]:
        """Each time that memory went away while a device could reach it."""
        return self._pins.violations

    @property
    def faults(self) -> list[DmaFault]:
        """Each access of a device that was stopped: by the IOMMU, or because bus mastering was off."""
        return self._dma.faults

    @property
    def on_fault(self) -> Callable[[DmaFault], object] | None:
        """Called with each fault when it happens, with the fake's lock held; may be set at any time, None at first."""
        return self._dma.on_fault

    @on_fault.setter
    def on_fault(self, callback: Callable[[DmaFault], object] | None) -> None:
        self._dma.on_fault = callback

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The VFIO descriptors that are open."""
        return tuple(self._descriptors.files)

    @uninterrupted()
    def check(self) -> None:
        """AssertionError when memory went away under a mapping, through the seam or so that it shows: each live mapping
        is looked at. And when the fake itself is not in order. O(n) of the mappings; reads /proc/self/maps."""
        with self._lock:
            self._check_state()
            self._pins.look_at_all()
        if self.violations:
            raise AssertionError("; ".join(map(str, self.violations)))

    def _check_state(self) -> None:
        containers = {handler for handler in self._descriptors.files.values() if isinstance(handler, Container)}
        containers |= {group.container for group in self._groups.values() if group.container is not None}
        tables = [container.iommu for container in containers if container.iommu is not None]
        for container in containers:
            assert container.groups or container.iommu is None, "an IOMMU without a group"
            assert all(group.container is container for group in container.groups)
        for iommu in tables:
            iommu._check()
        self._pins._check([entry for iommu in tables for entry in iommu.visible()], sum(i.charged() for i in tables))
        for group in self._groups.values():
            assert group.container is None or group in group.container.groups
            assert group.fd is None or self._descriptors.files.get(group.fd) is group
            for device in group.devices:
                assert all(isinstance(self._descriptors.files.get(fd), DeviceHandle) for fd in device.descriptors)

    @property
    def planned_failures(self) -> tuple[str, ...]:
        """What `fail` was asked for and has not happened yet, in words."""
        return tuple(map(str, self._record.failures))

    def clear_trace(self) -> None:
        """Forget the calls so far."""
        self.trace.clear()

    def fail(
        self,
        *,
        call: str | None = None,
        errno: int,
        request: int | str | None = None,
        nth: int = 1,
        after: bool = False,
    ) -> None:
        """Let a call fail with `errno`: the `nth` from now that matches, before (or `after`) it took effect.

        A descriptor or a register window that was made is closed when the call fails after it; close always closes.

        `call` is a method of `Kernel`, None any of them; `request` limits an ioctl to a number or, as numbers repeat
        between containers and devices, to a name in C. ValueError for what cannot match. `planned_failures` has what
        has not happened, `clear_failures` forgets it.
        """
        self._record.failures.plan(Failure(call, request, nth, errno, after))

    def clear_failures(self) -> None:
        """Let nothing fail any more."""
        self._record.failures.clear()

    @uninterrupted()
    def bind(self, bdf: str, driver: str | None) -> None:
        """Give a device to another driver (None: to none), in sysfs too; ValueError when there is no such device.

        While its group is in use a kernel driver's probe fails and the device stays without one, as in
        `iommu_device_use_default_domain`.
        """
        self._descriptors.check_usable()
        group, device = self._find(bdf)
        with self._lock:
            device.driver = driver
            device.renew_vf_token()
            if group.container is not None and not group.viable:
                device.driver = None
            if self._tree is not None:
                self._tree.bind(group, device)

    @uninterrupted()
    def pull_out(self, bdf: str) -> None:
        """Surprise removal: a device goes while it may be open; ValueError when there is no such device.

        Its BARs and most of its configuration space read all ones, writes are lost, and the device does no DMA and
        raises no interrupt. The kernel answers for the vendor, the BARs and the capability list, and sysfs shows the
        device, as where no hotplug driver notices.
        """
        self._descriptors.check_usable()
        with self._lock:
            self._find(bdf)[1].pull_out()

    @uninterrupted()
    def ask_for(self, bdf: str) -> None:
        """The kernel wants a device back, as when it is removed or unbound: VFIO_PCI_REQ_IRQ_INDEX is signalled.
        ValueError when there is no such device."""
        self._descriptors.check_usable()
        with self._lock:
            self._find(bdf)[1].irqs.request()

    @uninterrupted()
    def mappings(self, bdf: str | None = None) -> tuple[Mapped, ...]:
        """What devices can reach, by IOVA: all containers, or what `bdf` can; ValueError when it does not exist."""
        groups = list(self._groups.values()) if bdf is None else [self._find(bdf)[0]]
        with self._lock:
            tables = {id(g.container): g.container.iommu.table for g in groups if g.container and g.container.iommu}
            return tuple(sorted(entry for table in tables.values() for entry in table))

    @uninterrupted()
    def interrupt(self, bdf: str, vector: int = 0) -> None:
        """The device raises an interrupt: what is enabled of INTx, MSI and MSI-X signals its eventfd. ValueError for a
        vector that the device does not have."""
        self._descriptors.check_usable()
        with self._lock:
            device = self._find(bdf)[1]
            device.check_vector(vector)
            if not device.gone:
                device.irqs.raise_interrupt(vector)

    @uninterrupted()
    def dma_read(self, bdf: str, iova: int, size: int) -> bytes:
        """A device reads memory, whatever its bus master bit says (that of a `FakePciDevice` counts for what it does
        itself); DmaFault where the IOMMU stops it, AssertionError where the memory is gone."""
        self._descriptors.check_usable()
        with self._lock:
            return self._dma.read(*self._find(bdf), iova=iova, size=size)

    @uninterrupted()
    def dma_write(self, bdf: str, iova: int, data: bytes) -> None:
        """The device writes memory; as `dma_read`. What comes before the stopped byte has been written."""
        self._descriptors.check_usable()
        with self._lock:
            self._dma.write(*self._find(bdf), iova=iova, data=data)

    def _find(self, bdf: str) -> tuple[Group, PciDevice]:
        for group in self._groups.values():
            for device in group.devices:
                if device.bdf == bdf:
                    return group, device
        raise ValueError(f"the fake kernel has no device {bdf}")

    # -------------------------------------------------------------------------------- what groups need of the kernel

    def container(self, fd: int) -> Container | None:
        """The container behind a descriptor, None when it is another file; EBADF when it is not open."""
        handler = self._descriptors.find(fd)
        if handler is None:
            _check_open(fd)
        return handler if isinstance(handler, Container) else None

    def group_number(self, fd: int) -> int | None:
        """The number of the group behind a descriptor, None when it is another file; EBADF when it is not open."""
        handler = self._descriptors.find(fd)
        if handler is None:
            _check_open(fd)
        return handler.number if isinstance(handler, Group) else None

    def on_bus_of(self, bdf: str) -> list[tuple[int, PciDevice]]:
        """The devices on the bus of one, itself too, by address, with the numbers of their groups."""
        bus = bdf.rpartition(":")[0]
        devices = [(group.number, device) for group in self._groups.values() for device in group.devices]
        return sorted((each for each in devices if each[1].bdf.rpartition(":")[0] == bus), key=lambda each: each[1].bdf)

    def device_at(self, bdf: str) -> PciDevice | None:
        """The device at that address, if there is one."""
        return next((each for group in self._groups.values() for each in group.devices if each.bdf == bdf), None)

    def virtual_functions(self, bdf: str) -> list[PciDevice]:
        """Those of a physical function."""
        return [each for group in self._groups.values() for each in group.devices if each.declared.pf == bdf]

    def adopt(self, fd: int, handler: Handler) -> None:
        """From now on `handler` answers for `fd`."""
        self._descriptors.adopt(fd, handler)

    # ------------------------------------------------------------------------------------------------ descriptors

    def _directories(self) -> Tree:
        self._descriptors.check_usable()
        if self._tree is None:
            self._tree = Tree(tuple(self._groups.values()), self._model)
        return self._tree

    @property
    @uninterrupted()
    def sysfs(self) -> Path:
        """Its sysfs: a directory."""
        with self._lock:
            return self._directories().sys

    @property
    @uninterrupted()
    def dev(self) -> Path:
        """Its /dev: a directory."""
        with self._lock:
            return self._directories().dev

    @property
    def proc(self) -> Path:
        """The machine's own: this process is on it."""
        return self._linux.proc

    @uninterrupted()
    def open(self, path: str, flags: int) -> int:
        """A container, a group (EBUSY, `vfio_group_fops_open`), or any other file."""
        self._descriptors.check_usable()
        with self._lock:
            return self._record.observed(
                "open", (path, flags), lambda: self._open(path, flags), undo=self._descriptors.close
            )

    def _open(self, path: str, flags: int) -> int:
        self._descriptors.sweep()  # a group whose descriptor is gone is not busy
        fd = self._linux.open(path, flags)
        self._descriptors.given_out(fd)
        node = Path(path)
        if node.parent != self.dev / "vfio":
            return fd
        if node.name == "vfio":
            self._descriptors.adopt(fd, Container(version=self._version, machine=weakref.proxy(self), pins=self._pins))
        elif node.name.isdecimal() and int(node.name) in self._groups:
            self._open_group(self._groups[int(node.name)], fd)
        return fd

    def _open_group(self, group: Group, fd: int) -> None:
        if group.busy:
            os.close(fd)
            refuse(errno.EBUSY)
        group.fd = fd
        self._descriptors.adopt(fd, group)

    @uninterrupted()
    def close(self, fd: int | None = None) -> None:
        """Close a descriptor: of a group and a device, also what hangs on it. It is closed also when the call is made
        to fail, as on Linux. Without a descriptor, `shutdown`."""
        if fd is None:
            self.shutdown()
        elif self._descriptors.in_child:
            os.close(fd)
        else:
            with self._lock:
                if not self._descriptors.is_closed_already(fd):
                    self._record.observed("close", (fd,), lambda: self._descriptors.close(fd), always=True)

    @uninterrupted()
    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
        """Answered by what is behind `fd`; a descriptor that is not VFIO's goes to the running kernel."""
        handler = self._descriptors.find(fd)
        if handler is None:
            return self._linux.ioctl(fd, request, argument)
        if not isinstance(handler, Container):  # these look at other descriptors, and duplicate them
            with self._lock:
                self._descriptors.sweep()
        number = request & 0xFFFF_FFFF  # the kernel's cmd is an unsigned int
        if isinstance(argument, int):
            given: int | bytes = argument
            seen: AddressArgument | BufferArgument = AddressArgument(argument)
        else:
            seen = BufferArgument(argument)
            given = seen.read(min(seen.size, KEPT))
        with self._lock:
            name = handler.request_name(number)
            self._record.warn(unmodelled_part(self._version, name, given))
            undo = self._undo_of(handler, number, given)
            answer = self._record.observed(
                "ioctl",
                (fd, request, given),
                lambda: handler.ioctl(number, seen),
                number=number,
                request=name,
                undo=undo,
            )
            if undo is not None:
                self._given_out(answer)
            return answer

    def _given_out(self, fd: int) -> None:
        if fd not in self._descriptors.files:
            self._descriptors.given_out(fd)

    def _undo_of(self, handler: Handler, number: int, given: int | bytes) -> Callable[[int], object] | None:
        """What closes the descriptor that an ioctl has made; None where it has made none."""
        if isinstance(handler, Group) and number == _GET_DEVICE_FD:
            return self._descriptors.close
        return os.close if makes_descriptor(handler.request_name(number), given) else None

    @uninterrupted()
    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """Registers and configuration space of a device; EINVAL on containers and groups."""
        handler = self._descriptors.find(fd)
        if handler is None:
            return self._linux.pread(fd, size, offset)
        with self._lock:
            return self._record.observed(
                "pread", (fd, size, offset), lambda: device_behind(handler).pread(fd, size, offset)
            )

    @uninterrupted()
    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """As `pread`."""
        handler = self._descriptors.find(fd)
        if handler is None:
            return self._linux.pwrite(fd, data, offset)
        with self._lock:
            return self._record.observed(
                "pwrite", (fd, data, offset), lambda: device_behind(handler).pwrite(fd, data, offset)
            )

    @uninterrupted()
    def registers(self, fd: int, offset: int, size: int) -> Registers:
        """A BAR: its callbacks, or plain memory; EINVAL where it cannot be mapped."""
        handler = self._descriptors.find(fd)
        if handler is None:
            return self._linux.registers(fd, offset, size)
        with self._lock:
            return self._record.observed(
                "registers",
                (fd, offset, size),
                lambda: self._map_registers(device_behind(handler), fd, offset, size),
                undo=lambda window: window.close(),
            )

    def _map_registers(self, device: PciDevice, fd: int, offset: int, size: int) -> Registers:
        self._pins.device_memory_is_mapped = True
        return device.registers(self._linux, fd, offset, size, lock=self._lock)

    @uninterrupted()
    def eventfd(self, initial: int, flags: int) -> int:
        """A real one."""
        with self._lock:
            fd = self._record.observed(
                "eventfd", (initial, flags), lambda: self._linux.eventfd(initial, flags), undo=os.close
            )
            self._descriptors.given_out(fd)
            return fd

    def eventfd_read(self, fd: int) -> int:
        """Of a real one; may block."""
        return self._record.observed("eventfd_read", (fd,), lambda: self._linux.eventfd_read(fd))

    def eventfd_write(self, fd: int, value: int) -> None:
        """Of a real one."""
        self._record.observed("eventfd_write", (fd, value), lambda: self._linux.eventfd_write(fd, value))

    def poll(self, fd: int, timeout: float | None, *others: int) -> tuple[int, ...]:
        """The real one; may block."""
        return self._record.observed("poll", (fd, *others), lambda: self._linux.poll(fd, timeout, *others))

    def memlock(self) -> Memlock:
        """The fake's own: `memlock_limit` in whole pages, the sum of live mappings, `privileged`."""
        if self._descriptors.in_child:
            self._descriptors.check_usable()
        answer = Memlock(limit=self._pins.page_limit, used=self._pins.used, privileged=self._pins.privileged)
        return self._record.observed("memlock", (), lambda: answer)


def _check_open(fd: int) -> None:
    try:
        os.fstat(fd)
    except (OSError, OverflowError):
        refuse(errno.EBADF)


def _finalize(descriptors: Descriptors, pins: Pins) -> None:
    if descriptors.in_child:
        return
    pins.close()
    descriptors.finalize()
