"""Evaluation of networks, with stand-ins whose answers are known."""

import numpy as np
import pytest

import deblender
from deblender import measurement
from deblender.evaluation import evaluate, shear_samples, slope
from deblender.measurement import shear_biases
from deblender.weights import Result


class Oracle:
    """Answers with images given beforehand, whatever it is shown."""

    def __init__(self, survey, images):
        self.survey, self.images, self.shown = survey, images, []

    def deblend(self, noisy):
        start = sum(map(len, self.shown)) % len(self.images)
        self.shown.append(noisy)
        return Result(self.images[start : start + len(noisy)], None, None)


@pytest.fixture(scope="module")
def survey():
    return deblender.survey("lsst")


@pytest.fixture(scope="module")
def scenes(synthetic, survey):
    return deblender.simulate(synthetic, survey, 30, seed=8)


def test_the_right_answer_has_no_error(scenes, survey):
    table = evaluate(Oracle(survey, scenes.target), scenes)
    assert len(table) == len(scenes)
    good = np.isfinite(table["de"])
    assert good.sum() > 25
    for name in ("de", "de1", "de2", "dr"):
        assert np.nanmax(np.abs(table[name])) == 0
    assert slope(table).value == pytest.approx(0, abs=1e-9)


def test_twice_the_light_is_a_known_magnitude_error(scenes, survey):
    table = evaluate(Oracle(survey, 2 * scenes.target), scenes)
    np.testing.assert_allclose(table["dr"], -2.5 * np.log10(2), atol=1e-4)


def test_a_network_sees_its_own_bands_only(synthetic, survey, scenes):
    ten = deblender.simulate(synthetic, deblender.survey("lsst+euclid"), 5, seed=8)
    oracle = Oracle(survey, ten.target[..., :6])
    evaluate(oracle, ten)
    np.testing.assert_array_equal(oracle.shown[0], ten.noisy[..., :6])
    with pytest.raises(ValueError, match="unknown lsst band 'VIS'"):
        evaluate(Oracle(ten.survey, ten.target), scenes)


def test_shear_samples_share_their_noise(synthetic, survey, scenes, monkeypatch):
    monkeypatch.setattr(measurement, "SNR_RANGE", (20, 200))
    n, snr = len(scenes), np.asarray(scenes.truth["snr"])
    counted = np.flatnonzero((snr >= 20) & (snr < 200))
    assert 5 < len(counted) < n
    oracle = Oracle(survey, scenes.target[counted])
    tables = shear_samples({"oracle": oracle}, synthetic, survey, n, seed=8)
    shears = list(tables["target"])
    noise = []
    for shear, noisy in zip(shears, oracle.shown, strict=True):
        sheared = deblender.simulate(synthetic, survey, n, seed=8, shear=shear)
        noise.append(noisy - sheared.blend[counted])
    for other in noise[1:]:
        # Its size follows the light, and counts are whole numbers.
        assert np.std(other - noise[0]) < 0.03 * np.std(noise[0])
    # An answer that ignores the shear has m = -1; the targets follow it.
    assert shear_biases(tables["oracle"])["m"] == pytest.approx([-1, -1], abs=1e-9)
    assert np.abs(shear_biases(tables["target"])["m"]).max() < 0.3
