"""k-means in scikit-learn's words."""

from __future__ import annotations

import hashlib
import math
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mcl_kernels._validate import as_integer, as_number, check_choice, check_same_width
from mcl_kernels.backends.table import IMPLS, load, resolve
from mcl_kernels.distributed.group import ranks_of
from mcl_kernels.kmeans import lloyd
from mcl_kernels.kmeans.centers import middle_and_scale, prepare, summarize
from mcl_kernels.kmeans.files import Saved
from mcl_kernels.kmeans.lloyd import Clustering, Problem
from mcl_kernels.kmeans.rows import Array, ChunkedRows, Rows, RowsLike, open_rows
from mcl_kernels.kmeans.team import open_shard
from mcl_kernels.normalize import compute_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

METRICS = ("euclidean", "cosine")

# Rows that k-means++ sees: fewer of many features, but enough of each cluster.
INIT_ROWS = 1 << 16
INIT_NUMBERS = 1 << 25
INIT_ROWS_PER_CLUSTER = 16


class KMeans(Saved):
    """Lloyd's k-means in scikit-learn's words, of data in memory or larger than it.

        inertia = sum_i min_k |x_i - c_k|^2                             metric="euclidean"
        inertia = sum_i min_k (1 - <x_i, c_k> / (|x_i| |c_k|))          metric="cosine" (spherical k-means)

    Labels are right for any data, in units from 1e-30 to 1e30, far from 0, with rows or centres far from the others: a
    distance that rounding could decide is taken from differences in fp64, and all are computed in fp64 where squares
    would leave the range of fp32.

    Every row is read once in every iteration; no iteration samples. Sums over the data are fp64, the same in any order,
    for any number of threads and any chunks, and random numbers come from a generator of its own: the same seed gives
    the same clusters, and PyTorch's global random state is not touched. Memory beyond the data: N labels twice, of 4
    and 8 bytes; of the rows that k-means++ sees two copies, and two chunks of 64 MiB where the data is no tensor or
    array; where a cluster is empty, N labels and distances more.

    With a `group` each rank passes its shard of the rows, and all fit together: the clusters are those of one process
    that is given the shards one after the other, with the same seed, bit for bit where the ranks run the same build on
    the same kind of processor; objectives and inertia to rounding. An iteration is one all-reduce (of a mini-batch
    each) of K D + K + 2 fp64 numbers, and a broadcast of one. Of the memory above, N is then the rows of the shard, and
    every rank holds the rows that k-means++ sees, which the first one alone computes with.

    Args:
        n_clusters: K, from 1 to the number of rows. Fewer are found, with a warning, where fewer rows differ.
        metric: "euclidean" or "cosine"; the latter needs no normalised input.
        init: "k-means++" (greedy, as scikit-learn's), "random" rows, or centres [K, D] (a tensor or an array). Of a
            large data set the first two see rows drawn at random, `init_rows_` of them: at most 65,536, fewer where D
            is above 512, but 16 K at least.
        n_init: restarts, of which the one with the lowest inertia is kept.
        max_iter: iterations of one restart.
        tol: it has converged when the summed squared shift of the centres is at most tol times the mean
            variance of the columns (of the normalised rows for cosine).
        batch_size: None, or the rows of a mini-batch, each of which moves the centres to the mean of the rows they
            were ever given. An iteration is then as many batches as make up the data, drawn with replacement (of
            iterables: in their order).
        empty: "split": an empty cluster takes the farthest row of the largest one. Counted in `history_`.
        seed: of the initialisation.
        impl: "native" (C++ kernels, on a CPU), "triton" (kernels for CUDA), "cuda" (CUDA C++ kernels, where the
            installation built them), "reference" (PyTorch by tiles) or "auto": the first of them that runs on the
            device of the data. `capabilities()` says what is missing.
            "faiss" finds the nearest centres with that library, on its GPUs where it has some.
        group: None, or a `torch.distributed` process group, on each of whose ranks `fit` is called.

    Attributes:
        cluster_centers_: [K, D] fp32 (fp64 for fp64 data), of unit length for cosine, on the device of the data.
        labels_: int64 [N], equal to `predict` of the same rows; with a group of the rows of this rank. All else is of
            the rows of all ranks.
        inertia_: float, of `labels_` and `cluster_centers_`.
        n_iter_: iterations of the best restart.
        init_rows_: rows that the initialisation saw; 0 where centres were given.
        history_: of the best restart, a dictionary per iteration: objective, shift, seconds, imbalance (largest
            cluster over the mean one), splits.

    Raises:
        TypeError, ValueError: arguments that do not fit; rows that hold NaN or infinity, the first one named, or
            entries whose squares fp64 does not hold; a file that ends early; an iterable of empty or differing chunks,
            or of other rows in a later pass. With a group also arguments that differ between ranks, and a batch_size
            where x is an iterable; where one rank cannot read its rows it raises why, and the others a ValueError that
            names it.

    Source: Lloyd 1982; Arthur and Vassilvitskii 2007 for the initialisation; Sculley 2010 for mini-batches.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 9.0], [9.0, 8.0]])
        >>> KMeans(2).fit_predict(x).unique(return_counts=True)[1]
        tensor([2, 2])
    """

    cluster_centers_: Tensor
    labels_: Tensor
    inertia_: float
    n_iter_: int
    init_rows_: int
    history_: list[dict[str, Any]]
    _dtype: torch.dtype  # of products: `predict` takes the same, so that even labels of ties are the same

    def __init__(
        self,
        n_clusters: int,
        *,
        metric: str = "euclidean",
        init: str | Tensor | Array = "k-means++",
        n_init: int = 1,
        max_iter: int = 100,
        tol: float = 1e-4,
        batch_size: int | None = None,
        empty: str = "split",
        seed: int = 0,
        impl: str = "auto",
        group: ProcessGroup | None = None,
    ) -> None:
        self.n_clusters = as_integer("n_clusters", n_clusters, least=1)
        self.n_init = as_integer("n_init", n_init, least=1)
        self.max_iter = as_integer("max_iter", max_iter, least=1)
        self.seed = as_integer("seed", seed, least=0)
        self.batch_size = None if batch_size is None else as_integer("batch_size", batch_size, least=1)
        check_choice("metric", metric, METRICS)
        check_choice("empty", empty, ("split",))
        check_choice("impl", impl, IMPLS["kmeans"])
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
        self.init: str | Tensor = init
        self.tol = as_number("tol", tol)
        if not self.tol >= 0:
            raise ValueError(f"tol must be at least 0: got {tol}")
        self.empty = empty
        self.impl = impl
        self.ranks = None if group is None else ranks_of(group)

    def fit(self, x: RowsLike) -> KMeans:
        """Clusters the rows of x, [N, D], and sets the attributes.

        Args:
            x: a tensor of any floating dtype; an array; a memory map, whose file is read in chunks, the next one while
                one is computed, and never held as a whole; or an iterable of chunks of rows (a DataLoader, say), which
                is iterated once for each pass and has to yield the same rows in the same order every time. With a
                group the shard of this rank, of any number of rows, [0, D] too.
        """
        rows = self._open(x)
        if isinstance(self.init, Tensor):
            check_same_width("init", self.init, rows.name, rows.like)
            _check_range("init", self.init.to(compute_dtype(rows.like)))
        with torch.autocast(rows.device.type, enabled=False):
            n = rows.count()  # before a survey, whose memory grows with the width, where the rows tell it
            if n < self.n_clusters:
                raise ValueError(f"n_clusters must be at most the number of rows: got {self.n_clusters} for {n} rows")
            _, low, high = rows.survey()
            _check_range(rows.name, torch.stack((low, high)))
            generator = torch.Generator().manual_seed(self.seed)
            sample = self._sample(rows, n, generator)
            spread = high.double() - low.double()
            surveyed = rows.from_first(lambda: middle_and_scale(sample, self.metric, spread).to(compute_dtype(sample)))
            summary = summarize(n, low, high, surveyed, self.metric, self.init)
            problem = Problem(rows, summary, self.metric, _steps(self.impl, rows.device))
            tol = self.tol * lloyd.mean_variance(problem) if self.tol else 0.0
            runs = (self._run(problem, sample, tol, generator) for _ in range(self.n_init))
            # Of 24 bits: the order of a sum, which depends on chunks and shards, must not decide between equal runs.
            best = min(runs, key=lambda run: _rounded(run.inertia))
        if len(best.centers) < self.n_clusters:
            warnings.warn(
                f"n_clusters={self.n_clusters} but only {len(best.centers)} clusters hold a row: too few rows differ",
                stacklevel=2,
            )
        self.cluster_centers_, self.labels_, self.inertia_, self.history_ = best
        self.n_iter_ = len(self.history_)
        self._dtype = summary.dtype
        self.init_rows_ = 0 if isinstance(self.init, Tensor) else len(sample)
        return self

    def predict(self, x: RowsLike) -> Tensor:
        """The nearest centre of each row of x (anything that `fit` takes), int64 [N]: each rank of a group alone."""
        if not hasattr(self, "cluster_centers_"):
            raise RuntimeError("this KMeans has no clusters yet: call fit(x) first")
        return _assign(x, self.cluster_centers_, self.metric, self.impl, self._dtype)[0]

    def fit_predict(self, x: RowsLike) -> Tensor:
        """`fit(x).labels_`."""
        return self.fit(x).labels_

    def _open(self, x: RowsLike) -> Rows:
        """The rows of x; with a group those of all ranks, of which x is a shard."""
        if self.ranks is None:
            return open_rows("x", x)

        def open_local() -> Rows:
            rows = open_rows("x", x)
            _steps(self.impl, rows.device)  # raises where this rank cannot compute
            if self.batch_size is not None and isinstance(rows, ChunkedRows):
                raise ValueError("batch_size with a group draws rows of x: got an iterable, which is read in order")
            return rows

        names = ("n_clusters", "metric", "n_init", "max_iter", "tol", "batch_size", "empty", "seed")
        arguments = {"init": _digest(self.init), **{name: getattr(self, name) for name in names}}
        return open_shard(open_local, self.ranks, arguments)

    def _sample(self, rows: Rows, n: int, generator: torch.Generator) -> Tensor:
        """What the initialisation sees: all rows of a small data set, in order."""
        most = max(INIT_ROWS_PER_CLUSTER * self.n_clusters, min(INIT_ROWS, INIT_NUMBERS // rows.width))
        if n <= most:
            return rows.load()
        drawn = torch.empty(0, dtype=torch.int64, device="cpu")
        while len(drawn) < most:  # distinct ones
            more = torch.randint(n, (most - len(drawn),), generator=generator, device="cpu")
            drawn = torch.unique(torch.cat((drawn, more)))
        return rows.take(drawn)

    def _run(self, problem: Problem, sample: Tensor, tol: float, generator: torch.Generator) -> Clustering:
        public = compute_dtype(sample)

        def initial_centers() -> Tensor:
            if isinstance(self.init, Tensor):
                return problem.points(self.init).to(public)
            return lloyd.initial_centers(problem, sample, self.n_clusters, self.init, generator).to(public)

        points = problem.rows.from_first(initial_centers).to(problem.summary.dtype)
        if self.batch_size is None:
            return lloyd.lloyd(problem, points, self.max_iter, tol)
        return lloyd.mini_batches(problem, points, self.max_iter, tol, self.batch_size, generator)


def assign_clusters(x: RowsLike, centers: Tensor | Array, *, metric: str = "euclidean") -> tuple[Tensor, Tensor]:
    """The nearest centre of each row and the distance to it.

        euclidean   argmin_k |x_i - c_k|^2                         squared Euclidean distance, >= 0
        cosine      argmin_k 1 - <x_i, c_k> / (|x_i| |c_k|)        1 - cosine

    Ties go to the lowest index. A row gets the same label whatever the rows around it.

    Args:
        x: [N, D], anything that `KMeans.fit` takes.
        centers: [K, D] with K >= 1, on the device of x.
        metric: "euclidean" or "cosine".

    Returns:
        labels, int64 [N], and distances, fp32 [N], which may round to 0 or to infinity.

    Raises:
        TypeError, ValueError: as `KMeans`.

    Example:
        >>> assign_clusters(torch.tensor([[1.0], [4.0]]), torch.tensor([[0.0], [5.0]]))
        (tensor([0, 1]), tensor([1., 1.]))
    """
    check_choice("metric", metric, METRICS)
    return _assign(x, centers, metric, "auto")


def _assign(
    x: RowsLike, centers: Tensor | Array, metric: str, impl: str, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    rows, centers = open_rows("x", x), finite_rows("centers", centers)
    check_same_width("centers", centers, rows.name, rows.like)
    if len(centers) == 0:
        raise ValueError("centers must have at least one row: got 0")
    steps = _steps(impl, rows.device)
    labels, distances, begin = [], [], 0
    with torch.autocast(rows.device.type, enabled=False):
        wide = compute_dtype(rows.like, centers)
        prepared = prepare(centers.to(wide), metric, dtype=torch.float64 if wide == torch.float64 else dtype)
        for chunk in rows.chunks():
            of_chunk = steps.assign(chunk, prepared)
            # What is not finite shows in its distance: x need not be read twice.
            if not math.isfinite(float(of_chunk[1].sum())):
                rows.refuse_not_finite(chunk, begin)
                _check_range(rows.name, chunk)
                _check_range("centers", centers)
            labels.append(of_chunk[0])
            distances.append(of_chunk[1].float())
            begin += len(chunk)
    if begin == len(labels[0]):  # one chunk, which need not be copied
        return labels[0], distances[0]
    return torch.cat(labels), torch.cat(distances)


def _steps(impl: str, device: torch.device) -> ModuleType:
    """Module that computes the passes."""
    return load("kmeans", resolve("kmeans", impl, device))


def _check_range(name: str, x: Tensor) -> None:
    """Raises where squared distances would overflow fp64, which takes the place of other dtypes where theirs would."""
    largest, most = float(x.abs().max()), math.sqrt(torch.finfo(torch.float64).max / (8 * x.shape[1]))
    if largest > most:
        raise ValueError(f"{name} must be at most {most:.3g} by magnitude for {x.shape[1]} features: got {largest:.3g}")


def _rounded(x: float) -> float:
    """Rounds to the 24 bits of fp32, in any range."""
    if not math.isfinite(x):
        return x
    fraction, exponent = math.frexp(x)
    return math.ldexp(round(fraction * 2**24), exponent - 24)


def _digest(init: str | Tensor) -> str:
    """What tells whether ranks were given the same."""
    if isinstance(init, str):
        return init
    digest = hashlib.sha256(init.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    return f"centres {list(init.shape)} of {init.dtype}, sha256 {digest[:16]}"


def finite_rows(name: str, x: object) -> Tensor:
    """Rows in memory as a tensor without a graph; the first one that is not finite is named."""
    rows = open_rows(name, x)
    rows.survey()
    return rows.load()
