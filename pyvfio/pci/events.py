"""Live events of PCI functions, from the running kernel or from udevd."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pyvfio.arguments import checked_kernel
from pyvfio.errors import UnsupportedError
from pyvfio.kernel import Kernel
from pyvfio.pci.sysfs import is_running


@dataclass(frozen=True, slots=True)
class PciEvent:
    """An event of a PCI function: add, remove, bind, unbind or change. `driver` is set after a bind."""

    action: str
    bdf: str
    driver: str | None


def monitor(
    *, timeout: float | None = None, source: Literal["kernel", "udev"] = "kernel", kernel: Kernel | None = None
) -> Iterator[PciEvent]:
    """Yield PCI events, until no event has arrived for `timeout` seconds (None: without an end).

    The monitor listens from the call on, not from the first `next`: events between the two are not lost.

    Args:
        timeout: seconds.
        source: "kernel" requires no udevd. "udev" yields an event after the rules of udev have run.
        kernel: a kernel with the running machine's sysfs. Events arrive over netlink, not from sysfs.

    Raises: ValueError if `kernel` has another sysfs; UnsupportedError without libudev.
    Synchronization: one thread for each iterator.
    """
    kernel = checked_kernel(kernel)
    if not is_running(kernel):
        raise ValueError(
            f"PCI events come from the running machine, and {kernel.sysfs} is not the sysfs of this machine"
        )
    try:
        import pyudev  # noqa: PLC0415 (importing pyvfio must not require libudev)

        listener = pyudev.Monitor.from_netlink(pyudev.Context(), source=source)
    except ImportError as error:
        raise UnsupportedError(
            "PCI events require libudev", hint="Install libudev: apt-get install libudev1"
        ) from error
    listener.filter_by(subsystem="pci")
    listener.start()

    def events() -> Iterator[PciEvent]:
        for device in iter(lambda: listener.poll(timeout), None):
            yield PciEvent(str(device.action), str(device.sys_name), device.properties.get("DRIVER"))

    return events()
