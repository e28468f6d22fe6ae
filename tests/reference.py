"""Each optimizer's equation as its paper has it, in NumPy; written apart from the C++ rules.

A rule takes the parameter, the gradient, the states (arrays, and the numbers that a rule carries
along) before update number t, and the hyperparameters; it returns the parameter and the states
after. float32 is checked in float64, float64 in NumPy's long double.
"""

from types import SimpleNamespace

import ml_dtypes
import numpy as np

import fusedstep as fs
from cases import defaults


def sgd(p, g, state, t, h):  # Polyak 1964; Sutskever et al. 2013
    if h.momentum == 0:
        return p - h.lr * g, {}
    rate = h.lr
    if h.lr_in_momentum:
        g, rate = h.lr * g, 1
    first = "momentum_buffer" not in state
    b = g if first and not h.dampen_first else (1 - h.dampening) * g
    if not first:
        b = h.momentum * state["momentum_buffer"] + b
    d = g + h.momentum * b if h.nesterov else b
    return p - rate * d, {"momentum_buffer": b}


def lion(p, g, state, t, h):  # Chen et al. 2023
    beta1, beta2 = h.betas
    m = state["exp_avg"]
    p = p - h.lr * np.sign(beta1 * m + (1 - beta1) * g)
    return p, {"exp_avg": beta2 * m + (1 - beta2) * g}


def adagrad(p, g, state, t, h):  # Duchi, Hazan, Singer 2011
    s = state["sum"] + g**2
    rate = h.lr / (1 + (t - 1) * h.lr_decay)
    return p - rate * g / (np.sqrt(s + h.eps_root) + h.eps), {"sum": s}


def rmsprop(p, g, state, t, h):  # Tieleman & Hinton 2012; centered: Graves 2013
    after = {"square_avg": h.alpha * state["square_avg"] + (1 - h.alpha) * g**2}
    bias = 1 - h.alpha**t if h.bias_correction else 1
    variance = after["square_avg"] / bias
    if h.centered:
        after["grad_avg"] = h.alpha * state["grad_avg"] + (1 - h.alpha) * g
        variance = variance - (after["grad_avg"] / bias) ** 2
    d = g / (np.sqrt(variance + h.eps_root) + h.eps)
    if h.momentum == 0:
        return p - h.lr * d, after
    rate = h.lr
    if h.lr_in_momentum:
        d, rate = h.lr * d, 1
    b = after["momentum_buffer"] = h.momentum * state["momentum_buffer"] + d
    return p - rate * (d + h.momentum * b if h.nesterov else b), after


def adadelta(p, g, state, t, h):  # Zeiler 2012
    s = h.rho * state["square_avg"] + (1 - h.rho) * g**2
    d = np.sqrt(state["acc_delta"] + h.eps) / np.sqrt(s + h.eps) * g
    a = h.rho * state["acc_delta"] + (1 - h.rho) * d**2
    return p - h.lr * d, {"square_avg": s, "acc_delta": a}


def moments(g, state, h):  # Kingma & Ba 2015, what the Adams share
    beta1, beta2 = h.betas
    m = beta1 * state["exp_avg"] + (1 - beta1) * g if beta1 else g
    v = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
    return m, v, {"exp_avg": m, "exp_avg_sq": v}


def adam(p, g, state, t, h):  # Kingma & Ba 2015; amsgrad: Reddi et al. 2018
    m, v, after = moments(g, state, h)
    if not h.betas[0]:
        del after["exp_avg"]  # which is the gradient
    bias1, bias2 = (1 - beta**t for beta in h.betas) if h.bias_correction else (1, 1)
    if h.amsgrad_corrected:
        v = v / bias2
    if h.amsgrad:
        v = after["max_exp_avg_sq"] = np.maximum(state["max_exp_avg_sq"], v)
    if not h.amsgrad_corrected:
        v = v / bias2
    eps = h.eps / np.sqrt(bias2) if h.eps_hat else h.eps
    return p - h.lr * m / bias1 / (np.sqrt(v + h.eps_root) + eps), after


def adamax(p, g, state, t, h):  # Kingma & Ba 2015
    beta1, beta2 = h.betas
    m = beta1 * state["exp_avg"] + (1 - beta1) * g
    u = np.maximum(beta2 * state["exp_inf"] + h.eps_norm, np.abs(g) + h.eps)
    bias1 = 1 - beta1**t if h.bias_correction else 1
    return p - h.lr / bias1 * m / (u + h.eps_divisor), {"exp_avg": m, "exp_inf": u}


def nadam(p, g, state, t, h):  # Dozat 2016
    mu, mu_next = (h.betas[0] * (1 - 0.5 * 0.96 ** (i * h.momentum_decay)) for i in (t, t + 1))
    m, v, after = moments(g, state, h)
    product = after["mu_product"] = (state["mu_product"] if t > 1 else 1) * mu
    d = np.sqrt(v / (1 - h.betas[1] ** t) + h.eps_root) + h.eps
    p = p - h.lr * (1 - mu) / (1 - product) * g / d
    return p - h.lr * mu_next / (1 - product * mu_next) * m / d, after


def radam(p, g, state, t, h):  # Liu et al. 2020
    beta1, beta2 = h.betas
    m, v, after = moments(g, state, h)
    step = h.lr * m / (1 - beta1**t)
    r_inf = 2 / (1 - beta2) - 1
    r_t = r_inf - 2 * t * beta2**t / (1 - beta2**t)
    if r_t > h.threshold:
        r = np.sqrt((r_t - 4) * (r_t - 2) * r_inf / ((r_inf - 4) * (r_inf - 2) * r_t))
        bias = np.sqrt(1 - beta2**t)
        eps = h.eps / bias if h.eps_hat else h.eps
        step = step * r / (np.sqrt(v / bias**2 + h.eps_root) + eps)
    return p - step, after


def asgd(p, g, state, t, h):  # Polyak & Juditsky 1992
    eta, mu = (state["eta"], state["mu"]) if t > 1 else (h.lr, 1)
    p = p * (1 - h.lambd * eta) - eta * g
    ax = p if mu == 1 else state["ax"] + mu * (p - state["ax"])
    eta, mu = h.lr / (1 + h.lambd * h.lr * t) ** h.alpha, 1 / max(1, t - h.t0)
    return p, {"ax": ax, "eta": eta, "mu": mu}


def rprop(p, g, state, t, h):  # Riedmiller & Braun 1993
    turned = np.sign(g * state["prev"])
    size = state["step_size"] if t > 1 else np.full_like(p, h.lr)
    size = size * np.where(turned > 0, h.etas[1], np.where(turned < 0, h.etas[0], 1))
    size = np.clip(size, *h.step_sizes)
    g = np.where(turned < 0, 0, g)
    return p - np.sign(g) * size, {"prev": g, "step_size": size}


RULES = {
    "SGD": sgd,
    "Lion": lion,
    "Adagrad": adagrad,
    "RMSprop": rmsprop,
    "Adadelta": adadelta,
    "Adam": adam,
    "AdamW": adam,
    "Adamax": adamax,
    "NAdam": nadam,
    "RAdam": radam,
    "ASGD": asgd,
    "Rprop": rprop,
}


def step(name, p, g, state, t, hypers):
    """Update number t of the optimizer class `name`: the parameter and the states after it."""
    h = SimpleNamespace(**{**getattr(fs, name)._spec.fixed, **defaults(name), **hypers})
    if h.maximize:
        g = -g
    kept = 1
    if getattr(h, "decoupled_weight_decay", False):
        kept = 1 - h.lr * h.weight_decay
    else:
        g = g + h.weight_decay * p
    if not getattr(h, "decay_after", False):
        p, kept = kept * p, 1
    p, after = RULES[name](p, g, state, t, h)
    return kept * p, after


def carried(name, t, hypers):
    """The numbers that a rule has carried along before update number t."""
    h = SimpleNamespace(**{**defaults(name), **hypers})
    if name == "NAdam":
        mus = [h.betas[0] * (1 - 0.5 * 0.96 ** (i * h.momentum_decay)) for i in range(1, t)]
        return {"mu_product": float(np.prod(mus))}
    if name == "ASGD":
        eta = h.lr / (1 + h.lambd * h.lr * (t - 1)) ** h.alpha
        return {"eta": eta, "mu": 1 / max(1, t - 1 - h.t0)}
    return {}


def ulp(x, dtype):
    """The distance between neighbours in `dtype` at the magnitude of `x`."""
    info = ml_dtypes.finfo(dtype)
    _, exponent = np.frexp(np.abs(x))  # of a magnitude in [1/2, 1)
    return np.ldexp(np.ones_like(x), np.maximum(exponent - 1, info.minexp) - info.nmant)
