"""The commands that change the kernel's command line, run by sh on files of each distribution."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import pyvfio
from tests.unit import machines
from tests.unit.machines import MachineTree
from tests.unit.sysfs import place_process

OFF = "intel_iommu=off,sm_on"
ON = "intel_iommu=on,sm_on"


@pytest.fixture
def tree(tmp_path: Path) -> MachineTree:
    """An Intel machine that was told not to use the IOMMU, without a boot loader."""
    tree = MachineTree(tmp_path)
    machines.intel_off(tree)
    (tree.root / "etc/default/grub").unlink()
    (tree.root / "usr/sbin/update-grub").unlink()
    return tree


def program(tree: MachineTree, name: str) -> None:
    """A program that writes its arguments into the file `ran`."""
    tree.file(f"usr/bin/{name}", f'#!/bin/sh\nprintf "%s\\n" "{name} $*" >>{tree.root}/ran\n')
    (tree.root / f"usr/bin/{name}").chmod(0o755)


def commands_of(tree: MachineTree) -> list[str]:
    """Run the commands on the files of the tree, and return the programs that they ran. Run again, they change nothing
    more."""
    (found,) = [finding for finding in pyvfio.doctor(kernel=tree.kernel) if finding.check == "iommu"]
    text = "set -eu\n" + "\n".join(command.text for command in found.commands)
    for place in ("/etc/", "/boot/"):
        text = text.replace(f" {place}", f" {tree.root}{place}")
    environment = {"PATH": f"{tree.root}/usr/bin:{os.environ['PATH']}"}
    subprocess.run(["sh", "-c", text], env=environment, check=True)
    ran = (tree.root / "ran").read_text().splitlines()
    (tree.root / "ran").unlink()
    once = contents(tree)
    subprocess.run(["sh", "-c", text], env=environment, check=True)
    (tree.root / "ran").unlink(missing_ok=True)
    assert contents(tree) == once
    assert found.reboot
    return ran


def contents(tree: MachineTree) -> dict[Path, bytes]:
    """All files of the distribution."""
    return {place: place.read_bytes() for place in tree.root.rglob("*") if place.is_file()}


def words(tree: MachineTree, name: str, variable: str = "") -> list[str]:
    """The words of a file's first line, or of a variable in a file that the shell reads."""
    if not variable:
        return (tree.root / name).read_text().split("\n")[0].split()
    done = subprocess.run(["sh", "-c", f". {tree.root}/{name}; echo ${variable}"], capture_output=True, check=True)
    return done.stdout.decode().split()


@pytest.mark.parametrize("quote", ['"', "'"])
@pytest.mark.parametrize(
    ("tool", "ran"),
    [
        ("update-grub", "update-grub "),
        ("grub2-mkconfig", "grub2-mkconfig -o {}/boot/grub2/grub.cfg"),
        ("grub-mkconfig", "grub-mkconfig -o {}/boot/grub/grub.cfg"),
    ],
)
def test_grub_gets_the_words_once_and_loses_them_wherever_they_stand(
    tree: MachineTree, tool: str, ran: str, quote: str
) -> None:
    """Also twice in a row, at the beginning and at the end; other words and variables stay."""
    line = f"{OFF} {OFF} quiet x{OFF} {OFF}y splash {OFF}"
    tree.file("etc/default/grub", f"OTHER={quote}{OFF}{quote}\nGRUB_CMDLINE_LINUX={quote}{line}{quote}\n")
    tree.file("etc/default/grub.d/50-cloud.cfg", f'GRUB_CMDLINE_LINUX_DEFAULT="console=ttyS0 {OFF}"\n')
    program(tree, tool)
    assert commands_of(tree) == [ran.format(tree.root)]
    assert words(tree, "etc/default/grub", "GRUB_CMDLINE_LINUX") == ["quiet", f"x{OFF}", f"{OFF}y", "splash", ON]
    assert words(tree, "etc/default/grub.d/50-cloud.cfg", "GRUB_CMDLINE_LINUX_DEFAULT") == ["console=ttyS0"]
    assert words(tree, "etc/default/grub", "OTHER") == [OFF]


@pytest.mark.parametrize(
    ("tool", "ran"),
    [
        ("kernel-install", f"kernel-install add {machines.RELEASE} /lib/modules/{machines.RELEASE}/vmlinuz"),
        ("proxmox-boot-tool", "proxmox-boot-tool refresh"),
    ],
)
def test_systemd_boot_has_its_command_line_in_a_file(tree: MachineTree, tool: str, ran: str) -> None:
    """Of one line, which kernel-install and Proxmox read."""
    tree.file("etc/kernel/cmdline", f"root=/dev/sda1 {OFF} {OFF} quiet\n")
    program(tree, tool)
    assert commands_of(tree) == [ran]
    assert words(tree, "etc/kernel/cmdline") == ["root=/dev/sda1", "quiet", ON]


def test_a_file_of_the_firmware_partition_is_changed_where_there_is_one(tree: MachineTree) -> None:
    """As a Raspberry Pi has it; nothing else has to run."""
    tree.file("boot/firmware/cmdline.txt", f"quiet {OFF}")
    tree.file("ran", "")
    assert commands_of(tree) == []
    assert words(tree, "boot/firmware/cmdline.txt") == ["quiet", ON]


@pytest.mark.parametrize(
    ("tool", "mark", "ran"),
    [
        ("grubby", "etc/os-release", f"grubby --update-kernel=ALL --args={ON} --remove-args={OFF}"),
        ("rpm-ostree", "run/ostree-booted", f"rpm-ostree kargs --append-if-missing={ON} --delete-if-present={OFF}"),
    ],
)
def test_fedora_has_a_program_for_it(tree: MachineTree, tool: str, mark: str, ran: str) -> None:
    """One for each kind of its systems."""
    tree.file(mark, "")
    program(tree, tool)
    assert commands_of(tree) == [ran]


def in_a_container(tree: MachineTree) -> None:
    """The boot loader is the host's."""
    place_process(tree.proc, container=True)


def nixos(tree: MachineTree) -> None:
    """All files of /etc are made of one."""
    tree.file("etc/NIXOS", "")


def strange_words(tree: MachineTree) -> None:
    """Words that are no option of a kernel could be anything to a shell."""
    tree.cmdline("intel_iommu=off,$(reboot)")
    tree.file("etc/default/grub", "")
    program(tree, "update-grub")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda _tree: None, f"Add {ON} to the kernel's command line and take {OFF} off"),
        (in_a_container, "On the container's host"),
        (nixos, "boot.kernelParams"),
        (strange_words, "take intel_iommu=off,$(reboot) off the kernel's command line"),
    ],
)
def test_where_no_command_is_known_the_words_are_told(
    tree: MachineTree, make: Callable[[MachineTree], None], said: str
) -> None:
    """With no command that could do harm."""
    make(tree)
    (found,) = [finding for finding in pyvfio.doctor(kernel=tree.kernel) if finding.check == "iommu"]
    assert found.commands == ()
    assert said in found.by_hand


@pytest.mark.parametrize(
    ("files", "known"),
    [
        (["run/ostree-booted"], False),
        (["usr/bin/rpm-ostree"], False),
        (["run/ostree-booted", "usr/bin/rpm-ostree"], True),
        (["etc/default/grub"], False),
        (["usr/sbin/update-grub"], False),
        (["etc/default/grub", "usr/sbin/update-grub"], True),
        (["etc/kernel/cmdline"], False),
        (["usr/bin/kernel-install"], False),
        (["etc/kernel/cmdline", "usr/bin/kernel-install"], True),
        (["etc/kernel/cmdline", "etc/default/grub", "usr/sbin/update-grub"], False),
    ],
)
def test_a_boot_loader_is_known_by_its_file_and_its_program(
    tree: MachineTree, files: list[str], *, known: bool
) -> None:
    """One of the two is left of another boot loader. What systemd-boot reads is no file of GRUB's."""
    for file in files:
        tree.file(file, "quiet\n")
    (found,) = [finding for finding in pyvfio.doctor(kernel=tree.kernel) if finding.check == "iommu"]
    assert bool(found.commands) == known
    assert bool(found.by_hand) != known


def test_a_kernel_of_unknown_release_is_installed_by_nobody(tree: MachineTree) -> None:
    """The command would name no kernel."""
    tree.file("etc/kernel/cmdline", "quiet\n")
    program(tree, "kernel-install")
    (tree.proc / "sys/kernel/osrelease").unlink()
    (found,) = [finding for finding in pyvfio.doctor(kernel=tree.kernel) if finding.check == "iommu"]
    assert found.commands == ()


def test_a_dot_in_a_word_is_no_other_character(tree: MachineTree) -> None:
    """A word that differs there alone stays."""
    tree.cmdline("intel_iommu=off,a.b")
    tree.file("etc/kernel/cmdline", "intel_iommu=off,a.b intel_iommu=off,axb\n")
    program(tree, "proxmox-boot-tool")
    commands_of(tree)
    assert words(tree, "etc/kernel/cmdline") == ["intel_iommu=off,axb", "intel_iommu=on,a.b"]
