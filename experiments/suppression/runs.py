"""A run from its settings to its JSON: train what is missing, measure, write."""

from __future__ import annotations

import json
import platform
import signal
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.conditions import conditions
from experiments.suppression.data import open_dataset
from experiments.suppression.data.dataset import Dataset
from experiments.suppression.measures import agreement, neighbours, probe, retrieval
from experiments.suppression.methods import CLIP, METHODS, SimCLR
from experiments.suppression.settings import Settings
from experiments.suppression.train import train
from mcl_kernels import MultistageRunner, model_soup
from mcl_kernels._durable import check_writable, replace_file

PACKAGES = ("torch", "numpy", "scikit-learn")


def start_process() -> None:
    """One thread for each run; an interrupt ends the process, which would else take up the next run."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def path_of(settings: Settings, results: Path) -> Path:
    """Where the JSON of a run is, or will be."""
    return results / settings.data / f"{settings.file_name}.json"


def run(settings: Settings, results: Path, directory: Path) -> Path:
    """Trains and measures unless its JSON is there; killed, the same call goes on.

    Args:
        results: of the JSONs.
        directory: of raw data, caches and unfinished runs.

    Raises:
        ValueError: settings that do not fit the data, or a JSON of other settings under this name.
        OSError: data that are missing (the command that gets them is named), files that cannot be written.
    """
    path = path_of(settings, results)
    if path.exists():
        there = json.loads(path.read_text())["settings"]
        if there != asdict(settings):
            raise _another_run(path, there, settings)
        return path
    check_writable(path.parent)
    data = open_dataset(settings.data, samples=settings.samples, seed=settings.seed, directory=directory / "data")
    work = directory / "suppression" / settings.data / settings.file_name
    work.mkdir(parents=True, exist_ok=True)
    described = work / "settings.json"  # a run of other settings under this name is not gone on with
    if described.exists() and (there := json.loads(described.read_text())) != asdict(settings):
        raise _another_run(work, there, settings)
    replace_file(described, json.dumps(asdict(settings), indent=1).encode())
    runner = MultistageRunner(
        len(data.train), n_stages=settings.encoders, n_clusters=settings.clusters, seed=settings.seed, directory=work
    )
    for stage in runner:
        # Only MCL's stages know of one another; everything else is trained as its first stage.
        labels = stage.labels[:] if settings.regime == "mcl" else torch.zeros(len(data.train), dtype=torch.int64)
        previous = runner.finished[-1].state if settings.start == "previous" and runner.finished else None
        start = None if previous is None else previous["model"]
        model, training = train(data, settings, stage.index, labels, start, work / "unfinished.pt")
        clustered = embed(model, data, data.train, settings.layer)
        # That of the JSON is where it was measured.
        trained = {**vars(training), "commit": conditions(torch.device("cpu"))["commit"]}
        stage.finish(clustered, state={"model": model.state_dict(), "training": trained})
        (work / "unfinished.pt").unlink(missing_ok=True)
        print(f"{settings.data} {settings.name} seed {settings.seed}: encoder {stage.index}, "
              f"loss {training.curve[-1]:.3f}, {training.seconds:.0f} s", flush=True)  # fmt: skip
    replace_file(path, (json.dumps(measure(settings, data, runner), indent=1) + "\n").encode())
    return path


def _another_run(path: Path, there: dict[str, Any], settings: Settings) -> ValueError:
    differing = [name for name, value in asdict(settings).items() if there.get(name) != value]
    return ValueError(f"{path} holds another run: {', '.join(differing)} differ; delete it to run again")


def measure(settings: Settings, data: Dataset, runner: MultistageRunner) -> dict[str, Any]:
    """The content of a run's JSON, from its finished stages alone."""
    states = [done.state or {} for done in runner.finished]
    models = [restore(data, settings, state["model"]) for state in states]
    everything = torch.arange(len(next(iter(data.features.values()))))
    features = [embed(model, data, everything, "backbone") for model in models]
    joined = torch.cat(features, dim=1)
    sizes = [[len(data.train)], *(done.statistics["label_sizes"] for done in runner.finished)]
    noun = {"mcl": "stage", "ensemble": "member"}.get(settings.regime or "", "encoder")
    encoders = [
        {
            "name": f"{noun} {done.index}" if len(models) > 1 else noun,
            "probes": probe(features[done.index], data),
            "label_sizes": sizes[done.index] if settings.regime == "mcl" else sizes[0],
            "cluster_sizes": done.statistics["cluster_sizes"],
            "clustering_seconds": done.statistics["clustering_seconds"],
            **states[done.index]["training"],
        }
        for done in runner.finished
    ]
    soup = None
    if settings.start == "previous" and len(models) > 1:
        soup = cook(restore(data, settings, model_soup([state["model"] for state in states])), data)
    recorded = conditions(torch.device("cpu"))
    return {
        "settings": asdict(settings),
        "name": settings.name,
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
        "processor": recorded["processor"],
        "threads": torch.get_num_threads(),
        "commit": recorded["commit"],
        "samples": {"train": len(data.train), "test": len(data.test)},
        "classes": {name: int(x.max()) + 1 for name, x in data.features.items()},
        "width": joined.shape[1],
        "encoders": encoders,
        "ami": agreement([done.clusters for done in runner.finished]),
        "concatenation": probe(joined, data) if len(models) > 1 else encoders[0]["probes"],
        "soup": None if soup is None else probe(embed(soup, data, everything, "backbone"), data),
        "retrieval": retrieve(models, soup, data),
        # Pictures are most of a file, and the report shows those of one seed.
        "neighbours": neighbours(features, data, settings.seed) if settings.seed == 0 else None,
    }


def restore(data: Dataset, settings: Settings, state: Mapping[str, Tensor]) -> SimCLR:
    model = METHODS[settings.objective](data, settings)
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def cook(soup: SimCLR, data: Dataset) -> SimCLR:
    """Batch statistics of averaged weights, found anew: the average of the models' own belongs to none of them."""
    torch.manual_seed(soup.settings.seed)  # of the views: the same soup whenever it is measured
    norms = [module for module in soup.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    soup.train()
    for part in data.train.split(soup.settings.batch_size):
        soup(data.views(part), part)
    return soup.eval()


@torch.no_grad()
def embed(model: SimCLR, data: Dataset, index: Tensor, layer: str) -> Tensor:
    """Features of samples that are not augmented, [len(index), D]."""
    return torch.cat([model.features(data.plain(part), layer) for part in index.split(1000)])


@torch.no_grad()
def retrieve(models: list[SimCLR], soup: SimCLR | None, data: Dataset) -> dict[str, Any] | None:
    """Among the held-out pairs; the concatenation joins raw features and normalises once, as the paper's code."""
    pairs = [_pairs(model, data) for model in models if isinstance(model, CLIP)]
    if not pairs:
        return None
    joined = (torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True))
    return {
        "encoders": [retrieval(*pair) for pair in pairs],
        "concatenation": retrieval(*joined),
        "soup": retrieval(*_pairs(soup, data)) if isinstance(soup, CLIP) else None,
        "candidates": len(data.test),
    }


def _pairs(model: CLIP, data: Dataset) -> tuple[Tensor, Tensor]:
    return embed(model, data, data.test, "projection"), model.text_features(data.test)
