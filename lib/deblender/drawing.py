"""Stamps drawn in Fourier space, many times faster than one `drawImage` each.

The transform of PSF and pixel is kept, and so are those of Sérsic profiles, which are
curves of one variable. A galaxy costs a look at its curve for each wave of half a
plane, a product, and one inverse FFT.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache, reduce
from typing import NamedTuple

import galsim
import numpy as np
from scipy import fft
from scipy.interpolate import make_interp_spline
from scipy.special import gamma, gammaincinv
from threadpoolctl import ThreadpoolController

from .surveys import STAMP_SIZE, Instrument

# Sides of patches that are transformed fast, in pixels.
SIDES = tuple(
    side << doublings for doublings in range(5) for side in (32, 36, 40, 44, 48, 56)
)
# A patch has room for the light on one side, and on the other as far as the image goes:
# so many times pi / stepk, the radius of nearly all of it as GalSim puts it, of galaxy
# and PSF, added in quadrature. Then images are within 1e-3 of the peak and of the flux
# of those of GalSim (tested).
GALAXY_ROOM, PSF_ROOM = 1.2, 2.5
PSF_END = 3e-3  # of the transform of a PSF, relative to its centre
DARKEST = 4e-4  # the same of PSF and pixel, below which a wave is left out
# The curve of a Sérsic profile is kept at even steps of the square root of the wave
# number, which is steep near zero and long, in units of 1 / half-light radius.
CURVE_STEP, CURVE_END = 1 / 2048, 24.0
# The grid of its Hankel transform, in half-light radii, a power that evens it out, and
# the least wave number, below which the transform is that of a point.
RADII, TILT, LEAST = np.geomspace(1e-9, 1e5, 2048), -0.4, 1e-4
BLAS = ThreadpoolController()  # the libraries of linear algebra of NumPy and SciPy


class Grid(NamedTuple):
    """Waves on half a plane: those of a periodic image that an instrument can see.

    `kx` (column,) and `ky` (row,) are in radians per arcsec, in the order of an FFT.
    PSF and pixel let pass the waves `inside` (wave,), numbers in that plane; `transfer`
    (wave,) is how much of each, real as both are even, and `squares` (3, wave) are
    their kx^2, kx ky and ky^2.
    """

    side: int  # of the patch, in pixels
    scale: float  # of a pixel, in arcsec
    oversampling: int  # which makes room for waves shorter than two pixels
    kx: np.ndarray
    ky: np.ndarray
    inside: np.ndarray
    transfer: np.ndarray
    squares: np.ndarray


def draw(
    profiles: list[galsim.GSObject],
    instruments: Sequence[Instrument],
    size: int = STAMP_SIZE,
) -> list[np.ndarray]:
    """Images of galaxies through PSF and pixels of instruments, each drawn alone.

    `profiles` are galaxies before the PSF, placed relative to the centre of the image.
    Returns float32 (galaxy, y, x) for each instrument, in the units of their fluxes. A
    galaxy is drawn on a patch around it, outside of which it has no light; what exceeds
    the largest of SIDES comes back on the other side of the patch.
    """
    drawn = [np.zeros((len(profiles), size, size), np.float32) for _ in instruments]
    # Products this small lose more by waiting for a second thread than they gain.
    with BLAS.limit(limits=1, user_api="blas"):
        for k, profile in enumerate(profiles):
            radius = np.pi / profile.stepk  # from the centre of the image
            for place, parts in _places(profile).items():
                for images, instrument in zip(drawn, instruments, strict=True):
                    _add(images[k], place, parts, radius, instrument)
    return drawn


def _add(
    image: np.ndarray,
    place: tuple[float, float],
    parts: list[tuple],
    radius: float,
    instrument: Instrument,
) -> None:
    """Add parts of a galaxy to an image (y, x), in place.

    `place` and `radius`, from the centre of the image to where all light ends, in
    arcsec.
    """
    far, scale, size = math.hypot(*place), instrument.pixel_scale, len(image)
    room = math.hypot(GALAXY_ROOM * (radius - far), _spread(instrument)) / scale
    least = room + min(room, far / scale + size / 2)  # pixels
    side = next((side for side in SIDES if side >= least), SIDES[-1])
    grid = _grid(instrument, side)
    (columns, x), (rows, y) = (_overlap(at, size, room, grid) for at in place)
    if not image[rows, columns].size:
        return
    seen = reduce(np.add, (_waves(*part, grid) for part in parts))
    seen *= grid.transfer
    waves = np.zeros((len(grid.ky), len(grid.kx)), dtype=seen.dtype)
    waves.ravel()[grid.inside] = seen
    # Waves shorter than two pixels look like longer ones: so do they in a camera.
    # Along y they are added up before the transform, along x dropped after it. A block
    # of them is a whole number of turns away, which is one phase for all.
    if grid.oversampling > 1:
        blocks = waves.reshape(grid.oversampling, -1)
        waves = np.exp(-1j * grid.ky[:: grid.side] * y) @ blocks
        waves = waves.reshape(grid.side, -1)
    waves = waves * np.exp(-1j * grid.ky[: grid.side] * y)[:, None]
    waves = fft.ifft(waves, axis=0, overwrite_x=True)[: rows.stop - rows.start]
    waves *= np.exp(-1j * grid.kx * x)
    patch = fft.irfft(waves, len(grid.ky), axis=1, overwrite_x=True)
    n = (columns.stop - columns.start) * grid.oversampling
    image[rows, columns] += patch[:, : n : grid.oversampling]


def _overlap(place: float, size: int, room: float, grid: Grid) -> tuple[slice, float]:
    """Pixels of an image that the patch of a galaxy covers, along one axis.

    The patch is around the galaxy, or to one side of it, where it has `room` pixels of
    light to show there and less to show on the other. Also returns how far the place is
    from the first of the pixels, in arcsec.
    """
    at = place / grid.scale + (size - 1) / 2  # pixels from the first of the image
    first, last = at - room, at + room  # of the light
    start = max(round(at) - grid.side // 2, math.ceil(min(last, size)) - grid.side)
    start = min(start, math.floor(max(first, 0)))
    inside = slice(max(start, 0), max(min(start + grid.side, size), 0))
    return inside, (at - inside.start) * grid.scale


@lru_cache(maxsize=16)
def _spread(instrument: Instrument) -> float:
    """Room for the light that a PSF spreads, in arcsec."""
    return np.pi * PSF_ROOM / instrument.psf.stepk


@lru_cache(maxsize=128)
def _grid(instrument: Instrument, side: int) -> Grid:
    """The waves that an instrument sees, and how much of each."""
    psf, scale = instrument.psf, instrument.pixel_scale
    highest = psf.withGSParams(maxk_threshold=PSF_END).maxk
    finer = round(highest * scale / np.pi)
    oversampling = finer + finer % 2 if finer > 1 else 1  # blocks need one or pairs
    n, step = side * oversampling, 2 * np.pi / (side * scale)
    most = min(int(np.ceil(highest / step)), n // 2 - 1)
    kx, ky = step * np.arange(most + 1), step * n * fft.fftfreq(n)
    kx, ky = kx.astype(np.float32), ky.astype(np.float32)
    seen = _by_galsim(galsim.Convolve(psf, galsim.Pixel(scale)), kx, n).real
    inside = np.flatnonzero(np.abs(seen) > DARKEST)
    y, x = np.divmod(inside, most + 1)
    squares = np.stack([kx[x] ** 2, kx[x] * ky[y], ky[y] ** 2])
    transfer = seen.ravel()[inside] * oversampling
    return Grid(side, scale, oversampling, kx, ky, inside, transfer, squares)


def _places(profile: galsim.GSObject) -> dict[tuple[float, float], list[tuple]]:
    """The parts of a galaxy, as `_parts` gives them without place, by their places."""
    places: dict[tuple[float, float], list[tuple]] = {}
    for part, shape, (x, y), flux in _parts(profile, np.eye(2), np.zeros(2), 1.0):
        places.setdefault((float(x), float(y)), []).append((part, shape, flux))
    return places


def _parts(
    profile: galsim.GSObject, shape: np.ndarray, place: np.ndarray, flux: float
) -> Iterator[tuple[galsim.GSObject, np.ndarray, np.ndarray, float]]:
    """The round profiles of a galaxy, the matrix that turns and shears each, its place.

    The last is the factor of its flux.
    """
    if isinstance(profile, galsim.Transformation):
        offset = place + shape @ [profile.offset.x, profile.offset.y]
        # GalSim's ratio is one of surface brightness, ours of flux.
        flux = flux * profile.flux_ratio * _area(profile.jac)
        yield from _parts(profile.original, shape @ profile.jac, offset, flux)
    elif isinstance(profile, galsim.Sum):
        for part in profile.obj_list:
            yield from _parts(part, shape, place, flux)
    else:
        yield profile, shape, place, flux


def _area(shape: np.ndarray) -> float:
    """How many times larger a matrix makes an area; faster than `np.linalg.det`."""
    (a, b), (c, d) = shape.tolist()
    return abs(a * d - b * c)


def _waves(
    part: galsim.GSObject, shape: np.ndarray, flux: float, grid: Grid
) -> np.ndarray:
    """Transform of a part of a galaxy about its own centre, inside (wave,)."""
    index = _sersic_index(part)
    if index is not None:
        return _curve(index, shape * part.half_light_radius, flux * part.flux, grid)
    brightness = flux / _area(shape)
    part = galsim.Transform(part, shape.ravel(), flux_ratio=brightness)
    return _by_galsim(part, grid.kx, len(grid.ky)).ravel()[grid.inside]


def _sersic_index(profile: galsim.GSObject) -> float | None:
    """The Sérsic index of a profile without truncation, None for any other."""
    if isinstance(profile, galsim.Sersic):
        return None if profile.trunc else round(profile.n, 6)
    known = {galsim.Exponential: 1.0, galsim.DeVaucouleurs: 4.0}
    return known.get(type(profile))


def _curve(index: float, shape: np.ndarray, flux: float, grid: Grid) -> np.ndarray:
    """Transform of a Sérsic profile sheared by a matrix in arcsec, float32 (wave,).

    It depends on the length of `shape.T @ k` alone.
    """
    (xx, xy), (_, yy) = shape @ shape.T / CURVE_STEP**4
    lengths = np.array([xx, 2 * xy, yy], dtype=np.float32) @ grid.squares
    np.abs(lengths, out=lengths)  # rounding
    steps = np.sqrt(np.sqrt(lengths, out=lengths), out=lengths).astype(np.int32)
    curve = _sersic(index).take(steps, mode="clip")
    curve *= np.float32(flux)
    return curve


@lru_cache(maxsize=256)
def _sersic(index: float) -> np.ndarray:
    """Transform of a Sérsic profile at the middle of steps of the root of k, float32.

    The Hankel transform of a profile of unit flux, on a logarithmic grid (Hamilton
    2000); GalSim's own table of a steep profile takes a hundred times longer to make.
    """
    b = gammaincinv(2 * index, 0.5)  # half of the light within radius 1
    flux = 2 * np.pi * index * b ** (-2 * index) * gamma(2 * index)
    light = np.exp(-b * RADII ** (1 / index)) / flux
    step = np.log(RADII[1] / RADII[0])
    offset = fft.fhtoffset(step, mu=0, bias=TILT)
    k = np.exp(offset) / RADII[::-1]
    waves = 2 * np.pi / k * fft.fht(RADII * light, step, 0, offset, TILT)
    middle = CURVE_STEP * (0.5 + np.arange(int(CURVE_END / CURVE_STEP)))
    known = make_interp_spline(np.log(k), waves)
    return known(np.log(np.maximum(middle**2, LEAST))).astype(np.float32)


def _by_galsim(profile: galsim.GSObject, kx: np.ndarray, n: int) -> np.ndarray:
    """Transform of any profile, complex64 (ky, kx), ky in the order of an FFT of n."""
    m = len(kx) - 1
    image = galsim.ImageCF(galsim.BoundsI(0, m, -m, m), scale=float(kx[1]))
    waves = np.zeros((n, m + 1), dtype=np.complex64)
    drawn = profile.drawKImage(image=image, recenter=False).array
    waves[: m + 1], waves[-m:] = drawn[m:], drawn[:m]
    return waves
