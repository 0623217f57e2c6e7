"""Initial centres: rows of a sample, by greedy k-means++ or at random."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

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


def sample_size(n_clusters: int, width: int) -> int:
    """Number of rows that an initialisation draws from, of a larger data set."""
    return max(SAMPLE_ROWS_PER_CLUSTER * n_clusters, min(SAMPLE_ROWS, SAMPLE_ELEMENTS // width))


def draw_sample(data: Dataset, size: int, generator: torch.Generator) -> Tensor:
    """Returns `size` distinct rows drawn at random, in order; all rows of a smaller data set."""
    if data.n <= size:
        return data.load()
    drawn = torch.empty(0, dtype=torch.int64, device="cpu")
    while len(drawn) < size:
        more = torch.randint(data.n, (size - len(drawn),), generator=generator, device="cpu")
        drawn = torch.unique(torch.cat((drawn, more)))
    return data.take(drawn)


def initial_centers(problem: Problem, sample: Tensor, n_clusters: int, init: str, generator: torch.Generator) -> Tensor:
    """Returns rows of the sample as centres: random ones for "random", else those of greedy k-means++.

    k-means++ draws each next centre with probability proportional to the squared distance to the nearest centre so
    far. The greedy form draws 2 + log K candidates and keeps the best, as scikit-learn does. If fewer than `n_clusters`
    rows differ, it returns fewer centres.
    """
    if init == "random":
        chosen = torch.randperm(len(sample), generator=generator, device="cpu")[:n_clusters]
        return problem.as_points(sample[chosen.to(sample.device)])
    x = problem.as_points(sample)
    steps: _NativeSteps | _TorchSteps
    if native.unavailable_reason(x.device) is None:
        coded = x.shape[1] >= MIN_CODED_WIDTH and n_clusters >= MIN_CODED_CLUSTERS
        steps = _NativeSteps(x, problem.summary.offset, coded)
    else:
        steps = _TorchSteps(x, problem.summary.offset)
    n_candidates = 2 + int(math.log(n_clusters))
    centers = torch.randint(len(x), (1,), generator=generator, device="cpu").to(x.device)
    steps.add_best(centers, centers[:0])
    while len(centers) < n_clusters:
        _log.info("k-means++: %d of %d centres", len(centers), n_clusters)
        cumulative = steps.nearest.cumsum(0).cpu()
        if cumulative[-1] == 0:
            break
        # side="right" never draws a row of distance 0, which is a centre already.
        drawn = torch.rand(n_candidates, dtype=torch.float64, generator=generator, device="cpu") * cumulative[-1]
        candidates = torch.searchsorted(cumulative, drawn, right=True).clamp(max=len(x) - 1).to(x.device)
        best = steps.add_best(candidates, centers)
        centers = torch.cat((centers, candidates[best : best + 1]))
    return x[centers]


class _NativeSteps:
    """Steps of greedy k-means++ by the C++ kernels, which skip rows that no candidate is nearer to."""

    def __init__(self, x: Tensor, offset: Tensor, coded: bool) -> None:
        self.nearest = torch.full((len(x),), torch.inf, dtype=torch.float64, device="cpu")  # squared distances
        codes = native.ops().code_rows(x, offset) if coded else ()
        self._rows = x, offset, codes
        self._labels = torch.zeros(len(x), dtype=torch.int32, device="cpu")
        self._compared = len(x)

    def add_best(self, candidates: Tensor, centers: Tensor) -> int:
        """Adds the candidate that lowers the sum of `nearest` most to the centres; returns its position."""
        best, self._compared = native.ops().add_center(
            *self._rows, candidates, centers, self.nearest, self._labels, self._compared
        )
        return int(best)


class _TorchSteps:
    """The same steps in PyTorch, for GPUs and machines without a compiler."""

    def __init__(self, x: Tensor, offset: Tensor) -> None:
        self.nearest = x.new_full((len(x),), torch.inf, dtype=torch.float64)
        self._squared_distances = _squared_distances_among(x, offset)

    def add_best(self, candidates: Tensor, centers: Tensor) -> int:
        """As above; the centres so far are in `nearest`."""
        reachable = torch.minimum(self.nearest, self._squared_distances(candidates))
        best = int(reachable.sum(1).argmin())
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
