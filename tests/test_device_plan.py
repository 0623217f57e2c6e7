"""The plan by kernels equals that by torch's sorts; which of them makes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from mcl_kernels.logsumexp import device_plan
from mcl_kernels.logsumexp import pairs as pairs_module
from mcl_kernels.logsumexp.pairs import NEGATIVES, Pairs, Plan
from tests.conftest import DEVICES, Backend, unavailable_reason
from tests.hypothesis_settings import examples

PLANNERS = [Backend(DEVICES[-1], "triton"), *(Backend(device, "cuda") for device in DEVICES)]


@pytest.fixture(scope="module", params=PLANNERS, ids=str)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Device on which one of the kernels plans."""
    backend: Backend = request.param
    if reason := unavailable_reason(backend.impl, backend.device):
        pytest.skip(reason)
    with patch.object(device_plan, "_is_built", lambda device: backend.impl == "cuda"):
        yield backend.device


def assert_same_plan(n: int, m: int | None, pairs: Pairs, device: str) -> None:
    query = torch.zeros(n, 1, device=device)
    key = None if m is None else torch.zeros(m, 1, device=device)
    pairs = Pairs(*(None if values is None else values.to(device) for values in pairs[:4]), *pairs[4:])
    assert device_plan._is_counted(query, key, pairs) or device_plan._runs_on_kernels(query.device, n, m or 0)
    made = device_plan.make_plan(query, key, pairs, bidirectional=m is not None)
    assert_equal_fields(made, expected_plan(query, key, pairs))
    if m is not None:
        ranges = device_plan.query_ranges(query, key, pairs, made)
        assert_equal_fields(ranges, pairs_module.Ranges(*made[6:]))


def assert_equal_fields(got: NamedTuple, expected: NamedTuple) -> None:
    for name, value in got._asdict().items():
        wanted = getattr(expected, name)
        assert value is wanted is None or torch.equal(value, wanted), name


def expected_plan(query: Tensor, key: Tensor | None, pairs: Pairs) -> Plan:
    """The plan by torch's sorts, with the dropped ranges by comparing all pairs."""
    pairs = pairs.with_ids(query, key)
    plan = pairs_module.make_plan(query, key, pairs)
    if key is None:
        labels, ids = pairs.labels, pairs.ids
        same = Pairs(labels, labels, ids, ids, pairs.negatives)
        return plan._replace(**dropped("key", plan.query_order, plan.query_order, plan.key_begin, plan.key_end, same))
    begin, end = pairs_module.key_ranges(
        plan.key_order, pairs.key_labels, plan.query_order, pairs.labels, pairs.negatives
    )
    return plan._replace(
        query_begin=begin,
        query_end=end,
        **dropped("key", plan.query_order, plan.key_order, plan.key_begin, plan.key_end, pairs),
        **dropped("query", plan.key_order, plan.query_order, begin, end, pairs.swapped()),
    )


def dropped(
    side: str, order: Tensor, column_order: Tensor, begin: Tensor, end: Tensor, pairs: Pairs
) -> dict[str, Tensor | None]:
    """Columns of each row's range with its id, or for "different" its label, found by comparing all pairs."""
    if not pairs.drops():
        return {}
    different = pairs.negatives == "different"
    values, column_values = (pairs.labels, pairs.key_labels) if different else (pairs.ids, pairs.key_ids)
    assert values is not None
    assert column_values is not None
    rows, columns = values[order].unsqueeze(1), column_values[column_order]
    position = torch.arange(len(columns), device=columns.device)
    in_range = (begin.unsqueeze(1) <= position) & (position < end.unsqueeze(1))
    ends = {"begin": (in_range & (columns < rows)).sum(1), "end": (in_range & (columns <= rows)).sum(1)}
    return {f"{side}_drop_{name}": (begin + count).int() for name, count in ends.items()}


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


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("labelled", [True, False])
# Two views of 9 samples, as one side and as both; one view, with more keys than queries and without rows.
@pytest.mark.parametrize(("views", "n", "m"), [(2, 18, None), (2, 18, 18), (1, 9, None), (1, 9, 20), (1, 0, 4)])
@pytest.mark.parametrize("counted", [True, False])
def test_default_ids(
    monkeypatch: pytest.MonkeyPatch, device: str, counted: bool, views: int, n: int, m: int | None, labelled: bool,
    negatives: str,
) -> None:  # fmt: skip
    """The plan is that of stored ids, also by torch's sorts, where there are many rows."""
    if negatives == "different" and not labelled:
        pytest.skip("needs labels")
    pairs = make_pairs(n // views, None if m is None else m // views, negatives, labelled, False).repeated(views)
    pairs = pairs._replace(views=views)
    if counted:
        assert_same_plan(n, m, pairs, device)
        return
    monkeypatch.setattr(device_plan, "MAX_COUNTED", -1)
    monkeypatch.setattr(device_plan, "MAX_ROWS", -1)
    query, key = torch.zeros(n, 1, device=device), None if m is None else torch.zeros(m, 1, device=device)
    pairs = Pairs(*(None if values is None else values.to(device) for values in pairs[:4]), *pairs[4:])
    made = device_plan.make_plan(query, key, pairs, bidirectional=m is not None)
    assert_equal_fields(made, expected_plan(query, key, pairs))


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


def test_many_rows_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_plan, "_is_built", lambda device: False)
    monkeypatch.setattr(device_plan, "MAX_COUNTED", 20)
    rows, keys, pairs = torch.zeros(20, 1), torch.zeros(21, 1), Pairs(None, None, None, None, "same")
    assert device_plan._is_counted(rows, None, pairs)
    assert not device_plan._is_counted(rows, keys, pairs)
    assert device_plan._is_counted(torch.zeros(40, 1), None, pairs._replace(views=2))


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
    device_plan._make_order(torch.zeros(20, 1), None, Pairs(labels, None, torch.arange(20), None, "same"))
    assert len(called) == calls
