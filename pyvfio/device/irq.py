"""The interrupts of a device, which signal eventfds.

Source: drivers/vfio/pci/vfio_pci_intrs.c.
"""

from __future__ import annotations

import ctypes
import errno
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Protocol, overload

from pyvfio import ioctls
from pyvfio.arguments import checked_items
from pyvfio.device.attachment import DmaOwner
from pyvfio.device.eventfds import Eventfd, Making, ReplacedError, Row, Vectors, descriptors, numbers, runs_of
from pyvfio.device.windows import Windows
from pyvfio.errors import ClosedError, RollbackError, UnsupportedError, VfioError, as_exception
from pyvfio.guard import Guard, guarded
from pyvfio.handle import attempt, attempt_all
from pyvfio.info import IrqInfo
from pyvfio.kernel import IoctlArgument, Kernel
from pyvfio.unique import Unique
from pyvfio.units import as_number, check_whole_number

_ONE_AT_A_TIME = (ioctls.VFIO_PCI_INTX_IRQ_INDEX, ioctls.VFIO_PCI_MSI_IRQ_INDEX, ioctls.VFIO_PCI_MSIX_IRQ_INDEX)


class _Owner(Protocol):
    """The device that raises them."""

    bdf: str

    @property
    def owner(self) -> DmaOwner: ...

    @property
    def seam(self) -> Kernel: ...

    @property
    def irqs(self) -> tuple[Irq, ...]: ...

    @property
    def fd(self) -> int: ...

    @property
    def windows(self) -> Windows: ...

    def check_usable(self) -> None: ...

    def describe_irqs(self) -> str: ...

    def ioctl(
        self,
        request: str,
        argument: IoctlArgument = 0,
        /,
        *,
        hints: Mapping[int, str] | None = None,
        **given: int | str,
    ) -> int: ...


class Irq(Unique):
    """One kind of interrupt of a device: INTx, MSI, MSI-X, error or request. Vectors signal eventfds.

    Synchronization: any thread. `wait` and `wait_any` hold no lock, and raise if another thread disables the interrupt
    or closes the device. Cost: an ioctl for each call; `wait` polls and reads. Source: `vfio_pci_set_irqs_ioctl`.

    Example:
        >>> import pyvfio
        >>> kernel = pyvfio.testing.FakeKernel()
        >>> device = pyvfio.open_device("0000:00:02.0", kernel=kernel)
        >>> irq = device.irq(pyvfio.ioctls.VFIO_PCI_MSI_IRQ_INDEX)
        >>> eventfds = irq.enable(1)
        >>> device.bus_master = True  # without it, a device sends no MSI
        >>> device.region(0).write32(0x60, 1)  # this device, QEMU's edu, raises an interrupt
        >>> irq.wait(0, timeout=1.0)
        1
        >>> irq.disable()
    """

    def __init__(self, device: _Owner, info: IrqInfo) -> None:
        self._device = device
        self._enabled: Vectors | None = None
        self._unmask: Eventfd | None = None
        self.info = info
        self.guard = Guard(self._name)

    @property
    def count(self) -> int:
        """The number of vectors of this kind; 0: the device has none."""
        return self.info.count

    @property
    def fds(self) -> tuple[int | None, ...]:
        """The eventfds of the enabled vectors, by vector; None: the vector signals no eventfd.

        `disable` closes the eventfds that `enable` made. Eventfds that the program passed still belong to the program.
        """
        enabled = self._enabled
        return () if enabled is None else numbers(enabled.row)

    @property
    def can_grow(self) -> bool:
        """Whether vectors can be added behind the enabled ones: VFIO_IRQ_INFO_NORESIZE is not set.

        Linux 6.5 and later can add MSI-X vectors if the interrupt controller allows that. MSI vectors cannot be added.
        """
        return self.count > 1 and not self.info.flags & ioctls.VFIO_IRQ_INFO_NORESIZE

    # ------------------------------------------------------------------------------------------------------ enabling

    @overload
    def enable(self, vectors: int = 1, *, start: int = 0) -> tuple[int, ...]: ...

    @overload
    def enable(self, *, fds: Sequence[int | None], start: int = 0) -> tuple[int | None, ...]: ...

    def enable(
        self, vectors: int | None = None, *, fds: Sequence[int | None] | None = None, start: int = 0
    ) -> tuple[int | None, ...]:
        """Let vectors from `start` on signal eventfds: `vectors` (default 1) new ones, or `fds` of the program.

        Returns the eventfds of these vectors. `disable` closes new eventfds; the program never does. New eventfds do
        not block, and must stay so (EFD_NONBLOCK): `wait` reads before the poll. A descriptor in `fds` still belongs to
        the program: pyvfio duplicates the descriptor, and never closes the original. None in `fds`: the vector signals
        nothing. Make own eventfds with EFD_NONBLOCK, or let only one thread wait for each.

        Other vectors keep their eventfds, and lose no signal. `fds` replaces the eventfds of the named vectors. Signals
        of these vectors can be lost during the change. If `can_grow`, vectors can be added behind the enabled ones.
        Otherwise the first call must name all vectors that will be needed, with None for vectors that are connected
        later.

        If the kernel refuses a change, the vectors keep their former eventfds. Raises:

        * TypeError; ValueError for impossible numbers, and for descriptors that are closed or no eventfds, before any
          change.
        * UnsupportedError if the device has fewer vectors, or the kernel cannot add any.
        * VfioError if `vectors` names a vector that has an eventfd; HandOverError while the device is handed over.
        * IoctlError (EINVAL: another kind is enabled; EMFILE: no descriptor is left, with the number that is needed).
        * RollbackError if the kernel refuses the former eventfds too. Those vectors then signal nothing, as `fds`
          shows.

        Cost: an ioctl, and for each vector an eventfd(2), or a duplicate and a read of /proc.
        Source: VFIO_DEVICE_SET_IRQS, `vfio_pci_set_msi_trigger`.
        """
        if fds is not None and vectors is not None:
            raise TypeError("pass either vectors, the number of new eventfds, or fds, not both")
        own = None if fds is None else _checked_fds(fds)
        count = len(own) if own is not None else as_number(1 if vectors is None else vectors, "vectors")
        return self._enable(check_whole_number(start, "start"), count, own)

    @guarded
    def _enable(self, start: int, count: int, own: list[int | None] | None) -> tuple[int | None, ...]:
        self._check_range(start, count)
        self._check_changeable()
        before = self._row
        if own is None and any(before[start : start + count]):
            raise VfioError(
                f"{self._name} is enabled already", hint="Call disable() first, or pass fds= to replace eventfds"
            )
        row = self._grown(before, start, own or [0] * count)
        making = self._making(count)
        try:
            new = making.make() if own is None else making.duplicate(own)
            wake = making.make_one()
            self._change(_replaced(row, start, new, before), wake)
        except BaseException:
            making.close()
            raise
        making.close(but=(*self._row, wake))
        return numbers((self._row + (None,) * count)[start : start + count])

    @property
    def _row(self) -> Row:
        enabled = self._enabled
        return () if enabled is None else enabled.row

    def _check_range(self, start: int, count: int) -> None:
        if count < 1:
            raise ValueError(f"at least one vector must be enabled, not {count}")
        if start < 0:
            raise ValueError(f"start must be 0 or more, not {start}")
        if start + count > self.count or not self.info.flags & ioctls.VFIO_IRQ_INFO_EVENTFD:
            which = f"{start} to {start + count - 1}" if start else f"{count}"
            raise UnsupportedError(
                f"{self._name} has {self.count} vector{'s' * (self.count != 1)}, so {which} cannot be enabled",
                hint=f"This device has {self._device.describe_irqs()}",
            )

    def _check_changeable(self) -> None:
        self._device.check_usable()
        if self._device.windows.ended:  # no later step of the close would disable the interrupt again
            raise ClosedError(f"device {self._device.bdf} is being closed")
        self._device.owner.check_here()

    def _making(self, count: int) -> Making:
        arguments: dict[str, int | str] = {"device": self._device.bdf, "index": self.info.index, "vectors": count}
        return Making(self._device.seam, self.guard, what=self._name, count=count, arguments=arguments)

    def _grown(self, before: Row, start: int, wanted: Sequence[int | None]) -> Row:
        """Return the former row, with room for the wanted vectors. A None behind the enabled vectors needs no room."""
        if self._enabled is None:
            return (None,) * (start + len(wanted))
        used = [vector for vector, fd in enumerate(wanted, start) if fd is not None]
        end = max([len(before), *(vector + 1 for vector in used)])
        if end > len(before) and not self.can_grow:
            kind = ioctls.VfioPciIrqIndex(self.info.index)
            why = (
                "that needs Linux 6.5, and an interrupt controller that allocates MSI-X vectors one by one"
                if kind == ioctls.VFIO_PCI_MSIX_IRQ_INDEX
                else "only MSI-X vectors can be added"
            )
            raise UnsupportedError(
                f"{self._name}: {len(before)} of {self.count} vectors are enabled, and vector {end - 1} cannot be "
                f"added: {why}",
                hint="Call disable(), and enable all vectors at once: None in fds reserves a vector for later",
            )
        return before + (None,) * (end - len(before))

    def _change(self, row: Row, wake: Eventfd) -> None:
        """Let the vectors signal the eventfds of `row`. The calls name only vectors that change."""
        enabled = self._enabled
        if enabled is None:
            self._route(range(len(row)), row, first=True)
            self._enabled = Vectors(self._device.seam, self.guard, row, wake)
            return
        before = enabled.row + (None,) * (len(row) - len(enabled.row))
        changed = [v for v, new in enumerate(row) if new is not before[v] and not (new and new.is_same_as(before[v]))]
        tried: list[range] = []
        try:
            for run in runs_of(changed):
                tried.append(run)
                self._route(run, row)
        except BaseException as error:
            self._put_back(tried, before, wake, error)
            raise
        self._replace(row, wake)

    def _replace(self, row: Row, wake: Eventfd) -> None:
        old, new = self._enabled, Vectors(self._device.seam, self.guard, row, wake)
        self._enabled = new
        if old is not None:
            old.end(None, successor=new)

    def _put_back(self, tried: Sequence[range], before: Row, wake: Eventfd, cause: BaseException) -> None:
        """Restore the former eventfds: a refused call has disconnected the vectors up to the refused one."""
        failures: list[Exception] = []
        lost: set[int] = set()
        for run in reversed(tried):
            run_failures: list[Exception] = []
            attempt(partial(self._route, run, before), run_failures)
            if run_failures:
                # Unknown: which of these vectors the kernel has connected. A call without eventfds disconnects all of
                # them.
                attempt(partial(self._route, run, (None,) * len(before)), run_failures)
                lost |= set(run)
            failures += run_failures
        if not failures:
            return
        row = tuple(None if vector in lost else eventfd for vector, eventfd in enumerate(before))
        self._replace(row, Eventfd(self._device.seam, self.guard, wake.release()))
        raise RollbackError(
            f"{self._name} could not be changed, and vectors {sorted(lost)} signal nothing now",
            [as_exception(cause), *failures],
            hint="Connect them with enable(fds=…, start=…), or disable() the interrupt",
        ) from cause

    def _route(self, vectors: range, row: Row, *, first: bool = False) -> None:
        argument = ioctls.irq_set_eventfds(
            flags=ioctls.VFIO_IRQ_SET_DATA_EVENTFD | ioctls.VFIO_IRQ_SET_ACTION_TRIGGER,
            index=self.info.index,
            start=vectors.start,
            eventfds=descriptors(row[vectors.start : vectors.stop]),
        )
        available = self._set_irqs(argument)
        if first and available > 0:  # vfio_msi_enable: the number of vectors there are, with none enabled
            raise UnsupportedError(f"{self._name}: only {available} of {len(row)} vectors are available")

    # ----------------------------------------------------------------------------------------------------- disabling

    @guarded
    def disable(self, *vectors: int) -> None:
        """Stop these vectors, or all vectors, and close the eventfds that `enable` made; twice is fine.

        Other vectors continue, and lose no signal. Threads that wait for a stopped vector raise VfioError. Without
        arguments the whole interrupt is disabled, so that another kind can be enabled.

        Raises TypeError; ValueError for a vector that the device does not have; HandOverError; IoctlError (EMFILE:
        stopping some vectors needs one descriptor); RollbackError; VfioError if the program has closed an eventfd that
        `enable` made.
        """
        chosen = {self._checked_vector(vector) for vector in vectors}
        if self._enabled is None:
            return
        self._device.owner.check_here()
        if not vectors or (chosen and self.count == 1):
            self._end(VfioError(f"{self._name} was disabled"), stop=True)
            return
        before = self._row
        if not any(eventfd is not None and vector in chosen for vector, eventfd in enumerate(before)):
            return
        making = self._making(len(chosen))
        try:
            row = tuple(None if vector in chosen else eventfd for vector, eventfd in enumerate(before))
            self._change(row, making.make_one())
        except BaseException:
            making.close()
            raise

    def _checked_vector(self, vector: int) -> int:
        number = check_whole_number(vector, "vector")
        if not 0 <= number < self.count:
            there = f"vectors 0 to {self.count - 1}" if self.count else "no vectors"
            raise ValueError(f"{self._name} has {there}, not {number}")
        return number

    @guarded
    def close(self) -> None:
        """Disable the interrupt for a close of the device. Waiting threads raise ClosedError."""
        self._end(ClosedError(f"device {self._device.bdf} has been closed"), stop=True)

    @guarded
    def forget(self) -> None:
        """End as `close`, but the device still signals the eventfds, which another process has. For the library."""
        self._end(ClosedError(f"device {self._device.bdf} was handed to another process"), stop=False)

    @guarded
    def use_seam(self, seam: Kernel) -> None:
        """Read the eventfds that there are through `seam` from now on. For the library."""
        if self._enabled is not None:
            self._enabled.use_seam(seam)

    @guarded
    def held(self) -> tuple[Row, Eventfd | None]:
        """Return the eventfds by vector, or nothing for a disabled interrupt, and the eventfd that unmasks INTx.

        For the library.
        """
        return self._row, self._unmask

    @guarded
    def adopt(self, fds: Sequence[int | None], unmask: int | None) -> None:
        """Take over the enabled state of another process: eventfds by vector, and the eventfd that unmasks INTx.

        The object owns the descriptors. Makes no ioctl. For the library. Raises IoctlError (EMFILE).
        """
        making = self._making(len(fds))
        wake = making.make_one()
        row = tuple(None if fd is None else self._adopted(fd) for fd in fds)
        self._enabled = Vectors(self._device.seam, self.guard, row, wake)
        self._unmask = None if unmask is None else self._adopted(unmask)

    def _adopted(self, fd: int) -> Eventfd:
        return Eventfd(self._device.seam, self.guard, fd, may_be_shared=True)

    @guarded
    def give_up(self) -> None:
        """Undo `adopt`: the eventfds stay open and belong to the caller. For the library."""
        for eventfd in (*self._row, self._unmask):
            if eventfd is not None:
                eventfd.release()
        self.forget()

    def _end(self, why: VfioError, *, stop: bool) -> None:
        enabled, self._enabled = self._enabled, None
        unmask, self._unmask = self._unmask, None
        if enabled is None:
            return
        # Without an eventfd, the error and request interrupts are disabled, and disabling them again fails (EINVAL).
        stop = stop and (bool(enabled.connected) or self.info.index in _ONE_AT_A_TIME)
        steps: list[Callable[[], object]] = [partial(enabled.end, why)]
        if stop:
            steps.insert(0, partial(self._act, ioctls.VFIO_IRQ_SET_ACTION_TRIGGER, start=0, count=0))
        if unmask is not None:
            steps.append(unmask.close)
        attempt_all(f"disabling {self._name}", steps)

    # ------------------------------------------------------------------------------------------------------- waiting

    def wait(self, vector: int = 0, *, timeout: float | None = None) -> int:
        """Wait until `vector` has been raised. Returns the number of interrupts since the last wait.

        Returns 0 after the timeout. `timeout`: seconds; None or infinity: no limit; 0 or less: do not wait. The kernel
        masks INTx at each interrupt: call `unmask()`. Raises VfioError if the vector is not enabled or is disabled
        meanwhile, ClosedError if the device is closed meanwhile; ForkedError, TypeError, ValueError. If a signal
        handler raises, the count is added to the eventfd again, and the next call returns the count.
        """
        seconds = None if timeout is None else _checked_timeout(timeout)
        deadline = None if seconds is None else time.monotonic() + seconds
        self._device.check_usable()
        number = vector if type(vector) is int else as_number(vector, "vector")
        while True:
            enabled = self._enabled
            if enabled is None or number not in enabled.eventfds:
                enabled = self._look_up((number,))
            try:
                return enabled.wait_one(number, seconds)
            except ReplacedError:
                if deadline is not None:
                    seconds = max(deadline - time.monotonic(), 0.0)

    def wait_any(self, vectors: Iterable[int] | None = None, *, timeout: float | None = None) -> dict[int, int]:
        """Wait until one of `vectors`, by default of all enabled ones, has been raised.

        Returns the number of interrupts since the last wait, by vector; empty after the timeout. Without `vectors`, the
        call also waits for vectors that are added meanwhile. Vectors that share an eventfd are returned together, each
        with the count of the eventfd. `timeout` and errors as for `wait`; ValueError if `vectors` is empty. Cost: a
        poll, and a read for each raised vector.
        """
        seconds = _checked_timeout(timeout)
        self._device.check_usable()
        chosen = None if vectors is None else _checked_vectors(vectors)
        if chosen == ():
            raise ValueError("wait_any needs one vector at least")
        return self._wait(chosen, seconds)

    def _wait(self, vectors: tuple[int, ...] | None, timeout: float | None) -> dict[int, int]:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            enabled = self._look_up(vectors)
            try:
                return enabled.wait(enabled.connected if vectors is None else vectors, timeout)
            except ReplacedError:
                if deadline is not None:
                    timeout = max(deadline - time.monotonic(), 0.0)

    def _look_up(self, vectors: tuple[int, ...] | None) -> Vectors:
        if (enabled := self._enabled) is None:
            raise VfioError(f"{self._name} is not enabled", hint="Call enable() first")
        for vector in vectors or ():
            if not 0 <= vector < len(enabled.row):
                raise ValueError(f"of {self._name} vectors 0 to {len(enabled.row) - 1} are enabled, not {vector}")
            if enabled.row[vector] is None:
                raise VfioError(
                    f"vector {vector} of {self._name} is not enabled",
                    hint=f"The vector has no eventfd: enable(fds=[…], start={vector})",
                )
        return enabled

    # ------------------------------------------------------------------------------------------------------- actions

    def trigger(self, vector: int = 0) -> None:
        """Signal the eventfd of `vector` as if the device had raised the interrupt. Raises as `wait`."""
        self._device.check_usable()  # also in a child, whose parent may have been in the middle of a change
        number = as_number(vector, "vector")
        self._look_up((number,))
        self._act(ioctls.VFIO_IRQ_SET_ACTION_TRIGGER, start=number, count=1)

    def mask(self) -> None:
        """Mask INTx. Raises IoctlError (ENOTTY) for the other kinds."""
        self._act(ioctls.VFIO_IRQ_SET_ACTION_MASK, start=0, count=1)

    def unmask(self) -> None:
        """Unmask INTx, which the kernel masks at each interrupt. Raises IoctlError (ENOTTY) for the other kinds."""
        self._act(ioctls.VFIO_IRQ_SET_ACTION_UNMASK, start=0, count=1)

    @guarded
    def unmask_by(self, fd: int | None) -> None:
        """Let the kernel unmask INTx at each write to the eventfd `fd`; None: end that.

        So a thread or process that has only the eventfd can end the handling of an interrupt, without an ioctl. If the
        eventfd has a count already, INTx is unmasked at once. The descriptor still belongs to the program. `disable`
        ends the unmasking too.

        Raises TypeError; ValueError for a descriptor that is closed or no eventfd; VfioError if INTx is not enabled;
        HandOverError; IoctlError (ENOTTY: not INTx; EBUSY: an eventfd unmasks INTx already).

        Source: VFIO_IRQ_SET_ACTION_UNMASK with VFIO_IRQ_SET_DATA_EVENTFD, `vfio_pci_set_intx_unmask`.
        """
        number = None if fd is None else check_whole_number(fd, "fd")
        self._check_changeable()
        if self._enabled is None:
            raise VfioError(f"{self._name} is not enabled", hint="Call enable() first")
        making = self._making(1)
        try:
            (new,) = making.duplicate([number])
            argument = ioctls.irq_set_eventfds(
                flags=ioctls.VFIO_IRQ_SET_DATA_EVENTFD | ioctls.VFIO_IRQ_SET_ACTION_UNMASK,
                index=self.info.index,
                start=0,
                eventfds=descriptors((new,)),
            )
            self._set_irqs(argument)
        except BaseException:
            making.close()
            raise
        old, self._unmask = self._unmask, new
        if old is not None:
            old.close()

    @property
    def _name(self) -> str:
        return f"{ioctls.VfioPciIrqIndex(self.info.index).name} of {self._device.bdf}"

    def __repr__(self) -> str:
        enabled = self._enabled
        return f"<Irq {self._name} {0 if enabled is None else len(enabled.connected)} of {self.count} enabled>"

    def _act(self, action: int, *, start: int, count: int) -> None:
        size = ctypes.sizeof(ioctls.vfio_irq_set)
        flags = ioctls.VFIO_IRQ_SET_DATA_NONE | action
        self._set_irqs(ioctls.vfio_irq_set(size, flags, self.info.index, start, count))

    def _hint_at_others(self) -> str:
        """Return a hint at another kind of interrupt that is enabled, if a device can have only one of both."""
        enabled = [each.info.index for each in self._device.irqs if each is not self and each.fds]
        others = [ioctls.VfioPciIrqIndex(kind).name for kind in enabled if kind in _ONE_AT_A_TIME]
        if not others or self.info.index not in _ONE_AT_A_TIME:
            return ""
        return f"Only one kind of interrupt can be enabled at a time: device.irq({others[0]}).disable() first"

    def _set_irqs(self, argument: ioctls.vfio_irq_set) -> int:
        hints = {
            errno.EINVAL: self._hint_at_others() or "Only an enabled interrupt accepts this action",
            errno.ENOTTY: "Only INTx can be masked",
            errno.EBUSY: "An eventfd unmasks INTx already: unmask_by(None) ends that",
        }
        return self._device.ioctl(
            "VFIO_DEVICE_SET_IRQS",
            argument,
            hints=hints,
            flags=argument.flags,
            index=argument.index,
            start=argument.start,
            count=argument.count,
        )


def _checked_fds(fds: Sequence[int | None]) -> list[int | None]:
    if isinstance(fds, str | bytes | bytearray | memoryview) or not isinstance(fds, Sequence):
        raise TypeError(f"fds must be a list of descriptors and None, not {type(fds).__name__}")
    return [None if fd is None else check_whole_number(fd, "a descriptor in fds") for fd in fds]


def _checked_vectors(vectors: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(as_number(vector, "a vector") for vector in checked_items(vectors, "vectors")))


def _replaced(row: Row, start: int, new: Row, before: Row) -> Row:
    """Return the row with `new` from `start` on. An eventfd that the vector has under the same number stays."""
    answer = list(row)
    for vector, eventfd in enumerate(new[: len(row) - start], start):
        old = before[vector] if vector < len(before) else None
        stays = eventfd is not None and old is not None and old.number == eventfd.number and eventfd.is_same_as(old)
        answer[vector] = old if stays else eventfd
    return tuple(answer)


def _checked_timeout(timeout: float | None) -> float | None:
    if isinstance(timeout, str | bytes):  # float() would accept text
        raise TypeError(f"timeout is a number of seconds or None, not {type(timeout).__name__}")
    try:
        timeout = math.inf if timeout is None else float(timeout)
    except TypeError:
        raise TypeError(f"timeout is a number of seconds or None, not {type(timeout).__name__}") from None
    if timeout == math.inf:
        return None
    if math.isnan(timeout):
        raise ValueError("timeout is not a number")
    return max(timeout, 0.0)
