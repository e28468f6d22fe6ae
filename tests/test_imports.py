"""Who may import whom in the package, and who may know array libraries: read from the sources."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from fusedstep._types import Options

PACKAGE = Path(__file__).parent.parent / "python" / "fusedstep"


def module_of(path):
    parts = ["fusedstep", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_of(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
COMPILED = ("fusedstep._core", "fusedstep._cuda", "fusedstep._jax")

# Imported when they are called for, as each takes longer to import than all that a step needs.
LAZY = {
    "fusedstep.__main__": {
        *(
            "fusedstep.bench",
            "fusedstep.bench_jax",
            "fusedstep.bench_models",
            "fusedstep.bench_step",
            "fusedstep.convert._command",
            "fusedstep.demo",
            "fusedstep.gallery",
        )
    },
    "fusedstep.bench_jax": {"fusedstep.conventions.optax", "fusedstep.jax"},
    "fusedstep.bench_models": {"fusedstep.torch"},
    "fusedstep.gallery": {"fusedstep.gallery.page"},
    "fusedstep.schedules": {"fusedstep.jax._calls"},
    "fusedstep._checkpoint": {"fusedstep.schedules"},
    "fusedstep._groups": {"fusedstep.schedules"},
    "fusedstep._optimizer": {"fusedstep.schedules"},
}

# Where torch itself is what is measured, drawn or trained.
OF_TORCH = (
    *("fusedstep.bench", "fusedstep.bench_models", "fusedstep.demo", "fusedstep.gallery."),
    *("fusedstep.convert.torch", "fusedstep.convert._command"),
)


def imports_of(node):
    """The modules of ours that import statements below a node name, and what they take of each."""
    for one in ast.walk(node):
        if isinstance(one, ast.Import):
            yield from ((alias.name, None) for alias in one.names)
        elif isinstance(one, ast.ImportFrom):
            for alias in one.names:
                whole = f"{one.module}.{alias.name}"
                is_module = whole in TREES or whole in COMPILED
                yield (whole, None) if is_module else (one.module, alias.name)


def ours(node):
    return {name for name, _ in imports_of(node) if name.split(".")[0] == "fusedstep"}


def functions(tree):
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def at_once(name):
    """What a module imports as it is imported itself."""
    tree, later = TREES[name], set()
    for node in functions(tree):
        later |= set(ast.walk(node)) - {node}
    for node in ast.walk(tree):  # `if TYPE_CHECKING:`
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            later |= set(ast.walk(node)) - {node}
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    return {one for node in found if node not in later for one in ours(node)}


def test_imports_make_no_circle():
    # The package's own name stands for its modules: `from fusedstep import _core`.
    graph = {name: at_once(name) & TREES.keys() - {"fusedstep"} for name in TREES}
    while done := {name for name, needed in graph.items() if not needed & graph.keys()}:
        graph = {name: needed for name, needed in graph.items() if name not in done}
    assert not graph


@pytest.mark.parametrize("name", TREES)
def test_imports_inside_functions_are_the_listed_ones(name):
    found = {one for node in functions(TREES[name]) for one in ours(node)}
    assert found == LAZY.get(name, set())


@pytest.mark.parametrize("name", [name for name in TREES if name.startswith("fusedstep.torch")])
def test_torch_layer_takes_nothing_private_of_the_neutral_classes(name):
    for module, member in imports_of(TREES[name]):
        assert module not in ("fusedstep._optimizer", "fusedstep._groups")
        assert module != "fusedstep.optimizers" or not (member or "").startswith("_")
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            owner = ast.unparse(node.value).split(".")[-1]
            assert owner not in ("neutral", "_neutral", "spec", "_spec"), ast.unparse(node)


@pytest.mark.parametrize("name", TREES)
def test_array_libraries_are_known_in_one_module(name):
    if name == "fusedstep._arrays" or name.startswith(
        ("fusedstep.torch", "fusedstep.jax", "fusedstep.bench_jax", *OF_TORCH)
    ):
        return
    libraries = {"torch", "cupy", "numba", "ml_dtypes", "jax", "tensorflow"}
    assert not libraries & {one.split(".")[0] for one, _ in imports_of(TREES[name])}
    tree = TREES[name]
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    words = ("__dlpack", "__cuda_array_interface__", "sys.modules")
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""
        if isinstance(node, ast.Constant) and not isinstance(parents[node], ast.Expr):
            text = str(node.value)
        assert not any(word in text for word in words), text


def test_options_are_in_the_order_that_the_core_reads():
    # By place: csrc/python/options.h and torch/tensor_table.cpp.
    assert Options._fields == (
        *("factor", "max_norm", "skip_nonfinite", "stream", "norms", "live"),
        *("scale", "found_inf", "norm"),
        *("clip_value", "ema_decay", "average", "zero_grad", "seed"),
    )


# Those of the reference, and each library's conventions.
PUBLIC = [
    *("", ".schedules", ".conventions", ".convert", ".convergence", ".convergence.landscapes"),
    *(".conventions.keras", ".conventions.optax", ".files", ".buffers", ".gallery", ".torch"),
    ".jax",
]


@pytest.mark.parametrize("name", PUBLIC)
def test_modules_show_what_is_public_and_nothing_else(name):
    if name == ".torch":
        pytest.importorskip("torch")
    if name == ".jax":
        pytest.importorskip("fusedstep.jax", exc_type=ImportError)
    module = importlib.import_module(f"fusedstep{name}")
    shown = set(dir(module))
    assert shown == set(module.__all__) | ({"jax", "torch"} if not name else set())
    if name:
        assert all(hasattr(module, one) for one in shown)


def test_submodules_come_when_they_are_asked_for():
    pytest.importorskip("torch")
    code = "import sys, fusedstep as fs; assert 'torch' not in sys.modules; "
    code += "fs.torch.AdamW; fs.convergence.Quadratic; fs.convert.from_keras; print('all')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "all\n"
