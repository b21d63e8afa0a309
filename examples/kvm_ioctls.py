"""`<linux/kvm.h>` in its own names, as far as memory slots and a virtual CPU of x86-64 that stores a byte need it.

Source: include/uapi/linux/kvm.h and arch/x86/include/uapi/asm/kvm.h. The test of the example holds every number, size
and offset to what the C compiler reads there.
"""

from __future__ import annotations

import ctypes

import ioctl_opt

KVM_API_VERSION = 12
KVMIO = 0xAE


class kvm_userspace_memory_region(ctypes.Structure):
    """A slot: `memory_size` bytes of this process from `userspace_addr` on, as the guest sees them."""

    slot: int
    flags: int
    guest_phys_addr: int
    memory_size: int
    userspace_addr: int
    _fields_ = [
        ("slot", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("guest_phys_addr", ctypes.c_uint64),
        ("memory_size", ctypes.c_uint64),
        ("userspace_addr", ctypes.c_uint64),
    ]


class kvm_regs(ctypes.Structure):
    """The general registers."""

    rax: int
    rbx: int
    rip: int
    rflags: int
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
            *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"),
        )
    ]


class kvm_segment(ctypes.Structure):
    """A segment register and what it has loaded."""

    base: int
    limit: int
    selector: int
    type: int
    db: int
    g: int
    _fields_ = [
        ("base", ctypes.c_uint64),
        ("limit", ctypes.c_uint32),
        ("selector", ctypes.c_uint16),
        *((name, ctypes.c_uint8) for name in ("type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable")),
        ("padding", ctypes.c_uint8),
    ]


class kvm_dtable(ctypes.Structure):
    """GDTR or IDTR."""

    _fields_ = [("base", ctypes.c_uint64), ("limit", ctypes.c_uint16), ("padding", ctypes.c_uint16 * 3)]


class kvm_sregs(ctypes.Structure):
    """The registers that a system sets up."""

    cs: kvm_segment
    cr0: int
    _fields_ = [
        *((name, kvm_segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        *((name, kvm_dtable) for name in ("gdt", "idt")),
        *((name, ctypes.c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", ctypes.c_uint64 * 4),
    ]


class kvm_run_mmio(ctypes.Structure):
    """`mmio` of kvm_run's union: an access that found no memory."""

    phys_addr: int
    data: ctypes.Array[ctypes.c_uint8]
    len: int
    is_write: int
    _fields_ = [
        ("phys_addr", ctypes.c_uint64),
        ("data", ctypes.c_uint8 * 8),
        ("len", ctypes.c_uint32),
        ("is_write", ctypes.c_uint8),
    ]


class kvm_run(ctypes.Structure):
    """The beginning of what a virtual CPU shares with its user; the union is longer."""

    exit_reason: int
    mmio: kvm_run_mmio
    _fields_ = [
        ("request_interrupt_window", ctypes.c_uint8),
        ("immediate_exit", ctypes.c_uint8),
        ("padding1", ctypes.c_uint8 * 6),
        ("exit_reason", ctypes.c_uint32),
        ("ready_for_interrupt_injection", ctypes.c_uint8),
        ("if_flag", ctypes.c_uint8),
        ("flags", ctypes.c_uint16),
        ("cr8", ctypes.c_uint64),
        ("apic_base", ctypes.c_uint64),
        ("mmio", kvm_run_mmio),
    ]


# --- /dev/kvm
KVM_GET_API_VERSION = int(ioctl_opt.IO(KVMIO, 0x00))
KVM_CREATE_VM = int(ioctl_opt.IO(KVMIO, 0x01))
KVM_CHECK_EXTENSION = int(ioctl_opt.IO(KVMIO, 0x03))
KVM_GET_VCPU_MMAP_SIZE = int(ioctl_opt.IO(KVMIO, 0x04))

# --- a virtual machine
KVM_CREATE_VCPU = int(ioctl_opt.IO(KVMIO, 0x41))
KVM_SET_USER_MEMORY_REGION = int(ioctl_opt.IOW(KVMIO, 0x46, kvm_userspace_memory_region))
KVM_SET_TSS_ADDR = int(ioctl_opt.IO(KVMIO, 0x47))

# --- a virtual CPU
KVM_RUN = int(ioctl_opt.IO(KVMIO, 0x80))
KVM_GET_REGS = int(ioctl_opt.IOR(KVMIO, 0x81, kvm_regs))
KVM_SET_REGS = int(ioctl_opt.IOW(KVMIO, 0x82, kvm_regs))
KVM_GET_SREGS = int(ioctl_opt.IOR(KVMIO, 0x83, kvm_sregs))
KVM_SET_SREGS = int(ioctl_opt.IOW(KVMIO, 0x84, kvm_sregs))

# --- what KVM_CHECK_EXTENSION is asked
KVM_CAP_USER_MEMORY = 3
KVM_CAP_NR_MEMSLOTS = 10
KVM_CAP_SYNC_MMU = 16
KVM_CAP_DESTROY_MEMORY_REGION_WORKS = 21

# --- why KVM_RUN returned
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
