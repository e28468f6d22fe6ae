"""The documentation is whole: names and figures occur, links and quotations lead somewhere.

Its examples run, and its pages are built, by Sphinx (see docs/conf.py).
"""

import ast
import inspect
import re
from pathlib import Path

import numpy as np
import pytest

import fusedstep as fs
import fusedstep.convergence
import fusedstep.gallery
import fusedstep.torch

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {
    page.relative_to(DOCS).as_posix(): page.read_text()
    for page in sorted(DOCS.rglob("*.md"))
    if not page.relative_to(DOCS).parts[0].startswith("_")
}
TEXT = "\n".join(PAGES.values())
each_page = pytest.mark.parametrize("page", PAGES)


def fences(text):
    """Each fenced block as (what follows the backticks, its lines)."""
    return [
        (head.strip(), body.splitlines())
        for head, body in re.findall(r"^```(\S[^\n]*)\n(.*?)^```$", text, re.M | re.S)
    ]


def options(lines):
    return dict(re.findall(r"^:([\w-]+): *(.*)$", "\n".join(lines), re.M))


def anchors(page):
    """What the headings of a page are called in links, those of included files too."""
    text = PAGES[page]
    for head, _ in fences(text):
        included = re.fullmatch(r"\{include\} (?!\S*_generated)(\S+)", head)
        if included:
            text += (DOCS / page).parent.joinpath(included[1]).read_text()
    headings = re.findall(r"^#{1,3} (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_page_is_reached_from_the_index(page):
    listed = {"index.md"}
    for name, text in PAGES.items():
        for head, body in fences(text):
            if head == "{toctree}":
                names = [line for line in body if line and not line.startswith(":")]
                listed |= {(Path(name).parent / f"{one}.md").as_posix() for one in names}
    assert page in listed


@each_page
def test_page_code_is_run(page):
    for head, lines in fences(PAGES[page]):
        body = [line for line in lines if not line.startswith(":")]  # but for options
        assert head not in ("python", "pycon", "py"), body
        if head == "{doctest}":
            assert body[0].startswith(">>> ")
        if head == "{testcode}":
            compile("\n".join(body), page, "exec")


@each_page
def test_page_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)\s]*)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        there = page
        if path:
            there = ((DOCS / page).parent / path).resolve().relative_to(DOCS.resolve()).as_posix()
        assert there in PAGES, target
        assert not anchor or anchor in anchors(there), target


@each_page
def test_page_quotes_what_is_there(page):
    for head, body in fences(PAGES[page]):
        quoted = re.fullmatch(r"\{(?:literalinclude|include)\} (\S+)", head)
        if not quoted or "_generated" in quoted[1]:
            continue
        source = ((DOCS / page).parent / quoted[1]).read_text()
        for name, value in options(body).items():
            value = value.strip("'\"")
            if name.startswith(("start-", "end-")):
                assert source.count(value) >= 1, (head, name, value)
            if name.startswith("start-"):
                assert source.count(value) == 1, (head, name, value)
            if name == "pyobject":
                assert re.search(rf"^(class|def) {value}\b", source, re.M), (head, value)


def test_page_names_are_public():
    """`{py:...}` roles name what exists; Sphinx then says whether the reference has it."""
    for target in re.findall(r"\{py:\w+\}`(?:[^`<]*<)?~?([\w.]+)>?`", TEXT):
        found = fs
        for part in target.split(".")[1:]:
            found = getattr(found, part)


def test_optimizers_and_schedules_are_all_shown(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import generated

    classes = generated.optimizer_classes()
    assert set(classes) == {n for n in fs.__all__ if hasattr(getattr(fs, n), "_spec")}
    sections = generated.optimizer_sections()
    for name, found in classes.items():
        assert f"## {name}\n" in sections
        assert generated.use_of(found), f"{name} must say under Use: what it is for"
        assert f"fusedstep.{name}`" in generated.optimizer_list()
    shown = generated.schedule_classes()
    assert {*shown, "Schedule", "from_dict"} == set(fs.schedules.__all__)
    for name, found in shown.items():
        assert generated.example(name, found)(0) >= 0
        assert f"fusedstep.schedules.{name}`" in PAGES["lecture/schedules.md"]


def test_optimizers_have_every_section_in_its_order(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import generated

    sections = ["Use", "Args", "Raises", "State", "Example", "Reference", "Differs from"]
    for name, found in generated.optimizer_classes().items():
        doc = inspect.getdoc(found)
        assert re.findall(r"^([A-Z][\w ]*):$", doc, re.M) == sections, name
        state = " ".join(doc.partition("\nState:\n")[2].partition("\n\n")[0].split())
        moved = re.search(r"A float32 step moves (\d+) bytes", state)
        assert int(moved[1]) == generated.bytes_moved(name, {}, "float32", "float32"), name
        assert "4 bytes per element" in state, name


def test_bytes_of_choosing_are_those_of_the_states():
    pytest.importorskip("ml_dtypes")
    rows = re.findall(r"^\| (.+?) \| (`.+?) \| (.+?) \| (.+?) \| ", PAGES["choosing.md"], re.M)
    assert len(rows) >= 15
    n, seen = 1 << 14, set()
    for have, take, kept, moved in rows:
        first, *others = (ast.parse(one, mode="eval").body for one in re.findall("`(.+?)`", take))
        name, hypers = (first.func, keywords(first)) if isinstance(first, ast.Call) else (first, {})
        ways = [hypers, *({"rounding": o.value} for o in others if isinstance(o, ast.Constant))]
        how = {k: v for o in others if isinstance(o, ast.Call) for k, v in keywords(o).items()}
        dtype = "bfloat16" if have.startswith("bfloat16 parameters") else "float32"
        found = []
        for way in ways:
            params = fs.FlatBuffer.zeros({"w": n}, dtype)
            opt = getattr(fs, name.id)(params, **way)
            opt.step(params.zeros_like(), **how)
            beside = sum(state.nbytes for state in opt.state["w"].values() if np.ndim(state)) / n
            found.append((round(beside, 2), round(3 * params.dtype.itemsize + 2 * beside, 2)))
        told = [list(map(float, re.findall(r"\b[\d.]+", cell))) for cell in (kept, moved)]
        assert list(zip(*told, strict=True)) == found, take
        seen.add(name.id)
    assert seen >= {"SGD", "Lion", "Adagrad", "RMSprop", "Adadelta", "Adam", "AdamW", "Adamax"}


def keywords(call):
    return {one.arg: ast.literal_eval(one.value) for one in call.keywords}


def test_bytes_are_the_promised_ones(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import generated

    rows = [line.split(" | ") for line in generated.bytes_table().splitlines()[2:]]
    moved = {row[0].strip("| "): int(row[3]) for row in rows}
    assert moved["sgd"] == 12
    assert moved["momentum"] == moved["adagrad"] == 20
    assert moved["adamw"] == 28
    assert moved["amsgrad"] == 36


def test_public_names_are_in_the_reference():
    text = PAGES["reference.md"]
    for name in fs.__all__:
        if isinstance(getattr(fs, name), type) and hasattr(getattr(fs, name), "_spec"):
            continue  # on the page of the optimizers
        assert name.startswith("__") or re.search(rf"\b{name}\b", text), name
    for module in (fusedstep.convergence, fusedstep.torch, fusedstep.gallery):
        assert f".. automodule:: {module.__name__}\n   :members:" in text
    for name in fs.convergence.__all__:
        assert name == "landscapes" or getattr(fs.convergence, name).__doc__, name
    for name in fs.convergence.landscapes.__all__:
        assert name in ("ALL", "Landscape") or re.search(rf"\b{name}\b", text), name


def test_figures_are_all_in_the_lecture_with_their_code():
    lecture = "".join(text for page, text in PAGES.items() if page.startswith("lecture/"))
    shown = re.findall(r"_generated/figure_(\w+)\.md", lecture)
    assert sorted(shown) == sorted(entry.name for entry in fusedstep.gallery.FIGURES)
    assert re.findall(r"_generated/code_(\w+)\.md", lecture) == shown


def test_commands_are_the_ones_that_exist(capsys):
    from fusedstep import __main__ as cli

    parser = cli._parser()
    found = re.findall(r"^    fusedstep (.+)$|`fusedstep ([a-z][^`]*)`", TEXT, re.M)
    commands = [(a or b).split() for a, b in found]
    assert len(commands) >= 8
    for words in commands:
        parser.parse_args(words)
