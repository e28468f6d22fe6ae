"""The kernels' hot loops, read from an object file: instructions, and accesses to the stack.

tests/data/instructions.json has them as they are meant to be; test_symbols.py compares. To record
them anew: `FUSEDSTEP_RECORD=1 pytest tests/test_symbols.py -k instructions`.
"""

import json
import re
import subprocess
from pathlib import Path

CSRC = Path(__file__).parents[1] / "csrc"
RECORDED = Path(__file__).parent / "data" / "instructions.json"
WIDTHS = {"avx2": 32, "avx512": 64}  # bytes of a register, of the sets that are read
REGISTER = {"xmm": 16, "ymm": 32, "zmm": 64}
# Stores that narrow on the way, to this part of the register that they name.
NARROWS = {"vcvtps2ph": 2, "vcvtpd2ps": 2, "vpmovdw": 2, "vpmov(us|s)?db": 4}
# Single elements: of tails, and of what lies beside a block.
SINGLE = r"vmovs[sd]|vmov[qd]|vpextr[bwdq]|vmov[hl]p[sd]|vextractps"
STACK = re.compile(r"\(%r[sb]p\)")  # without an index: a register's place, not an array's


def innermost_loops(code):
    """The bodies of loops (a jump back, and what lies before it) that hold no other loop."""
    lines = [m.groups() for m in re.finditer(r"^ *([0-9a-f]+):\t(.*)$", code, re.MULTILINE)]
    place = {address: i for i, (address, _) in enumerate(lines)}
    spans = []
    for i, (_, text) in enumerate(lines):
        jump = re.match(r"j\w+ +([0-9a-f]+) ", text)
        if jump and place.get(jump[1], i) < i:
            spans.append((place[jump[1]], i))
    inner = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return [[text for _, text in lines[first : last + 1]] for first, last in inner]


def shapes():
    """(bytes of a parameter, bytes of a state) in each shape, in the order of kShapeList."""
    text = (CSRC / "interface" / "kernels.h").read_text()
    names = {"F32": 4, "F64": 8, "Bf16": 2, "F16": 2, "Q8": 1}
    found = re.findall(r"\{Format::k(\w+), Format::k\w+, Format::k(\w+)\},", text)
    return [(names[param], names[state]) for param, state in found]


def stored(line):
    """The bytes of whole registers that an instruction stores, but for registers' own places."""
    found = re.match(r"(\w+) .*%([xyz]mm)\d+,[^,]*\(.*\)(\{%k\d\})?$", line)
    if not found or STACK.search(line) or re.fullmatch(SINGLE, found[1]):
        return 0
    half = found[1].startswith("vextract")  # the upper half, to memory
    part = next((by for name, by in NARROWS.items() if re.match(name, found[1])), 1 + half)
    return REGISTER[found[2]] // part


def hot_loops(body, width, param, state, states):
    """[instructions for 16 elements, accesses to the stack] of each loop over a kernel's elements.

    How many elements a loop's round has follows from the bytes that it stores.
    """
    found = []
    lanes = width // (8 if param == 8 else 4)
    for loop in innermost_loops(body):
        total = sum(map(stored, loop))
        # States in 8 bits are updated as floats in one loop, and encoded four registers at a time.
        ways = [(param + (4 if state == 1 else state) * states, lanes)]
        if state == 1 and states:
            ways.append((states, 4 * lanes))
        for size, least in ways:
            elements, rest = divmod(total, size)
            if elements and not rest and elements % least == 0:
                spills = sum(bool(STACK.search(line)) for line in loop)
                found.append(
                    (round(16 * len(loop) / elements, 1), round(16 * spills / elements, 1))
                )
                break
    return sorted(found)


def updates(isa, obj):
    """{(rule, variant): {shape: body}} of one set's object file."""
    code = subprocess.run(
        ["objdump", "-dC", "--no-show-raw-insn", str(obj)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    name = rf"<void fusedstep::{isa}::update<fusedstep::{isa}::(\w+), (\d+), (\d+)>\([^\n]*>:\n"
    result = {}
    for found in re.finditer(name + r"(.*?)(?:\n\n|\Z)", code, re.DOTALL):
        rule, variant, shape, body = found.groups()
        result.setdefault((rule, variant), {})[int(shape)] = body
    return result


def count_states(plain):
    """How many states a variant writes: in float32 each stream has a register of its own."""
    found = set()
    for loop in innermost_loops(plain):
        bases = {re.search(r"\((%r\w+)", line)[1] for line in loop if stored(line)}
        found |= {len(bases) - 1} if bases else set()
    (states,) = found
    return states


def count(isa, obj):
    """{rule and variant: what hot_loops finds in each of its shapes}, of one set's object file."""
    result = {}
    for (rule, variant), bodies in sorted(updates(isa, obj).items()):
        states = count_states(bodies[0])
        result[f"{rule} {variant}"] = [
            hot_loops(bodies[shape], WIDTHS[isa], *shapes()[shape], states)
            for shape in sorted(bodies)
        ]
    return result


def worse(recorded, found):
    """Kernels that need 5 % more instructions or more accesses to the stack, and how many more."""
    for kernel in sorted({*recorded, *found}):
        if len(recorded.get(kernel, [])) != len(found.get(kernel, [])):
            yield f"{kernel}: other shapes"
            continue
        for shape, pair in enumerate(zip(recorded[kernel], found[kernel], strict=True)):
            before, now = ([sum(loop[i] for loop in loops) for i in (0, 1)] for loops in pair)
            if now[0] > 1.05 * before[0] or now[1] > before[1]:
                yield f"{kernel} shape {shape}: {before} became {now}"


def recorded(compiler):
    """{set: count()} as recorded, or {} where another compiler's was."""
    found = json.loads(RECORDED.read_text())
    return found["sets"] if found["compiler"] == compiler else {}


def record(compiler, isa, kernels):
    """Puts one set's in the place of what was recorded of it, a kernel a line."""
    sets = {**recorded(compiler), isa: kernels}
    text = json.dumps({"compiler": compiler, "sets": sets}, sort_keys=True)
    RECORDED.write_text(re.sub(r'("\w+ \d+": )|("\w+": \{)', r"\n\1\2", text) + "\n")
