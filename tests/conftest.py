import os
from pathlib import Path

import pytest

import deblender
from chapters import KERNEL_ENVIRONMENT, ROOT

for name, value in KERNEL_ENVIRONMENT.items():
    os.environ.setdefault(name, value)


@pytest.fixture(scope="session")
def synthetic():
    """The synthetic catalogue, drawn once and kept in the user's cache."""
    return deblender.catalogue("synthetic")


@pytest.fixture(scope="session")
def cosmos_folder() -> Path:
    """Folder of real COSMOS files, of which no copy is kept here."""
    folder = Path(os.environ.get("COSMOS_DIR", ROOT / "../shared/data/cosmos"))
    if not folder.is_dir():
        pytest.skip(f"no real COSMOS files in {folder}: set COSMOS_DIR")
    return folder.resolve()
