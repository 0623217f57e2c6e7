"""Concatenated encoders and averaged weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mcl_kernels import ConcatEncoder, model_soup


def test_concat_encoder() -> None:
    x = torch.randn(5, 3)
    encoders = [nn.Linear(3, 4), nn.Linear(3, 2)]
    raw = torch.cat([encoder(x) for encoder in encoders], dim=1)
    torch.testing.assert_close(ConcatEncoder(encoders, normalize=None)(x), raw)
    joint = ConcatEncoder(encoders)(x)
    torch.testing.assert_close(joint, raw / raw.norm(dim=1, keepdim=True))
    stage = ConcatEncoder(encoders, normalize="stage")(x)
    torch.testing.assert_close(stage[:, :4].norm(dim=1), torch.ones(5))
    torch.testing.assert_close(stage[:, 4:].norm(dim=1), torch.ones(5))
    assert len(list(ConcatEncoder(encoders).parameters())) == 4


@pytest.mark.parametrize("normalize", ["joint", "stage"])
def test_concat_encoder_of_outputs_whose_norm_overflows(normalize: str) -> None:
    x = torch.randn(5, 4)
    encoder = ConcatEncoder([nn.Identity(), nn.Identity()], normalize=normalize)
    torch.testing.assert_close(encoder(2.0**100 * x), encoder(x))


@pytest.mark.parametrize("normalize", ["joint", "stage"])
def test_concat_encoder_in_half_precision(normalize: str) -> None:
    x = torch.stack((torch.zeros(4), torch.full((4,), 40000.0), torch.ones(4))).half()
    out = ConcatEncoder([nn.Identity(), nn.Identity()], normalize=normalize)(x)
    assert out[0].tolist() == [0.0] * 8
    torch.testing.assert_close(out[1], out[2])


def test_concat_encoder_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match="normalize must be one of 'joint', 'stage': got 'both'"):
        ConcatEncoder([nn.Identity()], normalize="both")
    with pytest.raises(ValueError, match="output of encoder 0 must have shape"):
        ConcatEncoder([nn.Identity()])(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match="at least one module"):
        ConcatEncoder([])


def test_model_soup_averages_weights_and_keeps_counters() -> None:
    models = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(3)]
    for steps, model in enumerate(models):
        for _ in range(steps):
            model(torch.randn(5, 3))
    soup = model_soup([model.state_dict() for model in models])
    weights = torch.stack([model[0].weight for model in models])
    torch.testing.assert_close(soup["0.weight"], weights.mean(0).detach())
    assert int(soup["1.num_batches_tracked"]) == 2
    models[0].load_state_dict(soup)
    half = [{"w": torch.tensor([value], dtype=torch.float16)} for value in (65504.0, 65504.0)]
    assert model_soup(half)["w"].tolist() == [65504.0]


def test_model_soup_refuses_bad_arguments() -> None:
    w = torch.zeros(2)
    with pytest.raises(ValueError, match="'b' is in one of 0 and 1 only"):
        model_soup([{"w": w}, {"w": w, "b": w}])
    with pytest.raises(ValueError, match=r"'w' is \[2\] torch.float32 in 0 and \[3\] torch.float32 in 1"):
        model_soup([{"w": w}, {"w": torch.zeros(3)}])
    with pytest.raises(ValueError, match="at least one"):
        model_soup([])
