"""Other deblenders on the same scenes: SEP, scarlet2, and none at all.

Each takes noisy stamps and answers with the target of each. Where a deblender needs to
know where the galaxies are, it is told the truth, which no survey would know. SEP and
scarlet2 are imported when they are called, and need not be there before.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from astropy.table import Table
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from .evaluation import compare, ellipticity_pairs
from .files import data_folder
from .measurement import bootstrap, in_snr_range, mean_slope, percentiles
from .simulation import MATCH_RADIUS, Scenes
from .surveys import check_known

OUTLIER = 0.5  # magnitudes off in r, beyond which a galaxy counts as lost
# What `scarlet2` takes for each morphology, as a search on validation blends advises.
FITS = {
    "sersic": {"size": 61, "steps": 2000, "settle": True},
    "prior": {"size": 31, "steps": 1000, "settle": True},
    "pixels": {"size": 21, "steps": 300, "settle": False},
}
# What `sep` takes for each kind of flux, chosen by another such search.
EXTRACTIONS = {
    "isophotal": {"aperture": False, "threshold": 1.0, "contrast": 5e-4},
    "aperture": {"aperture": True, "threshold": 1.5, "contrast": 5e-4},
}
STRIDE = 0.05  # the first step of a parameter of a fit
TEMPERATURE = 0.1  # of the neural prior
# Within which a fit keeps a Sersic profile: wider than the galaxies of this book.
INDICES = (0.4, 6.2)
RADII = (0.2, 40.0)  # half-light, in pixels
BOXES = (15, 21, 31, 41, 61)  # pixels, that images may take
# Each scene compiles functions of its own; after some hundreds the process would die.
COMPILED = 25
SMALLEST_APERTURE = 1.75  # pixels, of SExtractor's


@dataclass
class Answer:
    """What a deblender says of the targets of scenes.

    `images` (scene, y, x, band) as the camera sees them and `flux` (scene, band), both
    in electrons, NaN where it found no target; `seconds` (scene,) that it took.
    """

    images: np.ndarray
    flux: np.ndarray
    seconds: np.ndarray

    @classmethod
    def of(cls, images: np.ndarray, seconds: float = 0.0) -> "Answer":
        """Of images alone, whose sums are the fluxes; `seconds` for all of them."""
        flux = images.sum(axis=(1, 2), dtype=float)
        return cls(images, flux, np.full(len(images), seconds / len(images)))


def _answer(scenes: Scenes, deblend: Callable[[Scenes], tuple], label: str) -> Answer:
    """Give a deblender one scene after another.

    Raises ValueError for scenes of several cameras, whose pixels differ.
    """
    scenes.survey.check_one_camera()
    found = Answer(
        np.full((len(scenes), *scenes.survey.shape), np.nan, dtype=np.float32),
        np.full((len(scenes), len(scenes.survey.bands)), np.nan),
        np.full(len(scenes), np.nan),
    )
    for i, scene in enumerate(tqdm(scenes.batches(1), label, len(scenes))):
        scene.noisy  # noqa: B018  drawn before the clock starts
        begin = time.perf_counter()
        result = deblend(scene)
        found.seconds[i] = time.perf_counter() - begin
        if result is not None:
            found.images[i], found.flux[i] = result
    return found


def nothing(scenes: Scenes) -> Answer:
    """The blend itself, as if it were the target."""
    return Answer.of(scenes.noisy)


def sep(scenes: Scenes, aperture: bool, threshold: float, contrast: float) -> Answer:
    """Detect, deblend and measure with SEP, the library of SExtractor.

    Detection in r, `threshold` times the noise of the sky; `contrast` is SExtractor's
    DEBLEND_MINCONT. The target is the object nearest to its true place. Its flux is
    that of its pixels in the segmentation map, or, with `aperture`, that inside Kron's
    ellipse, neighbours masked out. EXTRACTIONS has the chosen settings. Barbary 2016;
    Bertin & Arnouts 1996.

    Raises ValueError for scenes of several cameras.
    """
    deblend = partial(
        _sep_scene, aperture=aperture, threshold=threshold, contrast=contrast
    )
    return _answer(scenes, deblend, "SEP")


def _sep_scene(
    scene: Scenes, aperture: bool, threshold: float, contrast: float
) -> tuple[np.ndarray, np.ndarray] | None:
    import sep

    survey, noisy = scene.survey, scene.noisy[0]
    r = survey.reference_index
    objects, segments = sep.extract(
        np.ascontiguousarray(noisy[..., r]),
        threshold,
        err=float(np.sqrt(survey.sky[r])),
        deblend_cont=contrast,
        segmentation_map=True,
    )
    ((place, *_),) = scene.places
    distance = np.hypot(objects["y"] - place[0], objects["x"] - place[1])
    distance = distance * survey.reference.instrument.pixel_scale
    if not len(objects) or distance.min() > MATCH_RADIUS:
        return None
    number = int(np.argmin(distance))
    if aperture:
        image = noisy * np.isin(segments, (0, number + 1))[..., None]
        found = objects[number : number + 1]
        return image, _kron(noisy, found, segments, number + 1, r)
    image = noisy * (segments == number + 1)[..., None]
    return image, image.sum(axis=(0, 1), dtype=float)


def _kron(
    noisy: np.ndarray, found: np.ndarray, segments: np.ndarray, number: int, band: int
) -> np.ndarray:
    """Fluxes in Kron's ellipse of a band, as SEP's manual makes FLUX_AUTO.

    Returns (band,) electrons.
    """
    import sep

    shape = [found[name] for name in ("x", "y", "a", "b", "theta")]
    masked = {"seg_id": np.array([number], dtype=np.int32), "segmap": segments}
    planes = [np.ascontiguousarray(plane) for plane in np.moveaxis(noisy, -1, 0)]
    radius, _ = sep.kron_radius(planes[band], *shape, 6.0, **masked)
    if not radius[0] * np.sqrt(found["a"] * found["b"])[0] >= SMALLEST_APERTURE:
        circle = (found["x"], found["y"], SMALLEST_APERTURE)
        fluxes = [sep.sum_circle(p, *circle, subpix=1, **masked)[0] for p in planes]
    else:
        shape.append(2.5 * radius)
        fluxes = [sep.sum_ellipse(p, *shape, subpix=1, **masked)[0] for p in planes]
    return np.array(fluxes, dtype=float)[:, 0]


def scarlet2(
    scenes: Scenes, morphology: str, size: int, steps: int, settle: bool
) -> Answer:
    """Fit all galaxies of a scene with scarlet2, their true places given.

    Each is a spectrum times a `morphology`: Sersic's profile ("sersic"), or an image
    that starts from its moments, of free pixels between 0 and 1 ("pixels") or held
    together by a neural prior, that of galaxies of HSC ("prior"). `size` is that of the
    box of a profile in pixels, for an image the largest. The fit makes so many `steps`
    with Adam, as scarlet2's guides advise, or, to `settle`, such as shrink to nothing.
    Variances are those of the sky and of the light in the noisy pixels. FITS has the
    best settings. Melchior et al. 2018 and Sampson et al. 2024.

    Raises ValueError for an unknown morphology, or scenes of several cameras.
    """
    check_known("morphology", morphology, FITS)
    import jax

    options = {"size": size, "steps": steps, "settle": settle}
    deblend = partial(_scarlet2_scene, morphology=morphology, **options)
    found = []
    for some in scenes.batches(COMPILED):
        found.append(_answer(some, deblend, "scarlet2"))
        jax.clear_caches()
    fields = ("images", "flux", "seconds")
    return Answer(*(np.concatenate([getattr(a, f) for a in found]) for f in fields))


def _scarlet2_scene(
    scene: Scenes, morphology: str, size: int, steps: int, settle: bool
) -> tuple[np.ndarray, np.ndarray]:
    import jax.numpy as jnp
    import optax
    import scarlet2 as sc2

    sc2.set_validation(False)
    seen, frame = _observed(sc2, scene)
    add = _add_sersic if morphology == "sersic" else _add_pixels
    (places,) = scene.places
    with sc2.Scene(frame) as model:
        for place in places:
            add(sc2, seen, jnp.array(place), size)
    with sc2.Parameters(model):
        for k, source in enumerate(model.sources):
            for name, options in _free(source, morphology, settle):
                sc2.Parameter(name=f"{name}:{k}", **options)
    how = {"max_iter": steps, "progress_bar": False, "e_rel": 1e-4}
    if settle:
        # Steps of one size never do. The first gradients of bright galaxies are huge,
        # and Adam with its usual memory of their squares would hardly move after them.
        how |= {"schedule": optax.cosine_decay_schedule(1.0, steps), "b2": 0.9}
        how["e_rel"] = 0.0  # all of the steps
    model = model.fit(seen, **how)
    image = seen.render(model.evaluate_source(model.sources[0]))  # (band, y, x)
    image = np.moveaxis(np.asarray(image), 0, -1)
    return image, image.sum(axis=(0, 1), dtype=float)


def _observed(sc2, scene: Scenes):
    """The stamps of a scene as scarlet2 takes them, and the frame of its model."""
    survey, data = scene.survey, np.moveaxis(scene.noisy[0], -1, 0)  # (band, y, x)
    camera = survey.reference.instrument
    psf = camera.psf.drawImage(nx=41, ny=41, scale=camera.pixel_scale).array
    seen = sc2.Observation(
        data,
        weights=1 / (np.maximum(data, 0) + survey.sky[:, None, None]),
        psf=np.repeat(psf[None], len(data), axis=0),
        channels=list(survey.band_names),
    )
    frame = sc2.Frame.from_observations(seen)
    seen.match(frame)
    return seen, frame


def _add_sersic(sc2, seen, place, size: int) -> None:
    import jax.numpy as jnp

    peak = sc2.init.pixel_spectrum(seen, place, correct_psf=True)
    round_disc = sc2.SersicMorphology(
        jnp.array(1.0), jnp.array(2.0), jnp.array([0.01, 0.01]), shape=(size, size)
    )
    sc2.Source(place, jnp.maximum(0.3 * peak, 1e-3), round_disc)


def _add_pixels(sc2, seen, place, size: int) -> None:
    import jax.numpy as jnp

    try:
        boxes = [n for n in BOXES if n <= size]
        spectrum, image = sc2.init.from_gaussian_moments(seen, place, box_sizes=boxes)
    except ValueError:  # a negative size: too faint for moments
        spectrum = sc2.init.pixel_spectrum(seen, place, correct_psf=True)
        image = sc2.init.compact_morphology()
    sc2.Source(place, jnp.maximum(spectrum, 1e-3), jnp.clip(image, 1e-6, 1 - 1e-6))


def _free(source, morphology: str, settle: bool) -> Iterator[tuple[str, dict]]:
    """Names and options of the parameters that the fit of a source changes."""
    from numpyro.distributions import constraints
    from scarlet2 import relative_step
    from scarlet2.constraint import unit_disk

    def free(node, constraint, step: float | Callable = STRIDE) -> dict:
        return {"node": node, "constraint": constraint, "stepsize": step}

    brightness = STRIDE if settle else partial(relative_step, factor=STRIDE)
    yield "spectrum", free(source.spectrum, constraints.positive, brightness)
    shape, between = source.morphology, constraints.interval
    if morphology == "sersic":
        yield "n", free(shape.n, between(*INDICES))
        yield "size", free(shape.size, between(*RADII))
        yield "e", free(shape.ellipticity, unit_disk)
    elif morphology == "prior":
        prior = _galaxies_of_hsc(max(shape.shape))
        yield "image", free(shape, None) | {"prior": prior}
    else:
        yield "image", free(shape, between(0.0, 1.0), 2 * STRIDE)


@cache
def _galaxies_of_hsc(size: int):
    """The neural prior of galaxygrad for images of a side of so many pixels, up to 64.

    Of its versions, 0.1.9 is the last that installs with its networks and can be read.
    """
    from galaxygrad import HSC_ScoreNet32, HSC_ScoreNet64
    from scarlet2.nn import ScorePrior

    network = HSC_ScoreNet32 if size <= 32 else HSC_ScoreNet64
    return ScorePrior(network, network.shape, t=TEMPERATURE)


def score(answer: Answer, scenes: Scenes) -> Table:
    """Compare answers with the truth; one row a scene.

    Columns: those of `evaluate`, with `dr` from the flux of the answer, and `dgr`, the
    error of g - r (magnitudes); `ssim` and `cosine` of the r image (see `similarity`);
    `seconds`. NaN where there is no answer.
    """
    found = np.isfinite(answer.flux).all(axis=1)
    images = np.where(found[:, None, None, None], answer.images, 0)
    survey, r = scenes.survey, scenes.survey.reference_index
    table = compare(images, scenes, survey)
    true = scenes.target.sum(axis=(1, 2), dtype=float)  # (scene, band)
    with np.errstate(invalid="ignore"):
        off = -2.5 * np.log10(np.where(answer.flux > 0, answer.flux, np.nan) / true)
    table["dr"], table["dgr"] = off[:, r], off[:, survey.index("g")] - off[:, r]
    images, targets = answer.images[..., r], scenes.target[..., r]
    pairs = [similarity(a, b) for a, b in zip(images, targets, strict=True)]
    table["ssim"], table["cosine"] = np.array(pairs).T
    table["seconds"] = answer.seconds
    return table


def summary(table: Table) -> dict[str, float]:
    """Numbers of a table of `score`, for targets of SNR 10 to 3000.

    Median and half the 16-to-84 % range (`sigma_*`) of `dr`, `dgr` and `de`; `slope` of
    output on input ellipticity, minus one; medians of `ssim` and `cosine`; `outliers`,
    the fraction with no r magnitude within OUTLIER of the truth; `failed`, the fraction
    without r magnitude or shape; mean `seconds`.
    """
    table = table[in_snr_range(table["snr"])]
    found = {}
    for name in ("dr", "dgr", "de"):
        p16, median, p84 = percentiles(table[name])
        found |= {f"median_{name}": median, f"sigma_{name}": (p84 - p16) / 2}
    pairs = np.stack(ellipticity_pairs(table), axis=1)  # (scene, in/out, component)
    found["slope"] = mean_slope(pairs)
    found |= {name: np.nanmedian(table[name]) for name in ("ssim", "cosine")}
    found["outliers"] = 1 - np.mean(np.abs(table["dr"]) < OUTLIER)
    found["failed"] = 1 - np.mean(np.isfinite(table["dr"]) & np.isfinite(table["de"]))
    found["seconds"] = np.mean(table["seconds"])
    return {name: float(value) for name, value in found.items()}


def summary_errors(
    table: Table, rng: np.random.Generator, minus: Table | None = None
) -> dict[str, float]:
    """Bootstrap errors of the numbers of `summary`, or of what they exceed others by.

    With `minus`, a table of the same scenes or of the first of them, both are drawn
    together: what they share, such as hard scenes, is not in the errors.
    """

    def numbers(rows: np.ndarray) -> np.ndarray:
        both = [table] if minus is None else [table, minus]
        values = [list(summary(each[rows]).values()) for each in both]
        return np.subtract(*values) if minus is not None else np.array(values[0])

    n = len(table) if minus is None else min(len(table), len(minus))
    draws = bootstrap(numbers, n, rng)
    return dict(zip(summary(table), np.nanstd(draws, axis=0, ddof=1), strict=True))


def settings(morphology: str) -> str:
    """What decides how `scarlet2` fits a morphology, as its results name it."""
    chosen = FITS[morphology] | {"stride": STRIDE}
    if morphology == "sersic":
        chosen |= {"indices": INDICES, "radii": RADII}
    else:
        chosen |= {"boxes": BOXES}
    if morphology == "prior":
        chosen |= {"temperature": TEMPERATURE}
    return ", ".join(f"{name} {value}" for name, value in chosen.items())


def kept(morphology: str, scenes: Scenes) -> Table:
    """A table of `score` of scarlet2's fits, computed elsewhere, of the first scenes.

    The files are in `data/results`; each says in its `meta` how it was made.

    Raises ValueError if there is no such table, or if it is of other scenes or was made
    with other settings.
    """
    name, folder = f"scarlet2-{morphology}", data_folder("results", "data/results")
    known = {file.stem: file for file in folder.glob("*.ecsv")}
    if name not in known:
        raise ValueError(
            f"no results {name!r}; accepted: {', '.join(sorted(known)) or 'none'}"
        )
    table = Table.read(known[name])[: len(scenes)]
    if table.meta["settings"] != settings(morphology):
        raise ValueError(
            f"results {name!r} were made with {table.meta['settings']}; accepted: "
            f"{settings(morphology)}"
        )
    here = scenes.truth["r_mag"][: len(table)]
    if not np.allclose(here, table["r_mag"], atol=1e-4):
        raise ValueError(
            f"results {name!r} are of other scenes than those received; accepted: "
            f"{table.meta['scenes']}"
        )
    return table


def similarity(image: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """Structural similarity of two images (y, x), and the cosine between them.

    The structural similarity is that of Wang et al. 2004, with a Gaussian window of 1.5
    pixels and the largest pixel of the target as range; NaN for an image with NaN.
    """
    image, target = image.astype(float), target.astype(float)
    span = target.max()
    mean, blur = {}, partial(gaussian_filter, sigma=1.5, truncate=3.5)
    for name, product in (
        ("a", image),
        ("b", target),
        ("aa", image * image),
        ("bb", target * target),
        ("ab", image * target),
    ):
        mean[name] = blur(product)
    centre = mean["a"] * mean["b"]
    squares = mean["a"] ** 2 + mean["b"] ** 2
    covariance = mean["ab"] - centre
    variances = mean["aa"] + mean["bb"] - squares
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    ssim = (2 * centre + c1) * (2 * covariance + c2)
    ssim = ssim / ((squares + c1) * (variances + c2))
    norms = np.sqrt((image**2).sum() * (target**2).sum())
    cosine = (image * target).sum() / norms if norms > 0 else np.nan
    return float(ssim.mean()), float(cosine)
