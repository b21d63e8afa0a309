"""`pyvfio vm`: run a command on a real kernel in a virtual machine with VFIO devices."""

import argparse
import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from pyvfio.cli.common import FAILED, WRONG_USAGE, complain, print_document, run
from pyvfio.cli.parser import Parser, iommu_argument
from pyvfio.testing import accel, kernels, vm

NAME = "pyvfio vm"

STATUS_PANIC = 240
STATUS_LOST = 241
STATUS_TIMEOUT = 242
STATUS_NO_MACHINE = 243

_EPILOG = f"""\
COMMAND is root in the machine. The user space is this machine's: the same paths, the same current
directory. Files that COMMAND writes are discarded with the machine. COMMAND's stdin is empty; stdout
and stderr are passed on, and stdout carries nothing else. A kernel of a line is fetched at the
first use. FILE is a bzImage; the modules are built in, or in the first of these directories that
exists: that of FILE, ../lib/modules/RELEASE and lib/modules/RELEASE beside FILE, /lib/modules/RELEASE.

6.12+iommufd and 7+iommufd are the kernels 6.12 and 7 with other modules of VFIO, which have /dev/iommu,
/dev/vfio/devices and no-IOMMU mode. The modules are built at the first use, in two or three minutes.

With --accel auto, the machine runs under KVM if a probe boot of the kernel has succeeded on this
host, else under emulation; -v shows the choice and the reason. The probe takes some seconds, once
for each kernel. --accel kvm repeats a probe that failed, and ends with {STATUS_NO_MACHINE} if KVM does not work.

exit status: that of COMMAND, or 128+n if signal n kills COMMAND; but
  {STATUS_PANIC}  the kernel panicked or oopsed
  {STATUS_LOST}  the machine was lost: QEMU ended, and the kernel's log does not say why
  {STATUS_TIMEOUT}  the time-out passed
  {STATUS_NO_MACHINE}  no machine could be started: a tool, a kernel or KVM is missing
    2  wrong arguments"""

_LOG_LINES = 60


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments."""
    parser = Parser(
        NAME,
        "Run a command on a real kernel, in a virtual machine with an IOMMU and devices for VFIO.",
        usage="%(prog)s [options] -- COMMAND...\n       %(prog)s --list [--json]",
        notes=_EPILOG,
        examples=[
            "pyvfio vm -- pyvfio list",
            "pyvfio vm --kernel 6.12 --iommu amd -- ls /sys/kernel/iommu_groups",
            "pyvfio vm --kernel 7+iommufd -- ls -l /dev/iommu",
            "pyvfio vm --qemu-arg=-device --qemu-arg=pci-testdev -- lspci",
            "pyvfio vm --list",
        ],
    )
    add = parser.add_argument
    add("--kernel", default="6.12", metavar="|".join([*kernels.LINES, "FILE"]), help="default: %(default)s")
    add(
        "--iommu",
        type=iommu_argument,
        default="intel",
        choices=[*vm.IOMMUS, vm.NO_IOMMU],
        help="default: %(default)s; virtio needs 6.12",
    )
    add("--devices", default="edu", choices=list(vm.DEVICES), help="default: %(default)s; contract: for tests/contract")
    add("--memory", default="2G", metavar="SIZE", help="default: %(default)s")
    add("--cpus", default=1, type=int, metavar="N", help="default: %(default)s")
    add("--accel", default="auto", choices=list(accel.ACCELS), help="default: %(default)s; tcg: emulation")
    add(
        "--icount",
        action="store_true",
        help="the clock counts instructions: timings repeat, at half the speed; tcg",
    )
    add("--timeout", type=float, metavar="SECONDS", help="limit the wall time, with the boot; default: none")
    add(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="an environment variable for COMMAND besides " + ", ".join(vm.PASSED_VARIABLES),
    )
    add("--qemu-arg", action="append", default=[], metavar="ARG", help="an argument for QEMU; may be repeated")
    add("--modules", type=Path, metavar="DIR", help="the directory with FILE's modules.dep")
    add("--cache", type=Path, metavar="DIR", help="default: $XDG_CACHE_HOME/pyvfio or ~/.cache/pyvfio")
    add("--update", action="store_true", help="fetch the newest kernel of the line, and remove older kernels")
    add("--log", type=Path, metavar="FILE", help="write the kernel's log to FILE")
    add("-v", "--verbose", action="store_true", help="show the accelerator and the reason on stderr")
    add("--list", action="store_true", help="show the kernels: those in the cache, and those that can be fetched")
    add("--json", action="store_true", help="print a JSON document, with --list")
    add("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments. All words after the first ``--`` are the command."""
    parser = make_parser()
    words = list(arguments)
    cut = words.index("--") if "--" in words else len(words)
    parts = _joined(words[:cut])
    options = parser.parse_args(["=".join(part) for part in parts])
    # Without "--", the words of the command were joined, too, and are split again.
    options.command = [word for part in parts[len(parts) - len(options.command) :] for word in part]
    options.command += words[cut:] if options.command else words[cut + 1 :]
    if not options.command and not options.list and not options.update:
        parser.error("the command is missing; write the command after --")
    if options.json and not options.list:
        parser.error("--json goes with --list")
    return options


def _joined(words: Sequence[str]) -> list[tuple[str, ...]]:
    """Pair ``--qemu-arg`` with the next word, which can begin with a dash, like an option of argparse."""
    parts: list[tuple[str, ...]] = []
    for word in words:
        if parts and parts[-1] == ("--qemu-arg",):
            parts[-1] = ("--qemu-arg", word)
        else:
            parts.append((word,))
    return parts


def environment(settings: Sequence[str]) -> dict[str, str]:
    """Return the variables of ``--env``. A NAME without a value takes the caller's value, or is left out."""
    found = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not name:
            raise ValueError(f"--env {setting}: the name is missing")
        if equals or name in os.environ:
            found[name] = value if equals else os.environ[name]
    return found


def _print_list(options: argparse.Namespace) -> int:
    rows = kernels.describe(options.cache)
    verdicts = list(accel.remembered(options.cache or kernels.cache_directory()))
    if options.json:
        print_document(
            "pyvfio.vm-list/1",
            kernels=[dataclasses.asdict(row) for row in rows],
            kvm=[{"kernel": each.kernel, "works": not each.failure, "reason": each.failure} for each in verdicts],
        )
        return 0
    for row in rows:
        cached = ", ".join(row.cached) or "not in the cache; fetched when first used"
        print(f"{row.kernel:12} from {', '.join(row.suites)}: {cached}")
    for verdict in verdicts:
        print(f"{'KVM':12} with kernel {verdict.kernel}: {verdict.failure or 'works'}")
    return 0


def _run(options: argparse.Namespace) -> int:
    result = vm.run(
        options.command,
        kernel=options.kernel,
        iommu=options.iommu,
        devices=options.devices,
        memory=options.memory,
        cpus=options.cpus,
        accel=options.accel,
        icount=options.icount,
        timeout=options.timeout,
        env=environment(options.env),
        qemu_args=options.qemu_arg,
        stdout=sys.stdout.buffer,
        stderr=sys.stderr.buffer,
        modules=options.modules,
        cache=options.cache,
    )
    _keep_log(options, result.log)
    if options.verbose:
        print(f"{NAME}: ran under {result.accel}: {result.accel_reason}", file=sys.stderr)
    return result.status


def _keep_log(options: argparse.Namespace, log: str) -> None:
    if options.log is not None:
        options.log.write_text(log)


def _explain(options: argparse.Namespace, error: vm.VmError) -> int:
    _keep_log(options, error.log)
    lines = error.log.splitlines()[-_LOG_LINES:]
    if lines:
        print("--- the end of the kernel's log", *lines, "---", sep="\n", file=sys.stderr)
    complain(NAME, error)
    match error:
        case vm.VmLostError():
            return STATUS_PANIC if error.panicked else STATUS_LOST
        case vm.VmTimeoutError():
            return STATUS_TIMEOUT
    return STATUS_NO_MACHINE


def _update(options: argparse.Namespace) -> None:
    cache = kernels.cache_directory() if options.cache is None else options.cache
    kernels.find_kernel(options.kernel, cache=cache, modules=options.modules, update=True)
    if options.kernel in kernels.LINES:
        kernels.prune(kernels.LINES[options.kernel], cache)


def _dispatch(options: argparse.Namespace) -> int:
    if options.list:
        return _print_list(options)
    if options.update:
        _update(options)
    return _run(options) if options.command else 0


def _end(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `pyvfio vm` and return its exit status."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format=f"{NAME}: %(message)s", stream=sys.stderr)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    try:
        return _dispatch(options)
    except vm.VmError as error:
        return _explain(options, error)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            # The reader has closed the pipe. The interpreter flushes stdout at exit, and must not fail there again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        complain(NAME, error)
        if isinstance(error, ValueError):
            return WRONG_USAGE
        return STATUS_NO_MACHINE if options.command else FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    run(main, name=NAME)
