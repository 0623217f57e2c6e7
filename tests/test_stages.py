"""The stage runner: labels, saved states, resuming, memory, and errors of use."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from mcl_kernels import KMeans, MultistageRunner, compose_labels
from tests.stage_runs import N, embeddings, run


@pytest.fixture(params=["memory", "disk"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "run" if request.param == "disk" else None


def test_a_finished_stage_is_shown_on_one_line() -> None:
    runner = MultistageRunner(64, n_stages=1, n_clusters=4)
    for stage in runner:
        finished = stage.finish(torch.randn(64, 8))
    assert repr(finished) == "FinishedStage(index=0, 4 centers of width 8, 4 pseudo labels)"


def test_labels_compose_from_stage_to_stage(directory: Path | None) -> None:
    runner = MultistageRunner(N, n_clusters=4, directory=directory)
    expected = torch.zeros(N, dtype=torch.long)
    for stage in runner:
        assert stage.labels.dtype == torch.int64
        assert torch.equal(stage.labels, expected)
        finished = stage.finish(embeddings(stage.index))
        expected = compose_labels(expected, finished.clusters)
        assert torch.equal(runner.labels, expected)
        assert torch.equal(finished.labels, expected)
    assert len(runner.finished) == 3
    # A label is the position of the tuple of cluster ids of a sample among all tuples, in order.
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


def test_an_unknown_tuple_gets_minus_one() -> None:
    runner = MultistageRunner(6, n_stages=3, n_clusters=2)
    side = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 3)
    for stage in runner:
        if stage.index == 2:
            crossed = stage.assign([side[:2], side.flip(0)[:2]])
            assert crossed is not None
            assert crossed.tolist() == [-1, -1]
        stage.finish(side)


def test_labels_by_key() -> None:
    runner = MultistageRunner(N, n_clusters=4, keys=[f"{i}.png" for i in range(N)])
    for stage in runner:
        assert torch.equal(stage.labels_of(["7.png", "3.png"]), stage.labels[[7, 3]])
        with pytest.raises(ValueError, match=r"keys must be among those given to the runner: got '60.png'"):
            stage.labels_of(["7.png", "60.png"])
        stage.finish(embeddings(stage.index))


def test_batches_of_epochs_and_ranks() -> None:
    for stage in MultistageRunner(N, n_clusters=4, n_stages=2):
        first = list(stage.batch_sampler(8, clusters_per_batch=2, epoch=0))
        assert list(stage.batch_sampler(8, clusters_per_batch=2, epoch=0)) == first
        assert list(stage.batch_sampler(8, clusters_per_batch=2, epoch=1)) != first
        halves = [list(stage.batch_sampler(4, clusters_per_batch=2, rank=r, world_size=2)) for r in (0, 1)]
        assert [a + b for a, b in zip(*halves, strict=True)] == first
        stage.finish(embeddings(stage.index))


@pytest.mark.parametrize("n_stages", [3, 4])
def test_few_negatives_are_warned_of(n_stages: int, directory: Path | None) -> None:
    """1,000 samples without structure have 16 labels, then 240 to 260 of about 4 samples, then 850 to 900."""
    runner = MultistageRunner(1000, n_stages=n_stages, n_clusters=16, directory=directory)
    for stage in runner:
        rows = torch.randn(1000, 32, generator=torch.Generator().manual_seed(stage.index))
        if stage.index == 2 and n_stages == 4:
            message = (
                r"stage 3 will have few negatives: 9\d% of the samples .*9\d% of the 8\d\d labels.*fewer clusters or"
            )
            with pytest.warns(UserWarning, match=message) as warned:
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
        in_small = float((sizes[done.labels] <= 2).double().mean())
        assert done.statistics["samples_in_small_labels"] == pytest.approx(in_small)
        assert (in_small > 0.5) == (done.index > 1)


def test_a_finished_run_is_read_back(tmp_path: Path) -> None:
    written = run(tmp_path)
    read = MultistageRunner(N, n_clusters=4, directory=tmp_path)
    assert list(read) == []
    assert len(read.finished) == 3
    for a, b in zip(written.finished, read.finished, strict=True):
        for name in ("centers", "labels", "tuples", "clusters"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert a.statistics == b.statistics
        assert b.state is not None
        assert int(b.state["stage"]) == a.index
        assert sorted(path.name for path in (tmp_path / f"stage-{a.index}").iterdir()) == [
            "centers.npy",
            "labels.npy",
            "stage.json",
            "state.safetensors",
            "tuples.npy",
        ]
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
        # Names that the header of safetensors reserves or cannot encode, and tensors that it would expand.
        ({"__metadata__": torch.ones(2)}, "state.pt"),
        ({"\ud800": torch.ones(2)}, "state.pt"),
        ({"w": torch.ones(1).expand(1000)}, "state.pt"),
        ({"w": torch.empty(3, device="meta")}, "state.pt"),
    ],
)
def test_the_format_of_a_state(tmp_path: Path, state: dict[str, object] | None, name: str | None) -> None:
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


BIG = torch.randn(1_000_000)


@pytest.mark.parametrize(
    "state",
    [
        {"probe": BIG[:4]},
        {"probe": BIG[:4], "epoch": 3},
        {"probe": BIG[:4], "other": BIG[2:6]},
        {"nested": {"state": [(BIG[::250_000],)], 3: torch.nn.Parameter(BIG[:4])}},
        {"tied": BIG[:4], "to": BIG[:4], "epoch": 3},
    ],
)
def test_a_view_of_a_tensor_is_saved_in_its_own_size(tmp_path: Path, state: dict[str, Any]) -> None:
    runner = MultistageRunner(N, n_clusters=4, n_stages=1, directory=tmp_path)
    loaded = next(iter(runner)).finish(embeddings(), state=state).state
    torch.testing.assert_close(loaded, state)
    (path,) = (tmp_path / "stage-0").glob("state.*")
    assert path.stat().st_size < 4000
    if loaded is not None and "to" in loaded:
        assert loaded["tied"].data_ptr() == loaded["to"].data_ptr()


def test_containers_of_a_state_are_preserved() -> None:
    """Includes the _metadata of a module's state, and a list that contains itself."""
    recursive: list[Any] = [BIG[:4]]
    recursive.append(recursive)
    model = torch.nn.BatchNorm1d(3)
    state = {
        "model": model.state_dict(),
        "shape": BIG.shape,
        "recursive": recursive,
        "part": torch.nn.Parameter(BIG[:4]),
    }
    loaded = next(iter(MultistageRunner(N, n_clusters=4))).finish(embeddings(), state=state).state
    assert loaded is not None
    assert loaded["model"]._metadata == model.state_dict()._metadata  # type: ignore[attr-defined]
    assert loaded["shape"] == BIG.shape
    assert loaded["recursive"][1] is loaded["recursive"]
    assert len(loaded["part"]) == 4


def test_a_view_of_another_saved_tensor_stays_a_view() -> None:
    stage = next(iter(MultistageRunner(N, n_clusters=4)))
    loaded = stage.finish(embeddings(), state={"all": BIG, "first": BIG[:4]}).state
    assert loaded is not None
    assert loaded["all"].data_ptr() == loaded["first"].data_ptr()


def test_a_state_in_memory_is_a_copy() -> None:
    weight = torch.zeros(2)
    for stage in (runner := MultistageRunner(N, n_clusters=4, n_stages=2)):
        stage.finish(embeddings(stage.index), state={"w": weight})
        weight += 1
    states = [done.state for done in runner.finished]
    assert [float(state["w"][0]) for state in states if state] == [0.0, 1.0]


def test_embeddings_and_states_with_a_graph(directory: Path | None) -> None:
    """Calls `finish(model(x), state=...)` without no_grad or detach."""
    model = torch.nn.Linear(8, 4)
    runner = MultistageRunner(N, n_clusters=4, n_stages=1, directory=directory)
    done = next(iter(runner)).finish(model(embeddings()), state={"w": model.weight * 2})
    assert not done.centers.requires_grad
    assert done.state is not None
    assert not done.state["w"].requires_grad


def test_numpy_integers_as_settings(tmp_path: Path) -> None:
    run(tmp_path, n_clusters=np.int64(4), seed=np.int64(0), n_stages=np.int32(1))
    assert len(run(tmp_path, n_stages=1).finished) == 1


@pytest.mark.parametrize("state", [torch.nn.Linear(2, 2), [torch.zeros(2)]])
def test_a_state_must_be_a_mapping(tmp_path: Path, state: object) -> None:
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


class Chunks:
    """Yields rows in parts, as a DataLoader does."""

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


def test_checking_an_iterable_needs_no_further_pass() -> None:
    """Its length is checked in the pass that already looks for NaN and the largest element."""
    x = embeddings()
    passes = 0

    class Counted(Chunks):
        def __iter__(self) -> Iterator[Tensor]:
            nonlocal passes
            passes += 1
            return super().__iter__()

    KMeans(4, metric="cosine").fit(Counted(x))
    fit_passes, passes = passes, 0
    next(iter(MultistageRunner(N, n_clusters=4))).finish(Counted(x))
    assert passes == fit_passes
    with pytest.raises(TypeError, match="embeddings must be iterable more than once: got generator"):
        next(iter(MultistageRunner(N, n_clusters=4))).finish(part for part in x.split(7))


def test_a_run_with_a_directory_holds_no_array_as_long_as_the_data(tmp_path: Path) -> None:
    """Labels are int32 in a mapped file; all other arrays have the size of the clusters."""
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
from mcl_kernels.stages.pseudo_labels import compose_pairs
from mcl_kernels.stages.files import map_written_labels, write_stage

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def finish(run, index, n):
    clusters = torch.arange(n).remainder_(10)
    previous = map_written_labels(run, index - 1, None) if index else torch.zeros(1, dtype=torch.int32).expand(n)
    before = peak()
    labels, pairs = compose_pairs(previous, clusters, torch.int32)
    write_stage(run, index, {"labels": labels, "tuples": pairs}, None, {})
    return peak() - before

for name, n in (("small", 1 << 20), ("large", 1 << 24)):
    Path(name).mkdir()
    print(*(finish(Path(name), index, n) / n for index in range(3)))
"""


@pytest.mark.slow
def test_peak_memory_of_composing_and_saving(tmp_path: Path) -> None:
    """Per sample: an int32 label, and in later stages the mapped label of the earlier stage."""
    result = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=False, timeout=600, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    first, *later = map(float, result.stdout.splitlines()[1].split())
    assert first < 4 + 4
    assert max(later) < 4 + 4 + 4


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
        ({"keys": [Path(str(i)) for i in range(N)]}, r"keys must be strings: got \w*Path at 0; use str\(key\)"),
        ({"keys": [*map(str, range(N - 1)), 59]}, r"keys must be strings: got int at 59; use str\(key\)"),
    ],
)
def test_bad_configurations(options: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        run(None, **options)
