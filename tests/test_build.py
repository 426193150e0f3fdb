"""The build: what runs again, what is refused, what is left behind."""

import re
import shlex
from pathlib import Path

import nbformat
import pytest
from papermill.exceptions import PapermillExecutionError

import build_book
from build_book import load_current, merge, run
from chapters import (
    ROOT,
    Chapter,
    chapters,
    check_parameters,
    profile,
    without_notice,
)
from check_figures import missing_on_page
from deblender.train import RECIPES, _parser
from sync_twins import twin

HEADER = """\
---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
    format_version: 0.13
kernelspec:
  display_name: Python 3 (ipykernel)
  language: python
  name: python3
---

# Count stars

Prose.

```{code-cell} ipython3
:tags: [parameters]

n: int = 2  # how many
```

"""
CELL = """\
```{{code-cell}} ipython3
---
mystnb:
  figure:
    caption: A caption.
    name: fig-tiny
---
import os
from pathlib import Path

build = Path(os.environ["DEBLENDER_BUILD"])
for name in ("figures/fig-tiny.png", "figures/fig-tiny.pdf", "metrics/01_tiny.json"):
    (build / name).parent.mkdir(parents=True, exist_ok=True)
    (build / name).touch()
{last}
```
"""


@pytest.fixture
def book(tmp_path):
    """A project with one chapter, which prints ``n`` stars."""
    for folder in ("book/params", "lib/tiny", "data/weights"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "requirements.lock").write_text("tiny==1\n")
    (tmp_path / "lib/tiny/__init__.py").touch()
    (tmp_path / "data/weights/card.json").write_text("{}")
    write(tmp_path, HEADER + CELL.format(last='print(n * "*")'))
    return tmp_path


def write(root: Path, text: str) -> None:
    (root / "book" / "01_tiny.md").write_text(text)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def fingerprint(root: Path, **parameters) -> str:
    (chapter,) = chapters(root)
    return chapter.fingerprint(parameters)


def execute(root: Path, monkeypatch, **parameters) -> tuple[Chapter, Path]:
    build = root / "build"
    monkeypatch.setenv("DEBLENDER_BUILD", str(build))
    (chapter,) = chapters(root)
    run(chapter, parameters, build)
    return chapter, build


@pytest.mark.parametrize(
    "old, new",
    [("Prose.", "Better prose."), ("A caption.", "Another."), ("stars", "galaxies")],
)
def test_prose_does_not_change_the_fingerprint(book, old, new):
    before = fingerprint(book)
    edit(book / "book/01_tiny.md", old, new)
    assert fingerprint(book) == before


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("book/01_tiny.md", "print(n", "print(2 * n"),
        ("book/01_tiny.md", "n: int = 2", "n: int = 3"),
        ("book/01_tiny.md", "[parameters]", "[hide-input]"),
        ("lib/tiny/__init__.py", "", "x = 1"),
        ("data/weights/card.json", "{}", '{"seed": 1}'),
        ("requirements.lock", "==1", "==2"),
    ],
)
def test_what_decides_the_outputs_changes_the_fingerprint(book, name, old, new):
    before = fingerprint(book)
    edit(book / name, old, new)
    assert fingerprint(book) != before


def test_parameters_and_new_files_change_the_fingerprint(book):
    before = fingerprint(book)
    assert fingerprint(book, n=3) != before
    (book / "lib/tiny/more.py").touch()
    assert fingerprint(book) != before


def test_another_chapter_does_not_change_the_fingerprint(book):
    before = fingerprint(book)
    (book / "book/02_other.md").write_text(HEADER)
    assert chapters(book)[0].fingerprint({}) == before


def test_outputs_are_reused_until_something_changes(book, monkeypatch):
    chapter, build = execute(book, monkeypatch)
    made = run(chapter, {}, build)
    assert load_current(chapter, {}, build) == made
    assert not load_current(chapter, {"n": 3}, build)
    edit(book / "lib/tiny/__init__.py", "", "x = 1")
    assert not load_current(chapter, {}, build)


def test_a_lost_figure_is_made_again(book, monkeypatch):
    chapter, build = execute(book, monkeypatch)
    (build / "figures/fig-tiny.pdf").unlink()
    assert not load_current(chapter, {}, build)


def test_new_prose_joins_old_outputs(book, monkeypatch):
    _, build = execute(book, monkeypatch, n=5)
    edit(book / "book/01_tiny.md", "Prose.", "Better prose.\n\n+++\n\nMore.")
    edit(book / "book/01_tiny.md", "A caption.", "Another.")
    (chapter,) = chapters(book)
    merged = merge(chapter, load_current(chapter, {"n": 5}, build))
    nbformat.validate(merged)
    assert "Better prose." in merged.cells[0].source
    assert merged.cells[1].source == "More."
    assert merged.cells[-2].metadata.tags == ["injected-parameters"]
    assert merged.cells[-1].outputs[0].text == "*****\n"
    assert merged.cells[-1].metadata.mystnb.figure.caption == "Another."


def test_a_failed_run_leaves_nothing_to_reuse(book, monkeypatch):
    execute(book, monkeypatch)
    good = (book / "book/01_tiny.md").read_text()
    write(book, HEADER + CELL.format(last="print(1 / 0)"))
    with pytest.raises(PapermillExecutionError, match="division by zero"):
        execute(book, monkeypatch)
    write(book, good)
    (chapter,) = chapters(book)
    assert not load_current(chapter, {}, book / "build")


def test_a_chapter_must_write_its_figures(book, monkeypatch):
    edit(book / "book/01_tiny.md", '"figures/fig-tiny.pdf", ', "")
    with pytest.raises(FileNotFoundError, match="fig-tiny.pdf"):
        execute(book, monkeypatch)


def test_unknown_parameter_is_refused(book):
    (chapter,) = chapters(book)
    with pytest.raises(ValueError, match="no parameter m; it accepts n"):
        check_parameters(chapter, {"m": 3})


def test_unknown_profile_and_chapter_are_refused(book):
    (book / "book/params/quick.yml").write_text("01_tiny: {n: 1}")
    assert profile(book, "quick") == {"01_tiny": {"n": 1}}
    with pytest.raises(ValueError, match="'fast'.*quick"):
        profile(book, "fast")
    with pytest.raises(ValueError, match="01_tinny.*01_tiny"):
        build_book.choose(book, ["01_tinny"])


def test_only_the_notice_of_tensorflow_is_dropped():
    notice = (
        "WARNING: All log messages before absl::InitializeLog() is called are ...\n"
        "I0000 00:00:1.2 3949 port.cc:153] oneDNN custom operations are on. You ...\n"
    )
    output = nbformat.v4.new_output("stream", name="stderr", text=notice)
    assert without_notice([output]) == []
    output = nbformat.v4.new_output("stream", name="stderr", text=notice + "Oh\n")
    assert without_notice([output])[0].text == "Oh\n"


def test_twin_is_a_function_of_the_text(book):
    (chapter,), (again,) = chapters(book), chapters(book)
    assert twin(chapter) == twin(again)
    nbformat.validate(nbformat.reads(twin(chapter), as_version=4))


def test_missing_figures_are_named(tmp_path):
    page = tmp_path / "page.html"
    (tmp_path / "a.png").touch()
    page.write_text(
        '<figure id="fig-a"><img src="a.png"></figure>'
        '<figure id="fig-b"><img src="lost.png"></figure>'
    )
    labels = ("fig-a", "fig-b", "fig-c")
    assert missing_on_page(page, labels) == ["fig-b on page.html", "fig-c on page.html"]


def test_every_module_is_in_the_reference():
    page = (ROOT / "book" / "api.md").read_text()
    modules = {
        f"deblender.{path.stem}" for path in ROOT.glob("lib/deblender/[a-z]*.py")
    }
    assert set(re.findall(r"automodule:: (\S+)", page)) == modules


def commands(tool: str, page: str = "reruns") -> list[list[str]]:
    """Return the arguments of each example of a command on a page."""
    text = (ROOT / "book" / f"{page}.md").read_text().replace("\\\n", " ")
    lines = (x.strip().removeprefix("KERAS_BACKEND=jax ") for x in text.splitlines())
    return [shlex.split(x)[1:] for x in lines if x.startswith(tool)]


@pytest.mark.parametrize("line", commands("python tools/build_book.py"), ids=" ".join)
def test_examples_of_the_build_are_accepted(line):
    args = build_book.parse_arguments(line[1:])
    given = build_book.parameters_of(args, ROOT)
    for chapter in build_book.choose(ROOT, args.chapters):
        check_parameters(chapter, given.get(chapter.name, {}))


@pytest.mark.parametrize("line", commands("papermill"), ids=" ".join)
def test_examples_of_papermill_name_what_exists(line):
    (path,) = [x for x in line if x.startswith("book/")]
    chapter = Chapter((ROOT / path).with_suffix(".md"))
    named = {line[i + 1] for i, x in enumerate(line) if x == "-p"}
    assert named <= chapter.parameters.keys()


@pytest.mark.parametrize("page", ["reruns", "08_side_by_side"])
def test_examples_of_training_are_accepted(page):
    lines = commands("python -m deblender.train", page)
    assert len(lines) >= 2
    for line in lines:
        words = [word.replace("$name", "lsst") for word in line[2:]]
        assert _parser().parse_args(words).name in RECIPES
