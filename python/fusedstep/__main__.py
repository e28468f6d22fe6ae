"""The command line: `fusedstep info | demo | plot | gallery | convert | bench`.

Or `python -m fusedstep`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import importlib.util
import inspect
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

import fusedstep as fs
from fusedstep import schedules
from fusedstep._arrays import DTYPES
from fusedstep._hypers import as_integer
from fusedstep._plot import canvas
from fusedstep.bench import OPTIMIZERS, Refused

# What `plot` draws: every schedule that is a function of the step alone.
_SCHEDULES: dict[str, type[schedules.Schedule]] = {
    name.lower(): found
    for name, found in schedules.Schedule._types.items()
    if name in schedules.__all__ and found is not schedules.ReduceOnPlateau
}

_SWEEP = [10**3, 10**4, 10**5, 10**6, 10**7, 10**8]


def _count(text: str) -> int:
    """A positive integer, also as 1e6 or 2^26."""
    try:
        base, caret, power = text.partition("^")
        number = math.pow(int(base), int(power)) if caret else float(text)
    except (ValueError, OverflowError):
        number = 0.0
    if not 1 <= number < math.inf or number != int(number):
        raise argparse.ArgumentTypeError(f"must be an integer >= 1 (1000, 1e6, 2^26), got {text!r}")
    return int(number)


def _of(known: Iterable[str], text: str) -> str:
    """One of the `known` names, in any case."""
    name = text.lower()
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, 1)
    meant = f"; {near[0]} may be meant" if near else ""
    raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}, got {text!r}{meant}")


def _value(text: str) -> Any:
    """An option of `plot` as an int (1e3 too), a float or a string, for the schedule to judge."""
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if abs(number) <= 2**53 and number.is_integer() else number


def _add_plot(commands: Any) -> None:
    plot = commands.add_parser("plot", help="draw one schedule or several")
    plot.add_argument("schedules", nargs="+", metavar="SCHEDULE",
                      type=lambda text: _of(_SCHEDULES, text.replace("-", "").replace("_", "")),
                      help=", ".join(_SCHEDULES))  # fmt: skip
    users: dict[str, list[str]] = {}
    for name, found in _SCHEDULES.items():
        for argument in found._arguments():
            if "momentum" not in argument:  # the picture is of the rate
                users.setdefault(argument, []).append(name)
    for argument, names in users.items():
        option = f"--{argument.replace('_', '-')}"
        text = "the learning rate" if argument == "lr" else f"of {', '.join(names)}"
        if argument == "three_phase":
            plot.add_argument(option, action="store_true", default=None, help=text)
        else:
            several = "+" if argument == "milestones" else None
            plot.add_argument(option, type=_value, nargs=several, metavar="X", help=text)
    plot.add_argument("--warmup", type=_value, metavar="STEPS", help="linear warm-up before each")
    plot.add_argument("--start", type=_value, metavar="X", help="what the warm-up starts from (0)")
    plot.add_argument("--steps", type=_value, metavar="N", help="draw up to this one")
    plot.add_argument("-o", "--output", default="fusedstep-plot.png", metavar="PNG",
                      help="where to write the picture (%(default)s)")  # fmt: skip


def _assignment(text: str) -> tuple[str, Any]:
    """`name=value` as the name and a number, word or tuple."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def _add_convert(commands: Any) -> None:
    from fusedstep.convert import _command

    convert = commands.add_parser("convert", help="an optimizer's checkpoint from another library")
    convert.add_argument("checkpoint", help="the file, or folder, of the other library")
    convert.add_argument("--from", dest="library", choices=_command.LIBRARIES,
                         help="whose it is (as its name says)")  # fmt: skip
    convert.add_argument("--optimizer", metavar="NAME", help="whose state it is, if it is silent")
    convert.add_argument(
        "--set",
        dest="arguments",
        action="append",
        type=_assignment,
        default=[],
        metavar="NAME=VALUE",
        help="an argument that it does not have",
    )
    convert.add_argument("--to", choices=_command.TARGETS,
                         help="for whom to write (torch for .pt, else fusedstep)")  # fmt: skip
    convert.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help=".pt, or .safetensors, which fusedstep.load reads (only tell)",
    )


class _Parser(argparse.ArgumentParser):
    """Refuses a wrong value in one line, as commands do; what is missing or unknown with usage."""

    def error(self, message: str) -> NoReturn:
        option, colon, rest = message.removeprefix("argument ").partition(": ")
        if not (colon and message.startswith("argument ")):
            super().error(message)
        self.exit(2, f"{self.prog}: {option} {rest}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fusedstep",
        description="Optimizer updates for large flat parameter buffers, one sweep over memory.",
    )
    parser.add_argument("--version", action="version", version=fs.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser("info", help="instruction sets, threads, pages, CUDA, versions")

    demo = commands.add_parser("demo", help="train on handwritten digits, then a short benchmark")
    demo.add_argument("-o", "--output", default="fusedstep-demo.png", metavar="PNG",
                      help="where to write the loss curves (%(default)s)")  # fmt: skip
    demo.add_argument("--epochs", type=_count, default=40, help="per optimizer (%(default)s)")
    demo.add_argument("--n", type=_count, default=8_000_000, help="benchmark size (%(default)s)")

    _add_plot(commands)

    gallery = commands.add_parser("gallery", help="the lecture in figures, as a page to read")
    gallery.add_argument("-o", "--output", default="fusedstep-gallery", metavar="DIR",
                         help="the folder to write into (%(default)s)")  # fmt: skip

    _add_convert(commands)

    bench = commands.add_parser("bench", help="steps against the memory ceiling and torch")
    bench.add_argument("--optimizers", nargs="+", metavar="NAME",
                       type=partial(_of, OPTIMIZERS), help="which ones (all)")  # fmt: skip
    bench.add_argument("--models", nargs="*", metavar="MODEL",
                       help="torch's optimizers and ours on the shapes of mlp, 1000x1000, resnet50,"
                       " gpt2 (all)")  # fmt: skip
    bench.add_argument("--step", action="store_true",
                       help="all of a training step in one sweep, and narrow streams, beside what"
                       " torch and other libraries do for it")  # fmt: skip
    bench.add_argument(
        "--jax",
        action="store_true",
        help="fusedstep.jax beside optax, each in a jit with donated arrays",
    )
    bench.add_argument("--n", nargs="+", type=_count,
                       help="elements (2^24; with --plot a sweep, with --step 2^26)")  # fmt: skip
    bench.add_argument("--sweep", action="store_true", help="n from 1e3 to 1e8")
    bench.add_argument("--threads", type=_count, help="for us and for torch (all cores)")
    bench.add_argument("--dtype", default="float32", choices=DTYPES)
    bench.add_argument("--grad-dtype", choices=DTYPES, help="of gradients (as --dtype)")
    bench.add_argument("--isa", choices=fs.usable_isas(), help="instruction set (the widest)")
    bench.add_argument("--rounds", type=_count, default=9, help="timings of each (%(default)s)")
    bench.add_argument("--compile", action="store_true", help="measure torch.compile too")
    bench.add_argument("--no-torch", action="store_true", help="leave torch out")
    bench.add_argument("--json", metavar="FILE", help="write rows and machine")
    bench.add_argument("--plot", metavar="FILE", help="draw GB/s against n")
    return parser


def _info() -> None:
    for key, value in fs.info().items():
        if key == "cuda" and value:
            seen = [f"{d['name']} ({d['capability']})" for d in value["devices"]]
            text = f"{', '.join(value['architectures'])}; devices: {', '.join(seen) or 'none'}"
        elif isinstance(value, list):
            text = ", ".join(value)
        elif isinstance(value, bool):
            text = "yes" if value else "no"
        else:
            text = "not installed" if value is None else str(value)
        print(f"{key.replace('_', ' '):18} {text}")


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """What to call with a label as each of `total` parts begins: it moves a bar at the foot of the
    terminal, below what is printed meanwhile, and prints a line where there is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    below = sys.stdout.isatty()
    console, begun = Console(stderr=not below), itertools.count()
    if not console.is_terminal:
        yield lambda label: print(f"{label} ({next(begun) + 1} of {total})", file=sys.stderr)
        return
    columns = TextColumn("{task.description:28}", markup=False), BarColumn(), MofNCompleteColumn()
    bar = Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, redirect_stdout=below
    )
    with bar:
        task = bar.add_task("", total=total)
        yield lambda label: bar.update(task, description=label, completed=next(begun))


def _check_output(path: str | None, picture: bool = False) -> None:
    """Raises OSError before the work, not after it, where its result could not be written."""
    if path is None:
        return
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        raise OSError(f"cannot write {path}: not a file name in a folder to write in")
    if picture:
        from matplotlib.backend_bases import FigureCanvasBase

        known = FigureCanvasBase.get_supported_filetypes()
        formats = [one for one in known if one != "pgf"]  # which needs LaTeX
        if os.path.splitext(path)[1].lstrip(".").lower() not in formats:
            raise OSError(f"cannot write {path}: its ending must be one of {', '.join(formats)}")


def _demo(args: argparse.Namespace) -> None:
    from rich.console import Console

    from fusedstep import bench, demo

    _check_output(args.output, picture=True)
    bench.check_sizes(list(OPTIMIZERS), [args.n])
    out = Console()
    data = demo.Digits.load()
    results = []
    with _progress(len(demo.OPTIMIZERS)) as begin:
        for name in demo.OPTIMIZERS:
            begin(f"training with {name}")
            results.append(demo.train(name, data, args.epochs))
    out.print(demo.table(results))
    demo.plot(results, args.output)
    out.print(f"loss curves: {args.output}\n", markup=False)  # in which brackets are a name's
    with _progress(len(OPTIMIZERS)) as begin:
        rows = bench.measure(sizes=[args.n], rounds=3, progress=begin)
    out.print(demo.speed_table(rows))


def _schedule(name: str, given: dict[str, Any], used: set[str]) -> schedules.Schedule:
    """The schedule that the options ask for; adds those it takes to `used`."""
    wanted = _SCHEDULES[name]
    own = {argument: given[argument] for argument in wanted._arguments() if argument in given}
    used.update(own)
    if "max_lr" in wanted._arguments() and "max_lr" not in own and "lr" in given:
        own["max_lr"] = given["lr"]
        used.add("lr")
    for argument, parameter in inspect.signature(wanted).parameters.items():
        if parameter.default is parameter.empty and argument not in own:
            raise _Usage(f"{name} needs --{argument.replace('_', '-')}")
    return wanted(**own)


def _plot(args: argparse.Namespace) -> None:
    arguments = {a for found in _SCHEDULES.values() for a in found._arguments()}
    given = {name: value for name, value in vars(args).items()
             if name in arguments and value is not None}  # fmt: skip
    used: set[str] = set()
    if len(set(args.schedules)) < len(args.schedules):
        raise _Usage(f"each schedule must be named once, got {', '.join(args.schedules)}")
    if args.start is not None and args.warmup is None:
        raise _Usage("--start needs --warmup")
    try:
        drawn = {name: _schedule(name, given, used) for name in args.schedules}
        if args.warmup is not None:
            start = 0.0 if args.start is None else args.start
            warmup = as_integer("--warmup", args.warmup, 0)
            drawn = {name: one.warmup(warmup, start) for name, one in drawn.items()}
        steps = max(one._shown for one in drawn.values()) if args.steps is None else args.steps
        if unused := sorted(given.keys() - used):
            raise _Usage(f"--{unused[0].replace('_', '-')} must be given to a schedule that has it,"
                         f" got {', '.join(args.schedules)}")  # fmt: skip
        if importlib.util.find_spec("matplotlib") is None:
            raise ModuleNotFoundError("No module named 'matplotlib'")
        _check_output(args.output, picture=True)
        _draw(drawn, steps, args.output)
    except (TypeError, ValueError) as error:
        raise _Usage(str(error)) from None
    print(args.output)


def _draw(drawn: dict[str, schedules.Schedule], steps: int, path: str) -> None:
    figure, axes = canvas((8, 4.5))
    for name, schedule in drawn.items():
        schedule.plot(steps, axes, label=name, lw=1.8)
        if len(drawn) == 1:
            axes.set_title(repr(schedule), fontsize="medium", wrap=True)
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if len(drawn) > 1:
        axes.legend()
    figure.savefig(path, dpi=130)


def _gallery(args: argparse.Namespace) -> None:
    from fusedstep import gallery

    if not args.output:
        raise _Usage("--output must name a folder, got ''")
    with _progress(len(gallery.FIGURES)) as begin:
        page = gallery.write(args.output, lambda name: begin(f"drawing {name}"))
    print(page)


def _convert(args: argparse.Namespace) -> None:
    from fusedstep.convert import _command

    if args.to and not args.output:
        raise _Usage("--to needs --output")
    _check_output(args.output)
    given = dict(args.arguments)
    if args.optimizer:
        given["optimizer"] = args.optimizer
    try:
        state = _command.read(args.checkpoint, args.library, given)
        for line in _command.told(args.checkpoint, state):
            print(line)
        if args.output:
            torch_s = os.path.splitext(args.output)[1] in (".pt", ".pth")
            target = args.to or ("torch" if torch_s else "fusedstep")
            for line in _command.line("written", _command.write(args.output, target, state)):
                print(line)
    except (TypeError, ValueError) as error:
        raise _Usage(str(error)) from None


def _check_alone(args: argparse.Namespace, option: str, others: Sequence[str]) -> None:
    """Raises _Usage for options that mean nothing beside `option`."""
    for name in others:
        if getattr(args, name) not in (None, False):
            raise _Usage(f"--{name.replace('_', '-')} must not be given with {option}")
    if args.dtype != "float32":
        raise _Usage(f"--dtype must be float32 with {option}, got {args.dtype}")


def _needs_torch(option: str) -> None:
    if importlib.util.find_spec("torch") is None:
        raise ModuleNotFoundError(f"{option} needs torch: pip install 'fusedstep[torch]'")


def _bench_step(args: argparse.Namespace) -> tuple[Any, ...]:
    from fusedstep import bench_step

    _check_alone(args, "--step", ("models", "optimizers", "sweep", "plot", "compile", "grad_dtype"))
    sizes = args.n or [1 << 26]
    if len(sizes) > 1:
        raise _Usage(f"--n must be one size with --step, got {len(sizes)}")
    measure = partial(bench_step.measure, sizes[0], torch=False if args.no_torch else None)
    return bench_step.StepTable(), len(bench_step.CASES), measure


def _bench_models(args: argparse.Namespace) -> tuple[Any, ...]:
    from fusedstep import bench_models

    _check_alone(args, "--models", ("n", "sweep", "plot", "compile", "no_torch", "grad_dtype"))
    names = args.optimizers or bench_models.OPTIMIZERS
    models = args.models or list(bench_models.MODELS)
    bench_models.check(names, models, args.rounds, args.threads)
    _needs_torch("--models")
    measure = partial(bench_models.measure, names, models)
    return bench_models.ModelTable(), len(names) * len(models), measure


def _bench_jax(args: argparse.Namespace) -> tuple[Any, ...]:
    from fusedstep import bench_jax

    others = "models", "step", "plot", "compile", "no_torch", "grad_dtype"
    _check_alone(args, "--jax", others)
    if args.n and args.sweep:
        raise _Usage("--sweep must not be given with --n")
    names = args.optimizers or bench_jax.OPTIMIZERS
    bench_jax.check(names, args.rounds, args.threads)
    sizes = args.n or (_SWEEP if args.sweep else [1 << 24])
    for module, package in (("jax", "'fusedstep[jax]' optax"), ("optax", "optax")):
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"--jax needs {module}: pip install {package}")
    try:
        importlib.import_module("fusedstep.jax")
    except ImportError as error:  # of an interpreter or a build that has it not
        raise ModuleNotFoundError(f"--jax needs fusedstep.jax, pip install it: {error}") from None
    measure = partial(bench_jax.measure, names, sizes)
    return bench_jax.JaxTable(), len(bench_jax.chosen(names, sizes)), measure


def _bench_buffer(args: argparse.Namespace) -> tuple[Any, ...]:
    from fusedstep import bench

    if args.n and args.sweep:
        raise _Usage("--sweep must not be given with --n")
    torch = not args.no_torch and args.grad_dtype in (None, args.dtype)
    if args.compile and not torch:
        other = "--no-torch" if args.no_torch else "another --grad-dtype, which torch has not"
        raise _Usage(f"--compile must not be given with {other}")
    if args.compile:
        _needs_torch("--compile")
    torch = torch and bench.has_torch()
    names = args.optimizers or list(OPTIMIZERS)
    sizes = args.n or (_SWEEP if args.sweep or args.plot else [1 << 24])
    dtypes = {"dtype": args.dtype, "grad_dtype": args.grad_dtype}
    measure = partial(bench.measure, names, sizes, torch=torch, compiled=args.compile, **dtypes)
    return bench.BufferTable(torch, args.compile), len(names) * len(sizes), measure


def _bench(args: argparse.Namespace) -> None:
    from fusedstep import bench

    _check_output(args.json)
    _check_output(args.plot, picture=True)
    kinds = {"jax": _bench_jax, "step": _bench_step, "models": _bench_models}
    kind = next((kinds[k] for k in kinds if getattr(args, k) not in (None, False)), _bench_buffer)
    table, total, measure = kind(args)
    own = {"threads": args.threads, "isa": args.isa, "rounds": args.rounds}
    try:
        with _progress(total) as begin:
            measure(**own, progress=begin, each=table.add)
    finally:  # of an interrupted run what there is
        if table.rows:
            if args.json:
                with open(args.json, "w") as file:
                    json.dump(bench.as_json(table.rows, table.versions()), file, indent=1)
            if args.plot:
                bench.plot(table.rows, args.plot)
            table.close()


class _Usage(Exception):
    """Arguments that do not go together."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        {
            "info": lambda _: _info(),
            "demo": _demo,
            "plot": _plot,
            "gallery": _gallery,
            "bench": _bench,
            "convert": _convert,
        }[args.command](args)
    except ModuleNotFoundError as error:
        hint = "" if "pip install" in str(error) else f": pip install 'fusedstep[{args.command}]'"
        print(f"fusedstep {args.command}: {error}{hint}", file=sys.stderr)
        return 1
    except (OSError, MemoryError, _Usage, Refused) as error:
        option = "--" if isinstance(error, Refused) else ""
        print(f"fusedstep {args.command}: {option}{str(error) or 'out of memory'}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # torch's, which has no class of its own for it
            raise
        print(f"fusedstep {args.command}: out of memory", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # as shells count a signal 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
