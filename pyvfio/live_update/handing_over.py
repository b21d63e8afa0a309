"""The old process: everything is described, nobody may change it, and in the end it is forgotten or taken back."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Self

from pyvfio import ioctls
from pyvfio.blocks.block import RamBlock
from pyvfio.container import Container, Group
from pyvfio.device import Device
from pyvfio.dma import DmaMapper
from pyvfio.errors import ClosedError, ForkedError, HandOverError, RollbackError, UnsupportedError, as_exception
from pyvfio.extents import Extent
from pyvfio.handle import Handle, attempt_all
from pyvfio.iommu.space import Mapping
from pyvfio.live_update.obstacles import find_obstacles
from pyvfio.live_update.state import HandedBlock, HandedDevice, State
from pyvfio.live_update.vaddr import give_up_all, give_up_vaddr, set_vaddr

logger = logging.getLogger(__name__)


def hand_over(mapper: DmaMapper) -> HandOver:
    """Give up the addresses of all that `mapper` has mapped, so that another process, or this one after execve(2), can
    take over its blocks, its container and all devices in that. Their DMA goes on.

    While they are being handed over already, the HandOver that there is; HandOverError where another thread has only
    begun with it.

    Before anything is touched it raises UnsupportedError where the kernel has no VFIO_UPDATE_VADDR, and HandOverError,
    with the names of what stands in the way: memory that is private to this process (`Anonymous`, `File(shared=False)`;
    `Memfd` is what can be handed over), buffers and temporary mappings, other notifiers of the list, mappings that
    somebody else has made, a change that failed. ReentrancyError from inside a hook; IoctlError: everything is as it
    was; RollbackError: it is still being handed over, and what a second `hand_over` returns can be cancelled.

    Synchronization: any thread may call it; it waits for changes of the blocks that are being made.
    Cost: one ioctl, and two small calls for each descriptor.
    """
    if not isinstance(mapper, DmaMapper):
        raise TypeError(f"mapper must be a DmaMapper, not {type(mapper).__name__}")
    container = mapper.space
    if not isinstance(container, Container):
        raise TypeError(f"only what is mapped into a Container can be handed over, not {type(container).__name__}")
    update = HandOver(mapper, container)
    try:
        with container.guard.lock:
            if isinstance(container.handing, HandOver):
                return container.handing._begun()
            container.handing = update
        update._begin()
    except BaseException as error:
        try:
            update.cancel()
        except Exception as failure:
            raise RollbackError(
                "what was to be handed over could not be, and that could not be undone",
                [as_exception(error), failure],
                hint="The device reaches what it did. hand_over(mapper) returns what can be cancelled once more",
            ) from error
        raise
    finally:
        update._beginning = False
    return update


class HandOver:
    """What is being handed over: made by `hand_over`. A context manager, whose end cancels unless it is finished.

    `state` and `fds` are what `take_over` wants: bytes of JSON, and the descriptors of the container, the groups, the
    devices and the blocks' memory, which stay this process's own. Send them with `socket.send_fds` (253 at most in one
    message), or let a program inherit them: `make_inheritable`.

    Eventfds of interrupts go on being signalled and are not among `fds`: send `irq.fds` yourself where the new process
    is to count on in them, or let it `enable` its own, which takes their place. Nor does a DirtyTracking go along: the
    kernel goes on tracking, and the new process opens one of its own.

    Synchronization: one thread at a time.
    """

    def __init__(self, mapper: DmaMapper, container: Container) -> None:
        self._mapper = mapper
        self._container = container
        self._blocks = mapper.blocks
        self._groups: tuple[Group, ...] = ()
        self._devices: tuple[Device, ...] = ()
        self._beginning = True  # nobody but whoever makes it may have it
        self._given_up = False  # perhaps: set before the call
        self._inheritable: list[int] = []
        self._ended = ""
        self._pid = os.getpid()
        self.state = b""
        """What there is, for `take_over`."""
        self.fds: tuple[int, ...] = ()
        """Its descriptors, for `take_over`; in that order."""

    def __repr__(self) -> str:
        return f"<HandOver {self._ended or 'under way'}: {len(self.fds)} descriptors>"

    # ------------------------------------------------------------------------------------------------ begin

    def _begun(self) -> HandOver:
        self._check_owner()
        # Not waited for: it may wait for the change that a hook is part of which has called this.
        if self._beginning:
            raise HandOverError("another thread has begun to hand it over", hint="Call hand_over() once more")
        return self

    def _begin(self) -> None:
        if self._blocks is not None:
            self._blocks.suspend(self)
        container = self._container
        with self._mapper.guard.lock, container.guard.lock:
            self._groups = tuple(container.groups.values())
            self._devices = tuple(
                device for group in self._groups for device in group.devices if isinstance(device, Device)
            )
            self._check()
            self._describe()
            self._given_up = True
            give_up_all(container)
            for handle in (container, *self._groups):
                handle.set_aside()
        logger.debug("handing over %d mappings of %r", len(container.table), container)

    def _check(self) -> None:
        self._mapper.check_open()
        if not self._container.check_extension(ioctls.VFIO_UPDATE_VADDR):
            raise UnsupportedError(
                "the kernel cannot hand over what is mapped: it has no VFIO_UPDATE_VADDR",
                hint="Linux has it from 5.12 on, but not for a container without a group or with a mediated device",
            )
        if obstacles := find_obstacles(self._mapper, self._blocks, self._container):
            raise HandOverError(
                f"{len(obstacles)} {'things' if obstacles[1:] else 'thing'} cannot be handed over: "
                + "; ".join(obstacles[:8]),
                hint="Nothing has been touched",
            )

    def _describe(self) -> None:
        policy, kernel = self._mapper.policy, self._container.kernel
        blocks = dict(self._mapper.windows())
        files = [block.file for block in blocks]
        handles: list[Handle] = [self._container, *self._groups, *self._devices]
        self.fds = (*(handle.fd for handle in handles), *(file.fd for file in files if file is not None))
        self.state = State(
            iommu_type=self._container.iommu_type,
            groups=tuple(group.number for group in self._groups),
            devices=tuple(HandedDevice(device.bdf, device.group.number) for device in self._devices),
            policy=policy,
            prefault=self._mapper.prefault,
            blocks=tuple(_describe(block, window.iova, window.pieces()) for block, window in blocks.items()),
            identities=tuple(kernel.file_status(fd).identity for fd in self.fds),
        ).dump()

    # ------------------------------------------------------------------------------------------------ the two ends

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

    def cancel(self) -> None:
        """This process has it, as before: everything gets the address that it had, however far the other process has
        come.

        Call it when that one has died, or has said that it could not take over. Twice is fine, and so is a HandOver
        that is finished: nothing happens then. Raises ForkedError; IoctlError or RollbackError where the kernel refuses
        (PinLimitError: the memory was charged to the other process already, and may not be to this one again; ENOENT:
        the other has taken it over and unmapped some of it): it is then still being handed over, the device reaches
        what it did, and `cancel` may be called again.

        Cost: two ioctls for each mapping.
        """
        self._check_owner()
        if self._ended:
            return
        with self._mapper.guard.lock, self._container.guard.lock:
            if self._container.handing is self:  # else nothing has happened, or a signal handler has ended a cancel
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
        try:
            # Without an address first: the other process may have given it one of its own.
            steps = [partial(self._restore_one, mapping) for mapping in self._container.table]
            attempt_all("cancelling a hand-over", steps)
        except BaseException:
            for handle in handles:
                handle.set_aside()
            raise
        self._given_up = False

    def _restore_one(self, mapping: Mapping) -> None:
        give_up_vaddr(self._container, mapping)
        set_vaddr(self._container, mapping)

    def finish(self) -> None:
        """The other process has it: whatever this one has of it is forgotten and closed, without a call that reaches
        the devices or what they reach. The blocks' memory is unmapped from this process. Twice is fine.

        Call it when the other process has said that it has taken over. Raises ForkedError; ClosedError when it was
        cancelled; BufferError while a view of a block or of a mapped region lives, and then nothing has been closed;
        otherwise what the steps raise, after all of them were tried.
        """
        self._check_owner()
        if self._ended != "finished":  # else it is tried once more: a signal handler may have ended it
            self._check_usable()
        with ExitStack() as stack:
            if self._blocks is not None:
                stack.enter_context(self._blocks.guard.lock)  # so that nobody takes a view meanwhile
            for block in self._blocks or ():
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

    def _check_owner(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError("this HandOver", owner=self._pid)

    def _check_usable(self) -> None:
        self._check_owner()
        if self._ended:
            raise ClosedError(f"this hand-over is {self._ended}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.getpid() == self._pid:
            self.cancel()


def _describe(block: RamBlock, iova: int, pieces: Sequence[Extent]) -> HandedBlock:
    return HandedBlock(
        idstr=block.idstr,
        used_length=block.used_length,
        max_length=block.max_length,
        iova=iova,
        memory=block.state.memory.kind,
        readonly=block.readonly,
        prealloc=block.prealloc,
        settings=block.settings,
        discarded=block.discarded,
        pieces=tuple(pieces),
    )
