"""The checks of VFIO's modules: loaded, built in, missing for this kernel, or kept from being loaded.

Source: modules.dep and modules.builtin of depmod(8), modprobe.d(5), `module_blacklist` in kernel/module/main.c.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyvfio.diagnosis.boot_loader import change_arguments
from pyvfio.diagnosis.case import Case
from pyvfio.findings import Command, Finding
from pyvfio.pci.boot import command_line
from pyvfio.pci.sysfs import list_names, printable, read_text

MODULES = ("vfio", "vfio-pci", "vfio_iommu_type1")
MODULES_OF_IOMMUFD = ("vfio", "vfio-pci", "iommufd")

_CONFIGURATION = (
    "etc/modprobe.d",
    "run/modprobe.d",
    "usr/local/lib/modprobe.d",
    "usr/lib/modprobe.d",
    "lib/modprobe.d",
)
_PACKAGES = (
    ("ubuntu", "apt-get install linux-modules-extra-{}"),
    ("debian", "apt-get install --reinstall linux-image-{}"),
    ("fedora", "dnf install kernel-modules-{}"),
    ("rhel", "dnf install kernel-modules-{}"),
    ("suse", "zypper install --force kernel-default"),
)


def check_modules(case: Case) -> Iterator[Finding]:
    """Check whether the kernel has VFIO now, with VFIO's drivers for PCI and for the IOMMU, or iommufd."""
    needed = MODULES_OF_IOMMUFD if case.on_iommufd else MODULES
    absent = [name for name in needed if not _is_there(case, name)]
    # A vfio that is built in shows nothing in sysfs; the modules that depend on vfio do.
    if absent in ([], ["vfio"]):
        yield Finding("modules", "ok", f"the kernel has {', '.join(needed)}")
        return
    if (closed := _no_loading(case)) is not None:
        yield closed
        return
    if case.here.container:
        yield _on_the_host(absent)
        return
    kept = tuple(_kept_from_loading(case, absent))
    yield from kept
    missing = [name for name in absent if _is_missing(case, name)]
    if missing:
        yield _missing(case, missing)
    elif not any(finding.reboot for finding in kept):
        yield _not_loaded(absent, persistent=case.has("etc/modules-load.d"))


def _is_there(case: Case, name: str) -> bool:
    """Whether the kernel has a module now, built in or loaded."""
    if name in {"vfio", "vfio_iommu_type1"} and case.works:
        return True
    if name == "iommufd" and (case.kernel.sysfs / "class/misc/iommu").exists():
        return True
    sysfs, plain = case.kernel.sysfs, name.replace("-", "_")
    if (sysfs / "module" / plain).exists() or (name == "vfio-pci" and (sysfs / "bus/pci/drivers/vfio-pci").exists()):
        return True
    return plain in _names(_module_directory(case) / "modules.builtin")


def _module_directory(case: Case) -> Path:
    """Of the running kernel; a name that is none where procfs does not say the release."""
    return case.root / "lib/modules" / (case.release or "unknown")


def _names(path: Path) -> set[str]:
    """The modules in modules.dep or modules.builtin, with underscores."""
    lines = (read_text(path) or "").split("\n")
    files = (line.partition(":")[0].rpartition("/")[2] for line in lines)
    return {file.partition(".ko")[0].replace("-", "_") for file in files}


def _is_missing(case: Case, name: str) -> bool:
    listed = _names(_module_directory(case) / "modules.dep")
    return name.replace("-", "_") not in listed and bool(case.release)


def _missing(case: Case, missing: Sequence[str]) -> Finding:
    names = ", ".join(missing)
    others = sorted(list_names(case.root / "lib/modules") - {case.release})
    if not _module_directory(case).is_dir():
        known = f"; there are those of {', '.join(map(printable, others))}" if others else ""
        return Finding(
            "modules",
            "wrong",
            f"the modules of the running kernel {case.release} are not installed{known}",
            f"{names} cannot be loaded. An update of the kernel removes the modules of the former one.",
            by_hand="For the next boot, choose the kernel that is installed"
            if others
            else "Install the modules of the running kernel",
            reboot=bool(others),
        )
    install = tuple(map(Command, _install(case)))
    return Finding(
        "modules",
        "wrong",
        f"kernel {case.release} has no module {names}",
        "The distribution may have the modules in another package, or the kernel is built without them.",
        commands=(*install, Command(f"modprobe -a {' '.join(missing)}")) if install else (),
        by_hand="" if install else "Install the package with the kernel's further modules, or another kernel",
    )


def _install(case: Case) -> list[str]:
    text = read_text(case.root / "etc/os-release") or ""
    words = re.findall(r"^ID(?:_LIKE)?=\"?([^\"\n]*)\"?$", text, re.MULTILINE)
    known = " ".join(words).split()
    return [command.format(case.release) for name, command in _PACKAGES if name in known][:1]


def _not_loaded(absent: Sequence[str], *, persistent: bool) -> Finding:
    # vfio comes with the others.
    names = [name for name in absent if name != "vfio"]
    commands = [Command(f"modprobe -a {' '.join(names)}")]
    if persistent:
        lines = " ".join(names)
        commands.append(
            Command(f"printf '%s\\n' {lines} > /etc/modules-load.d/pyvfio.conf", "and at each boot to come")
        )
    return Finding(
        "modules",
        "wrong",
        f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not loaded",
        "Nothing loads these modules by itself, for they match no device.",
        commands=tuple(commands),
    )


def _on_the_host(absent: Sequence[str]) -> Finding:
    names = [name for name in absent if name != "vfio"]
    return Finding(
        "modules",
        "wrong",
        f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not loaded",
        "A container has the modules of its host.",
        by_hand=f"On the host: modprobe -a {' '.join(names)}; then start the container again",
    )


# --- Kept from being loaded ----------------------------------------------------------------------------------------


def _no_loading(case: Case) -> Finding | None:
    """The kernel loads no modules at all."""
    disabled = read_text(case.kernel.proc / "sys/kernel/modules_disabled") == "1"
    word = tuple(word for word in command_line(case.kernel) if word == "nomodule")
    if not disabled and not word:
        return None
    commands, in_words = change_arguments(case, (), word)
    setting = "kernel.modules_disabled is 1" if disabled else "the kernel was told so (nomodule)"
    sooner = "Have the modules loaded at boot, before that setting: /etc/modules-load.d" if disabled else ""
    return Finding(
        "modules",
        "wrong",
        f"VFIO's modules are not loaded, and this kernel loads no more modules: {setting}",
        commands=commands,
        by_hand=in_words or sooner,
        reboot=True,
        remove_arguments=word,
    )


def _kept_from_loading(case: Case, absent: Sequence[str]) -> Iterator[Finding]:
    wanted = {name.replace("-", "_") for name in absent}
    words = tuple(_blacklisting(case, wanted))
    if words:
        commands, by_hand = change_arguments(case, (), words)
        yield Finding(
            "modules",
            "wrong",
            f"the kernel was told not to load VFIO's modules ({', '.join(map(printable, words))})",
            commands=commands,
            by_hand=by_hand,
            reboot=True,
            remove_arguments=words,
        )
    for file, line in _configured(case):
        kind, module, *rest = line.split()
        if module.replace("-", "_") in wanted and kind == "install" and "".join(rest[:1]) in _NOTHING:
            yield _diverted(file, line)


_NOTHING = frozenset({"", "/bin/false", "/bin/true", "/usr/bin/false", "/usr/bin/true", "false", "true", ":"})
"""Commands in place of a module that load none."""


def _blacklisting(case: Case, wanted: set[str]) -> Iterator[str]:
    # modprobe.blacklist= keeps modprobe only from loading modules that match a device, and VFIO's modules match none.
    for word in command_line(case.kernel):
        name, _, values = word.partition("=")
        if name == "module_blacklist" and wanted & {value.replace("-", "_") for value in values.split(",")}:
            yield word


def _configured(case: Case) -> Iterator[tuple[str, str]]:
    """The lines `install MODULE COMMAND` of modprobe's configuration, each with the path of the file from the root."""
    # /lib is often a link to /usr/lib.
    for directory in {os.path.realpath(case.root / each): each for each in _CONFIGURATION}.values():
        for name in sorted(list_names(case.root / directory)):
            if name.endswith(".conf"):
                for line in (read_text(case.root / directory / name) or "").split("\n"):
                    if len(line.split()) >= 2 and line.split()[0] == "install":
                        yield f"/{directory}/{name}", line


def _diverted(file: str, line: str) -> Finding:
    module = line.split()[1]
    command = shlex.join(["sed", "-i", "-E", f"s/^\\s*install\\s+{module}(\\s|$)/# &/", file])
    return Finding(
        "modules",
        "wrong",
        f"{printable(file)} keeps {printable(module)} from being loaded: {printable(line.strip())}",
        "modprobe runs that command in place of loading the module.",
        commands=(Command(command),) if command.isprintable() else (),
        by_hand="" if command.isprintable() else f"Take that line out of {printable(file)}",
    )
