"""Times other libraries' optimizers against ours under the same equation, side by side.

    python bench/libraries.py optax keras mlx paddle options [--n 2^24] [--rounds 7]

Those not installed are left out, and said. In each round the library takes a step and ours does,
next to each other and in turns first; printed is the median over rounds of its time over ours. Each
library works as its users are told to: optax and Keras compiled, with their buffers given away.
`apart` is how far both sides are from each other after two steps, as a share of the way.
`options` are our own optimizers with options of other libraries' equations and without.
"""

import argparse
import importlib
import os
import platform
import time
from statistics import median

import numpy as np

import fusedstep as fs

RATE = 1e-3


def optax_step(name, arguments, params, grads):
    import jax
    import optax

    opt = getattr(optax, name)(RATE, **arguments)

    def update(params, state, grads):
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(update, donate_argnums=(0, 1))
    now = [jax.numpy.array(params)]
    now.append(opt.init(now[0]))
    given = jax.numpy.array(grads)

    def step():
        now[:] = compiled(*now, given)
        jax.block_until_ready(now)

    return step, lambda: np.asarray(now[0])


def keras_step(name, arguments, params, grads):
    import keras

    opt = getattr(keras.optimizers, name)(learning_rate=RATE, **arguments)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        variable, given = tf.Variable(params), tf.constant(grads)
        opt.build([variable])
        compiled = tf.function(lambda: opt.apply([given], [variable]), jit_compile=XLA)

        def step():
            compiled()

        return step, variable.numpy
    import jax

    variable = keras.Variable(params)
    opt.build([variable])
    compiled = jax.jit(opt.stateless_apply, donate_argnums=(0, 2))
    now = [[v.value for v in opt.variables], [variable.value]]
    given = [jax.numpy.array(grads)]

    def step():
        after, states = compiled(now[0], given, now[1])
        now[:] = [states, after]
        jax.block_until_ready(now)

    return step, lambda: np.asarray(now[1][0])


def mlx_step(name, arguments, params, grads):
    import mlx.core as mx
    import mlx.optimizers

    mx.set_default_device(mx.cpu)
    opt = getattr(mlx.optimizers, name)(RATE, **arguments)
    now, given = {"w": mx.array(params)}, {"w": mx.array(grads)}
    opt.init(now)
    mx.eval(now, given, opt.state)

    def step():
        now.update(opt.apply_gradients(given, now))
        mx.eval(now, opt.state)

    return step, lambda: np.array(now["w"])


def paddle_step(name, arguments, params, grads):
    import paddle

    paddle.set_device("cpu")
    param = paddle.base.framework.EagerParamBase.from_tensor(paddle.to_tensor(params))
    opt = getattr(paddle.optimizer, name)(RATE, parameters=[param], **arguments)
    param.grad = paddle.to_tensor(grads)
    return opt.step, param.numpy


XLA = True
MOMENTUM = {"momentum": 0.9}

# What is imported, what makes a step, and the names; "momentum" is the first with momentum.
LIBRARIES = {
    "optax": (
        "optax",
        optax_step,
        "sgd momentum adagrad rmsprop adadelta adam adamw amsgrad nadam adamax radam lion",
    ),
    "keras": (
        "keras",
        keras_step,
        "SGD momentum Adagrad RMSprop Adadelta Adam AdamW Adamax Nadam Lion",
    ),
    "mlx": (
        "mlx.core",
        mlx_step,
        "SGD momentum Adagrad RMSprop AdaDelta Adam AdamW Adamax Lion",
    ),
    "paddle": (
        "paddle",
        paddle_step,
        "SGD Momentum Adagrad RMSProp Adadelta Adam AdamW Adamax NAdam RAdam Rprop",
    ),
}


OPTIONS = {
    "SGD": ({"momentum": 0.9}, {"lr_in_momentum": True, "decoupled_weight_decay": True}),
    "Adagrad": ({}, {"eps_root": 1e-7}),
    "RMSprop": ({"momentum": 0.9}, {"eps_root": 1e-7, "nesterov": True, "lr_in_momentum": True}),
    "Adam": ({}, {"eps_hat": True, "eps_root": 1e-7}),
    "AdamW": ({}, {"eps_hat": True, "decay_after": True}),
    "Adamax": ({}, {"eps_divisor": 1e-7, "bias_correction": False}),
    "NAdam": ({}, {"eps_root": 1e-7}),
    "RAdam": ({}, {"eps_hat": False, "eps_root": 1e-7}),
}


def option_rows(n, rounds):
    """Each optimizer without the options, over itself with them."""
    rng = np.random.default_rng(0)
    grads = fs.FlatBuffer.pack([rng.standard_normal(n, np.float32)])
    for name, (plain, options) in OPTIONS.items():
        times = []
        opts = [
            getattr(fs, name)(fs.FlatBuffer.pack([np.ones(n, np.float32)]), lr=RATE, **hypers)
            for hypers in (plain, plain | options)
        ]
        for k in range(rounds + 2):
            taken = [0.0, 0.0]
            for side in (0, 1) if k % 2 else (1, 0):
                begin = time.perf_counter()
                opts[side].step(grads)
                taken[side] = time.perf_counter() - begin
            times.append(taken)
        with_them, without = (1e3 * median(t[side] for t in times[2:]) for side in (1, 0))
        ratio = median(a / b for a, b in times[2:])
        print(f"| {name} | {', '.join(options)} | {without:.1f} | {with_them:.1f} | {ratio:.2f} |")


def measure(library, label, n, rounds):
    """The library's time over ours, both times in ms, and how far apart two steps end."""
    name, arguments = label, {}
    if label == "momentum":
        name, arguments = LIBRARIES[library][2].split()[0], MOMENTUM
    rng = np.random.default_rng(0)
    params = rng.standard_normal(n, np.float32)
    grads = rng.standard_normal(n, np.float32)
    theirs, result = LIBRARIES[library][1](name, arguments, params, grads)
    own = fs.FlatBuffer.pack([params])
    opt = getattr(getattr(fs.conventions, library), name)(own, RATE, **arguments)
    gradients = fs.FlatBuffer.pack([grads])
    times = {theirs: [], opt.step: []}
    sides = [(theirs, theirs), (opt.step, lambda: opt.step(gradients))]
    for k in range(rounds + 2):  # two to warm up, of which both sides are compared
        for key, call in sides if k % 2 else sides[::-1]:
            begin = time.perf_counter()
            call()
            times[key].append(time.perf_counter() - begin)
        if k == 1:
            apart = np.abs(result() - own.flat[:n]).max() / np.abs(own.flat[:n] - params).max()
    a, b = (values[2:] for values in times.values())
    ratio = median(x / y for x, y in zip(a, b, strict=True))
    return ratio, 1e3 * median(a), 1e3 * median(b), apart


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("libraries", nargs="+", choices=[*LIBRARIES, "options"])
    parser.add_argument("--n", default="2^24", help="elements (default 2^24)")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    base, _, power = given.n.partition("^")
    n = int(base) ** int(power or 1)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    print(f"{platform.machine()}, {fs.isa()}, {fs.num_threads()} threads; {n} float32 elements")
    if "options" in given.libraries:
        print("| optimizer | options | without, ms | with, ms | ratio |\n|---|---|---|---|---|")
        option_rows(n, given.rounds)
    libraries = [one for one in given.libraries if one != "options"]
    if libraries:
        print("| library | optimizer | ms | ours, ms | ratio | apart |\n|---|---|---|---|---|---|")
    for library in libraries:
        try:
            module = importlib.import_module(LIBRARIES[library][0])
        except ImportError as error:
            print(f"{library} is left out: {error}")
            continue
        version = getattr(module, "__version__", "?")
        for label in LIBRARIES[library][2].split():
            ratio, theirs, ours, apart = measure(library, label, n, given.rounds)
            cells = f"{library} {version} | {label} | {theirs:.1f} | {ours:.1f} | {ratio:.2f}"
            print(f"| {cells} | {apart:.0e} |", flush=True)


if __name__ == "__main__":
    main()
