"""Other libraries' steps, recorded from them, against ours under their names and arguments."""

import inspect
import json
import math

import numpy as np
import pytest

import fusedstep as fs
from fusedstep._storage import HOW
from fusedstep.conventions import _convention
from recorded import GOLDEN, INPUTS, NARROW, as_given, convention, pairs, recorded, steps


@pytest.mark.parametrize(
    ("library", "case"), [pytest.param(*given, id=label) for label, *given in recorded()]
)
def test_convention_takes_the_steps_of_the_library(library, case, isa):
    clipped = as_given(library, case)[2]["max_norm"] is not None
    narrow = (library, case["optimizer"]) in NARROW
    unit = np.finfo(np.float32 if narrow else case["dtype"]).eps
    for t, theirs, ours, start in pairs(library, case):
        # Of t steps in other orders, each off by a few ulp of the parameter and of its update. To a
        # norm to be clipped 1e-6 is added, as in torch.
        update, error = np.abs(theirs - start).max(), np.abs(ours - theirs)
        allowed = unit * (2 * t * np.abs(theirs) + 40 * update) + (4e-6 * update if clipped else 0)
        assert (error <= allowed).all(), f"step {t}: {error.max()} of an update of {update}"


def test_rprop_of_optax_is_a_step_late():
    # Why ours is not theirs: its first step moves nothing.
    cases = json.loads((GOLDEN / "optax.json").read_text())["cases"]
    late = [case for case in cases if case["optimizer"] == "rprop"]
    assert late
    for case in late:
        assert case["after"]["1"] == INPUTS["start"]
        assert case["after"]["20"] != list(list(steps("optax", case, np.float64))[20])


def test_every_recorded_library_has_a_module():
    found = {path.stem for path in GOLDEN.glob("*.json")} - {"inputs", "onnx_nodes"}
    assert found <= set(fs.conventions.__all__)


def test_names_beside_the_equation_are_typed_as_they_are_taken():
    optimizers = pytest.importorskip("fusedstep.torch").optimizers
    ours = {"groups", "maximize", *HOW, *optimizers._EACH, *optimizers._FLAGS}
    theirs = {*_convention._ELSEWHERE, *_convention._WITHOUT_EFFECT}
    alone = {name for names in _convention._WITHOUT_EFFECT_IN.values() for name in names}
    assert set(_convention.Beside.__annotations__) == ours | theirs | alone


def each_convention():
    for library in sorted(set(fs.conventions.__all__) - {"Convention", "Ours"}):
        module = getattr(fs.conventions, library)
        for name, one in vars(module).items():
            if hasattr(one, "ours") and one.__module__ == module.__name__:
                yield pytest.param(one, id=f"{library}.{name}")


NEEDED = {"learning_rate": 0.1, "lr": 0.1, "R": 0.1, "alpha": 0.9, "beta": 0.9, "momentum": 0.9}


@pytest.mark.parametrize("one", list(each_convention()))
def test_convention_makes_an_optimizer_of_each_layer(one):
    pytest.importorskip("torch")
    import torch

    import fusedstep.torch

    parameters = inspect.signature(one).parameters.values()
    needed = {
        p.name: NEEDED[p.name]
        for p in parameters
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD and p.name != "params"
    }
    assert one.__doc__
    opt = one(np.ones(3), **needed)
    name, hypers = one.ours(**needed)
    assert type(opt) is getattr(fs, name)
    if any(callable(value) for value in hypers.values()):
        return  # a schedule, which torch's layer has beside the optimizer
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    theirs = one.torch([param], **needed)
    assert type(theirs) is getattr(fusedstep.torch, name)
    ours = one(np.ones(3), **needed)
    p = next(iter(ours.params.values())) if hasattr(ours, "params") else None
    for t in range(3):
        g = np.array([0.5, -1.0, 0.25]) * (t + 1)
        param.grad = torch.tensor(g)
        theirs.step()
        ours.step(g)
    assert p is None or np.array_equal(p, param.detach().numpy())


def test_convention_survives_a_checkpoint():
    # The equation is in the options of the groups, so that any object of the class goes on with it.
    g = np.array([0.5, -2.0, 0.25])
    whole, half = np.ones(3), np.ones(3)
    opt = fs.conventions.keras.RMSprop(whole, learning_rate=0.1, momentum=0.5, epsilon=0.1)
    other = fs.conventions.keras.RMSprop(half, learning_rate=0.1, momentum=0.5, epsilon=0.1)
    for _ in range(3):
        opt.step(g)
        other.step(g)
    resumed = fs.RMSprop(half, lr=0.1, momentum=0.5)
    resumed.load_state_dict(other.state_dict())
    for _ in range(3):
        opt.step(g)
        resumed.step(g)
    assert np.array_equal(whole, half)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda p: fs.conventions.keras.Adam(p, global_clipnorm=1.0),
            TypeError,
            "global_clipnorm must be given to step(), as max_norm, got global_clipnorm=1.0",
        ),
        (
            lambda p: fs.conventions.keras.Adam(p, learning_rate=-1.0),
            ValueError,
            "lr must be >= 0, got -1.0",
        ),
        (
            lambda p: fs.conventions.bitsandbytes.SGD(p, 0.1, momentum=0.9, nesterov=True),
            ValueError,
            "nesterov must be False, got True: bitsandbytes ignores it on a CPU; our class has it",
        ),
        (
            lambda p: fs.conventions.bitsandbytes.Adagrad(p, lr_decay="x"),
            ValueError,
            "lr_decay must be 0.0, got 'x': bitsandbytes ignores it on a CPU; our class has it",
        ),
        (
            lambda p: fs.conventions.deepspeed.DeepSpeedCPUAdam(p, amsgrad=True),
            ValueError,
            "amsgrad must be False, got True: DeepSpeed has none on a CPU",
        ),
        (
            lambda p: fs.conventions.optax.adamw(p, 0.1, mask=str),
            TypeError,
            "mask must be given as groups=[fusedstep.Group(...)], got mask=<class 'str'>",
        ),
        (
            lambda p: fs.conventions.optax.adadelta(p, None),
            TypeError,
            "lr must be a number >= 0, got None",
        ),
        (
            lambda p: fs.conventions.keras.SGD(p, momentum=0.9, nesterov=3),
            TypeError,
            "nesterov must be True or False, got 3",
        ),
        (
            lambda p: fs.conventions.keras.SGD(p, weight_decay=np.ones(2)),
            TypeError,
            "weight_decay must be a number >= 0, got array([1., 1.])",
        ),
        (
            lambda p: fs.conventions.onnx.Adagrad(p, "x", T=1),
            TypeError,
            "R must be a number >= 0, got 'x'",
        ),
        (
            lambda p: fs.conventions.onnx.Adam(p, lambda t: 0.0, norm_coefficient_post=0.1).step(p),
            ValueError,
            "R beside norm_coefficient_post must be > 0, got 0.0",
        ),
        (
            lambda p: fs.RAdam(p, threshold=3.0),
            ValueError,
            "threshold must be >= 4, got 3.0",
        ),
        (
            lambda p: fs.conventions.paddle.ASGD(p, batch_num=2),
            ValueError,
            "batch_num must be 1, got 2: a mean over the gradients of all batches is another"
            " algorithm",
        ),
        (
            lambda p: fs.conventions.onnx.Adam(p, 0.1, T=2),
            ValueError,
            "T must be 0 or 1 at the first step, got 2",
        ),
        (
            lambda p: fs.conventions.onnxruntime.AdamWOptimizer(p, 0.1, adam_mode=2),
            ValueError,
            "adam_mode must be 0 or 1, got 2",
        ),
        (
            lambda p: fs.Adam(p, weight_decay=0.1, decay_after=True),
            ValueError,
            "decay_after needs decoupled_weight_decay = True, got False",
        ),
        (
            lambda p: fs.RMSprop(p, nesterov=True),
            ValueError,
            "nesterov needs momentum > 0, got momentum=0.0",
        ),
    ],
)
def test_convention_names_what_is_wrong(call, error, message):
    with pytest.raises(error) as caught:
        call(np.ones(3))
    assert str(caught.value) == message


# What each library's constructor takes beside what its equation needs, at its defaults: all of
# `inspect.signature` in the versions that the modules name.
DEFAULTS = {
    fs.conventions.keras.SGD: {
        **dict.fromkeys(["clipnorm", "clipvalue", "global_clipnorm", "ema_overwrite_frequency"]),
        **dict.fromkeys(["loss_scale_factor", "gradient_accumulation_steps", "name"]),
        "use_ema": False,
        "ema_momentum": 0.99,
    },
    fs.conventions.optax.nadamw: {"mu_dtype": None, "mask": None, "nesterov": True},
    fs.conventions.optax.nadam: {"mu_dtype": None, "nesterov": True},
    fs.conventions.optax.amsgrad: {"bias_correction_mu": True, "bias_correction_nu": True},
    fs.conventions.optax.radam: {"nesterov": False},
    fs.conventions.optax.sgd: {"accumulator_dtype": None},
    fs.conventions.optax.adadelta: {"weight_decay_mask": None},
    fs.conventions.paddle.Momentum: {
        "grad_clip": None,
        "multi_precision": False,
        "rescale_grad": 1.0,
        "use_multi_tensor": False,
        "name": None,
    },
    fs.conventions.paddle.AdamW: {
        "use_lowprecision_moment": False,
        "lr_ratio": None,
        "apply_decay_param_fun": None,
        "lazy_mode": False,
    },
    **{
        one: {"device": None, "fused": 0}
        for one in (
            fs.conventions.tinygrad.SGD,
            fs.conventions.tinygrad.Adam,
            fs.conventions.tinygrad.AdamW,
        )
    },
    fs.conventions.tf1.AdamOptimizer: {
        "use_locking": False,
        "name": "Adam",
        "use_own_namescope_for_non_slot_vars": False,
    },
    fs.conventions.sklearn.SGDOptimizer: {"lr_schedule": "constant", "power_t": 0.5},
    fs.conventions.bitsandbytes.Adam: {
        "optim_bits": 32,
        "min_8bit_size": 4096,
        "is_paged": False,
    },
    fs.conventions.deepspeed.DeepSpeedCPUAdam: {"amsgrad": False, "fp32_optimizer_states": True},
}


@pytest.mark.parametrize("one", DEFAULTS, ids=lambda one: f"{one.__module__}.{one.__name__}")
def test_convention_takes_all_arguments_of_the_library(one):
    import inspect

    needed = {n: v for n, v in NEEDED.items() if n in inspect.signature(one).parameters}
    assert one.ours(**needed, **DEFAULTS[one]) == one.ours(**needed)


def test_fused_is_tinygrads_where_the_convention_is():
    tinygrad, keras = fs.conventions.tinygrad, fs.conventions.keras
    for fused in (False, True):
        assert tinygrad.AdamW.ours(fused=fused) == tinygrad.AdamW.ours()
        assert keras.Adam.ours(fused=fused).hypers["fused"] is fused  # for fusedstep.torch


def test_momentum_of_onnx_without_momentum_dampens_the_gradient():
    g = np.array([1.0, -2.0])
    for T, mode, shares in ((0, "standard", [1, 0.5]), (1, "standard", [0.5, 0.5]),
                            (0, "nesterov", [1, 1]), (1, "nesterov", [1, 1])):  # fmt: skip
        p = np.zeros(2)
        opt = fs.conventions.onnx.Momentum(p, 0.25, alpha=0.0, beta=0.5, mode=mode, T=T)
        opt.step(g)
        opt.step(g)
        assert p.tolist() == (-0.25 * sum(shares) * g).tolist()


def test_default_momentum_of_deepspeeds_lion():
    assert fs.conventions.deepspeed.DeepSpeedCPULion.ours().hypers["betas"] == (0.9, 0.999)


def test_momentum_decay_may_be_infinite():
    p = np.ones(3)
    fs.NAdam(p, lr=0.1, momentum_decay=math.inf).step(np.ones(3))
    assert np.isfinite(p).all()


NODES = json.loads((GOLDEN / "onnx_nodes.json").read_text())["tests"]
KEPT = {"Adagrad": {"H": "sum"}, "Adam": {"V": "exp_avg", "H": "exp_avg_sq"}}


@pytest.mark.parametrize("node", NODES, ids=[node["name"] for node in NODES])
def test_convention_passes_onnx_node_tests(node, isa):
    given = {key: np.array(v["value"], v["dtype"]) for key, v in node["inputs"].items()}
    wanted = {key: np.array(v["value"], v["dtype"]) for key, v in node["outputs"].items()}
    several = [str(k) for k in (1, 2) if f"X{k}" in given] or [""]
    attributes = dict(node["attributes"])
    # One step from a buffer that is there: T = 0 says that nothing is dampened in it.
    if node["operator"] == "Momentum":
        attributes["beta"] = 1.0
    assert given["T"] == 0
    params = {f"X{k}": given[f"X{k}"].copy() for k in several}
    opt = convention("onnx", node["operator"])(params, given["R"], **attributes)
    # One of the node tests of Momentum calls the buffer H where it comes in.
    names = KEPT.get(node["operator"], {"V": "momentum_buffer"})
    state = {}
    for i, k in enumerate(several):
        state[i] = {
            ours: given[key + k] if key + k in given else given[f"H{k}"]
            for key, ours in names.items()
        }
        if node["operator"] != "Momentum":
            state[i]["step"] = 0
    groups = [{"params": list(range(len(several)))}]
    opt.load_state_dict({"state": state, "param_groups": groups, "step": 0})
    opt.step({f"X{k}": given[f"G{k}"] for k in several})
    for i, k in enumerate(several):
        after = {f"X{k}_new": params[f"X{k}"]}
        after |= {
            f"{key}{k}_new": opt.state_dict()["state"][i][ours] for key, ours in names.items()
        }
        for key, value in after.items():
            np.testing.assert_allclose(value, wanted[key], rtol=1e-6, err_msg=key)


def test_nesterov_without_momentum_means_nothing_in_optax():
    for make in (fs.conventions.optax.sgd, fs.conventions.optax.rmsprop):
        found = []
        for nesterov in (False, True):
            p = np.linspace(-1, 1, 5)
            make(p, 0.1, nesterov=nesterov).step(np.ones(5))
            found.append(p)
        assert np.array_equal(*found)
