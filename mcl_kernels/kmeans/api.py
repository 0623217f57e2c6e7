"""The public class `KMeans`: arguments, checks and results, named as in scikit-learn."""

from __future__ import annotations

import hashlib
import math
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mcl_kernels._validate import as_integer, as_number, check_choice, check_flag, check_same_width
from mcl_kernels.backends.table import IMPLS
from mcl_kernels.distributed.group import ranks_of
from mcl_kernels.kmeans.assign import METRICS, check_range, find_nearest, finite_rows, load_implementation
from mcl_kernels.kmeans.centers import SURVEYED_ROWS, summarize, survey_columns
from mcl_kernels.kmeans.dataset import Dataset
from mcl_kernels.kmeans.files import Saveable
from mcl_kernels.kmeans.initial import draw_sample, initial_centers, sample_size
from mcl_kernels.kmeans.lloyd import Restart, lloyd, mini_batches
from mcl_kernels.kmeans.passes import Problem
from mcl_kernels.kmeans.rows import Array, ChunkedRows, Rows, RowsLike, open_rows
from mcl_kernels.kmeans.team import Team, open_with_group
from mcl_kernels.normalize import compute_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class KMeans(Saveable):
    """Lloyd's k-means, named as in scikit-learn, for data in memory or larger than memory.

        inertia = sum_i min_k |x_i - c_k|^2                             metric="euclidean"
        inertia = sum_i min_k (1 - <x_i, c_k> / (|x_i| |c_k|))          metric="cosine" (spherical k-means)

    Labels are correct for any data: of magnitudes from 1e-30 to 1e30, far from 0, with rows or centres far from the
    others. If rounding could decide which centre is nearest, distances are computed from differences in fp64. All
    distances are computed in fp64 if their squares would leave the range of fp32.

    An iteration reads the rows whose label may change. Sums over the data are fp64 and exact: the same for any number
    of threads and any chunks. Random numbers come from a separate generator, so that the same seed gives the same
    clusters and PyTorch's global random state does not change. Memory beyond the data: N labels twice, of 4 and 8
    bytes; with bounds 8 bytes for each row, and above K = 16 4 (1 + K / 24), at most 64; two copies of the sample for
    the initialisation, three for cosine; two chunks of 64 MiB if the data is not a tensor or an array; N labels and
    distances more if a cluster is empty.

    With a `group`, each rank passes its shard of the rows, and all ranks fit together. The clusters are those of one
    process with the shards one after the other and the same seed, bit for bit if the ranks run the same build on the
    same kind of CPU or GPU; objectives and inertia are equal to rounding. An iteration is one all-reduce of K D + K + 3
    fp64 elements (one for each mini-batch) and at most three broadcasts of one. In the memory above, N is then the rows
    of the shard. Every rank holds the sample, but only the first one computes with it.

    Args:
        n_clusters: K, from 1 to the number of rows. If fewer rows differ, fewer clusters are found, with a warning.
        metric: "euclidean" or "cosine"; the latter needs no normalised input.
        init: "k-means++" (greedy, as in scikit-learn), "random" rows, or centres [K, D] (a tensor or an array). For a
            large data set the first two use a sample of `init_rows_` rows drawn at random: at most 65,536, fewer if D
            is above 512, but at least 16 K.
        n_init: number of restarts; the one with the lowest inertia is kept.
        max_iter: maximum number of iterations of one restart.
        tol: a restart has converged when the summed squared shift of the centres is at most tol times the mean
            variance of the columns (of the normalised rows for cosine).
        batch_size: None, or the number of rows of a mini-batch. Each batch moves a centre to the mean of all rows that
            batches have assigned to it so far. An iteration is a number of batches of N rows in all, drawn with
            replacement (chunks of an iterable: in their order).
        empty: "split": an empty cluster takes the farthest row of the largest one. Counted in `history_`.
        seed: seed of the random numbers.
        bounds: skip rows that keep their label, as bounds of their distances prove (impl="native"; others read all
            rows). The result is the same, bit for bit.
        impl: "native" (C++ kernels, on a CPU), "triton" (kernels for CUDA), "cuda" (CUDA C++ kernels, if the
            installation built them), "reference" (PyTorch by tiles) or "auto": the first of them that runs on the
            device of the data. `capabilities()` lists what is unavailable, and why.
            "faiss" finds the nearest centres with that library, on the GPUs that it supports.
        group: None, or a `torch.distributed` process group; every rank of it calls `fit`.

    Attributes:
        cluster_centers_: [K, D] fp32 (fp64 for fp64 data), of unit length for cosine, on the device of the data.
        labels_: int64 [N], equal to `predict` of the same rows. With a group these are the rows of this rank; all
            other attributes are of the rows of all ranks.
        inertia_: float, the inertia of `labels_` and `cluster_centers_`.
        n_iter_: number of iterations of the best restart.
        init_rows_: number of rows of the sample for the initialisation; 0 if centres were given.
        history_: a dictionary for each iteration of the best restart: objective, shift, seconds, imbalance (size of the
            largest cluster over the mean size), splits, read (share of the rows that was read).

    Raises:
        TypeError, ValueError: invalid arguments; rows with NaN or infinity (the error names the first one), or with
            entries whose squares overflow fp64; a truncated file; an iterable of empty or differing chunks, or of
            other rows in a later pass. With a group also arguments that differ between ranks, and a batch_size if x is
            an iterable. If one rank cannot read its rows it raises the cause, and the others a ValueError that names
            the rank.

    Source: Lloyd 1982; Arthur and Vassilvitskii 2007 for the initialisation; Hamerly 2010 and Ding et al. 2015 for the
    bounds; Sculley 2010 for mini-batches.

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
    _dtype: torch.dtype  # of products; `predict` uses the same, so that even labels of ties are the same

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
        bounds: bool = True,
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
        check_flag("bounds", bounds)
        self.bounds = bounds
        self.empty = empty
        self.impl = impl
        self.ranks = None if group is None else ranks_of(group)

    def fit(self, x: RowsLike) -> KMeans:
        """Clusters the rows of x, [N, D], and sets the attributes.

        Args:
            x: a tensor of any floating dtype; an array; a memory map, whose file is read in chunks and never held in
                memory as a whole; or an iterable of chunks of rows (a DataLoader, say), which is iterated once for each
                pass and has to yield the same rows in the same order every time. With a group, the shard of this rank,
                which may have no rows: [0, D].

        Returns:
            This object.

        Raises:
            TypeError, ValueError: rows that the class lists.
        """
        rows, team = self._open(x)
        if isinstance(self.init, Tensor):
            check_same_width("init", self.init, rows.name, rows.like)
            check_range("init", self.init.to(compute_dtype(rows.like)))
        with torch.autocast(rows.device.type, enabled=False):
            implementation = load_implementation(self.impl, rows.device)
            data = Dataset(rows, team, getattr(implementation, "extremes", None))
            # Before the survey, whose memory grows with the width.
            if data.n < self.n_clusters:
                message = f"got {self.n_clusters} for {data.n} rows"
                raise ValueError(f"n_clusters must be at most the number of rows: {message}")
            generator = torch.Generator().manual_seed(self.seed)
            problem, sample = self._prepare(data, implementation, generator)
            restarts = (self._run(problem, sample, generator) for _ in range(self.n_init))
            # Inertia to 24 bits: the order of its sum, which depends on chunks and shards, must not decide a tie.
            best = min(restarts, key=lambda restart: _rounded(restart.inertia))
        if len(best.centers) < self.n_clusters:
            warnings.warn(
                f"n_clusters={self.n_clusters} but only {len(best.centers)} clusters hold a row: too few rows differ",
                stacklevel=2,
            )
        self.cluster_centers_, self.labels_, self.inertia_, self.history_ = best
        self.n_iter_ = len(self.history_)
        self._dtype = problem.summary.dtype
        self.init_rows_ = 0 if isinstance(self.init, Tensor) else len(sample)
        return self

    def predict(self, x: RowsLike) -> Tensor:
        """Returns the nearest centre of each row of x (anything that `fit` takes), int64 [N].

        Ranks of a group call it independently.

        Raises:
            RuntimeError: `fit` was not called.
            TypeError, ValueError: rows that the class lists, or of another width than those of `fit`.
        """
        if not hasattr(self, "cluster_centers_"):
            raise RuntimeError("this KMeans has no clusters yet: call fit(x) first")
        return find_nearest(x, self.cluster_centers_, self.metric, self.impl, self._dtype)[0]

    def fit_predict(self, x: RowsLike) -> Tensor:
        """Returns `fit(x).labels_`."""
        return self.fit(x).labels_

    def _open(self, x: RowsLike) -> tuple[Rows, Team]:
        """Opens the rows of this process, for a fit alone or by all ranks of the group."""
        if self.ranks is None:
            return open_rows("x", x), Team()

        def open_local() -> Rows:
            rows = open_rows("x", x)
            load_implementation(self.impl, rows.device)  # raises if it does not run on this rank
            if self.batch_size is not None and isinstance(rows, ChunkedRows):
                raise ValueError("batch_size with a group draws rows of x: got an iterable, which is read in order")
            return rows

        names = ("n_clusters", "metric", "n_init", "max_iter", "tol", "batch_size", "empty", "seed", "bounds")
        arguments = {"init": _described_init(self.init), **{name: getattr(self, name) for name in names}}
        return open_with_group(open_local, self.ranks, arguments)

    def _prepare(self, data: Dataset, implementation: ModuleType, generator: torch.Generator) -> tuple[Problem, Tensor]:
        """Surveys the data; returns the problem that restarts solve, and the sample that initialisations draw from."""
        low, high = data.survey()
        check_range(data.name, torch.stack((low, high)))
        has_centers = isinstance(self.init, Tensor)
        size = SURVEYED_ROWS if has_centers else sample_size(self.n_clusters, data.width)
        sample = draw_sample(data, size, generator)
        middle, scale = data.compute_on_first(lambda: survey_columns(sample, self.metric).to(compute_dtype(sample)))
        # The sample holds none of the entries that make these columns vary.
        unknown = ((scale == 0) & (high > low)).nonzero().squeeze(1)
        if len(unknown):
            scale[unknown] = data.smallest_distances(unknown, middle[unknown])
        summary = summarize(data.n, low, high, middle, scale, self.metric, self.init)
        return Problem(data, summary, self.metric, implementation, self.bounds), sample

    def _run(self, problem: Problem, sample: Tensor, generator: torch.Generator) -> Restart:
        """Runs one restart."""
        public_dtype = compute_dtype(sample)

        def start() -> Tensor:
            if isinstance(self.init, Tensor):
                return problem.as_points(self.init).to(public_dtype)
            return initial_centers(problem, sample, self.n_clusters, self.init, generator).to(public_dtype)

        points = problem.data.compute_on_first(start).to(problem.summary.dtype)
        if self.batch_size is None:
            return lloyd(problem, points, self.max_iter, self.tol)
        return mini_batches(problem, points, self.max_iter, self.tol, self.batch_size, generator)


def _rounded(x: float) -> float:
    """Rounds to the 24 bits of fp32, in the range of fp64."""
    if not math.isfinite(x):
        return x
    fraction, exponent = math.frexp(x)
    return math.ldexp(round(fraction * 2**24), exponent - 24)


def _described_init(init: str | Tensor) -> str:
    """Text that differs between ranks if their `init` does."""
    if isinstance(init, str):
        return init
    digest = hashlib.sha256(init.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    return f"centres {list(init.shape)} of {init.dtype}, sha256 {digest[:16]}"
