"""Forward and gradients of the operation, for every implementation, against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mcl_kernels import count_negatives, masked_logsumexp
from tests.accuracy import assert_accurate, relative_error
from tests.cases import Case, make_case
from tests.conftest import EMULATED, Backend
from tests.oracles import negatives_of

# 0 to 3 rows: no tile, no pair, one pair. 70: below a tile. 300 and 530: tiles that are full and ragged.
SELF_SHAPES = [("self", n, None) for n in (0, 1, 2, 3, 70, 530)]
SHAPES = SELF_SHAPES + [(form, n, m) for form in ("rows", "both") for n, m in ((0, 5), (5, 0), (1, 1), (300, 530))]
# 1 and 3: shorter than a vector; 17, 200 and 1000: ragged; 64 to 4096: sizes that models use.
FEATURES = [1, 3, 17, 64, 96, 200, 512, 768, 1000, 1152, 4096]
# On GPUs widths differ in the padding of a tile, and in the number of parts of a row: 1152 has several.
GPU_FEATURES = [3, 64, 200, 1152]
FORMS = ["self", "rows", "both"]


def run(
    case: Case,
    scale: Tensor | float,
    impl: str,
    *,
    negatives: str = "same",
    bidirectional: bool = False,
    wanted: tuple[str, ...] = ("query", "key", "scale"),
) -> dict[str, Tensor]:
    """The result and the gradients of a weighted sum of its finite elements."""
    leaves = {"query": case.query, "key": case.key, "scale": torch.as_tensor(scale, device=case.query.device)}
    leaves = {
        name: leaf.detach().clone().requires_grad_(name in wanted) for name, leaf in leaves.items() if leaf is not None
    }
    result = masked_logsumexp(
        leaves["query"], leaves.get("key"), case.labels, case.key_labels, scale=leaves["scale"], ids=case.ids,
        key_ids=case.key_ids, negatives=negatives, bidirectional=bidirectional, impl=impl,
    )  # fmt: skip
    values = torch.cat(result) if bidirectional else result
    weight = torch.linspace(-1, 2, len(values), device=values.device, dtype=values.dtype)
    torch.where(values.isinf(), 0, weight * values).sum().backward()
    gradients = {f"grad_{name}": leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
    return {"lse": values.detach(), **gradients}


def as_float64(case: Case) -> Case:
    return case._replace(query=case.query.double(), key=None if case.key is None else case.key.double())


def check(case: Case, scale: Tensor | float, backend: Backend, **options) -> None:  # type: ignore[no-untyped-def]
    scale = torch.as_tensor(scale, dtype=torch.float32, device=backend.device)
    got = run(case, scale, backend.impl, **options)
    reference = run(case, scale, "reference", **options)
    exact = run(as_float64(case), scale.double(), "reference", **options)
    vectors = [name for name in ("grad_query", "grad_key") if name in exact]
    usual = max([torch.finfo(torch.float32).eps, *(relative_error(reference[name], exact[name]) for name in vectors)])
    for name, value in exact.items():
        assert_accurate(got[name], reference[name], value, name, usual if name == "grad_scale" else None)


@pytest.mark.parametrize("negatives", ["same", "different", "all"])
@pytest.mark.parametrize(("form", "n", "m"), SHAPES)
def test_shapes(backend: Backend, poisoned_memory: None, form: str, n: int, m: int | None, negatives: str) -> None:
    check(make_case(n, m, 24, device=backend.device), 10.0, backend, negatives=negatives, bidirectional=form == "both")


@pytest.mark.parametrize("form", ["rows", "both"])
def test_one_row_and_one_column_beyond_a_tile(backend: Backend, poisoned_memory: None, form: str) -> None:
    case = make_case(257, 1025, 8, n_clusters=None, with_ids=False, device=backend.device)
    check(case, 10.0, backend, bidirectional=form == "both")


@pytest.mark.parametrize("n_clusters", [None, 4, 9])
@pytest.mark.parametrize("form", FORMS)
def test_clusters_of_many_tiles(backend: Backend, form: str, n_clusters: int | None) -> None:
    """A cluster that many threads share, and several that are computed by one thread each."""
    n, m = (700, 600) if backend in EMULATED else (2700, 2000)
    case = make_case(n, None if form == "self" else m, 24, n_clusters=n_clusters, device=backend.device)
    check(case, 5.0, backend, bidirectional=form == "both")


@pytest.mark.parametrize("d", FEATURES)
@pytest.mark.parametrize("form", FORMS)
def test_features(backend: Backend, poisoned_memory: None, d: int, form: str) -> None:
    if backend in EMULATED and d not in GPU_FEATURES:
        pytest.skip("takes the same path as another width")
    case = make_case(70, None if form == "self" else 90, d, device=backend.device)
    check(case, 10.0, backend, bidirectional=form == "both")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_dtypes(backend: Backend, poisoned_memory: None, dtype: torch.dtype, form: str) -> None:
    case = make_case(300, None if form == "self" else 290, 40, dtype=dtype, device=backend.device)
    got = run(case, 10.0, backend.impl, bidirectional=form == "both")
    assert got["lse"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got["grad_query"].dtype == dtype
    if dtype != torch.float64:
        check(case, 10.0, backend, bidirectional=form == "both")


@pytest.mark.parametrize(
    ("query_dtype", "key_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16), (torch.float32, torch.float64)],
    ids=str,
)
def test_mixed_dtypes(backend: Backend, query_dtype: torch.dtype, key_dtype: torch.dtype) -> None:
    case = make_case(70, 90, 40, device=backend.device)
    case = case._replace(query=case.query.to(query_dtype), key=case.key.to(key_dtype))
    got = run(case, 10.0, backend.impl)
    assert got["grad_query"].dtype == query_dtype
    assert got["grad_key"].dtype == key_dtype
    assert got["lse"].dtype == (torch.float64 if key_dtype == torch.float64 else torch.float32)
    if key_dtype != torch.float64:
        check(case, 10.0, backend)


# 100: the largest scale of CLIP. 1e4: exp overflows fp32 by far. -3 and 0: a scale is any number.
@pytest.mark.parametrize("scale", [100.0, 1e4, -3.0, 0.0])
@pytest.mark.parametrize("form", FORMS)
def test_scales(backend: Backend, scale: float, form: str) -> None:
    case = make_case(300, None if form == "self" else 290, 40, device=backend.device)
    if backend.instruction_set == "portable" and scale == 1e4:
        pytest.skip("without fused multiply-add products of unit rows have errors of 6e-8: 6e-4 in these logits")
    if backend.impl == "cuda" and scale == 1e4 and form == "rows":
        pytest.skip("products of unit rows are summed term by term, with errors of 6e-8: 6e-4 in these logits")
    check(case, scale, backend, bidirectional=form == "both")


def test_scale_100_in_bfloat16(backend: Backend) -> None:
    check(make_case(300, None, 64, dtype=torch.bfloat16, device=backend.device), 100.0, backend)


@pytest.mark.parametrize("m", [None, 290])
def test_a_scale_per_query(backend: Backend, m: int | None) -> None:
    case = make_case(300, m, 40, device=backend.device)
    check(case, torch.linspace(1, 40, 300), backend)


@pytest.mark.parametrize("n", [1, 40])
@pytest.mark.parametrize("form", FORMS)
def test_a_scale_of_shape_1_is_one_number(backend: Backend, form: str, n: int) -> None:
    case = make_case(n, None if form == "self" else 50, 8, device=backend.device)
    expected = run(case, 3.0, backend.impl, bidirectional=form == "both")
    got = run(case, torch.tensor([3.0]), backend.impl, bidirectional=form == "both")
    assert got["grad_scale"].shape == (1,)
    for name, value in expected.items():
        assert torch.equal(got[name].view_as(value), value), name


def test_a_cluster_far_below_zero(backend: Backend) -> None:
    # All logits of cluster 0 are near -50: a fixed bound of the maximum would underflow its sums to 0.
    case = make_case(70, 80, 16, n_clusters=2, with_ids=False, device=backend.device)
    direction = torch.zeros(16, device=backend.device)
    direction[0] = 7.0
    query, key = case.query + direction, case.key - direction * (case.key_labels == 0).unsqueeze(1)
    case = case._replace(query=query, key=key)
    check(case, 1.0, backend, bidirectional=True)
    lse = masked_logsumexp(query, key, case.labels, case.key_labels, impl=backend.impl)
    assert lse[case.labels == 0].max() < -20


@pytest.mark.parametrize("bidirectional", [False, True])
def test_logits_at_both_ends_of_their_range(backend: Backend, bidirectional: bool) -> None:
    # In one tile rows near 100 and rows near -100: one reference for both would lose the second.
    case = make_case(60, 70, 16, n_clusters=None, with_ids=False, device=backend.device)
    ends = torch.where(torch.arange(60, device=backend.device) % 2 == 0, 30.0, -30.0).unsqueeze(1)
    direction = torch.eye(16, device=backend.device)[0]
    query = torch.nn.functional.normalize(case.query + ends * direction, dim=1)
    key = torch.nn.functional.normalize(case.key + 30.0 * direction, dim=1)
    case = case._replace(query=query, key=key)
    check(case, 100.0, backend, bidirectional=bidirectional)
    lse = masked_logsumexp(query, key, scale=100.0, impl=backend.impl)
    assert lse[0::2].min() > 90
    assert lse[1::2].max() < -80


ONE_SIDE = [("self", wanted) for wanted in (("query",), ("scale",))]
TWO_SIDES = [("query",), ("key",), ("scale",), ("query", "key"), ("query", "scale"), ("key", "scale")]


@pytest.mark.parametrize(
    ("form", "wanted"), ONE_SIDE + [(form, wanted) for form in ("rows", "both") for wanted in TWO_SIDES]
)
def test_gradients_of_some_inputs(backend: Backend, poisoned_memory: None, form: str, wanted: tuple[str, ...]) -> None:
    case = make_case(70, None if form == "self" else 90, 24, device=backend.device)
    check(case, 10.0, backend, bidirectional=form == "both", wanted=wanted)


def test_only_one_direction_has_a_gradient(backend: Backend) -> None:
    case = make_case(70, 90, 24, device=backend.device)
    for direction in (0, 1):
        results = []
        for impl, dtype in ((backend.impl, torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
            query = case.query.to(dtype, copy=True).requires_grad_()
            lse = masked_logsumexp(
                query, case.key.to(dtype), case.labels, case.key_labels, ids=case.ids, key_ids=case.key_ids,
                scale=5.0, bidirectional=True, impl=impl,
            )[direction]  # fmt: skip
            lse[lse.isfinite()].square().sum().backward()
            results.append(query.grad)
        assert_accurate(*results)


def strided(x: Tensor) -> dict[str, Tensor]:
    """The same values with other strides."""
    wide = torch.stack((x, x), dim=2).flatten(1)
    return {
        "transposed": x.T.contiguous().T,
        "every other column": wide[:, ::2],
        "sliced rows": torch.cat((x, x))[: len(x)],
        "reversed twice": x.flip(0).contiguous().flip(0),
    }


@pytest.mark.parametrize("layout", ["transposed", "every other column", "sliced rows", "reversed twice"])
def test_strides(backend: Backend, layout: str) -> None:
    case = make_case(70, 90, 24, device=backend.device)
    expected = masked_logsumexp(*case[:4], ids=case.ids, key_ids=case.key_ids, impl=backend.impl)
    view = case._replace(query=strided(case.query)[layout], key=strided(case.key)[layout])
    got = masked_logsumexp(*view[:4], ids=view.ids, key_ids=view.key_ids, impl=backend.impl)
    torch.testing.assert_close(got, expected)


def test_expanded_inputs_and_gradients(backend: Backend) -> None:
    row = torch.randn(1, 24, device=backend.device, requires_grad=True)
    query = row.expand(50, 24)
    lse = masked_logsumexp(query, scale=0.1, impl=backend.impl)
    lse.sum().backward()  # the gradient of a sum is an expanded tensor
    expected = torch.log(torch.tensor(49.0)) + 0.1 * row.detach().square().sum()
    torch.testing.assert_close(lse.detach(), expected.expand(50))
    torch.testing.assert_close(row.grad, 2 * 0.1 * 50 * row.detach())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_label_dtypes(backend: Backend, dtype: torch.dtype) -> None:
    x = torch.randn(20, 8, device=backend.device)
    labels = torch.arange(20, device=backend.device) % 3
    expected = masked_logsumexp(x, labels=labels, impl=backend.impl)
    assert torch.equal(masked_logsumexp(x, labels=labels.to(dtype), impl=backend.impl), expected)


@pytest.mark.parametrize("negatives", ["same", "different", "all"])
def test_rows_without_kept_keys_give_minus_infinity(backend: Backend, negatives: str) -> None:
    x = torch.randn(6, 8, device=backend.device, requires_grad=True)
    lse = masked_logsumexp(
        x, labels=torch.full((6,), -1, device=backend.device), negatives=negatives, impl=backend.impl
    )
    assert (lse == -torch.inf).all()
    assert (masked_logsumexp(x, x.detach()[:0], impl=backend.impl) == -torch.inf).all()


@pytest.mark.parametrize("negatives", ["same", "different", "all"])
def test_a_tile_of_every_kind_of_row(backend: Backend, negatives: str) -> None:
    """Sorted side by side: negative labels, labels that no key has, three tiny clusters, the head of a huge one."""
    case = make_case(700, 900, 24, n_clusters=None, device=backend.device)
    # 256 rows fill a tile of `blockwise`, so that the next begins with a label that no key has.
    sizes = ((-1, 9), (1, 256), (2, 4), (3, 5), (8, 300), (9, 6), (10, 7), (12, 113))
    key_sizes = ((-2, 5), (1, 100), (3, 3), (4, 8), (8, 700), (10, 4), (12, 80))
    labels, key_labels = (torch.cat([torch.full((size,), y) for y, size in every]) for every in (sizes, key_sizes))
    order = torch.randperm(700, generator=torch.Generator("cpu").manual_seed(1), device="cpu").to(backend.device)
    case = case._replace(labels=labels[order].to(backend.device), key_labels=key_labels.flip(0).to(backend.device))
    check(case, 10.0, backend, negatives=negatives, bidirectional=True)
    lse = masked_logsumexp(*case[:4], negatives=negatives, impl=backend.impl)
    lonely = (
        case.labels < 0
        if negatives != "same"
        else torch.isin(case.labels, torch.tensor([-1, 2, 9], device=backend.device))
    )
    assert torch.equal(lse == -torch.inf, lonely)


def test_nan_in_a_row_that_matches_nothing_stays_there(backend: Backend) -> None:
    # The slots of a queue that was never filled hold any values.
    case = make_case(70, 90, 24, device=backend.device)
    poisoned = torch.where((case.key_labels < 0).unsqueeze(1), torch.nan, case.key)
    assert poisoned.isnan().any()
    expected = run(case, 5.0, backend.impl)
    got = run(case._replace(key=poisoned), 5.0, backend.impl)
    for name in ("lse", "grad_query", "grad_scale"):
        torch.testing.assert_close(got[name], expected[name])
    assert got["grad_key"].isfinite().all()


def test_nan_in_a_query_that_matches_nothing_stays_there(backend: Backend) -> None:
    case = make_case(70, 90, 24, device=backend.device)
    poisoned = torch.where((case.labels < 0).unsqueeze(1), torch.nan, case.query)
    assert poisoned.isnan().any()
    expected = run(case, 5.0, backend.impl, negatives="different")
    got = run(case._replace(query=poisoned), 5.0, backend.impl, negatives="different")
    for name in ("lse", "grad_key", "grad_scale"):
        torch.testing.assert_close(got[name], expected[name])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_reach_the_results(backend: Backend, value: float) -> None:
    case = make_case(70, None, 24, n_clusters=2, device=backend.device)
    query = case.query.clone()
    query[10, 3] = value
    cluster = (case.labels == case.labels[10]) & (case.ids != case.ids[10])
    got = run(case._replace(query=query), 5.0, backend.impl)
    assert not got["lse"][10].isfinite()
    if value != value:
        assert got["lse"][cluster].isnan().all()
        assert got["grad_query"][cluster].isnan().any(dim=1).all()


@pytest.mark.parametrize("negatives", ["same", "different", "all"])
@pytest.mark.parametrize("m", [None, 40])
def test_count_negatives(negatives: str, m: int | None) -> None:
    case = make_case(50, m, 4)
    key_labels = case.labels if m is None else case.key_labels
    key_ids = case.ids if m is None else case.key_ids
    got = count_negatives(case.labels, case.key_labels, ids=case.ids, key_ids=case.key_ids, negatives=negatives)
    expected = [
        len(negatives_of(i, len(key_labels), case.labels, key_labels, case.ids, key_ids, negatives)) for i in range(50)
    ]
    assert got.dtype == torch.int64
    assert got.tolist() == expected


def test_count_negatives_by_default() -> None:
    labels = torch.tensor([0, 0, 0, 1, -1])
    assert count_negatives(labels).tolist() == [2, 2, 2, 0, 0]
    assert count_negatives(labels, labels).tolist() == [3, 3, 3, 1, 0]
    assert count_negatives(labels, negatives="different").tolist() == [1, 1, 1, 3, 0]
    assert count_negatives(labels, negatives="all").tolist() == [3, 3, 3, 3, 0]
    assert count_negatives(labels[:0]).tolist() == []
