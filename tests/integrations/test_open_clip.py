"""Losses equal to open_clip's, also on two ranks and in its training loop."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.integrations.hosts import assert_same, normalized, peak_of, train, views, within_clusters
from tests.process_pool import RankPool

open_clip = pytest.importorskip("open_clip")
from mcl_kernels.integrations.open_clip import ClipLoss  # noqa: E402

SCALE = torch.tensor(20.0, dtype=torch.float64)
LABELS = torch.arange(40) % 4


@pytest.mark.parametrize("output_dict", [False, True])
@pytest.mark.parametrize("scale", [SCALE, SCALE.reshape(1)], ids=["[]", "[1]"])
def test_without_labels_equals_the_host(scale: Tensor, output_dict: bool) -> None:
    def loss(kind: type) -> Any:
        def compute(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
            result = kind()(*normalized(image, text), scale, output_dict=output_dict)
            return result["contrastive_loss"] if output_dict else result

        return compute

    assert_same(loss(ClipLoss), loss(open_clip.ClipLoss), (*views(), scale))


def test_the_dictionary_has_the_keys_of_the_host() -> None:
    image, text = normalized(*views(8))
    ours, theirs = (kind()(image, text, SCALE, output_dict=True) for kind in (ClipLoss, open_clip.ClipLoss))
    assert list(ours) == list(theirs)


def test_a_bias_changes_nothing_and_stays_in_the_graph() -> None:
    bias = torch.tensor(3.0, requires_grad=True)
    image, text = normalized(*views())
    loss = ClipLoss()(image, text, SCALE, bias, labels=LABELS)
    torch.testing.assert_close(loss, ClipLoss()(image, text, SCALE, labels=LABELS))
    assert torch.autograd.grad(loss, bias)[0] == 0
    expected = open_clip.ClipLoss()(image, text, SCALE, bias.detach().double())
    for given in (bias, 3.0):
        torch.testing.assert_close(ClipLoss()(image, text, SCALE, given), expected)


def test_labels_restrict_negatives_to_clusters() -> None:
    host = open_clip.ClipLoss()

    def expected(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        image, text = normalized(image, text)
        return within_clusters(lambda index: host(image[index], text[index], scale), LABELS)

    def got(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return ClipLoss()(*normalized(image, text), scale, labels=LABELS)  # type: ignore[no-any-return]

    assert_same(got, expected, (*views(), SCALE))


def test_arguments_of_the_constructor() -> None:
    loss = ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=0, world_size=1)
    assert isinstance(loss, open_clip.ClipLoss)
    assert (loss.local_loss, loss.gather_with_grad) == (True, True)


def test_labels_of_the_wrong_batch() -> None:
    image, text = normalized(*views(8))
    message = "labels must have one entry per row of image_features: got 16 labels for 8 rows"
    for world_size in (1, 2):  # with 2: gathered labels in place of the labels of this rank
        with pytest.raises(ValueError, match=message):
            ClipLoss(world_size=world_size)(image, text, SCALE, labels=torch.zeros(16, dtype=torch.int64))


def check_on_two_ranks() -> None:
    """Compares every convention of the host; with labels, compares with one process that has all rows."""
    rank = dist.get_rank()
    features = [x.detach() for x in views(40)]
    mine = slice(20 * rank, 20 * rank + 20)

    def run(kind: type, options: dict[str, Any], **labels: Tensor) -> list[Tensor]:
        leaves = [x[mine].clone().requires_grad_() for x in features] + [SCALE.clone().requires_grad_()]
        loss = kind(rank=rank, world_size=2, **options)(*normalized(*leaves[:2]), leaves[2], **labels)
        return [loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True)]

    for local_loss in (False, True):
        for gather_with_grad in (False, True):
            options = {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
            for a, b in zip(run(ClipLoss, options), run(open_clip.ClipLoss, options), strict=True):
                torch.testing.assert_close(a, b, msg=lambda text, options=options: f"{options}: {text}")
    image, text = [x[mine].float() for x in normalized(*features)]
    for dtype in (torch.bfloat16, torch.float16):  # neither represents 1/99
        scale = torch.tensor(99.0, dtype=dtype)
        both = (
            kind(rank=rank, world_size=2, local_loss=True)(image, text, scale)
            for kind in (ClipLoss, open_clip.ClipLoss)
        )
        torch.testing.assert_close(*both, rtol=1e-5, atol=1e-5)
    leaves = [x.clone().requires_grad_() for x in features] + [SCALE.clone().requires_grad_()]
    expected_loss = ClipLoss()(*normalized(*leaves[:2]), leaves[2], labels=LABELS)
    expected = [expected_loss.detach(), *torch.autograd.grad(expected_loss, leaves)]
    got = run(ClipLoss, {"local_loss": True, "gather_with_grad": True}, labels=LABELS[mine])
    mean = got[0].clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / 2, expected[0])
    scale = got[3].clone()
    dist.all_reduce(scale)
    torch.testing.assert_close(scale / 2, expected[3])
    for a, b in zip(got[1:3], expected[1:3], strict=True):
        torch.testing.assert_close(a / 2, b[mine])  # averaging over ranks makes it exact


@pytest.mark.slow
def test_two_ranks_equal_the_host() -> None:
    with RankPool(2) as pool:
        pool.run(check_on_two_ranks)


CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def model_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("configs") / "tiny-clip.json"
    path.write_text(json.dumps(CONFIG))
    open_clip.add_model_config(path)
    return "tiny-clip"


def batch(n: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    words = ["red", "green", "blue", "black", "white", "grey"]
    shapes = ["square", "circle", "line", "cross"]
    captions = [f"a {word} {shape}" for word in words for shape in shapes]
    images = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return images, open_clip.get_tokenizer("ViT-B-32", context_length=16)(captions[:n]), torch.arange(n) % 4


def test_a_model_of_the_host_trains(model_name: str) -> None:
    """Labels are used by the loss, and the learned scale has a gradient."""
    torch.manual_seed(0)
    model = open_clip.create_model(model_name, output_dict=True)
    images, texts, labels = batch()
    loss = ClipLoss()

    def step() -> Tensor:
        return sum(loss(**model(images, texts), labels=labels, output_dict=True).values())  # as in the host's loop

    losses = train(model.parameters(), step, lr=3e-3, steps=25)
    assert losses[-1] < 0.5 * losses[0]
    assert model.logit_scale.grad.abs() > 0
    first = open_clip.ClipLoss()(**{k: v.detach() for k, v in model(images, texts).items()})
    assert losses[-1] < first  # pairs of other clusters were never compared


def test_the_training_loop_of_the_host(model_name: str) -> None:
    """Replaces the loss in `open_clip_train.train.train_one_epoch`, which is not modified."""
    from open_clip_train.train import train_one_epoch

    images, texts, _ = batch()
    loader = [(images[i : i + 8], texts[i : i + 8]) for i in range(0, 24, 8)]

    class Batches(list):  # type: ignore[type-arg]
        num_batches, num_samples = 3, 24

    class Data:
        dataloader = Batches(loader)

        def set_epoch(self, epoch: int) -> None:
            pass

    results = []
    for kind in (ClipLoss, open_clip.ClipLoss):
        for accum_freq in (1, 3):
            torch.manual_seed(0)
            model = open_clip.create_model(model_name, output_dict=True)
            args = SimpleNamespace(
                device="cpu", precision="fp32", distill=False, accum_freq=accum_freq, skip_scheduler=True,
                horovod=False,
                grad_clip_norm=None, log_every_n_steps=1, rank=0, local_rank=0, world_size=1, batch_size=8, wandb=False,
                model=model_name, distributed=False, save_logs=False, epochs=1,
            )  # fmt: skip
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            train_one_epoch(model, {"train": Data()}, kind(), 0, optimizer, None, None, None, args)
            results.append([p.detach().clone() for p in model.parameters()])
    for ours, theirs in ((results[0], results[2]), (results[1], results[3])):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["loss", "step"])
def test_compiled_with_the_model(model_name: str, strategy: str) -> None:
    torch._dynamo.reset()
    model = open_clip.create_model(model_name, output_dict=True)
    loss = ClipLoss()

    def step(images: Tensor, texts: Tensor, labels: Tensor) -> Tensor:
        return loss(**model(images, texts), labels=labels, output_dict=True)["contrastive_loss"]

    images, texts, labels = batch()
    if strategy == "loss":
        outputs = model(images, texts)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        got = compiled(**outputs, labels=labels)
    else:
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(images, texts, labels)
    torch.testing.assert_close(got, step(images, texts, labels))


@pytest.mark.slow
def test_memory_is_less_than_the_hosts() -> None:
    code = """
from {module} import ClipLoss
image, text = torch.randn(2, 4096, 64)
loss = ClipLoss()
def step(n=4096):
    a, b = (torch.nn.functional.normalize(x[:n]).requires_grad_() for x in (image, text))
    loss(a, b, torch.tensor(20.0)).backward()
step(256)
"""
    ours, theirs = (peak_of(code.format(module=m)) for m in ("mcl_kernels.integrations.open_clip", "open_clip"))
    assert ours < theirs / 10, (ours, theirs)


def test_half_precision_at_the_largest_scale() -> None:
    """Features in bf16 or fp16 at scale 100, as under FSDP: the loss is fp32, gradients are finite."""
    for dtype in (torch.bfloat16, torch.float16):
        image, text = (F.normalize(x).detach().to(dtype).requires_grad_() for x in views(256))
        scale = torch.tensor(100.0, requires_grad=True)
        loss = ClipLoss()(image, text, scale, labels=torch.arange(256) % 8)
        assert loss.dtype == torch.float32
        for g in torch.autograd.grad(loss, (image, text, scale)):
            assert g.isfinite().all()
