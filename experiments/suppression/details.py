"""Details of a run that only the report's figures need: a JSON file in the run's own directory."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from experiments.suppression.evaluation import Neighbours
from experiments.suppression.settings import RunSettings
from mcl_kernels._durable import replace_file


@dataclass(frozen=True)
class Details:
    """Details of a run; the lists have one entry for each encoder.

    Attributes:
        curves: mean loss of each epoch.
        label_sizes: number of samples of each pseudo label during training.
        cluster_sizes: number of samples of each cluster found after training.
    """

    curves: list[list[float]]
    label_sizes: list[list[int]]
    cluster_sizes: list[list[int]]
    neighbours: Neighbours


def run_directory(settings: RunSettings, directory: Path) -> Path:
    """Directory of a run's stages, unfinished training and details below `directory`."""
    return directory / "suppression" / settings.data / settings.file_name


def details_path(settings: RunSettings, directory: Path) -> Path:
    return run_directory(settings, directory) / "details.json"


def write_details(details: Details, settings: RunSettings, directory: Path) -> None:
    replace_file(details_path(settings, directory), (json.dumps(asdict(details), indent=1) + "\n").encode())


def read_details(settings: RunSettings, directory: Path) -> Details | None:
    """Returns the details of a run; None if it was trained elsewhere.

    Raises:
        ValueError: a damaged file, which is named.
    """
    path = details_path(settings, directory)
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        return Details(**{**content, "neighbours": Neighbours(**content["neighbours"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} does not hold the details of a run ({error}); delete it to measure again") from None
