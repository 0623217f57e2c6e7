"""A saved k-means predicts the same labels; other files are refused by name."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mcl_kernels import KMeans
from mcl_kernels.kmeans import files

PATH = Path("kmeans.safetensors")


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows(dtype: torch.dtype = torch.float32, n: int = 500) -> Tensor:
    """Rows with many ties, so that a label depends on each bit of the centres."""
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (4 * x).round().div(4).to(dtype)


SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "cosine": {"metric": "cosine", "n_init": 2, "max_iter": 7},
    "mini-batches": {"batch_size": 100, "tol": 0.01, "seed": 3, "n_init": "auto"},
    "random": {"init": "random", "impl": "reference"},
    "NumPy's numbers": {"seed": np.int64(3), "tol": np.float32(0.5), "bounds": np.bool_(False)},
    "centres": {"init": rows()[:6]},
}


# Products are in fp64 if the squares of fp32 rows leave its range.
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float16, 1.0), (torch.float32, 1.0), (torch.float32, 1e-25), (torch.float32, 1e25), (torch.float64, 1.0)],
    ids=str,
)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_loaded_k_means_predicts_the_same_labels(settings: dict[str, Any], dtype: torch.dtype, scale: float) -> None:
    x = rows(dtype) * scale
    if isinstance(settings.get("init"), Tensor):
        settings = {"init": x[:6]}
    kmeans = KMeans(6, **settings).fit(x)
    kmeans.save(PATH)
    loaded = KMeans.load(PATH)
    assert torch.equal(loaded.predict(x), kmeans.labels_)
    assert torch.equal(loaded.cluster_centers_, kmeans.cluster_centers_)
    assert loaded.cluster_centers_.dtype == kmeans.cluster_centers_.dtype
    assert not hasattr(loaded, "labels_")
    for name in (*files.SETTINGS, *files.RESULTS):
        saved, read = getattr(kmeans, name), getattr(loaded, name)
        assert torch.equal(saved, read) if isinstance(saved, Tensor) else saved == read, name
    again = loaded.fit(x)
    assert torch.equal(again.cluster_centers_, kmeans.cluster_centers_)


def test_a_file_of_an_earlier_version_is_loaded() -> None:
    KMeans(3).fit(rows()).save(PATH)
    rewrite(without=["bounds", "feature_names_in_"])
    assert KMeans.load(PATH).get_params() == KMeans(3).get_params()


def test_fewer_clusters_than_n_clusters_are_saved() -> None:
    with pytest.warns(UserWarning, match="only 2 clusters hold a row"):
        kmeans = KMeans(3).fit(torch.tensor([[0.0], [1.0], [1.0]]))
    kmeans.save(PATH)
    assert len(KMeans.load(PATH).cluster_centers_) == 2


def test_centres_that_are_a_view_are_saved_and_put_on_a_device() -> None:
    kmeans = KMeans(3).fit(rows())
    kmeans.cluster_centers_ = kmeans.cluster_centers_.T.contiguous().T
    kmeans.save(str(PATH))
    assert torch.equal(KMeans.load(str(PATH)).cluster_centers_, kmeans.cluster_centers_)
    assert KMeans.load(PATH, device="meta").cluster_centers_.device.type == "meta"


def test_without_a_fit_there_is_nothing_to_save() -> None:
    with pytest.raises(RuntimeError, match=r"no clusters yet: call fit\(x\) before save\(path\)"):
        KMeans(3).save(PATH)
    assert not PATH.exists()


def test_a_save_that_fails_leaves_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    KMeans(3).fit(rows()).save(PATH)
    before = PATH.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            KMeans(4).fit(rows()).save(PATH)
    assert PATH.read_bytes() == before
    assert [path.name for path in Path().iterdir()] == [PATH.name]


def rewrite(fields: dict[str, Any] | None = None, without: Sequence[str] = (), **tensors: Tensor) -> None:
    """Rewrites the file with other settings or tensors, or without some settings, and their checksum."""
    with safe_open(PATH, "pt") as file:
        metadata, stored = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    settings = {**json.loads(metadata["kmeans"]), **(fields or {})}
    text = json.dumps({name: value for name, value in settings.items() if name not in without})
    stored.update(tensors)
    save_file(stored, PATH, {**metadata, "kmeans": text, "sha256": files._digest(text, stored)})


def flip_bit(position: int) -> None:
    content = bytearray(PATH.read_bytes())
    content[position] ^= 1
    PATH.write_bytes(content)


CHANGES: dict[str, tuple[Callable[[], object], str]] = {
    "a bit of a centre": (lambda: flip_bit(-3), "is damaged: its SHA-256 is not the one that it holds"),
    "a bit of the settings": (lambda: flip_bit(120), "is (damaged|not a k-means)"),
    "cut": (lambda: PATH.write_bytes(PATH.read_bytes()[:-8]), "is not a k-means that save wrote: "),
    "empty": (lambda: PATH.write_bytes(b""), "is not a k-means that save wrote: "),
    "text": (lambda: PATH.write_text("1,2\n" * 100), "is not a k-means that save wrote: "),
    "another format": (lambda: save_file({"a": torch.eye(3)}, PATH), "save wrote: its format is None"),
    "a later version": (
        lambda: save_file({"a": torch.eye(3)}, PATH, {"format": "mcl_kernels.KMeans 2"}),
        "its format is 'mcl_kernels.KMeans 2'",
    ),
    "no settings": (lambda: save_file({"a": torch.eye(3)}, PATH, {"format": files.FORMAT}), "save wrote: no 'kmeans'"),
    "more centres than clusters": (lambda: rewrite(cluster_centers=torch.eye(9)), r"centres of shape \[9, 9\] for 3"),
    "centres of one dimension": (lambda: rewrite(cluster_centers=torch.ones(3)), r"centres of shape \[3\] for 3"),
    "integer centres": (lambda: rewrite(cluster_centers=torch.eye(3).long()), "or of torch.int64"),
    "NaN": (lambda: rewrite(cluster_centers=torch.full((3, 3), torch.nan)), "centres that are not finite"),
    "an unknown metric": (lambda: rewrite({"metric": "cityblock"}), "metric must be one of"),
    "no clusters": (lambda: rewrite({"n_clusters": 0}), "n_clusters must be at least 1"),
    "an unknown dtype": (lambda: rewrite({"product_dtype": "int8"}), "no 'int8'"),
    "missing centres": (lambda: rewrite({"init": None}), "no 'init'"),
    "a number for a word": (lambda: rewrite({"impl": 3}), "impl must be one of"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_save_did_not_write_is_refused_by_name(change: str) -> None:
    KMeans(3).fit(rows()).save(PATH)
    make, message = CHANGES[change]
    make()
    with pytest.raises(ValueError, match=f"^kmeans.safetensors {message}|^kmeans.safetensors is not .*{message}"):
        KMeans.load(PATH)


def test_a_missing_or_special_file_is_refused() -> None:
    with pytest.raises(FileNotFoundError):
        KMeans.load(PATH)
    os.mkfifo(PATH)
    with pytest.raises(OSError, match="not a regular file"):
        KMeans.load(PATH)


def test_copies_and_pickles_predict_the_same_labels() -> None:
    kmeans = KMeans(4).fit(rows())
    buffer = io.BytesIO()
    torch.save(kmeans, buffer)
    buffer.seek(0)
    copies = (
        copy.copy(kmeans),
        copy.deepcopy(kmeans),
        pickle.loads(pickle.dumps(kmeans)),
        torch.load(buffer, weights_only=False),
    )
    for one in copies:
        assert torch.equal(one.predict(rows()), kmeans.labels_)
        assert torch.equal(one.labels_, kmeans.labels_)


def test_with_a_group_it_is_saved_but_not_pickled() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        kmeans = KMeans(4, group=dist.group.WORLD).fit(rows())
        kmeans.save(PATH)
    finally:
        dist.destroy_process_group()
    assert KMeans.load(PATH).group is None
    for copied in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match=r"a KMeans with a group cannot be copied or pickled.*: use save and load"):
            copied(kmeans)
