"""Pseudo labels: the tuple of a sample's cluster ids in all stages so far, as one dense integer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mcl_kernels._validate import as_integer_vector, as_integers

CHUNK = 1 << 18  # labels at a time, which bounds the memory of intermediate results
SMALL_TABLE = 1 << 16  # entries
SMALL_LABEL = 2  # samples: alone a sample has no negative, and in a pair one


def compose_labels(previous: Tensor, new: Tensor) -> Tensor:
    """Joins the pseudo labels of the earlier stages with the cluster ids of a new one.

        label_i = position of (previous_i, new_i) among the distinct pairs of the data set, in lexicographic order

    Positions keep the order, so composing stage by stage orders the complete tuples. A negative id on either side
    gives -1: a sample without a pseudo label.

    Args:
        previous: pseudo labels of the earlier stages, integers [N].
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
    """Computes `compose_labels` in a dtype; also returns the pair behind each label, int64 [labels, 2].

    Each pair is encoded as one integer key, previous * (max(new) + 1) + new, which keeps the order of the pairs. If a
    table of all possible keys is no longer than the data, the label of a key is the number of smaller keys that occur:
    that needs no memory beyond labels and table. Otherwise the keys are sorted.
    """
    max_previous, width = -1, 1
    for _, first, second in _chunks(previous, new):
        max_previous, width = max(max_previous, int(first.max())), max(width, int(second.max()) + 1)
    n_keys = (max_previous + 1) * width
    if n_keys > torch.iinfo(torch.int64).max:
        (first_ids, previous), (second_ids, new) = (_made_dense(ids.clamp(min=-1)) for ids in (previous, new))
        labels, pairs = compose_pairs(previous, new, dtype)
        return labels, torch.stack((first_ids[pairs[:, 0]], second_ids[pairs[:, 1]]), dim=1)

    def keys() -> Iterator[tuple[slice, Tensor]]:
        for chunk, first, second in _chunks(previous, new):
            yield chunk, torch.where((first >= 0) & (second >= 0), first * width + second, -1)

    if n_keys <= max(len(previous), SMALL_TABLE):
        occurs = torch.zeros(n_keys + 1, dtype=torch.bool, device=previous.device)  # the last entry is for key -1
        for _, key in keys():
            occurs[key] = True
        occurs[-1] = False
        label_of_key = occurs.cumsum(0, dtype=dtype) - 1
        label_of_key[-1] = -1
        labels = torch.empty(len(previous), dtype=dtype, device=previous.device)
        for chunk, key in keys():
            labels[chunk] = label_of_key[key]
        distinct = occurs.nonzero().squeeze(1)
    else:
        distinct, labels = _made_dense(torch.cat([key for _, key in keys()]))
        labels = labels.to(dtype)
    return labels, torch.stack((distinct // width, distinct % width), dim=1)


def label_dtype(n_samples: int) -> torch.dtype:
    """Narrowest dtype, int32 or int64, in which each of the samples can have a label of its own."""
    return torch.int32 if n_samples <= torch.iinfo(torch.int32).max else torch.int64


def shares_of_small_labels(label_sizes: Tensor) -> dict[str, float]:
    """Returns the share of the labels that have one or two samples, and the share of the samples with such a label."""
    small = label_sizes <= SMALL_LABEL
    return {
        "small_labels": int(small.sum()) / max(len(label_sizes), 1),
        "samples_in_small_labels": int(label_sizes[small].sum()) / max(int(label_sizes.sum()), 1),
    }


def starvation(label_sizes: Tensor) -> str | None:
    """Text of a warning if more than half of the samples have a label of one or two samples, else None."""
    shares = shares_of_small_labels(label_sizes)
    if shares["samples_in_small_labels"] <= 0.5:
        return None
    return (
        f"{shares['samples_in_small_labels']:.0%} of the samples have a pseudo label of one or two samples "
        f"({shares['small_labels']:.0%} of the {len(label_sizes):,} labels), and so at most one other sample as a "
        "negative: a small loss means little for them; use fewer clusters or fewer stages"
    )


def look_up_tuples(tuples: Tensor, clusters: Tensor) -> Tensor:
    """Pseudo label of each row of cluster ids, [B, stages]; -1 for a tuple that `tuples` does not contain."""
    ids: Tensor = torch.unique(torch.cat((tuples, clusters.to(tuples.device))), dim=0, return_inverse=True)[1]
    label_of_id = ids.new_full((len(ids),), -1)
    label_of_id[ids[: len(tuples)]] = torch.arange(len(tuples), device=tuples.device)
    return label_of_id[ids[len(tuples) :]]


def _chunks(previous: Tensor, new: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    for begin in range(0, len(previous), CHUNK):
        chunk = slice(begin, begin + CHUNK)
        yield chunk, previous[chunk].long(), new[chunk].long()


def _made_dense(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the distinct ids >= 0, ascending, and the position of each id among them; -1 stays -1."""
    distinct, positions = torch.unique(ids, return_inverse=True)
    n_negative = int((distinct < 0).sum())
    return distinct[n_negative:], positions - n_negative
