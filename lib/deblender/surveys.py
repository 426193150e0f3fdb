"""LSST and Euclid as the paper simulates them: bands, PSFs, noise and exposures.

What the paper sets itself (section 2.1.1, and the zero points and sky levels of the
simulation it describes) is written here; pixel scales come from `surveycodex` and
passbands from `speclite`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise

import galsim
import numpy as np
import surveycodex

STAMP_SIZE = 64  # pixels along a side, whatever the instrument (section 2.1.2)
STAMP_CENTRE = (STAMP_SIZE - 1) / 2  # where it is, in pixels from the first
REFERENCE_BAND = "r"  # shapes, magnitudes and blendedness are measured in this band
EUCLID_MOFFAT_BETA = 2.5
PSFS = {
    "kolmogorov": galsim.Kolmogorov,
    "moffat": partial(galsim.Moffat, beta=EUCLID_MOFFAT_BETA),
}


def check_known(kind: str, name: str, known: Iterable[str]) -> None:
    """Refuse a name that is not a known one, and list these.

    Raises ValueError for one.
    """
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}; accepted: {', '.join(known)}")


@dataclass(frozen=True)
class Instrument:
    """A camera: one pixel scale (arcsec) and one PSF (FWHM in arcsec).

    Raises ValueError for a `psf_model` that is none of PSFS.
    """

    name: str
    pixel_scale: float
    psf_model: str
    psf_fwhm: float

    def __post_init__(self) -> None:
        check_known("PSF model", self.psf_model, PSFS)

    @property
    def psf(self) -> galsim.GSObject:
        """The PSF as a GalSim profile of unit flux, atmosphere and optics included."""
        return PSFS[self.psf_model](fwhm=self.psf_fwhm)


@dataclass(frozen=True)
class Band:
    """A passband of an instrument.

    `zero_point` is the AB magnitude that gives 1 e-/s, `sky` is in mag/arcsec^2,
    `exposure` in seconds (all exposures together), `passband` a name of `speclite`.
    """

    name: str
    instrument: Instrument
    zero_point: float
    sky: float
    exposure: float
    passband: str

    def electrons(self, magnitude: np.ndarray) -> np.ndarray:
        """Electrons collected from a source of this AB magnitude."""
        return self.exposure * 10 ** (-0.4 * (np.asarray(magnitude) - self.zero_point))

    def magnitude(self, electrons: np.ndarray) -> np.ndarray:
        """AB magnitude of a source that gave these electrons; NaN if not positive."""
        electrons = np.asarray(electrons, dtype=float)
        rate = np.where(electrons > 0, electrons, np.nan) / self.exposure
        return self.zero_point - 2.5 * np.log10(rate)

    @property
    def sky_electrons(self) -> float:
        """Mean sky background in electrons per pixel."""
        return float(self.electrons(self.sky)) * self.instrument.pixel_scale**2


@dataclass(frozen=True)
class Survey:
    """An ordered set of bands; image arrays have one channel a band, in this order.

    Raises ValueError unless the bands of each instrument follow one another, and if two
    bands or two instruments have the same name.
    """

    name: str
    bands: tuple[Band, ...]

    def __post_init__(self) -> None:
        if (np.diff(self.instrument_of_band) < 0).any():
            names = ", ".join(f"{b.name} ({b.instrument.name})" for b in self.bands)
            raise ValueError(
                f"survey {self.name!r} received bands {names}; accepted: those of one "
                "instrument after another"
            )
        cameras = tuple(instrument.name for instrument in self.instruments)
        for kind, names in (("bands", self.band_names), ("instruments", cameras)):
            if len(set(names)) < len(names):
                raise ValueError(
                    f"survey {self.name!r} received {kind} {', '.join(names)}; "
                    "accepted: each of a name of its own"
                )

    @cached_property
    def band_names(self) -> tuple[str, ...]:
        """Names of the bands, in the order of the channels."""
        return tuple(band.name for band in self.bands)

    @cached_property
    def instruments(self) -> tuple[Instrument, ...]:
        """The instruments, in order of first appearance."""
        return tuple(dict.fromkeys(band.instrument for band in self.bands))

    @cached_property
    def instrument_of_band(self) -> np.ndarray:
        """Index into `instruments` of each band."""
        return np.array([self.instruments.index(b.instrument) for b in self.bands])

    @cached_property
    def cameras(self) -> list[tuple[Instrument, slice]]:
        """Each instrument, and the channels that are its bands."""
        ends = np.searchsorted(
            self.instrument_of_band, np.arange(len(self.instruments) + 1)
        )
        slices = [slice(int(a), int(b)) for a, b in pairwise(ends)]
        return list(zip(self.instruments, slices, strict=True))

    @cached_property
    def sky(self) -> np.ndarray:
        """Mean sky in electrons per pixel, float32."""  # (band,)
        return np.array([b.sky_electrons for b in self.bands], dtype=np.float32)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one stamp."""  # (y, x, band)
        return (STAMP_SIZE, STAMP_SIZE, len(self.bands))

    @property
    def reference(self) -> Band:
        """The band in which shapes, magnitudes and blendedness are measured."""
        return self.bands[self.reference_index]

    @property
    def reference_index(self) -> int:
        """Channel of the reference band."""
        return self.index(REFERENCE_BAND)

    def index(self, band: str) -> int:
        """Channel of a band.

        Raises ValueError for a band the survey does not have.
        """
        check_known(f"{self.name} band", band, self.band_names)
        return self.band_names.index(band)

    def channels(self, other: "Survey") -> list[int]:
        """Channels here of the bands of another survey, in its order.

        Raises ValueError for a band this survey does not have.
        """
        return [self.index(name) for name in other.band_names]

    def check_one_camera(self) -> None:
        """Refuse a survey of several cameras, where pixels of one size are needed.

        Raises ValueError for one.
        """
        if len(self.instruments) > 1:
            names = ", ".join(instrument.name for instrument in self.instruments)
            raise ValueError(
                f"received survey {self.name!r}, of cameras {names}; accepted: one of "
                "one camera"
            )

    def check_images(self, images: np.ndarray) -> np.ndarray:
        """Return `images` as float32 (scene, y, x, band), or say what is wrong.

        Raises ValueError for a wrong shape or band count and for NaN or infinity.
        """
        images = np.asarray(images, dtype=np.float32)
        if images.ndim != 4 or images.shape[1:] != self.shape:
            raise ValueError(
                f"images have shape {images.shape}; survey {self.name!r} accepts "
                f"(scene, {', '.join(map(str, self.shape))}) with bands "
                f"{', '.join(self.band_names)}"
            )
        if not np.isfinite(images).all():
            bad = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))
            raise ValueError(
                f"images of {len(bad)} scenes hold NaN or infinity (first: scene "
                f"{bad[0]}); accepted: finite electrons"
            )
        return images


def per_pixel(values: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Values of bands (band,), float32, for each pixel of one of some images.

    `images` (..., y, x, band). NumPy takes several times longer to go through a last
    axis of six bands again and again than through whole images.
    """
    return np.broadcast_to(values.astype(np.float32), images.shape[-3:]).copy()


def _instrument(name: str, codex: str, psf_model: str, psf_fwhm: float) -> Instrument:
    pixel_scale = surveycodex.get_survey(codex).pixel_scale.to_value("arcsec")
    return Instrument(name, float(pixel_scale), psf_model, psf_fwhm)


def _bands(
    instrument: Instrument,
    names: Sequence[str],
    zero_points: Sequence[float],
    skies: Sequence[float],
    exposures: Sequence[float],
    prefix: str,
) -> tuple[Band, ...]:
    columns = zip(names, zero_points, skies, exposures, strict=True)
    return tuple(
        Band(name, instrument, zero_point, sky, exposure, prefix + name)
        for name, zero_point, sky, exposure in columns
    )


def _lsst() -> tuple[Band, ...]:
    return _bands(
        _instrument("LSST", "LSST", "kolmogorov", 0.65),
        "ugrizy",
        (26.50, 28.30, 28.13, 27.79, 27.40, 26.58),
        (22.95, 22.24, 21.20, 20.47, 19.60, 18.63),
        [15.0 * n for n in (56, 80, 184, 184, 160, 160)],
        "lsst2016-",
    )


def _euclid() -> tuple[Band, ...]:
    vis = _instrument("VIS", "Euclid_VIS", "moffat", 0.18)
    nisp = _instrument("NISP", "Euclid_NISP", "moffat", 0.22)
    exposure = 4 * 450.0
    return _bands(vis, ["VIS"], [25.58], [22.35], [exposure], "Euclid-") + _bands(
        nisp,
        "YJH",
        (24.25, 24.29, 24.92),
        (22.97, 22.93, 22.30),
        3 * [exposure],
        "Euclid-",
    )


SURVEYS = {"lsst": _lsst, "lsst+euclid": lambda: _lsst() + _euclid()}


def survey(name: str) -> Survey:
    """Build a survey by name: `"lsst"` (ugrizy) or `"lsst+euclid"` (and VIS, Y, J, H).

    Raises ValueError for an unknown name. Arcelin et al. 2021, section 2.1.
    """
    check_known("survey", name, SURVEYS)
    return Survey(name, SURVEYS[name]())
