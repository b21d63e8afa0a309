"""Arguments that many public calls share are refused in the same words, before anything is done."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module

import pytest

import pyvfio
from pyvfio import pci
from pyvfio.testing import FakeKernel
from tests.unit.fakes import BDF, OTHER_BDF

np = import_module("numpy")  # without types: numbers of numpy are no ints for a type checker

REST: Mapping[str, object] = {
    "bdf": BDF,
    "etc": "/nonexistent",
    "fd": 0,
    "fds": [],
    "group": 2,
    "number": 2,
    "state": b"{}",
}
"""Arguments that such a call needs besides `kernel`, by name."""
APART = {"holders_of", "comes_later", "restore", "monitor", "Diagnosis"}
"""Calls that need another object first, a generator, and a snapshot."""


def _takers() -> list[Callable[..., object]]:
    """Return the public calls that take a kernel, found by inspection."""
    names: list[str] = vars(pyvfio)["__all__"]
    known = {name: getattr(pyvfio, name) for name in names} | {name: getattr(pci, name) for name in pci.__all__}
    return [
        call
        for name, call in known.items()
        if callable(call)
        and name not in APART
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
@pytest.mark.parametrize("value", ["off", "False", None, 2, -1, [], np.array([0, 1]), np.array([True])], ids=repr)
def test_a_switch_takes_true_and_false_alone(device: pyvfio.Device, name: str, value: object) -> None:
    """The text "off" would be true, and would let a device do DMA."""
    assert device.config.size
    device.kernel.clear_trace()  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=f"^{name.strip()} must be True or False, not "):
        SWITCHES[name](device, value)
    assert device.kernel.trace == []  # type: ignore[attr-defined]
    assert device.bus_master is False


@pytest.mark.parametrize("name", ["bus_master", "memory_enabled"])
def test_a_switch_of_the_device_takes_a_bit_as_well(device: pyvfio.Device, name: str) -> None:
    """As C programs write it, and as numpy compares."""
    for on, off in ((1, 0), (np.True_, np.False_), (np.uint8(1), np.uint8(0))):
        setattr(device, name, on)
        assert getattr(device, name) is True
        setattr(device, name, off)
        assert getattr(device, name) is False


def test_a_snapshot_clears_on_true_alone(device: pyvfio.Device) -> None:
    """Pages that are marked clean are not copied again."""
    with pyvfio.RamBlockList(kernel=device.kernel) as blocks, pyvfio.DirtyLog(blocks) as log:
        ring = blocks.add("ring", used_length=4096, max_length=4096)
        with pytest.raises(TypeError, match="clear must be True or False"):
            log.snapshot(ring, clear="no")  # type: ignore[arg-type]
        assert log.snapshot(ring).dirty


class _Calls:
    """The public calls on a device that take a number, by the name of the number."""

    def __init__(self, device: pyvfio.Device) -> None:
        bar = device.region(0)
        irq = device.irq(pyvfio.ioctls.VFIO_PCI_MSI_IRQ_INDEX)
        irq.enable(1)
        blocks = pyvfio.RamBlockList(kernel=device.kernel)
        self.calls: list[tuple[str, Callable[[int], object]]] = [
            ("index", device.region),
            ("index", device.irq),
            ("number", device.feature),
            *(("offset", getattr(bar, f"read{bits}")) for bits in (8, 16, 32, 64)),
            *(("offset", getattr(device.config, f"read{bits}")) for bits in (8, 16, 32, 64)),
            *(("offset", getattr(bar, f"register{bits}")) for bits in (8, 16, 32, 64)),
            *(("value", partial(getattr(bar, f"write{bits}"), 0)) for bits in (8, 16, 32, 64)),
            ("value", bar.register32(4).write),
            ("offset", lambda offset: bar.write32(offset, 0)),
            ("offset", lambda offset: bar.read(offset, 4)),
            ("size", lambda size: bar.read(0, size)),
            ("offset", lambda offset: bar.write(offset, b"")),
            ("offset", lambda offset: bar.mmap(offset, 4096)),
            ("size", lambda size: bar.mmap(0, size)),
            ("mask", lambda mask: bar.poll32(0, mask=mask, value=0, timeout=0)),
            ("value", lambda value: bar.poll32(0, value=value, timeout=0)),
            ("vector", lambda vector: irq.wait(vector, timeout=0)),
            ("a vector", lambda vector: irq.wait_any([vector], timeout=0)),
            ("vector", irq.trigger),
            ("vaddr", blocks.block_at),
            ("fd", lambda fd: pyvfio.Device.from_fd(device.group, BDF, fd)),
        ]


@pytest.mark.parametrize("number", [0x10 / 4, "4", None, b"4", [4]])
def test_a_number_that_is_none_is_refused_with_the_name_of_the_argument(device: pyvfio.Device, number: object) -> None:
    """As a division with one slash gives it. Python alone would not say which argument is meant."""
    for name, call in _Calls(device).calls:
        if number is None and name == "size":
            continue  # to the end
        with pytest.raises(TypeError, match=f"^{name} must be a whole number, not "):
            call(number)  # type: ignore[arg-type]


def test_a_number_may_be_of_numpy_and_a_switch_may_be_written(device: pyvfio.Device) -> None:
    """A register of one bit is a switch."""
    bar = device.region(0)
    bar.write32(np.uint64(4), np.int8(1))
    assert bar.read32(np.int32(4)) == 0xFFFFFFFE
    bar.write32(4, True)  # noqa: FBT003
    assert bar.read32(4) == 0xFFFFFFFE


def test_a_long_wrong_argument_is_cut_in_the_error(device: pyvfio.Device) -> None:
    """The repr of an array has many lines."""
    with pytest.raises(TypeError) as refused:
        device.region(0).read32(list(range(1000)))  # type: ignore[arg-type]
    assert str(refused.value).startswith("offset must be a whole number, not list: [0, 1, 2")
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("timeout", [[], object(), "1"])
def test_a_timeout_that_is_no_number_is_named(device: pyvfio.Device, timeout: object) -> None:
    """And not only float()'s complaint."""
    irq = device.irq(pyvfio.ioctls.VFIO_PCI_MSI_IRQ_INDEX)
    irq.enable(1)
    for wait in (irq.wait, irq.wait_any, partial(device.region(0).poll32, 0, value=0)):
        with pytest.raises(TypeError, match=r"^timeout is a number of seconds"):
            wait(timeout=timeout)  # type: ignore[arg-type]


@pytest.mark.parametrize("items", [0, 1.5, None])
def test_one_object_where_several_are_wanted_is_refused_by_name(device: pyvfio.Device, items: object) -> None:
    """Not as something that is not iterable, deep inside."""
    irq = device.irq(pyvfio.ioctls.VFIO_PCI_MSI_IRQ_INDEX)
    calls: Mapping[str, Callable[[], object]] = {
        "vectors": lambda: irq.wait_any(items, timeout=0),  # type: ignore[arg-type]
        "ranges": lambda: device.dma_buf(device.region(0), items),  # type: ignore[arg-type]
        "fds": lambda: pyvfio.take_over(b"{}", items, kernel=device.kernel),  # type: ignore[arg-type]
    }
    for name, call in calls.items():
        if items is None and name != "fds":
            continue  # all of them
        with pytest.raises(TypeError, match=f"^{name} must be a list or another iterable, not "):
            call()


@pytest.mark.parametrize("version", [6.12, ["6.12"], None, "6.8"])
def test_a_version_that_the_fake_does_not_have_is_refused_with_those_it_has(version: object) -> None:
    """Of whatever class."""
    with pytest.raises(ValueError, match=r"the fake can be 6\.1, 6\.12, 7\.3"):
        FakeKernel(version)  # type: ignore[arg-type]


def test_the_holders_of_a_file_are_found_by_text_too(device: pyvfio.Device) -> None:
    """As open() takes a name."""
    with open("/dev/null", encoding="utf-8"):
        assert any(holder.is_this_process for holder in pci.holders_of("/dev/null", kernel=device.kernel))
    with pytest.raises(TypeError, match="PathLike"):
        pci.holders_of(3, kernel=device.kernel)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("busmaster", "bus_master"),
        ("bus_mastering", "bus_master"),
        ("memory_enable", "memory_enabled"),
        ("mem_enabled", "memory_enabled"),
    ],
)
def test_a_misspelt_switch_of_a_device_is_refused(device: pyvfio.Device, misspelt: str, meant: str) -> None:
    """As a new attribute it would do nothing, and interrupts would be lost without an error."""
    with pytest.raises(AttributeError, match=f"no attribute '{misspelt}'; you mean {meant}"):
        setattr(device, misspelt, True)
    device.driver = "mine"  # type: ignore[attr-defined]
