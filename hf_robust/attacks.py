"""Projected gradient descent as a function of the input: a loss function goes in, adversarial images come out.

The attack knows neither labels nor models. Whatever it should maximise (cross-entropy, NT-Xent of two views, a
KL divergence) is a callable ``images -> scalar``; whoever calls it freezes the model with `frozen`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["PGD", "LossFn", "frozen", "parse_budget"]

LossFn = Callable[[Tensor], Tensor]


def parse_budget(value: str | float) -> float:
    """Read a pixel budget that may be written as a fraction.

    Args:
        value (`str` or `float`): `"8/255"`, `"0.03"` or a number, in units of pixels in [0, 1].

    Returns:
        `float`: the budget; the range is checked where the budget is used.

    Raises:
        ValueError: if the text is neither a number nor a fraction of two numbers.
    """
    try:
        if isinstance(value, str):
            numerator, _, denominator = value.partition("/")
            if "/" in denominator:
                raise ValueError
            return float(Fraction(numerator.strip()) / Fraction(denominator.strip() or "1"))
        return float(value)
    except (ValueError, ZeroDivisionError, TypeError):
        raise ValueError(
            f"cannot read {value!r} as a pixel budget: write a fraction such as 8/255 or a number"
        ) from None


@contextlib.contextmanager
def frozen(model: nn.Module, *, eval_mode: bool = True) -> Iterator[nn.Module]:
    """Hold a model still while its input is attacked.

    No parameter asks for a gradient inside the context, so a backward pass costs the input gradient only, and in
    evaluation mode no running statistic moves. Every flag is put back as it was, per parameter and per module.

    Args:
        model (`nn.Module`): the model the attack looks through.
        eval_mode (`bool`, defaults to `True`): also switch every module to evaluation mode (as the released ACL
            attack does); `False` keeps the modes as they are.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    training = [m for m in model.modules() if m.training] if eval_mode else []
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for module in training:
            module.training = False
        yield model
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


@dataclass(frozen=True)
class PGD:
    """Projected gradient ascent on a scalar loss inside an L-inf or L2 ball around the images.

    Args:
        eps (`float`, defaults to 8/255, as published): radius of the ball, pixels in [0, 1]; for `norm="l2"` the
            Euclidean norm over all pixels of one image.
        step_size (`float`, defaults to 2/255, as published): length of one step, same unit as `eps`.
        steps (`int`, defaults to 5, the published training attack): gradient steps; 0 returns the start.
        norm (`str`, defaults to `"linf"`): `"linf"` or `"l2"`.
        random_start (`bool`, defaults to `True`): start uniformly inside the ball rather than at the image.
        start_std (`float`, *optional*): start at Gaussian noise of this standard deviation around the image instead,
            in pixels of [0, 1], clipped neither to the ball nor to the image range; TRADES takes 0.001.
        clip_start (`bool`, defaults to `False`): clip the start to ball and image range, as RoCL does; otherwise the
            first gradient is taken at the start as it was drawn.

    Raises:
        ValueError: for a budget outside its range, a negative number of steps, an unknown norm, or a `start_std` that
            is not positive or stands beside `random_start=False`.

    Source: Madry et al. 2018; the order of operations (uniform start not clipped to the image range, step, ball,
        box, last iterate) follows the released ACL code, `train_simCLR.py` and `ACL_RCS.py` (`PGD_contrastive`).
    """

    eps: float = field(default=8 / 255, metadata={"help": "Radius of the attack in pixels of [0, 1]; write 8/255."})
    step_size: float = field(default=2 / 255, metadata={"help": "Length of one attack step, same unit as eps."})
    steps: int = field(default=5, metadata={"help": "Gradient steps of the training attack (published: 5)."})
    norm: Literal["linf", "l2"] = field(default="linf", metadata={"help": "Threat model: linf or l2."})
    random_start: bool = field(default=True, metadata={"help": "Start at a random point of the ball."})
    start_std: None | float = field(
        default=None,
        metadata={"help": "Gaussian start of this standard deviation instead of the uniform one; TRADES: 0.001."},
    )
    clip_start: bool = field(
        default=False, metadata={"help": "Clip the random start to ball and image range; RoCL does, ACL does not."}
    )

    def __repr__(self) -> str:
        # Checkpoints are compared by this text: those written before there were these two still resume.
        late = ("start_std", "clip_start")
        shown = [f for f in fields(self) if f.name not in late or getattr(self, f.name) != f.default]
        return f"PGD({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm must be 'linf' or 'l2', got {self.norm!r}")
        if self.norm == "linf" and not 0 < self.eps <= 1:
            raise ValueError(
                f"eps must be in (0, 1], got {self.eps}: budgets are in pixels of [0, 1], for 8 levels write 8/255"
            )
        if self.norm == "l2" and not 0 < self.eps < float("inf"):
            raise ValueError(f"eps must be positive, got {self.eps}: a common L2 budget on CIFAR-10 is 128/255")
        if not 0 < self.step_size < float("inf"):
            raise ValueError(f"step_size must be positive, got {self.step_size}: a common choice is 2/255")
        if self.norm == "linf" and self.step_size > 1:
            raise ValueError(f"step_size must be in (0, 1], got {self.step_size}: for 2 grey levels write 2/255")
        if self.steps < 0:
            raise ValueError(f"steps must be 0 or more, got {self.steps}")
        if self.start_std is not None:
            if not 0 < self.start_std < float("inf"):
                raise ValueError(
                    f"start_std must be positive, got {self.start_std}: TRADES takes 0.001; leave it out for a start "
                    "anywhere in the ball"
                )
            if not self.random_start:
                raise ValueError(
                    f"start_std={self.start_std} asks for a random start, random_start=False for none: leave one out"
                )

    def __call__(
        self, loss_fn: LossFn, x: Tensor, start: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Maximise `loss_fn` over the ball around `x`, intersected with [0, 1].

        Only the input is differentiated: parameters, their gradients and the global random state stay as they
        are (wrap the call in `frozen` so that the backward pass does not even compute weight gradients, and so
        that running statistics stand still). Elements whose gradient is not finite are not moved in that step,
        so the result is always finite and inside ball and box.

        Args:
            loss_fn (`Callable[[Tensor], Tensor]`): images `(N, C, H, W)` in [0, 1] to a scalar.
            x (`torch.Tensor` of shape `(N, C, H, W)`): images, pixels in [0, 1], float.
            start (`torch.Tensor`, *optional*): initial perturbation of the shape of `x`, instead of the random one.
            generator (`torch.Generator`, *optional*): source of the random start; default: one that is derived
                from the global random state without advancing it.

        Returns:
            `torch.Tensor` of shape `(N, C, H, W)`: adversarial images, detached, pixels in [0, 1]; the last iterate.

        Raises:
            ValueError: if `x` is not floating point or `start` has another shape.
        """
        if not x.is_floating_point():
            raise ValueError(f"x must be float images in [0, 1], got {x.dtype}: divide uint8 images by 255")
        if start is not None and start.shape != x.shape:
            raise ValueError(f"start must have the shape of x, {tuple(x.shape)}, got {tuple(start.shape)}")
        x = x.detach()
        delta = self._start(x, generator) if start is None else start.detach().to(x)
        if self.clip_start:
            delta = self._project(delta, x)
        if self.steps == 0:
            return (x + self._project(delta, x)).clamp(0, 1)
        for _ in range(self.steps):
            delta = self._project(self._step(delta, self._input_gradient(loss_fn, x, delta)), x)
        return (x + delta).clamp(0, 1)

    @staticmethod
    def _input_gradient(loss_fn: LossFn, x: Tensor, delta: Tensor) -> Tensor:
        delta = delta.detach().requires_grad_(True)
        with torch.enable_grad():
            loss = loss_fn(x + delta)
        if loss.dim() != 0:
            raise ValueError(f"loss_fn must return a scalar, got shape {tuple(loss.shape)}: reduce it with .sum()")
        (gradient,) = torch.autograd.grad(loss, delta)
        return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)

    def _start(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        if not self.random_start:
            return torch.zeros_like(x)
        generator = generator or _generator_like_global(x.device)
        # Contiguous on purpose: a channels_last tensor would be filled in memory order, i.e. with other noise.
        noise = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if self.start_std is not None:
            return noise.normal_(std=self.start_std, generator=generator)
        if self.norm == "linf":
            return noise.uniform_(-self.eps, self.eps, generator=generator)
        noise.normal_(generator=generator)
        radius = torch.rand(x.shape[0], dtype=x.dtype, device=x.device, generator=generator)
        dimension = noise[0].numel() if len(noise) else 1
        return noise / _norms(noise) * (self.eps * radius ** (1 / dimension)).view(-1, *[1] * (x.dim() - 1))

    def _step(self, delta: Tensor, gradient: Tensor) -> Tensor:
        if self.norm == "linf":
            return delta + self.step_size * gradient.sign()
        return delta + self.step_size * gradient / _norms(gradient)

    def _project(self, delta: Tensor, x: Tensor) -> Tensor:
        if self.norm == "linf":
            delta = delta.clamp(-self.eps, self.eps)
        else:
            delta = delta * (self.eps / _norms(delta)).clamp(max=1.0)
        # The box never moves a coordinate away from x, so the point stays inside the ball.
        return (x + delta).clamp(0, 1) - x


def _norms(x: Tensor) -> Tensor:
    """Euclidean norm per image, `(N, 1, ..., 1)`, bounded below so that a zero vector stays zero."""
    return x.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, *[1] * (x.dim() - 1))


def _generator_like_global(device: torch.device) -> torch.Generator:
    """A generator seeded from the global random state of `device`, which is left where it was."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        seed = int(torch.randint(2**62, (), device=device if device.type == "cuda" else "cpu"))
    return torch.Generator(device).manual_seed(seed)
