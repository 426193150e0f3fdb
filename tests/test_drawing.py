"""Images drawn in Fourier space against those of GalSim."""

from dataclasses import replace

import galsim
import numpy as np
import pytest
from scipy.special import erf

import deblender
from deblender.drawing import CURVE_STEP, SIDES, _sersic, draw

INSTRUMENTS = deblender.survey("lsst+euclid").instruments
# GalSim drops waves beyond the `maxk` of a profile. Through the pixels of NISP, wider
# than its PSF, this costs smooth discs up to 3e-3 of their peak; smaller pixels, added
# up, keep those waves.
FINER = {"LSST": 1, "VIS": 1, "NISP": 5}


def _drawn_by_galsim(profile, instrument):
    """An image at GalSim's default accuracy, of pixels that are sums of finer ones."""
    finer = FINER[instrument.name]
    seen = galsim.Convolve(profile, instrument.psf)
    image = seen.drawImage(
        nx=64 * finer, ny=64 * finer, scale=instrument.pixel_scale / finer, dtype=float
    )
    return image.array.reshape(64, finer, 64, finer).sum(axis=(1, 3))  # (y, x)


@pytest.mark.parametrize("instrument", INSTRUMENTS, ids=lambda i: i.name)
def test_images_are_those_of_galsim(synthetic, instrument):
    """1,000 galaxies of all sizes and Sersic indices: 1e-3 of the peak and the flux."""
    rng = np.random.default_rng(7)
    profiles = [
        synthetic.profile(row)
        .rotate(rng.uniform(0, 2 * np.pi) * galsim.radians)
        .shift(*rng.uniform(-1.4, 1.4, 2))
        for row in rng.choice(len(synthetic), 1000, replace=False)
    ]
    (ours,) = draw(profiles, [instrument])
    exact = np.array([_drawn_by_galsim(p, instrument) for p in profiles])
    peak, flux = exact.max(axis=(1, 2)), exact.sum(axis=(1, 2))
    assert (np.abs(ours - exact).max(axis=(1, 2)) / peak).max() < 1e-3
    assert np.abs(ours.sum(axis=(1, 2), dtype=float) / flux - 1).max() < 1e-3


@pytest.mark.parametrize("index", [0.3, 0.5, 1, 1.4, 2.5, 4, 6.2])
def test_the_transform_of_a_sersic_profile_is_that_of_galsim(index):
    steps = np.array([0, 1, 10, 100, 300, 1000, 2048, 4000, 8000, 16_000, 40_000])
    k = (CURVE_STEP * (steps + 0.5)) ** 2  # 1 / half-light radius
    profile = galsim.Sersic(index, half_light_radius=1)
    exact = [profile.kValue(x, 0).real for x in k]
    np.testing.assert_allclose(_sersic(index)[steps], exact, atol=3e-5)


@pytest.mark.parametrize("instrument", INSTRUMENTS, ids=lambda i: i.name)
def test_other_profiles_are_drawn_too(instrument):
    """Those without a table, turned, sheared and moved, in a sum with a Sersic one."""
    clump = galsim.Gaussian(sigma=0.4, flux=2).shear(g1=0.3, g2=-0.2).shift(0.5, -0.8)
    disc = galsim.Exponential(half_light_radius=0.6).shear(g1=-0.4, g2=0.1)
    galaxy = galsim.Sum(clump, disc).rotate(0.7 * galsim.radians).shift(-0.3, 0.2)
    ((ours,),) = draw([galaxy], [instrument])
    exact = _drawn_by_galsim(galaxy, instrument)
    np.testing.assert_allclose(ours, exact, atol=1e-3 * exact.max())


@pytest.mark.parametrize("kind", [galsim.Exponential, galsim.Gaussian])
@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.dilate(1.3),
        lambda p: p.expand(1.3),
        lambda p: p.magnify(0.8),
        lambda p: p.lens(0.1, -0.05, 1.2).shift(0.2, 0.1),
        lambda p: galsim.Sum(p.dilate(0.7), 2 * p).expand(1.1) * 3,
    ],
)
def test_changes_of_size_keep_or_change_the_flux_as_in_galsim(kind, change):
    profile = change(kind(half_light_radius=0.5, flux=2.0))
    ((ours,),) = draw([profile], INSTRUMENTS[:1])
    exact = _drawn_by_galsim(profile, INSTRUMENTS[0])
    np.testing.assert_allclose(ours, exact, atol=1e-3 * exact.max())


@pytest.mark.parametrize("instrument", INSTRUMENTS, ids=lambda i: i.name)
def test_a_gaussian_is_that_of_the_formula(instrument):
    """Through a PSF much smaller than a pixel: differences of error functions."""
    scale, (dx, dy) = instrument.pixel_scale, (0.3, -0.7)
    sigma, sharp = 4 * scale, replace(instrument, psf_fwhm=0.01 * scale)
    ((image,),) = draw([galsim.Gaussian(sigma=sigma).shift(dx, dy)], [sharp])
    edges = (np.arange(65) - 32) * scale  # arcsec
    x, y = (np.diff(erf((edges - d) / np.sqrt(2) / sigma)) / 2 for d in (dx, dy))
    exact = np.outer(y, x)
    np.testing.assert_allclose(image, exact, atol=1e-3 * exact.max())


@pytest.mark.parametrize("instrument", INSTRUMENTS, ids=lambda i: i.name)
@pytest.mark.parametrize("radius", [0.2, 0.8])
@pytest.mark.parametrize("place", [(0.9, -0.9), (-0.95, 0.3), (1.1, 0), (0.2, -4)])
def test_a_galaxy_at_the_edge_is_cut_there(instrument, radius, place):
    """Wherever its patch lies, in half sides of the image, no light is out of place."""
    galaxy = galsim.Exponential(half_light_radius=radius).shear(g1=0.3, g2=0.2)
    half = 32 * instrument.pixel_scale
    galaxy = galaxy.shift(half * place[0], half * place[1])
    ((ours,),) = draw([galaxy], [instrument])
    exact = _drawn_by_galsim(galaxy, instrument)
    ((whole,),) = draw([galsim.Exponential(half_light_radius=radius)], [instrument])
    np.testing.assert_allclose(ours, exact, atol=1e-3 * whole.max())


def test_a_galaxy_wider_than_every_grid_is_drawn_on_the_largest():
    wide = galsim.Exponential(half_light_radius=60.0)
    ((image,),) = draw([wide], INSTRUMENTS[:1])
    assert np.isfinite(image).all()
    assert 0 < image.sum() < 0.1 and max(SIDES) * INSTRUMENTS[0].pixel_scale < 200


def test_light_adds_up():
    """The sum of two profiles gives the sum of their images, to rounding."""
    pair = [
        galsim.Exponential(half_light_radius=r, flux=f) for r, f in ((0.5, 2), (1, 3))
    ]
    pair = [p.shift(x, 0.3) for p, x in zip(pair, (-0.8, 0.9), strict=True)]
    ((both,),) = draw([galsim.Sum(pair)], INSTRUMENTS[:1], size=128)
    apart = draw(pair, INSTRUMENTS[:1], size=128)[0].sum(axis=0)
    np.testing.assert_allclose(both, apart, atol=1e-4 * both.max())
