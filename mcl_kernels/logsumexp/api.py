"""The public primitive: its arguments are checked and packed once."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from mcl_kernels._validate import (
    as_integer_vector,
    as_integers,
    as_number,
    check_choice,
    check_embeddings,
    check_flag,
    check_same_width,
)
from mcl_kernels.backends.table import resolve
from mcl_kernels.logsumexp import ops
from mcl_kernels.logsumexp.inputs import Inputs
from mcl_kernels.logsumexp.pairs import NEGATIVES, Pairs, count_kept
from mcl_kernels.normalize import compute_dtype


class Names(NamedTuple):
    """Names of arguments in error messages, as in the signature of the public function."""

    query: str = "query"
    key: str = "key"
    key_labels: str = "key_labels"


DEFAULT_NAMES = Names()


def check_pairs(
    query: Tensor,
    key: Tensor,
    labels: Tensor | None,
    key_labels: Tensor | None,
    ids: Tensor | None,
    key_ids: Tensor | None,
    negatives: str,
    *,
    key_is_query: bool,
    names: Names = DEFAULT_NAMES,
) -> Pairs:
    """Pairs of checked labels and ids. If key i belongs to query i (`key_is_query`), one side is enough."""
    check_choice("negatives", negatives, NEGATIVES)
    if negatives == "different" and labels is None and key_labels is None:
        raise ValueError("negatives='different' needs labels: got labels=None")

    def check_sides(name: str, key_name: str, values: Tensor | None, key_values: Tensor | None) -> list[Tensor | None]:
        if values is None and key_values is None:
            return [None, None]
        if key_is_query and (values is None or key_values is None or values is key_values):
            given = key_values if values is None else values
            checked = as_integers(key_name if values is None else name, given, names.query, query)
            return [checked, checked]
        if values is None or key_values is None:
            given_name, missing = (key_name, name) if values is None else (name, key_name)
            raise ValueError(f"{given_name} needs {missing} too, unless key i belongs to query i: got {missing}=None")
        return [as_integers(name, values, names.query, query), as_integers(key_name, key_values, names.key, key)]

    labels, key_labels = check_sides("labels", names.key_labels, labels, key_labels)
    ids, key_ids = check_sides("ids", "key_ids", ids, key_ids)
    return Pairs(labels, key_labels, ids, key_ids, negatives)


def check_scale(name: str, value: float | Tensor, query: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale or temperature as a tensor [] or [N] of `dtype`; a given tensor keeps its graph.

    [1], the shape of a learned scalar under FSDP2, becomes [].
    """
    if not isinstance(value, Tensor):
        number = as_number(name, value, "a number or a tensor")
        if torch.finfo(dtype).max < abs(number) < math.inf:
            raise ValueError(f"{name} must be in the range of {dtype}: got {number:.3g}")
        return torch.full((), number, dtype=dtype, device=query.device)
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be a float or a floating point tensor: got {value.dtype}")
    if value.ndim == 1 and value.shape[0] == 1:
        value = value.reshape(())
    if value.ndim > 1 or (value.ndim == 1 and value.shape[0] != query.shape[0]):
        raise ValueError(
            f"{name} must be a float, a tensor [] or [1], or a vector [{query.shape[0]}]: got shape {list(value.shape)}"
        )
    if value.ndim == 1 and value.device != query.device:
        raise ValueError(f"{name} must be on the device of the embeddings: got {value.device} for {query.device}")
    return value.to(device=query.device, dtype=dtype)


@overload
def masked_logsumexp(
    query: Tensor,
    key: Tensor | None = None,
    labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    negatives: str = "same",
    bidirectional: Literal[False] = False,
    impl: str = "auto",
) -> Tensor: ...
@overload
def masked_logsumexp(
    query: Tensor,
    key: Tensor | None = None,
    labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    negatives: str = "same",
    bidirectional: Literal[True],
    impl: str = "auto",
) -> tuple[Tensor, Tensor]: ...
def masked_logsumexp(
    query: Tensor,
    key: Tensor | None = None,
    labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    negatives: str = "same",
    bidirectional: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log of the summed exponentials of each query's logits with its negatives.

        s_ij   = scale_i * <q_i, k_j>
        keep   = match(y_i, y_j) and u_i != u_j
        b_i    = log sum_{j: keep_ij} exp(s_ij)          -inf where nothing is kept
        c_j    = log sum_{i: keep_ij} exp(s_ij)          with bidirectional=True

    The N x M matrix is never stored. Differentiable once, in reverse mode, in query, key and scale
    (`impl="reference"`: to any order, in both modes and under `torch.func.grad`). Logits and sums are fp32, or fp64
    where an input is fp64; gradients have the dtype of their input.

    Args:
        query: q, [N, D], float16, bfloat16, float32 or float64, any strides; used as it is, not normalised.
        key: k, [M, D], on the device of query. None is the self form: the keys are the queries.
        labels: pseudo labels y of the queries, integers [N]. None, on both sides: one cluster. **A negative
            label matches nothing**, not even itself, under every `negatives`.
        key_labels: pseudo labels of the keys, integers [M]. Only with key, and then together with labels.
        scale: inverse temperature, a float, a tensor [] or [1], or a vector [N] (not with bidirectional=True).
        ids: identity u of the queries' samples, integers [N]. Equal ids are never negatives of each other.
            Default: row indices in the self form, else nothing is excluded.
        key_ids: identity of the keys' samples, integers [M]. Only with key, and then together with ids.
        negatives: "same" keeps y_i == y_j (Multistage Contrastive Learning), "different" keeps y_i != y_j
            (needs labels), "all" keeps every valid label.
        bidirectional: also return c, from the same pass. Needs a key: the self form is symmetric, c = b.
        impl: "auto", or the name of an implementation (see `capabilities`), which is then never replaced.

    Returns:
        b, [N]; with bidirectional=True the pair (b, c), [N] and [M].

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, lengths, devices or options that do not fit; each message names the argument.
        RuntimeError: an implementation that is not available.

    Source: the denominator of the loss of "Learning the Unlearned: Mitigating Feature Suppression in
    Contrastive Learning" (ECCV 2024, arXiv 2402.11816).

    Example:
        >>> q = torch.eye(4)
        >>> masked_logsumexp(q, labels=torch.tensor([0, 0, 0, 1]))
        tensor([0.6931, 0.6931, 0.6931,   -inf])
    """
    check_embeddings("query", query)
    check_flag("bidirectional", bidirectional)
    keys = query if key is None else key
    if key is None:
        if key_labels is not None or key_ids is not None:
            raise ValueError("key_labels and key_ids need a key: got key=None")
        if bidirectional:
            raise ValueError("bidirectional=True needs a key: without one the operation is symmetric, c = b")
    else:
        check_embeddings("key", key)
        check_same_width("key", key, "query", query)
    pairs = check_pairs(query, keys, labels, key_labels, ids, key_ids, negatives, key_is_query=key is None)
    if key is None and ids is None:
        pairs = pairs.with_default_ids()
    scale = check_scale("scale", scale, query, compute_dtype(query, keys))
    if bidirectional and scale.ndim:
        raise ValueError(f"scale must be one number with bidirectional=True: got shape {list(scale.shape)}")
    inputs = Inputs.of_self(query, scale, pairs) if key is None else Inputs(query, key, scale, pairs, bidirectional)
    row_lse, column_lse = ops.compute(inputs, resolve("logsumexp", impl, query.device))
    return (row_lse, column_lse) if bidirectional else row_lse


def count_negatives(
    labels: Tensor,
    key_labels: Tensor | None = None,
    *,
    ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    negatives: str = "same",
) -> Tensor:
    """Number of keys that each query keeps as negatives.

        n_i = #{j: match(y_i, y_j) and u_i != u_j}

    Counted by sorting, O((N + M) log(N + M)); no N x M matrix.

    Args:
        labels: pseudo labels of the queries, integers [N]; a negative label keeps nothing.
        key_labels: pseudo labels of the keys, integers [M]. None is the self form: the keys are the queries.
        ids: identity of the queries' samples, integers [N]. Default: row indices in the self form, else
            nothing is excluded.
        key_ids: identity of the keys' samples, integers [M]. Only with key_labels, and then together with ids.
        negatives: "same", "different" or "all", as in `masked_logsumexp`.

    Returns:
        int64 [N].

    Raises:
        TypeError, ValueError: as `masked_logsumexp`.

    Source: N in Chuang et al. 2020 (arXiv 2007.00224), equation 8, within clusters as in arXiv 2402.11816.

    Example:
        >>> count_negatives(torch.tensor([0, 0, 0, 1, -1]))
        tensor([2, 2, 2, 0, 0])
    """
    labels = as_integer_vector("labels", labels)
    if key_labels is None:
        if key_ids is not None:
            raise ValueError("key_ids needs key_labels: got key_labels=None")
        if ids is None:
            ids = torch.arange(labels.shape[0], device=labels.device)
    keys = labels if key_labels is None else as_integer_vector("key_labels", key_labels)
    pairs = check_pairs(labels, keys, labels, keys, ids, key_ids, negatives, key_is_query=key_labels is None)
    return count_kept(labels, keys, pairs)
