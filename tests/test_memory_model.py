from __future__ import annotations

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from training import tiny_images, tiny_model, tiny_trainer

from hf_robust import memory_model
from hf_robust.device_memory import device_memory
from hf_robust.memory_model import StepMemory, check_memory, step_memory, suggest_batch_size
from hf_robust.objectives import load_objective
from hf_robust.objectives.a_infonce import AInfoNCE
from hf_robust.objectives.acl import ACL

LOGGER = "hf_robust.memory_model"


def counted(action) -> int:
    living = memory_model._Living()
    with FakeTensorMode(), living:
        action()
    return living.peak


def test_tensors_are_counted_from_birth_to_death():
    def action():
        x = torch.empty(1000)
        y = x * 2  # both live: 8,000 bytes
        del x
        y.add_(1)
        return y.view(10, 100)[2:].t()  # a view takes nothing

    assert counted(action) == 8000


def test_a_backward_pass_keeps_what_it_needs():
    x = 4 * 100 * 50

    def action():
        images = torch.empty(100, 50, requires_grad=True)
        out = images.exp().exp().exp()  # each keeps its result
        out.sum().backward()

    # the image, three results, and on the way back at most two gradients
    assert 4 * x < counted(action) <= 6 * x + 64


@pytest.mark.parametrize("name", ["dynacl", "autolora"])
def test_methods_with_a_teacher_or_adapters_can_be_foreseen(name):
    objective = load_objective(name)(**({"ema_decay": 0.9} if name == "dynacl" else {}))
    model = tiny_model(objective)
    found = step_memory(model, objective, 8)
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert found.weights == weights * (2 if name == "dynacl" else 1) and found.activations > 8 * 3 * 8 * 8 * 4
    assert found.total == found.weights + found.state + found.activations


def test_batch_precision_processes_and_checkpointing():
    model, objective = tiny_model(ACL()), ACL()
    small, plain = (step_memory(model, objective, n) for n in (32, 64))
    assert 1.8 * small.activations < plain.activations < 2.2 * small.activations
    half = step_memory(model, objective, 64, precision="bf16", optimizer="adamw")
    assert 0.4 * plain.activations < half.activations < 0.75 * plain.activations
    tensors = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    trained = sum(p.numel() * p.element_size() for p in model.parameters())
    assert (plain.state, half.state) == (trained + tensors, 2 * trained + tensors // 2)
    many = step_memory(model, objective, 64, processes=8)
    matrix = 4 * (2 * 8 * 64) ** 2  # similarities of all views of all processes, in float32
    assert matrix < many.activations - plain.activations < 20 * matrix
    model.gradient_checkpointing_enable()
    assert step_memory(model, objective, 64).activations < 0.9 * plain.activations


def test_the_model_and_the_random_state_stay_as_they_are():
    model, state = tiny_model(ACL()).eval(), torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step_memory(model, ACL(), 4)
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any("Fake" in type(p).__name__ for p in model.parameters())


def test_a_method_that_asks_for_a_number_of_the_step_is_foreseen():
    objective = AInfoNCE(ACL(), "ip", sigma_warmup=0.5)
    plain = step_memory(tiny_model(ACL()), ACL(), 8).activations
    assert step_memory(tiny_model(objective), objective, 8).activations >= plain > 0


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"processes": 0}, {"precision": "int8"}, {"optimizer": "adam"}])
def test_arguments_out_of_range(wrong):
    with pytest.raises(ValueError, match="must be .*, got"):
        step_memory(tiny_model(ACL()), ACL(), **{"batch_size": 4, **wrong})


def test_the_largest_batch_that_fits(monkeypatch):
    model = tiny_model(ACL())
    assert suggest_batch_size(model, ACL(), memory=1000, at_most=2) == 0
    asked = []

    def linear(model, objective, images, **setting):
        asked.append(setting["processes"])
        return StepMemory(images, 0, 50, 1000 * images)

    monkeypatch.setattr(memory_model, "step_memory", linear)
    spare = 1 + memory_model.TOLERANCE
    for room, found in ((208_000, 200), (200_060, 200), (15_060, 15), (2_060, 2), (2_000, 0), (10**7, 500)):
        assert suggest_batch_size(model, ACL(), memory=int(room * spare), at_most=500, processes=4) == found
    assert set(asked) == {4} and len(asked) < 60


def test_what_is_free_here():
    free, total = device_memory("cpu")
    assert 2**20 < free <= total < 2**50


@pytest.fixture
def machine(monkeypatch):
    """A machine of another size: bytes that are free, and all there are."""

    def make(free, total):
        monkeypatch.setattr(memory_model, "device_memory", lambda device: (free, total))

    return make


def test_nothing_is_counted_where_it_cannot_matter(machine, monkeypatch):
    machine(2**40, 2**40)
    monkeypatch.setattr(memory_model, "step_memory", lambda *a, **k: pytest.fail("counted"))
    assert check_memory(tiny_model(ACL()), ACL(), 4) is None


def test_a_step_that_fits_is_one_line(machine, caplog):
    machine(2**22, 2**30)
    with caplog.at_level(logging.INFO, LOGGER):
        found = check_memory(tiny_model(ACL()), ACL(), 16)
        check_memory(tiny_model(ACL()), ACL(), 16, first=False)
    assert isinstance(found, StepMemory)
    (record,) = caplog.records
    assert record.levelno == logging.INFO and "a step on 16 images is foreseen to need 0.00 GiB" in record.getMessage()


def test_what_cannot_be_run_without_content_is_not_foreseen(machine, caplog):
    class Reads(ACL):
        def __call__(self, model, batch, context):
            return super().__call__(model, batch, context) if float(batch["view_1"].sum()) > 0 else {}

    machine(2**20, 2**20)
    assert check_memory(tiny_model(ACL()), Reads(), 16) is None and not caplog.records


def test_the_trainer_warns_with_a_batch_that_fits_and_trains_on(machine, monkeypatch, caplog, tmp_path):
    machine(2**20, 2**30)
    monkeypatch.setattr(memory_model, "suggest_batch_size", lambda *a, **k: 24)
    trainer = tiny_trainer(tmp_path, ACL(), data=tiny_images(64), per_device_train_batch_size=64, max_steps=1)
    with caplog.at_level(logging.WARNING, LOGGER):
        trainer.train()
    (record,) = [r for r in caplog.records if r.name == LOGGER]
    text = record.getMessage()
    assert "per_device_train_batch_size=64" in text and "0.00 GiB are free on cpu" in text and "learning_rate" in text
    assert "--per_device_train_batch_size 24 " in text
    assert trainer.state.global_step == 1


def test_a_step_is_refused_when_three_quarters_of_its_count_are_more_than_all_there_is(machine, caplog):
    model = tiny_model(ACL())
    most = step_memory(model, ACL(), 64).total * 3 // 4
    machine(2**16, most + 1)
    with caplog.at_level(logging.WARNING, LOGGER):
        assert check_memory(model, ACL(), 64) is not None
    assert len(caplog.records) == 1
    machine(2**16, most - 1)
    with pytest.raises(ValueError, match="is foreseen to need"):
        check_memory(model, ACL(), 64)


def test_a_step_larger_than_the_machine_is_refused_before_training(machine, monkeypatch, tmp_path):
    machine(2**16, 2**16)
    monkeypatch.setattr(memory_model, "suggest_batch_size", lambda *a, **k: 0)
    trainer = tiny_trainer(tmp_path, ACL(), per_device_train_batch_size=8)
    with pytest.raises(ValueError, match="not even two images are foreseen to fit: try --bf16"):
        trainer.train()
    assert trainer.state.global_step == 0
