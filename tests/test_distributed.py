"""The losses over several ranks against the same loss of one process, on the concatenated batch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mcl_kernels import clip_loss, masked_info_nce, nt_xent
from tests.ranks import RankPool

N, D, EXTRA = 60, 8, 24

# Where one shard ends and the next begins: even, uneven with an empty one, all on the last rank.
SHARDS = {
    2: {"even": [0, 30, 60], "uneven": [0, 47, 60], "empty": [0, 0, 60]},
    4: {"even": [0, 15, 30, 45, 60], "uneven": [0, 7, 40, 41, 60], "empty": [0, 20, 20, 53, 60]},
}


@pytest.fixture(scope="module", params=[2, 4], ids=lambda n: f"{n} ranks")
def ranks(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    with RankPool(request.param) as pool:
        yield pool


def labels_of(kind: str, n: int, seed: int = 0) -> Tensor | None:
    """Balanced, a few large clusters and many small ones, one cluster, every anchor alone, or none."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "none":
        return None
    if kind == "balanced":
        return torch.arange(n) % 8
    if kind == "zipf":
        weights = 1.0 / torch.arange(1, 12)
        labels = torch.multinomial(weights, n, replacement=True, generator=generator)
        labels[::13] = -1
        labels[5] = 10**15 + 7  # in a bucket with others
        labels[6] = 10**15 + 7
        return labels
    if kind == "one":
        return torch.full((n,), 3)
    assert kind == "alone"
    return torch.arange(n) * 1000


class Problem:
    """A loss of a whole batch, or of a part of it: rows `first` to `last` of whatever has rows."""

    def __init__(self, loss: str, labels: str, temperature: str = "number", seed: int = 0, dtype=torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.loss, self.temperature = loss, temperature
        common = torch.randn(1, D, generator=generator, dtype=torch.float64)
        rows = {"nt_xent": [N, N], "clip": [N, N], "clip, text_labels": [N, N], "info_nce": [N, N]}
        sizes = rows.get(loss, [N, N, N + EXTRA] if loss == "queue" else [N, N + EXTRA])
        self.tensors = [(torch.randn(n, D, generator=generator, dtype=torch.float64) + common).to(dtype) for n in sizes]
        self.labels = labels_of(labels, N)
        self.key_labels = labels_of(labels, sizes[-1], seed=1)
        scales = {"number": torch.tensor(0.3), "learned": torch.tensor(0.3)}
        n_temperatures = 2 * N if loss == "nt_xent" else N
        scales["vector"] = 0.2 + torch.rand(n_temperatures, generator=generator)
        self.scale = scales[temperature].to(dtype)


def _run(problem: Problem, cut: slice, key_cut: slice, **options: Any) -> tuple[Tensor, list[Tensor | None]]:
    """The loss of a part of the batch, and gradients of its tensors and of the temperature."""
    p, loss = problem, problem.loss
    cuts = [cut] * len(p.tensors)
    if len(p.tensors[-1]) > N:
        cuts[-1] = key_cut
    x = [t[c].clone().requires_grad_() for t, c in zip(p.tensors, cuts, strict=True)]
    y = None if p.labels is None else p.labels[cut]
    ky = None if p.key_labels is None else p.key_labels[cuts[-1]]
    if p.temperature == "vector":
        both = p.scale.view(2, N)[:, cut].reshape(-1) if loss == "nt_xent" else p.scale[cut]
        t: Any = both.clone().requires_grad_()
    else:
        t = p.scale.clone().requires_grad_()
    temperature = float(p.scale) if p.temperature == "number" else t
    if loss == "nt_xent":
        value = nt_xent(*x, y, temperature=temperature, **options)
    elif loss == "clip":
        value = clip_loss(*x, y, logit_scale=3.0 / temperature, normalize=True, **options)
    elif loss == "clip, text_labels":
        value = clip_loss(*x, y, logit_scale=3.0 / temperature, normalize=True, text_labels=ky, **options)
    elif loss == "queue":
        value = masked_info_nce(x[0], x[2], y, ky, positive=x[1], temperature=temperature, **options)
    else:
        value = masked_info_nce(x[0], x[1], y, ky, temperature=temperature, **options)
    upstream = torch.linspace(0.5, 1.5, 2 * N, dtype=value.dtype)
    if value.ndim:
        rows = len(x[0])
        chosen = torch.arange(N)[cut]
        weight = upstream[torch.cat((chosen, chosen + N))] if len(value) == 2 * rows and rows else upstream[chosen]
        (value * weight[: len(value)]).sum().backward()
    else:
        value.backward()
    return value.detach(), [v.grad for v in x] + ([] if p.temperature == "number" else [t.grad])


def check_contract(loss: str, labels: str, shards: str, temperature: str, options: dict[str, Any]) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    options = dict(options)
    dtype, tolerance = options.pop("dtype", torch.float64), 1e-9
    if dtype != torch.float64:
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    problem = Problem(loss, labels, temperature, dtype=dtype)
    exchange = options.pop("exchange")
    ends = SHARDS[world][shards]
    here = slice(ends[rank], ends[rank + 1])
    extra = EXTRA // world
    if loss in ("queue",):  # the queue is cut evenly
        m = (N + EXTRA) // world
        key_here = slice(rank * m, (rank + 1) * m)
    else:
        key_here = here
    del extra
    value, grads = _run(problem, here, key_here, group=dist.group.WORLD, exchange=exchange, **options)
    whole, expected = _run(problem, slice(None), slice(None), **options)
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    total = value.clone()
    dist.all_reduce(total)
    close(total / world, whole)
    cuts = [here] * len(problem.tensors)
    if len(problem.tensors[-1]) > N:
        cuts[-1] = key_here
    for grad, of_whole, cut in zip(grads, expected, cuts + [None], strict=False):
        assert grad is not None
        if cut is not None:
            close(grad / world, of_whole[cut])
        elif temperature == "learned":
            dist.all_reduce(grad)
            close(grad / world, of_whole)
        else:
            mine = of_whole.view(2, N)[:, here].reshape(-1) if loss == "nt_xent" else of_whole[here]
            close(grad / world, mine)


LOSSES = ["nt_xent", "clip", "clip, text_labels", "info_nce", "queue"]


@pytest.mark.parametrize("shards", ["even", "uneven", "empty"])
@pytest.mark.parametrize("labels", ["balanced", "zipf", "one", "alone", "none"])
@pytest.mark.parametrize("exchange", ["gather", "cluster", "auto"])
@pytest.mark.parametrize("loss", LOSSES)
def test_is_the_loss_of_one_process(ranks: RankPool, loss: str, exchange: str, labels: str, shards: str) -> None:
    ranks.run(check_contract, loss, labels, shards, "learned", {"exchange": exchange})
