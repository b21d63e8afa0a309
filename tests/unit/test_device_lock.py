"""The lock of a device that processes share: where the file is, who holds it, and when it is free again."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyvfio.testing.device_lock import DIRECTORY_VARIABLE, DeviceLock, LockTimeoutError, lock_directory, take_locks

FIRST, SECOND = "0000:01:00.0", "0000:02:00.0"


def lock(directory: Path, bdf: str = FIRST, owner: str = "me") -> DeviceLock:
    """The lock of a device in a directory of the test's."""
    return DeviceLock(bdf, directory=directory, owner=owner)


def take(directory: Path, count: int, said: list[str] | None = None) -> list[DeviceLock]:
    """Locks of two devices, without waiting."""
    waiting = [] if said is None else said
    return take_locks([FIRST, SECOND], count, timeout=0, waiting=waiting.append, directory=directory, owner="me")


@contextmanager
def held(directory: Path, bdf: str) -> Iterator[DeviceLock]:
    """A lock that somebody else has: another open file is another holder, in one process, too."""
    other = lock(directory, bdf, "another")
    assert other.take()
    try:
        yield other
    finally:
        other.release()


def test_a_lock_is_held_by_one_and_free_when_it_is_released(tmp_path: Path) -> None:
    """Releasing it twice is fine; the file stays."""
    one, two = lock(tmp_path), lock(tmp_path)
    assert one.take()
    assert not two.take()
    one.release()
    one.release()
    assert two.take()
    assert two.path.exists()
    two.release()


def test_the_file_names_the_holder(tmp_path: Path) -> None:
    """By its process and command, and not the holder before."""
    with held(tmp_path, FIRST) as other:
        assert lock(tmp_path).holder() == f"pid {os.getpid()} (another)"
        assert other.path.name == f"{FIRST}.lock"
    assert lock(tmp_path, owner="x").take()
    assert lock(tmp_path).holder() == f"pid {os.getpid()} (x)"


def test_a_holder_that_is_unknown_is_said_to_be(tmp_path: Path) -> None:
    """The file is empty, or is not there."""
    assert lock(tmp_path).holder() == "an unknown process"
    lock(tmp_path).path.touch()
    assert lock(tmp_path).holder() == "an unknown process"


def test_a_child_that_lives_on_does_not_keep_the_lock(tmp_path: Path) -> None:
    """A release is one for all who have the descriptor."""
    mine = lock(tmp_path)
    assert mine.take()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write)
        os.read(read, 1)  # until the parent has looked
        os._exit(0)
    try:
        mine.release()
        assert lock(tmp_path).take()
    finally:
        os.close(write)
        os.close(read)
        os.waitpid(pid, 0)


def test_locks_are_taken_of_the_devices_that_are_free(tmp_path: Path) -> None:
    """In the order of the devices."""
    with held(tmp_path, FIRST):
        (second,) = take(tmp_path, 1)
        assert second.bdf == SECOND
    second.release()
    assert [each.bdf for each in take(tmp_path, 2)] == [FIRST, SECOND]


def test_while_too_few_are_free_none_is_held(tmp_path: Path) -> None:
    """Two processes that need two devices each would wait for one another."""
    said: list[str] = []
    with held(tmp_path, SECOND):
        with pytest.raises(LockTimeoutError, match=rf"still held: {SECOND} by pid {os.getpid()} \(another\)"):
            take(tmp_path, 2, said)
        assert lock(tmp_path, FIRST).take()


def test_no_more_devices_than_there_are_can_be_locked(tmp_path: Path) -> None:
    """It would never end."""
    for count in (0, 3):
        with pytest.raises(ValueError, match=f"{count} of 2 devices"):
            take(tmp_path, count)


def test_all_users_may_take_the_lock_of_a_device(tmp_path: Path) -> None:
    """Whatever the umask of the first one."""
    former = os.umask(0o077)
    try:
        directory = lock_directory({DIRECTORY_VARIABLE: str(tmp_path / "locks")})
        mine = lock(directory)
        assert mine.take()
    finally:
        os.umask(former)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o1777
    assert stat.S_IMODE(mine.path.stat().st_mode) == 0o666
    mine.release()


def test_the_directory_is_the_first_that_can_be_made(tmp_path: Path) -> None:
    """The one that is named, the one for all users, the user's own."""
    shared, runtime, nowhere = tmp_path / "shared", tmp_path / "runtime", Path("/proc/nowhere")
    named = {DIRECTORY_VARIABLE: str(tmp_path / "named"), "XDG_RUNTIME_DIR": str(runtime)}
    assert lock_directory(named, shared=shared) == tmp_path / "named"
    del named[DIRECTORY_VARIABLE]
    assert lock_directory(named, shared=shared) == shared / "pyvfio"
    assert lock_directory(named, shared=nowhere) == runtime / "pyvfio"
    assert lock_directory({}, shared=nowhere).name == "pyvfio-locks"


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """Another user might have put it there."""
    (tmp_path / "target").touch()
    lock(tmp_path).path.symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match=r"\.lock"):
        lock(tmp_path).take()
