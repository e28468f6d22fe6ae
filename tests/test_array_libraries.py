"""Arrays of other libraries, a test for each row of docs/arrays.md; skipped without the library."""

import numpy as np
import pytest

import fusedstep as fs

START = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32)
GRADIENT = np.array([[0.5, -1.0, 0.25], [0.0, 2.0, -0.125]], np.float32)
AFTER = START - np.float32(0.5) * GRADIENT  # exact


def stepped(param, grad, **how):
    """The parameter, as NumPy has it, after one step."""
    fs.SGD(param, lr=0.5).step(grad, **how)
    return np.asarray(param)


# Gradients whose elements lie apart, each of the same values.
APART = {
    "transposed": lambda g: np.ascontiguousarray(g.T).T,
    "Fortran": np.asfortranarray,
    "stepped": lambda g: np.repeat(g, 2, axis=1)[:, ::2],
    "negative": lambda g: g[::-1, ::-1].copy()[::-1, ::-1],
}


@pytest.mark.parametrize("apart", APART.values(), ids=APART)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("form", ["one", "list", "dict"])
def test_gradient_may_lie_apart(apart, dtype, form):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    grad = apart(GRADIENT.astype(getattr(ml_dtypes, dtype, dtype)))
    assert not grad.flags.c_contiguous
    before = grad.copy()
    wrap = {"one": lambda a: a, "list": lambda a: [a], "dict": lambda a: {"w": a}}[form]
    param = START.copy()
    opt = fs.SGD(wrap(param), lr=0.5)
    opt.step(wrap(grad), max_norm=1e9, skip_nonfinite=True)
    assert np.array_equal(param, AFTER)
    assert np.array_equal(grad, before)


def test_gradient_may_be_spread_from_one_element():
    assert np.array_equal(stepped(START.copy(), np.broadcast_to(np.float32(2), (2, 3))), START - 1)


def test_gradient_that_lies_apart_is_not_zeroed():
    param, grad = START.copy(), np.asfortranarray(GRADIENT)
    with pytest.raises(ValueError, match=r"^grads\[0\] must be C-contiguous, got a strided array"):
        stepped(param, grad, zero_grad=True)
    assert np.array_equal(param, START)
    assert np.array_equal(grad, GRADIENT)


def test_parameter_may_not_lie_apart():
    with pytest.raises(ValueError, match=r"^params\[0\] must be C-contiguous"):
        fs.SGD(np.asfortranarray(START))


def test_gradient_of_torch_may_lie_apart():
    torch = pytest.importorskip("torch")
    for grad in (torch.from_numpy(GRADIENT).T.contiguous().T,
                 torch.from_numpy(GRADIENT).bfloat16().T.contiguous().T):  # fmt: skip
        assert not grad.is_contiguous()
        assert np.array_equal(stepped(START.copy(), grad), AFTER)


def test_dicts_and_lists_in_dicts_are_named_by_their_path():
    nested = {"layers": [{"kernel": START, "bias": START[0]}, {}], "scale": START[:, 0].copy()}
    buffer = fs.FlatBuffer.pack(nested)
    assert list(buffer) == ["layers.0.kernel", "layers.0.bias", "scale"]
    assert np.array_equal(buffer["layers.0.kernel"], START)
    grads = {"layers": [{"kernel": GRADIENT, "bias": GRADIENT[0]}], "scale": GRADIENT[:, 0].copy()}
    fs.SGD(buffer, lr=0.5, groups=[fs.Group("*.bias", lr=0.0)]).step(grads)
    assert np.array_equal(buffer["layers.0.kernel"], AFTER)
    assert np.array_equal(buffer["layers.0.bias"], START[0])
    with pytest.raises(TypeError, match=r"arrays\[w\] must be .* got list"):
        fs.FlatBuffer.pack({"w": [1.0, 2.0]})
    with pytest.raises(ValueError, match=r"arrays must have distinct names, got 'a\.b' twice"):
        fs.FlatBuffer.pack({"a": {"b": START}, "a.b": START})


class Dataset:
    """What h5py's datasets, TensorFlow's variables and others have, and are."""

    dtype, shape = np.dtype(np.float32), (2, 3)

    def __iter__(self):
        return iter(START.copy())


def test_array_that_is_no_memory_is_refused_by_name():
    message = (
        "params must be an array in memory, or a sequence or dict of them, got Dataset of"
        " test_array_libraries: read it into a NumPy array, and write that back"
    )
    with pytest.raises(TypeError) as caught:
        fs.SGD(Dataset())
    assert str(caught.value) == message
    opt = fs.SGD([row.copy() for row in START])
    with pytest.raises(TypeError, match=r"^grads must be an array in memory"):
        opt.step(Dataset())


# -- the libraries themselves ----------------------------------------------------------------------


def test_paddle_is_stepped_in_place():
    paddle = pytest.importorskip("paddle")
    param = paddle.to_tensor(START.copy(), stop_gradient=False)
    assert np.array_equal(stepped(param, paddle.to_tensor(GRADIENT)).reshape(2, 3), AFTER)
    assert np.array_equal(stepped(START.copy(), paddle.to_tensor(GRADIENT.T.copy()).T), AFTER)


def test_paddle_is_told_of_a_step_between_forward_and_backward():
    paddle = pytest.importorskip("paddle")
    param = paddle.to_tensor(START.copy(), stop_gradient=False)
    loss = (param * param * param).sum()
    version = param.inplace_version
    stepped(param, GRADIENT)
    assert param.inplace_version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_jax_gives_gradients():
    jnp = pytest.importorskip("jax.numpy")
    for grad in (
        jnp.asarray(GRADIENT),
        jnp.asarray(GRADIENT, jnp.bfloat16),
        jnp.asarray(GRADIENT.T).T,
    ):
        assert np.array_equal(stepped(START.copy(), grad), AFTER)
    with pytest.raises(ValueError, match=r"params\[0\] must be writable.*numpy\.array"):
        fs.SGD(jnp.asarray(START))


def test_jax_array_that_was_deleted_is_refused():
    jnp = pytest.importorskip("jax.numpy")
    grad = jnp.asarray(GRADIENT)
    grad.delete()
    with pytest.raises(ValueError, match=r"^grads\[0\] must have memory.*got a deleted array"):
        stepped(START.copy(), grad)


def test_bfloat16_of_jax_is_taken_wherever_arrays_are():
    jnp = pytest.importorskip("jax.numpy")
    check_bfloat16(jnp.asarray(GRADIENT, jnp.bfloat16))


def test_bfloat16_of_mlx_is_taken_wherever_arrays_are():
    mx = pytest.importorskip("mlx.core")
    check_bfloat16(mx.array(GRADIENT).astype(mx.bfloat16))


def check_bfloat16(array):
    buffer = fs.FlatBuffer.pack({"w": array})
    assert buffer.flat.dtype.name == "bfloat16"
    assert np.array_equal(buffer["w"].astype(np.float32), GRADIENT)
    buffer = fs.FlatBuffer.pack({"w": START})
    buffer["w"] = array
    assert np.array_equal(buffer["w"], GRADIENT)
    param = START.copy()
    opt = fs.SGD(param, lr=1.0, momentum=0.5)
    groups = [{"params": [0]}]
    opt.load_state_dict(
        {"state": {0: {"momentum_buffer": array}}, "param_groups": groups, "step": 1}
    )
    assert np.array_equal(opt.state[0]["momentum_buffer"], GRADIENT)
    with opt.lookahead():
        assert np.array_equal(param, START - np.float32(0.5) * GRADIENT)
        grad = array
    opt.step(grad)
    assert np.array_equal(param, START - np.float32(1.5) * GRADIENT)


def test_mlx_gives_gradients():
    mx = pytest.importorskip("mlx.core")
    for grad in (mx.array(GRADIENT), mx.array(GRADIENT.T.copy()).T):
        assert np.array_equal(stepped(START.copy(), grad), AFTER)


def test_tensorflow_gives_gradients():
    tf = pytest.importorskip("tensorflow")
    assert np.array_equal(stepped(START.copy(), tf.constant(GRADIENT)), AFTER)
    with pytest.raises(TypeError, match="got ResourceVariable of tensorflow: read it into a NumPy"):
        fs.SGD(tf.Variable(START))


def test_h5py_dataset_is_refused_by_name(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("w", data=START)
        with pytest.raises(TypeError, match="got Dataset of h5py: read it into a NumPy array"):
            fs.SGD(dataset)
        with pytest.raises(TypeError, match=r"params\[w\] must be a NumPy array or a DLPack"):
            fs.SGD({"w": dataset})
