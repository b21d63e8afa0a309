"""Look-ups in a mapper: the IOVA of memory of this process, and the memory behind an IOVA."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, SupportsIndex, overload

from pyvfio.guard import reading
from pyvfio.mapper.buffers import DmaMapping
from pyvfio.mapper.held import OwnMemory, export_buffer
from pyvfio.mapper.regions import RegionMapper
from pyvfio.mapper.runs import Piece, Runs, not_mapped, whole_numbers
from pyvfio.mapper.segments import Limits, Parts, Segment, SegmentArrays, check_part, cut, cut_all, join
from pyvfio.mapper.window import Window
from pyvfio.units import Iova, Vaddr, check_whole_number

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from 3.12 on

    from pyvfio.mapper.vectors import Numbers, RunVectors, Vector


class TranslatingMapper(RegionMapper):
    """Translates addresses of mapped memory.

    For many addresses at once, the mapper keeps all runs of mapped memory in arrays. The first such look-up after a
    change builds the arrays again.
    """

    # The memory of the last answer: first, end, IOVA less vaddr, and two counts of changes. The answer is valid until
    # the count of the caller's own memory changes or, for a block (not None), the count of the space.
    _seen: tuple[int, int, int, int, int | None] = (0, 0, 0, -1, None)
    _runs: Runs | None = None
    _vectors: RunVectors | None = None  # the same runs for numpy
    _runs_at: tuple[int, ...] = ()  # the counts of changes when the runs were built
    _pieces = 0  # the number of pieces in the runs
    _asked = 0  # addresses translated one by one since then

    def translate_vaddr(self, vaddr: SupportsIndex, size: SupportsIndex = 1) -> Iova:
        """Return the IOVA of `[vaddr, vaddr + size)`, which one block or one mapping of the caller must map whole.

        Raises LookupError if not all bytes are mapped: the tail of a block behind `used_length` is never found. Raises
        ValueError if `size` is below 1. Temporary mappings are not searched.

        Synchronization: any thread; takes no lock in the common case. Cost: O(log n); less for the memory that the
        previous look-up found.
        """
        start = vaddr if type(vaddr) is int else check_whole_number(vaddr, "vaddr")
        length = size if type(size) is int and size > 0 else _size(size)
        self.guard.check()
        if self._closed or self._space.lost:
            self.check_open()
        first, end, distance, own_changes, changes = self._seen
        inside = first <= start and start + length <= end
        if inside and own_changes == self._fixed.changes and (changes is None or changes == self._space.changes):
            return start + distance  # type: ignore[return-value]  # Iova() is a call, and int at runtime
        return self._look(start, length)

    def _look(self, vaddr: int, size: int) -> Iova:
        """Translate as `translate_vaddr` does, and cache the answer for all of that memory."""
        own_changes = self._fixed.changes  # read before the search: a concurrent change then voids the cached answer
        own = self._fixed.peek(vaddr)
        if own is not None:
            first, distance = own.vaddr, own.iova - own.vaddr
            end = first + own.size
            if first <= vaddr and vaddr + size <= end:
                self._seen = first, end, distance, own_changes, None
                return vaddr + distance  # type: ignore[return-value]  # as above
        changes = self._space.changes
        found = self._glance_at_block(vaddr, size) or self._find_surely(vaddr, size)
        self._seen = *found.seen_from(vaddr), found.iova - found.vaddr, own_changes, changes
        return Iova(found.iova + vaddr - found.vaddr)

    def _glance_at_block(self, vaddr: int, size: int) -> Window | None:
        """As `_find_block`, without a lock: may return None while another thread makes a change. No blocks here."""
        del vaddr, size
        return None

    @reading
    def _find_surely(self, vaddr: int, size: int) -> OwnMemory | Window:
        if self._closed or self._space.lost:
            self.check_open()
        if (found := self._find(vaddr, size)) is None:
            raise LookupError(f"{size:#x} bytes at vaddr {vaddr:#x} are not mapped for the device in one piece")
        return found

    @overload
    def translate_vaddrs(  # type: ignore[overload-overlap]  # an array of numpy's is iterable, too
        self, vaddrs: Numbers, size: SupportsIndex = 1
    ) -> Vector: ...

    @overload
    def translate_vaddrs(self, vaddrs: Iterable[SupportsIndex], size: SupportsIndex = 1) -> array[int]: ...

    def translate_vaddrs(
        self, vaddrs: Numbers | Iterable[SupportsIndex], size: SupportsIndex = 1
    ) -> Vector | array[int]:
        """Return the IOVA of `[vaddr, vaddr + size)` for each of many addresses, as `translate_vaddr` does for one.

        `vaddrs`: a numpy array of integers of any shape, which gives an array of uint64 of that shape. An `array.array`
        or another iterable of whole numbers gives an `array.array` of type "Q". All addresses are translated at one
        moment: the mapper does not change in between.

        Raises LookupError if any address is not mapped; the error names their number and the first of them. ValueError:
        `size` is below 1. TypeError: not whole numbers. ClosedError; VfioError if the space has lost its mappings.

        Synchronization: any thread. Cost: 0.01 µs for each address with numpy, also for an `array.array` if the program
        has imported numpy. Without numpy, the cost depends on the address before: 0.1 µs in the same run of mapped
        memory, 0.5 µs in the next run, 1.3 µs elsewhere (O(log n)).

        The first call after any change of mappings is O(n): 0.3 µs for each mapping and 4 µs for each block. For few
        addresses, O(log n) for each address is less, and is used.
        """
        length = _size(size)
        if sys.modules.get("numpy") is None:
            return self._translate(whole_numbers(vaddrs, "vaddrs"), length)
        from pyvfio.mapper import vectors  # noqa: PLC0415 (numpy is not imported for a program that does not use numpy)

        if vectors.is_array(vaddrs):
            vector = vectors.as_vector(vaddrs, "vaddrs")
            if vector is not None:
                return self._translate_vector(vector, length).reshape(vaddrs.shape)
            vaddrs = vaddrs.reshape(-1).tolist()
        numbers = whole_numbers(vaddrs, "vaddrs")
        if isinstance(numbers, array):
            return vectors.to_array(self._translate_vector(vectors.from_array(numbers), length))
        return self._translate(numbers, length)

    @reading
    def _translate(self, vaddrs: Sequence[int], size: int) -> array[int]:
        runs = self._fresh_runs(len(vaddrs))
        return self._translate_each(vaddrs, size) if runs is None else runs.translate(vaddrs, size)

    @reading
    def _translate_vector(self, vaddrs: Vector, size: int) -> Vector:
        from pyvfio.mapper import vectors  # noqa: PLC0415

        runs = self._fresh_runs(len(vaddrs))
        if runs is None:
            return vectors.from_array(self._translate_each(vaddrs.tolist(), size))
        if self._vectors is None:
            self._vectors = vectors.RunVectors(runs)
        return self._vectors.translate(vaddrs, size)

    def _translate_each(self, vaddrs: Sequence[int], size: int) -> array[int]:
        """Translate as `Runs.translate` does, without runs."""
        found = [self._find(vaddr, size) for vaddr in vaddrs]
        missing = [number for number, memory in enumerate(found) if memory is None]
        if missing:
            raise not_mapped(len(missing), len(vaddrs), number=missing[0], vaddr=vaddrs[missing[0]], size=size)
        pairs = zip(vaddrs, found, strict=True)
        return array("Q", [vaddr + memory.iova - memory.vaddr for vaddr, memory in pairs if memory is not None])

    def _fresh_runs(self, count: int) -> Runs | None:
        """Return the runs of all mapped memory.

        Returns None if the runs are out of date, and building them takes longer than `count` single look-ups.
        """
        if self._closed or self._space.lost:
            self.check_open()
        changes = self._changes()
        if changes != self._runs_at:
            self._asked += count
            if 2 * self._asked < max(self._pieces, len(self._fixed)):
                return None
            pieces = list(self._mapped_pieces())
            self._runs, self._vectors, self._runs_at = Runs.of(pieces), None, changes
            self._pieces, self._asked = len(pieces), 0
        return self._runs

    def _changes(self) -> tuple[int, ...]:
        """Return the counts of all changes that affect a translation. To be read before anything else."""
        return self._space.changes, self._fixed.changes

    def _mapped_pieces(self) -> Iterator[Piece]:
        """Yield all memory that `_find` can return."""
        for number, memory in enumerate(self._fixed):
            yield memory.vaddr, memory.size, memory.iova, -1 - number

    @reading
    def translate_iova(self, iova: SupportsIndex, size: SupportsIndex = 1) -> Vaddr:
        """Return the vaddr of `[iova, iova + size)`. The bytes must be contiguous in this process too.

        Raises LookupError if a device could not reach all bytes, or if they are not contiguous; ValueError if `size` is
        below 1. Cost: O(log n) and the number of pieces.
        """
        start, length = check_whole_number(iova, "iova"), _size(size)
        if self._closed or self._space.lost:
            self.check_open()
        whole = self._space.mapping_at(start)
        if whole is not None and start + length <= whole.iova + whole.size:
            return Vaddr(whole.vaddr + start - whole.iova)
        reached, apart = start, set()
        for mapping in self._space.mappings_in(iova=start, size=length):
            if mapping.iova > reached:
                break
            reached = mapping.iova + mapping.size
            apart.add(mapping.vaddr - mapping.iova)
        if reached < start + length or len(apart) != 1:
            raise LookupError(f"{length:#x} bytes at IOVA {start:#x} are not mapped for neighbours in this process")
        return Vaddr(start + apart.pop())

    @reading
    def segments(
        self,
        memory: DmaMapping | Buffer,
        /,
        offset: SupportsIndex = 0,
        size: SupportsIndex | None = None,
        *,
        max_segment: SupportsIndex | None = None,
        boundary: SupportsIndex | None = None,
    ) -> list[Segment]:
        """Return `[offset, offset + size)` of mapped memory as (iova, size) pairs, for scatter-gather and PRP lists.

        `memory`: a DmaMapping of this mapper, a RAM block, or a buffer in mapped memory (a view of a block, an
        mmap.mmap, a numpy array). All lengths are in bytes; `size` None: up to the end. `max_segment`: no segment is
        longer. `boundary`, a power of two: no segment crosses a multiple of this number. Adjacent IOVAs are joined, so
        the list is as short as these two limits allow.

        The IOVAs are valid while the memory stays mapped: hold a DmaMapping of the memory, or do not shrink the block.

        Raises ValueError if the range is discarded or not inside `memory`, if a buffer is read-only or not contiguous,
        or if `memory` belongs to another mapper. Raises LookupError if bytes are not mapped; for a temporary mapping,
        pass the DmaMapping. TypeError; ClosedError.

        Cost: one look-up, O(log n), and 0.1 µs for each segment.

        Example:
            >>> import pyvfio
            >>> kernel = pyvfio.testing.FakeKernel()
            >>> device = pyvfio.open_device("0000:00:02.0", kernel=kernel)
            >>> blocks = pyvfio.RamBlockList(kernel=kernel)
            >>> mapper = pyvfio.DmaMapper(device.space, blocks)
            >>> ring = blocks.add("ring", used_length=2 * pyvfio.MIB, max_length=pyvfio.GIB)
            >>> [(hex(iova), size) for iova, size in mapper.segments(ring, 0xF00, 0x300, boundary=0x1000)]
            [('0x200f00', 256), ('0x201000', 512)]
        """
        limits = Limits.checked(max_segment, boundary)
        if self._closed or self._space.lost:
            self.check_open()
        ranges = self._ranges(memory, offset, size)
        if len(ranges) == 1:
            return cut(*ranges[0], limits)
        return [segment for each in join(ranges) for segment in cut(*each, limits)]

    @overload
    def segment_arrays(  # type: ignore[overload-overlap]
        self,
        memory: DmaMapping | Buffer,
        /,
        offsets: Numbers,
        size: SupportsIndex | None = None,
        *,
        max_segment: SupportsIndex | None = None,
        boundary: SupportsIndex | None = None,
    ) -> SegmentArrays[Vector]: ...

    @overload
    def segment_arrays(
        self,
        memory: DmaMapping | Buffer,
        /,
        offsets: SupportsIndex | Iterable[SupportsIndex] = 0,
        size: SupportsIndex | None = None,
        *,
        max_segment: SupportsIndex | None = None,
        boundary: SupportsIndex | None = None,
    ) -> SegmentArrays[array[int]]: ...

    def segment_arrays(
        self,
        memory: DmaMapping | Buffer,
        /,
        offsets: Numbers | SupportsIndex | Iterable[SupportsIndex] = 0,
        size: SupportsIndex | None = None,
        *,
        max_segment: SupportsIndex | None = None,
        boundary: SupportsIndex | None = None,
    ) -> SegmentArrays[Vector] | SegmentArrays[array[int]]:
        """Return the segments of one or many parts of mapped memory in arrays, as `segments` does in a list for one.

        `offsets`: the starts of the parts, each of `size` bytes. The arrays `iovas` and `sizes` contain the segments of
        all parts in order, `counts` the number of segments of each part. With `boundary=4096`, `iovas` can be copied
        into a PRP list. A numpy array of offsets gives arrays of uint64, other offsets `array.array` of type "Q". All
        parts are looked up at one moment.

        Arguments, limits and errors as `segments`; the error is that of the first part with one.

        Synchronization: any thread. Cost: one look-up if one run of IOVA contains all parts, as in a block without
        discarded parts; else one for each part. 1 µs for each part and 0.1 µs for each segment; 0.1 µs for both with a
        numpy array of offsets.
        """
        limits = Limits.checked(max_segment, boundary)
        length = None if size is None else check_whole_number(size, "size")
        if sys.modules.get("numpy") is not None:
            from pyvfio.mapper import vectors  # noqa: PLC0415 (as above)

            if vectors.is_array(offsets):
                vector = vectors.as_vector(offsets, "offsets")
                if vector is not None:
                    return vectors.cut_vectors(self._parts(memory, vector.tolist(), length), vector, length, limits)
                offsets = offsets.reshape(-1).tolist()
        numbers = whole_numbers(offsets if isinstance(offsets, Iterable) else [offsets], "offset")
        parts = self._parts(memory, numbers, length)
        if isinstance(parts, list):
            return cut_all(parts, limits)
        apart, end = parts
        return cut_all(([(apart + at, end - at if length is None else length)] for at in numbers), limits)

    @reading
    def _parts(self, memory: DmaMapping | Buffer, offsets: Sequence[int], size: int | None) -> Parts:
        """Return the mapped ranges of the parts at `offsets`."""
        if self._closed or self._space.lost:
            self.check_open()
        if offsets and (size is None or size > 0):
            first, last = min(offsets), max(offsets)
            try:
                whole = join(self._ranges(memory, first, None if size is None else last - first + size))
            except (ValueError, LookupError):  # a single part may be valid nevertheless
                whole = []
            if len(whole) == 1 and last < first + whole[0][1]:
                return whole[0][0] - first, first + whole[0][1]
        return [join(self._ranges(memory, offset, size)) for offset in offsets]

    def _ranges(
        self, memory: DmaMapping | Buffer, offset: SupportsIndex, size: SupportsIndex | None
    ) -> list[tuple[int, int]]:
        """Return the mapped ranges of a part of `memory`: (iova, size) in the order of the bytes."""
        if isinstance(memory, DmaMapping):
            memory.check_made_by(self)
            start, count = check_part(offset, size, memory.size, repr(memory))
            found = self._space.mappings_in(iova=memory.iova + start, size=count)
            first, end = memory.iova + start, memory.iova + start + count
            if sum(min(each.iova + each.size, end) - max(each.iova, first) for each in found) < count:
                raise LookupError(f"{memory!r} is not mapped any more: another user of the space has unmapped it")
            return [(memory.iova + start, count)]
        view, vaddr = export_buffer(memory)
        try:
            start, count = check_part(offset, size, view.nbytes, "this buffer")
        finally:
            view.release()
        whole = self._find_mapped(vaddr + start, count)
        if whole is not None:
            return [(whole.iova + vaddr + start - whole.vaddr, count)]
        return self._walk(vaddr + start, count)

    def _walk(self, vaddr: int, size: int) -> list[tuple[int, int]]:
        """Return as `_ranges`, for memory that several mappings cover together."""
        ranges, end = [], vaddr + size
        while vaddr < end:
            memory = self._find_mapped(vaddr, 1)
            if memory is None:
                raise LookupError(
                    f"{end - vaddr:#x} bytes at vaddr {vaddr:#x} are not mapped for the device; for a temporary "
                    "mapping, pass the DmaMapping itself"
                )
            stop = min(end, memory.reached_until(vaddr))
            ranges.append((memory.iova + vaddr - memory.vaddr, stop - vaddr))
            vaddr = stop
        return ranges


def _size(size: SupportsIndex) -> int:
    if type(size) is int and size > 0:
        return size
    number = check_whole_number(size, "size")
    if number < 1:
        raise ValueError(f"a size must be at least 1 byte, not {number}")
    return number
