"""The losses over ranks and of one process, on the same batch: for tests of several modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mcl_kernels import clip_loss, masked_info_nce, nt_xent, supcon_loss
from mcl_kernels.objectives import ObjectiveLike

N, M, D = 60, 84, 8
# Bounds of the shards among N samples: of equal sizes, of different ones, or with an empty one. The M keys are split in
# proportion.
SHARDS = {
    2: {"even": [0, 30, 60], "uneven": [0, 47, 60], "empty": [0, 0, 60]},
    4: {"even": [0, 15, 30, 45, 60], "uneven": [0, 7, 40, 41, 60], "empty": [0, 20, 20, 53, 60]},
}


def make_labels(kind: str, n: int, seed: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "balanced":
        return torch.arange(n) % 8
    if kind == "one":
        return torch.full((n,), 3)
    if kind == "alone":
        return torch.arange(n) * 1000
    assert kind == "zipf"  # a few large clusters and many small ones, rows without a label, huge labels
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(1.0 / torch.arange(1, 12), n, replacement=True, generator=generator)
    labels[::13] = -1
    labels[5:8] = torch.tensor([10**15 + 3, 10**15 + 3, 10**15 + 4])
    return labels


def make_batch(labels: str, temperature: str = "learned", dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Returns all arguments of the losses by name.

    Names that begin with "key" have M rows, all others N. The temperature has shape [] ("learned") or [1] ("[1]"), or
    is a "vector" with one entry per row of a and of b.
    """
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(1, D, generator=generator, dtype=torch.float64)  # moves the similarities away from 0
    a, b, key = (torch.randn(n, D, generator=generator, dtype=torch.float64) + common for n in (N, N, M))
    b = a + 0.5 * b
    batch: dict[str, Any] = {"a": a.to(dtype), "b": b.to(dtype), "key": key.to(dtype)}
    batch |= {"labels": make_labels(labels, N, 0), "text_labels": make_labels(labels, N, 1)}
    batch |= {"key_labels": make_labels(labels, M, 2), "ids": torch.arange(N) % 50, "key_ids": torch.arange(M)}
    batch |= {"targets": torch.arange(N) % 7 - 1, "hard_mask": torch.arange(3) < torch.arange(N)[:, None] % 4}
    batch |= {"hard": (a[:, None] + torch.randn(N, 3, D, generator=generator, dtype=torch.float64)).to(dtype)}
    if temperature != "vector":
        return {**batch, "temperature": torch.tensor(0.3 if temperature == "learned" else [0.3], dtype=dtype)}
    temperature_a, temperature_b = 0.2 + torch.rand(2, N, generator=generator).to(dtype)
    return {**batch, "temperature_a": temperature_a, "temperature_b": temperature_b}


def shard_of(batch: dict[str, Any], shards: str) -> dict[str, Any]:
    """Shard of this rank."""
    bounds, rank = SHARDS[dist.get_world_size()][shards], dist.get_rank()
    begin, end = bounds[rank], bounds[rank + 1]

    def part(name: str, x: Tensor | None) -> Tensor | None:
        if x is None or name == "temperature":
            return x
        return x[begin * M // N : end * M // N] if name.startswith("key") else x[begin:end]

    return {name: part(name, x) for name, x in batch.items()}


def _temperature(batch: dict[str, Any], *names: str) -> Any:
    if "temperature" in batch:
        return batch["temperature"]
    return torch.cat([batch[f"temperature_{name}"] for name in names])


def _nt_xent(batch: dict[str, Any], **options: Any) -> Tensor:
    temperature = _temperature(batch, "a", "b")
    return nt_xent(batch["a"], batch["b"], batch["labels"], temperature=temperature, **options)


def _nt_xent_with_ids(batch: dict[str, Any], **options: Any) -> Tensor:
    return _nt_xent(batch, ids=batch["ids"], **options)


def _clip(batch: dict[str, Any], **options: Any) -> Tensor:
    scale = 1 / batch["temperature"]
    return clip_loss(batch["a"], batch["b"], batch["labels"], logit_scale=scale, normalize=True, **options)


def _clip_with_text_labels(batch: dict[str, Any], **options: Any) -> Tensor:
    return _clip(batch, text_labels=batch["text_labels"], **options)


def _info_nce(batch: dict[str, Any], **options: Any) -> Tensor:
    return masked_info_nce(batch["a"], batch["b"], batch["labels"], temperature=_temperature(batch, "a"), **options)


def _info_nce_with_extra_keys(batch: dict[str, Any], **options: Any) -> Tensor:
    labels, key = batch["labels"], torch.cat((batch["b"], batch["key"]))
    key_labels = None if labels is None else torch.cat((labels, batch["key_labels"]))
    return masked_info_nce(batch["a"], key, labels, key_labels, temperature=_temperature(batch, "a"), **options)


def _private(batch: dict[str, Any], **options: Any) -> Tensor:
    return _info_nce(batch, hard_negatives=batch["hard"], hard_mask=batch["hard_mask"], **options)


def _blocks(batch: dict[str, Any], **options: Any) -> Tensor:
    return _private(batch, include=("qk", "qq", "kq", "kk"), **options)


def _queue(batch: dict[str, Any], **options: Any) -> Tensor:
    query, positive, key = batch["a"], batch["b"], batch["key"]
    labels, temperature = (batch["labels"], batch["key_labels"]), _temperature(batch, "a")
    return masked_info_nce(query, key, *labels, positive=positive, temperature=temperature, **options)


def _queue_and_queries(batch: dict[str, Any], **options: Any) -> Tensor:
    return _queue(batch, include=("qk", "qq"), **options)


def _queue_with_ids(batch: dict[str, Any], **options: Any) -> Tensor:
    return _queue(batch, ids=batch["ids"], key_ids=batch["key_ids"], **options)


def _supcon(batch: dict[str, Any], **options: Any) -> Tensor:
    return supcon_loss(batch["a"], batch["targets"], batch["labels"], temperature=batch["temperature"], **options)


def _supcon_of_views(batch: dict[str, Any], **options: Any) -> Tensor:
    """Samples with the same id have the same target."""
    features, ids = torch.stack((batch["a"], batch["b"]), dim=1), batch["ids"]
    options = {"temperature": batch["temperature"], "ids": ids, "positives": "sum", **options}
    return supcon_loss(features, ids % 10 - 5, batch["labels"], **options)


def _supcon_without_targets(batch: dict[str, Any], **options: Any) -> Tensor:
    features = torch.stack((batch["a"], batch["b"]), dim=1)
    return supcon_loss(features, labels=batch["labels"], temperature=batch["temperature"], **options)


WITH_OBJECTIVE: dict[str, Callable[..., Tensor]] = {
    "nt_xent": _nt_xent,
    "nt_xent, ids": _nt_xent_with_ids,
    "clip_loss": _clip,
    "clip_loss, text_labels": _clip_with_text_labels,
    "masked_info_nce": _info_nce,
    "masked_info_nce, private": _private,
    "masked_info_nce, extra keys": _info_nce_with_extra_keys,
    "masked_info_nce, queue": _queue,
    "masked_info_nce, queue, ids": _queue_with_ids,
}
LOSSES = {
    **WITH_OBJECTIVE,
    "supcon_loss": _supcon,
    "supcon_loss, views": _supcon_of_views,
    "supcon_loss, no targets": _supcon_without_targets,
}
# Losses that gather alone.
BLOCKS = {"masked_info_nce, blocks": _blocks, "masked_info_nce, queue and queries": _queue_and_queries}


def value_and_gradients(loss: str, batch: dict[str, Any], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Value of a loss, and its gradients by the name of the argument; rows of an unreduced loss get unequal weights."""
    floating = {name: x for name, x in batch.items() if x is not None and x.is_floating_point()}
    leaves = {name: x.clone().requires_grad_() for name, x in floating.items()}
    value = {**LOSSES, **BLOCKS}[loss]({**batch, **leaves}, **options)
    if value.ndim:
        weight = torch.cat([batch["ids"] + 1.0] * (len(value) // max(len(batch["ids"]), 1)))
        (value * weight).sum().backward()
    else:
        value.backward()
    return value.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def sum_over_ranks(x: Tensor) -> Tensor:
    total = x.clone()
    dist.all_reduce(total)
    return total


def check_equals_one_process(
    loss: str,
    labels: str,
    shards: str,
    exchange: str,
    *,
    temperature: str = "learned",
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-9,
    objective: ObjectiveLike | None = None,
    **options: Any,
) -> None:
    """Compares the mean of the ranks' losses, and the gradients as DDP averages them, with those of one process."""
    if objective is not None:
        options["objective"] = objective
    assert_close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    batch, reduction = make_batch(labels, temperature, dtype), options.get("reduction")
    expected, expected_grads = value_and_gradients(loss, batch, **options)
    value, grads = value_and_gradients(
        loss, shard_of(batch, shards), group=dist.group.WORLD, exchange=exchange, **options
    )
    assert grads.keys() == expected_grads.keys()
    divisor = 1 if reduction == "none" else dist.get_world_size()
    if reduction == "none":
        assert_close(value, torch.cat([shard_of({"a": rows}, shards)["a"] for rows in expected.view(-1, N)]))
    else:
        assert_close(sum_over_ranks(value) / divisor, expected)
    for name, expected_grad in shard_of(expected_grads, shards).items():
        grad = sum_over_ranks(grads[name]) if name == "temperature" else grads[name]
        assert grad.dtype == dtype
        assert_close(grad / divisor, expected_grad)
