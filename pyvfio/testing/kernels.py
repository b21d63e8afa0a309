"""Distribution kernels for the virtual machine: resolved when asked for, verified, and kept in a cache."""

import contextlib
import fcntl
import glob
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyvfio.testing.vm_errors import KernelUnavailableError, MissingToolError, find_tool

_log = logging.getLogger(__name__)

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_DEBIAN_SUITES = {"bookworm", "trixie", "forky", "oldstable", "stable", "testing", "sid", "unstable"}
_TARGET_FORMAT = "$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(CREATED_BY)"


@dataclass(frozen=True)
class KernelLine:
    """A line of kernels that the distribution keeps up to date, and the suites its packages are in."""

    name: str
    suites: tuple[str, ...]

    def has(self, release: str) -> bool:
        """Whether a kernel release (``uname -r``) belongs to this line."""
        return release.startswith(f"{self.name}.")


LINES: Mapping[str, KernelLine] = {
    line.name: line
    for line in (
        KernelLine("6.1", ("bookworm", "bookworm-updates", "bookworm-security")),
        KernelLine("6.12", ("bookworm-backports",)),
        KernelLine("7", ("trixie-backports",)),
    )
}


@dataclass(frozen=True)
class GuestKernel:
    """A kernel that can be booted; a snapshot of paths.

    :attr:`modules` is what ``/lib/modules/RELEASE`` would be, or None: then all that is needed must be built in.
    """

    release: str
    image: Path
    modules: Path | None


def cache_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Where kernels are kept unless told otherwise: ``$XDG_CACHE_HOME/pyvfio`` or ``~/.cache/pyvfio``."""
    base = environ.get("XDG_CACHE_HOME", "")
    # The base directory specification says that a relative path is to be ignored.
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "pyvfio"


def version_key(text: str) -> list[tuple[int, int, str]]:
    """Orders releases and package names by their numbers: 6.1.0-9 comes before 6.1.0-10."""
    parts = re.findall(r"\d+|\D+", text)
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]


def cached_kernels(line: KernelLine, cache: Path) -> list[GuestKernel]:
    """The kernels of a line that are whole in the cache, newest first. Asks no network."""
    # Half-made entries have a name that starts with a dot until the rename that ends their making.
    entries = [path for path in cache.glob(f"kernels/{line.name}/*") if not path.name.startswith(".")]
    entries = [path for path in entries if path.is_dir()]
    entries.sort(key=lambda path: version_key(path.name), reverse=True)
    return [GuestKernel(path.name, path / "vmlinuz", path / "modules") for path in entries]


def find_kernel(
    kernel: str, *, cache: Path | None = None, modules: Path | None = None, update: bool = False
) -> GuestKernel:
    """The kernel that a name of :data:`LINES` or the path of a bzImage stands for.

    A line is fetched when the cache has none of it, or when ``update`` is true and there is a newer one; that takes
    some ten to sixty seconds and 400 MB of disk. Else nothing is asked of any network.

    Synchronization: processes that want the same line wait for one another (flock).

    :param modules: for a path: the directory with ``modules.dep``. By default the first that exists of: the image's own
        directory, ``../lib/modules/RELEASE`` and ``lib/modules/RELEASE`` beside it, ``/lib/modules/RELEASE``.
    :raises KernelUnavailableError: no such line or file, or the line could not be fetched and is not cached.
    :raises MissingToolError: something must be fetched, and a tool for that is missing.
    """
    if kernel not in LINES:
        return custom_kernel(Path(kernel), modules=modules)
    line = LINES[kernel]
    cache = cache_directory() if cache is None else cache
    found = cached_kernels(line, cache)
    if not found or update:
        return _fetch(line, cache, before=found)
    return found[0]


def custom_kernel(image: Path, *, modules: Path | None = None) -> GuestKernel:
    """A bzImage of the caller's own; see :func:`find_kernel`."""
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
    """The release in a bzImage's header (the kernel's Documentation/arch/x86/boot.rst, ``kernel_version``)."""
    with image.open("rb") as file:
        head = file.read(0x10000)
    if head[0x202:0x206] != b"HdrS":
        raise KernelUnavailableError(f"{image} is not an x86 bzImage")
    start = 0x200 + int.from_bytes(head[0x20E:0x210], "little")
    words = head[start : start + 256].split(b"\0")[0].split()
    if start == 0x200 or not words:
        raise KernelUnavailableError(f"{image} does not say which release it is")
    return words[0].decode("ascii", "replace")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(line: KernelLine, cache: Path, *, before: Sequence[GuestKernel]) -> GuestKernel:
    with _locked(cache / "kernels" / f"{line.name}.lock"):
        found = cached_kernels(line, cache)
        if found and found != before:  # the one we waited for has fetched it
            return found[0]
        directory = cache / "kernels" / line.name
        directory.mkdir(exist_ok=True)
        for stale in directory.glob(".making-*"):  # ours alone under the lock: its maker is dead
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=directory) as work:
            try:
                _fetch_into(line, directory, Path(work))
            except KernelUnavailableError as error:
                if not found:
                    raise
                _log.warning("kernel %s stays at %s: %s", line.name, found[0].release, error)
        return cached_kernels(line, cache)[0]


def _fetch_into(line: KernelLine, directory: Path, work: Path) -> None:
    apt = _Apt(work, source_list(line, index_targets()))
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
        _run([find_tool("dpkg", package="dpkg"), "-x", str(package), str(root)])
        package.unlink()
    entry = arrange(root, release, work / "entry")
    _run([find_tool("depmod", package="kmod"), "-b", str(root), release])
    (root / "lib/modules" / release).rename(entry / "modules")
    entry.rename(directory / release)


def arrange(root: Path, release: str, entry: Path) -> Path:
    """Puts the image of unpacked packages at ``entry/vmlinuz``, and their modules where depmod looks for them."""
    merged, classic = root / "usr/lib/modules" / release, root / "lib/modules" / release
    if merged.is_dir():
        classic.parent.mkdir(parents=True, exist_ok=True)
        merged.rename(classic)
    images = [path for path in (root / "boot" / f"vmlinuz-{release}", classic / "vmlinuz") if path.is_file()]
    if not images or not classic.is_dir():
        raise KernelUnavailableError(f"the packages of kernel {release} have no image or no modules where expected")
    entry.mkdir()
    images[0].rename(entry / "vmlinuz")
    return entry


def index_targets() -> str:
    """What apt knows of the machine's own repositories; needs no package lists."""
    apt = find_tool("apt-get", package="apt")
    # Without --no-release-info apt leaves out what it has not downloaded yet: all of it on a fresh machine.
    return _run([apt, "indextargets", "--no-release-info", "--format", _TARGET_FORMAT])


def source_list(line: KernelLine, targets: str) -> str:
    """An apt source list for a line's suites, from the output of :func:`index_targets`.

    A suite that the machine does not use is taken from the mirror of one that it does.

    :raises KernelUnavailableError: the machine has no Debian repository to take a mirror from.
    """
    rows = [fields for fields in (row.split("|") for row in targets.splitlines()) if len(fields) == 4]
    uris = {suite: uri for uri, suite, component, kind in reversed(rows) if (component, kind) == ("main", "Packages")}
    mirror = next((uri for suite, uri in reversed(uris.items()) if suite in _DEBIAN_SUITES), None)
    if mirror is None:
        raise KernelUnavailableError(
            f"kernel {line.name} comes from Debian, and apt knows no Debian repository here",
            hint="Give the path of a kernel instead",
        )
    options = f"[arch=amd64 signed-by={_KEYRING}]"
    # Security updates have a mirror of their own; who does not use it gets them with the next point release.
    found = {suite: uris.get(suite, mirror) for suite in line.suites if suite in uris or "security" not in suite}
    return "".join(f"deb {options} {uri} {suite} main\n" for suite, uri in found.items())


def newest_image(line: KernelLine, names: Sequence[str]) -> str | None:
    """The newest generic kernel of a line among package names; no real-time, cloud or debug one."""
    pattern = re.compile(r"linux-image-(\d+\.\d+[^-]*(?:-\d+)?-amd64)")
    matches = [found for found in map(pattern.fullmatch, names) if found and line.has(found[1])]
    return max((found[0] for found in matches), key=version_key, default=None)


def kernel_packages(image: str, dependencies: Callable[[str], Sequence[str]]) -> list[str]:
    """An image's package and those that hold parts of the same kernel (since 7.0 it is split in several)."""
    release = image.removeprefix("linux-image-")
    wanted, todo = [], [image]
    while todo:
        package = todo.pop()
        if package in wanted:
            continue
        wanted.append(package)
        todo += [name for name in dependencies(package) if name.startswith("linux-") and name.endswith(f"-{release}")]
    return wanted


class _Apt:
    """apt-get with directories of its own, so that the machine's lists and caches stay as they are."""

    def __init__(self, work: Path, sources: str) -> None:
        if not _KEYRING.is_file():
            raise MissingToolError(str(_KEYRING), package="debian-archive-keyring")
        self._work = work
        (work / "state/lists/partial").mkdir(parents=True)
        (work / "cache/archives/partial").mkdir(parents=True)
        (work / "status").touch()
        (work / "sources.list").write_text(sources)
        # The machine's hooks work on its own caches, whatever directories are given here.
        hooks = [f"#clear APT::Update::{name};\n" for name in ("Pre-Invoke", "Post-Invoke", "Post-Invoke-Success")]
        options = {
            "Dir::Etc::sourcelist": f"{work}/sources.list",
            "Dir::Etc::sourceparts": "-",
            "Dir::Etc::preferences": "-",
            "Dir::Etc::preferencesparts": "-",
            "Dir::State": f"{work}/state",
            "Dir::State::status": f"{work}/status",
            "Dir::Cache": f"{work}/cache",
            "APT::Architecture": "amd64",
            "APT::Sandbox::User": "root",  # apt's own user cannot write to the caller's directories
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
        }
        settings = [f'{name} "{value}";\n' for name, value in options.items()]
        (work / "apt.conf").write_text("".join(hooks + settings))

    def _run(self, program: str, *arguments: str) -> str:
        tool = find_tool(program, package="apt")
        return _run([tool, "-c", str(self._work / "apt.conf"), *arguments], cwd=self._work)

    def update(self) -> None:
        # Without Error-Mode apt-get update ends with 0 though no list was had.
        self._run("apt-get", "-q", "-o", "APT::Update::Error-Mode=any", "update")

    def package_names(self, prefix: str) -> list[str]:
        return self._run("apt-cache", "pkgnames", prefix).split()

    def dependencies(self, package: str) -> list[str]:
        record = self._run("apt-cache", "show", "--no-all-versions", package)
        return parse_depends(record)

    def download(self, packages: Sequence[str]) -> list[Path]:
        self._run("apt-get", "-q", "download", *packages)
        files = sorted(self._work.glob("*.deb"))
        if len(files) != len(packages):
            raise KernelUnavailableError(f"{len(files)} of the packages {', '.join(packages)} were downloaded")
        return files


def parse_depends(record: str) -> list[str]:
    """The names in a package record's Depends, the first of each alternative."""
    found = re.search(r"^Depends: (.*)$", record, re.MULTILINE)
    return [item.split("|")[0].split()[0] for item in found[1].split(",")] if found else []


def _run(command: Sequence[str], *, cwd: Path | None = None) -> str:
    done = subprocess.run(  # noqa: S603 - the words are ours, and no shell sees them
        command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        words = [line for line in (done.stderr or done.stdout).splitlines() if line.startswith(("E:", "W:"))]
        reason = "; ".join(words[:4]) or (done.stderr or done.stdout).strip()[-400:]
        raise KernelUnavailableError(f"{Path(command[0]).name} failed ({done.returncode}): {reason}")
    return done.stdout


@contextlib.contextmanager
def in_use(kernel: GuestKernel, *, flock: int = fcntl.LOCK_SH) -> Iterator[None]:
    """As long as this lasts :func:`prune` leaves the kernel alone.

    :raises KernelUnavailableError: it has just been removed.
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
    """A line of kernels, the suites it can be had from, and the releases of it in the cache, newest first."""

    kernel: str
    suites: tuple[str, ...]
    cached: tuple[str, ...]


def describe(cache: Path | None = None) -> list[LineState]:
    """What is cached and what can be had; asks no network."""
    cache = cache_directory() if cache is None else cache
    return [
        LineState(line.name, line.suites, tuple(kernel.release for kernel in cached_kernels(line, cache)))
        for line in LINES.values()
    ]


def prune(line: KernelLine, cache: Path) -> list[str]:
    """Removes the kernels of a line but the newest, and returns their releases; a running machine keeps its own."""
    removed = []
    with _locked(cache / "kernels" / f"{line.name}.lock"):
        for kernel in cached_kernels(line, cache)[1:]:
            entry = kernel.image.parent
            trash = entry.with_name(f".making-{entry.name}")
            with contextlib.suppress(BlockingIOError), in_use(kernel, flock=fcntl.LOCK_EX | fcntl.LOCK_NB):
                entry.rename(trash)
                shutil.rmtree(trash, ignore_errors=True)
                for image in cache.glob(f"initramfs/{glob.escape(kernel.release)}-*.cpio"):
                    image.unlink(missing_ok=True)
                removed.append(kernel.release)
    return removed
