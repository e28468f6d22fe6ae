"""`fusedstep bench --jax`: what its rows hold, and what it says of wrong input."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

import fusedstep as fs
from fusedstep import bench, bench_jax
from fusedstep.__main__ import main

jax = pytest.importorskip("jax", reason="jax is not installed")
optax = pytest.importorskip("optax", reason="optax is not installed")
pytest.importorskip(
    "fusedstep._jax", reason="this build has no fusedstep._jax", exc_type=ImportError
)

ARRAYS = [case for case in bench_jax.CASES if case.tree is None]
SMALL = {"a": (30, 20), "b": {"c": (7,), "d": (1000,)}}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few calls, a small tree for a large one, and the threads that XLA has in this process."""
    monkeypatch.setitem(bench_jax.TREES, "gpt2", lambda: SMALL)
    monkeypatch.setattr(bench_jax, "_CALLS", 4)
    jax.devices("cpu")
    before = fs.num_threads()
    fs.set_num_threads(bench_jax._pool() or before)
    yield
    fs.set_num_threads(before)


@pytest.mark.parametrize("case", ARRAYS, ids=lambda case: case.name)
def test_contenders_come_to_the_same_parameters(case):
    n = 1000
    random = np.random.default_rng(1)
    first, slope = random.standard_normal((2, n), np.float32)
    options = {"max_norm": bench_jax._MAX_NORM} if case.clips else {}
    ours = first.copy()
    plain = getattr(fs.conventions.optax, case.function)(ours, 1e-3, **case.hypers)
    found = []
    for tx, apply in (
        (bench_jax._ours(case), bench_jax._in_place),
        (bench_jax._ours(case), bench_jax._update),
        (bench_jax._optax(case), bench_jax._update),
    ):
        params, grads = {"w": jax.numpy.array(first)}, {"w": jax.numpy.array(slope)}
        state = tx.init(params)
        for _ in range(3):
            params, state = apply(tx, grads, state, params)
        found.append(params["w"])
    for _ in range(3):
        plain.step(slope, **options)
    assert np.array_equal(found[0], ours)
    assert not np.allclose(found[0], first, rtol=0, atol=1e-6)
    for other in found[1:]:
        np.testing.assert_allclose(other, ours, rtol=1e-5, atol=1e-6)


def test_rows_hold_together(tmp_path, capsys):
    target = tmp_path / "rows.json"
    names = ["adamw", "momentum", "amsgrad"]
    arguments = ["--optimizers", *names, "--n", "1e3", "2^12", "--rounds", "2"]
    assert main(["bench", "--jax", *arguments, "--json", str(target)]) == 0
    out, err = capsys.readouterr()
    assert max(map(len, out.splitlines())) <= 80
    assert f"optax {optax.__version__}" in out
    assert "torch" not in out
    assert "gpt2: 3 leaves, 1,607 parameters" in out
    assert "mlp: a training step, 4 leaves, 51,200 parameters" in out
    assert "adamw, n = 1,000 (1 of 10)\n" in err
    stored = json.loads(target.read_text())
    assert {"jax", "jaxlib", "optax", "cpu"} <= stored["machine"].keys()
    rows = stored["rows"]
    moved = {"adamw": 28, "amsgrad": 36, "clip + adamw": 32, "momentum": 20}
    cases = [(case, n) for n in (1000, 4096) for case in moved]
    found = [(row["optimizer"], row["n"]) for row in rows]
    assert sorted(found[:8]) == sorted((case, n) for case, n in cases)
    assert [n for _, n in found[:8]] == [1000] * 4 + [4096] * 4
    assert [(row["tree"], row["leaves"], row["n"]) for row in rows[8:]] == [
        ("gpt2", 3, 1607),
        ("mlp", 4, 51200),
    ]
    for row in rows[:-1]:
        assert row["bytes_per_param"] == moved[row["optimizer"]]
        assert row["gbps"] == pytest.approx(row["bytes_per_param"] * row["n"] / row["ms"] / 1e6)
        assert row["threads"] == fs.num_threads()
        for ceiling in ("ceiling", "pages"):
            low, high = row[ceiling]["quartiles"]
            assert low <= row[ceiling]["share"] <= high
        for peer in ("optax", "update", "numpy"):
            low, high = row[peer]["quartiles"]
            assert low <= row[peer]["ratio"] <= high
        assert row["numpy"]["temp_bytes"] is None
        if row["tree"] is None:  # in place: nothing of the parameters' size
            assert row["temp_bytes"] < min(4 * row["n"], 1000)
            assert row["update"]["temp_bytes"] >= 0
    step = rows[-1]
    assert step["calls"] == 8
    for name in ("fusedstep", "optax"):
        low, high = step[name]["quartiles"]
        assert low <= step[name]["over_us"] <= high
        assert step[name]["us"] > 0 < min(step["gradients_us"], step["without_us"])


def test_one_array_and_no_training_step_explains_no_step(capsys):
    assert main(["bench", "--jax", "--optimizers", "lion", "--n", "100", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert "\nlion " in out
    assert "training step" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_interrupted_run_keeps_its_rows(tmp_path, capsys, monkeypatch):
    calls, interleave = [], bench.interleave

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return interleave(*args)

    monkeypatch.setattr(bench, "interleave", interrupted)
    target = tmp_path / "rows.json"
    arguments = ["--optimizers", "adam", "lion", "--n", "1e3", "--rounds", "1"]
    assert main(["bench", "--jax", *arguments, "--json", str(target)]) == 130
    assert len(json.loads(target.read_text())["rows"]) == 1
    assert "half of the\nrounds lie" in capsys.readouterr().out


def test_tree_of_gpt2_has_its_size():
    leaves = bench_jax._shapes(bench_jax.gpt2())
    assert len(leaves) == 196
    assert bench_jax._count(bench_jax.gpt2()) == 124_439_808
    assert leaves["block_11.attention.out.kernel"] == (12, 64, 768)


def test_settings_are_as_before():
    before = fs.num_threads(), fs.isa()
    (row,) = bench_jax.measure(["lion"], [100], isa="scalar", rounds=1)
    assert row.isa == "scalar"
    assert (fs.num_threads(), fs.isa()) == before


def test_xla_has_the_threads_asked_for():
    code = """
import os
from fusedstep import bench_jax
(row,) = bench_jax.measure(["lion"], [100], threads=3, rounds=1)
print(row.threads, bench_jax._pool(), os.environ.get("NPROC"))
try:
    bench_jax.measure(["lion"], [100], threads=2, rounds=1)
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pool = bench_jax._pool() and 3
    refused = "threads must be 3, with which XLA has begun in this process, got 2\n"
    assert done.stdout == f"3 {pool} None\n{refused if pool else ''}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizers", "asgd"], "--optimizers must be of adamw, adam, nadam, amsgrad, lion,"),
        (["--optimizers", "asgd"], "momentum with --jax, got 'asgd'"),
        (["--models"], "--models must not be given with --jax"),
        (["--step"], "--step must not be given with --jax"),
        (["--compile"], "--compile must not be given with --jax"),
        (["--no-torch"], "--no-torch must not be given with --jax"),
        (["--dtype", "float64"], "--dtype must be float32 with --jax, got float64"),
        (["--grad-dtype", "float64"], "--grad-dtype must not be given with --jax"),
        (["--plot", "x.png"], "--plot must not be given with --jax"),
        (["--sweep", "--n", "5"], "--sweep must not be given with --n"),
        (["--threads", "5000"], "--threads must be from 1 to 4096, got 5000"),
        (["--n", "1e15"], "--n must fit into memory, "),
    ],
)
def test_wrong_input_is_a_line(arguments, message, capsys):
    assert main(["bench", "--jax", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "command"),
    [("jax", "pip install 'fusedstep[jax]' optax"), ("optax", "pip install optax")],
)
def test_missing_library_is_a_line(module, command, monkeypatch, capsys):
    find = importlib.util.find_spec
    without = lambda name, *rest: None if name == module else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    assert main(["bench", "--jax"]) == 1
    assert capsys.readouterr().err == f"fusedstep bench: --jax needs {module}: {command}\n"


def test_build_without_jax_is_a_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fusedstep.jax", None)
    assert main(["bench", "--jax"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("fusedstep bench: --jax needs fusedstep.jax")
    assert err.count("\n") == 1
