"""Arguments that many public calls share are refused in the same words, before anything is done."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping

import pytest

import pyvfio
from pyvfio import pci
from pyvfio.testing import FakeKernel
from tests.unit.fakes import BDF, OTHER_BDF

REST: Mapping[str, object] = {"bdf": BDF, "etc": "/nonexistent", "fd": 0, "fds": [], "group": 2, "state": b"{}"}
"""Arguments that such a call needs besides `kernel`, by name."""
NOT_YET = {
    "Container",
    "Group",
    "devices",
    "read_device",
    "holders_of",
    "comes_later",
    "restore",
    "monitor",
    "Diagnosis",
}
"""Calls that use `kernel` in other modules, calls that need another object first, and a snapshot."""


def _takers() -> list[Callable[..., object]]:
    """Return the public calls that take a kernel, found by inspection."""
    names: list[str] = vars(pyvfio)["__all__"]
    known = {name: getattr(pyvfio, name) for name in names} | {name: getattr(pci, name) for name in pci.__all__}
    return [
        call
        for name, call in known.items()
        if callable(call)
        and name not in NOT_YET
        and not (inspect.isclass(call) and issubclass(call, BaseException))
        and "kernel" in _parameters(call)
    ]


def _parameters(call: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(call).parameters
    except (TypeError, ValueError):  # a class or an alias without a signature
        return {}


@pytest.mark.parametrize("call", _takers(), ids=lambda call: call.__name__)
@pytest.mark.parametrize("kernel", ["6.12", FakeKernel, 0, ""])
def test_another_object_than_a_kernel_is_refused_by_name(call: Callable[..., object], kernel: object) -> None:
    """A version, and the class without parentheses, are likely slips. No object means the running kernel but None."""
    needed = {
        name: REST[name]
        for name, parameter in _parameters(call).items()
        if parameter.default is parameter.empty and name in REST
    }
    with pytest.raises(TypeError, match=r"kernel must be a Kernel, such as FakeKernel\(\), or None"):
        call(**needed, kernel=kernel)


@pytest.fixture
def device() -> Iterator[pyvfio.Device]:
    """An open device on a fake kernel."""
    with FakeKernel() as kernel, pyvfio.open_device(BDF, kernel=kernel) as opened:
        yield opened


def test_a_space_of_another_kernel_is_refused(device: pyvfio.Device) -> None:
    """And the kernel of the space is accepted."""
    with FakeKernel() as other, pytest.raises(ValueError, match="leave kernel= out"):
        pyvfio.open_device(OTHER_BDF, space=device.space, kernel=other)
    pyvfio.open_device(OTHER_BDF, space=device.space, kernel=device.kernel).close()


SWITCHES: Mapping[str, Callable[[pyvfio.Device, object], object]] = {
    "bus_master": lambda device, value: setattr(device, "bus_master", value),
    "memory_enabled": lambda device, value: setattr(device, "memory_enabled", value),
    "on": lambda device, value: device.config.change16(4, 4, on=value),  # type: ignore[arg-type]
    "force": lambda device, value: device.config.write16(4, 0, force=value),  # type: ignore[arg-type]
    "force ": lambda device, value: device.drop_windows(force=value),  # type: ignore[arg-type]
    "on_fault": lambda device, value: pyvfio.lock_all_memory(on_fault=value, kernel=device.kernel),  # type: ignore[arg-type]
    "dry_run": lambda device, value: pci.bind(BDF, dry_run=value, kernel=device.kernel),  # type: ignore[arg-type]
    "force  ": lambda device, value: pci.unbind(BDF, force=value, kernel=device.kernel),  # type: ignore[arg-type]
    "dry_run ": lambda device, value: pci.persist(BDF, dry_run=value, kernel=device.kernel),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", ["off", "False", None, 0, 1, []])
def test_a_switch_takes_true_and_false_alone(device: pyvfio.Device, name: str, value: object) -> None:
    """The text "off" would be true, and would let a device do DMA."""
    assert device.config.size
    device.kernel.clear_trace()  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=f"^{name.strip()} must be True or False, not "):
        SWITCHES[name](device, value)
    assert device.kernel.trace == []  # type: ignore[attr-defined]
    assert device.bus_master is False


def test_a_snapshot_clears_on_true_alone(device: pyvfio.Device) -> None:
    """Pages that are marked clean are not copied again."""
    with pyvfio.RamBlockList(kernel=device.kernel) as blocks, pyvfio.DirtyLog(blocks) as log:
        ring = blocks.add("ring", used_length=4096, max_length=4096)
        with pytest.raises(TypeError, match="clear must be True or False"):
            log.snapshot(ring, clear="no")  # type: ignore[arg-type]
        assert log.snapshot(ring).dirty
