"""Sphinx: pages in Markdown, the reference from docstrings, pictures made at build time.

python -m sphinx -W --keep-going -b html docs docs/_build/html
python -m sphinx -W --keep-going -b doctest docs docs/_build/doctest
"""

import doctest
import re
import sys
from pathlib import Path

import scipy.linalg  # noqa: F401  # it brings a BLAS of its own
import threadpoolctl
from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

HERE = Path(__file__).parent
LOG = logging.getLogger(__name__)
sys.path.insert(0, str(HERE))

import generated  # noqa: E402  # beside this file

import fusedstep  # noqa: E402

threadpoolctl.threadpool_limits(1, "blas")  # examples have small matrices, see fusedstep.demo

project = "fusedstep"
author = "the fusedstep authors"
version = release = fusedstep.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "_generated"]
nitpicky = True
nitpick_ignore_regex = [
    ("py:exc", ".*"),  # Python's own, in Raises
    ("py:obj", ".*"),  # single backticks: a link where there is such a name, else just code
]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# For `:skipif:`, of examples that need what the page is about.
doctest_global_setup = """
import importlib.util


def missing(*modules):
    return any(importlib.util.find_spec(name) is None for name in modules)
"""
doctest_default_flags = doctest.DONT_ACCEPT_TRUE_FOR_1  # errors' messages are compared too

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # Args say it in words
default_role = "py:obj"
napoleon_custom_sections = [
    "Use",
    "State",
    "Reference",
    "Differs from",
    ("Attributes", "params_style"),
]
napoleon_numpy_docstring = False
napoleon_use_rtype = False  # Returns are sentences

html_theme = "furo"
html_title = f"fusedstep {release}"
html_static_path = ["_static"]
html_css_files = ["fusedstep.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_math_renderer = "mathml"
pygments_style = "friendly"


MADE_BY_OTHERS = {
    "fusedstep.FlatBuffer",
    "fusedstep.ParamGroup",
    "fusedstep.torch.Flat",
    "fusedstep.torch.Optimizer",
}


def as_rst(app, what, name, obj, options, lines):
    """Makes a literal block of what a docstring indents under a paragraph: its equation."""
    if what == "property" and lines:
        # napoleon takes what stands before a colon for the type, but not where the line ends there.
        lines[:1] = re.split("(?<=:) ", lines[0], maxsplit=1)
    result = []
    margin = 0  # of the last line that was not empty
    literal = False
    for line in lines:
        here = len(line) - len(line.lstrip())
        if line and not here:
            literal = False
        elif line and not margin and result and not result[-1]:
            result += [".. code-block:: text", ""]
            literal = True
        if literal:
            result.append(f"   {line}".rstrip())
        else:
            # `.name` is code, not a search for whatever is called so.
            result.append(re.sub(r"(^|[\s(])`(?=\.\w)", r"\1`!", line))
        margin = here if line else margin
    lines[:] = result


def without_constructor(app, what, name, obj, options, signature, returns):
    """Leaves out the arguments of classes that other functions make."""
    return ("", returns) if name in MADE_BY_OTHERS else None


def skip_fields(app, what, name, obj, skip, options):
    """Leaves out the fields of named tuples: the signature has them."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def without_repository_links(app, relative_path, parent_docname, content):
    """What pages include from the READMEs: links to files become the files' names."""
    content[0] = re.sub(r"\[([^]]+)\]\((?!https?:|#)[^)]+\)", r"`\1`", content[0])


def visit_math(self, node):
    """Equations as MathML, which browsers draw themselves; the pages load nothing from afar."""
    try:
        self.body.append(tex2mathml(node.astext(), as_block=node.tagname == "math_block"))
    except MathError as error:
        LOG.warning("%s", error, location=node)
    raise nodes.SkipNode


def setup(app):
    app.connect("autodoc-process-docstring", as_rst, priority=400)  # napoleon has 500
    app.connect("autodoc-process-signature", without_constructor)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("include-read", without_repository_links)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.connect("builder-inited", lambda app: generated.write(HERE / "_generated", LOG.info))
