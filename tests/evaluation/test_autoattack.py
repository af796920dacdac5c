"""AutoAttack: each hazard of the package that the wrapper removes (H1 to H15), on classifiers with a known answer."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attacked import LEVELS, STAYS, Ladder, ladder_images
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from hf_robust.evaluation.autoattack import AutoAttackResult, autoattack

IMAGES, LABELS = ladder_images(LEVELS)


def attack(model: Callable[[Tensor], Any], images: Tensor = IMAGES, labels: Tensor = LABELS, **settings: Any) -> Any:
    """A cascade cut short, without a bar."""
    return autoattack(model, images, labels, **{"preset": "smoke", "progress": False, "batch_size": 4, **settings})


def flags(result: AutoAttackResult) -> list[bool]:
    return result.robust.tolist()


def said(result: AutoAttackResult, words: str) -> bool:
    return any(words in warning for warning in result.warnings)


def test_what_lies_within_eps_falls_and_nothing_else() -> None:
    model = Ladder().eval()
    found = attack(model)
    assert flags(found) == STAYS and found.accuracy == 0.7 and found.clean_accuracy == 1.0
    assert [stage.name for stage in found.stages] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    for earlier, later in zip(found.stages, found.stages[1:], strict=False):
        assert not (later.robust & ~earlier.robust).any()
    assert torch.equal(found.stages[-1].robust, found.robust)
    assert (found.distances[~found.robust] > 0).all() and found.distances.max() <= 8 / 255 + 1e-6
    assert (found.predictions[~found.robust] != LABELS[~found.robust]).all()
    assert torch.equal(found.predictions[found.robust], LABELS[found.robust])
    assert all(stage.forwards > 0 for stage in found.stages) and found.stages[-1].backwards == 0
    assert flags(attack(model, eps=1 / 255)) == [True] * 10
    assert len(found.warnings) == 1 and said(found, "its accuracy means nothing")


def test_each_attack_finds_what_is_there_to_find(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_robust.evaluation.autoattack_plan import PRESETS

    for name in ("apgd-ce", "apgd-t", "fab-t", "square"):
        monkeypatch.setitem(PRESETS, "smoke", (name,))
        assert flags(attack(Ladder())) == STAYS, name


def test_h1_a_finished_state_is_read_and_not_repeated(tmp_path: Path) -> None:
    file, calls = tmp_path / "deep" / "state.npz", []

    def counted(images: Tensor) -> Tensor:
        calls.append(len(images))
        return model(images)

    model = Ladder()
    first = attack(counted, state_file=file)
    calls.clear()
    second = attack(counted, state_file=str(file))
    assert calls == [4], "the first batch is looked at, to recognise the model"
    assert flags(second) == flags(first) and second.warnings == first.warnings
    for name in ("robust", "forwards", "backwards", "seconds"):
        for a, b in zip(first.stages, second.stages, strict=True):
            assert torch.equal(torch.as_tensor(getattr(a, name)), torch.as_tensor(getattr(b, name)))
    assert torch.equal(first.predictions, second.predictions) and torch.equal(first.distances, second.distances)
    assert [path.name for path in file.parent.iterdir()] == ["state.npz"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"eps": 4 / 255}, r"eps \(there 0.03137"),
        ({"seed": 1}, "seed"),
        ({"batch_size": 5}, "batch_size"),
        ({"norm": "l2"}, "norm"),
        ({"images": IMAGES + 1e-3}, "in: images"),
        ({"labels": LABELS.roll(1)}, "in: labels"),
        ({"model": Ladder(scale=2.0)}, "in: model"),
        ({"model": Ladder(5)}, "in: model"),
    ],
)
def test_h1_the_state_of_another_evaluation_is_refused(tmp_path: Path, change: dict, named: str) -> None:
    file = tmp_path / "state.npz"
    settings = {"model": Ladder(), "images": IMAGES, "labels": LABELS, "state_file": file}
    attack(**settings)
    with pytest.raises(ValueError, match=rf"another evaluation.*{named}.*delete this one"):
        attack(**{**settings, **change})


def test_h1_a_function_is_recognised_by_its_logits(tmp_path: Path) -> None:
    file, steep = tmp_path / "state.npz", Ladder(scale=3.0)
    attack(lambda x: Ladder()(x), state_file=file)
    with pytest.raises(ValueError, match="other logits for the same images: delete the file"):
        attack(lambda x: steep(x), state_file=file)


def test_h2_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    attack(Ladder())
    assert torch.equal(torch.get_rng_state(), state)


def test_h3_debuggers_and_coverage_keep_their_trace_function() -> None:
    def tracer(*_: Any) -> None:
        return None

    before = sys.gettrace()
    try:
        sys.settrace(tracer)
        attack(Ladder())
        found = sys.gettrace()
    finally:
        sys.settrace(before)
    assert found is tracer


@pytest.mark.parametrize(
    ("classes", "names", "words"),
    [
        (2, ["apgd-ce", "fab-t", "square"], "With 2 classes"),
        (3, ["apgd-ce", "apgd-dlr", "fab-t", "square"], "With 3 classes"),
        (4, ["apgd-ce", "apgd-t", "fab-t", "square"], ""),
        (7, ["apgd-ce", "apgd-t", "fab-t", "square"], ""),
        (10, ["apgd-ce", "apgd-t", "fab-t", "square"], ""),
    ],
)
def test_h4_any_number_of_classes(classes: int, names: list[str], words: str) -> None:
    images, labels = ladder_images([20.0, 35.0, 44.0, 60.0])
    found = attack(Ladder(classes), images, labels)
    assert flags(found) == [True, False, False, True]
    assert [stage.name for stage in found.stages] == names and found.num_classes == classes
    assert said(found, words) and said(found, "With") == bool(words)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_h5_other_weights_are_evaluated_in_float32_and_put_back(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 4)).to(dtype).eval()
    labels = model.float()(IMAGES).argmax(1)
    model.to(dtype)
    stored = {name: (t.data_ptr(), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = attack(model, IMAGES, labels, eps=0.5 / 255)
    assert found.dtype == "float32" and said(found, f"{str(dtype)[6:]} were evaluated in float32")
    assert not said(found, "logits of type"), "the autocast around it did not get in"
    assert found.clean_accuracy == 1.0, "in float32 the labels are its own"
    for name, tensor in model.state_dict(keep_vars=True).items():
        pointer, value = stored[name]
        assert tensor.dtype == value.dtype and tensor.data_ptr() == pointer and torch.equal(tensor, value)


def test_h5_low_precision_inside_the_model_is_said() -> None:
    model = Ladder()
    assert said(attack(lambda x: model(x).to(torch.bfloat16)), "logits of type bfloat16")
    assert not said(attack(model), "logits of type")


def test_h6_channels_last_images_and_models() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4)).eval()
    images = torch.rand(6, 6, 6, 3).permute(0, 3, 1, 2)
    labels = model(images).argmax(1)
    plain = attack(model, images.contiguous(), labels, eps=0.02)
    last = attack(model.to(memory_format=torch.channels_last), images, labels, eps=0.02)
    assert flags(plain) == flags(last) and 0 < plain.accuracy < 1
    for norm, eps in (("l2", 0.2), ("l1", 2.0)):
        attack(model, images, labels, norm=norm, eps=eps)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: ImageClassifierOutput(logits=logits),
        lambda logits: {"logits": logits},
        lambda logits: (logits, None),
        lambda logits: SimpleNamespace(logits=logits),
    ],
)
def test_h7_outputs_of_transformers_tuples_and_mappings(wrap: Callable[[Tensor], Any]) -> None:
    model = Ladder()
    assert flags(attack(lambda x: wrap(model(x)))) == STAYS


def batch_norm_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(64, 4))


def test_h8_a_model_in_train_mode_is_attacked_in_evaluation_mode_and_put_back() -> None:
    model = batch_norm_network()
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    labels = model.eval()(IMAGES).argmax(1)
    expected = attack(model, IMAGES, labels)
    model.train()
    model[2].eval()
    found = attack(model, IMAGES, labels)
    assert flags(found) == flags(expected) and found.clean_accuracy == 1.0
    assert said(found, "was in train mode") and not said(expected, "train mode")
    assert [module.training for module in model.modules()] == [True, True, True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_h8_train_mode_behind_a_function_is_refused() -> None:
    model = batch_norm_network().train()
    model[2].eval()
    with pytest.raises(ValueError, match=r"change by .* with the other images.*Call model.eval\(\)"):
        attack(lambda x: model(x), torch.rand(10, 3, 6, 6))


@pytest.mark.parametrize("as_function", [False, True])
def test_h9_gradients_of_the_parameters_are_left_alone(as_function: bool) -> None:
    model = Ladder()
    model.weight.grad = torch.ones_like(model.weight)
    model.bias.requires_grad_(False)
    attack((lambda x: model(x)) if as_function else model)
    assert torch.equal(model.weight.grad, torch.ones_like(model.weight)) and model.bias.grad is None
    assert model.weight.requires_grad and not model.bias.requires_grad


def test_h9_the_model_is_put_back_after_an_error_too() -> None:
    model = batch_norm_network().double()
    with pytest.raises(ValueError, match="labels from 0 to 9"):
        attack(model, IMAGES, torch.arange(10))
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())
    assert model[0].weight.dtype == torch.float64


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("passes", [0, 40])
def test_everything_is_put_back_after_an_interruption(stop: type, passes: int) -> None:
    """In the checks before the attacks, which replace the trace function, and inside of an attack."""
    model, tracer = batch_norm_network().to(torch.bfloat16), lambda *_: None
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[2].eval()
    labels, calls = model.float().eval()(IMAGES).argmax(1), []
    model.to(torch.bfloat16).train()
    model[2].eval()

    def interrupt(*_: Any) -> None:
        calls.append(1)
        checking = getattr(sys.gettrace(), "__name__", "") == "tracefunc"
        if len(calls) == passes or (passes == 0 and checking):
            raise stop("stopped")

    model.register_forward_pre_hook(interrupt)
    torch.manual_seed(5)
    state, stored = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    before = sys.gettrace()
    try:
        sys.settrace(tracer)
        with pytest.raises(stop, match="stopped"):
            attack(model, IMAGES, labels, eps=0.1 / 255)
        traced = sys.gettrace()
    finally:
        sys.settrace(before)
    assert traced is tracer and torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == [True, True, True, False, True, True]
    assert all(value.dtype == stored[name].dtype for name, value in model.state_dict().items())
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters()) and torch.is_grad_enabled()
    assert model[0].weight.grad.eq(1).all() and model[0].bias.grad is None


def test_images_may_ask_for_gradients() -> None:
    images = IMAGES.clone().requires_grad_()
    assert flags(attack(Ladder(), images)) == STAYS and images.grad is None


def test_h11_the_seed_is_fixed_and_stored_with_the_batch_size() -> None:
    torch.manual_seed(1)
    model = batch_norm_network().eval()
    images = torch.rand(8, 3, 6, 6)
    labels = model(images).argmax(1)
    seen: list[Tensor] = []

    def noted(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return model(x)

    first, asked = attack(noted, images, labels, eps=0.05), [*seen]
    for seed in (0, 3):
        seen.clear()
        torch.manual_seed(99)
        other = attack(noted, images, labels, eps=0.05, seed=seed)
        same = [torch.equal(a, b) for a, b in zip(asked, seen, strict=False)]
        assert all(same) == (seed == 0)
    assert (first.seed, other.seed, first.batch_size, first.preset) == (0, 3, 4, "smoke")
    assert first.versions == {"pyautoattack": importlib.metadata.version("pyautoattack"), "torch": torch.__version__}


def quantised(images: Tensor) -> Tensor:
    return Ladder()((images * 255 / 4).round() * 4 / 255)


def masked(images: Tensor) -> Tensor:
    return Ladder(scale=4000.0)(images)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (quantised, "3 of 3 rightly classified images the gradient of the logits is zero"),
        (masked, "rightly classified images the gradient of the cross-entropy is exactly zero"),
        (lambda x: Ladder()(x + 0.01 * torch.randn_like(x)), "different logits twice"),
        (lambda x: Ladder()(x).softmax(1), "look like probabilities"),
    ],
)
def test_h12_what_makes_a_number_untrustworthy_is_said(model: Any, words: str, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        images, labels = ladder_images([20, 42, 61, 75, 91, 114, 130, 145, 51, 55])
        found = attack(model, images, labels)
    assert said(found, words), found.warnings
    assert not caplog.records, "the package's own log would reach nobody's report"
    assert not any(said(attack(Ladder()), start) for start in ("Gradient masking", "twice", "probabilities"))


def test_h12_square_finding_more_than_gradients_is_said() -> None:
    images, labels = ladder_images([20, 45, 60, 75, 90, 114, 130, 145, 51, 55])
    found = attack(quantised, images, labels, eps=12 / 255)
    *_, fab, square = found.stages
    assert fab.accuracy - square.accuracy >= 0.2
    assert said(found, "Square, which uses no gradient, broke") and found.warnings[0].startswith("Gradient masking")


def test_h12_a_model_that_adapts_is_said_and_forgotten_afterwards() -> None:
    model = Ladder()

    def purified(images: Tensor) -> Tensor:
        with torch.enable_grad():
            moved = images.detach().requires_grad_(True)
            torch.autograd.grad(model(moved).sum(), moved)
        return model(images)

    assert said(attack(purified), "computes gradients while it classifies")
    assert not said(attack(model), "computes gradients"), "the package counts in a global that it never clears"


def test_images_with_an_undefined_gradient_do_not_count_as_broken() -> None:
    model = Ladder()

    def fragile(images: Tensor) -> Tensor:
        distance = (images - images.detach()).abs().sum((1, 2, 3))
        return model(images) + 0 * distance.sqrt()[:, None]  # d sqrt(0) is infinite, times 0 is NaN

    found = attack(fragile, norm="l2", eps=0.25)
    assert found.robust.tolist()[0] and found.findings.rejected > 0 and said(found, "counted as not broken")
    assert (found.distances <= 0.2501).all()
    assert said(
        attack(fragile), "4 of 4 rightly classified images the gradient of the logits is zero (or not a number)"
    )


def test_h13_the_device_is_the_models() -> None:
    with pytest.raises(ValueError, match=r"device is 'meta', the model is on 'cpu'.*model.to\('meta'\)"):
        attack(Ladder(), device="meta")
    assert flags(attack(Ladder(), device="cpu")) == STAYS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_h13_a_model_on_a_gpu_takes_images_from_the_cpu() -> None:
    state = torch.cuda.get_rng_state()
    found = attack(Ladder().cuda())
    assert flags(found) == STAYS and found.robust.device.type == "cpu"
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_h14_images_that_are_not_square_are_attacked_and_said() -> None:
    found = attack(Ladder(), IMAGES[..., :5])
    assert flags(found) == STAYS and said(found, "6 high and 5 wide: Square")


def test_grey_images_and_views_into_them() -> None:
    images, labels = ladder_images(LEVELS, channels=1)
    assert flags(attack(Ladder(), images, labels)) == STAYS
    # A slice of the pixels as logits: Square writes into what the model gives back.
    before = images.clone()
    attack(lambda x: x.flatten(1)[:, :4], images, labels.clamp(max=3))
    assert torch.equal(images, before)


def test_one_image_and_no_right_image() -> None:
    assert flags(attack(Ladder(), IMAGES[:1], LABELS[:1])) == [True]
    found = attack(Ladder(), IMAGES, (LABELS + 1) % 4)
    assert found.accuracy == found.clean_accuracy == 0 and [s.forwards for s in found.stages] == [0] * 4
