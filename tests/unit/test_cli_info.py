"""`pyvfio info`: each fact of a device, on a tree that looks like sysfs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pyvfio.cli import info
from pyvfio.cli.facts import Bar, find_capabilities, find_modules, read_bars, read_reset_methods
from pyvfio.cli.names import HardwareDatabase
from pyvfio.testing.fake import FakeKernel
from tests.unit.sysfs import BRIDGE, SysfsTree, link

PORT, NIC, VF, SECOND = "0000:00:1c.0", "0000:01:00.0", "0000:01:10.0", "0000:01:10.1"
MODALIAS = "pci:v00008086d000010D3sv00008086sd0000A01Fbc02sc00i00"
ALIASES = """\
# Aliases extracted from modules themselves.
alias pci:v00008086d000010D3sv*sd*bc*sc*i* e1000e
alias pci:v00008086d000010D4sv*sd*bc*sc*i* another_device
alias pci:v00001AF4d000010D3sv*sd*bc*sc*i* another_vendor
alias pci:v*d*sv*sd*bc02sc00i* any_network
alias pci:v*d*sv*sd*bc01sc08i* any_disk
alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci
alias usb:v8086p10D3d*dc*dsc*dp*ic*isc*ip*in* usb_thing
"""
RESOURCES = """\
0x00000000febc0000 0x00000000febdffff 0x0000000000040200
0x0000000000000000 0x0000000000003fff 0x0000000020140204
0x0000000000000000 0x0000000000000000 0x0000000000000000
0x000000000000c000 0x000000000000c01f 0x0000000000040101
0x0000380000000000 0x00003800ffffffff 0x000000000014220c
0x0000000000000000 0x0000000000000000 0x0000000000000000
0x00000000feb80000 0x00000000febbffff 0x0000000000046200
0x0000000000000000 0x0000000000003fff 0x0000000000140204
"""


def config_space(*, size: int = 256) -> bytes:
    """Power management at 0x40 in D3hot, PCI Express at 0x50 with a function-level reset, MSI-X at 0x80."""
    data = bytearray(256)
    data[6] = 0x10
    data[0x34] = 0x40
    data[0x40:0x48] = bytes.fromhex("0150030603000000")
    data[0x50:0x64] = b"\x10\x80" + bytes(2) + (1 << 28).to_bytes(4, "little") + bytes(12)
    data[0x80:0x8C] = bytes.fromhex("11000480030000000320 0000".replace(" ", ""))
    return bytes(data[:size])


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SysfsTree:
    """A network card behind a port, with all that sysfs can say of one."""
    for name in ("COLUMNS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    tree = SysfsTree(tmp_path)
    tree.add_device(PORT, driver="pcieport", group=7, class_code=BRIDGE)
    nic = tree.add_device(NIC, driver="e1000e", group=7, numa_node=1, behind=PORT)
    for bdf in (VF, SECOND):
        link(tree.add_device(bdf, group=8, behind=PORT) / "physfn", nic)
    for at, bdf in enumerate((VF, SECOND)):
        link(nic / f"virtfn{at}", (tree.pci / "devices" / bdf).resolve())
    files = {
        "subsystem_vendor": "0x8086",
        "subsystem_device": "0xa01f",
        "revision": "0x03",
        "label": "Onboard LAN",
        "modalias": MODALIAS,
        "irq": "11",
        "reset_method": "flr bus",
        "resource": RESOURCES.rstrip(),
        "current_link_speed": "2.5 GT/s PCIe",
        "current_link_width": "1",
        "max_link_speed": "8.0 GT/s PCIe",
        "max_link_width": "4",
        "sriov_totalvfs": "7",
        "power_state": "D0",
        "d3cold_allowed": "0",
    }
    for name, text in files.items():
        (nic / name).write_text(text + "\n")
    (nic / "config").write_bytes(config_space())
    for name in ("msi_irqs/24", "msi_irqs/25", "power"):
        (nic / name).mkdir(parents=True)
    (nic / "power/runtime_status").write_text("active\n")
    (tree.sysfs / "class/iommu/dmar0").mkdir(parents=True)
    link(nic / "iommu", tree.sysfs / "class/iommu/dmar0")
    (tree.sysfs / "kernel/iommu_groups/7/type").write_text("DMA-FQ\n")
    (tree.proc / "sys/kernel").mkdir(parents=True)
    (tree.proc / "sys/kernel/osrelease").write_text("6.12.1-test\n")
    (tmp_path / "modules/6.12.1-test").mkdir(parents=True)
    (tmp_path / "modules/6.12.1-test/modules.alias").write_text(ALIASES)
    (tmp_path / "pci.ids").write_text("8086  Intel Corporation\n\t10d3  82574L\n")
    return tree


def run(tree: SysfsTree, *arguments: str) -> int:
    root = tree.sysfs.parent
    database = HardwareDatabase(tree.kernel, [root / "pci.ids"])
    return info.main(arguments, kernel=tree.kernel, database=database, modules=root / "modules")


def told(tree: SysfsTree, capsys: pytest.CaptureFixture[str], bdf: str) -> dict[str, Any]:
    assert run(tree, bdf, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "pyvfio.info/1"
    (found,) = document["devices"]
    assert isinstance(found, dict)
    return found


def test_a_person_is_told_each_fact_of_a_device(tree: SysfsTree, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tree, NIC) == 0
    assert capsys.readouterr().out.splitlines() == [
        "0000:01:00.0    Intel Corporation 82574L",
        "  state         not bound",
        "                pyvfio doctor 0000:01:00.0 says how to make it ready",
        "  id            8086:10d3",
        "  subsystem     8086:a01f",
        "  revision      03",
        "  class         Ethernet controller (020000)",
        "  label         Onboard LAN",
        "  driver        e1000e",
        "  modules       any_network, e1000e",
        "  vfio modules  vfio_pci",
        "  IOMMU         dmar0",
        "  group         7 (DMA-FQ), not viable",
        "  member        0000:00:1c.0: pcieport",
        "  member        0000:01:00.0: e1000e, blocks the group",
        "  behind        0000:00:1c.0",
        "  NUMA node     1",
        "  reset         flr, bus",
        "  interrupts    INTx 11, 2 MSI or MSI-X",
        "  BAR 0         128 KiB at 0xfebc0000, 32-bit memory",
        "  BAR 1         16 KiB no address, 64-bit memory",
        "  BAR 3         32 bytes at 0xc000, I/O ports",
        "  BAR 4         4 GiB at 0x380000000000, 64-bit memory, prefetchable",
        "  ROM           256 KiB at 0xfeb80000, 32-bit memory, prefetchable",
        "  link          2.5 GT/s PCIe x1; at most 8.0 GT/s PCIe x4",
        "  SR-IOV        2 of 7 virtual functions",
        "  VFs           0000:01:10.0, 0000:01:10.1",
        "  power         D0, active, no D3cold",
        "  cap 0x40      power management: D3 of D0, D1, D2, D3",
        "  cap 0x50      PCI Express: function-level reset",
        "  cap 0x80      MSI-X: 5 vectors, on, table in BAR 3 at 0x0, PBA in BAR 3 at 0x2000",
    ]


def test_programs_are_told_the_same(tree: SysfsTree, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(tree, capsys, NIC)
    expected = {
        "state": "not bound",
        "state_detail": None,
        "subsystem": "8086:a01f",
        "revision": "03",
        "label": "Onboard LAN",
        "modalias": MODALIAS,
        "modules": ["any_network", "e1000e"],
        "vfio_modules": ["vfio_pci"],
        "group_members": [
            {"bdf": PORT, "driver": "pcieport", "blocks": False},
            {"bdf": NIC, "driver": "e1000e", "blocks": True},
        ],
        "group_type": "DMA-FQ",
        "iommu": "dmar0",
        "vfio_node": None,
        "uses": [],
        "irq": 11,
        "msi_vectors": 2,
        "reset_methods": ["flr", "bus"],
        "link": {"speed": "2.5 GT/s PCIe", "width": 1, "max_speed": "8.0 GT/s PCIe", "max_width": 4},
        "sriov": {"physical_function": None, "virtual_functions": [VF, SECOND], "total": 7},
        "power": {"state": "D0", "runtime": "active", "d3cold_allowed": False},
        "capabilities_error": None,
    }
    assert {name: found[name] for name in expected} == expected
    assert found["bars"][1] == {
        "number": 1,
        "kind": "memory",
        "start": None,
        "size": 16384,
        "width": 64,
        "prefetchable": False,
    }
    assert [(each["name"], each["offset"]) for each in found["capabilities"]] == [
        ("power management", 0x40),
        ("PCI Express", 0x50),
        ("MSI-X", 0x80),
    ]
    assert found["capabilities"][2]["vectors"] == 5


def test_a_device_of_which_the_kernel_says_little_is_shown_all_the_same(
    tree: SysfsTree, capsys: pytest.CaptureFixture[str]
) -> None:
    """A field without a value is left out, or null."""
    (tree.sysfs.parent / "pci.ids").unlink()
    tree.add_device("0000:09:00.0")
    assert run(tree, "09:00.0") == 0
    assert capsys.readouterr().out.splitlines() == [
        "0000:09:00.0    Ethernet controller",
        "  state         no group",
        "                pyvfio doctor 0000:09:00.0 says how to make it ready",
        "  id            8086:10d3",
        "  class         Ethernet controller (020000)",
        "  driver        none",
        "  reset         none",
        "  capabilities  configuration space cannot be read: No such file or directory",
    ]
    found = told(tree, capsys, "09:00.0")
    assert [found[name] for name in ("link", "sriov", "iommu", "modules", "capabilities")] == [None] * 5


def test_a_virtual_function_names_the_physical_one(tree: SysfsTree, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tree, VF) == 0
    assert f"  VF of         {NIC}\n" in capsys.readouterr().out


def test_a_device_with_a_node_of_its_own_is_shown_with_it(tree: SysfsTree, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the node does not exist, as in a container, no node is shown."""
    node = tree.add_cdev(NIC, "vfio3", node=False)
    assert (told(tree, capsys, NIC)["cdev"], told(tree, capsys, NIC)["vfio_node"]) == ("vfio3", None)
    assert run(tree, NIC) == 0
    assert "device node" not in capsys.readouterr().out
    tree.dev.joinpath("vfio/devices").mkdir()
    node.touch()
    assert told(tree, capsys, NIC)["vfio_node"] == str(node)
    assert run(tree, NIC) == 0
    assert f"  device node   {node}\n" in capsys.readouterr().out


def test_what_uses_a_device_is_said(tree: SysfsTree, capsys: pytest.CaptureFixture[str]) -> None:
    tree.add_interface(NIC, "enp1s0", up=True)
    assert run(tree, NIC) == 0
    assert "  in use        network interface enp1s0 is up\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("methods", "file", "release", "found"),
    [
        ("flr pm", True, "6.1.0", ("flr", "pm")),
        ("", False, "6.1.0", ()),
        (None, False, "6.1.0", ()),
        (None, True, "5.10.0", None),
        (None, False, "5.10.0", None),
        (None, False, "", None),
    ],
)
def test_no_reset_and_an_unknown_reset_are_told_apart(
    tree: SysfsTree, methods: str | None, release: str, found: tuple[str, ...] | None, *, file: bool
) -> None:
    """Linux names the methods since 5.15."""
    path = (tree.pci / "devices" / VF).resolve()
    if methods is not None:
        (path / "reset_method").write_text(methods + "\n")
    if file:
        (path / "reset").touch()
    (tree.proc / "sys/kernel/osrelease").write_text(release + "\n")
    assert read_reset_methods(tree.kernel, VF) == found


def test_a_rom_and_the_bars_of_virtual_functions_are_no_bars(tree: SysfsTree) -> None:
    """The file goes on behind the ROM."""
    found = read_bars(tree.kernel, NIC)
    assert [bar.name for bar in found] == ["BAR 0", "BAR 1", "BAR 3", "BAR 4", "ROM"]
    assert found[0] == Bar(0, "memory", 0xFEBC0000, 0x20000, 32, prefetchable=False)


def test_without_the_kernels_table_of_modules_none_are_named(tree: SysfsTree, tmp_path: Path) -> None:
    """A release that is a path is no folder of modules."""
    assert find_modules(tree.kernel, NIC, tmp_path / "nowhere") is None
    (tree.proc / "sys/kernel/osrelease").write_text("../modules/6.12.1-test\n")
    assert find_modules(tree.kernel, NIC, tmp_path / "modules") is None


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (config_space(size=64), "root alone can read them"),
        (config_space(size=16), "configuration space has 16 bytes, where 64 or more are expected"),
        (b"\xff" * 256, f"the capability of {NIC} at 0xfc reads 0xffff, as if no device answers"),
    ],
)
def test_capabilities_that_cannot_be_read_are_said_to_be(tree: SysfsTree, config: bytes, said: str) -> None:
    """With the reason, in the place of a list."""
    ((tree.pci / "devices" / NIC).resolve() / "config").write_bytes(config)
    assert find_capabilities(tree.kernel, NIC) == said


def test_a_device_without_capabilities_has_an_empty_list(tree: SysfsTree, capsys: pytest.CaptureFixture[str]) -> None:
    """Every user can read as much."""
    ((tree.pci / "devices" / NIC).resolve() / "config").write_bytes(bytes(64))
    assert told(tree, capsys, NIC)["capabilities"] == []


def test_each_device_that_exists_is_shown(tree: SysfsTree, capsys: pytest.CaptureFixture[str]) -> None:
    """One that does not is a line on stderr and status 1."""
    assert run(tree, "09:00.0", NIC, "01:00.0", VF) == 1
    out, err = capsys.readouterr()
    assert [line[:12] for line in out.splitlines() if line[:1] == "0"] == [NIC, VF]
    assert (err.count("\n"), "no PCI device 0000:09:00.0" in err) == (1, True)
    assert run(tree, "09:00.0", "--json") == 1
    assert json.loads(capsys.readouterr().out)["devices"] == []


@pytest.mark.parametrize("columns", [80, 60, 40])
def test_a_narrow_terminal_folds_the_values(
    tree: SysfsTree, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    """No word of them is lost."""
    assert run(tree, NIC) == 0
    wide = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run(tree, NIC) == 0
    narrow = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= columns
    assert narrow.split() == wide.split()


def test_control_characters_of_a_name_do_not_reach_the_terminal(
    tree: SysfsTree, capsys: pytest.CaptureFixture[str]
) -> None:
    """Firmware chose the label."""
    ((tree.pci / "devices" / NIC).resolve() / "label").write_text("\x1b[2Jevil\n")
    assert run(tree, NIC) == 0
    out = capsys.readouterr().out
    assert r"\x1b[2Jevil" in out
    assert out.replace("\n", "").isprintable()


def test_a_device_of_the_fake_kernel_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeKernel() as kernel:
        assert info.main([kernel.bdfs[0]], kernel=kernel) == 0
    out = capsys.readouterr().out
    assert "  state         ready\n" in out
    assert "  driver        vfio-pci\n" in out
