"""PCI devices as sysfs shows them: from a BDF to its IOMMU group, driver and group node, and from driver to driver.

Everything is read below `kernel.sysfs` and `kernel.dev`, so that another root may be given. pyudev is used where it
adds something, on the running machine's own sysfs: to enumerate, and to watch (`monitor`). It is imported when first
needed.

Changes of driver go through `driver_override` and `drivers_probe` (Documentation/ABI/testing/sysfs-bus-pci), are read
back, and are undone when they do not come true: see `bind`.

Synchronization: stateless, any thread may call anything. Two processes that change the driver of one device at the same
time can see each other's half-way states; sysfs has no lock against that.
"""

from __future__ import annotations

import difflib
import errno as errnos
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from pyvfio.errors import (
    AccessDeniedError,
    DeviceNotFoundError,
    GroupBusyError,
    GroupMember,
    Holder,
    RollbackError,
    UnavailableError,
    UnsupportedError,
    VfioError,
)
from pyvfio.kernel import Kernel

_logger = logging.getLogger(__name__)

VFIO_PCI = "vfio-pci"
NO_DRIVER = "none"
"""As a driver to bind to: none at all. sysfs-bus-pci names this value of `driver_override` as the way to opt out."""

SysfsWriter: TypeAlias = Callable[[Path, str], None]
"""What writes a value to a file of sysfs; raises OSError."""

PROC = Path("/proc")
_RUNNING_SYSFS = Path("/sys")
_BDF = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([01][0-9a-f])\.([0-7])")
# PCI-to-PCI, CardBus and semi-transparent bridges: what has a header of type 1 or 2. Host and ISA bridges are ordinary
# devices to the kernel, and their drivers do keep a group from being viable.
_BRIDGE_CLASSES = frozenset({0x0604, 0x0607, 0x0609})
# Drivers with `driver_managed_dma` that do not belong to VFIO. Any driver of a bridge was let through until Linux 5.18;
# since "PCI: portdrv: Set driver_managed_dma" pcieport is, and shpchp is not.
_HARMLESS_DRIVERS = frozenset({"pcieport", "pci-stub"})
_PROBE_PAUSE = 0.1  # seconds between two attempts, as SPDK's setup.sh paces them
_IFF_UP = 1  # linux/if.h


@dataclass(frozen=True, slots=True)
class PciDevice:
    """A snapshot of a PCI function: what its directory in sysfs said when it was read.

    `class_code` is the 24-bit class, subclass and interface; `numa_node` is None where the platform says none;
    `is_vfio` says that `driver` hands the device to user space through VFIO (vfio-pci or a variant of it);
    `is_bridge` that it is a PCI-to-PCI or CardBus bridge, which VFIO never takes.
    """

    bdf: str
    vendor: int
    device: int
    class_code: int
    driver: str | None
    driver_override: str | None
    iommu_group: int | None
    numa_node: int | None
    is_bridge: bool
    is_vfio: bool


@dataclass(frozen=True, slots=True)
class PciEvent:
    """What happened to a PCI function, as the kernel announced it (`driver` is known when it was bound)."""

    action: str
    bdf: str
    driver: str | None


@dataclass(frozen=True, slots=True)
class Step:
    """One write to sysfs. `str()` of it is the shell command that does the same."""

    path: Path
    value: str

    def __str__(self) -> str:
        return f"echo {self.value} > {self.path}" if self.value else f"echo > {self.path}"


@dataclass(frozen=True, slots=True)
class Binding:
    """A change of driver that came true (or, of a dry run, would): what was written, and what was there before.

    `driver` is the driver now. Of a dry run that leaves the choice to the kernel it is None. `restore` goes back.
    """

    bdf: str
    driver: str | None
    former_driver: str | None
    former_override: str | None
    steps: tuple[Step, ...]


def parse_bdf(text: str) -> str:
    """The canonical address of a PCI function: `0000:00:02.0`, lower case, with its domain (0000 where none is given).

    Raises ValueError for anything else. Domains may have more than four digits, as those behind Intel VMD do.
    """
    match = _BDF.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(
            f"not a PCI address: {text!r} (expected [domain:]bus:device.function in hexadecimal, such as 0000:00:02.0, "
            "with a device up to 1f and a function up to 7)"
        )
    domain, bus, device, function = match.groups()
    return f"{domain or '0000'}:{bus}:{device}.{function}"


# --- Reading -----------------------------------------------------------------------------------------------------


def read_device(kernel: Kernel, bdf: str) -> PciDevice:
    """What sysfs says about a PCI function now.

    Raises ValueError for what is no address and DeviceNotFoundError, which names what is near, for what is not there.
    Cost: ten small files, well below a millisecond. Source: Documentation/ABI/testing/sysfs-bus-pci.
    """
    bdf = parse_bdf(bdf)
    path = _device_path(kernel, bdf)
    vendor, device, class_code = (_read(path / name) for name in ("vendor", "device", "class"))
    if vendor is None or device is None or class_code is None:
        raise _not_found(kernel, bdf)
    driver = _link_name(path / "driver")
    override = _read(path / "driver_override")
    group = _link_name(path / "iommu_group")
    node = int(_read(path / "numa_node") or -1)
    return PciDevice(
        bdf=bdf,
        vendor=int(vendor, 16),
        device=int(device, 16),
        class_code=int(class_code, 16),
        driver=driver,
        driver_override=None if override in {None, "", "(null)"} else override,
        iommu_group=None if group is None else int(group),
        numa_node=None if node < 0 else node,
        is_bridge=int(class_code, 16) >> 8 in _BRIDGE_CLASSES,
        is_vfio=_is_vfio(path, driver),
    )


def enumerate_devices(kernel: Kernel) -> tuple[PciDevice, ...]:
    """All PCI functions, in the order of their addresses; empty where there is no PCI.

    The running machine's sysfs is enumerated by pyudev; any other root by reading the directory, because libudev cannot
    be given a root, and so is the machine's own where libudev is missing. Cost: some 0.3 ms a device.
    """
    devices = []
    for bdf in sorted(_udev_names(kernel) or _names(kernel.sysfs / "bus/pci/devices")):
        # A device may go between the listing and the reading of it.
        with suppress(DeviceNotFoundError):
            devices.append(read_device(kernel, bdf))
    return tuple(devices)


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
    if not _is_running(kernel):
        raise ValueError(f"events are the running machine's, and {kernel.sysfs} is not its sysfs")
    try:
        import pyudev  # noqa: PLC0415 (libudev is needed here and in _udev_names only)

        listener = pyudev.Monitor.from_netlink(pyudev.Context(), source=source)
    except ImportError as error:
        raise UnsupportedError("PCI events need libudev", hint="Install it: apt-get install libudev1") from error
    listener.filter_by(subsystem="pci")
    listener.start()

    def events() -> Iterator[PciEvent]:
        for device in iter(lambda: listener.poll(timeout), None):
            yield PciEvent(str(device.action), str(device.sys_name), device.properties.get("DRIVER"))

    return events()


def _is_running(kernel: Kernel) -> bool:
    return kernel.sysfs.resolve() == _RUNNING_SYSFS


def _udev_names(kernel: Kernel) -> list[str]:
    if not _is_running(kernel):
        return []
    try:
        import pyudev  # noqa: PLC0415 (so that importing pyvfio needs no libudev)

        return [str(device.sys_name) for device in pyudev.Context().list_devices(subsystem="pci")]
    except ImportError:
        _logger.debug("no libudev: enumerating %s instead", kernel.sysfs)
        return []


# --- Groups ------------------------------------------------------------------------------------------------------


def group_of(kernel: Kernel, bdf: str, *, proc: Path = PROC) -> int:
    """The number of the IOMMU group that a PCI function is in.

    Raises DeviceNotFoundError when there is no such device, and when it is in no group; then the error says which of
    firmware, virtual machine and kernel command line is the cause, as far as sysfs and `proc` show, and what to do.
    """
    device = read_device(kernel, bdf)
    if device.iommu_group is None:
        reason, hint = _why_no_group(kernel, proc)
        raise DeviceNotFoundError(f"{device.bdf} is in no IOMMU group: {reason}", hint=hint)
    return device.iommu_group


def group_members(kernel: Kernel, group: int) -> tuple[GroupMember, ...]:
    """All devices of an IOMMU group, also those that are not PCI, in the order of their names.

    One blocks when it is bound to a driver that uses the kernel's DMA API: any but VFIO's, pcieport and pci-stub. No
    driver is fine. Raises DeviceNotFoundError when there is no such group.
    Source: `driver_managed_dma` in drivers/pci, `iommu_group_claim_dma_owner` in drivers/iommu/iommu.c.
    """
    directory = kernel.sysfs / "kernel/iommu_groups" / str(group) / "devices"
    names = _names(directory)
    if not names:
        known = ", ".join(sorted(_names(directory.parent.parent), key=int)) or "none"
        raise DeviceNotFoundError(f"there is no IOMMU group {group}", hint=f"The groups are: {known}")
    return tuple(_member(directory / name) for name in sorted(names))


def _member(path: Path) -> GroupMember:
    driver = _link_name(path / "driver")
    harmless = driver is None or driver in _HARMLESS_DRIVERS or _is_vfio(path, driver)
    return GroupMember(bdf=path.name, driver=driver, blocks=not harmless)


def group_node(kernel: Kernel, group: int) -> Path:
    """The group's device node, which is there once a member is bound to a VFIO driver: `dev/vfio/7`.

    A group that VFIO made up for a device without an IOMMU has `dev/vfio/noiommu-7`.
    Source: `vfio_create_group` and `vfio_noiommu_group_alloc` in drivers/vfio/group.c.
    """
    made_up = _read(kernel.sysfs / "kernel/iommu_groups" / str(group) / "name") == "vfio-noiommu"
    return kernel.dev / "vfio" / (f"noiommu-{group}" if made_up else str(group))


def holders_of(kernel: Kernel, path: Path, *, proc: Path = PROC) -> tuple[Holder, ...]:
    """The processes that have a file open, as far as this user may see; never raises.

    A device node is told by its number, so that a node of another name in a container counts; another file by its
    inode. Not seen: other users' processes unless root asks, other PID namespaces, mappings, and what only holds a
    device descriptor of a group. Cost: a readlink for each descriptor of each process, some 10 ms on a desktop.
    """
    del kernel  # the processes are the running kernel's, whatever stands in for the rest
    try:
        wanted = _identity(os.stat(path))
    except OSError:
        return ()
    pids = sorted(int(name) for name in _names(proc) if name.isdigit())
    return tuple(Holder(pid, _read(proc / str(pid) / "comm") or "?") for pid in pids if _holds(proc, pid, path, wanted))


def _holds(proc: Path, pid: int, path: Path, wanted: tuple[int, ...]) -> bool:
    directory = proc / str(pid) / "fd"
    for name in _names(directory):
        with suppress(OSError):
            target = os.readlink(directory / name)
            # stat() of a file on a dead network mount does not return, so only what may be the file is asked.
            if (target.startswith("/dev/") or os.path.basename(target) == path.name) and _identity(
                os.stat(directory / name)
            ) == wanted:
                return True
    return False


def _identity(status: os.stat_result) -> tuple[int, ...]:
    if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
        return stat.S_IFMT(status.st_mode), status.st_rdev
    return stat.S_IFMT(status.st_mode), status.st_dev, status.st_ino


# --- Changing the driver -----------------------------------------------------------------------------------------


def write_sysfs(path: Path, value: str) -> None:
    """Write `value` to a file of sysfs in one write(2), as the kernel requires; raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def bind(
    kernel: Kernel,
    bdf: str,
    driver: str = VFIO_PCI,
    *,
    dry_run: bool = False,
    force: bool = False,
    patience: float = 1.0,
    write: SysfsWriter = write_sysfs,
    proc: Path = PROC,
) -> Binding:
    """Take a device from its driver, if it has one, and bind it to `driver`; `NO_DRIVER` leaves it without.

    When anything fails, or the driver has not taken the device after `patience` seconds, the former driver and override
    are put back and the error is raised; RollbackError says what could not be put back. A device that has the driver
    already is left alone. `dry_run` checks and plans all the same and writes nothing.

    Raises ValueError for what is no address or no name; DeviceNotFoundError; UnavailableError when the driver is not
    loaded; GroupBusyError when the group is open (taking a device from VFIO would then wait in the kernel until its
    user lets go of it: `vfio_unregister_group_dev`); AccessDeniedError without root; VfioError when the device is a
    bridge, when the driver does not take it, and, unless `force` is given, when a network interface that is up or a
    disk that is in use depends on it. Cost: the two drivers' remove and probe.
    """
    device = read_device(kernel, bdf)
    if device.driver == (None if driver == NO_DRIVER else driver):
        return Binding(device.bdf, device.driver, device.driver, device.driver_override, ())
    _check_driver(kernel, device, driver, proc)
    _check_idle(kernel, device, force=force, proc=proc)
    plan = [_override_step(kernel, device.bdf, driver), *_unbind_steps(kernel, device)]
    goal = _Goal(None if driver == NO_DRIVER else driver)
    if goal.driver is not None:
        plan.append(_probe_step(kernel, device.bdf))
    if dry_run:
        return Binding(device.bdf, goal.driver, device.driver, device.driver_override, tuple(plan))
    return _carry_out(kernel, device, plan, goal=goal, patience=patience, write=write)


def unbind(
    kernel: Kernel,
    bdf: str,
    *,
    to: str | None = None,
    dry_run: bool = False,
    force: bool = False,
    patience: float = 1.0,
    write: SysfsWriter = write_sysfs,
    proc: Path = PROC,
) -> Binding:
    """Give a device back: clear its override and let the kernel's own driver for it, if any, take it; or bind it to
    `to` as `bind` does.

    Refuses, fails and undoes as `bind` does. It is a failure when the driver that it was taken from takes
    it again. A device that is at home, without an override and with a driver that is not VFIO's, is left alone.
    """
    if to is not None:
        return bind(kernel, bdf, to, dry_run=dry_run, force=force, patience=patience, write=write, proc=proc)
    device = read_device(kernel, bdf)
    if device.driver is not None and device.driver_override is None and not device.is_vfio:
        return Binding(device.bdf, device.driver, device.driver, None, ())
    _check_idle(kernel, device, force=force, proc=proc)
    plan = [
        _override_step(kernel, device.bdf, None),
        *_unbind_steps(kernel, device),
        _probe_step(kernel, device.bdf),
    ]
    if dry_run:
        return Binding(device.bdf, None, device.driver, device.driver_override, tuple(plan))
    return _carry_out(kernel, device, plan, goal=_Goal(None, kernel_decides=True), patience=patience, write=write)


def restore(
    kernel: Kernel,
    binding: Binding,
    *,
    dry_run: bool = False,
    force: bool = False,
    write: SysfsWriter = write_sysfs,
    proc: Path = PROC,
) -> Binding:
    """Undo a `bind` or `unbind`: the former driver and override again. Returns the change, which can be undone in turn.

    Refuses, fails and undoes as `bind` does.
    """
    device = read_device(kernel, binding.bdf)
    target = replace(device, driver=binding.former_driver, driver_override=binding.former_override)
    if target.driver is not None:
        _check_loaded(kernel, target.driver)
    plan = _plan_back(kernel, device, target)
    if device.driver != target.driver:
        _check_idle(kernel, device, force=force, proc=proc)
    if dry_run or not plan:
        return Binding(device.bdf, target.driver, device.driver, device.driver_override, tuple(plan))
    return _carry_out(kernel, device, plan, goal=_Goal(target.driver), patience=0.0, write=write)


@dataclass(frozen=True, slots=True)
class _Goal:
    """What shall be true of the driver in the end: that it is `driver`, or (unbind) not the one that it was."""

    driver: str | None
    kernel_decides: bool = False

    def reached(self, driver: str | None, *, former: str | None) -> bool:
        if self.kernel_decides:
            return driver is None or driver != former
        return driver == self.driver

    def __str__(self) -> str:
        if self.kernel_decides:
            return "a driver of the kernel's choice"
        return "no driver" if self.driver is None else f"driver {self.driver}"


def _carry_out(
    kernel: Kernel,
    device: PciDevice,
    plan: Sequence[Step],
    *,
    goal: _Goal,
    patience: float,
    write: SysfsWriter,
) -> Binding:
    try:
        for step in plan:
            _write(step, write)
        driver = _await_driver(kernel, device, plan[-1], goal=goal, patience=patience, write=write)
    except BaseException as first:
        failures = _undo(kernel, device, write)
        if not failures:
            raise
        message = f"{device.bdf} was not brought back to driver {device.driver}, override {device.driver_override}"
        if not isinstance(first, Exception):
            first.add_note("; then ".join([message, *map(str, failures)]))
            raise
        raise RollbackError(message, [first, *failures], hint="scripts/list shows where it is now") from first
    _logger.info("%s: driver %s, was %s", device.bdf, driver, device.driver)
    return Binding(device.bdf, driver, device.driver, device.driver_override, tuple(plan))


def _await_driver(
    kernel: Kernel,
    device: PciDevice,
    last: Step,
    *,
    goal: _Goal,
    patience: float,
    write: SysfsWriter,
) -> str | None:
    # drivers_probe succeeds whether or not a driver took the device (`__device_attach_driver` ignores what probe
    # returned), and a former driver may still be on its way out: so the link decides, and asking again may help.
    deadline = time.monotonic() + patience
    while not goal.reached(driver := read_device(kernel, device.bdf).driver, former=device.driver):
        if time.monotonic() >= deadline:
            raise _did_not_take(device, goal, driver)
        time.sleep(min(_PROBE_PAUSE, patience))
        if last.path.name == "drivers_probe":
            _write(last, write)
    return driver


def _undo(kernel: Kernel, former: PciDevice, write: SysfsWriter) -> list[Exception]:
    """Bring the device back to `former` from wherever it is; what could not be done."""
    failures: list[Exception] = []
    try:
        for step in _plan_back(kernel, read_device(kernel, former.bdf), former):
            try:
                _write(step, write)
            except VfioError as error:
                failures.append(error)
        now = read_device(kernel, former.bdf)
        if (now.driver, now.driver_override) != (former.driver, former.driver_override) and not failures:
            failures.append(VfioError(f"it has driver {now.driver} and override {now.driver_override} now"))
    except VfioError as error:
        failures.append(error)
    return failures


def _plan_back(kernel: Kernel, now: PciDevice, then: PciDevice) -> list[Step]:
    plan = []
    if now.driver_override != then.driver_override:
        plan.append(_override_step(kernel, now.bdf, then.driver_override))
    if now.driver != then.driver:
        plan += _unbind_steps(kernel, now)
        if then.driver is not None:
            # Not drivers_probe: of several drivers that match, this one had it.
            plan.append(Step(kernel.sysfs / "bus/pci/drivers" / then.driver / "bind", now.bdf))
    return plan


def _override_step(kernel: Kernel, bdf: str, driver: str | None) -> Step:
    return Step(_device_path(kernel, bdf) / "driver_override", driver or "")


def _unbind_steps(kernel: Kernel, device: PciDevice) -> list[Step]:
    if device.driver is None:
        return []
    return [Step(kernel.sysfs / "bus/pci/drivers" / device.driver / "unbind", device.bdf)]


def _probe_step(kernel: Kernel, bdf: str) -> Step:
    return Step(kernel.sysfs / "bus/pci/drivers_probe", bdf)


def _write(step: Step, write: SysfsWriter) -> None:
    """The one place that writes to sysfs. The newline makes an empty value a write, and the kernel ignores it."""
    _logger.debug("%s", step)
    try:
        write(step.path, step.value + "\n")
    except OSError as error:
        if error.errno in {errnos.EACCES, errnos.EPERM}:
            raise AccessDeniedError(
                str(step.path), hint="Drivers are changed by root, on a sysfs that is mounted writable: run as root"
            ) from error
        name = errnos.errorcode.get(error.errno or 0, str(error.errno))
        raise VfioError(
            f"the kernel refused {step.value!r} written to {step.path}: {name}, {error.strerror}",
            hint="It may have logged why: dmesg | tail",
        ) from error


# --- What is refused ---------------------------------------------------------------------------------------------


def _check_loaded(kernel: Kernel, driver: str) -> None:
    if not driver or "/" in driver:
        raise ValueError(f"not the name of a driver: {driver!r}")
    if not (kernel.sysfs / "bus/pci/drivers" / driver).is_dir():
        raise UnavailableError(
            f"no PCI driver {driver} is loaded", hint=f"Load the module that has it: modprobe {driver}"
        )


def _check_driver(kernel: Kernel, device: PciDevice, driver: str, proc: Path) -> None:
    if driver == NO_DRIVER:
        return
    _check_loaded(kernel, driver)
    if "vfio" not in driver:
        return
    if device.is_bridge:
        raise VfioError(
            f"{device.bdf} is a PCI bridge, which {driver} does not take",
            hint="A bridge need not be bound to it: pcieport and no driver at all leave its group viable "
            f"(scripts/unbind --driver {NO_DRIVER} {device.bdf} takes any other from it)",
        )
    unsafe = _read(kernel.sysfs / "module/vfio/parameters/enable_unsafe_noiommu_mode")
    if unsafe not in {"Y", "1"}:
        group_of(kernel, device.bdf, proc=proc)


def _check_idle(kernel: Kernel, device: PciDevice, *, force: bool, proc: Path) -> None:
    """Refuse a device whose group is open; and, unless forced, one that the machine itself is using."""
    if device.iommu_group is not None:
        _check_group_closed(kernel, device, device.iommu_group, proc)
    if device.driver is None or device.is_vfio or device.is_bridge or force:
        return
    reasons = [*_interfaces_up(kernel, device.bdf), *_disks_in_use(kernel, device.bdf, proc)]
    if reasons:
        raise VfioError(
            f"{device.bdf} is in use through {device.driver}: {', '.join(reasons)}",
            hint="Take the interface down, unmount the disk; or force it, and lose what depends on it",
        )


def _check_group_closed(kernel: Kernel, device: PciDevice, group: int, proc: Path) -> None:
    nodes = [group_node(kernel, group)]
    nodes += [kernel.dev / "vfio/devices" / name for name in _names(_device_path(kernel, device.bdf) / "vfio-dev")]
    holders = {holder.pid: holder for node in nodes for holder in holders_of(kernel, node, proc=proc)}
    if holders or _is_open_somewhere(kernel, nodes[0]):
        raise GroupBusyError(group, tuple(holders.values()))


def _is_open_somewhere(kernel: Kernel, node: Path) -> bool:
    """Whether the kernel says so, which knows of other namespaces and of device descriptors that outlive the group's
    (`vfio_group_fops_open`); False when this user may not ask."""
    if not node.exists():
        return False
    try:
        kernel.close(kernel.open(str(node), os.O_RDWR))
    except OSError as error:
        return error.errno == errnos.EBUSY
    return False


def _interfaces_up(kernel: Kernel, bdf: str) -> Iterator[str]:
    for path in _class_devices(kernel, "net", bdf):
        if int(_read(path / "flags") or "0", 16) & _IFF_UP or _read(path / "operstate") == "up":
            yield f"network interface {path.name} is up"


def _disks_in_use(kernel: Kernel, bdf: str, proc: Path) -> Iterator[str]:
    mounted = _mounted(proc)
    swaps = (_read(proc / "swaps") or "").split()
    for path in _class_devices(kernel, "block", bdf):
        where = mounted.get(_read(path / "dev") or "") or mounted.get(f"/dev/{path.name}")
        if where is not None:
            yield f"{path.name} is mounted at {where}"
        elif f"/dev/{path.name}" in swaps:
            yield f"{path.name} is swapped to"
        elif holders := _names(path / "holders"):
            yield f"{path.name} is part of {', '.join(sorted(holders))}"


def _mounted(proc: Path) -> dict[str, str]:
    """Where block devices are mounted, by number (`8:1`) and by source: btrfs mounts have numbers of their own."""
    places = {}
    for line in (_read(proc / "self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        places[fields[2]] = places[after.split()[1]] = fields[4]
    return places


def _class_devices(kernel: Kernel, subsystem: str, bdf: str) -> Iterator[Path]:
    """The network interfaces or block devices that stand on a PCI function, however deep, partitions included."""
    root = _device_path(kernel, bdf).resolve()
    for name in sorted(_names(kernel.sysfs / "class" / subsystem)):
        path = (kernel.sysfs / "class" / subsystem / name).resolve()
        if any(root in place.parents for place in (path, *_nvme_controllers(path))):
            yield path


def _nvme_controllers(disk: Path) -> list[Path]:
    # With native multipath a namespace belongs to its subsystem, below devices/virtual, which links to its controllers.
    for place in disk.parents:
        if place.parent.name == "nvme-subsystem":
            return [(place / name).resolve() for name in _names(place) if (place / name).is_symlink()]
    return []


# --- What to say -------------------------------------------------------------------------------------------------


def _did_not_take(device: PciDevice, goal: _Goal, driver: str | None) -> VfioError:
    if driver is not None and driver == device.driver:
        reason = f"{driver} took it again"
        hint = (
            "It matches the device by itself, perhaps by an ids= parameter or new_id; name the driver to bind to, "
            f"or {NO_DRIVER}"
        )
    elif driver is not None:
        reason, hint = f"{driver} took it instead", "Something else, such as driverctl or a udev rule, binds it too"
    else:
        reason, hint = "no driver took it", "The driver's probe failed; the kernel may have logged why: dmesg | tail"
    return VfioError(f"{device.bdf} was to have {goal}, and {reason}", hint=hint)


def _not_found(kernel: Kernel, bdf: str) -> DeviceNotFoundError:
    names = sorted(_names(kernel.sysfs / "bus/pci/devices"))
    bus = bdf.rpartition(":")[0]
    beside = [name for name in names if name.startswith(f"{bus}:")]
    if not names:
        hint = f"There is no PCI device in {kernel.sysfs} at all"
    elif beside:
        hint = f"On bus {bus} there are {', '.join(beside)}; scripts/list shows all"
    else:
        near = ", ".join(difflib.get_close_matches(bdf, names, n=3, cutoff=0.0))
        hint = f"There is no bus {bus}; the nearest are {near}; scripts/list shows all"
    return DeviceNotFoundError(f"there is no PCI device {bdf}", hint=hint)


def _why_no_group(kernel: Kernel, proc: Path) -> tuple[str, str]:
    units = ", ".join(sorted(_names(kernel.sysfs / "class/iommu")))
    tables = _names(kernel.sysfs / "firmware/acpi/tables") & {"DMAR", "IVRS", "IORT", "VIOT"}
    options = _iommu_options(proc)
    off = sorted(word for word in options if word.endswith("=off"))
    cases = (
        (
            bool(units),
            f"none of this machine's IOMMUs ({units}) covers it",
            "It can be used through VFIO only where one does, in another slot or behind another root port",
        ),
        (
            bool(off),
            f"the kernel was told not to use the IOMMU ({', '.join(off)})",
            "Take that off the kernel command line and boot again",
        ),
        (
            "DMAR" in tables and "intel_iommu=on" not in options,
            "the firmware announces an IOMMU, and the kernel was not told to use it",
            "Add intel_iommu=on to the kernel command line and boot again",
        ),
        (
            bool(tables),
            f"the firmware announces an IOMMU ({', '.join(sorted(tables))}), and the kernel has not taken it up",
            "See dmesg | grep -i -e dmar -e iommu; its driver may be missing (virtio_iommu is often a module)",
        ),
        (
            _is_virtual_machine(kernel, proc),
            "this virtual machine has no IOMMU of its own",
            "Give it one; of QEMU: -machine q35,kernel-irqchip=split -device intel-iommu,intremap=on,caching-mode=on "
            "(and intel_iommu=on on the guest's command line), or -device virtio-iommu-pci",
        ),
        (
            True,
            "the firmware announces no IOMMU",
            "Turn it on in the firmware's set-up (Intel: VT-d, AMD: IOMMU or AMD-Vi); then add intel_iommu=on to the "
            "kernel command line on Intel",
        ),
    )
    return next((reason, hint) for applies, reason, hint in cases if applies)


def _iommu_options(proc: Path) -> set[str]:
    """`intel_iommu=on,sm_on` of the kernel command line as `intel_iommu=on` and `intel_iommu=sm_on`."""
    options = set()
    for word in (_read(proc / "cmdline") or "").split():
        name, _, values = word.partition("=")
        if name in {"iommu", "intel_iommu", "amd_iommu"}:
            options |= {f"{name}={value}" for value in values.split(",")}
    return options


def _is_virtual_machine(kernel: Kernel, proc: Path) -> bool:
    flags = re.search(r"^flags\s*:.*\bhypervisor\b", _read(proc / "cpuinfo") or "", re.MULTILINE)
    return flags is not None or _read(kernel.sysfs / "class/dmi/id/sys_vendor") == "QEMU"


# --- Files -------------------------------------------------------------------------------------------------------


def _device_path(kernel: Kernel, bdf: str) -> Path:
    return kernel.sysfs / "bus/pci/devices" / bdf


def _is_vfio(path: Path, driver: str | None) -> bool:
    # A variant driver may have any name; what it registers with VFIO shows below the device since Linux 6.1.
    return driver is not None and ("vfio" in driver or (path / "vfio-dev").is_dir())


def _read(path: Path) -> str | None:
    """What a small file says, without the newline; None when it cannot be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace").rstrip("\n")
    except OSError:
        return None


def _names(path: Path) -> set[str]:
    """What is in a directory; nothing when it cannot be read."""
    try:
        return set(os.listdir(path))
    except OSError:
        return set()


def _link_name(path: Path) -> str | None:
    """The last part of where a symbolic link leads; None when there is none."""
    try:
        return os.path.basename(os.readlink(path))
    except OSError:
        return None
