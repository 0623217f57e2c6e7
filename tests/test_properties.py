"""Properties that hold for every input, tested on many."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from mcl_kernels import KMeans, compose_labels, count_negatives, masked_logsumexp, nt_xent
from mcl_kernels.stages import pseudo_labels
from tests.conftest import CPU_IMPLS, EMULATED_IMPLS
from tests.hypothesis_settings import examples


@st.composite
def batches(draw: Any, max_rows: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in fp64, labels from -1, ids with repetitions."""
    n = draw(st.integers(0, max_rows))
    d = draw(st.integers(1, 6))
    labels = draw(st.lists(st.integers(-1, 3), min_size=n, max_size=n))
    ids = draw(st.lists(st.integers(-5, 2 * n), min_size=n, max_size=n))
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))), dtype=torch.float64)
    return x, torch.tensor(labels, dtype=torch.long), torch.tensor(ids, dtype=torch.long)


MODES = st.sampled_from(["same", "different", "all"])


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_permuting_the_batch_permutes_the_result(impl: str) -> None:
    @examples(emulated=impl in EMULATED_IMPLS)
    @given(batch=batches(), negatives=MODES, random=st.randoms(use_true_random=False))
    def check(batch, negatives: str, random) -> None:  # type: ignore[no-untyped-def]
        x, labels, ids = batch
        order = torch.tensor(random.sample(range(len(x)), len(x)), dtype=torch.long)
        lse = masked_logsumexp(x, labels=labels, ids=ids, negatives=negatives, impl=impl)
        permuted = masked_logsumexp(x[order], labels=labels[order], ids=ids[order], negatives=negatives, impl=impl)
        torch.testing.assert_close(permuted, lse[order])

    check()


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_splitting_the_keys_adds_up(impl: str) -> None:
    @examples(emulated=impl in EMULATED_IMPLS)
    @given(batch=batches(), negatives=MODES, split=st.floats(0, 1))
    def check(batch, negatives: str, split: float) -> None:  # type: ignore[no-untyped-def]
        x, labels, ids = batch
        cut = int(split * len(x))

        def lse(keys: slice) -> Tensor:
            return masked_logsumexp(
                x, x[keys], labels, labels[keys], ids=ids, key_ids=ids[keys], negatives=negatives, impl=impl
            )

        all_keys, parts = lse(slice(None)), (lse(slice(cut)), lse(slice(cut, None)))
        torch.testing.assert_close(torch.logaddexp(*parts), all_keys)

    check()


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_a_duplicate_with_the_same_id_changes_nothing_for_its_sample(impl: str) -> None:
    @examples(emulated=impl in EMULATED_IMPLS)
    @given(batch=batches())
    def check(batch) -> None:  # type: ignore[no-untyped-def]
        x, labels, _ = batch
        if len(x) == 0:
            return
        ids = torch.arange(len(x))
        lse = masked_logsumexp(x, labels=labels, ids=ids, impl=impl)
        with_copy = masked_logsumexp(
            torch.cat((x, x[:1])), labels=torch.cat((labels, labels[:1])), ids=torch.cat((ids, ids[:1])), impl=impl
        )
        torch.testing.assert_close(with_copy[[0, -1]], lse[[0, 0]])

    check()


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_merging_all_clusters_gives_the_plain_loss(impl: str) -> None:
    @examples(emulated=impl in EMULATED_IMPLS)
    @given(batch=batches())
    def check(batch) -> None:  # type: ignore[no-untyped-def]
        x, labels, ids = batch
        merged = nt_xent(x, x + 1, torch.zeros_like(labels), ids=ids, impl=impl)
        torch.testing.assert_close(merged, nt_xent(x, x + 1, ids=ids, impl=impl))

    check()


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_bidirectional_is_both_single_directions(impl: str) -> None:
    @examples(emulated=impl in EMULATED_IMPLS)
    @given(batch=batches(), negatives=MODES)
    def check(batch, negatives: str) -> None:  # type: ignore[no-untyped-def]
        x, labels, ids = batch
        key, key_labels, key_ids = x[::2] + 1, labels[::2].flip(0), ids[::2]
        options = {"negatives": negatives, "impl": impl}
        rows, columns = masked_logsumexp(
            x, key, labels, key_labels, ids=ids, key_ids=key_ids, bidirectional=True, **options
        )
        torch.testing.assert_close(
            rows, masked_logsumexp(x, key, labels, key_labels, ids=ids, key_ids=key_ids, **options)
        )
        torch.testing.assert_close(
            columns, masked_logsumexp(key, x, key_labels, labels, ids=key_ids, key_ids=ids, **options)
        )

    check()


@examples()
@given(batch=batches(), negatives=MODES)
def test_the_count_is_the_log_sum_exp_of_zeros(batch, negatives: str) -> None:  # type: ignore[no-untyped-def]
    x, labels, ids = batch
    lse = masked_logsumexp(x, labels=labels, ids=ids, scale=0.0, negatives=negatives)
    count = count_negatives(labels, ids=ids, negatives=negatives)
    torch.testing.assert_close(lse.exp(), count.double())


@examples()
@given(
    n=st.integers(1, 60), k=st.integers(1, 12), d=st.integers(1, 4), seed=st.integers(0, 99),
    metric=st.sampled_from(["euclidean", "cosine"]), init=st.sampled_from(["random", "k-means++"]),
    rounded=st.booleans(),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:n_clusters")
def test_inertia_never_rises(n: int, k: int, d: int, seed: int, metric: str, init: str, rounded: bool) -> None:
    """Also with many equal rows (`rounded`), which leave clusters empty."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    x = x.round() if rounded else x
    kmeans = KMeans(min(k, n), metric=metric, init=init, seed=seed, max_iter=20).fit(x)
    objectives = [step["objective"] for step in kmeans.history_] + [kmeans.inertia_]
    for before, after in pairwise(objectives):
        assert after <= before * (1 + 1e-5) + 1e-5
    assert torch.equal(kmeans.predict(x), kmeans.labels_)
    assert kmeans.labels_.unique().tolist() == list(range(len(kmeans.cluster_centers_)))


@examples()
@given(columns=st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 3), st.integers(-1, 3)), max_size=40))
def test_composed_labels_rank_the_tuples(columns: list[tuple[int, int, int]]) -> None:
    first, second, third = torch.tensor(columns, dtype=torch.long).reshape(-1, 3).unbind(1)
    got = compose_labels(compose_labels(first, second), third)
    known = sorted({column for column in columns if min(column) >= 0})
    expected = [known.index(column) if min(column) >= 0 else -1 for column in columns]
    assert got.tolist() == expected


# Small ids are composed by a table of pairs, large ones by a sort; products of two of the last kind overflow int64.
IDS = st.one_of(st.integers(-2, 4), st.integers(0, 10**6), st.integers(2**62, 2**63 - 1))


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@examples()
@given(pairs=st.lists(st.tuples(IDS, IDS), max_size=40))
def test_composed_pairs_are_those_of_a_sort(dtype: torch.dtype, chunk: int, pairs: list[tuple[int, int]]) -> None:
    both = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pseudo_labels, "CHUNK", chunk)
        labels, distinct = pseudo_labels.compose_pairs(*both.unbind(1), dtype)
    known = (both >= 0).all(1)
    expected, ranks = torch.unique(both[known], dim=0, return_inverse=True)
    assert labels.dtype == dtype
    assert torch.equal(labels[known].long(), ranks)
    assert (labels[~known] == -1).all()
    assert torch.equal(distinct, expected)
