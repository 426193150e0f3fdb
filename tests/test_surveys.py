"""The surveys are those of the paper, and say what they do not know."""

from dataclasses import replace

import numpy as np
import pytest

from deblender import survey
from deblender.surveys import Survey


def test_bands_and_order():
    assert survey("lsst").band_names == tuple("ugrizy")
    assert survey("lsst+euclid").band_names == (*"ugrizy", "VIS", "Y", "J", "H")
    assert [i.name for i in survey("lsst+euclid").instruments] == [
        "LSST",
        "VIS",
        "NISP",
    ]


def test_every_band_is_a_channel_of_one_camera():
    ten = survey("lsst+euclid")
    found = {camera.name: ten.band_names[bands] for camera, bands in ten.cameras}
    assert found == {"LSST": tuple("ugrizy"), "VIS": ("VIS",), "NISP": tuple("YJH")}
    assert survey("lsst").cameras == [(ten.instruments[0], slice(0, 6))]


def test_bands_of_one_camera_have_to_stand_together():
    ten = survey("lsst+euclid")
    g, r, vis = (ten.bands[ten.index(name)] for name in ("g", "r", "VIS"))
    with pytest.raises(ValueError, match=r"g \(LSST\), VIS \(VIS\), r .*accepted"):
        Survey("mine", (g, vis, r))
    assert Survey("mine", (vis, g, r)).cameras[1] == (g.instrument, slice(1, 3))


def test_names_of_a_survey_say_what_they_are_of():
    g, r = survey("lsst").bands[1:3]
    blurred = replace(g, instrument=replace(g.instrument, psf_fwhm=1.5))
    with pytest.raises(ValueError, match="instruments LSST, LSST; accepted: each of a"):
        Survey("mine", (blurred, r))
    with pytest.raises(ValueError, match="bands r, r; accepted: each of a name"):
        Survey("mine", (r, r))
    with pytest.raises(ValueError, match="model 'gaussian'; accepted: kolmogorov, mof"):
        replace(g.instrument, psf_model="gaussian")


def test_one_camera_is_asked_for_where_pixels_have_to_be_of_one_size():
    survey("lsst").check_one_camera()
    with pytest.raises(ValueError, match="of cameras LSST, VIS, NISP; accepted"):
        survey("lsst+euclid").check_one_camera()


@pytest.mark.parametrize("name", survey("lsst+euclid").band_names)
def test_magnitude_inverts_electrons(name):
    ten = survey("lsst+euclid")
    band = ten.bands[ten.index(name)]
    assert band.magnitude(band.electrons(24.3)) == pytest.approx(24.3)
    # A source as bright as the zero point gives one electron a second.
    assert band.electrons(band.zero_point) == pytest.approx(band.exposure)


def test_sky_of_the_r_band():
    # 184 x 15 s, 21.20 mag/arcsec^2, 0.2" pixels: by hand.
    by_hand = 184 * 15 * 10 ** (-0.4 * (21.20 - 28.13)) * 0.2**2
    assert survey("lsst").sky[2] == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("instrument", survey("lsst+euclid").instruments)
def test_psf_has_its_fwhm(instrument):
    assert instrument.psf.calculateFWHM() == pytest.approx(
        instrument.psf_fwhm, rel=0.02
    )


def test_magnitude_of_nothing_is_nan():
    assert np.isnan(survey("lsst").reference.magnitude(-1.0))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown survey 'des'; accepted: lsst"):
        survey("des")
    with pytest.raises(ValueError, match="unknown lsst band 'VIS'; accepted: u, g"):
        survey("lsst").index("VIS")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 64, 64, 10)), r"accepts \(scene, 64, 64, 6\)"),
        (np.zeros((64, 64, 6)), r"have shape \(64, 64, 6\)"),
        (np.full((3, 64, 64, 6), np.nan), "3 scenes hold NaN"),
    ],
)
def test_bad_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        survey("lsst").check_images(images)
