"""NTXentLoss of pytorch-metric-learning, with negatives from the anchor's own cluster."""

from __future__ import annotations

from mcl_kernels.integrations._host import as_scalar, require

require("pytorch-metric-learning", "2.5")

from typing import Any

import torch
from pytorch_metric_learning import distances
from pytorch_metric_learning import losses as host
from pytorch_metric_learning.utils import loss_and_miner_utils
from torch import Tensor

from mcl_kernels._validate import INTEGER_DTYPES, as_integers, check_embeddings, check_same_width
from mcl_kernels.logsumexp import masked_logsumexp
from mcl_kernels.normalize import compute_dtype, normalize_rows, row_dot
from mcl_kernels.objectives import info_nce


class NTXentLoss(host.NTXentLoss):  # type: ignore[misc]
    """`pytorch_metric_learning.losses.NTXentLoss` with `cluster_labels`, computed by `masked_logsumexp`.

    The constructor is the host's; the distance must be its default, the cosine. **`labels` are identities**, as in the
    host: samples with equal labels are positives of each other, except a row and itself (row i of both sides, if
    `ref_labels` is the same object as `labels`, or not given). `cluster_labels` are the pseudo labels: only samples of
    the same cluster are negatives. With the pairs of a miner (`indices_tuple`) the host computes the loss, with its
    memory use, from the negative pairs within a cluster. The loss differs from the host's in two cases: it is not
    limited to 87.3, minus the log of the number that the host adds to probabilities, and it is not 0 for a single pair.

    Raises:
        TypeError, ValueError: another distance, in the constructor; from `forward`: labels or cluster labels of another
            length, cluster labels that are not integers, cluster labels for one side only.

    Example:
        >>> import torch
        >>> from mcl_kernels.integrations.pytorch_metric_learning import NTXentLoss
        >>> embeddings, identity = torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2)
        >>> clusters = torch.tensor([0, 0, 1, 1]).repeat(2)
        >>> NTXentLoss(temperature=1.0)(embeddings, identity, cluster_labels=clusters)
        tensor(0.5514)
    """

    def __init__(self, temperature: float = 0.07, **kwargs: Any) -> None:
        super().__init__(temperature=temperature, **kwargs)
        if type(self.distance) is not distances.CosineSimilarity or (self.distance.p, self.distance.power) != (2, 1):
            raise ValueError(f"distance must be CosineSimilarity() with p=2 and power=1: got {self.distance}")

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        cluster_labels: Tensor | None = None,
        ref_cluster_labels: Tensor | None = None,
    ) -> Any:
        """Computes the loss of embeddings [N, D], not normalized, against each other or against ref_emb [M, D].

        Labels are [N], and [M] for ref_emb; cluster labels are integers, the others have any dtype.
        """
        check_embeddings("embeddings", embeddings)
        keys = embeddings if ref_emb is None else ref_emb
        check_embeddings("ref_emb", keys)
        check_same_width("ref_emb", keys, "embeddings", embeddings)
        labels, ref_labels, cluster_labels, ref_cluster_labels = (  # the host's labels may be on another device
            x.to(embeddings.device) if isinstance(x, Tensor) else x
            for x in (labels, ref_labels, cluster_labels, ref_cluster_labels)
        )
        if cluster_labels is not None:
            cluster_labels = as_integers("cluster_labels", cluster_labels, "embeddings", embeddings)
            if ref_emb is None:
                ref_cluster_labels = cluster_labels
            ref_cluster_labels = as_integers("ref_cluster_labels", ref_cluster_labels, "ref_emb", keys)
        if indices_tuple is not None:
            a1, p, a2, n = loss_and_miner_utils.convert_to_pairs(indices_tuple, labels, ref_labels)
            if cluster_labels is not None and ref_cluster_labels is not None:
                same = (cluster_labels[a2] == ref_cluster_labels[n]) & (cluster_labels[a2] >= 0)
                a2, n = a2[same], n[same]
            return super().forward(embeddings, labels, (a1, p, a2, n), ref_emb, ref_labels)
        self.reset_stats()
        if ref_emb is None or (ref_labels is None and keys.shape == embeddings.shape):
            ref_labels = labels
        excludes_self = ref_labels is labels  # the host's criterion for row i of both sides being the same sample
        identity, ref_identity = _comparable(labels, ref_labels)
        identity = as_integers("labels", identity, "embeddings", embeddings)
        ref_identity = as_integers("ref_labels", ref_identity, "ref_emb", keys)
        anchors, positives = _equal_pairs(identity, ref_identity, excludes_self=excludes_self)
        losses = self.zero_losses()
        if len(anchors) > 0:
            query = normalize_rows(embeddings)
            key = query if ref_emb is None else normalize_rows(ref_emb)
            scale = 1.0 / as_scalar(self.temperature)
            a = scale * row_dot(query[anchors], key[positives], compute_dtype(query, key))
            b = masked_logsumexp(
                query,
                None if ref_emb is None else key,
                cluster_labels,
                None if ref_emb is None else ref_cluster_labels,
                scale=scale,
                ids=identity,
                key_ids=None if ref_emb is None else ref_identity,
            )
            # Without negatives b is -inf: the loss and its gradient are 0.
            pairs = info_nce(a, b[anchors])
            losses = {"loss": {"losses": pairs, "indices": (anchors, positives), "reduction_type": "pos_pair"}}
        self.add_embedding_regularization_to_loss_dict(losses, embeddings)
        return self.reducer(losses, embeddings, labels)


def _comparable(labels: Any, ref_labels: Any) -> tuple[Any, Any]:
    """Maps labels of any dtype, which the host accepts, to integers that are equal for equal labels."""
    tensors = [x for x in (labels, ref_labels) if isinstance(x, Tensor)]
    if len(tensors) < 2 or all(x.dtype in INTEGER_DTYPES for x in tensors):
        return labels, ref_labels
    _, ids = torch.unique(torch.cat([x.flatten() for x in tensors]), return_inverse=True)
    return ids[: labels.numel()].view_as(labels), ids[labels.numel() :].view_as(ref_labels)


def _equal_pairs(identity: Tensor, ref_identity: Tensor, *, excludes_self: bool) -> tuple[Tensor, Tensor]:
    """All pairs (i, j) of equal identity, without i = j if `excludes_self`; builds no matrix of pairs."""
    ordered, order = ref_identity.sort(stable=True)
    begin, end = torch.searchsorted(ordered, identity), torch.searchsorted(ordered, identity, right=True)
    counts = end - begin
    anchors = torch.repeat_interleave(torch.arange(len(identity), device=identity.device), counts)
    offsets = torch.arange(len(anchors), device=identity.device) - (counts.cumsum(0) - counts)[anchors]
    positives = order[begin[anchors] + offsets]
    kept = anchors != positives if excludes_self else torch.ones_like(anchors, dtype=torch.bool)
    return anchors[kept], positives[kept]
