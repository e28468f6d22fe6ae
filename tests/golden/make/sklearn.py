"""Records scikit-learn: the optimizers inside its multi-layer perceptrons.

Needs scikit-learn==1.9.1 numpy==2.4.6. Run from the root of the repository:
python -m tests.golden.make.sklearn

They are private, and have no schedule but their own: the rate is set between steps.
"""

from itertools import product

import sklearn
from sklearn.neural_network import _stochastic_optimizers

from .recording import RATES, Recording, inputs

ADAM = {"beta_1": 0.8, "beta_2": 0.9, "epsilon": 1e-2}
CASES = [
    ("SGDOptimizer", {"momentum": 0.8, "nesterov": False}),
    ("SGDOptimizer", {"momentum": 0.8, "nesterov": True}),
    ("SGDOptimizer", {"momentum": 0.0, "nesterov": False}),
    ("AdamOptimizer", ADAM),
]


def steps(optimizer, arguments, dtype):
    start, gradients = inputs(dtype)
    kind = getattr(_stochastic_optimizers, optimizer)
    rule = kind([start], learning_rate_init=RATES[0], **arguments)
    for rate, gradient in zip(RATES, gradients, strict=True):
        rule.learning_rate = rule.learning_rate_init = rate  # SGD reads one, Adam the other
        rule.update_params([start], [gradient])
        yield start.copy()


recording = Recording("sklearn", sklearn.__version__)
for (optimizer, arguments), dtype in product(CASES, ("float32", "float64")):
    taken = steps(optimizer, arguments, dtype)
    recording.add(optimizer, arguments, "learning_rate_init", dtype, taken)
recording.write()
