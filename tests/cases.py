"""Inputs that make a softmax test mean something: random rows alone give logits that are all alike."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mcl_kernels import objectives

OBJECTIVES = [
    pytest.param(objectives.info_nce, id="info_nce"),
    pytest.param(objectives.decoupled, id="decoupled"),
    pytest.param(objectives.decoupled_weighted(), id="decoupled_weighted"),
    pytest.param(objectives.ifm(), id="ifm"),
    pytest.param(objectives.debiased(), id="debiased"),
    pytest.param(objectives.hard_negative(), id="hard_negative"),
]


class Case(NamedTuple):
    query: Tensor  # [N, D]
    key: Tensor | None  # [M, D]; None: the self form
    labels: Tensor | None
    key_labels: Tensor | None
    ids: Tensor | None
    key_ids: Tensor | None


def make_case(
    n: int,
    m: int | None,
    d: int,
    *,
    n_clusters: int | None = 5,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    with_ids: bool = True,
    seed: int = 0,
) -> Case:
    """Unit rows with planted duplicates, near-duplicates and opposites; -1 labels, a lonely label, repeated ids."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def rows(size: int) -> Tensor:
        x = torch.nn.functional.normalize(torch.randn(size, d, generator=generator, device="cpu"), dim=1)
        if size > 8:
            x[1], x[2], x[3] = x[0], -x[0], x[0] + 1e-3 * x[4]
        return x.to(dtype).to(device)

    def labels(size: int) -> Tensor | None:
        if n_clusters is None:
            return None
        y = torch.randint(0, n_clusters, (size,), generator=generator, device="cpu")
        if size > 8:
            y[:4] = 0
            y[5] = -1
            y[6] = n_clusters + 10**15
        return y.to(device)

    def ids(size: int) -> Tensor | None:
        u = torch.randint(0, max(2 * n, 1), (size,), generator=generator, device="cpu")
        return u.to(device) if with_ids else None

    query, query_labels, query_ids = rows(n), labels(n), ids(n)
    if m is None:
        return Case(query, None, query_labels, None, query_ids, None)
    return Case(query, rows(m), query_labels, labels(m), query_ids, ids(m))
