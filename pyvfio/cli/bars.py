"""Progress bars for long work on a terminal. Without a terminal on stderr, or without tqdm, nothing is shown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, NoReturn

from pyvfio.blocks.progress import Progress, ProgressCallback

_INSTALLED = find_spec("tqdm") is not None  # by the extra "cli"
if TYPE_CHECKING or _INSTALLED:
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no monitor thread, in programs that fork

HIDDEN_OPTION = "--bars"
"""Tells a command in a virtual machine to show bars: the stderr of the command leads to a terminal of the host."""


def wanted() -> bool:
    """Whether stderr is a terminal."""
    return sys.stderr.isatty()


@contextmanager
def bar(total: int, *, what: str, unit: str, shown: bool | None = None) -> Iterator[Callable[[int], object]]:
    """Show a bar for `total` units. Yield a call that adds finished units. `shown`: None for `wanted()`."""
    if not _INSTALLED or not (wanted() if shown is None else shown):
        yield lambda _more: None
        return
    with tqdm(total=total, desc=what, unit=unit, leave=False, file=sys.stderr) as made:
        yield made.update


@contextmanager
def progress_bars(*, shown: bool | None = None) -> Iterator[ProgressCallback | None]:
    """Yield a callback for `DmaMapper(progress=…)`: each step of a long change of a block has a bar."""
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
