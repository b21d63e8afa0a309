"""Every call goes through guard.py: no other module takes a lock, asks for the pid or looks at signals."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator

import pytest

from tests.interruptions.public import OWN, stateful
from tests.unit.test_layering import SOURCES

_FORBIDDEN = {
    "threading": {"Lock", "RLock", "Condition", "Semaphore", "BoundedSemaphore", "Barrier"},
    "os": {"getpid", "register_at_fork"},
    "signal": {"signal", "getsignal", "pthread_sigmask", "set_wakeup_fd"},
}
_FREE = ("testing", "cli", "guard", "__main__")


def _names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Each use of a module's name: `module.name`, or `name` imported from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield node.value.id, node.attr
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.module or "", alias.name


def forbidden(source: str) -> list[str]:
    """What only guard.py may do, in the source of a module."""
    return [f"{module}.{name}" for module, name in _names(ast.parse(source)) if name in _FORBIDDEN.get(module, ())]


GUARDED = {name: source for name, source in SOURCES.items() if name.split(".")[0] not in _FREE}


@pytest.mark.parametrize("name", GUARDED)
def test_only_the_guard_has_locks_and_looks_at_the_process(name: str) -> None:
    """A rule that is kept by hand in many places is broken in one of them."""
    assert forbidden(GUARDED[name]) == []


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.getpid()",
        "from os import getpid",
        "import threading\ndef late():\n    return threading.RLock()",
        "from threading import Lock as Key",
        "import signal\nsignal.signal(2, None)",
    ],
)
def test_a_lock_is_found_wherever_it_hides(source: str) -> None:
    """In a function, or under another name."""
    assert forbidden(source)


# ------------------------------------------------------------------------------------------------ public methods


UNGUARDED = {
    "a fact, or one attribute that is replaced as a whole": """
        Container.can_cut Container.check_here Container.check_usable Container.closed Container.cut_opens_gap
        Container.dma_bits Container.fd
        Container.info
        Container.changes Container.group Container.maps_files Container.iommu_type Container.iova_pgsizes
        Container.iova_ranges
        Container.kernel Container.check_takes_mappings Container.takes_mappings
        Ioas.check_takes_mappings Ioas.takes_mappings
        DmaBuf.check_here DmaBuf.check_usable DmaBuf.closed DmaBuf.fd DmaBuf.kernel
        Device.can_reset Device.check_here Device.check_usable Device.check_views Device.closed
        Device.container Device.fd Device.group Device.group_number Device.iommufd Device.kernel Device.open_neighbours
        Device.seam Device.space Device.dev_id Device.unsafe_noiommu Container.dirty_page_size Ioas.dirty_page_size
        DmaMapper.space DmaMapping.closed
        Group.check_here Group.check_usable Group.closed Group.fd Group.kernel
        Iommufd.check_here Iommufd.check_usable Iommufd.closed Iommufd.fd Iommufd.kernel Iommufd.maps_files
        Ioas.can_cut Ioas.changes Ioas.check_here Ioas.check_usable Ioas.closed Ioas.cut_opens_gap Ioas.dma_bits
        Ioas.entries_left Ioas.fd Ioas.tracks
        Container.counts_by Ioas.counts_by
        Ioas.iova_ranges Ioas.kernel Ioas.maps_files TakenOver.container
        Irq.can_grow Irq.count
        ConfigSpace.check_usable ConfigSpace.check_views ConfigSpace.mappable ConfigSpace.size
        Irq.fds RamBlock.discarded RamBlock.file RamBlock.guard RamBlock.idstr RamBlock.max_length RamBlock.page_size
        RamBlock.populated RamBlock.prealloc
        RamBlock.settings RamBlock.used_length RamBlock.vaddr RamBlock.whole RamBlockList.block_at RamBlockList.knows
        RamBlockList.notifiers
        Region.check_usable Region.check_views Region.mappable Region.size RegionMap.check_views
    """,
    "a system call of which nothing is recorded": """
        ConfigSpace.read ConfigSpace.read16 ConfigSpace.read32 ConfigSpace.read64 ConfigSpace.read8
        Container.check_extension Container.get_api_version Container.get_info Container.ioctl Container.set_iommu
        Device.get_pci_hot_reset_info Device.hot_reset_groups Device.ioctl Device.set_vf_token DmaBuf.ioctl
        Group.check_viable Group.get_device_fd
        Group.get_status Group.ioctl Group.set_container
        Iommufd.clear_vfio_ioas Iommufd.counts_by_process Iommufd.destroy Iommufd.get_hw_info Iommufd.huge_pages
        Iommufd.hwpt_alloc Iommufd.hwpt_get_dirty_bitmap
        Iommufd.hwpt_set_dirty_tracking Iommufd.ioas_alloc Iommufd.ioas_allow_iovas Iommufd.ioas_change_process
        Iommufd.ioas_copy Iommufd.ioas_iova_ranges Iommufd.ioas_map Iommufd.ioas_map_file Iommufd.ioas_noiommu_get_pa
        Ioas.ioctl Iommufd.ioas_unmap Iommufd.ioas_unmap_all Iommufd.ioctl Iommufd.set_counts_by_process
        Iommufd.set_huge_pages
        Iommufd.set_vfio_ioas Iommufd.vfio_ioas Irq.mask Irq.trigger Irq.unmask Region.read Region.read16
        Region.read32 Region.read64 Region.read8 Region.write Region.write16 Region.write32 Region.write64 Region.write8
        Register.read Register.write
    """,
    "makes an object, which maps a window when it is used": """
        ConfigSpace.register16 ConfigSpace.register32 ConfigSpace.register64 ConfigSpace.register8
        Region.register16 Region.register32 Region.register64 Region.register8
    """,
    "looks with no lock, and under the lock where that is not enough": "DmaMapper.translate_vaddr",
    "made once, and the first one stays": "Device.describe_irqs Device.irq Device.irqs Device.region",
    "a snapshot, or an object without a state of its own": "Device.capabilities Device.feature Device.low_power",
    "waits for a device, with no lock": "ConfigSpace.poll32 Irq.wait Irq.wait_any Region.poll32",
    "each step of it is guarded": """
        Container.map Container.map_dma Container.reserve_and_map Container.unmap Container.unmap_and_release
        Ioas.map Ioas.reserve_and_map Ioas.unmap Ioas.unmap_and_release
        ConfigSpace.change16 ConfigSpace.close ConfigSpace.write ConfigSpace.write16 ConfigSpace.write32
        ConfigSpace.write64 ConfigSpace.write8 Device.drop_windows Region.close
        Device.bus_master Device.bus_master= Device.memory_enabled Device.memory_enabled= DirtyLog.snapshot
        DirtyTracking.read
        DmaMapper.map_buffer DmaMapper.map_dma DmaMapper.map_region DmaMapper.map_temporary
        DmaMapper.segment_arrays DmaMapper.translate_vaddrs
        Device.enter_low_power Device.exit_low_power
        Irq.enable RamBlock.discard RamBlock.populate RamBlock.remap RamBlock.remove RamBlock.resize
    """,
}


def _is_guarded(function: object) -> bool:
    """Whether a decorator of guard.py wraps a function."""
    code = getattr(function, "__code__", None)
    return hasattr(function, "__wrapped__") and code is not None and code.co_filename.endswith("guard.py")


def _functions(kind: type) -> Iterator[tuple[str, object]]:
    """The public methods of a class, and the functions behind its properties."""
    for name in dir(kind):
        member = inspect.getattr_static(kind, name)
        if name.startswith("_") or name in OWN or isinstance(member, classmethod | staticmethod):
            continue
        if isinstance(member, property):
            yield name, member.fget
            if member.fset is not None:
                yield f"{name}=", member.fset
        elif inspect.isfunction(member):
            yield name, member


def test_each_public_method_goes_through_the_guard_or_has_no_state_to_guard() -> None:
    """One that is new is guarded, or its name is added here, with the reason."""
    methods = {f"{kind.__name__}.{name}": function for kind in stateful() for name, function in _functions(kind)}
    listed = {name for names in UNGUARDED.values() for name in names.split()}
    assert {name for name, function in methods.items() if not _is_guarded(function)} == listed


@pytest.mark.long
def test_each_class_that_has_state_has_a_guard() -> None:
    """As an attribute that is public, so that one object can hold the lock of another."""
    assert [kind.__name__ for kind in stateful() if not _has_guard(kind)] == []


def _has_guard(kind: type) -> bool:
    """Whether `guard` is declared, or set by a constructor, in the class or in a base of it."""
    sources = [inspect.getsource(base) for base in kind.__mro__[:-1] if base.__module__.startswith("pyvfio")]
    return hasattr(kind, "guard") or any("self.guard" in source for source in sources)
