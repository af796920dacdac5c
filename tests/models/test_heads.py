"""The projector of each published method, and classifiers side by side."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_robust.models.heads import LinearHeads, Projector
from hf_robust.models.modeling import RobustModelForPreTraining, RobustPretrainingConfig
from hf_robust.models.norm import NormBranches

THIN = {"architecture": "resnet10_cifar", "model_args": {"channels": [4, 4, 8, 8]}}


def build(**config) -> RobustModelForPreTraining:
    torch.manual_seed(0)
    return RobustModelForPreTraining(RobustPretrainingConfig(**THIN, **config))


def test_advcl_projector_by_hand():
    torch.manual_seed(0)
    head, h = Projector(8, 6, 2, norms="hidden").eval(), torch.rand(5, 8)
    assert [name for name, _ in head.named_children()] == ["fc1", "bn1", "act1", "fc2"]
    head.bn1.running_mean.normal_()
    hidden = F.linear(h, head.fc1.weight, head.fc1.bias) - head.bn1.running_mean
    expected = F.linear((hidden / (1 + head.bn1.eps) ** 0.5).relu(), head.fc2.weight, head.fc2.bias)
    torch.testing.assert_close(head(h), expected)
    assert (head(h) < 0).any()


def test_rocl_projector_by_hand():
    torch.manual_seed(0)
    head, h = Projector(8, 6, 2, hidden_features=16, norms="none"), torch.rand(5, 8)
    assert [name for name, _ in head.named_children()] == ["fc1", "act1", "fc2"]
    assert head.fc1.out_features == 16
    expected = F.linear(F.linear(h, head.fc1.weight, head.fc1.bias).relu(), head.fc2.weight, head.fc2.bias)
    torch.testing.assert_close(head(h), expected)


def test_a_bias_stands_where_no_norm_would_cancel_it():
    for norms, biases in {"all": [True, False, False], "hidden": [True, False, True], "none": [True] * 3}.items():
        head = Projector(8, 6, 3, norms=norms)
        assert [m.bias is not None for m in head if isinstance(m, nn.Linear)] == biases


def test_linear_heads_stand_side_by_side():
    torch.manual_seed(0)
    heads, h = LinearHeads(8, [2, 3]), torch.rand(5, 8)
    logits = heads(h)
    assert logits.shape == (5, 5) and list(heads.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    torch.testing.assert_close(logits[:, 2:], F.linear(h, heads[1].weight, heads[1].bias))


def test_a_branch_ends_in_its_own_heads_and_leaves_the_projector_alone():
    branches = ("clean", "adv", "adv_ce")
    model = build(norm_branches=branches, projector_dim=6, branch_heads={"adv_ce": [2, 3]})
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    z, logits = model([("adv", x), ("adv_ce", x.flip(0) * 0.5)])
    assert z.shape == (4, 6) and logits.shape == (4, 5)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model.embed(x, "adv_ce"), model.branch_heads["adv_ce"](model.features(x, "adv_ce")))
        assert not torch.equal(model.features(x, "adv_ce"), model.features(x, "adv"))
    assert {int(b) for n, b in model.projector.named_buffers() if n.endswith("adv.num_batches_tracked")} == {1}
    assert {int(b) for n, b in model.projector.named_buffers() if n.endswith("adv_ce.num_batches_tracked")} == {0}


@pytest.mark.parametrize("shared", [True, False])
def test_a_shared_norm_sees_all_branches(shared):
    model = build(norm_branches=("clean", "adv"), projector_norm_branches="shared" if shared else "own")
    kinds = {type(m) for name, m in model.projector.named_children() if name.startswith("bn")}
    assert kinds == {nn.BatchNorm1d if shared else NormBranches}
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.train()([("clean", x), ("adv", x)])
    counts = {int(b) for n, b in model.projector.named_buffers() if n.endswith("num_batches_tracked")}
    assert counts == ({2} if shared else {1})


def test_the_configuration_survives_saving(tmp_path):
    model = build(
        norm_branches=("clean", "adv", "adv_ce"),
        projector_layers=2,
        projector_norms="hidden",
        projector_norm_branches="shared",
        projector_hidden_dim=12,
        branch_heads={"adv_ce": (2, 3)},
    ).eval()
    model.save_pretrained(tmp_path)
    again = RobustModelForPreTraining.from_pretrained(tmp_path)
    assert again.config.branch_heads == {"adv_ce": [2, 3]} == model.config.branch_heads
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for branch in ("clean", "adv", "adv_ce"):
            assert torch.equal(again.embed(x, branch), model.embed(x, branch))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"projector_norms": "some"}, r"projector_norms must be 'all' \(ACL\), 'hidden' .*, got 'some'"),
        ({"projector_norm_branches": "one"}, r"projector_norm_branches must be 'own' or 'shared' .*, got 'one'"),
        ({"branch_heads": {"adv_ce": [2]}}, r"names the branch 'adv_ce', norm_branches are clean, adv: add it there"),
        ({"branch_heads": {"adv": []}}, r"classifiers of 'adv' need at least 2 classes each, got \[\]"),
        ({"branch_heads": {"adv": [1]}}, r"classifiers of 'adv' need at least 2 classes each, got \[1\]"),
    ],
)
def test_impossible_heads_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RobustPretrainingConfig(**THIN, **values)
