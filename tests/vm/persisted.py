"""Two boots with udevd: the first makes persistent bindings, the second starts with nothing but the rule files.

A program for a virtual machine, as root. `persisted.py first` prints JSON with the rule files.
`persisted.py second RULES` takes the rule files as JSON. `tests/vm/test_binding.py` runs both.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import pyvfio
from pyvfio import pci
from pyvfio.cli import bind, unbind

NIC, EDU = (0x8086, 0x10D3), (0x1234, 0x11E8)
USER, GROUP = 1000, 1001
RULES = Path("/etc/udev/rules.d")


def run(*words: str) -> None:
    """Run a program. A failure ends this program with the output."""
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stdout}")


def boot() -> None:
    """Start udevd and send the events of all devices, as systemd-udevd.service and systemd-udev-trigger.service do."""
    run("/lib/systemd/systemd-udevd", "--daemon")
    trigger()


def trigger() -> None:
    """Send an add event for each device, and wait for the end of all rules."""
    # Process 1 of the machine has another root, and udevadm does nothing in a chroot.
    os.environ["SYSTEMD_IGNORE_CHROOT"] = "1"
    run("udevadm", "trigger", "--type=subsystems", "--action=add")
    run("udevadm", "trigger", "--type=devices", "--action=add")
    run("udevadm", "settle", "--timeout=60")


def first(identity: tuple[int, int]) -> str:
    """Return the first such device."""
    return next(each.bdf for each in pci.devices() if (each.vendor, each.device) == identity)


def state(bdf: str) -> list[str | None]:
    """Return the driver and the override."""
    device = pci.read_device(bdf)
    return [device.driver, device.driver_override]


def files() -> dict[str, str]:
    """Return the rule files."""
    return {path.name: path.read_text() for path in sorted(RULES.iterdir())} if RULES.is_dir() else {}


def command(main: Callable[[list[str]], int], *words: str) -> str:
    """Run a command of pyvfio, and return the output and the status."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        status = main(list(words))
    return f"{out.getvalue()}{status}"


def opened_by_user(bdf: str) -> str:
    """Open a device in a process without any right of root, and return the vendor id or the error."""
    pyvfio.open_device  # noqa: B018 (the import needs root where the interpreter is in root's home)
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setgroups([GROUP])
            os.setresgid(USER, USER, USER)
            os.setresuid(USER, USER, USER)
            with pyvfio.open_device(bdf) as device:
                said = f"{device.config.read16(0):#06x}"
        except pyvfio.VfioError as error:
            said = str(error)
        except BaseException:
            said = traceback.format_exc()
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as file:
        said = file.read()
    os.waitpid(child, 0)
    return said


def node_of(bdf: str) -> list[int]:
    """Return user, group and mode of the group's node."""
    status = os.stat(pci.group_node(pci.group_of(bdf)))
    return [status.st_uid, status.st_gid, status.st_mode & 0o777]


def first_boot() -> dict[str, object]:
    """Make two persistent bindings."""
    boot()
    nic, edu = first(NIC), first(EDU)
    said: dict[str, object] = {"nic": state(nic), "edu": state(edu), "files": files()}
    said["bind nic"] = command(bind.main, "--persist", "--user", f"{USER}", nic)
    said["bind edu"] = command(bind.main, "--persist", "--user", f":{GROUP}", edu)
    said["opened"] = [opened_by_user(nic), opened_by_user(edu)]
    said["rules"] = {name: text for name, text in files().items() if "pyvfio" in name}
    return said


def second_boot(rules: Mapping[str, str]) -> dict[str, object]:
    """Boot with the rule files, then again after a faster driver; unbind, and forget."""
    nic, edu = first(NIC), first(EDU)
    said: dict[str, object] = {"nic at first": state(nic), "edu at first": state(edu)}
    run("modprobe", "-r", "vfio-pci")
    said["vfio-pci at first"] = os.path.exists("/sys/bus/pci/drivers/vfio-pci")
    RULES.mkdir(parents=True, exist_ok=True)
    before = files()
    for name, text in rules.items():
        (RULES / name).write_text(text)
    boot()
    said |= {"nic": state(nic), "edu": state(edu), "nodes": [node_of(nic), node_of(edu)]}
    said["opened"] = [opened_by_user(nic), opened_by_user(edu)]
    said["persisted"] = command(bind.main, "--persisted")
    said["unbind"] = command(unbind.main, nic)
    trigger()
    said["nic after unbind and trigger"] = state(nic)
    # As if the driver had bound the device in an initramfs: bound, and nothing known to udevd.
    run("udevadm", "control", "--exit")
    run("udevadm", "info", "--cleanup-db")
    said["nic before the rules"] = state(nic)
    boot()
    said["nic after a faster driver"] = state(nic)
    said["forget"] = command(bind.main, "--forget", nic, edu)
    said["left"] = files() == before
    said["nic after forget"] = state(nic)
    return said


if __name__ == "__main__":
    json.dump(first_boot() if sys.argv[1] == "first" else second_boot(json.loads(sys.argv[2])), sys.stdout)
