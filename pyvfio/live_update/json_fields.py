"""JSON objects whose fields are checked when they are read."""

from __future__ import annotations

from collections.abc import Sequence

from pyvfio.extents import Extent


class Fields:
    """A JSON object whose fields must exist and have the expected type. A ValueError names the field that does not."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is not a JSON object")  # noqa: TRY004 (an invalid value, regardless of its type)
        self._values: dict[str, object] = value
        self._where = where

    def find(self, name: str) -> object:
        """Return the field, or None if the field is missing."""
        return self._values.get(name)

    def _wrong(self, name: str) -> ValueError:
        return ValueError(f"'{name}' of {self._where} is missing, or is not a value that a HandOver writes")

    def number(self, name: str) -> int:
        """Return a field that is a non-negative number."""
        value = self.find(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._wrong(name)
        return value

    def number_or_none(self, name: str) -> int | None:
        """Return a field that is null or a non-negative number."""
        return None if name in self._values and self.find(name) is None else self.number(name)

    def text(self, name: str) -> str:
        """Return a field that is a string."""
        if not isinstance(value := self.find(name), str):
            raise self._wrong(name)
        return value

    def flag(self, name: str) -> bool:
        """Return a field that is true or false."""
        if not isinstance(value := self.find(name), bool):
            raise self._wrong(name)
        return value

    def _items(self, name: str) -> Sequence[object]:
        if not isinstance(value := self.find(name), list):
            raise self._wrong(name)
        return value

    def numbers(self, name: str) -> list[int]:
        """Return a field that is a list of non-negative numbers."""
        items = self._items(name)
        found = [item for item in items if isinstance(item, int) and not isinstance(item, bool) and item >= 0]
        if len(found) < len(items):
            raise self._wrong(name)
        return found

    def pairs(self, name: str) -> list[tuple[int, int]]:
        """Return a field that is a list of pairs of numbers."""
        rows = [Fields({name: item}, self._where).numbers(name) for item in self._items(name)]
        if any(len(row) != 2 for row in rows):
            raise self._wrong(name)
        return [(row[0], row[1]) for row in rows]

    def extents(self, name: str) -> tuple[Extent, ...]:
        """Return a field that is a list of extents, [start, end]."""
        found = tuple(Extent(*pair) for pair in self.pairs(name))
        if any(extent.start >= extent.end for extent in found):
            raise self._wrong(name)
        return found

    def inside(self, name: str) -> Fields:
        """Return a field that is an object."""
        return Fields(self.find(name), f"'{name}' of {self._where}")

    def rows(self, name: str) -> list[Fields]:
        """Return a field that is a list of objects."""
        return [Fields(item, f"'{name}' of {self._where}") for item in self._items(name)]
