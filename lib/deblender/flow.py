"""A small normalising flow: how the latent numbers of galaxies are distributed.

Principal components come without a prior that could be drawn from. A flow learns one
from the latent vectors of galaxies (Dinh et al. 2017, arXiv:1605.08803).
"""

import keras
import numpy as np
from keras import layers, ops

COUPLINGS = 8
HIDDEN = 256
BATCH = 256
STEEPEST = 2.0  # natural logarithm of what a coupling may stretch a number by
RATE, LARGEST_GRADIENT = 1e-3, 5.0  # of Adam; L2 norm


class Coupling(layers.Layer):
    """Stretch and shift half of the numbers by what the other half says."""

    def __init__(self, order: np.ndarray):
        super().__init__()
        self.order, self.back = order, np.argsort(order)
        self.first = layers.Dense(HIDDEN, activation="silu")
        self.second = layers.Dense(HIDDEN, activation="silu")
        # A coupling begins as the identity.
        self.last = layers.Dense(len(order), kernel_initializer="zeros")

    def build(self, shape: tuple) -> None:
        n = shape[-1] - shape[-1] // 2
        for layer, width in ((self.first, n), (self.second, HIDDEN)):
            layer.build((None, width))
        self.last.build((None, HIDDEN))

    def call(self, x):
        """Numbers (batch, latent) to others, and the logarithm of the volume change."""
        known, other = self._halves(ops.take(x, self.order, axis=-1))
        stretch, shift = self._said(known)
        other = (other - shift) * ops.exp(-stretch)
        return ops.concatenate([known, other], -1), -ops.sum(stretch, -1)

    def inverse(self, x):
        known, other = self._halves(x)
        stretch, shift = self._said(known)
        other = other * ops.exp(stretch) + shift
        return ops.take(ops.concatenate([known, other], -1), self.back, axis=-1)

    def _halves(self, x):
        n = len(self.order) - len(self.order) // 2
        return x[:, :n], x[:, n:]

    def _said(self, known):
        said = self.last(self.second(self.first(known)))
        n = len(self.order) // 2
        return STEEPEST * ops.tanh(said[:, :n] / STEEPEST), said[:, n : 2 * n]


class Flow(keras.Model):
    """Latent vectors to independent normal numbers and back, one to one.

    `fit` it with `fit_flow`. Before the couplings vectors are turned to their principal
    axes, divided by their spread, and drawn in by an arcsinh, for their tails are long.
    """

    def __init__(self, vectors: np.ndarray, seed: int = 0):
        super().__init__()
        self.centre = vectors.mean(axis=0)
        values, self.axes = np.linalg.eigh(np.cov(vectors.T))
        self.spreads = np.sqrt(values)
        self.farthest = np.abs(self.whiten(vectors)).max(axis=0)
        rng = np.random.default_rng(seed)
        orders = [rng.permutation(len(values)) for _ in range(COUPLINGS)]
        self.couplings = [Coupling(order) for order in orders]

    def call(self, whitened):
        """Whitened vectors (batch, latent) to normal numbers; adds -log density."""
        x, volume = whitened, 0.0
        for coupling in self.couplings:
            x, change = coupling(x)
            volume = volume + change
        self.add_loss(ops.mean(0.5 * ops.sum(ops.square(x), -1) - volume))
        return x

    def whiten(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors (n, latent) as the couplings see them."""
        turned = (vectors - self.centre) @ self.axes / self.spreads
        return np.arcsinh(turned).astype(np.float32)

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Draw latent vectors (n, latent), no number of them beyond all known ones."""
        normal = rng.standard_normal((n, len(self.centre)), dtype=np.float32)
        x = ops.convert_to_tensor(normal)  # PyTorch multiplies no arrays by tensors
        for coupling in reversed(self.couplings):
            x = coupling.inverse(x)
        # Where no galaxy taught it, the flow may run away.
        x = np.clip(ops.convert_to_numpy(x), -self.farthest, self.farthest)
        turned = np.sinh(x) * self.spreads
        return turned @ self.axes.T + self.centre


def fit_flow(vectors: np.ndarray, epochs: int = 15, seed: int = 0) -> Flow:
    """Learn how latent vectors (n, latent) are distributed, by their likelihood.

    Raises ValueError for fewer vectors than twice their numbers, or numbers of which
    one is a sum of others.
    """
    n, size = vectors.shape
    if n < 2 * size:
        raise ValueError(f"received {n} vectors; accepted: {2 * size} or more")
    least, *_, most = np.linalg.eigvalsh(np.cov(vectors.T))
    if least < size * np.finfo(float).eps * most:
        raise ValueError(
            f"received {size} numbers of which one is a sum of others; accepted: "
            "independent ones, which a little noise makes of them"
        )
    keras.utils.set_random_seed(seed)  # of the first weights and of the order
    flow = Flow(vectors, seed)
    steps = epochs * -(-n // BATCH)
    rate = keras.optimizers.schedules.CosineDecay(RATE, steps)
    flow.compile(keras.optimizers.Adam(rate, global_clipnorm=LARGEST_GRADIENT))
    flow.fit(flow.whiten(vectors), epochs=epochs, batch_size=BATCH, verbose=0)
    return flow
