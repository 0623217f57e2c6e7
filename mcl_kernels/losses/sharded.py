"""Losses of a batch that is spread over ranks: those that this rank computes, and the number of anchors of all ranks.

Each function is the one of `per_anchor` with that name, for the rows of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mcl_kernels.distributed.exchange import Comparison, LabelledRows, gather_vectors, share_queries, share_samples
from mcl_kernels.distributed.group import Ranks
from mcl_kernels.logsumexp.inputs import Inputs
from mcl_kernels.logsumexp.pairs import Pairs
from mcl_kernels.losses import per_anchor
from mcl_kernels.losses.negatives import Negatives, Private, Side, further_blocks
from mcl_kernels.normalize import joined_views
from mcl_kernels.objectives import ObjectiveLike


class Call(NamedTuple):
    """Options of a call over ranks."""

    objective: ObjectiveLike
    impl: str
    ranks: Ranks
    exchange: str


def query_to_key(
    inputs: Inputs,
    positive: Tensor,
    call: Call,
    *,
    is_queue: bool = False,
    include: Sequence[str] = ("qk",),
    private: Private | None = None,
) -> tuple[Tensor, int]:
    """The loss of each query that this rank computes, and the number of queries of all ranks."""
    query, keys, scale, pairs, _ = inputs
    optional = [*([scale] if scale.ndim else []), *([] if private is None else private.columns())]
    queries = LabelledRows((query, positive, *optional), pairs.labels, pairs.ids)
    key_rows = LabelledRows((inputs.keys,), pairs.key_labels, pairs.key_ids)
    blocks, total = share_queries(queries, key_rows, call.exchange, call.ranks)
    query, positive, *columns = blocks.anchors.columns
    scale = columns.pop(0) if scale.ndim else scale
    private = None if private is None else Private(columns[0], columns[1] if len(columns) > 1 else None)
    (keys,) = blocks.keys.columns
    inputs = Inputs(query, keys, scale, blocks.pairs(pairs.negatives))
    further = () if len(include) == 1 else _further_blocks(queries, key_rows, blocks, inputs, include, call)
    return _blocks_loss(Negatives(inputs, further, private), positive, call, is_queue=is_queue), total


def _further_blocks(
    queries: LabelledRows, keys: LabelledRows, gathered: Comparison, inputs: Inputs, include: Sequence[str], call: Call
) -> tuple[Inputs, ...]:
    """Blocks of `include` but "qk", of this rank's queries and keys against those of all ranks."""
    ids = call.ranks.row_ids(inputs.query) if queries.ids is None else queries.ids
    own = LabelledRows((inputs.query,), queries.labels, ids)
    all_queries = share_queries(own, own, "gather", call.ranks)[0].keys
    sides = [Side(x.columns[0], x.labels, x.ids) for x in (own, keys, all_queries, gathered.keys)]
    rows = (sides[0], sides[1].first(own.size)), (sides[2], sides[3])
    return further_blocks(include, *rows, inputs.scale, inputs.pairs.negatives)


def views(view_a: Tensor, view_b: Tensor, scale: Tensor, sample_pairs: Pairs, call: Call) -> tuple[Tensor, int]:
    """The loss of each view that this rank computes, and the number of samples of all ranks."""
    columns = (view_a, view_b, *scale.chunk(2)) if scale.ndim else (view_a, view_b)
    samples, negatives = LabelledRows(columns, sample_pairs.labels, sample_pairs.ids), sample_pairs.negatives
    share = share_samples(samples, "nt_xent", call.exchange, call.ranks)
    losses = []
    if share.complete is not None:
        view_a, view_b, *scales = share.complete.columns
        rows, cosine = joined_views(view_a, view_b)
        row_scale = torch.cat(scales) if scales else scale
        inputs = Inputs.of_self(rows, row_scale, share.complete.pairs(negatives), views=2)
        losses.append(per_anchor.views(inputs, cosine, call.objective, call.impl))
    if share.blocks is not None:
        view_a, view_b, *scales = share.blocks.anchors.columns
        query, positive = torch.cat((view_a, view_b)), torch.cat((view_b, view_a))
        key, row_scale = torch.cat(share.blocks.keys.columns[:2]), torch.cat(scales) if scales else scale
        inputs = Inputs(query, key, row_scale, share.blocks.pairs(negatives).repeated(2))
        losses.append(_blocks_loss(Negatives(inputs), positive, call))
    return torch.cat(losses), share.total


def bidirectional(inputs: Inputs, call: Call) -> tuple[Tensor, int]:
    """The loss of each pair that this rank computes, and the number of pairs of all ranks."""
    image, _, scale, pairs, _ = inputs
    samples = LabelledRows((image, inputs.keys), pairs.labels, pairs.ids)
    share = share_samples(samples, "clip_loss", call.exchange, call.ranks)
    losses = []
    if share.complete is not None:
        image, text = share.complete.columns
        complete = Inputs(image, text, scale, share.complete.pairs(pairs.negatives), bidirectional=True)
        losses.append(per_anchor.bidirectional(complete, call.objective, call.impl))
    if share.blocks is not None:
        (image, text), (all_images, all_texts) = share.blocks.anchors.columns, share.blocks.keys.columns
        block_pairs = share.blocks.pairs(pairs.negatives)
        image_loss = _blocks_loss(Negatives(Inputs(image, all_texts, scale, block_pairs)), text, call)
        text_loss = _blocks_loss(Negatives(Inputs(text, all_images, scale, block_pairs)), image, call)
        losses.append((image_loss + text_loss) / 2)
    return torch.cat(losses), share.total


def bidirectional_split(inputs: Inputs, call: Call) -> tuple[Tensor, int]:
    """`bidirectional` if captions have labels of their own: the directions of a pair may be on different ranks.

    Returns half the loss of each direction unless the rows stay in order: only the sum is that of the pairs' losses.
    """
    inputs = Inputs(inputs.query, inputs.key, inputs.scale, inputs.pairs)
    image_loss, total = query_to_key(inputs, inputs.keys, call)
    text_loss, _ = query_to_key(inputs.swapped(), inputs.query, call)
    if call.exchange == "gather":  # rows stay in order
        return (image_loss + text_loss) / 2, total
    return torch.cat((image_loss, text_loss)) / 2, total


def _blocks_loss(negatives: Negatives, positive: Tensor, call: Call, *, is_queue: bool = False) -> Tensor:
    """The loss of anchors, not all of the batch: an objective that mixes anchors gathers the others."""
    gather = partial(gather_vectors, ranks=call.ranks)
    return per_anchor.query_to_key(negatives, positive, call.objective, call.impl, is_queue=is_queue, gather=gather)
