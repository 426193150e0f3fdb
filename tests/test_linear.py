"""The linear network: components, amplitude, the loss against bias, its files."""

import galsim
import keras
import numpy as np
import pytest

import deblender
from deblender import linear, training, weights
from deblender.batches import RepeatedBatches
from deblender.drawing import draw
from deblender.networks import (
    COPIES,
    LEEWAY,
    MISTAKEN,
    calibration_loss,
    in_widths,
)
from deblender.normalisation import NoiseUnits


@pytest.fixture(scope="module")
def survey():
    return deblender.survey("lsst")


@pytest.fixture(scope="module")
def blends(synthetic, survey):
    return deblender.simulate(synthetic, survey, 200, seed=3)


@pytest.fixture(scope="module")
def units(survey):
    return NoiseUnits(np.sqrt(survey.sky))


@pytest.fixture(scope="module")
def network(synthetic, survey):
    return training.train_linear(synthetic, survey, 64, 16, 1)


def test_components_are_those_of_a_singular_value_decomposition(blends, units):
    images, sizes = linear.fit_components(blends, 20)
    np.testing.assert_allclose(images @ images.T, np.eye(20), atol=1e-4)
    stamps = linear.dihedral(units.forward(blends.target), np.arange(200) % 8)
    size = linear.amplitudes(stamps, linear.aperture(blends.survey))
    size = keras.ops.convert_to_numpy(size)
    values = np.linalg.svd(stamps.reshape(200, -1) / size, compute_uv=False)
    np.testing.assert_allclose(sizes, values[:20] / np.sqrt(200), rtol=1e-3)


def test_as_many_scenes_as_components_are_enough(synthetic, survey):
    few = deblender.simulate(synthetic, survey, linear.N_COMPONENTS, 4, seed=3)
    images, sizes = linear.fit_components(few, linear.N_COMPONENTS)
    np.testing.assert_allclose(images @ images.T, np.eye(len(images)), atol=1e-4)
    assert (sizes > 0).all()


def test_too_few_scenes_are_named(blends):
    with pytest.raises(ValueError, match="received 5 scenes; accepted: 20 or more"):
        linear.fit_components(blends.take(np.arange(5)), 20)


def test_amplitude_is_a_signal_to_noise_ratio(survey):
    aperture = linear.aperture(survey)
    assert np.sum(aperture**2) == pytest.approx(1, rel=1e-5)
    empty, bright = np.zeros_like(aperture), 100 * aperture
    amplitude = linear.amplitudes(np.stack([empty, bright]), aperture)
    expected = [linear.EMPTY, np.hypot(100, linear.EMPTY)]
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(amplitude)[:, 0], expected, rtol=1e-5
    )


def test_decoder_and_projection_are_inverse(network):
    latent = np.random.default_rng(1).normal(size=(3, linear.N_COMPONENTS)).astype("f4")
    stamps = keras.ops.convert_to_numpy(network.decoder(latent))
    again = linear.Code(network.decoder, network.normalisation).of_normalised(stamps)
    np.testing.assert_allclose(again, latent, atol=0.02)


def test_components_redraw_galaxies(synthetic, survey, blends):
    few = deblender.simulate(synthetic, survey, 400, 4, "peak", split="train")
    images, _ = linear.fit_components(few, linear.N_COMPONENTS)
    stamps = blends.target / np.sqrt(survey.sky)
    vectors = stamps.reshape(len(stamps), -1)
    redrawn = vectors @ images.T @ images
    lost = np.linalg.norm(redrawn - vectors, axis=1) / np.linalg.norm(vectors, axis=1)
    assert np.median(lost) < 0.05


def test_training_leaves_the_components_alone(network, synthetic, survey):
    before = network.decoder.get_weights()
    other = training.train_linear(synthetic, survey, 16, 8, 1, "pixel", start=network)
    assert other.decoder is network.decoder
    for old, new in zip(before, other.decoder.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    kind = {"survey": "lsst", "architecture": "linear"}
    assert other.card["start"]["card"] == network.card | kind
    assert other.images_seen == {"vae": 0, "deblender": 16, "calibration": 16}


def test_history_watches_the_slope(network):
    curve = network.card["deblender"]["curve"]
    assert curve["val_images"] == [64]
    assert len(curve["slope"]) == len(curve["sigma_dr"]) == len(curve["typical"]) == 1


def test_typical_loss_is_that_of_the_median_blend():
    batches = [(np.float32([1.0, 2.0]), 0.0), (np.float32([3e9]), 0.0)]
    judge = training._judge(lambda: {"slope": 0.1}, abs, batches, lambda _, said: said)
    assert judge() == {"slope": 0.1, "typical": 2.0}


@pytest.mark.parametrize("mistaken", [0.0, 0.5])
def test_loss_against_bias_in_closed_form(mistaken):
    """Errors of mean b +- m in two views and of size s: b^2 + nu m^2 + lambda s^2.

    All over the width squared, halved.
    """
    rng, n, bias, size, width = np.random.default_rng(2), 200_000, 0.7, 1.3, 2.0
    error = bias + size * rng.standard_normal((COPIES, n, 1))
    error[: COPIES // 2] += mistaken
    error[COPIES // 2 :] -= mistaken
    error = error.reshape(-1, 1)
    latent = np.concatenate([-error, np.full_like(error, width)], axis=1, dtype="f4")
    tensors = map(keras.ops.convert_to_tensor, (np.zeros_like(error, "f4"), latent))
    found = calibration_loss(*tensors)
    point = LEEWAY * size**2 + bias**2 + MISTAKEN * mistaken**2
    sizes = size**2 + bias**2 + mistaken**2
    expected = np.log(width) + (point + sizes) / (2 * width**2)
    assert float(keras.ops.mean(found)) == pytest.approx(expected, rel=0.003)


def test_errors_far_astray_count_as_their_logarithm():
    """As a Gaussian up to 30 widths; value and slope go on without a step."""
    error = np.array([-1e7, -30.0, -2.0, 0.0, 29.9, 30.1, 1e7], np.float32)
    tensor = keras.ops.convert_to_tensor(error)
    held = keras.ops.convert_to_numpy(in_widths(2 * tensor, 2.0))
    np.testing.assert_allclose(held[1:5], error[1:5], rtol=1e-6)
    far = 30**2 * (0.5 + np.log(1e7 / 30))
    np.testing.assert_allclose(held[[0, 6]] ** 2 / 2, far, rtol=1e-5)
    slope = (held[5] ** 2 - held[4] ** 2) / 2 / (error[5] - error[4])
    assert slope == pytest.approx(30, rel=0.01)


def test_copies_share_the_blend_and_not_the_noise(blends, units):
    batches = RepeatedBatches(
        blends, units, 20, code=lambda target: target.mean((1, 2))
    )
    noisy, code = batches[0]
    assert len(noisy) == len(code) == COPIES * 20
    np.testing.assert_array_equal(code, np.tile(code[:20], (COPIES, 1)))
    assert not np.array_equal(noisy[:20], noisy[20:40])
    # The light is the same: what differs in the sums is noise.
    sums = noisy.sum(axis=(1, 2))
    assert np.std(sums[:20] - sums[20:40]) < 3 * 64 * np.sqrt(2)


@pytest.mark.parametrize("centring", ["exact", "pixel"])
def test_neighbours_turn_about_the_centre(centring, synthetic, survey, units):
    few = deblender.simulate(synthetic, survey, 20, centring=centring, seed=3)
    batches = RepeatedBatches(few, units, 20, augment=False, code=lambda t: t[:, 0, 0])
    batches.noisy = lambda blend, rng: blend
    views, _ = batches[0]
    views = views.reshape(COPIES, 20, *views.shape[1:])
    turned = np.rot90(few.blend - few.target, axes=(1, 2))
    for copy, neighbours in enumerate([few.blend - few.target] * 2 + [turned] * 2):
        np.testing.assert_allclose(views[copy] - few.target, neighbours, atol=0.05)
    assert not np.allclose(turned, few.blend - few.target, atol=1)


def test_training_noise_has_the_variance_of_poisson(blends, units, survey):
    batches = RepeatedBatches(
        blends, units, 200, augment=False, code=lambda t: t[:, 0, 0]
    )
    noisy, _ = batches[0]
    difference = (noisy[:200] - noisy[200:400]) * np.sqrt(survey.sky)
    expected = 2 * (blends.blend + survey.sky).mean(axis=(0, 1, 2))
    np.testing.assert_allclose(
        np.square(difference).mean(axis=(0, 1, 2)), expected, rtol=0.01
    )


def test_what_is_saved_is_what_is_loaded(network, blends, tmp_path):
    weights.save(network, tmp_path / "a")
    share = {"decoder": "../a/decoder.safetensors"}
    weights.save(network, tmp_path / "b", share=share)
    loaded = deblender.load(tmp_path / "b")
    assert loaded.architecture == "linear" and loaded.encoder is None
    noisy = blends.take(np.arange(10)).noisy
    before, after = network.deblend(noisy), loaded.deblend(noisy)
    size = np.abs(before.image).max(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(after.image / size, before.image / size, atol=0.02)
    files = {file.name for file in (tmp_path / "b").iterdir()}
    assert files == {
        "correlation.safetensors",
        "deblender.safetensors",
        weights.CARD,
    }
    kept = loaded.correlation.get_weights()
    for old, new in zip(network.correlation.get_weights(), kept, strict=True):
        np.testing.assert_allclose(new, old, atol=1e-3)
    # The encoder's file does not hold the components a second time.
    bytes_of = {p: (tmp_path / "a" / f"{p}.safetensors").stat().st_size for p in
                ("decoder", "deblender")}  # fmt: skip
    assert bytes_of["decoder"] > 2 * network.decoder.weights[0].shape[0] * 64 * 64 * 6
    assert bytes_of["deblender"] < 4_000_000


def test_isolated_galaxies_go_through_the_deblender(network, blends):
    noisy = blends.take(np.arange(3)).noisy
    one, other = network.reconstruct(noisy), network.deblend(noisy)
    np.testing.assert_array_equal(one.image, other.image)


def test_a_training_of_no_epochs_is_refused(synthetic):
    survey = deblender.survey("lsst")
    with pytest.raises(ValueError, match="received no epochs of either kind; accepted"):
        training.train_linear(synthetic, survey, 8, 8, 0)


def test_linear_decoder_does_not_dream(network):
    with pytest.raises(ValueError, match="linear decoder; accepted: a VAE"):
        network.generate(2, np.random.default_rng(1))


def test_samples_have_the_widths_of_the_encoder(network, blends):
    result = network.deblend(blends.take(np.arange(2)).noisy, n_samples=300)
    code = linear.Code(network.decoder, network.normalisation)
    latent = code(result.samples.reshape(-1, 64, 64, 6)).reshape(300, 2, -1)
    np.testing.assert_allclose(latent.std(axis=0) / result.latent_width, 1, atol=0.25)


def test_correlation_of_errors_is_found_again_for_faint_and_bright():
    """Drawn with a known correlation, one for faint targets and one for bright."""
    rng, n = np.random.default_rng(3), linear.N_COMPONENTS
    known = np.stack([_correlation(rng, n) for _ in range(2)])
    flux = rng.uniform(0, 1, 80_000)
    factors = np.linalg.cholesky(known)[(flux > 0.5).astype(int)]
    draws = rng.standard_normal((len(flux), n, 1))
    errors = np.concatenate([f @ d for f, d in zip(factors, draws, strict=True)], 1)
    correlation = linear.Correlation()
    correlation.set_weights(linear.fit_correlation(errors.T, flux))
    draws = rng.standard_normal((20_000, 2, n), dtype=np.float32)
    drawn = correlation.tie(draws, np.array([0.1, 0.9]))  # faint, bright
    for tied, expected in zip(drawn.swapaxes(0, 1), known, strict=True):
        np.testing.assert_allclose(np.cov(tied.T), expected, atol=0.05)


def _correlation(rng, n):
    mixed = rng.standard_normal((n, n)) + 2 * rng.standard_normal((n, 1))
    products = mixed @ mixed.T
    sizes = np.sqrt(np.diag(products))
    return products / np.outer(sizes, sizes)


def test_few_scenes_say_little_of_correlation():
    errors = np.ones((4, linear.N_COMPONENTS))  # as correlated as can be
    correlation = linear.Correlation()
    correlation.set_weights(linear.fit_correlation(errors, np.arange(4.0)))
    for factor in correlation.factors:
        found = factor @ factor.T
        np.testing.assert_allclose(np.diag(found), 1, rtol=1e-5)
        expected = 1 / (1 + linear.N_COMPONENTS)
        np.testing.assert_allclose(found[0, 1:], expected, rtol=1e-4)


def _flux_bars(network, result):
    """Standard deviations (scene,) of fluxes in r, by widths and their correlation."""
    base, *unit = network.decode(np.eye(linear.N_COMPONENTS + 1, k=-1)[:, :-1])
    per_number = linear.reference_flux(np.array(unit) - base, network.survey)
    edges = keras.ops.convert_to_numpy(network.correlation.edges)
    flux = linear.reference_flux(result.image, network.survey)
    loads = result.latent_width * per_number  # (scene, latent)
    tied = network.correlation.factors[np.searchsorted(edges, flux)]
    return np.linalg.norm(np.einsum("ni,nij->nj", loads, tied), axis=1)


def test_samples_know_how_errors_go_together(blends):
    network = deblender.load("lsst")
    result = network.deblend(blends.take(np.arange(2)).noisy, n_samples=1000)
    drawn = linear.reference_flux(result.samples, network.survey).std(axis=0)
    np.testing.assert_allclose(drawn / _flux_bars(network, result), 1, atol=0.08)


def test_published_bars_on_flux_are_honest(synthetic, survey):
    """Within one standard deviation lie about 68 % of the true fluxes in r."""
    network = deblender.load("lsst")
    scenes = deblender.simulate(synthetic, survey, 400, seed=3)
    result = network.deblend(scenes.noisy)
    errors = linear.reference_flux(result.image - scenes.target, survey)
    assert 0.63 < np.mean(np.abs(errors) < _flux_bars(network, result)) < 0.80


def test_cameras_are_laid_on_one_grid():
    """A galaxy is at the same place in every channel, with all its light."""
    survey = deblender.survey("lsst+euclid")
    galaxy = galsim.Gaussian(sigma=0.6).shift(0.7, -0.4)
    stamp = np.zeros((1, *survey.shape), "f4")
    for k, camera in enumerate(survey.instruments):
        ((image,),) = draw([galaxy], [camera])
        stamp[..., survey.instrument_of_band == k] = (
            image[..., None] / camera.pixel_scale**2  # of brightness
        )
    source = keras.Input(survey.shape)
    align = keras.Model(source, linear._align(source, survey))
    aligned = keras.ops.convert_to_numpy(align(stamp))[0]  # (y, x, channel)
    grid = (np.arange(linear.WINDOW) - (linear.WINDOW - 1) / 2) * 0.2  # arcsec
    light = aligned.sum(axis=(0, 1))
    np.testing.assert_allclose(light, 1 / 0.2**2, rtol=5e-3)
    x = np.einsum("yxc,x->c", aligned, grid) / light
    y = np.einsum("yxc,y->c", aligned, grid) / light
    # The four pixels of VIS in a pixel of the grid lie 0.05" off its centre.
    quarter = 0.05 * np.array([[1, -1, 1, -1], [1, 1, -1, -1]])
    off = np.concatenate([np.zeros((2, 6)), quarter, np.zeros((2, 3))], axis=1)
    np.testing.assert_allclose([x, y], [[0.7], [-0.4]] + off, atol=5e-3)
