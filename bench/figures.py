"""Writes the measured figures into the README and the page on speed, from bench/results alone.

python bench/figures.py [--check]

What stands between `<!-- figures: NAME -->` and `<!-- end -->` is written anew. With --check
nothing is written, and the exit status is 1 if something would be.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = [ROOT / "README.md", ROOT / "docs" / "speed.md", ROOT / "docs" / "jax.md"]
HERE = "epyc-2cores-avx2"  # the CPU's rows
JAX = "jax-epyc-2cores"


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of a file of `fusedstep bench --json`."""
    found: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    return found


def text(name: str) -> str:
    """What a script printed."""
    return (RESULTS / name).read_text()


def found(pattern: str, name: str) -> float:
    """The last number that a pattern's group finds in a file."""
    every = re.findall(pattern, text(name), re.M)
    if not every:
        raise SystemExit(f"{name} must have {pattern!r}")
    return float(every[-1].replace(",", ""))


def table(head: list[str], lines: Iterator[list[str]]) -> str:
    """A table of Markdown."""
    every = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in every)


def fastest(peers: dict[str, Any]) -> str:
    """How much longer the fastest of torch's implementations takes."""
    known = {name: one for name, one in peers.items() if one}
    if not known:
        return "-"
    name = min(known, key=lambda one: known[one]["ratio"])
    return f"{known[name]['ratio']:.2f}x ({name})"


def flat() -> str:
    """Each optimizer on one large buffer."""
    head = ["optimizer", "bytes/param", "GB/s", "share of ceiling", "torch's fastest / ours"]
    return table(
        head,
        (
            [
                one["optimizer"],
                f"{one['bytes_per_param']:g}",
                f"{one['gbps']:.1f}",
                f"{one['share_of_ceiling']:.2f}",
                fastest(one["torch"]),
            ]
            for one in rows(HERE)
        ),
    )


def step() -> str:
    """All of a training step, and narrow streams."""
    every = rows(f"{HERE}-step")

    def lines() -> Iterator[list[str]]:
        for row in every:
            name = row["mode"]
            if row["n"] != every[0]["n"]:
                name += f", n = {row['n']:,}" + (", one thread" if row["threads"] == 1 else "")
            cells = [name, f"{row['bytes_per_param']:.4g}", f"{row['state_bytes']:.3g}",
                     f"{row['share_of_ceiling']:.2f}"]  # fmt: skip
            for peer, one in row["peers"].items():
                whole, ratio = one["bytes_per_param"], one["ratio"]
                version = f" {one['version']}" if one["version"] else ""
                by_bytes = "" if whole is None else f"{whole / row['bytes_per_param']:.2f}x"
                yield [*cells, peer + version, by_bytes, f"{ratio:.2f}x"]
                cells = [""] * 4

    head = ["AdamW step", "bytes/param", "states", "share of ceiling", "against", "by bytes"]
    return table([*head, "their time / ours"], lines())


def models() -> str:
    """The shapes of models: torch's fastest over ours, as they are and flattened."""
    by_model: dict[str, dict[str, Any]] = {}
    for row in rows(f"{HERE}-models"):
        by_model.setdefault(row["model"], {})[row["optimizer"]] = row
    names = list(next(iter(by_model.values())))

    def cell(row: dict[str, Any]) -> str:
        if not row["torch_ms"]:
            return " / ".join(f"{row[one]:.3g} ms" for one in ("plain_ms", "flat_ms"))
        name = min(row["torch_ms"], key=lambda how: row["torch_ms"][how] or 0.0)
        return " / ".join(f"{row[one][name]:.2f}x" for one in ("plain_ratio", "flat_ratio"))

    def lines() -> Iterator[list[str]]:
        for model, of in by_model.items():
            first = next(iter(of.values()))
            yield [model, f"{first['tensors']:,}", f"{first['n']:,}", *map(cell, of.values())]

    return table(["model", "tensors", "parameters", *names], lines())


def small() -> str:
    """Small and scattered parameters."""
    blocks = text("overheads.txt").split("AdamW, ")
    named = {
        "1,000 elements in a FlatBuffer": ("1,000 elements\n", "FlatBuffer, 1 tensor"),
        "1,000 arrays of 1,000 elements, as a list": ("1,000 tensors", "list of arrays"),
    }

    def lines() -> Iterator[list[str]]:
        for what, (begin, ours) in named.items():
            block = next(one for one in blocks if one.startswith(begin))
            times = {
                name: float(re.search(rf"{name} +([\d.]+) us", block)[1])  # type: ignore[index]
                for name in (ours, "torch fused", "torch foreach")
            }
            own = times.pop(ours)
            others = (f"{_time(one)} ({one / own:.0f}x)" for one in times.values())
            yield [what, _time(own), *others]

    return table(["AdamW step", "fusedstep", "torch fused", "torch foreach"], lines())


def _time(us: float) -> str:
    return f"{us:.3g} us" if us < 1000 else f"{us / 1000:.3g} ms"


def three() -> str:
    """What matters, in three numbers."""
    by_name = {one["optimizer"]: one for one in rows(HERE)}
    adamw, whole = by_name["adamw"], rows(f"{HERE}-step")
    all_in_one = next(one for one in whole if one["mode"].startswith("clip + AdamW + EMA"))
    default = all_in_one["peers"]["torch default"]["ratio"]
    pattern = r"list of arrays +([\d.]+) us\n.*\n +torch fused +([\d.]+)"
    ours, theirs = map(float, re.findall(pattern, text("overheads.txt"))[0])
    share = adamw["share_of_ceiling"]
    return (
        f"- **{adamw['gbps']:.0f} GB/s**: AdamW on 2^26 parameters, {share:.2f} of what this"
        " machine's memory allows (two cores of an AMD EPYC).\n"
        f"- **{theirs / ours:.0f}x**: how much longer torch's fused AdamW takes for 1,000 tensors"
        " of 1,000 elements.\n"
        f"- **{default:.1f}x**: how much longer torch's default takes for clipping, AdamW, an"
        " average, a bfloat16 copy and zeroed gradients, which is one sweep here.\n"
    )


def gpu() -> str:
    """The GPU's figures in words."""
    whole = json.loads((RESULTS / "gpu-nvidia-h100-80gb-hbm3.json").read_text())
    shares = [one["share"] for one in whole["sweeps"] if one["dtype"] == "float32"]
    steps = [
        one
        for one in whole["versus"]
        if (one["what"], one["peer"], one["dtype"]) == ("step", "fused", "float32")
    ]
    by_layout: dict[str, list[float]] = {}
    for one in steps:
        by_layout.setdefault(one["layout"], []).append(one["ratio"])
    told = "; ".join(
        f"{name}: {min(ratios):.2f} to {max(ratios):.2f}x" for name, ratios in by_layout.items()
    )
    return (
        f"On an {whole['machine']['card']} every rule in float32 runs at {min(shares):.2f} to"
        f" {max(shares):.2f} of a copy's bandwidth. torch's fused kernels over ours: {told}.\n"
    )


def jax() -> str:
    """Steps inside of jit, and what an optimizer adds to a small model's."""
    every = rows(JAX)

    def name(row: dict[str, Any]) -> str:
        power = row["n"].bit_length() - 1
        size = f"2^{power}" if row["n"] == 1 << power else f"{row['n']:,}"
        size = f"{row['tree']}, {row['leaves']} leaves" if row["tree"] else size
        return f"{row['optimizer']}, {size}"

    def lines() -> Iterator[list[str]]:
        for row in every:
            if "ms" in row:
                yield [
                    *(name(row), f"{row['bytes_per_param']:g}", f"{row['ms']:.1f}"),
                    *(f"{row['ceiling']['share']:.2f}", f"{row['pages']['share']:.2f}"),
                    f"{row['optax']['ratio']:.2f}x",
                    *(f"{row['update']['ratio']:.2f}x", f"{row['numpy']['ratio']:.2f}x"),
                    *(_bytes(row["temp_bytes"]), _bytes(row["optax"]["temp_bytes"])),
                ]

    head = [
        "optimizer, n",
        "bytes/param",
        "ms",
        "share of ceiling",
        "on XLA's pages",
        "optax / ours",
    ]
    head += ["`update` / `update_params`", "NumPy / ours", "temporary", "optax'"]
    told = table(head, lines())
    for row in every:
        if "ms" not in row:
            ours, theirs = row["fusedstep"], row["optax"]
            told += (
                f"\nA training step of {row['leaves']} weights, {row['n']:,} parameters, takes"
                f" {row['gradients_us']:.0f} us for the gradients,"
                f" {row['without_us'] - row['gradients_us']:.0f} us more for a state that is handed"
                f" on; {row['optimizer']} adds {ours['over_us']:.0f} us, optax'"
                f" {theirs['over_us']:.0f} us (medians of {row['calls']} calls).\n"
            )
    return told


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 999.5:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


def others() -> str:
    """Saving, importing, the wheel."""
    save, load = (found(rf"^{name} +([\d.]+) s$", "files.txt") for name in ("save", "load"))
    write, torch_save, read, torch_load = (
        found(rf"^{one}: ([\d.]+)x", "files.txt")
        for one in (r"os\.write \+ fsync / save", r"torch\.save \+ fsync / save",
                    r"map \+ read / load", r"torch\.load / load")
    )  # fmt: skip
    wheel = found(r"^CPython 3\.11: ([\d,]+) bytes", "wheels.txt") / 1e6
    return (
        f"1 GiB of parameters and states: `fs.save` takes {save:.2f} s, `os.write` and `fsync` of"
        f" the same bytes {write:.2f} of that, `torch.save` with `fsync` {torch_save:.2f};"
        f" `fs.load`, which checks all bytes, {load:.2f} s, reading them from a mapping on one core"
        f" {read:.2f} of that, `torch.load` {torch_load:.0f} times as long. The wheel, for glibc"
        f" 2.17 and newer, has {wheel:.2f} MB.\n"
    )


FIGURES: dict[str, Callable[[], str]] = {
    one.__name__: one for one in (three, flat, small, models, step, gpu, jax, others)
}


def written(page: str) -> str:
    """A page with its figures as the results have them."""

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{FIGURES[match[2]]()}{match[3]}"

    return re.sub(r"(<!-- figures: (\w+) -->\n)[^<]*(<!-- end -->)", block, page)


def main() -> int:
    """Writes, or says what is out of date."""
    status = 0
    for path in PAGES:
        old = path.read_text(encoding="utf-8")
        new = written(old)
        if old != new and "--check" in sys.argv[1:]:
            print(f"{path.name} is out of date: run python bench/figures.py")
            status = 1
        elif old != new:
            path.write_text(new, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
