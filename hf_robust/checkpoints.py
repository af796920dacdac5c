"""Complete or not at all: a checkpoint counts only once its manifest is written, after everything else."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

__all__ = [
    "check_run",
    "describe_run",
    "discard",
    "fingerprint",
    "is_write_error",
    "latest_complete",
    "open_for_writing",
    "to_resume",
    "verify",
    "write_manifest",
    "write_run",
]

_MANIFEST = "manifest.json"
_RUN = "run.json"


def write_manifest(checkpoint: str | Path) -> None:
    """Declare a checkpoint folder complete: the size of every file, written last and in one move.

    Args:
        checkpoint (`str` or `Path`): folder whose files are all on disk.
    """
    folder = Path(checkpoint)
    sizes = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    temporary = folder / f"{_MANIFEST}.tmp"
    for own in (_MANIFEST, temporary.name):  # left by an earlier attempt to write this checkpoint
        sizes.pop(own, None)
    with open(temporary, "w") as file:
        json.dump(sizes, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / _MANIFEST)


def verify(checkpoint: str | Path) -> None:
    """Check that a checkpoint is there, complete and as long as when it was written.

    Args:
        checkpoint (`str` or `Path`): folder `checkpoint-N` of a run of this library.

    Raises:
        ValueError: naming the folder, what is wrong and which checkpoint to use instead.
    """
    folder = Path(checkpoint)
    problem = _problem(folder)
    if problem is None:
        return
    other = latest_complete(folder.parent) if folder.parent.is_dir() else None
    way_out = f"resume from {other} instead" if other else "start again without --resume_from_checkpoint"
    raise ValueError(f"cannot resume from {str(folder)!r}: {problem}; {way_out}")


def latest_complete(output_dir: str | Path) -> str | None:
    """Find the newest complete checkpoint of a run.

    Args:
        output_dir (`str` or `Path`): the run's output folder.

    Returns:
        `str` or `None`: path of the checkpoint with the highest step that passes `verify`.
    """
    root = Path(output_dir)
    found = [p for p in root.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)] if root.is_dir() else []
    for folder in sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True):
        if _problem(folder) is None:
            return str(folder)
    return None


def to_resume(output_dir: str | Path, asked: str | bool | None) -> str | None:
    """Find the checkpoint a training starts from.

    Args:
        output_dir (`str` or `Path`): the run's output folder.
        asked (`str`, `bool` or `None`): a path; `True` for the newest complete checkpoint; else a fresh start.

    Returns:
        `str` or `None`: path of a complete checkpoint; `None` for a fresh start.

    Raises:
        ValueError: if there is nothing to resume, the checkpoint is damaged, or a fresh start would mix with an
            earlier run.
    """
    latest = latest_complete(output_dir)
    if asked is True:
        if latest is None:
            raise ValueError(
                f"cannot resume: {str(output_dir)!r} holds no complete checkpoint; start without "
                "--resume_from_checkpoint"
            )
        return latest
    if asked:
        verify(str(asked))
        return str(asked)
    if latest:
        raise ValueError(
            f"{str(output_dir)!r} holds {Path(latest).name} of an earlier run, which this one would mix "
            "with its own: go on with it by --resume_from_checkpoint true, in Python "
            "trainer.train(resume_from_checkpoint=True), or give another --output_dir"
        )
    return None


def open_for_writing(checkpoint: str | Path) -> None:
    """Make a checkpoint folder count as incomplete until its new manifest is written.

    Args:
        checkpoint (`str` or `Path`): the folder; it need not exist.
    """
    (Path(checkpoint) / _MANIFEST).unlink(missing_ok=True)


def write_run(checkpoint: str | Path, run: dict[str, str]) -> None:
    """Store what a resumed run must agree with.

    Args:
        checkpoint (`str` or `Path`): the folder.
        run (`dict[str, str]`): names to settings, as text.
    """
    (Path(checkpoint) / _RUN).write_text(json.dumps(run, indent=1))


def describe_run(trainer: Any) -> dict[str, str]:
    """What decides the course of a training, and what a checkpoint must therefore agree with to be resumed exactly.

    Args:
        trainer (`RobustTrainer`): about to train.

    Returns:
        `dict[str, str]`: names to settings.
    """
    args, config = trainer.args, trainer.accelerator.unwrap_model(trainer.model).config
    batch = (args.per_device_train_batch_size, args.world_size, args.gradient_accumulation_steps)
    schedule = (args.learning_rate, args.warmup_epochs, args.min_learning_rate, args.lr_granularity)
    return {
        "objective": repr(trainer.objective),
        "attack": repr(trainer.attack),
        "network": f"{config.architecture} {config.model_args} {config.image_size} px",
        "optimizer, momentum, weight decay": repr((args.optimizer, args.momentum, args.weight_decay)),
        "learning rate, warm-up, floor, granularity": repr(schedule),
        "learning rate milestones": repr(args.lr_milestones),
        "epochs, max_steps": repr(trainer._asked_length),
        "coreset": repr(trainer.phases.method),
        "precision": trainer.accelerator.mixed_precision,
        "folded norms, torch.compile": repr((args.fold_norms, args.compile_options)),
        "norm statistics of the whole batch": str(args.sync_norm),
        "batch (images, processes, accumulation)": repr(batch),
        "training images": str(len(trainer.train_dataset)),
        "seed": str(args.seed),
    }


def check_run(checkpoint: str | Path, run: dict[str, str]) -> None:
    """Refuse a checkpoint of another run.

    Args:
        checkpoint (`str` or `Path`): a complete checkpoint folder.
        run (`dict[str, str]`): names to settings of the run that wants to resume.

    Raises:
        ValueError: listing every setting that differs, both values.
    """
    path = Path(checkpoint) / _RUN
    stored = json.loads(path.read_text()) if path.is_file() else {}
    differing = [f"{k}: {stored[k]} there, {run[k]} here" for k in run if k in stored and stored[k] != run[k]]
    if differing:
        raise ValueError(
            f"{str(checkpoint)!r} belongs to another run ({'; '.join(differing)}): resume with the same settings, or "
            "start anew in another --output_dir"
        )


def fingerprint(model: Any) -> str:
    """Tell networks apart by their weights and buffers, adapters left out.

    Args:
        model (`Any`): has a `state_dict`.

    Returns:
        `str`: 16 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(model.state_dict().items()):
        if "lora_" not in name:
            digest.update(f"{name.replace('.base_layer', '')} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()


def is_write_error(error: BaseException) -> bool:
    """Tell whether an exception of a save means that the disk did not take the bytes.

    Args:
        error (`BaseException`): what the save raised; safetensors and torch have error types of their own.
    """
    text = str(error).lower()
    return isinstance(error, OSError) or any(
        t in text
        for t in ("no space left", "i/o error", "unexpected pos", "file write failed", "failed writing", "os error")
    )


def discard(checkpoint: str | Path, error: BaseException) -> OSError:
    """Remove a checkpoint that could not be written and say what is left.

    Args:
        checkpoint (`str` or `Path`): the incomplete folder.
        error (`BaseException`): why it is incomplete.

    Returns:
        `OSError`: to be raised; names the previous checkpoint and the way out.
    """
    folder = Path(checkpoint)
    shutil.rmtree(folder, ignore_errors=True)
    last = latest_complete(folder.parent)
    left = f"the previous checkpoint {last} is intact: free" if last else "there is no earlier checkpoint: free"
    way_out = "resume with --resume_from_checkpoint true" if last else "start again"
    return OSError(f"could not write {str(folder)!r} ({error}); {left} disk space and {way_out}")


def _problem(folder: Path) -> str | None:
    if not folder.is_dir():
        return "there is no such folder"
    try:
        sizes = json.loads((folder / _MANIFEST).read_text())
    except FileNotFoundError:
        return f"it has no {_MANIFEST}, so writing it was cut off (or it is no checkpoint of a training run)"
    except (json.JSONDecodeError, UnicodeDecodeError):
        return f"its {_MANIFEST} is damaged"
    if not isinstance(sizes, dict):
        return f"its {_MANIFEST} is damaged"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"the file {name} is missing"
        if path.stat().st_size != size:
            return f"the file {name} has {path.stat().st_size} bytes where {size} were written"
    return None
