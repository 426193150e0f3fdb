"""Measure this book's library beside its peers: `make bench`.

Competitors take turns, so that what else the machine does meets them alike, and the
medians of several rounds are kept. Results go to build/metrics/bench.json, a section
at a time; sections can be named: `python benchmarks/bench.py simulation deblending`.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import galsim
import numpy as np
import speclite.filters
from astropy.table import Row

import deblender
from deblender import peers
from deblender.catalogues import cache_folder
from deblender.files import write_whole

ROOT = Path(__file__).resolve().parent.parent
CATSIM = Path(
    os.environ.get(
        "CATSIM_FILE", ROOT / "../shared/data/catsim/sample_input_catalog.fits"
    )
)
ROUNDS = 5


def in_turns(rounds: int = ROUNDS, **runs: Callable[[int], float]) -> dict[str, float]:
    """Median of what each run returns, when all of them run once a round.

    A run takes the number of its round, and returns things done per second.
    """
    rates = {name: [] for name in runs}
    for i in range(rounds):
        for name, run in runs.items():
            rates[name].append(run(i))
            print(
                f"  round {i + 1}, {name}: {rates[name][-1]:.4g} a second", flush=True
            )
    return {name: float(np.median(rate)) for name, rate in rates.items()}


def rate(n: int, work: Callable[[], object]) -> float:
    """How many of `n` things that `work` does are done in a second."""
    begin = time.perf_counter()
    work()
    return n / (time.perf_counter() - begin)


def draw(survey: str, n: int, seed: int) -> float:
    """Scenes of one to four galaxies that one process draws in a second."""
    galaxies, of = deblender.catalogue("synthetic"), deblender.survey(survey)
    return rate(
        n,
        lambda: deblender.simulate(galaxies, of, n, 4, seed=seed, processes=1).noisy,
    )


def simulation() -> dict:
    """Six LSST bands, one core, beside BlendingToolKit on CatSim galaxies."""
    import btk

    galaxies = btk.catalog.CatsimCatalog.from_file(str(CATSIM))
    sampling = btk.sampling_functions.DefaultSampling(
        stamp_size=12.8, max_number=4, max_shift=2.0, seed=1
    )
    blends = btk.draw_blends.CatsimGenerator(
        galaxies, sampling, btk.survey.get_surveys("LSST"), batch_size=50, seed=1
    )
    rates = in_turns(
        btk=lambda i: rate(50, lambda: next(blends)),
        book=lambda i: draw("lsst", 500, 1000 + i),
    )
    return rates | {"ratio": rates["book"] / rates["btk"]}


def chromatic() -> dict:
    """Ten bands and noise, one core, beside GalSim drawing each band of each galaxy."""
    of, galaxies = deblender.survey("lsst+euclid"), deblender.catalogue("synthetic")
    bandpasses = [_bandpass(band.passband) for band in of.bands]
    scenes = deblender.simulate(galaxies, of, 10, 4, seed=999)

    def band_by_band(_: int) -> None:
        noise = galsim.BaseDeviate(1)
        for scene in scenes.truth:
            members = _chromatic(galaxies.source, scene)
            for band, bandpass in zip(of.bands, bandpasses, strict=True):
                scale, psf = band.instrument.pixel_scale, band.instrument.psf
                image = galsim.ImageF(64, 64, scale=scale)
                for galaxy in members:
                    seen = galsim.Convolve(galaxy, psf)
                    seen.drawImage(bandpass, image=image, add_to_image=True)
                image.addNoise(galsim.PoissonNoise(noise, band.sky_electrons))

    rates = in_turns(
        3,
        galsim=lambda i: rate(len(scenes), lambda: band_by_band(i)),
        book=lambda i: draw("lsst+euclid", 200, 2000 + i),
    )
    return rates | {"ratio": rates["book"] / rates["galsim"]}


def _chromatic(source: galsim.COSMOSCatalog, scene: Row) -> list[galsim.GSObject]:
    """The galaxies of a scene in place, with their spectra."""
    placed = []
    for k in range(scene["n_galaxies"]):
        names = ("galaxy_id", "angle", "dx", "dy")
        if k:
            names = ("neighbour_id", *(f"neighbour_{name}" for name in names[1:]))
        row, angle, dx, dy = (scene[n][k - 1] if k else scene[n] for n in names)
        galaxy = source.makeGalaxy(int(row), chromatic=True)
        placed.append(galaxy.rotate(angle * galsim.radians).shift(dx, dy))
    return placed


def _bandpass(name: str) -> galsim.Bandpass:
    (curve,) = speclite.filters.load_filters(name)
    table = galsim.LookupTable(curve.wavelength, curve.response, interpolant="linear")
    return galsim.Bandpass(table, wave_type="Angstrom").withZeropoint("AB").thin(1e-3)


def training() -> dict:
    """Images a second: the paper's ten-band network with Keras's defaults, and ours.

    Both take 512 blends of the same scenes an epoch; `linear` is the second network.
    """
    import keras

    from deblender import linear, networks
    from deblender.batches import Batches, EncoderBatches
    from deblender.fitting import fit
    from deblender.normalisation import NoiseUnits, fit_normalisation

    of, galaxies = deblender.survey("lsst+euclid"), deblender.catalogue("synthetic")
    scenes = deblender.simulate(galaxies, of, 512, 4, seed=5, split="train")
    eq4, units = fit_normalisation(scenes), NoiseUnits(np.sqrt(of.sky))
    arrays = eq4.forward(scenes.noisy), np.maximum(eq4.forward(scenes.target), 0)
    plain = networks.vae(10, seed=1)
    plain.compile("adam", loss=networks.cross_entropy)
    ours = networks.vae(10, seed=1)
    keras.config.set_dtype_policy("mixed_bfloat16")
    decoder = linear.decoder(of)
    second = networks.side_by_side(linear.encoder(of, decoder))
    keras.config.set_dtype_policy("float32")
    project = linear.project(decoder)

    def code(stamps: np.ndarray) -> np.ndarray:
        return project(units.forward(stamps))

    few = Batches(scenes, eq4, seed=1)
    many = EncoderBatches(scenes, units, 64, 1, code=code)
    likelihood = networks.latent_likelihood
    return in_turns(
        3,
        keras=lambda i: rate(512, lambda: plain.fit(*arrays, 16, verbose=0)),
        paper=lambda i: rate(512, lambda: fit(ours, few)),
        linear=lambda i: rate(512, lambda: fit(second, many, loss=likelihood)),
    )


def deblending() -> dict:
    """Stamps a second from electrons to shapes and magnitudes, LSST.

    `network` is the bare `predict` of encoder and decoder, `deblend` that of the
    library, `book` the same with measurements.
    """
    of, galaxies = deblender.survey("lsst"), deblender.catalogue("synthetic")
    scenes = deblender.simulate(galaxies, of, 960, 4, seed=6)
    few, fewer = scenes.take(np.arange(200)), scenes.take(np.arange(4))
    net = deblender.load("lsst")
    noisy = scenes.noisy
    units = net.normalisation.forward(noisy)

    def bare() -> None:
        mean, _ = net.deblender.predict(units, batch_size=96, verbose=0)
        net.decoder.predict(mean, batch_size=96, verbose=0)

    def whole() -> None:
        deblender.measure(net.deblend(noisy).image, of)

    def sep() -> None:
        peers.score(peers.sep(few), few)

    def scarlet2() -> None:
        peers.score(peers.scarlet2(fewer, **peers.FITS["pixels"]), fewer)

    bare(), scarlet2()  # compiled before the clock starts
    rates = in_turns(
        3,
        network=lambda i: rate(len(scenes), bare),
        deblend=lambda i: rate(len(scenes), lambda: net.deblend(noisy)),
        book=lambda i: rate(len(scenes), whole),
        sep=lambda i: rate(len(few), sep),
        scarlet2=lambda i: rate(len(fewer), scarlet2),
    )
    of_network = rates["deblend"] / rates["network"]
    over = {f"over_{name}": rates["book"] / rates[name] for name in ("scarlet2", "sep")}
    return rates | over | {"of_network": of_network}


def memory() -> dict:
    """Largest resident memory (GB) while simulating and training on so many scenes."""
    peaks = {}
    for n in (1000, 10_000, 100_000):
        command = [sys.executable, __file__, "--peak", str(n)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[str(n)] = float(done.stdout.split()[-1])
        print(f"  {n} scenes: {peaks[str(n)]:.2f} GB", flush=True)
    return peaks


def peak(n: int) -> None:
    """Draw `n` LSST scenes, train on 2,000 of their blends, and print the peak."""
    from deblender import networks
    from deblender.batches import Batches
    from deblender.fitting import fit
    from deblender.normalisation import fit_normalisation

    galaxies, of = deblender.catalogue("synthetic"), deblender.survey("lsst")
    scenes = deblender.simulate(galaxies, of, n, 4, seed=7, split="train")
    eq4 = fit_normalisation(scenes.take(np.arange(1000)))
    fit(networks.vae(6, seed=1), Batches(scenes.take(np.arange(0, n, n // 500)), eq4))
    for batch in scenes.batches():
        batch.noisy.mean()
    usage = sum(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    print(usage / 1024**2)


SECTIONS = (simulation, chromatic, training, deblending, memory)


def main(names: list[str]) -> None:
    """Measure the named sections, or all, and keep what earlier runs measured."""
    known = {section.__name__: section for section in SECTIONS}
    if unknown := sorted(set(names) - known.keys()):
        sys.exit(f"unknown section {unknown}; accepted: {', '.join(known)}")
    file = ROOT / "build" / "metrics" / "bench.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(file.read_text()) if file.is_file() else {}
    results["machine"] = {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    } | {
        p: version(p)
        for p in ("blending_toolkit", "galsim", "keras", "scarlet2", "sep")
    }
    with tempfile.TemporaryDirectory() as cache:
        deblender.catalogue("synthetic")  # drawn before the clock starts
        for drawn in cache_folder().glob("synthetic-*"):
            (Path(cache) / drawn.name).symlink_to(drawn)
        os.environ["DEBLENDER_CACHE"] = cache  # so that every scene is drawn anew
        for name in names or known:
            print(name, flush=True)
            results[name] = known[name]()
            write_whole(file, json.dumps(results, indent=2).encode())
    print(f"results are in {file}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        peak(int(sys.argv[2]))
    else:
        main(sys.argv[1:])
