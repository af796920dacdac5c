"""The network of a pre-training run that begins at its frozen teacher."""

from __future__ import annotations

import dataclasses
import json

from hf_robust.cli import ModelArguments, PretrainRun
from hf_robust.models.backbones import native_architecture
from hf_robust.models.modeling import RobustModelForPreTraining
from hf_robust.teachers import student_of

__all__ = ["begin_at_teacher"]


def begin_at_teacher(run: PretrainRun) -> tuple[PretrainRun, RobustModelForPreTraining | None]:
    """Copy the teacher where the method starts from it, and let the run speak of its network.

    Args:
        run ([`PretrainRun`]): as parsed.

    Returns:
        `tuple`: the run, its backbone that of the teacher, and the model to train; the run as it was and `None` for
        methods that start from scratch.

    Raises:
        ValueError: for a `--backbone` other than the teacher's, or flags about a normalisation or a head that the
            teacher brings with it.
    """
    if not run.objective.starts_from_teacher or run.model.teacher is None:
        return run, None
    for name in ("normalize", "projector_layers", "projector_dim", "projector_norms", "projector_norm_branches"):
        if (value := getattr(run.model, name)) is not None:
            raise ValueError(
                f"--{name} {value}, and {run.objective.title} takes the network of its teacher as it is: leave "
                f"--{name} out{_scratch(run)}"
            )
    student = student_of(run.model.teacher, run.objective, run.data.image_size)
    found, asked = student.config.architecture, run.model.backbone
    left = native_architecture(asked, None)  # under which name it leaves, and comes back
    if asked not in (found, ModelArguments.backbone) and (left is None or left[0] != found):
        raise ValueError(
            f"--backbone {asked}, and {run.objective.title} starts from its teacher, which is a {found}: leave "
            f"--backbone out{_scratch(run)}"
        )
    network = dataclasses.replace(run.model, backbone=found, model_args=json.dumps(student.config.model_args))
    return dataclasses.replace(run, model=network), student


def _scratch(run: PretrainRun) -> str:
    return ", or give --student_scratch true" if hasattr(run.objective, "student_scratch") else ""
