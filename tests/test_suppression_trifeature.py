"""Trifeature of experiments/suppression: its split and its renderings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.suppression.data import Dataset, open_dataset, trifeature
from mcl_kernels.cli.demo import random_affine


@pytest.fixture(scope="module")
def trifeatures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dataset]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trifeature, "RENDERINGS_HELD_OUT", 1)
        yield open_dataset("trifeature-56", samples=800, seed=0, directory=tmp_path_factory.mktemp("data"))


def test_complete_combinations_are_held_out(trifeatures: Dataset) -> None:
    columns = torch.stack(list(trifeatures.features.values()), dim=1)
    trained, held_out = (
        {tuple(row) for row in columns[part].tolist()} for part in (trifeatures.train, trifeatures.test)
    )
    assert not trained & held_out
    assert (len(trained), len(held_out)) == (800, 200)
    for values in trifeatures.features.values():
        assert values[trifeatures.train].bincount().tolist() == [80] * 10
        assert values[trifeatures.test].bincount().tolist() == [20] * 10
    for i, j in ((0, 1), (0, 2), (1, 2)):
        pairs = 10 * columns[trifeatures.train, i] + columns[trifeatures.train, j]
        assert pairs.bincount().tolist() == [8] * 100


def test_the_seed_decides_split_and_renderings() -> None:
    assert trifeature.split_combinations(0)[1].tolist() == trifeature.split_combinations(0)[1].tolist()
    assert trifeature.split_combinations(0)[1].tolist() != trifeature.split_combinations(1)[1].tolist()
    first, again, other = (render(7, 3, 4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("samples", [100, 0, 801])
def test_samples_are_a_multiple_of_the_combinations(tmp_path: Path, samples: int) -> None:
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
    """Sharpness is sum m^2 / sum m: 1 for an image of pure colour and grey, less for mixtures."""
    textured = trifeatures.train[trifeatures.features["texture"][trifeatures.train] > 0]

    def sharpness(images: torch.Tensor) -> float:
        return float(images.square().sum() / images.abs().sum())

    torch.manual_seed(0)
    plain = sharpness(trifeatures.plain(textured))
    assert sharpness(trifeatures.views(textured)[0]) == pytest.approx(plain, rel=0.2)
    blurred = random_affine(trifeatures.plain(textured))
    assert sharpness(blurred) < 0.8 * plain, "views of plain images would be blurred"


def render(shape: int, texture: int, count: int, size: int = 112, seed: int = 0) -> torch.Tensor:
    """Masks [count, size, size] in [0, 1]."""
    masks = trifeature.render(
        torch.full((count,), shape), torch.full((count,), texture), size, np.random.default_rng(seed)
    )
    return masks.double() / 255


def test_shapes_have_their_geometric_area_and_stay_inside() -> None:
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


def test_shapes_are_placed_and_rotated_at_random() -> None:
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


def test_textures_cover_the_area_of_their_lines() -> None:
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
    """Textures at the same position and angle differ, and so do two renderings of one texture."""
    masks = torch.stack([render(1, texture, 2) for texture in range(10)])
    for i in range(10):
        for j in range(i):
            assert (masks[i, 0] - masks[j, 0]).abs().mean() > 0.02, (i, j)
    solid = torch.stack([render(1, 0, 2)] * 10) > 0.99
    both = solid[:, 0] & solid[:, 1]  # pixels of both squares
    moved = (masks[:, 0] - masks[:, 1]).abs()[both].view(10, -1).mean(dim=1)
    assert moved[0] == 0
    assert (moved[1:] > 0.1).all()
