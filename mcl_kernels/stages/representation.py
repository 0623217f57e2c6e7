"""The representation after all stages: the outputs of their encoders concatenated, or their weights averaged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mcl_kernels._forked import use_one_thread_if_forked
from mcl_kernels._validate import check_choice, check_embeddings
from mcl_kernels.normalize import normalize_rows


class ConcatEncoder(nn.Module):
    """Concatenates the outputs of all stages' encoders: the representation of Multistage Contrastive Learning.

        joint   [f_0(x), f_1(x), ...] / |[f_0(x), f_1(x), ...]|          one norm for all, as in the paper's CLIP code
        stage   [f_0(x) / |f_0(x)|, f_1(x) / |f_1(x)|, ...]              equal weight of all stages
        None    [f_0(x), f_1(x), ...]

    Args:
        encoders: a module per stage; each maps the same input to [B, D_s].
        normalize: "joint", "stage" or None.

    Raises:
        TypeError: encoders that are not modules.
        ValueError: no encoder, an unknown `normalize`, or an output that is not [B, D].

    Source: "Learning the Unlearned" (arXiv 2402.11816), section 3.

    Example:
        >>> ConcatEncoder([nn.Identity(), nn.Identity()], normalize=None)(torch.tensor([[3.0, 4.0]]))
        tensor([[3., 4., 3., 4.]])
    """

    def __init__(self, encoders: Iterable[nn.Module], normalize: str | None = "joint") -> None:
        super().__init__()
        if normalize is not None:
            check_choice("normalize", normalize, ("joint", "stage"))
        if not isinstance(encoders, Iterable):
            raise TypeError(f"encoders must be a list of modules: got {type(encoders).__name__}")
        encoders = list(encoders)
        if not encoders:
            raise ValueError("encoders must hold at least one module: got none")
        for encoder in encoders:
            if not isinstance(encoder, nn.Module):
                raise TypeError(f"encoders must hold modules: got {type(encoder).__name__}")
        self.encoders = nn.ModuleList(encoders)
        self.normalize = normalize

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the concatenated outputs of the encoders, [B, D_0 + D_1 + ...]."""
        outputs = [encoder(*args, **kwargs) for encoder in self.encoders]
        for index, output in enumerate(outputs):
            check_embeddings(f"output of encoder {index}", output)
        if self.normalize == "stage":
            outputs = [normalize_rows(output) for output in outputs]
        joined = torch.cat(outputs, dim=1)
        return normalize_rows(joined) if self.normalize == "joint" else joined

    def extra_repr(self) -> str:
        return f"normalize={self.normalize!r}"


def model_soup(state_dicts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Averages the weights of several models ("MCL MS", the paper's model for retrieval).

    Floating point entries are averaged in fp64 and rounded once to their dtype. Other entries (counters such as
    `num_batches_tracked`) are taken from the last model.

    Args:
        state_dicts: state dicts of one architecture. An average is useful only if the models share their initial
            weights.

    Returns:
        A state dict of new tensors.

    Raises:
        TypeError: anything other than a list of state dicts of tensors.
        ValueError: no state dict, or keys, shapes or dtypes that differ; the entry is named.

    Source: Wortsman et al. 2022 (arXiv 2203.05482), the uniform soup.

    Example:
        >>> model_soup([{"w": torch.tensor([0.0])}, {"w": torch.tensor([1.0])}])
        {'w': tensor([0.5000])}
    """
    use_one_thread_if_forked()
    if isinstance(state_dicts, Mapping) or not isinstance(state_dicts, Iterable):
        raise TypeError(f"state_dicts must be a list of state dicts: got {type(state_dicts).__name__}")
    state_dicts = list(state_dicts)
    for index, state in enumerate(state_dicts):
        if not isinstance(state, Mapping):
            got = f"{type(state).__name__} at {index}"
            raise TypeError(f"state_dicts must hold mappings such as model.state_dict(): got {got}")
    if not state_dicts:
        raise ValueError("state_dicts must hold at least one: got none")
    first = state_dicts[0]
    soup = {}
    for index, state in enumerate(state_dicts):
        if state.keys() != first.keys():
            name = sorted(state.keys() ^ first.keys())[0]
            raise ValueError(f"state_dicts must have the same keys: {name!r} is in one of 0 and {index} only")
    for name, value in first.items():
        values = [state[name] for state in state_dicts]
        for index, other in enumerate(values):
            if not isinstance(other, Tensor):
                raise TypeError(f"state_dicts must hold tensors: got {type(other).__name__} for {name!r} in {index}")
            if other.shape != value.shape or other.dtype != value.dtype:
                raise ValueError(
                    f"state_dicts must agree in shape and dtype: {name!r} is {list(value.shape)} {value.dtype} in 0 "
                    f"and {list(other.shape)} {other.dtype} in {index}"
                )
        if value.dtype.is_floating_point:
            soup[name] = torch.stack([other.double() for other in values]).mean(0).to(value.dtype)
        else:
            soup[name] = values[-1].clone()
    return soup
