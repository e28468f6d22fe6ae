"""fusedstep under DistributedDataParallel: nothing to change but the import.

python examples/ddp.py
"""

import argparse

from torch.nn.parallel import DistributedDataParallel

from two_processes import new_model, new_optimizer, report, start, train


def worker(rank, steps, bucket_view):
    model = DistributedDataParallel(new_model(), gradient_as_bucket_view=bucket_view)
    opt = new_optimizer(model)
    train(model, opt, range(steps), rank)
    report(f"DDP, gradient_as_bucket_view={bucket_view}", model.parameters(), range(steps))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    for bucket_view in (False, True):
        start(worker, args.steps, bucket_view)
