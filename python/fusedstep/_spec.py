"""The specification of an optimizer, which every layer reads: its rule, and what Python adds."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

from fusedstep import _core
from fusedstep._hypers import HYPERS, TUPLES, Hyper, at_step, check, is_scheduled

_RULES = _core.rules()

# How the core reads a group: these, then the rule's own hyperparameters, of which lr is the first.
_COMMON = ("maximize", "decoupled_weight_decay", "weight_decay")
LR = len(_COMMON)  # the place of the rate

STATES = {state for _, states, *_ in _RULES.values() for state in states}  # of all rules


def _anything(group: Mapping[str, Any]) -> None:
    """Raises ValueError for values that are fine alone but not together: here none are."""


class _Declared(NamedTuple):
    rule: str
    fixed: Mapping[str, Any] = MappingProxyType({})
    hypers: Mapping[str, Hyper] = MappingProxyType({})
    beyond_torch: Sequence[str] = ()
    always: Sequence[str] = ()
    carried: Sequence[str] = ()
    counts_steps: bool = True
    late: str = ""
    begins_at_once: bool = False
    initial: Mapping[str, float | str] = MappingProxyType({})
    check_together: Callable[[Mapping[str, Any]], None] = _anything


class Spec(_Declared):
    """An optimizer, as its class declares it.

    `native` is a group of hyperparameters as the rule reads it: numbers in the order of `order`.

    Attributes:
        rule: what the core calls the rule.
        fixed: hyperparameters that the class does not leave open.
        hypers: hyperparameters whose meaning is not that of every other optimizer.
        beyond_torch: hyperparameters that torch's class has not. In its groups, where clients put
            what they like, they mean nothing, unless `fusedstep.torch` lists them.
        always: those of them that checkpoints and representations name at their defaults too. All
            others only matter to who wants another library's equation.
        carried: the numbers that the rule carries from update to update, by torch's names.
        counts_steps: whether torch keeps `step` in the state. A rule that does not count carries
            whether its state has begun.
        initial: what states and carried numbers begin with where that is not 0: a number, or the
            hyperparameter of this name.
        late: the state that may begin after the others, as what it replaced until then. The second
            number that the rule carries is whether there is none so far.
        begins_at_once: whether torch's class has states before the first step, without which it
            cannot load a checkpoint.
        check_together: raises ValueError for values that are fine alone but not together.
    """

    @cached_property
    def states(self) -> Sequence[str]:
        """The states that the rule has under some hyperparameters."""
        return tuple(_RULES[self.rule][1])

    @cached_property
    def positive(self) -> Sequence[str]:
        """The states that are never negative."""
        return tuple(itertools.compress(self.states, _RULES[self.rule][3]))

    @cached_property
    def scalars(self) -> Sequence[str]:
        """The numbers in a parameter's state, by torch's names."""
        return (*(["step"] if self.counts_steps else []), *self.carried)

    @cached_property
    def order(self) -> Sequence[str]:
        """The names of the numbers of `native`."""
        return (*_COMMON, *_RULES[self.rule][0])

    @cached_property
    def table(self) -> Mapping[str, Hyper]:
        """Every hyperparameter of any optimizer, as it is checked here."""
        return {**HYPERS, **self.hypers}

    @cached_property
    def parts(self) -> Mapping[str, Sequence[str]]:
        """The rule's names of the parts of each tuple: `betas` are `beta1`, `beta2`."""
        ours = _RULES[self.rule][0]
        found = {name: tuple(h for h in ours if h.startswith(name[:-1])) for name in TUPLES}
        return {name: parts for name, parts in found.items() if parts}

    def check(self, name: str, value: Any, schedules: bool = False) -> Any:
        """A hyperparameter as a float, a tuple of floats or a bool, or TypeError or ValueError."""
        return check(name, value, self.table[name], schedules, len(self.parts.get(name, ())))

    def at(self, hypers: Mapping[str, Any], t: int) -> dict[str, Any]:
        """A group's values in the step after `t` others, but for the rate."""
        return {
            name: at_step(name, value, t, self.table[name])
            if name != "lr" and is_scheduled(value)
            else value
            for name, value in hypers.items()
        }

    def native(self, hypers: Mapping[str, Any]) -> list[float]:
        """A group as the rule reads it; a rate that follows a schedule as 0."""
        values = {**self.fixed, **hypers}
        for name, parts in self.parts.items():
            values.update(zip(parts, values.pop(name), strict=True))
        if callable(values["lr"]):
            values["lr"] = 0.0
        if values.get("decay_after"):  # csrc/interface/group.h: Decoupled
            values["decoupled_weight_decay"] = 2
        return [float(values.get(name, False)) for name in self.order]

    def native_at(self, hypers: Mapping[str, Any], t: int) -> list[float]:
        """`native` in the step after `t` others, but for the rate, checked."""
        now = self.at(hypers, t)
        self.check_together(now)
        return self.native(now)

    def numbers(self, native: Sequence[float]) -> dict[str, float]:
        """The numbers of `native` by the rule's names."""
        return dict(zip(self.order, native, strict=True))

    def uses(self, native: Sequence[float]) -> list[str]:
        """The states that the rule has under these hyperparameters."""
        used = _core.mask_of(self.rule, native[LR:])
        return [state for state, use in zip(self.states, used, strict=True) if use]

    def required(self, uses: Iterable[str]) -> list[str]:
        """The keys that a saved state must have where a step has the states `uses`."""
        return [*self.scalars, *(state for state in self.states if state in uses)]

    def first(self, name: str, hypers: Mapping[str, Any]) -> float:
        """The value that a new state is filled with, or a carried number begins with."""
        value = self.initial.get(name, 0.0)
        return float(hypers[value] if isinstance(value, str) else value)

    def check_divides(self, name: str) -> None:
        """Raises TypeError about optimizer `name` unless the rule divides its steps."""
        if not _RULES[self.rule][2]:
            raise TypeError(f"optimizer must be one that divides its steps, got {name}")

    def divisor(self, native: Sequence[float], t: int, state: Mapping[str, Any]) -> Any:
        """The divisor of each element's step after update t, from its float64 states.

        None where there was no update, or none under these hyperparameters.
        """
        if t == 0 or any(name not in state for name in self.uses(native)):
            return None
        states = [state.get(name) for name in self.states]
        return _core.divisors(self.rule, native[LR:], t, states)

    def argument_docs(self, signature: inspect.Signature, schedules: bool) -> list[str]:
        """A docstring line for each hyperparameter of a constructor."""
        lines = []
        for name, parameter in signature.parameters.items():
            if name in self.table:
                hyper = self.table[name]
                doc = hyper.doc
                if name == "weight_decay" and self.fixed.get("decoupled_weight_decay"):
                    doc = "weight decay, decoupled: shrinks p by `1 - lr*weight_decay`"
                rule = hyper.rule + (", or a schedule" if schedules and hyper.scheduled else "")
                lines.append(f"{name}: {doc}; {rule} (default {parameter.default!r}).")
        return lines
