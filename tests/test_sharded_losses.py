"""The losses over several ranks against the same loss of one process, on the concatenated batch."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mcl_kernels import clip_loss, masked_info_nce, nt_xent, objectives
from mcl_kernels.objectives import ObjectiveLike, needs_of
from tests.cases import OBJECTIVES
from tests.process_pool import RankPool
from tests.sharded_losses import (
    BLOCKS,
    LOSSES,
    SHARDS,
    WITH_OBJECTIVE,
    D,
    N,
    check_equals_one_process,
    make_batch,
    shard_of,
    sum_over_ranks,
    value_and_gradients,
)

SPREAD = [(labels, shards) for labels in ("balanced", "zipf", "one", "alone") for shards in ("uneven", "empty")]


@pytest.mark.parametrize(("labels", "shards"), [("balanced", "even"), *SPREAD, ("none", "empty")])
@pytest.mark.parametrize("exchange", ["gather", "cluster"])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradients_are_those_of_one_process(
    ranks: RankPool, loss: str, exchange: str, labels: str, shards: str
) -> None:
    ranks.run(check_equals_one_process, loss, labels, shards, exchange)


@pytest.mark.parametrize("exchange", ["gather", "cluster"])
@pytest.mark.parametrize("loss", [loss for loss in WITH_OBJECTIVE if "clip" not in loss])
def test_a_temperature_for_each_row_travels_with_it(ranks: RankPool, loss: str, exchange: str) -> None:
    ranks.run(partial(check_equals_one_process, temperature="vector"), loss, "zipf", "uneven", exchange)


@pytest.mark.parametrize("exchange", ["gather", "cluster"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_temperature_of_shape_1_is_a_scalar(ranks: RankPool, loss: str, exchange: str) -> None:
    """Also on a rank with a single row (4 ranks, uneven), where a vector of temperatures has that shape."""
    for shards in ("uneven", "empty"):
        ranks.run(partial(check_equals_one_process, temperature="[1]"), loss, "zipf", shards, exchange)


@pytest.mark.parametrize("objective", OBJECTIVES[1:])
@pytest.mark.parametrize("loss", WITH_OBJECTIVE)
def test_every_objective_is_that_of_one_process(ranks: RankPool, loss: str, objective: ObjectiveLike) -> None:
    check = partial(check_equals_one_process, objective=objective)
    ranks.run(check, loss, "zipf", "uneven", "auto")
    if not needs_of(objective).mixes_anchors:
        ranks.run(check, loss, "zipf", "empty", "cluster")


def test_an_objective_that_mixes_anchors_uses_those_of_all_ranks(ranks: RankPool) -> None:
    check = partial(check_equals_one_process, objective=objectives.decoupled_weighted(), temperature="vector")
    ranks.run(check, "nt_xent", "zipf", "empty", "gather")
    ranks.run(check, "masked_info_nce, queue", "alone", "uneven", "auto")


@pytest.mark.parametrize("options", [{"negatives": "different"}, {"negatives": "all"}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_options_that_need_more_than_a_cluster_are_gathered(
    ranks: RankPool, loss: str, options: dict[str, str]
) -> None:
    ranks.run(partial(check_equals_one_process, **options), loss, "zipf", "uneven", "auto")
    if loss in WITH_OBJECTIVE:
        ranks.run(check_cluster_is_refused, loss, options)


@pytest.mark.parametrize("temperature", ["learned", "vector"])
@pytest.mark.parametrize("loss", BLOCKS)
def test_blocks_are_gathered(ranks: RankPool, loss: str, temperature: str) -> None:
    for labels, shards in (("zipf", "uneven"), ("none", "empty")):
        check = partial(check_equals_one_process, temperature=temperature, objective=objectives.hard_negative())
        ranks.run(check, loss, labels, shards, "auto")
    ranks.run(check_cluster_is_refused, loss, {})


def check_cluster_is_refused(loss: str, options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="exchange='cluster' keeps each cluster by itself: "):
        {**LOSSES, **BLOCKS}[loss](make_batch("balanced"), group=dist.group.WORLD, exchange="cluster", **options)


@pytest.mark.parametrize("exchange", ["gather", "cluster"])
def test_a_sum_is_spread_like_a_mean(ranks: RankPool, exchange: str) -> None:
    for loss in LOSSES:
        ranks.run(partial(check_equals_one_process, reduction="sum"), loss, "zipf", "uneven", exchange)


@pytest.mark.parametrize("exchange", ["gather", "cluster"])
@pytest.mark.parametrize("impl", ["native", "blockwise", "reference"])
def test_every_implementation_is_that_of_one_process(ranks: RankPool, impl: str, exchange: str) -> None:
    for loss in ("nt_xent", "clip_loss", "masked_info_nce, queue"):
        check = partial(check_equals_one_process, impl=impl, dtype=torch.float32, tolerance=2e-5)
        ranks.run(check, loss, "zipf", "uneven", exchange)


@pytest.mark.parametrize("exchange", ["gather", "cluster"])
def test_half_precision_rows(ranks: RankPool, exchange: str) -> None:
    for loss in ("nt_xent", "clip_loss", "masked_info_nce, queue"):
        check = partial(check_equals_one_process, dtype=torch.bfloat16, tolerance=2e-2)
        ranks.run(check, loss, "zipf", "uneven", exchange)


def check_single_rows(exchange: str) -> None:
    """A rank sends or receives one row, of any width in bytes, in any layout."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    options: dict[str, Any] = {"group": dist.group.WORLD, "exchange": exchange}
    generator = torch.Generator().manual_seed(0)
    n = world_size + 5
    labels = torch.tensor([0] * (n - 1) + [1])
    here = slice(rank, rank + 1 if rank < world_size - 1 else None)
    for d in (1, 3, 8):
        for dtypes in ((torch.bfloat16,) * 2, (torch.bfloat16, torch.float32), (torch.float64,) * 2):
            rows = torch.randn(2, n, d, generator=generator)
            a, b = (x.to(dtype) for x, dtype in zip(rows, dtypes, strict=True))
            own_a, own_b, own_labels = a[here].T.contiguous().T, b[here], labels[here]
            temperature = torch.full((n,), 0.5)
            value = masked_info_nce(
                own_a, own_b, own_labels, 1 - own_labels, positive=own_b, temperature=temperature[here], **options
            )
            expected = masked_info_nce(a, b, labels, 1 - labels, positive=b, temperature=temperature)
            torch.testing.assert_close(sum_over_ranks(value) / world_size, expected, rtol=1e-4, atol=1e-4)
            value = clip_loss(own_a, own_b, own_labels, logit_scale=2.0, **options)
            expected = clip_loss(a, b, labels, logit_scale=2.0)
            torch.testing.assert_close(sum_over_ranks(value) / world_size, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exchange", ["gather", "cluster"])
def test_single_rows_of_any_width(ranks: RankPool, exchange: str) -> None:
    ranks.run(check_single_rows, exchange)


def check_double_backward(exchange: str) -> None:
    """Differentiates a norm of the gradient: exact with the reference, refused by fused implementations."""
    batch = make_batch("zipf")

    def second_gradients(batch: dict[str, Any], factor: float, **options: Any) -> list[torch.Tensor]:
        a, b = (batch[name].clone().requires_grad_() for name in ("a", "b"))
        value = LOSSES["nt_xent"]({**batch, "a": a, "b": b}, **options) * factor
        grad_a, grad_b = torch.autograd.grad(value, (a, b), create_graph=True)
        return list(torch.autograd.grad(grad_a.square().sum() + (grad_b**3).sum(), (a, b)))

    expected = second_gradients(batch, 1.0, impl="reference")
    shard, factor = shard_of(batch, "uneven"), 1.0 / dist.get_world_size()
    options = {"group": dist.group.WORLD, "exchange": exchange}
    # The gradients are those of the sum of all ranks' losses, and their norm is a sum over the ranks too.
    for grad, expected_grad in zip(second_gradients(shard, factor, impl="reference", **options), expected, strict=True):
        torch.testing.assert_close(grad, shard_of({"a": expected_grad}, "uneven")["a"])
    with pytest.raises(RuntimeError, match=r"impl='reference'"):
        second_gradients(shard, 1.0, **options)


@pytest.mark.parametrize("exchange", ["gather", "cluster"])
def test_double_backward_is_exact_or_refused(ranks: RankPool, exchange: str) -> None:
    ranks.run(check_double_backward, exchange)


def check_lonely_anchors() -> None:
    for exchange in ("cluster", "gather"):
        value, grads = value_and_gradients(
            "nt_xent", shard_of(make_batch("alone"), "uneven"), group=dist.group.WORLD, exchange=exchange
        )
        assert value == 0
        assert all(bool((grad == 0).all()) for grad in grads.values())


def test_without_negatives_on_any_rank_loss_and_gradients_are_exactly_0(ranks: RankPool) -> None:
    ranks.run(check_lonely_anchors)


def check_nan() -> None:
    """A NaN on rank 0 reaches the loss of the rank that compares its row."""
    for labels in ("balanced", "one"):
        shard = shard_of(make_batch(labels), "uneven")
        if dist.get_rank() == 0:
            shard["a"][0, 0] = torch.nan
        for exchange in ("cluster", "gather"):
            value = nt_xent(shard["a"], shard["b"], shard["labels"], group=dist.group.WORLD, exchange=exchange)
            assert sum_over_ranks(value).isnan()


def test_a_nan_is_never_lost(ranks: RankPool) -> None:
    ranks.run(check_nan)


def check_no_samples() -> None:
    x = torch.empty(0, D, requires_grad=True)
    for exchange in ("gather", "cluster"):
        value = nt_xent(x, x, x[:, 0].long(), group=dist.group.WORLD, exchange=exchange)
        assert value == 0
        value.backward()
        assert x.grad is not None


def test_a_batch_without_samples_has_loss_0(ranks: RankPool) -> None:
    ranks.run(check_no_samples)


def check_same_bits() -> None:
    shard = shard_of(make_batch("zipf", dtype=torch.float32), "uneven")
    for exchange in ("gather", "cluster"):
        runs = [value_and_gradients("nt_xent", shard, group=dist.group.WORLD, exchange=exchange) for _ in range(3)]
        first_value, first_grads = runs[0]
        for value, grads in runs[1:]:
            assert value.equal(first_value)
            assert all(grads[name].equal(first_grads[name]) for name in grads)


def test_every_run_gives_the_same_bits(ranks: RankPool) -> None:
    ranks.run(check_same_bits)


def check_subgroup() -> None:
    """Ranks 0 and 1 form a group of their own."""
    group = dist.new_group([0, 1])
    batch, half = make_batch("zipf"), N // 2
    if dist.get_rank() > 1:
        with pytest.raises(ValueError, match=r"group must be one that this process belongs to: got one of other ranks"):
            nt_xent(batch["a"], batch["b"], group=group)
        return
    here = slice(dist.get_rank() * half, (dist.get_rank() + 1) * half)
    value = nt_xent(batch["a"][here], batch["b"][here], batch["labels"][here], group=group, exchange="cluster")
    dist.all_reduce(value, group=group)
    torch.testing.assert_close(value / 2, nt_xent(batch["a"], batch["b"], batch["labels"]))


def test_a_group_of_some_ranks(ranks: RankPool) -> None:
    ranks.run(check_subgroup)


MISTAKES = {
    "gradient of the own graph": "each rank has the loss of all rows, and the gradient through its own rows alone",
    "detached keys": "rows of other ranks have no gradient",
    "labels in another order": "labels are gathered in another order than rows",
    "mean of the ranks' means": "shards of different lengths weigh alike",
}


def gradient_with(mistake: str, loss: str, batch: dict[str, Any], bounds: list[int]) -> torch.Tensor:
    """The gradients of both views, [2N, D], that DDP would average to if ranks with these shards made a mistake."""
    shards = [slice(begin, end) for begin, end in pairwise(bounds)]
    labels, total = batch["labels"], torch.zeros(2 * N, D, dtype=torch.float64)
    if mistake == "labels in another order":
        labels = torch.cat([labels[shard] for shard in reversed(shards)])
    for shard in shards:
        a, b = (batch[name].clone().requires_grad_() for name in ("a", "b"))
        own = torch.zeros(N, dtype=torch.bool)
        own[shard] = True
        seen_a, seen_b = a, b
        if mistake in ("gradient of the own graph", "detached keys"):
            seen_a, seen_b = (torch.where(own[:, None], x, x.detach()) for x in (a, b))
        each = LOSSES[loss]({**batch, "a": seen_a, "b": seen_b, "labels": labels}, reduction="none").view(-1, N)
        if mistake == "gradient of the own graph":
            value = each.mean() / len(shards)
        elif mistake == "mean of the ranks' means":
            value = each[:, shard].mean() / len(shards)
        else:
            value = each[:, shard].sum() / each.numel()
        total += torch.cat(torch.autograd.grad(value, (a, b)))
    return total


def check_against_mistakes(loss: str) -> None:
    batch, world_size = make_batch("zipf"), dist.get_world_size()
    _, grads = value_and_gradients(loss, shard_of(batch, "uneven"), group=dist.group.WORLD)
    _, expected = value_and_gradients(loss, batch)
    for name, own in shard_of({"a": expected["a"], "b": expected["b"]}, "uneven").items():
        torch.testing.assert_close(grads[name] / world_size, own)
    exact = torch.cat((expected["a"], expected["b"]))
    for mistake in MISTAKES:
        wrong = gradient_with(mistake, loss, batch, SHARDS[world_size]["uneven"])
        error = (wrong - exact).norm() / exact.norm()
        assert error > 0.05, f"{mistake} would pass: error {error:.2g}"


@pytest.mark.parametrize("loss", ["nt_xent", "clip_loss", "masked_info_nce", "supcon_loss, no targets"])
def test_gradients_are_none_of_those_found_in_training_libraries(ranks: RankPool, loss: str) -> None:
    """Each mistake would change this gradient by more than 5 %; ours is that of one process."""
    ranks.run(check_against_mistakes, loss)
