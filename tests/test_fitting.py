"""Checkpoints: what is killed goes on, to the same bits."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import deblender
from deblender import fitting, networks
from deblender.batches import Batches
from deblender.fitting import Recorder, fit
from deblender.normalisation import Normalisation

# What a kill interrupts: three epochs of four batches each.
PROGRAM = """
import sys
from pathlib import Path
from tests.test_fitting import train
train(Path(sys.argv[1]))
"""


def train(folder, epochs=3, n_scenes=16, **kwargs):
    synthetic = deblender.catalogue("synthetic")
    scenes = deblender.simulate(synthetic, deblender.survey("lsst"), 24, seed=3)
    normalisation = Normalisation(np.full(6, 5000.0))
    batches = Batches(
        scenes.take(np.arange(n_scenes)), normalisation, 4, swap_neighbours=True
    )
    watch = Batches(scenes.take(np.arange(16, 24)), normalisation, 4, augment=False)
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
    log = tmp_path / "history.json"
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, cwd=root) as process:
        deadline = time.monotonic() + 300
        while not log.exists() and process.poll() is None:
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
    with pytest.raises(ValueError, match="'data': .*; accepted: "):
        train(whole[0], n_scenes=12)


def test_best_epoch_is_kept_and_training_stops_without_improvement(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(fitting, "PATIENCE", 2)
    # With a rate of zero only the statistics of the input change after the start.
    _, history = train(tmp_path, epochs=40, n_scenes=4, learning_rate=0.0)
    losses = history.curve["val_loss"]
    assert len(losses) == np.argmin(losses) + 1 + 2 < 40
    model, _ = train(tmp_path, epochs=40, n_scenes=4, learning_rate=0.0)
    best = variables(tmp_path / "best.safetensors")
    for value, weight in zip(best.values(), model.weights, strict=True):
        np.testing.assert_array_equal(value, weight.numpy())


def test_history_says_how_long_and_how_many(whole):
    _, _, history = whole
    assert history.images_seen == 48 and history.seconds > 0
    assert history.curve["images"][-1] == 48
    assert history.curve["val_images"] == [16, 32, 48]


def test_recorder_counts_a_last_batch_that_is_short(synthetic):
    scenes = deblender.simulate(synthetic, deblender.survey("lsst"), 10, seed=3)
    batches = Batches(scenes, Normalisation(np.full(6, 5000.0)), 4)
    recorder = Recorder(batches, epochs=2)
    recorder.on_train_begin()
    recorder.on_epoch_begin(0)
    for step in range(3):
        recorder.on_train_batch_end(step, {"loss": 1.0})
    recorder.on_train_end()
    assert recorder.history.images_seen == 10
