"""Bytes and operations of `plan_exchange`, its choice and its errors; `test_exchange` counts the real bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mcl_kernels import plan_exchange


@pytest.mark.parametrize("world_size", [2, 8, 64, 4096])
def test_cluster_sends_about_its_own_batch_whatever_the_world_size(world_size: int) -> None:
    rows, features = 1024, 128
    own_bytes = rows * 2 * features * 4
    histogram = [rows // 4] * (4 * world_size)
    plan = plan_exchange(histogram, world_size, features=features, exchange="cluster")
    assert max(plan.sent.max(), plan.received.max(), plan.grad_sent.max(), plan.grad_received.max()) <= 2.2 * own_bytes
    gathered = plan_exchange(histogram, world_size, features=features, exchange="gather")
    assert gathered.received.min() >= (world_size - 1) * own_bytes


def test_operations_do_not_overflow() -> None:
    plan = plan_exchange([[5 * 10**8] * 4] * 8, 8, loss="clip_loss", features=4096, exchange="gather")
    assert plan.operations.sum() == pytest.approx(16.0 * 4096 * 4 * (4e9) ** 2)


@pytest.mark.parametrize(
    ("histogram", "world_size", "exchange"),
    [
        ([1000] * 64, 8, "cluster"),
        ([8000], 8, "gather"),  # a single cluster goes to every rank anyway
        ([1] * 40, 8, "cluster"),  # every sample stays on its rank
        ([20000, *[10] * 400], 4, "cluster"),
    ],
)
def test_auto_takes_the_exchange_with_the_lower_time(histogram: list[int], world_size: int, exchange: str) -> None:
    assert plan_exchange(histogram, world_size).exchange == exchange
    plans = [plan_exchange(histogram, world_size, exchange=name) for name in ("cluster", "gather")]
    times = [float((plan.operations + 1000.0 * plan.bytes).max()) for plan in plans]
    assert times.index(min(times)) == ("cluster", "gather").index(exchange)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"histogram": [1.5]}, TypeError, "histogram must hold integers: got float64"),
        ({"histogram": [-1]}, ValueError, "histogram must be at least 0: got -1"),
        (
            {"histogram": [[1, 2]] * 3},
            ValueError,
            r"histogram must have shape \[labels\] or \[2, labels\]: got \[3, 2\]",
        ),
        ({"world_size": 0}, ValueError, "world_size must be at least 1: got 0"),
        ({"loss": "triplet"}, ValueError, "loss must be one of"),
        ({"exchange": "ring"}, ValueError, "exchange must be one of 'auto', 'cluster', 'gather': got 'ring'"),
        ({"dtype": torch.int8}, TypeError, "dtype must be float16"),
        ({"key_histogram": [1]}, ValueError, "key_histogram is for loss='masked_info_nce': got it with 'nt_xent'"),
        (
            {"loss": "masked_info_nce", "key_histogram": [1, 2]},
            ValueError,
            "key_histogram must have as many labels as histogram",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan_exchange(**{"histogram": [3], "world_size": 2, **arguments})
