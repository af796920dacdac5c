"""PGD: the released numbers, a linear model with a known optimum, and everything it must leave alone."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hf_robust.attacks import PGD, frozen, parse_budget
from hf_robust.losses import nt_xent

GOLDEN = np.load(Path(__file__).parent / "data" / "released_objectives.npz")


@pytest.mark.parametrize("case", ["s0", "s1", "s2"])
def test_contrastive_pgd_equals_the_released_code(case: str) -> None:
    x, weight, start, expected = (torch.tensor(GOLDEN[f"{case}/pgd_{k}"]) for k in ("x", "W", "delta0", "xadv"))

    def loss(images: torch.Tensor) -> torch.Tensor:
        z = torch.tanh(images.flatten(1) @ weight)
        return nt_xent(z[0::2], z[1::2])  # the released code interleaves the views

    x_adv = PGD(eps=8 / 255, step_size=2 / 255, steps=5)(loss, x, start)
    equal = (x_adv - expected).abs() <= 1e-6
    assert equal.float().mean() >= 0.999  # sign steps are chaotic in float32


def linear_loss(weight: torch.Tensor):
    return lambda images: (images * weight).sum()


def test_linf_reaches_the_optimum_of_a_linear_loss() -> None:
    torch.manual_seed(0)
    x, weight = torch.rand(4, 3, 5, 5), torch.randn(3, 5, 5)
    x_adv = PGD(eps=0.1, step_size=0.05, steps=6)(linear_loss(weight), x)
    torch.testing.assert_close(x_adv, (x + 0.1 * weight.sign()).clamp(0, 1))


def test_l2_reaches_the_optimum_of_a_linear_loss() -> None:
    torch.manual_seed(0)
    x, weight = torch.full((4, 3, 5, 5), 0.5), torch.randn(3, 5, 5)  # far from the box
    x_adv = PGD(eps=0.3, step_size=0.2, steps=40, norm="l2")(linear_loss(weight), x)
    torch.testing.assert_close(x_adv, x + 0.3 * weight / weight.norm(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_result_is_inside_ball_and_box(norm: str, steps: int) -> None:
    torch.manual_seed(1)
    x = torch.rand(6, 3, 4, 4).round(decimals=1)  # many pixels at 0 and 1
    eps = 0.05 if norm == "linf" else 0.5
    x_adv = PGD(eps=eps, step_size=0.04, steps=steps, norm=norm)(linear_loss(torch.randn(3, 4, 4)), x)
    delta = (x_adv - x).flatten(1)
    size = delta.abs().max(1).values if norm == "linf" else delta.norm(dim=1)
    assert bool((size <= eps + 1e-6).all()) and bool((size > 0).all())
    assert x_adv.min() >= 0 and x_adv.max() <= 1 and not x_adv.requires_grad


def test_random_l2_start_is_uniform_in_the_ball() -> None:
    x = torch.full((4000, 1, 1, 2), 0.5)
    start = PGD(eps=0.1, step_size=0.1, steps=0, norm="l2")(linear_loss(torch.ones(1)), x) - x
    radius = start.flatten(1).norm(dim=1) / 0.1
    assert radius.max() <= 1 + 1e-5
    assert radius.square().mean().item() == pytest.approx(0.5, abs=0.02)  # uniform in a disc: E r^2 = 1/2


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def test_the_attacked_model_and_the_global_rng_are_untouched() -> None:
    torch.manual_seed(0)
    model = Net().train()
    model[4].eval()  # a mixed state must come back as it was
    model[1].weight.requires_grad_(False)
    model[4].weight.grad = torch.ones_like(model[4].weight)
    before = copy.deepcopy(model.state_dict())
    flags = [(p.requires_grad, p.grad is not None) for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    x = torch.rand(4, 3, 4, 4)
    with frozen(model):
        assert not any(p.requires_grad for p in model.parameters()) and not any(m.training for m in model.modules())
        PGD(steps=2)(lambda images: model(images).square().sum(), x)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert flags == [(p.requires_grad, p.grad is not None) for p in model.parameters()]
    assert bool((model[4].weight.grad == 1).all())
    assert modes == [m.training for m in model.modules()]
    x_again = torch.rand(4, 3, 4, 4)
    torch.set_rng_state(rng)
    torch.rand(4, 3, 4, 4)
    assert torch.equal(x_again, torch.rand(4, 3, 4, 4))


def test_frozen_restores_after_an_error_and_keeps_modes_when_asked() -> None:
    model = Net().train()
    with pytest.raises(RuntimeError, match="boom"), frozen(model):
        raise RuntimeError("boom")
    assert all(p.requires_grad for p in model.parameters()) and model[2].training
    with frozen(model, eval_mode=False):
        assert model[2].training and not model[1].weight.requires_grad


def test_freezing_parameters_does_not_change_the_images() -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.rand(4, 3, 4, 4)
    start = torch.zeros_like(x).uniform_(-0.03, 0.03)

    def loss(images: torch.Tensor) -> torch.Tensor:
        return model(images).square().sum()

    plain = PGD(steps=3)(loss, x, start)
    with frozen(model):
        assert torch.equal(PGD(steps=3)(loss, x, start), plain)


def test_start_is_drawn_from_the_generator() -> None:
    x = torch.full((2, 1, 2, 2), 0.5)
    attack = PGD(steps=0)
    draws = [attack(linear_loss(torch.ones(1)), x, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    torch.manual_seed(3)
    first = attack(linear_loss(torch.ones(1)), x)
    torch.manual_seed(4)
    assert not torch.equal(first, attack(linear_loss(torch.ones(1)), x))
    still = PGD(steps=0, random_start=False)(linear_loss(torch.ones(1)), x)
    assert torch.equal(still, x)


def test_noise_does_not_depend_on_memory_order() -> None:
    x = torch.rand(2, 3, 4, 4)
    attack = PGD(steps=0)
    one = attack(linear_loss(torch.ones(1)), x, generator=torch.Generator().manual_seed(0))
    other = attack(
        linear_loss(torch.ones(1)),
        x.contiguous(memory_format=torch.channels_last),
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_non_finite_gradients_move_nothing(norm: str) -> None:
    x = torch.full((2, 1, 2, 2), 0.5)
    bad = torch.tensor([[[float("nan"), 1.0], [float("inf"), -1.0]]])
    x_adv = PGD(eps=0.1, step_size=0.1, steps=1, norm=norm, random_start=False)(linear_loss(bad), x)
    assert torch.isfinite(x_adv).all()
    assert bool((x_adv[:, 0, :, 0] == 0.5).all())
    assert bool((x_adv[:, 0, 0, 1] > 0.5).all()) and bool((x_adv[:, 0, 1, 1] < 0.5).all())


def first_images(attack: PGD, x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """What the loss is shown first."""
    seen = []

    def loss(images: torch.Tensor) -> torch.Tensor:
        seen.append(images.detach().clone())
        return images.sum()

    attack(loss, x, generator=torch.Generator().manual_seed(seed))
    return seen[0]


def test_a_gaussian_start_has_its_deviation_and_is_not_clipped() -> None:
    x = torch.zeros(50, 3, 10, 10)  # the lower end of the image range
    shown = first_images(PGD(steps=1, start_std=0.001), x)
    assert shown.std().item() == pytest.approx(0.001, rel=0.05) and abs(shown.mean().item()) < 5e-5
    assert shown.min() < -0.002 and shown.max() > 0.002
    noise = torch.empty(x.shape).normal_(std=0.001, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shown, noise)  # of the generator, and nothing else of it is used
    wide = first_images(PGD(eps=0.01, steps=1, start_std=0.5), x)
    assert wide.abs().max() > 1  # nor clipped to the ball
    assert wide.std().item() == pytest.approx(first_images(PGD(norm="l2", steps=1, start_std=0.5), x).std().item())
    assert first_images(PGD(steps=1), x).abs().max() <= 8 / 255  # the uniform start


def test_from_a_gaussian_start_the_result_is_inside_ball_and_box() -> None:
    torch.manual_seed(2)
    x = torch.rand(6, 3, 4, 4).round(decimals=1)
    for norm, steps in (("linf", 0), ("linf", 2), ("l2", 0), ("l2", 2)):
        attack = PGD(eps=0.05, step_size=0.04, steps=steps, norm=norm, start_std=0.3)
        x_adv = attack(linear_loss(torch.randn(3, 4, 4)), x)
        delta = (x_adv - x).flatten(1)
        size = delta.abs().max(1).values if norm == "linf" else delta.norm(dim=1)
        assert bool((size <= 0.05 + 1e-6).all()) and x_adv.min() >= 0 and x_adv.max() <= 1


def test_a_gaussian_start_finds_the_direction_that_the_image_itself_hides() -> None:
    """The divergence from an image to itself has no gradient; a thousandth of noise gives it one."""
    torch.manual_seed(0)
    x, weight = torch.rand(4, 3, 5, 5), torch.randn(75, 3)
    reference = (x.flatten(1) @ weight).detach()

    def distance(images: torch.Tensor) -> torch.Tensor:
        return (images.flatten(1) @ weight - reference).square().sum()

    stuck = PGD(steps=3, random_start=False)(distance, x)
    assert torch.equal(stuck, x)
    assert distance(PGD(steps=3, start_std=0.001)(distance, x)) > 1


def test_an_attack_without_gaussian_start_is_described_as_before_there_was_one() -> None:
    """Checkpoints hold this text, and are resumed when it is the same."""
    assert repr(PGD()) == (
        "PGD(eps=0.03137254901960784, step_size=0.00784313725490196, steps=5, norm='linf', random_start=True)"
    )
    attack = PGD(start_std=0.001)
    assert repr(attack).endswith("random_start=True, start_std=0.001)") and eval(repr(attack)) == attack
    assert attack != PGD()
    assert repr(PGD(clip_start=True)).endswith("random_start=True, clip_start=True)")


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_clipped_start_is_inside_ball_and_box_before_the_first_gradient(norm: str) -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 3, 5, 5).round()  # black and white: noise leaves the box at once
    seen = []

    def loss(images: torch.Tensor) -> torch.Tensor:
        seen.append(images.detach())
        return images.sum()

    plain, clipped = (PGD(eps=0.1, step_size=0.05, steps=1, norm=norm, clip_start=clip) for clip in (False, True))
    for attack in (plain, clipped):
        attack(loss, x, generator=torch.Generator().manual_seed(1))
    assert seen[0].min() < 0 and seen[0].max() > 1
    torch.testing.assert_close(seen[1], seen[0].clamp(0, 1), atol=1e-7, rtol=0)
    far = clipped(loss, x, torch.ones_like(x))  # a start that was given, too
    assert (seen[-1] - x).flatten(1).norm(dim=1, p=float("inf") if norm == "linf" else 2).max() <= 0.1 + 1e-6
    assert far.max() <= 1


# ---------------------------------------------------------------------- other algorithms
def slow_pgd(
    loss: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    start: torch.Tensor,
    sizes: Sequence[float],
    *,
    norm: str,
    eps: float,
    min_gain: float = 0.0,
) -> tuple[torch.Tensor, int, int]:
    """The attack image by image, step by step; how often the loss was computed and how often differentiated."""
    points, before, forwards, backwards = [x[k] + start[k] for k in range(len(x))], None, 0, 0
    for size in sizes:
        batch = torch.stack(points).requires_grad_(True)
        value = loss(batch)
        forwards += 1
        now = value.item()
        if before is not None and now - before < min_gain * abs(before):
            break
        before = now
        value.backward()
        backwards += 1
        for k, gradient in enumerate(batch.grad):
            if norm == "linf":
                delta = (points[k] + size * gradient.sign() - x[k]).clamp(-eps, eps)
            else:
                delta = points[k] + size * gradient / gradient.norm() - x[k]
                delta = delta * min(1.0, eps / float(delta.norm()))
            points[k] = (x[k] + delta).clamp(0, 1)
    return torch.stack(points).detach(), forwards, backwards


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("min_gain", [0.0, 0.2])
def test_steps_of_different_lengths_and_the_early_stop_follow_the_slow_loop(norm: str, min_gain: float) -> None:
    torch.manual_seed(0)
    x, weight = torch.rand(4, 3, 4, 4).double(), torch.randn(48, 5).double() / 4
    eps, sizes = (0.1, (0.1, 0.05, 0.02, 0.01)) if norm == "linf" else (0.5, (0.5, 0.25, 0.1, 0.05))
    start = torch.empty_like(x).uniform_(-0.02, 0.02)
    calls = []

    def loss(images: torch.Tensor) -> torch.Tensor:
        calls.append(images)
        return (images.flatten(1) @ weight).tanh().square().sum()

    attack = PGD(eps=eps, norm=norm, step_sizes=sizes, min_gain=min_gain)
    found = attack(loss, x, start)
    given = len(calls)
    expected, forwards, backwards = slow_pgd(loss, x, start, sizes, norm=norm, eps=eps, min_gain=min_gain)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert (given, backwards) == ((4, 4) if not min_gain else (forwards, forwards - 1))
    assert not min_gain or 1 < forwards < 4
    plain = PGD(eps=eps, norm=norm, step_sizes=sizes[:1] * 3)
    same = PGD(eps=eps, norm=norm, step_size=sizes[0], steps=3)
    assert torch.equal(plain(loss, x, start), same(loss, x, start))


def test_the_early_stop_looks_at_the_whole_value_also_where_it_is_negative() -> None:
    x = torch.full((1, 1, 1, 1), 0.5)
    for level, steps in ((-10.0, 1), (-0.01, 3)):  # every step brings 0.1: of 10 too little, of 0.01 enough
        shown = []

        def loss(images: torch.Tensor) -> torch.Tensor:
            shown.append(images.item())  # noqa: B023
            return level + images.sum()  # noqa: B023

        PGD(eps=0.4, step_size=0.1, steps=3, random_start=False, min_gain=0.05)(loss, x)
        assert len(shown) == (steps + 1 if steps < 3 else 3)


def test_step_sizes_say_how_many_steps_there_are() -> None:
    attack = PGD(step_sizes=[8 / 255, 4 / 255])
    assert (attack.steps, attack.step_size, attack.sizes) == (2, 8 / 255, (8 / 255, 4 / 255))
    assert PGD(steps=2, step_size=8 / 255, step_sizes=(8 / 255, 4 / 255)) == attack
    assert dataclasses.replace(attack, eps=0.1).sizes == attack.sizes
    assert PGD().sizes == (2 / 255,) * 5 and PGD(steps=0).sizes == ()
    assert attack.with_steps(2) is attack
    assert attack.with_steps(1) == PGD(step_size=12 / 255, steps=1)
    assert PGD().with_steps(1) == PGD(step_size=2 / 255 * 5, steps=1) and PGD().with_steps(0).steps == 0
    assert PGD(step_size=0.9).with_steps(1).step_size == 1


def test_options_are_told_where_they_are_in_use_only() -> None:
    attack = PGD(step_sizes=(8 / 255, 10 / 3 / 255), min_gain=0.03, replay=True)
    assert eval(repr(attack)) == attack and repr(attack).endswith("min_gain=0.03, replay=True)")
    assert attack.title == "PGD-2, linf 8/255 (steps 8, 3.33 /255; stops below 3 % gain; replayed)"
    assert attack.to_dict()["step_sizes"] == attack.sizes
    assert PGD().title == "PGD-5, linf 8/255"
    assert set(PGD().to_dict()) == {"eps", "step_size", "steps", "norm", "random_start", "start_std"}


def test_contradictions_and_bad_options_are_refused() -> None:
    sizes = (8 / 255, 4 / 255)
    with pytest.raises(ValueError, match="steps=3 contradicts step_sizes=.*which are 2 steps .* leave steps out"):
        PGD(steps=3, step_sizes=sizes)
    with pytest.raises(ValueError, match="step_size=0.1 contradicts step_sizes"):
        PGD(step_size=0.1, step_sizes=sizes)
    with pytest.raises(ValueError, match="got none: for no step write steps=0"):
        PGD(step_sizes=())
    with pytest.raises(ValueError, match=r"step_size must be in \(0, 1\], got 8: for 2 grey levels"):
        PGD(step_sizes=(0.1, 8))
    with pytest.raises(ValueError, match="step_size must be positive, got 0"):
        PGD(step_sizes=(0.1, 0), norm="l2")
    for bad in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"min_gain must be in \[0, 1\), got .*such as 0.01"):
            PGD(min_gain=bad)


def test_bad_gaussian_starts_are_refused() -> None:
    for bad in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"start_std must be positive, got {bad}: TRADES takes 0.001"):
            PGD(start_std=bad)
    with pytest.raises(ValueError, match="start_std=0.1 asks for a random start, random_start=False for none: leave"):
        PGD(start_std=0.1, random_start=False)


def test_bad_budgets_are_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"eps must be in \(0, 1\], got 8: .*8/255"):
        PGD(eps=8)
    with pytest.raises(ValueError, match=r"step_size must be in \(0, 1\], got 2"):
        PGD(step_size=2)
    with pytest.raises(ValueError, match="steps must be 0 or more, got -1"):
        PGD(steps=-1)
    with pytest.raises(ValueError, match="norm must be 'linf' or 'l2', got 'l1'"):
        PGD(norm="l1")
    with pytest.raises(ValueError, match="divide uint8 images by 255"):
        PGD()(linear_loss(torch.ones(1)), torch.zeros(1, 1, 2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="start must have the shape of x"):
        PGD()(linear_loss(torch.ones(1)), torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 3))
    with pytest.raises(ValueError, match="must return a scalar"):
        PGD()(lambda images: images, torch.zeros(1, 1, 2, 2))


def test_budgets_may_be_fractions() -> None:
    assert parse_budget("8/255") == 8 / 255
    assert parse_budget(" 0.03 ") == 0.03 and parse_budget(0.5) == 0.5
    for bad in ("8/0", "eight", "", "1/2/3"):
        with pytest.raises(ValueError, match="as a pixel budget"):
            parse_budget(bad)
