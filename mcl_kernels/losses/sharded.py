"""The losses of a batch that is spread over ranks: those that this rank computes, and the number of all anchors.

Each function is the one of `per_anchor` with that name, for the rows of this rank.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mcl_kernels.distributed.exchange import LabelledRows, share_queries, share_samples
from mcl_kernels.distributed.group import Ranks, agreement, collective_device
from mcl_kernels.logsumexp.pairs import Pairs
from mcl_kernels.losses import per_anchor
from mcl_kernels.normalize import joined_views
from mcl_kernels.objectives import Objective


def agreed_call(ranks: Ranks | None, loss: str, arguments: dict[str, Any]) -> AbstractContextManager[None]:
    """Raises on every rank an error inside, or where the arguments of a call differ; without ranks does nothing."""
    if ranks is None:
        return nullcontext()
    # A rank that fails may have none of its tensors on the device of the others.
    devices = (x.device for x in arguments.values() if isinstance(x, Tensor))
    accelerator = next((device for device in devices if device.type not in ("cpu", "meta")), None)
    return agreement(ranks, accelerator or collective_device(ranks), {"loss": loss, **arguments})


def needed_exchange(exchange: str, negatives: str, objective: Objective, reduction: str) -> str:
    """The exchange of a call: "gather" where an anchor needs more than its cluster."""
    needing_all = {
        f"negatives={negatives!r}": negatives != "same",
        "reduction='none'": reduction == "none",
        f"{objective}, which mixes anchors,": getattr(objective, "mixes_anchors", False),
    }
    reasons = [what for what, holds in needing_all.items() if holds]
    if reasons and exchange == "cluster":
        raise ValueError(f"exchange='cluster' keeps each cluster by itself: {reasons[0]} needs exchange='gather'")
    return "gather" if reasons else exchange


def one_way(
    query: Tensor, positive: Tensor, key: Tensor, pairs: Pairs, scale: Tensor, objective: Objective, impl: str,
    ranks: Ranks, exchange: str, *, is_queue: bool = False,
) -> tuple[Tensor, int]:  # fmt: skip
    """The loss of each query that this rank computes, and the number of queries of all ranks."""
    columns = (query, positive, scale) if scale.ndim else (query, positive)
    queries = LabelledRows(columns, pairs.labels, pairs.ids)
    keys = LabelledRows((key,), pairs.key_labels, pairs.key_ids)
    blocks, total = share_queries(queries, keys, exchange, ranks)
    query, positive, *scales = blocks.anchors.columns
    (key,), scale = blocks.keys.columns, scales[0] if scales else scale
    pairs = blocks.pairs(pairs.negatives)
    return per_anchor.one_way(query, positive, key, pairs, scale, objective, impl, ranks, is_queue=is_queue), total


def all_views(
    view_a: Tensor, view_b: Tensor, of_sample: Pairs, scale: Tensor, objective: Objective, impl: str,
    ranks: Ranks, exchange: str,
) -> tuple[Tensor, int]:  # fmt: skip
    """The loss of each view that this rank computes, and the number of samples of all ranks."""
    columns = (view_a, view_b, *scale.chunk(2)) if scale.ndim else (view_a, view_b)
    share = share_samples(LabelledRows(columns, of_sample.labels, of_sample.ids), "nt_xent", exchange, ranks)
    losses = []
    if share.complete is not None:
        view_a, view_b, *scales = share.complete.columns
        pairs, own_scale = share.complete.pairs(of_sample.negatives), torch.cat(scales) if scales else scale
        losses.append(per_anchor.all_views(*joined_views(view_a, view_b), pairs, own_scale, objective, impl))
    if share.blocks is not None:
        view_a, view_b, *scales = share.blocks.anchors.columns
        query, positive = torch.cat((view_a, view_b)), torch.cat((view_b, view_a))
        key, own_scale = torch.cat(share.blocks.keys.columns[:2]), torch.cat(scales) if scales else scale
        pairs = share.blocks.pairs(of_sample.negatives).repeated(2)
        losses.append(per_anchor.one_way(query, positive, key, pairs, own_scale, objective, impl, ranks))
    return torch.cat(losses), share.total


def both_ways(
    image: Tensor,
    text: Tensor,
    pairs: Pairs,
    scale: Tensor,
    objective: Objective,
    impl: str,
    ranks: Ranks,
    exchange: str,
) -> tuple[Tensor, int]:
    """The loss of each pair that this rank computes, and the number of pairs of all ranks."""
    share = share_samples(LabelledRows((image, text), pairs.labels, pairs.ids), "clip_loss", exchange, ranks)
    losses = []
    if share.complete is not None:
        image, text = share.complete.columns
        losses.append(per_anchor.both_ways(image, text, share.complete.pairs(pairs.negatives), scale, objective, impl))
    if share.blocks is not None:
        (image, text), (all_images, all_texts) = share.blocks.anchors.columns, share.blocks.keys.columns
        of_block = share.blocks.pairs(pairs.negatives)
        image_loss = per_anchor.one_way(image, text, all_texts, of_block, scale, objective, impl, ranks)
        text_loss = per_anchor.one_way(text, image, all_images, of_block, scale, objective, impl, ranks)
        losses.append((image_loss + text_loss) / 2)
    return torch.cat(losses), share.total


def each_way(
    image: Tensor,
    text: Tensor,
    pairs: Pairs,
    scale: Tensor,
    objective: Objective,
    impl: str,
    ranks: Ranks,
    exchange: str,
) -> tuple[Tensor, int]:
    """`both_ways` where captions have labels of their own: an image and its caption may be compared on different ranks.

    The sum of the losses is that of the pairs.
    """
    image_loss, total = one_way(image, text, text, pairs, scale, objective, impl, ranks, exchange)
    text_loss, _ = one_way(text, image, image, pairs.swapped(), scale, objective, impl, ranks, exchange)
    if exchange == "gather":  # which leaves them in their order
        return (image_loss + text_loss) / 2, total
    return torch.cat((image_loss, text_loss)) / 2, total
