"""What the other tools know of a chapter: code, parameters, figures, fingerprint."""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jupytext
import papermill
import yaml
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent

# Set in every process that starts kernels; kernels inherit it.
KERNEL_ENVIRONMENT = {
    "KERAS_BACKEND": "tensorflow",  # the backend of requirements.lock
    "PYTHONHASHSEED": "0",
    "TF_CPP_MIN_LOG_LEVEL": "3",  # the C++ log would be captured as cell output
    "TQDM_DISABLE": "1",  # progress bars are for people; here they would be outputs
}

# TensorFlow prints these while its log is not yet configured, so no setting hides them
# but TF_ENABLE_ONEDNN_OPTS=0, which doubles the training time.
TENSORFLOW_NOTICE = re.compile(
    r"^(WARNING: All log messages before absl::InitializeLog"
    r"|I\d{4} .*oneDNN custom operations are on).*\n",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Chapter:
    """One text notebook, ``book/NN_name.md``."""

    source: Path

    @property
    def name(self) -> str:
        return self.source.stem

    @property
    def twin(self) -> Path:
        """Path of the derived notebook, which Binder and Colab open."""
        return self.source.with_suffix(".ipynb")

    @cached_property
    def notebook(self) -> NotebookNode:
        """The notebook without outputs; cell ids depend on the cells alone."""
        notebook = jupytext.read(self.source)
        notebook.metadata.get("jupytext", {}).pop("text_representation", None)
        seen = set()
        for cell in notebook.cells:
            cell.id = unused_id(f"{cell.cell_type}\n{cell.source}", seen)
            seen.add(cell.id)
        return notebook

    @property
    def code_cells(self) -> list[NotebookNode]:
        return [cell for cell in self.notebook.cells if cell.cell_type == "code"]

    @property
    def title(self) -> str:
        return re.search(r"^# (.+)$", self.source.read_text(), re.MULTILINE)[1]

    @property
    def parameters(self) -> dict[str, dict]:
        """Name, type, default and help of each parameter, as papermill reads them."""
        return papermill.inspect_notebook(self.notebook)

    @property
    def figures(self) -> dict[str, dict]:
        """The ``mystnb`` metadata of each labelled figure, by label."""
        described = [cell.metadata.get("mystnb", {}) for cell in self.code_cells]
        return {m["figure"]["name"]: m for m in described if "figure" in m}

    def products(self, build: Path) -> list[Path]:
        """Return the files the chapter writes under ``build`` as it runs."""
        pictures = [
            build / "figures" / f"{label}.{kind}"
            for label in self.figures
            for kind in ("png", "pdf")
        ]
        return [*pictures, build / "metrics" / f"{self.name}.json"]

    def fingerprint(self, parameters: dict) -> str:
        """Return the SHA-256 of all that decides the chapter's outputs.

        These are its code, its parameters, the library, the data, the lock file and
        where the real galaxies are: not its prose, its captions or how cells are shown.
        """
        code = [
            [cell.source, "parameters" in cell.metadata.get("tags", [])]
            for cell in self.code_cells
        ]
        root = self.source.parent.parent
        files = {str(p.relative_to(root)): sha256(p) for p in shared_inputs(root)}
        real = os.environ.get("COSMOS_DIR")
        text = json.dumps([code, parameters, files, real], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def chapters(root: Path) -> list[Chapter]:
    """Return the chapters of the book in reading order."""
    return [Chapter(path) for path in sorted(root.glob("book/[0-9][0-9]_*.md"))]


def unused_id(text: str, seen: set[str]) -> str:
    """Return a cell id made from the cell's text that is not in ``seen``."""
    while (name := hashlib.sha256(text.encode()).hexdigest()[:8]) in seen:
        text += "\n"
    return name


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shared_inputs(root: Path) -> list[Path]:
    """Return the files that every chapter depends on: library, data, lock file."""
    found = [
        *root.glob("lib/**/*"),
        *root.glob("data/**/*"),
        root / "requirements.lock",
    ]
    return sorted(
        path
        for path in found
        if path.is_file()
        and path.name != "README.md"
        and not re.search(r"__pycache__|\.egg-info|\.ipynb_checkpoints", str(path))
    )


def profile(root: Path, name: str) -> dict[str, dict]:
    """Return the parameters of each chapter in ``book/params/<name>.yml``.

    Raises ValueError if there is no such profile.
    """
    known = {path.stem: path for path in root.glob("book/params/*.yml")}
    if name not in known:
        raise ValueError(f"unknown profile {name!r}; the profiles are {sorted(known)}")
    return yaml.safe_load(known[name].read_text()) or {}


def check_parameters(chapter: Chapter, parameters: dict) -> None:
    """Raise ValueError on a name that is no parameter: papermill itself only warns."""
    known = chapter.parameters
    unknown = sorted(parameters.keys() - known.keys())
    if unknown:
        raise ValueError(
            f"chapter {chapter.name} has no parameter {', '.join(unknown)}; "
            f"it accepts {', '.join(known)}"
        )


def execute(
    chapter: Chapter, parameters: dict, target: Path, build: Path, **options
) -> NotebookNode:
    """Run a chapter with papermill into ``target`` and return the executed notebook.

    ``options`` go to papermill. Raises ValueError on an unknown parameter,
    PapermillExecutionError if a cell fails, and FileNotFoundError if the chapter did
    not write its figures and metrics under ``build``, the folder it is told in the
    environment variable DEBLENDER_BUILD.
    """
    check_parameters(chapter, parameters)
    executed = papermill.execute_notebook(
        chapter.notebook,
        target,
        parameters=parameters,
        kernel_name="python3",
        cwd=chapter.source.parent,
        start_timeout=300,
        progress_bar=False,
        **options,
    )
    missing = [str(p) for p in chapter.products(build) if not p.is_file()]
    if missing:
        raise FileNotFoundError(f"{chapter.name} did not write {', '.join(missing)}")
    for cell in executed.cells:
        if cell.cell_type == "code":
            cell.outputs = without_notice(cell.outputs)
    return executed


def without_notice(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Drop TensorFlow's notice; anything else on stderr stays, and fails the build."""
    kept = []
    for output in outputs:
        if output.get("name") == "stderr":
            output.text = TENSORFLOW_NOTICE.sub("", output.text)
        if output.get("text") != "":
            kept.append(output)
    return kept
