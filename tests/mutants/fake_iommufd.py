"""Mistakes in the fake's iommufd and device nodes, by the file of the contract that has to notice each."""

from __future__ import annotations

from pathlib import Path

from tests.mutants.mutant import Mutant, Suite

_FOLDER = Path("pyvfio/testing/fake")
_MUTANTS = (
    Mutant("Iommufd.ioctl", "if size < command.minimum:", "if False:", "commands"),
    Mutant("_check_tail", "            refuse(errno.E2BIG)", "            refuse(errno.EINVAL)", "commands"),
    Mutant(
        "Iommufd._new", "        identity = 1\n", "        identity = max(self.objects, default=0) + 1\n", "commands"
    ),
    Mutant("Iommufd._get", "refuse(errno.ENOENT)", "refuse(errno.EINVAL)", "commands"),
    Mutant("Iommufd._rlimit_mode", "        if self.objects:\n            refuse(errno.EBUSY)\n", "", "commands"),
    Mutant("Iommufd._rlimit_mode", "Account.PROCESS if value else Account.USER", "Account.USER", "commands"),
    Mutant("_option_huge_pages", "    if value > 1:\n        refuse(errno.EINVAL)\n", "", "commands"),
    Mutant(
        "Ioas.set_huge_pages",
        "            if self.tables and len(self.table):",
        "            if len(self.table):",
        "commands",
    ),
    Mutant("Ioas.set_huge_pages", "            self._check_alignment(PAGE_SIZE)\n", "", "commands"),
    Mutant("Iommufd.destroy", "            refuse(errno.EBUSY)\n", "            pass\n", "cdev"),
    Mutant("_fill", "                its_pages.unfill(before)", "                pass", "cdev"),
    Mutant("Ioas.add_table", "            self.unreserve(table)\n", "            pass\n", "cdev"),
    Mutant("Ioas.remove_table", "            self._pages[entry.iova].unfill(entry)", "            pass", "cdev"),
    Mutant("Ioas._reserve", "            refuse(errno.EADDRINUSE)", "            pass", "cdev"),
    Mutant("Iommufd._destroy_unused", "and not hwpt.users", "", "cdev"),
    Mutant("Iommufd._end", "        if self._is_open or any(", "        if any(", "cdev"),
    Mutant("Claim.replace", "                old.ioas.unreserve(bound)\n", "                pass\n", "cdev"),
    Mutant("Iommufd.attach", "return refuse(errno.EINVAL)", "return refuse(errno.ENOENT)", "cdev"),
    Mutant("Cdev.ioctl", "            refuse(errno.EINVAL)", "            refuse(errno.ENOTTY)", "cdev"),
    Mutant("Cdev.bind", "        if self.group.opened_as_group:\n            refuse(errno.EBUSY)\n", "", "cdev"),
    Mutant("Cdev.bind", "            refuse(errno.EBADFD)", "            refuse(errno.EBADF)", "cdev"),
    Mutant("Cdev.bind", "        if self.device.descriptors:\n            refuse(errno.EINVAL)\n", "", "cdev"),
    Mutant("Cdev.release", "        iommufd.unbind(bound)", "        iommufd.detach(bound)", "cdev"),
    Mutant(
        "Iommufd.destroy", "        if self.compat_ioas is found:\n            self.compat_ioas = None\n", "", "compat"
    ),
    Mutant("CompatCalls._unmap", "        if not ioas.huge_pages:", "        if True:", "compat"),
    Mutant("CompatCalls._unmap", "            if iova:\n                ioas.cut(iova - 1)\n", "", "compat"),
    Mutant("CompatCalls.unmap_dma", "        if number:\n            refuse(number)\n", "", "compat"),
    Mutant(
        "CompatCalls.unmap_dma",
        "        argument.write(_UNMAP.pack(argsz, flags, iova, unmapped))\n        if number:\n"
        "            refuse(number)\n",
        "        if number:\n            refuse(number)\n"
        "        argument.write(_UNMAP.pack(argsz, flags, iova, unmapped))\n",
        "compat",
    ),
    Mutant("CompatCalls.set_iommu", "            ioas.set_huge_pages(wanted=False)", "            pass", "compat"),
    Mutant("CompatCalls.get_info", "_INFO.size if argsz >= total else 0", "_INFO.size", "compat"),
    Mutant("Iommufd.iova_ranges", "            refuse(errno.EMSGSIZE)", "            pass", "ioas"),
    Mutant("Ioas.allow", "        self.allowed = spans", "        self.allowed += spans", "ioas"),
    Mutant("Ioas.allow", "            refuse(errno.EADDRINUSE)", "            pass", "ioas"),
    Mutant("Ioas.remove_table", "        self.alignment = self._needed_alignment()", "        pass", "ioas"),
    Mutant("Claim.detach", "        hwpt.ioas.unreserve(bound)\n", "", "ioas"),
    Mutant("Iommufd._target", "        if U64_MAX in numbers:\n            refuse(errno.EOVERFLOW)\n", "", "map"),
    Mutant("Ioas._check_free", "            refuse(errno.EEXIST)", "            refuse(errno.EINVAL)", "map"),
    Mutant(
        "Ioas._check_free",
        "        if self._is_reserved(iova, iova + size - 1):\n            refuse(errno.EINVAL)\n",
        "",
        "map",
    ),
    Mutant("Ioas._find", "first, last, offset = PAGE_SIZE,", "first, last, offset = 0,", "map"),
    Mutant(
        "Ioas._find", "alignment = min(1 << (size - 1).bit_length(), _MAX_ALIGNMENT)", "alignment = PAGE_SIZE", "map"
    ),
    Mutant("Ioas._find", "            alignment = min(alignment, address & -address)\n", "            pass\n", "map"),
    Mutant("Ioas._used", "heapq.merge(self._reserved_spans(), ", "heapq.merge((), ", "map"),
    Mutant(
        "Ioas.map",
        "        if self.tables:\n            _fill(areas, self.tables)\n",
        "        _fill(areas, self.tables)\n",
        "map",
    ),
    Mutant("Ioas.add_table", "            self._check_alignment(alignment)", "            pass", "map"),
    Mutant("Ioas.unmap", "            return 0, errno.ENOENT", "            pass", "unmap"),
    Mutant("Ioas.unmap", "            areas.pop()\n", "            return 0, errno.ENOENT\n", "unmap"),
    Mutant("Ioas.unmap", "errno.ENOENT if cut else 0", "0", "unmap"),
    Mutant("Iommufd.unmap", "if number or not (unmapped or everything):", "if number:", "unmap"),
    Mutant("Iommufd.unmap", "if number or not (unmapped or everything):", "if number or not unmapped:", "unmap"),
    Mutant("Ioas.slices", "            refuse(errno.ENOENT)", "            break", "copy"),
    Mutant("Ioas.slices", "            part.pages.shared = True\n", "            pass\n", "copy"),
    Mutant("Ioas.map", "                refuse(errno.EPERM)", "                pass", "copy"),
    Mutant("Pages._missing", "        if not self.shared:", "        if True:", "copy"),
    Mutant("Pages.fill", "errno.EFAULT if self.window is None else errno.EINVAL", "errno.EFAULT", "files"),
    Mutant("Iommufd.change_process", "            refuse(errno.EINVAL)", "            pass", "files"),
    Mutant(
        "Iommufd._payer", "Account.NOBODY if self._pins.privileged else self._account", "self._account", "accounting"
    ),
    Mutant("Iommufd.hwpt_alloc", "refuse(errno.ENOENT)  # there", "refuse(errno.EOPNOTSUPP)  # there", "hwpt"),
    Mutant("Iommufd.get_hw_info", 'model.hw_info[:room].ljust(room, b"\\0")', "model.hw_info[:room]", "hwpt"),
)


def _rounds(mutant: Mutant) -> list[list[str]]:
    return [[f"tests/contract/test_iommufd_{mutant.operation}.py"], ["tests/contract", "-m", "iommufd"]]


SUITE = Suite(_FOLDER, _MUTANTS, _rounds)
