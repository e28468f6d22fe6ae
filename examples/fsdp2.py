"""fusedstep on FSDP2: parameters are DTensors, each rank steps its own shards.

python examples/fsdp2.py
"""

import argparse

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from two_processes import RANKS, new_model, new_optimizer, report, say, start, train


def worker(rank, steps):
    model = new_model()
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    opt = new_optimizer(model)
    train(model, opt, range(steps), rank)
    # The last layer has one output: nothing of it is left for rank 1.
    shards = [tuple(param.to_local().shape) for param in model.parameters()]
    say(f"rank {rank} steps shards of {shards}")
    report("FSDP2", [param.full_tensor() for param in model.parameters()], steps)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    start(worker, parser.parse_args().steps)
