"""fusedstep as the optimizer class of ZeroRedundancyOptimizer: the ranks divide the states.

python examples/zero.py
"""

import argparse

from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from fusedstep.torch import AdamW
from two_processes import new_model, report, say, start, train


def worker(rank, steps):
    model = DistributedDataParallel(new_model())
    opt = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=AdamW, lr=0.01, weight_decay=0.1
    )
    train(model, opt, range(steps), rank)
    kept = sum(state["exp_avg"].numel() for state in opt.optim.state.values())
    total = sum(param.numel() for param in model.parameters())
    say(f"rank {rank} keeps states of {kept} of {total} parameters")
    report("ZeroRedundancyOptimizer", model.parameters(), steps)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    start(worker, parser.parse_args().steps)
