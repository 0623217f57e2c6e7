"""Made-up results and details of experiments/suppression: nothing is trained for them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from experiments.suppression.details import Details
from experiments.suppression.evaluation import Neighbours
from experiments.suppression.results import DIRECTIONS, PACKAGES, EncoderResult, Retrieval, RunResult
from experiments.suppression.settings import RunSettings

DIGITS = (0.90, 0.93, 0.96)  # of three seeds
TRIFEATURE = {"shape": 0.9, "texture": 0.7, "color": 1.0}


def made_up(data: str, method: str, seed: int, probes: dict[str, float], **changes: Any) -> RunResult:
    """Result of a run whose encoders are each a little worse than all together."""
    settings = RunSettings.of(data, method, seed, **changes)
    n = settings.encoders
    encoder = EncoderResult({name: value - 0.1 for name, value in probes.items()}, 40.0, 4.0, 0.1, "abc1234")
    recall = {direction: [0.1, 0.3 + 0.1 * seed, 0.6] for direction in DIRECTIONS}
    clip = settings.objective == "clip"
    return RunResult(
        settings=settings,
        commit="abc1234",
        versions=dict.fromkeys(("python", *PACKAGES), "1.0"),
        processor="a processor, of 2 cores",
        threads=1,
        train_samples=50,
        test_samples=20,
        dimensions=128 * n,
        classes=dict.fromkeys(probes, 10),
        encoders=[encoder] * n,
        ami=[[1.0 if i == j else 0.2 + 0.1 * seed for j in range(n)] for i in range(n)],
        concatenation=probes,
        soup=probes if clip and n > 1 else None,
        retrieval=Retrieval([recall] * n, recall, recall if n > 1 else None) if clip else None,
    )


def made_up_details(encoders: int, agreement: dict[str, float]) -> Details:
    """Details of a run whose neighbours all have this agreement with their anchors."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 40, np.uint8)).save(buffer, format="PNG")
    pictures = [base64.b64encode(buffer.getvalue()).decode()] * 4
    neighbours = Neighbours(pictures, [0, 1], [[[1, 2, 3]] * 2] * encoders, [[[agreement] * 3] * 2] * encoders)
    return Details([[1.0, 0.5]] * encoders, [[20, 30]] * encoders, [[30, 20]] * encoders, neighbours)


def controls(data: str = "randbits-8", mcl: Sequence[float] = DIGITS) -> list[RunResult]:
    """Three seeds of SimCLR, SimCLR as wide, an ensemble and MCL."""
    methods = {
        "simclr": (0.1, 0.1, 0.1),
        "wide+simclr": (0.1, 0.1, 0.13),
        "ensemble+simclr": (0.1, 0.11, 0.12),
        "mcl+simclr": mcl,
    }
    return [
        made_up(data, method, seed, {"digit": value, "bits": 1.0})
        for method, values in methods.items()
        for seed, value in enumerate(values)
    ]
