"""Records torch.optim's optimizers half way, in files of torch.save.

Needs torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
Run from the root: python -m tests.golden.make.checkpoints_torch
"""

import torch

from . import halfway

ADAM = {"betas": (0.8, 0.9), "eps": 1e-2, "weight_decay": 0.1}
CASES = [
    ("SGD", {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1}),
    ("RMSprop", {"alpha": 0.8, "eps": 1e-2, "momentum": 0.7, "centered": True, "foreach": True}),
    ("AdamW", {**ADAM, "fused": True, "amsgrad": True}),
    ("NAdam", {**ADAM, "momentum_decay": 0.02, "decoupled_weight_decay": True}),
]


def record(name, arguments):
    params = {key: torch.nn.Parameter(torch.tensor(p)) for key, p in halfway.start().items()}
    opt = getattr(torch.optim, name)(params.items(), lr=halfway.rate(0), **arguments)

    def step(t):
        for key, g in halfway.gradients(t).items():
            params[key].grad = torch.tensor(g)
        opt.param_groups[0]["lr"] = halfway.rate(t)
        opt.step()

    def save():
        path = halfway.FOLDER / "torch" / f"{name}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"optimizer": opt.state_dict(), "epoch": 3}, path)
        return {"file": path.name}

    case = halfway.run(step, lambda: {k: p.detach().numpy() for k, p in params.items()}, save)
    return {"optimizer": name, "arguments": arguments, "rates": halfway.rates(), **case}


if __name__ == "__main__":
    halfway.write("torch", torch.__version__, [record(*case) for case in CASES])
