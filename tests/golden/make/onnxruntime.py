"""Records ONNX Runtime's training operators on the CPU.

Needs onnxruntime-training==1.19.2 onnx==1.23.2 numpy==2.4.6. Run from the root of the repository:
python -m tests.golden.make.onnxruntime

The optimizer of its on-device training is the same operator with adam_mode 1, correct_bias 1.
"""

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from .recording import RATES, Recording, inputs

ADAM = {"alpha": 0.75, "beta": 0.875, "epsilon": 2**-7, "weight_decay": 3 / 32}
CASES = [
    ("AdamWOptimizer", {**ADAM, "adam_mode": 0, "correct_bias": 1}),
    ("AdamWOptimizer", {**ADAM, "adam_mode": 1, "correct_bias": 1}),
    ("AdamWOptimizer", {**ADAM, "adam_mode": 1, "correct_bias": 0}),
    ("SGDOptimizerV2", {}),
]
STATES = {"AdamWOptimizer": ["momentums_1", "momentums_2"], "SGDOptimizerV2": []}


def session(optimizer, arguments):
    """A model of the one operator, on sequences of one float32 tensor each."""
    step = ["step"] if STATES[optimizer] else []  # int64
    lists = ["weights", "gradients", *STATES[optimizer]]
    updated = [f"new_{name}" for name in lists if name != "gradients"]
    node = helper.make_node(
        optimizer, ["lr", *step, *lists], ["done", *updated], domain="com.microsoft", **arguments
    )
    tensor = helper.make_tensor_value_info
    given = [tensor("lr", TensorProto.FLOAT, [1])]
    given += [tensor(name, TensorProto.INT64, [1]) for name in step]
    sequences = {
        name: helper.make_tensor_sequence_value_info(name, TensorProto.FLOAT, None)
        for name in lists + updated
    }
    graph = helper.make_graph(
        [node],
        "update",
        given + [sequences[name] for name in lists],
        [tensor("done", TensorProto.BOOL, None), *(sequences[name] for name in updated)],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def steps(optimizer, arguments):
    weights, gradients = inputs("float32")
    run = session(optimizer, arguments)
    states = {name: [np.zeros_like(weights)] for name in STATES[optimizer]}
    for t, (rate, gradient) in enumerate(zip(RATES, gradients, strict=True), 1):
        fed = {"lr": np.array([rate], np.float32), "weights": [weights], "gradients": [gradient]}
        if states:
            fed["step"] = np.array([t], np.int64)
        _, (weights,), *after = run.run(None, fed | states)
        states = dict(zip(states, after, strict=True))
        yield weights


onnxruntime.set_default_logger_severity(3)  # the shape of `done` is not what is inferred for it
recording = Recording("onnxruntime", onnxruntime.__version__, backend="CPUExecutionProvider")
for optimizer, arguments in CASES:
    recording.add(optimizer, arguments, "lr", "float32", steps(optimizer, arguments))
recording.write()
