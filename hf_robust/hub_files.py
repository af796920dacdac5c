"""The files of a released network: timm's weights and configuration, an image processor, code where it is needed.

What is written here is read by people without this package, so the layout is timm's and transformers', not ours.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import timm
import torch
from torch import nn

from hf_robust import __version__
from hf_robust.models import backbones, encoder
from hf_robust.models.backbones import native_architecture
from hf_robust.models.modeling import RobustPretrainingConfig
from hf_robust.models.native import UPSAMPLING, stock_architecture, to_stock_resnet
from hf_robust.models.norm import export_branch

__all__ = ["network_files", "replace_files"]

logger = logging.getLogger(__name__)

_WEIGHTS, _CONFIG, _PROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
_NATIVE = "native"
_CODE = {Path(str(module.__file__)).name: module for module in (backbones, encoder)}
_AUTO_MAP = {
    "AutoConfig": "encoder.RobustTimmConfig",
    "AutoModel": "encoder.RobustTimmModel",
    "AutoModelForImageClassification": "encoder.RobustTimmForImageClassification",
}
_BICUBIC = 3  # PIL's number


def network_files(
    model: Any, branch: str, *, native: bool = True, label_names: Sequence[str] | None = None
) -> dict[str, bytes]:
    """Everything that a folder needs to be loaded by transformers and timm, in memory.

    Args:
        model ([`~hf_robust.models.modeling.RobustModelForPreTraining`]): Or any object with its `backbone` and
            `config`; it is not changed.
        branch (`str`): Norm branch to take.
        native (`bool`): Also re-express CIFAR ResNets on stock timm. Defaults to `True`.
        label_names (`Sequence[str]`, *optional*): One name per class: takes the model's classifier along. The
            backbone alone by default.

    Returns:
        `dict[str, bytes]`: Names relative to the folder, and contents.

    Raises:
        ValueError: For a branch that the model does not have, or a classifier where timm has none such.
    """
    config: RobustPretrainingConfig = model.config
    branches = tuple(config.norm_branches)
    if branch not in branches:
        raise ValueError(
            f"unknown norm branch {branch!r}: this model has {', '.join(map(repr, branches))}; "
            f"write branch={branches[0]!r} or train with more norm branches"
        )
    backbone = export_branch(model.backbone, branch).cpu().eval()
    head = None if label_names is None else _Head(model.classifier, tuple(label_names))
    args = _model_args(config)
    stock = native_architecture(config.architecture, args)
    if stock is not None:
        return _timm_files(backbone, config, *stock, branch, head)
    extra = _native_files(backbone, config, args, branch, head) if native else {}
    return _custom_files(backbone, config, args, branch, head, _NATIVE if extra else None) | extra


@dataclass(frozen=True)
class _Head:
    """The classifier that goes along, and what its outputs are called."""

    linear: nn.Linear
    label_names: tuple[str, ...]


def _model_args(config: RobustPretrainingConfig) -> dict[str, Any]:
    """Constructor arguments as JSON has them, the image size included where the architecture is built for one."""
    args = {key: value for key, value in (config.model_args or {}).items() if value is not None}
    timm_cfg = timm.get_pretrained_cfg(config.architecture)
    if timm_cfg is not None and timm_cfg.fixed_input_size:
        args.setdefault("img_size", config.image_size)
    return json.loads(json.dumps(args))


@torch.no_grad()
def _with_head(backbone: nn.Module, head: _Head | None) -> nn.Module:
    """The network with the classifier where timm has it, under timm's name."""
    if head is None:
        return backbone
    net, trained = cast(Any, copy.deepcopy(backbone)), head.linear
    with torch.random.fork_rng(devices=[]):  # the fresh classifier is replaced
        net.reset_classifier(trained.out_features)
    fresh = net.get_classifier()
    added = {f"{name}.{end}" for name, m in net.named_modules() if m is fresh for end in ("weight", "bias")}
    if (
        not isinstance(fresh, nn.Linear)
        or fresh.weight.shape != trained.weight.shape
        or set(net.state_dict()) - set(backbone.state_dict()) != added
    ):
        raise ValueError(
            f"timm's classifier of {type(net).__name__} is {type(fresh).__name__}, not one linear layer on the "
            f"{trained.in_features} features: choose another architecture, or release the encoder alone "
            "(save_encoder)"
        )
    fresh.weight.copy_(trained.weight)
    fresh.bias.copy_(trained.bias)
    return net.eval()


def _base_config(
    backbone: Any,
    config: RobustPretrainingConfig,
    architecture: str,
    args: dict[str, Any],
    branch: str,
    head: _Head | None,
    scale: int = 1,
) -> dict[str, Any]:
    """What timm and transformers need to rebuild the network, and where it comes from."""
    timm_cfg = timm.get_pretrained_cfg(architecture) or timm.models.PretrainedCfg()
    size = args.get("img_size", config.image_size)
    height, width = (size, size) if isinstance(size, int) else size
    pool = getattr(backbone, "global_pool", None)
    names = head.label_names if head is not None else ()
    return {
        "architecture": architecture.partition(".")[0],  # a tag would promise somebody else's weights
        "num_classes": len(names),
        "num_features": backbone.num_features,
        "global_pool": pool if isinstance(pool, str) else getattr(pool, "pool_type", None),
        "model_args": args,  # never null: timm's loader calls .get on it
        "label_names": list(names),  # never null: 1000 classes would be taken for ImageNet's
        "pretrained_cfg": {
            "tag": "hf_robust",
            "custom_load": False,
            "input_size": [3, height * scale, width * scale],
            # True makes timm pass img_size to the constructor, which only some architectures take
            "fixed_input_size": bool(timm_cfg.fixed_input_size),
            "interpolation": "bicubic" if scale == 1 else "nearest",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": list(config.mean or (0.0, 0.0, 0.0)),
            "std": list(config.std or (1.0, 1.0, 1.0)),
            "num_classes": len(names),
            "pool_size": None,
            "first_conv": timm_cfg.first_conv,
            "classifier": timm_cfg.classifier,
        },
        "norm_branch": branch,
        "image_size": config.image_size,
        "hf_robust_version": __version__,
    }


def _timm_files(
    backbone: nn.Module,
    config: RobustPretrainingConfig,
    architecture: str,
    args: dict[str, Any],
    branch: str,
    head: _Head | None,
    upsampling: int = 1,
) -> dict[str, bytes]:
    """A stock timm repository: its image processor reads `pretrained_cfg`."""
    out = {
        "model_type": "timm_wrapper",
        "architectures": ["TimmWrapperModel" if head is None else "TimmWrapperForImageClassification"],
        **_base_config(backbone, config, architecture, args, branch, head, upsampling),
    }
    processor = {key: out[key] for key in ("architecture", "pretrained_cfg")}
    processor["image_processor_type"] = "TimmWrapperImageProcessor"
    if upsampling != 1:
        out |= {"upsampling": upsampling, "native_of": config.architecture}
    weights = _weights(_with_head(backbone, head))
    return {_WEIGHTS: weights, _CONFIG: _json(out), _PROCESSOR: _json(processor)}


def _custom_files(
    backbone: nn.Module,
    config: RobustPretrainingConfig,
    args: dict[str, Any],
    branch: str,
    head: _Head | None,
    subfolder: str | None,
) -> dict[str, bytes]:
    """Own model type with its code beside it, and an image processor that needs neither."""
    base = _base_config(backbone, config, config.architecture, args, branch, head)
    _, height, width = base["pretrained_cfg"]["input_size"]
    # Named in the configuration too: a folder with a `pretrained_cfg` is asked for it there first.
    kind = {"image_processor_type": "ViTImageProcessor"}
    processor = {
        **kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": base["pretrained_cfg"]["mean"],
        "image_std": base["pretrained_cfg"]["std"],
    }
    cls = encoder.RobustTimmForImageClassification if head else encoder.RobustTimmModel
    out = {
        "model_type": encoder.RobustTimmConfig.model_type,
        "architectures": [cls.__name__],
        "auto_map": _AUTO_MAP,
        **base,
        **kind,
        "native_subfolder": subfolder,
    }
    code = {name: Path(str(module.__file__)).read_bytes() for name, module in _CODE.items()}
    return {_WEIGHTS: _weights(_with_head(backbone, head)), _CONFIG: _json(out), _PROCESSOR: _json(processor), **code}


def _native_files(
    backbone: nn.Module,
    config: RobustPretrainingConfig,
    args: dict[str, Any],
    branch: str,
    head: _Head | None,
) -> dict[str, bytes]:
    """The re-expression on stock timm, or nothing when there is none."""
    stock = stock_architecture(config.architecture, args)
    net = to_stock_resnet(backbone, config.architecture, args, mean=config.mean, std=config.std)
    if stock is None or net is None:
        logger.info("stock timm cannot carry %s %s exactly: no native/ subfolder", config.architecture, args)
        return {}
    files = _timm_files(net, config, *stock, branch, head, upsampling=UPSAMPLING)
    return {f"{_NATIVE}/{name}": data for name, data in files.items()}


def _weights(module: nn.Module) -> bytes:
    # Clones: safetensors refuses tensors that share memory.
    state = {key: value.detach().cpu().clone().contiguous() for key, value in module.state_dict().items()}
    return safetensors.torch.save(state, metadata={"format": "pt"})


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _write_file(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # some file systems report a full disk only now


def replace_files(directory: str | Path, files: dict[str, bytes], what: str = "an encoder") -> Path:
    """Writes all files beside the target, then moves them in one by one; what an older export left over goes.

    Args:
        directory (`str` or `Path`): The folder, created when missing; other files in it stay.
        files (`dict[str, bytes]`): Names relative to the folder (at most one folder deep), and contents.
        what (`str`): What the folder holds, with its article, for messages. Defaults to `"an encoder"`.

    Returns:
        `Path`: The folder.

    Raises:
        NotADirectoryError: For a file.
        OSError: When the files cannot be written; the message says whether an earlier export is intact.
    """
    target = Path(directory).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{what} is a folder, got the file {str(target)!r}: choose another name")
    folders = {Path(name).parent for name in files}
    temporary: Path | None = None
    moved = 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        for folder in folders:
            (temporary / folder).mkdir(exist_ok=True)
        for name, data in files.items():
            _write_file(temporary / name, data)
        for folder in folders:
            (target / folder).mkdir(parents=True, exist_ok=True)
        for name in files:
            os.replace(temporary / name, target / name)
            moved += 1
    except OSError as error:
        earlier = f"{moved} files are already replaced" if moved else f"{what} exported there earlier is intact"
        raise OSError(
            error.errno,
            f"cannot write the {what.partition(' ')[2]} to {str(target)!r} ({error.strerror}); {earlier}: "
            f"make {sum(map(len, files.values())) / 1e6:.1f} MB of room or choose another folder",
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    for name in {*_CODE, *(f"{_NATIVE}/{name}" for name in (_WEIGHTS, _CONFIG, _PROCESSOR))} - set(files):
        (target / name).unlink(missing_ok=True)
    if (target / _NATIVE).is_dir() and not any((target / _NATIVE).iterdir()):
        (target / _NATIVE).rmdir()
    return target
