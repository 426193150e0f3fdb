"""Check that the built book holds every figure that the paper's readers look for.

    python tools/check_figures.py

Each label must be a picture on its chapter's page and a PNG and PDF in build/figures.
"""

import sys
from pathlib import Path

from bs4 import BeautifulSoup

from chapters import ROOT

REQUIRED = {
    "01_simulation": ("fig-distributions", "fig-scenes"),  # Fig. 1
    "02_normalisation": ("fig-normalisation",),
    "03_vae_prior": (
        "fig-architecture",  # Fig. 2
        "fig-training-vae",
        "fig-latent",  # Fig. 3
        "fig-generated",
        "fig-ellipticity",  # Fig. 4
        "fig-isolated-errors",  # Fig. 5
        "fig-components",
    ),
    "04_deblender": (
        "fig-deblended",  # Fig. A1
        "fig-blend-errors",  # Fig. 6
        "fig-shear-bias",
        "fig-posterior",  # Fig. C1
    ),
    "05_decentring": ("fig-decentring", "fig-bias-snr"),  # Figs 7 and 8
    "06_transfer_learning": ("fig-transfer-bias", "fig-transfer-images"),  # 9 and B1
    "07_peers_and_limits": (
        "fig-peers-images",
        "fig-peers",
        "fig-peers-bias",
        "fig-peers-failures",
        "fig-limit",
    ),
    "08_side_by_side": ("fig-side-by-side", "fig-learning"),
    "09_speed_and_scale": ("fig-rates", "fig-scaling"),
}


def missing_files(build: Path) -> list[str]:
    """Return the figure files that are absent or empty."""
    labels = [label for group in REQUIRED.values() for label in group]
    paths = [
        build / "figures" / f"{x}.{kind}" for x in labels for kind in ("png", "pdf")
    ]
    return [str(p) for p in paths if not p.is_file() or not p.stat().st_size]


def missing_on_page(page: Path, labels: tuple[str, ...]) -> list[str]:
    """Return the labels that are no figure with an image on a rendered page."""
    if not page.is_file():
        return [str(page)]
    figures = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
    images = {label: figures.select_one(f"figure#{label} img") for label in labels}
    return [
        f"{label} on {page.name}"
        for label, image in images.items()
        if image is None or not (page.parent / image["src"]).is_file()
    ]


def missing(build: Path) -> list[str]:
    """Return a line for each thing that should be in the built book and is not."""
    pages = build / "site" / "_build" / "html" / "book"
    return missing_files(build) + [
        line
        for name, labels in REQUIRED.items()
        for line in missing_on_page(pages / f"{name}.html", labels)
    ]


if __name__ == "__main__":
    if absent := missing(ROOT / "build"):
        sys.exit("missing from the book:\n  " + "\n  ".join(absent))
    print(f"all {sum(map(len, REQUIRED.values()))} figures are in the book")
