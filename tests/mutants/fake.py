"""Mistakes in the fake kernel: the contract has to notice each."""

from __future__ import annotations

from pathlib import Path

from tests.mutants.mutant import Mutant, Suite

# Which tests come first, so that most mutants are caught soon; all of them run where these do not notice.
_FIRST = {
    "type1.py": ("unmap", "info", "vaddr", "dirty", "map"),
    "dirty.py": ("dirty",),
    "group.py": ("group", "container"),
    "feature.py": ("feature",),
    "hot_reset.py": ("hot_reset",),
    "device.py": ("device", "irqs"),
    "kernel.py": ("group", "map"),
    "irqs.py": ("irqs",),
    "iommu.py": ("info",),
    "pins.py": ("map",),
    "versions.py": ("info", "map"),
}

_MUTANTS = (
    # Which errno.
    Mutant("type1.py", "refuse(errno.EEXIST)", "refuse(errno.EINVAL)"),
    Mutant("type1.py", "refuse(errno.ENOSPC)", "refuse(errno.ENOMEM)"),
    Mutant("type1.py", "refuse(errno.ENOENT)", "refuse(errno.EINVAL)"),
    Mutant("type1.py", "refuse(errno.EACCES)", "refuse(errno.EPERM)"),
    Mutant(
        "pins.py",
        "        elif mapped.size > within:\n            refuse(errno.ENOMEM)",
        "        elif False:\n            pass",
    ),
    Mutant("group.py", "refuse(errno.EINVAL if self.iommu is None else errno.ENOTTY)", "refuse(errno.ENOTTY)"),
    Mutant("group.py", "        if self.has_open_device:\n            refuse(errno.EBUSY)\n", ""),
    Mutant("group.py", "refuse(self._files.version.not_a_container)", "refuse(errno.EBADF)"),
    Mutant("group.py", "        return refuse(errno.ENODEV)", "        return refuse(errno.EINVAL)"),
    Mutant(
        "group.py",
        "            refuse(errno.EBUSY)\n        self.groups.append",
        "            refuse(errno.EINVAL)\n        self.groups.append",
    ),
    Mutant("versions.py", "overflow=errno.EOVERFLOW", "overflow=errno.EINVAL"),
    Mutant("feature.py", "refuse(errno.EEXIST)", "refuse(errno.EBUSY)"),
    Mutant("irqs.py", "            refuse(errno.ERANGE)", "            refuse(errno.EINVAL)"),
    # Which check comes first.
    Mutant(
        "type1.py",
        "        if len(self.table) >= self._entry_limit:\n            refuse(errno.ENOSPC)\n"
        "        if not self._in_range(iova, iova + size - 1):\n            refuse(errno.EINVAL)\n",
        "        if not self._in_range(iova, iova + size - 1):\n            refuse(errno.EINVAL)\n"
        "        if len(self.table) >= self._entry_limit:\n            refuse(errno.ENOSPC)\n",
    ),
    Mutant(
        "type1.py",
        "        if flags & _MAP_VADDR:\n"
        "            self._move_vaddr(vaddr=vaddr, iova=iova, size=size)\n            return 0\n"
        "        if self.table.overlaps(iova, iova + size - 1):\n            refuse(errno.EEXIST)\n"
        "        if len(self.table) >= self._entry_limit:\n            refuse(errno.ENOSPC)\n",
        "        if len(self.table) >= self._entry_limit:\n            refuse(errno.ENOSPC)\n"
        "        if flags & _MAP_VADDR:\n"
        "            self._move_vaddr(vaddr=vaddr, iova=iova, size=size)\n            return 0\n"
        "        if self.table.overlaps(iova, iova + size - 1):\n            refuse(errno.EEXIST)\n",
    ),
    Mutant("type1.py", "        if early and size and wraps:", "        if early and wraps and False:"),
    Mutant(
        "group.py",
        "        container = self._files.container(fd)\n"
        "        if self.container is not None:\n            refuse(errno.EINVAL)\n",
        "        container = self._files.container(fd)\n",
    ),
    Mutant("hot_reset.py", "not count and self._buses.version.hot_reset_counts_first", "not count"),
    Mutant("pins.py", "min(mapped.size, within + PAGE_SIZE), write=write)", "mapped.size, write=write)"),
    # What is written back, and when.
    Mutant(
        "type1.py",
        "argument.write(_UNMAP.pack(argsz, flags, iova, sum(entry.size for entry in entries)))",
        "argument.write(_UNMAP.pack(argsz, flags, iova, size))",
    ),
    Mutant("type1.py", "    return min(argsz, version.info_tail)", "    return version.info_tail"),
    Mutant("type1.py", "version.info_tail if argsz >= version.info_tail else _INFO_MINSZ", "version.info_tail"),
    Mutant("type1.py", "            argsz = _INFO.size + len(capabilities)\n", "            pass\n"),
    Mutant("type1.py", "            offset = _INFO.size\n", ""),
    Mutant("type1.py", "self._entry_limit - len(self.table)", "self._entry_limit"),
    Mutant("versions.py", "            info_tail=20,", "            info_tail=24,"),
    Mutant("iommu.py", "_ABOVE_MSI = Iova(0xFEF0_0000)", "_ABOVE_MSI = Iova(0xFEE0_0000)"),
    Mutant("dirty.py", "            self._bits |= before\n", ""),
    Mutant("dirty.py", "self._bits &= ~((1 << self._pages) - 1)", "self._bits = 0"),
    Mutant("dirty.py", "return (pages + _WORD - 1) // _WORD * 8", "return (pages + 7) // 8"),
    # What is mapped, charged and alive.
    Mutant("type1.py", "            return []  # v1 stops", "            pass  # v1 stops"),
    Mutant("versions.py", "            unmaps_end_of_u64=True,", "            unmaps_end_of_u64=False,"),
    Mutant(
        "type1.py",
        "                self._invalid -= {earlier.iova for earlier in entries[:count]}\n",
        "                self._invalid |= starts\n",
    ),
    Mutant(
        "type1.py", "            for entry in self.table:\n                self._track(entry)\n", "            pass\n"
    ),
    Mutant("type1.py", "        self._invalid.discard(entry.iova)\n", ""),
    Mutant("pins.py", "        self.used -= mapped.size - mapped.uncharged", "        self.used -= mapped.size"),
    Mutant("pins.py", "self.limit // PAGE_SIZE * PAGE_SIZE", "self.limit"),
    Mutant("versions.py", "            zero_page_is_free=True,", "            zero_page_is_free=False,"),
    Mutant("group.py", "        if not self.groups and self.iommu is not None:", "        if self.iommu is not None:"),
    Mutant("group.py", "return self.fd is not None or self.has_open_device", "return self.fd is not None"),
    Mutant("feature.py", "        self._ioeventfds.clear()\n", ""),
    Mutant("irqs.py", "if new is not None and self._unmask is not None:", "if False and new is not None:"),
    Mutant(
        "pins.py", "of_devices = device_pages(vaddr, size) if self.device_memory_is_mapped else 0", "of_devices = 0"
    ),
    Mutant(
        "pins.py",
        "if self.page_limit is not None and not self.privileged:\n            within",
        "if self.page_limit is not None:\n            within",
    ),
    # Who has which device, and what a reset reaches.
    Mutant("group.py", "        if not self.viable:\n            refuse(errno.EPERM)\n", ""),
    Mutant("group.py", "VIABLE) if self.viable else 0", "VIABLE)"),
    Mutant(
        "kernel.py",
        "            if group.container is not None and not group.viable:\n                device.driver = None\n",
        "",
    ),
    Mutant("hot_reset.py", "is_vfio_driver(device.driver) and group in given", "group in given"),
    Mutant("hot_reset.py", "is_vfio_driver(device.driver) and group in given", "is_vfio_driver(device.driver)"),
    Mutant("hot_reset.py", "if not 0 < count <= len(affected):", "if not count:"),
    Mutant("hot_reset.py", "refuse(errno.EINVAL) if number is None", "refuse(errno.EBADF) if number is None"),
    Mutant("hot_reset.py", "if argsz < _HEAD.size + _DEVICE.size * len(affected):", "if False:"),
    Mutant(
        "hot_reset.py", "argument.write(_HEAD.pack(argsz, 0, len(affected)))", "argument.write(_HEAD.pack(argsz, 7, 7))"
    ),
    # What a device shows of itself.
    Mutant("device.py", "argsz, cap_offset = _REGION.size + len(capability), 0", "cap_offset = 0"),
    Mutant("device.py", 'b"\\xff" * count if is_table', 'b"\\x00" * count if is_table'),
    Mutant("device.py", "return bar, min(size, bar.size - position)", "return bar, size"),
    Mutant("device.py", "flags |= ioctls.VFIO_DEVICE_FLAGS_RESET", "pass"),
    Mutant("feature.py", "if position < table.stop and position + width > table.start:", "if False:"),
    Mutant("feature.py", "_IOEVENTFDS = 1000", "_IOEVENTFDS = 1001"),
    Mutant("irqs.py", "self._version.dynamic_msix and self._counts[MSIX]", "self._counts[MSIX]"),
    Mutant(
        "irqs.py",
        "        self._triggers[vector] = None\n        self._triggers[vector] =",
        "        self._triggers[vector] =",
    ),
)


def _rounds(mutant: Mutant) -> list[list[str]]:
    first = [f"tests/contract/test_kernel_{word}.py" for word in _FIRST[mutant.file]]
    return [[*first, "tests/contract"]]


SUITE = Suite(Path("pyvfio/testing/fake"), _MUTANTS, _rounds)
