"""What a step costs beside its memory traffic, and what else grows with tensors and groups.

Small buffers, many tensors, groups, steps in backward, constructors, checkpoints; import and wheel.

python bench/overheads.py            # needs torch for the peers' columns
python bench/overheads.py --wheel    # also builds a wheel and weighs it
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import fusedstep as fs
from fusedstep.bench import has_torch, interleave, torch_threads


def small_step() -> dict[str, Callable[[], Any]]:
    """AdamW on 1,000 elements in four tensors, as a small model has them."""
    shapes = [(20, 30), (30,), (30, 12), (10,)]
    params = fs.FlatBuffer.zeros(shapes)
    grads = params.zeros_like()
    opt = fs.AdamW(params)
    flat, flat_grad = np.zeros(1000, np.float32), np.ones(1000, np.float32)
    single = fs.AdamW(fs.FlatBuffer.pack([flat]))
    single_grads = fs.FlatBuffer.pack([flat_grad])
    contenders: dict[str, Callable[[], Any]] = {
        "FlatBuffer, 1 tensor": lambda: single.step(single_grads),
        "FlatBuffer, 4 tensors": lambda: opt.step(grads),
    }
    return contenders | torch_steps(shapes)


def many_tensors() -> dict[str, Callable[[], Any]]:
    """AdamW on 1,000 arrays of 1,000 elements."""
    shapes = [(1000,)] * 1000
    params = [np.zeros(s, np.float32) for s in shapes]
    grads = [np.ones(s, np.float32) for s in shapes]
    opt = fs.AdamW(params)
    buffer = fs.FlatBuffer.zeros(shapes)
    buffer_grads = buffer.zeros_like()
    packed = fs.AdamW(buffer)
    contenders: dict[str, Callable[[], Any]] = {
        "list of arrays": lambda: opt.step(grads),
        "FlatBuffer": lambda: packed.step(buffer_grads),
    }
    return contenders | torch_steps(shapes)


def torch_steps(shapes: list[tuple[int, ...]]) -> dict[str, Callable[[], Any]]:
    """torch's AdamW in its implementations over tensors of these shapes."""
    if not has_torch():
        return {}
    import torch

    steps: dict[str, Callable[[], Any]] = {}
    for how in ("fused", "foreach"):
        tensors = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        for tensor in tensors:
            tensor.grad = torch.ones_like(tensor)
        steps[f"torch {how}"] = torch.optim.AdamW(tensors, **{how: True}).step
    return steps


def alternating(cls: str) -> dict[str, Callable[[], Any]]:
    """400 arrays of 16 elements in one group, and in two that take turns: weight, bias, weight."""
    names = [f"{i}.{kind}" for i in range(200) for kind in ("weight", "bias")]
    grads = [np.ones(16, np.float32) for _ in names]

    def step(*groups: fs.Group) -> Callable[[], Any]:
        params = {name: np.zeros(16, np.float32) for name in names}
        opt = getattr(fs, cls)(params, weight_decay=0.1, groups=groups)
        return lambda: opt.step(grads)

    return {"one group": step(), "two, alternating": step(fs.Group("*.bias", weight_decay=0.0))}


def in_backward() -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """A backward that steps tensors of 16 elements as it goes, in one group or in one each."""
    import torch

    import fusedstep.torch as ft

    def backward(n: int, grouped: bool) -> Callable[[], Any]:
        model = torch.nn.ParameterList(torch.zeros(16) for _ in range(n))
        groups = [{"params": [param]} for param in model] if grouped else model.parameters()
        ft.step_in_backward(model, ft.AdamW(groups))
        loss = torch.stack([param.sum() for param in model]).sum()  # needs no parameter's value
        return lambda: (model, loss.backward(retain_graph=True))

    sizes = {"50, one group": 50, "3,200, one group": 3200, "100, each its own": 100}
    sizes["800, each its own"] = 800
    return {name: backward(n, "each" in name) for name, n in sizes.items()}, sizes


def constructors() -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """Adam over as many groups as parameters; torch's own takes a time that grows as the square."""

    def neutral(n: int) -> Callable[[], Any]:
        params = {f"layer.{i}": np.zeros(4, np.float32) for i in range(n)}
        groups = [fs.Group(f"layer.{i}", lr=1e-3) for i in range(n)]
        return lambda: fs.Adam(params, groups=groups)

    runs = {"1,000 groups": neutral(1000), "4,000 groups": neutral(4000)}
    sizes = {"1,000 groups": 1000, "4,000 groups": 4000}
    if has_torch():
        import torch

        import fusedstep.torch as ft

        def make(cls: Any, n: int) -> Callable[[], Any]:
            params = [torch.nn.Parameter(torch.zeros(4)) for _ in range(n)]
            return lambda: cls([{"params": [param]} for param in params])

        for name, cls, n in (
            ("fusedstep.torch, 1,000", ft.Adam, 1000),
            ("fusedstep.torch, 4,000", ft.Adam, 4000),
            ("torch, 1,000", torch.optim.Adam, 1000),
        ):
            runs[name], sizes[name] = make(cls, n), n
    return runs, sizes


def loads() -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """`load_state_dict` of Adam, of many tensors of 4 elements."""

    def neutral(n: int) -> Callable[[], Any]:
        opt = fs.Adam([np.zeros(4, np.float32) for _ in range(n)])
        opt.step([np.ones(4, np.float32) for _ in range(n)])
        saved = opt.state_dict()
        return lambda: opt.load_state_dict(saved)

    runs = {"10^4 arrays": neutral(10**4), "10^5 arrays": neutral(10**5)}
    sizes = {"10^4 arrays": 10**4, "10^5 arrays": 10**5}
    if has_torch():
        import torch

        import fusedstep.torch as ft

        def load(cls: Any, n: int) -> Callable[[], Any]:
            params = [torch.nn.Parameter(torch.zeros(4)) for _ in range(n)]
            for param in params:
                param.grad = torch.ones(4)
            opt = cls(params)
            opt.step()
            saved = opt.state_dict()
            return lambda: opt.load_state_dict(saved)

        for name, cls, n in (
            ("fusedstep.torch, 10^4", ft.Adam, 10**4),
            ("fusedstep.torch, 10^5", ft.Adam, 10**5),
            ("torch, 10^4", torch.optim.Adam, 10**4),
        ):
            runs[name], sizes[name] = load(cls, n), n
    return runs, sizes


def show(
    title: str,
    contenders: dict[str, Callable[[], Any]],
    sizes: dict[str, int] | None = None,
    rounds: int = 15,
) -> None:
    """Prints each contender's median, per one of its `sizes`, and its ratio to the first."""
    (first, ours), *others = contenders.items()
    pairs = interleave(ours, dict(others), rounds)
    n = sizes or dict.fromkeys(contenders, 1)
    mine = median(s for pair in pairs.values() for s in pair.ours) / n[first]
    print(f"{title}\n  {first:24} {mine * 1e6:10.2f} us")
    for name, pair in pairs.items():
        theirs, ratio = median(pair.other) / n[name], pair.ratio * n[first] / n[name]
        print(f"  {name:24} {theirs * 1e6:10.2f} us   {ratio:7.2f}x")


def import_seconds(rounds: int = 15) -> None:
    """Prints how long `import fusedstep` takes after `import numpy`, in fresh processes."""
    code = (
        "import time, numpy; begin = time.perf_counter(); import fusedstep, sys;"
        "print(time.perf_counter() - begin, 'torch' in sys.modules)"
    )
    outputs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(rounds)
    ]
    seconds = median(float(o.stdout.split()[0]) for o in outputs)
    loads_torch = any(o.stdout.split()[1] == "True" for o in outputs)
    print(
        f"import beyond NumPy's: {seconds:.4f} s; imports torch: {'yes' if loads_torch else 'no'}"
    )


def wheel_size() -> None:
    """Builds the wheel as a user's pip would and prints its size."""
    root = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder]
        subprocess.run([*command, str(root)], check=True)
        for wheel in Path(folder).glob("*.whl"):
            print(f"wheel: {wheel.name}, {wheel.stat().st_size / 1e6:.2f} MB")


def steps() -> None:
    """Prints what steps, and what is around them, cost."""
    show("AdamW, 1,000 elements", small_step())
    show("AdamW, 1,000 tensors of 1,000 elements", many_tensors())
    for cls in ("AdamW", "NAdam"):
        show(f"{cls}, 400 tensors of 16 elements, groups", alternating(cls))
    if has_torch():
        show("AdamW in backward, for each parameter", *in_backward(), rounds=9)
    show("Adam's constructor, for each group", *constructors(), rounds=3)
    show("load_state_dict, for each tensor", *loads(), rounds=1)


def main() -> None:
    """Prints all figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", action="store_true", help="build the wheel and weigh it")
    args = parser.parse_args()
    machine = fs.info()
    print(f"{machine['cpu']}, {fs.num_threads()} threads, {fs.isa()}, torch {machine['torch']}\n")
    with torch_threads(fs.num_threads()) if has_torch() else contextlib.nullcontext():
        steps()
    import_seconds()
    if args.wheel:
        wheel_size()


if __name__ == "__main__":
    main()
