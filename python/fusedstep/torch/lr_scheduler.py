"""`fusedstep.schedules` as a `torch.optim.lr_scheduler.LRScheduler`, for any torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fusedstep._hypers import HYPERS, as_integer, at_step
from fusedstep.schedules import Schedule, plateaus, restored

_Function = Callable[[int], Any]
_Given = _Function | list[_Function]  # one for all groups, or one for each


class LRScheduler(torch.optim.lr_scheduler.LRScheduler):
    """Sets the learning rate of a torch optimizer to a schedule's value, one step at a time.

        lr = schedule(last_epoch)               last_epoch counts the calls of step, from 0

    A schedule gives the rate itself, not a factor of the optimizer's, so that the rate at a step
    does not depend on how it was reached: `last_epoch` may be set to any number.

    Args:
        optimizer: a `torch.optim.Optimizer`, torch's own, ours, or another.
        schedule: a schedule or a callable of the step, or one for each parameter group. One alone
            holds for groups that are added later too.
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
        last_epoch = as_integer("last_epoch", last_epoch, -1)
        groups = optimizer.param_groups
        given = {"lr": schedule, "momentum": momentum, "weight_decay": weight_decay}
        self._schedules: dict[str, _Given] = {
            name: _checked(_argument(name), value)
            for name, value in given.items()
            if value is not None or name == "lr"
        }
        rates = [float(group["lr"]) for group in groups]
        if callable(schedule) and len(set(rates)) > 1:
            raise ValueError(
                f"schedule must be one for each group where their lr differ, got {rates}"
            )
        _values(self._schedules, groups, last_epoch + 1)
        for group in groups:  # torch demands it of those who resume
            rate = group["lr"]  # a tensor is written to
            group.setdefault("initial_lr", rate.clone() if torch.is_tensor(rate) else rate)
        super().__init__(optimizer, last_epoch)

    @property
    def schedules(self) -> list[_Function]:
        """The learning rates' schedules, one for each parameter group."""
        return _per_group("lr", self._schedules["lr"], len(self.optimizer.param_groups))

    def step(self, epoch: int | None = None) -> None:
        """Sets the values of the next step; one that raises has counted nothing.

        Args:
            epoch: as torch's, deprecated there. A metric goes to its schedule: `plateau.step(loss)`
                and then `scheduler.step()`.
        """
        if epoch is not None:
            given = [one for value in self._schedules.values() for one in _as_list(value)]
            if plateaus(given) and epoch != 0:  # which SequentialLR passes
                raise TypeError(
                    f"epoch must be None with a ReduceOnPlateau, got {epoch!r}: a metric goes to"
                    " its schedule, plateau.step(metric), before scheduler.step()"
                )
            epoch = as_integer("epoch", epoch, 0)
        before = self._step_count, self.last_epoch
        try:
            super().step(epoch)
        except BaseException:
            self._step_count, self.last_epoch = before
            raise

    def get_lr(self) -> list[Any]:
        """The rates at `last_epoch`; sets the other scheduled hyperparameters on the way."""
        groups = self.optimizer.param_groups
        values = _values(self._schedules, groups, self.last_epoch)
        for name in self._schedules.keys() - {"lr"}:
            for group, value in zip(groups, values[name], strict=True):
                key = _key(name, group)
                group[key] = (value, *group[key][1:]) if key == "betas" else value
        return values["lr"]

    def state_dict(self) -> dict[str, Any]:
        """Counts, rates and schedules as plain numbers, lists and dicts; callables are left out."""
        state: dict[str, Any] = super().state_dict()
        state["schedules"] = {
            name: [_to_dict(one) for one in given] if isinstance(given, list) else _to_dict(given)
            for name, given in state.pop("_schedules").items()
        }
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over a `state_dict`, its schedules too; those it left out stay as they are.

        A schedule that differs in nothing, or only in how far a `ReduceOnPlateau` has come, stays
        the object that it is and goes on from there.

        Raises:
            TypeError, ValueError: not such a dict, or of other hyperparameters or another number of
                groups; nothing has changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}")
        state = dict(state_dict)
        if "last_epoch" in state:
            as_integer("state_dict['last_epoch']", state["last_epoch"], -1)
        saved = state.pop("schedules", None)
        shape = {name: _shape(given) for name, given in self._schedules.items()}
        if not isinstance(saved, Mapping) or {n: _shape(v) for n, v in saved.items()} != shape:
            raise ValueError(f"state_dict['schedules'] must be for {shape}, got {saved!r}")
        staged = [
            (own, None if values is None else Schedule.from_dict(values))
            for name in shape
            for own, values in zip(
                _as_list(self._schedules[name]), _as_list(saved[name]), strict=True
            )
        ]
        loaded = iter([_loaded(own, new, staged) for own, new in staged])
        schedules = {
            name: [next(loaded) for _ in given] if isinstance(given, list) else next(loaded)
            for name, given in self._schedules.items()
        }
        super().load_state_dict({**state, "_schedules": schedules})


def _loaded(own: _Function, new: Any, staged: list[tuple[_Function, Any]]) -> Any:
    """What stands in `own`'s place: one object where it stands in several, if they agree."""
    if new is None:
        return own
    alike = [other for one, other in staged if one is own]
    first = next(other for other in alike if other == new)
    return restored(own, first) if all(other == new for other in alike) else first


def _argument(name: str) -> str:
    return "schedule" if name == "lr" else name


def _checked(name: str, value: Any) -> _Given:
    """A schedule, or a list of them."""
    found = value if callable(value) else list(value) if isinstance(value, list | tuple) else None
    if found is None or not all(map(callable, _as_list(found))):
        raise TypeError(f"{name} must be a schedule or one for each group, got {value!r}")
    return found


def _as_list(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]


def _shape(given: Any) -> str:
    return f"{len(given)} groups" if isinstance(given, list) else "all groups"


def _to_dict(schedule: _Function) -> dict[str, Any] | None:
    return schedule.to_dict() if isinstance(schedule, Schedule) else None


def _key(name: str, group: Mapping[str, Any]) -> str:
    """As in torch the first of `betas` is a momentum."""
    return "betas" if name == "momentum" and "betas" in group else name


def _per_group(name: str, given: _Given, n: int) -> list[_Function]:
    found = given if isinstance(given, list) else [given] * n
    if len(found) != n:
        raise ValueError(f"{_argument(name)} must be one for each of {n} groups, got {len(found)}")
    return found


def _values(
    schedules: Mapping[str, _Given], groups: Sequence[Mapping[str, Any]], t: int
) -> dict[str, list[float]]:
    """The values of step `t` for each group, before any is set."""
    for name in schedules:
        for i, group in enumerate(groups):
            if _key(name, group) not in group:
                raise ValueError(
                    f"{name} must be a hyperparameter of each group, got param_groups[{i}]"
                    " without it"
                )
    return {
        name: [
            at_step(name, one, t, HYPERS[_key(name, group)])
            for one, group in zip(_per_group(name, given, len(groups)), groups, strict=True)
        ]
        for name, given in schedules.items()
    }
