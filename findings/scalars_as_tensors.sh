#!/usr/bin/env bash
# PaddlePaddle's NAdam and RAdam keep three numbers as tensors of the parameter's shape.
#
# (PaddlePaddle 3.3.1, CPU.) Both need, beside two moments, numbers that are the same for all
# elements: powers of beta, the product of the momenta, the length of the average. Adam keeps its
# two in tensors of one element. NAdam and RAdam have all three in tensors like the parameter, each
# filled with one number: 20 bytes of state for a float32 parameter instead of 8, in memory, in a
# step's traffic and in the checkpoint. Who plans memory by Adam's figures has 2.5 times too little.
# And no optimizer keeps a count of steps, so that a checkpoint's follows from those powers alone.
#
# Seen (a parameter of 1,000 elements, after 3 steps; states by elements, and what is in them):
#   Adam: 8.008 bytes a parameter; beta1_pow_acc 1 x 0.6561, beta2_pow_acc 1 x 0.996006
#   NAdam: 20.0 bytes a parameter; beta2_pow 1000 x 0.997003, momentum_decay_pow 1000 x 0.884736,
#     mu_product 1000 x 0.0912143
#   RAdam: 20.0 bytes a parameter; beta1_pow 1000 x 0.729, beta2_pow 1000 x 0.997003, rho 1000 x
#     998.014
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check paddlepaddle==3.3.1 numpy
cat > "$folder/states.py" <<'PYTHON'
import re

import numpy as np
import paddle

paddle.set_device("cpu")
EXPECTED = [("Adam", 8.008, 1), ("NAdam", 20.0, 1000), ("RAdam", 20.0, 1000)]
for name, bytes_each, elements in EXPECTED:
    param = paddle.create_parameter([1000], "float32")
    rule = getattr(paddle.optimizer, name)(parameters=[param])
    for _ in range(3):
        param.grad = paddle.ones([1000])
        rule.step()
    kept = rule.state_dict().items()
    state = {key.removeprefix(f"{param.name}_"): one.numpy() for key, one in kept}
    found = sum(one.nbytes for one in state.values()) / 1000
    told = []
    for key, one in sorted(state.items()):
        if not key.startswith(("moment1", "moment2")):
            assert one.size == elements and np.all(one == one.flat[0]), f"{name} has changed: {key}"
            told.append(f"{re.sub('_[0-9]+$', '', key)} {one.size} x {one.flat[0]:.6g}")
    print(f"{name}: {found} bytes a parameter; {', '.join(told)}")
    assert found == bytes_each, f"{name} has changed: {found}"
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/states.py" 2> "$folder/log" ||
  { cat "$folder/log"; exit 1; }
