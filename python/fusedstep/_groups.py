"""Groups of parameters with hyperparameters of their own."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from fusedstep._hypers import is_scheduled
from fusedstep._types import Hypers, Unpack


class Group:
    """Hyperparameters for the parameters whose names match a pattern.

    Args:
        pattern: a shell-style pattern (`fnmatch`: `*`, `?`, `[...]`) or several of them. A
            parameter belongs to the first group that matches its name; unnamed parameters are
            called `0`, `1`, ...
        **hypers: what differs from the optimizer's own arguments.

    Example:
        >>> import fusedstep as fs
        >>> fs.Group(["*.bias", "norm*"], weight_decay=0.0)
        Group(['*.bias', 'norm*'], weight_decay=0.0)
    """

    def __init__(self, pattern: str | Sequence[str], **hypers: Unpack[Hypers]) -> None:
        patterns = [pattern] if isinstance(pattern, str) else pattern
        strings = isinstance(patterns, Sequence) and all(isinstance(p, str) for p in patterns)
        if not strings or not patterns:
            raise TypeError(f"pattern must be a string or several, got {pattern!r}")
        self.patterns: list[str] = list(patterns)
        self.hypers: dict[str, Any] = {**hypers}

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("patterns", "hypers"):
            raise AttributeError(f"{name} must be set in group.hypers[{name!r}], got {value!r}")
        super().__setattr__(name, value)

    def matches(self, name: str) -> bool:
        """Whether a parameter of this name belongs to the group."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns)

    def __repr__(self) -> str:
        pattern = self.patterns[0] if len(self.patterns) == 1 else self.patterns
        return f"Group({', '.join([repr(pattern), *assignments(self.hypers)])})"


# Wildcards as `fnmatch` has them; to take more for one would do no harm here.
_WILD = re.compile(r"[*?]|\[!?\]?[^\]]*\]")


class Patterns:
    """Several groups' patterns, found by a part of the names that match them.

    So that a name is held against the few that it may match: one of thousands of groups has, say,
    `layer.17.*`. Of the parts between a pattern's wildcards it is the one that it shares with the
    fewest others.
    """

    def __init__(self, groups: Iterable[Group]) -> None:
        given = [(k, pattern) for k, group in enumerate(groups) for pattern in group.patterns]
        parts = [_WILD.split(pattern) for _, pattern in given]
        sharing = Counter(part for found in parts for part in set(found))
        self._whole: dict[str, int] = {}  # patterns without wildcards
        self._by_part: dict[int, dict[str, list[tuple[int, str]]]] = {}  # by its length first
        for (k, pattern), found in zip(given, parts, strict=True):
            if found == [pattern]:
                self._whole.setdefault(pattern, k)
                continue
            rarest = min(found, key=lambda part: (sharing[part], -len(part)))
            alike = self._by_part.setdefault(len(rarest), {})
            alike.setdefault(rarest, []).append((k, pattern))

    def first(self, name: str) -> int | None:
        """The number of the first group that has the name."""
        found = self._whole.get(name)
        for n, alike in self._by_part.items():
            for part in {name[at : at + n] for at in range(len(name) - n + 1)}:
                for k, pattern in alike.get(part, ()):
                    if found is not None and k >= found:
                        break
                    if fnmatch.fnmatchcase(name, pattern):
                        found = k
                        break
        return found


class ParamGroup(MutableMapping[str, Any]):
    """The hyperparameters of one group, checked when written, used from the next step on.

    Values that are wrong only together, such as `nesterov` without `momentum`, are found by that
    step, which then raises.

    `group["params"]` lists the group's parameters by number and is read-only. Keys that are no
    hyperparameters come from a checkpoint, and go into the next one. Options of other libraries'
    equations are listed where they are not at their defaults; all can be read and set.
    """

    def __init__(self, hypers: dict[str, Any], owner: Any, params: list[int]) -> None:
        self._owner = owner  # the optimizer's class
        self._params = params
        # Both are replaced as a whole by every change, so that what was read from them tells by its
        # identity whether it is stale, and a change is made at once.
        self._own: dict[str, Any] = {}  # what a checkpoint's group has beside hyperparameters
        self._hypers = {name: self._check(name, value) for name, value in hypers.items()}
        # The hyperparameters of which the rule's reading is known, but for a scheduled rate.
        self._last_read: tuple[dict[str, Any] | None, list[float]] = (None, [])

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            raise AttributeError(f'{name} must be set as group["{name}"], got {value!r}')
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Another version's rules may read in another order.
        self.__dict__.update(state, _last_read=(None, []))
        self._hypers = {**self._owner._quiet, **self._hypers}  # which it may not have known

    def __copy__(self) -> ParamGroup:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, _hypers=dict(self._hypers), _own=dict(self._own))
        return twin

    def _telling(self) -> dict[str, Any]:
        """The hyperparameters but for options of other libraries' equations at their defaults."""
        return telling(self._hypers, self._owner._quiet)

    def _check(self, name: str, value: Any) -> Any:
        return self._owner._spec.check(name, value, schedules=True)

    def __getitem__(self, name: str) -> Any:
        if name == "params":
            return list(self._params)
        return self._own[name] if name in self._own else self._hypers[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if name in self._own:
            self._own = {**self._own, name: value}
            return
        if name not in self._hypers:
            known = ", ".join(self._hypers)
            raise ValueError(f"hyperparameter must be one of {known}, got {name!r}")
        self._hypers = {**self._hypers, name: self._check(name, value)}

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{name} must stay: a group keeps all its hyperparameters")

    def __iter__(self) -> Iterator[str]:
        return iter((*self._telling(), *self._own, "params"))

    def __len__(self) -> int:
        return len(self._telling()) + len(self._own) + 1

    def _stored(self) -> dict[str, Any]:
        """The schedules among the hyperparameters, as a checkpoint has them."""
        if not any(map(is_scheduled, self._hypers.values())):
            return {}
        from fusedstep.schedules import Schedule, stored

        return {
            name: stored(value)
            for name, value in self._hypers.items()
            if any(isinstance(v, Schedule) for v in (value if type(value) is tuple else [value]))
        }

    def __repr__(self) -> str:
        return f"ParamGroup({', '.join(assignments(self._telling()))}, params={self._params})"


def telling(hypers: Mapping[str, Any], quiet: Mapping[str, Any]) -> dict[str, Any]:
    """`hypers` without those that have the value that `quiet` has for them."""
    return {n: v for n, v in hypers.items() if n not in quiet or v != quiet[n]}


def assignments(hypers: Mapping[str, Any]) -> list[str]:
    return [f"{name}={value!r}" for name, value in hypers.items()]


def made(
    groups: Any, hypers: dict[str, Any], names: Sequence[str], owner: Any
) -> tuple[list[ParamGroup], list[int]]:
    """The groups of an optimizer of class `owner`, the default one first, and each name's group.

    `groups` and `hypers` are what its constructor was given.
    """
    if isinstance(groups, Group) or not isinstance(groups, Iterable):
        raise TypeError(f"groups must be a sequence of Group objects, got {groups!r}")
    groups = list(groups)
    for group in groups:
        if not isinstance(group, Group):
            raise TypeError(f"groups must be Group objects, got {group!r}")
        for name in group.hypers:
            if name not in hypers:
                known = ", ".join(hypers)
                raise ValueError(f"{group!r} must name hyperparameters of {known}, got {name!r}")
    members: list[list[int]] = [[] for _ in range(len(groups) + 1)]
    group_of = []
    patterns = Patterns(groups)
    for i, name in enumerate(names):
        first = patterns.first(name)
        place = 0 if first is None else 1 + first
        members[place].append(i)
        group_of.append(place)
    for group, found in zip(groups, members[1:], strict=True):
        if not found:
            raise ValueError(
                f"{group!r} must match a parameter that no earlier group has, got names"
                f" {list(names)[:8]}"
            )
    own = [{}, *(group.hypers for group in groups)]
    made = [
        ParamGroup(hypers | extra, owner, found) for extra, found in zip(own, members, strict=True)
    ]
    return made, group_of
