"""Evaluation of frozen encoders: probes, agreement of clusters, nearest neighbours, retrieval."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.suppression.data.dataset import Dataset
from experiments.suppression.results import RECALL_AT, Probes, Recall
from mcl_kernels import positive_ranks
from mcl_kernels.cli.demo import nearest

N_ANCHORS = 5


@dataclass(frozen=True)
class Neighbours:
    """Nearest neighbours of some held-out anchors among the held-out samples, by each encoder.

    Attributes:
        pictures: base64 PNGs of all samples shown.
        anchors: positions in `pictures`, [A].
        indices: positions in `pictures`, [encoders][A][neighbours].
        agreement: share of each feature that a neighbour has in common with its anchor, in the shape of `indices`.
    """

    pictures: list[str]
    anchors: list[int]
    indices: list[list[list[int]]]
    agreement: list[list[list[Probes]]]


def probe(features: Tensor, data: Dataset) -> Probes:
    """Held-out accuracy of each of the data's features, by logistic regression on standardised, frozen features.

    The accuracy of a feature with several columns (the bits of a code) is the mean over its columns.

    Args:
        features: features of all samples, [N, D].
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x = features.double().numpy()
    x = StandardScaler().fit(x[data.train]).transform(x)
    accuracies = {}
    for name, target in data.features.items():
        columns = []
        for column in target.reshape(len(target), -1).T:
            train, test = (part[column[part] >= 0] for part in (data.train, data.test))
            classifier = LogisticRegression(max_iter=1000, tol=1e-3).fit(x[train], column[train])
            columns.append(classifier.score(x[test], column[test]))
        accuracies[name] = float(np.mean(columns))
    return accuracies


def cluster_agreement(clusters: Sequence[Tensor]) -> list[list[float]]:
    """Adjusted mutual information of each pair of clusterings: 0 is chance, 1 the same clusters."""
    from sklearn.metrics import adjusted_mutual_info_score

    return [[float(adjusted_mutual_info_score(a, b)) for b in clusters] for a in clusters]


def find_neighbours(features: Sequence[Tensor], data: Dataset, seed: int) -> Neighbours:
    """Finds the nearest neighbours of `N_ANCHORS` random held-out samples.

    Args:
        features: features of all samples by each encoder, [N, D] each.
    """
    chosen = torch.from_numpy(np.random.default_rng(seed).choice(len(data.test), N_ANCHORS, replace=False))
    anchors = data.test[chosen]
    found = data.test[torch.stack([nearest(x[data.test], chosen) for x in features])]  # [encoders, anchors, neighbours]
    shown, positions = torch.unique(torch.cat((anchors, found.flatten())), return_inverse=True)

    def agreement(anchor: Tensor, sample: Tensor) -> Probes:
        return {name: float((x[anchor] == x[sample]).double().mean()) for name, x in data.features.items()}

    return Neighbours(
        pictures=[_png(data.picture(int(index))) for index in shown],
        anchors=positions[:N_ANCHORS].tolist(),
        indices=positions[N_ANCHORS:].reshape(found.shape).tolist(),
        agreement=[
            [[agreement(anchor, sample) for sample in row] for anchor, row in zip(anchors, rows, strict=True)]
            for rows in found
        ],
    )


def recall(images: Tensor, texts: Tensor) -> Recall:
    """Recall at 1, 5 and 10 of captions by images and of images by captions, [N, D] each; row i of both is a pair.

    Identical rows share their rank: each counts as found if one of them is, since captions may have the same words.
    """
    images, texts = F.normalize(images, dim=1), F.normalize(texts, dim=1)
    ranks = {"image_to_text": positive_ranks(images, texts), "text_to_image": positive_ranks(texts, images)}
    return {way: [float((ranks[way] < k).double().mean()) for k in RECALL_AT] for way in ranks}


def _png(picture: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
