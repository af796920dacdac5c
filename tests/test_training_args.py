"""Training arguments: every changed default, every refusal, and the arithmetic of batches."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
from transformers import TrainingArguments

from hf_robust.training_args import WITHOUT_EFFECT, RobustTrainingArguments, check_fsdp_settings

CHANGED = {
    "output_dir": "outputs/pretrain",
    "num_train_epochs": 1000.0,
    "per_device_train_batch_size": 512,
    "learning_rate": 5.0,
    "weight_decay": 1e-6,
    "max_grad_norm": 0.0,
    "remove_unused_columns": False,
    "logging_nan_inf_filter": False,
    "ddp_find_unused_parameters": False,
    "ddp_broadcast_buffers": False,
    "logging_steps": 10,
    "logging_first_step": True,
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "report_to": ["tensorboard"],
}
ADDED = {
    "optimizer": "lars",
    "momentum": 0.9,
    "warmup_epochs": 10.0,
    "min_learning_rate": 1e-6,
    "lr_granularity": "step",
    "channels_last": False,
    "probe_every": 0.0,
}


def arguments(**values):
    return RobustTrainingArguments(**{"report_to": "none", **values})


@pytest.fixture
def four_processes(monkeypatch):
    monkeypatch.setattr(RobustTrainingArguments, "world_size", property(lambda self: 4))


# ---------------------------------------------------------------------- defaults
def test_defaults_are_the_published_recipe():
    args = RobustTrainingArguments()
    expected = {**CHANGED, **ADDED}
    assert {name: getattr(args, name) for name in expected} == expected


def test_every_changed_or_added_field_says_why():
    for field in dataclasses.fields(RobustTrainingArguments):
        if field.name in RobustTrainingArguments.__annotations__:
            assert len(field.metadata.get("help", "")) > 10, field.name


def test_the_stock_defaults_would_still_be_other_ones():
    """When transformers takes over one of our defaults, the override can go."""
    stock = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}
    same = {name for name, value in CHANGED.items() if stock[name] == value}
    assert same <= {"logging_first_step"}


def test_a_machine_without_accelerator_takes_bf16_and_pins_nothing(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    args = arguments(bf16=True)
    assert args.use_cpu and args.bf16 and not args.dataloader_pin_memory


def test_arguments_survive_a_copy():
    args = arguments(learning_rate=0.3, save_strategy="steps", output_dir="x")
    copied = dataclasses.replace(args)
    assert copied.to_dict() == args.to_dict()


# ---------------------------------------------------------------------- resume
@pytest.mark.parametrize(
    ("given", "expected"),
    [("true", True), ("True", True), (True, True), ("false", None), (False, None), (None, None), ("a/b-1", "a/b-1")],
)
def test_resume_reads_true_as_the_newest_checkpoint_and_anything_else_as_a_path(given, expected):
    assert arguments(resume_from_checkpoint=given).resume_from_checkpoint is expected or expected == given


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": -1.0}, r"learning_rate must be .*0 or more, got -1\.0"),
        ({"learning_rate": float("nan")}, r"learning_rate must be .*0 or more, got nan"),
        ({"learning_rate": None}, r"learning_rate must be a number, 0 or more, got None"),
        ({"momentum": -0.1}, r"momentum must be .*0 or more, got -0\.1"),
        ({"warmup_epochs": -1}, r"warmup_epochs must be .*0 or more, got -1"),
        ({"warmup_epochs": [1]}, r"warmup_epochs must be a number, 0 or more, got \[1\]"),
        ({"min_learning_rate": -1e-6}, r"min_learning_rate must be .*0 or more, got -1e-06"),
        ({"probe_every": -2}, r"probe_every must be .*0 or more, got -2"),
        ({"weight_decay": -1e-6}, r"weight_decay must be .*0 or more, got -1e-06"),
        ({"optimizer": "adam"}, r"optimizer must be lars, sgd or adamw, got 'adam'"),
        ({"lr_granularity": "batch"}, r"lr_granularity must be step or epoch, got 'batch'"),
        ({"remove_unused_columns": True}, r"remove_unused_columns, .* must stay false: .*; leave them unset"),
        ({"ddp_find_unused_parameters": True}, r"ddp_find_unused_parameters, .* must stay false"),
        ({"ddp_broadcast_buffers": True}, r"ddp_broadcast_buffers must stay false"),
        # None is not false: the stock trainer then searches unused parameters and broadcasts buffers
        ({"ddp_find_unused_parameters": None}, r"ddp_find_unused_parameters, .* must stay false"),
        ({"ddp_broadcast_buffers": None}, r"ddp_broadcast_buffers must stay false"),
    ],
)
def test_values_that_would_train_something_else_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        arguments(**values)


def test_no_advice_for_settings_that_transformers_does_not_have():
    """Every name is a stock field of some supported version, and all of today's are."""
    stock = {f.name for f in dataclasses.fields(TrainingArguments)}
    assert set(WITHOUT_EFFECT) - stock <= {"optim_target_modules", "train_sampling_strategy", "auto_find_batch_size"}
    assert not set(WITHOUT_EFFECT) & set(RobustTrainingArguments.__annotations__)


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ({"optim": "sgd"}, "choose with --optimizer"),
        ({"lr_scheduler_type": "cosine"}, "the schedule is --warmup_epochs"),
        ({"warmup_steps": 100}, "write --warmup_epochs"),
        ({"eval_strategy": "epoch"}, "measured by --probe_every"),
        ({"save_only_model": True}, "cannot be resumed exactly"),
    ],
)
def test_stock_settings_without_effect_are_refused(values, advice):
    (name,) = values
    with pytest.raises(ValueError, match=f"^{name}=.* has no effect here: .*{advice}"):
        arguments(**values)


# ---------------------------------------------------------------------- sharing out and recomputing
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"fsdp": True},
            "fsdp=True is not supported.*write --shard_weights true, or launch with examples/accelerate/f",
        ),
        ({"deepspeed": {"stage": 1}}, "DeepSpeed is not supported.*write --shard_weights true"),
        ({"shard_weights": True, "fp16": True}, "does not go with fp16.*write --bf16 true"),
        ({"shard_weights": True, "torch_compile": True}, "shard_weights=True does not go with torch_compile=True"),
        ({"gradient_checkpointing": True, "torch_compile": True}, "gradient_checkpointing=True does not go with"),
    ],
)
def test_combinations_that_do_not_work_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        arguments(**values)


def test_recomputing_survives_a_copy_of_the_arguments():
    args = arguments(gradient_checkpointing=True)
    assert args.gradient_checkpointing is True and dataclasses.replace(args).gradient_checkpointing is True
    assert not getattr(args, "activation_checkpointing", False), "the stock trainer must not see it"
    assert arguments().gradient_checkpointing is False


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FSDP_VERSION", "1", "fsdp_version=1 is not supported, FSDP1 .*: set fsdp_version: 2 in the file"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params=true is not supported, every attack step"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "use the flag --gradient_checkpointing true instead"),
    ],
)
def test_settings_of_a_launch_that_are_not_followed_are_refused(name, value, message):
    check_fsdp_settings({"FSDP_VERSION": "2"})
    with pytest.raises(ValueError, match=message):
        check_fsdp_settings({"FSDP_VERSION": "2", name: value})


def test_a_launch_in_fp16_does_not_share_weights_out(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="does not go with fp16.*write --bf16 true"):
        arguments(shard_weights=True)


def test_a_launch_with_deepspeed_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="DeepSpeed is not supported.*examples/accelerate/fsdp2.yaml"):
        arguments()


def test_the_access_token_is_in_no_pickle_and_no_text():
    args = arguments(push_to_hub=True, hub_model_id="user/name", hub_token="my-secret")
    assert args.hub_token == "my-secret" and dataclasses.replace(args).hub_token == "my-secret"
    assert pickle.loads(pickle.dumps(args)).hub_token is None
    assert "my-secret" not in f"{args} {args!r} {args.to_json_string()}"


# ---------------------------------------------------------------------- batches
@pytest.mark.parametrize(
    ("images", "values", "expected"),
    [
        (50_000, {}, 98),  # CIFAR-10 at 512, short last batch kept
        (49_500, {}, 97),
        (50_000, {"dataloader_drop_last": True}, 97),
        (50_000, {"gradient_accumulation_steps": 4}, 25),
        (512, {}, 1),
        (100, {"dataloader_drop_last": True}, 1),  # never 0: the schedule divides by it
        (24, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 3),
    ],
)
def test_steps_per_epoch(images, values, expected):
    assert arguments(**values).steps_per_epoch(images) == expected


def test_steps_per_epoch_share_the_images_between_processes(four_processes):
    assert arguments(per_device_train_batch_size=128).steps_per_epoch(50_000) == 98
    assert arguments(per_device_train_batch_size=128, dataloader_drop_last=True).steps_per_epoch(50_000) == 97


def test_a_batch_larger_than_the_data_is_refused_with_the_largest_possible_one():
    args = arguments(per_device_train_batch_size=32)
    args.check_batch(32)
    with pytest.raises(ValueError) as error:
        args.check_batch(31)
    assert str(error.value) == (
        "the batch of 32 images (32 on each of 1 processes) is larger than the data set, which has 31: "
        "set --per_device_train_batch_size to at most 31"
    )


def test_the_batch_of_all_processes_counts(four_processes):
    args = arguments(per_device_train_batch_size=8)
    args.check_batch(32)
    with pytest.raises(ValueError, match=r"batch of 32 images \(8 on each of 4 processes\) .* has 31: set .* most 7$"):
        args.check_batch(31)
    with pytest.raises(ValueError, match="at most 7$"):
        args.check_batch(28)


def test_an_image_needs_others_to_be_contrasted_with():
    arguments(per_device_train_batch_size=2).check_batch(2)
    with pytest.raises(
        ValueError, match="per_device_train_batch_size must be 2 or more, got 1: norm layers and contrastive losses"
    ):
        arguments(per_device_train_batch_size=1).check_batch(100)


def test_one_process_drives_one_gpu(monkeypatch):
    monkeypatch.setattr(RobustTrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="one process sees 2 GPUs.*start with `accelerate launch --multi_gpu`"):
        arguments().check_batch(1000)


def test_a_missing_logger_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package trackio: pip install trackio"):
        arguments(report_to="trackio")


@pytest.mark.parametrize("milestones", [[30, 20], [0, 10], [-1], [10, 10]])
def test_milestones_rise(tmp_path, milestones):
    with pytest.raises(ValueError, match="lr_milestones must be rising positive epochs such as 30 60, got"):
        RobustTrainingArguments(output_dir=str(tmp_path), report_to="none", lr_milestones=milestones)


@pytest.mark.parametrize("accelerator", [True, False])
def test_batches_are_copied_to_an_accelerator_without_waiting(monkeypatch, accelerator):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: accelerator)
    args = arguments()
    assert args.accelerator_config.non_blocking is args.dataloader_pin_memory is accelerator
