"""Parameters of 16 bits without float32 masters, narrow states, and their way in and out."""

from __future__ import annotations

import copy

import ml_dtypes
import numpy as np
import pytest

import fusedstep as fs
from cases import CASES
from fusedstep import _storage
from fusedstep._storage import Stored
from fusedstep.optimizers import AdamW
from optional import optional

torch = optional("torch")

RNG = np.random.default_rng(6)
REACH = 2.0**-22  # of a block's largest: a signed number below it may become zero
VALUES = (RNG.standard_normal(1000) * 10.0 ** RNG.integers(-3, 3, 1000)).astype(np.float32)


@pytest.mark.parametrize("name", ["split", "kahan", "bfloat16", "q8"])
def test_conversions_are_exact_where_they_can_be(name):
    kept = _storage.Kept(name, beside="" if name == "bfloat16" else "b")
    array = np.zeros(VALUES.shape, _storage.as_dtype(kept.dtype) if name != "q8" else np.uint8)
    beside = np.zeros(kept.beside_shape(VALUES.shape), kept.beside_dtype) if kept.beside else None
    there = Stored(array, name, beside)
    _storage.convert(Stored(VALUES, "float32"), there)
    back = _storage.decoded(there)
    rtol = {"split": 0, "kahan": 2**-16, "bfloat16": 2**-8, "q8": 2**-3}[name]
    least = REACH * np.abs(VALUES).max() if name == "q8" else 0
    np.testing.assert_allclose(back, VALUES, rtol=rtol, atol=least)
    _storage.convert(Stored(back, "float32"), there)  # what was once rounded stays
    np.testing.assert_array_equal(_storage.decoded(there), back)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"rounding": "up"}, r"rounding must be .* or 'split', got 'up'"),
        ({"state_dtype": "q4"}, r"state_dtype must be .* or 'q8', got 'q4'"),
        ({"state_dtype": {"b": "q8"}}, r"state_dtype must name states, .*exp_avg_sq.*, got 'b'"),
        ({"state_dtype": {"exp_avg": 8}}, r"state_dtype\['exp_avg'\] must be .*, got 8"),
        ({"state_rounding": "kahan"}, r"state_rounding must be 'stochastic' or 'nearest', got"),
        ({"seed": 2**63}, r"seed must be an integer in \[0, 2\^63\), got 9223372036854775808"),
        ({"ema_dtype": "float16"}, r"ema_dtype must be wide enough .*, got 'float16'"),
    ],
)
def test_how_is_checked(how, message):
    with pytest.raises(ValueError, match=message):
        _storage.Storage(AdamW._spec, how)


# -- parameters of 16 bits -------------------------------------------------------------------------

BF16 = ml_dtypes.bfloat16
SHAPES = {"w": (9, 70), "b": (3,)}
ROUNDINGS = ["nearest", "stochastic", "kahan", "split"]
EACH = [pytest.param(n, h, id=f"{n}-{h}") for n, sets in CASES.items() for h in sets]


def params_of(dtype, seed=0):
    rng = np.random.default_rng(seed)
    return {k: rng.uniform(0.5, 2, s).astype(BF16).astype(dtype) for k, s in SHAPES.items()}


def grads_of(seed, dtype=np.float32):
    rng = np.random.default_rng(100 + seed)
    return {k: rng.standard_normal(s).astype(dtype) for k, s in SHAPES.items()}


def make(name, params, **hypers):
    return getattr(fs, name)(params, **hypers)


def bits(found):
    return {key: np.asarray(a).tobytes() for key, a in found.items()}


def everything(opt):
    return bits(opt.params), {key: bits(entry) for key, entry in opt.state.items()}


@pytest.mark.parametrize(("name", "hypers"), EACH)
def test_split_is_training_in_float32(name, hypers):
    params, wide = params_of(BF16), params_of(np.float32)
    opt, twin = make(name, params, rounding="split", **hypers), make(name, wide, **hypers)
    for seed in range(4):
        opt.step(grads_of(seed), ema=0.9)
        twin.step(grads_of(seed))
    assert bits(opt.masters()) == bits(wide)
    for key, p in params.items():
        word = wide[key].view(np.uint32)
        assert p.tobytes() == ((word + 0x8000) >> 16).astype(np.uint16).tobytes()
        low = opt.state[key]["low_bits"].astype(np.int32).view(np.uint32)
        master = (p.view(np.uint16).astype(np.uint32) << 16) + low
        assert master.tobytes() == wide[key].tobytes()


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_updates_far_below_half_an_ulp(rounding):
    """Nearest stalls; the others move as float32 does."""
    w = np.ones(4096, BF16)
    opt = fs.SGD(w, lr=2.0**-13, rounding=rounding)  # a sixteenth of half an ulp below 1
    for _ in range(128):
        opt.step(np.ones(4096, np.float32))
    moved = 128 * 2.0**-13
    mean = opt.masters()[0].astype(np.float64).mean()
    # Stochastic: a step is an ulp of 2^-8 with probability 1/32, so the mean's standard error is
    # 2^-8 * (128 * 1/32 * 31/32 / 4096)^0.5 = 0.00012: four of them.
    tolerance = {"nearest": 0, "stochastic": 0.0005, "kahan": 2.0**-14, "split": 0}[rounding]
    assert mean == pytest.approx(1 if rounding == "nearest" else 1 - moved, rel=0, abs=tolerance)


def test_stochastic_rounding_is_unbiased():
    """A number a share of the way between two goes up as often: a test at 4.5 standard errors."""
    n = 1 << 16
    for seed, share in [(0, 1 / 2), (1, 1 / 32), (2, 31 / 32), (3, 0.3)]:
        w = np.ones(n, BF16)
        opt = fs.SGD(w, lr=2.0**-7, rounding="stochastic", seed=seed)
        opt.step(np.full(n, -share, np.float32))
        up = w > 1
        assert np.unique(w.astype(np.float64)).tolist() == [1, 1 + 2.0**-7]
        error = (share * (1 - share) / n) ** 0.5
        assert up.mean() == pytest.approx(share, abs=4.5 * error)
        # Neither do neighbours agree more often than they must.
        agree = share**2 + (1 - share) ** 2
        assert (up[1:] == up[:-1]).mean() == pytest.approx(agree, abs=4.5 * (0.25 / n) ** 0.5)
        twin = np.ones(n, BF16)
        fs.SGD(twin, lr=2.0**-7, rounding="stochastic", seed=seed + 1).step(
            np.full(n, -share, np.float32)
        )
        assert not np.array_equal(twin, w)
        before = w.copy()
        opt.step(np.full(n, -share, np.float32))  # other bits in the next step
        assert not np.array_equal(w > before, up)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan", "split"])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_resumed_run_has_the_same_bits(name, rounding):
    how = {"rounding": rounding, "state_dtype": "q8", "seed": 2**63 - 1}
    params = params_of(BF16)
    opt = make(name, params, lr=1e-3, **how)
    for seed in range(3):
        opt.step(grads_of(seed))
    copies = {key: p.copy() for key, p in params.items()}
    twin = make(name, copies, lr=1e-3, **how)
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert bits(twin.masters()) == bits(opt.masters())
    for one in (opt, twin):
        one.step(grads_of(3))
    assert everything(opt) == everything(twin)
    other = make(name, copies, lr=1e-3, **{**how, "rounding": "nearest", "state_dtype": None})
    other.load_state_dict(opt.state_dict())
    assert other.state["w"].keys() <= {"exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(("one", "other"), [("kahan", "split"), ("split", "kahan")])
def test_masters_go_from_one_rounding_to_the_other(one, other):
    params = params_of(BF16)
    opt = fs.SGD(params, lr=1e-3, momentum=0.9, rounding=one)
    for seed in range(3):
        opt.step(grads_of(seed))
    twin = fs.SGD(params, lr=1e-3, momentum=0.9, rounding=other)
    twin.load_state_dict(opt.state_dict())
    for key, master in opt.masters().items():
        # Exactly into a lower half, and into a compensation of 8 bits of half an ulp of 8 bits.
        np.testing.assert_allclose(
            twin.masters()[key], master, rtol=0 if one == "kahan" else 2**-16
        )


def test_a_master_halfway_to_the_next_bfloat16_ends_one_short_of_it_under_split():
    params = np.array([0.25, -0.25], BF16)
    twin = fs.SGD(params, rounding="split")
    saved = fs.SGD(params, rounding="kahan").state_dict()
    twin.load_state_dict({**saved, "state": {0: {"compensation": params * BF16(2.0**-8)}}})
    halfway = np.array([0.25, -0.25], np.float32) * np.float32(1 + 2**-8)
    np.testing.assert_array_equal(twin.masters()[0], np.nextafter(halfway, np.float32(0)))


def test_an_average_halfway_between_two_bfloat16_is_shown_away_from_zero():
    for sign in (1, -1):
        w = np.array([sign], BF16)
        opt = fs.SGD(w, lr=1.0)
        opt.step(np.zeros(1, np.float32), ema=0.5)
        opt.step(np.array([-sign * 2.0**-7], np.float32), ema=0.5)
        assert opt.state[0]["ema"] == sign * (1 + 2**-8)
        with opt.ema():
            assert w == sign * (1 + 2**-7)


def test_empty_parameters_and_strided_checkpoints():
    params = {"none": np.ones((0, 3), BF16), "w": np.ones((2, 3), BF16)}
    opt = fs.AdamW(params, rounding="split", state_dtype="q8")
    opt.step({"none": np.ones((0, 3), np.float32), "w": np.ones((2, 3), np.float32)}, ema=0.5)
    assert opt.state["none"]["exp_avg_exponents"].shape == (0,)
    saved = copy.deepcopy(opt.state_dict(state_dtype="float32"))
    strided = np.asfortranarray(saved["state"][1]["exp_avg"])
    saved["state"][1]["exp_avg"] = strided
    opt.load_state_dict(saved)
    found = opt.state_dict(state_dtype="float32")["state"][1]["exp_avg"]
    np.testing.assert_array_equal(found, strided)
    with opt.ema():
        pass
    assert opt.masters()["none"].shape == (0, 3)


RANDOM = [{"state_dtype": "q8"}, {"ema_dtype": "bfloat16"}]


@pytest.mark.parametrize("how", RANDOM)
def test_a_momentum_that_was_loaded_is_saved_again(how):
    peer = torch.nn.Parameter(torch.ones(3))
    peer.grad = torch.ones(3)
    theirs = torch.optim.SGD([peer], momentum=0.5)
    theirs.step()
    first = fs.SGD(np.ones(3, np.float32), **how)
    first.load_state_dict(theirs.state_dict())
    second = fs.SGD(np.ones(3, np.float32), **how)
    second.load_state_dict(first.state_dict())
    found = second.state_dict(state_dtype="float32")["state"][0]["momentum_buffer"]
    np.testing.assert_array_equal(found, np.ones(3))
    for opt in (first, second):
        opt.step(np.ones(3, np.float32))
    assert everything(first) == everything(second)


@pytest.mark.parametrize("how", RANDOM)
@pytest.mark.parametrize("before", [0.0, 0.5])
def test_a_momentum_that_begins_late_begins_as_the_gradient_in_a_resumed_run_too(before, how):
    params = [np.ones(3, np.float32) for _ in range(2)]
    opt, twin = (fs.SGD(w, lr=0.1, momentum=before, dampening=0.5, **how) for w in params)
    opt.param_groups[0]["momentum"] = 0.0
    opt.step(np.ones(3, np.float32))
    opt.param_groups[0]["momentum"] = 0.5
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    np.copyto(params[1], params[0])
    for one in (opt, twin):
        one.step(np.ones(3, np.float32))
    assert everything(opt) == everything(twin)
    np.testing.assert_allclose(params[1], 0.8, rtol=1e-6)


def test_states_of_torch_s_parameters_are_tensors():
    tensor = torch.ones(200, dtype=torch.bfloat16)
    opt = fs.AdamW(
        [tensor], rounding="kahan", state_dtype={"exp_avg": "bfloat16", "exp_avg_sq": "q8"}
    )
    opt.step([torch.ones(200)], ema=0.9)
    found = {key: value.dtype for key, value in opt.state_dict()["state"][0].items()}
    assert found.pop("step") == torch.float32
    assert found == {
        "exp_avg": torch.bfloat16,
        "exp_avg_sq": torch.uint8,
        "exp_avg_sq_exponents": torch.uint8,
        "ema": torch.float32,
        "compensation": torch.bfloat16,
    }
    twin = fs.AdamW([tensor], rounding="kahan", state_dtype="q8")
    twin.load_state_dict(opt.state_dict())
    assert bits(twin.masters()) == bits(opt.masters())


def test_16_bits_are_for_bfloat16():
    for rounding in ROUNDINGS[1:]:
        with pytest.raises(ValueError, match=rf"got '{rounding}' with params\[b\] of float32"):
            fs.SGD({"a": np.ones(3, BF16), "b": np.ones(3, np.float32)}, rounding=rounding)
    with pytest.raises(TypeError, match="unexpected keyword argument 'round'"):
        fs.SGD(np.ones(3), round="split")


# -- narrow states ---------------------------------------------------------------------------------

NARROW = [  # every rule with states that may be narrow
    pytest.param(name, sets[k], id=name)
    for name, sets in CASES.items()
    for k in [4 if name == "SGD" else 5 if name == "RMSprop" else 1]
    if name not in ("ASGD", "Rprop")
]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("state_dtype", ["bfloat16", "q8"])
@pytest.mark.parametrize(("name", "hypers"), NARROW)
def test_a_step_is_float32_s_between_decoding_and_encoding(name, hypers, state_dtype, rounding):
    params = params_of(np.float32)
    opt = make(name, params, state_dtype=state_dtype, state_rounding=rounding, **hypers)
    for seed in range(3):
        copies = {key: p.copy() for key, p in params.items()}
        twin, same = make(name, copies, **hypers), make(name, copies, **hypers)
        if seed:
            twin.load_state_dict(opt.state_dict(state_dtype="float32"))
            same.load_state_dict(opt.state_dict())  # a narrow checkpoint is decoded exactly
            assert everything(same) == everything(twin)
        opt.step(grads_of(seed))
        twin.step(grads_of(seed))
        assert bits(params) == bits(copies)
        plain = opt.state_dict(state_dtype="float32")["state"]
        for i, key in enumerate(SHAPES):
            for state, exact in twin.state[key].items():
                if rounding == "nearest":
                    rounded = make(name, copies, state_dtype=state_dtype, **hypers)
                    rounded.load_state_dict(twin.state_dict())
                    assert bits(rounded.state[key]) == bits(opt.state[key])
                ulp = {"bfloat16": 2**-7, "q8": 2**-2}[state_dtype]
                least = REACH * np.abs(exact).max()
                np.testing.assert_allclose(plain[i][state], exact, rtol=ulp, atol=least)


def test_states_take_the_bytes_that_they_say():
    n = 128 * 100 + 1
    w = np.ones(n, np.float32)
    for state_dtype, most in [("float32", 8), ("bfloat16", 4), ("q8", 2.1)]:
        opt = fs.AdamW(w, state_dtype=state_dtype)
        assert sum(a.nbytes for a in opt.state[0].values()) <= most * n
    assert opt.state[0]["exp_avg_exponents"].shape == (101,)
    mixed = fs.AdamW(w, state_dtype={"exp_avg": "bfloat16"})
    assert [a.dtype.name for a in mixed.state[0].values()] == ["bfloat16", "float32"]
    for asked, saved in [("float32", np.float32), ("bfloat16", np.float64), (None, np.float64)]:
        opt = fs.AdamW(np.ones(3), state_dtype=asked)
        assert opt.state[0]["exp_avg"].dtype.name == (asked or "float64")
        opt.step(np.ones(3))
        assert opt.state_dict(state_dtype="float32")["state"][0]["exp_avg"].dtype == saved


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("skip", [False, True])
def test_a_gradient_that_is_not_finite_spoils_its_block_of_q8_and_no_other(bad, skip):
    w, grad = np.zeros(3 * 128, np.float32), np.ones(3 * 128, np.float32)
    opt = fs.AdamW(w, weight_decay=0, state_dtype="q8")
    opt.step(grad)
    opt.step(np.where(np.arange(w.size) == 130, np.float32(bad), grad), skip_nonfinite=skip)
    before = w.copy()
    opt.step(grad)
    moved = (w != before).reshape(3, 128)
    assert moved[[0, 2]].all()
    assert (np.delete(moved[1], 2) == skip).all()


@pytest.mark.parametrize("word", [0x7FC00000, 0x7FFFFFFF, 0xFFC00000, 0xFFFFFFFF])
def test_a_nan_of_any_payload_stays_nan_in_q8(word, isa):
    # Rounding carries all ones beyond the largest code; AVX2 and AVX-512 made -0.0 of that.
    params = np.ones(700, np.float32)
    grads = np.full(700, word, np.uint32).view(np.float32)
    opt = fs.SGD(params, lr=0.1, momentum=0.9, state_dtype="q8", state_rounding="nearest")
    opt.step(grads)
    assert np.isnan(opt.state_dict(state_dtype="float32")["state"][0]["momentum_buffer"]).all()


def test_states_that_must_be_exact_say_why():
    w = np.ones(3, np.float32)
    for name, hypers, state in [
        ("ASGD", {}, "ax averages"),
        ("Rprop", {}, "prev"),
        ("RMSprop", {"centered": True}, "square_avg"),
    ]:
        for narrow in ("bfloat16", "q8"):
            message = rf"state_dtype must leave \w+ in float32, because .*, got '{narrow}'"
            with pytest.raises(ValueError, match=message):
                make(name, w, state_dtype=narrow, **hypers)
        assert state
    fs.RMSprop(w, centered=True, momentum=0.9, state_dtype={"momentum_buffer": "q8"})
    with pytest.raises(ValueError, match=r"must leave ax in float64, because .*, got 'float32'"):
        fs.ASGD(np.ones(3), state_dtype="float32")
    opt = fs.RMSprop(w, state_dtype="q8")
    opt.param_groups[0]["centered"] = True
    with pytest.raises(ValueError, match="must leave square_avg in float32"):
        opt.step(w.copy())
    saved = fs.RMSprop(w, centered=True).state_dict()
    other = fs.RMSprop(w, state_dtype="bfloat16")
    with pytest.raises(ValueError, match="must leave square_avg in float32"):
        other.load_state_dict(saved)
    assert other.param_groups[0]["centered"] is False


@pytest.mark.parametrize("into", ["float32", "bfloat16", "q8"])
def test_torch_s_checkpoint_loads_and_ours_loads_there(into):
    tensor = torch.nn.Parameter(torch.linspace(-1, 1, 300))
    peer = torch.optim.AdamW([tensor])
    tensor.grad = torch.linspace(1, 2, 300)
    peer.step()
    opt = fs.AdamW([tensor.detach().clone()], state_dtype=into, state_rounding="nearest")
    opt.load_state_dict(peer.state_dict())
    again = torch.optim.AdamW([tensor])
    again.load_state_dict(copy.deepcopy(opt.state_dict(state_dtype="float32")))
    for state in ("exp_avg", "exp_avg_sq"):
        rtol = {"float32": 0, "bfloat16": 2**-8, "q8": 2**-3}[into]
        theirs = peer.state[tensor][state]
        torch.testing.assert_close(again.state[tensor][state], theirs, rtol=rtol, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"exp_avg_exponents": np.zeros(2, "u1")}, ValueError, r"'exp_avg_exponents'\] must be"),
        ({"exp_avg_exponents": None}, TypeError, r"'exp_avg'\] must be float32.*, got uint8"),
        ({"low_bits": np.zeros(3, "f4")}, TypeError, r"'low_bits'\] must be int16, got float32"),
        ({"ema": np.zeros(2, "f4")}, ValueError, r"'ema'\] must have shape \(3,\), got \(2,\)"),
        (
            {"m": np.zeros(3, "f4")},
            ValueError,
            r"must have the keys \['step', 'exp_avg', 'exp_avg_sq', 'max_exp_avg_sq',"
            r" 'exp_avg_exponents', 'exp_avg_sq_exponents', 'ema', 'compensation',"
            r" 'low_bits'\], got 'm'",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(change, error, message):
    w = np.ones(3, np.float32)
    opt = fs.AdamW(w, state_dtype="q8")
    opt.step(w.copy())
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0] |= change
    before = everything(opt)
    with pytest.raises(error, match=message):
        opt.load_state_dict(saved)
    assert everything(opt) == before


# -- no first moment -------------------------------------------------------------------------------


@pytest.mark.parametrize("state_dtype", [None, "q8"])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_first_moment_that_begins_late_begins_as_the_gradient(resumed, state_dtype):
    w = np.ones(200, np.float32)
    grads = [RNG.standard_normal(200).astype(np.float32) for _ in range(4)]
    how = {"state_dtype": state_dtype, "state_rounding": "nearest"}
    opt = fs.Adam(w, betas=(0.0, 0.9), **how)
    for g in grads[:2]:
        opt.step(g)
    assert "exp_avg" not in opt.state[0]
    assert "exp_avg" not in opt.state_dict()["state"][0]
    assert not opt.state_dict(state_dtype="float32")["state"][0]["exp_avg"].any()  # torch has one
    opt.param_groups[0]["betas"] = (0.9, 0.9)
    if resumed:
        twin = fs.Adam(w, betas=(0.5, 0.5), **how)
        twin.load_state_dict(copy.deepcopy(opt.state_dict()))
        opt = twin
    opt.step(grads[2])
    expected = fs.Adam(w.copy(), betas=(0.9, 0.9), **how)
    expected.load_state_dict(
        {
            "state": {0: {"step": 1, "exp_avg": grads[2], "exp_avg_sq": grads[2]}},
            "param_groups": expected.state_dict()["param_groups"],
        }
    )
    assert bits({0: opt.state[0]["exp_avg"]}) == bits({0: expected.state[0]["exp_avg"]})
    # And once it was there, zero and back again.
    for beta in (0.0, 0.9):
        opt.param_groups[0]["betas"] = (beta, 0.9)
        opt.step(grads[3])
    expected.load_state_dict(
        {
            "state": {0: {"step": 1, "exp_avg": grads[3], "exp_avg_sq": grads[3]}},
            "param_groups": expected.state_dict()["param_groups"],
        }
    )
    assert bits({0: opt.state[0]["exp_avg"]}) == bits({0: expected.state[0]["exp_avg"]})


@pytest.mark.parametrize(
    ("n", "first", "entries"),
    [(0, 0, 0), (0, 5, 0), (1, 0, 1), (128, 0, 1), (129, 0, 2), (100, 100, 2), (28, 100, 1)],
)
def test_a_shard_has_an_entry_for_each_block_that_it_touches(n, first, entries):
    for name in ("exp_avg", "exp_avg_sq"):
        kept = _storage.in_q8(fs.Adam._spec, name)
        assert kept.beside_shape((n,), first) == (entries,)
