"""The interrupts of a fake PCI device: VFIO_DEVICE_SET_IRQS and the eventfds that are signalled.

Source: drivers/vfio/vfio_main.c (`vfio_set_irqs_validate_and_prepare`) and pci/vfio_pci_intrs.c.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pyvfio import ioctls
from pyvfio.testing.fake.process import Argument, refuse
from pyvfio.testing.fake.versions import KernelVersion
from pyvfio.testing.fake.virqfd import Virqfd

INTX = int(ioctls.VFIO_PCI_INTX_IRQ_INDEX)
MSI = int(ioctls.VFIO_PCI_MSI_IRQ_INDEX)
MSIX = int(ioctls.VFIO_PCI_MSIX_IRQ_INDEX)
ERR = int(ioctls.VFIO_PCI_ERR_IRQ_INDEX)
REQ = int(ioctls.VFIO_PCI_REQ_IRQ_INDEX)
_NONE = int(ioctls.VFIO_IRQ_SET_DATA_NONE)
_BOOL = int(ioctls.VFIO_IRQ_SET_DATA_BOOL)
_EVENTFD = int(ioctls.VFIO_IRQ_SET_DATA_EVENTFD)
_DATA = _NONE | _BOOL | _EVENTFD
_MASK = int(ioctls.VFIO_IRQ_SET_ACTION_MASK)
_UNMASK = int(ioctls.VFIO_IRQ_SET_ACTION_UNMASK)
_TRIGGER = int(ioctls.VFIO_IRQ_SET_ACTION_TRIGGER)
_ACTION = _MASK | _UNMASK | _TRIGGER
_HEAD = struct.Struct("=IIIII")
_U32_MAX = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class _Set:
    index: int
    start: int
    count: int
    data: int
    action: int
    values: Sequence[int]  # eventfds, or bools

    @property
    def disables(self) -> bool:
        return self.data == _NONE and not self.count

    def fires(self, position: int) -> bool:
        return self.data == _NONE or bool(self.values[position])


def hold_eventfd(fd: int) -> int | None:
    """Return a new descriptor of an eventfd, or None for a negative `fd`. Raises EBADF, EINVAL (no eventfd)."""
    # The kernel holds the context of the eventfd, so that the caller may close the descriptor. A duplicate does the
    # same.
    if fd < 0:
        return None
    try:
        held = os.dup(fd)
    except OSError:
        refuse(errno.EBADF)
    if os.readlink(f"/proc/self/fd/{held}") != "anon_inode:[eventfd]":
        os.close(held)
        refuse(errno.EINVAL)
    return held


def _signal(held: int | None, times: int = 1) -> None:
    if held is not None:
        with contextlib.suppress(BlockingIOError):  # a counter at its maximum stays there
            os.eventfd_write(held, times)


class Irqs:
    """The eventfd that each vector signals. One of INTx, MSI and MSI-X is enabled at a time.

    `counts`: the number of vectors of the device by index.
    """

    def __init__(self, *, version: KernelVersion, counts: Sequence[int], lock: threading.RLock) -> None:
        self._version = version
        self._lock = lock
        self._counts = counts
        self._enabled: int | None = None
        self._triggers: list[int | None] = []
        self._single: dict[int, int | None] = {ERR: None, REQ: None}
        self._masked = False
        self._disabled = False
        self._pending = False
        self._line = False
        self._unmask: Virqfd | None = None
        self._handlers: dict[tuple[int, int], Callable[[_Set], int]] = {
            (INTX, _MASK): self._mask_intx,
            (INTX, _UNMASK): self._mask_intx,
            (INTX, _TRIGGER): self._set_intx,
            (MSI, _TRIGGER): self._set_messages,
            (MSIX, _TRIGGER): self._set_messages,
            (ERR, _TRIGGER): self._set_single,
            (REQ, _TRIGGER): self._set_single,
        }

    def info(self, index: int) -> tuple[int, int]:
        """Return the flags and the count of `VFIO_DEVICE_GET_IRQ_INFO`."""
        flags = ioctls.VFIO_IRQ_INFO_EVENTFD
        if index == INTX:
            flags |= ioctls.VFIO_IRQ_INFO_MASKABLE | ioctls.VFIO_IRQ_INFO_AUTOMASKED
        elif not (index == MSIX and self._version.dynamic_msix and self._counts[MSIX]):
            flags |= ioctls.VFIO_IRQ_INFO_NORESIZE
        return int(flags), self._counts[index]

    @property
    def enabled(self) -> int | None:
        """The enabled one of INTx, MSI and MSI-X, or None."""
        return self._enabled

    def set_line(self, *, up: bool) -> None:
        """Set the INTx line of the device. While the line is up, an unmasked INTx is signalled and masked."""
        self._line = up
        self._deliver_line()

    def quieten(self) -> None:
        """Lower the line after a reset of the device. Eventfds and the mask stay."""
        self._line = self._pending = False

    def _deliver_line(self) -> None:
        if self._line and self._enabled == INTX and not self._masked and self._triggers[0] is not None:
            self._masked = True
            _signal(self._triggers[0])

    def set_intx_disable(self, *, disabled: bool) -> None:
        """Set the INTx disable bit of PCI COMMAND, which masks and unmasks on a change (`vfio_basic_config_write`)."""
        if disabled == self._disabled:
            return
        self._disabled = disabled
        if self._enabled == INTX:
            self._set_masked(masked=disabled)

    def _set_masked(self, *, masked: bool) -> None:
        self._masked = masked or self._disabled  # while INTx is disabled, vfio_pci_intx_unmask_handler does nothing
        if self._pending and not self._masked:
            self._pending = False
            self.raise_interrupt(0)
        self._deliver_line()

    def release(self) -> None:
        """Drop all eventfds after the last descriptor of the device was closed."""
        self._disable()
        self._disabled = False
        for index, held in self._single.items():
            self._let_go(held)
            self._single[index] = None

    def raise_interrupt(self, vector: int) -> None:
        """Raise an interrupt as the device: a message, or INTx, which is then masked until the driver unmasks INTx."""
        if self._enabled == INTX:
            if self._masked:
                self._pending = True
                return
            self._masked = True
        if vector < len(self._triggers):
            _signal(self._triggers[vector])

    def signal(self, index: int, vector: int, times: int) -> bool:
        """Add `times` to the eventfd of a vector, also of a masked INTx. Return whether the vector has an eventfd."""
        triggers = self._triggers if self._enabled == index else []
        held = self._single.get(index) if index in self._single else (triggers[vector : vector + 1] or [None])[0]
        _signal(held, times)
        return held is not None

    def request(self) -> None:
        """Signal VFIO_PCI_REQ_IRQ_INDEX: the kernel requests the device back (`vfio_pci_core_request`)."""
        _signal(self._single[REQ])

    # ------------------------------------------------------------------------------------- VFIO_DEVICE_SET_IRQS

    def set_irqs(self, argument: Argument) -> int:
        """EFAULT, EINVAL, ENOTTY (no such action on this index), EBADF and EINVAL (eventfd)."""
        request = self._read(argument)
        handler = self._handlers.get((request.index, request.action))
        if handler is None:
            refuse(errno.ENOTTY)
        return handler(request)

    def _read(self, argument: Argument) -> _Set:
        argsz, flags, index, start, count = _HEAD.unpack(argument.read(_HEAD.size))
        if argsz < _HEAD.size or index >= len(self._counts) or count >= _U32_MAX - start or flags & ~(_DATA | _ACTION):
            refuse(errno.EINVAL)
        if start >= self._counts[index] or start + count > self._counts[index]:
            refuse(errno.EINVAL)
        element = {_NONE: "0s", _BOOL: "B", _EVENTFD: "i"}.get(flags & _DATA)
        if element is None:
            refuse(errno.EINVAL)
        size = struct.calcsize(element) * count
        if argsz - _HEAD.size < size:
            refuse(errno.EINVAL)
        values = struct.unpack(f"={count}{element}", argument.read(size, _HEAD.size)) if size else ()
        return _Set(index, start, count, flags & _DATA, flags & _ACTION, values)

    def _let_go(self, held: int | None) -> None:
        if held is not None:
            os.close(held)

    def _disable(self) -> None:
        for held in self._triggers:
            self._let_go(held)
        self._end_unmask()
        self._triggers, self._enabled, self._masked, self._pending = [], None, False, False

    def _set_trigger(self, vector: int, fd: int) -> None:
        # The old eventfd is released first, and stays released if the new one is refused (vfio_msi_set_vector_signal).
        if vector >= len(self._triggers):  # MSI cannot grow (vfio_msi_alloc_irq)
            return None if fd < 0 else refuse(errno.EINVAL)
        self._let_go(self._triggers[vector])
        self._triggers[vector] = None
        self._triggers[vector] = hold_eventfd(fd)
        return None

    def _set_intx(self, request: _Set) -> int:
        if self._enabled == INTX and request.disables:
            self._disable()
            return 0
        if self._enabled not in (INTX, None) or request.start or request.count != 1:
            refuse(errno.EINVAL)
        if request.data == _EVENTFD:
            self._connect_intx(hold_eventfd(request.values[0]))
        elif self._enabled != INTX:
            refuse(errno.EINVAL)
        elif request.fires(0) and not self._disabled:
            _signal(self._triggers[0])
        return 0

    def _connect_intx(self, new: int | None) -> None:
        # The new eventfd is taken first, so that a refused one changes nothing. 6.1 does the same from 6.1.84 on.
        if self._enabled is None:
            self._enable(INTX, vectors=1)
            self._masked = self._disabled
        self._let_go(self._triggers[0])
        self._triggers[0] = new
        self._deliver_line()

    def _mask_intx(self, request: _Set) -> int:
        if self._enabled != INTX or request.start or request.count != 1:
            refuse(errno.EINVAL)
        if request.data == _EVENTFD:
            return self._unmask_by_eventfd(request)
        if request.fires(0):
            self._set_masked(masked=request.action == _MASK)
        return 0

    def _unmask_by_eventfd(self, request: _Set) -> int:
        if request.action == _MASK:
            refuse(errno.ENOTTY)
        new = hold_eventfd(request.values[0])
        if new is not None and self._unmask is not None:
            os.close(new)
            refuse(errno.EBUSY)
        self._end_unmask()
        if new is not None:
            self._unmask = Virqfd(new, self._lock, self._unmask_signalled)
            if self._unmask.pending:
                self._unmask_signalled()
        return 0

    def _unmask_signalled(self) -> None:
        # vfio_pci_intx_unmask_handler; if the line is still up, vfio_send_intx_eventfd follows
        self._set_masked(masked=False)

    def _end_unmask(self) -> None:
        if self._unmask is not None:
            self._unmask.close()
            self._unmask = None

    def _enable(self, index: int, *, vectors: int) -> None:
        if self._enabled is None:
            self._enabled, self._triggers = index, [None] * vectors

    def _set_messages(self, request: _Set) -> int:
        if self._enabled == request.index and request.disables:
            self._disable()
            return 0
        if self._enabled not in (request.index, None):
            refuse(errno.EINVAL)
        if request.data == _EVENTFD:
            return self._connect_messages(request)
        beyond = request.start + request.count > len(self._triggers)
        if self._enabled is None or (beyond and not self._version.dynamic_msix):
            refuse(errno.EINVAL)
        for position, held in enumerate(self._triggers[request.start : request.start + request.count]):
            if request.fires(position):
                _signal(held)
        return 0

    def _connect_messages(self, request: _Set) -> int:
        if self._enabled is None and not request.start + request.count:
            refuse(errno.ERANGE)  # pci_alloc_irq_vectors of none
        was_enabled = self._enabled is not None
        self._enable(request.index, vectors=request.start + request.count)
        if request.start + request.count > len(self._triggers):
            self._grow(request)
        try:
            self._set_block(request)
        except OSError:
            if not was_enabled:
                self._disable()
            raise
        return 0

    def _grow(self, request: _Set) -> None:
        # From 6.5 on MSI-X vectors are allocated one by one. Any vector beyond the enabled ones can be set to no
        # eventfd.
        end = request.start + request.count
        if not self._version.dynamic_msix:
            refuse(errno.EINVAL)
        if request.index == MSIX:
            self._triggers += [None] * (end - len(self._triggers))

    def _set_block(self, request: _Set) -> None:
        for done, fd in enumerate(request.values):
            try:
                self._set_trigger(request.start + done, fd)
            except OSError:
                for earlier in range(done):
                    self._set_trigger(request.start + earlier, -1)
                raise

    def _set_single(self, request: _Set) -> int:
        # vfio_pci_set_ctx_trigger_single
        held = self._single[request.index]
        if request.data == _EVENTFD:
            return self._set_single_eventfd(request, held)
        if request.data == _BOOL and not request.count:
            refuse(errno.EINVAL)
        if held is None:
            return 0 if request.data == _BOOL else refuse(errno.EINVAL)
        if not request.count:
            self._let_go(held)
            self._single[request.index] = None
        elif request.fires(0):
            _signal(held)
        return 0

    def _set_single_eventfd(self, request: _Set, held: int | None) -> int:
        if not request.count:
            refuse(errno.EINVAL)
        fd = request.values[0]
        if fd < -1:  # 6.1 does nothing and returns 0
            return 0 if self._version.number < (6, 5) else refuse(errno.EINVAL)
        new = hold_eventfd(fd)
        self._let_go(held)
        self._single[request.index] = new
        return 0
