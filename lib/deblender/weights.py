"""Trained networks on disk: safetensors parts, a JSON card, no pickle."""

import copy
import hashlib
import json
import os
import platform
import re
import shutil
import threading
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import keras
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save as dump_safetensors

from . import linear, networks
from .batches import dihedral
from .files import data_folder, write_together
from .normalisation import NoiseUnits, Normalisation
from .surveys import SURVEYS, Survey, survey
from .workers import spread

if TYPE_CHECKING:
    from distributed import Client

# `encoder` is that of the VAE, `correlation` of the errors of a linear deblender.
PARTS = ("decoder", "encoder", "deblender", "correlation")
SIDES = (1, 2, 4, 8)  # as it is; and turned by 90 degrees; by all four; and mirrored
CARD = "card.json"
ALIKE = ("survey", "centring", "architecture", "catalogue")  # of trainings in a row
# Biases and batch statistics are few and need the range; all else is kept in half.
HALF_FROM = 2000  # elements
BATCH = 48  # stamps through a network at a time; divides by 2, 3, 4, 6, 8 devices
PIECE = 20 * BATCH  # stamps a worker takes; whole batches, so that bits do not change
# On JAX, Keras takes a model's weights away while it predicts: one thread at a time.
PREDICTING = threading.Lock()


@dataclass(frozen=True)
class Result:
    """What the deblender says of each stamp.

    `image` (scene, y, x, band) in electrons is the decoded latent mean, or a mean of
    those of several sides (see `Network`); `latent_mean` and `latent_width` (scene,
    latent); `samples` (sample, scene, y, x, band) in electrons are decoded draws of the
    latent Gaussian, or None. They scatter around the decoded `latent_mean`, and are
    tied together by a `correlation`, if there is one.
    """

    image: np.ndarray
    latent_mean: np.ndarray
    latent_width: np.ndarray
    samples: np.ndarray | None = None


@dataclass
class Network:
    """A prior and the deblender built on its decoder, for one survey.

    `encoder` is that of the VAE, or None: a linear decoder needs none, and the paper's
    decentred networks of the book come without;
    `deblender` is the second encoder, None before it is trained; `card` says how they
    were made; `correlation` ties together the draws of latent numbers of a linear
    network, which are independent without it.

    `sides` is from how many sides it looks at a stamp, 1, 2, 4 or 8: turned and
    mirrored, deblended, and turned back. A mean of these images errs less, in as many
    times the time; latent numbers and samples are of the stamp as it is.
    """

    survey: Survey
    normalisation: Normalisation | NoiseUnits
    encoder: keras.Model | None
    decoder: keras.Model
    deblender: keras.Model | None
    card: dict
    correlation: linear.Correlation | None = None
    sides: int = 1

    @property
    def architecture(self) -> str:
        """`"paper"`, of section 3, or `"linear"`, of `deblender.linear`."""
        return "linear" if isinstance(self.normalisation, NoiseUnits) else "paper"

    @property
    def code(self) -> linear.Code:
        """Noiseless stamps to latent vectors, of a linear network."""
        return linear.Code(self.decoder, self.normalisation)

    @property
    def trainings(self) -> list[dict]:
        """Cards of the trainings that made it, the last its own.

        Each began from the one before. What the first began from, if anything, was of
        another kind (see ALIKE), or a warm start.
        """
        own = _card(self, {})

        def alike(card: dict) -> bool:
            return all(card.get(name) == own.get(name) for name in ALIKE)

        last, *before = lineage(self.card)
        return [last, *takewhile(alike, before)][::-1]

    @property
    def images_seen(self) -> dict[str, int]:
        """Images that taught it, in each stage of all trainings; blends where repeated.

        Epochs after the one that was kept do not count.
        """
        total: dict[str, int] = {}
        for card in self.trainings:
            for stage, images in card["images_seen"].items():
                total[stage] = total.get(stage, 0) + images
        return total

    @property
    def codes_seen(self) -> dict[str, int]:
        """Images of the warm start that it goes back to, by part; {} without one."""
        seen = (card["images_seen"] for card in lineage(self.card))
        return next((images for images in seen if "encoder" in images), {})

    def deblend(
        self,
        noisy: np.ndarray,
        n_samples: int = 0,
        seed: int = 0,
        client: "Client | None" = None,
    ) -> Result:
        """Recover the central galaxy of noisy blends (section 3.3).

        `noisy` (scene, y, x, band) in electrons, sky-subtracted. The image is the
        decoded latent mean, or a mean of several `sides`; with `n_samples`, that many
        decoded draws come with it. The workers of a Dask `client` take PIECE stamps at
        a time. Image, mean and width of a stamp do not depend on which others come
        with it.

        Raises ValueError for a network without deblender, for no stamps, for another
        shape or survey, for NaN, or for `sides` that are not 1, 2, 4 or 8.
        """
        if self.deblender is None:
            raise ValueError("this network holds a VAE only; train a deblender on it")
        return self._pass("deblender", noisy, n_samples, seed, client)

    def reconstruct(self, noisy: np.ndarray) -> Result:
        """Denoise isolated galaxies with the VAE (section 3.2); as `deblend`.

        Without a VAE it is the deblender that sees them.
        """
        part = "encoder" if self.encoder else "deblender"
        return self._pass(part, noisy, 0, 0, None)

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """Latent vectors (n, latent) to images (n, y, x, band) in electrons."""
        return self.normalisation.inverse(_predict(self.decoder, latent))

    def generate(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Galaxies drawn from the prior, (n, y, x, band) in electrons.

        Raises ValueError for a linear decoder, whose latent numbers are not normal.
        """
        if self.architecture == "linear":
            raise ValueError(
                "received a linear decoder; accepted: a VAE to draw from, or latent "
                "vectors of a deblender.flow for `decode`"
            )
        size = self.decoder.input_shape[-1]
        return self.decode(rng.standard_normal((n, size), dtype=np.float32))

    def _pass(
        self,
        part: str,
        noisy: np.ndarray,
        n_samples: int,
        seed: int,
        client: "Client | None",
    ) -> Result:
        noisy = self.survey.check_images(noisy)
        if self.sides not in SIDES:
            raise ValueError(f"received {self.sides} sides; accepted: 1, 2, 4 or 8")
        if not len(noisy):
            raise ValueError("received no stamps; accepted: one or more")
        shape = (n_samples, len(noisy), self.decoder.input_shape[-1])
        draws = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
        pieces = [
            (start, noisy[start : start + PIECE], draws[:, start : start + PIECE])
            for start in range(0, len(noisy), PIECE)
        ]
        if client is None:
            results = dict(_apply((self, part), piece) for piece in pieces)
        else:
            results = dict(spread(_apply, (self, part), pieces, client))
        return _join([results[start] for start, *_ in pieces])

    def __getstate__(self) -> dict:
        """Weights in full precision as arrays, for workers elsewhere."""
        parts = [part for part in PARTS if getattr(self, part) is not None]
        return {
            "made": _card(self, dict.fromkeys(parts)),
            "card": self.card,
            "sides": self.sides,
            "survey": self.survey,
            "values": {
                part: list(map(keras.ops.convert_to_numpy, _own(self, part)))
                for part in parts
            },
        }

    def __setstate__(self, state: dict) -> None:
        vars(self).update(vars(_empty(state["made"], state["survey"])))
        self.card, self.sides = state["card"], state["sides"]
        for part, values in state["values"].items():
            for variable, value in zip(_own(self, part), values, strict=True):
                variable.assign(value)


def _apply(
    how: tuple[Network, str], piece: tuple[int, np.ndarray, np.ndarray]
) -> tuple[int, Result]:
    """Encode and decode some stamps; the index of the first comes back with them."""
    (network, part), (start, noisy, draws) = how, piece
    mean, width = _encode(network, part, noisy)
    image, samples = network.decode(mean), None
    for element in range(1, network.sides):
        image += _seen_from(element, network, part, noisy)
    image /= network.sides
    if len(draws):
        if network.correlation is not None:
            flux = linear.reference_flux(image, network.survey)
            draws = network.correlation.tie(draws, flux)
        flat = (mean + width * draws).reshape(-1, mean.shape[-1])
        samples = network.decode(flat).reshape(len(draws), *noisy.shape)
    return start, Result(image, mean, width, samples)


def _encode(network: Network, part: str, noisy: np.ndarray) -> list[np.ndarray]:
    """Latent mean and width of stamps, (scene, latent) each."""
    stamps = network.normalisation.forward(noisy)
    return _predict(getattr(network, part), stamps)


def _seen_from(
    element: int, network: Network, part: str, noisy: np.ndarray
) -> np.ndarray:
    """Images of stamps turned by an element of `dihedral`, deblended, turned back."""
    back = element if element >= 4 else -element % 4  # a mirror is its own inverse
    turned = dihedral(noisy, np.full(len(noisy), element))
    mean, _ = _encode(network, part, turned)
    return dihedral(network.decode(mean), np.full(len(noisy), back))


def _join(results: list[Result]) -> Result:
    """One result of those of consecutive stamps."""
    image, mean, width = (
        np.concatenate([getattr(result, name) for result in results])
        for name in ("image", "latent_mean", "latent_width")
    )
    drawn = [result.samples for result in results]
    samples = None if drawn[0] is None else np.concatenate(drawn, axis=1)
    return Result(image, mean, width, samples)


def _predict(model: keras.Model, values: np.ndarray):
    """Output of a model, or list of outputs, for few values at a time.

    All batches are whole, the last with values that stand in: for a first batch of
    another size TensorFlow would compile another program, with other last bits.
    """
    whole = (len(values) + -len(values) % BATCH, *values.shape[1:])
    with PREDICTING:
        output = model.predict(np.resize(values, whole), batch_size=BATCH, verbose=0)
    return keras.tree.map_structure(lambda array: array[: len(values)], output)


def lineage(card: dict) -> list[dict]:
    """A card and those of all networks it goes back to, the last training first."""
    cards = [card]
    while before := cards[-1].get("start", {}).get("card"):
        cards.append(before)
    return cards


def checkpoints(folder: Path) -> Path:
    """Where a training goes on until `save` puts its network into `folder`."""
    folder = folder.absolute()
    return folder.with_name(f"{folder.name}.checkpoints")


def save(
    network: Network, folder: str | os.PathLike, share: dict[str, str] | None = None
) -> None:
    """Write a network's parts and its card into `folder`, once all are on the disk.

    `share` maps a part to a file elsewhere, relative to `folder` (`{"decoder":
    "../lsst/decoder.safetensors"}`), for a part that another network holds already.
    The `checkpoints` of its training are then of no more use, and removed.

    Raises ValueError for a survey of one's own, as a card has but the name of a survey,
    and for a file to share that holds other weights.
    """
    if network.survey.name not in SURVEYS or network.survey != survey(
        network.survey.name
    ):
        raise ValueError(
            f"received a network for a survey {network.survey.name!r} of its own; "
            f"accepted: {', '.join(SURVEYS)} as `survey` builds them"
        )
    folder, share = Path(folder), share or {}
    folder.mkdir(parents=True, exist_ok=True)
    files, contents = {}, {}
    for part in PARTS:
        if getattr(network, part) is None:
            continue
        name = share.get(part, f"{part}.safetensors")
        content = _dump(_own(network, part))
        if part not in share:
            contents[name] = content
        elif (folder / name).read_bytes() != content:
            raise ValueError(
                f"received {folder / name} to share, of other weights than those of "
                f"this network's {part}; accepted: a file of the same"
            )
        files[part] = {"file": name, "sha256": _sha256(content)}
    card = _card(replace(network, card=_brief(network)), files)
    write_together(folder, contents | {CARD: _readable(card).encode()})
    shutil.rmtree(checkpoints(folder), ignore_errors=True)


def _brief(network: Network) -> dict:
    """Its card; the losses within an epoch are kept of the first and last training.

    Networks of another kind that began it have their own card, in the book or wherever
    they came from: of their curves only the validation loss they were left with stays.
    """
    card, first = copy.deepcopy(network.card), len(network.trainings) - 1
    for i, before in enumerate(lineage(card)[1:], start=1):
        for stage in before.values():
            if not (isinstance(stage, dict) and "curve" in stage):
                continue
            curve = stage["curve"]
            if i < first:
                within = ("images", "loss")
                stage["curve"] = {k: v for k, v in curve.items() if k not in within}
            elif i > first:
                del stage["curve"]
                if curve.get("val_loss"):
                    stage["val_loss"] = curve["val_loss"][stage.get("kept", 0) - 1]
    return card


def _readable(card: dict) -> str:
    """JSON with every list of numbers, as curves are, on a line of its own."""
    text = json.dumps(card, indent=1)
    lists = re.compile(r"\[[^][{}]*\]")
    return lists.sub(lambda found: " ".join(found[0].split()), text) + "\n"


def _card(network: Network, files: dict) -> dict:
    """The card of a network whose parts are in `files`."""
    return network.card | {
        "architecture": network.architecture,
        "survey": network.survey.name,
        "bands": list(network.survey.band_names),
        "normalisation": {
            name: np.asarray(value, dtype=float).tolist()
            for name, value in vars(network.normalisation).items()
        },
        "parts": files,
        "software": software(),
    }


def load(
    name: str | os.PathLike = "",
    expect_survey: str | None = None,
    folder: str | os.PathLike = "",
) -> Network:
    """Read a trained network by name, or from the folder that holds its card.

    Names are those of the book, or of the networks in `folder` where one is given.

    Raises ValueError if there is none (and lists what there is), if it is for another
    survey than `expect_survey`, or if a file is missing, damaged or of other shapes.
    """
    base = Path(folder) if folder else _weights_folder()
    found = base / name
    if not folder and not (found / CARD).is_file():
        found = Path(name)
    if not (found / CARD).is_file():
        raise ValueError(
            f"no trained network {str(name)!r} in {base}; accepted: "
            f"{', '.join(available(base))}, or a folder with a {CARD}"
        )
    card = json.loads((found / CARD).read_text())
    if expect_survey not in (None, card["survey"]):
        raise ValueError(
            f"network {str(name)!r} is for survey {card['survey']!r}; accepted here: "
            f"{expect_survey!r}"
        )
    network = _empty(card, survey(card["survey"]))
    for part in card["parts"]:
        _fill(_own(network, part), found, card["parts"][part])
    return network


def _empty(card: dict, of_survey: Survey) -> Network:
    """The network that a card describes, with weights yet to be read."""
    parts = card["parts"]
    values = {k: np.array(v) for k, v in card["normalisation"].items()}
    if card.get("architecture") == "linear":
        decoder = linear.decoder(of_survey)
        second = linear.encoder(of_survey, decoder, "deblender")
        ties = linear.Correlation() if "correlation" in parts else None
        units = NoiseUnits(**values)
        return Network(of_survey, units, None, decoder, second, card, ties)
    n_bands = len(of_survey.bands)
    encoders = (
        networks.encoder(n_bands, part) if part in parts else None
        for part in ("encoder", "deblender")
    )
    first, second = encoders
    decoder = networks.decoder(n_bands)
    return Network(of_survey, Normalisation(**values), first, decoder, second, card)


def _own(network: Network, part: str) -> list[keras.Variable]:
    """Weights of a part; those that an encoder shares with the decoder are its."""
    variables = getattr(network, part).weights
    if part == "decoder":
        return variables
    shared = set(map(id, network.decoder.weights))
    return [v for v in variables if id(v) not in shared]


def _weights_folder() -> Path:
    return data_folder("pretrained", "data/weights")


def available(folder: Path | None = None) -> list[str]:
    """Names of the trained networks of the book, or of those in `folder`."""
    folder = folder or _weights_folder()
    return sorted(card.parent.name for card in folder.glob(f"*/{CARD}"))


def software() -> dict[str, str]:
    """Versions that a card records."""
    backend = keras.backend.backend()
    return {
        "python": platform.python_version(),
        "keras": keras.__version__,
        "backend": backend,
        backend: import_module(backend).__version__,
        "numpy": np.__version__,
        "galsim": version("galsim"),
    }


def _dump(variables: list[keras.Variable]) -> bytes:
    values = map(_halve, map(keras.ops.convert_to_numpy, variables))
    return dump_safetensors(dict(zip(_keys(variables), values, strict=True)))


def _keys(variables: list[keras.Variable]) -> list[str]:
    # Keras numbers layers from the first of a process on; positions do not change.
    return [f"{i:03d}.{v.name}" for i, v in enumerate(variables)]


def _halve(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16 if values.size >= HALF_FROM else np.float32)


def _fill(variables: list[keras.Variable], folder: Path, part: dict) -> None:
    file = folder / part["file"]
    content = file.read_bytes() if file.is_file() else b""
    if _sha256(content) != part["sha256"]:
        raise ValueError(
            f"weights {file} are missing or damaged: SHA-256 {_sha256(content)[:12]}; "
            f"accepted: {part['sha256'][:12]}, as its {CARD} says"
        )
    stored = parse_safetensors(content)
    _assign(variables, [stored.get(key) for key in _keys(variables)], file)


def _assign(variables: list[keras.Variable], values: list, file: Path) -> None:
    """Assign what a file holds for variables, or name the first that does not fit."""
    if len(values) != len(variables):
        raise ValueError(
            f"{file} holds {len(values)} variables; accepted: {len(variables)}"
        )
    for number, (variable, value) in enumerate(zip(variables, values, strict=True)):
        found = None if value is None else value.shape
        if found != tuple(variable.shape):
            raise ValueError(
                f"{file} holds shape {found} for variable {number}, {variable.name}; "
                f"accepted: {tuple(variable.shape)}"
            )
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value.astype(variable.dtype))


def dump_variables(variables: list[keras.Variable], state: dict) -> bytes:
    """Variables in full precision and a JSON state, as the bytes of one file."""
    values = {
        f"{i:04d}": keras.ops.convert_to_numpy(v) for i, v in enumerate(variables)
    }
    return dump_safetensors(values, metadata={"state": json.dumps(state)})


def fill_variables(variables: list[keras.Variable], file: Path) -> None:
    """Assign what `dump_variables` wrote to variables.

    Raises ValueError if `file` holds other variables, or of other shapes.
    """
    with safe_open(file, "np") as content:
        values = [content.get_tensor(key) for key in sorted(content.keys())]
    _assign(variables, values, file)


def dumped_state(file: Path) -> dict:
    """The state that `dump_variables` wrote."""
    with safe_open(file, "np") as content:
        return json.loads(content.metadata()["state"])


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
