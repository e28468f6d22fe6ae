"""The core's folders are layers: who includes whom, read from the include lines."""

import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
FOLDERS = sorted(path.name for path in CSRC.iterdir() if path.is_dir())
ARITHMETIC = {"rules", "isa", "formats", "kernels"}  # compiled once per instruction set

# Includes that a layer has not, and why.
EXCEPTIONS = {
    ("python/bindings.cpp", "torch/tensor_table.h"): "the module's table of contents names both",
    ("python/bindings.cpp", "rules/power.h"): "schedules have the powers and cosines of the rules",
}


def includes():
    """Each (file, file that it includes), by their paths below csrc."""
    found = []
    for path in sorted(CSRC.rglob("*")):
        if path.suffix not in (".h", ".cpp", ".cu"):
            continue
        for name in re.findall(r'^ *# *include "(.*?)"', path.read_text(), re.MULTILINE):
            beside = path.parent / name
            target = beside if beside.exists() else CSRC / name
            assert target.exists(), f"{path} includes {name}"
            found.append((path.relative_to(CSRC).as_posix(), target.relative_to(CSRC).as_posix()))
    return found


INCLUDES = includes()


def of(folder):
    """The other folders that one includes, but for the exceptions."""
    pairs = {pair for pair in INCLUDES if pair not in EXCEPTIONS}
    return {to.split("/")[0] for at, to in pairs if at.startswith(f"{folder}/")} - {folder}


def table():
    """What the README says of each folder: the sentence, and the folders that it includes."""
    rows = re.findall(r"^\| `(\w+)/` \| (.*?) \| (.*?) \|$", (CSRC / "README.md").read_text(), re.M)
    return {name: (sentence, set(re.findall(r"`(\w+)/`", also))) for name, sentence, also in rows}


def test_every_file_is_in_a_folder_that_the_readme_has_a_sentence_on():
    assert {path.name for path in CSRC.iterdir() if path.is_file()} == {"README.md"}
    assert sorted(name for name in table() if name in FOLDERS) == FOLDERS
    assert all(len(table()[name][0].split()) >= 5 for name in FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_includes_those_that_the_readme_lists(folder):
    assert of(folder) <= table()[folder][1]


def test_interface_is_plain_data_and_includes_nothing():
    assert of("interface") == set()


@pytest.mark.parametrize("folder", sorted(ARITHMETIC))
def test_arithmetic_includes_arithmetic_and_is_included_by_steps_alone(folder):
    assert of(folder) <= ARITHMETIC | {"interface"}
    assert {other for other in FOLDERS if folder in of(other)} <= ARITHMETIC | {"step", "cuda"}


def test_machine_needs_no_rule():
    assert of("machine") <= {"interface"}


@pytest.mark.parametrize(
    ("folder", "strangers"),
    [
        ("step", {"python", "torch", "cuda", "jax"}),
        ("python", {"torch", "cuda", "jax"}),
        ("torch", {"cuda", "jax"}),
        ("cuda", {"jax"}),
    ],
)
def test_lower_layer_includes_no_higher_one(folder, strangers):
    assert not of(folder) & strangers


def test_folders_include_each_other_in_no_circle():
    TopologicalSorter({folder: of(folder) for folder in FOLDERS}).prepare()  # or CycleError


def test_step_knows_nothing_of_python():
    headers = r"#include <(pybind11/.*|Python\.h)>"
    without = ["interface", "machine", "step", *sorted(ARITHMETIC)]
    text = {p: p.read_text() for folder in without for p in (CSRC / folder).iterdir()}
    assert not [path for path, source in text.items() if re.search(headers, source)]


def test_exceptions_are_those_that_there_are():
    assert set(EXCEPTIONS) <= set(INCLUDES)
