"""`pyvfio list` for people: states, names, the tree, and the width and the colours of a terminal."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from pyvfio import pci
from pyvfio.cli import list as list_command
from pyvfio.cli.names import HardwareDatabase, Names, find_names
from pyvfio.cli.state import STATES
from pyvfio.cli.terminal import Style, Terminal, find_terminal, fitting_table
from tests.unit.sysfs import BRIDGE, DISK, SysfsTree, link

ROOT = Path(__file__).resolve().parents[2]
PORT, SWITCH, NIC, VF, SOUND, DISK_BDF = (
    "0000:00:1c.0",
    "0000:01:00.0",
    "0000:02:00.0",
    "0000:02:10.0",
    "0000:00:1f.3",
    "0000:00:1f.2",
)

IDS = """\
# A list of PCI IDs
8085  Before
\t10d3  Another vendor's
8086  Intel Corporation
\t0a54  NVMe Datacenter SSD [3DNAND]
\t\t8086 4702  a subsystem
\t10d3  82574L Gigabit Network Connection

# between
\t10d4  Behind a comment
8087  After
\t10d5  Another vendor's
C 02  Network controller
\t10d6  a subclass
"""


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SysfsTree:
    """A network card with a virtual function behind two bridges; a sound card and a disk on the root bus."""
    for name in ("COLUMNS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    tree = SysfsTree(tmp_path)
    tree.add_device(PORT, driver="pcieport", group=1, class_code=BRIDGE)
    tree.add_device(SWITCH, driver="pcieport", group=1, class_code=BRIDGE, behind=PORT)
    tree.add_device(NIC, driver="vfio-pci", group=2, numa_node=0, behind=SWITCH)
    virtual = tree.add_device(VF, driver="iavf", group=3, behind=SWITCH)
    link(virtual / "physfn", (tree.pci / "devices" / NIC).resolve())
    tree.add_device(SOUND, driver="snd_hda_intel", group=4)
    tree.add_device(DISK_BDF, driver="vfio-pci", group=4, class_code=DISK, device_id=0x0A54)
    (tree.sysfs / "class/iommu/dmar0").mkdir(parents=True)
    return tree


def database(tree: SysfsTree, text: str = IDS) -> HardwareDatabase:
    path = tree.sysfs.parent / "pci.ids"
    path.write_text(text)
    return HardwareDatabase(tree.kernel, [path.parent / "nowhere", path])


def lines(tree: SysfsTree, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert list_command.main(arguments, kernel=tree.kernel, database=database(tree)) == 0
    return capsys.readouterr().out.splitlines()


def states(tree: SysfsTree, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    assert list_command.main(["--json"], kernel=tree.kernel, database=database(tree)) == 0
    return {each["bdf"]: each["state"] for each in json.loads(capsys.readouterr().out)["devices"]}


# --- States


def test_a_host_or_isa_bridge_is_a_bridge_until_vfio_has_it(
    tree: SysfsTree, capsys: pytest.CaptureFixture[str]
) -> None:
    """The machine needs the bridge, so no word suggests a bind."""
    tree.add_device("0000:00:00.0", group=20, class_code=0x060000)
    tree.add_device("0000:00:1f.0", group=21, class_code=0x060100)
    tree.add_device("0000:00:1e.0", driver="vfio-pci", group=22, class_code=0x060000)
    found = states(tree, capsys)
    assert (found["0000:00:00.0"], found["0000:00:1f.0"]) == ("bridge", "bridge")
    assert found["0000:00:1e.0"] == "ready"


def test_the_state_says_in_a_word_what_stands_in_the_way(tree: SysfsTree, capsys: pytest.CaptureFixture[str]) -> None:
    """Each word that exists is seen once."""
    tree.add_device("0000:03:00.0")
    found = states(tree, capsys)
    assert found == {
        PORT: "bridge",
        SWITCH: "bridge",
        NIC: "ready",
        VF: "not bound",
        SOUND: "not bound",
        DISK_BDF: "blocked",
        "0000:03:00.0": "no group",
    }
    seen = set(found.values())
    tree.use_real_proc()
    with tree.add_group_node(4).open():
        found = states(tree, capsys)
    assert (found[SOUND], found[DISK_BDF]) == ("in use", "in use")
    (tree.sysfs / "class/iommu/dmar0").rename(tree.sysfs / "class/iommu/0000:00:03.0")
    late = states(tree, capsys)["0000:03:00.0"]
    (tree.sysfs / "class/iommu/0000:00:03.0").rmdir()
    elsewhere = {"unsafe"}  # test_cli_admin: a machine in no-IOMMU mode has no device in another state
    assert seen | elsewhere | {"in use", late, states(tree, capsys)["0000:03:00.0"]} == set(STATES)


def test_a_device_that_is_open_by_its_own_node_is_in_use_with_its_group(
    tree: SysfsTree, capsys: pytest.CaptureFixture[str]
) -> None:
    """The holders are those of the group's node and of all members' nodes."""
    cdev = tree.add_cdev(DISK_BDF, "vfio0")
    tree.use_real_proc()
    assert states(tree, capsys)[DISK_BDF] == "blocked"
    with cdev.open():
        found = states(tree, capsys)
    assert (found[SOUND], found[DISK_BDF], found[NIC]) == ("in use", "in use", "ready")


def test_the_own_nodes_of_devices_are_a_column_where_the_kernel_makes_them(
    tree: SysfsTree, capsys: pytest.CaptureFixture[str]
) -> None:
    """Elsewhere the column is left out, also of a tree. The directory alone is no node."""
    directory = (tree.pci / "devices" / DISK_BDF).resolve() / "vfio-dev/vfio1"
    directory.mkdir(parents=True)
    assert not any("CDEV" in line for options in ([], ["--tree"]) for line in lines(tree, capsys, *options))
    tree.add_cdev(NIC, "vfio0")
    header, row = lines(tree, capsys, NIC)
    assert row[header.index("CDEV") :].split()[0] == "vfio0"
    header, row = lines(tree, capsys, "--driver", "vfio-pci")[:2]
    assert row[header.index("CDEV") :].split()[0] == "-"
    assert list_command.main(["--json", NIC, DISK_BDF], kernel=tree.kernel, database=database(tree)) == 0
    found = {each["bdf"]: each["cdev"] for each in json.loads(capsys.readouterr().out)["devices"]}
    assert found == {NIC: "vfio0", DISK_BDF: None}


def test_the_help_explains_each_state(capsys: pytest.CaptureFixture[str]) -> None:
    text = list_command.make_parser().format_help()
    assert all(f"  {word:<13} {meaning}\n" in text for word, meaning in STATES.items())


# --- Names


def test_a_device_has_the_name_that_pci_ids_gives_it(tree: SysfsTree, capsys: pytest.CaptureFixture[str]) -> None:
    """The first of the files that can be read is taken."""
    assert "  82574L Gigabit Network Connection  vfio-pci  " in lines(tree, capsys, NIC)[1]
    list_command.main([DISK_BDF, "--json"], kernel=tree.kernel, database=database(tree))
    (one,) = json.loads(capsys.readouterr().out)["devices"]
    assert (one["vendor_name"], one["device_name"]) == ("Intel Corporation", "NVMe Datacenter SSD [3DNAND]")


@pytest.mark.parametrize(
    ("vendor", "device", "names"),
    [
        (0x8086, 0x10D3, Names("Intel Corporation", "82574L Gigabit Network Connection")),
        (0x8086, 0x10D4, Names("Intel Corporation", "Behind a comment")),
        (0x8086, 0x10D5, Names("Intel Corporation", None)),
        (0x8086, 0x4702, Names("Intel Corporation", None)),
        (0x8085, 0x10D3, Names("Before", "Another vendor's")),
        (0x8087, 0x10D6, Names("After", None)),
        (0x1234, 0x11E8, Names()),
    ],
)
def test_a_name_belongs_to_one_vendor(vendor: int, device: int, names: Names) -> None:
    """A device of the next vendor, a subsystem and a class have the same form in the file."""
    assert find_names(IDS.encode(), vendor, device) == names


def test_a_compressed_file_of_names_is_read(tree: SysfsTree, tmp_path: Path) -> None:
    """A broken one is passed over."""
    broken, whole = tmp_path / "a.gz", tmp_path / "b.gz"
    broken.write_bytes(b"no gzip")
    whole.write_bytes(gzip.compress(IDS.encode()))
    (device,) = (each for each in pci.devices(kernel=tree.kernel) if each.bdf == NIC)
    assert HardwareDatabase(tree.kernel, [broken, whole]).names(device).vendor == "Intel Corporation"
    assert HardwareDatabase(tree.kernel, [broken]).names(device) == Names()


# --- The tree


def test_the_tree_shows_each_device_below_its_bridge(tree: SysfsTree, capsys: pytest.CaptureFixture[str]) -> None:
    assert [line.partition("  8086")[0].rstrip() for line in lines(tree, capsys, "--tree")[1:]] == [
        PORT,
        f"└─ {SWITCH}",
        f"   ├─ {NIC}",
        f"   └─ {VF}",
        DISK_BDF,
        SOUND,
    ]


def test_a_line_leads_past_the_devices_below_a_bridge_to_the_next_one(
    tree: SysfsTree, capsys: pytest.CaptureFixture[str]
) -> None:
    tree.add_device("0000:01:01.0", behind=PORT)
    found = [line.partition("  8086")[0].rstrip() for line in lines(tree, capsys, "--tree")[1:6]]
    assert found == [PORT, f"├─ {SWITCH}", f"│  ├─ {NIC}", f"│  └─ {VF}", "└─ 0000:01:01.0"]


def test_a_device_whose_bridge_is_not_shown_stands_at_the_root(
    tree: SysfsTree, capsys: pytest.CaptureFixture[str]
) -> None:
    """The JSON document names the bridge, and the physical function of a virtual one."""
    assert [line.split()[0] for line in lines(tree, capsys, "--tree", NIC, VF)[1:]] == [NIC, VF]
    list_command.main([VF, "--json"], kernel=tree.kernel)
    (one,) = json.loads(capsys.readouterr().out)["devices"]
    assert (one["parent"], one["physical_function"]) == (SWITCH, NIC)


# --- Width


@pytest.mark.parametrize("columns", [200, 80, 60, 40])
@pytest.mark.parametrize("option", [[], ["--tree"]])
def test_no_line_is_wider_than_the_terminal(
    tree: SysfsTree,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
    option: list[str],
) -> None:
    """Each device is there all the same, with its state."""
    monkeypatch.setenv("COLUMNS", str(columns))
    found = lines(tree, capsys, *option)
    assert max(map(len, found)) <= columns
    text = " ".join(found)
    assert all(bdf in text for bdf in (PORT, SWITCH, NIC, VF, SOUND, DISK_BDF))
    assert [text.count(word) for word in ("bridge", "ready", "not bound")][1:] == [1, 2]


def test_at_80_columns_the_table_is_one_line_a_device(
    tree: SysfsTree, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    found = lines(tree, capsys)
    assert len(found) == 7
    assert found[0].split() == ["BDF", "ID", "DEVICE", "DRIVER", "GROUP", "NUMA", "STATE"]


def test_without_a_terminal_no_cell_is_cut(tree: SysfsTree, capsys: pytest.CaptureFixture[str]) -> None:
    """grep finds whole names."""
    (tree.sysfs.parent / "pci.ids").write_text("")
    name = "x" * 300
    text = IDS.replace("82574L Gigabit Network Connection", name)
    assert list_command.main([NIC], kernel=tree.kernel, database=database(tree, text)) == 0
    assert f"  {name}  " in capsys.readouterr().out


HEADER = ["KEY", "ELASTIC", "EMPTY", "DROPPED"]
ROWS = [["a" * 8, "b" * 20, "", "d" * 20], ["a" * 8, "c", "", ""]]


@pytest.mark.parametrize(
    ("width", "found"),
    [
        (None, ["KEY       ELASTIC               EMPTY  DROPPED", f"aaaaaaaa  {'b' * 20}  -      {'d' * 20}"]),
        (60, ["KEY       ELASTIC               EMPTY  DROPPED", f"aaaaaaaa  {'b' * 20}  -      {'d' * 20}"]),
        (56, ["KEY       ELASTIC               DROPPED", f"aaaaaaaa  {'b' * 20}  {'d' * 20}"]),
        (45, ["KEY       ELASTIC        DROPPED", f"aaaaaaaa  {'b' * 12}…  {'d' * 20}"]),
        (24, ["KEY       ELASTIC", f"aaaaaaaa  {'b' * 13}…"]),
        (19, ["aaaaaaaa", "  elastic bbbbbbbbbb"]),
    ],
)
def test_a_table_gives_up_as_little_as_it_has_to(width: int | None, found: list[str]) -> None:
    """First columns without a value, then the ends of long cells, then columns, then the form of a table."""
    shown = fitting_table(HEADER, ROWS, Terminal(width, colour=False), elastic=["ELASTIC"], drop=["DROPPED"])
    assert shown[:2] == found


def test_a_paragraph_keeps_cells_whole() -> None:
    shown = fitting_table(HEADER, ROWS, Terminal(30, colour=False))
    assert shown == [
        "aaaaaaaa",
        "  elastic " + "b" * 20,
        "  dropped " + "d" * 20,
        "aaaaaaaa",
        "  elastic c",
    ]


# --- Colours


def on_terminal(*arguments: str, columns: int = 80, **variables: str) -> str:
    """The output of `pyvfio list` on a pseudo-terminal of that width."""
    controller, terminal = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "NO_COLOR", "TERM"}}
    try:
        os.set_blocking(controller, False)
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        subprocess.run(
            [sys.executable, "-m", "pyvfio", "list", *arguments],
            stdout=terminal,
            check=True,
            cwd=ROOT,
            env={**environment, "TERM": "xterm", **variables},
        )
        return os.read(controller, 1 << 16).decode()
    finally:
        os.close(controller)
        os.close(terminal)


@pytest.mark.long
def test_the_table_has_colours_on_a_terminal_alone(tree: SysfsTree, capsys: pytest.CaptureFixture[str]) -> None:
    """A terminal without colours, NO_COLOR and --color=never take them away. The width is the terminal's."""
    assert on_terminal().startswith("\x1b[1mBDF ")
    for plain in (on_terminal(TERM="dumb"), on_terminal(NO_COLOR="1"), on_terminal("--color=never")):
        assert plain.startswith("BDF ")
        assert "\x1b" not in plain
    narrow = on_terminal("--color=never", columns=45).splitlines()
    assert max(map(len, narrow)) <= 45
    assert not any("\x1b" in line for line in lines(tree, capsys))


def test_colours_can_be_asked_for_without_a_terminal(tree: SysfsTree, capsys: pytest.CaptureFixture[str]) -> None:
    """Also with NO_COLOR: an option is nearer than the environment."""
    head, *devices = lines(tree, capsys, "--color=always")
    assert head.startswith("\x1b[1m")
    assert sum(line.startswith("\x1b[32m") for line in devices) == 1  # the one that is ready
    assert on_terminal("--color=always", NO_COLOR="1").startswith("\x1b[1m")


def test_a_stream_that_is_closed_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "stdout", None)
    assert find_terminal() == Terminal(None, colour=False)
    assert Terminal(None, colour=False).paint("x", Style.BAD) == "x"
