#!/usr/bin/env python3
"""A small driver of an Intel 82574 network controller (QEMU's `e1000e`), recorded once and replayed without the device.

The driver resets the controller, reads the MAC address and the link status, and has the controller raise an interrupt.

    scripts/vm --kernel 6.12 --qemu-arg=-device --qemu-arg=e1000e,romfile= -- \\
        .venv/3.11/bin/python examples/e1000e.py --bind --record e1000e.record
    examples/e1000e.py --replay examples/e1000e.record       without any device: on the fake kernel
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pyvfio
from pyvfio import ioctls, pci
from pyvfio.cli.common import FAILED, OK, run
from pyvfio.kernel import LinuxKernel
from pyvfio.testing import FakeKernel, RecordedDevice

NAME = "e1000e"
E1000E_ID = (0x8086, 0x10D3)
BDF = "0000:00:02.0"
RECORD = Path(__file__).with_name("e1000e.record")
TIMEOUT = 60.0
# Section 10.2 of the data sheet of the 82574.
_CTRL, _STATUS, _ICR, _ICS, _IMS, _IMC = 0x0000, 0x0008, 0x00C0, 0x00C8, 0x00D0, 0x00D8
_IVAR, _CTRL_EXT, _RAL0, _RAH0 = 0x00E4, 0x0018, 0x5400, 0x5404
_CTRL_LINK_UP, _CTRL_RESET = 1 << 6, 1 << 26
_STATUS_LINK_UP = 1 << 1
_ADDRESS_VALID = 1 << 31
_CAUSE_OTHER = 1 << 24
_CAUSE_LINK = 1 << 2
_VECTOR_VALID = 8
_OTHER_AT = 16  # of the vector for other causes in IVAR
_ALL = 0xFFFF_FFFF


@dataclass
class Report:
    """The results of the driver. `mac`: the address in hexadecimal; `interrupts`: how often the vector was raised."""

    mac: str = ""
    link_up: bool = False
    interrupts: int = 0
    causes: int = 0

    @property
    def ok(self) -> bool:
        """Whether the controller has an address, and the interrupt came with its cause."""
        return len(self.mac) == 12 and self.interrupts > 0 and bool(self.causes & _CAUSE_LINK)


class E1000e:
    """The controller. Synchronization: none."""

    def __init__(self, device: pyvfio.Device) -> None:
        self._device = device
        device.memory_enabled = True
        self.bar = device.region(ioctls.VFIO_PCI_BAR0_REGION_INDEX)

    def reset(self) -> None:
        """Reset the controller, and mask all interrupts. Raises RegisterTimeoutError."""
        self.bar.write32(_IMC, _ALL)
        self.bar.write32(_CTRL, self.bar.read32(_CTRL) | _CTRL_RESET)
        self.bar.poll32(_CTRL, mask=_CTRL_RESET, value=0, timeout=TIMEOUT, interval=0.001)
        self.bar.write32(_IMC, _ALL)
        self.bar.read32(_ICR)
        self.bar.write32(_CTRL, self.bar.read32(_CTRL) | _CTRL_LINK_UP)

    def mac(self) -> bytes:
        """Return the address that the controller has read from its EEPROM. Raises VfioError if there is none."""
        low, high = self.bar.read32(_RAL0), self.bar.read32(_RAH0)
        if not high & _ADDRESS_VALID:
            raise pyvfio.VfioError(f"{self._device.bdf} has no address: RAH0 is {high:#010x}")
        return low.to_bytes(4, "little") + (high & 0xFFFF).to_bytes(2, "little")

    def link_up(self) -> bool:
        """Return whether a cable is connected."""
        return bool(self.bar.read32(_STATUS) & _STATUS_LINK_UP)

    def route(self) -> None:
        """Let causes that are not of queues raise vector 0."""
        self.bar.write32(_IVAR, _VECTOR_VALID << _OTHER_AT)

    def unmask(self) -> None:
        """Unmask the cause that a change of the link has."""
        self.bar.write32(_IMS, _CAUSE_OTHER | _CAUSE_LINK)

    def raise_interrupt(self) -> tuple[int, int]:
        """Have the controller raise MSI-X vector 0. Return how often the vector was raised, and the causes."""
        irq = self._device.irq(ioctls.VFIO_PCI_MSIX_IRQ_INDEX)
        irq.enable(1)
        self._device.bus_master = True
        self.route()
        self.unmask()
        self.bar.write32(_ICS, _CAUSE_OTHER | _CAUSE_LINK)
        times = irq.wait(timeout=TIMEOUT)
        causes = self.bar.read32(_ICR)
        self.bar.write32(_IMC, _ALL)
        self._device.bus_master = False
        irq.disable()
        return times, causes


def drive(device: pyvfio.Device, driver: type[E1000e] = E1000e) -> Report:
    """Run the driver once."""
    controller = driver(device)
    controller.reset()
    report = Report(mac=controller.mac().hex(), link_up=controller.link_up())
    report.interrupts, report.causes = controller.raise_interrupt()
    return report


@contextmanager
def replayed(record: Path) -> Iterator[pyvfio.Device]:
    """Open a device made of a record on a fake kernel. Raises DepartureError, also if the driver ends too early."""
    recorded = RecordedDevice(BDF, record)
    with FakeKernel(groups=[(2, [recorded])]) as kernel, pyvfio.open_device(BDF, kernel=kernel) as device:
        yield device
        recorded.check()


@contextmanager
def real(*, bind: bool, record: Path | None) -> Iterator[pyvfio.Device]:
    """Open the controller of this machine, and record the accesses. `bind`: bind the controller meanwhile."""
    kernel = LinuxKernel()
    found = [each.bdf for each in pci.devices(kernel=kernel) if (each.vendor, each.device) == E1000E_ID]
    if not found:
        raise pyvfio.VfioError(f"no device is {E1000E_ID[0]:04x}:{E1000E_ID[1]:04x}")
    with ExitStack() as stack:
        if bind:
            stack.callback(pci.restore, pci.bind(found[0], kernel=kernel))
        device = stack.enter_context(pyvfio.open_device(found[0]))
        if record is not None:
            stack.enter_context(device.record(record))
        yield device


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog=NAME, description=(__doc__ or "").splitlines()[0])
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--replay", metavar="FILE", type=Path, help="replay a record on a fake kernel")
    where.add_argument("--record", metavar="FILE", type=Path, help="record the accesses of this machine's controller")
    parser.add_argument("--bind", action="store_true", help="bind the controller to vfio-pci meanwhile; needs root")
    return parser


def main() -> int:
    """Run the driver, and print the report as JSON."""
    given = make_parser().parse_args()
    there = real(bind=given.bind, record=given.record) if given.replay is None else replayed(given.replay)
    with there as device:
        report = drive(device)
    print(json.dumps({**asdict(report), "ok": report.ok}))
    return OK if report.ok else FAILED


if __name__ == "__main__":
    run(main, name=NAME)
