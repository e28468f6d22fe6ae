"""The kernels' object files: no symbol that could be merged across sets, no foreign register.

An inline function of one set that wins over another set's copy ships AVX-512 code to old CPUs.
"""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import instructions
from fusedstep import _core
from instructions import innermost_loops

CSRC = Path(__file__).parents[1] / "csrc"
CMAKE = CSRC.parent / "CMakeLists.txt"
COMPILER = os.environ.get("CXX") or "c++"
PATIENCE = 500  # seconds for one compilation on a loaded machine

# What the rules' scalars (prepare) and the scalar set may call: the C library's mathematics, what
# GCC makes of long copies and of stack protection, and our own power.
ALLOWED = re.compile(
    r"fmaf?|sqrtf?|mem(cpy|set|move)|__stack_chk_fail|_GLOBAL_OFFSET_TABLE_"
    r"|fusedstep::power\(double, (double|long)\)"
)


def machine_sets():
    """The instruction sets of this machine's architecture with their flags, from CMakeLists.txt."""
    text = re.sub(r"#.*|\$\{clang\}", "", CMAKE.read_text())
    for names, sets in re.findall(r'MATCHES "\^\(([\w|]+)\)\$"\)\s+set\(isas ([\w ]+)\)', text):
        if platform.machine() in names.split("|"):
            found = sets.split()
            break
    else:
        found = ["scalar"]
    (unwinding,) = re.findall(r"set\(no_unwinding ([^)]*)\)", text)
    common = ["-ffp-contract=off", "-fno-math-errno", *unwinding.split()]
    assert all(flag in text for flag in common)
    own = dict(re.findall(r"set\(flags_(\w+) ([^)]*)\)", text))

    def flags(name):
        words = own.get(name, "").split()
        nested = [flags(w[8:-1]) if w.startswith("${flags_") else [w] for w in words]
        return [w for group in nested for w in group if not w.startswith(("$<", "-O"))]

    return {name: common + flags(name) for name in found}


SETS = machine_sets()
each_set = pytest.mark.parametrize("isa", list(SETS))


def need(*tools):
    for tool in tools:
        if shutil.which(tool.split()[0]) is None:
            pytest.skip(f"{tool} is not on PATH")
    if os.name != "posix" or platform.system() != "Linux":
        pytest.skip("reads ELF objects")


def output(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A function from (set, optimization) to its object file, compiled once."""
    need(COMPILER)
    made = {}

    def compile(isa, optimization):
        key = isa, optimization
        if key not in made:
            made[key] = tmp_path_factory.mktemp(isa) / f"kernels{optimization}.o"
            # -w: warnings are the build's business. -fPIC as in the module.
            flags = ["-std=c++17", optimization, "-fPIC", "-w", *SETS[isa]]
            output(
                *COMPILER.split(), *flags, f"-DFUSEDSTEP_TARGET={isa}",
                f"-I{CSRC}", "-c", str(CSRC / "kernels" / "kernels.cpp"), "-o", str(made[key]),
            )  # fmt: skip
        return str(made[key])

    return compile


def symbols(obj):
    """(type letter, demangled name) of every symbol."""
    for line in output("nm", "-C", obj).splitlines():
        kind, name = re.match(r"[0-9a-f]* *(\S) (.*)", line).groups()
        yield kind, name


@each_set
def test_symbols_lie_in_the_set_s_own_namespace(isa, compiled):
    # At -O0 nothing is inlined, so every function that could ever be merged is seen.
    need("nm")
    defined, foreign, wanted = 0, [], []
    for kind, name in symbols(compiled(isa, "-O0")):
        if kind == "U":
            if not ALLOWED.fullmatch(name):
                wanted.append(name)
        elif kind.isupper() or kind in "uvw":  # global, weak or unique; lower case is local
            defined += 1
            head = name.split("(")[0]  # the arguments' types do not make a function the set's
            if f"fusedstep::{isa}::" not in head:
                foreign.append(name)
    assert defined > 100
    assert foreign == []
    assert wanted == []


@each_set
def test_symbols_exported_are_the_table_alone(isa, compiled):
    # Everything else is weak (templates) or local; a second strong symbol would be an accident.
    need("nm")
    strong = [name for kind, name in symbols(compiled(isa, "-O0")) if kind in "TDBR"]
    assert strong == [f"fusedstep::{isa}::kernels"]


@each_set
def test_no_constructor_runs_at_load(isa, compiled):
    # Code of an unusable set must not run before dispatch has looked at the CPU.
    need("objdump")
    sections = output("objdump", "-h", compiled(isa, "-O0"))
    assert ".text" in sections
    assert ".init_array" not in sections
    assert ".ctors" not in sections


def test_module_uses_none_of_the_library_s_streams():
    # Their locale is the process's: another library's own copy of it made reading a file crash.
    need("nm")
    names = output("nm", "-DC", _core.__file__).splitlines()
    assert any("PyModule" in name for name in names)
    assert [name for name in names if re.search(r"std::.*(stream|ios_base|locale)", name)] == []


FOREIGN = {
    "scalar": r"%[yz]mm|%k[0-7]\b|%xmm(1[6-9]|2\d|3[01])",
    "avx2": r"%zmm|%k[0-7]\b|%xmm(1[6-9]|2\d|3[01])",
}
OWN = {"scalar": "%xmm", "avx2": "%ymm", "avx512": "%zmm"}


@each_set
def test_registers_are_the_set_s_own(isa, compiled):
    need("objdump")
    if isa not in OWN:
        pytest.skip(f"no table of registers for {isa}")
    code = output("objdump", "-d", "--no-show-raw-insn", compiled(isa, "-O0"))
    assert OWN[isa] in code
    if isa == "scalar":  # nor the three-operand forms, which old CPUs lack as well
        assert not re.search(r"\tv[a-z]+\d* .*%xmm", code)
    if isa in FOREIGN:
        assert not re.search(FOREIGN[isa], code)


def kernels(isa, obj):
    """What is in angle brackets, and the whole name, of each kernel: rule, variant, shape."""
    found = [(re.match(rf"void fusedstep::{isa}::update<(.*)>\(", n), n) for _, n in symbols(obj)]
    return {match[1]: name for match, name in found if match and "::{lambda" not in name}


@each_set
def test_kernels_of_a_set_are_few(isa, compiled):
    # A variant of a rule in a shape each. All else, as mixes of formats, is the driver's work.
    need("nm")
    found = [text.split(", ") for text in kernels(isa, compiled(isa, "-O0"))]
    variants, shapes = {(rule, v) for rule, v, _ in found}, {shape for *_, shape in found}
    few = (27, 2, 54) if isa == "scalar" else (27, 8, 210)  # the scalar set stages what it can
    assert (len(variants), len(shapes), len(found)) == few


def test_shapes_beyond_the_two_that_computing_needs_have_a_measurement():
    text = (CSRC / "interface" / "kernels.h").read_text()
    lines = re.search(r"kShapeList\[\] = {\n(.*?)\n};", text, re.DOTALL)[1].splitlines()
    shapes = [line for line in lines if "{Format::" in line]
    assert len(shapes) == text.count("{Format::k")
    for line in shapes[2:]:
        figures = re.search(r"}, +// ([\d.]+), ([\d.]+)$", line).groups()
        assert max(map(float, figures)) > 1.05, line  # what staging may lose


@pytest.mark.parametrize("isa", [isa for isa in SETS if isa in ("avx2", "avx512")])
def test_adam_loop_has_full_registers_and_no_spills(isa, compiled):
    # One spill per element would cost as much as a stream of memory.
    need("objdump", "nm")
    register = OWN[isa].strip("%")
    obj = compiled(isa, "-O3")
    code = output("objdump", "-dC", "--no-show-raw-insn", obj)
    names = kernels(isa, obj)
    for variant, states in enumerate((2, 3)):  # amsgrad or not
        name = names[f"fusedstep::{isa}::Adam, {variant}, 0"]
        (body,) = re.findall(rf"<{re.escape(name)}>:\n(.*?)(?:\n\n|\Z)", code, re.DOTALL)
        hot = [loop for loop in innermost_loops(body) if any("vsqrtps" in x for x in loop)]
        assert len(hot) == 2, f"{name}: not a loop each for coupled decay and scaled"
        for loop in hot:
            assert not [x for x in loop if re.search(r"\(%r[sb]p", x)], "spills to the stack"
            stores = [x for x in loop if re.match(rf"vmovup[sd] +%{register}\d+,.*\(%", x)]
            roots = [x for x in loop if x.startswith("vsqrtps")]
            divisions = [x for x in loop if x.startswith("vdivps")]
            assert len(roots) == len(divisions) == len(stores) // (1 + states) <= 2  # unrolled
            assert len(stores) % (1 + states) == 0
            assert all(register in x for x in roots + divisions)
            assert not [x for x in loop if x.startswith("call")]


def compiler():
    """What it is and which version, as "GCC 12.2.0"."""
    command = COMPILER.split()
    if "clang" in output(*command, "--version").lower():
        return f"Clang {output(*command, '-dumpversion').strip()}"
    return f"GCC {output(*command, '-dumpfullversion').strip()}"


@pytest.mark.parametrize("isa", [isa for isa in SETS if isa in instructions.WIDTHS])
def test_kernels_need_no_more_instructions_than_recorded(isa, compiled):
    need("objdump")
    found = instructions.count(isa, compiled(isa, "-O3"))
    assert sum(map(len, found.values())) == 210
    assert all(loops for kernel in found.values() for loops in kernel)
    if os.environ.get("FUSEDSTEP_RECORD"):
        instructions.record(compiler(), isa, found)
    known = instructions.recorded(compiler())
    if isa not in known:
        pytest.skip(
            f"not compared: recorded of another compiler than {compiler()}. To record:"
            " FUSEDSTEP_RECORD=1 pytest tests/test_symbols.py -k instructions"
        )
    # Rounding to bfloat16, states in fewer bits: their constants and a rule's scalars are more than
    # AVX2's 16 registers, so that some are read from the stack; centered RMSprop with momentum
    # has 13 and five streams. No other loop goes there.
    for name, kernel in found.items():
        if name == "RmsProp 3":
            continue
        plain = [loops for shape, loops in enumerate(kernel) if shape not in (2, 6, 7)]
        assert not any(spills for loops in plain for _, spills in loops), name
    assert list(instructions.worse(known[isa], found)) == []
