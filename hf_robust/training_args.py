"""Training arguments: the Hugging Face defaults that would change the method are set here, each with its reason."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from hf_robust.hub_folders import check_repo_id

__all__ = ["WITHOUT_EFFECT", "RobustTrainingArguments", "check_fsdp_settings"]


# Settings of the stock trainer that this one does not read, or that the attack would bypass, and what to do instead.
WITHOUT_EFFECT = {
    "optim": "choose with --optimizer (lars, sgd, adamw)",
    "lr_scheduler_type": "the schedule is --warmup_epochs, --min_learning_rate and --lr_granularity",
    "lr_scheduler_kwargs": "the schedule is --warmup_epochs, --min_learning_rate and --lr_granularity",
    "warmup_steps": "write --warmup_epochs, which may be a fraction",
    "eval_strategy": "accuracy during training is measured by --probe_every",
    "load_best_model_at_end": "there is no best step; keep checkpoints with --save_total_limit",
    "eval_on_start": "accuracy during training is measured by --probe_every",
    "save_only_model": "a checkpoint without optimiser state cannot be resumed exactly",
    "ignore_data_skip": "a resumed run would see other images than an uninterrupted one",
    "auto_find_batch_size": "the batch decides the negatives and the schedule; set it yourself",
    "label_smoothing_factor": "no label enters the loss",
    "neftune_noise_alpha": "it is for text embeddings",
    "gradient_checkpointing_kwargs": "--gradient_checkpointing true has no options here",
    "activation_checkpointing_kwargs": "--gradient_checkpointing true has no options here",
    "optim_args": "choose with --optimizer (lars, sgd, adamw)",
    "optim_target_modules": "every tensor is optimised",
    "train_sampling_strategy": "images are shuffled by CoresetSampler",
}


_LAUNCHED_SHARDED = "HF_ROBUST_SHARD_WEIGHTS"  # set below, for every later object of the process


def check_fsdp_settings(settings: Mapping[str, str]) -> None:
    """Refuse settings of a launch with FSDP that this library does not follow.

    Args:
        settings (`Mapping[str, str]`): environment variables as `accelerate launch` sets them.

    Raises:
        ValueError: naming the setting, its value and the way out.
    """
    rules = {
        "FSDP_VERSION": ("2", "1", "FSDP1 cannot hand the weights to an attack"),
        "FSDP_OFFLOAD_PARAMS": ("false", "false", "every attack step would move all weights"),
        "FSDP_ACTIVATION_CHECKPOINTING": (
            "false",
            "false",
            "norm statistics would move twice: use the flag --gradient_checkpointing true instead",
        ),
    }
    for name, (wanted, default, reason) in rules.items():
        value = settings.get(name, default).lower()
        if value != wanted:
            raise ValueError(
                f"{name.lower()}={value} is not supported, {reason}: set {name.lower()}: {wanted} in the file of "
                "accelerate launch, see examples/accelerate/fsdp2.yaml"
            )


@dataclass(repr=False)  # the stock one hides the access token
class RobustTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the published recipe of adversarial contrastive learning.

    Changed defaults, because the stock ones would train another method: no gradient clipping (stock: 1.0), LARS on
    all tensors (stock: AdamW), warm-up and cosine in fractional epochs with an absolute floor (stock: linear to 0),
    all dataset columns kept, NaN losses visible in the log, no unused-parameter search and no buffer broadcast under
    distributed training (the trainer averages norm statistics itself, after every step).

    With gradient accumulation the mean of the micro-batch losses is optimised; negatives stay inside a micro-batch,
    so that accumulating is *not* the same as a larger contrastive batch.

    Source: the published runs: batch 512, LARS 5.0, momentum 0.9, weight decay 1e-6, warm-up 10 of 1000
        epochs (released ACL, AIR, RCS and DynACL code).
    """

    # what subclasses say instead
    other_advice: ClassVar[dict[str, str]] = {}

    output_dir: None | str = field(
        default="outputs/pretrain", metadata={"help": "Folder for everything the run leaves."}
    )
    num_train_epochs: float = field(default=1000.0, metadata={"help": "Epochs; published: 1000."})
    per_device_train_batch_size: int = field(
        default=512, metadata={"help": "Images per process and step (2 views each); published: 512 on one device."}
    )
    learning_rate: float = field(default=5.0, metadata={"help": "Peak learning rate; published: 5.0 with LARS."})
    weight_decay: float = field(default=1e-6, metadata={"help": "Weight decay on every tensor; published: 1e-6."})
    optimizer: Literal["lars", "sgd", "adamw"] = field(
        default="lars", metadata={"help": "lars (published), sgd or adamw (for transformers)."}
    )
    momentum: float = field(default=0.9, metadata={"help": "Momentum of lars and sgd; published: 0.9."})
    nesterov: bool = field(default=True, metadata={"help": "Nesterov momentum of sgd; published: true."})
    warmup_epochs: float = field(default=10.0, metadata={"help": "Linear warm-up, in epochs; published: 10."})
    min_learning_rate: float = field(
        default=1e-6, metadata={"help": "Floor of the cosine; published: 1e-6, absolute."}
    )
    lr_granularity: Literal["step", "epoch"] = field(
        default="step", metadata={"help": "Change the rate every step (ACL, AIR, RCS) or epoch (official DynACL)."}
    )
    lr_milestones: list[float] | None = field(
        default=None, metadata={"help": "Epochs after which the rate falls to a tenth, instead of warm-up and cosine."}
    )
    channels_last: bool = field(
        default=False, metadata={"help": "Keep images and weights in channels-last memory order; same mathematics."}
    )
    fold_norms: bool = field(
        default=True,
        metadata={"help": "Attack a copy whose norm layers are part of its convolutions; same mathematics, faster."},
    )
    cpu_threads: None | int = field(
        default=None,
        metadata={"help": "Threads of a process on a CPU; unset: torch's choice, which is 1 under accelerate launch."},
    )
    sync_norm: bool = field(
        default=False,
        metadata={"help": "Several processes: norm statistics of the whole batch, as one process would have them."},
    )
    shard_weights: bool = field(
        default=False,
        metadata={"help": "Several processes: each keeps a part of every weight and optimiser state (FSDP2)."},
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "Compute activations of the backbone twice rather than keep them; same gradients."},
    )
    probe_every: float = field(
        default=0.0, metadata={"help": "Epochs between linear probes (standard and PGD-20 accuracy); 0: never."}
    )
    probe_examples: int = field(
        default=1000, metadata={"help": "Training images that the probe during training is fitted on; at most."}
    )
    probe_eval_examples: int = field(
        default=200, metadata={"help": "Images that the probe during training attacks; at most."}
    )
    max_grad_norm: float = field(
        default=0.0, metadata={"help": "Clip gradients to this norm; 0, as published: never."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false: views need images."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "False: a NaN loss is seen, not hidden."})
    ddp_find_unused_parameters: None | bool = field(
        default=False, metadata={"help": "Must stay false: all branches pass in one wrapped forward."}
    )
    ddp_broadcast_buffers: None | bool = field(
        default=False, metadata={"help": "Must stay false: the trainer averages norm statistics after every step."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between log entries (every loss term)."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first step, too, where a curve starts."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to write checkpoints: epoch, steps or no."})
    save_total_limit: None | int = field(default=2, metadata={"help": "Complete checkpoints to keep."})
    report_to: None | str | list[str] = field(
        default="tensorboard", metadata={"help": "Where logs go beside the output folder: tensorboard, trackio, none."}
    )

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True  # otherwise bf16 is refused on a machine that has only a CPU
            self.dataloader_pin_memory = False
        if str(self.resume_from_checkpoint).lower() in ("true", "false"):  # the text of a flag, not a path
            self.resume_from_checkpoint = str(self.resume_from_checkpoint).lower() == "true" or None  # type: ignore
        self._refuse_what_has_no_effect()
        self._read_launcher()
        checkpointing = self._take_checkpointing()
        if self.accelerator_config is None:  # or a GPU's host would wait at the copy of every batch
            self.accelerator_config = {"non_blocking": self.dataloader_pin_memory}
        super().__post_init__()
        self.gradient_checkpointing = checkpointing
        self._check_combinations()
        if self.push_to_hub:
            self._check_hub()
        for name in ("learning_rate", "momentum", "warmup_epochs", "min_learning_rate", "probe_every", "weight_decay"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not value >= 0:
                raise ValueError(f"{name} must be a number, 0 or more, got {value!r}")
        if self.optimizer not in ("lars", "sgd", "adamw"):
            raise ValueError(f"optimizer must be lars, sgd or adamw, got {self.optimizer!r}")
        milestones = self.lr_milestones or []
        if any(not 0 < m for m in milestones) or sorted(set(milestones)) != milestones:
            raise ValueError(f"lr_milestones must be rising positive epochs such as 30 60, got {milestones}")
        if "trackio" in (self.report_to or []) and importlib.util.find_spec("trackio") is None:
            raise ValueError('report_to="trackio" needs the package trackio: pip install trackio')
        if self.lr_granularity not in ("step", "epoch"):
            raise ValueError(f"lr_granularity must be step or epoch, got {self.lr_granularity!r}")
        must_stay_false = (self.remove_unused_columns, self.ddp_find_unused_parameters, self.ddp_broadcast_buffers)
        if any(value is not False for value in must_stay_false):  # None would let the stock trainer choose true
            raise ValueError(
                "remove_unused_columns, ddp_find_unused_parameters, ddp_broadcast_buffers must stay false: with any "
                "of them the training would fail or differ from the method; leave them unset"
            )

    def _take_checkpointing(self) -> bool:
        """The flag by its old or its new name; the stock trainer must not see it, since the model does it itself."""
        asked = bool(self.gradient_checkpointing or getattr(self, "activation_checkpointing", None))
        self.gradient_checkpointing = None  # type: ignore[assignment]
        if hasattr(self, "activation_checkpointing"):
            self.activation_checkpointing = None
        return asked

    def _read_launcher(self) -> None:
        """Take over what `accelerate launch` was told about sharing weights out: Accelerate must not do it as well."""
        self._refuse_other_sharding()
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            check_fsdp_settings(os.environ)
            os.environ.update(ACCELERATE_USE_FSDP="false", **{_LAUNCHED_SHARDED: "true"})
        self.shard_weights = self.shard_weights or os.environ.get(_LAUNCHED_SHARDED) == "true"

    def _refuse_other_sharding(self) -> None:
        if self.fsdp:
            raise ValueError(
                f"fsdp={self.fsdp!r} is not supported, since the attack's entries have to be known to FSDP: write "
                "--shard_weights true, or launch with examples/accelerate/fsdp2.yaml"
            )
        if self.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
            raise ValueError(
                "DeepSpeed is not supported: write --shard_weights true, or launch with examples/accelerate/fsdp2.yaml"
            )

    def _check_combinations(self) -> None:
        """Refuse what does not go together, each with its way out."""
        launched = getattr(self, "mixed_precision", "no")  # of the file of accelerate launch, where no flag says it
        if self.shard_weights and (self.fp16 or launched == "fp16"):
            raise ValueError(
                "shard_weights=True does not go with fp16 (the flag, or mixed_precision of the launch), whose loss "
                "scale would differ between processes: write --bf16 true"
            )
        for name in ("shard_weights", "gradient_checkpointing"):
            if getattr(self, name) and self.torch_compile:
                raise ValueError(
                    f"{name}=True does not go with torch_compile=True, which cannot look through it: leave one out"
                )

    @property
    def compile_options(self) -> dict[str, Any] | None:
        """Arguments of `torch.compile` for the training step and for the network that the attack sees; `None`: eager.

        `--torch_compile true` compiles both; `--torch_compile_mode reduce-overhead` captures CUDA graphs as well.
        """
        return {"backend": self.torch_compile_backend, "mode": self.torch_compile_mode} if self.torch_compile else None

    def _check_hub(self) -> None:
        """Find out now, not after hours, that nothing could be pushed."""
        if not self.hub_model_id:
            raise ValueError("push_to_hub needs the name of the repository: add --hub_model_id user/name")
        check_repo_id(self.hub_model_id)
        strategy = HubStrategy(self.hub_strategy)
        if strategy not in (HubStrategy.EVERY_SAVE, HubStrategy.END):
            raise ValueError(
                f"hub_strategy must be every_save or end, got {strategy.value!r}: checkpoints hold "
                "optimiser states and pickles, which are never published"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the access token: checkpoints pickle their arguments."""
        return {**self.__dict__, "hub_token": None}

    def _refuse_what_has_no_effect(self) -> None:
        """Stock settings that this trainer does not read, or that the attack would bypass: an error, not silence."""
        stock = {f.name: f.default for f in fields(TrainingArguments)}
        for name, advice in (WITHOUT_EFFECT | self.other_advice).items():
            if name in stock and getattr(self, name) not in (stock[name], None, False):
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect here: {advice}")

    def steps_per_epoch(self, images: int) -> int:
        """Count the optimiser steps of one epoch.

        Args:
            images (`int`): size of the training set.

        Returns:
            `int`: at least 1.
        """
        batch = self.per_device_train_batch_size * self.world_size
        batches = images // batch if self.dataloader_drop_last else math.ceil(images / batch)
        return max(1, math.ceil(batches / self.gradient_accumulation_steps))

    def check_batch(self, images: int) -> None:
        """Refuse a batch that the data set cannot fill.

        Args:
            images (`int`): size of the training set.

        Raises:
            ValueError: if the images of one step over all processes are more than `images`.
        """
        if self.n_gpu > 1:
            raise ValueError(
                f"one process sees {self.n_gpu} GPUs, and its threads would share one norm branch switch: start with "
                "`accelerate launch --multi_gpu`, or show it one GPU with CUDA_VISIBLE_DEVICES=0"
            )
        if self.per_device_train_batch_size < 2:
            raise ValueError(
                f"per_device_train_batch_size must be 2 or more, got {self.per_device_train_batch_size}: norm layers "
                "and contrastive losses need other images beside the first"
            )
        batch = self.per_device_train_batch_size * self.world_size
        if batch > images:
            raise ValueError(
                f"the batch of {batch} images ({self.per_device_train_batch_size} on each of {self.world_size} "
                f"processes) is larger than the data set, which has {images}: set --per_device_train_batch_size to at "
                f"most {max(1, images // self.world_size)}"
            )
