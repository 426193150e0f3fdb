"""How networks see images: eq. 4 of Arcelin et al. 2021, or units of the noise."""

from dataclasses import dataclass

import numpy as np

from .simulation import Scenes
from .surveys import per_pixel

BETA = 2.5  # section 2.3
# The inverse diverges at one; float32 has no number between this and one.
LARGEST = np.float32(1 - 2**-24)


@dataclass(frozen=True)
class Normalisation:
    """x -> tanh(arcsinh(beta x / scale)), band by band.

    `scale` (band,) in electrons is the mean over the isolated training sample of each
    band's largest pixel. Arcelin et al. 2021, eq. 4.
    """

    scale: np.ndarray
    beta: float = BETA

    @property
    def factor(self) -> np.ndarray:
        """What images are multiplied by before `curve`, (band,)."""
        return self.beta / self.scale

    @staticmethod
    def curve(u):
        """tanh(arcsinh(u)) of an array or a tensor of any backend, without either."""
        return u / (1 + u * u) ** 0.5

    def forward(self, images: np.ndarray) -> np.ndarray:
        """Electrons (..., band) to normalised pixels in (-1, 1), float32."""
        images = np.asarray(images, np.float32)
        return self.curve(images * per_pixel(self.factor, images))

    def inverse(self, normalised: np.ndarray) -> np.ndarray:
        """Normalised pixels (..., band) to electrons, float32; one is clipped below."""
        y = np.clip(np.asarray(normalised, np.float32), -LARGEST, LARGEST)
        u = y / np.sqrt((1 - y) * (1 + y))
        return u * per_pixel(self.scale / self.beta, y)


@dataclass(frozen=True)
class NoiseUnits:
    """x -> x / scale, where `scale` (band,) is the noise of the sky in electrons."""

    scale: np.ndarray

    @property
    def factor(self) -> np.ndarray:
        """What images are multiplied by, (band,)."""
        return 1 / self.scale

    @staticmethod
    def curve(u):
        """Nothing is bent here."""
        return u

    def forward(self, images: np.ndarray) -> np.ndarray:
        """Electrons (..., band) to units of the noise, float32."""
        images = np.asarray(images, np.float32)
        return images / per_pixel(self.scale, images)

    def inverse(self, normalised: np.ndarray) -> np.ndarray:
        """Units of the noise (..., band) to electrons, float32."""
        normalised = np.asarray(normalised, np.float32)
        return normalised * per_pixel(self.scale, normalised)


def fit_normalisation(scenes: Scenes, beta: float = BETA) -> Normalisation:
    """Constants of eq. 4 from noisy isolated training scenes.

    Mean over scenes of the largest pixel of each band, in electrons. The noise of the
    background adds to these maxima in bands where galaxies are faint; the constant
    only sets where the scale turns from linear to saturated.
    """
    peaks = [batch.noisy.max(axis=(1, 2)) for batch in scenes.batches()]
    return Normalisation(np.concatenate(peaks).mean(axis=0).astype(np.float64), beta)
