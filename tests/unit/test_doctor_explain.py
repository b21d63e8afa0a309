"""Which checks an error calls for, and the order of all checks."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyvfio
from pyvfio.diagnosis import Command, Diagnosis, Finding, explain
from pyvfio.errors import EntryLimitError, PinLimitError, RollbackError, UnsupportedError, VfioError
from pyvfio.kernel import Memlock
from pyvfio.testing.fake import FakeKernel
from tests.unit import machines
from tests.unit.machines import NIC, KernelOnTree, MachineTree


class Limited(KernelOnTree):
    """The kernel of a process that may lock no memory."""

    def memlock(self) -> Memlock:
        """No byte is left."""
        return Memlock(limit=4096, used=4096, privileged=False)


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[MachineTree]:
    """A machine on which each check of the kernel, the device and the memory has something to say."""
    made = MachineTree(tmp_path)
    machines.acs_trouble(made)
    if isinstance(made.machine, FakeKernel):
        made.machine.close()
    made.put("proc/interrupts", machines.PLAIN)
    made.put("proc/sys/vm/overcommit_memory", "2\n")
    made.put("proc/sys/vm/max_map_count", "7\n")
    made.put("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "8\n")
    made.put("sys/module/vfio_iommu_type1/parameters/dma_entry_limit", "7\n")
    with Limited(made) as kernel:
        made.machine = kernel
        yield made


def explained(tree: MachineTree, error: VfioError, bdf: str | None = NIC) -> list[str]:
    """The checks that an error calls for, each once, in their order."""
    error.bdf = bdf
    return list(dict.fromkeys(finding.check for finding in error.explain(kernel=tree.machine)))


def ioctl_error(request: str) -> pyvfio.IoctlError:
    """The error of a call."""
    return pyvfio.IoctlError(errno.EINVAL, "no", request=request, arguments={})


def pin_error(asked: int) -> PinLimitError:
    """The error of a mapping of `asked` bytes."""
    error = PinLimitError(errno.ENOMEM, "no", request="VFIO_IOMMU_MAP_DMA", arguments={})
    error.asked = asked
    return error


LIMITS = ["overcommit", "maps"]
REQUESTS = [
    ("VFIO_SET_IOMMU", ["interrupts", "viability"]),
    ("VFIO_GROUP_SET_CONTAINER", ["interrupts", "viability"]),
    ("VFIO_GROUP_GET_DEVICE_FD", ["driver", "reset"]),
    ("VFIO_DEVICE_BIND_IOMMUFD", ["interrupts", "viability"]),
    ("mmap", ["hugepages", *LIMITS]),
    ("mprotect", LIMITS),
    ("madvise", ["hugepages", *LIMITS]),
    ("mlockall", ["memlock"]),
    ("VFIO_IOMMU_UNMAP_DMA", []),
]


@pytest.mark.parametrize(("request_name", "checks"), REQUESTS)
def test_a_refused_call_is_explained_by_the_checks_of_that_call(
    tree: MachineTree, request_name: str, checks: list[str]
) -> None:
    """Alone, and as the part of a failed undo."""
    assert explained(tree, ioctl_error(request_name)) == checks
    rollback = RollbackError("not undone", [ValueError("x"), ioctl_error(request_name)])
    assert explained(tree, rollback) == checks


@pytest.mark.parametrize(
    ("error", "checks"),
    [
        (pyvfio.NotBoundError("x"), ["use", "driver"]),
        (pyvfio.GroupNotViableError(7, []), ["use", "viability"]),
        (pyvfio.DeviceNotFoundError("x"), []),
        (UnsupportedError("x"), ["reset"]),
        (pin_error(1), ["memlock"]),
        (pin_error(0), []),
        (pin_error(1 << 40), ["memlock", "room"]),
        (EntryLimitError(errno.ENOSPC, "x", request="VFIO_IOMMU_MAP_DMA", arguments={}), ["entries"]),
        (RollbackError("x", [pyvfio.NotBoundError("x"), ioctl_error("mmap")]), ["use", "driver", "hugepages", *LIMITS]),
        (RollbackError("x", [OSError("x")]), []),
        (VfioError("x"), []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_is_explained_by_the_checks_of_its_kind(
    tree: MachineTree, error: VfioError, checks: list[str]
) -> None:
    """In the order in which to fix them."""
    assert explained(tree, error) == checks


def test_the_group_of_an_error_is_known_by_its_number_or_its_node(tree: MachineTree) -> None:
    """A node of another kind, or of a group without an IOMMU, has none that could be looked at."""
    machine = tree.machine
    assert explained(tree, pyvfio.GroupNotViableError(7, []), None) == ["use", "viability"]
    assert [found.check for found in pyvfio.GroupBusyError(7, []).explain(kernel=machine)] == ["group-node"]
    for name, checks in (("vfio/7", ["group-node"]), ("vfio/noiommu-7", []), ("vfio/\u0667", []), ("vfio/vfio", [])):
        assert explained(tree, pyvfio.AccessDeniedError(f"{machine.dev}/{name}", hint=""), None) == checks


@pytest.mark.parametrize(
    ("error", "iommufd"),
    [
        (pyvfio.AccessDeniedError("/dev/iommu", hint=""), True),
        (pyvfio.AccessDeniedError("/dev/vfio/devices/vfio0", hint=""), True),
        (pyvfio.AccessDeniedError("/dev/vfio/7", hint=""), False),
        (pyvfio.AccessDeniedError("/dev/vfio/vfio", hint=""), False),
    ],
    ids=str,
)
def test_a_refused_node_is_explained_for_the_address_space_that_needs_it(
    tree: MachineTree, error: VfioError, *, iommufd: bool
) -> None:
    """The nodes of iommufd for a program that uses iommufd, the nodes of groups otherwise."""
    checks = explained(tree, error)
    assert ("iommufd-node" in checks) == iommufd
    assert ("group-node" in checks) == (not iommufd)


@pytest.mark.parametrize("request_name", ["VFIO_DEVICE_BIND_IOMMUFD", "VFIO_DEVICE_ATTACH_IOMMUFD_PT"])
def test_a_refused_call_of_iommufd_is_explained_for_iommufd(tree: MachineTree, request_name: str) -> None:
    """Also in a failed undo: the parameter that accepts interrupts is that of iommufd."""
    for error in (ioctl_error(request_name), RollbackError("x", [OSError("x"), ioctl_error(request_name)])):
        error.bdf = NIC
        told = {found.check: found for found in error.explain(kernel=tree.machine)}
        if request_name == "VFIO_DEVICE_BIND_IOMMUFD":
            assert "iommufd refuses every device" in told["interrupts"].summary
        else:
            assert told == {}


def test_other_exceptions_are_no_errors_to_explain() -> None:
    with pytest.raises(TypeError, match=r"explain\(\) takes a VfioError, not ValueError"):
        explain(ValueError("x"))  # type: ignore[arg-type]


def test_the_findings_stand_in_the_order_in_which_to_fix_them(tree: MachineTree) -> None:
    """The kernel and the machine, the device, the memory. Interrupts are fixed before any device."""
    said = pyvfio.doctor(NIC, kernel=tree.machine, memory=1 << 40)
    assert list(dict.fromkeys(found.check for found in said)) == [
        "kernel",
        "iommu",
        "modules",
        "interrupts",
        "container-node",
        "device",
        "group",
        "use",
        "driver",
        "viability",
        "reset",
        "memlock",
        "room",
        "hugepages",
        *LIMITS,
        "entries",
    ]
    assert said.status == "wrong"
    notes = [found for found in said if found.status != "wrong"]
    assert {found.status for found in notes} == {"ok", "note"}


class Broken(KernelOnTree):
    """A kernel that does not say how much memory may be locked."""

    error: Exception = OSError(errno.EIO, "Input/output\x1b error")

    def memlock(self) -> Memlock:
        """Fail."""
        raise self.error


@pytest.mark.parametrize(
    ("error", "summary", "by_hand"),
    [
        (OSError(errno.EIO, "Input/output\x1b error"), "[Errno 5] Input/output\\x1b error", ""),
        (VfioError("no\x1b", hint="do\x1b"), "no\\x1b", "do\\x1b"),
        (
            pyvfio.IoctlError(errno.EINVAL, "no", request="mmap", arguments={}, hint="do"),
            "mmap(): EINVAL, no",
            "do",
        ),
    ],
)
def test_a_check_that_fails_is_a_finding(tree: MachineTree, error: Exception, summary: str, by_hand: str) -> None:
    """With the remedy of the error, if it has one; the other checks are made."""
    with Broken(tree) as kernel:
        kernel.error = error
        said = pyvfio.doctor(NIC, kernel=kernel)
    (found,) = [each for each in said if each.check == "memlock"]
    assert (found.status, found.summary, found.by_hand) == ("wrong", summary, by_hand)
    assert {"room", "overcommit", "driver"} <= {each.check for each in said}


def test_a_memory_of_zero_bytes_is_a_number(tree: MachineTree) -> None:
    """It always fits."""
    (found,) = [each for each in pyvfio.doctor(kernel=tree.machine, memory=0) if each.check == "memlock"]
    assert found.status == "ok"
    (found,) = [each for each in pyvfio.doctor(kernel=tree.machine, memory=1) if each.check == "memlock"]
    assert found.status == "wrong"
    for wrong, error in ((-1, ValueError), (1.5, TypeError), ("1", TypeError)):
        with pytest.raises(error):
            pyvfio.doctor(kernel=tree.machine, memory=wrong)  # type: ignore[arg-type]


# --- The result


WRONG = Finding("modules", "wrong", "m", "Why.", (Command("pyvfio bind x", "first"), Command("b", risky=True)), "by")
BOOT = Finding("iommu", "wrong", "i", reboot=True)
NOTE, OK = Finding("reset", "note", "r"), Finding("kernel", "ok", "k")


@pytest.mark.parametrize(
    ("findings", "status", "text"),
    [
        ((), "ok", []),
        ((OK,), "ok", []),
        ((OK, NOTE), "note", ["note  reset: r"]),
        ((NOTE, BOOT), "wrong", ["note  reset: r", "wrong iommu: i", "    Then reboot."]),
        ((BOOT, BOOT), "wrong", ["wrong iommu: i", "wrong iommu: i", "    Then reboot."]),
        (
            (WRONG, OK),
            "wrong",
            ["wrong modules: m", "    Why.", "    by", "    # first", "    pyvfio bind x", "    # b"],
        ),
    ],
)
def test_a_diagnosis_is_told_in_lines(findings: tuple[Finding, ...], status: str, text: list[str]) -> None:
    """Without what is in order, unless everything is wanted; the verdict is a line of its own."""
    diagnosis = Diagnosis(NIC, "box", "6.12", findings)
    assert (diagnosis.status, diagnosis.ok, len(diagnosis)) == (status, status != "wrong", len(findings))
    assert diagnosis.text(verdict=False).splitlines() == text
    assert diagnosis.text(width=200).splitlines() == [*text, diagnosis.verdict]
    assert ("ok    kernel: k" in diagnosis.text(everything=True)) == (OK in findings)
    assert diagnosis.wrong == tuple(found for found in findings if found.status == "wrong")


def test_a_script_has_the_commands_in_their_order() -> None:
    """It defines pyvfio only if it runs pyvfio. A boot is a comment at the end."""
    script = Diagnosis(NIC, "box", "6.12", (OK, WRONG, NOTE, BOOT)).script(run_pyvfio=["pyvfio() { :; }"])
    assert script.splitlines() == [
        "#!/bin/sh",
        f"# pyvfio doctor {NIC} on box",
        "# Run it as root.",
        "set -eu",
        "pyvfio() { :; }",
        "",
        "# modules: m",
        "# by",
        "# first",
        "pyvfio bind x",
        "# b",
        "",
        "# iommu: i",
        "",
        "# Reboot, then run pyvfio doctor again: other checks wait for the reboot.",
        "# reboot",
    ]
    assert Diagnosis(None, "", "", (NOTE,)).script().splitlines() == [
        "#!/bin/sh",
        "# pyvfio doctor",
        "# There is no obstacle.",
    ]
    assert "pyvfio()" not in Diagnosis(None, "", "", (BOOT,)).script(run_pyvfio=["pyvfio() { :; }"])
    assert "# reboot" not in Diagnosis(None, "", "", (WRONG,)).script()


def test_comments_of_a_script_are_broken_between_words_only() -> None:
    """A path or an address is copied as a whole."""
    path, address = "/" + "long/" * 30, f"in-{'x' * 110}-y"
    lines = Diagnosis(NIC, "", "", (Finding("modules", "wrong", "m", by_hand=f"Take {path} {address} out"),)).script()
    assert lines.splitlines()[-5:] == ["# modules: m", "# Take", f"# {path}", f"# {address}", "# out"]
    full = f"{'a' * 57} {'b' * 58}"  # 116 columns behind the mark
    assert Diagnosis(NIC, "", "", (Finding("x", "wrong", "y", by_hand=full),)).script().endswith(f"\n# {full}\n")
    parted = Diagnosis(NIC, "", "", (Finding("x", "wrong", "y", by_hand=f"{full}b"),)).script()
    assert parted.endswith(f"\n# {'a' * 57}\n# {'b' * 59}\n")
