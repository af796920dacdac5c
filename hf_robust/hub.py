"""The encoder leaves the house: one norm branch, timm's own names, loadable by the Auto classes of transformers.

Architectures that stock timm builds become an ordinary timm repository (`model_type: timm_wrapper`) that needs nothing
of ours. CIFAR stems and wide ResNets get a model type of their own with the code files beside the weights, and CIFAR
ResNets also a subfolder ``native/`` with their exact re-expression on stock timm.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel

from hf_robust import __version__
from hf_robust.models import backbones, encoder
from hf_robust.models.backbones import native_architecture
from hf_robust.models.modeling import RobustModelForPreTraining, RobustPretrainingConfig
from hf_robust.models.native import UPSAMPLING, stock_architecture, to_stock_resnet
from hf_robust.models.norm import export_branch

__all__ = ["encoder_features", "load_encoder", "save_encoder"]

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


def save_encoder(
    model: RobustModelForPreTraining, directory: str | Path, branch: str = "adv", *, native: bool = True
) -> Path:
    """Writes one norm branch of the backbone as a folder that transformers and timm load.

    The folder holds ``model.safetensors`` with timm's own keys, ``config.json`` (which records `norm_branch`,
    `image_size` and `hf_robust_version`) and ``preprocessor_config.json``, whose mean and std are the input
    normalisation of the training model. CIFAR stems and wide ResNets also get their code files, and CIFAR ResNets a
    subfolder ``native/`` where stock timm can carry them exactly; `native_subfolder` in the configuration says so.
    Everything is written beside the folder first and then moved in, so that a full disk leaves an earlier export as it
    was. Other files in the folder stay.

    Args:
        model ([`~hf_robust.models.modeling.RobustModelForPreTraining`]): The trained model, or any object with its
            `backbone` and `config`; it is not changed.
        directory (`str` or `Path`): Folder to write, created when missing.
        branch (`str`): The norm branch that leaves. Defaults to `"adv"`; the clean statistics are less robust.
        native (`bool`): Also write ``native/`` for CIFAR ResNets. Defaults to `True`.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: For a branch that the model does not have; the message lists the known ones.
        OSError: When the files cannot be written; an earlier export there is intact.
    """
    target = Path(directory).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"an encoder is a folder, got the file {str(target)!r}: choose another name")
    config: RobustPretrainingConfig = model.config
    branches = tuple(config.norm_branches)
    if branch not in branches:
        raise ValueError(
            f"unknown norm branch {branch!r}: this model has {', '.join(map(repr, branches))}; "
            f"write branch={branches[0]!r} or train with more norm branches"
        )
    backbone = export_branch(model.backbone, branch).cpu().eval()
    args = _model_args(config)
    stock = native_architecture(config.architecture, args)
    if stock is None:
        extra = _native_files(backbone, config, args, branch) if native else {}
        files = _custom_files(backbone, config, args, branch, _NATIVE if extra else None) | extra
    else:
        files = _timm_files(backbone, config, *stock, branch)
    _replace_files(target, files)
    logger.info("wrote norm branch %r of %s to %s", branch, config.architecture, target)
    return target


def load_encoder(directory_or_repo: str | Path, **kwargs: Any) -> PreTrainedModel:
    """An encoder from a folder of [`save_encoder`] or from a Hub repository, ready to use.

    Weights are read from safetensors only, never from pickles, and no code of the repository is run.

    Args:
        directory_or_repo (`str` or `Path`): Folder, or name of a Hub repository ``"user/name"``.
        **kwargs (`Any`): Passed on to `AutoModel.from_pretrained` (`subfolder`, `revision`, `token`, `dtype` ...).

    Returns:
        `transformers.PreTrainedModel`: In eval mode. Called with normalised images `(N, 3, H, W)` its output holds
        `pooler_output` `(N, num_features)`; [`encoder_features`] takes pixels in [0, 1] instead.

    Raises:
        FileNotFoundError: When there is neither such a folder nor such a repository.
        ValueError: When the folder holds something else: a training checkpoint, no or damaged weights.
    """
    if kwargs.get("use_safetensors") is False or kwargs.get("trust_remote_code"):
        raise ValueError(
            "load_encoder reads safetensors only and runs no code of a repository: leave use_safetensors and "
            "trust_remote_code out, or call transformers.AutoModel.from_pretrained yourself"
        )
    kwargs = {**kwargs, "use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    source = str(directory_or_repo)
    if _is_path(directory_or_repo):
        source = str(Path(source).expanduser())
        _check_folder(Path(source), str(kwargs.get("subfolder") or ""))
    try:
        model, info = AutoModel.from_pretrained(source, **kwargs)
    except OSError as error:
        if os.path.isdir(source):
            raise
        raise FileNotFoundError(
            f"no encoder {source!r}: there is no such folder, and it could not be read as a Hub repository "
            f"({str(error).splitlines()[0]}); write the path of a folder written by save_encoder, or 'user/name'"
        ) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"the weights of {source!r} lack {len(missing)} tensors of {model.config.architecture} "
            f"({', '.join(missing[:3])} ...), which would stay random: export the encoder again with save_encoder"
        )
    return model.eval()


def encoder_features(
    encoder: nn.Module, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The encoder as a function of pixels in [0, 1], the space in which attack budgets are measured.

    Args:
        encoder (`transformers.PreTrainedModel`): From [`load_encoder`] or `AutoModel.from_pretrained`, a ``native/``
            encoder included; its train mode and gradients are left as they are.
        mean (`Sequence[float]`, *optional*): Subtracted from the pixels. Defaults to the encoder's own, which its
            image processor applies too.
        std (`Sequence[float]`, *optional*): Divides the pixels. Defaults to the encoder's own.

    Returns:
        `Callable`: Maps images `(N, 3, H, W)` in [0, 1] to pooled features `(N, num_features)`, differentiably; equal
        to `features(x, branch)` of the training model.

    Raises:
        ValueError: When the encoder's configuration does not say its mean and std.
    """
    config: Any = encoder.config
    own = getattr(config, "pretrained_cfg", None) or {}
    mean, std = mean or own.get("mean"), std or own.get("std")
    if mean is None or std is None:
        raise ValueError(
            f"the configuration of this {type(encoder).__name__} does not say how its pixels are normalised: "
            "pass mean=(...) and std=(...) of its image processor"
        )
    device = next(encoder.parameters()).device
    shift, scale = (torch.tensor(v, dtype=torch.float32, device=device).view(-1, 1, 1) for v in (mean, std))
    factor = getattr(config, "upsampling", None) or 1

    def features(x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point():
            raise ValueError(f"pixels must be floats in [0, 1], got {x.dtype}: write images.float() / 255")
        x = (x - shift.to(x)) / scale.to(x)
        if factor != 1:
            x = F.interpolate(x, scale_factor=factor, mode="nearest")
        return encoder(pixel_values=x).pooler_output.flatten(1)

    return features


def _model_args(config: RobustPretrainingConfig) -> dict[str, Any]:
    """Constructor arguments as JSON has them, the image size included where the architecture is built for one."""
    args = {key: value for key, value in (config.model_args or {}).items() if value is not None}
    timm_cfg = timm.get_pretrained_cfg(config.architecture)
    if timm_cfg is not None and timm_cfg.fixed_input_size:
        args.setdefault("img_size", config.image_size)
    return json.loads(json.dumps(args))


def _base_config(
    backbone: Any,
    config: RobustPretrainingConfig,
    architecture: str,
    args: dict[str, Any],
    branch: str,
    scale: int = 1,
) -> dict[str, Any]:
    """What timm and transformers need to rebuild the network, and where it comes from."""
    timm_cfg = timm.get_pretrained_cfg(architecture) or timm.models.PretrainedCfg()
    size = args.get("img_size", config.image_size)
    height, width = (size, size) if isinstance(size, int) else size
    pool = getattr(backbone, "global_pool", None)
    return {
        "architecture": architecture.partition(".")[0],  # a tag would promise somebody else's weights
        "num_classes": 0,
        "num_features": backbone.num_features,
        "global_pool": pool if isinstance(pool, str) else getattr(pool, "pool_type", None),
        "model_args": args,  # never null: timm's loader calls .get on it
        "label_names": [],
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
            "num_classes": 0,
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
    upsampling: int = 1,
) -> dict[str, bytes]:
    """A stock timm repository: its image processor reads `pretrained_cfg`."""
    out = {
        "model_type": "timm_wrapper",
        "architectures": ["TimmWrapperModel"],
        **_base_config(backbone, config, architecture, args, branch, upsampling),
    }
    processor = {key: out[key] for key in ("architecture", "pretrained_cfg")}
    processor["image_processor_type"] = "TimmWrapperImageProcessor"
    if upsampling != 1:
        out |= {"upsampling": upsampling, "native_of": config.architecture}
    return {_WEIGHTS: _weights(backbone), _CONFIG: _json(out), _PROCESSOR: _json(processor)}


def _custom_files(
    backbone: nn.Module, config: RobustPretrainingConfig, args: dict[str, Any], branch: str, subfolder: str | None
) -> dict[str, bytes]:
    """Own model type with its code beside it, and an image processor that needs neither."""
    base = _base_config(backbone, config, config.architecture, args, branch)
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
    out = {
        "model_type": encoder.RobustTimmConfig.model_type,
        "architectures": [encoder.RobustTimmModel.__name__],
        "auto_map": _AUTO_MAP,
        **base,
        **kind,
        "native_subfolder": subfolder,
    }
    code = {name: Path(str(module.__file__)).read_bytes() for name, module in _CODE.items()}
    return {_WEIGHTS: _weights(backbone), _CONFIG: _json(out), _PROCESSOR: _json(processor), **code}


def _native_files(
    backbone: nn.Module, config: RobustPretrainingConfig, args: dict[str, Any], branch: str
) -> dict[str, bytes]:
    """The re-expression on stock timm, or nothing when there is none."""
    stock = stock_architecture(config.architecture, args)
    net = to_stock_resnet(backbone, config.architecture, args, mean=config.mean, std=config.std)
    if stock is None or net is None:
        logger.info("stock timm cannot carry %s %s exactly: no native/ subfolder", config.architecture, args)
        return {}
    files = _timm_files(net, config, *stock, branch, upsampling=UPSAMPLING)
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


def _replace_files(target: Path, files: dict[str, bytes]) -> None:
    """Writes all files beside the target, then moves them in one by one; what an older export left over goes."""
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
        earlier = f"{moved} files are already replaced" if moved else "an encoder exported there earlier is intact"
        raise OSError(
            error.errno,
            f"cannot write the encoder to {str(target)!r} ({error.strerror}); {earlier}: "
            f"make {sum(map(len, files.values())) / 1e6:.1f} MB of room or choose another folder",
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    for name in {*_CODE, *(f"{_NATIVE}/{name}" for name in (_WEIGHTS, _CONFIG, _PROCESSOR))} - set(files):
        (target / name).unlink(missing_ok=True)
    if (target / _NATIVE).is_dir() and not any((target / _NATIVE).iterdir()):
        (target / _NATIVE).rmdir()


def _is_path(source: str | Path) -> bool:
    text = str(source)
    return (
        isinstance(source, Path)
        or os.path.isdir(Path(text).expanduser())
        or text.startswith(("/", ".", "~"))
        or os.sep != "/"
        and os.sep in text
        or text.count("/") > 1
    )


def _check_folder(folder: Path, subfolder: str) -> None:
    """Says what is wrong with a folder before transformers says it in its own way."""
    place = folder / subfolder
    if not place.is_dir():
        raise FileNotFoundError(f"no folder {str(place)!r}: write the path of a folder written by save_encoder")
    if not (place / _CONFIG).is_file():
        inner = place / "encoder"
        hint = f"its encoder is in {str(inner)!r}" if (inner / _CONFIG).is_file() else "write one with save_encoder"
        raise ValueError(f"{str(place)!r} is not an encoder, it has no {_CONFIG}: {hint}")
    try:
        model_type = json.loads((place / _CONFIG).read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{str(place / _CONFIG)!r} is not a configuration ({error}): export the encoder again with save_encoder"
        ) from error
    if model_type == RobustPretrainingConfig.model_type:
        raise ValueError(
            f"{str(place)!r} is a training checkpoint, which holds all norm branches and the projector: load the "
            "'encoder' folder of its run, or export one with "
            "save_encoder(RobustModelForPreTraining.from_pretrained(checkpoint), directory)"
        )
    weights = sorted(place.glob("*.safetensors"))
    if not weights:
        pickled = [p.name for p in place.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        found = f"only {', '.join(pickled)}, which could run code when opened" if pickled else "no weights at all"
        raise ValueError(f"{str(place)!r} has no {_WEIGHTS} but {found}: export the encoder with save_encoder")
    for path in weights:
        try:
            with safetensors.safe_open(path, framework="pt"):
                pass
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(
                f"{str(path)!r} is damaged or incomplete ({path.stat().st_size} bytes; {error}): "
                "copy or download it again, or export the encoder again with save_encoder"
            ) from error
