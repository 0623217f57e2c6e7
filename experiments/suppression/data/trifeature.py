"""Trifeature (Hermann & Lampinen 2020): 10 shapes x 10 textures x 10 colours, rendered here.

    pixel = m * colour + (1 - m) * grey,    m = shape * texture in [0, 1]

A shape of 128 units on a canvas of 224, turned by U[-45, 45) degrees and placed at random; its texture has a random
phase and an angle of its own, U[-45, 45). Whole combinations are held out. The masks m are rendered once and cached;
colour is applied when they are read. What each shape and texture looks like is ours, the paper only names them.
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

CANVAS, SHAPE, PERIOD, LINE = 224, 128, 10, 3  # units; a texture's lines are LINE wide
SAMPLES, RENDERINGS_HELD_OUT = 16_000, 10  # to train on; of each combination that is held out
COMBINATIONS, HELD_OUT = 1000, 200
FINER = 2  # pixels of a mask to one of an image, on each side
CHUNK = 8  # renderings at a time, so that their coordinates stay in the cache
GREY = 0.5

_line = LINE / PERIOD
_noise = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (256, 256), dtype=bool))

# Inside of a shape: x to the right and y downwards, the square around it being [-1, 1] x [-1, 1].
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

# Where a texture is: u and v in periods.
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
    """Images [N, 3, S, S] in [-0.5, 0.5]: grey is 0, so that what `random_affine` brings in is background.

    A view is turned, scaled, sheared and shifted and its colours are left alone: an augmentation of colours, as usual
    elsewhere, would take away the shortcut that this data set is about.

    Views are sampled from finer masks, whose averages are the plain images. Sampled from those they would be blurred:
    a small supervised network that had learned on such views read 92% of the textures of views and 45% of plain ones.
    """

    def __init__(self, name: str, *, size: int, seed: int, directory: Path, samples: int | None = None) -> None:
        trained, held_out = split_combinations(seed)
        renderings, remainder = divmod(SAMPLES if samples is None else samples, len(trained))
        if remainder or not renderings:
            raise ValueError(f"samples must be a multiple of the {len(trained)} combinations trained on: got {samples}")
        combinations = np.concatenate((trained.repeat(renderings), held_out.repeat(RENDERINGS_HELD_OUT)))
        shape, texture, color = (torch.from_numpy(part) for part in np.unravel_index(combinations, (10, 10, 10)))
        # The renderer's text is in the name: what an older one made is not taken for its work.
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
        masks = self.masks[index].float().div(255)  # without the colour, which is the same everywhere: less to sample
        masks = random_affine(masks, self.shape[1:]) if augmented else F.avg_pool2d(masks, FINER)
        return masks * self.contrasts[index][:, :, None, None]

    def picture(self, index: int) -> np.ndarray:
        image = self.plain(torch.tensor([index]))[0] + GREY
        return image.permute(1, 2, 0).mul(255).round().byte().numpy()


def split_combinations(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions in [shape, texture, color]: 800 to train on, 200 held out.

    Of every value of a feature 20 combinations of 100 are held out, of every pair of values 2 of 10.
    """
    generator = np.random.default_rng([seed, 0])
    shape, texture, color = (generator.permutation(10) for _ in range(3))
    held_out = (shape[:, None, None] + texture[:, None] + color) % 10 < HELD_OUT * 10 // COMBINATIONS
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def render(shape: Tensor, texture: Tensor, size: int, generator: np.random.Generator) -> Tensor:
    """Masks of shapes [N] with textures [N], places, angles and phases drawn at random: uint8 [N, size, size]."""
    n = len(shape)
    angle, texture_angle = (torch.from_numpy(generator.uniform(-45, 45, n)).float().deg2rad() for _ in range(2))
    # The square around the shape stays inside the canvas. It is the same for all shapes: its place tells none of them.
    room = (CANVAS - SHAPE * (angle.cos() + angle.sin().abs())) / 2
    center = torch.from_numpy(generator.uniform(-1, 1, (n, 2))).float() * room[:, None]
    phase = torch.from_numpy(generator.uniform(0, 64, (n, 2))).float()  # periods: more than one for the noise
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
    """Of points a unit apart or less as seen from turned frames: x and y, [n, P, P], P a multiple of `size`."""
    points = size * math.ceil(CANVAS / size)
    line = (torch.arange(points) + 0.5) * (CANVAS / points) - CANVAS / 2
    x, y = line - center[:, :1], line - center[:, 1:]  # [n, points]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return (
        (cos * x)[:, None, :] + (sin * y)[:, :, None],
        (cos * y)[:, :, None] - (sin * x)[:, None, :],
    )


def _cell(u: Tensor) -> Tensor:
    """Where in its period, [0, 1)."""
    return u - u.floor()


def _in_box(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) < 1


def _star(x: Tensor, y: Tensor, inner: float) -> Tensor:
    """Five tips at radius 1, the first upwards, and five corners at radius `inner` between them."""
    fifth = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    angle = (angle - (angle / fifth).round() * fifth).abs()  # to the nearest tip
    radius = (x * x + y * y).sqrt()
    corner_x, corner_y = inner * math.cos(fifth / 2), inner * math.sin(fifth / 2)
    # Below the line from the tip (1, 0) to the corner.
    return radius * (angle.cos() * corner_y + angle.sin() * (1 - corner_x)) < corner_y


def _plus(x: Tensor, y: Tensor) -> Tensor:
    return (torch.minimum(x, y) < _line / 2) & (torch.maximum(x, y) < 0.4)


def _hexagon_edge(u: Tensor, v: Tensor) -> Tensor:
    """Distance to the edges of a honeycomb of hexagons one period wide: half of it less that to the nearest center."""
    height = math.sqrt(3)  # of the rectangle that two hexagons tile

    def from_center(offset: float) -> Tensor:
        x, y = (_cell(u + offset) - 0.5).abs(), (_cell(v / height + offset) - 0.5).abs() * height
        return torch.maximum(x, x / 2 + y * height / 2)

    return 0.5 - torch.minimum(from_center(0), from_center(0.5))
