"""A kernel with VFIO that needs no device, no IOMMU and no privilege: `FakeKernel`, handed in as `kernel=`.

It answers as Linux 6.1, 6.12 or 7.3 does, errno by errno and in the kernel's order of checks; `tests/contract` holds
fake and real kernels to the same sentences. A file for each thing that a kernel has: `kernel` takes the calls, `group`
has containers and groups, `device` and `irqs` PCI devices, `type1` the IOMMU, `pins` locked memory, `process` the
memory of this process, `tree` sysfs and /dev, `dma` what devices do; `versions` has all that differs between kernels.

Not modelled. What the fake does not know, it refuses as a kernel refuses what it does not know:

* VFIO_IOMMU_DIRTY_PAGES is ENOTTY; the flags GET_DIRTY_BITMAP and VADDR of map and unmap are EINVAL, and the extension
  VFIO_UPDATE_VADDR is 0 (a kernel has them). Nested translation (type 6) is type1 v2.
* devices: hot reset, ioeventfd and features are ENOTTY; no ROM, VGA, IO BARs, capabilities in configuration space,
  virtual functions; an eventfd that unmasks INTx is ENOTTY; the level of the INTx line; the MSI-X table; the bus master
  bit does not stop DMA; a register window keeps its device's memory, but not its group, after the descriptor is closed.
* pinning: a shared writable file on a disk file system may be mapped (refused from 6.12 on), BAR memory is charged like
  other memory, never-written memory mapped for reading is charged and coherent on 6.1 too, and a process that is not
  allowed MADV_POPULATE_* (kernels before 5.14) is asked for the rights in /proc/self/maps only.
* after memory was taken away under a mapping a real device still reaches the old pages; here it reaches what is at the
  address now. The violation is on record.
* a mapping that ends at 2^64 is found by its bytes on every version; 6.x kernels miss it in places.
* no iommufd, no device nodes without groups, no no-IOMMU mode, no mediated devices, one IOMMU for all groups, one
  process; ioctls in a forked child are a RuntimeError.
"""

from pyvfio.testing.fake.device import Bar, FakeDevice
from pyvfio.testing.fake.dma import DmaFault
from pyvfio.testing.fake.iommu import IommuModel
from pyvfio.testing.fake.kernel import FakeKernel
from pyvfio.testing.fake.pins import Mapped, Violation
from pyvfio.testing.fake.record import Call
from pyvfio.testing.fake.versions import VERSIONS

__all__ = ["VERSIONS", "Bar", "Call", "DmaFault", "FakeDevice", "FakeKernel", "IommuModel", "Mapped", "Violation"]
