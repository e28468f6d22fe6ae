"""tinygrad: `get_state_dict(optimizer)`, in memory or as `safe_save` writes it.

A state has the parameters, the rate, the moments by number, and of Adam `b1**t` and `b2**t`, from
which the count of steps follows. A fused optimizer has the moments of all parameters in one array.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fusedstep.convert import _common
from fusedstep.convert._common import Converted

_ADAM = {"m": "exp_avg", "v": "exp_avg_sq"}
# What each optimizer keeps of a parameter, by tinygrad's names and ours.
_KEPT: dict[str, dict[str, str]] = {
    "SGD": {"b": "momentum_buffer"},
    "Adam": _ADAM,
    "AdamW": _ADAM,
}
_POWERS = {"b1_t": "b1", "b2_t": "b2"}


def from_tinygrad(
    source: Any, params: Any = None, optimizer: str | None = None, *, step: int | None = None,
    **arguments: Any,
) -> Converted:  # fmt: skip
    """The state of a tinygrad optimizer.

    Args:
        source: `get_state_dict(optimizer)`, or the path of a `.safetensors` file with that.
        params: the parameters in the optimizer's order, in a dict by name or a list; arrays or
            shapes (default None: no names, and the state's own shapes).
        optimizer: "SGD", "Adam" or "AdamW" (default None: SGD, whose state is none of the others').
        step: the updates taken, which the state of SGD does not have (default None: those of the
            powers `b1_t` and `b2_t`).
        **arguments: what the optimizer was given, by tinygrad's names. `lr` may be left out, which
            the state has.

    Returns:
        The state_dict for `fs.<result.optimizer>`. `masters` has the parameters, as the state has.

    Raises:
        TypeError, ValueError: the state is of another optimizer, of several, of other arguments or
            parameters; or the file is not whole.
        OSError: the file cannot be opened.
        ModuleNotFoundError: safetensors is missing.

    Warns:
        UserWarning: neither `optimizer` nor `arguments` say what tinygrad has defaults for, which
            are taken. `result.assumed` has them in any case.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w, lr = np.ones(2, np.float32), np.array([0.1], np.float32)
        >>> state = {"params.0": w, "lr": lr, "b.0": w}
        >>> found = fs.convert.from_tinygrad(state, {"w": w}, "SGD", step=7, momentum=0.9)
        >>> opt = fs.SGD({"w": w})
        >>> opt.load_state_dict(found)
        >>> opt.steps, opt.param_groups[0]["lr"], opt.param_groups[0]["momentum"]
        (7, 0.1, 0.9)
    """
    wanted = _common.wanted(params)
    label, found = _common.tensors(source, "tinygrad's")
    if any(name.startswith("optimizers.") for name in found):
        raise ValueError(
            f"{label} must be of one optimizer, got OptimizerGroup's: convert each of optimizers"
        )
    trees: dict[str, dict[str, Any]] = {}
    for name, value in found.items():
        field, _, number = name.rpartition(".")
        if number.isdecimal() and field:
            trees.setdefault(field, {})[number] = value
    trees.pop("buffers", None)  # the model's, which no step changes
    masters = trees.pop("params", {})
    if not masters or "lr" not in found:
        raise ValueError(f"{label} must be a tinygrad optimizer's state, got {list(found)[:8]}")
    order = [str(i) for i in range(len(masters))]
    states = _common.gathered(label, {"params": masters}, {"params": "params"}, order, wanted)
    held = [states[i]["params"] for i in states]
    name = _named(optimizer, trees)
    kept = _KEPT[name] if name != "SGD" or trees else {}
    if trees.keys() != kept.keys():
        raise ValueError(f"{label} must have {', '.join(kept)} of {name}, got {', '.join(trees)}")
    convention = _common.convention("tinygrad", name)
    given = {"lr": _common.short(_common.values("lr", found["lr"])), **arguments}
    usual = _common.arguments(convention)
    config = {**usual, **given}
    if name == "SGD" and bool(config["momentum"]) != bool(kept):
        has = "b" if kept else "no b"
        raise ValueError(f"{label} must be of SGD with momentum={config['momentum']}, got {has}")
    assumed = _common.unsaid(label, "tinygrad's", usual, given, is_named=bool(optimizer))
    shapes = [values.shape for values in held]
    for field, tree in trees.items():
        if len(tree) == 1 and (len(order) > 1 or np.shape(tree["0"]) != shapes[0]):
            trees[field] = _parted(f"{label}: {field}.0", tree["0"], shapes)
    named = wanted.names if wanted and wanted.names else None
    wanted = _common.Wanted(named, shapes)
    states = _common.gathered(label, trees, kept, order, wanted)
    powers = {theirs: ours for theirs, ours in _POWERS.items() if ours in config}
    if missing := sorted(powers.keys() - found.keys()):
        raise ValueError(f"{label} must have {missing[0]} of {name}, got {list(found)[:8]}")
    for one in found.keys() - powers.keys() - {"lr"}:
        if not one.rpartition(".")[2].isdecimal():
            _common.check_unused(f"{label}: {one}", found[one], name)
    counts = {
        theirs: _common.power_of(f"{label}: {theirs}", found[theirs], ours, config[ours], step)
        for theirs, ours in powers.items()
    }
    steps = _common.agreed(label, counts, step)
    ours = _common.called(convention, given)
    groups = [_common.group(ours, range(len(order)), wanted)]
    result = _common.converted("tinygrad", name, ours.name, groups, states, steps, assumed=assumed)
    result.masters = dict(zip(named or range(len(order)), held, strict=True))
    return result


def to_tinygrad(
    state_dict: Any, *, optimizer: str | None = None, fused: bool = False
) -> dict[str, Any]:
    """A state_dict as the state of a tinygrad optimizer.

    Args:
        state_dict: of ours, of an optimizer whose equation tinygrad has, with all its states.
        optimizer: the name of our class, where `state_dict` is not one of `from_tinygrad` and the
            like (default None).
        fused: for an optimizer with `fused=True` (default False).

    Returns:
        Arrays of NumPy by tinygrad's names, for an optimizer with the same arguments:
        `load_state_dict(opt, {k: Tensor(v) for k, v in found.items()}, strict=False)`, which is not
        strict, as the parameters are left to the model. Without a rate in `state_dict` there is no
        `lr` in it.

    Raises:
        TypeError, ValueError: a state is missing, or tinygrad has no such equation.
    """
    mine = _common.optimizer_of(state_dict, optimizer)
    name, config = _common.equal_of("tinygrad", mine, state_dict)
    entries = _common.ordered(state_dict)
    steps, found = _common.steps_of(state_dict), {}
    if "lr" in entries[0][2]:
        found["lr"] = np.array([entries[0][2]["lr"]], np.float32)
    for theirs, ours in _POWERS.items():
        if ours in config:
            found[theirs] = np.array([_common.power_to(config[ours], steps, np.float32)])
    kept = {} if name == "SGD" and not config["momentum"] else _KEPT[name]
    for field, key in kept.items():
        arrays = [_common.need(state, key, i) for i, state, _ in entries]
        if fused:
            arrays = [np.concatenate([one.reshape(-1) for one in arrays])]
        found |= {f"{field}.{k}": one for k, one in enumerate(arrays)}
    return found


def _named(optimizer: str | None, trees: dict[str, Any]) -> str:
    """The optimizer's name; a state without moments is SGD's."""
    return "SGD" if optimizer is None and not trees else _common.named(optimizer, _KEPT, trees)


def _parted(label: str, flat: Any, shapes: list[tuple[int, ...]]) -> dict[str, Any]:
    """The arrays that lie in a fused optimizer's one."""
    values = _common.array(label, flat)
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    if values.shape != (ends[-1],):
        raise ValueError(f"{label} must have {ends[-1]} elements, got shape {values.shape}")
    parts = np.split(values, ends[:-1])
    return {str(i): part.reshape(shape) for i, (part, shape) in enumerate(zip(parts, shapes))}  # noqa: B905
