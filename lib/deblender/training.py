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
from .fitting import LEARNING_RATE, Watch, fit
from .networks import (
    COPIES,
    Autoencoder,
    calibration_loss,
    cross_entropy,
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
from .weights import Network, checkpoints

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
    `folder`, that which `save` will put the network into, an interrupted training goes
    on from its last epoch (see `fit`), here and in those below.

    Raises ValueError for a `start` of another architecture, or of bands beyond these.
    """
    check_start(start, "paper", survey)
    sizes = n_train, n_validation, centring, seed
    isolated, alone = _both(catalogue, survey, 1, *sizes)
    blends, watched = _both(catalogue, survey, 4, *sizes)
    few = isolated.take(slice(CONSTANTS_FROM))
    model, normalisation = _begin(few, seed, start)
    code = fit_code(few, normalisation, start.survey if start else survey)
    setting = {"normalisation": normalisation, "batch_size": batch_size}
    setting |= {"code": code, "seed": seed}
    drawn = DecoderBatches(isolated, **setting)
    drawn = drawn, DecoderBatches(alone, **setting, augment=False)
    seen = EncoderBatches(blends, **setting, swap_neighbours=centring == "exact")
    seen = seen, EncoderBatches(watched, **setting, augment=False)
    guess, rest = side_by_side(model.encoder), {"folder": folder}
    card = {"images_seen": {}}
    _stage(card, "decoder", model.decoder, drawn, epochs, **rest)
    _stage(card, "encoder", guess, seen, epochs, loss=latent_likelihood, **rest)
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
) -> Network:
    """Train the prior on isolated galaxies (section 3.2).

    `start` gives the first weights, of the bands that both surveys have. Returns a
    network without deblender, whose card has the history.

    Raises ValueError for a `start` of another architecture, or of bands beyond these.
    """
    check_start(start, "paper", survey)
    train, validation = _both(
        catalogue, survey, 1, n_train, n_validation, centring, seed
    )
    model, normalisation = _begin(train.take(slice(CONSTANTS_FROM)), seed, start)
    setting = normalisation, batch_size, seed
    pair = Batches(train, *setting), Batches(validation, *setting, augment=False)
    card = _new_card(catalogue, centring, seed, batch_size, start)
    _stage(card, "vae", model, pair, epochs, learning_rate, folder=folder)
    return Network(survey, normalisation, model.encoder, model.decoder, None, card)


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
) -> Network:
    """Train a second encoder on blends before the frozen decoder (section 3.3).

    It starts from `start`, or from the encoder of `prior`, or else from its deblender.
    Returns a network that shares decoder and normalisation with `prior`.

    Raises ValueError for a `prior` of another architecture.
    """
    check_start(prior, "paper", prior.survey)
    train, validation = _both(
        catalogue, prior.survey, 4, n_train, n_validation, centring, seed
    )
    first = start or prior.encoder or prior.deblender
    model = deblender(first, prior.decoder, seed=seed)
    setting = prior.normalisation, batch_size, seed
    pair = (
        Batches(train, *setting, swap_neighbours=centring == "exact"),
        Batches(validation, *setting, augment=False),
    )
    network = replace(prior, deblender=model.encoder)
    rest = {"folder": folder, "watch": _watch(network, validation)}
    card = prior.card | {"images_seen": dict(prior.card["images_seen"])}
    _stage(card, "deblender", model, pair, epochs, learning_rate, **rest)
    card["deblender"] |= {"centring": centring, "catalogue": _describe(catalogue)}
    return replace(network, card=card)


def train_linear(
    catalogue: Catalogue,
    survey: Survey,
    n_train: int,
    n_validation: int,
    epochs: int,
    centring: str = "exact",
    seed: int = 1,
    start: Network | None = None,
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

    Raises ValueError for a `start` of another architecture or survey, or no epochs of
    either kind.
    """
    check_start(start, "linear", survey)
    few = -(-epochs // CALIBRATION) if calibration is None else calibration
    if not (epochs or few):
        raise ValueError(
            "received no epochs of either kind; accepted: one or more, by the "
            "likelihood or against bias"
        )
    # Half of it spares what is known; bias is taught at a fraction anyway.
    rate = LINEAR_RATE / 2 if start and epochs else LINEAR_RATE
    train, watched = _both(catalogue, survey, 4, n_train, n_validation, centring, seed)
    network = _begin_linear(catalogue, survey, n_train, seed, start, components)
    model, watch = side_by_side(network.deblender), _watch(network, watched)
    swap = {"swap_neighbours": centring == "exact"}
    card = _new_card(catalogue, centring, seed, batch_size, start)
    stages = (
        ("deblender", EncoderBatches, 1, latent_likelihood, epochs, 1),
        ("calibration", RepeatedBatches, COPIES, calibration_loss, few, GENTLY),
    )
    for stage, kind, copies, loss, n, gently in stages:
        if not n:
            continue
        setting = {"batch_size": -(-batch_size // copies), "seed": seed}
        setting |= {"normalisation": network.normalisation, "code": network.code}
        pair = kind(train, **setting, **swap), kind(watched, **setting, augment=False)
        rest = {"folder": folder, "watch": _judge(watch, model, pair[1], loss)}
        _stage(card, stage, model, pair, n, rate * gently, loss, **rest)
    card["correlation"] = {"scenes": min(n_train, CORRELATED), "seed": seed}
    correlation = correlate(network, train.take(slice(CORRELATED)))
    return replace(network, card=card, correlation=correlation)


def _both(
    catalogue: Catalogue,
    survey: Survey,
    most: int,
    n_train: int,
    n_validation: int,
    centring: str,
    seed: int,
) -> tuple[Scenes, Scenes]:
    """Scenes of one to `most` galaxies, of the training and of its validation."""
    rest = most, centring, seed
    train = simulate(catalogue, survey, n_train, *rest, "train")
    return train, simulate(catalogue, survey, n_validation, *rest, "validation")


def _stage(
    card: dict,
    name: str,
    model: keras.Model,
    pair: tuple[Batches, Batches],
    epochs: int,
    learning_rate: float = LEARNING_RATE,
    loss: Callable = cross_entropy,
    folder: Path | None = None,
    watch: Watch | None = None,
) -> None:
    """Fit a model on batches and those that watch over it; its card says how.

    Of the card's own `images_seen` are those until the epoch that the model was left
    with, of the stage's those of all epochs that ran.
    """
    place = folder and checkpoints(folder) / name
    history = fit(model, *pair, epochs, learning_rate, loss, place, watch)
    scenes = len(pair[0].scenes)
    card["images_seen"][name] = scenes * history.kept
    card[name] = {
        "scenes": scenes,
        "epochs": epochs,
        "kept": history.kept,
        "images_seen": history.images_seen,
        "schedule": f"Adam {learning_rate:g}, warm-up, cosine decay to zero",
        "seconds": round(history.seconds),
        "curve": history.curve,
    }


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
    code, errors, flux = network.code, [], []
    for part in scenes.batches():
        said = network.deblend(part.noisy)
        errors.append((code(part.target) - said.latent_mean) / said.latent_width)
        flux.append(linear.reference_flux(said.image, network.survey))
    correlation = linear.Correlation()
    correlation.set_weights(
        linear.fit_correlation(np.concatenate(errors), np.concatenate(flux))
    )
    return correlation


def check_start(start: Network | None, architecture: str, survey: Survey) -> None:
    """Refuse a network that no training of this kind can begin with.

    Raises ValueError for another architecture or survey. One of the paper's may have
    fewer bands than `survey`: what is missing begins anew.
    """
    if start is None:
        return
    fits, fewer = start.survey.name == survey.name, ""
    if architecture == "paper":
        fits, fewer = set(start.survey.bands) <= set(survey.bands), " or fewer bands"
    if start.architecture != architecture or not fits:
        raise ValueError(
            f"received a {start.architecture} network for {start.survey.name!r} to "
            f"begin with; accepted: a {architecture} one for {survey.name!r}{fewer}"
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
    return {"card": start.card | kind}


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
