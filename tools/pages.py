"""Parts of the pages that are written by the build, so that they are never stale."""

from pathlib import Path

from nbformat import NotebookNode

from chapters import Chapter, profile

PROFILES = ("quick", "paper")


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


def parameters_page(root: Path, chapters: list[Chapter]) -> str:
    """Return a table of every parameter of each chapter, with its profiles' values."""
    profiles = [profile(root, name) for name in PROFILES]
    header = ["Parameter", "Type", "Published", *PROFILES, "Meaning"]
    parts = []
    for chapter in chapters:
        rows = [
            [
                f"`{name}`",
                found["inferred_type_name"],
                f"`{found['default']}`",
                *(value(p.get(chapter.name, {}), name) for p in profiles),
                found["help"],
            ]
            for name, found in chapter.parameters.items()
        ]
        parts.append(f"### {chapter.title}\n\n{table(header, rows)}")
    return "\n".join(parts)


def value(parameters: dict, name: str) -> str:
    return f"`{parameters[name]}`" if name in parameters else ""


def provenance_page(executed: dict[Chapter, NotebookNode]) -> str:
    """Return a table of what made this copy of the book."""
    rows = []
    for chapter, notebook in executed.items():
        book = notebook.metadata.book
        defaults = {name: p["default"] for name, p in chapter.parameters.items()}
        catalogue = book.parameters.get("catalogue", defaults.get("catalogue", ""))
        changed = ", ".join(f"`{k} = {v}`" for k, v in book.parameters.items())
        rows.append(
            [
                f"[](./{chapter.twin.name})",
                catalogue.strip("\"'"),
                changed or "none",
                f"{book.seconds} s",
            ]
        )
    header = ["Chapter", "Galaxy catalogue", "Parameters changed", "Run time"]
    return table(header, rows)
