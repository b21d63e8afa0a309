"""Hand over an address space of an iommufd: another process has the memory charged to itself.

The mappings are of files, and depend on no process. Nothing is given up, so that a cancel before the take-over needs no
call. One call of the new process moves the charges: IOMMU_IOAS_CHANGE_PROCESS. An `Agreement` tells the two processes
from each other, as the kernel does not.

If pinned memory counts by process, and the charged process has ended, the call is EINVAL, and the caller stays charged
for good. So pyvfio does not make the call then: the memory stays without a charge, and in reach of the devices.

Source: `iommufd_ioas_change_process` in drivers/iommu/iommufd/ioas.c, seen on Linux 7.3.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from pyvfio.device import Device
from pyvfio.device.cdev import CdevAttachment
from pyvfio.errors import HandOverError, IoctlError, PinLimitError, UnsupportedError, VfioError
from pyvfio.handle import Handle
from pyvfio.ioas import Ioas
from pyvfio.iommu.space import Mapping as DmaRange
from pyvfio.iommu.table import describe_mappings
from pyvfio.iommufd import Iommufd
from pyvfio.live_update.agreement import Agreement, Side
from pyvfio.live_update.handed_space import HandedDevice, HandedIoas
from pyvfio.live_update.state import State
from pyvfio.memory.locking import limit_error, raise_limit
from pyvfio.units import Iova, Vaddr, format_size

if TYPE_CHECKING:
    from pyvfio.blocks.block import RamBlock
    from pyvfio.dma import DmaMapper
    from pyvfio.extents import Extent
    from pyvfio.guard import Guarded
    from pyvfio.kernel import Kernel

logger = logging.getLogger(__name__)


class IoasGiving:
    """As `Giving`, for an Ioas."""

    def __init__(self, space: Ioas) -> None:
        self._space = space
        self._iommufd = space.iommufd
        self._agreement: Agreement | None = None
        self._has_addresses = False
        self.devices: tuple[Device, ...] = ()

    @property
    def space(self) -> Ioas:
        """As `Giving.space`."""
        return self._space

    def look(self) -> None:
        """As `Giving.look`."""
        self.devices = tuple(device for device in self._iommufd.devices if isinstance(device, Device))

    def check_support(self) -> None:
        """As `Giving.check_support`.

        The memory is this process's already, so the call changes nothing. If a mapping is by address, the call fails as
        in the other process.
        """
        if not self._iommufd.charge_moves:
            return
        try:
            self._iommufd.ioas_change_process()
        except IoctlError as error:
            if error.errno == errno.ENOTTY:
                raise UnsupportedError(
                    "the kernel cannot hand over mappings of an iommufd: IOMMU_IOAS_CHANGE_PROCESS is not supported",
                    hint='Linux 6.13 is the first that can. On older kernels, use open_device(..., iommu="type1")',
                ) from error
            if error.errno != errno.EINVAL:
                raise
            self._has_addresses = True

    def obstacles(self, mapper: DmaMapper) -> list[str]:
        """As `Giving.obstacles`: memory that is mapped by address, all else that the iommufd has, and dirty tracking.

        The other process would not know the page tables that record writes, and could not read the record.
        """
        found = [
            f"RAM block '{block.idstr}' is mapped by address, since {block.state.memory.kind} is not a memfd, or a "
            "file on tmpfs or hugetlbfs: add the block with memory=Memfd()"
            for block, window in mapper.windows()
            if not window.is_by_file
        ]
        found += [
            f"{space!r} is in the same iommufd, which is handed over as a whole: close that space first"
            for space in self._iommufd.spaces
            if space is not self._space
        ]
        found += [
            f"{device!r} is bound to the iommufd, and not attached to {self._space.guard.what}: attach() or close() "
            "the device"
            for device in self._iommufd.devices
            if device not in self._space.devices
        ]
        if self._space.tracks:
            found.append(
                f"the writes of devices to {self._space.guard.what} are recorded, and the other process could not read "
                "the record: close() the DirtyTracking first, and open one in the other process"
            )
        return found

    def strangers(self) -> list[str]:
        """As `Giving.strangers`."""
        if not self._has_addresses:
            return []
        return [
            "the iommufd has a mapping by address that this process does not know (IOMMU_IOAS_CHANGE_PROCESS: EINVAL): "
            "unmap that memory"
        ]

    def begin(self) -> list[int]:
        """As `Giving.begin`."""
        agreement = self._agreement = Agreement.make(self._iommufd.kernel)
        fds = [self._iommufd.fd, agreement.shared, *(device.fd for device in self.devices)]
        self._iommufd.set_aside()  # from now on: no change of interrupts, no attach, no map of a BAR, no low power
        return fds

    def describe(self) -> tuple[HandedIoas, tuple[HandedDevice, ...]]:
        """As `Giving.describe`."""
        devices = [HandedDevice(device.bdf, None, _dev_id(device)) for device in self.devices]
        return HandedIoas(self._space.id, self._space.cut, self._iommufd.charge_moves), tuple(devices)

    def give_up(self) -> None:
        """As `Giving.give_up`. Makes no call."""
        self._space.set_aside()

    def restore(self) -> None:
        """As `Giving.restore`. Makes a call only if another process has taken over."""
        handles = (self._iommufd, self._space)
        for handle in handles:
            handle.take_back()
        if (agreement := self._agreement) is None:
            return
        try:
            with agreement.in_order():
                agreement.cancel()
                if agreement.taken:
                    self._take_charge_back(agreement)
        except BaseException:
            for handle in handles:
                handle.set_aside()
            raise
        self._end_agreement()

    def _take_charge_back(self, agreement: Agreement) -> None:
        lost = [mapping for mapping in self._space.table if not self._space.has_in_kernel(mapping)]
        if lost:
            raise HandOverError(
                f"the other process has taken over, and has unmapped IOVA {describe_mappings(lost)}",
                hint="Call finish(): the other process has the memory and the devices",
            )
        _check_charge(self._iommufd, agreement)
        if self._iommufd.charge_moves:
            _charge_here(self._iommufd, self._space.table.mapped)

    def _end_agreement(self) -> None:
        agreement, self._agreement = self._agreement, None
        if agreement is not None:
            agreement.close()
            self._iommufd.kernel.close(agreement.shared)

    def closes(self) -> Sequence[Callable[[], object]]:
        """As `Giving.closes`. The IOAS is not destroyed."""
        return [self._space.close_fd, self._iommufd.close_fd, self._end_agreement]


class IoasTaking:
    """As `Taking`, for an Ioas."""

    def __init__(self) -> None:
        self._handles: list[Handle] = []
        self._agreement: Agreement | None = None
        self._iommufd: Iommufd | None = None
        self._space: Ioas | None = None
        self._was_taken = False  # by a process that has ended

    @property
    def owners(self) -> Sequence[Guarded]:
        """As `Taking.owners`: the address space, then the iommufd."""
        return [self._known(), self._known().iommufd]

    def _known(self) -> Ioas:
        if self._space is None:
            raise VfioError("no address space has been adopted yet")
        return self._space

    def adopt(self, state: State, fds: Sequence[int], kernel: Kernel) -> tuple[Ioas, Mapping[str, Device]]:
        """As `Taking.adopt`. The devices are attached already, and no call attaches or detaches one."""
        handed = state.space
        if not isinstance(handed, HandedIoas):
            raise TypeError(f"{handed} is no address space of an iommufd")
        self._join(fds[1])
        iommufd = self._iommufd = Iommufd.from_fd(fds[0], kernel=kernel)
        self._handles.append(iommufd)
        iommufd.charge_moves = handed.charge_moves
        space = self._space = Ioas.from_id(iommufd, handed.id, dma_bits=state.container_bits, cut=handed.cut)
        space.why = "the former process had this address space"
        devices = {}
        for described, fd in state.device_fds(fds):
            device = devices[described.bdf] = Device.resume(space, described.bdf, fd, dev_id=described.dev_id)
            self._handles.append(device)
        return space, devices

    def _join(self, shared: int) -> None:
        agreement = self._agreement = Agreement(shared, Side.NEW)
        if not agreement.hold():
            raise HandOverError(
                "another process has taken over, or is about to", hint="One hand-over is for one process"
            )
        _check_not_cancelled(agreement)
        self._was_taken = agreement.taken

    def adopt_piece(self, block: RamBlock, iova: int, piece: Extent) -> None:
        """As `Taking.adopt_piece`. One ioctl, which changes nothing."""
        mapping = DmaRange(Iova(iova + piece.start), piece.size, Vaddr(block.vaddr + piece.start))
        if not self._known().adopt(mapping, write=not block.readonly):
            raise HandOverError(
                f"IOVA {mapping.range} is not mapped, and cannot be taken over",
                hint="The other process has unmapped that range, or the state is of an earlier hand-over",
            )

    def conclude(self, state: State) -> None:
        """As `Taking.conclude`: charge the memory to this process."""
        agreement, iommufd = self._agreement, self._known().iommufd
        if agreement is None:
            raise VfioError("no agreement has been joined yet")
        with agreement.in_order():
            _check_not_cancelled(agreement)
            _check_charge(iommufd, agreement, ended=self._was_taken)
            agreement.take(value=True)
            try:
                if iommufd.charge_moves:
                    _charge_here(iommufd, state.mapped)
            except BaseException:
                agreement.take(value=self._was_taken)
                raise

    def undo(self, failures: list[Exception]) -> bool:
        """As `Taking.undo`. No mapping needs this process. A charge stays here until the other process cancels."""
        del failures
        return False

    def release(self) -> None:
        """As `Taking.release`."""
        for handle in self._handles[1:]:
            handle.release_fd()
        if self._space is not None:
            self._space.close_fd()  # a descriptor of this process
        for handle in self._handles[:1]:
            handle.release_fd()
        if self._agreement is not None:
            self._agreement.close()

    def end(self) -> None:
        """As `Taking.end`: close the agreement."""
        agreement, self._agreement = self._agreement, None
        if agreement is not None:
            agreement.close()
            self._known().kernel.close(agreement.shared)


def _dev_id(device: Device) -> int | None:
    attachment = device.attachment
    return attachment.dev_id if isinstance(attachment, CdevAttachment) else None


def _check_not_cancelled(agreement: Agreement) -> None:
    if agreement.cancelled:
        raise HandOverError(
            "the other process has cancelled the hand-over", hint="Let the other process hand over once more"
        )


def _check_charge(iommufd: Iommufd, agreement: Agreement, *, ended: bool = False) -> None:
    """Note whether the kernel cannot move the charges, because the charged process has ended. `ended`: as known."""
    if iommufd.charge_moves and (ended or agreement.is_alone) and iommufd.counts_by_process:
        iommufd.charge_moves = False
        logger.warning("the process to which memory was charged has ended: the memory stays without a charge")


def _charge_here(iommufd: Iommufd, size: int) -> None:
    """Charge all mappings, `size` bytes, to this process. Raises IoctlError, PinLimitError. Changes all or nothing."""
    try:
        iommufd.ioas_change_process()
    except IoctlError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise _limit(iommufd, error, size) from error


def _limit(iommufd: Iommufd, error: IoctlError, size: int) -> IoctlError:
    with suppress(OSError):  # /proc cannot be read if no file descriptor is left
        kernel, request, arguments = iommufd.kernel, error.request, error.arguments
        lock = kernel.memlock()
        if lock.limit is None or lock.privileged:
            return error
        if iommufd.counts_by_process:
            return limit_error(error, lock, size, kernel=kernel, request=request, arguments=arguments, mapped=0)
        explained = PinLimitError.of(
            error,
            f"RLIMIT_MEMLOCK lets the processes of this user pin {format_size(lock.limit)} in all, and "
            f"{format_size(size)} are to be charged; processes of the user have an unknown number already",
            request=request,
            arguments=arguments,
            hint=f"Raise the limit of this process: {raise_limit(2 * size)}",
        )
        explained.limit, explained.used, explained.asked = lock.limit, 0, size
        explained.by_user = True
        return explained
    return error
