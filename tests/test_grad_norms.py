"""The norm of each tensor's gradient, and which ones were not finite, in both layers."""

import pickle
import threading

import numpy as np
import pytest

import fusedstep as fs
from cases import FORMATS
from fusedstep.buffers import as_dtype
from optional import optional

torch = optional("torch")
ft = optional("fusedstep.torch")

SHAPES = {"w": (70, 13), "b": (7,), "none": (0,), "out": (513,)}


def gradients(dtype, seed=0):
    rng = np.random.default_rng(seed)
    return {key: rng.normal(size=shape).astype(as_dtype(dtype)) for key, shape in SHAPES.items()}


def exact(grad):
    return float(np.sqrt(np.square(grad.astype(np.longdouble)).sum()))


def params():
    return {key: np.ones(shape, np.float32) for key, shape in SHAPES.items()}


def torch_params():
    return {key: torch.nn.Parameter(torch.ones(shape)) for key, shape in SHAPES.items()}


@pytest.mark.parametrize("isa", fs.usable_isas(), indirect=True)
@pytest.mark.parametrize("dtype", FORMATS)
def test_report_has_the_norm_of_each_gradient_by_name(dtype, isa):
    opt, grads = fs.AdamW(params()), gradients(dtype)
    report = opt.step({**grads, "b": None}, norms=True, loss_scale=4.0)
    read = {key: g.astype(np.float32) for key, g in grads.items()}
    expected = {key: exact(g) / 4 for key, g in read.items() if key != "b"}
    assert report.grad_norms == pytest.approx(expected, rel=1e-14)
    assert list(report.grad_norms) == ["w", "none", "out"]
    assert report.grad_norm == pytest.approx(np.hypot(expected["w"], expected["out"]), rel=1e-14)
    assert report.nonfinite == []
    assert (opt.grad_norms, opt.nonfinite) == (report.grad_norms, report.nonfinite)


def test_report_is_three_numbers_unless_more_was_asked_for():
    opt = fs.SGD(params())
    report = opt.step(gradients("float32"))
    step, _, elements = report
    assert (step, elements) == (1, 70 * 13 + 7 + 513)
    assert report.grad_norm is report.grad_norms is report.nonfinite is None
    assert opt.grad_norm is opt.grad_norms is opt.nonfinite is None
    asked = opt.step(gradients("float32"), norms=True)
    assert len(asked) == 3
    assert pickle.loads(pickle.dumps(asked)).grad_norms == asked.grad_norms


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", FORMATS)
def test_skipped_step_says_which_gradients_were_to_blame(dtype, bad):
    grads = gradients(dtype)
    grads["w"][-1, -1] = grads["b"][0] = bad
    opt = fs.AdamW(params())
    report = opt.step(grads, skip_nonfinite=True, norms=True)
    assert report.elements == 0
    assert report.nonfinite == opt.nonfinite == ["w", "b"]
    assert not np.isfinite([report.grad_norms["w"], report.grad_norms["b"]]).any()
    assert report.grad_norms["out"] == pytest.approx(
        exact(grads["out"].astype(np.float32)), rel=1e-14
    )


def test_norm_that_overflows_is_no_gradient_that_is_not_finite():
    opt = fs.SGD({"big": np.ones(3), "small": np.ones(3)})
    grads = {"big": np.array([1e200, 1.0, 1.0]), "small": np.ones(3)}
    report = opt.step(grads, norms=True)
    assert report.grad_norms == {"big": np.inf, "small": pytest.approx(np.sqrt(3))}
    assert report.nonfinite == []


@pytest.mark.parametrize("threads", [1, 3])
def test_norms_of_tensors_are_the_same_bits_on_any_thread_and_set(threads, isa):
    fs.set_num_threads(threads)
    rng = np.random.default_rng(1)
    sizes = [1, 600, 40_000, 300_001]
    grads = [rng.normal(size=n).astype("f4") for n in sizes]
    report = fs.SGD([np.ones(n, "f4") for n in sizes]).step(grads, norms=True)
    fs.set_isa("scalar")
    fs.set_num_threads(1)
    alone = [
        fs.SGD(np.ones(n, "f4")).step(g, norms=True) for n, g in zip(sizes, grads, strict=True)
    ]
    assert list(report.grad_norms.values()) == [one.grad_norm for one in alone]


def test_asking_changes_no_bit_of_a_step():
    asked, plain = params(), params()
    one, other = fs.NAdam(asked), fs.NAdam(plain)
    for seed in range(3):
        one.step(gradients("float32", seed), norms=True)
        other.step(gradients("float32", seed))
    for key, array in asked.items():
        np.testing.assert_array_equal(array, plain[key])


@pytest.mark.parametrize("named", [True, False])
def test_torch_has_the_norms_of_the_neutral_layer(named):
    mine, grads = torch_params(), gradients("float32")
    grads["b"][3] = np.inf
    opt = ft.AdamW(mine.items() if named else mine.values())
    assert opt.grad_norms is opt.nonfinite is None
    for key, param in mine.items():
        param.grad = torch.from_numpy(grads[key].copy()) if key != "out" else None
    assert opt.step(skip_nonfinite=True) is None
    report = fs.AdamW(params()).step({**grads, "out": None}, norms=True, skip_nonfinite=True)
    keys = {key: key if named else i for i, key in enumerate(mine)}
    assert opt.grad_norms == {keys[key]: norm for key, norm in report.grad_norms.items()}
    assert opt.nonfinite == [keys["b"]]
    mine["b"].grad.zero_()
    opt.step(norms=True)
    assert opt.nonfinite == []
    assert float(opt.grad_norm) == pytest.approx(opt.grad_norms[keys["w"]])
    opt.step()
    assert opt.grad_norm is opt.grad_norms is opt.nonfinite is None


def test_torch_names_a_parameter_of_a_later_group():
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = ft.SGD([{"params": [("a", first)]}, {"params": [("b", second)]}])
    second.grad = torch.tensor([3.0, 4.0])
    opt.step(norms=True)
    assert opt.grad_norms == {"b": 5.0}


def test_torch_tells_parameters_apart_that_have_one_name():
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = ft.SGD([{"params": [("a", first)]}, {"params": [("a", second)]}])
    first.grad, second.grad = torch.tensor([3.0, 4.0]), torch.tensor([6.0, 8.0])
    opt.step(norms=True)
    assert opt.grad_norms == {0: 5.0, 1: 10.0}


def test_torch_calls_gradients_as_the_step_did_that_measured_them():
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = ft.SGD([("a", first), ("b", second)])
    first.grad, second.grad = torch.tensor([3.0, 4.0]), torch.tensor([6.0, 8.0])
    opt.step(max_norm=1.0)
    group = opt.param_groups[0]
    group["params"].pop(0)
    group["param_names"].pop(0)
    assert opt.grad_norms == {"a": 5.0, "b": 10.0}


def test_norms_are_not_read_in_the_middle_of_another_thread_s_step():
    param = torch.nn.Parameter(torch.ones(2))
    opt = ft.SGD([param])
    param.grad = torch.ones(2)
    opt.step(norms=True)
    refused = []

    def read():
        for name in ("grad_norms", "nonfinite"):
            try:
                getattr(opt, name)
            except RuntimeError as error:
                refused.append(str(error))

    def closure():
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()

    opt._turn.run(closure)
    assert refused == ["this optimizer is already stepping in another thread"] * 2


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_norms_must_be_a_flag(value):
    opt = fs.SGD(params())
    with pytest.raises(TypeError, match="norms must be True or False, got"):
        opt.step(gradients("float32"), norms=value)
    assert opt.steps == 0
    with pytest.raises(TypeError, match="norms must be True or False, got"):
        ft.SGD(torch_params().values()).step(norms=value)


def test_norms_need_all_gradients_at_once():
    mine = torch_params()
    opt = ft.SGD(mine.values())
    ft.step_in_backward(torch.nn.ParameterList(mine.values()), opt)
    with pytest.raises(RuntimeError, match=r"norms need all gradients at once"):
        opt.step(norms=True)


@pytest.mark.parametrize("isa", fs.usable_isas(), indirect=True)
@pytest.mark.parametrize("param", ["float32", "bfloat16", "float16"])
def test_gradients_are_measured_as_the_step_reads_them(param, isa):
    # Finite in float64, but not in the float32 that the step computes in.
    array = np.ones(600, as_dtype(param))
    grads = np.full(600, 0.1)
    grads[17] = 1e39
    opt = fs.SGD(array)
    report = opt.step(grads, skip_nonfinite=True, norms=True)
    assert (report.elements, report.grad_norm, report.nonfinite) == (0, np.inf, [0])
    assert (array == 1).all()
    grads[17] = 0.1
    read = exact(grads.astype(np.float32))
    assert opt.step(grads, norms=True).grad_norm == pytest.approx(read, rel=1e-15)
    wide = fs.SGD(np.ones(600)).step(grads, norms=True)
    assert wide.grad_norm == pytest.approx(exact(grads), rel=1e-15)
    assert wide.grad_norm != pytest.approx(read, rel=1e-12)


def test_norms_are_gone_after_a_load():
    opt = fs.SGD(params())
    opt.step(gradients("float32"), norms=True)
    opt.load_state_dict(opt.state_dict())
    assert opt.grad_norm is opt.grad_norms is opt.nonfinite is None
