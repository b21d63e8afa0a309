#!/usr/bin/env python3
"""A driver's loop for INTx, the interrupt that is a level: it stays up until the driver has dealt with its causes.

The kernel masks INTx when it signals the eventfd, and signals nothing more until INTx is unmasked. A write to a second
eventfd unmasks it. Where the line is still up then, the kernel signals the first one again, so that no cause is lost.

The device is QEMU's `edu`: register 0x60 raises causes, 0x24 shows them, 0x64 acknowledges them.

    examples/intx.py --fake                                  without any device: on the fake kernel
    examples/intx.py --bind                                  as root, on this machine's edu
    scripts/vm -- .venv/3.11/bin/python examples/intx.py --bind
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

import pyvfio
from pyvfio import ioctls, pci
from pyvfio.cli.common import FAILED, OK, run, selector_argument
from pyvfio.kernel import LinuxKernel
from pyvfio.testing import FakeEdu, FakeKernel

NAME = "intx"
CAUSES = 0b101
TIMEOUT = 60.0
SILENCE = 0.05
_STATUS, _RAISE, _ACKNOWLEDGE = 0x24, 0x60, 0x64


@dataclass
class Report:
    """What was seen. `signals` counts interrupts, `causes` those that were acknowledged; `left`: interrupts that came
    after the last cause was dealt with."""

    rounds: int = 0
    signals: int = 0
    causes: int = 0
    left: int = 0

    @property
    def ok(self) -> bool:
        """One interrupt for each cause, and none without."""
        return self.signals == self.causes == self.rounds * CAUSES.bit_count() and not self.left


class Line:
    """INTx of an edu. A context manager. Synchronization: none.

    The eventfds are the program's own: an event loop can have them, or another process.
    """

    def __init__(self, device: pyvfio.Device) -> None:
        with ExitStack() as stack:
            device.memory_enabled = True
            self._registers = device.region(ioctls.VFIO_PCI_BAR0_REGION_INDEX)
            self._irq = device.irq(ioctls.VFIO_PCI_INTX_IRQ_INDEX)
            self.raised, self.handled = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
            stack.callback(os.close, self.raised)
            stack.callback(os.close, self.handled)
            stack.callback(self._irq.disable)
            self._irq.enable(fds=[self.raised])
            self._irq.unmask_by(self.handled)
            self._stack = stack.pop_all()

    def raise_causes(self, causes: int) -> None:
        """Let the device pull up its line."""
        self._registers.write32(_RAISE, causes)

    def wait(self, timeout: float) -> int:
        """Wait for an interrupt; 0 when the time has passed."""
        return self._irq.wait(timeout=timeout)

    def handle_one(self) -> int:
        """Deal with one cause, the lowest, and unmask the line; 0 where there is none.

        The line goes down with its last cause, and the kernel signals again where it is up.
        """
        causes = self._registers.read32(_STATUS)
        cause = causes & -causes
        self._registers.write32(_ACKNOWLEDGE, cause)
        os.eventfd_write(self.handled, 1)
        return cause

    def close(self) -> None:
        """Disable the interrupt, and close the eventfds."""
        self._stack.close()

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def serve(device: pyvfio.Device, rounds: int) -> Report:
    """Raise all of `CAUSES` at once, so often, and deal with one at each interrupt.

    Raises VfioError where an interrupt does not come.
    """
    report = Report()
    with Line(device) as line:
        while report.rounds < rounds:
            line.raise_causes(CAUSES)
            for _ in range(CAUSES.bit_count()):
                if not (times := line.wait(TIMEOUT)):
                    raise pyvfio.VfioError(f"{device.bdf} raised no interrupt in {TIMEOUT:.0f} seconds")
                report.signals += times
                report.causes += bool(line.handle_one())
            report.rounds += 1
        report.left = line.wait(SILENCE)
    return report


# ------------------------------------------------------------------------------------------------------- the program


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog=NAME, description="Deals with the level-triggered interrupts of an edu.")
    made.add_argument(
        "device",
        nargs="?",
        default="1234:11e8",
        type=selector_argument,
        metavar="BDF",
        help="bound to vfio-pci; default: the first edu (1234:11e8)",
    )
    made.add_argument("--rounds", type=int, default=100, metavar="N", help="default: %(default)s")
    made.add_argument("--bind", action="store_true", help="bind the device to vfio-pci first, and give it back after")
    made.add_argument("--fake", action="store_true", help="on the fake kernel, with a fake device")
    made.add_argument("--json", action="store_true", help="for programs")
    return made


@contextmanager
def opened(options: argparse.Namespace) -> Iterator[pyvfio.Device]:
    """The device that the command line means."""
    with ExitStack() as stack:
        if options.fake:
            fake = stack.enter_context(FakeKernel(groups=[(2, [FakeEdu("0000:00:02.0")])]))
            yield stack.enter_context(pyvfio.open_device(fake.bdfs[0], kernel=fake))
            return
        kernel = LinuxKernel()
        found = [device.bdf for device in pci.devices(kernel=kernel) if options.device(device)]
        if not found:
            raise pyvfio.DeviceNotFoundError("there is no such device", hint="pyvfio list shows all there are")
        if options.bind:
            stack.callback(pci.restore, pci.bind(found[0], kernel=kernel), kernel=kernel)
        yield stack.enter_context(pyvfio.open_device(found[0], kernel=kernel))


def main() -> int:
    """Serve, and say what was seen; status 1 when an interrupt was lost, or came without a cause."""
    options = parser().parse_args()
    with opened(options) as device:
        report = serve(device, options.rounds)
    if options.json:
        print(json.dumps({"ok": report.ok, **asdict(report)}))
    else:
        print(f"{report.signals} interrupts for {report.causes} causes in {report.rounds} rounds, {report.left} left")
    return OK if report.ok else FAILED


if __name__ == "__main__":
    run(main, name=NAME)
