"""The numbers by which deblenders are compared, with bootstrap intervals."""

from dataclasses import dataclass

import numpy as np
from astropy.table import Table

from .evaluation import ellipticity_pairs
from .measurement import (
    MIN_SCENES,
    SNR_RANGE,
    bootstrap,
    in_snr_range,
    mean_slope,
    percentiles,
)

SNR_BINS = 10
HARD_BLENDS = (0.75, 0.85)  # B_closest around 80 %
DRAWS = 20  # errors drawn for each galaxy


@dataclass(frozen=True)
class Interval:
    """A number and its 68 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def statistics(table: Table) -> dict[str, float]:
    """Summary of a table of `evaluate`, for targets of SNR 10 to 3000.

    Of each error (`de`, `dr` and `de1`, that of the first component): `median_*`,
    `p16_*`, `p84_*` and half their distance `sigma_*` over the sample; `binned_*`, the
    mean of the absolute median over those of ten logarithmic bins of SNR that hold ten
    galaxies or more, and `binned_p16_*`, `binned_p84_*`; `hard_*`, the absolute median
    for B_closest from 0.75 to 0.85. `slope` is that of output on input ellipticity,
    minus one. NaN where there are too few galaxies.
    """
    return _statistics(_columns(table))


def intervals(table: Table, rng: np.random.Generator) -> dict[str, Interval]:
    """The numbers of `statistics`, each with its bootstrap interval."""
    return {name: _interval(drawn) for name, drawn in _draws(table, rng).items()}


def changes(one: Table, other: Table, rng: np.random.Generator) -> dict[str, Interval]:
    """By how much the numbers of `one` differ from those of `other`, relatively.

    Of absolute values: -0.4 where that of `one` is 40 % smaller. Tables of `evaluate`;
    those of the same targets, in the same order, are bootstrapped together. The order
    of others should be random.
    """
    seed = rng.integers(2**32)  # the same rows of both, if they are as long
    new, old = (_draws(table, np.random.default_rng(seed)) for table in (one, other))
    return {k: _interval(np.abs(new[k]) / np.abs(old[k]) - 1) for k in new}


def _draws(table: Table, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The numbers of `statistics`, first of all rows, then of rows drawn at random."""
    columns = _columns(table)
    drawn = bootstrap(lambda rows: _statistics(columns, rows), len(table), rng)
    drawn.insert(0, _statistics(columns))
    return {name: np.array([each[name] for each in drawn]) for name in drawn[0]}


def _interval(drawn: np.ndarray) -> Interval:
    low, _, high = _percentiles(drawn[1:])
    return Interval(float(drawn[0]), float(low), float(high))


def lengthening(
    table: Table, rng: np.random.Generator, sigma: np.ndarray | None = None
) -> float:
    """What `binned_de` would be if outputs were right on average in e1 and e2.

    Scatter lengthens a vector (where it is round, the length follows a Rice
    distribution): to each input ellipticity comes a normal error along it and another
    across, as wide as those of the outputs in its bin of SNR, half the distance of
    their 16th and 84th percentiles, or, where `sigma` (scene, along/across) is given,
    of that standard deviation, such as a bound of `cramer_rao`. NaN is left out, and
    returned if no bin has ten galaxies. Table of `evaluate`.
    """
    inside = in_snr_range(table["snr"])
    columns = {name: column[inside] for name, column in _columns(table).items()}
    pairs, bins = _own_frame(columns["pairs"]), _snr_bins(columns["snr"])
    if sigma is None:
        widths = _widths(pairs, bins)
    else:
        widths = np.asarray(sigma)[inside]
    finite = np.isfinite(pairs).all(axis=(1, 2)) & np.isfinite(widths).all(axis=1)
    medians = []
    for i in range(1, SNR_BINS + 1):
        chosen = finite & (bins == i)
        if chosen.sum() < MIN_SCENES:
            continue
        e_in = pairs[chosen, 0].repeat(DRAWS, axis=0)  # (draw, component)
        scatter = widths[chosen].repeat(DRAWS, axis=0)
        drawn = e_in + scatter * rng.standard_normal(e_in.shape)
        longer = np.linalg.norm(drawn, axis=1) - np.linalg.norm(e_in, axis=1)
        medians.append(np.median(longer))
    return float(np.abs(medians).mean()) if medians else np.nan


def _own_frame(pairs: np.ndarray) -> np.ndarray:
    """Ellipticities (scene, in/out, component) along and across those of the input."""
    e = pairs @ np.array([1, 1j])
    e = e * np.exp(-1j * np.angle(e[:, :1]))
    return np.stack([e.real, e.imag], axis=-1)


def relative_shear_biases(
    output: dict[tuple[float, float], Table],
    target: dict[tuple[float, float], Table],
    rng: np.random.Generator,
) -> tuple[Interval, Interval]:
    """Shear biases that deblending adds to those of the estimator on target images.

    Tables as of `shear_samples`. Returns m, (1 + m_output) / (1 + m_target) - 1, and c,
    the mean ellipticity of output minus target without shear, both averaged over the
    two components; output and target of a scene are bootstrapped together.
    """
    g = max(max(shear) for shear in target)
    rows = []  # (component, output/target/difference, scene)
    for name, plus in (("e1", (g, 0.0)), ("e2", (0.0, g))):
        minus = (-plus[0], -plus[1])
        both = [np.asarray(t[plus][name] - t[minus][name]) for t in (output, target)]
        rows.append([*both, output[0, 0][name] - target[0, 0][name]])
    rows = np.moveaxis(np.array(rows, dtype=float), -1, 0)
    rows = rows[np.isfinite(rows).all(axis=(1, 2))]  # (scene, component, ...)

    def biases(rows: np.ndarray) -> np.ndarray:
        out, of_target, added = rows.mean(axis=0).T  # (component,) each
        return np.array([(out / of_target).mean() - 1, added.mean()])

    draws = bootstrap(lambda drawn: biases(rows[drawn]), len(rows), rng)
    low, high = np.percentile(draws, [16, 84], axis=0)
    m, c = (Interval(*map(float, i)) for i in zip(biases(rows), low, high, strict=True))
    return m, c


def _columns(table: Table) -> dict[str, np.ndarray]:
    """What the statistics need."""
    names = ("snr", "de", "dr", "b_closest")
    columns = {name: np.asarray(table[name], dtype=float) for name in names}
    columns["de1"] = np.asarray(table["e1_out"] - table["e1_in"], dtype=float)
    pairs = np.stack(ellipticity_pairs(table), axis=1)  # (scene, in/out, component)
    return columns | {"pairs": np.asarray(pairs, dtype=float)}


def _statistics(
    columns: dict[str, np.ndarray], rows: np.ndarray | slice = slice(None)
) -> dict[str, float]:
    """Of those of the rows that are in the range of SNR."""
    columns = {name: column[rows] for name, column in columns.items()}
    inside = in_snr_range(columns["snr"])
    columns = {name: column[inside] for name, column in columns.items()}
    found = {"slope": mean_slope(columns["pairs"])}
    bins = _snr_bins(columns["snr"])
    hard_low, hard_high = HARD_BLENDS
    hard = (columns["b_closest"] >= hard_low) & (columns["b_closest"] < hard_high)
    for name in ("de", "dr", "de1"):
        error = columns[name]
        p16, median, p84 = _percentiles(error)
        found |= {f"p16_{name}": p16, f"median_{name}": median, f"p84_{name}": p84}
        found[f"sigma_{name}"] = (p84 - p16) / 2
        each = [_percentiles(error[bins == i]) for i in range(1, SNR_BINS + 1)]
        each = np.array([e for e in each if np.isfinite(e).all()] or [[np.nan] * 3])
        found[f"binned_{name}"] = np.abs(each[:, 1]).mean()
        found[f"binned_p16_{name}"] = each[:, 0].mean()
        found[f"binned_p84_{name}"] = each[:, 2].mean()
        found[f"hard_{name}"] = abs(_percentiles(error[hard])[1])
    return {k: float(v) for k, v in found.items()}


def _widths(pairs: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """Half the 16-to-84 % range of the errors of each galaxy's bin (scene, component).

    NaN for a bin of too few galaxies.
    """
    widths = np.full(pairs[:, 0].shape, np.nan)
    for i in np.unique(bins):
        inside = bins == i
        errors = (pairs[inside, 1] - pairs[inside, 0]).T  # (component, scene)
        ends = np.array([_percentiles(error) for error in errors])
        widths[inside] = (ends[:, 2] - ends[:, 0]) / 2
    return widths


def _snr_bins(snr: np.ndarray) -> np.ndarray:
    """Number of the logarithmic bin of each galaxy, from 1."""
    return np.digitize(snr, np.geomspace(*SNR_RANGE, SNR_BINS + 1))


def _percentiles(error: np.ndarray) -> np.ndarray:
    """As `percentiles`; NaN for too few."""
    few = np.isfinite(error).sum() < MIN_SCENES
    return np.full(3, np.nan) if few else percentiles(error)
