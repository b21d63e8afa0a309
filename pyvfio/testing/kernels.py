"""The distribution's kernels for the virtual machine: found, verified and kept in a cache when first used."""

import contextlib
import fcntl
import glob
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyvfio.testing import iommufd_modules
from pyvfio.testing.packages import Apt, index_targets, run_tool, source_list, unpack
from pyvfio.testing.vm_errors import KernelUnavailableError, find_tool

_log = logging.getLogger(__name__)

_IOMMUFD = "+iommufd"


@dataclass(frozen=True)
class KernelLine:
    """Describe a line of kernels that the distribution maintains, and the suites with the packages.

    A line with iommufd has the packaged kernels of another line, :attr:`packaged`, with the modules of
    :mod:`pyvfio.testing.iommufd_modules` in place of the packaged modules of VFIO. :attr:`libraries` is the suite with
    the libraries of the tools that build the modules.
    """

    name: str
    suites: tuple[str, ...]
    packaged: str = ""
    libraries: str = ""

    @property
    def flavour(self) -> str:
        """Return ``+iommufd`` for a line with iommufd, else an empty string."""
        return _IOMMUFD if self.packaged else ""

    def has(self, release: str) -> bool:
        """Return whether a kernel release (``uname -r``) belongs to this line. The release does not show iommufd."""
        return release.startswith(f"{self.packaged or self.name}.")


def _with_iommufd(line: KernelLine, libraries: str) -> KernelLine:
    return KernelLine(f"{line.name}{_IOMMUFD}", line.suites, packaged=line.name, libraries=libraries)


_PACKAGED = (
    KernelLine("6.1", ("bookworm", "bookworm-updates", "bookworm-security")),
    KernelLine("6.12", ("bookworm-backports",)),
    KernelLine("7", ("trixie-backports",)),
)

LINES: Mapping[str, KernelLine] = {
    line.name: line
    for line in (*_PACKAGED, _with_iommufd(_PACKAGED[1], "bookworm"), _with_iommufd(_PACKAGED[2], "trixie"))
}
"""The lines of kernels by name. The packaged kernels are built without iommufd."""


@dataclass(frozen=True)
class GuestKernel:
    """Describe a kernel that can be booted; a snapshot of paths.

    :attr:`modules` is the directory for ``/lib/modules/RELEASE``. None: all drivers that are needed are built in.
    :attr:`flavour` tells kernels of one release apart, as :attr:`KernelLine.flavour`.
    """

    release: str
    image: Path
    modules: Path | None
    flavour: str = ""

    @property
    def label(self) -> str:
        """Return the release with the flavour, for names of files in the cache."""
        return self.release + self.flavour


def cache_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the default cache directory: ``$XDG_CACHE_HOME/pyvfio`` or ``~/.cache/pyvfio``."""
    base = environ.get("XDG_CACHE_HOME", "")
    # The base directory specification says that a relative path is ignored.
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "pyvfio"


def version_key(text: str) -> list[tuple[int, int, str]]:
    """Return a key that orders releases and package names by number: 6.1.0-9 before 6.1.0-10."""
    parts = re.findall(r"\d+|\D+", text)
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]


def cached_kernels(line: KernelLine, cache: Path) -> list[GuestKernel]:
    """Return the complete kernels of a line in the cache, the newest first. Uses no network."""
    # An entry is complete when renamed; until then the name begins with a dot.
    entries = [path for path in cache.glob(f"kernels/{line.name}/*") if not path.name.startswith(".")]
    entries = [path for path in entries if path.is_dir()]
    entries.sort(key=lambda path: version_key(path.name), reverse=True)
    return [GuestKernel(path.name, path / "vmlinuz", path / "modules", line.flavour) for path in entries]


def find_kernel(
    kernel: str, *, cache: Path | None = None, modules: Path | None = None, update: bool = False
) -> GuestKernel:
    """Return the kernel for a name of :data:`LINES` or for the path of a bzImage.

    A kernel of a line is fetched if the cache has none, or if ``update`` is true and a newer kernel exists. Otherwise
    no network is used. A line with iommufd first takes the kernel of the line :attr:`KernelLine.packaged`.

    Synchronization: processes that fetch the same line wait for each other (flock).

    Cost: to fetch a kernel, ten to sixty seconds and 400 MB of disk. For iommufd, see
    :func:`pyvfio.testing.iommufd_modules.build`.

    :param modules: for a path: the directory with ``modules.dep``. The default is the first directory that exists of:
        the image's directory; ``../lib/modules/RELEASE`` and ``lib/modules/RELEASE`` beside the image;
        ``/lib/modules/RELEASE``.
    :raises KernelUnavailableError: no such line or file, or the line is not in the cache and cannot be fetched.
    :raises MissingToolError: a tool to fetch the kernel is missing.
    """
    if kernel not in LINES:
        return custom_kernel(Path(kernel), modules=modules)
    line = LINES[kernel]
    cache = cache_directory() if cache is None else cache
    found = cached_kernels(line, cache)
    if not found or update:
        return _fetch(line, cache, before=found, update=update)
    return found[0]


def custom_kernel(image: Path, *, modules: Path | None = None) -> GuestKernel:
    """Return the kernel of a bzImage that the caller provides; see :func:`find_kernel`."""
    if not image.is_file():
        raise KernelUnavailableError(f"{image} is neither a file nor one of the kernels {', '.join(LINES)}")
    if modules is not None and not (modules / "modules.dep").is_file():
        raise KernelUnavailableError(f"{modules} has no modules.dep (depmod makes it)")
    image = image.absolute()
    release = bzimage_release(image)
    places = [image.parent, image.parent.parent / "lib/modules" / release, image.parent / "lib/modules" / release]
    places.append(Path("/lib/modules", release))
    found = modules or next((place for place in places if (place / "modules.dep").is_file()), None)
    return GuestKernel(release, image, found.absolute() if found else None)


def bzimage_release(image: Path) -> str:
    """Return the release in the header of a bzImage.

    Source: ``kernel_version`` in Documentation/arch/x86/boot.rst of the kernel.
    """
    with image.open("rb") as file:
        head = file.read(0x10000)
    if head[0x202:0x206] != b"HdrS":
        raise KernelUnavailableError(f"{image} is not an x86 bzImage")
    start = 0x200 + int.from_bytes(head[0x20E:0x210], "little")
    words = head[start : start + 256].split(b"\0")[0].split()
    if start == 0x200 or not words:
        raise KernelUnavailableError(f"{image} has no release in the header")
    return words[0].decode("ascii", "replace")


@contextlib.contextmanager
def _locked(cache: Path, line: KernelLine) -> Iterator[None]:
    path = cache / "kernels" / f"{line.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("waiting for another process, which fetches or removes kernels of the line %s", line.name)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(line: KernelLine, cache: Path, *, before: Sequence[GuestKernel], update: bool) -> GuestKernel:
    with _locked(cache, line):
        found = cached_kernels(line, cache)
        if found and found != before:  # another process has fetched the kernel
            return found[0]
        directory = cache / "kernels" / line.name
        directory.mkdir(exist_ok=True)
        for stale in directory.glob(".making-*"):  # the process that made the entry is dead: this one holds the lock
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=directory) as work:
            try:
                if line.packaged:
                    _build_into(line, cache, Path(work), update=update)
                else:
                    _fetch_into(line, directory, Path(work))
            except KernelUnavailableError as error:
                if not found:
                    raise
                _log.warning("kernel %s stays at %s: %s", line.name, found[0].release, error)
        return cached_kernels(line, cache)[0]


def _fetch_into(line: KernelLine, directory: Path, work: Path) -> None:
    apt = Apt(work, source_list(line.suites, index_targets()))
    apt.update()
    image = newest_image(line, apt.package_names(f"linux-image-{line.name}."))
    if image is None:
        raise KernelUnavailableError(f"no kernel {line.name} in {', '.join(line.suites)}")
    release = image.removeprefix("linux-image-")
    if (directory / release).is_dir():
        return
    _log.warning("fetching kernel %s", release)
    root = work / "root"
    for package in apt.download(kernel_packages(image, apt.dependencies)):
        unpack(package, root)
    entry = arrange(root, release, work / "entry")
    run_tool([find_tool("depmod", package="kmod"), "-b", str(root), release])
    (root / "lib/modules" / release).rename(entry / "modules")
    entry.rename(directory / release)


def _build_into(line: KernelLine, cache: Path, work: Path, *, update: bool) -> None:
    tools = iommufd_modules.find_tools(work)
    kernel = find_kernel(line.packaged, cache=cache, update=update)
    directory = cache / "kernels" / line.name
    if (directory / kernel.release).is_dir():
        return
    apt = Apt(work, source_list(line.suites, index_targets()))
    apt.update()
    if not apt.package_names(f"linux-headers-{kernel.release}"):  # the distribution has replaced the kernel
        kernel = find_kernel(line.packaged, cache=cache, update=True)
    with in_use(kernel):
        entry = iommufd_modules.build(
            kernel.release, kernel.image.parent, work, tools=tools, apt=apt, libraries=line.libraries
        )
    entry.rename(directory / kernel.release)


def arrange(root: Path, release: str, entry: Path) -> Path:
    """Move the image of unpacked packages to ``entry/vmlinuz``, and the modules to the place where depmod searches."""
    merged, classic = root / "usr/lib/modules" / release, root / "lib/modules" / release
    if merged.is_dir():
        classic.parent.mkdir(parents=True, exist_ok=True)
        merged.rename(classic)
    images = [path for path in (root / "boot" / f"vmlinuz-{release}", classic / "vmlinuz") if path.is_file()]
    if not images or not classic.is_dir():
        raise KernelUnavailableError(
            f"the packages of kernel {release} have no image or no modules in the expected place"
        )
    entry.mkdir()
    images[0].rename(entry / "vmlinuz")
    return entry


def newest_image(line: KernelLine, names: Sequence[str]) -> str | None:
    """Return the newest generic kernel of a line among package names, or None. Others are real-time, cloud or debug."""
    pattern = re.compile(r"linux-image-(\d+\.\d+[^-]*(?:-\d+)?-amd64)")
    matches = [found for found in map(pattern.fullmatch, names) if found and line.has(found[1])]
    return max((found[0] for found in matches), key=version_key, default=None)


def kernel_packages(image: str, dependencies: Callable[[str], Sequence[str]]) -> list[str]:
    """Return the package of an image and all packages with parts of the kernel (several packages since 7.0)."""
    release = image.removeprefix("linux-image-")
    wanted, todo = [], [image]
    while todo:
        package = todo.pop()
        if package in wanted:
            continue
        wanted.append(package)
        todo += [name for name in dependencies(package) if name.startswith("linux-") and name.endswith(f"-{release}")]
    return wanted


@contextlib.contextmanager
def in_use(kernel: GuestKernel, *, flock: int = fcntl.LOCK_SH) -> Iterator[None]:
    """Keep :func:`prune` from removing the kernel while the context is entered.

    :raises KernelUnavailableError: the kernel has just been removed.
    """
    try:
        directory = os.open(kernel.image.parent, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise KernelUnavailableError(f"kernel {kernel.release} has just been removed; try again") from None
    try:
        fcntl.flock(directory, flock)
        if not kernel.image.exists():
            raise KernelUnavailableError(f"kernel {kernel.release} has just been removed; try again")
        yield
    finally:
        os.close(directory)


@dataclass(frozen=True)
class LineState:
    """Describe a line of kernels, the suites with the packages, and the releases in the cache, newest first."""

    kernel: str
    suites: tuple[str, ...]
    cached: tuple[str, ...]


def describe(cache: Path | None = None) -> list[LineState]:
    """Return the state of each line. Uses no network."""
    cache = cache_directory() if cache is None else cache
    return [
        LineState(line.name, line.suites, tuple(kernel.release for kernel in cached_kernels(line, cache)))
        for line in LINES.values()
    ]


def prune(line: KernelLine, cache: Path) -> list[str]:
    """Remove all kernels of a line but the newest, and return the releases. Kernels of running machines stay."""
    removed = []
    with _locked(cache, line):
        for kernel in cached_kernels(line, cache)[1:]:
            entry = kernel.image.parent
            trash = entry.with_name(f".making-{entry.name}")
            with contextlib.suppress(BlockingIOError), in_use(kernel, flock=fcntl.LOCK_EX | fcntl.LOCK_NB):
                entry.rename(trash)
                shutil.rmtree(trash, ignore_errors=True)
                for image in cache.glob(f"initramfs/{glob.escape(kernel.label)}-*.cpio"):
                    image.unlink(missing_ok=True)
                removed.append(kernel.release)
    return removed
