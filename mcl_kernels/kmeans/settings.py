"""The arguments of `KMeans`, checked."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from mcl_kernels._validate import as_integer, as_number, check_choice, check_flag
from mcl_kernels.backends.table import IMPLS
from mcl_kernels.distributed.group import Ranks, ranks_of
from mcl_kernels.kmeans.assign import METRICS, finite_rows

RANDOM_RESTARTS = 10  # as many as in scikit-learn


class Settings(NamedTuple):
    """Arguments of `KMeans` in one form: numbers are Python's, and centres a tensor."""

    n_clusters: int
    metric: str
    init: str | Tensor
    n_init: int | str
    max_iter: int
    tol: float
    batch_size: int | None
    empty: str
    seed: int
    bounds: bool
    impl: str
    ranks: Ranks | None

    @property
    def n_restarts(self) -> int:
        """Number of restarts: `n_init`, and for "auto" 10 from random rows, else 1."""
        if isinstance(self.n_init, int):
            return self.n_init
        return RANDOM_RESTARTS if self.init == "random" else 1


def check_settings(kmeans: Any) -> Settings:
    """Returns the arguments that a `KMeans` holds; raises a TypeError or a ValueError that names an invalid one."""
    n_clusters = as_integer("n_clusters", kmeans.n_clusters, least=1)
    n_init, init, batch_size = kmeans.n_init, kmeans.init, kmeans.batch_size
    if not isinstance(n_init, str):
        n_init = as_integer("n_init", n_init, least=1)
    elif n_init != "auto":
        raise ValueError(f"n_init must be an integer or 'auto': got {n_init!r}")
    max_iter = as_integer("max_iter", kmeans.max_iter, least=1)
    seed = as_integer("seed", kmeans.seed, least=0)
    if batch_size is not None:
        batch_size = as_integer("batch_size", batch_size, least=1)
    check_choice("metric", kmeans.metric, METRICS)
    check_choice("empty", kmeans.empty, ("split",))
    check_choice("impl", kmeans.impl, IMPLS["kmeans"])
    if isinstance(init, str):
        check_choice("init", init, ("k-means++", "random"))
    else:
        init = finite_rows("init", init)
        if len(init) != n_clusters or n_init not in (1, "auto"):
            raise ValueError(
                "init must have a row per cluster, and n_init be 1: "
                f"got {len(init)} rows for {n_clusters} clusters, n_init={n_init}"
            )
    tol = as_number("tol", kmeans.tol)
    if not tol >= 0:
        raise ValueError(f"tol must be at least 0: got {tol}")
    check_flag("bounds", kmeans.bounds)
    return Settings(
        n_clusters=n_clusters,
        metric=kmeans.metric,
        init=init,
        n_init=n_init,
        max_iter=max_iter,
        tol=tol,
        batch_size=batch_size,
        empty=kmeans.empty,
        seed=seed,
        bounds=bool(kmeans.bounds),
        impl=kmeans.impl,
        ranks=None if kmeans.group is None else ranks_of(kmeans.group),
    )
