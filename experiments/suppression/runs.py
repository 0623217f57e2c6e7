"""One run, from its settings to its row of results: trains missing encoders, measures, writes."""

from __future__ import annotations

import json
import platform
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.conditions import conditions
from experiments.suppression.data import open_dataset
from experiments.suppression.data.dataset import Dataset
from experiments.suppression.details import Details, details_path, run_directory, write_details
from experiments.suppression.evaluation import cluster_agreement, find_neighbours, probe, recall
from experiments.suppression.methods import CLIP, METHODS, SimCLR
from experiments.suppression.results import PACKAGES, EncoderResult, Retrieval, RunResult, add_result, read_results
from experiments.suppression.settings import RunSettings
from experiments.suppression.train import train
from mcl_kernels import MultistageRunner, model_soup
from mcl_kernels._durable import check_writable, replace_file


def start_process() -> None:
    """Limits a process to one thread, and lets an interrupt end it before it begins another run."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def unfinished(
    wanted: Sequence[RunSettings], results: Path, directory: Path, *, details: bool = False
) -> list[RunSettings]:
    """Returns the runs that have no row of results or, if details are wanted, no details in `directory`."""
    finished = {result.settings for result in read_results(results)}
    if details:
        finished = {settings for settings in finished if details_path(settings, directory).exists()}
    return [settings for settings in wanted if settings not in finished]


def run(settings: RunSettings, results: Path, directory: Path) -> None:
    """Trains, measures, and writes the details and then the row of a run. Resumes a run that was interrupted.

    Args:
        results: the CSV.
        directory: directory of raw data, caches and trained stages.

    Raises:
        ValueError: settings that do not fit the data, or stages of other settings under this name.
        OSError: data that are missing (the message has the command that gets them), files that cannot be written.
    """
    check_writable(results.parent)
    data = open_dataset(settings.data, samples=settings.samples, seed=settings.seed, directory=directory / "data")
    own_directory = run_directory(settings, directory)
    _claim(own_directory, settings)
    runner = MultistageRunner(
        len(data.train),
        n_stages=settings.encoders,
        n_clusters=settings.clusters,
        seed=settings.seed,
        directory=own_directory,
    )
    train_stages(settings, data, runner, own_directory / "unfinished.pt")
    result, details = measure(settings, data, runner)
    write_details(details, settings, directory)
    add_result(results, result)


def _claim(directory: Path, settings: RunSettings) -> None:
    """Writes the settings into the directory of a run. Refuses one with other settings, as after a changed default."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "settings.json"
    if path.exists():
        found = json.loads(path.read_text())
        differing = [name for name, value in asdict(settings).items() if found.get(name) != value]
        if differing:
            raise ValueError(f"{directory} holds another run: {', '.join(differing)} differ; delete it to run again")
    replace_file(path, json.dumps(asdict(settings), indent=1).encode())


def train_stages(settings: RunSettings, data: Dataset, runner: MultistageRunner, checkpoint: Path) -> None:
    """Trains the encoders that are missing, each as a stage of the runner."""
    for stage in runner:
        # Pseudo labels are for MCL alone. Members of an ensemble are all trained like a first stage.
        labels = stage.labels[:] if settings.regime == "mcl" else torch.zeros(len(data.train), dtype=torch.int64)
        previous = runner.finished[-1].state if settings.start == "previous" and runner.finished else None
        start = None if previous is None else previous["model"]
        model, training = train(data, settings, stage.index, labels, start, checkpoint)
        clustered = embed(model, data, data.train, settings.layer)
        # The commit of a run is the one at which it is measured; an encoder may be older.
        trained = {**vars(training), "commit": conditions(torch.device("cpu"))["commit"]}
        stage.finish(clustered, state={"model": model.state_dict(), "training": trained})
        checkpoint.unlink(missing_ok=True)
        print(
            f"{settings.data} {settings.name} seed {settings.seed}: encoder {stage.index}, "
            f"loss {training.curve[-1]:.3f}, {training.seconds:.0f} s",
            flush=True,
        )


def measure(settings: RunSettings, data: Dataset, runner: MultistageRunner) -> tuple[RunResult, Details]:
    """Measures a run from its finished stages."""
    stages = runner.finished
    states = [stage.state or {} for stage in stages]
    models = [restore(data, settings, state["model"]) for state in states]
    everything = torch.arange(len(next(iter(data.features.values()))))
    features = [embed(model, data, everything, "backbone") for model in models]
    side_by_side = torch.cat(features, dim=1)
    encoders = [
        EncoderResult(
            probes=probe(own_features, data),
            seconds=state["training"]["seconds"],
            loss_seconds=state["training"]["loss_seconds"],
            clustering_seconds=stage.statistics["clustering_seconds"],
            commit=state["training"].get("commit", ""),
        )
        for own_features, state, stage in zip(features, states, stages, strict=True)
    ]
    soup = None
    if settings.start == "previous" and len(models) > 1:
        averaged = model_soup([state["model"] for state in states])
        soup = refresh_statistics(restore(data, settings, averaged), data)
    recorded = conditions(torch.device("cpu"))
    result = RunResult(
        settings=settings,
        commit=recorded["commit"],
        versions={"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
        processor=recorded["processor"],
        threads=torch.get_num_threads(),
        train_samples=len(data.train),
        test_samples=len(data.test),
        dimensions=side_by_side.shape[1],
        classes={name: int(x.max()) + 1 for name, x in data.features.items()},
        encoders=encoders,
        ami=cluster_agreement([stage.clusters for stage in stages]),
        concatenation=probe(side_by_side, data) if len(models) > 1 else encoders[0].probes,
        soup=None if soup is None else probe(embed(soup, data, everything, "backbone"), data),
        retrieval=retrieve(models, soup, data),
    )
    plain_labels = [len(data.train)]  # one label for all samples
    mcl_labels = [plain_labels, *(stage.statistics["label_sizes"] for stage in stages[:-1])]
    details = Details(
        curves=[state["training"]["curve"] for state in states],
        label_sizes=mcl_labels if settings.regime == "mcl" else [plain_labels] * len(models),
        cluster_sizes=[stage.statistics["cluster_sizes"] for stage in stages],
        neighbours=find_neighbours(features, data, settings.seed),
    )
    return result, details


def restore(data: Dataset, settings: RunSettings, state: Mapping[str, Tensor]) -> SimCLR:
    """Returns a model with these weights, in evaluation mode."""
    model = METHODS[settings.objective](data, settings)
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def refresh_statistics(soup: SimCLR, data: Dataset) -> SimCLR:
    """Computes the batch statistics of averaged weights anew: averaged statistics fit none of the models."""
    torch.manual_seed(soup.settings.seed)  # the views, and so the result, are the same at each measurement
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
    """Features of samples without augmentation, [len(index), D]."""
    return torch.cat([model.features(data.plain(part), layer) for part in index.split(1000)])


@torch.no_grad()
def retrieve(models: list[SimCLR], soup: SimCLR | None, data: Dataset) -> Retrieval | None:
    """Recall among the held-out pairs; None for a method without captions.

    The concatenation joins raw features and normalises once, as in the paper's code.
    """
    pairs = [_pairs(model, data) for model in models if isinstance(model, CLIP)]
    if not pairs:
        return None
    images, texts = (torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True))
    return Retrieval(
        encoders=[recall(*pair) for pair in pairs],
        concatenation=recall(images, texts),
        soup=recall(*_pairs(soup, data)) if isinstance(soup, CLIP) else None,
    )


def _pairs(model: CLIP, data: Dataset) -> tuple[Tensor, Tensor]:
    """Features of the held-out images and of their captions."""
    return embed(model, data, data.test, "projection"), model.text_features(data.test)
