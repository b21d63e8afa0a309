"""The old process: describes all objects, forbids changes, and at the end forgets the objects or takes them back."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial

from pyvfio.blocks.block import RamBlock
from pyvfio.container import Container
from pyvfio.device import Device, Irq
from pyvfio.device.eventfds import Eventfd
from pyvfio.dma import DmaMapper
from pyvfio.errors import ClosedError, HandOverError, RollbackError, as_exception
from pyvfio.guard import ContextManager, Guard, closing, guarded, holding, uninterrupted
from pyvfio.handle import attempt_all
from pyvfio.ioas import Ioas
from pyvfio.live_update.obstacles import find_obstacles
from pyvfio.live_update.state import HandedBlock, HandedIrq, State
from pyvfio.live_update.ways import giving
from pyvfio.mapper.window import Window
from pyvfio.unique import Unique

logger = logging.getLogger(__name__)


def _undo(update: HandOver) -> None:
    if update.is_new:
        update.cancel()


@uninterrupted(_undo)
def hand_over(mapper: DmaMapper) -> HandOver:
    """Let another process take over the blocks, the address space and all its devices. DMA continues.

    The other process can be this process after execve(2). If a hand-over is in progress already, its HandOver is
    returned.

    In a container, this call gives up the virtual addresses of all mappings. In an Ioas, nothing is given up: the
    mappings are of files, and the other process has the memory charged to itself. If memory counts by process
    (`Iommufd.counts_by_process`), this process must live until the other process has taken over. After execve(2), the
    memory then has no charge any more.

    Raises before any change:

    * UnsupportedError if the kernel has no VFIO_UPDATE_VADDR, or for an Ioas no IOMMU_IOAS_CHANGE_PROCESS (6.13).
    * HandOverError, which names the obstacles. Obstacles are memory private to this process (`Anonymous`,
      `File(shared=False)`; use `Memfd`), buffers and temporary mappings, and other notifiers of the list. Obstacles are
      also mappings of other users, reserved IOVA other than that of `mapper`'s blocks, and a change that failed.
      For an Ioas, obstacles are also files that are neither on tmpfs nor on hugetlbfs, other spaces of the iommufd,
      devices that are not attached, and an open DirtyTracking. HandOverError also if another thread has just begun to
      hand over.
    * ReentrancyError if called from a hook; ForkedError.

    Raises IoctlError, and everything is then as before. Raises RollbackError if the undo fails too: the hand-over is
    then in progress, and a second `hand_over` returns a HandOver that can be cancelled.

    Synchronization: any thread; waits for changes of the blocks in progress.
    Cost: one ioctl, and two small calls for each descriptor; for an Ioas a memory file in addition.

    Example:
        >>> import pyvfio
        >>> kernel = pyvfio.testing.FakeKernel()
        >>> device = pyvfio.open_device("0000:00:02.0", kernel=kernel)
        >>> blocks = pyvfio.RamBlockList(kernel=kernel)
        >>> mapper = pyvfio.DmaMapper(device.space, blocks)
        >>> ring = blocks.add("ring", used_length=2 * pyvfio.MIB, max_length=pyvfio.GIB, memory=pyvfio.Memfd())
        >>> with pyvfio.hand_over(mapper) as update:  # the end of the block cancels
        ...     print(type(update.state).__name__, len(update.fds) > 0)
        bytes True
        >>> ring.resize(pyvfio.MIB)
    """
    if not isinstance(mapper, DmaMapper):
        raise TypeError(f"mapper must be a DmaMapper, not {type(mapper).__name__}")
    space = mapper.space
    if not isinstance(space, Container | Ioas):
        raise TypeError(f"only a mapper of a Container or of an Ioas can be handed over, not of {type(space)}")
    update = HandOver(mapper, space)
    if (other := _enter(space, update)) is not None:
        return other.begun()
    try:
        update.begin()
    except BaseException as error:
        try:
            update.cancel()
        except Exception as failure:
            raise RollbackError(
                "the hand-over could not begin, and the undo failed too",
                [as_exception(error), failure],
                hint="The device's reach is unchanged. hand_over(mapper) returns a HandOver that can be cancelled",
            ) from error
        raise
    finally:
        update.is_beginning = False
    return update


@guarded
def _enter(space: Container | Ioas, update: HandOver) -> HandOver | None:
    """Record that `update` hands over `space`, or return the HandOver already recorded."""
    if isinstance(space.handing, HandOver):
        return space.handing
    space.handing = update
    return None


class HandOver(ContextManager, Unique):
    """A hand-over in progress, made by `hand_over`. A context manager: its end cancels, unless finished.

    `state` and `fds` are the arguments of `take_over`. `state` is JSON in bytes. `fds` are the descriptors of the
    address space, the devices, the blocks' memory and the interrupts. This process keeps its own descriptors.
    Send `fds` with `socket.send_fds` (at most 253 in one message), or let a program inherit them: `make_inheritable`.

    Enabled interrupts are handed over too. The devices continue to signal the same eventfds. The new process gets
    descriptors of all of them, also of those that this program passed to `enable` and `unmask_by`. A signal stays in
    the eventfd until a process reads the eventfd; a signal that this process reads is not seen by the new process.
    Until the end, this process can wait for interrupts, but cannot enable or disable any.

    A DirtyTracking is not handed over, and the new process opens one of its own. For a container, the kernel continues
    to track. For an Ioas, the DirtyTracking must be closed before.

    Synchronization: any thread.
    """

    def __init__(self, mapper: DmaMapper, space: Container | Ioas) -> None:
        self._mapper = mapper
        self._space = space
        self._way = giving(space)
        self._blocks = mapper.blocks
        self._inheritable: list[int] = []
        self._ended = ""
        self.guard = Guard("this HandOver")
        self.is_beginning = True
        """Whether `hand_over` has not returned yet. Another thread must not cancel then."""
        self.is_new = True
        """Whether `hand_over` has returned this object at most once."""
        self.state = b""
        """The description for `take_over`."""
        self.fds: tuple[int, ...] = ()
        """The descriptors for `take_over`, in the required order."""

    def __repr__(self) -> str:
        return f"<HandOver {self._ended or 'under way'}: {len(self.fds)} descriptors>"

    # ------------------------------------------------------------------------------------------------ begin

    def begun(self) -> HandOver:
        """Return this object, for a second `hand_over`."""
        # This code must not wait: the caller may be a hook of the very change that the first thread waits for.
        if self.is_beginning:
            raise HandOverError("another thread has just begun to hand over", hint="Call hand_over() once more")
        self.is_new = False
        return self

    @guarded
    def begin(self) -> None:
        """Describe all objects, and forbid changes from now on. For `hand_over`."""
        if self._blocks is not None:
            self._blocks.suspend(self)
        space, way = self._space, self._way
        with holding(self._mapper, space):
            way.look()
            with holding(*(device.windows for device in way.devices)):
                self._check_obstacles()
                fds = way.begin()
            self._describe(fds)
            way.give_up()
        logger.debug("handing over %d mappings of %r", len(space.table), space)

    def _check_obstacles(self) -> None:
        self._mapper.check_open()
        self._way.check_support()
        if obstacles := find_obstacles(self._mapper, self._blocks, self._way):
            raise HandOverError(
                f"{len(obstacles)} {'things' if obstacles[1:] else 'thing'} cannot be handed over: "
                + "; ".join(obstacles[:8]),
                hint="Nothing has been changed",
            )

    def _describe(self, handles: Sequence[int]) -> None:
        kernel = self._space.kernel
        windows = self._mapper.windows()
        files = [block.file for block, _window in windows]
        irqs = [found for device in self._way.devices for irq in device.irqs if (found := _describe_irq(device, irq))]
        eventfds = [eventfd.fd for _irq, held in irqs for eventfd in held]
        space, devices = self._way.describe()
        self.fds = (*handles, *(file.fd for file in files if file is not None), *eventfds)
        self.state = State(
            space=space,
            devices=devices,
            policy=self._mapper.policy,
            prefault=self._mapper.prefault,
            container_bits=self._space.dma_bits,
            mapper_bits=self._mapper.dma_bits,
            blocks=tuple(_describe(block, window) for block, window in windows),
            irqs=tuple(irq for irq, _held in irqs),
            identities=tuple(kernel.file_status(fd).identity for fd in self.fds),
        ).dump()

    # ------------------------------------------------------------------------------------------------ the two ends

    @guarded
    def make_inheritable(self) -> tuple[int, ...]:
        """Let programs started by this process inherit `fds`, with the same numbers. Return `fds`.

        Every program started in the meantime inherits them. `cancel` and `finish` make them close-on-exec again.
        """
        self._check_usable()
        for fd in self.fds:
            if not os.get_inheritable(fd):
                self._inheritable.append(fd)
                os.set_inheritable(fd, True)  # noqa: FBT003
        return self.fds

    @guarded
    def cancel(self) -> None:
        """Take everything back, also from a process that has taken over.

        In a container, each mapping gets the address that it had before. In an Ioas, the memory is charged to this
        process again, if the other process has taken over.

        Call `cancel` if the other process has died, or has reported that the take-over failed. A second call does
        nothing, nor does a call after `finish`.

        Raises ForkedError. Raises IoctlError or RollbackError if the kernel refuses. The hand-over is then still in
        progress, the device's reach is unchanged, and `cancel` may be called again. Two refusals have a known cause:

        * PinLimitError, one for all mappings: the memory is charged to the other process already, and this process may
          not lock as much.
        * ENOENT, or HandOverError for an Ioas: the other process has taken over and then unmapped some of the memory.

        Cost: two ioctls for each mapping. For an Ioas none; if the other process has taken over, one for each mapping.
        """
        self._cancel()

    @closing
    def close(self) -> None:
        """Cancel as `cancel` does. Do nothing in a forked child."""
        self._cancel()

    def _cancel(self) -> None:
        if self._ended:
            return
        with holding(self._mapper, self._space):
            if self._space.handing is self:  # otherwise begin() has changed nothing
                self._way.restore()
        if self._blocks is not None:
            self._blocks.resume(self)
        self._close_on_exec()
        self._end("cancelled")

    def _end(self, how: str) -> None:
        self._ended = how
        if self._space.handing is self:
            self._space.handing = None

    @guarded
    def finish(self) -> None:
        """Close all objects handed over, without a call that reaches the devices or their memory.

        The memory of the blocks is unmapped from this process. A second call does nothing. Call `finish` when the other
        process has confirmed the take-over.

        Raises ForkedError; ClosedError after `cancel`. Raises BufferError if a view of a block or of a mapped region is
        alive; nothing is closed then. Otherwise raises the errors of the steps after all of them were tried; a second
        call tries the failed steps again.
        """
        if self._ended != "finished":
            self._check_usable()
        blocks = self._blocks
        with holding(*([blocks] if blocks is not None else [])):  # so that no thread takes a view meanwhile
            for block in blocks or ():
                block.state.check_views(0)
            for device in self._way.devices:
                device.check_views()
            self._end("finished")  # from now on, cancel() is no longer possible
            self._forget()

    def _forget(self) -> None:
        steps: list[Callable[[], object]] = [self._close_on_exec, self._mapper.forget]
        if self._blocks is not None:
            steps += [self._blocks.forget, partial(self._blocks.resume, self)]
        steps += [device.forget for device in self._way.devices]
        steps += self._way.closes()
        attempt_all("forgetting the objects that were handed over", steps)
        self._space.table.clear()

    def _close_on_exec(self) -> None:
        while self._inheritable:
            os.set_inheritable(self._inheritable[-1], False)  # noqa: FBT003
            self._inheritable.pop()

    def _check_usable(self) -> None:
        if self._ended:
            raise ClosedError(f"this hand-over is {self._ended}")


def _describe_irq(device: Device, irq: Irq) -> tuple[HandedIrq, tuple[Eventfd, ...]] | None:
    """Return an enabled interrupt and its eventfds, or None."""
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
