"""Writes the functions of `fusedstep.jax` into its source, where editors and type checkers look.

    python .ci/jax_functions.py [--check]

They have the names, arguments and defaults of `fusedstep.conventions.optax`. With --check nothing
is written, and the exit status is 1 if something would be.
"""

import inspect
import sys
import textwrap
from pathlib import Path

from fusedstep.conventions import optax

FILE = Path(__file__).parents[1] / "python" / "fusedstep" / "jax" / "__init__.py"
BEGIN, END = "# Written by .ci/jax_functions.py:\n", "# End of what it writes.\n"


def arguments(convention):
    """The lines of a function's arguments."""
    star = False
    for one in list(inspect.signature(convention).parameters.values())[1:]:  # but for params
        if one.kind is one.VAR_KEYWORD:
            continue
        if one.kind is one.KEYWORD_ONLY and not star:
            yield "*,"
            star = True
        default = "" if one.default is one.empty else f" = {one.default!r}"
        yield f"{one.name}: {one.annotation}{default},"
    yield "**keywords: Unpack[Keywords],"


def source():
    """The names, and the functions."""
    others = ["Keywords", "State", "Transformation", "by_name"]
    yield "\n__all__ = [\n"
    order = sorted({*others, *optax.__all__}, key=lambda name: (name.islower(), name))
    yield from (f'    "{name}",\n' for name in order)
    yield "]\n"
    for name in optax.__all__:
        convention = getattr(optax, name)
        yield f"\n\n@_listed\ndef {name}(\n"
        yield from (f"    {line}\n" for line in arguments(convention))
        yield ") -> Transformation:\n"
        doc = inspect.cleandoc(convention.__doc__)
        yield textwrap.indent(f'"""{doc}\n"""' if "\n" in doc else f'"""{doc}"""', "    ") + "\n"
        yield f"    return _made(_optax.{name}, locals())\n"
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
    print(f"{FILE.name} of fusedstep.jax is out of date: run python .ci/jax_functions.py")
    return 1


if __name__ == "__main__":
    sys.exit(main())
