"""A NumPy run that may be stopped or killed at any moment: started again, it goes on with its bits.

python examples/resume_numpy.py --path run.safetensors
"""

import argparse
import os
import signal

import numpy as np

import fusedstep as fs


def gradients(params, grads, rng):
    """Of the squared error of a line through a random batch."""
    x = rng.standard_normal((64, 8), dtype=np.float32)
    error = x @ params["w"] + params["b"] - (x @ np.arange(1, 9, dtype=np.float32) - 3)
    grads["w"] = x.T @ error / len(x)
    grads["b"] = error.mean()
    return float(error @ error) / len(x)


def train(path, steps, every):
    """Trains to `steps`, from what is in the file on, and returns the parameters."""
    params = fs.FlatBuffer.pack({"w": np.zeros(8, np.float32), "b": np.zeros(1, np.float32)})
    grads = params.zeros_like()
    opt = fs.AdamW(params, lr=fs.schedules.Cosine(0.3, total=steps).warmup(10))
    rng = np.random.default_rng(0)
    losses = []

    if os.path.exists(path):
        saved = fs.load(path, params=params, optimizer=opt, rng=rng)
        losses = saved["losses"]  # a list grows, so that it is taken, not filled
    asked = []  # to stop, by who runs the machine
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    try:
        stop = False
        while opt.steps < steps and not stop:
            losses.append(gradients(params, grads, rng))
            opt.step(grads, ema=0.9)
            stop = bool(asked)  # looked at once: what comes after it comes a step later
            if opt.steps % every == 0 or opt.steps == steps or stop:
                fs.save(path, params=params, optimizer=opt, rng=rng, losses=losses)
        return params
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", default="run.safetensors", help="of the file")
    parser.add_argument("--steps", type=int, default=500, help="of the whole run")
    parser.add_argument("--every", type=int, default=50, help="steps from save to save")
    options = parser.parse_args()
    params = train(options.path, options.steps, options.every)
    print(params["w"].round(2), params["b"].round(2), "after", fs.load(options.path).step)
