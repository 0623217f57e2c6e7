"""lightly's losses, within clusters."""

from __future__ import annotations

from mcl_kernels.integrations._host import gathered, number, require

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
    """`lightly.loss.NTXentLoss` with `labels`, over `nt_xent`, or with a memory bank `masked_info_nce`.

    The constructor is the host's. The bank keeps the labels of its rows: -1, which matches nothing, for the random rows
    that it begins with and for those of a step without labels. A stage begins with a new loss, since its labels are
    others. In a gathered run labels are those of this rank's rows.

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
        # A buffer like the host's bank: both are moved and broadcast together; neither is in the state_dict.
        bank = self.memory_bank.bank
        self.register_buffer("bank_labels", torch.full((len(bank),), -1, device=bank.device), persistent=False)

    def forward(self, out0: Tensor, out1: Tensor, labels: Tensor | None = None) -> Tensor:
        """Both views [N, D], of any length; labels: pseudo labels of the samples, integers [N], or None."""
        if labels is not None:
            labels = as_integers("labels", labels, "out0", out0)
        check_same_shape("out1", out1, "out0", out0)
        out0, out1 = (F.normalize(shrunk_rows(x), dim=1) for x in (out0, out1))  # to the bit as the host does
        if len(self.bank_labels) == 0:
            return _in_batch(out0, out1, labels, self.temperature, self.gather_distributed, info_nce)
        begin, bank_labels = int(self.memory_bank.bank_ptr), self.bank_labels.to(out0.device)
        _, negatives = self.memory_bank(out1, update=out0.requires_grad)
        if out0.requires_grad:
            self._follow_bank(begin, torch.full((len(out0),), -1, device=out0.device) if labels is None else labels)
        # As the host's, the loss may stay on the CPU, and with it the bank.
        return masked_info_nce(
            out0, negatives.T.to(out0.device), labels, None if labels is None else bank_labels,
            temperature=number(self.temperature), positive=out1, normalize=False,
        )  # fmt: skip

    def _follow_bank(self, begin: int, labels: Tensor) -> None:
        """The labels of what the host has put into the bank, which drops what goes beyond its end."""
        if self.gather_distributed and dist.world_size() > 1:
            labels = gathered(labels)
        new = self.bank_labels.clone()  # the old ones may be saved for a backward pass
        new[begin : begin + len(labels)] = labels[: len(new) - begin].to(new.device)
        self.bank_labels = new


class DCLLoss(host.DCLLoss):  # type: ignore[misc]
    """`lightly.loss.DCLLoss` with `labels`, over `nt_xent`. The constructor is the host's, `weight_fn` included.

    Example:
        >>> import torch
        >>> from mcl_kernels.integrations.lightly import DCLLoss
        >>> views = torch.eye(4), torch.eye(4)
        >>> DCLLoss(temperature=1.0)(*views, labels=torch.tensor([0, 0, 1, 1]))
        tensor(-0.3069)
    """

    def forward(self, out0: Tensor, out1: Tensor, labels: Tensor | None = None) -> Tensor:
        """Both views [N, D], of any length; labels: pseudo labels of the samples, integers [N], or None."""
        if labels is not None:
            labels = as_integers("labels", labels, "out0", out0)
        out0, out1 = (F.normalize(shrunk_rows(x), dim=1) for x in (out0, out1))  # to the bit as the host does
        objective: ObjectiveLike = decoupled
        if self.weight_fn:
            weight = torch.cat([self.weight_fn(*views).expand(out0.shape[0]) for views in ((out0, out1), (out1, out0))])

            def weighted(a: Tensor, b: Tensor, n: Tensor | None, scale: Tensor) -> Tensor:
                return b - weight * a

            objective = weighted

        return _in_batch(out0, out1, labels, self.temperature, self.gather_distributed, objective)


class DCLWLoss(DCLLoss, host.DCLWLoss):  # type: ignore[misc]
    """`lightly.loss.DCLWLoss` with `labels`; see `DCLLoss`. The weights are those of the whole batch, as the host's."""


def _in_batch(
    out0: Tensor, out1: Tensor, labels: Tensor | None, temperature: Any, gather: bool, objective: ObjectiveLike
) -> Tensor:
    """Views of length 1 against all views, of all ranks where they are gathered."""
    temperature = number(temperature)
    if not (gather and dist.world_size() > 1):
        return nt_xent(out0, out1, labels, temperature=temperature, objective=objective, normalize=False)
    keys = torch.cat([*dist.gather(out0), *dist.gather(out1)])
    ids = torch.arange(len(keys) // 2, device=keys.device)
    first = dist.rank() * len(out0)
    return masked_info_nce(
        torch.cat((out0, out1)), keys, None if labels is None else labels.repeat(2),
        None if labels is None else gathered(labels).repeat(2), temperature=temperature,
        positive=torch.cat((out1, out0)), ids=ids[first : first + len(out0)].repeat(2), key_ids=ids.repeat(2),
        objective=objective, normalize=False,
    )  # fmt: skip
