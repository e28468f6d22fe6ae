#!/usr/bin/env bash
# torch 2.13.0: bfloat16 parameters with float32 gradients step under some optimizers only, and their
# states have the dtype of whichever the code happened to start from.
#
# `Tensor.grad_dtype` allows gradients of another dtype than the parameter's. SGD, Adagrad, RMSprop,
# Adadelta, ASGD and Rprop take them; Adam, AdamW, Adamax, NAdam and RAdam raise in the first step,
# from `lerp_`, after they have raised the step count; every fused class raises. SGD's momentum buffer
# is then float32, a copy of the gradient, while the others' states are bfloat16, and Rprop has one of
# each. The error names neither the parameter nor the gradient.
#
# Seen, with foreach=False (True is the same):
#   SGD: momentum_buffer float32
#   Adagrad: sum bfloat16
#   RMSprop: square_avg bfloat16
#   Adadelta: square_avg bfloat16, acc_delta bfloat16
#   ASGD: ax bfloat16
#   Rprop: prev bfloat16, step_size float32
#   Adam AdamW Adamax NAdam RAdam: expected dtype c10::BFloat16 for `end` but got dtype float; step 1
#   fused SGD Adam AdamW Adagrad: expected scalar type BFloat16 but found Float
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch


def step(name, **options):
    """The dtypes of the states after a step, or the error and the count that it left behind."""
    param = torch.nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    param.grad_dtype = torch.float32
    momentum = {"momentum": 0.9} if name == "SGD" else {}
    opt = getattr(torch.optim, name)([param], lr=0.1, **momentum, **options)
    param.grad = torch.full((100,), 0.5)
    try:
        opt.step()
    except RuntimeError as error:
        return str(error).splitlines()[0], float(opt.state[param].get("step", 0))
    arrays = {k: str(v.dtype)[6:] for k, v in opt.state[param].items() if v.ndim}
    return arrays


print("torch", torch.__version__)
taken = {
    "SGD": {"momentum_buffer": "float32"},
    "Adagrad": {"sum": "bfloat16"},
    "RMSprop": {"square_avg": "bfloat16"},
    "Adadelta": {"square_avg": "bfloat16", "acc_delta": "bfloat16"},
    "ASGD": {"ax": "bfloat16"},
    "Rprop": {"prev": "bfloat16", "step_size": "float32"},
}
for how in ({"foreach": False}, {"foreach": True}):
    for name, states in taken.items():
        found = step(name, **how)
        print(name, how, found)
        assert found == states, f"{name}: torch has changed"
    for name in ("Adam", "AdamW", "Adamax", "NAdam", "RAdam"):
        found = step(name, **how)
        print(name, how, found)
        assert "for `end` but got dtype float" in found[0], f"{name}: torch has changed"
        assert found[1] == 1, "the step that raised was counted"
for name in ("SGD", "Adam", "AdamW", "Adagrad"):
    found = step(name, fused=True)
    print(name, "fused", found)
    assert "expected scalar type BFloat16 but found Float" in found[0], "torch has changed"
PYTHON
