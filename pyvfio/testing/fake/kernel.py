"""`FakeKernel`: the attributes for tests, and the calls on descriptors, which are passed to the object behind each."""

from __future__ import annotations

import os
import select
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from pyvfio import ioctls
from pyvfio.guard import uninterrupted
from pyvfio.kernel import IoctlArgument, LinuxKernel, Memlock, Poll, Registers
from pyvfio.testing.fake.declaration import (
    GroupDeclaration,
    check_alone,
    check_groups,
    check_interfaces,
    default_groups,
    listed,
)
from pyvfio.testing.fake.descriptors import Descriptors
from pyvfio.testing.fake.device import PciDevice, is_vfio_driver
from pyvfio.testing.fake.dma import DmaFault
from pyvfio.testing.fake.feature import makes_descriptor
from pyvfio.testing.fake.group import Container, Group, Handler, device_behind
from pyvfio.testing.fake.iommu import IommuModel, iommu_model
from pyvfio.testing.fake.iommufd import Iommufd
from pyvfio.testing.fake.machine import Machine
from pyvfio.testing.fake.memory import MemoryCalls
from pyvfio.testing.fake.noiommu import FramesOfProcess, NoIommu, without_huge_pages
from pyvfio.testing.fake.pins import Mapped, Pins, Violation, describe
from pyvfio.testing.fake.process import AddressArgument, BufferArgument, FileAreas
from pyvfio.testing.fake.record import KEPT, Failure, Record
from pyvfio.testing.fake.sysfs_writes import address_of, write_sysfs
from pyvfio.testing.fake.tree import Tree
from pyvfio.testing.fake.unmodelled import unmodelled_part
from pyvfio.testing.fake.versions import KernelVersion, kernel_version
from pyvfio.unique import Unique

_GET_DEVICE_FD = ioctls.VFIO_GROUP_GET_DEVICE_FD


class FakeKernel(MemoryCalls, Unique):
    """A kernel with VFIO and an IOMMU, for tests on a machine without them.

    The fake answers the system calls of VFIO as Linux `version` ("6.1", "6.12" or "7.3") does, in the order of checks
    of that kernel. Calls on process memory are real. `iommu`: "intel" (39 bits), "intel48", "amd", "virtio" or an
    `IommuModel`; "none": the machine has none, and `noiommu` is VFIO's mode for that. `groups`: (number, devices)
    pairs. By default, groups 2 and 3 have an edu each, 0000:00:02.0 and 0000:00:03.0, bound to vfio-pci. `iommufd`: the
    kernel also has /dev/iommu and a node for each device, as a kernel built with CONFIG_IOMMUFD and
    CONFIG_VFIO_DEVICE_CDEV ("6.12" and "7.3"). `type1=False`: the kernel has only these, no containers and no nodes of
    groups. Raises ValueError for arguments that no machine can have.

    Descriptors are real, so that a leak shows in /proc/self/fd. If a descriptor is closed past the seam (os.close), the
    next call notices. Another file with the same number is then neither answered for nor closed. `shutdown`, also at
    the end of a `with`, closes all open descriptors and removes `sysfs` and `dev`. In a forked child, a close closes
    the descriptor in the child and changes nothing else. Other VFIO calls there raise RuntimeError, since the state
    belongs to the parent.

    Synchronization: one lock. Any thread may make any call, and callbacks of devices may call the fake. As in a kernel,
    no signal handler and no finalizer runs in the middle of a call: they would wait for locks of a waiting thread.

    Example:
        >>> import pyvfio
        >>> kernel = pyvfio.testing.FakeKernel("6.1", iommu="amd")
        >>> device = pyvfio.open_device("0000:00:02.0", kernel=kernel)
        >>> blocks = pyvfio.RamBlockList(kernel=kernel)
        >>> mapper = pyvfio.DmaMapper(device.space, blocks)
        >>> ring = blocks.add("ring", used_length=4096, max_length=pyvfio.MIB)
        >>> with ring.view(0, 5) as memory:
        ...     memory[:] = b"hello"
        >>> device.bus_master = True
        >>> kernel.dma_read("0000:00:02.0", mapper.iova(ring), 5)
        b'hello'
        >>> [call.request for call in kernel.trace if "DMA" in call.request]
        ['VFIO_IOMMU_UNMAP_DMA', 'VFIO_IOMMU_MAP_DMA']
    """

    def __init__(
        self,
        version: str = "6.12",
        *,
        iommu: IommuModel | str = "intel",
        groups: Sequence[GroupDeclaration] | None = None,
        iommufd: bool = False,
        type1: bool = True,
    ) -> None:
        declared = default_groups() if groups is None else listed(groups)
        check_groups(declared)
        if not isinstance(iommu, str | IommuModel):
            raise ValueError(f"iommu is intel, intel48, amd, virtio, none or an IommuModel, not {iommu!r}")  # noqa: TRY004
        self._version = kernel_version(version)
        check_interfaces(self._version, iommufd=iommufd, type1=type1)
        if iommu == "none":
            check_alone(declared)
        lock, record = threading.RLock(), Record()
        super().__init__(
            lock=lock,
            descriptors=Descriptors(lock),
            pins=Pins(file_areas=FileAreas() if self._version.refuses_tracked_files else None),
            record=record,
        )
        try:
            self._machine = Machine(
                declared,
                version=self._version,
                model=iommu_model(iommu, self._version) if isinstance(iommu, str) else iommu,
                iommufd=iommufd,
                type1=type1,
                lock=lock,
                descriptors=self._descriptors,
                pins=self._pins,
                record=record,
                noiommu=NoIommu() if iommu == "none" else None,
            )
        except BaseException:
            self._pins.close()
            raise
        self._dma = self._machine.dma
        self._tree: Tree | None = None
        self._finalizer = weakref.finalize(self, _finalize, self._descriptors, self._pins)
        self.trace = record.trace
        """All calls on the seam, in order, with the results."""
        self.unmodelled = record.unmodelled
        """The requests that the fake accepts without effect, or refuses although a kernel knows them. Each is listed
        and logged once, as a warning.
        """

    def __repr__(self) -> str:
        devices, opened = len(self.bdfs), len(self.descriptors)
        mapped = [mapping.size for mapping in self.mappings()]
        return (
            f"<{type(self).__name__} {self._version.name}: {devices} device{'s' * (devices != 1)}, "
            f"{opened} descriptor{'s' * (opened != 1)}, {len(mapped)} mapping{'s' * (len(mapped) != 1)} of "
            f"{sum(mapped):#x} bytes>"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    @uninterrupted()
    def shutdown(self) -> None:
        """Close all open VFIO descriptors, and remove `sysfs` and `dev`; twice is fine. Does nothing in a child.

        The holder of a descriptor may close the descriptor once more, without effect. Other calls raise RuntimeError,
        except calls on memory and on descriptors of other files.
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
        """The kernel that the fake models."""
        return self._version

    @property
    def release(self) -> str:
        """The release of the kernel that the fake models, such as 6.12.0, for errors. `proc` is the machine's."""
        return f"{self._version.name}.0"

    @property
    def build_options(self) -> Mapping[str, str]:
        """The options of VFIO and iommufd that the modelled kernel was built with: `y`, or `n` for one that is not set.

        Options that kernels of the version do not have are left out.
        """
        built = {"VFIO": True, "VFIO_PCI": True, "VFIO_IOMMU_TYPE1": self._machine.has_groups}
        built["VFIO_NOIOMMU"] = self._machine.noiommu is not None
        if self._version.iommufd_last:  # IOMMUFD and VFIO_CONTAINER are of 6.2, the others of 6.6
            built |= dict.fromkeys(("VFIO_GROUP", "VFIO_CONTAINER"), self._machine.has_groups)
            built |= dict.fromkeys(("IOMMUFD", "VFIO_DEVICE_CDEV"), self._machine.has_device_nodes)
        return {name: "y" if is_set else "n" for name, is_set in built.items()}

    @property
    def iommu(self) -> IommuModel:
        """The IOMMU in front of all devices."""
        return self._machine.iommu

    @property
    def noiommu(self) -> NoIommu:
        """No-IOMMU mode: whether the mode is on, the rights of the process, and physical memory.

        Huge pages are ordinary memory, so that tests need none. Raises ValueError for a machine with an IOMMU.
        """
        if self._machine.noiommu is None:
            raise ValueError('the fake machine has an IOMMU: FakeKernel(..., iommu="none") has none')
        return self._machine.noiommu

    @property
    def bdfs(self) -> tuple[str, ...]:
        """The PCI addresses of all devices, in the order of the declaration."""
        return tuple(device.bdf for _group, device in self._machine.places.values())

    @property
    def memlock_limit(self) -> int | None:
        """RLIMIT_MEMLOCK in bytes; None, the default, means unlimited. Can be set at any time."""
        return self._pins.limit

    @memlock_limit.setter
    def memlock_limit(self, limit: int | None) -> None:
        self._descriptors.check_usable()
        if limit is not None and (not isinstance(limit, int) or limit < 0):
            raise ValueError(f"memlock_limit is a number of bytes or None, not {limit!r}")
        self._pins.limit = limit

    @property
    def privileged(self) -> bool:
        """Whether the process has CAP_IPC_LOCK, which lifts the limit. Can be set at any time; the default is False."""
        return self._pins.privileged

    @privileged.setter
    def privileged(self, privileged: bool) -> None:
        self._pins.privileged = privileged

    @property
    def dma_entry_limit(self) -> int:
        """The mapping limit of containers whose IOMMU is set from now on. Can be set at any time."""
        return self._machine.iommu.dma_entry_limit

    @dma_entry_limit.setter
    def dma_entry_limit(self, limit: int) -> None:
        self._machine.iommu = replace(self._machine.iommu, dma_entry_limit=limit)

    @property
    def allow_unsafe_interrupts(self) -> bool:
        """The module parameter of iommufd: without, a bind is EPERM if the IOMMU remaps no interrupts (amd, virtio).

        Can be set at any time; the default is True.
        """
        return self._machine.allow_unsafe_interrupts

    @allow_unsafe_interrupts.setter
    @uninterrupted()
    def allow_unsafe_interrupts(self, allow: bool) -> None:
        with self._lock:
            self._machine.allow_unsafe_interrupts = allow
            if self._tree is not None:
                self._tree.show_parameter(allow=allow)

    @property
    def may_set_limits(self) -> bool:
        """Whether the process has CAP_SYS_RESOURCE, which IOMMU_OPTION_RLIMIT_MODE requires. The default is True."""
        return self._machine.may_set_limits

    @may_set_limits.setter
    def may_set_limits(self, may: bool) -> None:
        self._machine.may_set_limits = may

    @property
    def pinned(self) -> int:
        """The bytes that iommufd has pinned, as VmPin counts; type1 does not count there."""
        return self._pins.pinned

    @property
    def charged_to_user(self) -> int:
        """The bytes that iommufd charges to the user, which `memlock_limit` limits. No file of a kernel shows them."""
        return self._pins.by_user

    @property
    def violations(self) -> list[Violation]:
        """All cases in which memory was released while a device could reach the memory."""
        return self._pins.violations

    @property
    def faults(self) -> list[DmaFault]:
        """All DMA accesses that were stopped: by the IOMMU, or because bus mastering was off."""
        return self._dma.faults

    @property
    def on_fault(self) -> Callable[[DmaFault], object] | None:
        """Called with each fault at once, under the lock of the fake. Can be set at any time; the default is None."""
        return self._dma.on_fault

    @on_fault.setter
    def on_fault(self, callback: Callable[[DmaFault], object] | None) -> None:
        self._dma.on_fault = callback

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The open VFIO descriptors."""
        return tuple(self._descriptors.files)

    @uninterrupted()
    def check(self) -> None:
        """Check each live mapping, and the consistency of the fake.

        Raises AssertionError if memory under a mapping was released: through the seam, or past the seam if the check
        can see the change. The error names the first of `violations`. Cost: O(n log n) for n mappings; reads
        /proc/self/maps.
        """
        with self._lock:
            self._machine._check_state()
            self._pins.look_at_all()
        if self.violations:
            raise AssertionError(describe(self.violations))

    @property
    def planned_failures(self) -> tuple[str, ...]:
        """The failures that `fail` has planned and that have not happened yet, in words."""
        return tuple(map(str, self._record.failures))

    def clear_trace(self) -> None:
        """Clear `trace`."""
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
        """Make a call fail with `errno`: the `nth` matching call from now on, before the call takes effect or `after`.

        If a call fails after the effect, the new descriptor or register window is closed. A failing close always closes
        the descriptor.

        `call` is a method of `Kernel`; None matches all methods. `request` limits an ioctl to a number or a C name:
        numbers repeat between containers and devices. Raises ValueError for arguments that match no call.
        `planned_failures` lists the failures that have not happened, and `clear_failures` cancels them.
        """
        self._record.failures.plan(Failure(call, request, nth, errno, after))

    def clear_failures(self) -> None:
        """Cancel all planned failures."""
        self._record.failures.clear()

    @uninterrupted()
    def bind(self, bdf: str, driver: str | None) -> None:
        """Bind a device to another driver (None: to no driver), in sysfs too. Raises ValueError for an unknown device.

        While the group of the device is in use, the probe of a kernel driver fails and the device has no driver, as in
        `iommu_device_use_default_domain`.
        """
        self._descriptors.check_usable()
        group, device = self._machine.find(bdf)
        with self._lock:
            device.driver = driver
            device.renew_vf_token()
            if self._machine.noiommu is not None and not self._machine.noiommu.enabled and is_vfio_driver(driver):
                device.driver = None
            if group.claimed and not group.viable:
                device.driver = None
            if self._tree is not None:
                self._tree.bind(group, device)

    def write_sysfs(self, path: Path, value: str) -> None:
        """Write to a file below `sysfs` that changes a driver, as `pyvfio.pci.bind` and `unbind` do on this kernel.

        `driver_override`, `unbind`, `bind` and `drivers_probe` act as on a kernel. The driver that matches a device
        without an override is the declared one. Raises OSError, ValueError for an unknown device.
        """
        declared = self._machine.find(address_of(path, value))[1].declared.driver
        own = None if is_vfio_driver(declared) else declared
        write_sysfs(path, value, sysfs=self.sysfs, bind=self.bind, own_driver=own)

    @uninterrupted()
    def pull_out(self, bdf: str) -> None:
        """Remove a device by surprise, even while the device is open. Raises ValueError for an unknown device.

        BARs and most of the configuration space then read all ones, and writes are lost. The device does no DMA and
        raises no interrupt. The kernel still answers for the vendor, the BARs and the capability list. The device stays
        in sysfs, as if no hotplug driver noticed the removal.
        """
        self._descriptors.check_usable()
        with self._lock:
            self._machine.find(bdf)[1].pull_out()

    @uninterrupted()
    def ask_for(self, bdf: str) -> None:
        """Request a device back, as a kernel does before a removal or an unbind: VFIO_PCI_REQ_IRQ_INDEX is signalled.

        Raises ValueError for an unknown device.
        """
        self._descriptors.check_usable()
        with self._lock:
            self._machine.find(bdf)[1].irqs.request()

    @uninterrupted()
    def mappings(self, bdf: str | None = None) -> tuple[Mapped, ...]:
        """Return the mappings that devices can reach, by IOVA: of all containers and address spaces, or of `bdf`.

        Without an IOMMU nothing is mapped. Raises ValueError for an unknown device.
        """
        if self._machine.noiommu is not None:
            return ()
        groups = list(self._machine.groups.values()) if bdf is None else [self._machine.find(bdf)[0]]
        with self._lock:
            translations = [group.translation for group in groups]
            tables = {id(each.table): each.table for each in translations if each is not None}
            return tuple(sorted(entry for table in tables.values() for entry in table))

    @uninterrupted()
    def interrupt(self, bdf: str, vector: int = 0) -> None:
        """Raise an interrupt of a device: the enabled one of INTx, MSI and MSI-X signals the eventfd.

        Raises ValueError for a vector that the device does not have.
        """
        self._descriptors.check_usable()
        with self._lock:
            device = self._machine.find(bdf)[1]
            device.check_vector(vector)
            if not device.gone:
                device.irqs.raise_interrupt(vector)

    @uninterrupted()
    def dma_read(self, bdf: str, iova: int, size: int) -> bytes:
        """Read memory as a device. Bus mastering is not checked; a `FakePciDevice` checks its own accesses.

        Raises DmaFault if the IOMMU stops the access, and AssertionError if the memory is gone.
        """
        self._descriptors.check_usable()
        with self._lock:
            return self._dma.read(*self._machine.find(bdf), iova=iova, size=size)

    @uninterrupted()
    def dma_write(self, bdf: str, iova: int, data: bytes) -> None:
        """Write memory as a device, as `dma_read` reads. Bytes before the stopped byte are written."""
        self._descriptors.check_usable()
        with self._lock:
            self._dma.write(*self._machine.find(bdf), iova=iova, data=data)

    # ------------------------------------------------------------------------------------------------ descriptors

    def _directories(self) -> Tree:
        self._descriptors.check_usable()
        if self._tree is None:
            self._tree = Tree(self._machine)
        return self._tree

    @property
    @uninterrupted()
    def sysfs(self) -> Path:
        """The directory that stands for /sys."""
        with self._lock:
            return self._directories().sys

    @property
    @uninterrupted()
    def dev(self) -> Path:
        """The directory that stands for /dev."""
        with self._lock:
            return self._directories().dev

    @property
    def proc(self) -> Path:
        """The real /proc, since this process runs on the real machine."""
        return self._linux.proc

    @uninterrupted()
    def open(self, path: str, flags: int) -> int:
        """Open a container, an iommufd, a group, a device or any other file. EBUSY for a group that is in use."""
        self._descriptors.check_usable()
        with self._lock:
            return self._record.observed(
                "open", (path, flags), lambda: self._open(path, flags), undo=self._descriptors.close
            )

    def _open(self, path: str, flags: int) -> int:
        self._descriptors.sweep()  # A group whose descriptor was closed past the seam is not busy.
        fd = self._linux.open(path, flags)
        self._descriptors.given_out(fd)
        if self._machine.noiommu is not None and path == str(self.proc / "self/pagemap"):
            self._descriptors.adopt(fd, FramesOfProcess(self._machine.noiommu))
            return fd
        node = os.path.relpath(path, self.dev) if os.path.isabs(path) else ""
        return self._machine.open_node(node, fd)

    @uninterrupted()
    def close(self, fd: int | None = None) -> None:
        """Close a descriptor, and for a group or device all dependent state; without a descriptor, call `shutdown`.

        A planned failure still closes the descriptor, as on Linux.
        """
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
        """Pass the ioctl to the object behind `fd`, or to the running kernel if `fd` is no VFIO descriptor."""
        handler = self._descriptors.find(fd)
        if handler is None:
            return self._linux.ioctl(fd, request, argument)
        if not isinstance(handler, Container | Iommufd):  # these read and duplicate other descriptors
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
            noiommu = self._machine.noiommu is not None
            self._record.warn(unmodelled_part(self._version, name, given, noiommu=noiommu))
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
        """Return the function that closes the descriptor which an ioctl makes; None for other ioctls."""
        if isinstance(handler, Group) and number == _GET_DEVICE_FD:
            return self._descriptors.close
        return os.close if makes_descriptor(handler.request_name(number), given) else None

    @uninterrupted()
    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """Read registers or configuration space of a device. Raises EINVAL for containers and groups."""
        handler = self._descriptors.find(fd)
        if handler is None:
            return self._linux.pread(fd, size, offset)
        with self._lock:
            return self._record.observed("pread", (fd, size, offset), lambda: _behind(handler).pread(fd, size, offset))

    @uninterrupted()
    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """Write as `pread` reads."""
        handler = self._descriptors.find(fd)
        if handler is None:
            return self._linux.pwrite(fd, data, offset)
        with self._lock:
            return self._record.observed(
                "pwrite", (fd, data, offset), lambda: device_behind(handler).pwrite(fd, data, offset)
            )

    @uninterrupted()
    def registers(self, fd: int, offset: int, size: int) -> Registers:
        """Map a BAR: the callbacks of the BAR, or plain memory. Raises EINVAL if the BAR cannot be mapped."""
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

    def memfd_create(self, name: str, flags: int) -> int:
        """Make a real memfd. Without an IOMMU, ordinary memory stands for huge pages of 2 MiB."""
        return super().memfd_create(name, flags if self._machine.noiommu is None else without_huge_pages(flags))

    @uninterrupted()
    def eventfd(self, initial: int, flags: int) -> int:
        """Make a real eventfd."""
        with self._lock:
            fd = self._record.observed(
                "eventfd", (initial, flags), lambda: self._linux.eventfd(initial, flags), undo=os.close
            )
            self._descriptors.given_out(fd)
            return fd

    def eventfd_read(self, fd: int) -> int:
        """Read a real eventfd. The call can block."""
        return _read_eventfd(self._record, self._linux, fd)[0]

    def eventfd_write(self, fd: int, value: int) -> None:
        """Write a real eventfd."""
        self._record.observed("eventfd_write", (fd, value), lambda: self._linux.eventfd_write(fd, value))

    def poll(self, fd: int, timeout: float | None, *others: int) -> tuple[int, ...]:
        """Poll real descriptors. The call can block."""
        return self._record.observed("poll", (fd, *others), lambda: self._linux.poll(fd, timeout, *others))

    def poller(self, *fds: int) -> Poll:
        """Return a poller as of `poll`. Calls of the poller are in the trace."""

        def wait(timeout: float | None) -> list[tuple[int, int]]:
            seconds = None if timeout is None else timeout / 1000
            return [(fd, select.POLLIN) for fd in self.poll(fds[0], seconds, *fds[1:])]

        return wait

    def memlock(self) -> Memlock:
        """Return the values of the fake: `memlock_limit` in whole pages, the sum of live mappings, `privileged`."""
        if self._descriptors.in_child:
            self._descriptors.check_usable()
        answer = Memlock(limit=self._pins.page_limit, used=self._pins.used, privileged=self._pins.privileged)
        return self._record.observed("memlock", (), lambda: answer)


def _behind(handler: Handler) -> PciDevice | FramesOfProcess:
    return handler if isinstance(handler, FramesOfProcess) else device_behind(handler)


def _write_back(read: tuple[int, int]) -> None:
    os.eventfd_write(read[1], read[0])


@uninterrupted(_write_back)
def _read_eventfd(record: Record, linux: LinuxKernel, fd: int) -> tuple[int, int]:
    """Return the value and the descriptor, so that the value is written back if a signal handler raises."""
    return record.observed("eventfd_read", (fd,), lambda: linux.eventfd_read(fd)), fd


def _finalize(descriptors: Descriptors, pins: Pins) -> None:
    if descriptors.in_child:
        return
    pins.close()
    descriptors.finalize()
