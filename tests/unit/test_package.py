"""The two distributions: made from the tree, installed into an empty environment, and used outside of the clone."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from email.parser import HeaderParser
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement

import pyvfio
from pyvfio import guard

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCAL = ("pyvfio", "typing_extensions", "_typeshed")  # the last two are for type checkers
MADE_HERE = (".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that has to succeed, without this environment's variables for Python. Return the output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def build(kind: str, source: Path, target: Path) -> tuple[Path, str]:
    """Make the distribution `kind` of `source`, without fetching anything. Return the file and the output."""
    options = ("--no-isolation", f"--{kind}", "--outdir", target)
    said = run("sh", "-c", '"$@" 2>&1', "sh", sys.executable, "-m", "build", *options, source, cwd=target)
    (made,) = target.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return made, said


def complaints(said: str) -> list[str]:
    """Return the warnings of a build, without those that name nothing of the project."""
    harmless = ("no previously-included files matching", "byte-compiling is disabled")
    lines = [line for line in said.splitlines() if re.search("warning|deprecat", line, re.IGNORECASE)]
    return [line for line in lines if not any(words in line for words in harmless)]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The source distribution of the tree, and the wheel that is built from the source distribution alone."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*MADE_HERE), symlinks=True)
    sdist, said = build("sdist", folder / "tree", folder)
    assert complaints(said) == []
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    wheel, said = build("wheel", source, folder)
    assert complaints(said) == []
    return {"sdist": sdist, "source": source, "wheel": wheel}


def _files_of(root: Path) -> set[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return {name for name in listed.stdout.splitlines() if (root / name).is_file()}
    files = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return {str(path) for path in files if not any(Path(part).match(made) for part in path.parts for made in MADE_HERE)}


@pytest.mark.long
def test_the_source_distribution_has_all_that_a_clone_has(distributions: dict[str, Path]) -> None:
    """Pages, examples, tests, scripts and tools; scripts can be run."""
    source = distributions["source"]
    there = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    wanted = {name for name in _files_of(ROOT) if name != ".gitignore"}
    assert wanted - there == set()
    assert os.access(source / "scripts/test", os.X_OK)


def test_the_wheel_has_the_package_and_nothing_else(distributions: dict[str, Path]) -> None:
    """Each module of `pyvfio`, the mark of types, the licence, and files for /usr/share; no test, tool or example."""
    names = zipfile.ZipFile(distributions["wheel"]).namelist()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "pyvfio").rglob("*.py")}
    about = f"pyvfio-{pyvfio.__version__}"
    package = {name for name in names if not name.startswith((f"{about}.dist-info/", f"{about}.data/data/share/"))}
    assert package == {*modules, "pyvfio/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_metadata_is_as_indexes_want_it(distributions: dict[str, Path]) -> None:
    """Valid in all fields; a licence expression; the version of the package; no address of a host."""
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        text = wheel.read(name).decode("utf-8")
    metadata = Metadata.from_email(text, validate=True)
    assert str(metadata.version) == pyvfio.__version__
    assert (metadata.license_expression, metadata.license_files) == ("MIT", ["LICENSE"])
    assert metadata.description_content_type == "text/markdown"
    fields = HeaderParser().parsestr(text)
    assert fields.get_all("Project-URL", []) == fields.get_all("Home-page", []) == []
    assert not [each for each in fields.get_all("Classifier", []) if each.startswith("License ::")]


def test_classifiers_name_the_pythons_that_the_tests_run_on() -> None:
    """From the first that is required on, without a gap."""
    minors = [int(found[1]) for each in PROJECT["classifiers"] if (found := re.search(r":: 3\.(\d+)$", each))]
    assert minors == list(range(11, 11 + len(minors)))
    assert PROJECT["requires-python"] == ">=3.11"


def test_extras_are_those_that_the_pages_name() -> None:
    """All that `numpy`, `cli` and `docs` need, `dev` has too, but for their limits."""
    declared = PROJECT["optional-dependencies"]
    extras = {name: {Requirement(each).name for each in wanted} for name, wanted in declared.items()}
    assert set(extras) == {"numpy", "cli", "docs", "dev"}
    assert extras["numpy"] | extras["cli"] | extras["docs"] <= extras["dev"]


@pytest.mark.long
def test_each_package_that_is_imported_is_declared() -> None:
    """At run time, in an extra of users, or pytest, which the plugin runs in; and nothing is declared in vain."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "pyvfio").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    imported = {name.split(".")[0] for name in names} - {*sys.stdlib_module_names, *LOCAL}
    owners = packages_distributions()
    extras = PROJECT["optional-dependencies"]
    declared = {Requirement(each).name for each in (*PROJECT["dependencies"], *extras["numpy"], *extras["cli"])}
    assert {owners[name][0] for name in imported} == {*declared, "pytest"}


_BUILD_EDITABLE = (
    "import sys; from tools import build_backend as b; b.build_editable(sys.argv[1], dict([sys.argv[2:]]))"
)


@pytest.mark.long
def test_a_type_checker_finds_the_installation_that_the_readme_names_for_it(
    distributions: dict[str, Path], tmp_path: Path
) -> None:
    """By a directory in a .pth file: a type checker runs no import hook, which -e alone installs."""
    (setting,) = re.findall(r"--config-settings\s+(\w+)=(\w+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    run(sys.executable, "-c", _BUILD_EDITABLE, tmp_path, *setting, cwd=distributions["source"])
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [name for name in archive.namelist() if name.endswith(".pth")]
        lines = archive.read(path).decode().splitlines()
    assert [(Path(line) / "pyvfio" / "py.typed").is_file() for line in lines] == [True]


@pytest.fixture(scope="module")
def bare(distributions: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment in which is the wheel, with the dependencies that it declares."""
    place = tmp_path_factory.mktemp("bare") / "environment"
    venv.create(place, with_pip=True)
    programs = place / "bin"
    for package in _dependencies():
        _copy(package, place)
    run(programs / "python", "-m", "pip", "install", "--quiet", "--no-index", distributions["wheel"], cwd=place)
    run(programs / "python", "-m", "pip", "check", cwd=place)
    return programs


def _dependencies() -> Iterator[str]:
    for required in PROJECT["dependencies"]:
        yield Requirement(required).name


def _copy(package: str, environment: Path) -> None:
    """Copy an installed package, as installing would; no index is asked."""
    (target,) = environment.glob("lib/python*/site-packages")
    for file in distribution(package).files or ():
        source = Path(str(file.locate()))
        if ".." not in file.parts and source.is_file():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target / file)


@pytest.mark.long
def test_the_installed_command_works_outside_of_the_clone(bare: Path, tmp_path: Path) -> None:
    """Version, help, the list of devices and the demonstration on the fake kernel; `python -m pyvfio` is the same."""
    assert run(bare / "pyvfio", "--version", cwd=tmp_path) == f"pyvfio {pyvfio.__version__}\n"
    assert run(bare / "python", "-m", "pyvfio", "--version", cwd=tmp_path) == f"pyvfio {pyvfio.__version__}\n"
    run(bare / "pyvfio", "list", cwd=tmp_path)
    assert "fake" in run(bare / "pyvfio", "demo", "--fake", cwd=tmp_path)
    where = run(bare / "python", "-c", "import pyvfio; print(pyvfio.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(bare.parent)


@pytest.mark.long
def test_the_first_program_of_the_readme_runs_where_pyvfio_is_installed(bare: Path, tmp_path: Path) -> None:
    """Without a change, in a directory of its own, and with each warning an error."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    program = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]
    said = run(bare / "python", "-W", "error", "-c", program, cwd=tmp_path).splitlines()
    assert [line.split()[0] for line in said] == ["4", "1"]
    assert said[0].split()[-1] == said[1].split()[-1]


def test_a_python_without_the_gil_is_refused() -> None:
    """With the way to turn the GIL on. With the GIL, nothing happens."""
    guard.check_gil(enabled=True)
    with pytest.raises(ImportError, match="PYTHON_GIL=1"):
        guard.check_gil(enabled=False)


def test_without_the_gil_the_package_can_be_imported_and_its_objects_cannot(tmp_path: Path) -> None:
    """So pytest, which imports the package for the plugin, starts there too."""
    program = """
import sys
sys._is_gil_enabled = lambda: False  # as a build without the GIL answers
import pyvfio, pyvfio.testing.pytest_plugin
pyvfio.ioctls.VFIO_BASE, pyvfio.MIB
for name in ("RamBlockList", "open_device", "DmaMapper"):
    try:
        getattr(pyvfio, name)
    except ImportError as error:
        print("GIL" in str(error))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("True\n" * 3, "")
