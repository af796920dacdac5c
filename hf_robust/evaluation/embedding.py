"""Robustness of an encoder without labels: how far an attack moves its embeddings."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from ..attacks import PGD
from ..data import ImageDataset
from .accuracy import progress_bar
from .autoattack_model import held
from .judged_images import JudgedImages
from .pixel_classifier import modules_inside
from .report import format_eps

__all__ = ["EmbeddingRobustness", "embedding_robustness"]

Features = Callable[[Tensor], Tensor]


@dataclass
class EmbeddingRobustness:
    """How far an attack moved the embeddings of images, and whether they were still recognised.

    Args:
        metrics (`dict[str, float]`): under names that carry the attack: mean cosine similarity of clean and attacked
            embedding, mean distance relative to the length of the clean one, and the retrieval accuracy: share of
            attacked embeddings whose nearest clean one is that of the same image.
        n (`int`): images.
        eps (`float`), norm (`str`), steps (`int`), step_size (`float`), distance (`str`), seed (`int`): the attack.
        seconds (`float`): wall time.
        dataset (`str`): name of the images.
        cosine (`torch.Tensor` of shape `(N,)`): similarity for every image.
        relative_distance (`torch.Tensor` of shape `(N,)`): Euclidean, for every image.
        retrieved (`torch.Tensor` of shape `(N,)`): bool.
    """

    metrics: dict[str, float]
    n: int
    eps: float
    norm: str
    steps: int
    step_size: float
    distance: str
    seed: int
    seconds: float
    dataset: str
    cosine: Tensor = field(repr=False)
    relative_distance: Tensor = field(repr=False)
    retrieved: Tensor = field(repr=False)

    def to_result(self, model: str) -> dict[str, Any]:
        """Give the entry of [`EncoderReport`]'s `results`.

        Args:
            model (`str`): name of the encoder.
        """
        attack: Mapping[str, Any] = {"norm": self.norm, "eps": self.eps, "step_size": self.step_size}
        return {
            "model": model,
            "metrics": dict(self.metrics),
            "protocol": "attack on embeddings, without labels",
            "n_eval": self.n,
            "seed": self.seed,
            "attack": {**attack, "steps": self.steps, "random_start": True, "loss": self.distance, "iterate": "last"},
            "dataset": {"name": self.dataset},
            "seconds": self.seconds,
        }


def embedding_robustness(
    features: Features,
    images: ImageDataset | Tensor | Sequence[Tensor],
    *,
    size: int | None = None,
    eps: float = 8 / 255,
    norm: Literal["linf", "l2"] = "linf",
    steps: int = 20,
    step_size: float | None = None,
    distance: Literal["cosine", "l2"] = "cosine",
    n_examples: int | None = None,
    batch_size: int = 128,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> EmbeddingRobustness:
    """Attack the embedding of every image and measure how far it moves; no label is needed.

    PGD maximises the distance between attacked and clean embedding, from a uniform random start: the quantity that
    FARE keeps small, and that speaks of every use of an encoder, where accuracy speaks of one task. Networks that
    `features` is, belongs to or names are held in evaluation mode, in float32 and without gradients, and put back.

    Args:
        features (`Callable[[Tensor], Tensor]`): images `(N, 3, S, S)` in [0, 1] to embeddings `(N, D)`, such as
            [`~hf_robust.hub.encoder_features`] gives.
        images ([`ImageDataset`] or `torch.Tensor`): with or without labels; floats must be pixels in [0, 1].
        size (`int`, *optional*): side in pixels the images are brought to; default: as they are.
        eps (`float`, defaults to 8/255): budget, pixels in [0, 1].
        norm (`str`, defaults to `"linf"`): or `"l2"`.
        steps (`int`, defaults to 20): gradient steps.
        step_size (`float`, *optional*): default: a quarter of `eps`.
        distance (`str`, defaults to `"cosine"`): what is maximised, 1 - cosine similarity, or `"l2"`: the squared
            Euclidean distance.
        n_examples (`int`, *optional*): so many images, drawn by `seed`; default: all.
        batch_size (`int`, defaults to 128): images per batch; random starts depend on it.
        seed (`int`, defaults to 0): of the choice and the random starts.
        device (`str` or `torch.device`, *optional*): default: that of the network.
        progress (`bool`, defaults to `True`): show a bar when it takes more than a few seconds.

    Returns:
        [`EmbeddingRobustness`]: means and the values of every image.

    Raises:
        ValueError: for another distance, normalised images, or embeddings that are not 2-d or not finite.

    Source: own; the loss is that of FARE (Schlarmann et al. 2024), the measure after Kowalczuk et al. 2024.
    """
    started, source = time.perf_counter(), _chosen(images, n_examples, batch_size, seed)
    job = _Job(features, PGD(eps, eps / 4 if step_size is None else step_size, steps, norm), distance, seed)
    z, z_adv = job.embed(source, size, batch_size, device, progress)
    return job.judge(z, z_adv, source.name, time.perf_counter() - started)


@dataclass(frozen=True)
class _Job:
    """What is attacked, and how."""

    features: Features
    attack: PGD
    distance: str
    seed: int

    def __post_init__(self) -> None:
        if self.distance not in ("cosine", "l2"):
            raise ValueError(f"distance must be 'cosine' or 'l2', got {self.distance!r}: 'cosine' ignores lengths")

    def embed(
        self, source: JudgedImages, size: int | None, batch_size: int, place: str | torch.device | None, progress: bool
    ) -> tuple[Tensor, Tensor]:
        """Embeddings of the clean and of the attacked images, each `(N, D)`."""
        networks = nn.ModuleList(modules_inside(self.features))
        first = next(iter([*networks.parameters(), *networks.buffers()]), None)
        device = torch.device(place if place is not None else "cpu" if first is None else first.device)
        clean, attacked = [], []
        with held(networks), progress_bar(len(source), f"embeddings of {source.name}", progress) as bar:
            for number, start in enumerate(range(0, len(source), batch_size)):
                rows = range(start, min(start + batch_size, len(source)))
                x = source.pixels(rows, size, device)
                generator = torch.Generator(x.device).manual_seed(self.seed * 1_000_003 + number)
                with torch.autocast(x.device.type, enabled=False):
                    with torch.no_grad():
                        z = _checked(self.features(x))
                    x_adv = self.attack(partial(_distance, self.features, z, self.distance), x, generator=generator)
                    with torch.no_grad():
                        clean.append(z.cpu())
                        attacked.append(_checked(self.features(x_adv)).cpu())
                bar.update(len(rows))
        return torch.cat(clean), torch.cat(attacked)

    def judge(self, z: Tensor, z_adv: Tensor, dataset: str, seconds: float) -> EmbeddingRobustness:
        """How far the attack moved them."""
        eps, norm, steps = self.attack.eps, self.attack.norm, self.attack.steps
        cosine = cosine_similarity(z, z_adv)
        moved = (z_adv - z).norm(dim=1) / z.norm(dim=1).clamp_min(1e-12)
        retrieved = _nearest(z_adv, z) == torch.arange(len(z))
        budget = f"pgd{steps}_{norm}_{format_eps(eps).replace('/', '_')}"
        metrics = {
            f"embedding_cosine_{budget}": float(cosine.mean()),
            f"embedding_relative_distance_{budget}": float(moved.mean()),
            f"embedding_retrieval_{budget}_accuracy": float(retrieved.double().mean()),
        }
        facts = (len(z), eps, norm, steps, self.attack.step_size, self.distance, self.seed, seconds, dataset)
        return EmbeddingRobustness(metrics, *facts, cosine, moved, retrieved)


def _chosen(images: Any, n: int | None, batch_size: int, seed: int) -> JudgedImages:
    """The images that are attacked."""
    for name, value in (("n_examples", n), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}: leave it out for the default")
    source = _unlabelled(images)
    if n is None or n >= len(source):
        return source
    generator = torch.Generator().manual_seed(seed)
    return source.part(torch.randperm(len(source), generator=generator)[:n].sort().values)


def _unlabelled(images: Any) -> JudgedImages:
    """The images with zeros for labels."""
    if isinstance(images, ImageDataset):
        zeros = torch.zeros(len(images), dtype=torch.int64)
        return JudgedImages(images, zeros, torch.arange(len(images)), len(images), images.name)
    tensor = images[0] if isinstance(images, tuple | list) and len(images) else images
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"images must be a tensor (N, C, H, W), a tuple that starts with one, or a data set of "
            f"load_image_dataset, got {type(images).__name__}: stack a list of images by torch.stack"
        )
    return JudgedImages.of((tensor, torch.zeros(len(tensor), dtype=torch.int64)))


def _checked(z: Any) -> Tensor:
    if not isinstance(z, Tensor):
        raise ValueError(
            f"embeddings must be a tensor (N, D), got {type(z).__name__}: wrap the encoder in a function that picks "
            "one, such as lambda x: model(x).pooler_output.flatten(1)"
        )
    if z.dim() != 2 or not bool(z.isfinite().all()):
        raise ValueError(
            f"embeddings must be (N, D) and finite, got shape {tuple(z.shape)}: pool feature maps (.mean((2, 3))) and "
            "look for an overflow in the encoder"
        )
    return z.float()


def _distance(features: Features, z: Tensor, kind: str, images: Tensor) -> Tensor:
    # At zero distance neither has a gradient: the attack starts at a random point.
    z_adv = features(images).float()
    if not z_adv.requires_grad:
        raise ValueError(
            "got embeddings that are cut off from the pixels, the attack needs their gradient with respect to them: "
            "take torch.no_grad(), inference_mode() and .detach() out of the encoder and its surroundings"
        )
    if kind == "cosine":
        return (1 - cosine_similarity(z_adv, z)).sum()
    return (z_adv - z).square().sum()


def _nearest(queries: Tensor, keys: Tensor) -> Tensor:
    """Position of the key of highest cosine similarity for each query, block by block."""
    keys = normalize(keys, dim=1)
    return torch.cat([(normalize(block, dim=1) @ keys.T).argmax(1) for block in queries.split(1024)])
