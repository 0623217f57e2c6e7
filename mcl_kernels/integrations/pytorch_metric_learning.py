"""NTXentLoss and SupConLoss of pytorch-metric-learning, with negatives from the anchor's own cluster."""

from __future__ import annotations

from mcl_kernels.integrations._host import as_scalar, require

require("pytorch-metric-learning", "2.5")

from typing import Any, NamedTuple

import torch
from pytorch_metric_learning import distances
from pytorch_metric_learning import losses as host
from pytorch_metric_learning.utils import loss_and_miner_utils
from torch import Tensor

from mcl_kernels._validate import INTEGER_DTYPES, as_integers, check_embeddings, check_same_width
from mcl_kernels.logsumexp import count_negatives, masked_logsumexp
from mcl_kernels.losses.group_means import Groups, mean_of_others
from mcl_kernels.losses.negatives import joined
from mcl_kernels.normalize import compute_dtype, normalize_rows, row_dot
from mcl_kernels.objectives import info_nce


class _WithClusters(host.BaseMetricLossFunction):  # type: ignore[misc]
    """A loss of the host that takes `cluster_labels`; with the pairs of a miner the host computes it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
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
        batch = _Batch.of(embeddings, labels, ref_emb, ref_labels, cluster_labels, ref_cluster_labels)
        if indices_tuple is not None:
            pairs = batch.pairs_of_miner(indices_tuple)
            return super().forward(embeddings, batch.labels, pairs, ref_emb, batch.ref_labels)
        self.reset_stats()
        losses, found = self.zero_losses(), self._losses(batch)
        if found is not None:
            losses = {"loss": found}
        self.add_embedding_regularization_to_loss_dict(losses, embeddings)
        return self.reducer(losses, embeddings, batch.labels)

    def _losses(self, batch: _Batch) -> dict[str, Any] | None:
        """Losses as the host's reducer takes them; None: the loss is 0."""
        raise NotImplementedError


class NTXentLoss(_WithClusters, host.NTXentLoss):  # type: ignore[misc]
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

    def _losses(self, batch: _Batch) -> dict[str, Any] | None:
        identity, ref_identity, excludes_self = batch.identities()
        anchors, positives = _equal_pairs(identity, ref_identity, excludes_self=excludes_self)
        if len(anchors) == 0:
            return None
        query, key = batch.unit_rows()
        scale = 1.0 / as_scalar(self.temperature)
        a = scale * row_dot(query[anchors], key[positives], compute_dtype(query, key))
        b = batch.log_sum_exp(query, key, scale, batch.cluster_labels, batch.ref_cluster_labels, identity, ref_identity)
        # Without negatives b is -inf: the loss and its gradient are 0.
        losses = info_nce(a, b[anchors])
        return {"losses": losses, "indices": (anchors, positives), "reduction_type": "pos_pair"}


class SupConLoss(_WithClusters, host.SupConLoss):  # type: ignore[misc]
    """`pytorch_metric_learning.losses.SupConLoss` with `cluster_labels`, in linear memory.

    Arguments, labels and miners are as in `NTXentLoss` here: `labels` are identities, `cluster_labels` restrict the
    negatives. An anchor is compared with all its positives, whatever their cluster. As in the host, the loss is the
    mean of the losses above 0, and 0 for a batch without any positive or without any negative.

    Raises:
        TypeError, ValueError: as `NTXentLoss`.

    Example:
        >>> import torch
        >>> from mcl_kernels.integrations.pytorch_metric_learning import SupConLoss
        >>> embeddings, classes = torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2) // 2
        >>> SupConLoss(temperature=1.0)(embeddings, classes, cluster_labels=torch.arange(8) % 2)
        tensor(1.5715)
    """

    def __init__(self, temperature: float = 0.1, **kwargs: Any) -> None:
        super().__init__(temperature=temperature, **kwargs)

    def _losses(self, batch: _Batch) -> dict[str, Any] | None:
        losses = _supcon(batch, as_scalar(self.temperature))
        if losses is None:
            return None
        indices = torch.arange(len(losses), device=losses.device)
        return {"losses": losses, "indices": indices, "reduction_type": "element"}


def _supcon(batch: _Batch, temperature: Any) -> Tensor | None:
    """The loss of each embedding; None for a batch without any positive or without any negative."""
    identity, ref_identity, excludes_self = batch.identities()
    n, m = len(identity), len(ref_identity)
    groups = Groups.of(torch.cat((identity, ref_identity)))
    identity, ref_identity = groups.row_group[:n], groups.row_group[n:]
    own, ref = (torch.arange(size, device=identity.device) for size in (n, m))
    own_ids, ref_ids = (own, ref) if excludes_self else (None, None)
    positives = count_negatives(identity, ref_identity, ids=own_ids, key_ids=ref_ids)
    clusters, ref_clusters = batch.cluster_labels, batch.ref_cluster_labels
    zeros = torch.zeros_like(identity), torch.zeros_like(ref_identity)
    labels, ref_labels = zeros if clusters is None or ref_clusters is None else (clusters, ref_clusters)
    negatives = count_negatives(labels, ref_labels, ids=identity, key_ids=ref_identity)
    if not (bool(positives.any()) and bool(negatives.any())):
        return None
    query, key = batch.unit_rows()
    scale = 1.0 / temperature
    c = batch.log_sum_exp(query, key, scale, identity, ref_identity, own_ids, ref_ids)
    b = batch.log_sum_exp(query, key, scale, clusters, ref_clusters, identity, ref_identity)
    # The mean over the keys of an identity: each has a row of zeros for every query of that identity, too.
    dtype = compute_dtype(query, key)
    wide = key.to(dtype)
    others = groups.others()[:n].unsqueeze(1)
    total = mean_of_others(torch.cat((torch.zeros_like(query, dtype=dtype), wide)), groups)[:n] * others
    if excludes_self:
        total = total - wide[:n]
    a = scale * row_dot(query, total / positives.clamp(min=1).unsqueeze(1), dtype)
    # The host keeps losses above 0, so a single positive without negatives has to have a loss of exactly 0.
    nothing = (positives == 0) | ((positives == 1) & (negatives == 0))
    each: Tensor = joined((b, c)).masked_fill(nothing, 0.0) - a.masked_fill(nothing, 0.0)
    return each


class _Batch(NamedTuple):
    """Checked arguments, on one device."""

    embeddings: Tensor
    labels: Any
    ref_emb: Tensor | None
    ref_labels: Any
    cluster_labels: Tensor | None
    ref_cluster_labels: Tensor | None

    @classmethod
    def of(
        cls,
        embeddings: Tensor,
        labels: Any,
        ref_emb: Tensor | None,
        ref_labels: Any,
        cluster_labels: Tensor | None,
        ref_cluster_labels: Tensor | None,
    ) -> _Batch:
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
        return cls(embeddings, labels, ref_emb, ref_labels, cluster_labels, ref_cluster_labels)

    def pairs_of_miner(self, indices_tuple: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Pairs of a miner, the negative ones within clusters."""
        a1, p, a2, n = loss_and_miner_utils.convert_to_pairs(indices_tuple, self.labels, self.ref_labels)
        if self.cluster_labels is not None and self.ref_cluster_labels is not None:
            same = (self.cluster_labels[a2] == self.ref_cluster_labels[n]) & (self.cluster_labels[a2] >= 0)
            a2, n = a2[same], n[same]
        return a1, p, a2, n

    def identities(self) -> tuple[Tensor, Tensor, bool]:
        """Identities of both sides as integers, and whether row i of both sides is the same sample."""
        labels, ref_labels, keys = (
            self.labels,
            self.ref_labels,
            self.embeddings if self.ref_emb is None else self.ref_emb,
        )
        if self.ref_emb is None or (ref_labels is None and keys.shape == self.embeddings.shape):
            ref_labels = labels
        excludes_self = ref_labels is labels  # the host's criterion
        identity, ref_identity = _comparable(labels, ref_labels)
        identity = as_integers("labels", identity, "embeddings", self.embeddings)
        return identity, as_integers("ref_labels", ref_identity, "ref_emb", keys), excludes_self

    def unit_rows(self) -> tuple[Tensor, Tensor]:
        """Queries and keys of length 1."""
        query = normalize_rows(self.embeddings)
        return query, query if self.ref_emb is None else normalize_rows(self.ref_emb)

    def log_sum_exp(
        self,
        query: Tensor,
        key: Tensor,
        scale: Any,
        labels: Tensor | None,
        key_labels: Tensor | None,
        ids: Tensor | None,
        key_ids: Tensor | None,
    ) -> Tensor:
        if self.ref_emb is None:  # the self form, in fewer operations
            return masked_logsumexp(query, labels=labels, scale=scale, ids=ids)
        return masked_logsumexp(query, key, labels, key_labels, scale=scale, ids=ids, key_ids=key_ids)


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
