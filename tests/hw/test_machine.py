"""What needs a machine whose settings may be changed: strict overcommit; drivers taken and given back by scripts."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import pyvfio
from pyvfio import pci
from pyvfio.kernel import LinuxKernel
from pyvfio.memory import Reservation
from pyvfio.testing.world import World
from pyvfio.units import GIB, MIB, TIB
from tests.hw.rig import SIZE, Rig

pytestmark = [pytest.mark.usefixtures("throwaway"), pytest.mark.one_iommu]


@contextmanager
def strict_overcommit() -> Iterator[None]:
    """vm.overcommit_memory is 2: what is charged is bounded, and a program is told when it asks for more."""
    mode = Path("/proc/sys/vm/overcommit_memory")
    former = mode.read_text(encoding="ascii")
    mode.write_text("2", encoding="ascii")
    try:
        yield
    finally:
        mode.write_text(former, encoding="ascii")


def _meminfo(name: str) -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _maps(vaddr: int, size: int) -> list[str]:
    found = []
    for line in Path("/proc/self/maps").read_text(encoding="ascii").splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start < vaddr + size and vaddr < end:
            found.append(line)
    return found


@pytest.mark.real_kernel("the charges under strict overcommit are those of the machine")
def test_a_tebibyte_is_reserved_under_strict_overcommit_and_nothing_is_charged() -> None:
    """Only what is used counts."""
    with strict_overcommit():
        before = _meminfo("Committed_AS")
        reservation = Reservation(LinuxKernel(), max_length=TIB)
        assert abs(_meminfo("Committed_AS") - before) < MIB
        reservation.activate(16 * MIB)
        assert abs(_meminfo("Committed_AS") - before - 16 * MIB) < MIB
        reservation.deactivate(0)
        assert abs(_meminfo("Committed_AS") - before) < MIB
        reservation.release()


@pytest.mark.real_kernel("the charges under strict overcommit are those of the machine")
def test_growing_beyond_the_commit_limit_fails_and_changes_nothing(rig: Rig, world: World) -> None:
    """ENOMEM from the kernel itself: lengths, memory maps, what is locked and what the device reaches are as before."""
    block = rig.blocks.add("ring", used_length=2 * MIB, max_length=64 * GIB)
    with strict_overcommit():
        before = (_maps(block.vaddr, block.max_length), world.locked_bytes(), rig.space.mappings)
        with pytest.raises(pyvfio.IoctlError, match="more memory could not be allocated") as caught:
            block.resize(32 * GIB)
        assert caught.value.errno == 12
        assert (_maps(block.vaddr, block.max_length), world.locked_bytes(), rig.space.mappings) == before
    assert block.used_length == 2 * MIB
    assert rig.reaches(block, 2 * MIB - SIZE)


@pytest.mark.real_kernel("the machine decides whether memory is huge pages; a fake takes either")
def test_memory_of_a_block_is_backed_by_transparent_huge_pages(rig: Rig) -> None:
    """Where the machine has them; mapped for the device, the block is one huge page after another."""
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii"):
        pytest.fail("this kernel has no transparent huge pages to show")
    block = rig.blocks.add("ring", used_length=0, max_length=GIB)
    block.resize(8 * MIB)
    ctypes.memset(block.vaddr, 1, 8 * MIB)
    smaps = Path("/proc/self/smaps").read_text(encoding="ascii").split(f"{block.vaddr:x}-")[1]
    huge = next(line for line in smaps.splitlines() if line.startswith("AnonHugePages:"))
    assert int(huge.split()[1]) == 8 * 1024


def _script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    module = f"pyvfio.cli.{name}"
    return subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.real_kernel("the scripts work on the machine's sysfs, which has no fake device")
def test_the_scripts_give_a_device_back_and_take_it_again(bdf: str) -> None:
    """`scripts/unbind` and `scripts/bind` on real sysfs, with what they say checked against it."""
    kernel = LinuxKernel()
    assert pci.read_device(bdf, kernel=kernel).driver == "vfio-pci"
    given_back = _script("unbind", bdf)
    assert given_back.returncode == 0, given_back.stderr
    assert pci.read_device(bdf, kernel=kernel).driver is None
    refused = subprocess.run(
        [sys.executable, "-c", f"import pyvfio; pyvfio.open_device('{bdf}')"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"pyvfio bind {bdf}" in refused.stderr
    plan = _script("bind", "--dry-run", bdf)
    assert plan.returncode == 0
    assert "driver_override" in plan.stdout
    assert pci.read_device(bdf, kernel=kernel).driver is None
    taken = _script("bind", bdf)
    assert taken.returncode == 0, taken.stderr
    assert pci.read_device(bdf, kernel=kernel).driver == "vfio-pci"


@pytest.mark.real_kernel("the scripts work on the machine's sysfs, which has no fake device")
def test_the_list_shows_the_device_and_who_has_it_open(device: pyvfio.Device) -> None:
    """`scripts/list --json` for programs."""
    listed = _script("list", "--json")
    assert listed.returncode == 0, listed.stderr
    text = json.dumps(json.loads(listed.stdout))
    assert device.bdf in text
    assert "vfio-pci" in text


@pytest.mark.real_kernel("the scripts work on the machine's sysfs, which has no fake device")
def test_a_device_that_is_open_is_not_taken_away(device: pyvfio.Device) -> None:
    """Unbinding it would hang in the kernel until it is closed; so it is refused, with the holder."""
    refused = _script("unbind", device.bdf)
    assert refused.returncode == 1
    assert "open" in refused.stderr
    assert pci.read_device(device.bdf, kernel=LinuxKernel()).driver == "vfio-pci"
