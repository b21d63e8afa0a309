"""The trace of the calls on a fake kernel, and the calls that shall fail."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from errno import errorcode as errno_names
from typing import NamedTuple, TypeVar

from pyvfio import ioctls, iommufd_ioctls
from pyvfio.testing.fake.process import refuse
from pyvfio.testing.fake.unmodelled import Unmodelled

logger = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")
_FILE_CALLS = frozenset(
    ("open", "close", "ioctl", "pread", "pwrite", "registers", "eventfd", "eventfd_read", "poll", "memlock")
)
_MEMORY_CALLS = frozenset(
    ("mmap", "mprotect", "madvise", "munmap", "memfd_create", "dup", "ftruncate", "fallocate", "file_status")
)
_LOCK_CALLS = frozenset(("mlockall", "munlockall", "munlock", "mlocked", "resident"))
CALLS = _FILE_CALLS | _MEMORY_CALLS | _LOCK_CALLS
KEPT = 256  # the bytes of an ioctl's buffer that the trace keeps


class _ContainerFd(ctypes.Structure):
    _fields_ = [("container", ctypes.c_int32)]


class _DirtyRange(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("argsz", "flags")),
        *((name, ctypes.c_uint64) for name in ("iova", "size", "pgsize", "bitmap_size", "data")),
    ]


_RANGE_SIZE = ctypes.sizeof(_DirtyRange)
_STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "VFIO_GROUP_GET_STATUS": ioctls.vfio_group_status,
    "VFIO_DEVICE_GET_INFO": ioctls.vfio_device_info,
    "VFIO_DEVICE_GET_REGION_INFO": ioctls.vfio_region_info,
    "VFIO_DEVICE_GET_IRQ_INFO": ioctls.vfio_irq_info,
    "VFIO_DEVICE_SET_IRQS": ioctls.vfio_irq_set,
    "VFIO_IOMMU_GET_INFO": ioctls.vfio_iommu_type1_info,
    "VFIO_IOMMU_MAP_DMA": ioctls.vfio_iommu_type1_dma_map,
    "VFIO_IOMMU_UNMAP_DMA": ioctls.vfio_iommu_type1_dma_unmap,
    "VFIO_IOMMU_DIRTY_PAGES": ioctls.vfio_iommu_type1_dirty_bitmap,  # to get a bitmap: _DirtyRange
    "VFIO_GROUP_SET_CONTAINER": _ContainerFd,
    "VFIO_DEVICE_FEATURE": ioctls.vfio_device_feature,
    "VFIO_DEVICE_IOEVENTFD": ioctls.vfio_device_ioeventfd,
    "VFIO_DEVICE_BIND_IOMMUFD": ioctls.vfio_device_bind_iommufd,
    "VFIO_DEVICE_ATTACH_IOMMUFD_PT": ioctls.vfio_device_attach_iommufd_pt,
    "VFIO_DEVICE_DETACH_IOMMUFD_PT": ioctls.vfio_device_detach_iommufd_pt,
    "IOMMU_DESTROY": iommufd_ioctls.iommu_destroy,
    "IOMMU_IOAS_ALLOC": iommufd_ioctls.iommu_ioas_alloc,
    "IOMMU_IOAS_ALLOW_IOVAS": iommufd_ioctls.iommu_ioas_allow_iovas,
    "IOMMU_IOAS_COPY": iommufd_ioctls.iommu_ioas_copy,
    "IOMMU_IOAS_IOVA_RANGES": iommufd_ioctls.iommu_ioas_iova_ranges,
    "IOMMU_IOAS_MAP": iommufd_ioctls.iommu_ioas_map,
    "IOMMU_IOAS_MAP_FILE": iommufd_ioctls.iommu_ioas_map_file,
    "IOMMU_IOAS_UNMAP": iommufd_ioctls.iommu_ioas_unmap,
    "IOMMU_OPTION": iommufd_ioctls.iommu_option,
    "IOMMU_VFIO_IOAS": iommufd_ioctls.iommu_vfio_ioas,
    "IOMMU_HWPT_ALLOC": iommufd_ioctls.iommu_hwpt_alloc,
}


class Call(NamedTuple):
    """A system call.

    `call`: the name of the method. `request`: the C name of an ioctl, or "". `result`: the returned number, or None.
    `errno`: the number of the OSError, or 0. `error`: another exception in words.
    """

    call: str
    request: str
    given: tuple[int | str | bytes, ...]
    result: int | None
    errno: int
    error: str = ""

    @property
    def arguments(self) -> dict[str, int | str | bytes]:
        """The arguments by name. For a VFIO ioctl: the fields of the structure before the call."""
        if self.call != "ioctl":
            return {f"argument{number}": value for number, value in enumerate(self.given)}
        fd, number, argument = self.given
        answer: dict[str, int | str | bytes] = {"fd": fd, "number": number}
        if self.request == "VFIO_GROUP_GET_DEVICE_FD" and isinstance(argument, bytes):
            return answer | {"name": argument.partition(b"\0")[0].decode("utf-8", "replace")}
        structure = _STRUCTURES.get(self.request)
        if self.request == "VFIO_IOMMU_DIRTY_PAGES" and isinstance(argument, bytes) and len(argument) >= _RANGE_SIZE:
            structure = _DirtyRange
        if structure is None or not isinstance(argument, bytes) or len(argument) < ctypes.sizeof(structure):
            return answer | {"argument": argument}
        fields = structure.from_buffer_copy(argument)
        return answer | {str(field[0]): int(getattr(fields, field[0])) for field in structure._fields_}

    def __str__(self) -> str:
        values = ", ".join(f"{k}={v:#x}" if isinstance(v, int) else f"{k}={v!r}" for k, v in self.arguments.items())
        outcome = os.strerror(self.errno) if self.errno else self.error or str(self.result)
        return f"{self.request or self.call}({values}) -> {outcome}"


@dataclass
class Failure:
    """A planned failure of the `nth` matching call from now on. `after`: the call takes effect before the failure."""

    call: str | None
    request: int | str | None
    nth: int
    errno: int
    after: bool

    def __post_init__(self) -> None:
        if self.errno not in errno_names:
            raise ValueError(f"no such errno: {self.errno}")
        if isinstance(self.request, str) and not any(hasattr(each, self.request) for each in (ioctls, iommufd_ioctls)):
            raise ValueError(f"no such request: {self.request!r}: use a name of linux/vfio.h or linux/iommufd.h")
        if self.call is not None and self.call not in CALLS:
            raise ValueError(f"no such call: {self.call!r}; one of {', '.join(sorted(CALLS))}")
        if self.nth < 1:
            raise ValueError(f"nth is 1 or more, not {self.nth}")
        if self.request is not None and self.call not in ("ioctl", None):
            raise ValueError(f"{self.call} has no request")

    def __str__(self) -> str:
        what = self.request or self.call or "any call"
        return f"call {self.nth} from now of {what} fails with {errno_names[self.errno]}"

    def matches(self, call: str, number: int, request: str) -> bool:
        """Return whether a call matches."""
        return self.call in (call, None) and (self.request is None or self.request in (number, request))


class Failures:
    """The calls that shall fail. Each fails once and is then removed."""

    def __init__(self) -> None:
        self._planned: list[Failure] = []

    def __bool__(self) -> bool:
        return bool(self._planned)

    def __iter__(self) -> Iterator[Failure]:
        return iter(self._planned)

    def plan(self, failure: Failure) -> None:
        """Add a failure."""
        self._planned.append(failure)

    def clear(self) -> None:
        """Remove all failures."""
        self._planned.clear()

    def due(self, call: str, number: int, request: str) -> Failure | None:
        """Count a call, and return the failure that applies now, or None."""
        found = None
        for failure in [planned for planned in self._planned if planned.matches(call, number, request)]:
            failure.nth -= 1
            if not failure.nth and found is None:
                found = failure
        self._planned = [planned for planned in self._planned if planned.nth > 0]
        return found


class Record:
    """The way of every call through the fake: `trace` keeps the call, and `failures` decides whether the call fails."""

    def __init__(self) -> None:
        self.trace: list[Call] = []
        self.failures = Failures()
        self.unmodelled: list[Unmodelled] = []

    def warn(self, part: Unmodelled | None) -> None:
        """Note a request that is not modelled, and log a warning. Each request is noted once."""
        if part is not None and part not in self.unmodelled:
            self.unmodelled.append(part)
            logger.warning("%s", part)

    def observed(
        self,
        call: str,
        given: tuple[int | str | bytes, ...],
        action: Callable[[], _Answer],
        *,
        number: int = -1,
        request: str = "",
        always: bool = False,
        undo: Callable[[_Answer], object] | None = None,
    ) -> _Answer:
        """Make a call, unless a failure is planned.

        `always`: the call takes effect even if a failure is planned. `undo`: called with the result if the call fails
        after the effect, since the caller never receives the result.
        """
        failure = self.failures.due(call, number, request) if self.failures else None
        try:
            if failure is not None and not failure.after and not always:
                refuse(failure.errno)
            answer = action()
            if failure is not None:
                if undo is not None:
                    undo(answer)
                refuse(failure.errno)
        except BaseException as error:
            number_or_0 = error.errno or 0 if isinstance(error, OSError) else 0
            self.trace.append(Call(call, request, given, None, number_or_0, "" if number_or_0 else repr(error)))
            raise
        self.trace.append(Call(call, request, given, answer if isinstance(answer, int) else None, 0))
        return answer
