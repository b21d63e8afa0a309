"""The events of a device in their order: the last ones in memory, all of them in a file."""

from __future__ import annotations

import fcntl
import os
import stat
from collections import deque
from contextlib import suppress
from pathlib import Path
from time import monotonic

from pyvfio.guard import ContextManager, Guard, closing, guarded
from pyvfio.recording.format import Event, Header
from pyvfio.unique import Unique

END = "end\n"


class EventLog(ContextManager, Unique):
    """Keeps the text of the last `keep` events, and writes each event to `path`, if one is given.

    Each line is one write(2): the file has every event that was reported before the process died. `times`: each line
    ends with the seconds since the first event. Raises OSError if the file cannot be written, or if another recording
    writes the file.

    Synchronization: any thread; the order of the lines is the order of the calls. A forked child writes nothing.
    """

    def __init__(self, path: Path | None, header: Header | None, *, times: bool, keep: int) -> None:
        self.guard = Guard("the record of a device" if path is None else f"the record {path}")
        self.last: deque[str] = deque(maxlen=keep)
        self._times = times
        self._start: float | None = None
        self._fd = -1
        if path is not None:
            # O_NONBLOCK: a FIFO without a reader is an error, as no signal handler could end the wait.
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
            try:
                _begin_file(self._fd, path)
                self._write(str(header))
            except BaseException:
                self._close()
                raise

    def add(self, event: Event) -> None:
        """Append an event; the caller holds the lock of `guard`."""
        line = str(event)
        if self._times:
            now = monotonic()
            self._start = now if self._start is None else self._start
            line = f"{line} @{now - self._start:.6f}"
        self.last.append(line)
        if self._fd >= 0:
            self._write(f"{line}\n")

    @guarded
    def tail(self) -> tuple[str, ...]:
        """Return the last events, the oldest first."""
        return tuple(self.last)

    @closing
    def close(self) -> None:
        """Write the last line, and close the file; twice is fine."""
        if self._fd >= 0:
            try:
                self._write(END)
            finally:
                self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)  # for a child that has the descriptor, too
        os.close(fd)

    def _write(self, text: str) -> None:
        data = text.encode("ascii")
        while data:
            data = data[os.write(self._fd, data) :]


def _begin_file(fd: int, path: Path) -> None:
    """Empty a file, and keep other recordings from it until the close. Raises BlockingIOError while one has it."""
    os.set_blocking(fd, True)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, "another recording writes this file", str(path)) from None
    except OSError:  # a file system without locks
        pass
    os.ftruncate(fd, 0)
