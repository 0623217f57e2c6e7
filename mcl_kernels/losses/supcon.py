"""`supcon_loss` and its module."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mcl_kernels._validate import as_integers, check_choice, check_embeddings
from mcl_kernels.backends.table import resolve
from mcl_kernels.distributed.exchange import gather_vectors
from mcl_kernels.distributed.group import Ranks, ranks_of
from mcl_kernels.logsumexp.api import Names, check_pairs
from mcl_kernels.logsumexp.inputs import Inputs
from mcl_kernels.logsumexp.ops import compute
from mcl_kernels.logsumexp.pairs import Pairs, repeat
from mcl_kernels.losses.group_means import Groups, mean_of_others
from mcl_kernels.losses.negatives import joined
from mcl_kernels.losses.options import LossModule, Options, check_module_temperature, inverse_temperature
from mcl_kernels.normalize import compute_dtype, normalize_rows, row_dot
from mcl_kernels.objectives import info_nce

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

POSITIVES = ("mean", "sum")


def supcon_loss(
    features: Tensor,
    targets: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    positives: str = "mean",
    ids: Tensor | None = None,
    negatives: str = "same",
    normalize: bool = True,
    reduction: str = "mean",
    impl: str = "auto",
    group: ProcessGroup | None = None,
    exchange: str = "auto",
) -> Tensor:
    """Supervised contrastive loss: each row against all others of its target, and the negatives of its own cluster.

        z      = all views of all samples, one view after the other                [N V, D]
        P_i    = {p: t_p = t_i, p != i}            N_i = {j: t_j != t_i, y_j = y_i}
        b_i    = log sum_{j in N_i} exp(<z_i, z_j> / t)
        c_i    = log sum_{p in P_i} exp(<z_i, z_p> / t)
        loss_i = log(exp(b_i) + exp(c_i)) - mean_{p in P_i} <z_i, z_p> / t         positives="mean"
        loss_i = log(exp(b_i) + exp(c_i)) - c_i                                    positives="sum"

    Targets t say what is alike: classes, or which sample a view is of. Labels y are pseudo labels, which restrict the
    negatives alone. "mean" is SupCon's L_out; "sum" has one logarithm of all positives. Memory is linear in N V for
    any number of positives. An anchor without positives has loss 0 and gradient 0, and counts in the mean; one without
    negatives is compared with its positives alone. Two views without targets are `nt_xent`.

    Args:
        features: [N, D] with targets, or V views of each sample, [N, V, D]; float16, bfloat16, float32 or float64, any
            strides.
        targets: classes of the samples, integers [N]; a negative one makes its sample a class of its own. None: each
            sample is a class of its own, and its positives are its other views.
        labels: pseudo labels of the samples, integers [N]; None: one cluster. A negative label has no negatives.
        temperature: t > 0, a float or a tensor [] or [1]; see `masked_info_nce`.
        positives: "mean" or "sum".
        ids: identity of the samples, integers [N]; equal ids are never negatives. **Equal ids must have equal
            targets.** Default: every sample its own.
        negatives, impl, group: as in `masked_info_nce`.
        normalize: L2-normalise in fp32, rounded once to the dtype of features.
        reduction: "mean" over all N V anchors (0 for N = 0), "sum" or "none".
        exchange: every exchange gathers all rows, since positives are in other clusters too.

    Returns:
        A scalar, or [N V] with `reduction="none"`, one view after the other; fp32, or fp64 for fp64 features.

    Raises:
        TypeError, ValueError, RuntimeError: as `masked_info_nce`; features [N, D] without targets, a vector of
            temperatures.

    Source: Khosla et al. 2020 (arXiv 2004.11362), equation 2 for "mean"; "sum" is the loss of solo-learn's SimCLR with
        several views. Negatives of arXiv 2402.11816.

    Example:
        >>> features, targets = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> supcon_loss(features, targets, temperature=1.0)
        tensor(1.0986)
        >>> supcon_loss(features, targets, labels=torch.tensor([0, 1, 0, 1]), temperature=1.0)
        tensor(0.6931)
    """
    options = Options(negatives, normalize, reduction, impl, group, exchange)
    ranks = None if group is None else ranks_of(group)
    is_one = isinstance(temperature, Tensor) and temperature.shape == (1,)
    compared = temperature.reshape(()) if is_one else temperature  # type: ignore[union-attr]
    agreed = options.agreed_call(
        ranks, "supcon_loss", features=features, targets=targets, labels=labels, ids=ids, temperature=compared,
        positives=positives,
    )  # fmt: skip
    with agreed:
        options.check()
        check_choice("positives", positives, POSITIVES)
        samples = _check_samples(features, targets, labels, ids, negatives, ranks)
        impl = resolve("logsumexp", impl, features.device)
        rows = features if features.ndim == 2 else features.transpose(0, 1).flatten(0, 1)
        rows = normalize_rows(rows, impl) if normalize else rows
        _check_one_temperature(temperature)
        scale = inverse_temperature(compared, rows, compute_dtype(rows))
    batch = _Batch.of(rows, scale, samples, negatives, ranks)
    return options.reduce(batch.losses(positives, impl), ranks, batch.rows.shape[0])


def _check_one_temperature(temperature: float | Tensor) -> None:
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        raise ValueError(f"temperature must be one number: got shape {list(temperature.shape)}")


class _Samples(NamedTuple):
    """Checked integers of the samples, [N] each."""

    targets: Tensor  # at least 0, or a negative number that is the sample's alone
    labels: Tensor | None
    ids: Tensor | None
    has_targets: bool
    views: int


def _check_samples(
    features: Tensor,
    targets: Tensor | None,
    labels: Tensor | None,
    ids: Tensor | None,
    negatives: str,
    ranks: Ranks | None,
) -> _Samples:
    check_embeddings("features", features, "[samples, features]", "[samples, views, features]")
    if features.ndim == 2 and targets is None:
        raise ValueError("features [samples, features] need targets, or give views [samples, views, features]")
    names = Names("features", "features", "labels")
    pairs = check_pairs(features, features, labels, labels, ids, ids, negatives, key_is_query=True, names=names)
    views = 1 if features.ndim == 2 else features.shape[1]
    own = torch.arange(features.shape[0], device=features.device) if ranks is None else ranks.row_ids(features)
    if targets is None:
        return _Samples(own, pairs.labels, pairs.ids, has_targets=False, views=views)
    targets = as_integers("targets", targets, "features", features)
    return _Samples(torch.where(targets < 0, -1 - own, targets), pairs.labels, pairs.ids, has_targets=True, views=views)


class _Batch(NamedTuple):
    """Rows of all ranks, or of this process, with the anchors among them."""

    rows: Tensor  # [R, D]
    scale: Tensor  # []
    groups: Groups  # of equal targets
    labels: Tensor | None  # int64 [R]
    excluded: Tensor  # int64 [R]; equal ones are never negatives
    has_ids: bool  # `excluded` may be equal for different targets
    negatives: str
    anchors: slice | None  # rows of this rank; None: all rows, of this process

    @classmethod
    def of(cls, rows: Tensor, scale: Tensor, samples: _Samples, negatives: str, ranks: Ranks | None) -> _Batch:
        targets, labels, ids = (repeat(x, samples.views) for x in samples[:3])
        anchors = None
        if ranks is not None:
            optional = [x for x in (labels, ids) if x is not None]
            assert targets is not None
            (rows, targets, *gathered), anchors = gather_vectors([rows, targets, *optional], ranks)
            ids = None if ids is None else gathered.pop()
            labels = None if labels is None else gathered.pop()
        assert targets is not None
        groups = Groups.of(targets)
        excluded = groups.row_group
        if ids is not None:
            own = -1 - Groups.of(ids).row_group
            excluded = torch.where(targets < 0, own, targets) if samples.has_targets else ids
        return cls(rows, scale, groups, labels, excluded, ids is not None, negatives, anchors)

    def losses(self, positives: str, impl: str) -> Tensor:
        """The loss of each anchor."""
        others = self._of_anchors(self.groups.others())
        alone = others == 0
        # Twice `where`: without positives a value is safe to differentiate, then the result is dropped.
        wide = self.rows.to(self.scale.dtype)
        mean = self._of_anchors(mean_of_others(wide, self.groups))
        a = self.scale * row_dot(self._of_anchors(wide), mean, self.scale.dtype)
        if positives == "mean":
            safe_a = torch.where(alone, a.detach(), a)
            loss = self._log_sum_exp_of_all(impl).masked_fill(alone, 0.0) - safe_a
        else:
            c, b = self._log_sum_exps(impl)
            loss = info_nce(c.masked_fill(alone, 0.0), b.masked_fill(alone, 0.0))
        # 0 * a is 0, but NaN where a row held NaN or infinity: that must not pass for a loss of 0.
        return loss.masked_fill(alone, 0.0) + 0.0 * a.detach()

    def _log_sum_exp_of_all(self, impl: str) -> Tensor:
        """Log-sum-exp of positives and negatives, -inf without both."""
        if self.labels is None and not self.has_ids:
            return compute(self._inputs(None, None, "all"), impl)[0]
        return joined(self._log_sum_exps(impl))

    def _log_sum_exps(self, impl: str) -> tuple[Tensor, Tensor]:
        """Log-sum-exps of the positives and of the negatives."""
        positives = compute(self._inputs(self.groups.row_group, None, "same"), impl)[0]
        return positives, compute(self._inputs(self.labels, self.excluded, self.negatives), impl)[0]

    def _inputs(self, labels: Tensor | None, ids: Tensor | None, negatives: str) -> Inputs:
        """Anchors and all rows with these labels and ids; None: a row's index is its id."""
        if self.anchors is None:
            pairs = Pairs(labels, None, ids, None, negatives)
            return Inputs.of_self(self.rows, self.scale, pairs.with_default_ids() if ids is None else pairs)
        if ids is None:
            ids = torch.arange(self.rows.shape[0], device=self.rows.device)
        anchor_labels = None if labels is None else self._of_anchors(labels)
        pairs = Pairs(anchor_labels, labels, self._of_anchors(ids), ids, negatives)
        return Inputs(self._of_anchors(self.rows), self.rows, self.scale, pairs)

    def _of_anchors(self, x: Tensor) -> Tensor:
        return x if self.anchors is None else x[self.anchors]


class SupConLoss(LossModule):
    """`supcon_loss` as a module: each row against all others of its target, and the negatives of its own cluster.

    Args:
        temperature: t > 0, a float or a tensor [] or [1]. A Parameter is learned. The value of a tensor is not checked.
        positives, negatives, normalize, reduction, impl, group, exchange: as in `supcon_loss`.

    Raises:
        TypeError, ValueError: an option of the wrong type or value, in the constructor. `forward` raises as
            `supcon_loss`.

    Source: as `supcon_loss`.

    Example:
        >>> loss = SupConLoss(temperature=1.0)
        >>> loss
        SupConLoss(temperature=1.0)
        >>> loss(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(1.0986)
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        positives: str = "mean",
        negatives: str = "same",
        normalize: bool = True,
        reduction: str = "mean",
        impl: str = "auto",
        group: ProcessGroup | None = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__(
            negatives=negatives, normalize=normalize, reduction=reduction, impl=impl, group=group, exchange=exchange
        )
        check_choice("positives", positives, POSITIVES)
        check_module_temperature(temperature)
        _check_one_temperature(temperature)
        self.options["positives"] = positives
        self.temperature = temperature

    def forward(
        self,
        features: Tensor,
        targets: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        ids: Tensor | None = None,
    ) -> Tensor:
        """Computes the loss of a batch; the arguments are those of `supcon_loss`."""
        return supcon_loss(features, targets, labels, temperature=self.temperature, ids=ids, **self.options)
