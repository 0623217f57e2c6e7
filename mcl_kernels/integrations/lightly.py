"""NTXentLoss, DCLLoss and DCLWLoss of lightly, with negatives from the anchor's own cluster."""

from __future__ import annotations

from mcl_kernels.integrations._host import as_scalar, gathered, require

require("lightly", "1.6")

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightly import loss as host
from lightly.utils import dist
from torch import Tensor

from mcl_kernels._validate import as_integers, check_same_shape
from mcl_kernels.losses import masked_info_nce, nt_xent
from mcl_kernels.normalize import shrunk_rows
from mcl_kernels.objectives import ObjectiveLike, decoupled, info_nce


class NTXentLoss(host.NTXentLoss):  # type: ignore[misc]
    """`lightly.loss.NTXentLoss` with `labels`, computed by `nt_xent`, or with a memory bank by `masked_info_nce`.

    The constructor is the host's. The memory bank stores a label for each of its rows: -1, which is never a negative,
    for its random initial rows and for rows of a step without labels. Each stage needs a new loss, since its labels
    differ. With `gather_distributed`, pass the labels of this rank's rows.

    Raises:
        TypeError, ValueError: from `forward`: labels that are not integers [N]; views of different shapes.

    Example:
        >>> import torch
        >>> from mcl_kernels.integrations.lightly import NTXentLoss
        >>> views = torch.eye(4), torch.eye(4)
        >>> NTXentLoss(temperature=1.0)(*views, labels=torch.tensor([0, 0, 1, 1]))
        tensor(0.5514)
    """

    bank_labels: Tensor

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__(temperature, memory_bank_size, gather_distributed)
        # A buffer, as the host's bank: both are moved and broadcast together. Neither is in the state_dict.
        bank = self.memory_bank.bank
        self.register_buffer("bank_labels", torch.full((len(bank),), -1, device=bank.device), persistent=False)

    def forward(self, out0: Tensor, out1: Tensor, labels: Tensor | None = None) -> Tensor:
        """Computes the loss of two views [N, D], not normalized; labels: pseudo labels, integers [N], or None."""
        if labels is not None:
            labels = as_integers("labels", labels, "out0", out0)
        check_same_shape("out1", out1, "out0", out0)
        out0, out1 = (F.normalize(shrunk_rows(x), dim=1) for x in (out0, out1))  # bit for bit as in the host
        if len(self.bank_labels) == 0:
            return _in_batch(out0, out1, labels, self.temperature, self.gather_distributed, info_nce)
        begin, bank_labels = int(self.memory_bank.bank_ptr), self.bank_labels.to(out0.device)
        _, negatives = self.memory_bank(out1, update=out0.requires_grad)
        if out0.requires_grad:
            self._store_labels(begin, torch.full((len(out0),), -1, device=out0.device) if labels is None else labels)
        # The loss, and with it the bank, may be on the CPU, as in the host.
        return masked_info_nce(
            out0,
            negatives.T.to(out0.device),
            labels,
            None if labels is None else bank_labels,
            temperature=as_scalar(self.temperature),
            positive=out1,
            normalize=False,
        )

    def _store_labels(self, begin: int, labels: Tensor) -> None:
        """Stores the labels of the rows that the host has written to the bank from `begin`, up to its end."""
        if self.gather_distributed and dist.world_size() > 1:
            labels = gathered(labels)
        bank_labels = self.bank_labels.clone()  # the old tensor may be saved for a backward pass
        bank_labels[begin : begin + len(labels)] = labels[: len(bank_labels) - begin].to(bank_labels.device)
        self.bank_labels = bank_labels


class DCLLoss(host.DCLLoss):  # type: ignore[misc]
    """`lightly.loss.DCLLoss` with `labels`, computed by `nt_xent`. The constructor is the host's, with `weight_fn`.

    Raises:
        TypeError, ValueError: from `forward`: labels that are not integers [N]; views of different shapes.

    Example:
        >>> import torch
        >>> from mcl_kernels.integrations.lightly import DCLLoss
        >>> views = torch.eye(4), torch.eye(4)
        >>> DCLLoss(temperature=1.0)(*views, labels=torch.tensor([0, 0, 1, 1]))
        tensor(-0.3069)
    """

    def forward(self, out0: Tensor, out1: Tensor, labels: Tensor | None = None) -> Tensor:
        """Computes the loss of two views [N, D], not normalized; labels: pseudo labels, integers [N], or None."""
        if labels is not None:
            labels = as_integers("labels", labels, "out0", out0)
        out0, out1 = (F.normalize(shrunk_rows(x), dim=1) for x in (out0, out1))  # bit for bit as in the host
        objective: ObjectiveLike = decoupled
        if self.weight_fn:
            weight = torch.cat([self.weight_fn(*views).expand(out0.shape[0]) for views in ((out0, out1), (out1, out0))])

            def weighted(a: Tensor, b: Tensor, n: Tensor | None, scale: Tensor) -> Tensor:
                return b - weight * a

            objective = weighted

        return _in_batch(out0, out1, labels, self.temperature, self.gather_distributed, objective)


class DCLWLoss(DCLLoss, host.DCLWLoss):  # type: ignore[misc]
    """`lightly.loss.DCLWLoss` with `labels`; see `DCLLoss`. As in the host, weights are of the complete batch."""


def _in_batch(
    out0: Tensor, out1: Tensor, labels: Tensor | None, temperature: Any, gather: bool, objective: ObjectiveLike
) -> Tensor:
    """Compares normalized views with all views of this process, or with `gather` of all ranks."""
    temperature = as_scalar(temperature)
    if not (gather and dist.world_size() > 1):
        return nt_xent(out0, out1, labels, temperature=temperature, objective=objective, normalize=False)
    keys = torch.cat([*dist.gather(out0), *dist.gather(out1)])
    ids = torch.arange(len(keys) // 2, device=keys.device)
    first = dist.rank() * len(out0)
    return masked_info_nce(
        torch.cat((out0, out1)),
        keys,
        None if labels is None else labels.repeat(2),
        None if labels is None else gathered(labels).repeat(2),
        temperature=temperature,
        positive=torch.cat((out1, out0)),
        ids=ids[first : first + len(out0)].repeat(2),
        key_ids=ids.repeat(2),
        objective=objective,
        normalize=False,
    )
