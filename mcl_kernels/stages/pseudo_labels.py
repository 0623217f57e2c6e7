"""Pseudo labels: the tuple of a sample's cluster ids in all stages so far, as one dense integer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mcl_kernels._validate import as_integer_vector, as_integers

CHUNK = 1 << 18  # labels at a time, so that what is computed of them stays small
SMALL_TABLE = 1 << 16
SMALL_LABEL = 2  # samples: one has no negative, two have one


def compose_labels(previous: Tensor, new: Tensor) -> Tensor:
    """Joins the pseudo labels of the earlier stages with the cluster ids of a new one.

        label_i = rank of (previous_i, new_i) among the distinct pairs of the data set, in lexicographic order

    Since the rank keeps the order, composing stage by stage ranks the whole tuples. A negative id on either side
    gives -1: a sample without a pseudo label.

    Args:
        previous: labels so far, integers [N].
        new: cluster ids of the new stage, integers [N].

    Returns:
        int64 [N], dense from 0.

    Raises:
        TypeError: ids that are not integers.
        ValueError: lengths or devices that differ.

    Source: "Learning the Unlearned" (arXiv 2402.11816), the accumulated pseudo label of stage j.

    Example:
        >>> compose_labels(torch.tensor([0, 0, 1, 1, -1]), torch.tensor([7, 7, 2, 9, 2]))
        tensor([ 0,  0,  1,  2, -1])
    """
    previous = as_integer_vector("previous", previous)
    new = as_integers("new", new, "previous", previous)
    return compose_pairs(previous, new, torch.int64)[0]


def compose_pairs(previous: Tensor, new: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`compose_labels` in a dtype, and the pair behind each label, int64 [labels, 2].

    A pair is one integer, previous * (max(new) + 1) + new, and these have the order of the pairs. Where a table of all
    that are possible is no longer than the data, a label is the number of smaller ones that occur: that takes no memory
    beside labels and table. Otherwise they are sorted.
    """
    top, width = -1, 1
    for _, first, second in _chunks(previous, new):
        top, width = max(top, int(first.max())), max(width, int(second.max()) + 1)
    n_keys = (top + 1) * width
    if n_keys > torch.iinfo(torch.int64).max:
        (first_ids, previous), (second_ids, new) = (_ranks(ids.clamp(min=-1)) for ids in (previous, new))
        labels, pairs = compose_pairs(previous, new, dtype)
        return labels, torch.stack((first_ids[pairs[:, 0]], second_ids[pairs[:, 1]]), dim=1)

    def keys() -> Iterator[tuple[slice, Tensor]]:
        for here, first, second in _chunks(previous, new):
            yield here, torch.where((first >= 0) & (second >= 0), first * width + second, -1)

    if n_keys <= max(len(previous), SMALL_TABLE):
        occurs = torch.zeros(n_keys + 1, dtype=torch.bool, device=previous.device)  # the last one is that of -1
        for _, key in keys():
            occurs[key] = True
        occurs[-1] = False
        rank = occurs.cumsum(0, dtype=dtype) - 1
        rank[-1] = -1
        labels = torch.empty(len(previous), dtype=dtype, device=previous.device)
        for here, key in keys():
            labels[here] = rank[key]
        distinct = occurs.nonzero().squeeze(1)
    else:
        distinct, labels = _ranks(torch.cat([key for _, key in keys()]))
        labels = labels.to(dtype)
    return labels, torch.stack((distinct // width, distinct % width), dim=1)


def label_dtype(n_samples: int) -> torch.dtype:
    """Narrowest type, int32 or int64, that holds the label of each sample."""
    return torch.int32 if n_samples <= torch.iinfo(torch.int32).max else torch.int64


def shares_of_small_labels(label_sizes: Tensor) -> dict[str, float]:
    """The share of the labels that have one or two samples, and that of the samples which these hold."""
    small = label_sizes <= SMALL_LABEL
    return {
        "small_labels": int(small.sum()) / max(len(label_sizes), 1),
        "samples_in_small_labels": int(label_sizes[small].sum()) / max(int(label_sizes.sum()), 1),
    }


def starvation(label_sizes: Tensor) -> str | None:
    """Text of a warning where labels of one or two samples hold more than half of the samples, else None."""
    shares = shares_of_small_labels(label_sizes)
    if shares["samples_in_small_labels"] <= 0.5:
        return None
    return (
        f"{shares['samples_in_small_labels']:.0%} of the samples have a pseudo label of one or two samples "
        f"({shares['small_labels']:.0%} of the {len(label_sizes):,} labels), and so one other sample as a negative or "
        "none: a small loss means little there; use fewer clusters or fewer stages"
    )


def look_up_tuples(tuples: Tensor, clusters: Tensor) -> Tensor:
    """The pseudo label of each row of cluster ids, [B, stages]; -1 for a tuple that `tuples` does not hold."""
    found: Tensor = torch.unique(torch.cat((tuples, clusters.to(tuples.device))), dim=0, return_inverse=True)[1]
    labels = found.new_full((len(found),), -1)
    labels[found[: len(tuples)]] = torch.arange(len(tuples), device=tuples.device)
    return labels[found[len(tuples) :]]


def _chunks(previous: Tensor, new: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    for begin in range(0, len(previous), CHUNK):
        here = slice(begin, begin + CHUNK)
        yield here, previous[here].long(), new[here].long()


def _ranks(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct ids from 0, ascending, and the rank of each id among them; -1 stays -1."""
    distinct, ranks = torch.unique(ids, return_inverse=True)
    unknown = int((distinct < 0).sum())
    return distinct[unknown:], ranks - unknown
