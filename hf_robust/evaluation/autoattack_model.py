"""The model as AutoAttack sees it: held still, in float32, from images to logits, and looked over before it starts."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..attacks import frozen
from .autoattack_findings import Findings

__all__ = ["AttackedModel", "check_images", "check_labels", "examine", "held", "random_state_kept"]

NEIGHBOURS_TOLERANCE = 0.05  # of the spread of the logits; arithmetic alone stays far below, batch statistics above


class AttackedModel:
    """A callable for the attacks: pixels in, float32 logits out, every image counted.

    Gradients are taken with respect to the images only, so that the `.grad` of no parameter changes, wherever the
    parameters live. The model gets contiguous float32 images; autocast of the surroundings is off.

    Args:
        model (`Callable` or `nn.Module`): images `(N, C, H, W)` in [0, 1] to logits `(N, K)`; a tensor, a
            `transformers` output, a mapping with `"logits"` or a tuple that starts with them.
        device (`torch.device`): where it computes.
    """

    def __init__(self, model: Callable[[Tensor], Any], device: torch.device) -> None:
        self.model = model
        self.device = device
        self.forwards = 0
        self.backwards = 0
        self.output_types: set[str] = set()
        self.on_work: Callable[[int], None] | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Classify, and count.

        Args:
            images (`torch.Tensor` of shape `(N, C, H, W)`): pixels in [0, 1].

        Returns:
            `torch.Tensor` of shape `(N, K)`: logits, float32, a copy that may be written to.

        Raises:
            TypeError: when the model's output holds no logits.
            ValueError: when the logits have another shape, are not finite, or do not depend on the pixels by a
                gradient.
        """
        self._count(forwards=len(images))
        if torch.is_grad_enabled() and images.requires_grad:
            return _PixelGradient.apply(images, self)
        return self.logits(images).detach().clone()

    def logits(self, images: Tensor) -> Tensor:
        """Classify without counting; what `__call__` says holds."""
        with torch.autocast(self.device.type, enabled=False):
            logits = _find_logits(self.model(images.contiguous()))
        if logits.dim() != 2 or len(logits) != len(images) or logits.shape[1] < 2:
            raise ValueError(
                f"got an output of shape {tuple(logits.shape)} for {len(images)} images: AutoAttack needs one row per "
                "image and one logit per class, at least 2; let a model with a single output give (0, output)"
            )
        if logits.dtype != torch.float32:
            self.output_types.add(str(logits.dtype).removeprefix("torch."))
            logits = logits.float()
        if not bool(logits.isfinite().all()):
            _refuse_unless_from_pixels(logits, images)
        return logits

    def _count(self, forwards: int = 0, backwards: int = 0) -> None:
        self.forwards += forwards
        self.backwards += backwards
        if self.on_work is not None:
            self.on_work(forwards + 2 * backwards)


class _PixelGradient(torch.autograd.Function):
    """Logits whose backward pass reaches the pixels and nothing else."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, model: AttackedModel) -> Tensor:
        with torch.enable_grad():
            pixels = images.detach().requires_grad_(True)
            logits = model.logits(pixels)
        if not logits.requires_grad:
            raise ValueError(_NO_GRADIENT)
        ctx.pixels, ctx.logits, ctx.model = pixels, logits, model
        return logits.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.model._count(backwards=len(gradient))
        (found,) = torch.autograd.grad(ctx.logits, ctx.pixels, gradient, allow_unused=True)
        if found is None:
            raise ValueError(_NO_GRADIENT)
        return found.contiguous(), None


_NO_GRADIENT = (
    "got logits that are cut off from the pixels: the attacks need the gradient of the one with respect to the other; "
    "take torch.no_grad(), inference_mode(), .detach() and conversions to NumPy or PIL out of the model"
)


def _find_logits(output: Any) -> Tensor:
    found = output
    if isinstance(output, Mapping) and "logits" in output:
        found = output["logits"]
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, tuple | list) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise TypeError(
            f"got a {type(output).__name__} from the model: it must give logits, as a tensor, as .logits or as the "
            "first of a tuple; wrap it in a function that picks them"
        )
    return found


def _refuse_unless_from_pixels(logits: Tensor, images: Tensor) -> None:
    """An attack may ask about images that are not finite (its own business); finite ones must have finite logits."""
    if bool((images.flatten(1).isfinite().all(1) & ~logits.isfinite().all(1)).any()):
        raise ValueError(
            "the model gives logits that are not finite (NaN or infinite) for finite images in [0, 1]: no accuracy "
            "can be counted on them; look for an overflow, log(0) or 0/0 in the model, or for damaged weights"
        )


def check_images(images: Tensor) -> None:
    """Let images through that AutoAttack can be run on.

    Args:
        images (`torch.Tensor`): should be `(N, C, H, W)`, float, in [0, 1].

    Raises:
        TypeError: for what is not a tensor.
        ValueError: for another shape or type, no image, values outside [0, 1] or not finite.
    """
    if not isinstance(images, Tensor):
        raise TypeError(
            f"got images of type {type(images).__name__}: AutoAttack takes one tensor (N, channels, height, width); "
            "convert an array by torch.from_numpy, a list of tensors by torch.stack"
        )
    if images.dim() != 4 or len(images) == 0:
        raise ValueError(
            f"got images of shape {tuple(images.shape)}: AutoAttack takes (N, channels, height, width) with N of 1 or "
            "more; add the missing axis by unsqueeze"
        )
    if not images.is_floating_point():
        raise ValueError(f"got images of type {images.dtype}, not float in [0, 1]: divide uint8 images by 255")
    low, high = (float(value) for value in images.detach().aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"got pixels from {low:.3g} to {high:.3g}, they must be in [0, 1]: the budget eps and the attacks' limits "
            "are in pixels. Give images that are not normalised and put the normalisation inside the model; divide "
            "images from 0 to 255 by 255"
        )


def check_labels(labels: Tensor, n: int, num_classes: int | None = None) -> None:
    """Let labels through that fit the images and, once that is known, the logits.

    Args:
        labels (`torch.Tensor`): should be `(N,)`, whole numbers.
        n (`int`): images.
        num_classes (`int`, *optional*): classes K of the model.

    Raises:
        ValueError: for another shape or type, or a label outside [0, K).
    """
    if labels.shape != (n,) or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(
            f"got labels of shape {tuple(labels.shape)} and type {labels.dtype} for {n} images: give one whole number "
            "per image; one-hot rows become that by .argmax(1)"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        rule = "0 or more" if num_classes is None else f"0 to {num_classes - 1}, the classes of the model"
        raise ValueError(
            f"got labels from {low} to {high}, they must be {rule}: number the classes from 0 in the order of the "
            "model's outputs, and leave images without a label out"
        )


@contextlib.contextmanager
def held(model: Callable[[Tensor], Any]) -> Iterator[Findings]:
    """Hold a model in evaluation mode, in float32 and without gradients of its own; put everything back afterwards.

    Args:
        model (`Callable` or `nn.Module`): only a module can be held, a plain function is taken as it is.

    Returns:
        A context that gives the [`Findings`] about what had to be changed.
    """
    findings = Findings()
    if not isinstance(model, nn.Module):
        yield findings
        return
    # A wrapper made around a model in evaluation mode says "training" itself; only what computes counts.
    findings.was_training = any(module.training for module in model.modules() if not any(module.children()))
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    stored = [(t, t.data) for t in tensors if t.dtype != torch.float32]
    findings.weights = {str(data.dtype).removeprefix("torch.") for _, data in stored}
    with frozen(model):
        try:
            for tensor, data in stored:
                tensor.data = data.float()
            yield findings
        finally:
            for tensor, data in stored:
                tensor.data = data


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the global random state back afterwards, on the CPU and on every GPU: the attacks seed all of them."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=list(devices)):
        yield


def examine(model: AttackedModel, images: Tensor, labels: Tensor, findings: Findings) -> None:
    """Look a model over on one batch, before any attack; nothing of it enters the counts of the attacks.

    Args:
        model ([`AttackedModel`]): the model.
        images (`torch.Tensor` of shape `(N, C, H, W)`): a batch, on the model's device.
        labels (`torch.Tensor` of shape `(N,)`): its labels.
        findings ([`Findings`]): is added to.

    Raises:
        ValueError: if the logits of an image depend on the other images in its batch.
    """
    with torch.no_grad():
        logits = model.logits(images)
        _refuse_batch_statistics(model, images, logits)
    said = _authors_checks(model, images, labels)
    findings.randomised |= "randomized" in said
    findings.probabilities |= "probability" in said
    findings.dynamic |= "dynamic" in said
    right = logits.argmax(1) == labels
    if bool(right.any()):
        _examine_gradients(model, images[right], labels[right], findings)


def _refuse_batch_statistics(model: AttackedModel, images: Tensor, logits: Tensor) -> None:
    if len(images) < 3:
        return
    spread = float(logits.max() - logits.min())
    by_neighbours = float((model.logits(images[:2]) - logits[:2]).abs().max())
    by_chance = float((model.logits(images) - logits).abs().max())
    if by_neighbours > max(NEIGHBOURS_TOLERANCE * spread, 10 * by_chance):
        raise ValueError(
            f"the logits of an image change by {by_neighbours:.2g} (of a spread of {spread:.2g}) with the other "
            "images in its batch: a normalisation layer uses the statistics of the batch, as in train mode. Call "
            "model.eval() before wrapping the model in a function; layers without running statistics cannot be "
            "evaluated image by image"
        )


def _authors_checks(model: AttackedModel, images: Tensor, labels: Tensor) -> str:
    """What the package's own checks say, in one text."""
    from pyautoattack import checks

    said: list[str] = []

    class Listener:
        warning = staticmethod(said.append)

    checks.check_randomized(model.logits, images, labels, bs=len(images), logger=Listener)
    with torch.no_grad():
        checks.check_range_output(model.logits, images, logger=Listener)
    # The third check counts calls in a global that it never clears, and leaves the process without a trace function.
    tracer = sys.gettrace()
    checks.funcs.update(dict.fromkeys(checks.funcs, 0))
    try:
        checks.check_dynamic(model.logits, images, False, logger=Listener)
    finally:
        sys.settrace(tracer)
        checks.funcs.update(dict.fromkeys(checks.funcs, 0))
    return " ".join(said)


def _examine_gradients(model: AttackedModel, images: Tensor, labels: Tensor, findings: Findings) -> None:
    with torch.enable_grad():
        pixels = images.detach().requires_grad_(True)
        logits = model.logits(pixels)
        if not logits.requires_grad:
            raise ValueError(_NO_GRADIENT)
        others = logits.scatter(1, labels[:, None], -torch.inf)
        margin = logits.gather(1, labels[:, None])[:, 0] - others.max(1).values
        blind = [
            _without_gradient(loss, pixels) for loss in (margin.sum(), cross_entropy(logits, labels, reduction="sum"))
        ]
    findings.examined += len(images)
    findings.blind_margin += int(blind[0].sum())
    findings.blind_loss += int((blind[1] & ~blind[0]).sum())
    findings.largest_margin = max(findings.largest_margin, float(margin.detach().max()))


def _without_gradient(loss: Tensor, pixels: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, pixels, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError(_NO_GRADIENT)
    return ~((gradient != 0) & gradient.isfinite()).flatten(1).any(1)
