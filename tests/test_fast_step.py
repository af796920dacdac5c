"""Every fast form of a training step is the plain eager one: memory order, half precision, torch.compile."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuning import tiny_finetuner
from torch import Tensor
from torch._dynamo.utils import counters
from training import tiny_images, tiny_model, tiny_trainer

from hf_robust.attacks import frozen
from hf_robust.data import load_image_dataset
from hf_robust.evaluation.probe import probe_encoder
from hf_robust.objectives import Objective, load_objective
from hf_robust.objectives.acl import ACL
from hf_robust.objectives.base import StepContext
from hf_robust.training_args import RobustTrainingArguments

NETWORK: dict[str, Any] = {"model_args": {"channels": [16, 32, 64, 128]}, "image_size": 16}
CANCELLED = "projector.fc1.bias"  # a bias in front of a train-mode norm: its gradient is rounding noise
FORMS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda model: model,
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "compiled": lambda model: torch.compile(model, backend="aot_eager", dynamic=False),
}


@pytest.fixture(autouse=True)
def forget_graphs() -> Iterator[None]:
    """Compiled graphs and their counts are global."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


class SmoothViews:
    """The same views in every step, in the precision of the network."""

    def __init__(self, objective: Objective, n: int, size: int, dtype: torch.dtype) -> None:
        generator, self.size = torch.Generator().manual_seed(4), size
        coarse = {name: torch.rand(n, 3, 4, 4, generator=generator) for name in objective.views}
        self.batch = {k: torch.nn.functional.interpolate(x, size=(size, size)).to(dtype) for k, x in coarse.items()}

    def __call__(self, images: Tensor, names: Any, **_: Any) -> dict[str, Tensor]:
        return {name: self.batch[name][: len(images)] for name in names}


# ---------------------------------------------------------------------- gradients
def batch_of(objective: Objective, seed: int, n: int = 16) -> dict[str, Tensor]:
    """Smooth images and their noisy views; the label follows from the image."""
    generator = torch.Generator().manual_seed(seed)
    coarse, noise = torch.rand(n, 3, 4, 4, generator=generator), torch.rand(n, 3, 16, 16, generator=generator)
    images = 0.7 * torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear") + 0.2 * noise
    views = {name: images + 0.1 * torch.rand(n, 3, 16, 16, generator=generator) for name in objective.views}
    return {**views, "label": (images[:, 0].mean((1, 2)) * 1e4).long() % 3}


def gradients(objective: Objective, model: Any, batch: dict[str, Tensor], half: bool = False) -> Tensor:
    """Of all weights, in one row, on a given adversarial batch; flattened in the order of rows, not of memory."""

    def given(loss_fn: Any, x: Tensor) -> Tensor:
        pattern = torch.arange(x.numel()).view_as(x).float().mul(2.3).sin().sign()
        return (x + 8 / 255 * pattern).clamp(0, 1)

    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
        terms = objective(model, batch, StepContext(given, 0.3, standard_accuracy=0.5))
    torch.stack(list(terms.values())).sum().backward()
    found = [p.grad.flatten() for n, p in model.named_parameters() if p.grad is not None and not n.endswith(CANCELLED)]
    return torch.cat(found)


@pytest.mark.parametrize("form", ["channels_last", "compiled"])
@pytest.mark.parametrize("name", ["acl", "air", "aff"])
def test_gradients_on_a_given_adversarial_batch_in_fp32(name, form):
    objective = load_objective(name)()
    plain, fast = (
        gradients(objective, FORMS[kind](tiny_model(objective, **NETWORK).train()), batch_of(objective, 0))
        for kind in ("plain", form)
    )
    assert (fast - plain).norm() <= 1e-5 * plain.norm()


@pytest.mark.parametrize("name", ["acl", "aff"])
def test_gradients_on_a_given_adversarial_batch_in_bf16(name):
    """After some training: the gradient of a fresh network is a small difference of nearly equal embeddings."""
    objective = load_objective(name)()
    model = tiny_model(objective, **NETWORK).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for seed in range(120):
        gradients(objective, model, batch_of(objective, seed))
        optimizer.step()
    plain, half = (gradients(objective, model, batch_of(objective, 999), half) for half in (False, True))
    assert torch.cosine_similarity(plain, half, dim=0) >= 0.99
    assert 0.98 <= half.norm() / plain.norm() <= 1.02


def probed(folder: Path, bf16: bool) -> tuple[float, float]:
    """Accuracy of a linear probe on digits after a short training, on clean and on attacked images (eps = 1/255)."""
    objective, data = ACL(), load_image_dataset("digits", "train", image_size=16, max_examples=192)
    model = tiny_model(objective, model_args={"channels": [16, 16, 32, 32], "stem_stride": 2}, image_size=16)
    values: dict[str, Any] = {"num_train_epochs": 4, "per_device_train_batch_size": 32, "learning_rate": 1.0}
    tiny_trainer(folder, objective, model=model, data=data, bf16=bf16, logging_steps=10**6, **values).train()
    judged = load_image_dataset("digits", "test", image_size=16)
    with frozen(model):
        found = probe_encoder(
            lambda x: model.features(x, "adv"), data, judged, size=16, eps=1 / 255, step_size=0.5 / 255, steps=4
        )
    return found.standard_accuracy, found.pgd20_accuracy


def test_a_short_training_in_bf16_ends_as_one_in_fp32(tmp_path):
    """Two seeds of the random starts differ by more than these bounds."""
    plain, half = probed(tmp_path / "fp32", False), probed(tmp_path / "bf16", True)
    assert plain[0] > 0.4  # chance is 0.1
    assert half == pytest.approx(plain, abs=0.06)


# ---------------------------------------------------------------------- torch.compile
def trained(folder: Path, objective: Any, **arguments: Any) -> dict[str, Tensor]:
    """Weights after three steps in double precision, where a compiled attack finds the same images."""
    model = tiny_model(objective).double()
    settings: dict[str, Any] = {"num_train_epochs": 3, "max_steps": 3, "per_device_train_batch_size": 6, **arguments}
    if objective.needs_labels:
        settings |= {"keep": "last", "lr_rule": "milestones"}
        trainer: Any = tiny_finetuner(
            folder, objective, model=model, data=tiny_images(12), dataloader_drop_last=True, **settings
        )
        trainer.end_epoch = lambda before, epoch: None
    else:
        trainer = tiny_trainer(folder, objective, model=model, data=tiny_images(6), **settings)
    trainer.views = SmoothViews(objective, 6, 8, torch.float64)
    trainer.train()
    assert all("_orig_mod" not in name for name in trainer.model.state_dict())
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_compiled_equals_eager(folder: Path, objective: Any, backend: str, graphs: int) -> None:
    eager = trained(folder, objective)
    assert not counters["stats"]
    compiled = trained(folder, objective, torch_compile=True, torch_compile_backend=backend)
    assert counters["graph_break"] == {}
    assert counters["stats"]["unique_graphs"] == graphs
    for name, value in eager.items():
        if name != CANCELLED:
            torch.testing.assert_close(compiled[name], value, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "graphs"),
    [
        ("acl", 2),  # the network that the attack sees and the training step
        ("air", 2),
        ("aff", 3),  # and the clean branch, for the reference of the attack
        ("sat", 2),
    ],
)
def test_a_compiled_training_is_the_eager_one_without_graph_breaks(tmp_path, name, graphs):
    assert_compiled_equals_eager(tmp_path, load_objective(name)(), "aot_eager", graphs)


@pytest.mark.skipif(os.environ.get("RUN_SLOW") != "1", reason="builds machine code for half a minute: set RUN_SLOW=1")
def test_a_training_compiled_to_machine_code_is_the_eager_one(tmp_path):
    assert_compiled_equals_eager(tmp_path, ACL(), "inductor", 2)


def test_a_short_last_batch_gets_a_graph_of_its_own(tmp_path):
    trainer = tiny_trainer(tmp_path, ACL(), torch_compile=True, torch_compile_backend="aot_eager")
    assert trainer.accelerator.state.dynamo_plugin.to_kwargs()["dynamic"] is False


def test_arguments_of_torch_compile(tmp_path):
    def options(**values: Any) -> Any:
        return RobustTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **values).compile_options

    assert options() is None
    assert options(torch_compile=True) == {"backend": "inductor", "mode": None}
    assert options(torch_compile_mode="reduce-overhead") == {"backend": "inductor", "mode": "reduce-overhead"}
