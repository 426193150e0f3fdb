"""The deblender inside BlendingToolKit: `make bench-test`."""

import btk
import btk.metrics.reconstruction as metrics
import numpy as np
import pytest

import deblender
from bench import CATSIM
from btk_deblender import NetworkDeblender, btk_survey


@pytest.fixture(scope="module")
def blends():
    galaxies = btk.catalog.CatsimCatalog.from_file(str(CATSIM))
    sampling = btk.sampling_functions.DefaultSampling(
        stamp_size=12.8, max_number=3, max_shift=2.0, seed=3, max_mag=24.5
    )
    survey = btk_survey(deblender.survey("lsst"))
    return next(
        btk.draw_blends.CatsimGenerator(galaxies, sampling, survey, batch_size=12)
    )


def test_survey_has_our_noise_and_bands(blends):
    survey = deblender.survey("lsst")
    assert tuple(blends.survey.available_filters) == survey.band_names
    edge = blends.blend_images[:, :, :12]  # (blend, band, y, x), mostly sky
    measured = np.median(edge.std(axis=(2, 3)), axis=0)
    np.testing.assert_allclose(measured, np.sqrt(survey.sky), rtol=0.1)


def test_answers_are_those_of_btk_and_resemble_the_galaxies(blends):
    answers = NetworkDeblender(max_n_sources=3)(blends)
    assert answers.deblended_images.shape == blends.isolated_images.shape
    r = blends.survey.available_filters.index("r")
    cosines = []
    for truth, found in zip(
        blends.isolated_images[:, :, r], answers.deblended_images[:, :, r], strict=True
    ):
        brightest = truth.sum(axis=(1, 2)).argmax()
        a, b = truth[brightest].ravel(), found[brightest].ravel()
        cosines.append(a @ b / np.sqrt((a @ a) * (b @ b)))
    assert np.median(cosines) > 0.98


def test_metrics_of_btk_prefer_the_answers_to_the_blends(blends):
    answers = NetworkDeblender(max_n_sources=3)(blends).deblended_images
    r = blends.survey.available_filters.index("r")
    truth, answers = blends.isolated_images[:, :, r], answers[:, :, r]
    there = truth.any(axis=(2, 3), keepdims=True)  # (blend, galaxy, y, x)
    nothing = np.where(there, blends.blend_images[:, None, r], 0)
    # PSNR wants no pixel below zero.
    truth, answers, nothing = (
        np.maximum(each, 0) for each in (truth, answers, nothing)
    )
    for metric, better in ((metrics.MSE, np.less), (metrics.PSNR, np.greater)):
        ours, theirs = (metric(len(truth))(truth, each) for each in (answers, nothing))
        assert better(ours, theirs), (metric, ours, theirs)
