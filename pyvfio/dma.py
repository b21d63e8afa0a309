"""Keeps what a device can reach equal to what RAM blocks hold, through every resize, at an IOVA that never moves.

A `DmaMapper` is a notifier of a `RamBlockList`. When a block comes, `max_length` of IOVA is reserved for it and its
`used_length` is mapped; when it is resized, the old mapping is taken away and the new one made at the same IOVA; when
it goes, both go. At every instant, also after any failure:

    what the device can reach  ⊆  [0, used_length), and what is just being changed

`pyvfio.mapper.policy` decides how. "remap" unmaps and remaps the block. DMA to the block fails until the remap
completes. This is what `qemu_vfio_dma_map_resize` does (patch 14 of the series "Ram blocks with resizable anonymous
allocations under POSIX", QEMU 2020), less the defects of the posted code: swapped arguments, a lock that is kept, a
failing map that counts as a mapping, a length of 0 that is lost, a new length that is not checked, an address in the
unmapped tail that is not recognised. "extend" maps and unmaps the difference, so everything that stays is in reach
throughout.
"""

from __future__ import annotations

import logging
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, SupportsIndex
from weakref import WeakKeyDictionary

from pyvfio.blocks.discards import DiscardClaim
from pyvfio.blocks.progress import LongWork, ProgressCallback
from pyvfio.errors import REACH_UNKNOWN, EntryLimitError, IoctlError
from pyvfio.extents import Extent, Part, clip, runs, without
from pyvfio.guard import ContextManager, Guard, close_now, closing_under, constructing, guarded, reading
from pyvfio.handle import attempt_all
from pyvfio.iommu.space import AddressSpace
from pyvfio.kernel import LinuxKernel
from pyvfio.mapper.buffers import LARGE_PAGE, DmaMapping, OwnMemory, Reserve
from pyvfio.mapper.plan import BlockShape, Budget, Plan, Rehearsal, check_shape, rehearse
from pyvfio.mapper.policy import Policy
from pyvfio.mapper.regions import RegionMapper
from pyvfio.mapper.segments import check_part
from pyvfio.mapper.window import READ, WRITE, Window
from pyvfio.memory.prefault import check_threads
from pyvfio.ramblock import RamBlock, RamBlockList
from pyvfio.units import Iova, Vaddr, check_whole_number

if TYPE_CHECKING:  # collections.abc has it from 3.12 on
    from typing_extensions import Buffer

logger = logging.getLogger(__name__)


class _Followed(NamedTuple):
    """A block, and the IOVA that is its own for `max_length` bytes; in the order of `vaddr`, which no two share."""

    vaddr: Vaddr
    block: RamBlock
    window: Window


def _same_kernel(blocks: RamBlockList, space: AddressSpace) -> bool:
    running = isinstance(blocks.kernel, LinuxKernel) and isinstance(space.kernel, LinuxKernel)
    return running or blocks.kernel is space.kernel


def _end(mapper: DmaMapper) -> None:
    mapper.close()


def _uppermost(mapper: DmaMapper) -> Guard:
    """The guard whose lock a close takes first: the list's lock is above the mapper's."""
    return mapper.guard if mapper.blocks is None else mapper.blocks.guard


class DmaMapper(RegionMapper, ContextManager):
    """Maps RAM blocks, buffers of the caller's own and other devices' BARs into an `AddressSpace`.

    `blocks`: follow that list from now on, blocks that it has included. `place`: asked for the IOVA of each block that
    comes; None leaves it to the mapper. `resize` and what goes with it say how a block's mapping follows its length:

    * "remap": unmapped, and mapped anew in one piece. DMA into the block that is under way meanwhile is stopped, so
      the caller quiesces the device. One mapping a block.
    * "extend": the difference is mapped, or unmapped in whole pieces; at most the head of the one piece that straddles
      the new end is unmapped and mapped again. A mapping for each grow; when the container takes no more, a block's
      pieces are joined by a remap.
    * "extend" with `granule` bytes (a power of two, at least `space.page_size`): all pieces are that long, lengths are
      multiples of it (ValueError), and no byte that survives is ever unmapped. A block that could need more mappings
      than there are is refused when it is added (EntryLimitError).

    `allow_gap=False`, with "extend": a resize for which a surviving byte would have to be unmapped is a GapError, or
    EntryLimitError where pieces would have to be joined.

    `policy_of` is asked for the policy of each block that comes, and for shapes that are planned: a `Policy`, for rings
    that are remapped beside buffers in granules, or None for that of `resize`, `granule` and `allow_gap`. While a block
    has granules, each block that comes is promised the mappings that it may need (EntryLimitError), one where it has no
    granules. A block keeps its policy.

    `dma_bits`, 17 to 64: how many address bits the device has. IOVAs that the mapper chooses lie below 2^`dma_bits`:
    those of blocks and buffers from the bottom up, of temporary mappings from the top down. None: the limit of `space`,
    which is 39 bits unless the caller has set another. An IOVA of the caller's own (`place`, `iova=`) may lie above.

    `prefault`: how many threads populate a block's memory before it is mapped, which otherwise is the map's work and
    one thread's; 0 for none. `progress` is told of each piece that has been populated, mapped or unmapped; a change
    ends between pieces, with the block as it was, when it raises or a signal handler does. It is given a `Progress`,
    by the thread that makes the change and under the lock of the list, so that it must return soon.

    A block keeps the parts of it that `map_dma`, `map_buffer` and `map_temporary` have given out: it cannot shrink
    below them, discard them or be removed (BufferError) until those mappings are closed. Closing the list or the mapper
    ends them all.

    Raises what mapping the existing blocks raises; then it follows nothing. ValueError: options that do not go
    together, or a list that is on another kernel than `space`.

    Synchronization: every method may be called from any thread. A block's hooks are called under the list's lock.
    Cost: a resize that remaps unmaps the old length and maps the new one, whatever the difference; one that extends
    costs what the difference does.
    """

    @constructing(_end)
    def __init__(
        self,
        space: AddressSpace,
        blocks: RamBlockList | None = None,
        *,
        resize: Literal["remap", "extend"] = "remap",
        granule: int | None = None,
        allow_gap: bool = True,
        place: Callable[[RamBlock], int | None] | None = None,
        prefault: int = 0,
        progress: ProgressCallback | None = None,
        dma_bits: int | None = None,
        policy_of: Callable[[RamBlock | BlockShape], Policy | None] | None = None,
    ) -> None:
        policy = Policy(resize, granule, allow_gap)
        super().__init__(space, dma_bits=dma_bits)
        if not isinstance(blocks, RamBlockList | None):
            raise TypeError(f"blocks must be a RamBlockList, not {type(blocks).__name__}")
        if not all(callback is None or callable(callback) for callback in (progress, place, policy_of)):
            raise TypeError("progress, place and policy_of are called, so that they must be callable")
        self.policy = policy
        """How blocks are mapped for which `policy_of` has no policy."""
        self.prefault = check_threads(prefault, "prefault")
        """How many threads populate memory before it is mapped."""
        self.blocks: RamBlockList | None = None
        """The list that it follows."""
        self._progress = progress
        self._place = place or (lambda _block: None)
        self._policy_of = policy_of or (lambda _block: None)
        self._promises = granule is not None  # whether a block has, or had, granules: mappings are promised then
        self._windows: dict[RamBlock, Window] = {}
        self._followed: list[_Followed] = []  # the same, sorted by vaddr, windows being as long as their blocks
        self._departing: dict[RamBlock, Window] = {}  # removed, and the list may still have to take that back
        self._former: WeakKeyDictionary[RamBlock, Iova] = WeakKeyDictionary()  # of blocks that have left
        self._claim: DiscardClaim | None = None
        self._leaving = False
        self._list_guard: Guard | None = None  # of the list that it follows, or has followed
        if blocks is not None:
            self._follow(blocks)

    def _follow(self, blocks: RamBlockList) -> None:
        if not _same_kernel(blocks, self._space):
            raise ValueError(
                f"the list of blocks is on {blocks.kernel!r} and the address space on {self._space.kernel!r}; give "
                "both the same kernel="
            )
        self._claim = blocks.discards.disable_uncoordinated()
        self._list_guard = blocks.guard
        try:
            blocks.add_notifier(self)
        except BaseException:
            close_now(self._claim)
            raise
        self.blocks = blocks

    def __repr__(self) -> str:
        if self._closed:
            return "<DmaMapper closed>"
        granule = "" if self.policy.granule is None else f" granule={self.policy.granule:#x}"
        blocks, buffers = len(self._followed), len(self._fixed)
        return (
            f"<DmaMapper {self.policy.resize}{granule}: {blocks} block{'s' * (blocks != 1)}, {buffers} "
            f"buffer{'s' * (buffers != 1)}, {len(self._temporary)} temporary>"
        )

    # ------------------------------------------------------------------------------------------------ RAM blocks

    @guarded
    def ram_block_added(self, block: RamBlock, used_length: int, max_length: int) -> None:
        """Reserve `max_length` of IOVA and map the populated parts, or nothing of it.

        Raises ValueError where granules do not make the block up, and for a block of another list than the mapper's.
        A block that comes back, since its removal was refused, has its place, its policy and its mappings as before.
        """
        self.check_open()
        self._check_list(block)
        departing = self._departing.get(block)
        if departing is not None:
            self._change(departing, block.state.populated_at(used_length))
            del self._departing[block]
            self._enter(block, departing)
            return
        policy = self._choose_policy(block)
        self._check_pages(max_length, f"max_length of RAM block '{block.idstr}'")
        self._check_length(policy, used_length, "used_length")
        wanted = block.state.populated_at(used_length)
        self._check_parts(block, policy, wanted)  # it may have holes already
        self._check_budget(block, policy, max(policy.entries(max_length), len(wanted)))
        iova = self._find_place(block, self._reserve, self._reserve_own)
        window = self._window(block, iova, policy)
        try:
            self._change(window, wanted)
        except REACH_UNKNOWN:
            raise  # and keep the IOVA: the device may reach something there
        except BaseException:
            self._space.release_iova(iova)
            raise
        self._enter(block, window)
        logger.debug("added %r at iova=%#x", block, iova)

    def _check_list(self, block: RamBlock) -> None:
        if self._list_guard is None or block.guard.lock is not self._list_guard.lock:
            raise ValueError(
                f"RAM block '{block.idstr}' is of another list than this mapper follows: a DmaMapper follows the list "
                "that it was made with, DmaMapper(space, blocks)"
            )

    def _enter(self, block: RamBlock, window: Window) -> None:
        self._windows[block] = window
        self._promises = self._promises or window.policy.granule is not None
        insort(self._followed, _Followed(window.vaddr, block, window))

    def _choose_policy(self, block: RamBlock | BlockShape) -> Policy:
        chosen = self._policy_of(block)
        if not isinstance(chosen, Policy | None):
            raise TypeError(f"policy_of() returns a Policy or None, not {chosen!r}")
        return self.policy if chosen is None else chosen

    def _window(self, block: RamBlock, iova: Iova, policy: Policy) -> Window:
        access = READ if block.readonly else READ | WRITE
        return Window(
            self._space,
            policy,
            idstr=block.idstr,
            vaddr=block.vaddr,
            iova=iova,
            size=block.max_length,
            make_room=self._recycle,
            access=access,
            attendant=self._attendant(block),
        )

    @guarded
    def take_in(self, blocks: RamBlockList, places: Mapping[str, int], policies: Mapping[str, Policy]) -> None:
        """Follow `blocks`, a list that nobody else knows, each of which the space has mapped already at its IOVA and
        under its policy.

        For live update. No call is made and no notifier is told, so a failure leaves nothing to undo.
        """
        self._claim = blocks.discards.disable_uncoordinated()
        self._list_guard = blocks.guard
        for block in blocks:
            iova = self._space.reserve_iova_at(places[block.idstr], block.max_length)
            window = self._window(block, iova, policies[block.idstr])
            window.resume(block.populated)
            self._enter(block, window)
        blocks.follow(self)
        self.blocks = blocks

    @guarded
    def forget(self) -> None:
        """Forget blocks and mappings, which are another process's. For live update: no call is made."""
        self._closed = True
        self._windows, self._followed, self.blocks = {}, [], None
        if self._claim is not None:
            close_now(self._claim)

    @reading
    def windows(self) -> list[tuple[RamBlock, Window]]:
        """Return each block that is followed, and its pieces, ascending by address."""
        return [(block, window) for _vaddr, block, window in self._followed]

    def _check_budget(self, block: RamBlock, policy: Policy, needed: int) -> None:
        """EntryLimitError where a block could need more mappings than are left, and a block has granules: mappings are
        promised to each block then."""
        granule = policy.granule
        if granule is not None and granule % self._space.page_size:
            raise ValueError(
                f"a granule must be at least the IOMMU's page, {self._space.page_size:#x}, not {granule:#x}"
            )
        if granule is None and not self._promises:
            return
        error = self._take_budget(block, granule, needed)
        if error is not None and self._recycle(error):
            error = self._take_budget(block, granule, needed)
        if error is not None:
            raise error

    def _take_budget(self, block: RamBlock, granule: int | None, needed: int) -> EntryLimitError | None:
        budget = Budget(self._entries_left(promises=True))
        return budget.take(block.idstr, granule, needed=needed, max_length=block.max_length)

    def _entries_left(self, *, promises: bool) -> int:
        """How many mappings are left, with `promises` when all blocks have those they may need."""
        promised = 0
        if promises:
            windows = self._windows.values()
            promised = sum(max(0, each.policy.entries(each.size) - len(each.pieces())) for each in windows)
        return self._space.entries_left - promised

    @guarded
    def plan(self, blocks: Iterable[BlockShape | RamBlock]) -> Plan:
        """What `blocks` would need if they were added in that order, against what there is; nothing is touched.

        Takes blocks of a list that this mapper does not follow yet, or their shapes. A `place` is asked for blocks, not
        for shapes, which say themselves where they are to be; `policy_of` is asked for both. Temporary mappings that
        have been given up count as taken: call `reset_temporary` first. Raises ValueError for lengths that can never be
        right, and for a block that is there already. Cost: some system calls, and populating 2 MiB.
        """
        self.check_open()
        shapes = [check_shape(shape) for shape in blocks]
        self._check_new(shapes)
        policies = [self._choose_policy(shape) for shape in shapes]
        promises = self._promises or any(policy.granule for policy in policies)
        return rehearse(
            self._space,
            shapes,
            policies,
            promises=promises,
            left=self._entries_left(promises=promises),
            threads=self.prefault,
            reserve=self._rehearse_iova,
        )

    def _check_new(self, shapes: Sequence[BlockShape | RamBlock]) -> None:
        known = {block.idstr: block for block in self._windows}
        for shape in shapes:
            followed = known.get(getattr(shape, "idstr", ""))
            if followed is not None and (followed is shape or isinstance(shape, BlockShape)):
                raise ValueError(f"there is a RAM block '{shape.idstr}' already, and this mapper follows it")

    def _rehearse_iova(self, rehearsal: Rehearsal, shape: BlockShape | RamBlock) -> Iova:
        if isinstance(shape, RamBlock):
            return self._find_place(shape, rehearsal.reserve_iova, rehearsal.reserve_iova_at)
        if shape.iova is not None:
            return rehearsal.reserve_iova_at(shape.iova, shape.max_length)
        return rehearsal.reserve_iova(shape.max_length, alignment=LARGE_PAGE, offset=0, dma_bits=self.dma_bits)

    def _attendant(self, block: RamBlock) -> LongWork | None:
        # A device that only reads would have the page of zeros where nothing was written yet, and keep it: kernels pin
        # what is there (`vaddr_get_pfns` without FOLL_WRITE).
        must = block.readonly and not block.state.memory.readable_only and not block.prealloc
        if not (must or self.prefault or self._progress is not None):
            return None
        threads = max(self.prefault, must)
        return LongWork(self._space.kernel, block, threads=threads, callback=self._progress)

    def _find_place(self, block: RamBlock, reserve: Reserve, reserve_at: Callable[[int, int], Iova]) -> Iova:
        wanted = self._place(block)
        if wanted is not None:
            return reserve_at(check_whole_number(wanted, "an IOVA that place() returns"), block.max_length)
        former = self._former.get(block)
        if former is not None:  # a block that has left with the mapper, and comes again, finds its IOVA again
            try:
                return reserve_at(former, block.max_length)
            except IoctlError:
                logger.debug("iova=%#x of %r has been given to another", former, block)
        return reserve(
            block.max_length,
            alignment=max(LARGE_PAGE, block.page_size),
            offset=block.vaddr,
            dma_bits=self.dma_bits,
        )

    def _reserve_own(self, iova: int, size: int) -> Iova:
        """Reserve the caller's own choice; temporary mappings there that have been closed make room."""
        try:
            return self._space.reserve_iova_at(iova, size)
        except IoctlError as error:
            if not self._recycle(error):
                raise
        return self._space.reserve_iova_at(iova, size)

    @guarded
    def ram_block_removed(self, block: RamBlock, used_length: int, max_length: int) -> None:
        """Unmap the block. Its IOVA stays reserved until `ram_block_gone`: the removal may be refused yet.

        Raises BufferError while a mapping of a part of it is open, unless the list or the mapper is being closed.
        UnmapSizeError or IoctlError: the block is then still reached.
        """
        del used_length, max_length
        window = self._windows.get(block)
        if window is None:
            return
        if not (self._leaving or (self.blocks is not None and self.blocks.closing)):
            window.check_held([])
        window.change([])
        self._departing[block] = window
        self._followed.remove(_Followed(window.vaddr, block, window))
        del self._windows[block]

    @guarded
    def ram_block_gone(self, block: RamBlock) -> None:
        """Release the IOVA of a block that has been removed: no notifier has refused it."""
        window = self._departing.pop(block, None)
        if window is not None:
            self._former[block] = window.iova
            self._space.release_iova(window.iova)
            logger.debug("removed %r from iova=%#x", block, window.iova)

    @guarded
    def ram_block_resized(self, block: RamBlock, old_length: int, new_length: int) -> None:
        """Map `new_length` in place of `old_length`, at the same IOVA.

        Raises BufferError while a mapping of a part behind `new_length` is open. When the kernel refuses, the refusal
        is raised, and all is mapped as before. When that fails too, RollbackError: the device reaches less than the
        block has, until it is resized once more or removed.
        """
        window = self._window_of(block)
        if not 0 <= new_length <= window.size:
            raise ValueError(f"{new_length:#x} is not within max_length {block.max_length:#x} of '{block.idstr}'")
        self._check_length(window.policy, new_length, "used_length")
        wanted = block.state.populated_at(new_length)
        if new_length < old_length:
            window.check_held(wanted)
        self._change(window, wanted)

    @guarded
    def ram_block_discarded(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Unmap parts of the block; as `ram_block_resized`. ValueError: granules do not make them up."""
        window, wanted = self._window_of(block), without(block.populated, *parts)
        self._check_parts(block, window.policy, parts)
        window.check_held(wanted)
        self._change(window, wanted)

    @guarded
    def ram_block_populated(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Map parts of the block again; as `ram_block_discarded`."""
        window = self._window_of(block)
        self._check_parts(block, window.policy, parts)
        self._change(window, runs(sorted([*without(block.populated, *parts), *parts])))

    @guarded
    def ram_block_remapping(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Unmap the pages of `parts`, and all that is mapped in one piece with them. GapError: that was not allowed,
        and a granule is not in `parts` as a whole."""
        window = self._window_of(block)
        policy = window.policy
        if policy.resize == "remap" and parts:
            self._change(window, [])  # it would be a piece before and one behind them, and one again
            return
        try:
            self._change(window, without(block.populated, *policy.round_out(parts, self._space.page_size)))
        except EntryLimitError:
            if not policy.joins:
                raise
            self._change(window, [])  # the container takes no piece before them and one behind them

    @guarded
    def ram_block_remapped(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Map the pages that there are now. As `ram_block_resized`."""
        del parts  # the window knows what it reaches
        self._change(self._window_of(block), block.populated)

    def _check_length(self, policy: Policy, length: int, what: str) -> None:
        """ValueError before anything is touched where pages of the IOMMU, or granules, do not make up `length`."""
        if length & (self._space.page_size - 1):
            self._check_pages(length, what)
        policy.check_length(length, what)

    def _check_pages(self, length: int, what: str) -> None:
        page = self._space.page_size
        if length % page:
            raise ValueError(
                f"{what} must be a multiple of the IOMMU's page, {page:#x} bytes, not {length:#x}: this IOMMU maps no "
                "smaller part"
            )

    def _check_parts(self, block: RamBlock, policy: Policy, parts: Sequence[Part]) -> None:
        for start, end in parts:
            self._check_length(policy, start, f"the start of a part of RAM block '{block.idstr}'")
            self._check_length(policy, end, f"the end of a part of RAM block '{block.idstr}'")

    def _change(self, window: Window, wanted: Sequence[Part]) -> None:
        try:
            window.change(wanted)
        except EntryLimitError:
            if window.policy.joins:
                logger.debug("joining pieces: the container takes no more mappings")
                self._join(window, wanted)
                return
            if not (others := self._joinable()):
                raise
            for other in others:
                other.change(runs(other.pieces()), join=True)
            window.change(wanted)

    def _joinable(self) -> list[Window]:
        """The blocks that would need fewer mappings if their pieces were joined, and whose pieces may be."""
        windows = [each for each in self._windows.values() if each.policy.joins]
        return [each for each in windows if len(pieces := each.pieces()) > len(runs(pieces))]

    def _join(self, window: Window, wanted: Sequence[Part]) -> None:
        """Where a block of many pieces becomes one, there is room again."""
        if not window.pieces() and (others := self._joinable()):
            most = max(others, key=lambda each: len(each.pieces()))
            most.change(runs(most.pieces()), join=True)
        window.change(wanted, join=True)

    def _window_of(self, block: RamBlock) -> Window:
        if self._closed or self._space.lost:
            self.check_open()
        window = self._windows.get(block)
        if window is None:
            raise ValueError(f"RAM block '{block.idstr}' is not followed by this mapper; it lies at {block.vaddr:#x}")
        return window

    def _below(self, vaddr: int) -> _Followed | None:
        """The last block that does not begin above `vaddr`."""
        if not self._followed:
            return None
        position = bisect_left(self._followed, (vaddr + 1,))
        return self._followed[position - 1] if position else None

    # ------------------------------------------------------------------------------------------------ look-ups

    @reading
    def iova(self, block: RamBlock, offset: SupportsIndex = 0, size: SupportsIndex | None = None) -> Iova:
        """Return where byte `offset` of `block` is for the device; it stays there until the block is removed.

        `iova(block)` is where the block begins, whatever its length. With `offset` or `size`, all of
        `[offset, offset + size)` has to be mapped (`size` None: the one byte), so that the IOVA can be given to a
        device that reaches `size` bytes from there on.

        Raises ValueError when the block is not followed, when bytes of the range are behind `used_length` or discarded,
        and for a `size` below 1; LookupError when a failed change has left bytes of it unmapped; TypeError;
        ClosedError; VfioError where nothing is mapped any more.
        """
        if not isinstance(block, RamBlock):
            raise TypeError(f"iova() is asked of a RamBlock, not of {block!r}")
        window = self._window_of(block)
        if check_whole_number(offset, "offset") == 0 and size is None:
            return window.iova
        start, _count = self._part(block, window, offset, 1 if size is None else size)
        return Iova(window.iova + start)

    @staticmethod
    def _part(block: RamBlock, window: Window, offset: SupportsIndex, size: SupportsIndex | None) -> tuple[int, int]:
        """Return the offset and the size of a part of a block, all of which is mapped; errors as `iova`."""
        state = block.state
        start, count = check_part(offset, size, state.used_length, f"RAM block '{block.idstr}' that are in use")
        if state.discarded and (gone := clip(state.discarded, start, start + count)):
            raise ValueError(
                f"bytes {gone[0].start:#x}-{gone[0].end - 1:#x} of RAM block '{block.idstr}' are discarded, so that no "
                "device reaches them: populate() them first"
            )
        if not window.settled and not window.reaches(window.vaddr + start, count):
            raise LookupError(
                f"bytes {start:#x}-{start + count - 1:#x} of RAM block '{block.idstr}' are not all mapped since a "
                "change and its undo failed; resize the block once more"
            )
        return start, count

    def _ranges(
        self, memory: DmaMapping | Buffer, offset: SupportsIndex, size: SupportsIndex | None
    ) -> list[tuple[int, int]]:
        if isinstance(memory, RamBlock):
            window = self._window_of(memory)
            start, count = self._part(memory, window, offset, size)
            return [(window.iova + start, count)]
        return super()._ranges(memory, offset, size)

    def _find(self, vaddr: int, size: int) -> OwnMemory | Window | None:
        if self._followed:
            followed = self._below(vaddr)
            if followed is not None and followed.window.reaches(vaddr, size):
                return followed.window
        return super()._find(vaddr, size)

    def _check_no_block(self, vaddr: int, size: int) -> None:
        followed = self._below(vaddr + size - 1)
        if followed is not None and followed.window.end > vaddr:
            block = followed.block
            raise ValueError(
                f"vaddr {vaddr:#x}-{vaddr + size - 1:#x} reaches into RAM block '{block.idstr}', which has IOVA of its "
                f"own for all of {block.vaddr:#x}-{block.vaddr + block.max_length - 1:#x}; grow the block instead"
            )
        blocks = self.blocks
        for address in (vaddr, vaddr + size - 1) if blocks else ():
            if blocks is not None and (leaving := blocks.block_at(address)) is not None:
                raise ValueError(f"vaddr {address:#x} is in RAM block '{leaving.idstr}', which is being removed")

    # ------------------------------------------------------------------------------------------------ the end

    @closing_under(_uppermost)
    def close(self) -> None:
        """Leave the list of blocks and unmap everything. Twice is fine, and in a forked child nothing happens.

        Mappings that are open end with it. Raises what the steps raise, after all of them were tried; memory that could
        not be unmapped stays known, and `close` may be called again.
        """
        if not self._closed:
            attempt_all("closing the DmaMapper", [self._leave, self._finish])

    def _leave(self) -> None:
        """Under the list's lock, which is above the mapper's."""
        if self.blocks is not None:
            self._leaving = True
            try:
                if self.blocks.knows(self):  # else it was taken out
                    self.blocks.remove_notifier(self)
            finally:
                self._leaving = False
            self.blocks = None
        if self._claim is not None:
            close_now(self._claim)

    @guarded
    def _finish(self) -> None:
        self._unmap_all()
        self._closed = self.blocks is None

    @reading
    def _check(self) -> None:
        """The invariant: for each block, the space has mapped exactly what the block holds."""
        for _vaddr, block, window in self._followed:
            reached = runs(window.pieces())
            if window.settled:
                assert reached == list(block.populated), (block, reached)
                window.check_held(reached)
            else:  # a change failed, and so did its undo: what is in reach besides is memory that is kept
                kept = Extent(0, block.max_length if block.whole else block.state.memory.held)
                assert not without(reached, *block.populated, kept), (block, reached)
            granule = window.policy.granule
            assert granule is None or all(piece.size == granule for piece in window.pieces())
        addresses = [followed.vaddr for followed in self._followed]
        assert addresses == sorted(addresses)
        assert {followed.block: followed.window for followed in self._followed} == self._windows
        super()._check()
