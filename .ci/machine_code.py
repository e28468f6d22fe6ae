"""Reads the machine code in a built fusedstep._cuda and refuses what a GPU's results cannot show:
narrow accesses to memory, spilled registers, contracted or approximate arithmetic.

    python .ci/machine_code.py PATH_TO_SO

Needs cuobjdump and nvdisasm: on PATH, or from the packages nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).parents[1] / "csrc"


def constant(path: str, name: str) -> int:
    found = re.search(rf"\b{name} = (\d+)\b", (CSRC / path).read_text())
    assert found, f"{name} in {path}"
    return int(found[1])


# Bytes of an element, by format: of arrays' formats, and of those that an optimizer keeps with as
# many beside each element, or with one byte for a block. Elements that a thread has side by side;
# vectors that the norm has in flight.
ALL_FORMATS = [
    tuple(map(int, found))
    for found in re.findall(
        r'{"\w+", ([1-9]\d*), (-?\d+), (\d+), (\d+)}', (CSRC / "interface/format.h").read_text()
    )
]
FORMATS = [size for size, code, _, _ in ALL_FORMATS if code >= 0]
HALVES = [half for size, _, beside, block in ALL_FORMATS if block == 1 for half in (size, beside)]
STATES = [4, 2, 1]  # float32, bfloat16 and one of q8
VECTOR = constant("cuda/table.h", "kVector")
NORM_AHEAD = constant("cuda/norm.cu", "kAhead")

# What ptxas makes of a correctly rounded operation, {PTX: {SASS: how many}}, beside a function for
# rare operands that it calls. It holds for CUDA 13.0, on sm_80 as on sm_90; should another toolkit
# expand otherwise, the kernels that divide are refused and all others pass.
EXPANSION = {
    "fma.f32": {"FFMA": 1},
    "div.f32": {"FFMA": 5},
    "sqrt.f32": {"FFMA": 2},
    "fma.f64": {"DFMA": 1},
    "div.f64": {"DFMA": 7, "FFMA": 1},  # the latter asks whether the quotient is in range
    "sqrt.f64": {"DFMA": 5},
}

# std::pow, called only where an operand is not finite: the result is 0, 1, infinity or NaN.
MAY_APPROXIMATE = "__internal_accurate_pow"

ROUNDED = {"add", "sub", "mul", "fma", "div", "sqrt", "rcp"}
NEVER = {"mad", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh"}


class Kernel(NamedTuple):
    """A kernel's name without what differs between builds; `rule` is empty for those of no rule."""

    name: str
    rule: str = ""
    states: int = 0  # a mask
    wide: bool = False

    def __str__(self) -> str:
        computing = "F64" if self.wide else "F32"
        return f"{self.name}<{self.rule}, {self.states}, {computing}>" if self.rule else self.name


class Line(NamedTuple):
    owner: str  # the function, inside a kernel's section, that the instruction belongs to
    opcode: str
    text: str


class Code(NamedTuple):
    lines: list[Line]
    symbol: str

    def body(self) -> list[Line]:
        return [line for line in self.lines if line.owner == self.symbol]


def kernel_of(symbol: str) -> Kernel:
    if found := re.search(r"\d(sweep|staged)INS\w*?_(\d+)(\w+?)ELj(\d+)ENS\w_3F(32|64)EEE", symbol):
        name, length, rule, states, bits = found.groups()
        return Kernel(name, rule[: int(length)], int(states), bits == "64")
    if found := re.search(r"(norm|finish|enter)E\w+$", symbol):
        return Kernel(found[1])
    return Kernel(symbol)


def tool(name: str) -> str:
    places = [os.environ.get("PATH", "")]
    namespace = importlib.util.find_spec("nvidia")
    if namespace and namespace.submodule_search_locations:
        places += [f"{at}/cu13/bin" for at in namespace.submodule_search_locations]
    os.environ["PATH"] = os.pathsep.join(places)  # cuobjdump looks for nvdisasm there
    found = shutil.which(name)
    if not found:
        sys.exit(f"{name} is neither on PATH nor in an nvidia package")
    return found


def output_of(*command: str | Path, cwd: str | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout


def functions_of(cubin: bytes) -> dict[str, list[tuple[int, int, str]]]:
    """By the kernel in whose section they lie: begin, end and name of the functions in it."""
    (at,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count = struct.unpack_from("<HH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, at + i * size) for i in range(count)]
    in_section: dict[int, list[tuple[int, int, str]]] = {}
    for _, kind, _, _, offset, length, link, _, _, entry in sections:
        if kind != 2:  # the symbol table
            continue
        names = sections[link][4]
        for place in range(offset, offset + length, entry):
            name_at, info, _, section, value, extent = struct.unpack_from("<IBBHQQ", cubin, place)
            if info & 15 != 2 or section == 0:  # functions that are defined here
                continue
            begin = names + name_at
            name = cubin[begin : cubin.index(b"\0", begin)].decode()
            in_section.setdefault(section, []).append((value, value + extent, name))
    # The kernel starts its section and spans it; helpers lie in it.
    return {
        min(inside, key=lambda f: (f[0], -f[1]))[2]: sorted(inside)
        for inside in in_section.values()
    }


def read_cubin(cuobjdump: str, path: Path) -> dict[Kernel, Code]:
    functions = functions_of(path.read_bytes())
    kernels: dict[Kernel, Code] = {}
    instruction = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P\w+\s+)?([A-Z]\S*).*?) *;")
    for line in output_of(cuobjdump, "-sass", path).splitlines():
        if "Function : " in line:
            symbol = line.split("Function : ")[1].strip()
            code = kernels[kernel_of(symbol)] = Code([], symbol)
            inner = [f for f in functions[symbol] if f[2] != symbol]
        elif found := instruction.match(line):
            at = int(found[1], 16)
            owner = next((name for begin, end, name in inner if begin <= at < end), symbol)
            code.lines.append(Line(owner, found[3], f"/*{found[1]}*/ {found[2]}"))
    return kernels


def read_resources(text: str) -> dict[tuple[str, Kernel], dict[str, int]]:
    resources = {}
    arch, kernel = "", Kernel("")
    for line in text.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            kernel = kernel_of(found[1])
        elif "REG:" in line:
            resources[arch, kernel] = {k: int(v) for k, v in re.findall(r"([A-Z]+):(\d+)", line)}
    return resources


class Text(NamedTuple):
    """The PTX of one function."""

    arch: str
    symbol: str
    lines: list[tuple[list[str], str]]  # an opcode's parts, the line


def read_ptx(text: str) -> list[Text]:
    functions: list[Text] = []
    arch = ""
    instruction = re.compile(r"\s*(?:\{\s*)?(?:@!?%\w+\s+)?([a-z]\w*(?:\.[\w:]+)+)\s")
    for line in text.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.search(r"^\s*(?:\.\w+ )*\.(?:entry|func)\s+(?:\(.*?\)\s*)?([\w$]+)", line):
            functions.append(Text(arch, found[1], []))
        elif found := instruction.match(line):
            functions[-1].lines.append((found[1].split("."), line.strip()))
    return functions


def width(opcode: str) -> int:
    """Bytes that an access to memory moves."""
    parts = opcode.split(".")
    widths = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((widths[part] for part in parts if part in widths), 4)


def accesses(body: list[Line], *opcodes: str) -> dict[int, list[str]]:
    """The accesses to memory, by their width."""
    found: dict[int, list[str]] = {}
    for line in body:
        if line.opcode.split(".")[0] in opcodes:
            found.setdefault(width(line.opcode), []).append(line.text)
    return found


def vectors(formats: Collection[int]) -> Counter[int]:
    """Accesses to kVector elements side by side in each of the formats, by their bytes."""
    due: Counter[int] = Counter()
    for each in formats:
        size = min(16, VECTOR * each)
        due[size] += VECTOR * each // size
    return due


def streams(kernel: Kernel) -> tuple[list[list[int]], list[list[int]]]:
    """The streams that a kernel reads and writes: of each the formats that it may be in."""
    own = [each for each in FORMATS if (each == 8) == kernel.wide]
    states = kernel.states.bit_count()
    if kernel.name == "sweep":
        updated = [own] * (1 + states)
        return [*updated, FORMATS], updated
    param = own if kernel.wide else own + HALVES
    updated = [param] + [STATES + [8] * kernel.wide] * states
    average = copy = zeros = FORMATS
    return [*updated, FORMATS, average], [*updated, average, copy, zeros]


class Check:
    def __init__(self) -> None:
        self.failures: list[str] = []

    def refuse(self, kernel: Kernel | str, arch: str, why: str, line: str = "") -> None:
        self.failures.append(f"{kernel} on {arch}: {why}" + (f"\n    {line}" if line else ""))

    def accesses(self, kernel: Kernel, arch: str, code: Code) -> None:
        """Whole tiles move in vectors, others in as many elements as a thread has, and nothing else
        does: so many accesses of each width for each format that a stream may be in."""
        body = code.body()
        for opcode, what in (("LD", "loads"), ("ST", "stores")):
            if wide := accesses(body, opcode).get(16):
                why = f"{len(wide)} {what} of 16 bytes are generic, not global"
                self.refuse(kernel, arch, why, wide[0])

        read, written = streams(kernel)
        shared = Counter({1: kernel.states.bit_count()}) if kernel.name == "staged" else Counter()
        stores = accesses(body, "ST", "STG")
        due = shared.copy()
        for formats in written:
            due += vectors(formats) + Counter({e: VECTOR * formats.count(e) for e in formats})
        for size in sorted(set(stores) | set(due)):
            here = stores.get(size, [])
            if len(here) != due[size]:
                why = f"{len(here)} stores of {size} bytes, {due[size]} due"
                self.refuse(kernel, arch, why, here[-1] if here else "")

        # Formats of one width may share the loads of a whole tile: they differ in what comes later.
        # The tables are read too, in 4 and 8 bytes.
        loads = accesses(body, "LD", "LDG")
        due = shared.copy()
        for formats in read:
            due += vectors(set(formats)) + Counter({e: VECTOR * formats.count(e) for e in formats})
        for size in sorted(set(loads) | set(due)):
            here = loads.get(size, [])
            if len(here) < due[size] or (size not in (4, 8) and len(here) > due[size]):
                why = f"{len(here)} loads of {size} bytes, {due[size]} due"
                self.refuse(kernel, arch, why, here[-1] if here else "")

    def local_memory(self, kernel: Kernel, arch: str, code: Code, used: dict[str, int]) -> None:
        # What the other kernels call is exempt: count_updates and the powers in it compute the few
        # scalars of a step that only the GPU counts, once a step, in one block.
        lines = code.lines if kernel.rule else code.body()
        for line in lines:
            if line.opcode.split(".")[0] in ("LDL", "STL"):
                self.refuse(kernel, arch, "local memory, or a register is spilled", line.text)
                break
        else:
            if used["STACK"] or used["LOCAL"]:
                why = f"{used['STACK']} bytes of stack, {used['LOCAL']} of local memory"
                self.refuse(kernel, arch, why)

    def norm_accesses(self, kernel: Kernel, arch: str, code: Code) -> None:
        loads = accesses(code.body(), "LDG")
        for size, each in vectors(FORMATS).items():
            due = NORM_AHEAD * each
            here = len(loads.get(size, []))
            if here < due or (size == 16 and here > due):  # tables are read in 8 bytes too
                generic = accesses(code.body(), "LD").get(size, [""])
                why = f"{here} global loads of {size} bytes, {due} due"
                self.refuse(kernel, arch, why, generic[0])

    def contraction(self, kernel: Kernel, arch: str, code: Code, ptx: Text) -> None:
        """As many fused operations as PTX asks for."""
        operations = Counter(
            f"{parts[0]}.{parts[-1]}" for parts, _ in ptx.lines if parts[-1] in ("f32", "f64")
        )
        due: Counter[str] = Counter()
        for operation, expansion in EXPANSION.items():
            for opcode, n in expansion.items():
                due[opcode] += n * operations[operation]
        if operations["rcp.f32"] or operations["rcp.f64"]:
            self.refuse(kernel, arch, "a reciprocal, which no rule has")
        for opcode in ("FFMA", "DFMA"):
            here = [x.text for x in code.body() if x.opcode.split(".")[0] == opcode]
            if len(here) != due[opcode]:
                asked = {key: operations[key] for key in EXPANSION if operations[key]}
                why = f"{len(here)} {opcode}, {due[opcode]} due for PTX's {asked}"
                self.refuse(kernel, arch, why, here[0] if here else "")
        for line in code.lines:
            # HFMA2 of two zeros is how ptxas writes a constant into a register.
            fused = re.match(r"HFMA|FFMA2|BFMA", line.opcode)
            if fused and not re.search(r"HFMA2\S* \w+, -?RZ, -?RZ, ", line.text):
                self.refuse(kernel, arch, "a packed fused operation", line.text)
                break

    def flags(self, text: str) -> None:
        """The compiler's own fused operations look like the source's, so ask how it was called."""
        for blob in text.split("Fatbin ptx code:")[1:]:
            header, _, code = blob.partition(".version")
            if code and not re.search(r"ptxasOptions\s*=.*--?fmad[ =]false", header):
                entry = re.search(r"\.entry ([\w$]+)", code)
                first = str(kernel_of(entry[1])) if entry else "a file"
                arch = re.search(r"arch = (\w+)", header)
                self.refuse(f"{first} and its file", arch[1] if arch else "", "not --fmad=false")

    def arithmetic(self, function: Text) -> None:
        """Every operation rounds to nearest and says so: ptxas may fuse a bare add or mul."""
        for parts, line in function.lines:
            operation, modifiers = parts[0], set(parts[1:])
            floating = any(re.match(r"b?f\d", part) for part in modifiers)
            if modifiers & {"approx", "ftz", "full", "sat"}:
                if function.symbol == MAY_APPROXIMATE:
                    continue
                why = "approximate arithmetic"
            elif not floating:
                continue
            elif operation in NEVER:
                why = "arithmetic that no rule asks for"
            elif operation in ROUNDED and "rn" not in modifiers:
                why = "arithmetic without .rn, which ptxas may contract"
            else:
                continue
            kernel: Kernel | str = kernel_of(function.symbol)
            self.refuse(kernel, f"{function.arch} (PTX)", why, line)
            break


def main() -> int:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    module = Path(sys.argv[1]).resolve()
    cuobjdump = tool("cuobjdump")
    tool("nvdisasm")
    check = Check()

    resources = read_resources(output_of(cuobjdump, "-res-usage", module))
    ptx_text = output_of(cuobjdump, "-ptx", module)
    check.flags(ptx_text)
    ptx = read_ptx(ptx_text)
    compiled: dict[str, dict[Kernel, Code]] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        output_of(cuobjdump, "-xelf", "all", module, cwd=folder)
        cubins = sorted(Path(folder).glob("*.cubin"))
        for path, kernels in zip(
            cubins, pool.map(lambda path: read_cubin(cuobjdump, path), cubins), strict=True
        ):
            compiled.setdefault(path.name.split(".")[-2], {}).update(kernels)

    texts = {(kernel_of(one.symbol), one.arch): one for one in ptx if one.lines}
    some_text = {kernel: one for (kernel, _), one in texts.items()}
    if not compiled or not some_text:
        sys.exit(f"{module}: {len(compiled)} architectures, {len(some_text)} functions in PTX")
    for function in ptx:
        check.arithmetic(function)

    print(f"{'':10}{'kernels':>9}{'registers':>11}{'LDG.128':>9}{'STG.128':>9}")
    for arch, kernels in sorted(compiled.items()):
        sweeps = {(kernel.rule, kernel.states) for kernel in kernels if kernel.rule}
        names = ("sweep", "staged")
        expected = {
            Kernel(n, *key, wide) for n in names for key in sweeps for wide in (False, True)
        }
        expected |= {Kernel("norm"), Kernel("finish"), Kernel("enter")}
        if not sweeps or expected != set(kernels):
            missing = ", ".join(map(str, sorted(expected ^ set(kernels))))
            check.refuse("the kernels", arch, f"not those that were expected: {missing}")
        for kernel, code in kernels.items():
            check.local_memory(kernel, arch, code, resources[arch, kernel])
            if kernel.name == "norm":
                check.norm_accesses(kernel, arch, code)
            if not kernel.rule:
                continue
            check.accesses(kernel, arch, code)
            # Where an architecture has no PTX of its own, another's: both come from one source.
            text = texts.get((kernel, arch), some_text.get(kernel))
            if text:
                check.contraction(kernel, arch, code, text)
            else:
                check.refuse(kernel, arch, "no PTX to compare with")
        opcodes = Counter(
            line.opcode.split(".")[0]
            for code in kernels.values()
            for line in code.lines
            if width(line.opcode) == 16
        )
        registers = max(resources[arch, kernel]["REG"] for kernel in kernels)
        print(f"{arch:10}{len(kernels):9}{registers:11}{opcodes['LDG']:9}{opcodes['STG']:9}")

    for failure in check.failures:
        print(failure, file=sys.stderr)
    if check.failures:
        print(f"{len(check.failures)} refused", file=sys.stderr)
        return 1
    print("16-byte accesses, no spills, no contraction")
    return 0


if __name__ == "__main__":
    sys.exit(main())
