"""Emoji of experiments/suppression: bases, attributes, vendors and captions."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch

from experiments.suppression.data import emoji, open_dataset
from tests.suppression_archives import EMOJI, TONES, make_archives


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_archives(tmp_path, monkeypatch)


def test_variants_of_an_emoji_have_the_same_base() -> None:
    for group in (
        ("1f469-1f3fd-200d-1f692", "1f468-200d-1f692", "1f9d1-1f3ff-200d-1f692"),
        ("1f3c3", "1f3c3-200d-2640-fe0f", "1f3c3-1f3fb-200d-2642-fe0f-200d-27a1-fe0f", "1f3c3-200d-27a1-fe0f"),
        ("1f46b", "1f46c-1f3fb", "1f9d1-200d-1f91d-200d-1f9d1", "1f469-1f3fb-200d-1f91d-200d-1f468-1f3ff"),
        ("1f48f", "1f468-200d-2764-fe0f-200d-1f48b-200d-1f468"),
        ("1f491", "1f469-200d-2764-fe0f-200d-1f469"),
        ("1f46a", "1f468-200d-1f469-200d-1f467-200d-1f466", "1f9d1-200d-1f9d2"),
        ("1f91d-1f3fb", "1faf1-1f3fb-200d-1faf2-1f3ff"),
        ("1f385", "1f936-1f3fb", "1f9d1-200d-1f384"),
        ("1f934", "1f478", "1fac5"),
        ("1f466", "1f467", "1f9d2"),
    ):
        assert len({emoji.base_of(emoji.code_points(name).split()) for name in group}) == 1, group
    signs = ("2640", "2642", "27a1", "1f3fb", "1f3ff", "1f468", "1f466", "1f692", "1f468-200d-1f373", "1f1e6-1f1e8")
    assert len({emoji.base_of(emoji.code_points(name).split()) for name in signs}) == len(signs)


@pytest.mark.parametrize("name", ["emoji", "emoji-captions"])
def test_emoji_are_split_by_base(directory: Path, name: str) -> None:
    data = open_dataset(name, directory=directory)
    bases = [emoji.base_of(codes) for codes in data.codes]
    trained, held_out = ({bases[sample] for sample in part.tolist()} for part in (data.train, data.test))
    assert not trained & held_out
    roles = {base for base in held_out if base.startswith("1F9D1")}
    assert len(roles) == 1  # of five
    assert all(bases.count(base) == 18 for base in roles)
    flags = 0 if name == "emoji-captions" else 21
    assert len(data.train) + len(data.test) == len(EMOJI) - 21 + flags


def test_attributes_of_emoji(directory: Path) -> None:
    data = open_dataset("emoji", directory=directory)
    found = {" ".join(codes): i for i, codes in enumerate(data.codes)}
    for name in EMOJI:
        codes = emoji.code_points(name)
        sample = found[codes]
        person = name.startswith(("1f9d1", "1f468", "1f469"))
        tone = next((t for t, text in enumerate(TONES) if text and text in name), 0) if person else -1
        gender = {"1f9d1": 0, "1f469": 1, "1f468": 2}.get(name[:5], -1)
        assert data.features["skin_tone"][sample] == tone, name
        assert data.features["gender"][sample] == gender, name
    # Too few bases: one heart, and five roles of people.
    classes = data.features["category"]
    assert classes[found["2764"]] == -1
    assert classes[found["1F9D1 200D 1F692"]] == -1
    assert {int(classes[found[emoji.code_points(name)]]) for name in EMOJI if name.startswith("1f1e6")} == {0}
    assert {int(classes[found[emoji.code_points(name)]]) for name in EMOJI if name.startswith("1f49")} == {1}


def test_several_people_have_no_gender_and_mixed_tones_none() -> None:
    names = ["1f46f", "1f46f-200d-2640", "1f469-1f3fb-200d-1f91d-200d-1f468-1f3ff", "1f46b", "1f46b-1f3fb", "1f4a9"]
    codes = [emoji.code_points(name).split() for name in names]
    bases = [emoji.base_of(one) for one in codes]
    assert emoji.genders(codes, bases).tolist() == [0, 1, -1, -1, -1, -1]
    assert emoji.skin_tones(codes, bases).tolist() == [-1, -1, -1, 0, 1, -1]


def test_views_are_of_two_vendors_in_either_order(directory: Path) -> None:
    data = open_dataset("emoji", directory=directory)
    index = data.train[:64]
    view_a, view_b = data.views(index)
    red_a, red_b = (view[:, 0, 16, 16] + 1 for view in (view_a, view_b))
    assert torch.allclose(red_a + red_b, torch.tensor(300 / 255), atol=1e-3)
    assert 10 < (red_a > red_b).sum() < 54
    for view in (view_a, view_b):  # green identifies the emoji
        assert torch.allclose(view[:, 1, 16, 16], data.plain(index)[:, 1, 16, 16], atol=1e-3)
    assert torch.allclose(data.plain(index)[:, 0, 16, 16] + 1, torch.tensor(200 / 255), atol=1e-3)
    assert data.plain(index)[:, :, 0, 0].abs().max() == 0  # transparent pixels are white
    captioned = open_dataset("emoji-captions", directory=directory)
    for view in captioned.views(captioned.train[:64]):
        assert torch.allclose(view[:, 0, 16, 16] + 1, torch.tensor(200 / 255), atol=1e-3)


def test_words_that_are_in_no_training_caption_are_word_0(directory: Path) -> None:
    data = open_dataset("emoji-captions", directory=directory)
    words = defaultdict(set)
    for text, row in zip(data.texts, data.captions.tolist(), strict=True):
        assert all(token == -1 for token in row[len(text) :])
        for word, token in zip(text, row, strict=False):
            words[word].add(token)
    assert all(len(ids) == 1 for ids in words.values())
    trained = {word for sample in data.train.tolist() for word in data.texts[sample]}
    assert {word for word, ids in words.items() if ids == {0}} == set(words) - trained
    assert sorted(token for ids in words.values() for token in ids if token > 0) == list(range(1, data.vocabulary))
    assert not data.captions[data.train].eq(0).any()
    toned = data.codes.index(["1F469", "1F3FB", "200D", "1F692"])
    assert data.texts[toned] == ["woman", "1f692", "1f3fb", "tone", "one", "two"]  # tags of the emoji without tone
