"""Published fine-tuning settings: every cell of the table, what the release did otherwise, and names with a slip."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest

from hf_robust.finetuning_args import RobustFinetuningArguments
from hf_robust.presets import DATASETS, METHODS, MODES, Preset, load_preset, preset_names, rssl_vanilla

# batch/rate on CIFAR-10, CIFAR-100, STL-10 at 96 and at 32 pixels, milestones; epochs are 25 but for EPOCHS.
LINEAR = "512/0.01 512/0.05 512/0.1 128/0.01", (10, 20)
SINGLE = "512/0.01 512/0.01 512/0.01 512/0.01", (15, 20)
FULL = "128/0.1 128/0.1 128/0.1 128/0.1", (15, 20)
TABLE = {
    **{(method, mode): LINEAR for method in ("ACL", "DynACL", "DynACL++", "DynACL-RCS") for mode in ("slf", "alf")},
    **{(method, mode): SINGLE for method in ("AdvCL", "A-InfoNCE", "DeACL") for mode in ("slf", "alf")},
    **{(method, "aff"): FULL for method in METHODS},
    ("ACL", "aff"): (FULL[0], (40, 60)),
    ("ACL-AIR", "aff"): (FULL[0], (40, 60)),
    ("ACL-AIR", "slf"): ("512/0.005 512/0.1 512/0.01 128/0.01", (10, 20)),
    ("ACL-AIR", "alf"): ("512/0.01 512/0.1 512/0.01 128/0.01", (10, 20)),
    ("DynACL-AIR", "slf"): ("512/0.01 512/0.1 512/0.1 128/0.01", (10, 20)),
    ("DynACL-AIR", "alf"): ("512/0.01 512/0.1 128/0.1 128/0.01", (10, 20)),
    ("DynACL-AIR++", "slf"): ("512/0.01 512/0.09 512/0.1 -", (10, 20)),
    ("DynACL-AIR++", "alf"): ("512/0.01 512/0.1 128/0.1 -", (10, 20)),
}
EPOCHS = {
    ("DynACL-AIR", "slf", "cifar10"): 5,
    ("DynACL-AIR++", "alf", "cifar10"): 4,
    ("DynACL-AIR++", "aff", "cifar10"): 19,
    **{(method, "aff", dataset): 100 for method in ("ACL", "ACL-AIR") for dataset in DATASETS},
}
DYNACL = ("DynACL", "DynACL++", "DynACL-RCS")
CELLS = [
    (method, dataset, mode, cell, (10, 20) if (mode, dataset) == ("aff", "stl10") and method in DYNACL else milestones)
    for (method, mode), (row, milestones) in TABLE.items()
    for dataset, cell in zip(DATASETS, row.split(), strict=True)
]


def test_the_table_of_this_file_is_whole():
    assert {(method, dataset, mode) for method, dataset, mode, *_ in CELLS} == set(
        itertools.product(METHODS, DATASETS, MODES)
    )


@pytest.mark.parametrize(("method", "dataset", "mode", "cell", "milestones"), CELLS)
def test_every_cell(method, dataset, mode, cell, milestones):
    if cell == "-":
        with pytest.raises(ValueError, match=re.escape(f"no values for {method} with mode {mode} on {dataset}: ")):
            rssl_vanilla(method, dataset, mode)
        return
    preset = rssl_vanilla(method, dataset, mode)
    assert f"{preset.batch_size}/{preset.learning_rate:g}" == cell
    assert preset.milestones == milestones
    assert preset.epochs == EPOCHS.get((method, mode, dataset), 25)
    assert preset.image_size == (96 if dataset == "stl10" else 32)
    shared = (preset.weight_decay, preset.momentum, preset.keep, preset.validation_fraction)
    assert shared == (2e-4, 0.9, "last", 0.0)
    assert preset.name == f"rssl-vanilla/{method}/{dataset}" in preset_names() and preset.mode == mode
    assert preset.source.startswith("RobustSSL_Benchmark@19dc714") and "utils.py" in preset.source
    assert load_preset(preset.name, mode) == preset


# ---------------------------------------------------------------------- norm branches
@pytest.mark.parametrize(("method", "dataset"), list(itertools.product(METHODS, DATASETS)))
def test_clean_images_have_a_branch_of_their_own_in_aff_alone_and_not_from_cifar10_to_stl10(method, dataset):
    for mode in ("slf", "alf"):
        if not (method == "DynACL-AIR++" and dataset == "stl10-32"):
            assert rssl_vanilla(method, dataset, mode).norm_branches == ("adv",)
            assert not {"clean_branch", "reference_branch"} & rssl_vanilla(method, dataset, mode).flags.keys()
    preset = rssl_vanilla(method, dataset, "aff")
    one = dataset == "stl10-32" or method in ("AdvCL", "A-InfoNCE", "DeACL")
    assert preset.norm_branches == (("adv",) if one else ("clean", "adv"))
    branch = "adv" if one else "clean"
    assert (preset.flags["clean_branch"], preset.flags["reference_branch"]) == (branch, branch)


def test_an_encoder_of_cifar100_keeps_two_branches_on_stl10():
    preset = load_preset("rssl-vanilla/DynACL/stl10-32/cifar100", "aff")
    assert preset.norm_branches == ("clean", "adv") and preset.name.endswith("/stl10-32/cifar100")
    assert preset == rssl_vanilla("DynACL", "stl10-32", "aff", pretrained_on="cifar100")
    assert load_preset("rssl-vanilla/DynACL/stl10-32/cifar10", "aff").norm_branches == ("adv",)
    for method in ("AdvCL", "A-InfoNCE"):  # the release loads such an encoder into new norm layers
        preset = rssl_vanilla(method, "stl10-32", "aff", pretrained_on="cifar100")
        assert preset.norm_branches == ("adv",) and "two norm branches" in preset.note
    with pytest.raises(ValueError, match="for encoders of cifar10 or cifar100, got 'stl10'"):
        rssl_vanilla("ACL", "stl10-32", "aff", pretrained_on="stl10")
    with pytest.raises(ValueError, match="for encoders of cifar10, got 'cifar100': leave that part out"):
        rssl_vanilla("ACL", "cifar10", "aff", pretrained_on="cifar100")


# ---------------------------------------------------------------------- what the release did otherwise
@pytest.mark.parametrize(
    ("name", "mode", "words"),
    [
        ("DynACL-RCS/cifar10", "slf", "batch 128, learning rate 0.1, milestones 15 and 20"),
        ("DynACL-RCS/stl10", "aff", "batch 128, learning rate 0.1, milestones 15 and 20"),
        ("ACL-AIR/cifar10", "aff", "ACL_IR"),
        ("DynACL-AIR/cifar10", "aff", "carry over: 5"),
        ("DynACL-AIR++/cifar10", "aff", "misspelt"),
        ("DynACL-AIR++/cifar100", "slf", "0.1"),
    ],
)
def test_a_note_says_where_the_published_command_ran_something_else(name, mode, words):
    assert words in load_preset(f"rssl-vanilla/{name}", mode).note


@pytest.mark.parametrize("method", ["ACL", "DynACL", "DynACL++", "AdvCL", "A-InfoNCE", "DeACL"])
def test_the_other_rows_need_no_note(method):
    assert {rssl_vanilla(method, dataset, mode).note for dataset in DATASETS for mode in MODES} == {""}


def test_where_the_misspelt_method_ran_what_was_meant_there_is_no_note():
    assert load_preset("rssl-vanilla/DynACL-RCS/cifar10", "aff").note == ""


# ---------------------------------------------------------------------- immutable
def test_nothing_of_a_preset_reaches_the_next_one():
    first = rssl_vanilla("DynACL-AIR", "cifar10", "slf")
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.epochs = 25  # type: ignore[misc]
    long = rssl_vanilla("ACL", "cifar10", "slf")
    long.flags["lr_milestones"].append(99.0)
    first.flags["num_train_epochs"] = 1
    assert rssl_vanilla("DynACL-AIR", "cifar10", "slf") == first and first.epochs == 5
    assert long.flags["lr_milestones"] == [10.0, 20.0] and first.flags["num_train_epochs"] == 5.0
    assert rssl_vanilla("DynACL-AIR", "cifar10", "aff").epochs == 25
    assert rssl_vanilla("DynACL-AIR++", "cifar10", "aff").epochs == 19


def test_the_flags_are_training_arguments_and_make_valid_ones():
    beside = {"image_size", "clean_branch", "reference_branch"}
    cells = [("ACL", "cifar10"), ("DynACL-AIR", "stl10"), ("DeACL", "cifar100")]
    for method, dataset in [*cells, ("DynACL-AIR", "cifar10"), ("DynACL-AIR++", "cifar10")]:  # the last two: short
        for mode in MODES:
            preset = rssl_vanilla(method, dataset, mode)
            settings = {key: value for key, value in preset.flags.items() if key not in beside}
            args = RobustFinetuningArguments(**settings)
            assert (args.learning_rate, args.num_train_epochs) == (preset.learning_rate, preset.epochs)
            assert (args.keep, args.validation_fraction, args.nesterov) == ("last", 0.0, False)
            falls = [epoch for epoch in preset.milestones if epoch < preset.epochs] or None
            assert (args.lr_rule, args.lr_milestones) == ("milestones", falls)


# ---------------------------------------------------------------------- slips
@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        ("rssl-vanilla/DynACL_AIR/cifar10", "slf", "unknown method 'DynACL_AIR': did you mean 'DynACL-AIR'?"),
        ("rssl-vanilla/dynacl/cifar10", "slf", "unknown method 'dynacl': did you mean 'DynACL'?"),
        ("rssl-vanilla/BYOL-XYZ/cifar10", "slf", "unknown method 'BYOL-XYZ': known are ACL, DynACL, DynACL++"),
        ("rssl-vanilla/ACL/cifar-10", "slf", "unknown dataset 'cifar-10': did you mean 'cifar10'?"),
        ("rssl-vanila/ACL/cifar10", "slf", "unknown preset 'rssl-vanila': did you mean 'rssl-vanilla'?"),
        ("rssl-vanilla/ACL", "slf", "a preset is written rssl-vanilla/METHOD/DATASET, got 'rssl-vanilla/ACL': write"),
        ("rssl-vanilla/ACL/cifar10/", "slf", "a preset is written rssl-vanilla/METHOD/DATASET"),
        ("rssl-vanilla/ACL/stl10-32/cifar10/x", "slf", "a preset is written rssl-vanilla/METHOD/DATASET"),
        ("rssl-vanilla/ACL/cifar10", "autolora", "has the modes slf, alf, aff, got 'autolora': leave --preset out"),
    ],
)
def test_slips_are_errors_that_say_what_to_write(text, mode, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_preset(text, mode)


def test_an_unknown_mode_of_the_function_is_named():
    with pytest.raises(ValueError, match="unknown mode 'AFF': did you mean 'aff'"):
        rssl_vanilla("ACL", "cifar10", "AFF")


def test_a_preset_is_comparable_and_hashable():
    assert isinstance(hash(rssl_vanilla("ACL", "cifar10", "slf")), int)
    assert isinstance(rssl_vanilla("ACL", "cifar10", "slf"), Preset)
