"""k-means in scikit-learn's words."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mcl_kernels import _native
from mcl_kernels._rows import compute_dtype, normalize_rows
from mcl_kernels._validate import as_integer, check_choice, check_embeddings, check_same_width
from mcl_kernels.kmeans import lloyd, native, reference

METRICS = ("euclidean", "cosine")
IMPLS = ("auto", "native", "reference")

Array = np.ndarray[Any, Any]


class KMeans:
    """Lloyd's k-means in scikit-learn's words; it holds N labels and distances, never N x K of them.

        inertia = sum_i min_k |x_i - c_k|^2                             metric="euclidean"
        inertia = sum_i min_k (1 - <x_i, c_k> / (|x_i| |c_k|))          metric="cosine" (spherical k-means)

    Every row is read once in every iteration; nothing is sampled. Sums over the data are fp64, the same in any order
    and for any number of threads, and random numbers come from a generator of its own: the same seed gives the same
    clusters, and PyTorch's global random state is not touched.

    Args:
        n_clusters: K, from 1 to the number of rows. Fewer are found, with a warning, where fewer rows differ.
        metric: "euclidean" or "cosine"; the latter needs no normalised input.
        init: "k-means++" (greedy, as scikit-learn's), "random" rows, or centres [K, D] (a tensor or an array).
        n_init: restarts, of which the one with the lowest inertia is kept.
        max_iter: iterations of one restart.
        tol: it has converged when the summed squared shift of the centres is at most tol times the mean
            variance of the columns (of the normalised rows for cosine).
        empty: "split": an empty cluster takes the farthest row of the largest one. Counted in `history_`.
        seed: of the initialisation.
        impl: "native" (C++ kernels, on a CPU), "reference" (PyTorch by tiles) or "auto": the first that is here.

    Attributes:
        cluster_centers_: [K, D] fp32 (fp64 for fp64 data), of unit length for cosine, on the device of the data.
        labels_: int64 [N], equal to `predict` of the same rows.
        inertia_: float, of `labels_` and `cluster_centers_`.
        n_iter_: iterations of the best restart.
        history_: of the best restart, a dictionary per iteration: objective, shift, seconds, imbalance (largest
            cluster over the mean one), splits.

    Raises:
        TypeError, ValueError: arguments that do not fit; rows that hold NaN or infinity, the first one named.

    Source: Lloyd 1982; Arthur and Vassilvitskii 2007 for the initialisation.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 9.0], [9.0, 8.0]])
        >>> KMeans(2).fit_predict(x).unique(return_counts=True)[1]
        tensor([2, 2])
    """

    cluster_centers_: Tensor
    labels_: Tensor
    inertia_: float
    n_iter_: int
    history_: list[dict[str, Any]]

    def __init__(
        self,
        n_clusters: int,
        *,
        metric: str = "euclidean",
        init: str | Tensor | Array = "k-means++",
        n_init: int = 1,
        max_iter: int = 100,
        tol: float = 1e-4,
        empty: str = "split",
        seed: int = 0,
        impl: str = "auto",
    ) -> None:
        self.n_clusters = as_integer("n_clusters", n_clusters, least=1)
        self.n_init = as_integer("n_init", n_init, least=1)
        self.max_iter = as_integer("max_iter", max_iter, least=1)
        self.seed = as_integer("seed", seed, least=0)
        check_choice("metric", metric, METRICS)
        check_choice("empty", empty, ("split",))
        check_choice("impl", impl, IMPLS)
        if not isinstance(init, str):
            init = finite_rows("init", init)
            if len(init) != n_clusters or n_init != 1:
                raise ValueError(
                    "init must have a row per cluster, and n_init be 1: "
                    f"got {len(init)} rows for {n_clusters} clusters, n_init={n_init}"
                )
        else:
            check_choice("init", init, ("k-means++", "random"))
        self.metric = metric
        self.init = init
        self.tol = tol
        self.empty = empty
        self.impl = impl

    def fit(self, x: Tensor | Array) -> KMeans:
        """Clusters the rows of x, [N, D]: a tensor of any floating dtype, or an array."""
        x = finite_rows("x", x)
        if len(x) < self.n_clusters:
            raise ValueError(f"n_clusters must be at most the number of rows: got {self.n_clusters} for {len(x)} rows")
        if isinstance(self.init, Tensor):
            check_same_width("init", self.init, "x", x)
        generator = torch.Generator().manual_seed(self.seed)
        steps, largest = _steps(self.impl, x.device), float(torch.stack(x.aminmax()).abs().max())
        with torch.autocast(x.device.type, enabled=False):
            tol = self.tol * reference.mean_variance(x, self.metric)
            runs = (
                lloyd.lloyd(x, self._initial_centers(x, generator), self.metric, self.max_iter, tol, largest, steps)
                for _ in range(self.n_init)
            )
            best = min(runs, key=lambda run: run.inertia)
        if len(best.centers) < self.n_clusters:
            warnings.warn(
                f"n_clusters={self.n_clusters} but only {len(best.centers)} clusters hold a row: too few rows differ",
                stacklevel=2,
            )
        self.cluster_centers_, self.labels_, self.inertia_, self.history_ = best
        self.n_iter_ = len(self.history_)
        return self

    def predict(self, x: Tensor | Array) -> Tensor:
        """The nearest centre of each row of x, int64 [N]."""
        if not hasattr(self, "cluster_centers_"):
            raise RuntimeError("this KMeans has no clusters yet: call fit(x) first")
        return _assign(x, self.cluster_centers_, self.metric, self.impl)[0]

    def fit_predict(self, x: Tensor | Array) -> Tensor:
        """`fit(x).labels_`."""
        return self.fit(x).labels_

    def _initial_centers(self, x: Tensor, generator: torch.Generator) -> Tensor:
        if isinstance(self.init, Tensor):
            centers = self.init.to(compute_dtype(x))
            return normalize_rows(centers) if self.metric == "cosine" else centers
        assert isinstance(self.init, str)
        return lloyd.initial_centers(x, self.n_clusters, self.init, self.metric, generator)


def assign_clusters(x: Tensor | Array, centers: Tensor | Array, *, metric: str = "euclidean") -> tuple[Tensor, Tensor]:
    """The nearest centre of each row and the distance to it.

        euclidean   argmin_k |x_i - c_k|^2                         squared Euclidean distance, >= 0
        cosine      argmin_k 1 - <x_i, c_k> / (|x_i| |c_k|)        1 - cosine

    Ties go to the lowest index. A row gets the same label whatever the rows around it.

    Args:
        x: [N, D], a tensor of any floating dtype, or an array.
        centers: [K, D] with K >= 1, on the device of x.
        metric: "euclidean" or "cosine".

    Returns:
        labels, int64 [N], and distances, fp32 [N].

    Raises:
        TypeError, ValueError: as `KMeans`.

    Example:
        >>> assign_clusters(torch.tensor([[1.0], [4.0]]), torch.tensor([[0.0], [5.0]]))
        (tensor([0, 1]), tensor([1., 1.]))
    """
    check_choice("metric", metric, METRICS)
    return _assign(x, centers, metric, "auto")


def _assign(x: Tensor | Array, centers: Tensor | Array, metric: str, impl: str) -> tuple[Tensor, Tensor]:
    x, centers = finite_rows("x", x), finite_rows("centers", centers)
    check_same_width("centers", centers, "x", x)
    if len(centers) == 0:
        raise ValueError("centers must have at least one row: got 0")
    centers = centers.to(compute_dtype(x, centers))
    with torch.autocast(x.device.type, enabled=False):
        labels, distances = _steps(impl, x.device).assign(x, centers, metric)
    return labels, distances.float()


def _steps(impl: str, device: torch.device) -> ModuleType:
    """The implementation that `impl` names; an explicit name is never replaced by another."""
    if impl == "auto":
        return native if device.type == "cpu" and _native.usable() else reference
    if impl == "native" and device.type != "cpu":
        raise ValueError(f"impl='native' computes on CPU tensors: got device {device}")
    return native if impl == "native" else reference


def finite_rows(name: str, x: object) -> Tensor:
    """Rows to cluster as a tensor without a graph; the first one that is not finite is named."""
    if isinstance(x, np.ndarray):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # it is only read
            x = torch.from_numpy(np.ascontiguousarray(x))
    check_embeddings(name, x)
    assert isinstance(x, Tensor)
    x = x.detach()
    for start in range(0, len(x), reference.TILE):
        bad = ~x[start : start + reference.TILE].isfinite().all(1)
        if bool(bad.any()):
            row = start + int(bad.nonzero()[0])
            raise ValueError(f"{name} must be finite: got NaN or infinity in row {row}")
    return x
