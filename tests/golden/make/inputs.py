"""Makes tests/golden/inputs.json: where all recordings start, and their 20 gradients.

Needs numpy==2.4.6. Run from the root of the repository: python -m tests.golden.make.inputs
"""

import numpy as np

from .recording import GOLDEN, lines

rng = np.random.default_rng(17)
n, steps = 12, 20
start = rng.integers(-16, 17, n) / 8
start[4] = 0.0

# Scales from 1e-3 to 1, one per element; multiples of 2**-16, which float32 has.
scale = rng.permutation(np.geomspace(2e-3, 1.0, n))
sign = rng.choice([-1.0, 1.0], (steps, n))
sign[:, 0], sign[:, 1], sign[::2, 2], sign[1::2, 2] = 1.0, -1.0, 1.0, -1.0
gradients = np.round(sign * scale * rng.uniform(0.25, 1.0, (steps, n)) * 2**16) / 2**16

# Zeros: always, at first, for a while, and here and there.
gradients[:, 3] = gradients[:3, 5] = gradients[6:12, 7] = 0.0
gradients[:, 8:][rng.random((steps, 4)) < 0.15] = 0.0
assert all(np.array_equal(x, x.astype(np.float32)) for x in (start, gradients))

rows = ",\n".join(f"  {lines(row)}" for row in (gradients + 0.0).tolist())
text = f'{{"n": {n},\n "start": {lines((start + 0.0).tolist())},\n "gradients": [\n{rows}]}}\n'
(GOLDEN / "inputs.json").write_text(text)
