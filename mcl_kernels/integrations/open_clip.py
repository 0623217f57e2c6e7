"""ClipLoss of open_clip, with negatives from the anchor's own cluster."""

from __future__ import annotations

from mcl_kernels.integrations._host import as_scalar, gathered, require

require("open_clip_torch", "2.32", extra="open-clip")

import open_clip.loss as host
import torch
from torch import Tensor

from mcl_kernels._validate import as_integers
from mcl_kernels.losses import clip_loss, masked_info_nce
from mcl_kernels.normalize import compute_dtype


class ClipLoss(host.ClipLoss):  # type: ignore[misc]
    """`open_clip.ClipLoss` with `labels`, computed by `clip_loss`.

    The constructor is the host's, and `local_loss` and `gather_with_grad` have its meaning. Pass the labels of this
    rank's rows; they are gathered together with the features. The host adds a `logit_bias` to every logit, which
    changes neither loss; its gradient is 0.

    Raises:
        TypeError, ValueError: from `forward`: labels that are not integers [N]; features that do not fit together;
            `use_horovod` over several ranks.

    Example:
        >>> import torch
        >>> from mcl_kernels.integrations.open_clip import ClipLoss
        >>> image, text = torch.eye(4), torch.eye(4)
        >>> ClipLoss()(image, text, logit_scale=torch.tensor(1.0), labels=torch.tensor([0, 0, 1, 1]), output_dict=True)
        {'contrastive_loss': tensor(0.3133)}
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        labels: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Computes the loss of normalized features, [N, D] each; labels: pseudo labels, integers [N], or None."""
        if labels is not None:
            labels = as_integers("labels", labels, "image_features", image_features)
        if self.world_size == 1:
            loss = clip_loss(image_features, text_features, labels, logit_scale=logit_scale)
        else:
            loss = self._gathered_loss(image_features, text_features, logit_scale, labels)
        if isinstance(logit_bias, Tensor):  # part of the graph: DistributedDataParallel waits for each gradient
            loss = loss + 0.0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss

    def _gathered_loss(self, image: Tensor, text: Tensor, logit_scale: Tensor | float, labels: Tensor | None) -> Tensor:
        if self.use_horovod:
            raise ValueError("use_horovod must be False over several ranks: got True")
        n, first = len(image), self.rank * len(image)
        options = (self.local_loss, self.gather_with_grad, self.rank, self.world_size)
        all_image, all_text = host.gather_features(image, text, *options)
        all_labels = None if labels is None else gathered(labels)
        if not self.local_loss:
            return clip_loss(all_image, all_text, all_labels, logit_scale=logit_scale)
        all_ids = torch.arange(len(all_image), device=image.device)
        if isinstance(logit_scale, Tensor):  # inverted in fp32, whatever the dtype of the parameter
            logit_scale = as_scalar(logit_scale).to(compute_dtype(image, text))
        # The positives are gathered rows, so they have a gradient exactly if `gather_with_grad` is set.
        image_loss, text_loss = (
            masked_info_nce(
                query,
                keys,
                labels,
                all_labels,
                temperature=1.0 / logit_scale,
                positive=keys[first : first + n],
                ids=all_ids[first : first + n],
                key_ids=all_ids,
                normalize=False,
            )
            for query, keys in ((image, all_text), (text, all_image))
        )
        return (image_loss + text_loss) / 2
