"""A program is replaced, or its process, and its devices go on reaching the memory of its RAM blocks all the while.

In the old process:                                   In the new one:

    with hand_over(mapper) as update:
        send(update.state, update.fds)        ──▸     taken = take_over(state, fds)
        wait_for("taken")                     ◂──     say("taken")
        update.finish()                               taken.blocks["ring"].resize(...)

The memory is a memfd (or a file), which both can map; the mappings stay in the IOMMU, pages pinned, and are told a new
address in a new process. Nothing is unmapped, mapped or reset, so that no access of a device is stopped at any time.

What holds at every instant, whatever fails, and whichever process dies:

    what the device can reach  =  what it could reach before `hand_over`, until the new process resizes a block

Between `hand_over` and `cancel` or `finish` the old process can change none of it: a block whose pages would be given
back by one process while another counts on them is what must not be. It may use the blocks' memory, the devices'
registers and interrupts. Only one of the two ends: `finish` where the new process has said that it has everything,
`cancel` where it has died, or has said that it could not. A process that dies takes its descriptors with it; when the
last has gone, the kernel unmaps everything and the device is off the bus.

Source: VFIO_DMA_UNMAP_FLAG_VADDR and VFIO_DMA_MAP_FLAG_VADDR, `vfio_dma_do_unmap`, `vfio_dma_do_map` and
`vfio_change_dma_owner` in drivers/vfio/vfio_iommu_type1.c; cpr-exec and cpr-transfer of QEMU.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

from pyvfio import ioctls
from pyvfio.block import RamBlock, ResizedCallback
from pyvfio.container import Container, Group
from pyvfio.device import Device
from pyvfio.dma import DmaMapper
from pyvfio.errors import (
    ClosedError,
    ForkedError,
    HandOverError,
    IoctlError,
    RollbackError,
    UnsupportedError,
    VfioError,
    as_exception,
)
from pyvfio.extents import Extent
from pyvfio.handle import Handle, attempt, attempt_all
from pyvfio.kernel import HUGETLBFS_MAGIC, FileStatus, Kernel, LinuxKernel
from pyvfio.live_state import BlockState, DeviceState, State
from pyvfio.memory import File, Memfd, Received
from pyvfio.progress import ProgressCallback
from pyvfio.ramblock import RamBlockList
from pyvfio.space import Mapping as DmaRange
from pyvfio.type1_errors import describe_mappings
from pyvfio.units import format_size

logger = logging.getLogger(__name__)

_UNMAP_VADDR = int(ioctls.VFIO_DMA_UNMAP_FLAG_VADDR)
_UNMAP_ALL = int(ioctls.VFIO_DMA_UNMAP_FLAG_ALL)
_MAP_VADDR = int(ioctls.VFIO_DMA_MAP_FLAG_VADDR)

_AnyHandle = TypeVar("_AnyHandle", bound=Handle)


def _give_up_vaddr(container: Container, mapping: DmaRange) -> None:
    """It has no address any more, or had none. IoctlError."""
    try:
        container.unmap_dma(iova=mapping.iova, size=mapping.size, flags=_UNMAP_VADDR)
    except IoctlError as error:
        if error.errno != errno.EINVAL:
            raise


def _set_vaddr(container: Container, mapping: DmaRange) -> None:
    """It has that address, in this process, which is charged for it from now on. IoctlError, PinLimitError."""
    container.map_dma(vaddr=mapping.vaddr, iova=mapping.iova, size=mapping.size, flags=_MAP_VADDR)


# --------------------------------------------------------------------------------------------------- the old process


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
        with container._lock:
            if isinstance(container._handing, HandOver):
                return container._handing._begun()
            container._handing = update
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
        self._blocks = mapper._blocks
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
            self._blocks._suspend(self)
        container = self._container
        with self._mapper._lock, container._lock:
            self._groups = tuple(container._groups.values())
            self._devices = tuple(
                device for group in self._groups for device in group.devices if isinstance(device, Device)
            )
            self._check()
            self._describe()
            self._given_up = True
            self._give_up(container)
            for handle in (container, *self._groups):
                handle._set_aside()
        logger.debug("handing over %d mappings of %r", len(container._table), container)

    def _check(self) -> None:
        self._mapper._check_open()
        if not self._container.check_extension(ioctls.VFIO_UPDATE_VADDR):
            raise UnsupportedError(
                "the kernel cannot hand over what is mapped: it has no VFIO_UPDATE_VADDR",
                hint="Linux has it from 5.12 on, but not for a container without a group or with a mediated device",
            )
        if obstacles := self._obstacles():
            raise HandOverError(
                f"{len(obstacles)} things cannot be handed over: " + "; ".join(obstacles[:8]),
                hint="Nothing has been touched",
            )

    def _obstacles(self) -> list[str]:
        found = [
            f"{mapping!r} is a buffer of this process's own: close it (and reset_temporary(), if it is temporary)"
            for mapping in self._mapper._own_mappings()
        ]
        for block in self._blocks or ():
            found += _obstacles_of(block)
            if self._mapper._search(block) is None:  # it was taken out of the list
                found.append(f"RAM block '{block.idstr}' is not followed by this mapper any more: make another")
        for notifier in self._blocks._notifiers if self._blocks is not None else ():
            if notifier is not self._mapper:
                found.append(f"{notifier!r} follows the blocks, too: remove_notifier() it first, or close it")
        found += [
            f"a change of RAM block '{followed.block.idstr}' failed, and so did its undo: resize it once more"
            for followed in self._mapper._followed
            if not followed.window.settled
        ]
        return found or self._strangers()

    def _strangers(self) -> list[str]:
        """Mappings that are none of the blocks': of this process, or of another that has the container."""
        windows = [followed.window for followed in self._mapper._followed]
        ours = sum(len(window.pieces()) for window in windows)
        mappings = list(self._container._table)
        if ours < len(mappings):
            others = [m for m in mappings if not any(w.iova <= m.iova < w.iova + w.size for w in windows)]
            return [f"IOVA {describe_mappings(others)} is mapped, by whom this mapper does not know: unmap it first"]
        there = self._container._entry_limit - self._container.get_info().dma_avail
        if there != len(mappings):
            return [f"the container has {there} mappings, of which {len(mappings)} are known here: unmap the others"]
        return []

    def _describe(self) -> None:
        policy, kernel = self._mapper._policy, self._container.kernel
        blocks = {followed.block: followed.window for followed in self._mapper._followed}
        files = [block.file for block in blocks]
        handles: list[Handle] = [self._container, *self._groups, *self._devices]
        self.fds = (*(handle.fd for handle in handles), *(file.fd for file in files if file is not None))
        self.state = State(
            iommu_type=self._container.iommu_type,
            groups=tuple(group.number for group in self._groups),
            devices=tuple(DeviceState(device.bdf, device.group.number) for device in self._devices),
            policy=policy,
            prefault=self._mapper._prefault,
            blocks=tuple(_describe(block, window.iova, window.pieces()) for block, window in blocks.items()),
            identities=tuple(kernel.file_status(fd).identity for fd in self.fds),
        ).dump()

    def _give_up(self, container: Container) -> None:
        expected = sum(mapping.size for mapping in container._table)
        if container.check_extension(ioctls.VFIO_UNMAP_ALL):
            given_up = container.unmap_dma(iova=0, size=0, flags=_UNMAP_VADDR | _UNMAP_ALL)
        else:
            given_up = sum(
                container.unmap_dma(iova=mapping.iova, size=mapping.size, flags=_UNMAP_VADDR)
                for mapping in container._table
            )
        if given_up != expected:
            raise HandOverError(
                f"{format_size(expected)} are known to be mapped, and the kernel has {format_size(given_up)}",
                hint="Somebody else maps through the same container",
            )

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
        with self._mapper._lock, self._container._lock:
            if self._container._handing is self:  # else nothing has happened, or a signal handler has ended a cancel
                self._restore()
        if self._blocks is not None:
            self._blocks._resume(self)
        self._close_on_exec()
        self._end("cancelled")

    def _end(self, how: str) -> None:
        self._ended = how
        if self._container._handing is self:
            self._container._handing = None

    def _restore(self) -> None:
        handles = (self._container, *self._groups)
        for handle in handles:
            handle._take_back()
        if not self._given_up:
            return
        try:
            # Without an address first: the other process may have given it one of its own.
            steps = [partial(self._restore_one, mapping) for mapping in self._container._table]
            attempt_all("cancelling a hand-over", steps)
        except BaseException:
            for handle in handles:
                handle._set_aside()
            raise
        self._given_up = False

    def _restore_one(self, mapping: DmaRange) -> None:
        _give_up_vaddr(self._container, mapping)
        _set_vaddr(self._container, mapping)

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
                stack.enter_context(self._blocks._lock)  # so that nobody takes a view meanwhile
            for block in self._blocks or ():
                block._check_views(0)
            for device in self._devices:
                device._check_views()
            self._end("finished")  # from here on there is no way back
            self._forget()

    def _forget(self) -> None:
        steps: list[Callable[[], object]] = [self._close_on_exec, self._mapper._forget]
        if self._blocks is not None:
            steps += [self._blocks._forget, partial(self._blocks._resume, self)]
        steps += [device._forget for device in self._devices]
        steps += [partial(_close, handle) for handle in (*self._groups, self._container)]
        attempt_all("forgetting what was handed over", steps)
        self._container._table.clear()
        self._container._groups.clear()

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


def _close(handle: Handle) -> None:
    handle._take_back()
    if not handle.closed:
        handle._close_fd()


def _obstacles_of(block: RamBlock) -> list[str]:
    memory = block._memory
    name = f"RAM block '{block.idstr}'"
    if not (isinstance(memory.kind, Memfd) or (isinstance(memory.kind, File) and memory.kind.shared)):
        return [f"the memory of {name} is this process's alone ({memory.kind}): add it with memory=Memfd()"]
    if block.whole:
        return [f"{name} is allocated in full, and cannot be resized elsewhere: add it again when nothing calls for it"]
    if memory.retained or memory.held > block.used_length:
        return [f"{name} has memory that an earlier change could not give back: resize it once more"]
    return []


def _describe(block: RamBlock, iova: int, pieces: Sequence[Extent]) -> BlockState:
    return BlockState(
        idstr=block.idstr,
        used_length=block.used_length,
        max_length=block.max_length,
        iova=iova,
        memory=block._memory.kind,
        readonly=block.readonly,
        prealloc=block.prealloc,
        settings=block.settings,
        discarded=block.discarded,
        stale=block._stale,
        pieces=tuple(pieces),
    )


# --------------------------------------------------------------------------------------------------- the new process


class TakenOver:
    """What another process has handed over, as this one has it now: made by `take_over`.

    A context manager, whose end closes all of it: `close`.
    """

    def __init__(
        self, container: Container, devices: Mapping[str, Device], blocks: RamBlockList, mapper: DmaMapper
    ) -> None:
        self.container = container
        """With its groups."""
        self.devices = devices
        """By their PCI addresses."""
        self.blocks = blocks
        """The RAM blocks, at new addresses in this process, and at the IOVAs that they had."""
        self.mapper = mapper
        """Follows them as the other process's did."""

    def __repr__(self) -> str:
        return f"<TakenOver {', '.join(self.devices)}: {len(self.blocks)} blocks>"

    def close(self) -> None:
        """Close the devices, which ends their DMA, the mapper, the blocks and the container; twice is fine. Raises what
        the steps raise, after all of them were tried."""
        closes = [device.close for device in self.devices.values()]
        closes += [self.mapper.close, self.blocks.close, self.container.close]
        attempt_all("closing what was taken over", closes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def take_over(
    state: bytes,
    fds: Sequence[int],
    *,
    kernel: Kernel | None = None,
    place: Callable[[RamBlock], int | None] | None = None,
    progress: ProgressCallback | None = None,
    resized: Mapping[str, ResizedCallback] | None = None,
) -> TakenOver:
    """Take over what another process hands over: its `state` and `fds`, in that order. The devices' DMA goes on.

    Each block is mapped into this process at a new address, with its settings, and every mapping told that; it is at
    the IOVA that it had, and the mapper has the policy that it had. `place` and `progress` are as of `DmaMapper` and
    `RamBlockList.add`, `resized` has callbacks of blocks by their id strings. Nothing is opened, mapped for a device,
    unmapped or reset. The descriptors are the new objects' own from then on, and close-on-exec.

    Tell the other process when this returns, and resize nothing before. Raises ValueError for a state that is none, or
    of another version, and HandOverError for descriptors that are not what it says, all of that before any mapping is
    touched; HandOverError where the other process has cancelled; PinLimitError where this process may not lock as much;
    OSError. Then no mapping has an address here, the descriptors are open and the caller's, so that it can be tried
    again, and the other process can cancel. Until either, kernels count what had come so far as locked by this process.
    RollbackError: some may have one; the other process can cancel nevertheless.

    Cost: an ioctl for each mapping; whatever is in memory stays where it is.
    """
    wanted = State.load(bytes(state))
    kernel = kernel or LinuxKernel()
    _check_descriptors(kernel, wanted, fds)
    taking = _Taking(kernel, wanted, fds)
    try:
        return taking.take(place=place, progress=progress, resized=resized or {})
    except BaseException as error:
        taking.give_back(error)
        raise


def _check_descriptors(kernel: Kernel, state: State, fds: Sequence[int]) -> None:
    names = state.names
    if len(fds) != len(names) or len(set(fds)) != len(fds):
        raise HandOverError(
            f"{len(fds)} descriptors have come ({len(set(fds))} different ones), and the state is of {len(names)}: "
            + ", ".join(names),
            hint="Pass all of HandOver.fds, in their order; socket.recv_fds has to be told how many may come",
        )
    statuses = [_status(kernel, fd, name) for fd, name in zip(fds, names, strict=True)]
    for fd, name, status, identity in zip(fds, names, statuses, state.identities, strict=True):
        if status.identity != identity:
            raise HandOverError(
                f"descriptor {fd} should be {name}, and is another file", hint="Pass HandOver.fds in their order"
            )
    for block, name, status in zip(
        state.blocks, names[len(names) - len(state.blocks) :], statuses[len(names) - len(state.blocks) :], strict=True
    ):
        _check_memory(block, name, status)


def _status(kernel: Kernel, fd: int, name: str) -> FileStatus:
    try:
        return kernel.file_status(fd)
    except OSError as error:
        raise HandOverError(
            f"descriptor {fd} should be {name}: {error.strerror}",
            hint="Send the descriptors themselves (socket.send_fds), or HandOver.make_inheritable() before execve; "
            "their numbers mean nothing in another process",
        ) from error


def _check_memory(block: BlockState, name: str, status: FileStatus) -> None:
    offset = block.memory.offset if isinstance(block.memory, File) else 0
    if status.size < offset + block.used_length:
        raise HandOverError(
            f"{name} has {format_size(status.size)}, and {format_size(offset + block.used_length)} are in use",
            hint="The other process has changed it; hand over once more",
        )
    hugetlb = block.memory.hugetlb if isinstance(block.memory, Memfd) else None
    if hugetlb is not None and (status.file_system, status.block_size) != (HUGETLBFS_MAGIC, hugetlb):
        raise HandOverError(f"{name} is not made of huge pages of {format_size(hugetlb)}")


class _Taking:
    """All that `take_over` makes, so that it can be given back."""

    def __init__(self, kernel: Kernel, state: State, fds: Sequence[int]) -> None:
        self._kernel = kernel
        self._state = state
        self._fds = tuple(fds)
        self._handles: list[Handle] = []
        self._container: Container | None = None
        self._blocks: list[RamBlock] = []
        self._told: list[DmaRange] = []  # mappings that may have an address of this process
        self._lost = False  # whether they may have one of another by now, who is taking everything back

    def take(
        self,
        *,
        place: Callable[[RamBlock], int | None] | None,
        progress: ProgressCallback | None,
        resized: Mapping[str, ResizedCallback],
    ) -> TakenOver:
        """Everything, or `give_back`."""
        state = self._state
        if unknown := set(resized) - {block.idstr for block in state.blocks}:
            raise ValueError(f"there is no RAM block '{min(unknown)}' among those that are handed over")
        container, devices = self._adopt()
        blocks = RamBlockList(kernel=self._kernel)
        for described, fd in zip(state.blocks, self._fds[len(self._fds) - len(state.blocks) :], strict=True):
            self._receive(blocks, described, fd, progress, resized.get(described.idstr))
        for described, block in zip(state.blocks, self._blocks, strict=True):
            for piece in described.pieces:
                self._tell(container, block, described.iova, piece)
        policy = state.policy
        mapper = DmaMapper(
            container,
            resize=policy.resize,
            granule=policy.granule,
            allow_gap=policy.allow_gap,
            place=place,
            prefault=state.prefault,
            progress=progress,
        )
        mapper._resume(blocks, {described.idstr: described.iova for described in state.blocks})
        for fd in self._fds:
            os.set_inheritable(fd, False)  # noqa: FBT003
        for block in self._blocks:
            block._memory.own()
        logger.debug("took over %r", container)
        return TakenOver(container, devices, blocks, mapper)

    def _blank(self, kind: type[_AnyHandle]) -> _AnyHandle:
        """Known before it has a descriptor, which it would close if a signal handler made it be forgotten."""
        handle = kind.__new__(kind)
        handle._fd = handle._aside = -1
        self._handles.append(handle)
        return handle

    def _adopt(self) -> tuple[Container, dict[str, Device]]:
        state, fds = self._state, iter(self._fds)
        container = self._container = self._blank(Container)
        container._begin(self._kernel, next(fds))
        groups = {}
        for number in state.groups:
            group = groups[number] = self._blank(Group)
            group._begin(self._kernel, next(fds), number)
            if not group.get_status() & ioctls.VFIO_GROUP_FLAGS_CONTAINER_SET:
                raise HandOverError(f"IOMMU group {number} is in no container: the other process has taken it out")
        mapped = sum(len(block.pieces) for block in state.blocks)
        container._resume(state.iommu_type, groups.values(), mapped=mapped)
        devices = {}
        for described in state.devices:
            device = devices[described.bdf] = self._blank(Device)
            device._begin(groups[described.group], described.bdf, next(fds))
            device._resume()
        return container, devices

    def _receive(
        self,
        blocks: RamBlockList,
        described: BlockState,
        fd: int,
        progress: ProgressCallback | None,
        resized: ResizedCallback | None,
    ) -> None:
        assert isinstance(described.memory, Memfd | File)  # what a state holds
        block = RamBlock(
            blocks,
            idstr=described.idstr,
            max_length=described.max_length,
            settings=described.settings,
            resized=resized,
            memory=Received(fd, described.memory),
            readonly=described.readonly,
        )
        self._blocks.append(block)
        blocks._set_prealloc(block, described.prealloc, progress)
        blocks._receive(block, used_length=described.used_length, discarded=described.discarded, stale=described.stale)

    def _tell(self, container: Container, block: RamBlock, iova: int, piece: Extent) -> None:
        container._table.add(iova=iova + piece.start, size=piece.size, vaddr=block.vaddr + piece.start)
        mapping = container._table.at(iova + piece.start)
        assert mapping is not None
        self._told.append(mapping)
        try:
            _set_vaddr(container, mapping)
        except IoctlError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):
                self._lost = True
            raise self._explain(error, mapping) from error

    @staticmethod
    def _explain(error: IoctlError, mapping: DmaRange) -> VfioError:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            return error
        hint = (
            "The other process has cancelled, or somebody has taken over before; hand over once more"
            if error.errno == errno.EINVAL
            else "The other process has unmapped it, or is gone with all descriptors"
        )
        what = "has an address" if error.errno == errno.EINVAL else "is not mapped"
        return HandOverError(
            f"IOVA {mapping.range} {what}, so that it cannot be taken over ({error.request})", hint=hint
        )

    def give_back(self, cause: BaseException) -> None:
        """No mapping has an address here, this process's memory of them goes, and the descriptors are the caller's."""
        failures: list[Exception] = []
        if (container := self._container) is not None:
            for mapping in () if self._lost else self._told:
                attempt(partial(_give_up_vaddr, container, mapping), failures)
        for block in self._blocks:
            block._list = None
            block._memory.disown()
            if failures or self._lost:
                block._memory.keep()  # they may be addresses of it
            else:
                attempt(block._memory.release, failures)
        for handle in self._handles:
            handle._abandon()
        if failures:
            raise RollbackError(
                "what was handed over could not be taken over, and some of it is said to be here",
                [as_exception(cause), *failures],
                hint="The device reaches what it did. Let the other process cancel",
            ) from cause
