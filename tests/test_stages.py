"""The stage runner: labels, resuming, damage, full and read-only disks."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from mcl_kernels import KMeans, MultistageRunner, compose_labels, stage_files

N = 60


def embeddings(seed: int = 0, n: int = N) -> Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


def run(directory: Path | None = None, **options: object) -> MultistageRunner:
    runner = MultistageRunner(N, **{"n_clusters": 4, "directory": directory, **options})  # type: ignore[arg-type]
    for stage in runner:
        stage.finish(embeddings(stage.index), state={"stage": torch.tensor(stage.index)})
    return runner


@pytest.fixture(params=["memory", "disk"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "run" if request.param == "disk" else None


def test_labels_compose_from_stage_to_stage(directory: Path | None) -> None:
    runner = MultistageRunner(N, n_clusters=4, directory=directory)
    expected = torch.zeros(N, dtype=torch.long)
    for stage in runner:
        assert stage.labels.dtype == torch.int64
        assert torch.equal(stage.labels, expected)
        done = stage.finish(embeddings(stage.index))
        expected = compose_labels(expected, done.clusters)
        assert torch.equal(runner.labels, expected)
        assert torch.equal(done.labels, expected)
    assert len(runner.finished) == 3
    # The tuple of every sample, whatever the stage; the label is its rank among all tuples.
    clusters = torch.stack([done.clusters for done in runner.finished], dim=1)
    assert torch.equal(runner.finished[-1].tuples[runner.labels], clusters)
    tuples = runner.finished[-1].tuples.tolist()
    assert tuples == sorted(tuples)
    assert sum(runner.finished[-1].statistics["label_sizes"]) == N


def test_assign_equals_the_stored_labels(directory: Path | None) -> None:
    runner = MultistageRunner(N, n_clusters=4, directory=directory)
    for stage in runner:
        earlier = [embeddings(index) for index in range(stage.index)]
        if stage.index == 0:
            assert stage.assign(earlier) is None
        else:
            for rows in (torch.arange(N), torch.tensor([5, 3, 3]), torch.arange(0)):
                got = stage.assign([previous[rows] for previous in earlier])
                assert got is not None
                assert torch.equal(got, stage.labels[rows])
        stage.finish(embeddings(stage.index))


def test_a_tuple_never_seen_gets_minus_one() -> None:
    runner = MultistageRunner(6, n_stages=3, n_clusters=2)
    side = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 3)
    for stage in runner:
        if stage.index == 2:
            crossed = stage.assign([side[:2], side.flip(0)[:2]])
            assert crossed is not None
            assert crossed.tolist() == [-1, -1]
        stage.finish(side)


def test_keys() -> None:
    runner = MultistageRunner(N, n_clusters=4, keys=[f"{i}.png" for i in range(N)])
    for stage in runner:
        assert torch.equal(stage.labels_of(["7.png", "3.png"]), stage.labels[[7, 3]])
        with pytest.raises(ValueError, match=r"keys must be among those given to the runner: got '60.png'"):
            stage.labels_of(["7.png", "60.png"])
        stage.finish(embeddings(stage.index))


def test_batch_sampler() -> None:
    for stage in MultistageRunner(N, n_clusters=4, n_stages=2):
        first = list(stage.batch_sampler(8, clusters_per_batch=2, epoch=0))
        assert list(stage.batch_sampler(8, clusters_per_batch=2, epoch=0)) == first
        assert list(stage.batch_sampler(8, clusters_per_batch=2, epoch=1)) != first
        halves = [list(stage.batch_sampler(4, clusters_per_batch=2, rank=r, world_size=2)) for r in (0, 1)]
        assert [a + b for a, b in zip(*halves, strict=True)] == first
        stage.finish(embeddings(stage.index))


@pytest.mark.parametrize("n_stages", [3, 4])
def test_stages_that_starve_are_said_so(n_stages: int, directory: Path | None) -> None:
    """1,000 samples without structure: 16 labels, then 240 to 260 of about 4 samples, then 850 to 900."""
    runner = MultistageRunner(1000, n_stages=n_stages, n_clusters=16, directory=directory)
    for stage in runner:
        rows = torch.randn(1000, 32, generator=torch.Generator().manual_seed(stage.index))
        if stage.index == 2 and n_stages == 4:
            said = r"stage 3 will have few negatives: 9\d% of the samples .*9\d% of the 8\d\d labels.*fewer clusters or"
            with pytest.warns(UserWarning, match=said) as warned:
                stage.finish(rows)
            assert [warning.filename for warning in warned] == [__file__]
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                stage.finish(rows)  # no stage follows the third of three
    read_back = MultistageRunner(1000, n_stages=n_stages, n_clusters=16, directory=directory)
    for done in (*runner.finished, *read_back.finished):
        sizes = done.labels.bincount()
        assert done.statistics["small_labels"] == pytest.approx(float((sizes <= 2).double().mean()))
        held = (sizes[done.labels] <= 2).double().mean()
        assert done.statistics["samples_in_small_labels"] == pytest.approx(float(held))
        assert (float(held) > 0.5) == (done.index > 1)


def test_a_finished_run_is_read_back(tmp_path: Path) -> None:
    here = run(tmp_path)
    there = MultistageRunner(N, n_clusters=4, directory=tmp_path)
    assert list(there) == []
    assert len(there.finished) == 3
    for a, b in zip(here.finished, there.finished, strict=True):
        for name in ("centers", "labels", "tuples", "clusters"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert a.statistics == b.statistics
        assert b.state is not None
        assert int(b.state["stage"]) == a.index
        assert sorted(path.name for path in (tmp_path / f"stage-{a.index}").iterdir()) == [
            "centers.npy", "labels.npy", "stage.json", "state.safetensors", "tuples.npy",
        ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stage-0", "stage-1", "stage-2"]


@pytest.mark.filterwarnings("ignore:stage 3 will have few negatives")
def test_more_stages_continue_a_finished_run(tmp_path: Path) -> None:
    run(tmp_path, n_stages=2)
    assert [stage.index for stage in MultistageRunner(N, n_stages=2, n_clusters=4, directory=tmp_path)] == []
    assert len(run(tmp_path, n_stages=4).finished) == 4
    assert torch.equal(run(tmp_path, n_stages=4).labels, run(None, n_stages=4).labels)


@pytest.mark.parametrize(
    ("state", "name"),
    [
        ({"w": torch.randn(3, 2).T, "n": torch.tensor(3)}, "state.safetensors"),
        ({"w": torch.randn(3), "epoch": 7, "betas": (0.9, 0.99)}, "state.pt"),
        ({"w": torch.randn(3, dtype=torch.complex64)}, "state.pt"),
        ({3: torch.randn(3)}, "state.pt"),
        ({"w": torch.eye(3).to_sparse()}, "state.pt"),
        ({}, "state.safetensors"),
        (None, None),
    ],
)
def test_states(tmp_path: Path, state: dict[str, object] | None, name: str | None) -> None:
    runner = MultistageRunner(N, n_clusters=4, n_stages=1, directory=tmp_path)
    next(iter(runner)).finish(embeddings(), state=state)
    assert [path.name for path in (tmp_path / "stage-0").glob("state.*")] == ([name] if name else [])
    for finished in (runner.finished[0], MultistageRunner(N, n_clusters=4, n_stages=1, directory=tmp_path).finished[0]):
        torch.testing.assert_close(finished.state, state)


def test_tied_weights_survive(tmp_path: Path) -> None:
    weight = torch.randn(3)
    runner = MultistageRunner(N, n_clusters=4, n_stages=1, directory=tmp_path)
    next(iter(runner)).finish(embeddings(), state={"a": weight, "b": weight})
    loaded = runner.finished[0].state
    assert loaded is not None
    assert torch.equal(loaded["a"], weight)
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()


def test_a_state_in_memory_does_not_follow_further_training() -> None:
    weight = torch.zeros(2)
    for stage in (runner := MultistageRunner(N, n_clusters=4, n_stages=2)):
        stage.finish(embeddings(stage.index), state={"w": weight})
        weight += 1
    states = [done.state for done in runner.finished]
    assert [float(state["w"][0]) for state in states if state] == [0.0, 1.0]


def test_embeddings_and_states_with_a_graph(directory: Path | None) -> None:
    """`finish(model(x), state=...)` without no_grad and without detach."""
    model = torch.nn.Linear(8, 4)
    runner = MultistageRunner(N, n_clusters=4, n_stages=1, directory=directory)
    done = next(iter(runner)).finish(model(embeddings()), state={"w": model.weight * 2})
    assert not done.centers.requires_grad
    assert done.state is not None
    assert not done.state["w"].requires_grad


def test_numbers_of_numpy(tmp_path: Path) -> None:
    run(tmp_path, n_clusters=np.int64(4), seed=np.int64(0), n_stages=np.int32(1))
    assert len(run(tmp_path, n_stages=1).finished) == 1


@pytest.mark.parametrize("state", [torch.nn.Linear(2, 2), [torch.zeros(2)]])
def test_a_state_is_a_mapping(tmp_path: Path, state: object) -> None:
    with pytest.raises(TypeError, match=r"state must be a mapping such as model.state_dict\(\): got"):
        next(iter(MultistageRunner(N, n_clusters=4, directory=tmp_path))).finish(embeddings(), state=state)  # type: ignore[arg-type]


def test_assign_under_autocast_equals_the_stored_labels() -> None:
    x = embeddings(n=4000)
    runner = MultistageRunner(4000, n_clusters=16, n_stages=2)
    next(iter(runner)).finish(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assigned = next(iter(runner)).assign([x])
        again = MultistageRunner(4000, n_clusters=16, n_stages=2)
        next(iter(again)).finish(x)
    assert assigned is not None
    assert torch.equal(assigned, runner.labels)
    assert torch.equal(again.labels, runner.labels)


class Unsafe:
    pass


def test_a_state_that_needs_unpickling_is_refused(tmp_path: Path) -> None:
    runner = MultistageRunner(N, n_clusters=4, n_stages=1, directory=tmp_path)
    stage = next(iter(runner))
    with pytest.raises(TypeError, match="state must hold tensors, numbers"):
        stage.finish(embeddings(), state={"callback": Unsafe()})
    assert list(tmp_path.iterdir()) == []
    stage.finish(embeddings(), state={"w": torch.zeros(1)})


# --- size -------------------------------------------------------------------------------------------------------


class Chunks:
    """Rows that come in parts, as from a DataLoader."""

    def __init__(self, x: Tensor, size: int = 7) -> None:
        self.x, self.size = x, size

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.x.split(self.size))


def as_map(x: Tensor, path: Path) -> np.ndarray[Any, Any]:
    np.save(path, x.numpy())
    mapped: np.ndarray[Any, Any] = np.load(path, mmap_mode="r")
    return mapped


@pytest.mark.parametrize("form", ["array", "map", "chunks", "loader"])
def test_embeddings_in_any_form_give_the_same_stages(tmp_path: Path, form: str) -> None:
    forms: dict[str, Callable[[Tensor], Any]] = {
        "array": lambda x: x.numpy(),
        "map": lambda x: as_map(x, tmp_path / "x.npy"),
        "chunks": Chunks,
        "loader": lambda x: DataLoader(TensorDataset(x), batch_size=13),
    }
    runner = MultistageRunner(N, n_clusters=4)
    for stage in runner:
        stage.finish(forms[form](embeddings(stage.index)))
    assert torch.equal(runner.labels, run().labels)
    stage = next(iter(MultistageRunner(N, n_clusters=4)))
    with pytest.raises(ValueError, match="embeddings must have one row per sample: got 59 rows for 60 samples"):
        stage.finish(forms[form](embeddings(n=59)))


def test_an_iterable_is_surveyed_once() -> None:
    """Its length is checked before the clustering, in the pass that looks for NaN and the largest entry anyway."""
    x = embeddings()
    passes = 0

    class Counted(Chunks):
        def __iter__(self) -> Iterator[Tensor]:
            nonlocal passes
            passes += 1
            return super().__iter__()

    KMeans(4, metric="cosine").fit(Counted(x))
    of_fit, passes = passes, 0
    next(iter(MultistageRunner(N, n_clusters=4))).finish(Counted(x))
    assert passes == of_fit
    with pytest.raises(TypeError, match="embeddings must be iterable again and again: got generator"):
        next(iter(MultistageRunner(N, n_clusters=4))).finish(part for part in x.split(7))


def test_a_run_with_a_directory_keeps_nothing_of_the_length_of_the_data(tmp_path: Path) -> None:
    """Labels are int32 in their file, which is mapped; all else that is kept has the size of the clusters."""
    for runner in (run(tmp_path), MultistageRunner(N, n_clusters=4, directory=tmp_path)):
        for done in runner.finished:
            path = tmp_path / f"stage-{done.index}" / "labels.npy"
            assert np.load(path).dtype == np.int32
            assert path.stat().st_size == 128 + 4 * N
            assert str(path) in Path("/proc/self/maps").read_text()
            assert done.labels.stored.dtype == torch.int32
            assert (len(done.centers), done.tuples.shape[1]) == (4, done.index + 1)
            assert done.labels.dtype == done.clusters.dtype == torch.int64
            assert torch.equal(done.clusters, done.tuples[done.labels, -1])


PEAK = """
import resource, sys
from pathlib import Path
import torch
from mcl_kernels.pseudo_labels import compose_pairs
from mcl_kernels.stage_files import read_labels, write_stage

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def finish(run, index, n):
    clusters = torch.arange(n).remainder_(10)
    previous = read_labels(run, index - 1) if index else torch.zeros(1, dtype=torch.int32).expand(n)
    before = peak()
    labels, pairs = compose_pairs(previous, clusters, torch.int32)
    write_stage(run, index, {"labels": labels, "tuples": pairs}, None, {})
    return peak() - before

for name, n in (("small", 1 << 20), ("large", 1 << 24)):
    Path(name).mkdir()
    print(*(finish(Path(name), index, n) / n for index in range(3)))
"""


def test_peak_memory_of_composing_and_saving(tmp_path: Path) -> None:
    """For each sample the int32 of its label, and in later stages the page of the earlier one that is read."""
    result = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=False, timeout=600, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    first, *later = map(float, result.stdout.splitlines()[1].split())
    assert first < 4 + 4
    assert max(later) < 4 + 4 + 4


@pytest.mark.filterwarnings("ignore:stage 3 will have few negatives")
def test_labels_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """They were int64 in their file."""
    expected = run(tmp_path).labels.clone()
    for index in range(3):
        path = tmp_path / f"stage-{index}" / "labels.npy"
        buffer = io.BytesIO()
        np.save(buffer, np.load(path).astype(np.int64))
        replace_in_stage(path.parent, path.name, buffer.getvalue())
    runner = MultistageRunner(N, n_clusters=4, directory=tmp_path, n_stages=4)
    assert torch.equal(runner.labels, expected)
    for stage in runner:
        assert stage.labels[[3, 1]].tolist() == expected[[3, 1]].tolist()
        stage.finish(embeddings(3))
    assert torch.equal(runner.labels, run(n_stages=4).labels)


# --- durability -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_every_write(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.killed_run", str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=600, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    # Per stage at least: the probe, the directory, five files opened and synced, two directories, the rename.
    assert int(result.stdout) >= 2 * 15


def damage(path: Path) -> Iterator[bytes]:
    """The content with one bit of the first, the middle and the last byte turned."""
    content = path.read_bytes()
    for position in (0, len(content) // 2, len(content) - 1):
        yield content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


@pytest.mark.parametrize("name", ["centers.npy", "labels.npy", "tuples.npy", "state.safetensors", "stage.json"])
def test_a_flipped_bit_is_refused_by_name(tmp_path: Path, name: str) -> None:
    run(tmp_path)
    path = tmp_path / "stage-1" / name
    for content in damage(path):
        path.write_bytes(content)
        with pytest.raises(RuntimeError, match=f"stage-1/{name} is damaged"):
            MultistageRunner(N, n_clusters=4, directory=tmp_path)


@pytest.mark.parametrize("name", ["centers.npy", "labels.npy", "tuples.npy", "state.safetensors", "stage.json"])
def test_a_missing_or_truncated_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    run(tmp_path)
    path = tmp_path / "stage-1" / name
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(RuntimeError, match=f"stage-1/{name} is damaged"):
        MultistageRunner(N, n_clusters=4, directory=tmp_path)
    path.unlink()
    with pytest.raises(RuntimeError, match=f"stage-1/{name} is damaged: the file is missing"):
        MultistageRunner(N, n_clusters=4, directory=tmp_path)


def test_a_state_is_checked_again_when_it_is_read(tmp_path: Path) -> None:
    finished = run(tmp_path).finished[1]
    path = tmp_path / "stage-1" / "state.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RuntimeError, match=r"stage-1/state.safetensors is damaged"):
        _ = finished.state
    path.unlink()
    with pytest.raises(RuntimeError, match=r"stage-1/state.safetensors is damaged: the file is missing"):
        _ = finished.state


def test_fewer_stages_and_other_names_beside(tmp_path: Path) -> None:
    """A copy that somebody keeps, and opening a longer run with fewer stages, are no gap."""
    expected = run(tmp_path)
    shutil.copytree(tmp_path / "stage-0", tmp_path / "stage-0.bak")
    assert len(MultistageRunner(N, n_clusters=4, directory=tmp_path).finished) == 3
    short = MultistageRunner(N, n_clusters=4, n_stages=1, directory=tmp_path)
    assert list(short) == []
    assert torch.equal(short.labels, expected.finished[0].labels)


def test_files_are_synced_before_the_rename_and_directories_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append("rename"), rename(self, to)))
    run(tmp_path, n_stages=1)
    events = [
        event for event in events if event.startswith(str(tmp_path) + "/.stage") or event in ("rename", str(tmp_path))
    ]
    names = [Path(event).name for event in events]
    assert set(names[:5]) == {"centers.npy", "labels.npy", "tuples.npy", "state.safetensors", "stage.json"}
    assert names[5].startswith(".stage-0.")
    assert events[6:] == ["rename", str(tmp_path)]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".stage-0.0123"
    left.mkdir(parents=True)
    (left / "labels.npy").write_bytes(b"half")
    run(tmp_path, n_stages=1)
    assert [path.name for path in tmp_path.iterdir()] == ["stage-0"]


@pytest.mark.slow
def test_processes_that_finish_the_same_stage_at_once(tmp_path: Path) -> None:
    """One of them saves it, the others are told so, and what is saved is whole."""
    code = (
        "import sys, time, torch; from mcl_kernels import MultistageRunner; torch.set_num_threads(1)\n"
        f"stage = next(iter(MultistageRunner({N}, n_clusters=4, n_stages=1, directory={str(tmp_path)!r})))\n"
        f"time.sleep(max(0.0, float(sys.argv[1]) - time.time()))\n"
        f"try: stage.finish(torch.randn({N}, 8), state={{'w': torch.zeros(100_000)}}); print('saved')\n"
        "except FileExistsError: print('late')\n"
    )
    at = str(time.time() + 15)
    children = [subprocess.Popen([sys.executable, "-c", code, at], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = sorted(child.communicate(timeout=120)[0].strip() for child in children)
    assert said == ["late", "late", "saved"]
    assert len(MultistageRunner(N, n_clusters=4, n_stages=1, directory=tmp_path).finished) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["stage-0"]


def test_a_damaged_stage_can_be_run_again(tmp_path: Path) -> None:
    expected = run(tmp_path).labels
    for index in (1, 2):
        shutil.rmtree(tmp_path / f"stage-{index}")
    assert torch.equal(run(tmp_path).labels, expected)


def test_a_gap_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    shutil.rmtree(tmp_path / "stage-1")
    with pytest.raises(RuntimeError, match="stage-1 is missing, and stage-2 builds on it"):
        MultistageRunner(N, n_clusters=4, directory=tmp_path)


def test_the_checksum_of_the_description_is_no_decoration(tmp_path: Path) -> None:
    """An edit that keeps the JSON well formed is found too."""
    run(tmp_path)
    path = tmp_path / "stage-0" / "stage.json"
    description = json.loads(path.read_text())
    description["configuration"]["seed"] = 1
    path.write_text(json.dumps(description, indent=2))
    with pytest.raises(RuntimeError, match=r"stage.json is damaged"):
        MultistageRunner(N, n_clusters=4, seed=1, directory=tmp_path)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"n_clusters": 5}, "n_clusters is 4 there and 5 here"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"metric": "euclidean"}, "metric is 'cosine' there and 'euclidean' here"),
        ({"keys": [str(i) for i in range(N)]}, "keys is None there and '"),
    ],
)
def test_another_configuration_is_refused(tmp_path: Path, options: dict[str, object], difference: str) -> None:
    run(tmp_path, n_stages=1)
    with pytest.raises(ValueError, match=difference):
        run(tmp_path, **options)
    with pytest.raises(ValueError, match="n_samples is 60 there and 61 here"):
        MultistageRunner(N + 1, n_clusters=4, directory=tmp_path)


def limited_file_size(size: int) -> Callable[[], None]:
    """For a child process: writing beyond `size` bytes fails in the kernel, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_leaves_the_earlier_stages_intact(tmp_path: Path) -> None:
    run(tmp_path, n_stages=1)
    code = (
        "import sys, torch; from mcl_kernels import MultistageRunner\n"
        f"runner = MultistageRunner({N}, n_clusters=4, n_stages=2, directory={str(tmp_path)!r})\n"
        f"stage = next(iter(runner)); assert stage.index == 1\n"
        f"try: stage.finish(torch.randn({N}, 8), state={{'w': torch.zeros(100_000)}})\n"
        "except OSError as error: print(error)\n"
        "assert len(runner.finished) == 1\n"
        f"stage.finish(torch.randn({N}, 8), state={{'w': torch.zeros(1)}})\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, preexec_fn=limited_file_size(50_000)
    )
    assert result.returncode == 0, result.stderr
    assert "stage 1 could not be saved (File too large); earlier stages are intact" in result.stdout
    assert [done.index for done in MultistageRunner(N, n_clusters=4, directory=tmp_path).finished] == [0, 1]


@pytest.mark.parametrize("call", ["mkdir", "rename", "open"])
def test_any_failing_write_leaves_the_run_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    runner = run(tmp_path, n_stages=1)
    runner.n_stages = 2
    stage = next(iter(runner))

    def fail(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, call, fail)
        with pytest.raises(OSError, match="No space left on device"):
            stage.finish(embeddings(1))
    assert [path.name for path in tmp_path.iterdir()] == ["stage-0"]
    stage.finish(embeddings(1))
    assert torch.equal(runner.labels, run(None, n_stages=2).labels)


def test_a_directory_that_cannot_be_written_is_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    runner = MultistageRunner(N, n_clusters=4, directory=tmp_path / "file" / "run")
    with pytest.raises(OSError, match="directory cannot be written"):
        next(iter(runner))


def test_a_finished_run_needs_no_writable_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert list(MultistageRunner(N, n_clusters=4, directory=tmp_path)) == []


def test_two_processes_cannot_finish_the_same_stage(tmp_path: Path) -> None:
    first, second = (MultistageRunner(N, n_clusters=4, directory=tmp_path) for _ in range(2))
    late = next(iter(second))
    next(iter(first)).finish(embeddings())
    with pytest.raises(FileExistsError, match="another process finished this stage"):
        late.finish(embeddings())


# --- misuse ---------------------------------------------------------------------------------------------------


def test_an_unfinished_stage_is_named() -> None:
    runner = MultistageRunner(N, n_clusters=4)
    with pytest.raises(RuntimeError, match=r"stage 0 is not finished: call stage.finish\(embeddings\)"):
        for _ in runner:
            pass


def test_finishing_twice_is_refused() -> None:
    stage = next(iter(MultistageRunner(N, n_clusters=4)))
    stage.finish(embeddings())
    with pytest.raises(RuntimeError, match="stage 0 is finished already"):
        stage.finish(embeddings())


def test_bad_embeddings() -> None:
    runner = MultistageRunner(N, n_clusters=4)
    stage = next(iter(runner))
    with pytest.raises(ValueError, match="embeddings must have one row per sample: got 59 rows for 60 samples"):
        stage.finish(embeddings(n=59))
    poisoned = embeddings()
    poisoned[17, 2] = torch.nan
    with pytest.raises(ValueError, match="embeddings must be finite: got NaN or infinity in row 17"):
        stage.finish(poisoned)
    with pytest.raises(ValueError, match="one tensor per earlier stage: got 1 in stage 0"):
        stage.assign([embeddings()])
    assert runner.finished == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_clusters": 61}, "n_clusters must be at most n_samples = 60: got 61"),
        ({"n_stages": 0}, "n_stages must be at least 1: got 0"),
        ({"metric": "manhattan"}, "metric must be one of 'euclidean', 'cosine': got 'manhattan'"),
        ({"keys": ["a"]}, "keys must have one entry per sample: got 1 keys for 60 samples"),
        ({"keys": ["a"] * N}, "keys must be distinct: 'a' is at 0 and 1"),
    ],
)
def test_bad_configurations(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(None, **options)


def replace_in_stage(directory: Path, name: str, content: bytes) -> None:
    """With a matching checksum."""
    (directory / name).write_bytes(content)
    description = stage_files._read_description(directory / "stage.json")
    description["files"][name] = stage_files._sha256(content)
    (directory / "stage.json").write_bytes(stage_files._description_bytes(description))


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [("tuples.npy", b"'<i8'", "allow_pickle=False"), ("labels.npy", b"'<i4'", "Python objects in dtype")],
)
def test_nothing_is_unpickled(tmp_path: Path, name: str, dtype: bytes, message: str) -> None:
    """A stage whose arrays are pickles is refused even with a matching checksum."""
    run(tmp_path, n_stages=1)
    content = (tmp_path / "stage-0" / name).read_bytes()
    assert dtype in content
    replace_in_stage(tmp_path / "stage-0", name, content.replace(dtype, b"'|O' "))
    with pytest.raises(ValueError, match=message):
        MultistageRunner(N, n_clusters=4, directory=tmp_path)
