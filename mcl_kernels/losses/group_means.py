"""Means within groups of rows, differentiable to any order, by sums in one fixed order and without a host wait."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

MIN_COLUMNS = 32  # of a step: fewer are not faster


class Groups(NamedTuple):
    """Rows in groups of equal integers. No size depends on the number of groups: there are N, the last ones empty."""

    row_group: Tensor  # int64 [N], the group of each row: 0, 1, ... in the order of the integers
    order: Tensor  # int64 [N], the rows by group
    bounds: Tensor  # int64 [N + 1]: group g is order[bounds[g] : bounds[g + 1]]

    @classmethod
    def of(cls, values: Tensor) -> Groups:
        """Groups of the rows with equal values, int64 [N]."""
        order = values.argsort(stable=True)
        ordered = values[order]
        differs = (ordered != ordered.roll(1)).long()  # from the row before; the first row from the last one
        ordered_group = differs.cumsum(0) - differs[:1]
        bounds = torch.searchsorted(ordered_group, torch.arange(order.shape[0] + 1, device=order.device))
        return cls(torch.empty_like(order).scatter_(0, order, ordered_group), order, bounds)

    def others(self) -> Tensor:
        """Number of other rows in each row's group, int64 [N]."""
        return self.bounds.diff()[self.row_group] - 1


def mean_of_others(x: Tensor, groups: Groups) -> Tensor:
    """Mean of the other rows of each row's group, [N, D]; 0 for a row that has its group to itself."""
    # A compiler does not take the forward mode of a Function.
    function = _operator if torch.compiler.is_compiling() else _MeanOfOthers.apply
    means: Tensor = function(x, *groups)  # type: ignore[no-untyped-call]
    return means


def _compute(x: Tensor, row_group: Tensor, order: Tensor, bounds: Tensor) -> Tensor:
    ordered_group = row_group[order]
    others = (bounds.diff()[ordered_group] - 1).clamp(min=1).unsqueeze(1)
    means = torch.empty_like(x)
    # In fp64 a row is subtracted from the sum of its group without a loss of fp32's digits. A few columns at a time.
    step = max(MIN_COLUMNS, x.shape[1] // 8)
    for columns, part in zip(torch.split(x, step, 1), torch.split(means, step, 1), strict=True):
        rows = columns[order].double()
        sums = torch.segment_reduce(rows, "sum", offsets=bounds, axis=0, initial=0, unsafe=True)
        part.index_copy_(0, order, sums[ordered_group].sub_(rows).div_(others).to(x.dtype))
    return means


class _MeanOfOthers(torch.autograd.Function):
    """The mean as a linear map of the rows. Rows of a group weigh each other alike, so it is its own transpose."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, row_group: Tensor, order: Tensor, bounds: Tensor) -> Tensor:
        return _compute(x, row_group, order, bounds)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return mean_of_others(grad, Groups(*ctx.saved_tensors)), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:  # type: ignore[override]
        return mean_of_others(tangent, Groups(*ctx.saved_tensors))


_operator = torch.library.custom_op("mcl_kernels::mean_of_others", _compute, mutates_args=())


@_operator.register_fake
def _(x: Tensor, row_group: Tensor, order: Tensor, bounds: Tensor) -> Tensor:
    return torch.empty_like(x)


def _save_groups(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _operator(grad, *ctx.saved_tensors), None, None, None


_operator.register_autograd(_backward, setup_context=_save_groups)
