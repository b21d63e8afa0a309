"""What `pyvfio.doctor` says of the kernel's options, the IOMMU, interrupt remapping and the modules."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

import pyvfio
from pyvfio.findings import Command, Finding
from pyvfio.kernel import Kernel
from tests.unit import machines
from tests.unit.fakes import BDF, PlacedKernel
from tests.unit.machines import NIC, RELEASE, MachineTree, texts, told
from tests.unit.sysfs import place_process

CONFIG = f"boot/config-{RELEASE}"
ALL = "CONFIG_VFIO=m\nCONFIG_VFIO_PCI=m\nCONFIG_VFIO_GROUP=y\nCONFIG_VFIO_IOMMU_TYPE1=m\nCONFIG_VFIO_CONTAINER=y\n"
RISK = "Accept the risk until the next boot"


def of_check(kernel: Kernel, check: str, *, iommu: str | None = None) -> list[Finding]:
    """The findings of a check of the machine."""
    return [found for found in pyvfio.doctor(kernel=kernel, iommu=iommu) if found.check == check]


def takes_off(found: Finding, word: str) -> bool:
    """Whether the commands take a word off the command line, and add none."""
    change, remake = texts([found])
    return change.startswith("sed -i -E ") and word.replace(".", "\\.") in change and remake == "update-grub"


def unset(*names: str) -> str:
    """Lines of a configuration."""
    return "".join(f"# CONFIG_{name} is not set\n" for name in names)


# --- Options


@pytest.mark.parametrize(
    ("config", "iommu", "missing"),
    [
        (ALL, None, []),
        (unset("VFIO"), None, ["VFIO"]),
        (unset("VFIO_PCI"), None, ["VFIO_PCI"]),
        (ALL.replace("CONFIG_VFIO_GROUP=y\n", unset("VFIO_GROUP")), None, ["VFIO_GROUP"]),
        (unset("VFIO_IOMMU_TYPE1"), None, ["VFIO_IOMMU_TYPE1"]),
        (unset("VFIO_CONTAINER"), None, ["VFIO_CONTAINER"]),
        (unset("VFIO_CONTAINER") + "CONFIG_IOMMUFD_VFIO_CONTAINER=y\n", None, []),
        (unset("VFIO_CONTAINER", "IOMMUFD_VFIO_CONTAINER"), None, ["VFIO_CONTAINER"]),
        (unset("IOMMUFD", "VFIO_DEVICE_CDEV"), None, []),
        (ALL, "iommufd", ["IOMMUFD", "VFIO_DEVICE_CDEV"]),
        (ALL + "CONFIG_IOMMUFD=m\n", "iommufd", ["VFIO_DEVICE_CDEV"]),
        ("CONFIG_IOMMUFD=m\nCONFIG_VFIO_DEVICE_CDEV=y\n" + unset("VFIO_GROUP", "VFIO_CONTAINER"), "iommufd", []),
        ("CONFIG_IOMMUFD=m\nCONFIG_VFIO_DEVICE_CDEV=y\n" + unset("VFIO_PCI"), "iommufd", ["VFIO_PCI"]),
        ("CONFIG_IOMMUFD=m\nCONFIG_VFIO_DEVICE_CDEV=y\n" + unset("VFIO_PCI"), None, ["VFIO_PCI"]),
        ("", "iommufd", []),
        ("", None, []),
    ],
)
def test_an_option_that_the_program_needs_and_the_kernel_lacks_is_an_obstacle(
    tree: MachineTree, config: str, iommu: str | None, missing: list[str]
) -> None:
    """For type1 those of groups and containers, for iommufd others. Nothing is held against an unknown kernel."""
    tree.file(CONFIG, config)
    found = of_check(tree.kernel, "kernel", iommu=iommu)
    if missing:
        assert told(found) == [("wrong", f"Linux {RELEASE} is built without CONFIG_{name}") for name in missing]
        assert all(each.reboot and each.why.startswith("pyvfio needs ") and each.by_hand for each in found)
    else:
        known = "with the options that pyvfio needs" if config else "whose options cannot be read here"
        assert told(found) == [("ok", f"Linux {RELEASE}, {known}")]


@pytest.mark.parametrize("absent", ["VFIO_GROUP", "VFIO_CONTAINER", "VFIO_IOMMU_TYPE1"])
@pytest.mark.parametrize(
    ("config", "iommufd"),
    [
        ("CONFIG_IOMMUFD=m\nCONFIG_VFIO_DEVICE_CDEV=y\n", True),
        ("CONFIG_IOMMUFD=m\n", False),
        ("CONFIG_VFIO_DEVICE_CDEV=y\n", False),
    ],
)
def test_a_kernel_without_a_part_of_type1_is_judged_for_iommufd_if_it_has_that(
    tree: MachineTree, absent: str, config: str, *, iommufd: bool
) -> None:
    """All parts, as VFIO_DEVICE_CDEV needs IOMMUFD; each part of type1 is needed, too."""
    tree.file(CONFIG, config + unset(absent))
    found = of_check(tree.kernel, "kernel")
    assert [each.status for each in found] == ["ok" if iommufd else "wrong"]
    assert iommufd or absent in found[0].summary


@pytest.mark.parametrize(
    ("config", "iommufd"),
    [
        (ALL, False),
        (unset("VFIO_CONTAINER") + "CONFIG_IOMMUFD_VFIO_CONTAINER=y\n", False),
        (unset("VFIO_CONTAINER") + "CONFIG_IOMMUFD_VFIO_CONTAINER=m\n", True),
        (unset("VFIO_CONTAINER", "IOMMUFD_VFIO_CONTAINER"), True),
        (unset("VFIO_IOMMU_TYPE1"), True),
    ],
)
def test_a_kernel_that_has_type1_and_iommufd_is_judged_for_type1(
    tree: MachineTree, config: str, *, iommufd: bool
) -> None:
    """As `open_device` takes it. The containers can be those of iommufd, which is built in then."""
    tree.file(CONFIG, config + "CONFIG_IOMMUFD=m\nCONFIG_VFIO_DEVICE_CDEV=y\n")
    (found,) = of_check(tree.kernel, "modules")
    assert found.summary.endswith("are not loaded") or "has no module" in found.summary
    assert ("vfio_iommu_type1" in found.summary, "iommufd" in found.summary) == (not iommufd, iommufd)


@pytest.mark.parametrize("here", ["class/misc/vfio", "class/vfio"])
def test_a_kernel_whose_options_are_unknown_has_no_type1_if_vfio_made_nothing_of_it(
    tree: MachineTree, here: str
) -> None:
    """Neither the node of containers nor the class of groups, though VFIO is loaded, and iommufd is there."""
    (tree.sysfs / "module/vfio").mkdir(parents=True)
    modules = of_check(tree.kernel, "modules")
    assert "vfio_iommu_type1" in modules[0].summary
    tree.add_iommufd()
    assert "vfio_iommu_type1" not in of_check(tree.kernel, "modules")[0].summary
    (tree.sysfs / here).mkdir(parents=True)
    assert "vfio_iommu_type1" in of_check(tree.kernel, "modules")[0].summary
    (tree.sysfs / here).rmdir()
    (tree.sysfs / "module/vfio").rmdir()
    assert "vfio_iommu_type1" in of_check(tree.kernel, "modules")[0].summary


def test_options_whose_effect_is_seen_are_there(tree: MachineTree) -> None:
    """Modules can be built for a kernel that was built without them."""
    machines.virtual_function(tree)
    tree.file(CONFIG, unset("VFIO", "VFIO_IOMMU_TYPE1", "VFIO_CONTAINER"))
    assert [each.status for each in of_check(tree.machine, "kernel")] == ["ok"]
    tree.file(CONFIG, unset("VFIO_GROUP"))
    assert [each.status for each in of_check(tree.machine, "kernel")] == ["wrong"]


def test_an_unknown_release_is_said_to_be_unknown(tree: MachineTree) -> None:
    (tree.proc / "sys/kernel/osrelease").unlink()
    assert told(of_check(tree.kernel, "kernel")) == [
        ("ok", "Linux (of unknown release), whose options cannot be read here")
    ]


# --- IOMMU


def test_the_iommus_in_use_are_told_with_the_number_of_groups(tree: MachineTree) -> None:
    machines.acs_trouble(tree)
    said = "the kernel uses dmar0, dmar1 and has made"
    assert told(of_check(tree.machine, "iommu")) == [("ok", f"{said} 1 group")]
    (tree.sysfs / "kernel/iommu_groups/8").mkdir()
    assert told(of_check(tree.machine, "iommu")) == [("ok", f"{said} 2 groups")]


DRACUT = [
    "printf '%s\\n' 'force_drivers+=\" virtio_iommu \"' > /etc/dracut.conf.d/pyvfio.conf",
    "dracut --force",
]
INITRAMFS = [
    "grep -qx virtio_iommu /etc/initramfs-tools/modules || printf '%s\\n' virtio_iommu >> /etc/initramfs-tools/modules",
    "update-initramfs -u",
]


@pytest.mark.parametrize(
    ("files", "container", "expected"),
    [
        (["etc/initramfs-tools/modules", "usr/sbin/update-initramfs"], False, INITRAMFS),
        (["etc/initramfs-tools/modules", "usr/sbin/update-initramfs"], True, []),
        (["etc/initramfs-tools/modules"], False, []),
        (["usr/sbin/update-initramfs"], False, []),
        (["etc/dracut.conf.d/.keep", "usr/bin/dracut"], False, DRACUT),
        (["etc/dracut.conf.d/.keep"], False, []),
        (["usr/bin/dracut"], False, []),
        ([], False, []),
    ],
)
def test_a_driver_that_comes_too_late_is_put_into_the_initramfs(
    tree: MachineTree, files: list[str], expected: list[str], *, container: bool
) -> None:
    """By the tools of the distribution, outside of a container, and with the reason."""
    tree.tables("VIOT")
    place_process(tree.proc, container=container)
    for file in files:
        tree.file(file, "")
    (found,) = of_check(tree.kernel, "iommu")
    assert texts([found]) == expected
    assert [each.comment for each in found.commands[:1]] == (
        ["virtio_iommu has to be loaded before the devices are found"] if expected else []
    )
    assert found.reboot
    assert found.by_hand


# --- Interrupts


@pytest.mark.parametrize(
    ("names", "remapped"),
    [
        ("IR-PCI-MSI", True),
        ("IR-IO-APIC", True),
        ("ir-pci-msix", True),
        ("ITS-MSI", True),
        ("ITS-pMSI", True),
        ("ITS-PCI-MSI", True),
        ("IO-APIC", False),
        ("PCI-MSI", False),
        ("PCI-MSIX", False),
        ("GICv3", None),
        ("", None),
    ],
)
@pytest.mark.parametrize("allowed", ["N", "Y", "1", "0"])
def test_interrupts_are_judged_by_the_names_of_their_controllers(
    tree: MachineTree, names: str, *, remapped: bool | None, allowed: str
) -> None:
    """And by the parameter that accepts them as they are. Without a name that says so, nothing is held against it."""
    machines.forgeable(tree)
    tree.put("proc/interrupts", f" 24:   7   {names} 1-edge\n")
    tree.put("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", f"{allowed}\n")
    (found,) = of_check(tree.machine, "interrupts")
    if remapped:
        assert told([found]) == [("ok", "interrupts are remapped")]
    elif remapped is None:
        assert told([found]) == [("ok", "/proc/interrupts does not say whether interrupts are remapped")]
    elif allowed in {"Y", "1"}:
        assert told([found]) == [
            (
                "note",
                "interrupts are not remapped, and vfio_iommu_type1 was told to accept that (allow_unsafe_interrupts)",
            )
        ]
    else:
        assert told([found]) == [("wrong", "interrupts are not remapped, so VFIO refuses every group")]
        assert [each.comment for each in found.commands] == [RISK, "and from the next boot on"]
        assert found.by_hand.endswith(". Or accept the risk")


@pytest.mark.parametrize(("allowed", "status"), [("N", "ok"), ("Y", "note")])
def test_a_group_that_a_container_took_decides_where_the_names_do_not(
    tmp_path: Path, allowed: str, status: str
) -> None:
    """The kernel refuses a group for its interrupts, unless the parameter accepts them."""
    place_process(tmp_path)
    (tmp_path / "interrupts").write_text(machines.PLAIN)
    with PlacedKernel() as kernel:
        kernel.own_proc = tmp_path
        place = kernel.sysfs / "module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"{allowed}\n")
        (found,) = [each for each in pyvfio.doctor(BDF, kernel=kernel) if each.check == "interrupts"]
        assert found.status == status
        (tmp_path / "interrupts").write_text("")
        (found,) = [each for each in pyvfio.doctor(BDF, kernel=kernel) if each.check == "interrupts"]
        assert found.status == status


def test_a_refusal_that_is_none_of_interrupts_is_told_as_the_kernel_said_it(tree: MachineTree) -> None:
    """Where interrupts are remapped, or were accepted."""
    machines.forgeable(tree)
    error = pyvfio.IoctlError(errno.EPERM, "no", request="VFIO_SET_IOMMU", arguments={})
    other = pyvfio.IoctlError(errno.EINVAL, "no", request="VFIO_SET_IOMMU", arguments={})
    (found,) = error.explain(kernel=tree.machine)
    assert found.summary == "interrupts are not remapped, so VFIO refuses every group"
    tree.put("proc/interrupts", "")
    (found,) = error.explain(kernel=tree.machine)
    assert found.summary == "interrupts are not remapped, so VFIO refuses every group"
    assert other.explain(kernel=tree.machine) == ()
    tree.put("proc/interrupts", machines.REMAPPED)
    (found,) = error.explain(kernel=tree.machine)
    assert (found.check, found.status) == ("interrupts", "wrong")
    assert "VFIO_SET_IOMMU" in found.summary
    assert found.commands == ()
    tree.put("proc/interrupts", machines.PLAIN)
    tree.put("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y\n")
    (found,) = error.explain(kernel=tree.machine)
    assert "VFIO_SET_IOMMU" in found.summary


@pytest.mark.parametrize(
    "word", ["nointremap", "intremap=off", "intremap=nosid,off", "intremap=off,nosid", "noapic", "nolapic", "nox2apic"]
)
def test_a_word_against_remapping_is_taken_off_the_command_line(tree: MachineTree, word: str) -> None:
    """With the reason, and a boot. In a container the host's."""
    machines.forgeable(tree)
    tree.cmdline(f"intremap=on noapictimer {word} x{word}")
    (found,) = of_check(tree.machine, "interrupts")
    assert found.summary.endswith(f": the kernel was told so ({word})")
    assert found.remove_arguments == (word,)
    assert found.add_arguments == ()
    assert takes_off(found, word)
    assert found.why.startswith("Without remapping")
    assert found.reboot


def test_interrupts_of_a_container_are_accepted_on_its_host(tree: MachineTree) -> None:
    machines.forgeable(tree)
    place_process(tree.proc, container=True)
    (found,) = of_check(tree.machine, "interrupts")
    assert (found.status, found.commands) == ("wrong", ())
    assert found.by_hand.endswith(", or on the host allow allow_unsafe_interrupts")
    assert found.why.startswith("Without remapping")


# --- Modules


@pytest.mark.parametrize(
    ("loaded", "iommu", "absent"),
    [
        (["vfio", "vfio_pci", "vfio_iommu_type1"], None, None),
        (["vfio_pci", "vfio_iommu_type1"], None, None),
        (["vfio", "vfio_pci"], None, "vfio_iommu_type1 is"),
        (["vfio", "vfio_iommu_type1"], None, "vfio-pci is"),
        (["vfio"], None, "vfio-pci, vfio_iommu_type1 are"),
        ([], None, "vfio-pci, vfio_iommu_type1 are"),
        (["vfio", "vfio_pci"], "iommufd", "iommufd is"),
        (["vfio_pci", "iommufd"], "iommufd", None),
    ],
)
@pytest.mark.parametrize("container", [False, True])
def test_modules_that_are_not_loaded_are_named(
    tree: MachineTree, loaded: list[str], iommu: str | None, *, absent: str | None, container: bool
) -> None:
    """A vfio that is built in shows nothing in sysfs, and comes with the others. A container has its host's."""
    place_process(tree.proc, container=container)
    lines = [*machines.DRIVERS, "iommufd.ko.zst"]
    tree.file(f"lib/modules/{RELEASE}/modules.dep", "".join(f"kernel/drivers/{line}:\n" for line in lines))
    for name in loaded:
        (tree.sysfs / "module" / name).mkdir(parents=True)
    (found,) = of_check(tree.kernel, "modules", iommu=iommu)
    if absent is None:
        needed = "vfio, vfio-pci, " + ("vfio_iommu_type1" if iommu is None else iommu)
        assert told([found]) == [("ok", f"the kernel has {needed}")]
        return
    assert told([found]) == [("wrong", f"{absent} not loaded")]
    names = absent.rpartition(" ")[0].replace(",", "")
    if container:
        assert found.commands == ()
        assert found.by_hand == f"On the host: modprobe -a {names}; then start the container again"
    else:
        assert found.commands == (
            Command(f"modprobe -a {names}"),
            Command(f"printf '%s\\n' {names} > /etc/modules-load.d/pyvfio.conf", "and at each boot to come"),
        )
        (tree.root / "etc/modules-load.d/.keep").unlink()
        (tree.root / "etc/modules-load.d").rmdir()
        assert texts(of_check(tree.kernel, "modules", iommu=iommu)) == [f"modprobe -a {names}"]


def test_modules_whose_effect_is_seen_are_there(tree: MachineTree) -> None:
    """Built in, they show no directory: a container can be opened, or iommufd has a class. The others are not there."""
    tree.put("sys/class/misc/vfio/dev", "10:196\n")
    tree.add_node()
    said = "vfio-pci is not loaded"
    assert told(of_check(tree.machine, "modules")) == [("wrong", said)]
    tree.add_iommufd()
    (tree.sysfs / "module/iommufd").rename(tree.sysfs / "module/other")
    assert told(of_check(tree.machine, "modules", iommu="iommufd")) == [("wrong", said)]
    tree.add_driver("vfio-pci")
    assert told(of_check(tree.machine, "modules")) == [("ok", "the kernel has vfio, vfio-pci, vfio_iommu_type1")]
    said = "the kernel has vfio, vfio-pci, iommufd"
    assert told(of_check(tree.machine, "modules", iommu="iommufd")) == [("ok", said)]
    (tree.sysfs / "class/misc/iommu/dev").unlink()
    (tree.sysfs / "class/misc/iommu").rmdir()
    assert told(of_check(tree.machine, "modules", iommu="iommufd")) == [
        ("wrong", f"kernel {RELEASE} has no module iommufd")
    ]


@pytest.mark.parametrize(
    ("release", "install"),
    [
        ("ID=debian\n", f"apt-get install --reinstall linux-image-{RELEASE}"),
        ('ID=ubuntu\nID_LIKE="debian"\n', f"apt-get install linux-modules-extra-{RELEASE}"),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"\n', f"dnf install kernel-modules-{RELEASE}"),
        ('ID="opensuse-leap"\nID_LIKE="suse opensuse"\n', "zypper install --force kernel-default"),
        ("ID=void\n", None),
        ("", None),
    ],
)
def test_a_package_with_further_modules_is_installed(tree: MachineTree, release: str, install: str | None) -> None:
    """The distribution's, before they are loaded."""
    machines.small_cloud(tree)
    tree.file("etc/os-release", release)
    (found,) = of_check(tree.kernel, "modules")
    assert found.summary == f"kernel {RELEASE} has no module vfio, vfio-pci, vfio_iommu_type1"
    load = "modprobe -a vfio vfio-pci vfio_iommu_type1"
    assert texts([found]) == ([] if install is None else [install, load])
    assert bool(found.by_hand) == (install is None)
    assert not found.reboot


@pytest.mark.parametrize("others", [[], ["6.1.0", "6.12.9-amd64"]])
def test_modules_of_another_kernel_are_no_modules_of_this_one(tree: MachineTree, others: list[str]) -> None:
    """One that is installed is to be booted; if none is, its modules are to be installed."""
    tree.put("proc/sys/kernel/osrelease", "6.12.8-amd64\n")
    place = tree.root / "lib/modules"
    place.rename(tree.root / "former")
    for other in others:
        tree.file(f"lib/modules/{other}/modules.dep", "")
    (found,) = of_check(tree.kernel, "modules")
    known = "; there are those of 6.1.0, 6.12.9-amd64" if others else ""
    assert found.summary == f"the modules of the running kernel 6.12.8-amd64 are not installed{known}"
    assert found.why.startswith("vfio, vfio-pci, vfio_iommu_type1 cannot be loaded. ")
    assert found.reboot == bool(others)
    assert found.by_hand.startswith("For the next boot" if others else "Install the modules")
    assert found.commands == ()


@pytest.mark.parametrize(
    ("line", "keeps"),
    [
        ("install vfio-pci /bin/false", True),
        ("  install\tvfio_pci  /usr/bin/true ", True),
        ("install vfio_pci", True),
        ("install vfio_pci : # off", True),
        ("install vfio-pci /sbin/modprobe --ignore-install vfio-pci", False),
        ("install e1000e /bin/false", False),
        ("blacklist vfio-pci", False),
        ("remove vfio-pci /bin/false", False),
        ("# install vfio-pci /bin/false", False),
        ("install", False),
    ],
)
@pytest.mark.parametrize("directory", ["etc", "run", "usr/lib", "usr/local/lib", "lib"])
def test_a_line_that_diverts_a_module_is_commented_out(
    tree: MachineTree, line: str, directory: str, *, keeps: bool
) -> None:
    """In the file that has the line, before the module is loaded."""
    tree.file(f"{directory}/modprobe.d/a.conf", f"# first\n{line}\n")
    tree.file(f"{directory}/modprobe.d/a.txt", "install vfio-pci /bin/false\n")
    *kept, last = of_check(tree.kernel, "modules")
    assert last.summary == "vfio-pci, vfio_iommu_type1 are not loaded"
    assert len(kept) == keeps
    for found in kept:
        assert found.summary.startswith(f"/{directory}/modprobe.d/a.conf keeps {line.split()[1]} from being loaded: ")
        assert found.why.startswith("modprobe runs")
        assert texts(kept)[0].endswith(f"/{directory}/modprobe.d/a.conf")
        assert texts(kept)[0].startswith("sed -i -E ")
        assert not found.by_hand


@pytest.mark.parametrize("word", ["module_blacklist=vfio-pci", "module_blacklist=a,vfio_iommu_type1,b"])
def test_a_blacklist_of_the_command_line_counts_with_either_dash(tree: MachineTree, word: str) -> None:
    """The other lists concern modules that match a device."""
    tree.cmdline(f"modprobe.blacklist=vfio_pci module_blacklist=e1000e {word}")
    (found,) = of_check(tree.kernel, "modules")
    assert found.summary == f"the kernel was told not to load VFIO's modules ({word})"
    assert found.remove_arguments == (word,)
    assert takes_off(found, word)
    assert found.reboot


@pytest.mark.parametrize(
    ("disabled", "words", "setting"),
    [
        ("1", "", "kernel.modules_disabled is 1"),
        ("1", "nomodule", "kernel.modules_disabled is 1"),
        ("0", "nomodule", "the kernel was told so (nomodule)"),
    ],
)
def test_a_kernel_that_loads_no_modules_is_told_with_the_setting(
    tree: MachineTree, disabled: str, words: str, setting: str
) -> None:
    """And changed by a boot."""
    tree.put("proc/sys/kernel/modules_disabled", f"{disabled}\n")
    tree.cmdline(words)
    (found,) = of_check(tree.kernel, "modules")
    assert found.summary == f"VFIO's modules are not loaded, and this kernel loads no more modules: {setting}"
    assert found.reboot
    assert found.remove_arguments == tuple(words.split())
    assert takes_off(found, words) if words else not found.commands
    assert bool(found.by_hand) == (disabled == "1")


@pytest.mark.parametrize("make", [machines.in_container, machines.acs_trouble, machines.not_loaded])
def test_an_examination_for_type1_is_the_usual_one(tree: MachineTree, make: Callable[[MachineTree], None]) -> None:
    """Where the kernel has type1."""
    make(tree)
    assert tuple(pyvfio.doctor(NIC, kernel=tree.machine)) == tuple(
        pyvfio.doctor(NIC, kernel=tree.machine, iommu="type1")
    )
