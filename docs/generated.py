"""What the pages show of the package and would otherwise repeat: sections, tables, pictures.

`write` makes `docs/_generated`: Markdown to include and figures. A new optimizer, schedule or
figure appears in the pages without an edit here.
"""

import hashlib
import importlib.util
import inspect
import sys
from pathlib import Path

import matplotlib
import ml_dtypes
import numpy as np

import fusedstep as fs
from fusedstep import _core, bench, gallery, schedules

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import recorded

PACKAGE = Path(fs.__file__).parent

# What the pictures show of each schedule; all others of its arguments have their defaults.
SHOWN = {
    "lr": 0.1,
    "max_lr": 0.1,
    "base_lr": 0.01,
    "total": 1000,
    "end": 0.0,
    "every": 250,
    "milestones": (400, 700, 900),
    "period": 100,
    "timescale": 100,
    "step_size_up": 150,
}
SHOWN_BY = {
    "Exponential": {"decay": 0.995},
    "WSD": {"decay": 200},
    "Polynomial": {"power": 2.0},
    "CosineRestarts": {"mult": 2},
}

# Optimizers with a name of their own that are a class with an argument, and what for.
FORMS = {
    "SGD": [
        (
            "momentum",
            "momentum=0.9",
            "ravines, where plain steps jitter: what they agree in adds up",
        ),
        ("Nesterov", "momentum=0.9, nesterov=True", "the same, with less beyond the minimum"),
    ],
    "Adam": [("AMSGrad", "amsgrad=True", "rare large gradients: an element's rate never rises")],
}


def write(folder, tell=print):
    """Writes everything, unless the package and this file are as they were the last time.

    `tell` is called with what is drawn, before it is.
    """
    stamp = folder / "stamp"
    sources = [Path(__file__), Path(_core.__file__), *sorted(PACKAGE.rglob("*.py"))]
    sources += sorted(recorded.GOLDEN.glob("*.json"))
    state = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    state = f"{state.hexdigest()} {has_jax()}"
    if stamp.exists() and stamp.read_text() == state:
        return
    folder.mkdir(exist_ok=True)
    matplotlib.use("agg")
    (folder / "optimizers.md").write_text(optimizer_sections())
    (folder / "optimizer_list.md").write_text(optimizer_list())
    (folder / "bytes.md").write_text(bytes_table())
    (folder / "conventions.md").write_text(recorded.table())
    (folder / "jax.md").write_text(jax_reference())
    (folder / "schedules.md").write_text(schedule_sections(folder, tell))
    write_gallery(folder, tell)
    stamp.write_text(state)


def has_jax():
    """Whether fusedstep.jax can be read: its module is optional, and so is JAX."""
    return all(importlib.util.find_spec(name) for name in ("jax", "fusedstep._jax"))


def jax_reference():
    """What fusedstep.jax has, where it can be read."""
    if not has_jax():
        return (
            "This documentation was built without JAX; `help(fusedstep.jax)` has its reference.\n"
        )
    return "```{eval-rst}\n.. automodule:: fusedstep.jax\n   :members:\n```\n"


def optimizer_classes():
    """The public optimizers by name, in the order of their file, which is one of complexity."""
    return {name: getattr(fs, name) for name in fs.optimizers.NAMES}


def optimizer_sections():
    """A section for each class: its docstring."""
    return "\n".join(
        f"## {name}\n\n```{{eval-rst}}\n.. autoclass:: fusedstep.{name}\n"
        + "".join(f"\n   .. automethod:: {m}" for m in own_methods(found))
        + "\n```\n"
        for name, found in optimizer_classes().items()
    )


def own_methods(found):
    """The public methods that a class has beside those of `Optimizer`."""
    public = [name for name in vars(found) if not name.startswith("_")]
    return [name for name in public if not hasattr(fs.Optimizer, name)]


def optimizer_list():
    """A line for each class: what it is for, as its docstring says under Use; and its forms."""
    rows = []
    for name, found in optimizer_classes().items():
        rows.append(f"| {{py:class}}`~fusedstep.{name}` | {use_of(found)} |")
        rows += [f"| {known}: `{name}({how})` | {use} |" for known, how, use in FORMS.get(name, ())]
    return "\n".join(["| optimizer | use it for |", "|---|---|", *rows, ""])


def use_of(found):
    """The first sentence of a class's Use section."""
    section = inspect.getdoc(found).partition("\nUse:\n")[2].partition("\n\n")[0]
    return " ".join(section.split()).partition(". ")[0].rstrip(".")


def bytes_table():
    """Bytes per parameter, kept and moved, counted on optimizers of one element."""
    kinds = [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"),
             ("float64", "float64")]  # fmt: skip
    head = ["optimizer", "states", "state bytes", *(p if p == g else f"{p}, {g} gradients"
                                                   for p, g in kinds)]  # fmt: skip
    rows = []
    for name, (found, hypers) in bench.OPTIMIZERS.items():
        arrays = states_of(found, hypers, "float32")
        kept = sum(array.nbytes for array in arrays.values())
        moved = [bytes_moved(found, hypers, *kind) for kind in kinds]
        names = ", ".join(f"`{state}`" for state in arrays) or "none"
        rows.append([name, names, kept, *moved])
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def states_of(found, hypers, dtype):
    param = np.ones(1, as_dtype(dtype))
    return getattr(fs, found)(param, **hypers).state[0]


def as_dtype(name):
    return np.dtype(getattr(ml_dtypes, name) if name == "bfloat16" else name)


def bytes_moved(found, hypers, param, grad):
    """A step reads the gradient, and reads and writes parameters and states."""
    kept = sum(array.nbytes for array in states_of(found, hypers, param).values())
    return 2 * as_dtype(param).itemsize + as_dtype(grad).itemsize + 2 * kept


def schedule_classes():
    """The public schedules by name, in the order of their file."""
    found = ((name, one) for name, one in vars(schedules).items() if name in schedules.__all__)
    return {n: c for n, c in found if inspect.isclass(c) and c is not schedules.Schedule}


def schedule_sections(folder, tell):
    """A section for each class: its docstring, and a picture that its `plot` draws."""
    sections = []
    for name, found in schedule_classes().items():
        shown = example(name, found)
        tell(f"drawing the schedule {name}")
        draw(shown, folder / f"schedule_{name.lower()}.svg")
        methods = [m for m in vars(found) if not m.startswith("_") and m not in ("span", "momentum")
                   and inspect.isroutine(getattr(found, m))]  # fmt: skip
        sections.append(
            f"### {name}\n\n```{{eval-rst}}\n.. autoclass:: fusedstep.schedules.{name}\n"
            + "".join(f"\n   .. automethod:: {method}" for method in methods)
            + f"\n```\n\n:::{{figure}} /_generated/schedule_{name.lower()}.svg\n"
            f":alt: {name} against the step\n\n`{shown!r}`\n:::\n"
        )
    return "\n".join(sections)


def example(name, found):
    """A schedule of the class with arguments that show what it does."""
    wanted = found._arguments()
    shown = {a: v for a, v in {**SHOWN, **SHOWN_BY.get(name, {})}.items() if a in wanted}
    return found(**shown)


def draw(schedule, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2.2), layout="constrained")
    axes = figure.subplots()
    if isinstance(schedule, schedules.ReduceOnPlateau):  # of a loss that ends its fall at t = 40
        t = range(100)
        axes.plot(t, [schedule.step(max(1 - i / 40, 0.2)) for i in t])
    else:
        schedule.plot(ax=axes)
    axes.set(xlabel="step", ylabel="learning rate")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.savefig(path)


def write_gallery(folder, tell):
    """The gallery's figures, and the Markdown that shows each and the code that made it."""
    gallery.write(folder / "gallery", lambda name: tell(f"drawing the figure {name}"))
    for entry in gallery.FIGURES:
        (folder / f"figure_{entry.name}.md").write_text(
            f"**{entry.question}**\n\n"
            f":::{{figure}} /_generated/gallery/{entry.name}.png\n"
            f":alt: {entry.title}\n:width: 100%\n\n{entry.caption}\n:::\n"
        )
        (folder / f"code_{entry.name}.md").write_text(
            f"The code of the figure, which runs after `from {gallery.figures.__name__} import *`"
            f" (source: {entry.source}):\n\n```python\n{entry.code}\n```\n"
        )
