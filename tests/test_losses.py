"""Equations against the released code's numbers, slow transcriptions and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_robust.losses import (
    DISTANCE_KINDS,
    _transport_plan,
    cross_entropy,
    gather,
    invariance_terms,
    kl_divergence,
    nt_xent,
    representational_distance,
    trades,
    ungathered,
)

GOLDEN = np.load(Path(__file__).parent / "data" / "released_objectives.npz")
CASES = ("s0", "s1", "s2")
VIEWS = ("zi", "zj", "zo", "zi_adv", "zj_adv")


def golden(case: str, name: str) -> torch.Tensor:
    return torch.tensor(GOLDEN[f"{case}/{name}"])


def slow_nt_xent_anchors(z_i: np.ndarray, z_j: np.ndarray, temperature: float) -> np.ndarray:
    """Algorithm 1 of the SimCLR paper, a double loop; one loss per anchor, first the rows of z_i, then of z_j."""
    z = np.concatenate([z_i, z_j]).astype(np.float64)
    n = len(z_i)
    losses = []
    for row in range(2 * n):
        similarity = [
            math.exp(z[row] @ z[k] / (np.linalg.norm(z[row]) * np.linalg.norm(z[k])) / temperature)
            for k in range(2 * n)
        ]
        partner = (row + n) % (2 * n)
        losses.append(-math.log(similarity[partner] / (sum(similarity) - similarity[row])))
    return np.array(losses)


def slow_nt_xent(z_i: np.ndarray, z_j: np.ndarray, temperature: float) -> float:
    return float(slow_nt_xent_anchors(z_i, z_j, temperature).mean())


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


@pytest.mark.parametrize("n", [1, 2, 7])
def test_nt_xent_of_an_image_is_the_mean_of_its_two_anchors(n: int) -> None:
    rng = np.random.default_rng(n)
    z_i, z_j = rng.normal(size=(2, n, 5))
    per_image = nt_xent(torch.tensor(z_i), torch.tensor(z_j), 0.3, reduction="none")
    assert per_image.shape == (n,) and per_image.dtype == torch.float64
    assert per_image.numpy() == pytest.approx(slow_nt_xent_anchors(z_i, z_j, 0.3).reshape(2, n).mean(0), abs=1e-10)
    mean = nt_xent(torch.tensor(z_i), torch.tensor(z_j), 0.3)
    assert mean.dtype == torch.float64 and per_image.mean().item() == pytest.approx(mean.item(), abs=1e-12)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own, when forward mode is first used
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nt_xent_in_forward_mode_equals_finite_differences_and_reverse_mode(reduction: str) -> None:
    torch.manual_seed(0)
    z_i, z_j, d_i, d_j = torch.randn(4, 6, 5, dtype=torch.float64)

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return nt_xent(a, b, 0.3, reduction=reduction)  # type: ignore[arg-type]

    value, tangent = torch.func.jvp(loss, (z_i, z_j), (d_i, d_j))
    torch.testing.assert_close(value, loss(z_i, z_j))
    h = 1e-5
    difference = (loss(z_i + h * d_i, z_j + h * d_j) - loss(z_i - h * d_i, z_j - h * d_j)) / (2 * h)
    torch.testing.assert_close(tangent, difference, atol=1e-8, rtol=1e-6)
    cotangent = torch.randn_like(value)
    back_i, back_j = torch.func.vjp(loss, z_i, z_j)[1](cotangent)
    torch.testing.assert_close((tangent * cotangent).sum(), (back_i * d_i + back_j * d_j).sum())
    gradient = torch.func.grad(lambda a: loss(a, z_j).mean())(z_i)
    torch.testing.assert_close(gradient, torch.func.grad(lambda a: nt_xent(a, z_j, 0.3))(z_i))


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
        for kind in DISTANCE_KINDS:  # the cosines of "ot" are a product of matrices, which autocast would round
            distance = representational_distance(z[0], z[1], kind)
            with torch.autocast("cpu", enabled=False):
                assert torch.equal(distance, representational_distance(z[0], z[1], kind)), kind


def test_bad_input_is_refused() -> None:
    z = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"equal shape \(N, D\), got \(4, 3\) and \(5, 3\)"):
        nt_xent(z, torch.ones(5, 3))
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        nt_xent(z, z, 0)
    with pytest.raises(ValueError, match="'released' or 'paper', got 'mine'"):
        invariance_terms(z, z, z, z, z, formulation="mine")
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'none', got 'sum'"):
        nt_xent(z, z, reduction="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"one of kl_softmax, .*, ot, got 'mmd'"):
        representational_distance(z, z, "mmd")
    for bad in (torch.ones(5, 3), torch.ones(4, 3, 1)):
        with pytest.raises(ValueError, match=r"equal shape \(N, D\), got \(4, 3\) and"):
            representational_distance(z, bad)


def test_gather_of_one_process_is_the_tensor_itself() -> None:
    z = torch.randn(3, 2)
    assert gather(z) is z


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """`gather` believes in a second process, whose rows are those of the first plus 100."""

    def all_gather(parts: list[torch.Tensor], x: torch.Tensor) -> None:
        for rank, part in enumerate(parts):
            part.copy_(x + 100 * rank)

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather", all_gather)


def test_ungathered_rows_stay_on_their_process(two_processes: None) -> None:
    z = torch.randn(3, 2)
    both = torch.cat([z, z + 100])
    assert torch.equal(gather(z), both)
    with ungathered():
        assert gather(z) is z
        with ungathered():
            assert gather(z) is z
        assert gather(z) is z
        with ThreadPoolExecutor(1) as other_thread:
            assert torch.equal(other_thread.submit(gather, z).result(), both)
    assert torch.equal(gather(z), both)
    with pytest.raises(KeyError), ungathered():
        raise KeyError
    assert torch.equal(gather(z), both)


def softmax(rows: np.ndarray) -> np.ndarray:
    exponentials = np.exp(rows)
    return exponentials / exponentials.sum(1, keepdims=True)


def kl_elements(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return p * np.log(p / q)


def slow_kl_minmax(clean: np.ndarray, adv: np.ndarray) -> float:
    q, p = (np.stack([(row - min(row)) / (max(row) - min(row)) for row in z]) + 1e-8 for z in (adv, clean))
    return float(kl_elements(q, p).mean())


def slow_js(clean: np.ndarray, adv: np.ndarray) -> float:
    c, a = softmax(clean), softmax(adv)
    return float((kl_elements(a, (a + c) / 2) + kl_elements(c, (a + c) / 2)).sum() / 2 / len(c))


def slow_js_released(clean: np.ndarray, adv: np.ndarray) -> float:
    c, a = softmax(clean), softmax(adv)
    return float((kl_elements((a + c) / 2, a) + kl_elements((a + c) / 2, c)).mean() / 2)


def transport_cost(clean: np.ndarray, adv: np.ndarray) -> np.ndarray:
    c, a = softmax(clean), softmax(adv)
    cosine = [[x @ y / math.sqrt((x @ x) * (y @ y)) for y in a] for x in c]
    return np.maximum(0, 1 - np.array(cosine))


def slow_ot(clean: np.ndarray, adv: np.ndarray) -> float:
    """Sinkhorn in scalings of the kernel, not in logarithms; the released 1e-6 becomes an addition to the sums."""
    cost = transport_cost(clean, adv)
    n, kernel = len(cost), np.exp(-cost / 0.01)
    left, right = np.ones(n), np.ones(n)
    for _ in range(100):
        before = left
        left = left / n / (left * (kernel @ right) + 1e-6)
        right = right / n / (right * (kernel.T @ left) + 1e-6)
        if np.abs(0.01 * np.log(left / before)).sum() < 0.1:
            break
    return float((left[:, None] * kernel * right * cost).sum())


SLOW: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "kl_softmax": lambda clean, adv: float(kl_elements(softmax(adv), softmax(clean)).sum() / len(clean)),
    "kl_softmax_released": lambda clean, adv: float(kl_elements(softmax(clean), softmax(adv)).mean()),
    "kl_minmax": slow_kl_minmax,
    "js": slow_js,
    "js_released": slow_js_released,
    "ot": slow_ot,
}


def outputs(seed: int, n: int = 9, p: int = 6, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean and adversarial outputs: correlated, float64."""
    generator = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(2, n, p, dtype=torch.float64, generator=generator) * scale
    return clean, clean + 0.7 * noise


def test_every_kind_has_a_transcription() -> None:
    assert tuple(SLOW) == DISTANCE_KINDS


@pytest.mark.parametrize("kind", SLOW)
@pytest.mark.parametrize(("n", "p", "scale"), [(1, 2, 1.0), (9, 6, 1.0), (40, 10, 3.0)])
def test_distances_equal_their_transcriptions(kind: str, n: int, p: int, scale: float) -> None:
    clean, adv = outputs(0, n, p, scale)
    before = clean.clone(), adv.clone()
    distance = representational_distance(clean, adv, kind)
    expected = SLOW[kind](clean.numpy(), adv.numpy())
    assert distance.shape == () and distance.dtype == torch.float64
    assert distance.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert torch.equal(clean, before[0]) and torch.equal(adv, before[1])  # the released min-max writes into both
    single = representational_distance(clean.float(), adv.float(), kind)
    assert single.dtype == torch.float32 and single.item() == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_the_default_is_the_distance_of_the_paper() -> None:
    clean, adv = outputs(1)
    assert representational_distance(clean, adv).item() == pytest.approx(
        SLOW["kl_softmax"](clean.numpy(), adv.numpy())
    )


@pytest.mark.parametrize("case", CASES)
def test_distances_equal_the_released_code(case: str) -> None:
    z, z_adv = golden(case, "zi"), golden(case, "zi_adv")
    released = float(GOLDEN[f"{case}/js"])
    assert representational_distance(z, z_adv, "js_released").item() == pytest.approx(released, abs=1e-6)
    # The released function takes (nat, adv) and computes KL(nat || adv) of what it is given, but its callers pass
    # (adversarial, natural), so that selection uses KL(adv || clean), which is our kind. The golden value was taken
    # with the arguments in the order of their names: for us, clean and adversarial outputs exchanged.
    released = float(GOLDEN[f"{case}/kl_natfirst"])
    assert representational_distance(z_adv, z, "kl_minmax").item() == pytest.approx(released, abs=1e-6)
    assert abs(representational_distance(z, z_adv, "kl_minmax").item() - released) > 1e-3  # the order is visible


@pytest.mark.parametrize("kind", DISTANCE_KINDS)
def test_gradients_of_the_distances_equal_finite_differences(kind: str) -> None:
    clean, adv = (z.requires_grad_() for z in outputs(2, n=4, p=5))
    assert torch.autograd.gradcheck(lambda c, a: representational_distance(c, a, kind), (clean, adv))
    representational_distance(clean, adv, kind).backward()
    for gradient in (clean.grad, adv.grad):  # no row of either argument is left out
        assert (gradient.norm(dim=1) > 1e-4).all()


@pytest.mark.parametrize("kind", DISTANCE_KINDS)
def test_gradients_in_float32_equal_those_in_float64(kind: str) -> None:
    gradients = []
    for dtype in (torch.float64, torch.float32):
        clean, adv = (z.to(dtype, copy=True).requires_grad_() for z in outputs(3, n=32, p=64))
        representational_distance(clean, adv, kind).backward()
        gradients.append(torch.cat([clean.grad, adv.grad]).double())
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert error < 1e-4  # min-max without its `where`: 5e-3


@pytest.mark.parametrize("kind", DISTANCE_KINDS)
def test_gradients_of_a_row_sum_to_zero(kind: str) -> None:
    # Why averaging the gradient of the last layer over its outputs, as the released selection does, leaves rounding.
    clean, adv = (z.float().requires_grad_() for z in outputs(4, n=64, p=10))
    representational_distance(clean, adv, kind).backward()
    for gradient in (clean.grad, adv.grad):
        assert gradient.sum(1).norm() <= 1e-6 * gradient.norm()


def test_cross_entropy_gradients_of_a_row_sum_to_zero() -> None:
    logits = outputs(5, n=64, p=10)[0].float().requires_grad_()
    torch.nn.functional.cross_entropy(logits, torch.arange(64) % 10).backward()
    assert logits.grad.sum(1).norm() <= 1e-6 * logits.grad.norm()


@pytest.mark.parametrize("kind", ["kl_softmax", "kl_softmax_released", "js", "js_released"])
def test_divergences_are_positive_and_zero_only_for_equal_outputs(kind: str) -> None:
    for seed in range(5):
        clean, adv = outputs(seed)
        assert representational_distance(clean, adv, kind).item() > 1e-3
        assert representational_distance(clean, clean + 2.5, kind).item() == pytest.approx(
            0, abs=1e-14
        )  # same softmax


@pytest.mark.parametrize("kind", ["js", "js_released"])
def test_jensen_shannon_is_symmetric_and_the_defined_one_bounded(kind: str) -> None:
    clean, adv = outputs(6)
    there, back = representational_distance(clean, adv, kind), representational_distance(adv, clean, kind)
    assert there.item() == pytest.approx(back.item(), rel=1e-12)
    far = 100 * torch.eye(6, dtype=torch.float64)
    bound = representational_distance(far, far.roll(1, 0), "js").item()
    assert bound == pytest.approx(math.log(2), rel=1e-12)  # disjoint supports


@pytest.mark.parametrize("constant", ["clean", "adversarial", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_minmax_of_a_constant_row_is_finite(constant: str, dtype: torch.dtype) -> None:
    clean, adv = (z.to(dtype) for z in outputs(7))
    for z, name in ((clean, "clean"), (adv, "adversarial")):
        if constant in (name, "both"):
            z[3] = 0.25
    clean, adv = clean.requires_grad_(), adv.requires_grad_()
    distance = representational_distance(clean, adv, "kl_minmax")
    distance.backward()
    assert distance.isfinite() and clean.grad.isfinite().all() and adv.grad.isfinite().all()
    for z, name in ((clean, "clean"), (adv, "adversarial")):
        assert bool((z.grad[3] == 0).all()) or constant not in (name, "both")
        assert bool((z.grad[4] != 0).any())  # the other rows go on


def exact_transport(cost: np.ndarray) -> float:
    from scipy.optimize import linprog

    n = len(cost)
    sums = np.concatenate([np.kron(np.eye(n), np.ones(n)), np.kron(np.ones(n), np.eye(n))])
    return float(linprog(cost.ravel(), A_eq=sums, b_eq=np.full(2 * n, 1 / n)).fun)


@pytest.mark.parametrize("seed", range(4))
def test_optimal_transport_lies_above_the_exact_one_by_no_more_than_the_regularisation_allows(seed: int) -> None:
    n = 8
    clean, adv = outputs(seed, n)
    adv = adv.roll(3, 0)  # the best match of a row is not its own
    exact = exact_transport(transport_cost(clean.numpy(), adv.numpy()))
    cost = torch.tensor(transport_cost(clean.numpy(), adv.numpy()))
    plan = _transport_plan(cost, iterations=1000, tolerance=1e-9)
    for dim in (0, 1):  # uniform marginals: of the columns but for the released 1e-6, of the rows nearly converged
        torch.testing.assert_close(plan.sum(dim), torch.full((n,), 1 / n).double(), atol=4e-4 * dim + 2e-6, rtol=0)
    # Plans of uniform marginals have entropies that differ by log n at most.
    assert exact - 1e-4 <= (plan * cost).sum().item() <= exact + 0.01 * math.log(n)
    # The released rule stops far from there (rows may hold twice their share), but close to the exact one.
    assert representational_distance(clean, adv, "ot").item() == pytest.approx(exact, abs=0.04)
    assert cost.diagonal().mean().item() > exact + 0.15  # against matching each row with its own


@pytest.mark.parametrize(("regularisation", "close"), [(0.1, 1e-9), (0.01, 2e-5)])
def test_optimal_transport_is_that_of_a_library(regularisation: float, close: float) -> None:
    import ot

    n = 32
    clean, adv = outputs(2, n)
    cost = torch.tensor(transport_cost(clean.numpy(), adv.roll(3, 0).numpy()))
    uniform = np.full(n, 1 / n)
    theirs = ot.sinkhorn(
        uniform, uniform, cost.numpy(), regularisation, method="sinkhorn_log", numItermax=10_000, stopThr=close
    )
    ours = _transport_plan(cost, regularisation, iterations=10_000, tolerance=close / 100)
    # the released 1e-6 beside sums of 1 / n takes that share of the mass away
    torch.testing.assert_close(ours, torch.from_numpy(theirs), atol=close, rtol=1e-5 * n)
    assert (ours * cost).sum().item() == pytest.approx(float((theirs * cost.numpy()).sum()), rel=1e-4)


def test_optimal_transport_does_not_see_the_order_of_a_batch() -> None:
    clean, adv = outputs(8, n=30)
    moved = representational_distance(clean, adv.flip(0), "ot")
    assert moved.item() == pytest.approx(representational_distance(clean, adv, "ot").item(), rel=1e-10)


def test_optimal_transport_is_never_negative() -> None:
    for z in outputs(9, n=50)[0].float().split(1):  # one row against itself: 1 - cosine is rounding of either sign
        assert representational_distance(z, z, "ot").item() >= 0


# ---------------------------------------------------------------------- losses of classifiers
def waves() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of clean and adversarial images and labels, whose losses were worked out elsewhere to twelve digits."""
    index = torch.arange(1, 13, dtype=torch.float64).view(4, 3)
    return 2 * (0.7 * index).sin(), 2 * (0.9 * index).cos(), torch.tensor([0, 1, 2, 0])


def test_classifier_losses_have_their_known_values() -> None:
    clean, adv, labels = waves()
    assert cross_entropy(clean, labels).item() == pytest.approx(1.251753141890, abs=1e-11)
    assert cross_entropy(adv, labels).item() == pytest.approx(1.713926651627, abs=1e-11)
    assert kl_divergence(clean, adv).item() == pytest.approx(1.212956112871, abs=1e-11)
    loss, divergence = trades(clean, adv, labels, beta=6)
    assert (loss + divergence).item() == pytest.approx(8.529489819116, abs=1e-11)
    assert loss.item() == pytest.approx(1.251753141890, abs=1e-11)
    assert trades(clean, adv, labels)[1].item() == divergence.item()  # 6 is the default
    assert trades(clean, adv, labels, beta=0)[1].item() == 0


def test_cross_entropy_of_every_image_has_the_mean_as_mean() -> None:
    logits, _, labels = waves()
    each = cross_entropy(logits, labels, reduction="none")
    expected = -np.log(softmax(logits.numpy()))[range(4), labels.numpy()]
    np.testing.assert_allclose(each.numpy(), expected, rtol=1e-12)
    assert each.mean().item() == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-12)


@pytest.mark.parametrize(("n", "c", "scale"), [(1, 2, 1.0), (9, 6, 1.0), (20, 10, 5.0)])
def test_kl_divergence_is_the_sum_of_its_definition(n: int, c: int, scale: float) -> None:
    p, q = outputs(10, n, c, scale)
    expected = kl_elements(softmax(p.numpy()), softmax(q.numpy())).sum() / n
    assert kl_divergence(p, q).item() == pytest.approx(float(expected), rel=1e-9)
    assert kl_divergence(p, q).item() != pytest.approx(kl_divergence(q, p).item(), rel=1e-3)  # the order is visible
    assert kl_divergence(p, p + 3).item() == pytest.approx(0, abs=1e-14)


def test_both_arguments_of_trades_get_the_gradient_of_finite_differences() -> None:
    clean, adv = (z.requires_grad_() for z in outputs(11, n=4, p=5))
    labels = torch.arange(4)
    assert torch.autograd.gradcheck(lambda c, a: sum(trades(c, a, labels, 2.0)), (clean, adv))
    _, divergence = trades(clean, adv, labels)
    divergence.backward()
    for gradient in (clean.grad, adv.grad):
        assert (gradient.norm(dim=1) > 1e-4).all()


def test_hopeless_logits_give_finite_losses_and_gradients() -> None:
    clean, adv = (torch.tensor([z], requires_grad=True) for z in ([1e4, 0.0, -1e4], [-1e4, 0.0, 1e4]))
    terms = trades(clean, adv, torch.tensor([2]))
    sum(terms).backward()
    assert all(t.isfinite() for t in (*terms, clean.grad.sum(), adv.grad.sum()))
    assert terms[1].item() == pytest.approx(6 * 2e4)


def test_classifier_losses_keep_their_digits_in_half_precision() -> None:
    clean, adv, labels = (z.bfloat16() if z.is_floating_point() else z for z in waves())
    exact = [clean.double(), adv.double()]
    assert cross_entropy(clean, labels).dtype == kl_divergence(clean, adv).dtype == torch.float32
    assert cross_entropy(clean, labels).item() == pytest.approx(cross_entropy(exact[0], labels).item(), rel=1e-6)
    assert kl_divergence(clean, adv).item() == pytest.approx(kl_divergence(*exact).item(), rel=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kl_divergence(clean, adv).dtype == torch.float32


def test_classifier_losses_refuse_logits_of_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"equal shape \(N, D\), got \(4, 3\) and \(5, 3\)"):
        kl_divergence(torch.ones(4, 3), torch.ones(5, 3))
    with pytest.raises(ValueError, match=r"equal shape"):
        trades(torch.ones(4, 3), torch.ones(4, 2), torch.zeros(4, dtype=torch.int64))
