"""What the implementations for GPUs have in common: the factors of their products, and sums of rows sorted by label."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mcl_kernels.kmeans.centers import Centers

# run(x, order, inverse_norms, centers, begin, end, sums): fp64 sums of ranges of sorted rows, each rounded before.
RunPieces = Callable[[Tensor, Tensor, Tensor, Centers, Tensor, Tensor, Tensor], None]
# run(pieces, begin, end, sums): fp64 sums of ranges of pieces.
RunJoin = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def factors(centers: Centers, half: torch.dtype | None) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Centres relative to the offset; as what rows are multiplied with; half their squared norms.

    Rows of `half` precision are multiplied as they are, with the sum of two numbers of it: <x - o, c> is
    <x, c> - <o, c>.
    """
    offset, relative = centers.offset, centers.points - centers.offset
    wide = relative.double()
    half_norms = wide.square().sum(1) / 2 if not centers.cosine else wide.new_zeros(len(wide))
    if half is None:
        return relative, (relative,), half_norms.to(relative.dtype)
    half_norms += wide @ offset.double()
    # Scores may be scaled: by the power of 2 that brings what becomes fp16 into its range.
    largest = relative.abs().amax().clamp(min=torch.finfo(relative.dtype).tiny)
    unit = (12 - largest.log2().ceil()).clamp(-126, 126).exp2()
    high = (relative * unit).to(half)
    low = (relative * unit - high).to(half)
    return relative, (high, low), (half_norms * unit).to(relative.dtype)


def sum_by_label(
    run_pieces: RunPieces,
    run_join: RunJoin,
    x: Tensor,
    centers: Centers,
    labels: Tensor,
    inverse_norms: Tensor,
    piece_rows: int,
) -> tuple[Tensor, Tensor]:
    """Sums and counts by label: of rows sorted by it, by pieces of at most `piece_rows` of one cluster each.

    There are at most N / piece_rows + K pieces; those behind the last are empty.
    """
    (n, width), k = x.shape, len(centers.points)
    labels, order = labels.int().sort()
    end = torch.searchsorted(labels, torch.arange(k, dtype=labels.dtype, device=x.device), right=True)
    counts = end.diff(prepend=end.new_zeros(1))
    of_cluster = (counts + piece_rows - 1) // piece_rows
    last_piece = of_cluster.cumsum(0)
    first_piece = last_piece - of_cluster
    piece = torch.arange(n // piece_rows + k, device=x.device)
    cluster = torch.searchsorted(last_piece, piece, right=True).clamp(max=k - 1)
    piece_begin = (end - counts)[cluster] + (piece - first_piece[cluster]) * piece_rows
    piece_end = torch.minimum(piece_begin + piece_rows, end[cluster])

    pieces = torch.empty(len(piece), width, dtype=torch.float64, device=x.device)
    sums = torch.empty(k, width, dtype=torch.float64, device=x.device)
    run_pieces(x, order, inverse_norms, centers, piece_begin, piece_end, pieces)
    run_join(pieces, first_piece, last_piece, sums)
    return sums, counts
