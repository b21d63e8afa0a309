"""An open /dev/iommu: objects by number, and the ioctls in the order of checks of the kernel.

Source: drivers/iommu/iommufd/main.c, ioas.c, hw_pagetable.c and device.c; the functions named below are there.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from pyvfio.testing.fake.device import PciDevice
from pyvfio.testing.fake.group import Group
from pyvfio.testing.fake.hwpt import BoundDevice, Claim, Hwpt
from pyvfio.testing.fake.ioas import Ioas, Slice
from pyvfio.testing.fake.iommu import IommuModel
from pyvfio.testing.fake.iommufd_compat import CompatCalls
from pyvfio.testing.fake.noiommu import NoIommu
from pyvfio.testing.fake.pages import Pages, file_pages, user_pages
from pyvfio.testing.fake.pins import Account, Pins
from pyvfio.testing.fake.process import Argument, read_memory, refuse, write_memory
from pyvfio.testing.fake.type1 import READ, WRITE
from pyvfio.testing.fake.versions import KernelVersion
from pyvfio.units import PAGE_SIZE, U64_MAX, Iova, IovaRange

_FIXED, _WRITEABLE, _READABLE = 1, 2, 4  # IOMMU_IOAS_MAP_*
_RLIMIT_MODE, _HUGE_PAGES = 0, 1  # IOMMU_OPTION_*
_SET, _GET = 0, 1  # IOMMU_OPTION_OP_*
_VFIO_GET, _VFIO_SET, _VFIO_CLEAR = 0, 1, 2  # IOMMU_VFIO_IOAS_*
_DIRTY_TRACKING, _FAULT_ID, _PASID = 2, 4, 8  # IOMMU_HWPT_ALLOC_*, IOMMU_HWPT_FAULT_ID_VALID
_CAN_TRACK, _NO_ATS = 1, 8  # IOMMU_HW_CAP_*
_INPUT_TYPE = 1  # IOMMU_HW_INFO_FLAG_INPUT_TYPE
_BASE = 0x80  # IOMMUFD_CMD_BASE
_TYPE = ord(";") << 8  # IOMMUFD_TYPE
_RANGE = struct.Struct("=QQ")
_CHUNK = 4096
_WORD = 8

Fields = Sequence[int]
Reply = Callable[[Sequence[int]], None]
_Kind = TypeVar("_Kind", Ioas, Hwpt, BoundDevice)


class Machine(Protocol):
    """The machine around an iommufd. The properties can change at any time."""

    @property
    def iommu(self) -> IommuModel:
        """The IOMMU in front of all devices."""
        ...

    @property
    def noiommu(self) -> NoIommu | None:
        """No-IOMMU mode of a machine without an IOMMU."""
        ...

    @property
    def version(self) -> KernelVersion:
        """The kernel that the fake models."""
        ...

    @property
    def allow_unsafe_interrupts(self) -> bool:
        """The module parameter of iommufd."""
        ...

    @property
    def may_set_limits(self) -> bool:
        """Whether the process has CAP_SYS_RESOURCE."""
        ...

    def is_node(self, fd: int) -> bool:
        """Return whether a descriptor is one of VFIO or iommufd. Raises EBADF if `fd` is not open."""
        ...


class _Command(NamedTuple):
    """A request: the structure, the number of bytes that a caller must pass, and the function that answers."""

    layout: struct.Struct
    minimum: int
    act: Callable[[Fields, Reply], None]


NAMES = {
    _TYPE | _BASE + number: f"IOMMU_{name}"
    for number, name in enumerate(
        (
            *("DESTROY", "IOAS_ALLOC", "IOAS_ALLOW_IOVAS", "IOAS_COPY", "IOAS_IOVA_RANGES", "IOAS_MAP", "IOAS_UNMAP"),
            *("OPTION", "VFIO_IOAS", "HWPT_ALLOC", "GET_HW_INFO", "HWPT_SET_DIRTY_TRACKING", "HWPT_GET_DIRTY_BITMAP"),
            *("HWPT_INVALIDATE", "FAULT_QUEUE_ALLOC", "IOAS_MAP_FILE", "VIOMMU_ALLOC", "VDEVICE_ALLOC"),
            *("IOAS_CHANGE_PROCESS", "VEVENTQ_ALLOC", "HW_QUEUE_ALLOC", "IOAS_NOIOMMU_GET_PA"),
        )
    )
}
"""The C names of the requests, by number."""


class Iommufd:
    """`struct iommufd_ctx`: lives until the descriptor and all devices that are bound are closed."""

    def __init__(self, *, machine: Machine, pins: Pins) -> None:
        self._machine = machine
        self._version = machine.version
        self._pins = pins
        self.objects: dict[int, Ioas | Hwpt | BoundDevice] = {}
        self._account = Account.USER
        self._claims: dict[int, Claim] = {}
        self._is_open = True
        self._compat = CompatCalls(self)
        self.compat_ioas: Ioas | None = None
        """The address space for the requests of VFIO containers (IOMMU_VFIO_IOAS)."""
        commands = self._commands()
        self._by_number = {number: commands[name[6:]] for number, name in self._known().items() if name[6:] in commands}

    def _known(self) -> dict[int, str]:
        last = _TYPE | self._version.iommufd_last
        return {number: name for number, name in NAMES.items() if number <= last}

    def _commands(self) -> dict[str, _Command]:
        def command(layout: str, minimum: int, act: Callable[[Fields, Reply], None] = _unmodelled) -> _Command:
            return _Command(struct.Struct(layout), minimum, act)

        return {
            "DESTROY": command("=II", 8, self.destroy),
            "IOAS_ALLOC": command("=III", 12, self.ioas_alloc),
            "IOAS_ALLOW_IOVAS": command("=IIIIQ", 24, self.allow_iovas),
            "IOAS_COPY": command("=IIIIQQQ", 40, self.copy),
            "IOAS_IOVA_RANGES": command("=IIIIQQ", 32, self.iova_ranges),
            "IOAS_MAP": command("=IIIIQQQ", 40, self.map),
            "IOAS_UNMAP": command("=IIQQ", 24, self.unmap),
            "OPTION": command("=IIHHIQ", 24, self.option),
            "VFIO_IOAS": command("=IIHH", 12, self.vfio_ioas),
            "HWPT_ALLOC": command("=8IQII", 24, self.hwpt_alloc),
            "GET_HW_INFO": command("=IIIIQIIQ", 32, self.get_hw_info),
            "HWPT_SET_DIRTY_TRACKING": command("=IIII", 16, self.set_dirty_tracking),
            "HWPT_GET_DIRTY_BITMAP": command("=IIIIQQQQ", 48, self.get_dirty_bitmap),
            "HWPT_INVALIDATE": command("=IIQIIII", 32),
            "FAULT_QUEUE_ALLOC": command("=IIII", 16),
            "IOAS_MAP_FILE": command("=IIIiQQQ", 40, self.map_file),
            "VIOMMU_ALLOC": command("=IIIIIIIIQ", 24),
            "VDEVICE_ALLOC": command("=IIIIQ", 24),
            "IOAS_CHANGE_PROCESS": command("=II", 8, self.change_process),
            "VEVENTQ_ALLOC": command("=8I", 32),
            "HW_QUEUE_ALLOC": command("=6IQQ", 40),
            "IOAS_NOIOMMU_GET_PA": command("=4IQQQ", 40, self.noiommu_get_pa),
        }

    # ------------------------------------------------------------------------------------------------- descriptor

    def request_name(self, request: int) -> str:
        """Return the C name, or the number."""
        return self._known().get(request) or self._compat.request_name(request)

    def ioctl(self, request: int, argument: Argument) -> int:
        """`iommufd_fops_ioctl`: ENOTTY, EFAULT, EINVAL (size), E2BIG. Numbers outside of the table are of VFIO."""
        if not _BASE <= request & 0xFF <= self._version.iommufd_last:
            return self._compat.ioctl(request, argument)
        (size,) = struct.unpack("=I", argument.read(4))
        command = self._by_number.get(request)
        if command is None:
            refuse(errno.ENOTTY)
        if size < command.minimum:
            refuse(errno.EINVAL)
        _check_tail(argument, command.layout.size, size)
        given = argument.read(min(size, command.layout.size)).ljust(command.layout.size, b"\0")

        def reply(fields: Sequence[int]) -> None:
            argument.write(command.layout.pack(*fields)[:size])

        command.act(command.layout.unpack(given), reply)
        return 0

    def release(self, fd: int) -> None:  # noqa: ARG002 (of each handler)
        """Close the descriptor. The objects live on while a device is bound."""
        self._is_open = False
        self._end()

    def live_on(self, fd: int, other: int) -> None:
        """Do nothing, since all descriptors are of the same open file."""

    def _end(self) -> None:
        if self._is_open or any(isinstance(each, BoundDevice) for each in self.objects.values()):
            return
        self.compat_ioas = None
        for each in list(self.objects.values()):
            if isinstance(each, Hwpt):
                self._free(each)
        for each in list(self.objects.values()):
            if isinstance(each, Ioas):
                self._free(each)

    def _new(self, made: Ioas | Hwpt | BoundDevice) -> int:
        identity = 1
        while identity in self.objects:
            identity += 1
        self.objects[identity] = made
        return identity

    def number_of(self, wanted: Ioas | Hwpt | BoundDevice) -> int:
        """Return the number of an object."""
        return next(identity for identity, each in self.objects.items() if each is wanted)

    def _free(self, unwanted: Ioas | Hwpt | BoundDevice) -> None:
        del self.objects[self.number_of(unwanted)]
        if isinstance(unwanted, Ioas):
            unwanted.unmap(0, U64_MAX)
        elif isinstance(unwanted, Hwpt):
            unwanted.ioas.remove_table(unwanted)

    def _get(self, identity: int, kind: type[_Kind]) -> _Kind:
        found = self.objects.get(identity)
        return found if isinstance(found, kind) else refuse(errno.ENOENT)

    def _destroy_unused(self, hwpt: Hwpt | None) -> None:
        if hwpt is not None and hwpt.automatic and not hwpt.users:
            self._free(hwpt)

    # ------------------------------------------------------------------------------------- what device nodes need

    def bind(self, group: Group, device: PciDevice) -> BoundDevice:
        """`iommufd_device_bind`: EPERM (messages are not isolated, or the group is not viable or has another owner)."""
        if not self._machine.iommu.isolates_msi and not self._machine.allow_unsafe_interrupts:
            refuse(errno.EPERM)
        if group.claim is None and not group.viable:
            refuse(errno.EPERM)
        if group.container is not None or (group.claim is not None and group.claim.owner is not self):
            refuse(errno.EPERM)
        claim = self._claims.setdefault(group.number, Claim(self, group))
        bound = BoundDevice(device, claim)
        self._new(bound)
        claim.bound.append(bound)
        group.claim = claim
        return bound

    def unbind(self, bound: BoundDevice) -> None:
        """`iommufd_device_unbind`: the last device of a closed iommufd takes all objects along."""
        self.detach(bound)
        self._free(bound)
        bound.claim.bound.remove(bound)
        if not bound.claim.bound:
            bound.claim.group.claim = None
            del self._claims[bound.claim.group.number]
        self._end()

    def device_number(self, device: PciDevice) -> int:
        """Return the number of a device, or 0 for a device that is not bound (`vfio_iommufd_get_dev_id`)."""
        for identity, each in self.objects.items():
            if isinstance(each, BoundDevice) and each.device is device:
                return identity
        return 0

    def attach(self, bound: BoundDevice, target: int) -> int:
        """`iommufd_device_attach` or, for an attached device, `iommufd_device_replace`: return the page table's number.

        ENOENT, EINVAL (not an address space or a page table; the group has another page table), EADDRINUSE, EFAULT,
        ENOMEM. Nothing has changed then.
        """
        found = self.objects.get(target)
        if found is None:
            refuse(errno.ENOENT)
        if isinstance(found, Hwpt):
            self._use(bound, found)
            return target
        if isinstance(found, Ioas):
            return self.number_of(self._use_automatic(bound, found))
        return refuse(errno.EINVAL)

    def _use(self, bound: BoundDevice, hwpt: Hwpt) -> None:
        if not bound.attached:
            bound.claim.attach(bound, hwpt)
        else:
            self._destroy_unused(bound.claim.replace(hwpt))

    def _use_automatic(self, bound: BoundDevice, ioas: Ioas) -> Hwpt:
        """`iommufd_device_auto_get_domain`."""
        for each in list(self.objects.values()):
            if not isinstance(each, Hwpt) or each.ioas is not ioas or not each.automatic:
                continue
            try:
                self._use(bound, each)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            else:
                return each
        hwpt = Hwpt(ioas, self._machine.iommu, self._version, automatic=True)
        number = self._new(hwpt)  # before the number of a former page table is free again
        self._try(lambda: self._use_new(bound, hwpt), undo=lambda: self.objects.pop(number))
        return hwpt

    def _use_new(self, bound: BoundDevice, hwpt: Hwpt) -> None:
        ioas = hwpt.ioas
        if bound.attached:
            ioas.add_table(hwpt)
            self._try(lambda: self._use(bound, hwpt), undo=lambda: ioas.remove_table(hwpt))
        else:
            self._use(bound, hwpt)
            self._try(lambda: ioas.add_table(hwpt), undo=lambda: bound.claim.detach(bound))

    @staticmethod
    def _try(step: Callable[[], None], *, undo: Callable[[], object]) -> None:
        try:
            step()
        except OSError:
            undo()
            raise

    def detach(self, bound: BoundDevice) -> None:
        """`iommufd_device_detach`: does nothing for a device that is not attached."""
        self._destroy_unused(bound.claim.detach(bound))

    # ----------------------------------------------------------------------------------------------- address spaces

    def destroy(self, fields: Fields, _reply: Reply) -> None:
        """`iommufd_destroy`: ENOENT, EBUSY."""
        found = self.objects.get(fields[1])
        if found is None:
            refuse(errno.ENOENT)
        in_use = found.tables if isinstance(found, Ioas) else isinstance(found, BoundDevice) or found.users
        if in_use:
            refuse(errno.EBUSY)
        if self.compat_ioas is found:
            self.compat_ioas = None
        self._free(found)

    def ioas_alloc(self, fields: Fields, reply: Reply) -> None:
        """`iommufd_ioas_alloc_ioctl`: EOPNOTSUPP."""
        size, flags, _identity = fields
        if flags:
            refuse(errno.EOPNOTSUPP)
        identity = self._new(Ioas())
        self._try(lambda: reply((size, flags, identity)), undo=lambda: self.objects.pop(identity))

    def allow_iovas(self, fields: Fields, _reply: Reply) -> None:
        """`iommufd_ioas_allow_iovas`: EOPNOTSUPP, ENOENT, EFAULT, EINVAL, EADDRINUSE."""
        _size, identity, count, reserved, pointer = fields
        if reserved:
            refuse(errno.EOPNOTSUPP)
        ioas = self._get(identity, Ioas)
        spans: list[IovaRange] = []
        for number in range(count):
            start, last = _RANGE.unpack(read_memory(pointer + number * _RANGE.size, _RANGE.size))
            if start >= last:
                refuse(errno.EINVAL)
            span = IovaRange(Iova(start), Iova(last))
            if any(map(span.overlaps, spans)):
                refuse(errno.EINVAL)
            spans.append(span)
        ioas.allow(spans)

    def iova_ranges(self, fields: Fields, reply: Reply) -> None:
        """`iommufd_ioas_iova_ranges`: EOPNOTSUPP, ENOENT, EFAULT, EMSGSIZE (with the count)."""
        size, identity, room, reserved, pointer, _alignment = fields
        if reserved:
            refuse(errno.EOPNOTSUPP)
        ioas = self._get(identity, Ioas)
        usable = ioas.usable()
        for number, span in enumerate(usable[:room]):
            write_memory(pointer + number * _RANGE.size, _RANGE.pack(*span))
        reply((size, identity, len(usable), reserved, pointer, ioas.alignment))
        if len(usable) > room:
            refuse(errno.EMSGSIZE)

    def map(self, fields: Fields, reply: Reply) -> None:
        """`iommufd_ioas_map`: EOPNOTSUPP, EOVERFLOW, EINVAL, ENOENT, EOVERFLOW (the address), then as `Ioas.map`."""
        size, flags, identity, reserved, vaddr, length, iova = fields
        if flags & ~(_FIXED | _WRITEABLE | _READABLE) or reserved:
            refuse(errno.EOPNOTSUPP)
        ioas = self._target(flags, identity, length, iova)
        iova = self.map_user(ioas, vaddr, length, iova if flags & _FIXED else None, _type1_flags(flags))
        reply((size, flags, identity, reserved, vaddr, length, iova))

    def _target(self, flags: int, identity: int, *numbers: int) -> Ioas:
        if U64_MAX in numbers:
            refuse(errno.EOVERFLOW)
        if not flags & (_WRITEABLE | _READABLE):
            refuse(errno.EINVAL)
        return self._get(identity, Ioas)

    def map_user(self, ioas: Ioas, vaddr: int, length: int, iova: int | None, flags: int) -> int:
        """`iopt_map_user_pages`: EOVERFLOW, EINVAL, then as `Ioas.map`. `flags` as type1's."""
        self._check_length(vaddr, length, early=self._version.number < (7, 0))
        writable = bool(flags & WRITE)
        pages, start = user_pages(self._pins, vaddr=vaddr, writable=writable, account=self._payer())
        return ioas.map([Slice(pages, start, length)], length, iova, flags)

    @staticmethod
    def _check_length(start: int, length: int, *, early: bool) -> None:
        """`iopt_alloc_pages`: EINVAL for no bytes and for almost 2^64, `early` or after EOVERFLOW."""
        bad = not length or length > U64_MAX - PAGE_SIZE
        if bad and early:
            refuse(errno.EINVAL)
        if start + length > U64_MAX:
            refuse(errno.EOVERFLOW)
        if bad:
            refuse(errno.EINVAL)

    def _payer(self) -> Account:
        return Account.NOBODY if self._pins.privileged else self._account

    def map_file(self, fields: Fields, reply: Reply) -> None:
        """`iommufd_ioas_map_file`: as `map`, with EBADF behind EOVERFLOW."""
        size, flags, identity, fd, start, length, iova = fields
        if flags & ~(_FIXED | _WRITEABLE | _READABLE):
            refuse(errno.EOPNOTSUPP)
        ioas = self._target(flags, identity, length, iova)
        pages, offset = self._of_file(fd, start, length, flags)
        try:
            wanted = iova if flags & _FIXED else None
            iova = ioas.map([Slice(pages, offset, length)], length, wanted, _type1_flags(flags))
        finally:
            pages.drop_unused()
        reply((size, flags, identity, fd, start, length, iova))

    def _of_file(self, fd: int, start: int, length: int, flags: int) -> tuple[Pages, int]:
        if not length:
            refuse(errno.EINVAL)
        if start + length - 1 > U64_MAX:
            refuse(errno.EOVERFLOW)
        is_node = self._machine.is_node(fd)
        if length > U64_MAX - PAGE_SIZE:
            refuse(errno.EINVAL)
        writable = bool(flags & _WRITEABLE)
        payer = self._payer()
        return file_pages(
            self._pins, fd=None if is_node else fd, start=start, size=length, writable=writable, account=payer
        )

    def copy(self, fields: Fields, reply: Reply) -> None:
        """`iommufd_ioas_copy`: as `map`, with ENOENT for a source that is not wholly mapped. The memory is shared."""
        size, flags, target, source, length, iova, from_iova = fields
        if flags & ~(_FIXED | _WRITEABLE | _READABLE):
            refuse(errno.EOPNOTSUPP)
        slices = self._target(flags, source, length, iova, from_iova).slices(from_iova, length)
        to = self._get(target, Ioas)
        iova = to.map(slices, length, iova if flags & _FIXED else None, _type1_flags(flags))
        reply((size, flags, target, source, length, iova, from_iova))

    def unmap(self, fields: Fields, reply: Reply) -> None:
        """`iommufd_ioas_unmap`: ENOENT, EOVERFLOW, EINVAL, ENOENT (nothing there, or an area that is not whole)."""
        size, identity, iova, length = fields
        ioas = self._get(identity, Ioas)
        everything = iova == 0 and length == U64_MAX
        if not everything and U64_MAX in (iova, length):
            refuse(errno.EOVERFLOW)
        unmapped, number = ioas.unmap(0, U64_MAX) if everything else ioas.unmap_range(iova, length)
        if number or not (unmapped or everything):
            refuse(number or errno.ENOENT)
        reply((size, identity, iova, unmapped))

    def change_process(self, fields: Fields, _reply: Reply) -> None:
        """`iommufd_ioas_change_process`: EOPNOTSUPP, EINVAL (process memory is mapped). There is one process."""
        if fields[1]:
            refuse(errno.EOPNOTSUPP)
        if any(pages.window is None for each in self.spaces() for pages in each.all_pages()):
            refuse(errno.EINVAL)

    def noiommu_get_pa(self, fields: Fields, reply: Reply) -> None:
        """`iommufd_ioas_noiommu_get_pa`: EOPNOTSUPP, EPERM, ENOENT, EINVAL (no bytes), ENOENT (nothing is mapped).

        Then EOPNOTSUPP, if no device is attached. The length is what is contiguous of the given one.
        """
        size, flags, identity, reserved, iova, length, _address = fields
        if self._machine.noiommu is None or flags or reserved:
            refuse(errno.EOPNOTSUPP)
        self._machine.noiommu.check_raw_io()
        ioas = self._get(identity, Ioas)
        if not length:
            refuse(errno.EINVAL)
        entry = ioas.table.at(iova)
        if entry is None:
            refuse(errno.ENOENT)
        if not ioas.tables:
            refuse(errno.EOPNOTSUPP)
        vaddr = entry.vaddr + iova - entry.iova
        length = self._machine.noiommu.contiguous(vaddr, min(length, entry.iova + entry.size - iova))
        reply((size, flags, identity, reserved, iova, length, self._machine.noiommu.address_of(vaddr)))

    def spaces(self) -> list[Ioas]:
        """Return all address spaces."""
        return [each for each in self.objects.values() if isinstance(each, Ioas)]

    # ------------------------------------------------------------------------------------------------------ options

    def option(self, fields: Fields, reply: Reply) -> None:
        """`iommufd_option`: EOPNOTSUPP, EPERM, EBUSY, EINVAL, ENOENT, EADDRINUSE."""
        size, option, operation, reserved, identity, value = fields
        if reserved:
            refuse(errno.EOPNOTSUPP)
        if option == _RLIMIT_MODE:
            value = self._rlimit_mode(operation, identity, value)
        elif option == _HUGE_PAGES:
            value = _option_huge_pages(self._get(identity, Ioas), operation, value)
        else:
            refuse(errno.EOPNOTSUPP)
        reply((size, option, operation, reserved, identity, value))

    def _rlimit_mode(self, operation: int, identity: int, value: int) -> int:
        if identity or operation not in (_GET, _SET):
            refuse(errno.EOPNOTSUPP)
        if operation == _GET:
            return int(self._account is Account.PROCESS)
        if not self._machine.may_set_limits:
            refuse(errno.EPERM)
        if self.objects:
            refuse(errno.EBUSY)
        if value > 1:
            refuse(errno.EINVAL)
        self._account = Account.PROCESS if value else Account.USER
        return value

    def vfio_ioas(self, fields: Fields, reply: Reply) -> None:
        """`iommufd_vfio_ioas`: EOPNOTSUPP, ENODEV (none is set), ENOENT."""
        size, identity, operation, reserved = fields
        if reserved or operation not in (_VFIO_GET, _VFIO_SET, _VFIO_CLEAR):
            refuse(errno.EOPNOTSUPP)
        if operation == _VFIO_GET:
            reply((size, self.number_of(self.need_compat_ioas()), operation, reserved))
        else:
            self.compat_ioas = self._get(identity, Ioas) if operation == _VFIO_SET else None

    def need_compat_ioas(self) -> Ioas:
        """`get_compat_ioas`: ENODEV."""
        return refuse(errno.ENODEV) if self.compat_ioas is None else self.compat_ioas

    # -------------------------------------------------------------------------------------------------- page tables

    def hwpt_alloc(self, fields: Fields, reply: Reply) -> None:
        """`iommufd_hwpt_alloc`: EOPNOTSUPP, EINVAL, ENOENT, EINVAL (target), EOPNOTSUPP, then as `Ioas.add_table`."""
        size, flags, device, target, _number, reserved, data_type, data_length, *rest = fields
        if reserved:
            refuse(errno.EOPNOTSUPP)
        if bool(data_type) != bool(data_length):
            refuse(errno.EINVAL)
        self._get(device, BoundDevice)
        ioas = self.objects.get(target)
        model = self._machine.iommu
        if isinstance(ioas, Hwpt):  # nested translation, for which no page table was made
            nests = model.allocates_for_users and (model.hw_type or not self._version.bind_structs)
            refuse(errno.EINVAL if nests and data_type and not flags else errno.EOPNOTSUPP)
        if not isinstance(ioas, Ioas):
            refuse(errno.EINVAL)
        if flags & ~self._allowed_flags(model) or data_type:
            refuse(errno.EOPNOTSUPP)
        hwpt = Hwpt(ioas, model, self._version, automatic=False, tracks=bool(flags & _DIRTY_TRACKING))
        ioas.add_table(hwpt)
        if flags & _FAULT_ID:
            ioas.remove_table(hwpt)
            refuse(errno.ENOENT)  # there are no fault queues
        number = self._new(hwpt)
        answer = (size, flags, device, target, number, reserved, data_type, data_length, *rest)
        self._try(lambda: reply(answer), undo=lambda: self._free(hwpt))

    def _allowed_flags(self, model: IommuModel) -> int:
        if not model.allocates_for_users:
            return 0
        newer = (_PASID if model.allocates_pasid else 0) | _FAULT_ID if self._version.bind_structs else 0
        return newer | (_DIRTY_TRACKING if model.dirty_tracking else 0)

    def get_hw_info(self, fields: Fields, reply: Reply) -> None:
        """`iommufd_get_hw_info`: EOPNOTSUPP, ENOENT, EFAULT. The buffer is filled up with zeros."""
        size, flags, device, room, pointer, kind, reserved, _capabilities = fields
        known = _INPUT_TYPE if self._version.bind_structs else 0
        if flags & ~known or reserved:
            refuse(errno.EOPNOTSUPP)
        self._get(device, BoundDevice)
        if self._machine.noiommu is not None:
            refuse(errno.EOPNOTSUPP)
        model = self._machine.iommu
        if flags & _INPUT_TYPE and model.hw_type and kind not in (0, model.hw_type):
            refuse(errno.EOPNOTSUPP)
        if room:
            write_memory(pointer, model.hw_info[:room].ljust(room, b"\0"))
        can = (_CAN_TRACK if model.dirty_tracking else 0) | (_NO_ATS if self._version.bind_structs else 0)
        reply((size, flags, device, len(model.hw_info), pointer, model.hw_type, reserved, can))

    def set_dirty_tracking(self, fields: Fields, _reply: Reply) -> None:
        """`iommufd_hwpt_set_dirty_tracking`: EOPNOTSUPP, ENOENT. The reserved field is not looked at."""
        _size, flags, identity, _reserved = fields
        if flags & ~1:
            refuse(errno.EOPNOTSUPP)
        self._get(identity, Hwpt).set_tracking(enable=bool(flags))

    def get_dirty_bitmap(self, fields: Fields, _reply: Reply) -> None:
        """`iommufd_hwpt_get_dirty_bitmap`: EOPNOTSUPP, ENOENT, then as `Hwpt.get_dirty`."""
        _size, identity, flags, reserved, iova, length, page, data = fields
        if flags & ~1 or reserved:
            refuse(errno.EOPNOTSUPP)
        self._get(identity, Hwpt).get_dirty(flags=flags, iova=iova, size=length, page=page, data=data)

    # ---------------------------------------------------------------------------------------------------- checking

    def _check(self) -> None:
        hwpts = [each for each in self.objects.values() if isinstance(each, Hwpt)]
        for space in self.spaces():
            space._check()
            assert space.tables == [each for each in hwpts if each.ioas is space] or len(space.tables) > 1
        for claim in self._claims.values():
            assert claim.bound
            assert claim.group.claim is claim
            assert bool(claim.attached) == (claim.hwpt is not None)
        for hwpt in hwpts:
            users = [bound for claim in self._claims.values() if claim.hwpt is hwpt for bound in claim.attached]
            assert hwpt.users == len(users)
            assert hwpt.users or not hwpt.automatic


def _unmodelled(_fields: Fields, _reply: Reply) -> None:
    refuse(errno.EOPNOTSUPP)


def _type1_flags(flags: int) -> int:
    return (READ if flags & _READABLE else 0) | (WRITE if flags & _WRITEABLE else 0)


def _option_huge_pages(ioas: Ioas, operation: int, value: int) -> int:
    if operation == _GET:
        return int(ioas.huge_pages)
    if operation != _SET:
        refuse(errno.EOPNOTSUPP)
    if value > 1:
        refuse(errno.EINVAL)
    ioas.set_huge_pages(wanted=bool(value))
    return value


def _check_tail(argument: Argument, known: int, size: int) -> None:
    """`copy_struct_from_user`: E2BIG if a byte behind the known structure is not zero, EFAULT if that comes first."""
    at = known
    while at < size:
        count = min(_CHUNK, size - at)
        try:
            wrong = any(argument.read(count, at))
        except OSError:
            wrong = _begins_wrong(argument, at, count)
        if wrong:
            refuse(errno.E2BIG)
        at += count


def _begins_wrong(argument: Argument, at: int, count: int) -> bool:
    """Look at memory that cannot be read to the end (`check_zeroed_user`). EFAULT for zeros up to that end."""
    return any(any(argument.read(min(_WORD, at + count - word), word)) for word in range(at, at + count, _WORD))
