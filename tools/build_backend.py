"""The build of the package: setuptools, with the completions and the manual page of `pyvfio` in the wheel.

A wheel has the pages below `build/share`, from where pyproject.toml takes them as data files. An editable installation
has none and needs none of the packages that make them: the set-up of a development environment stays short.
Source: PEP 517, PEP 660; "in-tree build backends" in pip's manual.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings: TypeAlias = "Mapping[str, str | list[str] | None] | None"

SHARE = Path("build/share")
_MAKERS = ["shtab>=1.7.2", "ioctl-opt>=1.3"]  # the commands import ioctl-opt


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """Return the packages that a build needs besides setuptools."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_MAKERS]


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Make the pages, then the wheel. Return the name of the wheel."""
    from tools.cli_pages import write_pages  # noqa: PLC0415 (other builds have no shtab)

    shutil.rmtree(SHARE, ignore_errors=True)
    write_pages(SHARE)
    return str(build_meta.build_wheel(wheel_directory, config_settings, metadata_directory))


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    """Make the source distribution, without pages that an earlier build left. Return the name."""
    shutil.rmtree(SHARE, ignore_errors=True)
    return str(build_meta.build_sdist(sdist_directory, config_settings))
