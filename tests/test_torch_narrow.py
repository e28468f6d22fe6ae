"""Parameters and states of 16 and 8 bits in `fusedstep.torch`."""

import copy
import io

import numpy as np
import pytest
import torch

import fusedstep as fs
import fusedstep.torch as ft
from cases import CASES

each_class = pytest.mark.parametrize("name", CASES)

SHAPES = ((37, 11), (300,), ())
STATE_DTYPES = ("float32", "bfloat16", "q8")
ROUNDINGS = ("nearest", "stochastic", "kahan", "split")
EXACT = {"ASGD": "ax", "Rprop": "prev"}  # whose states cannot be narrow
NARROWED = [name for name in CASES if name not in EXACT]
HYPERS = {"lr": 0.01}


def params_of(dtype=torch.float32, shapes=SHAPES, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=rng).to(dtype)) for shape in shapes]


def set_grads(params, step):
    rng = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=rng).to(param.dtype)


def train(params, opt, steps=range(4), **asked):
    for step in steps:
        set_grads(params, step)
        opt.step(**asked)
    return params


def optimizer(name, params, **how):
    momentum = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    return getattr(ft, name)(params, **HYPERS, **momentum, **how)


def bits(tensors):
    return [t.detach().contiguous().view(-1).view(torch.uint8) for t in tensors]


def assert_same(found, expected):
    for a, b in zip(bits(found), bits(expected), strict=True):
        assert torch.equal(a, b)


def neutral(name, params, steps=4, **how):
    """The same training by the neutral class, over copies of the parameters."""
    momentum = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    copies = [param.detach().clone() for param in params]
    opt = getattr(fs, name)(copies, **HYPERS, **momentum, **how)
    for step in range(steps):
        rng = torch.Generator().manual_seed(100 + step)
        opt.step([torch.randn(p.shape, generator=rng).to(p.dtype) for p in copies])
    return copies, opt


@pytest.mark.parametrize("state_dtype", STATE_DTYPES[1:])
@pytest.mark.parametrize("name", NARROWED)
def test_states_are_those_of_the_neutral_layer(name, state_dtype):
    how = {"state_dtype": state_dtype, "seed": 7}
    params = params_of()
    expected, other = neutral(name, params, **how)
    opt = optimizer(name, params, **how)
    assert_same(train(params, opt), expected)
    for i, param in enumerate(params):
        for key, array in other.state[i].items():
            found = opt.state[param][key]
            raw = np.frombuffer(array.tobytes(), np.uint8)
            assert np.array_equal(bits([found])[0].numpy(), raw)
            width = {"q8": 1, "bfloat16": 2}[state_dtype]
            assert found.dtype.itemsize == width
            if key.endswith("_exponents"):
                assert found.numel() == -(-param.numel() // 128)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@each_class
def test_bfloat16_parameters_are_those_of_the_neutral_layer(name, rounding):
    params = params_of(torch.bfloat16)
    expected, _ = neutral(name, params, rounding=rounding, seed=3)
    assert_same(train(params, optimizer(name, params, rounding=rounding, seed=3)), expected)


@each_class
def test_split_parameters_are_float32_masters(name):
    """The visible half is the master rounded to nearest, and training is that in float32."""
    params = params_of(torch.bfloat16)
    masters = [torch.nn.Parameter(param.detach().float()) for param in params]
    opt, oracle = optimizer(name, params, rounding="split"), optimizer(name, masters)
    for step in range(4):
        set_grads(params, step)
        for master, param in zip(masters, params, strict=True):
            master.grad = param.grad.float()
        opt.step()
        oracle.step()
    assert_same(opt.masters().values(), masters)
    for param, master in zip(params, masters, strict=True):
        words = param.detach().view(torch.int16).int() << 16
        assert torch.equal(words + opt.state[param]["low_bits"], master.detach().view(torch.int32))


@pytest.mark.parametrize("layout", ["channels_last", "gaps", "conjugate"])
def test_places_do_not_depend_on_strides(layout):
    how = {"state_dtype": "q8", "seed": 1, "ema": 0.5, "ema_dtype": "bfloat16"}
    value = torch.randn(4, 6, 5, 3, generator=torch.Generator().manual_seed(0))
    plain = [torch.nn.Parameter(value.clone())]
    if layout == "channels_last":
        strided = value.clone(memory_format=torch.channels_last)
    elif layout == "gaps":
        strided = torch.zeros(4, 6, 5, 6)[..., ::2].copy_(value)
    else:  # a negation is pending
        strided = torch.complex(torch.zeros(()), -value).conj().imag
    params = [torch.nn.Parameter(strided)]
    opt, other = ft.AdamW(params, **how), ft.AdamW(plain, **how)
    train(plain, other)
    train(params, opt)
    assert torch.equal(params[0], plain[0])
    with opt.ema(), other.ema():
        assert torch.equal(params[0], plain[0])
    assert torch.equal(params[0], plain[0])
    for key, state in other.state[plain[0]].items():
        assert torch.equal(opt.state[params[0]][key], state), key


@pytest.mark.parametrize("target", STATE_DTYPES)
@pytest.mark.parametrize("source", STATE_DTYPES)
def test_checkpoints_go_from_form_to_form(source, target):
    params = params_of()
    opt = optimizer("AdamW", params, state_dtype=source)
    train(params, opt)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    taken = optimizer("AdamW", copied := [torch.nn.Parameter(p.detach().clone()) for p in params],
                      state_dtype=target)  # fmt: skip
    taken.load_state_dict(torch.load(file))
    found = taken.state_dict(state_dtype="float32")["state"]
    for i, entry in opt.state_dict(state_dtype="float32")["state"].items():
        assert list(found[i]) == list(entry) == ["step", "exp_avg", "exp_avg_sq"]
        for key, value in entry.items():
            assert found[i][key].dtype == torch.float32
            coarse = {"float32": 0, "bfloat16": 2**-8, "q8": 2**-3}[target]
            if STATE_DTYPES.index(target) <= STATE_DTYPES.index(source):
                coarse = 0
            torch.testing.assert_close(found[i][key], value, rtol=coarse, atol=0)
    if source == target:
        assert_same(train(copied, taken, range(4, 7)), train(params, opt, range(4, 7)))


def test_checkpoints_go_to_the_neutral_layer_and_back():
    params = params_of()
    how = {"state_dtype": "q8", "seed": 2}
    opt = optimizer("AdamW", params, **how, ema=lambda n: n / (n + 1))
    train(params, opt)
    other = fs.AdamW([p.detach().clone() for p in params], **HYPERS, **how)
    other.load_state_dict(opt.state_dict())
    back = optimizer("AdamW", params, **how, ema=lambda n: n / (n + 1))
    back.load_state_dict(other.state_dict())
    assert back.param_groups[0]["averages"] == 4
    for i, entry in opt.state_dict()["state"].items():
        found = back.state_dict()["state"][i]
        assert found.keys() == entry.keys()
        assert_same([found[key] for key in entry], entry.values())


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_the_float32_form_loads_into_torch(state_dtype):
    params = params_of()
    opt = optimizer("AdamW", params, state_dtype=state_dtype)
    train(params, opt)
    theirs = torch.optim.AdamW(copied := copy.deepcopy(params), **HYPERS)
    theirs.load_state_dict(copy.deepcopy(opt.state_dict(state_dtype="float32")))
    train(copied, theirs, range(4, 5))
    wide = optimizer("AdamW", params)
    wide.load_state_dict(opt.state_dict(state_dtype="float32"))
    train(params, wide, range(4, 5))
    torch.testing.assert_close(copied, params)


@pytest.mark.parametrize("how", [
    {"rounding": "split", "state_dtype": "q8"},
    {"rounding": "kahan", "state_dtype": {"exp_avg": "bfloat16"}},
    {"rounding": "stochastic", "seed": 5},
])  # fmt: skip
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_resumed_training_is_uninterrupted_training(name, how):
    how = {**how, "ema": lambda n: n / (n + 1), "ema_dtype": "bfloat16"}
    if name == "SGD" and isinstance(how.get("state_dtype"), dict):
        how["state_dtype"] = "bfloat16"
    whole, params = params_of(torch.bfloat16), params_of(torch.bfloat16)
    opt, first = optimizer(name, whole, **how), optimizer(name, params, **how)
    train(whole, opt, range(6))
    train(params, first, range(3))
    resumed = optimizer(name, params, **how)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    assert_same(train(params, resumed, range(3, 6)), whole)
    for param, other in zip(params, whole, strict=True):
        found, expected = resumed.state[param], opt.state[other]
        assert found.keys() == expected.keys()
        assert_same([found[key] for key in expected], expected.values())
    assert resumed.param_groups[0]["averages"] == 6


@pytest.mark.parametrize(("source", "target"), [("split", "kahan"), ("kahan", "split")])
def test_masters_load_from_one_rounding_into_the_other(source, target):
    params = params_of(torch.bfloat16)
    opt = optimizer("AdamW", params, rounding=source)
    train(params, opt)
    other = optimizer("AdamW", copied := copy.deepcopy(params), rounding=target)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for found, expected in zip(other.masters().values(), opt.masters().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=2**-15, atol=0)
    train(copied, other, range(4, 5))


def test_copies_store_as_their_original():
    params = params_of(torch.bfloat16)
    opt = optimizer("AdamW", params, rounding="split", state_dtype="q8", seed=3)
    train(params, opt, range(2))
    twin_params, twin = copy.deepcopy((params, opt))
    assert_same(train(twin_params, twin, range(2, 4)), train(params, opt, range(2, 4)))


def test_a_first_moment_that_comes_later_begins_as_the_gradient():
    params, other = params_of(), params_of()
    opt = ft.AdamW(params, **HYPERS, betas=(0.9, 0.99))
    train(params, opt, range(2))
    opt.param_groups[0]["betas"] = (0.0, 0.99)
    train(params, opt, range(2, 4))
    assert all("exp_avg" not in entry for entry in opt.state.values())
    resumed = ft.AdamW(other, **HYPERS)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for one, its in ((opt, params), (resumed, other)):
        one.param_groups[0]["betas"] = (0.9, 0.99)
        train(its, one, range(4, 5))
        for param in its:
            assert torch.equal(one.state[param]["exp_avg"], param.grad)


@pytest.mark.parametrize(("how", "dtype", "error"), [
    ({"rounding": "truncate"}, torch.bfloat16, "rounding must be"),
    ({"rounding": "split"}, torch.float32, "rounding must be 'nearest' unless"),
    ({"rounding": "stochastic"}, torch.complex64, "rounding must be 'nearest' unless"),
    ({"state_dtype": "int4"}, torch.float32, "state_dtype must be"),
    ({"state_dtype": {"momentum": "q8"}}, torch.float32, "state_dtype must name states"),
    ({"state_dtype": "q8"}, torch.complex64, "state_dtype must be float32 or float64 under comp"),
    ({"ema_dtype": "float16"}, torch.float32, "ema_dtype must be wide enough"),
    ({"seed": -1}, torch.float32, "seed must be an integer"),
    ({"clip_value": 0.0}, torch.float32, "clip_value must be > 0"),
    ({"ema": 1.5}, torch.float32, r"ema must be in \[0, 1\]"),
    ({"shadow": [None]}, torch.float32, "shadow must have an entry for each of 3"),
])  # fmt: skip
def test_what_cannot_be_stored_is_refused(how, dtype, error):
    with pytest.raises(ValueError, match=error):
        ft.AdamW(params_of(dtype), **how)


@pytest.mark.parametrize("name", EXACT)
def test_states_that_must_be_exact_are_refused(name):
    with pytest.raises(ValueError, match=f"state_dtype must leave {EXACT[name]} in float32"):
        optimizer(name, params_of(), state_dtype="q8")


def test_a_state_of_another_form_is_refused_and_nothing_changes():
    params = params_of()
    opt = optimizer("AdamW", params, state_dtype="q8")
    train(params, opt)
    saved = copy.deepcopy(opt.state_dict())
    opt.state[params[1]]["exp_avg_exponents"] = torch.zeros(2, dtype=torch.uint8)
    before = copy.deepcopy(params)
    with pytest.raises(ValueError, match=r"state\[1\]\['exp_avg_exponents'\] must be contiguous, "
                       r"of shape \(3,\), got \(2,\)"):  # fmt: skip
        train(params, opt)
    assert_same(params, before)
    del saved["state"][0]["exp_avg_exponents"]
    with pytest.raises(ValueError, match=r"exponents'\] must be uint8 of shape \(4,\), got None"):
        opt.load_state_dict(saved)


def test_codes_without_their_exponents_are_refused_and_nothing_changes():
    params = params_of()
    opt = optimizer("AdamW", params, state_dtype="q8")
    train(params, opt)
    before = copy.deepcopy(params)
    for lost in ({"exp_avg_sq_exponents": None}, {}):
        del opt.state[params[1]]["exp_avg_sq_exponents"]
        opt.state[params[1]].update(lost)
        for run in (lambda: train(params, opt), opt.state_dict, lambda: opt.state_dict("float32")):
            with pytest.raises(ValueError, match=r"state\[1\]\['exp_avg_sq_exponents'\] must be "
                               "with the codes in 'exp_avg_sq', got none"):  # fmt: skip
                run()
    assert_same(params, before)
    assert opt.state[params[0]]["step"] == 4


def test_codes_load_bit_by_bit():
    params, other = params_of(), params_of()
    opt, resumed = (optimizer("AdamW", ps, state_dtype="q8") for ps in (params, other))
    train(params, opt)
    saved = copy.deepcopy(opt.state_dict())
    entry = saved["state"][0]  # the same number as that of exponent 84 and code 225
    entry["exp_avg_sq_exponents"].fill_(84)
    entry["exp_avg_sq"].fill_(225)
    resumed.load_state_dict(saved)
    again = resumed.state_dict()["state"]
    for i, entry in saved["state"].items():
        assert_same([again[i][name] for name in entry], entry.values())


@pytest.mark.parametrize("averages", [-1, 1.5, "x"])
def test_a_wrong_number_of_averages_is_refused_before_anything_changes(averages):
    params = params_of()
    opt = optimizer("AdamW", params, ema=0.5)
    train(params, opt)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["averages"] = averages
    saved["param_groups"][0]["lr"] = 7.0
    with pytest.raises((TypeError, ValueError), match=r"param_groups'\]\[0\]\['averages'\] must "):
        opt.load_state_dict(saved)
    assert opt.param_groups[0]["lr"] == 0.01
    assert opt.param_groups[0]["averages"] == 4


def test_a_checkpoint_says_which_first_moment_comes_later():
    params, other = params_of(), params_of()
    opt, resumed = (ft.AdamW(ps, **HYPERS, betas=(0.0, 0.99)) for ps in (params, other))
    train(params, opt, range(2))
    opt.param_groups[0]["betas"] = (0.9, 0.99)
    saved = copy.deepcopy(opt.state_dict())
    resumed.load_state_dict(saved)
    with torch.no_grad():
        for param, value in zip(other, params, strict=True):
            param.copy_(value)
    assert_same(train(other, resumed, range(2, 4)), train(params, opt, range(2, 4)))
    assert saved.pop("pending") == [0, 1, 2]
    with pytest.raises(ValueError, match="must have the key 'exp_avg'"):
        resumed.load_state_dict(saved)


@pytest.mark.parametrize("how", [{"state_dtype": "q8"}, {"ema_dtype": "bfloat16"}])
def test_a_momentum_that_is_switched_on_later_resumes_as_it_goes_on(how):
    params, other = params_of(), params_of()
    opt, resumed = (ft.SGD(ps, **HYPERS, dampening=0.5, **how) for ps in (params, other))
    train(params, opt, range(1))
    opt.param_groups[0]["momentum"] = 0.9
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(params, opt, range(1, 2))
    train(other, resumed, range(1, 2))
    mine, theirs = (one.state_dict("float32")["state"] for one in (opt, resumed))
    for i, entry in mine.items():
        assert_same([theirs[i][name] for name in entry], entry.values())
