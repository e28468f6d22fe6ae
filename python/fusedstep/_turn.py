"""Whose turn it is with an optimizer: one step, load or reading of its state at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

from fusedstep import _core

_T = TypeVar("_T")


class _Holding(Protocol):
    def __call__(self, call: Callable[..., _T], /, *given: Any) -> _T: ...


class Turn(NamedTuple):
    """Two functions of the core (turn.h), which call `call(*given)` while they hold the turn.

    RuntimeError while another thread has it. The turn is given back by the core, however the call
    ends: there is no line of Python at which an exception could keep it.
    """

    run: _Holding  # what changes the optimizer; RuntimeError from inside another such call
    read: _Holding  # what reads it, from inside such a call of the same thread too


def new_turn() -> Turn:
    """An optimizer's turn."""
    return Turn(*_core.turn())
