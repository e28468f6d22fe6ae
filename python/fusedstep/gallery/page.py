"""The gallery's page: one HTML file that needs nothing but the pictures beside it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from string import Template

from fusedstep._version import __version__
from fusedstep.gallery.figures import Entry

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Training by gradient descent, in figures</title>
<style>
:root { color-scheme: light dark; --text: #1d2129; --soft: #59606b; --back: #fff; --panel: #f5f6f8;
  --line: #dcdfe4; --link: #0060a8; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e6ea; --soft: #a4abb6; --back: #15181d;
  --panel: #1f242b; --line: #363c45; --link: #6cb8f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; background: var(--back);
  color: var(--text); font: 17px/1.55 system-ui, sans-serif; }
h1 { line-height: 1.2; } h2 { line-height: 1.3; margin: 0 0 .4rem; font-size: 1.35rem; }
a { color: var(--link); } nav ol { columns: 22rem; column-gap: 3.5rem; padding-left: 1.6rem; }
nav li { break-inside: avoid; margin-bottom: .3rem; }
section { border-top: 1px solid var(--line); margin-top: 2.5rem; padding-top: 1.8rem; }
figure { margin: 1rem 0; } img { display: block; width: 100%; height: auto; background: #fff;
  border-radius: 6px; } figcaption { margin-top: .6rem; }
@media (max-width: 40rem) { figure a { display: block; overflow-x: auto; } img { width: 46rem; } }
.equation, .highlight { background: var(--panel); border-radius: 6px; }
.equation { padding: .5rem .9rem; font-family: ui-monospace, monospace; font-size: .9rem;
  overflow-wrap: anywhere; }
.highlight pre { margin: 0; padding: .8rem .9rem; overflow-x: auto; font-size: .82rem;
  line-height: 1.45; }
.source { color: var(--soft); font-size: .9rem; } footer { margin-top: 3rem; color: var(--soft); }
$light
@media (prefers-color-scheme: dark) {
$dark
}
</style>
</head>
<body>
<h1>Training by gradient descent, in figures</h1>
<p>Why gradient descent stalls, which learning rate makes it converge, and what momentum, schedules
and adaptive methods change. Each figure is drawn by the function below it, which runs after
<code>from fusedstep.gallery.figures import *</code> and returns a matplotlib figure.</p>
<nav aria-label="figures"><ol>
$contents
</ol></nav>
<main>
$sections
</main>
<footer>fusedstep $version, <code>fusedstep gallery</code></footer>
</body>
</html>
""")

_SECTION = Template("""<section id="$name">
<h2>$question</h2>
<figure>
<a href="$name.png"><img src="$name.png" alt="$title" loading="lazy"></a>
<figcaption>$caption</figcaption>
</figure>
<p class="equation">$equation</p>
$code
<p class="source">Source: $source</p>
</section>""")


def page(entries: Sequence[Entry]) -> str:
    """The page that shows `entries`."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    def style(name: str) -> str:
        rules = HtmlFormatter(style=name, nobackground=True).get_style_defs(".highlight")
        return "\n".join(rule for rule in rules.splitlines() if rule.startswith(".highlight"))

    sections = []
    for entry in entries:
        texts = {
            key: escape(getattr(entry, key))
            for key in ("name", "title", "caption", "question", "equation", "source")
        }
        code = highlight(entry.code, PythonLexer(), HtmlFormatter())
        sections.append(_SECTION.substitute(texts, code=code.strip()))
    contents = "\n".join(
        f'<li><a href="#{escape(entry.name)}">{escape(entry.title)}</a></li>' for entry in entries
    )
    return _PAGE.substitute(
        light=style("default"),
        dark=style("github-dark"),
        contents=contents,
        sections="\n".join(sections),
        version=__version__,
    )
