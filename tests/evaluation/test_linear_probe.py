"""The softmax regression: against scikit-learn, the optimality condition, and what it must leave alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_robust.evaluation.linear_probe import fit_linear_probe


def clusters(n: int = 60, dimensions: int = 5, classes: int = 3, spread: float = 0.8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, dimensions, generator=generator)
    x = centres[labels] + spread * torch.randn(n, dimensions, generator=generator)
    return x * torch.logspace(-1, 1, dimensions) + 3.0, labels


def test_it_equals_scikit_learn_on_standardised_features() -> None:
    from sklearn.linear_model import LogisticRegression

    x, y = clusters()
    standard = ((x.double() - x.double().mean(0)) / x.double().std(0, correction=0)).numpy()
    reference = LogisticRegression(C=1 / (1e-2 * len(x)), tol=1e-9, max_iter=2000).fit(standard, y.numpy())
    head = fit_linear_probe(x, y, 3, weight_decay=1e-2)
    ours = torch.softmax(head(x), 1).numpy()
    np.testing.assert_allclose(ours, reference.predict_proba(standard), atol=1e-4)


def test_the_gradient_vanishes_at_the_solution() -> None:
    x, y = clusters()
    x = x / x.std(0)
    head = fit_linear_probe(x, y, 3, weight_decay=1e-3)
    scale = x.double().std(0, correction=0)
    weight = head.weight.double() * scale
    standard = (x.double() - x.double().mean(0)) / scale
    error = torch.softmax(head(x).double(), 1) - torch.nn.functional.one_hot(y, 3)
    assert (error.T @ standard / len(x) + 1e-3 * weight).abs().max() < 1e-4
    assert error.mean(0).abs().max() < 1e-4


def test_the_folded_head_is_the_head_on_standardised_features() -> None:
    x, y = clusters()
    mean, scale = x.double().mean(0), x.double().std(0, correction=0)
    standard = (x.double() - mean) / scale
    raw, fitted = fit_linear_probe(x / x.std(0), y, 3), fit_linear_probe(standard, y, 3)
    torch.testing.assert_close(raw(x / x.std(0)), fitted(standard.float()), atol=1e-3, rtol=1e-4)


def test_separable_classes_are_told_apart_and_a_constant_feature_gets_no_weight() -> None:
    y = torch.arange(40) % 2
    x = torch.stack([y.float(), torch.full((40,), 0.3), 0.3 + 1e-9 * torch.randn(40).double().float()], 1)
    head = fit_linear_probe(x, y, 2)
    assert (head(x).argmax(1) == y).all()
    assert head.weight[:, 1:].abs().max() < 1e-3 * head.weight[:, 0].abs().max()


def test_features_that_never_change_give_the_class_shares() -> None:
    head = fit_linear_probe(torch.ones(8, 3), torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]), 2)
    torch.testing.assert_close(
        torch.softmax(head(torch.ones(1, 3)), 1)[0], torch.tensor([0.75, 0.25]), atol=1e-4, rtol=0
    )


def test_it_is_deterministic_and_leaves_the_global_random_state_alone() -> None:
    x, y = clusters()
    before = torch.get_rng_state()
    first, second = fit_linear_probe(x, y, 3), fit_linear_probe(x, y, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)
    assert not first.weight.requires_grad


def test_it_works_without_gradients_and_on_half_precision_features() -> None:
    x, y = clusters()
    with torch.no_grad():
        head = fit_linear_probe((x / x.std(0)).half(), y, 3)
    assert head.weight.dtype == torch.float32
    assert (head(x / x.std(0)).argmax(1) == y).float().mean() > 0.8


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(4, 2, 1, 1), torch.tensor([0, 1, 0, 1]), r"2-d \(N, D\), got shape \(4, 2, 1, 1\).*pool"),
        (torch.full((4, 2), torch.nan), torch.tensor([0, 1, 0, 1]), "8 of 8 feature values are NaN"),
        (torch.tensor([[1.0], [torch.inf]]), torch.tensor([0, 1]), "1 of 2 feature values"),
        (torch.zeros(4, 2), torch.zeros(4, dtype=torch.long), "one class"),
        (torch.zeros(4, 2), torch.tensor([0, 1, 2, 3]), r"in \[0, 3\), got .* from 0 to 3.*num_classes"),
        (torch.zeros(4, 2), torch.tensor([-1, 1, 2, 0]), r"in \[0, 3\), got .* from -1"),
        (torch.zeros(4, 2), torch.tensor([0.0, 1.0, 0.0, 1.0]), "float32"),
        (torch.zeros(4, 2), torch.tensor([0, 1]), r"shape \(4,\).*got \(2,\)"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), "no labels"),
    ],
)
def test_what_it_cannot_use_is_refused(x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_linear_probe(x, y, 3)
