"""The plan by CUDA kernels equals that by torch's sorts; which of them makes it."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from mcl_kernels.logsumexp import device_plan
from mcl_kernels.logsumexp import pairs as pairs_module
from mcl_kernels.logsumexp.pairs import NEGATIVES, Pairs
from tests.conftest import DEVICES, Backend, unavailable_reason
from tests.hypothesis_settings import examples


@pytest.fixture(scope="module", params=[Backend(device, "cuda") for device in DEVICES], ids=str)
def device(request: pytest.FixtureRequest) -> str:
    backend: Backend = request.param
    if reason := unavailable_reason("cuda", backend.device):
        pytest.skip(reason)
    return backend.device


def assert_same_plan(n: int, m: int | None, pairs: Pairs, device: str) -> None:
    query, key = torch.zeros(n, 1, device=device), None if m is None else torch.zeros(m, 1, device=device)
    pairs = Pairs(*(None if values is None else values.to(device) for values in pairs[:4]), pairs.negatives)
    assert device_plan._runs_on_kernels(query.device, n, m or 0)
    made, expected = device_plan.make_plan(query, key, pairs), pairs_module.make_plan(query, key, pairs)
    for name, got, wanted in zip(pairs_module.Plan._fields, made, expected, strict=True):
        assert torch.equal(got, wanted), name
    if m is not None:
        sides = made.key_order, pairs.key_labels, made.query_order, pairs.labels
        ranges = pairs_module.key_ranges(*sides, pairs.negatives)
        for got, wanted in zip(device_plan.query_ranges(pairs, made), ranges, strict=True):
            assert torch.equal(got, wanted)


def make_pairs(n: int, m: int | None, negatives: str, labelled: bool, with_ids: bool) -> Pairs:
    """Labels and ids from the lowest to the largest int64, many of them equal, in random order."""
    generator = torch.Generator().manual_seed(n)

    def draw(size: int | None, wanted: bool) -> Tensor | None:
        if size is None or not wanted:
            return None
        values = torch.tensor([-(2**63), -1, 0, 1, 2**62, 2**63 - 1])
        return values[torch.randint(len(values), (size,), generator=generator)]

    return Pairs(draw(n, labelled), draw(m, labelled), draw(n, with_ids), draw(m, with_ids), negatives)


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("identities", ["labels and ids", "labels", "ids", "neither"])
# One row; one more than a tile; several tiles against one; no row on one side or on both.
@pytest.mark.parametrize(("n", "m"), [(1, None), (1025, None), (2100, 1024), (3, 1025), (0, 4), (4, 0), (0, None)])
def test_the_plan_equals_that_of_torch(device: str, n: int, m: int | None, identities: str, negatives: str) -> None:
    if negatives == "different" and "labels" not in identities:
        pytest.skip("needs labels")
    assert_same_plan(n, m, make_pairs(n, m, negatives, "labels" in identities, "ids" in identities), device)


@examples()
@given(
    labels=st.lists(st.integers(-2, 4), max_size=40),
    key_labels=st.lists(st.integers(-2, 4), max_size=40),
    negatives=st.sampled_from(NEGATIVES),
    random=st.randoms(use_true_random=False),
)
def test_the_plan_equals_that_of_torch_for_any_labels(
    device: str, labels: Any, key_labels: Any, negatives: str, random: Any
) -> None:
    ids, key_ids = ([random.randrange(-5, 5) for _ in side] for side in (labels, key_labels))
    sides = (torch.tensor(side, dtype=torch.int64) for side in (labels, key_labels, ids, key_ids))
    assert_same_plan(len(labels), len(key_labels), Pairs(*sides, negatives), device)


def test_labels_and_ids_that_are_strided_views(device: str) -> None:
    labels, ids = torch.arange(40).flip(0) // 5, torch.arange(40) % 7
    assert_same_plan(20, None, Pairs(labels[::2], None, ids[::2], None, "same"), device)


def test_tiles_that_are_sorted_once_or_by_each_block(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The plan is the same whether the blocks wait for one another or not."""
    pairs = make_pairs(1000, 700, "same", True, True)
    monkeypatch.setattr(device_plan, "TILE", 0)
    assert_same_plan(1000, 700, pairs, device)
    monkeypatch.setattr(device_plan, "TILE", 1 << 20)
    assert_same_plan(1000, 700, pairs, device)
    assert_same_plan(2100, 1030, make_pairs(2100, 1030, "same", True, True), device)
    assert_same_plan(1500, None, make_pairs(1500, None, "different", True, True), device)


@pytest.mark.parametrize(("max_rows", "built", "calls"), [(20, True, 1), (19, True, 0), (20, False, 0)])
def test_torch_sorts_many_rows_and_without_built_kernels(
    monkeypatch: pytest.MonkeyPatch, max_rows: int, built: bool, calls: int
) -> None:
    called = []

    class Library:
        def make_plan(self, *arguments: Any) -> None:
            called.append(arguments)

    monkeypatch.setattr(device_plan, "MAX_ROWS", max_rows)
    monkeypatch.setattr(device_plan, "_is_built", lambda device: built)
    monkeypatch.setattr(device_plan.cuda, "ops", Library)
    labels = torch.zeros(20, dtype=torch.int64)
    device_plan.make_plan(torch.zeros(20, 1), None, Pairs(labels, None, torch.arange(20), None, "same"))
    assert len(called) == calls
