"""Momentum encoder, shared norm statistics, and the moments at which the trainer's hooks are called."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerControl, TrainerState

from hf_robust.callbacks import MethodCallback, average_buffers, share_from_first, update_ema


def network(value: float) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    for tensor in [*net.parameters(), net[1].running_mean, net[1].running_var]:
        nn.init.constant_(tensor, value)
    return net


# ---------------------------------------------------------------------- momentum encoder
@pytest.mark.parametrize("decay", [0.99, 0.5, 0.0])
def test_ema_is_decay_times_teacher_plus_the_rest_of_the_student(decay):
    torch.manual_seed(0)
    teacher, student = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    expected = [
        decay * t.detach() + (1 - decay) * s.detach()
        for t, s in zip(teacher.parameters(), student.parameters(), strict=True)
    ]
    kept = [p.clone() for p in student.parameters()]
    update_ema(teacher, student, decay)
    torch.testing.assert_close([p.detach() for p in teacher.parameters()], expected)
    assert all(torch.equal(p, k) for p, k in zip(student.parameters(), kept, strict=True))


def test_ema_leaves_buffers_and_gradients_alone():
    teacher, student = network(1.0), network(3.0)
    update_ema(teacher, student, 0.9)
    assert teacher[0].weight.unique().item() == pytest.approx(1.2)
    assert teacher[1].running_mean.unique().item() == teacher[1].running_var.unique().item() == 1.0
    assert all(p.grad is None and p.requires_grad and p.is_leaf for p in teacher.parameters())


# ---------------------------------------------------------------------- shared norm statistics
def test_one_process_keeps_its_buffers():
    net = network(2.0)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    assert not dist.is_initialized()
    average_buffers(net)
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())


@pytest.fixture
def other_process(monkeypatch):
    """A second process whose statistics are all 3 higher: what the sum over both would be."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda flat: flat.mul_(2).add_(3))
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src: tensor.fill_(7) if src == 0 else pytest.fail("rank"))


def test_two_processes_get_the_mean_of_floating_point_buffers(other_process):
    net = network(2.0)
    net[1].num_batches_tracked += 5
    net.register_buffer("low", torch.full((2, 2), 4.0, dtype=torch.bfloat16))
    average_buffers(net)
    assert net[1].running_mean.tolist() == net[1].running_var.tolist() == [3.5] * 4
    assert net.low.tolist() == [[5.5, 5.5]] * 2 and net.low.dtype == torch.bfloat16
    assert int(net[1].num_batches_tracked) == 5
    assert net[0].weight.unique().item() == 2.0  # parameters are the optimiser's


def test_a_network_without_statistics_needs_no_communication(other_process, monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda flat: pytest.fail("nothing to send"))
    average_buffers(nn.Linear(2, 2))


def test_all_processes_start_from_the_first_ones_weights_and_buffers(other_process):
    net = network(2.0)
    share_from_first(net)
    assert {float(t.detach().unique()) for t in (*net.parameters(), *net.buffers())} == {7.0}


def test_one_process_keeps_its_weights(monkeypatch):
    monkeypatch.setattr(dist, "broadcast", lambda *_, **__: pytest.fail("nobody listens"))
    share_from_first(network(2.0))


# ---------------------------------------------------------------------- moments
class Hooks:
    def __init__(self) -> None:
        self.calls: list = []

    def __getattr__(self, name):
        return lambda *values: self.calls.append((name, *values))


def announce(event: str, epoch: float | None) -> list:
    hooks = Hooks()
    args = SimpleNamespace(save_strategy="epoch")
    getattr(MethodCallback(hooks), event)(args, TrainerState(epoch=epoch), TrainerControl(), model=None)
    return hooks.calls


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(None, 0), (0, 0), (1.0, 1), (0.5, 0), (1.5, 1), (1.99, 1), (2.0 - 1e-9, 2), (7 * (1 / 7), 1)],
)
def test_an_epoch_that_is_resumed_in_the_middle_keeps_its_number(epoch, expected):
    """`round` would give the second half of epoch 1 the order of epoch 2."""
    assert announce("on_epoch_begin", epoch) == [("start_epoch", expected)]


@pytest.mark.parametrize(("epoch", "expected"), [(None, 0.0), (1.0, 1.0), (1.5, 1.5)])
def test_the_end_of_an_epoch_tells_how_far_the_training_is(epoch, expected):
    """Not rounded: a run that stops in mid-epoch has not completed the epoch."""
    assert announce("on_epoch_end", epoch) == [("close_round", expected)]


@pytest.mark.parametrize(
    ("ended", "strategy", "saved"), [(True, "epoch", True), (False, "epoch", False), (False, "steps", True)]
)
def test_a_round_that_ends_no_epoch_is_no_checkpoint_of_an_epoch(ended, strategy, saved):
    control = TrainerControl(should_save=True)
    trainer = SimpleNamespace(close_round=lambda rounds: ended)
    MethodCallback(trainer).on_epoch_end(SimpleNamespace(save_strategy=strategy), TrainerState(epoch=1.0), control)
    assert control.should_save is saved


def test_hooks_around_the_optimiser_step():
    assert announce("on_pre_optimizer_step", 0.5) == [("before_step",)]
    assert announce("on_optimizer_step", 0.5) == [("after_step",)]
