"""Activation checkpointing: the same loss and gradients to the bit, norms moved once, less kept for the backward."""

from __future__ import annotations

import copy

import pytest
import torch
from coresets.selection_task import live_in
from torch import nn
from training import tiny_model

from hf_robust.attacks import PGD, frozen
from hf_robust.models.backbones import create_backbone
from hf_robust.models.checkpointing import checkpoint_blocks, network_blocks
from hf_robust.models.modeling import RobustModelForPreTraining, RobustPretrainingConfig
from hf_robust.models.norm import BranchSwitch
from hf_robust.objectives.acl import ACL
from hf_robust.objectives.autolora import AutoLoRa


def pair():
    plain = live_in(tiny_model(ACL())).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable()
    return plain, copy.deepcopy(checkpointed)  # a copy: its blocks must not compute with those of the original


def step(model, x):
    """Adversarial images through one branch, clean ones through both, in one call, as AIR does."""
    losses = [z.square().mean() for z in model([("adv", x), ("clean", x.flip(-1)), ("clean", x)])]
    sum(losses).backward()
    return torch.stack(losses).detach()


def kept_bytes(model, x):
    """Bytes that the backward pass of one step keeps, without weights, each tensor once."""
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = model([("adv", x), ("clean", x)])
    assert all(z.requires_grad for z in outputs)
    return sum(size for size, _ in kept.values())


def test_gradients_and_statistics_are_those_of_the_plain_network():
    plain, checkpointed = pair()
    x = torch.rand(4, 3, 8, 8)
    assert torch.equal(step(plain, x), step(checkpointed, x))
    for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    counts = 0
    for (name, p), q in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(p, q), name
        counts += name.endswith("clean.num_batches_tracked") and int(q) == 2
    assert counts > 5 and plain.state_dict().keys() == checkpointed.state_dict().keys()
    assert checkpointed.switch.branch == plain.switch.branch


def test_fewer_activations_are_kept():
    plain, checkpointed = pair()
    x = torch.rand(8, 3, 8, 8)
    assert kept_bytes(checkpointed, x) < 0.6 * kept_bytes(plain, x)


def test_an_attack_is_untouched():
    """In evaluation mode nothing is computed twice: as many convolutions run as in the plain network."""
    plain, checkpointed = pair()
    x, found, calls = torch.rand(4, 3, 8, 8), [], []
    for model in (plain, checkpointed):
        calls.append(0)

        def count(*_):
            calls[-1] += 1

        hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d)]
        attack = PGD(steps=2, random_start=False)
        with frozen(model):
            found.append(attack(lambda images, m=model: m.embed(images, "adv").square().sum(), x))
        assert [h.remove() for h in hooks]
    assert torch.equal(*found) and calls[0] == calls[1] > 0


@pytest.mark.parametrize(
    ("name", "arguments", "blocks"),
    [
        ("resnet18_cifar", {}, 8),
        ("resnet50_cifar", {}, 16),
        ("wide_resnet28_10", {"depth": 16, "width": 1}, 6),
        ("vit_tiny_patch4_32", {}, 12),
        ("efficientnet_b0", {}, 16),
        ("vgg11", {}, 0),
    ],
)
def test_blocks_of_backbones(name, arguments, blocks):
    with torch.device("meta"):
        backbone = create_backbone(name, model_args=arguments)
    found = network_blocks(backbone)
    assert len(found) == blocks and len({id(m) for block in found for m in block.modules()}) == sum(
        len(list(block.modules())) for block in found
    )
    assert checkpoint_blocks(backbone, BranchSwitch()) == blocks


def test_networks_without_blocks_and_second_paths_are_refused():
    with torch.device("meta"):
        model = RobustModelForPreTraining(RobustPretrainingConfig(architecture="vgg11", image_size=32))
    with pytest.raises(ValueError, match="does not work with the backbone 'vgg11', which is not made of blocks"):
        model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"does not work with the paths \['adv', 'lora'\].*leave it out"):
        tiny_model(AutoLoRa(rank=2)).gradient_checkpointing_enable()
