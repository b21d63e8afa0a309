"""The new process: makes blocks, a container and devices from the message and descriptors of another process."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from pyvfio.arguments import checked_items, checked_kernel
from pyvfio.blocks.block import RamBlock
from pyvfio.blocks.progress import ProgressCallback, preallocate
from pyvfio.blocks.state import ResizedCallback
from pyvfio.container import Container
from pyvfio.device import Device, Irq
from pyvfio.device.eventfds import find_identity
from pyvfio.dma import DmaMapper
from pyvfio.errors import HandOverError, RollbackError, VfioError, as_exception
from pyvfio.guard import ContextManager, Guard, Guarded, checkpoint, close_now, closing, uninterrupted
from pyvfio.handle import attempt, attempt_all
from pyvfio.kernel import HUGETLBFS_MAGIC, FileStatus, Kernel
from pyvfio.live_update.state import HandedBlock, HandedIrq, State
from pyvfio.live_update.ways import taking
from pyvfio.mapper.plan import BlockShape
from pyvfio.mapper.policy import Policy
from pyvfio.memory import File, Memfd, Received
from pyvfio.ramblock import RamBlockList
from pyvfio.unique import Unique
from pyvfio.units import check_whole_number, format_size

if TYPE_CHECKING:
    from pyvfio.ioas import Ioas

logger = logging.getLogger(__name__)


class TakenOver(ContextManager, Unique):
    """The objects taken over from another process, made by `take_over`.

    A context manager, whose end closes all objects: `close`. Synchronization: any thread.
    """

    def __init__(
        self,
        space: Container | Ioas,
        devices: Mapping[str, Device],
        blocks: RamBlockList,
        mapper: DmaMapper,
        *,
        taking: _Taking,
    ) -> None:
        self.guard = Guard("the TakenOver object")
        self.space = space
        """The address space: a Container with its groups, or an Ioas."""
        self.devices = devices
        """The devices, by PCI address."""
        self.blocks = blocks
        """The RAM blocks, at new addresses in this process and at their old IOVAs."""
        self.mapper = mapper
        """A mapper that follows the blocks as the mapper of the other process did."""
        self.taking = taking
        """The steps that made this object. For the library."""

    def __repr__(self) -> str:
        return f"<TakenOver {', '.join(self.devices)}: {len(self.blocks)} blocks>"

    @property
    def container(self) -> Container:
        """The address space, if that is a container. Raises VfioError for an Ioas."""
        if not isinstance(self.space, Container):
            raise VfioError("an Ioas was taken over, and no container", hint="taken.space is the address space")
        return self.space

    @closing
    def close(self) -> None:
        """Close the devices, which ends their DMA, then the mapper, the blocks and the address space.

        A second call does nothing. Raises the errors of the steps after all of them were tried.
        """
        way = self.taking.way
        parts: list[Guarded] = [*self.devices.values(), self.mapper, self.blocks, *way.owners]
        steps: list[Callable[[], object]] = [partial(close_now, part) for part in parts]
        steps.append(way.end)
        attempt_all("closing the objects that were taken over", steps)


def _undo(taken: TakenOver) -> None:
    taken.taking.give_back(VfioError("interrupted"))


@uninterrupted(_undo)
def take_over(
    state: bytes,
    fds: Sequence[int],
    *,
    kernel: Kernel | None = None,
    place: Callable[[RamBlock], int | None] | None = None,
    policy_of: Callable[[RamBlock | BlockShape], Policy | None] | None = None,
    progress: ProgressCallback | None = None,
    resized: Mapping[str, ResizedCallback] | None = None,
) -> TakenOver:
    """Take over the objects that another process hands over: its `state`, and its `fds` in their order. DMA continues.

    Each block is mapped into this process at a new virtual address, with its settings. In a container, that address is
    set for every mapping. In an Ioas, the memory of all mappings is charged to this process, as the last step.

    IOVAs, policies and `dma_bits` of blocks, mapper and container stay. Interrupts that were enabled stay enabled with
    the eventfds received, which contain the unread signals; no call is made for them. Nothing is opened, mapped for a
    device, unmapped or reset. After the call, the new objects own the descriptors, which are close-on-exec.

    `place` and `policy_of`, for blocks added later, are those of `DmaMapper`; `progress` is that of `RamBlockList.add`.
    `resized`: callbacks of blocks by their id strings.

    Tell the other process after this call has returned, and resize nothing before.

    Raises before any system call: TypeError and ValueError for a state that is invalid or of another version, for
    invalid descriptor numbers, and for callbacks that cannot be called. Raises before any change of a mapping:
    HandOverError if a descriptor is not the one that the state describes.

    Raises HandOverError if the other process has cancelled, PinLimitError if this process may not lock as much, and
    OSError. No mapping then has an address of this process. The descriptors stay open and belong to the caller, so the
    call can be repeated, and the other process can cancel. Until one of these, kernels count the mappings set so far,
    in a container, as locked by this process.

    Raises RollbackError if some mapping may have an address of this process. That happens if the other process cancels
    during the call, or if the state is of an earlier hand-over. The other process can cancel nevertheless.

    Cost: an ioctl for each mapping; for an Ioas 88 µs more for 256 files of 2 MiB. No memory is moved or copied.

    Example:
        >>> import pyvfio
        >>> kernel = pyvfio.testing.FakeKernel()
        >>> device = pyvfio.open_device("0000:00:02.0", kernel=kernel)
        >>> blocks = pyvfio.RamBlockList(kernel=kernel)
        >>> mapper = pyvfio.DmaMapper(device.space, blocks)
        >>> ring = blocks.add("ring", used_length=2 * pyvfio.MIB, max_length=pyvfio.GIB, memory=pyvfio.Memfd())
        >>> iova = mapper.iova(ring)
        >>> update = pyvfio.hand_over(mapper)
        >>> fds = [kernel.dup(fd) for fd in update.fds]  # as another process receives the descriptors
        >>> taken = pyvfio.take_over(update.state, fds, kernel=kernel)
        >>> update.finish()
        >>> taken.mapper.iova(taken.blocks["ring"]) == iova
        True
        >>> taken.close()
    """
    kernel = checked_kernel(kernel)
    callbacks = _check_callbacks(resized, place, policy_of, progress)
    numbers = [_check_number(fd) for fd in checked_items(fds, "fds")]
    wanted = _load(state, callbacks)
    _check_descriptors(kernel, wanted, numbers)
    taking = _Taking(kernel, wanted, numbers)
    try:
        return taking.take(place=place, policy_of=policy_of, progress=progress, resized=callbacks)
    except BaseException as error:
        taking.give_back(error)
        raise


def _check_callbacks(resized: Mapping[str, ResizedCallback] | None, *others: object) -> Mapping[str, ResizedCallback]:
    """Return a copy of `resized`. Raises TypeError if a callback is not callable."""
    if not isinstance(resized, Mapping | None):
        raise TypeError(f"resized must be a mapping of id strings to callbacks, not {resized!r}")
    found = dict(resized or {})
    if not all(callback is None or callable(callback) for callback in (*found.values(), *others)):
        raise TypeError("place, policy_of, progress and all values of resized must be callable")
    return found


def _check_number(fd: object) -> int:
    number = check_whole_number(fd, "a descriptor")
    if not 0 <= number < 1 << 31:
        raise ValueError(f"no descriptor has the number {number}")
    return number


def _load(state: bytes, resized: Mapping[str, ResizedCallback]) -> State:
    """Return the state, whose blocks must include all names in `resized`. Raises TypeError and ValueError."""
    try:
        data = bytes(memoryview(state))
    except TypeError as error:
        raise TypeError(f"state must be bytes, as in HandOver.state, not {type(state).__name__}") from error
    wanted = State.load(data)
    if unknown := set(resized) - {block.idstr for block in wanted.blocks}:
        raise ValueError(f"resized: no RAM block '{min(unknown, key=str)}' is handed over")
    return wanted


def _check_descriptors(kernel: Kernel, state: State, fds: Sequence[int]) -> None:
    names = state.names
    if len(fds) != len(names) or len(set(fds)) != len(fds):
        raise HandOverError(
            f"{len(fds)} descriptors were passed ({len(set(fds))} different ones), but the state needs {len(names)}: "
            + ", ".join(names),
            hint="Pass all of HandOver.fds, in their order; tell socket.recv_fds the number of descriptors",
        )
    statuses = [_status(kernel, fd, name) for fd, name in zip(fds, names, strict=True)]
    for fd, name, status, identity in zip(fds, names, statuses, state.identities, strict=True):
        if status.identity != identity:
            raise HandOverError(
                f"descriptor {fd} should be {name}, but is another file", hint="Pass HandOver.fds in their order"
            )
    first = state.handles
    for block, name, status in zip(state.blocks, names[first:], statuses[first:], strict=False):
        _check_memory(block, name, status)
    for irq, eventfds in state.irq_fds(fds):
        _check_eventfds(irq, eventfds)


def _check_eventfds(irq: HandedIrq, fds: Sequence[int]) -> None:
    # To fstat(2), all eventfds are the same file; only /proc tells them apart.
    for fd, name, identity in zip(fds, irq.names, irq.eventfds, strict=True):
        found = find_identity(fd)
        if None not in (found, identity) and found != identity:
            raise HandOverError(
                f"descriptor {fd} should be {name}, but is another eventfd", hint="Pass HandOver.fds in their order"
            )


def _status(kernel: Kernel, fd: int, name: str) -> FileStatus:
    try:
        return kernel.file_status(fd)
    except OSError as error:
        raise HandOverError(
            f"descriptor {fd} should be {name}: {error.strerror}",
            hint="Send the descriptors themselves (socket.send_fds), or call HandOver.make_inheritable() before "
            "execve: a number names another file in another process",
        ) from error


def _check_memory(block: HandedBlock, name: str, status: FileStatus) -> None:
    offset = block.memory.offset if isinstance(block.memory, File) else 0
    if status.size < offset + block.used_length:
        raise HandOverError(
            f"{name} has {format_size(status.size)}, but {format_size(offset + block.used_length)} are in use",
            hint="The other process has changed the file; hand over once more",
        )
    hugetlb = block.memory.hugetlb if isinstance(block.memory, Memfd) else None
    if hugetlb is not None and (status.file_system, status.block_size) != (HUGETLBFS_MAGIC, hugetlb):
        raise HandOverError(f"{name} does not consist of huge pages of {format_size(hugetlb)}")


class _Taking:
    """All objects that `take_over` makes, kept so that the take-over can be undone."""

    def __init__(self, kernel: Kernel, state: State, fds: Sequence[int]) -> None:
        self._kernel = kernel
        self._state = state
        self._fds = tuple(fds)
        self.way = taking(state)
        self._irqs: list[Irq] = []
        self._blocks: list[RamBlock] = []

    def take(
        self,
        *,
        place: Callable[[RamBlock], int | None] | None,
        policy_of: Callable[[RamBlock | BlockShape], Policy | None] | None,
        progress: ProgressCallback | None,
        resized: Mapping[str, ResizedCallback],
    ) -> TakenOver:
        """Take over everything. After an exception, the caller calls `give_back`."""
        state = self._state
        try:
            space, devices = self.way.adopt(state, self._fds, self._kernel)
        except ValueError as error:
            raise HandOverError(f"these descriptors are not those that the state describes: {error}") from error
        blocks = RamBlockList(kernel=self._kernel)
        for described, fd in zip(state.blocks, state.block_fds(self._fds), strict=True):
            self._receive(blocks, described, fd, progress, resized.get(described.idstr))
        for described, block in zip(state.blocks, self._blocks, strict=True):
            for piece in described.pieces:
                checkpoint()
                self.way.adopt_piece(block, described.iova, piece)
        policy = state.policy
        mapper = DmaMapper(
            space,
            resize=policy.resize,
            granule=policy.granule,
            allow_gap=policy.allow_gap,
            place=place,
            policy_of=policy_of,
            prefault=state.prefault,
            progress=progress,
            dma_bits=state.mapper_bits,
        )
        mapper.take_in(
            blocks,
            {described.idstr: described.iova for described in state.blocks},
            {described.idstr: described.policy for described in state.blocks},
        )
        self._adopt_irqs(devices)
        self.way.conclude(state)
        for fd in self._fds:
            os.set_inheritable(fd, False)  # noqa: FBT003
        for block in self._blocks:
            block.state.memory.own()
        logger.debug("took over %r", space)
        return TakenOver(space, devices, blocks, mapper, taking=self)

    def _adopt_irqs(self, devices: Mapping[str, Device]) -> None:
        for described, fds in self._state.irq_fds(self._fds):
            irq = devices[described.bdf].irq(described.index)
            if described.count > irq.count:
                raise HandOverError(
                    f"{described.count} vectors of interrupt {described.index} of {described.bdf} should be enabled, "
                    f"but the device has {irq.count}"
                )
            of_vector = dict(zip(described.vectors, fds, strict=False))
            row = [of_vector.get(vector) for vector in range(described.count)]
            irq.adopt(row, fds[-1] if described.unmasked else None)
            self._irqs.append(irq)

    def _receive(
        self,
        blocks: RamBlockList,
        described: HandedBlock,
        fd: int,
        progress: ProgressCallback | None,
        resized: ResizedCallback | None,
    ) -> None:
        if not isinstance(described.memory, Memfd | File):
            raise TypeError(f"a state describes memory of a file, not {described.memory}")
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
        preallocate(block, self._kernel, threads=described.prealloc, progress=progress)
        blocks.receive(block, used_length=described.used_length, discarded=described.discarded)

    def give_back(self, cause: BaseException) -> None:
        """Undo the take-over: no mapping needs this process, and the descriptors are the caller's again."""
        failures: list[Exception] = []
        needed = self.way.undo(failures)
        for block in self._blocks:
            block.state.memory.disown()
            if needed:
                block.state.memory.keep()  # a mapping may have an address of this memory
            else:
                attempt(block.state.memory.release, failures)
        for irq in self._irqs:
            attempt(irq.give_up, failures)
        self.way.release()
        if failures or needed:
            raise RollbackError(
                "the take-over failed, and some mappings may still have an address of this process",
                [as_exception(cause), *failures],
                hint="The device's reach is unchanged. Let the other process cancel",
            ) from cause
