"""How fast checkpoints are written and read, beside the system calls alone and beside torch.

    python bench/files.py [--mib 1024] [--rounds 5] [--folder FOLDER]

Parameters and two states of AdamW in float32, a third of the bytes each. In each round all are
timed one after the other; ratios are medians over the rounds of one time by the other in the same
round. A save is compared with `os.write` of the same bytes in pieces of 16 MiB and `fsync`, a load
with mapping the file and reading a byte of each page, or all bytes (on one core). Peak memory is
that of a process that saves once.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import fusedstep as fs


def run(mib: int) -> tuple[fs.FlatBuffer, fs.Optimizer]:
    """Parameters and an optimizer that has stepped."""
    n = mib * 2**20 // 12
    params = fs.FlatBuffer.zeros({"w": (n,)}, np.float32)
    params["w"][...] = np.random.default_rng(0).standard_normal(n, np.float32)
    opt = fs.AdamW(params)
    opt.step(params.copy())
    return params, opt


def written(path: Path, arrays: list[np.ndarray]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for array in arrays:
        data = memoryview(array).cast("B")
        while data:
            data = data[os.write(descriptor, data[: 1 << 24]) :]
    os.fsync(descriptor)
    os.close(descriptor)


def touched(path: Path) -> None:
    with open(path, "rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    np.frombuffer(pages, np.uint8)[:: mmap.PAGESIZE].sum()


def read(path: Path) -> None:
    with open(path, "rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    words = len(pages) // 8
    np.bitwise_xor.reduce(np.frombuffer(pages, np.uint64, words))


def timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def peak(mib: int, folder: Path) -> float:
    """MiB that a save takes beyond the arrays: the highest resident size after, less before."""
    params, opt = run(mib)
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before = resident("VmRSS")
    fs.save(folder / "peak.safetensors", params=params, optimizer=opt)
    return resident("VmHWM") - before


def resident(name: str) -> float:
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name)]
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--peak", action="store_true", help="only the memory of one save")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        if given.peak:
            print(f"{peak(given.mib, folder):.1f}")
            return
        import torch

        params, opt = run(given.mib)
        state = opt.state["w"]
        arrays = [params["w"], state["exp_avg"], state["exp_avg_sq"]]
        tensors = [torch.from_numpy(a) for a in arrays]
        ours, plain, torchs = (folder / n for n in ("ours.safetensors", "plain", "torch.pt"))

        def in_place() -> None:
            fs.load(ours, params=params, optimizer=opt)

        def copied_in_place() -> None:
            for tensor, loaded in zip(tensors, torch.load(torchs), strict=True):
                tensor.copy_(loaded)

        def torch_saved() -> None:
            with open(torchs, "wb") as file:
                torch.save(tensors, file)
                file.flush()
                os.fsync(file.fileno())

        calls: dict[str, Callable[[], object]] = {
            "os.write + fsync": lambda: written(plain, arrays),
            "save": lambda: fs.save(ours, params=params, optimizer=opt),
            "torch.save + fsync": torch_saved,
            "torch.save": lambda: torch.save(tensors, torchs),
            "map + touch": lambda: touched(ours),
            "map + read": lambda: read(ours),
            "load": lambda: fs.load(ours),
            "torch.load": lambda: torch.load(torchs),
            "load in place": in_place,
            "torch.load + copy": copied_in_place,
        }
        times: dict[str, list[float]] = {key: [] for key in calls}
        for _ in range(given.rounds + 1):
            for key, call in calls.items():
                for path in (ours, plain, torchs):
                    if key in ("os.write + fsync", "save", "torch.save + fsync", "torch.save"):
                        target = {"save": ours, "os.write + fsync": plain}.get(key, torchs)
                        if path == target:
                            path.unlink(missing_ok=True)
                times[key].append(timed(call))
        for found in times.values():
            del found[0]  # the first round fills caches
        print(f"{given.mib} MiB of float32, {fs.num_threads()} threads, {given.rounds} rounds")
        for key, found in times.items():
            print(f"{key:20} {statistics.median(found):6.3f} s")
        for key, other in [
            ("save", "os.write + fsync"),
            ("save", "torch.save + fsync"),
            ("save", "torch.save"),
            ("load", "map + touch"),
            ("load", "map + read"),
            ("load", "torch.load"),
            ("load in place", "torch.load + copy"),
        ]:
            pairs = zip(times[other], times[key], strict=True)
            ratio = statistics.median(a / b for a, b in pairs)
            print(f"{other} / {key}: {ratio:.2f}x")
        command = [sys.executable, __file__, "--peak", "--mib", str(given.mib)]
        memory = subprocess.run(
            [*command, "--folder", name], capture_output=True, text=True, check=True
        ).stdout.strip()
        print(f"peak memory of a save beyond the arrays: {memory} MiB")


if __name__ == "__main__":
    main()
