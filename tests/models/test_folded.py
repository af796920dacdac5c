"""A folded network is the same function: outputs, input gradients, and the way back where folding does not work."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_robust.attacks import PGD, frozen
from hf_robust.models import folded as folded_module
from hf_robust.models.folded import FoldedNetwork
from hf_robust.models.modeling import RobustModelForPreTraining, RobustPretrainingConfig

NETWORKS = {
    "cifar": ("resnet10_cifar", {"channels": [8, 8, 16, 16]}, 16),
    "wide": ("wide_resnet28_10", {"depth": 10, "width": 1}, 16),
    "stock": ("resnet18", {"channels": [8, 8, 16, 16]}, 32),
    "transformer": ("vit_tiny_patch4_32", {"depth": 1, "embed_dim": 24}, 16),
}
FOLDING = ("cifar", "wide", "stock")


def trained_looking(name: str, **config) -> RobustModelForPreTraining:
    """Every branch with statistics and affine values of its own: those of a fresh network hide most errors."""
    architecture, model_args, size = NETWORKS[name]
    torch.manual_seed(0)
    values = {"architecture": architecture, "model_args": model_args, "image_size": size, **config}
    model = RobustModelForPreTraining(RobustPretrainingConfig(**values))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.5)
                module.running_var.uniform_(0.3, 3)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.5)
    return model.eval()


def images(model: RobustModelForPreTraining, n: int = 3) -> Tensor:
    size, dtype = model.config.image_size, next(model.parameters()).dtype
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def backbone(network: FoldedNetwork, branch: str) -> nn.Module:
    return network.copy_of(branch).backbone


def norms(module: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in module.modules())


class Branching(nn.Module):
    """Python control flow on values, which cannot be traced."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if bool(x.sum() > -1e9) else self.inner(-x)


# ---------------------------------------------------------------------- the same function
@pytest.mark.parametrize("branch", ["clean", "adv"])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_model_branch_by_branch(name, branch):
    model = trained_looking(name)
    network, x = FoldedNetwork(model), images(model)
    with torch.no_grad():
        expected, other = model.features(x, branch), model.features(x, "adv" if branch == "clean" else "clean")
        torch.testing.assert_close(network.features(x, branch), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(network.embed(x, branch), model.embed(x, branch), rtol=1e-3, atol=1e-4)
        assert torch.equal(network.head(expected, branch), model.head(expected, branch))
    if name in FOLDING:
        assert (expected - other).abs().max() > 0.01  # the branches differ, or this shows nothing


@pytest.mark.parametrize("name", FOLDING)
def test_in_double_precision_up_to_the_last_digits(name):
    model = trained_looking(name).double()
    network, x = FoldedNetwork(model), images(model)
    with torch.no_grad():
        for branch in ("clean", "adv"):
            torch.testing.assert_close(network.embed(x, branch), model.embed(x, branch), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_input_gradients_are_equal(name):
    model = trained_looking(name).double()
    network, x = FoldedNetwork(model), images(model).requires_grad_()
    for branch in ("clean", "adv"):
        (found,) = torch.autograd.grad(F.normalize(network.embed(x, branch)).pow(3).sum(), x)
        (expected,) = torch.autograd.grad(F.normalize(model.embed(x, branch)).pow(3).sum(), x)
        assert expected.abs().max() > 1e-6
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def test_an_attack_finds_the_same_images():
    model = trained_looking("cifar").double()
    network, x = FoldedNetwork(model), images(model)
    target = model.embed(x, "clean").detach()

    def attacked(through) -> Tensor:
        with frozen(model):
            return PGD(steps=3)(
                lambda im: (through.embed(im, "adv") - target).square().sum(),
                x,
                generator=torch.Generator().manual_seed(0),
            )

    assert torch.equal(attacked(network), attacked(model))


@pytest.mark.parametrize("config", [{"norm_branches": ("adv",)}, {"mean": None, "std": None}, {"projector_layers": 2}])
def test_other_configurations(config):
    model = trained_looking("cifar", **config)
    network, x = FoldedNetwork(model), images(model)
    with torch.no_grad():
        for branch in model.switch.branches:
            torch.testing.assert_close(network.embed(x, branch), model.embed(x, branch), rtol=1e-3, atol=1e-4)


def test_classifiers_of_a_branch_take_the_place_of_the_head_there():
    model = trained_looking("cifar", norm_branches=("clean", "adv", "adv_ce"), branch_heads={"adv_ce": [2, 3]})
    x, network = images(model), FoldedNetwork(model)
    assert network.embed(x, "adv_ce").shape == (3, 5)
    for branch in ("adv", "adv_ce"):
        torch.testing.assert_close(network.embed(x, branch), model.embed(x, branch), atol=1e-4, rtol=1e-4)


def test_without_a_head_the_features_are_embedded():
    model = trained_looking("cifar", head="none")
    x, network = images(model), FoldedNetwork(model)
    torch.testing.assert_close(network.embed(x, "adv"), model.features(x, "adv"), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(network.embed(x, "adv"), network.features(x, "adv"))


def test_a_classifier_is_the_models_own():
    model = trained_looking("cifar", norm_branches=("adv",), head="classifier", num_classes=5)
    network, x = FoldedNetwork(model), images(model)
    assert network.head_module is model.classifier and network.switch is model.switch
    assert network.config is model.config
    with torch.no_grad():
        torch.testing.assert_close(network.embed(x, "adv"), model.embed(x, "adv"), rtol=1e-3, atol=1e-4)


def test_batches_of_other_sizes_pass():
    model = trained_looking("cifar")
    network = FoldedNetwork(model)
    with torch.no_grad():
        for n in (1, 5):
            x = images(model, n)
            torch.testing.assert_close(network.features(x, "adv"), model.features(x, "adv"), rtol=1e-4, atol=1e-5)


def test_an_unknown_branch_is_refused_with_the_known_ones():
    model = trained_looking("cifar")
    with pytest.raises(ValueError, match="unknown norm branch 'noisy'.*'clean', 'adv'"):
        FoldedNetwork(model).features(images(model), "noisy")


# ---------------------------------------------------------------------- folded or not
@pytest.mark.parametrize("name, left", [("cifar", 0), ("stock", 0), ("wide", 4)])
def test_norms_after_convolutions_are_gone(name, left):
    """A wide ResNet also has norms in front of its blocks and at its end: three blocks and one."""
    model = trained_looking(name)
    network = FoldedNetwork(model)
    for branch in ("clean", "adv"):
        assert norms(backbone(network, branch)) == left < norms(model.backbone)


def test_a_norm_that_is_not_alone_in_reading_a_convolution_stays():
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.twice, self.after = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            x = x + self.norm(x)
            x = self.after(self.twice(self.twice(x)))
            return x.mean((2, 3))

    network = Fork().eval()
    with torch.no_grad():
        for norm in (network.norm, network.after):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.3, 3)
        x = torch.rand(2, 3, 8, 8)
        fused, _ = folded_module._fuse(network)
        torch.testing.assert_close(fused(x), network(x))
    assert norms(fused) == 2


def test_a_backbone_that_cannot_be_traced_is_copied_as_it_is():
    model = trained_looking("cifar")
    model.backbone = Branching(model.backbone)
    network, x = FoldedNetwork(model), images(model)
    with torch.no_grad():
        assert torch.equal(network.features(x, "adv"), model.features(x, "adv"))
        assert torch.equal(network.features(x, "clean"), model.features(x, "clean"))
    assert norms(backbone(network, "adv")) > 0 and not network.folds("adv")


@pytest.mark.parametrize("wrong", [lambda y: y * 1.1, lambda y: y * float("nan"), lambda y: y[:, :-1]])
def test_a_folded_backbone_that_disagrees_is_not_used(monkeypatch, wrong):
    fuse = folded_module._fuse

    class Wrong(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return wrong(self.inner(x))

    monkeypatch.setattr(folded_module, "_fuse", lambda network: (Wrong(fuse(network)[0]), {}))
    model = trained_looking("cifar")
    network, x = FoldedNetwork(model), images(model)
    with torch.no_grad():
        assert torch.equal(network.embed(x, "adv"), model.embed(x, "adv"))


# ---------------------------------------------------------------------- memory and state
@pytest.mark.parametrize("last", [True, False])
def test_the_memory_format_of_the_weights_is_kept(last):
    model = trained_looking("cifar")
    if last:
        model.to(memory_format=torch.channels_last)
    network = FoldedNetwork(model)
    for branch in ("clean", "adv"):
        weights = [m.weight for m in backbone(network, branch).modules() if isinstance(m, nn.Conv2d)]
        wide = [w for w in weights if w.shape[1] > 1 and w.shape[2] > 1]
        assert wide and all(w.is_contiguous(memory_format=torch.channels_last) is last for w in wide)
    with torch.no_grad():
        x = images(model).contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(network.features(x, "adv"), model.features(x, "adv"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_model_is_left_as_it_was(name):
    model = trained_looking(name)
    model.switch.branch = "adv"
    next(model.backbone.parameters()).requires_grad_(False)
    next(model.backbone.children()).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    modes = {key: m.training for key, m in model.named_modules()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    network = FoldedNetwork(model)
    x = images(model).requires_grad_()
    network.embed(x, "clean").sum().backward()
    assert x.grad.abs().max() > 0
    assert torch.equal(torch.get_rng_state(), state)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert [p.requires_grad for p in model.parameters()] == flags and model.switch.branch == "adv"
    assert {key: m.training for key, m in model.named_modules()} == modes
    assert all(p.grad is None for p in model.parameters())  # the copies are frozen, and no alias


def test_weights_that_move_later_do_not_move_the_copy():
    model = trained_looking("cifar")
    network, x = FoldedNetwork(model), images(model)
    with torch.no_grad():
        before = network.features(x, "adv")
        for parameter in model.backbone.parameters():
            parameter.add_(1)
        assert torch.equal(network.features(x, "adv"), before)


@pytest.mark.parametrize("traceable", [True, False])
def test_copies_are_frozen_and_in_evaluation_mode(traceable):
    model = trained_looking("cifar")
    if not traceable:
        model.backbone = Branching(model.backbone)
    model.train()
    network = FoldedNetwork(model)
    for branch in ("clean", "adv"):
        assert not any(m.training for m in backbone(network, branch).modules())
        assert not any(p.requires_grad for p in backbone(network, branch).parameters())
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_that_pass_part_by_part_on_a_cpu_give_the_same_features_and_input_gradients(monkeypatch, dtype):
    model = trained_looking("cifar").to(dtype)
    folded, x = FoldedNetwork(model), images(model, 7).requires_grad_(True)
    sizes = []
    folded.copy_of("adv").backbone.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    whole = folded.features(x, "adv")
    (expected,) = torch.autograd.grad(whole.square().sum(), x)
    monkeypatch.setattr(folded_module, "CACHE_PIXELS", 3 * 16 * 16)
    parts = folded.features(x, "adv")
    (gradient,) = torch.autograd.grad(parts.square().sum(), x)
    assert sizes == [7, 3, 3, 1]
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(("name", "folds"), [("cifar", True), ("stock", True), ("transformer", False)])
def test_the_first_convolution_takes_over_the_division_by_the_standard_deviation(name, folds):
    model = trained_looking(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded, x = FoldedNetwork(model), images(model).requires_grad_(True)
    for branch in model.switch.branches:
        assert folded.copy_of(branch).shift is folds
        found, expected = folded.features(x, branch), model.features(x, branch)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
        one, other = (torch.autograd.grad(z.square().sum(), x)[0] for z in (found, expected))
        torch.testing.assert_close(one, other, atol=1e-3 * float(other.abs().max()), rtol=1e-2)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    plain = FoldedNetwork(trained_looking(name, mean=None, std=None))
    assert plain.copy_of("adv").shift is False
