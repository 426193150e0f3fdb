"""The synthetic catalogues against the COSMOS schema, GalSim and their references."""

import hashlib
from pathlib import Path

import galsim
import numpy as np
import pytest
from astropy.io import fits

from deblender import synthetic

MAIN, TWIN = "real_galaxy_catalog_25.2.fits", "real_galaxy_catalog_25.2_fits.fits"
PSF = galsim.Moffat(beta=2.5, fwhm=0.7)
MAIN_COLUMNS = {
    "IDENT": "J", "RA": "D", "DEC": "D", "MAG": "D", "BAND": "5A", "WEIGHT": "D",
    "GAL_FILENAME": "32A", "PSF_FILENAME": "36A", "GAL_HDU": "J", "PSF_HDU": "J",
    "PIXEL_SCALE": "D", "NOISE_MEAN": "D", "NOISE_VARIANCE": "D",
    "NOISE_FILENAME": "26A", "stamp_flux": "D",
}  # fmt: skip
TWIN_COLUMNS = {
    "IDENT": "J", "mag_auto": "D", "flux_radius": "D", "zphot": "D", "sersicfit": "8D",
    "bulgefit": "16D", "fit_status": "5J", "fit_mad_s": "D", "fit_mad_b": "D",
    "fit_dvc_btt": "D", "use_bulgefit": "J", "viable_sersic": "J", "hlr": "3D",
    "flux": "4D",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("parametric")
    synthetic.write_parametric(path)
    return path


@pytest.fixture(scope="module")
def rows(folder) -> np.ndarray:
    return fits.getdata(folder / TWIN)


@pytest.fixture(scope="module")
def stamps(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("stamps")
    synthetic.write_stamps(path, 60, seed=3)
    return path


def cosmos(folder: Path) -> galsim.COSMOSCatalog:
    options = {"use_real": False, "exclusion_level": "none"}
    return galsim.COSMOSCatalog(MAIN, dir=str(folder), **options)


def columns(path: Path) -> dict[str, str]:
    return {c.name: c.format for c in fits.getdata(path).columns}


def digests(folder: Path) -> dict[str, str]:
    files = sorted(folder.iterdir())
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.parametrize("kind", ["folder", "stamps"])
def test_schema(kind, request):
    path = request.getfixturevalue(kind)
    assert columns(path / MAIN) == MAIN_COLUMNS
    assert columns(path / TWIN) == TWIN_COLUMNS


def test_schema_is_that_of_cosmos(cosmos_folder):
    real = cosmos_folder / "real_galaxy_catalog_23.5_example.fits"
    assert columns(real) == MAIN_COLUMNS
    assert columns(real.with_stem(f"{real.stem}_fits")) == TWIN_COLUMNS


def test_galsim_draws_every_kind_of_row(folder, rows):
    catalogue = cosmos(folder)
    assert len(catalogue) == len(rows) == 81_500
    n = rows["sersicfit"][:, 2]
    single = rows["use_bulgefit"] == 0
    kinds = ~single, single & (n < 1.5), single & (n > 1.5) & (n < 3), single & (n > 3)
    chosen = np.concatenate([np.flatnonzero(kind)[:5] for kind in kinds])
    assert len(chosen) == 20
    for i, galaxy in zip(chosen, catalogue.makeGalaxy(chosen), strict=True):
        image = galsim.Convolve(galaxy, PSF).drawImage(nx=64, ny=64, scale=0.2)
        assert 0.5 * galaxy.flux < image.array.sum() < 1.01 * galaxy.flux
        assert catalogue.makeGalaxy(i, chromatic=True).redshift == rows["zphot"][i]


def test_flux_matches_the_magnitude(folder, rows):
    galaxies = cosmos(folder).makeGalaxy(np.arange(500))
    magnitude = 25.94 - 2.5 * np.log10([galaxy.flux for galaxy in galaxies])
    np.testing.assert_allclose(magnitude, rows["mag_auto"][:500], atol=0.01)
    np.testing.assert_array_equal(fits.getdata(folder / MAIN)["MAG"], rows["mag_auto"])


def test_fit_parameters_agree(rows):
    """hlr is the major axis, circularised; the intensity integrates to the flux."""
    intensity, radius, n, q = rows["sersicfit"][:, :4].T
    np.testing.assert_allclose(rows["hlr"][:, 0], 0.03 * radius * q**0.5, rtol=1e-5)
    for i in range(5):
        profile = galsim.Sersic(n[i], half_light_radius=radius[i] * q[i] ** 0.5)
        centre = profile.xValue(0, 0) / profile.xValue(radius[i] * q[i] ** 0.5, 0)
        peak = rows["flux"][i, 0] * profile.max_sb
        assert intensity[i] * centre == pytest.approx(peak, rel=1e-3)
    double = rows[rows["use_bulgefit"] == 1]
    total = double["flux"][:, 1] + double["flux"][:, 2]
    np.testing.assert_allclose(total, double["flux"][:, 3], rtol=1e-5)
    assert not rows["flux"][rows["use_bulgefit"] == 0, 1:].any()


def test_bytes_follow_the_seed(tmp_path):
    for name, seed in {"a": 1, "b": 1, "c": 2}.items():
        synthetic.write_parametric(tmp_path / name, 500, seed)
        synthetic.write_stamps(tmp_path / f"stamps-{name}", 3, seed)
    for kind in "", "stamps-":
        a, b, c = (digests(tmp_path / f"{kind}{name}") for name in "abc")
        assert a == b
        assert a[MAIN] != c[MAIN] and a[TWIN] != c[TWIN]


def test_counts_slope(rows):
    """LSST Science Book, eq. 3.7: dlogN/dm = 0.31."""
    counts, edges = np.histogram(rows["mag_auto"], np.arange(20, 25.3, 0.4))
    slope = np.polyfit(edges[:-1], np.log10(counts), 1, w=np.sqrt(counts))[0]
    assert slope == pytest.approx(0.31, abs=0.01)
    assert 18 <= rows["mag_auto"].min()
    assert rows["mag_auto"].max() == pytest.approx(25.2, abs=0.001)


def test_sizes_shrink_with_magnitude(rows):
    """Miller et al. (2013): ln(r_d / arcsec) = -1.145 - 0.269 (i - 23)."""
    bins = np.digitize(rows["mag_auto"], np.arange(20, 25.1))
    late = (rows["use_bulgefit"] == 0) & (rows["sersicfit"][:, 2] < 1.5)
    everyone = [np.median(rows["hlr"][bins == b, 0]) for b in range(1, 6)]
    assert (np.diff(everyone) < 0).all()
    scale = 0.03 * rows["sersicfit"][late, 1] / 1.678
    slope, intercept = np.polyfit(rows["mag_auto"][late] - 23, np.log(scale), 1)
    assert (slope, intercept) == pytest.approx((-0.269, -1.145), abs=0.03)


def test_redshifts_of_a_magnitude_limited_sample(rows):
    """LSST Science Book, section 3.7.2: z^2 exp(-z/z0), of mean 3 z0, for i < 25."""
    z = rows["zphot"][rows["mag_auto"] < 25]
    z0 = 0.0417 * 25 - 0.744
    assert z.mean() == pytest.approx(3 * z0, rel=0.02)
    assert np.median(z) == pytest.approx(2.674 * z0, rel=0.02)
    assert 0.01 <= rows["zphot"].min() and rows["zphot"].max() <= 4


def test_early_types_are_bright_concentrated_and_round(rows):
    single = rows[rows["use_bulgefit"] == 0]
    mag, (radius, n, q) = single["mag_auto"], single["sersicfit"].T[1:4]
    assert 0.3 <= n.min() and n.max() <= 6
    assert (n > 3)[mag < 22].mean() > 1.5 * (n > 3)[mag > 24.5].mean()
    faint = (mag > 24) & (mag < 24.5)
    assert np.median(radius[faint & (n > 3)]) < np.median(radius[faint & (n < 1.5)])
    assert np.median(q[n > 3]) > np.median(q[n < 1.5])
    assert 0.25 < (rows["use_bulgefit"][rows["mag_auto"] < 22.5]).mean() < 0.4


def test_real_galaxies_are_drawn(stamps):
    catalogue = galsim.RealGalaxyCatalog(MAIN, dir=str(stamps))
    assert len(catalogue) == 60
    for i in range(0, 60, 10):
        galaxy = galsim.Convolve(galsim.RealGalaxy(catalogue, index=i), PSF)
        image = galaxy.drawImage(nx=96, ny=96, scale=0.2)
        assert image.array.sum() == pytest.approx(catalogue.stamp_flux[i], rel=0.01)


def test_stamps(stamps):
    """Even sides, and a noise whose variance is that of the catalogue."""
    catalogue = galsim.RealGalaxyCatalog(MAIN, dir=str(stamps))
    ends = np.r_[:8, -8:0]
    ratios = []
    for i in range(len(catalogue)):
        image = catalogue.getGalImage(i).array
        assert image.shape[0] == image.shape[1] and image.shape[0] % 2 == 0
        assert 48 <= len(image) <= 320
        corners = image[np.ix_(ends, ends)]
        ratios.append(np.mean(corners**2) / catalogue.variance[i])
    assert np.median(ratios) == pytest.approx(1, abs=0.1)
    assert np.median(catalogue.variance) == pytest.approx(6.7e-6, rel=0.15)


def test_stamps_and_profiles_are_the_same_galaxies(stamps):
    rows, profiles = fits.getdata(stamps / TWIN), cosmos(stamps)
    catalogue = galsim.RealGalaxyCatalog(MAIN, dir=str(stamps))
    np.testing.assert_array_equal(rows["IDENT"], catalogue.cat["IDENT"])
    ratio = catalogue.stamp_flux / rows["flux"][:, 0]
    bright = rows["mag_auto"] < 24
    assert np.median(ratio[bright]) == pytest.approx(1, abs=0.05)
    for i in range(0, 60, 7):
        pair = galsim.Add(synthetic._light(rows[i])), profiles.makeGalaxy(i)
        seen = [galsim.Convolve(profile, PSF) for profile in pair]
        ours, theirs = (s.drawImage(nx=32, ny=32, scale=0.2).array for s in seen)
        limit = 1e-4 * rows["flux"][i, 0]
        np.testing.assert_allclose(ours, theirs, atol=limit)


def test_noise_has_the_correlation_asked_for():
    rng = np.random.default_rng(5)
    correlation = np.zeros((5, 5))
    correlation[2, 2], correlation[2, 1:4:2], correlation[1:4:2, 2] = 1, 0.2, 0.2
    noise = synthetic._noise(rng, correlation, 256)
    assert noise.mean() == pytest.approx(0, abs=1e-12)
    assert noise.var() == pytest.approx(1, abs=0.03)
    assert (noise * np.roll(noise, 1, axis=0)).mean() == pytest.approx(0.2, abs=0.02)
    assert (noise * np.roll(noise, 2, axis=1)).mean() == pytest.approx(0, abs=0.02)


def test_late_types_are_less_regular():
    disc = galsim.Exponential(half_light_radius=10)
    disc = disc.drawImage(nx=96, ny=96, scale=1).array
    fit = np.array([0, 10, 1, 1, 0, 48, 48, 0.0])
    power = [
        np.abs(synthetic._structure(np.random.default_rng(1), fit, disc, s)).sum()
        for s in (0.1, 0.5)
    ]
    assert 0 < power[0] < power[1] / 3


@pytest.mark.parametrize("write", [synthetic.write_parametric, synthetic.write_stamps])
def test_nothing_is_left_when_writing_fails(tmp_path, monkeypatch, write):
    written = fits.HDUList.writeto

    def full_disc(hdus, stream, *args, **kwargs):
        if "_fits.fits" in stream.name:
            stream.write(b"half a file")
            raise OSError("no space left on device")
        written(hdus, stream, *args, **kwargs)

    write(tmp_path, 3, seed=1)
    before = digests(tmp_path)
    monkeypatch.setattr(fits.HDUList, "writeto", full_disc)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path, 3, seed=2)
    assert digests(tmp_path) == before


def test_noiseless_stamps_are_of_the_same_galaxies(stamps, tmp_path):
    synthetic.write_stamps(tmp_path, 60, seed=3, noisy=False)
    noisy, clean = (
        galsim.RealGalaxyCatalog(MAIN, dir=str(path)) for path in (stamps, tmp_path)
    )
    ratios = []
    for i in range(60):
        noise = noisy.getGalImage(i).array - clean.getGalImage(i).array
        edge = np.r_[:8, -8:0]
        ratios.append(np.mean(noise[np.ix_(edge, edge)] ** 2) / noisy.variance[i])
        assert abs(noise.mean()) < 0.1 * noise.std()
    assert np.median(ratios) == pytest.approx(1, abs=0.1)
    np.testing.assert_array_equal(*(fits.getdata(p / TWIN) for p in (stamps, tmp_path)))
