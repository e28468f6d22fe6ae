"""What the scripts beside this one share: the inputs, the rates, and how a recording is written.

A script runs in an environment of its own, with the packages that its head names and without ours,
from the root of the repository: `python -m tests.golden.make.optax`.
"""

import json
import platform
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1]
KEPT = (1, 2, 5, 20)  # the steps after which the parameters are written down

# Up, then down by about a tenth a step; multiples of 1/1024, so that no float32 rounds one.
RATES = [
    k / 1024 for k in (12, 24, 32, 29, 26, 23, 21, 19, 17, 15, 14, 12, 11, 10, 9, 8, 7, 6, 6, 5)
]


def rates_for(optimizer):
    """The rates that move the parameters far enough for float32: Adadelta's is near 1."""
    return [32 * rate for rate in RATES] if optimizer.lower().startswith("adadelta") else RATES


def inputs(dtype):
    """The start, (12,), and the 20 gradients, (20, 12)."""
    read = json.loads((GOLDEN / "inputs.json").read_text())
    return np.array(read["start"], dtype), np.array(read["gradients"], dtype)


def lines(value):
    return json.dumps(value, separators=(", ", ": "))


class Recording:
    """The cases of one library, to be written to LIBRARY.json."""

    def __init__(self, library, version, backend=None):
        self.library = library
        self.head = {"library": library, "version": version, "python": platform.python_version()}
        if backend is not None:
            self.head["backend"] = backend
        self.head["made_by"] = f"tests/golden/make/{library}.py"
        self.cases = []

    def add(self, optimizer, arguments, rate, dtype, steps, rates=None, **more):
        """One case: `steps` gives the parameters after each update; `more` goes into the file."""
        rates = rates or rates_for(optimizer)
        steps = [np.array(step) for step in steps]
        assert len(steps) == len(rates) == 20
        assert all(step.dtype == dtype and step.shape == (12,) for step in steps), steps[0].dtype
        assert all(np.isfinite(step).all() for step in steps), (optimizer, arguments)
        case = {"optimizer": optimizer, "arguments": arguments, **more}
        case |= {"rate": rate, "dtype": str(np.dtype(dtype)), "rates": rates}
        case["after"] = {str(t): steps[t - 1].tolist() for t in KEPT}
        self.cases.append(case)

    def write(self):
        text = []
        for case in self.cases:
            first = {key: case[key] for key in case if key not in ("rates", "after")}
            after = ",\n".join(f'  "{t}": {lines(case["after"][t])}' for t in case["after"])
            text.append(
                f' {lines(first)[:-1]},\n  "rates": {lines(case["rates"])},\n'
                f'  "after": {{\n{after}}}}}'
            )
        path = GOLDEN / f"{self.library}.json"
        path.write_text(f'{lines(self.head)[:-1]}, "cases": [\n' + ",\n".join(text) + "\n]}\n")
        print(f"{path.name}: {len(self.cases)} cases, {path.stat().st_size} bytes")
