"""Mapped memory of the caller, and the buffers that stay exported while they are mapped."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias

from pyvfio.units import Iova, Vaddr

if TYPE_CHECKING:  # collections.abc has it from 3.12 on
    from typing_extensions import Buffer


_first_byte, _address_of = ctypes.c_char.from_buffer, ctypes.addressof


def export_buffer(buffer: Buffer) -> tuple[memoryview, Vaddr]:
    """Return a memoryview that pins the buffer's memory in place, and the address of the first byte."""
    view = memoryview(buffer)
    try:
        return view, _address_of(_first_byte(view))  # type: ignore[return-value]  # Vaddr() is a call, and int at runtime
    except (TypeError, ValueError):  # from_buffer() checks all three
        if not view.readonly and view.c_contiguous and view.nbytes:
            raise
        what = "read-only" if view.readonly else "empty" if view.c_contiguous else "not contiguous"
        size = view.nbytes
        view.release()
    raise ValueError(
        f"this buffer of {size} bytes is {what}; a buffer for DMA must be writable, contiguous and not empty. Map "
        "memory that must not be written with map_dma(vaddr=…, size=…, write=False)"
    )


class SharedExport:
    """An export of a whole object from `vaddr` on, shared by several mappings."""

    __slots__ = ("end", "shares", "vaddr", "view")

    def __init__(self, view: memoryview, vaddr: int) -> None:
        self.shares = 1
        """The number of mappings that share the export."""
        self.vaddr = vaddr
        self.end = vaddr + view.nbytes
        """The end address, exclusive. All bytes from `vaddr` to `end` stay in place until the release."""
        self.view = view


Export: TypeAlias = memoryview | SharedExport


class Exports:
    """The buffers that a mapper keeps exported. From the second view of an object on, views share one whole export.

    A memoryview needs 330 bytes with CPython's data behind the view, and a program maps many slices of one buffer.
    Addresses decide whether an export contains another view: an object may export different memory each time.

    Synchronization: none; the mapper serializes calls. Cost: a look-up in a dict.
    """

    __slots__ = ("_by_object",)

    def __init__(self) -> None:
        self._by_object: dict[int, Export] = {}  # each export refers to its object, so no other object gets the id

    def keep(self, view: memoryview, vaddr: int) -> Export:
        """Keep the memory of `view`, which begins at `vaddr`, exported until `release`.

        The caller must not use `view` afterwards: `view` is released if another export contains the same bytes.
        """
        exporter = view.obj
        number = id(exporter)
        export = self._by_object.get(number)
        if export is None:
            if exporter is not None:
                self._by_object[number] = view
            return view
        if type(export) is SharedExport and export.vaddr <= vaddr and vaddr + view.nbytes <= export.end:
            export.shares += 1
        else:
            export = _export_whole(exporter, vaddr, view.nbytes)
            if export is None:
                return view
            self._by_object[number] = export
        view.release()
        return export

    def release(self, export: Export) -> None:
        """Undo one `keep`."""
        if type(export) is memoryview:
            view = export
        else:
            export.shares -= 1
            if export.shares:
                return
            view = export.view
        number = id(view.obj)
        if self._by_object.get(number) is export:
            del self._by_object[number]
        view.release()

    def release_each(self, run: Iterable[OwnMemory]) -> None:
        """Undo the `keep` of each memory of `run`."""
        for memory in run:
            export = memory.export
            memory.export = None
            if type(export) is SharedExport and export.shares > 1:
                export.shares -= 1
            elif export is not None:
                self.release(export)

    def _check(self, held: Iterable[Export | None]) -> None:
        """Check the export counts. `held`: the export of each mapping."""
        kept = [export for export in held if export is not None]
        counts = Counter(map(id, kept))
        for export in kept:
            assert counts[id(export)] == (1 if isinstance(export, memoryview) else export.shares)
        for number, export in self._by_object.items():
            assert id(export) in counts
            assert number == id((export if isinstance(export, memoryview) else export.view).obj)


def _export_whole(exporter: Buffer, vaddr: int, size: int) -> SharedExport | None:
    """Export the whole object. Return None if the object does not contain those bytes."""
    with suppress(Exception):  # an object of the program's own may raise any exception
        view, start = export_buffer(exporter)
        export = SharedExport(view, start)
        if view.obj is exporter and start <= vaddr and vaddr + size <= export.end:
            return export
        view.release()
    return None


class OwnMemory:
    """Memory of the caller that a mapper has mapped, with the number of open mappings that hold the memory.

    Made with one holder. `export` keeps the buffer exported; None: the caller keeps the memory alive. `access`: READ
    and WRITE.
    """

    __slots__ = ("access", "export", "holders", "iova", "size", "vaddr")
    ended = False
    """Whether the memory was unmapped regardless of its holders. Only a part of a BAR can end so."""
    temporary = False
    """Whether the memory stays mapped after the last holder is closed."""

    def __init__(self, vaddr: int, iova: Iova, size: int, access: int, export: Export | None = None) -> None:
        self.vaddr: Vaddr = vaddr  # type: ignore[assignment]  # Vaddr() is a call, and int at runtime
        self.iova = iova
        self.size = size
        self.access = access
        self.export = export
        self.holders = 1

    def hold(self, holder: object) -> None:
        """Add a holder."""
        del holder
        self.holders += 1

    def let_go(self, holder: object) -> None:
        """Remove a holder. Does nothing if the mapper has dropped all holders."""
        del holder
        if self.holders:
            self.holders -= 1

    def seen_from(self, vaddr: int) -> tuple[int, int]:
        """Return the first address and the end of the memory, which contains `vaddr`."""
        del vaddr
        return self.vaddr, self.vaddr + self.size

    def reached_until(self, vaddr: int) -> int:
        """Return the end, exclusive, of the bytes mapped from `vaddr` on. The memory contains `vaddr`."""
        del vaddr
        return self.vaddr + self.size

    def release(self) -> None:
        """Release other resources. Called after the kernel has unmapped the memory."""

    def __repr__(self) -> str:
        return f"<mapped memory vaddr={self.vaddr:#x} iova={self.iova:#x} size={self.size:#x} holders={self.holders}>"


class TemporaryMemory(OwnMemory):
    """Memory that stays mapped until `reset_temporary`."""

    __slots__ = ()
    temporary = True
