#!/usr/bin/env bash
# Keras on TensorFlow, tf.compat.v1, PaddlePaddle, MLX: their float64 has float32 numbers in it.
#
# (Keras 3.15.1, TensorFlow 2.21.0, PaddlePaddle 3.3.1, MLX 0.32.4.) Parameters, gradients and
# states are float64, but what multiplies them has been a float32. Under TensorFlow a Python number
# becomes a float32 tensor before Keras casts it, and tf.compat.v1 keeps Adam's powers of beta as
# float32 variables; Paddle's kernels have float attributes (Momentum's mu; Adam's betas are exact);
# MLX divides by 1 - beta**step with step a uint64 array, which gives float32. A run in float64, as
# for a test of gradients or against another library, is right to 7 digits, not to 16, and nothing
# says so. Numbers like 0.875, which float32 has, come through the first three.
#
# Seen (the momentum that acts; ten steps of Adam with one gradient and no eps, each of them the
# rate):
#   torch momentum=0.9: 0.9
#   keras momentum=0.9: 0.8999999761581421
#   tf.compat.v1 momentum=0.9: 0.8999999761581421
#   paddle momentum=0.9: 0.8999999761581421
#   torch Adam, 10 steps: off by 0e+00
#   tf.compat.v1 Adam, 10 steps: off by 3e-07
#   mlx Adam, 10 steps: off by 7e-07
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 \
  tensorflow-cpu==2.21.0 keras==3.15.1 "mlx[cpu]==0.32.4" paddlepaddle==3.3.1 numpy
export KERAS_BACKEND=tensorflow KERAS_HOME="$folder" TF_CPP_MIN_LOG_LEVEL=3 CUDA_VISIBLE_DEVICES=
cat > "$folder/momentum.py" <<'PYTHON'
"""Two updates at rate 1, gradients 1 and 0, from 1: to 0, and on to minus the momentum."""
import sys

import numpy as np

library = sys.argv[1]
GRADIENTS = (np.ones(1), np.zeros(1))
at = [1.0]
if library == "torch":
    import torch

    param = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    rule = torch.optim.SGD([param], lr=1.0, momentum=0.9)
    for gradient in GRADIENTS:
        param.grad = torch.tensor(gradient)
        rule.step()
        at.append(param.item())
elif library == "keras":
    import keras

    keras.config.set_floatx("float64")
    param = keras.Variable(np.ones(1))
    rule = keras.optimizers.SGD(learning_rate=1.0, momentum=0.9)
    rule.build([param])
    for gradient in GRADIENTS:
        rule.apply([keras.ops.convert_to_tensor(gradient)])
        at.append(keras.ops.convert_to_numpy(param)[0])
elif library == "tf.compat.v1":
    import tensorflow as tf

    param = tf.Variable(np.ones(1))
    rule = tf.compat.v1.train.MomentumOptimizer(1.0, momentum=0.9)
    for gradient in GRADIENTS:
        rule.apply_gradients([(tf.constant(gradient), param)])
        at.append(param.numpy()[0])
elif library == "paddle":
    import paddle

    param = paddle.create_parameter([1], "float64")
    param.set_value(np.ones(1))
    rule = paddle.optimizer.Momentum(1.0, momentum=0.9, parameters=[param])
    for gradient in GRADIENTS:
        param.grad = paddle.to_tensor(gradient)
        rule.step()
        at.append(param.numpy()[0])
assert at[1] == 0
momentum = -float(at[2])
print(f"{library} momentum=0.9: {momentum!r}")
exact = library == "torch"
assert momentum == (0.9 if exact else np.float32(0.9)), f"{library} has changed"
PYTHON
cat > "$folder/adam.py" <<'PYTHON'
"""With one gradient all along and no eps, each step of Adam is the rate."""
import sys

import numpy as np

library = sys.argv[1]
GRADIENT = np.array([0.3])
if library == "torch":
    import torch

    param = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    rule = torch.optim.Adam([param], lr=1.0, betas=(0.9, 0.99), eps=0.0)
    for _ in range(10):
        param.grad = torch.tensor(GRADIENT)
        rule.step()
    moved = param.item()
elif library == "tf.compat.v1":
    import tensorflow as tf

    param = tf.Variable(np.zeros(1))
    rule = tf.compat.v1.train.AdamOptimizer(1.0, beta1=0.9, beta2=0.99, epsilon=0.0)
    for _ in range(10):
        rule.apply_gradients([(tf.constant(GRADIENT), param)])
    moved = param.numpy()[0]
elif library == "mlx":
    import mlx.core as mx
    from mlx import optimizers

    mx.set_default_device(mx.cpu)
    param = {"w": mx.zeros(1, dtype=mx.float64)}
    rule = optimizers.Adam(1.0, betas=[0.9, 0.99], eps=0.0, bias_correction=True)
    for _ in range(10):
        param = rule.apply_gradients({"w": mx.array(GRADIENT, dtype=mx.float64)}, param)
    assert param["w"].dtype == mx.float64
    moved = np.array(param["w"])[0]
off = abs(float(moved) / 10 + 1)
print(f"{library} Adam, 10 steps: off by {off:.0e}")
assert off < 1e-14 if library == "torch" else 1e-10 < off < 1e-5, f"{library} has changed"
PYTHON
for library in torch keras tf.compat.v1 paddle; do
  "$folder/venv/bin/python" -W ignore "$folder/momentum.py" $library 2> "$folder/log" ||
    { cat "$folder/log"; exit 1; }
done
for library in torch tf.compat.v1 mlx; do
  "$folder/venv/bin/python" -W ignore "$folder/adam.py" $library 2> "$folder/log" ||
    { cat "$folder/log"; exit 1; }
done
