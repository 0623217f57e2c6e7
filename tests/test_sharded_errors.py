"""Arguments that one rank refuses are an error on every rank, in the same step, and the ranks can go on."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mcl_kernels import cached_backward, clip_loss, masked_info_nce, nt_xent, objectives, supcon_loss
from mcl_kernels.backends.table import TABLE
from tests.process_pool import RankPool
from tests.sharded_losses import D, make_batch, shard_of, value_and_gradients

X, Y, KEYS = torch.ones(6, D), torch.ones(6, D), torch.ones(9, D)
LABELS, IDS, KEY_IDS = torch.arange(6) % 2, torch.arange(6), torch.arange(9)


class Unprintable:
    """An objective without a description."""

    def __repr__(self) -> str:
        raise KeyError("no name")


# Arguments that every loss refuses; "first" is its first tensor of embeddings.
REFUSED_BY_ALL: list[dict[str, Any]] = [
    {"first": [1.0]},
    {"first": X[0]},
    {"first": X.long()},
    {"first": X[:, :0]},
    {"first": X[:, :5]},
    {"first": X.to("meta")},
    {"labels": LABELS[:-1]},
    {"labels": LABELS.float()},
    {"labels": [0] * 6},
    {"ids": LABELS[:, None]},
    {"ids": IDS[:-1]},
    {"negatives": "others"},
    {"reduction": "median"},
    {"exchange": "ring"},
    {"impl": "fast"},
    {"impl": "cuda"},
    {"objective": Unprintable()},
]
TEMPERATURES = [0.0, -1.0, "0.5", None, torch.tensor(1), torch.ones(5), torch.ones(6, 1)]
REFUSED: dict[str, list[dict[str, Any]]] = {
    "nt_xent": [
        *REFUSED_BY_ALL,
        *({"temperature": value} for value in TEMPERATURES),
        {"view_b": Y[:-1]},
        {"labels": None, "negatives": "different"},
    ],
    "clip_loss": [
        *REFUSED_BY_ALL,
        *({"logit_scale": value} for value in (0.0, "1", None, torch.tensor(1), torch.ones(2))),
        {"text_features": Y[:, :3], "normalize": False},
        {"text_labels": LABELS[:-1]},
        {"labels": None, "negatives": "different"},
    ],
    "masked_info_nce": [
        *REFUSED_BY_ALL,
        *({"temperature": value} for value in TEMPERATURES),
        {"impl": "fast", "normalize": False},
        {"key": KEYS[:3]},
        {"key": KEYS[:, :3]},
        {"positive": Y[:-1]},
        {"positive": 1},
        {"key_labels": None},
        {"key_ids": KEY_IDS},
        {"key_labels": KEY_IDS[:-1]},
        {"hard_negatives": X},
        {"hard_mask": IDS > 2},
        {"include": ("qk", "kd")},
    ],
    "supcon_loss": [
        # It has no objective, and no second side that fixes the number of features.
        *(
            changed
            for changed in REFUSED_BY_ALL
            if "objective" not in changed and getattr(changed.get("first"), "shape", ()) != (6, 5)
        ),
        *({"temperature": value} for value in TEMPERATURES),
        {"targets": IDS[:-1]},
        {"targets": LABELS.float()},
        {"targets": None},
        {"positives": "max"},
        {"temperature": torch.ones(6)},
    ],
}


def small_loss(loss: str, **changed: Any) -> Tensor:
    """A loss over all ranks, of six rows of ones on each, with some arguments changed."""
    options: dict[str, Any] = {"labels": LABELS, "exchange": "auto", "group": dist.group.WORLD, **changed}
    first = options.pop("first", X)
    if loss == "nt_xent":
        return nt_xent(first, options.pop("view_b", Y), **options)
    if loss == "clip_loss":
        return clip_loss(first, options.pop("text_features", Y), **{"logit_scale": 2.0, **options})
    if loss == "supcon_loss":
        return supcon_loss(first, options.pop("targets", IDS % 3), **options)
    return masked_info_nce(first, options.pop("key", KEYS), **{"key_labels": KEY_IDS % 2, **options})


def check_refused_on_last_rank(loss: str, exchange: str) -> None:
    """Every rank raises, and the next step has the bits of a run without the error."""
    last = dist.get_world_size() - 1
    batch = shard_of(make_batch("balanced"), "uneven")
    steps = [{**batch, "temperature": batch["temperature"] + 0.1 * step} for step in range(3)]
    name = f"{loss}, queue" if loss == "masked_info_nce" else loss
    options = {"group": dist.group.WORLD, "exchange": exchange}
    expected = [value_and_gradients(name, step, **options) for step in steps]
    # Other tests of this process may have installed the emulation, with which it is available.
    unavailable = {"cuda": TABLE["cuda"]._replace(unavailable_reason=lambda device: "unavailable in this test")}
    for index, changed in enumerate(REFUSED[loss]):
        own = changed if dist.get_rank() == last else {}
        with patch.dict(TABLE, unavailable), pytest.raises(Exception, match=r".") as failure:
            small_loss(loss, **{"exchange": exchange, **own})
        is_other = str(failure.value).startswith(f"rank {last} of the group met an error: ")
        assert is_other == (dist.get_rank() != last), (changed, failure.value)
        assert isinstance(failure.value, ValueError) or not is_other
        value, grads = value_and_gradients(name, steps[index % 3], **options)
        expected_value, expected_grads = expected[index % 3]
        assert value.equal(expected_value), changed
        assert all(grads[key].equal(grad) for key, grad in expected_grads.items()), changed


@pytest.mark.parametrize("exchange", ["gather", "cluster"])
@pytest.mark.parametrize("loss", REFUSED)
def test_arguments_refused_on_one_rank_are_an_error_on_all_in_that_step(
    ranks: RankPool, loss: str, exchange: str
) -> None:
    ranks.run(check_refused_on_last_rank, loss, exchange)


def check_refused_on_all_ranks() -> None:
    for temperature in (0.0, -1.0 - dist.get_rank()):
        with pytest.raises(ValueError, match=f"temperature must be positive: got {temperature}"):
            small_loss("nt_xent", temperature=temperature)
    small_loss("nt_xent")


def test_each_of_several_ranks_raises_its_own_error(ranks: RankPool) -> None:
    ranks.run(check_refused_on_all_ranks)


def objective_of_too_many_arguments(*arguments: Any) -> Tensor:
    return objectives.info_nce(1.0, *arguments)


def check_failing_objective() -> None:
    for exchange in ("gather", "cluster"):
        with pytest.raises(TypeError, match="positional arguments"):
            small_loss("nt_xent", objective=objective_of_too_many_arguments, exchange=exchange)
        small_loss("nt_xent", exchange=exchange)


def test_an_objective_that_raises_after_the_exchange_raises_on_all_ranks(ranks: RankPool) -> None:
    ranks.run(check_failing_objective)


def check_cached_backward() -> None:
    last, weight = dist.get_world_size() - 1, torch.ones(D, requires_grad=True)
    is_last = dist.get_rank() == last
    message = "labels must have one entry per row" if is_last else f"rank {last} of the group met"

    def run(labels: Tensor) -> None:
        cached_backward(lambda x: x * weight, X.split(2), lambda x: nt_xent(x, x, labels, group=dist.group.WORLD))

    with pytest.raises(ValueError, match=message):
        run(LABELS[:-1] if is_last else LABELS)
    run(LABELS)


def test_an_error_within_cached_backward_is_raised_on_all_ranks(ranks: RankPool) -> None:
    """The ranks communicate in the loss alone, once for all micro-batches."""
    ranks.run(check_cached_backward)
