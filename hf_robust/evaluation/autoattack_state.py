"""How far an AutoAttack evaluation has come, on disk: one file that belongs to one model, data set and setting."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .autoattack_findings import Findings

__all__ = ["CascadeState", "StageCount", "fingerprint", "model_fingerprint"]

LOGITS_TOLERANCE = 0.01  # of the spread of the logits: another machine's rounding passes, another model does not
_FLAGS = ("clean", "robust", "entered")


@dataclass
class StageCount:
    """What one attack has cost so far.

    Args:
        name (`str`): the attack.
        seconds (`float`): wall time.
        forwards (`int`): images classified.
        backwards (`int`): images whose gradient was taken.
    """

    name: str
    seconds: float = 0.0
    forwards: int = 0
    backwards: int = 0


@dataclass
class CascadeState:
    """Flags of every image and the place in the cascade; the images are those of one process.

    Args:
        clean (`torch.Tensor` of shape `(N,)`): rightly classified without an attack, bool.
        robust (`torch.Tensor` of shape `(N,)`): not broken so far, bool.
        entered (`torch.Tensor` of shape `(N,)`): `robust` when the present attack began; its batches follow from it.
        predictions (`torch.Tensor` of shape `(N,)`): class given to the attacked image (to the clean one if no attack
            broke it), int64.
        distances (`torch.Tensor` of shape `(N,)`): norm of the perturbation that broke it, 0 where none did, float32.
        batches (`int`): of the present attack that are done.
        counts (`list[StageCount]`): of the attacks begun, the present one last.
        after (`list[torch.Tensor]`): `robust` after each attack that is over.
        findings ([`Findings`]): what was noticed.
        logits (`torch.Tensor` of shape `(M, K)`): of the first clean images: the model must give them again.
    """

    clean: Tensor
    robust: Tensor
    entered: Tensor
    predictions: Tensor
    distances: Tensor
    logits: Tensor
    batches: int = 0
    counts: list[StageCount] = field(default_factory=list)
    after: list[Tensor] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)

    def save(self, path: Path, tag: dict[str, Any]) -> None:
        """Write the file in one move, so that a kill leaves the old state or the new one.

        Args:
            path (`Path`): the file; its folder is made when missing.
            tag (`dict`): what the state belongs to, JSON values.
        """
        facts = {
            "tag": tag,
            "batches": self.batches,
            "counts": [vars(count) for count in self.counts],
            "findings": self.findings.to_dict(),
        }
        arrays = {name: getattr(self, name).numpy() for name in (*_FLAGS, "predictions", "distances", "logits")}
        after = torch.stack(self.after) if self.after else torch.zeros(0, len(self.robust), dtype=torch.bool)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                np.savez(file, facts=np.array(json.dumps(facts)), after=after.numpy(), **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, tag: dict[str, Any]) -> CascadeState:
        """Read a state back, if it is of the evaluation that `tag` describes.

        Args:
            path (`Path`): a file that `save` wrote.
            tag (`dict`): what the state must belong to.

        Returns:
            [`CascadeState`]: equal to the one that was saved.

        Raises:
            ValueError: if the file is not such a state, or one of another model, data set or setting.
        """
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
                facts = json.loads(str(stored["facts"]))
                arrays = {name: torch.from_numpy(stored[name]) for name in stored.files if name != "facts"}
            differing = _differing(facts["tag"], tag)
            state = None if differing else cls._of(facts, arrays)
        except Exception as error:  # a foreign or damaged file makes numpy, zipfile and json raise nearly anything
            raise ValueError(
                f"cannot read {str(path)!r} as the state of an AutoAttack evaluation ({error!r}): delete it to start "
                "again, or name another state_file"
            ) from error
        if state is None:
            raise ValueError(
                f"{str(path)!r} is the state of another evaluation, which differs in: {', '.join(differing)}. A state "
                "goes on with the same model, images and settings only: name another state_file, or delete this one "
                "to start again"
            )
        return state

    @classmethod
    def _of(cls, facts: dict[str, Any], arrays: dict[str, Tensor]) -> CascadeState:
        after = list(arrays.pop("after"))
        per_image = [*(arrays[name] for name in (*_FLAGS, "predictions", "distances")), *after]
        if len({len(array) for array in per_image}) != 1:
            raise ValueError("its arrays are of different lengths")
        return cls(
            **arrays,
            batches=facts["batches"],
            counts=[StageCount(**count) for count in facts["counts"]],
            after=after,
            findings=Findings.from_dict(facts["findings"]),
        )

    def check_logits(self, logits: Tensor, path: Path) -> None:
        """Refuse a model that is not the one the state was begun with; for functions there is no other sign.

        Args:
            logits (`torch.Tensor` of shape `(M, K)`): of the first clean images, now.
            path (`Path`): the file, for the message.

        Raises:
            ValueError: if they are not those of before.
        """
        spread = float(self.logits.max() - self.logits.min())
        same = self.logits.shape == logits.shape
        if not same or float((self.logits - logits).abs().max()) > LOGITS_TOLERANCE * spread:
            raise ValueError(
                f"{str(path)!r} was begun with a model that gave other logits for the same images: delete the file to "
                "evaluate this model from the start, or name another state_file"
            )


def _differing(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What two tags differ in, in words; hashes are not shown."""
    return [
        name if name in ("model", "images", "labels") else f"{name} (there {there!r}, here {here!r})"
        for name, there, here in ((name, stored.get(name), wanted.get(name)) for name in wanted | stored)
        if there != here
    ]


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash tensors: their names, types, shapes and bytes.

    Args:
        tensors (`Iterable[tuple[str, torch.Tensor]]`): in an order that is always the same.

    Returns:
        `str`: 32 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def model_fingerprint(model: Any) -> str:
    """Hash the weights and buffers of a module.

    Args:
        model (`Callable` or `nn.Module`): the model.

    Returns:
        `str`: 32 hexadecimal digits; `"function"` for what is not a module.
    """
    if not isinstance(model, nn.Module):
        return "function"
    return fingerprint([*model.named_parameters(), *model.named_buffers()])
