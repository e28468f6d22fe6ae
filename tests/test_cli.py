"""The command line as a user types it: info, demo, plot, bench; what they say of wrong input."""

import contextlib
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl
import torch
from matplotlib.figure import Figure

import fusedstep as fs
from fusedstep import bench, bench_models, bench_step, demo, gallery, schedules
from fusedstep.__main__ import _parser, main

PNG = b"\x89PNG\r\n\x1a\n"


def test_info_prints_every_entry(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for key, value in fs.info().items():
        line = next(ln for ln in out.splitlines() if ln.startswith(key.replace("_", " ") + " "))
        if isinstance(value, str):
            assert line.endswith(value)
    assert ", ".join(fs.usable_isas()) in out


def test_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "fusedstep", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == fs.__version__


def test_demo_network_gradient_agrees_with_finite_differences():
    data = demo.Digits.load()
    params = demo.init()
    grads, unused = params.zeros_like(), params.zeros_like()
    x, y = data.train_x[:32], data.train_y[:32]
    demo.loss_and_gradient(params, x, y, grads)
    for name in params:
        direction = np.sign(grads[name])
        slope = float((grads[name] * direction).sum())
        step = np.float32(1e-3)
        start = params[name].copy()
        params[name] = start + step * direction
        above = demo.loss_and_gradient(params, x, y, unused)
        params[name] = start - step * direction
        below = demo.loss_and_gradient(params, x, y, unused)
        params[name] = start
        assert (above - below) / (2 * step) == pytest.approx(slope, rel=0.02)


def test_training_and_drawing_use_one_blas_thread_and_put_the_others_back(monkeypatch):
    def threads():
        found = threadpoolctl.threadpool_info()
        return [pool["num_threads"] for pool in found if pool["user_api"] == "blas"]

    data, seen = demo.Digits.load(), []
    monkeypatch.setattr(demo, "init", lambda make=demo.init: seen.append(threads()) or make())
    entry = replace(gallery.FIGURES[0], function=lambda: seen.append(threads()) or Figure())
    with threadpoolctl.threadpool_limits(3, "blas"):
        demo.train("SGD", data, epochs=1)
        entry.draw()
        assert set(threads()) == {3}
    assert len(seen) == 2
    assert set(seen[0] + seen[1]) == {1}


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_demo_reaches_97_percent(name):
    result = demo.train(name, demo.Digits.load())
    assert result.accuracy >= 0.97
    assert result.losses[-1] < 0.05 < 2 < result.losses[0]


@pytest.mark.parametrize("command", ["demo", "gallery", "plot"])
def test_what_is_written_unasked_where_is_ignored_by_git(command):
    output = _parser().parse_args([command, *(["cosine"] if command == "plot" else [])]).output
    ignored = (Path(__file__).parents[1] / ".gitignore").read_text().split()
    assert output in ignored or f"{output}/" in ignored


def test_demo_trains_with_every_rule_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = Path("curves[dim].png")
    assert main(["demo", "-o", str(picture), "--epochs", "2", "--n", "1000"]) == 0
    out, err = capsys.readouterr()
    assert f"loss curves: {picture}\n" in out
    assert max(map(len, out.splitlines())) <= 80
    for i, name in enumerate(demo.OPTIMIZERS):
        assert name in out
        assert f"training with {name} ({i + 1} of {len(demo.OPTIMIZERS)})\n" in err
    for name in bench.OPTIMIZERS:
        assert name in out
    assert picture.read_bytes().startswith(PNG)
    classes = {type(make(demo.init())) for make in demo.OPTIMIZERS.values()}
    assert {c.__name__ for c in classes} == _public_optimizers()


def test_demo_says_without_torch_how_to_get_it(monkeypatch, capsys):
    from rich.console import Console

    rows = bench.measure(["sgd"], [100], rounds=1, torch=False)
    monkeypatch.setattr(bench, "has_torch", lambda: False)
    Console().print(demo.speed_table(rows))
    assert bench.NO_TORCH in " ".join(capsys.readouterr().out.split())


def test_demo_curves_name_their_rates_and_are_told_apart(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: figures.append(figure))
    ends = np.geomspace(1, 1e-3, len(demo.OPTIMIZERS))
    results = [
        demo.Result(name, [2.0, end], 0.5, 1.0)
        for name, end in zip(demo.OPTIMIZERS, ends, strict=True)
    ]
    demo.plot(results[::-1], str(tmp_path / "a.png"))
    (axes,) = figures[0].axes
    for line, (name, make) in zip(axes.lines, demo.OPTIMIZERS.items(), strict=True):
        lr = make(demo.init()).param_groups[0]["lr"]
        assert line.get_label() == f"{name}, lr {lr:g}: 50.0%"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [line.get_label() for line in axes.lines]  # from the upper end down
    assert len(set(labels)) == len(demo.OPTIMIZERS)
    assert "SGD, lr 0.1: 50.0%" in labels
    assert "Lion, lr 0.0005: 50.0%" in labels
    looks = [(line.get_color(), line.get_linestyle()) for line in axes.lines]
    assert len(set(looks)) == len(looks)
    for upper, lower in zip(axes.lines[:-1:2], axes.lines[1::2], strict=False):
        assert upper.get_linestyle() != lower.get_linestyle()
        assert upper.get_linewidth() != lower.get_linewidth()


def _public_optimizers():
    names = [n for n in fs.__all__ if isinstance(getattr(fs, n), type)]
    return {n for n in names if issubclass(getattr(fs, n), fs.Optimizer)} - {"Optimizer"}


def test_bench_covers_every_optimizer():
    assert {cls for cls, _ in bench.OPTIMIZERS.values()} == _public_optimizers()


def test_bench_rows_hold_together(tmp_path, capsys):
    target, picture = tmp_path / "rows.json", tmp_path / "rates.png"
    arguments = ["--optimizers", "AdamW", "rprop", "lion", "--n", "1e3", "2^12", "--rounds", "3"]
    outputs = ["--json", str(target), "--plot", str(picture)]
    assert main(["bench", *arguments, *outputs]) == 0
    out, err = capsys.readouterr()
    assert max(map(len, out.splitlines())) <= 80
    assert out.count("\nadamw ") == out.count("\nlion ") == 2
    assert "\nn = 1,000: " in out
    assert "ceiling: the GB/s of a kernel that reads" in " ".join(out.split())
    assert "adamw, n = 1,000 (1 of 6)\n" in err
    stored = json.loads(target.read_text())
    assert stored["machine"]["isa"] == fs.isa()
    rows = stored["rows"]
    assert [(r["optimizer"], r["n"]) for r in rows] == [
        (name, n) for name in ("adamw", "rprop", "lion") for n in (1000, 4096)
    ]
    for row in rows:
        assert row["bytes_per_param"] == (20 if row["optimizer"] == "lion" else 28)
        assert row["gbps"] == pytest.approx(row["bytes_per_param"] * row["n"] / row["ms"] / 1e6)
        assert row["threads"] == fs.num_threads()
        assert row["threads_used"] == 1  # of so few elements
        for peer in row["torch"].values():
            low, high = peer["quartiles"]
            assert low <= peer["ratio"] <= high
        expected = {"adamw": {"for-loop", "foreach", "fused"}, "rprop": {"for-loop", "foreach"}}
        assert set(row["torch"]) == expected.get(row["optimizer"], set())
    assert picture.read_bytes().startswith(PNG)


def test_bench_models_have_the_shapes_they_are_named_after():
    counts = {name: make() for name, make in bench_models.MODELS.items()}
    found = {name: (len(shapes), sum(map(prod, shapes))) for name, shapes in counts.items()}
    assert found == {
        "mlp": (4, 51_200),
        "1000x1000": (1000, 1_000_000),
        "resnet50": (161, 25_557_032),
        "gpt2": (148, 124_439_808),
    }


def test_bench_models_rows_hold_together(tmp_path, capsys):
    target = tmp_path / "rows.json"
    arguments = ["--models", "mlp", "--optimizers", "adamw", "nadam", "lion", "--rounds", "2"]
    assert main(["bench", *arguments, "--json", str(target)]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "mlp: 4 tensors, 51,200 parameters; " in out
    (head,) = (line.split("  ") for line in out.splitlines() if "plain ms" in line)
    assert len(set(head)) == len(head)
    rows = json.loads(target.read_text())["rows"]
    assert [row["optimizer"] for row in rows] == ["adamw", "nadam", "lion"]
    peers = [{"for-loop", "foreach", "fused"}, {"for-loop", "foreach"}, set()]
    for row, expected in zip(rows, peers, strict=True):
        assert row["plain_ms"] > 0
        assert row["flat_ms"] > 0
        assert set(row["torch_ms"]) == set(row["plain_ratio"]) == set(row["flat_ratio"]) == expected


# Bytes per parameter: moved, and of the two moments.
STEP_BYTES = {
    "AdamW": (28, 8),
    "clip + AdamW": (32, 8),
    "AdamW + EMA": (36, 8),
    "AdamW + shadow": (30, 8),
    "AdamW + zero": (32, 8),
    "clip + AdamW + EMA + shadow + zero": (46, 8),
    "AdamW, bf16 states": (20, 4),
    "AdamW, q8 states": (16 + 1 / 32, 2 + 1 / 64),
    "bf16 split": (28, 8),
    "bf16 split, bf16 gradients": (26, 8),
    "bf16 split, bf16 grads, q8 states": (14 + 1 / 32, 2 + 1 / 64),
}


def test_bench_step_rows_hold_together(tmp_path, capsys, monkeypatch):
    none = bench_step.Library("no-such-package", "no_such_module", "AdamW")
    fails = bench_step.Library("torch", "torch.optim", "NoSuchClass")
    works = bench_step.Library("torch", "torch.optim", "AdamW")
    libraries = dict(zip(bench_step.LIBRARIES, (none, fails, works, works, works), strict=True))
    monkeypatch.setattr(bench_step, "LIBRARIES", libraries)
    target = tmp_path / "rows.json"
    arguments = ["--step", "--n", "2^12", "--rounds", "2", "--threads", "2"]
    assert main(["bench", *arguments, "--json", str(target)]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "projection" in out
    rows = json.loads(target.read_text())["rows"]
    assert {row["mode"] for row in rows} == STEP_BYTES.keys()
    for row, case in zip(rows, bench_step.CASES, strict=True):
        assert (row["bytes_per_param"], row["state_bytes"]) == STEP_BYTES[row["mode"]]
        assert row["gbps"] == pytest.approx(row["bytes_per_param"] * row["n"] / row["ms"] / 1e6)
        assert (row["n"], row["threads"]) == {
            "": (4096, 2), "in cache": (4096, 1), "libraries": (1024, 2)
        }[case.where]  # fmt: skip
        assert row["peers"].keys() | row["skipped"].keys() == set(case.peers)
    assert rows[0]["peers"]["torch fused"]["bytes_per_param"] == 28
    assert rows[5]["peers"]["torch fused"]["bytes_per_param"] == 62
    skipped = rows[-2]["skipped"]
    assert skipped["DeepSpeed CPUAdam"] == "not installed"
    assert skipped["bitsandbytes AdamW"].startswith("AttributeError: module 'torch.optim' has no")
    assert rows[-1]["peers"]["torchao AdamW8bit"]["version"] == torch.__version__
    assert rows[-1]["peers"]["torchao AdamW8bit"]["state_bytes"] == 8


KINDS = {
    "buffer": ["--optimizers", "adamw", "sgd", "--n", "1e3"],
    "models": ["--models", "mlp", "--optimizers", "adamw", "sgd"],
    "step": ["--step", "--n", "1e3", "--no-torch"],
}


@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS)
def test_bench_prints_rows_as_they_come_and_keeps_them_when_interrupted(
    arguments, tmp_path, capsys, monkeypatch
):
    calls, outputs, interleave = [], [], bench.interleave

    def interrupted(*args):
        outputs.append(capsys.readouterr().out)
        calls.append(args)
        if len(calls) == (4 if "mlp" in arguments else 2):  # which has two for a row
            raise KeyboardInterrupt
        return interleave(*args)

    monkeypatch.setattr(bench, "interleave", interrupted)
    target = tmp_path / "rows.json"
    assert main(["bench", *arguments, "--rounds", "2", "--json", str(target)]) == 130
    assert len(json.loads(target.read_text())["rows"]) == 1
    assert "adamw " in "".join(outputs).lower()
    rest = capsys.readouterr().out
    assert "half of the\nrounds lie between its quartiles" in rest
    assert max(map(len, rest.splitlines())) <= 80


def test_bench_says_where_the_machine_was_busy():
    calm = bench.Conditions(threads=2, threads_used=1, cores_free=1.9, isa="avx2")
    assert calm.ran == "1 of 2 threads ran"
    assert calm.remark([(1.0, 1.2), (400.0, 410.0)]) == []
    assert replace(calm, cores_free=None).remark([]) == []
    busy = replace(calm, cores_free=0.9)
    assert busy.remark([(2.0, 3.0), (1.0, 1.0)]) == [
        "  ! busy: 0.9 cores free for 2 threads, quartiles 1.50x apart"
    ]
    (row,) = bench.measure(["sgd"], [100], rounds=1)
    assert "Disturbed" in demo.speed_table([replace(row, cores_free=0.9, threads=2)]).caption


def test_bench_marks_that_torch_is_not_installed(monkeypatch, capsys):
    find = importlib.util.find_spec
    without = lambda name, *rest: None if name == "torch" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    small = ["--optimizers", "adamw", "--n", "1000", "--rounds", "1"]
    assert main(["bench", *small]) == 0
    out = capsys.readouterr().out
    assert "torch is not installed" in out
    assert "for-loop" not in out
    for option in ("--compile", "--models"):
        assert main(["bench", *small[:2], option]) == 1
        assert f"{option} needs torch: pip install" in capsys.readouterr().err


def test_bench_checks_names_before_it_imports_torch():
    code = """
import sys
from fusedstep.__main__ import main
print(main(["bench", "--models", "vgg"]), main(["bench", "--threads", "5000"]))
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2 2\nFalse\n"
    assert done.stderr.count("\n") == 2


def test_bench_plot_shows_every_line_whole(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: found.append(figure))
    bench.plot(bench.measure(["adamw", "sgd"], [100, 10_000], rounds=1), tmp_path / "x.png")
    for axes in found[0].axes:
        assert {line.get_label() for line in axes.lines} >= {"fusedstep", "torch, fastest"}
        assert axes.get_yscale() == "log"
        low, high = axes.get_ylim()
        for line in axes.lines:
            assert low < min(line.get_ydata()) <= max(line.get_ydata()) < high


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 byte")]
)
def test_bench_says_in_a_line_that_memory_is_short(error, monkeypatch, capsys):
    def fails(*_):
        raise error

    monkeypatch.setattr(bench, "_row", fails)
    assert main(["bench", "--optimizers", "sgd", "--n", "1e3"]) == 2
    assert capsys.readouterr().err.splitlines()[1:] == ["fusedstep bench: out of memory"]


@pytest.mark.parametrize("n", ["1e15", "2^1000"])
def test_demo_refuses_what_does_not_fit_before_it_trains(n, monkeypatch, capsys):
    monkeypatch.setattr(demo, "train", lambda *_: 1 / 0)
    assert main(["demo", "--n", n]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fusedstep demo: --n must fit into memory, ")
    assert err.count("\n") == 1


# Bytes per float32 parameter: 12 for gradient and parameter, and 8 for each state.
@pytest.mark.parametrize(
    ("moved", "names"),
    [
        (12, ["sgd"]),
        (20, ["momentum", "nesterov", "adagrad", "rmsprop", "lion", "asgd"]),
        (28, ["adam", "adamw", "nadam", "adamax", "adadelta", "radam", "rprop"]),
        (36, ["amsgrad"]),
    ],
)
def test_bench_bytes_per_parameter(moved, names):
    for row in bench.measure(names, [1000], rounds=1, torch=False):
        assert row.bytes_per_param == moved, row.optimizer


BENCHES = {
    "one buffer": lambda **how: bench.measure(["sgd"], [100], rounds=1, **how),
    "one buffer, no torch": lambda **how: bench.measure(
        ["sgd"], [100], rounds=1, torch=False, **how
    ),
    "models": lambda **how: bench_models.measure(["lion"], ["mlp"], rounds=1, **how),
    "step": lambda **how: bench_step.measure(100, rounds=1, **how),
}


@pytest.mark.parametrize("run", BENCHES.values(), ids=BENCHES)
@pytest.mark.parametrize("fails", [False, True])
def test_bench_leaves_threads_isa_and_random_numbers_as_they_were(run, fails, monkeypatch):
    monkeypatch.setattr(bench_step, "CASES", bench_step.CASES[5:6])
    if fails:
        monkeypatch.setattr(bench, "interleave", lambda *_: 1 / 0)
    kept = torch.get_num_threads()
    torch.set_num_threads(3)
    before = fs.num_threads(), fs.isa(), torch.get_rng_state()
    try:
        with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
            (row,) = run(threads=before[0] + 1, isa="scalar")
            assert (row.threads, row.isa) == (before[0] + 1, "scalar")
        assert torch.get_num_threads() == 3
        assert (fs.num_threads(), fs.isa()) == before[:2]
        assert torch.equal(torch.get_rng_state(), before[2])
    finally:
        torch.set_num_threads(kept)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizers", "adm"], "bench: --optimizers must be of sgd, "),
        (["--optimizers", "adm"], ", got 'adm'; adam may be meant"),
        (["--optimizers", "sgd", "x"], ", rprop, got 'x'\n"),
        (["--dtype", "float8"], "'float8'"),
        (["--isa", "sse9"], "'sse9'"),
        (["--n", "x"], "bench: --n must be an integer >= 1 (1000, 1e6, 2^26), got 'x'"),
        (["--json", "/no/such/folder/x.json"], "/no/such/folder"),
        (["--plot", "/no/such/folder/x.png"], "/no/such/folder"),
        (["--plot", "x.notaformat"], "x.notaformat"),
        (["--json", "."], "cannot write ."),
        (["--models", "--n", "5"], "--n must not be given with --models"),
        (["--models", "--dtype", "float64"], "--dtype must be float32"),
        (["--models", "vgg"], "got 'vgg'"),
        (["--step", "--sweep"], "--sweep must not be given with --step"),
        (["--step", "--models"], "--models must not be given with --step"),
        (["--threads", "5000"], "bench: --threads must be from 1 to 4096, got 5000"),
        (["--models", "--threads", "5000"], "bench: --threads must be from 1 to 4096, got 5000"),
        (["--n", "1e15"], "bench: --n must fit into memory, "),
        (["--step", "--n", "1e15"], "bench: --n must fit into memory, "),
        (["--sweep", "--n", "5"], "--sweep must not be given with --n"),
        (["--compile", "--no-torch"], "--compile must not be given with --no-torch"),
        (["--compile", "--grad-dtype", "bfloat16"], "--compile must not be given with another"),
        (["--step", "--n", "5", "6"], "--n must be one size with --step, got 2"),
    ],
)
def test_bench_says_what_is_wrong(arguments, message, capsys):
    try:
        status = main(["bench", "--rounds", "1", *arguments])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("n", ["0", "-5", "1.5", "x", "2^-1", "nan"])
def test_bench_refuses_wrong_sizes(n, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", f"--n={n}"])
    assert stop.value.code == 2
    assert f"got '{n}'" in capsys.readouterr().err


def plotted(monkeypatch, *arguments):
    """The Axes that `fusedstep plot` draws."""
    found = []
    draw = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: found.append(f) or draw(f, *a, **k))
    assert main(["plot", *arguments]) == 0
    return found[0].axes[0]


@pytest.mark.parametrize(("total", "warmup"), [("1000", "50"), ("1e3", "50.00000000000001")])
def test_plot_draws_the_schedule_asked_for(tmp_path, monkeypatch, capsys, total, warmup):
    picture = tmp_path / "lr.png"
    arguments = ["cosine", "--lr", "0.1", "--total", total, "--warmup", warmup, "-o", str(picture)]
    ax = plotted(monkeypatch, *arguments)
    assert capsys.readouterr().out.strip() == str(picture)
    assert picture.read_bytes().startswith(PNG)
    (line,) = ax.lines
    expected = schedules.Cosine(0.1, total=1000).warmup(50)
    np.testing.assert_array_equal(line.get_xdata(), range(1051))
    np.testing.assert_array_equal(line.get_ydata(), expected(range(1051)))
    assert ax.get_title() == repr(expected)


def test_plot_draws_several_with_their_own_options(tmp_path, monkeypatch):
    ax = plotted(
        monkeypatch, "linear", "WSD", "one-cycle", "multistep", "--lr", "0.1", "--total", "100",
        "--decay", "20", "--shape", "1-sqrt", "--milestones", "30", "60", "--steps", "120",
        "--three-phase", "-o", str(tmp_path / "lr.svg"),
    )  # fmt: skip
    expected = {
        "linear": schedules.Linear(0.1, 100),
        "wsd": schedules.WSD(0.1, 100, 20, shape="1-sqrt"),
        "onecycle": schedules.OneCycle(0.1, 100, three_phase=True),
        "multistep": schedules.MultiStep(0.1, [30, 60]),
    }
    assert [line.get_label() for line in ax.lines] == list(expected)
    for line in ax.lines:
        np.testing.assert_array_equal(line.get_ydata(), expected[line.get_label()](range(121)))


PLOTS = {
    "Constant": "",
    "Step": "--every 3",
    "MultiStep": "--milestones 3 5",
    "Exponential": "--decay 0.5",
    "Linear": "--total 9",
    "Cosine": "--total 9",
    "Polynomial": "--total 9 --power 2",
    "CosineRestarts": "--period 3 --mult 2",
    "InverseSqrt": "--timescale 4",
    "WSD": "--total 9 --decay 3",
    "OneCycle": "--total 9 --anneal linear",
    "Cyclic": "--base-lr 0.01 --step-size-up 3",
}


def test_plot_knows_every_schedule(tmp_path):
    assert PLOTS.keys() == set(schedules.__all__) - {"Schedule", "ReduceOnPlateau", "from_dict"}
    for name, options in PLOTS.items():
        output = ["-o", str(tmp_path / name) + ".png"]
        assert main(["plot", name, "--lr", "0.1", *options.split(), *output]) == 0


def test_plot_takes_counts_in_exponent_form_and_any_length(tmp_path):
    output = ["-o", str(tmp_path / "long.png")]
    assert main(["plot", "cosine", "--lr", "1e-1", "--total", "1e6", *output]) == 0
    assert main(["plot", "Cosine_Restarts", "--lr", "0.1", "--period", "9", *output]) == 0
    assert main(["plot", "step", "--lr", "0.1", "--every", str(2**52), *output]) == 0
    assert main(["plot", "inversesqrt", "--lr", "0.1", "--timescale", "1e308", *output]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sine", "--lr", "1"], "'sine'"),
        ([], "SCHEDULE"),
        (["cosine", "--lr", "0.1"], "cosine needs --total"),
        (["cosine", "--total", "9"], "cosine needs --lr"),
        (["cosine", "--lr", "nan", "--total", "9"], "lr must be finite and >= 0, got nan"),
        (["cosine", "--lr=-1", "--total", "9"], "lr must be finite and >= 0, got -1"),
        (["cosine", "--lr", "x", "--total", "9"], "lr must be a finite number >= 0, got 'x'"),
        (["cosine", "--lr", "1", "--total=-9"], "total must be an integer from 1 to 2^53, got -9"),
        (["cosine", "--lr", "1", "--total", "9.5"], "total must be an integer >= 1, got 9.5"),
        (["cosine", "--lr", "1", "--total", "9", "--every", "3"], "--every must be given to a"),
        (["cosine", "--lr", "1", "--total", "9", "--start", "3"], "--start needs --warmup"),
        (["cosine", "Cosine", "--lr", "1", "--total", "9"], "each schedule must be named once"),
        (["cosine", "--lr", "1", "--total", "9", "--warmup=-3"], "--warmup must be an integer"),
        (["cosine", "--lr", "1", "--total", "9", "--steps", "0"], "steps must be an integer"),
        (["wsd", "--lr", "1", "--total", "9", "--decay", "12"], "decay must be <= total (9)"),
        (["constant", "--lr", "1", "-o", "/no/such/folder/x.png"], "/no/such/folder"),
        (["constant", "--lr", "1", "-o", "x.notaformat"], "x.notaformat"),
        (["constant", "--lr", "1", "-o", "x.pgf"], "cannot write x.pgf: its ending must be one of"),
    ],
)
def test_plot_says_what_is_wrong_and_writes_nothing(
    arguments, message, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["plot", *arguments])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_command_without_its_extra_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)  # as if rich were not installed
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["bench"]) == 1
    assert "pip install 'fusedstep[bench]'" in capsys.readouterr().err
