#!/usr/bin/env bash
# jax 0.10.2: donated arguments go to results by their order, not by what becomes of what, and XLA
# copies.
#
# jit pairs each donated argument with the first result of its shape and dtype that has none yet.
# XLA is told this pairing and keeps to it: where two arrays of one shape come in one order and
# leave in the other, each is to be written over the other's memory while that is still needed, so
# that all of it is copied, there and back. A step (state, params) -> (params, state) of any
# optimizer does so, as the moments have the parameters' shapes. Nothing is said, and the results
# are right. Results in the order of the arguments have no copy.
#
# Seen (arrays of 4 MB):
#   two updates in place, (p, m) -> (p, m): 0 copies, 0.0 MB of temporary memory
#   two updates in place, (p, m) -> (m, p): 4 copies, 8.0 MB of temporary memory
#   optax.adam, (params, state) -> (params, state): 0 copies, 0.0 MB of temporary memory
#   optax.adam, (state, params) -> (state, params): 0 copies, 0.0 MB of temporary memory
#   optax.adam, (state, params) -> (params, state): 4 copies, 8.0 MB of temporary memory
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

ARRAY = jax.ShapeDtypeStruct((1 << 20,), "float32")
PART = jax.ShapeDtypeStruct((8,), "float32")
adam = optax.adam(1e-3)
STATE = jax.eval_shape(adam.init, ARRAY)


def updated(p, m, part):
    def write(array, part):
        return jax.lax.dynamic_update_slice(array, part, (0,))

    return write(p, 2 * part), write(m, part)


def stepped(params, state, grads):
    updates, state = adam.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def kept(p, m, part):
    p, m = updated(p, m, part)
    return p, m


def turned(p, m, part):
    p, m = updated(p, m, part)
    return m, p


def params_state(params, state, grads):
    return stepped(params, state, grads)


def state_params(state, params, grads):
    params, state = stepped(params, state, grads)
    return state, params


def state_params_turned(state, params, grads):
    return stepped(params, state, grads)


def look(what, function, *arguments):
    program = jax.jit(function, donate_argnums=(0, 1)).lower(*arguments).compile()
    copies = len(re.findall(rf"= f32\[{ARRAY.size}\]\S* copy\(", program.as_text()))
    memory = program.memory_analysis().temp_size_in_bytes / 2**20
    print(f"{what}: {copies} copies, {memory:.1f} MB of temporary memory")
    return copies


print("jax", jax.__version__, "optax", optax.__version__)
assert look("two updates in place, (p, m) -> (p, m)", kept, ARRAY, ARRAY, PART) == 0
found = look("two updates in place, (p, m) -> (m, p)", turned, ARRAY, ARRAY, PART)
assert found == 4, "jax has changed"
same = "optax.adam, (params, state) -> (params, state)"
assert look(same, params_state, ARRAY, STATE, ARRAY) == 0
same = "optax.adam, (state, params) -> (state, params)"
assert look(same, state_params, STATE, ARRAY, ARRAY) == 0
other = "optax.adam, (state, params) -> (params, state)"
assert look(other, state_params_turned, STATE, ARRAY, ARRAY) == 4, "jax has changed"
PYTHON
