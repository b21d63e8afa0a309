"""The interrupts of a device, which arrive at eventfds.

Source: drivers/vfio/pci/vfio_pci_intrs.c.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from operator import index as as_number
from typing import Protocol

from pyvfio import ioctls
from pyvfio.errors import ClosedError, IoctlError, UnsupportedError, VfioError
from pyvfio.guard import Guard, guarded, run_outside, uninterrupted
from pyvfio.handle import attempt_all
from pyvfio.info import IrqInfo
from pyvfio.kernel import IoctlArgument, Kernel


class _Owner(Protocol):
    """The device that raises them."""

    bdf: str

    @property
    def kernel(self) -> Kernel: ...

    @property
    def fd(self) -> int: ...

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


class _Eventfds:
    """The eventfds of an interrupt from enable to disable, and one that is raised at the end, for waiting threads.

    While a thread waits, the descriptors stay open, so that no number is another file's: they are closed when the last
    thread has returned and nothing refers to the object any more.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._guard = Guard("the eventfds of an interrupt")
        self._waiting: set[object] = set()
        self._ended: VfioError | None = None
        self.fds: tuple[int, ...] = ()
        self._end_fd = kernel.eventfd(0, os.EFD_NONBLOCK)

    def open(self, count: int) -> None:
        """Make `count` eventfds."""
        for _ in range(count):
            self.fds += (self._kernel.eventfd(0, os.EFD_NONBLOCK),)

    def end(self, why: VfioError) -> None:
        """Wake the threads that wait, with that error."""
        self._ended = why  # before the look at who waits: a thread looks in the other order
        if self._waiting:
            self._kernel.eventfd_write(self._end_fd, 1)
        else:
            self.close()

    def wait(self, vector: int, timeout: float | None) -> int:
        """As `Irq.wait`."""
        me = object()
        self._waiting.add(me)
        try:
            return self._wait(vector, timeout)
        except BlockingIOError:  # another thread has read it
            return 0
        finally:
            self._waiting.discard(me)

    def _wait(self, vector: int, timeout: float | None) -> int:
        found = self._ended is not None or self._kernel.poll(self.fds[vector], timeout, self._end_fd)
        if self._ended is not None:
            raise type(self._ended)(self._ended.message)
        return self._kernel.eventfd_read(self.fds[vector]) if found else 0

    @uninterrupted()
    def close(self) -> None:
        """Close the descriptors, which no thread uses; twice is fine."""
        fds, self.fds, self._end_fd = (self._end_fd, *self.fds), (), -1
        attempt_all("closing eventfds", [partial(self._kernel.close, fd) for fd in fds if fd >= 0])

    def __del__(self) -> None:
        if getattr(self, "_end_fd", -1) >= 0 and not self._guard.forked:
            run_outside(self.close)


class Irq:
    """One kind of interrupt of a device: INTx, MSI, MSI-X, error or request; signalled through eventfds.

    Synchronization: any thread. `wait` holds no lock, and raises when another thread disables the interrupt or closes
    the device. Cost: an ioctl each; `wait` polls and reads. Source: `vfio_pci_set_irqs_ioctl`.
    """

    def __init__(self, device: _Owner, info: IrqInfo) -> None:
        self._device = device
        self._enabled: _Eventfds | None = None
        self.info = info
        self.guard = Guard(self._name)

    @property
    def count(self) -> int:
        """How many vectors the device has of this kind; 0: none."""
        return self.info.count

    @property
    def fds(self) -> tuple[int, ...]:
        """The eventfds of the enabled vectors, in their order; `disable` closes them."""
        enabled = self._enabled
        return () if enabled is None else enabled.fds

    @guarded
    def enable(self, vectors: int = 1) -> tuple[int, ...]:
        """Route the first `vectors` vectors to new eventfds, which are returned and closed by `disable`.

        Raises TypeError and ValueError for less than one, UnsupportedError when the device has fewer, VfioError when
        the interrupt is enabled already, IoctlError (EINVAL: another kind is enabled; EMFILE: no descriptor is left).
        """
        vectors = as_number(vectors)
        if vectors < 1:
            raise ValueError(f"at least one vector can be enabled, not {vectors}")
        if not 1 <= vectors <= self.count or not self.info.flags & ioctls.VFIO_IRQ_INFO_EVENTFD:
            raise UnsupportedError(
                f"{self._name} has {self.count} vectors, so {vectors} cannot be enabled",
                hint=f"This device has {self._device.describe_irqs()}",
            )
        if self._enabled is not None:
            raise VfioError(f"{self._name} is enabled already", hint="Call disable() first")
        self._device.check_usable()
        enabled = self._open(vectors)
        try:
            self._route(enabled.fds)
        except BaseException:
            enabled.close()
            raise
        self._enabled = enabled
        return self.fds

    def _open(self, vectors: int) -> _Eventfds:
        made: _Eventfds | None = None
        try:
            made = _Eventfds(self._device.kernel)
            made.open(vectors)
        except OSError as error:
            if made is not None:
                made.close()
            hint = "Close files, or raise the limit of open ones: ulimit -n"
            raise IoctlError.of(
                error,
                f"{self._name}: no eventfds for {vectors} vectors: {error.strerror}",
                request="eventfd",
                arguments={"device": self._device.bdf, "index": self.info.index, "vectors": vectors},
                hint=hint if error.errno in (errno.EMFILE, errno.ENFILE) else "",
            ) from error
        return made

    def _route(self, fds: Sequence[int]) -> None:
        argument = ioctls.irq_set_eventfds(
            flags=ioctls.VFIO_IRQ_SET_DATA_EVENTFD | ioctls.VFIO_IRQ_SET_ACTION_TRIGGER,
            index=self.info.index,
            start=0,
            eventfds=fds,
        )
        available = self._set_irqs(argument)
        if available > 0:  # vfio_msi_enable: how many vectors there are, and none has been enabled
            raise UnsupportedError(f"{self._name}: only {available} of {len(fds)} vectors are available")

    @guarded
    def disable(self) -> None:
        """Stop all vectors and close the eventfds; twice is fine. Waiting threads are woken with a VfioError."""
        self._end(VfioError(f"{self._name} was disabled"), stop=True)

    @guarded
    def close(self) -> None:
        """As `disable`, but waiting threads are woken with ClosedError; for the device, when it is closed."""
        self._end(ClosedError(f"device {self._device.bdf} has been closed"), stop=True)

    @guarded
    def forget(self) -> None:
        """As `close`, but the device goes on signalling the eventfds, which another process has. For the library."""
        self._end(ClosedError(f"device {self._device.bdf} was handed to another process"), stop=False)

    def _end(self, why: VfioError, *, stop: bool) -> None:
        enabled, self._enabled = self._enabled, None
        if enabled is None:
            return
        steps = [partial(self._act, ioctls.VFIO_IRQ_SET_ACTION_TRIGGER, start=0, count=0)] if stop else []
        attempt_all(f"disabling {self._name}", [*steps, partial(enabled.end, why)])

    def wait(self, vector: int = 0, *, timeout: float | None = None) -> int:
        """Wait until `vector` has been raised; how often since the last time, 0 when the time has passed.

        `timeout` in seconds; None or infinity: for ever; 0 or less: do not wait. INTx stays masked by the kernel after
        each: `unmask()`. Raises VfioError when the interrupt is not enabled or is disabled meanwhile, ClosedError when
        the device is closed meanwhile; ForkedError, TypeError, ValueError.
        """
        seconds = _checked_timeout(timeout)
        self._device.check_usable()
        return self._wait_for(vector).wait(as_number(vector), seconds)

    def _wait_for(self, vector: int) -> _Eventfds:
        if (enabled := self._enabled) is None:
            raise VfioError(f"{self._name} is not enabled", hint="Call enable() first")
        if not 0 <= as_number(vector) < len(enabled.fds):
            raise ValueError(f"of {self._name} vectors 0 to {len(enabled.fds) - 1} are enabled, not {vector}")
        return enabled

    def trigger(self, vector: int = 0) -> None:
        """Signal the eventfd of `vector` as if the device had raised it. Raises as `wait`."""
        self._device.check_usable()  # in a child, too, whose parent was in the middle of a change
        self._wait_for(vector)
        self._act(ioctls.VFIO_IRQ_SET_ACTION_TRIGGER, start=as_number(vector), count=1)

    def mask(self) -> None:
        """Mask INTx. Raises IoctlError (ENOTTY) for the other kinds."""
        self._act(ioctls.VFIO_IRQ_SET_ACTION_MASK, start=0, count=1)

    def unmask(self) -> None:
        """Unmask INTx, which the kernel masks at each interrupt. Raises IoctlError (ENOTTY) for the other kinds."""
        self._act(ioctls.VFIO_IRQ_SET_ACTION_UNMASK, start=0, count=1)

    @property
    def _name(self) -> str:
        return f"{ioctls.VfioPciIrqIndex(self.info.index).name} of {self._device.bdf}"

    def __repr__(self) -> str:
        return f"<Irq {self._name} {len(self.fds)} of {self.count} enabled>"

    def _act(self, action: int, *, start: int, count: int) -> None:
        size = ctypes.sizeof(ioctls.vfio_irq_set)
        flags = ioctls.VFIO_IRQ_SET_DATA_NONE | action
        self._set_irqs(ioctls.vfio_irq_set(size, flags, self.info.index, start, count))

    def _set_irqs(self, argument: ioctls.vfio_irq_set) -> int:
        hints = {
            errno.EINVAL: "Only one kind of interrupt can be enabled at a time, and only what is enabled can act",
            errno.ENOTTY: "Only INTx can be masked",
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


def _checked_timeout(timeout: float | None) -> float | None:
    if isinstance(timeout, str | bytes):  # which float() would take
        raise TypeError(f"timeout is a number of seconds or None, not {type(timeout).__name__}")
    timeout = math.inf if timeout is None else float(timeout)
    if timeout == math.inf:
        return None
    if math.isnan(timeout):
        raise ValueError("timeout is not a number")
    return max(timeout, 0.0)
