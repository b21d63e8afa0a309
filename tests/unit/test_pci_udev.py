"""Of the running machine alone libudev knows the devices, the events, and whether udevd has finished with a node.

A stand-in takes the place of pyudev, since a test cannot make a device appear.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pyvfio import pci
from pyvfio.errors import UnsupportedError
from pyvfio.pci import rights as rights_of_nodes
from pyvfio.pci import sysfs as running
from tests.unit.sysfs import SysfsTree

BDF, OTHER = "0000:00:02.0", "0000:00:03.0"


class DeviceNotFoundError(Exception):
    """As pyudev's: udevd has no entry for the node yet."""


class Udev:
    """A stand-in for the module pyudev. `calls`: what was asked of libudev."""

    DeviceNotFoundError = DeviceNotFoundError

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.names = [OTHER, BDF]
        self.events: list[SimpleNamespace | None] = []
        self.initialized: list[bool | Exception] = []
        self.asked: Callable[[], object] = lambda: None
        self.Devices = self.Monitor = self

    def Context(self) -> Udev:  # noqa: N802 (the name of pyudev)
        return self

    def list_devices(self, *, subsystem: str) -> list[SimpleNamespace]:
        self.calls.append(("list", subsystem))
        return [SimpleNamespace(sys_name=name) for name in self.names]

    def from_netlink(self, context: object, *, source: str) -> Udev:
        assert context is self
        self.calls.append(("netlink", source))
        return self

    def filter_by(self, *, subsystem: str) -> None:
        self.calls.append(("filter", subsystem))

    def start(self) -> None:
        self.calls.append(("start",))

    def poll(self, timeout: float | None) -> SimpleNamespace | None:
        self.calls.append(("poll", timeout))
        return self.events.pop(0)

    def from_device_file(self, context: object, path: str) -> SimpleNamespace:
        assert context is self
        self.calls.append(("node", path))
        self.asked()
        answer = self.initialized.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(is_initialized=answer)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SysfsTree:
    """The running machine, with udevd: two devices, one with vfio-pci and a node."""
    tree = SysfsTree(tmp_path)
    tree.add_device(BDF, driver="vfio-pci", group=7)
    tree.add_device(OTHER, driver="e1000e", group=8)
    (tree.sysfs / "class/vfio").mkdir(parents=True)
    (tree.dev / "vfio/7").touch(0o600)
    (tmp_path / "control").touch()
    monkeypatch.setattr(running, "_RUNNING_SYSFS", tree.sysfs.resolve())
    monkeypatch.setattr(rights_of_nodes, "_UDEVD", tmp_path / "control")
    return tree


@pytest.fixture
def udev(monkeypatch: pytest.MonkeyPatch) -> Udev:
    """The stand-in."""
    udev = Udev()
    monkeypatch.setitem(sys.modules, "pyudev", udev)
    return udev


@pytest.fixture
def no_udev(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without libudev."""
    monkeypatch.setitem(sys.modules, "pyudev", None)


def event(action: str, **properties: str) -> SimpleNamespace:
    return SimpleNamespace(action=action, sys_name=BDF, properties=properties)


def give(tree: SysfsTree, patience: float) -> tuple[pci.Ownership, ...]:
    """Give the group 0 the node of the device that has vfio-pci already; the ownerships that were set."""
    given: list[pci.Ownership] = []

    def own(_path: Path, ownership: pci.Ownership) -> None:
        given.append(ownership)

    pci.bind(BDF, rights=pci.Rights(group=4711), patience=patience, kernel=tree.kernel, write=tree.write, own=own)
    return tuple(given)


# ------------------------------------------------------------------------------------------------------------- devices


def test_devices_of_the_running_machine_are_those_of_libudev_in_order(tree: SysfsTree, udev: Udev) -> None:
    assert [device.bdf for device in pci.devices(kernel=tree.kernel)] == [BDF, OTHER]
    assert udev.calls == [("list", "pci")]
    udev.names = [OTHER]
    assert [device.bdf for device in pci.devices(kernel=tree.kernel)] == [OTHER]


@pytest.mark.usefixtures("no_udev")
def test_without_libudev_the_directory_has_the_devices(tree: SysfsTree) -> None:
    assert [device.bdf for device in pci.devices(kernel=tree.kernel)] == [BDF, OTHER]


# -------------------------------------------------------------------------------------------------------------- events


def test_events_are_those_of_pci_alone_with_address_and_driver(tree: SysfsTree, udev: Udev) -> None:
    """Up to the first wait that nothing ends."""
    udev.events = [event("unbind"), event("bind", DRIVER="vfio-pci"), None, event("remove")]
    assert list(pci.monitor(timeout=0.5, kernel=tree.kernel)) == [
        pci.PciEvent("unbind", BDF, None),
        pci.PciEvent("bind", BDF, "vfio-pci"),
    ]
    assert udev.calls == [("netlink", "kernel"), ("filter", "pci"), ("start",), *[("poll", 0.5)] * 3]


def test_the_monitor_listens_from_the_call_on(tree: SysfsTree, udev: Udev) -> None:
    """Before the first event is asked for; without a time, for ever."""
    udev.events = [None]
    events = pci.monitor(source="udev", kernel=tree.kernel)
    assert udev.calls == [("netlink", "udev"), ("filter", "pci"), ("start",)]
    assert next(events, None) is None
    assert udev.calls[3:] == [("poll", None)]


@pytest.mark.usefixtures("no_udev")
def test_events_without_libudev_are_refused_at_the_call(tree: SysfsTree) -> None:
    with pytest.raises(UnsupportedError, match=r"^PCI events require libudev\. Install libudev: apt-get install"):
        pci.monitor(kernel=tree.kernel)


# -------------------------------------------------------------------------------------------------------------- rights


def test_rights_are_given_when_udevd_has_finished_with_the_node(tree: SysfsTree, udev: Udev) -> None:
    """A rule of the machine that came later would replace the rights."""
    udev.initialized = [DeviceNotFoundError(), False, True]
    assert give(tree, patience=60) == (pci.Ownership((tree.dev / "vfio/7").stat().st_uid, 4711, 0o660),)
    assert udev.calls == [("node", str(tree.dev / "vfio/7"))] * 3


def test_udevd_that_does_not_finish_is_told_and_the_rights_are_given(
    tree: SysfsTree, udev: Udev, caplog: pytest.LogCaptureFixture
) -> None:
    udev.initialized = [False]
    assert len(give(tree, patience=0)) == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"udevd has not finished with {tree.dev / 'vfio/7'}" in record.getMessage()


class HandledError(Exception):
    """Raised by a handler."""


@pytest.fixture
def press() -> Iterator[Callable[[], object]]:
    """Send this process the signal whose handler raises HandledError."""

    def handle(_number: int, _frame: object) -> None:
        raise HandledError

    former = signal.signal(signal.SIGINT, handle)
    yield lambda: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, former)


def test_a_wait_for_udevd_can_be_interrupted(tree: SysfsTree, udev: Udev, press: Callable[[], object]) -> None:
    """Between two looks; no right is given."""
    udev.initialized = [False, True]
    udev.asked = press
    given: list[object] = []
    with pytest.raises(HandledError):
        pci.bind(
            BDF,
            rights=pci.Rights(group=4711),
            patience=60,
            kernel=tree.kernel,
            write=tree.write,
            own=lambda *change: given.append(change),
        )
    assert (len(udev.calls), given) == (1, [])


def test_a_wait_for_a_node_can_be_interrupted(tree: SysfsTree, press: Callable[[], object]) -> None:
    """Before the minute is over."""
    (tree.dev / "vfio/7").unlink()
    timer = threading.Timer(0.05, press)
    timer.start()
    with pytest.raises(HandledError):
        give(tree, patience=60)
    timer.join()


def _no_udevd(tree: SysfsTree, _monkeypatch: pytest.MonkeyPatch) -> None:
    (tree.sysfs.parent / "control").unlink()


def _another_machine(_tree: SysfsTree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_RUNNING_SYSFS", Path("/elsewhere"))


def _no_libudev(_tree: SysfsTree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyudev", None)


@pytest.mark.parametrize("change", [_no_udevd, _another_machine, _no_libudev])
def test_nobody_is_waited_for_where_there_is_no_udevd_to_ask(
    tree: SysfsTree,
    udev: Udev,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[SysfsTree, pytest.MonkeyPatch], None],
) -> None:
    change(tree, monkeypatch)
    assert len(give(tree, patience=0)) == 1
    assert (udev.calls, caplog.records) == ([], [])
