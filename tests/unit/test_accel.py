"""KVM is used where a probe boot has succeeded, and each verdict is remembered; tests/vm makes real probe boots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pyvfio.testing import accel
from pyvfio.testing.accel import Accel, Verdict
from pyvfio.testing.kernels import GuestKernel
from pyvfio.testing.vm_errors import KvmUnavailableError


class Host:
    """A host: files for a kernel, QEMU and the node of KVM. Counts probe boots, which end as `failure` says."""

    def __init__(self, folder: Path) -> None:
        self.cache, self.failure, self.probes = folder / "cache", "", 0
        self.image, self.qemu, self.kvm = folder / "vmlinuz", folder / "qemu", folder / "kvm"
        for file in (self.image, self.qemu, self.kvm):
            file.write_text("1")

    def probe(self) -> str:
        """Stand for a boot."""
        self.probes += 1
        return self.failure

    def choose(self, wanted: str = "auto", *, icount: bool = False) -> Accel:
        """Choose for this host."""
        return accel.choose(
            wanted,
            icount=icount,
            guest=GuestKernel("6.12.1", self.image, None),
            qemu=str(self.qemu),
            cache=self.cache,
            probe=self.probe,
            kvm=self.kvm,
        )


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A host with KVM."""
    return Host(tmp_path)


def test_kvm_is_used_after_one_probe_that_succeeds(host: Host) -> None:
    """Later machines need no probe, with `kvm` or without."""
    assert [host.choose(wanted).name for wanted in ("auto", "auto", "kvm")] == ["kvm"] * 3
    assert host.probes == 1


def test_a_failure_is_remembered_and_says_why_and_where(host: Host) -> None:
    """The file that is named is the one to remove for another probe."""
    host.failure = "a probe boot hung"
    first, second = host.choose(), host.choose()
    assert (first.name, second, host.probes) == ("tcg", first, 1)
    (file,) = host.cache.glob("accel/*.json")
    assert first.reason == f"a probe boot hung (remembered in {file})"
    file.unlink()
    host.failure = ""
    assert host.choose().name == "kvm"


def test_kvm_on_request_is_kvm_or_an_error(host: Host) -> None:
    """A failure that is remembered is probed again, since the host may have been mended."""
    host.failure = "a probe boot hung"
    for _ in range(2):
        with pytest.raises(KvmUnavailableError, match=r"does not work here: a probe boot hung.*--accel tcg"):
            host.choose("kvm")
    host.failure = ""
    assert host.choose("kvm").name == "kvm"
    assert host.choose("auto").name == "kvm"
    assert host.probes == 3


@pytest.mark.parametrize("changed", ["image", "qemu"])
def test_another_kernel_or_another_qemu_is_probed_anew(host: Host, changed: str) -> None:
    """A verdict is for one kernel's file, and one QEMU."""
    host.choose()
    file: Path = getattr(host, changed)
    file.write_text("another")
    host.choose()
    assert host.probes == 2


def test_without_the_node_there_is_no_probe_and_nothing_is_remembered(host: Host) -> None:
    """The node may come later, when a module is loaded or a user joins a group."""
    host.kvm.unlink()
    assert host.choose() == Accel("tcg", f"{host.kvm}: No such file or directory")
    with pytest.raises(KvmUnavailableError, match="No such file"):
        host.choose("kvm")
    assert (host.probes, list(accel.remembered(host.cache))) == (0, [])


@pytest.mark.parametrize("settings", [("tcg", False), ("auto", True)])
def test_emulation_on_request_and_a_clock_that_counts_instructions_need_no_probe(
    host: Host, settings: tuple[str, bool]
) -> None:
    """KVM cannot count instructions."""
    wanted, icount = settings
    assert host.choose(wanted, icount=icount).name == "tcg"
    assert host.probes == 0


def test_all_verdicts_can_be_listed_and_a_damaged_one_is_none(host: Host) -> None:
    """A damaged file counts as no verdict, and the next probe replaces the file."""
    host.failure = "no"
    host.choose()
    assert list(accel.remembered(host.cache)) == [Verdict("6.12.1", "no")]
    (file,) = host.cache.glob("accel/*.json")
    file.write_text("{")
    assert list(accel.remembered(host.cache)) == []
    host.choose()
    assert host.probes == 2


def _hung(steps: list[tuple[int, float, float]]) -> list[bool]:
    watch = accel.Watch()
    return [bool(watch.hung(length=length, cpu=cpu, wall=wall)) for length, cpu, wall in steps]


def _busy(length: Callable[[int], int]) -> list[tuple[int, float, float]]:
    return [(length(second), second, second) for second in range(1, 9)]


def test_a_boot_hangs_if_the_processor_works_and_the_log_does_not_grow() -> None:
    """A log that grows is no hang, however long the boot takes."""
    assert _hung(_busy(lambda _second: 40)) == [False] * 2 + [True] * 6
    assert not any(_hung(_busy(lambda second: 40 * second)))


def test_a_boot_on_a_busy_host_has_more_time() -> None:
    """The processor's time counts; one that sleeps hangs after a longer while."""
    slow = [(40, wall / 10, wall) for wall in (1.0, 10.0, 19.0, 20.9)]
    assert _hung(slow) == [False] * 4
    assert _hung([(40, 0.1, 1.0), (40, 0.1, 20.0), (40, 0.1, 22.0)]) == [False, False, True]
