"""Joint fits: components where GalSim draws them, posteriors in closed form, blends."""

from types import SimpleNamespace

import galsim
import numpy as np
import pytest

import deblender
from deblender import joint
from deblender.measurement import in_snr_range


@pytest.fixture(scope="module")
def network():
    return deblender.load("lsst")


@pytest.fixture(scope="module")
def kin(network, synthetic):
    known = deblender.simulate(synthetic, network.survey, 200, 1, seed=4, split="train")
    return joint.moments(network, known)


@pytest.mark.parametrize("shift", [(0, 0), (3, -7), (0.4, -0.3), (-11.7, 5.5), (70, 0)])
def test_components_move_as_galsim_draws_them(shift):
    survey, (dy, dx) = deblender.survey("lsst"), shift
    camera = survey.reference.instrument
    galaxy = galsim.Exponential(half_light_radius=0.4).shear(g1=0.3)
    seen = galsim.Convolve(galaxy, camera.psf)

    def drawn(y: float, x: float) -> np.ndarray:
        moved = seen.shift(x * camera.pixel_scale, y * camera.pixel_scale)
        return moved.drawImage(nx=64, ny=64, scale=camera.pixel_scale).array

    images = np.repeat(drawn(0, 0)[..., None], len(survey.bands), axis=-1)
    weights = [images.reshape(1, -1), np.array([2.0])]
    decoder = SimpleNamespace(get_weights=lambda: weights)
    draw = joint.shifted_components(SimpleNamespace(decoder=decoder, survey=survey))
    expected = 2 * drawn(dy, dx)
    for plane in np.moveaxis(draw(dy, dx).reshape(*images.shape), -1, 0):
        np.testing.assert_allclose(plane, expected, atol=2e-3 * images.max())


def test_one_round_is_the_conditional_mean_of_a_normal_distribution():
    """m + S A' (A S A' + N)^-1 (d - A m), with the noise of the sky alone."""
    rng = np.random.default_rng(3)
    n, pixels = 4, 30
    design, data = rng.normal(size=(2 * n, pixels)), rng.normal(size=pixels)
    mean, root, kin = rng.normal(size=n), *rng.normal(size=(2, n, n))
    own, kin = root @ root.T + np.eye(n), kin @ kin.T + np.eye(n)
    everything = np.zeros((2 * n, 2 * n))
    everything[:n, :n], everything[n:, n:] = own, joint.BRIGHTNESS**2 * kin
    first = np.concatenate([mean, np.zeros(n)])
    seen = design.T @ everything @ design + np.eye(pixels)
    expected = first + everything @ design @ np.linalg.solve(
        seen, data - first @ design
    )
    dark = np.full(pixels, 1e12)  # so much sky that light adds no noise
    prior = mean, np.linalg.inv(own)
    found = joint.fit_latent(design, data, dark, prior, np.linalg.inv(kin), 1)
    np.testing.assert_allclose(found, expected[:n], rtol=1e-6)


def test_brightness_of_neighbours_is_found():
    """Rounds of expectation maximisation go to the brightness that was drawn."""
    rng = np.random.default_rng(5)
    n, pixels, bright = 60, 400, 500.0
    design = rng.normal(size=(2 * n, pixels)) / np.sqrt(pixels)
    target, neighbour = rng.normal(size=n), bright * rng.normal(size=n)
    data = np.concatenate([target, neighbour]) @ design
    data = data + 1e-3 * rng.normal(size=pixels)
    prior, dark = (np.zeros(n), np.eye(n)), np.full(pixels, 1e12)
    errors = [
        np.linalg.norm(
            joint.fit_latent(design, data, dark, prior, np.eye(n), rounds) - target
        )
        for rounds in (1, 4)
    ]
    assert errors[1] < errors[0]


def test_bright_targets_come_nearer_to_the_truth(network, kin, synthetic):
    scenes = deblender.simulate(synthetic, network.survey, 120, seed=8)
    truth = scenes.truth
    bright = in_snr_range(truth["snr"]) & (truth["snr"] > 100)
    scenes = scenes.take(np.flatnonzero(bright)[:16])
    off = {
        name: np.linalg.norm((images - scenes.target).reshape(len(scenes), -1), axis=1)
        for name, images in (
            ("encoder", network.deblend(scenes.noisy).image),
            ("fit", joint.refine(network, scenes, kin)),
        )
    }
    assert np.median(off["fit"] / off["encoder"]) < 0.9


def test_other_cameras_and_networks_are_refused(network, kin, synthetic):
    several = deblender.simulate(synthetic, deblender.survey("lsst+euclid"), 2, seed=5)
    with pytest.raises(ValueError, match="'lsst.euclid'.*accepted: scenes of one"):
        joint.refine(network, several, kin)
    one = deblender.simulate(synthetic, network.survey, 2, seed=5)
    with pytest.raises(ValueError, match="a paper network; accepted: .* linear"):
        joint.refine(deblender.load("lsst-paper"), one, kin)
