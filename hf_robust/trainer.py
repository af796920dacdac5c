"""The one trainer: `transformers.Trainer` with an objective, an attack and the published bookkeeping."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME, rotate_checkpoints
from transformers.trainer_utils import TrainOutput

from hf_robust import checkpoints
from hf_robust.attacks import PGD, frozen
from hf_robust.callbacks import MethodCallback, average_buffers, share_from_first, update_ema
from hf_robust.coresets import CoresetMethod, FullData
from hf_robust.coresets.phases import CoresetPhases, seeded_generator
from hf_robust.coresets.sampler import CoresetSampler
from hf_robust.data import ImageDataset, collate_images
from hf_robust.hub_callback import HubTrainer
from hf_robust.loss_record import LossRecord, finite, logged_seconds
from hf_robust.model_fit import check_fit
from hf_robust.models.norm import synchronize_norms
from hf_robust.objectives import Objective, StepContext
from hf_robust.optim import make_optimizer, paper_schedule
from hf_robust.sharding import ShardedTraining
from hf_robust.teachers import build_teacher, restore_teacher, save_teacher
from hf_robust.training_args import RobustTrainingArguments
from hf_robust.training_attack import TrainingAttack

__all__ = ["RobustTrainer"]

logger = logging.getLogger(__name__)


class RobustTrainer(HubTrainer, ShardedTraining):
    """Trainer for methods that are objectives: named loss terms, one attack, exact resume.

    Every random number of a step (views, attack starts) comes from a generator seeded by (seed, step, micro-step,
    rank), so that a resumed run repeats an uninterrupted one bit by bit, whatever happened in between.

    Args:
        model (`PreTrainedModel`): what trains.
        args ([`RobustTrainingArguments`]): training knobs.
        objective ([`Objective`]): the method.
        attack ([`PGD`], *optional*): the training attack; default: the published one.
        train_dataset ([`ImageDataset`]): uint8 images.
        coreset ([`CoresetMethod`], *optional*): which of them each epoch shows; default: all.
        teacher (`str`, `Path` or `nn.Module`, *optional*): frozen teacher, see `teachers.load_teacher`.
        kwargs: passed on to `transformers.Trainer`.

    Raises:
        ValueError: if objective and model disagree on norm branches, labels are missing, or the batch is larger than
            the data set or the coreset.
    """

    # narrower than the stock annotations, which allow any model and data set
    args: RobustTrainingArguments
    model: Any
    train_dataset: Any
    eval_dataset: Any
    optimizer: Any
    lr_scheduler: Any
    objective: Objective

    loss_is_scaled_for_ga = False  # every micro-batch is a mean of its own; the stock code then divides

    def __init__(
        self,
        model: Any,
        args: RobustTrainingArguments,
        objective: Objective,
        attack: PGD | None = None,
        train_dataset: ImageDataset | None = None,
        coreset: CoresetMethod | None = None,
        teacher: Any = None,
        **kwargs: Any,
    ) -> None:
        check_fit(objective, model, train_dataset)
        self.check_sharding(args)
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        if args.world_size > 1:
            # Otherwise the last batch repeats images on some rank: false negatives of a contrastive loss.
            args.dataloader_drop_last = True
        if args.cpu_threads:
            torch.set_num_threads(args.cpu_threads)
        if args.sync_norm:
            synchronize_norms(model)
        if args.channels_last:
            model.to(memory_format=torch.channels_last)
        if train_dataset is not None:
            args.check_batch(len(train_dataset))
            coreset = coreset if coreset is not None else FullData()
            coreset.check(objective, model, train_dataset)
            self.phases = CoresetPhases(
                *(coreset, train_dataset, args.per_device_train_batch_size * args.world_size),
                args.data_seed if args.data_seed is not None else args.seed,
                args.num_train_epochs if args.max_steps <= 0 else 0.0,
                whole_batches=args.dataloader_drop_last,
            )
            if self.phases.rounds.length % args.per_device_train_batch_size == 1:
                # Norms cannot be computed on one image, and a contrastive loss has nothing to contrast it with.
                args.dataloader_drop_last = True
            self._steps_per_round = args.steps_per_epoch(self.phases.rounds.length)
            self._asked_length = (args.num_train_epochs, args.max_steps)
            self._max_steps = self.phases.steps(*self._asked_length, self._steps_per_round)
        super().__init__(model=model, args=args, train_dataset=train_dataset, data_collator=collate_images, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.objective = objective
        self.attack = attack if attack is not None else objective.training_attack
        self.training_attack = TrainingAttack(
            self.accelerator,
            eval_mode=objective.attack_in_eval_mode,
            fold_norms=args.fold_norms,
            compile_options=args.compile_options,
        )
        self.teacher = build_teacher(objective, self.model, teacher, self.args.device)
        self._started, self._earlier_seconds = time.monotonic(), 0.0
        self._strength, self._micro_step = 1.0, (-1, 0)
        self._record = LossRecord(self.args.device)
        self.add_callback(MethodCallback(self))

    @property
    def progress(self) -> float:
        """Training progress in [0, 1], the only clock of objectives."""
        length = self._epoch_at(self.state.max_steps) if self.state.max_steps > 0 else 0.0
        return min(1.0, self.epoch / length) if length else 0.0

    @property
    def epoch(self) -> float:
        """Epochs trained so far as the published schedules count them: one on a coreset counts like one on all."""
        return self._epoch_at(self.state.global_step)

    def _epoch_at(self, step: int) -> float:
        return self.phases.rounds.epoch(step / self._steps_per_round)

    def prepare_batch(self, inputs: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Turn a collated batch into what the objective reads; subclasses make views."""
        return inputs

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Make views, attack them and sum the objective's terms (see `Trainer.compute_loss`)."""
        generator = self._step_generator()
        self._strength = self.objective.strength(self.progress)
        with torch.no_grad():
            batch = self.prepare_batch(inputs, generator)
        terms = self.objective(model, batch, self.step_context(generator, inputs.get("index")))
        loss = torch.stack(list(terms.values())).sum()
        self._record.add(terms, loss)
        return (loss, terms) if return_outputs else loss

    def step_context(self, generator: torch.Generator, index: Tensor | None = None) -> StepContext:
        """What the objective gets beside model and batch; `index`: positions of the images in the data set."""
        kept: Any = self.state.stateful_callbacks  # a dictionary that is saved with the state, as JSON
        memory = kept.setdefault("method_memory", {})
        attack = self.training_attack.bind(self.attack, self._networks(), generator, index)
        autocast, seen = self.accelerator.autocast, self.training_attack.seen
        return StepContext(attack, self.progress, self.teacher, autocast, memory=memory, seen=seen)

    def _step_generator(self) -> torch.Generator:
        step, micro = self._micro_step
        self._micro_step = (step, micro + 1) if step == self.state.global_step else (self.state.global_step, 0)
        step, micro = self._micro_step
        return seeded_generator(self.args.device, self.args.seed, step, micro, self.args.process_index)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        built = super()._build_accelerator_args(**kwargs)
        if "dynamo_plugin" in built:  # the short last batch gets a graph of its own, rather than all a slower one
            built["dynamo_plugin"].dynamic = False
        return built

    def _get_train_sampler(self, train_dataset: Any = None) -> CoresetSampler:
        return self.phases.sampler

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build the optimiser over all trainable tensors; see `optim.make_optimizer`."""
        if self.optimizer is None:
            args = self.args
            self.optimizer = make_optimizer(
                args.optimizer,
                [p for p in (model or self.model).parameters() if p.requires_grad],
                lr=args.learning_rate,
                momentum=args.momentum,
                weight_decay=args.weight_decay,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                nesterov=args.nesterov,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Build the schedule; see `optim.paper_schedule`."""
        if self.lr_scheduler is None:
            args, epochs = self.args, self._epoch_at(num_training_steps)
            multiplier = paper_schedule(
                self._epoch_at,
                epochs,
                base_lr=args.learning_rate,
                warmup_epochs=args.warmup_epochs,
                min_lr=args.min_learning_rate,
                granularity=args.lr_granularity,
                milestones=args.lr_milestones or (),
            )
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, multiplier)
        return self.lr_scheduler

    def start_epoch(self, round: int) -> None:
        """Tell the sampler its round (Accelerate's own call gets lost after a resume) and choose a coreset if due."""
        self.phases.sampler.set_epoch(round)
        if self.phases.due(round):
            self._select_coreset(round)

    def _select_coreset(self, round: int) -> None:
        self._strength = self.objective.strength(self.progress)
        module = self.gather_network(self.args.device)
        task = self.phases.task(
            round,
            model=module,
            objective=self.objective,
            views=self.prepare_batch,
            originals=self.originals,
            attack=self.attack,
            autocast=self.accelerator.autocast,
            progress=self.progress,
            device=self.args.device,
            workers=self.args.dataloader_num_workers,
            show_progress=not self.args.disable_tqdm and self.is_world_process_zero(),
        )
        with frozen(module), torch.no_grad():
            logs = self.phases.select(round, task)
        if logs:
            if self.args.should_save:
                self.phases.write(str(self.args.output_dir))
            self._record.share(self.accelerator)
            self.log(logs)

    def originals(self, images: Tensor) -> Tensor:
        """Turn uint8 images into floats in [0, 1], un-augmented; subclasses resize to their views."""
        return images.float() / 255

    def before_step(self) -> None:
        """Move the momentum encoder, before the optimiser step as released."""
        if self.objective.teacher_kind == "ema":
            student = self.accelerator.unwrap_model(self.model)
            update_ema(self.teacher, student, self.objective.ema_decay)  # type: ignore[attr-defined]

    def after_step(self) -> None:
        """Share norm statistics between processes, unless they stand still: a mean of equals may round."""
        for network in self._networks() if self.objective.trains == "all" else ():
            average_buffers(network)

    def close_round(self, rounds: float) -> bool:
        """Close a round, the last one maybe unfinished; tell whether it is a time for a checkpoint per epoch."""
        before, now, keep = self.phases.close(rounds)
        self.gather_network()  # by all processes, for whatever the first one does with it alone
        self.end_epoch(before, now)
        return keep or self.state.global_step >= self.state.max_steps

    def end_epoch(self, before: float, epoch: float) -> None:
        """Nothing here; subclasses probe."""

    @property
    def training_seconds(self) -> float:
        """Logged wall time of the training, earlier sessions of a resumed run included."""
        return logged_seconds(self.state.log_history)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of every loss term since the last entry, over all processes, and stop on NaN."""
        logs["seconds"] = self._earlier_seconds + time.monotonic() - self._started
        if self.phases.method.chooses:
            logs["paper_epoch"] = self.epoch
        if "loss" in logs and self._record:
            drawn = {"strength": self._strength} if "view_1" in self.objective.views else {}  # others have none
            logs.update(self._record.close(self.accelerator) | drawn)
        super().log(logs, start_time)
        self._stop_if_broken()

    @property
    def selection_seconds(self) -> float:
        """Wall time of all coreset selections, part of `training_seconds`."""
        return sum(entry.get("coreset_seconds", 0.0) for entry in self.state.log_history)

    def _stop_if_broken(self) -> None:
        if not bool(self._record.broken):
            return
        last = checkpoints.latest_complete(str(self.args.output_dir))
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been written yet"
        raise FloatingPointError(
            f"the loss became NaN or infinite by step {self.state.global_step}; {kept}. Lower --learning_rate, "
            "lengthen --warmup_epochs, or train in fp32 or bf16 instead of fp16"
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or resume from `True` (the newest complete checkpoint) or a path; see `Trainer.train`."""
        resume_from_checkpoint = checkpoints.to_resume(str(self.args.output_dir), resume_from_checkpoint)
        self._started, self._earlier_seconds = time.monotonic(), 0.0
        self._record, self._micro_step = LossRecord(self.args.device), (-1, 0)
        self.training_attack.restart(self.attack, len(self.train_dataset))
        self.phases.restart(None if resume_from_checkpoint or not self.args.should_save else self.args.output_dir)
        if resume_from_checkpoint:
            checkpoints.check_run(resume_from_checkpoint, self.describe_run())
            state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
            self._earlier_seconds = logged_seconds(state.log_history)
            if 0 < self._max_steps <= state.global_step:
                # The stock loop looks at max_steps after a step only: it would add one to a finished run.
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = state
                return TrainOutput(state.global_step, 0.0, {})
        if self.teacher is not None:
            share_from_first(self.teacher)  # the wrapper shares rank 0's weights of the model, but knows no teacher
        set_seed(self.args.seed, device_specific=True)  # one seed on all ranks would give all ranks the same dropout
        self.args.max_steps = self._max_steps
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.args.max_steps = self._asked_length[1]

    def describe_run(self) -> dict[str, str]:
        """Describe what a checkpoint must agree with to be resumed exactly."""
        return checkpoints.describe_run(self)

    def stop_if_not_finite(self) -> None:
        """Raise `FloatingPointError` when a loss, a weight or a running statistic of this process is not finite."""
        self._record.broken |= ~finite(self._networks())
        self._stop_if_broken()

    def _networks(self) -> list[nn.Module]:
        """Those that move: a frozen teacher has no mode, gradient or statistic to look after."""
        moving = [self.teacher] if self.objective.teacher_kind == "ema" else []
        return [self.accelerator.unwrap_model(self.model), *moving]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._record.broken |= ~finite(self._networks())
        self._record.share(self.accelerator)
        self._stop_if_broken()
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            checkpoints.open_for_writing(folder)
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # old ones go once this one is complete
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                save_teacher(self.teacher, folder)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.save_beside(folder)
                checkpoints.write_run(folder, self.describe_run())
                checkpoints.write_manifest(folder)
        except Exception as error:
            if not checkpoints.is_write_error(error):
                raise
            raise checkpoints.discard(folder, error) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(output_dir=str(folder.parent), save_total_limit=limit, use_mtime=True)

    def save_beside(self, checkpoint: Path) -> None:
        """Add to a checkpoint what a resume needs beyond weights, optimiser and schedule."""
        self.phases.save(checkpoint)
        self.training_attack.save(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        restore_teacher(self.teacher, resume_from_checkpoint)
        self.phases.load(resume_from_checkpoint)
        self.training_attack.load(Path(resume_from_checkpoint))

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: a self-supervised loss on held-out images says nothing about robustness."""
        raise NotImplementedError("there is no evaluation loss: measure accuracy with trainer.probe()")

    predict = evaluate

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: the stock estimate counts tokens and would put an invented number into the log."""
        return 0
