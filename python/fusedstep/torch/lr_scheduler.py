"""`fusedstep.schedules` as a `torch.optim.lr_scheduler.LRScheduler`, for any torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fusedstep._hypers import HYPERS, check
from fusedstep.schedules import Schedule, _integer_from

_Function = Callable[[int], Any]


class LRScheduler(torch.optim.lr_scheduler.LRScheduler):
    """Sets the learning rate of a torch optimizer to a schedule's value, one step at a time.

        lr = schedule(last_epoch)               last_epoch counts the calls of step, from 0

    A schedule gives the rate itself, not a factor of the optimizer's, so that the rate at a step
    does not depend on how it was reached: `last_epoch` may be set to any number.

    Args:
        optimizer: a `torch.optim.Optimizer`, torch's own, ours, or another.
        schedule: a schedule or a callable of the step, or one for each parameter group.
        last_epoch: -1 to begin with step 0, else the last step that was taken.
        momentum: a schedule, or one for each group, of `momentum` or, where groups have `betas`,
            of its first half; such as `OneCycle.momentum` (default None: left alone).
        weight_decay: a schedule, or one for each group (default None: left alone).

    Raises:
        TypeError: the optimizer is not torch's, a schedule is not callable, or `last_epoch` is not
            an integer.
        ValueError: a number of schedules that is not the groups', one schedule for groups whose
            rates differ, groups without the hyperparameter, or a value out of range.

    Example:
        >>> import torch, fusedstep as fs
        >>> from fusedstep.torch import LRScheduler
        >>> opt = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1)
        >>> scheduler = LRScheduler(opt, fs.schedules.Linear(0.5, total=4))
        >>> for _ in range(3):
        ...     opt.step()
        ...     scheduler.step()
        >>> scheduler.get_last_lr()
        [0.125]

    Differs from:
        torch's schedulers, which multiply the rate that each group begins with: groups of different
        rates take a list, such as `[schedule, schedule * 0.1]`.
    """

    last_epoch: int
    _step_count: int

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: _Function | Sequence[_Function],
        last_epoch: int = -1,
        *,
        momentum: _Function | Sequence[_Function] | None = None,
        weight_decay: _Function | Sequence[_Function] | None = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        last_epoch = _integer_from(-1)("last_epoch", last_epoch)
        groups = optimizer.param_groups
        given = {"lr": schedule, "momentum": momentum, "weight_decay": weight_decay}
        self._schedules = {
            name: _one_per_group(_argument(name), value, len(groups))
            for name, value in given.items()
            if value is not None or name == "lr"
        }
        rates = [float(group["lr"]) for group in groups]
        if callable(schedule) and len(set(rates)) > 1:
            raise ValueError(
                f"schedule must be one for each group where their lr differ, got {rates}"
            )
        for name in self._schedules:
            for i, group in enumerate(groups):
                if _key(name, group) not in group:
                    raise ValueError(
                        f"{name} must be a hyperparameter of each group, got param_groups[{i}]"
                        " without it"
                    )
        _values(self._schedules, last_epoch + 1)
        for group in groups:
            group.setdefault("initial_lr", group["lr"])  # torch demands it of those who resume
        super().__init__(optimizer, last_epoch)

    @property
    def schedules(self) -> list[_Function]:
        """The learning rates' schedules, one for each parameter group."""
        return list(self._schedules["lr"])

    def step(self, epoch: int | None = None) -> None:
        """Sets the values of the next step; one that raises has counted nothing."""
        before = self._step_count, self.last_epoch
        try:
            super().step(epoch)
        except BaseException:
            self._step_count, self.last_epoch = before
            raise

    def get_lr(self) -> list[Any]:
        """The rates at `last_epoch`; sets the other scheduled hyperparameters on the way."""
        values = _values(self._schedules, self.last_epoch)
        for name in self._schedules.keys() - {"lr"}:
            for group, value in zip(self.optimizer.param_groups, values[name], strict=True):
                key = _key(name, group)
                group[key] = (value, *group[key][1:]) if key == "betas" else value
        return values["lr"]

    def state_dict(self) -> dict[str, Any]:
        """Counts, rates and schedules as plain numbers, lists and dicts; callables are left out."""
        state: dict[str, Any] = super().state_dict()
        state["schedules"] = {
            name: [one.to_dict() if isinstance(one, Schedule) else None for one in schedules]
            for name, schedules in state.pop("_schedules").items()
        }
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over a `state_dict`, its schedules too; those it left out stay as they are.

        The schedules are new objects: a `ReduceOnPlateau` is told its metrics through `schedules`.

        Raises:
            ValueError: schedules for other hyperparameters or another number of groups.
        """
        state = dict(state_dict)
        saved = state.pop("schedules", {})
        shape = {name: len(schedules) for name, schedules in self._schedules.items()}
        if {name: len(schedules) for name, schedules in saved.items()} != shape:
            raise ValueError(f"state_dict['schedules'] must be for {shape}, got {saved}")
        loaded = {
            name: [
                own if one is None else Schedule.from_dict(one)
                for own, one in zip(self._schedules[name], schedules, strict=True)
            ]
            for name, schedules in saved.items()
        }
        super().load_state_dict({**state, "_schedules": loaded})


def _argument(name: str) -> str:
    return "schedule" if name == "lr" else name


def _one_per_group(name: str, value: Any, n: int) -> list[_Function]:
    found = [value] * n if callable(value) else value
    if not isinstance(found, list | tuple) or not all(callable(one) for one in found):
        raise TypeError(f"{name} must be a schedule or one for each group, got {value!r}")
    if len(found) != n:
        raise ValueError(f"{name} must be one for each of {n} groups, got {len(found)}")
    return list(found)


def _key(name: str, group: Mapping[str, Any]) -> str:
    """As in torch the first of `betas` is a momentum."""
    return "betas" if name == "momentum" and "betas" in group else name


def _values(schedules: Mapping[str, list[_Function]], t: int) -> dict[str, list[float]]:
    return {
        name: [check(name, one(t), HYPERS[name]) for one in functions]
        for name, functions in schedules.items()
    }
