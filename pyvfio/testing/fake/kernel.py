"""`FakeKernel`: the seam's calls, sent to the object behind the descriptor or to the running kernel."""

from __future__ import annotations

import errno
import logging
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from pyvfio import ioctls
from pyvfio.kernel import FALLOC_FL_KEEP_SIZE, MAP_FIXED, FileStatus, IoctlArgument, LinuxKernel, Memlock, Registers
from pyvfio.testing.fake.device import FakeDevice, PciDevice
from pyvfio.testing.fake.dma import DeviceSlot, DmaFault, DmaPath
from pyvfio.testing.fake.edu import FakeEdu
from pyvfio.testing.fake.group import Container, DeviceHandle, Group, Handler
from pyvfio.testing.fake.iommu import IommuModel, iommu_model
from pyvfio.testing.fake.pci_device import FakePciDevice
from pyvfio.testing.fake.pins import Mapped, Pins, Violation
from pyvfio.testing.fake.process import AddressArgument, BufferArgument, FileAreas, file_areas, refuse
from pyvfio.testing.fake.record import KEPT, Call, Failure, Failures
from pyvfio.testing.fake.tree import Tree
from pyvfio.testing.fake.unmodelled import Unmodelled, unmodelled_part
from pyvfio.testing.fake.versions import KernelVersion, kernel_version
from pyvfio.units import U64_MAX, Vaddr

logger = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")
_MAP_FIXED_NOREPLACE = 0x100000
_MAP_SHARED = 1
_READ_WRITE = 3
_GET_DEVICE_FD = ioctls.VFIO_GROUP_GET_DEVICE_FD
# MADV_NORMAL to _WILLNEED, _DONTFORK to _POPULATE_WRITE, _COLLAPSE: whatever else there is takes pages away.
_HARMLESS = frozenset((0, 1, 2, 3, *range(10, 24), 25))

GroupDeclaration = tuple[int, Sequence[FakeDevice | FakePciDevice]]


def _default_groups() -> list[GroupDeclaration]:
    return [(2, [FakeEdu("0000:00:02.0")]), (3, [FakeEdu("0000:00:03.0")])]


def _check_declaration(declaration: object) -> None:
    if not isinstance(declaration, tuple) or len(declaration) != 2:
        raise ValueError(f"a group is declared as (number, [devices]), not {declaration!r}")
    number, devices = declaration
    if not isinstance(number, int) or number < 0:
        raise ValueError(f"an IOMMU group has a number from 0 on, not {number!r}")
    for device in devices:
        what = f"IOMMU group {number}: {type(device).__name__}"
        if not isinstance(device, FakeDevice | FakePciDevice):
            raise ValueError(f"{what} is neither a FakeDevice nor a FakePciDevice")  # noqa: TRY004 (as other mistakes)
        if not hasattr(device, "bdf"):
            raise ValueError(f"{what} did not call super().__init__(bdf)")


def _check_groups(groups: Sequence[GroupDeclaration]) -> None:
    for declaration in groups:
        _check_declaration(declaration)
    numbers = [number for number, _devices in groups]
    if twice := {number for number in numbers if numbers.count(number) > 1}:
        raise ValueError(f"IOMMU group {min(twice)} is declared twice")
    home: dict[str, int] = {}
    for number, devices in groups:
        if not devices:
            raise ValueError(f"IOMMU group {number} has no device")
        for device in devices:
            if device.bdf in home:
                raise ValueError(f"{device.bdf} is declared twice: in IOMMU groups {home[device.bdf]} and {number}")
            home[device.bdf] = number


class FakeKernel:
    """A kernel with VFIO and an IOMMU, for tests on a machine that has none.

    It answers VFIO's system calls as Linux `version` ("6.1", "6.12" or "7.3") does, in the kernel's order of checks;
    calls on process memory are the real ones. `iommu` is "intel" (39 bits), "intel48", "amd", "virtio" or an
    `IommuModel`. `groups` are (number, devices) pairs; without it groups 2 and 3 with an edu each, 0000:00:02.0 and
    0000:00:03.0, bound to vfio-pci. ValueError when they cannot be.

    Descriptors are real, so that a leak shows in /proc/self/fd; one that is closed past the seam (os.close) is noticed
    at the next call, and whatever has its number by then is neither answered for nor closed. `shutdown`, also as a
    context manager's end, closes what is open and removes `sysfs` and `dev`. In a forked child, closing a descriptor
    closes it there and nothing else; other VFIO calls are a RuntimeError, for the fake's state is the parent's.

    Synchronization: one lock; any thread may call anything, and callbacks of devices may call back.
    """

    def __init__(
        self,
        version: str = "6.12",
        *,
        iommu: IommuModel | str = "intel",
        groups: Sequence[GroupDeclaration] | None = None,
    ) -> None:
        declared = _default_groups() if groups is None else list(groups)
        _check_groups(declared)
        if not isinstance(iommu, str | IommuModel):
            raise ValueError(f"iommu is intel, intel48, amd, virtio or an IommuModel, not {iommu!r}")  # noqa: TRY004
        self._version = kernel_version(version)
        self._model = iommu_model(iommu, self._version) if isinstance(iommu, str) else iommu
        self._owner = os.getpid()
        self._lock = threading.RLock()
        self._linux = LinuxKernel()
        self._pins = Pins(file_areas=FileAreas() if self._version.refuses_tracked_files else None)
        self._failures = Failures()
        self._files: dict[int, Handler] = {}
        self._identities: dict[int, tuple[int, int]] = {}
        self._let_go: set[int] = set()  # numbers that were ours and are not: their owner's close is none
        self._dma = DmaPath(self._pins.violations)
        self._groups = {number: self._group(number, devices) for number, devices in declared}
        self._tree: Tree | None = None
        self._is_shut_down = False
        self._finalizer = weakref.finalize(
            self, _close_all, self._files, self._identities, self._pins.close, self._owner
        )
        self.trace: list[Call] = []
        self.unmodelled: list[Unmodelled] = []
        """What was asked for that the fake only seems to do, or does not have: once each, with a warning in the log."""

    def _group(self, number: int, devices: Sequence[FakeDevice | FakePciDevice]) -> Group:
        declared = [device.declaration if isinstance(device, FakePciDevice) else device for device in devices]
        # A weak reference: the group must not keep the kernel, or the finalizer would wait for the garbage collector.
        group = Group(number, [PciDevice(device, self._version) for device in declared], weakref.proxy(self))
        for device, live in zip(devices, group.devices, strict=True):
            if isinstance(device, FakePciDevice):
                device._plug(DeviceSlot(self._dma, group, live, self._lock))
        return group

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        """Close every VFIO descriptor that is left and remove `sysfs` and `dev`. Twice is fine; nothing in a child.

        Whoever still holds one of them may close it once: nothing happens then. Any other use is a RuntimeError, but
        for calls on memory and on descriptors that are not VFIO's.
        """
        if self._in_child:
            return
        with self._lock:
            self._sweep()
            for fd in list(self._files):
                os.close(fd)
                self._forget(fd)
                self._let_go.add(fd)
            self._pins.close()
            self._is_shut_down = True
            if self._tree is not None:
                self._tree.remove()
                self._tree = None

    def _check_usable(self) -> None:
        if self._in_child:
            raise RuntimeError(f"this fake kernel is in process {self._owner}, and this is a child: make another here")
        if self._is_shut_down:
            raise RuntimeError("this fake kernel was shut down (shutdown, or the end of its `with`): make another")

    @property
    def _in_child(self) -> bool:
        return os.getpid() != self._owner

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
        self._check_usable()
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
        return tuple(self._files)

    def check(self) -> None:
        """AssertionError when memory went away under a mapping, through the seam or so that it shows: each live mapping
        is looked at. And when the fake itself is not in order. O(n) of the mappings; reads /proc/self/maps."""
        with self._lock:
            self._check_state()
            self._pins.look_at_all()
        if self.violations:
            raise AssertionError("; ".join(map(str, self.violations)))

    def _check_state(self) -> None:
        containers = {handler for handler in self._files.values() if isinstance(handler, Container)}
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
            assert group.fd is None or self._files.get(group.fd) is group
            for device in group.devices:
                assert all(isinstance(self._files.get(fd), DeviceHandle) for fd in device.descriptors)

    @property
    def planned_failures(self) -> tuple[str, ...]:
        """What `fail` was asked for and has not happened yet, in words."""
        return tuple(map(str, self._failures))

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
        self._failures.plan(Failure(call, request, nth, errno, after))

    def clear_failures(self) -> None:
        """Let nothing fail any more."""
        self._failures.clear()

    def bind(self, bdf: str, driver: str | None) -> None:
        """Give a device to another driver (None: to none), in sysfs too; ValueError when there is no such device.

        While its group is in use a kernel driver's probe fails and the device stays without one, as in
        `iommu_device_use_default_domain`.
        """
        self._check_usable()
        group, device = self._find(bdf)
        with self._lock:
            device.driver = driver
            if group.container is not None and not group.viable:
                device.driver = None
            if self._tree is not None:
                self._tree.bind(group, device)

    def mappings(self, bdf: str | None = None) -> tuple[Mapped, ...]:
        """What devices can reach, by IOVA: all containers, or what `bdf` can; ValueError when it does not exist."""
        groups = list(self._groups.values()) if bdf is None else [self._find(bdf)[0]]
        with self._lock:
            tables = {id(g.container): g.container.iommu.table for g in groups if g.container and g.container.iommu}
            return tuple(sorted(entry for table in tables.values() for entry in table))

    def interrupt(self, bdf: str, vector: int = 0) -> None:
        """The device raises an interrupt: what is enabled of INTx, MSI and MSI-X signals its eventfd. ValueError for a
        vector that the device does not have."""
        self._check_usable()
        with self._lock:
            device = self._find(bdf)[1]
            device.check_vector(vector)
            device.irqs.raise_interrupt(vector)

    def dma_read(self, bdf: str, iova: int, size: int) -> bytes:
        """A device reads memory, whatever its bus master bit says (that of a `FakePciDevice` counts for what it does
        itself); DmaFault where the IOMMU stops it, AssertionError where the memory is gone."""
        self._check_usable()
        with self._lock:
            return self._dma.read(*self._find(bdf), iova=iova, size=size)

    def dma_write(self, bdf: str, iova: int, data: bytes) -> None:
        """The device writes memory; as `dma_read`. What comes before the stopped byte has been written."""
        self._check_usable()
        with self._lock:
            self._dma.write(*self._find(bdf), iova=iova, data=data)

    def _find(self, bdf: str) -> tuple[Group, PciDevice]:
        for group in self._groups.values():
            for device in group.devices:
                if device.bdf == bdf:
                    return group, device
        raise ValueError(f"the fake kernel has no device {bdf}")

    # ------------------------------------------------------------------------------------- how every call passes

    def _observed(
        self,
        call: str,
        given: tuple[int | str | bytes, ...],
        action: Callable[[], _Answer],
        *,
        number: int = -1,
        request: str = "",
        always: bool = False,
        undo: Callable[[_Answer], object] | None = None,
    ) -> _Answer:
        """`always`: a call that is made to fail takes effect in any case. `undo`: what it has made is lost to a caller
        to whom it fails afterwards, so it goes."""
        failure = self._failures.due(call, number, request) if self._failures else None
        try:
            if failure is not None and not failure.after and not always:
                refuse(failure.errno)
            answer = action()
            if failure is not None:
                if undo is not None:
                    undo(answer)
                refuse(failure.errno)
        except BaseException as error:
            number_or_0 = error.errno or 0 if isinstance(error, OSError) else 0
            self.trace.append(Call(call, request, given, None, number_or_0, "" if number_or_0 else repr(error)))
            raise
        self.trace.append(Call(call, request, given, answer if isinstance(answer, int) else None, 0))
        return answer

    def container(self, fd: int) -> Container | None:
        """The container behind a descriptor, None when it is another file; EBADF when it is not open."""
        handler = self._handler(fd)
        if handler is None:
            _check_open(fd)
        return handler if isinstance(handler, Container) else None

    def group_number(self, fd: int) -> int | None:
        """The number of the group behind a descriptor, None when it is another file; EBADF when it is not open."""
        handler = self._handler(fd)
        if handler is None:
            _check_open(fd)
        return handler.number if isinstance(handler, Group) else None

    def on_bus_of(self, bdf: str) -> list[tuple[int, PciDevice]]:
        """The devices on the bus of one, itself too, by address, with the numbers of their groups."""
        bus = bdf.rpartition(":")[0]
        devices = [(group.number, device) for group in self._groups.values() for device in group.devices]
        return sorted((each for each in devices if each[1].bdf.rpartition(":")[0] == bus), key=lambda each: each[1].bdf)

    def adopt(self, fd: int, handler: Handler) -> None:
        """From now on `handler` answers for `fd`."""
        self._given_out(fd)
        self._files[fd] = handler
        self._identities[fd] = _identity(fd)

    def _given_out(self, fd: int) -> None:
        # The running kernel gave this number out anew, so somebody closed it with os.close: the kernel saw that.
        self._forget(fd)
        self._let_go.discard(fd)

    def _forget(self, fd: int) -> None:
        self._identities.pop(fd, None)
        stale = self._files.pop(fd, None)
        if stale is not None:
            stale.release(fd)

    def _handler(self, fd: int) -> Handler | None:
        handler = self._files.get(fd)
        if handler is None:
            if fd in self._let_go and self._is_shut_down:
                self._check_usable()
            return None
        if self._in_child:
            raise RuntimeError(f"descriptor {fd} is of a fake kernel in process {self._owner}, and this is a child")
        if _is_same_file(fd, self._identities):
            return handler
        with self._lock:
            self._lose(fd)
        return None

    def _lose(self, fd: int) -> None:
        # Somebody has closed it with os.close, and the number may be another file's: not ours to answer for or close.
        logger.warning("descriptor %d was closed past the seam; the fake kernel lets it go", fd)
        self._forget(fd)
        self._let_go.add(fd)

    def _sweep(self) -> None:
        for fd in [fd for fd in self._files if not _is_same_file(fd, self._identities)]:
            self._lose(fd)

    # ------------------------------------------------------------------------------------------------ descriptors

    def _directories(self) -> Tree:
        self._check_usable()
        if self._tree is None:
            self._tree = Tree(tuple(self._groups.values()), self._model)
        return self._tree

    @property
    def sysfs(self) -> Path:
        """Its sysfs: a directory."""
        with self._lock:
            return self._directories().sys

    @property
    def dev(self) -> Path:
        """Its /dev: a directory."""
        with self._lock:
            return self._directories().dev

    def open(self, path: str, flags: int) -> int:
        """A container, a group (EBUSY, `vfio_group_fops_open`), or any other file."""
        self._check_usable()
        with self._lock:
            return self._observed("open", (path, flags), lambda: self._open(path, flags), undo=self._close)

    def _open(self, path: str, flags: int) -> int:
        self._sweep()  # a group whose descriptor is gone is not busy
        fd = self._linux.open(path, flags)
        self._given_out(fd)
        node = Path(path)
        if node.parent != self.dev / "vfio":
            return fd
        if node.name == "vfio":
            self.adopt(fd, Container(version=self._version, machine=weakref.proxy(self), pins=self._pins))
        elif node.name.isdecimal() and int(node.name) in self._groups:
            self._open_group(self._groups[int(node.name)], fd)
        return fd

    def _open_group(self, group: Group, fd: int) -> None:
        if group.busy:
            os.close(fd)
            refuse(errno.EBUSY)
        group.fd = fd
        self.adopt(fd, group)

    def close(self, fd: int) -> None:
        """Close a descriptor: of a group and a device, also what hangs on it. It is closed also when the call is made
        to fail, as on Linux."""
        if self._in_child:
            os.close(fd)
            return
        with self._lock:
            if fd in self._files:
                self._handler(fd)
            if fd in self._let_go:  # it is closed; by now the number may be another file's
                self._let_go.discard(fd)
                return
            self._observed("close", (fd,), lambda: self._close(fd), always=True)

    def _close(self, fd: int) -> None:
        os.close(fd)
        self._forget(fd)

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
        """Answered by what is behind `fd`; a descriptor that is not VFIO's goes to the running kernel."""
        handler = self._handler(fd)
        if handler is None:
            return self._linux.ioctl(fd, request, argument)
        if not isinstance(handler, Container):  # these look at other descriptors, and duplicate them
            with self._lock:
                self._sweep()
        number = request & 0xFFFF_FFFF  # the kernel's cmd is an unsigned int
        if isinstance(argument, int):
            given: int | bytes = argument
            seen: AddressArgument | BufferArgument = AddressArgument(argument)
        else:
            seen = BufferArgument(argument)
            given = seen.read(min(seen.size, KEPT))
        with self._lock:
            name = handler.request_name(number)
            self._warn(unmodelled_part(self._version, name, given))
            return self._observed(
                "ioctl",
                (fd, request, given),
                lambda: handler.ioctl(number, seen),
                number=number,
                request=name,
                undo=self._close if isinstance(handler, Group) and number == _GET_DEVICE_FD else None,
            )

    def _warn(self, part: Unmodelled | None) -> None:
        if part is not None and part not in self.unmodelled:
            self.unmodelled.append(part)
            logger.warning("%s", part)

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """Registers and configuration space of a device; EINVAL on containers and groups."""
        handler = self._handler(fd)
        if handler is None:
            return self._linux.pread(fd, size, offset)
        with self._lock:
            return self._observed("pread", (fd, size, offset), lambda: _device(handler).pread(fd, size, offset))

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """As `pread`."""
        handler = self._handler(fd)
        if handler is None:
            return self._linux.pwrite(fd, data, offset)
        with self._lock:
            return self._observed("pwrite", (fd, data, offset), lambda: _device(handler).pwrite(fd, data, offset))

    def registers(self, fd: int, offset: int, size: int) -> Registers:
        """A BAR: its callbacks, or plain memory; EINVAL where it cannot be mapped."""
        handler = self._handler(fd)
        if handler is None:
            return self._linux.registers(fd, offset, size)
        with self._lock:
            return self._observed(
                "registers",
                (fd, offset, size),
                lambda: self._map_registers(_device(handler), fd, offset, size),
                undo=lambda window: window.close(),
            )

    def _map_registers(self, device: PciDevice, fd: int, offset: int, size: int) -> Registers:
        self._pins.device_memory_is_mapped = True
        return device.registers(self._linux, fd, offset, size)

    def eventfd(self, initial: int, flags: int) -> int:
        """A real one."""
        with self._lock:
            fd = self._observed("eventfd", (initial, flags), lambda: self._linux.eventfd(initial, flags), undo=os.close)
            self._given_out(fd)
            return fd

    def eventfd_read(self, fd: int) -> int:
        """Of a real one; may block."""
        return self._observed("eventfd_read", (fd,), lambda: self._linux.eventfd_read(fd))

    def poll(self, fd: int, timeout: float | None) -> bool:
        """The real one; may block."""
        return self._observed("poll", (fd,), lambda: self._linux.poll(fd, timeout))

    # ------------------------------------------------------------------------------------------------------ memory

    def mmap(self, vaddr: int, size: int, protection: int, flags: int, *, fd: int = -1, offset: int = 0) -> Vaddr:
        """The real one, seen: with MAP_FIXED it takes away what is there. A BAR is memory without side effects."""

        def act() -> Vaddr:
            handler = self._handler(fd)
            if handler is not None:
                if not flags & _MAP_SHARED:
                    refuse(errno.EINVAL)
                bar = _device(handler).declared.bars[_device(handler).check_mmap(offset, size)]
                if bar.read is not None:
                    self._warn(Unmodelled("mmap", "a BAR's memory, without the registers that are in it"))
                self._pins.device_memory_is_mapped = True
            return self._linux.mmap(vaddr, size, protection, flags, fd=fd, offset=offset)

        replaces = flags & MAP_FIXED and not flags & _MAP_FIXED_NOREPLACE
        given = (vaddr, size, protection, flags, fd, offset)
        return self._memory_call("mmap", given, act, takes=_READ_WRITE if replaces else 0)

    def mprotect(self, vaddr: int, size: int, protection: int) -> None:
        """The real one, seen: it takes away memory whose rights a mapping has and it no longer."""
        self._memory_call(
            "mprotect",
            (vaddr, size, protection),
            lambda: self._linux.mprotect(vaddr, size, protection),
            takes=_READ_WRITE & ~protection,
        )

    def madvise(self, vaddr: int, size: int, advice: int) -> None:
        """The real one, seen: discarding takes memory away."""
        self._memory_call(
            "madvise",
            (vaddr, size, advice),
            lambda: self._linux.madvise(vaddr, size, advice),
            takes=0 if advice in _HARMLESS else _READ_WRITE,
        )

    def munmap(self, vaddr: int, size: int) -> None:
        """The real one, seen."""
        self._memory_call("munmap", (vaddr, size), lambda: self._linux.munmap(vaddr, size), takes=_READ_WRITE)

    def _memory_call(self, call: str, given: tuple[int, ...], action: Callable[[], _Answer], *, takes: int) -> _Answer:
        """`takes`: PROT_* bits; mappings that have one of them lose the memory."""
        if self._in_child:
            return action()
        with self._lock:
            made, number = False, 0

            def act() -> _Answer:
                nonlocal made, number
                made = True
                try:
                    return action()
                except OSError as error:
                    number = error.errno or 0
                    raise

            try:
                return self._observed(call, given, act)
            finally:
                if made and takes:
                    # A call that fails may have come half way: what is left of the memory tells, but for madvise, which
                    # goes on behind a hole and says ENOMEM at the end.
                    asked = bool(number) and (call, number) != ("madvise", errno.ENOMEM)
                    self._pins.gone(call, vaddr=given[0], size=given[1], takes=takes, only_lost=asked)

    def mlockall(self, flags: int) -> None:
        """The real one."""
        self._observed("mlockall", (flags,), lambda: self._linux.mlockall(flags))

    def munlockall(self) -> None:
        """The real one."""
        self._observed("munlockall", (), self._linux.munlockall)

    def munlock(self, vaddr: int, size: int) -> None:
        """The real one."""
        self._observed("munlock", (vaddr, size), lambda: self._linux.munlock(vaddr, size))

    def mlocked(self) -> int:
        """0: what the process locks is not counted here, by `memlock` either."""
        return self._observed("mlocked", (), lambda: 0)

    def resident(self, vaddr: int, size: int) -> int:
        """The real one."""
        return self._observed("resident", (vaddr, size), lambda: self._linux.resident(vaddr, size))

    def memfd_create(self, name: str, flags: int) -> int:
        """The real one."""
        if self._in_child:
            return self._linux.memfd_create(name, flags)
        with self._lock:
            fd = self._observed(
                "memfd_create", (name, flags), lambda: self._linux.memfd_create(name, flags), undo=os.close
            )
            self._given_out(fd)
            return fd

    def ftruncate(self, fd: int, size: int) -> None:
        """The real one, seen: what is cut off is taken from whoever has it mapped."""
        self._file_call("ftruncate", (fd, size), lambda: self._linux.ftruncate(fd, size), fd=fd, start=size)

    def fallocate(self, fd: int, mode: int, offset: int, size: int) -> None:
        """The real one, seen: a hole that is punched takes memory away."""

        def act() -> None:
            self._linux.fallocate(fd, mode, offset, size)

        end = offset + size if mode & ~FALLOC_FL_KEEP_SIZE else offset
        self._file_call("fallocate", (fd, mode, offset, size), act, fd=fd, start=offset, end=end)

    def file_status(self, fd: int) -> FileStatus:
        """The real one."""
        return self._observed("file_status", (fd,), lambda: self._linux.file_status(fd))

    def _file_call(
        self, call: str, given: tuple[int, ...], action: Callable[[], None], *, fd: int, start: int, end: int = U64_MAX
    ) -> None:
        """The pages of a file from `start` to `end` go, and what devices reach of them with them."""
        if self._in_child:
            action()
            return
        with self._lock:
            # Before, for what is behind the new end of a file has no pages to be found by.
            areas = list(file_areas(fd, start, end)) if start < end and self._pins.used else []
            made = False

            def act() -> None:
                nonlocal made
                action()
                made = True

            try:
                self._observed(call, given, act)
            finally:
                for vaddr, size in areas if made else ():
                    self._pins.gone(call, vaddr=vaddr, size=size, takes=_READ_WRITE)

    def memlock(self) -> Memlock:
        """The fake's own: `memlock_limit` in whole pages, the sum of live mappings, `privileged`."""
        if self._in_child:
            self._check_usable()
        answer = Memlock(limit=self._pins.page_limit, used=self._pins.used, privileged=self._pins.privileged)
        return self._observed("memlock", (), lambda: answer)


def _device(handler: Handler) -> PciDevice:
    if not isinstance(handler, DeviceHandle):
        refuse(errno.EINVAL)
    return handler.device


def _check_open(fd: int) -> None:
    try:
        os.fstat(fd)
    except (OSError, OverflowError):
        refuse(errno.EBADF)


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _is_same_file(fd: int, identities: Mapping[int, tuple[int, int]]) -> bool:
    # With each call on a descriptor: a microsecond, a tenth of what a mapping costs, for never touching another's file.
    try:
        return _identity(fd) == identities[fd]
    except OSError:
        return False


def _close_all(
    files: dict[int, Handler], identities: Mapping[int, tuple[int, int]], close_pins: Callable[[], None], owner: int
) -> None:
    if os.getpid() != owner:
        return
    close_pins()
    for fd in list(files):
        handler = files.pop(fd)
        if _is_same_file(fd, identities):
            os.close(fd)
        handler.release(fd)
