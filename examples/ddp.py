"""fusedstep under DistributedDataParallel: nothing changes but the import.

python examples/ddp.py
"""

import argparse

from torch.nn.parallel import DistributedDataParallel

from two_processes import new_model, new_optimizer, report, start, train


def worker(rank, steps):
    for bucket_view in (False, True):  # True: gradients are views of what is all-reduced
        model = DistributedDataParallel(new_model(), gradient_as_bucket_view=bucket_view)
        opt = new_optimizer(model)
        train(model, opt, range(steps), rank)
        report(f"DDP, gradient_as_bucket_view={bucket_view}", model.parameters(), steps)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    start(worker, parser.parse_args().steps)
