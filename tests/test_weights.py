"""Networks on disk: what is saved is what is loaded, and damage is noticed."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import deblender
from deblender import networks, weights
from deblender.batches import dihedral
from deblender.files import data_folder
from deblender.normalisation import Normalisation
from deblender.surveys import Survey


@pytest.fixture(scope="module")
def network():
    vae = networks.vae(6, seed=1)
    return weights.Network(
        deblender.survey("lsst"),
        Normalisation(np.full(6, 5000.0)),
        vae.encoder,
        vae.decoder,
        networks.deblender(vae.encoder, vae.decoder, seed=1).encoder,
        {"images_seen": {"vae": 0, "deblender": 0}},
    )


@pytest.fixture
def noisy():
    return np.random.default_rng(1).normal(0, 250, (3, 64, 64, 6)).astype(np.float32)


def test_what_is_saved_is_what_is_loaded(network, noisy, tmp_path):
    weights.save(network, tmp_path / "net")
    loaded = deblender.load(tmp_path / "net")
    before, after = network.deblend(noisy), loaded.deblend(noisy)
    np.testing.assert_allclose(after.latent_mean, before.latent_mean, atol=5e-3)
    np.testing.assert_array_equal(
        loaded.normalisation.scale, network.normalisation.scale
    )
    parts = ("decoder", "encoder", "deblender")
    files = {f"{part}.safetensors" for part in parts} | {weights.CARD}
    assert {f.name for f in (tmp_path / "net").iterdir()} == files


def test_a_network_can_be_saved_here(network, tmp_path, monkeypatch):
    (tmp_path / "net").mkdir()
    monkeypatch.chdir(tmp_path / "net")
    weights.save(network, ".")
    assert deblender.load(tmp_path / "net").survey == network.survey
    assert weights.checkpoints(Path(".")) == tmp_path / "net.checkpoints"


def test_a_decoder_can_be_shared(network, tmp_path):
    weights.save(network, tmp_path / "a")
    weights.save(network, tmp_path / "b", share={"decoder": "../a/decoder.safetensors"})
    assert not (tmp_path / "b" / "decoder.safetensors").exists()
    a, b = deblender.load(tmp_path / "a"), deblender.load(tmp_path / "b")
    for x, y in zip(a.decoder.weights, b.decoder.weights, strict=True):
        np.testing.assert_array_equal(x.numpy(), y.numpy())


def test_a_decoder_of_other_weights_is_not_shared(network, tmp_path):
    weights.save(network, tmp_path / "a")
    other = replace(network, decoder=networks.vae(6, seed=2).decoder)
    with pytest.raises(
        ValueError, match="of other weights .* decoder; accepted: a file"
    ):
        weights.save(
            other, tmp_path / "b", share={"decoder": "../a/decoder.safetensors"}
        )
    assert not (tmp_path / "b" / "card.json").exists()


def test_what_was_loaded_and_changed_has_a_card_of_its_own(network, tmp_path):
    weights.save(network, tmp_path / "a")
    changed = deblender.load(tmp_path / "a")
    changed.decoder.weights[0].assign(0 * changed.decoder.weights[0])
    weights.save(changed, tmp_path / "b")
    assert not deblender.load(tmp_path / "b").decoder.weights[0].numpy().any()


def test_a_survey_of_ones_own_is_not_forgotten(network, tmp_path):
    bands = [replace(b, exposure=b.exposure / 10) for b in network.survey.bands]
    own = replace(network, survey=Survey("lsst", tuple(bands)))
    assert copy.deepcopy(own).survey == own.survey != network.survey
    with pytest.raises(ValueError, match="'lsst' of its own; accepted: lsst, lsst"):
        weights.save(own, tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_damage_is_noticed(network, tmp_path):
    weights.save(network, tmp_path / "net")
    file = tmp_path / "net" / "decoder.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="missing or damaged"):
        deblender.load(tmp_path / "net")
    file.unlink()
    with pytest.raises(ValueError, match="missing or damaged"):
        deblender.load(tmp_path / "net")


def test_weights_of_other_shapes_are_refused(network, tmp_path):
    weights.save(network, tmp_path / "net")
    card = json.loads((tmp_path / "net" / "card.json").read_text())
    card["parts"]["decoder"] = card["parts"]["encoder"]
    (tmp_path / "net" / "card.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="holds shape .* accepted: "):
        deblender.load(tmp_path / "net")


def test_another_survey_is_refused(network, tmp_path):
    weights.save(network, tmp_path / "net")
    with pytest.raises(ValueError, match="is for survey 'lsst'; accepted here: 'lsst"):
        weights.load(tmp_path / "net", expect_survey="lsst+euclid")


def test_an_unknown_name_lists_what_there_is(tmp_path):
    with pytest.raises(ValueError, match=r"accepted: lsst, lsst\+euclid, "):
        deblender.load()
    with pytest.raises(ValueError, match="no trained network 'des' in .*accepted: "):
        deblender.load("des")


def test_bad_stamps_are_refused(network, noisy):
    with pytest.raises(ValueError, match="NaN or infinity"):
        network.deblend(np.where(noisy > 500, np.nan, noisy))
    with pytest.raises(ValueError, match="survey 'lsst' accepts"):
        network.deblend(noisy[..., :5])
    with pytest.raises(ValueError, match="no stamps; accepted: one or more"):
        network.deblend(noisy[:0])


@pytest.mark.parametrize("name", ["lsst", "lsst-paper"])
def test_a_stamp_is_deblended_alike_alone_and_among_others(name):
    rng, n = np.random.default_rng(2), 2 * weights.BATCH + 5
    noisy = rng.normal(0, 250, (n, 64, 64, 6)).astype(np.float32)
    among = deblender.load(name).deblend(noisy)
    for few in (slice(0, 1), slice(40, 60), slice(n - 5, n)):
        alone = deblender.load(name).deblend(noisy[few])  # compiles for them
        np.testing.assert_array_equal(alone.latent_mean, among.latent_mean[few])
        np.testing.assert_array_equal(alone.image, among.image[few])


@pytest.mark.parametrize("name", ["lsst", "lsst-paper"])
def test_a_turned_stamp_gives_the_turned_image_when_seen_from_all_sides(name):
    one, all_sides = deblender.load(name), deblender.load(name)
    all_sides.sides = 8
    rng = np.random.default_rng(4)
    noisy = rng.normal(0, 250, (2, 64, 64, 6)).astype(np.float32)
    noisy[:, 30:34, 30:36] += 2000
    for element in (1, 6):
        turned = dihedral(noisy, [element, element])
        ours, theirs = (n.deblend(turned).image for n in (all_sides, one))
        plain, alone = (n.deblend(noisy).image for n in (all_sides, one))
        atol = 1e-4 * np.abs(plain).max()
        np.testing.assert_allclose(ours, dihedral(plain, [element] * 2), atol=atol)
        assert np.abs(theirs - dihedral(alone, [element] * 2)).max() > 10 * atol


def test_several_sides_give_means_of_turned_back_images(network, noisy):
    pair = replace(network, sides=2).deblend(noisy, n_samples=2)
    plain = network.deblend(noisy, n_samples=2)
    turned = network.deblend(np.rot90(noisy, axes=(1, 2))).image
    expected = (plain.image + np.rot90(turned, -1, axes=(1, 2))) / 2
    np.testing.assert_allclose(pair.image, expected, rtol=1e-4, atol=1e-2)
    np.testing.assert_array_equal(pair.latent_mean, plain.latent_mean)
    np.testing.assert_array_equal(pair.samples, plain.samples)
    with pytest.raises(ValueError, match="received 3 sides; accepted: 1, 2, 4 or 8"):
        replace(network, sides=3).deblend(noisy)


def test_samples_scatter_around_the_mean(network, noisy):
    result = network.deblend(noisy, n_samples=4)
    assert result.samples.shape == (4, *noisy.shape)
    assert result.image.shape == noisy.shape
    assert not np.array_equal(result.samples[0], result.samples[1])
    again = network.deblend(noisy, n_samples=4)
    np.testing.assert_array_equal(result.samples, again.samples)


def test_no_deblender_yet(network, noisy):
    with pytest.raises(ValueError, match="VAE only"):
        replace(network, deblender=None).deblend(noisy)


def test_generated_galaxies_are_images(network):
    images = network.generate(2, np.random.default_rng(1))
    assert images.shape == (2, 64, 64, 6) and np.isfinite(images).all()


@pytest.mark.parametrize("name", weights.available())
def test_published_networks_load(name):
    loaded = deblender.load(name)
    assert loaded.deblender is not None
    assert sum(loaded.images_seen.values()) > 0


def test_published_networks_are_small_enough_to_clone():
    files = weights._weights_folder().rglob("*")
    assert sum(file.stat().st_size for file in files if file.is_file()) < 90e6


def test_kept_numbers_of_real_galaxies_are_of_the_published_networks():
    kept = json.loads(
        (data_folder("results", "data/results") / "real.json").read_text()
    )
    cards = weights._weights_folder().glob(f"*/{weights.CARD}")
    parts = [json.loads(card.read_text())["parts"] for card in cards]
    published = {of["deblender"]["sha256"][:12] for of in parts}
    assert kept["networks"] and set(kept["networks"].values()) <= published


def test_a_card_is_for_reading(network, tmp_path):
    network.card["curve"] = {"images": [64, 128], "loss": [2.5, 1.0]}
    weights.save(network, tmp_path / "net")
    text = (tmp_path / "net" / weights.CARD).read_text()
    assert '"images": [ 64, 128 ],' in text  # on one line
    assert deblender.load(tmp_path / "net").card["curve"] == network.card.pop("curve")


def test_a_card_keeps_less_of_the_curves_of_earlier_trainings(network, tmp_path):
    curve = {"images": [64], "loss": [2.5], "val_loss": [2.0, 3.0], "slope": [0.1, 0.2]}
    stage = {"curve": curve, "kept": 1}
    own = {key: None for key in weights.ALIKE} | {"centring": "exact"}
    own |= {"survey": "lsst", "architecture": network.architecture}
    card = other = own | {"centring": "peak", "vae": dict(stage)}
    for _ in range(3):
        card = own | {"vae": dict(stage), "start": {"card": card}}
    network.card = card
    weights.save(network, tmp_path / "net")
    first, second, last = deblender.load(tmp_path / "net").trainings
    assert last["vae"] == first["vae"] == stage
    epochs = {"val_loss": [2.0, 3.0], "slope": [0.1, 0.2]}
    assert second["vae"] == {"curve": epochs, "kept": 1}
    assert first["start"]["card"]["vae"] == {"val_loss": 2.0, "kept": 1}
    assert other["vae"] == stage  # as it was


def test_names_in_a_folder_are_those_of_that_folder_alone(network, tmp_path):
    weights.save(network, tmp_path / "mine")
    loaded = deblender.load("mine", folder=tmp_path)
    assert loaded.survey.name == "lsst"
    with pytest.raises(ValueError, match="'lsst' in .*; accepted: mine, or a folder"):
        deblender.load("lsst", folder=tmp_path)
