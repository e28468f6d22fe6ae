"""Records DeepSpeed's ZeRO half way, on the CPU: the folder that each group of processes writes.

Needs deepspeed==0.19.8 torch==2.13.0 ninja numpy==2.4.6 and a C++ compiler. Run from the root of
the repository: DS_ACCELERATOR=cpu python -m tests.golden.make.checkpoints_deepspeed
"""

import os
import shutil
import socket

import torch
import torch.multiprocessing

from . import halfway

ADAM = {"betas": [0.8, 0.9], "eps": 1e-2, "weight_decay": 0.1}
BF16 = {"bf16": {"enabled": True}}
WIDE = {"data_types": {"grad_accum_dtype": "fp32"}}  # DeepSpeed's other optimizer for ZeRO 1
# A folder's name, the processes, the optimizer, its arguments, and DeepSpeed's configuration. Names
# with "of" are ZeRO's stage and the processes. Two groups where there is weight decay; the second,
# of 4 elements, leaves the last of three processes nothing but padding.
CASES = [
    ("zero0of1", 1, "AdamW", ADAM, {}),
    ("zero0bf16", 1, "AdamW", ADAM, BF16),
    ("zero1of1", 1, "AdamW", {**ADAM, "amsgrad": True}, {}),
    ("zero1of2", 2, "SGD", {"momentum": 0.8, "dampening": 0.3}, {**BF16, **WIDE}),
    ("zero2of2", 2, "configured", {**ADAM, "adam_w_mode": False}, BF16),
    ("zero2of3", 3, "DeepSpeedCPUAdam", ADAM, {"gradient_clipping": 0.5}),
    ("zero1of3", 3, "Adagrad", {"lr_decay": 0.1, "eps": 1e-2}, {}),
]


class Model(torch.nn.Module):
    """The parameters, whose gradients a product with constants gives."""

    def __init__(self):
        super().__init__()
        for name, values in halfway.start().items():
            setattr(self, name, torch.nn.Parameter(torch.tensor(values)))

    def forward(self, grads):
        return sum((p * grads[name].to(p.dtype)).sum() for name, p in self.named_parameters())


def joined(rank, port, world):
    """The library in one process of those that train together."""
    import deepspeed

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    return deepspeed


def dealt(rank, port, name):
    """Parameters p1 to p5 of n elements n, dealt to two ranks, after one step of gradients n."""
    deepspeed = joined(rank, port, 2)
    model = torch.nn.ParameterDict({f"p{n}": torch.full((n,), float(n)) for n in range(1, 6)})
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": 2, "round_robin_gradients": True},
        },
    )
    engine.backward(sum((p * p).sum() for p in model.values()) / 2)
    engine.step()
    engine.save_checkpoint(str(halfway.FOLDER / "deepspeed" / name), tag="step")


def work(rank, port, name, world, optimizer, arguments, more, out):
    """One process of those that train together."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.utils import safe_get_full_fp32_param

    deepspeed = joined(rank, port, world)
    model, stage = Model(), int(name[4])
    groups = [{"params": [model.w]}, {"params": [model.b], "weight_decay": 0.0}]
    groups = groups if "weight_decay" in arguments else [{"params": [model.w, model.b]}]
    arguments = {"lr": halfway.rate(0), **arguments}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, **more}
    config["zero_optimization"] = {"stage": stage}
    given = {"model_parameters": groups}
    if optimizer == "configured":
        config["optimizer"] = {"type": "Adam", "params": arguments}
    else:
        kind = getattr(torch.optim, optimizer, DeepSpeedCPUAdam)
        given = {"optimizer": kind(groups, **arguments)}
    engine, opt, _, _ = deepspeed.initialize(model=model, config=config, **given)

    def step(t):
        grads = {key: torch.tensor(g) for key, g in halfway.gradients(t).items()}
        engine.backward(engine(grads))
        for group in opt.param_groups:
            group["lr"] = halfway.rate(t)
        engine.step()

    def save():
        engine.save_checkpoint(str(halfway.FOLDER / "deepspeed" / name), tag="step")
        # Without ZeRO, bfloat16 has one update more: findings/step_before_the_first.sh.
        return {"file": name, "step": 11 if name == "zero0bf16" else 10}

    def read():
        if stage:
            found = [safe_get_full_fp32_param(p) for p in model.parameters()]
        else:  # in float32 the model's, in bfloat16 those beside it
            found = [p.detach() for group in opt.param_groups for p in group["params"]]
        return {key: p.numpy() for key, p in zip(halfway.SHAPES, found, strict=True)}

    case = halfway.run(step, read, save)
    if rank == 0:
        out.put(case)


def spawn(name, world, function, *more):
    """Runs the processes that write a folder."""
    folder = halfway.FOLDER / "deepspeed" / name
    shutil.rmtree(folder, ignore_errors=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(function, (port, name, *more), nprocs=world)
    for script in folder.glob("zero_to_*.py"):  # which DeepSpeed copies into each folder
        script.unlink()


def record(name, world, optimizer, arguments, more):
    out = torch.multiprocessing.get_context("spawn").SimpleQueue()
    spawn(name, world, work, world, optimizer, arguments, more, out)
    head = {"optimizer": optimizer, "arguments": arguments, "config": more}
    return {**head, "rates": halfway.rates(), **out.get()}


if __name__ == "__main__":
    from importlib.metadata import version

    spawn("dealt2of2", 2, dealt)
    halfway.write("deepspeed", version("deepspeed"), [record(*case) for case in CASES])
