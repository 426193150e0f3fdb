"""Batches composed on the fly, and the training of VAE and deblender."""

import time
from dataclasses import dataclass, field, replace

import keras
import numpy as np

from .catalogues import Catalogue
from .networks import Autoencoder, cross_entropy, deblender, transplant, vae
from .normalisation import Normalisation, fit_normalisation
from .simulation import Scenes, add_noise, simulate
from .surveys import Survey
from .weights import Network

BATCH_SIZE = 16
LEARNING_RATE = 1e-3
WARM_UP = 100  # steps
CONSTANTS_FROM = 2000  # scenes, enough for the means of eq. 4


class Batches(keras.utils.PyDataset):
    """Pairs of normalised (noisy blend, noiseless target) for `fit`.

    With `augment`, each epoch draws fresh Poisson noise and one of the eight flips and
    rotations for each image (section 2.1.2), in a fresh order. `swap_neighbours`, for
    exact centring, also exchanges neighbours between scenes at each epoch, so that no
    blend is seen twice. Without `augment` every epoch gives the same arrays.
    """

    def __init__(
        self,
        scenes: Scenes,
        normalisation: Normalisation,
        batch_size: int = BATCH_SIZE,
        seed: int = 0,
        augment: bool = True,
        swap_neighbours: bool = False,
    ):
        super().__init__(workers=1, use_multiprocessing=False, max_queue_size=4)
        self.scenes, self.normalisation = scenes, normalisation
        self.batch_size, self.seed = batch_size, seed
        self.augment, self.swap_neighbours = augment, swap_neighbours
        slots = range(1, int(scenes.counts.max(initial=1)))
        rows = [scenes.neighbour_rows(slot) for slot in slots]
        self.neighbours = np.array(rows, dtype=int).reshape(len(rows), len(scenes))
        self.epoch = 0
        self._begin()

    def _begin(self) -> None:
        rng = np.random.default_rng([self.seed, self.epoch])
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
        chosen = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        epoch = self.epoch if self.augment else 0
        rng = np.random.default_rng([self.seed, epoch, 1 + index])
        target = self.scenes.compose(self.scenes.first[chosen])  # (batch, y, x, band)
        blend = target.copy()
        for rows in self.neighbours:
            blend += self.scenes.compose(rows[chosen])
        if self.augment:
            turns = rng.integers(8, size=len(chosen))
            target, blend = dihedral(target, turns), dihedral(blend, turns)
        noisy = add_noise(blend, self.scenes.survey.sky, rng)
        # The Bernoulli likelihood wants targets in [0, 1]; ringing may dip below.
        clean = np.maximum(self.normalisation.forward(target), 0)
        return self.normalisation.forward(noisy), clean


def dihedral(images: np.ndarray, elements: np.ndarray) -> np.ndarray:
    """Apply to each square image (y, x, band) one of the eight symmetries, 0 to 7."""
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
    r_flux = scenes.flux[:, scenes.survey.index("r")]
    target = r_flux[scenes.first[:-1]]
    row_a, row_b = neighbours[slot[a], scene[a]], neighbours[slot[b], scene[b]]
    fits = (r_flux[row_a] < target[scene[b]]) & (r_flux[row_b] < target[scene[a]])
    neighbours[slot[a][fits], scene[a][fits]] = row_b[fits]
    neighbours[slot[b][fits], scene[b][fits]] = row_a[fits]


@dataclass
class History:
    """How a training went: seconds, images seen, and losses against images seen.

    `curve` has `images` and the training `loss` averaged between them, and at the end
    of each epoch `val_images` and `val_loss` (nats a stamp).
    """

    curve: dict[str, list[float]] = field(default_factory=dict)
    images_seen: int = 0
    seconds: float = 0.0


class Curve(keras.callbacks.Callback):
    """Keeps the loss of a training in some forty points, and that of each epoch."""

    def __init__(self, batches: Batches, epochs: int):
        super().__init__()
        self.batches = batches
        self.every = max(len(batches) * epochs // 40, 1)
        self.steps = 0
        self.kept: dict[str, list] = {
            name: [] for name in ("images", "loss", "val_images", "val_loss")
        }

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.before, self.total_before = 0, 0.0

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.steps += 1
        if self.steps % self.every == 0:
            # Keras reports the mean since the epoch began.
            total = logs["loss"] * (batch + 1)
            mean = (total - self.total_before) / (batch + 1 - self.before)
            self.kept["images"].append(self._images())
            self.kept["loss"].append(round(float(mean), 2))
            self.before, self.total_before = batch + 1, total

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if "val_loss" in logs:
            self.kept["val_images"].append(self._images())
            self.kept["val_loss"].append(round(float(logs["val_loss"]), 2))

    def _images(self) -> int:
        epochs, steps = divmod(self.steps, len(self.batches))
        return epochs * len(self.batches.scenes) + steps * self.batches.batch_size


def fit(
    model: Autoencoder,
    batches: Batches,
    validation: Batches | None = None,
    epochs: int = 1,
    learning_rate: float = LEARNING_RATE,
    verbose: int | str = 2,
) -> History:
    """Train with Adam, a short warm-up and a cosine decay to zero.

    Only what `model` leaves trainable changes.
    """
    steps = epochs * len(batches)
    warm_up = min(WARM_UP, steps // 10)
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=learning_rate / 10,
        decay_steps=max(steps - warm_up, 1),
        warmup_target=learning_rate,
        warmup_steps=warm_up,
    )
    model.compile(keras.optimizers.Adam(schedule), loss=cross_entropy)
    start, curve = time.monotonic(), Curve(batches, epochs)
    model.fit(
        batches,
        validation_data=validation,
        epochs=epochs,
        callbacks=[curve],
        verbose=verbose,
    )
    images_seen = epochs * len(batches.scenes)
    return History(curve.kept, images_seen, time.monotonic() - start)


def train_vae(
    catalogue: Catalogue,
    survey: Survey,
    n_train: int,
    n_validation: int,
    epochs: int,
    centring: str = "exact",
    seed: int = 1,
    start: Network | None = None,
    learning_rate: float = LEARNING_RATE,
    verbose: int | str = 2,
) -> tuple[Network, History]:
    """Train the prior on isolated galaxies (section 3.2).

    `start` gives the first weights, of the bands that both surveys have. Returns a
    network without deblender, and its history.
    """
    train = simulate(catalogue, survey, n_train, 1, centring, seed, "train")
    validation = simulate(
        catalogue, survey, n_validation, 1, centring, seed, "validation"
    )
    model = vae(len(survey.bands), seed=seed)
    few = train.take(np.arange(min(n_train, CONSTANTS_FROM)))
    normalisation = fit_normalisation(few)
    if start is not None:
        normalisation = _start_from(start, survey, model, normalisation)
    history = fit(
        model,
        Batches(train, normalisation, seed=seed),
        Batches(validation, normalisation, seed=seed, augment=False),
        epochs,
        learning_rate,
        verbose,
    )
    card = {
        "centring": centring,
        "catalogue": _describe(catalogue),
        "seed": seed,
        "batch_size": BATCH_SIZE,
        "images_seen": {"vae": history.images_seen, "deblender": 0},
        "vae": _summary(history, n_train, epochs, learning_rate),
    }
    if start is not None:
        card["start"] = {
            "survey": start.survey.name,
            "images_seen": start.images_seen,
        }
    network = Network(survey, normalisation, model.encoder, model.decoder, None, card)
    return network, history


def train_deblender(
    prior: Network,
    catalogue: Catalogue,
    n_train: int,
    n_validation: int,
    epochs: int,
    centring: str = "exact",
    seed: int = 1,
    start: keras.Model | None = None,
    learning_rate: float = LEARNING_RATE,
    verbose: int | str = 2,
) -> tuple[Network, History]:
    """Train a second encoder on blends before the frozen decoder (section 3.3).

    It starts from `start`, or from the encoder of `prior`. Returns a network that
    shares decoder and normalisation with `prior`, and its history.
    """
    survey, normalisation = prior.survey, prior.normalisation
    train = simulate(catalogue, survey, n_train, 4, centring, seed, "train")
    validation = simulate(
        catalogue, survey, n_validation, 4, centring, seed, "validation"
    )
    model = deblender((start or prior.encoder, prior.decoder), seed=seed)
    exact = centring == "exact"
    history = fit(
        model,
        Batches(train, normalisation, seed=seed, swap_neighbours=exact),
        Batches(validation, normalisation, seed=seed, augment=False),
        epochs,
        learning_rate,
        verbose,
    )
    seen = prior.images_seen | {"deblender": history.images_seen}
    card = prior.card | {
        "images_seen": seen,
        "deblender": _summary(history, n_train, epochs, learning_rate)
        | {"centring": centring, "catalogue": _describe(catalogue)},
    }
    return replace(prior, deblender=model.encoder, card=card), history


def _start_from(
    start: Network, survey: Survey, model: Autoencoder, fresh: Normalisation
) -> Normalisation:
    """Copy the weights and normalisation constants of the bands that both have.

    Of the bands that only the new survey has, the constants of `fresh` are kept.
    """
    both = [name for name in survey.band_names if name in start.survey.band_names]
    old = [start.survey.index(name) for name in both]
    new = [survey.index(name) for name in both]
    transplant(start.encoder, model.encoder, old, new)
    transplant(start.decoder, model.decoder, old, new)
    scale = fresh.scale.copy()
    scale[new] = start.normalisation.scale[old]
    return replace(fresh, scale=scale)


def _describe(catalogue: Catalogue) -> dict[str, str | bool]:
    return {
        "name": catalogue.name,
        "real": catalogue.real,
        "sha256": catalogue.digest,
    }


def _summary(history: History, n_train: int, epochs: int, learning_rate: float) -> dict:
    return {
        "scenes": n_train,
        "epochs": epochs,
        "images_seen": history.images_seen,
        "schedule": f"Adam {learning_rate:g}, warm-up, cosine decay to zero",
        "seconds": round(history.seconds),
        "curve": history.curve,
    }
