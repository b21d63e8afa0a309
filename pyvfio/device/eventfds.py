"""The eventfds of an interrupt: descriptors that the library owns, and the threads that wait for them.

Source: fs/eventfd.c; `eventfd_show_fdinfo` writes the lines of an eventfd in /proc.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import NoReturn, TypeAlias
from weakref import ref

from pyvfio.errors import IoctlError, VfioError
from pyvfio.guard import Guard, guarded, run_outside, uninterrupted
from pyvfio.handle import attempt_all
from pyvfio.kernel import Kernel, Poll, milliseconds

_INT_MAX = (1 << 31) - 1
_FDINFO_MAX = 4096


def read_fdinfo(fd: int) -> Mapping[str, str] | None:
    """Return the lines of /proc/self/fdinfo for a descriptor, by name, or None if /proc does not show them."""
    try:
        file = os.open(f"/proc/self/fdinfo/{fd}", os.O_RDONLY)
    except OSError:
        return None
    try:
        text = os.read(file, _FDINFO_MAX).decode(errors="replace")
    except OSError:
        return None
    finally:
        os.close(file)
    pairs = (line.partition(":") for line in text.splitlines())
    return {name: value.strip() for name, _colon, value in pairs}


def find_identity(fd: int) -> int | None:
    """Return the kernel's number of the eventfd of a descriptor, or None if /proc does not show the number."""
    return _identity(read_fdinfo(fd))


def check_open(fd: int, what: str) -> None:
    """Raise ValueError, which names `what`, for a number that is no open descriptor of this process."""
    if not 0 <= fd <= _INT_MAX:
        raise ValueError(f"{fd} is no file descriptor; None stands for no eventfd")
    try:
        os.fstat(fd)
    except OSError as error:
        raise ValueError(f"descriptor {fd} is closed, and cannot be used for {what}") from error


def check_eventfd(fd: int, what: str) -> None:
    """Check as `check_open`, and that the file is an eventfd. If /proc shows nothing, the kernel checks that."""
    check_open(fd, what)
    if not _may_be_eventfd(read_fdinfo(fd)):
        raise _no_eventfd(fd)


def _is_lost(fd: int) -> bool:
    """Return whether the program has closed the descriptor of an eventfd, and perhaps opened another file instead."""
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        return True
    return stat.S_IFMT(mode) != 0 and not _may_be_eventfd(read_fdinfo(fd))  # an eventfd has no type of file


def _lost(fds: Collection[int]) -> VfioError:
    shown = ", ".join(map(str, fds))
    message = f"the program has closed descriptor {shown} of an eventfd that belongs to pyvfio"
    return VfioError(message, hint="Leave the eventfds of enable() to disable(), or pass eventfds of your own: fds=")


def _may_be_eventfd(lines: Mapping[str, str] | None) -> bool:
    return lines is None or "eventfd-count" in lines


def _no_eventfd(fd: int) -> ValueError:
    return ValueError(f"descriptor {fd} is no eventfd: make one with os.eventfd(0, os.EFD_NONBLOCK)")


def _identity(lines: Mapping[str, str] | None) -> int | None:
    found = (lines or {}).get("eventfd-id", "")
    return int(found) if found.isdecimal() else None


class Eventfd:
    """A descriptor of an eventfd. The object owns the descriptor.

    `number`: the descriptor that the program knows: this one, or the program's descriptor of which this is a duplicate.
    `may_be_shared`: the eventfd was made elsewhere, so that other vectors may have the same eventfd.
    """

    def __init__(
        self, kernel: Kernel, guard: Guard, fd: int, *, number: int | None = None, may_be_shared: bool = False
    ) -> None:
        self._kernel = kernel
        self._guard = guard
        self.fd = fd
        self.number = fd if number is None else number
        self.may_be_shared = may_be_shared

    @cached_property
    def _lines(self) -> Mapping[str, str] | None:
        return read_fdinfo(self.fd)

    @property
    def may_be_one(self) -> bool:
        """False if /proc shows another kind of file. If /proc shows nothing, the kernel refuses other files."""
        return _may_be_eventfd(self._lines)

    @property
    def identity(self) -> int | None:
        """The kernel's number of the eventfd; None if /proc does not show the number (before Linux 5.2)."""
        return _identity(self._lines)

    def is_same_as(self, other: Eventfd | None) -> bool:
        """Return whether both are descriptors of one eventfd. False if that is unknown."""
        return other is not None and self.identity is not None and self.identity == other.identity

    def release(self) -> int:
        """Return the descriptor, which stays open and then belongs to the caller."""
        fd, self.fd = self.fd, -1
        return fd

    @uninterrupted()
    def close(self) -> None:
        """Close the descriptor; twice is fine.

        Raises VfioError if the program has closed the descriptor. Another file with that number stays open.
        """
        fd = self.release()
        if fd < 0:
            return
        if fd == self.number and _is_lost(fd):  # the program knows no other number
            raise _lost([fd])
        self._kernel.close(fd)

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0 and not self._guard.forked:
            run_outside(self.close)


class ReplacedError(Exception):
    """Look again: other `Vectors` have replaced these, or another thread has read the eventfds."""


Row = tuple[Eventfd | None, ...]
"""The eventfds of an interrupt by vector; None: the vector signals no eventfd."""


_Taken: TypeAlias = "tuple[dict[int, int], Vectors, list[tuple[Eventfd, int]]]"
"""The number of interrupts by vector, and the counts that were read, with their eventfds."""


_Key: TypeAlias = "int | tuple[int, ...]"
"""The vector that a thread waits for, or several."""


def _put_back(taken: _Taken) -> None:
    taken[1].put_back(taken[2])


class _Turn:
    """The eventfds that a thread waits for, by descriptor.

    One thread uses a turn at a time. `Vectors` keep the descriptors open while the thread waits.
    """

    __slots__ = ("eventfds", "key", "poll")

    def __init__(self, key: _Key, eventfds: Mapping[int, tuple[int, Eventfd]], poll: Poll) -> None:
        self.key = key
        self.eventfds = eventfds
        self.poll = poll


def _explain_read(error: BaseException, turn: _Turn) -> None:
    if isinstance(error, BlockingIOError):  # another thread has read the eventfd
        raise ReplacedError from None
    if isinstance(error, OSError) and (lost := [fd for fd in turn.eventfds if _is_lost(fd)]):
        raise _lost(lost) from error


class Vectors:
    """The eventfds of an interrupt between two changes, and an eventfd that wakes the waiting threads.

    While a thread waits, the descriptors stay open, so that no other file gets one of the numbers. This holds also for
    a thread that other `Vectors` have woken. The descriptors are closed when the last thread has returned and no object
    refers to them.
    """

    def __init__(self, kernel: Kernel, guard: Guard, row: Row, wake: Eventfd) -> None:
        self._kernel = kernel
        self.guard = guard
        self._waiting: dict[_Turn, None] = {}
        self._turns: dict[_Key, _Turn] = {}  # turns that no thread uses
        self._error: VfioError | None = None
        self._over = False
        self._earlier: tuple[ref[Vectors], ...] = ()  # former ones, in which threads waited when they ended
        self._wake = wake
        self._may_share = any(eventfd is not None and eventfd.may_be_shared for eventfd in row)
        self.row = row
        self.eventfds = {vector: eventfd for vector, eventfd in enumerate(row) if eventfd is not None}
        self.connected = tuple(self.eventfds)
        """The vectors that signal an eventfd."""

    def end(self, why: VfioError | None, *, successor: Vectors | None = None) -> None:
        """Wake the waiting threads with the error `why`; None: `successor` replaces these `Vectors`."""
        # Set before the check for waiting threads: a thread checks in the opposite order.
        self._error, self._over = why, True
        # A woken thread may not have run yet, and then reads an eventfd that later `Vectors` have too.
        own: ref[Vectors] = ref(self)
        there = tuple(each for each in (*self._earlier, own) if (one := each()) is not None and one._waiting)
        if successor is not None:
            successor._earlier = there
        if self._waiting:
            self._kernel.eventfd_write(self._wake.fd, 1)
        if not there:
            self._close(() if successor is None else successor.row)

    def use_seam(self, seam: Kernel) -> None:
        """Make the calls through `seam` from now on, the reads of threads that wait too."""
        self._kernel = seam

    def _close(self, kept: Collection[Eventfd | None]) -> None:
        gone = [self._wake, *(eventfd for eventfd in self.row if eventfd is not None and eventfd not in kept)]
        attempt_all("closing eventfds", [eventfd.close for eventfd in gone])

    def wait_one(self, vector: int, timeout: float | None) -> int:
        """Wait as `wait`, for one of `connected`. Returns the number of interrupts, or 0 after the timeout.

        An eventfd that was made here does not block, and is read before any poll.
        """
        turn, eventfd = self._turns.pop(vector, None) or self._make_turn(vector, (vector,)), self.eventfds[vector]
        try:
            self._waiting[turn] = None
            if not (eventfd.may_be_shared or self._over) and (count := self._read_if_raised(turn, eventfd)):
                return count
            ready = () if self._over else turn.poll(timeout and milliseconds(timeout))
            if self._over:
                self._raise_end()
            if ready:
                return self._read_one(turn, eventfd)
        except BaseException as error:
            self._waiting.pop(turn, None)
            _explain_read(error, turn)
            raise
        del self._waiting[turn]
        self._turns[vector] = turn
        return 0

    def wait(self, vectors: tuple[int, ...], timeout: float | None) -> dict[int, int]:
        """Wait for some of `connected`. Returns the number of interrupts of each raised vector.

        Raises the error of `end`, and ReplacedError. A signal handler that raises loses no count. Between the read and
        the return to the program, Python checks for signals only in the guard: callers make no other call.
        """
        turn = self._turns.pop(vectors, None) or self._make_turn(vectors, vectors)
        try:
            self._waiting[turn] = None
            ready = () if self._over else turn.poll(timeout and milliseconds(timeout))
            if self._over:
                self._raise_end()
            if len(ready) > 1:
                return self._take(turn, [turn.eventfds[fd] for fd, _events in ready])[0]
            for fd, _events in ready:
                vector, eventfd = turn.eventfds[fd]
                return {vector: self._read_one(turn, eventfd)}
        except BaseException as error:
            self._waiting.pop(turn, None)
            _explain_read(error, turn)
            raise
        del self._waiting[turn]
        self._turns[vectors] = turn
        return {}

    def _make_turn(self, key: _Key, vectors: tuple[int, ...]) -> _Turn:
        if len(self._turns) > len(self.row):  # a program that always waits for other vectors
            self._turns.clear()
        eventfds = {(eventfd := self.eventfds[vector]).fd: (vector, eventfd) for vector in vectors}
        wake = self._wake.fd
        if self._over:  # after the look-up of the numbers, which may be -1
            self._raise_end()
        return _Turn(key, eventfds, self._kernel.poller(*eventfds, wake))

    def _raise_end(self) -> NoReturn:
        if self._error is not None:
            raise type(self._error)(self._error.message)
        raise ReplacedError

    def _read_one(self, turn: _Turn, eventfd: Eventfd) -> int:
        """Read an eventfd, and end the wait. Raises BlockingIOError, with the wait not ended.

        No call and no loop follows the read, so that Python does not check for signals between the read and the
        program.
        """
        count = self._kernel.eventfd_read(eventfd.fd)
        del self._waiting[turn]
        self._turns[turn.key] = turn
        return count

    def _read_if_raised(self, turn: _Turn, eventfd: Eventfd) -> int:
        """Read as `_read_one`, or return 0 if the vector was not raised.

        This is a function because CPython 3.12 runs handlers behind an `except` in a `try`, and does not count that
        place as a part of the outer `try`.
        """
        try:
            count = self._kernel.eventfd_read(eventfd.fd)
        except BlockingIOError:
            return 0
        del self._waiting[turn]
        self._turns[turn.key] = turn
        return count

    @uninterrupted(_put_back)
    def _take(self, turn: _Turn, ready: Sequence[tuple[int, Eventfd]]) -> _Taken:
        times: dict[int, int] = {}
        read: list[tuple[Eventfd, int]] = []
        shared: dict[int, int] = {}  # by identity, for eventfds that several vectors may have: each is read once
        for vector, eventfd in ready:
            identity = eventfd.identity if self._may_share else None
            if identity is not None and identity in shared:
                count = shared[identity]
            elif count := self._try_to_read(eventfd.fd):
                read.append((eventfd, count))
            if identity is not None:
                shared[identity] = count
            if count:
                times[vector] = count
        if not times:  # other threads have read the eventfds
            raise ReplacedError
        self._waiting.pop(turn, None)
        self._turns[turn.key] = turn
        return times, self, read

    @guarded
    def put_back(self, read: Iterable[tuple[Eventfd, int]]) -> None:
        """Add counts to the eventfds from which they were read, if no caller received them.

        The lock keeps the eventfds open.
        """
        for eventfd, count in read:
            if eventfd.fd >= 0:
                self._kernel.eventfd_write(eventfd.fd, count)

    def _try_to_read(self, fd: int) -> int:
        try:
            return self._kernel.eventfd_read(fd)
        except BlockingIOError:  # another thread has read the eventfd
            return 0


class Making:
    """The eventfds for a change of an interrupt, until the change has succeeded.

    `what`: the name of the interrupt. `arguments`: the arguments in errors. `count`: the number of vectors of the
    change.
    """

    def __init__(
        self, kernel: Kernel, guard: Guard, *, what: str, count: int, arguments: Mapping[str, int | str]
    ) -> None:
        self._kernel = kernel
        self._guard = guard
        self._what = what
        self._count = count
        self._arguments = arguments
        self._made: list[Eventfd] = []

    def make(self) -> Row:
        """Make an eventfd for each vector. Raises IoctlError."""
        return tuple(self.make_one() for _ in range(self._count))

    def make_one(self) -> Eventfd:
        """Make one eventfd. Raises IoctlError (EMFILE, with the number of descriptors that are needed)."""
        try:
            fd = self._kernel.eventfd(0, os.EFD_NONBLOCK)
        except OSError as error:
            raise self._explain(error, "eventfd") from error
        made = Eventfd(self._kernel, self._guard, fd)
        self._made.append(made)
        return made

    def duplicate(self, fds: Sequence[int | None]) -> Row:
        """Duplicate eventfds of the program.

        Raises ValueError for a descriptor that is closed or no eventfd, IoctlError (EMFILE).
        """
        for fd in fds:  # before the first duplicate, which would get the number of a closed one
            if fd is not None:
                check_open(fd, self._what)
        return tuple(None if fd is None else self._duplicate(fd) for fd in fds)

    def _duplicate(self, fd: int) -> Eventfd:
        try:
            own = self._kernel.dup(fd)
        except OSError as error:
            raise self._explain(error, "fcntl") from error
        made = Eventfd(self._kernel, self._guard, own, number=fd, may_be_shared=True)
        self._made.append(made)
        if not made.may_be_one:
            raise _no_eventfd(fd)
        return made

    def _explain(self, error: OSError, request: str) -> IoctlError:
        vectors = f"{self._count} {'vectors' if self._count > 1 else 'vector'}"
        message = f"{self._what}: no eventfds for {vectors}: {error.strerror}"
        hint = ""
        if error.errno in (errno.EMFILE, errno.ENFILE):
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            hint = (
                f"{self._count + 1} descriptors are needed, one for each vector and one that wakes waiting threads; "
                f"{len(self._made)} of them could be made. This process can have {limit} open: close files, or raise "
                "the limit (ulimit -n)"
            )
        return IoctlError.of(error, message, request=request, arguments=self._arguments, hint=hint)

    def close(self, *, but: Collection[Eventfd | None] = ()) -> None:
        """Close the eventfds that were made, except `but`."""
        attempt_all("closing eventfds", [eventfd.close for eventfd in self._made if eventfd not in but])


def numbers(row: Row) -> tuple[int | None, ...]:
    """Return the descriptors that the program knows."""
    return tuple(None if eventfd is None else eventfd.number for eventfd in row)


def descriptors(row: Row) -> tuple[int, ...]:
    """Return the descriptors for the kernel, with -1 for None."""
    return tuple(-1 if eventfd is None else eventfd.fd for eventfd in row)


def runs_of(vectors: Sequence[int]) -> list[range]:
    """Return the runs of adjacent numbers: VFIO_DEVICE_SET_IRQS takes a range."""
    runs: list[range] = []
    for vector in vectors:
        if runs and runs[-1].stop == vector:
            runs[-1] = range(runs[-1].start, vector + 1)
        else:
            runs.append(range(vector, vector + 1))
    return runs
