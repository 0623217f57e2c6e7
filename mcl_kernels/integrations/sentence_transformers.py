"""Losses of sentence-transformers with in-batch negatives, which come from the anchor's own cluster."""

from __future__ import annotations

from mcl_kernels.integrations._host import gathered, require

require("sentence-transformers", "6.0")

from typing import Any

import torch
from sentence_transformers import util
from sentence_transformers.sentence_transformer import losses as host
from torch import Tensor

from mcl_kernels._validate import as_integers, check_same_shape
from mcl_kernels.logsumexp import masked_logsumexp
from mcl_kernels.losses.negatives import joined
from mcl_kernels.normalize import compute_dtype, normalize_rows, row_dot
from mcl_kernels.objectives import info_nce


class MultipleNegativesRankingLoss(host.MultipleNegativesRankingLoss):  # type: ignore[misc]
    """`sentence_transformers.losses.MultipleNegativesRankingLoss` with pseudo labels.

    The constructor is the host's, with one more argument, `cluster_labels`. `directions`, `partition_mode` and
    `hardness_mode` are supported; similarities other than `cos_sim` and `dot_score` are refused. With
    `cluster_labels=True` the label that the host's trainer passes (a column `label`, `labels`, `score` or `scores` of
    the data set) **is the pseudo label** of an anchor and its documents, including hard negatives. By default that
    label is ignored, as in the host.

    Raises:
        TypeError, ValueError: another similarity, or a `cluster_labels` that is no bool, in the constructor; with
            `cluster_labels=True` a batch without labels, or with labels that are not integers [N].

    Example: for a data set with columns anchor, positive and label

        loss = MultipleNegativesRankingLoss(model, cluster_labels=True)
        SentenceTransformerTrainer(model=model, train_dataset=dataset, loss=loss).train()
    """

    def __init__(self, *args: Any, cluster_labels: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(cluster_labels, bool):
            raise TypeError(f"cluster_labels must be True or False: got {type(cluster_labels).__name__}")
        self.cluster_labels = cluster_labels
        if self.similarity_fct not in (util.cos_sim, util.dot_score):
            raise ValueError(
                f"similarity_fct must be cos_sim or dot_score of sentence_transformers: got {self.similarity_fct}"
            )

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """Computes the loss of anchors, positives and any number of hard negatives, [N, D] each.

        `labels` are integers [N] with `cluster_labels=True`, and otherwise ignored.
        """
        if len(embeddings) < 2:
            raise ValueError(f"embeddings must hold anchors and positives: got {len(embeddings)} tensors")
        n, columns = embeddings[0].shape[0], len(embeddings) - 1
        for i, x in enumerate(embeddings[1:], 1):
            check_same_shape(f"embeddings[{i}]", x, "embeddings[0]", embeddings[0])
        if self.cluster_labels and labels is None:
            raise ValueError("cluster_labels=True needs a column label of the data set: got none")
        if self.cluster_labels:
            labels = as_integers("labels (a column of the data set)", labels, "embeddings[0]", embeddings[0])
        else:
            labels = None
        if self.similarity_fct is util.cos_sim:
            embeddings = [normalize_rows(x) for x in embeddings]
        (query, positive, *hard), first_row, all_labels = embeddings, 0, labels
        if self.gather_across_devices and util.get_world_size() > 1:
            embeddings = [util.all_gather_with_grad(x) for x in embeddings]
            first_row = util.get_rank() * n
            all_labels = None if labels is None else gathered(labels)
        queries, docs = embeddings[0], torch.cat(embeddings[1:])
        doc_labels = None if all_labels is None else all_labels.repeat(columns)
        query_ids, doc_ids = (torch.arange(len(x), device=docs.device) for x in (queries, docs))
        own_ids = query_ids[first_row : first_row + n]
        a = self.scale * row_dot(query, positive, compute_dtype(query, positive))
        # Hard negatives are negatives of their own anchor too. Documents of one anchor are not negatives of each other.
        logsumexps = {
            direction: masked_logsumexp(x, keys, labels, key_labels, scale=self.scale, ids=own_ids, key_ids=key_ids)
            for direction, x, keys, key_labels, key_ids in (
                ("query_to_doc", query, docs, doc_labels, doc_ids),
                ("query_to_query", query, queries, all_labels, query_ids),
                ("doc_to_query", positive, queries, all_labels, query_ids),
                ("doc_to_doc", positive, docs, doc_labels, query_ids.repeat(columns)),
            )
            if direction in self.directions
        }
        if self.hardness_mode is not None and self.hardness_strength > 0.0:
            key_ids = doc_ids, query_ids.repeat(columns)
            logsumexps["query_to_doc"] = self._with_hardness(query, docs, labels, doc_labels, own_ids, key_ids, hard)
        if self.partition_mode == "per_direction":
            return torch.stack([info_nce(a, b) for b in logsumexps.values()]).mean()
        # The host's denominator contains the positive once for each direction that includes it.
        positives = [a] if "doc_to_query" in logsumexps else []
        return info_nce(a, torch.stack([*logsumexps.values(), *positives]).logsumexp(0)).mean()

    def _with_hardness(
        self,
        query: Tensor,
        docs: Tensor,
        labels: Tensor | None,
        doc_labels: Tensor | None,
        ids: Tensor,
        doc_ids: tuple[Tensor, Tensor],
        hard: list[Tensor],
    ) -> Tensor:
        """Log-sum-exp of queries and documents, the host's penalty alpha sg(<q, d>) on the logits of its mode.

        `doc_ids` are those of documents and those of their queries; `hard` are the own hard negatives of each query.
        """

        def log_sum_exp(key_ids: Tensor, strength: float) -> Tensor:
            b = masked_logsumexp(query, docs, labels, doc_labels, scale=self.scale + strength, ids=ids, key_ids=key_ids)
            return _with_gradient_of(self.scale / (self.scale + strength), b)

        alpha, own_documents, of_queries = self.hardness_strength, *doc_ids
        if self.hardness_mode == "all_negatives":
            return log_sum_exp(own_documents, alpha)
        others = log_sum_exp(of_queries, alpha if self.hardness_mode == "in_batch_negatives" else 0.0)
        if not hard:
            return others
        own_strength = alpha if self.hardness_mode == "hard_negatives" else 0.0
        dtype = compute_dtype(query, docs)
        products = torch.stack([row_dot(query, x, dtype) for x in hard], dim=1)
        logits = self.scale * products + own_strength * products.detach()
        if labels is not None:  # a negative label matches nothing
            logits = logits.masked_fill((labels < 0).unsqueeze(1), -torch.inf)
        return joined((others, logits))

    def get_config_dict(self) -> dict[str, Any]:
        """Returns the host's configuration for the model card, and `cluster_labels`."""
        return {**super().get_config_dict(), "cluster_labels": self.cluster_labels}


class CachedMultipleNegativesRankingLoss(host.CachedMultipleNegativesRankingLoss):  # type: ignore[misc]
    """`sentence_transformers.losses.CachedMultipleNegativesRankingLoss` with pseudo labels.

    The host embeds one mini-batch at a time, twice; the loss of all embeddings is that of
    `MultipleNegativesRankingLoss` here, with its argument `cluster_labels`, in one call and without a matrix of scores.

    Raises:
        TypeError, ValueError: as `MultipleNegativesRankingLoss`.

    Example: for a data set with columns anchor, positive and label

        loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=64, cluster_labels=True)
        SentenceTransformerTrainer(model=model, train_dataset=dataset, loss=loss).train()
    """

    loss: MultipleNegativesRankingLoss

    def __init__(self, *args: Any, cluster_labels: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = {name: getattr(self.loss, name) for name in self._delegated_to_wrapped_loss}
        self.loss = MultipleNegativesRankingLoss(self.model, cluster_labels=cluster_labels, **settings)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Computes the loss of the embeddings of all mini-batches, and with_backward their gradients."""
        loss = self.loss.compute_loss_from_embeddings([torch.cat(parts) for parts in reps], labels)
        if with_backward:
            loss.backward()  # type: ignore[no-untyped-call]
            loss = loss.detach()
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        """Returns the host's configuration for the model card, and `cluster_labels`."""
        return {**super().get_config_dict(), "cluster_labels": self.loss.cluster_labels}


def _with_gradient_of(factor: float, x: Tensor) -> Tensor:
    """x, with its gradient multiplied by a factor in (0, 1]; -inf stays what it is."""
    return x if factor == 1.0 else factor * x + ((1.0 - factor) * x).detach()
