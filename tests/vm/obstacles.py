"""Obstacles that are made on a real kernel, what `pyvfio doctor` says of each, and what its commands do.

A program for a virtual machine, as root: it prints JSON. `tests/vm/test_doctor.py` runs it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pyvfio
from pyvfio import pci
from pyvfio.cli import doctor
from pyvfio.diagnosis import Finding
from pyvfio.errors import VfioError
from pyvfio.kernel import LinuxKernel
from pyvfio.units import MIB

EDU, RNG = (0x1234, 0x11E8), (0x1AF4, 0x1005)
KERNEL = LinuxKernel()
NEXT = "/run/next-command-line"


def run(*words: str) -> str:
    """Run a program; its complaint is ours."""
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stdout}")
    return done.stdout


def first(identity: tuple[int, int]) -> pci.PciDevice:
    """The first such device."""
    return next(each for each in pci.devices(kernel=KERNEL) if (each.vendor, each.device) == identity)


def command(*arguments: str) -> tuple[int, str]:
    """`pyvfio doctor` with these arguments: the exit status, and what it printed."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = doctor.main(arguments)
    return status, output.getvalue()


def attempt(bdf: str, size: int = 0) -> str:
    """The outcome of opening a device, and of mapping memory for it."""
    try:
        with pyvfio.open_device(bdf) as device, pyvfio.RamBlockList() as blocks:
            if size:
                with pyvfio.DmaMapper(device.container, blocks):
                    blocks.add("ring", used_length=size, max_length=size)
    except VfioError as error:
        return type(error).__name__
    return "works"


def mended(bdf: str, make: Callable[[], object]) -> dict[str, object]:
    """Make an obstacle, run the script, and say what was seen before, and afterwards."""
    make()
    before = attempt(bdf)
    status, document = command(bdf, "--json")
    _, script = command(bdf, "--script")
    Path("/run/mend.sh").write_text(script)
    run("sh", "/run/mend.sh")
    return {
        "before": before,
        "status": status,
        "wrong": [each for each in json.loads(document)["findings"] if each["status"] == "wrong"],
        "after": attempt(bdf),
        "status after": command(bdf)[0],
    }


def off() -> dict[str, object]:
    """The kernel was told not to use the IOMMU. Its boot loader is GRUB, with a stand-in for the program that makes
    GRUB's menu: it keeps the command line that the menu would have."""
    Path("/etc/default").mkdir(exist_ok=True)
    line = Path("/proc/cmdline").read_text().strip()
    Path("/etc/default/grub").write_text(f'GRUB_CMDLINE_LINUX="{line}"\n')
    program = Path("/usr/local/bin/update-grub")
    program.write_text(f'#!/bin/sh\n. /etc/default/grub\nprintf %s "$GRUB_CMDLINE_LINUX" > {NEXT}\n')
    program.chmod(0o755)
    return {**mended(first(EDU).bdf, lambda: None), "next": Path(NEXT).read_text()}


def none() -> dict[str, object]:
    """The machine has no IOMMU."""
    return mended(first(EDU).bdf, lambda: None)


def unload() -> None:
    """Take VFIO's modules away."""
    run("rmmod", "vfio_pci", "vfio_pci_core", "vfio_iommu_type1", "vfio")


def beside() -> str:
    """The device that is in one group with the random number generator, which has a driver of the kernel."""
    group = first(RNG).iommu_group
    others = [each for each in pci.devices(kernel=KERNEL) if each.iommu_group == group and not each.is_bridge]
    return next(each.bdf for each in others if (each.vendor, each.device) != RNG)


def boots_on() -> dict[str, object]:
    """A machine with everything, and obstacles of one device after the other."""
    said: dict[str, object] = {"modules": mended(first(EDU).bdf, unload)}
    other = beside()
    said["foreign driver"] = mended(other, lambda: None)
    said["user"] = as_user(first(EDU).bdf)
    return said


def run_commands(commands: Sequence[str]) -> None:
    """As a script has them."""
    run("sh", "-euc", "\n".join(commands))


def as_user(bdf: str) -> list[object]:
    """The answers of `user`, an ordinary user with 64 KiB of memory to lock, whose commands root runs."""
    words = ["prlimit", "--memlock=65536:65536", "setpriv", "--reuid=1000", "--clear-groups", "--"]
    words += [sys.executable, "-m", "tests.vm.obstacles", "user", bdf]
    answers: list[object] = []
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        if process.stdin is None or process.stdout is None:
            raise SystemExit("no pipes")
        for line in process.stdout:
            answers.append(answer := json.loads(line))
            run_commands(answer["commands"])
            process.stdin.write("mended\n")
            process.stdin.flush()
    if process.returncode:
        raise SystemExit(f"the user's part ended with status {process.returncode}")
    return answers


def tell(outcome: str, findings: Sequence[Finding]) -> None:
    """Print an outcome, and what mends it; wait until root has mended it."""
    commands = [each.text for finding in findings for each in finding.commands]
    answer = {"outcome": outcome, "wrong": [finding.check for finding in findings], "commands": commands}
    print(json.dumps(answer), flush=True)
    sys.stdin.readline()


def user(bdf: str) -> None:
    """First the node is not this user's, then the memory is more than the limit."""
    refused = attempt(bdf)
    tell(refused, [finding for finding in pyvfio.doctor(bdf).wrong if finding.check == "group-node"])
    both = pyvfio.doctor(bdf, memory=2 * MIB).wrong
    found: tuple[Finding, ...] = ()
    with (
        pyvfio.open_device(bdf) as device,
        pyvfio.RamBlockList() as blocks,
        pyvfio.DmaMapper(device.container, blocks),
    ):
        try:
            blocks.add("ring", used_length=2 * MIB, max_length=2 * MIB)
        except pyvfio.PinLimitError as error:
            found = error.explain()
    if [finding.check for finding in found] != [finding.check for finding in both]:
        raise SystemExit(f"{found} is not {both}")
    tell("PinLimitError", found)
    tell(attempt(bdf, 2 * MIB), pyvfio.doctor(bdf, memory=2 * MIB).wrong)


if __name__ == "__main__":
    if sys.argv[1] == "user":
        user(sys.argv[2])
    else:
        Path("/.dockerenv").unlink(missing_ok=True)  # this machine's root is the host's, and is no container
        os.environ["PATH"] = f"{os.path.dirname(sys.executable)}:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        json.dump({"off": off, "none": none, "on": boots_on}[sys.argv[1]](), sys.stdout)
