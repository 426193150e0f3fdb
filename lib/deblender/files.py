"""Where the files of the library lie, and how one is written whole."""

import os
import tempfile
from pathlib import Path


def data_folder(installed: str, in_checkout: str) -> Path:
    """A folder of data, inside the installed package or else in the checkout."""
    package = Path(__file__).parent
    folder = package / installed
    return folder if folder.is_dir() else package.parents[1] / in_checkout


def write_whole(file: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as scratch:
        scratch.write(content)
    try:
        os.chmod(scratch.name, 0o644)
        os.replace(scratch.name, file)
    except OSError:
        os.unlink(scratch.name)
        raise
