"""A virtual machine of `/dev/kvm` that has memory slots, and a virtual CPU in it that stores and loads single bytes.

The CPU runs two instructions in flat protected mode, without paging, so that the address in its register is the guest
physical address: `mov [ebx], al; hlt`. Where a slot is, the byte lands in the memory of this process; where none is,
KVM_RUN returns KVM_EXIT_MMIO with it, and nothing is written.

Source: linux/kvm.h; Documentation/virt/kvm/api.rst of Linux; `kvm_set_memory_region` in virt/kvm/kvm_main.c.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NewType

import kvm_ioctls
import pyvfio
from kvm_ioctls import kvm_regs, kvm_run, kvm_segment, kvm_sregs, kvm_userspace_memory_region
from pyvfio.handle import Handle
from pyvfio.kernel import IoctlArgument

Gpa = NewType("Gpa", int)
"""An address as the guest uses it, without paging (guest physical address)."""

DEV_KVM = "/dev/kvm"
TSS = 0xFFFB_D000  # three pages that Intel's real mode needs; where QEMU and the kernel's own tests have them
CODE = Gpa(0x1000)
PROGRAM = b"\x88\x03\xf4\x8a\x03\xf4"  # mov [ebx], al; hlt │ mov al, [ebx]; hlt
STORE, LOAD = Gpa(CODE), Gpa(CODE + 3)
READ_WRITE, SHARED, PRIVATE = 3, 1, 0x22  # mmap(2): PROT_READ | PROT_WRITE; MAP_SHARED; MAP_PRIVATE | MAP_ANONYMOUS
PROTECTED_MODE = 1  # CR0.PE
FLAGS = 2  # the one bit of RFLAGS that is always set
NOTHING_THERE = 0xFF  # what a load reads where there is no memory, as from a bus that nobody drives

HINTS = {
    ("KVM_SET_USER_MEMORY_REGION", errno.EEXIST): "Another slot has some of these guest physical addresses",
    ("KVM_SET_USER_MEMORY_REGION", errno.EINVAL): "A slot changes its size only by being deleted, with a size of 0, "
    "and made anew; sizes and addresses are multiples of the page size",
    ("KVM_SET_USER_MEMORY_REGION", errno.EIO): "A virtual machine belongs to the process that made it",
    ("KVM_RUN", errno.EFAULT): "A slot says that there is memory, and this process has none there",
}


def request(handle: Handle, name: str, argument: IoctlArgument = 0, **given: int) -> int:
    """Make the request that linux/kvm.h calls `name`. IoctlError with `given` and a hint."""
    number: int = vars(kvm_ioctls)[name]
    try:
        return handle.kernel.ioctl(handle.fd, number, argument)
    except OSError as error:
        hint = HINTS.get((name, error.errno or 0), "")
        raise pyvfio.IoctlError.of(error, f"{error.strerror}", request=name, arguments=given, hint=hint) from error


def open_kvm(kernel: pyvfio.Kernel) -> Handle:
    """`/dev/kvm`. UnavailableError where there is none, AccessDeniedError where it is not for this user."""
    try:
        return Handle(kernel, kernel.open(DEV_KVM, os.O_RDWR), DEV_KVM)
    except PermissionError as error:
        raise pyvfio.AccessDeniedError(DEV_KVM, hint="Be root, or in the group that `ls -l` shows") from error
    except OSError as error:
        raise pyvfio.UnavailableError(
            f"{DEV_KVM} cannot be opened: {error.strerror}",
            hint="Load kvm_intel or kvm_amd; in a virtual machine, the host must allow it to have its own",
        ) from error


class Vm(Handle):
    """A virtual machine without memory or CPU. `slot_count`: slots are numbered from 0 to one below it.

    Raises UnavailableError, AccessDeniedError, UnsupportedError (another API, or a kernel that lacks what slots need).
    Synchronization: the kernel's own.
    """

    def __init__(self, kernel: pyvfio.Kernel | None = None) -> None:
        with open_kvm(kernel or pyvfio.LinuxKernel()) as kvm:
            self._check(kvm)
            self.slot_count = request(kvm, "KVM_CHECK_EXTENSION", kvm_ioctls.KVM_CAP_NR_MEMSLOTS)
            self.vcpu_mmap_size = request(kvm, "KVM_GET_VCPU_MMAP_SIZE")
            super().__init__(kvm.kernel, request(kvm, "KVM_CREATE_VM"), "the virtual machine")

    @staticmethod
    def _check(kvm: Handle) -> None:
        version = request(kvm, "KVM_GET_API_VERSION")
        if version != kvm_ioctls.KVM_API_VERSION:
            raise pyvfio.UnsupportedError(f"KVM has API version {version}, not {kvm_ioctls.KVM_API_VERSION}")
        # SYNC_MMU: what munmap(2), madvise(2) and the like take from this process, they take from the guest as well.
        for name in ("KVM_CAP_USER_MEMORY", "KVM_CAP_SYNC_MMU", "KVM_CAP_DESTROY_MEMORY_REGION_WORKS"):
            if not request(kvm, "KVM_CHECK_EXTENSION", vars(kvm_ioctls)[name]):
                raise pyvfio.UnsupportedError(f"This KVM has no {name}")

    def set_region(self, *, slot: int, gpa: int, vaddr: int, size: int) -> None:
        """Make a slot, or delete it with a size of 0. IoctlError: EEXIST where another slot is in the way; EINVAL when
        it has another size or vaddr, or when there is none to delete. What it is already, it stays."""
        region = kvm_userspace_memory_region(slot=slot, guest_phys_addr=gpa, memory_size=size, userspace_addr=vaddr)
        request(self, "KVM_SET_USER_MEMORY_REGION", region, slot=slot, gpa=gpa, vaddr=vaddr, size=size)


@dataclass(frozen=True, slots=True)
class Mmio:
    """An access of the guest that found no memory: where, what it stored (None: it was a load)."""

    gpa: int
    stored: bytes | None


class Vcpu(Handle):
    """The one virtual CPU of `vm`, with a page of code in `slot` at guest physical address 0x1000.

    Raises IoctlError where it cannot be made, and UnsupportedError once it is to run where KVM cannot run it.
    Synchronization: none. Close it before its machine.
    """

    def __init__(self, vm: Vm, *, slot: int = 0) -> None:
        request(vm, "KVM_SET_TSS_ADDR", TSS, gpa=TSS)  # before the CPU: KVM on Intel without unrestricted guests
        super().__init__(vm.kernel, request(vm, "KVM_CREATE_VCPU", 0, id=0), "the virtual CPU")
        self._vm, self._slot = vm, slot
        with ExitStack() as undo:
            undo.callback(super().close_fd)
            self._run = kvm_run.from_address(self._map(undo, vm.vcpu_mmap_size, SHARED, self.fd))
            self._code = self._map(undo, pyvfio.PAGE_SIZE, PRIVATE, -1)
            ctypes.memmove(self._code, PROGRAM, len(PROGRAM))
            vm.set_region(slot=slot, gpa=CODE, vaddr=self._code, size=pyvfio.PAGE_SIZE)
            undo.callback(self._delete_code)
            self._enter_protected_mode()
            self._tear_down = undo.pop_all()

    def _map(self, undo: ExitStack, size: int, flags: int, fd: int) -> int:
        vaddr = self.kernel.mmap(0, size, READ_WRITE, flags, fd=fd)
        undo.callback(self.kernel.munmap, vaddr, size)
        return vaddr

    def _delete_code(self) -> None:
        if not self._vm.closed:
            self._vm.set_region(slot=self._slot, gpa=CODE, vaddr=self._code, size=0)

    def close_fd(self) -> None:
        self._tear_down.close()

    def _enter_protected_mode(self) -> None:
        """All segments flat: from 0, 4 GiB long, 32 bits wide."""
        special = kvm_sregs()
        request(self, "KVM_GET_SREGS", special)
        special.cr0 |= PROTECTED_MODE
        for number, name in enumerate(("cs", "ds", "es", "fs", "gs", "ss")):
            segment: kvm_segment = getattr(special, name)
            segment.base, segment.limit, segment.g, segment.db = 0, 0xFFFF_FFFF, 1, 1
            segment.selector, segment.type = (8, 11) if number == 0 else (16, 3)  # code │ data, both accessed
        request(self, "KVM_SET_SREGS", special)

    def store(self, gpa: int, value: int) -> Mmio | None:
        """Let the guest store a byte: None when it reached memory, else what it was told to emulate."""
        return next(iter(self._execute(STORE, gpa, value)), None)

    def load(self, gpa: int) -> int | Mmio:
        """Let the guest load a byte."""
        accesses = self._execute(LOAD, gpa, 0)
        return accesses[0] if accesses else self._registers().rax & 0xFF

    def _registers(self) -> kvm_regs:
        registers = kvm_regs()
        request(self, "KVM_GET_REGS", registers)
        return registers

    def _execute(self, code: Gpa, gpa: int, value: int) -> Sequence[Mmio]:
        """Until the guest halts: what found no memory meanwhile. IoctlError (EFAULT): a slot without memory."""
        if not 0 <= gpa < 1 << 32:
            raise ValueError(f"a CPU in protected mode without paging reaches 4 GiB, not {gpa:#x}")
        request(self, "KVM_SET_REGS", kvm_regs(rax=value, rbx=gpa, rip=code, rflags=FLAGS))
        accesses: list[Mmio] = []
        while (reason := self._enter()) == kvm_ioctls.KVM_EXIT_MMIO:
            accesses.append(self._emulate())
        if reason != kvm_ioctls.KVM_EXIT_HLT:
            raise pyvfio.UnsupportedError(
                f"KVM_RUN ended with exit reason {reason}, not KVM_EXIT_HLT",
                hint="This KVM cannot run a CPU in protected mode without paging",
            )
        return accesses

    def _enter(self) -> int:
        while True:
            try:
                request(self, "KVM_RUN")
            except pyvfio.IoctlError as error:
                if error.errno != errno.EINTR:  # a signal, whose handler has run by now
                    raise
            else:
                return self._run.exit_reason

    def _emulate(self) -> Mmio:
        mmio = self._run.mmio
        if mmio.is_write:
            return Mmio(mmio.phys_addr, bytes(mmio.data[: mmio.len]))
        mmio.data[0] = NOTHING_THERE
        return Mmio(mmio.phys_addr, None)
