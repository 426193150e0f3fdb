"""Networks of the paper's size, the KL divergence, the frozen decoder."""

import ast
from pathlib import Path

import keras
import numpy as np
import pytest

from deblender import networks


def test_parameters_are_the_paper_s():
    assert networks.encoder(10).count_params() == 2_547_048
    assert networks.decoder(10).count_params() == 3_321_098


def test_shapes():
    mean, width = networks.encoder(6)(np.zeros((2, 64, 64, 6), np.float32))
    assert mean.shape == width.shape == (2, 32)
    assert (keras.ops.convert_to_numpy(width) > 0).all()
    assert networks.decoder(6)(np.zeros((2, 32), np.float32)).shape == (2, 64, 64, 6)


def test_kl_against_monte_carlo():
    rng = np.random.default_rng(1)
    mean, width = rng.normal(size=(1, 4)), rng.uniform(0.3, 1.5, (1, 4))
    z = mean + width * rng.standard_normal((400_000, 4))
    log_q = -0.5 * ((z - mean) / width) ** 2 - np.log(width)
    estimate = (log_q + 0.5 * z**2).sum(axis=1).mean()
    exact = networks.kl_divergence(mean.astype("float32"), width.astype("float32"))
    assert float(exact[0]) == pytest.approx(estimate, rel=0.01)


def test_kl_of_the_prior_is_zero():
    kl = networks.kl_divergence(np.zeros((1, 32), "f4"), np.ones((1, 32), "f4"))
    assert float(kl[0]) == pytest.approx(0, abs=1e-5)


def test_cross_entropy_is_the_sum_over_pixels():
    rng = np.random.default_rng(2)
    x, y = rng.uniform(0.01, 0.99, (2, 3, 8, 8, 2)).astype("f4")
    by_hand = -(x * np.log(y) + (1 - x) * np.log(1 - y)).sum(axis=(1, 2, 3))
    ours = keras.ops.convert_to_numpy(networks.cross_entropy(x, y))
    np.testing.assert_allclose(ours, by_hand, rtol=1e-4)


def test_sampling_draws_from_the_gaussian():
    mean, width = np.full((20_000, 1), 2.0, "f4"), np.full((20_000, 1), 0.5, "f4")
    z = keras.ops.convert_to_numpy(networks.Sampling(seed=1)([mean, width]))
    assert z.mean() == pytest.approx(2, abs=0.02) and z.std() == pytest.approx(
        0.5, rel=0.02
    )


def test_deblender_starts_from_the_prior_and_shares_its_decoder():
    prior = networks.vae(6, seed=1)
    model = networks.deblender(prior.encoder, prior.decoder, seed=1)
    assert model.decoder is prior.decoder and not model.decoder.trainable
    assert model.encoder is not prior.encoder
    for a, b in zip(model.encoder.weights, prior.encoder.weights, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_transplant_keeps_the_bands_both_have():
    six, ten = networks.decoder(6), networks.decoder(10)
    bands = list(range(6))
    networks.transplant(six, ten, bands, bands)
    z = np.random.default_rng(1).standard_normal((2, 32)).astype("f4")
    more, fewer = map(keras.ops.convert_to_numpy, (ten(z), six(z)))
    np.testing.assert_allclose(more[..., :6], fewer, atol=1e-6)


def test_only_keras_is_used():
    """No TensorFlow in the library: the same code trains on JAX and PyTorch.

    One function asks for it, where it is the backend.
    """
    for file in Path(networks.__file__).parent.glob("*.py"):
        tree = ast.parse(file.read_text())
        tree.body = [n for n in tree.body if getattr(n, "name", "") != "_in_one_pass"]
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not [
                n for n in names if n.split(".")[0] in ("tensorflow", "tf_keras")
            ]


@pytest.mark.parametrize("shared", [False, True])
def test_prelu_is_that_of_keras(shared):
    x = keras.random.normal((2, 4, 4, 3), seed=1)
    ours = networks.activate(keras.Input((4, 4, 3)), shared)  # of a graph
    layer = ours._keras_history.operation
    theirs = keras.layers.PReLU(shared_axes=(1, 2) if shared else None)
    theirs.build(x.shape)
    slopes = np.random.default_rng(2).standard_normal(layer.alpha.shape)
    layer.alpha.assign(slopes), theirs.alpha.assign(slopes)
    found, expected = (keras.ops.convert_to_numpy(f(x)) for f in (layer, theirs))
    np.testing.assert_array_equal(found, expected)
    # A step of training takes the gradients of slopes and, before them, of the input.
    for a, b in zip(_after_a_step(layer), _after_a_step(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def _after_a_step(activation):
    """Weights of a layer and its activation after one step down their gradients."""
    first = keras.layers.Dense(3, kernel_initializer=keras.initializers.HeNormal(3))
    model = keras.Sequential([keras.Input((4, 4, 3)), first, activation])
    model.compile(keras.optimizers.SGD(1.0), loss="mse")
    before = model.get_weights()
    x, y = np.random.default_rng(4).standard_normal((2, 2, 4, 4, 3)).astype("f4")
    model.train_on_batch(x, y)
    after = model.get_weights()
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(after, before, strict=True))
    return after
