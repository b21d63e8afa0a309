"""The virtual machine's initramfs: a static busybox, the modules for the root file system, and an init script."""

import contextlib
import hashlib
import lzma
import os
import shlex
import struct
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyvfio.testing.kernels import GuestKernel
from pyvfio.testing.vm_errors import KernelUnavailableError, MissingToolError, find_tool

# In the order of loading. virtio_iommu precedes all modules that probe devices behind a virtio IOMMU. A module that a
# kernel does not have is omitted; init notes that in the kernel's log, and fails if the machine cannot do without.
MODULES = (
    "virtio_pci",
    "virtio_iommu",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
    "iommufd",
    "vfio_iommu_type1",
    "vfio-pci",
)

# Pid 1 stays in the initramfs, because init needs busybox to the end. The root of the command is the overlay, moved
# over "/": after a chroot alone, the kernel refuses user namespaces.
INIT = r"""#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
set -e
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
exec >/dev/kmsg 2>&1
fail() { echo "<2>vm: $*"; exit 1; }
while read -r file; do insmod "/modules/$file" || echo "vm: $file was not loaded"; done </modules/order
. /run/settings
# Each of the two refuses a device by its own parameter.
for module in vfio_iommu_type1 iommufd; do
    unsafe=/sys/module/$module/parameters/allow_unsafe_interrupts
    if [ "$unsafe_interrupts" ] && [ -e "$unsafe" ]; then echo 1 >"$unsafe"; fi
done

# Before 6.15, a device behind a virtio IOMMU gets the group when a driver is first bound to the device, and keeps the
# group (viot_iommu_configure, called by pci_dma_configure alone).
for device in /sys/bus/pci/devices/*; do
    read -r id <"$device/device"
    if [ "$id" = 0x11e8 ] && [ ! -e "$device/iommu_group" ]; then
        echo vfio-pci >"$device/driver_override"
        echo "${device##*/}" >/sys/bus/pci/drivers_probe
        if [ -e "$device/driver" ]; then echo "${device##*/}" >"$device/driver/unbind"; fi
        echo >"$device/driver_override"
    fi
done || echo "vm: not every edu device has a group"

# The number of a port's node depends on the order in which devices were probed; the name does not.
port() {
    tries=0
    while [ "$tries" -lt 500 ]; do
        for entry in /sys/class/virtio-ports/*; do
            if [ "$(cat "$entry/name")" = "$1" ]; then port=/dev/${entry##*/}; return; fi
        done 2>/dev/null
        tries=$((tries + 1)); usleep 10000
    done
    fail "there is no port $1"
}
# Each port is opened once, since a port has one owner at a time.
port pyvfio.status; exec 9>"$port"
port pyvfio.stdout; stdout=$port
port pyvfio.stderr; stderr=$port

mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro hostroot /low || fail 'no root over 9p'
mount -t tmpfs -o mode=755 tmpfs /up
mkdir /up/upper /up/work
mount -t overlay -o lowerdir=/low,upperdir=/up/upper,workdir=/up/work overlay /new || fail 'no overlay'
mount -t devtmpfs dev /new/dev
mount -t proc proc /new/proc
mount -t sysfs sys /new/sys
ln -s /proc/self/fd /new/dev/fd
ln -s fd/0 /new/dev/stdin
ln -s fd/1 /new/dev/stdout
ln -s fd/2 /new/dev/stderr
mkdir -p /new/dev/pts /new/dev/shm
mount -t devpts -o mode=620,ptmxmode=666 devpts /new/dev/pts
mount -t tmpfs -o mode=1777 tmpfs /new/dev/shm
mount -t debugfs debug /new/sys/kernel/debug || :
if [ "$modules" ]; then
    mkdir -p "/new/lib/modules/$(uname -r)"
    mount -o bind "/new$modules" "/new/lib/modules/$(uname -r)"
fi
hostname pyvfio-vm
ip link set lo up || :
cd /new
mount --move . /

mkfifo /run/out /run/err
{ cat /run/out; printf %s "$token"; } >"$stdout" &
out=$!
{ cat /run/err; printf %s "$token"; } >"$stderr" &
err=$!
echo "up $(uname -r)" >&9
set +e
setsid sh /run/command >/run/out 2>/run/err </dev/null 9>&- &
wait $!
status=$?

# Processes that the command leaves behind can hold the streams open for ever. Their output so far is delivered.
tries=0
while [ -d "/proc/$out" ] || [ -d "/proc/$err" ]; do
    tries=$((tries + 1))
    if [ "$tries" = 20 ]; then
        for stat in /proc/[0-9]*/stat; do
            pid=${stat#/proc/}
            read -r line <"$stat" || continue
            # shellcheck disable=SC2086
            set -- ${line##*) }
            # Session 0 has the processes of init and of the kernel. The command is in another, by setsid.
            [ "$4" = 0 ] || kill -9 "${pid%/stat}"
        done
    fi
    usleep 50000
done 2>/dev/null
echo "exit $status" >&9
while :; do sleep 1000; done
"""

_DIRECTORIES = ("bin", "dev", "proc", "sys", "modules", "run", "low", "up", "new")


@dataclass(frozen=True)
class CpioEntry:
    """Describe a file of an archive, or a directory if ``data`` is None. ``name`` has no leading slash."""

    name: str
    data: bytes | None
    mode: int = 0o755


def cpio_archive(entries: Iterable[CpioEntry]) -> bytes:
    """Return a cpio archive in the format of the kernel.

    Source: "newc" in Documentation/driver-api/early-userspace/buffer-format.rst.
    """
    parts = []
    for number, entry in enumerate([*entries, CpioEntry("TRAILER!!!", b"", 0)], 1):
        kind = 0o040000 if entry.data is None else 0o100000 if entry.mode else 0
        data, name = entry.data or b"", entry.name.encode() + b"\0"
        # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        fields = (number, kind | entry.mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0)
        header = b"070701" + b"".join(b"%08x" % field for field in fields) + name
        parts += [header, bytes(-len(header) % 4), data, bytes(-len(data) % 4)]
    return b"".join(parts)


def module_name(path: str) -> str:
    """Return the kernel's name for a module's file: ``vfio_pci`` for ``kernel/drivers/vfio/pci/vfio-pci.ko.xz``."""
    return path.rsplit("/", 1)[-1].split(".ko", 1)[0].replace("-", "_")


def load_order(modules_dep: str, wanted: Sequence[str]) -> list[str]:
    """Return the files of the wanted modules, each after the modules that the module depends on.

    ``modules_dep`` is the text of depmod's ``modules.dep``. Modules that are not in the text are omitted, because they
    may be built in.
    """
    needs = {}
    for line in modules_dep.splitlines():
        file, _, dependencies = line.partition(":")
        needs[file] = dependencies.split()
    files = {module_name(file): file for file in needs}
    order: dict[str, None] = {}
    for name in wanted:
        wanted_file = files.get(module_name(name))
        if wanted_file is not None:
            # depmod lists direct and indirect dependencies, the deepest last.
            order.update(dict.fromkeys([*reversed(needs[wanted_file]), wanted_file]))
    return list(order)


def read_module(path: Path) -> bytes:
    """Return a module without compression: busybox's insmod does not decompress."""
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix != ".ko":
        raise KernelUnavailableError(f"{path.name}: modules compressed with {path.suffix[1:]} cannot be unpacked here")
    return data


def is_static(program: bytes) -> bool:
    """Return whether an x86-64 ELF program has no PT_INTERP, and so needs no dynamic loader."""
    if program[:5] != b"\x7fELF\x02":
        return False
    (offset,) = struct.unpack_from("<Q", program, 32)
    size, count = struct.unpack_from("<HH", program, 54)
    return all(struct.unpack_from("<I", program, offset + size * index)[0] != 3 for index in range(count))


def image_of(kernel: GuestKernel, *, cache: Path) -> bytes:
    """Return the initramfs for a kernel, from the cache if made from the same files.

    Cost: about a second to make an initramfs.

    :raises MissingToolError: no static busybox is installed.
    :raises KernelUnavailableError: a module cannot be read.
    """
    busybox = Path(find_tool("busybox", package="busybox-static")).resolve()
    files: list[Path] = []
    if kernel.modules is not None:
        files = [kernel.modules / file for file in load_order((kernel.modules / "modules.dep").read_text(), MODULES)]
    digest = hashlib.sha256(repr([INIT, _DIRECTORIES, *map(_identity, [busybox, *files])]).encode()).hexdigest()
    cached = cache / "initramfs" / f"{kernel.label}-{digest[:16]}.cpio"
    with contextlib.suppress(FileNotFoundError):
        return cached.read_bytes()
    image = _make(busybox, files)
    _keep(image, cached)
    return image


def _identity(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return str(path), stat.st_size, stat.st_mtime_ns


def _make(busybox: Path, modules: Sequence[Path]) -> bytes:
    program = busybox.read_bytes()
    if not is_static(program):
        raise MissingToolError("a statically linked busybox", package="busybox-static")
    names = [path.name.removesuffix(".xz") for path in modules]
    return cpio_archive(
        [
            *(CpioEntry(name, None) for name in _DIRECTORIES),
            CpioEntry("bin/busybox", program),
            CpioEntry("init", INIT.encode()),
            CpioEntry("modules/order", "".join(f"{name}\n" for name in names).encode()),
            *(CpioEntry(f"modules/{name}", read_module(path)) for name, path in zip(names, modules, strict=True)),
        ]
    )


def _keep(image: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for older in path.parent.glob(f"{path.name.rsplit('-', 1)[0]}-*.cpio"):
        older.unlink(missing_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".making-", delete=False) as file:
        try:
            file.write(image)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def command_archive(
    command: Sequence[str], *, cwd: str, environ: Mapping[str, str], token: str, settings: Mapping[str, str]
) -> bytes:
    """Return a second archive, with the data of one run. The kernel unpacks both archives in order."""
    start = 'cd -- "$1" && shift && exec "$@"'
    words = ["env", "-i", *(f"{name}={value}" for name, value in environ.items())]
    words += ["chroot", ".", "/bin/sh", "-c", start, "sh", cwd, *command]
    values = {"token": token, **settings}
    lines = [f"{name}={shlex.quote(value)}\n" for name, value in values.items()]
    return cpio_archive(
        [
            CpioEntry("run/settings", "".join(lines).encode()),
            CpioEntry("run/command", os.fsencode(f"exec {shlex.join(words)}\n")),
        ]
    )
