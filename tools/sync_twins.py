"""Derive each ``book/NN_name.ipynb`` from the text notebook of the same name.

    python tools/sync_twins.py

One way only: the ``.md`` is the source, and file times do not matter.
"""

import nbformat

from chapters import ROOT, Chapter, chapters


def twin(chapter: Chapter) -> str:
    """Return the text of the notebook, without outputs, that belongs to a chapter."""
    return nbformat.writes(chapter.notebook) + "\n"


if __name__ == "__main__":
    for chapter in chapters(ROOT):
        chapter.twin.write_text(twin(chapter), encoding="utf-8")
