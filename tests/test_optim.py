"""LARS against the released update, and the schedule against the released curve."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_robust.optim import LARS, make_optimizer, paper_schedule, step_decay, warmup_cosine

CURVE = np.load(Path(__file__).parent / "data" / "released_schedule.npz")["lr"]


def slow_lars(w: torch.Tensor, g: torch.Tensor, v: torch.Tensor, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
    momentum, decay, eta = 0.9, 1e-6, 1e-3
    if w.norm() < 1e-15 or g.norm() < 1e-15:
        ratio = 1.0
    else:
        ratio = eta * w.norm().item() / (g.norm().item() + decay * w.norm().item())
    v = momentum * v + lr * ratio * (g + decay * w)
    return w - v, v


def test_lars_equals_the_released_update_over_changing_rates() -> None:
    torch.manual_seed(0)
    shapes = [(8, 3, 3, 3), (8,), (5, 8), (8,)]
    params = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    params[-1].data.zero_()  # a norm's bias: its first step has ratio 1
    optimizer = LARS(params, lr=1.0)
    w = [p.detach().clone() for p in params]
    v = [torch.zeros_like(p) for p in params]
    for step, lr in enumerate((0.5, 5.0, 0.1)):
        for group in optimizer.param_groups:
            group["lr"] = lr
        grads = [torch.randn(s, generator=torch.Generator().manual_seed(step)) for s in shapes]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        for k, g in enumerate(grads):
            w[k], v[k] = slow_lars(w[k], g, v[k], lr)
            torch.testing.assert_close(params[k].detach(), w[k], rtol=1e-5, atol=1e-6)
            assert torch.equal(params[k].grad, g)


def test_lars_skips_parameters_without_gradient_and_resumes() -> None:
    torch.manual_seed(0)
    used, unused = torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = LARS([used, unused], lr=0.1)
    used.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(unused.detach(), torch.ones(3))
    twin = torch.nn.Parameter(used.detach().clone())
    resumed = LARS([twin, torch.nn.Parameter(torch.ones(3))], lr=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    used.grad = twin.grad = torch.tensor([1.0, -2.0, 0.5])
    optimizer.step()
    resumed.step()
    assert torch.equal(used.detach(), twin.detach())


def test_lars_ignores_the_scale_of_the_loss() -> None:
    results = []
    for scale in (1.0, 0.5):
        p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        p.grad = scale * torch.tensor([0.3, -0.1])
        LARS([p], lr=1.0, weight_decay=0.0).step()
        results.append(p.detach().clone())
    torch.testing.assert_close(results[0], results[1])


def test_lars_refuses_negative_values() -> None:
    with pytest.raises(ValueError, match="momentum must be 0 or more, got -1"):
        LARS([torch.nn.Parameter(torch.ones(1))], momentum=-1)


def test_schedule_equals_the_released_curve() -> None:
    ours = [warmup_cosine(t, base_lr=5.0, warmup_epochs=10, epochs=1000) / 5.0 for t in range(len(CURVE))]
    np.testing.assert_allclose(ours, CURVE, atol=1e-5)


@pytest.mark.parametrize(
    ("base_lr", "warmup", "epochs", "values"),
    [
        (
            5.0,
            10,
            1000,
            {0.5: 0.25, 5: 2.5, 10: 5.0, 100: 4.898732, 250: 4.309335, 505: 2.5, 750: 0.746314, 1000: 1e-6},
        ),
        (0.6, 2, 200, {1: 0.3, 2: 0.6, 21: 0.586471, 101: 0.3}),
    ],
)
def test_schedule_oracles(base_lr: float, warmup: int, epochs: int, values: dict[float, float]) -> None:
    for u, expected in values.items():
        rate = warmup_cosine(u, base_lr=base_lr, warmup_epochs=warmup, epochs=epochs)
        assert rate == pytest.approx(expected, abs=1e-6)


def test_schedule_at_its_edges() -> None:
    assert warmup_cosine(0, base_lr=1.0, warmup_epochs=0, epochs=10) == 1.0
    assert warmup_cosine(3, base_lr=1.0, warmup_epochs=10, epochs=2) == pytest.approx(0.3)  # cut off in the warm-up
    assert warmup_cosine(12, base_lr=1.0, warmup_epochs=1, epochs=10) == pytest.approx(1e-6)  # past the end


@pytest.mark.parametrize(
    ("epoch", "rate"), [(0, 0.1), (28.99, 0.1), (29, 0.01), (58.9, 0.01), (59, 0.001), (90, 0.001)]
)
def test_milestones_take_the_rate_to_a_tenth(epoch, rate):
    """The released ImageNet-224 run: from the 30th and from the 60th epoch on, i.e. after 29 and 59."""
    assert step_decay(epoch, 0.1, [29, 59]) == pytest.approx(rate)
    schedule = paper_schedule(
        lambda step: step / 100,
        90,
        base_lr=0.1,
        warmup_epochs=0,
        min_lr=1e-6,
        granularity="step",
        milestones=[29, 59],
    )
    assert schedule(round(epoch * 100)) == pytest.approx(rate / 0.1)


def test_an_unknown_optimiser_is_an_error():
    with pytest.raises(ValueError, match="optimizer must be lars, sgd or adamw, got 'adam'"):
        make_optimizer("adam", [torch.nn.Parameter(torch.ones(1))], lr=1.0, momentum=0.9, weight_decay=0.0)
