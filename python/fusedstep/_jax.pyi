"""The compiled JAX module, as csrc/jax/module.cpp exposes it."""

from collections.abc import Callable
from typing import Any

FFI_VERSION: tuple[int, int]
STREAMS: int
ROW_WORDS: int

def use(stages: Any, evaluate: Callable[[str, int], list[float]]) -> None: ...
def targets() -> dict[str, Any]: ...
