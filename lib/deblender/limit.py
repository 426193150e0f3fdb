"""The statistical limit: how well any unbiased fit could measure a blended galaxy.

The Cramer-Rao bound of a joint fit of all galaxies of a scene that knows their number
and their profiles up to flux, position, size and shape. What uses a prior may do better
than it, at the price of a bias.
"""

from dataclasses import dataclass

import galsim
import numpy as np
from astropy.table import Table
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from .catalogues import Catalogue
from .drawing import draw
from .simulation import Scenes
from .surveys import Survey

# Steps of the central differences, in the order of the parameters of a galaxy that do
# not depend on the band: x and y (arcsec), log of the size, reduced shear g1 and g2.
STEPS = np.array([0.01, 0.01, 0.01, 0.01, 0.01])
PLACE, SHEAR = slice(0, 2), slice(3, 5)  # among them
MAGNITUDES = 2.5 / np.log(10)  # of a relative error of flux of one


@dataclass
class _Galaxy:
    """Unit-flux images of a galaxy and their derivatives, an instrument each."""

    image: list[np.ndarray]  # (y, x) an instrument
    gradient: list[np.ndarray]  # (parameter, y, x) an instrument
    flux: np.ndarray  # (band,) electrons


def cramer_rao(scenes: Scenes, galaxies: Catalogue) -> Table:
    """Smallest standard deviations of an unbiased fit, by what it is told.

    `scenes` of `galaxies`, drawn without shear. Columns, one row a scene: `sigma_r`
    (magnitudes), `sigma_e` (of the modulus of the ellipticity of the target) and
    `sigma_across` (of the component at right angles to it), for a fit of all galaxies
    together, each with its flux in every band, position, size and shape. With the
    ending `_centred` the position of the target is known, with `_placed` that of every
    galaxy, and `_alone` is without neighbours. NaN where the parameters cannot be told
    apart, and of ellipticities where the target has none.
    Variance of pixels: sky and sources. Cramer 1946; Rao 1945.

    Raises ValueError for scenes of other galaxies.
    """
    survey, truth = scenes.survey, scenes.truth
    r_mag = galaxies.magnitudes(survey)[:, survey.reference_index]
    if not np.allclose(r_mag.take(truth["galaxy_id"], mode="clip"), truth["r_mag"]):
        raise ValueError(
            f"received catalogue {galaxies.name!r}, whose galaxies have other "
            "magnitudes than those of the scenes; accepted: the one they were drawn of"
        )
    rows, numbered = [], range(len(scenes))
    # Threads that share so small matrices mostly wait for one another.
    with threadpool_limits(1, "blas"):
        for i in tqdm(numbered, desc="Fisher matrices", leave=False):
            drawn = _differentiate(scenes, galaxies, i)
            e = np.array([truth["e1"][i], truth["e2"][i]])
            fisher, alone = _information(drawn, survey), _information(drawn[:1], survey)
            bounds = [_errors(fisher, survey, e, n) for n in (0, 1, len(drawn))]
            rows.append(np.ravel([*bounds, _errors(alone, survey, e)]))
    numbers = ("sigma_r", "sigma_e", "sigma_across")
    endings = ("", "_centred", "_placed", "_alone")
    names = [number + ending for ending in endings for number in numbers]
    return Table(np.array(rows).reshape(-1, len(names)), names=names)


def _differentiate(scenes: Scenes, galaxies: Catalogue, i: int) -> list[_Galaxy]:
    """Images of the galaxies of scene `i`, its target first, and their derivatives."""
    truth, n = scenes.truth[i], scenes.counts[i] - 1
    columns = [
        [truth[target], *truth[neighbours][:n]]
        for target, neighbours in (
            ("galaxy_id", "neighbour_id"),
            ("angle", "neighbour_angle"),
            ("dx", "neighbour_dx"),
            ("dy", "neighbour_dy"),
        )
    ]
    drawn = []
    for k, (row, angle, dx, dy) in enumerate(zip(*columns, strict=True)):
        profile = galaxies.profile(row).rotate(angle * galsim.radians)
        varied = [profile.shift(dx, dy), *_varied(profile, dx, dy)]
        galaxy = _Galaxy([], [], scenes.flux[scenes.first[i] + k])
        for images in draw(varied, scenes.survey.instruments):
            images = images.astype(float)
            slopes = (images[1::2] - images[2::2]) / (2 * STEPS[:, None, None])
            galaxy.image.append(images[0])
            galaxy.gradient.append(slopes)
        drawn.append(galaxy)
    return drawn


def _varied(profile: galsim.GSObject, dx: float, dy: float) -> list[galsim.GSObject]:
    """The profile a step up and a step down in each parameter, in place."""
    varied = []
    for parameter, step in enumerate(STEPS):
        for sign in (1, -1):
            x, y, size, g1, g2 = sign * step * np.eye(len(STEPS))[parameter]
            changed = profile.dilate(np.exp(size)).shear(g1=g1, g2=g2)
            varied.append(changed.shift(dx + x, dy + y))
    return varied


def _information(drawn: list[_Galaxy], survey: Survey) -> np.ndarray:
    """Fisher matrix: of each galaxy its log fluxes, then the parameters of STEPS."""
    n_bands, n_shared, n = len(survey.bands), len(STEPS), len(drawn)
    width = n_bands + n_shared
    fisher = np.zeros((n * width, n * width))  # (parameter, parameter)
    for band, k in enumerate(survey.instrument_of_band):
        slopes = [np.stack([g.image[k], *g.gradient[k]]) * g.flux[band] for g in drawn]
        slopes = np.reshape(slopes, (n * (1 + n_shared), -1))  # (parameter, pixel)
        electrons = slopes[:: 1 + n_shared].sum(axis=0)  # of all galaxies
        variance = np.maximum(electrons, 0) + survey.sky[band]
        here = np.r_[band, n_bands:width]
        here = np.concatenate([j * width + here for j in range(n)])
        fisher[np.ix_(here, here)] += (slopes / variance) @ slopes.T
    return fisher


def _errors(
    fisher: np.ndarray, survey: Survey, e: np.ndarray, n_placed: int = 0
) -> tuple[float, float, float]:
    """Standard deviations for the target: of r, and of e along and across itself.

    `e` is its ellipticity; the positions of the first `n_placed` galaxies are known.
    """
    band, n_bands = survey.reference_index, len(survey.bands)
    free = np.ones((len(fisher) // (n_bands + len(STEPS)), n_bands + len(STEPS)), bool)
    free[:n_placed, n_bands:][:, PLACE] = False
    free = np.ix_(free.ravel(), free.ravel())
    covariance = np.zeros_like(fisher)
    try:
        covariance[free] = np.linalg.inv(fisher[free])
    except np.linalg.LinAlgError:
        return np.nan, np.nan, np.nan
    shear = covariance[n_bands:, n_bands:][SHEAR, SHEAR]
    # Any direction serves a round galaxy.
    cos, sin = e / np.hypot(*e) if np.hypot(*e) > 0 else (1.0, 0.0)
    frame = np.array([[cos, sin], [-sin, cos]])
    with np.errstate(invalid="ignore"):
        # A shear g turns an ellipticity e into (e + g) / (1 + g* e).
        slopes = np.array([1 - e @ e, 1 + e @ e])
        along, across = slopes * np.sqrt(np.diag(frame @ shear @ frame.T))
        return MAGNITUDES * np.sqrt(covariance[band, band]), along, across
