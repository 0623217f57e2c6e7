"""What a part of a measurement is given: where to compute, for how long, and where its results go."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import NamedTuple

import torch

RESULTS = "measured.csv"
COLUMNS = ("part", "workload", "dtype", "contender", "quantity", "value", "unit")


class SkipPartError(Exception):
    """The part cannot run here, for the reason in the message."""


class Session(NamedTuple):
    part: str
    out: Path
    device: torch.device
    tiny: bool  # sizes of a test
    stop: float  # time.monotonic() at which the part should have ended

    def record(
        self, quantity: str, value: object, unit: str = "", *, workload: str = "", dtype: str = "", contender: str = ""
    ) -> None:
        """Appends a row to the results and prints it; it is on disk when this returns."""
        shown = f"{value:.5g}" if isinstance(value, float) else str(value)
        append_row(self.out / RESULTS, COLUMNS, (self.part, workload, dtype, contender, quantity, shown, unit))
        print(
            " ".join(filter(None, (f"{self.part:<8}", workload, dtype, contender, quantity, shown, unit))), flush=True
        )

    def seconds_left(self) -> float:
        return self.stop - time.monotonic()

    def needs_cuda(self, what: str) -> None:
        """Raises SkipPartError without a GPU."""
        if self.device.type != "cuda":
            raise SkipPartError(f"{what} needs a GPU")


def append_row(path: Path, columns: tuple[str, ...], row: tuple[object, ...]) -> None:
    """Appends a row to a CSV, which begins with the names of the columns."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(columns)
        writer.writerow(row)
