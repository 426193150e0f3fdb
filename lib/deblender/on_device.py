"""Training pairs composed on the device that trains.

A GPU learns from stamps faster than processors can compose them. So the host hands
over unit-flux stamps in half precision, fluxes and turns, and the device adds up
galaxies and noise; what comes out is what `batches` would compose, but for the noise.
"""

import platform
import re
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
from keras import ops

from .batches import Batches, EncoderBatches, RepeatedBatches
from .networks import COPIES
from .simulation import STAMP_SCALE


class UnitBatches(keras.utils.PyDataset):
    """What `batches` would compose a batch from, for a model `OnDevice`.

    A batch is a dictionary of `turns` (image,), one of the eight symmetries, `flux`
    (image, galaxy, band), zero where there is no galaxy, and of unit-flux stamps
    (image, galaxy, y, x) under the name of each instrument.
    """

    def __init__(self, batches: Batches):
        super().__init__(batches.workers, max_queue_size=batches.max_queue_size)
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def on_epoch_end(self) -> None:
        self.batches.on_epoch_end()

    def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray]]:
        rows, turns, _ = self.batches.choose(index)  # (image, galaxy), (image,)
        scenes, there = self.batches.scenes, rows >= 0
        rows = np.where(there, rows, rows[:, :1])  # any galaxy, of no flux
        batch = {name: stamps[rows] for name, stamps in scenes.stamps.items()}
        flux = scenes.flux[rows] * there[..., None] / np.float32(STAMP_SCALE)
        return (batch | {"flux": flux, "turns": turns.astype(np.int32)},)


class OnDevice(keras.Model):
    """Composes noisy blends and answers to them, and adds the loss of `model`.

    Fit it on UnitBatches without a loss. The noise is Poisson's, as a normal number of
    the same variance.
    """

    def __init__(self, model: keras.Model, batches: Batches, loss: Callable):
        # Fluxes and stamps keep their digits, whatever the precision of `model`.
        super().__init__(dtype="float32", autocast=False)
        self.model, self.loss_of, self.batches = model, loss, batches
        # Of their own: a VAE's latent draws begin with the seed itself.
        seeds = np.random.SeedSequence(batches.seed).generate_state(2) >> 1
        self.alone, begin = map(int, seeds)
        self.generator = keras.random.SeedGenerator(begin)

    def call(self, units: dict, training: bool = False):
        # Validation sees one and the same noise in each of its batches and epochs.
        seed = self.generator if training else self.alone
        noisy, answer = self.pairs(*self.galaxies(units), seed)
        said = self.model(noisy)
        self.add_loss(ops.mean(self.loss_of(answer, said)))
        return said

    def pairs(self, target, rest, seed) -> tuple:
        """Normalised noisy blends and answers, from noiseless galaxies in electrons."""
        answer, blend = self.answer(target), target + rest
        if isinstance(self.batches, RepeatedBatches):
            other, half = target + quarter_turn(rest), COPIES // 2
            blend = ops.concatenate([blend] * half + [other] * half)
            answer = ops.tile(answer, (COPIES, 1))
        return self.normalised(self.noisy(blend, seed)), answer

    def galaxies(self, units: dict) -> tuple:
        """Noiseless targets and sums of neighbours, electrons (image, y, x, band)."""
        targets, rests = [], []
        for camera, bands in self.batches.scenes.survey.cameras:
            stamps = ops.cast(units[camera.name], "float32")  # (image, galaxy, y, x)
            flux = units["flux"][..., bands]  # (image, galaxy, band)
            targets.append(ops.einsum("iyx,ib->iyxb", stamps[:, 0], flux[:, 0]))
            rests.append(ops.einsum("igyx,igb->iyxb", stamps[:, 1:], flux[:, 1:]))
        both = ops.concatenate(targets, -1), ops.concatenate(rests, -1)
        return tuple(turn(images, units["turns"]) for images in both)

    def noisy(self, blend, seed):
        """Blends with the noise of sky and sources, the mean sky subtracted."""
        sky = ops.convert_to_tensor(self.batches.scenes.survey.sky, "float32")
        noise = keras.random.normal(ops.shape(blend), seed=seed)
        return blend + noise * ops.sqrt(ops.maximum(blend + sky, 0.0))

    def normalised(self, images):
        """What the normalisation of the batches makes of electrons."""
        of = self.batches.normalisation
        return of.curve(images * ops.convert_to_tensor(of.factor, "float32"))

    def answer(self, target):
        """What `model` should say of targets, (image, ...)."""
        if isinstance(self.batches, EncoderBatches):
            return self.batches.code.of_normalised(self.normalised(target))
        return ops.maximum(self.normalised(target), 0.0)


def accelerators() -> int:
    """How many devices other than processors the backend has."""
    return len(_beyond_processors())


def _beyond_processors() -> list[str]:
    return [name for name in devices() if "cpu" not in name.lower()]


def devices() -> list[str]:
    """Devices that the backend lists: GPUs where there are some, or else processors.

    On PyTorch GPUs alone, of which there may be none.
    """
    if keras.backend.backend() == "torch":  # of which Keras lists none
        import torch

        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    try:
        return keras.distribution.list_devices()
    except (AttributeError, NotImplementedError):  # not with every backend
        return []


def accelerator_names() -> list[str]:
    """What their maker calls the accelerators, or else the backend, for a card."""
    match keras.backend.backend():
        case "torch":
            import torch

            return [torch.cuda.get_device_name(name) for name in devices()]
        case "jax":
            import jax

            return [d.device_kind for d in jax.devices() if d.platform != "cpu"]
        case _:
            return _beyond_processors()


def processor() -> str:
    """What its maker calls the processor, or else its kind."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return named[1] if named else platform.machine()


def composes(batches: Batches) -> bool:
    """Whether a device can compose them: not every kind, and not every code."""
    if type(batches) is Batches:
        return True
    known = type(batches) in (EncoderBatches, RepeatedBatches)
    return known and hasattr(batches.code, "of_normalised")


def turn(images, turns):
    """Square images (image, y, x, band), each by one of the eight symmetries, 0 to 7.

    As `batches.dihedral`.
    """
    steps = quarter_turn, lambda x: ops.flip(x, (1, 2)), lambda x: ops.flip(x, 2)
    for bit, step in enumerate(steps):
        chosen = ops.reshape(ops.bitwise_and(turns, 1 << bit) > 0, (-1, 1, 1, 1))
        images = ops.where(chosen, step(images), images)
    return images


def quarter_turn(images):
    """Images (image, y, x, band) turned by 90 degrees, as `np.rot90` does."""
    return ops.flip(ops.transpose(images, (0, 2, 1, 3)), axis=1)
