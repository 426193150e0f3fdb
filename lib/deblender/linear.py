"""The second network: galaxies as sums of principal components.

Where the paper's decoder is a convolutional network that has to be trained, this one is
linear and comes from a singular value decomposition of noiseless stamps. Its encoder
has a linear path too: the stamp projected on the components, which convolutions then
correct for neighbours and noise.
"""

import keras
import numpy as np
from keras import layers, ops

from .batches import SYMMETRIES, dihedral
from .networks import CONVOLUTION, DENSE, EXACT, activate
from .normalisation import NoiseUnits
from .simulation import Scenes
from .surveys import STAMP_SIZE, Survey

N_COMPONENTS = 96
FILTERS = (32, 64, 128, 256)
HIDDEN = 512
# Side of the square that the convolutions see, in pixels of the reference band. The
# linear path sees all of a stamp.
WINDOW = 48
APERTURE = 0.9  # arcsec, FWHM of the Gaussian that weighs the centre of a stamp
SHARES = 4  # of targets from faint to bright, each with its own correlation of errors
FARTHEST = 5.0  # widths; errors beyond say nothing of how the usual ones go together
EMPTY = 5.0  # the amplitude of a stamp without a galaxy, in units of its noise
NARROWEST, WIDEST = -9.0, 4.0  # logarithm of a relative width
FLAT = EXACT | {"kernel_initializer": "zeros"}


def aperture(survey: Survey) -> np.ndarray:
    """Gaussian weights at the centre, of unit sum of squares over all bands."""
    weights = np.empty(survey.shape, dtype=np.float32)  # (y, x, band)
    offset = np.arange(survey.shape[0]) - (survey.shape[0] - 1) / 2
    for i, band in enumerate(survey.bands):
        width = APERTURE / np.sqrt(8 * np.log(2)) / band.instrument.pixel_scale
        profile = np.exp(-0.5 * (offset / width) ** 2)
        image = np.outer(profile, profile)
        weights[..., i] = image / np.linalg.norm(image)
    return weights / np.sqrt(len(survey.bands), dtype=np.float32)


def amplitudes(stamps, weights):
    """Signal-to-noise ratio inside an aperture, at least EMPTY.

    `stamps` (scene, y, x, band) in units of their noise; returns (scene, 1).
    """
    signal = ops.sum(ops.multiply(stamps, weights), axis=(1, 2, 3))
    signal = ops.sqrt(ops.square(ops.maximum(signal, 0.0)) + EMPTY**2)
    return ops.expand_dims(signal, -1)


class Amplitude(layers.Layer):
    """The brightness that a network divides its stamp by; see `amplitudes`."""

    def __init__(self, survey: Survey, **kwargs):
        super().__init__(**kwargs)
        self.aperture = aperture(survey)

    def call(self, stamps):
        return amplitudes(stamps, self.aperture)  # (batch, 1)


class Components(layers.Layer):
    """Sum of orthonormal images, each times a latent number and its usual size."""

    def __init__(self, survey: Survey, n_components: int, **kwargs):
        super().__init__(**kwargs)
        self.stamp_shape = survey.shape
        shape = (n_components, int(np.prod(survey.shape)))
        self.images = self.add_weight(shape=shape, trainable=False, name="images")
        self.sizes = self.add_weight(
            shape=(n_components,), initializer="ones", trainable=False, name="sizes"
        )

    def call(self, latent):
        flat = ops.matmul(latent * self.sizes, self.images)
        return ops.reshape(flat, (-1, *self.stamp_shape))  # (batch, y, x, band)

    def project(self, stamps):
        """Least-squares latent vectors of stamps."""
        flat = ops.reshape(stamps, (-1, self.images.shape[1]))
        products = ops.matmul(flat, ops.transpose(self.images))
        return products / self.sizes  # (batch, latent)


class Projection(layers.Layer):
    """The linear path of the encoder: what `Components` would see in the stamp."""

    def __init__(self, components: Components, **kwargs):
        super().__init__(**kwargs)
        self.components = components

    def call(self, stamps):
        return self.components.project(stamps)  # (batch, latent)


def fit_components(scenes: Scenes, n_components: int) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of noiseless targets divided by noise and amplitude.

    Returns images (component, y * x * band), orthonormal, and the root mean square of
    the numbers that go with them (component,). Few scenes are enough: each is turned
    one way of eight, and the Gram matrix has one row a scene.

    Raises ValueError for fewer scenes than components.
    """
    if len(scenes) < n_components:
        raise ValueError(
            f"received {len(scenes)} scenes; accepted: {n_components} or more"
        )
    survey = scenes.survey
    stamps = scenes.target / np.sqrt(survey.sky)
    stamps = dihedral(stamps, np.arange(len(stamps)) % SYMMETRIES)
    size = ops.convert_to_numpy(amplitudes(stamps, aperture(survey)))
    vectors = stamps.reshape(len(stamps), -1) / size  # (scene, feature)
    # The faintest values are 10^-8 of the largest, below what single precision adds up.
    gram = np.matmul(vectors, vectors.T, dtype=np.float64)
    values, rotations = np.linalg.eigh(gram)
    largest = np.argsort(values)[: -n_components - 1 : -1]
    values, rotations = values[largest], rotations[:, largest]
    images = (rotations / np.sqrt(values)).T @ vectors
    images = np.linalg.qr(images.T)[0].T  # the faintest have lost it to rounding
    # The sign of an eigenvector is free; every machine must choose the same.
    peaks = np.take_along_axis(images, np.abs(images).argmax(1)[:, None], 1)
    return images * np.sign(peaks), np.sqrt(values / len(vectors))


def decoder(survey: Survey) -> keras.Model:
    """Latent vector to stamp in units of the noise of the sky; linear.

    Input (batch, latent), output (batch, y, x, band). Its weights are those of
    `fit_components`, and stay.
    """
    latent = keras.Input((N_COMPONENTS,), name="latent")
    components = Components(survey, N_COMPONENTS, name="components", **EXACT)
    return keras.Model(latent, components(latent), name="decoder")


class Correlation(layers.Layer):
    """How errors of latent numbers go together, for targets from faint to bright.

    An encoder gives each number its own width, but their errors are not independent:
    in the flux of a target, for one, they cancel in part.
    """

    def __init__(self):
        super().__init__(**EXACT)
        n = N_COMPONENTS * (N_COMPONENTS - 1) // 2
        self.edges = self.add_weight(shape=(SHARES - 1,), name="edges")
        self.below = self.add_weight(shape=(SHARES, n), name="below")

    @property
    def factors(self) -> np.ndarray:
        """Cholesky factors (share, latent, latent) of the correlations.

        Only what is below their diagonals is kept, as their rows are of unit length.
        """
        n = N_COMPONENTS
        factors = np.zeros((SHARES, n, n), np.float32)
        factors[:, *np.tril_indices(n, -1)] = ops.convert_to_numpy(self.below)
        rest = 1 - np.square(factors).sum(axis=-1)
        factors[:, *np.diag_indices(n)] = np.sqrt(np.maximum(rest, 0))
        return factors

    def tie(self, draws: np.ndarray, flux: np.ndarray) -> np.ndarray:
        """Correlated draws (sample, scene, latent) of independent, normal ones.

        `flux` (scene,) is the `reference_flux` of each deblended image.
        """
        share = np.searchsorted(ops.convert_to_numpy(self.edges), flux)
        tied = np.empty_like(draws)
        for k, factor in enumerate(self.factors):
            tied[:, share == k] = draws[:, share == k] @ factor.T
        return tied


def reference_flux(images: np.ndarray, survey: Survey) -> np.ndarray:
    """Flux (...,) in the reference band of images (..., y, x, band), electrons."""
    return images[..., survey.reference_index].sum(axis=(-2, -1))


def fit_correlation(errors: np.ndarray, flux: np.ndarray) -> list[np.ndarray]:
    """Weights of `Correlation`: fluxes between shares, Cholesky factors in part.

    `errors` (scene, latent) in units of their widths, taken as FARTHEST where they are
    farther; `flux` (scene,). Their mean products, to which as many scenes without
    correlation are added as there are latent numbers, so that few scenes say little.
    """
    edges = np.quantile(flux, np.arange(1, SHARES) / SHARES)
    share = np.searchsorted(edges, flux)
    factors = []
    for k in range(SHARES):
        own = np.clip(errors[share == k], -FARTHEST, FARTHEST)
        products = own.T @ own + N_COMPONENTS * np.eye(N_COMPONENTS)
        sizes = np.sqrt(np.diag(products))
        factors.append(np.linalg.cholesky(products / np.outer(sizes, sizes)))
    return [edges, np.stack(factors)[:, *np.tril_indices(N_COMPONENTS, -1)]]


def _convolutions(x: keras.KerasTensor, loudness: keras.KerasTensor):
    """Four times half the pixels; the loudness of the noise joins at the first."""
    for i, filters in enumerate(FILTERS):
        x = layers.Conv2D(filters, 3 if i else 5, strides=2, **CONVOLUTION)(x)
        if i == 0:
            x = x + ops.reshape(layers.Dense(filters)(loudness), (-1, 1, 1, filters))
        x = activate(x, shared=True)
        if i < len(FILTERS) - 1:
            x = layers.Conv2D(filters, 3, **CONVOLUTION)(x)
            x = activate(x, shared=True)
    return layers.Flatten()(x)


def _align(stamp: keras.KerasTensor, survey: Survey) -> keras.KerasTensor:
    """The centre of a stamp on the grid of the reference band, (batch, y, x, channel).

    Convolutions add up what lies at the same place of an array, which must be the same
    place of the sky. Pixels of half the size become channels, four to a pixel of the
    grid; larger ones are interpolated. Where a camera sees less sky there are zeros.
    """
    grid, parts = survey.reference.instrument.pixel_scale, []
    for instrument, bands in survey.cameras:
        part, n_bands = stamp[..., bands], bands.stop - bands.start
        finer = max(round(grid / instrument.pixel_scale), 1)
        scale = instrument.pixel_scale * finer / grid  # of a pixel or a group of them
        side = min(round(WINDOW / scale) * finer, STAMP_SIZE)
        part = layers.CenterCrop(side, side)(part)
        if finer > 1:
            side //= finer
            part = layers.Reshape((side, finer, side, finer, n_bands))(part)
            part = layers.Permute((1, 3, 2, 4, 5))(part)
            part = layers.Reshape((side, side, finer**2 * n_bands))(part)
        width = round(side * scale)  # in pixels of the grid
        if width != side:
            part = layers.Resizing(width, width)(part)
        if width < WINDOW:
            part = layers.ZeroPadding2D((WINDOW - width) // 2)(part)
        parts.append(part)
    return layers.Concatenate()(parts) if len(parts) > 1 else parts[0]


class Code:
    """Noiseless stamps in electrons to the latent vectors nearest to them.

    Called with (scene, y, x, band), it returns (scene, latent). It keeps a copy of the
    components, because JAX takes a model's weights away while it trains.
    """

    def __init__(self, decoder: keras.Model, units: NoiseUnits):
        self.units = units
        self.images, self.sizes = decoder.get_weights()

    def __call__(self, stamps: np.ndarray) -> np.ndarray:
        flat = self.units.forward(stamps).reshape(len(stamps), -1)
        return flat @ self.images.T / self.sizes

    def relative(self, stamps: np.ndarray, survey: Survey) -> np.ndarray:
        """Latent vectors over the brightness of their stamps, that of `amplitudes`."""
        size = amplitudes(self.units.forward(stamps), aperture(survey))
        return self(stamps) / ops.convert_to_numpy(size)

    def of_all_sides(self, scenes: Scenes) -> np.ndarray:
        """Relative vectors of targets turned and mirrored in every way, (n, latent)."""
        vectors = [
            self.relative(dihedral(part.target, np.full(len(part), side)), part.survey)
            for part in scenes.batches()
            for side in range(SYMMETRIES)
        ]
        return np.concatenate(vectors)

    def of_normalised(self, stamps):
        """Latent vectors of a tensor that is in units of the noise already."""
        flat = ops.reshape(stamps, (-1, self.images.shape[1]))
        # PyTorch takes no arrays beside what lies on a GPU.
        images = ops.convert_to_tensor(self.images.T)
        return ops.matmul(flat, images) / ops.convert_to_tensor(self.sizes)


def encoder(survey: Survey, decoder: keras.Model, name: str = "encoder") -> keras.Model:
    """Stamp in units of its noise to mean and width of each latent number.

    Input (batch, y, x, band); outputs two tensors (batch, latent). It sees the stamp
    divided by its amplitude, linearly and by an arcsinh that shows faint light, and the
    logarithm of the amplitude, which is how loud the noise is. The components are those
    of the decoder, whose weights it shares.
    """
    n = decoder.input_shape[-1]
    stamp = keras.Input(survey.shape, name="stamp")
    amplitude = Amplitude(survey, name="amplitude", **EXACT)(stamp)  # (batch, 1)
    projection = Projection(decoder.get_layer("components"), name="projection", **EXACT)
    linear = projection(stamp) / amplitude
    loudness = ops.log(amplitude) - 3.0  # near zero
    x = _align(stamp, survey)
    x = x / ops.reshape(amplitude, (-1, 1, 1, 1))
    x = layers.Concatenate()([5.0 * x, ops.arcsinh(100.0 * x) / 3.0])
    x = _convolutions(x, loudness)
    x = layers.Concatenate()([x, ops.arcsinh(linear), loudness])
    x = activate(layers.Dense(HIDDEN, **DENSE)(x))
    gate = layers.Dense(n, activation="sigmoid", name="gate", **EXACT)(x)
    correction = layers.Dense(n, name="correction", **EXACT)(x)
    spread = layers.Dense(n, name="spread", **FLAT)(x)
    spread = ops.exp(ops.clip(spread, NARROWEST, WIDEST))
    mean = amplitude * (gate * linear + correction)
    return keras.Model(stamp, [mean, amplitude * spread], name=name)
