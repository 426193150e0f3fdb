"""The same bits from one process and from a Dask cluster that loses a worker."""

import os
import signal

import numpy as np
import pytest
from distributed import Client, LocalCluster
from distributed.diagnostics.plugin import SchedulerPlugin

import deblender
from deblender import simulation, weights
from deblender.catalogues import cache_folder
from deblender.simulation import CHUNK, simulate
from deblender.workers import spread

SHARED = cache_folder()


class Lost(SchedulerPlugin):
    """Counts the workers that leave the cluster."""

    def __init__(self):
        self.workers = []

    def remove_worker(self, scheduler, worker, **kwargs):
        self.workers.append(worker)


@pytest.fixture
def client():
    with (
        LocalCluster(2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        yield client


def _use_cache(folder, monkeypatch):
    """An empty cache, but for the catalogues that are drawn already."""
    folder.mkdir()
    for drawn in SHARED.glob("synthetic-*"):
        (folder / drawn.name).symlink_to(drawn)
    monkeypatch.setenv("DEBLENDER_CACHE", str(folder))


def test_scenes_are_the_same_though_a_worker_is_killed(
    synthetic, tmp_path, monkeypatch, client
):
    survey, n = deblender.survey("lsst"), 12 * CHUNK
    lost, keep = Lost(), simulation._keep_chunk
    client.cluster.scheduler.add_plugin(lost)
    victim = next(iter(client.run(os.getpid).values()))
    killed = []

    def keep_and_kill(*args):
        """When the first chunk has come in, the others are at work."""
        if not killed:
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)
        return keep(*args)

    monkeypatch.setattr(simulation, "_keep_chunk", keep_and_kill)
    _use_cache(tmp_path / "cluster", monkeypatch)
    spread_out = simulate(synthetic, survey, n, 2, seed=31, client=client)
    assert killed and lost.workers
    monkeypatch.setattr(simulation, "_keep_chunk", keep)
    _use_cache(tmp_path / "alone", monkeypatch)
    alone = simulate(synthetic, survey, n, 2, seed=31, processes=1)
    np.testing.assert_array_equal(spread_out.stamps["LSST"], alone.stamps["LSST"])
    np.testing.assert_array_equal(spread_out.flux, alone.flux)
    for name in alone.truth.colnames:
        np.testing.assert_array_equal(spread_out.truth[name], alone.truth[name])


def test_stamps_are_deblended_alike_on_a_cluster(client, monkeypatch):
    network = deblender.load("lsst")
    monkeypatch.setattr(weights, "PIECE", weights.BATCH)
    rng = np.random.default_rng(2)
    noisy = rng.normal(0, 250, (2 * weights.BATCH + 5, 64, 64, 6)).astype(np.float32)
    network.sides = 2
    alone = network.deblend(noisy, n_samples=2, seed=4)
    away = network.deblend(noisy, n_samples=2, seed=4, client=client)
    for name in ("image", "latent_mean", "latent_width", "samples"):
        np.testing.assert_array_equal(getattr(away, name), getattr(alone, name))


def test_stamps_are_deblended_alike_though_a_worker_is_killed(client, monkeypatch):
    network, lost = deblender.load("lsst"), Lost()
    client.cluster.scheduler.add_plugin(lost)
    victim = next(iter(client.run(os.getpid).values()))
    monkeypatch.setattr(weights, "PIECE", weights.BATCH)
    rng = np.random.default_rng(3)
    noisy = rng.normal(0, 250, (8 * weights.BATCH, 64, 64, 6)).astype(np.float32)
    alone = network.deblend(noisy)

    def spread_and_kill(*args, **kwargs):
        """When the first piece has come in, the others are at work."""
        for i, piece in enumerate(spread(*args, **kwargs)):
            if i == 0:
                os.kill(victim, signal.SIGKILL)
            yield piece

    monkeypatch.setattr(weights, "spread", spread_and_kill)
    away = network.deblend(noisy, client=client)
    assert lost.workers
    np.testing.assert_array_equal(away.image, alone.image)


def test_an_error_of_a_worker_is_raised(client):
    with pytest.raises(ZeroDivisionError):
        list(spread(_divide, 1, [1, 0], client))
    assert sorted(spread(_divide, 6, [1, 2, 3], client)) == [2, 3, 6]
    assert sorted(spread(_divide, 6, [1, 2, 3], processes=1)) == [2, 3, 6]


def _divide(shared, piece):
    return shared / piece
