"""Epochs of a `ClusterBatchSampler` in the loops of host libraries: new orders, no sample lost or repeated."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from mcl_kernels import ClusterBatchSampler
from tests.integrations.hosts import ROOT

N, BATCH_SIZE, EPOCHS = 103, 16, 3  # 7 samples are left out of each epoch
LABELS = torch.arange(N) % 4
SAMPLES = TensorDataset(torch.arange(N))
Epochs = list[list[list[int]]]  # the samples of each batch of each epoch


def sampler(batch_size: int = BATCH_SIZE, **options: Any) -> ClusterBatchSampler:
    return ClusterBatchSampler(LABELS, batch_size, clusters_per_batch=2, **options)


def expected_epochs(epochs: Sequence[int] = range(EPOCHS)) -> Epochs:
    batches, found = sampler(), []
    for epoch in epochs:
        batches.set_epoch(epoch)
        found.append(list(batches))
    return found


def over_two_processes(code: str, directory: Path) -> list[Any]:
    """Returns what `run()`, defined by `code`, returns on each of two processes that torchrun starts."""
    script = directory / "script.py"
    script.write_text(f"""
from tests.integrations.test_batch_sampler import *
{code}
if __name__ == "__main__":
    found = run()
    (Path(sys.argv[1]) / os.environ["RANK"]).write_text(json.dumps(found))
""")
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, directory],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads((directory / f"{rank}").read_text()) for rank in range(2)]


def joined(rank_epochs: Sequence[Epochs]) -> Epochs:
    """Concatenates the parts of each global batch."""
    return [
        [list(itertools.chain(*parts)) for parts in zip(*batches, strict=True)]
        for batches in zip(*rank_epochs, strict=True)
    ]


def prepared(batches: ClusterBatchSampler, processes: int = 1, index: int = 0, **options: Any) -> Any:
    data_loader = pytest.importorskip("accelerate.data_loader")
    loader = DataLoader(SAMPLES, batch_sampler=batches)
    return data_loader.prepare_data_loader(
        loader, num_processes=processes, process_index=index, put_on_device=False, **options
    )


def epochs_of(loader: Any, epochs: int = EPOCHS) -> Epochs:
    return [[batch.tolist() for (batch,) in loader] for _ in range(epochs)]


def test_accelerate_yields_the_epochs_of_the_sampler() -> None:
    assert epochs_of(prepared(sampler())) == expected_epochs()


def test_accelerate_splits_global_batches() -> None:
    rank_epochs = [epochs_of(prepared(sampler(), 2, index, split_batches=True)) for index in range(2)]
    assert {len(batch) for epoch in rank_epochs[0] for batch in epoch} == {BATCH_SIZE // 2}
    assert joined(rank_epochs) == expected_epochs()


def test_accelerate_gives_each_process_different_batches() -> None:
    rank_epochs = [epochs_of(prepared(sampler(), 2, index)) for index in range(2)]
    for first, second, expected in zip(*rank_epochs, expected_epochs(), strict=True):
        assert list(itertools.chain(*zip(first, second, strict=True))) == expected


@pytest.mark.parametrize("split_batches", [False, True])
def test_accelerate_refuses_the_batches_of_one_rank(split_batches: bool) -> None:
    for index in range(2):
        batches = sampler(8, rank=index, world_size=2)
        with pytest.raises(ValueError, match=rf"splits batches among its processes: got rank {index} of 2.*split_bat"):
            prepared(batches, 2, index, split_batches=split_batches)


@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_resumes_in_mid_epoch(processes: int) -> None:
    accelerate = pytest.importorskip("accelerate")
    rank_epochs = []
    for index in range(processes):
        loader = prepared(sampler(), processes, index, split_batches=True)
        loader.set_epoch(1)
        remaining = [batch.tolist() for (batch,) in accelerate.skip_first_batches(loader, 2)]
        loader.set_epoch(2)
        rank_epochs.append([remaining, *epochs_of(loader, 1)])
    second, third = expected_epochs([1, 2])
    assert joined(rank_epochs) == [second[2:], third]


ACCELERATED = """
from accelerate import Accelerator, DataLoaderConfiguration
def run():
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
    loader = accelerator.prepare(DataLoader(SAMPLES, batch_sampler=sampler()))
    return epochs_of(loader)
"""


@pytest.mark.slow
def test_accelerator_in_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    assert joined(over_two_processes(ACCELERATED, tmp_path)) == expected_epochs()


def trained(directory: Path, loader: Any = None, *, resume: Path | None = None, **options: Any) -> Epochs:
    """Batches of each epoch of `Trainer.fit`, which saves a checkpoint after each batch."""
    lightning = pytest.importorskip("lightning")
    epochs: Epochs = [[] for _ in range(EPOCHS)]

    class Model(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(1, 1)

        def train_dataloader(self) -> Any:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
            batches = sampler(BATCH_SIZE // world_size, rank=rank, world_size=world_size)
            return DataLoader(SAMPLES, batch_sampler=batches) if loader is None else loader

        def val_dataloader(self) -> Any:  # called before the first epoch and after each
            return self.train_dataloader() if loader is None else DataLoader(SAMPLES, batch_sampler=sampler())

        def validation_step(self, batch: list[torch.Tensor]) -> None:
            pass

        def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
            epochs[self.current_epoch].append(batch[0].tolist())
            loss: torch.Tensor = self.linear(batch[0][:, None].float()).sum()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 1e-9)

    checkpoint = lightning.pytorch.callbacks.ModelCheckpoint(
        directory / "checkpoints", filename="{step}", save_top_k=-1, every_n_train_steps=1
    )
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=[checkpoint],
        default_root_dir=directory,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(Model(), ckpt_path=resume)
    return epochs


def test_lightning_yields_the_epochs_of_the_sampler(tmp_path: Path) -> None:
    assert trained(tmp_path) == expected_epochs()


def test_lightning_resumes_after_an_epoch(tmp_path: Path) -> None:
    first, second, third = trained(tmp_path)
    checkpoint = tmp_path / "checkpoints" / f"step={len(first) + len(second)}.ckpt"
    assert trained(tmp_path, resume=checkpoint) == [[], [], third]


@pytest.mark.parametrize("workers", [0, 2])
def test_lightning_resumes_in_mid_epoch(tmp_path: Path, workers: int) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> Any:
        return stateful.StatefulDataLoader(SAMPLES, batch_sampler=sampler(), num_workers=workers)

    first, second, third = expected_epochs()
    assert trained(tmp_path, loader()) == [first, second, third]
    for seen in (2, len(second)):  # in mid-epoch, and at its last step
        checkpoint = tmp_path / "checkpoints" / f"step={len(first) + seen}.ckpt"
        assert trained(tmp_path, loader(), resume=checkpoint) == [[], second[seen:], third]


IN_LIGHTNING = """
def run():
    return trained(Path(sys.argv[1]), devices=2, strategy="ddp", use_distributed_sampler=False)
"""
REFUSED_BY_LIGHTNING = """
def run():
    for loader in (None, DataLoader(SAMPLES, batch_sampler=sampler())):
        with pytest.raises((TypeError, ValueError), match="use_distributed_sampler=False"):
            trained(Path(sys.argv[1]), loader, devices=2, strategy="ddp")
"""


@pytest.mark.slow
def test_lightning_in_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    assert joined(over_two_processes(IN_LIGHTNING, tmp_path)) == expected_epochs()


@pytest.mark.slow
def test_lightning_refuses_to_split_the_batches_of_one_rank(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    over_two_processes(REFUSED_BY_LIGHTNING, tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_resumes_at_any_batch(workers: int) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> Any:
        return stateful.StatefulDataLoader(SAMPLES, batch_sampler=sampler(), num_workers=workers)

    expected = list(itertools.chain(*expected_epochs()))
    for seen in (0, 2, len(sampler()), len(sampler()) + 1):
        first, second = loader(), loader()
        drawn = itertools.chain.from_iterable(first for _ in range(EPOCHS))
        for _ in range(seen):
            next(drawn)
        second.load_state_dict(first.state_dict())
        remaining: list[list[int]] = []
        while len(remaining) < len(expected) - seen:
            remaining += [batch.tolist() for (batch,) in second]
        assert remaining == expected[seen:]
