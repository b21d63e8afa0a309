"""Memory slots of `/dev/kvm` that follow RAM blocks: a guest reaches [0, used_length) of each, and never anything else.

    with Vm() as vm, pyvfio.RamBlockList() as blocks, KvmSlots(vm, blocks) as slots:
        ram = blocks.add("ram", used_length=2 * pyvfio.MIB, max_length=pyvfio.GIB)
        slots.gpa(ram)                      # where the guest has it; it stays
        ram.resize(4 * pyvfio.MIB)

`KvmSlots` is a notifier of a `RamBlockList`, as `pyvfio.DmaMapper` is, and both may follow one list: what one refuses
happens to neither. When a block comes, `max_length` of guest physical addresses is its own, and what it holds becomes
a slot there, one for each populated run where parts are discarded; with a length of 0 it has none.

KVM changes the size of no slot that exists (EINVAL): a slot is deleted, by setting it with a size of 0, and made anew.
That is not atomic. What the guest's CPUs access meanwhile is KVM_EXIT_MMIO, so whoever resizes keeps them out of
KVM_RUN, as QEMU does (accel/accel-blocker.c). In contrast to VFIO, KVM pins nothing: it follows the memory map of this
process (KVM_CAP_SYNC_MMU), so that no discard is ruled out here. A slot that stayed behind a shrunk end would reach no
freed memory; KVM_RUN would end with EFAULT, or with KVM_EXIT_MMIO where KVM emulates the instruction.

Run as a program (`python examples/kvm_slots.py`), it lets one block be followed by both, by slots of the running
kernel and by a DmaMapper on pyvfio's fake kernel. After each step a virtual CPU stores bytes before and behind all ends
of what the block holds, and each is looked for in the block; and since KVM_EXIT_MMIO alone does not say that there is
no slot, the kernel is asked as well: it refuses another slot where one is (EEXIST). With `--no-run`, or where no guest
runs, it is only asked.

Source: linux/kvm.h; `kvm_set_memory_region` in virt/kvm/kvm_main.c; `kvm_region_commit` in accel/kvm/kvm-all.c of QEMU.
"""

from __future__ import annotations

import argparse
import errno
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain, pairwise
from types import TracebackType
from typing import Protocol, Self
from weakref import WeakKeyDictionary

import pyvfio
from kvm_machine import CODE, Gpa, Vcpu, Vm
from pyvfio.cli.common import FAILED, OK, complain, guard, print_table
from pyvfio.errors import as_exception
from pyvfio.extents import clip, runs, without
from pyvfio.testing import FakeKernel
from pyvfio.units import align_up, format_size

NAME = "kvm_slots"
LARGE_PAGE = 2 * pyvfio.MIB
GUEST_PHYSICAL = (
    pyvfio.Extent(0x1000_0000, 0xC000_0000),  # above what firmware and this example's code use
    pyvfio.Extent(1 << 32, 1 << 36),  # below: interrupt controllers, and what KVM itself needs; every CPU has 36 bits
)


class SetsRegions(Protocol):
    """Who has the slots: a `Vm`."""

    slot_count: int

    def set_region(self, *, slot: int, gpa: int, vaddr: int, size: int) -> None:
        """As `Vm.set_region`."""
        ...


@dataclass(frozen=True, slots=True)
class Slot:
    """One slot, as it was set."""

    number: int
    gpa: Gpa
    vaddr: int
    size: int


@dataclass(slots=True)
class _Followed:
    """The guest physical addresses of a block, and its slots: never fewer than the kernel has."""

    gpa: Gpa
    vaddr: int
    max_length: int
    numbers: dict[pyvfio.Extent, int] = field(default_factory=dict)

    @property
    def reserved(self) -> pyvfio.Extent:
        return pyvfio.Extent(self.gpa, self.gpa + self.max_length)

    def slot(self, part: pyvfio.Extent) -> Slot:
        return Slot(self.numbers[part], Gpa(self.gpa + part.start), self.vaddr + part.start, part.size)


class KvmSlots:
    """Keeps the slots of `vm` equal to what the blocks of `blocks` hold.

    Uses slots from `first_slot` on; those below, and all guest physical addresses outside of GUEST_PHYSICAL, are the
    caller's own. Raises what making the slots of existing blocks raises; then it follows nothing.

    Synchronization: hooks are called under the list's lock; `gpa` may be called from any thread. Cost: a resize is two
    ioctls, some ten microseconds, whatever the lengths.
    """

    def __init__(self, vm: SetsRegions, blocks: pyvfio.RamBlockList, *, first_slot: int = 1) -> None:
        self._vm = vm
        self._first_slot = first_slot
        self._followed: dict[pyvfio.RamBlock, _Followed] = {}
        self._former: WeakKeyDictionary[pyvfio.RamBlock, Gpa] = WeakKeyDictionary()
        self._blocks: pyvfio.RamBlockList | None = blocks
        blocks.add_notifier(self)

    def gpa(self, block: pyvfio.RamBlock) -> Gpa:
        """Where the guest has the block, as long as it is followed. Raises KeyError when it is not."""
        return self._followed[block].gpa

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All that there are, by guest physical address."""
        found = [followed.slot(part) for followed in self._followed.values() for part in followed.numbers]
        return tuple(sorted(found, key=lambda slot: slot.gpa))

    # ------------------------------------------------------------------------------------------------------- hooks

    def ram_block_added(self, block: pyvfio.RamBlock, used_length: int, max_length: int) -> None:
        """Reserve `max_length` of guest physical addresses, and make slots of what is populated."""
        del used_length  # the block says which parts of it are populated
        if block in self._followed:  # a signal handler has ended its removal, which may have done nothing
            self._change(self._followed[block], block.populated, f"adding RAM block '{block.idstr}'")
            return
        followed = _Followed(self._find_place(block, max_length), block.vaddr, max_length)
        self._followed[block] = followed  # first: what is set of it is known, whatever happens
        try:
            self._change(followed, block.populated, f"adding RAM block '{block.idstr}'")
        except pyvfio.RollbackError:
            raise  # a slot may be left, so that its number and its addresses are nobody else's
        except BaseException:
            del self._followed[block]
            raise

    def ram_block_removed(self, block: pyvfio.RamBlock, used_length: int, max_length: int) -> None:
        """Delete its slots and give its addresses back."""
        del used_length, max_length
        if block not in self._followed:  # a signal handler has ended an earlier call behind the last line
            return
        self._change(self._followed[block], [], f"removing RAM block '{block.idstr}'")
        self._former[block] = self._followed.pop(block).gpa

    def ram_block_resized(self, block: pyvfio.RamBlock, old_length: int, new_length: int) -> None:
        """Delete the slot that changes, and make it anew."""
        del old_length  # the slots say what there is
        wanted = without([pyvfio.Extent(0, new_length)], *block.discarded)
        self._change(self._followed[block], wanted, f"resizing RAM block '{block.idstr}'")

    def ram_block_discarded(self, block: pyvfio.RamBlock, parts: Sequence[pyvfio.Extent]) -> None:
        """Cut the parts out of the slots that have them."""
        wanted = without(block.populated, *parts)
        self._change(self._followed[block], wanted, f"discarding of RAM block '{block.idstr}'")

    def ram_block_populated(self, block: pyvfio.RamBlock, parts: Sequence[pyvfio.Extent]) -> None:
        """Join the parts with the slots around them."""
        wanted = runs(sorted([*without(block.populated, *parts), *parts]))
        self._change(self._followed[block], wanted, f"populating RAM block '{block.idstr}'")

    def ram_block_remapping(self, block: pyvfio.RamBlock, parts: Sequence[pyvfio.Extent]) -> None:
        """Nothing: a guest goes through this process's page tables, and KVM hears when they change
        (`mmu_notifier_invalidate_range_start`)."""

    def ram_block_remapped(self, block: pyvfio.RamBlock, parts: Sequence[pyvfio.Extent]) -> None:
        """Nothing."""

    # ------------------------------------------------------------------------------------------------------- slots

    def _change(self, followed: _Followed, wanted: Sequence[pyvfio.Extent], what: str) -> None:
        """Let there be a slot for each of `wanted` and no other; as it was when that is refused, and RollbackError when
        that is refused too."""
        before = list(followed.numbers)
        try:
            self._settle(followed, wanted)
        except BaseException as error:
            try:
                self._settle(followed, before)
            except BaseException as failure:
                raise pyvfio.RollbackError(
                    f"{what} failed, and so did its undo: the guest may reach less of it, or what was to come",
                    [as_exception(error), as_exception(failure)],
                    hint="Its memory is kept. Resize it to another length, or remove it",
                ) from error
            raise

    def _settle(self, followed: _Followed, wanted: Sequence[pyvfio.Extent]) -> None:
        """Delete first, since what is made may overlap it. A slot that is there already is set once more, which does
        nothing and costs a microsecond: one that an interrupted call has left deleted comes back so."""
        for part in [part for part in followed.numbers if part not in wanted]:
            self._delete(followed, part)
        for part in wanted:
            self._make(followed, part)

    def _make(self, followed: _Followed, part: pyvfio.Extent) -> None:
        if part not in followed.numbers:
            followed.numbers[part] = self._free_number()  # first: `numbers` never has fewer than the kernel
        slot = followed.slot(part)
        self._vm.set_region(slot=slot.number, gpa=slot.gpa, vaddr=slot.vaddr, size=slot.size)

    def _delete(self, followed: _Followed, part: pyvfio.Extent) -> None:
        slot = followed.slot(part)
        try:
            self._vm.set_region(slot=slot.number, gpa=slot.gpa, vaddr=slot.vaddr, size=0)
        except OSError as error:
            if error.errno != errno.EINVAL:  # which of a slot that was set is: there is none (any more)
                raise
        del followed.numbers[part]

    def _free_number(self) -> int:
        taken = {number for followed in self._followed.values() for number in followed.numbers.values()}
        for number in range(self._first_slot, self._vm.slot_count):
            if number not in taken:
                return number
        raise _refusal(
            f"all {self._vm.slot_count - self._first_slot} slots are taken",
            hint="Remove blocks, or populate what is discarded, so that there are fewer runs",
        )

    def _find_place(self, block: pyvfio.RamBlock, size: int) -> Gpa:
        taken = [followed.reserved for followed in self._followed.values()]
        former = self._former.get(block)  # after an undone removal: no address of a block ever moves
        if former is not None and not clip(sorted(taken), former, former + size):
            return former
        for free in without(GUEST_PHYSICAL, *taken):
            start = align_up(free.start, LARGE_PAGE)  # as the block's vaddr is, so that KVM can use large pages
            if start + size <= free.end:
                return Gpa(start)
        raise _refusal(
            f"no {format_size(size)} of guest physical addresses are left for RAM block '{block.idstr}'",
            hint="Choose a smaller max_length, or remove blocks",
        )

    def close(self) -> None:
        """Leave the list of blocks and delete all slots; twice is fine. Raises what deleting them raises, and may be
        called again then."""
        if self._blocks is not None:
            self._blocks.remove_notifier(self)
            self._blocks = None
        for followed in self._followed.values():  # of a block that neither came nor could be taken back
            self._settle(followed, [])
        self._followed.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self) -> None:
        for block, followed in self._followed.items():
            assert sorted(followed.numbers) == list(block.populated), (block, followed)
        numbers = [slot.number for slot in self.slots]
        assert len(set(numbers)) == len(numbers), numbers
        reserved = sorted(followed.reserved for followed in self._followed.values())
        assert all(one.end <= other.start for one, other in pairwise(reserved)), reserved


def _refusal(message: str, *, hint: str) -> pyvfio.IoctlError:
    return pyvfio.IoctlError(errno.ENOSPC, message, request="KVM_SET_USER_MEMORY_REGION", arguments={}, hint=hint)


# ---------------------------------------------------------------------------------------------------------- the program


class Probe(Protocol):
    """Finds out whether the guest has memory at an offset of the block."""

    def __call__(self, block: pyvfio.RamBlock, gpa: Gpa, offset: int) -> bool:
        """Whether it has."""
        ...


def probe_by_cpu(cpu: Vcpu) -> Probe:
    """The guest stores a byte there, which is found in the block or in KVM_EXIT_MMIO."""
    values = chain.from_iterable(iter(lambda: range(1, 256), None))  # never the one before

    def probe(block: pyvfio.RamBlock, gpa: Gpa, offset: int) -> bool:
        value = next(values)
        if cpu.store(gpa + offset, value) is not None:
            return False
        with block.view() as memory:
            return offset < len(memory) and memory[offset] == value

    return probe


def probe_by_slot(vm: Vm) -> Probe:
    """The kernel refuses another slot where one is."""

    def probe(block: pyvfio.RamBlock, gpa: Gpa, offset: int) -> bool:
        page = gpa + offset // pyvfio.PAGE_SIZE * pyvfio.PAGE_SIZE
        try:
            with obstacle(vm, page, block.vaddr):
                return False
        except pyvfio.IoctlError as error:
            if error.errno != errno.EEXIST:
                raise
            return True

    return probe


@contextmanager
def obstacle(vm: Vm, gpa: int, vaddr: int) -> Iterator[None]:
    """The last slot there is has one page at `gpa` meanwhile."""
    number = vm.slot_count - 1
    vm.set_region(slot=number, gpa=gpa, vaddr=vaddr, size=pyvfio.PAGE_SIZE)
    try:
        yield
    finally:
        vm.set_region(slot=number, gpa=gpa, vaddr=vaddr, size=0)


class Story:
    """One block that KVM and VFIO follow, and what is seen of it after each step. `held`: whether all was right."""

    used, maximum = 2 * pyvfio.MIB, 8 * pyvfio.MIB

    def __init__(self, vm: Vm, probes: Sequence[Probe], kernel: FakeKernel, stack: ExitStack) -> None:
        self.vm, self.probes, self.kernel = vm, probes, kernel
        device = stack.enter_context(pyvfio.open_device("0000:00:02.0", kernel=kernel))
        blocks = stack.enter_context(pyvfio.RamBlockList(kernel=kernel))
        self.mapper = stack.enter_context(pyvfio.DmaMapper(device.space, blocks))
        self.slots = stack.enter_context(KvmSlots(vm, blocks))
        self.block = blocks.add("ram", used_length=self.used, max_length=self.maximum)
        self.gpa, self.iova = self.slots.gpa(self.block), self.mapper.iova(self.block)
        self.rows: list[list[str]] = []
        self.held = True

    def tell(self) -> None:
        """All steps."""
        self.look("added")
        for used_length in (4 * pyvfio.MIB, 1 * pyvfio.MIB, 6 * pyvfio.MIB):
            grown = used_length > self.block.used_length
            self.block.resize(used_length)
            self.look("grown" if grown else "shrunk")
        self.kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.ENOMEM)
        self.grow_in_vain(errno.ENOMEM)
        self.look("VFIO refused a grow (ENOMEM)")
        with obstacle(self.vm, self.gpa + self.maximum - pyvfio.PAGE_SIZE, self.block.vaddr):
            self.grow_in_vain(errno.EEXIST)
        self.look("KVM refused a grow (EEXIST)")
        self.block.discard(1 * pyvfio.MIB, 2 * pyvfio.MIB)
        self.look("a part discarded")
        self.block.populate(1 * pyvfio.MIB, 2 * pyvfio.MIB)
        self.look("and populated")
        self.block.resize(0)
        self.look("emptied")

    def grow_in_vain(self, number: int) -> None:
        """To all that the block may have, which is refused with that errno."""
        before = self.block.used_length
        try:
            self.block.resize(self.maximum)
        except pyvfio.IoctlError as error:
            self.held &= error.errno == number
        self.held &= self.block.used_length == before

    def look(self, step: str) -> None:
        """A row of what KVM and VFIO have and what the guest reaches, and whether it is what the block holds."""
        slots = [pyvfio.Extent(slot.gpa - self.gpa, slot.gpa - self.gpa + slot.size) for slot in self.slots.slots]
        mapped = [pyvfio.Extent(m.iova - self.iova, m.iova - self.iova + m.size) for m in self.kernel.mappings()]
        offsets, populated = self.edges(), list(self.block.populated)
        expected = [offset for offset in offsets if clip(populated, offset, offset + 1)]
        found = [[offset for offset in offsets if probe(self.block, self.gpa, offset)] for probe in self.probes]
        right = slots == mapped == populated and all(reached == expected for reached in found)
        right &= (self.slots.gpa(self.block), self.mapper.iova(self.block)) == (self.gpa, self.iova)
        self.held &= right
        counts = [f"{len(reached)} of {len(offsets)}" for reached in found]
        self.rows.append([step, _parts(slots), _parts(mapped), *counts, "ok" if right else "WRONG"])

    def edges(self) -> list[int]:
        """Offsets of the first and last bytes of all that is populated or not."""
        ends = {0, self.maximum, *chain.from_iterable(self.block.populated)}
        return sorted(offset for end in ends for offset in (end - 1, end) if 0 <= offset < self.maximum)


def _parts(parts: Sequence[pyvfio.Extent]) -> str:
    return ", ".join(f"{part.start / pyvfio.MIB:g}-{part.end / pyvfio.MIB:g} MiB" for part in parts)


def start_cpu(vm: Vm, stack: ExitStack) -> Vcpu | None:
    """A CPU that has run once; None, and the reason on stderr, where it does not run."""
    try:
        vcpu = stack.enter_context(Vcpu(vm))
        vcpu.load(CODE)
    except (pyvfio.IoctlError, pyvfio.UnsupportedError) as error:
        complain(NAME, f"no guest is run: {error}")
        return None
    return vcpu


def show(*, execute: bool, kernel: pyvfio.Kernel | None = None) -> int:
    """Tell the story, and say whether it held. Raises what `Vm` does."""
    with ExitStack() as stack:
        vm = stack.enter_context(Vm(kernel))
        vcpu = start_cpu(vm, stack) if execute else None
        probes = [probe_by_slot(vm), *([probe_by_cpu(vcpu)] if vcpu else [])]
        story = Story(vm, probes, stack.enter_context(FakeKernel()), stack)
        print(f"/dev/kvm has {vm.slot_count} slots; the block is at guest physical address {story.gpa:#x}")
        print(f"beside it the fake VFIO kernel, where the block is at IOVA {story.iova:#x}\n")
        story.tell()
    how = ["in a slot", *(["reached by stores"] if vcpu else [])]
    print_table(["step", "slots of /dev/kvm", "mappings of the fake VFIO", *how, ""], story.rows)
    print(f"\n{'Every step held.' if story.held else 'NOT every step held.'}")
    return OK if story.held else FAILED


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="examples/kvm_slots.py",
        description="One RAM block that grows and shrinks, followed by memory slots of /dev/kvm and by a DmaMapper on "
        "the fake VFIO kernel. A virtual CPU stores bytes at the edges of what the block holds.",
    )
    parser.add_argument(
        "--no-run", action="store_true", help="execute nothing: ask the kernel where slots are by setting others"
    )
    options = parser.parse_args(arguments)
    return guard(lambda: show(execute=not options.no_run), name=NAME)


if __name__ == "__main__":
    raise SystemExit(main())
