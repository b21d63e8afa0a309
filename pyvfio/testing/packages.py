"""Packages of Debian, downloaded and unpacked beside the package management of the machine."""

import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from pyvfio.testing.vm_errors import KernelUnavailableError, MissingToolError, find_tool

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_DEBIAN_SUITES = {"bookworm", "trixie", "forky", "oldstable", "stable", "testing", "sid", "unstable"}
_TARGET_FORMAT = "$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(CREATED_BY)"


def index_targets() -> str:
    """Return the repositories of the machine, as apt prints them. Works without package lists."""
    apt = find_tool("apt-get", package="apt")
    # Without --no-release-info, apt omits repositories without a downloaded list: all of them on a fresh machine.
    return run_tool([apt, "indextargets", "--no-release-info", "--format", _TARGET_FORMAT])


def source_list(suites: Sequence[str], targets: str) -> str:
    """Return an apt source list for suites of Debian, from the output of :func:`index_targets`.

    For a suite that the machine does not use, the mirror of another suite serves.

    :raises KernelUnavailableError: apt has no Debian repository, and so no mirror is known.
    """
    rows = [fields for fields in (row.split("|") for row in targets.splitlines()) if len(fields) == 4]
    uris = {suite: uri for uri, suite, component, kind in reversed(rows) if (component, kind) == ("main", "Packages")}
    mirror = next((uri for suite, uri in reversed(uris.items()) if suite in _DEBIAN_SUITES), None)
    if mirror is None:
        raise KernelUnavailableError(
            f"no package of {', '.join(suites)} can be fetched: apt knows no Debian repository on this machine",
            hint="Give the path of a kernel instead",
        )
    options = f"[arch=amd64 signed-by={_KEYRING}]"
    # Security updates have another mirror. A machine without that mirror gets the updates with the next point release.
    found = {suite: uris.get(suite, mirror) for suite in suites if suite in uris or "security" not in suite}
    return "".join(f"deb {options} {uri} {suite} main\n" for suite, uri in found.items())


class Apt:
    """Runs apt-get in separate directories, so that the machine's lists and caches do not change."""

    def __init__(self, work: Path, sources: str) -> None:
        if not _KEYRING.is_file():
            raise MissingToolError(str(_KEYRING), package="debian-archive-keyring")
        self._work = work
        (work / "state/lists/partial").mkdir(parents=True)
        (work / "cache/archives/partial").mkdir(parents=True)
        (work / "status").touch()
        (work / "sources.list").write_text(sources)
        # The hooks of the machine change the machine's caches, in any case.
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
            "APT::Sandbox::User": "root",  # the user _apt cannot write to the caller's directories
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
        }
        settings = [f'{name} "{value}";\n' for name, value in options.items()]
        (work / "apt.conf").write_text("".join(hooks + settings))

    def _run(self, program: str, *arguments: str) -> str:
        tool = find_tool(program, package="apt")
        return run_tool([tool, "-c", str(self._work / "apt.conf"), *arguments], cwd=self._work)

    def update(self) -> None:
        # Without Error-Mode, apt-get update exits with 0 even if no list could be downloaded.
        self._run("apt-get", "-q", "-o", "APT::Update::Error-Mode=any", "update")

    def package_names(self, prefix: str) -> list[str]:
        return self._run("apt-cache", "pkgnames", prefix).split()

    def record(self, package: str) -> str:
        return self._run("apt-cache", "show", "--no-all-versions", package)

    def dependencies(self, package: str) -> list[str]:
        return parse_depends(self.record(package))

    def download(self, packages: Sequence[str]) -> list[Path]:
        self._run("apt-get", "-q", "download", *packages)
        files = sorted(self._work.glob("*.deb"))
        if len(files) != len(packages):
            raise KernelUnavailableError(
                f"{len(files)} of the {len(packages)} packages {', '.join(packages)} were downloaded"
            )
        return files


def parse_depends(record: str) -> list[str]:
    """Return the names in the Depends field of a package record, the first of each alternative."""
    found = re.search(r"^Depends: (.*)$", record, re.MULTILINE)
    return [item.split("|")[0].split()[0] for item in found[1].split(",")] if found else []


def parse_field(record: str, name: str) -> str:
    """Return a field of one word of a package record.

    :raises KernelUnavailableError: the record has no such field.
    """
    found = re.search(rf"^{name}: (\S+)$", record, re.MULTILINE)
    if found is None:
        raise KernelUnavailableError(f"apt shows a package of the kernel without the field {name}")
    return found[1]


def run_tool(command: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Run a program to the end, and return its stdout.

    :raises KernelUnavailableError: the program failed; the message has the first errors.
    """
    done = subprocess.run(  # noqa: S603 - all words are from this package, and no shell reads them
        command,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise KernelUnavailableError(failure(command[0], done.returncode, done.stderr or done.stdout))
    return done.stdout


def failure(program: str, status: int, output: str) -> str:
    """Return a message for a program that failed: the lines of its output that name errors, else the end."""
    # make repeats the failure of a command for each directory above.
    lines = [line for line in output.splitlines() if not re.match(r"make(\[\d+\])?: ", line)]
    errors = [line for line in lines if line.startswith(("E:", "W:")) or " error: " in line]
    return f"{Path(program).name} failed ({status}): {'; '.join(errors[:4]) or chr(10).join(lines).strip()[-400:]}"


def unpack(package: Path, root: Path) -> None:
    """Unpack the files of a package below ``root``, and delete the package."""
    run_tool([find_tool("dpkg", package="dpkg"), "-x", str(package), str(root)])
    package.unlink()
