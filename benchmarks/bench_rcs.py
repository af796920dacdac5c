"""RCS: time of a selection over a full-data training epoch of the same network, overlap of what is chosen, memory.

The epoch is one of a real training on all images, without its first step; every selection starts from the network it
leaves. Modes: exact; exact
with other random starts of the attacks on the same views (the noise of the method); exact with everything drawn anew;
validation images attacked once; cheap: attacked once, and candidates scored with one attack step; single images as
candidates, and the same with everything drawn anew. The overlap is that with the first selection of the same kind of
candidate. Times are processor seconds, so that
other processes on the machine matter less; on a GPU, wall seconds. Memory is the growth of the peak of the process
during the first selection, beyond the peak of the training steps before, on a CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.setting import network
from hf_robust.attacks import PGD, frozen
from hf_robust.coresets import RCS, CoresetMethod, FullData, SelectionTask
from hf_robust.coresets.head import Head
from hf_robust.data import ImageDataset, load_image_dataset
from hf_robust.models.folded import CACHE_PIXELS
from hf_robust.models.modeling import RobustModelForPreTraining, RobustPretrainingConfig
from hf_robust.objectives.acl import ACL
from hf_robust.pretrainer import RobustPretrainer
from hf_robust.training_args import RobustTrainingArguments

FRACTION = 0.1
SHORT = ("rcs/exact", "rcs/exact, other attack starts", "rcs/cheap")


def own_defaults(options: argparse.Namespace) -> argparse.Namespace:
    """The thin network and the batch of the coreset study, where nothing else was asked for."""
    own = argparse.Namespace(**vars(options))
    if not own.backbone and getattr(own, "model", None):
        own.backbone, own.model_args, _ = network(own)
    if not own.backbone:
        own.backbone, own.model_args = "resnet10_cifar", {"channels": [16, 32, 64, 128], "stem_stride": 2}
    own.batch_size = own.batch_size or 256
    return own


def clock() -> float:
    """Processor seconds of this process; wall seconds on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.monotonic()
    return time.process_time()


def peak_bytes() -> int:
    """Highest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def images(options: argparse.Namespace) -> ImageDataset:
    """Real ones when asked for, else random pixels."""
    if options.dataset_name:
        return load_image_dataset(options.dataset_name, max_examples=options.images, image_size=32)
    pixels = torch.randint(0, 256, (options.images, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    return ImageDataset.from_tensors(pixels.to(torch.uint8))


def documented_bytes(trainer: RobustPretrainer, options: argparse.Namespace) -> dict[str, int]:
    """What the documentation of `RCS` says a selection needs beside the training, part by part."""
    model, images = trainer.model, trainer.train_dataset.images
    activations: list[int] = []
    hooks = [
        module.register_forward_hook(lambda module, args, output: activations.append(output.nbytes))
        for module in model.backbone.modules()
        if not list(module.children())
    ]
    with frozen(model), torch.no_grad():
        model.features(torch.zeros(1, *images.shape[1:]), model.switch.branches[0])
    for hook in hooks:
        hook.remove()
    candidates = -(-len(trainer.phases.pool) // options.batch_size)
    together = min(2 * options.batch_size, CACHE_PIXELS // images[0, 0].numel())
    return {
        "gradients": candidates * Head(model).length * 4,
        "folded_backbones": len(model.switch.branches) * sum(p.nbytes for p in model.backbone.parameters()),
        "validation_images": len(trainer.phases.validation) * images[0].nbytes,
        "float32_pass": together * sum(activations) if options.bf16 else 0,
    }


class Watch(TrainerCallback):
    """Time from the end of the first step, which also builds and allocates, to the end of the training."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start after the first step; go on after every other one."""
        if state.global_step == 1:
            self.started = clock()
        self.seconds = clock() - self.started


def trained(options: argparse.Namespace, method: RCS) -> tuple[RobustPretrainer, float]:
    """A trainer that is about to choose, its network trained for an epoch on all images, and the seconds of that."""
    objective = ACL()
    torch.manual_seed(0)
    config = RobustPretrainingConfig(
        architecture=options.backbone, model_args=options.model_args, norm_branches=objective.norm_branches
    )
    model, dataset, watch = RobustModelForPreTraining(config), images(options), Watch()

    def trainer(coreset: CoresetMethod, epochs: int) -> RobustPretrainer:
        """The same training but for the coreset."""
        args = RobustTrainingArguments(
            output_dir=tempfile.mkdtemp(),
            num_train_epochs=epochs,
            per_device_train_batch_size=options.batch_size,
            learning_rate=2.5,
            warmup_epochs=0.2,
            bf16=options.bf16,
            channels_last=True,
            save_strategy="no",
            report_to="none",
            logging_steps=10**6,
            disable_tqdm=True,
        )
        return RobustPretrainer(model, args, objective, PGD(), train_dataset=dataset, coreset=coreset)

    full = trainer(FullData(), 1)
    full.add_callback(watch)
    full.train()
    return trainer(method, 2), watch.seconds * len(dataset) / (len(dataset) - options.batch_size)


def selection(
    trainer: RobustPretrainer, method: RCS, generator: Callable[[str], str] = lambda purpose: purpose, round: int = 0
) -> tuple[set[int], float]:
    """What a mode chooses from the present network, and its seconds; `generator` renames sources of randomness."""
    found: dict[str, SelectionTask] = {}

    def keep(number: int, task: SelectionTask) -> dict[str, float]:
        found["task"] = task
        return {}

    trainer.phases.select, original = keep, trainer.phases.select  # type: ignore[method-assign]
    trainer._select_coreset(round)
    trainer.phases.select = original  # type: ignore[method-assign]
    task = found["task"]
    task = dataclasses.replace(task, generator=lambda purpose: found["task"].generator(generator(purpose)))
    with frozen(trainer.model), torch.no_grad():
        started = clock()
        chosen = method.select(task).indices.tolist()
        return set(chosen), clock() - started


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One training epoch, then selections from the network it leaves."""
    options = own_defaults(options)
    exact = RCS(fraction=FRACTION, warmup_epochs=1, interval=1, validation_fraction=0.01)
    cheap = dataclasses.replace(exact, attack_steps=1, reattack=False)
    trainer, epoch = trained(options, exact)
    before = peak_bytes()
    reference, seconds = selection(trainer, exact)
    growth = peak_bytes() - before
    bound = documented_bytes(trainer, options)

    def other_starts(purpose: str) -> str:
        return f"other {purpose}" if "attack" in purpose else purpose

    single = dataclasses.replace(exact, candidates="sample")
    modes: dict[str, Callable[[], tuple[set[int], float]]] = {
        "rcs/exact": lambda: (reference, seconds),
        "rcs/exact, other attack starts": lambda: selection(trainer, exact, other_starts),
        "rcs/cheap": lambda: selection(trainer, cheap),
        "rcs/exact, all drawn anew": lambda: selection(trainer, exact, round=1),
        "rcs/attacked once": lambda: selection(trainer, dataclasses.replace(exact, reattack=False)),
        "rcs/single images": lambda: selection(trainer, single),
        "rcs/single images, other attack starts": lambda: selection(trainer, single, other_starts),
        "rcs/single images, all drawn anew": lambda: selection(trainer, single, round=1),
    }
    found = {name: mode() for name, mode in modes.items() if not options.short or name in SHORT}
    results = []
    for name, (chosen, cost) in found.items():
        ratio = cost / epoch
        first = found["rcs/single images"][0] if "single" in name else reference
        results.append(
            {
                "name": name,
                "ratio_of": "seconds of a selection over those of a training epoch",
                "ratio": ratio,
                "ratio_min": ratio,
                "ratio_max": ratio,
                "overlap": len(chosen & first) / len(first),
                "overlap_by_chance": FRACTION,
                "seconds": cost,
                "epoch_seconds": epoch,
            }
        )
    results[0].update(peak_growth_bytes=growth, documented_bound_bytes=sum(bound.values()), documented_bytes=bound)
    exact_ratios = [r["ratio"] for r in results if r["name"].startswith("rcs/exact")]
    results[0].update(ratio_min=min(exact_ratios), ratio_max=max(exact_ratios))
    return results
