"""`clip_loss` and its module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mcl_kernels._validate import check_embeddings, check_positive, check_same_shape
from mcl_kernels.backends.table import resolve
from mcl_kernels.distributed.group import ranks_of
from mcl_kernels.logsumexp.api import Names, check_pairs, check_scale
from mcl_kernels.logsumexp.inputs import Inputs
from mcl_kernels.losses import per_anchor, sharded
from mcl_kernels.losses.options import LossModule, Options
from mcl_kernels.normalize import compute_dtype, normalize_rows
from mcl_kernels.objectives import ObjectiveLike, info_nce

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    labels: Tensor | None = None,
    *,
    logit_scale: float | Tensor,
    text_labels: Tensor | None = None,
    ids: Tensor | None = None,
    negatives: str = "same",
    objective: ObjectiveLike = info_nce,
    normalize: bool = False,
    reduction: str = "mean",
    impl: str = "auto",
    group: ProcessGroup | None = None,
    exchange: str = "auto",
) -> Tensor:
    """CLIP's loss: images against captions and captions against images, each within its own cluster.

        s_ij   = logit_scale * <image_i, text_j>,    a_i = s_ii
        b_i    = log sum_{j: y_j = y_i, u_j != u_i} exp(s_ij)            images, in one pass with
        c_j    = log sum_{i: y_i = y_j, u_i != u_j} exp(s_ij)            captions
        loss_i = (objective(a_i, b_i) + objective(a_i, c_i)) / 2

    Without labels this is CLIP's loss. An anchor without negatives has loss 0 and gradient 0.

    Args:
        image_features, text_features: [N, D] each, caption i of image i; normalised by the model, as in CLIP,
            or here with `normalize=True`.
        labels: pseudo labels of the images, integers [N]; None: one cluster. A negative label matches nothing.
        logit_scale: already exponentiated, a float or a tensor [] or [1] (learnable; exact gradient).
        text_labels: pseudo labels of the captions, integers [N]; None: those of the images.
        ids: identity of the pairs, integers [N]; equal ids are never negatives. Default: every pair its own.
        negatives, objective, impl, group, exchange: as in `masked_info_nce`.
        normalize: L2-normalise both in fp32, rounded once to the dtype they came in.
        reduction: "mean" over the N pairs (0 for N = 0), "sum" or "none".

    Returns:
        A scalar, or [N] with `reduction="none"`; fp32, or fp64 where an input is fp64.

    Raises:
        TypeError, ValueError, RuntimeError: as `masked_info_nce`.

    Source: Radford et al. 2021 (arXiv 2103.00020), figure 3, with the negatives of arXiv 2402.11816.

    Example:
        >>> features = torch.eye(4)
        >>> clip_loss(features, features, labels=torch.tensor([0, 0, 1, 1]), logit_scale=1.0)
        tensor(0.3133)
    """
    options = Options(negatives, normalize, reduction, impl, group, exchange, objective)
    ranks = None if group is None else ranks_of(group)
    agreed = options.agreed_call(
        ranks, "clip_loss", image_features=image_features, text_features=text_features, labels=labels,
        text_labels=text_labels, ids=ids, logit_scale=logit_scale,
    )  # fmt: skip
    with agreed:
        options.check()
        check_embeddings("image_features", image_features)
        check_embeddings("text_features", text_features)
        check_same_shape("text_features", text_features, "image_features", image_features)
        has_default_ids = ids is None and ranks is None
        ids = ranks.row_ids(image_features) if ids is None and ranks is not None else ids
        names = Names("image_features", "text_features", "text_labels")
        pairs = check_pairs(
            image_features, text_features, labels, text_labels, ids, ids, negatives, key_is_query=True, names=names
        )
        if has_default_ids:
            pairs = pairs.with_default_ids()
        impl = resolve("logsumexp", impl, image_features.device)
        if ranks is None and per_anchor.is_whole(objective, impl, pairs, image_features, text_features, logit_scale):
            scale = _check_logit_scale(logit_scale, image_features, compute_dtype(image_features, text_features))
            loss = per_anchor.whole_bidirectional(image_features, text_features, scale, pairs, normalize=normalize)
            return options.reduce(loss)
        if normalize:
            image_features, text_features = normalize_rows(image_features, impl), normalize_rows(text_features, impl)
        scale = _check_logit_scale(logit_scale, image_features, compute_dtype(image_features, text_features))
    inputs = Inputs(image_features, text_features, scale, pairs, bidirectional=True)
    if ranks is None:
        return options.reduce(per_anchor.bidirectional(inputs, objective, impl))
    bidirectional = sharded.bidirectional if labels is None or text_labels is None else sharded.bidirectional_split
    call = sharded.Call(objective, impl, ranks, options.needed_exchange())
    loss, samples = bidirectional(inputs, call)
    return options.reduce(loss, ranks, samples)


def _check_logit_scale(logit_scale: float | Tensor, image_features: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale of the logits, []."""
    if not isinstance(logit_scale, Tensor):
        check_positive("logit_scale", logit_scale, "a number or a tensor")
    elif logit_scale.numel() != 1:
        raise ValueError(f"logit_scale must be one number: got shape {list(logit_scale.shape)}")
    else:
        logit_scale = logit_scale.reshape(())
    return check_scale("logit_scale", logit_scale, image_features, dtype)


class ClipLoss(LossModule):
    """`clip_loss` as a module, CLIP's loss: images against captions and captions against images, within clusters.

    The scale of the logits belongs to the model, and is given to `forward`.

    Args:
        negatives, objective, normalize, reduction, impl, group, exchange: as in `clip_loss`.

    Raises:
        TypeError, ValueError: an option of the wrong type or value, in the constructor. `forward` raises as
            `clip_loss`.

    Source: as `clip_loss`.

    Example:
        >>> features = torch.eye(4)
        >>> ClipLoss()(features, features, logit_scale=1.0, labels=torch.tensor([0, 0, 1, 1]))
        tensor(0.3133)
    """

    def __init__(
        self,
        *,
        negatives: str = "same",
        objective: ObjectiveLike = info_nce,
        normalize: bool = False,
        reduction: str = "mean",
        impl: str = "auto",
        group: ProcessGroup | None = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__(
            negatives=negatives, objective=objective, normalize=normalize, reduction=reduction, impl=impl, group=group,
            exchange=exchange,
        )  # fmt: skip

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        labels: Tensor | None = None,
        *,
        text_labels: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> Tensor:
        """Computes the loss of a batch; the arguments are those of `clip_loss`."""
        return clip_loss(
            image_features, text_features, labels, logit_scale=logit_scale, text_labels=text_labels, ids=ids,
            **self.options,
        )  # fmt: skip
