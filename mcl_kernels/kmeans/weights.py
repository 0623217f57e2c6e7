"""Weights of rows: the argument `sample_weight`, and what a fit computes from it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mcl_kernels._validate import FLOAT_DTYPES, INTEGER_DTYPES, check_dense

MIN_RATIO = 2.0**-100  # of a weight to the largest one


class Weights(NamedTuple):
    """Weights of the rows of a data set, divided by `unit`, a power of 2, so that the largest is from 1 to 2.

    Weights below MIN_RATIO count as 0, which bounds the levels of sums.
    """

    every: Tensor  # fp64 [N] on the CPU
    held: Tensor  # fp64, of the rows of this process, on their device
    unit: float
    total: float
    largest: float
    smallest: float  # of the positive ones
    n_positive: int

    @classmethod
    def of(cls, given: Tensor, held: slice, device: torch.device) -> Weights:
        """Returns the weights of a data set; raises a ValueError if none is positive.

        Args:
            given: fp64 [N], finite and at least 0.
            held: positions of the rows of this process.
            device: device of the rows.
        """
        weights = given.numpy()  # computes in one thread: the same total for any number of them
        largest = float(weights.max(initial=0))
        if largest == 0:
            raise ValueError(f"sample_weight must be positive for a row: got zero for all {len(weights)} rows")
        unit = math.ldexp(1.0, math.frexp(largest)[1] - 1)
        weights = weights / unit
        weights[weights < MIN_RATIO] = 0
        smallest = float(weights.min(initial=math.inf, where=weights > 0))
        every = torch.from_numpy(weights)
        n_positive = int(np.count_nonzero(weights))
        return cls(every, every[held].to(device), unit, float(weights.sum()), largest / unit, smallest, n_positive)


def as_weights(sample_weight: object, rows: int, rows_name: str) -> Tensor:
    """Returns the weights of `rows` rows, fp64 on the CPU; raises a TypeError or a ValueError if they are invalid."""
    weights = _as_tensor(sample_weight)
    if weights.ndim != 1:
        raise ValueError(f"sample_weight must have shape [rows]: got {list(weights.shape)}")
    if len(weights) != rows:
        raise ValueError(f"sample_weight must have a weight per row of {rows_name}: got {len(weights)} for {rows} rows")
    weights = weights.detach().to("cpu", torch.float64)
    is_good = np.isfinite(weights.numpy()) & (weights.numpy() >= 0)
    if not is_good.all():
        row = int(is_good.argmin())
        raise ValueError(f"sample_weight must be finite and at least 0: got {float(weights[row])} in row {row}")
    return weights


def _as_tensor(sample_weight: object) -> Tensor:
    """Returns numbers of any form as a tensor."""
    if isinstance(sample_weight, Tensor):
        check_dense("sample_weight", sample_weight)
        if sample_weight.dtype not in FLOAT_DTYPES + INTEGER_DTYPES:
            raise TypeError(f"sample_weight must be numbers: got {sample_weight.dtype}")
        if sample_weight.is_meta:
            raise ValueError("sample_weight must hold values: got a tensor on the device meta")
        return sample_weight
    try:
        values = np.asarray(sample_weight)
    except ValueError:  # of lists of several lengths
        raise TypeError(f"sample_weight must be numbers: got {type(sample_weight).__name__}") from None
    if values.dtype == object:  # columns of pandas' own types
        try:
            values = values.astype(np.float64)
        except (TypeError, ValueError):
            raise TypeError(f"sample_weight must be numbers: got {type(sample_weight).__name__}") from None
    if values.dtype.kind not in "fiu":
        raise TypeError(f"sample_weight must be numbers: got {values.dtype}")
    return torch.from_numpy(values.astype(np.float64))
