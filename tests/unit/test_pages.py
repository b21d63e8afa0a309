"""README.md and the pages it links to: what is copied from them runs, and what is followed is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pyvfio
from pyvfio.testing import FakeKernel

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FIRST = """with pyvfio.open_device("0000:00:02.0") as device, pyvfio.RamBlockList() as blocks:\n"""
INSIDE = 8 * " "


def programs(page: str) -> list[str]:
    """What is written in Python on it."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    """Those within the repository."""
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", ["docs/memory.md", "docs/resizing.md"])
def test_the_programs_of_the_pages_go_on_from_that_of_the_readme(page: str) -> None:
    """One after the other, with the objects that they take for granted; the fake in place of the running kernel."""
    first = next(program for program in programs("README.md") if FIRST in program)
    program = first.replace(
        FIRST, FIRST.replace('2.0"', '2.0", kernel=kernel').replace("List()", "List(kernel=kernel)")
    )
    for more in programs(page):
        program += "".join(INSIDE + line for line in more.splitlines(keepends=True))
    with FakeKernel() as kernel:
        names: dict[str, object] = {"kernel": kernel}
        exec(program, names)  # noqa: S102
        assert isinstance(names["ring"], pyvfio.RamBlock)
        assert kernel.mappings() == ()
        kernel.check()
