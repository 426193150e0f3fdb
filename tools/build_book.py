"""Execute the chapters with papermill, then render the book.

    python tools/build_book.py                   # the published book
    python tools/build_book.py --params paper    # a profile of book/params
    python tools/build_book.py 03_vae_prior -p epochs 5    # one chapter, not rendered

A chapter runs again only if its code, its parameters, the library, the data or the
lock file changed; a change of prose is only rendered. Everything is written under
``build/``: figures, metrics, executed notebooks and ``site/_build/html``.
"""

import argparse
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

from chapters import (
    KERNEL_ENVIRONMENT,
    ROOT,
    Chapter,
    chapters,
    check_parameters,
    execute,
    profile,
    sha256,
    shared_inputs,
)
from pages import parameters_page, provenance_page


def executed_path(chapter: Chapter, build: Path) -> Path:
    return build / "executed" / f"{chapter.name}.ipynb"


def load_current(
    chapter: Chapter, parameters: dict, build: Path
) -> NotebookNode | None:
    """Return the chapter as last executed, or None if it has to run (again)."""
    path = executed_path(chapter, build)
    if not path.is_file() or not all(p.is_file() for p in chapter.products(build)):
        return None
    executed = nbformat.read(path, as_version=4)
    current = executed.metadata.book.fingerprint == chapter.fingerprint(parameters)
    return executed if current else None


def run(chapter: Chapter, parameters: dict, build: Path, **options) -> NotebookNode:
    """Execute a chapter; only a success leaves a notebook that can be reused."""
    path = executed_path(chapter, build)
    for stale in (path, *chapter.products(build)):
        stale.unlink(missing_ok=True)
    fingerprint, started = chapter.fingerprint(parameters), time.monotonic()
    partial = path.with_suffix(".partial.ipynb")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with stderr_to(build / "logs" / f"{chapter.name}.log"):
        executed = execute(chapter, parameters, partial, build, **options)
    executed.metadata["book"] = {
        "fingerprint": fingerprint,
        "parameters": parameters,
        "seconds": round(time.monotonic() - started),
    }
    nbformat.write(executed, partial)
    os.replace(partial, path)
    return nbformat.read(path, as_version=4)  # what a later run will see, to the byte


@contextlib.contextmanager
def stderr_to(path: Path) -> Iterator[None]:
    """Send what kernels write on their own standard error to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def refresh(
    chapter: Chapter, parameters: dict, build: Path, label: str
) -> NotebookNode:
    """Return the chapter executed, reusing its last run if that still holds."""
    if executed := load_current(chapter, parameters, build):
        print(f"{label} unchanged", flush=True)
        return executed
    print(f"{label} running", end="", flush=True)
    cells = len(chapter.notebook.cells)

    def show(cell: NotebookNode, cell_index: int) -> None:
        if sys.stdout.isatty():
            print(
                f"\r{label} running, cell {cell_index + 1}/{cells} ", end="", flush=True
            )

    try:
        executed = run(chapter, parameters, build, on_cell_start=show)
    except BaseException:
        print(" ... stopped", flush=True)
        raise
    print(f" ... done in {executed.metadata.book.seconds} s", flush=True)
    return executed


def merge(chapter: Chapter, executed: NotebookNode) -> NotebookNode:
    """Return the chapter's present text and captions with its executed outputs."""
    parameters = executed.metadata.book.parameters
    merged = papermill.execute_notebook(
        chapter.notebook, None, parameters, kernel_name="python3", prepare_only=True
    )
    outputs = [cell for cell in executed.cells if cell.cell_type == "code"]
    code = [cell for cell in merged.cells if cell.cell_type == "code"]
    for new, old in zip(code, outputs, strict=True):
        new.id, new.outputs, new.execution_count = (
            old.id,
            old.outputs,
            old.execution_count,
        )
    return merged


def stage(root: Path, executed: dict[Chapter, NotebookNode], staged: Path) -> None:
    """Write afresh in ``staged`` all that is rendered."""
    shutil.rmtree(staged, ignore_errors=True)
    skip = shutil.ignore_patterns("[0-9][0-9]_*", "params", ".ipynb_checkpoints")
    shutil.copytree(root / "book", staged / "book", ignore=skip)
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(root / name, staged)
    for chapter, notebook in executed.items():
        target = staged / "book" / f"{chapter.name}.ipynb"
        nbformat.write(merge(chapter, notebook), target)
    pages = {
        "parameters.txt": parameters_page(root, list(executed)),
        "provenance.txt": provenance_page(executed),
    }
    for name, text in pages.items():
        (staged / "book" / name).write_text(text, encoding="utf-8")


def render(root: Path, build: Path) -> None:
    """Build the HTML from ``build/staged`` if that or the library has changed.

    Warnings are errors. Each rendering starts from nothing, because Sphinx does not
    repeat the warnings of a page that it kept from an earlier, failed one.
    """
    site, stamp = build / "site", build / "site" / "rendered"
    staged = [p for p in (build / "staged").rglob("*") if p.is_file()]
    files = sorted([*staged, *shared_inputs(root)])  # the API page shows the library
    state = hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == state:
        print("pages unchanged", flush=True)
        return
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(build / "staged", site)
    print("rendering", flush=True)
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    options = ["--quiet", "-W", "-n", "--keep-going"]
    log = build / "logs" / "render.log"
    with log.open("wb") as file:
        done = subprocess.run(
            [jupyter_book, "build", *options, site], stdout=file, stderr=file
        )
    if done.returncode:
        raise RuntimeError(f"the pages have warnings:\n{log.read_text()}")
    stamp.write_text(state)


def choose(root: Path, names: list[str]) -> list[Chapter]:
    """Return the named chapters, or all; raise ValueError on an unknown name."""
    known = {chapter.name: chapter for chapter in chapters(root)}
    if unknown := sorted(set(names) - known.keys()):
        raise ValueError(f"unknown chapter {unknown}; the chapters are {list(known)}")
    return [known[name] for name in sorted(set(names))] or list(known.values())


def build_book(root: Path, build: Path, names: list[str], parameters: dict) -> None:
    """Bring the named chapters up to date; render the book if none is named."""
    chosen = choose(root, names)
    for chapter in chosen:
        check_parameters(chapter, parameters.get(chapter.name, {}))
    os.environ.update(KERNEL_ENVIRONMENT, DEBLENDER_BUILD=str(build))
    real = root.parent / "shared" / "data" / "cosmos"
    if real.is_dir():  # real galaxies to hold the synthetic ones against
        os.environ.setdefault("COSMOS_DIR", str(real))
    executed = {}
    for i, chapter in enumerate(chosen, start=1):
        label = f"[{i}/{len(chosen)}] {chapter.name}"
        mine = parameters.get(chapter.name, {})
        executed[chapter] = refresh(chapter, mine, build, label)
    if not names:
        stage(root, executed, build / "staged")
        render(root, build)
        print(f"the book is {build / 'site/_build/html/index.html'}")


def parse_arguments(line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("chapters", nargs="*", help="run only these, without rendering")
    add("--params", metavar="NAME", help="a profile: a file of book/params")
    add("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    add("--build", type=Path, default=ROOT / "build", help="where to write")
    return parser.parse_args(line)


def parameters_of(args: argparse.Namespace, root: Path) -> dict[str, dict]:
    """Return the parameters of each chapter: the profile's, then those given singly."""
    parameters = profile(root, args.params) if args.params else {}
    given = {name: yaml.safe_load(value) for name, value in args.p}
    for chapter in choose(root, args.chapters):
        parameters[chapter.name] = {**parameters.get(chapter.name, {}), **given}
    return parameters


def main() -> None:
    args = parse_arguments()
    try:
        parameters = parameters_of(args, ROOT)
        build_book(ROOT, args.build.resolve(), args.chapters, parameters)
    except DeadKernelError:
        sys.exit("error: the kernel died, most often because memory ran out")
    except (ValueError, OSError, RuntimeError, PapermillExecutionError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the chapters that were done are kept")


if __name__ == "__main__":
    main()
