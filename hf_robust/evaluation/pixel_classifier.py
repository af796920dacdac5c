"""Any image classifier as one function of pixels in [0, 1], the space in which attack budgets are measured."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from hf_robust.attacks import frozen
from hf_robust.models.modeling import RobustModelForPreTraining

__all__ = ["PixelClassifier", "logits_of", "modules_inside"]

_DEEP = 4  # steps from a function to its networks: a function in an object in a list
_EMPTY = types.CellType()  # of a variable that has no value yet


def logits_of(output: Any) -> Tensor:
    """The logits in whatever a classifier returns.

    Args:
        output (`Any`): a tensor, an output of transformers, a mapping with the key `logits`, or a tuple that begins
            with one of these.

    Returns:
        `torch.Tensor` of shape `(N, C)`: float32.

    Raises:
        ValueError: if there are none, or not two classes at least.
    """
    found = output
    if isinstance(found, tuple | list) and not hasattr(found, "logits") and len(found):
        found = found[0]
    if isinstance(found, Mapping) and "logits" in found:
        found = found["logits"]
    found = getattr(found, "logits", found)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"a classifier returns logits, got {type(output).__name__} without them: pass a model for image "
            "classification (of an encoder: --protocol slf fine-tunes a classifier first)"
        )
    if found.dim() != 2 or found.shape[1] < 2:
        raise ValueError(
            f"logits must have the shape (N, C) with 2 classes or more, got {tuple(found.shape)}: a single output "
            "becomes two by torch.stack([-z, z], dim=1)"
        )
    return found.float()


def modules_inside(function: Callable[..., Any]) -> list[nn.Module]:
    """Networks that a function stands for: itself, the object it belongs to, or what it names.

    Args:
        function (`Callable`): a module, a bound method, a partial function, an object that is called, or a lambda such
            as `lambda x: model(x).logits`; also with several networks in a list or a dictionary.

    Returns:
        `list[nn.Module]`: without repetition.
    """
    found: dict[int, nn.Module] = {}
    _collect(function, found, set(), _DEEP)
    return list(found.values())


def _collect(thing: Any, found: dict[int, nn.Module], seen: set[int], depth: int) -> None:
    if id(thing) in seen or depth < 0:
        return
    seen.add(id(thing))
    if isinstance(thing, nn.Module):
        found[id(thing)] = thing
    else:
        for part in _parts(thing):
            _collect(part, found, seen, depth - 1)


def _parts(thing: Any) -> list[Any]:
    """What a function, or something that it uses, is made of."""
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, list | tuple | set):
        return list(thing)
    if isinstance(thing, dict):
        return list(thing.values())
    if inspect.ismethod(thing):
        return [thing.__self__, thing.__func__]
    if inspect.isfunction(thing):
        cells = [cell.cell_contents for cell in thing.__closure__ or () if cell != _EMPTY]
        return [*cells, *(thing.__globals__[name] for name in _names(thing.__code__) if name in thing.__globals__)]
    foreign = (
        inspect.ismodule(thing) or inspect.isclass(thing) or type(thing).__module__.startswith(("torch", "builtins"))
    )
    return [] if foreign else list(getattr(thing, "__dict__", {}).values())


def _names(code: Any) -> set[str]:
    """Names that a function looks up, also in comprehensions and functions inside of it."""
    return set(code.co_names).union(*(_names(c) for c in code.co_consts if inspect.iscode(c)))


class PixelClassifier(nn.Module):
    """Images `(N, 3, H, W)` in [0, 1] to logits `(N, C)` in float32; normalisation and resizing are layers of it.

    An attack then clamps where images live, and a budget of 8/255 means the same for every network. The network
    itself is evaluated in float32 without autocast; one with other weights is copied, the caller's stays as it is.
    Mode and `requires_grad` of the network are left alone: hold it by [`~hf_robust.attacks.frozen`].

    Args:
        model (`nn.Module` or `Callable`): the network.
        mean (`Sequence[float]`, *optional*): subtracted from each colour; default: nothing.
        std (`Sequence[float]`, *optional*): divides each colour; default: nothing.
        input_size (`tuple[int, int]`, *optional*): `(H, W)` that the network takes; images of another size are
            resized on the way, differentiably. Default: whatever comes.
        interpolation (`str`, defaults to `"bicubic"`): `"nearest"`, `"bilinear"` or `"bicubic"`, the latter two with
            antialiasing as in image processors.
        image_size (`int`, *optional*): side in pixels of the images to be evaluated, the space of the attack.
        num_classes (`int`, *optional*): outputs; default: known after the first images.
        label_names (`Sequence[str]`, *optional*): names of the classes, in the order of the outputs.
        name (`str`): how reports call it.
        branch (`str`, *optional*): norm branch of a training model; default: the one that leaves.
        facts (`Mapping`, *optional*): what else reports should say about it.

    Raises:
        ValueError: for mean without std or std with a zero, or a function around a network in training mode.
    """

    model: nn.Module | None
    _mean: Tensor | None
    _std: Tensor | None

    def __init__(
        self,
        model: nn.Module | Callable[[Tensor], Any],
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        input_size: tuple[int, int] | None = None,
        interpolation: str = "bicubic",
        image_size: int | None = None,
        num_classes: int | None = None,
        label_names: Sequence[str] | None = None,
        name: str = "classifier",
        branch: str | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if (mean is None) != (std is None) or (std is not None and not (all(std) and len(std) == len(mean or ()))):
            raise ValueError(
                f"mean={mean} and std={std} belong together, one number per colour each, std without zeros: pass "
                "both, or neither for a network that normalises by itself"
            )
        self.notes: list[str] = []  # sentences for the report
        self.model = self._float32(model) if isinstance(model, nn.Module) else None
        self._function = None if isinstance(model, nn.Module) else _checked(model)
        self._calls = "plain"
        if isinstance(self.model, RobustModelForPreTraining):
            self._calls, self.branch = "training", branch or self.model.default_branch
        elif hasattr(self.model, "config") and hasattr(self.model, "from_pretrained"):
            self._calls = "transformers"
        for key, values in (("mean", mean), ("std", std)):
            value = None if values is None else torch.tensor(list(values), dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(f"_{key}", value if value is None else value.to(self.device), persistent=False)
        self.input_size, self.interpolation, self.image_size = input_size, interpolation, image_size
        self.num_classes = num_classes
        self.label_names = tuple(map(str, label_names)) if label_names else None
        self.name, self._facts = name, dict(facts or {})

    @property
    def device(self) -> torch.device:
        """Where its weights are; the CPU where it has none."""
        first = (tensor.device for network in self.networks for tensor in (*network.parameters(), *network.buffers()))
        return next(first, torch.device("cpu"))

    @property
    def networks(self) -> list[nn.Module]:
        """The network, or those inside of the function."""
        return [self.model] if self.model is not None else modules_inside(cast(Any, self._function))

    @contextlib.contextmanager
    def held(self) -> Iterator[PixelClassifier]:
        """Evaluation mode without gradients of weights, also for networks inside of a function; then as before."""
        with contextlib.ExitStack() as stack:
            for network in (self, *self.networks):
                stack.enter_context(frozen(network))
            yield self

    def _float32(self, model: nn.Module) -> nn.Module:
        others = {t.dtype for t in model.state_dict().values() if t.is_floating_point()} - {torch.float32}
        if not others:
            return model
        names = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in others))
        self.notes.append(f"The weights are {names}; a float32 copy of the model was evaluated.")
        return copy.deepcopy(model).float()

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images.

        Args:
            images (`torch.Tensor` of shape `(N, C, H, W)`): pixels in [0, 1], float.

        Returns:
            `torch.Tensor` of shape `(N, num_classes)`: float32.

        Raises:
            ValueError: for integer pixels, or a network that gives no logits.
        """
        if not images.is_floating_point():
            raise ValueError(f"pixels must be floats in [0, 1], got {images.dtype}: write images.float() / 255")
        with torch.autocast(images.device.type, enabled=False):
            x = images.float()
            if self.input_size is not None and tuple(x.shape[-2:]) != self.input_size:
                smooth = self.interpolation != "nearest"
                x = interpolate(x, self.input_size, mode=self.interpolation, antialias=smooth)
            if self._mean is not None and self._std is not None:
                x = (x - self._mean) / self._std
            logits = logits_of(self._call(x))
        if self.num_classes is None:
            self.num_classes = logits.shape[1]
        return logits

    def _call(self, x: Tensor) -> Any:
        if self._function is not None:
            return self._function(x)
        model = cast(Any, self.model)
        if self._calls == "training":
            return model.embed(x, self.branch)
        return model(pixel_values=x) if self._calls == "transformers" else model(x)

    def fingerprint(self) -> str:
        """A short hash of weights and preprocessing: two evaluations of one fingerprint may share their parts.

        Returns:
            `str`: 16 hexadecimal digits.
        """
        digest = hashlib.sha256(repr((self.input_size, self.interpolation, getattr(self, "branch", None))).encode())
        weights = [tensor for network in self.networks for tensor in network.state_dict().values()]
        for tensor in [*(t for t in (self._mean, self._std) if t is not None), *weights]:
            digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def facts(self) -> dict[str, Any]:
        """What reports say about the model.

        Returns:
            `dict[str, Any]`: name, kind, parameters, classes, preprocessing; plain Python.
        """
        values = {
            "name": self.name,
            "kind": type(self.model or self._function).__name__,
            "parameters": sum(p.numel() for network in self.networks for p in network.parameters()),
            "num_classes": self.num_classes,
            "image_size": self.image_size,
            "network_input_size": list(self.input_size) if self.input_size else None,
            "interpolation": self.interpolation if self.input_size else None,
            "mean": None if self._mean is None else self._mean.flatten().tolist(),
            "std": None if self._std is None else self._std.flatten().tolist(),
            "norm_branch": getattr(self, "branch", None),
        }
        return {key: value for key, value in {**values, **self._facts}.items() if value is not None}


def _checked(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    if not callable(function):
        raise ValueError(
            f"a classifier is a module, a function of images, a folder or a Hub repository, got "
            f"{type(function).__name__}: pass one of these"
        )
    if any(network.training for network in modules_inside(function)):
        raise ValueError(
            "the function is around a network in training mode, whose norm statistics would follow the attacked "
            "images: call .eval() on the network first, or pass the network itself, which is then held and put back"
        )
    return function
