"""DeepSpeed: the folder that an engine's `save_checkpoint` writes, ZeRO's partitions joined.

Under ZeRO 1 and 2 every rank has a file with its part of each group, flat, and the places of the
parameters' pieces in it; a piece may begin on one rank and end on another. The files are pickles of
tensors and of a few of DeepSpeed's classes. torch reads them as it does with `weights_only=True`,
with stand-ins for those classes; whatever else a file names is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from fusedstep import _checkpoint
from fusedstep.convert import _common
from fusedstep.convert import torch as _torch
from fusedstep.convert._common import Converted, State

_MODEL = "mp_rank_00_model_states.pt"
_PARTITION = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
# Other files of states, by what is in the name, and what writes them.
_OTHERS = {
    r"exp": "mixtures of experts",
    r"layer_": "pipelines",
    r"mp_rank_(?!00)": "model parallelism",
    r"zero_.*model_states": "ZeRO stage 3",
    r"": "something else",
}
_CLIPPING = ("gradient_clipping", 1.0)  # in the configuration, and DeepSpeed's default
_WHOLE = _torch.MASTER  # the parameter in float32, which ZeRO splits like its states


class _Kept:
    """An object of DeepSpeed's, of which nothing is made but what the file says of it."""

    def __init__(self, *args: Any) -> None:
        self.args = args


_STAND_INS = [
    type(name, (_Kept,), {"__module__": f"deepspeed.{module}"})
    for module, name in (
        ("utils.tensor_fragment", "fragment_address"),
        ("runtime.zero.config", "ZeroStageEnum"),
        ("runtime.fp16.loss_scaler", "LossScaler"),
        ("runtime.fp16.loss_scaler", "DynamicLossScaler"),
    )
]


def from_deepspeed(
    folder: Any, params: Any = None, optimizer: str | None = None, *, tag: str | None = None
) -> Converted:
    """The optimizer of a DeepSpeed checkpoint: ZeRO 1 or 2 on any number of ranks, or without ZeRO.

    Args:
        folder: what `engine.save_checkpoint` was given, or the folder of a tag in it.
        params: the trained parameters: arrays, tensors or shapes, in a dict by name or as
            `model.named_parameters()`, in any order, or in a list in the order of the optimizer's
            groups (default None: names are the checkpoint's, and shapes are not compared).
        optimizer: the name of our class (default None: the one whose hyperparameters the groups
            have). Adam and AdamW must be told apart where there is weight decay and neither the
            groups nor DeepSpeed's configuration, which is in the files, says which.
        tag: which of the folder's checkpoints (default None: the one that its file `latest` names).

    Returns:
        The state_dict for `fs.<result.optimizer>`, with names, in the order of the optimizer's
        groups. `masters` has the parameters in float32 that the engine keeps, by name, and
        `at_step` has `max_norm` where the engine clips; `assumed` has what the files do not say.

    Raises:
        TypeError, ValueError: a file is missing, cut short, of ZeRO 3, of experts or of model
            parallelism, or names what it need not; the optimizer or the parameters do not fit. The
            message has what was expected and found.
        OSError: a file cannot be opened.
        ModuleNotFoundError: torch is missing, or older than 2.5.

    Example:
        >>> import numpy as np, fusedstep as fs, os, tempfile, torch
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> theirs = torch.optim.Adam(layer.parameters(), lr=0.5)
        >>> layer(torch.ones(2)).backward(); theirs.step()
        >>> with tempfile.TemporaryDirectory() as folder:  # what the engine saves without ZeRO
        ...     saved = {"optimizer": theirs.state_dict(), "ds_config": {"gradient_clipping": 0.5}}
        ...     torch.save(saved, os.path.join(folder, "mp_rank_00_model_states.pt"))
        ...     state = fs.convert.from_deepspeed(folder, layer.named_parameters())
        >>> opt = fs.Adam({"weight": layer.weight.detach().numpy()})
        >>> opt.load_state_dict(state)
        >>> opt.steps, state.at_step
        (1, {'max_norm': 0.5})
    """
    path = _tagged(os.fsdecode(folder), tag)
    label, files = os.path.basename(path), _files(path)
    model = _read(path, _MODEL)
    config = _mapping(model.get("ds_config"))
    assumed = {}
    if files:
        shapes = _shapes(label, model, _common.wanted(params))
        is_dealt = bool(_mapping(config.get("zero_optimization")).get("round_robin_gradients"))
        layout, clip = _joined(path, files, shapes, is_dealt)
        if optimizer is None:
            _say_decoupled(layout["param_groups"], config)
        every = {name: shape for group in shapes for name, shape in group.items()}
        names = [name for own in layout["param_groups"] for name in own["param_names"]]
        params = {name: every[name] for name in names}
    else:
        layout = _unpartitioned(label, model)
        key, usual = _CLIPPING
        assumed = _common.unsaid(label, "DeepSpeed's", {key: usual}, config, is_named=True)
        clip = config.get(key, usual)
    result = _torch.from_torch(layout, params, optimizer, step=_steps(model))
    result.library, result.assumed = "deepspeed", {**result.assumed, **assumed}
    if clip:
        result.at_step["max_norm"] = float(clip)
    return result


def _tagged(folder: str, tag: str | None) -> str:
    """The folder of a tag: the given one, the latest, or what is one already."""
    if tag is None:
        try:
            with open(os.path.join(folder, "latest"), encoding="utf-8") as file:
                tag = file.read().strip()
        except FileNotFoundError:
            tag = ""
    return os.path.normpath(os.path.join(folder, str(tag)))


def _files(path: str) -> dict[int, str]:
    """The files of the partitions by rank; ValueError for files that are of something else."""
    ranks: dict[int, str] = {}
    every = sorted(os.listdir(path))
    for file in every:
        if not file.endswith("_states.pt") or file == _MODEL:
            continue
        match = _PARTITION.fullmatch(file)
        if match is None:
            why = next(why for part, why in _OTHERS.items() if re.search(part, file))
            raise ValueError(f"{file} must not be there: ZeRO 1 and 2 alone are read, not {why}")
        other = ranks.setdefault(int(match[1]), file)
        if other != file:
            raise ValueError(f"rank {match[1]} must have one file, got {other} and {file}")
    if _MODEL not in every:
        raise ValueError(f"{os.path.basename(path)} must have {_MODEL}, got {every[:8]}")
    return ranks


def _read(path: str, file: str) -> Mapping[str, Any]:
    """What a file has; ValueError for one that names more than tensors and the stand-ins."""
    found = _torch.read(os.path.join(path, file), _STAND_INS)
    if not isinstance(found, Mapping):
        raise ValueError(f"{file} must have a dict, got {type(found).__name__}")
    return found


def _shapes(
    label: str, model: Mapping[str, Any], params: _common.Wanted | None
) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of each group's parameters by name, which `params` must have too."""
    groups = _need(_MODEL, model, "param_shapes", list)
    shapes = [{name: tuple(shape) for name, shape in _mapping(group).items()} for group in groups]
    every = {name: shape for group in shapes for name, shape in group.items()}
    if params and params.names:
        missing = [name for name in every if name not in params.names]
        unknown = [name for name in params.names if name not in every]
        if missing or unknown:
            raise ValueError(
                f"params must be those of {label}, got missing {missing[:8]}, unknown {unknown[:8]}"
            )
        given = dict(zip(params.names, params.shapes, strict=True))
        params = _common.Wanted(list(every), [given[name] for name in every])
    if params:
        _common.check_shapes(label, "param_shapes", list(every.values()), params)
    return shapes


class _Group:
    """A group's parameters, flat and one after another, as far as the files of ranks were read.

    The pieces of all ranks, without padding, are in the order of `param_shapes`, which is where
    names are taken from: under `round_robin_gradients`, which deals parameters out to ranks before
    it lays them side by side, `param_slice_mappings` has the right places for wrong names (0.19.8).
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.size = sum(map(prod, shapes.values()))
        self.arrays: State = {}
        self.numbers: State = {}
        self.taken = {_WHOLE: 0}  # elements of each array
        self.seen: dict[str, int] = {}  # elements of each parameter

    def add(self, file: str, pieces: Mapping[str, Any], held: Mapping[str, Any]) -> None:
        """Takes a rank's pieces of what it holds by key: arrays, or numbers that all ranks have."""
        places = []
        for name, piece in _mapping(pieces).items():
            start, n = (getattr(piece, key, None) for key in ("start", "numel"))
            if type(start) is not int or type(n) is not int or start < 0 or n < 0:
                raise ValueError(f"{file} must have a place of {name!r}, got {start!r}, {n!r}")
            places.append(slice(start, start + n))
            self.seen[name] = self.seen.get(name, 0) + n
        places.sort(key=lambda place: place.start)
        for key, value in held.items():
            label = f"{file}: {key} of {list(self.shapes)[:8]}"
            if value is None or not places:  # a partition of padding
                continue
            if not getattr(value, "ndim", 0):
                one = _common.number(label, value)
                if self.numbers.setdefault(key, one) != one:
                    there = self.numbers[key]
                    raise ValueError(f"{label} must be {there}, as on other ranks, got {one}")
                continue
            flat, at = _common.values(label, value), self.taken.get(key, 0)
            needed = max(place.stop for place in places)
            if flat.ndim != 1 or flat.size < needed:
                raise ValueError(
                    f"{label} must be flat, of {needed} elements or more, got shape {flat.shape}"
                )
            whole = self.arrays.setdefault(key, np.empty(self.size, flat.dtype))
            kept = np.concatenate([flat[place] for place in places])
            whole[at : at + kept.size] = kept[: self.size - at]
            self.taken[key] = at + kept.size

    def whole(self, label: str, dealt_to: int) -> dict[str, State]:
        """Each parameter's state, in the order of the optimizer's group."""
        for name in {**self.shapes, **self.seen}:
            expected, found = prod(self.shapes.get(name, (0,))), self.seen.get(name, 0)
            if found != expected:
                raise ValueError(
                    f"{label} must have {expected} elements of {name!r} on all ranks, got {found}"
                )
        for key, found in self.taken.items():
            if found != self.size:
                raise ValueError(
                    f"{label} must have {self.size} elements of {key} of {list(self.shapes)[:8]} on"
                    f" all ranks, got {found}"
                )
        states: dict[str, State] = {}
        at = 0
        for name, shape in self.shapes.items():
            end = at + prod(shape)
            arrays = {key: one[at:end].reshape(shape) for key, one in self.arrays.items()}
            states[name], at = {**arrays, **self.numbers}, end
        dealt = [i for rank in range(dealt_to) for i in range(rank, len(states), dealt_to)]
        return {name: states[name] for _, name in sorted(zip(dealt, states, strict=True))}


def _joined(
    path: str,
    files: Mapping[int, str],
    shapes: Sequence[Mapping[str, tuple[int, ...]]],
    is_dealt: bool,
) -> tuple[dict[str, Any], float]:
    """The state_dict of whole parameters in torch's layout, and the norm to which it clips.

    One rank's file is held at a time.
    """
    label, joined = os.path.basename(path), list(map(_Group, shapes))
    groups: list[dict[str, Any]] = []
    clip = 0.0
    for rank in sorted(files):
        file = files[rank]
        part = _need(file, _read(path, file), "optimizer_state_dict", dict)
        counts = _need(file, part, "partition_count", int, list)
        ranks = set(counts) if isinstance(counts, list) else {counts}
        if len(ranks) != 1 or sorted(files) != list(range(*ranks)):
            raise ValueError(
                f"{label} must have a file of each rank of partition_count {counts}, got ranks"
                f" {sorted(files)}"
            )
        entries, groups = _checkpoint.parts(_need(file, part, "base_optimizer_state", dict))
        clip = part.get("clip_grad", clip)
        flats = _need(file, part, "single_partition_of_fp32_groups", list)
        places = _need(file, part, "param_slice_mappings", list)
        if not len(flats) == len(places) == len(groups) == len(shapes):
            sizes = [len(flats), len(places), len(groups)]
            raise ValueError(f"{file} must have {len(shapes)} groups, got {sizes}")
        for own, flat, pieces, group in zip(groups, flats, places, joined, strict=True):
            state = entries.get(next(iter(own["params"]), None), {})
            group.add(file, pieces, {_WHOLE: flat, **_mapping(state)})
    layout: dict[str, Any] = {"state": {}, "param_groups": []}
    for own, group in zip(groups, joined, strict=True):
        states = group.whole(label, len(files) if is_dealt else 1)
        first = len(layout["state"])
        members = range(first, first + len(states))
        layout["param_groups"].append({**own, "params": [*members], "param_names": [*states]})
        layout["state"] |= dict(zip(members, states.values(), strict=True))
    return layout, clip


def _say_decoupled(groups: Sequence[dict[str, Any]], config: Mapping[str, Any]) -> None:
    """Adds to Adam's groups what only the configuration says, if it made the optimizer."""
    made = _mapping(config.get("optimizer"))
    kind, how = str(made.get("type", "")).lower(), _mapping(made.get("params"))
    if kind in ("adam", "adamw"):
        for own in groups:
            own.setdefault(
                "decoupled_weight_decay", kind == "adamw" or bool(how.get("adam_w_mode", True))
            )


def _unpartitioned(label: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """The state_dict of an optimizer that is whole, torch's, and beside 16 bits its parameters."""
    found = _mapping(model.get("optimizer"))
    if "param_groups" in found:
        return dict(found)
    inside, weights = _mapping(found.get("optimizer_state_dict")), found.get("fp32_groups")
    if "param_groups" not in inside or not isinstance(weights, list):
        got = f"an optimizer of {sorted(found)[:8]} in it" if found else "it without an optimizer"
        raise ValueError(
            f"{label} must have zero_pp_rank_0_mp_rank_00_optim_states.pt, or in {_MODEL} an"
            f" optimizer that is not flat, got {got}"
        )
    entries, groups = _checkpoint.parts(inside)
    states = {**entries}
    for own, members in zip(groups, weights, strict=True):
        for i, weight in zip(own["params"], members, strict=True):
            states[i] = {**_mapping(entries.get(i)), _WHOLE: weight}
    return {"state": states, "param_groups": groups}


def _steps(model: Mapping[str, Any]) -> int:
    """The updates that were taken."""
    taken = [_common.count(key, model.get(key, 0)) for key in ("global_steps", "skipped_steps")]
    return max(taken[0] - taken[1], 0)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _need(label: str, found: Mapping[str, Any], key: str, *kinds: type) -> Any:
    value = found.get(key)
    if not isinstance(value, kinds):
        got = type(value).__name__ if key in found else sorted(map(str, found))[:12]
        raise ValueError(f"{label} must have {key!r}, a {kinds[-1].__name__}, got {got}")
    return value
