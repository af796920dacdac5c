"""A frozen copy of a network for many passes in evaluation mode, norm layers folded into convolutions."""

from __future__ import annotations

import copy
import logging
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from .modeling import InputNormalization
from .norm import NormBranches, export_branch

__all__ = ["FoldedNetwork"]

logger = logging.getLogger(__name__)

CACHE_PIXELS = 256 * 32 * 32  # of images that pass together on a CPU, so that they stay in its caches
_FUSED = {(nn.Conv2d, nn.BatchNorm2d): fuse_conv_bn_eval, (nn.Linear, nn.BatchNorm1d): fuse_linear_bn_eval}


class FoldedNetwork:
    """Stands in for a pre-training model while its weights stand still; the same function up to rounding.

    In evaluation mode a norm layer after a convolution is a scale and a shift, which the convolution can take over:
    fewer passes over memory per image, forward and backward. Low-rank adapters become part of the weights, too. One
    network per path is copied, when the path is first asked for; a backbone that cannot be traced, or whose folded
    form does not agree, is copied as it is. `head` is the model's own, `embed` passes a folded copy of it.

    Better than the model itself for an attack of several steps: nothing is folded or cast twice. The copies know
    nothing of later changes of the model; after each of them, call `refresh`.

    Args:
        model (`Any`): a [`RobustModelForPreTraining`], in any mode; its evaluation mode is copied.
        dtype (`torch.dtype`, *optional*): half precision to compute in. Weights are cast once per refresh, the
            convolution that sees the images keeps float32. Default: that of the model, or of the autocast around a
            call.
        compile_options (`Mapping[str, Any]`, *optional*): compile `embed` with these arguments of `torch.compile`,
            such as `{"mode": "reduce-overhead"}`; one graph per path and shape. Default: eager.

    Source: the equations of `torch.nn.utils.fusion`; the mean of the pixels stays outside, since a convolution pads
        normalised images with zeros.
    """

    def __init__(
        self, model: Any, dtype: torch.dtype | None = None, compile_options: Mapping[str, Any] | None = None
    ) -> None:
        self._model, self._dtype, self._compile_options = model, dtype, compile_options
        self.switch, self.head_module, self.config = model.switch, model.head_module, model.config
        self._copies: dict[str, _Copy] = {}
        self._stale: set[str] = set()

    def copy_of(self, path: str) -> _Copy:
        """The copied network of a path, up to date.

        Args:
            path (`str`): one of the model's `paths`, such as a norm branch.

        Raises:
            ValueError: for an unknown path; the message lists the known ones.
        """
        self._model.norm_branch(path)
        device = next(self._model.parameters()).device
        known = path in self._copies and next(self._copies[path].parameters()).device == device
        if known and path not in self._stale:
            return self._copies[path]
        # Asked for from inside an attack, which may run in half precision: folding is done in that of the weights.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            if known:
                self._copies[path].refold()
            else:
                self._copies[path] = _Copy(self._model, path, self._dtype)
        if not known and self._compile_options is not None:
            self._copies[path].compile(dynamic=False, **self._compile_options)
        self._stale.discard(path)
        return self._copies[path]

    def refresh(self) -> FoldedNetwork:
        """Take the present weights and running statistics over, in place, at the next use of each path.

        Returns:
            [`FoldedNetwork`]: itself. What it computes is a pure function of the model's state.
        """
        self._stale.update(self._copies)
        return self

    def folds(self, path: str) -> bool:
        """Whether norm layers of the backbone became part of convolutions on a path."""
        return self.copy_of(path).folded

    def features(self, x: Tensor, branch: str) -> Tensor:
        """Pooled features `(N, num_features)` of images `(N, 3, H, W)` in [0, 1]; on a CPU part by part."""
        return _in_parts(self.copy_of(branch).features, x)

    def head(self, features: Tensor, branch: str) -> Tensor:
        """Head outputs `(N, P)` of features `(N, num_features)`, by the model's own head."""
        return self._model.head(features, branch)

    def embed(self, x: Tensor, branch: str) -> Tensor:
        """Head outputs `(N, P)` of images `(N, 3, H, W)` in [0, 1]."""
        copied = self.copy_of(branch)
        if self._compile_options is None:
            return _in_parts(copied, x)
        with warnings.catch_warnings():  # while tracing, torch looks whether the images have a gradient
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            return copied(x).clone()  # a CUDA graph would write its next output where it wrote this one


def _in_parts(network: Any, x: Tensor) -> Tensor:
    if x.device.type != "cpu":
        return network(x)
    at_once = max(1, CACHE_PIXELS // (x.shape[-2] * x.shape[-1]))
    return network(x) if len(x) <= at_once else torch.cat([network(part) for part in x.split(at_once)])


class _Layer(NamedTuple):
    """A layer of a copy whose weights are computed, and what they are computed from."""

    layer: Any  # of the copy
    source: Any  # convolution or linear layer of the model
    norm: Any  # norm layer of the model, or None
    adapter: Any  # PEFT's layer around the source, or None


class _Copy(nn.Module):
    """The network of one path: input normalisation, backbone, head; in evaluation mode and without gradients."""

    def __init__(self, model: Any, path: str, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype
        self._adapted = model.adapted_layers(path)
        self._computed: list[_Layer] = []
        self._targets: list[Tensor] = []
        self._sources: list[tuple[Any, str]] = []
        branch = model.norm_branch(path)
        seed, normalize, head = torch.Generator().manual_seed(0), model.normalize, model.head_of(branch)
        pixels = torch.rand(2, 3, *[model.config.image_size] * 2, generator=seed).to(next(model.parameters()))
        self.backbone = self._copied(model.backbone, branch, normalize(pixels))
        self.folded = any(c.norm is not None for c in self._computed)
        self.head = self._copied(nn.Sequential(head), branch, torch.rand(2, model.num_features, generator=seed))
        self.normalize: nn.Module = copy.deepcopy(normalize)
        first = _first_convolution(self.backbone) if isinstance(normalize, InputNormalization) else None
        self.shift = first is not None
        self._divide = None if first is None else (self.backbone.get_submodule(first), normalize)
        self.eval().requires_grad_(False)
        self.refold()

    def forward(self, x: Tensor) -> Tensor:
        """Head outputs."""
        if self.dtype is None:
            return self.head(self.backbone(self._normalized(x)))
        with torch.autocast(x.device.type, self.dtype):
            return self.head(self.backbone(self._normalized(x)))

    def features(self, x: Tensor) -> Tensor:
        """Pooled features."""
        if self.dtype is None:
            return self.backbone(self._normalized(x))
        with torch.autocast(x.device.type, self.dtype):
            return self.backbone(self._normalized(x))

    def _normalized(self, x: Tensor) -> Tensor:
        return x - cast(Tensor, self.normalize.mean) if self.shift else self.normalize(x)

    def train(self, mode: bool = True) -> _Copy:
        """Evaluation mode only."""
        return super().train(False)

    def refold(self) -> None:
        """Take over the present state of the model, in place: the same storage, so that compiled graphs stay valid."""
        if self._targets:
            torch._foreach_copy_(self._targets, [getattr(module, name) for module, name in self._sources])
        plain = [c for c in self._computed if c.norm is None]  # adapted, but without a norm to fold
        if plain:
            torch._foreach_copy_([c.layer.weight for c in plain], [_weight(c) for c in plain])
        self._fold([c for c in self._computed if c.norm is not None])
        if self._divide is not None:
            first, normalize = self._divide
            cast(Tensor, first.weight).div_(normalize.std)

    @staticmethod
    def _fold(computed: list[_Layer]) -> None:
        """Weight W f and bias b - (m - c) f, with f = w / sqrt(v + eps) of the norm and c the bias of the layer."""
        if not computed:
            return
        factors = list(torch._foreach_add([c.norm.running_var for c in computed], [c.norm.eps for c in computed]))
        torch._foreach_rsqrt_(factors)
        torch._foreach_mul_(factors, [c.norm.weight for c in computed])
        means = [
            c.norm.running_mean if c.source.bias is None else c.norm.running_mean - c.source.bias for c in computed
        ]
        biases = torch._foreach_sub([c.norm.bias for c in computed], torch._foreach_mul(means, factors))
        torch._foreach_copy_([c.layer.bias for c in computed], biases)
        shaped = [f.view(-1, *[1] * (c.source.weight.dim() - 1)) for c, f in zip(computed, factors, strict=True)]
        weights = torch._foreach_mul([_weight(c) for c in computed], shaped)
        torch._foreach_copy_([c.layer.weight for c in computed], weights)

    def _copied(self, module: nn.Module, branch: str, example: Tensor) -> nn.Module:
        """A copy of a part of the model, its norm layers folded where that is exact, its weights cast."""
        plain = _without_adapters(export_branch(module, branch)).eval().requires_grad_(False)
        folded, pairs = _folded(plain, example)
        if self.dtype is not None:
            _cast(folded, self.dtype)
        four = [p for p in plain.parameters() if p.dim() == 4]
        if four and all(p.is_contiguous(memory_format=torch.channels_last) for p in four):
            folded.to(memory_format=torch.channels_last)
        self._remember(module, branch, folded, pairs)
        return folded

    def _remember(self, module: nn.Module, branch: str, folded: nn.Module, pairs: dict[str, str]) -> None:
        """Where every tensor of the copy comes from in the model."""
        done = set()
        for name, layer in folded.named_modules():
            source, adapter = _live(module, name, branch)
            norm = _live(module, pairs[name], branch)[0] if name in pairs else None
            adapter = adapter if any(adapter is other for other in self._adapted.values()) else None
            if norm is not None or adapter is not None:
                self._computed.append(_Layer(layer, source, norm, adapter))
                done |= {id(layer.weight)} | ({id(layer.bias)} if norm is not None else set())
            for key, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
                if id(tensor) not in done and hasattr(source, key):  # else a constant of the trace
                    self._targets.append(tensor)
                    self._sources.append((source, key))
                    done.add(id(tensor))


def _cast(network: nn.Module, dtype: torch.dtype) -> None:
    """Convolutions and linear layers in half precision, except for the one that sees the images."""
    first = _first_convolution(network)
    if first is not None:
        network.set_submodule(first, _WideConvolution(cast(nn.Conv2d, network.get_submodule(first)), dtype))
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and not isinstance(layer, _WideConvolution):
            layer.to(dtype)


class _WideConvolution(nn.Conv2d):
    """A convolution in float32 inside a network in half precision, so that its input is not rounded."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device=conv.weight.device,
        )
        self.output_dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """Output in half precision."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float()).to(self.output_dtype)


def _weight(computed: _Layer) -> Tensor:
    weight = computed.source.weight
    if computed.adapter is None:
        return weight
    for name in computed.adapter.active_adapters:
        weight = weight + computed.adapter.get_delta_weight(name)
    return weight


def _without_adapters(module: nn.Module) -> nn.Module:
    """The plain layers in the places of PEFT's, in place; they are recognised by their `base_layer`."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "base_layer"):
                setattr(parent, name, child.base_layer)
    return module


def _live(module: nn.Module, name: str, branch: str) -> tuple[Any, Any]:
    """The module of a model that a name of its plain copy stands for, and PEFT's layer around it, if any."""
    found: Any = module
    adapter = None
    for part in name.split(".") if name else ():
        found, adapter = getattr(found, part), None
        if isinstance(found, NormBranches):
            found = getattr(found, branch)
        if hasattr(found, "base_layer"):
            found, adapter = found.base_layer, found
    return found, adapter


def _first_convolution(network: nn.Module) -> str | None:
    """Name of the convolution that alone reads the images, in a traced network."""
    nodes = list(network.graph.nodes) if isinstance(network, fx.GraphModule) else []
    readers = [n for n in nodes if n.op != "placeholder" and any(a.op == "placeholder" for a in n.all_input_nodes)]
    if [r.op for r in readers] != ["call_module"]:
        return None
    name = str(readers[0].target)
    first = network.get_submodule(name)
    return name if isinstance(first, nn.Conv2d) and first.groups == 1 else None


def _folded(plain: nn.Module, x: Tensor) -> tuple[nn.Module, dict[str, str]]:
    """A folded copy and the norms that each layer has taken in; the network itself where that does not work."""
    x = x.to(next(plain.parameters(), x))  # the features themselves, where there is no head
    try:
        folded, pairs = _fuse(plain)
        folded.eval().requires_grad_(False)
        expected = plain(x)
        # One percent: convolutions in reduced precision (TF32) differ by a tenth of that, a wrong fold by far more.
        agrees = bool((folded(x) - expected).norm() <= 1e-2 * expected.norm())
    except Exception as error:  # whatever tracing may raise on a network of a third party
        logger.info("the network is not folded: %s", error)
        return plain, {}
    if not agrees:
        logger.info("the network is not folded: its folded form differs on random images")
        return plain, {}
    return folded, pairs


def _fuse(network: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """A traced copy in which every batch norm that alone reads a layer has become part of it; layer to norm."""
    traced = fx.symbolic_trace(copy.deepcopy(network))
    modules = dict(traced.named_modules())
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    pairs = {}
    for node in list(traced.graph.nodes):
        source = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        layer, norm = modules[str(source.target)], modules[str(node.target)]
        fuse: Any = _FUSED.get((type(layer), type(norm)))  # type: ignore[arg-type]
        if fuse is None or norm.running_mean is None or not norm.affine:
            continue
        if len(source.users) > 1 or calls[source.target] > 1 or calls[node.target] > 1:
            continue
        traced.set_submodule(str(source.target), fuse(layer, norm))
        pairs[str(source.target)] = str(node.target)
        node.replace_all_uses_with(source)
        traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced, pairs
