"""Equations against the released code's numbers, slow transcriptions and closed forms."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_robust.losses import gather, invariance_terms, nt_xent

GOLDEN = np.load(Path(__file__).parent / "data" / "released_objectives.npz")
CASES = ("s0", "s1", "s2")
VIEWS = ("zi", "zj", "zo", "zi_adv", "zj_adv")


def golden(case: str, name: str) -> torch.Tensor:
    return torch.tensor(GOLDEN[f"{case}/{name}"])


def slow_nt_xent(z_i: np.ndarray, z_j: np.ndarray, temperature: float) -> float:
    """Algorithm 1 of the SimCLR paper, a double loop."""
    z = np.concatenate([z_i, z_j]).astype(np.float64)
    n = len(z_i)
    total = 0.0
    for row in range(2 * n):
        similarity = [
            math.exp(z[row] @ z[k] / (np.linalg.norm(z[row]) * np.linalg.norm(z[k])) / temperature)
            for k in range(2 * n)
        ]
        partner = (row + n) % (2 * n)
        total -= math.log(similarity[partner] / (sum(similarity) - similarity[row]))
    return total / (2 * n)


@pytest.mark.parametrize("case", CASES)
def test_nt_xent_and_its_gradient_equal_the_released_code(case: str) -> None:
    z_i, z_j = (golden(case, v).requires_grad_() for v in ("zi", "zj"))
    loss = nt_xent(z_i, z_j)
    assert loss.item() == pytest.approx(float(GOLDEN[f"{case}/ntxent_interleaved"]), abs=1e-5)
    loss.backward()
    expected = golden(case, "ntxent_grad")  # rows interleaved: zi[0], zj[0], zi[1], ...
    torch.testing.assert_close(z_i.grad, expected[0::2], atol=1e-5, rtol=0)
    torch.testing.assert_close(z_j.grad, expected[1::2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_nt_xent_equals_the_double_loop(n: int, temperature: float) -> None:
    rng = np.random.default_rng(n)
    z_i, z_j = rng.normal(size=(2, n, 5))
    fast = nt_xent(torch.tensor(z_i), torch.tensor(z_j), temperature).item()
    assert fast == pytest.approx(slow_nt_xent(z_i, z_j, temperature), abs=1e-10)


def test_nt_xent_closed_forms() -> None:
    n = 512
    assert nt_xent(torch.ones(n, 4), torch.ones(n, 4)).item() == pytest.approx(6.930495, abs=1e-5)
    for temperature, expected in ((0.5, 4.936721), (0.1, 0.045354)):
        assert nt_xent(torch.eye(n), torch.eye(n), temperature).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_air_terms_total_and_gradients_equal_the_released_code(case: str) -> None:
    z_i, z_j, z_o, z_i_adv, z_j_adv = (golden(case, v).requires_grad_() for v in VIEWS)
    natural, adversarial = nt_xent(z_i, z_j), nt_xent(z_i_adv, z_j_adv)
    standard, robust = invariance_terms(z_i, z_j, z_o, z_i_adv, z_j_adv)
    weight, lambda1, lambda2 = (float(GOLDEN[f"{case}/{k}"]) for k in ("weight", "lambda1", "lambda2"))
    total = (1 - weight) * natural + (1 + weight) * adversarial + lambda1 * standard + lambda2 * robust
    measured = {"nat": natural, "adv": adversarial, "sir": standard, "air": robust, "loss": total}
    for name, value in measured.items():
        assert value.item() == pytest.approx(float(GOLDEN[f"{case}/{name}"]), abs=1e-5), name
    total.backward()
    for name, z in zip(VIEWS, (z_i, z_j, z_o, z_i_adv, z_j_adv), strict=True):
        torch.testing.assert_close(z.grad, golden(case, f"grad_{name}"), atol=1e-5, rtol=0)


def slow_paper_air(
    z_i: torch.Tensor, z_j: torch.Tensor, z_o: torch.Tensor, z_ia: torch.Tensor, z_ja: torch.Tensor, t: float
) -> tuple[float, float]:
    def cosine(u: torch.Tensor, v: torch.Tensor) -> float:
        return float(u @ v / (u.norm() * v.norm()))

    def softmax(values: list[float]) -> list[float]:
        exponentials = [math.exp(v / t) for v in values]
        return [e / sum(exponentials) for e in exponentials]

    def kl(p: list[float], q: list[float]) -> float:
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    rows = range(len(z_i))
    p_i, p_j = (softmax([cosine(z_o[k], z[k]) for k in rows]) for z in (z_i, z_j))
    to_original = [softmax([cosine(z_o[k], z[k]) for k in rows]) for z in (z_ia, z_ja)]
    to_natural = [softmax([cosine(a[k], b[k]) for k in rows]) for a, b in ((z_ia, z_i), (z_ja, z_j))]
    products = [[a * b for a, b in zip(x, y, strict=True)] for x, y in zip(to_original, to_natural, strict=True)]
    return kl(p_i, p_j), kl(products[0], products[1])


def test_air_paper_formulation_equals_its_transcription() -> None:
    torch.manual_seed(0)
    z = [torch.randn(6, 4, dtype=torch.float64) for _ in range(5)]
    standard, robust = invariance_terms(*z, temperature=0.3, formulation="paper")
    assert (standard.item(), robust.item()) == pytest.approx(slow_paper_air(*z, 0.3), abs=1e-12)


def test_air_values_when_all_similarities_are_equal() -> None:
    n = 512
    z = torch.eye(n)
    standard, robust = invariance_terms(z, z, z, z, z, formulation="released")
    assert standard.item() == pytest.approx(-6.240278, abs=1e-5)  # -log N - 1/N: not zero in the released code
    assert robust.item() == pytest.approx(-0.0243685, abs=1e-6)
    assert invariance_terms(z, z, z, z, z, formulation="paper") == (0.0, 0.0)


def test_losses_stay_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    z = [torch.randn(8, 16) for _ in range(5)]
    expected = nt_xent(z[0], z[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nt_xent(z[0], z[1]), expected)
        assert invariance_terms(*z)[0].dtype == torch.float32


def test_bad_input_is_refused() -> None:
    z = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"equal shape \(N, D\), got \(4, 3\) and \(5, 3\)"):
        nt_xent(z, torch.ones(5, 3))
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        nt_xent(z, z, 0)
    with pytest.raises(ValueError, match="'released' or 'paper', got 'mine'"):
        invariance_terms(z, z, z, z, z, formulation="mine")


def test_gather_of_one_process_is_the_tensor_itself() -> None:
    z = torch.randn(3, 2)
    assert gather(z) is z
