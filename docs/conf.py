"""How Sphinx builds the site: ``make docs``."""

from __future__ import annotations

import sys
from pathlib import Path

import doratune

sys.path.insert(0, str(Path(__file__).parent))  # the extension `directives`

project = "doratune"
copyright = "the doratune authors"
version = release = doratune.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click", "directives"]
exclude_patterns = ["_build"]
smartquotes = False  # they would make a dash of an option's --
html_theme = "furo"
html_title = f"doratune {release}"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures have them; Args: gives shapes and meaning
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_use_unqualified_type_names = True

nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(torch|nn|pathlib)\..*")]  # documented elsewhere
