"""The Cramer-Rao bound against closed forms and a fit."""

from types import SimpleNamespace

import galsim
import numpy as np
import pytest

import deblender
from deblender import limit
from deblender.limit import MAGNITUDES, cramer_rao


@pytest.fixture(scope="module")
def blends(synthetic):
    return deblender.simulate(synthetic, deblender.survey("lsst"), 12, seed=21)


@pytest.fixture(scope="module")
def bound(blends, synthetic):
    return cramer_rao(blends, synthetic)


def test_images_are_those_of_the_scenes(blends, synthetic):
    """The layout is read back right: flux times image is what was composed."""
    i = int(np.argmax(blends.counts))
    drawn = limit._differentiate(blends, synthetic, i)
    r = blends.survey.index("r")
    whole = sum(galaxy.image[0] * galaxy.flux[r] for galaxy in drawn)
    difference = np.abs(whole - blends.blend[i, ..., r]).max()
    assert difference < 1e-3 * blends.blend[i, ..., r].max()


def test_gradients_are_those_of_a_gaussian():
    """Of a round Gaussian much wider than the PSF, derivatives have closed forms."""
    sigma, scale = 2.0, 0.2
    profile = galsim.Gaussian(sigma=sigma)
    instrument = deblender.survey("lsst").bands[0].instrument
    (images,) = limit.draw(limit._varied(profile, 0.0, 0.0), [instrument])
    images = images.astype(float)
    slopes = (images[::2] - images[1::2]) / (2 * limit.STEPS[:, None, None])
    grid = (np.arange(64) - 31.5) * scale  # arcsec
    x, y = np.meshgrid(grid, grid)
    seen = galsim.Convolve(profile, instrument.psf)
    light = seen.drawImage(nx=64, ny=64, scale=scale, dtype=float).array
    expected = [x, y, (x**2 + y**2) / sigma**2 - 2, (x**2 - y**2) / sigma**2, None]
    expected[0], expected[1] = x / sigma**2, y / sigma**2
    expected[4] = 2 * x * y / sigma**2
    for slope, factor in zip(slopes, expected, strict=True):
        # The PSF is 2 % of the variance of the image.
        np.testing.assert_allclose(
            slope, factor * light, atol=0.1 * np.abs(slope).max()
        )


def test_flux_alone_is_the_signal_to_noise_ratio(blends, synthetic):
    """Were r flux the only parameter, its relative error would be one over eq. 7."""
    drawn = limit._differentiate(blends, synthetic, 0)[:1]
    r = blends.survey.index("r")
    fisher = limit._information(drawn, blends.survey)
    assert fisher[r, r] ** -0.5 == pytest.approx(1 / blends.truth["snr"][0], rel=0.01)


def test_neighbours_only_take_information_and_places_give_some_back(bound, blends):
    lonely = np.asarray(blends.counts == 1)
    for name in ("sigma_r", "sigma_e", "sigma_across"):
        kinds = ("", "_centred", "_placed", "_alone")
        told = np.array([bound[name + kind] for kind in kinds])  # (kind, scene)
        assert (told[:2] >= told[1:3] * (1 - 1e-6)).all()
        assert (told[0] >= told[3] * (1 - 1e-6)).all()
        np.testing.assert_allclose(told[0][lonely], told[3][lonely])
        np.testing.assert_allclose(told[1][lonely], told[2][lonely])
        assert (told[0] > 1.05 * told[3]).any()
        for k in range(3):
            assert (told[k] > 1.02 * told[k + 1]).any()
    assert (bound["sigma_r_alone"] >= 0.99 * MAGNITUDES / blends.truth["snr"]).all()


def test_a_known_place_is_one_measured_with_no_error(blends, synthetic):
    """Fisher matrices add up: a perfect measurement of x and y is a large term."""
    i = int(np.argmax(blends.counts))
    survey, n_bands = blends.survey, len(blends.survey.bands)
    fisher = limit._information(limit._differentiate(blends, synthetic, i), survey)
    width = n_bands + len(limit.STEPS)
    for n_placed in (1, 2):
        perfect = fisher.copy()
        for galaxy in range(n_placed):
            for k in (n_bands, n_bands + 1):
                perfect[galaxy * width + k, galaxy * width + k] += 1e12
        e = np.array([0.1, 0.2])
        found = limit._errors(fisher, survey, e, n_placed)
        np.testing.assert_allclose(found, limit._errors(perfect, survey, e), rtol=1e-4)
        assert found[0] < limit._errors(fisher, survey, e)[0]


@pytest.mark.parametrize(("e", "order"), [((0.6, 0), (3, 4)), ((0, -0.6), (4, 3))])
def test_ellipticity_errs_along_itself_and_across(e, order):
    survey = deblender.survey("lsst")
    widths = np.ones(len(survey.bands) + len(limit.STEPS))
    widths[len(survey.bands) :][limit.SHEAR] = 0.3, 0.4
    expected = np.array([0.64, 1.36]) * order / 10
    found = limit._errors(np.diag(widths**-2), survey, np.array(e, dtype=float))
    np.testing.assert_allclose(found[1:], expected)


def test_other_galaxies_are_refused(blends, synthetic):
    def fewer(survey: deblender.surveys.Survey) -> np.ndarray:
        return synthetic.magnitudes(survey)[1:1000]

    others = SimpleNamespace(name="others", magnitudes=fewer)
    with pytest.raises(ValueError, match="accepted: the one they were drawn of"):
        cramer_rao(blends, others)


def test_a_fit_reaches_the_bound(blends, synthetic):
    """One Newton step from the truth, 400 noises: the scatter is that of the bound."""
    i = int(np.argmax(blends.truth["snr"] * (blends.counts > 1)))
    drawn = limit._differentiate(blends, synthetic, i)
    survey, n_bands = blends.survey, len(blends.survey.bands)
    fisher = limit._information(drawn, survey)
    width, rng = n_bands + len(limit.STEPS), np.random.default_rng(3)
    score = np.zeros((400, len(fisher)))
    for band in range(n_bands):
        mean = sum(g.image[0] * g.flux[band] for g in drawn)
        variance = np.maximum(mean, 0) + survey.sky[band]
        residual = rng.poisson(variance, (400, 64, 64)) - variance
        for j, g in enumerate(drawn):
            slopes = np.stack([g.image[0], *g.gradient[0]]) * g.flux[band]
            here = j * width + np.r_[band, n_bands:width]
            score[:, here] += np.einsum("nyx,pyx->np", residual / variance, slopes)
    fitted = np.linalg.solve(fisher, score.T).T
    found = fitted.std(axis=0)
    expected = np.sqrt(np.diag(np.linalg.inv(fisher)))
    np.testing.assert_allclose(found, expected, rtol=0.15)
    sigma_r = cramer_rao(blends.take(np.array([i])), synthetic)["sigma_r"][0]
    r = survey.index("r")
    assert MAGNITUDES * found[r] == pytest.approx(sigma_r, rel=0.15)


def test_errors_of_ellipticity_are_those_of_shears_along_and_across():
    """Of a shear known to one in each component, as GalSim adds it to a galaxy's."""
    survey, e = deblender.survey("lsst"), galsim.Shear(g1=0.4, g2=0.2)
    known = np.eye(len(survey.bands) + len(limit.STEPS))  # Fisher matrix
    _, *found = limit._errors(known, survey, np.array([e.g1, e.g2]))
    along = np.array([e.g1, e.g2]) / e.g
    directions = np.array([along, [-along[1], along[0]]])
    step, expected = 1e-4, []
    for direction in directions:
        g1, g2 = step * direction
        changed = galsim.Shear(g1=g1, g2=g2) + e
        change = np.array([changed.g1 - e.g1, changed.g2 - e.g2]) / step
        expected.append(change @ direction)
    assert found == pytest.approx(expected, rel=1e-3)
