"""Errors of k-means over several ranks: an error of one rank is raised on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mcl_kernels import KMeans
from mcl_kernels.kmeans import api, initial
from mcl_kernels.kmeans.dataset import Dataset
from tests.kmeans_fits import D, K, rows_without_structure
from tests.process_pool import RankPool


class Changing:
    """Iterable that yields fewer rows, or raises, in a later pass."""

    def __init__(self, x: Tensor, passes: int, error: Exception | None = None) -> None:
        self.x, self.passes, self.error = x, passes, error

    def __iter__(self) -> Iterator[Tensor]:
        yield self.x[:100]
        self.passes -= 1
        if self.passes < 0 and self.error:
            raise self.error
        yield self.x[100 : 190 if self.passes < 0 else None]


def error_of_fit(case: str, path: str) -> str:
    """Returns the error of a fit in which the last rank has another argument."""
    rank, last = dist.get_rank(), dist.get_rank() == dist.get_world_size() - 1
    x: Any = rows_without_structure(200)
    options: dict[str, Any] = {"n_clusters": K}
    if case == "rows":
        options["n_clusters"] = 200 * dist.get_world_size() + 1
    if case == "batch_size of iterables" and last:
        x = [x]
    if case in ("batch_size of iterables", "file of batches"):
        options["batch_size"] = 20
    if case == "group init":
        options["init"] = x[:K].clone()
    if last and case in ("n_clusters", "seed", "max_iter", "n_init", "batch_size"):
        options[case] = 9
    if last and case == "metric":
        options["metric"] = "cosine"
    if last and case == "tol":
        options["tol"] = 0.5
    if last and case == "init":
        options["init"] = "random"
    if last and case == "group init":
        options["init"][0, 0] += 1
    if last and case == "NaN":
        x[17, 3] = torch.nan
    if last and case == "width":
        x = x[:, :-1]
    if last and case == "dtype":
        x = x.double()
    if last and case == "none":
        x = None
    if last and case == "impl":
        options["impl"] = "faiss"
    if case == "large":
        x = x.double()
        x[5, 5] = 1e160 if last else 0
    sample_weight: Any = None
    if "sample_weight" in case and (last or case != "sample_weight"):
        sample_weight = torch.zeros(200) if case == "zero sample_weight" else torch.ones(200)
        sample_weight[5] = -1 if last and case == "negative sample_weight" else sample_weight[5]
    kmeans = KMeans(**options, group=dist.group.WORLD)
    if case == "start" and rank == 0:
        mock.patch.object(api, "initial_centers", mock.Mock(side_effect=RuntimeError("out of memory"))).start()
    if last and case in ("iterable", "raising iterable"):
        x = Changing(x, 4, KeyError("gone") if case == "raising iterable" else None)
    if last and "file" in case:
        np.save(path, x.numpy())
        x = np.load(path, mmap_mode="r")
        size = Path(path).stat().st_size
        if case == "file":
            with open(path, "r+b") as file:
                file.truncate(size - 70 * D * 4)
        else:  # during the fit
            survey = Dataset.survey

            def survey_and_truncate(self: Dataset, middle: Tensor) -> Any:
                found = survey(self, middle)
                with open(path, "r+b") as file:
                    file.truncate(size - 150 * D * 4)
                return found

            mock.patch.object(Dataset, "survey", survey_and_truncate).start()
    try:
        with mock.patch.object(initial, "SAMPLE_ROWS", 50 if case == "file of batches" else 1 << 16):
            kmeans.fit(x, sample_weight=sample_weight)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        mock.patch.stopall()
    return "no error"


# Messages of all ranks, or of the first ranks and of the last one if they differ.
ERRORS = {
    "n_clusters": (
        "ValueError: n_clusters must be alike on every rank of the group: got 7 on rank 0 and 9 on rank LAST",
    ),
    "metric": ("ValueError: metric must be alike on every rank of the group: got 'euclidean' on rank 0",),
    "init": ("ValueError: init must be alike on every rank of the group: got 'k-means++' on rank 0 and 'random'",),
    "group init": (
        "ValueError: init must be alike on every rank of the group: got 'centres [7, 12] of torch.float32, ",
    ),
    "n_init": ("ValueError: n_init must be alike on every rank of the group: got 1 on rank 0 and 9 on rank LAST",),
    "max_iter": (
        "ValueError: max_iter must be alike on every rank of the group: got 100 on rank 0 and 9 on rank LAST",
    ),
    "tol": ("ValueError: tol must be alike on every rank of the group: got 0.0001 on rank 0 and 0.5 on rank LAST",),
    "batch_size": ("ValueError: batch_size must be alike on every rank of the group: got None on rank 0 and 9",),
    "seed": ("ValueError: seed must be alike on every rank of the group: got 0 on rank 0 and 9 on rank LAST",),
    "sample_weight": (
        "ValueError: sample_weight must be alike on every rank of the group: got None on rank 0 and 'given' on rank",
    ),
    "negative sample_weight": (
        "OtherRankError: rank LAST of the group met an error: ValueError: sample_weight must be finite and at least 0",
        "ValueError: sample_weight must be finite and at least 0: got -1.0 in row 5",
    ),
    "zero sample_weight": ("ValueError: sample_weight must be positive for a row: got zero for all ",),
    "width": (
        "ValueError: x must be alike on every rank of the group: got [rows, 12] float32 on rank 0 and [rows, 11]",
    ),
    "dtype": ("ValueError: x must be alike on every rank of the group: got [rows, 12] float32 on rank 0 and ",),
    "rows": ("ValueError: n_clusters must be at most the number of rows: got ",),
    "large": ("ValueError: x must be at most ",),
    "none": (
        "OtherRankError: rank LAST of the group met an error: TypeError: x must be a tensor, an array or an iterable",
        "TypeError: x must be a tensor, an array or an iterable of chunks of rows: got NoneType",
    ),
    "batch_size of iterables": (
        "OtherRankError: rank LAST of the group met an error: ValueError: batch_size with a group draws rows of x",
        "ValueError: batch_size with a group draws rows of x: got an iterable, which is read in order",
    ),
    "NaN": (
        "OtherRankError: rank LAST of the group met an error: ValueError: x must be finite: got NaN or infinity in",
        "ValueError: x must be finite: got NaN or infinity in row 17",
    ),
    "file": (
        "OtherRankError: rank LAST of the group met an error: ValueError: x ends in row 130 of 200",
        "ValueError: x ends in row 130 of 200",
    ),
    "file of batches": (
        "OtherRankError: rank LAST of the group met an error: ValueError: x ends in row ",
        "ValueError: x ends in row ",
    ),
    "later in a file": (
        "OtherRankError: rank LAST of the group met an error: ValueError: x ends in row 50 of 200",
        "ValueError: x ends in row 50 of 200",
    ),
    "iterable": (
        "OtherRankError: rank LAST of the group met an error: ValueError: x must yield the same rows in every pass",
        "ValueError: x must yield the same rows in every pass: got 190 after 200",
    ),
    "raising iterable": (
        "OtherRankError: rank LAST of the group met an error: KeyError: 'gone'",
        "KeyError: 'gone'",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_raised_on_every_rank(ranks: RankPool, tmp_path: Path, case: str) -> None:
    *others, last = ranks.run(error_of_fit, case, str(tmp_path / "x.npy"))
    messages = [message.replace("LAST", str(ranks.world_size - 1)) for message in ERRORS[case]]
    for error in others:
        assert error.startswith(messages[0])
    assert last.startswith(messages[-1])


def test_an_error_of_the_first_rank_alone(ranks: RankPool) -> None:
    first, *others = ranks.run(error_of_fit, "start", "")
    assert first == "RuntimeError: out of memory"
    assert set(others) == {"OtherRankError: rank 0 of the group met an error: RuntimeError: out of memory"}
