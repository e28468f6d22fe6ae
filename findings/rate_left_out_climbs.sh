#!/usr/bin/env bash
# optax 0.2.8: Adadelta climbs where its learning rate is left out.
#
# optax.adadelta's learning_rate is optional, as Zeiler's paper has none. The minus of the descent is
# in scale_by_learning_rate alone, which is the identity where the rate is None: "None means no
# scaling", but then there is no minus either, which the update in adadelta's documentation has. The
# updates of optax.adadelta() are those of optax.adadelta(1.0) with the other sign: the loss rises,
# slowly at first, at every step, and nothing warns. Two other optimizers may be given no rate,
# adafactor and lbfgs; they put the minus there themselves, and go down.
#
# Seen (x**2 from 1; adafactor and lbfgs after one step, lbfgs without its line search):
#   rate may be left out: adadelta adafactor lbfgs
#   adadelta(1.0)  100 steps: 0.424   1000 steps: 0
#   adadelta()     100 steps: 2.17    1000 steps: 2.68e+03
#   adafactor()      1 step:  0
#   lbfgs()          1 step:  0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check optax==0.2.8 jax==0.10.2 numpy
export JAX_PLATFORMS=cpu
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import inspect

import jax.numpy as jnp
import optax


def losses(rule, steps):
    """x**2 before each step along the rule's updates, and after the last."""
    x = jnp.ones(1)
    state = rule.init(x)
    yield float(x[0] ** 2)
    for _ in range(steps):
        update, state = rule.update(2 * x, state, x)
        x = optax.apply_updates(x, update)
        yield float(x[0] ** 2)


def is_optional(one):
    named = inspect.signature(one).parameters if inspect.isfunction(one) else {}
    rate = named.get("learning_rate")
    return rate is not None and rate.default is None


print("optax", optax.__version__)
names = [name for name in dir(optax) if is_optional(getattr(optax, name))]
names.remove("scale_by_learning_rate")  # the part of all
print("rate may be left out:", *names)
assert names == ["adadelta", "adafactor", "lbfgs"], "optax has changed"

given, left_out = (list(losses(rule, 1000)) for rule in (optax.adadelta(1.0), optax.adadelta()))
for label, run in (("adadelta(1.0)", given), ("adadelta()", left_out)):
    print(f"{label:14} 100 steps: {run[100]:<7.3g} 1000 steps: {run[1000]:.3g}")
assert given[100] < 0.5 and given[1000] < 1e-20
assert all(b > a for a, b in zip(left_out, left_out[1:])), "optax has changed"

first = [optax.adadelta(*rate) for rate in ((1.0,), ())]
first = [rule.update(jnp.ones(1), rule.init(jnp.ones(1)), jnp.ones(1))[0] for rule in first]
assert first[0] == -first[1] < 0, "optax has changed"

for label, rule in (("adafactor()", optax.adafactor()), ("lbfgs()", optax.lbfgs(linesearch=None))):
    run = list(losses(rule, 1))
    print(f"{label:14}   1 step:  {run[1]:.3g}")
    assert run[1] < run[0]
PYTHON
