"""What most tests of blocks and what follows them begin with; a module that wants another one has its own."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvfio.testing.fake import FakeDevice, FakeKernel
from tests.unit.fakes import BDF, Rig, SpecialKernel
from tests.unit.machines import MachineTree
from tests.unit.processes import open_fds

_MEMORY = "/dev/shm"  # noqa: S108 (a new directory is made there)
_OF_TREES = (
    *("test_pci", "test_cdevs", "test_doctor"),
    *("test_cli_admin", "test_cli_bad_input", "test_cli_bind", "test_cli_info", "test_cli_list"),
)
"""How the names of modules begin whose tests each make a tree that looks like sysfs."""


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest) -> Iterator[Path]:
    """As pytest's; in memory for tests of trees: on a disk, the tree can take as long as the test."""
    if not request.path.name.startswith(_OF_TREES) or not os.access(_MEMORY, os.W_OK):
        yield request.getfixturevalue("tmp_path")
        return
    with tempfile.TemporaryDirectory(prefix="pyvfio-tree-", dir=_MEMORY) as made:
        yield Path(made)


def _maps_open() -> set[int]:
    """The descriptors of /proc/self/maps, of which each fake of a kernel since 6.5 has one until `shutdown`."""
    return {fd for fd, path in open_fds().items() if path.startswith("/proc/") and path.endswith("/maps")}


@pytest.fixture(autouse=True)
def _no_fake_outlives_its_test() -> Iterator[None]:
    """A fake that is garbage is collected here, and not in the middle of a later test that counts descriptors."""
    before = _maps_open()
    yield
    if not _maps_open() <= before:
        gc.collect()
    assert _maps_open() <= before, "a FakeKernel is open that the test has made: use `with`"


@pytest.fixture
def kernel() -> Iterator[SpecialKernel]:
    """With one device."""
    with SpecialKernel(groups=[(2, [FakeDevice(BDF)])]) as made:
        yield made


@pytest.fixture
def rig(kernel: SpecialKernel) -> Iterator[Rig]:
    """A device, and blocks that its mapper follows."""
    with Rig(kernel) as made:
        yield made


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[MachineTree]:
    """A machine to make into another shape."""
    made = MachineTree(tmp_path)
    yield made
    if isinstance(made.machine, FakeKernel):
        made.machine.close()
