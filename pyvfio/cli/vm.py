"""``scripts/vm``: runs a command on a real kernel in a virtual machine with VFIO devices."""

import argparse
import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from pyvfio.testing import kernels, vm

STATUS_PANIC = 240
STATUS_LOST = 241
STATUS_TIMEOUT = 242
STATUS_NO_MACHINE = 243

_EPILOG = f"""\
COMMAND is root in the machine, whose user space is this machine's own: the same paths, the same
current directory; what it writes to files is gone with the machine. Its stdin is empty; its stdout
and stderr come out here, and nothing else on stdout. A kernel's line is fetched when it is first
asked for; FILE is a bzImage, whose modules are looked for beside it (its own directory,
../lib/modules/RELEASE, lib/modules/RELEASE) and in /lib/modules/RELEASE, or are built in.

exit status: that of COMMAND, 128+n for its death by signal n; but
  {STATUS_PANIC}  the kernel panicked or oopsed
  {STATUS_LOST}  the machine was lost: QEMU ended without a word from the kernel
  {STATUS_TIMEOUT}  the time was over
  {STATUS_NO_MACHINE}  there was no machine to run it in: a tool or a kernel is missing
    2  wrong arguments
"""

_LOG_LINES = 60


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vm",
        usage="%(prog)s [options] -- COMMAND...\n       %(prog)s --list [--json]",
        description="Runs a command on a real kernel, in a virtual machine with an IOMMU and devices for VFIO.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--kernel", default="6.12", metavar="|".join([*kernels.LINES, "FILE"]), help="default: %(default)s")
    add("--iommu", default="intel", choices=list(vm.IOMMUS), help="default: %(default)s; virtio needs 6.12")
    add("--devices", default="edu", choices=list(vm.DEVICES), help="default: %(default)s; contract: for tests/contract")
    add("--memory", default="2G", metavar="SIZE", help="default: %(default)s")
    add("--cpus", default=1, type=int, metavar="N", help="default: %(default)s")
    add("--icount", action="store_true", help="the clock counts instructions: timings repeat, in twice the time")
    add("--timeout", type=float, metavar="SECONDS", help="of wall time, the boot included; default: none")
    add(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="a variable that the command gets besides " + ", ".join(vm.PASSED_VARIABLES),
    )
    add("--qemu-arg", action="append", default=[], metavar="ARG", help="one more argument for QEMU: --qemu-arg -s")
    add("--modules", type=Path, metavar="DIR", help="the directory with FILE's modules.dep")
    add("--cache", type=Path, metavar="DIR", help="default: $XDG_CACHE_HOME/pyvfio or ~/.cache/pyvfio")
    add("--update", action="store_true", help="fetch the newest kernel of the line, and remove older ones")
    add("--log", type=Path, metavar="FILE", help="keep the kernel's log there")
    add("--list", action="store_true", help="show which kernels are cached and which can be had")
    add("--json", action="store_true", help="with --list")
    add("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments; what is after the first ``--`` is the command, whatever it looks like."""
    parser = _parser()
    words = list(arguments)
    cut = words.index("--") if "--" in words else len(words)
    parts = _joined(words[:cut])
    options = parser.parse_args(["=".join(part) for part in parts])
    # A command that comes without "--" keeps its own words.
    options.command = [word for part in parts[len(parts) - len(options.command) :] for word in part]
    options.command += words[cut:] if options.command else words[cut + 1 :]
    if not options.command and not options.list and not options.update:
        parser.error("there is no command; it comes after --")
    if options.json and not options.list:
        parser.error("--json goes with --list")
    return options


def _joined(words: Sequence[str]) -> list[tuple[str, ...]]:
    """``--qemu-arg`` with the word behind it, which is QEMU's and may begin with a dash, as argparse would not take it;
    each other word by itself."""
    parts: list[tuple[str, ...]] = []
    for word in words:
        if parts and parts[-1] == ("--qemu-arg",):
            parts[-1] = ("--qemu-arg", word)
        else:
            parts.append((word,))
    return parts


def environment(settings: Sequence[str]) -> dict[str, str]:
    """The variables of ``--env``: NAME takes the caller's value, and is left out where the caller has none."""
    found = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not name:
            raise ValueError(f"--env {setting}: there is no name")
        if equals or name in os.environ:
            found[name] = value if equals else os.environ[name]
    return found


def _print_list(options: argparse.Namespace) -> int:
    rows = kernels.describe(options.cache)
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return 0
    for row in rows:
        cached = ", ".join(row.cached) or "not cached, fetched when asked for"
        print(f"{row.kernel:5} from {', '.join(row.suites)}: {cached}")
    return 0


def _run(options: argparse.Namespace) -> int:
    result = vm.run(
        options.command,
        kernel=options.kernel,
        iommu=options.iommu,
        devices=options.devices,
        memory=options.memory,
        cpus=options.cpus,
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
    return result.status


def _keep_log(options: argparse.Namespace, log: str) -> None:
    if options.log is not None:
        options.log.write_text(log)


def _explain(options: argparse.Namespace, error: vm.VmError) -> int:
    _keep_log(options, error.log)
    lines = error.log.splitlines()[-_LOG_LINES:]
    if lines:
        print("--- the end of the kernel's log", *lines, "---", sep="\n", file=sys.stderr)
    print(f"vm: {error}", file=sys.stderr)
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
    """Runs ``scripts/vm`` and returns its exit status."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format="vm: %(message)s", stream=sys.stderr)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    try:
        return _dispatch(options)
    except vm.VmError as error:
        return _explain(options, error)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            # Whoever read us has gone; the interpreter must not find that out once more at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        print(f"vm: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else STATUS_NO_MACHINE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
