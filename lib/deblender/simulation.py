"""Isolated and blended scenes drawn with GalSim (section 2 of Arcelin et al. 2021).

All bands of an instrument share pixel scale and PSF, and a galaxy has no colour
gradient, so each galaxy is drawn once per instrument with unit flux. What is stored is
those stamps and the fluxes; bands and noise are composed from them when asked for.
"""

import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache, partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import astropy.units as u
import galsim
import numpy as np
from astropy.table import Table
from photutils.centroids import centroid_com
from photutils.detection import find_peaks
from photutils.utils.exceptions import NoDetectionsWarning
from scipy import stats
from tqdm import tqdm

from .catalogues import SPLITS, Catalogue, cache_folder, catalogue
from .drawing import draw
from .files import make_once, write_whole
from .measurement import b_closest, b_total, ellipticities, signal_to_noise
from .surveys import (
    STAMP_CENTRE,
    STAMP_SIZE,
    Survey,
    check_known,
    per_pixel,
    survey,
)
from .workers import spread

if TYPE_CHECKING:
    from distributed import Client

CENTRINGS = ("exact", "pixel", "peak")
ANNULUS = (0.325, 2.0)  # arcsec from the target to its neighbours (section 2.1.3)
PIXEL_SQUARE = 0.2  # arcsec, side of the square of the pixel centring (section 2.1.4)
DETECTION_SIZE, DETECTION_SIGMA = 128, 5.0
MATCH_RADIUS = 1.0  # arcsec; a peak farther from every galaxy is one of the noise
OFFSETS_FROM = 1000  # blends that tell how far peaks are from galaxies
MAX_TRIES = 1000  # scenes drawn before giving up on one with a detected peak
COUNTS, LAYOUT, NOISE = 1, 2, 3  # streams of random numbers of one seed
FEW = 50.0  # electrons, below which the shape of Poisson's distribution shows
CHUNK = 100  # scenes a task draws and writes at a time
# Unit-flux pixels times this fit the range of float16: an error below 5e-4 of a pixel,
# or below 3e-11 of the flux where that is more.
STAMP_SCALE = 1024.0
FORMAT = 9  # of what is cached; raise it when the same call would draw other bits
# Profiles, random numbers, centring errors, peaks and colours come from these.
DRAWN_WITH = ("galsim", "numpy", "scipy", "photutils", "speclite")


@dataclass
class Scenes:
    """Simulated scenes: unit-flux stamps and fluxes, composed into images on demand.

    `stamps` maps an instrument to float16 (galaxy, y, x), in units of 1/STAMP_SCALE;
    `flux` is float32 (galaxy, band) in electrons; the rows of scene i are
    `first[i]:first[i + 1]`, its target first. `truth` is an astropy Table, one row a
    scene; `noise_key` seeds the noise of each scene.
    """

    survey: Survey
    stamps: dict[str, np.ndarray]
    flux: np.ndarray
    first: np.ndarray
    truth: Table
    noise_key: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def counts(self) -> np.ndarray:
        """Number of galaxies of each scene."""  # (scene,)
        return np.diff(self.first)

    def compose(self, rows: np.ndarray) -> np.ndarray:
        """Noiseless images of single galaxies or of several, float32 electrons.

        `rows` (image,) or (image, galaxy) are numbers of galaxies, -1 for none.
        """
        rows = rows[:, None] if rows.ndim == 1 else rows  # (image, galaxy)
        images = np.empty((len(rows), *self.survey.shape), dtype=np.float32)
        for image, chosen in zip(images, rows, strict=True):
            present = chosen[chosen >= 0]
            flux = self.flux[present] / np.float32(STAMP_SCALE)  # (galaxy, band)
            for instrument, bands in self.survey.cameras:
                unit = self.stamps[instrument.name][present].reshape(-1, STAMP_SIZE**2)
                # A product of matrices: ten times faster than broadcasting.
                light = unit.astype(np.float32).T @ flux[:, bands]
                image[..., bands] = light.reshape(STAMP_SIZE, STAMP_SIZE, -1)
        return images  # (image, y, x, band)

    def neighbour_rows(self, slot: int) -> np.ndarray:
        """Rows of the galaxies in a slot (1, 2, ...) of every scene, -1 where none.

        Slot 0 is that of the target.
        """
        rows = self.first[:-1] + slot
        return np.where(slot < self.counts, rows, -1)  # (scene,)

    @property
    def target_positions(self) -> np.ndarray:
        """Where the targets are, arcsec from the stamp centre."""  # (scene, xy)
        return np.stack([self.truth["dx"], self.truth["dy"]], axis=-1)

    @property
    def neighbour_positions(self) -> np.ndarray:
        """Where the neighbours are, arcsec; NaN where none."""  # (scene, slot, xy)
        x, y = self.truth["neighbour_dx"], self.truth["neighbour_dy"]
        return np.stack([x, y], axis=-1)

    @property
    def places(self) -> list[np.ndarray]:
        """Where the galaxies of each scene are, its target first, (galaxy, yx).

        In pixels of the reference band, from the first.
        """
        scale = self.survey.reference.instrument.pixel_scale
        both = zip(self.target_positions, self.neighbour_positions, strict=True)
        each = [np.concatenate([[target], others]) for target, others in both]
        return [
            STAMP_CENTRE + xy[:n, ::-1] / scale
            for xy, n in zip(each, self.counts, strict=True)
        ]

    @cached_property
    def target(self) -> np.ndarray:
        """Noiseless images of the target alone, electrons, float32."""
        return self.compose(self.first[:-1])  # (scene, y, x, band)

    @cached_property
    def blend(self) -> np.ndarray:
        """Noiseless images of all galaxies, electrons, float32."""
        slots = range(int(self.counts.max(initial=1)))
        rows = np.stack([self.neighbour_rows(slot) for slot in slots], axis=1)
        return self.compose(rows)  # (scene, y, x, band)

    @cached_property
    def noisy(self) -> np.ndarray:
        """Blends with the Poisson noise of sky and sources, mean sky subtracted."""
        images = np.empty_like(self.blend)  # (scene, y, x, band)
        for i, (scene, blend) in enumerate(
            zip(self.truth["scene"], self.blend, strict=True)
        ):
            rng = np.random.default_rng([*self.noise_key, int(scene)])
            images[i] = add_noise(blend, self.survey.sky, rng)
        return images

    def take(self, indices: np.ndarray | slice) -> "Scenes":
        """The scenes of these indices or this mask, with the noise they have here."""
        indices = np.arange(len(self))[indices]
        counts = self.counts[indices]
        starts = np.repeat(self.first[:-1][indices], counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = starts + within
        return replace(
            self,
            stamps={name: stamps[rows] for name, stamps in self.stamps.items()},
            flux=self.flux[rows],
            first=np.concatenate([[0], np.cumsum(counts)]),
            truth=self.truth[indices],
        )

    def batches(self, size: int = 250) -> Iterator["Scenes"]:
        """The same scenes, a few at a time, for machines with little memory."""
        for start in range(0, len(self), size):
            yield self.take(np.arange(start, min(start + size, len(self))))


def add_noise(
    images: np.ndarray, sky: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Poisson noise of sky plus sources, the mean sky then subtracted.

    `images` (..., band) and `sky` (band,) in electrons per pixel. Equal generators give
    equal noise to images that hardly differ. Section 2.1.1.
    """
    sky = per_pixel(sky, images)
    mean = images + sky
    np.maximum(mean, 0, out=mean)  # Fourier ringing may dip below zero
    # One normal number a pixel and its skewness, by Cornish and Fisher: within 1e-3 of
    # the distribution of Poisson (tested), drawn three times faster.
    normal = rng.standard_normal(mean.shape, dtype=np.float32)
    counts = np.sqrt(mean)
    counts *= normal
    counts += mean
    normal *= normal
    normal -= 1
    normal /= 6
    counts += normal
    np.rint(counts, out=counts)
    few = mean < FEW
    counts[few] = rng.poisson(mean[few])
    return np.subtract(counts, sky, dtype=np.float32)


def simulate(
    catalogue: Catalogue,
    survey: Survey,
    n_scenes: int,
    max_galaxies: int = 4,
    centring: str = "exact",
    seed: int = 1,
    split: str = "test",
    shear: tuple[float, float] = (0.0, 0.0),
    processes: int | None = None,
    client: "Client | None" = None,
) -> Scenes:
    """Draw scenes of 1 to `max_galaxies` galaxies around a target (section 2.1).

    `max_galaxies=1` gives isolated galaxies. `centring` is `"exact"`, `"pixel"`
    (uniform in a 0.2" square) or `"peak"` (brightest photutils peak in r, section
    2.1.4). `split` names the galaxies that may serve. `shear` (g1, g2) shears every
    profile about its own centre. Scenes are drawn on all cores (or `processes`, or the
    workers of a Dask `client`, which need the catalogue at the same place), kept in
    `cache_folder()` and resumed after an interruption; a process that asks for scenes
    which another is drawing waits for them. A seed gives the same bits whoever draws.

    Raises ValueError for an unknown centring or split, one without galaxies, a number
    of scenes or galaxies below one, a seed below zero, or a shear of one or more.
    """
    _check(n_scenes, max_galaxies, centring, seed, shear)
    if not len(catalogue.split(split)):
        raise ValueError(
            f"received catalogue {catalogue.name!r} of {len(catalogue)} galaxies, none "
            f"in its split {split!r}; accepted: one with some"
        )
    task = _Task(
        catalogue=(catalogue.name, catalogue.real, catalogue.digest),
        survey=survey,
        n_scenes=int(n_scenes),
        max_galaxies=int(max_galaxies),
        centring=centring,
        seed=int(seed),
        split=split,
        shear=(float(shear[0]), float(shear[1])),
        offsets=_offsets(catalogue, max_galaxies, centring, processes, client),
    )
    folder = cache_folder() / "scenes" / task.key
    make_once(folder, partial(_draw_all, task, folder, processes, client))
    return _open(folder, task)


def _check(
    n_scenes: int, max_galaxies: int, centring: str, seed: int, shear: tuple
) -> None:
    check_known("centring", centring, CENTRINGS)
    if n_scenes < 1 or max_galaxies < 1 or seed < 0:
        raise ValueError(
            f"received n_scenes={n_scenes}, max_galaxies={max_galaxies}, seed={seed}; "
            "accepted: 1 or more of each of the first, 0 or more"
        )
    if np.hypot(*shear) >= 1:
        raise ValueError(f"received shear={shear}; accepted: |g| < 1")


def _offsets(
    catalogue: Catalogue,
    max_galaxies: int,
    centring: str,
    processes: int | None,
    client: "Client | None",
) -> tuple[float, ...] | None:
    if centring == "peak" and max_galaxies == 1:
        return centring_offsets(catalogue, processes, client)
    return None


def centring_offsets(
    catalogue: Catalogue, processes: int | None = None, client: "Client | None" = None
) -> tuple[float, ...]:
    """Beta prime distribution of the centring error of peak-centred blends.

    Returns (a, b, loc, scale) of `scipy.stats.betaprime`, in arcsec, fitted to blends
    of the training galaxies; `processes` and `client` as for `simulate`. Section 2.1.4.
    """
    setting = {"seed": 0, "split": "train", "processes": processes, "client": client}
    blends = simulate(catalogue, survey("lsst"), OFFSETS_FROM, 4, "peak", **setting)
    distance = np.hypot(blends.truth["dx"], blends.truth["dy"])
    return tuple(map(float, stats.betaprime.fit(distance, floc=0)))


@dataclass(frozen=True)
class _Task:
    """All that decides the bits of a set of scenes."""

    catalogue: tuple[str, bool, str]
    survey: Survey
    n_scenes: int
    max_galaxies: int
    centring: str
    seed: int
    split: str
    shear: tuple[float, float]
    offsets: tuple[float, ...] | None

    @property
    def key(self) -> str:
        """Name of the folder that keeps these scenes."""
        content = asdict(self) | {"format": FORMAT}
        content |= {name: version(name) for name in DRAWN_WITH}
        content["catalogue"] = self.catalogue[1:]  # the content, wherever it lies
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    @property
    def entropy(self) -> tuple[int, int, int]:
        return (self.seed, SPLITS.index(self.split), CENTRINGS.index(self.centring))

    def counts(self) -> np.ndarray:
        """Galaxies of each scene, uniform from 1 to the maximum (section 2.1.3)."""
        rng = np.random.default_rng([*self.entropy, COUNTS])
        return rng.integers(1, self.max_galaxies + 1, self.n_scenes)

    def rng(self, scene: int) -> np.random.Generator:
        """One generator a scene: its draws depend on nothing drawn before."""
        return np.random.default_rng([*self.entropy, LAYOUT, scene])


@dataclass
class _Scene:
    """Where each galaxy of a scene goes; the target is the first."""

    rows: np.ndarray  # (galaxy,) in the catalogue
    angles: np.ndarray  # (galaxy,) radians
    dx: np.ndarray  # (galaxy,) arcsec from the stamp centre
    dy: np.ndarray


@lru_cache(maxsize=2)
def _read_again(name: str, real: bool, digest: str) -> Catalogue:
    """The catalogue of a task, read once in each process."""
    found = catalogue(name, real)
    if found.digest != digest:
        raise ValueError(
            f"catalogue {name!r} now has digest {found.digest[:12]}; accepted: "
            f"{digest[:12]}, as when it was read"
        )
    return found


class _Painter:
    """Draws scenes of a task; one lives in each process."""

    def __init__(self, task: _Task) -> None:
        self.task = task
        self.catalogue = _read_again(*task.catalogue)
        self.survey = task.survey
        self.magnitudes = self.catalogue.magnitudes(self.survey)  # (galaxy, band)
        self.split = self.catalogue.split(task.split)

    def arrange(self, scene: int, count: int) -> _Scene:
        """Draw galaxies, rotations and positions of one scene."""
        rng = self.task.rng(scene)
        for _ in range(MAX_TRIES):
            placed = self._place(rng, count)
            if self.task.centring != "peak" or count == self.task.max_galaxies == 1:
                return placed
            peak = self._brightest_peak(placed, rng)
            if peak is not None:
                recentred = self._recentre(placed, *peak)
                if np.hypot(recentred.dx[0], recentred.dy[0]) < MATCH_RADIUS:
                    return recentred
        raise ValueError(
            f"centring 'peak' found no {DETECTION_SIGMA:g}-sigma peak in {MAX_TRIES} "
            f"draws of scene {scene}; accepted: catalogues with brighter galaxies"
        )

    def _place(self, rng: np.random.Generator, count: int) -> _Scene:
        rows = rng.choice(self.split, size=count, replace=count > len(self.split))
        r_mag = self.magnitudes[rows, self.survey.reference_index]
        rows = rows[np.argsort(r_mag, kind="stable")]  # the brightest is the target
        angles = rng.uniform(0, 2 * np.pi, count)
        inner, outer = np.square(ANNULUS)
        radius = np.sqrt(rng.uniform(inner, outer, count))  # uniform in area
        direction = rng.uniform(0, 2 * np.pi, count)
        radius[0] = 0
        shift = rng.uniform(-0.5, 0.5, 2) * PIXEL_SQUARE
        shift = shift * (self.task.centring != "exact")
        if self.task.offsets:  # fitted to distances that the square is a part of
            error = stats.betaprime.rvs(*self.task.offsets, random_state=rng)
            angle = rng.uniform(0, 2 * np.pi)
            shift = error * np.array([np.cos(angle), np.sin(angle)])
        dx = radius * np.cos(direction) + shift[0]
        dy = radius * np.sin(direction) + shift[1]
        return _Scene(rows, angles, dx, dy)

    def _brightest_peak(
        self, scene: _Scene, rng: np.random.Generator
    ) -> tuple[float, float] | None:
        """Pixel intersection nearest to the brightest 5-sigma peak in r, arcsec."""
        band = self.survey.reference
        flux = band.electrons(self.magnitudes[scene.rows, self.survey.reference_index])
        profiles = self._profiles(scene)
        whole = galsim.Sum([p * f for p, f in zip(profiles, flux, strict=True)])
        ((image,),) = draw([whole], [band.instrument], DETECTION_SIZE)  # (y, x)
        noisy = rng.poisson(np.maximum(image, 0) + band.sky_electrons)
        noisy = noisy - band.sky_electrons
        threshold = DETECTION_SIGMA * np.sqrt(band.sky_electrons)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoDetectionsWarning)  # we draw again
            peaks = find_peaks(
                noisy, threshold, box_size=3, n_peaks=1, centroid_func=centroid_com
            )
        if peaks is None:
            return None
        centroid = np.array([peaks["x_centroid"][0], peaks["y_centroid"][0]])
        corner = np.floor(centroid) + 0.5 - (DETECTION_SIZE - 1) / 2
        return tuple(corner * band.instrument.pixel_scale)

    def _recentre(self, scene: _Scene, x: float, y: float) -> _Scene:
        """Move the stamp to (x, y) arcsec; the target is the galaxy nearest to it."""
        dx, dy = scene.dx - x, scene.dy - y
        target = np.argmin(np.hypot(dx, dy))
        order = np.concatenate([[target], np.delete(np.arange(len(dx)), target)])
        return _Scene(scene.rows[order], scene.angles[order], dx[order], dy[order])

    def _profiles(self, scene: _Scene) -> list[galsim.GSObject]:
        """The galaxies of a scene before the PSF, turned, sheared and in place."""
        shear = galsim.Shear(g1=self.task.shear[0], g2=self.task.shear[1]).getMatrix()
        placed = []
        for row, angle, dx, dy in zip(
            scene.rows, scene.angles, scene.dx, scene.dy, strict=True
        ):
            sin, cos = np.sin(angle), np.cos(angle)
            shape = shear @ [[cos, -sin], [sin, cos]]
            profile = self.catalogue.profile(row)
            place = galsim.PositionD(dx, dy)
            placed.append(galsim.Transform(profile, shape.ravel(), place))
        return placed

    def paint(self, start: int, counts: np.ndarray) -> tuple[dict, np.ndarray, Table]:
        """Stamps (float16, per instrument), fluxes and truth of consecutive scenes."""
        scenes = [self.arrange(start + i, int(n)) for i, n in enumerate(counts)]
        instruments = self.survey.instruments
        unit = [draw(self._profiles(scene), instruments) for scene in scenes]
        stamps = {
            instrument.name: (np.concatenate(drawn) * STAMP_SCALE).astype(np.float16)
            for instrument, *drawn in zip(instruments, *unit, strict=True)
        }
        rows = np.concatenate([s.rows for s in scenes])
        flux = np.stack(
            [
                b.electrons(m)
                for b, m in zip(self.survey.bands, self.magnitudes[rows].T, strict=True)
            ],
            axis=1,
        ).astype(np.float32)
        return stamps, flux, self._truth(start, scenes, counts, stamps, flux)

    def _truth(
        self,
        start: int,
        scenes: list[_Scene],
        counts: np.ndarray,
        stamps: dict[str, np.ndarray],
        flux: np.ndarray,
    ) -> Table:
        band, width = self.survey.reference_index, max(self.task.max_galaxies - 1, 1)
        targets = np.array([s.rows[0] for s in scenes])
        table = Table({"scene": np.arange(start, start + len(scenes))})
        table["galaxy_id"] = targets
        table["r_mag"] = self.magnitudes[targets, band]
        table["z"] = self.catalogue.redshift[targets]
        table["n_galaxies"] = counts
        table["dx"] = [s.dx[0] for s in scenes]
        table["dy"] = [s.dy[0] for s in scenes]
        table["angle"] = [s.angles[0] for s in scenes]
        table["neighbour_id"] = _padded([s.rows[1:] for s in scenes], width, -1)
        table["neighbour_dx"] = _padded([s.dx[1:] for s in scenes], width, np.nan)
        table["neighbour_dy"] = _padded([s.dy[1:] for s in scenes], width, np.nan)
        table["neighbour_angle"] = _padded(
            [s.angles[1:] for s in scenes], width, np.nan
        )
        closest = np.array([_closest(s) for s in scenes])
        nearest = np.array([s.rows[k] for s, k in zip(scenes, closest, strict=True)])
        dmag = self.magnitudes[nearest, band] - table["r_mag"]
        table["dmag"] = np.where(closest > 0, dmag, np.nan)
        first = np.concatenate([[0], np.cumsum(counts)])
        _measure_truth(Scenes(self.survey, stamps, flux, first, table, ()), closest)
        return table


def _measure_truth(scenes: Scenes, closest: np.ndarray) -> None:
    """Add what is measured on noiseless images: shape, SNR and blendedness."""
    band, table = scenes.survey.reference, scenes.truth
    flux = scenes.flux[:, scenes.survey.reference_index] / STAMP_SCALE
    stamps = scenes.stamps[band.instrument.name].astype(float)
    galaxies = stamps * flux[:, None, None]  # (galaxy, y, x)
    first = scenes.first[:-1]
    target = galaxies[first]  # (scene, y, x)
    table["snr"] = signal_to_noise(target, band.sky_electrons)
    e, _ = ellipticities(target.astype(np.float32), band.instrument)
    table["e1"], table["e2"] = e.T
    blended = closest > 0
    neighbour = galaxies[(first + closest)[blended]]
    table["b_closest"] = np.zeros(len(table))
    table["b_closest"][blended] = b_closest(target[blended], neighbour)
    # Slices are added up several times faster than by `np.add.reduceat`.
    whole = [galaxies[a:b].sum(axis=0) for a, b in pairwise(scenes.first)]
    table["b_total"] = b_total(target, np.array(whole))


def _closest(scene: _Scene) -> int:
    """Number of the neighbour nearest to the target, 0 when there is none."""
    if len(scene.rows) == 1:
        return 0
    distance = np.hypot(scene.dx[1:] - scene.dx[0], scene.dy[1:] - scene.dy[0])
    return 1 + int(np.argmin(distance))


def _padded(columns: list[np.ndarray], width: int, fill: float) -> np.ndarray:
    padded = np.full((len(columns), width), fill)
    for row, values in zip(padded, columns, strict=True):
        row[: len(values)] = values
    return padded.astype(int) if fill == -1 else padded  # (scene, neighbour)


def _draw_all(
    task: _Task, folder: Path, processes: int | None, client: "Client | None"
) -> None:
    """Draw every chunk that is not there yet, then put the folder in place.

    Chunks are written whole (a file is renamed into place after its stamps), so an
    interrupted run goes on where it stopped.
    """
    half = folder.with_name(f"{folder.name}.partial")
    half.mkdir(exist_ok=True)
    counts = task.counts()
    _allocate(half, task, int(counts.sum()))
    starts = range(0, task.n_scenes, CHUNK)
    missing = [s for s in starts if not _chunk(half, s).exists()]
    label = f"{task.survey.name} {'isolated' if task.max_galaxies == 1 else 'blends'}"
    with tqdm(
        total=task.n_scenes,
        initial=task.n_scenes - sum(len(counts[s : s + CHUNK]) for s in missing),
        desc=label,
        unit="scene",
        leave=False,
    ) as bar:
        for drawn in spread(_draw_chunk, task, missing, client, processes):
            bar.update(_keep_chunk(half, counts, *drawn))
    _merge(half, starts)
    os.replace(half, folder)


@lru_cache(maxsize=1)
def _painter(task: _Task) -> _Painter:
    """The painter of this process; reading the catalogue takes a second."""
    return _Painter(task)


def _draw_chunk(task: _Task, start: int) -> tuple[int, dict, np.ndarray, Table]:
    mine = task.counts()[start : start + CHUNK]
    return start, *_painter(task).paint(start, mine)


def _keep_chunk(
    folder: Path,
    counts: np.ndarray,
    start: int,
    stamps: dict[str, np.ndarray],
    flux: np.ndarray,
    truth: Table,
) -> int:
    """Write a chunk, its stamps first; returns its number of scenes."""
    first = int(counts[:start].sum())
    for name, values in stamps.items():
        stored = np.load(_stamp_file(folder, name), mmap_mode="r+")
        stored[first : first + len(values)] = values
        stored.flush()
    _write_npz(_chunk(folder, start), flux=flux, truth=truth.as_array())
    return len(truth)


def _write_npz(file: Path, **arrays: np.ndarray) -> None:
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_whole(file, content.getvalue())


def _allocate(folder: Path, task: _Task, n_galaxies: int) -> None:
    shape = (n_galaxies, STAMP_SIZE, STAMP_SIZE)
    for instrument in task.survey.instruments:
        file = _stamp_file(folder, instrument.name)
        if file.exists():
            continue
        scratch = file.with_suffix(".scratch.npy")
        np.lib.format.open_memmap(scratch, "w+", np.float16, shape).flush()
        if hasattr(os, "posix_fallocate"):  # else a full disk kills, in mid-drawing
            with open(scratch, "r+b") as whole:
                os.posix_fallocate(whole.fileno(), 0, scratch.stat().st_size)
        os.replace(scratch, file)


def _merge(folder: Path, starts: range) -> None:
    chunks = [dict(np.load(_chunk(folder, start))) for start in starts]
    merged = {k: np.concatenate([c[k] for c in chunks]) for k in chunks[0]}
    _write_npz(folder / "truth.npz", **merged)


def _open(folder: Path, task: _Task) -> Scenes:
    for chunk in folder.glob("chunk-*.npz"):  # merged by now, not to be drawn again
        chunk.unlink(missing_ok=True)
    with np.load(folder / "truth.npz") as kept:
        flux, truth = kept["flux"], Table(kept["truth"])
    for name in ("r_mag", "dmag"):
        truth[name].unit = u.mag
    for name in ("dx", "dy", "neighbour_dx", "neighbour_dy"):
        truth[name].unit = u.arcsec
    for name in ("angle", "neighbour_angle"):
        truth[name].unit = u.rad
    stamps = {
        i.name: np.load(_stamp_file(folder, i.name), mmap_mode="r")
        for i in task.survey.instruments
    }
    first = np.concatenate([[0], np.cumsum(truth["n_galaxies"])])
    return Scenes(task.survey, stamps, flux, first, truth, (*task.entropy, NOISE))


def _stamp_file(folder: Path, instrument: str) -> Path:
    return folder / f"stamps-{instrument}.npy"


def _chunk(folder: Path, start: int) -> Path:
    return folder / f"chunk-{start:08d}.npz"
