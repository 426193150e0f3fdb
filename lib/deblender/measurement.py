"""Shapes, magnitudes, signal-to-noise, blendedness, and the errors and biases on them.

Sections 2.2, 4.1, 4.3 and 4.4 of Arcelin et al. 2021. A failed or unphysical
measurement keeps its row: NaN, a flag and a reason. Where a function takes `rng`, it
serves the bootstrap only; without it the same data always give the same error bars.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import galsim
import numpy as np
from astropy.table import Table
from numpy.random import Generator

from .surveys import STAMP_SIZE, Instrument, Survey

PERCENTILES = {"p2.3": 2.3, "p16": 16.0, "median": 50.0, "p84": 84.0, "p97.7": 97.7}
N_BOOTSTRAP = 200
SNR_RANGE = (10.0, 3000.0)  # where the paper calls its medians stable
MIN_SCENES = 10  # fewer give no slope or width worth a bootstrap
NO_FLUX = "non-positive flux"


class Estimate(NamedTuple):
    """A value, its bootstrap error, the number of scenes used and of those left out."""

    value: float
    error: float
    n: int
    failed: int


@cache
def _psf_image(instrument: Instrument) -> tuple[galsim.Image, float]:
    """The PSF seen through the pixel, and its adaptive sigma in pixels."""
    image = instrument.psf.drawImage(
        nx=STAMP_SIZE, ny=STAMP_SIZE, scale=instrument.pixel_scale
    )
    return image, galsim.hsm.FindAdaptiveMom(image).moments_sigma


def in_snr_range(snr: np.ndarray) -> np.ndarray:
    """Which signal-to-noise ratios lie in SNR_RANGE, where targets are compared."""
    low, high = SNR_RANGE
    return (snr >= low) & (snr < high)


def _ksb(stamp: np.ndarray, instrument: Instrument) -> tuple[tuple[float, float], str]:
    failed = (np.nan, np.nan)
    # HSM measures the negative of a galaxy without complaint.
    if not stamp.sum(dtype=float) > 0:
        return failed, NO_FLUX
    psf, sigma = _psf_image(instrument)
    result = galsim.hsm.EstimateShear(
        galsim.Image(np.ascontiguousarray(stamp)),
        psf,
        shear_est="KSB",
        guess_centroid=psf.true_center,
        guess_sig_gal=1.5 * sigma,
        guess_sig_PSF=sigma,
        strict=False,
    )
    e = (result.corrected_g1, result.corrected_g2)
    if result.error_message or result.moments_status or result.correction_status:
        message = result.error_message.strip().removeprefix("Error: ")
        return failed, f"ksb failed: {message or 'no message'}"
    if not np.isfinite(e).all():
        return failed, "ksb failed: NaN ellipticity"
    return (failed, "|e| > 1") if np.hypot(*e) > 1 else (e, "")


def ellipticities(
    stamps: np.ndarray, instrument: Instrument
) -> tuple[np.ndarray, list[str]]:
    """Measure ellipticities with KSB, corrected for the known PSF of the instrument.

    `stamps` (scene, y, x) in electrons. Returns e (scene, component), of modulus
    (a - b) / (a + b), and a reason a scene: empty, or why its row is NaN: "non-positive
    flux", "ksb failed: ..." or "``|e|`` > 1".
    Arcelin et al. 2021, section 4.1; Kaiser, Squires & Broadhurst 1995 (`galsim.hsm`).
    """
    measured = [_ksb(stamp, instrument) for stamp in stamps]
    e = np.array([shape for shape, _ in measured], dtype=float).reshape(-1, 2)
    return e, [reason for _, reason in measured]


def _reason(shape: str, flux: np.ndarray, names: Sequence[str]) -> str:
    """Join what befell the shape with the bands that have no magnitude."""
    dark = [name for name, electrons in zip(names, flux, strict=True) if electrons <= 0]
    reasons = [shape] if shape and shape != NO_FLUX else []
    return "; ".join(reasons + [f"{NO_FLUX}: {', '.join(dark)}"] * bool(dark))


def measure(images: np.ndarray, survey: Survey) -> Table:
    """Measure the shape and the magnitudes of the galaxy in each stamp.

    `images` (scene, y, x, band) in electrons, sky-subtracted. Returns one row a stamp:
    `e1`, `e2`, `e` (KSB, reference band), `mag_<band>` (AB, from the summed flux),
    `flag`, and `reason`, empty where all went well ("; " between several).
    Raises ValueError for a wrong shape or band count and for NaN or infinity.
    Arcelin et al. 2021, section 4.1.
    """
    images = survey.check_images(images)
    reference = images[..., survey.reference_index]  # (scene, y, x)
    e, shape_reasons = ellipticities(reference, survey.reference.instrument)
    flux = images.sum(axis=(1, 2), dtype=float)  # (scene, band)
    reasons = [
        _reason(why, row, survey.band_names)
        for why, row in zip(shape_reasons, flux, strict=True)
    ]
    table = Table({"e1": e[:, 0], "e2": e[:, 1], "e": np.hypot(e[:, 0], e[:, 1])})
    for band, electrons in zip(survey.bands, flux.T, strict=True):
        table[f"mag_{band.name}"] = band.magnitude(electrons)
    table["flag"] = np.array([bool(why) for why in reasons], dtype=bool)
    table["reason"] = np.array(reasons, dtype=str)
    return table


def failure_rate(table: Table) -> dict[str, float]:
    """Fraction of rows of `measure` that are flagged: "any", then by kind of reason.

    A row with two reasons counts under both. NaN for an empty table.
    """
    kinds = [
        {part.split(":")[0] for part in str(reason).split("; ") if part}
        for reason in table["reason"]
    ]
    names = sorted(set().union(*kinds))
    count = {"any": sum(map(bool, kinds))} | {
        name: sum(name in row for row in kinds) for name in names
    }
    return {k: n / len(kinds) if kinds else float("nan") for k, n in count.items()}


def signal_to_noise(image: np.ndarray, sky: float) -> np.ndarray:
    """Signal-to-noise ratio of a noiseless isolated galaxy in one band.

    `image` (..., y, x) and `sky`, the mean background of a pixel, both in electrons.
    Raises ValueError unless signal plus sky, the variance, is positive in every pixel.
    Arcelin et al. 2021, eq. 7.
    """
    image = np.asarray(image, dtype=float)
    variance = image + sky
    if not (variance > 0).all():
        raise ValueError(
            f"the variance, signal plus sky, goes down to {variance.min():.3g} with a "
            f"sky of {sky:.3g} electrons; accepted: positive in every pixel"
        )
    return np.sqrt((image**2 / variance).sum(axis=(-2, -1)))


def inner_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sum over pixels of I times I', images (..., y, x). Arcelin et al. 2021, eq. 2."""
    return (np.asarray(a, dtype=float) * np.asarray(b, dtype=float)).sum(axis=(-2, -1))


def b_closest(centred: np.ndarray, closest: np.ndarray) -> np.ndarray:
    """Blendedness with the closest neighbour, 0 (apart) to 1 (on top of each other).

    Noiseless r-band images (..., y, x) of the target and of its closest neighbour.
    Arcelin et al. 2021, eq. 1.
    """
    norm = inner_product(centred, centred) * inner_product(closest, closest)
    return inner_product(centred, closest) / np.sqrt(norm)


def b_total(centred: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Blendedness with all the neighbours together: 0 if isolated, towards 1 if lost.

    Noiseless r-band images (..., y, x) of the target and of the whole scene.
    Arcelin et al. 2021, eq. 3, after Melchior et al. 2018.
    """
    return 1 - inner_product(centred, centred) / inner_product(centred, total)


def errors(measured: Table, target: Table) -> Table:
    """Errors, output minus target, of two tables of `measure` on the same scenes.

    Columns `de1`, `de2`, `de` (of the modulus), `dr` (AB magnitude; negative: too
    bright), NaN where either side failed.
    Raises ValueError if the tables have different lengths. Arcelin et al. 2021, 4.1.
    """
    if len(measured) != len(target):
        raise ValueError(
            f"{len(measured)} measured and {len(target)} target rows; accepted: as "
            "many of each, of the same scenes"
        )
    columns = {"de1": "e1", "de2": "e2", "de": "e", "dr": "mag_r"}
    return Table({new: measured[old] - target[old] for new, old in columns.items()})


def _measured(values: np.ndarray) -> np.ndarray:
    """What is a number in a column, masked or not."""
    values = np.ma.filled(np.asanyarray(values, dtype=float), np.nan)
    return values[np.isfinite(values)]


def percentiles(values: np.ndarray) -> np.ndarray:
    """The 16th, 50th and 84th of a column of errors; NaN are left out.

    NaN where nothing is left.
    """
    values = _measured(values)
    return np.percentile(values, [16, 50, 84]) if len(values) else np.full(3, np.nan)


def half_width(values: np.ndarray) -> float:
    """Half the distance of the 16th and 84th percentiles: of a normal error, its sigma.

    Section 4.1; NaN are left out, and one value alone has no width but NaN.
    """
    values = _measured(values)
    low, _, high = percentiles(values)
    return float(high - low) / 2 if len(values) > 1 else np.nan


def _bootstrap(
    statistic: Callable, rows: np.ndarray, rng: Generator | None, fewest: int = 1
) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Value and error of a statistic of rows without NaN; rows used and left out."""
    good = rows[np.isfinite(rows).all(axis=tuple(range(1, rows.ndim)))]
    n, failed = len(good), len(rows) - len(good)
    if n < fewest:
        return np.nan, np.nan, n, failed
    rng = np.random.default_rng(0) if rng is None else rng
    draws = bootstrap(lambda rows: statistic(good[rows]), n, rng)
    error = np.std(draws, axis=0, ddof=1) if n > 1 else np.nan
    return statistic(good), error, n, failed


def bootstrap(statistic: Callable, n: int, rng: Generator) -> list:
    """Values of a statistic of row numbers, drawn from `n` rows with replacement."""
    return [statistic(rng.integers(n, size=n)) for _ in range(N_BOOTSTRAP)]


def _bins(x: np.ndarray, edges: np.ndarray) -> tuple[Table, list[np.ndarray]]:
    """A table of the bins, and the rows in each; the last bin holds its right edge."""
    edges = np.asarray(edges, dtype=float)
    if edges.ndim != 1 or len(edges) < 2 or not (np.diff(edges) > 0).all():
        raise ValueError(f"bin edges {edges}; accepted: two or more, increasing")
    index = np.digitize(x, edges) - 1
    index[x == edges[-1]] = len(edges) - 2
    rows = [np.flatnonzero(index == i) for i in range(len(edges) - 1)]
    return Table({"low": edges[:-1], "high": edges[1:]}), rows


def binned(
    x: np.ndarray, y: np.ndarray, edges: np.ndarray, rng: Generator | None = None
) -> Table:
    """Distribution of `y` in bins of `x`, as the boxes of Figs 5-7 show it.

    `x` and `y` (scene,), `edges` (bin + 1,). One row a bin: `low`, `high`, `p2.3`,
    `p16`, `median`, `p84`, `p97.7` (1 and 2 sigma of a Gaussian), `error` of the median
    by bootstrap, `n`, and `failed` (rows where y is NaN).
    Raises ValueError for edges that do not increase. Arcelin et al. 2021, section 4.2.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    table, rows = _bins(x, edges)
    quantiles = np.full((len(rows), len(PERCENTILES)), np.nan)  # (bin, percentile)
    for row, inside in zip(quantiles, rows, strict=True):
        if np.isfinite(y[inside]).any():
            row[:] = np.nanpercentile(y[inside], list(PERCENTILES.values()))
    for name, column in zip(PERCENTILES, quantiles.T, strict=True):
        table[name] = column
    medians = [_bootstrap(np.median, y[inside], rng) for inside in rows]
    _, table["error"], table["n"], table["failed"] = zip(*medians, strict=True)
    return table


def binned_half_width(
    x: np.ndarray, y: np.ndarray, edges: np.ndarray, rng: Generator | None = None
) -> Table:
    """`half_width` of `y` in bins of `x`, (scene,) both, with its bootstrap error.

    One row a bin: `low`, `high`, `half_width`, `error`, `n`, `failed`; NaN for a bin of
    fewer than MIN_SCENES. Raises ValueError for edges that do not increase.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    table, rows = _bins(x, edges)
    widths = [_bootstrap(half_width, y[inside], rng, MIN_SCENES) for inside in rows]
    found = zip(*widths, strict=True)
    table["half_width"], table["error"], table["n"], table["failed"] = found
    return table


def regression(pairs: np.ndarray) -> np.ndarray:
    """Slopes minus one of the two components, their mean, and the two intercepts.

    `pairs` (scene, in/out, component), without NaN.
    """
    mean_in, mean_out = pairs.mean(axis=0)
    d_in, d_out = pairs[:, 0] - mean_in, pairs[:, 1] - mean_out
    alpha = (d_in * d_out).sum(axis=0) / (d_in**2).sum(axis=0) - 1
    return np.array([*alpha, alpha.mean(), *(mean_out - (1 + alpha) * mean_in)])


def ellipticity_bias(
    e_in: np.ndarray, e_out: np.ndarray, rng: Generator | None = None
) -> dict[str, Estimate]:
    """Multiplicative ellipticity bias: slope minus one of output on input ellipticity.

    `e_in` and `e_out` (scene, component). Returns the estimates `alpha1`, `alpha2`,
    their mean `alpha` (bootstrapped together) and the intercepts `c1` and `c2`. Scenes
    with NaN in either ellipticity are left out and counted; under ten, all is NaN.
    Raises ValueError for other shapes. Arcelin et al. 2021, eq. 8 and section 4.4.
    """
    e_in, e_out = np.asarray(e_in, dtype=float), np.asarray(e_out, dtype=float)
    if e_in.shape != e_out.shape or e_in.ndim != 2 or e_in.shape[1] != 2:
        raise ValueError(
            f"ellipticities of shapes {e_in.shape} and {e_out.shape}; accepted: "
            "(scene, 2) for both"
        )
    pairs = np.stack([e_in, e_out], axis=1)  # (scene, in/out, component)
    value, error, n, failed = _bootstrap(regression, pairs, rng, fewest=MIN_SCENES)
    columns = zip(np.broadcast_to(value, 5), np.broadcast_to(error, 5), strict=True)
    names = ("alpha1", "alpha2", "alpha", "c1", "c2")
    return {
        name: Estimate(float(v), float(e), n, failed)
        for name, (v, e) in zip(names, columns, strict=True)
    }


def mean_slope(pairs: np.ndarray) -> float:
    """The value of `alpha` of `ellipticity_bias` alone, without its bootstrap.

    `pairs` (scene, in/out, component); NaN is left out, and returned for under ten.
    """
    good = pairs[np.isfinite(pairs).all(axis=(1, 2))]
    return float(regression(good)[2]) if len(good) >= MIN_SCENES else np.nan


def binned_ellipticity_bias(
    x: np.ndarray,
    e_in: np.ndarray,
    e_out: np.ndarray,
    edges: np.ndarray,
    rng: Generator | None = None,
) -> Table:
    """`alpha` of `ellipticity_bias` in bins of `x` (scene,), as in Figs 8 and 9.

    One row a bin: `low`, `high`, `x` (its median), `alpha`, `error`, `n`, `failed`.
    Raises ValueError for edges that do not increase. Arcelin et al. 2021, section 4.4.
    """
    x, e_in, e_out = (np.asarray(a, dtype=float) for a in (x, e_in, e_out))
    table, rows = _bins(x, edges)
    table["x"] = [np.median(x[inside]) if len(inside) else np.nan for inside in rows]
    fits = [ellipticity_bias(e_in[r], e_out[r], rng)["alpha"] for r in rows]
    found = zip(*fits, strict=True)
    table["alpha"], table["error"], table["n"], table["failed"] = found
    return table


def shear_bias(
    e_plus: np.ndarray,
    e_minus: np.ndarray,
    gamma: float = 0.01,
    rng: Generator | None = None,
) -> Estimate:
    """Multiplicative shear bias m of one component.

    `e_plus` and `e_minus` (scene,): that component, measured in the same scenes with
    the same noise under shears of +gamma and -gamma. Only scenes measured in both
    count, so that shape noise cancels; the others are in `failed`.
    Raises ValueError for different shapes. Arcelin et al. 2021, eq. 9.
    """
    e_plus, e_minus = np.asarray(e_plus, dtype=float), np.asarray(e_minus, dtype=float)
    if e_plus.shape != e_minus.shape or e_plus.ndim != 1:
        raise ValueError(
            f"ellipticities of shapes {e_plus.shape} and {e_minus.shape}; accepted: "
            "(scene,) for both, of the same scenes"
        )
    return Estimate(*_bootstrap(np.mean, (e_plus - e_minus) / (2 * gamma) - 1, rng))


def additive_bias(e_zero: np.ndarray, rng: Generator | None = None) -> Estimate:
    """Additive bias c of one component: its mean (scene,) where no shear was applied.

    It holds the mean of the sample's own ellipticities, hence a scatter of about
    0.3 / sqrt(scenes); the intercepts of `ellipticity_bias` take that out.
    Arcelin et al. 2021, eq. 8 and section 4.3.
    """
    return Estimate(*_bootstrap(np.mean, np.asarray(e_zero, dtype=float), rng))


def shear_biases(
    tables: Mapping[tuple[float, float], Table], rng: Generator | None = None
) -> Table:
    """Shear biases of both components, from the five samples of section 4.3.

    `tables` maps the shears (0, 0), (+g, 0), (-g, 0), (0, +g) and (0, -g) to tables of
    `measure`. Rows: components 1 and 2; columns: `component`, `m`, `m_error`, `c`,
    `c_error`, `n`, `failed` (both of the pair that gives m).
    Raises ValueError for other shears. Arcelin et al. 2021, eqs 8-9.
    """
    g = max((max(shear) for shear in tables), default=0.0)
    if not g or set(tables) != {(0, 0), (g, 0), (-g, 0), (0, g), (0, -g)}:
        raise ValueError(
            f"shears {sorted(tables)}; accepted: (0, 0), (±g, 0) and (0, ±g), all five"
        )
    pairs = {"e1": ((g, 0), (-g, 0)), "e2": ((0, g), (0, -g))}
    rows = []
    for component, (name, (plus, minus)) in enumerate(pairs.items(), start=1):
        m = shear_bias(tables[plus][name], tables[minus][name], g, rng)
        c = additive_bias(tables[0, 0][name], rng)
        rows.append((component, m.value, m.error, c.value, c.error, m.n, m.failed))
    names = ("component", "m", "m_error", "c", "c_error", "n", "failed")
    return Table(rows=rows, names=names)
