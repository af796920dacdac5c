from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from hf_robust.models.norm import BranchSwitch, NormBranches, add_norm_branches, export_branch, use_branch

# One per kind of norm layer: BatchNorm2d, timm's BatchNormAct2d (its activation must survive), BatchNorm1d, none.
MODELS = [
    ("test_resnet", True),
    ("regnety_002", True),
    ("resnetv2_18", True),
    ("test_efficientnet", True),
    ("mobilenetv3_small_050", True),
    ("levit_128s", True),
    ("test_convnext", False),
    ("test_vit", False),
]
SIZE = {"levit_128s": 224, "test_vit": 160}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=0)


def images(name: str, n: int = 2) -> torch.Tensor:
    size = SIZE.get(name, 32)
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def branch_state(model: nn.Module, branch: str) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if f".{branch}." in k or k.startswith(f"{branch}.")}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2), nn.BatchNorm1d(2))


@pytest.mark.parametrize(("name", "has_statistics"), MODELS)
def test_branches_of_timm_models_start_equal_stay_apart_and_export_plain(name, has_statistics):
    plain, x = build(name), images(name)
    # The lively state makes sure that affine parameters and statistics travel, not only their start values.
    plain.train()
    with torch.no_grad():
        plain(x)
    model = copy.deepcopy(plain)
    switch = add_norm_branches(model)
    count = sum(isinstance(m, NormBranches) for m in model.modules())
    assert (count > 0) == has_statistics

    plain.eval(), model.eval()
    with torch.no_grad():
        for branch in switch.branches:
            with use_branch(switch, branch):
                assert torch.equal(model(x), plain(x))

    clean, adv = branch_state(model, "clean"), branch_state(model, "adv")
    plain.train(), model.train()
    with torch.no_grad(), use_branch(switch, "adv"):
        torch.manual_seed(2)
        model(0.1 + 0.3 * x)
        torch.manual_seed(2)
        plain(0.1 + 0.3 * x)
    assert same(branch_state(model, "clean"), clean)
    assert same(branch_state(model, "adv"), adv) == (not has_statistics)

    # A plain model that saw the same images is the same model, key by key and bit by bit.
    exported = export_branch(model, "adv").eval()
    assert list(exported.state_dict()) == list(plain.state_dict())
    assert same(exported.state_dict(), plain.state_dict())
    with torch.no_grad():
        assert torch.equal(exported(x), plain.eval()(x))
    assert not any(isinstance(m, NormBranches) for m in exported.modules())
    assert sum(isinstance(m, NormBranches) for m in model.modules()) == count


def test_keys_carry_the_names_of_the_branches():
    model = small()
    add_norm_branches(model, ("clean", "adv_ce", "adv"))
    keys = model.state_dict().keys()
    assert {"1.clean.weight", "1.adv_ce.running_mean", "1.adv.bias", "0.weight"} <= keys
    assert "1.weight" not in keys


def test_affine_parameters_of_each_branch_get_their_own_gradient():
    model = small()
    switch = add_norm_branches(model)
    with use_branch(switch, "adv"):
        model(torch.rand(5, 3)).square().sum().backward()
    assert model[1].adv.weight.grad is not None
    assert model[1].clean.weight.grad is None
    assert model[1].clean.weight is not model[1].adv.weight


def test_single_branch_leaves_layers_plain_and_knows_its_name():
    model = small()
    before = list(model.state_dict())
    switch = add_norm_branches(model, ("clean",))
    assert list(model.state_dict()) == before
    with pytest.raises(ValueError, match="unknown norm branch 'adv'.*'clean'"), use_branch(switch, "adv"):
        pass


def test_use_branch_restores_the_branch_also_after_an_error_and_when_nested():
    switch = BranchSwitch(("clean", "adv"))
    with pytest.raises(RuntimeError), use_branch(switch, "adv"):
        with use_branch(switch, "clean"):
            assert switch.branch == "clean"
        assert switch.branch == "adv"
        raise RuntimeError
    assert switch.branch == "clean"


def test_deepcopy_has_one_switch_of_its_own():
    model = small()
    switch = add_norm_branches(model)
    twin = copy.deepcopy(model)
    switches = {id(m.switch) for m in twin.modules() if isinstance(m, NormBranches)}
    assert len(switches) == 1
    assert switches != {id(switch)}
    with use_branch(switch, "adv"):
        assert twin[1].switch.branch == "clean"
    unpickled = pickle.loads(pickle.dumps(model))
    assert unpickled[1].switch is unpickled[4].switch


def test_reads_answer_for_the_active_branch():
    model = small()
    switch = add_norm_branches(model)
    norm = model[1]
    assert norm.num_features == 4
    assert norm.eps == 1e-5
    assert norm.weight is norm.clean.weight
    with use_branch(switch, "adv"):
        assert norm.weight is norm.adv.weight
        assert norm.bias is norm.adv.bias
        assert norm.running_mean is norm.adv.running_mean
    assert not hasattr(norm, "no_such_thing")
    norm.clean._private = norm.clean.public = 1
    assert norm.public == 1
    assert not hasattr(norm, "_private")  # copy and pickle probe for underscored names


def test_instance_norm_with_statistics_is_converted_and_stateless_norms_are_not():
    model = nn.Sequential(
        nn.InstanceNorm2d(3, track_running_stats=True), nn.InstanceNorm2d(3), nn.GroupNorm(1, 3), nn.LayerNorm(4)
    )
    add_norm_branches(model)
    assert [isinstance(m, NormBranches) for m in model] == [True, False, False, False]


def test_batch_norm_without_statistics_still_gets_two_sets_of_affine_parameters():
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False))
    add_norm_branches(model)
    assert isinstance(model[0], NormBranches)


def test_a_layer_used_twice_stays_one_layer():
    norm = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)})
    add_norm_branches(model)
    assert model["a"] is model["b"][0]
    assert export_branch(model, "adv")["a"] is not model["a"]


def test_one_switch_may_cover_several_modules_but_a_module_only_one_switch():
    model, head = small(), small()
    switch = add_norm_branches(model)
    assert add_norm_branches(head, switch=switch) is switch
    both = nn.ModuleList([model, head])
    keys = list(both.state_dict())
    add_norm_branches(both, switch=switch)  # nothing left to do
    assert list(both.state_dict()) == keys
    with pytest.raises(ValueError, match="another switch"):
        add_norm_branches(model)


def test_frozen_layers_and_modes_survive():
    model = small().eval()
    model[1].weight.requires_grad_(False)
    add_norm_branches(model)
    assert not model[1].adv.weight.requires_grad
    assert model[1].adv.bias.requires_grad
    assert not model[1].training
    assert not model[1].adv.training


def test_export_of_one_layer_and_of_a_plain_module():
    layer = NormBranches(nn.BatchNorm1d(3), BranchSwitch())
    out = export_branch(layer, "adv")
    assert type(out) is nn.BatchNorm1d
    assert out is not layer.adv
    plain = small()
    copied = export_branch(plain, "whatever")
    assert copied is not plain
    assert same(copied.state_dict(), plain.state_dict())
    with pytest.raises(ValueError, match="'clean', 'adv'"):
        export_branch(layer, "pgd")


@pytest.mark.parametrize("branches", [(), ("adv", "adv"), ("bn.clean",), (1,)])
def test_impossible_names_of_branches_are_refused(branches):
    with pytest.raises(ValueError, match="different identifiers"):
        BranchSwitch(branches)


def test_names_that_a_layer_needs_itself_and_bare_layers_are_refused():
    with pytest.raises(ValueError, match="cannot name a norm branch"):
        add_norm_branches(small(), ("clean", "weight"))
    with pytest.raises(ValueError, match="wrap it in nn.Sequential"):
        add_norm_branches(nn.BatchNorm1d(3))


def test_compiled_model_follows_the_switch_without_graph_breaks():
    model = small()
    switch = add_norm_branches(model)
    with torch.no_grad():
        model[1].adv.weight.fill_(3.0)
    model.eval()
    x = torch.rand(5, 3)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for branch in ("clean", "adv", "clean"):
        with use_branch(switch, branch), torch.no_grad():
            assert torch.equal(compiled(x), model(x))
    torch.compiler.reset()
