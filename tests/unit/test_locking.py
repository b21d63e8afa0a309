"""Who holds what of RLIMIT_MEMLOCK, in words, and what becomes of blocks where all memory is locked."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator

import pytest

import pyvfio
from pyvfio import PinLimitError
from pyvfio.kernel import MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT, LinuxKernel, Memlock
from pyvfio.memory import Memfd, Reservation, locking
from pyvfio.testing.fake import FakeDevice
from pyvfio.units import GIB, MIB, PAGE_SIZE
from tests.unit.fakes import BDF, PRIVATE, READ_WRITE, Rig, SpecialKernel
from tests.unit.processes import in_child


class LockingKernel(SpecialKernel):
    """Says what the process has locked, and locks nothing. `lock`, `by_mlock`: what `memlock` and `mlocked` answer."""

    def __init__(self) -> None:
        super().__init__(groups=[(2, [FakeDevice(BDF)])])
        self.lock: Memlock | None = None
        self.by_mlock = 0

    def memlock(self) -> Memlock:
        """As told; else the fake's own."""
        return super().memlock() if self.lock is None else self.lock

    def mlocked(self) -> int:
        """As told."""
        return self.by_mlock

    def mlockall(self, flags: int) -> None:
        """Nothing; what fails does."""
        self._record.observed("mlockall", (flags,), lambda: None)


@pytest.fixture
def kernel() -> Iterator[LockingKernel]:
    """With a device."""
    with LockingKernel() as made:
        yield made


def refusal(kernel: LockingKernel, size: int, mapped: int | None) -> PinLimitError:
    """Of `size` bytes."""
    assert kernel.lock is not None
    error = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    return locking.limit_error(error, kernel.lock, size, kernel=kernel, request="map", arguments={}, mapped=mapped)


@pytest.mark.parametrize(
    ("by_mlock", "mapped", "holders"),
    [
        (0, 6 * MIB, "6 MiB are locked (6 MiB by mappings of this address space) and"),
        (
            4 * MIB,
            2 * MIB,
            "6 MiB are locked (4 MiB by mlock or mlockall, 2 MiB by mappings of this address space) and",
        ),
        (
            3 * MIB,
            2 * MIB,
            "(3 MiB by mlock or mlockall, 2 MiB by mappings of this address space, 1 MiB by mappings elsewhere)",
        ),
        (6 * MIB, 0, "6 MiB are locked (6 MiB by mlock or mlockall) and"),
        (4 * MIB, None, "(4 MiB by mlock or mlockall, 2 MiB by mappings for devices)"),
        (MIB, 6 * MIB, "6 MiB are locked (6 MiB by mappings of this address space) and"),
        # The three were read one after the other.
        (8 * MIB, 2 * MIB, "6 MiB are locked (8 MiB by mlock or mlockall) and"),
    ],
)
def test_a_refusal_says_who_holds_what(kernel: LockingKernel, by_mlock: int, mapped: int | None, holders: str) -> None:
    """And what is missing."""
    kernel.lock, kernel.by_mlock = Memlock(8 * MIB, 6 * MIB, privileged=False), by_mlock
    error = refusal(kernel, 5 * MIB, mapped)
    assert holders in error.message
    assert "5 MiB were asked for, so 3 MiB are missing" in error.message
    told = by_mlock if mapped != 6 * MIB else 0  # where the mappings are all of it, nothing is read
    assert (error.limit, error.used, error.mlocked, error.asked) == (8 * MIB, 6 * MIB, told, 5 * MIB)
    assert (error.mapped, error.by_user) == (mapped, False)


def test_where_nothing_is_locked_nobody_holds_anything(kernel: LockingKernel) -> None:
    """No brackets, and no word of munlockall."""
    kernel.lock = Memlock(8 * MIB, 0, privileged=False)
    error = refusal(kernel, 16 * MIB, 0)
    assert "0 bytes are locked and 16 MiB were asked for, so 8 MiB are missing" in error.message
    assert error.hint.startswith("ulimit -l 16384 (KiB)")


@pytest.mark.parametrize(("by_mlock", "enough"), [(3 * MIB, "is enough"), (2 * MIB, "is not enough")])
def test_the_hint_says_whether_munlockall_is_enough(kernel: LockingKernel, by_mlock: int, enough: str) -> None:
    """Of what is missing, 3 MiB."""
    kernel.lock, kernel.by_mlock = Memlock(8 * MIB, 6 * MIB, privileged=False), by_mlock
    hint = refusal(kernel, 5 * MIB, 0).hint
    assert f"frees {by_mlock // MIB} MiB, which {enough}" in hint
    assert "ulimit -l 11264 (KiB)" in hint


def test_a_process_that_may_lock_nothing_is_told_so(kernel: LockingKernel) -> None:
    """To the byte."""
    kernel.lock = Memlock(0, 0, privileged=False)
    error = refusal(kernel, MIB, None)
    assert "lets this process lock 0 bytes; 0 bytes are locked and 1 MiB were asked for, so 1 MiB are" in error.message
    assert (error.limit, error.used, error.mapped) == (0, 0, None)


@pytest.mark.parametrize(
    ("lock", "is_enough"),
    [
        (Memlock(8 * MIB, 3 * MIB, privileged=False), True),
        (Memlock(8 * MIB, 3 * MIB + 1, privileged=False), False),
        (Memlock(8 * MIB, 9 * MIB, privileged=False), False),
        (Memlock(8 * MIB, 9 * MIB, privileged=True), True),
        (Memlock(None, 9 * MIB, privileged=False), True),
    ],
)
def test_a_limit_suffices_to_the_last_byte(lock: Memlock, *, is_enough: bool) -> None:
    """For 5 MiB more."""
    assert locking.suffices(lock, 5 * MIB) == is_enough


@pytest.mark.parametrize(
    ("used", "locked", "others"), [(6 * MIB, 2 * MIB, 4 * MIB), (2 * MIB, 2 * MIB, 0), (0, MIB, 0)]
)
def test_a_limit_of_the_user_is_told_for_the_whole_change(
    kernel: LockingKernel, used: int, locked: int, others: int
) -> None:
    """Less what the change itself had pinned by then."""
    failed = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    one = locking.user_limit_error(failed, 8 * MIB, MIB, mapped=used, request="map", arguments={"size": MIB})
    assert (one.limit, one.used, one.asked, one.mapped, one.by_user) == (8 * MIB, used, MIB, used, True)
    error = locking.restate(one, kernel=kernel, size=5 * MIB, locked=locked, arguments={"size": 5 * MIB})
    assert (error.limit, error.used, error.asked, error.mapped, error.by_user) == (
        8 * MIB,
        others,
        5 * MIB,
        others,
        True,
    )
    assert (error.errno, error.request, error.arguments) == (errno.ENOMEM, "map", {"size": 5 * MIB})
    assert "lets the processes of this user pin 8 MiB in all" in error.message
    assert "5 MiB were asked for" in error.message
    assert f"ulimit -l {(others + 5 * MIB) // 1024} (KiB)" in error.hint


@pytest.mark.parametrize("mapped", [None, 3 * MIB])
def test_a_limit_of_the_process_is_told_for_the_whole_change(kernel: LockingKernel, mapped: int | None) -> None:
    """As that of the user."""
    kernel.lock, kernel.by_mlock = Memlock(8 * MIB, 7 * MIB, privileged=False), MIB
    one = refusal(kernel, 2 * MIB, mapped)
    error = locking.restate(one, kernel=kernel, size=5 * MIB, locked=2 * MIB, arguments={"size": 5 * MIB})
    assert (error.limit, error.used, error.asked, error.by_user) == (8 * MIB, 5 * MIB, 5 * MIB, False)
    assert error.mapped == (None if mapped is None else MIB)
    assert (error.errno, error.request, error.arguments) == (errno.ENOMEM, "map", {"size": 5 * MIB})
    assert "5 MiB were asked for, so 2 MiB are missing" in error.message


def test_a_mapping_that_is_refused_is_counted_with_its_container(kernel: LockingKernel) -> None:
    """What it has mapped, what mlockall holds."""
    with Rig(kernel) as rig:
        block = rig.add(used=2 * MIB, maximum=64 * MIB)
        kernel.lock, kernel.by_mlock = Memlock(8 * MIB, 7 * MIB, privileged=False), 5 * MIB
        kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.ENOMEM)
        holders = r"7 MiB are locked \(5 MiB by mlock or mlockall, 2 MiB by mappings elsewhere\)"
        with pytest.raises(PinLimitError, match=holders):
            block.resize(16 * MIB)  # the remap has unmapped what was there
        extend = pyvfio.DmaMapper(rig.container, resize="extend")
        vaddr = rig.memory(4 * MIB)
        kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.ENOMEM)
        with pytest.raises(PinLimitError, match="2 MiB by mappings of this address space"):
            extend.map_dma(vaddr=vaddr, size=4 * MIB)


def test_a_plan_says_what_mlockall_holds(kernel: LockingKernel) -> None:
    """Before anything is touched."""
    with Rig(kernel) as rig:
        kernel.lock, kernel.by_mlock = Memlock(8 * MIB, 6 * MIB, privileged=False), 5 * MIB
        plan = rig.mapper.plan([pyvfio.BlockShape("ring", 4 * MIB, 4 * MIB)])
        assert "5 MiB by mlock or mlockall" in str(plan.shortages[0])


def test_all_memory_is_locked_now_and_in_future(kernel: LockingKernel) -> None:
    """At once, or as it is touched."""
    pyvfio.lock_all_memory(kernel=kernel)
    pyvfio.lock_all_memory(on_fault=True, kernel=kernel)
    assert [call.given for call in kernel.trace] == [
        (MCL_CURRENT | MCL_FUTURE,),
        (MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT,),
    ]


def test_a_refused_mlockall_says_how_much_it_would_need(kernel: LockingKernel) -> None:
    """The kernel compares the address space; what devices have comes on top when it is locked."""
    kernel.lock = Memlock(64 * MIB, 2 * MIB, privileged=False, address_space=100 * MIB)
    kernel.fail(call="mlockall", errno=errno.ENOMEM)
    with pytest.raises(PinLimitError) as caught:
        pyvfio.lock_all_memory(kernel=kernel)
    assert "lets this process lock 64 MiB" in caught.value.message
    assert "is 100 MiB, so 36 MiB are missing; 2 MiB mapped for devices are charged in addition" in caught.value.message
    assert caught.value.hint.startswith(f"ulimit -l {102 * 1024} (KiB)")
    assert (caught.value.limit, caught.value.asked, caught.value.errno) == (64 * MIB, 100 * MIB, errno.ENOMEM)


@pytest.mark.parametrize(
    ("space", "locked", "says", "needed"),
    [
        (64 * MIB, (0, 0), "is 64 MiB", 64 * MIB),
        (64 * MIB + PAGE_SIZE, (0, MIB), "is 64.0 MiB, so 4 KiB are missing", 64 * MIB + PAGE_SIZE),
        (64 * MIB, (6 * MIB, 4 * MIB), "is 64 MiB; 2 MiB mapped for devices are charged in addition", 66 * MIB),
        (64 * MIB, (6 * MIB, 6 * MIB), "is 64 MiB", 64 * MIB),
        (64 * MIB, (6 * MIB, 8 * MIB), "is 64 MiB", 64 * MIB),  # read one after the other
    ],
)
def test_a_refused_mlockall_names_what_is_missing_and_what_devices_have(
    kernel: LockingKernel, space: int, locked: tuple[int, int], says: str, needed: int
) -> None:
    """If anything is; what mlock holds is a part of the address space already."""
    used, by_mlock = locked
    kernel.lock, kernel.by_mlock = Memlock(64 * MIB, used, privileged=False, address_space=space), by_mlock
    kernel.fail(call="mlockall", errno=errno.EPERM)
    with pytest.raises(PinLimitError) as caught:
        pyvfio.lock_all_memory(kernel=kernel)
    error = caught.value
    assert error.message.endswith(says)
    assert error.hint.startswith(f"ulimit -l {needed // 1024} (KiB)")
    assert (error.limit, error.used, error.asked) == (64 * MIB, used, space)
    assert error.mlocked == (by_mlock if used else 0)


@pytest.mark.parametrize(
    ("number", "lock"),
    [
        (errno.EINVAL, Memlock(MIB, 0, privileged=False)),
        (errno.ENOMEM, Memlock(MIB, 0, privileged=True)),
        (errno.ENOMEM, Memlock(None, 0, privileged=False)),
    ],
)
def test_where_the_limit_is_not_to_blame_it_is_not_blamed(kernel: LockingKernel, number: int, lock: Memlock) -> None:
    """The kernel's errno, and that."""
    kernel.lock = lock
    kernel.fail(call="mlockall", errno=number)
    with pytest.raises(pyvfio.IoctlError, match="RLIMIT_MEMLOCK is not the cause") as caught:
        pyvfio.lock_all_memory(kernel=kernel)
    assert (type(caught.value), caught.value.errno) == (pyvfio.IoctlError, number)


def test_unlocking_that_fails_is_an_ioctl_error(kernel: LockingKernel) -> None:
    """With its errno."""
    kernel.fail(call="munlockall", errno=errno.EINTR)
    with pytest.raises(pyvfio.IoctlError, match="munlockall"):
        pyvfio.unlock_all_memory(kernel=kernel)
    pyvfio.unlock_all_memory(kernel=kernel)


def test_address_space_that_may_not_be_locked_is_refused_with_the_numbers(kernel: LockingKernel) -> None:
    """EAGAIN from mmap, under mlockall; the kernel is asked for 2 MiB more, to align it."""
    kernel.lock, kernel.by_mlock = Memlock(64 * MIB, 32 * MIB, privileged=False), 32 * MIB
    kernel.fail(call="mmap", errno=errno.EAGAIN)
    with pytest.raises(PinLimitError, match="1 GiB of address space could not be reserved: under mlockall") as caught:
        Reservation(kernel, max_length=GIB)
    assert "994 MiB are missing" in caught.value.message
    assert (caught.value.errno, caught.value.limit, caught.value.asked) == (errno.EAGAIN, 64 * MIB, GIB + 2 * MIB)
    assert (caught.value.request, caught.value.arguments) == ("mmap", {"size": GIB + PAGE_SIZE})
    assert kernel.areas == []


def test_address_space_that_is_refused_for_another_reason_is_no_matter_of_locks(kernel: LockingKernel) -> None:
    """Also EAGAIN where the limit leaves room."""
    kernel.lock = Memlock(64 * MIB, 0, privileged=False)
    for number, size in ((errno.EAGAIN, MIB), (errno.ENOMEM, GIB)):
        kernel.fail(call="mmap", errno=number)
        with pytest.raises(pyvfio.IoctlError, match="Choose a smaller max_length") as caught:
            Reservation(kernel, max_length=size)
        assert type(caught.value) is pyvfio.IoctlError


def test_what_is_given_back_is_unlocked_first_where_the_limit_wants_it(kernel: LockingKernel) -> None:
    """One call more, and only where the kernel has refused."""
    memory = Reservation(kernel, max_length=16 * MIB)
    memory.activate(8 * MIB)
    kernel.clear_trace()
    kernel.fail(call="mmap", errno=errno.EAGAIN)
    memory.deactivate(2 * MIB)
    assert [call.call for call in kernel.trace[:3]] == ["mmap", "munlock", "mmap"]
    assert kernel.trace[1].given == (memory.vaddr + 2 * MIB, 6 * MIB)
    assert memory.retained == 0
    memory.release()


def test_a_memfd_is_mapped_where_its_reservation_holds_all_of_the_limit(kernel: LockingKernel) -> None:
    """The reservation is unlocked, and the file takes its place."""
    kernel.fail(call="mmap", errno=errno.EAGAIN, nth=2)
    memory = Reservation(kernel, max_length=16 * MIB, kind=Memfd())
    assert [call.call for call in kernel.trace].count("munlock") == 1
    memory.activate(8 * MIB)
    memory._check()
    memory.release()


def test_what_mlock_holds_is_told_apart_from_the_rest() -> None:
    """Areas that are locked, whole, in a child that may lock them."""
    kernel = LinuxKernel()
    libc = ctypes.CDLL(None)
    libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def child() -> None:
        before = kernel.mlocked()
        vaddr = kernel.mmap(0, 4 * PAGE_SIZE, READ_WRITE, PRIVATE)
        assert kernel.mlocked() == before
        assert libc.mlock(vaddr + PAGE_SIZE, 2 * PAGE_SIZE) == 0
        assert kernel.mlocked() == before + 2 * PAGE_SIZE
        kernel.munlock(vaddr + PAGE_SIZE, PAGE_SIZE)
        assert kernel.mlocked() == before + PAGE_SIZE
        kernel.munlockall()
        assert kernel.mlocked() == 0
        with pytest.raises(OSError, match="Invalid argument"):
            kernel.mlockall(0)
        assert kernel.memlock().address_space > 4 * PAGE_SIZE

    assert in_child(child) == 0


class BlindKernel(LockingKernel):
    """Has no descriptor left to read /proc with."""

    def memlock(self) -> Memlock:
        """EMFILE."""
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_a_refusal_that_cannot_be_explained_is_still_the_refusal() -> None:
    """Of the map, by its own errno, not the one of the explanation."""
    with BlindKernel() as kernel, Rig(kernel) as rig:
        kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.ENOMEM)
        with pytest.raises(PinLimitError) as caught:
            rig.add(used=PAGE_SIZE)
    assert caught.value.errno == errno.ENOMEM
