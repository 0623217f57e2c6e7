"""Initial centres: rows of a sample, by greedy k-means++ or at random."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mcl_kernels.backends import native
from mcl_kernels.kmeans.centers import multiply
from mcl_kernels.kmeans.dataset import Dataset
from mcl_kernels.kmeans.passes import Problem

# The sample has at most SAMPLE_ROWS rows and SAMPLE_ELEMENTS elements, but enough rows for each cluster.
SAMPLE_ROWS = 1 << 16
SAMPLE_ELEMENTS = 1 << 25
SAMPLE_ROWS_PER_CLUSTER = 16
# Codes of a byte an element save reads of rows, except of short ones. Making them takes as long as about ten steps.
MIN_CODED_WIDTH, MIN_CODED_CLUSTERS = 64, 16

_log = logging.getLogger(__name__)


class Sample(NamedTuple):
    """Rows that an initialisation draws from: all of `rows`, or those at `positions`, which are not copied."""

    rows: Tensor
    weights: Tensor | None  # fp64, on the CPU
    positions: Tensor | None = None  # int64, ascending, on the CPU

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.rows if self.positions is None else self.positions)

    def take(self, index: Tensor | None = None) -> Tensor:
        """Returns the rows at an index into the sample, on any device; by default all rows."""
        if self.positions is not None:
            index = self.positions if index is None else self.positions[index.to(self.positions.device)]
        return self.rows if index is None else self.rows[index.to(self.rows.device)]


def sample_size(n_clusters: int, width: int) -> int:
    """Number of rows that an initialisation draws from, of a larger data set."""
    return max(SAMPLE_ROWS_PER_CLUSTER * n_clusters, min(SAMPLE_ROWS, SAMPLE_ELEMENTS // width))


def draw_sample(data: Dataset, size: int, generator: torch.Generator) -> Sample:
    """Returns `size` distinct rows drawn at random, in order; all rows of a smaller data set."""
    if data.n <= size:
        return Sample(data.load(), None if data.weights is None else data.weights.every)
    if data.weights is not None:
        return _draw_weighted_sample(data, data.weights.every, size, generator)
    drawn = torch.empty(0, dtype=torch.int64, device="cpu")
    while len(drawn) < size:
        more = torch.randint(data.n, (size - len(drawn),), generator=generator, device="cpu")
        drawn = torch.unique(torch.cat((drawn, more)))
    return _sample_at(data, drawn, None)


def _draw_weighted_sample(data: Dataset, weights: Tensor, size: int, generator: torch.Generator) -> Sample:
    """Draws rows by priority sampling (Duffield, Lund and Thorup 2007), which keeps the expected weight of any rows.

    The rows with the highest priorities w_i / u_i are drawn, where u_i is uniform. A drawn row has its weight, or the
    highest priority of the others if that is more. Rows of weight 0 are never drawn.
    """
    uniform = torch.rand(data.n, dtype=torch.float64, generator=generator, device="cpu")
    highest = torch.from_numpy(weights.numpy() / (1 - uniform.numpy())).topk(size + 1)  # in one thread
    drawn = highest.indices[:size].sort().values
    drawn = drawn[weights[drawn] > 0]
    return _sample_at(data, drawn, weights[drawn].clamp(min=float(highest.values[size])))


def _sample_at(data: Dataset, drawn: Tensor, weights: Tensor | None) -> Sample:
    x = data.in_memory()
    return Sample(data.take(drawn), weights) if x is None else Sample(x, weights, drawn)


def initial_centers(problem: Problem, sample: Sample, n_clusters: int, init: str, generator: torch.Generator) -> Tensor:
    """Returns rows of the sample as centres: random ones for "random", else those of greedy k-means++.

    k-means++ draws each next centre with probability proportional to the squared distance to the nearest centre so
    far, times the weight of the row. The greedy form draws 2 + log K candidates and keeps the best, as scikit-learn
    does. If fewer than `n_clusters` rows differ, it returns fewer centres.
    """
    if init == "random":
        if sample.weights is None:
            chosen = torch.randperm(sample.size, generator=generator, device="cpu")[:n_clusters]
        else:
            chosen = torch.multinomial(sample.weights, n_clusters, generator=generator)
        return problem.as_points(sample.take(chosen))
    is_native = native.unavailable_reason(sample.rows.device) is None
    if not is_native or problem.metric == "cosine" or sample.rows.dtype != problem.summary.dtype:
        sample = Sample(problem.as_points(sample.take()), sample.weights)
    steps: _NativeSteps | _TorchSteps
    if is_native:
        coded = sample.rows.shape[1] >= MIN_CODED_WIDTH and n_clusters >= MIN_CODED_CLUSTERS
        steps = _NativeSteps(sample, problem.summary.offset, coded)
    else:
        steps = _TorchSteps(sample.rows, problem.summary.offset, sample.weights)
    n_candidates = 2 + int(math.log(n_clusters))
    if sample.weights is None:
        centers = torch.randint(sample.size, (1,), generator=generator, device="cpu")
    else:
        centers = torch.multinomial(sample.weights, 1, generator=generator)
    device = sample.rows.device
    centers = centers.to(device)
    steps.add_best(centers, centers[:0])
    while len(centers) < n_clusters:
        _log.info("k-means++: %d of %d centres", len(centers), n_clusters)
        nearest = steps.nearest if steps.weights is None else steps.nearest * steps.weights
        cumulative = nearest.cumsum(0).cpu()
        if cumulative[-1] == 0:
            break
        # side="right" never draws a row of distance 0, which is a centre already, or of weight 0.
        drawn = torch.rand(n_candidates, dtype=torch.float64, generator=generator, device="cpu") * cumulative[-1]
        candidates = torch.searchsorted(cumulative, drawn, right=True).clamp(max=sample.size - 1).to(device)
        best = steps.add_best(candidates, centers)
        centers = torch.cat((centers, candidates[best : best + 1]))
    return sample.take(centers)


class _NativeSteps:
    """Steps of greedy k-means++ by the C++ kernels, which skip rows that no candidate is nearer to."""

    def __init__(self, sample: Sample, offset: Tensor, coded: bool) -> None:
        self.nearest = torch.full((sample.size,), torch.inf, dtype=torch.float64, device="cpu")  # squared distances
        codes = native.ops().code_rows(sample.rows, offset, sample.positions) if coded else ()
        self._rows, self._positions, self.weights = (sample.rows, offset, codes), sample.positions, sample.weights
        self._labels = torch.zeros(sample.size, dtype=torch.int32, device="cpu")
        self._compared = sample.size

    def add_best(self, candidates: Tensor, centers: Tensor) -> int:
        """Adds the candidate that lowers the sum of `nearest` most to the centres; returns its position."""
        best, self._compared = native.ops().add_center(
            *self._rows,
            candidates,
            centers,
            self.nearest,
            self._labels,
            self._compared,
            self.weights,
            self._positions,
        )
        return int(best)


class _TorchSteps:
    """The same steps in PyTorch, for GPUs and machines without a compiler."""

    def __init__(self, x: Tensor, offset: Tensor, weights: Tensor | None = None) -> None:
        self.nearest = x.new_full((len(x),), torch.inf, dtype=torch.float64)
        self.weights = None if weights is None else weights.to(x.device)
        self._squared_distances = _squared_distances_among(x, offset)

    def add_best(self, candidates: Tensor, centers: Tensor) -> int:
        """As above; the centres so far are in `nearest`."""
        reachable = torch.minimum(self.nearest, self._squared_distances(candidates))
        best = int((reachable if self.weights is None else reachable * self.weights).sum(1).argmin())
        self.nearest = reachable[best]
        return best


def _squared_distances_among(x: Tensor, offset: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns a function of an index of rows: |x_i - x_j|^2 for each row i of it and all rows j, fp64 [len(index), N].

    The distance of equal rows is exactly 0.
    """
    relative = x - offset
    squares, tiny = relative.square().sum(1), torch.finfo(x.dtype).tiny

    def squared_distances(index: Tensor) -> Tensor:
        scale = squares[index].unsqueeze(1) + squares
        squared = scale - 2 * multiply(relative[index], relative)
        # The product loses the digits of small distances, which are therefore computed from differences.
        close = squared <= 1e-3 * scale + tiny
        squared = squared.double()
        near = close.any(0).nonzero().squeeze(1)
        exact = torch.cdist(x[index].double(), x[near].double(), compute_mode="donot_use_mm_for_euclid_dist").square()
        squared[:, near] = torch.where(close[:, near], exact, squared[:, near])
        return squared

    return squared_distances
