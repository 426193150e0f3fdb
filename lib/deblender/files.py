"""Where the files of the library lie, and how one is written whole."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def data_folder(installed: str, in_checkout: str) -> Path:
    """A folder of data, inside the installed package or else in the checkout."""
    package = Path(__file__).parent
    folder = package / installed
    return folder if folder.is_dir() else package.parents[1] / in_checkout


def make_once(folder: Path, make: Callable[[], None]) -> Path:
    """Call `make`, which puts `folder` in place, unless it is there.

    A process that asks for what another is making waits for it.
    """
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():  # no other process was faster
                make()
    return folder


def write_together(folder: Path, contents: dict[str, bytes]) -> None:
    """Write files into a folder, none of them before all are on the disk."""
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as scratch:
        for name, content in contents.items():
            with (Path(scratch) / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # else a crash may leave the name and no bytes
        for name in contents:
            os.replace(Path(scratch) / name, folder / name)


def write_whole(file: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    write_together(file.parent, {file.name: content})
