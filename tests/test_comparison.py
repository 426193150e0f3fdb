"""The numbers of the comparison, on samples whose answers are known."""

import numpy as np
import pytest
from astropy.table import Table

from deblender.comparison import (
    SNR_BINS,
    Interval,
    changes,
    intervals,
    lengthening,
    relative_shear_biases,
    statistics,
)

SLOPE, OFFSET, SCATTER = -0.3, 0.02, 0.1


@pytest.fixture(scope="module")
def table():
    """Errors of known median and spread, ellipticities of known slope."""
    rng = np.random.default_rng(1)
    n = 20_000
    e_in = rng.normal(0, 0.2, (2, n))
    e_out = (1 + SLOPE) * e_in
    names = {"e1_in": e_in[0], "e2_in": e_in[1], "e1_out": e_out[0], "e2_out": e_out[1]}
    table = Table(names)
    table["snr"] = np.exp(rng.uniform(np.log(5), np.log(5000), n))
    table["de"] = rng.normal(OFFSET, SCATTER, n)
    table["dr"] = rng.normal(-2 * OFFSET, SCATTER, n)
    table["b_closest"] = rng.uniform(0, 1, n)
    return table


def test_known_numbers_come_back(table):
    found = statistics(table)
    assert found["slope"] == pytest.approx(SLOPE, abs=1e-9)
    assert found["median_de"] == pytest.approx(OFFSET, abs=5e-3)
    assert found["sigma_de"] == pytest.approx(SCATTER, rel=0.03)
    assert found["binned_dr"] == pytest.approx(2 * OFFSET, abs=5e-3)
    assert found["binned_p84_dr"] == pytest.approx(SCATTER - 2 * OFFSET, abs=5e-3)
    assert found["hard_dr"] == pytest.approx(2 * OFFSET, abs=1e-2)
    assert found["sigma_de1"] == pytest.approx(-SLOPE * 0.2, rel=0.03)


def test_galaxies_outside_the_range_do_not_count(table):
    outside = (table["snr"] < 10) | (table["snr"] >= 3000)
    spoilt = table.copy()
    spoilt["dr"][outside] = 9.0
    assert statistics(spoilt) == statistics(table)


def test_bins_weigh_the_same_however_many_galaxies_they_have(table):
    rng = np.random.default_rng(2)
    few = rng.random(len(table)) < np.where(table["snr"] > 300, 0.02, 1)
    skewed = table[few]
    skewed["dr"] = np.where(skewed["snr"] > 173.2, 1.0, 0.0)  # half of the bins
    assert statistics(skewed)["binned_dr"] == pytest.approx(0.5, abs=0.5 / SNR_BINS)
    assert statistics(skewed)["median_dr"] == 0


def test_failed_measurements_are_left_out_and_few_give_nan(table):
    failed = table[:3000].copy()
    failed["de"][::2] = np.nan
    assert np.isfinite(statistics(failed)["median_de"])
    assert np.isnan(statistics(table[:5])["median_de"])


def test_scatter_lengthens_round_galaxies_as_rayleigh_says(table):
    rng, noisy = np.random.default_rng(4), table.copy()
    for component in ("e1", "e2"):
        noisy[f"{component}_in"] = 0.0
        noisy[f"{component}_out"] = rng.normal(0, SCATTER, len(table))
    expected = SCATTER * np.sqrt(2 * np.log(2))  # median of a Rayleigh distribution
    assert lengthening(noisy, rng) == pytest.approx(expected, rel=0.03)
    # Errors that are given take the place of those of the outputs, also twice as wide.
    twice = np.full((len(noisy), 2), 2 * SCATTER)
    assert lengthening(noisy, rng, twice) == pytest.approx(2 * expected, rel=0.03)
    twice[::2] = np.nan
    assert lengthening(noisy, rng, twice) == pytest.approx(2 * expected, rel=0.03)


def test_only_scatter_across_lengthens_an_elongated_galaxy(table):
    """By sigma^2 / 2 e where sigma is small, whichever way the galaxy points."""
    rng, sigma = np.random.default_rng(6), 0.05
    angle = rng.uniform(0, 2 * np.pi, len(table))
    long = table.copy()
    long["e1_in"], long["e2_in"] = 0.5 * np.cos(angle), 0.5 * np.sin(angle)
    across = rng.normal(0, sigma, len(table)) * [-np.sin(angle), np.cos(angle)]
    long["e1_out"], long["e2_out"] = long["e1_in"], long["e2_in"]
    for component, error in zip(("e1_out", "e2_out"), across, strict=True):
        long[component] += error
    # Half a chi-squared variable of one degree of freedom, its median.
    expected = 0.455 * sigma**2 / (2 * 0.5)
    assert lengthening(long, rng) == pytest.approx(expected, rel=0.05)
    along, across = (
        np.tile([sigma, 0.0], (len(long), 1)),
        np.tile([0.0, sigma], (len(long), 1)),
    )
    assert lengthening(long, rng, across) == pytest.approx(expected, rel=0.05)
    assert lengthening(long, rng, along) < expected / 3


def test_too_few_galaxies_have_no_lengthening(table):
    assert np.isnan(lengthening(table[:5], np.random.default_rng(7)))


def test_no_scatter_lengthens_nothing_whatever_the_error_of_all_lengths(table):
    shifted = table.copy()
    length = np.hypot(shifted["e1_in"], shifted["e2_in"])
    for component in ("e1", "e2"):
        shifted[f"{component}_out"] = shifted[f"{component}_in"] * (1 - OFFSET / length)
    found = lengthening(shifted, np.random.default_rng(5))
    assert found == pytest.approx(0, abs=1e-12)


def test_interval_of_a_median_has_the_error_of_a_median(table):
    found = intervals(table[:2000], np.random.default_rng(3))["median_de"]
    n = ((table["snr"][:2000] >= 10) & (table["snr"][:2000] < 3000)).sum()
    expected = SCATTER * np.sqrt(np.pi / 2 / n)
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.4)
    assert found.low <= found.value <= found.high
    assert f"{Interval(1, 0.5, 2):.1f}" == "1.0 [0.5, 2.0]"


def test_changes_are_those_of_the_same_targets(table):
    """Errors that all shrink alike leave no doubt of the change, however few."""
    other, rng = table[:500], np.random.default_rng(8)
    one = other.copy()
    one["de"] *= -0.6
    found = changes(one, other, rng)
    for name in ("median_de", "binned_de", "hard_de"):
        change = found[name]
        assert (change.low, change.value, change.high) == pytest.approx((-0.4,) * 3)
    assert found["slope"].value == found["sigma_dr"].value == 0
    one["dr"] = rng.permutation(one["dr"])  # as if of other targets
    shuffled = changes(one, other, rng)["sigma_dr"]
    assert shuffled.high - shuffled.low > 0.03
    fewer = changes(one[:300], other, rng)["median_de"]  # of some of them
    assert fewer.low < -0.4 < fewer.high


def test_shear_biases_added_to_those_of_the_target_come_back():
    rng, g = np.random.default_rng(5), 0.01
    shapes = rng.normal(0, 0.3, (2, 400))
    noise = rng.normal(0, 1e-3, (2, 400))
    target, output = {}, {}
    for shear in [(0, 0), (g, 0), (-g, 0), (0, g), (0, -g)]:
        e = shapes + 1.05 * np.array(shear)[:, None]
        target[shear] = Table({"e1": e[0], "e2": e[1]})
        out = shapes + 1.05 * 0.9 * np.array(shear)[:, None] + noise + 0.002
        output[shear] = Table({"e1": out[0], "e2": out[1]})
    output[0, 0]["e1"][:5] = np.nan
    m, c = relative_shear_biases(output, target, rng)
    assert m.value == pytest.approx(-0.1, abs=1e-6)
    assert c.value == pytest.approx(0.002, abs=2e-4)
    assert c.low < c.value < c.high
