"""The learnt prior with a likelihood: all galaxies of a scene fitted at once.

An encoder answers at once, but has to guess where the neighbours are. Where their
places are known, the components of a linear decoder can be fitted to the pixels, for
all galaxies together. That is a system of linear equations, and what the encoder says
of the target is the prior of its latent vector.
"""

from collections.abc import Callable, Iterator

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from . import linear
from .simulation import Scenes
from .surveys import STAMP_CENTRE
from .weights import Network

ROUNDS = 3  # of the equations, each with what the last says of brightness and light
BRIGHTNESS = 30.0  # of a neighbour in the first round
SMALLEST = 1e-6  # of a second moment, which is added so that they can be inverted


def second_moments(network: Network, scenes: Scenes) -> np.ndarray:
    """Mean products of latent numbers over squared brightness (latent, latent).

    Of the noiseless targets of `scenes`, which should be isolated training galaxies.
    Brightness is the signal-to-noise ratio of `linear.amplitudes`.

    Raises ValueError for a network that is not linear, or scenes of another survey.
    """
    _check(network, scenes)
    vectors = network.code.of_all_sides(scenes).astype(float)
    return vectors.T @ vectors / len(vectors)


def refine(
    network: Network, scenes: Scenes, moments: np.ndarray, encoder: bool = True
) -> np.ndarray:
    """Fit target and neighbours together, the true places of the latter given.

    The target's latent vector has what the network says for prior, that of a neighbour
    a normal one of mean zero and of its squared brightness times `moments` (see
    `second_moments`). Pixels vary by the sky and by the light that the fit sees in
    them. The network has seen these pixels, so that they count twice where it made the
    best of them: this is an estimate, without an error. Without `encoder` the target is
    fitted as its neighbours are. Chapter 7, eq. (eq-joint).
    Returns (scene, y, x, band), electrons.

    Raises ValueError for scenes of several cameras or of another survey than that of
    the network, or a network that is not linear or, asked for its encoder, does not
    know how its errors go together.
    """
    _check(network, scenes)
    if encoder and network.correlation is None:
        raise ValueError(
            "received a network without the correlation of its errors; accepted: one "
            "with it, or encoder=False"
        )
    survey = scenes.survey
    survey.check_one_camera()
    draw = shifted_components(network)
    target = draw(0.0, 0.0)
    gauge = target @ linear.aperture(survey).ravel()  # (latent,)
    noise = np.broadcast_to(np.sqrt(survey.sky), survey.shape).ravel()
    neighbour = np.linalg.inv(moments + SMALLEST * np.diag(np.diag(moments)))
    latent = []
    said = _said(network, scenes) if encoder else _nothing_said(scenes)
    known = zip(scenes.places, said, strict=True)
    # Threads that share so small matrices mostly wait for one another.
    with threadpool_limits(1, "blas"):
        for places, (stamp, prior) in tqdm(known, "refining", len(scenes)):
            moved = [draw(*shift) for shift in places[1:] - STAMP_CENTRE]
            data = stamp.ravel() / noise
            design = np.concatenate([target, *moved])
            fitted = fit_latent(design, data, noise, prior, neighbour, gauge)
            latent.append(fitted[0])
    return network.decode(np.array(latent, dtype=np.float32))


def _check(network: Network, scenes: Scenes) -> None:
    if network.architecture != "linear":
        raise ValueError(
            f"received a {network.architecture} network; accepted: a linear one"
        )
    if scenes.survey != network.survey:
        raise ValueError(
            f"received scenes of survey {scenes.survey.name!r} for a network of "
            f"{network.survey.name!r}; accepted: of one and the same, sky and all"
        )


def shifted_components(network: Network) -> Callable[[float, float], np.ndarray]:
    """A function of a shift in pixels (y, x) to the components as they look there.

    It returns (latent, y * x * band) in units of the noise of the sky. Whole pixels are
    moved, and what is left of one by the phases of a Fourier transform.
    """
    images, sizes = network.decoder.get_weights()
    images = (images * sizes[:, None]).reshape(-1, *network.survey.shape)
    spectra = np.fft.rfft2(images, axes=(1, 2)).astype(np.complex64)
    side = images.shape[1]
    ky, kx = np.fft.fftfreq(side)[:, None, None], np.fft.rfftfreq(side)[:, None]

    def draw(dy: float, dx: float) -> np.ndarray:
        whole = np.round([dy, dx]).astype(int)
        y, x = np.subtract([dy, dx], whole)
        phases = np.exp(-2j * np.pi * (ky * y + kx * x)).astype(np.complex64)
        fine = np.fft.irfft2(spectra * phases, axes=(1, 2), s=(side, side))
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


def _nothing_said(scenes: Scenes) -> Iterator[tuple[np.ndarray, None]]:
    for part in scenes.batches():
        for stamp in part.noisy:
            yield stamp, None


def _said(network: Network, scenes: Scenes) -> Iterator[tuple[np.ndarray, tuple]]:
    """Noisy stamps, and what a network says of each: mean (latent,), precision.

    The mean is that of all sides from which the network looks, the covariance, of its
    errors, that of one.
    """
    code = network.code
    for part in scenes.batches():
        said = network.deblend(part.noisy)
        flux = linear.reference_flux(said.image, network.survey)
        each = np.eye(said.latent_mean.shape[1], dtype=np.float32)[:, None]
        spread = network.correlation.tie(each.repeat(len(part), axis=1), flux)
        spread = np.moveaxis(spread * said.latent_width, 0, 2)  # (scene, latent, draw)
        means = code(said.image).astype(float)
        parts = zip(part.noisy, means, spread.astype(float), strict=True)
        for stamp, mean, factor in parts:
            yield stamp, (mean, np.linalg.inv(factor @ factor.T))


def fit_latent(
    design: np.ndarray,
    data: np.ndarray,
    noise: np.ndarray,
    prior: tuple[np.ndarray, np.ndarray] | None,
    neighbour: np.ndarray,
    gauge: np.ndarray,
) -> np.ndarray:
    """Latent vectors that fit the pixels of a scene best (galaxy, latent).

    `design` (galaxy * latent, pixel), target first, and `data` (pixel,) are in units of
    `noise` (pixel,), that of the sky in electrons. `prior` has mean and inverse
    covariance of the target, None where it is as any other; `neighbour` is the inverse
    covariance of a galaxy of unit brightness, which for latent vector z is z times
    `gauge`, as in `linear.amplitudes`.
    """
    n, known = len(gauge), int(prior is not None)
    mean, precision = prior or (np.zeros(n), np.zeros((n, n)))
    bright = np.full(len(design) // n - known, BRIGHTNESS)
    light = mean.astype(design.dtype) @ design[:n]
    for _ in range(ROUNDS):
        weighted = design / (1 + np.maximum(light, 0) / noise).astype(design.dtype)
        matrix = (weighted @ design.T).astype(float)
        right = (weighted @ data).astype(float)
        matrix[:n, :n] += precision
        right[:n] += precision @ mean
        for k, size in enumerate(bright, start=known):
            own = slice(k * n, (k + 1) * n)
            matrix[own, own] += neighbour / size**2
        latent = np.linalg.solve(matrix, right)
        light = latent.astype(design.dtype) @ design
        latent = latent.reshape(-1, n)
        bright = np.hypot(np.maximum(latent[known:] @ gauge, 0), linear.EMPTY)
    return latent
