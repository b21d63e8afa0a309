"""Settings of the site: `python -m tools.site` builds the pages of this folder with Sphinx."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyvfio
from tools import site

project = "pyvfio"
author = "The pyvfio authors"
copyright = author  # noqa: A001 (Sphinx's name)
version = release = pyvfio.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

myst_heading_anchors = 4  # the anchors that forges make of headings, so that a link holds in both places
myst_enable_extensions = ["colon_fence"]

nitpicky = True
nitpick_ignore_regex = site.FOREIGN
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autoclass_content = "both"
python_use_unqualified_type_names = True
add_module_names = False
maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"pyvfio {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False


def setup(app):
    """Add the directive of the reference, and the docstrings' own markup."""
    site.setup(app)
