"""The wheels in dist/ on emulated processors: imported, the right set named, the same bits.

    python .ci/emulate.py [native Nehalem Haswell aarch64]     # after .ci/wheels.py

CPython 3.11's wheel steps on this machine's processor, and by qemu-user on a Nehalem (no AVX), on
a Haswell (AVX2) and, the aarch64 wheel, under Debian's Python for that architecture, which is
unpacked into build/aarch64. What is compared is a digest of parameters and states after a few
steps of several optimizers.

Needs: apt install qemu-user; for aarch64 Debian 12, whose Python is 3.11.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "build" / "emulate"
# The set that each must choose; this machine's is its own affair.
SETS = {"native": None, "Nehalem": "scalar", "Haswell": "avx2", "aarch64": "neon"}
STEPS = """
import hashlib
import numpy as np
import fusedstep as fs

bits = np.arange(5003, dtype=np.uint32) * np.uint32(2654435761)
values = (bits >> np.uint32(8)).astype(np.float32) / np.float32(1 << 24) - np.float32(0.5)
print(fs.isa())
for kind, options in [
    (fs.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (fs.AdamW, {"lr": 0.01}),
    (fs.AdamW, {"lr": 0.01, "state_dtype": "q8"}),
    (fs.RAdam, {"lr": 0.01}),
    (fs.Lion, {"lr": 0.001}),
    (fs.Adadelta, {"lr": 1.0}),
    (fs.Rprop, {"lr": 0.01}),
]:
    digest = hashlib.sha256()
    for form in ("float32", "float16", "float64"):
        if form == "float64" and "state_dtype" in options:
            continue
        param = values.astype(form)
        opt = kind({"w": param}, **options)
        for k in range(5):
            opt.step({"w": np.roll(values, k).astype(form)}, max_norm=3.0)
        for array in (param, *dict(sorted(opt.state["w"].items())).values()):
            digest.update(np.asarray(array).tobytes())
    print(kind.__name__, options, digest.hexdigest()[:16])
"""
# Python and what it loads.
PACKAGES = [
    *("python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libc6", "libgcc-s1"),
    *("libstdc++6", "zlib1g", "libexpat1", "libffi8", "libssl3", "libbz2-1.0", "liblzma5"),
]


def run(*command: object, **kwargs) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **kwargs)
    if done.returncode:
        said = done.stdout + done.stderr  # QEMU warns of what it has not, so not shown otherwise
        sys.exit(f"{' '.join(map(str, command))}: exit {done.returncode}\n{said}")
    return done.stdout


def wheel(arch: str) -> Path:
    found = sorted((ROOT / "dist").glob(f"fusedstep-*-cp311-*{arch}.whl"), key=os.path.getmtime)
    if not found:
        sys.exit(f"no wheel of {arch} in dist/: python .ci/wheels.py --only 3.11 --arch {arch}")
    return found[-1]


def installed(arch: str) -> Path:
    """A folder with the wheel and NumPy, for that architecture."""
    where = PLACE / f"packages-{arch}"
    shutil.rmtree(where, ignore_errors=True)
    tags = [f"manylinux_2_{minor}_{arch}" for minor in (17, 27, 28)] + [f"manylinux2014_{arch}"]
    run(
        *(sys.executable, "-m", "pip", "install", "-q", "--only-binary=:all:", "--target", where),
        *("--python-version", "3.11", "--implementation", "cp"),
        *(word for tag in tags for word in ("--platform", tag)),
        *(wheel(arch), "numpy", "ml_dtypes"),
    )
    return where


def debian(arch: str) -> Path:
    """A root with Debian's Python of another architecture, and nothing else."""
    root = PLACE / f"root-{arch}"
    if (root / "usr/bin/python3.11").exists():
        return root
    name = {"aarch64": "arm64"}[arch]
    apt, packages = PLACE / "apt", PLACE / "packages"
    for folder in (apt / "lists/partial", apt / "archives/partial", packages, root):
        folder.mkdir(parents=True, exist_ok=True)
    options = {  # from where this machine has its own packages
        "Dir::State::lists": apt / "lists",
        "Dir::Cache": apt,
        "APT::Architecture": name,
        "APT::Architectures::": name,
    }
    command = ["apt-get", *(w for key, to in options.items() for w in ("-o", f"{key}={to}"))]
    run(*command, "update", "-qq")
    run(*command, "-qq", "download", *PACKAGES, cwd=packages)
    for package in packages.glob("*.deb"):
        run("dpkg", "-x", package, root)
    return root


def lines(name: str) -> list[str]:
    """What the steps print on the processor of that name."""
    arch = name if name == "aarch64" else "x86_64"
    python = [sys.executable]
    if name == "aarch64":
        root = debian(arch)
        python = ["qemu-aarch64", "-L", root, root / "usr/bin/python3.11"]
    elif name != "native":
        python = ["qemu-x86_64", "-cpu", name, sys.executable]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(installed(arch))}
    return run(*python, "-c", STEPS, cwd=PLACE, env=env).splitlines()


def main() -> None:
    if sys.version_info[:2] != (3, 11):
        sys.exit(f"this is about CPython 3.11, got {sys.version.split()[0]}")
    PLACE.mkdir(parents=True, exist_ok=True)
    first: list[str] = []
    for name in sys.argv[1:] or SETS:
        isa, *digests = lines(name)
        first = first or digests
        if SETS[name] not in (None, isa):
            sys.exit(f"{name}: the set must be {SETS[name]}, got {isa}")
        if digests != first:
            sys.exit("\n".join([f"{name} ({isa}): other bits", *digests, "instead of", *first]))
        print(f"{name}: {isa}, {len(digests)} digests, the same bits", flush=True)
    print(*first, sep="\n")


if __name__ == "__main__":
    main()
