"""What is measured of frozen encoders: probes, agreement of clusters, neighbours, retrieval."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.suppression.data.dataset import Dataset
from mcl_kernels import positive_ranks
from mcl_kernels.cli.demo import nearest

N_ANCHORS = 5
Numbers = dict[str, float]


def probe(features: Tensor, data: Dataset) -> Numbers:
    """Held-out accuracy of each of the data's features, by logistic regression on standardised, frozen features.

    A feature of several columns (the bits of a code) counts as the mean of their accuracies.

    Args:
        features: of all samples, [N, D].
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


def agreement(clusters: Sequence[Tensor]) -> list[list[float]]:
    """Adjusted mutual information of each pair of clusterings; 0 is chance, 1 the same clusters."""
    from sklearn.metrics import adjusted_mutual_info_score

    return [[float(adjusted_mutual_info_score(a, b)) for b in clusters] for a in clusters]


def neighbours(features: Sequence[Tensor], data: Dataset, seed: int) -> dict[str, Any]:
    """The nearest neighbours of some held-out anchors among the held-out samples, by each encoder, with pictures.

    Args:
        features: of all samples by each encoder, [N, D] each.
    """
    chosen = np.random.default_rng(seed).choice(len(data.test), N_ANCHORS, replace=False)
    anchors = torch.from_numpy(chosen)
    found = data.test[torch.stack([nearest(x[data.test], anchors) for x in features])]  # [encoders, anchors, 3]
    shown, positions = torch.unique(torch.cat((data.test[anchors], found.flatten())), return_inverse=True)

    def agree(anchor: Tensor, sample: Tensor) -> Numbers:
        return {name: float((x[anchor] == x[sample]).double().mean()) for name, x in data.features.items()}

    agreeing = [
        [[agree(anchor, sample) for sample in row] for anchor, row in zip(data.test[anchors], of_one, strict=True)]
        for of_one in found
    ]
    return {
        "pictures": [_png(data.picture(int(index))) for index in shown],
        "anchors": positions[:N_ANCHORS].tolist(),
        "indices": positions[N_ANCHORS:].reshape(found.shape).tolist(),
        "agree": agreeing,
    }


def retrieval(images: Tensor, texts: Tensor) -> dict[str, Numbers]:
    """R@1, 5 and 10 of captions by images and of images by captions; row i of both is a pair. [N, D] each.

    Of rows that are exactly alike each counts as found where one is: captions may be the same words.
    """
    images, texts = F.normalize(images, dim=1), F.normalize(texts, dim=1)
    both = {"image_to_text": (images, texts), "text_to_image": (texts, images)}
    ranks = {way: positive_ranks(query, key) for way, (query, key) in both.items()}
    return {way: {str(k): float((rank < k).double().mean()) for k in (1, 5, 10)} for way, rank in ranks.items()}


def _png(picture: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
