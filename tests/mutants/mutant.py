"""One mistake in one file, and a list of them with those who have to notice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Mutant(NamedTuple):
    """In `file` `old`, which is there once, becomes `new`; `operation`: of what that is the mistake, where it says."""

    file: str
    old: str
    new: str
    operation: str = ""

    @property
    def what(self) -> str:
        """One line."""
        place = f"{self.operation}, {self.file}" if self.operation else self.file
        return f"{place}: {' '.join(self.old.split())}  ->  {' '.join(self.new.split())}"

    def apply(self, text: str) -> str:
        """The mutated source; ValueError when the piece is not there exactly once."""
        if text.count(self.old) != 1:
            raise ValueError(f"{text.count(self.old)} places in {self.file} are {self.old!r}: the list is out of date")
        return text.replace(self.old, self.new)


class Suite(NamedTuple):
    """Mistakes in the files of `folder`. `rounds`: for each of them what pytest is given, one after the other until
    somebody notices; the last round is all who may."""

    folder: Path
    mutants: tuple[Mutant, ...]
    rounds: Callable[[Mutant], Sequence[Sequence[str]]]
