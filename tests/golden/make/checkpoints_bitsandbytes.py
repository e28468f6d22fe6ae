"""Records bitsandbytes' optimizers half way on the CPU, in files of torch.save.

Needs bitsandbytes==0.50.2 torch==2.13.0 numpy==2.4.6. Run from the root of the repository:
python -m tests.golden.make.checkpoints_bitsandbytes

A run with states of 8 bits rounds them at every step. `blocks.pt` has one of several blocks, and
beside it what the library itself reads in them.
"""

import os
from importlib.metadata import version

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # nothing to compile for ten elements
import bitsandbytes
import torch

from . import halfway

ADAM = {"betas": (0.8, 0.9), "eps": 1e-2}
DECAY = {"weight_decay": 0.1}
CASES = [
    ("SGD", {"momentum": 0.8, **DECAY}),
    ("RMSprop", {"alpha": 0.8, "eps": 1e-2, **DECAY}),
    ("Adagrad", {"eps": 1e-2, **DECAY}),
    ("Adam", {**ADAM, **DECAY}),
    ("PagedAdamW32bit", {**ADAM, **DECAY}),
    ("Lion", {"betas": (0.8, 0.9), **DECAY}),
]
NARROW = [  # of 8 bits, however few the elements
    ("AdamW8bit", {**ADAM, **DECAY, "min_8bit_size": 1}),
    ("SGD8bit", {"momentum": 0.8, **DECAY, "min_8bit_size": 1}),
]


def save(name, **content):
    folder = halfway.FOLDER / "bitsandbytes"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / f"{name}.pt")
    return {"file": f"{name}.pt"}


def record(name, arguments):
    params = {key: torch.nn.Parameter(torch.tensor(p)) for key, p in halfway.start().items()}
    kind = getattr(bitsandbytes.optim, name)
    opt = kind(params.values(), lr=halfway.rate(0), **arguments)

    def step(t):
        for key, g in halfway.gradients(t).items():
            params[key].grad = torch.tensor(g)
        opt.param_groups[0]["lr"] = halfway.rate(t)
        opt.step()

    case = halfway.run(
        step,
        lambda: {k: p.detach().numpy() for k, p in params.items()},
        lambda: save(name, optimizer=opt.state_dict()),
    )
    return {"optimizer": name, "arguments": arguments, "rates": halfway.rates(), **case}


def blocks():
    """The states of (3, 200) elements after three steps, and the library's own reading of them."""
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.zeros(3, 200))
    opt = bitsandbytes.optim.AdamW8bit([param], min_8bit_size=1)
    for _ in range(3):
        param.grad = torch.randn(3, 200) * 10.0 ** torch.empty(3, 200).uniform_(-4, 0)
        opt.step()
    held = opt.state[param]
    read = {
        key: bitsandbytes.functional.dequantize_blockwise(
            held[f"state{k}"], absmax=held[f"absmax{k}"], code=held[f"qmap{k}"], blocksize=256
        )
        for k, key in ((1, "exp_avg"), (2, "exp_avg_sq"))
    }
    save("blocks", optimizer=opt.state_dict(), **read)


if __name__ == "__main__":
    blocks()
    narrow = [record(*case) for case in NARROW]
    cases = [record(*case) for case in CASES]
    halfway.write("bitsandbytes", version("bitsandbytes"), cases, narrow=narrow)
