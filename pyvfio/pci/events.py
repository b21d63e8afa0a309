"""What happens to PCI functions while it happens: the events of the running machine's kernel or udevd."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pyvfio.errors import UnsupportedError
from pyvfio.kernel import Kernel
from pyvfio.pci.sysfs import is_running


@dataclass(frozen=True, slots=True)
class PciEvent:
    """What happened to a PCI function, as the kernel announced it (`driver` is known when it was bound)."""

    action: str
    bdf: str
    driver: str | None


def monitor(
    kernel: Kernel, *, timeout: float | None = None, source: Literal["kernel", "udev"] = "kernel"
) -> Iterator[PciEvent]:
    """PCI events (add, remove, bind, unbind, change) from the call on, until none has come for `timeout` seconds
    (None: for ever).

    Of the running machine only: events come over netlink, not from sysfs, so ValueError is raised for another root.
    `source` "kernel" needs no udevd; "udev" tells of an event after udev's rules have run, when a group node has its
    owner. Listening begins with the call, not with the first `next`, so what the caller does in between is not missed.
    Raises UnsupportedError where libudev is missing. Synchronization: one thread per iterator.
    """
    if not is_running(kernel):
        raise ValueError(f"events are the running machine's, and {kernel.sysfs} is not its sysfs")
    try:
        import pyudev  # noqa: PLC0415 (so that importing pyvfio needs no libudev)

        listener = pyudev.Monitor.from_netlink(pyudev.Context(), source=source)
    except ImportError as error:
        raise UnsupportedError("PCI events need libudev", hint="Install it: apt-get install libudev1") from error
    listener.filter_by(subsystem="pci")
    listener.start()

    def events() -> Iterator[PciEvent]:
        for device in iter(lambda: listener.poll(timeout), None):
            yield PciEvent(str(device.action), str(device.sys_name), device.properties.get("DRIVER"))

    return events()
