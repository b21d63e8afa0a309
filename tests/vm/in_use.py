"""The refusals of `bind` for a disk and a network interface in use where this process cannot see the use.

A program for a virtual machine, as root, that prints JSON. `tests/vm/test_binding.py` runs it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pyvfio import pci
from pyvfio.errors import VfioError
from pyvfio.kernel import LinuxKernel

DISK, NIC = (0x1B36, 0x0010), (0x8086, 0x10D3)
KERNEL = LinuxKernel()


def run(*words: str) -> None:
    """Run a program. A failure ends this program with the output."""
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stdout}")


def wait_for(path: str) -> str:
    """Wait until a driver has made a path."""
    for _ in range(600):
        if os.path.exists(path):
            return path
        time.sleep(0.1)
    raise SystemExit(f"there is no {path}")


def first(identity: tuple[int, int]) -> str:
    """Return the first such device."""
    return next(each.bdf for each in pci.devices(kernel=KERNEL) if (each.vendor, each.device) == identity)


def refusal(bdf: str) -> str:
    """Return the error that a bind would raise; empty if the device would be bound."""
    try:
        pci.bind(bdf, dry_run=True, kernel=KERNEL)
    except VfioError as error:
        return str(error)
    return ""


@contextlib.contextmanager
def elsewhere(kind: str, command: str) -> Iterator[int]:
    """Start a process in a new namespace in which a command has run."""
    words = ["unshare", kind, "sh", "-c", f"{command} && echo ready && exec sleep 1000"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        try:
            if process.stdout is None or process.stdout.readline() != b"ready\n":
                raise SystemExit(f"{command} failed")
            yield process.pid
        finally:
            process.kill()


def look_at_disk() -> dict[str, str]:
    """Check a disk: mounted elsewhere, mounted for nobody, swapped to, open, bound."""
    run("modprobe", "nvme")
    run("modprobe", "ext4")
    node, bdf = wait_for("/dev/nvme0n1"), first(DISK)
    said = {"disk, idle": refusal(bdf)}
    run("mke2fs", "-q", node)
    with elsewhere("--mount", f"mkdir -p /tmp/there && mount {node} /tmp/there") as pid:
        said["disk, mounted elsewhere"] = refusal(bdf).replace(str(pid), "PID")
        namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
    said["disk, mounted for nobody"] = refusal(bdf)
    os.close(namespace)
    run("mkswap", node)
    run("swapon", node)
    said["disk, swapped to"] = refusal(bdf)
    run("swapoff", node)
    with open(node, "rb"):
        said["disk, open"] = refusal(bdf).replace(str(os.getpid()), "PID")
    said["disk, idle again"] = refusal(bdf)
    bound = pci.bind(bdf, kernel=KERNEL)
    said["disk, bound"] = f"{bound.former_driver} {bound.driver} {os.path.exists(node)}"
    pci.restore(bound, kernel=KERNEL)
    wait_for(node)
    return said


def look_at_interface() -> dict[str, str]:
    """Check an interface that is up, here and in another namespace."""
    run("modprobe", "e1000e")
    wait_for("/sys/class/net/eth0")
    bdf = first(NIC)
    said = {"interface, down": refusal(bdf)}
    run("busybox", "ip", "link", "set", "eth0", "up")
    said["interface, up"] = refusal(bdf)
    run("busybox", "ip", "link", "set", "eth0", "down")
    with elsewhere("--net", "true") as pid:
        run("busybox", "ip", "link", "set", "eth0", "netns", str(pid))
        said["interface, elsewhere"] = refusal(bdf)
        said["interface, elsewhere and forced"] = pci.bind(bdf, force=True, kernel=KERNEL).driver or "none"
        pci.unbind(bdf, kernel=KERNEL)
        wait_for("/sys/class/net/eth0")
        run("busybox", "ip", "link", "set", "eth0", "netns", str(pid))
    for _ in range(600):  # the namespace goes some time after its last process
        if Path("/sys/class/net/eth0").exists():
            break
        time.sleep(0.1)
    said["interface, back"] = refusal(bdf)
    return said


if __name__ == "__main__":
    json.dump(look_at_disk() | look_at_interface(), sys.stdout)
