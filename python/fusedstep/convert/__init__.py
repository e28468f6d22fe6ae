"""Optimizer states of other libraries, as state_dicts of ours and back.

Each `from_` function reads what a library keeps of an optimizer and returns a state_dict that the
class of ours takes, with the options in it by which the run goes on with that library's equation:

    state = fs.convert.from_keras("model.keras", {"w": w, "b": b})
    opt = fs.AdamW({"w": w, "b": b})
    opt.load_state_dict(state)

What does not fit is refused with what was expected and what was found. See docs/converting.md.
"""

from fusedstep.convert._common import Converted
from fusedstep.convert.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from fusedstep.convert.deepspeed import from_deepspeed
from fusedstep.convert.keras import from_keras, to_keras
from fusedstep.convert.mlx import from_mlx, to_mlx
from fusedstep.convert.optax import from_optax, to_optax
from fusedstep.convert.paddle import from_paddle, to_paddle
from fusedstep.convert.tinygrad import from_tinygrad, to_tinygrad
from fusedstep.convert.torch import from_torch, to_torch

__all__ = [
    "Converted",
    "from_bitsandbytes",
    "from_deepspeed",
    "from_keras",
    "from_mlx",
    "from_optax",
    "from_paddle",
    "from_tinygrad",
    "from_torch",
    "to_bitsandbytes",
    "to_keras",
    "to_mlx",
    "to_optax",
    "to_paddle",
    "to_tinygrad",
    "to_torch",
]


def __dir__() -> list[str]:
    return sorted(__all__)
