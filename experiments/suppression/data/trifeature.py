"""Trifeature (Hermann & Lampinen 2020): 10 shapes x 10 textures x 10 colours, rendered here.

    pixel = m * colour + (1 - m) * grey,    m = shape * texture in [0, 1]

A shape of 128 units on a canvas of 224 is rotated by U[-45, 45) degrees and placed at random. Its texture has a random
phase and its own angle, U[-45, 45). Whole combinations of features are held out. The masks m are rendered once and
cached; colour is applied when they are read. The paper names its shapes and textures but does not draw them: their
drawings are defined here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from experiments.suppression.data.dataset import Dataset
from experiments.suppression.data.sources import cached_array
from mcl_kernels.cli.demo import random_affine

CANVAS, SHAPE, PERIOD, LINE = 224, 128, 10, 3  # units; LINE is the width of a texture's lines
SAMPLES = 16_000  # for training
RENDERINGS_HELD_OUT = 10  # of each held-out combination
COMBINATIONS, HELD_OUT = 1000, 200
FINER = 2  # pixels of a mask per pixel of an image, in each dimension
CHUNK = 8  # renderings at a time: their coordinates stay in the CPU cache
GREY = 0.5

_line = LINE / PERIOD
_noise = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (256, 256), dtype=bool))

# Interiors of the shapes: x to the right and y downwards, in the square [-1, 1] x [-1, 1].
SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "triangle": lambda x, y: (y < 1) & (2 * x.abs() < 1 + y),
    "square": lambda x, y: _in_box(x, y),
    "plus": lambda x, y: _in_box(x, y) & (torch.minimum(x.abs(), y.abs()) < 1 / 3),
    "circle": lambda x, y: x * x + y * y < 1,
    "tee": lambda x, y: _in_box(x, y) & ((y < -1 / 3) | (x.abs() < 1 / 3)),
    "rhombus": lambda x, y: x.abs() / 0.6 + y.abs() < 1,
    "pentagon": lambda x, y: _star(x, y, math.cos(math.pi / 5)),
    "star": lambda x, y: _star(x, y, 0.382),
    "fivesquare": lambda x, y: _in_box(x, y) & (((x * 1.5).round() + (y * 1.5).round()) % 2 == 0),
    "trapezoid": lambda x, y: (y.abs() < 0.7) & (x.abs() < 0.75 + y / 2.8),
}

# Points of the textures: u and v in periods.
TEXTURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "solid": lambda u, v: torch.ones_like(u, dtype=torch.bool),
    "stripes": lambda u, v: _cell(u) < _line,
    "grid": lambda u, v: (_cell(u) < _line) | (_cell(v) < _line),
    "hexgrid": lambda u, v: _hexagon_edge(u, v) < _line / 2,
    "dots": lambda u, v: (_cell(u) - 0.5) ** 2 + (_cell(v) - 0.5) ** 2 < _line**2,
    "noise": lambda u, v: _noise[(u / _line).floor().long() % 256, (v / _line).floor().long() % 256],
    "triangles": lambda u, v: (_cell(v) < 0.8) & ((_cell(u) - 0.5).abs() < _cell(v) / 2),
    "zigzags": lambda u, v: _cell(v + (_cell(u) - 0.5).abs()) < _line,
    "rain": lambda u, v: (_cell(u) < _line) & (_cell(v / 2 + u.floor() * 0.38) < 0.5),
    "pluses": lambda u, v: _plus((_cell(u) - 0.5).abs(), (_cell(v) - 0.5).abs()),
}

COLORS = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "yellow": (1, 1, 0),
    "pink": (1, 0.4, 1),
    "cyan": (0, 1, 1),
    "purple": (0.3, 0, 0.5),
    "ocean": (0.1, 0.4, 0.5),
    "orange": (1, 0.6, 0),
    "white": (1, 1, 1),
}


class Trifeature(Dataset):
    """Images [N, 3, S, S] in [-0.5, 0.5]: grey is 0, so that the padding of `random_affine` is background.

    A view is rotated, scaled, sheared and shifted, and keeps its colours: the usual augmentation of colours would
    remove the shortcut that this data set is about.

    Views are sampled from finer masks, plain images are averages of these masks. Views sampled from plain images would
    be blurred: a small supervised network trained on such views read 92% of the textures of views, and 45% of those of
    plain images.
    """

    def __init__(self, name: str, *, size: int, seed: int, directory: Path, samples: int | None = None) -> None:
        trained, held_out = split_combinations(seed)
        renderings, remainder = divmod(SAMPLES if samples is None else samples, len(trained))
        if remainder or not renderings:
            raise ValueError(f"samples must be a multiple of the {len(trained)} combinations trained on: got {samples}")
        combinations = np.concatenate((trained.repeat(renderings), held_out.repeat(RENDERINGS_HELD_OUT)))
        shape, texture, color = (torch.from_numpy(part) for part in np.unravel_index(combinations, (10, 10, 10)))
        # A hash of this file is in the name: masks of another version are not used.
        version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
        masks = cached_array(
            directory / "cache" / f"trifeature-{size}-{len(combinations)}-seed{seed}-{version}.npy",
            lambda: render(shape, texture, FINER * size, np.random.default_rng([seed, 1])).numpy(),
        )
        self.masks = torch.from_numpy(masks).unsqueeze(1)
        self.contrasts = torch.tensor(list(COLORS.values()))[color] - GREY
        every = torch.arange(len(combinations))
        train, test = every[: renderings * len(trained)], every[renderings * len(trained) :]
        super().__init__(name, {"shape": shape, "texture": texture, "color": color}, train, test, (3, size, size))

    def _view(self, index: Tensor, *, augmented: bool) -> Tensor:
        masks = self.masks[index].float().div(255)  # one channel to sample: colour is constant over an image
        masks = random_affine(masks, self.shape[1:]) if augmented else F.avg_pool2d(masks, FINER)
        return masks * self.contrasts[index][:, :, None, None]

    def picture(self, index: int) -> np.ndarray:
        image = self.plain(torch.tensor([index]))[0] + GREY
        return image.permute(1, 2, 0).mul(255).round().byte().numpy()


def split_combinations(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions in [shape, texture, color]: 800 for training and 200 held out.

    Held out are 20 of the 100 combinations of each value of a feature, and 2 of the 10 of each pair of values.
    """
    generator = np.random.default_rng([seed, 0])
    shape, texture, color = (generator.permutation(10) for _ in range(3))
    held_out = (shape[:, None, None] + texture[:, None] + color) % 10 < HELD_OUT * 10 // COMBINATIONS
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def render(shape: Tensor, texture: Tensor, size: int, generator: np.random.Generator) -> Tensor:
    """Masks of shapes [N] with textures [N] at random positions, angles and phases, uint8 [N, size, size]."""
    n = len(shape)
    angle, texture_angle = (torch.from_numpy(generator.uniform(-45, 45, n)).float().deg2rad() for _ in range(2))
    # The bounding square stays inside the canvas. It has one size, so that its position does not reveal the shape.
    room = (CANVAS - SHAPE * (angle.cos() + angle.sin().abs())) / 2
    center = torch.from_numpy(generator.uniform(-1, 1, (n, 2))).float() * room[:, None]
    phase = torch.from_numpy(generator.uniform(0, 64, (n, 2))).float()  # periods: the noise has many
    masks = torch.empty(n, size, size, dtype=torch.uint8)
    draw_shapes, draw_textures = list(SHAPES.values()), list(TEXTURES.values())
    kinds = len(TEXTURES) * shape + texture
    for kind in tqdm(kinds.unique().tolist(), f"rendering {n} images", leave=False, disable=None):
        draw_shape, draw_texture = draw_shapes[kind // len(TEXTURES)], draw_textures[kind % len(TEXTURES)]
        for part in torch.nonzero(kinds == kind).flatten().split(CHUNK):
            x, y = _coordinates(size, center[part], angle[part])
            u, v = _coordinates(size, center[part], texture_angle[part])
            inside = draw_shape(x / (SHAPE / 2), y / (SHAPE / 2))
            inside &= draw_texture(u / PERIOD + phase[part, 0, None, None], v / PERIOD + phase[part, 1, None, None])
            masks[part] = F.avg_pool2d(inside.float(), inside.shape[1] // size).mul(255).round().byte()
    return masks


def _coordinates(size: int, center: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates x and y of points at most a unit apart, in rotated frames, [n, P, P]; P is a multiple of `size`."""
    points = size * math.ceil(CANVAS / size)
    line = (torch.arange(points) + 0.5) * (CANVAS / points) - CANVAS / 2
    x, y = line - center[:, :1], line - center[:, 1:]  # [n, points]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return (
        (cos * x)[:, None, :] + (sin * y)[:, :, None],
        (cos * y)[:, :, None] - (sin * x)[:, None, :],
    )


def _cell(u: Tensor) -> Tensor:
    """Position within the period, in [0, 1)."""
    return u - u.floor()


def _in_box(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) < 1


def _star(x: Tensor, y: Tensor, inner: float) -> Tensor:
    """Interior of a star: five tips at radius 1, the first upwards, and five corners at radius `inner` between them."""
    fifth = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    angle = (angle - (angle / fifth).round() * fifth).abs()  # from the nearest tip
    radius = (x * x + y * y).sqrt()
    corner_x, corner_y = inner * math.cos(fifth / 2), inner * math.sin(fifth / 2)
    # Below the line from the tip (1, 0) to the corner.
    return radius * (angle.cos() * corner_y + angle.sin() * (1 - corner_x)) < corner_y


def _plus(x: Tensor, y: Tensor) -> Tensor:
    return (torch.minimum(x, y) < _line / 2) & (torch.maximum(x, y) < 0.4)


def _hexagon_edge(u: Tensor, v: Tensor) -> Tensor:
    """Distance to the edges of a honeycomb with hexagons one period wide: half a period minus that to the center."""
    height = math.sqrt(3)  # of the rectangle that two hexagons tile

    def from_center(offset: float) -> Tensor:
        x, y = (_cell(u + offset) - 0.5).abs(), (_cell(v / height + offset) - 0.5).abs() * height
        return torch.maximum(x, x / 2 + y * height / 2)

    return 0.5 - torch.minimum(from_center(0), from_center(0.5))
