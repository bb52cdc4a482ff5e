"""Sphinx configuration: `make docs` builds with warnings as errors and without a network."""

import re
import shutil
from dataclasses import astuple
from importlib.metadata import version as installed_version
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

from moda_reference import glossary

project = "moda-ops"
author = "The moda-ops authors"
copyright = "2026, The moda-ops authors"
version = release = installed_version("moda-ops")

# Sphinx reads pages below its own folder alone, and MyST follows a symbolic link out of it.
pages = Path(__file__).parent / "tutorials"
shutil.rmtree(pages, ignore_errors=True)
shutil.copytree(
    pages.parents[1] / "tutorials", pages, ignore=shutil.ignore_patterns(".*", "_*", "*.py")
)

rows = [astuple(symbol) for symbol in glossary.GLOSSARY]
rows = [("symbol", "shape", "meaning", "in the paper"), ("---",) * 4, *rows]
(Path(__file__).parent / "_glossary.txt").write_text(
    "\n".join(f"| {' | '.join(row)} |" for row in rows)
)

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"moda-ops {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {  # a line of 100 characters fits
    name: {"code-font-size": "0.77rem"} for name in ("light_css_variables", "dark_css_variables")
}
pygments_dark_style = "monokai"
maximum_signature_line_length = 88

nb_execution_mode = "off"  # notebooks are committed with their outputs
nb_code_prompt_show = "Show the {type}"
nb_code_prompt_hide = "Hide the {type}"
myst_enable_extensions = ["deflist", "dollarmath"]
highlight_language = "none"  # literal blocks in docstrings are equations

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(torch|transformers|numpy|np|npt|collections)\..*")]
# Sphinx reads the overloads of a decorated function in the decorator's module, without these names.
nitpick_ignore = [("py:class", name) for name in ("Tensor", "DepthArgument", "Window", "Plan")]

html_math_renderer = "mathml"  # browsers show it without MathJax, so without a network


def write_inline(translator: nodes.NodeVisitor, node: nodes.math) -> None:
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def write_block(translator: nodes.NodeVisitor, node: nodes.math_block) -> None:
    translator.body.append(f"<p class='equation'>{convert(node.astext(), display='block')}</p>")
    raise nodes.SkipNode


def show_paths_plainly(app: Sphinx, context: object, lines: list[str]) -> None:
    """A default of the command line, ``PosixPath('out')``, as the path that it is."""
    lines[:] = [re.sub(r"PosixPath\('(.*)'\)", r"\1", line) for line in lines]


def setup(app: Sphinx) -> None:
    app.connect("sphinx-click-process-options", show_paths_plainly)
    app.add_html_math_renderer("mathml", (write_inline, None), (write_block, None))
