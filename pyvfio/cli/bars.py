"""Bars on a terminal for work that takes long; where stderr is none, or tqdm is not installed, nothing is shown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, NoReturn

from pyvfio.blocks.progress import Progress, ProgressCallback

_INSTALLED = find_spec("tqdm") is not None  # by the extra "scripts"
if TYPE_CHECKING or _INSTALLED:
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread of its own, in programs that fork

HIDDEN_OPTION = "--bars"
"""Tells a command in a virtual machine, whose stderr is a terminal's in the end, to show them."""


def wanted() -> bool:
    """Whether stderr is a terminal."""
    return sys.stderr.isatty()


@contextmanager
def bar(total: int, *, what: str, unit: str, shown: bool | None = None) -> Iterator[Callable[[int], object]]:
    """Show how much of `total` is done; what is yielded is told how much more is. `shown`: None where stderr says."""
    if not _INSTALLED or not (wanted() if shown is None else shown):
        yield lambda _more: None
        return
    with tqdm(total=total, desc=what, unit=unit, leave=False, file=sys.stderr) as made:
        yield made.update


@contextmanager
def progress_bars(*, shown: bool | None = None) -> Iterator[ProgressCallback | None]:
    """What `DmaMapper(progress=…)` is given to show each long change of a block as bars, one for each of its steps."""
    if not _INSTALLED or not (wanted() if shown is None else shown):
        yield None
        return
    bars: dict[str, tqdm[NoReturn]] = {}

    def show(progress: Progress) -> None:
        if progress.step not in bars:
            bars[progress.step] = tqdm(
                total=progress.total,
                desc=f"{progress.block.idstr}: {progress.step}",
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                leave=False,
                file=sys.stderr,
            )
        made = bars[progress.step]
        made.update(progress.done - made.n)
        if progress.done == progress.total:
            bars.pop(progress.step).close()

    try:
        yield show
    finally:
        for made in bars.values():
            made.close()
