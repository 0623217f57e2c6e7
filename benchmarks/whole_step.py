"""Peak memory of a training step with its encoder: `python -m benchmarks.whole_step` writes whole_step.csv.

SimCLR on images of 16 x 16 with a small convolutional encoder: with the loss in plain PyTorch, with ours, and with ours
over batches of 512 by `cached_backward`. A smaller loss does not reduce the encoder's activations: the larger of the
two limits the batch. Each peak is measured in a fresh process, above its memory before the step.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.conditions import conditions
from benchmarks.measure import in_fresh_process, peak_of, write_rows
from mcl_kernels import cached_backward, nt_xent

RESULTS = Path(__file__).with_name("whole_step.csv")
SIZES = (256, 1024, 4096, 16384, 32768)
CHUNK = 512
LARGEST = {"eager": 4096, "ours": 16384}  # that fit this machine
CONTENDERS = ("eager", "ours", "ours, cached")
COLUMNS = ("contender", "n", "threads", "peak_bytes", "versions", "processor", "commit")


def encoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 128),
    )  # fmt: skip


def eager_nt_xent(view_a: Tensor, view_b: Tensor) -> Tensor:
    z = F.normalize(torch.cat((view_a, view_b)), dim=1)
    logits = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))


def measure(contender: str, n: int) -> int:
    torch.manual_seed(0)
    model, images = encoder(), torch.randn(n, 1, 16, 16)
    labels = torch.arange(n) % 10

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        return model(x), model(x.flip(-1))

    def step(n: int) -> None:
        if contender == "ours, cached":
            cached_backward(encode, images[:n].split(CHUNK), lambda a, b: nt_xent(a, b, labels[:n]))
        elif contender == "ours":
            nt_xent(*encode(images[:n]), labels[:n]).backward()
        else:
            eager_nt_xent(*encode(images[:n])).backward()

    step(64)
    return peak_of(lambda: step(n))


def main() -> None:
    recorded = conditions(torch.device("cpu"))
    rows = []
    for n in SIZES:
        for contender in CONTENDERS:
            if n > LARGEST.get(contender, n):
                continue
            peak = in_fresh_process(measure, contender, n)
            print(f"{n:>6} {contender:<13} {peak / 2**20:>8.0f} MiB", flush=True)
            rows.append(
                {"contender": contender, "n": n, "threads": torch.get_num_threads(), "peak_bytes": peak, **recorded}
            )
    write_rows(RESULTS, COLUMNS, rows)


if __name__ == "__main__":
    main()
