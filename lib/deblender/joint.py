"""The learnt prior with a likelihood: all galaxies of a scene fitted at once.

An encoder answers at once, but has to guess where the neighbours are. Where their
places are known, the components of a linear decoder can be fitted to the pixels, for
all galaxies together. That is a system of linear equations, and what the encoder says
of the target is the prior of its latent vector.
"""

from collections.abc import Callable

import numpy as np
from keras import ops
from tqdm import tqdm

from . import linear
from .batches import dihedral
from .peers import CENTRE, positions
from .simulation import Scenes
from .weights import Network

SIDES = 8  # from which galaxies are looked at for their moments
BRIGHTNESS = 30.0  # of a neighbour before the first round, in units of noise
SMALLEST = 1e-6  # of a variance, which is added so that it can be inverted


def moments(network: Network, scenes: Scenes) -> np.ndarray:
    """Second moments of latent vectors over brightness (latent, latent).

    Of the noiseless targets of `scenes`, isolated training galaxies; `network` is a
    linear one. Brightness is that of `linear.amplitudes`.
    """
    code = linear.Code(network.decoder, network.normalisation)
    aperture = linear.aperture(network.survey)
    total = np.zeros((linear.N_COMPONENTS, linear.N_COMPONENTS))
    for part in scenes.batches():
        for side in range(SIDES):
            stamps = dihedral(part.target, np.full(len(part), side))
            units = network.normalisation.forward(stamps)
            bright = ops.convert_to_numpy(linear.amplitudes(units, aperture))
            vectors = (code(stamps) / bright).astype(float)  # (scene, latent)
            total += vectors.T @ vectors
    return total / (SIDES * len(scenes))


def refine(
    network: Network, scenes: Scenes, kin: np.ndarray, rounds: int = 3
) -> np.ndarray:
    """Deblend, then fit target and neighbours together, their true places given.

    The target's latent vector has the posterior of the network for prior, that of a
    neighbour a normal one of mean zero and of `kin` (see `moments`) times the square of
    its brightness, which `rounds` of expectation maximisation find. Pixels vary by the
    sky and by the light that the fit sees in them. The network has seen these pixels,
    so that they count twice where it made the best of them: this is an estimate,
    without an error. Returns (scene, y, x, band), electrons.

    Raises ValueError for scenes of several cameras, or a network that is not linear.
    """
    survey = scenes.survey
    if len(survey.instruments) > 1 or network.architecture != "linear":
        raise ValueError(
            f"received scenes of {survey.name!r} and a {network.architecture} network; "
            "accepted: scenes of one camera and a linear network"
        )
    draw, sigma = shifted_components(network), np.sqrt(survey.sky)
    noise = np.broadcast_to(sigma, survey.shape).ravel()
    means, covariances = _posteriors(network, scenes)
    inverse = np.linalg.inv(kin + SMALLEST * np.diag(np.diag(kin)))
    fitted = np.empty(means.shape, dtype=np.float32)
    places = tqdm(positions(scenes), "refining", len(scenes), unit="scene")
    for i, known in enumerate(places):
        # A target off the centre is so in its components, too.
        shifts = [np.zeros(2), *(known[1:] - CENTRE)]
        design = np.concatenate([draw(*shift) for shift in shifts])
        prior = means[i], np.linalg.inv(covariances[i])
        data = scenes.noisy[i].ravel() / noise
        fitted[i] = fit_latent(design, data, noise, prior, inverse, rounds)
    return network.decode(fitted)


def shifted_components(network: Network) -> Callable[[float, float], np.ndarray]:
    """A function of a shift in pixels (y, x) to the components as they look there.

    It returns (latent, y * x * band) in units of the noise of the sky. Whole pixels are
    moved, and what is left of one by the phases of a Fourier transform.
    """
    images, sizes = network.decoder.get_weights()
    images = (images * sizes[:, None]).reshape(-1, *network.survey.shape)
    spectra = np.fft.rfft2(images, axes=(1, 2))
    side = images.shape[1]
    ky, kx = np.fft.fftfreq(side)[:, None, None], np.fft.rfftfreq(side)[:, None]

    def draw(dy: float, dx: float) -> np.ndarray:
        whole = np.round([dy, dx]).astype(int)
        y, x = np.subtract([dy, dx], whole)
        turned = spectra * np.exp(-2j * np.pi * (ky * y + kx * x))
        fine = np.fft.irfft2(turned, axes=(1, 2), s=(side, side))
        moved = np.zeros_like(images)
        (to_y, from_y), (to_x, from_x) = (_overlap(n, side) for n in whole)
        moved[:, to_y, to_x] = fine[:, from_y, from_x]
        return moved.reshape(len(moved), -1)

    return draw


def _overlap(shift: int, side: int) -> tuple[slice, slice]:
    """Where pixels go to, and where they come from, along an axis."""
    n = max(side - abs(shift), 0)
    to, origin = max(shift, 0), max(-shift, 0)
    return slice(to, to + n), slice(origin, origin + n)


def _posteriors(network: Network, scenes: Scenes) -> tuple[np.ndarray, np.ndarray]:
    """Mean (scene, latent) and covariance (scene, latent, latent) of the targets."""
    said = network.deblend(scenes.noisy)
    n = said.latent_mean.shape[1]
    flux = linear.brightness(said.image, network.survey)
    each = np.repeat(np.eye(n, dtype=np.float32)[:, None], len(scenes), axis=1)
    spread = network.correlation.tie(each, flux) * said.latent_width
    spread = np.moveaxis(spread, 0, 2).astype(float)  # (scene, latent, draw)
    covariances = spread @ spread.transpose(0, 2, 1) + SMALLEST * np.eye(n)
    return said.latent_mean.astype(float), covariances


def fit_latent(
    design: np.ndarray,
    data: np.ndarray,
    noise: np.ndarray,
    prior: tuple[np.ndarray, np.ndarray],
    inverse: np.ndarray,
    rounds: int,
) -> np.ndarray:
    """Latent vector of the target that fits the pixels of its scene best (latent,).

    `design` (galaxy * latent, pixel), target first, and `data` (pixel,) are in units of
    `noise` (pixel,), that of the sky in electrons. `prior`: mean and inverse covariance
    of the target; `inverse`: of the second moments of neighbours of unit brightness.
    """
    mean, precision = prior
    n = len(mean)
    neighbours = [slice(k, k + n) for k in range(n, len(design), n)]
    bright = np.full(len(neighbours), BRIGHTNESS)
    light = mean @ design[:n]
    for _ in range(rounds):
        weighted = design / (1 + np.maximum(light, 0) / noise).astype(design.dtype)
        matrix = (weighted @ design.T).astype(float)
        right = (weighted @ data).astype(float)
        matrix[:n, :n] += precision
        right[:n] += precision @ mean
        for own, size in zip(neighbours, bright, strict=True):
            matrix[own, own] += inverse / size**2
        covariance = np.linalg.inv(matrix)
        latent = covariance @ right
        for k, own in enumerate(neighbours):
            second = np.outer(latent[own], latent[own]) + covariance[own, own]
            bright[k] = np.sqrt((inverse * second).sum() / n)
        light = latent @ design
    return latent[:n]
