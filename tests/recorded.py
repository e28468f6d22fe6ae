"""What other libraries' optimizers did, recorded from them (tests/golden), and the same of ours."""

import json
from pathlib import Path

import numpy as np

import fusedstep as fs

GOLDEN = Path(__file__).parent / "golden"
INPUTS = json.loads((GOLDEN / "inputs.json").read_text())


LATE = ("optax", "rprop")

# What computes scalars of a step in float32 under float64 parameters too.
NARROW = {("keras", "Nadam"), ("mlx", "Adam"), ("mlx", "AdamW"), ("tf1", "AdamOptimizer")}


def recorded():
    """Every case that ours are meant to repeat: its library, and what was recorded."""
    for path in sorted(GOLDEN.glob("*.json")):
        found = json.loads(path.read_text())
        for k, case in enumerate(found.get("cases", ())):
            label = f"{found['library']}-{k}-{case['optimizer']}-{case['dtype']}"
            if (found["library"], case["optimizer"]) != LATE:
                yield label, found["library"], case


def convention(library, name):
    return getattr(getattr(fs.conventions, library), name)


def as_given(library, case):
    """A case as ours: the name, its arguments, the rate as a schedule, and those of step."""
    name, rates = case["optimizer"], case["rates"]
    given = {**case["arguments"], case["rate"]: lambda t: rates[min(t, len(rates) - 1)]}
    if "first_T" in case:  # ONNX's, of which it is an input of each step
        given["T"] = case["first_T"]
    # What clips is an argument of our step. What bitsandbytes ignores ours refuse.
    clip = given.pop("grad_clip", {}).get("ClipGradByGlobalNorm", {}).get("clip_norm")
    clip = given.pop("global_clipnorm", clip)
    if library == "bitsandbytes":
        ignored = {"nesterov", "dampening", "amsgrad"} | (
            {"momentum"} if name == "RMSprop" else set()
        )
        given = {key: value for key, value in given.items() if key not in ignored}
    # optax.chain(...): what comes before the optimizer, or between its buffer and its rate.
    clip = case.get("before", {}).get("clip_by_global_norm", {}).get("max_norm", clip)
    given |= case.get("before", {}).get("add_decayed_weights", {})
    if "between" in case:
        name, given["momentum"] = "sgd", given.pop("decay")
        given |= {**case["between"]["add_decayed_weights"], "decoupled_weight_decay": True}
    return name, given, {"max_norm": clip}


def steps(library, case, dtype):
    """The parameters before and after each step of the case, as ours take it."""
    p = np.array(INPUTS["start"], dtype)
    name, given, how = as_given(library, case)
    opt = convention(library, name)(p, **given)
    yield p.astype(np.float64)
    for g in INPUTS["gradients"]:
        opt.step(np.array(g, dtype), **how)
        yield p.astype(np.float64)


def pairs(library, case):
    """After each recorded step: its number, the library's elements, ours, and all began as."""
    found = list(steps(library, case, np.dtype(case["dtype"])))
    # But for those that the case excepts: the library's own peculiarity, see its recording script.
    compared = np.delete(np.arange(INPUTS["n"]), case.get("except", []))
    for t, after in case["after"].items():
        yield (
            int(t),
            np.array(after, np.float64)[compared],
            found[int(t)][compared],
            found[0][compared],
        )


def difference(library, case):
    """The largest difference after any recorded step, as a share of the way gone by then."""
    return max(
        np.abs(ours - theirs).max() / np.abs(theirs - start).max()
        for _, theirs, ours, start in pairs(library, case)
    )


def is_exact(library, case):
    """Whether both sides compute the same numbers, but for rounding."""
    clipped = as_given(library, case)[2]["max_norm"] is not None
    return not clipped and (library, case["optimizer"]) not in NARROW


def table():
    """A line for each library: its version, its optimizers, the largest differences."""
    lines = [
        "| library | version | optimizers | cases | float32 | float64 |",
        "|---|---|---|---|---|---|",
    ]
    for library in sorted({library for _, library, _ in recorded()}):
        path = GOLDEN / f"{library}.json"
        cases = [case for _, name, case in recorded() if name == library]
        names = ", ".join(dict.fromkeys(case["optimizer"] for case in cases))
        cells = [library, json.loads(path.read_text())["version"], names, str(len(cases))]
        for dtype in ("float32", "float64"):
            found = [
                difference(library, case)
                for case in cases
                if case["dtype"] == dtype and (dtype == "float32" or is_exact(library, case))
            ]
            cells.append(f"{max(found):.0e}" if found else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])
