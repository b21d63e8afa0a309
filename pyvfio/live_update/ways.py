"""The two ways to hand over an address space: `type1` for a container, `iommufd` for an Ioas."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from pyvfio.container import Container
from pyvfio.dma import DmaMapper
from pyvfio.guard import Guarded
from pyvfio.ioas import Ioas
from pyvfio.live_update import iommufd, type1
from pyvfio.live_update.handed_space import HandedContainer, HandedDevice, HandedSpace
from pyvfio.live_update.state import State

if TYPE_CHECKING:
    from pyvfio.blocks.block import RamBlock
    from pyvfio.device import Device
    from pyvfio.extents import Extent
    from pyvfio.kernel import Kernel


class Giving(Protocol):
    """The part of a hand-over, in the old process, that depends on the kind of address space.

    The locks of the mapper and of the space are held in each call, but for `closes`.
    """

    devices: tuple[Device, ...]
    """The devices, from `look` on."""

    @property
    def space(self) -> Container | Ioas:
        """The address space."""
        ...

    def look(self) -> None:
        """Note the devices and their owners."""
        ...

    def check_support(self) -> None:
        """Raise UnsupportedError if the kernel cannot hand over."""
        ...

    def obstacles(self, mapper: DmaMapper) -> list[str]:
        """Describe obstacles of this kind of space, in words."""
        ...

    def strangers(self) -> list[str]:
        """Describe mappings that this process does not know, in words."""
        ...

    def begin(self) -> list[int]:
        """Refuse changes of the devices from now on. Return the descriptors of the space and of the devices."""
        ...

    def describe(self) -> tuple[HandedSpace, tuple[HandedDevice, ...]]:
        """Describe the space and the devices for the other process."""
        ...

    def give_up(self) -> None:
        """Let another process take over from now on, and refuse changes of the space."""
        ...

    def restore(self) -> None:
        """Undo `begin` and `give_up`, also after a take-over. After an error, all is still given up."""
        ...

    def closes(self) -> Sequence[Callable[[], object]]:
        """Return the steps that close the space for this process only."""
        ...


class Taking(Protocol):
    """The part of a take-over, in the new process, that depends on the kind of address space."""

    @property
    def owners(self) -> Sequence[Guarded]:
        """The objects to close after devices, mapper and blocks."""
        ...

    def adopt(self, state: State, fds: Sequence[int], kernel: Kernel) -> tuple[Container | Ioas, Mapping[str, Device]]:
        """Make the space and the devices of the received descriptors. Raises HandOverError, ValueError."""
        ...

    def adopt_piece(self, block: RamBlock, iova: int, piece: Extent) -> None:
        """Make a mapping of the other process a mapping of this process. Raises HandOverError, IoctlError."""
        ...

    def conclude(self, state: State) -> None:
        """Make the last step of a take-over. Raises HandOverError, PinLimitError, IoctlError."""
        ...

    def undo(self, failures: list[Exception]) -> bool:
        """Undo the take-over, and append errors to `failures`. Return whether a mapping may need this process."""
        ...

    def release(self) -> None:
        """Release the received descriptors, unclosed."""
        ...

    def end(self) -> None:
        """Release the rest when the objects that were taken over are closed."""
        ...


def giving(space: Container | Ioas) -> Giving:
    """Return the old process's part for a space."""
    return type1.ContainerGiving(space) if isinstance(space, Container) else iommufd.IoasGiving(space)


def taking(state: State) -> Taking:
    """Return the new process's part for a state."""
    return type1.ContainerTaking() if isinstance(state.space, HandedContainer) else iommufd.IoasTaking()
