"""bitsandbytes' states of 8 bits, decoded as it does, into float32 and q8; and the way back."""

import json
import pathlib

import numpy as np
import pytest

import fusedstep as fs
from optional import optional

torch = optional("torch")
FOLDER = pathlib.Path(__file__).parent / "golden" / "checkpoints" / "bitsandbytes"
RECORDED = json.loads((FOLDER / "halfway.json").read_text())


def arrays(flat):
    """Parameters or gradients by name."""
    return {n: np.array(flat[n], np.float32).reshape(RECORDED["shapes"][n]) for n in flat}


def kept(path):
    """What a file has, each parameter's state in one dict."""
    state = torch.load(path, weights_only=True)["optimizer"]
    for entry in state["state"].values():
        entry.update(entry.pop("__bnb_optimizer_quant_state__"))
    return state


def test_blocks_are_read_as_the_library_does():
    found = fs.convert.from_bitsandbytes(FOLDER / "blocks.pt", {"w": (3, 200)})
    assert (found.optimizer, found.step) == ("AdamW", 3)
    for key, theirs in torch.load(FOLDER / "blocks.pt", weights_only=True).items():
        if key != "optimizer":
            assert np.array_equal(found["state"][0][key], theirs)


# Of the way that the parameters went. bitsandbytes rounds its states at each of the ten steps, and
# q8 to 3 bits of fraction after the first of ours.
@pytest.mark.parametrize(("state_dtype", "allowed"), [(None, 0.02), ("q8", 0.1)])
@pytest.mark.parametrize("case", RECORDED["narrow"], ids=lambda case: case["optimizer"])
def test_run_of_8_bits_ends_near_the_library_s(case, state_dtype, allowed):
    params = arrays(case["half"])
    state = fs.convert.from_bitsandbytes(FOLDER / case["file"], params, case["optimizer"])
    how = {"state_dtype": state_dtype} if state_dtype else {}
    opt = getattr(fs, state.optimizer)(params, lr=0.5, **how)
    opt.load_state_dict(state)
    kinds = {one.dtype.name for one in opt.state_dict()["state"][0].values() if np.ndim(one)}
    assert kinds == {"uint8" if state_dtype else "float32"}
    for rate, grads in zip(case["rates"], RECORDED["gradients"], strict=True):
        opt.param_groups[0]["lr"] = rate
        opt.step(arrays(grads))
    assert opt.steps == 20
    for name, end in arrays(case["end"]).items():
        update = np.abs(end - arrays(case["half"])[name]).max()
        assert np.abs(params[name] - end).max() <= allowed * update


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: case["optimizer"])
def test_state_of_32_bits_comes_back(case):
    expected = kept(FOLDER / case["file"])
    state = fs.convert.from_bitsandbytes(FOLDER / case["file"], None, case["optimizer"])
    back = fs.convert.to_bitsandbytes(state)
    assert back["param_groups"] == expected["param_groups"]
    assert back["state"].keys() == expected["state"].keys()
    for i, entry in expected["state"].items():
        # No update of SGD, RMSprop, Adagrad and Lion counts, but the library's has the first apart.
        assert back["state"][i].pop("step") == entry.pop("step") == 10
        assert back["state"][i].keys() == entry.keys()
        assert all(torch.equal(back["state"][i][key], entry[key]) for key in entry)


def test_decay_after_the_update_is_of_some_devices():
    path = FOLDER / "Adam.pt"
    state = fs.convert.from_bitsandbytes(path, decay_after=True)
    assert state.convention == {"decay_after": True}
    assert fs.convert.to_bitsandbytes(state)["param_groups"] == kept(path)["param_groups"]


def lion(**more):
    """Lion's state of 300 elements, in 8 bits, some of it replaced."""
    codes = np.arange(300, dtype=np.uint8)
    entry = {"step": 3, "state1": codes, "qmap1": np.linspace(-1, 1, 256, dtype=np.float32)}
    entry |= {"absmax1": np.array([1, 2], np.float32), **more.pop("entry", {})}
    group = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.0, "weight_decay": 0, "params": [0]}
    return {"state": {0: entry}, "param_groups": [{**group, **more}]}


def test_older_blocks_are_larger():
    for scales, expected in (([1, 2], 2), ([1], 1)):  # 256 and 2048 elements
        state = lion(entry={"absmax1": np.array(scales, np.float32)}, initial_lr=0.2)
        found = fs.convert.from_bitsandbytes(state, [(300,)], "Lion8bit")
        codes = np.linspace(-1, 1, 256, dtype=np.float32)
        assert found["state"][0]["exp_avg"][299] == codes[43] * np.float32(expected)
        assert found["param_groups"][0]["initial_lr"] == 0.2


@pytest.mark.parametrize(
    ("state", "optimizer", "message"),
    [
        (lion(), None, "optimizer must be given: state1 without state2 may be of SGD, RMSprop, "),
        (lion(), "LAMB", "optimizer must be one of SGD, Adagrad, RMSprop, Adam, .*, got 'LAMB'"),
        (lion(), "AdamW", r"state\[0\] must have 'state2' of AdamW, got \['absmax1', 'qmap1', "),
        (
            lion(entry={"state2": np.ones(300, np.float32)}),
            "Lion",
            r"state\[0\] must have step, state1 of Lion, got 'state2'",
        ),
        (
            lion(entry={"unorm_vec": np.ones(1, np.float32)}),
            "Lion",
            "got 'unorm_vec', which is of LAMB, LARS, or max_unorm",
        ),
        (
            lion(entry={"absmax1": np.ones(3, np.float32)}),
            "Lion",
            r"\['absmax1'\] must have shape \(2,\) or \(1,\), got \(3,\)",
        ),
        (
            lion(entry={"qmap1": np.ones(16, np.float32)}),
            "Lion",
            r"\['qmap1'\] must have shape \(256,\), got \(16,\)",
        ),
        (
            lion(entry={"state1": np.zeros(9, "f4")}),
            "Lion",
            r"must have shape \(300,\), got \(9,\)",
        ),
        (
            lion(betas=(0.8, 0.9, 0.99)),
            "Lion",
            r"betas must be two of Lion, got \(.*\), as of AdEMAMix",
        ),
        (lion(params=[0, 1]), "Lion", "params must be 2, as in param_groups, got 1"),
    ],
)
def test_state_that_does_not_fit_is_refused(state, optimizer, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fs.convert.from_bitsandbytes(state, [(300,)], optimizer)


def test_to_bitsandbytes_refuses_what_it_has_not():
    w = np.zeros(3, np.float32)
    opt = fs.Adam(w, weight_decay=0.1)
    opt.step(np.ones_like(w))
    with pytest.raises(ValueError, match=r"bitsandbytes.Adam has decoupled_weight_decay=True, not"):
        fs.convert.to_bitsandbytes(opt.state_dict(), optimizer="Adam")
    opt = fs.Lion(w.astype(np.float64))
    opt.step(np.ones_like(w))
    with pytest.raises(TypeError, match=r"\[0\]\['exp_avg'\] must be float32 or narrower, got flo"):
        fs.convert.to_bitsandbytes(opt.state_dict(), optimizer="Lion")
    state = fs.convert.from_bitsandbytes(lion(), optimizer="Lion")
    del state["param_groups"][0]["lr"]
    with pytest.raises(ValueError, match=r"\['param_groups'\]\[0\] must have lr: the rate was a"):
        fs.convert.to_bitsandbytes(state)
