"""Pictures on their way out of a virtual machine: a line of stdout that the host keeps back.

Files that a command writes in the machine are gone with the machine, and its stdout is all that comes out.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import BinaryIO

from pyvfio.picture import Picture

_MARK = b"\x1epictures "  # a record separator is in no line that a person reads


def line_of(pictures: Sequence[Picture]) -> str:
    """Return the line that a guest prints."""
    return _MARK.decode() + json.dumps([picture.to_json() for picture in pictures])


class PictureFilter(io.RawIOBase):
    """Hand the lines that are written on to `out`, and keep the line of pictures back."""

    def __init__(self, out: BinaryIO) -> None:
        super().__init__()
        self._out = out
        self._rest = b""
        self.pictures: list[Picture] = []

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: object, /) -> int:
        """Take bytes; the lines that are complete with them go on."""
        found = bytes(data)  # type: ignore[call-overload]  # any buffer
        *lines, self._rest = (self._rest + found).split(b"\n")
        for line in lines:
            self._pass_on(line + b"\n")
        return len(found)

    def _pass_on(self, line: bytes) -> None:
        if line.startswith(_MARK):
            self.pictures = [Picture.from_json(each) for each in json.loads(line[len(_MARK) :])]
        else:
            self._out.write(line)
            self._out.flush()

    def finish(self) -> list[Picture]:
        """Hand the last line on, which may have no end, and return the pictures."""
        rest, self._rest = self._rest, b""
        if rest:
            self._pass_on(rest)
        return self.pictures
