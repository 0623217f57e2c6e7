"""Contenders of the k-means benchmark: each function fits rows with one library and returns its centres."""

from __future__ import annotations

import importlib.util
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.clustering_data import START_SEED
from mcl_kernels import KMeans

SEED = 0  # of each library's k-means++
FIRST_READS = 5  # iterations before the share of rows that an iteration reads is averaged


class Task(NamedTuple):
    k: int
    start: Tensor | None  # initial centres [K, D]; None: the library's k-means++
    iterations: int  # at most, and exactly for a library that does not test convergence
    tol: float


class Fitted(NamedTuple):
    centers: Tensor  # [K, D]
    iterations: int
    read: float | None = None  # share of the rows that an iteration reads, after the first ones


class Contender(NamedTuple):
    name: str
    fit: Callable[[Tensor, Task], Fitted]
    module: str = ""  # that has to be installed
    package: str = ""  # its name in `pip install`
    draws_centers: bool = True  # has k-means++
    is_converging: bool = True  # stops at `tol`; else it takes as many iterations as ours
    bound_bytes: int = 0  # memory of bounds, for each row and centre

    def missing(self) -> str | None:
        """Reason why this contender cannot run; None if it can."""
        if not self.module or importlib.util.find_spec(self.module):
            return None
        return f"pip install {self.package}"


def ours(x: Tensor, task: Task, *, bounds: bool = True, impl: str = "auto") -> Fitted:
    init: str | Tensor = "k-means++" if task.start is None else task.start
    settings = {"max_iter": task.iterations, "tol": task.tol, "seed": SEED}
    kmeans = KMeans(task.k, init=init, bounds=bounds, impl=impl, **settings).fit(x)
    reads = [entry["read"] for entry in kmeans.history_[FIRST_READS:]]
    return Fitted(kmeans.cluster_centers_, kmeans.n_iter_, statistics.fmean(reads) if reads else None)


def scikit_learn(x: Tensor, task: Task, algorithm: str) -> Fitted:
    from sklearn import cluster

    return _like_scikit_learn(cluster.KMeans, x, task, algorithm)


def intelex(x: Tensor, task: Task) -> Fitted:
    import daal4py
    from sklearnex import cluster

    daal4py.daalinit(torch.get_num_threads())
    return _like_scikit_learn(cluster.KMeans, x, task, "lloyd")


def _like_scikit_learn(kind: type, x: Tensor, task: Task, algorithm: str) -> Fitted:
    init = "k-means++" if task.start is None else task.start.numpy()
    settings = {"n_init": 1, "max_iter": task.iterations, "tol": task.tol, "algorithm": algorithm}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ConvergenceWarning
        kmeans = kind(task.k, init=init, random_state=SEED, **settings).fit(x.numpy())
    return Fitted(torch.from_numpy(kmeans.cluster_centers_), int(kmeans.n_iter_))


def faiss(x: Tensor, task: Task) -> Fitted:
    """Fits all rows, of which faiss by default takes a sample. The labels are not part of its fit."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    n, d = x.shape
    settings = {"max_points_per_centroid": n, "min_points_per_centroid": 1, "seed": SEED}
    if task.start is None:
        settings["init_method"] = faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS
    kmeans = faiss.Kmeans(d, task.k, niter=task.iterations, **settings)
    kmeans.train(x.numpy(), init_centroids=None if task.start is None else task.start.numpy())
    return Fitted(torch.from_numpy(kmeans.centroids), task.iterations)


def superkmeans(x: Tensor, task: Task) -> Fitted:
    """Fits all rows from the rows that it draws, `start_rows`. The labels are not part of its fit."""
    from superkmeans import SuperKMeans

    kmeans = SuperKMeans(
        task.k, x.shape[1], hierarchical=False, sampling_fraction=1.0, early_termination=False, iters=task.iterations,
        n_threads=torch.get_num_threads(), seed=START_SEED,
    )  # fmt: skip
    return Fitted(torch.from_numpy(kmeans.train(x.numpy())), task.iterations)


SKLEARN = {"module": "sklearn", "package": "scikit-learn"}
OURS = Contender("ours", ours)
ON_CPU = (
    OURS,
    Contender("ours, no bounds", partial(ours, bounds=False)),
    Contender("scikit-learn, lloyd", partial(scikit_learn, algorithm="lloyd"), **SKLEARN),
    Contender("scikit-learn, elkan", partial(scikit_learn, algorithm="elkan"), **SKLEARN, bound_bytes=4),
    Contender("scikit-learn-intelex", intelex, "sklearnex", "scikit-learn-intelex"),
    Contender("faiss", faiss, "faiss", "faiss-cpu", is_converging=False),
    Contender("superkmeans", superkmeans, "superkmeans", "superkmeans", draws_centers=False, is_converging=False),
)
# On a GPU the other contender is PyTorch by tiles.
ON_GPU = (
    OURS,
    Contender("own, CUDA C++", partial(ours, impl="cuda")),
    Contender("reference", partial(ours, impl="reference")),
)
