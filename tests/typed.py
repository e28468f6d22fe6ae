"""What type checkers take, and what they refuse: a comment that ignores nothing is an error.

Checked by `nox -s types`, never run.
"""

from typing import assert_type

import numpy as np
import torch

import fusedstep as fs
import fusedstep.torch as ft
from fusedstep import AdmaW  # type: ignore[attr-defined]  # noqa: F401
from fusedstep.torch import AdaamW  # type: ignore[attr-defined]  # noqa: F401

w, g = np.ones(3, np.float32), np.ones(3, np.float32)
model = torch.nn.Linear(2, 2)

opt = ft.AdamW(model.parameters(), lr=3, rounding="stochastic", eps_root=1e-8, foreach=True)
assert_type(opt, ft.AdamW)
ft.AdamW(model.parameters(), learning_rate=3)  # type: ignore[call-arg]
ft.AdamW(model.parameters(), ema_dtype=3)  # type: ignore[arg-type]
ft.SGD([("w", torch.ones(3))], 0.1, 0.9).lookahead()
assert_type(fs.torch.Lion(model.parameters()), ft.Lion)
ft.AdamW(model.parameters(), rounding="up")  # type: ignore[arg-type]
ft.AdamW(model.parameters(), state_dtype={"exp_avg": "bf16"})  # type: ignore[dict-item]
opt.step(lambda: torch.ones(()), max_norm=1.0, norms=True, ema=lambda t: 0.9, shadow=[None, None])
opt.step(max_nrom=1.0)  # type: ignore[call-arg]
opt.step(skip_nonfinite="yes")  # type: ignore[arg-type]
opt.step(g)  # type: ignore[arg-type]

assert_type(fs.AdamW(w).step(g), fs.StepReport)
fs.SGD([w, torch.ones(3)], lr=lambda t: 0.1 / (t + 1)).step([g, None])
fs.SGD(one for one in [w]).step(g)
fs.SGD({"layers": [{"w": w}], "b": w}).step({"layers": [{"w": g}], "b": None})
fs.SGD(fs.FlatBuffer.pack({"w": w})).step(fs.FlatBuffer.pack({"w": g}))
fs.SGD(np.ones((), np.float32)).step(0.5)
fs.AdmaW(w)  # type: ignore[attr-defined]
fs.FlatBuffer.over(w, [(3,)])
fs.FlatBuffer.over(w, {"w": 3})
fs.FlatBuffer.over(w)  # type: ignore[call-overload]
fs.SGD("hello")  # type: ignore[arg-type]
fs.SGD(3)  # type: ignore[arg-type]
fs.SGD(["w"])  # type: ignore[arg-type]
fs.SGD({"w": "w"})  # type: ignore[arg-type]
fs.SGD(w, learning_rate=3)  # type: ignore[call-arg]
fs.SGD(w).step("g")  # type: ignore[arg-type]
fs.Adam(w, groups=[fs.Group(["b*", "norm"], weight_decay=0.0, lr=lambda t: 0.1, betas=(0.8, 0.9))])
fs.Group("b*", weight_dekay=0.0)  # type: ignore[call-arg]
fs.Group("b*", lr="0.1")  # type: ignore[arg-type]
fs.Adam(w, rounding="kahan", state_dtype="q8", state_rounding="nearest", ema_dtype="parameter")
fs.Adam(w, state_dtype={"exp_avg": "bfloat16", "exp_avg_sq": None})
fs.Adam(w, rounding="even")  # type: ignore[arg-type]
fs.Adam(w, state_dtype="int8")  # type: ignore[arg-type]
fs.Adam(w, state_dtype={"exp_avg": "int8"})  # type: ignore[dict-item]
fs.Adam(w, state_rounding="kahan")  # type: ignore[arg-type]
fs.Adam(w, ema_dtype="float16")  # type: ignore[arg-type]
fs.SGD(w, lr="3")  # type: ignore[arg-type]
assert_type(fs.conventions.keras.Adam(w, learning_rate=0.1), fs.Optimizer)
fs.conventions.keras.Adam(w, 0.1, groups=[fs.Group("b*", lr=0.1)], state_dtype="q8", name="Adam")
fs.conventions.keras.Adam(w, beta_3=0.1)  # type: ignore[call-arg]
fs.conventions.keras.Adam(w, rounding="even")  # type: ignore[arg-type]
assert_type(fs.conventions.optax.adamw.torch(model.parameters(), 0.1, ema=0.9), ft.Optimizer)
fs.conventions.optax.adamw.torch(model.parameters(), 0.1, b3=0.9)  # type: ignore[call-arg]
