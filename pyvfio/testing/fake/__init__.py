"""A fake kernel with VFIO that needs no device, no IOMMU and no privilege: `FakeKernel`, passed as `kernel=`.

The fake answers as Linux 6.1, 6.12 or 7.3 does, with the errno and the order of checks of that kernel. `tests/contract`
runs the same tests on the fake and on real kernels. Each file models one part of a kernel:

* `kernel` receives all calls, and `memory` those on process memory. `descriptors` finds the object behind a descriptor.
  `record` keeps the trace and the planned failures.
* `group` has containers and groups. `device`, `irqs` and `feature` have PCI devices, `hot_reset` has buses, `virqfd`
  has the eventfds that the kernel reads.
* `type1` and `dirty` have the IOMMU, `pins` has locked memory, `process` has the memory of this process. `dma` connects
  devices and memory, `machine` finds devices and opens nodes, and `tree` makes sysfs and /dev.
* `iommufd` has /dev/iommu, with the requests of containers in `iommufd_compat`. `ioas` has address spaces, `pages` the
  memory behind areas, `hwpt` page tables, and `cdev` the nodes of devices.
* `pci_device` is the base class for devices with behaviour, and `edu` models the device of QEMU. `recorded` makes a
  device from a record, and `replay` compares accesses with the record. `declaration` checks declarations. `versions`
  has all differences between kernels. `unmodelled` lists requests that the fake accepts without effect.

Not modelled. The fake refuses an unknown request as a kernel refuses an unknown request, and `FakeKernel.unmodelled`
lists the requests of a driver that are not modelled:

* nested translation: type 6 of an `IommuModel` that nests behaves as type1 v2.
* devices: no ROM, no VGA, and no MSI-X table in a mapped BAR. Configuration space has only the capabilities that a
  device declares as bytes. Only declared virtual functions exist, and a write to sriov_numvfs changes nothing. Every
  bus but bus 0 can be reset.
* devices: an ioeventfd is accepted and does nothing when signalled. In low power a device keeps its state. A DMA-buf
  is a file of the right size, and no driver imports the file. A raw mapping of a BAR is memory without side
  effects. After the descriptor is closed, a register window keeps the memory of the device, but not the group.
* configuration space: memory BARs are 32-bit BARs. In `sysfs` configuration space is as after power-on.
* memory that is changed past the seam: `FakeKernel.check` and DMA find memory that is gone or has lost access rights.
  They cannot see memory that was replaced (mmap with MAP_FIXED, mremap onto the memory) or discarded (MADV_DONTNEED,
  MADV_FREE) past the seam. Changes through the seam by another path to a file stay unseen too: another mapping of the
  same memfd, fallocate, ftruncate (DMA finds the part behind the end).
* live update: between VFIO_DMA_UNMAP_FLAG_VADDR and VFIO_DMA_MAP_FLAG_VADDR a real device still reaches its pages. On
  the fake, DMA raises NotImplementedError once the memory at the old address is gone.
* dirty pages: every mapped page is always dirty, as with all devices that cannot report writes.
* an eventfd that unmasks INTx: a kernel forgets the eventfd when the last descriptor is closed. The fake keeps the
  eventfd.
* pinning: if the running kernel is older than 6.11, a shared writable file on a disk can be mapped for writing, which
  kernels refuse from 6.12 on. Never-written memory mapped for reading is coherent on 6.1 too, where a real device still
  reads zeros. If MADV_POPULATE_* is not available (kernels before 5.14), only the rights in /proc/self/maps are
  checked. Memory that the process locks with mlock is not counted. Process addresses are below 2^47, as with page
  tables of four levels.
* memory that was unmapped under a mapping: a real device still reaches the old pages. On the fake, a device reaches the
  memory that is at the address now. The violation is recorded.
* a mapping that ends at 2^64 (virtio, amd): on every version the fake finds the mapping by the bytes and unpins the
  memory. 6.x kernels lose the mapping, and the memory stays locked.
* iommufd: no nested translation, fault queues, virtual IOMMUs or PASIDs. A group takes no iommufd as container. A
  DMA-buf maps as a memory file. A file that is sealed against writing can be mapped for device writes, but a write of
  a device then raises AssertionError. Only writes of a device mark pages dirty.
* no-IOMMU mode: physical addresses are made up, and a released page leaves its address to the memory that comes there.
* no mediated devices, one IOMMU for all groups, one process. In a forked child ioctls raise
  RuntimeError.
"""

from pyvfio.testing.fake.device import Bar, FakeDevice
from pyvfio.testing.fake.dma import DmaFault
from pyvfio.testing.fake.edu import FakeEdu
from pyvfio.testing.fake.iommu import IommuModel
from pyvfio.testing.fake.kernel import FakeKernel
from pyvfio.testing.fake.pci_device import FakePciDevice
from pyvfio.testing.fake.pins import Mapped, Violation
from pyvfio.testing.fake.record import Call
from pyvfio.testing.fake.recorded import DepartureError, RecordedDevice
from pyvfio.testing.fake.unmodelled import Unmodelled
from pyvfio.testing.fake.versions import VERSIONS

__all__ = [
    "VERSIONS",
    "Bar",
    "Call",
    "DepartureError",
    "DmaFault",
    "FakeDevice",
    "FakeEdu",
    "FakeKernel",
    "FakePciDevice",
    "IommuModel",
    "Mapped",
    "RecordedDevice",
    "Unmodelled",
    "Violation",
]
