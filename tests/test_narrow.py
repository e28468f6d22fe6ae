"""Parameters of 16 bits without float32 masters, narrow states, and their way in and out."""

from __future__ import annotations

import numpy as np
import pytest

from fusedstep import _storage
from fusedstep._storage import Stored
from fusedstep.optimizers import AdamW

RNG = np.random.default_rng(6)
VALUES = (RNG.standard_normal(1000) * 10.0 ** RNG.integers(-3, 3, 1000)).astype(np.float32)


@pytest.mark.parametrize("name", ["split", "kahan", "bfloat16", "q8"])
def test_conversions_are_exact_where_they_can_be(name):
    pytest.importorskip("ml_dtypes")
    kept = _storage.Kept(name, beside="" if name == "bfloat16" else "b")
    array = np.zeros(VALUES.shape, _storage.as_dtype(kept.dtype) if name != "q8" else np.uint8)
    beside = np.zeros(kept.beside_shape(VALUES.shape), kept.beside_dtype) if kept.beside else None
    there = Stored(array, name, beside)
    _storage.convert(Stored(VALUES, "float32"), there)
    back = _storage.decoded(there)
    np.testing.assert_allclose(
        back, VALUES, rtol={"split": 0, "kahan": 2**-16, "bfloat16": 2**-8, "q8": 2**-3}[name]
    )
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
