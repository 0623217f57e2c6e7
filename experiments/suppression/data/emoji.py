"""Emoji of two vendors, which are real positive pairs, and their captions.

Many emoji come in all combinations of skin tones and genders. These variants of one **base** look nearly the same and
share most of their captions, so that all of them are on one side of the split. Pictures are 64 x 64; the encoder sees
32 x 32, with views sampled from all pixels.
"""

from __future__ import annotations

import io
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from experiments.suppression.data.dataset import Dataset, stratified
from experiments.suppression.data.sources import cached_array, read_members
from mcl_kernels.cli.demo import random_affine

VENDORS = {"google": "emoji-datasource-google@16.0.0", "twitter": "emoji-datasource-twitter@16.0.0"}
CAPTIONS = "openmoji@17.0.0"
PIXELS, SIZE = 64, 32
HELD_OUT = 0.2  # share of the bases
MIN_BASES = 20  # of a category or subgroup that is probed

PRESENTATION, JOINER = "FE0F", "200D"
TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
SIGNS = {"2640": "woman", "2642": "man"}
TO_THE_RIGHT = "27A1"
GENDERS = ("person", "woman", "man")
PEOPLE = {  # people whose genders have characters of their own: person -> (woman, man)
    "1F9D1": ("1F469", "1F468"),
    "1F9D2": ("1F467", "1F466"),  # child
    "1F9D3": ("1F475", "1F474"),  # older person
    "1FAC4": ("1F930", "1FAC3"),  # pregnant
    "1FAC5": ("1F478", "1F934"),  # with a crown
    "1F385": ("1F936", "1F385"),  # Claus
    "1F483": ("1F483", "1F57A"),  # dancing
}
GENDER_OF = {code: gender for codes in PEOPLE.values() for code, gender in zip(codes, GENDERS[1:], strict=True)}
PERSON_OF = {code: person for person, codes in PEOPLE.items() for code in codes} | {"1F46C": "1F46B", "1F46D": "1F46B"}
SEQUENCES = {  # sequences with the meaning of one character
    "1F9D1 1F384": "1F385",
    "1F9D1 1F91D 1F9D1": "1F46B",  # holding hands
    "1F9D1 2764 1F9D1": "1F491",  # couple with heart
    "1F9D1 2764 1F48B 1F9D1": "1F48F",  # kiss
    "1FAF1 1FAF2": "1F91D",  # handshake
}
FAMILY = "1F46A"


class Emoji(Dataset):
    """Images [N, 3, 32, 32] in [-1, 0], one for each emoji: white is 0, the padding of `random_affine`.

    A view is rotated, scaled, sheared and shifted. `plain`, which is probed, is Google's picture of an emoji, so that
    the vendor is not a feature. Features:

    category, subgroup  of openmoji, if they have at least `MIN_BASES` bases
    skin_tone           0 none, 1 light to 5 dark; for emoji that come with tones, unless several tones are mixed
    gender              0 person, 1 woman, 2 man; for emoji of one person that come in several genders
    """

    excluded_subgroups: tuple[str, ...] = ()

    def __init__(self, name: str, *, directory: Path, samples: int | None = None) -> None:
        pictures = cached_array(directory / "cache" / f"emoji-{PIXELS}.npy", lambda: read_pictures(directory))
        emoji = read_openmoji(directory)
        self.codes = [str(code).split() for code in pictures["code"]]
        self.described = [emoji[" ".join(codes)] for codes in self.codes]
        by_vendor = np.stack([pictures[vendor] for vendor in VENDORS], axis=1)  # [N, vendors, PIXELS, PIXELS, 3]
        self.pixels = torch.from_numpy(np.moveaxis(by_vendor, -1, 2).copy())
        bases = [base_of(codes) for codes in self.codes]
        groups = np.array([one["group"] for one in self.described])
        kept = np.array([one["subgroups"] not in self.excluded_subgroups for one in self.described])
        train, test = (part[kept[part]] for part in split_bases(bases, groups))
        if samples is not None:
            train = train[stratified(groups[train], samples)]
        features = {
            "category": encode(groups, bases, kept),
            "subgroup": encode(np.array([one["subgroups"] for one in self.described]), bases, kept),
            "skin_tone": skin_tones(self.codes, bases),
            "gender": genders(self.codes, bases),
        }
        super().__init__(name, features, torch.from_numpy(train), torch.from_numpy(test), (3, SIZE, SIZE))

    def _view(self, index: Tensor, *, augmented: bool, vendor: Tensor | int = 0) -> Tensor:
        images = self.pixels[index, vendor].float().div(255) - 1
        return random_affine(images, (SIZE, SIZE)) if augmented else F.avg_pool2d(images, PIXELS // SIZE)

    def picture(self, index: int) -> np.ndarray:
        return self.pixels[index, 0].permute(1, 2, 0).numpy()


class EmojiPairs(Emoji):
    """One view is Google's picture and the other Twitter's, in an order drawn for each sample."""

    def views(self, index: Tensor) -> tuple[Tensor, Tensor]:
        vendor = torch.randint(0, 2, index.shape)
        both = self._view(index.repeat(2), augmented=True, vendor=torch.cat((vendor, 1 - vendor)))
        view_a, view_b = both.contiguous(memory_format=torch.channels_last).chunk(2)
        return view_a, view_b


class EmojiCaptions(Emoji):
    """Google's picture and its caption: openmoji's name of it, then its tags.

    Flags of countries are excluded: their captions differ in the country's name alone, which is an unknown word if the
    flag is held out. Word 0 stands for every word that is in no training caption.
    """

    excluded_subgroups = ("country-flag", "subdivision-flag")

    def __init__(self, name: str, *, directory: Path, samples: int | None = None) -> None:
        super().__init__(name, directory=directory, samples=samples)
        plain = {one["hexcode"]: one for one in self.described}
        self.texts = [caption_of(one, plain.get(one["skintone_base_hexcode"], one)) for one in self.described]
        known = sorted({word for sample in self.train.tolist() for word in self.texts[sample]})
        ids = {word: id_ for id_, word in enumerate(known, start=1)}
        self.vocabulary = 1 + len(ids)
        self.captions = torch.full((len(self.texts), max(map(len, self.texts))), -1)
        for row, words in zip(self.captions, self.texts, strict=True):
            row[: len(words)] = torch.tensor([ids.get(word, 0) for word in words])


def read_pictures(directory: Path) -> np.ndarray:
    """Pictures that both vendors have, on white: records of code points and of uint8 [64, 64, 3] by each vendor."""
    by_vendor = {}
    for vendor, package in VENDORS.items():
        folder = f"package/img/{vendor}/{PIXELS}/"
        members = read_members(directory, package, lambda name, folder=folder: name.startswith(folder))
        by_vendor[vendor] = {code_points(Path(name).stem): content for name, content in members.items()}
    codes = sorted(set.intersection(*(set(pictures) for pictures in by_vendor.values())))
    picture = (np.uint8, (PIXELS, PIXELS, 3))
    records = np.empty(len(codes), [("code", f"U{max(map(len, codes))}"), *((vendor, *picture) for vendor in VENDORS)])
    for record, code in zip(records, codes, strict=True):
        record["code"] = code
        for vendor, pictures in by_vendor.items():
            with Image.open(io.BytesIO(pictures[code])) as image:
                white = Image.new("RGBA", image.size, "white")
                record[vendor] = np.asarray(Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"))
    return records


def read_openmoji(directory: Path) -> dict[str, Any]:
    """Descriptions of the emoji by openmoji, by their code points."""
    (content,) = read_members(directory, CAPTIONS, lambda name: name == "package/data/openmoji.json").values()
    return {code_points(one["hexcode"]): one for one in json.loads(content)}


def code_points(name: str) -> str:
    """Code points of a file name or an emoji, in upper case, without the presentation selector that some names omit.

    >>> code_points("1f468-200d-2764-fe0f-200d-1f468")
    '1F468 200D 2764 200D 1F468'
    """
    return " ".join(code for code in name.upper().split("-") if code != PRESENTATION)


def base_of(codes: Sequence[str]) -> str:
    """Base of an emoji, the same for all its skin tones, genders and directions.

    >>> base_of(["1F469", "1F3FD", "200D", "1F692"]), base_of(["1F468", "200D", "1F692"])  # firefighters
    ('1F9D1 1F692', '1F9D1 1F692')
    """
    # A tone or a sign in the first position is an emoji itself.
    rest = [code for code in codes[1:] if code not in (JOINER, TO_THE_RIGHT, *SIGNS, *TONES)]
    people = [PERSON_OF.get(code, code) for code in (codes[0], *rest)]
    if len(people) > 1 and set(people) <= {"1F9D1", "1F9D2"}:
        return FAMILY
    base = " ".join(people)
    return SEQUENCES.get(base, base)


def split_bases(bases: Sequence[str], groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out samples: the same share of the bases of each group, with and without variants.

    The split is the same for every seed of a run, like the emoji themselves.
    """
    members = defaultdict(list)
    for sample, base in enumerate(bases):
        members[base].append(sample)
    kinds = np.array([f"{groups[samples[0]]}, {len(samples) > 1}" for samples in members.values()])
    chosen = set(stratified(kinds, round(HELD_OUT * len(members))).tolist())
    held_out = np.isin(np.arange(len(bases)), np.concatenate([list(members.values())[one] for one in chosen]))
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def encode(values: np.ndarray, bases: Sequence[str], kept: np.ndarray) -> Tensor:
    """Classes in alphabetical order, int64 [N]; -1 for a class with fewer than `MIN_BASES` kept bases."""
    class_bases = defaultdict(set)
    for sample in np.flatnonzero(kept):
        class_bases[values[sample]].add(bases[sample])
    classes = sorted(value for value, found in class_bases.items() if len(found) >= MIN_BASES)
    return torch.tensor([classes.index(value) if value in classes else -1 for value in values])


def skin_tones(codes: Sequence[Sequence[str]], bases: Sequence[str]) -> Tensor:
    """Skin tones, int64 [N]: 0 without a tone and 1 to 5 with one; -1 for a base without tones and for mixed tones."""
    tones = [{code for code in one[1:] if code in TONES} for one in codes]
    toned = {base for base, found in zip(bases, tones, strict=True) if found}
    return torch.tensor(
        [
            -1 if base not in toned or len(found) > 1 else 1 + TONES.index(*found) if found else 0
            for base, found in zip(bases, tones, strict=True)
        ]
    )


def genders(codes: Sequence[Sequence[str]], bases: Sequence[str]) -> Tensor:
    """Positions in `GENDERS`, int64 [N]; -1 for a base with one gender and for several people."""
    found = []
    for one in codes:
        people = [code for code in one if code in PEOPLE or code in GENDER_OF]
        signs = [SIGNS[code] for code in one[1:] if code in SIGNS]
        people_genders = [GENDER_OF.get(code, "person") for code in people]
        found.append(GENDERS.index((signs or people_genders or ["person"])[0]) if len(people) < 2 else -1)
    base_genders = defaultdict(set)
    for base, gender in zip(bases, found, strict=True):
        base_genders[base].add(gender)
    return torch.tensor(
        [gender if len(base_genders[base] - {-1}) > 1 else -1 for base, gender in zip(bases, found, strict=True)]
    )


def caption_of(emoji: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    """Lower-case words of a caption; openmoji has tags only for the emoji without a tone, `plain`."""
    return re.findall(r"[\w'-]+", f"{emoji['annotation']} {plain['tags']}".lower().replace("\u2019", "'"))
