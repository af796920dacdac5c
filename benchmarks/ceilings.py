"""What the machine gives, measured in the same run: matrix products, and the convolutions of exactly these shapes."""

from __future__ import annotations

import functools
import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Action

__all__ = ["Convolutions", "gemm_peak"]

KINDS = ("forward", "input gradient", "weight gradient")
Shape = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


@functools.lru_cache
def gemm_peak(dtype: torch.dtype, device: str, side: int = 0, repeats: int = 5) -> float:
    """FLOP per second of the best of some square matrix products.

    Args:
        dtype (`torch.dtype`): of the matrices.
        device (`str`): where.
        side (`int`): 0 for 2048 on a CPU and 8192 on a GPU.
        repeats (`int`): products; the first one is not counted.
    """
    side = side or (8192 if device == "cuda" else 2048)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for number in range(repeats + 1):
        _wait(device)
        started = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - started) if number else best
    return 2 * side**3 / max(best, 1e-9)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Convolutions:
    """The convolutions of one pass of a network, ready to be run by themselves, each as often as the network does.

    Args:
        model ([`RobustModelForPreTraining`]): whose backbone is looked at.
        views (`int`): images of a pass.
        dtype (`torch.dtype`): of images and weights.
        channels_last (`bool`): memory order of both.
    """

    def __init__(self, model: Any, views: int, dtype: torch.dtype, channels_last: bool = True) -> None:
        self._views, self._first = views, True
        device = next(model.parameters()).device
        order = torch.channels_last if channels_last else torch.contiguous_format
        self._work: list[tuple[int, Tensor, Tensor, Tensor, tuple[Any, ...]]] = []
        self.flop = 0.0  # of one forward pass; each gradient costs the same
        for shape, times in _shapes(model).items():
            inputs, weights, stride, padding, dilation, groups = shape
            x = torch.randn(views, *inputs, device=device).to(dtype).contiguous(memory_format=order)
            w = torch.randn(weights, device=device).to(dtype).contiguous(memory_format=order)
            settings = (stride, padding, dilation, False, (0, 0), groups)
            y = torch.ops.aten.convolution(x, w, None, *settings)
            self._work.append((times, x, w, torch.randn_like(y), settings))
            self.flop += times * 2.0 * y.numel() * w[0].numel()

    def action(self, kind: str) -> Action:
        """All convolutions of one pass.

        Args:
            kind (`str`): `"forward"`, `"input gradient"` or `"weight gradient"`.

        Returns:
            `Callable[[], None]`.
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        mask = [kind == "input gradient", kind == "weight gradient", False]

        def run() -> None:
            for times, x, w, gradient, settings in self._work:
                for _ in range(times):
                    if kind == "forward":
                        torch.ops.aten.convolution(x, w, None, *settings)
                    else:
                        torch.ops.aten.convolution_backward(gradient, x, w, None, *settings, mask)

        return run


def _shapes(model: Any) -> Counter[Shape]:
    """Shapes of the convolutions of one image through the backbone, and how often each occurs."""
    found: Counter[Shape] = Counter()

    def note(module: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        settings: tuple[Any, ...] = (module.stride, module.padding, module.dilation)
        found[tuple(inputs[0].shape[1:]), tuple(module.weight.shape), *settings, module.groups] += 1  # type: ignore[index]

    hooks: list[Any] = [
        m.register_forward_hook(note)
        for m in model.backbone.modules()
        if isinstance(m, nn.Conv2d)  # type: ignore[arg-type]
    ]
    size, training = model.config.image_size, model.training
    model.eval()
    with torch.no_grad():
        parameter = next(model.parameters())
        x = torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype)
        model.features(x, model.switch.branches[0])
    model.train(training)
    for hook in hooks:
        hook.remove()
    return found
