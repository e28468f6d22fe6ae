"""The curvature of a loss: extreme eigenvalues of its Hessian, and the rates that they allow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from fusedstep._arrays import as_array, as_float, in_order, is_tensor, loaded_torch, name_params
from fusedstep._hypers import POSITIVE, as_integer, check
from fusedstep.convergence.arrays import Array

# Up to this many parameters the whole Hessian is formed, of which nothing is left to estimate.
_DENSE = 32

_BASIS = 20  # vectors that Lanczos' method keeps, as SciPy does of itself for one eigenvalue

# A gradient is right to some units of rounding, as the sums in it are: this many are assumed.
_UNITS = 8


class Curvature(NamedTuple):
    """Extreme eigenvalues of a Hessian, and how far each may be from a true one."""

    largest: float
    smallest: float
    largest_error: float
    smallest_error: float
    products: int  # Hessian-vector products taken
    method: str  # "finite differences" or "exact products"


def curvature(
    grad_fn: Callable[[Any], Any],
    params: Any,
    *,
    optimizer: Any = None,
    step: float | None = None,
    tol: float = 1e-4,
    max_products: int = 3000,
    seed: int = 0,
) -> Curvature:
    """The largest and the smallest eigenvalue of the Hessian at `params`, without forming it.

        H v = (g(p + h*v) - g(p - h*v)) / 2h        |v| = 1, or exactly, by torch

    Lanczos' method (SciPy's) finds the eigenvalue of largest magnitude, and then the other end as
    that of H shifted by the first. Up to 32 parameters the Hessian is formed instead.

    Args:
        grad_fn: called as `grad_fn(params)`; returns the gradients in any form that
            `Optimizer.step` takes: an array, a sequence or dict of arrays, a FlatBuffer, which may
            be the same ones each time. It must be deterministic and change nothing: one batch, no
            dropout, batch normalisation in `eval` mode. Or, with torch parameters, it returns the
            loss, a tensor of no dimensions: products are exact then, by double backward.
        params: an array, a sequence or dict of arrays, a FlatBuffer, or torch CPU tensors; float32
            or float64. They are moved while `grad_fn` is called, and are what they were afterwards,
            to the bit, also when it raises.
        optimizer: measures the Hessian along an optimizer's scaled directions instead, D^-1/2 H
            D^-1/2, D being what its steps are divided by at present (for Adam
            `sqrt(v)/sqrt(1 - beta2^t) + eps`). One of ours, `fusedstep.torch`'s included, that
            holds these very `params` and has taken a step. Weight decay counts only where it is
            part of `grad_fn`.
        step: the length h of a finite difference; by default `eps^(1/3) * (1 + |p|)` for the
            parameters' type.
        tol: Lanczos' method goes on until the norm of H v - lambda v is this share of lambda, the
            eigenvalue farther from 0, or of the distance of both for the other; the eigenvalue
            itself is mostly far more accurate.
        max_products: how many Hessian-vector products it may take for each end.
        seed: of the random start vector; an integer >= 0.

    Returns:
        `Curvature`. Its errors are the norm of H v - lambda v, within which an eigenvalue of a
        symmetric matrix must lie, how much the products change when h is doubled, and the rounding
        of gradients and parameters over h.

    Raises:
        TypeError, ValueError: params without an element, of another dtype, not finite, or that
            share memory; gradients of another number, shape or kind, or not finite; an optimizer
            that does not divide, has not stepped, or holds other parameters.
        RuntimeError: no convergence within `max_products`.
        ModuleNotFoundError: SciPy is not installed.

    Example:
        >>> import numpy as np
        >>> from fusedstep.convergence import curvature
        >>> x = np.array([1.0, 2.0, 3.0])
        >>> found = curvature(lambda x: np.array([1.0, 10.0, -4.0]) * x, x)
        >>> round(found.largest, 6), round(found.smallest, 6), found.largest_error < 1e-6
        (10.0, -4.0, True)

    Reference:
        Lanczos 1950, https://doi.org/10.6028/jres.045.026; Pearlmutter 1994 (exact products)
    """
    if step is not None:
        step = check("step", step, POSITIVE)
    tol = check("tol", tol, POSITIVE)
    max_products = as_integer("max_products", max_products, 1)
    seed = as_integer("seed", seed, 0)
    with _Hessian(grad_fn, params, step, optimizer) as hessian:
        if hessian.n <= _DENSE:
            return _dense(hessian)
        rng = np.random.default_rng(seed)
        first = _outermost(hessian, 0.0, tol, max_products, rng)
        second = _outermost(hessian, first[0], tol, max_products, rng)
        low, high = sorted([first, second])
        return Curvature(high[0], low[0], high[1], low[1], hessian.products, hessian.method)


def safe_lr(
    grad_fn: Callable[[Any], Any],
    params: Any,
    optimizer: Any = None,
    *,
    preconditioned: bool = False,
    step: float | None = None,
    tol: float = 1e-4,
    max_products: int = 3000,
    seed: int = 0,
) -> float:
    """The largest learning rate at which gradient descent is stable here, 2/lambda_max.

    Above it the parameters move away along the sharpest direction, until they meet less curvature.

    With `preconditioned` it is that of an adaptive optimizer's steps under its present denominator
    D, `2/lambda_max(D^-1/2 H D^-1/2)`, where training with it tends to settle: the edge of
    stability. An averaged gradient moves the edge by (1 + beta1)/(1 - beta1), a momentum mu by
    1 + mu.

    Args:
        grad_fn, params: as for `curvature`.
        optimizer: with `preconditioned`, as for `curvature`.
        preconditioned: measures along the optimizer's scaled directions.
        step, tol, max_products, seed: as for `curvature`.

    Returns:
        The rate; infinity where no direction curves upwards.

    Raises:
        TypeError, ValueError, RuntimeError: as for `curvature`; an optimizer without
            `preconditioned`, or the reverse.

    Example:
        >>> import numpy as np
        >>> from fusedstep.convergence import safe_lr
        >>> round(safe_lr(lambda x: np.array([1.0, 10.0]) * x, np.ones(2)), 6)
        0.2

    Reference:
        Cohen et al. 2021, https://arxiv.org/abs/2103.00065; 2022, https://arxiv.org/abs/2207.14484
    """
    if not isinstance(preconditioned, bool):
        raise TypeError(f"preconditioned must be True or False, got {preconditioned!r}")
    if preconditioned != (optimizer is not None):
        raise ValueError(
            f"optimizer must be given with preconditioned=True and only then, got {optimizer!r}"
            f" with preconditioned={preconditioned}"
        )
    largest = curvature(
        grad_fn, params, optimizer=optimizer, step=step, tol=tol, max_products=max_products,
        seed=seed,
    ).largest  # fmt: skip
    return 2 / largest if largest > 0 else math.inf


class _Hessian:
    """Products of the Hessian with vectors; while open it may move the parameters."""

    def __init__(
        self, grad_fn: Callable[[Any], Any], params: Any, step: float | None, optimizer: Any
    ) -> None:
        if not callable(grad_fn):
            raise TypeError(f"grad_fn must be callable, got {grad_fn!r}")
        if isinstance(params, Iterator):  # a module's parameters()
            params = list(params)
        self._grad_fn, self._params = grad_fn, params
        self._named = name_params(params)
        self._arrays = [as_array(p, f"params[{key}]") for key, p in self._named.items()]
        self._shapes = [array.shape for array in self._arrays]
        for key, array in zip(self._named, self._arrays, strict=True):
            if array.dtype not in (np.float32, np.float64):
                raise TypeError(f"params[{key}] must be float32 or float64, got {array.dtype}")
            if not array.flags.writeable:
                raise ValueError(f"params[{key}] must be writable, got a read-only array")
            if not np.isfinite(array).all():
                raise ValueError(f"params[{key}] must be finite, got NaN or infinity")
        _check_apart(dict(zip(self._named, self._arrays, strict=True)))
        self.n = sum(array.size for array in self._arrays)
        if self.n == 0:
            raise ValueError("params must have at least one element, got none")
        self._scale = np.ones(self.n)
        if optimizer is not None:
            self._scale = 1 / np.sqrt(self._denominator(optimizer))
        self.products = 0
        self.method, self._is_exact = "finite differences", False
        self._step = step
        self._eps = max(float(np.finfo(array.dtype).eps) for array in self._arrays)
        self._rounding = 0.0, 0.0

    def __enter__(self) -> _Hessian:
        self._saved = [array.copy() for array in self._arrays]
        try:
            self._begin(self._grad_fn(self._params))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for array, saved in zip(self._arrays, self._saved, strict=True):
            np.copyto(array, saved)

    def _begin(self, result: Any) -> None:
        """Looks at what `grad_fn` returns: the loss, or gradients."""
        torch = loaded_torch()
        shape = tuple(getattr(result, "shape", ()))
        is_gradient = shape != () and [shape] == self._shapes
        if is_tensor(result) and result.requires_grad and not is_gradient:
            if shape:
                raise ValueError(
                    "grad_fn must return a loss of no dimensions or gradients of the parameters'"
                    f" shapes, got {shape}"
                )
            for key, one in self._named.items():
                if not is_tensor(one) or not one.requires_grad:
                    kind = f"{type(one).__name__} with requires_grad=False"
                    raise TypeError(
                        f"params[{key}] must be a tensor that requires grad where grad_fn returns a"
                        f" loss, got {kind if hasattr(one, 'detach') else type(one).__name__}"
                    )
            self.method, self._is_exact = "exact products", True
            self._tensors = list(self._named.values())
            self._slopes = torch.autograd.grad(
                result, self._tensors, create_graph=True, materialize_grads=True
            )
            self._rounding = 0.0, _UNITS * self._eps
            return
        slope = float(np.linalg.norm(self._flat(result)))
        eps = self._eps
        size = math.sqrt(sum(float((a.astype(np.float64) ** 2).sum()) for a in self._saved))
        if self._step is None:
            self._step = float(np.cbrt(eps) * (1 + size))
        # What the rounding of gradients and of shifted parameters makes of a difference.
        self._rounding = eps * slope / self._step, eps * (size / self._step + _UNITS)

    def noise(self, value: float) -> float:
        """How far rounding may move an eigenvalue of about `value`."""
        absolute, relative = self._rounding
        scale = float((self._scale**2).max())
        return absolute * scale + (relative + float(np.finfo(float).eps) * self.n) * abs(value)

    def times(self, v: Array, stretch: float = 1.0) -> Array:
        """D^-1/2 H D^-1/2 v; a finite difference over `stretch` times its length."""
        direction = self._scale * v.ravel()
        length = float(np.linalg.norm(direction))
        if length == 0:
            return np.zeros(self.n)
        self.products += 1
        unit = direction / length
        product = self._exact(unit) if self._is_exact else self._difference(unit, stretch)
        result: Array = self._scale * product * length
        return result

    def _exact(self, v: Array) -> Array:
        torch = loaded_torch()
        parts = [
            torch.as_tensor(part, dtype=tensor.dtype, device=tensor.device).reshape(tensor.shape)
            for part, tensor in zip(self._parts(v), self._tensors, strict=True)
        ]
        curved = [i for i, slope in enumerate(self._slopes) if slope.requires_grad]
        if not curved:  # the loss is linear
            return np.zeros(self.n)
        found = torch.autograd.grad(
            [self._slopes[i] for i in curved], self._tensors, [parts[i] for i in curved],
            retain_graph=True, materialize_grads=True,
        )  # fmt: skip
        return self._flat(list(found))

    def _difference(self, v: Array, stretch: float) -> Array:
        assert self._step is not None
        h = self._step * stretch
        ahead = self._gradient(h * v)
        behind = self._gradient(-h * v)
        difference: Array = (ahead - behind) / (2 * h)
        return difference

    def _gradient(self, shift: Array) -> Array:
        for array, saved, part in zip(self._arrays, self._saved, self._parts(shift), strict=True):
            np.add(saved, part.reshape(saved.shape), out=array, casting="same_kind")
        return self._flat(self._grad_fn(self._params))

    def _parts(self, v: Array) -> list[Array]:
        return np.split(v, np.cumsum([array.size for array in self._arrays])[:-1])

    def _flat(self, grads: Any) -> Array:
        """Gradients as one vector of their own."""
        number = as_float(grads)
        if number is not None and self._shapes != [()]:
            raise TypeError(
                f"grad_fn must return gradients like params, got the number {number:g}: a loss will"
                " do where it is a torch tensor that depends on params"
            )
        name = "grad_fn(params)"
        ordered = in_order(self._named, grads, name)
        if len(ordered) != len(self._shapes):
            raise ValueError(
                f"grad_fn must return {len(self._shapes)} gradients, got {len(ordered)}"
            )
        flat = np.empty(self.n)
        for key, shape, grad, part in zip(
            self._named, self._shapes, ordered, self._parts(flat), strict=True
        ):
            one = np.asarray(grad) if isinstance(grad, float | np.number) else grad
            array = as_array(one, f"{name}[{key}]")
            if array.shape != shape:
                raise ValueError(f"{name}[{key}] must have shape {shape}, got {array.shape}")
            if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
                raise TypeError(f"{name}[{key}] must be floating-point numbers, got {array.dtype}")
            part[...] = array.ravel()
        if not np.isfinite(flat).all():
            raise ValueError(f"{name} must be finite around params, got NaN or infinity")
        return flat

    def _denominator(self, optimizer: Any) -> Array:
        if not hasattr(optimizer, "_divisors"):
            raise TypeError(f"optimizer must be one of fusedstep's, got {type(optimizer).__name__}")
        held = {_place(as_array(p, "params")): found for p, found in optimizer._divisors()}
        for key, array in zip(self._named, self._arrays, strict=True):
            if array.size and _place(array) not in held:
                raise ValueError(f"optimizer must hold params[{key}], got one of other parameters")
            if array.size and held[_place(array)] is None:
                raise ValueError(
                    f"optimizer must have stepped params[{key}] with these hyperparameters, got no"
                    " such update"
                )
        flat = np.concatenate([held[_place(a)].ravel() for a in self._arrays if a.size])
        if not (flat > 0).all():
            raise ValueError(f"optimizer must divide by numbers > 0, got {flat.min()}")
        return flat


def _dense(hessian: _Hessian) -> Curvature:
    """From all columns of the Hessian; off by no more than what changes it (Weyl 1912)."""
    identity = np.eye(hessian.n)
    matrix = np.stack([hessian.times(column) for column in identity], -1)
    off = float(np.linalg.norm(matrix - matrix.T, 2) / 2)
    if not hessian._is_exact:
        doubled = np.stack([hessian.times(column, 2.0) for column in identity], -1)
        off += float(np.linalg.norm(matrix - doubled, 2))
    values = np.linalg.eigvalsh((matrix + matrix.T) / 2)
    off += hessian.noise(float(np.abs(values).max()))
    return Curvature(
        float(values[-1]), float(values[0]), off, off, hessian.products, hessian.method
    )


def _outermost(
    hessian: _Hessian, shift: float, tol: float, max_products: int, rng: np.random.Generator
) -> tuple[float, float]:
    """The eigenvalue farthest from `shift`, and its error.

    The other end of a spectrum lies farthest from the first; asked for by its size, an eigenvalue
    next to 0 would have to be found to a share of itself.
    """
    try:
        from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "curvature needs SciPy: pip install 'fusedstep[convergence]'", name="scipy"
        ) from error
    n, before = hessian.n, hessian.products
    start = rng.standard_normal(n)

    def times(v: Array) -> Array:
        if hessian.products - before >= max_products:
            raise _Exhausted
        product: Array = hessian.times(v) - shift * v.ravel()
        return product

    # ARPACK cannot tell a spectrum that is one value from its rounding. A vector that it is applied
    # to again and again turns towards any other value, and then it is no more than rounding.
    noise, moved = hessian.noise(shift), start
    for _ in range(min(_BASIS, max_products)):
        length = float(np.linalg.norm(moved))
        if length == 0:
            return shift, noise
        moved = times(moved / length)
        if np.linalg.norm(moved) > noise:
            break
    else:
        return shift, noise * math.sqrt(n)

    shifted = LinearOperator((n, n), matvec=times, dtype=np.float64)
    try:
        _, vectors = eigsh(
            shifted, k=1, which="LM", v0=start, tol=tol, ncv=min(n, _BASIS), maxiter=max_products
        )
    except (_Exhausted, ArpackError):  # ARPACK's own when all its rounds are over
        raise RuntimeError(
            f"curvature must converge within max_products={max_products}: allow more, or a larger"
            f" tol than {tol:g}"
        ) from None
    vector = vectors[:, 0] / np.linalg.norm(vectors[:, 0])
    product = hessian.times(vector)
    value = float(vector @ product)
    off = np.linalg.norm(product - value * vector)
    if not hessian._is_exact:
        off += np.linalg.norm(hessian.times(vector, 2.0) - product)
    return value, float(off) + hessian.noise(value)


class _Exhausted(Exception):
    """All products are taken."""


def _place(array: Any) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return array.ctypes.data, array.shape, array.strides


def _bounds(array: Any) -> tuple[int, int]:
    """The first byte of an array and the one after its last."""
    reaches = [stride * (n - 1) for stride, n in zip(array.strides, array.shape, strict=True)]
    begin = array.ctypes.data + sum(min(reach, 0) for reach in reaches)
    return begin, begin + sum(map(abs, reaches)) + array.itemsize


def _check_apart(arrays: dict[Any, Any]) -> None:
    """Raises ValueError where two arrays share memory: it would be moved twice."""
    open_: list[tuple[int, str, Any]] = []  # end, key and array of those that reach this far
    bounds = [(*_bounds(array), str(key), array) for key, array in arrays.items() if array.size]
    for begin, end, key, array in sorted(bounds, key=itemgetter(0)):
        open_ = [one for one in open_ if one[0] > begin]
        for _, other, earlier in open_:
            if np.shares_memory(earlier, array):
                raise ValueError(f"params[{key}] must not share memory with params[{other}]")
        open_.append((end, key, array))
