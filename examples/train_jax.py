"""Trains a byte-level transformer in JAX, by optax's clipped AdamW and by fusedstep's.

    FUSEDSTEP_JAX=1 python -m pip install '.[jax,plot]' flax optax
    python examples/train_jax.py [-o train_jax.png]

Two models start from the same numbers and see the same batches of Python's own standard library.
Their losses are printed as they go and must agree to float32 rounding; below them, how fast each
went and what the optimizer took; a picture has both curves, and what lies between them.
"""

import argparse
import statistics
import sysconfig
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib import pyplot as plt

import fusedstep.jax

CONTEXT, BATCH, WIDTH, HEADS, LAYERS = 64, 16, 128, 4, 2
# Of the losses. optax has the corrections of Adam's moments in float32, which makes its first steps
# wrong by 7e-6; and the two round differently, which training magnifies from step to step.
TOLERANCE = 5e-5
RATE = optax.linear_schedule(1e-4, 1e-3, 10)
OPTIMIZERS = {
    "optax": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE, weight_decay=0.1)),
    "fusedstep": fusedstep.jax.adamw(RATE, weight_decay=0.1, max_norm=1.0),
}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        attend = nn.MultiHeadDotProductAttention(HEADS, use_bias=False)
        x = x + attend(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))


class GPT(nn.Module):
    @nn.compact
    def __call__(self, text):
        embed = nn.Embed(256, WIDTH, embedding_init=nn.initializers.normal(0.02))  # tied
        x = embed(text) + self.param("places", nn.initializers.normal(0.02), (CONTEXT, WIDTH))
        for _ in range(LAYERS):
            x = Block()(x, nn.make_causal_mask(text))
        return embed.attend(nn.LayerNorm()(x))


def loss_of(params, text):
    logits = GPT().apply(params, text[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()


def update(tx, grads, state, params):
    if hasattr(tx, "update_params"):
        return tx.update_params(grads, state, params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


class Run:
    """One model, its optimizer, and what became of them."""

    def __init__(self, tx, params, text):
        self.params = jax.tree.map(jnp.copy, params)  # its own, to donate
        self.state = tx.init(self.params)

        def step(params, state, text):
            loss, grads = jax.value_and_grad(loss_of)(params, text)
            return *update(tx, grads, state, params), loss

        def alone(params, state, grads):
            return update(tx, grads, state, params)

        # What is donated is updated where it lies.
        self.step, self.alone = (
            jax.jit(one, donate_argnums=(0, 1))
            .lower(self.params, self.state, last)
            .compile()  # here, so that no step is timed with it
            for one, last in ((step, text), (alone, self.params))
        )
        self.losses, self.seconds, self.stepping = [], [], []

    def train(self, text):
        begin = time.perf_counter()
        self.params, self.state, loss = self.step(self.params, self.state, text)
        self.losses.append(float(loss))
        self.seconds.append(time.perf_counter() - begin)

    def time_update(self, grads):
        """The optimizer alone, which a step hides in one program."""
        begin = time.perf_counter()
        self.params, self.state = jax.block_until_ready(self.alone(self.params, self.state, grads))
        self.stepping.append(time.perf_counter() - begin)


def batches(steps):
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    source = b"".join(file.read_bytes() for file in files)[: 2**22]
    data = np.frombuffer(source, np.uint8).astype(np.int32)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        start = rng.integers(len(data) - CONTEXT, size=(BATCH, 1))
        yield jnp.asarray(data[start + np.arange(CONTEXT + 1)])


def draw(runs, path):
    figure, (curves, apart) = plt.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for (name, run), style in zip(runs.items(), ("-", "--"), strict=True):
        curves.plot(run.losses, style, label=name)
    curves.set(ylabel="loss, nats a byte")
    curves.legend()
    apart.plot(np.subtract(*(run.losses for run in reversed(runs.values()))), color="C2")
    apart.set(xlabel="step", ylabel="difference")
    apart.ticklabel_format(style="sci", axis="y", scilimits=(0, 0))
    figure.align_ylabels()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("-o", "--output", default="train_jax.png", help="the picture")
    args = parser.parse_args()

    text = next(batches(1))
    params = jax.jit(GPT().init)(jax.random.key(0), text[:, :-1])
    runs = {name: Run(tx, params, text) for name, tx in OPTIMIZERS.items()}
    theirs, ours = runs.values()
    print("step    optax  fusedstep  difference")
    for step, text in enumerate(batches(args.steps)):
        for run in runs.values():
            run.train(text)
        if step % max(1, args.steps // 10) == 0:
            a, b = theirs.losses[-1], ours.losses[-1]
            print(f"{step:4} {a:8.5f}   {b:8.5f}    {b - a:+.1e}", flush=True)

    grads = jax.jit(jax.grad(loss_of))(ours.params, text)
    for _ in range(20):
        for run in runs.values():
            run.time_update(grads)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{size:,} parameters")
    for name, run in runs.items():
        step, update = statistics.median(run.seconds), statistics.median(run.stepping)
        print(
            f"{name}: {BATCH * CONTEXT / step:,.0f} tokens/s, {update * 1e3:.2f} ms or"
            f" {update / step:.1%} of it in the optimizer"
        )
    draw(runs, args.output)
    print(f"{args.output} shows both")
    worst = max(abs(a - b) / a for a, b in zip(theirs.losses, ours.losses, strict=True))
    agree = worst <= TOLERANCE
    verdict = "agree to float32 rounding" if agree else "DO NOT AGREE"
    print(f"the losses {verdict}: largest relative difference {worst:.0e}")
    raise SystemExit(not agree)


if __name__ == "__main__":
    main()
