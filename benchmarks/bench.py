"""Measure this book's library beside its peers: `make bench`.

Competitors take turns, so that what else the machine does meets them alike, and the
medians of several rounds are kept. Results go to build/metrics/bench.json, a section
at a time; sections can be named: `python benchmarks/bench.py simulation deblending`.
"""

import cProfile
import datetime
import json
import os
import platform
import pstats
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from unittest import mock

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import galsim
import numpy as np
import psutil
import speclite.filters
from astropy.table import Row
from threadpoolctl import threadpool_limits

import deblender
from deblender import peers
from deblender.catalogues import cache_folder
from deblender.files import write_whole
from deblender.weights import PIECE

ROOT = Path(__file__).resolve().parent.parent
CATSIM = Path(
    os.environ.get(
        "CATSIM_FILE", ROOT / "../shared/data/catsim/sample_input_catalog.fits"
    )
)
ROUNDS = 5
# Steps of a simulation as its functions are called.
STEPS = (
    "arrange",
    "_profiles",
    "draw",
    "_truth",
    "_keep_chunk",
    "compose",
    "add_noise",
)


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


@contextmanager
def one_core() -> Iterator[None]:
    """Keep what runs inside on one core, libraries of linear algebra included."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with threadpool_limits(1):
            yield
    finally:
        os.sched_setaffinity(0, cores)


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
    with one_core():
        next(blends), draw("lsst", 500, 999)  # makes tables of transforms
        rates = in_turns(
            btk=lambda i: rate(50, lambda: next(blends)),
            book=lambda i: draw("lsst", 1000, 1000 + i),
        )
    return rates | {"ratio": rates["book"] / rates["btk"]}


def chromatic() -> dict:
    """Ten bands and noise, one core, beside GalSim drawing each band of each galaxy."""
    of, galaxies = deblender.survey("lsst+euclid"), deblender.catalogue("synthetic")
    bandpasses = [_bandpass(band.passband) for band in of.bands]
    scenes = deblender.simulate(galaxies, of, 20, 4, seed=999)

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

    with one_core():
        band_by_band(0), draw("lsst+euclid", 500, 1999)  # makes tables of transforms
        rates = in_turns(
            galsim=lambda i: rate(len(scenes), lambda: band_by_band(i)),
            book=lambda i: draw("lsst+euclid", 500, 2000 + i),
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


def profile() -> dict:
    """Milliseconds a ten-band scene spends in each step of a simulation, one core.

    The clock of the profiler makes all of them longer, calls of small functions most.
    """
    of, galaxies = deblender.survey("lsst+euclid"), deblender.catalogue("synthetic")
    n = 400
    deblender.simulate(galaxies, of, n, 4, seed=3000, processes=1)  # makes tables
    clock = cProfile.Profile()
    with one_core(), clock:
        deblender.simulate(galaxies, of, n, 4, seed=3001, processes=1).noisy  # noqa: B018
    spent: dict[str, float] = {}
    for (file, _, function), (*_, seconds, _) in pstats.Stats(clock).stats.items():
        if Path(file).parent == Path(deblender.__file__).parent:
            spent[function] = spent.get(function, 0) + 1000 * seconds / n
    whole = spent["simulate"] + spent["noisy"]
    return {"whole": whole} | {step: spent[step] for step in STEPS}


def scaling() -> dict:
    """Scenes drawn and stamps deblended a second, by number of processes, six bands.

    `cores` are joblib's processes, `dask` the workers of a cluster on this machine.
    """
    from distributed import Client, LocalCluster

    of, galaxies = deblender.survey("lsst"), deblender.catalogue("synthetic")
    net, n = deblender.load("lsst"), 2000
    n_stamps = 4 * PIECE * os.cpu_count()  # some pieces for each worker
    noisy = deblender.simulate(galaxies, of, n_stamps, 4, seed=4000).noisy
    found = []
    for k in [2**i for i in range(os.cpu_count().bit_length())]:
        deblender.simulate(galaxies, of, 200, seed=4000 + k, processes=k)  # warms up
        cores = rate(
            n,
            lambda k=k: deblender.simulate(galaxies, of, n, seed=4100 + k, processes=k),
        )
        options = {"n_workers": k, "threads_per_worker": 1, "dashboard_address": None}
        with LocalCluster(**options) as cluster, Client(cluster) as client:
            client.run(_warm_up)
            deblender.simulate(galaxies, of, 200, seed=4200 + k, client=client)
            rates = {
                "workers": k,
                "cores": cores,
                "dask": rate(
                    n,
                    lambda k=k, client=client: deblender.simulate(
                        galaxies, of, n, seed=4300 + k, client=client
                    ),
                ),
                "dask_deblend": rate(
                    n_stamps, lambda client=client: net.deblend(noisy, client=client)
                ),
            }
        print(f"  {rates}", flush=True)
        found.append(rates)
    return {"runs": found}


def _warm_up() -> None:
    """Deblend a few stamps, which imports and compiles; for each Dask worker."""
    net = deblender.load("lsst")
    net.deblend(np.zeros((1, *net.survey.shape)))


def training() -> dict:
    """Images a second: the paper's ten-band network with Keras's defaults, and ours.

    `keras` takes fixed blends, the others draw them with fresh noise; `*_100` take them
    in batches of 100, not of 16. `linear` is the second network. `loss_*`
    are validation losses of the paper's network after as many images, from the same
    weights and batches, with products in full and in half precision.
    """
    import keras

    from deblender import linear, networks
    from deblender.batches import Batches, EncoderBatches
    from deblender.fitting import fit
    from deblender.normalisation import NoiseUnits, fit_normalisation

    of, galaxies = deblender.survey("lsst+euclid"), deblender.catalogue("synthetic")
    scenes = deblender.simulate(galaxies, of, 1024, 4, seed=5, split="train")
    watched = deblender.simulate(galaxies, of, 512, 4, seed=5, split="validation")
    eq4, units = fit_normalisation(scenes), NoiseUnits(np.sqrt(of.sky))
    arrays = eq4.forward(scenes.noisy), np.maximum(eq4.forward(scenes.target), 0)
    with mock.patch.object(networks, "PReLU", keras.layers.PReLU):
        plain = networks.vae(10, seed=1)
    plain.compile("adam", loss=networks.cross_entropy)
    full = networks.vae(10, seed=1)
    keras.config.set_dtype_policy("mixed_bfloat16")
    half = networks.vae(10, seed=1)
    decoder = linear.decoder(of)
    second = networks.side_by_side(linear.encoder(of, decoder))
    keras.config.set_dtype_policy("float32")
    code = linear.Code(decoder, units)

    def few(batch_size: int = 16) -> Batches:
        return Batches(scenes, eq4, batch_size, seed=1)

    many = EncoderBatches(scenes, units, 64, 1, code=code)

    def steady(train: Callable[[Callable], object]) -> float:
        """Images a second in the second of two epochs, when all is compiled.

        `train` takes what is to be called as an epoch ends.
        """
        ends: list[float] = []
        train(lambda *_: ends.append(time.perf_counter()) or {})
        return len(scenes) / (ends[1] - ends[0])

    def by_keras(batch_size: int) -> float:
        def train(end: Callable) -> None:
            ends = [keras.callbacks.LambdaCallback(on_epoch_end=end)]
            plain.fit(*arrays, batch_size, epochs=2, verbose=0, callbacks=ends)

        return steady(train)

    def by_us(
        model: keras.Model, batches: Batches, loss: Callable = networks.cross_entropy
    ) -> float:
        return steady(lambda end: fit(model, batches, epochs=2, loss=loss, watch=end))

    rates = in_turns(
        3,
        keras=lambda i: by_keras(16),
        full=lambda i: by_us(full, few()),
        half=lambda i: by_us(half, few()),
        linear=lambda i: by_us(second, many, networks.latent_likelihood),
        keras_100=lambda i: by_keras(100),
        half_100=lambda i: by_us(half, few(100)),
    )
    validation = Batches(watched, eq4, seed=1, augment=False)
    for name, model in {"full": full, "half": half}.items():
        fit(model, few(), epochs=3)
        rates[f"loss_{name}"] = float(model.evaluate(validation, verbose=0))
    return rates | {
        "ratio": rates["half"] / rates["keras"],
        "ratio_100": rates["half_100"] / rates["keras_100"],
    }


def deblending() -> dict:
    """Stamps a second from electrons to shapes and magnitudes, LSST.

    `compiling` is scarlet2's share of a fit that goes by before the second step.
    `network` is the bare `predict` of encoder and decoder, `deblend` that of the
    library, `book` the same with measurements, as peers have them. `scarlet2` fits
    Sersic profiles until they settle, and `scarlet2_*` the other morphologies; what it
    compiles anew for scenes counts.
    """
    of, galaxies = deblender.survey("lsst"), deblender.catalogue("synthetic")
    scenes = deblender.simulate(galaxies, of, 960, 4, seed=6)
    few, fewer = scenes.take(np.arange(200)), scenes.take(np.arange(8))
    net = deblender.load("lsst")
    noisy = scenes.noisy
    units = net.normalisation.forward(noisy)

    def bare() -> None:
        mean, _ = net.deblender.predict(units, batch_size=96, verbose=0)
        net.decoder.predict(mean, batch_size=96, verbose=0)

    def whole() -> None:
        deblender.measure(net.deblend(noisy).image, of)

    def fitted(morphology: str) -> float:
        return peer(peers.scarlet2(fewer, morphology, **peers.FITS[morphology]))

    def compiled() -> float:
        """Share of the time of a fit of Sersic profiles that its first step takes."""
        fits = peers.FITS["sersic"]
        first, whole = (
            peers.scarlet2(fewer, "sersic", **fits | {"steps": steps}).seconds.sum()
            for steps in (1, fits["steps"])
        )
        return first / whole

    def peer(answer: peers.Answer) -> float:
        images = np.nan_to_num(answer.images)
        measuring = len(images) / rate(
            len(images), lambda: deblender.measure(images, of)
        )
        return len(images) / (answer.seconds.sum() + measuring)

    bare(), net.deblend(noisy[:96])  # compiles
    rates = in_turns(
        3,
        network=lambda i: rate(len(scenes), bare),
        deblend=lambda i: rate(len(scenes), lambda: net.deblend(noisy)),
        book=lambda i: rate(len(scenes), whole),
        sep=lambda i: peer(peers.sep(few, **peers.EXTRACTIONS["isophotal"])),
        sep_aperture=lambda i: peer(peers.sep(few, **peers.EXTRACTIONS["aperture"])),
        scarlet2=lambda i: fitted("sersic"),
        scarlet2_prior=lambda i: fitted("prior"),
        scarlet2_pixels=lambda i: fitted("pixels"),
    )
    of_network = rates["deblend"] / rates["network"]
    rates["compiling"] = compiled()
    over = {f"over_{name}": rates["book"] / rates[name] for name in ("scarlet2", "sep")}
    return rates | over | {"of_network": of_network}


def memory() -> dict:
    """Largest memory (GB) of a process that draws scenes and trains on them."""
    peaks = {}
    for n in (1000, 10_000, 100_000):
        command = [sys.executable, __file__, "--peak", str(n)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[str(n)] = float(done.stdout.split()[-1])
        print(f"  {n} scenes: {peaks[str(n)]:.2f} GB", flush=True)
    return peaks


def peak(n: int) -> None:
    """Draw `n` LSST blends, train on 500 all over them, print the peak in GB.

    Of memory that is the process's own: pages of a file that lies on disk are not,
    since the system takes them back when another needs the room.
    """
    from deblender import networks
    from deblender.batches import Batches
    from deblender.normalisation import fit_normalisation

    watch = Watch()
    galaxies, of = deblender.catalogue("synthetic"), deblender.survey("lsst")
    scenes = deblender.simulate(galaxies, of, n, 4, seed=7, split="train")
    eq4 = fit_normalisation(scenes.take(np.arange(500)))
    model = networks.vae(6, seed=1)
    model.compile("adam", loss=networks.cross_entropy)
    batches = Batches(scenes, eq4, seed=1, swap_neighbours=True)
    for i in range(0, len(batches), max(len(batches) // 32, 1)):
        model.train_on_batch(*batches[i])
    print(watch.stop())


class Watch(threading.Thread):
    """Looks every half second at the memory of this process and its children."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest, self.over = 0, threading.Event()
        self.start()

    def run(self) -> None:
        process = psutil.Process()
        while not self.over.wait(0.5):
            family = [process, *process.children(recursive=True)]
            self.largest = max(self.largest, sum(map(own_memory, family)))

    def stop(self) -> float:
        """The largest, in GB."""
        self.over.set()
        self.join()
        return self.largest / 1e9


def own_memory(process: psutil.Process) -> int:
    """Bytes that are not pages of a file; none for a process that has ended."""
    try:
        used = process.memory_info()
    except psutil.NoSuchProcess:
        return 0
    return used.rss - used.shared


def book() -> dict:
    """Minutes that the book takes: from a clean clone, again, and after an edit.

    The first makes the environment too, and draws every scene.
    """
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        environment = os.environ | {"DEBLENDER_CACHE": str(Path(folder) / "cache")}
        if (shared := ROOT.parent / "shared").is_dir():
            (Path(folder) / "shared").symlink_to(shared)

        def build() -> float:
            begin = time.perf_counter()
            quiet = {"check": True, "stdout": subprocess.DEVNULL}
            subprocess.run(["make", "book"], cwd=clone, env=environment, **quiet)
            return (time.perf_counter() - begin) / 60

        found = {"clean": build(), "again": build()}
        chapter = clone / "book" / "02_normalisation.md"
        chapter.write_text(chapter.read_text() + "\nOne more sentence.\n")
        subprocess.run(
            ["make", "sync"], cwd=clone, check=True, stdout=subprocess.DEVNULL
        )
        return found | {"prose": build()}


SECTIONS = {
    section.__name__: section
    for section in (
        simulation,
        chromatic,
        profile,
        scaling,
        training,
        deblending,
        memory,
        book,
    )
}


def setting() -> dict[str, str | int]:
    """When and on what a section is measured, and with which versions."""
    from deblender.train import provenance

    made, info = provenance([]), Path("/proc/cpuinfo")
    flags = info.read_text() if info.is_file() else ""
    packages = ("blending_toolkit", "galsim", "keras", "scarlet2", "sep")
    return {
        "date": datetime.date.today().isoformat(),
        "commit": made["commit"][:7],
        "cores": made["hardware"]["cores"],
        "processor": made["hardware"]["processor"],
        "matrix units": "AMX" if "amx_bf16" in flags else "none known",
        "python": platform.python_version(),
    } | {package: version(package) for package in packages}


def measure(name: str, file: Path) -> None:
    """Measure one section, and keep it beside what earlier runs measured."""
    results = json.loads(file.read_text()) if file.is_file() else {}
    with tempfile.TemporaryDirectory() as cache:
        deblender.catalogue("synthetic")  # drawn before the clock starts
        for drawn in cache_folder().glob("synthetic-*"):
            (Path(cache) / drawn.name).symlink_to(drawn)
        os.environ["DEBLENDER_CACHE"] = cache  # so that every scene is drawn anew
        results[name] = SECTIONS[name]()
    results.setdefault("measured", {})[name] = setting()
    write_whole(file, json.dumps(results, indent=2).encode())
    print(f"{name} is in {file}", flush=True)


def main(names: list[str]) -> None:
    """Measure the named sections, or all, each in a process of its own.

    What one leaves behind, threads or memory, so does not slow another down.
    """
    if unknown := sorted(set(names) - SECTIONS.keys()):
        sys.exit(f"unknown section {unknown}; accepted: {', '.join(SECTIONS)}")
    file = ROOT / "build" / "metrics" / "bench.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    if len(names) == 1:
        measure(*names, file)
    else:
        for name in names or SECTIONS:
            print(name, flush=True)
            subprocess.run([sys.executable, __file__, name], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        peak(int(sys.argv[2]))
    else:
        main(sys.argv[1:])
