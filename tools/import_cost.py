"""The processor time of `import pyvfio` and of the first name used, beside a yardstick: machines differ fourfold.

The yardstick imports modules of the standard library with as much Python code in as many files. Both figures are the
time of a process, less the time of a process that imports nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys

from tools.report import ImportCost

REPEAT = 10
PYVFIO = "import pyvfio; pyvfio.open_device"
YARDSTICK = "import asyncio, ctypes, dataclasses, enum, json, logging"
NOTHING = "pass"


def measure(*, repeat: int = REPEAT) -> ImportCost:
    """Return the least of `repeat` measurements. The processes run in turns."""
    least = dict.fromkeys((NOTHING, PYVFIO, YARDSTICK), float("inf"))
    for _ in range(repeat):
        for code in least:
            least[code] = min(least[code], _seconds(code))
    return ImportCost(least[PYVFIO] - least[NOTHING], least[YARDSTICK] - least[NOTHING])


def _seconds(code: str) -> float:
    """Return the processor time of a Python that runs `code`. That Python may cache compiled files."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen([sys.executable, "-c", code], env=variables)  # noqa: S603
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise OSError(f"{sys.executable} -c {code!r} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime
