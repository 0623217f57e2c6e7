"""Negatives besides the keys: those of a single query (`hard_negatives`) and further blocks (`include`)."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mcl_kernels import masked_info_nce, objectives
from mcl_kernels.objectives import ObjectiveLike, needs_of
from tests import oracles
from tests.cases import OBJECTIVES
from tests.conftest import Backend, composed

N, M, H, D = 12, 15, 4, 5
MASK = (torch.arange(H, device="cpu") < torch.arange(N, device="cpu")[:, None] % (H + 1)).flip(1)  # 0 to H of them


def rows(seed: int, *shape: int) -> Tensor:
    x = torch.randn(*shape, D, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float64, device="cpu")
    return F.normalize(x + 0.5, dim=-1).to(torch.get_default_device())


def batch() -> dict[str, Tensor]:
    """Queries, keys and private rows, with a query of a lonely label, one without a label and repeated ids."""
    labels, ids = torch.arange(M) % 3, torch.arange(M)
    labels[4], labels[5], ids[2] = 9, -1, 0
    query = rows(0, N).requires_grad_()
    key = F.normalize(torch.cat((query.detach() + 0.5 * rows(1, N), rows(2, M - N)))).requires_grad_()
    return {"query": query, "key": key, "labels": labels, "ids": ids, "hard": rows(3, N, H).requires_grad_()}


def check_values_and_gradients(got: Tensor, expected: Tensor, leaves: tuple[Tensor, ...]) -> None:
    weight = torch.linspace(-1, 2, len(expected), dtype=expected.dtype)
    torch.testing.assert_close(got, expected)
    for x, y in zip(*(torch.autograd.grad(weight @ loss, leaves) for loss in (got, expected)), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("queue", [True, False])
def test_hard_negatives_by_cross_entropy(backend: Backend, queue: bool, masked: bool) -> None:
    """[own key | all keys | own hard negatives] without labels; gradients of all of them."""
    inputs, temperature = batch(), torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    query, key, hard, mask = inputs["query"], inputs["key"], inputs["hard"], MASK.to(inputs["hard"].device)
    positive = rows(4, N).requires_grad_() if queue else None
    got = masked_info_nce(
        query, key, temperature=temperature, positive=positive, hard_negatives=hard,
        hard_mask=mask if masked else None, normalize=False, reduction="none", impl=backend.impl,
    )  # fmt: skip
    private = torch.einsum("nd,nhd->nh", query, hard) / temperature
    private = private.masked_fill(~mask, -torch.inf) if masked else private
    shared = query @ key.T / temperature
    if positive is not None:
        shared = torch.cat(((query * positive).sum(1, keepdim=True) / temperature, shared), dim=1)
    target = torch.zeros(N, dtype=torch.int64) if queue else torch.arange(N)
    expected = F.cross_entropy(torch.cat((shared, private), dim=1), target, reduction="none")
    leaves = query, key, hard, temperature, *([] if positive is None else [positive])
    check_values_and_gradients(got, expected, leaves)


@pytest.mark.parametrize("objective", OBJECTIVES)
@composed
def test_a_query_by_itself_has_its_private_rows_as_keys(backend: Backend, objective: ObjectiveLike) -> None:
    """Labels and ids hold for the keys alone; every objective, with one temperature for each query."""
    if needs_of(objective).mixes_anchors:
        pytest.skip("the loss of a query depends on the others")
    inputs, temperature = batch(), torch.linspace(0.1, 0.5, N, dtype=torch.float64)
    labels, ids, mask = inputs["labels"], inputs["ids"], MASK.to(inputs["labels"].device)
    options: dict[str, Any] = {"objective": objective, "reduction": "none", "impl": backend.impl}
    got = masked_info_nce(
        inputs["query"], inputs["key"], labels[:N], labels, temperature=temperature, ids=ids[:N], key_ids=ids,
        hard_negatives=inputs["hard"], hard_mask=mask, **options,
    )  # fmt: skip
    expected = []
    for i in range(N):
        kept = (labels == labels[i]) & (labels >= 0) & (ids != ids[i])
        key = torch.cat((inputs["key"][kept], inputs["hard"][i][mask[i]]))
        query, positive = inputs["query"][i : i + 1], inputs["key"][i : i + 1]
        expected.append(masked_info_nce(query, key, positive=positive, temperature=temperature[i], **options))
    check_values_and_gradients(got, torch.cat(expected), (inputs["query"], inputs["key"], inputs["hard"]))


@pytest.mark.parametrize("objective", OBJECTIVES)
@composed
def test_private_rows_alone(backend: Backend, objective: ObjectiveLike) -> None:
    """Without keys, or under a label that nothing matches: a query has a loss if it has private rows."""
    inputs, labels, mask = batch(), torch.full((N,), -1), MASK.to(torch.get_default_device())
    options: dict[str, Any] = {"hard_negatives": inputs["hard"], "hard_mask": mask, "reduction": "none"}
    options |= {"objective": objective, "impl": backend.impl}
    query, positive = inputs["query"], inputs["key"][:N]
    without_keys = masked_info_nce(query, positive[:0], positive=positive, **options)
    labelled = masked_info_nce(query, inputs["key"], labels, torch.zeros(M).long(), **options)
    (grad,) = torch.autograd.grad(labelled.sum(), query, retain_graph=True)
    check_values_and_gradients(labelled, without_keys, (query, inputs["key"], inputs["hard"]))
    assert torch.equal(labelled != 0, mask.any(1))
    assert torch.equal((grad != 0).any(1), mask.any(1))


@composed
def test_no_private_rows(backend: Backend) -> None:
    """H = 0, and a mask without True, have the bits of a loss without the argument."""
    inputs, options = batch(), {"reduction": "none", "impl": backend.impl}
    expected = masked_info_nce(inputs["query"], inputs["key"], **options)
    for h in (0, H):
        hard, mask = inputs["hard"][:, :h], torch.zeros(N, h, dtype=torch.bool)
        got = masked_info_nce(inputs["query"], inputs["key"], hard_negatives=hard, hard_mask=mask, **options)
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)
        assert (torch.autograd.grad(got.sum(), inputs["hard"])[0] == 0).all()
    none = inputs["query"][:0]
    assert masked_info_nce(none, none, hard_negatives=inputs["hard"][:0], impl=backend.impl) == 0


@composed
@pytest.mark.parametrize("normalize", [True, False])
def test_padding_holds_any_values(backend: Backend, normalize: bool) -> None:
    inputs, mask = batch(), MASK.to(torch.get_default_device())
    results = []
    for value in (0.0, torch.nan, torch.inf):
        hard = inputs["hard"].detach().masked_fill(~mask[:, :, None], value).requires_grad_()
        options = {"hard_negatives": hard, "hard_mask": mask, "normalize": normalize, "impl": backend.impl}
        loss = masked_info_nce(inputs["query"], inputs["key"], **options)
        results.append((loss, *torch.autograd.grad(loss, (inputs["query"], hard))))
        assert (results[-1][2][~mask] == 0).all()
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
    hard = inputs["hard"].detach().clone()
    hard[3, 1] = torch.nan
    each = masked_info_nce(inputs["query"], inputs["key"], hard_negatives=hard, reduction="none", impl=backend.impl)
    assert torch.equal(each.isnan(), torch.arange(N) == 3)


@composed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_hard_negatives_in_half_precision(backend: Backend, dtype: torch.dtype) -> None:
    inputs = {name: x.detach().to(dtype) for name, x in batch().items()}
    hard, options = inputs["hard"].requires_grad_(), {"temperature": 0.5, "normalize": False}
    with torch.autocast(backend.device, dtype=dtype):
        got = masked_info_nce(inputs["query"], inputs["key"], hard_negatives=hard, impl=backend.impl, **options)
    exact = masked_info_nce(
        inputs["query"].double(), inputs["key"].double(), hard_negatives=hard.double(), impl="reference", **options
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)
    (grad,), (exact_grad,) = (torch.autograd.grad(loss, hard) for loss in (got, exact))
    assert grad.dtype == dtype
    torch.testing.assert_close(grad, exact_grad)


@composed
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients(backend: Backend, objective: ObjectiveLike) -> None:
    """Gradients of private rows, blocks and temperatures agree; some queries lack private rows, negatives or both."""
    query, key, hard = (x.requires_grad_() for x in (rows(0, 5), rows(1, 5), rows(2, 5, 2)))
    labels, mask = torch.tensor([0, 0, 4, 0, 5]), torch.tensor([[True, False]] * 3 + [[False, False]] * 2)
    temperature = torch.linspace(0.2, 0.8, 5, dtype=torch.float64).requires_grad_()

    def loss(*leaves: Tensor) -> Tensor:
        query, key, hard, temperature = leaves
        return masked_info_nce(
            query, key, labels, temperature=temperature, hard_negatives=hard, hard_mask=mask,
            include=("qk", "qq", "kq", "kk"), objective=objective, reduction="none", impl=backend.impl,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (query, key, hard, temperature))
    if backend.impl == "reference":
        assert torch.autograd.gradgradcheck(loss, (query, key, hard, temperature))


BLOCKS = [("qk", *more) for size in range(4) for more in combinations(("qq", "kq", "kk"), size)]


def blocks_by_hand(
    inputs: dict[str, Tensor], include: tuple[str, ...], m: int, scale: Tensor, negatives: str
) -> list[float]:
    """-log of the share of the positive, pair by pair in Python floats."""
    sides = {"q": (inputs["query"], N), "k": (inputs["key"], m)}
    labels, ids = inputs["labels"], inputs["ids"]
    losses = []
    for i in range(N):
        s = float(scale if scale.ndim == 0 else scale[i])
        terms = [s * float(inputs["query"][i] @ inputs["key"][i])]
        for row, column in include:
            own, (others, size) = sides[row][0][i], sides[column]
            kept = oracles.negatives_of(i, size, labels, labels, ids, ids, negatives)
            terms += [s * float(own @ others[j]) for j in kept]
        losses.append(
            float(torch.tensor(terms, dtype=torch.float64).logsumexp(0)) - terms[0] if len(terms) > 1 else 0.0
        )
    return losses


@pytest.mark.parametrize("negatives", ["same", "different", "all"])
@pytest.mark.parametrize("include", BLOCKS, ids=" ".join)
def test_blocks_by_hand(backend: Backend, include: tuple[str, ...], negatives: str) -> None:
    """As many keys as queries and more; one temperature and one for each query."""
    for m in (N, M):
        for temperature in (torch.tensor(0.3).double(), torch.linspace(0.2, 0.7, N, dtype=torch.float64)):
            inputs = {name: x.detach()[:m] for name, x in batch().items()}
            labels, ids = inputs["labels"], inputs["ids"]
            got = masked_info_nce(
                inputs["query"], inputs["key"], labels[:N], labels, ids=ids[:N], key_ids=ids, temperature=temperature,
                negatives=negatives, include=include, reduction="none", impl=backend.impl,
            )  # fmt: skip
            expected = blocks_by_hand(inputs, include, m, 1 / temperature, negatives)
            torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_blocks_of_qwen3(backend: Backend) -> None:
    """The loss of Qwen3 Embedding without its margin: documents, queries, documents of documents, own negatives."""
    inputs = batch()
    query, key, hard = inputs["query"], inputs["key"][:N], inputs["hard"]
    own = torch.eye(N, dtype=torch.bool)
    logits = torch.cat(
        (
            query @ key.T,
            (query @ query.T).masked_fill(own, -torch.inf),
            (key @ key.T).masked_fill(own, -torch.inf),
            torch.einsum("nd,nhd->nh", query, hard),
        ),
        dim=1,
    )
    expected = F.cross_entropy(logits / 0.2, torch.arange(N), reduction="none")
    got = masked_info_nce(
        query, key, temperature=0.2, hard_negatives=hard, include=("qk", "qq", "kk"), normalize=False,
        reduction="none", impl=backend.impl,
    )  # fmt: skip
    check_values_and_gradients(got, expected, (query, inputs["key"], hard))


@composed
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_queries_are_further_keys(backend: Backend, objective: ObjectiveLike) -> None:
    """The block "qq" equals the queries appended to the keys, under every objective; in the queue form, too."""
    inputs, options = batch(), {"objective": objective, "reduction": "none", "impl": backend.impl}
    query, key, labels = inputs["query"], inputs["key"], inputs["labels"]
    for positive, ids, key_ids in (
        (None, torch.arange(N), torch.arange(M)),
        (rows(4, N), torch.arange(N), 100 + torch.arange(M)),
    ):
        given = {} if positive is None else {"ids": ids, "key_ids": key_ids}
        got = masked_info_nce(
            query, key, labels[:N], labels, positive=positive, include=("qq", "qk"), **given, **options
        )
        expected = masked_info_nce(
            query, torch.cat((key, query)), labels[:N], torch.cat((labels, labels[:N])), positive=positive, ids=ids,
            key_ids=torch.cat((key_ids, ids)), **options,
        )  # fmt: skip
        check_values_and_gradients(got, expected, (query, key))


@composed
def test_counts_of_all_blocks_add_up(backend: Backend) -> None:
    inputs, mask = batch(), MASK.to(torch.get_default_device())

    class Count(objectives.Objective):
        counts = True

        def __call__(self, a: Tensor, b: Tensor, n: Tensor, scale: Tensor) -> Tensor:
            return n + 0 * (a + b)

    labels, ids = inputs["labels"], inputs["ids"]
    for m in (N, M):
        got = masked_info_nce(
            inputs["query"], inputs["key"][:m], labels[:N], labels[:m], ids=ids[:N], key_ids=ids[:m],
            hard_negatives=inputs["hard"], hard_mask=mask, include=("qk", "qq", "kq", "kk"), objective=Count(),
            reduction="none", impl=backend.impl,
        )  # fmt: skip
        kept = [[len(oracles.negatives_of(i, size, labels, labels, ids, ids)) for size in (m, N)] for i in range(N)]
        assert got.tolist() == [2.0 * sum(sizes) + int(mask[i].sum()) for i, sizes in enumerate(kept)]


@pytest.mark.slow
def test_compile() -> None:
    """One graph for any number of queries, keys and private rows."""
    torch._dynamo.reset()

    def loss(query: Tensor, key: Tensor, labels: Tensor, hard: Tensor, mask: Tensor) -> Tensor:
        return masked_info_nce(
            query, key, labels, hard_negatives=hard, hard_mask=mask, include=("qk", "qq", "kq", "kk")
        )

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for step, (n, h) in enumerate([(40, 3), (60, 5), (33, 7)]):
        query, key, hard = (x.requires_grad_() for x in (rows(0, n), rows(1, n), rows(2, n, h)))
        inputs = query, key, torch.arange(n) % (step + 2), hard, torch.rand(n, h) < 0.5
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            got = compiled(*inputs)
        expected = loss(*inputs)
        torch.testing.assert_close(got, expected)
        leaves = query, key, hard
        torch.testing.assert_close(*(torch.autograd.grad(value, leaves) for value in (got, expected)))
