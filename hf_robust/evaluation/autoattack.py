"""AutoAttack, the field's standard measure of robustness: the authors' attacks, made safe to call.

The attacks are those of the package `pyautoattack` (extra `[eval]`), unchanged. This file decides which of them run,
keeps the model and the random state as they were, resumes after a kill, shares the images between processes and says
in sentences what makes a number untrustworthy.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .autoattack_cascade import Cascade, CascadeBar, Setting, Share
from .autoattack_findings import Findings, explain
from .autoattack_model import AttackedModel, check_images, check_labels, held, random_state_kept
from .autoattack_plan import PRESETS
from .autoattack_state import fingerprint, model_fingerprint

__all__ = ["AttackStage", "AutoAttackResult", "autoattack"]


@dataclass(frozen=True)
class AttackStage:
    """One attack of the cascade, which saw only the images that those before it had left right.

    Args:
        name (`str`): `"apgd-ce"`, `"apgd-t"` (`"apgd-dlr"` for 3 classes), `"fab-t"` or `"square"`.
        robust (`torch.Tensor` of shape `(N,)`): images still right after it, bool.
        seconds (`float`): wall time; of the slowest process.
        forwards (`int`): images classified, each pass counted.
        backwards (`int`): images whose gradient was taken, each pass counted.
    """

    name: str
    robust: Tensor
    seconds: float
    forwards: int
    backwards: int

    @property
    def accuracy(self) -> float:
        """Share of images still right after this attack, in [0, 1]."""
        return float(self.robust.double().mean())


@dataclass(frozen=True)
class AutoAttackResult:
    """What AutoAttack left of a classifier, image by image.

    Args:
        clean (`torch.Tensor` of shape `(N,)`): right without an attack, bool.
        robust (`torch.Tensor` of shape `(N,)`): right against every attack, bool.
        predictions (`torch.Tensor` of shape `(N,)`): class of the image that broke it, of the clean one otherwise.
        distances (`torch.Tensor` of shape `(N,)`): norm of the perturbation that broke it, 0 where none did.
        stages (`list[AttackStage]`): the attacks in order.
        warnings (`list[str]`): sentences about what limits the number; the gravest first, none for a clean run.
        findings ([`Findings`]): the counts behind these sentences.
        eps (`float`): budget, pixels in [0, 1].
        norm (`str`): of the budget.
        preset (`str`): which attacks; only `"standard"` may be called AutoAttack in a table.
        seed (`int`): of the attacks.
        dtype (`str`): of the arithmetic.
        batch_size (`int`): images per batch; random draws depend on it.
        num_classes (`int`): of the model.
        versions (`dict[str, str]`): of the packages that decide the result.
    """

    clean: Tensor
    robust: Tensor
    predictions: Tensor
    distances: Tensor
    stages: list[AttackStage]
    warnings: list[str]
    findings: Findings
    eps: float
    norm: str
    preset: str
    seed: int
    dtype: str
    batch_size: int
    num_classes: int
    versions: dict[str, str]

    @property
    def accuracy(self) -> float:
        """Share of images that every attack left right, in [0, 1]."""
        return float(self.robust.double().mean())

    @property
    def clean_accuracy(self) -> float:
        """Share of images right without an attack, in [0, 1]."""
        return float(self.clean.double().mean())

    @property
    def seconds(self) -> float:
        """Wall time of all attacks."""
        return sum(stage.seconds for stage in self.stages)


def autoattack(
    model: Callable[[Tensor], Any] | nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float = 8 / 255,
    norm: Literal["linf", "l2", "l1"] = "linf",
    preset: Literal["standard", "fast", "smoke"] = "standard",
    batch_size: int = 128,
    seed: int = 0,
    state_file: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> AutoAttackResult:
    """Attack a classifier with AutoAttack: APGD on the cross-entropy, targeted APGD, targeted FAB, Square.

    An image counts as robust when it is right and no attack finds an image within the budget that is not. Each
    attack gets the images its predecessors left; the flags are monotone. A module is held in evaluation mode, in
    float32 and frozen, and put back afterwards; weights, running statistics, gradients and the global random state
    are left as they were. When `torch.distributed` is initialised, every process calls with the same arguments, takes
    every `world`-th image and gets the whole result.

    Args:
        model (`Callable` or `nn.Module`): images `(N, C, H, W)` in [0, 1] to logits `(N, K)`, K of 2 or more, as a
            tensor, a `transformers` output or a tuple. Normalisation belongs inside.
        images (`torch.Tensor` of shape `(N, C, H, W)`): float, pixels in [0, 1], grey or colour, on any device.
        labels (`torch.Tensor` of shape `(N,)`): true classes in [0, K).
        eps (`float`, defaults to 8/255): budget, pixels in [0, 1]; for `"l2"` and `"l1"` of one whole image.
        norm (`str`, defaults to `"linf"`): `"linf"`, `"l2"` or `"l1"`.
        preset (`str`, defaults to `"standard"`): `"standard"` is AutoAttack; `"fast"` its two APGD attacks (less
            work, an upper bound); `"smoke"` all attacks cut short, to try a pipeline.
        batch_size (`int`, defaults to 128): images per batch.
        seed (`int`, defaults to 0): of every attack on every batch, as the authors do it.
        state_file (`str` or `Path`, *optional*): where to note each finished batch (`.npz`); the same call goes on
            from there after a kill. With several processes each writes its own, named after this one.
        device (`str` or `torch.device`, *optional*): where the images are sent; default: where the model is.
        progress (`bool`, defaults to `True`): show a bar with the time left at most.

    Returns:
        [`AutoAttackResult`]: flags, attacks and warnings, on the CPU; the same on every process.

    Raises:
        ImportError: without the package `pyautoattack`.
        ValueError: for images outside [0, 1], labels or logits that do not fit, or a state of another evaluation.
        TypeError: for images that are no tensor, or an output that holds no logits.

    Source: Croce & Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse
        parameter-free attacks", version "standard" of fra31/auto-attack@a392200 as packaged in pyautoattack 0.2.0.
    """
    package = _package()
    _check_settings(eps, norm, preset, batch_size, seed)
    check_images(images)
    labels = torch.as_tensor(labels)
    check_labels(labels, len(images))
    setting = Setting(float(eps), norm, preset, batch_size, seed)
    target = AttackedModel(model, _device(model, images, device))
    images, labels = images.detach().to(torch.float32), labels.detach().long()
    return _join(_attack(package, target, images, labels, setting, state_file, progress), len(images), setting)


def _attack(
    package: ModuleType,
    target: AttackedModel,
    images: Tensor,
    labels: Tensor,
    setting: Setting,
    state_file: str | Path | None,
    progress: bool,
) -> list[Share]:
    """Attack the images of this process, with everything put back afterwards; what came of those of all processes."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)
    own, file = slice(rank, None, world), _own_file(state_file, rank, world)
    with held(target.model) as findings, random_state_kept(), torch.no_grad():
        tag = _tag(setting, target.model, images, labels, f"{rank} of {world}")
        with CascadeBar(progress and rank == 0) as bar:
            run = Cascade(package, target, setting, images[own], labels[own].cpu(), tag, file, bar)
            return _gather(run, findings)


def _gather(run: Cascade, findings: Findings) -> list[Share]:
    """Run the share of this process and exchange outcomes; an error of one process is raised in all of them."""
    if not _distributed():
        return [run(findings)]
    outcome: Share | str
    failure: Exception | None = None
    try:
        outcome = run(findings)
    except Exception as error:  # its text travels: not every exception can be pickled, and the others would wait
        outcome, failure = str(error) or repr(error), error
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    if failure is not None:
        raise failure
    for rank, other in enumerate(outcomes):
        if isinstance(other, str):
            raise RuntimeError(f"process {rank} could not attack its share of the images: {other}")
    common = [{**share.tag, "process": ""} for share in outcomes]
    if any(tag != common[0] for tag in common):
        raise ValueError(
            "the processes were called with different models, images, labels or settings: they share one evaluation, "
            "so give all of them the same"
        )
    return outcomes


def _join(shares: list[Share], n: int, setting: Setting) -> AutoAttackResult:
    full = [(rank, share.state) for rank, share in enumerate(shares) if share.state is not None]

    def merged(parts: list[Tensor]) -> Tensor:
        whole = torch.zeros(n, dtype=parts[0].dtype)
        for (rank, _), part in zip(full, parts, strict=True):
            whole[rank :: len(shares)] = part
        return whole

    stages = [
        AttackStage(
            count.name,
            merged([state.after[k] for _, state in full]),
            max(state.counts[k].seconds for _, state in full),
            sum(state.counts[k].forwards for _, state in full),
            sum(state.counts[k].backwards for _, state in full),
        )
        for k, count in enumerate(full[0][1].counts)
    ]
    findings = Findings.total(state.findings for _, state in full)
    clean = merged([state.clean for _, state in full])
    accuracies = [(stage.name, stage.accuracy) for stage in stages]
    warnings = [*explain(findings, float(clean.double().mean()), accuracies, n), *shares[0].notes]
    return AutoAttackResult(
        clean=clean,
        robust=merged([state.robust for _, state in full]),
        predictions=merged([state.predictions for _, state in full]),
        distances=merged([state.distances for _, state in full]),
        stages=stages,
        warnings=warnings,
        findings=findings,
        eps=setting.eps,
        norm=setting.norm,
        preset=setting.preset,
        seed=setting.seed,
        dtype="float32",
        batch_size=setting.batch_size,
        num_classes=shares[0].num_classes,
        versions={"pyautoattack": _version(), "torch": torch.__version__},
    )


def _package() -> ModuleType:
    try:
        import pyautoattack
    except ImportError as error:
        raise ImportError(
            "AutoAttack needs the package pyautoattack, which is not installed (it comes with the extra eval): "
            "pip install 'hf_robust[eval]'"
        ) from error
    return pyautoattack


def _check_settings(eps: float, norm: str, preset: str, batch_size: int, seed: int) -> None:
    if norm not in ("linf", "l2", "l1"):
        raise ValueError(f"norm must be 'linf', 'l2' or 'l1', got {norm!r}: the leaderboards use 'linf'")
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}: 'standard' is AutoAttack")
    if norm == "linf" and not 0 < eps <= 1:
        raise ValueError(f"eps must be in (0, 1], got {eps}: it is in pixels of [0, 1], for 8 grey levels write 8/255")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive, got {eps}: common budgets on CIFAR-10 are 0.5 (l2) and 12 (l1)")
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}: 128 is the default")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}: 0 is the default")


def _device(model: Any, images: Tensor, asked: str | torch.device | None) -> torch.device:
    """Where the model computes: nobody is moved, so a wish that cannot be met is an error."""
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    if asked is None:
        return tensors[0].device if tensors else images.device
    device = torch.empty(0, device=asked).device  # "cuda" becomes "cuda:0"
    if tensors and device not in {tensor.device for tensor in tensors}:
        raise ValueError(
            f"device is {str(device)!r}, the model is on {str(tensors[0].device)!r}: they must be one; move the model "
            f"by model.to({str(device)!r}) or leave device out"
        )
    return device


def _tag(setting: Setting, model: Any, images: Tensor, labels: Tensor, process: str) -> dict[str, Any]:
    """What a state file belongs to, as JSON values."""
    return {
        **vars(setting),
        "process": process,
        "pyautoattack": _version(),
        "model": model_fingerprint(model),
        "images": fingerprint([("images", images)]),
        "labels": fingerprint([("labels", labels)]),
    }


def _own_file(state_file: str | Path | None, rank: int, world: int) -> Path | None:
    if state_file is None:
        return None
    path = Path(state_file)
    return path if world == 1 else path.with_name(f"{path.stem}-{rank}-of-{world}{path.suffix}")


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _version() -> str:
    return importlib.metadata.version("pyautoattack")
