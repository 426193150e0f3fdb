"""Eq. 4 and its inverse."""

import numpy as np
import pytest

import deblender
from deblender.normalisation import Normalisation


def test_forward_is_equation_4():
    x = np.linspace(-500, 1e5, 1000)[:, None]
    ours = Normalisation(np.array([5000.0])).forward(x)
    np.testing.assert_allclose(ours, np.tanh(np.arcsinh(2.5 * x / 5000)), atol=1e-6)


def test_inverse_undoes_forward():
    scale = np.array([150.0, 5000.0])
    x = (
        np.stack([np.linspace(-3, 20, 500)] * 2, axis=-1) * scale
    )  # twenty times the mean
    normalisation = Normalisation(scale)
    there_and_back = normalisation.inverse(normalisation.forward(x))
    np.testing.assert_allclose(there_and_back, x, rtol=1e-3, atol=1e-3)


def test_inverse_of_one_is_finite():
    assert np.isfinite(Normalisation(np.array([1.0])).inverse(np.array([[1.0]]))).all()


def test_scale_is_the_mean_of_the_maxima(synthetic):
    scenes = deblender.simulate(synthetic, deblender.survey("lsst"), 50, 1, seed=5)
    by_hand = scenes.noisy.max(axis=(1, 2)).mean(axis=0)
    fitted = deblender.fit_normalisation(scenes).scale
    assert fitted == pytest.approx(by_hand, rel=1e-5)
