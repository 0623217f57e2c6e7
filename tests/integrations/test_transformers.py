"""Outputs and training steps equal to those of transformers' CLIP, also under its Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.hosts import peak_of, within_clusters

transformers = pytest.importorskip("transformers")
from mcl_kernels.integrations.transformers import CLIPModel  # noqa: E402

LABELS = torch.arange(12) % 3


def config() -> Any:
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.CLIPConfig(
        text_config={**tower, "vocab_size": 100, "max_position_embeddings": 8, "eos_token_id": 99, "bos_token_id": 98},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )


def pair_of_models() -> tuple[CLIPModel, Any]:
    torch.manual_seed(0)
    theirs = transformers.CLIPModel(config())
    ours = CLIPModel(config())
    ours.load_state_dict(theirs.state_dict())
    return ours.train(), theirs.train()


def inputs(n: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, 90, (n, 8), generator=generator)
    input_ids[:, -1] = 99
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(n, 3, 16, 16, generator=generator),
    }


def gradients(model: Any, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_without_clusters_equals_the_host() -> None:
    ours, theirs = pair_of_models()
    got, expected = (model(**inputs(), return_loss=True) for model in (ours, theirs))
    torch.testing.assert_close(got.loss, expected.loss)
    for name in ("image_embeds", "text_embeds"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name))
    assert got.logits_per_image is None
    for a, b in zip(gradients(ours, got.loss), gradients(theirs, expected.loss), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_embeddings_whose_norm_overflows() -> None:
    """The host's loss ignores such embeddings, since it divides by an infinite norm."""
    model, _ = pair_of_models()
    expected = model(**inputs(), return_loss=True, clusters=LABELS).loss
    with torch.no_grad():
        model.visual_projection.weight *= 2.0**80
        model.text_projection.weight *= 2.0**90
    torch.testing.assert_close(model(**inputs(), return_loss=True, clusters=LABELS).loss, expected)


@pytest.mark.parametrize("labels", [LABELS, torch.linspace(0, 1, 12), LABELS[:3]], ids=["integers", "scores", "few"])
def test_labels_are_ignored_as_in_the_host(labels: Tensor) -> None:
    ours, theirs = pair_of_models()
    got, expected = (model(**inputs(), return_loss=True, labels=labels).loss for model in (ours, theirs))
    torch.testing.assert_close(got, expected)


def test_clusters_restrict_negatives() -> None:
    ours, theirs = pair_of_models()
    got = ours(**inputs(), return_loss=True, clusters=LABELS).loss
    expected = within_clusters(
        lambda index: theirs(**{name: x[index] for name, x in inputs().items()}, return_loss=True).loss, LABELS
    )
    torch.testing.assert_close(got, expected)
    for a, b in zip(gradients(ours, got), gradients(theirs, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_without_a_loss_equals_the_host() -> None:
    ours, theirs = pair_of_models()
    got, expected = (model(**inputs()) for model in (ours, theirs))
    assert got.loss is None
    torch.testing.assert_close(got.logits_per_image, expected.logits_per_image)
    as_tuple = ours(**inputs(), return_loss=True, return_dict=False)
    torch.testing.assert_close(as_tuple[0], ours(**inputs(), return_loss=True).loss)


def test_saved_files_are_those_of_the_host(tmp_path: Path) -> None:
    ours, _ = pair_of_models()
    ours.save_pretrained(tmp_path)
    theirs = transformers.CLIPModel.from_pretrained(tmp_path)
    again = CLIPModel.from_pretrained(tmp_path)
    assert theirs.config.architectures == ["CLIPModel"]
    for model in (theirs, again):
        for a, b in zip(model.state_dict().values(), ours.state_dict().values(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("clusters", "message"),
    [
        (LABELS[:3], "clusters must have one entry per row of pixel_values: got 3 clusters for 12 rows"),
        (LABELS.float(), "clusters must be an integer tensor: got torch.float32"),
        (LABELS.to("meta"), "clusters must be on the device of pixel_values: got meta for cpu"),
    ],
    ids=["another batch", "scores", "device"],
)
def test_clusters_that_do_not_fit(clusters: Tensor, message: str) -> None:
    ours, _ = pair_of_models()
    with pytest.raises((TypeError, ValueError), match=message):
        ours(**inputs(), return_loss=True, clusters=clusters)


class Pairs(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Image-text pairs with further columns."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = {name: column.tolist() for name, column in columns.items()}

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> dict[str, Any]:
        row: dict[str, Any] = {name: x[i] for name, x in inputs().items()}
        return row | {name: column[i] for name, column in self.columns.items()}


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {**transformers.default_data_collator(rows), "return_loss": True}


def trained(model: Any, tmp_path: Path, data: Pairs, accumulation: int = 1) -> tuple[Any, list[float]]:
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=12 // accumulation,
        use_cpu=True,
        per_device_eval_batch_size=12,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        optim="sgd",
    )
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, data_collator=collate
    )
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


COLUMNS: dict[str, dict[str, Tensor]] = {
    "no labels": {},
    "labels": {"labels": LABELS},
    "label": {"label": LABELS},
    "scores": {"label": torch.linspace(0, 1, 12)},
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("columns", COLUMNS)
def test_the_trainer_of_the_host(tmp_path: Path, columns: str, accumulation: int) -> None:
    """Steps and evaluation equal those of the host's model, for any labels, also with accumulated gradients."""
    ours, theirs = pair_of_models()
    trainer, got = trained(ours, tmp_path, Pairs(**COLUMNS[columns]), accumulation)
    host_trainer, expected = trained(theirs, tmp_path, Pairs(**COLUMNS[columns]), accumulation)
    assert len(got) == 4
    assert got == pytest.approx(expected, rel=1e-4)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(host_trainer.evaluate()["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_clusters_under_the_trainer_of_the_host(tmp_path: Path, accumulation: int) -> None:
    """With a column `clusters` the steps equal those of a plain loop that averages accumulated losses."""
    seen: list[dict[str, Any]] = []
    ours, _ = pair_of_models()
    plain = copy.deepcopy(ours)
    watch = ours.register_forward_pre_hook(lambda _, args, batch: seen.append(batch), with_kwargs=True)
    trainer, losses = trained(ours, tmp_path, Pairs(clusters=LABELS), accumulation)
    watch.remove()
    assert sorted(torch.cat([batch["clusters"] for batch in seen]).tolist()) == sorted(LABELS.tolist() * 4)
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-3)
    for first in range(0, len(seen), accumulation):
        optimizer.zero_grad()
        for batch in seen[first : first + accumulation]:
            (plain(**batch).loss / accumulation).backward()
        optimizer.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert losses[-1] < losses[0]
    expected = ours.eval()(**inputs(), return_loss=True, clusters=LABELS).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.slow
def test_memory_is_less_than_the_hosts() -> None:
    code = """
from {module} import CLIPModel
import tests.integrations.test_transformers as tests
model = CLIPModel(tests.config())
inputs = tests.inputs(4096)
def step(n=4096):
    for p in model.parameters():
        p.requires_grad_("projection" in str(p.shape) or p.ndim == 0)
    model(**{{name: x[:n] for name, x in inputs.items()}}, return_loss=True).loss.backward()
step(64)
"""
    ours, theirs = (peak_of(code.format(module=m)) for m in ("mcl_kernels.integrations.transformers", "transformers"))
    assert ours < theirs - 4 * 4 * 4096**2 * 0.5, (ours, theirs)
