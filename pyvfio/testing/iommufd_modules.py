"""The modules of VFIO with iommufd, device cdevs and no-IOMMU mode, built for the distribution's unmodified kernels.

The packaged kernels are configured without iommufd. `struct vfio_device` has other members with it, so iommufd and all
modules of VFIO are built out of tree, from the packages with the headers, the build tools and the source of the kernel.
The image and all other modules stay those of the packages. Nothing is installed on the machine.
"""

import contextlib
import logging
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyvfio.testing.packages import (
    Apt,
    failure,
    index_targets,
    parse_depends,
    parse_field,
    run_tool,
    source_list,
    unpack,
)
from pyvfio.testing.vm_errors import KernelUnavailableError, find_tool

_log = logging.getLogger(__name__)

# Options that the packaged kernel does not have are set for make, which chooses the files to compile, and as macros,
# which the files test. Parts of iommufd that a kernel has built in are linked into the module, and are macros alone.
_CHOSEN = {"IOMMUFD": "m", "IOMMUFD_NOIOMMU": "y", "VFIO_DEVICE_CDEV": "y", "VFIO_NOIOMMU": "y"}
_LINKED = ("IOMMUFD_DRIVER", "IOMMUFD_DRIVER_CORE", "INTERVAL_TREE_SPAN_ITER")
# Mediated devices have no user in the machine, and nobody debugs the modules. Types for BPF need the whole kernel.
_WITHOUT = ("VFIO_MDEV", "DEBUG_INFO", "DEBUG_INFO_BTF_MODULES")

_INTERVAL_TREE = "lib/interval_tree.c"
_VFIO = "kernel/drivers/vfio/"
_KBUILD, _SOURCE = "linux-kbuild-", "linux-source-"


@dataclass(frozen=True)
class Tools:
    """The paths of the programs that build modules; a snapshot. ``compiler`` is the machine's default."""

    make: str
    compiler: str
    tar: str
    dpkg: str
    depmod: str


def find_tools(work: Path) -> Tools:
    """Return the programs that build modules in a directory.

    :raises MissingToolError: a program is missing.
    :raises KernelUnavailableError: make cannot build in the directory.
    """
    if re.search(r"[\s:]", str(work)):
        raise KernelUnavailableError(f"make cannot build in {work}, whose path has a space or a colon")
    find_tool("xz", package="xz-utils")  # tar calls xz
    return Tools(
        make=find_tool("make", package="make"),
        compiler=find_tool("gcc", package="gcc"),
        tar=find_tool("tar", package="tar"),
        dpkg=find_tool("dpkg", package="dpkg"),
        depmod=find_tool("depmod", package="kmod"),
    )


def build(release: str, packaged: Path, work: Path, *, tools: Tools, apt: Apt, libraries: str) -> Path:
    """Build the modules for a packaged kernel, and return the directory of a cache entry with the modules.

    Files that are the same as in the packaged kernel are hard links. Progress is logged as warnings.

    Cost: 170 MB to download, 400 MB in ``work``, 70 to 90 seconds of processor time; 10 MB for the entry.

    :param packaged: the cache entry of the packaged kernel.
    :param work: an empty directory on the same file system, but for the files of ``apt``.
    :param apt: has the packages of the kernel.
    :param libraries: the suite with the libraries of the kernel's build tools, for machines with older ones.
    :raises KernelUnavailableError: the packages cannot be fetched, or the modules cannot be built.
    """
    root, source = work / "headers", work / "source"
    names = needed_packages(release, apt.record)
    size = sum(int(parse_field(apt.record(name), "Size")) for name in names)
    with _step(f"fetching {size / 1e6:.0f} MB: {', '.join(names)}"):
        files = apt.download(names)
    with _step("unpacking"):
        _unpack_all(files, root, source, tools)
    with _step("preparing the build"):
        kbuild = next(name for name in names if name.startswith(_KBUILD))
        _make_tools_run(root, work, apt.record(kbuild), libraries)
        headers = relocate(root, release)
        prepare(source)
    with _step(f"building iommufd and the modules of VFIO for kernel {release}"):
        _compile(headers, source, tools.make, preferred_compiler(apt.record(names[0]), tools.compiler))
    modules = sorted(source.rglob("*.ko"))
    return assemble(packaged, modules, release, work, tools.depmod)


@contextlib.contextmanager
def _step(doing: str) -> Iterator[None]:
    started = time.monotonic()
    _log.warning("%s", doing)
    yield
    _log.warning("that took %.0f s", time.monotonic() - started)


# ------------------------------------------------------------------------------------------------- fetch and unpack


def needed_packages(release: str, record: Callable[[str], str]) -> list[str]:
    """Return the packages of the headers, the build tools and the source, all of one version of the kernel.

    :param record: returns the record of a package, as apt prints it.
    """
    headers = f"linux-headers-{release}"
    text = record(headers)
    beside = [name for name in parse_depends(text) if name.startswith(("linux-headers-", _KBUILD))]
    if not any(name.startswith(_KBUILD) for name in beside):
        raise KernelUnavailableError(f"{headers} depends on no package with the build tools of the kernel")
    line = re.match(r"\d+\.\d+", release)
    return [headers, *beside, f"{_SOURCE}{line[0] if line else release}={parse_field(text, 'Version')}"]


def preferred_compiler(record: str, default: str) -> str:
    """Return the compiler that the headers depend on, such as gcc-12, if installed; else the default."""
    versions = (re.match(r"gcc-\d+", name) for name in parse_depends(record))
    wanted = next((version[0] for version in versions if version), None)
    return (shutil.which(wanted) if wanted else None) or default


def _unpack_all(files: Sequence[Path], root: Path, source: Path, tools: Tools) -> None:
    for package in files:
        if package.name.startswith(_SOURCE):
            unpack_source(package, source, tools)
            package.unlink()
        else:
            unpack(package, root)


def unpack_source(package: Path, source: Path, tools: Tools) -> None:
    """Unpack the files that the modules are built from: a hundredth of the source."""
    name = package.name.partition("_")[0]
    wanted = [
        f"{name}/{path}" for path in ("drivers/iommu/iommufd", "drivers/iommu/*.h", "drivers/vfio", _INTERVAL_TREE)
    ]
    source.mkdir()
    _pipe(
        [tools.dpkg, "--fsys-tarfile", str(package)],
        [tools.tar, "-xO", f"./usr/src/{name}.tar.xz"],
        [tools.tar, "-xJ", "-C", str(source), "--strip-components=1", "--wildcards", *wanted],
    )


def _pipe(*commands: Sequence[str]) -> None:
    """Run programs, each with the output of the one before as input."""
    running: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        for command in commands:
            before = running[-1].stdout if running else subprocess.DEVNULL
            last = command is commands[-1]
            process = subprocess.Popen(  # noqa: S603 - all words are from this module, and no shell reads them
                command, stdin=before, stdout=subprocess.DEVNULL if last else subprocess.PIPE, stderr=subprocess.PIPE
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            if running and running[-1].stdout is not None:
                running[-1].stdout.close()  # only the next program reads, so a program whose reader ends ends too
            running.append(process)
        for command, process in zip(reversed(commands), reversed(running), strict=True):
            complaints = process.stderr.read().decode("utf-8", "replace") if process.stderr else ""
            if status := process.wait():
                raise KernelUnavailableError(failure(command[0], status, complaints))


# ----------------------------------------------------------------------------------------------- tools that can run


def _make_tools_run(root: Path, work: Path, kbuild: str, suite: str) -> None:
    """Let the build tools of the packages run with the libraries of a suite, if the machine has older libraries.

    ``kbuild`` is the record of the package with the tools.
    """
    programs = [path for path in root.glob("usr/lib/linux-kbuild-*/*/**/*") if path.is_file() and _is_program(path)]
    if all(runs(path) for path in programs if path.name.startswith(("modpost", "objtool"))):
        return
    place = work / "libraries"
    place.mkdir()
    apt = Apt(place, source_list((suite,), index_targets()))
    apt.update()
    for package in apt.download(library_packages(parse_depends(kbuild), apt.dependencies)):
        unpack(package, place / "root")
    loader = next(place.glob("root/**/ld-linux-x86-64.so.2"), None)
    if loader is None:
        raise KernelUnavailableError(f"libc6 of {suite} has no loader in the expected place")
    folders = dict.fromkeys(str(path.parent) for path in place.glob("root/**/*.so.*"))
    for path in programs:
        wrap(path, loader, list(folders))


def library_packages(needed: Sequence[str], dependencies: Callable[[str], Sequence[str]]) -> list[str]:
    """Return the packages of the libraries that modpost and objtool need. A third program is linked to libssl."""
    found: list[str] = []
    todo = [name for name in needed if name.startswith(("libc6", "libelf", "zlib"))]
    while todo:
        package = todo.pop()
        if package not in found:
            found.append(package)
            todo += [name for name in dependencies(package) if name.startswith(("lib", "zlib"))]
    return found


def wrap(program: Path, loader: Path, folders: Sequence[str]) -> None:
    """Replace a program by a script that runs the program by a loader, with the libraries of folders."""
    real = program.with_name(f"{program.name}.elf")
    program.rename(real)
    # Some programs find another one beside them by the name that they are called by.
    words = [str(loader), "--argv0", str(program), "--library-path", ":".join(folders), str(real)]
    program.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    program.chmod(0o755)


def _is_program(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(5) == b"\x7fELF\x02" and os.access(path, os.X_OK)


def runs(program: Path) -> bool:
    """Return whether the loader of the machine finds all libraries of a program, in the versions that are needed."""
    done = subprocess.run(  # noqa: S603 - the path is from a package, and no shell reads it
        [find_tool("ldd", package="libc-bin"), str(program)],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    return "not found" not in done.stdout + done.stderr


# -------------------------------------------------------------------------------------------------- edit and compile


def relocate(root: Path, release: str) -> Path:
    """Let the Makefile of the unpacked headers refer to the headers below ``root``, and return their directory."""
    headers = root / "usr/src" / f"linux-headers-{release}"
    makefile = headers / "Makefile"
    if not makefile.is_file():
        raise KernelUnavailableError(f"the headers of kernel {release} have no Makefile in the expected place")
    makefile.write_text(makefile.read_text().replace("/usr/src", f"{root}/usr/src"))
    return headers


def prepare(source: Path) -> None:
    """Edit the source, so that iommufd is one module, with the parts that a kernel with iommufd has built in.

    :raises KernelUnavailableError: the source is not as expected.
    """
    iommufd = source / "drivers/iommu/iommufd"
    if not (iommufd / "Makefile").is_file() or not (source / _INTERVAL_TREE).is_file():
        raise KernelUnavailableError("the source of the kernel has no iommufd in the expected place")
    tree = (source / _INTERVAL_TREE).read_text()
    # The kernel itself exports these names. The module uses the functions that it contains.
    (iommufd / "interval_tree.c").write_text(re.sub(r"(?m)^EXPORT_SYMBOL_GPL\(interval_tree_\w+\);\n", "", tree))
    parts = ["iova_bitmap.o", "interval_tree.o", *(["driver.o"] if (iommufd / "driver.c").is_file() else [])]
    makefile = iommufd / "Makefile"
    makefile.write_text(linked_makefile(makefile.read_text(), parts))
    macros = [*(f"{name}_MODULE" if value == "m" else name for name, value in _CHOSEN.items()), *_LINKED]
    flags = " ".join(f"-DCONFIG_{name}=1" for name in macros)
    (source / "Kbuild").write_text(f"subdir-ccflags-y += {flags}\nobj-m += drivers/iommu/iommufd/ drivers/vfio/\n")


def linked_makefile(text: str, parts: Sequence[str]) -> str:
    """Return the Makefile of iommufd with parts linked into the module, in place of modules and built-in objects.

    :raises KernelUnavailableError: the Makefile is not as expected.
    """
    lines = [line for line in text.splitlines() if "CONFIG_IOMMUFD_DRIVER" not in line]
    lines = [line for line in lines if not line.startswith("iommufd_driver-y")]
    if "obj-$(CONFIG_IOMMUFD) += iommufd.o" not in lines:
        raise KernelUnavailableError("the Makefile of iommufd is not as expected")
    return "\n".join([*lines, f"iommufd-y += {' '.join(parts)}", ""])


def _compile(headers: Path, source: Path, make: str, compiler: str) -> None:
    settings = {**_CHOSEN, **dict.fromkeys(_WITHOUT, "")}
    if not _takes(compiler, "-fmin-function-alignment=16"):  # gcc 14 does; older ones have another option for that
        settings["CC_HAS_MIN_FUNCTION_ALIGNMENT"] = ""
    words = [f"CONFIG_{name}={value}" for name, value in settings.items()]
    jobs = len(os.sched_getaffinity(0))
    # Variables such as MAKEFLAGS, ARCH and KCFLAGS of the caller are for other builds.
    environ = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
    command = [make, "-s", f"-j{jobs}", "-C", str(headers), f"M={source}", f"CC={compiler}", *words, "modules"]
    run_tool(command, env=environ)


def _takes(compiler: str, option: str) -> bool:
    words = [compiler, option, "-E", "-x", "c", "/dev/null"]
    done = subprocess.run(words, capture_output=True, check=False)  # noqa: S603 - no shell reads the words
    return done.returncode == 0


# ---------------------------------------------------------------------------------------------------- the cache entry


def assemble(packaged: Path, modules: Sequence[Path], release: str, work: Path, depmod: str) -> Path:
    """Return the directory of a cache entry: the packaged kernel with modules in place of the packaged ones of VFIO.

    :raises KernelUnavailableError: iommufd is not among the modules.
    """
    if not any(path.name == "iommufd.ko" for path in modules):
        raise KernelUnavailableError(f"the source of kernel {release} has built no iommufd")
    root, entry = work / "assembled", work / "entry"
    folder = root / "lib/modules" / release
    left_out = replaced((packaged / "modules/modules.dep").read_text())
    for path in packaged.glob("modules/**/*"):
        name = str(path.relative_to(packaged / "modules"))
        if path.is_file() and not path.is_symlink() and name not in left_out:
            _share(path, folder / name)
    (folder / "updates").mkdir()
    for path in modules:
        shutil.move(path, folder / "updates" / path.name)
    run_tool([depmod, "-b", str(root), release])
    entry.mkdir()
    _share(packaged / "vmlinuz", entry / "vmlinuz")
    folder.rename(entry / "modules")
    return entry


def replaced(modules_dep: str) -> set[str]:
    """Return the packaged modules that do not fit those that are built: VFIO's, and all that depend on VFIO."""
    rows = [line.partition(":") for line in modules_dep.splitlines()]
    return {file for file, _, needs in rows if any(name.startswith(_VFIO) for name in (file, *needs.split()))}


def _share(path: Path, to: Path) -> None:
    """Make a hard link, or a copy if the file system has no hard links. depmod replaces files and changes none."""
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, to)
    except OSError:
        shutil.copy2(path, to)
