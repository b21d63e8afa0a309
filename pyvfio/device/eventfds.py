"""The eventfds of an interrupt: descriptors of the library's own, and the threads that wait for them.

Source: fs/eventfd.c; `eventfd_show_fdinfo` prints what /proc shows of an eventfd.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TypeAlias

from pyvfio.errors import IoctlError, VfioError
from pyvfio.guard import Guard, guarded, run_outside, uninterrupted
from pyvfio.handle import attempt_all
from pyvfio.kernel import Kernel

_INT_MAX = (1 << 31) - 1
_FDINFO_MAX = 4096


def read_fdinfo(fd: int) -> Mapping[str, str] | None:
    """Return the lines of /proc/self/fdinfo for a descriptor by their names; None where /proc does not show it."""
    try:
        file = os.open(f"/proc/self/fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC)
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
    """Return the number that the kernel gives the eventfd of a descriptor; None where /proc does not show it."""
    return _identity(read_fdinfo(fd))


def check_open(fd: int, what: str) -> None:
    """Raise ValueError, with `what` in it, for a number that no open descriptor of this process has."""
    if not 0 <= fd <= _INT_MAX:
        raise ValueError(f"{fd} is no file descriptor; None stands for no eventfd")
    try:
        os.fstat(fd)
    except OSError as error:
        raise ValueError(f"descriptor {fd} is closed, so {what} cannot have it") from error


def check_eventfd(fd: int, what: str) -> None:
    """As `check_open`, and for the descriptor of another file. Where /proc shows nothing, the kernel refuses that."""
    check_open(fd, what)
    if not _may_be_eventfd(read_fdinfo(fd)):
        raise _no_eventfd(fd)


def _may_be_eventfd(lines: Mapping[str, str] | None) -> bool:
    return lines is None or "eventfd-count" in lines


def _no_eventfd(fd: int) -> ValueError:
    return ValueError(f"descriptor {fd} is no eventfd: make one with os.eventfd(0, os.EFD_NONBLOCK)")


def _identity(lines: Mapping[str, str] | None) -> int | None:
    found = (lines or {}).get("eventfd-id", "")
    return int(found) if found.isdecimal() else None


class Eventfd:
    """A descriptor of an eventfd, which is closed with this object.

    `number` is the descriptor as the program knows it: this one, or the program's own, of which this is a duplicate.
    `may_be_shared`: the eventfd is not made here, so that other vectors may have the same one.
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
        """False where /proc shows another kind of file. Where it shows nothing, the kernel refuses other files."""
        return _may_be_eventfd(self._lines)

    @property
    def identity(self) -> int | None:
        """The number that the kernel gives each eventfd; None where /proc does not show it (before Linux 5.2)."""
        return _identity(self._lines)

    def is_same_as(self, other: Eventfd | None) -> bool:
        """Whether both are descriptors of one eventfd, as far as that is known."""
        return other is not None and self.identity is not None and self.identity == other.identity

    def release(self) -> int:
        """Give up the descriptor, which stays open and is the caller's."""
        fd, self.fd = self.fd, -1
        return fd

    @uninterrupted()
    def close(self) -> None:
        """Close the descriptor; twice is fine."""
        fd = self.release()
        if fd >= 0:
            self._kernel.close(fd)

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0 and not self._guard.forked:
            run_outside(self.close)


class ReplacedError(Exception):
    """Other `Vectors` have taken the place of these: look again."""


Row = tuple[Eventfd | None, ...]
"""The eventfds of an interrupt by vector; None: the vector signals none."""


_Taken: TypeAlias = "tuple[dict[int, int], Vectors, list[tuple[Eventfd, int]]]"
"""How often vectors were raised; and what was read of which eventfds."""


def _put_back(taken: _Taken) -> None:
    taken[1].put_back(taken[2])


class Vectors:
    """The eventfds of an interrupt from one change to the next, and an eventfd that wakes the waiting threads.

    While a thread waits, the descriptors stay open, so that no number is another file's. They are closed when the last
    thread has returned and nothing refers to them any more.
    """

    def __init__(self, kernel: Kernel, guard: Guard, row: Row, wake: Eventfd) -> None:
        self._kernel = kernel
        self.guard = guard
        self._waiting: set[object] = set()
        self._error: VfioError | None = None
        self._over = False
        self._wake = wake
        self._may_share = any(eventfd is not None and eventfd.may_be_shared for eventfd in row)
        self.row = row

    @property
    def connected(self) -> tuple[int, ...]:
        """The vectors that signal an eventfd."""
        return tuple(vector for vector, eventfd in enumerate(self.row) if eventfd is not None)

    def end(self, why: VfioError | None, *, kept: Collection[Eventfd | None] = ()) -> None:
        """Wake the threads that wait, with that error; None: other `Vectors` take the place of these, with `kept`."""
        self._error, self._over = why, True  # before the look at the waiting threads: a thread looks in the other order
        if self._waiting:
            self._kernel.eventfd_write(self._wake.fd, 1)
        else:
            self._close(kept)

    def _close(self, kept: Collection[Eventfd | None]) -> None:
        gone = [self._wake, *(eventfd for eventfd in self.row if eventfd is not None and eventfd not in kept)]
        attempt_all("closing eventfds", [eventfd.close for eventfd in gone])

    def wait(self, vectors: Sequence[int], timeout: float | None) -> dict[int, int]:
        """Wait for some of `connected`. Return how often each was raised that was. Raises the error of `end`, and
        ReplacedError.

        A signal handler that raises loses no count. From the read to the program, Python looks for signals nowhere but
        in the guard: a caller returns the answer without a call.
        """
        me = object()
        try:
            self._waiting.add(me)
            if ready := self._poll(vectors, timeout):
                return self._take(me, ready)[0]
        except BaseException:
            self._waiting.discard(me)
            raise
        self._waiting.discard(me)
        return {}

    def _poll(self, vectors: Sequence[int], timeout: float | None) -> dict[int, Eventfd]:
        eventfds = {vector: eventfd for vector in vectors if (eventfd := self.row[vector]) is not None}
        ready: Collection[int] = ()
        if not self._over:
            fds = [*(eventfd.fd for eventfd in eventfds.values()), self._wake.fd]
            ready = self._kernel.poll(fds[0], timeout, *fds[1:])
        if self._over:
            if self._error is not None:
                raise type(self._error)(self._error.message)
            raise ReplacedError
        return {vector: eventfd for vector, eventfd in eventfds.items() if eventfd.fd in ready} if ready else {}

    @uninterrupted(_put_back)
    def _take(self, me: object, ready: Mapping[int, Eventfd]) -> _Taken:
        times: dict[int, int] = {}
        read: list[tuple[Eventfd, int]] = []
        shared: dict[int, int] = {}  # by the identity of eventfds that several vectors may have: each is read once
        for vector, eventfd in ready.items():
            identity = eventfd.identity if self._may_share else None
            if identity is not None and identity in shared:
                count = shared[identity]
            elif count := self._read_one(eventfd.fd):
                read.append((eventfd, count))
            if identity is not None:
                shared[identity] = count
            if count:
                times[vector] = count
        self._waiting.discard(me)
        return times, self, read

    @guarded
    def put_back(self, read: Iterable[tuple[Eventfd, int]]) -> None:
        """Add to eventfds what was read of them and nobody has received. The lock keeps them open meanwhile."""
        for eventfd, count in read:
            if eventfd.fd >= 0:
                self._kernel.eventfd_write(eventfd.fd, count)

    def _read_one(self, fd: int) -> int:
        try:
            return self._kernel.eventfd_read(fd)
        except BlockingIOError:  # another thread has read it
            return 0


class Making:
    """The eventfds that a change of an interrupt needs, until the change has succeeded.

    `what` names the interrupt, `arguments` are those of an error, `count` is how many vectors are asked for.
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
        """Make one. Raises IoctlError (EMFILE, with the number of descriptors that are needed)."""
        try:
            fd = self._kernel.eventfd(0, os.EFD_NONBLOCK)
        except OSError as error:
            raise self._explain(error, "eventfd") from error
        made = Eventfd(self._kernel, self._guard, fd)
        self._made.append(made)
        return made

    def duplicate(self, fds: Sequence[int | None]) -> Row:
        """Make a descriptor of the library's own for each eventfd of the program's.

        Raises ValueError for a descriptor that is closed or no eventfd's, IoctlError (EMFILE).
        """
        for fd in fds:  # before the first duplicate, which would get the number of one that is closed
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
                f"{len(self._made)} could be had. This process can have {limit} open: close files, or raise the limit "
                "(ulimit -n)"
            )
        return IoctlError.of(error, message, request=request, arguments=self._arguments, hint=hint)

    def close(self, *, but: Collection[Eventfd | None] = ()) -> None:
        """Close what was made, `but` some."""
        attempt_all("closing eventfds", [eventfd.close for eventfd in self._made if eventfd not in but])


def numbers(row: Row) -> tuple[int | None, ...]:
    """The descriptors as the program knows them."""
    return tuple(None if eventfd is None else eventfd.number for eventfd in row)


def descriptors(row: Row) -> tuple[int, ...]:
    """The descriptors as the kernel takes them: -1 for none."""
    return tuple(-1 if eventfd is None else eventfd.fd for eventfd in row)


def runs_of(vectors: Sequence[int]) -> list[range]:
    """Neighbouring numbers together: VFIO_DEVICE_SET_IRQS takes a range."""
    runs: list[range] = []
    for vector in vectors:
        if runs and runs[-1].stop == vector:
            runs[-1] = range(runs[-1].start, vector + 1)
        else:
            runs.append(range(vector, vector + 1))
    return runs
