"""Fit the blends of chapter 7 with scarlet2: `python benchmarks/fit_scarlet2.py`.

Writes a table for each way to describe a galaxy, such as scarlet2-sersic.ecsv, into
data/results, where the chapter reads them if scarlet2 is not installed. Goes on where
it was stopped, and starts anew when the settings have changed.
"""

import argparse
import io
from importlib.metadata import version
from pathlib import Path

import numpy as np
from astropy.table import Table, vstack

import deblender
from deblender import peers
from deblender.files import write_whole
from deblender.on_device import processor

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("r_mag", "snr", "b_total", "dr", "dgr", "de", "e1_in", "e2_in", "e1_out")
COLUMNS += ("e2_out", "ssim", "cosine", "seconds")
PIECE = 25  # scenes between two files


def about(morphology: str, n: int) -> dict[str, str]:
    """How the fits of a morphology are made, and of which scenes."""
    packages = ["scarlet2", "galaxygrad"] if morphology == "prior" else ["scarlet2"]
    made = ", ".join(f"{name} {version(name)}" for name in packages)
    return {
        "made": f"by {made} on {processor()}",
        "scenes": f"synthetic galaxies, LSST, exact centring, seed 1, of {n}",
        "settings": peers.settings(morphology),
    }


def fit(n: int, morphology: str, file: Path) -> None:
    """Fit the first `n` test blends, and keep what is done after every few."""
    galaxies, survey = deblender.catalogue("synthetic"), deblender.survey("lsst")
    scenes = deblender.simulate(galaxies, survey, n, seed=1)
    meta = about(morphology, n)
    done = Table.read(file) if file.is_file() else Table()
    if done.meta.get("settings") != meta["settings"]:
        done = Table()
    for start in range(len(done), n, PIECE):
        some = scenes.take(np.arange(start, min(start + PIECE, n)))
        answer = peers.scarlet2(some, morphology, **peers.FITS[morphology])
        table = peers.score(answer, some)[list(COLUMNS)]
        for name in COLUMNS:
            table[name] = np.round(np.asarray(table[name], dtype=float), 5)
        done = vstack([done, table], metadata_conflicts="silent")
        done.meta = meta
        content = io.StringIO()
        done.write(content, format="ascii.ecsv")
        write_whole(file, content.getvalue().encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=500, help="blends [%(default)s]")
    parser.add_argument("morphology", nargs="*", help=f"{', '.join(peers.FITS)} [all]")
    args = parser.parse_args()
    if unknown := set(args.morphology) - set(peers.FITS):
        parser.error(f"received {unknown}; accepted: {', '.join(peers.FITS)}")
    for name in args.morphology or peers.FITS:
        fit(args.n, name, ROOT / "data" / "results" / f"scarlet2-{name}.ecsv")
