"""Other deblenders: truth in, truth out; SEP on easy galaxies; similarity."""

from dataclasses import replace

import numpy as np
import pytest
from astropy.table import Table

import deblender
from deblender import peers
from deblender.peers import Answer, similarity


@pytest.fixture(scope="module")
def blends(synthetic):
    return deblender.simulate(synthetic, deblender.survey("lsst"), 60, seed=5)


@pytest.fixture(scope="module")
def bright(synthetic):
    """Isolated galaxies that SEP cannot miss, and that fit into their stamps."""
    scenes = deblender.simulate(synthetic, deblender.survey("lsst"), 200, 1, seed=6)
    snr = scenes.truth["snr"]
    return scenes.take(np.flatnonzero((snr > 100) & (snr < 300))[:10])


def truth(scenes):
    return Answer.of(scenes.target.copy(), len(scenes))


def test_places_are_those_of_the_light(synthetic):
    """The centroid of each galaxy, drawn alone, is where `places` says."""
    survey = deblender.survey("lsst")
    scenes = deblender.simulate(synthetic, survey, 20, 3, "pixel", seed=7)
    y, x = np.mgrid[:64, :64]
    for i, places in enumerate(scenes.places):
        rows = np.arange(scenes.first[i], scenes.first[i + 1])
        images = scenes.compose(rows)[..., survey.index("r")].astype(float)
        images *= np.hypot(y - 31.5, x - 31.5) < 25  # wings leave the stamp unevenly
        total = images.sum(axis=(1, 2))
        found = [(images * g).sum(axis=(1, 2)) / total for g in (y, x)]
        np.testing.assert_allclose(np.transpose(found), places, atol=0.3)
        assert len(places) == scenes.counts[i]


def test_truth_scores_best(blends):
    table = peers.score(truth(blends), blends)
    np.testing.assert_allclose(table["dr"], 0, atol=1e-6)
    np.testing.assert_allclose(table["dgr"], 0, atol=1e-6)
    np.testing.assert_allclose(table["ssim"], 1, atol=1e-6)
    np.testing.assert_allclose(table["cosine"], 1, atol=1e-6)
    numbers = peers.summary(table)
    assert numbers["outliers"] == 0 and numbers["seconds"] == 1
    assert numbers["slope"] == pytest.approx(0, abs=1e-6)


def test_known_errors_of_flux_are_found(blends):
    answer = truth(blends)
    answer.flux[:, blends.survey.index("r")] *= 10 ** (-0.4 * 0.3)
    table = peers.score(answer, blends)
    np.testing.assert_allclose(table["dr"], 0.3, atol=1e-6)
    np.testing.assert_allclose(table["dgr"], -0.3, atol=1e-6)


def test_no_answer_is_a_failure(blends):
    answer = truth(blends)
    lost = np.argmax(blends.truth["snr"] > 20)
    answer.images[lost], answer.flux[lost] = np.nan, np.nan
    table = peers.score(answer, blends)
    for name in ("dr", "dgr", "de", "ssim", "cosine"):
        assert np.isnan(table[name][lost]), name
    whole = peers.summary(peers.score(truth(blends), blends))
    numbers = peers.summary(table)
    counted = ((table["snr"] >= 10) & (table["snr"] < 3000)).sum()
    assert numbers["failed"] == pytest.approx(whole["failed"] + 1 / counted)
    assert numbers["outliers"] == pytest.approx(1 / counted)


def test_nothing_keeps_the_neighbours(blends):
    table = peers.score(peers.nothing(blends), blends)
    hard = np.asarray(table["b_total"] > 0.1)
    assert np.nanmedian(table["dr"][hard]) < -0.1  # too bright


@pytest.mark.parametrize("flux", peers.EXTRACTIONS)
def test_sep_measures_isolated_galaxies(bright, flux):
    answer = peers.sep(bright, **peers.EXTRACTIONS[flux])
    assert (answer.seconds > 0).all()
    table = peers.score(answer, bright)
    assert np.isfinite(table["dr"]).all()
    # Apertures end before the light does: too faint, by no more than a third.
    assert 0 < np.median(table["dr"]) < 0.35
    assert np.median(np.abs(table["dgr"])) < 0.1
    if flux == "isophotal":
        assert (answer.images == 0).all(axis=3).mean() > 0.5  # all but a galaxy


def test_sep_finds_nothing_in_empty_stamps(bright):
    few = bright.take(np.arange(3))
    settings = peers.EXTRACTIONS["isophotal"] | {"threshold": 5.0}
    answer = peers.sep(replace(few, flux=np.zeros_like(few.flux)), **settings)
    assert np.isnan(answer.flux).all() and np.isnan(answer.images).all()
    assert np.isfinite(answer.seconds).all()


def test_cameras_of_other_pixels_are_refused(synthetic):
    scenes = deblender.simulate(synthetic, deblender.survey("lsst+euclid"), 2, seed=5)
    with pytest.raises(ValueError, match="of cameras LSST, VIS, NISP; accepted: one"):
        peers.sep(scenes, **peers.EXTRACTIONS["isophotal"])


def scattered(rng, n=400, width=0.1):
    """A table of `score` whose errors are normal."""
    names = ("dr", "dgr", "de", "e1_in", "e2_in", "ssim", "cosine", "seconds")
    table = Table({name: rng.normal(0, width, n) for name in names})
    table["e1_out"], table["e2_out"] = table["e1_in"], table["e2_in"]
    table["snr"] = 100.0
    return table


def test_errors_of_a_summary_are_its_scatter_from_table_to_table():
    rng = np.random.default_rng(2)
    found = peers.summary_errors(scattered(rng), rng)
    drawn = [peers.summary(scattered(rng)) for _ in range(300)]
    for name in ("median_dr", "sigma_dr", "sigma_de"):
        expected = np.std([numbers[name] for numbers in drawn])
        assert found[name] == pytest.approx(expected, rel=0.35), name
    assert found["slope"] == pytest.approx(0, abs=1e-9)


def test_errors_of_a_difference_leave_out_what_both_tables_share():
    rng = np.random.default_rng(3)
    table, other = scattered(rng), scattered(rng)
    alike = table.copy()
    alike["dr"] += rng.normal(0, 0.01, len(table))
    alone = peers.summary_errors(table, rng)["sigma_dr"]
    assert peers.summary_errors(table, rng, minus=table)["sigma_dr"] == 0
    assert peers.summary_errors(table, rng, minus=alike)["sigma_dr"] < 0.5 * alone
    apart = peers.summary_errors(table, rng, minus=other[:200])["sigma_dr"]
    assert apart > 1.2 * alone


def test_an_answer_of_images_has_their_fluxes(blends):
    answer = Answer.of(blends.target, seconds=6.0)
    np.testing.assert_allclose(answer.flux, blends.target.sum(axis=(1, 2)), rtol=1e-5)
    assert answer.seconds.sum() == pytest.approx(6.0)


def test_similarity_in_closed_form():
    rng = np.random.default_rng(1)
    image = rng.random((32, 32))
    assert similarity(image, image) == pytest.approx((1, 1))
    assert similarity(3 * image, image)[1] == pytest.approx(1)
    # Two constants a and b: variances vanish, and (2ab + c) / (a^2 + b^2 + c) is left.
    flat = np.ones((32, 32))
    c = 0.01**2
    expected = (2 * 0.5 + c) / (0.25 + 1 + c)
    assert similarity(0.5 * flat, flat)[0] == pytest.approx(expected)
    assert np.isnan(similarity(np.nan * flat, flat)).all()
    assert np.isnan(similarity(0 * flat, flat)[1])


def test_kept_results_must_be_of_the_same_scenes(blends, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "data_folder", lambda *_: tmp_path)
    with pytest.raises(ValueError, match="no results 'scarlet2-prior'; accepted: none"):
        peers.kept("prior", blends)
    table = Table({"r_mag": blends.truth["r_mag"][:20]})
    table.meta |= {"scenes": "seed 5", "settings": peers.settings("prior")}
    table.write(tmp_path / "scarlet2-prior.ecsv")
    assert len(peers.kept("prior", blends)) == 20
    assert len(peers.kept("prior", blends.take(np.arange(5)))) == 5
    with pytest.raises(ValueError, match="of other scenes .* accepted: seed 5"):
        peers.kept("prior", blends.take(np.arange(1, 60)))
    monkeypatch.setattr(peers, "TEMPERATURE", 0.02)
    with pytest.raises(ValueError, match="temperature 0.1; accepted: .* 0.02"):
        peers.kept("prior", blends)
