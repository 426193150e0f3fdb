"""Chapters: the twin is in step, the cells keep the house rules, and each one runs."""

import json

import pytest
import yaml

from chapters import ROOT, check_parameters, execute, profile
from chapters import chapters as chapters_of
from check_figures import REQUIRED
from pages import PROFILES
from sync_twins import twin

CHAPTERS = chapters_of(ROOT)
every_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: c.name)
every_profile = pytest.mark.parametrize("name", PROFILES)


def test_chapters_and_required_figures_agree():
    found = {chapter.name: chapter.figures.keys() for chapter in CHAPTERS}
    assert found.keys() == REQUIRED.keys()
    for name, labels in REQUIRED.items():
        assert set(labels) <= found[name], name


@every_chapter
def test_twin_is_in_step(chapter):
    assert chapter.twin.read_text(encoding="utf-8") == twin(chapter), "run: make sync"


@every_chapter
def test_twin_holds_no_output(chapter):
    cells = json.loads(chapter.twin.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(not c["outputs"] and c["execution_count"] is None for c in code)


@every_chapter
def test_first_code_cell_installs_the_library_on_colab(chapter):
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    cell = chapter.code_cells[0]
    lines = [line.strip() for line in cell.source.splitlines()]
    assert f"%pip install -q git+{config['repository']['url']}" in lines
    assert "remove-cell" in cell.metadata.tags


@every_chapter
def test_parameters_are_typed_and_explained(chapter):
    assert {"seed", "catalogue"} <= chapter.parameters.keys()
    for name, parameter in chapter.parameters.items():
        assert parameter["inferred_type_name"] != "None", name
        assert parameter["help"], name


@every_chapter
def test_every_parameter_is_seen_by_papermill(chapter):
    cell = next(c for c in chapter.code_cells if "parameters" in c.metadata.tags)
    lines = [line for line in cell.source.splitlines() if line[:1].isalpha()]
    assert len(lines) == len(chapter.parameters)


@every_profile
def test_profile_names_chapters(name):
    assert profile(ROOT, name).keys() == {chapter.name for chapter in CHAPTERS}


@every_profile
@every_chapter
def test_profile_parameters_exist(chapter, name):
    check_parameters(chapter, profile(ROOT, name)[chapter.name])


@every_chapter
def test_figures_are_described_and_referred_to(chapter):
    text = chapter.source.read_text(encoding="utf-8")
    for label, metadata in chapter.figures.items():
        assert metadata["figure"]["caption"] and metadata["image"]["alt"], label
        assert f"{{numref}}`{label}`" in text or f"<{label}>`" in text, label


@pytest.mark.slow
@every_chapter
def test_runs_without_a_word_on_stderr(chapter, tmp_path, monkeypatch):
    monkeypatch.setenv("DEBLENDER_BUILD", str(tmp_path))
    parameters = profile(ROOT, "quick")[chapter.name]
    executed = execute(chapter, parameters, tmp_path / "executed.ipynb", tmp_path)
    outputs = [o for cell in executed.cells for o in cell.get("outputs", [])]
    assert not [o.text for o in outputs if o.get("name") == "stderr"]


@pytest.mark.slow
def test_chapters_of_the_paper_profile_follow_one_another(tmp_path, monkeypatch):
    """Its networks, trained in small: each chapter reads what those before it left."""
    monkeypatch.setenv("DEBLENDER_BUILD", str(tmp_path))
    nets = {name: str(tmp_path / "nets") for name in ("weights", "save_to")}
    small, large = profile(ROOT, "quick"), profile(ROOT, "paper")
    for chapter in CHAPTERS:
        switches = large[chapter.name].keys() & {"train", *nets}
        if switches:
            asked = {name: nets.get(name, True) for name in switches}
            parameters = small[chapter.name] | asked
            execute(chapter, parameters, tmp_path / f"{chapter.name}.ipynb", tmp_path)
