"""Mistakes in the fake kernel: the contract has to notice each."""

from __future__ import annotations

from pathlib import Path

from tests.mutants.mutant import ROOT, Mutant, Suite

_FOLDER = Path("pyvfio/testing/fake")
# The files of the contract that run first for a mutant in each file, so that most mutants are caught soon.
_FIRST = {
    "type1.py": ("unmap", "info", "vaddr", "dirty", "map"),
    "dirty.py": ("dirty",),
    "group.py": ("group", "container"),
    "feature.py": ("feature",),
    "hot_reset.py": ("hot_reset",),
    "power.py": ("feature",),
    "sriov.py": ("sriov",),
    "device.py": ("device", "irqs"),
    "kernel.py": ("group", "map"),
    "irqs.py": ("irqs",),
    "virqfd.py": ("irqs",),
    "iommu.py": ("info",),
    "pins.py": ("map",),
    "versions.py": ("info", "map"),
}

_MUTANTS = (
    # Which errno.
    Mutant("Type1.map_dma", "refuse(errno.EEXIST)", "refuse(errno.EINVAL)"),
    Mutant("Type1.map_dma", "refuse(errno.ENOSPC)", "refuse(errno.ENOMEM)"),
    Mutant("Type1._move_vaddr", "refuse(errno.ENOENT)", "refuse(errno.EINVAL)"),
    Mutant("Type1.dirty_pages", "refuse(errno.EACCES)", "refuse(errno.EPERM)"),
    Mutant(
        "Pins.pin",
        "        elif mapped.size > within:\n            refuse(errno.ENOMEM)",
        "        elif False:\n            pass",
    ),
    Mutant("Container.ioctl", "refuse(errno.EINVAL if self.iommu is None else errno.ENOTTY)", "refuse(errno.ENOTTY)"),
    Mutant("Group.unset_container", "        if self.has_open_device:\n            refuse(errno.EBUSY)\n", ""),
    Mutant("Group.set_container", "refuse(self._files.version.not_a_container)", "refuse(errno.EBADF)"),
    Mutant("Group._match", "        return refuse(errno.ENODEV)", "        return refuse(errno.EINVAL)"),
    Mutant(
        "Container.attach",
        "            refuse(errno.EBUSY)\n        self.groups.append",
        "            refuse(errno.EINVAL)\n        self.groups.append",
    ),
    Mutant("VERSIONS", "overflow=errno.EOVERFLOW", "overflow=errno.EINVAL"),
    Mutant("DeviceFeatures._connect", "refuse(errno.EEXIST)", "refuse(errno.EBUSY)"),
    Mutant("check_token", "            refuse(errno.EACCES)", "            refuse(errno.EINVAL)"),
    Mutant("check_token", "        if used and token != device.vf_token:", "        if used and token is None:"),
    Mutant("check_token", "            device.vf_token = token", "            pass"),
    Mutant("_check_virtual", "elif token is None or token != physical.vf_token:", "elif token is None:"),
    Mutant("parse_options", "if token is not None or not text", "if not text"),
    Mutant("parse_options", "not _TOKEN.fullmatch(word)", "len(word) < _TOKEN_LENGTH"),
    Mutant("DeviceFeatures._set_vf_token", "            refuse(errno.ENOTTY)", "            refuse(errno.EINVAL)"),
    Mutant("Power.enter", "            refuse(errno.EINVAL)", "            return"),
    Mutant("Power.resume", "            self.leave()", "            pass"),
    Mutant("DeviceFeatures._dma_buf", "            refuse(errno.ENODEV)", "            refuse(errno.EINVAL)"),
    Mutant("DeviceFeatures._check_ranges", "refuse(errno.EOVERFLOW)", "refuse(errno.EINVAL)"),
    Mutant("Irqs._connect_messages", "            refuse(errno.ERANGE)", "            refuse(errno.EINVAL)"),
    # Which check comes first.
    Mutant(
        "Type1.map_dma",
        "        if len(self.table) >= self._entry_limit:\n            refuse(errno.ENOSPC)\n"
        "        if not self._in_range(iova, iova + size - 1):\n            refuse(errno.EINVAL)\n",
        "        if not self._in_range(iova, iova + size - 1):\n            refuse(errno.EINVAL)\n"
        "        if len(self.table) >= self._entry_limit:\n            refuse(errno.ENOSPC)\n",
    ),
    Mutant(
        "Type1.map_dma",
        "        if flags & _MAP_VADDR:\n"
        "            self._move_vaddr(vaddr=vaddr, iova=iova, size=size)\n            return 0\n"
        "        if self.table.overlaps(iova, iova + size - 1):\n            refuse(errno.EEXIST)\n"
        "        if len(self.table) >= self._entry_limit:\n            refuse(errno.ENOSPC)\n",
        "        if len(self.table) >= self._entry_limit:\n            refuse(errno.ENOSPC)\n"
        "        if flags & _MAP_VADDR:\n"
        "            self._move_vaddr(vaddr=vaddr, iova=iova, size=size)\n            return 0\n"
        "        if self.table.overlaps(iova, iova + size - 1):\n            refuse(errno.EEXIST)\n",
    ),
    Mutant("Type1._check_map", "        if early and size and wraps:", "        if early and wraps and False:"),
    Mutant(
        "Group.set_container",
        "        container = self._files.container(fd)\n"
        "        if self.container is not None:\n            refuse(errno.EINVAL)\n",
        "        container = self._files.container(fd)\n",
    ),
    Mutant("HotReset.reset", "not count and self._buses.version.hot_reset_counts_first", "not count"),
    Mutant("Pins.pin", "min(mapped.size, within + PAGE_SIZE), write=write)", "mapped.size, write=write)"),
    # What is written back, and when.
    Mutant(
        "Type1.unmap_dma",
        "argument.write(_UNMAP.pack(argsz, flags, iova, sum(entry.size for entry in entries)))",
        "argument.write(_UNMAP.pack(argsz, flags, iova, size))",
    ),
    Mutant("info_write_back", "    return min(argsz, version.info_tail)", "    return version.info_tail"),
    Mutant("info_write_back", "version.info_tail if argsz >= version.info_tail else _INFO_MINSZ", "version.info_tail"),
    Mutant("Type1.get_info", "            argsz = _INFO.size + len(capabilities)\n", "            pass\n"),
    Mutant("Type1.get_info", "            offset = _INFO.size\n", ""),
    Mutant("Type1._capabilities", "self._entry_limit - len(self.table)", "self._entry_limit"),
    Mutant("VERSIONS", "            info_tail=20,", "            info_tail=24,"),
    Mutant("_ABOVE_MSI", "_ABOVE_MSI = Iova(0xFEF0_0000)", "_ABOVE_MSI = Iova(0xFEE0_0000)"),
    Mutant("Bitmap.report", "            self._bits |= before\n", ""),
    Mutant("Bitmap.clear", "self._bits &= ~((1 << self._pages) - 1)", "self._bits = 0"),
    Mutant("bitmap_bytes", "return (pages + _WORD - 1) // _WORD * 8", "return (pages + 7) // 8"),
    # What is mapped, charged and alive.
    Mutant("Type1._doomed", "            return []  # v1 stops", "            pass  # v1 stops"),
    Mutant("VERSIONS", "            unmaps_end_of_u64=True,", "            unmaps_end_of_u64=False,"),
    Mutant(
        "Type1._invalidate",
        "                self._invalid -= {earlier.iova for earlier in entries[:count]}\n",
        "                self._invalid |= starts\n",
    ),
    Mutant(
        "Type1.dirty_pages",
        "            for entry in self.table:\n                self._track(entry)\n",
        "            pass\n",
    ),
    Mutant("Type1._remove", "        self._invalid.discard(entry.iova)\n", ""),
    Mutant("Pins.unpin", "        self.used -= mapped.size - mapped.uncharged", "        self.used -= mapped.size"),
    Mutant("Pins.page_limit", "self.limit // PAGE_SIZE * PAGE_SIZE", "self.limit"),
    Mutant("VERSIONS", "            zero_page_is_free=True,", "            zero_page_is_free=False,"),
    Mutant(
        "Container.detach",
        "        if not self.groups and self.iommu is not None:",
        "        if self.iommu is not None:",
    ),
    Mutant("Group.busy", "return self.fd is not None or self.has_open_device", "return self.fd is not None"),
    Mutant("DeviceFeatures.release", "        self._ioeventfds.clear()\n", ""),
    Mutant(
        "Irqs._unmask_by_eventfd", "if new is not None and self._unmask is not None:", "if False and new is not None:"
    ),
    Mutant(
        "Pins._free_pages",
        "of_devices = sum(area.size for area in areas) // PAGE_SIZE",
        "of_devices = 0",
    ),
    Mutant(
        "Pins.pin",
        "if self.page_limit is not None and not self.privileged:\n            within",
        "if self.page_limit is not None:\n            within",
    ),
    # Who has which device, and what a reset reaches.
    Mutant("Group.set_container", "        if not self.viable:\n            refuse(errno.EPERM)\n", ""),
    Mutant("Group.get_status", "VIABLE) if self.viable else 0", "VIABLE)"),
    Mutant(
        "FakeKernel.bind",
        "            if group.claimed and not group.viable:\n                device.driver = None\n",
        "",
    ),
    Mutant(
        "HotReset.reset",
        "if not all(owned) or not all(is_vfio_driver(device.driver) for _group, device in affected):",
        "if not all(owned):",
    ),
    Mutant("HotReset.reset", "not all(owned) or ", ""),
    Mutant("HotReset.reset", "if not 0 < count <= len(affected):", "if not count:"),
    Mutant(
        "HotReset.reset",
        "        for _group, device in affected:\n            device.clear()\n",
        "        self._device.clear()\n",
    ),
    Mutant("PciDevice.clear", "        self.irqs.quieten()\n", "        self.irqs.release()\n"),
    Mutant("PciDevice.clear", "        self.irqs.quieten()\n", "        self.config = self.declared.config_space()\n"),
    Mutant("HotReset._groups", "refuse(errno.EINVAL) if number is None", "refuse(errno.EBADF) if number is None"),
    Mutant("HotReset.get_info", "if argsz < _HEAD.size + _DEVICE.size * len(affected):", "if False:"),
    Mutant(
        "HotReset.get_info",
        "argument.write(_HEAD.pack(argsz, 0, len(affected)))",
        "argument.write(_HEAD.pack(argsz, 7, 7))",
    ),
    # What a device shows of itself.
    Mutant("PciDevice.get_region_info", "argsz, cap_offset = _REGION.size + len(capability), 0", "cap_offset = 0"),
    Mutant("PciDevice.pread", 'b"\\xff" * count if is_table', 'b"\\x00" * count if is_table'),
    Mutant("PciDevice._accessible", "return bar, min(size, bar.size - position)", "return bar, size"),
    Mutant("PciDevice.decodes", "powered = not at or self.config[at] & _D3HOT != _D3HOT", "powered = True"),
    Mutant("PciDevice.reset", "            self.config[at] &= ~_D3HOT\n", "            pass\n"),
    Mutant("PciDevice.get_info", "flags |= ioctls.VFIO_DEVICE_FLAGS_RESET", "pass"),
    Mutant("DeviceFeatures._check_place", "if position < table.stop and position + width > table.start:", "if False:"),
    Mutant("_IOEVENTFDS", "_IOEVENTFDS = 1000", "_IOEVENTFDS = 1001"),
    Mutant("Irqs.info", "self._version.dynamic_msix and self._counts[MSIX]", "self._counts[MSIX]"),
    Mutant(
        "Irqs._set_trigger",
        "        self._triggers[vector] = None\n        self._triggers[vector] =",
        "        self._triggers[vector] =",
    ),
    # Vectors that are added, and what unmasks INTx.
    Mutant("Irqs._set_block", "for earlier in range(done):", "for earlier in range(0):"),
    Mutant("Irqs._set_trigger", "return None if fd < 0 else refuse(errno.EINVAL)", "return None"),
    Mutant("Irqs._grow", "            self._triggers += [None] * (end - len(self._triggers))", "            pass"),
    Mutant("Irqs._unmask_by_eventfd", "            if self._unmask.pending:", "            if False:"),
    Mutant("Irqs._unmask_by_eventfd", "        self._end_unmask()\n", ""),
    Mutant("Irqs._connect_intx", "        self._let_go(self._triggers[0])\n", "        self._end_unmask()\n"),
    Mutant("Virqfd._call", "            os.eventfd_read(self._held)\n", "            pass\n"),
    Mutant("Virqfd.__init__", "select.EPOLLIN | select.EPOLLET", "select.EPOLLIN"),
)


def _rounds(mutant: Mutant) -> list[list[str]]:
    file = mutant.find(ROOT / _FOLDER).path.name
    first = [f"tests/contract/test_kernel_{word}.py" for word in _FIRST[file]]
    return [[*first, "tests/contract"]]


SUITE = Suite(_FOLDER, _MUTANTS, _rounds)
