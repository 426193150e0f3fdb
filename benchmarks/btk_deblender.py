"""This book's deblender as a deblender of BlendingToolKit, for its metrics.

survey = btk_survey(deblender.survey("lsst"))
blends = next(CatsimGenerator(catalogue, sampling, survey, ...))
answers = NetworkDeblender(max_n_sources=4)(blends)
"""

import btk
import numpy as np
from astropy import units as u
from btk.blend_batch import BlendBatch, DeblendExample

import deblender

SIZE = deblender.surveys.STAMP_SIZE


def btk_survey(survey: deblender.Survey) -> btk.survey.Survey:
    """BTK's survey of the same name with the bands, noise and PSF of one of ours.

    A network knows the noise and the PSF of its training, and BTK's are others.
    """
    camera = survey.reference.instrument
    found = btk.survey.get_surveys(camera.name)
    found.pixel_scale = camera.pixel_scale * u.arcsec
    found.available_filters = list(survey.band_names)
    for band in survey.bands:
        filter = found.get_filter(band.name)
        filter.psf = band.instrument.psf
        filter.zeropoint = band.zero_point * u.mag
        filter.sky_brightness = band.sky * u.mag / u.arcsec**2
        filter.full_exposure_time = band.exposure * u.s
    return found


class NetworkDeblender(btk.deblend.Deblender):
    """Deblend every galaxy of a blend, one stamp around each, its place given.

    Places are those of the catalogue of the blend. The network was trained on targets
    that are the brightest of their blend; of the others, expect less.
    """

    def __init__(self, max_n_sources: int, network: str = "lsst-pixel") -> None:
        super().__init__(max_n_sources)
        self.network = deblender.load(network)

    def deblend(self, ii: int, blend_batch: BlendBatch) -> DeblendExample:
        """Images of the galaxies of blend `ii`, in the order of its catalogue."""
        catalogue = blend_batch.catalog_list[ii]
        blend = np.moveaxis(blend_batch.blend_images[ii], 0, -1)  # (y, x, band)
        size, n_bands = blend.shape[0], blend.shape[-1]
        around = np.pad(blend, [(SIZE, SIZE), (SIZE, SIZE), (0, 0)])
        # The corner that puts the galaxy within half a pixel of the middle of a stamp.
        places = np.stack([catalogue["y_peak"], catalogue["x_peak"]], axis=-1)
        corners = np.rint(places - (SIZE - 1) / 2).astype(int) + SIZE  # (galaxy, yx)
        cuts = [np.s_[y : y + SIZE, x : x + SIZE] for y, x in corners]
        stamps = self.network.deblend(np.stack([around[cut] for cut in cuts])).image
        images = np.zeros((self.max_n_sources, n_bands, size, size))
        for image, cut, stamp in zip(images, cuts, stamps, strict=False):
            canvas = np.zeros_like(around)
            canvas[cut] = stamp
            image[:] = np.moveaxis(canvas[SIZE:-SIZE, SIZE:-SIZE], -1, 0)
        return DeblendExample(
            self.max_n_sources, catalogue, n_bands, size, deblended_images=images
        )
