"""The figures, one function each; what the page shows as a figure's code is that function.

A function's docstring is the finding, as a sentence, and then the caption.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

import fusedstep as fs
from fusedstep import demo
from fusedstep._types import Rounding
from fusedstep.convergence import Quadratic, curvature, landscapes, lr_range_test, trajectory
from fusedstep.gallery.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    canvas,
    walk,
)


@dataclass(frozen=True)
class Entry:
    """A figure of the gallery."""

    name: str
    title: str
    caption: str
    question: str
    equation: str
    source: str
    function: Callable[[], Any]
    helpers: tuple[Callable[..., Any], ...]

    @demo.one_blas_thread()
    def draw(self) -> Any:
        """The matplotlib Figure, with the finding above it."""
        figure = self.function()
        figure.suptitle(self.title, fontsize="large", fontweight="bold")
        return figure

    @property
    def code(self) -> str:
        """The function, without its docstring, which stands around the figure, and its helpers."""
        text = inspect.getsource(self.function)
        head, _, rest = text[text.index("def ") :].partition('"""')
        own = head.rstrip() + "\n" + rest.partition('"""')[2].strip("\n")
        return "\n\n\n".join([own, *(inspect.getsource(one).strip() for one in self.helpers)])


FIGURES: list[Entry] = []


def figure(
    question: str, equation: str, source: str, *helpers: Callable[..., Any]
) -> Callable[[Any], Any]:
    """Lists a function as a figure, with the functions that it shares its work with."""

    def listed(function: Callable[[], Any]) -> Callable[[], Any]:
        title, _, caption = inspect.cleandoc(function.__doc__ or "").partition("\n\n")
        FIGURES.append(
            Entry(function.__name__, title.replace("\n", " ").rstrip("."),
                  caption.replace("\n", " "), question, equation, source, function, helpers)
        )  # fmt: skip
        return function

    return listed


@figure(
    "Which learning rate makes gradient descent converge?",
    "x ← x - lr * f'(x);  on f = λ/2 x^2 the error is multiplied by 1 - lr * λ",
    "Goodfellow, Bengio & Courville 2016, section 4.3",
)
def rates() -> Any:
    """Up to 2/λ gradient descent converges, each rate in its manner; beyond, it diverges.

    A parabola of curvature λ = 1, from x = 1, at five rates. Below 1/λ the error falls
    from one side; at 1/λ a step ends it, as Newton's would; up to 2/λ it swings from side
    to side and yet falls; at 2/λ it swings for ever; above, it grows.
    """
    parabola = Quadratic([1.0])
    x = np.linspace(-1.75, 1.75, 200)
    figure, axes = canvas(2, 5, size=(11, 5), sharey="row", height_ratios=(3, 2))
    for ax, below, lr in zip(*axes, (0.3, 1.0, 1.8, 2.0, 2.1), strict=True):
        path = parabola.simulate([1.0], lr, steps=6)[:, 0]
        color = RED if lr > 2 else ORANGE if lr == 2 else BLUE
        ax.plot(x, x**2 / 2, color=GREY, lw=1)
        ax.plot(path, path**2 / 2, "o-", color=color, ms=4, lw=1.2)
        ax.set_title(f"lr = {lr:g}/λ\n{parabola.regime(lr)[0]}", color=color)
        ax.set_xlabel("x")
        below.plot(np.abs(parabola.simulate([1.0], lr, steps=12)[:, 0]), "o-", color=color, ms=3)
        below.set_xlabel("step")
    axes[0, 0].set_ylabel("f(x)")
    axes[1, 0].set_ylabel("error |x|")
    axes[1, 0].set_ylim(-0.15, 3.3)
    return figure


@figure(
    "One learning rate for many curvatures: which is best?",
    "worst factor max |1 - lr * λ_i|, least at 2/(λ_min + λ_max), where it is (κ - 1)/(κ + 1)",
    "Polyak 1964; Nesterov 2004, section 2.1",
)
def curvatures() -> Any:
    """The sharpest direction sets the largest rate, and the flattest then has to wait.

    What a step leaves of the error along the flattest (curvature 1) and the sharpest (curvature 10)
    direction of a quadratic, at each rate. The worse of the two is what counts; it is best where
    both are alike. A rate that suits the flat direction alone, 1/λ_min, lets the sharp one
    explode.
    """
    q = Quadratic([1.0, 10.0])
    lrs = np.linspace(0.001, 0.24, 400)
    figure, ax = canvas(size=(9, 4.2))
    ax.plot(lrs, np.abs(1 - lrs * 1.0), color=BLUE, lw=1.5, ls="--")
    ax.plot(lrs, np.abs(1 - lrs * 10.0), color=RED, lw=1.5, ls="-.")
    ax.plot(lrs, [q.contraction(lr) for lr in lrs], color="k", lw=3, alpha=0.35,
            label="the worse of the two")  # fmt: skip
    ax.axvspan(q.largest_stable_rate, 0.24, color=RED, alpha=0.12, lw=0)
    ax.plot(q.best_rate, q.best_contraction, "*", ms=16, color=GREEN)
    ax.annotate(f"best: 2/(1 + 10) = {q.best_rate:.3f},\nleaves {q.best_contraction:.0%} a step",
                (q.best_rate, q.best_contraction), (0.095, 0.63), color=GREEN,
                arrowprops={"arrowstyle": "-", "color": GREEN})  # fmt: skip
    ax.text(0.045, 0.985, "flattest direction, |1 - lr * 1|", color=BLUE, rotation=-9)
    ax.text(0.02, 0.28, "sharpest direction,\n|1 - lr * 10|", color=RED)
    ax.text(0.22, 0.1, "diverges\nabove 2/10", color=RED, ha="center")
    ax.legend(loc="upper left")
    ax.set_ylim(0, 1.4)
    ax.set_xlim(0, 0.24)
    ax.set_xlabel("learning rate")
    ax.set_ylabel("factor of the error per step")
    return figure


@figure(
    "Why does gradient descent jitter in a ravine, and what does momentum do about it?",
    "v ← mu * v + g,  x ← x - lr * v",
    "Polyak 1964; Sutskever et al. 2013",
)
def ravine() -> Any:
    """In a ravine gradient descent jitters or creeps; momentum settles and gets there first.

    A quadratic 50 times as curved across as along, 40 steps each. The gradient points across: at a
    rate near the largest stable one it throws the point from wall to wall, at a smaller one nothing
    moves along the floor. Momentum adds up what successive gradients agree on, the way along, and
    what they disagree on cancels: after a few swings it runs down the floor.
    """
    valley = landscapes.ravine(condition=50)
    runs = {
        "plain, lr 0.038: jitters": (lambda x: fs.SGD(x, lr=0.038), RED, "o"),
        "plain, lr 0.01: creeps": (lambda x: fs.SGD(x, lr=0.01), ORANGE, "v"),
        "momentum 0.8, lr 0.01": (lambda x: fs.SGD(x, lr=0.01, momentum=0.8), BLUE, "s"),
    }
    figure, (map_, curve) = canvas(1, 2, size=(11, 4.2), width_ratios=(3, 2))
    valley.plot(map_)
    for name, (make, color, marker) in runs.items():
        path = trajectory(make, valley, valley.start, steps=40)
        walk(map_, path, name, color, marker)
        curve.semilogy(valley.value(path), color=color, lw=2, label=name.split(":")[0])
    map_.legend(loc="upper right", fontsize="small")
    curve.legend(fontsize="small")
    curve.set_xlabel("step")
    curve.set_ylabel("f")
    return figure


@figure(
    "How much does momentum gain as the problem gets worse conditioned?",
    "error per step: (κ-1)/(κ+1) plain, (√κ-1)/(√κ+1) with momentum",
    "Polyak 1964; Goh 2017",
)
def condition() -> Any:
    """Plain gradient descent needs steps in proportion to κ, momentum only to √κ.

    Steps until the error is a millionth, each method at its best learning rate (and momentum), on
    quadratics of growing condition number κ. Dots are counted in runs, lines predicted by the
    contraction; momentum's lie up to 1.4 times above, as its error first grows like t * r^t.
    """
    kappas = np.array([2, 4, 10, 30, 100, 300, 1000])
    figure, ax = canvas(size=(9, 4.4))
    plain: list[int] = []
    heavy: list[int] = []
    for kappa in kappas:
        q = Quadratic(np.linspace(1, kappa, 9))
        best = q.best_momentum
        for counts, lr, mu in ((plain, q.best_rate, 0.0), (heavy, best.lr, best.momentum)):
            error = np.linalg.norm(q.simulate(np.ones(9), lr, 10 * kappa + 60, mu), axis=1)
            counts.append(np.flatnonzero(error > 3e-6)[-1] + 1)
    fine = np.geomspace(2, 1000, 100)
    ax.loglog(fine, np.log(1e-6) / np.log((fine - 1) / (fine + 1)), color=RED)
    ax.loglog(kappas, plain, "o", color=RED)
    root = np.sqrt(fine)
    ax.loglog(fine, np.log(1e-6) / np.log((root - 1) / (root + 1)), color=BLUE)
    ax.loglog(kappas, heavy, "s", color=BLUE)
    ax.text(60, 900, "plain: about 7 κ", color=RED, ha="right")
    ax.text(200, 40, "momentum: about 7 √κ", color=BLUE, ha="center")
    ax.set_xlabel("condition number κ")
    ax.set_ylabel("steps to 1e-6 of the error")
    return figure


@figure(
    "What does Nesterov's momentum do differently?",
    "v ← mu * v + g(x - lr * mu * v),  x ← x - lr * v",
    "Nesterov 1983; Sutskever et al. 2013",
)
def nesterov() -> Any:
    """Nesterov looks where momentum will carry it, brakes sooner, and overshoots less.

    Momentum 0.95 for both, on the same quadratic. The gradient at the look-ahead point already
    shows the opposite wall of the valley. Crosses: the same method in its original form, with the
    gradient taken inside `opt.lookahead()`, seen from its look-ahead points; they lie on the line.
    """
    valley = replace(landscapes.ravine(condition=20), xlim=(-11.0, 8.0))
    lr, mu, start, steps = 0.02, 0.95, (-10.0, 1.5), 100
    figure, (map_, curve) = canvas(1, 2, size=(11, 4.2), width_ratios=(3, 2))
    valley.plot(map_)
    heavy = trajectory(lambda x: fs.SGD(x, lr=lr, momentum=mu), valley, start, steps)
    ahead = trajectory(lambda x: fs.SGD(x, lr=lr, momentum=mu, nesterov=True), valley, start, steps)
    walk(map_, heavy[:60], "momentum", RED)
    walk(map_, ahead[:60], "Nesterov", BLUE)
    original = trajectory(
        lambda x: fs.SGD(x, lr=lr, momentum=mu), valley, start, steps, lookahead=True
    )
    seen = original[1:] + mu * np.diff(original, axis=0)  # x - lr*mu*v, as x moves by -lr*v
    map_.plot(*seen[:59].T, "x", color="k", ms=5, label="its original form, looking ahead")
    map_.legend(loc="upper right", fontsize="small")
    for path, name, color in ((heavy, "momentum", RED), (ahead, "Nesterov", BLUE)):
        too_far = path[:, 0].max()
        curve.plot(path[:, 0], color=color, lw=2, label=f"{name}: {too_far:.1f} too far")
    curve.axhline(0, color=GREY, lw=1)
    curve.legend()
    curve.set_xlabel("step")
    curve.set_ylabel("x (the minimum is at 0)")
    return figure


@figure(
    "What holds gradient descent at a saddle, and what gets it away?",
    "f = x^2/2 - y^2/2 + y^4/4, gradient 0 at the saddle (0, 0)",
    "Dauphin et al. 2014",
)
def saddle() -> Any:
    """The nearer to a saddle's ridge it starts, the longer gradient descent waits; Adam does not.

    Left: 60 steps from a thousandth beside the ridge, the line y = 0 that leads into the saddle.
    Right: steps until half of the way down, by the distance from the ridge at the start. A step of
    plain gradient descent multiplies it by 1 + lr, so that the wait is about log(1/distance) /
    log(1 + lr): long at a small rate, short at 0.9, near the largest stable one, and at any rate
    longer the nearer it starts. Momentum has a larger factor and the same law. RMSProp and Adam
    divide by the gradient's size: their rate alone sets their wait. On the ridge itself none would
    ever leave.
    """
    land = landscapes.saddle()
    runs = {
        "plain, lr 0.1": (lambda x: fs.SGD(x, lr=0.1), RED, "o"),
        "plain, lr 0.9": (lambda x: fs.SGD(x, lr=0.9), PURPLE, "D"),
        "momentum 0.9, lr 0.1": (lambda x: fs.SGD(x, lr=0.1, momentum=0.9), BLUE, "s"),
        "RMSProp, lr 0.01": (lambda x: fs.RMSprop(x, lr=0.01), GREEN, "^"),
        "Adam, lr 0.1": (lambda x: fs.Adam(x, lr=0.1), ORANGE, "v"),
    }
    figure, (map_, waits) = canvas(1, 2, size=(11, 4.8))
    land.plot(map_)
    map_.plot(0, 0, "X", color="k", ms=9, mec="w", zorder=5)
    map_.annotate("saddle", (0, 0), (0, -20), textcoords="offset points", ha="center")
    distances = np.geomspace(1e-9, 0.1, 9)
    for name, (make, color, marker) in runs.items():
        walk(map_, trajectory(make, land, land.start, steps=60), name, color, marker)
        half = []
        for distance in distances:
            f = land.value(trajectory(make, land, (-1.5, distance), steps=250))
            half.append(np.flatnonzero(f > -0.125)[-1] + 1)
        waits.semilogx(distances, half, color=color, marker=marker, ms=5, label=name)
    map_.legend(fontsize="small", loc="lower right")
    waits.invert_xaxis()
    waits.minorticks_off()
    waits.set_ylim(0, 250)
    waits.legend(fontsize="small", loc="upper left")
    waits.set_xlabel("distance from the ridge at the start (nearer to the right)")
    waits.set_ylabel("steps until half way down")
    return figure


@figure(
    "Does the optimizer have to stay in the first minimum it meets?",
    "df/dx = (x + 1)(x - 1/5)(x - 1): a local minimum at x = 1, the global one at x = -1",
    "Polyak 1964; Qian 1999",
)
def local_minimum() -> Any:
    """Momentum carries through a shallow minimum in which plain gradient descent stays.

    Same start, same rate, 0.05. What momentum has gathered on the slope takes it over the barrier
    at x = 0.2 and down to the global minimum. It is no guarantee, either way: plain gradient
    descent at rate 0.7 jumps the barrier, and momentum 0.99 at this rate swings back over it and
    settles in the local minimum.
    """
    land = landscapes.two_minima()
    figure, (map_, curve) = canvas(1, 2, size=(11, 4.4))
    land.plot(map_)
    for name, mu, color, marker in (("plain", 0.0, RED, "o"), ("momentum 0.9", 0.9, BLUE, "s")):
        path = trajectory(partial(fs.SGD, lr=0.05, momentum=mu), land, land.start, 150)
        walk(map_, path, name, color, marker)
        curve.plot(path[:, 0], color=color, lw=2)
        curve.annotate(f"{name}: f = {land.value(path[-1]):.3f}", (150, path[-1, 0]), (0, 10),
                       textcoords="offset points", color=color, ha="right")  # fmt: skip
    for x, name in ((1.0, "local minimum"), (0.2, "barrier"), (-1.0, "global minimum")):
        curve.axhline(x, color=GREY, lw=1, ls=":")
        curve.text(150, x - 0.06, name, color=GREY, fontsize="small", ha="right", va="top")
    map_.legend()
    curve.set_ylim(-1.8, 1.8)
    curve.set_xlabel("step")
    curve.set_ylabel("x")
    return figure


@figure(
    "What if there is hardly a gradient at all?",
    "f = 1 - exp(-(x^2 + y^2)/2): the gradient falls faster than any power of the distance",
    "Hochreiter 1998 (vanishing gradients)",
)
def plateau() -> Any:
    """On a plateau a step as long as the gradient goes nowhere; one divided by it walks off.

    The gradient at the start is 0.005 long. Plain gradient descent at rate 1, the best in the pit
    itself, seems to have stopped for 60 steps. Momentum gathers speed, too much of it in the end.
    Adam's first steps are as long as its rate, 0.1, in each element, whatever the gradient.
    """
    land = landscapes.plateau()
    runs = {
        "plain, lr 1": (lambda x: fs.SGD(x, lr=1.0), RED, "o"),
        "momentum 0.9, lr 1": (lambda x: fs.SGD(x, lr=1.0, momentum=0.9), BLUE, "s"),
        "Adam, lr 0.1": (lambda x: fs.Adam(x, lr=0.1), ORANGE, "v"),
    }
    figure, (map_, curve) = canvas(1, 2, size=(11, 4.2))
    land.plot(map_)
    for name, (make, color, marker) in runs.items():
        path = trajectory(make, land, land.start, steps=100)
        walk(map_, path, name, color, marker)
        if name.startswith("momentum"):  # on the line of plain, which stays to be seen within it
            map_.lines[-1].set(linewidth=6, markersize=9, alpha=0.4, zorder=1.9)
        curve.plot(land.value(path), color=color, lw=2, label=name)
    curve.legend(fontsize="small", loc="upper right")
    curve.set_ylim(-0.03, 1.1)
    curve.set_xlabel("step")
    curve.set_ylabel("f")
    return figure


@figure(
    "Why does AdaGrad slow down in long runs, and RMSProp not?",
    "AdaGrad: s ← s + g^2;  RMSProp: v ← alpha * v + (1 - alpha) * g^2;"
    "  effective rate lr / √s, lr / √v",
    "Duchi, Hazan & Singer 2011; Tieleman & Hinton 2012",
)
def adagrad_rate() -> Any:
    """AdaGrad's rate dies, RMSProp's lives: it remembers only the last gradients.

    The rate that an element really moves with, under noisy gradients of size 1 that shrink to a
    tenth after 2,000 steps. AdaGrad's sum only grows, so that its rate falls like 1/√t and
    never comes back. RMSProp forgets: its rate stays, and rises when gradients become small.
    """
    rng = np.random.default_rng(0)
    steps = np.arange(1, 4001)
    gradients = rng.standard_normal(4000) * np.where(steps <= 2000, 1.0, 0.1)
    slow, quick = fs.Adagrad(np.zeros(1), lr=0.1), fs.RMSprop(np.zeros(1), lr=0.01)
    rates: dict[str, list[float]] = {"AdaGrad": [], "RMSProp": []}
    for g in gradients:
        slow.step(np.array([g]))
        quick.step(np.array([g]))
        rates["AdaGrad"].append(0.1 / np.sqrt(slow.state[0]["sum"][0]))
        rates["RMSProp"].append(0.01 / np.sqrt(quick.state[0]["square_avg"][0]))
    figure, ax = canvas(size=(9, 4.2))
    for (name, rate), color in zip(rates.items(), (RED, BLUE), strict=True):
        ax.semilogy(steps, rate, color=color, lw=2)
        ax.annotate(name, (4000, rate[-1]), (-4, 12), color=color, ha="right",
                    textcoords="offset points")  # fmt: skip
    ax.semilogy(steps[:2000], 0.1 / np.sqrt(steps[:2000]), ":", color="k")
    ax.text(1000, 0.0022, "0.1/√t", color="k")
    ax.axvline(2000, color=GREY, lw=1)
    ax.text(2020, 0.25, "from here gradients are a tenth", color=GREY)
    ax.set_ylim(1e-3, 0.4)
    ax.set_xlabel("step")
    ax.set_ylabel("effective rate")
    return figure


@figure(
    "How does a feature learn that occurs once in a hundred examples?",
    "AdaGrad: x_i ← x_i - lr * g_i / sqrt(sum of g_i^2 so far), element by element",
    "Duchi, Hazan & Singer 2011",
)
def sparse() -> Any:
    """AdaGrad learns rare features too; under SGD they wait for the frequent ones.

    A linear model of 100 features, from one that every second example has to one in 1,000, after
    2,000 examples one at a time; means of five runs and five features. Both at the rate, of nine
    tried, that leaves the least error in all. SGD's one rate must suit the frequent features, so
    that a rare one has moved little in its few examples, and yet is too large for their noise.
    AdaGrad gives each feature a rate by its own history.
    """
    frequency = np.geomspace(0.5, 0.001, 100)
    truth = np.random.default_rng(1).choice([-1.0, 1.0], 100)

    def errors(kind: Any, lr: float) -> Any:
        total = np.zeros(100)
        for seed in range(5):
            rng, w = np.random.default_rng(seed), np.zeros(100)
            opt = kind(w, lr=lr)
            for x in (rng.random((2000, 100)) < frequency).astype(float):
                opt.step(x * (x @ (w - truth) + 0.5 * rng.standard_normal()))
            total += np.abs(w - truth) / 5
        return total.reshape(20, 5).mean(1)

    figure, ax = canvas(size=(9, 4.2))
    for kind, name, rates_, color, marker in (
        (fs.SGD, "SGD", np.geomspace(0.02, 0.2, 9), RED, "o"),
        (fs.Adagrad, "AdaGrad", np.geomspace(0.1, 2, 9), BLUE, "s"),
    ):
        tried = [(errors(kind, lr), lr) for lr in rates_]
        best, lr = min(tried, key=lambda one: float(np.linalg.norm(one[0])))
        ax.semilogx(frequency[2::5], best, marker=marker, color=color, label=f"{name}, lr {lr:.2g}")
    ax.axhline(1, color=GREY, ls=":", lw=1)
    ax.text(0.4, 1.02, "nothing learned", color=GREY, va="bottom")
    ax.invert_xaxis()
    ax.set_ylim(0, 1.15)
    ax.set_xlabel("share of examples that have the feature (rarer to the right)")
    ax.set_ylabel("error of its weight")
    ax.legend(loc="upper center")
    return figure


@figure(
    "What are Adam's bias corrections for?",
    "m / (1 - beta1^t) and v / (1 - beta2^t);  without them the first step is"
    " (1 - beta1)/sqrt(1 - beta2) = 3.2 lr, and later ones up to twice that",
    "Kingma & Ba 2015, section 3",
)
def bias_correction() -> Any:
    """Without bias correction Adam's first hundred steps are several times too long.

    The step that each form takes, as a multiple of its learning rate, under gradients that are
    always 1 (lines) or noisy (dots). Both averages start at 0: m has nine tenths of its value after
    22 steps, v only after 2,302, and a step is m/√v.
    """
    rng = np.random.default_rng(0)
    noisy = 1 + 0.5 * rng.standard_normal(100)
    figure, ax = canvas(size=(9, 4.2))
    for correct, name, color in ((True, "with", BLUE), (False, "without", RED)):
        for gradients, style in ((np.ones(100), "-"), (noisy, ".")):
            x = np.zeros(1)
            opt = fs.Adam(x, lr=1.0, bias_correction=correct)
            places = [0.0]
            for g in gradients:
                opt.step(np.array([g]))
                places.append(float(x[0]))
            lengths = -np.diff(places)
            kind = "gradients 1" if style == "-" else "noisy"
            ax.plot(range(1, 101), lengths, style, color=color, lw=2,
                    label=f"{name} bias correction, {kind}")  # fmt: skip
            if style == "-" and not correct:
                at = lengths.argmax()
                ax.annotate(f"{lengths[at]:.1f} times lr at step {at + 1}", (at + 1, lengths[at]),
                            (8, 6), textcoords="offset points", color=color)  # fmt: skip
    ax.set_ylim(0, 7.5)
    ax.set_xlabel("step")
    ax.set_ylabel("length of the step / lr")
    ax.legend()
    return figure


@figure(
    "Can Adam converge to the wrong place?",
    "f_t(x) = 1010 x at every 101st step, else -10 x, on [-1, 1]: the sum falls to its minimum"
    " at x = -1. AMSGrad: v_max ← max(v_max, v)",
    "Reddi, Kale & Kumar 2018, section 5",
)
def amsgrad() -> Any:
    """Adam walks to the worst point of this problem; AMSGrad, with a longer memory, to the best.

    The counter-example of the AMSGrad paper. The rare large gradient is right, but Adam divides it
    by its own size and soon forgets it, while the many small wrong ones push on. AMSGrad keeps the
    largest v it has seen, and the small ones then count for little. The parameter is put back into
    [-1, 1] after each step; lr = 0.5/√t, betas = (0.9, 0.99). The example depends on beta2: at
    0.999 Adam remembers the large gradient until the next, and ends at -0.41.
    """
    steps = 100_000
    figure, ax = canvas(size=(9, 4))
    for keep, name, color in ((False, "Adam", RED), (True, "AMSGrad", BLUE)):
        x = np.zeros(1)
        opt = fs.Adam(x, lr=lambda t: 0.5 / (t + 1) ** 0.5, betas=(0.9, 0.99), amsgrad=keep)
        large, small = np.array([1010.0]), np.array([-10.0])
        path = []
        for t in range(1, steps + 1):
            opt.step(large if t % 101 == 1 else small)
            x[0] = min(max(x[0], -1), 1)
            path.append(float(x[0]))
        ax.plot(np.arange(1, steps + 1)[::50], path[::50], color=color, lw=2)
        ax.annotate(f"{name}: x = {path[-1]:.2f}", (steps, path[-1]), (-6, 10 if keep else -14),
                    color=color, ha="right", textcoords="offset points")  # fmt: skip
    for x_, name in ((-1, "best"), (1, "worst")):
        ax.axhline(x_, color=GREY, lw=1, ls=":")
        ax.text(20_000, x_ + (0.05 if x_ > 0 else -0.15), name, color=GREY)
    ax.set_ylim(-1.25, 1.25)
    ax.set_xlabel("step")
    ax.set_ylabel("x")
    return figure


@figure(
    "How do Adam's relatives take the same ravine?",
    "each element's step is divided by a size of its own recent gradients",
    "Kingma & Ba 2015 (AdaMax); Dozat 2016 (Nadam); Zeiler 2012 (AdaDelta)",
)
def relatives() -> Any:
    """Adaptive methods see no ravine: their paths hardly depend on how curved it is across.

    The ravine of the momentum figure, curvature 50 across; black dots: the same methods where it is
    5. Map: 60 steps; curve: 200. Where the axes are the ravine's, dividing by each element's own
    gradients cancels its curvature; plain gradient descent jitters at 50 and does not at 5. Of the
    three with a rate Nadam swings least across the floor and Adam most, at any from 0.05 to 0.4.
    AdaDelta has no rate to choose, but its eps sets its first steps: 1e-4 here; at 1e-6, the
    default, it would hardly have moved. Run on, Nadam swings out again, to f = 18 at step 465: as
    its average forgets the steep first gradients, its rate across grows until it is unstable.
    """
    valley, wide = landscapes.ravine(condition=50), landscapes.ravine(condition=5)
    runs = {
        "Adam, lr 0.3": (lambda x: fs.Adam(x, lr=0.3), ORANGE, "v"),
        "Nadam, lr 0.3": (lambda x: fs.NAdam(x, lr=0.3), PURPLE, "^"),
        "AdaMax, lr 0.3": (lambda x: fs.Adamax(x, lr=0.3), GREEN, "s"),
        "AdaDelta, eps 1e-4": (lambda x: fs.Adadelta(x, eps=1e-4), SKY, "D"),
        "plain, lr 0.038": (lambda x: fs.SGD(x, lr=0.038), RED, "o"),
    }
    figure, (map_, curve) = canvas(1, 2, size=(11, 4.4), width_ratios=(3, 2))
    valley.plot(map_)
    for name, (make, color, marker) in runs.items():
        path = trajectory(make, valley, valley.start, steps=200)
        walk(map_, path[:61], name, color, marker)
        dots = trajectory(make, wide, valley.start, steps=60)[::2]
        label = "curvature across 5, not 50" if name.startswith("plain") else None
        map_.plot(*dots.T, ".", color="k", ms=3.5, label=label)
        curve.semilogy(valley.value(path), color=color, lw=2, label=name)
    map_.legend(loc="upper right", fontsize="small")
    curve.set_ylim(1e-10, 200)
    curve.set_xlabel("step")
    curve.set_ylabel("f")
    return figure


@figure(
    "How should the learning rate change during training?",
    "each a closed form of the step t; see `fusedstep.schedules`",
    "Loshchilov & Hutter 2017 (cosine, restarts); Smith 2017 (cyclic); Smith & Topin 2018"
    " (one cycle); Hu et al. 2024 (WSD)",
)
def schedules() -> Any:
    """Every schedule: most begin with large steps, to get far, and end with small ones, to settle.

    The learning rate over 100 steps. Dashed: the momentum that goes with it, on a scale of 0 to 1.
    The last row shows a schedule that follows a metric, and what schedules are made into.
    """
    s = fs.schedules
    plateau = s.ReduceOnPlateau(1.0, factor=0.5, patience=5)
    loss = np.maximum(np.exp(-np.arange(101) / 20), 0.1)
    reduced = np.array([plateau.step(one) for one in loss])
    cycle = s.OneCycle(1.0, total=100)
    waves = s.Cyclic(0.1, 1.0, step_size_up=15, step_size_down=10, mode="triangular2")
    drawn = {
        "Constant": s.Constant(0.8),
        "Step": s.Step(1.0, every=25, factor=0.4),
        "MultiStep": s.MultiStep(1.0, milestones=[50, 75], factor=0.3),
        "Exponential": s.Exponential.percent(1.0, alpha=3),
        "Linear": s.Linear(1.0, total=100),
        "Polynomial, power 2": s.Polynomial(1.0, total=100, power=2.0),
        "Cosine": s.Cosine(1.0, total=100),
        "CosineRestarts, mult 2": s.CosineRestarts(1.0, period=14, mult=2),
        "InverseSqrt": s.InverseSqrt(1.0, timescale=10),
        "WSD, 1-sqrt": s.WSD(1.0, total=100, decay=30, shape="1-sqrt"),
        "OneCycle": cycle,
        "Cyclic, triangular2": waves,
        "ReduceOnPlateau": reduced,
        "Cosine.warmup(10)": s.Cosine(1.0, total=90).warmup(10),
        "Linear.then(Cosine, at=40)": s.Linear(1.0, 40, end=0.5).then(s.Cosine(0.5, 60), at=40),
        "Exponential * 0.5": s.Exponential(1.0, 0.97) * 0.5,
    }
    t = np.arange(101)
    figure, axes = canvas(4, 4, size=(11, 7.5), sharex=True, sharey=True)
    for ax, (name, schedule) in zip(axes.flat, drawn.items(), strict=True):
        steps = {"drawstyle": "steps-post"} if "tep" in name or "Plateau" in name else {}
        ax.plot(t, schedule(t) if callable(schedule) else schedule, color=BLUE, lw=2, **steps)
        ax.set_title(name, fontsize="medium")
        if hasattr(schedule, "momentum"):
            ax.plot(t, schedule.momentum(t), "--", color=RED, lw=1.2)
    axes[3, 0].plot(t, loss, ":", color=GREY)
    axes[3, 0].text(30, 0.3, "loss", color=GREY)
    for ax, x, y in ((axes[2, 2], 60, 0.99), (axes[2, 3], 48, 0.68)):
        ax.text(x, y, "momentum", color=RED, fontsize="small")
    for ax in axes[-1]:
        ax.set_xlabel("step")
    for ax in axes[:, 0]:
        ax.set_ylabel("rate")
    return figure


def noisy_digits() -> demo.Digits:
    """The digits, every tenth label of the training set replaced by the next digit."""
    data = demo.Digits.load()
    data.train_y[::10] = (data.train_y[::10] + 1) % 10
    return data


def train_digits(
    data: demo.Digits, lr: fs.schedules.Schedule, epochs: int, batch: int, seed: int
) -> list[float]:
    """Training loss after each epoch of SGD with momentum."""
    params, rng = demo.init(seed), np.random.default_rng(seed)
    grads = params.zeros_like()
    opt = fs.SGD(params, lr=lr, momentum=0.9)
    losses = [demo.loss_and_gradient(params, data.train_x, data.train_y, grads)]
    for _ in range(epochs):
        for chosen in demo.batches(rng, len(data.train_y), batch):
            demo.loss_and_gradient(params, data.train_x[chosen], data.train_y[chosen], grads)
            opt.step(grads)
        losses.append(demo.loss_and_gradient(params, data.train_x, data.train_y, grads))
    return losses


@figure(
    "What does a schedule do to the loss of a real training run?",
    "noise floor of SGD: proportional to the learning rate",
    "He et al. 2016 (step decay); Loshchilov & Hutter 2017 (cosine)",
    train_digits,
    noisy_digits,
)
def digits() -> Any:
    """Under step decay the loss falls in stages, under cosine smoothly; both end below constant.

    A small network on handwritten digits, momentum 0.9, batches of 8; means of three runs. One
    image in ten has a wrong label, so that gradients stay noisy: at a constant rate the loss stops
    at a floor that the noise sets, and each cut of the rate (dotted) lowers the floor at once.
    """
    data, epochs, batch = noisy_digits(), 24, 8
    per_epoch = len(data.train_y) // batch
    total = epochs * per_epoch
    runs = {
        "constant": (fs.schedules.Constant(0.08), RED, "o"),
        "step decay": (fs.schedules.Step(0.08, every=total // 4, factor=0.3), ORANGE, "v"),
        "cosine": (fs.schedules.Cosine(0.08, total), BLUE, "s"),
    }
    figure, (top, below) = canvas(2, 1, size=(9, 6), sharex=True, height_ratios=(3, 1))
    for name, (lr, color, marker) in runs.items():
        losses = np.mean([train_digits(data, lr, epochs, batch, seed) for seed in range(3)], axis=0)
        top.plot(losses, color=color, marker=marker, ms=4, lw=2,
                 label=f"{name}: {losses[-1]:.2f} in the end")  # fmt: skip
        below.plot(np.arange(total) / per_epoch, lr(range(total)), color=color, lw=2)
    for cut in (6, 12, 18):
        top.axvline(cut, color=ORANGE, lw=1, ls=":")
    top.set_ylim(0, 1)
    top.legend()
    top.set_ylabel("training loss")
    below.set_ylabel("rate")
    below.set_xlabel("epoch")
    return figure


@figure(
    "Which learning rate should I start with?",
    "lr_i = start * (end/start)^(i/(steps-1)), one training step at each",
    "Smith 2017, section 3.3",
)
def range_test() -> Any:
    """One short run over all rates shows where learning begins and where it blows up.

    The digits network, 150 batches, the rate growing from 1e-4 to 30. Below some 0.01 nothing
    happens yet; the loss falls fastest at the dashed line, and from the dotted one on it rises
    until it blows up. A rate between the two, a few times below the second, is a good start.
    Afterwards the network is what it was, bit for bit.
    """
    data, params, rng = demo.Digits.load(), demo.init(), np.random.default_rng(0)
    grads = params.zeros_like()
    opt = fs.SGD(params, lr=0.1)

    def step(lr: float) -> float:
        chosen = rng.choice(len(data.train_y), 64)
        loss = demo.loss_and_gradient(params, data.train_x[chosen], data.train_y[chosen], grads)
        opt.param_groups[0]["lr"] = lr
        opt.step(grads)
        return loss

    found = lr_range_test(step, opt, start=1e-4, end=30.0, steps=150)
    figure, ax = canvas(size=(9, 4.2))
    found.plot(ax)
    return figure


def squared_error(p: fs.FlatBuffer, x: Any, y: Any, grads: fs.FlatBuffer) -> float:
    """Half the mean squared error of the demo's network, with tanh for the ramp; its gradient."""
    hidden = np.tanh(x @ p["w1"] + p["b1"])
    back = (hidden @ p["w2"] + p["b2"] - y) / len(y)
    grads["w2"], grads["b2"] = hidden.T @ back, back.sum(0)
    inner = (back @ p["w2"].T) * (1 - hidden**2)
    grads["w1"], grads["b1"] = x.T @ inner, inner.sum(0)
    return float(0.5 * (back**2).sum() * len(y))


@figure(
    "Where does the stable rate come from in a network, whose curvature changes as it learns?",
    "gradient descent is stable below lr = 2/λ_max of the Hessian where it stands",
    "Cohen et al. 2021, Gradient descent on neural networks typically occurs at the edge of"
    " stability",
    squared_error,
)
def edge() -> Any:
    """Training sharpens the loss until 2/λ_max is the learning rate, and then stays there.

    The largest Hessian eigenvalue of a small tanh network on 400 digits, by Lanczos' method, during
    full-batch gradient descent at two rates. It rises while that is stable, up to 2/lr, the dashed
    lines, and then hovers there: the rate chooses how sharp a minimum can be.
    """
    data = demo.Digits.load()
    x = data.train_x[:400] - data.train_x[:400].mean(0)
    y = np.eye(10, dtype=np.float32)[data.train_y[:400]] - np.float32(0.1)
    figure, ax = canvas(size=(9, 4.2))
    for lr, color in ((0.4, BLUE), (0.8, RED)):
        params = demo.init()
        params.flat[...] *= 0.5
        grads = params.zeros_like()

        def gradient(p: fs.FlatBuffer, grads: fs.FlatBuffer = grads) -> fs.FlatBuffer:
            squared_error(p, x, y, grads)
            return grads

        opt = fs.SGD(params, lr=lr)
        sharpness = []
        for t in range(2001):
            if t % 125 == 0:
                sharpness.append(curvature(gradient, params, tol=1e-2).largest)
            opt.step(gradient(params))
        ax.plot(range(0, 2001, 125), sharpness, "o-", color=color, ms=4)
        ax.axhline(2 / lr, color=color, ls="--", lw=1)
        ax.text(2000, 2 / lr - 0.06, f"2/lr at lr = {lr:g}", color=color, ha="right", va="top")
    ax.set_xlabel("step")
    ax.set_ylabel("largest eigenvalue of the Hessian")
    ax.set_ylim(0, 6)
    return figure


def train_16_bits(data: demo.Digits, rounding: Rounding | None, epochs: int) -> list[float]:
    """Training loss after each epoch of SGD at a small rate, by the weights as they are stored."""
    rng, work = np.random.default_rng(0), demo.init()
    grads = work.zeros_like()
    params = work.zeros_like(np.float32 if rounding is None else "bfloat16")
    params.flat[...] = work.flat
    opt = fs.SGD(params, lr=2e-3, rounding=rounding or "nearest")
    losses = []
    for _ in range(epochs):
        for chosen in demo.batches(rng, len(data.train_y), 32):
            work.flat[...] = params.flat
            demo.loss_and_gradient(work, data.train_x[chosen], data.train_y[chosen], grads)
            opt.step(grads)
        work.flat[...] = params.flat
        losses.append(demo.loss_and_gradient(work, data.train_x, data.train_y, grads))
    return losses


@figure(
    "Can weights of 16 bits learn by steps that are far smaller than the gaps between them?",
    "nearest: p ← bf16(p - u), which is p for |u| < ulp/2;  stochastic: the upper neighbour with"
    " probability (x - lower)/ulp;  kahan: p + c is kept;  split: the float32's lower half is",
    "Kahan 1965; Gupta et al. 2015; Zamirai et al. 2020, Revisiting BFloat16 training",
    train_16_bits,
)
def roundings() -> Any:
    """Rounded to nearest, small steps are lost; rounded at random or with a rest kept, none is.

    Left: a bfloat16 weight at 1, where the next is 0.0078 away, under 400 steps of 0.0001. Rounded
    to nearest, each step leaves it where it was. Rounded at random it moves seldom, and by a whole
    gap; the mean of 256 such weights is the line that float32 draws. kahan and split keep what
    rounding left, so that the weight moves when that has grown to half a gap. Right: the digits
    network under SGD at rate 0.002, its loss by the weights as they are stored.
    """
    ways: dict[Rounding | None, tuple[str, str]] = {
        None: (GREY, "-"),
        "nearest": (RED, "-"),
        "stochastic": (ORANGE, "-"),
        "kahan": (GREEN, "-"),
        "split": (BLUE, "--"),
    }
    data = demo.Digits.load()
    figure, (weight, loss) = canvas(1, 2, size=(11, 4.4))
    for rounding, (color, style) in ways.items():
        params = fs.FlatBuffer.zeros({"w": 256}, np.float32 if rounding is None else "bfloat16")
        params["w"][...] = 1
        opt = fs.SGD(params, lr=1e-4, rounding=rounding or "nearest")
        path = [params["w"].astype(float)]
        for _ in range(400):
            opt.step(-np.ones(256, np.float32))
            path.append(params["w"].astype(float))
        look: dict[str, Any] = {"color": color, "ls": style, "lw": 2 if rounding else 5}
        weight.plot([p[0] for p in path], label=rounding or "float32", **look)
        if rounding == "stochastic":
            mean = np.mean(path, axis=1)
            weight.plot(mean, ":", color=color, lw=3, label="mean of 256 stochastic")
        loss.plot(
            range(1, 13), train_16_bits(data, rounding, 12), label=rounding or "float32", **look
        )
    weight.set_xlabel("step")
    weight.set_ylabel("the weight as it is stored")
    loss.set_xlabel("epoch")
    loss.set_ylabel("training loss")
    for ax in (weight, loss):
        ax.legend(fontsize="small")
    return figure
