"""Catalogues: magnitudes against GalSim's chromatic galaxies, disjoint splits."""

import galsim
import numpy as np
import pytest
from astropy.io import fits

import deblender
from deblender.catalogues import LIMITING_MAGNITUDE, _bandpass, cache_folder
from deblender.drawing import draw
from deblender.synthetic import write_stamps


def test_splits_are_disjoint_and_bright_enough(synthetic):
    lsst = deblender.survey("lsst")
    r_mag = synthetic.magnitudes(lsst)[:, lsst.index("r")]
    parts = {name: synthetic.split(name) for name in ("train", "validation", "test")}
    joined = np.concatenate(list(parts.values()))
    assert len(np.unique(joined)) == len(joined)
    assert set(joined) == set(np.flatnonzero(r_mag < LIMITING_MAGNITUDE))
    np.testing.assert_array_equal(synthetic.split("all"), np.sort(joined))
    assert 4900 < len(parts["test"]) <= 5000 < len(parts["validation"])


def test_fits_and_images_of_one_sample_share_their_splits(tmp_path):
    write_stamps(tmp_path, n_galaxies=60, seed=4)
    with fits.open(tmp_path / "real_galaxy_catalog_25.2_fits.fits", "update") as tables:
        tables[1].data["fit_status"][[3, 20]] = 0  # failed, of both kinds
    (tmp_path / "real_galaxy_catalog_25.2_selection.fits").touch()
    fitted, imaged = (
        deblender.catalogue(tmp_path, real=real) for real in (False, True)
    )
    assert (len(fitted), len(imaged)) == (58, 60)
    for name in ("train", "validation", "test"):
        known = fitted.rows[fitted.split(name)]
        assert len(known) and set(known) <= set(imaged.rows[imaged.split(name)])


def test_magnitudes_are_those_of_the_chromatic_galaxy(synthetic):
    # GalSim's are per HST area, the same offset in every band: compare colours.
    survey = deblender.survey("lsst+euclid")
    ours = synthetic.magnitudes(survey)
    both = np.flatnonzero(synthetic.source.param_cat["use_bulgefit"])
    for index in [0, 1, 2, both[0], both[1]]:
        galaxy = synthetic.source.makeGalaxy(int(index), chromatic=True)
        detection = galaxy.calculateMagnitude(_bandpass("F814W"))
        for name in ("g", "r", "VIS", "H"):
            column = survey.index(name)
            band = _bandpass(survey.bands[column].passband)
            theirs = galaxy.calculateMagnitude(band) - detection
            colour = ours[index, column] - synthetic.f814w[index]
            assert colour == pytest.approx(theirs, abs=0.03), (index, name)


def test_profile_has_unit_flux(synthetic):
    assert synthetic.profile(3).flux == pytest.approx(1)


def test_real_rows_are_read(cosmos_folder):
    fitted = deblender.catalogue(cosmos_folder)
    stamps = deblender.catalogue(cosmos_folder, real=True)
    assert len(fitted) == len(stamps) == 60
    assert stamps.profile(0).flux == pytest.approx(1)
    assert np.isfinite(stamps.magnitudes(deblender.survey("lsst"))).all()


@pytest.mark.parametrize("row", [0, 7, 31])
def test_real_galaxies_draw_as_those_of_galsim(cosmos_folder, row):
    _assert_drawn_as_by_galsim(deblender.catalogue(cosmos_folder, real=True), row)


@pytest.mark.parametrize("row", [0, 7, 19])
def test_synthetic_stamps_draw_as_galaxies_of_galsim(tmp_path, row):
    write_stamps(tmp_path, n_galaxies=20, seed=4)
    _assert_drawn_as_by_galsim(deblender.catalogue(tmp_path, real=True), row)


def _assert_drawn_as_by_galsim(stamps, row):
    theirs = galsim.RealGalaxy(stamps.source, index=row, flux=1.0)
    instruments = deblender.survey("lsst+euclid").instruments
    for image, expected in zip(
        draw([stamps.profile(row).rotate(0.4 * galsim.radians)], instruments),
        draw([theirs.rotate(0.4 * galsim.radians)], instruments),
        strict=True,
    ):
        np.testing.assert_allclose(image, expected, atol=1e-6 * expected.max())


def test_an_empty_variable_moves_no_cache(monkeypatch):
    monkeypatch.delenv("DEBLENDER_CACHE", raising=False)
    usual = cache_folder()
    monkeypatch.setenv("DEBLENDER_CACHE", "")
    assert cache_folder() == usual


def test_missing_catalogue_says_how_to_get_it(tmp_path):
    with pytest.raises(ValueError, match="galsim_download_cosmos"):
        deblender.catalogue(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_images_without_a_table_of_fits_are_no_catalogue(tmp_path):
    stamps = tmp_path / "stamps"
    write_stamps(stamps, 4)
    for file in stamps.glob("*_fits.fits"):
        file.unlink()
    with pytest.raises(ValueError, match="galsim_download_cosmos"):
        deblender.catalogue(str(stamps), real=True)


def test_unknown_split_is_refused(synthetic):
    with pytest.raises(ValueError, match="unknown split 'dev'; accepted: train"):
        synthetic.split("dev")
