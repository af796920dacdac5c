"""Pseudo-labels of a training: clusters of an encoder's features, made once, kept with the run, looked up by index."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_robust.attacks import frozen
from hf_robust.clustering import cluster_features, of_first_process
from hf_robust.data import ImageDataset
from hf_robust.evaluation.accuracy import progress_bar
from hf_robust.evaluation.probe import extract_features
from hf_robust.objectives.base import Objective
from hf_robust.run_facts import encoder_title
from hf_robust.teachers import load_teacher
from hf_robust.training_args import RobustTrainingArguments

__all__ = ["PSEUDO_LABELS_FILE", "Labelling", "PseudoLabels", "cluster_images"]

logger = logging.getLogger(__name__)

PSEUDO_LABELS_FILE = "pseudo_labels.safetensors"
_STARTS = 1  # k-means of 500 clusters on 50,000 images takes long


def batch_key(clusters: int) -> str:
    """Key of a batch, and of a file, that holds the labels of so many clusters."""
    return f"pseudo_label_{clusters}"


@dataclass
class PseudoLabels:
    """Labels of every image of a training set, one set of labels for each number of clusters.

    Args:
        labels (`Mapping[int, torch.Tensor]`): number of clusters K to labels in [0, K), integers `(N,)`, in the order
            of the training set.
        source (`str`): where they come from, for logs and files.

    Raises:
        ValueError: for labels outside [0, K), of another type, or of different numbers of images.

    Source: Yan et al. 2020 (ClusterFit); Fan et al. 2021 (AdvCL), released code `pretraining_advCL.py`, which reads
        such labels from a file.
    """

    labels: Mapping[int, Tensor]
    source: str = "given"
    _table: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for clusters, values in self.labels.items():
            kind = torch.as_tensor(values).dtype
            if kind.is_floating_point or kind.is_complex or kind == torch.bool:
                raise ValueError(
                    f"labels of {clusters} clusters must be integers, got {kind}: a column of probabilities or "
                    "features is not a column of labels"
                )
        self.labels = {int(k): torch.as_tensor(v).long().cpu() for k, v in sorted(self.labels.items())}
        lengths = {len(v) for v in self.labels.values()}
        if len(lengths) != 1 or any(v.dim() != 1 for v in self.labels.values()):
            raise ValueError(
                f"pseudo-labels are one integer per image and number of clusters, got the shapes "
                f"{[tuple(v.shape) for v in self.labels.values()]}: pass tensors (N,) of one training set"
            )
        for clusters, values in self.labels.items():
            if clusters < 2 or int(values.min()) < 0 or int(values.max()) >= clusters:
                raise ValueError(
                    f"labels of {clusters} clusters must be in 0..{clusters - 1}, got {int(values.min())}.."
                    f"{int(values.max())}: number the clusters from 0"
                )

    def __len__(self) -> int:
        return len(next(iter(self.labels.values())))

    @property
    def digest(self) -> str:
        """Another text for other labels."""
        text = hashlib.blake2b(digest_size=8)
        for clusters, values in self.labels.items():
            text.update(f"{clusters} {len(values)}".encode() + values.numpy().tobytes())
        return text.hexdigest()

    def of(self, index: Tensor) -> dict[str, Tensor]:
        """Labels of a batch.

        Args:
            index (`torch.Tensor` of shape `(N,)`): positions in the training set, int64.

        Returns:
            `dict[str, torch.Tensor]`: `pseudo_label_K` to int64 `(N,)`, on the device of `index`.
        """
        if self._table is None or self._table.device != index.device:
            self._table = torch.stack(list(self.labels.values())).to(index.device)
        return {batch_key(k): row for k, row in zip(self.labels, self._table[:, index], strict=True)}

    def chosen(self, clusters: tuple[int, ...], images: int) -> PseudoLabels:
        """Those of the numbers of clusters that a method learns.

        Args:
            clusters (`tuple[int, ...]`): K of the method.
            images (`int`): size of the training set.

        Returns:
            [`PseudoLabels`]: with these K only.

        Raises:
            ValueError: if some are missing, or the labels belong to another number of images.
        """
        missing = [k for k in clusters if k not in self.labels]
        if missing:
            raise ValueError(
                f"the pseudo-labels ({self.source}) have {', '.join(map(str, self.labels))} clusters, the method asks "
                f"for {', '.join(map(str, missing))}, too: write --clusters {' '.join(map(str, self.labels))}"
            )
        if len(self) != images:
            raise ValueError(
                f"the pseudo-labels ({self.source}) are of {len(self)} images, the training set has {images}: they "
                "go by position, so make them for this very training set"
            )
        return PseudoLabels({k: self.labels[k] for k in clusters}, self.source)

    def save(self, file: str | Path) -> None:
        """Write them, as int32 tensors `pseudo_label_K`.

        Args:
            file (`str` or `Path`): ending in `.safetensors`; its folder is created.
        """
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        tensors = {batch_key(k): v.to(torch.int32) for k, v in self.labels.items()}
        save_file(tensors, str(file), {"source": self.source})

    @classmethod
    def load(cls, file: str | Path) -> PseudoLabels:
        """Read what [`save`] wrote, or a JSON object of numbers of clusters with their lists of labels.

        Args:
            file (`str` or `Path`): `.safetensors` or `.json`; no pickles, which could run code.

        Returns:
            [`PseudoLabels`]

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it holds something else.
        """
        path = Path(file).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no file {str(path)!r}: name the {PSEUDO_LABELS_FILE} of an earlier run")
        source = f"file {path.name}"
        try:
            if path.suffix == ".json":
                return cls({int(k): torch.tensor(v) for k, v in json.loads(path.read_text()).items()}, source)
            if path.suffix == ".safetensors":
                with safe_open(str(path), "pt") as stored:
                    names, source = stored.keys(), (stored.metadata() or {}).get("source", source)
                    return cls({int(n.removeprefix("pseudo_label_")): stored.get_tensor(n) for n in names}, source)
        except (SafetensorError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{str(path)!r} holds no pseudo-labels ({error}): it wants integer lists or tensors named after their "
                "numbers of clusters, such as pseudo_label_10"
            ) from error
        raise ValueError(
            f"pseudo-labels are read from .safetensors or .json, got {path.name!r}: of a pickle write "
            'json.dump({"10": labels.tolist(), ...}, file)'
        )


def cluster_images(
    encoder: Callable[[Tensor], Tensor],
    dataset: ImageDataset,
    clusters: tuple[int, ...],
    *,
    size: int,
    source: str,
    seed: int,
    device: Any = "cpu",
    progress: bool = True,
) -> PseudoLabels:
    """Pseudo-labels by k-means in the space of an encoder's features, one clustering per K; the same on all processes.

    Args:
        encoder (`Callable[[torch.Tensor], torch.Tensor]`): images `(N, 3, size, size)` in [0, 1] to features `(N, D)`.
        dataset ([`ImageDataset`]): images, un-augmented; labels are not read.
        clusters (`tuple[int, ...]`): numbers of clusters K.
        size (`int`, pixels): side the images are brought to.
        source (`str`): what the encoder is called.
        seed (`int`): of the initial centres.
        device (`Any`): where the features are computed.
        progress (`bool`): show bars.

    Returns:
        [`PseudoLabels`]

    Raises:
        ValueError: if the features have fewer different clusters than asked for.

    Source: Fan et al. 2021 (AdvCL) take features of a network that was pre-trained without labels on ImageNet.
    """
    features = extract_features(encoder, dataset, size=size, device=device, progress=progress)
    labels = {}
    with progress_bar(len(dataset) * len(clusters), "clusters of features", progress) as bar:
        for count in clusters:
            found = cluster_features(features, count, seed=seed, starts=_STARTS)
            labels[count] = of_first_process(found.to(device)).cpu()
            bar.update(len(dataset))
    return PseudoLabels(labels, f"k-means of the features of {source}")


class Labelling:
    """The pseudo-labels of one training: given, made before it, or those of the checkpoint that it goes on from.

    Nothing happens for a method that learns none.

    Args:
        objective ([`Objective`]): says which numbers of clusters it learns.
        dataset ([`ImageDataset`]): the training set.
        given ([`PseudoLabels`], `str`, `Path` or `None`): labels, or their file.
        teacher (`Any`): encoder to be clustered, see `teachers.load_teacher`; default: the model itself.

    Raises:
        FileNotFoundError, ValueError: for labels that are not those of this training set and method, or that a method
            does not learn.
    """

    def __init__(self, objective: Objective, dataset: Any, given: Any, teacher: Any) -> None:
        self.clusters, self.dataset, self.teacher = objective.pseudo_classes, dataset, teacher
        if given is not None and not self.clusters:
            raise ValueError(f"{objective.title} learns no pseudo-labels: leave them out, or train AdvCL")
        if given is not None and teacher is not None:
            raise ValueError(
                f"got pseudo-labels and a teacher ({teacher!r}) to make them by: give one of the two (--pseudo_labels "
                "or --teacher)"
            )
        if isinstance(given, str | Path):
            given = PseudoLabels.load(given)
        self.labels: PseudoLabels | None = given.chosen(self.clusters, len(dataset)) if given is not None else None

    def prepare(self, model: Any, args: RobustTrainingArguments) -> None:
        """Make the labels unless there are some, and leave them in the output folder.

        Args:
            model ([`RobustModelForPreTraining`]): what trains; clustered itself where no teacher is given.
            args ([`RobustTrainingArguments`]): device, seed, output folder.
        """
        if not self.clusters:
            return
        if self.labels is None:
            shared: dict[str, Any] = {"seed": args.seed, "device": args.device}
            shared["progress"] = not args.disable_tqdm and args.process_index == 0
            self.labels = self._made_by_teacher(model, shared) if self.teacher else self._made_by(model, shared)
        if args.should_save:
            self.labels.save(Path(str(args.output_dir), PSEUDO_LABELS_FILE))

    def of(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Labels of a collated batch.

        Args:
            inputs (`Mapping[str, torch.Tensor]`): holds `index`.

        Returns:
            `dict[str, torch.Tensor]`: `pseudo_label_K` to int64 `(N,)`; empty for a method that learns none.
        """
        if not self.clusters:
            return {}
        if self.labels is None:
            raise RuntimeError("there are no pseudo-labels yet: trainer.train() makes them, or pass pseudo_labels")
        return self.labels.of(inputs["index"])

    def save(self, checkpoint: Path) -> None:
        """Put the labels into a checkpoint.

        Args:
            checkpoint (`Path`): the folder.
        """
        if self.labels is not None:
            self.labels.save(checkpoint / PSEUDO_LABELS_FILE)

    def load(self, checkpoint: str | Path) -> None:
        """Take the labels of a checkpoint.

        Args:
            checkpoint (`str` or `Path`): the folder.

        Raises:
            ValueError: if others were given.
        """
        if not self.clusters:
            return
        stored = PseudoLabels.load(Path(checkpoint, PSEUDO_LABELS_FILE)).chosen(self.clusters, len(self.dataset))
        if self.labels is not None and self.labels.digest != stored.digest:
            raise ValueError(
                f"{str(checkpoint)!r} was trained on other pseudo-labels ({stored.source}) than those given "
                f"({self.labels.source}): leave them out to resume, or start anew in another --output_dir"
            )
        self.labels = stored

    def _made_by_teacher(self, model: Any, shared: dict[str, Any]) -> PseudoLabels:
        teacher = load_teacher(self.teacher).to(shared["device"])
        size = getattr(getattr(teacher.network, "config", None), "image_size", None)
        size = size if isinstance(size, int) else model.config.image_size
        name = encoder_title(teacher.name)  # paths of this machine are nobody's
        return cluster_images(teacher, self.dataset, self.clusters, size=size, source=name, **shared)

    def _made_by(self, model: Any, shared: dict[str, Any]) -> PseudoLabels:
        logger.warning(
            "the pseudo-labels are clusters of the network as it is before training, which says little unless its "
            "weights are trained: name an encoder by --teacher, or labels by --pseudo_labels"
        )
        branch = "clean" if "clean" in model.switch.branches else model.default_branch
        with frozen(model):
            return cluster_images(
                lambda x: model.features(x, branch),
                self.dataset,
                self.clusters,
                size=model.config.image_size,
                source="the network before training",
                **shared,
            )
