"""The training loop: optimiser, progress, history, and a checkpoint at each epoch."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import keras
import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from .batches import Batches
from .files import write_whole
from .networks import calibration_loss, cross_entropy, latent_likelihood
from .on_device import OnDevice, UnitBatches, accelerators, composes
from .weights import dump_variables, dumped_state, fill_variables

LEARNING_RATE = 1e-3
WARM_UP = 100  # steps
# A bright galaxy outweighs a batch of faint ones. With shorter memory and clipped
# gradients, Adam forgets it sooner: in one trial of each, teaching a decoder 4,000
# images, validation loss 696 and not 937.
MEMORY = 0.98  # of Adam's mean square
LARGEST_GRADIENT = {  # L2 norm
    cross_entropy: 600.0,
    latent_likelihood: 50.0,
    calibration_loss: 50.0,
}
Watch = Callable[[], dict[str, float]]  # numbers that an epoch ends with
PATIENCE = 10  # epochs without a better validation loss, after which training stops


class OtherTraining(ValueError):
    """A checkpoint that was written by another training than the one that reads it."""


@dataclass
class History:
    """How a training went: seconds, images seen, and losses against images seen.

    What the scenes of `RepeatedBatches` make is counted once, not with every copy.

    `curve` has `images` and the training `loss` averaged between them, and at the end
    of each epoch `val_images`, `val_loss` (nats a stamp) and what else was watched:
    `typical`, where it is known, is a median of what `val_loss` is the mean of. `kept`
    counts the epochs after which the model has the weights that it is left with.
    """

    images_seen: int = 0
    seconds: float = 0.0
    kept: int = 0
    curve: dict[str, list[float]] = field(
        default_factory=lambda: {
            name: [] for name in ("images", "loss", "val_images", "val_loss")
        }
    )


class Recorder(keras.callbacks.Callback):
    """Keeps the history of a training, the loss in some forty points, and shows it."""

    def __init__(self, batches: Batches, epochs: int, watch: Watch | None = None):
        super().__init__()
        self.batches, self.epochs, self.watch = batches, epochs, watch
        self.every = max(len(batches) * epochs // 40, 1)
        self.history, self.steps = History(), 0
        # Batches and sum of their losses up to the last point of the curve, counted
        # from the start of the epoch: negative where the point is of an earlier one.
        self.last_point = (0, 0.0)

    def on_train_begin(self, logs: dict | None = None) -> None:
        self.start = time.monotonic() - self.history.seconds
        total = self.epochs * len(self.batches.scenes)  # of this stage
        seen = self.history.images_seen
        self.bar = tqdm(desc="training", total=total, initial=seen, unit=" images")

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.steps += 1
        epochs, steps = divmod(self.steps, len(self.batches))
        seen = epochs * len(self.batches.scenes) + steps * self.batches.batch_size
        self.bar.update(seen - self.history.images_seen)
        self.history.images_seen = seen
        self.history.seconds = round(time.monotonic() - self.start, 1)
        if self.steps % self.every == 0:
            self._keep(batch + 1, logs["loss"])

    def _keep(self, batches: int, loss: float) -> None:
        # Keras reports the mean since the epoch began.
        total = float(loss) * batches
        before, total_before = self.last_point
        mean = (total - total_before) / (batches - before)
        self.history.curve["images"].append(self.history.images_seen)
        self.history.curve["loss"].append(round(mean, 2))
        self.last_point = (batches, total)
        self.bar.set_postfix(loss=f"{mean:.1f}", refresh=False)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        (before, total), n = self.last_point, len(self.batches)
        self.last_point = (before - n, total - float(logs["loss"]) * n)
        if "val_loss" in logs:
            self.history.curve["val_images"].append(self.history.images_seen)
            self.history.curve["val_loss"].append(round(float(logs["val_loss"]), 2))
        for name, value in self.watch().items() if self.watch else ():
            self.history.curve.setdefault(name, []).append(round(value, 4))

    def on_train_end(self, logs: dict | None = None) -> None:
        self.bar.close()


class Checkpoint(keras.callbacks.Callback):
    """Writes, at the end of each epoch, all that a training needs to go on.

    One file has the variables of model and optimiser and the history, another the
    model of the epoch of lowest validation loss, the typical one where it is watched.
    The log, for who looks on, grows with each point of the curve. Each is written whole
    or not at all.
    """

    def __init__(self, folder: Path, recorder: Recorder, setting: dict):
        super().__init__()
        self.recorder, self.setting = recorder, setting
        self.last, self.best = folder / "last.safetensors", folder / "best.safetensors"
        self.log = folder / "history.json"
        folder.mkdir(parents=True, exist_ok=True)

    def resume(self, model: keras.Model) -> int:
        """Go back to the last checkpoint; returns the number of epochs done.

        The first weights of `model`, which is built, are a part of the setting.
        """
        model.optimizer.build(model.trainable_variables)
        self.setting["start"] = _digest(model.get_weights())
        if not self.last.is_file():
            return 0
        state = dumped_state(self.last)
        if state["setting"] != self.setting:
            raise OtherTraining(
                f"{self.last} was written by a training of {state['setting']}; "
                f"accepted: {self.setting}, or another folder"
            )
        fill_variables(self._variables(model), self.last)
        self.recorder.history = History(**state["history"])
        self.recorder.last_point = state["last_point"]
        self.recorder.steps = state["epochs"] * len(self.recorder.batches)
        for _ in range(state["epochs"]):
            self.recorder.batches.on_epoch_end()
        return state["epochs"]

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if self.recorder.steps % self.recorder.every == 0:
            self._log()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if self.best_epoch() == len(self._losses()):
            write_whole(self.best, dump_variables(self.model.weights, {}))
        state = {"epochs": epoch + 1, "setting": self.setting}
        state |= {"history": asdict(self.recorder.history)}
        state |= {"last_point": self.recorder.last_point}
        write_whole(self.last, dump_variables(self._variables(self.model), state))
        self._log()
        if self.over():
            self.model.stop_training = True

    def _log(self) -> None:
        history = asdict(self.recorder.history)
        write_whole(self.log, json.dumps(history, indent=1).encode())

    def over(self) -> bool:
        """Whether the validation loss has stopped improving."""
        return len(self._losses()) - self.best_epoch() >= PATIENCE

    def best_epoch(self) -> int:
        """Epochs until the lowest validation loss was first reached; 0 without any."""
        losses = self._losses()
        return int(np.argmin(losses)) + 1 if losses else 0

    def _losses(self) -> list[float]:
        """Validation losses; one that is no number is worse than any."""
        curve = self.recorder.history.curve
        losses = curve.get("typical", curve["val_loss"])
        return np.nan_to_num(losses, nan=np.inf, posinf=np.inf).tolist()

    @staticmethod
    def _variables(model: keras.Model) -> list[keras.Variable]:
        return [*model.variables, *model.optimizer.variables]


def fit(
    model: keras.Model,
    batches: Batches,
    validation: Batches | None = None,
    epochs: int = 1,
    learning_rate: float = LEARNING_RATE,
    loss: Callable = cross_entropy,
    folder: Path | None = None,
    watch: Watch | None = None,
) -> History:
    """Train with Adam, clipped gradients, a short warm-up and a cosine decay to zero.

    Only what `model` leaves trainable changes. Where there is a GPU, it composes the
    batches too. With a `folder`, each epoch leaves a checkpoint in it; a training that
    was stopped goes on from there, to the same bits, ends once the validation loss has
    not improved for PATIENCE epochs, and leaves the weights of the best epoch. What
    `watch` returns after each epoch joins the history; a `typical` among it is the
    validation loss to go by.

    Raises ValueError for no epochs or an unknown loss, and OtherTraining if the
    checkpoint in `folder` is of other galaxies, first weights, seed, sizes, loss,
    precision or learning rate, or composed elsewhere.
    """
    if epochs < 1:
        raise ValueError(f"received {epochs} epochs; accepted: one or more")
    optimiser = _adam(epochs * len(batches), learning_rate, loss)
    setting = _setting(batches, validation, epochs, learning_rate, loss)
    recorder = Recorder(batches, epochs, watch)
    model, fed, validation, loss = _composing(model, batches, validation, loss)
    model.compile(optimiser, loss=loss)
    model(fed[0][0])  # creates what a checkpoint restores
    checkpoint, done = None, 0
    if folder is not None:
        setting["on_device"] = loss is None
        checkpoint = Checkpoint(folder, recorder, setting)
        done = checkpoint.resume(model)
    if done < epochs and not (done and checkpoint.over()):
        # NumPy's threads would wait in the way of those of the network.
        with threadpool_limits(1, "blas"):
            model.fit(
                fed,
                validation_data=validation,
                initial_epoch=done,
                epochs=epochs,
                callbacks=[recorder, checkpoint] if checkpoint else [recorder],
                shuffle=False,  # the batches see to that, from their seed
                verbose=0,
            )
    recorder.history.kept = epochs
    if checkpoint is not None:
        fill_variables(model.weights, checkpoint.best)
        recorder.history.kept = checkpoint.best_epoch() or epochs
    return recorder.history


def _composing(
    model: keras.Model, batches: Batches, validation: Batches | None, loss: Callable
) -> tuple:
    """Model, batches of both kinds and loss for `fit`: a GPU composes, and adds it."""
    if not (accelerators() and composes(batches)):
        return model, batches, validation, loss
    on_device = OnDevice(model, batches, loss)
    return on_device, UnitBatches(batches), validation and UnitBatches(validation), None


def _setting(
    batches: Batches,
    validation: Batches | None,
    epochs: int,
    learning_rate: float,
    loss: Callable,
) -> dict:
    """What tells one training from another, but for its first weights."""
    scenes = [each.scenes for each in (batches, validation) if each is not None]
    # Galaxies drawn with the noise of HST and without it have the same fluxes.
    data = [a for s in scenes for a in (s.flux, np.asarray(s.truth["snr"]))]
    return {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batches.batch_size,
        "loss": loss.__name__,
        "precision": keras.config.dtype_policy().name,
        "seed": batches.seed,
        "data": _digest(data),
    }


def _digest(arrays: list[np.ndarray]) -> str:
    """A fingerprint of arrays, to tell one training from another."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:12]


def _adam(
    steps: int, learning_rate: float, loss: Callable
) -> keras.optimizers.Optimizer:
    if loss not in LARGEST_GRADIENT:
        known = ", ".join(each.__name__ for each in LARGEST_GRADIENT)
        raise ValueError(f"received loss {loss.__name__}; accepted: {known}")
    warm_up = min(WARM_UP, steps // 10)
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=learning_rate / 10,
        decay_steps=max(steps - warm_up, 1),
        warmup_target=learning_rate,
        warmup_steps=warm_up,
    )
    clip = LARGEST_GRADIENT[loss]
    return keras.optimizers.Adam(schedule, beta_2=MEMORY, global_clipnorm=clip)
