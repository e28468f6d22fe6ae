#!/usr/bin/env bash
# onnx 1.23.2: tests of optimizers are all at T = 0, where most of their equations drop out.
#
# The seven node tests that a backend of ai.onnx.preview.training has to pass give one update each,
# all with T = 0. There Adam has no bias correction (R stays as it is), Adagrad's decay_factor is
# multiplied by 0, and Momentum's beta, the dampening, counts as 1: a backend that has none of the
# three passes. Nothing after the first step of a training run is tested. That shows in the
# reference evaluator itself: from T = 1 on its Adam gives X_new as float64 where the model says
# float32.
#
# Seen:
#   T in the tests: [0]
#   without correction, decay and dampening: 7 of 7 pass
#   X_new of float32 X: float32 at T = 0, float64 at T = 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import onnx
from onnx import helper, parser
from onnx.backend.test.case import node as tests
from onnx.backend.test.case.node import adagrad, adam, momentum  # imported, their tests are made
from onnx.reference import ReferenceEvaluator


def without_t(kind, r, x, g, states, a):
    """One update that never looks at T."""
    g = a["norm_coefficient"] * x + g
    if kind == "Adagrad":
        h = states[0] + g * g
        return x - r * g / (np.sqrt(h) + a["epsilon"]), h
    if kind == "Momentum":
        v = a["alpha"] * states[0] + g
        return x - r * (g + a["alpha"] * v if a["mode"] == b"nesterov" else v), v
    v = a["alpha"] * states[0] + (1 - a["alpha"]) * g
    h = a["beta"] * states[1] + (1 - a["beta"]) * g * g
    x = x - r * v / (np.sqrt(h) + a["epsilon"])
    return (1 - a.get("norm_coefficient_post", 0.0)) * x, v, h


print("onnx", onnx.__version__)
made = [test for test in tests._NodeTestCases
        if test.model.graph.node[0].op_type in ("Adam", "Adagrad", "Momentum")]
assert len(made) == 7
passed, seen = 0, set()
for test in made:
    node, (given, expected) = test.model.graph.node[0], test.data_sets[0]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    r, t, *rest = given
    seen.add(int(t))
    streams = 4 if node.op_type == "Adam" else 3
    tensors = len(rest) // streams
    found = []
    for i in range(tensors):
        x, g, *states = rest[i::tensors]
        found.append(without_t(node.op_type, r, x, g, states, attributes))
    flat = [found[i][k] for k in range(streams - 1) for i in range(tensors)]
    passed += all(np.allclose(a, b, rtol=1e-5) for a, b in zip(flat, expected, strict=True))
print("T in the tests:", sorted(seen))
print("without correction, decay and dampening:", passed, "of", len(made), "pass")

model = parser.parse_model('''<ir_version: 10, opset_import: ["ai.onnx.preview.training": 1]>
update (float R, int64 T, float[2] X, float[2] G, float[2] V, float[2] H)
    => (float[2] X_new, float[2] V_new, float[2] H_new)
{ X_new, V_new, H_new = ai.onnx.preview.training.Adam (R, T, X, G, V, H) }''')
onnx.checker.check_model(model)
types = []
for t in (0, 1):
    fed = {name: np.ones(2, np.float32) for name in "XGVH"}
    fed |= {"R": np.float32(0.1), "T": np.int64(t)}
    types.append(ReferenceEvaluator(model).run(None, {k: np.asarray(v) for k, v in fed.items()})[0])
print("X_new of float32 X:", ", ".join(f"{x.dtype} at T = {t}" for t, x in enumerate(types)))
assert seen == {0} and passed == 7, "onnx has changed"
assert [x.dtype for x in types] == [np.float32, np.float64], "onnx has changed"
PYTHON
