"""A `Kernel` for one device: each access goes through another kernel, and is reported to a log.

The seam sees loads and stores only if register windows hand out no memory: `numbers` and `cell` of a recorded window
return None, and `Region` then calls `read` and `write`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import Protocol, cast

from pyvfio import ioctls
from pyvfio.errors import UnsupportedError
from pyvfio.guard import Guard, guarded, uninterrupted
from pyvfio.kernel import IoctlArgument, Kernel, Registers
from pyvfio.recording.format import COMMAND, CONFIG, Access, Event, Interrupt, Mmap, Reset, is_block
from pyvfio.recording.log import EventLog
from pyvfio.units import Vaddr

_SET_IRQS = int(ioctls.VFIO_DEVICE_SET_IRQS)
_RESETS = {int(ioctls.VFIO_DEVICE_RESET): False, int(ioctls.VFIO_DEVICE_PCI_HOT_RESET): True}
_EVENTFD = int(ioctls.VFIO_IRQ_SET_DATA_EVENTFD)
_TRIGGER = int(ioctls.VFIO_IRQ_SET_ACTION_TRIGGER)
_NONE = int(ioctls.VFIO_IRQ_SET_DATA_NONE)


class Place(Protocol):
    """Where a region is in the descriptor of the device."""

    @property
    def index(self) -> int:
        """The index of the region."""
        ...

    @property
    def offset(self) -> int:
        """The first byte in the descriptor."""
        ...

    @property
    def size(self) -> int:
        """In bytes."""
        ...


class RecordingKernel:
    """Makes the calls of one device through `kernel`, and reports accesses, interrupts and resets to `log`.

    `regions` returns the places of the regions that the device has. `config` is configuration space as known so far:
    a read that returns these bytes is not reported. `allow_mmap`: mappings of `Region.mmap` are reported; otherwise
    UnsupportedError is raised.

    Calls that are not listed here are those of `kernel`. Use `as_kernel` for an object that type checkers accept.

    Synchronization: any thread. Each access and the report of the access are one step under the lock of the log.
    """

    def __init__(
        self,
        kernel: Kernel,
        log: EventLog,
        *,
        regions: Callable[[], tuple[Place, ...]],
        config: bytes,
        allow_mmap: bool,
    ) -> None:
        self.guard: Guard = log.guard
        self.kernel = kernel
        """Who makes the calls: the device's kernel, or the seam of another recording."""
        self.ended = False
        """Whether nothing is reported any more. Read only."""
        self._log = log
        self._regions = regions
        self._config: dict[int, int] = dict(enumerate(config))
        self._allow_mmap = allow_mmap
        self._vectors: dict[int, tuple[int, int]] = {}
        self._own: dict[int, int] = {}  # signals of an eventfd that are not the device's

    def __getattr__(self, name: str) -> object:
        return getattr(self.kernel, name)

    @guarded
    def end(self) -> None:
        """Report nothing any more."""
        self.ended = True

    def know(self, vectors: Mapping[int, tuple[int, int]]) -> None:
        """Take in the eventfds of interrupts that are enabled: kind and vector by descriptor."""
        self._vectors.update(vectors)

    def _find(self, offset: int) -> tuple[int, int] | None:
        """The region of an offset in the descriptor, and the offset in the region; None if nothing is reported."""
        for region in () if self.ended else self._regions():
            if region.offset <= offset < region.offset + region.size:
                return region.index, offset - region.offset
        return None

    # ------------------------------------------------------------------------------------------------------- accesses

    @guarded
    def pread(self, fd: int, size: int, offset: int, /) -> bytes:
        """Read, and report the read."""
        place = self._find(offset) if size else None  # the kernel returns before the driver is called
        try:
            data = self.kernel.pread(fd, size, offset)
        except OSError as error:
            if place is not None:
                self._log.add(self._access(place, size, None, write=False, number=error.errno or errno.EIO))
            raise
        if place is not None and len(data) == size and not self._is_known(place, data):
            self._log.add(self._access(place, size, data, write=False))
        return data

    @guarded
    def pwrite(self, fd: int, data: bytes, offset: int, /) -> int:
        """Write, and report the write."""
        place = self._find(offset) if data else None
        try:
            written = self.kernel.pwrite(fd, data, offset)
        except OSError as error:
            if place is not None:
                self._log.add(self._access(place, len(data), data, write=True, number=error.errno or errno.EIO))
            raise
        if place is not None and written == len(data):
            known = self._is_known(place, data)
            if not (known and place == (CONFIG, COMMAND)):
                self._log.add(self._access(place, len(data), data, write=True))
        return written

    def _is_known(self, place: tuple[int, int], data: bytes) -> bool:
        """Whether bytes of configuration space are as they were; they are known from now on."""
        if place[0] != CONFIG:
            return False
        new = dict(enumerate(data, place[1]))
        known = all(self._config.get(at) == value for at, value in new.items())
        self._config.update(new)
        return known

    def _access(self, place: tuple[int, int], size: int, data: bytes | None, *, write: bool, number: int = 0) -> Access:
        return Access(write, *place, size, data, number, is_block(place[1], size))

    def registers(self, fd: int, offset: int, size: int) -> Registers:
        """Map a window whose accesses are reported."""
        window = self.kernel.registers(fd, offset, size)
        place = self._find(offset)
        return window if place is None else _RecordingRegisters(window, self._log, place)

    def mmap(self, vaddr: int, size: int, protection: int, flags: int, *, fd: int = -1, offset: int = 0) -> Vaddr:
        """Map, and report the mapping of a region. Raises UnsupportedError unless mappings are allowed."""
        place = self._find(offset)
        if place is not None and not self._allow_mmap:
            raise UnsupportedError(
                "Region.mmap cannot be recorded: accesses through the mapping are loads and stores that nobody sees",
                hint="Use read32 and its kin, or record(…, allow_mmap=True), which notes the mapping alone",
            )
        mapped = self.kernel.mmap(vaddr, size, protection, flags, fd=fd, offset=offset)
        if place is not None:
            self._report(Mmap(*place, size))
        return mapped

    # ----------------------------------------------------------------------------------------------------- interrupts

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
        """Make the ioctl; report a reset, and take in which eventfd an interrupt signals."""
        answer = self.kernel.ioctl(fd, request, argument)
        if request == _SET_IRQS and isinstance(argument, ioctls.vfio_irq_set):
            self._take_in(argument)
        elif request in _RESETS:
            self._report(Reset(hot=_RESETS[request]))
        return answer

    def _take_in(self, argument: ioctls.vfio_irq_set) -> None:
        if not argument.flags & _TRIGGER:
            return
        vectors = range(argument.start, argument.start + argument.count)
        if argument.flags & _EVENTFD:
            data = bytes(argument)[-4 * argument.count :] if argument.count else b""
            fds = [int.from_bytes(data[at : at + 4], "little", signed=True) for at in range(0, len(data), 4)]
            self._vectors.update({fd: (argument.index, v) for fd, v in zip(fds, vectors, strict=True)})
        elif argument.flags & _NONE:  # Irq.trigger: the signal is the program's
            for fd, (index, vector) in tuple(self._vectors.items()):
                if index == argument.index and vector in vectors:
                    self._own[fd] = self._own.get(fd, 0) + 1

    def eventfd_read(self, fd: int) -> int:
        """Read the counter of an eventfd, and report the interrupts that the device has raised."""
        return _read_eventfd(self, fd)[0]

    def eventfd_write(self, fd: int, value: int) -> None:
        """Add to the counter of an eventfd. These signals are not reported: they were read before, or are not the
        device's."""
        self._own[fd] = self._own.get(fd, 0) + value
        self.kernel.eventfd_write(fd, value)

    def take_signals(self, fd: int) -> int:
        """Read the counter of an eventfd, and report the part that is the device's."""
        count = self.kernel.eventfd_read(fd)
        own = min(self._own.pop(fd, 0), count)
        if fd in self._vectors and count > own:
            self._report(Interrupt(*self._vectors[fd], count - own))
        return count

    @guarded
    def _report(self, event: Event) -> None:
        if not self.ended:
            self._log.add(event)


def _write_back(read: tuple[int, RecordingKernel, int]) -> None:
    count, seam, fd = read
    seam.eventfd_write(fd, count)


@uninterrupted(_write_back)
def _read_eventfd(seam: RecordingKernel, fd: int) -> tuple[int, RecordingKernel, int]:
    """Read and report in one step: a signal handler that raises must not lose the count."""
    return seam.take_signals(fd), seam, fd


def as_kernel(seam: RecordingKernel) -> Kernel:
    """Return `seam` as a Kernel: `__getattr__` has the calls that the class does not define."""
    return cast(Kernel, seam)


class _RecordingRegisters:
    """A window that reports each access. `place`: the region, and where in the region the window begins."""

    def __init__(self, window: Registers, log: EventLog, place: tuple[int, int]) -> None:
        self.guard = log.guard
        self._window = window
        self._log = log
        self._index, self._start = place

    @guarded
    def read(self, offset: int, width: int) -> int:
        """Load, and report the load."""
        value = self._window.read(offset, width)
        data = value.to_bytes(width, "little")
        self._log.add(Access(write=False, region=self._index, offset=self._start + offset, width=width, data=data))
        return value

    @guarded
    def write(self, offset: int, width: int, value: int) -> None:
        """Store, and report the store."""
        self._window.write(offset, width, value)
        data = value.to_bytes(width, "little")
        self._log.add(Access(write=True, region=self._index, offset=self._start + offset, width=width, data=data))

    def cell(self, offset: int, width: int) -> None:
        """None: an access of memory would not be reported."""

    def numbers(self, width: int, size: int) -> None:
        """None: an access of memory would not be reported."""

    def close(self) -> None:
        """Close the window."""
        self._window.close()
