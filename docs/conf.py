"""Sphinx configuration: `make docs` builds with warnings as errors and without a network."""

from importlib.metadata import version as installed_version

project = "moda-ops"
author = "The moda-ops authors"
copyright = "2026, The moda-ops authors"
version = release = installed_version("moda-ops")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"moda-ops {version}"

nb_execution_mode = "off"  # notebooks are committed with their outputs
myst_enable_extensions = ["deflist"]
highlight_language = "none"  # literal blocks in docstrings are equations

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(torch|transformers|numpy|np|npt|collections)\..*")]
