"""Adding an optimizer takes five files, and everything else follows (docs/adding.md).

In a copy of the repository, a toy with three betas and four states is written into them; then the
core is built, and the fast tests of every optimizer are run for this one.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from test_symbols import SETS

ROOT = Path(__file__).parents[1]
COPIED = ("csrc", "python", "tests", "docs", ".ci", "CMakeLists.txt", "pyproject.toml")
BUILT = ("__pycache__", "_generated", "_build", "*.so")
PATIENCE = 500  # seconds for one command on a loaded machine

CLASS = '''class Toy(Optimizer):
    """Steps along two averages of the gradient, over the largest of its mean squares.

        m = beta1 * m + (1 - beta1) * g
        n = beta2 * n + (1 - beta2) * g
        v = beta3 * v + (1 - beta3) * g^2;  w = max(w, v)
        p = p - lr * (m + n) / (sqrt(w) + eps)

    Use:
        tests. It is in no paper.

    Args: see below

    State:
        `fast`, `slow`, `square` and `largest`, 4 bytes per element each (8 for float64). A float32
        step moves 44 bytes per element.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.array([1.0, 2.0], np.float32)
        >>> opt = fs.Toy(w, lr=0.5, betas=(0.0, 0.0, 0.0))
        >>> opt.step(np.array([1.0, -1.0], np.float32)).step
        1
        >>> w
        array([0., 3.], dtype=float32)

    Reference:
        none

    Differs from:
        nothing.
    """

    _spec = Spec("toy")

    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-3,
        betas: tuple[Rate, Rate, Rate] = (0.9, 0.95, 0.999),
        eps: float = 1e-8,
        weight_decay: Rate = 0.0,
        *,
        maximize: bool = False,
        groups: Iterable[Group] = (),
        **how: Unpack[How],
    ) -> None:
        super().__init__(**given(locals()))


'''

EQUATION = """def toy(p, g, state, t, h):
    (b1, b2, b3), after = h.betas, {}
    after["fast"] = b1 * state["fast"] + (1 - b1) * g
    after["slow"] = b2 * state["slow"] + (1 - b2) * g
    after["square"] = b3 * state["square"] + (1 - b3) * g**2
    after["largest"] = np.maximum(state["largest"], after["square"])
    return p - h.lr * (after["fast"] + after["slow"]) / (np.sqrt(after["largest"]) + h.eps), after


"""

CASES = """    "Toy": [
        {},
        {"lr": 0.3, "betas": (0.8, 0.9, 0.95), "eps": 0.01, "weight_decay": 0.1},
        {"lr": 0.3, "betas": (0.75, 0.5, 0.9), "weight_decay": 0.1, "maximize": True},
        {"lr": 0.0},
    ],
"""

# What is written before which words of which file; a file that is not there is only that.
EDITS = {
    "csrc/rules/toy.h": {"": (ROOT / "tests" / "native" / "toy.h").read_text()},
    "csrc/rules/registry.h": {
        "\nnamespace fusedstep {": '#include "toy.h"\n',
        "    Ceiling>;": "    Toy,                //\n",
    },
    "python/fusedstep/optimizers.py": {"NAMES = ": CLASS},
    "tests/reference.py": {"RULES = {": EQUATION, '    "Rprop": rprop': '    "Toy": toy,\n'},
    "tests/cases.py": {'    "Rprop": [': CASES, '"Lion"}': '"Toy", '},
}

# A fresh interpreter in the copy; an editable install's finder would find another fusedstep.
START = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if isinstance(f, type)]\n"
WRITTEN = "import runpy; runpy.run_path('.ci/torch_classes.py', run_name='__main__')"


def run(*command, **how):
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=PATIENCE, **how
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def write(root):
    for name, edits in EDITS.items():
        path = root / name
        text = path.read_text() if path.exists() else ""
        for words, new in edits.items():
            assert text.count(words) == 1, f"{words!r} in {name}"
            text = text.replace(words, new + words)
        path.write_text(text)


def build(root):
    """The core's module, without optimization, in its place beside the Python."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = (os.environ.get("CXX") or "c++").split()
    if sys.platform != "linux" or shutil.which(compiler[0]) is None:
        pytest.skip(f"needs Linux and {compiler[0]}")
    flags = ["-std=c++17", "-O0", "-fPIC", "-w", "-fvisibility=hidden", "-pthread"]
    flags += [f"-I{root / 'csrc'}", f"-I{pybind11.get_include()}"]
    flags += [f"-I{sysconfig.get_paths()['include']}", '-DFUSEDSTEP_COMPILER="a compiler"']
    text = (root / "CMakeLists.txt").read_text().replace("${system}", "posix")
    lists = re.findall(r"(?:set\(engine|pybind11_add_module\(_core)\s(.*?)\)", text, re.S)
    sources = re.findall(r"\S+\.cpp", " ".join(lists))
    units = [(source, Path(source).stem, ["-ffp-contract=off"]) for source in sources]
    kernels = "csrc/kernels/kernels.cpp"
    units += [(kernels, isa, [f"-DFUSEDSTEP_TARGET={isa}", *own]) for isa, own in SETS.items()]

    def compile(unit):
        source, name, own = unit
        run(*compiler, *flags, *own, "-c", root / source, "-o", root / f"{name}.o")
        return root / f"{name}.o"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile, units))
    module = "_core" + sysconfig.get_config_var("EXT_SUFFIX")
    run(*compiler, "-shared", "-pthread", *objects, "-o", root / "python" / "fusedstep" / module)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A function that runs Python code in the copy."""
    root = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns(*BUILT))
        else:
            shutil.copy(ROOT / name, root / name)
    write(root)
    build(root)
    paths = os.pathsep.join(str(root / name) for name in ("python", "tests", "docs"))
    env = {**os.environ, "PYTHONPATH": paths}
    run(sys.executable, "-c", START + WRITTEN, cwd=root, env=env)
    return lambda code: run(sys.executable, "-c", START + code, cwd=root, env=env)


def test_five_files_are_those_of_the_documentation():
    page = (ROOT / "docs" / "adding.md").read_text()
    assert all(f"`{name.replace('toy', 'NAME')}`" in page for name in EDITS)
    assert len(EDITS) == 5
    assert sum(new.count("\n") for edits in EDITS.values() for new in edits.values()) <= 130


def test_fast_tests_of_every_optimizer_pass_for_the_new_one(copy):
    names = (
        "reference",
        "validation",
        "optimizers",
        "torch_optimizers",
        "against_torch",
        "identity",
    )
    # Of the layouts and threads one case, as the kernels are not optimized here.
    select = "Toy and not (test_identity and lr) or all_but"
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", select]
    options += [f"tests/test_{name}.py" for name in names]
    said = copy(f"import pytest; sys.exit(pytest.main({options}))")
    assert int(re.search(r"(\d+) passed", said)[1]) > 150, said
    assert not re.search("failed|error|skipped", said), said


def test_documentation_and_bench_have_the_new_optimizer(copy):
    said = copy("import generated; print(generated.bytes_table(), generated.optimizer_list())")
    assert "| toy | `fast`, `slow`, `square`, `largest` | 16 | 44 | 42 | 38 | 88 |" in said
    assert "`~fusedstep.Toy` | tests |" in said
    arguments = ["bench", "--optimizers", "toy", "--n", "1e3", "--rounds", "1"]
    said = copy(f"import fusedstep.__main__; fusedstep.__main__.main({arguments})")
    assert re.search(r"toy .* 44 ", said)
    assert (
        copy("import doctest, fusedstep; doctest.run_docstring_examples(fusedstep.Toy, {})") == ""
    )
