"""The attack of a training step: what it looks through, that it is the plain attack, and what it costs over time."""

from __future__ import annotations

import gc
import resource
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from objectives.linear_model import Nudge
from torch import Tensor, nn
from training import tiny_model, tiny_trainer
from transformers import TrainerCallback

from hf_robust.attacks import PGD
from hf_robust.checkpoints import describe_run
from hf_robust.models.folded import FoldedNetwork
from hf_robust.objectives import Objective, load_objective
from hf_robust.objectives.acl import ACL
from hf_robust.objectives.autolora import AutoLoRa
from hf_robust.objectives.base import StepContext
from hf_robust.objectives.dynacl import DynACL
from hf_robust.objectives.lora import LoRA
from hf_robust.objectives.sat import SAT
from hf_robust.training_attack import TrainingAttack

ATTACKED = ("acl", "air", "sat", "alf", "aff", "lora", "autolora", "dynacl")
BATCH = 6


class Precision:
    """What an attack asks an accelerator for."""

    def __init__(self, mixed_precision: str = "no") -> None:
        self.mixed_precision = mixed_precision

    def autocast(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16) if self.mixed_precision == "bf16" else nullcontext()


def network_of(objective: Objective, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A network in train mode whose norm branches, statistics and adapters have left their start."""
    model = tiny_model(objective, **config).to(dtype)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.train()


def batch_of(objective: Objective, model: Any, n: int = BATCH) -> dict[str, Tensor]:
    generator, size = torch.Generator().manual_seed(5), model.config.image_size
    dtype = next(model.parameters()).dtype
    batch = {name: torch.rand(n, 3, size, size, generator=generator).to(dtype) for name in objective.views}
    return {**batch, "label": torch.arange(n) % 3} if objective.needs_labels else batch


def attacked(
    objective: Objective, model: Any, batch: dict[str, Tensor], training_attack: TrainingAttack, steps: int = 3
) -> tuple[Tensor, Any]:
    """Adversarial images of one step, and the loss function that they were to raise."""
    found: list[Any] = []
    networks = [model]
    bound = training_attack.bind(PGD(steps=steps), networks, torch.Generator().manual_seed(1))

    class Caught(Exception):
        pass

    def attack(loss_fn: Any, x: Tensor) -> Tensor:
        found.extend((bound(loss_fn, x), loss_fn))
        raise Caught

    context = StepContext(attack, 0.3, None, standard_accuracy=0.5, seen=training_attack.seen)
    with pytest.raises(Caught):
        objective(model, batch, context)
    return found[0], found[1]


# ---------------------------------------------------------------------- the same attack
@pytest.mark.parametrize("name", ATTACKED)
def test_in_double_precision_the_images_are_those_of_the_plain_attack(name):
    objective = load_objective(name)()
    model = network_of(objective, torch.float64)
    batch = batch_of(objective, model)
    through_copy = TrainingAttack(Precision())
    assert isinstance(through_copy.seen(model), FoldedNetwork)
    images, _ = attacked(objective, model, batch, through_copy)
    plain, _ = attacked(objective, model, batch, TrainingAttack(Precision(), fold_norms=False))
    assert torch.equal(images, plain)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", ["acl", "aff", "autolora"])
def test_the_attack_raises_the_loss_as_far_as_the_plain_attack_in_fp32(name, precision):
    objective = load_objective(name)()
    # Rounding averages out over the channels of a network of usual width.
    model = tiny_model(objective, model_args={"channels": [16, 32, 64, 128]}, image_size=16).train()
    batch = batch_of(objective, model, 24)
    model.to(memory_format=torch.channels_last)
    plain, loss = attacked(objective, model, batch, TrainingAttack(Precision(), fold_norms=False), steps=5)
    last = {k: v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v for k, v in batch.items()}
    fast, _ = attacked(objective, model, last, TrainingAttack(Precision(precision)), steps=5)
    start = PGD(steps=0)(loss, torch.cat([batch[v] for v in objective.views]), generator=torch.Generator())
    model.eval()
    with torch.no_grad():
        before, reached, bound = (float(loss(x)) for x in (start, fast, plain))
    assert bound > before
    assert 0.98 <= (reached - before) / (bound - before) <= 1.02, (reached - before) / (bound - before)


def test_memory_order_does_not_change_the_noise():
    objective = ACL()
    model = network_of(objective, torch.float64)
    batch = batch_of(objective, model)
    last = {k: v.contiguous(memory_format=torch.channels_last) for k, v in batch.items()}
    for steps in (0, 2):
        found, _ = attacked(objective, model, batch, TrainingAttack(Precision()), steps)
        other, _ = attacked(objective, model, last, TrainingAttack(Precision()), steps)
        assert torch.equal(found, other) and other.is_contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------- what is looked through
@pytest.mark.parametrize("objective", [ACL(), AutoLoRa(), LoRA()])
def test_the_copy_has_the_weights_and_statistics_of_the_moment(objective):
    model = network_of(objective)
    attack, x = TrainingAttack(Precision()), torch.rand(3, 3, 8, 8)
    attack.seen(model).embed(x, "adv")
    tensors = [*model.parameters(), *(b for n, b in model.named_buffers() if "running" in n)]
    with torch.no_grad():
        for tensor in tensors:
            tensor.mul_(1.1).add_(0.01)
        again = attack.seen(model)
        for path in model.paths:
            fresh = FoldedNetwork(model).embed(x, path)
            assert torch.equal(
                again.embed(x, path), fresh
            )  # in place or anew: the same bits, so a resume repeats them
            model.eval()
            torch.testing.assert_close(fresh, model.embed(x, path), rtol=1e-3, atol=1e-4)
            model.train()


def test_the_copy_stays_in_its_storage():
    model = network_of(ACL())
    attack = TrainingAttack(Precision("bf16"))
    before = {n: p.data_ptr() for n, p in attack.seen(model).copy_of("adv").named_parameters()}
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert {n: p.data_ptr() for n, p in attack.seen(model).copy_of("adv").named_parameters()} == before


def test_in_half_precision_all_but_the_first_convolution_are_cast_once():
    model = network_of(ACL())
    copied = TrainingAttack(Precision("bf16")).seen(model).copy_of("adv")
    dtypes = [m.weight.dtype for m in copied.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert dtypes[0] == torch.float32 and set(dtypes[1:]) == {torch.bfloat16}


@pytest.mark.parametrize("name", ["acl", "lora"])
def test_a_copy_that_an_attack_in_half_precision_asks_for_is_folded_in_full_precision(name):
    objective = load_objective(name)()
    model, attack = network_of(objective), TrainingAttack(Precision("bf16"))
    for _ in range(2):  # made and refreshed
        attacked(objective, model, batch_of(objective, model), attack)
        copied = attack.seen(model).copy_of("adv")
        assert copied.folded and not any(isinstance(m, nn.BatchNorm2d) for m in copied.modules())
        attack.seen(model)
        with torch.autocast("cpu", torch.bfloat16):
            inside = attack._copies[model].copy_of("adv").state_dict()
        fresh = TrainingAttack(Precision("bf16")).seen(model).copy_of("adv").state_dict()
        assert all(torch.equal(inside[key], fresh[key]) for key in fresh)


@pytest.mark.parametrize("branch", ["clean", "adv"])
def test_only_the_branches_that_are_seen_are_copied(branch):
    model = network_of(ACL())
    network = FoldedNetwork(model)
    assert not network._copies
    network.embed(torch.rand(2, 3, 8, 8), branch)
    assert list(network._copies) == [branch]


class Sharded(nn.Module):
    """A parameter of which a process holds a part."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.weight.full_tensor = lambda: None  # type: ignore[attr-defined]


def test_where_no_copy_is_made_the_module_itself_is_attacked():
    model = network_of(ACL())
    assert TrainingAttack(Precision(), fold_norms=False).seen(model) is model
    assert TrainingAttack(Precision(), eval_mode=False).seen(model) is model
    sharded = Sharded()
    assert TrainingAttack(Precision("bf16")).seen(sharded) is sharded
    transformer = tiny_model(
        ACL(), architecture="vit_tiny_patch4_32", model_args={"depth": 1, "embed_dim": 24}, image_size=16
    )
    assert TrainingAttack(Precision()).seen(transformer) is transformer  # nothing to fold
    assert isinstance(TrainingAttack(Precision("bf16")).seen(transformer), FoldedNetwork)  # weights are cast once


def test_the_copy_of_a_transformer_in_half_precision_is_autocast_bit_by_bit():
    model = tiny_model(
        ACL(), architecture="vit_tiny_patch4_32", model_args={"depth": 1, "embed_dim": 24}, image_size=16
    ).eval()
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = TrainingAttack(Precision("bf16")).seen(model).features(x, "adv")
        assert torch.equal(found, model.features(x, "adv"))


def test_wrappers_are_looked_through():
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model, attack = network_of(ACL()), TrainingAttack(Precision())
    assert attack.seen(Wrapper(model)) is attack.seen(model)
    compiled = torch.compile(model, backend="eager")
    assert attack.seen(compiled) is attack.seen(model)


def test_a_teacher_is_seen_through_a_copy_of_its_own(tmp_path):
    trainer = tiny_trainer(tmp_path, DynACL(ema_decay=0.5), max_steps=2)
    trainer.train()
    assert set(trainer.training_attack._copies) == {trainer.model, trainer.teacher}


def test_the_flag_reaches_the_attack_and_the_checkpoints(tmp_path):
    on, off = (tiny_trainer(tmp_path, ACL(), fold_norms=value) for value in (True, False))
    assert isinstance(on.training_attack.seen(on.model), FoldedNetwork)
    assert off.training_attack.seen(off.model) is off.model
    name = "folded norms, torch.compile"
    assert describe_run(on)[name] != describe_run(off)[name]


def test_an_objective_asks_for_the_network_to_attack_once_per_attack():
    for name in ATTACKED:
        objective = load_objective(name)()
        model = tiny_model(objective).train()
        asked: list[Any] = []

        def seen(network: Any) -> Any:
            asked.append(network)  # noqa: B023
            return network

        objective(model, batch_of(objective, model), StepContext(Nudge(), standard_accuracy=0.5, seen=seen))
        assert asked == [model]


# ---------------------------------------------------------------------- over time
def resident_bytes() -> int:
    """Memory of this process; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.is_file() else 0


def tensors() -> int:
    """How many are alive."""
    gc.collect()
    return sum(issubclass(type(found), Tensor) for found in gc.get_objects())


def test_memory_does_not_grow():
    objective = SAT()
    model = network_of(objective)
    model.backbone = nn.Sequential(  # two layers: 520 steps of more would take their time
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    batch, training_attack = batch_of(objective, model, 2), TrainingAttack(Precision("bf16"))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def steps(n: int) -> None:
        for k in range(n):
            attack = training_attack.bind(PGD(steps=1), [model], torch.Generator().manual_seed(k))
            terms = objective(model, batch, StepContext(attack, seen=training_attack.seen))
            terms["adversarial"].backward()
            optimizer.step()
            optimizer.zero_grad()

    steps(20)
    assert training_attack.seen(model).folds("adv")
    tensors_before, objects_before, resident = tensors(), len(gc.get_objects()), resident_bytes()
    steps(500)
    assert tensors() <= tensors_before
    assert len(gc.get_objects()) <= objects_before + 100
    assert resident_bytes() - resident < 30e6  # one copy of a step's activations per step would be more


def test_a_training_keeps_no_tensor_of_a_step(tmp_path):
    """Nor do loss record, log and callbacks."""

    class Living(TrainerCallback):
        counts: list[int] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step in (6, 36):  # both one step after a log entry
                self.counts.append(tensors())

    trainer = tiny_trainer(tmp_path, ACL(), num_train_epochs=6, logging_steps=5, bf16=True)
    trainer.add_callback(Living())
    trainer.train()
    early, late = Living.counts
    assert late <= early
