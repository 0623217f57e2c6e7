"""CLIPModel of transformers, with negatives from the anchor's own cluster, computed without logits."""

from __future__ import annotations

from mcl_kernels.integrations._host import require

require("transformers", "5.0")

from typing import Any

from torch import Tensor
from transformers.models.clip import modeling_clip as host
from transformers.utils import can_return_tuple

from mcl_kernels._validate import as_integers
from mcl_kernels.losses import clip_loss
from mcl_kernels.normalize import normalize_rows


class CLIPModel(host.CLIPModel):  # type: ignore[misc]
    """`transformers.CLIPModel` with `clusters`, the pseudo labels, whose loss is `clip_loss`.

    `from_pretrained`, configuration and files are the host's. With `return_loss=True` the output has no logits, since
    no N x N matrix is built; otherwise `forward` is the host's. Under `Trainer` a column `clusters` of the data set
    holds the pseudo labels, and the collator must add `return_loss=True`, as for the host. `labels` are ignored, as in
    the host.

    Raises:
        TypeError, ValueError: from `forward`: clusters that are not integers [N].

    Example: `model = CLIPModel.from_pretrained(path)`, then `model(**inputs, return_loss=True, clusters=labels).loss`.
    """

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        # Not named `labels`: Trainer expects arguments with "label" in their name in every batch, and would otherwise
        # evaluate no loss for a data set without pseudo labels.
        clusters: Tensor | None = None,
        **kwargs: Any,
    ) -> host.CLIPOutput:
        """Computes the host's output; clusters: pseudo labels of the pairs, integers [N], or None."""
        image_inputs = {"pixel_values": pixel_values, "interpolate_pos_encoding": interpolate_pos_encoding}
        text_inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        if not return_loss:
            return super().forward(**image_inputs, **text_inputs, **kwargs)
        image, text = self.get_image_features(**image_inputs, **kwargs), self.get_text_features(**text_inputs, **kwargs)
        image_embeds, text_embeds = normalize_rows(image.pooler_output), normalize_rows(text.pooler_output)
        device = text_embeds.device  # the model may be spread over several devices, as in the host
        if clusters is not None:
            assert pixel_values is not None  # otherwise get_image_features has raised
            clusters = as_integers("clusters", clusters, "pixel_values", pixel_values).to(device)
        logit_scale = self.logit_scale.exp().to(device)
        return host.CLIPOutput(
            loss=clip_loss(image_embeds.to(device), text_embeds, clusters, logit_scale=logit_scale),
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=image,
        )
