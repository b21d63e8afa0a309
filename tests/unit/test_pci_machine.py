"""What sysfs, procfs and the files of the kernel say of a machine: IOMMUs, groups, options, surroundings, numbers."""

from __future__ import annotations

import errno
import gzip
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from pyvfio import pci
from pyvfio.errors import (
    AccessDeniedError,
    DeviceNotFoundError,
    Holder,
    NotBoundError,
    UnavailableError,
    UnsupportedError,
    VfioError,
)
from pyvfio.kernel import LinuxKernel
from pyvfio.pci.boot import build_options, release
from pyvfio.pci.groups import holders_of_any, this_process
from pyvfio.pci.iommus import iommu_problems, is_virtual_machine
from pyvfio.pci.nodes import explain_container, explain_group, explain_open, mknod_command, place_in_sysfs
from pyvfio.pci.noiommu import PARAMETER, is_unprotected, not_unprotected
from pyvfio.pci.surroundings import Surroundings, look_around
from tests.unit.sysfs import BRIDGE, SysfsTree, link, place_process

BDF, OTHER = "0000:00:02.0", "0000:00:02.1"
ROOT_OF_SELF = "proc/self/root"
RELEASE = "6.12.9-amd64"
INTEL = "vendor_id\t: GenuineIntel\nflags\t\t: fpu vmx\n"
AMD = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu svm\n"
VIRTUAL = "vendor_id\t: GenuineIntel\nflags\t\t: fpu hypervisor vmx\n"


@pytest.fixture
def tree(tmp_path: Path) -> SysfsTree:
    """A machine without devices."""
    return SysfsTree(tmp_path)


def put(tree: SysfsTree, name: str, text: str) -> None:
    """Write a file below the parent of sys, dev and proc."""
    path = tree.sysfs.parent / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# --- IOMMUs


@dataclass(frozen=True)
class Machine:
    """A machine whose kernel uses no IOMMU: the words of its command line, and each problem with the words to add and
    to remove."""

    words: str
    problems: list[tuple[str, str, str]]
    tables: str = "DMAR"
    cpuinfo: str = INTEL
    config: str = ""
    files: Mapping[str, str] = field(default_factory=dict)


OFF, ON, ABSENT = "told not to use the IOMMU", "not told to use the IOMMU", "the firmware announces no IOMMU"
VIRTUAL_ABSENT, WAITS = "this virtual machine has no IOMMU", "has not initialized the IOMMU"
MACHINES = [
    Machine("intel_iommu=off", [(OFF, "intel_iommu=on", "intel_iommu=off")]),
    Machine("intel_iommu=off,sm_on", [(OFF, "intel_iommu=on,sm_on", "intel_iommu=off,sm_on")]),
    Machine("intel_iommu=off intel_iommu=off", [(OFF, "intel_iommu=on", "intel_iommu=off")]),
    Machine("intel_iommu=on,off", [(OFF, "intel_iommu=on", "intel_iommu=on,off")]),
    Machine("intel_iommu=off,on", [(WAITS, "", "")]),
    Machine("intel_iommu=sm_on", [(ON, "intel_iommu=on", "")]),
    Machine("intel_iommu=on iommu=off", [(OFF, "", "iommu=off")]),
    Machine("iommu=pt,off", [(OFF, "intel_iommu=on", "iommu=pt,off")]),
    Machine("iommu=pt", [(ON, "intel_iommu=on", "")]),
    Machine("acpi=off", [(OFF, "", "acpi=off")], tables=""),
    Machine("acpi=off", [(OFF, "intel_iommu=on", "acpi=off")]),
    Machine("acpi=force", [(ABSENT, "intel_iommu=on", "")], tables=""),
    Machine("iommu=off", [(ABSENT, "intel_iommu=on", ""), (OFF, "", "iommu=off")], tables=""),
    Machine("amd_iommu=off", [(ON, "intel_iommu=on", "")]),
    Machine("amd_iommu=off", [(OFF, "", "amd_iommu=off")], tables="IVRS", cpuinfo=AMD),
    Machine("amd_iommu=fullflush", [(WAITS, "", "")], tables="IVRS", cpuinfo=AMD),
    Machine("intel_iommu=off", [(WAITS, "", "")], tables="IVRS", cpuinfo=AMD),
    Machine("intel_iommu=off", [(ABSENT, "intel_iommu=on", ""), (OFF, "", "intel_iommu=off")], tables=""),
    Machine("iommu=off intel_iommu=off", [(OFF, "intel_iommu=on", "iommu=off intel_iommu=off")]),
    Machine(
        "intel_iommu=off,sm_on", [(OFF, "intel_iommu=sm_on", "intel_iommu=off,sm_on")], tables="", files={"dt": ""}
    ),
    Machine("quiet", [(WAITS, "", "")], tables="", cpuinfo="", files={"dt": ""}),
    Machine("quiet", [(WAITS, "", "")], tables="IORT", cpuinfo=""),
    Machine("quiet", [(ABSENT, "", "")], tables="", cpuinfo=AMD),
    Machine("intel_iommu=on", [(ABSENT, "", "")], tables=""),
    Machine("quiet", [(VIRTUAL_ABSENT, "intel_iommu=on", "")], tables="", cpuinfo=VIRTUAL),
    Machine("intel_iommu=on", [(VIRTUAL_ABSENT, "", "")], tables="", cpuinfo=VIRTUAL),
    Machine(
        "quiet",
        [(VIRTUAL_ABSENT, "intel_iommu=on", "")],
        tables="",
        cpuinfo="",
        files={"sys/class/dmi/id/sys_vendor": "QEMU\n"},
    ),
    Machine("quiet", [("the hypervisor Xen", "", "")], files={"sys/hypervisor/type": "xen\n"}),
    Machine("quiet", [(ON, "intel_iommu=on", "")], files={"sys/hypervisor/type": "kvm\n"}),
    Machine("quiet", [("without CONFIG_INTEL_IOMMU", "", "")], config="# CONFIG_INTEL_IOMMU is not set\n"),
    Machine(
        "quiet",
        [("without CONFIG_AMD_IOMMU", "", "")],
        tables="IVRS",
        cpuinfo=AMD,
        config="# CONFIG_AMD_IOMMU is not set\n# CONFIG_INTEL_IOMMU is not set\n",
    ),
    Machine("quiet", [(WAITS, "", "")], config="CONFIG_INTEL_IOMMU=y\nCONFIG_INTEL_IOMMU_DEFAULT_ON=y\n"),
    Machine(
        "quiet",
        [("(CONFIG_INTEL_IOMMU_DEFAULT_ON is not set)", "intel_iommu=on", "")],
        config="# CONFIG_INTEL_IOMMU_DEFAULT_ON is not set\n",
    ),
]


@pytest.mark.parametrize("machine", MACHINES, ids=lambda each: f"{each.tables}-{each.words}-{len(each.problems)}")
def test_a_kernel_without_an_iommu_is_told_with_the_words_that_change_that(tree: SysfsTree, machine: Machine) -> None:
    """Each reason, the first to remove first. Words alone mend what words have done."""
    for name in ("FACP", *machine.tables.split()):
        put(tree, f"sys/firmware/acpi/tables/{name}", "")
    put(tree, "proc/cmdline", f"quiet {machine.words}\n")
    put(tree, "proc/cpuinfo", machine.cpuinfo)
    put(tree, "proc/sys/kernel/osrelease", f"{RELEASE}\n")
    put(tree, f"{ROOT_OF_SELF}/boot/config-{RELEASE}", machine.config)
    for name, text in machine.files.items():
        put(tree, "sys/firmware/devicetree/base/model" if name == "dt" else name, text)
    found = iommu_problems(tree.kernel)
    assert [(" ".join(each.add), " ".join(each.remove)) for each in found] == [
        (add, remove) for _reason, add, remove in machine.problems
    ]
    for problem, (reason, _add, _remove) in zip(found, machine.problems, strict=True):
        assert reason in problem.reason
        assert problem.only_line == (reason in {OFF, ON} or "DEFAULT_ON" in reason)
        assert problem.hint
        assert bool(problem.step) == (reason in {ABSENT, VIRTUAL_ABSENT})
        if reason == OFF:
            plural = "options" if " " in " ".join(problem.remove) else "option"
            added = f", add {problem.add[0]}," if problem.add else ""
            assert problem.hint == f"Remove the {plural} from the kernel command line{added} and reboot"


@pytest.mark.parametrize(
    ("tables", "loaded", "driver"),
    [("VIOT", False, "virtio_iommu"), ("VIOT", True, ""), ("VIOT IORT", False, ""), ("IORT", False, "")],
)
def test_a_module_that_an_iommu_of_virtio_waits_for_is_named(
    tree: SysfsTree, tables: str, driver: str, *, loaded: bool
) -> None:
    """Where there is no other IOMMU, and the module is not loaded."""
    for name in tables.split():
        put(tree, f"sys/firmware/acpi/tables/{name}", "")
    if loaded:
        (tree.sysfs / "module/virtio_iommu").mkdir(parents=True)
    (problem,) = iommu_problems(tree.kernel)
    assert problem.driver == driver
    assert f"({', '.join(sorted(tables.split()))})" in problem.reason


@pytest.mark.parametrize(
    ("cpuinfo", "vendor", "virtual"),
    [
        (VIRTUAL, None, True),
        (INTEL, None, False),
        ("flags : nohypervisor\n", None, False),
        ("model name : hypervisor\n", None, False),
        ("", "QEMU", True),
        ("", "Dell", False),
    ],
)
def test_a_virtual_machine_shows_a_flag_or_its_maker(
    tree: SysfsTree, cpuinfo: str, vendor: str | None, *, virtual: bool
) -> None:
    put(tree, "proc/cpuinfo", cpuinfo)
    if vendor is not None:
        put(tree, "sys/class/dmi/id/sys_vendor", f"{vendor}\n")
    assert is_virtual_machine(tree.kernel) == virtual


# --- Groups


@pytest.mark.parametrize(
    ("units", "groups", "device", "later"),
    [
        (["0000:00:03.0"], True, {}, True),
        (["smmu3.0x2b400000"], True, {}, True),
        (["dmar0", "0000:00:03.0"], True, {}, True),
        (["dmar0", "dmar1"], True, {}, False),
        (["ivhd0"], True, {}, False),
        ([], True, {}, False),
        (["0000:00:03.0"], False, {}, False),
        (["0000:00:03.0"], True, {"driver": "e1000e"}, False),
        (["0000:00:03.0"], True, {"class_code": BRIDGE}, False),
        (["0000:00:03.0"], True, {"group": 4}, False),
    ],
)
def test_a_group_comes_later_where_an_iommu_makes_groups_with_drivers(
    tree: SysfsTree, units: list[str], device: dict[str, object], *, groups: bool, later: bool
) -> None:
    """And the device has neither a group nor a driver. Intel's and AMD's make all groups at boot."""
    for unit in units:
        (tree.sysfs / "class/iommu" / unit).mkdir(parents=True)
    if groups:
        tree.add_device("0000:00:1c.0", driver="pcieport", group=1, class_code=BRIDGE)
    tree.add_device(BDF, **device)  # type: ignore[arg-type]
    assert pci.comes_later(pci.read_device(BDF, kernel=tree.kernel), kernel=tree.kernel) == later


def test_a_missing_group_names_all_groups_by_number(tree: SysfsTree) -> None:
    """Not by text; a name that is no number comes first."""
    for number in (10, 9, 2):
        tree.add_device(f"0000:00:{number:02x}.0", group=number)
    assert pci.read_device("0000:00:0a.0", kernel=tree.kernel).iommu_group == 10
    (tree.sysfs / "kernel/iommu_groups/odd").mkdir()
    with pytest.raises(DeviceNotFoundError) as caught:
        pci.group_members(3, kernel=tree.kernel)
    assert caught.value.hint == "The groups are: odd, 2, 9, 10"


def test_holders_are_told_in_the_order_of_their_numbers(tree: SysfsTree) -> None:
    """Each once, whichever of the nodes it has open; this process is marked. A dead descriptor is passed over."""
    one, other = tree.add_group_node(7), tree.add_group_node(8)
    tree.place_holder(300, one, "qemu")
    tree.place_holder(41, other, "dpdk")
    (tree.proc / "41/fd/4").symlink_to(one)
    tree.place_holder(50, tree.dev / "vfio/9")
    tree.place_holder(51, tree.dev / "other")
    (tree.proc / "self").rmdir()
    (tree.proc / "self").symlink_to("300")
    assert this_process(tree.proc) == 300
    assert holders_of_any((one, tree.dev / "gone", other), tree.kernel) == (
        Holder(41, "dpdk", is_this_process=False),
        Holder(300, "qemu", is_this_process=True),
    )
    assert holders_of_any((tree.dev / "gone",), tree.kernel) == ()
    (tree.proc / "self").unlink()
    assert this_process(tree.proc) == 0
    (tree.proc / "self").symlink_to("me")
    assert this_process(tree.proc) == 0


# --- Options


SOME = "CONFIG_VFIO=m\n# CONFIG_IOMMUFD is not set\nCONFIG_NR_CPUS=8\nCONFIG_PCI=y\n#CONFIG_X is not set\n"


@pytest.mark.parametrize(
    "place",
    [
        f"boot/config-{RELEASE}",
        f"lib/modules/{RELEASE}/config",
        f"usr/lib/modules/{RELEASE}/config",
        f"lib/modules/{RELEASE}/build/.config",
    ],
)
def test_the_options_of_a_kernel_are_those_of_the_file_that_came_with_it(tree: SysfsTree, place: str) -> None:
    """Wherever the distribution installs the file. Values that are neither y nor m are left out."""
    put(tree, "proc/sys/kernel/osrelease", f"{RELEASE}\n")
    assert build_options(tree.kernel) == {}
    put(tree, f"{ROOT_OF_SELF}/{place}", SOME)
    assert build_options(tree.kernel) == {"VFIO": "m", "IOMMUFD": "n", "PCI": "y"}
    put(tree, "proc/sys/kernel/osrelease", "other\n")
    assert build_options(tree.kernel) == {}


def test_the_options_that_the_kernel_itself_shows_come_first(tree: SysfsTree) -> None:
    """Unless they cannot be unpacked."""
    put(tree, "proc/sys/kernel/osrelease", f"{RELEASE}\n")
    put(tree, f"{ROOT_OF_SELF}/boot/config-{RELEASE}", SOME)
    packed = gzip.compress(b"CONFIG_VFIO=y\n")
    (tree.proc / "config.gz").write_bytes(packed)
    assert build_options(tree.kernel) == {"VFIO": "y"}
    for broken in (packed[:-12], b"garbage"):
        (tree.proc / "config.gz").write_bytes(broken)
        assert build_options(tree.kernel) == {"VFIO": "m", "IOMMUFD": "n", "PCI": "y"}


@pytest.mark.parametrize("text", ["", "6.1; reboot", "../../etc", "6.1\nx"])
def test_a_release_that_no_kernel_has_is_none(tree: SysfsTree, text: str) -> None:
    """The release stands in paths and commands."""
    put(tree, "proc/sys/kernel/osrelease", f"{text}\n")
    assert release(tree.kernel) == ""
    put(tree, "proc/sys/kernel/osrelease", "6.12.95+deb12-amd64~rc1_x\n")
    assert release(tree.kernel) == "6.12.95+deb12-amd64~rc1_x"


# --- Devices


@pytest.mark.parametrize(
    ("code", "bridge"),
    [(code, True) for code in (0x060400, 0x060401, 0x060700, 0x060900)]
    + [(code, False) for code in (0x060000, 0x060100, 0x060800, 0x020000, 0x040006)],
)
def test_a_bridge_is_known_by_its_class(tree: SysfsTree, code: int, *, bridge: bool) -> None:
    """Host and ISA bridges are ordinary devices."""
    tree.add_device(BDF, class_code=code)
    assert pci.read_device(BDF, kernel=tree.kernel).is_bridge == bridge


@pytest.mark.parametrize(("node", "expected"), [(-1, None), (0, 0), (10, 10), (-2, None)])
def test_a_device_of_no_numa_node_has_none(tree: SysfsTree, node: int, expected: int | None) -> None:
    """The kernel writes -1; the first node is 0."""
    tree.add_device(BDF, numa_node=node)
    assert pci.read_device(BDF, kernel=tree.kernel).numa_node == expected


@pytest.mark.parametrize("file", ["vendor", "device", "class"])
def test_a_device_without_ids_is_none(tree: SysfsTree, file: str) -> None:
    """As one that is removed while it is read."""
    (tree.add_device(BDF) / file).unlink()
    with pytest.raises(DeviceNotFoundError, match=f"there is no PCI device {BDF}"):
        pci.read_device(BDF, kernel=tree.kernel)
    assert pci.devices(kernel=tree.kernel) == ()


@pytest.mark.parametrize("wrong", [7, None, b"00:02.0"])
def test_an_address_is_text(wrong: object) -> None:
    with pytest.raises(TypeError, match=f"a PCI address is text, .*, not {type(wrong).__name__}"):
        pci.parse_bdf(wrong)  # type: ignore[arg-type]


def test_a_token_is_a_uuid_or_its_text() -> None:
    """An error shows one."""
    token = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")
    assert pci.parse_vf_token(token) is token
    assert pci.parse_vf_token(str(token)) == token
    with pytest.raises(ValueError, match="a VF token is a UUID such as 00000000-0000-0000-0000-000000000000, not 'x'"):
        pci.parse_vf_token("x")
    with pytest.raises(TypeError, match=r"a VF token is a uuid\.UUID or its text, not int"):
        pci.parse_vf_token(7)  # type: ignore[arg-type]


def test_a_missing_device_names_those_beside_or_the_nearest(tree: SysfsTree) -> None:
    for bdf in ("0000:01:00.1", "0000:01:00.0", "0000:02:00.0", "0000:03:00.0", "0000:41:00.0"):
        tree.add_device(bdf)
    with pytest.raises(DeviceNotFoundError) as caught:
        pci.read_device("01:00.7", kernel=tree.kernel)
    assert caught.value.hint == "Bus 0000:01 has 0000:01:00.0, 0000:01:00.1; pyvfio list shows all devices"
    with pytest.raises(DeviceNotFoundError) as caught:
        pci.read_device("40:00.0", kernel=tree.kernel)
    hint = caught.value.hint
    assert hint.startswith("There is no bus 0000:40; the nearest devices are 0000:4")
    assert hint.count("0000:") == 4
    assert hint.endswith("; pyvfio list shows all devices")


def test_a_physical_function_is_named_by_an_address(tree: SysfsTree) -> None:
    """A link to another name is an error that tells both."""
    directory = tree.add_device(BDF)
    assert pci.physical_function(BDF, kernel=tree.kernel) is None
    link(directory / "physfn", tree.sysfs / "devices/odd")
    with pytest.raises(VfioError, match="physfn names 'odd', which is not a PCI address"):
        pci.physical_function(BDF, kernel=tree.kernel)


# --- Surroundings


@pytest.mark.parametrize(
    ("process", "expected"),
    [
        ({}, Surroundings(user=0, groups=(0, 27))),
        ({"user": 33}, Surroundings(user=33, groups=(27, 33))),
        ({"cgroup": "0::/system.slice/a.service"}, Surroundings(groups=(0, 27), service="a.service")),
        ({"cgroup": "1:x:/a.service\n0::/b.service/c"}, Surroundings(groups=(0, 27), service="b.service")),
        ({"cgroup": "0::/a.services"}, Surroundings(groups=(0, 27))),
        ({"cgroup": "0::/machine.slice/x.scope"}, Surroundings(groups=(0, 27), container=True)),
        ({"cgroup": "0::/lxc/1"}, Surroundings(groups=(0, 27), container=True)),
        ({"environ": "container=lxc\0A=b\0"}, Surroundings(groups=(0, 27), container=True)),
        ({"environ": "A=b\0MY_container=lxc\0"}, Surroundings(groups=(0, 27))),
        ({"uid_map": "0 100000 65536"}, Surroundings(groups=(0, 27), user_namespace=True)),
        ({"uid_map": " 0   0 4294967295"}, Surroundings(groups=(0, 27))),
    ],
)
def test_surroundings_are_told_by_small_files(
    tree: SysfsTree, process: dict[str, object], expected: Surroundings
) -> None:
    """The effective user is the second of four; the last service is the innermost."""
    place_process(tree.proc, **process)  # type: ignore[arg-type]
    assert look_around(tree.kernel) == expected
    assert expected.root == (expected.user == 0)


@pytest.mark.parametrize("line", ["Uid:\tx\t1\t1\t1\n", "Uid:\t7\n", "Uid:\n", "XUid:\t7\t7\t7\t7\n", ""])
def test_a_status_without_users_is_of_the_user_of_this_process(tree: SysfsTree, line: str) -> None:
    """A status with less than two numbers does not say the effective user."""
    place_process(tree.proc)
    (tree.proc / "self/status").write_text(line)
    assert look_around(tree.kernel) == Surroundings(user=os.geteuid())


@pytest.mark.parametrize("mark", [".dockerenv", "run/.containerenv", "run/systemd/container"])
def test_a_container_is_known_by_a_file_of_its_runtime(tmp_path: Path, mark: str) -> None:
    place_process(tmp_path)
    assert not look_around(LinuxKernel(proc=tmp_path)).container
    place = tmp_path / "self/root" / mark
    place.parent.mkdir(parents=True, exist_ok=True)
    place.touch()
    assert look_around(LinuxKernel(proc=tmp_path)).container


@pytest.mark.parametrize(
    ("process", "hint"),
    [
        ({}, ""),
        ({"user": 1000}, ", as root"),
        ({"container": True}, ", on the host, then start the container with --device {}"),
        ({"user": 1000, "container": True}, ", on the host, then start the container with --device {}"),
    ],
)
def test_a_kernel_without_vfio_is_told_with_the_modules(tree: SysfsTree, process: dict[str, object], hint: str) -> None:
    """And who loads them, where."""
    place_process(tree.proc, **process)  # type: ignore[arg-type]
    node = tree.dev / "vfio/vfio"
    error = explain_container(tree.kernel, node, OSError(errno.ENOENT, "no"))
    assert isinstance(error, UnavailableError)
    assert error.message == f"there is no {node}: the kernel has no VFIO, or the module is not loaded"
    assert error.hint == "modprobe -a vfio-pci vfio_iommu_type1" + hint.format(node)


# --- Nodes


@pytest.mark.parametrize(
    ("node", "place"),
    [
        ("vfio/vfio", "class/misc/vfio"),
        ("iommu", "class/misc/iommu"),
        ("vfio/7", "class/vfio/7"),
        ("vfio/noiommu-7", "class/vfio/noiommu-7"),
        ("vfio/devices/vfio0", "class/vfio-dev/vfio0"),
    ],
)
def test_a_node_is_made_by_the_number_that_sysfs_has(tree: SysfsTree, node: str, place: str) -> None:
    """No command without a number."""
    path = tree.dev / node
    assert place_in_sysfs(path) == place
    assert mknod_command(tree.kernel, path) == ""
    put(tree, f"sys/{place}/dev", "243:5\n")
    assert mknod_command(tree.kernel, path) == f"mknod {path} c 243 5"
    put(tree, "sys/class/other/dev", "10:6\n")
    assert mknod_command(tree.kernel, path, "class/other") == f"mknod {path} c 10 6"
    put(tree, "sys/class/other/dev", "10:6; reboot\n")
    assert mknod_command(tree.kernel, path, "class/other") == ""


@pytest.mark.parametrize(
    ("node", "container", "hint"),
    [
        ("vfio/vfio", False, 'write a udev rule: SUBSYSTEM=="misc", KERNEL=="vfio", MODE="0666"'),
        ("vfio/7", False, "give the node to the user: pyvfio bind --user 7 0000:00:02.0 (with --persist at each boot"),
        ("vfio/7", True, "Start the container with a user or group that has access: --user, --group-add"),
    ],
)
def test_a_user_without_rights_is_told_the_mode_and_the_way_to_rights(
    tree: SysfsTree, node: str, hint: str, *, container: bool
) -> None:
    """The mode is unknown where the node cannot be looked at."""
    here = Surroundings(user=7, groups=(8, 9), container=container)
    path = tree.dev / node
    for mode in ("The mode is unknown", f"The mode is -rw-r-----, owner {os.getuid()}:{os.getgid()}"):
        error = explain_open(path, OSError(errno.EACCES, "no"), here, BDF)
        assert isinstance(error, AccessDeniedError)
        assert error.hint.startswith(f"{mode}; this is user 7 with groups [8, 9]. ")
        assert hint in error.hint
        path.touch(0o640)
        path.chmod(0o640)


OUTSIDE = "or open the node outside and pass the descriptor in ({}.from_fd)"


@pytest.mark.parametrize(
    ("here", "node", "hint"),
    [
        (Surroundings(user_namespace=True), "vfio/vfio", OUTSIDE.format("Container")),
        (Surroundings(user_namespace=True), "iommu", OUTSIDE.format("Iommufd")),
        (Surroundings(user_namespace=True), "vfio/7", OUTSIDE.format("Group")),
        (Surroundings(user_namespace=True), "vfio/devices/vfio0", OUTSIDE.format("Device")),
        (Surroundings(), "vfio/7", "; a mount with nodev (see findmnt) or a security module (SELinux, AppArmor; see "),
        (Surroundings(container=True), "vfio/7", "; a mount with nodev (see findmnt) or a security module (SELinux, "),
        (Surroundings(user=7, user_namespace=True), "vfio/7", "; this is user 7 with groups []. Run as root, or give"),
    ],
)
def test_root_without_rights_is_told_what_refuses_root(
    tree: SysfsTree, here: Surroundings, node: str, hint: str
) -> None:
    """Root of a user namespace has none outside, and gets the open descriptor of the node's kind."""
    error = explain_open(tree.dev / node, OSError(errno.EACCES, "no"), here, BDF)
    assert (type(error), hint in error.hint) == (AccessDeniedError, True), error.hint
    assert ("this is root of a user namespace" in error.hint) == ("from_fd" in hint)


@pytest.mark.parametrize(
    ("here", "node", "hint"),
    [
        (Surroundings(), "vfio/noiommu-7", "A device without an IOMMU can access all memory: opening the group "),
        (Surroundings(container=True), "vfio/noiommu-7", "A device without an IOMMU can access all memory"),
        (Surroundings(container=True, service="a.service"), "vfio/7", "The container's device cgroup denies access"),
        (Surroundings(service="a.service"), "vfio/7", "The device cgroup of a.service denies access to every user: "),
        (Surroundings(), "vfio/7", "A device cgroup denies access to every user: a systemd service needs DeviceAllow="),
    ],
)
def test_what_refuses_every_user_is_told_by_the_surroundings(
    tree: SysfsTree, here: Surroundings, node: str, hint: str
) -> None:
    """EPERM, with the node that is to be allowed."""
    path = tree.dev / node
    error = explain_open(path, OSError(errno.EPERM, "no"), here, BDF)
    assert isinstance(error, AccessDeniedError)
    assert error.hint.startswith(hint)
    assert str(path) in error.hint or "CAP_SYS_RAWIO" in error.hint


@pytest.mark.parametrize(
    ("number", "place", "error", "message"),
    [
        (errno.EACCES, "class/misc/vfio", AccessDeniedError, ""),
        (errno.ENOENT, "class/misc/vfio", UnavailableError, ", although the kernel has VFIO containers: "),
        (errno.ENOENT, "class/misc/iommu", UnavailableError, ": this kernel has {}/iommu (iommufd), and no VFIO con"),
        (errno.ENODEV, "class/misc", UnavailableError, ": the kernel has no VFIO, or the module is not loaded"),
    ],
)
def test_a_container_that_does_not_open_is_explained_by_what_the_kernel_has(
    tree: SysfsTree, number: int, place: str, error: type[VfioError], message: str
) -> None:
    (tree.sysfs / place).mkdir(parents=True)
    path = tree.dev / "vfio/vfio"
    found = explain_container(tree.kernel, path, OSError(number, "no"))
    assert type(found) is error
    assert not message or found.message.startswith(f"there is no {path}{message.format(tree.dev)}")


def test_a_device_without_an_iommu_is_known_by_the_names_of_its_nodes(tree: SysfsTree) -> None:
    """Its own, or that of its group."""
    tree.add_device(BDF, driver="vfio-pci", group=7)
    device = pci.read_device(BDF, kernel=tree.kernel)
    assert not is_unprotected(tree.kernel, device)
    assert not is_unprotected(tree.kernel, replace(device, cdev="vfio0"))
    assert not is_unprotected(tree.kernel, replace(device, iommu_group=None))
    assert is_unprotected(tree.kernel, replace(device, cdev="noiommu-vfio0", iommu_group=None))
    put(tree, "sys/kernel/iommu_groups/7/name", "vfio-noiommu\n")
    assert is_unprotected(tree.kernel, device)


@pytest.mark.parametrize(
    ("change", "error", "message", "hint"),
    [
        ({}, UnsupportedError, "has an IOMMU, so the device cannot be opened without one", "Leave iommu= out"),
        ({"driver": None, "is_vfio": False}, UnsupportedError, "has an IOMMU", "Leave iommu= out"),
        ({"iommu_group": None}, UnsupportedError, "has an IOMMU", "Leave iommu= out"),
        (
            {"driver": None, "is_vfio": False, "iommu_group": None},
            NotBoundError,
            "is bound to no driver, not to vfio-pci",
            f"pyvfio bind {BDF}",
        ),
        (
            {"driver": "a\x1bb", "is_vfio": False, "iommu_group": None},
            NotBoundError,
            r"is bound to a\x1bb, not to vfio-pci",
            f"pyvfio bind {BDF}",
        ),
    ],
)
def test_a_device_that_is_not_without_an_iommu_is_told_why(
    tree: SysfsTree, change: dict[str, object], error: type[VfioError], message: str, hint: str
) -> None:
    """A group, or a driver of VFIO, tells of an IOMMU. With neither, and the mode on, the device is not bound yet."""
    tree.add_device(BDF, driver="vfio-pci", group=7)
    put(tree, f"sys/{PARAMETER}", "Y\n")
    device = replace(pci.read_device(BDF, kernel=tree.kernel), **change)  # type: ignore[arg-type]
    found = not_unprotected(tree.kernel, device)
    assert type(found) is error
    assert found.message.startswith(f"{BDF} {message}")
    assert found.hint.startswith(hint)
    assert getattr(found, "driver", device.driver) == device.driver


@pytest.mark.parametrize(
    ("process", "where"),
    [
        ({}, ""),
        ({"user": 1000}, ", as root"),
        ({"container": True}, ", on the host"),
        ({"container": True, "user": 1000}, ", on the host"),
    ],
)
def test_the_mode_without_an_iommu_is_turned_on_by_whom_it_may_be(
    tree: SysfsTree, process: dict[str, object], where: str
) -> None:
    tree.add_device(BDF, driver="e1000e")
    put(tree, f"sys/{PARAMETER}", "N\n")
    place_process(tree.proc, **process)  # type: ignore[arg-type]
    found = not_unprotected(tree.kernel, pci.read_device(BDF, kernel=tree.kernel))
    assert isinstance(found, UnavailableError)
    assert found.message == f"{BDF} cannot be opened without an IOMMU: no-IOMMU mode is off"
    assert found.hint.startswith("An IOMMU is better: pyvfio doctor says how to enable one. To accept that the device")
    assert found.hint.endswith(f": echo 1 >{tree.sysfs / PARAMETER}{where}, then pyvfio bind {BDF}")


@pytest.mark.parametrize(
    ("drivers", "files", "message", "hint"),
    [
        (
            ["e1000e", None],
            [],
            ": no device of IOMMU group 7 is bound to a VFIO driver",
            f"Bind a device of the group to vfio-pci: pyvfio bind {BDF} {OTHER}",
        ),
        (
            ["e1000e", "vfio-pci"],
            [],
            f", although {OTHER} of IOMMU group 7 is bound to vfio-pci: {{dev}} lacks nodes of this machine",
            "Run where the machine's own /dev (devtmpfs) is mounted",
        ),
        (
            ["vfio-pci", "vfio-pci"],
            ["vfio-dev/vfio3/dev", "class/vfio/7/dev"],
            f", although {BDF} of IOMMU group 7 is bound to vfio-pci: {{dev}} lacks nodes of this machine",
            "Run where the machine's own /dev (devtmpfs) is mounted; or make the node: mknod {path} c 240:5",
        ),
        (
            ["vfio-pci", "vfio-pci"],
            ["vfio-dev/vfio3/dev"],
            ": this kernel has {dev}/vfio/devices/vfio3 for the device, and no nodes of groups",
            'Open the device by that node: open_device(..., iommu="iommufd"). Or boot a kernel with CONFIG_VFIO_GROUP',
        ),
    ],
)
def test_a_missing_node_of_a_group_is_explained_by_the_drivers_of_its_devices(
    tree: SysfsTree, drivers: list[str | None], files: list[str], message: str, hint: str
) -> None:
    place_process(tree.proc)
    for bdf, driver in zip((BDF, OTHER), drivers, strict=True):
        tree.add_device(bdf, driver=driver, group=7)
    for file in files:
        put(tree, f"sys/{file}" if file.startswith("class") else f"sys/bus/pci/devices/{OTHER}/{file}", "240:5\n")
    path = tree.dev / "vfio/7"
    found = explain_group(tree.kernel, 7, path, OSError(errno.ENOENT, "no"))
    assert type(found) is (UnavailableError if "vfio-pci" in drivers else NotBoundError)
    assert found.message == f"there is no {path}{message.format(dev=tree.dev)}"
    assert found.hint == hint.format(path=path).replace("240:5", "240 5")
