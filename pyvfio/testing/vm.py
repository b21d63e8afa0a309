"""Run a command on a real kernel in a virtual machine with an IOMMU and two devices that do DMA.

The machine is QEMU's, and needs no privilege. KVM is used where a probe boot under KVM has succeeded, else emulation.
The user space of the machine is the caller's: the same root file system, read-only below an overlay in memory, the same
paths and the same current directory. Only the kernel differs. So the tests of a driver in a virtual environment run in
the machine unchanged::

    from pyvfio.testing import vm

    result = vm.run([sys.executable, "-m", "pytest", "tests/hw"], kernel="6.12", iommu="intel", timeout=300)
    assert result.status == 0, result.stdout

The command is root in the machine. The command's stdin is empty, and there is no network. ``/dev/vfio/vfio`` exists.
Two ``edu`` devices (1234:11e8), each an IOMMU group alone, are bound to no driver; :data:`DEVICES` has other lists.
Files that the command writes are discarded with the machine. Stdout and stderr are passed on at once.
"""

import contextlib
import functools
import os
import re
import secrets
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from pyvfio.guard import constructing
from pyvfio.testing import accel as accels
from pyvfio.testing import initramfs
from pyvfio.testing.kernels import GuestKernel, cache_directory, find_kernel, in_use
from pyvfio.testing.vm_errors import (
    KernelUnavailableError,
    KvmUnavailableError,
    MissingToolError,
    VmError,
    VmLostError,
    VmTimeoutError,
    find_tool,
)
from pyvfio.testing.vm_machine import DEVICES, DISKS, IOMMU_CHOICES, IOMMUS, NO_IOMMU, Machine, qemu_command

__all__ = [
    "DEVICES",
    "DISKS",
    "IOMMUS",
    "NO_IOMMU",
    "KernelUnavailableError",
    "KvmUnavailableError",
    "MissingToolError",
    "VmError",
    "VmLostError",
    "VmResult",
    "VmTimeoutError",
    "guest_environment",
    "run",
]

BOOT_SECONDS = 600
"""A machine that has not reached user space after this many seconds hangs. A boot takes about ten seconds, and about a
minute on a slow and busy host."""

PASSED_VARIABLES = ("PATH", "HOME", "LANG", "TERM", "CI")
"""The environment variables that a command gets from the caller by default."""


@dataclass(frozen=True)
class VmResult:
    """How a command ended; a snapshot.

    ``status`` is the exit status as a shell reports it, 128+n for death by signal n. ``stdout`` and ``stderr`` are
    empty if the caller gave a file. ``seconds_to_user_space`` is the wall time from the start of QEMU to the start of
    the command, ``seconds`` the wall time to the end of the command. ``accel`` is ``kvm`` or ``tcg``, and
    ``accel_reason`` says why.
    """

    status: int
    stdout: bytes
    stderr: bytes
    kernel_release: str
    log: str
    seconds_to_user_space: float
    seconds: float
    accel: str
    accel_reason: str


def guest_environment(host: Mapping[str, str], added: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of the command: :data:`PASSED_VARIABLES` of the host's, and the added variables."""
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
    accel: str = "auto",
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
    """Boot a kernel, run a command on the kernel, and return how the command ended.

    Cost: about ten seconds before the command starts, and a minute once per kernel to fetch the kernel. If the host has
    ``/dev/kvm``, some seconds once per kernel for a probe boot. Under emulation the command runs some twenty times
    slower than on the host. Needs qemu-system-x86 and busybox-static; and kmod, to fetch a kernel.

    Synchronization: may be called from several threads and processes at once. Each call is a machine apart; only the
    cache is shared. The machine ends with the call, also after an exception or a signal.

    :param kernel: a name of :data:`pyvfio.testing.kernels.LINES` or the path of a bzImage. The names that end in
        ``+iommufd`` have ``/dev/iommu``, and ``/dev/vfio/devices`` as soon as a device is bound. Their first use takes
        two or three minutes, and needs make, gcc and xz-utils.
    :param iommu: a name of :data:`IOMMUS`, or :data:`NO_IOMMU`. The kernels 6.1 have no driver for ``virtio``.
    :param devices: a name of :data:`DEVICES`.
    :param memory: a size as QEMU reads it: ``512M``, ``2G``.
    :param accel: ``auto``: KVM if a probe boot of this kernel has succeeded on this host, else ``tcg``. ``kvm``: KVM or
        an error. ``tcg``: emulation.
    :param icount: the machine's clock counts instructions, so that timings repeat. Takes about twice as long, and only
        emulation can do that.
    :param timeout: seconds of wall time from the start of the machine to the end of the command; None for no limit.
    :param env: environment variables besides :data:`PASSED_VARIABLES`.
    :param stdout: the file that gets the command's stdout at once; None to return the bytes. ``stderr`` is alike.
    :param modules: for a kernel that is a path, see :func:`pyvfio.testing.kernels.find_kernel`.
    :raises ValueError: arguments that can never be right.
    :raises VmLostError: the kernel panicked or oopsed, or QEMU ended; ``log`` says more.
    :raises VmTimeoutError: the time-out passed, or the machine did not reach user space.
    :raises KernelUnavailableError: no such kernel.
    :raises KvmUnavailableError: ``accel`` is ``kvm``, and KVM does not work here.
    :raises MissingToolError: a program is missing.
    """
    machine = Machine(iommu, memory, cpus, icount, devices, tuple(qemu_args))
    check_arguments(command, kernel, machine, timeout, accel=accel)
    qemu = find_tool("qemu-system-x86_64", package="qemu-system-x86")
    cache = cache_directory() if cache is None else cache
    guest = find_kernel(kernel, cache=cache, modules=modules, update=update)
    token = secrets.token_hex(16)
    settings = {
        "unsafe_interrupts": "1" if IOMMU_CHOICES[iommu].unsafe_interrupts else "",
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
        probe = functools.partial(_probe, qemu, guest, image)
        chosen = accels.choose(accel, icount=icount, guest=guest, qemu=qemu, cache=cache, probe=probe)
        with _Running(qemu, replace(machine, accel=chosen.name), guest, image) as running:
            return _Session(running, token.encode(), stdout, stderr, timeout).result(chosen)


def _probe(qemu: str, guest: GuestKernel, image: bytes) -> str:
    """Boot the kernel under KVM. Return an empty string if the kernel reaches user space, else the reason."""
    watch = accels.Watch()
    with _Running(qemu, Machine(memory="1G", accel="kvm"), guest, image, verbose=True) as running:
        status = running.streams[2]
        status.settimeout(0.1)
        while True:
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                if status.recv(1 << 10).startswith(b"up"):
                    return ""
            log, complaints = running.log(), running.complaints()
            if "KVM internal error" in complaints or running.process.poll() is not None:
                return f"a probe boot failed: {(complaints or log).strip().partition(chr(10))[0] or 'QEMU ended'}"
            cpu = accels.processor_seconds(running.process.pid)
            if reason := watch.hung(length=len(log), cpu=cpu, wall=running.seconds()):
                return f"a probe boot hung: {reason}"


def check_arguments(
    command: Sequence[str], kernel: str, machine: Machine, timeout: float | None, *, accel: str = "auto"
) -> None:
    """Check arguments before any of them is used.

    :raises ValueError: an argument that can never be right.
    """
    if isinstance(command, str) or not command:
        raise ValueError("the command must be a sequence of at least one word")
    if any("\0" in word for word in command):
        raise ValueError("a word of the command contains a zero byte")
    _check_choice("IOMMU", machine.iommu, IOMMU_CHOICES)
    _check_choice("list of devices", machine.devices, DEVICES)
    _check_choice("accelerator", accel, accels.ACCELS)
    if machine.iommu == "virtio" and kernel == "6.1":
        raise ValueError("the distribution's kernels 6.1 have no driver for the virtio IOMMU; use 6.12 or later")
    if accel == "kvm" and machine.icount:
        raise ValueError("KVM cannot count instructions: icount goes with the accelerator tcg")
    if not re.fullmatch(r"[1-9]\d*[MG]", machine.memory):
        raise ValueError(f"the memory size {machine.memory!r} is not a number of M or G")
    if machine.cpus < 1:
        raise ValueError(f"the number of processors must be at least 1, not {machine.cpus}")
    if timeout is not None and timeout <= 0:
        raise ValueError(f"the time-out must be above 0 seconds, not {timeout}")


def _check_choice(kind: str, name: str, names: Iterable[str]) -> None:
    if name not in names:
        raise ValueError(f"no {kind} is named {name!r}; there are {', '.join(names)}")


def _end_running(running: "_Running") -> None:
    running.__exit__()


class _Running:
    """A QEMU process and its streams. Leaving the context kills the process. Owned by one thread."""

    # A Ctrl-C while QEMU is started would leave a process that nobody waits for, and that no parent's end kills yet.
    @constructing(_end_running)
    def __init__(
        self, qemu: str, machine: Machine, guest: GuestKernel, initrd: bytes, *, verbose: bool = False
    ) -> None:
        self.guest = guest
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            # No file has a name in a file system, so no file remains even if this process is killed.
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
                verbose=verbose,
            )
            # The kernel kills QEMU with this process, also if this process is killed.
            words = [find_tool("setpriv", package="util-linux"), "--pdeathsig", "KILL", "--", *words]
            self.started = time.monotonic()
            self.process = subprocess.Popen(  # noqa: S603 - no shell sees the words
                words,
                stdin=subprocess.DEVNULL,
                stdout=self._complaints,
                stderr=self._complaints,
                pass_fds=[self._log, ramdisk, *disks, *theirs],
                start_new_session=True,  # the terminal's Ctrl-C is for this process alone
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
    """Separates a stream from the mark at the end; pure.

    A write to a port returns before the host has the bytes, so the status can arrive before the bytes. Only the mark
    says that the stream is complete.
    """

    mark: bytes
    ended: bool = False
    _held: bytes = field(default=b"", repr=False)

    def feed(self, data: bytes) -> bytes:
        """Take more bytes, and return those that are certainly not part of the mark."""
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

    def result(self, accel: accels.Accel) -> VmResult:
        """Wait for the end of the command, or raise :class:`VmError`."""
        with selectors.DefaultSelector() as selector:
            for stream, act in zip(self._running.streams, (self._output, self._errors, self._report), strict=True):
                selector.register(stream, selectors.EVENT_READ, act)
            selector.register(self._running.exited, selectors.EVENT_READ)
            while not self._complete():
                ready = [key for key, _ in selector.select(self._seconds_left())]
                streams = [key for key in ready if key.fileobj != self._running.exited]
                if ready and not streams:  # the output of a lost machine is read to the end first
                    raise self._lost()
                for key in streams:
                    self._read(selector, key)
                self._check_time()
        return self._ended(accel)

    def _ended(self, accel: accels.Accel) -> VmResult:
        seconds = self._running.seconds()
        return VmResult(
            status=self._status or 0,
            stdout=bytes(self._captured[0]),
            stderr=bytes(self._captured[1]),
            kernel_release=self._release,
            log=self._running.log(),
            seconds_to_user_space=seconds if self._up is None else self._up,
            seconds=seconds,
            accel=accel.name,
            accel_reason=accel.reason,
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
            state = "the command was running" if self._up is not None else "the kernel had not reached user space"
            raise VmTimeoutError(f"{state} {limit:g} seconds after the start of the machine", log=self._running.log())

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
    """Return whether a kernel's log contains a panic or an oops."""
    return re.search(r"Kernel panic - not syncing|\bOops: ", log) is not None


def sink(file: BinaryIO | None, kept: bytearray) -> Callable[[bytes], None]:
    """Return a function that writes to the file at once, or appends to the buffer if there is no file."""
    if file is None:
        return kept.extend

    def write(data: bytes) -> None:
        if data:
            file.write(data)
            file.flush()

    return write
