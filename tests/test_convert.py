"""Checkpoints of other libraries, recorded half way: a run goes on to the library's own end."""

import json
import pathlib
import pickle
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest

import fusedstep as fs
from fusedstep.__main__ import main
from fusedstep._arrays import as_dtype
from fusedstep.convert import _common
from optional import optional

FOLDER = pathlib.Path(__file__).parent / "golden" / "checkpoints"
RECORDED = {
    path.parent.name: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*/halfway.json"))
}


def arrays(library, flat):
    """A case's parameters or gradients by name, of float32."""
    shapes = RECORDED[library]["shapes"]
    return {name: np.array(flat[name], np.float32).reshape(shapes[name]) for name in shapes}


def stored(case):
    """Keras' variables by number, as `save_own_variables` stores them."""
    return {
        key: np.array(flat, np.int64 if key == "0" else np.float32).reshape(shape)
        for key, (shape, flat) in case["store"].items()
    }


def from_keras(case, params):
    how = {"optimizer": case["optimizer"], **case["arguments"]}
    if case["scheduled"]:
        how["learning_rate"] = {"class_name": "Table"}
    return fs.convert.from_keras(stored(case), params, **how)


def optax_state(tree):
    """A recorded state as orbax restores it."""
    if isinstance(tree, dict) and tree.keys() == {"w", "b"}:
        flat = arrays("optax", tree)
        return {"b": flat["b"], "w": flat["w"]}  # as jax sorts them
    if isinstance(tree, dict):
        return {key: optax_state(one) for key, one in tree.items()}
    if isinstance(tree, list):
        return [optax_state(one) for one in tree]
    return None if tree is None else np.array(tree, np.float32 if type(tree) is float else np.int32)


def from_optax(case, params):
    how = dict(case["arguments"])
    if case["how"] == "constant" and case["optimizer"] == "rmsprop":
        how["step"] = 10
    state = optax_state(case["state"])
    return fs.convert.from_optax(state, params, case["optimizer"], **how)


def from_torch(case, params):
    pytest.importorskip("torch")
    count = 10 if case["optimizer"] == "SGD" else None
    return fs.convert.from_torch(FOLDER / "torch" / case["file"], params, step=count)


def flat_state(case):
    """A state that is arrays by name."""
    return {
        key: np.array(flat, dtype).reshape(shape)
        for key, (dtype, shape, flat) in case["arrays"].items()
    }


def from_mlx(case, params):
    return fs.convert.from_mlx(flat_state(case), params, case["optimizer"], **case["arguments"])


def from_tinygrad(case, params):
    state = flat_state(case)
    how = {**case["arguments"], **({} if "b1_t" in state else {"step": 10})}
    return fs.convert.from_tinygrad(state, params, case["optimizer"], **how)


def from_paddle(case, params):
    state = flat_state(case)
    counts = any(key.endswith(("_pow_acc_0", "_pow_0", "_m_0")) for key in state)
    how = {**case["arguments"], **({} if counts else {"step": 10})}
    return fs.convert.from_paddle(state, params, case["optimizer"], **how)


def from_deepspeed(case, params):
    pytest.importorskip("torch")
    # Nothing says so of an optimizer that the client made.
    name = "AdamW" if case["optimizer"] == "DeepSpeedCPUAdam" else None
    return fs.convert.from_deepspeed(FOLDER / "deepspeed" / case["file"], params, name)


def from_bitsandbytes(case, params):
    pytest.importorskip("torch")
    path = FOLDER / "bitsandbytes" / case["file"]
    return fs.convert.from_bitsandbytes(path, params, case["optimizer"])


CONVERT = {
    "bitsandbytes": from_bitsandbytes,
    "deepspeed": from_deepspeed,
    "keras": from_keras,
    "mlx": from_mlx,
    "optax": from_optax,
    "paddle": from_paddle,
    "tinygrad": from_tinygrad,
    "torch": from_torch,
}


def each_case(accepts=lambda library, case: True):
    found = [
        pytest.param(library, case, id=f"{library}-{case['optimizer']}-{k}")
        for library, recorded in RECORDED.items()
        for k, case in enumerate(recorded["cases"])
        if accepts(library, case)
    ]
    return pytest.mark.parametrize(("library", "case"), found)


def gradients(library, case):
    """The gradients of the second half, by name, as the library's model gave them."""
    narrow = as_dtype("bfloat16" if "bf16" in case.get("config", ()) else "float32")
    for flat in RECORDED[library]["gradients"]:
        found = arrays(library, flat)
        yield {name: g.astype(narrow).astype(np.float32) for name, g in found.items()}


def check_end(library, case, state, ours):
    for name, end in arrays(library, case["end"]).items():
        # Ten steps in another order, each off by a few ulp of the parameter and of its update. A
        # norm to be clipped has 1e-6 added to it, as in torch.
        update = np.abs(end - arrays(library, case["half"])[name]).max()
        allowed = 2.0**-23 * (20 * np.abs(end) + 40 * update)
        allowed += 4e-6 * update if "max_norm" in state.at_step else 0
        error = np.abs(ours[name] - end)
        assert (error <= allowed).all(), f"{name}: {error.max()} of an update of {update}"


def test_every_library_is_recorded():
    assert RECORDED.keys() == CONVERT.keys()


@each_case()
def test_run_ends_where_the_library_s_does(library, case):
    params = arrays(library, case["half"])
    state = CONVERT[library](case, params)
    assert state.library == library
    for name, master in state.masters.items():
        assert np.array_equal(master, params[name])
    groups = [fs.Group(name) for own in state["param_groups"][1:] for name in own["param_names"]]
    opt = getattr(fs, state.optimizer)(params, lr=0.5, groups=groups)
    opt.load_state_dict(state)
    step = case.get("step", 10)
    assert opt.steps == state.step == step
    for rate, grads in zip(case["rates"], gradients(library, case), strict=True):
        for group in opt.param_groups:
            group["lr"] = rate
        opt.step(grads, **state.at_step)
    assert opt.steps == step + 10
    check_end(library, case, state, params)


@each_case(lambda library, case: case["optimizer"].lower() in ("sgd", "rmsprop", "adamw"))
def test_run_ends_there_in_torch_s_layer_too(library, case):
    torch = optional("torch")
    import fusedstep.torch

    params = {
        n: torch.nn.Parameter(torch.tensor(p)) for n, p in arrays(library, case["half"]).items()
    }
    state = CONVERT[library](case, dict(params))
    groups = [{"params": [params[n] for n in own["param_names"]]} for own in state["param_groups"]]
    opt = getattr(fusedstep.torch, state.optimizer)(groups, lr=0.5)
    opt.load_state_dict(state)
    for rate, grads in zip(case["rates"], gradients(library, case), strict=True):
        for name, g in grads.items():
            params[name].grad = torch.tensor(g)
        for group in opt.param_groups:
            group["lr"] = rate
        opt.step(**state.at_step)
    check_end(library, case, state, {name: p.detach().numpy() for name, p in params.items()})


# -- Keras -----------------------------------------------------------------------------------------


@each_case(lambda library, case: "store" in case)
def test_keras_variables_come_back(library, case):
    state = from_keras(case, arrays(library, case["half"]))
    back = fs.convert.to_keras(state)
    assert list(back) == list(case["store"])
    for key, one in stored(case).items():
        assert np.array_equal(back[key], one)


@each_case(lambda library, case: "store" in case and case["file"])
def test_keras_file_has_what_the_variables_have(library, case):
    pytest.importorskip("h5py")
    shapes = RECORDED["keras"]["shapes"]
    path = FOLDER / "keras" / case["file"]
    expected = from_keras(case, shapes)
    if path.suffix == ".keras":  # which has the arguments
        found = fs.convert.from_keras(path, shapes)
    else:
        with pytest.warns(UserWarning, match="SGD.weights.h5 does not say nesterov=False, w"):
            found = fs.convert.from_keras(path, shapes, momentum=0.8)
        assert found.assumed == {"nesterov": False, "weight_decay": None}
        found = fs.convert.from_keras(path, shapes, optimizer="SGD", **case["arguments"])
    assert found.assumed == ({} if path.suffix == ".keras" else {"nesterov": False})
    assert found["param_groups"] == expected["param_groups"]
    assert found["step"] == expected["step"] == 10
    for i, state in expected["state"].items():
        assert found["state"][i].keys() == state.keys()
        assert all(np.array_equal(found["state"][i][key], state[key]) for key in state)


def adam(**more):
    """What Keras' Adam keeps of one parameter."""
    zeros = np.zeros(3, np.float32)
    return {"0": np.int64(3), "1": np.float32(0.1), "2": zeros, "3": zeros, **more}


@pytest.mark.parametrize(
    ("store", "how", "error", "message"),
    [
        (adam(), {}, ValueError, "optimizer must be given: source says '', which is none of SGD"),
        (adam(), {"optimizer": "Ftrl"}, ValueError, "must have an optimizer of SGD.*, got Ftrl"),
        (
            adam(),
            {"optimizer": "SGD", "momentum": 0.9},
            ValueError,
            "variables of SGD: iteration, learning_rate; momentum_buffer of each parameter,"
            " 3 for 1; got 4: are its options others?",
        ),
        (
            {"0": np.int64(0), "1": np.float32(0.1)},
            {"optimizer": "Adam"},
            ValueError,
            "got 2: the optimizer has not been built",
        ),
        (
            {key: one for key, one in adam().items() if key != "2"},
            {"optimizer": "Adam"},
            ValueError,
            r"must have variables 0 to 2, got missing \[2\], unknown \[\]",
        ),
        (
            adam(**{"3": np.zeros(4, np.float32)}),
            {"optimizer": "Adam"},
            ValueError,
            r"source: exp_avg_sq of 'w' must have shape \(3,\), got \(4,\)",
        ),
        (
            adam(),
            {"optimizer": "Adam", "beta_3": 0.5},
            TypeError,
            "beta_3 must be an argument of Keras' Adam: amsgrad, beta_1",
        ),
        (
            adam(),
            {"optimizer": "Adam", "beta_1": 1.5},
            ValueError,
            r"betas\[0\] must be in \[0, 1\), got 1.5",
        ),
        (
            adam(),
            {"optimizer": "Adam", "clipnorm": 1.0},
            ValueError,
            "clipnorm must be None, got 1.0, which clips each variable by itself",
        ),
        (
            {**adam(), "2": np.ones(3, np.float32), "4": np.ones(3, np.float32)},
            {"optimizer": "Adam", "gradient_accumulation_steps": 2},
            ValueError,
            "must be saved after all 2 of gradient_accumulation_steps, got gradients of 1",
        ),
    ],
)
def test_keras_variables_that_do_not_fit_are_refused(store, how, error, message):
    with pytest.raises(error, match=message):
        fs.convert.from_keras(store, {"w": np.zeros(3, np.float32)}, **how)


@pytest.mark.parametrize("name", ["AdamW.keras", "SGD.weights.h5"])
def test_truncated_keras_file_is_refused(name, tmp_path):
    pytest.importorskip("h5py")
    whole = (FOLDER / "keras" / name).read_bytes()
    for n in (2, 5000, len(whole) - 300):
        (tmp_path / name).write_bytes(whole[:n])
        with pytest.raises(ValueError, match=f"{name} must be a whole"):
            fs.convert.from_keras(tmp_path / name, RECORDED["keras"]["shapes"], optimizer="SGD")


def test_to_keras_refuses_what_keras_has_not():
    w = np.zeros(3, np.float32)
    opt = fs.AdamW(w)
    opt.step(np.ones_like(w))
    with pytest.raises(TypeError, match="optimizer must name our class, as 'AdamW'"):
        fs.convert.to_keras(opt.state_dict())
    with pytest.raises(ValueError, match=r"keras.Adam has eps_hat=True, not False"):
        fs.convert.to_keras(opt.state_dict(), optimizer="AdamW")


# -- MLX, Paddle, tinygrad ---------------------------------------------------------------------


@each_case(lambda library, case: "arrays" in case)
def test_flat_state_comes_back(library, case):
    params = arrays(library, case["half"])
    state = CONVERT[library](case, params)
    if library == "mlx":
        back = fs.convert.to_mlx(state)
    elif library == "tinygrad":
        back = fs.convert.to_tinygrad(state, fused=case["fused"])
    else:
        back = fs.convert.to_paddle(state, [Named(name) for name in case["names"].values()])
    expected = flat_state(case)
    if case["optimizer"] == "ASGD":  # which is our SGD, and comes back as Paddle's
        assert back == {}
        return
    unread = ["params.0", "params.1"]
    if not case["arguments"].get("momentum"):  # Paddle and MLX have a buffer without it, too
        unread += [key for key in expected if key.endswith("_momentum_0")]
        unread += [key for key in expected if case["optimizer"] == "SGD" and key.endswith(".v")]
    assert back.keys() | set(unread) == expected.keys() | set(unread)
    for key in expected.keys() - set(unread):
        assert back[key].dtype == expected[key].dtype
        near = 1e-5 if key.endswith("rho_0") else 0
        np.testing.assert_allclose(back[key], expected[key], near, 0, err_msg=key)


W = np.ones(3, np.float32)
MLX = {"step": np.uint64(3), "learning_rate": np.float32(0.1), "w": {"m": W, "v": W}}
TINYGRAD = {"params.0": W, "lr": W[:1], "m.0": W, "v.0": W}
TINYGRAD |= {"b1_t": np.float32([0.729]), "b2_t": np.float32([0.997003])}
PADDLE = {"w_0_moment1_0": W, "w_0_moment2_0": W}
PADDLE |= {
    "w_0_beta1_pow_acc_0": np.float32([0.6561]),
    "w_0_beta2_pow_acc_0": np.float32([0.996006]),
}


@pytest.mark.parametrize(
    ("library", "state", "params", "how", "error", "message"),
    [
        ("mlx", MLX, None, {}, ValueError, "given: m, v may be of Adam, AdamW, A"),
        ("mlx", MLX, None, {"optimizer": "Lion"}, ValueError, "must have m of Lion, got m, v"),
        ("mlx", MLX, {"b": W}, {"optimizer": "Adam"}, ValueError, r"\['b'\], unknown \['w'"),
        ("mlx", MLX, {"w": (4,)}, {"optimizer": "Adam"}, ValueError, r"'w' must have shape \(4,\)"),
        ("mlx", {"states": [MLX]}, None, {}, ValueError, "got MultiOptimizer's: convert each of"),
        ("mlx", {"w": {"m": W}}, None, {}, ValueError, "an MLX optimizer's state, got no step"),
        ("mlx", 3, None, {}, TypeError, "source must be a path or a dict of arrays, got int"),
        ("mlx", MLX, None, {"optimizer": "Adam", "rho": 1}, TypeError, "Adam's, got 'rho'"),
        ("tinygrad", TINYGRAD, None, {}, ValueError, "m, v may be of Adam, AdamW"),
        ("tinygrad", TINYGRAD, None, {"optimizer": "SGD"}, ValueError, "b of SGD, got m, v"),
        ("tinygrad", TINYGRAD, [W, W], {"optimizer": "Adam"}, ValueError, "2 parameters, got 1"),
        ("tinygrad", TINYGRAD | {"m.0": W[:2]}, None, {"optimizer": "Adam"}, ValueError,
         r"m.0 must have 3 elements, got shape \(2,\)"),
        ("tinygrad", TINYGRAD, None, {"optimizer": "Adam", "b2": 0.99}, ValueError,
         "b2_t must be a power of b2=0.99, got 0.997.*: was b2 another?"),
        ("tinygrad", TINYGRAD | {"b1_t": np.float32([0.81])}, None, {"optimizer": "Adam"},
         ValueError, "must be of one count of updates, got 2 by b1_t, 3 by b2_t"),
        ("tinygrad", {"params.0": W, "lr": W[:1]}, None, {"optimizer": "SGD", "momentum": 0.9},
         ValueError, "must have b of SGD|SGD with momentum=0.9, got no b"),
        ("tinygrad", {"params.0": W, "lr": W[:1]}, None, {"optimizer": "SGD"}, ValueError,
         "step must be given: source has no count"),
        ("tinygrad", {"optimizers.0.lr": W}, None, {}, ValueError, "one optimizer, got Optimiz"),
        ("paddle", PADDLE, None, {}, ValueError, "may be of Adam, AdamW"),
        ("paddle", PADDLE, None, {"optimizer": "RAdam"}, ValueError, "beta1_pow, .* of RAdam, got"),
        ("paddle", PADDLE, [W, W], {"optimizer": "Adam"}, ValueError, "2 parameters, got 1: w_0"),
        ("paddle", PADDLE, [(4,)], {"optimizer": "Adam"}, ValueError, r"must have shape \(4,\)"),
        ("paddle", PADDLE, None, {"optimizer": "Adam", "amsgrad": True}, ValueError,
         "amsgrad must be False, as source has it, got True"),
        ("paddle", {"velocity": W}, None, {}, ValueError, "of Paddle's .*, got 'velocity'"),
        ("paddle", {"w_velocity_0": W}, None, {"optimizer": "Momentum"}, ValueError,
         "step must be given: source has no count"),
        ("paddle", {}, None, {"optimizer": "SGD"}, ValueError, "params must be given: source"),
    ],
)  # fmt: skip
def test_flat_state_that_does_not_fit_is_refused(library, state, params, how, error, message):
    with pytest.raises(error, match=message):
        getattr(fs.convert, f"from_{library}")(state, params, **how)


def test_flat_states_say_what_was_assumed():
    with pytest.warns(UserWarning, match=r"source does not say momentum=0.9, .*: Paddle's default"):
        found = fs.convert.from_paddle({"w_velocity_0": W}, [Named("w", (3,))], step=5)
    assert found.assumed == {"momentum": 0.9, "use_nesterov": False, "weight_decay": None}
    assert found.theirs == "Momentum"
    with pytest.warns(UserWarning, match=r"MLX' defaults"):
        assert fs.convert.from_mlx({**MLX, "w": {"m": W}}).theirs == "Lion"


# What each converter fills in for a caller who names the class and one argument.
ASSUMED = {
    "bitsandbytes": {"decay_after": False},
    "deepspeed": {"maximize": False},
    "keras": {"beta_2": 0.999, "epsilon": 1e-7, "amsgrad": False, "weight_decay": None},
    "mlx": {"betas": (0.9, 0.999), "eps": 1e-8},
    "optax": {"b2": 0.999, "eps": 1e-8, "eps_root": 0.0, "nesterov": False},
    "paddle": {"beta2": 0.999, "epsilon": 1e-8, "weight_decay": None},
    "tinygrad": {"b2": 0.999, "eps": 1e-8},
    "torch": {"weight_decay": 0.0, "maximize": False},
}


@pytest.mark.parametrize("library", CONVERT)
def test_arguments_that_nobody_said_are_told_by_every_converter(library):
    flat = {"count": 3, "mu": {"w": W}, "nu": {"w": W}}
    source, how = {
        "bitsandbytes": (FOLDER / "bitsandbytes" / "Adam.pt", {}),
        "deepspeed": (FOLDER / "deepspeed" / "zero2of3", {}),
        "keras": (adam(), {"beta_1": 0.8}),
        "mlx": (MLX, {"bias_correction": True}),
        "optax": (flat, {"b1": 0.8}),
        "paddle": (PADDLE, {"beta1": 0.9}),
        "tinygrad": (TINYGRAD, {"b1": 0.9}),
        "torch": (plain(), {}),
    }[library]
    if library in ("bitsandbytes", "deepspeed"):
        optional("torch")
    how["optimizer"] = "AdamW" if library == "deepspeed" else "adam" if flat is source else "Adam"
    found = getattr(fs.convert, f"from_{library}")(source, **how)  # without a warning: it is named
    assert found.assumed == ASSUMED[library]
    if library == "bitsandbytes":
        assert fs.convert.from_bitsandbytes(source, decay_after=False).assumed == {}
        assert fs.convert.from_bitsandbytes(source, decay_after=True).assumed == {}


def test_optax_and_keras_say_what_was_assumed():
    with pytest.warns(UserWarning, match=r"state does not say b1=0.9, b2=0.99, .*: optax' defaul"):
        found = fs.convert.from_optax({"count": 3, "m": 0, "mu": {"w": W}}, None, None)
    assert found.theirs == "lion"
    assert found.assumed == {"b1": 0.9, "b2": 0.99, "weight_decay": 1e-3}
    averaged = {**adam(), "4": W}
    found = fs.convert.from_keras(averaged, optimizer="Adam", use_ema=True)
    assert found.assumed["ema_momentum"] == found.at_step["ema"] == 0.99
    found = fs.convert.from_keras(averaged, optimizer="Adam", use_ema=True, ema_momentum=0.5)
    assert "ema_momentum" not in found.assumed
    assert found.at_step["ema"] == 0.5


RMSPROP = {"w_mean_square_0": W, "w_momentum_0": W, "w_mean_grad_0": 0 * W}
ASGD = {"w_d_0": W, "w_y_0": W[None], "w_m_0": np.array([3])}


@pytest.mark.parametrize(
    ("library", "state", "buffer", "how", "message"),
    [
        ("mlx", {**MLX, "w": {"v": 0 * W}}, ("w", {"v": W}), {"optimizer": "SGD"},
         "w.v must be 0 of SGD without momentum, which has no use for it, got 1.0"),
        ("paddle", RMSPROP, ("w_mean_grad_0", W), {"optimizer": "RMSProp", "step": 3},
         "mean_grad of w must be 0 of RMSProp, not centered, which has no use for it, got 1.0"),
        ("paddle", ASGD, ("w_y_0", np.stack([W, W])), {"optimizer": "ASGD"},
         "y of w must be the gradient of one batch, as d, got 2 of other values"),
        ("paddle", ASGD, ("w_y_0", 2 * W[None]), {"optimizer": "ASGD"},
         "y of w must be the gradient of one batch, as d, got 1 of other values"),
        ("optax", [{"trace": {"w": W}}, {"ema": {"w": 0 * W}}], 1, {"optimizer": "sgd"},
         r"1.ema.w must be 0 of sgd, which has no use for it, got 1.0"),
        ("optax", {"mini_step": 0, "gradient_step": 4, "acc_grads": [0 * W], "inner": {"trace": W}},
         ("acc_grads", [W]), {"optimizer": "sgd"}, "acc_grads.0 must be 0 of sgd, which"),
        ("tinygrad", {**TINYGRAD, "grad": 0 * W}, ("grad", W), {"optimizer": "Adam"},
         "grad must be 0 of Adam, which has no use for it, got 1.0"),
    ],
)  # fmt: skip
def test_buffer_of_other_arguments_is_refused(library, state, buffer, how, message):
    convert = getattr(fs.convert, f"from_{library}")
    if library == "optax":
        how = {**how, "momentum": 0.9, "step": 4}
    params = [W] if "acc_grads" in state or library in ("paddle", "tinygrad") else {"w": W}
    found = convert(state, params, **how)
    assert found.step in (3, 4)
    if isinstance(buffer, int):
        state = [state[0], {"ema": {"w": W}}]
    else:
        state = {**state, buffer[0]: buffer[1]}
    with pytest.raises(ValueError, match=message):
        convert(state, params, **how)


@pytest.mark.parametrize("steps", [1, 3, 700, 60_000, 65_535, 65_536, 87_292])
def test_powers_are_counted_to_the_step(steps):
    # As Paddle multiplies them up, in float32; logarithms are off by whole steps from 38,539 on.
    value = {1: np.float32(1), 2: np.float32(1)}
    for _ in range(steps + 1):
        value = {1: value[1] * np.float32(0.9), 2: value[2] * np.float32(0.999)}
    state = PADDLE | {f"w_0_beta{k}_pow_acc_0": value[k].reshape(1) for k in (1, 2)}
    assert fs.convert.from_paddle(state, [W], "Adam").step == steps


def test_powers_that_are_not_normal_say_nothing():
    power = np.multiply.accumulate(np.full(100_000, 0.999, np.float32))
    first = int((power < np.finfo(np.float32).tiny).argmax())  # one power more than updates
    assert first == 87_293
    for vanished in (first, 99_999):
        state = PADDLE | {f"w_0_beta{k}_pow_acc_0": power[[vanished]] for k in (1, 2)}
        with pytest.raises(ValueError, match=r"step must be given: .*beta2_pow_acc no longer say"):
            fs.convert.from_paddle(state, [W], "Adam")


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("beta", [0.5, 0.9, 0.99])
def test_powers_and_counts_are_each_other_s(beta, dtype):
    dtype = as_dtype(dtype)
    value, n = dtype.type(1), 0
    least = 2.0**-14 if dtype.name == "float16" else 2.0**-126
    while value >= least:
        assert _common.power_to(beta, n, dtype) == value
        assert _common.power_of("a", np.array(value), "beta", beta, None) == n
        value, n = dtype.type(value * dtype.type(beta)), n + 1
    assert n > 10


def test_forged_powers_and_counts_take_no_memory():
    beta = 1 - 1e-7
    state = TINYGRAD | {"b1_t": np.zeros(1, np.float32), "b2_t": np.float32([0.01])}
    message = r"step must be given: .*b2_t must be a power of b2=0.9999999 of at most 16777216 upda"
    with pytest.raises(ValueError, match=message):
        fs.convert.from_tinygrad(state, None, "Adam", b2=beta)
    found = fs.convert.from_tinygrad(state, None, "Adam", b2=beta, step=10**8)
    assert found.step == 10**8
    with pytest.raises(ValueError, match=r"step must be at most 16777216 .* 0.9999999, got 10000"):
        fs.convert.to_tinygrad(found)
    found["param_groups"][0]["betas"] = (0.9, 0.999)
    found["step"] = 10**12  # from where powers no longer change, each is the last
    for entry in found["state"].values():
        entry["step"] = 10**12
    back = fs.convert.to_tinygrad(found)
    power = np.multiply.accumulate(np.full(100_000, 0.999, np.float32))
    assert back["b2_t"].shape == (1,)
    assert back["b2_t"][0] == power[-1] > 0


def test_powers_that_have_vanished_say_nothing():
    state = PADDLE | {f"w_0_beta{k}_pow_acc_0": np.zeros(1, np.float32) for k in (1, 2)}
    with pytest.raises(ValueError, match=r"step must be given: .*beta2_pow_acc no longer say"):
        fs.convert.from_paddle(state, [W], "Adam")
    assert fs.convert.from_paddle(state, [W], "Adam", step=10**6).step == 10**6


def test_state_of_a_fused_tinygrad_optimizer_may_be_said_to_be():
    fused = TINYGRAD | {"params.0": W[:1], "params.1": W[1:]}
    found = fs.convert.from_tinygrad(fused, None, "Adam", fused=True)
    assert [len(entry["exp_avg"]) for entry in found["state"].values()] == [1, 2]
    assert "fused" not in found.assumed


def test_flat_states_are_read_from_files(tmp_path):
    pytest.importorskip("safetensors")
    for library in ("mlx", "tinygrad", "paddle"):
        read = [case for case in RECORDED[library]["cases"] if case["file"]]
        assert read
        for case in read:
            params = arrays(library, case["half"])
            memory = CONVERT[library](case, params)
            path = FOLDER / library / case["file"]
            how = {"optimizer": case["optimizer"], **case["arguments"]}
            convert = getattr(fs.convert, f"from_{library}")
            file = convert(path, params, **how)
            assert file.step == memory.step
            for i in memory["state"]:
                for key, one in memory["state"][i].items():
                    assert np.array_equal(file["state"][i][key], one)
            cut = tmp_path / case["file"]
            cut.write_bytes(path.read_bytes()[:-200])
            with pytest.raises(ValueError, match=f"{case['file']} must be a whole "):
                convert(cut, params, **how)


# In bfloat16 all values are exact; among the bits are a subnormal number, the largest, and NaN.
BITS = np.array([0x3F80, 0xC049, 0x3B80, 0x0001, 0x7F7F, 0x8000, 0xFF80, 0x7FC1], np.uint16)
READ = """
import sys
import numpy as np
import fusedstep as fs

found = fs.convert.from_mlx(sys.argv[1], {"w": (2, 4)}, "Adam")
for key in ("exp_avg", "exp_avg_sq"):
    state = found["state"][0][key]
    print(state.dtype.name, state.shape, state.view(np.uint16).ravel().tolist(), float(state[0, 1]))
opt = fs.Adam({"w": np.ones((2, 4), np.float32)})
opt.load_state_dict(found)
for key in ("exp_avg", "exp_avg_sq"):
    state = opt.state_dict()["state"][0][key]
    print(state.dtype.name, (state.view(np.uint32) >> 16).ravel().tolist())
"""


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_bfloat16_in_files_is_bit_for_bit(kind, tmp_path):
    # By a process that has not imported ml_dtypes yet, without which NumPy has two bytes alone.
    pytest.importorskip("ml_dtypes")
    m, v = BITS.reshape(2, 4), (BITS & 0x7FFF)[::-1].reshape(2, 4).copy()
    path = tmp_path / f"a.{kind}"
    scalars = {"step": np.array(3, np.uint64), "learning_rate": np.array(0.1, np.float32)}
    if kind == "npz":  # as NumPy writes a type that it does not know
        np.savez(path, **scalars, **{"w.m": m.view("V2"), "w.v": v.view("V2")})
    else:
        pytest.importorskip("safetensors")
        held = [
            ("step", "U64", scalars["step"]),
            ("learning_rate", "F32", scalars["learning_rate"]),
        ]
        held += [("w.m", "BF16", m), ("w.v", "BF16", v)]
        header, at = {}, 0
        for name, dtype, one in held:
            end = at + one.nbytes
            header[name] = {"dtype": dtype, "shape": list(one.shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        content = b"".join(one.tobytes() for _, _, one in held)
        path.write_bytes(len(text).to_bytes(8, "little") + text + content)
    done = subprocess.run(
        [sys.executable, "-c", READ, path], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        f"bfloat16 (2, 4) {m.ravel().tolist()} {-3.140625}",
        f"bfloat16 (2, 4) {v.ravel().tolist()} inf",
        f"float32 {m.ravel().tolist()}",
        f"float32 {v.ravel().tolist()}",
    ]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_parameters_of_tinygrad_are_masters(fused, named):
    # Twelve of them: their numbers are no text, by which 10 would be before 2.
    params = [np.full((1 + i % 3, 2), i, np.float32) for i in range(12)]
    moments = [one + np.float32(0.5) for one in params]
    state = {f"params.{i}": one for i, one in enumerate(params)}
    state |= {"lr": W[:1], "buffers.0": 7 * W}
    flat = [np.concatenate([one.ravel() for one in moments])] if fused else moments
    state |= {f"b.{i}": one for i, one in enumerate(flat)}
    state = dict(sorted(state.items()))
    names = [f"p{i}" for i in range(12)]
    given = {name: one.shape for name, one in zip(names, params, strict=True)} if named else None
    found = fs.convert.from_tinygrad(state, given, "SGD", step=3, momentum=0.9)
    assert list(found.masters) == (names if named else list(range(12)))
    for i, master in enumerate(found.masters.values()):
        np.testing.assert_array_equal(master, params[i], strict=True)
        np.testing.assert_array_equal(found["state"][i]["momentum_buffer"], moments[i], strict=True)
    back = fs.convert.to_tinygrad(found, fused=fused)
    assert back.keys() == {key for key in state if key[0] in "bl" and key != "buffers.0"}
    for key, one in back.items():  # without the parameters, which are the model's
        np.testing.assert_array_equal(one, state[key], strict=True)


def test_paddle_file_of_other_things_is_refused(tmp_path):
    path = tmp_path / "a.pdopt"
    path.write_bytes(pickle.dumps({"w_0_moment1_0": Harmless()}))
    with pytest.raises(ValueError, match=r"a.pdopt must be .* of arrays: it names .*Harmless"):
        fs.convert.from_paddle(path)
    state = {"master_weights": {"w_0": ("eager_tmp_0", 2 * W)}, "LR_Scheduler": {"last_epoch": 3}}
    state |= {k.replace("w_0", "w_0_fp32_master_0"): ("eager_tmp_1", v) for k, v in PADDLE.items()}
    path.write_bytes(pickle.dumps(state | {"StructuredToParameterName@@": {"a": "b"}}, 2))
    found = fs.convert.from_paddle(path, {"weight": W}, "AdamW")
    assert found.step == 3
    assert np.array_equal(found.masters["weight"], 2 * W)
    assert "lr" not in found["param_groups"][0]


class Named:
    """What a Paddle parameter has, of which only its name is read."""

    def __init__(self, name, shape=()):
        self.name, self.shape = name, shape


def test_groups_that_a_library_has_not_are_refused():
    params, grads = ({"w": W.copy(), "b": W.copy()} for _ in range(2))
    group = fs.Group("b", lr=0.5, weight_decay=0.0)
    opt = fs.conventions.keras.AdamW(params, learning_rate=0.1, groups=[group])
    opt.step(grads)
    with pytest.raises(
        ValueError, match=r"\[1\] must have learning_rate=0.1 as the first, got 0.5"
    ):
        fs.convert.to_keras(opt.state_dict(), optimizer="AdamW")
    opt.param_groups[1]["lr"] = 0.1
    assert fs.convert.to_keras(opt.state_dict(), optimizer="AdamW")["1"] == np.float32(0.1)
    opt = fs.conventions.paddle.AdamW(params, groups=[group])
    opt.step(grads)
    found = fs.convert.to_paddle(opt.state_dict(), optimizer="AdamW")
    assert found["b_beta1_pow_acc_0"] == np.float32(0.9) * np.float32(0.9)


@pytest.mark.parametrize("name", [name for name in fs.convert.__all__ if name.startswith("to_")])
def test_what_is_no_checkpoint_is_refused(name):
    rest = [None] if name == "to_optax" else []
    with pytest.raises(TypeError, match="state_dict must be a dict, got int"):
        getattr(fs.convert, name)(3, *rest, optimizer="Adam")


# -- optax -----------------------------------------------------------------------------------------


class ScaleByAdamState(NamedTuple):
    count: object
    mu: object
    nu: object


class EmptyState(NamedTuple):
    pass


def test_optax_state_takes_any_of_its_forms():
    w, b = np.ones((2, 3), np.float32), np.zeros(4, np.float32)
    nested = {"dense": {"bias": b, "kernel": w}}
    inner = ScaleByAdamState(np.int32(7), nested, nested)
    forms = [
        (inner, EmptyState()),
        (EmptyState(), (inner, EmptyState())),  # as chain(clip, adam) has it
        [{"count": np.int32(7), "mu": nested, "nu": nested}, None],  # orbax
        {"0": {"count": np.int32(7), "mu": nested, "nu": nested}, "1": {}},  # flax
    ]
    for state in forms:
        for params in (
            nested,
            {"dense.kernel": w, "dense.bias": b},
            {"dense/kernel": w, "dense/bias": b},
        ):
            found = fs.convert.from_optax(state, params, "adam", learning_rate=0.1)
            assert found.step == 7
            names = found["param_groups"][0]["param_names"]
            shapes = [found["state"][i]["exp_avg"].shape for i in range(2)]
            assert shapes == [{"kernel": (2, 3), "bias": (4,)}[name[6:]] for name in names]
    assert fs.convert.from_optax((ScaleByAdamState(1, w, w),), w, "adam")["state"][0]["step"] == 1


@each_case(lambda library, case: library == "optax")
def test_optax_state_comes_back(library, case):
    params = arrays(library, case["half"])
    state = optax_state(case["state"])
    back = fs.convert.to_optax(from_optax(case, params), state)
    same = json.dumps(state, default=lambda a: a.tolist())
    assert json.dumps(back, default=lambda a: a.tolist()) == same


@pytest.mark.parametrize(
    ("state", "optimizer", "error", "message"),
    [
        (
            {"count": 1, "mu": {}, "nu": {}},
            None,
            ValueError,
            "mu, nu may be of rmsprop, adam, adamw, ",
        ),
        ({}, None, ValueError, "optimizer must be given: nothing may be of sgd"),
        ({}, "adagrid", ValueError, "optimizer must be one of sgd, .*, got 'adagrid'"),
        ({}, "rprop", ValueError, "optax's rprop applies each step's update in the next"),
        (
            {"count": 1, "mu": {}},
            "adamw",
            ValueError,
            r"state must have mu, nu of adamw\(\), got mu",
        ),
        (
            {"trace": {}},
            "sgd",
            ValueError,
            r"state must have nothing of sgd\(momentum=None\), got trace",
        ),
        ([{"trace": {}}, {"trace": {}}], "sgd", ValueError, "got trace more than once"),
        (
            {"mini_step": 2, "gradient_step": 4, "inner_opt_state": {}},
            "adam",
            ValueError,
            "state must be between two updates, got mini_step=2",
        ),
        ({"sum_of_squares": {"w": 0}}, "adagrad", ValueError, "step must be given: this state of"),
        (
            ScaleByAdamState(1, {"w": np.ones(3)}, {"v": np.ones(3)}),
            "adam",
            ValueError,
            r"state must have nu of each parameter, got missing \['w'\], unknown \['v'\]",
        ),
        (
            ScaleByAdamState(1, {"v": np.ones(3)}, {"v": np.ones(3)}),
            "adam",
            ValueError,
            r"state must be of params, got missing \['w'\], unknown \['v'\]",
        ),
        (
            ScaleByAdamState(1, {"w": np.ones(4)}, {"w": np.ones(4)}),
            "adam",
            ValueError,
            r"state: mu of 'w' must have shape \(3,\), got \(4,\)",
        ),
        (
            ScaleByAdamState(1, {"w": np.ones(3)}, {"w": np.ones(3)}),
            "amsgrad",
            ValueError,
            "state must have mu, nu, nu_max of amsgrad",
        ),
    ],
)
def test_optax_state_that_does_not_fit_is_refused(state, optimizer, error, message):
    with pytest.raises(error, match=message):
        fs.convert.from_optax(state, {"w": np.zeros(3, np.float32)}, optimizer)


# -- torch -----------------------------------------------------------------------------------------


def half_way(torch, name, **hypers):
    """An optimizer of torch after three steps, and its parameters."""
    params = [torch.nn.Parameter(torch.full((3,), float(k + 1))) for k in range(2)]
    opt = getattr(torch.optim, name)([{"params": [p]} for p in params], **hypers)
    for t in range(3):
        for p in params:
            p.grad = torch.tensor([0.5, -0.25, 2.0]) * (t + 1)
        opt.step()
    return opt, params


TORCH = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "foreach": True}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.2}),
    ("RMSprop", {"lr": 0.1, "alpha": 0.8, "centered": True}),
    ("Adadelta", {"lr": 0.1, "rho": 0.8}),
    ("Adam", {"lr": 0.1, "betas": (0.8, 0.9), "amsgrad": True}),
    ("AdamW", {"lr": 0.1, "weight_decay": 0.2, "fused": True}),
    ("Adamax", {"lr": 0.1, "weight_decay": 0.2}),
    ("NAdam", {"lr": 0.1, "weight_decay": 0.2}),
    ("RAdam", {"lr": 0.1, "betas": (0.8, 0.9), "decoupled_weight_decay": True}),
    ("ASGD", {"lr": 0.1, "t0": 1, "maximize": True}),
    ("Rprop", {"lr": 0.1}),
]


@pytest.mark.parametrize(("name", "hypers"), TORCH)
def test_torch_goes_on_and_comes_back(name, hypers):
    torch = optional("torch")
    theirs, params = half_way(torch, name, **hypers)
    state = fs.convert.from_torch(theirs.state_dict(), params)
    assert (state.optimizer, state.step) == (name, 0 if name == "SGD" else 3)
    ours = [p.detach().numpy().copy() for p in params]
    first = [p.copy() for p in ours]
    opt = getattr(fs, name)(ours, lr=0.5, groups=[fs.Group("1", weight_decay=0.3)])
    opt.load_state_dict(state)
    back, others = half_way(torch, name, **hypers)
    back.load_state_dict(fs.convert.to_torch(state))
    g = torch.tensor([1.0, 0.5, -3.0])
    for p in (*params, *others):
        p.grad = g.clone()  # torch's foreach SGD writes to it under nesterov
    theirs.step()
    back.step()
    opt.step([g.numpy(), g.numpy()])
    for p, q, mine, before in zip(params, others, ours, first, strict=True):
        assert torch.equal(p, q)
        update = np.abs(p.detach().numpy() - before).max()
        error = np.abs(p.detach().numpy() - mine).max()
        assert error <= 2.0**-23 * (8 + 40 * update)


def test_counts_by_group_are_each_parameter_s():
    # As Apex and Transformer Engine keep them; their Adam does not say whether it decouples decay.
    w = np.ones(3, np.float32)
    hypers = {
        "lr": 0.1,
        "bias_correction": 1,
        "betas": (0.8, 0.9),
        "eps": 1e-3,
        "weight_decay": 0.1,
    }
    entry = {"exp_avg": w, "exp_avg_sq": w, "master_param": 2 * w}
    state = {"state": {5: entry}, "param_groups": [{**hypers, "step": 9, "params": [5]}]}
    with pytest.raises(ValueError, match=r"weight_decay=0.1 is Adam's or AdamW's"):
        fs.convert.from_torch(state, {"w": w})
    found = fs.convert.from_torch({"model": {}, "optimizer": state}, {"w": w}, "AdamW")
    assert found["state"] == {0: {"exp_avg": w, "exp_avg_sq": w, "step": 9}} or found.step == 9
    assert np.array_equal(found.masters["w"], 2 * w)
    assert found["param_groups"][0]["bias_correction"] is True
    assert found["param_groups"][0]["param_names"] == ["w"]
    opt = fs.AdamW({"w": w.copy()})
    opt.load_state_dict(found)
    assert opt.steps == 9


def plain(**more):
    """Adam's state of one parameter as torch keeps it, some of it replaced."""
    w = np.ones(3, np.float32)
    entry = {"step": 3.0, "exp_avg": w, "exp_avg_sq": w}
    group = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "amsgrad": False, "params": [0]}
    entry |= more.pop("entry", {})
    return {"state": {0: entry}, "param_groups": [{**group, **more}]}


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({"model": {}}, ValueError, "state_dict must have the key 'state', got"),
        ({"a": plain(), "b": plain()}, ValueError, "source must have one optimizer, got 2"),
        (plain(ns_steps=5), ValueError, "an optimizer of ours, got ns_steps, as of Muon"),
        (plain(params=[0, 1]), ValueError, "params must be 2, as in param_groups, got 1"),
        (plain(params=[0, 0]), ValueError, "param_groups must have distinct parameters"),
        (plain(params=[1]), ValueError, r"state must be of parameters in param_groups, got \[0\]"),
        (plain(entry={"mom": 1}), ValueError, "must have step, exp_avg, .* of Adam, got 'mom'"),
        (plain(entry={"step": None}), ValueError, "step must be given: state"),
        (
            plain(entry={"exp_avg": np.ones(4, np.float32)}),
            ValueError,
            r"state\[0\]\['exp_avg'\] of 'w' must have shape \(3,\), got \(4,\)",
        ),
        (plain(betas=(1.5, 0.9)), ValueError, r"betas\[0\] must be in \[0, 1\), got 1.5"),
    ],
)
def test_torch_checkpoint_that_does_not_fit_is_refused(state, error, message):
    with pytest.raises(error, match=message):
        fs.convert.from_torch(state, {"w": np.ones(3, np.float32)})


class Harmless:
    """Something that a pickle may name and no converter makes."""


def test_torch_file_of_other_things_is_refused(tmp_path):
    torch = optional("torch")
    path = tmp_path / "a.pt"
    torch.save({"optimizer": plain(), "more": Harmless()}, path)
    with pytest.raises(ValueError, match=r"a.pt must be a whole file of tensors by torch.save"):
        fs.convert.from_torch(path)
    path.write_bytes((FOLDER / "torch" / "AdamW.pt").read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"a.pt must be a whole file of tensors by torch.save"):
        fs.convert.from_torch(path)


def test_to_torch_says_what_torch_has_not():
    torch = optional("torch")
    import fusedstep.torch

    w = np.ones(3, np.float32)
    state = fs.convert.from_keras(adam(), {"w": w}, optimizer="Adam")
    with pytest.raises(
        ValueError, match=r"ours must be True: torch.optim.Adam has no eps_hat=True"
    ):
        fs.convert.to_torch(state)
    ours = fs.convert.to_torch(state, ours=True)
    opt = fusedstep.torch.Adam([torch.nn.Parameter(torch.ones(3))])
    opt.load_state_dict(ours)
    assert opt.param_groups[0]["eps_hat"] is True
    del state["param_groups"][0]["lr"]
    with pytest.raises(ValueError, match=r"\['param_groups'\]\[0\] must have lr: the rate was a"):
        fs.convert.to_torch(state, ours=True)
    state = fs.convert.from_optax({"mu": w, "count": 2}, w, "lion", learning_rate=0.1)
    with pytest.raises(ValueError, match=r"ours must be True: torch.optim has no Lion"):
        fs.convert.to_torch(state)


# -- the command line ------------------------------------------------------------------------------


def run(capsys, *words):
    """The exit status of `fusedstep convert`, and what it said."""
    status = main(["convert", *map(str, words)])
    said = capsys.readouterr()
    assert all(len(line) <= 80 for line in said.out.splitlines())
    return status, said.out + said.err


def test_keras_configuration_with_an_unknown_key_is_refused():
    config = {"class_name": "Adam", "config": {"beta_3": 0.8}}
    with pytest.raises(TypeError, match="beta_3 must be an argument of Keras' Adam: "):
        fs.convert.from_keras(adam(), {"w": W}, optimizer=config)
    with pytest.raises(TypeError, match=r"source must be a path, .* got NoneType"):
        fs.convert.from_keras(None, {"w": W}, optimizer="Adam")


def test_command_tells_and_writes(capsys, tmp_path):
    pytest.importorskip("h5py")
    torch = optional("torch")
    import fusedstep.torch

    path, written = FOLDER / "keras" / "AdamW.keras", tmp_path / "optimizer.pt"
    status, said = run(capsys, path, "--to", "torch", "-o", written)
    assert status == 0
    for line in (
        "checkpoint  AdamW.keras, of keras",
        "optimizer   AdamW, our AdamW",
        "step        10",
        "tensors     4 of 2 parameters, 80 bytes: exp_avg, exp_avg_sq",
        "convention  eps_hat=True",
        "arguments   lr=0.010888698, betas=(0.8, 0.9), eps=0.01, weight_decay=0.1,",
        "torch.optim has no eps_hat",
    ):
        assert " ".join(line.split()) in " ".join(said.split())  # wherever said is broken
    params = [torch.nn.Parameter(torch.ones(s)) for s in RECORDED["keras"]["shapes"].values()]
    opt = fusedstep.torch.AdamW(params)
    opt.load_state_dict(torch.load(written, weights_only=True))
    assert opt.param_groups[0]["eps_hat"] is True
    assert opt.state[params[0]]["step"] == 10

    for target in ("fusedstep", "torch"):
        file = tmp_path / f"{target}.safetensors"
        assert run(capsys, path, "--to", target, "-o", file)[0] == 0
        neutral = fs.AdamW([p.detach().numpy() for p in params])
        fs.load(file, optimizer=neutral)
        assert neutral.param_groups[0]["betas"] == (0.8, 0.9)
        opt = fusedstep.torch.AdamW(params)
        fusedstep.torch.load(file, optimizer=opt)
        assert opt.state[params[0]]["step"] == 10


def test_command_says_what_it_assumes(capsys, tmp_path):
    pytest.importorskip("h5py")
    path = FOLDER / "keras" / "SGD.weights.h5"
    status, said = run(capsys, path, "--set", "momentum=0.8")
    assert status == 0
    assert "assumed     nesterov=False, weight_decay=None; --set NAME=VALUE says others" in said
    named = ["--optimizer", "SGD", "--set", "momentum=0.8"]
    assert run(capsys, path, *named)[1] == said  # who names the class may still leave some out
    every = ["--set", "nesterov=False", "--set", "weight_decay=None"]
    assert "assumed" not in run(capsys, path, *named, *every)[1]
    torch = optional("torch")
    state = plain(entry={key: torch.ones(3) for key in ("exp_avg", "exp_avg_sq")})
    torch.save(state, tmp_path / "a.pt")
    _, said = run(capsys, tmp_path / "a.pt")
    assert "assumed     weight_decay=0.0, maximize=False\n" in said  # and nothing sets them


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["keras/SGD.weights.h5"], "got 4: are its options others?"),
        (["keras/none.h5"], "No such file or folder: 'keras/none.h5'"),
        (
            ["keras/halfway.json"],
            "--from must say whose keras/halfway.json is, one of bitsandbytes,",
        ),
        (["keras/halfway.json", "--from", "keras"], "halfway.json must be a whole HDF5 file"),
        (["keras/AdamW.keras", "--to", "torch"], "--to needs --output"),
        (
            ["mlx/SGD.npz", "--from", "optax"],
            "StandardCheckpointer().restore(path) gives it, got str",
        ),
        (["paddle/AdamW.pdopt", "--optimizer", "Momentum"], "must have velocity of Momentum, got"),
        (
            ["mlx/SGD.npz"],
            "--from must say whose mlx/SGD.npz is, one of bitsandbytes,",
        ),
        (["keras/AdamW.keras", "-o", "none/a.pt"], "cannot write none/a.pt"),
        (["keras/AdamW.keras", "-o", "a.txt"], "--output must end with .safetensors for --to"),
    ],
)
def test_command_says_what_is_wrong(words, message, capsys, monkeypatch):
    pytest.importorskip("h5py")
    monkeypatch.chdir(FOLDER)
    status, said = run(capsys, *words)
    assert status == 2
    assert message in said
