"""Networks measured on test scenes: errors of each galaxy, and shear samples."""

from collections.abc import Iterator

import numpy as np
from astropy.table import Table, hstack, vstack
from tqdm import tqdm

from .catalogues import Catalogue
from .measurement import (
    Estimate,
    ellipticity_bias,
    errors,
    in_snr_range,
    measure,
)
from .simulation import Scenes, simulate
from .surveys import Survey
from .weights import Network

MEASURED = 250  # scenes in memory at a time
SHEARS = ((0.0, 0.0), (0.01, 0.0), (-0.01, 0.0), (0.0, 0.01), (0.0, -0.01))


def evaluate(network: Network, scenes: Scenes, isolated: bool = False) -> Table:
    """Measure shapes and magnitudes of outputs against targets (section 4.1).

    `isolated` passes the scenes through the VAE and not through the deblender. One row
    a scene: some columns of `scenes.truth`, those of `errors`, and `e1_in`, `e2_in`,
    `e_in`, `e1_out`, `e2_out`, `flag` and `reason` of the output. Few scenes are in
    memory at a time. A network of fewer bands sees the same pixels of those it has.

    Raises ValueError if the scenes lack one of its bands.
    """
    bands = scenes.survey.channels(network.survey)
    apply = network.reconstruct if isolated else network.deblend
    tables = [
        compare(apply(batch.noisy[..., bands]).image, batch, network.survey)
        for batch in _progress(scenes, network.survey)
    ]
    return vstack(tables, metadata_conflicts="silent")


def compare(images: np.ndarray, scenes: Scenes, survey: Survey) -> Table:
    """Measure images of the targets of scenes against the truth; as `evaluate`.

    `images` (scene, y, x, band) in electrons, of the bands of `survey`, which the
    scenes have too.
    """
    bands = scenes.survey.channels(survey)
    output = measure(images, survey)
    target = measure(scenes.target[..., bands], survey)
    truth = scenes.truth
    table = hstack([truth["r_mag", "snr", "z", "dmag"], errors(output, target)])
    for name in ("n_galaxies", "b_closest", "b_total", "dx", "dy"):
        table[name] = truth[name]
    for name in ("e1", "e2", "e"):
        table[f"{name}_in"], table[f"{name}_out"] = target[name], output[name]
    table["flag"], table["reason"] = output["flag"], output["reason"]
    return table


def ellipticity_pairs(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Input and output ellipticities of a table of `evaluate`, (scene, component)."""
    e_in = np.stack([table["e1_in"], table["e2_in"]], axis=1)
    return e_in, np.stack([table["e1_out"], table["e2_out"]], axis=1)


def slope(table: Table, rng: np.random.Generator | None = None) -> Estimate:
    """Slope minus one of output on input ellipticity, of a table of `evaluate`.

    The mean of both components, `alpha` of `ellipticity_bias`.
    """
    return ellipticity_bias(*ellipticity_pairs(table), rng)["alpha"]


def shear_samples(
    networks: dict[str, Network],
    catalogue: Catalogue,
    survey: Survey,
    n_scenes: int,
    seed: int = 1,
) -> dict[str, dict[tuple[float, float], Table]]:
    """Shapes in five samples of the same scenes under constant shear (section 4.3).

    Galaxies, positions, rotations and noise are the same under all SHEARS, those of the
    paper. Only targets of signal-to-noise ratio 10 to 3000 count, by their unsheared
    image, so that shear selects nothing. Returns, for each network by name and for
    `"target"`, the table of `measure` of each shear, as `shear_biases` takes them, with
    the true `r_mag` of each target.
    """
    plain = simulate(catalogue, survey, n_scenes, seed=seed)
    counted = np.flatnonzero(in_snr_range(plain.truth["snr"]))
    r_mag = plain.truth["r_mag"][counted]
    tables: dict[str, dict] = {"target": {}} | {name: {} for name in networks}
    for shear in SHEARS:
        sheared = simulate(catalogue, survey, n_scenes, seed=seed, shear=shear)
        sheared = sheared.take(counted)
        parts: dict[str, list[Table]] = {name: [] for name in tables}
        for batch in _progress(sheared, survey):
            parts["target"].append(measure(batch.target, survey))
            for name, network in networks.items():
                noisy = batch.noisy[..., survey.channels(network.survey)]
                image = network.deblend(noisy).image
                parts[name].append(measure(image, network.survey))
        for name in tables:
            tables[name][shear] = vstack(parts[name])
            tables[name][shear]["r_mag"] = r_mag
    return tables


def _progress(scenes: Scenes, survey: Survey) -> Iterator[Scenes]:
    total = -(-len(scenes) // MEASURED)
    label = f"measuring {survey.name}"
    yield from tqdm(scenes.batches(MEASURED), total=total, desc=label, leave=False)
