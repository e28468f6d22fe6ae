#!/usr/bin/env bash
# jax 0.10.2, optax 0.2.8: on the CPU a jitted, donated step is several loops, which read again
# what one loop would read once.
#
# XLA's CPU backend makes no loop that writes two arrays, so that each moment has a loop of its
# own, which reads the gradient, and the parameters one more, which reads the moments that were
# just written (in nadam the gradient too, for the third time). lion needs its old momentum twice,
# so that XLA, to write over it, first copies all of it; adadelta keeps two arrays between its
# loops; clip_by_global_norm writes a scaled copy of all gradients, and the next loops read it and
# them.
#
# Seen (in the compiled text; bytes for each parameter, of which one sweep that reads and writes
# each array once needs the last number; clipping reads the gradient once more, for its norm):
#   sgd with momentum: 2 loops, the gradient read by 1, 24 bytes moved, 20 needed
#   rmsprop: 2 loops, the gradient read by 2, 28 bytes moved, 20 needed
#   adagrad: 2 loops, the gradient read by 2, 28 bytes moved, 20 needed
#   lion: 3 loops, the gradient read by 2, 36 bytes moved, 20 needed, with a copy of a whole array
#   adam: 3 loops, the gradient read by 2, 40 bytes moved, 28 needed
#   adamw: 3 loops, the gradient read by 2, 40 bytes moved, 28 needed
#   nadam: 3 loops, the gradient read by 3, 44 bytes moved, 28 needed
#   adamax: 3 loops, the gradient read by 2, 40 bytes moved, 28 needed
#   amsgrad: 4 loops, the gradient read by 2, 52 bytes moved, 36 needed
#   adadelta: 5 loops, the gradient read by 3, 68 bytes moved, 28 needed
#   clip_by_global_norm, adamw: 5 loops, the gradient read by 4, 60 bytes moved, 32 needed
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 optax==0.2.8 numpy
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import re

import jax
import optax

PARAM = jax.ShapeDtypeStruct((1 << 20,), "float32")
RULES = {  # what one sweep needs, and what was seen: loops, those that read the gradient, bytes
    "sgd with momentum": (optax.sgd(1e-3, 0.9), 20, (2, 1, 24)),
    "rmsprop": (optax.rmsprop(1e-3), 20, (2, 2, 28)),
    "adagrad": (optax.adagrad(1e-3), 20, (2, 2, 28)),
    "lion": (optax.lion(1e-3), 20, (3, 2, 36)),
    "adam": (optax.adam(1e-3), 28, (3, 2, 40)),
    "adamw": (optax.adamw(1e-3), 28, (3, 2, 40)),
    "nadam": (optax.nadam(1e-3), 28, (3, 3, 44)),
    "adamax": (optax.adamax(1e-3), 28, (3, 2, 40)),
    "amsgrad": (optax.amsgrad(1e-3), 36, (4, 2, 52)),
    "adadelta": (optax.adadelta(1e-3), 28, (5, 3, 68)),
    "clip_by_global_norm, adamw": (
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
        32,
        (5, 4, 60),
    ),
}


def entry_of(rule):
    """The compiled program of a step whose parameters and state are donated, but for its parts."""

    def step(param, state, grad):
        update, state = rule.update(grad, state, param)
        return optax.apply_updates(param, update), state

    state = jax.eval_shape(rule.init, PARAM)
    program = jax.jit(step, donate_argnums=(0, 1)).lower(PARAM, state, PARAM).compile()
    return program.as_text().partition("\nENTRY ")[2]


print("jax", jax.__version__, "optax", optax.__version__)
for name, (rule, needed, seen) in RULES.items():
    entry = entry_of(rule)
    arrays = set(re.findall(rf"%(\S+) = f32\[{PARAM.size}\]", entry))
    grad = re.search(r'%(\S+) = .* parameter\(.*op_name="grad"', entry)[1]
    loops = reading = moved = 0
    copied = ""
    for result, op, operands in re.findall(r"%(\S+) = \S+ ([\w-]+)\((.*?)\)", entry):
        read = [one for one in re.findall(r"%([\w.-]+)", operands) if one in arrays]
        if op in ("parameter", "tuple") or not (read or result in arrays):
            continue
        loops += 1
        reading += grad in read
        moved += 4 * (len(read) + (result in arrays))
        copied += ", with a copy of a whole array" * (op == "copy")
    what = f"{name}: {loops} loops, the gradient read by {reading}, {moved} bytes moved"
    print(f"{what}, {needed} needed{copied}")
    assert (loops, reading, moved) == seen, "jax or optax has changed"
PYTHON
