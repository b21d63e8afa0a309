"""Runs a command on a real kernel in a virtual machine that has an IOMMU and two devices which do DMA.

The machine is QEMU's, emulated without KVM, so that any x86-64 machine will do and no privilege is needed. Its user
space is the caller's: the same root file system, read-only below an overlay in memory, the same paths and the same
current directory; only the kernel differs. So a driver's test in a virtual environment runs in it as it is::

    from pyvfio.testing import vm

    result = vm.run([sys.executable, "-m", "pytest", "tests/hw"], kernel="6.12", iommu="intel", timeout=300)
    assert result.status == 0, result.stdout

The command is root in the machine, its stdin is empty, there is no network. ``/dev/vfio/vfio`` exists, and two ``edu``
devices (1234:11e8), each a group of its own, have no driver; :data:`DEVICES` has other lists. What the command writes
to any file is gone with the machine; what it writes to stdout and stderr comes out as it comes.
"""

import contextlib
import logging
import os
import re
import secrets
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from pyvfio.testing import initramfs
from pyvfio.testing.kernels import GuestKernel, cache_directory, find_kernel, in_use
from pyvfio.testing.vm_errors import (
    KernelUnavailableError,
    MissingToolError,
    VmError,
    VmLostError,
    VmTimeoutError,
    find_tool,
)

__all__ = [
    "DEVICES",
    "DISKS",
    "IOMMUS",
    "KernelUnavailableError",
    "MissingToolError",
    "VmError",
    "VmLostError",
    "VmResult",
    "VmTimeoutError",
    "guest_environment",
    "run",
]

_logger = logging.getLogger(__name__)

BOOT_SECONDS = 600
"""A machine that has not reached user space after this many seconds hangs: it takes about ten seconds, and about a
minute where the host is slow and busy."""

PASSED_VARIABLES = ("PATH", "HOME", "LANG", "TERM", "CI")
"""The environment variables that a command gets from the caller unless told otherwise."""


@dataclass(frozen=True)
class Iommu:
    """An IOMMU that QEMU emulates. ``unsafe_interrupts``: it remaps no interrupts, so VFIO has to be told."""

    device: str
    parameters: str = ""
    unsafe_interrupts: bool = False


IOMMUS: Mapping[str, Iommu] = {
    "intel": Iommu("intel-iommu,intremap=on,caching-mode=on", "intel_iommu=on"),
    "intel48": Iommu("intel-iommu,intremap=on,caching-mode=on,aw-bits=48", "intel_iommu=on"),
    "amd": Iommu("amd-iommu", "", unsafe_interrupts=True),
    "virtio": Iommu("virtio-iommu-pci", "", unsafe_interrupts=True),
}
"""39 bits of IOVA, 48 bits, 64 bits with a hole below 2^40, and 64 bits."""

# "max" has what slows the emulation down: five levels of page tables, a twentieth; and "rep movsb" and "rep stosb" as
# the fast way to copy and to zero, which the emulation does byte by byte, so that a page is zeroed in twice the time.
_CPU = "max,la57=off,erms=off,fsrm=off"

# Without the mask edu cuts addresses to 28 bits and silently reads from elsewhere.
_EDU = ("edu,dma_mask=0xffffffffffffffff",) * 2

DEVICES: Mapping[str, Sequence[str]] = {
    "edu": _EDU,
    "contract": (
        *_EDU,
        "nec-usb-xhci",
        "pci-testdev,multifunction=on,addr=10.0",
        "pci-testdev,addr=10.1,membar=128M",
        "pcie-pci-bridge,id=bridge,addr=11",
        "pci-testdev,bus=bridge,addr=1",
        "virtio-rng-pci,bus=bridge,addr=2",
        "pcie-root-port,id=above,addr=12,disable-acs=on,x-speed=2_5,x-width=1",
        "e1000e,bus=above,romfile=",
        "pcie-root-port,id=socket,addr=13,chassis=1",
        "rtl8139,bus=socket,romfile=",
        "nvme-subsys,id=functions,nqn=pyvfio",
        "pcie-root-port,id=beside,addr=14,chassis=2",
        "nvme,serial=pyvfio,bus=beside,subsys=functions,sriov_max_vfs=2,sriov_vq_flexible=4,sriov_vi_flexible=2",
    ),
    "virtio-rng": (*_EDU, "virtio-rng-pci,disable-legacy=on,iommu_platform=on,max-bytes=4096,period=100"),
    "nvme": (
        *_EDU,
        "nvme-subsys,id=subsystem,nqn=pyvfio",
        "pcie-root-port,id=above,addr=10",
        "nvme,id=controller,bus=above,serial=pyvfio,subsys=subsystem,max_ioqpairs=6,msix_qsize=7,"
        "sriov_max_vfs=2,sriov_vq_flexible=4,sriov_vi_flexible=2",
        "nvme-ns,drive=disk,bus=controller,nsid=1",
    ),
}
"""Lists of QEMU's devices. ``edu``: two of them, each a group of its own. ``contract``, for ``tests/contract``, begins
with these, and goes on with

* ``nec-usb-xhci`` (1033:0194): 16 vectors of MSI and of MSI-X, no reset, a group of its own;
* two functions of one ``pci-testdev`` (1b36:0005), which share a group: a page of memory and I/O ports each, and
  128 MiB of memory the second;
* a conventional bridge, with a ``pci-testdev`` and a ``virtio-rng`` (1af4:1005) behind it, all three one group that the
  driver of the last keeps from being viable;
* an ``e1000e`` (8086:10d3), which can be reset, in one group with the root port above it;
* an ``rtl8139`` (10ec:8139) below another root port, which can be taken out of its slot: 256 bytes of memory in a page
  of their own;
* an ``nvme`` (1b36:0010) without a disk, which makes up to two virtual functions, below a root port of its own.

The ``virtio-rng`` and the root ports come with the kernel's drivers, the others with none.

``virtio-rng``, for ``examples/virtio_rng.py``, begins with these, and has a ``virtio-rng`` (1af4:1044) of virtio 1.x
behind the IOMMU, in a group of its own and with the kernel's driver. It is slow, 4096 bytes in 100 ms, so that a driver
has requests in flight.

``nvme``, for ``examples/nvme.py``, begins with these, and goes on with an ``nvme`` (1b36:0010) in a group of its own
below a root port. No driver is bound to it, since the machine does not load the kernel's. It has one namespace of
512-byte blocks, on the disk that :data:`DISKS` describes, and two virtual functions that a driver can enable."""


@dataclass(frozen=True)
class Disk:
    """A disk of one machine: ``size`` bytes, all zero at the start. It completes at most ``iops`` commands a second, so
    that a driver has commands in flight."""

    size: int
    iops: int


DISKS: Mapping[str, Disk] = {"nvme": Disk(16 << 20, iops=40)}
"""The disk of a list of devices, which refer to it by ``drive=disk``. The disk is memory without a name in any file
system, so that nothing of it is left when the machine ends."""


@dataclass(frozen=True)
class VmResult:
    """How a command ended; a snapshot.

    ``status`` is the exit status as a shell has it, 128+n for death by signal n. ``stdout`` and ``stderr`` are empty
    where a file was given. ``seconds_to_user_space`` is from the start of QEMU to the start of the command, ``seconds``
    to its end, both of wall time.
    """

    status: int
    stdout: bytes
    stderr: bytes
    kernel_release: str
    log: str
    seconds_to_user_space: float
    seconds: float


@dataclass(frozen=True)
class Machine:
    """What a machine is made of, but its kernel."""

    iommu: str
    memory: str
    cpus: int
    icount: bool
    devices: str = "edu"
    qemu_args: tuple[str, ...] = ()


def guest_environment(host: Mapping[str, str], added: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of the command: :data:`PASSED_VARIABLES` of the host's, and what is added."""
    passed = {name: host[name] for name in PASSED_VARIABLES if name in host}
    return {"PATH": os.defpath, "HOME": "/root", **passed, **(added or {})}


def run(
    command: Sequence[str],
    *,
    kernel: str = "6.12",
    iommu: str = "intel",
    devices: str = "edu",
    memory: str = "2G",
    cpus: int = 1,
    icount: bool = False,
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
    qemu_args: Sequence[str] = (),
    cwd: str | os.PathLike[str] | None = None,
    stdout: BinaryIO | None = None,
    stderr: BinaryIO | None = None,
    modules: Path | None = None,
    cache: Path | None = None,
    update: bool = False,
) -> VmResult:
    """Boots a kernel, runs a command on it, and returns how that ended.

    Costs about ten seconds before the command starts, and a minute once per kernel to fetch it. The command runs some
    twenty times slower than on the host. Needs qemu-system-x86 and busybox-static; and kmod, to fetch a kernel.

    Synchronization: may be called from several threads and processes at once; each call is a machine of its own, and
    nothing but the cache is shared. The machine ends with the call, also by an exception or a signal.

    :param kernel: a name of :data:`pyvfio.testing.kernels.LINES` or the path of a bzImage.
    :param iommu: a name of :data:`IOMMUS`. The kernels 6.1 have no driver for ``virtio``.
    :param devices: a name of :data:`DEVICES`.
    :param memory: as QEMU has it: ``512M``, ``2G``.
    :param icount: the machine's clock counts instructions, so that timings repeat; takes about twice as long.
    :param timeout: seconds of wall time from the start of the machine to the end of the command; None for no limit.
    :param env: environment variables besides :data:`PASSED_VARIABLES`.
    :param stdout: what the command's stdout is written to as it comes, likewise ``stderr``; None to have it returned.
    :param modules: for a kernel of one's own, see :func:`pyvfio.testing.kernels.find_kernel`.
    :raises ValueError: arguments that can never be right.
    :raises VmLostError: the kernel panicked or oopsed, or QEMU ended; ``log`` says more.
    :raises VmTimeoutError: the time was over, or the machine did not come to user space.
    :raises KernelUnavailableError: no such kernel.
    :raises MissingToolError: a program is missing.
    """
    machine = Machine(iommu, memory, cpus, icount, devices, tuple(qemu_args))
    check_arguments(command, kernel, machine, timeout)
    qemu = find_tool("qemu-system-x86_64", package="qemu-system-x86")
    cache = cache_directory() if cache is None else cache
    guest = find_kernel(kernel, cache=cache, modules=modules, update=update)
    token = secrets.token_hex(16)
    settings = {
        "unsafe_interrupts": "1" if IOMMUS[iommu].unsafe_interrupts else "",
        "modules": str(guest.modules or ""),
    }
    with in_use(guest):
        second = initramfs.command_archive(
            command,
            cwd=os.path.abspath(cwd or os.getcwd()),
            environ=guest_environment(os.environ, env),
            token=token,
            settings=settings,
        )
        image = initramfs.image_of(guest, cache=cache) + second
        with _Running(qemu, machine, guest, image) as running:
            return _Session(running, token.encode(), stdout, stderr, timeout).result()


def check_arguments(command: Sequence[str], kernel: str, machine: Machine, timeout: float | None) -> None:
    """:raises ValueError: says which argument can never be right."""
    if isinstance(command, str) or not command:
        raise ValueError("the command is a sequence of at least one word")
    if any("\0" in word for word in command):
        raise ValueError("no word of a command may have a zero byte in it")
    if machine.iommu not in IOMMUS:
        raise ValueError(f"no IOMMU is named {machine.iommu!r}; there are {', '.join(IOMMUS)}")
    if machine.devices not in DEVICES:
        raise ValueError(f"no list of devices is named {machine.devices!r}; there are {', '.join(DEVICES)}")
    if machine.iommu == "virtio" and kernel == "6.1":
        raise ValueError("the distribution's kernels 6.1 have no driver for the virtio IOMMU; 6.12 has")
    if not re.fullmatch(r"[1-9]\d*[MG]", machine.memory):
        raise ValueError(f"the memory size {machine.memory!r} is not a number of M or G")
    if machine.cpus < 1:
        raise ValueError(f"{machine.cpus} is no number of processors")
    if timeout is not None and timeout <= 0:
        raise ValueError(f"a time-out of {timeout} seconds leaves no time")


def qemu_command(
    qemu: str,
    machine: Machine,
    image: Path,
    *,
    initrd: str,
    log: str,
    streams: Sequence[int],
    disk: str = "",
) -> list[str]:
    """QEMU's command line. ``streams`` are the sockets of stdout, stderr and status; ``log`` is the kernel's log;
    ``disk`` is the file of the machine's disk, where its devices have one."""
    iommu = IOMMUS[machine.iommu]
    devices: list[str] = [iommu.device, "virtio-serial-pci"]
    words = [qemu, "-machine", "q35,kernel-irqchip=split", "-accel", "tcg", "-cpu", _CPU]
    words += ["-m", machine.memory, "-smp", str(machine.cpus)]
    words += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    if machine.icount:
        words += ["-icount", "shift=0,sleep=off"]
    words += ["-kernel", str(image), "-initrd", initrd, "-append", kernel_parameters(iommu)]
    words += ["-chardev", f"file,id=log,path={log}", "-serial", "chardev:log"]
    words += ["-virtfs", "local,path=/,mount_tag=hostroot,security_model=none,readonly=on,multidevs=remap"]
    for name, descriptor in zip(("stdout", "stderr", "status"), streams, strict=True):
        words += ["-chardev", f"socket,id={name},fd={descriptor}"]
        devices.append(f"virtserialport,chardev={name},name=pyvfio.{name}")
    if machine.devices in DISKS:
        words += _disk_words(disk, DISKS[machine.devices])
    devices += DEVICES[machine.devices]
    for device in devices:
        words += ["-device", device]
    return [*words, *machine.qemu_args]


def _disk_words(file: str, disk: Disk) -> list[str]:
    # Only this machine has the file open, so that there is nobody to lock it against.
    return [
        *("-object", f"throttle-group,id=pace,x-iops-total={disk.iops}"),
        *("-blockdev", f"driver=file,node-name=file,filename={file},locking=off"),
        *("-blockdev", "driver=throttle,node-name=disk,throttle-group=pace,file=file"),
    ]


def kernel_parameters(iommu: Iommu) -> str:
    """The kernel's command line."""
    # The timer check fails now and then on a busy host. panic=-1 reboots at once, and -no-reboot ends QEMU then.
    words = ["console=ttyS0", "loglevel=5", "panic=-1", "oops=panic", "iommu=nopt", iommu.parameters]
    words += ["no_timer_check", "tsc=reliable", "nokaslr", "mitigations=off", "audit=0", "cryptomgr.notests"]
    return " ".join(filter(None, words))


class _Running:
    """A QEMU process with its streams; leaving the context ends it. Owned by one thread."""

    def __init__(self, qemu: str, machine: Machine, guest: GuestKernel, initrd: bytes) -> None:
        self.guest = guest
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            # Nothing has a name in the file system, so that nothing is left behind even when this process is killed.
            self._log = self._memory(stack, "kernel-log", b"")
            self._complaints = self._memory(stack, "qemu-stderr", b"")
            ramdisk = self._memory(stack, "initramfs", initrd)
            sizes = [DISKS[name].size for name in DISKS if name == machine.devices]
            disks = [self._memory(stack, "disk", b"", size=size) for size in sizes]
            pairs = [socket.socketpair() for _ in range(3)]
            for pair in pairs:
                for end in pair:
                    stack.callback(end.close)
            self.streams = [ours for ours, _ in pairs]
            theirs = [end.fileno() for _, end in pairs]
            words = qemu_command(
                qemu,
                machine,
                guest.image,
                initrd=f"/dev/fd/{ramdisk}",
                log=f"/dev/fd/{self._log}",
                streams=theirs,
                disk="".join(f"/dev/fd/{disk}" for disk in disks),
            )
            # Killed with this process, whatever ends that.
            words = [find_tool("setpriv", package="util-linux"), "--pdeathsig", "KILL", "--", *words]
            self.started = time.monotonic()
            self.process = subprocess.Popen(  # noqa: S603 - no shell sees the words
                words,
                stdin=subprocess.DEVNULL,
                stdout=self._complaints,
                stderr=self._complaints,
                pass_fds=[self._log, ramdisk, *disks, *theirs],
                start_new_session=True,  # the terminal's Ctrl-C is for us to act on
            )
            stack.callback(self._end)
            for _, end in pairs:
                end.close()
            self.exited = os.pidfd_open(self.process.pid)
            stack.callback(os.close, self.exited)
            self._stack = stack.pop_all()

    @staticmethod
    def _memory(stack: contextlib.ExitStack, name: str, data: bytes, *, size: int = 0) -> int:
        descriptor = os.memfd_create(name)
        stack.callback(os.close, descriptor)
        os.ftruncate(descriptor, size)
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        return descriptor

    def __enter__(self) -> "_Running":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def log(self) -> str:
        return self._text(self._log)

    def complaints(self) -> str:
        return self._text(self._complaints).strip()

    @staticmethod
    def _text(descriptor: int) -> str:
        data = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        return data.decode("utf-8", "replace").replace("\r\n", "\n")


@dataclass
class Stream:
    """Takes a stream apart from the mark at its end; pure.

    A write to a port returns before the host has the bytes, so the status may overtake them: only the mark says that
    all are here.
    """

    mark: bytes
    ended: bool = False
    _held: bytes = field(default=b"", repr=False)

    def feed(self, data: bytes) -> bytes:
        """What of the stream is certain to come before the mark."""
        data = self._held + data
        if data.endswith(self.mark):
            self.ended, self._held = True, b""
            return data[: -len(self.mark)]
        longest = min(len(self.mark) - 1, len(data))
        held = next((n for n in range(longest, 0, -1) if self.mark.startswith(data[-n:])), 0)
        self._held = data[len(data) - held :]
        return data[: len(data) - held]


class _Session:
    """From the start of a machine to the end of its command."""

    def __init__(
        self, running: _Running, token: bytes, stdout: BinaryIO | None, stderr: BinaryIO | None, timeout: float | None
    ) -> None:
        self._running = running
        self._timeout = timeout
        self._captured = (bytearray(), bytearray())
        self._streams = (Stream(token), Stream(token))
        self._sinks = [sink(file, kept) for file, kept in zip((stdout, stderr), self._captured, strict=True)]
        self._words = b""
        self._up: float | None = None
        self._release = ""
        self._status: int | None = None

    def result(self) -> VmResult:
        with selectors.DefaultSelector() as selector:
            for stream, act in zip(self._running.streams, (self._output, self._errors, self._report), strict=True):
                selector.register(stream, selectors.EVENT_READ, act)
            selector.register(self._running.exited, selectors.EVENT_READ)
            while not self._complete():
                ready = [key for key, _ in selector.select(self._seconds_left())]
                streams = [key for key in ready if key.fileobj != self._running.exited]
                if ready and not streams:  # what a lost machine has said is read to its end before it is called lost
                    raise self._lost()
                for key in streams:
                    self._read(selector, key)
                self._check_time()
        return self._ended()

    def _ended(self) -> VmResult:
        seconds = self._running.seconds()
        return VmResult(
            status=self._status or 0,
            stdout=bytes(self._captured[0]),
            stderr=bytes(self._captured[1]),
            kernel_release=self._release,
            log=self._running.log(),
            seconds_to_user_space=seconds if self._up is None else self._up,
            seconds=seconds,
        )

    def _complete(self) -> bool:
        return self._status is not None and all(stream.ended for stream in self._streams)

    def _read(self, selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
        file, act = key.fileobj, key.data
        if not isinstance(file, socket.socket):
            return
        try:
            data = file.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        if data:
            act(data)
        else:
            selector.unregister(file)

    def _output(self, data: bytes) -> None:
        self._sinks[0](self._streams[0].feed(data))

    def _errors(self, data: bytes) -> None:
        self._sinks[1](self._streams[1].feed(data))

    def _report(self, data: bytes) -> None:
        *lines, self._words = (self._words + data).split(b"\n")
        for line in lines:
            word, _, value = line.decode("ascii", "replace").partition(" ")
            if word == "up":
                self._up, self._release = self._running.seconds(), value
            elif word == "exit" and value.isdigit():
                self._status = int(value)

    def _limit(self) -> float | None:
        limits = [] if self._timeout is None else [self._timeout]
        if self._up is None:
            limits.append(BOOT_SECONDS)
        return min(limits, default=None)

    def _seconds_left(self) -> float | None:
        limit = self._limit()
        return None if limit is None else max(0.0, limit - self._running.seconds())

    def _check_time(self) -> None:
        limit = self._limit()
        if limit is not None and self._running.seconds() >= limit and not self._complete():
            where = "the command was not over" if self._up is not None else "there was no user space"
            raise VmTimeoutError(f"{where} {limit:g} seconds after the start of the machine", log=self._running.log())

    def _lost(self) -> VmLostError:
        status = self._running.process.wait()
        log, complaints = self._running.log(), self._running.complaints()
        panicked = has_panicked(log)
        if panicked:
            return VmLostError("the kernel panicked", panicked=True, log=log)
        how = f"by signal {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        return VmLostError(
            f"the machine was lost: QEMU ended {how}{': ' if complaints else ''}{complaints}", panicked=False, log=log
        )


def has_panicked(log: str) -> bool:
    """Whether a kernel's log tells of a panic or an oops."""
    return re.search(r"Kernel panic - not syncing|\bOops: ", log) is not None


def sink(file: BinaryIO | None, kept: bytearray) -> Callable[[bytes], None]:
    """Where a stream goes: to the file at once, or into the buffer when there is no file."""
    if file is None:
        return kept.extend

    def write(data: bytes) -> None:
        if data:
            file.write(data)
            file.flush()

    return write
