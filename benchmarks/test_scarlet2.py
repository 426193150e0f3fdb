"""scarlet2 as chapter 7 runs it, on easy galaxies: `make bench-test`."""

import numpy as np
import pytest

import deblender
from deblender import peers


@pytest.fixture(scope="module")
def isolated():
    """Galaxies alone in their stamps, neither faint nor very bright."""
    galaxies, survey = deblender.catalogue("synthetic"), deblender.survey("lsst")
    scenes = deblender.simulate(galaxies, survey, 100, 1, seed=6)
    snr = scenes.truth["snr"]
    return scenes.take(np.flatnonzero((snr > 60) & (snr < 120))[:4])


@pytest.mark.parametrize("morphology", peers.FITS)
def test_isolated_galaxies_keep_flux_and_colour(isolated, morphology):
    answer = peers.scarlet2(isolated, morphology, **peers.FITS[morphology])
    table = peers.score(answer, isolated)
    assert (np.abs(table["dr"]) < 0.2).all()
    assert (np.abs(table["dgr"]) < 0.1).all()
    assert (table["cosine"] > 0.98).all()


def test_fit_of_a_bright_blend_has_settled():
    """With twice as many steps it ends in the same place."""
    galaxies, survey = deblender.catalogue("synthetic"), deblender.survey("lsst")
    scenes = deblender.simulate(galaxies, survey, 60, seed=7, split="validation")
    hard = (scenes.truth["snr"] > 150) & (scenes.truth["n_galaxies"] > 2)
    one, settings = scenes.take(np.flatnonzero(hard)[:1]), peers.FITS["sersic"]
    doubled = settings | {"steps": 2 * settings["steps"]}
    once, twice = (
        peers.scarlet2(one, "sersic", **each).flux for each in (settings, doubled)
    )
    np.testing.assert_allclose(once, twice, rtol=0.01)


def test_unknown_morphologies_are_refused(isolated):
    with pytest.raises(ValueError, match="'disc'; accepted: sersic, prior, pixels"):
        peers.scarlet2(isolated, "disc", size=31, steps=10, settle=True)
