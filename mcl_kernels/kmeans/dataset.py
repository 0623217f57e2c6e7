"""The data set of a fit: the rows of all processes of a team, one process after the other in the order of their ranks.

A position is the index of a row in the data set. `held` is the range of positions that this process has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy

import torch
from torch import Tensor

from mcl_kernels.kmeans.rows import ChunkedRows, Extremes, Rows, TensorRows
from mcl_kernels.kmeans.team import Team
from mcl_kernels.kmeans.weights import Weights, as_weights
from mcl_kernels.normalize import compute_dtype


class Dataset:
    """Rows [N, width]. All processes call each method together, `chunks` and `weights_of` excepted."""

    weights: Weights | None = None

    def __init__(self, rows: Rows, team: Team, extremes: Extremes | None = None) -> None:
        self.rows, self.team, self.extremes = rows, team, extremes
        self.name, self.width, self.device = rows.name, rows.width, rows.device
        self.centers_like = rows.like.to(compute_dtype(rows.like))  # [0, width], in the dtype of public centres
        counts = torch.zeros(team.size, dtype=torch.int64, device="cpu")
        with team.keeping_errors():
            counts[team.rank] = rows.count(extremes)
        (counts,) = team.total(counts)
        ends = counts.cumsum(0).tolist()
        self.n = ends[-1]
        self.held = range(ends[team.rank] - int(counts[team.rank]), ends[team.rank])

    def set_weights(self, sample_weight: object) -> None:
        """Gives each row of this process a weight."""
        every = torch.zeros(self.n, dtype=torch.float64, device="cpu")
        held = slice(self.held.start, self.held.stop)
        with self.team.keeping_errors():
            every[held] = as_weights(sample_weight, len(self.held), self.name)
        (every,) = self.team.total(every)
        self.weights = Weights.of(every, held, self.device)

    def weights_of(self, here: slice) -> Tensor | None:
        """Returns the weights of a slice of this process's rows, fp64; None without weights."""
        return None if self.weights is None else self.weights.held[here]

    def without_weights(self) -> Dataset:
        """Returns the same rows without weights."""
        data = copy(self)
        data.weights = None
        return data

    @property
    def total_weight(self) -> float:
        """Sum of the weights of all rows, each 1 if none are given."""
        return self.n if self.weights is None else self.weights.total

    def survey(self, middle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the smallest and the largest entry of each column, and the smallest nonzero distance to `middle`.

        [width] each. The distance is infinite if all entries are equal, and for a column whose value in `middle` is
        NaN. Raises a ValueError that names the first row that is not finite.
        """
        found = torch.zeros(self.team.size, 3, self.width, dtype=self.centers_like.dtype, device=self.device)
        with self.team.keeping_errors():
            found[self.team.rank] = torch.stack(self.rows.survey(self.extremes, middle)[1:])
        (found,) = self.team.total(found)
        return found[:, 0].amin(0), found[:, 1].amax(0), found[:, 2].amin(0)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields the rows of this process in chunks, each with its slice of these rows."""
        begin = 0
        with self.team.keeping_errors():
            for chunk in self.rows.chunks():
                if len(chunk):
                    yield slice(begin, begin + len(chunk)), chunk
                begin += len(chunk)

    def take(self, index: Tensor) -> Tensor:
        """Returns the rows at ascending positions, on every process."""
        return self.team.join(self._take_held(index), self._is_held(index))

    def in_memory(self) -> Tensor | None:
        """Returns all rows if this process has them as a tensor, whose rows are not copied."""
        return self.rows.x if isinstance(self.rows, TensorRows) and self.team.size == 1 else None

    def load(self) -> Tensor:
        """Returns all rows, on every process."""
        rows = self.rows.like
        with self.team.keeping_errors():
            rows = self.rows.load()
        return self.team.join(rows, self._is_held(torch.arange(self.n, device="cpu")))

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yields batches of `size` rows, N rows in all: the rows of each that this process holds, and their weights.

        Rows are drawn at random with replacement, by the generator of the first process. Chunks of an iterable come in
        their order instead.
        """
        if isinstance(self.rows, ChunkedRows):
            begin = 0
            for chunk in self.rows.chunks_of(min(size, self.n)):
                yield chunk, self.weights_of(slice(begin, begin + len(chunk)))
                begin += len(chunk)
            return
        generator.set_state(self.team.broadcast(generator.get_state()))
        for begin in range(0, self.n, size):
            index = torch.randint(self.n, (min(size, self.n - begin),), generator=generator, device="cpu")
            index = index.sort().values
            weights = None if self.weights is None else self.weights.every[index[self._is_held(index)]].to(self.device)
            yield self._take_held(index), weights

    def compute_on_first(self, compute: Callable[[], Tensor]) -> Tensor:
        """Computes rows in the dtype of centres on the first process; returns these, bit for bit, on every process."""
        return self.team.compute_on_first(compute, self.centers_like)

    def _take_held(self, index: Tensor) -> Tensor:
        with self.team.keeping_errors():
            return self.rows.take(index[self._is_held(index)] - self.held.start)
        return self.rows.like  # after an error, which the next reduction raises

    def _is_held(self, index: Tensor) -> Tensor:
        return (index >= self.held.start) & (index < self.held.stop)
