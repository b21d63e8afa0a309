"""Modules with iommufd, built for packaged kernels: the steps around the compiler, without network."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from pyvfio.testing import iommufd_modules, kernels, packages
from pyvfio.testing.vm_errors import KernelUnavailableError, MissingToolError, find_tool

RELEASE = "7.9.1+deb99-amd64"

HEADERS = """\
Package: linux-headers-7.9.1+deb99-amd64
Version: 7.9.1-1~bpo99+1
Depends: gcc-98-for-host, linux-base (>= 4.12~), linux-headers-7.9.1+deb99-common (= 7.9.1-1), linux-kbuild-7.9.1+deb99
Size: 1813392
"""

MAKEFILE = """\
iommufd-y := \\
\tdevice.o \\
\tmain.o
obj-$(CONFIG_IOMMUFD) += iommufd.o
obj-$(CONFIG_IOMMUFD_DRIVER) += iova_bitmap.o

iommufd_driver-y := driver.o
obj-$(CONFIG_IOMMUFD_DRIVER_CORE) += iommufd_driver.o
"""

TREE = """\
EXPORT_SYMBOL_GPL(interval_tree_insert);
EXPORT_SYMBOL_GPL(interval_tree_remove);
int interval_tree_span_iter_first(void) { return 0; }
EXPORT_SYMBOL_GPL(interval_tree_span_iter_first);
"""


def source(folder: Path, *more: str) -> Path:
    """The parts of a kernel's source that are edited."""
    iommufd = folder / "drivers/iommu/iommufd"
    iommufd.mkdir(parents=True)
    (iommufd / "Makefile").write_text(MAKEFILE)
    for name in more:
        (iommufd / name).touch()
    (folder / "lib").mkdir()
    (folder / "lib/interval_tree.c").write_text(TREE)
    return folder


def packaged(cache: Path) -> Path:
    """A packaged kernel with three modules of VFIO, a module that needs VFIO, and one that does not."""
    entry = cache / "packaged"
    modules = {
        "kernel/drivers/vfio/vfio.ko.xz": "",
        "kernel/drivers/vfio/pci/vfio-pci.ko.xz": " kernel/drivers/vfio/vfio.ko.xz",
        "kernel/drivers/vfio/vfio_iommu_type1.ko.xz": " kernel/drivers/vfio/vfio.ko.xz",
        "kernel/drivers/gpu/kvmgt.ko.xz": " kernel/drivers/vfio/vfio.ko.xz",
        "kernel/fs/9p/9p.ko.xz": "",
    }
    for name in modules:
        (entry / "modules" / name).parent.mkdir(parents=True, exist_ok=True)
        (entry / "modules" / name).write_text(name)
    (entry / "modules/modules.dep").write_text("".join(f"{name}:{needs}\n" for name, needs in modules.items()))
    (entry / "modules/modules.builtin").write_text("kernel/drivers/iommu/iova.ko\n")
    (entry / "vmlinuz").write_text("image")
    return entry


def built(folder: Path, *names: str) -> list[Path]:
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(OBJECT)
    return sorted(folder.iterdir())


# The start of an ELF header, and no sections: enough for depmod.
OBJECT = Path(sys.executable).resolve().read_bytes()[:16] + bytes(48)


def test_the_packages_are_those_of_one_version_of_the_kernel() -> None:
    """The source package has no release in the name, and a suite may have a newer one: so the version is asked for."""
    assert iommufd_modules.needed_packages(RELEASE, {"linux-headers-7.9.1+deb99-amd64": HEADERS}.__getitem__) == [
        "linux-headers-7.9.1+deb99-amd64",
        "linux-headers-7.9.1+deb99-common",
        "linux-kbuild-7.9.1+deb99",
        "linux-source-7.9=7.9.1-1~bpo99+1",
    ]


def test_headers_without_build_tools_are_refused() -> None:
    with pytest.raises(KernelUnavailableError, match="no package with the build tools"):
        iommufd_modules.needed_packages(RELEASE, lambda _: "Version: 1\nDepends: gcc-98\n")


def test_a_record_without_a_version_is_refused() -> None:
    with pytest.raises(KernelUnavailableError, match="without the field Version"):
        iommufd_modules.needed_packages(RELEASE, lambda _: "Depends: linux-kbuild-7.9\n")


def test_the_compiler_of_the_kernel_is_taken_where_installed_else_the_machines(tmp_path: Path) -> None:
    assert iommufd_modules.preferred_compiler(HEADERS, "/usr/bin/gcc") == "/usr/bin/gcc"
    installed = next((name for name in ("gcc-12", "gcc-13", "gcc-14", "gcc-15") if shutil.which(name)), None)
    if installed is not None:
        record = HEADERS.replace("gcc-98-for-host", installed)
        assert iommufd_modules.preferred_compiler(record, "gcc") == shutil.which(installed)
    assert iommufd_modules.preferred_compiler("Depends: linux-base\n", "gcc") == "gcc"


@pytest.mark.parametrize(("more", "parts"), [((), ""), (("driver.c",), " driver.o")])
def test_iommufd_becomes_one_module_with_the_parts_that_kernels_have_built_in(
    tmp_path: Path, more: Sequence[str], parts: str
) -> None:
    iommufd_modules.prepare(source(tmp_path, *more))
    makefile = (tmp_path / "drivers/iommu/iommufd/Makefile").read_text()
    assert makefile.endswith(f"iommufd-y += iova_bitmap.o interval_tree.o{parts}\n")
    assert re.findall(r"^obj-.*", makefile, re.MULTILINE) == ["obj-$(CONFIG_IOMMUFD) += iommufd.o"]


def test_the_module_exports_no_symbol_of_the_kernel_a_second_time(tmp_path: Path) -> None:
    iommufd_modules.prepare(source(tmp_path))
    tree = (tmp_path / "drivers/iommu/iommufd/interval_tree.c").read_text()
    assert "EXPORT_SYMBOL" not in tree
    assert "int interval_tree_span_iter_first(void)" in tree


def test_each_file_is_compiled_for_a_kernel_with_cdevs_and_no_iommu_mode(tmp_path: Path) -> None:
    iommufd_modules.prepare(source(tmp_path))
    flags = (tmp_path / "Kbuild").read_text().splitlines()[0].split()
    assert {"-DCONFIG_IOMMUFD_MODULE=1", "-DCONFIG_VFIO_DEVICE_CDEV=1", "-DCONFIG_VFIO_NOIOMMU=1"} <= set(flags)


def test_a_source_that_has_changed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KernelUnavailableError, match="no iommufd in the expected place"):
        iommufd_modules.prepare(tmp_path)
    with pytest.raises(KernelUnavailableError, match="not as expected"):
        iommufd_modules.linked_makefile("obj-y += iommufd.o\n", ["driver.o"])


def test_the_headers_refer_to_themselves_where_they_are_unpacked(tmp_path: Path) -> None:
    headers = tmp_path / "usr/src" / f"linux-headers-{RELEASE}"
    headers.mkdir(parents=True)
    (headers / "Makefile").write_text("include /usr/src/linux-headers-7.9.1+deb99-common/Makefile\n")
    assert iommufd_modules.relocate(tmp_path, RELEASE) == headers
    expected = f"include {tmp_path}/usr/src/linux-headers-7.9.1+deb99-common/Makefile\n"
    assert (headers / "Makefile").read_text() == expected
    with pytest.raises(KernelUnavailableError, match="no Makefile"):
        iommufd_modules.relocate(tmp_path, "7.9.2")


def test_the_libraries_of_the_build_tools_are_found_with_their_own() -> None:
    needs = {
        "libc6": ["libgcc-s1"],
        "libelf1t64": ["libc6", "libzstd1", "zlib1g"],
        "libgcc-s1": ["gcc-99-base", "libc6"],
    }
    wanted = ["pahole", "libc6", "libelf1t64", "libssl3t64", "zlib1g"]
    found = iommufd_modules.library_packages(wanted, lambda name: needs.get(name, []))
    assert sorted(found) == ["libc6", "libelf1t64", "libgcc-s1", "libzstd1", "zlib1g"]


def test_a_wrapped_program_runs_by_the_given_loader_under_its_own_name(tmp_path: Path) -> None:
    loader = next(Path("/").glob("lib64/ld-linux-x86-64.so.2"))
    program = tmp_path / "shell"
    shutil.copy(find_tool("sh", package="dash"), program)
    iommufd_modules.wrap(program, loader, ["/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu"])
    words = [str(program), "-c", 'echo "$0|$1"; readlink /proc/$$/exe; exit 3', "a b", "c d"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, f"a b|c d\n{loader.resolve()}\n")
    # The program finds its name in the first word, as without the loader.
    done = subprocess.run([program, "-c", "nonsense-x"], capture_output=True, text=True, check=False)
    assert done.stderr.startswith(f"{program}: ")


def test_programs_that_the_libraries_of_the_machine_are_too_old_for_are_found(tmp_path: Path) -> None:
    program = tmp_path / "true"
    program.write_bytes(Path("/bin/true").read_bytes())
    program.chmod(0o755)
    assert iommufd_modules.runs(program)
    program.write_bytes(Path("/bin/true").read_bytes().replace(b"GLIBC_2.", b"GLIBC_9."))
    assert not iommufd_modules.runs(program)


def test_the_entry_shares_all_files_but_the_modules_of_vfio_with_the_packaged_kernel(tmp_path: Path) -> None:
    base = packaged(tmp_path)
    modules = built(tmp_path / "built", "iommufd.ko", "vfio.ko", "vfio-pci.ko")
    depmod = find_tool("depmod", package="kmod")
    entry = iommufd_modules.assemble(base, modules, RELEASE, tmp_path, depmod)
    found = {str(path.relative_to(entry / "modules")) for path in entry.rglob("*.ko*")}
    assert found == {"kernel/fs/9p/9p.ko.xz", "updates/iommufd.ko", "updates/vfio.ko", "updates/vfio-pci.ko"}
    for name in ("vmlinuz", "modules/kernel/fs/9p/9p.ko.xz"):
        assert os.path.samefile(base / name, entry / name), name
    dependencies = (entry / "modules/modules.dep").read_text()
    assert sorted(re.findall(r"^[^:]+", dependencies, re.MULTILINE)) == sorted(found)


def test_the_index_of_the_packaged_kernel_stays_as_it_is(tmp_path: Path) -> None:
    """depmod writes another index for the entry, in a file of its own."""
    base = packaged(tmp_path)
    before = (base / "modules/modules.dep").read_text()
    depmod = find_tool("depmod", package="kmod")
    iommufd_modules.assemble(base, built(tmp_path / "built", "iommufd.ko"), RELEASE, tmp_path, depmod)
    assert (base / "modules/modules.dep").read_text() == before


def test_a_build_without_iommufd_makes_no_entry(tmp_path: Path) -> None:
    with pytest.raises(KernelUnavailableError, match="has built no iommufd"):
        iommufd_modules.assemble(packaged(tmp_path), built(tmp_path / "built", "vfio.ko"), RELEASE, tmp_path, "depmod")
    assert not (tmp_path / "entry").exists()


@pytest.mark.parametrize(("program", "package"), [("make", "make"), ("gcc", "gcc"), ("xz", "xz-utils")])
def test_a_missing_program_is_named_with_its_package_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, package: str
) -> None:
    """The machine has a packaged kernel, and no network is asked for more."""
    (tmp_path / "bin").mkdir()
    for name in ("make", "gcc", "xz", "tar", "dpkg", "depmod"):
        if name != program:
            (tmp_path / "bin" / name).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(MissingToolError, match=f"{program} is missing.*apt-get install {package}"):
        kernels.find_kernel("7+iommufd", cache=tmp_path / "cache")
    assert not (tmp_path / "cache/kernels/7").exists()


def test_a_cache_below_a_path_with_a_space_is_refused_by_name(tmp_path: Path) -> None:
    """make cannot build there, and says so in other words after the packages are fetched."""
    with pytest.raises(KernelUnavailableError, match="whose path has a space"):
        kernels.find_kernel("7+iommufd", cache=tmp_path / "a b")


def test_a_failed_build_is_told_by_the_compilers_errors() -> None:
    output = (
        "warning: x\n  CC x.o\nx.c:3:1: error: 'y' undeclared\nmake[2]: *** [Makefile:1: x.o] Error 1\nmake: *** 2\n"
    )
    assert packages.failure("/usr/bin/make", 2, output) == "make failed (2): x.c:3:1: error: 'y' undeclared"
    assert packages.failure("make", 2, "objtool: no\nmake: *** Error 2\n") == "make failed (2): objtool: no"


def test_the_source_is_unpacked_without_the_files_that_no_module_needs(tmp_path: Path) -> None:
    """From a package as the distribution makes them: an archive in the archive of a package."""
    tree = source(tmp_path / "linux-source-7.9")
    for name in ("drivers/vfio/vfio.c", "drivers/iommu/iommu-priv.h", "drivers/iommu/iommu.c", "kernel/fork.c"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).touch()
    package = tmp_path / "package"
    (package / "usr/src").mkdir(parents=True)
    (package / "DEBIAN").mkdir()
    (package / "DEBIAN/control").write_text(
        "Package: linux-source-7.9\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x.invalid>\nDescription: x\n"
    )
    archive = package / "usr/src/linux-source-7.9.tar.xz"
    subprocess.run(["tar", "-cJf", archive, "-C", tmp_path, tree.name], check=True)
    deb = tmp_path / "linux-source-7.9_1_all.deb"
    subprocess.run(["dpkg-deb", "-b", package, deb], check=True, capture_output=True)
    tools = iommufd_modules.find_tools(tmp_path)
    iommufd_modules.unpack_source(deb, tmp_path / "out", tools)
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found >= {"drivers/vfio/vfio.c", "drivers/iommu/iommu-priv.h", "lib/interval_tree.c"}
    assert not found & {"kernel/fork.c", "drivers/iommu/iommu.c"}
    (tmp_path / "linux-source-7.9_2_all.deb").write_text("no package")
    with pytest.raises(KernelUnavailableError, match="failed"):
        iommufd_modules.unpack_source(tmp_path / "linux-source-7.9_2_all.deb", tmp_path / "other", tools)
