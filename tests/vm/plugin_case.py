"""A test that fails, for test_recording.py: the report has the last accesses and the faults of a real device."""

from __future__ import annotations

import pyvfio
from pyvfio.testing.edu import Edu

UNMAPPED = 0x123000


def test_the_device_reads_memory_that_is_not_mapped(vfio_device: pyvfio.Device) -> None:
    """The data in the device stays, so nothing but the log of the kernel tells."""
    vfio_device.bus_master = True
    Edu(vfio_device.region(0)).read_memory(UNMAPPED, 8)
    assert vfio_device.region(0).read32(0) == 0
