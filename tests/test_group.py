"""The check that all ranks call a loss with the same arguments, and the groups and ranks that fail it."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mcl_kernels import clip_loss, nt_xent, objectives
from mcl_kernels.distributed.group import describe
from tests.process_pool import RankPool

# Arguments of the last rank that differ from those of the others, and the error that every rank raises.
DIFFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "features": (
        {"view_a": torch.ones(3, 9), "view_b": torch.ones(3, 9)},
        r"view_a .* got \[rows, 8\] float32 on rank 0 and \[rows, 9\]",
    ),
    "dtype": (
        {"view_b": torch.ones(3, 8).half()},
        r"view_b .* got \[rows, 8\] float32 on rank 0 and \[rows, 8\] float16 on rank LAST",
    ),
    "label dtype": (
        {"labels": torch.zeros(3, dtype=torch.int32)},
        r"labels .* got \[rows\] int64 on rank 0 and \[rows\] int32 on rank LAST",
    ),
    "no labels": ({"labels": None}, r"labels .* got \[rows\] int64 on rank 0 and None on rank LAST"),
    "gradient": ({"view_a": torch.ones(3, 8, requires_grad=True)}, "view_a .* and .* that requires grad on rank LAST"),
    "temperature": ({"temperature": 0.2}, "temperature .* got 0.5 on rank 0 and 0.2 on rank LAST"),
    "temperatures": (
        {"temperature": torch.full((6,), 0.5)},
        r"temperature .* got 0.5 on rank 0 and \[rows\] float32 on rank LAST",
    ),
    "objective": (
        {"objective": objectives.ifm(0.2)},
        r"objective .* got info_nce on rank 0 and ifm\(eps=0.2, alpha=1\)",
    ),
    "exchange": ({"exchange": "gather"}, "exchange must be alike .* got 'auto' on rank 0 and 'gather' on rank LAST"),
    "negatives": ({"negatives": "all"}, "negatives must be alike .* got 'same' on rank 0 and 'all' on rank LAST"),
    "loss": ({"loss": clip_loss, "logit_scale": 1.0}, "loss must be alike .* got 'nt_xent' on rank 0 and 'clip_loss'"),
}


def check_difference(name: str) -> None:
    """Every rank raises the error; the next call succeeds."""
    x, last = torch.ones(3, 8), dist.get_world_size() - 1
    arguments: dict[str, Any] = {"view_a": x, "view_b": x, "labels": torch.zeros(3).long()}
    changed, message = DIFFERENCES[name]
    if dist.get_rank() == last:
        arguments |= changed
    loss, views = arguments.pop("loss", nt_xent), (arguments.pop("view_a"), arguments.pop("view_b"))
    with pytest.raises(ValueError, match=message.replace("LAST", str(last))):
        loss(*views, group=dist.group.WORLD, **arguments)
    nt_xent(x, x, group=dist.group.WORLD)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_arguments_that_differ_between_ranks_are_an_error_on_all(ranks: RankPool, name: str) -> None:
    ranks.run(check_difference, name)


def check_temperature_shapes(exchange: str) -> None:
    """A temperature of shape [1] is a scalar: it equals one of shape [], and differs from one per row."""
    x, last = torch.ones(3, 8), dist.get_world_size() - 1
    descriptions = {(): r"\[\] float32", (1,): r"\[\] float32", (6,): r"\[rows\] float32"}
    for shape_on_first, shape_elsewhere in (((1,), (6,)), ((6,), (1,)), ((), (6,))):
        temperature = torch.full(shape_on_first if dist.get_rank() == 0 else shape_elsewhere, 0.5)
        first, other = descriptions[shape_on_first], descriptions[shape_elsewhere]
        with pytest.raises(ValueError, match=f"temperature must be alike .* got {first} on rank 0 and {other} on rank"):
            nt_xent(x, x, temperature=temperature, group=dist.group.WORLD, exchange=exchange)
    temperature = torch.full((1,) if dist.get_rank() == last else (), 0.5)
    nt_xent(x, x, temperature=temperature, group=dist.group.WORLD, exchange=exchange)


@pytest.mark.parametrize("exchange", ["gather", "cluster"])
def test_a_scalar_temperature_differs_from_one_per_row(ranks: RankPool, exchange: str) -> None:
    ranks.run(check_temperature_shapes, exchange)


def check_types_of_numbers() -> None:
    x, is_last = torch.ones(3, 8), dist.get_rank() == dist.get_world_size() - 1
    for value, equal in ((0.5, np.float64(0.5)), (1, 1.0), (1.0, np.int64(1))):
        own = equal if is_last else value
        nt_xent(x, x, temperature=own, group=dist.group.WORLD)
        nt_xent(x, x, objective=objectives.hard_negative(own), group=dist.group.WORLD)


def test_equal_numbers_of_different_types_are_alike(ranks: RankPool) -> None:
    ranks.run(check_types_of_numbers)


def check_disabled_gradients() -> None:
    """Rank 0 would never enter the backward pass."""
    x = torch.ones(3, 8, requires_grad=True)
    with (
        torch.set_grad_enabled(dist.get_rank() > 0),
        pytest.raises(ValueError, match=r"view_a must be alike .* and .* that requires grad on rank 1"),
    ):
        nt_xent(x, x, group=dist.group.WORLD)


def test_a_rank_without_gradients_is_an_error_on_all(ranks: RankPool) -> None:
    ranks.run(check_disabled_gradients)


@dataclass(frozen=True)
class Weighted:
    """An objective that scales another one."""

    inner: Callable[..., Tensor]
    weight: float = 1.0

    def __call__(self, *arguments: Any) -> Tensor:
        return self.weight * self.inner(*arguments)


def weighted_info_nce(weight: float, *arguments: Any) -> Tensor:
    return weight * objectives.info_nce(*arguments)


def check_custom_objectives() -> None:
    x, rank = torch.ones(3, 8), dist.get_rank()
    for objective in (Weighted(objectives.info_nce), partial(objectives.info_nce)):
        nt_xent(x, x, objective=objective, group=dist.group.WORLD)
    for objective in (Weighted(objectives.info_nce, weight=1.0 + rank), partial(weighted_info_nce, rank)):
        with pytest.raises(ValueError, match="objective must be alike on every rank"):
            nt_xent(x, x, objective=objective, group=dist.group.WORLD)


def test_custom_objectives_are_compared_by_name_and_parameters(ranks: RankPool) -> None:
    ranks.run(check_custom_objectives)


def test_numbers_are_described_by_their_value() -> None:
    assert [describe(value) for value in (0.5, np.float32(0.5), 1.0, 7, True)] == ["0.5", "0.5", "1", "7", "True"]
    assert describe(2**60 + 1) != describe(2**60)


def test_a_tensor_is_described_with_its_device() -> None:
    """A rank with embeddings on another device than the others would fail alone, in the exchange."""
    assert describe(torch.ones(3, 8, device="meta")) == "[rows, 8] float32 on meta"


def fail_on_last_rank(how: str) -> None:
    is_last = dist.get_rank() == dist.get_world_size() - 1
    if how == "raises" and is_last:
        nt_xent(torch.ones(3, 8), torch.ones(3, 7), group=dist.group.WORLD)
    if how == "killed" and is_last:  # within the exchange, in which rank 0 is then waiting
        dist.all_to_all_single = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    x = torch.ones(3, 8, requires_grad=True)
    nt_xent(x, x, torch.zeros(3).long(), group=dist.group.WORLD, exchange="cluster").backward()


@pytest.mark.parametrize(
    ("how", "timeout", "errors"),
    [
        ("raises", 60.0, ("OtherRankError: rank 1 of the group met an error", "ValueError: view_b must have")),
        ("killed", 5.0, ("RuntimeError|DistBackendError", "the process ended")),
    ],
)
@pytest.mark.slow
def test_a_rank_that_fails_ends_the_others(how: str, timeout: float, errors: tuple[str, str]) -> None:
    with RankPool(2, timeout=timeout) as pool:
        pool.run(time.time)
        started = time.monotonic()
        with pytest.raises(AssertionError) as failure:
            pool.run(fail_on_last_rank, how)
        waited = time.monotonic() - started
    assert waited < 15
    for output, error in zip(str(failure.value).split("rank 1: ", 1), errors, strict=True):
        assert re.search(error, output)


def test_group_needs_an_initialised_process_group() -> None:
    x = torch.ones(3, 8)
    with pytest.raises(RuntimeError, match=r"call torch.distributed.init_process_group"):
        nt_xent(x, x, group="world")  # type: ignore[arg-type]


def test_exchange_is_checked_without_a_group() -> None:
    x = torch.ones(3, 8)
    with pytest.raises(ValueError, match=r"exchange must be one of 'auto', 'cluster', 'gather': got 'ring'"):
        nt_xent(x, x, exchange="ring")


def check_group_type() -> None:
    x = torch.ones(3, 8)
    with pytest.raises(TypeError, match=r"group must be a process group .*: got str"):
        nt_xent(x, x, group="world")  # type: ignore[arg-type]


def test_group_must_be_a_process_group(ranks: RankPool) -> None:
    ranks.run(check_group_type)
