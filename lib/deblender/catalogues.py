"""Galaxy catalogues in the COSMOS schema: the synthetic one and any downloaded one."""

import hashlib
import os
import tempfile
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path

import galsim
import numpy as np
import platformdirs
import speclite.filters
from astropy.io import fits
from astropy.table import Table

from . import synthetic
from .files import make_once
from .surveys import Survey, check_known, survey

LIMITING_MAGNITUDE = 27.5  # r band, AB (section 2.1.2)
N_TEST = 5000  # galaxies kept for the test sample alone (section 2.1)
SPLITS = ("train", "validation", "test", "all")
# GalSim's three templates, in the order of the columns of `Catalogue.fractions`.
TEMPLATES = ("CWW_E_ext_more.sed", "CWW_Scd_ext_more.sed", "CWW_Sbc_ext_more.sed")
BULGE, DISC, INTERMEDIATE = range(3)
# Folder and writer of what is drawn here, by name and whether images are asked for.
SYNTHETIC = {
    ("synthetic", False): ("synthetic", synthetic.write_parametric),
    ("synthetic", True): ("realistic", synthetic.write_stamps),
    ("synthetic-noiseless", True): (
        "noiseless",
        partial(synthetic.write_stamps, noisy=False),
    ),
}


def cache_folder() -> Path:
    """Folder of everything that can be computed again; `DEBLENDER_CACHE` moves it."""
    default = platformdirs.user_cache_path("deblender")
    return Path(os.environ.get("DEBLENDER_CACHE") or default)


@cache
def _bandpass(name: str) -> galsim.Bandpass:
    if name == "F814W":
        return galsim.Bandpass("ACS_wfc_F814W.dat", "nm").withZeropoint("AB")
    response = speclite.filters.load_filter(name)
    table = galsim.LookupTable(response.wavelength, response.response, "linear")
    return galsim.Bandpass(table, "Ang").withZeropoint("AB")


@cache
def _flux_ratios(passband: str, z_max: float) -> tuple[np.ndarray, np.ndarray]:
    """Flux in a passband over flux in F814W, both AB, on a grid of redshifts."""
    redshift = np.linspace(0, z_max, 16 * int(np.ceil(z_max)) + 1)
    ratios = np.empty((len(TEMPLATES), len(redshift)))
    for row, template in enumerate(TEMPLATES):
        rest = galsim.SED(template, wave_type="Ang", flux_type="flambda")
        for column, z in enumerate(redshift):
            sed = rest.atRedshift(z)
            band, detection = _bandpass(passband), _bandpass("F814W")
            colour = sed.calculateMagnitude(band) - sed.calculateMagnitude(detection)
            ratios[row, column] = 10 ** (-0.4 * colour)
    return redshift, ratios


@dataclass(frozen=True, eq=False)  # one is another only if it is the same object
class Catalogue:
    """Galaxies as GalSim reads them, with their magnitudes and a fixed split.

    `name` and `real` rebuild it with `catalogue(name, real)`; `digest` is the SHA-256
    of its tables. `f814w` (galaxy,) is the AB magnitude, `redshift` (galaxy,),
    `fractions` (galaxy, template) the share of the F814W flux with each SED template.
    `rows` (galaxy,) are those in the tables, of `table_size` galaxies.
    """

    name: str
    real: bool
    digest: str
    f814w: np.ndarray
    redshift: np.ndarray
    fractions: np.ndarray
    source: galsim.COSMOSCatalog | galsim.RealGalaxyCatalog
    rows: np.ndarray
    table_size: int

    def __len__(self) -> int:
        return len(self.f814w)

    def magnitudes(self, survey: Survey) -> np.ndarray:
        """AB magnitudes in every band, the SED put at the catalogue's redshift.

        Returns a float64 array, not to be written to; infinite where the SED has no
        light in the band.
        """
        return _magnitudes(self, survey)

    def split(self, name: str) -> np.ndarray:
        """Rows of the galaxies brighter than r = 27.5 in a part of the catalogue.

        `"test"` comes from 5000 galaxies (a quarter of a small catalogue) that never
        serve elsewhere, neither as images nor as fits; the rest is `"validation"` (a
        sixth) and `"train"` (section 2.1). `"all"` takes them all, to test networks
        that know another catalogue.

        Raises ValueError for another name.
        """
        check_known("split", name, SPLITS)
        # Of the whole table: fits leave out a few galaxies of which there are images.
        n = self.table_size
        order = np.random.default_rng(n).permutation(n)
        n_test = min(N_TEST, n // 4)
        n_validation = (n - n_test) // 6
        parts = np.split(order, [n_test, n_test + n_validation])
        parts = dict(zip(("test", "validation", "train"), parts, strict=True))
        lsst = survey("lsst")
        bright = self.magnitudes(lsst)[:, lsst.reference_index] < LIMITING_MAGNITUDE
        return np.flatnonzero(bright & np.isin(self.rows, parts.get(name, order)))

    def profile(self, index: int) -> galsim.GSObject:
        """The galaxy before the PSF, as a GalSim profile of unit flux.

        A real one draws as `galsim.RealGalaxy`, which spends most of its time on its
        noise and on the largest wave of its stamp: PSFs drop shorter ones anyway.
        """
        if not self.real:
            return self.source.makeGalaxy(int(index)).withFlux(1.0)
        seen_through = self.source.getPSFImage(int(index))
        pixels, scale = seen_through.array, seen_through.scale
        psf = _psf(pixels.tobytes(), pixels.shape, scale)
        stamp = self.source.getGalImage(int(index))
        image = galsim.InterpolatedImage(
            stamp, calculate_stepk=psf.stepk, calculate_maxk=False, flux=1.0
        )
        return galsim.Convolve(image, galsim.Deconvolve(psf))


@lru_cache(maxsize=16)  # synthetic stamps have four PSFs
def _psf(pixels: bytes, shape: tuple[int, int], scale: float) -> galsim.GSObject:
    """A PSF of unit flux, whose largest wave takes longer to find than a stamp."""
    array = np.frombuffer(pixels).reshape(shape)
    return galsim.InterpolatedImage(galsim.Image(array, scale=scale), flux=1.0)


@lru_cache(maxsize=8)  # a tenth of a second for COSMOS, and every simulation asks
def _magnitudes(galaxies: Catalogue, survey: Survey) -> np.ndarray:
    z_max = max(4.0, float(galaxies.redshift.max()))
    magnitudes = np.empty((len(galaxies), len(survey.bands)))  # (galaxy, band)
    for column, band in enumerate(survey.bands):
        grid, ratios = _flux_ratios(band.passband, z_max)
        each = np.stack([np.interp(galaxies.redshift, grid, r) for r in ratios], axis=1)
        flux = (galaxies.fractions * each).sum(axis=1)
        with np.errstate(divide="ignore"):
            magnitudes[:, column] = galaxies.f814w - 2.5 * np.log10(flux)
    magnitudes.flags.writeable = False
    return magnitudes


def catalogue(name: str | os.PathLike = "synthetic", real: bool = False) -> Catalogue:
    """Read a catalogue: `"synthetic"`, or a folder that holds GalSim's COSMOS files.

    With `real`, galaxies are HST postage stamps (`galsim.RealGalaxy`; HST-like ones
    for `"synthetic"`, the same before noise for `"synthetic-noiseless"`) and not their
    parametric fits. A synthetic catalogue is drawn once and kept in `cache_folder()`.

    Raises ValueError when the folder is missing or holds no such files.
    """
    drawn = (str(name), real) in SYNTHETIC
    folder = _synthetic(str(name), real) if drawn else Path(name)
    found = sorted(folder.glob("real_galaxy_catalog_*.fits"))
    mains = [f for f in found if not f.stem.endswith(("_fits", "_selection"))]
    mains = list(filter(_has_images if real else _has_fits, mains))
    if not mains:
        raise ValueError(
            f"catalogue {str(name)!r}: no real_galaxy_catalog_*.fits with "
            f"{'its images' if real else 'its parametric fits'} in {folder}; accepted: "
            "'synthetic', with images 'synthetic-noiseless' too, or a folder holding "
            "GalSim's COSMOS files, such as FOLDER/COSMOS_25.2_training_sample after "
            "`galsim_download_cosmos -s 25.2 -d FOLDER --nolink` (4.4 GB)"
        )
    return _read(str(name), mains[0], real)


def _synthetic(name: str, real: bool) -> Path:
    """Folder of a synthetic catalogue, named after the code that draws it."""
    code = hashlib.sha256(Path(synthetic.__file__).read_bytes()).hexdigest()[:12]
    kind, write = SYNTHETIC[name, real]
    folder = cache_folder() / f"{kind}-{code}"

    def make() -> None:
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as half:
            write(Path(half) / kind)
            os.replace(Path(half) / kind, folder)

    return make_once(folder, make)


def _fits_of(main: Path) -> Path:
    return main.with_name(f"{main.stem}_fits.fits")


def _has_fits(main: Path) -> bool:
    if not (file := _fits_of(main)).is_file():
        return False
    with fits.open(file) as tables:  # names only: the table has 81,500 rows
        return "sersicfit" in tables[1].columns.names


def _has_images(main: Path) -> bool:
    if not _fits_of(main).is_file():
        return False
    names = set(np.char.strip(np.asarray(Table.read(main)["GAL_FILENAME"], dtype=str)))
    return all((main.parent / name).is_file() for name in names)


def _read(name: str, main: Path, real: bool) -> Catalogue:
    digest = hashlib.sha256(main.read_bytes() + _fits_of(main).read_bytes()).hexdigest()
    profiles = Table.read(_fits_of(main))
    table_size = len(profiles)
    source, rows = _source(main, real)
    profiles = profiles[rows]
    if "mag_auto" in profiles.colnames:
        magnitude, redshift = profiles["mag_auto"], profiles["zphot"]
    else:  # an extension of the sample that has images and no fits
        magnitude, redshift = Table.read(main)["MAG"][rows], profiles["ZPHOT"]
    return Catalogue(
        name,
        real,
        digest,
        np.asarray(magnitude, dtype=float),
        np.clip(np.asarray(redshift, dtype=float), 0, None),
        _template_fractions(profiles),
        source,
        np.asarray(rows),
        table_size,
    )


def _source(
    main: Path, real: bool
) -> tuple[galsim.COSMOSCatalog | galsim.RealGalaxyCatalog, np.ndarray]:
    """What GalSim reads galaxies from, and their rows in the tables."""
    if real:
        source = galsim.RealGalaxyCatalog(main.name, dir=str(main.parent))
        return source, np.arange(source.nobjects)
    selected = main.with_name(f"{main.stem}_selection.fits").is_file()
    source = galsim.COSMOSCatalog(
        _fits_of(main).name,
        dir=str(main.parent),
        use_real=False,
        exclusion_level="bad_fits" if selected else "none",
    )
    return source, source.orig_index


def _template_fractions(profiles: Table) -> np.ndarray:
    """Share of the flux with each template, by the rule of `galsim.COSMOSCatalog`.

    A Sérsic fit is disc, intermediate or bulge as n < 1.5, < 3 or more; of a bulge and
    disc fit each has its own. Without fits all is intermediate.
    """
    fractions = np.zeros((len(profiles), len(TEMPLATES)))  # (galaxy, template)
    if "sersicfit" not in profiles.colnames:
        fractions[:, INTERMEDIATE] = 1
        return fractions
    index = np.asarray(profiles["sersicfit"])[:, 2]
    template = np.select([index < 1.5, index < 3], [DISC, INTERMEDIATE], BULGE)
    fractions[np.arange(len(profiles)), template] = 1
    flux = np.asarray(profiles["flux"])
    both = np.asarray(profiles["use_bulgefit"], dtype=bool)
    bulge = flux[both, 1] / (flux[both, 1] + flux[both, 2])
    fractions[both] = 0
    fractions[both, BULGE], fractions[both, DISC] = bulge, 1 - bulge
    return fractions
