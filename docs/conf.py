"""How Sphinx builds these pages: `make docs`. Nothing here, nor on the pages, needs the network."""

from __future__ import annotations

import re
from html import escape
from importlib.resources import files
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

import bioopt

project = "bioopt"
version = release = bioopt.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

default_role = "py:obj"  # `LocalRule` in a docstring is a link
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_type_aliases = {"Params": "Params"}
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False
python_maximum_signature_line_length = 60

html_theme = "furo"
html_title = "bioopt"
FONT = files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf"  # for equations
html_static_path = ["_static", "front_narrow.png", str(FONT)]
html_css_files = ["pages.css"]
html_copy_source = html_show_sphinx = html_show_copyright = False
html_math_renderer = "mathml"


def visit_math(self: Any, node: nodes.math) -> None:
    """An equation within a line, in MathML, which browsers render."""
    self.body.append(mathml(node, node.astext()))
    raise nodes.SkipNode


def visit_displaymath(self: Any, node: nodes.math_block) -> None:
    r"""Displayed equations; parts separated by \qquad are stacked on narrow pages."""
    self.body.append('<div class="equations">')
    self.body += [mathml(node, part, as_block=True) for part in node.astext().split(r"\qquad")]
    self.body.append("</div>")
    raise nodes.SkipNode


def mathml(node: nodes.Element, tex: str, **options: bool) -> str:
    """LaTeX as MathML; where the conversion fails, it warns and keeps the LaTeX."""
    # Primes, and indices of accented letters, which the converter renders differently from LaTeX.
    plain = re.sub(r"(\\(?:hat|tilde|bar) ?\w)_", r"\1{}_", tex.strip().replace("'", r"^\prime "))
    try:
        converted = tex2mathml(plain, **options)
    except MathError as error:
        logging.getLogger(__name__).warning("equation %r: %s", tex, error, location=node)
        return f"<code>{escape(tex)}</code>"
    # As in LaTeX, these grow after \left and \right alone.
    return re.sub(r"<mo( class=\"\w+\")?>([‖⟨⟩])</mo>", r'<mo stretchy="false">\2</mo>', converted)


def setup(app: Sphinx) -> None:
    """Register the MathML renderer."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
