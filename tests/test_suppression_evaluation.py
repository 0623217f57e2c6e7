"""Evaluation in experiments/suppression: probes, agreement of clusters, nearest neighbours, retrieval."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from experiments.suppression.evaluation import cluster_agreement, find_neighbours, probe, recall
from experiments.suppression.results import RECALL_AT
from tests.suppression_tiny import TinyDataset


def test_probes_of_known_and_unknown_features():
    data = TinyDataset()
    n = len(data.features["place"])
    place, bright = data.features["place"], data.features["bright"]
    assert probe(F.one_hot(place, 3).float(), data)["place"] == 1.0
    noise = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    half = probe(torch.cat((bright[:, :1].float() * 9 + 0.1 * noise[:, :1], noise[:, 1:]), dim=1), data)["bright"]
    assert 0.5 < half < 1.0  # one of two columns is in the features
    unknown = place.clone()
    unknown[::2] = -1
    data.features["place"] = unknown
    known = data.test[unknown[data.test] >= 0]
    wrong = F.one_hot(place, 3).float()
    wrong[known[0]] = wrong[known[0]].roll(1)
    assert probe(wrong, data)["place"] == pytest.approx(1 - 1 / len(known))


def test_agreement_of_clusters_is_1_for_renamed_ones_and_0_for_chance():
    clusters = torch.arange(60) % 3
    assert cluster_agreement([clusters, (clusters + 1) % 3]) == [[pytest.approx(1)] * 2] * 2
    random = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(0))
    assert abs(cluster_agreement([clusters, random])[0][1]) < 0.1


def test_neighbours_are_the_most_similar_held_out_samples():
    data = TinyDataset(96)  # enough held-out samples of each place
    features = F.one_hot(data.features["place"], 3).float()
    found = find_neighbours([features], data, seed=0)
    assert all(shares["place"] == 1.0 for row in found.agreement[0] for shares in row)
    assert all(anchor not in row for anchor, row in zip(found.anchors, found.indices[0], strict=True))
    assert len(found.pictures) == len({*found.anchors, *np.ravel(found.indices)})


def test_recall_is_that_of_brute_force():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(30, 5, generator=generator)
    texts = images + torch.randn(30, 5, generator=generator)
    got = recall(images, texts)
    similarity = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    for way, s in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        order = s.argsort(dim=1, descending=True)
        expected = [sum(i in order[i, :k] for i in range(30)) / 30 for k in RECALL_AT]
        assert got[way] == pytest.approx(expected)
    assert got["image_to_text"][0] < got["image_to_text"][-1] < 1.0
