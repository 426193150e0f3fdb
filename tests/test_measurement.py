"""Measurements against closed forms, NumPy and GalSim."""

from types import SimpleNamespace

import galsim
import numpy as np
import pytest
from astropy.table import Table
from scipy.stats import norm

from deblender import measurement as m
from deblender.surveys import STAMP_SIZE, survey

LSST = survey("lsst")
PIXEL = LSST.reference.instrument.pixel_scale
R = LSST.index("r")


def draw(profile: galsim.GSObject, flux: float = 1e6) -> np.ndarray:
    seen = galsim.Convolve(profile, LSST.reference.instrument.psf).withFlux(flux)
    return seen.drawImage(nx=STAMP_SIZE, ny=STAMP_SIZE, scale=PIXEL).array


def gaussian(x: float = 0.0, y: float = 0.0, sigma: float = 3.0, flux: float = 1.0):
    """A Gaussian sampled at pixel centres, in pixels."""
    axis = np.arange(STAMP_SIZE) - (STAMP_SIZE - 1) / 2
    r2 = (axis - x) ** 2 + (axis[:, None] - y) ** 2
    return flux / (2 * np.pi * sigma**2) * np.exp(-r2 / (2 * sigma**2))


def images(stamp: np.ndarray) -> np.ndarray:
    """One scene with the same stamp in every band."""
    return np.repeat(stamp[None, :, :, None], len(LSST.bands), axis=-1)


def table(e1, e2=0.0) -> Table:
    e1 = np.atleast_1d(np.asarray(e1, dtype=float))
    return Table({"e1": e1, "e2": np.broadcast_to(float(e2), e1.shape)})


@pytest.mark.parametrize("profile", [galsim.Gaussian, galsim.Exponential])
@pytest.mark.parametrize("shear", [(0.02, 0.0), (0.0, -0.02), (0.02, 0.03), (0, 0)])
def test_ksb_recovers_a_known_shear(profile, shear):
    galaxy = profile(half_light_radius=0.5).shear(g1=shear[0], g2=shear[1])
    row = m.measure(images(draw(galaxy)), LSST)[0]
    assert row["reason"] == "" and not row["flag"]
    assert row["e1"] == pytest.approx(shear[0], abs=2e-3)
    assert row["e2"] == pytest.approx(shear[1], abs=2e-3)
    assert row["e"] == pytest.approx(np.hypot(row["e1"], row["e2"]))


def test_ksb_does_not_see_brightness_or_a_whole_pixel_shift():
    stamp = draw(galsim.Exponential(half_light_radius=0.4).shear(g1=0.3, g2=-0.1))
    stamps = np.stack([stamp, 1e-3 * stamp, np.roll(stamp, (2, -1), axis=(0, 1))])
    e, reasons = m.ellipticities(stamps, LSST.reference.instrument)
    assert reasons == ["", "", ""]
    np.testing.assert_allclose(e, e[[0, 0, 0]], atol=1e-4)


def test_ksb_turns_with_the_galaxy():
    stamp = draw(galsim.Exponential(half_light_radius=0.4).shear(g1=0.2, g2=0.1))
    e, _ = m.ellipticities(np.stack([stamp, np.rot90(stamp)]), LSST.bands[0].instrument)
    np.testing.assert_allclose(e[1], -e[0], atol=1e-5)


def test_magnitudes_come_from_the_summed_flux():
    flux = np.array([10.0, 1e3, 1e5, 1e4, 2e4, 3e3])  # electrons
    row = m.measure(images(gaussian()) * flux, LSST)[0]
    for band, electrons in zip(LSST.bands, flux, strict=True):
        expected = band.zero_point - 2.5 * np.log10(electrons / band.exposure)
        assert row[f"mag_{band.name}"] == pytest.approx(expected, abs=1e-5)


def failing() -> tuple[np.ndarray, list[str]]:
    """Five scenes, the first of them sound, and how their reasons begin."""
    galaxy = draw(galsim.Exponential(half_light_radius=0.5))
    point = LSST.reference.instrument.psf.drawImage(nx=64, ny=64, scale=1.5 * PIXEL)
    noise = np.random.default_rng(3).normal(10, 100, galaxy.shape)
    faint = images(galaxy)
    faint[..., 0] *= -1
    stamps = [images(s) for s in (galaxy, -galaxy, point.array, noise)] + [faint]
    beginnings = ["", "non-positive flux: u, g, r", "ksb failed", "ksb failed"]
    return np.concatenate(stamps), [*beginnings, "non-positive flux: u"]


def test_failures_are_flagged_counted_and_explained():
    scenes, beginnings = failing()
    measured = m.measure(scenes, LSST)
    assert len(measured) == 5
    for row, beginning in zip(measured, beginnings, strict=True):
        assert row["reason"].startswith(beginning)
        assert row["flag"] == bool(beginning)
    assert measured["reason"][2].endswith("convolved with PSF is smaller than PSF!")
    assert np.isnan(measured["e1"][1:4]).all() and np.isnan(measured["e"][1:4]).all()
    assert np.isfinite(measured["e1"][[0, 4]]).all()
    assert np.isnan(measured["mag_u"][4]) and np.isfinite(measured["mag_r"][4])
    rates = m.failure_rate(measured)
    assert rates == {"any": 0.8, "ksb failed": 0.4, "non-positive flux": 0.4}


def test_an_ellipticity_beyond_one_is_flagged(monkeypatch):
    beyond = SimpleNamespace(corrected_g1=0.9, corrected_g2=0.8, error_message="")
    beyond.moments_status = beyond.correction_status = 0
    monkeypatch.setattr(galsim.hsm, "EstimateShear", lambda *a, **k: beyond)
    e, reasons = m.ellipticities(gaussian()[None], LSST.reference.instrument)
    assert reasons == ["|e| > 1"] and np.isnan(e).all()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (np.full((2, 64, 64, 6), np.nan), "NaN"),
        (np.zeros((2, 64, 64, 10)), r"\(2, 64, 64, 10\).*lsst.*\(scene, 64, 64, 6\)"),
        (np.zeros((64, 64, 6)), r"\(64, 64, 6\).*\(scene, 64, 64, 6\)"),
    ],
)
def test_bad_images_are_refused(bad, said):
    with pytest.raises(ValueError, match=said):
        m.measure(bad, LSST)


def test_no_image_gives_an_empty_table():
    measured = m.measure(np.zeros((0, *LSST.shape)), LSST)
    assert len(measured) == 0 and "mag_y" in measured.colnames
    assert np.isnan(m.failure_rate(measured)["any"])


def test_signal_to_noise_of_a_gaussian_under_the_sky():
    """Sum of I^2 is F^2 / (4 pi sigma^2) when sky dominates."""
    flux, sigma, sky = 1e3, 3.0, 1e6
    stamps = np.stack([gaussian(flux=flux, sigma=sigma), gaussian(flux=2 * flux)])
    expected = flux / (2 * np.sqrt(np.pi) * sigma * np.sqrt(sky))
    np.testing.assert_allclose(
        m.signal_to_noise(stamps, sky), [expected, 2 * expected], rtol=1e-4
    )


def test_signal_to_noise_without_sky_is_the_root_of_the_flux():
    assert m.signal_to_noise(gaussian(flux=1e4), 0.0) == pytest.approx(100, rel=1e-6)
    with pytest.raises(ValueError, match="positive in every pixel"):
        m.signal_to_noise(-gaussian(flux=1e4), 0.0)


@pytest.mark.parametrize("distance", [0.0, 2.0, 5.0, 10.0])
@pytest.mark.parametrize("flux", [1.0, 0.3])
def test_blendedness_of_two_gaussians(distance, flux):
    """The product of two Gaussians a distance d apart sums to exp(-d^2 / 4 sigma^2)."""
    sigma = 3.0
    target, other = gaussian(sigma=sigma), gaussian(x=distance, flux=flux, sigma=sigma)
    overlap = np.exp(-(distance**2) / (4 * sigma**2))
    assert m.b_closest(target, other) == pytest.approx(overlap, abs=1e-6)
    expected = flux * overlap / (1 + flux * overlap)
    assert m.b_total(target, target + other) == pytest.approx(expected, abs=1e-6)
    assert m.b_total(target, target) == pytest.approx(0, abs=1e-12)


def test_blendedness_works_on_many_scenes_at_once():
    target = np.stack([gaussian()] * 3)
    other = np.stack([gaussian(x=d) for d in (0, 3, 6)])
    overlap = np.exp(-(np.array([0, 3, 6]) ** 2) / (4 * 3.0**2))
    np.testing.assert_allclose(m.b_closest(target, other), overlap, atol=1e-6)
    total = m.b_total(target, target + other)
    np.testing.assert_allclose(total, overlap / (1 + overlap), atol=1e-6)


def test_errors_are_output_minus_target():
    target = m.measure(failing()[0], LSST)
    measured = target.copy()
    measured["e1"] += 0.01
    measured["mag_r"] -= 0.05
    table = m.errors(measured, target)
    for name in ("de1", "de2", "de"):
        good = np.isfinite(table[name]).tolist()
        assert good == [True, False, False, False, True]
    assert table["de1"][0] == pytest.approx(0.01) and table["de2"][0] == 0
    assert table["dr"][0] == pytest.approx(-0.05) and np.isnan(table["de"][1])
    with pytest.raises(ValueError, match="4 measured and 5 target"):
        m.errors(measured[:4], target)


def test_half_width_of_normal_errors_is_their_sigma():
    values = np.random.default_rng(1).normal(3, 0.2, 20_000)
    values[::3] = np.nan
    assert m.half_width(values) == pytest.approx(0.2, rel=0.03)
    assert np.isnan(m.half_width(values[:2]))  # one of them measured
    assert m.percentiles(values)[1] == pytest.approx(3, abs=0.01)
    assert np.isnan(m.percentiles(np.array([np.nan]))).all()


def test_bins_agree_with_numpy():
    rng = np.random.default_rng(5)
    x, y = rng.uniform(0, 3, 3000), rng.normal(size=3000)
    y[:30], x[0], x[1] = np.nan, 3.0, np.nan
    bins = m.binned(x, y, [0, 1, 2, 3])
    inside = (x >= 2) & np.isfinite(y)
    expected = np.percentile(y[inside], [2.3, 16, 50, 84, 97.7])
    np.testing.assert_allclose([bins[p][2] for p in m.PERCENTILES], expected)
    assert bins["n"].sum() == 2970 and bins["failed"].sum() == 29
    # Standard error of the median of a Gaussian: sigma * sqrt(pi / 2n).
    np.testing.assert_allclose(bins["error"], np.sqrt(np.pi / 2 / bins["n"]), rtol=0.3)


def test_half_widths_in_bins_and_their_errors_are_those_of_a_gaussian():
    rng = np.random.default_rng(6)
    x, y = rng.uniform(0, 2, 4000), rng.normal(0, 0.3, 4000)
    y[:40] = np.nan
    bins = m.binned_half_width(x, y, [0, 0.001, 1, 2])
    assert bins["n"].sum() == 3960 and bins["failed"].sum() == 40
    assert np.isnan(bins["half_width"][0]) and np.isnan(bins["error"][0])  # too few
    np.testing.assert_allclose(bins["half_width"][1:], 0.3, rtol=0.06)
    # Covariance of quantiles p < q: p (1 - q) / (n pdf(p) pdf(q)); here 16 and 84 %.
    p, pdf = 0.16, norm.pdf(norm.ppf(0.16)) / 0.3
    expected = np.sqrt((p * (1 - p) - p**2) / 2 / bins["n"][1:]) / pdf
    np.testing.assert_allclose(bins["error"][1:], expected, rtol=0.25)


def test_empty_and_single_bins_are_kept():
    bins = m.binned([0.5, 1.5, 1.6], [7.0, 1.0, np.nan], [0, 1, 2, 3])
    assert bins["n"].tolist() == [1, 1, 0] and bins["failed"].tolist() == [0, 1, 0]
    assert bins["median"][0] == 7 and np.isnan(bins["error"]).all()
    with pytest.raises(ValueError, match="increasing"):
        m.binned([1.0], [1.0], [2, 1])


def test_ellipticity_bias_of_a_line_is_exact():
    e_in = np.random.default_rng(1).normal(0, 0.3, (500, 2))
    e_out = e_in * [0.9, 1.02] + [0.01, -0.02]
    bias = m.ellipticity_bias(e_in, e_out)
    found = [bias[k].value for k in ("alpha1", "alpha2", "alpha", "c1", "c2")]
    np.testing.assert_allclose(found, [-0.1, 0.02, -0.04, 0.01, -0.02], atol=1e-12)
    assert all(estimate.error < 1e-12 for estimate in bias.values())


def test_ellipticity_bias_error_and_failures():
    """The standard error of a slope is sigma / (spread * sqrt(n))."""
    rng = np.random.default_rng(2)
    e_in = rng.normal(0, 0.3, (2000, 2))
    e_out = e_in + rng.normal(0, 0.1, e_in.shape)
    e_out[:7, 0] = np.nan
    bias = m.ellipticity_bias(e_in, e_out, rng)
    expected = 0.1 / 0.3 / np.sqrt(1993)
    assert (bias["alpha"].n, bias["alpha"].failed) == (1993, 7)
    assert bias["alpha1"].error == pytest.approx(expected, rel=0.25)
    assert bias["alpha"].error == pytest.approx(expected / np.sqrt(2), rel=0.25)
    assert abs(bias["alpha"].value) < 4 * bias["alpha"].error
    assert np.isnan(m.ellipticity_bias(e_in[:9], e_out[:9])["alpha"].value)
    with pytest.raises(ValueError, match=r"\(scene, 2\)"):
        m.ellipticity_bias(e_in[:, 0], e_out[:, 0])


def test_ellipticity_bias_in_bins():
    rng = np.random.default_rng(4)
    x = rng.uniform(0, 2, 1000)
    e_in = rng.normal(0, 0.3, (1000, 2))
    e_out = np.where(x[:, None] < 1, 0.8, 1.0) * e_in
    bins = m.binned_ellipticity_bias(x, e_in, e_out, [0, 1, 2, 3])
    np.testing.assert_allclose(bins["alpha"], [-0.2, 0, np.nan], atol=1e-12)
    assert bins["n"].sum() == 1000 and bins["x"][0] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("true_m", [0.0, -0.04])
def test_shear_bias_is_exact_without_noise(true_m):
    """Shape noise cancels in the pairs: m is right to rounding from ten galaxies."""
    e = np.random.default_rng(6).normal(0, 0.3, 10)
    shift = (1 + true_m) * 0.01
    bias = m.shear_bias(e + shift, e - shift)
    assert bias.value == pytest.approx(true_m, abs=1e-6) and bias.error < 1e-6


def test_shear_bias_with_noise_is_zero_within_its_error():
    rng = np.random.default_rng(7)
    e = rng.normal(0, 0.3, 5000)
    noise = rng.normal(0, 0.003, (2, e.size))
    plus, minus = e + 0.01 + noise[0], e - 0.01 + noise[1]
    plus[:10], minus[5:20] = np.nan, np.nan
    bias = m.shear_bias(plus, minus, rng=rng)
    assert (bias.n, bias.failed) == (4980, 20)
    expected = 0.003 * np.sqrt(2) / 0.02 / np.sqrt(4980)
    assert bias.error == pytest.approx(expected, rel=0.25)
    assert abs(bias.value) < 4 * bias.error
    with pytest.raises(ValueError, match="same scenes"):
        m.shear_bias(plus, minus[:-1])


def test_shear_bias_of_ksb_on_round_galaxies():
    """Simulated and measured: the response of KSB itself, right to a few per cent."""
    galaxy = galsim.Exponential(half_light_radius=0.6)
    stamps = np.stack([draw(galaxy.shear(g1=g, g2=0)) for g in (0.01, -0.01)])
    e, _ = m.ellipticities(stamps, LSST.reference.instrument)
    assert abs(m.shear_bias(e[:1, 0], e[1:, 0]).value) < 0.05


def test_shear_biases_from_five_samples():
    e = np.random.default_rng(8).normal(0, 0.3, 400)
    shears = [(0, 0), (0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01)]
    tables = {s: table(e + 0.95 * s[0], 1.02 * s[1]) for s in shears}
    biases = m.shear_biases(tables)
    np.testing.assert_allclose(biases["m"], [-0.05, 0.02], atol=1e-9)
    assert biases["c"].tolist() == [pytest.approx(e.mean()), 0.0]
    assert biases["c_error"][0] == pytest.approx(0.3 / 20, rel=0.25)
    with pytest.raises(ValueError, match="accepted"):
        m.shear_biases({s: tables[s] for s in shears[:4]})


def test_same_generator_same_bootstrap():
    e = np.random.default_rng(9).normal(0, 0.3, (100, 2))
    out = e + 0.1 * e[::-1]
    first, again, other = (
        m.ellipticity_bias(e, out, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert first == again and first["alpha"].error != other["alpha"].error
    assert m.shear_bias(e[:, 0], e[:, 1]) == m.shear_bias(e[:, 0], e[:, 1])
    a, b = (m.binned(e[:, 0], out[:, 0], [-1, 0, 1]) for _ in range(2))
    assert a["error"].tolist() == b["error"].tolist()
