"""Bars are for a terminal, and for a command whose output ends on one."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import termios
from contextlib import suppress

import pytest

import pyvfio
from pyvfio.cli import bars
from pyvfio.testing.fake import FakeKernel
from pyvfio.units import GIB, MIB

WITH_BAR = "from pyvfio.cli.bars import bar\nwith bar(3, what='counting', unit='step') as advance:\n    advance(2)\n"


def on_terminal(program: str) -> str:
    """What a program writes on a terminal."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    os.set_blocking(ours, False)
    done = subprocess.run([sys.executable, "-c", program], stderr=theirs, check=False)
    written = b""
    with suppress(BlockingIOError):
        while True:
            written += os.read(ours, 65536)
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 0, written
    return written.decode()


@pytest.mark.long
def test_a_bar_is_shown_on_a_terminal() -> None:
    """What it is of, and how far it has come."""
    written = on_terminal(WITH_BAR)
    assert "counting" in written
    assert "2/3" in written or "0/3" in written  # tqdm does not draw each step


@pytest.mark.long
def test_no_bar_is_shown_in_a_pipe() -> None:
    """Nor where tqdm is not installed."""
    done = subprocess.run([sys.executable, "-c", WITH_BAR], capture_output=True, check=True)
    assert done.stderr == b""
    assert on_terminal("import sys\nsys.modules['tqdm'] = None\n" + WITH_BAR) == ""


@pytest.mark.long
def test_each_step_of_a_long_change_has_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    """And none of them is left behind, not even where the change ends in the middle."""
    with (
        FakeKernel() as kernel,
        pyvfio.open_device(kernel.bdfs[0], kernel=kernel) as device,
        bars.progress_bars(shown=True) as progress,
        pyvfio.RamBlockList(kernel=kernel) as blocks,
        pyvfio.DmaMapper(device.container, blocks, resize="extend", granule=2 * MIB, prefault=1, progress=progress),
    ):
        blocks.add("ring", used_length=64 * MIB, max_length=GIB)
    written = capsys.readouterr().err
    assert "ring: prefault:" in written
    assert "ring: map:" in written
    assert "ring: unmap:" in written
    assert not written.split("\r")[-1].strip()


def test_without_a_terminal_there_is_no_callback() -> None:
    """So that nothing is spent on it."""
    with bars.progress_bars(shown=False) as progress:
        assert progress is None
