"""What a device composes is what the host would, but for the noise."""

import keras
import numpy as np
import pytest

from deblender import fitting, linear, on_device
from deblender.batches import (
    Batches,
    DecoderBatches,
    EncoderBatches,
    RepeatedBatches,
)
from deblender.catalogues import catalogue
from deblender.networks import (
    COPIES,
    calibration_loss,
    cross_entropy,
    latent_likelihood,
    side_by_side,
    vae,
)
from deblender.normalisation import NoiseUnits, Normalisation
from deblender.on_device import OnDevice, UnitBatches, composes
from deblender.principal import fit_code
from deblender.simulation import simulate
from deblender.surveys import survey

LOSSES = {EncoderBatches: latent_likelihood, RepeatedBatches: calibration_loss}


@pytest.fixture(scope="module")
def scenes():
    galaxies = catalogue("synthetic")
    return simulate(galaxies, survey("lsst+euclid"), 100, 4, "pixel", 3, "train")


@pytest.fixture(scope="module")
def decoder(scenes):
    decoder = linear.decoder(scenes.survey)
    decoder.set_weights(linear.fit_components(scenes, linear.N_COMPONENTS))
    return decoder


def batches_of(kind, scenes, decoder, **kwargs):
    units = NoiseUnits(np.sqrt(scenes.survey.sky))
    return kind(scenes, units, 20, 1, code=linear.Code(decoder, units), **kwargs)


def model_of(scenes, decoder):
    return side_by_side(linear.encoder(scenes.survey, decoder))


def composed(device, monkeypatch, index=2):
    """Targets, neighbours, noisy blends and answers, as a training sees them."""
    found = []

    def pairs(*galaxies_and_seed):
        noisy, answer = type(device).pairs(device, *galaxies_and_seed)
        found.extend([*galaxies_and_seed[:2], noisy, answer])
        return noisy, answer

    (units,) = UnitBatches(device.batches)[index]
    device(units)  # which builds it, with symbols in place of numbers
    monkeypatch.setattr(device, "pairs", pairs)
    device(units, training=True)
    return [keras.ops.convert_to_numpy(x) for x in found]


@pytest.fixture(params=["float32", "mixed_bfloat16"])
def precision(request):
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("kind", LOSSES)
def test_galaxies_and_codes_are_those_of_the_host(
    kind, scenes, decoder, precision, monkeypatch
):
    batches = batches_of(kind, scenes, decoder, swap_neighbours=True)
    device = OnDevice(model_of(scenes, decoder), batches, LOSSES[kind])
    target, rest, noisy, code = composed(device, monkeypatch)
    expected, blend, _ = batches.draw(2)
    peak = blend.max(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(target / peak, expected / peak, atol=1e-6)
    np.testing.assert_allclose((target + rest) / peak, blend / peak, atol=1e-6)
    theirs, their_code = batches[2]
    np.testing.assert_allclose(code, their_code, atol=1e-4 * np.abs(their_code).max())
    # The same light in every view; what differs is noise, of twice its variance.
    survey_noise = np.sqrt(2 * (1 + np.tile(blend, (len(noisy) // 20, 1, 1, 1))
                                / scenes.survey.sky))  # fmt: skip
    assert np.std((noisy - theirs) / survey_noise) == pytest.approx(1, rel=0.005)
    assert np.mean((noisy - theirs) / survey_noise) == pytest.approx(0, abs=0.005)


def test_each_view_has_its_own_noise(scenes, decoder, monkeypatch):
    batches = batches_of(RepeatedBatches, scenes, decoder)
    device = OnDevice(model_of(scenes, decoder), batches, calibration_loss)
    target, rest, noisy, _ = composed(device, monkeypatch)
    turned = target + np.rot90(rest, axes=(1, 2))
    blends = np.concatenate([target + rest] * 2 + [turned] * 2)
    noise = noisy - blends / np.sqrt(scenes.survey.sky)
    noise /= np.sqrt(1 + blends / scenes.survey.sky)
    alike = np.corrcoef(noise.reshape(COPIES, -1))
    np.testing.assert_allclose(alike, np.eye(COPIES), atol=0.01)


def test_validation_sees_the_same_noise_again(scenes, decoder):
    batches = batches_of(EncoderBatches, scenes, decoder, augment=False)
    device = OnDevice(model_of(scenes, decoder), batches, latent_likelihood)
    device.compile("sgd", loss=None)
    first, again = (device.evaluate(UnitBatches(batches), verbose=0) for _ in range(2))
    assert first == again


def test_targets_of_a_decoder_are_those_of_the_host(scenes, monkeypatch):
    batches = Batches(scenes, Normalisation(np.full(10, 5000.0)), 20, seed=1)
    device = OnDevice(vae(10, seed=1), batches, cross_entropy)
    answer = composed(device, monkeypatch)[3]
    np.testing.assert_allclose(answer, batches[2][1], atol=1e-6)


def test_codes_that_a_device_does_not_know_stay_with_the_host(scenes, decoder):
    units = Normalisation(np.full(10, 5000.0))
    code = fit_code(scenes, units, scenes.survey)
    assert not composes(EncoderBatches(scenes, units, 20, 1, code=code))
    assert composes(batches_of(EncoderBatches, scenes, decoder))
    assert composes(Batches(scenes, units, 20))
    assert not composes(batches_of(DecoderBatches, scenes, decoder))


@pytest.mark.parametrize("kind", LOSSES)
def test_training_on_the_device(kind, scenes, decoder, monkeypatch, tmp_path):
    """It learns, leaves the components alone, and goes on where it stopped."""

    def host(self, index):
        raise AssertionError("composed by the host")

    def use_device():
        monkeypatch.setattr(fitting, "accelerators", lambda: 1)
        monkeypatch.setattr(kind, "__getitem__", host)

    def train(folder, stop_after=None):
        use_device()
        keras.utils.set_random_seed(1)
        model = model_of(scenes, decoder)
        training = batches_of(kind, scenes, decoder)
        if stop_after:
            monkeypatch.setattr(fitting.Checkpoint, "over", lambda self: True)
        watched = batches_of(kind, scenes, decoder, augment=False)
        history = fitting.fit(
            model, training, watched, 2, 1e-3, LOSSES[kind], tmp_path / folder
        )
        monkeypatch.undo()
        return model, history

    images = decoder.get_weights()[0]
    whole, history = train("whole")
    losses = history.curve["val_loss"]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert history.images_seen == 200
    np.testing.assert_array_equal(decoder.get_weights()[0], images)
    train("parts", stop_after=1)
    resumed, again = train("parts")
    assert again.curve["val_loss"] == losses
    for a, b in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(
    keras.backend.backend() != "jax" or "cpu:1" not in on_device.devices(),
    reason="only JAX shares batches; XLA_FLAGS can give it two devices of a processor",
)
@pytest.mark.parametrize("composed_by", ["host", "device"])
@pytest.mark.parametrize("kind", LOSSES)
def test_devices_that_share_batches_learn_what_one_learns(
    kind, composed_by, scenes, decoder, monkeypatch
):
    def train(devices):
        parallel = keras.distribution.DataParallel(devices=devices)
        with parallel.scope():
            keras.utils.set_random_seed(1)
            there = linear.decoder(scenes.survey)  # on these devices
            there.set_weights(decoder.get_weights())
            model = model_of(scenes, there)
            begun = model.get_weights()
            training = batches_of(kind, scenes, there)
            history = fitting.fit(model, training, None, 2, 1e-3, LOSSES[kind])
        moves = [w - b for w, b in zip(model.get_weights(), begun, strict=True)]
        places = {len(w.value.sharding.device_set) for w in model.weights}
        return moves, places, history.curve["loss"]

    if composed_by == "device":
        monkeypatch.setattr(fitting, "accelerators", lambda: 1)
    alone, where, losses = train(["cpu:0"])
    shared, places, same = train(["cpu:0", "cpu:1"])
    assert (where, places) == ({1}, {2})
    np.testing.assert_allclose(same, losses, rtol=1e-3)
    for one, two in zip(alone, shared, strict=True):
        assert np.linalg.norm(two - one) <= 0.05 * np.linalg.norm(one)


def test_noise_of_training_validation_and_latent_draws_is_of_different_streams(scenes):
    batches = Batches(scenes, Normalisation(np.full(10, 5000.0)), 20, seed=1)
    model = vae(10, seed=1)
    device = OnDevice(model, batches, cross_entropy)
    seeds = device.generator, device.alone, model.sampling.generator, batches.seed + 1
    draws = [keras.random.normal((200,), seed=seed) for seed in seeds]
    correlation = np.corrcoef([keras.ops.convert_to_numpy(each) for each in draws])
    assert np.abs(correlation - np.eye(4)).max() < 0.35  # 5 sigma


def test_a_training_does_not_change_who_composes(
    scenes, decoder, monkeypatch, tmp_path
):
    model, training = (
        model_of(scenes, decoder),
        batches_of(EncoderBatches, scenes, decoder),
    )
    fitting.fit(model, training, None, 1, 1e-3, latent_likelihood, tmp_path)
    monkeypatch.setattr(fitting, "accelerators", lambda: 1)
    with pytest.raises(ValueError, match="'on_device': False.*'on_device': True"):
        fitting.fit(model, training, None, 1, 1e-3, latent_likelihood, tmp_path)


@pytest.fixture
def machine(monkeypatch):
    """A function that gives a machine these devices, as TensorFlow lists them."""
    monkeypatch.setattr(keras.backend, "backend", lambda: "tensorflow")
    return lambda *names: monkeypatch.setattr(on_device, "devices", lambda: [*names])


def test_a_card_names_the_accelerators(machine):
    machine("cpu:0", "gpu:0", "gpu:1")
    assert on_device.accelerator_names() == ["gpu:0", "gpu:1"]


def test_a_processor_alone_is_no_accelerator(machine):
    machine("cpu:0")
    assert on_device.accelerators() == len(on_device.accelerator_names()) == 0
