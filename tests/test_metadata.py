"""What the built package says of itself, as an index shows it."""

import re
from importlib import metadata
from pathlib import Path

import fusedstep as fs

ROOT = Path(__file__).parent.parent
HOME = "https://github.com/fusedstep/fusedstep"
BUILT = metadata.metadata("fusedstep")


def test_readme_on_an_index_has_no_relative_link():
    text = BUILT["Description"] or BUILT.get_payload()
    shown = re.findall(r"\]\(([^)]+)\)", text)
    written = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    relative = [target for target in written if "://" not in target]
    assert relative
    assert shown == [f"{HOME}/blob/main/{t}" if t in relative else t for t in written]


def test_metadata_is_whole_and_one():
    assert BUILT["Author"] in (ROOT / "LICENSE").read_text()
    assert BUILT["License-Expression"] == "MIT"
    urls = dict(line.split(", ") for line in BUILT.get_all("Project-URL"))
    assert urls["Homepage"] == HOME
    for url in urls.values():  # what they show is in the repository
        if path := re.match(rf"{HOME}/(?:blob|tree)/main/(.+)", url):
            assert (ROOT / path[1]).exists()
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {fs.__version__}\n" in citation
    assert f"name: {BUILT['Author']}\n" in citation
    pythons = {c.split("3.")[1] for c in BUILT.get_all("Classifier") if ":: 3." in c}
    assert pythons == {"10", "11", "12", "13", "14"}
