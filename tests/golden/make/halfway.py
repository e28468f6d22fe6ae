"""What the scripts that record checkpoints share: parameters, gradients and rates, and the files.

A run takes 20 steps, and its checkpoint is taken after 10. A case of `halfway.json` has what the
other half needs: the parameters then, the 10 gradients and rates that are left, and the library's
own end.
"""

import json
import pathlib

import numpy as np

STEPS, HALF = 20, 10
SHAPES = {"w": (2, 3), "b": (4,)}
FOLDER = pathlib.Path(__file__).parents[1] / "checkpoints"


def start():
    """The parameters that a run begins with, by name."""
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def gradients(t):
    """The gradients of step t, of scales from 1e-3 to 1, some of them 0."""
    rng = np.random.default_rng(100 + t)
    found = {}
    for name, shape in SHAPES.items():
        values = rng.normal(size=shape) * 10.0 ** rng.uniform(-3, 0, size=shape)
        found[name] = np.where(rng.random(shape) < 0.1, 0, values).astype(np.float32)
    return found


def rate(t):
    """The rate of step t, which changes from step to step."""
    return float(np.float32(0.02 * (1 + 0.5 * np.cos(t))))


def rates(changes=True):
    """The rates of the second half."""
    return [rate(t if changes else 0) for t in range(HALF, STEPS)]


def plain(arrays):
    """Arrays by name as JSON has them; floats by the shortest text of their own type."""
    return {
        name: [x.item() if isinstance(x, np.integer) else float(str(x)) for x in np.ravel(one)]
        for name, one in arrays.items()
    }


def stored(arrays):
    """A library's arrays by name, whole: of what dtype and shape, and their values."""
    found = {name: np.asarray(one) for name, one in arrays.items()}
    flat = plain(found)
    return {name: [one.dtype.name, one.shape, flat[name]] for name, one in found.items()}


def run(step, read, save):
    """Takes both halves: `step(t)`, with `save()` in the middle; `read()` gives the parameters."""
    for t in range(HALF):
        step(t)
    half, checkpoint = plain(read()), save()
    for t in range(HALF, STEPS):
        step(t)
    return {"half": half, "end": plain(read()), **checkpoint}


def write(library, version, cases, **more):
    """The file of a library's cases."""
    folder = FOLDER / library
    folder.mkdir(parents=True, exist_ok=True)
    head = {"library": library, "version": version, "shapes": SHAPES, **more}
    head["gradients"] = [plain(gradients(t)) for t in range(HALF, STEPS)]
    lines = ",\n".join(json.dumps(case) for case in cases)
    body = json.dumps(head)[:-1]
    (folder / "halfway.json").write_text(f'{body}, "cases": [\n{lines}\n]}}\n')
