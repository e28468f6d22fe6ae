"""Other libraries' optimizers by their own names, arguments and defaults, as optimizers of ours.

`fs.conventions.keras.Adam(params, learning_rate=1e-3, beta_1=0.9)` returns an ordinary `Adam` whose
steps are those of Keras' Adam. The same name is a different equation in each library; what
differs is an option of our classes (`eps_hat`, `eps_root`, `lr_in_momentum`, ...), which these
functions set, and which the optimizer's state_dict keeps. docs/conventions.md has the table.

Example:
    >>> import numpy as np, fusedstep as fs
    >>> w = np.array([1.0, 2.0], np.float32)
    >>> opt = fs.conventions.keras.RMSprop(w, learning_rate=0.5, rho=0.75, epsilon=0.0)
    >>> opt.step(np.array([4.0, -0.5], np.float32)).step
    1
    >>> w
    array([0., 3.], dtype=float32)
    >>> opt.param_groups[0]["lr_in_momentum"]
    True
"""

from typing import Any

from fusedstep.conventions import (
    bitsandbytes,
    deepspeed,
    keras,
    mlx,
    onnx,
    onnxruntime,
    optax,
    paddle,
    sklearn,
    tf1,
    tinygrad,
)
from fusedstep.conventions._convention import Convention, Ours

__all__ = [
    "Convention",
    "Ours",
    "bitsandbytes",
    "deepspeed",
    "keras",
    "mlx",
    "onnx",
    "onnxruntime",
    "optax",
    "paddle",
    "sklearn",
    "tf1",
    "tinygrad",
]


for _name in __all__[2:]:  # of each library, what its module defines and not what it imports
    _module: Any = globals()[_name]
    _module.__all__ = sorted(name for name, one in vars(_module).items() if hasattr(one, "ours"))
    _module.__dir__ = _module.__all__.copy


def __dir__() -> list[str]:
    return sorted(__all__)
