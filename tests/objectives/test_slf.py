"""SLF: the cross-entropy of clean images, on an encoder that stands still."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from linear_model import WIDTH, LinearModel, N, labelled, slow_cross_entropy, softmax
from training import tiny_model

from hf_robust.objectives.base import StepContext
from hf_robust.objectives.slf import SLF


def no_attack(*_: Any) -> Any:
    raise AssertionError("nothing is attacked")


def test_the_term_is_the_cross_entropy_of_the_clean_images():
    model, batch = LinearModel(), labelled()
    terms = SLF()(model, batch, StepContext(no_attack))
    logits = model.numpy(batch["padded_crop"], "adv")
    assert list(terms) == ["clean"]
    assert terms["clean"].item() == pytest.approx(np.mean(slow_cross_entropy(logits, batch["label"])), rel=1e-5)
    ((branch, images),) = model.passes
    assert branch == "adv" and images is batch["padded_crop"]
    terms["clean"].backward()
    odds = softmax(logits) - np.eye(WIDTH)[batch["label"].numpy()]
    slow = batch["padded_crop"].flatten(1).double().numpy().T @ odds / N
    np.testing.assert_allclose(model.weight["adv"].grad.numpy(), slow, atol=1e-6)


def test_many_steps_leave_every_tensor_of_the_encoder_as_it_was():
    model, batch = tiny_model(SLF(augmentation="resized_crop")), labelled("resized_crop", size=8)
    model.freeze_backbone()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    head = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, momentum=0.9, weight_decay=1e-2)
    losses = []
    for _ in range(20):
        model.train()
        head.zero_grad()
        (loss,) = SLF(augmentation="resized_crop")(model, batch, StepContext(no_attack)).values()
        loss.backward()
        head.step()
        losses.append(loss.item())
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"classifier.weight", "classifier.bias"}
    assert losses[-1] < 0.8 * losses[0]


def test_declarations_and_refusals():
    assert (SLF().title, SLF().views, SLF().norm_branches) == ("SLF", ("padded_crop",), ("adv",))
    assert SLF().needs_labels and SLF().trains == "classifier" and not SLF().adversarial
    assert SLF().accuracy_request is None and SLF().idle_branches == ()
    recipe = SLF().recipe
    assert (recipe["per_device_train_batch_size"], recipe["learning_rate"]) == (512, 0.01)
    assert (recipe["lr_milestones"], recipe["num_train_epochs"], recipe["weight_decay"]) == ([10, 20], 25, 2e-4)
    with pytest.raises(ValueError, match=r"SLF needs labels, got a batch with padded_crop: name the label column"):
        SLF()(LinearModel(), {"padded_crop": labelled()["padded_crop"]}, StepContext(no_attack))
    with pytest.raises(ValueError, match="augmentation must be 'padded_crop' or 'resized_crop', got 'view_1'"):
        SLF(augmentation="view_1")  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="SLF has no loss by which images could be chosen"):
        SLF().candidate_passes(LinearModel(), labelled(), StepContext(no_attack))
