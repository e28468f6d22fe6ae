"""Times the steps of two installed versions of fusedstep against each other, by paired runs.

    python bench/versions.py OLD_PYTHON NEW_PYTHON [--sizes 14 20 26] [--pairs float32/float32 ...]

Each version runs in a process of its own, with the same inputs. In each round both take one timing,
next to each other and in turns first, so that the machine's drift is in neither; printed is the
median over rounds of the old time over the new one: above 1 the new version is faster.
"""

import argparse
import json
import subprocess
import sys
import time
from statistics import median

CASES = {
    "sgd": ("SGD", {}),
    "momentum": ("SGD", {"momentum": 0.9}),
    "nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "coupled": ("SGD", {"momentum": 0.9, "weight_decay": 0.1}),
    "lion": ("Lion", {}),
    "adagrad": ("Adagrad", {}),
    "rmsprop": ("RMSprop", {}),
    "centered": ("RMSprop", {"momentum": 0.9, "centered": True}),
    "adadelta": ("Adadelta", {}),
    "adam": ("Adam", {}),
    "adamw": ("AdamW", {}),
    "amsgrad": ("Adam", {"amsgrad": True}),
    "adamax": ("Adamax", {}),
    "nadam": ("NAdam", {}),
    "radam": ("RAdam", {}),
    "asgd": ("ASGD", {}),
    "rprop": ("Rprop", {}),
}
SHAPES = {"one": lambda n: [n], "arrays": lambda n: [n // 1000] * 1000}


def work():
    """A version's process: a line of JSON asks, a line answers."""
    import numpy as np

    import fusedstep as fs
    from fusedstep.buffers import as_dtype

    step = None
    for line in sys.stdin:
        asked = json.loads(line)
        if "seconds" in asked:
            begin = time.perf_counter()
            for _ in range(asked["seconds"]):
                step()
            print((time.perf_counter() - begin) / asked["seconds"], flush=True)
            continue
        fs.set_isa(asked["isa"] or fs.isa())
        if asked["threads"]:
            fs.set_num_threads(asked["threads"])
        shapes = SHAPES[asked["shape"]](asked["n"])
        block = np.random.default_rng(0).uniform(0.5, 1.5, 1 << 14)
        buffers = []
        for dtype in (asked["param"], asked["grad"]):
            buffer = fs.FlatBuffer.zeros(shapes, as_dtype(dtype))
            flat = buffer.flat
            for at in range(0, flat.size, block.size):
                flat[at : at + block.size] = block[: flat.size - at]
            buffers.append(buffer)
        params, grads = buffers
        if asked["apart"]:
            params, grads = ([a.copy() for a in buffer.values()] for buffer in buffers)
        optimizer = getattr(fs, asked["cls"])(params, **asked["hypers"])
        options = {"max_norm": 1e30} if asked["clip"] else {}
        step = lambda: optimizer.step(grads, **options)  # noqa: E731, B023
        step()
        step()
        begin = time.perf_counter()
        step()
        print(time.perf_counter() - begin, flush=True)


class Version:
    def __init__(self, python):
        self.process = subprocess.Popen(
            [python, __file__, "--work"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **what):
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"a version ended with {self.process.wait()}")
        return float(answer)


def compare(versions, rounds, **case):
    """(seconds of the old, of the new, median of ratios)"""
    first = [version.ask(**case) for version in versions]
    calls = max(1, int(4e-3 / max(1e-7, min(first))))
    times = ([], [])
    for k in range(rounds):
        for which in (0, 1) if k % 2 else (1, 0):
            times[which].append(versions[which].ask(seconds=calls))
    ratios = [old / new for old, new in zip(*times, strict=True)]
    return median(times[0]), median(times[1]), median(ratios)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--sizes", type=int, nargs="+", default=[14, 20, 26], help="log2 n")
    parser.add_argument("--pairs", nargs="+", default=["float32/float32"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--isa")
    parser.add_argument("--shape", default="one", choices=SHAPES)
    parser.add_argument("--apart", action="store_true", help="separate arrays, no FlatBuffer")
    parser.add_argument("--clip", action="store_true", help="with max_norm")
    asked = parser.parse_args()
    versions = Version(asked.old), Version(asked.new)
    everything = []
    for pair in asked.pairs:
        param, grad = pair.split("/")
        for size in asked.sizes:
            ratios = []
            for name in asked.cases:
                cls, hypers = CASES[name]
                old, new, ratio = compare(
                    versions, asked.rounds, cls=cls, hypers=hypers, n=1 << size, param=param,
                    grad=grad, shape=asked.shape, apart=asked.apart, clip=asked.clip,
                    threads=asked.threads, isa=asked.isa,
                )  # fmt: skip
                ratios.append(ratio)
                print(f"{pair:18} 2^{size:<3} {name:9} {old * 1e6:10.1f} us {new * 1e6:10.1f} us"
                      f"  {ratio:.3f}", flush=True)  # fmt: skip
            print(f"{pair:18} 2^{size:<3} mean {sum(ratios) / len(ratios):.3f}"
                  f" least {min(ratios):.3f}", flush=True)  # fmt: skip
            everything += ratios
    print(f"mean of all {sum(everything) / len(everything):.3f}")


if __name__ == "__main__":
    work() if "--work" in sys.argv else main()
