"""The example of a launcher, examples/launcher.py, as far as a fake kernel goes: both parts in one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import launcher
import pyvfio
from pyvfio.testing import FakeKernel
from pyvfio.units import MIB
from tests.unit.fakes import nothing_left

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/launcher.py"


@pytest.mark.long
def test_both_parts_run_on_the_fake_kernel() -> None:
    """As a program."""
    done = subprocess.run([sys.executable, str(EXAMPLE), "--fake"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"ok": True, "uid": os.getuid(), "moved": True, "refused": True}


def test_a_driver_whose_limit_is_none_is_not_refused() -> None:
    """So that the other test can fail."""
    with FakeKernel() as kernel, nothing_left(kernel):
        device = pyvfio.open_device(kernel.bdfs[0], kernel=kernel)
        message, fds = launcher.offer(device)
        driven = launcher.accept(message, [kernel.dup(fd) for fd in fds], kernel=kernel)
        with driven.container:
            assert not launcher.drive(driven).refused
        assert not device.closed
        device.close()


def test_the_launcher_can_stop_the_device_when_the_driver_has_ended() -> None:
    """Its own objects are usable throughout; a driver that closes its share takes nothing from them."""
    with FakeKernel() as kernel, nothing_left(kernel), pyvfio.open_device(kernel.bdfs[0], kernel=kernel) as device:
        kernel.memlock_limit = MIB
        message, fds = launcher.offer(device)
        driven = launcher.accept(message, [kernel.dup(fd) for fd in fds], kernel=kernel)
        with driven.container:
            assert launcher.drive(driven).ok
        assert driven.closed
        assert device.config.read16(0) == 0x1234
        assert not device.bus_master


def test_descriptors_travel_over_a_socket_with_what_they_are() -> None:
    """They are closed on exec."""
    ours, theirs = socket.socketpair()
    with ours, theirs, open(os.devnull, encoding="utf-8") as file:
        socket.send_fds(ours, [b'{"bdf": "0000:00:03.0", "group": 3}'], [file.fileno()] * launcher.DESCRIPTORS)
        offered, fds = launcher.receive(theirs)
        assert offered == launcher.Offer("0000:00:03.0", 3)
        assert len(fds) == launcher.DESCRIPTORS
        assert not any(map(os.get_inheritable, fds))
        for fd in fds:
            os.close(fd)


def test_a_wrong_order_of_descriptors_is_refused() -> None:
    """Each says what it is not, and stays the driver's."""
    with FakeKernel() as kernel, pyvfio.open_device(kernel.bdfs[0], kernel=kernel) as device:
        message, fds = launcher.offer(device)
        with pytest.raises(ValueError, match="is not an IOMMU group"):
            launcher.accept(message, [fds[1], fds[0], fds[2]], kernel=kernel)
