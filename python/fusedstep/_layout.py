"""Where several arrays lie in one flat one."""

from __future__ import annotations

from math import prod

from fusedstep import _core
from fusedstep._types import Shapes

# Elements between segment starts are a multiple of this: 64 bytes of the smallest type, so that one
# layout is 64-byte aligned under every dtype and a parameter's states sit at its own offsets.
_ALIGN_ELEMENTS = _core.ALIGNMENT // 2


class Layout:
    """Where each named array lies in a flat one, in elements; shared by buffers of one shape."""

    __slots__ = ("n", "offsets", "shapes")

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = dict(shapes)
        self.offsets: list[int] = []
        end = 0
        for shape in self.shapes.values():
            self.offsets.append(end)
            end += -(-prod(shape) // _ALIGN_ELEMENTS) * _ALIGN_ELEMENTS
        self.n = end

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Layout):
            return NotImplemented
        return self is other or list(self.shapes.items()) == list(other.shapes.items())

    __hash__ = None  # type: ignore[assignment]  # equal by value, mutable parts inside
