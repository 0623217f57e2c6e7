"""Independent definitions: double loops and the formulas of other libraries, written out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def kept(y: int | None, y_key: int | None, u: int | None, u_key: int | None, negatives: str) -> bool:
    """Returns whether a key is a negative of a query, for a single pair."""
    if y is not None and y_key is not None:
        if y < 0 or y_key < 0:
            return False
        if negatives == "same" and y != y_key:
            return False
        if negatives == "different" and y == y_key:
            return False
    return u is None or u != u_key


def negatives_of(i: int, m: int, labels, key_labels, ids, key_ids, negatives: str = "same") -> list[int]:  # type: ignore[no-untyped-def]
    def at(values: Tensor | None, index: int) -> int | None:
        return None if values is None else int(values[index])

    return [j for j in range(m) if kept(at(labels, i), at(key_labels, j), at(ids, i), at(key_ids, j), negatives)]


def info_nce_double_loop(query, positive, key, scale, negatives: list[list[int]]) -> list[float]:  # type: ignore[no-untyped-def]
    """-log(e^a / (e^a + sum e^s)) of each query in Python floats; 0 without negatives."""
    losses = []
    for i, indices in enumerate(negatives):
        if not indices:
            losses.append(0.0)
            continue
        s = float(scale if scale.ndim == 0 else scale[i])
        a = s * math.fsum(float(x) * float(y) for x, y in zip(query[i], positive[i], strict=True))
        logits = [a] + [
            s * math.fsum(float(x) * float(y) for x, y in zip(query[i], key[j], strict=True)) for j in indices
        ]
        top = max(logits)
        losses.append(top + math.log(math.fsum(math.exp(x - top) for x in logits)) - a)
    return losses


def clip_cross_entropy(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """The formula of open_clip's ClipLoss on one device."""
    logits = logit_scale * image @ text.T
    target = torch.arange(len(image))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def simclr_cross_entropy(view_a: Tensor, view_b: Tensor, temperature: float) -> Tensor:
    """The formula of lightly's NTXentLoss without a memory bank."""
    a, b = F.normalize(view_a, dim=1), F.normalize(view_b, dim=1)
    n = len(a)
    others = ~torch.eye(n, dtype=torch.bool)
    aa = (a @ a.T / temperature)[others].view(n, -1)
    bb = (b @ b.T / temperature)[others].view(n, -1)
    ab, ba = a @ b.T / temperature, b @ a.T / temperature
    logits = torch.cat((torch.cat((ab, aa), dim=1), torch.cat((ba, bb), dim=1)))
    return F.cross_entropy(logits, torch.arange(n).repeat(2))


def moco_cross_entropy(query: Tensor, positive: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """The formula of MoCo and of lightly's NTXentLoss with a memory bank: [own key | queue]."""
    q, p = F.normalize(query, dim=1), F.normalize(positive, dim=1)
    logits = torch.cat(((q * p).sum(1, keepdim=True), q @ queue.T), dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


def supcontrast(features: Tensor, targets: Tensor | None, temperature: float) -> Tensor:
    """The formula of SupContrast's SupConLoss for features [N, V, D], before its factor and mean: [V N]."""
    n, views, _ = features.shape
    rows = torch.cat(features.unbind(1))
    alike = torch.eye(n) if targets is None else (targets[:, None] == targets).double()
    others = 1 - torch.eye(n * views)
    alike, others = (x.to(rows.dtype) for x in (alike.repeat(views, views) * others, others))
    logits = rows @ rows.T / temperature
    logits = logits - logits.max(1, keepdim=True).values.detach()
    log_prob = logits - (others * logits.exp()).sum(1, keepdim=True).log()
    return -(alike * log_prob).sum(1) / alike.sum(1).clamp(min=1)


def solo_simclr(rows: Tensor, indexes: Tensor, temperature: float) -> Tensor:
    """The formula of solo-learn's simclr_loss_func for rows of any number of views, before its mean: [N]."""
    similarity = (F.normalize(rows) @ F.normalize(rows).T / temperature).exp()
    positive = (indexes[:, None] == indexes).fill_diagonal_(False)
    negative = indexes[:, None] != indexes
    positives = (similarity * positive).sum(1)
    return -(positives / (positives + (similarity * negative).sum(1))).log()


def supcon_by_hand(
    rows: Tensor, scale: float, positives: list[list[int]], negatives: list[list[int]], *, mean: bool
) -> list[float]:
    """-log of the share of the positives in all exponentials, in Python floats; 0 without positives."""

    def logit(i: int, j: int) -> float:
        return scale * math.fsum(float(x) * float(y) for x, y in zip(rows[i], rows[j], strict=True))

    losses = []
    for i, (alike, others) in enumerate(zip(positives, negatives, strict=True)):
        if not alike:
            losses.append(0.0)
            continue
        every = math.log(math.fsum(math.exp(logit(i, j)) for j in (*alike, *others)))
        if mean:
            losses.append(math.fsum(every - logit(i, j) for j in alike) / len(alike))
        else:
            losses.append(every - math.log(math.fsum(math.exp(logit(i, j)) for j in alike)))
    return losses
