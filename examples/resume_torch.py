"""A torch run that may be stopped or killed at any moment: started again, it goes on with its bits.

python examples/resume_torch.py --path run.safetensors
"""

import argparse
import os
import signal

import torch

import fusedstep.torch as fst

N, BATCH = 256, 32
X = torch.randn(N, 8, generator=torch.Generator().manual_seed(0))
Y = X.sin().sum(1, keepdim=True)


def batch_of(step):
    """The batch of a step: each epoch's order follows from its number, so that none is saved."""
    epoch, k = divmod(step, N // BATCH)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(epoch))
    return order[k * BATCH : (k + 1) * BATCH]


def train(path, steps, every):
    """Trains to `steps`, from what is in the file on, and returns the model."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Dropout(0.1)]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(16, 1))
    opt = fst.AdamW(model.named_parameters(), lr=0.03, ema=0.99)
    sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    run = {"step": 0}
    parts = {
        "model": model,
        "optimizer": opt,
        "scheduler": sched,
        "rng": torch.default_generator,  # which dropout draws from
        "run": run,
    }

    if os.path.exists(path):
        fst.load(path, **parts)
    asked = []  # to stop, by who runs the machine
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    try:
        stop = False
        while run["step"] < steps and not stop:
            batch = batch_of(run["step"])
            opt.zero_grad()
            (model(X[batch]) - Y[batch]).square().mean().backward()
            opt.step()
            sched.step()
            run["step"] += 1
            stop = bool(asked)  # looked at once: what comes after it comes a step later
            if run["step"] % every == 0 or run["step"] == steps or stop:
                fst.save(path, **parts)
        return model
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", default="run.safetensors", help="of the file")
    parser.add_argument("--steps", type=int, default=400, help="of the whole run")
    parser.add_argument("--every", type=int, default=50, help="steps from save to save")
    options = parser.parse_args()
    model = train(options.path, options.steps, options.every).eval()
    error = (model(X) - Y).square().mean().item()
    print(f"mean squared error {error:.3f} after {fst.load(options.path).step} steps")
