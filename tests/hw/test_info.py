"""`pyvfio info` of a device beside the same facts by VFIO."""

from __future__ import annotations

import json
from typing import Any

import pytest

import pyvfio
from pyvfio.cli import info
from pyvfio.kernel import Kernel


def told(kernel: Kernel, bdf: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The device in the JSON document."""
    assert info.main([bdf, "--json"], kernel=kernel) == 0
    (found,) = json.loads(capsys.readouterr().out)["devices"]
    assert isinstance(found, dict)
    return found


def test_an_open_device_is_in_use_and_has_the_capabilities_that_vfio_shows(
    device: pyvfio.Device, kernel: Kernel, capsys: pytest.CaptureFixture[str]
) -> None:
    """VFIO hides some capabilities. sysfs shows all."""
    found = told(kernel, device.bdf, capsys)
    shown = {(each["extended"], each["id"], each["offset"]) for each in found["capabilities"]}
    capabilities = device.capabilities
    assert {(False, each.id, each.offset) for each in capabilities.standard} <= shown
    assert {(True, each.id, each.offset) for each in capabilities.extended} <= shown
    assert (found["is_vfio"], found["group_viable"]) == (True, True)


@pytest.mark.real_kernel("a fake device has no resources in sysfs")
def test_the_bars_are_those_that_vfio_shows(
    device: pyvfio.Device, kernel: Kernel, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sizes in bytes. The device is held by this process, so its state is "in use"."""
    found = told(kernel, device.bdf, capsys)
    sizes = {bar["number"]: bar["size"] for bar in found["bars"] if bar["number"] < 6}
    assert sizes
    assert sizes == {number: device.region(number).size for number in range(6) if device.region(number).size}
    assert found["state"] == "in use"
    assert [holder["is_this_process"] for holder in found["group_holders"]] == [True]
