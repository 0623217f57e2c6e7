"""Values that pass between the operation and its implementations.

A public function checks its arguments and packs them into `Inputs`; everything below takes that value. A forward
returns `Saved`, and a backward takes both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mcl_kernels.logsumexp.pairs import Pairs, Plan, repeat


class Inputs(NamedTuple):
    """Checked arguments of the operation, on one device.

    Other inputs are made by `Inputs(...)`: torch 2.6 does not compile `_replace`, nor a slice of `pairs`.
    """

    query: Tensor  # [N, D]
    key: Tensor | None  # [M, D]; None is the self form: the keys are the queries
    scale: Tensor  # [] or [N], fp32 or fp64: the dtype of logits and sums
    pairs: Pairs
    bidirectional: bool = False  # False in the self form, which is symmetric

    @classmethod
    def of_self(cls, query: Tensor, scale: Tensor, pairs: Pairs, *, views: int = 1) -> Inputs:
        """Inputs of the self form; `pairs` has the ids and labels of the samples, `query` a row of each for each view.

        With a scale per row the logits are not symmetric: then the queries are given as the keys, too.
        """
        labels, ids = repeat(pairs.labels, views), repeat(pairs.ids, views)
        inputs = cls(query, None, scale, Pairs(labels, None, ids, None, pairs.negatives, views * pairs.views))
        return inputs if scale.ndim == 0 else inputs.rectangle()

    @property
    def keys(self) -> Tensor:
        """Keys, [M, D]; in the self form the queries."""
        return self.query if self.key is None else self.key

    def rectangle(self) -> Inputs:
        """Inputs with a key: in the self form the queries are given as the keys, too."""
        if self.key is not None:
            return self
        labels, _, ids, _, negatives, views = self.pairs
        pairs = Pairs(labels, labels, ids, ids, negatives, views)
        return Inputs(self.query, self.query, self.scale, pairs, self.bidirectional)

    def swapped(self) -> Inputs:
        """Inputs with queries and keys exchanged, for inputs with a key and a scale []."""
        return Inputs(self.keys, self.query, self.scale, self.pairs.swapped(), self.bidirectional)

    def with_ids(self) -> Inputs:
        """Inputs with default ids stored."""
        query, key, scale, pairs, bidirectional = self
        return Inputs(query, key, scale, pairs.with_ids(query, key), bidirectional)

    def scaled(self, factor: float) -> Inputs:
        """Inputs with the scale multiplied by a factor."""
        return Inputs(self.query, self.key, self.scale * factor, self.pairs, self.bidirectional)

    def tensors(self) -> list[Tensor | None]:
        """Tensors in the order of the operators' schemas."""
        labels, key_labels, ids, key_ids, _, _ = self.pairs
        return [self.query, self.key, self.scale, labels, key_labels, ids, key_ids]

    def flatten(self) -> tuple[Any, ...]:
        """Tensors, then options, in the order of the operators' schemas."""
        return *self.tensors(), self.pairs.negatives, self.pairs.views, self.bidirectional

    @classmethod
    def unflatten(cls, values: Sequence[Any]) -> Inputs:
        """Inverse of `flatten`."""
        query, key, scale, *pairs, bidirectional = values
        return cls(query, key, scale, Pairs(*pairs), bidirectional)


class Saved(NamedTuple):
    """Results of a forward that its backward needs."""

    row_lse: Tensor  # [N], b
    column_lse: Tensor  # [M], c; [0] unless bidirectional
    plan: Plan

    def flatten(self) -> tuple[Tensor | None, ...]:
        """Tensors in the order of the operators' schemas; None for fields of the plan that it lacks."""
        return self.row_lse, self.column_lse, *self.plan

    @classmethod
    def unflatten(cls, values: Sequence[Any]) -> Saved:
        """Inverse of `flatten`."""
        row_lse, column_lse, *plan = values
        return cls(row_lse, column_lse, Plan(*plan))


class LseGradients(NamedTuple):
    """Gradients of a forward's results, which its backward takes."""

    row: Tensor  # [N]
    column: Tensor  # [M]; [0] unless bidirectional


class Wanted(NamedTuple):
    """Flags: the inputs whose gradient is needed."""

    query: bool
    key: bool
    scale: bool
