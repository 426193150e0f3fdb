"""The networks of section 3: encoder, decoder, and the autoencoder that trains them.

Only `keras` and `keras.ops` are used, so that the same code trains on TensorFlow, JAX
and PyTorch; one activation is compiled for TensorFlow.
"""

import logging
from collections.abc import Callable
from functools import partial

import keras
from keras import layers, ops

from .surveys import STAMP_SIZE

LATENT_SIZE = 32
FILTERS = (32, 64, 128, 256)
HIDDEN = 256
KL_WEIGHT = 1e-2  # the beta of section 3.2
SMALLEST_WIDTH = 1e-6  # keeps the logarithm of the KL divergence finite
SMALLEST_CODE_WIDTH = 1e-3  # the same for the likelihood of a code
# Errors beyond this many widths, of blends unlike all others, grow in the loss as their
# logarithm: else one of them, of 10^7 widths, drowns what a training says of itself.
ASTRAY = 30.0
COPIES = 4  # of a blend, with other noise, by which its bias is seen
# Of the variance beside the squared bias. Moments of a noisy image lengthen shapes, by
# the second order of its scatter; with this weight codes are too round by so much that
# shear is answered as it should be.
LEEWAY = 0.2
MISTAKEN = 0.25  # weight of what neighbours do to a target, squared, beside the same
# A sigmoid of this is close to the mean normalised pixel, so that training does not
# begin by learning that most of a stamp is empty sky.
EMPTY_SKY = -4.0
# Initial weights and slope of He et al. 2015, who introduced PReLU; Arcelin et al. name
# none. In one trial of each, both together learnt faster than the defaults of Keras.
DENSE = {"kernel_initializer": "he_normal"}
CONVOLUTION = DENSE | {"padding": "same"}
LEAK = 0.25
# What is compared with a target, or drawn from, keeps its precision when the products
# of a training are in half of it.
EXACT = {"dtype": "float32"}

# A chapter holds several models, each traced once; TensorFlow takes that for a mistake.
logging.getLogger("tensorflow").addFilter(lambda r: "retracing" not in r.getMessage())


def _in_one_pass(function: Callable, gradients: Callable) -> Callable:
    """`function` of tensors, with its `gradients`, each compiled into one loop.

    TensorFlow on a processor else goes over all pixels once for every operation. The
    other backends are left to themselves.
    """
    if keras.backend.backend() != "tensorflow":
        return function
    import tensorflow as tf

    forward = tf.function(function, jit_compile=True)
    backward = tf.function(gradients, jit_compile=True)
    return tf.custom_gradient(lambda *x: (forward(*x), partial(backward, *x)))


def _leak(x, slope):
    return ops.where(x > 0, x, slope * x)


def _leak_gradients(x, slope, upstream):
    """Gradients in `x` and in `slope`, which images and perhaps pixels share."""
    negative = x <= 0
    shared = [0, *(i for i, n in enumerate(slope.shape, 1) if n == 1)]
    # In full precision: a sum over pixels does not survive half of it.
    terms = ops.where(negative, ops.cast(upstream * x, "float32"), 0.0)
    total = ops.reshape(ops.sum(terms, shared), slope.shape)
    return ops.where(negative, slope * upstream, upstream), ops.cast(total, slope.dtype)


_prelu = _in_one_pass(_leak, _leak_gradients)


class PReLU(layers.PReLU):
    """As Keras's, in fewer passes over the pixels, which take longer than the sums.

    In half precision, on one core with matrix units, a training of the second network
    is 1.24 times, of the paper's 1.3 times as fast.
    """

    def call(self, inputs):
        return _prelu(inputs, ops.cast(self.alpha, inputs.dtype))


def activate(x: keras.KerasTensor, shared: bool = False) -> keras.KerasTensor:
    """PReLU, its slopes `shared` between pixels or not, as in the paper."""
    axes = (1, 2) if shared and len(x.shape) == 4 else None
    initial = keras.initializers.Constant(LEAK)
    return PReLU(alpha_initializer=initial, shared_axes=axes)(x)


def encoder(n_bands: int, name: str = "encoder") -> keras.Model:
    """Normalised stamp to mean and width of its latent Gaussian (Fig. 2).

    Input (batch, y, x, band); outputs two tensors (batch, latent). With ten bands it
    has 2,547,048 parameters.
    """
    stamp = keras.Input((STAMP_SIZE, STAMP_SIZE, n_bands), name="stamp")
    x = layers.BatchNormalization()(stamp)
    for filters in FILTERS:
        for strides in (1, 2):
            x = activate(layers.Conv2D(filters, 3, strides=strides, **CONVOLUTION)(x))
    x = activate(layers.Dense(HIDDEN, **DENSE)(layers.Flatten()(x)))
    mean = layers.Dense(LATENT_SIZE, name="mean", **EXACT)(x)
    width = layers.Dense(LATENT_SIZE, activation="softplus", name="width", **EXACT)(x)
    return keras.Model(stamp, [mean, width], name=name)


def decoder(n_bands: int) -> keras.Model:
    """Latent vector to normalised stamp; mirrors the encoder (Fig. 2).

    Input (batch, latent); output (batch, y, x, band) in (0, 1). With ten bands it has
    3,321,098 parameters.
    """
    side = STAMP_SIZE // 2 ** len(FILTERS)
    latent = keras.Input((LATENT_SIZE,), name="latent")
    x = activate(layers.Dense(HIDDEN, **DENSE)(latent))
    x = activate(layers.Dense(side * side * FILTERS[-1], **DENSE)(x))
    x = layers.Reshape((side, side, FILTERS[-1]))(x)
    for filters in reversed(FILTERS):
        for strides in (2, 1):
            upwards = layers.Conv2DTranspose(filters, 3, strides=strides, **CONVOLUTION)
            x = activate(upwards(x))
    stamp = layers.Conv2DTranspose(
        n_bands,
        3,
        padding="same",
        activation="sigmoid",
        bias_initializer=keras.initializers.Constant(EMPTY_SKY),
        name="stamp",
        **EXACT,
    )(x)
    return keras.Model(latent, stamp, name="decoder")


def kl_divergence(mean: keras.KerasTensor, width: keras.KerasTensor):
    """KL divergence of N(mean, width^2) from N(0, 1), summed over the latent axis.

    The regularisation term of eq. 5; (batch, latent) to (batch,), in nats.
    """
    width = ops.maximum(width, SMALLEST_WIDTH)
    terms = ops.square(mean) + ops.square(width) - 1 - 2 * ops.log(width)
    return 0.5 * ops.sum(terms, axis=-1)


def cross_entropy(target, output):
    """Bernoulli cross-entropy summed over pixels and bands (the last term of eq. 5).

    Both (batch, y, x, band), `output` in (0, 1); returns (batch,), in nats.
    """
    losses = ops.binary_crossentropy(target, output)
    return ops.sum(losses, axis=(1, 2, 3))


def side_by_side(encoder: keras.Model) -> keras.Model:
    """The encoder with mean and width in one output (batch, 2 * latent)."""
    return keras.Model(encoder.input, ops.concatenate(encoder.outputs, axis=-1))


def in_widths(error, width):
    """Errors in units of their width, held back beyond ASTRAY.

    Half their square is that of a Gaussian up to there, and then goes on as a
    logarithm, without a step or a bend.
    """
    error = error / width
    beyond = ops.log(ops.maximum(ops.abs(error), ASTRAY) / ASTRAY)
    held = ops.sign(error) * ASTRAY * ops.sqrt(1 + 2 * beyond)
    return ops.where(beyond > 0, held, error)


def latent_likelihood(code, latent):
    """Minus the logarithm of the likelihood of a code, up to a constant, in nats.

    `code` (batch, latent); `latent` (batch, 2 * latent), mean and width of a Gaussian;
    returns (batch,). Errors are those of `in_widths`.
    """
    mean, width = ops.split(latent, 2, axis=-1)
    width = ops.maximum(width, SMALLEST_CODE_WIDTH)
    error = in_widths(code - mean, width)
    return ops.sum(ops.log(width) + 0.5 * ops.square(error), axis=-1)


def calibration_loss(code, latent):
    """Squared bias, and a little of two scatters, of codes guessed many times, in nats.

    A batch holds its blends COPIES times with other noise, so the mean product of two
    errors of a blend is, on average, the square of its bias (Tewes et al. 2019). In the
    second half of the copies its neighbours are turned by 90 degrees: half the sum of
    the mean errors of both views is bias, half the difference what neighbours do, of
    weight MISTAKEN; LEEWAY is that of the variance. Widths are taught to be the sizes
    of the errors, and errors are counted in widths. Arguments as for
    `latent_likelihood`; returns (batch / COPIES,).
    """
    mean, width = ops.split(latent, 2, axis=-1)
    width = ops.maximum(width, SMALLEST_CODE_WIDTH)
    error = in_widths(code - mean, ops.stop_gradient(width))
    known = ops.stop_gradient(code - mean)
    sizes = ops.log(width) + 0.5 * ops.square(in_widths(known, width))
    error = ops.reshape(error, (2, COPIES // 2, -1, error.shape[-1]))
    sizes = ops.reshape(sizes, (COPIES, -1, sizes.shape[-1]))  # (copy, blend, latent)
    squares = ops.sum(ops.square(error), axis=(0, 1))
    views = ops.sum(error, axis=1)  # (view, blend, latent)
    # Mean products of errors of one view, squares left out, and of both views.
    alike = ops.sum(ops.square(views), axis=0) - squares
    alike = alike / (COPIES * (COPIES // 2 - 1))
    across = views[0] * views[1] / (COPIES // 2) ** 2
    point = ((1 + MISTAKEN) / 2 - LEEWAY) * alike + (1 - MISTAKEN) / 2 * across
    point = 0.5 * (point + LEEWAY * squares / COPIES)
    return ops.sum(point + ops.mean(sizes, axis=0), axis=-1)


class Sampling(layers.Layer):
    """Draw from the latent Gaussian: mean + width * standard normal."""

    def __init__(self, seed: int, **kwargs):
        super().__init__(**kwargs)
        self.generator = keras.random.SeedGenerator(seed)

    def call(self, inputs):
        mean, width = inputs  # (batch, latent) each
        return mean + width * keras.random.normal(ops.shape(mean), seed=self.generator)


class Autoencoder(keras.Model):
    """Encoder, latent draw and decoder, trained on cross-entropy + beta KL (eq. 6).

    With both parts trainable it is the VAE of section 3.2; with `freeze_decoder` it is
    the deblender of section 3.3. Fit it on pairs of (noisy input, noiseless target).
    """

    def __init__(
        self,
        encoder: keras.Model,
        decoder: keras.Model,
        seed: int,
        freeze_decoder: bool = False,
    ):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.decoder.trainable = not freeze_decoder
        self.sampling = Sampling(seed, **EXACT)

    def call(self, stamps):
        mean, width = self.encoder(stamps)
        self.add_loss(KL_WEIGHT * ops.mean(kl_divergence(mean, width)))
        return self.decoder(self.sampling([mean, width]))  # (batch, y, x, band)


def vae(n_bands: int, seed: int) -> Autoencoder:
    """A VAE of the paper's architecture with fresh weights, the same for a seed."""
    keras.utils.set_random_seed(seed)  # of the initial weights
    return Autoencoder(encoder(n_bands), decoder(n_bands), seed=seed)


def deblender(first: keras.Model, decoder: keras.Model, seed: int) -> Autoencoder:
    """A second encoder before the frozen decoder of a trained VAE (section 3.3).

    The new encoder starts from another, which is the VAE's in the paper; starting at
    random gives the same result according to it.
    """
    second = encoder(first.input_shape[-1])
    second.set_weights(first.get_weights())
    return Autoencoder(second, decoder, freeze_decoder=True, seed=seed)


def transplant(
    source: keras.Model, target: keras.Model, from_bands: list[int], to_bands: list[int]
) -> None:
    """Start `target` from the weights of `source`, a network of other bands.

    Weights of the same shape are copied; of those with a band axis, the bands that both
    have (`from_bands` of the source are `to_bands` of the target). Kernels of the other
    bands begin at zero, so that the target at first says what the source says.
    """
    for old, new in zip(source.weights, target.weights, strict=True):
        values = ops.convert_to_numpy(new).copy()
        old = ops.convert_to_numpy(old)
        if old.shape == values.shape:
            values = old
        else:
            axis = next(i for i, n in enumerate(old.shape) if n != values.shape[i])
            place = (slice(None),) * axis
            values *= values.ndim == 1  # a bias or a statistic stays as it is
            values[(*place, to_bands)] = old[(*place, from_bands)]
        new.assign(values)
