"""The summary of a data set from which the precision of its sums and distances follows."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mcl_kernels.kmeans.weights import Weights

Array = np.ndarray[Any, np.dtype[np.float64]]

SURVEYED_ROWS = 256  # enough for the offset and the scale of each column
GATHERED_COLUMNS = 64  # columns copied at a time
SCALE_BITS = 24  # bits of a column's scale that sums keep, as many as fp32 has
# Ratios of a column's largest entry to its scale. Up to MIN_FAR one level of sums is enough for any number of rows. For
# few rows it is enough up to MAX_FAR, above which the fixed point of GPUs would lose bits of the scale.
MIN_FAR, MAX_FAR = 2.0**8, 2.0**11
MIN_EXPONENT = -960
MIN_FP32_DIFFERENCE = 2.0**-40  # fp32 still resolves the squares of such differences


class Summary(NamedTuple):
    """Statistics of the data set that make sums exact, however it is chunked."""

    dtype: torch.dtype  # of products and distances; fp64 for fp32 rows whose squares leave the range of fp32
    offset: Tensor  # [D] in that dtype, about the middle of the data; 0 for cosine
    largest: Tensor  # fp64 [D], a bound of the magnitude of entries relative to the offset
    scale: Tensor  # fp64 [D], of `survey_columns`; 1 for cosine
    rounding: Tensor  # fp64 [levels, D], see `Centers`; with weights [levels, D + 1]

    def for_sums(self, rows: int, weights: Weights | None) -> Summary:
        """Returns the summary for sums of as many rows, times their weights if there are any."""
        rounding = _levels(rows, self.largest.cpu().numpy(), self.scale.cpu().numpy(), weights)
        return self._replace(rounding=torch.from_numpy(rounding).to(self.largest.device))


def survey_columns(x: Tensor, metric: str, positions: Tensor | None = None) -> Tensor:
    """Median of each column, and its scale, [2, D]: the median of the nonzero distances to that median.

    They are of all rows, or of those at `positions`, int64. A few far rows change neither. For cosine the median is
    replaced by 0. The scale is 0 if all entries of the column are equal.
    """
    drawn = every = torch.arange(len(x), device="cpu") if positions is None else positions
    if len(every) > SURVEYED_ROWS:
        generator = torch.Generator().manual_seed(0)
        drawn = every[torch.randint(len(every), (SURVEYED_ROWS,), generator=generator, device="cpu")]
    rows = x[drawn.to(x.device)].double().cpu().numpy()
    middle = np.partition(rows, len(rows) // 2, axis=0)[len(rows) // 2]
    if metric == "cosine":
        middle = np.zeros_like(middle)
    distances = np.sort(np.ascontiguousarray(np.abs(rows - middle).T), axis=1)
    zeros = (distances == 0).sum(1)
    scale = np.take_along_axis(distances, (zeros + len(rows) - 1)[:, None] // 2, axis=1).squeeze(1)
    # The drawn rows hold only the median: take the scale from all rows.
    rare = np.flatnonzero(scale == 0) if len(every) > SURVEYED_ROWS else np.empty(0, np.int64)
    for columns in np.split(rare, range(GATHERED_COLUMNS, len(rare), GATHERED_COLUMNS)):
        entries = x[every.to(x.device).unsqueeze(1), torch.from_numpy(columns).to(x.device)].T.contiguous()
        differing = entries != torch.from_numpy(middle[columns]).to(entries).unsqueeze(1)
        for column, values, differs in zip(columns, entries, differing, strict=True):
            column_distances = (values[differs].double() - middle[column]).abs().cpu().numpy()
            scale[column] = np.median(column_distances) if len(column_distances) else 0.0
    return torch.from_numpy(np.stack((middle, scale))).to(x.device)


def summarize(
    rows: int,
    low: Tensor,
    high: Tensor,
    middle: Tensor,
    scale: Tensor,
    metric: str,
    init: Tensor | str = "",
    weights: Weights | None = None,
) -> Summary:
    """Returns the summary of `rows` rows.

    Args:
        low, high: smallest and largest entry of each column, [D] each.
        middle, scale: offset and scale of each column, [D] each, of `survey_columns`; 0 is the scale of equal entries.
        init: initial centres, if given; their distances have to be in the range of the dtype too.
        weights: weights of the rows, if given.
    """
    largest = torch.maximum(high.double() - middle.double(), middle.double() - low.double())
    farthest, dtype = float(largest.max()), middle.dtype
    if isinstance(init, Tensor):
        farthest = max(farthest, float((init.double() - middle.double()).abs().max()))
    if not fits(farthest, float(scale.max()), len(middle), dtype):
        dtype = torch.float64
    if metric == "cosine":
        largest, scale = torch.ones_like(largest), torch.ones_like(largest)
    return Summary(dtype, middle.to(dtype), largest, scale.double(), largest.unsqueeze(0)).for_sums(rows, weights)


def fits(largest: float, scale: float, width: int, dtype: torch.dtype) -> bool:
    """Returns whether sums of `width` squares, and squares of differences of the scale, are in the range of a dtype."""
    if dtype == torch.float64:
        return True
    return (
        largest <= math.sqrt(torch.finfo(dtype).max / (8 * width)) and (scale or largest or 1.0) >= MIN_FP32_DIFFERENCE
    )


def _levels(rows: int, largest: Array, scale: Array, weights: Weights | None) -> Array:
    """Constants that round the entries of each level of sums, fp64 [levels, D]: see `Centers.rounding`.

    Entries times weights are at most the largest entry times the largest weight, and their sum is at most as large as
    that of `terms` such entries. The column of the weights themselves has entries of 1.
    """
    terms: float = rows
    if weights is not None:
        largest, scale = np.append(largest, 1.0) * weights.largest, np.append(scale, 1.0) * weights.smallest
        terms = max(weights.total / weights.largest, 2.0)
    is_far = largest > scale * min(max(2.0 ** (52 - SCALE_BITS) / terms, MIN_FAR), MAX_FAR)
    levels, bound = [], largest
    while True:
        exponents = np.maximum(np.frexp(bound * terms)[1], MIN_EXPONENT)
        levels.append(np.ldexp(1.5, exponents))
        step = np.ldexp(1.0, exponents - 52)  # entries of this level are rounded to multiples of it
        if not (is_far & (step > np.ldexp(scale, -SCALE_BITS)) & (exponents > MIN_EXPONENT)).any():
            return np.stack(levels)
        bound, terms = step / 2, rows
