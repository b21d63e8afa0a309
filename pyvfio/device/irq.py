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
from typing import Protocol

from pyvfio import ioctls
from pyvfio.errors import UnsupportedError, VfioError
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

    @property
    def _forked(self) -> bool: ...

    def describe_irqs(self) -> str: ...

    def _ioctl(
        self,
        request: str,
        argument: IoctlArgument = 0,
        /,
        *,
        hints: Mapping[int, str] | None = None,
        **given: int | str,
    ) -> int: ...


class Irq:
    """One kind of interrupt of a device: INTx, MSI, MSI-X, error or request; signalled through eventfds.

    Synchronization: `wait` may be called from any thread; enabling and disabling are the caller's to order, and
    disabling does not wake who waits. Cost: an ioctl each; `wait` polls and reads. Source: `vfio_pci_set_irqs_ioctl`.
    """

    def __init__(self, device: _Owner, info: IrqInfo) -> None:
        self._device = device
        self.info = info
        self.fds: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """How many vectors the device has of this kind; 0: none."""
        return self.info.count

    def enable(self, vectors: int = 1) -> tuple[int, ...]:
        """Route the first `vectors` vectors to new eventfds, which are returned and closed by `disable`.

        Raises ValueError for less than one, UnsupportedError when the device has fewer, VfioError when it is enabled
        already, IoctlError (EINVAL: another kind is enabled), OSError (EMFILE: no descriptor is left).
        """
        if vectors < 1:
            raise ValueError(f"at least one vector can be enabled, not {vectors}")
        if not 1 <= vectors <= self.count or not self.info.flags & ioctls.VFIO_IRQ_INFO_EVENTFD:
            raise UnsupportedError(
                f"{self._name} has {self.count} vectors, so {vectors} cannot be enabled",
                hint=f"This device has {self._device.describe_irqs()}",
            )
        if self.fds:
            raise VfioError(f"{self._name} is enabled already", hint="Call disable() first")
        kernel, fds = self._device.kernel, list[int]()
        try:
            for _ in range(vectors):
                fds.append(kernel.eventfd(0, os.EFD_NONBLOCK))
            self._route(fds)
        except BaseException:
            for fd in fds:
                kernel.close(fd)
            raise
        self.fds = tuple(fds)
        return self.fds

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

    def disable(self) -> None:
        """Stop all vectors and close the eventfds; twice is fine."""
        if not self.fds:
            return
        fds, self.fds = self.fds, ()
        stop = partial(self._act, ioctls.VFIO_IRQ_SET_ACTION_TRIGGER, start=0, count=0)
        attempt_all(f"disabling {self._name}", [stop, *(partial(self._device.kernel.close, fd) for fd in fds)])

    def _forget(self) -> None:
        """Close the eventfds and leave the device as it is."""
        fds, self.fds = self.fds, ()
        attempt_all(f"forgetting {self._name}", [partial(self._device.kernel.close, fd) for fd in fds])

    def wait(self, vector: int = 0, *, timeout: float | None = None) -> int:
        """Wait until `vector` has been raised; how often since the last time, 0 when the time has passed.

        `timeout` in seconds; None or infinity: for ever; 0 or less: do not wait. INTx stays masked by the kernel after
        each: `unmask()`. Raises VfioError when that vector is not enabled, or is disabled meanwhile; ForkedError.
        """
        assert self._device.fd >= 0  # raises where it must not be used
        fd = self._eventfd(vector)
        if not self._device.kernel.poll(fd, _checked_timeout(timeout)):
            return 0
        if fd not in self.fds:  # its number may be another's by now
            raise VfioError(f"vector {vector} of {self._name} was disabled while it was waited for")
        try:
            return self._device.kernel.eventfd_read(fd)
        except BlockingIOError:  # another thread has read it
            return 0

    def _eventfd(self, vector: int) -> int:
        if not self.fds:
            raise VfioError(f"{self._name} is not enabled", hint="Call enable() first")
        if not 0 <= vector < len(self.fds):
            raise ValueError(f"of {self._name} vectors 0 to {len(self.fds) - 1} are enabled, not {vector}")
        return self.fds[vector]

    def trigger(self, vector: int = 0) -> None:
        """Signal the eventfd of `vector` as if the device had raised it. Raises as `wait`."""
        assert self._eventfd(vector) >= 0
        self._act(ioctls.VFIO_IRQ_SET_ACTION_TRIGGER, start=vector, count=1)

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

    def __del__(self) -> None:
        if getattr(self, "fds", ()) and not self._device._forked:
            for fd in self.fds:  # forgotten with its device, which closes only what is its own
                self._device.kernel.close(fd)

    def _act(self, action: int, *, start: int, count: int) -> None:
        size = ctypes.sizeof(ioctls.vfio_irq_set)
        flags = ioctls.VFIO_IRQ_SET_DATA_NONE | action
        self._set_irqs(ioctls.vfio_irq_set(size, flags, self.info.index, start, count))

    def _set_irqs(self, argument: ioctls.vfio_irq_set) -> int:
        hints = {
            errno.EINVAL: "Only one kind of interrupt can be enabled at a time, and only what is enabled can act",
            errno.ENOTTY: "Only INTx can be masked",
        }
        return self._device._ioctl(
            "VFIO_DEVICE_SET_IRQS",
            argument,
            hints=hints,
            flags=argument.flags,
            index=argument.index,
            start=argument.start,
            count=argument.count,
        )


def _checked_timeout(timeout: float | None) -> float | None:
    if timeout is None or timeout == math.inf:
        return None
    if math.isnan(timeout):
        raise ValueError("timeout is not a number")
    return max(float(timeout), 0.0)
