"""`mcl-kernels cluster`: files in, files out, errors in one line, and an output that is whole or as it was."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mcl_kernels import KMeans, MultistageRunner, cluster, compose_labels
from mcl_kernels._durable import sha256_of
from mcl_kernels.cli import main
from mcl_kernels.kmeans.sources import FileRows

N, D = 300, 6


def features(seed: int = 0) -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in range(3):
        np.save(f"f{seed}.npy", features(seed).numpy())


def run(*arguments: object) -> int:
    return main(["cluster", *map(str, arguments)])


def read(path: str) -> Tensor:
    if path.endswith(".pt"):
        loaded: Tensor = torch.load(path, weights_only=True)
        return loaded
    return torch.from_numpy(np.load(path))


# Each file of features, with what names the tensor in it.
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
def test_files(save: Callable[[Tensor], object], path: str, options: list[str], out: str, dtype: torch.dtype) -> None:
    x = features()
    save(x)
    assert run(path, "--clusters", 5, "--out", out, *options) == 0
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
    rows = cluster.open_features(Path(path), None)
    assert isinstance(rows, FileRows)
    assert torch.equal(rows.load(), features())


def test_options_reach_the_clustering() -> None:
    options = {"metric": "euclidean", "seed": 3, "n_init": 2, "max_iter": 4, "tol": 0.1, "batch_size": 64}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert run("f0.npy", "--clusters", 4, "--out", "y.npy", *flags, "--impl", "reference") == 0
    expected = KMeans(4, impl="reference", **options).fit(features())  # type: ignore[arg-type]
    assert torch.equal(read("y.npy").long(), expected.labels_)
    written = json.loads(Path("y.npy.json").read_text())["options"]
    assert {name: written[name] for name in options} == options


@pytest.mark.parametrize("suffix", ["npy", "pt"])
def test_stages_accumulate(suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As in the runner, whether the earlier files are the labels so far or the clusters of each stage."""
    runner = MultistageRunner(N, n_clusters=4)
    for stage in runner:
        stage.finish(features(stage.index))
        clusters = runner.finished[-1].clusters
        np.save(f"c{stage.index}.npy", clusters.int().numpy())
        torch.save(clusters, f"c{stage.index}.pt")
        so_far = [f"y{stage.index - 1}.{suffix}"] if stage.index else []
        each = [f"c{index}.{suffix}" for index in range(stage.index)]
        for out, previous in ((f"y{stage.index}.{suffix}", so_far), (f"z.{suffix}", each)):
            arguments = ["--previous", *previous] if previous else []
            command = (f"f{stage.index}.npy", "--clusters", 4, "--seed", stage.index, "--out", out, *arguments)
            assert run(*command) == 0
            assert torch.equal(read(out).long(), runner.labels)
        assert capsys.readouterr().out.count("AMI with") == len(so_far) + len(each)
    # The formula of the paper's code, with every stage in it.
    first, second, third = (done.clusters for done in runner.finished)
    dense = torch.unique((first * 4 + second) * 4 + third, return_inverse=True)[1]
    assert torch.equal(read(f"z.{suffix}").long(), dense)
    assert json.loads(Path(f"z.{suffix}.json").read_text())["labels"] == len(dense.unique())


def test_labels_that_starve_are_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    np.save("pairs.npy", np.arange(N) // 2)
    for previous, small in ("pairs.npy", True), ("y.npy", False):
        np.save("y.npy", np.arange(N) // (N // 4))
        assert run("f0.npy", "--clusters", 4, "--previous", previous, "--out", "z.npy") == 0
        assert ("few negatives: 100% of the samples" in capsys.readouterr().out) == small
        assert json.loads(Path("z.npy.json").read_text())["samples_in_small_labels"] == small


def test_samples_without_a_label_stay_so(capsys: pytest.CaptureFixture[str]) -> None:
    previous = torch.arange(N) % 3 - 1
    torch.save(previous.int(), "p.pt")
    assert run("f0.npy", "--clusters", 4, "--previous", "p.pt", "--out", "y.npy") == 0
    assert torch.equal(
        read("y.npy").long(), compose_labels(previous, KMeans(4, metric="cosine").fit(features()).labels_)
    )
    assert "100 rows without one" in capsys.readouterr().out
    assert json.loads(Path("y.npy.json").read_text())["unlabelled"] == 100
    torch.save(torch.full((N,), -1), "p.pt")
    assert run("f0.npy", "--clusters", 4, "--previous", "p.pt", "--out", "y.npy") == 0
    assert (read("y.npy") == -1).all()


def test_ami(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    assert run("f0.npy", "--clusters", 4, "--out", "y.npy") == 0
    torch.save(torch.arange(N) % 5, "p.pt")
    command = ("f0.npy", "--clusters", 3, "--previous", "y.npy", "p.pt", "--out", "z.npy")
    assert run(*command) == 0
    ami = json.loads(Path("z.npy.json").read_text())["ami"]
    clusters = KMeans(3, metric="cosine").fit(features()).labels_
    assert ami["y.npy"] == pytest.approx(metrics.adjusted_mutual_info_score(read("y.npy"), clusters))
    assert ami["p.pt"] == pytest.approx(metrics.adjusted_mutual_info_score(torch.arange(N) % 5, clusters))
    assert f"AMI with y.npy: {ami['y.npy']:.3f}\n" in capsys.readouterr().out

    monkeypatch.setattr(cluster, "AMI_ROWS", 200)
    assert run(*command) == 0
    assert "(of 200 rows drawn at random)" in capsys.readouterr().out
    assert json.loads(Path("z.npy.json").read_text())["ami"]["y.npy"] == pytest.approx(ami["y.npy"], abs=0.15)


def test_without_scikit_learn_only_the_ami_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    torch.save(torch.arange(N) % 5, "p.pt")
    assert run("f0.npy", "--clusters", 3, "--previous", "p.pt", "--out", "y.npy") == 0
    assert "it needs scikit-learn, pip install 'mcl-kernels[demo]'" in capsys.readouterr().out
    assert json.loads(Path("y.npy.json").read_text())["ami"] == {"p.pt": None}


def truncate(path: str, left: int) -> None:
    Path(path).write_bytes(Path(path).read_bytes()[:left])


def save_bad(path: str) -> None:
    """The file that the name says, from a good one."""
    x, labels = features(), torch.arange(N)
    if path == "nan.npy":
        x[17, 2] = torch.nan
    files: dict[str, Callable[[], Any]] = {
        "nan.npy": lambda: np.save(path, x.numpy()),
        "cut.npy": lambda: (np.save(path, x.numpy()), truncate(path, 1000)),
        "cut.pt": lambda: (torch.save(x, path), truncate(path, 1000)),
        "cut.safetensors": lambda: (save_file({"a": x}, path), truncate(path, 1000)),
        "empty.npy": lambda: Path(path).touch(),
        "integers.npy": lambda: np.save(path, labels.view(-1, 1).numpy()),
        "integers.safetensors": lambda: save_file({"a": labels}, path),
        "vector.npy": lambda: np.save(path, x[:, 0].numpy()),
        "vector.safetensors": lambda: save_file({"a": x[:, 0].contiguous()}, path),
        "fortran.npy": lambda: np.save(path, np.asfortranarray(x.numpy())),
        "none.npy": lambda: np.save(path, np.zeros((0, 4), np.float32)),
        "several.pt": lambda: torch.save({"image": x, "text": x}, path),
        "list.pt": lambda: torch.save([x], path),
        "pickle.pt": lambda: torch.save(Path(path), path),
        "pickle.npy": lambda: np.save(path, np.array([{}]), allow_pickle=True),
        "floats.npy": lambda: np.save(path, labels.float().numpy()),
        "short.npy": lambda: np.save(path, labels[1:].numpy()),
        "matrix.npy": lambda: np.save(path, labels.view(-1, 2).numpy()),
        "x.csv": lambda: Path(path).write_text("1,2"),
    }
    if path in files:
        files[path]()


FEATURES_ERRORS = [
    ("missing.npy", "No such file or directory: 'missing.npy'"),
    ("missing.pt", "No such file or directory: 'missing.pt'"),
    ("missing.safetensors", "No such file or directory: 'missing.safetensors'"),
    ("x.csv", "FEATURES must be a .npy, .pt or .safetensors file: got x.csv"),
    ("cut.npy", "cut.npy cannot be read: "),
    ("cut.pt", "cut.pt cannot be read: "),
    ("cut.safetensors", "cut.safetensors cannot be read: "),
    ("empty.npy", "empty.npy cannot be read: "),
    ("pickle.npy", "pickle.npy cannot be read: "),
    ("pickle.pt", "pickle.pt cannot be read: "),
    ("nan.npy", "nan.npy must be finite: got NaN or infinity in row 17"),
    ("integers.npy", "integers.npy must be float16, bfloat16, float32 or float64: got torch.int64"),
    ("integers.safetensors", "a of integers.safetensors must be one of F16, BF16, F32, F64: got I64"),
    ("vector.npy", "vector.npy must have shape [rows, features]: got [300]"),
    ("vector.safetensors", "a of vector.safetensors must have shape [rows, features]: got [300]"),
    ("fortran.npy", "fortran.npy must be a memory map whose rows are contiguous"),
    ("none.npy", "n_clusters must be at most the number of rows: got 3 for 0 rows"),
    ("several.pt", "--tensor must be one of image, text in several.pt: got None"),
    ("list.pt", "list.pt must hold a tensor or an array: got list"),
]
OPTIONS_ERRORS = [
    (["--previous", "missing.npy"], "No such file or directory: 'missing.npy'"),
    (["--previous", "x.csv"], "--previous must be .npy or .pt files: got x.csv"),
    (
        ["--previous", "good.npy", "short.npy"],
        "short.npy must have one label per row of FEATURES: got 299 labels for 300",
    ),
    (["--previous", "floats.npy"], "floats.npy must be an integer tensor: got torch.float32"),
    (["--previous", "matrix.npy"], "matrix.npy must be a vector: got shape [150, 2]"),
    (["--previous", "list.pt"], "list.pt must be an integer tensor: got list"),
    (["--previous", "cut.npy"], "cut.npy cannot be read"),
    (["--tensor", "image"], "--tensor is for files of several tensors: f0.npy holds one"),
    (["--clusters", "301"], "n_clusters must be at most the number of rows: got 301 for 300 rows"),
    (["--clusters", "0"], "n_clusters must be at least 1: got 0"),
    (["--batch-size", "0"], "batch_size must be at least 1: got 0"),
    (["--out", "y.csv"], "--out must be a .npy or .pt file: got y.csv"),
    (["--out", "directory.npy"], "--out must be a file: directory.npy is a directory"),
    (["--out", "f0.npy"], "--out must not be one of the files that are read: got f0.npy"),
    (["--previous", "good.npy", "--out", "good.npy"], "--out must not be one of the files that are read: got good.npy"),
    (["--out", "x.csv/y.npy"], "directory cannot be written"),
    (["--out", "summary.npy"], "the summary must be a file: summary.npy.json is a directory"),
]
ERRORS = [([path], message) for path, message in FEATURES_ERRORS]
ERRORS += [(["f0.npy", *options], message) for options, message in OPTIONS_ERRORS]


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[" ".join(arguments) for arguments, _ in ERRORS])
def test_errors_are_one_line_and_leave_the_output(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for argument in arguments:
        save_bad(argument.split("/")[0])
    Path("directory.npy").mkdir()
    Path("summary.npy.json").mkdir()
    np.save("good.npy", np.zeros(N, np.int32))
    Path("y.npy").write_bytes(b"as it was")
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    assert run(arguments[0], "--clusters", 3, "--out", "y.npy", *arguments[1:]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mcl-kernels: ")
    assert message in error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


@pytest.mark.parametrize("where", ["KMeans.fit", "compose_pairs", "sha256_of"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), MemoryError])
def test_whatever_ends_it_leaves_the_output(where: str, error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    Path("y.npy").write_bytes(b"as it was")
    before = sorted(Path().iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(f"mcl_kernels.cluster.{where}", fail)
        if error is MemoryError:
            with pytest.raises(MemoryError):
                run("f0.npy", "--clusters", 3, "--out", "y.npy")
        else:
            assert run("f0.npy", "--clusters", 3, "--out", "y.npy") == (130 if error is KeyboardInterrupt else 1)
    assert Path("y.npy").read_bytes() == b"as it was"
    assert sorted(Path().iterdir()) == before
    assert run("f0.npy", "--clusters", 3, "--out", "y.npy") == 0


def test_interrupted_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KMeans, "fit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run("f0.npy", "--clusters", 3, "--out", "y.npy") == 130
    assert "interrupted; y.npy is as it was" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["y.npy", "y.pt"])
def test_a_full_disk(out: str) -> None:
    Path(out).write_bytes(b"as it was")
    np.save("large.npy", np.random.default_rng(0).random((20_000, 2), dtype=np.float32))
    result = subprocess.run(
        [sys.executable, "-m", "mcl_kernels.cli", "cluster", "large.npy", "--clusters", "2", "--out", out],
        capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    assert "mcl-kernels: " in result.stderr
    assert "Traceback" not in result.stderr
    assert Path(out).read_bytes() == b"as it was"
    assert not [path for path in Path().iterdir() if "partial" in path.name or path.suffix == ".json"]


KILLED = """
import os, sys
from itertools import count
from pathlib import Path
from mcl_kernels.cli import main
from tests.killed_run import in_child, kill_at

here = Path.cwd()
out = here / "out" / "y.npy"
out.parent.mkdir()

def cluster(features):
    assert main(["cluster", str(here / features), "--clusters", "3", "--out", str(out)]) == 0

assert in_child(lambda: cluster("f1.npy")) == 0
new = out.read_bytes()
assert in_child(lambda: cluster("f0.npy")) == 0
old = out.read_bytes()
assert new != old
kept = []
for number in count():
    status = in_child(lambda: (kill_at(number, out.parent), cluster("f1.npy")))
    if status == 0:
        break
    assert os.WIFSIGNALED(status), f"attempt {number} failed by itself"
    assert out.read_bytes() in (old, new), f"killed at write {number}"
    kept.append(out.read_bytes() == old)
    out.write_bytes(old)
assert kept == sorted(kept, reverse=True), kept
assert out.read_bytes() == new
assert sorted(path.name for path in out.parent.iterdir()) == ["y.npy", "y.npy.json"]
print(number, sum(kept))
"""


def test_killed_at_every_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """The labels are the old ones up to their rename, and the new ones from there."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    result = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    writes, kept = map(int, result.stdout.split()[-2:])
    assert writes > kept >= 6
