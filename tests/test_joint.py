"""Joint fits: components where GalSim draws them, means in closed form, blends."""

from dataclasses import replace
from types import SimpleNamespace

import galsim
import numpy as np
import pytest

import deblender
from deblender import joint, linear
from deblender.batches import dihedral
from deblender.measurement import in_snr_range


@pytest.fixture(scope="module")
def network():
    return deblender.load("lsst")


@pytest.fixture(scope="module")
def known(network, synthetic):
    return deblender.simulate(synthetic, network.survey, 200, 1, seed=4, split="train")


@pytest.fixture(scope="module")
def moments(network, known):
    return joint.second_moments(network, known)


@pytest.fixture(scope="module")
def bright(network, synthetic):
    scenes = deblender.simulate(synthetic, network.survey, 120, seed=8)
    snr = scenes.truth["snr"]
    return scenes.take(np.flatnonzero(in_snr_range(snr) & (snr > 100))[:16])


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


@pytest.mark.parametrize("sky", [1e12, 9.0])  # so much that light adds no noise, or not
def test_first_round_is_the_conditional_mean_of_a_normal_distribution(sky, monkeypatch):
    """m + S A' (A S A' + N)^-1 (d - A m), with N of the sky and the light of A m."""
    monkeypatch.setattr(joint, "ROUNDS", 1)
    rng = np.random.default_rng(3)
    n, pixels = 4, 30
    design, data = rng.normal(size=(2 * n, pixels)), rng.normal(size=pixels)
    mean, (root, other) = rng.normal(size=n), rng.normal(size=(2, n, n))
    own, kin = root @ root.T + np.eye(n), other @ other.T + np.eye(n)
    prior = np.zeros((2 * n, 2 * n))
    prior[:n, :n], prior[n:, n:] = own, joint.BRIGHTNESS**2 * kin
    first = np.concatenate([mean, np.zeros(n)])
    noise = np.full(pixels, np.sqrt(sky))  # electrons
    electrons = noise * np.maximum(first @ design, 0)
    variance = (sky + electrons) / sky  # in units of that of the sky
    seen = design.T @ prior @ design + np.diag(variance)
    excess = np.linalg.solve(seen, data - first @ design)
    said = mean, np.linalg.inv(own)
    found = joint.fit_latent(design, data, noise, said, np.linalg.inv(kin), np.ones(n))
    expected = (first + prior @ design @ excess).reshape(2, n)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("brightness", [3.0, 300.0])
def test_neighbours_are_shrunk_as_their_brightness_asks(brightness, monkeypatch):
    """Where pixels say little of a number, its neighbours' prior does, at the end with
    the brightness that the other numbers give."""
    n, unit = 2, np.zeros(2)
    design = np.diag([1.0, 1.0, 1.0, 0.01])  # of the neighbour's numbers, the last dim
    data = np.array([0.0, 0.0, brightness, 0.01 * brightness])
    dark, gauge = np.full(4, 1e12), np.array([1.0, 0.0])
    moments = np.array([[1.0, 0.5], [0.5, 1.0]])
    said, neighbour = (unit, np.eye(n)), np.linalg.inv(moments)
    monkeypatch.setattr(joint, "ROUNDS", 30)
    found = joint.fit_latent(design, data, dark, said, neighbour, gauge)[1]
    size = np.hypot(found[0], linear.EMPTY)
    own = design[2:, 2:]
    matrix = own @ own.T + neighbour / size**2
    np.testing.assert_allclose(
        found, np.linalg.solve(matrix, own @ data[2:]), rtol=1e-6
    )
    assert found[0] == pytest.approx(brightness, rel=0.1)


def test_a_target_of_which_nothing_is_said_is_as_its_neighbours():
    """Galaxies that change places are fitted alike."""
    rng = np.random.default_rng(5)
    n, pixels = 3, 20
    one, other = rng.normal(size=(2, n, pixels))
    data, noise = 9 * one[0] + 5 * other[0], np.full(pixels, 3.0)
    rest = None, np.eye(n), np.array([1.0, 0.0, 0.0])
    first = joint.fit_latent(np.concatenate([one, other]), data, noise, *rest)
    swapped = joint.fit_latent(np.concatenate([other, one]), data, noise, *rest)
    np.testing.assert_allclose(first, swapped[::-1], rtol=1e-6)
    assert first[0, 0] == pytest.approx(9, rel=0.1)


def test_moments_are_those_of_relative_vectors(network, known):
    """By hand for one galaxy; and all sides of it give the same."""
    one = known.take([3])
    vectors = []
    for side in range(8):
        turned = dihedral(one.target, np.array([side]))
        units = turned / np.sqrt(network.survey.sky)
        images, sizes = network.decoder.get_weights()
        latent = images @ units.ravel() / sizes
        size = np.asarray(linear.amplitudes(units, linear.aperture(network.survey)))
        vectors.append(latent / size.item())
    expected = np.transpose(vectors) @ vectors / 8
    np.testing.assert_allclose(
        joint.second_moments(network, one), expected, rtol=1e-3, atol=1e-5
    )


def test_covariances_are_those_of_draws(network, bright):
    """As `deblend` draws: widths on the diagonal, correlated."""
    few = bright.take(np.arange(2))
    said = network.deblend(few.noisy, n_samples=1000, seed=2)
    code = linear.Code(network.decoder, network.normalisation)
    for i, (_, (_, precision)) in enumerate(joint._said(network, few)):
        covariance = np.linalg.inv(precision)
        sigma = np.sqrt(np.diag(covariance))
        np.testing.assert_allclose(sigma, said.latent_width[i], rtol=1e-4)
        drawn = np.corrcoef(code(said.samples[:, i]).T)
        expected = covariance / np.outer(sigma, sigma)
        np.testing.assert_allclose(drawn, expected, atol=0.12)
        assert np.abs(expected - np.eye(len(expected))).max() > 0.3


def test_bright_targets_come_nearer_to_the_truth(network, moments, bright):
    off = {
        name: np.linalg.norm((images - bright.target).reshape(len(bright), -1), axis=1)
        for name, images in (
            ("encoder", network.deblend(bright.noisy).image),
            ("fit", joint.refine(network, bright, moments)),
            ("general", joint.refine(network, bright, moments, encoder=False)),
        )
    }
    assert np.median(off["fit"] / off["encoder"]) < 0.8
    assert 1 < np.median(off["general"] / off["fit"]) < 5


def test_other_cameras_and_networks_are_refused(network, known, moments, synthetic):
    several = deblender.simulate(synthetic, deblender.survey("lsst+euclid"), 2, seed=5)
    with pytest.raises(ValueError, match="'lsst.euclid' for a network of 'lsst'; acc"):
        joint.refine(network, several, moments)
    ten = deblender.load("lsst+euclid")
    with pytest.raises(ValueError, match="of cameras LSST, VIS, NISP; accepted: one"):
        joint.refine(ten, several, moments)
    shallow = [replace(b, exposure=b.exposure / 9) for b in network.survey.bands]
    mine = replace(known, survey=replace(network.survey, bands=tuple(shallow)))
    with pytest.raises(ValueError, match="survey 'lsst' for a network of 'lsst'"):
        joint.refine(network, mine, moments)
    with pytest.raises(ValueError, match="a paper network; accepted: a linear one"):
        joint.second_moments(deblender.load("lsst-paper"), known)
    few, untied = known.take(slice(2)), replace(network, correlation=None)
    with pytest.raises(ValueError, match="without the correlation .* accepted: one"):
        joint.refine(untied, few, moments)
    assert joint.refine(untied, few, moments, encoder=False).shape == few.target.shape
