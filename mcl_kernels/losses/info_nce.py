"""`masked_info_nce` and its module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from mcl_kernels._validate import check_embeddings, check_same_shape, check_same_width
from mcl_kernels.backends.table import resolve
from mcl_kernels.distributed.group import Ranks, ranks_of
from mcl_kernels.logsumexp.api import check_pairs
from mcl_kernels.logsumexp.inputs import Inputs
from mcl_kernels.logsumexp.pairs import Pairs
from mcl_kernels.losses import per_anchor, sharded
from mcl_kernels.losses.negatives import (
    Negatives,
    Private,
    Side,
    check_include,
    check_private,
    further_blocks,
    private_rows,
)
from mcl_kernels.losses.options import LossModule, Options, check_module_temperature, inverse_temperature
from mcl_kernels.normalize import compute_dtype, normalize_rows
from mcl_kernels.objectives import ObjectiveLike, info_nce

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def masked_info_nce(
    query: Tensor,
    key: Tensor,
    labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    positive: Tensor | None = None,
    ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    hard_mask: Tensor | None = None,
    include: Sequence[str] = ("qk",),
    negatives: str = "same",
    objective: ObjectiveLike = info_nce,
    normalize: bool = True,
    reduction: str = "mean",
    impl: str = "auto",
    group: ProcessGroup | None = None,
    exchange: str = "auto",
) -> Tensor:
    """Contrastive loss of each query against its positive and the keys of its own cluster.

        a_i    = <q_i, p_i> / t_i
        b_i    = log sum_{j: y_j = y_i, u_j != u_i} exp(<q_i, k_j> / t_i)
        loss_i = objective(a_i, b_i) = log(1 + exp(b_i - a_i)) by default

    With `positive=None` key i is the positive of query i and keys past N are extra negatives; with `positive=p` (the
    queue form of MoCo) p is not among the keys. **A queue needs `positive=`**: without it its first N rows are taken
    for the positives. Without labels this is plain InfoNCE. An anchor without negatives has loss 0 and gradient 0. NaN
    or infinity in an embedding is never turned into a finite loss.

    Args:
        query: [N, D], float16, bfloat16, float32 or float64, any strides.
        key: [M, D]; M >= N with `positive=None`.
        labels: pseudo labels of the queries, integers [N], on the device of query; None: one cluster. A negative
            label matches nothing. Where M = N and key i belongs to query i they hold for the keys too.
        key_labels: pseudo labels of the keys, integers [M] (-1 for a queue slot that was never filled).
        temperature: t > 0, a float, a tensor [] or [1], or a vector [N]; tensors get an exact gradient and are
            not checked, which would wait for a GPU: keep a learned one positive.
        positive: p, [N, D], or None.
        ids: identity of the queries' samples, integers [N]; equal ids are never negatives. **A positive among the
            keys must have its query's id**, or it is its own negative too. Default: query i and key i share one,
            keys past N share none; in the queue form nothing is excluded.
        key_ids: identity of the keys' samples, integers [M].
        hard_negatives: H rows for each query, [N, H, D], that are its negatives alone, whatever labels and ids say; as
            many for every rank with `group`. A query that has these alone has a loss.
        hard_mask: bool [N, H], false where a query has fewer than H; these rows may hold any values.
        include: blocks of negatives, in one log-sum-exp: "qk", query i against keys, always; "qq", against queries;
            "kq" and "kk", its positive, key i, against queries and against keys, under the labels and ids of key i and
            the temperature of query i, not with `positive`. By default ids are row indices in "qq", too.
        negatives: "same", "different" or "all": see `masked_logsumexp`.
        objective: a function of `mcl_kernels.objectives`, or your own.
        normalize: L2-normalise all three in fp32, rounded once to the dtype they came in.
        reduction: "mean" over all N anchors (those without negatives included; 0 for N = 0), "sum" or "none".
        impl: see `masked_logsumexp`.
        group: None: no communication; the batch is this process's own. Or a process group whose ranks hold a shard
            each, of any length (`torch.distributed.group.WORLD`: all ranks). Equal labels, and equal ids, mean the same
            on all ranks, and default ids differ. Every rank calls the loss, and receives W / N times the sum over its
            share of the N anchors of all W ranks. The mean over ranks is the loss of the whole batch; gradients of
            parameters and temperature, averaged as `DistributedDataParallel` does, are those of the whole batch
            (gradients of embeddings are W times as large). "sum" is spread in the same way; "none" returns the losses
            of this rank's rows.
            An error before rows are exchanged, such as a wrong argument on one rank, is raised on every rank in that
            call: there the error itself, elsewhere a ValueError that names the rank. The ranks stay in step and may
            continue. An error in `group` itself, in the objective or in the backward pass is raised on its own rank
            alone: end the process then, or the others wait until the group's timeout.
        exchange: "cluster" sends the rows of each cluster to the rank that compares them, or to several ranks if the
            cluster is large; with many clusters each rank receives about as many rows as its own batch has. "gather"
            sends all keys to all ranks. "auto" picks the exchange with the lower estimated time (`plan_exchange`), and
            gathers where an anchor needs more than its cluster: other `negatives`, more blocks than "qk",
            `reduction="none"`, an objective that mixes anchors.

    Returns:
        A scalar, or [N] with `reduction="none"`; fp32, or fp64 where an input is fp64.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, lengths, devices or options that do not fit, or that differ between ranks; each message
            names the argument. With `group`, an error of another rank, too.
        RuntimeError: an implementation that is not available; a rank that has ended, or has not called the loss within
            the group's timeout.

    Source: "Learning the Unlearned" (ECCV 2024, arXiv 2402.11816), the loss L_j of stage j. The blocks are those of Li
        et al. 2023 (arXiv 2308.03281), equation 2.

    Example:
        >>> query, key = torch.eye(4), torch.eye(4)
        >>> masked_info_nce(query, key, labels=torch.tensor([0, 0, 1, 1]), temperature=1.0)
        tensor(0.3133)
    """
    options = Options(negatives, normalize, reduction, impl, group, exchange, objective)
    ranks, is_queue = None if group is None else ranks_of(group), positive is not None
    agreed = options.agreed_call(
        ranks, "masked_info_nce", query=query, key=key, labels=labels, key_labels=key_labels, positive=positive,
        ids=ids, key_ids=key_ids, temperature=temperature, hard_negatives=hard_negatives, hard_mask=hard_mask,
        include=include,
    )  # fmt: skip
    with agreed:
        options.check()
        check_include(include, is_queue=is_queue)
        pairs = check_query_key(query, key, positive, labels, key_labels, ids, key_ids, negatives, ranks)
        check_private(hard_negatives, hard_mask, query)
        impl = resolve("logsumexp", impl, query.device)
        is_plain = ranks is None and hard_negatives is None and len(include) == 1
        if is_plain and per_anchor.is_whole(objective, impl, pairs, query, key, positive, temperature):
            rows = (query, key) if positive is None else (query, key, positive)
            scale = inverse_temperature(temperature, query, compute_dtype(*rows))
            loss = per_anchor.whole_query_to_key(query, key, positive, scale, pairs, normalize=normalize)
            return options.reduce(loss)
        query, key, positive = query_key_positive(query, key, positive, normalize, impl)
        private = private_rows(hard_negatives, hard_mask, normalize, impl)
        dtype = compute_dtype(query, key, positive, *([] if private is None else [private.rows]))
        scale = inverse_temperature(temperature, query, dtype)
    inputs = Inputs(query, key, scale, pairs)
    if ranks is None:
        every = _negatives(inputs, include, private)
        return options.reduce(per_anchor.query_to_key(every, positive, objective, impl, is_queue=is_queue))
    if isinstance(temperature, Tensor) and temperature.ndim:
        # On a rank with one row [1] may be its part of a vector [N], so every rank sends a scale with each row.
        inputs = Inputs(query, key, scale.expand(query.shape[0]), pairs)
    call = sharded.Call(objective, impl, ranks, options.needed_exchange(include))
    loss, anchors = sharded.query_to_key(inputs, positive, call, is_queue=is_queue, include=include, private=private)
    return options.reduce(loss, ranks, anchors)


def _negatives(inputs: Inputs, include: Sequence[str], private: Private | None) -> Negatives:
    """Negatives of the queries among the rows of this process."""
    if len(include) == 1:
        return Negatives(inputs, private=private)
    query, key, scale, pairs, _ = inputs
    # With one temperature the log-sum-exps of keys against queries come from the pass of queries against keys.
    by_column = "kq" in include and scale.ndim == 0
    queries, keys = Side(query, pairs.labels, pairs.ids), Side(inputs.keys, pairs.key_labels, pairs.key_ids)
    own = queries, keys.first(query.shape[0])
    others = [block for block in include if not (by_column and block == "kq")]
    blocks = further_blocks(others, own, (queries, keys), scale, pairs.negatives)
    return Negatives(Inputs(query, key, scale, pairs, bidirectional=by_column), blocks, private)


def check_query_key(
    query: Tensor,
    key: Tensor,
    positive: Tensor | None,
    labels: Tensor | None,
    key_labels: Tensor | None,
    ids: Tensor | None,
    key_ids: Tensor | None,
    negatives: str,
    ranks: Ranks | None = None,
) -> Pairs:
    """Pairs of queries and keys, with rows, labels and ids checked."""
    check_embeddings("query", query)
    check_embeddings("key", key)
    check_same_width("key", key, "query", query)
    n, m = query.shape[0], key.shape[0]
    if positive is not None:
        check_embeddings("positive", positive)
        check_same_shape("positive", positive, "query", query)
    elif m < n:
        raise ValueError(f"key must hold a positive for each query where positive=None: got {m} keys for {n} queries")
    has_default_ids = positive is None and ids is None and key_ids is None
    if has_default_ids and ranks is not None:
        ids, key_ids = ranks.row_ids(query), ranks.row_ids(key)
    key_is_query = positive is None and m == n
    pairs = check_pairs(query, key, labels, key_labels, ids, key_ids, negatives, key_is_query=key_is_query)
    return pairs.with_default_ids() if has_default_ids and ranks is None else pairs


def query_key_positive(
    query: Tensor, key: Tensor, positive: Tensor | None, normalize: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and the positive of each query, normalised if `normalize` is true."""
    if normalize:
        query, key = normalize_rows(query, impl), normalize_rows(key, impl)
        positive = None if positive is None else normalize_rows(positive, impl)
    return query, key, key[: query.shape[0]] if positive is None else positive


class MaskedInfoNCE(LossModule):
    """`masked_info_nce` as a module: each query against its positive and the keys of its own cluster.

    The first loss with a `LabelledQueue` is 0, since that queue begins empty; MoCo's begins full of random rows.

    Args:
        temperature: t > 0, a float, a tensor [] or [1], or a vector [N]. A Parameter is learned. The values of a tensor
            are not checked.
        include, negatives, objective, normalize, reduction, impl, group, exchange: as in `masked_info_nce`.

    Raises:
        TypeError, ValueError: an option of the wrong type or value, in the constructor. `forward` raises as
            `masked_info_nce`.

    Source: as `masked_info_nce`.

    Example:
        >>> loss = MaskedInfoNCE(temperature=1.0, reduction="sum")
        >>> loss
        MaskedInfoNCE(temperature=1.0, reduction=sum)
        >>> loss(torch.eye(4), torch.eye(4), labels=torch.tensor([0, 0, 1, 1]))
        tensor(1.2530)
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        include: Sequence[str] = ("qk",),
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
        check_include(include)
        check_module_temperature(temperature)
        self.options["include"] = include
        self.temperature = temperature

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        labels: Tensor | None = None,
        key_labels: Tensor | None = None,
        *,
        positive: Tensor | None = None,
        ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        hard_negatives: Tensor | None = None,
        hard_mask: Tensor | None = None,
    ) -> Tensor:
        """Computes the loss of a batch; the arguments are those of `masked_info_nce`."""
        return masked_info_nce(
            query, key, labels, key_labels, temperature=self.temperature, positive=positive, ids=ids, key_ids=key_ids,
            hard_negatives=hard_negatives, hard_mask=hard_mask, **self.options,
        )  # fmt: skip
