"""Records ONNX's training operators by its reference evaluator, and its own tests of them.

Needs onnx==1.23.2 numpy==2.4.6. Run from the root of the repository:
python -m tests.golden.make.onnx

An operator is one update; T, its input, counts them from `first_T` of a case on. What Adam does at
T = 0 differs from all that follow. Attributes are float32, so those given here are exact in it.
onnx_nodes.json has the inputs, attributes and expected outputs of the seven tests of these
operators that every ONNX backend has to pass, as onnx's own generators give them.
"""

from itertools import product

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.backend.test.case import node as node_tests
from onnx.backend.test.case.node import adagrad, adam, momentum
from onnx.defs import AI_ONNX_PREVIEW_TRAINING_DOMAIN
from onnx.reference import ReferenceEvaluator

from .recording import GOLDEN, RATES, Recording, inputs, lines

ADAM = {"alpha": 0.75, "beta": 0.875, "epsilon": 2**-7}
MOMENTUM = {"alpha": 0.75, "beta": 0.625, "norm_coefficient": 0.125}
CASES = [
    ("Adagrad", {"epsilon": 2**-7, "decay_factor": 0.125, "norm_coefficient": 0.125}),
    ("Adam", ADAM),
    ("Adam", {**ADAM, "norm_coefficient": 0.125}),
    ("Adam", {**ADAM, "norm_coefficient_post": 2**-9}),
    ("Momentum", {**MOMENTUM, "mode": "standard"}),
    ("Momentum", {**MOMENTUM, "mode": "nesterov"}),
    ("Momentum", {**MOMENTUM, "beta": 1.0, "mode": "nesterov"}),
]
STATES = {"Adagrad": 1, "Adam": 2, "Momentum": 1}


def steps(optimizer, arguments, first, dtype):
    x, gradients = inputs(dtype)
    states = ["V", "H"][: STATES[optimizer]]
    taken, given = ["R", "T", "X", "G", *states], ["X_new", *(f"{name}_new" for name in states)]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    node = helper.make_node(
        optimizer, taken, given, domain=AI_ONNX_PREVIEW_TRAINING_DOMAIN, **arguments
    )

    def value(name):
        shape = () if name in "RT" else (12,)
        return helper.make_tensor_value_info(
            name, TensorProto.INT64 if name == "T" else kind, shape
        )

    graph = helper.make_graph([node], "update", list(map(value, taken)), list(map(value, given)))
    opsets = [helper.make_opsetid(AI_ONNX_PREVIEW_TRAINING_DOMAIN, 1), helper.make_opsetid("", 21)]
    model = helper.make_model(graph, opset_imports=opsets)
    onnx.checker.check_model(model)
    session = ReferenceEvaluator(model)
    after = [np.zeros_like(x) for _ in states]
    for t, (rate, gradient) in enumerate(zip(RATES, gradients, strict=True), first):
        fed = [np.array(rate, dtype), np.array(t, np.int64), x, gradient, *after]
        found = session.run(None, dict(zip(taken, fed, strict=True)))
        x, *after = (
            array.astype(dtype) for array in found
        )  # Adam's X_new is float64 from T = 1 on
        yield x


def node_test(made):
    """Attributes, inputs and expected outputs of one of onnx's tests."""
    (node,), (data,) = made.model.graph.node, made.data_sets
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    attributes = {k: v.decode() if isinstance(v, bytes) else v for k, v in attributes.items()}

    def arrays(names, values):
        return {
            k: {"dtype": str(v.dtype), "value": v.tolist()}
            for k, v in zip(names, values, strict=True)
        }

    return {
        "name": made.name,
        "operator": node.op_type,
        "attributes": attributes,
        "inputs": arrays(node.input, data[0]),
        "outputs": arrays(node.output, data[1]),
    }


recording = Recording("onnx", onnx.__version__, backend="onnx.reference")
for (optimizer, arguments), first, dtype in product(CASES, (0, 1), ("float32", "float64")):
    taken = steps(optimizer, arguments, first, dtype)
    recording.add(optimizer, arguments, "R", dtype, taken, first_T=first)
recording.write()

tests = [
    node_test(made)
    for kind in (adagrad.Adagrad, adam.Adam, momentum.Momentum)  # imported, their tests are made
    for made in node_tests._NodeTestCases
    if made.model.graph.node[0].op_type == kind.__name__
]
assert len(tests) == 7
rows = ",\n".join(
    " {" + ",\n  ".join(f'"{key}": {lines(test[key])}' for key in test) + "}" for test in tests
)
head = {"library": "onnx", "version": onnx.__version__, "made_by": "tests/golden/make/onnx.py"}
text = f'{lines(head)[:-1]}, "tests": [\n{rows}\n]}}\n'
(GOLDEN / "onnx_nodes.json").write_text(text)
