"""Formats are files; keys tell which one; whatever is not understood is listed."""

from __future__ import annotations

import pkgutil
import re

import pytest
import torch
from authors_networks import AclProjector, Attacked, Net, WideNet, advcl_heads, prefixed, trained
from torch import nn

from hf_robust import converters
from hf_robust.converters import format_names, load_converter, recognise
from hf_robust.models.backbones import create_backbone
from hf_robust.models.native import stock_architecture

FAMILIES = ("acl", "advcl", "deacl", "rcs", "robustbench", "robustness")


def files() -> dict[str, dict[str, torch.Tensor]]:
    """One state dictionary of each family."""
    student = trained(Net(count=0, padding=2)).state_dict()
    wide = trained(WideNet(head={"fc": nn.Linear(128, 10)}))
    plain = Net(count=0, normalize=None, shortcut="shortcut", head={"linear": nn.Linear(32, 10)})
    return {
        "acl": trained(Net(head={"fc": AclProjector(32, 2)})).state_dict(),
        "advcl": trained(Net(count=3, normalize=None, head=advcl_heads(32))).state_dict(),
        "deacl": {**prefixed(student, "backbone."), **prefixed(student, "momentum_backbone.")},
        "rcs": trained(WideNet(count=2, head={"linear": AclProjector(128, 2, 2)})).state_dict(),
        "robustbench": wide.state_dict(),
        "robustness": trained(Attacked(plain, (0.5,) * 3, (0.2,) * 3)).state_dict(),
    }


FILES = files()


def test_every_family_is_a_file_of_its_name():
    names = {load_converter(name).names[0] for name in format_names()}
    assert names == set(FAMILIES) <= {m.name for m in pkgutil.iter_modules(converters.__path__)}
    assert {"dynacl", "air", "a-infonce", "madrylab"} < set(format_names())
    assert len(format_names()) == len(set(format_names()))


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_one_family_recognises_its_keys(family):
    for tensors in (FILES[family], prefixed(FILES[family], "module.") if family != "deacl" else FILES[family]):
        found, why = recognise(tensors)
        assert found.names[0] == family and len(why) > 20


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_used_or_named(family):
    tensors = dict(FILES[family])
    load_converter(family).convert(dict(tensors))
    for key in ("strange.weight", "module.x"):
        with pytest.raises(ValueError, match=f"1 left over \\({re.escape(key)}\\)"):
            load_converter(family).convert({**tensors, key: torch.ones(1)})
    inner = next(key for key in tensors if key.endswith(("layer2.0.conv2.weight", "block2.layer.0.conv2.weight")))
    without = {key: value for key, value in tensors.items() if not key.endswith(inner.split("model.")[-1])}
    with pytest.raises(ValueError, match=r"1 missing \(layer2.0.conv2.weight\)"):
        load_converter(family).convert(without)
    assert set(tensors) == set(FILES[family])


def test_nothing_given_is_changed():
    before = {key: value.clone() for key, value in FILES["acl"].items()}
    load_converter("acl").convert(FILES["acl"], "clean")
    assert all(torch.equal(before[key], FILES["acl"][key]) for key in before) and len(before) == len(FILES["acl"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("other", FAMILIES)
def test_the_wrong_format_is_an_error(family, other):
    if family == other or (family, other) == ("rcs", "acl"):  # the small networks of RCS are ACL's
        return
    with pytest.raises(ValueError, match=r"--format|do not fit|must be a convolution|no tensor|not among the arch"):
        load_converter(family).convert(FILES[other])


def test_shapes_and_numbers_are_checked():
    tensors = {**FILES["acl"], "layer3.1.conv1.weight": torch.zeros(16, 16, 1, 1)}
    with pytest.raises(ValueError, match=r"1 of another shape \(layer3.1.conv1.weight \(16, 16, 1, 1\) instead of"):
        load_converter("acl").convert(tensors)
    tensors = {**FILES["acl"], "conv1.weight": FILES["acl"]["conv1.weight"] * float("nan")}
    with pytest.raises(ValueError, match=r"1 not finite \(conv1.weight\)"):
        load_converter("acl").convert(tensors)
    with pytest.raises(ValueError, match="three means and three positive"):
        load_converter("acl").convert({**FILES["acl"], "normalize.std": torch.zeros(3)})
    with pytest.raises(ValueError, match="known stems are 3x3"):
        load_converter("acl").convert({**FILES["acl"], "conv1.weight": torch.zeros(8, 3, 5, 5)})


def test_counters_of_old_files_are_filled_in():
    old = {key: value for key, value in FILES["acl"].items() if not key.endswith("num_batches_tracked")}
    conversion = load_converter("acl").convert(old)
    assert conversion.tensors["bn1.num_batches_tracked"].item() == 0
    assert any("counters of batches" in note for note in conversion.notes)


def test_too_many_branches_name_the_right_format():
    with pytest.raises(ValueError, match="3 branches .* this format has 2: clean, adv; .*--format advcl"):
        load_converter("acl").convert({k: v for k, v in FILES["advcl"].items() if not k.startswith(("fc_", "head_"))})


def test_copies_of_the_attacker_must_be_copies():
    key = "attacker.model.layer1.0.conv1.weight"
    with pytest.raises(ValueError, match=f"1 tensors of the attacker differ .*{key.removeprefix('attacker.')}"):
        load_converter("robustness").convert({**FILES["robustness"], key: FILES["robustness"][key] + 1})


def test_look_alikes_of_robustbench_are_refused():
    convert = load_converter("robustbench").convert
    with pytest.raises(ValueError, match="this is DeepMind's network"):
        convert({"init_conv.weight": torch.zeros(16, 3, 3, 3), "logits.weight": torch.zeros(10, 640)})
    plain = Net(count=0, normalize=None, shortcut="shortcut", head={"linear": nn.Linear(32, 10)}).state_dict()
    with pytest.raises(ValueError, match="a pre-activation ResNet"):
        convert({key: value for key, value in plain.items() if not key.startswith("bn1.")})


def test_wide_student_of_deacl_is_another_network():
    tensors = {**prefixed(FILES["robustbench"], "backbone."), "backbone.conv1.bias": torch.zeros(16)}
    with pytest.raises(ValueError, match=r"convolutions of this wide ResNet have biases"):
        load_converter("deacl").convert({k: v for k, v in tensors.items() if "fc." not in k})


def test_unknown_keys_and_names():
    with pytest.raises(ValueError, match=r"no format knows these 1 keys \(encoder.weight\): known are a-infonce, acl"):
        recognise({"encoder.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="unknown format 'dynaclr': did you mean 'dynacl'"):
        load_converter("dynaclr")
    assert load_converter("A_InfoNCE").names[0] == "advcl"


def test_the_stem_of_deacl_is_an_argument_that_is_checked():
    net = create_backbone("resnet10_cifar", model_args={"channels": [8, 8, 8, 8], "stem_padding": 2})
    assert net.conv1(torch.zeros(1, 3, 32, 32)).shape == (1, 8, 34, 34)
    assert stock_architecture("resnet10_cifar", {"stem_padding": 2}) is None
    with pytest.raises(ValueError, match="stem_padding must be 1"):
        create_backbone("resnet10_cifar", model_args={"stem_padding": 0})
