"""A first latent space, made of principal components.

A VAE that starts from random weights learns brightness and size first and shapes only
after some thousands of steps. Principal components know both at once: they give every
noiseless galaxy a code, from which a decoder can be taught on its own, and which an
encoder can be taught to guess. The VAE then starts from these two.
"""

from dataclasses import dataclass, replace

import numpy as np

from .networks import LATENT_SIZE
from .normalisation import Normalisation
from .simulation import Scenes
from .surveys import Survey

SMALLEST_VARIANCE = 1e-6  # of the first component; less is rounding, not blown up
NO_PEAK = 1e-3  # electrons; a peak below it has no profile to speak of


@dataclass(frozen=True)
class Whitening:
    """Whitened principal components of a set of vectors.

    `mean` (feature,) and `weights` (feature, component).
    """

    mean: np.ndarray
    weights: np.ndarray

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors (n, feature) to codes (n, component) of unit variance."""
        return (vectors - self.mean) @ self.weights


def fit_whitening(vectors: np.ndarray, n: int) -> Whitening:
    """The first `n` principal components of vectors (sample, feature).

    Those that the sample does not have, being too small, come out as zeros.
    """
    mean = vectors.mean(axis=0)
    centred = vectors - mean
    # The Gram matrix is the smaller one: there are more pixels than galaxies.
    values, rotations = np.linalg.eigh(centred @ centred.T)
    values, rotations = values[::-1][:n], rotations[:, ::-1][:, :n]
    values = np.maximum(values, SMALLEST_VARIANCE * values[0])
    weights = centred.T @ (rotations / values) * np.sqrt(len(vectors))
    # The sign of an eigenvector is free; every machine must choose the same.
    weights *= np.sign(np.take_along_axis(weights, np.abs(weights).argmax(0)[None], 0))
    return Whitening(mean, np.pad(weights, [(0, 0), (0, n - weights.shape[1])]))


@dataclass(frozen=True)
class PrincipalCode:
    """Noiseless stamps to codes that look like latent vectors.

    The peaks of the bands, on the arcsinh scale of eq. 4, and the profiles divided by
    their peaks, one an instrument, have principal components of their own. An arcsinh
    brings in their long tails.
    """

    channels: list[int]  # of the stamps, those that the code is made of
    profile_channels: list[int]  # one an instrument
    normalisation: Normalisation
    amplitudes: Whitening
    profiles: Whitening

    def __call__(self, stamps: np.ndarray) -> np.ndarray:
        """Noiseless electrons (n, y, x, band) to codes (n, latent), float32."""
        amplitudes = self.amplitudes(_amplitudes(stamps, self))
        code = np.concatenate([amplitudes, self.profiles(_profiles(stamps, self))], 1)
        return (np.arcsinh(2 * code) / 1.25).astype(np.float32)


def fit_code(
    scenes: Scenes, normalisation: Normalisation, survey: Survey
) -> PrincipalCode:
    """Principal code of the targets of training scenes, from the bands of `survey`.

    The scenes may have more bands than `survey`; `normalisation` is theirs.
    """
    channels = scenes.survey.channels(survey)
    first = [channels[bands.start] for _, bands in survey.cameras]
    code = PrincipalCode(channels, first, normalisation, None, None)
    amplitudes = fit_whitening(_amplitudes(scenes.target, code), len(channels))
    profiles = fit_whitening(
        _profiles(scenes.target, code), LATENT_SIZE - len(channels)
    )
    return replace(code, amplitudes=amplitudes, profiles=profiles)


def _amplitudes(stamps: np.ndarray, code: PrincipalCode) -> np.ndarray:
    """Peaks of the bands in units of eq. 4, before its tanh."""  # (n, band)
    peaks = stamps[..., code.channels].max(axis=(1, 2))
    scale = code.normalisation.scale[code.channels]
    return np.arcsinh(code.normalisation.beta * peaks / scale)


def _profiles(stamps: np.ndarray, code: PrincipalCode) -> np.ndarray:
    """Stamps divided by their peak, one an instrument."""  # (n, instrument * y * x)
    stamps = np.moveaxis(stamps[..., code.profile_channels], -1, 1)
    peaks = stamps.max(axis=(2, 3), keepdims=True)
    return (stamps / np.maximum(peaks, NO_PEAK)).reshape(len(stamps), -1)
