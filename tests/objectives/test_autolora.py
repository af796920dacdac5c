"""AutoLoRa: its weights, its three terms and who learns from which."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from linear_model import LinearModel, N, Nudge, labelled, slow_cross_entropy, slow_kl
from torch import Tensor, nn
from training import tiny_model

from hf_robust.attacks import PGD, frozen
from hf_robust.model_fit import check_fit
from hf_robust.objectives.aff import AFF
from hf_robust.objectives.autolora import AutoLoRa, autolora_weights
from hf_robust.objectives.base import AccuracyRequest, StepContext


class Given(nn.Module):
    """Gives the logits it was made with, whatever the images."""

    def __init__(self, **logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def embed(self, images: Tensor, branch: str) -> Tensor:
        return self.logits[branch] + 0 * images.sum()

    def forward(self, passes: list[tuple[str, Tensor]]) -> list[Tensor]:
        return [self.embed(images, branch) for branch, images in passes]


@pytest.mark.parametrize(
    ("accuracy", "expected"), [(0.1, 2.025744160586), (0.5, 5.121708235371), (0.9, 8.217672310156)]
)
def test_the_loss_has_its_known_values(accuracy, expected):
    """Worked out to twelve digits from logits in float64."""
    index = torch.arange(1, 13, dtype=torch.float64).view(4, 3)
    model = Given(lora=2 * (0.7 * index).sin(), adv=2 * (0.9 * index).cos())
    batch = {"padded_crop": torch.zeros(4, 3, 2, 2), "label": torch.tensor([0, 1, 2, 0])}
    terms = AutoLoRa()(model, batch, StepContext(lambda _, x: x, standard_accuracy=accuracy))
    assert list(terms) == ["clean", "adversarial", "kl"]
    assert sum(terms.values()).item() == pytest.approx(expected, abs=1e-11)


def test_weights_are_a_function_of_the_standard_accuracy():
    assert autolora_weights(0.0) == (1.0, 0.0, 0.0)
    assert autolora_weights(1.0) == (0.0, 1.0, 6.0)
    assert autolora_weights(0.25, max_kl_weight=4.0) == (0.75, 0.25, 1.0)
    for bad in (-0.01, 1.01, 55.0, float("nan")):
        with pytest.raises(ValueError, match=rf"standard_accuracy must be in \[0, 1\], got {bad}: divide percent"):
            autolora_weights(bad)


def test_the_log_names_the_weights_as_the_paper_does():
    assert AutoLoRa(max_kl_weight=4.0).term_weights(0.25) == {"lambda_1": 0.75, "lambda_2": 1.0}
    assert AFF().term_weights(0.25) == {}


def test_the_terms_are_weighted_means_of_both_paths():
    model, batch, attack = LinearModel(branches=("clean", "adv", "lora")), labelled(), Nudge()
    context = StepContext(attack, progress=0.9, standard_accuracy=0.3)
    terms = AutoLoRa(max_kl_weight=5.0)(model, batch, context)
    x, y = batch["padded_crop"], batch["label"]
    clean, adv = model.numpy(x, "lora"), model.numpy(attack.of(x), "adv")
    assert {name: term.item() for name, term in terms.items()} == {
        "clean": pytest.approx(0.7 * np.mean(slow_cross_entropy(clean, y)), rel=1e-5),
        "adversarial": pytest.approx(0.3 * np.mean(slow_cross_entropy(adv, y)), rel=1e-5),
        "kl": pytest.approx(1.5 * slow_kl(clean, adv), rel=1e-4),
    }
    assert [path for path, _ in model.passes] == ["lora", "adv"]  # clean images first
    assert model.passes[0][1] is x and torch.equal(model.passes[1][1], attack.of(x))


def test_before_the_first_measurement_only_the_clean_path_counts():
    model, batch = LinearModel(branches=("adv", "lora")), labelled()
    terms = AutoLoRa()(model, batch, StepContext(Nudge()))
    assert terms["clean"] > 0 and terms["adversarial"] == terms["kl"] == 0


def test_the_attack_raises_the_cross_entropy_of_the_path_without_adapters():
    model, batch, attack = LinearModel(branches=("adv", "lora")), labelled("resized_crop"), Nudge()
    AutoLoRa(augmentation="resized_crop")(model, batch, StepContext(attack, standard_accuracy=0.5))
    ((loss, attacked),) = attack.calls
    assert attacked is batch["resized_crop"]
    model.embedded.clear()
    probe = torch.rand_like(attacked)
    expected = np.mean(slow_cross_entropy(model.numpy(probe, "adv"), batch["label"]))
    assert loss(probe).item() == pytest.approx(expected, rel=1e-5)
    assert model.embedded == [("adv", N)]  # the clean path has no part in the attack


@pytest.mark.parametrize(
    ("name", "encoder", "adapters"), [("clean", False, True), ("adversarial", True, False), ("kl", True, True)]
)
def test_every_term_trains_its_own_part(name, encoder, adapters):
    objective, batch = AutoLoRa(rank=2), labelled(size=8)
    model = tiny_model(objective).train()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))

    def attack(loss_fn, images):
        with frozen(model):
            return PGD(steps=2)(loss_fn, images, torch.zeros_like(images))

    objective(model, batch, StepContext(attack, standard_accuracy=0.5))[name].backward()
    learns = {key: p.grad is not None and bool(p.grad.any()) for key, p in model.named_parameters()}
    assert all(learns[key] for key in learns if key.startswith("classifier."))
    lora = {key for key in learns if "lora_" in key}
    assert lora and {learns[key] for key in lora} == {adapters}
    assert {learns[key] for key in learns.keys() - lora if key.startswith("backbone.")} == {encoder}


def test_the_accuracy_behind_the_weights_is_that_of_the_paper_or_of_the_release():
    assert AutoLoRa().accuracy_request == AccuracyRequest("lora", "validation", 1)
    assert AutoLoRa(formulation="released").accuracy_request == AccuracyRequest("adv", "train", 5)
    assert AFF().accuracy_request is None


def test_a_model_without_the_path_of_the_clean_images_is_refused():
    plain = tiny_model(AFF(clean_branch="adv", reference_branch="adv"))
    with pytest.raises(ValueError, match=r"AutoLoRa passes images through the path 'lora', .*adapters.with_lora_path"):
        check_fit(AutoLoRa(), plain)
    check_fit(AutoLoRa(), tiny_model(AutoLoRa(rank=2)))


def test_declarations_and_refusals():
    assert (AutoLoRa().title, AutoLoRa().views, AutoLoRa().norm_branches) == ("AutoLoRa", ("padded_crop",), ("adv",))
    assert AutoLoRa().paths == ("lora", "adv") and AutoLoRa().trains == "all" and AutoLoRa().adversarial
    assert AutoLoRa().needs_labels and AutoLoRa().attack_in_eval_mode and AutoLoRa().rank == 8
    assert AutoLoRa().training_attack == PGD(8 / 255, 2 / 255, 10, start_std=0.001)
    recipe = AutoLoRa().recipe
    assert (recipe["lr_rule"], recipe["learning_rate"], recipe["num_train_epochs"]) == ("auto", 0.1, 50)
    assert recipe["auto_lr_epochs"] == [16, 24, 28, 36, 40, 42, 44, 46, 48]
    with pytest.raises(ValueError, match="rank must be a whole number, 1 or more, got 0"):
        AutoLoRa(rank=0)
    with pytest.raises(ValueError, match="max_kl_weight must be positive, got -1"):
        AutoLoRa(max_kl_weight=-1)
    for name, values in (
        ("formulation", "'paper' or 'released'"),
        ("init", "'matched' or 'peft'"),
        ("norm_update", "'both' or 'plain_only'"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be {values}, got 'other'"):
            AutoLoRa(**{name: "other"})
    with pytest.raises(ValueError, match=r"AutoLoRa needs labels, got a batch with padded_crop"):
        AutoLoRa()(LinearModel(), {"padded_crop": torch.zeros(N, 3, 2, 2)}, StepContext(Nudge()))
