"""Sphinx settings of the book; `make docs` builds it. Nothing is executed; no page loads from elsewhere."""

import configparser
import re
import sys
from importlib.metadata import distribution
from pathlib import Path

settings = configparser.ConfigParser(delimiters=["="])
settings.read(Path(__file__).resolve().parents[1] / "settings.ini", encoding="utf-8")

project = settings["DEFAULT"]["title"]
release = settings["DEFAULT"]["version"]
author = settings["DEFAULT"]["author"]
copyright = settings["DEFAULT"]["copyright"]
language = "en"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.mathjax"]
root_doc = "index"

# notebooks are shown as they were run
nb_execution_mode = "off"
nb_render_markdown_format = "gfm"
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
nb_ipywidgets_js: dict = {}  # live widgets would fetch scripts from elsewhere; a static picture stays
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
suppress_warnings = [
    "myst.header",  # a results table that begins with a lower heading than its page
    "mystnb.unknown_mime_type",  # a widget's own type, beside the picture that is shown
    "ref.python",  # a type in a signature (bytes, model) that is also the name of a field somewhere
]

# one file, formulas as SVG: neither fonts nor anything else is fetched
mathjax_file = distribution("sphinx-mathjax-offline").locate_file(
    "sphinx-mathjax-offline/static/mathjax/tex-svg.js"
)
mathjax_path = "tex-svg.js"

autodoc_default_options = {
    "member-order": "bysource",
    "undoc-members": True,
    "no-value": True,
    "exclude-members": "__new__",
}
autodoc_typehints_format = "short"
autosummary_generate = False
toc_object_entries = False
python_maximum_signature_line_length = 88
default_role = "code"

html_theme = "sphinx_book_theme"
html_title = "covidsev"
html_static_path = ["_static", str(mathjax_file)]
html_css_files = ["book.css"]
html_search_scorer = str(Path(__file__).parent / "scorer.js")  # the page that explains a word comes before those that use it
html_copy_source = False
html_use_index = html_domain_indices = False  # the reference and the search lead to every name
html_show_sphinx = False
html_show_copyright = False
html_last_updated_fmt = None
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "home_page_in_toc": True,
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    "navbar_persistent": [],  # the search field stands in the side bar
    "extra_footer": "Research software, not a medical device.",
}


def plain(app, what, name, obj, options, lines):
    """Docstrings are plain words with `code`: names of the same module become links, and marks that
    reStructuredText would read otherwise are escaped."""
    if lines and lines[0].startswith("Alias for field number"):  # Python's own words on a named tuple
        lines.clear()
    module = ".".join(name.split(".")[:2])
    known = set(getattr(sys.modules.get(module), "__all__", ()))
    for number, line in enumerate(lines):
        pieces = re.split(r"(``.+?``|`[^`]+`)", line)
        pieces[::2] = [re.sub(r"([*|\\]|_(?=\W|$))", r"\\\1", piece) for piece in pieces[::2]]
        pieces[1::2] = [
            f":py:obj:`~{module}.{piece[1:-1]}`" if piece[1:-1] in known else piece for piece in pieces[1::2]
        ]
        lines[number] = "".join(pieces)


def setup(app):
    app.connect("autodoc-process-docstring", plain)
