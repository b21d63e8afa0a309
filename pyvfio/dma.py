"""The DMA mapper: map RAM blocks for devices, and keep the mappings right through every resize, at a fixed IOVA.

A `DmaMapper` is a notifier of a `RamBlockList`. When a block is added, the mapper reserves `max_length` of IOVA and
maps `used_length`. When a block is resized, the mapper changes the mapping at the same IOVA. When a block is removed,
the mapper unmaps the block and releases the IOVA. At every instant, also after any failure:

    memory that the device can reach  ⊆  the union of [0, used_length) and the range being changed

If an undo fails, the range stays in the second set: the list keeps that memory until the device cannot reach it.

`pyvfio.mapper.policy` chooses the steps. "remap" unmaps and remaps the block. DMA to the block fails until the remap
completes. `qemu_vfio_dma_map_resize` does the same (patch 14 of the series "Ram blocks with resizable anonymous
allocations under POSIX", QEMU 2020), but the posted code has defects that are avoided here:

* arguments are swapped, and a lock is not released;
* a failed map counts as a mapping, and a length of 0 is lost;
* the new length is not checked, and addresses in the unmapped tail are not recognised.

"extend" maps and unmaps only the difference. With granules, the device can access the rest of the block throughout.
Without granules there are two exceptions: see `DmaMapper`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, SupportsIndex
from weakref import WeakKeyDictionary

from pyvfio.blocks.discards import DiscardClaim
from pyvfio.blocks.progress import LongWork, ProgressCallback
from pyvfio.errors import REACH_UNKNOWN, EntryLimitError, IoctlError, UnsupportedError
from pyvfio.extent_set import NOTHING
from pyvfio.extents import Extent, Part, added, removed, runs, without
from pyvfio.guard import ContextManager, Guard, close_now, closing_under, constructing, guarded, reading
from pyvfio.handle import attempt_all
from pyvfio.iommu.space import AddressSpace
from pyvfio.kernel import LinuxKernel
from pyvfio.mapper.buffers import LARGE_PAGE, DmaMapping, Reserve
from pyvfio.mapper.by_address import ByAddress
from pyvfio.mapper.lookups import TranslatingMapper
from pyvfio.mapper.plan import BlockShape, Plan, Rehearsal, check_shape, rehearse
from pyvfio.mapper.policy import Policy
from pyvfio.mapper.promises import Promises
from pyvfio.mapper.runs import Piece
from pyvfio.mapper.segments import check_part
from pyvfio.mapper.window import READ, WRITE, Window
from pyvfio.memory.prefault import check_threads
from pyvfio.ramblock import RamBlock, RamBlockList
from pyvfio.units import Iova, Vaddr, check_whole_number

if TYPE_CHECKING:
    from pyvfio.picture import Picture

if TYPE_CHECKING:  # collections.abc has it from 3.12 on
    from typing_extensions import Buffer

logger = logging.getLogger(__name__)


class _Followed(NamedTuple):
    """A block, with the window of `max_length` bytes of IOVA that is reserved for the block."""

    vaddr: Vaddr
    block: RamBlock
    window: Window


def _altered(block: RamBlock, parts: Sequence[Part], *, gains: bool) -> Sequence[Part]:
    """Return the extents of a block that devices reach after `parts` are mapped (`gains`) or unmapped."""
    return (added if gains else removed)(block.populated, parts)


def _same_kernel(blocks: RamBlockList, space: AddressSpace) -> bool:
    running = isinstance(blocks.kernel, LinuxKernel) and isinstance(space.kernel, LinuxKernel)
    return running or blocks.kernel is space.kernel


def _end(mapper: DmaMapper) -> None:
    mapper.close()


def _uppermost(mapper: DmaMapper) -> Guard:
    """Return the guard whose lock a close takes first: the lock of the list is above the mapper's."""
    return mapper.guard if mapper.blocks is None else mapper.blocks.guard


class DmaMapper(TranslatingMapper, ContextManager):
    """Map RAM blocks, buffers of the caller and BARs of other devices into an `AddressSpace`.

    `blocks`: the list to follow, including existing blocks. `place`: a function that returns the IOVA for a new block,
    or None to let the mapper choose. `resize` and `granule` determine how a mapping follows the length of a block:

    * "remap": the block is unmapped, and mapped again as one piece. DMA to the block fails until the remap completes,
      so the caller must quiesce the device. A block needs one mapping.
    * "extend": only the difference is mapped, or unmapped in whole pieces. If a shrink ends inside a piece, the head
      of that piece is unmapped and mapped again. Each grow adds a mapping. When the container takes no more mappings,
      the pieces of a block are joined by a remap.
    * "extend" with `granule` bytes (a power of two, at least `space.page_size`): all pieces have that size, and all
      lengths are multiples of `granule` (ValueError). Memory that stays in use is never unmapped. A block that could
      exceed the mappings of the container is refused when added (EntryLimitError).
    * "cut", on an `Ioas` made with `cut`: a grow maps the difference, and a shrink or discard cuts the bytes
      that leave out of the mappings. The rest stays mapped, at any multiple of `space.page_size`; with
      `Ioas(cut="pages")`, it is in reach throughout.

    `allow_gap=False`, with "extend": a resize that would unmap memory that stays in use raises GapError. A resize that
    would join pieces raises EntryLimitError. With "cut", a space is refused whose cuts can stop a device (ValueError).

    `policy_of`: a function that returns the `Policy` of a new block, or of a shape for `plan`. None: the policy of
    `resize`, `granule` and `allow_gap`. Rings can thus be remapped while buffers use granules. The policy of a block
    never changes. While any block has granules, each new block sets mappings of the container aside: as many as the
    block can need with granules, one without. If too few are left, EntryLimitError is raised.

    `dma_bits`, 17 to 64: the number of address bits of the device. The mapper chooses IOVAs below 2^`dma_bits`: for
    blocks and buffers from the bottom up, for temporary mappings from the top down. None: the limit of `space`, 39 bits
    unless set otherwise. An IOVA that the caller chooses (`place`, `iova=`) can lie above.

    `prefault`: the number of threads that populate the memory of a block before the map. 0: the map allocates the pages
    in a single thread. `progress`: called with a `Progress` after each piece is populated, mapped or unmapped. The
    changing thread makes the call under the lock of the list, so the function must return soon. If `progress` or a
    signal handler raises, the change ends between two pieces and is undone.

    A block cannot lose a part while a mapping of the part by `map_dma`, `map_buffer` or `map_temporary` is open. A
    shrink below the part, a discard of the part, and a removal of the block raise BufferError. Closing the list or the
    mapper closes all these mappings.

    If an existing block cannot be mapped, the error is raised, and the list has no new notifier. Raises ValueError for
    options that exclude each other, and for a list whose kernel is not the kernel of `space`.

    Synchronization: any thread may call any method. Hooks are called under the lock of the list.
    Cost: a resize by "remap" unmaps the old length and maps the new length. A resize by "extend" costs as much as the
    difference, and without granules sometimes a remap of one piece or of the block.

    Example:
        >>> import pyvfio
        >>> kernel = pyvfio.testing.FakeKernel()
        >>> device = pyvfio.open_device("0000:00:02.0", kernel=kernel)
        >>> blocks = pyvfio.RamBlockList(kernel=kernel)
        >>> mapper = pyvfio.DmaMapper(device.space, blocks, resize="extend", granule=pyvfio.MIB)
        >>> ring = blocks.add("ring", used_length=2 * pyvfio.MIB, max_length=pyvfio.GIB)
        >>> iova = mapper.iova(ring)
        >>> ring.resize(4 * pyvfio.MIB)
        >>> mapper.iova(ring) == iova
        True
        >>> sum(mapping.size for mapping in device.space.mappings) == 4 * pyvfio.MIB
        True
    """

    @constructing(_end)
    def __init__(
        self,
        space: AddressSpace,
        blocks: RamBlockList | None = None,
        *,
        resize: Literal["remap", "extend", "cut"] = "remap",
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
            raise TypeError("progress, place and policy_of must be callable or None")
        self._check_policy(policy)
        self.policy = policy
        """The policy of blocks for which `policy_of` returns None."""
        self.prefault = check_threads(prefault, "prefault")
        """The number of threads that populate memory before a map."""
        self.blocks: RamBlockList | None = None
        """The list that the mapper follows, or None."""
        self._progress = progress
        self._place = place or (lambda _block: None)
        self._policy_of = policy_of or (lambda _block: None)
        self._promises = Promises(space, made=granule is not None)
        self._windows: dict[RamBlock, Window] = {}
        self._followed = ByAddress[_Followed]()  # the same windows by address; a window has the block's max_length
        self._departing: dict[RamBlock, Window] = {}  # unmapped for a removal that the list may still undo
        self._stranded: list[Window] = []  # of blocks whose addition failed, and whose undo could not unmap
        self._former: WeakKeyDictionary[RamBlock, Iova] = WeakKeyDictionary()  # the IOVAs of removed blocks
        self._claim: DiscardClaim | None = None
        self._leaving = False
        self._list_guard: Guard | None = None  # of the current or the last list
        if blocks is not None:
            self._follow(blocks)

    def _follow(self, blocks: RamBlockList) -> None:
        if not _same_kernel(blocks, self._space):
            raise ValueError(
                f"the list of blocks uses {blocks.kernel!r}, and the address space uses {self._space.kernel!r}: pass "
                "the same kernel= to both"
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
        return f"<DmaMapper {self.policy.resize}{granule}: {self._contents()}>"

    def _contents(self) -> str:
        blocks, buffers = len(self._followed), len(self._fixed)
        return (
            f"{blocks} block{'s' * (blocks != 1)}, {buffers} buffer{'s' * (buffers != 1)}, "
            f"{len(self._temporary)} temporary"
        )

    # ------------------------------------------------------------------------------------------------ RAM blocks

    @guarded
    def ram_block_added(self, block: RamBlock, used_length: int, max_length: int) -> None:
        """Reserve `max_length` of IOVA and map the populated parts, or do neither.

        Raises ValueError if the lengths of the block are not multiples of the granule, and for a block of another list.
        The list calls this also to undo a refused removal: the block keeps IOVA and policy, and is mapped again.
        """
        self.check_open()
        self._check_list(block)
        departing = self._departing.get(block)
        if departing is not None:
            del self._departing[block]
            self._enter(block, departing)  # first: the block stays in the list even if the map fails
            self._change(departing, block.state.populated_at(used_length))
            return
        policy = self._choose_policy(block)
        self._check_pages(max_length, f"max_length of RAM block '{block.idstr}'")
        self._check_length(policy, used_length, "used_length")
        wanted = block.state.populated_at(used_length)
        self._check_parts(block, policy, wanted)  # parts of the block can be discarded already
        needed = max(policy.entries(max_length), len(wanted))
        self._promises.check(block.idstr, policy, needed=needed, max_length=max_length, make_room=self._recycle)
        iova = self._find_place(block, self._reserve, self._reserve_own)
        window = self._window(block, iova, policy)
        try:
            self._change(window, wanted)
        except REACH_UNKNOWN:
            self._stranded.append(window)  # the IOVA stays reserved: the device may still reach memory there
            raise
        except BaseException:
            self._space.release_iova(iova)
            raise
        self._enter(block, window)
        logger.debug("added %r at iova=%#x", block, iova)

    def _check_list(self, block: RamBlock) -> None:
        if self._list_guard is None or block.guard.lock is not self._list_guard.lock:
            raise ValueError(
                f"RAM block '{block.idstr}' is in another list: a DmaMapper follows only the list that was passed to "
                "DmaMapper(space, blocks)"
            )

    def _enter(self, block: RamBlock, window: Window) -> None:
        self._windows[block] = window
        window.enter(self._promises)
        self._promises.made = self._promises.made or window.policy.granule is not None
        self._followed.add(_Followed(window.vaddr, block, window))

    def _choose_policy(self, block: RamBlock | BlockShape) -> Policy:
        chosen = self._policy_of(block)
        if not isinstance(chosen, Policy | None):
            raise TypeError(f"policy_of() returns a Policy or None, not {chosen!r}")
        policy = self.policy if chosen is None else chosen
        self._check_policy(policy)
        return policy

    def _check_policy(self, policy: Policy) -> None:
        if policy.resize == "cut" and not self._space.can_cut:
            raise UnsupportedError(
                "resize='cut' needs an address space that can unmap part of a mapping",
                hint="Make the space with pyvfio.Ioas(cut='pages'), and pass it to open_device(space=); or use "
                "resize='extend' with granule=",
            )
        if policy.resize == "cut" and not policy.allow_gap and self._space.cut_opens_gap:
            raise ValueError(
                "allow_gap=False with resize='cut' needs Ioas(cut='pages'): cut='replace' moves the devices to another "
                "IOAS, and drivers of IOMMUs stop a device for the moment of the move"
            )

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
            file=block.state.memory.shared_file if self._space.maps_files else None,
            attendant=self._attendant(block),
        )

    @guarded
    def take_in(self, blocks: RamBlockList, places: Mapping[str, int], policies: Mapping[str, Policy]) -> None:
        """Follow `blocks`, whose memory the space has already mapped at `places` and under `policies`.

        For live update. The list has no other user. No system call is made and no notifier is called, so that a failure
        leaves nothing to undo.
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
        """Forget blocks and mappings, which another process owns now. For live update: makes no system call."""
        self._closed = True
        for window in self._windows.values():
            window.leave()
        self._windows, self.blocks = {}, None
        self._stranded.clear()
        self._followed.clear()
        if self._claim is not None:
            close_now(self._claim)

    @reading
    def windows(self) -> list[tuple[RamBlock, Window]]:
        """Return each followed block with its window, ascending by address."""
        return [(block, window) for _vaddr, block, window in self._followed]

    @reading
    def picture(self) -> Picture:
        """Return a `Picture` of the container's IOVA space, with the blocks and buffers of this mapper by name.

        Raises ClosedError when the mapper is closed. O(n log n), n mappings of the container.
        """
        from pyvfio.picture import Span, picture_of  # noqa: PLC0415 (few programs draw)

        self.check_open()
        spans = [
            Span("block", block.idstr, window.iova, window.size, block.used_length, tuple(window.pieces()))
            for _vaddr, block, window in self._followed
        ]
        for memory in self._own():
            kind: Literal["temporary", "buffer"] = "temporary" if memory.temporary else "buffer"
            spans.append(Span(kind, "", memory.iova, memory.size, memory.size, (Extent(0, memory.size),)))
        return picture_of(self._space, f"DmaMapper: {self._contents()}", spans)

    def _repr_svg_(self) -> str | None:
        return None if self._closed else self.picture().svg()

    @guarded
    def plan(self, blocks: Iterable[BlockShape | RamBlock]) -> Plan:
        """Return a `Plan`: the resources that `blocks` would need, in that order, and the resources that are available.

        Changes nothing. `blocks`: shapes, or blocks of a list that this mapper does not follow yet. `place` is called
        for blocks only, since a shape has its own `iova`; `policy_of` is called for both. Closed temporary mappings
        count as taken: call `reset_temporary` first.

        Raises ValueError for invalid lengths, and for a block that the mapper already follows. Cost: some system calls,
        and populating 2 MiB.

        Example:
            >>> import pyvfio
            >>> kernel = pyvfio.testing.FakeKernel()
            >>> device = pyvfio.open_device("0000:00:02.0", kernel=kernel)
            >>> blocks = pyvfio.RamBlockList(kernel=kernel)
            >>> mapper = pyvfio.DmaMapper(device.space, blocks)
            >>> shape = pyvfio.BlockShape("ring", used_length=2 * pyvfio.MIB, max_length=pyvfio.GIB)
            >>> plan = mapper.plan([shape])
            >>> plan.fits, plan.entries
            (True, 1)
        """
        self.check_open()
        shapes = [check_shape(shape) for shape in blocks]
        self._check_new(shapes)
        policies = [self._choose_policy(shape) for shape in shapes]
        promises = self._promises.made or any(policy.granule for policy in policies)
        return rehearse(
            self._space,
            shapes,
            policies,
            promises=promises,
            left=self._promises.left(made=promises),
            threads=self.prefault,
            reserve=self._rehearse_iova,
        )

    def _check_new(self, shapes: Sequence[BlockShape | RamBlock]) -> None:
        known = {block.idstr: block for block in self._windows}
        for shape in shapes:
            followed = known.get(getattr(shape, "idstr", ""))
            if followed is not None and (followed is shape or isinstance(shape, BlockShape)):
                raise ValueError(f"this mapper already follows a RAM block '{shape.idstr}'")

    def _rehearse_iova(self, rehearsal: Rehearsal, shape: BlockShape | RamBlock) -> Iova:
        if isinstance(shape, RamBlock):
            return self._find_place(shape, rehearsal.reserve_iova, rehearsal.reserve_iova_at)
        if shape.iova is not None:
            return rehearsal.reserve_iova_at(shape.iova, shape.max_length)
        return rehearsal.reserve_iova(shape.max_length, alignment=LARGE_PAGE, offset=0, dma_bits=self.dma_bits)

    def _attendant(self, block: RamBlock) -> LongWork | None:
        # A read-only map of untouched memory would pin the shared zero page, and the device would keep reading that
        # page: `vaddr_get_pfns` without FOLL_WRITE pins the pages that exist.
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
        if former is not None:  # a block that is added again gets its former IOVA, if free
            try:
                return reserve_at(former, block.max_length)
            except IoctlError:
                logger.debug("iova=%#x of %r is taken", former, block)
        return reserve(
            block.max_length,
            alignment=max(LARGE_PAGE, block.page_size),
            offset=block.vaddr,
            dma_bits=self.dma_bits,
        )

    def _reserve_own(self, iova: int, size: int) -> Iova:
        """Reserve the IOVA that the caller chose. Closed temporary mappings there are unmapped."""
        try:
            return self._space.reserve_iova_at(iova, size)
        except IoctlError as error:
            if not self._recycle(error):
                raise
        return self._space.reserve_iova_at(iova, size)

    @guarded
    def ram_block_removed(self, block: RamBlock, used_length: int, max_length: int) -> None:
        """Unmap the block. The IOVA stays reserved until `ram_block_gone`, since the removal can still be refused.

        Raises BufferError while a mapping of a part of the block is open, unless the list or the mapper is being
        closed. Raises UnmapSizeError or IoctlError; the device then still reaches the block.
        """
        del used_length, max_length
        window = self._windows.get(block)
        if window is None:
            return
        if not (self._leaving or (self.blocks is not None and self.blocks.closing)):
            window.check_held([(0, window.size)])
        window.change([])
        self._departing[block] = window
        window.leave()
        self._followed.remove(window.vaddr)
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
        """Map `new_length` instead of `old_length`, at the same IOVA.

        Raises BufferError while a mapping of a part beyond `new_length` is open. If the kernel refuses a step, the
        error is raised and the old mapping is restored. If that fails too, RollbackError is raised. The device then
        reaches less than the block holds, until the block is resized again or removed. Raises VfioError, before any
        call, while no device uses the space: neither the change nor the undo could map.
        """
        window = self._windows.get(block)
        if window is None or self._closed or self._space.lost or not self._space.takes_mappings:
            window = self._window_to_change(block)  # raises
        if not 0 <= new_length <= window.size:
            raise ValueError(f"{new_length:#x} is not within max_length {block.max_length:#x} of '{block.idstr}'")
        if new_length & ((window.policy.granule or self._space.page_size) - 1):
            self._check_length(window.policy, new_length, "used_length")
        gains, discarded = new_length > old_length, block.state.discarded
        tail = (old_length, new_length) if gains else (new_length, old_length)
        parts: Sequence[Part] = [tail] if new_length != old_length else []
        if discarded is not NOTHING:  # `if discarded` would cost a call of Python
            parts = without(parts, *discarded.clip(*tail))
        self._alter(block, window, parts, gains=gains)

    @guarded
    def ram_block_discarded(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Unmap parts of the block. Raises as `ram_block_resized`; ValueError for parts of no whole granules."""
        window = self._window_to_change(block)
        self._check_parts(block, window.policy, parts)
        self._alter(block, window, parts, gains=False)

    @guarded
    def ram_block_populated(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Map parts of the block again. Raises as `ram_block_discarded`."""
        window = self._window_to_change(block)
        self._check_parts(block, window.policy, parts)
        self._alter(block, window, parts, gains=True)

    @guarded
    def ram_block_remapping(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Unmap the pieces that contain `parts`, whose pages will be replaced.

        Raises GapError if the policy allows no gap and a granule lies only partly in `parts`. Raises VfioError while no
        device uses the space, which could not map the new pages.
        """
        window = self._window_to_change(block)
        if window.policy.resize == "remap" and parts:
            window.change([])  # unmap all: otherwise a piece before and a piece after `parts` would be mapped
            return
        lost = self._replaced(block, window.policy, parts)
        try:
            if window.follows(block.state, lost, gains=False):
                window.unmap(lost)
            else:
                window.change(without(block.populated, *lost))
        except EntryLimitError:
            if not window.policy.joins:
                raise
            window.unmap([(0, window.size)])  # the container has no mapping left for a second piece

    @guarded
    def ram_block_remapped(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Map the new pages of `parts`. Raises as `ram_block_resized`."""
        window = self._window_to_change(block)
        lost = self._replaced(block, window.policy, parts)
        if window.has_just_lost(lost):
            self._alter(block, window, lost, gains=True)
        else:
            self._change(window, block.populated)

    def _replaced(self, block: RamBlock, policy: Policy, parts: Sequence[Extent]) -> list[Extent]:
        """Return the extents that devices cannot reach during a replacement of `parts`, rounded out to pieces."""
        rounded = policy.round_out(parts, self._space.page_size)
        return [found for part in rounded for found in block.state.populated_in(*part)]

    def _alter(self, block: RamBlock, window: Window, parts: Sequence[Part], *, gains: bool) -> None:
        """Map (`gains`) or unmap `parts`. Other parts change only if the policy requires."""
        try:
            if not window.follows(block.state, parts, gains=gains):
                wanted = _altered(block, parts, gains=gains)
                if not gains:
                    window.check_held(without([(0, window.size)], *wanted))
                window.change(wanted)
            elif gains:
                window.map(parts)
            else:
                window.check_held(parts)
                window.unmap(parts)
        except EntryLimitError:
            self._join_for(window, _altered(block, parts, gains=gains))

    def _check_length(self, policy: Policy, length: int, what: str) -> None:
        """Raise ValueError, before any change, unless `length` is a multiple of the IOMMU's page and of the granule."""
        if length & (self._space.page_size - 1):
            self._check_pages(length, what)
        policy.check_length(length, what)

    def _check_pages(self, length: int, what: str) -> None:
        page = self._space.page_size
        if length % page:
            raise ValueError(
                f"{what} must be a multiple of the IOMMU's page, {page:#x} bytes, not {length:#x}: this IOMMU has no "
                "smaller pages"
            )

    def _check_parts(self, block: RamBlock, policy: Policy, parts: Sequence[Part]) -> None:
        for start, end in parts:
            self._check_length(policy, start, f"the start of a part of RAM block '{block.idstr}'")
            self._check_length(policy, end, f"the end of a part of RAM block '{block.idstr}'")

    def _change(self, window: Window, wanted: Sequence[Part]) -> None:
        try:
            window.change(wanted)
        except EntryLimitError:
            self._join_for(window, wanted)

    def _join_for(self, window: Window, wanted: Sequence[Part]) -> None:
        """Handle an EntryLimitError: join pieces of this window, or of others, and map `wanted`.

        Raises the EntryLimitError again if no pieces can be joined. Call this in an `except` block.
        """
        logger.debug("joining pieces: the container takes no more mappings")
        if window.policy.joins:
            self._join(window, wanted)
            return
        if not (others := self._joinable()):
            raise  # noqa: PLE0704
        for other in others:
            other.change(runs(other.pieces()), join=True)
        window.change(wanted)

    def _joinable(self) -> list[Window]:
        """Return the windows whose pieces can be joined into fewer mappings, and whose policies permit that."""
        windows = [each for each in self._windows.values() if each.in_pieces and each.policy.joins]
        return [each for each in windows if len(pieces := each.pieces()) > len(runs(pieces))]

    def _join(self, window: Window, wanted: Sequence[Part]) -> None:
        """Map `wanted` as few pieces. A window without pieces first gets room by joining those of another block."""
        if not window.reached and (others := self._joinable()):
            most = max(others, key=lambda each: len(each.pieces()))
            most.change(runs(most.pieces()), join=True)
        window.change(wanted, join=True)

    def _window_of(self, block: RamBlock) -> Window:
        if self._closed or self._space.lost:
            self.check_open()
        window = self._windows.get(block)
        if window is None:
            raise ValueError(f"this mapper does not follow RAM block '{block.idstr}' at {block.vaddr:#x}")
        return window

    def _window_to_change(self, block: RamBlock) -> Window:
        """Return the window for a change, which may have to map for its undo: without a device only removals work."""
        window = self._window_of(block)
        if not self._space.takes_mappings:
            self._space.check_takes_mappings()
        return window

    # ------------------------------------------------------------------------------------------------ look-ups

    @reading
    def iova(self, block: RamBlock, offset: SupportsIndex = 0, size: SupportsIndex | None = None) -> Iova:
        """Return the IOVA of byte `offset` of `block`. The IOVA is fixed until the block is removed.

        `iova(block)` is the start of the block, for any length. With `offset` or `size`, all of
        `[offset, offset + size)` must be mapped (`size` None: one byte). The device can then access `size` bytes from
        the returned IOVA.

        Raises ValueError if the mapper does not follow the block, or if `size` is below 1. Raises ValueError if the
        range extends beyond `used_length`, or contains discarded bytes. Raises LookupError if a failed change left
        bytes of the range unmapped, and VfioError if all mappings of the space were lost. Raises TypeError and
        ClosedError.

        Example:
            >>> import pyvfio
            >>> kernel = pyvfio.testing.FakeKernel()
            >>> device = pyvfio.open_device("0000:00:02.0", kernel=kernel)
            >>> blocks = pyvfio.RamBlockList(kernel=kernel)
            >>> mapper = pyvfio.DmaMapper(device.space, blocks)
            >>> ring = blocks.add("ring", used_length=2 * pyvfio.MIB, max_length=pyvfio.GIB)
            >>> f"{mapper.iova(ring):#x}"
            '0x200000'
            >>> f"{mapper.iova(ring, 0x3000, 0x1000):#x}"
            '0x203000'
        """
        if not isinstance(block, RamBlock):
            raise TypeError(f"iova() takes a RamBlock, not {block!r}")
        window = self._window_of(block)
        if check_whole_number(offset, "offset") == 0 and size is None:
            return window.iova
        start, _count = self._part(block, window, offset, 1 if size is None else size)
        return Iova(window.iova + start)

    @staticmethod
    def _part(block: RamBlock, window: Window, offset: SupportsIndex, size: SupportsIndex | None) -> tuple[int, int]:
        """Return the offset and the size of a part that is fully mapped. Raises as `iova`."""
        state = block.state
        if type(offset) is not int or not (size is None or type(size) is int):  # before the block's length is read
            offset = check_whole_number(offset, "offset")
            size = None if size is None else check_whole_number(size, "size")
        start, count = check_part(offset, size, state.used_length, f"RAM block '{block.idstr}' that are in use")
        if state.discarded and (gone := state.discarded.clip(start, start + count)):
            raise ValueError(
                f"bytes {gone[0].start:#x}-{gone[0].end - 1:#x} of RAM block '{block.idstr}' are discarded and not "
                "mapped: populate() them first"
            )
        if not window.settled and not window.reaches(window.vaddr + start, count):
            raise LookupError(
                f"bytes {start:#x}-{start + count - 1:#x} of RAM block '{block.idstr}' are not all mapped, because a "
                "change and its undo failed; resize the block again"
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

    def _find_block(self, vaddr: int, size: int) -> Window | None:
        if not self._windows:
            return None
        followed = self._followed.below(vaddr)
        return followed.window if followed is not None and followed.window.reaches(vaddr, size) else None

    def _block_of(self, vaddr: int, size: int) -> Window | None:
        if not self._windows and self.blocks is None:
            return None
        window = self._find_block(vaddr, size)
        if window is None:
            self._check_no_block(vaddr, size)
        return window

    def _glance_at_block(self, vaddr: int, size: int) -> Window | None:
        followed = self._followed.peek(vaddr)
        return followed.window if followed is not None and followed.window.has_seen(vaddr, size) else None

    def _changes(self) -> tuple[int, ...]:
        return *super()._changes(), self._followed.changes

    def _mapped_pieces(self) -> Iterator[Piece]:
        yield from super()._mapped_pieces()
        for vaddr, _block, window in self._followed:
            for start, end in window.pieces():
                yield vaddr + start, end - start, window.iova + start, vaddr

    def _check_no_block(self, vaddr: int, size: int) -> None:
        followed = self._followed.below(vaddr + size - 1)
        if followed is not None and followed.window.end > vaddr:
            block = followed.block
            raise ValueError(
                f"vaddr {vaddr:#x}-{vaddr + size - 1:#x} reaches into RAM block '{block.idstr}', which has reserved "
                f"IOVA for all of {block.vaddr:#x}-{block.vaddr + block.max_length - 1:#x}; grow the block instead"
            )
        blocks = self.blocks
        for address in (vaddr, vaddr + size - 1) if blocks else ():
            if blocks is not None and (leaving := blocks.block_at(address)) is not None:
                raise ValueError(f"vaddr {address:#x} is in RAM block '{leaving.idstr}', which is being removed")

    # ------------------------------------------------------------------------------------------------ the end

    @closing_under(_uppermost)
    def close(self) -> None:
        """Stop following the list, and unmap everything. Does nothing if already closed, or in a forked child.

        Open mappings of buffers and parts are closed. All steps are tried, and their errors are raised afterwards. The
        mapper keeps track of memory that could not be unmapped, and `close` can be called again.
        """
        if not self._closed:
            attempt_all("closing the DmaMapper", [self._leave, self._finish])

    def _leave(self) -> None:
        """Stop following the list. The caller holds the list's lock, which is above the mapper's."""
        if self.blocks is not None:
            self._leaving = True
            try:
                if self.blocks.knows(self):  # otherwise the program removed the notifier
                    self.blocks.remove_notifier(self)
            finally:
                self._leaving = False
            self.blocks = None
        if self._claim is not None:
            close_now(self._claim)

    @guarded
    def _finish(self) -> None:
        steps: list[Callable[[], object]] = [self._unmap_all]
        if self.blocks is None:  # windows that are left are of blocks whose addition and undo both failed
            for _vaddr, block, window in list(self._followed):
                window.leave()
                self._followed.remove(window.vaddr)
                del self._windows[block]
                self._stranded.append(window)
            steps += [partial(self._unmap_stranded, window) for window in list(self._stranded)]
        attempt_all("unmapping the remaining mappings", steps)
        self._closed = self.blocks is None

    def _unmap_stranded(self, window: Window) -> None:
        window.change([])
        self._space.release_iova(window.iova)
        self._stranded.remove(window)

    @reading
    def _check(self) -> None:
        """Check the invariant: for each block, the space has mapped exactly the populated extents."""
        for _vaddr, block, window in self._followed:
            window._check()
            reached = runs(window.pieces())
            if window.settled:
                assert reached == list(block.populated), (block, reached)
                window.check_held(without([(0, window.size)], *reached))
            else:  # a change and its undo failed: other memory that the device reaches must be kept memory
                kept = Extent(0, block.max_length if block.whole else block.state.memory.held)
                assert not without(reached, *block.populated, kept), (block, reached)
        self._followed._check()
        assert {followed.block: followed.window for followed in self._followed} == self._windows
        assert self._promises.total == sum(followed.window.promised for followed in self._followed)
        super()._check()
