"""`fusedstep.schedules` as a `torch.optim.lr_scheduler.LRScheduler`, for any torch optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fusedstep._arrays import as_index
from fusedstep._hypers import HYPERS, as_integer, at_step
from fusedstep.schedules import Resumed, plateaus, resumed, stored

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
        rates take a list, such as `[schedule, schedule * 0.1]`. `load_state_dict` keeps the
        schedule that was given, where torch's takes the checkpoint's. Groups that share one tensor
        as their rate get one value or an error, with torch's the last group's.
    """

    last_epoch: int
    _last_lr: list[Any]
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
            group.setdefault("initial_lr", _copied(group["lr"]))
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
            if as_index(epoch) is None:  # a whole float may be a metric, too
                raise TypeError(f"epoch must be an integer >= 0, got {epoch!r}")
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
        rates = values.pop("lr")
        _set(groups, values)
        return rates

    def state_dict(self) -> dict[str, Any]:
        """Counts, rates and schedules as plain numbers, lists and dicts; callables are left out."""
        state: dict[str, Any] = super().state_dict()
        given = state.pop("_schedules")
        return {**state, "schedules": {name: stored(value) for name, value in given.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where a `state_dict` was, along the schedules that were given to this scheduler.

        A `ReduceOnPlateau` takes over the progress of the one in its place. Where the optimizer has
        this scheduler's values, present or saved, it gets those of the step to go on from; so load
        the optimizer first.

        Raises:
            TypeError, ValueError: not such a dict, or of other hyperparameters or another number of
                groups, or a value of a schedule is out of range; nothing has changed then.

        Warns:
            UserWarning: a schedule is not the checkpoint's; the message has both.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}")
        state = dict(state_dict)
        epoch = as_integer("state_dict['last_epoch']", state.get("last_epoch", self.last_epoch), -1)
        schedules = self._compared(state.pop("schedules", None))
        groups = self.optimizer.param_groups
        is_ours = [group["lr"] for group in groups] in (self._last_lr, state.get("_last_lr"))
        before = [(one, one.progress) for one, _ in schedules.progress]
        try:
            for one, reached in schedules.progress:
                one._go_on(reached)
            values = _values(self._schedules, groups, max(epoch, 0))
            if schedules.warning:  # which may be an error
                warnings.warn(schedules.warning, UserWarning, stacklevel=2)
        except BaseException:
            for one, progress in before:
                one._go_on(progress)
            raise
        super().load_state_dict({**state, "last_epoch": epoch, "_schedules": self._schedules})
        if is_ours:
            _set(groups, values)
            self._last_lr = [_copied(group["lr"]) for group in groups]

    def _compared(self, saved: Any) -> Resumed:
        """The present schedules as a checkpoint's resume them."""
        shape = {name: _shape(given) for name, given in self._schedules.items()}
        if not isinstance(saved, Mapping) or {n: _shape(v) for n, v in saved.items()} != shape:
            raise ValueError(f"state_dict['schedules'] must be for {shape}, got {saved!r}")
        places = []
        for name, given in self._schedules.items():
            where = f"state_dict['schedules']['{name}']"
            several = isinstance(given, list)
            pairs = zip(_as_list(given), _as_list(saved[name]), strict=True)
            for i, (own, entry) in enumerate(pairs):
                places.append((name, f"{where}[{i}]" if several else where, own, entry))
        return resumed(places)


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


def _key(name: str, group: Mapping[str, Any]) -> str:
    """As in torch the first of `betas` is a momentum."""
    return "betas" if name == "momentum" and "betas" in group else name


def _held(name: str, group: Mapping[str, Any]) -> Any:
    """A hyperparameter as its group holds it."""
    key = _key(name, group)
    return group[key][0] if key == "betas" else group[key]


def _copied(rate: Any) -> Any:
    return rate.clone() if torch.is_tensor(rate) else rate  # a tensor is written to


def _set(groups: Sequence[dict[str, Any]], values: Mapping[str, list[float]]) -> None:
    """Sets hyperparameters, as torch does in the tensor where there is one."""
    for name, found in values.items():
        for group, value in zip(groups, found, strict=True):
            key, held = _key(name, group), _held(name, group)
            if torch.is_tensor(held):
                held.fill_(value)
            else:
                group[key] = (value, *group[key][1:]) if key == "betas" else value


def _check_apart(name: str, groups: Sequence[Mapping[str, Any]], values: list[float]) -> None:
    """Raises ValueError where one tensor would have to hold two values."""
    first: dict[tuple[Any, int], int] = {}
    for i, (group, value) in enumerate(zip(groups, values, strict=True)):
        held = _held(name, group)
        if not torch.is_tensor(held):
            continue
        k = first.setdefault((held.device, held.data_ptr() or id(held)), i)
        if value != values[k]:
            raise ValueError(
                f"{_key(name, group)} must be a tensor of its own in each group where the schedules"
                f" differ, got one for {values[k]} in param_groups[{k}] and {value} in"
                f" param_groups[{i}]"
            )


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
    values = {
        name: [
            at_step(name, one, t, HYPERS[_key(name, group)])
            for one, group in zip(_per_group(name, given, len(groups)), groups, strict=True)
        ]
        for name, given in schedules.items()
    }
    for name, found in values.items():
        _check_apart(name, groups, found)
    return values
