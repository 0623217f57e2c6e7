"""The directory of a run: its finished stages, in the format of `stages.files`."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mcl_kernels.distributed.group import OtherRankError
from mcl_kernels.stages import files as stage_files
from mcl_kernels.stages.files import stage_directory
from mcl_kernels.stages.finished_stage import ComposedStage, FinishedStage
from mcl_kernels.stages.run_ranks import RunRanks

VISIBILITY_TIMEOUT = 30.0  # seconds until a network file system shows a directory that another host has renamed


def read_new_stages(run: Path, finished: list[FinishedStage], n_stages: int, configuration: Mapping[str, Any]) -> None:
    """Appends the stages that the directory holds after those in `finished`, up to `n_stages`.

    Raises:
        ValueError: a stage of another configuration; the difference is named.
        RuntimeError: a damaged or missing file, or a missing stage before a later one.
    """
    # Listed first: a stage that another process finishes from here on is not taken for one after a gap.
    names = (re.fullmatch(r"stage-(\d+)", path.name) for path in run.glob("stage-*"))
    listed = [int(name[1]) for name in names if name]
    while len(finished) < n_stages and stage_directory(run, len(finished)).exists():
        found, stage = _read_stage(run, len(finished))
        _check_configuration(run, found, configuration)
        finished.append(stage)
    later = sorted(index for index in listed if index >= len(finished))
    if later and len(finished) < n_stages:
        missing = stage_directory(run, len(finished))
        raise RuntimeError(f"{missing} is missing, and stage-{later[0]} builds on it; restore it, or delete both")


def save_stage(
    run: Path, index: int, compose: Callable[[], ComposedStage], configuration: Mapping[str, Any], ranks: RunRanks
) -> FinishedStage:
    """Composes and writes a stage on the first rank; returns it on every rank, the others read its files.

    If a rank cannot read the stage, it is withdrawn, and every rank raises: `finish` can be called again.
    """
    written = ranks.run_on_first(lambda: _write_stage(run, compose(), configuration))
    try:
        return ranks.run_on_each(lambda: written or _read_when_visible(run, index))
    except OtherRankError:
        # Raised only if all ranks are alive. After any other error a rank may be dead: the next run needs the stage.
        if written is not None:
            stage_files.withdraw_stage(run, index)
        raise


def _write_stage(run: Path, stage: ComposedStage, configuration: Mapping[str, Any]) -> FinishedStage:
    arrays = {"centers": stage.centers, "tuples": stage.tuples, "labels": stage.labels}
    description = {"configuration": configuration, "statistics": stage.statistics}
    stage_files.write_stage(run, stage.index, arrays, stage.state, description)
    labels = stage_files.map_written_labels(run, stage.index, stage.labels)
    read_state = partial(stage_files.read_state, run, stage.index)
    return FinishedStage(stage.index, stage.centers, labels, stage.tuples, stage.statistics, read_state)


def _read_when_visible(run: Path, index: int) -> FinishedStage:
    """Reads a stage that the first rank has written, once this rank's file system shows it."""
    path, deadline = stage_directory(run, index), time.monotonic() + VISIBILITY_TIMEOUT
    while not path.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"directory must be one that all ranks see: this one finds no {path}, which was written")
        time.sleep(0.1)
    return _read_stage(run, index)[1]


def _read_stage(run: Path, index: int) -> tuple[dict[str, Any], FinishedStage]:
    """Returns the configuration of the run that wrote a stage, and the stage."""
    arrays, labels, description = stage_files.read_stage(run, index)
    statistics, read_state = description["statistics"], partial(stage_files.read_state, run, index)
    stage = FinishedStage(index, labels=labels, **arrays, statistics=statistics, _read_state=read_state)
    return description["configuration"], stage


def _check_configuration(run: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name in expected:
        if found[name] != expected[name]:
            raise ValueError(
                f"directory {run} holds a run of another configuration: "
                f"{name} is {found[name]!r} there and {expected[name]!r} here; choose another directory"
            )
