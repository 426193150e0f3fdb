"""Train a network of the book: `python -m deblender.train lsst --out weights`.

A training that was stopped, by whatever means, goes on where it was when the same
command is given again.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import keras
import yaml

from .catalogues import Catalogue, catalogue
from .files import data_folder
from .fitting import OtherTraining
from .on_device import accelerator_names, accelerators, devices, processor
from .surveys import check_known, survey
from .training import (
    check_start,
    train_deblender,
    train_linear,
    train_vae,
    warm_start,
)
from .weights import CARD, Network, available, load, save


@dataclass(frozen=True)
class Recipe:
    """How a network is made: for what, from which start, of which architecture.

    `start` names the network that it begins with. A network for realistic galaxies
    shares the decoder of `start` (section 5), and a linear one for another centring
    does too. Else its components are those of galaxies of the centring `components`.
    `paper` asks for the architecture of section 3.
    """

    survey: str
    centring: str = "exact"
    components: str = "exact"
    start: str | None = None
    realistic: bool = False
    paper: bool = False

    @property
    def catalogue(self) -> str:
        """That of its galaxies; noise in realistic targets teaches ill (chapter 6)."""
        return "synthetic-noiseless" if self.realistic else "synthetic"


RECIPES = {
    "lsst": Recipe("lsst", components="peak"),  # the decentred ones share them
    "lsst+euclid": Recipe("lsst+euclid"),
    "lsst-pixel": Recipe("lsst", "pixel", start="lsst"),
    "lsst-peak": Recipe("lsst", "peak", start="lsst"),
    "lsst+euclid-realistic": Recipe("lsst+euclid", start="lsst+euclid", realistic=True),
    "lsst-paper": Recipe("lsst", paper=True),
    "lsst+euclid-paper": Recipe("lsst+euclid", start="lsst-paper", paper=True),
    "lsst-pixel-paper": Recipe("lsst", "pixel", start="lsst-paper", paper=True),
    "lsst-peak-paper": Recipe("lsst", "peak", start="lsst-paper", paper=True),
}
# Mixed: products in half the bits, where the processor is faster with them.
PRECISIONS = ("float32", "mixed_bfloat16")
GENTLE = 5e-4  # learning rate of what starts from something trained


@dataclass(frozen=True)
class Sizes:
    """Scenes of a training, passes over them in each of its stages, images a step."""

    n_train: int = 20_000
    n_validation: int = 1000
    epochs: int = 2
    calibration: int | None = None  # of a linear network, passes against bias
    batch_size: int | None = None  # or that which is best for a processor


def sizes_of(profile: str) -> Sizes:
    """Sizes of a profile, those of its chapter on the VAE.

    Raises ValueError if there is no such profile, and lists what there is.
    """
    folder = data_folder("profiles", "book/params")
    known = {file.stem: file for file in folder.glob("*.yml")}
    check_known("profile", profile, sorted(known))
    values = yaml.safe_load(known[profile].read_text())["03_vae_prior"]
    return Sizes(**{k: values[k] for k in ("n_train", "n_validation", "epochs")})


def train(
    name: str,
    galaxies: Catalogue,
    sizes: Sizes,
    folder: Path,
    start: Network | None = None,
    seed: int = 1,
) -> Network:
    """Train the network called `name`, with checkpoints beside `folder`."""
    recipe = RECIPES[name]
    of, n = survey(recipe.survey), (sizes.n_train, sizes.n_validation, sizes.epochs)
    rest = {"centring": recipe.centring, "seed": seed, "folder": folder}
    if sizes.batch_size is not None:
        rest |= {"batch_size": sizes.batch_size}
    if not recipe.paper:
        rest |= {"start": start, "components": recipe.components}
        return train_linear(galaxies, of, *n, calibration=sizes.calibration, **rest)
    if start is None or start.survey.name != of.name:
        start = warm_start(galaxies, of, *n, start=start, **rest)
    rest["learning_rate"] = GENTLE
    prior = train_vae(galaxies, of, *n, start=start, **rest)
    return train_deblender(prior, galaxies, *n, start=start.deblender, **rest)


def provenance(arguments: list[str]) -> dict:
    """What a card says of a training: command, commit and machine."""
    return {
        "command": shlex.join(["python", "-m", "deblender.train", *arguments]),
        "commit": _commit(),
        "hardware": {
            "machine": platform.machine(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "accelerators": accelerators(),
            "accelerator_names": accelerator_names(),
        },
    }


def _share_batches() -> None:
    """Split each batch between all devices, where the backend can."""
    if keras.backend.backend() == "jax" and len(devices()) > 1:
        parallel = keras.distribution.DataParallel(devices=devices())
        keras.distribution.set_distribution(parallel)


def _commit() -> str:
    """Commit of the library, empty outside a checkout."""
    checkout = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(checkout), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    top, commit = answer.stdout.splitlines()
    # Installed, the library may lie in an environment inside another repository.
    return commit if Path(top) == checkout else ""


def main(arguments: list[str] | None = None) -> None:
    """Train a network and put it into a folder of its name."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    args = parser.parse_args(arguments)
    recipe, out = RECIPES[args.name], Path(args.out)
    keras.config.set_dtype_policy(args.precision)
    _share_batches()
    made = provenance(arguments)
    try:
        sizes = _sizes(args, recipe)
        start, share = _begin(args, recipe)
        galaxies = catalogue(args.catalogue or recipe.catalogue, real=recipe.realistic)
    except ValueError as error:
        parser.error(str(error))
    place = out / args.name
    try:
        network = train(args.name, galaxies, sizes, place, start, args.seed)
    except OtherTraining as error:
        parser.error(str(error))
    network.card |= made
    save(network, place, share=share)


def _begin(
    args: argparse.Namespace, recipe: Recipe
) -> tuple[Network | None, dict[str, str]]:
    """The network to begin with, if any, and what `save` is told of its decoder.

    Raises ValueError for a network that does not fit, or if others in the folder share
    a decoder that this training would replace.
    """
    out, first = Path(args.out), args.start or recipe.start
    ours = first in available(out)  # trained here before
    start = load(out / first if ours else first) if first else None
    kind = "paper" if recipe.paper else "linear"
    check_start(start, kind, survey(recipe.survey))
    keeps = ours and not recipe.paper  # a decoder of this folder
    shared = _shared(start, first, args.name) if keeps else {}
    same = keeps and shared.get("decoder") in (None, _decoder_of(args.name))
    if not same and (others := _sharing(out, args.name)):
        raise ValueError(
            f"{', '.join(others)} in {out} would lose the decoder that {args.name!r} "
            f"shares with them; accepted: another --out, or --start {args.name}"
        )
    return start, shared if recipe.start else {}


def _decoder_of(name: str) -> str:
    """Where a network beside the one called `name` finds its decoder."""
    return f"../{name}/decoder.safetensors"


def _sharing(out: Path, name: str) -> list[str]:
    """Networks in a folder whose decoder lies with the one called `name`."""
    file = _decoder_of(name)
    cards = {n: json.loads((out / n / CARD).read_text()) for n in available(out)}
    return [n for n, card in cards.items() if card["parts"]["decoder"]["file"] == file]


def _shared(start: Network, first: str, name: str) -> dict[str, str]:
    """Where a network called `name` finds the decoder of `start`, as `save` takes it.

    Both lie in folders side by side; `start` may itself share that of another.
    """
    file = start.card["parts"]["decoder"]["file"]
    if "/" in file:
        return {"decoder": file}
    return {} if first == name else {"decoder": f"../{first}/{file}"}


def _sizes(args: argparse.Namespace, recipe: Recipe) -> Sizes:
    """Sizes of the profile, those given as options in their place."""
    if recipe.paper and args.calibration:
        raise ValueError(
            f"--calibration with {args.name}; accepted: a network without -paper"
        )
    if args.seed < 0:
        raise ValueError(f"received --seed {args.seed}; accepted: 0 or more")
    sizes = sizes_of(args.profile) if args.profile else Sizes()
    given = {name: getattr(args, name) for name in vars(sizes)}
    given = {name: value for name, value in given.items() if value is not None}
    # What was trained before may go on against bias alone.
    alone = args.calibration and (args.start or recipe.start)
    least = {"epochs": 0 if alone else 1}
    if any(value < least.get(name, 1) for name, value in given.items()):
        raise ValueError(
            f"received {given}; accepted: 1 or more of each, or 0 epochs with "
            "--calibration and a network to begin with"
        )
    return replace(sizes, **given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m deblender.train", description=__doc__)
    add = parser.add_argument
    add("name", choices=RECIPES)
    add("--out", default="build/weights", help="folder that receives it [%(default)s]")
    add("--profile", help="sizes of a profile of the book, such as paper")
    add("--n-train", type=int, metavar="N", help="training scenes")
    add("--n-validation", type=int, metavar="N", help="validation scenes")
    add("--epochs", type=int, metavar="N", help="passes over them, in each stage")
    add("--calibration", type=int, metavar="N", help="and against bias [epochs / 12]")
    add("--batch-size", type=int, metavar="N", help="images a step [64; of -paper 16]")
    add(
        "--catalogue",
        help="or a folder of COSMOS [synthetic, for -realistic ones without noise]",
    )
    add("--start", metavar="NAME", help="network to begin with, not that of the recipe")
    add("--precision", default="float32", choices=PRECISIONS, help="[%(default)s]")
    add("--seed", type=int, default=1, help="of scenes, weights, draws [%(default)s]")
    return parser


if __name__ == "__main__":
    main()
