"""Batches of training pairs, composed on the fly from unit-flux stamps."""

from collections.abc import Callable

import keras
import numpy as np
from joblib import cpu_count

from .networks import COPIES
from .normalisation import NoiseUnits, Normalisation
from .simulation import Scenes
from .surveys import per_pixel

BATCH_SIZE = 16
MOST_WORKERS = 16  # threads that compose batches while the network learns
NOISE_BANK = 2**24  # normal numbers; each image takes a stretch of them
ORDER, BANK, BATCH = 1, 2, 3  # streams of random numbers of one seed
SYMMETRIES = 8  # of a square: four turns, each mirrored or not
CODE_NOISE = 0.05  # keeps neighbouring codes decoding to neighbouring galaxies


def fill_up(values: np.ndarray, n_devices: int) -> np.ndarray:
    """Repeat the first value until all devices that share a batch have as many."""
    extra = -len(values) % n_devices
    return np.concatenate([values, values[:1].repeat(extra, axis=0)])


def sharing_devices() -> int:
    """Devices among which Keras, as it was told in this thread, splits each batch."""
    distribution = keras.distribution.distribution()
    return 1 if distribution is None else distribution.device_mesh.devices.size


class Batches(keras.utils.PyDataset):
    """Pairs of normalised (noisy blend, noiseless target) for `fit`.

    With `augment`, each epoch draws fresh noise and one of the eight flips and
    rotations for each image (section 2.1.2), in a fresh order. `swap_neighbours`, for
    exact centring, also exchanges neighbours between scenes at each epoch, so that
    hardly any blend is seen twice. Without `augment` every epoch gives the same arrays.
    """

    def __init__(
        self,
        scenes: Scenes,
        normalisation: Normalisation | NoiseUnits,
        batch_size: int = BATCH_SIZE,
        seed: int = 0,
        augment: bool = True,
        swap_neighbours: bool = False,
    ):
        # Threads: NumPy works outside Python's lock, and stamps are in memory once.
        workers = min(max(cpu_count() - 1, 1), MOST_WORKERS)
        super().__init__(workers=workers, max_queue_size=2 * workers)
        self.scenes, self.normalisation = scenes, normalisation
        self.batch_size, self.seed = batch_size, seed
        self.augment, self.swap_neighbours = augment, swap_neighbours
        self.n_devices = sharing_devices()  # here, as other threads read the batches
        slots = range(1, int(scenes.counts.max(initial=1)))
        rows = [scenes.neighbour_rows(slot) for slot in slots]
        self.neighbours = np.array(rows, dtype=int).reshape(len(rows), len(scenes))
        # Of its own for validation, which should not know the noise of the training.
        rng = np.random.default_rng([seed, BANK, augment])
        self.bank = rng.standard_normal(NOISE_BANK, np.float32)
        self.epoch = 0
        self._begin()

    def _begin(self) -> None:
        rng = np.random.default_rng([self.seed, ORDER, self.epoch])
        n = len(self.scenes)
        self.order = rng.permutation(n) if self.augment else np.arange(n)
        if self.swap_neighbours:
            swap_neighbours(self.scenes, self.neighbours, rng)

    def __len__(self) -> int:
        return -(-len(self.scenes) // self.batch_size)

    def on_epoch_end(self) -> None:
        if self.augment:
            self.epoch += 1
            self._begin()

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        target, blend, rng = self.draw(index)
        return self.noisy(blend, rng), self.clean(target)

    def draw(self, index: int) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
        """Noiseless targets and blends of a batch in electrons, and its generator."""
        rows, turns, rng = self.choose(index)
        target = self.scenes.compose(rows[:, 0])  # (batch, y, x, band)
        blend = target + self.scenes.compose(rows[:, 1:])
        if self.augment:
            target, blend = dihedral(target, turns), dihedral(blend, turns)
        return target, blend, rng  # (batch, y, x, band)

    def choose(self, index: int) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
        """Rows of the galaxies of a batch, how each image is turned, a generator.

        Rows (batch, galaxy), the target first, -1 where none; turns (batch,).
        """
        chosen = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        chosen = fill_up(chosen, self.n_devices)
        epoch = self.epoch if self.augment else 0
        rng = np.random.default_rng([self.seed, BATCH, epoch, index])
        rows = np.column_stack([self.scenes.first[chosen], *self.neighbours[:, chosen]])
        turns = np.zeros(len(chosen), int)
        if self.augment:
            turns = rng.integers(SYMMETRIES, size=len(chosen))
        return rows, turns, rng

    def noisy(self, blend: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Normalised stamps with noise, what an encoder reads."""
        return self.normalisation.forward(self._add_noise(blend, rng))

    def _add_noise(self, blend: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        # Normal, of the variance of Poisson's: from the 350 electrons of the darkest
        # sky on, hardly another noise. To draw each number anew would take longer
        # than all else in a batch.
        size = blend[0].size
        starts = rng.integers(len(self.bank) - size, size=len(blend))
        noise = np.stack([self.bank[i : i + size] for i in starts])
        noise *= rng.choice(np.float32([-1, 1]), size=(len(blend), 1))
        noise = noise.reshape(blend.shape)
        sky = per_pixel(self.scenes.survey.sky, blend)
        noise *= np.sqrt(np.maximum(blend + sky, 0))
        noise += blend
        return noise

    def clean(self, target: np.ndarray) -> np.ndarray:
        """Normalised noiseless stamps, what a decoder should draw."""
        # The Bernoulli likelihood wants them in [0, 1]; ringing may dip below.
        return np.maximum(self.normalisation.forward(target), 0)


class EncoderBatches(Batches):
    """Pairs of (normalised noisy blend, code of its target), to teach an encoder.

    `code` turns noiseless targets in electrons (batch, y, x, band) into what the
    encoder should say of them, (batch, latent).
    """

    def __init__(self, *args, code: Callable, **kwargs):
        super().__init__(*args, **kwargs)
        self.code = code

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        target, blend, rng = self.draw(index)
        return self.noisy(blend, rng), self.code(target)


class DecoderBatches(EncoderBatches):
    """Pairs of (code, normalised noiseless target), which teach a decoder alone."""

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        target, _, rng = self.draw(index)
        code = self.code(target)
        noise = CODE_NOISE * rng.standard_normal(code.shape, dtype=np.float32)
        return code + noise, self.clean(target)


class RepeatedBatches(EncoderBatches):
    """Batches of COPIES views of each blend, with other noise, to teach against bias.

    A batch has its blends in order, then all of them again, and so on; in its second
    half neighbours are turned by 90 degrees about the centre of the stamp. They stay as
    far from it as they were, so the target remains the galaxy nearest to it, though a
    detected peak may no longer be the brightest.
    """

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        target, blend, rng = self.draw(index)
        other = target + np.rot90(blend - target, axes=(1, 2))
        views = [blend] * (COPIES // 2) + [other] * (COPIES // 2)
        code = np.tile(self.code(target), (COPIES, 1))
        return self.noisy(np.concatenate(views), rng), code


def dihedral(images: np.ndarray, elements: np.ndarray) -> np.ndarray:
    """Apply to each square image (y, x, band) one of its SYMMETRIES, from 0."""
    turned = np.empty_like(images)  # (image, y, x, band)
    for i, element in enumerate(elements):
        image = np.rot90(images[i], element % 4)
        turned[i] = image[:, ::-1] if element >= 4 else image
    return turned


def swap_neighbours(
    scenes: Scenes, neighbours: np.ndarray, rng: np.random.Generator
) -> None:
    """Exchange neighbours between scenes at random, in place.

    `neighbours` (slot, scene) holds rows of galaxies, -1 where none. A pair is swapped
    if both targets stay the brightest of their scenes in r: a symmetric move that
    leaves the distribution of scenes as it was drawn.
    """
    slot, scene = np.nonzero(neighbours >= 0)
    order = rng.permutation(len(slot))
    half = len(order) // 2
    a, b = order[:half], order[half : 2 * half]
    r_flux = scenes.flux[:, scenes.survey.reference_index]
    target = r_flux[scenes.first[:-1]]
    row_a, row_b = neighbours[slot[a], scene[a]], neighbours[slot[b], scene[b]]
    fits = (r_flux[row_a] < target[scene[b]]) & (r_flux[row_b] < target[scene[a]])
    neighbours[slot[a][fits], scene[a][fits]] = row_b[fits]
    neighbours[slot[b][fits], scene[b][fits]] = row_a[fits]
