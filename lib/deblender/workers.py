"""Work in pieces: on the cores at hand, or on the workers of a Dask cluster."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from joblib import Parallel, cpu_count, delayed

if TYPE_CHECKING:
    from distributed import Client


def spread(
    function: Callable,
    shared: Any,
    pieces: Sequence,
    client: "Client | None" = None,
    processes: int | None = None,
) -> Iterator:
    """Results of `function(shared, piece)` for all pieces, in the order they come in.

    On all cores (or `processes`), or on the workers of a Dask `client`, each of which
    receives `shared` once; Dask gives what a lost worker had to another.
    """
    if client is None:
        workers = min(processes or cpu_count(), max(len(pieces), 1))
        pool = Parallel(workers, return_as="generator_unordered", max_nbytes=None)
        yield from pool(delayed(function)(shared, piece) for piece in pieces)
        return
    from distributed import as_completed

    # Made by a task, and not scattered: Dask makes it again if who held it is lost.
    everywhere = client.submit(_itself, shared, pure=False)
    futures = client.map(
        lambda piece, of: function(of, piece), pieces, of=everywhere, pure=False
    )
    waiting = as_completed(futures, with_results=True)
    del futures  # so that a result leaves the cluster once it was handed out
    for _, result in waiting:
        yield result


def _itself(shared: Any) -> Any:
    return shared
