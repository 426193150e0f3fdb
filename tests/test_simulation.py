"""Physics of the scenes: flux, noise, positions, targets, seeds."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import galsim
import numpy as np
import pytest
from scipy import stats

import deblender
from deblender import simulation
from deblender.catalogues import cache_folder
from deblender.simulation import CHUNK, add_noise, simulate
from deblender.surveys import Survey


@pytest.fixture(scope="module")
def blends(synthetic):
    return simulate(synthetic, deblender.survey("lsst+euclid"), 80, seed=5)


@pytest.fixture(scope="module")
def isolated(synthetic):
    return simulate(synthetic, deblender.survey("lsst"), 200, max_galaxies=1, seed=5)


def test_form(blends):
    for images in (blends.target, blends.blend, blends.noisy):
        assert images.shape == (80, 64, 64, 10)
        assert images.dtype == np.float32


def test_flux_is_conserved(isolated, synthetic):
    """Small galaxies keep 1 % of the light that their magnitude stands for."""
    survey, truth = isolated.survey, isolated.truth
    radius = np.array(
        [synthetic.source.param_cat["hlr"][i, 0] for i in truth["galaxy_id"]]
    )
    small = (radius < 0.35) & (
        np.array(
            [synthetic.source.param_cat["sersicfit"][i, 2] for i in truth["galaxy_id"]]
        )
        < 1.5
    )
    assert small.sum() > 20
    magnitudes = synthetic.magnitudes(survey)[truth["galaxy_id"]]
    for k, band in enumerate(survey.bands):
        total = isolated.target[..., k].sum(axis=(1, 2), dtype=float)
        np.testing.assert_allclose(
            total[small], band.electrons(magnitudes[small, k]), rtol=0.01
        )


def test_stamps_are_those_of_galsim(blends, synthetic):
    """Against drawImage at GalSim's default accuracy: 1e-3 of the peak."""
    task_angles = _angles(blends, synthetic)
    for k, instrument in enumerate(blends.survey.instruments):
        band = int(np.flatnonzero(blends.survey.instrument_of_band == k)[0])
        for scene in range(12):
            row = int(blends.truth["galaxy_id"][scene])
            profile = synthetic.source.makeGalaxy(row).withFlux(1)
            profile = profile.rotate(task_angles[scene] * galsim.radians)
            exact = galsim.Convolve(profile, instrument.psf).drawImage(
                nx=64, ny=64, scale=instrument.pixel_scale, dtype=float
            )
            ours = (
                blends.target[scene, ..., band] / blends.flux[blends.first[scene], band]
            )
            difference = np.abs(ours - exact.array).max() / exact.array.max()
            assert difference < 1e-3, (instrument.name, scene)


def _angles(scenes, catalogue):
    task = simulation._Task(
        (catalogue.name, False, catalogue.digest), scenes.survey, len(scenes), 4,
        "exact", 5, "test", (0.0, 0.0), None,
    )  # fmt: skip
    painter = simulation._Painter(task)
    return [painter.arrange(i, int(n)).angles[0] for i, n in enumerate(task.counts())]


def test_noise_variance_is_sky_plus_source():
    sky = np.array([350.0, 65_000.0])
    source = np.full((200, 200, 2), 1_000.0)
    noisy = add_noise(source, sky, np.random.default_rng(1))
    np.testing.assert_allclose(noisy.mean(axis=(0, 1)), 1_000, atol=6)
    np.testing.assert_allclose(noisy.var(axis=(0, 1)), sky + 1_000, rtol=0.02)
    empty = add_noise(np.zeros((1000, 1000, 2)), sky, np.random.default_rng(2))
    np.testing.assert_allclose(empty.var(axis=(0, 1)), sky, rtol=0.01)


@pytest.mark.parametrize("mean", [0.5, 20.0, 60.0, 350.0, 65_000.0])
def test_noise_has_the_distribution_of_poisson(mean):
    n = 1_000_000
    sky = np.array([mean], dtype=np.float32)
    counts = add_noise(np.zeros((n, 1)), sky, np.random.default_rng(3)) + sky
    counts = np.sort(np.rint(counts[:, 0]))
    values = np.unique(counts)
    ours = np.searchsorted(counts, values, side="right") / n
    difference = np.abs(ours - stats.poisson.cdf(values, mean)).max()
    assert difference < 1e-3 + 1.5 / np.sqrt(n)  # what a sample of n has by itself


def test_equal_generators_give_equal_noise_to_nearly_equal_images():
    sky = np.array([350.0], dtype=np.float32)
    bright = np.full((100, 100, 1), 500.0)
    first, second = (
        add_noise(bright * factor, sky, np.random.default_rng(4))
        for factor in (1.0, 1.01)
    )
    assert np.std(second - first) < 0.05 * np.std(first)


def test_no_galaxy_is_an_empty_image(blends):
    """Isolated targets have no neighbours to compose."""
    assert not blends.compose(np.array([[-1, -1, -1], [-1, -1, -1]])).any()
    one, other = blends.compose(np.array([[-1, 3], [3, -1]]))
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(one, blends.compose(np.array([3]))[0])


def test_neighbours_are_in_the_annulus_and_fainter(blends, synthetic):
    truth = blends.truth
    distance = np.hypot(truth["neighbour_dx"], truth["neighbour_dy"])
    present = np.isfinite(distance)
    np.testing.assert_array_equal(present.sum(axis=1), truth["n_galaxies"] - 1)
    assert distance[present].min() >= 0.325 and distance[present].max() <= 2.0
    # Uniform in area: the mean of r^2 is halfway between the squared radii.
    assert np.mean(distance[present] ** 2) == pytest.approx(
        (0.325**2 + 4) / 2, rel=0.15
    )
    assert (truth["dmag"][truth["n_galaxies"] > 1] >= 0).all()
    lsst = deblender.survey("lsst")
    r_mag = synthetic.magnitudes(lsst)[:, 2]
    neighbours = truth["neighbour_id"][present]
    owners = np.repeat(truth["r_mag"], truth["n_galaxies"] - 1)
    assert (r_mag[neighbours] >= owners).all()


def test_number_of_galaxies_is_uniform(blends):
    counts = simulation._Task(
        ("", False, ""), blends.survey, 40_000, 4, "exact", 1, "test", (0.0, 0.0), None
    ).counts()
    np.testing.assert_allclose(np.bincount(counts)[1:] / 40_000, 0.25, atol=0.01)
    np.testing.assert_array_equal(blends.counts, blends.truth["n_galaxies"])


def test_blend_is_the_sum_of_its_galaxies(blends):
    for scene in (0, 1, 2, 3):
        rows = np.arange(blends.first[scene], blends.first[scene + 1])
        total = blends.compose(rows).sum(axis=0)
        np.testing.assert_allclose(blends.blend[scene], total, rtol=1e-4, atol=1e-2)


def test_truth_is_that_of_the_images(blends):
    """Signal-to-noise ratio, blendedness and magnitudes, from the images themselves."""
    r, truth = blends.survey.reference_index, blends.truth
    magnitude = blends.survey.reference.magnitude
    for i in range(20):
        rows = np.arange(blends.first[i], blends.first[i + 1])
        images = blends.compose(rows)[..., r].astype(float)  # (galaxy, y, x)
        target, total = images[0], images.sum(axis=0)
        variance = target + blends.survey.sky[r]
        snr = np.sqrt((target**2 / variance).sum())
        assert truth["snr"][i] == pytest.approx(snr, rel=1e-3)
        overlap = 1 - (target**2).sum() / (target * total).sum()
        assert truth["b_total"][i] == pytest.approx(overlap, abs=1e-4)
        if len(rows) == 1:
            assert np.isnan(truth["dmag"][i]) and truth["b_closest"][i] == 0
            continue
        distance = np.hypot(truth["neighbour_dx"][i], truth["neighbour_dy"][i])
        k = int(np.nanargmin(distance))
        closest = images[1 + k]
        cosine = (target * closest).sum()
        cosine /= np.sqrt((target**2).sum() * (closest**2).sum())
        assert truth["b_closest"][i] == pytest.approx(cosine, abs=1e-4)
        fluxes = blends.flux[[rows[0], rows[1 + k]], r]
        dmag = np.diff(magnitude(fluxes))[0]
        assert truth["dmag"][i] == pytest.approx(dmag, abs=1e-3)
    assert (blends.counts[:20] > 2).any(), "the closest is one of several"


def test_pixel_centring_is_uniform_in_a_pixel(synthetic):
    truth = simulate(synthetic, deblender.survey("lsst"), 200, 1, "pixel", seed=2).truth
    for name in ("dx", "dy"):
        assert np.abs(truth[name]).max() <= 0.1
        assert np.std(truth[name]) == pytest.approx(0.2 / np.sqrt(12), rel=0.15)


def test_peak_centring_puts_a_detected_peak_at_the_centre(synthetic):
    scenes = simulate(synthetic, deblender.survey("lsst"), 60, 4, "peak", seed=2)
    distance = np.hypot(scenes.truth["dx"], scenes.truth["dy"])
    assert distance.max() < simulation.MATCH_RADIUS
    # Most targets lie within a pixel of the detected corner.
    assert np.median(distance) < 0.2
    bright = scenes.truth["snr"] > 100
    r = scenes.noisy[bright][..., 2]
    centre = r[:, 30:34, 30:34].max(axis=(1, 2))
    assert np.mean(centre >= r.max(axis=(1, 2))) > 0.9


def test_isolated_peak_centring_draws_from_the_fitted_offsets(synthetic, monkeypatch):
    monkeypatch.setattr(simulation, "centring_offsets", lambda *_: (3.0, 8.0, 0.0, 0.3))
    scenes = simulate(synthetic, deblender.survey("lsst"), 400, 1, "peak", seed=2)
    distance = np.hypot(scenes.truth["dx"], scenes.truth["dy"])
    mean = 0.3 * 3 / 7  # of the beta prime distribution: a / (b - 1)
    assert np.mean(distance) == pytest.approx(mean, rel=0.1)


def test_shear_is_the_shear_applied(synthetic):
    survey = deblender.survey("lsst")
    plain = simulate(synthetic, survey, 100, 1, seed=7)
    sheared = simulate(synthetic, survey, 100, 1, seed=7, shear=(0.01, 0.0))
    bright = plain.truth["snr"] > 20
    change = (sheared.truth["e1"] - plain.truth["e1"])[bright]
    assert np.nanmean(change) == pytest.approx(0.01, rel=0.25)
    np.testing.assert_array_equal(plain.truth["galaxy_id"], sheared.truth["galaxy_id"])


def test_same_seed_same_bits_whatever_the_processes(synthetic, tmp_path, monkeypatch):
    survey = deblender.survey("lsst")
    made = []
    for processes in (1, 2):
        monkeypatch.setenv("DEBLENDER_CACHE", str(tmp_path / str(processes)))
        _share_catalogues(tmp_path / str(processes), monkeypatch)
        scenes = simulate(synthetic, survey, 2 * CHUNK, 1, seed=9, processes=processes)
        made.append(scenes)
    one, two = made
    np.testing.assert_array_equal(one.stamps["LSST"], two.stamps["LSST"])
    np.testing.assert_array_equal(one.noisy[:20], two.noisy[:20])
    assert one.truth.colnames == two.truth.colnames


def test_interrupted_work_resumes(synthetic, tmp_path, monkeypatch):
    survey = deblender.survey("lsst")
    monkeypatch.setenv("DEBLENDER_CACHE", str(tmp_path))
    _share_catalogues(tmp_path, monkeypatch)
    paint, starts = simulation._Painter.paint, []

    def paint_once(self, start, counts):
        if starts:
            raise KeyboardInterrupt
        starts.append(start)
        return paint(self, start, counts)

    simulation._painter.cache_clear()
    monkeypatch.setattr(simulation._Painter, "paint", paint_once)
    with pytest.raises(KeyboardInterrupt):
        simulate(synthetic, survey, 2 * CHUNK, 1, seed=11, processes=1)
    left = {f.suffix for f in (tmp_path / "scenes").iterdir()}
    assert left == {".partial", ".lock"}
    drawn = []
    monkeypatch.setattr(
        simulation._Painter,
        "paint",
        lambda self, start, counts: drawn.append(start) or paint(self, start, counts),
    )
    resumed = simulate(synthetic, survey, 2 * CHUNK, 1, seed=11, processes=1)
    assert drawn == [CHUNK]  # the first chunk was kept
    monkeypatch.setenv("DEBLENDER_CACHE", str(tmp_path / "again"))
    _share_catalogues(tmp_path / "again", monkeypatch)
    whole = simulate(synthetic, survey, 2 * CHUNK, 1, seed=11, processes=1)
    np.testing.assert_array_equal(resumed.stamps["LSST"], whole.stamps["LSST"])


def test_stopped_at_the_very_end_nothing_is_drawn_again(
    synthetic, tmp_path, monkeypatch
):
    survey, setting = deblender.survey("lsst"), {"seed": 12, "processes": 1}
    monkeypatch.setenv("DEBLENDER_CACHE", str(tmp_path))
    _share_catalogues(tmp_path, monkeypatch)
    whole = simulate(synthetic, survey, 3, 1, **setting)
    rename, paint = os.replace, simulation._Painter.paint

    def stop(source, target):
        if Path(source).suffix == ".partial":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        simulate(synthetic, survey, 4, 1, **setting)
    monkeypatch.setattr(os, "replace", rename)
    monkeypatch.setattr(simulation._Painter, "paint", None)
    resumed = simulate(synthetic, survey, 4, 1, **setting)
    monkeypatch.setattr(simulation._Painter, "paint", paint)
    np.testing.assert_array_equal(resumed.flux[:3], whole.flux)
    assert not list((tmp_path / "scenes").glob("*/chunk-*"))


def test_offsets_are_drawn_by_as_many_processes(synthetic, monkeypatch):
    asked = []

    def simulated(*args, processes, client, **kwargs):
        asked.append((processes, client))
        return SimpleNamespace(truth={"dx": np.ones(90), "dy": np.arange(90.0)})

    monkeypatch.setattr(simulation, "simulate", simulated)
    simulation._offsets(synthetic, 1, "peak", 3, None)
    assert asked == [(3, None)]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no such call here")
def test_a_full_disk_is_noticed_every_time(synthetic, tmp_path, monkeypatch):
    monkeypatch.setenv("DEBLENDER_CACHE", str(tmp_path))
    _share_catalogues(tmp_path, monkeypatch)

    def full(*_):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "posix_fallocate", full)
    for _ in range(2):
        with pytest.raises(OSError, match="no space left"):
            simulate(synthetic, deblender.survey("lsst"), 5, 1, seed=11, processes=1)


def test_the_same_scenes_are_drawn_once_by_two(synthetic, tmp_path, monkeypatch):
    survey = deblender.survey("lsst")
    monkeypatch.setenv("DEBLENDER_CACHE", str(tmp_path))
    _share_catalogues(tmp_path, monkeypatch)
    draw_all, drawn = simulation._draw_all, []
    monkeypatch.setattr(
        simulation, "_draw_all", lambda *x: drawn.append(x) or draw_all(*x)
    )
    ask = partial(simulate, synthetic, survey, 50, 1, seed=12, processes=1)
    with ThreadPoolExecutor(2) as two:
        one, other = [future.result() for future in [two.submit(ask) for _ in "ab"]]
    assert len(drawn) == 1
    np.testing.assert_array_equal(one.stamps["LSST"], other.stamps["LSST"])


def _share_catalogues(folder, monkeypatch):
    """Let an empty cache read the catalogues that are drawn already."""
    folder.mkdir(parents=True, exist_ok=True)
    for drawn in SHARED.glob("synthetic-*"):
        (folder / drawn.name).symlink_to(drawn)


SHARED = cache_folder()


def test_a_survey_of_ones_own_gets_its_own_fluxes(synthetic, isolated):
    """Other bands and a tenth of the exposure under the name of another survey."""
    g, r, i = isolated.survey.bands[1:4]
    g = replace(g, exposure=g.exposure / 10)
    scenes = simulate(synthetic, Survey("lsst", (g, r, i)), 20, 1, seed=5)
    expected = isolated.flux[:20, 1:4] * [0.1, 1, 1]
    np.testing.assert_allclose(scenes.flux, expected, rtol=1e-5)
    assert scenes.survey.band_names == ("g", "r", "i")


def test_batches_and_take_keep_the_noise(blends):
    some = blends.take([7, 3])
    np.testing.assert_array_equal(some.noisy, blends.noisy[[7, 3]])
    joined = np.concatenate([b.target for b in blends.batches(50)])
    np.testing.assert_array_equal(joined, blends.target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"centring": "centroid"}, "unknown centring 'centroid'; accepted: exact"),
        ({"split": "dev"}, "unknown split 'dev'; accepted: train"),
        ({"n_scenes": 0}, "received n_scenes=0"),
        ({"max_galaxies": 0}, "max_galaxies=0"),
        ({"seed": -1}, "seed=-1; accepted: .* 0 or more"),
        ({"shear": (1.0, 0.5)}, r"received shear=\(1.0, 0.5\)"),
    ],
)
def test_bad_arguments_are_refused(synthetic, change, message):
    arguments = {"n_scenes": 10} | change
    with pytest.raises(ValueError, match=message):
        simulate(synthetic, deblender.survey("lsst"), **arguments)


def test_a_split_without_galaxies_is_refused(synthetic, monkeypatch):
    monkeypatch.setattr(type(synthetic), "split", lambda *_: np.array([], int))
    with pytest.raises(ValueError, match="'synthetic' of .* none in its split 'test'"):
        simulate(synthetic, deblender.survey("lsst"), 10, seed=123)
