"""What `pyvfio.doctor` says of memory: each limit below, at and above the number that decides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import pyvfio
from pyvfio.diagnosis import examine
from pyvfio.findings import Finding
from pyvfio.kernel import Memlock
from pyvfio.units import KIB, MIB
from tests.unit.fakes import PlacedKernel
from tests.unit.machines import MachineTree
from tests.unit.sysfs import place_process

UNLIMITED = "prlimit --pid 4711 --memlock=unlimited:unlimited"


class Limited(PlacedKernel):
    """A process that may lock some bytes."""

    lock = Memlock(limit=65536, used=4096, privileged=False)

    def memlock(self) -> Memlock:
        """As set."""
        return self.lock


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[Limited]:
    """The process of an ordinary user, on a machine without limits.conf."""
    (tmp_path / "4711").mkdir()
    (tmp_path / "self").symlink_to("4711")
    place_process(tmp_path, user=1000)
    with Limited() as made:
        made.own_proc = tmp_path
        yield made


def only(diagnosis: pyvfio.Diagnosis, check: str) -> Finding:
    """The only finding of a check."""
    (found,) = [each for each in diagnosis if each.check == check]
    return found


def commands(found: Finding) -> list[str]:
    """The commands of a finding."""
    return [each.text for each in found.commands]


@pytest.mark.parametrize(
    ("lock", "reason"),
    [
        (Memlock(limit=None, used=0, privileged=False), "RLIMIT_MEMLOCK is unlimited"),
        (Memlock(limit=None, used=0, privileged=True), "this process has CAP_IPC_LOCK"),
        (Memlock(limit=4096, used=0, privileged=True), "this process has CAP_IPC_LOCK"),
    ],
)
def test_a_process_without_a_limit_of_locked_memory_is_told_why(limited: Limited, lock: Memlock, reason: str) -> None:
    limited.lock = lock
    found = only(pyvfio.doctor(kernel=limited, memory=1 << 40), "memlock")
    assert (found.status, found.summary) == ("ok", f"any amount of memory can be mapped: {reason}")


@pytest.mark.parametrize(
    ("limit", "memory", "status", "said"),
    [
        (MIB + 4096, None, "note", "map 1 MiB"),
        (MIB + 4095, None, "wrong", "map 1024.0 KiB, and 1 MiB is little for a driver"),
        (MIB + 4096, MIB, "ok", "map 1 MiB"),
        (MIB + 4096, MIB + 1, "wrong", "map 1 MiB, and 1.0 MiB are wanted"),
        (4097, 1, "ok", "map 1 byte"),
        (4096, 0, "ok", "map 0 bytes"),
        (0, 1, "wrong", "map 0 bytes, and 1 byte are wanted"),
    ],
)
def test_the_memory_that_is_locked_already_counts(
    limited: Limited, limit: int, memory: int | None, status: str, said: str
) -> None:
    """4 KiB are, which a limit that was lowered later may not even allow. Without a wish, 1 MiB is the least."""
    limited.lock = Memlock(limit=limit, used=4096, privileged=False)
    found = only(pyvfio.doctor(kernel=limited, memory=memory), "memlock")
    assert (found.status, found.summary) == (status, f"RLIMIT_MEMLOCK lets this process {said}")
    assert found.why == "Each byte that is mapped for a device is charged to that limit."
    assert bool(found.commands) == bool(found.by_hand) == (status == "wrong")


def test_a_limit_is_raised_by_whole_kibibytes(limited: Limited) -> None:
    """As limits.conf counts, so that the last byte fits too."""
    limits = limited.proc / "self/root" / "etc/security/limits.d"
    limits.mkdir(parents=True)
    found = only(pyvfio.doctor(kernel=limited, memory=MIB + 1), "memlock")
    assert commands(found) == [
        "printf '%s\\n' '1000:1000 - memlock 1029' > /etc/security/limits.d/90-pyvfio.conf",
        f"prlimit --pid 4711 --memlock={1029 * KIB}:{1029 * KIB}",
    ]
    assert found.by_hand.startswith("ulimit -l 1029 (KiB)")


def test_a_limit_is_raised_where_this_machine_can(limited: Limited) -> None:
    """Without limits.conf for the process alone; without a process not at all; in a container by its host."""
    found = only(pyvfio.doctor(kernel=limited), "memlock")
    assert commands(found) == [UNLIMITED]
    assert commands(only(examine(None, memory=None, kernel=limited, process=7), "memlock")) == [
        UNLIMITED.replace("4711", "7")
    ]
    assert commands(only(examine(None, memory=None, kernel=limited), "memlock")) == []
    place_process(limited.proc, user=1000, container=True)
    assert commands(only(pyvfio.doctor(kernel=limited), "memlock")) == []


@pytest.mark.parametrize(
    ("passwd", "user"),
    [
        ("root:x:0:0::/:/bin/sh\nbob:x:7:1000::/:/bin/sh\nann:x:1000:100::/:/bin/sh\n", "ann"),
        ("pc$:x:1000:100::/:/bin/sh\n", "pc$"),
        ("a n:x:1000:100::/:/bin/sh\nann:x:1000:100::/:/bin/sh\n", "ann"),
        ("$(reboot):x:1000:100::/:/bin/sh\n", "1000:1000"),
        ("1000:x:7:100::/:/bin/sh\n", "1000:1000"),
        ("ann:1000\n", "1000:1000"),
        ("", "1000:1000"),
    ],
)
def test_limits_conf_names_a_user_as_passwd_does(limited: Limited, passwd: str, user: str) -> None:
    """By the number where no name is safe in a shell, or the group has the number."""
    (limited.proc / "self/root" / "etc/security/limits.d").mkdir(parents=True)
    (limited.proc / "self/root" / "etc/passwd").write_text(passwd)
    found = only(pyvfio.doctor(kernel=limited), "memlock")
    assert commands(found)[0] == (
        f"printf '%s\\n' '{user} - memlock unlimited' > /etc/security/limits.d/90-pyvfio.conf"
    )


def group(tree: MachineTree, limit: int | str) -> None:
    """A control group with 1 KiB in use, on a machine without swap."""
    for name, text in (("max", str(limit)), ("current", "1024"), ("stat", "inactive_file 0")):
        tree.put(f"sys/fs/cgroup/memory.{name}", text + "\n")
    tree.put("proc/meminfo", "SwapFree:  0 kB\n")


@pytest.mark.parametrize(
    ("limit", "memory", "status", "said"),
    [
        (65536, None, "ok", "the control group of this process has room for 63 KiB"),
        (65536, 64512, "ok", "the control group of this process has room for 63 KiB"),
        (65536, 64513, "wrong", "63.0 KiB are wanted, and this process's control group has room for 63 KiB: "),
        (1024, None, "ok", "the control group of this process has room for 0 bytes"),
        (1 << 60, 1 << 61, "wrong", "2 EiB are wanted, and this process's control group has room for "),
        ((1 << 60) + 1, 1 << 61, "ok", "no control group limits the memory of this process"),
        ("max", 1 << 61, "ok", "no control group limits the memory of this process"),
    ],
)
def test_the_room_of_a_control_group_is_told(
    tree: MachineTree, limit: int | str, memory: int | None, status: str, said: str
) -> None:
    """A number that no machine's memory has is no limit: version 1 has no other word for it."""
    group(tree, limit)
    found = only(pyvfio.doctor(kernel=tree.kernel, memory=memory), "room")
    assert found.status == status
    assert found.summary.startswith(said)
    assert bool(found.by_hand) == bool(found.why) == (status == "wrong")


@pytest.mark.parametrize(
    ("pools", "status", "said"),
    [
        ({"2048kB": (8, 3), "1048576kB": (2, 0)}, "ok", "0 of 2 pages of 1 GiB are free, 3 of 8 pages of 2 MiB"),
        ({"2048kB": (8, 0), "1048576kB": (2, 0)}, "note", "0 of 2 pages of 1 GiB are free, 0 of 8 pages of 2 MiB"),
        ({"2048kB": (8, 0), "1048576kB": (0, 0)}, "note", "0 of 8 pages of 2 MiB are free"),
        ({"2048kB": (8, None)}, "note", "0 of 8 pages of 2 MiB are free"),
        ({"2048kB": (0, 0)}, "ok", "no huge pages are reserved"),
        ({"big": (8, 3), "2048kB": (1, 1)}, "ok", "1 of 1 pages of 2 MiB are free"),
        ({}, "ok", "no huge pages are reserved"),
    ],
)
def test_pools_of_huge_pages_are_told_with_the_free_pages(
    tree: MachineTree, pools: dict[str, tuple[int, int | None]], status: str, said: str
) -> None:
    """Those with pages. It is a note if none has a free page."""
    for file in ("nr_hugepages", "free_hugepages"):
        (tree.sysfs / "kernel/mm/hugepages/hugepages-2048kB" / file).unlink()
    for name, (count, free) in pools.items():
        tree.put(f"sys/kernel/mm/hugepages/hugepages-{name}/nr_hugepages", f"{count}\n")
        if free is not None:
            tree.put(f"sys/kernel/mm/hugepages/hugepages-{name}/free_hugepages", f"{free}\n")
    found = only(pyvfio.doctor(kernel=tree.kernel), "hugepages")
    assert found.status == status
    assert found.summary.startswith(said)
    assert bool(found.why) == (status == "note")


@pytest.mark.parametrize(
    ("name", "text", "said", "fix"),
    [
        ("overcommit_memory", "0", "is 0", []),
        ("overcommit_memory", "much", "is not told", []),
        ("overcommit_memory", "2", "is 2: ", ["sysctl -w vm.overcommit_memory=0"]),
        ("max_map_count", "65530", "is 65530", []),
        ("max_map_count", "-1", "is not told", []),
        (
            "max_map_count",
            "65529",
            "is 65529, fewer than the usual 65530",
            ["sysctl -w vm.max_map_count=65530"],
        ),
    ],
)
def test_a_limit_of_the_kernel_is_told_with_its_number(
    tree: MachineTree, name: str, text: str, said: str, fix: list[str]
) -> None:
    tree.put(f"proc/sys/vm/{name}", f" {text} \n")
    found = only(pyvfio.doctor(kernel=tree.kernel), name.partition("_")[0].replace("max", "maps"))
    assert found.status == ("note" if fix else "ok")
    assert found.summary.startswith(f"vm.{name} {said}")
    assert commands(found) == fix
    assert said.endswith(": ") or found.summary == f"vm.{name} {said}"
    assert bool(found.why) == ("fewer" in said)


def test_a_script_leaves_the_accounting_of_memory_alone(tree: MachineTree) -> None:
    """Other programs depend on it, so a person decides."""
    tree.put("proc/sys/vm/overcommit_memory", "2\n")
    (command,) = only(pyvfio.doctor(kernel=tree.kernel), "overcommit").commands
    assert command.risky


@pytest.mark.parametrize(
    ("limit", "status", "raised"),
    [
        (0, "wrong", 65535),
        (1, "note", 65535),
        (16384, "note", 65536),
        (65534, "note", 262136),
        (65535, "ok", None),
    ],
)
def test_a_limit_of_mappings_is_raised_to_the_usual_one_or_fourfold(
    tree: MachineTree, limit: int, status: str, raised: int | None
) -> None:
    tree.load_vfio()
    place = tree.sysfs / "module/vfio_iommu_type1/parameters/dma_entry_limit"
    place.write_text(f"{limit}\n")
    found = only(pyvfio.doctor(kernel=tree.kernel), "entries")
    assert (found.status, found.summary) == (status, f"a container may hold {limit} mappings (dma_entry_limit)")
    assert commands(found) == ([] if raised is None else [f"echo {raised} > {place}"])
    assert bool(found.why) == (raised is not None)


def test_a_limit_of_mappings_is_of_type1_alone(tree: MachineTree) -> None:
    """And is one of the machine where type1 is loaded."""
    assert "entries" not in {each.check for each in pyvfio.doctor(kernel=tree.kernel)}
    tree.load_vfio()
    assert "entries" not in {each.check for each in pyvfio.doctor(kernel=tree.kernel, iommu="iommufd")}
    assert "entries" in {each.check for each in pyvfio.doctor(kernel=tree.kernel, iommu="type1")}


def test_a_full_container_is_told_with_the_usual_limit(tree: MachineTree) -> None:
    tree.load_vfio()
    error = pyvfio.EntryLimitError(28, "full", request="VFIO_IOMMU_MAP_DMA", arguments={})
    (found,) = error.explain(kernel=tree.kernel)
    assert found.summary == "a container may hold 65535 mappings (dma_entry_limit) and all are in use"
    assert found.why
