"""Projected gradient descent as a function of the input: a loss function goes in, adversarial images come out.

The attack knows neither labels nor models. Whatever it should maximise (cross-entropy, NT-Xent of two views, a
KL divergence) is a callable ``images -> scalar``; whoever calls it freezes the model with `frozen`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["PGD", "LossFn", "frozen", "parse_budget"]

LossFn = Callable[[Tensor], Tensor]
_OPTIONS = (
    "start_std",
    "clip_start",
    "step_sizes",
    "min_gain",
    "replay",
)  # shown unless at their defaults


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
        step_sizes (`tuple[float, ...]`, *optional*): lengths of the steps one after another, instead of `steps` times
            `step_size`, same unit as `eps`; the two then read as their number and the first of them. Another
            algorithm than the published one, see [`~hf_robust.attack_schedules.with_schedule`].
        min_gain (`float`, defaults to 0, never): stop when a step has raised the loss by less than this share of its
            value before. Seen in the forward pass of the next step, whose backward pass and all further steps are
            saved: k steps cost 2 k + 1 passes instead of 2 `steps`. One decision for the whole batch, read from the
            device in every step but the first (a host synchronisation). Another algorithm than the published one.
        replay (`bool`, defaults to `False`): an image's attack starts where its last one ended. Whoever calls the
            attack remembers perturbations and hands them over as `start`; the trainers do, from one epoch to the
            next. Another algorithm than the published one.

    Raises:
        ValueError: for a budget outside its range, a negative number of steps, an unknown norm, a `start_std` that
            is not positive or stands beside `random_start=False`, `step_sizes` that contradict `steps` or
            `step_size`, or a `min_gain` outside [0, 1).

    Source: Madry et al. 2018; the order of operations (uniform start not clipped to the image range, step, ball,
        box, last iterate) follows the released ACL code, `train_simCLR.py` and `ACL_RCS.py` (`PGD_contrastive`).
        `step_sizes`, `min_gain` and `replay` are ours.
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
    step_sizes: None | tuple[float, ...] = None
    min_gain: float = 0.0
    replay: bool = False

    def __repr__(self) -> str:
        # Checkpoints are compared by this text: those written before there was an option still resume.
        shown = [f for f in fields(self) if f.name not in _OPTIONS or getattr(self, f.name) != f.default]
        return f"PGD({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm must be 'linf' or 'l2', got {self.norm!r}")
        if self.step_sizes is not None:
            self._take_step_sizes(tuple(self.step_sizes))
        if not 0 <= self.min_gain < 1:
            raise ValueError(
                f"min_gain must be in [0, 1), got {self.min_gain}: the share of its value by which a step must raise "
                "the loss, such as 0.01; 0 never stops early"
            )
        if self.norm == "linf" and not 0 < self.eps <= 1:
            raise ValueError(
                f"eps must be in (0, 1], got {self.eps}: budgets are in pixels of [0, 1], for 8 levels write 8/255"
            )
        if self.norm == "l2" and not 0 < self.eps < float("inf"):
            raise ValueError(f"eps must be positive, got {self.eps}: a common L2 budget on CIFAR-10 is 128/255")
        for size in self.sizes or (self.step_size,):
            if not 0 < size < float("inf"):
                raise ValueError(f"step_size must be positive, got {size}: a common choice is 2/255")
            if self.norm == "linf" and size > 1:
                raise ValueError(f"step_size must be in (0, 1], got {size}: for 2 grey levels write 2/255")
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

    def _take_step_sizes(self, sizes: tuple[float, ...]) -> None:
        """Let `steps` and `step_size` say the same; they may only have been left out, or say so already."""
        if not sizes:
            raise ValueError("step_sizes must hold a length for every step, got none: for no step write steps=0")
        said = {"steps": len(sizes), "step_size": sizes[0]}
        default = {f.name: f.default for f in fields(self)}
        for name, value in said.items():
            if getattr(self, name) not in (value, default[name]):
                raise ValueError(
                    f"{name}={getattr(self, name)} contradicts step_sizes={sizes}, which are {len(sizes)} steps of "
                    f"their own lengths: leave {name} out"
                )
            object.__setattr__(self, name, value)
        object.__setattr__(self, "step_sizes", sizes)

    @property
    def title(self) -> str:
        """Name in messages and tables: `"PGD-5, linf 8/255"`; what differs from the published form is told."""
        sizes = ", ".join(f"{size * 255:.3g}" for size in self.sizes)
        told = [f"steps {sizes} /255"] if self.step_sizes is not None else []
        told += [f"stops below {100 * self.min_gain:g} % gain"] if self.min_gain else []
        told += ["replayed"] if self.replay else []
        extra = f" ({'; '.join(told)})" if told else ""
        return f"PGD-{self.steps}, {self.norm} {self.eps * 255:.3g}/255{extra}"

    def to_dict(self) -> dict[str, Any]:
        """Settings for reports; options that are not in use are left out."""
        hidden = ("clip_start", "step_sizes", "min_gain", "replay")
        kept = [f for f in fields(self) if f.name not in hidden or getattr(self, f.name) != f.default]
        return {f.name: getattr(self, f.name) for f in kept}

    @property
    def sizes(self) -> tuple[float, ...]:
        """Length of every step, in the order in which they are taken, same unit as `eps`."""
        return self.step_sizes if self.step_sizes is not None else (self.step_size,) * max(0, self.steps)

    def with_steps(self, steps: int) -> PGD:
        """The same attack with another number of steps, all of one length, which lead as far together.

        Args:
            steps (`int`): 0 or more.

        Returns:
            [`PGD`]: itself if it has so many steps already; a step in L-inf is never longer than 1.
        """
        if steps == self.steps:
            return self
        length = sum(self.step_sizes) if self.step_sizes is not None else self.step_size * self.steps
        size = length / max(1, steps)
        size = min(1.0, size) if self.norm == "linf" else size
        return replace(self, step_sizes=None, steps=steps, step_size=size or self.step_size)

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
        delta = self.first(x, generator) if start is None else start.detach().to(x)
        if self.clip_start:
            delta = self._project(delta, x)
        if self.steps == 0:
            return (x + self._project(delta, x)).clamp(0, 1)
        before: Tensor | None = None
        for size in self.sizes:
            leaf = delta.detach().requires_grad_(True)
            with torch.enable_grad():
                loss = loss_fn(x + leaf)
            if loss.dim() != 0:
                raise ValueError(f"loss_fn must return a scalar, got shape {tuple(loss.shape)}: reduce it with .sum()")
            if self.min_gain:
                now = loss.detach()
                if before is not None and bool(now - before < self.min_gain * before.abs()):
                    break
                before = now
            (gradient,) = torch.autograd.grad(loss, leaf)
            gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
            delta = self._project(self._step(delta, gradient, size), x)
        return (x + delta).clamp(0, 1)

    def first(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw the perturbation that an attack on `x` starts from.

        Args:
            x (`torch.Tensor` of shape `(N, C, H, W)`): images, pixels in [0, 1], float.
            generator (`torch.Generator`, *optional*): source of the noise; see `__call__`.

        Returns:
            `torch.Tensor` of shape `(N, C, H, W)`: zeros without a random start.
        """
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

    def _step(self, delta: Tensor, gradient: Tensor, size: float) -> Tensor:
        if self.norm == "linf":
            return delta + size * gradient.sign()
        return delta + size * gradient / _norms(gradient)

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
