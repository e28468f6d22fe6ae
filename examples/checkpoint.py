"""fusedstep with torch.distributed.checkpoint: save on two ranks, load afresh, and go on.

python examples/checkpoint.py
"""

import argparse
import tempfile

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from two_processes import RANKS, new_model, new_optimizer, report, start, train


def begin(seed):
    model = fully_shard(new_model(seed), mesh=init_device_mesh("cpu", (RANKS,)))
    return model, new_optimizer(model)


def worker(rank, steps, folder):
    model, opt = begin(seed=0)
    train(model, opt, range(steps), rank)
    weights, states = get_state_dict(model, opt)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder)

    model, opt = begin(seed=1)  # other weights, no states
    weights, states = get_state_dict(model, opt)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=folder)
    set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=states)
    train(model, opt, range(steps, 2 * steps), rank)
    params = [param.full_tensor() for param in model.parameters()]
    report("saved, loaded and resumed", params, 2 * steps)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=25, help="before saving, and again after")
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        start(worker, steps, folder)
