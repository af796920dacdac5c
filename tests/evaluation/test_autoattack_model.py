"""The model behind AutoAttack: counted, held still and put back, and honest about its gradients."""

from __future__ import annotations

import pytest
import torch
from attacked import Ladder, ladder_images
from torch import nn

from hf_robust.evaluation.autoattack_findings import Findings
from hf_robust.evaluation.autoattack_model import AttackedModel, examine, held

CPU = torch.device("cpu")
IMAGES, LABELS = ladder_images([20.0, 50.0, 90.0, 130.0])


def test_passes_are_counted_by_image_and_gradients_are_those_of_the_model() -> None:
    model, work = AttackedModel(Ladder(), CPU), []
    model.on_work = work.append
    pixels = IMAGES.clone().requires_grad_()
    logits = model(pixels)
    logits[:, 0].sum().backward()
    assert (model.forwards, model.backwards, work) == (4, 4, [4, 8])
    expected = IMAGES.clone().requires_grad_()
    Ladder()(expected)[:, 0].sum().backward()
    assert torch.equal(pixels.grad, expected.grad) and torch.equal(logits, Ladder()(IMAGES))
    with torch.no_grad():
        model(IMAGES)
        model.logits(IMAGES)
    assert (model.forwards, model.backwards) == (8, 4)


def test_gradients_are_contiguous_whatever_the_layout_inside() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()).to(memory_format=torch.channels_last).eval()
    pixels = IMAGES.clone().requires_grad_()
    (raw,) = torch.autograd.grad(network(pixels).sum(), pixels)
    (found,) = torch.autograd.grad(AttackedModel(network, CPU)(pixels).sum(), pixels)
    assert not raw.is_contiguous() and found.is_contiguous() and torch.equal(raw, found)


def test_logits_are_a_copy_that_may_be_written_to() -> None:
    store = torch.arange(16.0).view(4, 4)
    model = AttackedModel(lambda images: store, CPU)
    model(IMAGES).zero_()
    assert torch.equal(store, torch.arange(16.0).view(4, 4))


def test_tied_weights_stay_tied_and_whole_numbers_stay_whole() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, nn.BatchNorm1d(4), second).half().eval()
    with held(model) as findings:
        assert first.weight.dtype == torch.float32 and second.weight is first.weight
        assert model[1].num_batches_tracked.dtype == torch.int64 and model[1].running_mean.dtype == torch.float32
        assert not first.weight.requires_grad
    assert first.weight.dtype == model[1].running_mean.dtype == torch.float16
    assert findings.weights == {"float16"} and not findings.was_training


def test_a_wrapper_around_a_model_in_evaluation_mode_is_not_in_train_mode() -> None:
    wrapper = nn.Sequential(nn.Linear(4, 4).eval())
    assert wrapper.training
    with held(wrapper) as findings:
        assert not findings.was_training and not wrapper.training
    assert wrapper.training and not wrapper[0].training


def test_logits_that_are_not_finite_are_the_models_fault_only_for_finite_images() -> None:
    model = AttackedModel(Ladder(), CPU)
    strange = IMAGES.clone()
    strange[1] = float("nan")
    assert model(strange)[1].isnan().all()
    with pytest.raises(ValueError, match="not finite"):
        AttackedModel(lambda images: Ladder()(images) / (images.mean((1, 2, 3)) > 0.1)[:, None], CPU)(IMAGES)


def test_only_rightly_classified_images_are_examined() -> None:
    findings = Findings()
    examine(AttackedModel(Ladder(), CPU), IMAGES, torch.tensor([0, 1, 0, 0]), findings)
    assert findings == Findings(examined=2, largest_margin=findings.largest_margin) and findings.largest_margin > 0


def test_a_model_cut_off_from_its_pixels_is_refused() -> None:
    bias = nn.Parameter(torch.zeros(4))
    for cut in (lambda images: Ladder()(images.detach()) + bias, lambda images: Ladder()(images.detach()).detach()):
        with pytest.raises(ValueError, match="cut off from the pixels"):
            examine(AttackedModel(cut, CPU), IMAGES, LABELS, Findings())
        pixels = IMAGES.clone().requires_grad_()
        with pytest.raises(ValueError, match="cut off from the pixels"):
            AttackedModel(cut, CPU)(pixels).sum().backward()
