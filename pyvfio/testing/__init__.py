"""Tools for tests of programs on pyvfio: a fake kernel with VFIO, which needs no hardware, and fake devices."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyvfio.testing.fake import DepartureError, DmaFault, FakeEdu, FakeKernel, FakePciDevice, RecordedDevice
else:
    # As in pyvfio itself: the plugin is imported by every pytest.
    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module 'pyvfio.testing' has no attribute {name!r}")
        return getattr(import_module("pyvfio.testing.fake"), name)

    def __dir__():
        return sorted({*globals(), *__all__})


__all__ = ["DepartureError", "DmaFault", "FakeEdu", "FakeKernel", "FakePciDevice", "RecordedDevice"]
