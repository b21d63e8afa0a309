"""The old process: everything is described, nobody may change it, and in the end it is forgotten or taken back."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial

from pyvfio import ioctls
from pyvfio.blocks.block import RamBlock
from pyvfio.container import Container, Group
from pyvfio.device import Device, Irq
from pyvfio.device.eventfds import Eventfd
from pyvfio.dma import DmaMapper
from pyvfio.errors import ClosedError, HandOverError, RollbackError, UnsupportedError, as_exception, raise_collected
from pyvfio.guard import ContextManager, Guard, closing, guarded, holding, uninterrupted
from pyvfio.handle import attempt, attempt_all
from pyvfio.iommu.space import Mapping
from pyvfio.live_update.obstacles import find_obstacles
from pyvfio.live_update.state import HandedBlock, HandedDevice, HandedIrq, State
from pyvfio.live_update.vaddr import give_up_all, give_up_vaddr, join_limits, set_vaddr
from pyvfio.mapper.window import Window

logger = logging.getLogger(__name__)


def _undo(update: HandOver) -> None:
    if update.is_new:
        update.cancel()


@uninterrupted(_undo)
def hand_over(mapper: DmaMapper) -> HandOver:
    """Give up the addresses of all mappings of `mapper`, so that another process, or this one after execve(2), can take
    over its blocks, its container and all devices in that. Their DMA goes on.

    Returns the HandOver that there is, if one is under way.

    Raises before anything is touched: UnsupportedError where the kernel has no VFIO_UPDATE_VADDR; HandOverError, with
    the names of the obstacles: memory that is private to this process (`Anonymous`, `File(shared=False)`; use `Memfd`),
    buffers and temporary mappings, other notifiers of the list, mappings of others, IOVA that is reserved for anything
    but blocks of `mapper`, a change that failed, another thread that has only begun to hand over; ReentrancyError from
    inside a hook; ForkedError. Raises IoctlError, and everything is as it was; RollbackError: the hand-over is under
    way, and a second `hand_over` returns it, so that it can be cancelled.

    Synchronization: any thread may call it; it waits for changes of the blocks that are being made.
    Cost: one ioctl, and two small calls for each descriptor.
    """
    if not isinstance(mapper, DmaMapper):
        raise TypeError(f"mapper must be a DmaMapper, not {type(mapper).__name__}")
    container = mapper.space
    if not isinstance(container, Container):
        raise TypeError(f"only memory that is mapped into a Container can be handed over, not {type(container)}")
    mapper.guard.check()
    update = HandOver(mapper, container)
    if (other := _enter(container, update)) is not None:
        return other.begun()
    try:
        update.begin()
    except BaseException as error:
        try:
            update.cancel()
        except Exception as failure:
            raise RollbackError(
                "the hand-over could not begin, and could not be undone",
                [as_exception(error), failure],
                hint="The device reaches what it did. hand_over(mapper) returns a HandOver that can be cancelled",
            ) from error
        raise
    finally:
        update.is_beginning = False
    return update


@guarded
def _enter(container: Container, update: HandOver) -> HandOver | None:
    """Note that `container` is handed over by `update`, or return the HandOver that does it already."""
    if isinstance(container.handing, HandOver):
        return container.handing
    container.handing = update
    return None


class HandOver(ContextManager):
    """A hand-over that is under way: made by `hand_over`. A context manager, whose end cancels unless it is finished.

    `state` and `fds` are the arguments of `take_over`: bytes of JSON, and the descriptors of the container, the groups,
    the devices, the blocks' memory and the interrupts, which stay this process's own. Send them with `socket.send_fds`
    (253 at most in one message), or let a program inherit them: `make_inheritable`.

    Enabled interrupts go along: the devices go on signalling the same eventfds, and the new process has descriptors of
    them, also of those that this program has passed to `enable` and `unmask_by`. A signal stays in the eventfd until
    somebody reads it. Until the end this process can wait for interrupts, but enable and disable none; a signal that
    it reads is not told to the new process. A DirtyTracking does not go along: the kernel goes on tracking, and the
    new process opens one of its own.

    Synchronization: any thread.
    """

    def __init__(self, mapper: DmaMapper, container: Container) -> None:
        self._mapper = mapper
        self._container = container
        self._blocks = mapper.blocks
        self._groups: tuple[Group, ...] = ()
        self._devices: tuple[Device, ...] = ()
        self._given_up = False  # perhaps: set before the call
        self._inheritable: list[int] = []
        self._ended = ""
        self.guard = Guard("this HandOver")
        self.is_beginning = True
        """Whether `hand_over` has not returned yet: another thread must not cancel it."""
        self.is_new = True
        """Whether `hand_over` has returned it once at most."""
        self.state = b""
        """The description for `take_over`."""
        self.fds: tuple[int, ...] = ()
        """The descriptors for `take_over`, in that order."""

    def __repr__(self) -> str:
        return f"<HandOver {self._ended or 'under way'}: {len(self.fds)} descriptors>"

    # ------------------------------------------------------------------------------------------------ begin

    def begun(self) -> HandOver:
        """Itself, for a second `hand_over`."""
        # Not waited for: this may be a hook of the very change that the first one waits for.
        if self.is_beginning:
            raise HandOverError("another thread has begun to hand it over", hint="Call hand_over() once more")
        self.is_new = False
        return self

    @guarded
    def begin(self) -> None:
        """Describe everything, and let nobody change it from now on. For `hand_over`."""
        if self._blocks is not None:
            self._blocks.suspend(self)
        container = self._container
        with holding(self._mapper, container):
            self._groups = tuple(container.groups.values())
            self._devices = tuple(
                device for group in self._groups for device in group.devices if isinstance(device, Device)
            )
            fds = [handle.fd for handle in (container, *self._groups, *self._devices)]
            with holding(*(device.windows for device in self._devices)):
                self._check_obstacles()
                for group in self._groups:
                    group.set_aside()  # from here on no interrupt changes, no BAR is mapped, no device enters low power
            self._describe(fds)
            self._given_up = True
            give_up_all(container)
            container.set_aside()
        logger.debug("handing over %d mappings of %r", len(container.table), container)

    def _check_obstacles(self) -> None:
        self._mapper.check_open()
        if not self._container.check_extension(ioctls.VFIO_UPDATE_VADDR):
            raise UnsupportedError(
                "the kernel cannot hand over mappings: it has no VFIO_UPDATE_VADDR",
                hint="Linux has it from 5.12 on, but not for a container without a group or with a mediated device",
            )
        if obstacles := find_obstacles(self._mapper, self._blocks, self._container):
            raise HandOverError(
                f"{len(obstacles)} {'things' if obstacles[1:] else 'thing'} cannot be handed over: "
                + "; ".join(obstacles[:8]),
                hint="Nothing has been touched",
            )

    def _describe(self, handles: Sequence[int]) -> None:
        kernel = self._container.kernel
        windows = self._mapper.windows()
        files = [block.file for block, _window in windows]
        irqs = [found for device in self._devices for irq in device.irqs if (found := _describe_irq(device, irq))]
        eventfds = [eventfd.fd for _irq, held in irqs for eventfd in held]
        self.fds = (*handles, *(file.fd for file in files if file is not None), *eventfds)
        self.state = State(
            iommu_type=self._container.iommu_type,
            groups=tuple(group.number for group in self._groups),
            devices=tuple(HandedDevice(device.bdf, device.group.number) for device in self._devices),
            policy=self._mapper.policy,
            prefault=self._mapper.prefault,
            container_bits=self._container.dma_bits,
            mapper_bits=self._mapper.dma_bits,
            blocks=tuple(_describe(block, window) for block, window in windows),
            irqs=tuple(irq for irq, _held in irqs),
            identities=tuple(kernel.file_status(fd).identity for fd in self.fds),
        ).dump()

    # ------------------------------------------------------------------------------------------------ the two ends

    @guarded
    def make_inheritable(self) -> tuple[int, ...]:
        """Let a program that is executed have `fds`, under the same numbers; they are returned.

        Every program that is started meanwhile gets them; `cancel` and `finish` make them close-on-exec again.
        """
        self._check_usable()
        for fd in self.fds:
            if not os.get_inheritable(fd):
                self._inheritable.append(fd)
                os.set_inheritable(fd, True)  # noqa: FBT003
        return self.fds

    @guarded
    def cancel(self) -> None:
        """Take everything back: each mapping gets the address that it had, however far the other process has come.

        Call it when the other process has died, or has said that it could not take over. Twice is fine, and after
        `finish` nothing happens. Raises ForkedError; IoctlError or RollbackError where the kernel refuses
        (PinLimitError, one for all mappings: the memory was charged to the other process already, and may not be to
        this one again; ENOENT: the other has taken it over and unmapped some of it): the hand-over is then still under
        way, the device reaches what it did, and `cancel` may be called again.

        Cost: two ioctls for each mapping.
        """
        self._cancel()

    @closing
    def close(self) -> None:
        """As `cancel`, but in a forked child nothing happens."""
        self._cancel()

    def _cancel(self) -> None:
        if self._ended:
            return
        with holding(self._mapper, self._container):
            if self._container.handing is self:  # else nothing has happened
                self._restore()
        if self._blocks is not None:
            self._blocks.resume(self)
        self._close_on_exec()
        self._end("cancelled")

    def _end(self, how: str) -> None:
        self._ended = how
        if self._container.handing is self:
            self._container.handing = None

    def _restore(self) -> None:
        handles = (self._container, *self._groups)
        for handle in handles:
            handle.take_back()
        if not self._given_up:
            return
        failures: list[Exception] = []
        try:
            for mapping in self._container.mappings:
                attempt(partial(self._restore_one, mapping), failures)
            raise_collected("cancelling a hand-over", join_limits(failures, self._container))
        except BaseException:
            for handle in handles:
                handle.set_aside()
            raise
        self._given_up = False

    def _restore_one(self, mapping: Mapping) -> None:
        # Without an address first: the other process may have given it one of its own.
        give_up_vaddr(self._container, mapping)
        set_vaddr(self._container, mapping)

    @guarded
    def finish(self) -> None:
        """Forget and close everything, which the other process has, without a call that reaches the devices or the
        memory that they reach. The blocks' memory is unmapped from this process. Twice is fine.

        Call it when the other process has said that it has taken over. Raises ForkedError; ClosedError when it was
        cancelled; BufferError while a view of a block or of a mapped region lives, and then nothing has been closed;
        otherwise the errors of the steps, after all of them were tried; a second call then tries them again.
        """
        if self._ended != "finished":
            self._check_usable()
        blocks = self._blocks
        with holding(*([blocks] if blocks is not None else [])):  # so that nobody takes a view meanwhile
            for block in blocks or ():
                block.state.check_views(0)
            for device in self._devices:
                device.check_views()
            self._end("finished")  # from here on there is no way back
            self._forget()

    def _forget(self) -> None:
        steps: list[Callable[[], object]] = [self._close_on_exec, self._mapper.forget]
        if self._blocks is not None:
            steps += [self._blocks.forget, partial(self._blocks.resume, self)]
        steps += [device.forget for device in self._devices]
        steps += [handle.close_fd for handle in (*self._groups, self._container)]
        attempt_all("forgetting what was handed over", steps)
        self._container.table.clear()
        self._container.groups.clear()

    def _close_on_exec(self) -> None:
        while self._inheritable:
            os.set_inheritable(self._inheritable[-1], False)  # noqa: FBT003
            self._inheritable.pop()

    def _check_usable(self) -> None:
        if self._ended:
            raise ClosedError(f"this hand-over is {self._ended}")


def _describe_irq(device: Device, irq: Irq) -> tuple[HandedIrq, tuple[Eventfd, ...]] | None:
    """An interrupt that is enabled, and its eventfds."""
    row, unmask = irq.held()
    if not row:
        return None
    held = tuple(eventfd for eventfd in (*row, unmask) if eventfd is not None)
    handed = HandedIrq(
        bdf=device.bdf,
        index=irq.info.index,
        count=len(row),
        vectors=tuple(vector for vector, eventfd in enumerate(row) if eventfd is not None),
        unmasked=unmask is not None,
        eventfds=tuple(eventfd.identity for eventfd in held),
    )
    return handed, held


def _describe(block: RamBlock, window: Window) -> HandedBlock:
    return HandedBlock(
        idstr=block.idstr,
        used_length=block.used_length,
        max_length=block.max_length,
        iova=window.iova,
        memory=block.state.memory.kind,
        readonly=block.readonly,
        prealloc=block.prealloc,
        settings=block.settings,
        discarded=block.discarded,
        pieces=tuple(window.pieces()),
        policy=window.policy,
    )
