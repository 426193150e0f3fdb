"""Checkpoints: what is killed goes on, to the same bits."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from safetensors import safe_open

import deblender
from deblender import fitting, networks
from deblender.batches import Batches
from deblender.fitting import PATIENCE, History, OtherTraining, Recorder, fit
from deblender.normalisation import Normalisation

# What a kill interrupts: three epochs of four batches each.
PROGRAM = """
import sys
from pathlib import Path
from tests.test_fitting import train
train(Path(sys.argv[1]))
"""


def train(folder, epochs=3, n_scenes=16, n_validation=8, **kwargs):
    synthetic = deblender.catalogue("synthetic")
    scenes = deblender.simulate(synthetic, deblender.survey("lsst"), 24, seed=3)
    normalisation = Normalisation(np.full(6, 5000.0))
    batches = Batches(
        scenes.take(np.arange(n_scenes)), normalisation, 4, swap_neighbours=True
    )
    validation = scenes.take(np.arange(16, 16 + n_validation))
    watch = Batches(validation, normalisation, 4, augment=False)
    model = networks.vae(6, seed=1)
    history = fit(model, batches, watch, epochs, folder=folder, **kwargs)
    return model, history


def variables(file):
    with safe_open(file, "np") as content:
        return {key: content.get_tensor(key) for key in content.keys()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *train(folder)


def test_killed_in_mid_epoch_it_goes_on_to_the_same_bits(whole, tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    log, saved = tmp_path / "history.json", tmp_path / "last.safetensors"
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, cwd=root) as process:
        deadline = time.monotonic() + 300
        while not saved.exists() and process.poll() is None:
            assert time.monotonic() < deadline, "no epoch in five minutes"
            time.sleep(0.01)
        time.sleep(0.05)  # into the next epoch
        process.send_signal(signal.SIGKILL)
    done = len(json.loads(log.read_text())["curve"]["val_loss"])
    assert process.returncode == -signal.SIGKILL and done < 3
    _, history = train(tmp_path)
    folder, _, expected = whole
    assert history.curve == expected.curve
    for name in ("last.safetensors", "best.safetensors"):
        before, after = variables(folder / name), variables(tmp_path / name)
        assert before.keys() == after.keys()
        for key in before:
            np.testing.assert_array_equal(before[key], after[key], err_msg=key)


def test_finished_training_is_not_repeated(whole):
    folder, model, history = whole
    written = (folder / "last.safetensors").stat().st_mtime_ns
    again, same = train(folder)
    assert (folder / "last.safetensors").stat().st_mtime_ns == written
    assert same.curve == history.curve and same.images_seen == 48
    for old, new in zip(model.weights, again.weights, strict=True):
        np.testing.assert_array_equal(old.numpy(), new.numpy())


def test_checkpoint_of_another_training_is_refused(whole):
    with pytest.raises(ValueError, match=r"'epochs': 3.*accepted.*'epochs': 4"):
        train(whole[0], epochs=4)


def test_checkpoint_of_other_galaxies_is_refused(whole):
    for change in ({"n_scenes": 12}, {"n_validation": 4}):
        with pytest.raises(OtherTraining, match="'data': .*; accepted: "):
            train(whole[0], **change)


def test_checkpoint_of_the_same_galaxies_with_other_images_is_refused(
    whole, monkeypatch
):
    """Those of HST and those before HST's noise have the same fluxes."""
    simulate = deblender.simulate

    def with_noise(*args, **kwargs):
        scenes = simulate(*args, **kwargs)
        scenes.truth["snr"] *= 1.001
        return scenes

    monkeypatch.setattr(deblender, "simulate", with_noise)
    with pytest.raises(OtherTraining, match="'data': .*; accepted: "):
        train(whole[0])


def test_unknown_losses_and_no_epochs_are_refused(tmp_path):
    def mine(target, output):
        return target - output

    with pytest.raises(ValueError, match="loss mine; accepted: cross_entropy, "):
        train(tmp_path, loss=mine)
    with pytest.raises(ValueError, match="received 0 epochs; accepted: one or more"):
        train(tmp_path, epochs=0)
    assert not list(tmp_path.iterdir())


def test_checkpoint_of_another_precision_is_refused(whole):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        with pytest.raises(OtherTraining, match="'precision': 'float32'.*accepted"):
            train(whole[0])
    finally:
        keras.config.set_dtype_policy("float32")


def test_an_epoch_whose_loss_is_no_number_is_not_the_best(tmp_path):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    recorder = SimpleNamespace(history=History(), last_point=(0, 0.0))
    checkpoint = fitting.Checkpoint(tmp_path, recorder, {})
    checkpoint.set_model(model)
    best = []
    for epoch, loss in enumerate([np.nan, 5.0, np.nan, 6.0, 4.0]):
        recorder.history.curve["val_loss"].append(loss)
        model.set_weights([np.full((1, 1), epoch), np.zeros(1)])
        checkpoint.on_epoch_end(epoch)
        best.append(float(variables(checkpoint.best)["0000"][0, 0]))
    assert best == [0, 1, 1, 1, 4]
    assert not checkpoint.over()
    recorder.history.curve["val_loss"] += [5.0] * PATIENCE
    assert checkpoint.over()


def test_typical_loss_decides_where_it_is_watched(tmp_path):
    recorder = SimpleNamespace(history=History(), last_point=(0, 0.0))
    checkpoint = fitting.Checkpoint(tmp_path, recorder, {})
    curve = recorder.history.curve
    curve["val_loss"] = [5.0] + [900.0] * PATIENCE  # a few blends far astray
    assert checkpoint.over()
    curve["typical"] = [5.0 - 0.1 * i for i in range(PATIENCE + 1)]
    assert not checkpoint.over()
    for never_better in (np.nan, 5.0):
        curve["typical"] = [never_better] * (PATIENCE + 1)
        assert checkpoint.over() and checkpoint.best_epoch() == 1


def test_best_epoch_is_kept_and_training_stops_without_improvement(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(fitting, "PATIENCE", 2)
    # With a rate of zero only the statistics of the input change after the start.
    _, history = train(tmp_path, epochs=40, n_scenes=4, learning_rate=0.0)
    losses = history.curve["val_loss"]
    assert len(losses) == np.argmin(losses) + 1 + 2 < 40
    assert history.kept == np.argmin(losses) + 1
    model, _ = train(tmp_path, epochs=40, n_scenes=4, learning_rate=0.0)
    best = variables(tmp_path / "best.safetensors")
    for value, weight in zip(best.values(), model.weights, strict=True):
        np.testing.assert_array_equal(value, weight.numpy())


def test_the_log_grows_within_an_epoch(tmp_path):
    recorder = SimpleNamespace(history=History(images_seen=30), steps=4, every=3)
    checkpoint = fitting.Checkpoint(tmp_path, recorder, {})
    checkpoint.on_train_batch_end(3)
    assert not checkpoint.log.exists()
    recorder.steps += 2
    checkpoint.on_train_batch_end(5)
    assert json.loads(checkpoint.log.read_text())["images_seen"] == 30


def test_history_says_how_long_and_how_many(whole):
    _, _, history = whole
    assert history.images_seen == 48 and history.seconds > 0
    assert history.kept == np.argmin(history.curve["val_loss"]) + 1
    assert history.curve["images"][-1] == 48
    assert history.curve["val_images"] == [16, 32, 48]


def test_recorder_counts_a_last_batch_that_is_short(synthetic):
    scenes = deblender.simulate(synthetic, deblender.survey("lsst"), 10, seed=3)
    batches = Batches(scenes, Normalisation(np.full(6, 5000.0)), 4)
    recorder = Recorder(batches, epochs=2)
    recorder.on_train_begin()
    for step in range(3):
        recorder.on_train_batch_end(step, {"loss": 1.0})
    recorder.on_train_end()
    assert recorder.history.images_seen == 10


def test_points_of_the_curve_are_means_of_what_lies_between(synthetic):
    scenes = deblender.simulate(synthetic, deblender.survey("lsst"), 10, seed=3)
    batches = Batches(scenes, Normalisation(np.full(6, 5000.0)), 2)
    recorder = Recorder(batches, epochs=2)
    recorder.every = 3  # of five batches in an epoch
    losses = np.array([[4.0, 1.0, 1.0, 3.0, 5.0], [7.0, 2.0, 2.0, 2.0, 9.0]])
    recorder.on_train_begin()
    for epoch, each in enumerate(losses):
        means = np.cumsum(each) / np.arange(1, 6)  # what Keras reports
        for step, mean in enumerate(means):
            recorder.on_train_batch_end(step, {"loss": mean})
        recorder.on_epoch_end(epoch, {"loss": means[-1]})
    recorder.on_train_end()
    expected = losses.ravel()[:9].reshape(3, 3).mean(axis=1)
    np.testing.assert_allclose(recorder.history.curve["loss"], expected)
