"""What a step costs beside its memory traffic: small buffers, many tensors, import, wheel size.

python bench/overheads.py            # needs torch for the peers' columns
python bench/overheads.py --wheel    # also builds a wheel and weighs it
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import fusedstep as fs
from fusedstep.bench import has_torch, interleave


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

    torch.set_num_threads(fs.num_threads())
    steps: dict[str, Callable[[], Any]] = {}
    for how in ("fused", "foreach"):
        tensors = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        for tensor in tensors:
            tensor.grad = torch.ones_like(tensor)
        steps[f"torch {how}"] = torch.optim.AdamW(tensors, **{how: True}).step
    return steps


def show(title: str, contenders: dict[str, Callable[[], Any]], rounds: int = 15) -> None:
    """Prints the median of each contender and its ratio to the first."""
    (first, ours), *others = contenders.items()
    pairs = interleave(ours, dict(others), rounds)
    mine = median(s for pair in pairs.values() for s in pair.ours)
    print(f"{title}\n  {first:24} {mine * 1e6:10.2f} us")
    for name, pair in pairs.items():
        print(f"  {name:24} {median(pair.other) * 1e6:10.2f} us   {pair.ratio:7.2f}x")


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


def main() -> None:
    """Prints all figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", action="store_true", help="build the wheel and weigh it")
    args = parser.parse_args()
    machine = fs.info()
    print(f"{machine['cpu']}, {fs.num_threads()} threads, {fs.isa()}, torch {machine['torch']}\n")
    show("AdamW, 1,000 elements", small_step())
    show("AdamW, 1,000 tensors of 1,000 elements", many_tensors())
    import_seconds()
    if args.wheel:
        wheel_size()


if __name__ == "__main__":
    main()
