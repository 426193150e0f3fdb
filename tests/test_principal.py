"""Principal components against a singular value decomposition, and what they teach."""

import numpy as np
import pytest

import deblender
from deblender import networks, principal, training
from deblender.normalisation import fit_normalisation


@pytest.fixture(scope="module")
def galaxies(synthetic):
    return deblender.simulate(synthetic, deblender.survey("lsst"), 200, 1, seed=4)


@pytest.fixture(scope="module")
def code(galaxies):
    normalisation = fit_normalisation(galaxies)
    return principal.fit_code(galaxies, normalisation, galaxies.survey)


def test_components_are_those_of_a_singular_value_decomposition():
    vectors = np.random.default_rng(1).normal(size=(30, 50)) * np.arange(50)
    components = principal.fit_whitening(vectors, 4)
    _, _, axes = np.linalg.svd(vectors - vectors.mean(axis=0))
    cosines = axes[:4] @ components.weights
    cosines /= np.linalg.norm(components.weights, axis=0)
    np.testing.assert_allclose(np.abs(cosines), np.eye(4), atol=1e-6)


def test_components_are_white():
    vectors = np.random.default_rng(2).normal(size=(100, 20)) * np.arange(1, 21)
    codes = principal.fit_whitening(vectors, 5)(vectors)
    np.testing.assert_allclose(codes.T @ codes / 100, np.eye(5), atol=1e-8)


def test_components_that_a_small_sample_lacks_are_zero():
    vectors = np.random.default_rng(2).normal(size=(4, 20))
    codes = principal.fit_whitening(vectors, 6)(vectors)
    assert np.isfinite(codes).all()
    np.testing.assert_allclose(codes[:, 3:], 0, atol=1e-6)


def test_code_is_latent_sized_and_tells_shape_from_brightness(code, galaxies):
    target = galaxies.target
    codes = code(target)
    assert codes.shape == (200, networks.LATENT_SIZE) and codes.dtype == np.float32
    assert np.isfinite(codes).all() and np.abs(codes).max() < 5
    brighter = code(2 * target) - codes
    np.testing.assert_allclose(brighter[:, 6:], 0, atol=1e-3)  # profiles
    assert np.abs(brighter[:, :6]).max(axis=1).min() > 0.1
    turned = code(target[:, ::-1]) - codes
    np.testing.assert_allclose(turned[:, :6], 0, atol=1e-3)


def test_likelihood_of_a_code_is_that_of_a_gaussian():
    rng = np.random.default_rng(3)
    code, mean = rng.normal(size=(2, 5, 32))
    width = rng.uniform(0.5, 2, (5, 32))
    latent = np.concatenate([mean, width], axis=1)
    expected = -np.log(np.exp(-0.5 * ((code - mean) / width) ** 2) / width).sum(axis=1)
    loss = networks.latent_likelihood(code.astype("f4"), latent.astype("f4"))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def warm(synthetic):
    return training.warm_start(synthetic, deblender.survey("lsst"), 32, 16, 1)


def test_warm_start_leads_to_a_vae(synthetic, warm):
    assert warm.card["images_seen"] == {"decoder": 32, "encoder": 32}
    setting = {"n_train": 16, "n_validation": 16, "epochs": 1, "learning_rate": 0.0}
    prior = training.train_vae(synthetic, warm.survey, start=warm, **setting)
    for old, new in zip(warm.decoder.weights, prior.decoder.weights, strict=True):
        np.testing.assert_array_equal(old.numpy(), new.numpy())
    kind = {"survey": "lsst", "architecture": "paper"}
    assert prior.card["start"]["card"] == warm.card | kind


def test_code_of_some_bands_does_not_see_the_others(synthetic):
    ten = deblender.survey("lsst+euclid")
    scenes = deblender.simulate(synthetic, ten, 60, 1, seed=4)
    normalisation = fit_normalisation(scenes)
    code = principal.fit_code(scenes, normalisation, deblender.survey("lsst"))
    stamps = scenes.target.copy()
    before = code(stamps)
    stamps[..., 6:] = 0
    np.testing.assert_array_equal(code(stamps), before)


def test_more_bands_start_from_fewer(synthetic, warm):
    ten = deblender.survey("lsst+euclid")
    more = training.warm_start(synthetic, ten, 16, 16, 1, start=warm)
    scale = warm.normalisation.scale
    np.testing.assert_array_equal(more.normalisation.scale[:6], scale)
    assert more.card["start"]["card"]["survey"] == "lsst"
