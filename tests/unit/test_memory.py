"""Memory that grows and shrinks in place: what /proc/self/maps, smaps and children that touch it say of it."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvfio.errors import ClosedError, IoctlError
from pyvfio.kernel import (
    MADV_DONTNEED_LOCKED,
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_PRIVATE,
    PROT_READ,
    PROT_WRITE,
    Kernel,
    LinuxKernel,
)
from pyvfio.memory import (
    ALIGNMENT,
    Anonymous,
    Exports,
    Memfd,
    MemoryKind,
    MemorySettings,
    Reservation,
    apply_settings,
    describe,
)
from pyvfio.memory.maps import areas as maps_areas
from pyvfio.memory.maps import areas_by_text
from pyvfio.testing import FakeKernel
from pyvfio.units import MIB, PAGE_SIZE, TIB, U64_MAX, Vaddr, align_up
from tests.unit.processes import areas, in_child, limit_memory, maps

PLAIN = MemorySettings(dontfork=False, hugepage=False)
ALL = MemorySettings(dontfork=True, hugepage=True, dontdump=True, mergeable=True)
MEMORY_CALLS = ("mmap", "mprotect", "madvise", "munmap")


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    """It keeps a trace of calls and lets some of them fail; memory is the real one."""
    with FakeKernel() as fake:
        yield fake


def reserve(
    kernel: Kernel | None = None, max_length: int = 8 * MIB, *, active: int = 0, settings: MemorySettings = PLAIN
) -> Reservation:
    """Of which `active` bytes can be used."""
    memory = Reservation(kernel or LinuxKernel(), max_length=max_length, settings=settings)
    if active:
        memory.activate(active)
    memory._check()
    return memory


def layout(memory: Reservation) -> list[str]:
    """What /proc/self/maps says of it, guard page included."""
    return maps(memory.vaddr, memory.max_length + PAGE_SIZE)


def fill(memory: Reservation, start: int, end: int, byte: int = 0x5A) -> None:
    """Write every byte."""
    ctypes.memset(memory.vaddr + start, byte, end - start)


def contents(memory: Reservation, start: int, end: int) -> bytes:
    """Read every byte."""
    return ctypes.string_at(memory.vaddr + start, end - start)


def is_zero(data: bytes) -> bool:
    """All of it."""
    return data == bytes(len(data))


def touched_in_child(vaddr: int, *, write: bool) -> int:
    """How a child that touches one byte ends."""
    return in_child(lambda: ctypes.memset(vaddr, 1, 1) if write else ctypes.string_at(vaddr, 1))


# ------------------------------------------------------------------------------------------------------ reserving


def test_a_reservation_is_address_space_without_access_and_a_guard_page() -> None:
    """One area, `---p`, at a multiple of 2 MiB, a page longer than asked for."""
    memory = reserve()
    (area,) = areas(memory.vaddr, memory.max_length + PAGE_SIZE)
    assert memory.vaddr % ALIGNMENT == 0
    assert area.permissions == "---p"
    assert area.start <= memory.vaddr
    assert area.end >= memory.vaddr + 8 * MIB + PAGE_SIZE
    memory.release()


@pytest.mark.parametrize("size", [PAGE_SIZE, 2 * MIB - PAGE_SIZE, 2 * MIB, 6 * MIB + PAGE_SIZE])
def test_no_more_is_kept_than_the_length_and_the_guard_page(kernel: FakeKernel, size: int) -> None:
    """What was taken to find an aligned address has been given back before and behind."""
    memory = reserve(kernel, size)
    mapped = kernel.trace[0]
    assert isinstance(mapped.given[1], int)
    assert mapped.result is not None
    given_back = sum(int(call.given[1]) for call in kernel.trace if call.call == "munmap")
    assert mapped.given[1] - given_back == size + PAGE_SIZE
    assert all(
        mapped.result <= int(call.given[0]) and int(call.given[0]) + int(call.given[1]) in (memory.vaddr, end)
        for end in [mapped.result + mapped.given[1]]
        for call in kernel.trace
        if call.call == "munmap"
    )
    memory.release()


class _Shifted(FakeKernel):
    """Whose address space begins so many bytes behind a multiple of 2 MiB. Linux aligns large areas from 6.7 on."""

    shift = 0

    def mmap(self, vaddr: int, size: int, protection: int, flags: int, *, fd: int = -1, offset: int = 0) -> Vaddr:
        """As the kernel's, but for the place."""
        if flags & MAP_FIXED:
            return super().mmap(vaddr, size, protection, flags, fd=fd, offset=offset)
        linux = LinuxKernel()
        found = linux.mmap(0, size + 2 * ALIGNMENT, protection, flags, fd=fd, offset=offset)
        place = align_up(found, ALIGNMENT) + self.shift
        if found < place:
            linux.munmap(found, place - found)
        linux.munmap(place + size, found + size + 2 * ALIGNMENT - place - size)
        self.place, self.size = place, size
        return Vaddr(place)


@pytest.mark.parametrize("shift", [0, PAGE_SIZE, MIB, ALIGNMENT - PAGE_SIZE])
@pytest.mark.parametrize("kind", [Anonymous(), Memfd()])
def test_memory_is_aligned_wherever_the_kernel_puts_it_and_the_rest_is_given_back(shift: int, kind: MemoryKind) -> None:
    """Before the first byte, and behind the guard page."""
    with _Shifted() as kernel:
        kernel.shift = shift
        memory = Reservation(kernel, max_length=MIB, kind=kind, settings=PLAIN)
        assert memory.vaddr == align_up(kernel.place, ALIGNMENT)
        memory.activate(MIB)
        memory._check()
        kept = sum(
            min(area.end, kernel.place + kernel.size) - max(area.start, kernel.place)
            for area in areas(kernel.place, kernel.size)
        )
        assert kept == MIB + PAGE_SIZE
        memory.release()


class _Losing(FakeKernel):
    """A fixed mapping of which fails, and has removed a part of what was there by then.

    In the `hole`, (start, end), another thread has mapped memory with the rights `by`; None: nothing yet.
    """

    hole = (0, 0)
    by: int | None = None

    def mmap(self, vaddr: int, size: int, protection: int, flags: int, *, fd: int = -1, offset: int = 0) -> Vaddr:
        """ENOMEM."""
        if not flags & MAP_FIXED:
            return super().mmap(vaddr, size, protection, flags, fd=fd, offset=offset)
        start, end = self.hole
        linux = LinuxKernel()
        if self.by is None:
            linux.munmap(vaddr + start, end - start)
        else:
            linux.mmap(vaddr + start, end - start, self.by, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED)
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


@pytest.mark.parametrize("by", [None, PROT_READ, PROT_READ | PROT_WRITE])
@pytest.mark.parametrize("hole", [(0, PAGE_SIZE), (MIB, 2 * MIB), (2 * MIB - PAGE_SIZE, 2 * MIB + PAGE_SIZE)])
def test_address_space_that_another_thread_may_have_is_not_unmapped(hole: tuple[int, int], by: int | None) -> None:
    """All of it stays, as nobody can tell whose the parts are."""
    with _Losing() as kernel:
        kernel.hole, kernel.by = hole, by
        with pytest.raises(IoctlError, match="ENOMEM"):
            Reservation(kernel, max_length=2 * MIB, kind=Memfd(), settings=PLAIN)
        calls = [call for call in kernel.trace if call.call in MEMORY_CALLS]
        vaddr = align_up(calls[0].result or 0, ALIGNMENT)
        assert not any(vaddr <= int(call.given[0]) < vaddr + 2 * MIB for call in calls[1:])
        found = areas(vaddr, 2 * MIB + PAGE_SIZE)
        there = sum(min(area.end, vaddr + 2 * MIB + PAGE_SIZE) - max(area.start, vaddr) for area in found)
        assert there == 2 * MIB + PAGE_SIZE - (hole[1] - hole[0] if by is None else 0)
        for area in found:
            start, end = max(area.start, vaddr), min(area.end, vaddr + 2 * MIB + PAGE_SIZE)
            LinuxKernel().munmap(start, end - start)


def test_a_refused_trim_says_which_part_could_not_be_unmapped() -> None:
    """With its place and size, before and behind."""
    for nth, part in ((1, (0, MIB)), (2, (2 * MIB + PAGE_SIZE, MIB - PAGE_SIZE))):
        with _Shifted() as kernel:
            kernel.shift = MIB
            kernel.fail(call="munmap", errno=errno.ENOMEM, nth=nth)
            with pytest.raises(IoctlError) as caught:
                Reservation(kernel, max_length=MIB, settings=PLAIN)
            assert caught.value.arguments == {"vaddr": kernel.place + part[0], "size": part[1]}


def test_reservations_that_lie_side_by_side_are_still_told_apart() -> None:
    """Areas of neighbours that are alike are one line of /proc/self/maps; neither's memory is touched."""
    many = [reserve(max_length=2 * MIB - PAGE_SIZE) for _ in range(8)]
    for memory in many[::2]:
        memory.activate(PAGE_SIZE)
    for memory in many:
        memory._check()
    for memory in many[::2]:
        memory.release()
    for memory in many[1::2]:
        memory._check()
        memory.activate(memory.max_length)
        memory._check()
        memory.release()


def test_a_reservation_is_charged_for_what_is_active_only() -> None:
    """The kernel marks what it accounts for: the active part, and nothing of the rest, not after a shrink either."""
    memory = reserve(active=4 * MIB)
    fill(memory, 0, 4 * MIB)
    memory.deactivate(2 * MIB)
    active, rest = areas(memory.vaddr, memory.max_length + PAGE_SIZE)
    assert "ac" in active.flags
    assert "ac" not in rest.flags
    assert (active.rss, rest.rss) == (2 * MIB, 0)
    memory.release()


def test_a_tebibyte_can_be_reserved_and_is_not_charged() -> None:
    """Committed_AS does not move by any share of it worth speaking of; other processes move it too."""

    def committed() -> int:
        return int(Path("/proc/meminfo").read_text(encoding="ascii").split("Committed_AS:")[1].split()[0]) * 1024

    before = committed()
    memory = reserve(max_length=TIB)
    after = committed()
    assert memory.max_length == TIB
    assert abs(after - before) < TIB // 64
    memory.activate(2 * MIB)
    memory._check()
    memory.release()


@pytest.mark.parametrize("length", [0, -PAGE_SIZE, 1, PAGE_SIZE + 1, 1 << 64, (1 << 64) - PAGE_SIZE, 1 << 70])
def test_a_length_that_cannot_be_is_refused_before_any_system_call(kernel: FakeKernel, length: int) -> None:
    """A length above 64 bits, too, which ctypes would cut in silence."""
    with pytest.raises(ValueError, match="max_length"):
        Reservation(kernel, max_length=length)
    assert kernel.trace == []


@pytest.mark.parametrize("length", [1 << 62, U64_MAX - ALIGNMENT - PAGE_SIZE + 1])
def test_more_address_space_than_there_is_cannot_be_had(length: int) -> None:
    """ENOMEM, with the size and what to do."""
    with pytest.raises(IoctlError, match="address space could not be reserved") as raised:
        reserve(max_length=length)
    assert raised.value.errno == errno.ENOMEM


def test_a_reservation_that_fails_leaves_no_address_space_behind(kernel: FakeKernel) -> None:
    """Whichever of its calls fails."""
    reserve(kernel, settings=ALL).release()
    calls = [call.call for call in kernel.trace[:-1]]
    assert set(calls) == {"mmap", "munmap", "madvise"}
    for position, call in enumerate(calls):
        kernel.clear_trace()
        kernel.fail(call=call, errno=errno.ENOMEM, nth=calls[: position + 1].count(call))
        with pytest.raises(IoctlError) as caught:
            Reservation(kernel, max_length=8 * MIB, settings=ALL)
        assert (caught.value.request, caught.value.errno) == (call, errno.ENOMEM)
        first = kernel.trace[0]
        if first.result is not None:
            left = maps(first.result, int(first.given[1]))
            assert not [line for line in left if " ---p " in line], (position, call)


# ------------------------------------------------------------------------------------------------- using, growing


@pytest.mark.long
def test_only_the_active_part_can_be_used() -> None:
    """A child that reads or writes the tail or the guard page dies by SIGSEGV; one that uses the rest does not."""
    memory = reserve(active=4 * MIB)
    assert touched_in_child(memory.vaddr + 4 * MIB - 1, write=True) == 0
    for vaddr in (memory.vaddr + 4 * MIB, memory.vaddr + 8 * MIB - 1, memory.vaddr + 8 * MIB):
        for write in (False, True):
            assert touched_in_child(vaddr, write=write) == -signal.SIGSEGV, hex(vaddr)
    memory.deactivate(2 * MIB)
    assert touched_in_child(memory.vaddr + 2 * MIB, write=False) == -signal.SIGSEGV
    memory.activate(8 * MIB)
    assert touched_in_child(memory.vaddr + 8 * MIB - 1, write=True) == 0
    assert touched_in_child(memory.vaddr + 8 * MIB, write=True) == -signal.SIGSEGV
    memory.release()


def test_contents_below_stay_and_new_memory_reads_zero() -> None:
    """Through growing, shrinking and growing again, of which nothing moves."""
    memory = reserve(active=2 * MIB)
    vaddr = memory.vaddr
    fill(memory, 0, 2 * MIB)
    memory.activate(4 * MIB)
    assert is_zero(contents(memory, 2 * MIB, 4 * MIB))
    fill(memory, 2 * MIB, 4 * MIB, 0xA5)
    memory.deactivate(MIB)
    memory.activate(4 * MIB)
    assert contents(memory, 0, MIB) == b"\x5a" * MIB
    assert is_zero(contents(memory, MIB, 4 * MIB))
    assert memory.vaddr == vaddr
    memory.release()


def test_all_may_be_given_back_and_taken_again() -> None:
    """Down to nothing and up to everything."""
    memory = reserve(active=8 * MIB)
    fill(memory, 0, 8 * MIB)
    memory.deactivate(0)
    memory._check()
    assert [area.permissions for area in areas(memory.vaddr, memory.max_length)] == ["---p"]
    memory.activate(8 * MIB)
    memory._check()
    assert is_zero(contents(memory, 0, 8 * MIB))
    memory.release()


@pytest.mark.parametrize("length", [-PAGE_SIZE, 0, 4 * MIB, 8 * MIB + PAGE_SIZE])
def test_what_is_not_a_growth_within_the_reservation_is_refused(kernel: FakeKernel, length: int) -> None:
    """Before any system call."""
    memory = reserve(kernel, active=4 * MIB)
    kernel.clear_trace()
    with pytest.raises(ValueError, match="cannot activate"):
        memory.activate(length)
    assert kernel.trace == []
    memory.release()


@pytest.mark.parametrize("length", [-PAGE_SIZE, 4 * MIB, 8 * MIB])
def test_what_is_not_a_shrink_is_refused(kernel: FakeKernel, length: int) -> None:
    """Before any system call."""
    memory = reserve(kernel, active=4 * MIB)
    kernel.clear_trace()
    with pytest.raises(ValueError, match="cannot deactivate"):
        memory.deactivate(length)
    assert kernel.trace == []
    memory.release()


def test_growing_takes_one_call_and_shrinking_one_more_than_there_are_settings(kernel: FakeKernel) -> None:
    """By mprotect, which leaves everything as it was when it fails, and by a mapping that takes the charge away."""
    memory = reserve(kernel, settings=ALL)
    kernel.clear_trace()
    memory.activate(4 * MIB)
    assert [call.call for call in kernel.trace] == ["mprotect"]
    kernel.clear_trace()
    memory.deactivate(2 * MIB)
    assert [call.call for call in kernel.trace] == ["mmap"] + ["madvise"] * 4
    kernel.clear_trace()
    memory.activate(4 * MIB)
    assert [call.call for call in kernel.trace] == ["mprotect"]
    memory.release()


@pytest.mark.parametrize("kind", [resource.RLIMIT_AS, resource.RLIMIT_DATA])
def test_a_growth_that_the_process_may_not_have_changes_nothing(kind: int) -> None:
    """Seen by a child whose limit is real: ENOMEM, the same lengths, maps and contents, and less is to be had."""

    def grow() -> None:
        memory = Reservation(LinuxKernel(), max_length=512 * MIB, settings=PLAIN)
        memory.activate(2 * MIB)
        fill(memory, 0, 2 * MIB)
        gc.collect()
        limit_memory(kind, headroom=64 * MIB)
        before = layout(memory)
        refused = refuse_growth(memory) if kind == resource.RLIMIT_DATA else refuse_reservation()
        assert refused.errno == errno.ENOMEM
        assert layout(memory) == before
        assert memory.length == 2 * MIB
        assert contents(memory, 0, 2 * MIB) == b"\x5a" * 2 * MIB
        memory.activate(4 * MIB)
        memory._check()

    assert in_child(grow) == 0


def refuse_growth(memory: Reservation) -> IoctlError:
    """What growing to all of it raises."""
    with pytest.raises(IoctlError, match="more memory could not be allocated") as raised:
        memory.activate(memory.max_length)
    assert raised.value.request == "mprotect"
    assert "RLIMIT_DATA" in raised.value.hint
    return raised.value


def refuse_reservation() -> IoctlError:
    """RLIMIT_AS counts address space, so it is the next reservation that it refuses; growing takes none."""
    with pytest.raises(IoctlError, match="address space") as raised:
        Reservation(LinuxKernel(), max_length=256 * MIB)
    return raised.value


Scenario = Callable[[FakeKernel], Reservation]


def fresh(kernel: FakeKernel) -> Reservation:
    """4 MiB of 8 are active."""
    return reserve(kernel, active=4 * MIB, settings=ALL)


def with_stale_tail(kernel: FakeKernel) -> Reservation:
    """2 MiB are active, and 2 MiB behind could not be given back."""
    memory = reserve(kernel, active=4 * MIB, settings=ALL)
    fill(memory, 0, 4 * MIB)
    kernel.fail(call="mmap", errno=errno.ENOMEM)
    with pytest.raises(OSError, match="Cannot allocate"):
        memory.deactivate(2 * MIB)
    return memory


def with_lost_settings(kernel: FakeKernel) -> Reservation:
    """2 MiB are active, and of what was given back the settings could not be made."""
    memory = reserve(kernel, active=4 * MIB, settings=ALL)
    kernel.fail(call="madvise", errno=errno.ENOMEM, nth=2)
    memory.deactivate(2 * MIB)
    return memory


@pytest.mark.parametrize("scenario", [fresh, with_stale_tail, with_lost_settings])
def test_a_growth_of_which_any_call_fails_changes_nothing(kernel: FakeKernel, scenario: Scenario) -> None:
    """Nor does it hinder the next attempt, after which all is as if nothing had failed."""
    probe = scenario(kernel)
    kernel.clear_trace()
    probe.activate(8 * MIB)
    calls = [call.call for call in kernel.trace]
    assert "mprotect" in calls
    for position in range(calls.index("mprotect") + 1):
        memory = scenario(kernel)
        accessible, length = [area[:3] for area in areas(memory.vaddr, 8 * MIB)], memory.length
        retained = memory.retained
        kernel.fail(call=calls[position], errno=errno.ENOMEM, nth=calls[: position + 1].count(calls[position]))
        with pytest.raises(IoctlError, match="ENOMEM") as raised:
            memory.activate(8 * MIB)
        assert raised.value.request == calls[position]
        kernel.clear_failures()
        memory._check()
        after = [area[:3] for area in areas(memory.vaddr, 8 * MIB)]
        assert (memory.length, memory.retained) == (length, retained)
        # A part that has lost its settings may have got some of them back, and is one with its neighbour then.
        assert after == accessible or scenario is with_lost_settings
        assert [area for area in after if "w" in area[2]] == [area for area in accessible if "w" in area[2]]
        memory.activate(8 * MIB)
        memory._check()
        assert is_zero(contents(memory, length, 8 * MIB))
        assert len(areas(memory.vaddr, 8 * MIB)) == 1
        memory.release()
    probe.release()


# ----------------------------------------------------------------------------------------------------- settings


def test_settings_hold_on_all_of_it_through_every_resize() -> None:
    """DONTFORK, DONTDUMP, HUGEPAGE and MERGEABLE; and there are never more than two areas, active and reserved."""
    memory = reserve(settings=ALL)
    for length in (2 * MIB, 6 * MIB, 4 * MIB, 5 * MIB, MIB, 8 * MIB, PAGE_SIZE, 7 * MIB):
        if length > memory.length:
            memory.activate(length)
        else:
            memory.deactivate(length)
        fill(memory, 0, length)
        memory._check()
        found = areas(memory.vaddr, memory.max_length + PAGE_SIZE)
        assert [area.permissions for area in found] == ["rw-p", "---p"]
        assert found[0].end == memory.vaddr + length
        for area in found:
            assert area.flags >= {"dc", "dd", "hg", "mg"}, area
    memory.release()


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        (MemorySettings(), {"dc", "hg"}),
        (PLAIN, set()),
        (MemorySettings(dontfork=True, hugepage=False), {"dc"}),
        (MemorySettings(dontfork=False, hugepage=True), {"hg"}),
        (MemorySettings(dontfork=False, hugepage=False, dontdump=True), {"dd"}),
        (MemorySettings(dontfork=False, hugepage=False, mergeable=True), {"mg"}),
    ],
)
def test_each_setting_is_one_flag_and_no_other(settings: MemorySettings, flags: set[str]) -> None:
    """By default, children do not inherit the memory and huge pages may back it."""
    memory = reserve(active=4 * MIB, settings=settings)
    memory.deactivate(2 * MIB)
    memory.activate(6 * MIB)
    assert memory.settings is settings
    for area in areas(memory.vaddr, memory.max_length):
        assert area.flags & {"dc", "dd", "hg", "mg"} == flags
    memory.release()


def test_memory_is_not_inherited_by_children_unless_asked_for() -> None:
    """A child that touches it dies by SIGSEGV."""
    memory = reserve(active=2 * MIB, settings=MemorySettings())
    assert touched_in_child(memory.vaddr, write=False) == -signal.SIGSEGV
    memory.release()


def test_settings_that_were_lost_in_a_shrink_are_made_before_the_memory_is_seen_again(kernel: FakeKernel) -> None:
    """A shrink does not fail for them; and there are two areas again."""
    memory = with_lost_settings(kernel)
    memory.activate(6 * MIB)
    found = areas(memory.vaddr, memory.max_length + PAGE_SIZE)
    assert [area.permissions for area in found] == ["rw-p", "---p"]
    assert all(area.flags >= {"dc", "dd", "hg", "mg"} for area in found)
    memory.release()


def test_settings_that_two_shrinks_have_lost_are_made_on_both_parts(kernel: FakeKernel) -> None:
    """What was to be done is added to, not replaced."""
    memory = reserve(kernel, active=8 * MIB, settings=ALL)
    for length in (6 * MIB, 4 * MIB):
        for _ in range(2):
            kernel.fail(call="madvise", errno=errno.ENOMEM)
        memory.deactivate(length)
        kernel.clear_failures()
    memory.activate(8 * MIB)
    assert all(area.flags >= {"dc", "dd", "hg", "mg"} for area in areas(memory.vaddr, 8 * MIB))
    memory.release()


@pytest.mark.parametrize("advice", [mmap.MADV_HUGEPAGE, mmap.MADV_MERGEABLE])
def test_a_kernel_without_ksm_or_huge_pages_will_do(kernel: FakeKernel, advice: int) -> None:
    """EINVAL is what it answers."""
    kernel.fail(call="madvise", errno=errno.EINVAL, nth=ALL.advices.index(advice) + 1)
    memory = reserve(kernel, active=2 * MIB, settings=ALL)
    assert kernel.trace[-2].errno == 0
    memory.release()


@pytest.mark.parametrize("advice", [mmap.MADV_DONTFORK, mmap.MADV_DONTDUMP])
def test_memory_that_a_child_would_inherit_against_the_settings_is_not_made(kernel: FakeKernel, advice: int) -> None:
    """What keeps contents from others is not optional."""
    kernel.fail(call="madvise", errno=errno.EINVAL, nth=ALL.advices.index(advice) + 1)
    with pytest.raises(IoctlError, match="EINVAL"):
        reserve(kernel, settings=ALL)


def test_an_optional_setting_that_fails_for_another_reason_is_a_failure(kernel: FakeKernel) -> None:
    """ENOMEM of MADV_HUGEPAGE does not say that the kernel lacks it."""
    memory = reserve(kernel)
    kernel.fail(call="madvise", errno=errno.ENOMEM)
    with pytest.raises(IoctlError, match="ENOMEM"):
        apply_settings(kernel, MemorySettings(), vaddr=memory.vaddr, size=PAGE_SIZE)
    memory.release()


def test_huge_pages_back_the_memory_where_the_machine_has_them() -> None:
    """From its first byte, as it starts at a multiple of 2 MiB."""
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    available = modes.exists() and "[never]" not in modes.read_text(encoding="ascii")
    memory = reserve(max_length=16 * MIB, active=8 * MIB, settings=MemorySettings())
    fill(memory, 0, 8 * MIB)
    huge = sum(area.huge for area in areas(memory.vaddr, 8 * MIB))
    assert (huge > 0) == available
    memory.release()


# ---------------------------------------------------------------------------------- what could not be given back


def test_a_shrink_whose_memory_stays_has_its_length_changed_all_the_same(kernel: FakeKernel) -> None:
    """What stays is counted, and goes with the next shrink."""
    memory = with_stale_tail(kernel)
    assert (memory.length, memory.retained) == (2 * MIB, 2 * MIB)
    memory._check()
    memory.deactivate(MIB)
    assert (memory.length, memory.retained) == (MIB, 0)
    assert sum(area.rss for area in areas(memory.vaddr, 8 * MIB)) == MIB
    memory.release()


def test_a_stale_tail_reads_zero_when_it_is_seen_again_part_by_part(kernel: FakeKernel) -> None:
    """And what lies below it is as it was."""
    memory = with_stale_tail(kernel)
    memory.activate(3 * MIB)
    assert memory.retained == MIB
    assert is_zero(contents(memory, 2 * MIB, 3 * MIB))
    fill(memory, 2 * MIB, 3 * MIB)
    memory.activate(6 * MIB)
    assert contents(memory, 0, 3 * MIB) == b"\x5a" * 3 * MIB
    assert is_zero(contents(memory, 3 * MIB, 6 * MIB))
    memory._check()
    memory.release()


def test_a_stale_tail_that_cannot_be_dropped_is_written_with_zeros(kernel: FakeKernel) -> None:
    """Locked memory answers EINVAL to MADV_DONTNEED, and before Linux 5.18 to MADV_DONTNEED_LOCKED."""
    memory = with_stale_tail(kernel)
    for nth in (1, 2):
        kernel.fail(call="madvise", errno=errno.EINVAL, nth=len(ALL.advices) + nth)
    kernel.clear_trace()
    memory.activate(8 * MIB)
    assert [(call.errno, call.given[2]) for call in kernel.trace[-2:]] == [
        (errno.EINVAL, mmap.MADV_DONTNEED),
        (errno.EINVAL, MADV_DONTNEED_LOCKED),
    ]
    assert is_zero(contents(memory, 2 * MIB, 8 * MIB))
    memory.release()


def test_memory_that_cannot_be_dropped_for_another_reason_is_not_taken_for_locked(kernel: FakeKernel) -> None:
    """It is written, and the reason told."""
    memory = reserve(kernel, active=4 * MIB)
    fill(memory, 0, 4 * MIB)
    kernel.fail(call="madvise", errno=errno.ENOMEM)
    kernel.clear_trace()
    with pytest.raises(OSError, match="Cannot allocate memory"):
        memory.drop(MIB, 2 * MIB)
    assert len(kernel.trace) == 1
    assert contents(memory, MIB, 2 * MIB) == bytes(MIB)
    memory.release()


def test_memory_that_a_device_may_reach_is_neither_given_back_nor_exchanged(kernel: FakeKernel) -> None:
    """It is zeroed by writing, so that device and process see the same pages; no call takes it away."""
    memory = reserve(kernel, active=4 * MIB)
    fill(memory, 0, 4 * MIB)
    kernel.clear_trace()
    memory.retain(2 * MIB)
    assert (memory.length, memory.retained) == (2 * MIB, 2 * MIB)
    memory.activate(6 * MIB)
    assert is_zero(contents(memory, 2 * MIB, 6 * MIB))
    assert contents(memory, 0, 2 * MIB) == b"\x5a" * 2 * MIB
    assert [call.call for call in kernel.trace] == ["mprotect"]
    memory._check()
    memory.release()


def test_a_shrink_ends_what_a_device_may_reach(kernel: FakeKernel) -> None:
    """Whoever shrinks says that no device reaches behind: the memory goes, that which had been retained as well."""
    memory = reserve(kernel, active=6 * MIB)
    fill(memory, 0, 6 * MIB)
    memory.retain(4 * MIB)
    memory.deactivate(2 * MIB)
    assert memory.retained == 0
    assert sum(area.rss for area in areas(memory.vaddr, 8 * MIB)) == 2 * MIB
    memory.release()


def test_memory_that_is_kept_for_ever_is_never_given_back(kernel: FakeKernel) -> None:
    """Neither by shrinking nor by releasing; it still grows and shrinks, and new memory reads zero."""
    memory = reserve(kernel, active=4 * MIB)
    fill(memory, 0, 4 * MIB)
    memory.keep()
    kernel.clear_trace()
    memory.deactivate(MIB)
    memory._check()
    memory.activate(2 * MIB)
    assert is_zero(contents(memory, MIB, 2 * MIB))
    memory.release()
    assert contents(memory, 3 * MIB, 4 * MIB) == b"\x5a" * MIB
    assert {call.call for call in kernel.trace} == {"mprotect"}


def test_what_was_retained_is_dropped_and_not_written_once_no_device_reaches_it(kernel: FakeKernel) -> None:
    """A shrink below says so, and so does whoever has seen that the unmap was made up for."""
    for end_it in ("shrink", "let go"):
        memory = reserve(kernel, active=4 * MIB)
        memory.retain(2 * MIB)
        memory.activate(6 * MIB)
        fill(memory, 0, 6 * MIB)
        with pytest.raises(OSError, match="a device may still reach the memory") as caught:
            memory.drop(3 * MIB, 4 * MIB)
        assert caught.value.errno == errno.EBUSY
        assert is_zero(contents(memory, 3 * MIB, 4 * MIB))
        if end_it == "shrink":
            memory.deactivate(MIB)
            memory.activate(6 * MIB)
            fill(memory, 0, 6 * MIB)
        else:
            memory.let_go()
            memory.drop(0, PAGE_SIZE)
        memory.drop(3 * MIB, 4 * MIB)
        assert sum(area.rss for area in areas(memory.vaddr, 8 * MIB)) <= 5 * MIB
        memory.release()


def test_what_is_kept_for_ever_is_never_let_go(kernel: FakeKernel) -> None:
    """Whatever is said of one change."""
    memory = reserve(kernel, active=4 * MIB)
    fill(memory, 0, 4 * MIB)
    memory.keep()
    memory.let_go()
    with pytest.raises(OSError, match="a device may still reach the memory"):
        memory.drop(0, PAGE_SIZE)
    assert sum(area.rss for area in areas(memory.vaddr, 8 * MIB)) == 4 * MIB
    memory._kept = False  # which nothing else takes back
    memory.release()


@pytest.mark.parametrize("part", [(-PAGE_SIZE, PAGE_SIZE), (0, 0), (2, 1), (MIB, 4 * MIB + 1), (4 * MIB, 5 * MIB)])
def test_only_what_is_active_can_be_dropped_cleared_or_replaced(kernel: FakeKernel, part: tuple[int, int]) -> None:
    """All of it can; without a byte, or with one too many, nothing is done."""
    memory = reserve(kernel, active=4 * MIB)
    fill(memory, 0, 4 * MIB)
    kernel.clear_trace()
    actions: dict[str, Callable[[int, int], None]] = {
        "drop": memory.drop,
        "clear": memory.clear,
        "replace": lambda start, end: memory.replace(start, end, provide=True),
    }
    for name, action in actions.items():
        with pytest.raises(ValueError, match=f"cannot {name} .*: 0x400000 bytes are active"):
            action(*part)
    assert kernel.trace == []
    assert contents(memory, 0, 4 * MIB) == b"\x5a" * 4 * MIB
    for action in actions.values():
        fill(memory, 0, 4 * MIB)
        action(MIB, 2 * MIB)
        assert contents(memory, 0, 4 * MIB) == b"\x5a" * MIB + bytes(MIB) + b"\x5a" * 2 * MIB
        action(0, 4 * MIB)
        assert is_zero(contents(memory, 0, 4 * MIB))
    memory.release()


@pytest.mark.parametrize("length", [0, 2 * MIB, 4 * MIB])
def test_all_or_nothing_of_it_can_be_retained(length: int) -> None:
    """As any part."""
    memory = reserve(active=4 * MIB)
    memory.retain(length)
    assert (memory.length, memory.retained, memory.held) == (length, 4 * MIB - length, 4 * MIB)
    memory._check()
    memory.release()


@pytest.mark.parametrize("length", [-1, 4 * MIB + PAGE_SIZE])
def test_only_what_is_active_can_be_retained(length: int) -> None:
    """Anything else is a ValueError."""
    memory = reserve(active=4 * MIB)
    with pytest.raises(ValueError, match="cannot retain"):
        memory.retain(length)
    memory.release()


# ---------------------------------------------------------------------------------------------------- releasing


def test_releasing_gives_back_everything_once(kernel: FakeKernel) -> None:
    """Guard page included; a second time nothing happens."""
    memory = reserve(kernel, active=4 * MIB)
    vaddr = memory.vaddr
    kernel.clear_trace()
    memory.release()
    memory.release()
    assert [(call.call, call.given) for call in kernel.trace] == [("munmap", (vaddr, 8 * MIB + PAGE_SIZE))]
    assert (memory.vaddr, memory.length, memory.retained) == (0, 0, 0)
    memory._check()


def test_released_memory_cannot_be_resized() -> None:
    """ClosedError, whatever is asked."""
    memory = reserve(active=MIB)
    memory.release()
    for action in (memory.activate, memory.deactivate, memory.retain, memory.activate_whole):
        with pytest.raises(ClosedError):
            action(0)
    for part in (memory.drop, lambda start, end: memory.replace(start, end, provide=True)):
        with pytest.raises(ClosedError):
            part(0, PAGE_SIZE)


def test_a_release_that_fails_has_changed_nothing(kernel: FakeKernel) -> None:
    """It can be tried again."""
    memory = reserve(kernel, active=4 * MIB)
    before = layout(memory)
    kernel.fail(call="munmap", errno=errno.ENOMEM)
    with pytest.raises(OSError, match="Cannot allocate"):
        memory.release()
    assert layout(memory) == before
    memory._check()
    memory.release()
    assert memory.vaddr == 0


# -------------------------------------------------------------------------------------------------------- views


def test_the_end_of_what_views_reach_is_that_of_the_longest_live_one() -> None:
    """Slices, casts and views of views count, and an empty view does not."""
    memory = reserve(active=4 * MIB)
    exports = Exports()
    assert exports.end() == 0
    long, short = exports.view(memory.vaddr, 4 * MIB), exports.view(memory.vaddr, MIB)
    empty = exports.view(memory.vaddr, 0)
    assert (len(empty), len(short), len(long)) == (0, MIB, 4 * MIB)
    part = long[:16].cast("I")
    del long
    assert exports.end() == memory.vaddr + 4 * MIB
    part.release()
    del part
    assert exports.end() == memory.vaddr + MIB
    short.release()
    assert exports.end() == 0
    memory.release()


def test_views_that_have_gone_leave_nothing_behind() -> None:
    """However many there were."""
    memory, exports = reserve(active=MIB), Exports()
    for _ in range(100):
        exports.view(memory.vaddr, PAGE_SIZE)
    assert len(exports._exports) == 1
    memory.release()


def test_the_end_of_each_view_can_be_watched() -> None:
    """Of those that are alive: each calls once, and a view that has ended does not."""
    memory, exports = reserve(active=MIB), Exports()
    gone, first, second = (exports.view(memory.vaddr, PAGE_SIZE) for _ in range(3))
    gone.release()
    del gone
    ended: list[int] = []
    exports.watch(lambda: ended.append(exports.end()))
    assert ended == []
    first.release()
    assert len(ended) == 1
    second.release()
    assert ended[1:] == [0]
    memory.release()


def test_a_view_is_the_memory_itself() -> None:
    """Bytes, one dimension, writable."""
    memory = reserve(active=MIB)
    view = Exports().view(memory.vaddr, MIB)
    assert (view.format, view.itemsize, view.shape, view.readonly) == ("B", 1, (MIB,), False)
    view[:4] = b"abcd"
    assert contents(memory, 0, 4) == b"abcd"
    view.release()
    memory.release()


# --------------------------------------------------------------------------------------------------- descriptions


def test_a_description_says_what_is_mapped_and_what_is_not() -> None:
    """For the message of a map that failed with EFAULT."""
    memory = reserve(active=MIB)
    vaddr = memory.vaddr
    assert describe(vaddr, 2 * MIB).startswith(f"This process has mapped there: {vaddr:#x}-{vaddr + MIB - 1:#x} rw-p, ")
    assert "not mapped" not in describe(vaddr, 2 * MIB)
    memory.release()
    high = (1 << 63) + PAGE_SIZE
    assert describe(high, PAGE_SIZE) == f"This process has nothing mapped at {high:#x}-{high + PAGE_SIZE - 1:#x}"


def test_a_description_counts_the_bytes_that_are_missing() -> None:
    """A hole in the middle, in bytes."""
    linux = LinuxKernel()
    vaddr = linux.mmap(0, 3 * PAGE_SIZE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    linux.munmap(vaddr + PAGE_SIZE, PAGE_SIZE)
    assert describe(vaddr, 3 * PAGE_SIZE).endswith(f"; {PAGE_SIZE:#x} bytes of the range are not mapped at all")
    linux.munmap(vaddr, PAGE_SIZE)
    linux.munmap(vaddr + 2 * PAGE_SIZE, PAGE_SIZE)


def test_the_kernel_answers_as_the_text_of_its_file_reads(tmp_path: Path) -> None:
    """Of each kind of mapping: from its middle, to the middle of the next, and where nothing is mapped."""
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE_SIZE))
    memory = reserve(active=MIB)
    linux = LinuxKernel()
    with path.open("rb") as file, path.open("r+b") as writable:
        kinds = ((file, 1, mmap.MAP_SHARED), (file, 5, mmap.MAP_PRIVATE), (writable, 3, mmap.MAP_SHARED))
        places = [linux.mmap(0, PAGE_SIZE, rights, flags, fd=each.fileno()) for each, rights, flags in kinds]
    ranges: list[tuple[int, int]] = [(place, PAGE_SIZE) for place in places]
    ranges += [(memory.vaddr + PAGE_SIZE, 2 * MIB), (memory.vaddr + MIB, PAGE_SIZE), (0, PAGE_SIZE), (1 << 63, MIB)]
    for vaddr, size in ranges:
        assert maps_areas(vaddr, size) == areas_by_text(vaddr, size)
    assert [rights for place in places for *_, rights in maps_areas(place, PAGE_SIZE)] == ["r--s", "r-xp", "rw-s"]
    for place in places:
        linux.munmap(place, PAGE_SIZE)
    memory.release()


def test_a_file_with_a_strange_name_does_not_confuse_the_map(tmp_path: Path) -> None:
    """A path may hold anything but a newline unescaped."""
    strange = tmp_path / "a\rb\x0bc\x85d"
    strange.write_bytes(bytes(PAGE_SIZE))
    with strange.open("r+b") as file, mmap.mmap(file.fileno(), PAGE_SIZE):
        memory = reserve(active=MIB)
        memory._check()
        memory.release()


# -------------------------------------------------------------------------------------------------- other pages


@pytest.mark.parametrize("locked", [False, True])
def test_pages_that_are_replaced_read_zeros_and_their_neighbours_what_they_did(*, locked: bool) -> None:
    """Also in memory that is locked, which MADV_DONTNEED refuses; it stays one area."""
    memory = reserve(active=MIB)
    fill(memory, 0, MIB)
    before = layout(memory)
    libc = ctypes.CDLL(None)
    if locked:
        assert libc.mlock(ctypes.c_void_p(memory.vaddr), ctypes.c_size_t(MIB)) == 0
    memory.replace(2 * PAGE_SIZE, 3 * PAGE_SIZE, provide=True)
    if locked:
        assert libc.munlock(ctypes.c_void_p(memory.vaddr), ctypes.c_size_t(MIB)) == 0
    content = ctypes.string_at(memory.vaddr, MIB)
    filling = content[:1]
    assert content == filling * (2 * PAGE_SIZE) + bytes(PAGE_SIZE) + filling * (MIB - 3 * PAGE_SIZE)
    assert filling != b"\0"
    assert layout(memory) == before
    memory.release()


def test_pages_that_a_device_may_reach_for_ever_are_not_replaced(kernel: FakeKernel) -> None:
    """EBUSY. A retained grow is no reason: whoever replaces pages has had everybody let go of them."""
    memory = reserve(kernel, active=4 * MIB)
    memory.retain(2 * MIB)
    memory.replace(0, PAGE_SIZE, provide=True)
    with pytest.raises(ValueError, match="are active"):
        memory.replace(MIB, 3 * MIB, provide=True)
    memory.keep()
    with pytest.raises(IoctlError, match=r"EBUSY, new pages for 4 KiB .* a device may still reach.*Use another block"):
        memory.replace(0, PAGE_SIZE, provide=True)
    memory._kept = False  # which nothing else takes back
    memory.release()
