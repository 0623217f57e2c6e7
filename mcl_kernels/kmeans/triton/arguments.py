"""Arguments of the kernels that assign rows, in tuples: a kernel has few parameters, and its steps take them on."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RowArguments(NamedTuple):
    """The data."""

    x: Tensor  # [N, D]
    stride: int  # from row to row
    step: int  # from feature to feature


class CenterArguments(NamedTuple):
    """Centres, and the factors of their products: see `make_factors` and `score_limits`."""

    points: Tensor  # [K, D]
    offset: Tensor  # [D]
    high: Tensor  # [K, D], relative to the offset
    low: Tensor | None  # [K, D], the second part for products of 16 bits
    half_norms: Tensor  # [K padded to tiles], infinity past the last centre
    limits: Tensor  # [8]


class ResultArguments(NamedTuple):
    """Results of each row."""

    labels: Tensor  # int64 [N]
    distances: Tensor  # [N]
    undecided: Tensor  # bool [N]
    inverse_norms: Tensor  # [N] for cosine


class PartArguments(NamedTuple):
    """The two lowest scores of each row in each part of the centres."""

    lowest: Tensor  # [parts, N]
    second: Tensor  # [parts, N]
    labels: Tensor  # int32 [parts, N], of the lowest
    squares: Tensor  # [N], sums of squares of the rows as they are multiplied


class SumArguments(NamedTuple):
    """Partial sums of each program, and the fixed-point format of entries: see `fixed_point`."""

    sums: Tensor  # fp64 [programs, D, CLUSTERS]
    counts: Tensor  # int64 [programs, CLUSTERS]
    first_scale: Tensor  # fp32 [D]
    last_rounding: Tensor  # fp32 [D]
