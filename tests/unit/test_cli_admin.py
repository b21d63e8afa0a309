"""The commands list, bind and unbind, on a tree that looks like sysfs."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pyvfio.cli import bind, common, unbind
from pyvfio.cli import list as list_command
from pyvfio.cli.pci_words import class_name
from pyvfio.errors import VfioError
from pyvfio.kernel import LinuxKernel
from tests.unit.sysfs import BRIDGE, DISK, SysfsTree, link, place_process

ROOT = Path(__file__).resolve().parents[2]
NIC, SOUND, PORT = "0000:01:00.0", "0000:01:00.1", "0000:00:1c.0"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SysfsTree:
    """Group 7: a bridge with two devices behind it, one of them with vfio-pci; and a disk without a group.

    No terminal limits the width of a line.
    """
    monkeypatch.delenv("COLUMNS", raising=False)
    tree = SysfsTree(tmp_path)
    tree.add_device(PORT, driver="pcieport", group=7, class_code=BRIDGE)
    tree.add_device(NIC, driver="e1000e", group=7, numa_node=0)
    tree.add_device(SOUND, driver="vfio-pci", matches="snd_hda_intel", override="vfio-pci", group=7)
    tree.add_device("0000:02:00.0", class_code=DISK, device_id=0x0A54)
    return tree


def run_bind(tree: SysfsTree, *arguments: str) -> int:
    return bind.main(arguments, kernel=tree.kernel, write=tree.write)


def run_unbind(tree: SysfsTree, *arguments: str) -> int:
    return unbind.main(arguments, kernel=tree.kernel, write=tree.write)


def listed(tree: SysfsTree, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, object]]:
    assert list_command.main([*arguments, "--json"], kernel=tree.kernel) == 0
    found: list[dict[str, object]] = json.loads(capsys.readouterr().out)["devices"]
    return found


# --- list


def test_the_table_shows_each_device_and_what_keeps_its_group(
    tree: SysfsTree, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list_command.main([], kernel=tree.kernel) == 0
    assert capsys.readouterr().out.splitlines() == [
        "BDF           ID         DEVICE               DRIVER    GROUP  NUMA  STATE",
        "0000:00:1c.0  8086:10d3  PCI bridge           pcieport  7      -     bridge",
        "0000:01:00.0  8086:10d3  Ethernet controller  e1000e    7      0     not bound",
        "0000:01:00.1  8086:10d3  Ethernet controller  vfio-pci  7      -     blocked: 0000:01:00.0",
        "0000:02:00.0  8086:0a54  NVMe controller      -         -      -     no IOMMU",
    ]


def test_the_table_names_who_has_the_group_open(tree: SysfsTree, capsys: pytest.CaptureFixture[str]) -> None:
    tree.use_real_proc()
    with tree.add_group_node(7).open():
        list_command.main([], kernel=tree.kernel)
    out = capsys.readouterr().out
    assert out.count(f"in use: {(Path('/proc/self/comm').read_text()).strip()} ({os.getpid()})") == 2


def test_a_device_is_told_to_programs_by_these_keys(tree: SysfsTree, capsys: pytest.CaptureFixture[str]) -> None:
    node = tree.add_group_node(7)
    assert listed(tree, capsys, "--driver", "e1000e") == [
        {
            "bdf": NIC,
            "vendor": "8086",
            "device": "10d3",
            "class": "020000",
            "class_name": "Ethernet controller",
            "vendor_name": None,
            "device_name": None,
            "state": "not bound",
            "driver": "e1000e",
            "driver_override": None,
            "is_bridge": False,
            "is_vfio": False,
            "numa_node": 0,
            "parent": None,
            "physical_function": None,
            "iommu_group": 7,
            "group_after_bind": False,
            "group_viable": False,
            "group_blockers": [NIC],
            "group_node": str(node),
            "group_holders": [],
            "cdev": None,
        }
    ]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--group", "7"], [PORT, NIC, SOUND]),
        (["--driver", "none"], ["0000:02:00.0"]),
        (["8086:0A54"], ["0000:02:00.0"]),
        (["8086:10d3", "--driver", "vfio-pci"], [SOUND]),
        (["--driver", "nobody"], []),
        (["--group", "7", "--driver", "none"], []),
    ],
)
def test_a_list_can_be_narrowed(
    tree: SysfsTree, capsys: pytest.CaptureFixture[str], arguments: list[str], found: list[str]
) -> None:
    assert [device["bdf"] for device in listed(tree, capsys, *arguments)] == found


@pytest.mark.parametrize(
    ("arguments", "said", "found"),
    [
        (["--group", "3"], ["no IOMMU group 3. The groups are: 7"], []),
        (["1234:5678"], ["no PCI device 1234:5678"], []),
        (["01:00.5", NIC], [r"no PCI device 0000:01:00.5. Bus 0000:01 has"], [NIC]),
        (
            ["09:00.0", "8086:ffff", "8086:0a54"],
            ["no PCI device 0000:09:00.0", "no PCI device 8086:ffff"],
            ["0000:02:00.0"],
        ),
        (["01:00.5", "--group", "3"], ["no IOMMU group 3", "no PCI device 0000:01:00.5"], []),
    ],
)
def test_what_was_asked_for_and_does_not_exist_is_said_and_status_1(
    tree: SysfsTree, capsys: pytest.CaptureFixture[str], arguments: list[str], said: list[str], found: list[str]
) -> None:
    """What exists is shown all the same."""
    assert list_command.main([*arguments, "--json"], kernel=tree.kernel) == 1
    out, err = capsys.readouterr()
    assert [device["bdf"] for device in json.loads(out)["devices"]] == found
    for line, words in zip(err.splitlines(), said, strict=True):
        assert words in line
    assert list_command.main(arguments, kernel=tree.kernel) == 1
    assert all(bdf in capsys.readouterr().out for bdf in found)


def test_a_group_that_comes_with_the_first_driver_is_said_to(
    tree: SysfsTree, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a device that has none yet, where the IOMMU makes groups late."""
    (tree.sysfs / "class/iommu/0000:00:03.0").mkdir(parents=True)
    assert list_command.main(["8086:0a54"], kernel=tree.kernel) == 0
    assert "no group yet: after the first bind\n" in capsys.readouterr().out
    assert [device["group_after_bind"] for device in listed(tree, capsys)] == [False, False, False, True]


def test_a_group_without_an_iommu_is_not_called_viable(tree: SysfsTree, capsys: pytest.CaptureFixture[str]) -> None:
    """VFIO has made it up."""
    (tree.sysfs / "kernel/iommu_groups/7/name").write_text("vfio-noiommu\n")
    assert list_command.main([SOUND], kernel=tree.kernel) == 0
    assert capsys.readouterr().out.endswith("7      -     unsafe: no IOMMU\n")
    assert listed(tree, capsys, SOUND)[0]["group_viable"] is False


def test_names_are_printed_without_what_moves_a_cursor(
    tree: SysfsTree, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Anybody may give a process any name; a driver's is as its module has it."""
    tree.add_device("0000:03:00.0", driver="odd\x1b[2J")
    assert list_command.main(["03:00.0"], kernel=tree.kernel) == 0
    assert r"odd\x1b[2J" in capsys.readouterr().out
    node = tree.add_group_node(7)
    link(tree.proc / "5/fd/3", node)
    (tree.proc / "5/comm").write_text("\x1b[2Jevil\u202e\n")
    assert list_command.main([NIC], kernel=tree.kernel) == 0
    out = capsys.readouterr().out
    assert r"\x1b[2Jevil" in out
    assert out.replace("\n", "").isprintable()
    assert run_bind(tree, NIC) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.rstrip().isprintable()


def test_an_override_is_printed_without_what_moves_a_cursor(
    tree: SysfsTree, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever wrote it."""
    ((tree.pci / "devices" / SOUND).resolve() / "driver_override").write_text("\x1b[2J\n")
    assert run_bind(tree, SOUND, "--driver", "e1000e") == 0
    assert capsys.readouterr().out == f"{SOUND}: e1000e (was: vfio-pci, driver_override \\x1b[2J)\n"


@pytest.mark.parametrize("json_too", [False, True])
def test_garbage_in_sysfs_is_one_line_that_names_the_file(
    tree: SysfsTree, capsys: pytest.CaptureFixture[str], *, json_too: bool
) -> None:
    """And, for programs, a document without devices."""
    ((tree.pci / "devices" / NIC).resolve() / "class").write_text("???\n")
    options = ["--json"] if json_too else []
    assert common.guard(lambda: list_command.main(options, kernel=tree.kernel), name="list") == 1
    out, err = capsys.readouterr()
    assert f"{NIC}/class contains '???'" in err
    assert out == ('{\n  "schema": "pyvfio.list/1",\n  "devices": []\n}\n' if json_too else "")


@pytest.mark.parametrize(
    ("code", "name"), [(0x010601, "SATA controller"), (0x078000, "communication"), (0x990000, "class 990000")]
)
def test_a_class_is_said_in_words_where_there_are_words(code: int, name: str) -> None:
    assert class_name(code) == name


# --- bind and unbind


def test_binding_prints_the_former_driver(tree: SysfsTree, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bind(tree, "01:00.0") == 0
    assert capsys.readouterr() == (f"{NIC}: vfio-pci (was: e1000e)\n", "")
    assert run_unbind(tree, "01:00.0") == 0
    assert capsys.readouterr() == (f"{NIC}: e1000e (was: vfio-pci, driver_override vfio-pci)\n", "")
    assert run_unbind(tree, "01:00.0") == 0
    assert capsys.readouterr() == (f"{NIC}: e1000e already\n", "")


def test_a_dry_run_prints_each_write_and_makes_none(tree: SysfsTree, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bind(tree, NIC, "--dry-run") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"# {NIC}, which has e1000e",
        f"echo vfio-pci > {tree.pci}/devices/{NIC}/driver_override",
        f"echo {NIC} > {tree.pci}/drivers/e1000e/unbind",
        f"echo {NIC} > {tree.pci}/drivers_probe",
    ]
    assert tree.writes == []


def test_a_group_is_bound_whole_but_for_its_bridges(tree: SysfsTree, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bind(tree, "--group", "7") == 0
    assert capsys.readouterr().out == f"{NIC}: vfio-pci (was: e1000e)\n{SOUND}: vfio-pci already\n"
    assert (tree.driver_of(PORT), tree.driver_of(NIC)) == ("pcieport", "vfio-pci")
    assert run_unbind(tree, "--group", "7") == 0
    assert (tree.driver_of(PORT), tree.driver_of(SOUND)) == ("pcieport", "snd_hda_intel")


def test_a_group_that_is_still_not_viable_is_said_to_be(tree: SysfsTree, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bind(tree, SOUND) == 0
    assert f"group 7 is not viable yet, because of {NIC} (e1000e)" in capsys.readouterr().err


def test_another_driver_can_be_named_or_none(tree: SysfsTree) -> None:
    assert run_bind(tree, NIC, "--driver", "none") == 0
    assert tree.driver_of(NIC) is None
    assert run_unbind(tree, SOUND, "--driver", "e1000e") == 0
    assert tree.driver_of(SOUND) == "e1000e"


def test_one_failure_is_said_and_the_others_are_done(tree: SysfsTree, capsys: pytest.CaptureFixture[str]) -> None:
    tree.add_interface(NIC, "enp1s0", up=True)
    assert run_bind(tree, NIC, "0000:09:00.0", SOUND) == 1
    out, err = capsys.readouterr()
    assert out == f"{SOUND}: vfio-pci already\n"
    assert [line.partition(": ")[0] for line in err.splitlines()] == ["pyvfio bind", "pyvfio bind"]
    assert "enp1s0 is up" in err
    assert run_bind(tree, NIC, "--force") == 0


def test_programs_are_told_what_was_written_and_what_was_there(
    tree: SysfsTree, capsys: pytest.CaptureFixture[str]
) -> None:
    place_process(tree.proc, user=1000)
    tree.fail = lambda path, _value: PermissionError(errno.EACCES, "") if f"{NIC}/" in path else None
    assert run_unbind(tree, SOUND, "--json") == 0
    (done,) = json.loads(capsys.readouterr().out)["results"]
    assert done == {
        "bdf": SOUND,
        "done": True,
        "error": None,
        "driver": "snd_hda_intel",
        "former_driver": "vfio-pci",
        "former_override": "vfio-pci",
        "steps": [
            {"path": f"{tree.pci}/devices/{SOUND}/driver_override", "value": ""},
            {"path": f"{tree.pci}/drivers/vfio-pci/unbind", "value": SOUND},
            {"path": f"{tree.pci}/drivers_probe", "value": SOUND},
        ],
        "nodes": [],
    }
    assert run_bind(tree, NIC, "--json") == 1
    (failed,) = json.loads(capsys.readouterr().out)["results"]
    assert (failed["bdf"], failed["done"]) == (NIC, False)
    assert "run as root" in failed["error"]


@pytest.mark.parametrize(
    "arguments", [[], [NIC, "--group", "7"], ["eth0"], [NIC, "--driver", "../x"], ["--group", "x"]]
)
def test_wrong_usage_ends_with_status_2(
    tree: SysfsTree, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_bind(tree, *arguments)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("pyvfio bind: ")
    assert err.endswith("; see pyvfio bind --help\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["..", ".", "../x", "a/b"])
def test_a_driver_that_is_a_path_is_wrong_usage(tree: SysfsTree, name: str) -> None:
    """Nothing is written."""
    for run in (run_bind, run_unbind):
        with pytest.raises(SystemExit) as caught:
            run(tree, NIC, "--driver", name)
        assert caught.value.code == 2
    assert tree.writes == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("json_too", [False, True])
def test_a_command_that_is_asked_to_end_finishes_a_change_and_begins_no_other(
    tree: SysfsTree, capsys: pytest.CaptureFixture[str], number: signal.Signals, *, json_too: bool
) -> None:
    """However often it is asked. What was done is said, and what was not; handlers are as before then."""

    def write(path: Path, value: str) -> None:
        tree.write(path, value)
        for _ in range(2):
            signal.raise_signal(number)

    former = signal.getsignal(number)
    arguments = [NIC, SOUND, "0000:02:00.0", *(["--json"] if json_too else [])]
    assert bind.main(arguments, kernel=tree.kernel, write=write) == 128 + number
    assert signal.getsignal(number) == former
    assert (tree.driver_of(NIC), tree.override_of(NIC)) == ("vfio-pci", "vfio-pci")
    out, err = capsys.readouterr()
    assert [line.count(f"was not changed: {number.name} came first") for line in err.splitlines()] == [1, 1]
    if json_too:
        assert [(each["bdf"], each["done"]) for each in json.loads(out)["results"]] == [
            (NIC, True),
            (SOUND, False),
            ("0000:02:00.0", False),
        ]
    else:
        assert out == f"{NIC}: vfio-pci (was: e1000e)\n"


CHILD = """
import sys, time
from pathlib import Path
from pyvfio.cli import bind, common
from tests.unit.sysfs import SysfsTree

tree = SysfsTree(Path(sys.argv[1]))
for bdf in ("0000:01:00.0", "0000:01:00.1"):
    tree.add_device(bdf, driver="e1000e", group=7)

def write(path, value):
    tree.write(path, value)
    print("written", file=sys.stderr, flush=True)
    sys.stdin.readline()

common.run(lambda: bind.main(["0000:01:00.0", "0000:01:00.1", "--json"], kernel=tree.kernel, write=write), name="bind")
"""


def test_a_process_that_is_told_to_end_again_and_again_ends_with_a_document(tmp_path: Path) -> None:
    """Real signals, between the writes: the device is bound, and the next is not begun."""
    words = [sys.executable, "-c", CHILD, str(tmp_path)]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as child:
        assert child.stdin is not None
        assert child.stderr is not None
        for _ in range(3):
            assert child.stderr.readline() == "written\n"
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGINT):
                child.send_signal(number)
            child.stdin.write("\n")
            child.stdin.flush()
        out, err = child.communicate(timeout=600)
    assert child.returncode - 128 in {signal.SIGTERM, signal.SIGHUP, signal.SIGINT}  # which comes first is chance
    assert [(each["bdf"], each["done"]) for each in json.loads(out)["results"]] == [(NIC, True), (SOUND, False)]
    assert err.count("\n") == 1


def test_a_signal_that_is_ignored_stays_so(tree: SysfsTree) -> None:
    """As nohup has it for SIGHUP."""

    def write(path: Path, value: str) -> None:
        tree.write(path, value)
        signal.raise_signal(signal.SIGHUP)

    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert bind.main([NIC], kernel=tree.kernel, write=write) == 0
    finally:
        signal.signal(signal.SIGHUP, former)


def test_programs_get_one_document_whatever_happens(tree: SysfsTree, capsys: pytest.CaptureFixture[str]) -> None:
    """Of what was done before a mistake of ours, and where nothing could be begun."""

    def write(path: Path, value: str) -> None:
        if SOUND in str(path):
            raise ZeroDivisionError
        tree.write(path, value)

    with pytest.raises(ZeroDivisionError):
        unbind.main([NIC, SOUND, "--json", "--driver", "none"], kernel=tree.kernel, write=write)
    assert [(each["bdf"], each["done"]) for each in json.loads(capsys.readouterr().out)["results"]] == [(NIC, True)]
    assert common.guard(lambda: run_bind(tree, "--group", "3", "--json"), name="bind") == 1
    (failed,) = json.loads(capsys.readouterr().out)["results"]
    assert (failed["bdf"], failed["done"]) == (None, False)
    assert "no IOMMU group 3" in failed["error"]


class Interrupting(LinuxKernel):
    """Its process is told to end at the first look at sysfs."""

    asked = False

    @property
    def sysfs(self) -> Path:
        if not self.asked:
            self.asked = True
            signal.raise_signal(signal.SIGHUP)
        return super().sysfs


def buffered_environment() -> dict[str, str]:
    """The environment in which Python buffers its output, as it does by default."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize("command", [bind, unbind])
def test_a_signal_while_devices_are_looked_up_leaves_a_document(
    tree: SysfsTree, capsys: pytest.CaptureFixture[str], command: ModuleType
) -> None:
    def end(_number: int, _frame: object) -> None:
        raise RuntimeError

    kernel = Interrupting(sysfs=tree.sysfs, dev=tree.dev, proc=tree.proc)
    former = signal.signal(signal.SIGHUP, end)
    try:
        status = command.main(["--group", "7", "--json"], kernel=kernel, write=tree.write)
    finally:
        signal.signal(signal.SIGHUP, former)
    assert status == 128 + signal.SIGHUP
    assert [(each["bdf"], each["done"]) for each in json.loads(capsys.readouterr().out)["results"]] == [
        (NIC, False),
        (SOUND, False),
    ]
    assert tree.writes == []


def test_a_document_is_written_before_signals_can_end_the_process() -> None:
    script = f"import os\nfrom pyvfio.cli import bind\nbind.main({MISSING})\nos._exit(7)"
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, check=False, cwd=ROOT, env=buffered_environment()
    )
    assert done.returncode == 7
    assert len(json.loads(done.stdout)["results"]) == 2


# --- What the commands share


MISSING = ["--json", "--dry-run", "0000:ff:1f.7", "0000:ff:1f.6"]
"""Arguments of `bind`: two devices that no machine under test has."""


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full", "2>&0"])
def test_a_document_does_not_depend_on_stderr(stderr: str) -> None:
    """Closed, full, or a pipe that nobody reads: each device is tried, and the status is the same."""
    reader, writer = os.pipe()
    os.close(reader)
    words = ["sh", "-c", f'exec "$@" {stderr}', "-", sys.executable, "-m", "pyvfio.cli.bind", *MISSING]
    try:
        done = subprocess.run(
            words, stdin=writer, stdout=subprocess.PIPE, check=False, cwd=ROOT, env=buffered_environment()
        )
    finally:
        os.close(writer)
    assert done.returncode == 1
    assert [each["bdf"] for each in json.loads(done.stdout)["results"]] == ["0000:ff:1f.7", "0000:ff:1f.6"]


@pytest.mark.parametrize(
    ("stdout", "status", "said"), [(">&-", 0, ""), (">/dev/full", 1, "pyvfio list: [Errno 28] "), (">&0", 128 + 13, "")]
)
def test_a_command_whose_stdout_cannot_be_written_ends_without_a_traceback(stdout: str, status: int, said: str) -> None:
    """Closed, full, or a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    words = ["sh", "-c", f'exec "$@" {stdout}', "-", sys.executable, "-m", "pyvfio.cli.list", "--json"]
    try:
        done = subprocess.run(
            words, stdin=writer, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT, env=buffered_environment()
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr.count("\n")) == (status, int(bool(said)))
    assert done.stderr.startswith(said)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), VfioError("first\nsecond")])
def test_what_a_user_can_cause_is_one_line_and_status_1(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise error

    with pytest.raises(SystemExit) as caught:
        common.run(fail, name="demo")
    assert caught.value.code == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err[:6]) == ("", 1, "demo: ")


def test_a_mistake_of_ours_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        common.run(lambda: 1 // 0, name="demo")


def test_an_interrupted_command_ends_as_a_shell_expects() -> None:
    def interrupt() -> int:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        common.run(interrupt, name="demo")
    assert caught.value.code == 130


def test_a_missing_group_is_one_line(tree: SysfsTree, capsys: pytest.CaptureFixture[str]) -> None:
    assert common.guard(lambda: run_bind(tree, "--group", "3"), name="bind") == 1
    assert capsys.readouterr().err == "bind: there is no IOMMU group 3. The groups are: 7\n"
