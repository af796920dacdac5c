"""The gloo processes of `tests/test_distributed.py`: training steps on a share of a fixed global batch, selections.

python tests/distributed_child.py WORLD PORT OUT CASE...

All processes of a world are forked from one, which has the imports behind it: they are most of a short run.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from coresets.selection_task import choose, make_task
from finetuning import tiny_arguments
from training import tiny_images, tiny_model, tiny_rcs, tiny_trainer

from hf_robust.attacks import PGD
from hf_robust.finetuner import RobustFinetuner
from hf_robust.frequencies import high_pass
from hf_robust.objectives import load_objective
from hf_robust.objectives.a_infonce import AInfoNCE
from hf_robust.objectives.acl import ACL
from hf_robust.objectives.advcl import AdvCL
from hf_robust.objectives.aff import AFF
from hf_robust.objectives.autolora import AutoLoRa
from hf_robust.objectives.dynacl import DynACL
from hf_robust.objectives.fare import FARE
from hf_robust.objectives.lora import LoRA
from hf_robust.objectives.rocl import RoCL
from hf_robust.pseudo_labels import PseudoLabels
from hf_robust.runs.console import leave_process_group

torch.set_num_threads(1)
IMAGES = 8
world, port, out, cases = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]
rank = 0  # set in each process of the world


@dataclasses.dataclass(frozen=True)
class FixedViews:
    """Views without randomness: the real ones are drawn per rank."""

    def __call__(self, images: torch.Tensor, names: Any, **_: Any) -> dict[str, torch.Tensor]:
        x = images.float() / 255
        made = {"view_1": x.flip(-1), "view_2": x.roll(1, -2), "original": x, "padded_crop": x.roll(1, -1)}
        return {name: made[name] if name in made else high_pass(made["padded_crop"], 2) for name in names}


fixed_views = FixedViews()


def step(case: str) -> dict[str, Any]:
    """Loss, gradients and buffers of one step."""
    name, _, mode = case.partition("-")
    chosen = {
        "dynacl-plain": DynACL(ema_decay=0.9),
        "advcl": AdvCL(clusters=[2, 3]),
        "fare": FARE(augmentation="padded_crop"),
        "ainfonce": AInfoNCE(RoCL(), "iphn", sigma_warmup=0.5),
    }
    objective = chosen.get(case) or chosen.get(name) or load_objective(name)()
    labels = {k: torch.arange(IMAGES) % k for k in objective.pseudo_classes}
    trainer = tiny_trainer(
        out,
        objective,
        # with a teacher, every rank starts from weights of its own: the trainer must make them one
        model=tiny_model(objective, seed=rank if name == "dynacl" else 0),
        data=tiny_images(IMAGES),
        per_device_train_batch_size=IMAGES // world,
        max_steps=1,
        warmup_epochs=0,
        sync_norm=mode in ("sync", "double"),
        pseudo_labels=PseudoLabels(labels) if labels else None,
    )
    assert trainer.args.world_size == world
    trainer.attack = PGD(steps=3, random_start=False)
    trainer.views = fixed_views  # type: ignore[assignment]
    if mode == "double":  # where rounding in norms of few values would hide what is to be seen
        trainer.model.double()
        trainer.teacher.double()
        trainer.views = lambda *args, **_: {n: x.double() for n, x in fixed_views(*args).items()}  # type: ignore
    if mode == "frozen":
        trainer.model.eval()
        trainer.model.train = lambda *_: trainer.model  # type: ignore[method-assign]
    found: dict[str, Any] = {}

    def keep_gradients() -> None:
        found["gradients"] = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}

    trainer.before_step = keep_gradients  # type: ignore[method-assign]
    trainer.train()
    found["loss"] = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    found["buffers"] = dict(trainer.model.named_buffers())
    found["teacher"] = trainer.teacher.state_dict() if trainer.teacher is not None else {}
    found["memory"] = dict(trainer.state.stateful_callbacks["method_memory"])
    return found


def plain_views(images: torch.Tensor, names: Any, **_: Any) -> dict[str, torch.Tensor]:
    """The same for fine-tuning."""
    return {name: images.float() / 255 for name in names}


def finetuning_step(case: str) -> dict[str, Any]:
    """Loss, gradients and buffers of one fine-tuning step, and what the held-out images said."""
    _, method, mode = case.split("-")
    objective = {"aff": AFF(), "autolora": AutoLoRa(rank=2), "lora": LoRA(rank=2)}[method]
    args = tiny_arguments(
        f"{out}-{case}",
        per_device_train_batch_size=IMAGES // world,
        max_steps=1,
        sync_norm=mode == "sync",
        keep="last",
    )
    attack, held_out = PGD(steps=3, random_start=False), tiny_images(9, seed=1)
    trainer = RobustFinetuner(tiny_model(objective), args, objective, attack, tiny_images(IMAGES), held_out)
    with torch.no_grad():
        trainer.model.classifier.weight.normal_(generator=torch.Generator().manual_seed(5))
    assert trainer.args.world_size == world
    size, views = trainer.views.size, plain_views
    views.size = size  # type: ignore[attr-defined]
    trainer.views = views  # type: ignore[assignment]
    if mode == "frozen":
        trainer.model.eval()
        trainer.model.train = lambda *_: trainer.model  # type: ignore[method-assign]
    found: dict[str, Any] = {}

    def keep_gradients() -> None:
        found["gradients"] = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}

    trainer.before_step = keep_gradients  # type: ignore[method-assign]
    trainer.train()
    log = trainer.state.log_history
    found["loss"] = next(entry["loss"] for entry in log if "loss" in entry)
    found["buffers"] = dict(trainer.model.named_buffers())
    found["measured"] = [v for entry in log for k, v in sorted(entry.items()) if k.endswith("_accuracy")]
    return found


def coresets(case: str) -> dict[str, Any]:
    """Every coreset of a short run, in the order of the selections, with its gains."""
    candidates = case.split("-")[1]
    objective = ACL()
    trainer = tiny_trainer(
        f"{out}-{world}-{case}",
        objective,
        model=tiny_model(objective),
        data=tiny_images(43),
        coreset=tiny_rcs(
            fraction=0.42,  # 16 of 38 images: two batches, which two processes do not round
            warmup_epochs=0,
            candidates=candidates,
            chunk_size=1 if candidates == "batch" else 3,
        ),
        shard_weights=case.endswith("sharded"),
        per_device_train_batch_size=IMAGES // world,
        num_train_epochs=1 if case.endswith("sharded") else 3,
    )
    found: list[Any] = []
    select = trainer._select_coreset

    def note(round: int) -> None:
        select(round)
        assert trainer.phases.current is not None
        found.append((trainer.phases.current.indices, trainer.phases.current.gains))

    trainer._select_coreset = note  # type: ignore[method-assign]
    trainer.train()
    return {"coresets": found, "pool": trainer.phases.pool.tolist(), "weights": trainer.model.state_dict()}


def sharded(case: str) -> dict[str, Any]:
    """Two steps, of case "shard" with weights shared out: what they leave and what follows a checkpoint."""
    objective = {"lars": ACL(), "adamw": DynACL(ema_decay=0.9)}[optimizer := case.split("-")[1]]
    found: dict[str, Any] = {"gradients": [], "held": set()}

    def trainer(folder: str) -> Any:
        made = tiny_trainer(
            folder,
            objective,
            model=tiny_model(objective, seed=rank),  # of the first process alone, as DDP would have it
            data=tiny_images(IMAGES),
            per_device_train_batch_size=IMAGES // world,
            max_steps=2,
            warmup_epochs=0,
            learning_rate=0.5 if optimizer == "lars" else 1e-3,
            max_grad_norm=0 if optimizer == "lars" else 1.0,
            optimizer=optimizer,
            sync_norm=True,
            gradient_checkpointing=optimizer == "lars",
            shard_weights=case.startswith("shard"),
            save_strategy="steps",
            save_steps=1,
            probe_every=1,
        )
        made.attack, made.views = PGD(steps=3, random_start=False), fixed_views
        return made

    def watch() -> None:
        found["held"].add(sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in first.model.parameters()))
        gradients = {n: p.grad for n, p in first.model.named_parameters()}
        found["gradients"].append({n: getattr(g, "full_tensor", g.clone)() for n, g in gradients.items()})

    folder = f"{out}-{world}-{case}"
    first = trainer(folder)
    first.before_step, before = lambda: (watch(), before()), first.before_step  # type: ignore[method-assign]
    first.train()
    again = trainer(folder)
    again.train(resume_from_checkpoint=f"{folder}/checkpoint-1")
    for name, made in (("weights", first), ("resumed", again)):
        found[name] = {n: v.clone() for n, v in made.model.state_dict().items()}
        found[f"{name}_teacher"] = made.teacher.state_dict() if made.teacher is not None else {}
    log = first.state.log_history
    found["losses"] = [entry["loss"] for entry in log if "loss" in entry]
    found["probes"] = [entry["probe_standard_accuracy"] for entry in log if "probe_standard_accuracy" in entry]
    if rank == 0:
        first.save_encoder(f"{folder}/encoder")
    return found


def selection_in_float64(case: str) -> dict[str, Any]:
    """Picks and gains of one selection, everything in float64."""
    PartialState(cpu=True)
    task = make_task(ACL())
    draw, originals = task.views, task.originals
    task = dataclasses.replace(
        task,
        model=task.model.double(),
        views=lambda inputs, generator: {n: v.double() for n, v in draw(inputs, generator).items()},
        originals=lambda images: originals(images).double(),
    )
    found = choose(tiny_rcs(candidates=case.split("-")[1], chunk_size=3), task)
    return {"picks": found.indices.tolist(), "gains": found.gains}


def work(found_by: dict[str, Callable[[str], Any]]) -> None:
    """The cases of one process."""
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.save({c: found_by.get(c.split("-")[0], step)(c) for c in cases}, f"{out}-{rank}.pt")
    leave_process_group()


if __name__ == "__main__":
    kinds = {"rcs": coresets, "rcs64": selection_in_float64, "finetune": finetuning_step}
    kinds |= {"shard": sharded, "whole": sharded}
    children = []
    for number in range(world):
        children.append(os.fork())
        if children[-1] == 0:
            rank = number
            work(kinds)
            sys.exit(0)
    sys.exit(max(os.waitpid(child, 0)[1] for child in children) != 0)
