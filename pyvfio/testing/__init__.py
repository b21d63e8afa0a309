"""What tests of programs on pyvfio can use: a kernel with VFIO that needs no hardware."""

from pyvfio.testing.fake import FakeKernel

__all__ = ["FakeKernel"]
