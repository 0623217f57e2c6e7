"""The public primitive: what is checked, what is assumed, and which implementation computes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mcl_kernels._validate import (
    as_integer_vector,
    as_integers,
    as_number,
    check_choice,
    check_embeddings,
    check_flag,
    check_same_width,
)
from mcl_kernels.backends import cuda as _cuda
from mcl_kernels.backends import native as _native
from mcl_kernels.backends import triton
from mcl_kernels.logsumexp import ops, reference
from mcl_kernels.logsumexp.pairs import NEGATIVES, Pairs, count_kept
from mcl_kernels.normalize import compute_dtype

IMPLS = ("auto", *ops.IMPLEMENTATIONS, "reference")


def capabilities() -> dict[str, dict[str, object]]:
    """What can compute here: for each `impl`, whether it is available, for which devices, and why or why not.

    The native kernels are loaded for it, and built first where a loss would build them.

    Returns:
        A dictionary from the name of each implementation, and "auto", to `available` (bool), `devices`
        (list of device types of this machine it runs on) and `reason` (str).

    Example:
        >>> capabilities()["blockwise"]["available"]
        True
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    native, native_reason = _native.describe()
    reasons = {device: triton.unavailable_reason(torch.device(device)) for device in devices}
    on_triton = [device for device, reason in reasons.items() if reason is None]
    on_cuda, cuda_reason = _cuda.describe()
    of_gpus = [name for name, on in (("triton", on_triton), ("cuda", on_cuda)) if "cuda" in on]
    picks = ("native for CPU tensors, " if native else "") + (f"{of_gpus[0]} for CUDA's, " if of_gpus else "")
    picks += "else " if picks else ""
    return {
        "native": {"available": native, "devices": ["cpu"] if native else [], "reason": native_reason},
        "triton": {
            "available": bool(on_triton),
            "devices": on_triton,
            "reason": "the kernels for GPUs" if on_triton else _cuda.no_device() or reasons[devices[-1]],
        },
        "cuda": {"available": bool(on_cuda), "devices": on_cuda, "reason": cuda_reason},
        "reference": {
            "available": True,
            "devices": devices,
            "reason": "dense PyTorch, differentiable to any order: the definition, stores the N x M matrix",
        },
        "blockwise": {
            "available": True,
            "devices": devices,
            "reason": "PyTorch by tiles, in memory that grows with N + M; runs wherever torch does",
        },
        "auto": {
            "available": True,
            "devices": devices,
            "reason": f"picks {picks}blockwise",
        },
    }


def resolve_impl(impl: str, device: torch.device) -> str:
    """The implementation that `impl` names; an explicit name is never replaced by another."""
    check_choice("impl", impl, IMPLS)
    if impl == "auto":
        if device.type == "cpu":
            return "native" if _native_is_usable() else "blockwise"
        return for_cuda(device) if device.type == "cuda" else "blockwise"
    if impl == "native":
        if device.type != "cpu":
            raise ValueError(f"impl='native' computes on CPU tensors: got device {device}")
        _load_native()
    if impl == "triton":
        _check_triton(device)
    if impl == "cuda":
        _check_cuda(device)
    return impl


def _native_is_usable() -> bool:
    return _native.usable()


def _load_native() -> None:
    _native.load()


@cache
def for_cuda(device: torch.device, instead: str = "blockwise") -> str:
    """The first of those for GPUs that runs on this one; else `instead`, and a warning, once, what to do about it."""
    reasons = {}
    for name, why_not in (("triton", triton.unavailable_reason), ("cuda", _cuda.why_not)):
        reason = why_not(device)
        if reason is None:
            return name
        reasons[name] = reason
    told = "; ".join(f"impl={name!r}: {reason}" for name, reason in reasons.items())
    warnings.warn(f"mcl_kernels: impl={instead!r} computes, several times slower: {told}", RuntimeWarning, 3)
    return instead


def _check_triton(device: torch.device) -> None:
    if reason := triton.unavailable_reason(device):
        raise RuntimeError(f"impl='triton': {reason} (or use impl='auto')")


def _check_cuda(device: torch.device) -> None:
    if reason := _cuda.why_not(device):
        raise RuntimeError(f"impl='cuda': {reason} (or use impl='auto')")


# Building and loading are no part of a compiled graph. This is what `torch.compiler.assume_constant_result` sets; the
# decorator itself would import the compiler with this module.
_FUNCTIONS: tuple[Any, ...] = (_native_is_usable, _load_native, for_cuda, _check_triton, _check_cuda)
for _function in _FUNCTIONS:
    _function._dynamo_marked_constant = True


def as_pairs(
    query: Tensor,
    key: Tensor,
    labels: Tensor | None,
    key_labels: Tensor | None,
    ids: Tensor | None,
    key_ids: Tensor | None,
    negatives: str,
    *,
    key_is_query: bool,
    names: tuple[str, str, str] = ("query", "key", "key_labels"),
) -> Pairs:
    """Checks labels and ids. Where key i belongs to query i (`key_is_query`), one side's serve both.

    `names` are the caller's own words for query, key and key_labels.
    """
    query_name, key_name, key_labels_name = names
    check_choice("negatives", negatives, NEGATIVES)
    if negatives == "different" and labels is None and key_labels is None:
        raise ValueError("negatives='different' needs labels: got labels=None")
    sides = []
    for name, key_name_of, values, key_values in (
        ("labels", key_labels_name, labels, key_labels),
        ("ids", "key_ids", ids, key_ids),
    ):
        if (values is None) != (key_values is None):
            given, missing = (key_name_of, name) if values is None else (name, key_name_of)
            if not key_is_query:
                raise ValueError(f"{given} needs {missing} too, unless key i belongs to query i: got {missing}=None")
            if values is None:
                name, values = key_name_of, key_values
            else:
                key_name_of, key_values = name, values
        sides.append(None if values is None else as_integers(name, values, query_name, query))
        sides.append(None if key_values is None else as_integers(key_name_of, key_values, key_name, key))
    return Pairs(sides[0], sides[1], sides[2], sides[3], negatives)


def as_scale(name: str, value: float | Tensor, query: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor of the logits, or a temperature, as a tensor [] or [N] that keeps its graph.

    [1], the shape that FSDP2 wants of a learned number, becomes []; of a single row it is the same.
    """
    if not isinstance(value, Tensor):
        number = as_number(name, value, "a number or a tensor")
        if torch.finfo(dtype).max < abs(number) < math.inf:
            raise ValueError(f"{name} must leave logits a factor in the range of {dtype}: got the factor {number:.3g}")
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
    """The log of the summed exponentials of each query's logits with its negatives.

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

    Source: the denominator of the loss of "Learning the Unlearned: Mitigating Feature Suppression in
    Contrastive Learning" (ECCV 2024, arXiv 2402.11816).

    Example:
        >>> q = torch.eye(4)
        >>> masked_logsumexp(q, labels=torch.tensor([0, 0, 0, 1]))
        tensor([0.6931, 0.6931, 0.6931,   -inf])
    """
    check_embeddings("query", query)
    check_flag("bidirectional", bidirectional)
    key_is_query = key is None
    keys = query if key is None else key
    if key is None:
        if key_labels is not None or key_ids is not None:
            raise ValueError("key_labels and key_ids need a key: got key=None")
        if bidirectional:
            raise ValueError("bidirectional=True needs a key: without one the operation is symmetric, c = b")
        if ids is None:
            ids = torch.arange(query.shape[0], device=query.device)
    else:
        check_embeddings("key", key)
        check_same_width("key", key, "query", query)
    pairs = as_pairs(query, keys, labels, key_labels, ids, key_ids, negatives, key_is_query=key_is_query)
    scale = as_scale("scale", scale, query, compute_dtype(query, keys))
    if bidirectional and scale.ndim:
        raise ValueError(f"scale must be one number with bidirectional=True: got shape {list(scale.shape)}")

    # With one scale per row, s is not symmetric: the self form becomes the rectangle with k = q.
    symmetric = key is None and scale.ndim == 0
    impl = resolve_impl(impl, query.device)
    if impl == "reference":
        return reference.masked_logsumexp(query, keys, scale, pairs, bidirectional)
    _refuse_transforms(query, keys, scale)
    if symmetric:
        key, pairs = None, Pairs(pairs.labels, None, pairs.ids, None, negatives)
    else:
        key = keys
    row_lse, column_lse, *_ = ops.masked_logsumexp(query, key, scale, *pairs, bidirectional, impl)
    return (row_lse, column_lse) if bidirectional else row_lse


def _refuse_transforms(*inputs: Tensor) -> None:
    """The fused ops have a derivative in plain reverse mode alone.

    In forward mode PyTorch would drop the tangents without a word; in `torch.func.grad` its own error is about an
    autograd.Function.
    """
    unpack: Callable[[Tensor], Any] = forward_ad.unpack_dual
    if forward_ad._current_level >= 0 and any(unpack(x).tangent is not None for x in inputs):
        raise NotImplementedError(
            "masked_logsumexp: a fused implementation has no forward-mode derivative; use impl='reference'"
        )
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active() or not torch.is_grad_enabled():
        return
    if any(_is_differentiated_by_transform(x) for x in inputs):
        raise NotImplementedError(
            "masked_logsumexp: a fused implementation has no derivative under torch.func (grad, vjp, jacrev, "
            "hessian); use impl='reference'"
        )


def _is_differentiated_by_transform(x: Tensor) -> bool:
    functorch: Any = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x) and x.requires_grad:
            return True
        x = functorch.get_unwrapped(x)
    return False


def count_negatives(
    labels: Tensor,
    key_labels: Tensor | None = None,
    *,
    ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    negatives: str = "same",
) -> Tensor:
    """How many keys each query keeps as negatives.

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
    pairs = as_pairs(labels, keys, labels, keys, ids, key_ids, negatives, key_is_query=key_labels is None)
    return count_kept(labels, keys, pairs)
