"""The new process: blocks, a container and devices made of what another process has told and sent."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from pyvfio import ioctls
from pyvfio.blocks.block import RamBlock
from pyvfio.blocks.progress import ProgressCallback, preallocate
from pyvfio.blocks.state import ResizedCallback
from pyvfio.container import Container, Group
from pyvfio.device import Device, Irq
from pyvfio.device.eventfds import find_identity
from pyvfio.dma import DmaMapper
from pyvfio.errors import HandOverError, IoctlError, PinLimitError, RollbackError, VfioError, as_exception
from pyvfio.extents import Extent
from pyvfio.guard import ContextManager, Guard, Guarded, checkpoint, close_now, closing, uninterrupted
from pyvfio.handle import Handle, attempt, attempt_all
from pyvfio.iommu.space import Mapping as DmaRange
from pyvfio.kernel import HUGETLBFS_MAGIC, FileStatus, Kernel, LinuxKernel
from pyvfio.live_update.state import HandedBlock, HandedIrq, State
from pyvfio.live_update.vaddr import explain_limit, give_up_vaddr, set_vaddr
from pyvfio.mapper.plan import BlockShape
from pyvfio.mapper.policy import Policy
from pyvfio.memory import File, Memfd, Received
from pyvfio.ramblock import RamBlockList
from pyvfio.units import Iova, Vaddr, check_whole_number, format_size

logger = logging.getLogger(__name__)


class TakenOver(ContextManager):
    """The objects of another process, as this one has them now: made by `take_over`.

    A context manager, whose end closes all of it: `close`. Synchronization: any thread.
    """

    def __init__(
        self,
        container: Container,
        devices: Mapping[str, Device],
        blocks: RamBlockList,
        mapper: DmaMapper,
        *,
        taking: _Taking,
    ) -> None:
        self.guard = Guard("what was taken over")
        self.container = container
        """With its groups."""
        self.devices = devices
        """By their PCI addresses."""
        self.blocks = blocks
        """The RAM blocks, at new addresses in this process, and at the IOVAs that they had."""
        self.mapper = mapper
        """Follows them as the other process's did."""
        self.taking = taking
        """The steps that made it. For the library."""

    def __repr__(self) -> str:
        return f"<TakenOver {', '.join(self.devices)}: {len(self.blocks)} blocks>"

    @closing
    def close(self) -> None:
        """Close the devices, which ends their DMA, the mapper, the blocks and the container; twice is fine. Raises the
        errors of the steps, after all of them were tried."""
        parts: list[Guarded] = [*self.devices.values(), self.mapper, self.blocks, self.container]
        attempt_all("closing what was taken over", [partial(close_now, part) for part in parts])


def _undo(taken: TakenOver) -> None:
    taken.mapper.forget()
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
    """Take over what another process hands over: its `state` and `fds`, in that order. The devices' DMA goes on.

    Each block is mapped into this process at a new address, with its settings, and every mapping told that; it is at
    the IOVA that it had, under the policy that it had, and the mapper has the policy and the `dma_bits` that it had.
    Interrupts that were enabled are enabled with the eventfds that came, which have the signals that nobody has read;
    no call is made for them. `place` and `policy_of`, for blocks that come later, and `progress` are as of `DmaMapper`
    and `RamBlockList.add`, `resized` has callbacks of blocks by their id strings. Nothing is opened, mapped for a
    device, unmapped or reset. The descriptors are the new objects' own from then on, and close-on-exec.

    Tell the other process when this returns, and resize nothing before. Raises before any system call: TypeError and
    ValueError for a state that is none, or of another version, for numbers that no descriptor has, and for callbacks
    that cannot be called. Raises before any mapping is touched: HandOverError for descriptors that are not what the
    state says. Raises HandOverError where the other process has cancelled, PinLimitError where this process may not
    lock as much, OSError. Then no mapping has an address here, and the descriptors are open and the caller's, so that
    the call can be repeated, and the other process can cancel. Until either, kernels count the mappings that have come
    so far as locked by this process. Raises RollbackError where some mapping may have an address here, as when the
    other process cancels meanwhile or the state is of an earlier hand-over; the other process can cancel nevertheless.

    Cost: an ioctl for each mapping; whatever is in memory stays where it is.
    """
    callbacks = _check_callbacks(resized, place, policy_of, progress)
    numbers = [_check_number(fd) for fd in fds]
    wanted = _load(state, callbacks)
    kernel = kernel or LinuxKernel()
    _check_descriptors(kernel, wanted, numbers)
    taking = _Taking(kernel, wanted, numbers)
    try:
        return taking.take(place=place, policy_of=policy_of, progress=progress, resized=callbacks)
    except BaseException as error:
        taking.give_back(error)
        raise


def _check_callbacks(resized: Mapping[str, ResizedCallback] | None, *others: object) -> Mapping[str, ResizedCallback]:
    """Return a copy of `resized`. Raises TypeError where something that is to be called cannot be."""
    if not isinstance(resized, Mapping | None):
        raise TypeError(f"resized must be a mapping of id strings to callbacks, not {resized!r}")
    found = dict(resized or {})
    if not all(callback is None or callable(callback) for callback in (*found.values(), *others)):
        raise TypeError("place, policy_of, progress and all of resized are called, so that they must be callable")
    return found


def _check_number(fd: object) -> int:
    number = check_whole_number(fd, "a descriptor")
    if not 0 <= number < 1 << 31:
        raise ValueError(f"no descriptor has the number {number}")
    return number


def _load(state: bytes, resized: Mapping[str, ResizedCallback]) -> State:
    """Return the state of which `resized` has callbacks. Raises TypeError and ValueError."""
    try:
        data = bytes(memoryview(state))
    except TypeError as error:
        raise TypeError(f"state must be bytes, as HandOver.state has them, not {type(state).__name__}") from error
    wanted = State.load(data)
    if unknown := set(resized) - {block.idstr for block in wanted.blocks}:
        raise ValueError(f"there is no RAM block '{min(unknown, key=str)}' among those that are handed over")
    return wanted


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
    first = 1 + len(state.groups) + len(state.devices)
    for block, name, status in zip(state.blocks, names[first:], statuses[first:], strict=False):
        _check_memory(block, name, status)
    for irq, eventfds in state.irq_fds(fds):
        _check_eventfds(irq, eventfds)


def _check_eventfds(irq: HandedIrq, fds: Sequence[int]) -> None:
    # All eventfds are one file to fstat(2), so that only /proc tells them apart.
    for fd, name, identity in zip(fds, irq.names, irq.eventfds, strict=True):
        found = find_identity(fd)
        if None not in (found, identity) and found != identity:
            raise HandOverError(f"descriptor {fd} should be {name}, and is another", hint="Pass HandOver.fds in order")


def _status(kernel: Kernel, fd: int, name: str) -> FileStatus:
    try:
        return kernel.file_status(fd)
    except OSError as error:
        raise HandOverError(
            f"descriptor {fd} should be {name}: {error.strerror}",
            hint="Send the descriptors themselves (socket.send_fds), or HandOver.make_inheritable() before execve; "
            "their numbers mean nothing in another process",
        ) from error


def _check_memory(block: HandedBlock, name: str, status: FileStatus) -> None:
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
        self._irqs: list[Irq] = []
        self._container: Container | None = None
        self._blocks: list[RamBlock] = []
        self._told: list[DmaRange] = []  # mappings that may have an address of this process
        self._lost = False  # whether they may have one of another by now, who is taking everything back

    def take(
        self,
        *,
        place: Callable[[RamBlock], int | None] | None,
        policy_of: Callable[[RamBlock | BlockShape], Policy | None] | None,
        progress: ProgressCallback | None,
        resized: Mapping[str, ResizedCallback],
    ) -> TakenOver:
        """Everything, or `give_back`."""
        state = self._state
        try:
            container, devices = self._adopt()
        except ValueError as error:
            raise HandOverError(f"these descriptors are not what the state says: {error}") from error
        blocks = RamBlockList(kernel=self._kernel)
        for described, fd in zip(state.blocks, state.block_fds(self._fds), strict=True):
            self._receive(blocks, described, fd, progress, resized.get(described.idstr))
        for described, block in zip(state.blocks, self._blocks, strict=True):
            for piece in described.pieces:
                checkpoint()
                self._tell(container, block, described.iova, piece)
        policy = state.policy
        mapper = DmaMapper(
            container,
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
        for fd in self._fds:
            os.set_inheritable(fd, False)  # noqa: FBT003
        for block in self._blocks:
            block.state.memory.own()
        logger.debug("took over %r", container)
        return TakenOver(container, devices, blocks, mapper, taking=self)

    def _adopt(self) -> tuple[Container, dict[str, Device]]:
        state, fds = self._state, iter(self._fds)
        container_fd = next(fds)
        groups = {}
        for number in state.groups:
            group = groups[number] = Group.from_fd(next(fds), number=number, kernel=self._kernel)
            self._handles.append(group)
            if not group.get_status() & ioctls.VFIO_GROUP_FLAGS_CONTAINER_SET:
                raise HandOverError(f"IOMMU group {number} is in no container: the other process has taken it out")
        container = self._container = Container.from_fd(
            container_fd,
            iommu_type=state.iommu_type,
            groups=groups.values(),
            mapped=sum(len(block.pieces) for block in state.blocks),
            dma_bits=state.container_bits,
            kernel=self._kernel,
        )
        self._handles.append(container)
        devices = {}
        for described in state.devices:
            device = devices[described.bdf] = Device.from_fd(groups[described.group], described.bdf, next(fds))
            self._handles.append(device)
        return container, devices

    def _adopt_irqs(self, devices: Mapping[str, Device]) -> None:
        for described, fds in self._state.irq_fds(self._fds):
            irq = devices[described.bdf].irq(described.index)
            if described.count > irq.count:
                raise HandOverError(
                    f"{described.count} vectors of interrupt {described.index} of {described.bdf} should be enabled, "
                    f"and the device has {irq.count}"
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
            raise TypeError(f"a state holds memory of a file, not {described.memory}")
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

    def _tell(self, container: Container, block: RamBlock, iova: int, piece: Extent) -> None:
        mapping = DmaRange(Iova(iova + piece.start), piece.size, Vaddr(block.vaddr + piece.start))
        self._told.append(mapping)
        try:
            set_vaddr(container, mapping)
        except PinLimitError as error:
            size, locked = self._state.mapped, sum(told.size for told in self._told[:-1])
            raise explain_limit(error, container, size=size, locked=locked) from error
        except IoctlError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):
                self._told.pop()  # the kernel has changed nothing
                self._lost = True
            raise self._explain(error, mapping) from error

    @staticmethod
    def _explain(error: IoctlError, mapping: DmaRange) -> VfioError:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            return error
        hint = (
            "The other process has cancelled, somebody has taken over before, or the state is of an earlier hand-over; "
            "hand over once more"
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
        unknown = self._lost and bool(self._told)
        if (container := self._container) is not None:
            for mapping in () if unknown else self._told:
                attempt(partial(give_up_vaddr, container, mapping), failures)
        for block in self._blocks:
            block.state.memory.disown()
            if failures or unknown:
                block.state.memory.keep()  # they may be addresses of it
            else:
                attempt(block.state.memory.release, failures)
        for irq in self._irqs:
            attempt(irq.give_up, failures)
        for handle in self._handles:
            handle.release_fd()
        if failures or unknown:
            raise RollbackError(
                "what was handed over could not be taken over, and some of it is said to be here",
                [as_exception(cause), *failures],
                hint="The device reaches what it did. Let the other process cancel",
            ) from cause
