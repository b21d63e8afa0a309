"""The accelerator of the virtual machine: KVM on hosts where a probe boot has succeeded, else QEMU's emulation (TCG).

A host can offer ``/dev/kvm`` and still hang a kernel in the first instructions, for instance as a nested virtual
machine. So the first machine of each kernel is preceded by a probe: a boot under KVM to user space. The verdict is kept
in the cache directory, as long as kernel file, host kernel, processor and QEMU stay the same.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pyvfio.testing.kernels import GuestKernel
from pyvfio.testing.vm_errors import KvmUnavailableError

ACCELS = ("auto", "kvm", "tcg")
"""The accelerators that a caller can ask for."""

HUNG_CPU = 2.0
"""A probe boot hangs if QEMU uses this many seconds of processor time while the kernel logs nothing. A kernel that runs
under KVM logs the first line within one second, and processor time does not depend on other work of the host."""

HUNG_WALL = 20.0
"""A probe boot hangs if the kernel logs nothing for this many seconds, whatever the processor does."""

_KVM = Path("/dev/kvm")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Accel:
    """The accelerator of a machine, ``kvm`` or ``tcg``, and the reason for the choice; a snapshot."""

    name: str
    reason: str


@dataclass(frozen=True)
class Verdict:
    """The result of a probe boot; a snapshot. ``failure`` is empty if the kernel came to user space under KVM."""

    kernel: str
    failure: str


def choose(
    wanted: str,
    *,
    icount: bool,
    guest: GuestKernel,
    qemu: str,
    cache: Path,
    probe: Callable[[], str],
    kvm: Path = _KVM,
) -> Accel:
    """Return the accelerator for a machine.

    ``auto`` is KVM if a probe boot succeeds, else TCG. ``kvm`` repeats a probe that has failed before.

    :param wanted: a name of :data:`ACCELS`.
    :param probe: boots the kernel under KVM, and returns an empty string, or the reason why the boot failed.
    :param kvm: the device node of KVM.
    :raises KvmUnavailableError: ``kvm`` is wanted and does not work.

    Synchronization: processes that probe with one cache wait for each other.
    """
    if wanted == "tcg":
        return Accel("tcg", "asked for")
    if icount:
        return Accel("tcg", "KVM cannot count instructions")
    failure = _missing(kvm) or _verdict(wanted, guest, qemu, cache, probe)
    if failure and wanted == "kvm":
        raise KvmUnavailableError(f"KVM does not work here: {failure}", hint="Use --accel tcg, which works anywhere")
    if failure:
        _log.info("emulating without KVM: %s", failure)
        return Accel("tcg", failure)
    return Accel("kvm", f"a probe boot of kernel {guest.release} under KVM succeeded")


def remembered(cache: Path) -> Iterator[Verdict]:
    """Yield the verdicts in a cache directory, for all kernels, hosts and versions of QEMU."""
    for path in sorted(cache.glob("accel/*.json")):
        verdict = _read(path)
        if verdict is not None:
            yield verdict


def _missing(kvm: Path) -> str:
    """Return the reason why the device node cannot be used, or an empty string."""
    try:
        os.close(os.open(kvm, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{kvm}: {error.strerror}"
    return ""


def _verdict(wanted: str, guest: GuestKernel, qemu: str, cache: Path, probe: Callable[[], str]) -> str:
    path = cache / "accel" / f"{guest.release}-{_key(guest, qemu)}.json"
    known = _read(path)
    if known is None or (known.failure and wanted == "kvm"):
        with _locked(path.with_suffix(".lock")):
            # Another process may have probed in the meantime.
            known = None if wanted == "kvm" else _read(path)
            if known is None:
                known = Verdict(guest.release, probe())
                _write(path, known)
    return f"{known.failure} (remembered in {path})" if known.failure else ""


def _key(guest: GuestKernel, qemu: str) -> str:
    """Return a digest of all that a verdict depends on."""
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in (guest.image, Path(qemu))]
    text = repr([files, os.uname().release, _processor()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return ""


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(path: Path) -> Verdict | None:
    """Return the verdict in a file. A file that is missing or damaged holds none."""
    try:
        found = json.loads(path.read_text())
        return Verdict(str(found["kernel"]), str(found["failure"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, verdict: Verdict) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".making-", delete=False) as file:
        try:
            json.dump(asdict(verdict), file)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


class Watch:
    """Tells when a probe boot hangs. Owned by one thread."""

    def __init__(self) -> None:
        self._length, self._cpu, self._wall = 0, 0.0, 0.0

    def hung(self, *, length: int, cpu: float, wall: float) -> str:
        """Return the reason why the boot hangs, or an empty string.

        :param length: bytes of the kernel's log.
        :param cpu: seconds of processor time that QEMU has used.
        :param wall: seconds since the start.
        """
        if length > self._length:
            self._length, self._cpu, self._wall = length, cpu, wall
        seconds = f"the kernel logged nothing for {wall - self._wall:.1f} s"
        if cpu - self._cpu >= HUNG_CPU:
            return f"{seconds}, {cpu - self._cpu:.1f} s of them processor time"
        return seconds if wall - self._wall >= HUNG_WALL else ""


def processor_seconds(pid: int) -> float:
    """Return the processor time that a process has used, in seconds; 0 after the end of the process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
