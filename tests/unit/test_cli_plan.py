"""`pyvfio plan`, `pyvfio draw` and `pyvfio demo --svg`: their output, their documents and their exit status."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from pyvfio.cli import demo, draw, plan
from pyvfio.cli.main import main
from pyvfio.errors import VfioError
from pyvfio.picture import Picture
from pyvfio.testing import FakeKernel
from pyvfio.units import GIB, KIB, MIB, TIB

DOCS = Path(__file__).resolve().parents[2] / "docs"
FAKE = ("--fake", "6.12")


def drawn(path: Path) -> ET.Element:
    """The SVG that a command has written, parsed."""
    return ET.parse(path).getroot()  # noqa: S314


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("0x1000", 4096),
        ("64K", 64 * KIB),
        ("2M", 2 * MIB),
        ("2MiB", 2 * MIB),
        ("1G", GIB),
        ("3T", 3 * TIB),
    ],
)
def test_a_size_is_read_as_people_write_it(text: str, size: int) -> None:
    """With a unit or without."""
    assert plan.size_argument(text) == size


@pytest.mark.parametrize("word", ["ring", "ring=", "=4K", "ring=x", "ring=4K:", "ring=-1", "ring=4k:8k", "ring=1:2:3"])
def test_wrong_words_end_with_status_2(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And usage on stderr; `4K:` alone means that the block cannot grow."""
    if word == "ring=4K:":
        assert plan.block_argument(word)[1:3] == (4096, 4096)
        return
    with pytest.raises(SystemExit) as ended:
        plan.main([*FAKE, word])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("; see pyvfio plan --help\n")


@pytest.mark.parametrize("words", [["ring=4K"], ["0000:00:03.0", *FAKE, "ring=4K"], list(FAKE), [*FAKE, "ring=100:4K"]])
def test_a_plan_needs_one_device_and_blocks_that_can_be(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Status 2 for all else."""
    with pytest.raises(SystemExit) as ended:
        plan.main(words)
    assert ended.value.code == 2
    assert "; see pyvfio plan --help" in capsys.readouterr().err


def test_a_plan_of_blocks_that_fit_ends_with_0_and_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    """In words and as a picture."""
    assert plan.main([*FAKE, "ring=64K:1M", "data=2M:1G"]) == 0
    out = capsys.readouterr().out
    assert "ring: 64 KiB of 1 MiB at IOVA" in out
    assert re.search(r"0x\w+ +data +▒+░+ +2 MiB of 1 GiB", out)


def test_a_plan_that_does_not_fit_ends_with_1_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    """The granule would need more mappings than there are."""
    assert plan.main([*FAKE, "data=2G:8G", "--resize", "extend", "--granule", "4K", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "pyvfio.plan/1"
    assert not document["fits"]
    assert "The smallest granule that would fit" in document["shortages"][0]


@pytest.mark.parametrize(
    ("words", "space"), [([], "type1"), (["--iommu", "type1"], "type1"), (["--space", "iommufd"], "iommufd")]
)
def test_a_plan_is_for_the_address_space_that_is_asked_for(
    words: list[str], space: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With no limit of mappings on iommufd: granules that a container cannot hold fit there."""
    granules = ["data=2G:8G", "--resize", "extend", "--granule", "4K", "--json"]
    assert plan.main([*FAKE, *granules, *words]) == (0 if space == "iommufd" else 1)
    document = json.loads(capsys.readouterr().out)
    assert (document["space"], document["entries_left"] is None) == (space, space == "iommufd")
    assert document["memlock_counts_by"] == ("user" if space == "iommufd" else "process")


def test_a_fake_kernel_has_the_names_of_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--fake", "7", "data=2M", "--space", "iommufd"]) == 0
    with pytest.raises(SystemExit):
        plan.main(["--fake", "8", "data=2M"])
    assert "unknown kernel version '8': the fake can be 6.1, 6.12, 7.3" in capsys.readouterr().err


def test_cuts_are_planned_on_iommufd_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """Type1 cannot unmap part of a mapping."""
    assert plan.main([*FAKE, "data=2M:1G", "--resize", "cut", "--iommu", "iommufd"]) == 0
    assert "no limit" in capsys.readouterr().out
    for words in (FAKE, ("--fake", "6.1", "--iommu", "iommufd")):
        with pytest.raises(SystemExit) as ended:
            plan.main([*words, "data=2M:1G", "--resize", "cut"])
        assert ended.value.code == 2


def test_the_address_space_of_a_device_is_drawn_of_either_kind(capsys: pytest.CaptureFixture[str]) -> None:
    """A document has a space already."""
    with FakeKernel("7.3", iommufd=True) as kernel:
        titles = {}
        for iommu in ("type1", "iommufd"):
            assert draw.main([kernel.bdfs[0], "--iommu", iommu, "--json"], kernel=kernel) == 0
            titles[iommu] = json.loads(capsys.readouterr().out)["title"]
        kernel.check()
    assert titles == {"type1": "container of IOMMU group 2: 0 mappings", "iommufd": "I/O address space 1: 0 mappings"}
    with pytest.raises(SystemExit) as ended:
        draw.main(["-", "--iommu", "iommufd"])
    assert ended.value.code == 2


def test_a_plan_is_made_on_a_device_by_its_address(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the kernel that is there; nothing stays open."""
    with FakeKernel() as kernel:
        assert plan.main([kernel.bdfs[0], "ring=64K", "--json"], kernel=kernel) == 0
        kernel.check()
    assert Picture.from_json(json.loads(capsys.readouterr().out)["picture"]).spans[0].name == "ring"


def test_each_document_with_pictures_can_be_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Of plan, of draw and of demo."""
    assert plan.main([*FAKE, "ring=64K:1M", "--json"]) == 0
    saved = tmp_path / "plan.json"
    saved.write_text(capsys.readouterr().out)
    assert draw.main([str(saved), "--json"]) == 0
    saved.write_text(capsys.readouterr().out)
    assert draw.main([str(saved), "--ascii"]) == 0
    out = capsys.readouterr().out
    assert out.isascii()
    assert re.search(r"ring +o+\.+ +64 KiB of 1 MiB", out)
    assert demo.main(["--fake", "--json"]) == 0
    saved.write_text(capsys.readouterr().out)
    assert draw.main([str(saved)]) == 0
    assert capsys.readouterr().out.count("logarithmic") == 3


def test_control_characters_in_names_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    """In the list of blocks and in the picture: a name cannot move the cursor of a terminal."""
    assert plan.main([*FAKE, "a\x1b[31m\nb\x9b\u202e=4K"]) == 0
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable()
    assert out.count(r"a\x1b[31m\nb\x9b\u202e") == 2


def test_stdin_is_drawn_into_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As SVG."""
    with FakeKernel() as kernel:
        assert draw.main([kernel.bdfs[0], "--svg", str(tmp_path / "device.svg")], kernel=kernel) == 0
    assert drawn(tmp_path / "device.svg").tag.endswith("svg")
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(Picture("t", (), (), 39).to_json())))
    assert draw.main(["-", "--svg", str(tmp_path / "stdin.svg")]) == 0
    assert "<title>t</title>" in (tmp_path / "stdin.svg").read_text()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "3",
        "[" * 100_000,
        " " * (64 * MIB + 1),
        '{"picture": 3}',
        '{"pictures": []}',
        '{"schema": "pyvfio.list/1"}',
    ],
)
def test_what_is_no_picture_is_said_in_a_line(text: str, tmp_path: Path) -> None:
    """With the schema that can be read."""
    (tmp_path / "file").write_text(text)
    with pytest.raises(VfioError, match=r"no picture can be read: .*pyvfio\.picture/1"):
        draw.main([str(tmp_path / "file")])


@pytest.mark.long
@pytest.mark.parametrize(
    ("redirection", "why"), [("<&-", "stdin is closed"), (r"< <(printf '\xff')", "no picture can be read")]
)
def test_a_stdin_that_cannot_be_read_is_said_in_a_line(redirection: str, why: str) -> None:
    """Without a traceback: closed, or not UTF-8."""
    command = f"{sys.executable} -m pyvfio draw - {redirection}"
    ended = subprocess.run(
        ["/bin/bash", "-c", command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"pyvfio draw: {why}")
    assert ended.stderr.count("\n") == 1


def test_the_demo_draws_before_and_after_a_resize(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three pictures: 2, 4 and 2 MiB in use."""
    assert demo.main(["--fake", "--svg", str(tmp_path / "demo.svg")]) == 0
    root = drawn(tmp_path / "demo.svg")
    labels = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text") if "of 1 GiB" in (text.text or "")]
    assert labels == ["2 MiB of 1 GiB", "4 MiB of 1 GiB", "2 MiB of 1 GiB"]
    assert "Every step held." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resize", ["demo", "--fake", "--kernel", "6.12"]),
        ("plan", ["plan", *FAKE, "ring=64K:1M", "data=2G:64G"]),
    ],
)
def test_the_pictures_of_the_pages_are_what_the_commands_draw(name: str, words: list[str], tmp_path: Path) -> None:
    """docs/pictures.md names the commands."""
    assert main([*words, "--svg", str(tmp_path / "picture.svg")]) == 0
    assert (DOCS / f"picture-{name}.svg").read_text() == (tmp_path / "picture.svg").read_text()
