"""What torch's autograd must be told of memory that was written to behind its back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def announcer() -> Callable[[list[Any]], None]:
    """torch's function that raises the version of tensors, so that a stale backward raises.

    The one in C where there is: no signal's handler runs inside it.
    """
    torch = sys.modules["torch"]
    public = torch.autograd.graph.increment_version
    for found in (getattr(torch._C, "_increment_version", public), public):
        try:
            found([])
        except TypeError:  # torch before 2.6 takes one tensor at a time
            continue
        return found  # type: ignore[no-any-return]  # torch is not followed

    def one_by_one(tensors: list[Any]) -> None:
        for tensor in tensors:
            public(tensor)

    return one_by_one
