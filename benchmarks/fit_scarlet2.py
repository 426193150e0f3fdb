"""Fit the blends of chapter 7 with scarlet2: `python benchmarks/fit_scarlet2.py`.

Writes scarlet2-sersic.ecsv and scarlet2-pixels.ecsv into data/results, which the
chapter reads where scarlet2 is not installed. Goes on where it was stopped.
"""

import argparse
import io
import os
from importlib.metadata import version
from pathlib import Path

import numpy as np
from astropy.table import Table, vstack

import deblender
from deblender import peers
from deblender.files import write_whole

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("r_mag", "snr", "b_total", "dr", "dgr", "de", "e1_in", "e2_in", "e1_out")
COLUMNS += ("e2_out", "ssim", "cosine", "seconds")
PIECE = 25  # scenes between two files


def fit(n: int, morphology: str, file: Path) -> None:
    """Fit the first `n` test blends, and keep what is done after every few."""
    settings = peers.FITS[morphology]
    galaxies, survey = deblender.catalogue("synthetic"), deblender.survey("lsst")
    scenes = deblender.simulate(galaxies, survey, n, seed=1)
    done = Table.read(file) if file.is_file() else Table()
    for start in range(len(done), n, PIECE):
        some = scenes.take(np.arange(start, min(start + PIECE, n)))
        table = peers.score(peers.scarlet2(some, **settings), some)[list(COLUMNS)]
        for name in COLUMNS:
            table[name] = np.round(np.asarray(table[name], dtype=float), 5)
        done = vstack([done, table], metadata_conflicts="silent")
        done.meta = {
            "made": f"by scarlet2 {version('scarlet2')} on {os.cpu_count()} cores",
            "scenes": f"synthetic galaxies, LSST, exact centring, seed 1, of {n}",
        }
        content = io.StringIO()
        done.write(content, format="ascii.ecsv")
        write_whole(file, content.getvalue().encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=500, help="blends [%(default)s]")
    parser.add_argument("morphology", nargs="*", help="sersic, pixels, or both")
    args = parser.parse_args()
    for name in args.morphology or peers.FITS:
        fit(args.n, name, ROOT / "data" / "results" / f"scarlet2-{name}.ecsv")
