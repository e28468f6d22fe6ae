"""Writes the classes of `fusedstep.torch` into its source, where editors and type checkers look.

    python .ci/torch_classes.py [--check]

They are made at run time, each from the neutral class and torch's signature (`drop_in` in
python/fusedstep/torch/optimizers.py). What stands between the marks is that signature as of the
torch that is installed here, without the keywords that all of them take. With --check nothing is
written, and the exit status is 1 if something would be.
"""

import inspect
import re
import sys
import textwrap
from pathlib import Path

from torch.optim.optimizer import ParamsT

import fusedstep.torch
from fusedstep import optimizers as neutral
from fusedstep.torch import optimizers

FILE = Path(__file__).parents[1] / "python" / "fusedstep" / "torch" / "__init__.py"
BEGIN, END = "# Written by .ci/torch_classes.py:\n", "# End of what it writes.\n"


def type_name(annotation):
    """An annotation as the source has it."""
    if annotation == ParamsT:
        return "ParamsT"
    if isinstance(annotation, type) and not hasattr(annotation, "__args__"):
        return annotation.__name__
    return re.sub(r"\b(torch|typing|collections\.abc)\.", "", str(annotation))


def arguments(cls):
    """The lines of a class's arguments."""
    keywords, star = optimizers.How.__annotations__, False
    for name, one in inspect.signature(cls).parameters.items():
        if one.kind is one.KEYWORD_ONLY:
            if name in keywords:
                continue
            if not star:
                yield "*,"
            star = True
        default = "" if one.default is one.empty else f" = {one.default!r}"
        yield f"{name}: {type_name(one.annotation)}{default},"
    yield "**how: Unpack[How],"


def source():
    """The names, and the classes."""
    others = [name for name in fusedstep.torch.__all__ if name not in neutral.NAMES]
    yield "\n__all__ = [\n"
    order = sorted({*others, *neutral.NAMES}, key=lambda name: (not name.isupper(), name))
    yield from (f'    "{name}",\n' for name in order)
    yield "]\n"
    for name in neutral.NAMES:
        one = getattr(neutral, name)
        base = optimizers.LookAhead if hasattr(one, "lookahead") else optimizers.Optimizer
        cls = optimizers.drop_in(one)(type(name, (base,), {}))
        base = "Optimizer" if base is optimizers.Optimizer else f"_optimizers.{base.__name__}"
        yield f"\n\n@_drop_in(_neutral.{name})\nclass {name}({base}):\n"
        doc = textwrap.wrap(f'"""{cls.__doc__.splitlines()[0]}"""', 95)
        yield textwrap.indent("\n".join(doc), "    ") + "\n\n"
        yield "    def __init__(\n        self,\n"
        yield from (f"        {line}\n" for line in arguments(cls))
        yield "    ) -> None: ...\n"
    yield "\n\n"


def main():
    text = FILE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    written = before + BEGIN + "".join(source()) + END + after
    if written == text:
        return 0
    if "--check" not in sys.argv[1:]:
        FILE.write_text(written, encoding="utf-8")
        return 0
    print(f"{FILE.name} of fusedstep.torch is out of date: run python .ci/torch_classes.py")
    return 1


if __name__ == "__main__":
    sys.exit(main())
