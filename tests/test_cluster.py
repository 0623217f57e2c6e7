"""Results of `mcl-kernels cluster` and `mcl-kernels assign`, from files of features to files of labels."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mcl_kernels import KMeans, MultistageRunner, compose_labels
from mcl_kernels._durable import sha256_of
from mcl_kernels.cli.input_files import open_features
from mcl_kernels.cli.main import main
from mcl_kernels.kmeans.rows import FileRows
from tests.command_files import D, N, cluster, features, save_features


@pytest.fixture(autouse=True)
def _change_to_directory_of_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_features()


def read(path: str) -> Tensor:
    if path.endswith(".pt"):
        loaded: Tensor = torch.load(path, weights_only=True)
        return loaded
    return torch.from_numpy(np.load(path))


# Writer of each kind of file, its path, and the option that selects the tensor.
FILES: dict[str, tuple[Callable[[Tensor], object], str, list[str]]] = {
    "npy": (lambda x: np.save("x.npy", x.numpy()), "x.npy", []),
    "npy fp16": (lambda x: np.save("x.npy", x.half().numpy()), "x.npy", []),
    "npy fp64": (lambda x: np.save("x.npy", x.double().numpy()), "x.npy", []),
    "pt": (lambda x: torch.save(x, "x.pt"), "x.pt", []),
    "pt bf16": (lambda x: torch.save(x.bfloat16(), "x.pt"), "x.pt", []),
    "pt of several": (lambda x: torch.save({"text": -x, "image": x}, "x.pt"), "x.pt", ["--tensor", "image"]),
    "safetensors": (lambda x: save_file({"a": x}, "x.safetensors"), "x.safetensors", []),
    "safetensors bf16": (lambda x: save_file({"a": x.bfloat16()}, "x.safetensors"), "x.safetensors", []),
    "safetensors of several": (
        lambda x: save_file({"n": torch.arange(3), "image": x, "text": -x}, "x.safetensors"),
        "x.safetensors",
        ["--tensor", "image"],
    ),
}


@pytest.mark.parametrize(("save", "path", "options"), FILES.values(), ids=FILES)
@pytest.mark.parametrize(("out", "dtype"), [("y.npy", torch.int32), ("y.pt", torch.int64)])
def test_labels_and_summary_of_each_kind_of_file(
    save: Callable[[Tensor], object], path: str, options: list[str], out: str, dtype: torch.dtype
) -> None:
    x = features()
    save(x)
    assert cluster(path, "--clusters", 5, "--out", out, *options) == 0
    summary = json.loads(Path(f"{out}.json").read_text())
    expected = KMeans(5, metric="cosine").fit(x.to(getattr(torch, summary["dtype"])))
    assert read(out).dtype == dtype
    assert torch.equal(read(out).long(), expected.labels_)
    assert (summary["rows"], summary["features"], summary["clusters"]) == (N, D, 5)
    assert summary["inertia"] == expected.inertia_
    assert summary["cluster_sizes"] == expected.labels_.bincount().tolist()
    assert summary["sha256"] == sha256_of(Path(out))


@pytest.mark.parametrize("path", ["f0.npy", "x.safetensors"])
def test_a_file_is_read_in_chunks(path: str) -> None:
    save_file({"a": features()}, "x.safetensors")
    rows = open_features(Path(path), None)
    assert isinstance(rows, FileRows)
    assert torch.equal(rows.load(), features())


def test_options_reach_the_clustering() -> None:
    options = {"metric": "euclidean", "seed": 3, "n_init": 2, "max_iter": 4, "tol": 0.1, "batch_size": 64}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert cluster("f0.npy", "--clusters", 4, "--out", "y.npy", *flags, "--impl", "reference") == 0
    expected = KMeans(4, impl="reference", **options).fit(features())  # type: ignore[arg-type]
    assert torch.equal(read("y.npy").long(), expected.labels_)
    written = json.loads(Path("y.npy.json").read_text())["options"]
    assert {name: written[name] for name in options} == options


@pytest.mark.parametrize("suffix", ["npy", "pt"])
def test_stages_accumulate(suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels equal the runner's, from pseudo labels of the last stage or from cluster ids of each stage."""
    runner = MultistageRunner(N, n_clusters=4)
    for stage in runner:
        stage.finish(features(stage.index))
        clusters = runner.finished[-1].clusters
        np.save(f"c{stage.index}.npy", clusters.int().numpy())
        torch.save(clusters, f"c{stage.index}.pt")
        label_files = [f"y{stage.index - 1}.{suffix}"] if stage.index else []
        cluster_files = [f"c{index}.{suffix}" for index in range(stage.index)]
        for out, previous in ((f"y{stage.index}.{suffix}", label_files), (f"z.{suffix}", cluster_files)):
            arguments = ["--previous", *previous] if previous else []
            command = (f"f{stage.index}.npy", "--clusters", 4, "--seed", stage.index, "--out", out, *arguments)
            assert cluster(*command) == 0
            assert torch.equal(read(out).long(), runner.labels)
        assert capsys.readouterr().out.count("AMI with") == len(label_files) + len(cluster_files)
    # The formula of the paper's code, applied to every stage.
    first, second, third = (finished.clusters for finished in runner.finished)
    dense = torch.unique((first * 4 + second) * 4 + third, return_inverse=True)[1]
    assert torch.equal(read(f"z.{suffix}").long(), dense)
    assert json.loads(Path(f"z.{suffix}.json").read_text())["labels"] == len(dense.unique())


def test_few_negatives_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    np.save("pairs.npy", np.arange(N) // 2)
    for previous, small in ("pairs.npy", True), ("y.npy", False):
        np.save("y.npy", np.arange(N) // (N // 4))
        assert cluster("f0.npy", "--clusters", 4, "--previous", previous, "--out", "z.npy") == 0
        assert ("few negatives: 100% of the samples" in capsys.readouterr().out) == small
        assert json.loads(Path("z.npy.json").read_text())["samples_in_small_labels"] == small


def test_samples_without_a_label_stay_unlabelled(capsys: pytest.CaptureFixture[str]) -> None:
    previous = torch.arange(N) % 3 - 1
    torch.save(previous.int(), "p.pt")
    assert cluster("f0.npy", "--clusters", 4, "--previous", "p.pt", "--out", "y.npy") == 0
    assert torch.equal(
        read("y.npy").long(), compose_labels(previous, KMeans(4, metric="cosine").fit(features()).labels_)
    )
    assert "100 rows without one" in capsys.readouterr().out
    assert json.loads(Path("y.npy.json").read_text())["unlabelled"] == 100
    torch.save(torch.full((N,), -1), "p.pt")
    assert cluster("f0.npy", "--clusters", 4, "--previous", "p.pt", "--out", "y.npy") == 0
    assert (read("y.npy") == -1).all()


def test_ami(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    assert cluster("f0.npy", "--clusters", 4, "--out", "y.npy") == 0
    torch.save(torch.arange(N) % 5, "p.pt")
    command = ("f0.npy", "--clusters", 3, "--previous", "y.npy", "p.pt", "--out", "z.npy")
    assert cluster(*command) == 0
    ami = json.loads(Path("z.npy.json").read_text())["ami"]
    clusters = KMeans(3, metric="cosine").fit(features()).labels_
    assert ami["y.npy"] == pytest.approx(metrics.adjusted_mutual_info_score(read("y.npy"), clusters))
    assert ami["p.pt"] == pytest.approx(metrics.adjusted_mutual_info_score(torch.arange(N) % 5, clusters))
    assert f"AMI with y.npy: {ami['y.npy']:.3f}\n" in capsys.readouterr().out

    monkeypatch.setattr("mcl_kernels.cli.cluster.MAX_AMI_ROWS", 200)
    assert cluster(*command) == 0
    assert "(of 200 rows drawn at random)" in capsys.readouterr().out
    assert json.loads(Path("z.npy.json").read_text())["ami"]["y.npy"] == pytest.approx(ami["y.npy"], abs=0.15)


@pytest.mark.parametrize("error", [ImportError("numpy.core.multiarray failed to import"), ValueError("incompatible")])
def test_labels_are_written_if_scikit_learn_fails(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("mcl_kernels.cli.cluster._ami", fail)
    torch.save(torch.arange(N) % 5, "p.pt")
    assert cluster("f0.npy", "--clusters", 3, "--previous", "p.pt", "--out", "y.npy") == 0
    assert f"AMI is not computed: {type(error).__name__}: {error}" in capsys.readouterr().out
    assert len(read("y.npy")) == N


def test_without_scikit_learn_labels_are_written_without_ami(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    torch.save(torch.arange(N) % 5, "p.pt")
    assert cluster("f0.npy", "--clusters", 3, "--previous", "p.pt", "--out", "y.npy") == 0
    assert "it needs scikit-learn, pip install 'mcl-kernels[demo]'" in capsys.readouterr().out
    assert json.loads(Path("y.npy.json").read_text())["ami"] == {"p.pt": None}


@pytest.mark.parametrize("suffix", ["npy", "pt"])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize(("save", "path", "options"), FILES.values(), ids=FILES)
def test_assign_gives_clustered_features_their_labels(
    save: Callable[[Tensor], object], path: str, options: list[str], metric: str, suffix: str
) -> None:
    save(features())
    saved = ("--centers", "c.safetensors")
    assert cluster(path, "--clusters", 5, "--metric", metric, "--out", f"y.{suffix}", *options, *saved) == 0
    assert main(["assign", path, "--out", f"z.{suffix}", *saved, *options]) == 0
    assert Path(f"z.{suffix}").read_bytes() == Path(f"y.{suffix}").read_bytes()
    summary = json.loads(Path(f"z.{suffix}.json").read_text())
    assert summary["cluster_sizes"] == read(f"y.{suffix}").bincount().tolist()
    assert summary["sha256"] == sha256_of(Path(f"z.{suffix}"))
    assert summary["centers_sha256"] == sha256_of(Path("c.safetensors"))


def test_assign_finds_the_nearest_centres_of_new_features(capsys: pytest.CaptureFixture[str]) -> None:
    kmeans = KMeans(7, seed=3).fit(features())
    kmeans.save("c.safetensors")
    assert main(["assign", "f1.npy", "--centers", "c.safetensors", "--out", "y.npy", "--impl", "reference"]) == 0
    assert torch.equal(read("y.npy").long(), kmeans.predict(features(1)))
    assert read("y.npy").dtype == torch.int32
    assert "y.npy: 7 clusters" in capsys.readouterr().out


def test_labels_of_cluster_name_their_centres() -> None:
    assert cluster("f0.npy", "--clusters", 5, "--out", "y.npy", "--centers", "new/c.safetensors") == 0
    assert json.loads(Path("y.npy.json").read_text())["centers_sha256"] == sha256_of(Path("new/c.safetensors"))
    assert torch.equal(KMeans.load("new/c.safetensors").predict(features()), read("y.npy").long())
