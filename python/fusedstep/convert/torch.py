"""`torch.optim`, and what keeps its layout: Apex' and Transformer Engine's fused optimizers.

A checkpoint says nothing of its class; the hyperparameters in its groups do, but for Adam with
decoupled weight decay before torch 2.7 and in Apex. Apex counts steps by group.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from fusedstep import _checkpoint, _storage, optimizers
from fusedstep._arrays import as_tensors
from fusedstep.conventions import Ours
from fusedstep.convert import _common
from fusedstep.convert._common import Converted, State

# Hyperparameters by which a group is known, of which the first that it has decides.
_KNOWN = {
    "etas": "Rprop",
    "lambd": "ASGD",
    "momentum_decay": "NAdam",
    "lr_decay": "Adagrad",
    "rho": "Adadelta",
    "alpha": "RMSprop",
    "dampening": "SGD",
}
# Those of optimizers that are none of ours, though their groups look like it.
_OTHERS = {
    "ns_steps": "Muon",
    "beta2_decay": "Adafactor",
    "history_size": "LBFGS",
    "grad_averaging": "Apex' FusedLAMB or FusedNovoGrad",
    "trust_coefficient": "LARS",
    "max_coeff": "DeepSpeed's FusedLamb",
    "use_muon": "DeepSpeed's Muon",
}
# How a step is run, which is nothing of its equation.
_FLAGS = ("foreach", "fused", "capturable", "differentiable", "step", "params", "param_names")
MASTER = "master_param"  # Transformer Engine's copy of the parameter in float32


def from_torch(
    source: Any, params: Any = None, optimizer: str | None = None, *, step: int | None = None
) -> Converted:
    """The state_dict of an optimizer of torch's layout, for any of our classes.

    Those of `torch.optim` our classes load as they are; this also takes those that count steps by
    group, as Apex and Transformer Engine do, checks shapes, and makes of them what the neutral
    classes, files and the other converters take.

    Args:
        source: a state_dict, a dict that has one and no second, or the path of a file that
            `torch.save` wrote of either. It is read with `weights_only=True`.
        params: the parameters in the optimizer's order: arrays, tensors or shapes, in a dict by
            name, a list, or as `model.named_parameters()` (default None: the checkpoint's names, if
            it has them, and shapes are not compared).
        optimizer: the name of our class (default None: the one whose hyperparameters the groups
            have). Adam and AdamW must be told apart where the groups do not say
            `decoupled_weight_decay`, and decay.
        step: the updates taken, where the checkpoint has no count: Apex' FusedAdagrad, and SGD,
            which does not need it (default None).

    Returns:
        The state_dict for `fs.<result.optimizer>`. `masters` has Transformer Engine's parameters in
        float32, by name or number, where there are any; `assumed` the options of torch's class
        that a group has not.

    Raises:
        TypeError, ValueError: it is no state_dict, of no optimizer of ours, or has other states or
            shapes; the message has which.
        ModuleNotFoundError: a path was given, and torch is missing.

    Example:
        >>> import numpy as np, fusedstep as fs, torch
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> theirs = torch.optim.Adam([p], lr=0.5, betas=(0.8, 0.9))
        >>> p.grad = torch.tensor([1.0, -1.0]); theirs.step()
        >>> state = fs.convert.from_torch(theirs.state_dict(), {"p": p})
        >>> opt = fs.Adam({"p": p.detach().numpy()})
        >>> opt.load_state_dict(state)
        >>> opt.step(np.ones(2, np.float32))
        StepReport(step=2, lr=0.5, elements=2)
    """
    entries, groups = _checkpoint.parts(held(source))
    wanted = _common.wanted(params)
    order = [i for own in groups for i in own["params"]]
    if len(set(order)) < len(order):
        raise ValueError(f"param_groups must have distinct parameters, got {order[:16]}")
    if unknown := [i for i in entries if i not in order]:
        raise ValueError(f"state must be of parameters in param_groups, got {unknown[:8]}")
    if wanted and len(wanted.shapes) != len(order):
        raise ValueError(
            f"params must be {len(order)}, as in param_groups, got {len(wanted.shapes)}"
        )
    if wanted is None or wanted.names is None:
        named = [own.get("param_names") for own in groups]
        if all(named):
            names = [name for own in named if own for name in own]
            wanted = _common.Wanted(names, wanted.shapes if wanted else [()] * len(names))
    classes = {optimizer or _class(own, entries) for own in groups if own["params"]}
    if len(classes) != 1:
        raise ValueError(f"param_groups must be of one optimizer, got {sorted(classes)}")
    name = classes.pop()
    if name not in optimizers.NAMES:
        raise ValueError(f"optimizer must be one of {', '.join(optimizers.NAMES)}, got {name!r}")
    spec, states, masters = _common.spec_of(name), {}, {}
    number = {i: k for k, i in enumerate(order)}
    for own in groups:
        for i in own["params"]:
            entry = dict(entries.get(i, {}))
            k = number[i]
            if entry.pop(MASTER, None) is not None:
                label = wanted.names[k] if wanted and wanted.names else k
                masters[label] = _common.array(f"state[{i!r}]['{MASTER}']", entries[i][MASTER])
            counted = own.get("step", step) if spec.counts_steps else None
            states[k] = _state(name, i, entry, counted)
            for key in spec.states:
                if key in states[k] and params is not None and wanted:
                    shape = wanted.shapes[k]
                    if states[k][key].shape != shape:
                        raise ValueError(
                            f"state[{i!r}]['{key}'] of {wanted.label(k)} must have shape {shape},"
                            f" got {states[k][key].shape}"
                        )
    made, assumed = [], dict[str, Any]()
    usual = _common.defaults(name)
    theirs = {key: one for key, one in usual.items() if key not in spec.beyond_torch}
    if name in ("Adam", "AdamW"):  # whose name says it
        theirs.pop("decoupled_weight_decay", None)
    for own in groups:
        # Of an option that its class did not have: nothing to warn of.
        assumed |= _common.unsaid("source", "torch's", theirs, own, is_named=True)
        members = [number[i] for i in own["params"]]
        made.append(_group(name, own, members, wanted))
    taken = [one["step"] for one in states.values() if "step" in one]
    steps = max(taken, default=_common.count("step", step or 0))
    result = _common.converted("torch", name, name, made, states, steps, assumed=assumed)
    result.masters = masters
    return result


def to_torch(
    state_dict: Any, *, optimizer: str | None = None, ours: bool = False
) -> dict[str, Any]:
    """A state_dict as one of `torch.optim`, in tensors, to load or for `torch.save`.

    Args:
        state_dict: of ours, with all its states.
        optimizer: the name of our class, where `state_dict` is not one of a `from_` function
            (default None).
        ours: for `fusedstep.torch`'s class, which has all options; those of an equation that
            `torch.optim` has not are refused otherwise (default False).

    Returns:
        The state_dict of `torch.optim.<class>`, or of `fusedstep.torch.<class>`.

    Raises:
        TypeError, ValueError: torch has no such class or option, a state is missing or in 8 bits,
            or a group has no `lr`.
        ModuleNotFoundError: torch is missing.
    """
    torch = _torch("to_torch needs")
    name = _common.optimizer_of(state_dict, optimizer)
    spec, usual = _common.spec_of(name), _common.defaults(name)
    theirs = getattr(torch.optim, name, None)
    if theirs is None and not ours:
        raise ValueError(f"ours must be True: torch.optim has no {name}")
    flags: dict[str, Any] = {}
    if theirs is not None:
        flags = dict(theirs([torch.zeros(1)]).param_groups[0])
    groups = []
    for k, own in enumerate(state_dict["param_groups"]):
        where = f"state_dict['param_groups'][{k}]"
        if "lr" not in own:
            raise ValueError(f"{where} must have lr: the rate was a schedule, give it the number")
        beyond = {key: own.get(key, usual[key]) for key in spec.beyond_torch}
        other = [f"{key}={value!r}" for key, value in beyond.items() if value != usual[key]]
        if not own.get("weight_decay"):  # then it is all the same how
            other = [one for one in other if not one.startswith("decoupled_weight_decay")]
        if other and not ours:
            raise ValueError(
                f"ours must be True: torch.optim.{name} has no {', '.join(other)}, but"
                f" fusedstep.torch.{name} has"
            )
        hypers = {key: value for key, value in own.items() if key not in spec.beyond_torch}
        group = {**flags, **hypers, "params": list(own["params"])}
        if ours:
            group |= {**beyond, _checkpoint.BEYOND: sorted(beyond)}
            if "averages" in state_dict:
                group["averages"] = state_dict["averages"]
        groups.append(group)
    state: dict[Any, Any] = {}
    for i, entry, _ in _common.ordered(state_dict):
        made: State = {}
        for key, value in entry.items():
            if key in spec.states and not ours:
                made[key] = np.array(_common.need(entry, key, i))
            elif key in spec.scalars:
                made[key] = value
            elif ours and value is not None and key != "step":
                made[key] = np.array(_common.values(f"state[{i!r}][{key!r}]", value))
            elif key != "step":
                raise ValueError(f"ours must be True: torch.optim has no place for {key!r}")
        if made:
            state[i] = as_tensors(made)
    return {"state": state, "param_groups": groups}


def held(source: Any) -> Any:
    """The state_dict that a source of this layout has; a file's is read."""
    is_path = isinstance(source, str | bytes | os.PathLike)
    return _only(read(source) if is_path else source)


def read(path: Any, classes: Sequence[type] = ()) -> Any:
    """A file of `torch.save`; ValueError where it names more than tensors and `classes`."""
    torch, label = _torch("torch's files need"), os.path.basename(os.fsdecode(path))
    if classes and not hasattr(torch.serialization, "safe_globals"):
        raise ModuleNotFoundError(f"{label} needs torch 2.5, got {torch.__version__}", name="torch")
    try:
        with torch.serialization.safe_globals(classes) if classes else nullcontext():
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of zip files and of pickles, with advice to load anything
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            why = f"it names {named[1]}"
        raise ValueError(f"{label} must be a whole file of tensors by torch.save: {why}") from None


def _torch(needs: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{needs} torch: pip install 'fusedstep[torch]'", name="torch"
        ) from error
    return torch


def _only(found: Any) -> Any:
    """The state_dict, or the only one in a dict of several things."""
    if not isinstance(found, Mapping) or "param_groups" in found:
        return found
    inside = [
        one
        for value in found.values()
        for one in (value if isinstance(value, list) else [value])
        if isinstance(one, Mapping) and "param_groups" in one
    ]
    if len(inside) > 1:
        raise ValueError(f"source must have one optimizer, got {len(inside)} of {list(found)[:8]}")
    return inside[0] if inside else found


def _class(group: Mapping[str, Any], entries: Mapping[Any, Any]) -> str:
    """The class of ours that a group's keys and its parameters' states are of."""
    for key, other in _OTHERS.items():
        if key in group:
            raise ValueError(
                f"state_dict must be of an optimizer of ours, got {key}, as of {other}"
            )
    for key, name in _KNOWN.items():
        if key in group:
            return name
    held = {key for i in group["params"] for key in entries.get(i, {})}
    keys = sorted(set(group) - set(_FLAGS))
    if "betas" not in group:
        if "sum" in held:
            return "Adagrad"
        raise ValueError(f"optimizer must be given: no class of ours has {', '.join(keys)} alone")
    if "exp_inf" in held:
        return "Adamax"
    if "eps" not in group:
        return "Lion"
    if "amsgrad" not in group and "bias_correction" not in group:
        if "decoupled_weight_decay" in group:
            return "RAdam"
        raise ValueError(f"optimizer must be given: {', '.join(keys)} may be of RAdam or Adamax")
    if "decoupled_weight_decay" in group:
        return "AdamW" if group["decoupled_weight_decay"] else "Adam"
    if group.get("weight_decay"):
        raise ValueError(
            "optimizer must be given: nothing says whether weight_decay="
            f"{group['weight_decay']!r} is Adam's or AdamW's"
        )
    return "Adam"


def _state(name: str, i: Any, entry: Mapping[str, Any], counted: Any) -> State:
    """One parameter's state, all of it known."""
    spec = _common.spec_of(name)
    beside = [_storage.in_q8(spec, key).beside for key in spec.states]
    state: State = {}
    for key, value in entry.items():
        label = f"state[{i!r}][{key!r}]"
        if value is None:
            continue
        if key == "step":
            state[key] = _common.count(label, value)
        elif key in spec.scalars:
            state[key] = _common.number(label, value)
        elif key in (*spec.states, _storage.EMA, *beside, *_storage.PARAM_BESIDE):
            state[key] = _common.values(label, value)
        else:
            known = ", ".join([*spec.scalars, *spec.states])
            raise ValueError(f"state[{i!r}] must have {known} of {name}, got {key!r}")
    if not state:
        return {}
    if not spec.counts_steps:
        state.pop("step", None)
    elif "step" not in state:
        if counted is None:
            raise ValueError(f"step must be given: state[{i!r}] and its group have no count")
        state["step"] = _common.count(f"step of state[{i!r}]", counted)
    needed = [key for key in spec.scalars if key not in state]
    if needed:
        raise ValueError(f"state[{i!r}] must have {needed[0]!r} of {name}, got {sorted(entry)}")
    return state


def _group(
    name: str, own: Mapping[str, Any], members: list[int], wanted: _common.Wanted | None
) -> dict[str, Any]:
    """A group with what it says, torch's values for the rest, and the user's own keys."""
    spec = _common.spec_of(name)
    heeded = _checkpoint.heeded(own)
    hypers: dict[str, Any] = {}
    for key, value in own.items():
        if key in _FLAGS or key == _checkpoint.BEYOND or key == "decoupled_weight_decay":
            continue
        known = key in _common.defaults(name)
        if known and (key not in spec.beyond_torch or key in heeded or key == "bias_correction"):
            if isinstance(value, list | tuple):
                hypers[key] = tuple(_common.short(one) for one in value)
            else:
                hypers[key] = _common.short(value)
            if spec.table[key].is_flag:
                hypers[key] = bool(hypers[key])
    if "decoupled_weight_decay" in own and name not in ("AdamW", "Lion"):
        hypers["decoupled_weight_decay"] = bool(own["decoupled_weight_decay"])
    made = _common.group(Ours(name, hypers), members, wanted)
    plain = {k: v for k, v in own.items() if k not in made and type(v) in (str, int, float, bool)}
    return {**made, **{k: v for k, v in plain.items() if k not in _FLAGS and k not in spec.table}}
