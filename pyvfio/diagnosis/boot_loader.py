"""The commands that change the kernel's command line, for the boot loader of the machine's distribution.

Source: the manuals of grubby, rpm-ostree kargs, kernel-install, proxmox-boot-tool, and of GRUB's /etc/default/grub.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pyvfio.diagnosis.case import Case
from pyvfio.findings import Command
from pyvfio.pci.sysfs import list_names

_SIMPLE = re.compile(r"[\w=,.:-]+")
_GRUB = "/etc/default/grub"
_CMDLINE = "/etc/kernel/cmdline"
_PI = "/boot/firmware/cmdline.txt"
_REMAKE = (
    ("update-grub", "update-grub"),
    ("grub2-mkconfig", "grub2-mkconfig -o /boot/grub2/grub.cfg"),
    ("grub-mkconfig", "grub-mkconfig -o /boot/grub/grub.cfg"),
)


def change_arguments(case: Case, add: Sequence[str], remove: Sequence[str]) -> tuple[tuple[Command, ...], str]:
    """Return the commands that change the kernel's command line, and the same in words where no command is known."""
    in_words = _in_words(add, remove)
    if not in_words:
        return (), ""
    if case.here.container:
        return (), f"On the container's host: {in_words}"
    if all(map(_SIMPLE.fullmatch, (*add, *remove))) and (commands := _commands(case, add, remove)):
        return tuple(map(Command, commands)), ""
    if case.has("etc/NIXOS"):
        return (), f"{in_words}: boot.kernelParams in /etc/nixos/configuration.nix, then nixos-rebuild boot"
    return (), f"{in_words}, in the configuration of the machine's boot loader"


def _in_words(add: Sequence[str], remove: Sequence[str]) -> str:
    parts = [("Add", add, "to"), ("take", remove, "off")] if add else [("Take", remove, "off")]
    said = [f"{verb} {' '.join(words)} {where} the kernel's command line" for verb, words, where in parts if words]
    return " and ".join(said)


def _commands(case: Case, add: Sequence[str], remove: Sequence[str]) -> list[str]:
    """Return the commands for the machine's boot loader, the most specific first; none for an unknown boot loader."""
    if case.has("run/ostree-booted") and case.has_program("rpm-ostree"):
        words = [f"--append-if-missing={word}" for word in add] + [f"--delete-if-present={word}" for word in remove]
        return [f"rpm-ostree kargs {' '.join(words)}"]
    if case.has_program("grubby"):
        words = [f'--args="{" ".join(add)}"'] * bool(add) + [f'--remove-args="{" ".join(remove)}"'] * bool(remove)
        return [f"grubby --update-kernel=ALL {' '.join(words)}"]
    if case.has(_CMDLINE[1:]):
        refresh = _refresh(case)
        return [*_edit_line(_CMDLINE, add, remove), refresh] if refresh else []
    if case.has(_PI[1:]):
        return _edit_line(_PI, add, remove)
    remake = next((command for program, command in _REMAKE if case.has_program(program)), "")
    return [*_edit_grub(case, add, remove), remake] if remake and case.has(_GRUB[1:]) else []


def _refresh(case: Case) -> str:
    if case.has_program("proxmox-boot-tool"):
        return "proxmox-boot-tool refresh"
    if case.has_program("kernel-install") and case.release:
        return f"kernel-install add {case.release} /lib/modules/{case.release}/vmlinuz"
    return ""


def _dropped(word: str, before: str, after: str) -> str:
    """The sed commands that take a word out; twice, because two of them may share the space between."""
    escaped = word.replace(".", "\\.")
    once = f"s/({before}){escaped}({after})/\\1\\2/g"
    return f"{once}; {once}"


def _edit_line(path: str, add: Sequence[str], remove: Sequence[str]) -> list[str]:
    """For a file whose first line is the command line."""
    commands = [f"sed -i -E '{_dropped(word, '^| ', '$| ')}' {path}" for word in remove]
    return commands + [f"grep -qw -- {word} {path} || sed -i '1s/$/ {word}/' {path}" for word in add]


def _edit_grub(case: Case, add: Sequence[str], remove: Sequence[str]) -> list[str]:
    """For the files that GRUB's tools read as shell: a line at the end adds to the variable."""
    more = any(name.endswith(".cfg") for name in list_names(case.root / "etc/default/grub.d"))
    files = f"{_GRUB} /etc/default/grub.d/*.cfg" if more else _GRUB
    quotes = "[\"'\"'\"' =]"
    commands = [
        f"sed -i -E '/^ *GRUB_CMDLINE_LINUX/ {{ {_dropped(word, quotes, quotes + '|$')} }}' {files}" for word in remove
    ]
    for word in add:
        line = f'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX {word}"'
        commands.append(f"grep -qxF -- '{line}' {_GRUB} || printf '%s\\n' '{line}' >> {_GRUB}")
    return commands
