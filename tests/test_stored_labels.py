"""Stored labels behave as an int64 tensor."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from mcl_kernels import ClusterBatchSampler, MultistageRunner, compose_labels, count_negatives, nt_xent
from mcl_kernels.stages.stored_labels import StoredLabels, map_labels

PLAIN = torch.tensor([3, 0, 3, -1, 2, 0, 1, 3])
X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["int32", "int64", "map"])
def labels(request: pytest.FixtureRequest, tmp_path: Path) -> StoredLabels:
    if request.param == "map":
        np.save(tmp_path / "labels.npy", PLAIN.numpy().astype(np.int32))
        return map_labels(tmp_path / "labels.npy")
    return StoredLabels(PLAIN.to(getattr(torch, request.param)))


def saved_and_loaded(x: Tensor) -> Tensor:
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    loaded: Tensor = torch.load(buffer, weights_only=True)
    return loaded


def loaded_in_order(x: Tensor) -> Tensor:
    return torch.cat([batch for _, batch in DataLoader(TensorDataset(X, x), batch_size=3)])


# Uses of labels in training loops, and accesses to their memory that could return unwidened elements.
USES: dict[str, Callable[[Any], Any]] = {
    "integer": lambda x: x[3],
    "slice": lambda x: x[2:7:2],
    "list": lambda x: x[[5, 0, 5]],
    "tensor": lambda x: x[torch.tensor([[1, 2], [0, 7]])],
    "array": lambda x: x[np.array([1, 2])],
    "mask": lambda x: x[x > 0],
    "by itself": lambda x: x[x.clamp(min=0)],
    "as an index": lambda x: torch.arange(8)[x],
    "comparison": lambda x: x == PLAIN,
    "arithmetic": lambda x: (x * torch.arange(8) - x).sum(),
    "reflected": lambda x: torch.arange(8) * x,
    "iteration": lambda x: [int(label) for label in x],
    "metadata": lambda x: (
        x.dtype,
        x.shape,
        x.device,
        x.ndim,
        len(x),
        x.size(0),
        x.numel(),
        x.requires_grad,
        x.is_cuda,
    ),
    "to": lambda x: x.to("cpu", torch.float32),
    "long": lambda x: x.long(),
    "unique": lambda x: x.unique(return_counts=True),
    "in containers": lambda x: torch.cat([x, x]),
    "assigned from": lambda x: torch.zeros(8, dtype=torch.int64).copy_(x),
    "out": lambda x: torch.add(x, 1, out=torch.zeros(8, dtype=torch.int64)),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "asarray": np.asarray,
    "dlpack": torch.from_dlpack,
    "storage": lambda x: x.untyped_storage().nbytes(),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "save": saved_and_loaded,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "repr": repr,
    "loader": loaded_in_order,
    "sampler": lambda x: list(ClusterBatchSampler(x, 3)),
    "loss": lambda x: nt_xent(X, X, x, impl="reference"),
    "compose": lambda x: compose_labels(x, x),
    "count": count_negatives,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_equals_the_int64_tensor(labels: StoredLabels, use: Callable[[Any], Any]) -> None:
    got, expected = use(labels), use(PLAIN)
    assert type(got) is type(expected)
    if isinstance(expected, Tensor):
        assert got.dtype == expected.dtype
    if isinstance(expected, np.ndarray):
        assert got.dtype == expected.dtype
        got, expected = got.tolist(), expected.tolist()
    torch.testing.assert_close(got, expected, rtol=0, atol=0) if isinstance(expected, Tensor) else None
    assert str(got) == str(expected)


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.__setitem__(3, 1),
        lambda x: x.fill_(0),
        lambda x: x.share_memory_(),
        lambda x: torch.add(PLAIN, 1, out=x),
    ],
)
def test_read_only(labels: StoredLabels, write: Callable[[StoredLabels], object]) -> None:
    with pytest.raises(TypeError, match=r"labels are read-only: take a copy, labels.clone\(\)"):
        write(labels)
    for copied in (labels.clone(), labels[:], labels.long()):
        copied.fill_(9)
    assert torch.equal(labels, PLAIN)


def test_indexing_and_metadata_copy_no_other_labels() -> None:
    """The labels are an expanded scalar: a copy of all would not fit in memory."""
    labels = StoredLabels(torch.zeros(1, dtype=torch.int32).expand(1 << 50))
    assert labels.shape == (1 << 50,)
    assert (len(labels), labels.size(0), labels.dtype, labels.device.type) == (1 << 50, 1 << 50, torch.int64, "cpu")
    assert labels[[5, 1 << 49]].tolist() == [0, 0]
    assert labels[-3:].tolist() == [0, 0, 0]
    with pytest.raises(RuntimeError, match="allocate"):
        labels.clone()


class InWorkers(Dataset[tuple[Any, ...]]):
    """Samples of a data set, with the sizes of stored labels in a worker and whether they are in shared memory."""

    def __init__(self, tensors: list[Tensor], stored: list[StoredLabels]) -> None:
        self.samples, self.stored = TensorDataset(*tensors, *stored), stored

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        storages = [labels.stored.untyped_storage() for labels in self.stored]
        sizes, shared = ([storage.nbytes() for storage in storages], [storage.is_shared() for storage in storages])
        return *self.samples[index], torch.tensor([sizes]), torch.tensor([shared])


@pytest.mark.filterwarnings("ignore:stage 1 will have few negatives")
@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 2), ("forkserver", 1)])
def test_workers_of_a_loader(method: str, workers: int, tmp_path: Path) -> None:
    """Labels of the first stage, and of the second one: in memory, and in a file if the run has a directory."""
    first, second = [], []
    for directory in (None, tmp_path / "run"):
        for stage, labels in zip(
            MultistageRunner(8, n_clusters=4, n_stages=2, directory=directory), (first, second), strict=True
        ):
            labels.append(stage.labels)
            stage.finish(X)
    data = InWorkers([X, *first], second)
    loader = DataLoader(data, batch_size=3, num_workers=workers, multiprocessing_context=method)
    *samples, held_bytes, is_shared = map(torch.cat, zip(*loader, strict=True))
    for got, expected in zip(samples, (X, *first, *second), strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
    assert (held_bytes == 8 * 4).all()
    if method != "fork":
        assert is_shared.reshape(-1, 2).unique(dim=0).tolist() == [[True, False]], "a file is mapped again"


def test_labels_of_a_replaced_file_are_not_pickled(tmp_path: Path) -> None:
    path = tmp_path / "labels.npy"
    np.save(path, PLAIN.numpy().astype(np.int32))
    labels = map_labels(path)
    assert torch.equal(pickle.loads(ForkingPickler.dumps(labels)), PLAIN)
    path.unlink()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"labels.npy was replaced or deleted: .*; clone\(\) them"):
            ForkingPickler.dumps(labels)
        np.save(path, np.zeros(8, np.int32))
    assert torch.equal(labels, PLAIN)
