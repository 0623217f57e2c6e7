"""Pseudo labels: the tuple of a sample's cluster ids in all stages so far, as one dense integer."""

from __future__ import annotations

import torch
from torch import Tensor

from mcl_kernels._validate import as_integer_vector, as_integers


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
    known = (previous >= 0) & (new >= 0)
    labels = torch.full_like(previous, -1)
    pairs = torch.stack((previous[known], new[known]), dim=1)
    labels[known] = torch.unique(pairs, dim=0, return_inverse=True)[1]
    return labels


def label_tuples(labels: Tensor, clusters: Tensor) -> Tensor:
    """The tuple behind each pseudo label: labels int64 [N], clusters int64 [N, stages] -> int64 [labels, stages]."""
    tuples = clusters.new_empty(int(labels.max()) + 1, clusters.shape[1])
    tuples[labels] = clusters
    return tuples


def look_up_tuples(tuples: Tensor, clusters: Tensor) -> Tensor:
    """The pseudo label of each row of cluster ids, [B, stages]; -1 for a tuple that `tuples` does not hold."""
    found: Tensor = torch.unique(torch.cat((tuples, clusters.to(tuples.device))), dim=0, return_inverse=True)[1]
    labels = found.new_full((len(found),), -1)
    labels[found[: len(tuples)]] = torch.arange(len(tuples), device=tuples.device)
    return labels[found[len(tuples) :]]
