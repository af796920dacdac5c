"""The plain published steps and the library's compute the same, in float64, given the same noise."""

from __future__ import annotations

import argparse
import copy

import pytest
import torch
from selection_noise import stacked_noise
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import reference, reference_finetuning
from benchmarks.bench_finetune import autolora_reference
from benchmarks.setting import LR, batch_of, build_model, library_step
from hf_robust.attacks import PGD, frozen
from hf_robust.data import ImageDataset
from hf_robust.evaluation.accuracy import measure_accuracy
from hf_robust.losses import invariance_terms
from hf_robust.losses import nt_xent as nt_xent_of_the_library
from hf_robust.objectives.acl import ACL
from hf_robust.objectives.aff import AFF
from hf_robust.objectives.air import AIR
from hf_robust.objectives.alf import ALF
from hf_robust.objectives.autolora import AutoLoRa
from hf_robust.objectives.slf import SLF
from hf_robust.optim import LARS

OPTIONS = argparse.Namespace(model="tiny", device="cpu", training_args=None, mode=None)
IMAGES = 6


def both(objective, monkeypatch):
    """The library's step in float64, the batch, the start its attack will draw, and a copy of its network."""
    batch = batch_of(OPTIONS, objective, IMAGES)
    step = library_step(OPTIONS, objective, batch, dtype="fp64")
    step.trainer.optimizer.state.clear()  # momentum of the step that set it up
    drawn = stacked_noise(monkeypatch)
    model = copy.deepcopy(step.trainer.accelerator.unwrap_model(step.trainer.model, keep_fp32_wrapper=False))
    live = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    return step, live, drawn, model


def rebuilt(objective, model):
    """A network of its own with the same weights, in plain memory order."""
    fresh = build_model(OPTIONS, objective).double()
    fresh.load_state_dict(model.state_dict())
    return fresh


def assert_same_state(ours, theirs, rtol=1e-9):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if name.endswith("projector.fc1.bias"):
            continue  # in front of a batch norm: its gradient is rounding noise, which LARS makes large
        torch.testing.assert_close(ours[name].double(), value.double(), rtol=rtol, atol=1e-11, msg=name)


@pytest.mark.parametrize("objective", [ACL(), AIR(lambda1=0.3, lambda2=0.9)], ids=["acl", "air"])
def test_pre_training_steps_are_equal(objective, monkeypatch):
    step, batch, drawn, model = both(objective, monkeypatch)
    lambdas = {name: getattr(objective, name) for name in ("lambda1", "lambda2") if hasattr(objective, name)}
    plain = reference.ContrastiveStep(rebuilt(objective, model), LR, **lambdas)
    for _ in range(2):  # the second one with momentum
        loss = step()
        views = reference.interleave(batch["view_1"], batch["view_2"])
        noise = reference.interleave(*drawn.pop().chunk(2))
        torch.testing.assert_close(loss, plain(views, batch.get("original"), noise), rtol=1e-10, atol=0)
    assert_same_state(step.trainer.model.state_dict(), plain.model.state_dict())
    moved = float((plain.model.backbone.conv1.weight - model.backbone.conv1.weight).detach().abs().max())
    assert moved > 1e-7  # the step did something


METHODS = {"slf": (SLF(), reference_finetuning.SLFStep), "alf": (ALF(), reference_finetuning.ALFStep)}
METHODS["aff"] = (AFF(), reference_finetuning.AFFStep)


@pytest.mark.parametrize("name", METHODS)
def test_fine_tuning_steps_are_equal(name, monkeypatch):
    objective, kind = METHODS[name]
    step, batch, drawn, model = both(objective, monkeypatch)
    plain = kind(rebuilt(objective, model), LR)
    for _ in range(2):
        loss = step()
        noise = drawn.pop() if drawn else None
        found = plain(batch[objective.views[0]], batch["label"], noise)
        torch.testing.assert_close(loss, found, rtol=1e-10, atol=0)
    assert_same_state(step.trainer.model.state_dict(), plain.model.state_dict())


def test_autolora_steps_are_equal(monkeypatch):
    objective = AutoLoRa(rank=2)
    step, batch, drawn, model = both(objective, monkeypatch)
    step.trainer._measured_at = step.trainer.state.global_step  # an accuracy that gives all terms weight
    step.trainer._standard_accuracy = 0.6
    plain = autolora_reference(model)
    for _ in range(2):
        loss = step()
        found = plain(batch[objective.views[0]], batch["label"], 0.6, drawn.pop())
        torch.testing.assert_close(loss, found, rtol=1e-10, atol=0)
    ours = {
        name.replace("base_layer.", ""): value
        for name, value in step.trainer.model.state_dict().items()
        if ".lora_" not in name
    }
    assert_same_state(ours, plain.model.state_dict())
    for name, (a, b, _) in plain.factors.items():
        layer = step.trainer.model.lora_layers[name]
        torch.testing.assert_close(layer.lora_A["default"].weight.flatten(1), a, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(layer.lora_B["default"].weight.flatten(1), b, rtol=1e-9, atol=1e-11)
    assert any(float(b.detach().abs().max()) > 0 for _, b, _ in plain.factors.values())


def test_losses_are_those_of_the_library():
    generator = torch.Generator().manual_seed(0)
    z_i, z_j, z_o, a_i, a_j = (torch.randn(5, 7, dtype=torch.float64, generator=generator) for _ in range(5))
    z, z_adv = reference.interleave(z_i, z_j), reference.interleave(a_i, a_j)
    expected = nt_xent_of_the_library(z_i, z_j)
    torch.testing.assert_close(reference.nt_xent(z), expected)
    torch.testing.assert_close(reference.nt_xent_by_classes(z), expected)
    for found, theirs in zip(
        reference.invariance(z, z_adv, z_o), invariance_terms(z_i, z_j, z_o, a_i, a_j), strict=True
    ):
        torch.testing.assert_close(found, theirs)


def test_lars_is_that_of_the_library():
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(3, 4, generator=generator), torch.zeros(4), torch.randn(4, generator=generator)]
    sides = [[p.clone().requires_grad_(True) for p in start] for _ in range(2)]
    optimizers = [reference.PerTensorLARS(sides[0], 2.0), LARS(sides[1], 2.0)]
    for _ in range(3):
        gradients = [torch.randn(p.shape, generator=generator) for p in start]
        for side, optimizer in zip(sides, optimizers, strict=True):
            for p, gradient in zip(side, gradients, strict=True):
                p.grad = gradient.clone()
            optimizer.step()
    for plain, fast in zip(*sides, strict=True):
        torch.testing.assert_close(plain, fast)


def flops_of(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "expected"), [("acl", 21.0), ("air", 22.5), ("slf", 1.0), ("alf", 21.0), ("aff", 36.0), ("pgd20", 42.0)]
)
def test_plain_steps_cost_what_the_published_ones_cost(name, expected):
    options = argparse.Namespace(**{**vars(OPTIONS), "model": "thin16"})
    objective = {"acl": ACL(), "air": AIR(), "pgd20": SLF()}.get(name) or METHODS[name][0]
    batch, model = batch_of(options, objective, 2), build_model(options, objective)
    x, labels = batch[objective.views[0]], batch["label"]
    if name in ("acl", "air"):
        step, views = reference.ContrastiveStep(model, LR), reference.interleave(batch["view_1"], batch["view_2"])
        found = flops_of(lambda: step(views, batch.get("original"))) / 4
    elif name == "pgd20":
        found = flops_of(lambda: reference_finetuning.right_answers(model, x, labels)) / 2
    else:
        step = METHODS[name][1](model)
        found = flops_of(lambda: step(x, labels)) / 2
    with torch.no_grad():
        one = flops_of(lambda: build_model(options, objective).eval().features(x[:1], "adv"))
    assert found / one == pytest.approx(expected, rel=0.01)


def test_pgd20_counts_as_the_library_does(monkeypatch):
    objective = SLF()
    model = build_model(OPTIONS, objective).double()
    images = torch.randint(0, 256, (12, 3, 8, 8), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    x = images.double() / 255
    with torch.no_grad():  # labels that the network finds easy to keep, and easy to lose
        labels = model.eval().embed(x, "adv").argmax(1)
    drawn = stacked_noise(monkeypatch)
    with frozen(model):
        found = measure_accuracy(
            *(lambda x: model.embed(x.double(), "adv"), ImageDataset.from_tensors(images, labels)),
            size=8,
            attack=PGD(steps=20),
            batch_size=12,
        )
    clean, attacked = reference_finetuning.right_answers(model, x, labels, drawn.pop().double())
    assert (found.standard, found.attacked) == (clean / 12, attacked / 12)
    assert clean == 12 > attacked
