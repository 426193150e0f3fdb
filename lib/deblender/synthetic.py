"""A stand-in for the COSMOS catalogue, in the FITS schema that GalSim reads.

The training set of Arcelin et al. (2021, section 2.1) is built on the HST/ACS F814W
sample of Mandelbaum et al. (2012), which is a download of several gigabytes. This
module draws galaxies from published distributions instead, so that everything runs
without it: `write_parametric` makes a catalogue of light profiles, `write_stamps` one
with postage stamps as the HST would have recorded them. No observed galaxy is in them.
"""

import os
from functools import cache
from pathlib import Path

import galsim
import numpy as np
from astropy.io import fits
from scipy.ndimage import gaussian_filter
from scipy.signal import fftconvolve
from scipy.special import gamma, gammaincinv
from tqdm import tqdm

PIXEL = 0.03  # arcsec, the resampled ACS images of COSMOS
ZERO_POINT = 25.94  # AB magnitude of 1 count/s in F814W
EXPOSURE = 2028  # s
VARIANCE = 6.7e-6  # (counts/s)^2 of a pixel of sky
CORRELATED = 6.1  # sum of the noise correlation over the pixels: drizzling smooths
BRIGHT, FAINT = 18.0, 25.2  # F814W magnitude
FAINTEST = 24.3  # mean surface brightness inside the half-light radius, mag/arcsec^2
COUNTS_SLOPE = 0.31  # dlogN/dm
FAST = galsim.GSParams(folding_threshold=0.02, maxk_threshold=2e-3)
# Defocus and two astigmatisms of the four PSFs, in waves of 814 nm
PSF_ERRORS = (0, 0, 0.01), (0.02, 0.01, 0), (0.04, -0.02, 0.01), (0.05, 0.01, -0.02)
NAME = "real_galaxy_catalog_25.2"
IMAGES = "real_galaxy_images_25.2_n1.fits"
PSFS = "real_galaxy_PSF_images_25.2_n1.fits"
NOISE = "acs_I_unrot_sci_20_cf.fits"

CATALOGUE = np.dtype([
    ("IDENT", "i4"), ("RA", "f8"), ("DEC", "f8"), ("MAG", "f8"), ("BAND", "S5"),
    ("WEIGHT", "f8"), ("GAL_FILENAME", "S32"), ("PSF_FILENAME", "S36"),
    ("GAL_HDU", "i4"), ("PSF_HDU", "i4"), ("PIXEL_SCALE", "f8"), ("NOISE_MEAN", "f8"),
    ("NOISE_VARIANCE", "f8"), ("NOISE_FILENAME", "S26"), ("stamp_flux", "f8"),
])  # fmt: skip
PROFILES = np.dtype([
    ("IDENT", "i4"), ("mag_auto", "f8"), ("flux_radius", "f8"), ("zphot", "f8"),
    ("sersicfit", "f8", 8), ("bulgefit", "f8", 16), ("fit_status", "i4", 5),
    ("fit_mad_s", "f8"), ("fit_mad_b", "f8"), ("fit_dvc_btt", "f8"),
    ("use_bulgefit", "i4"), ("viable_sersic", "i4"), ("hlr", "f8", 3),
    ("flux", "f8", 4),
])  # fmt: skip


def _magnitudes(rng: np.random.Generator, n: int) -> np.ndarray:
    """Power-law counts by inversion of the cumulative N(<m) ~ 10^(0.31 m)."""
    low, high = 10 ** (COUNTS_SLOPE * np.array([BRIGHT, FAINT]))
    return np.log10(rng.uniform(low, high, n)) / COUNTS_SLOPE  # (galaxy,)


def _redshifts(rng: np.random.Generator, magnitude: np.ndarray) -> np.ndarray:
    """p(z | m) whose integral over m < i is z^2 exp(-z/z0), z0 = 0.0417 i - 0.744.

    Differentiating N(<i) p(z | <i) leaves two gamma distributions, of shape 3 and 4.
    """
    z0 = np.maximum(0.0417 * magnitude - 0.744, 0.05)  # the fit starts at i = 20.5
    share = 3 * 0.0417 / (COUNTS_SLOPE * np.log(10) * z0)
    shape = 3 + (rng.random(len(z0)) < share)
    return np.clip(z0 * rng.gamma(shape), 0.01, 4.0)


def _axis_ratios(rng: np.random.Generator, n: int, early: bool) -> np.ndarray:
    """b/a from the ellipticity priors of Miller et al. (2013), their appendix B2."""
    e = np.linspace(0, 0.804, 2001)
    if early:
        density = e * np.exp(-2.368 * e - 6.691 * e**2)
    else:
        cut = 1 - np.exp((e - 0.804) / 0.2539)
        density = e * cut / ((1 + e) * np.hypot(e, 0.0256))
    cumulative = np.cumsum(density)
    e = np.interp(rng.random(n), cumulative / cumulative[-1], e)
    return (1 - e) / (1 + e)


def _intensity(flux, radius, q, n):
    """Counts/s/pixel of a Sersic profile at its half-light ellipse."""
    b = gammaincinv(2 * n, 0.5)
    area = 2 * np.pi * n * np.exp(b) * b ** (-2 * n) * gamma(2 * n) * q * radius**2
    return flux / np.maximum(area, 1e-12)


def _population(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Profiles and late-type flag of n galaxies, drawn as `write_parametric` says."""
    mag = _magnitudes(rng, n)
    early = rng.random(n) < np.clip(0.10 + 0.08 * (24.5 - mag), 0.10, 0.40)
    double = rng.random(n) < np.clip(0.33 - 0.08 * (mag - 22.5), 0.10, 0.33)
    btt = np.where(early, rng.beta(5, 3, n), rng.beta(2, 4, n))  # bulge to total
    index = np.where(early, 3.6, 1.0) * np.exp(0.4 * rng.standard_normal(n))
    steeper = (1 + 4 * btt) * np.exp(0.2 * rng.standard_normal(n))
    index = np.clip(np.where(double, steeper, index), 0.3, 6.0)

    q_disc, q_bulge = _axis_ratios(rng, n, False), _axis_ratios(rng, n, True)
    mixed = btt * q_bulge + (1 - btt) * q_disc
    q = np.where(double, mixed, np.where(early, q_bulge, q_disc))
    angle = rng.uniform(-np.pi / 2, np.pi / 2, n)
    twist = 0.1 * rng.standard_normal(n)  # of the bulge relative to the disc, radian

    # An exponential disc has its half-light radius at 1.678 scale lengths.
    scale = np.exp(-1.145 - 0.269 * (mag - 23) + 0.4 * rng.standard_normal(n))
    major = np.clip(scale * np.where(early, 1.0, 1.678), 0.06, 5.0)  # arcsec
    ratio = np.clip(0.4 * np.exp(0.3 * rng.standard_normal(n)), 0.15, 1.0)
    major_disc = major / (1 - btt + btt * ratio)

    single = np.ones(n), major, index, q, angle
    bulge = btt, ratio * major_disc, np.full(n, 4.0), q_bulge, angle + twist
    disc = 1 - btt, major_disc, np.ones(n), q_disc, angle
    return _profiles(mag, _redshifts(rng, mag), double, single, bulge, disc), ~early


def _profiles(mag, redshift, double, single, bulge, disc) -> np.ndarray:
    """Rows of `PROFILES`; a component is flux share, major axis, index, b/a, angle."""
    flux = 10 ** (-0.4 * (mag - ZERO_POINT))  # counts/s
    table = np.zeros(len(mag), PROFILES)
    table["IDENT"] = np.arange(1, len(mag) + 1)
    table["mag_auto"], table["zphot"], table["use_bulgefit"] = mag, redshift, double
    table["viable_sersic"] = table["fit_status"] = 1
    table["fit_mad_s"] = table["fit_mad_b"] = 0.003
    table["fit_dvc_btt"] = double * bulge[0]
    for i, (share, major, _, q, _) in enumerate((single, bulge, disc)):
        used = np.where(i == 0, True, double)
        table["hlr"][:, i] = used * major * np.sqrt(q)  # circularised
        table["flux"][:, i] = used * share * flux
    table["flux"][:, 3] = double * flux
    table["flux_radius"] = np.hypot(table["hlr"][:, 0], 0.06) / PIXEL  # the PSF adds
    centre = np.clip(np.round(3.5 * table["hlr"][:, 0] / PIXEL) + 4, 24, 160)
    places = ("sersicfit", 0, single), ("bulgefit", 0, disc), ("bulgefit", 8, bulge)
    for name, start, (share, major, n, q, angle) in places:
        radius = major / PIXEL
        peak = _intensity(share * flux, radius, q, n)
        values = peak, radius, n, q, 0 * n, centre, centre, angle
        table[name][:, start : start + 8] = np.stack(values, axis=1)
    return table


def _catalogue(rng: np.random.Generator, profiles: np.ndarray) -> np.ndarray:
    table = np.zeros(len(profiles), CATALOGUE)
    table["IDENT"], table["MAG"] = profiles["IDENT"], profiles["mag_auto"]
    table["RA"] = rng.uniform(149.4, 150.8, len(table))  # the COSMOS field, degrees
    table["DEC"] = rng.uniform(1.5, 2.9, len(table))
    table["BAND"], table["WEIGHT"], table["PIXEL_SCALE"] = b"F814W", 1, PIXEL
    table["GAL_FILENAME"], table["PSF_FILENAME"] = IMAGES.encode(), PSFS.encode()
    table["NOISE_FILENAME"] = NOISE.encode()
    table["NOISE_VARIANCE"] = VARIANCE * np.exp(0.15 * rng.standard_normal(len(table)))
    table["stamp_flux"] = profiles["flux"][:, 0]
    return table


def _write(folder: Path, files: dict[str, fits.HDUList]) -> None:
    """Write all files beside their final names, then rename: all or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = {folder / f".{name}.part": folder / name for name in files}
    try:
        for path, hdus in zip(partial, files.values(), strict=True):
            with path.open("wb") as stream:
                hdus.writeto(stream)
        for path, final in partial.items():
            os.replace(path, final)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)


def _table(rows: np.ndarray) -> fits.HDUList:
    """FITS table of the rows, numbers rounded to 20 bits of mantissa.

    Processors differ in the last bit of exp and log; the files, and the digest of the
    catalogue, should not.
    """
    rows = rows.copy()
    for name in rows.dtype.names:
        if rows[name].dtype.kind == "f":
            mantissa, exponent = np.frexp(rows[name])
            rows[name] = np.ldexp(np.round(mantissa * 2**20), exponent - 20)
    return fits.HDUList([fits.PrimaryHDU(), fits.BinTableHDU(rows)])


def _images(arrays: list[np.ndarray]) -> fits.HDUList:
    return fits.HDUList([fits.PrimaryHDU(arrays[0]), *map(fits.ImageHDU, arrays[1:])])


def write_parametric(folder: Path, n_galaxies: int = 81_500, seed: int = 2021) -> None:
    """Write a synthetic catalogue of light profiles that galsim.COSMOSCatalog reads.

    Two files appear in `folder`, both or neither: real_galaxy_catalog_25.2.fits and
    its `_fits` twin. Fluxes are in counts/s of the HST (F814W, zero point 25.94),
    `hlr` in arcsec and circularised, `sersicfit` radii in pixels of 0.03" along the
    major axis, as in COSMOS. The same seed gives the same bytes.

    F814W magnitude, 18 to 25.2: N(<i) ~ 10^(0.31 i), LSST Science Book (2009,
    arXiv:0912.0201) eq. 3.7. Redshift: its section 3.7.2, differentiated in i.
    Major-axis size: ln(r/arcsec) = -1.145 - 0.269 (i - 23), Miller et al. (2013,
    MNRAS 429, 2858) appendix B, r being the scale length of a disc and the half-light
    radius of a bulge-dominated galaxy; log-normal about it with a scatter of 0.4,
    between the 0.3 and 0.5 that Shen et al. (2003, MNRAS 343, 978) find at fixed
    luminosity. Axis ratio: Miller et al. (2013), one law for discs, one for bulges.
    Early types: 10 per cent when faint, as in Miller et al. (2013), up to 40 per cent
    of the brightest. That rise, the log-normal Sersic index (median 1.0 for late types,
    3.6 for early ones, 0.3 to 6), and the share with bulge and disc (33 per cent to
    i = 22.5, 11 per cent at 25.2) are this book's choices, plausible for COSMOS.
    """
    rng = np.random.default_rng(seed)
    profiles, _ = _population(rng, n_galaxies)
    catalogue = _catalogue(rng, profiles)
    files = {f"{NAME}.fits": _table(catalogue), f"{NAME}_fits.fits": _table(profiles)}
    _write(Path(folder), files)


@cache
def _psfs() -> list[np.ndarray]:
    """Drizzled PSFs, pixel included, of unit sum: arrays (65, 65)."""
    blur = galsim.Convolve(galsim.Gaussian(sigma=0.03), galsim.Pixel(0.05))
    images = []
    for defocus, astig1, astig2 in PSF_ERRORS:
        optics = galsim.OpticalPSF(
            lam=814, diam=2.4, obscuration=0.33, nstruts=4, strut_thick=0.011,
            strut_angle=45 * galsim.degrees, defocus=defocus, astig1=astig1,
            astig2=astig2,
        )  # fmt: skip
        psf = galsim.Convolve(optics, blur)
        image = psf.drawImage(nx=65, ny=65, scale=PIXEL, method="no_pixel").array
        images.append(image / image.sum())
    return images


def _light(row: np.ndarray) -> list[galsim.GSObject]:
    """Single profile, or disc then bulge, as galsim.COSMOSCatalog builds them."""
    single = (row["sersicfit"], 0)
    disc, bulge = row["bulgefit"].reshape(2, 8)
    parts = ((disc, 2), (bulge, 1)) if row["use_bulgefit"] else (single,)
    profiles = []
    for (_, _, n, q, *_, angle), i in parts:
        n = np.round(n / 0.05) * 0.05  # GalSim tabulates each index once
        light = galsim.Sersic(n, half_light_radius=row["hlr"][i], flux=row["flux"][i])
        profiles.append(light.shear(q=q, beta=angle * galsim.radians))
    return profiles


def _structure(
    rng: np.random.Generator, fit: np.ndarray, disc: np.ndarray, strength: float
) -> np.ndarray:
    """What arms, lopsidedness, patches and knots add to a smooth disc, (y, x)."""
    radius, q, angle = fit[[1, 3, 7]]
    y, x = np.indices(disc.shape) - (len(disc) - 1) / 2
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    r, theta = np.hypot(u, v / q) / radius, np.arctan2(v / q, u)  # in the disc's plane
    outside = r**2 / (r**2 + 0.3)  # the nucleus stays smooth

    arms = rng.choice([1, 2, 3, 4], p=[0.1, 0.6, 0.2, 0.1])
    pitch = np.deg2rad(rng.uniform(10, 35)) * rng.choice([-1, 1])
    phase, side = rng.uniform(0, 2 * np.pi, 2)
    spiral = np.cos(arms * (theta - np.log(r + 0.05) / np.tan(pitch)) + phase)
    lopsided = np.minimum(0.25 * np.exp(0.6 * rng.standard_normal()) * r, 0.8)
    patches = gaussian_filter(rng.standard_normal(disc.shape), max(0.15 * radius, 1))
    pattern = spiral + lopsided * np.cos(theta - side) + 0.6 * patches / patches.std()
    structure = disc * np.expm1(strength * outside * pattern)

    light = np.ravel(outside * (disc + structure))
    n_knots = 1 + rng.poisson(25 * strength)
    where = rng.choice(light.size, n_knots, p=light / light.sum())
    bright = 1 / rng.uniform(0.06, 1, n_knots)  # dN/dL ~ L^-2
    knots = np.bincount(where, bright, light.size).reshape(disc.shape)
    knots = gaussian_filter(knots, np.clip(0.12 * radius, 0.8, 4))
    share = strength**2 * rng.uniform(0.05, 0.4)
    return structure + knots * share * disc.sum() / knots.sum()


def _noise(rng: np.random.Generator, correlation: np.ndarray, size: int) -> np.ndarray:
    """Noise of unit variance with the given correlation function: (size, size)."""
    wrapped, half = np.zeros((size, size)), len(correlation) // 2
    lags = np.arange(-half, half + 1) % size
    np.add.at(wrapped, (lags[:, None], lags), correlation)
    power = np.maximum(np.fft.fft2(wrapped).real, 0)
    power[0, 0] = 0  # the sky is subtracted around each galaxy
    white = np.fft.fft2(rng.standard_normal((size, size)))
    return np.fft.ifft2(white * np.sqrt(power * size**2 / power.sum())).real


def _observe(
    rng: np.random.Generator, row: np.ndarray, psf: np.ndarray, strength: float
) -> np.ndarray:
    """Noiseless stamp (y, x) of one galaxy, counts/s."""
    size = 2 * int(np.clip(3 * row["sersicfit"][1] + 5, 24, 160))
    draw = {"nx": size, "ny": size, "scale": PIXEL, "method": "no_pixel"}
    blur = galsim.InterpolatedImage(galsim.Image(psf, scale=PIXEL), flux=1)
    light = _light(row)
    seen = galsim.Convolve(galsim.Add(light), blur, gsparams=FAST)
    disc = light[0].drawImage(**draw).array.astype(float)
    fit = row["bulgefit"][:8] if row["use_bulgefit"] else row["sersicfit"]
    extra = _structure(rng, fit, disc, strength)
    image = seen.drawImage(**draw).array + fftconvolve(extra, psf, "same")
    return image * row["flux"][0] / (row["flux"][0] + extra.sum())


def write_stamps(
    folder: Path, n_galaxies: int = 4000, seed: int = 2022, noisy: bool = True
) -> None:
    """Write HST-like postage stamps that galsim.RealGalaxyCatalog reads.

    Five files appear in `folder`, all or none: the two of `write_parametric`, for the
    smooth part of the same galaxies, the stamps (float32, 48 to 320 pixels of 0.03", in
    counts/s), the PSFs, and GalSim's measured correlation of the COSMOS noise.
    `stamp_flux` is the sum of the stamp. The same seed gives the same bytes, and but
    for the noise the same galaxies whether `noisy` or not.

    Population: `write_parametric`'s, to a mean surface brightness of 24.3 mag/arcsec^2
    within the half-light radius, about the faintest of the COSMOS stamps we have seen.
    Irregularity, strong in late types: log-spiral arms of pitch 10 to 35 degrees (cf.
    Kennicutt 1981, AJ 86, 1847); lopsidedness with a median m = 1 amplitude near 0.11
    (Rudnick & Rix 1998, AJ 116, 1163); knots with dN/dL ~ L^-2 like H II regions
    (Kennicutt, Edgar & Hodge 1989, ApJ 337, 761); patches of our own choice.
    PSF: 2.4 m, 33 per cent obscuration, 814 nm, blurred to the 0.10" FWHM of the COSMOS
    images, at four focus positions (Rhodes et al. 2007, ApJS 172, 203). Noise: sky of
    6.7e-6 (counts/s)^2 and photons of 2028 s (Koekemoer et al. 2007, ApJS 172, 196).
    """
    rng = np.random.default_rng(seed)
    profiles, late = _population(rng, 4 * n_galaxies + 100)
    area = 2 * np.pi * profiles["hlr"][:, 0] ** 2
    brightness = profiles["mag_auto"] + 2.5 * np.log10(area)
    keep = np.flatnonzero(brightness < FAINTEST)[:n_galaxies]
    profiles = profiles[keep]
    profiles["IDENT"] = np.arange(1, n_galaxies + 1)
    strength = np.where(late[keep], 1.0, 0.15) * rng.beta(3, 2, n_galaxies)
    psfs = _psfs()
    catalogue = _catalogue(rng, profiles)
    catalogue["GAL_HDU"] = np.arange(n_galaxies)
    catalogue["PSF_HDU"] = rng.integers(len(psfs), size=n_galaxies)
    correlation = fits.getdata(Path(galsim.meta_data.share_dir) / NOISE).astype(float)

    stamps = []
    for i in tqdm(range(n_galaxies), "HST-like stamps"):
        image = _observe(rng, profiles[i], psfs[catalogue["PSF_HDU"][i]], strength[i])
        photons = np.maximum(image, 0) / (EXPOSURE * CORRELATED)
        sigma = np.sqrt(catalogue["NOISE_VARIANCE"][i] + photons)
        image += noisy * sigma * _noise(rng, correlation, len(image))
        catalogue["stamp_flux"][i] = image.sum()
        stamps.append(image.astype(np.float32))
    images = {IMAGES: stamps, PSFS: psfs, NOISE: [correlation]}
    tables = {f"{NAME}.fits": catalogue, f"{NAME}_fits.fits": profiles}
    files = {name: _images(arrays) for name, arrays in images.items()}
    _write(Path(folder), files | {name: _table(rows) for name, rows in tables.items()})
