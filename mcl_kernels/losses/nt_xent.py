"""`nt_xent` and its module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from mcl_kernels._validate import check_embeddings, check_same_shape
from mcl_kernels.backends.table import resolve
from mcl_kernels.distributed.group import ranks_of
from mcl_kernels.logsumexp.api import Names, check_pairs
from mcl_kernels.logsumexp.inputs import Inputs
from mcl_kernels.losses import per_anchor, sharded
from mcl_kernels.losses.options import LossModule, Options, check_module_temperature, inverse_temperature
from mcl_kernels.normalize import compute_dtype, joined_views, unit_views
from mcl_kernels.objectives import ObjectiveLike, info_nce

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def nt_xent(
    view_a: Tensor,
    view_b: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.5,
    ids: Tensor | None = None,
    negatives: str = "same",
    objective: ObjectiveLike = info_nce,
    normalize: bool = True,
    reduction: str = "mean",
    impl: str = "auto",
    group: ProcessGroup | None = None,
    exchange: str = "auto",
) -> Tensor:
    """SimCLR's loss (NT-Xent): 2N anchors, each against its other view and all views of its own cluster.

        z      = [view_a; view_b]                                                 [2N, D]
        a_i    = <z_i, z_(i+N mod 2N)> / t_i
        b_i    = log sum_{j: y_j = y_i, u_j != u_i} exp(<z_i, z_j> / t_i)
        loss_i = objective(a_i, b_i) = log(1 + exp(b_i - a_i)) by default

    Without labels this is SimCLR's loss. An anchor without negatives has loss 0 and gradient 0.

    Args:
        view_a, view_b: two views of N samples, [N, D] each, row i of both of sample i.
        labels: pseudo labels of the samples, integers [N]; None: one cluster. A negative label matches nothing.
        temperature: t > 0, a float, a tensor [] or [1], or a vector [2N], view_a first; see `masked_info_nce`.
        ids: identity of the samples, integers [N]; equal ids are never negatives. Default: every row its own.
        negatives, objective, normalize, impl, group, exchange: as in `masked_info_nce`.
        reduction: "mean" over all 2N anchors (0 for N = 0), "sum" or "none".

    Returns:
        A scalar, or [2N] with `reduction="none"`, view_a first; fp32, or fp64 where an input is fp64.

    Raises:
        TypeError, ValueError, RuntimeError: as `masked_info_nce`.

    Source: Chen et al. 2020 (arXiv 2002.05709), equation 1, with the negatives of arXiv 2402.11816.

    Example:
        >>> view = torch.eye(4)
        >>> nt_xent(view, view, labels=torch.tensor([0, 0, 1, 1]), temperature=1.0)
        tensor(0.5514)
    """
    options = Options(negatives, normalize, reduction, impl, group, exchange, objective)
    ranks = None if group is None else ranks_of(group)
    # The ranks compare [1] as [], since its description would equal that of a vector [2N] on another rank.
    is_one = isinstance(temperature, Tensor) and temperature.shape == (1,)
    compared = temperature.reshape(()) if is_one else temperature  # type: ignore[union-attr]
    agreed = options.agreed_call(
        ranks, "nt_xent", view_a=view_a, view_b=view_b, labels=labels, ids=ids, temperature=compared
    )
    with agreed:
        options.check()
        check_embeddings("view_a", view_a)
        check_embeddings("view_b", view_b)
        check_same_shape("view_b", view_b, "view_a", view_a)
        has_default_ids = ids is None and ranks is None
        ids = ranks.row_ids(view_a) if ids is None and ranks is not None else ids
        names = Names("view_a", "view_b", "labels")
        sample_pairs = check_pairs(view_a, view_b, labels, labels, ids, ids, negatives, key_is_query=True, names=names)
        if has_default_ids:
            sample_pairs = sample_pairs.with_default_ids()
        impl = resolve("logsumexp", impl, view_a.device)
        has_one_scale = not isinstance(temperature, Tensor) or is_one or temperature.ndim == 0
        is_plain = ranks is None and normalize and has_one_scale and view_a.dtype == view_b.dtype
        if is_plain and per_anchor.is_whole(objective, impl, sample_pairs, view_a, view_b, temperature):
            scale = inverse_temperature(temperature, view_a, compute_dtype(view_a))
            return options.reduce(per_anchor.whole_views(view_a, view_b, scale, sample_pairs))
        rows, cosine = unit_views(view_a, view_b, impl) if normalize else joined_views(view_a, view_b)
        scale = inverse_temperature(temperature, rows, compute_dtype(rows))
    if ranks is None:
        inputs = Inputs.of_self(rows, scale, sample_pairs, views=2)
        return options.reduce(per_anchor.views(inputs, cosine, objective, impl))
    unit_a, unit_b = rows.chunk(2)
    call = sharded.Call(objective, impl, ranks, options.needed_exchange())
    loss, samples = sharded.views(unit_a, unit_b, scale, sample_pairs, call)
    return options.reduce(loss, ranks, 2 * samples)


class NTXentLoss(LossModule):
    """`nt_xent` as a module, SimCLR's loss: each view against its other view and all views of its own cluster.

    Args:
        temperature: t > 0, a float, a tensor [] or [1], or a vector [2N]. A Parameter is learned. The values of a
            tensor are not checked.
        negatives, objective, normalize, reduction, impl, group, exchange: as in `nt_xent`.

    Raises:
        TypeError, ValueError: an option of the wrong type or value, in the constructor. `forward` raises as `nt_xent`.

    Source: as `nt_xent`.

    Example:
        >>> loss = NTXentLoss(torch.nn.Parameter(torch.ones(1)))
        >>> loss
        NTXentLoss(temperature=1 (learned))
        >>> loss(torch.eye(4), torch.eye(4), labels=torch.tensor([0, 0, 1, 1])).detach()
        tensor(0.5514)
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        negatives: str = "same",
        objective: ObjectiveLike = info_nce,
        normalize: bool = True,
        reduction: str = "mean",
        impl: str = "auto",
        group: ProcessGroup | None = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__(
            negatives=negatives, objective=objective, normalize=normalize, reduction=reduction, impl=impl, group=group,
            exchange=exchange,
        )  # fmt: skip
        check_module_temperature(temperature)
        self.temperature = temperature

    def forward(
        self, view_a: Tensor, view_b: Tensor, labels: Tensor | None = None, *, ids: Tensor | None = None
    ) -> Tensor:
        """Computes the loss of a batch; the arguments are those of `nt_xent`."""
        return nt_xent(view_a, view_b, labels, temperature=self.temperature, ids=ids, **self.options)
