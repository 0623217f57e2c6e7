"""Multistage runs over several ranks, compared with the same run of one process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mcl_kernels import MultistageRunner
from mcl_kernels.stages import files as stage_files
from mcl_kernels.stages import run_directory
from mcl_kernels.stages import runner as stage_runner
from mcl_kernels.stages.stage import Stage
from tests.process_pool import RankPool

ROOT = Path(__file__).parents[1]
N, D = 91, 6


def embeddings_of(stage: Stage) -> torch.Tensor:
    """Embeddings of all samples, which depend on the labels of the stage, so that a wrong label is detected."""
    generator = torch.Generator().manual_seed(int((stage.labels * torch.arange(N)).sum()) + stage.index)
    return torch.randn(N, D, generator=generator)


def run(directory: Path | None, n_stages: int = 2, *, alone: bool = False) -> list[list[Any]]:
    """Runs all stages with the embeddings of the shard of this rank; returns the results of each."""
    group = None if alone else dist.group.WORLD
    runner = MultistageRunner(N, n_stages=n_stages, n_clusters=4, directory=directory, group=group)
    for stage in runner:
        embeddings, here = embeddings_of(stage), stage.shard
        stage.finish(embeddings[here.start : here.stop], state={"index": torch.tensor(stage.index)})
    return [
        [
            done.labels.tolist(),
            done.tuples.tolist(),
            done.centers.tolist(),
            done.statistics["cluster_sizes"],
            done.statistics["label_sizes"],
            done.statistics["iterations"],
            int(done.state["index"]),  # type: ignore[index]
        ]
        for done in runner.finished
    ]


@pytest.mark.parametrize("in_memory", [False, True], ids=["directory", "memory"])
def test_equals_the_run_of_one_process(ranks: RankPool, tmp_path: Path, in_memory: bool) -> None:
    expected = run(None, alone=True)
    for results in ranks.run(run, None if in_memory else tmp_path / "run"):
        assert results == expected
    if not in_memory:
        assert run(tmp_path / "run", alone=True) == expected  # read back


@pytest.mark.slow
def test_resumes_with_another_number_of_ranks(ranks: RankPool, tmp_path: Path) -> None:
    expected = run(None, 3, alone=True)
    run(tmp_path, 1, alone=True)
    ranks.run(run, tmp_path, 2)
    with RankPool(3) as three:
        assert three.run(run, tmp_path, 3) == [expected] * 3
    assert run(tmp_path, 3, alone=True) == expected


def batches_of_epoch(directory: Path) -> list[list[int]]:
    run(directory, 1)
    runner = MultistageRunner(N, n_stages=2, n_clusters=4, directory=directory, group=dist.group.WORLD)
    stage = next(iter(runner))
    assert stage.index == 1
    return list(stage.batch_sampler(4, clusters_per_batch=1, epoch=3))


def test_each_rank_loads_its_part_of_a_batch(ranks: RankPool, tmp_path: Path) -> None:
    rank_batches = ranks.run(batches_of_epoch, tmp_path)
    stage = next(iter(MultistageRunner(N, n_stages=2, n_clusters=4, directory=tmp_path)))
    expected = stage.batch_sampler(4 * ranks.world_size, clusters_per_batch=1, epoch=3)
    assert [list(chain(*parts)) for parts in zip(*rank_batches, strict=True)] == list(expected)


def warnings_of_finish(clusters: torch.Tensor, directory: Path | None) -> list[str]:
    k = int(clusters.max()) + 1
    runner = MultistageRunner(N, n_stages=2, n_clusters=k, directory=directory, group=dist.group.WORLD)
    stage = next(iter(runner))
    rows = torch.eye(k)[clusters]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stage.finish(rows[stage.shard.start : stage.shard.stop])
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("in_memory", [False, True], ids=["directory", "memory"])
def test_few_negatives_are_counted_over_all_ranks(ranks: RankPool, tmp_path: Path, in_memory: bool) -> None:
    """One rank warns, and only if the complete data set, not a shard of it, has one or two samples of a label."""
    threes, pairs = torch.arange(N) % 30, torch.arange(N) // 2
    assert ranks.run(warnings_of_finish, threes, None if in_memory else tmp_path / "threes") == [[]] * ranks.world_size
    first, *others = ranks.run(warnings_of_finish, pairs, None if in_memory else tmp_path / "pairs")
    assert [message[:58] for message in first] == ["stage 1 will have few negatives: 100% of the samples have "]
    assert others == [[]] * (ranks.world_size - 1)


def run_with_slow_writer(directory: Path, seconds: float) -> list[list[Any]]:
    write = stage_files.write_stage

    def slow(*arguments: Any) -> None:
        time.sleep(seconds)
        write(*arguments)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(stage_files, "write_stage", slow)
        return run(directory, 1)


@pytest.mark.slow
def test_waiting_for_the_writer_does_not_time_out(tmp_path: Path) -> None:
    with RankPool(2, timeout=3.0) as pool:
        assert pool.run(run_with_slow_writer, tmp_path, 7.0) == [run(None, 1, alone=True)] * 2


def fail(case: str, directory: Path) -> str:
    """Returns the error on this rank, after all ranks have failed."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    options: dict[str, Any] = {"n_stages": 2, "n_clusters": 4, "directory": directory, "group": dist.group.WORLD}
    if case == "configuration" and rank == last:
        options["n_clusters"] = 5
    if case == "directories" and rank == last:
        options["directory"] = directory / "another"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(run_directory, "VISIBILITY_TIMEOUT", 0.5)
        if case == "full disk" and rank == 0:
            monkeypatch.setattr(stage_files, "write_array", no_space)
        try:
            runner = MultistageRunner(N, **options)
            stage = next(iter(runner))
            embeddings = embeddings_of(stage)[stage.shard.start : stage.shard.stop]
            if case == "rows" and rank == last:
                embeddings = embeddings[1:]
            if case == "not finite" and rank == last:
                embeddings[2, 0] = torch.nan
            state: Any = {"x": object()} if case == "state" else None
            stage.finish(embeddings, state=state)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            message = f"{type(error).__name__}: {error}"
        else:
            message = "none"
    dist.barrier()
    return message


def no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


FAILURES = {
    "configuration": ("last", "ValueError: n_clusters must be alike on every rank of the group: got 4 on rank 0"),
    "rows": ("last", "ValueError: embeddings must have one row per sample: got"),
    "not finite": ("last", "ValueError: embeddings must be finite: got NaN or infinity in row 2"),
    "state": ("first", "TypeError: state must hold tensors"),
    "full disk": ("first", "stage 0 could not be saved (No space left on device)"),
    "directories": ("last", "RuntimeError: directory must be one that all ranks see: this one finds no"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_an_error_of_one_rank_is_raised_on_every_rank(ranks: RankPool, tmp_path: Path, case: str) -> None:
    position, message = FAILURES[case]
    failed_rank = 0 if position == "first" else ranks.world_size - 1
    messages = ranks.run(fail, case, tmp_path)
    assert message in messages[failed_rank]
    for rank, error in enumerate(messages):
        if rank != failed_rank and case != "configuration":
            assert error.startswith(f"OtherRankError: rank {failed_rank} of the group met an error: ")
            assert message in error
    if case not in ("directories",):
        assert not list(tmp_path.glob("stage-*"))
        assert ranks.run(run, tmp_path) == [run(None, alone=True)] * ranks.world_size


def finish_twice(directory: Path) -> list[list[Any]]:
    """Finishes a stage twice: the first time the last rank has another directory."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    hidden = directory / "late" if rank == last else directory
    runner = MultistageRunner(N, n_stages=1, n_clusters=4, directory=hidden, group=dist.group.WORLD)
    stage = next(iter(runner))
    here = embeddings_of(stage)[stage.shard.start : stage.shard.stop]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(run_directory, "VISIBILITY_TIMEOUT", 0.5)
        with pytest.raises((RuntimeError, ValueError), match="directory must be one that all ranks see"):
            stage.finish(here)
    runner.directory = directory
    return [stage.finish(here).labels.tolist()]


def test_a_stage_that_was_invisible_to_a_rank_can_be_finished_again(ranks: RankPool, tmp_path: Path) -> None:
    expected = run(None, 1, alone=True)[0][0]
    assert ranks.run(finish_twice, tmp_path) == [[expected]] * ranks.world_size


def fail_to_begin(case: str, directory: Path) -> str:
    """Returns the error on this rank of a runner that cannot read or write."""
    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as monkeypatch:
        if case == "writable" and rank == 0:
            monkeypatch.setattr(stage_runner, "check_writable", no_space)
        if case == "damaged" and rank == 1:
            monkeypatch.setattr(stage_files, "map_labels", no_space)
        with pytest.raises((OSError, ValueError)) as error:
            next(iter(MultistageRunner(N, n_stages=2, n_clusters=4, directory=directory, group=dist.group.WORLD)))
    dist.barrier()
    return str(error.value)


@pytest.mark.parametrize("case", ["writable", "damaged"])
def test_an_error_before_the_first_stage(ranks: RankPool, tmp_path: Path, case: str) -> None:
    run(tmp_path, 1, alone=True)
    assert all("No space left on device" in message for message in ranks.run(fail_to_begin, case, tmp_path))


def other_progress(directory: Path) -> str:
    own = directory / str(dist.get_rank())
    if dist.get_rank() == 0:
        run(own, 1, alone=True)
    with pytest.raises(ValueError, match="finished stages") as error:
        MultistageRunner(N, n_stages=2, n_clusters=4, directory=own, group=dist.group.WORLD)
    return str(error.value)


def test_different_directories_of_ranks_are_reported(ranks: RankPool, tmp_path: Path) -> None:
    expected = "must be alike on every rank of the group: got 1 on rank 0 and 0 on rank 1"
    assert all(expected in message for message in ranks.run(other_progress, tmp_path))


DYING = """
import os, shutil, sys
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from mcl_kernels import MultistageRunner
from mcl_kernels.stages import run_directory
directory, rank, when = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2, timeout=timedelta(20))
if rank == 1:
    # Called when the first rank has written the stage.
    run_directory._read_when_visible = lambda *_: os._exit(9)
if rank == 0 and when == "killed too":
    rmtree = shutil.rmtree
    shutil.rmtree = lambda *_, **__: os._exit(9)
runner = MultistageRunner(60, n_stages=2, n_clusters=4, directory=directory / "run", group=dist.group.WORLD)
stage = next(iter(runner))
x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
stage.finish(x[stage.shard.start : stage.shard.stop], state={"w": torch.zeros(3)})
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["alone", "killed too"])
def test_a_stage_on_disk_survives_the_death_of_another_rank(tmp_path: Path, when: str) -> None:
    command = [sys.executable, "-c", DYING, str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank), when], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [1, 9], errors
    (done,) = MultistageRunner(60, n_stages=2, n_clusters=4, directory=tmp_path / "run").finished
    assert done.state is not None
    alone = MultistageRunner(60, n_stages=1, n_clusters=4)
    next(iter(alone)).finish(torch.randn(60, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(done.labels, alone.labels)


def interrupt_withdrawal(directory: Path) -> str:
    """Makes the stage invisible to the last rank; the first one then removes no files, as if it were killed."""
    hidden = directory / "late" if dist.get_rank() == dist.get_world_size() - 1 else directory
    runner = MultistageRunner(N, n_stages=1, n_clusters=4, directory=hidden, group=dist.group.WORLD)
    stage = next(iter(runner))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(run_directory, "VISIBILITY_TIMEOUT", 0.5)
        monkeypatch.setattr(stage_files.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises((RuntimeError, ValueError)) as error:
            stage.finish(embeddings_of(stage)[stage.shard.start : stage.shard.stop])
    return str(error.value)


def test_a_stage_is_withdrawn_in_one_step(ranks: RankPool, tmp_path: Path) -> None:
    messages = ranks.run(interrupt_withdrawal, tmp_path)
    assert all("directory must be one that all ranks see" in message for message in messages)
    assert MultistageRunner(N, n_stages=1, n_clusters=4, directory=tmp_path).finished == []


@pytest.mark.slow
def test_two_hosts_under_torchrun(tmp_path: Path) -> None:
    """Two agents at two loopback addresses, with two processes each, train two stages with DDP."""
    port = 29000 + int(hashlib.sha256(str(tmp_path).encode()).hexdigest(), 16) % 2000
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
    torchrun += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    script = ["-m", "tests.torchrun_training", str(tmp_path / "run")]
    hosts = [
        subprocess.Popen(
            [*torchrun, f"--node-rank={node}", f"--local-addr=127.0.0.{node + 1}", *script],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    outputs = [host.communicate(timeout=240)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(outputs)
    digests = {line for output in outputs for line in output.splitlines() if line.startswith("parameters ")}
    assert len(digests) == 1, outputs
    runner = MultistageRunner(256, n_stages=2, n_clusters=4, directory=tmp_path / "run")
    assert len(runner.finished) == 2
