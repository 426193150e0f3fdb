"""Batches, symmetries, swaps, and what training may and may not change."""

from types import SimpleNamespace

import keras
import numpy as np
import pytest

import deblender
from deblender import networks, training
from deblender.batches import Batches, dihedral, fill_up, swap_neighbours
from deblender.comparison import statistics
from deblender.evaluation import evaluate
from deblender.fitting import History, fit
from deblender.normalisation import Normalisation
from deblender.weights import Network


@pytest.fixture(scope="module")
def blends(synthetic):
    return deblender.simulate(synthetic, deblender.survey("lsst"), 40, seed=3)


@pytest.fixture(scope="module")
def normalisation():
    return Normalisation(np.full(6, 5000.0))


def test_dihedral_gives_eight_different_images():
    image = np.random.default_rng(1).normal(size=(1, 5, 5, 2))
    eight = dihedral(np.repeat(image, 8, axis=0), np.arange(8))
    assert len({turned.tobytes() for turned in eight}) == 8
    np.testing.assert_allclose(
        eight.sum(axis=(1, 2)), image.sum(axis=(1, 2)).repeat(8, 0)
    )


def test_batches_without_augmentation_are_the_scenes(blends, normalisation):
    batches = Batches(blends, normalisation, batch_size=16, augment=False)
    pairs = [batches[i] for i in range(len(batches))]
    clean = np.concatenate([y for _, y in pairs])
    expected = np.maximum(normalisation.forward(blends.target), 0)
    np.testing.assert_array_equal(clean, expected)
    again = batches[1]
    batches.on_epoch_end()
    np.testing.assert_array_equal(batches[1][0], again[0])


def test_each_epoch_has_fresh_noise_and_order(blends, normalisation):
    batches = Batches(blends, normalisation, batch_size=16, seed=4)
    first, order = batches[0][0], batches.order.copy()
    batches.on_epoch_end()
    assert not np.array_equal(first, batches[0][0])
    assert not np.array_equal(order, batches.order)
    twin = Batches(blends, normalisation, batch_size=16, seed=4)
    np.testing.assert_array_equal(first, twin[0][0])


def test_swapped_neighbours_leave_targets_brightest(blends):
    slots = range(1, 4)
    rows = np.array([blends.neighbour_rows(s) for s in slots])
    before = rows.copy()
    swap_neighbours(blends, rows, np.random.default_rng(1))
    assert not np.array_equal(rows, before)
    np.testing.assert_array_equal(np.sort(rows, axis=None), np.sort(before, axis=None))
    np.testing.assert_array_equal(rows >= 0, before >= 0)
    r = blends.flux[:, 2]
    target = np.broadcast_to(r[blends.first[:-1]], rows.shape)
    assert (r[rows] <= target)[rows >= 0].all()


def test_deblender_is_watched_and_leaves_the_decoder_to_the_bit(synthetic):
    survey = deblender.survey("lsst")
    prior = training.train_vae(synthetic, survey, 32, 16, 1)
    decoder = [w.numpy().copy() for w in prior.decoder.weights]
    encoder = [w.numpy().copy() for w in prior.encoder.weights]
    network = training.train_deblender(prior, synthetic, 32, 32, 1)
    for before, after in zip(decoder, network.decoder.weights, strict=True):
        np.testing.assert_array_equal(before, after.numpy())
    for before, after in zip(encoder, network.encoder.weights, strict=True):
        np.testing.assert_array_equal(before, after.numpy())
    assert not np.array_equal(encoder[4], network.deblender.weights[4].numpy())
    assert network.images_seen == {"vae": 32, "deblender": 32}
    curve = network.card["deblender"]["curve"]
    assert curve["val_images"] == [32] and curve["val_loss"][0] > 0
    validation = deblender.simulate(synthetic, survey, 32, split="validation")
    watched = statistics(evaluate(network, validation))
    for name in ("slope", "sigma_de", "sigma_dr"):
        np.testing.assert_allclose(curve[name], watched[name], atol=1e-4)


def test_validation_has_noise_of_its_own(blends, normalisation):
    pair = (Batches(blends, normalisation, seed=4, augment=a) for a in (True, False))
    training, validation = (batches.bank[:10_000] for batches in pair)
    assert abs(np.corrcoef(training, validation)[0, 1]) < 0.05  # 5 sigma


def test_training_lowers_the_loss(synthetic, blends, normalisation):
    model = networks.vae(6, seed=1)
    few = blends.take(np.arange(16))
    batches = Batches(few, normalisation, 8, augment=False)
    curve = fit(model, batches, None, epochs=15).curve
    assert curve["images"][-1] == 15 * 16
    assert curve["loss"][-1] < 0.9 * curve["loss"][0]


def test_another_survey_starts_from_trained_bands(synthetic):
    model = networks.vae(6, seed=2)
    both, scale = (model.encoder, model.decoder), Normalisation(np.full(6, 5000.0))
    prior = Network(deblender.survey("lsst"), scale, *both, None, {"images_seen": {}})
    ten = training.train_vae(
        synthetic, deblender.survey("lsst+euclid"), 16, 16, 1,
        start=prior, learning_rate=0.0,
    )  # fmt: skip
    z = np.random.default_rng(1).standard_normal((2, 32)).astype("f4")
    as_array = keras.ops.convert_to_numpy
    more, fewer = as_array(ten.decoder(z)), as_array(prior.decoder(z))
    np.testing.assert_allclose(more[..., :6], fewer, atol=1e-6)
    stamps = np.random.default_rng(2).normal(size=(2, 64, 64, 10)).astype("f4")
    for old, new in zip(
        prior.encoder(stamps[..., :6]), ten.encoder(stamps), strict=True
    ):
        np.testing.assert_allclose(as_array(new), as_array(old), atol=1e-5)
    np.testing.assert_array_equal(
        ten.normalisation.scale[:6], prior.normalisation.scale
    )
    assert ten.card["start"]["card"]["survey"] == "lsst"


def test_devices_that_share_a_batch_get_as_many_scenes(
    blends, normalisation, monkeypatch
):
    mesh = SimpleNamespace(devices=np.zeros(3))
    monkeypatch.setattr(
        keras.distribution, "distribution", lambda: SimpleNamespace(device_mesh=mesh)
    )
    batches = Batches(blends, normalisation, batch_size=16, augment=False)
    monkeypatch.undo()  # Keras tells it to one thread, and others read the batches
    last, _ = batches[2]
    assert len(last) == 9  # the eight that remain, and the first again
    np.testing.assert_array_equal(fill_up(np.arange(4), 3), [0, 1, 2, 3, 0, 0])
    np.testing.assert_array_equal(fill_up(np.arange(4), 2), np.arange(4))


def test_epochs_after_the_one_that_is_kept_are_not_counted(monkeypatch):
    history = History(images_seen=24, kept=2)
    monkeypatch.setattr(training, "fit", lambda *given: history)
    card, batches = {"images_seen": {}}, SimpleNamespace(scenes=range(8))
    training._stage(card, "vae", None, (batches, batches), epochs=9)
    assert card["images_seen"] == {"vae": 16}
    assert (card["vae"]["epochs"], card["vae"]["kept"]) == (9, 2)
    assert card["vae"]["images_seen"] == 24
