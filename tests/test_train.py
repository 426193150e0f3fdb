"""The training program, from its command line to the folder it leaves."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest

import deblender
from deblender import train as program
from deblender import training
from deblender.train import RECIPES, Sizes, main, sizes_of

TINY = ["--n-train", "8", "--n-validation", "8", "--epochs", "1"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    main(["lsst-paper", "--out", str(folder), *TINY])
    main(["lsst", "--out", str(folder), *TINY])
    return folder


def test_network_comes_with_its_card(out):
    names = ["lsst", "lsst-paper"]
    for name in names:
        network = deblender.load(out / name, expect_survey="lsst")
        card = network.card
        assert network.images_seen["deblender"] == 8
        assert card["command"].startswith(f"python -m deblender.train {name} --out")
        assert {"commit", "hardware", "software", "seed", "batch_size"} <= card.keys()
    assert card["start"]["card"]["images_seen"] == {"decoder": 8, "encoder": 8}
    assert sorted(f.name for f in out.iterdir()) == names  # no checkpoint remains


def test_decentred_network_starts_from_the_one_trained_here(out):
    main(["lsst-pixel", "--out", str(out), *TINY])
    card = json.loads((out / "lsst-pixel" / "card.json").read_text())
    ours = deblender.load("lsst", folder=out).card
    assert card["centring"] == "pixel"
    assert card["start"]["card"]["command"] == ours["command"]
    assert card["parts"]["decoder"]["file"] == "../lsst/decoder.safetensors"
    assert deblender.load("lsst-pixel", folder=out).trainings == [card]  # of its kind


def test_decentred_network_goes_on_from_itself_and_shares_still(out, tmp_path):
    for name in ("lsst", "lsst-pixel"):
        shutil.copytree(out / name, tmp_path / name)
    main(["lsst-pixel", "--start", "lsst-pixel", "--out", str(tmp_path), *TINY])
    card = deblender.load("lsst-pixel", folder=tmp_path).card
    assert card["start"]["card"]["centring"] == "pixel"
    assert card["parts"]["decoder"]["file"] == "../lsst/decoder.safetensors"


def test_a_decoder_that_others_share_is_not_replaced(out, tmp_path, capsys):
    for name in ("lsst", "lsst-pixel"):
        shutil.copytree(out / name, tmp_path / name)
    with pytest.raises(SystemExit):
        main(["lsst", "--out", str(tmp_path), *TINY])
    assert "lsst-pixel in" in (said := capsys.readouterr().err)
    assert "accepted: another --out, or" in said
    main(["lsst", "--start", "lsst", "--out", str(tmp_path), *TINY])
    deblender.load("lsst-pixel", folder=tmp_path)  # finds its decoder still


def test_a_network_goes_on_from_another(out, tmp_path):
    more = ["--start", str(out / "lsst"), "--calibration", "2"]
    main(["lsst", "--out", str(tmp_path), *more, *TINY])
    first, second = (deblender.load("lsst", folder=f) for f in (out, tmp_path))
    assert second.card["images_seen"] == {"vae": 0, "deblender": 8, "calibration": 16}
    assert second.card["start"]["card"] == first.card
    assert second.trainings == [first.card, second.card]
    assert second.images_seen == {"vae": 0, "deblender": 16, "calibration": 24}
    for old, new in zip(
        first.decoder.get_weights(), second.decoder.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(new, old)  # the components are those of the start


def test_the_papers_network_goes_on_from_its_own_weights(out, tmp_path):
    more = ["--start", str(out / "lsst-paper")]
    main(["lsst-paper", "--out", str(tmp_path), *more, *TINY])
    first, second = (deblender.load("lsst-paper", folder=f) for f in (out, tmp_path))
    assert second.trainings == [first.card, second.card]  # no warm start between them
    assert second.images_seen == {"vae": 16, "deblender": 16}
    assert second.codes_seen == first.codes_seen == {"decoder": 8, "encoder": 8}
    assert deblender.load("lsst", folder=out).codes_seen == {}
    for part in ("decoder", "deblender"):
        old, new = (getattr(n, part).get_weights()[0] for n in (first, second))
        assert 0 < np.abs(new - old).max() < 0.01  # few steps away


def test_the_papers_network_begins_with_no_more_bands_than_it_has(out, capsys):
    with pytest.raises(SystemExit):
        main(["lsst-paper", "--start", "lsst+euclid-paper", "--out", str(out), *TINY])
    said = capsys.readouterr().err
    assert (
        "for 'lsst+euclid' to begin with; accepted: a paper one for 'lsst' or" in said
    )


@pytest.mark.parametrize("name", ["lsst", "lsst-paper"])
def test_images_a_step_are_those_asked_for(name, out, tmp_path, monkeypatch):
    sizes, fit = [], training.fit

    def watched(model, batches, *args, **kwargs):
        sizes.append(batches.batch_size)
        return fit(model, batches, *args, **kwargs)

    monkeypatch.setattr(training, "fit", watched)
    more = ["--start", str(out / name), "--batch-size", "6", *TINY]
    main([name, "--out", str(tmp_path), *more])
    assert deblender.load(name, folder=tmp_path).card["batch_size"] == 6
    # Against bias each blend is seen four times, and no step has fewer images.
    assert sizes == ([6, 2] if name == "lsst" else [6, 6])


def test_a_network_goes_on_against_bias_alone(out, tmp_path):
    more = ["--start", str(out / "lsst"), "--calibration", "2", "--epochs", "0"]
    main(["lsst", "--out", str(tmp_path), *TINY, *more])
    card = deblender.load("lsst", folder=tmp_path).card
    assert card["images_seen"] == {"vae": 0, "deblender": 0, "calibration": 16}
    assert "deblender" not in card


def test_transfer_from_the_book_keeps_its_own_copy_of_the_prior(tmp_path):
    name = "lsst+euclid-realistic"
    main([name, "--out", str(tmp_path), *TINY])
    network = deblender.load(name, folder=tmp_path)
    assert network.survey.name == "lsst+euclid"
    assert (tmp_path / name / "decoder.safetensors").is_file()


def test_killed_between_its_stages_the_program_ends_with_the_same_bits(tmp_path):
    more = ["--n-train", "64", "--epochs", "2", "--calibration", "2", "--out"]
    command = [sys.executable, "-m", "deblender.train", "lsst", *TINY, *more]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    quiet = {"stderr": subprocess.DEVNULL}
    subprocess.run([*command, str(whole)], check=True, **quiet)
    stage = killed / "lsst.checkpoints" / "calibration"
    with subprocess.Popen([*command, str(killed)], **quiet) as process:
        while not (stage / "last.safetensors").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not (killed / "lsst").exists()
    log = json.loads((stage / "history.json").read_text())
    assert len(log["curve"]["val_loss"]) < 2
    subprocess.run([*command, str(killed)], check=True, **quiet)
    for part in ("deblender", "correlation"):
        file = Path("lsst") / f"{part}.safetensors"
        assert (whole / file).read_bytes() == (killed / file).read_bytes()


@pytest.mark.parametrize("name", ["lsst", "lsst-paper"])
def test_products_in_half_precision_leave_weights_and_answers_in_full(name, tmp_path):
    more = ["--precision", "mixed_bfloat16", "--out", str(tmp_path)]
    try:
        main([name, *more, *TINY])
    finally:
        keras.config.set_dtype_policy("float32")
    network = deblender.load(name, folder=tmp_path)
    rng = np.random.default_rng(1)
    image = network.deblend(rng.normal(0, 300, (2, 64, 64, 6))).image
    assert image.dtype == np.float32 and np.isfinite(image).all()
    for weights in (network.deblender.get_weights(), network.decoder.get_weights()):
        assert {w.dtype.name for w in weights} == {"float32"}


def test_a_vae_without_encoder_begins_with_the_deblender(tmp_path):
    book = deblender.load("lsst-peak-paper")
    assert book.encoder is None
    name = "lsst-peak-paper"
    main([name, "--start", name, "--out", str(tmp_path), *TINY])
    network = deblender.load(name, folder=tmp_path)
    old = book.deblender.get_weights()[4]
    new = network.encoder.get_weights()[4]
    assert 0 < np.abs(new - old).max() < 0.01  # few steps away


def test_a_card_names_the_commit_of_its_own_checkout_alone(monkeypatch):
    checkout = (Path(program.__file__).parents[2] / ".git").exists()  # not of a ZIP
    assert len(program._commit()) == (40 if checkout else 0)
    inside = Path(program.__file__).parent / "site-packages" / "train.py"
    monkeypatch.setattr(program, "__file__", str(inside))  # installed in a checkout
    assert program._commit() == ""


def test_every_network_of_the_book_has_a_recipe():
    assert set(deblender.weights.available()) == set(RECIPES)


def test_profile_gives_the_sizes_of_the_paper():
    assert sizes_of("paper") == Sizes(100_000, 20_000, 50)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["lsst", "--profile", "huge"], "'huge'; accepted: paper, quick"),
        (["lsst", "--catalogue", "/nowhere"], "galsim_download_cosmos"),
        (["sdss"], "invalid choice: 'sdss'"),
        (["lsst", "--seed", "-1"], "received --seed -1; accepted: 0 or more"),
        (["lsst", "--epochs", "0"], "received {'epochs': 0}; accepted: 1 or more"),
        (["lsst-paper", "--calibration", "1"], "accepted: a network without -paper"),
        (["lsst", "--start", "lsst-paper"], "received a paper network for 'lsst'"),
        (
            ["lsst+euclid", "--start", "lsst"],
            "a linear one for 'lsst+euclid'",
        ),
        (["lsst-paper", "--start", "lsst"], "accepted: a paper one for 'lsst'"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit):
        main([*arguments, "--out", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
