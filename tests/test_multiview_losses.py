from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_robust.losses import nt_xent
from hf_robust.multiview_losses import HardNegatives, PairRule, adversarial_anchors, inferior_positives, supcon

N, V, P = 4, 3, 5


def pattern(*shape: int, function: Callable[[Tensor], Tensor] = torch.sin, pace: float = 0.7) -> Tensor:
    return function(pace * (torch.arange(math.prod(shape), dtype=torch.float64) + 1)).view(*shape)


def random_views(count: int = V, n: int = N, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, P, generator=generator, dtype=torch.float64) for _ in range(count)]


def cosines(views: list[Tensor]) -> np.ndarray:
    z = torch.cat(views).numpy()
    u = z / np.sqrt((z * z).sum(1, keepdims=True))
    return u @ u.T


def slow_terms(views: list[Tensor], temperature: float, hard: HardNegatives | None = None) -> np.ndarray:
    """-l_ij for every anchor i and positive j, by loops over single numbers; zero elsewhere."""
    count, n = len(views), len(views[0])
    rows, s = count * n, cosines(views) / temperature
    terms, denominators = np.zeros((rows, rows)), np.zeros(rows)
    for i in range(rows):
        others = [k for k in range(rows) if k != i]
        positives, negatives = ([k for k in others if (k % n == i % n) is same] for same in (True, False))
        if hard is None:
            denominators[i] = sum(math.exp(s[i, k]) for k in others)
            continue
        e = {k: math.exp(s[i, k]) for k in others}
        positive = sum(e[k] for k in positives) / len(positives)
        if hard.formulation == "fixed":
            importance = sum(e[k] ** hard.beta for k in negatives) / len(negatives)
            r = sum(e[k] ** (1 + hard.beta) for k in negatives) / importance
            least = len(negatives) * math.exp(-1 / temperature)
        else:  # the mean of row k, in which all entries count, those of its own image as zeros
            r = 0.0
            for k in negatives:
                of_k = sum(math.exp(s[k, m]) ** hard.beta for m in range(rows) if m % n != k % n) / rows
                r += e[k] ** (1 + hard.beta) / of_k
            least = len(negatives) * (math.exp(-1 / temperature) if hard.formulation == "released_rocl" else 1.0)
        debiased = (r - hard.tau_plus * len(negatives) * positive) / (1 - hard.tau_plus)
        denominators[i] = positive + max(debiased, least)
    for i in range(rows):
        for j in range(rows):
            if i != j and i % n == j % n:
                own = j if hard is not None and hard.formulation == "released_advcl" else i
                terms[i, j] = math.log(denominators[own]) - s[i, j]
    return terms


def slow_supcon(terms: np.ndarray, count: int, weights: np.ndarray | None = None) -> float:
    """Mean over the anchors of the mean over their positives; `weights[a, b]` by view of anchor and positive."""
    rows = len(terms)
    n = rows // count
    total = 0.0
    for i in range(rows):
        for j in range(rows):
            total += terms[i, j] * (1.0 if weights is None else weights[i // n, j // n])
    return total / rows / (count - 1)


def with_small_constants(views: list[Tensor], temperature: float = 0.5) -> float:
    """RoCL's loss as released: positives summed, 1e-8 beside every norm, denominator and probability."""
    z, n = torch.cat(views), len(views[0])
    u = z / (z.norm(dim=1, keepdim=True) + 1e-8)
    e = ((u @ u.T) / temperature).exp().fill_diagonal_(0)
    terms = -(e / (e.sum(1, keepdim=True) + 1e-8) + 1e-8).log()
    pairs = [(i, j) for i in range(len(z)) for j in range(len(z)) if i != j and i % n == j % n]
    return sum(terms[i, j].item() for i, j in pairs) / len(z)


def gradients(loss: Callable[[list[Tensor]], Tensor], views: list[Tensor]) -> list[Tensor]:
    leaves = [z.clone().requires_grad_(True) for z in views]
    return list(torch.autograd.grad(loss(leaves), leaves))


# ---------------------------------------------------------------------- values
@pytest.mark.parametrize(("count", "temperature"), [(2, 0.5), (3, 0.5), (4, 0.07)])
def test_supcon_equals_the_equation(count, temperature):
    views = random_views(count)
    expected = slow_supcon(slow_terms(views, temperature), count)
    assert supcon(views, temperature=temperature).item() == pytest.approx(expected, rel=1e-12)
    summed = supcon(views, temperature=temperature, positives="sum", base_temperature=0.25)
    assert summed.item() == pytest.approx(expected * (count - 1) * temperature / 0.25, rel=1e-12)


def test_two_views_are_nt_xent_with_its_gradient():
    views = random_views(2)
    mine = gradients(lambda z: supcon(z, temperature=0.3), views)
    theirs = gradients(lambda z: nt_xent(*z, temperature=0.3), views)
    assert supcon(views, temperature=0.3).item() == pytest.approx(nt_xent(*views, temperature=0.3).item(), rel=1e-12)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_published_losses_on_a_fixed_pattern():
    """Numbers computed by another implementation: RoCL's, AdvCL's and A-InfoNCE's inferior positives."""
    rows = pattern(12, 5)
    for views, published in ((rows.chunk(3), 7.001683837295), (rows[:8].chunk(2), 2.026218226732)):
        assert with_small_constants(list(views)) == pytest.approx(published, abs=1e-11)
        loss = supcon(views, positives="sum", detach_keys=True)
        assert loss.item() == pytest.approx(published, abs=3e-6)  # without them
    views = list(pattern(3, 4, 5).unbind(1))
    assert supcon(views, base_temperature=0.07).item() == pytest.approx(25.922006640248, abs=1e-10)
    rule = inferior_positives(4, (0,), 0.2, 1.2)
    assert supcon(views, base_temperature=0.07, pairs=rule).item() == pytest.approx(28.416257917107, abs=1e-10)


def test_losses_of_images_average_to_the_loss():
    views = random_views()
    terms = slow_terms(views, 0.5)
    losses = supcon(views, reduction="none")
    expected = [sum(terms[a * N + k, b * N + k] for a in range(V) for b in range(V)) / V / (V - 1) for k in range(N)]
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-12)
    assert losses.mean().item() == pytest.approx(supcon(views).item(), rel=1e-12)


def test_scale_of_an_embedding_does_not_matter():
    views = random_views()
    scaled = [z * torch.tensor([0.1, 3.0, 7.0, 1.0])[:, None] for z in views]
    assert supcon(scaled).item() == pytest.approx(supcon(views).item(), rel=1e-12)


def test_half_precision_is_computed_in_float32():
    views = [z.bfloat16() for z in random_views()]
    expected = supcon([z.float() for z in views])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = supcon(views)
    assert found.dtype == torch.float32 and found.item() == expected.item()


# ---------------------------------------------------------------------- gradients
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"positives": "sum", "temperature": 0.2},
        {"hard_negatives": HardNegatives()},
        {"hard_negatives": HardNegatives(0.5, 0.3, "released_advcl")},
    ],
)
def test_gradient_equals_finite_differences(options):
    assert torch.autograd.gradcheck(lambda *z: supcon(z, **options), [z.requires_grad_() for z in random_views()])


def slow_detached(views: list[Tensor], temperature: float, detached: np.ndarray, weights: np.ndarray) -> Tensor:
    """The loss with keys written out twice, once as constants; differentiable."""
    u = [torch.nn.functional.normalize(z, dim=1) for z in views]
    count, n, total = len(u), len(u[0]), torch.zeros((), dtype=torch.float64)
    for a in range(count):
        for b in range(count):
            if a == b:
                continue
            keys = [z.detach() if detached[a, b] else z for z in u]
            for k in range(n):
                scores = {(c, m): u[a][k] @ keys[c][m] / temperature for c in range(count) for m in range(n)}
                del scores[(a, k)]
                total = total + weights[a, b] * (torch.stack(list(scores.values())).logsumexp(0) - scores[(b, k)])
    return total / (count * n) / (count - 1)


def test_detached_keys_send_gradient_to_anchors_only():
    views = random_views()
    everywhere, ones = np.ones((V, V), dtype=bool), np.ones((V, V))
    expected = gradients(lambda z: slow_detached(z, 0.5, everywhere, ones), views)
    found = gradients(lambda z: supcon(z, detach_keys=True), views)
    both = gradients(supcon, views)
    for one, other, whole in zip(found, expected, both, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(one, whole, rtol=1e-3)
    assert supcon(views, detach_keys=True).item() == pytest.approx(supcon(views).item(), rel=1e-12)


def test_inferior_positives_value_and_gradient():
    views, sigma, weight = random_views(4), 0.2, 1.3
    detached, weights = np.zeros((4, 4), dtype=bool), np.ones((4, 4))
    for clean in (0, 1, 3):
        detached[clean, 2] = detached[2, clean] = True
        weights[clean, 2], weights[2, clean] = 2 * weight * sigma, 2 * weight * (1 - sigma)
    rule = inferior_positives(4, (2,), sigma, weight)
    found = supcon(views, pairs=rule)
    assert found.item() == pytest.approx(slow_supcon(slow_terms(views, 0.5), 4, weights), rel=1e-12)
    expected = gradients(lambda z: slow_detached(z, 0.5, detached, weights), views)
    for one, other in zip(gradients(lambda z: supcon(z, pairs=rule), views), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_without_sigma_no_pull_reaches_clean_embeddings():
    """sigma = 0 and nothing but clean-adversarial pairs: clean embeddings are constants."""
    views = random_views()
    rule = inferior_positives(V, (0,), 0.0)
    only = PairRule(rule.weights * rule.detached, rule.detached)
    adversarial, *clean = gradients(lambda z: supcon(z, pairs=only), views)
    assert adversarial.abs().max() > 1e-3
    assert all(bool((gradient == 0).all()) for gradient in clean)


def test_sigma_of_one_half_has_the_value_of_the_plain_loss():
    views = random_views()
    assert supcon(views, pairs=inferior_positives(V, (1,), 0.5)).item() == pytest.approx(supcon(views).item())
    tensor = torch.tensor(0.3, dtype=torch.float64)
    rules = [inferior_positives(V, (1, 2), sigma, 0.7) for sigma in (0.3, tensor)]
    assert supcon(views, pairs=rules[0]).item() == pytest.approx(supcon(views, pairs=rules[1]).item(), rel=1e-12)


def test_released_rule_overwrites_the_pull_on_clean_embeddings():
    """Computed as the released code does: the block is a view, is scaled in place and then copied, scaled again."""
    views, weight = random_views(4), 1.2
    square = torch.from_numpy(slow_terms(views, 0.5))
    block = square[:N, N:]
    square[:N, N:] = block * weight
    square[N:, :N] = block.T * weight
    found = supcon(views, pairs=adversarial_anchors(4, (0,), weight))
    assert found.item() == pytest.approx(square.sum().item() / (4 * N) / 3, rel=1e-12)


# ---------------------------------------------------------------------- hard negatives
@pytest.mark.parametrize("formulation", ["fixed", "released_rocl", "released_advcl"])
@pytest.mark.parametrize(("beta", "tau_plus", "temperature"), [(1.0, 0.1, 0.5), (0.5, 0.3, 0.2), (2.0, 0.0, 0.5)])
def test_hard_negatives_equal_the_equation(formulation, beta, tau_plus, temperature):
    views, hard = random_views(n=5), HardNegatives(beta, tau_plus, formulation)
    expected = slow_supcon(slow_terms(views, temperature, hard), V)
    assert supcon(views, temperature=temperature, hard_negatives=hard).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("formulation", "least"),
    [("fixed", math.exp(-1 / 0.5)), ("released_rocl", math.exp(-1 / 0.5)), ("released_advcl", 1.0)],
)
def test_lower_bound_of_the_debiased_negatives(formulation, least):
    """Positives so near and negatives so far that taking off the share leaves nothing."""
    images = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    views, hard = [images, images * 2], HardNegatives(1.0, 0.9, formulation)
    bound = 4 * least
    expected = math.log(math.exp(1 / 0.5) + bound) - 1 / 0.5
    assert supcon(views, hard_negatives=hard).item() == pytest.approx(expected, rel=1e-12)
    assert slow_supcon(slow_terms(views, 0.5, hard), 2) == pytest.approx(expected, rel=1e-12)


def test_neutral_hard_negatives_change_the_positives_only():
    """beta = 0 and tau_plus = 0 with two views, where pos is the positive: the plain loss."""
    views = random_views(2)
    assert supcon(views, hard_negatives=HardNegatives(0.0, 0.0)).item() == pytest.approx(supcon(views).item())


def test_low_temperatures_do_not_overflow():
    views = [z.float() for z in random_views()]
    for formulation in ("fixed", "released_rocl", "released_advcl"):
        loss = supcon(views, temperature=0.05, hard_negatives=HardNegatives(3.0, 0.1, formulation))
        assert bool(torch.isfinite(loss))


@pytest.mark.parametrize("formulation", ["fixed", "released_rocl", "released_advcl"])
def test_hard_negatives_and_a_rule_together(formulation):
    """Only here does it matter whose denominator a term has: over all pairs alike, each is summed once."""
    views, hard = random_views(4), HardNegatives(1.0, 0.1, formulation)
    rule = inferior_positives(4, (0,), 0.2, 0.7)
    expected = slow_supcon(slow_terms(views, 0.5, hard), 4, rule.weights.numpy())
    assert supcon(views, pairs=rule, hard_negatives=hard).item() == pytest.approx(expected, rel=1e-10)


# ---------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"views": random_views(1)}, "two or more views"),
        ({"views": [torch.ones(2, 3), torch.ones(3, 3)]}, "of equal shape"),
        ({"temperature": 0}, "temperature must be positive, got 0"),
        ({"base_temperature": -1}, "base_temperature must be positive, got -1"),
        ({"positives": "max"}, "positives must be 'mean' or 'sum', got 'max'"),
        ({"reduction": "sum"}, "reduction must be 'mean' or 'none', got 'sum'"),
        ({"pairs": inferior_positives(4, (0,), 0.2)}, "the pair rule is for 4 views, got 3"),
        ({"views": random_views(n=1), "hard_negatives": HardNegatives()}, "two images or more, got 1"),
    ],
)
def test_impossible_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        supcon(**{"views": random_views(), **change})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-1.0, 0.1), "beta must be 0 or more, got -1"),
        ((1.0, 1.0), r"tau_plus must be in \[0, 1\), got 1"),
        ((1.0, 0.1, "paper"), "formulation must be one of fixed, released_rocl, released_advcl, got 'paper'"),
    ],
)
def test_impossible_hard_negatives_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        HardNegatives(*values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((3, (), 0.2), "some of the views 0 to 2 and not all"),
        ((3, (3,), 0.2), "some of the views 0 to 2 and not all"),
        ((2, (0, 1), 0.2), "needs one of each"),
        ((3, (0,), 1.2), r"sigma must be in \[0, 1\], got 1.2"),
        ((3, (0,), 0.2, -1.0), "weight must be 0 or more, got -1"),
    ],
)
def test_impossible_rules_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        inferior_positives(*values)
