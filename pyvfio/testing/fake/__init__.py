"""A kernel with VFIO that needs no device, no IOMMU and no privilege: `FakeKernel`, handed in as `kernel=`.

It answers as Linux 6.1, 6.12 or 7.3 does, errno by errno and in the kernel's order of checks; `tests/contract` holds
fake and real kernels to the same sentences. A file for each thing that a kernel has: `kernel` takes the calls, those on
memory in `memory`, `descriptors` knows who answers for which, and `record` how each call passes and which are to fail;
`group` has containers and groups, `device`, `irqs` and `feature` PCI devices, `type1` and `dirty` the IOMMU, `pins`
locked memory, `process` the memory of this process, `tree` sysfs and /dev, `dma` what lies between devices and memory,
`hot_reset` buses, `virqfd` eventfds that the kernel listens to; `unmodelled` knows what the fake only seems to do;
`pci_device` is the base class for devices that do something, and `edu` QEMU's; `declaration` says how all are declared,
and `versions` has all that differs between kernels.

Not modelled. What the fake does not know, it refuses as a kernel refuses what it does not know, and `FakeKernel.
unmodelled` has what a driver asked of it:

* nested translation: type 6 of an `IommuModel` that nests is type1 v2.
* devices: no ROM, VGA, capabilities in configuration space but those that a device gives as bytes, MSI-X table in a BAR
  that is mapped; no virtual functions but those that are declared (sriov_numvfs changes nothing); every bus but bus 0
  can be reset; an ioeventfd and an eventfd that unmasks INTx are taken, and do nothing when they are signalled; in low
  power a device keeps its state; a DMA-buf is a file of the right size, and no driver takes it; a raw mapping of a BAR
  is memory without side effects; a register window keeps its device's memory, but not its group, after the descriptor
  is closed.
* configuration space: BARs of memory are 32-bit ones; what `sysfs` shows of it is as after power-on.
* memory that goes past the seam: `FakeKernel.check` and DMA find what is not there or lost its rights. They cannot see
  memory that was replaced (mmap with MAP_FIXED, mremap onto it) or discarded (MADV_DONTNEED, MADV_FREE) past it, and
  through the seam they cannot see what is done to a file by another way to it: another mapping of the same memfd,
  fallocate, ftruncate (DMA finds what lies behind the end).
* a live update: between VFIO_DMA_UNMAP_FLAG_VADDR and VFIO_DMA_MAP_FLAG_VADDR a real device goes on reaching its pages;
  here, DMA is a NotImplementedError once the memory at the old address is gone.
* dirty pages: every mapped page always is, as with all devices that cannot report what they wrote.
* an eventfd that unmasks INTx is forgotten by a kernel when its last descriptor is closed; here it stays.
* pinning: where the running kernel is older than 6.11, a shared writable file on a disk may be mapped for writing
  (refused from 6.12 on). Never-written memory mapped for reading is coherent on 6.1 too (a device there goes on reading
  zeros). A process that is not allowed MADV_POPULATE_* (kernels before 5.14) is asked for the rights in /proc/self/maps
  only. What the process itself locks with mlock is not counted. A process has addresses below 2^47, as with page
  tables of four levels.
* after memory was taken away under a mapping a real device still reaches the old pages; here it reaches what is at the
  address now. The violation is on record.
* a mapping that ends at 2^64 (virtio, amd) is found by its bytes on every version, and given back; 6.x kernels lose it,
  and the memory locked for it for ever.
* no iommufd, no device nodes without groups, no no-IOMMU mode, no mediated devices, one IOMMU for all groups, one
  process; ioctls in a forked child are a RuntimeError.
"""

from pyvfio.testing.fake.device import Bar, FakeDevice
from pyvfio.testing.fake.dma import DmaFault
from pyvfio.testing.fake.edu import FakeEdu
from pyvfio.testing.fake.iommu import IommuModel
from pyvfio.testing.fake.kernel import FakeKernel
from pyvfio.testing.fake.pci_device import FakePciDevice
from pyvfio.testing.fake.pins import Mapped, Violation
from pyvfio.testing.fake.record import Call
from pyvfio.testing.fake.unmodelled import Unmodelled
from pyvfio.testing.fake.versions import VERSIONS

__all__ = [
    "VERSIONS",
    "Bar",
    "Call",
    "DmaFault",
    "FakeDevice",
    "FakeEdu",
    "FakeKernel",
    "FakePciDevice",
    "IommuModel",
    "Mapped",
    "Unmodelled",
    "Violation",
]
