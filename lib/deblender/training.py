"""The trainings of the book: warm start, VAE, deblender, and the linear network."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
from astropy.table import vstack
from keras import ops

from . import linear
from .batches import (
    BATCH_SIZE,
    Batches,
    DecoderBatches,
    EncoderBatches,
    RepeatedBatches,
)
from .catalogues import Catalogue
from .comparison import statistics
from .evaluation import compare
from .fitting import LEARNING_RATE, History, Watch, fit
from .networks import (
    COPIES,
    Autoencoder,
    calibration_loss,
    deblender,
    latent_likelihood,
    side_by_side,
    transplant,
    vae,
)
from .normalisation import NoiseUnits, Normalisation, fit_normalisation
from .principal import fit_code
from .simulation import Scenes, simulate
from .surveys import Survey
from .weights import Network

CONSTANTS_FROM = 2000  # scenes, enough for eq. 4 and for principal components
LINEAR_BATCH_SIZE = 64
LINEAR_RATE = 2e-3  # to 4e-3 learnt alike over 16,000 images, 1e-3 more slowly
# One epoch against bias, of COPIES images a blend, for as many of the likelihood unless
# told otherwise, at a fraction of its learning rate, which spares what was learnt.
CALIBRATION, GENTLY = 12, 1 / 8
CORRELATED = 16_000  # training blends that tell how errors go together
WATCHED = 1000  # validation blends measured after each epoch


def warm_start(
    catalogue: Catalogue,
    survey: Survey,
    n_train: int,
    n_validation: int,
    epochs: int,
    centring: str = "exact",
    seed: int = 1,
    start: Network | None = None,
    batch_size: int = BATCH_SIZE,
    folder: Path | None = None,
) -> Network:
    """Teach a decoder and an encoder apart, by the principal code of each galaxy.

    The decoder learns to draw isolated galaxies from their codes, the encoder to guess
    the code of the target of a blend. Give the result to `train_vae` as `start`: not of
    the paper, and spares it a long plateau. `start`, a network of fewer bands, gives
    weights, and the code is then made of its bands alone, as its own was. With a
    `folder`, an interrupted warm start goes on from its last epoch (see `fit`).

    Raises ValueError for a `start` of another architecture.
    """
    check_start(start, "paper")
    isolated, alone, blends, watched = (
        simulate(catalogue, survey, n, most, centring, seed, split)
        for most in (1, 4)
        for n, split in ((n_train, "train"), (n_validation, "validation"))
    )
    few = isolated.take(np.arange(min(n_train, CONSTANTS_FROM)))
    model, normalisation = _begin(few, seed, start)
    code = fit_code(few, normalisation, start.survey if start else survey)
    setting = {"normalisation": normalisation, "batch_size": batch_size}
    setting |= {"code": code, "seed": seed}
    draws = fit(
        model.decoder,
        DecoderBatches(isolated, **setting),
        DecoderBatches(alone, **setting, augment=False),
        epochs,
        folder=folder and folder / "decoder",
    )
    guesses = fit(
        side_by_side(model.encoder),
        EncoderBatches(blends, **setting, swap_neighbours=centring == "exact"),
        EncoderBatches(watched, **setting, augment=False),
        epochs,
        loss=latent_likelihood,
        folder=folder and folder / "encoder",
    )
    card = {
        "images_seen": {"decoder": draws.images_seen, "encoder": guesses.images_seen},
        "decoder": _summary(draws, n_train, epochs, LEARNING_RATE),
        "encoder": _summary(guesses, n_train, epochs, LEARNING_RATE),
    }
    if start is not None:
        card["start"] = _origin(start)
    both = (model.encoder, model.decoder)
    return Network(survey, normalisation, *both, None, card)


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
    batch_size: int = BATCH_SIZE,
    folder: Path | None = None,
) -> tuple[Network, History]:
    """Train the prior on isolated galaxies (section 3.2).

    `start` gives the first weights, of the bands that both surveys have. Returns a
    network without deblender, and its history.

    Raises ValueError for a `start` of another architecture.
    """
    check_start(start, "paper")
    train = simulate(catalogue, survey, n_train, 1, centring, seed, "train")
    validation = simulate(
        catalogue, survey, n_validation, 1, centring, seed, "validation"
    )
    few = train.take(np.arange(min(n_train, CONSTANTS_FROM)))
    model, normalisation = _begin(few, seed, start)
    history = fit(
        model,
        Batches(train, normalisation, batch_size, seed),
        Batches(validation, normalisation, batch_size, seed, augment=False),
        epochs,
        learning_rate,
        folder=folder and folder / "vae",
    )
    card = _new_card(catalogue, centring, seed, batch_size, start)
    card["images_seen"]["vae"] = history.images_seen
    card["vae"] = _summary(history, n_train, epochs, learning_rate)
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
    batch_size: int = BATCH_SIZE,
    folder: Path | None = None,
) -> tuple[Network, History]:
    """Train a second encoder on blends before the frozen decoder (section 3.3).

    It starts from `start`, or from the encoder of `prior`, or else from its deblender.
    Returns a network that shares decoder and normalisation with `prior`, and its
    history.

    Raises ValueError for a `prior` of another architecture.
    """
    check_start(prior, "paper")
    survey, normalisation = prior.survey, prior.normalisation
    train = simulate(catalogue, survey, n_train, 4, centring, seed, "train")
    validation = simulate(
        catalogue, survey, n_validation, 4, centring, seed, "validation"
    )
    first = start or prior.encoder or prior.deblender
    model = deblender((first, prior.decoder), seed=seed)
    exact = centring == "exact"
    history = fit(
        model,
        Batches(train, normalisation, batch_size, seed, swap_neighbours=exact),
        Batches(validation, normalisation, batch_size, seed, augment=False),
        epochs,
        learning_rate,
        folder=folder and folder / "deblender",
        watch=_watch(replace(prior, deblender=model.encoder), validation),
    )
    seen = prior.card["images_seen"] | {"deblender": history.images_seen}
    card = prior.card | {
        "images_seen": seen,
        "deblender": _summary(history, n_train, epochs, learning_rate)
        | {"centring": centring, "catalogue": _describe(catalogue)},
    }
    return replace(prior, deblender=model.encoder, card=card), history


def train_linear(
    catalogue: Catalogue,
    survey: Survey,
    n_train: int,
    n_validation: int,
    epochs: int,
    centring: str = "exact",
    seed: int = 1,
    start: Network | None = None,
    learning_rate: float = LINEAR_RATE,
    batch_size: int = LINEAR_BATCH_SIZE,
    folder: Path | None = None,
    components: str = "peak",
    calibration: int | None = None,
) -> Network:
    """Train the second network: principal components, then an encoder of blends.

    The encoder first learns mean and width of each latent number by their likelihood;
    a mean of what is possible is rounder and more usual than the truth, and the last
    epochs take out that bias (`calibration_loss`): `calibration` of them, or one for
    every twelve of the likelihood. With no `epochs` they are all there is. What errors
    remain is then measured, for draws that know how they go together. `start`, a
    linear network of the same survey, gives the components and the first weights;
    without it, they are those of galaxies of the centring `components`. `"peak"` serves
    networks of any centring, `"exact"` draws centred galaxies with fewer.

    Raises ValueError for a `start` of another architecture or survey.
    """
    check_start(start, "linear", survey)
    train = simulate(catalogue, survey, n_train, 4, centring, seed, "train")
    watched = simulate(catalogue, survey, n_validation, 4, centring, seed, "validation")
    network = _begin_linear(catalogue, survey, n_train, seed, start, components)
    model, units = side_by_side(network.deblender), network.normalisation
    code = linear.Code(network.decoder, units)

    def pairs(kind: type[EncoderBatches], scenes: Scenes, **kwargs) -> EncoderBatches:
        size = -(-batch_size // (COPIES if kind is RepeatedBatches else 1))
        return kind(scenes, units, size, seed, code=code, **kwargs)

    card = _new_card(catalogue, centring, seed, batch_size, start)
    watch = _watch(network, watched)
    few = -(-epochs // CALIBRATION) if calibration is None else calibration
    stages = (
        ("deblender", EncoderBatches, latent_likelihood, epochs, learning_rate),
        ("calibration", RepeatedBatches, calibration_loss, few, learning_rate * GENTLY),
    )
    for stage, kind, loss, n, rate in stages:
        if not n:
            continue
        batches = pairs(kind, train, swap_neighbours=centring == "exact")
        watch_over = pairs(kind, watched, augment=False)
        place = folder and folder / stage
        seen = _judge(watch, model, watch_over, loss)
        history = fit(model, batches, watch_over, n, rate, loss, place, seen)
        card["images_seen"][stage] = history.images_seen
        card[stage] = _summary(history, n_train, n, rate)
    card["correlation"] = {"scenes": min(n_train, CORRELATED), "seed": seed}
    correlation = correlate(network, train.take(slice(CORRELATED)))
    return replace(network, card=card, correlation=correlation)


def _watch(network: Network, scenes: Scenes) -> Watch:
    """Measures, whenever it is called, slope and widths of a network on a few blends.

    The same ones, of the same noise, each time.
    """
    # `replace` lets go of the other images that scenes composed.
    parts = scenes.take(slice(WATCHED)).batches()
    parts = [(few.noisy, replace(few)) for few in parts]

    def watch() -> dict[str, float]:
        tables = [
            compare(network.deblend(noisy).image, replace(few), network.survey)
            for noisy, few in parts
        ]
        numbers = statistics(vstack(tables, metadata_conflicts="silent"))
        return {name: numbers[name] for name in ("slope", "sigma_de", "sigma_dr")}

    return watch


def _judge(
    watch: Watch, model: keras.Model, batches: EncoderBatches, loss: Callable
) -> Watch:
    """What `watch` measures, and `typical`, the median loss of a validation blend.

    The epoch to keep is chosen by it: a few blends unlike all others, errors of which
    are hundreds of widths, swamp the mean.
    """

    def judge() -> dict[str, float]:
        losses = [
            ops.convert_to_numpy(loss(ops.convert_to_tensor(code), model(noisy)))
            for noisy, code in (batches[i] for i in range(len(batches)))
        ]
        return watch() | {"typical": float(np.median(np.concatenate(losses)))}

    return judge


def correlate(network: Network, scenes: Scenes) -> linear.Correlation:
    """How the errors of a linear network on some blends go together."""
    code = linear.Code(network.decoder, network.normalisation)
    errors, flux = [], []
    for part in scenes.batches():
        said = network.deblend(part.noisy)
        errors.append((code(part.target) - said.latent_mean) / said.latent_width)
        flux.append(linear.brightness(said.image, network.survey))
    correlation = linear.Correlation()
    correlation.set_weights(
        linear.fit_correlation(np.concatenate(errors), np.concatenate(flux))
    )
    return correlation


def check_start(
    start: Network | None, architecture: str, survey: Survey | None = None
) -> None:
    """Refuse a network that no training of this kind can begin with.

    Raises ValueError for another architecture, or another survey where one is given.
    """
    if start is None:
        return
    wanted = start.survey if survey is None else survey
    if (start.architecture, start.survey.name) != (architecture, wanted.name):
        raise ValueError(
            f"received a {start.architecture} network for {start.survey.name!r} to "
            f"begin with; accepted: a {architecture} one for {wanted.name!r}"
        )


def _begin_linear(
    catalogue: Catalogue,
    survey: Survey,
    n_train: int,
    seed: int,
    start: Network | None,
    components: str,
) -> Network:
    """A linear network whose encoder knows nothing yet, or what `start` knows."""
    keras.utils.set_random_seed(seed)
    decoder = start.decoder if start else linear.decoder(survey)
    if start is None:
        n = min(max(n_train, 2 * linear.N_COMPONENTS), CONSTANTS_FROM)
        few = simulate(catalogue, survey, n, 4, components, seed, "train")
        decoder.set_weights(linear.fit_components(few, linear.N_COMPONENTS))
    encoder = linear.encoder(survey, decoder, "deblender")
    if start is not None:
        encoder.set_weights(start.deblender.get_weights())
    normalisation = NoiseUnits(np.sqrt(survey.sky))
    return Network(survey, normalisation, None, decoder, encoder, {})


def _begin(
    few: Scenes, seed: int, start: Network | None
) -> tuple[Autoencoder, Normalisation]:
    """A VAE and its normalisation, as a few isolated training scenes suggest it.

    Weights and constants of the bands that `start` has are copied from there.
    """
    survey, normalisation = few.survey, fit_normalisation(few)
    model = vae(len(survey.bands), seed=seed)
    if start is None:
        return model, normalisation
    both = [name for name in survey.band_names if name in start.survey.band_names]
    old = [start.survey.index(name) for name in both]
    new = [survey.index(name) for name in both]
    # A decentred network of the book comes without its VAE's encoder.
    transplant(start.encoder or start.deblender, model.encoder, old, new)
    transplant(start.decoder, model.decoder, old, new)
    scale = normalisation.scale.copy()
    scale[new] = start.normalisation.scale[old]
    return model, replace(normalisation, scale=scale)


def _origin(start: Network) -> dict:
    kind = {"survey": start.survey.name, "architecture": start.architecture}
    return {"survey": start.survey.name, "card": start.card | kind}


def _new_card(
    catalogue: Catalogue,
    centring: str,
    seed: int,
    batch_size: int,
    start: Network | None,
) -> dict:
    """What is known of a network before its training."""
    card = {
        "centring": centring,
        "catalogue": _describe(catalogue),
        "seed": seed,
        "batch_size": batch_size,
        "images_seen": {"vae": 0, "deblender": 0},
    }
    return card if start is None else card | {"start": _origin(start)}


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
