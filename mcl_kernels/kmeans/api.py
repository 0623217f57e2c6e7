"""The public class `KMeans`: arguments, checks and results, named as in scikit-learn."""

from __future__ import annotations

import hashlib
import math
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mcl_kernels._validate import check_same_width
from mcl_kernels.kmeans.assign import check_range, load_implementation
from mcl_kernels.kmeans.dataset import Dataset
from mcl_kernels.kmeans.estimator import Estimator, column_names
from mcl_kernels.kmeans.files import Saveable
from mcl_kernels.kmeans.initial import Sample, draw_sample, initial_centers, sample_size
from mcl_kernels.kmeans.lloyd import Restart, lloyd, mini_batches
from mcl_kernels.kmeans.passes import Problem
from mcl_kernels.kmeans.rows import ChunkedRows, Rows, RowsLike, open_rows
from mcl_kernels.kmeans.settings import Settings, check_settings
from mcl_kernels.kmeans.summary import SURVEYED_ROWS, summarize, survey_columns
from mcl_kernels.kmeans.team import Team, open_with_group
from mcl_kernels.normalize import compute_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Self


class KMeans(Estimator, Saveable):
    """Lloyd's k-means, named as in scikit-learn, for data in memory or larger than memory.

        inertia = sum_i w_i min_k |x_i - c_k|^2                         metric="euclidean"
        inertia = sum_i w_i min_k (1 - <x_i, c_k> / (|x_i| |c_k|))      metric="cosine" (spherical k-means)

    The weights w_i are 1, unless `fit` is given others.

    Labels are correct for any data: of magnitudes from 1e-30 to 1e30, far from 0, with rows or centres far from the
    others. If rounding could decide which centre is nearest, distances are computed from differences in fp64. All
    distances are computed in fp64 if their squares would leave the range of fp32.

    On a CPU an iteration reads the rows whose label may change. Sums over the data are fp64 and exact: the same for
    any number of threads and any chunks. Random numbers come from a separate generator, so that the same seed gives
    the same clusters and PyTorch's global random state does not change. Memory beyond the data: N labels twice, of
    4 and 8 bytes; bounds of 8 bytes for each row, above K = 32 of 4 (1 + K / 32), at most 64; a quarter of the sample
    for the initialisation, and two copies of it for cosine or if the data is not a tensor or an array; 8 bytes for
    each weight; two chunks of 64 MiB if the data is not a tensor or an array; N labels and distances more if a cluster
    is empty.

    With a `group`, each rank passes its shard of the rows, and all ranks fit together. The clusters are those of one
    process with the shards one after the other and the same seed, bit for bit if the ranks run the same build on the
    same kind of CPU or GPU; objectives and inertia are equal to rounding. An iteration is usually one all-reduce of K D
    + K + 3 fp64 elements (one for each mini-batch) and at most three broadcasts of one. In the memory above, N is then
    the rows of the shard. Every rank holds the sample and the weights of all rows, but only the first one computes with
    the sample.

    Args:
        n_clusters: K, from 1 to the number of rows. If fewer rows differ, fewer clusters are found, with a warning.
        metric: "euclidean" or "cosine"; the latter needs no normalised input.
        init: "k-means++" (greedy, as in scikit-learn), "random" rows, or centres [K, D] (a tensor or an array). For a
            large data set the first two use a sample of `init_rows_` rows drawn at random: at most 65,536, fewer if D
            is above 512, but at least 16 K.
        n_init: number of restarts; the one with the lowest inertia is kept. "auto" is 10 for init="random", else 1.
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
        n_features_in_: D.
        feature_names_in_: names of the columns of a DataFrame, if all are strings; other names are refused later.
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

    inertia_: float
    n_iter_: int
    init_rows_: int
    history_: list[dict[str, Any]]

    def __init__(
        self,
        n_clusters: int,
        *,
        metric: str = "euclidean",
        init: str | RowsLike = "k-means++",
        n_init: int | str = 1,
        max_iter: int = 100,
        tol: float = 1e-4,
        batch_size: int | None = None,
        empty: str = "split",
        seed: int = 0,
        bounds: bool = True,
        impl: str = "auto",
        group: ProcessGroup | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.metric = metric
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.batch_size = batch_size
        self.empty = empty
        self.seed = seed
        self.bounds = bounds
        self.impl = impl
        self.group = group
        check_settings(self)  # the arguments stay as they were given, since scikit-learn's `clone` compares them

    def fit(self, x: RowsLike, y: object = None, sample_weight: object = None) -> Self:
        """Clusters the rows of x, [N, D], and sets the attributes.

        Args:
            x: a tensor of any floating dtype; an array; a DataFrame of numeric columns, or anything else with
                `to_numpy` (integers become fp64); a memory map, whose file is read in chunks and never held in memory
                as a whole; or an iterable of chunks of rows (a DataLoader, say), which is iterated once for each pass
                and has to yield the same rows in the same order every time. With a group, the shard of this rank,
                which may have no rows: [0, D].
            y: ignored; for a `Pipeline` of scikit-learn.
            sample_weight: None, or the weights w_i of the rows, [N]: finite numbers of at least 0 in a tensor, an
                array, a list or a Series, on any device. A row of weight 0 has a label but is in no mean, and so is one
                below 2^-100 of the largest weight. With a group, the weights of the shard of this rank.

        Returns:
            This object.

        Raises:
            TypeError, ValueError: rows that the class lists; a `sample_weight` of another type or length, with a weight
                that is negative or not finite, or with fewer positive weights than clusters.
        """
        settings, names = check_settings(self), column_names(x)
        rows, team = _open(x, settings, sample_weight is not None)
        if isinstance(settings.init, Tensor):
            check_same_width("init", settings.init, rows.name, rows.like)
            check_range("init", settings.init.to(compute_dtype(rows.like)))
        with torch.autocast(rows.device.type, enabled=False):
            implementation = load_implementation(settings.impl, rows.device)
            data = Dataset(rows, team, getattr(implementation, "extremes", None))
            # Before the survey, whose memory grows with the width.
            if data.n < settings.n_clusters:
                message = f"got {settings.n_clusters} for {data.n} rows"
                raise ValueError(f"n_clusters must be at most the number of rows: {message}")
            if sample_weight is not None:
                data.set_weights(sample_weight)
            if data.weights is not None and data.weights.n_positive < settings.n_clusters:
                message = f"got {settings.n_clusters} for {data.weights.n_positive} of {data.n} rows"
                raise ValueError(f"n_clusters must be at most the number of rows of positive weight: {message}")
            generator = torch.Generator().manual_seed(settings.seed)
            problem, sample = _prepare(data, settings, implementation, generator)
            restarts = (_run(problem, settings, sample, generator) for _ in range(settings.n_restarts))
            # Inertia to 24 bits: the order of its sum, which depends on chunks and shards, must not decide a tie.
            best = min(restarts, key=lambda restart: _rounded(restart.inertia))
        if len(best.centers) < settings.n_clusters:
            warnings.warn(
                f"n_clusters={settings.n_clusters} but only {len(best.centers)} clusters hold a row: "
                "too few rows differ",
                stacklevel=2,
            )
        unit = 1.0 if data.weights is None else data.weights.unit
        self.cluster_centers_, self.labels_, self.inertia_ = best.centers, best.labels, best.inertia * unit
        self.history_ = [entry | {"objective": entry["objective"] * unit} for entry in best.history]
        self.n_iter_ = len(self.history_)
        self._dtype = problem.summary.dtype
        self.init_rows_ = 0 if isinstance(settings.init, Tensor) else sample.size
        if names is not None:
            self.feature_names_in_ = names
        elif hasattr(self, "feature_names_in_"):  # of an earlier fit
            del self.feature_names_in_
        return self


def _open(x: RowsLike, settings: Settings, is_weighted: bool) -> tuple[Rows, Team]:
    """Opens the rows of this process, for a fit alone or by all ranks of the group."""
    if settings.ranks is None:
        return open_rows("x", x), Team()

    def open_local() -> Rows:
        rows = open_rows("x", x)
        load_implementation(settings.impl, rows.device)  # raises if it does not run on this rank
        if settings.batch_size is not None and isinstance(rows, ChunkedRows):
            raise ValueError("batch_size with a group draws rows of x: got an iterable, which is read in order")
        return rows

    names = ("n_clusters", "metric", "n_init", "max_iter", "tol", "batch_size", "empty", "seed", "bounds")
    arguments = {"init": _described_init(settings.init), **{name: getattr(settings, name) for name in names}}
    arguments["sample_weight"] = "given" if is_weighted else None
    return open_with_group(open_local, settings.ranks, arguments)


def _prepare(
    data: Dataset, settings: Settings, implementation: ModuleType, generator: torch.Generator
) -> tuple[Problem, Sample]:
    """Surveys the data; returns the problem that restarts solve, and the sample that initialisations draw from."""
    has_centers = isinstance(settings.init, Tensor)
    size = SURVEYED_ROWS if has_centers else sample_size(settings.n_clusters, data.width)
    sample = draw_sample(data, size, generator)
    middle, scale = data.compute_on_first(
        lambda: survey_columns(sample.rows, settings.metric, sample.positions).to(data.centers_like)
    )
    # The sample holds only one value of a column of scale 0, which other rows may vary.
    low, high, nearest = data.survey(torch.where(scale == 0, middle, math.nan))
    check_range(data.name, torch.stack((low, high)))
    scale = torch.where(nearest.isinf(), scale, nearest)
    summary = summarize(data.n, low, high, middle, scale, settings.metric, settings.init, data.weights)
    return Problem(data, summary, settings.metric, implementation, settings.bounds), sample


def _run(problem: Problem, settings: Settings, sample: Sample, generator: torch.Generator) -> Restart:
    """Runs one restart."""
    public_dtype = problem.data.centers_like.dtype

    def start() -> Tensor:
        if isinstance(settings.init, Tensor):
            return problem.as_points(settings.init).to(public_dtype)
        return initial_centers(problem, sample, settings.n_clusters, settings.init, generator).to(public_dtype)

    points = problem.data.compute_on_first(start).to(problem.summary.dtype)
    if settings.batch_size is None:
        return lloyd(problem, points, settings.max_iter, settings.tol)
    return mini_batches(problem, points, settings.max_iter, settings.tol, settings.batch_size, generator)


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
