"""Hand over a container of type1: the virtual addresses of the mappings are given up and set again."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from pyvfio import ioctls
from pyvfio.container import Container, Group
from pyvfio.device import Device
from pyvfio.errors import HandOverError, IoctlError, PinLimitError, UnsupportedError, VfioError, raise_collected
from pyvfio.handle import Handle, attempt
from pyvfio.iommu.space import Mapping as DmaRange
from pyvfio.live_update.handed_space import HandedContainer, HandedDevice
from pyvfio.live_update.state import State
from pyvfio.live_update.vaddr import explain_limit, give_up_all, give_up_vaddr, join_limits, set_vaddr
from pyvfio.units import Iova, Vaddr

if TYPE_CHECKING:
    from pyvfio.blocks.block import RamBlock
    from pyvfio.dma import DmaMapper
    from pyvfio.extents import Extent
    from pyvfio.guard import Guarded
    from pyvfio.kernel import Kernel


class ContainerGiving:
    """As `Giving`, for a container."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self._groups: tuple[Group, ...] = ()
        self._given_up = False  # set before the call, so the addresses may still be set
        self.devices: tuple[Device, ...] = ()

    @property
    def space(self) -> Container:
        """As `Giving.space`."""
        return self._container

    def look(self) -> None:
        """As `Giving.look`."""
        self._groups = tuple(self._container.groups.values())
        self.devices = tuple(device for group in self._groups for device in group.devices if isinstance(device, Device))

    def check_support(self) -> None:
        """As `Giving.check_support`."""
        if not self._container.check_extension(ioctls.VFIO_UPDATE_VADDR):
            raise UnsupportedError(
                "the kernel cannot hand over mappings: VFIO_UPDATE_VADDR is not supported",
                hint="Linux supports VFIO_UPDATE_VADDR from 5.12 on, but not for a container without a group or with a "
                "mediated device",
            )

    def obstacles(self, mapper: DmaMapper) -> list[str]:
        """As `Giving.obstacles`: none."""
        del mapper
        return []

    def strangers(self) -> list[str]:
        """As `Giving.strangers`."""
        count = len(self._container.table)
        there = self._container.entry_limit - self._container.get_info().dma_avail
        if there != count:
            return [f"the container has {there} mappings, but this process knows only {count}: unmap the others"]
        return []

    def begin(self) -> list[int]:
        """As `Giving.begin`."""
        fds = [handle.fd for handle in (self._container, *self._groups, *self.devices)]
        for group in self._groups:
            group.set_aside()  # from now on: no change of interrupts, no map of a BAR, no low power
        return fds

    def describe(self) -> tuple[HandedContainer, tuple[HandedDevice, ...]]:
        """As `Giving.describe`."""
        numbers = tuple(group.number for group in self._groups)
        devices = tuple(HandedDevice(device.bdf, device.group.number) for device in self.devices)
        return HandedContainer(self._container.iommu_type, numbers), devices

    def give_up(self) -> None:
        """As `Giving.give_up`."""
        self._given_up = True
        give_up_all(self._container)
        self._container.set_aside()

    def restore(self) -> None:
        """As `Giving.restore`: each mapping gets the address that it had before. Two ioctls for each mapping."""
        handles = (self._container, *self._groups)
        for handle in handles:
            handle.take_back()
        if not self._given_up:
            return
        failures: list[Exception] = []
        try:
            for mapping in self._container.mappings:
                attempt(partial(self._restore_one, mapping), failures)
            raise_collected("cancelling a hand-over", join_limits(failures, self._container))
        except BaseException:
            for handle in handles:
                handle.set_aside()
            raise
        self._given_up = False

    def _restore_one(self, mapping: DmaRange) -> None:
        # The address is given up first, because the other process may have set an address of its own.
        give_up_vaddr(self._container, mapping)
        set_vaddr(self._container, mapping)

    def closes(self) -> Sequence[Callable[[], object]]:
        """As `Giving.closes`."""
        closes = [handle.close_fd for handle in (*self._groups, self._container)]
        return [*closes, self._container.groups.clear]


class ContainerTaking:
    """As `Taking`, for a container."""

    def __init__(self) -> None:
        self._handles: list[Handle] = []
        self._container: Container | None = None
        self._told: list[DmaRange] = []  # mappings that may have an address of this process
        self._lost = False  # whether they may now have an address of the other process, which is cancelling
        self._mapped = 0

    @property
    def owners(self) -> Sequence[Guarded]:
        """As `Taking.owners`: the container."""
        return [self._known()]

    def _known(self) -> Container:
        if self._container is None:
            raise VfioError("no container has been adopted yet")
        return self._container

    def adopt(self, state: State, fds: Sequence[int], kernel: Kernel) -> tuple[Container, Mapping[str, Device]]:
        """As `Taking.adopt`."""
        handed = state.space
        if not isinstance(handed, HandedContainer):
            raise TypeError(f"{handed} is no container")
        self._mapped = state.mapped
        groups = {
            number: self._adopt_group(number, fd, kernel)
            for number, fd in zip(handed.groups, fds[1 : len(handed.names)], strict=True)
        }
        container = self._container = Container.from_fd(
            fds[0],
            iommu_type=handed.iommu_type,
            groups=groups.values(),
            mapped=sum(len(block.pieces) for block in state.blocks),
            dma_bits=state.container_bits,
            kernel=kernel,
        )
        self._handles.append(container)
        container.why = "the former process had this address space"
        devices = {}
        for described, fd in state.device_fds(fds):
            group = groups[described.group or 0]
            device = devices[described.bdf] = Device.from_fd(group, described.bdf, fd)
            self._handles.append(device)
        return container, devices

    def _adopt_group(self, number: int, fd: int, kernel: Kernel) -> Group:
        group = Group.from_fd(fd, number=number, kernel=kernel)
        self._handles.append(group)
        if not group.get_status() & ioctls.VFIO_GROUP_FLAGS_CONTAINER_SET:
            raise HandOverError(f"IOMMU group {number} is in no container: the other process has detached it")
        return group

    def adopt_piece(self, block: RamBlock, iova: int, piece: Extent) -> None:
        """As `Taking.adopt_piece`: the mapping gets an address of this process."""
        container = self._known()
        mapping = DmaRange(Iova(iova + piece.start), piece.size, Vaddr(block.vaddr + piece.start))
        self._told.append(mapping)
        try:
            set_vaddr(container, mapping)
        except PinLimitError as error:
            locked = sum(told.size for told in self._told[:-1])
            raise explain_limit(error, container, size=self._mapped, locked=locked) from error
        except IoctlError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):
                self._told.pop()  # the kernel has changed nothing
                self._lost = True
            raise _explain(error, mapping) from error

    def conclude(self, state: State) -> None:
        """As `Taking.conclude`: nothing is left to do."""

    def undo(self, failures: list[Exception]) -> bool:
        """As `Taking.undo`: no mapping has an address of this process, if that is known."""
        unknown = self._lost and bool(self._told)
        if (container := self._container) is not None:
            for mapping in () if unknown else self._told:
                attempt(partial(give_up_vaddr, container, mapping), failures)
        return unknown or bool(failures)

    def release(self) -> None:
        """As `Taking.release`."""
        for handle in self._handles:
            handle.release_fd()

    def end(self) -> None:
        """As `Taking.end`: nothing is left to do."""


def _explain(error: IoctlError, mapping: DmaRange) -> VfioError:
    if error.errno not in (errno.EINVAL, errno.ENOENT):
        return error
    hint = (
        "The other process has cancelled, another process has taken over before, or the state is of an earlier "
        "hand-over; hand over once more"
        if error.errno == errno.EINVAL
        else "The other process has unmapped that range, or has exited with all descriptors"
    )
    what = "has an address" if error.errno == errno.EINVAL else "is not mapped"
    return HandOverError(f"IOVA {mapping.range} {what}, and cannot be taken over ({error.request})", hint=hint)
