"""Negatives of a query besides the keys: rows in other roles (`include`), and rows that it alone has (private ones)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mcl_kernels._validate import check_dense, check_embeddings, check_same_device, check_same_width
from mcl_kernels.logsumexp.inputs import Inputs
from mcl_kernels.logsumexp.ops import compute
from mcl_kernels.logsumexp.pairs import Pairs, count_kept
from mcl_kernels.logsumexp.reference import log_sum_exp
from mcl_kernels.normalize import normalize_rows

BLOCKS = ("qk", "qq", "kq", "kk")  # rows of the first kind against those of the second: q queries, k keys


class Side(NamedTuple):
    """Rows with their labels and ids."""

    rows: Tensor  # [N, D]
    labels: Tensor | None  # int64 [N]
    ids: Tensor | None  # int64 [N]

    def first(self, size: int) -> Side:
        """The first rows; this object itself where these are all."""
        if size == self.rows.shape[0]:
            return self
        return Side(*(None if x is None else x[:size] for x in self))  # type: ignore[arg-type]


class Private(NamedTuple):
    """Rows that a single query is compared with."""

    rows: Tensor  # [N, H, D]; 0 where masked out
    mask: Tensor | None  # bool [N, H], false for rows that are padding; None: all are rows

    def logits(self, query: Tensor, scale: Tensor) -> Tensor:
        """Logits of each query's rows, [N, H]; -inf where masked out."""
        products = (query.to(scale.dtype).unsqueeze(1) * self.rows.to(scale.dtype)).sum(2)
        logits = scale.reshape(-1, 1) * products
        return logits if self.mask is None else logits.masked_fill(~self.mask, -torch.inf)

    def counts(self) -> Tensor:
        """Number of rows of each query, int64 [N]."""
        n, h, _ = self.rows.shape
        return torch.full((n,), h, device=self.rows.device) if self.mask is None else self.mask.sum(1)

    def columns(self) -> list[Tensor]:
        return [self.rows] if self.mask is None else [self.rows, self.mask]


class Negatives(NamedTuple):
    """Negatives of the N queries, which are those of `inputs`."""

    inputs: Inputs  # queries against keys; bidirectional: key i < N against the queries, too
    blocks: tuple[Inputs, ...] = ()  # further rows in the queries' place, one for each of the first N
    private: Private | None = None

    def log_sum_exp(self, factor: float | None, impl: str) -> Tensor:
        """Log of the summed exponentials of each query, [N], with the scale multiplied by a factor."""
        inputs = self.inputs if factor is None else self.inputs.scaled(factor)
        n = inputs.query.shape[0]
        row_lse, column_lse = compute(inputs, impl)
        terms = [row_lse, column_lse[:n]] if inputs.bidirectional else [row_lse]
        terms += [compute(block if factor is None else block.scaled(factor), impl)[0][:n] for block in self.blocks]
        if self.private is not None:
            terms.append(self.private.logits(inputs.query, inputs.scale))
        return terms[0] if len(terms) == 1 else joined(terms)

    def counts(self) -> Tensor:
        """Number of negatives of each query, int64 [N]."""
        n = self.inputs.query.shape[0]
        every = [self.inputs, self.inputs.swapped()] if self.inputs.bidirectional else [self.inputs]
        rectangles = [block.rectangle() for block in (*every, *self.blocks)]
        counts = [count_kept(block.query, block.keys, block.pairs)[:n] for block in rectangles]
        return sum([*counts[1:], *([] if self.private is None else [self.private.counts()])], start=counts[0])


def further_blocks(
    include: Sequence[str],
    own: tuple[Side, Side],
    every: tuple[Side, Side],
    scale: Tensor,
    negatives: str,
) -> tuple[Inputs, ...]:
    """Blocks of `include` but "qk": the queries and the keys that are their positives against all queries and keys."""
    (queries, positives), (all_queries, all_keys) = own, every
    blocks = {"qq": (queries, all_queries), "kq": (positives, all_queries), "kk": (positives, all_keys)}
    return tuple(_block(*blocks[name], scale, negatives) for name in include if name != "qk")


def _block(side: Side, others: Side, scale: Tensor, negatives: str) -> Inputs:
    is_self = side is others
    pairs = Pairs(side.labels, None if is_self else others.labels, side.ids, None if is_self else others.ids, negatives)
    if side.ids is None:
        pairs = pairs.with_default_ids()
    return Inputs.of_self(side.rows, scale, pairs) if is_self else Inputs(side.rows, others.rows, scale, pairs)


def check_include(include: object, *, is_queue: bool = False) -> None:
    """Raises unless `include` holds "qk" and other blocks, each once."""
    expected = f"include must be a tuple of {', '.join(repr(block) for block in BLOCKS)}"
    if not isinstance(include, (tuple, list)):
        raise TypeError(f"{expected}: got {type(include).__name__}")
    if not set(map(str, include)) <= set(BLOCKS) or len(set(include)) < len(include):
        raise ValueError(f"{expected}, each once: got {tuple(include)}")
    if "qk" not in include:
        raise ValueError(f"include must hold 'qk', queries against keys: got {tuple(include)}")
    if is_queue and ("kq" in include or "kk" in include):
        raise ValueError(
            f"include must not hold 'kq' or 'kk' with positive, which is not among the keys: got {tuple(include)}"
        )


def check_private(hard_negatives: Tensor | None, hard_mask: Tensor | None, query: Tensor) -> None:
    """Raises unless hard_negatives is None or [N, H, D], and hard_mask None or bool [N, H]."""
    if hard_negatives is None:
        if hard_mask is not None:
            raise ValueError("hard_mask needs hard_negatives: got hard_negatives=None")
        return
    check_embeddings("hard_negatives", hard_negatives, "[queries, negatives, features]")
    n, h = hard_negatives.shape[:2]
    if n != query.shape[0]:
        raise ValueError(f"hard_negatives must have one list per query: got {n} lists for {query.shape[0]} queries")
    check_same_width("hard_negatives", hard_negatives.flatten(0, 1), "query", query)
    if hard_mask is None:
        return
    if not isinstance(hard_mask, Tensor):
        raise TypeError(f"hard_mask must be a tensor of bool: got {type(hard_mask).__name__}")
    check_dense("hard_mask", hard_mask)
    if hard_mask.dtype != torch.bool:
        raise TypeError(f"hard_mask must be a tensor of bool: got {hard_mask.dtype}")
    if hard_mask.shape != (n, h):
        raise ValueError(f"hard_mask must have shape [{n}, {h}], as hard_negatives: got {list(hard_mask.shape)}")
    check_same_device("hard_mask", hard_mask, "hard_negatives", hard_negatives)


def private_rows(hard_negatives: Tensor | None, hard_mask: Tensor | None, normalize: bool, impl: str) -> Private | None:
    """Checked private rows as the loss uses them. Padding may hold any values, NaN too."""
    if hard_negatives is None:
        return None
    rows = hard_negatives
    if hard_mask is not None:
        rows = rows.masked_fill(~hard_mask.unsqueeze(2), 0.0)
    if normalize:
        rows = normalize_rows(rows.flatten(0, 1), impl).view_as(rows)
    return Private(rows, hard_mask)


def joined(terms: Sequence[Tensor]) -> Tensor:
    """Log of the summed exponentials of terms [N] or [N, H], [N]; -inf, with gradient 0, where all are -inf."""
    return log_sum_exp(torch.cat([x.unsqueeze(1) if x.ndim == 1 else x for x in terms], dim=1), 1)
