"""What every objective promises; a new file in `hf_robust/objectives/` is tested here by existing."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import tiny_model, tiny_teacher

from hf_robust.attacks import PGD, frozen
from hf_robust.finetuning_args import RobustFinetuningArguments
from hf_robust.objectives import Objective, load_objective, objective_names
from hf_robust.objectives.a_infonce import AInfoNCE
from hf_robust.objectives.acl import ACL
from hf_robust.objectives.advcl import AdvCL
from hf_robust.objectives.aff import AFF
from hf_robust.objectives.air import AIR
from hf_robust.objectives.autolora import AutoLoRa
from hf_robust.objectives.base import AccuracyRequest, StepContext
from hf_robust.objectives.dynacl import DynACL
from hf_robust.objectives.fare import FARE
from hf_robust.objectives.lora import LoRA
from hf_robust.objectives.rocl import RoCL
from hf_robust.objectives.sat import SAT
from hf_robust.objectives.slf import SLF
from hf_robust.training_args import RobustTrainingArguments

ATTACK = PGD(eps=8 / 255, step_size=4 / 255, steps=2)
PROGRESS = 0.6
ACCURACY = 0.6
# Every method with its defaults, and the configurations that take another path through the code.
CONFIGURATIONS = {
    **{name: load_objective(name) for name in objective_names()},
    "acl_a2a": lambda: ACL(mode="a2a"),
    "acl_a2s": lambda: ACL(mode="a2s"),
    "dynacl_momentum": lambda: DynACL(ema_decay=0.99),
    "air_on_dynacl": lambda: AIR(base=DynACL()),
    "air_paper": lambda: AIR(formulation="paper"),
    "sat_resized_crop": lambda: SAT(augmentation="resized_crop"),
    "aff_one_branch": lambda: AFF(clean_branch="adv", reference_branch="adv"),
    "aff_clean_reference": lambda: AFF(clean_branch="adv"),
    "fare_adapter": lambda: FARE(adapter_rank=2, augmentation="padded_crop"),
    "advcl_fixed": lambda: AdvCL(formulation="fixed", clusters=[2, 3]),
    "a_infonce_on_rocl": lambda: AInfoNCE(RoCL(), "iphn", sigma_warmup=0.9),
    "a_infonce_on_advcl": lambda: AInfoNCE(AdvCL(clusters=[2, 3]), "hn", infonce_formulation="released"),
    "autolora_plain_only": lambda: AutoLoRa(norm_update="plain_only", formulation="released"),
}
FIXED_VIEWS = ("original", "padded_crop", "resized_crop", "high_frequency")
# A bias in front of a train-mode norm layer: its gradient is zero up to rounding, whatever the objective.
CANCELLED = {"projector.fc1.bias"}


@pytest.fixture(params=CONFIGURATIONS)
def objective(request) -> Objective:
    return CONFIGURATIONS[request.param]()


class Wrapped(nn.Module):
    """Like a distributed wrapper: forwards only; `embed` lives one door further."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls: list[list[tuple[str, Tensor]]] = []

    def forward(self, passes: list[tuple[str, Tensor]]) -> list[Tensor]:
        self.calls.append(list(passes))
        return self.module(passes)


@dataclasses.dataclass
class Step:
    """One step of an objective, with everything that happened on the way."""

    model: Any
    teacher: Any
    wrapped: Wrapped
    batch: dict[str, Tensor]
    terms: dict[str, Tensor]
    attacked: list[tuple[Tensor, Tensor]]  # images, adversarial images
    losses: list[tuple[float, float, float]]  # what the attack should raise: at the images, at noise, at its result
    teacher_passes: list[tuple[str, Tensor]]
    disturbed: list[str]  # what the attack did not leave as it was
    evaluations: int = 0  # of the loss of the attack


def state(networks: nn.Module) -> dict[str, Any]:
    """Values and flags that an attack must leave alone."""
    tensors = {name: t.detach().clone() for name, t in networks.state_dict().items()}
    flags = {f"{name} requires_grad": p.requires_grad for name, p in networks.named_parameters()}
    grads = {f"{name} has a gradient": p.grad is not None for name, p in networks.named_parameters()}
    modes = {f"{name} training": m.training for name, m in networks.named_modules()}
    return {**tensors, **flags, **grads, **modes}


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) else a == b

    return [name for name in before if not same(before[name], after[name])]


def draw_batch(objective: Objective, generator: torch.Generator) -> dict[str, Tensor]:
    batch = {name: torch.rand(6, 3, 8, 8, generator=generator) for name in objective.views}
    batch |= {f"pseudo_label_{k}": (5 * torch.arange(6) + 1) % k for k in objective.pseudo_classes}
    return {**batch, "label": torch.arange(6) % 3} if objective.needs_labels else batch


def prepare(objective: Objective, **config: Any) -> Any:
    """The model as the trainer makes it ready, with adapters that have left their start at zero."""
    model = tiny_model(objective, **config)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=generator)
    if objective.trains == "classifier":
        model.freeze_backbone()
    return model.train()


def context_of(attack: Any, teacher: Any = None, progress: float = PROGRESS) -> StepContext:
    return StepContext(attack, progress, teacher, standard_accuracy=ACCURACY)


def take_step(objective: Objective, seed: int = 0, attack_seed: int = 0, **config: Any) -> Step:
    """Call the objective once, as the trainer does."""
    model = prepare(objective, **config)
    frozen_teacher = tiny_teacher(objective, **config)
    teacher = copy.deepcopy(model).requires_grad_(False).train() if objective.teacher_kind == "ema" else frozen_teacher
    networks = nn.ModuleList([n for n in (model, teacher) if n is not None])
    generator = torch.Generator().manual_seed(seed)
    batch = draw_batch(objective, generator)
    noise = torch.Generator().manual_seed(attack_seed)
    step = Step(model, teacher, Wrapped(model), batch, {}, [], [], [], [])
    if objective.teacher_kind == "ema":
        teacher.register_forward_pre_hook(lambda _, inputs: step.teacher_passes.extend(inputs[0]))

    def attack(attacked_loss: Any, x: Tensor) -> Tensor:
        def loss_fn(images: Tensor) -> Tensor:
            step.evaluations += 1
            return attacked_loss(images)

        before = state(networks)
        with frozen(networks, eval_mode=objective.attack_in_eval_mode):
            x_adv = ATTACK(loss_fn, x, generator=noise)
            random = dataclasses.replace(ATTACK, steps=0)(loss_fn, x, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():  # now: the train-mode passes that follow change the network
                step.losses.append(tuple(loss_fn(images).item() for images in (x, random, x_adv)))
        step.attacked.append((x, x_adv))
        step.disturbed += changes(before, state(networks))
        return x_adv

    step.terms = objective(step.wrapped, batch, context_of(attack, teacher))
    return step


def branch_of(name: str, branches: tuple[str, ...]) -> str:
    """Branch of a norm layer by the name of its tensors; `"shared"` for one of all branches."""
    branch = name.split(".")[-2]
    return branch if branch in branches else "shared"


def rows(images: list[Tensor]) -> set[bytes]:
    return {row.detach().numpy().tobytes() for part in images for row in part}


def mixes(objective: Objective) -> bool:
    """Whether clean images pass the branch of the adversarial ones."""
    return isinstance(objective, LoRA | SLF) or getattr(objective, "clean_branch", "") == "adv"


def loss_of(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


def passes_of(step: Step, objective: Objective) -> list[str]:
    """Norm branches that the passes of the student move the statistics of."""
    if objective.trains != "all":
        return []  # the encoder stands still
    branch = {"lora": "adv"} if getattr(objective, "norm_update", "both") == "both" else {"lora": "none"}
    return [branch.get(path, path) for path, _ in step.wrapped.calls[0]]


# ---------------------------------------------------------------------- terms
def test_terms_are_named_finite_scalars_that_carry_a_gradient(objective):
    terms = take_step(objective).terms
    assert terms and all(isinstance(name, str) and name.isidentifier() for name in terms)
    assert "total" not in terms  # the trainer's own name
    for name, value in terms.items():
        assert value.shape == () and bool(torch.isfinite(value)) and value.requires_grad, name


def test_same_seeds_give_the_same_terms(objective):
    one, other, elsewhere = (take_step(objective, attack_seed=s).terms for s in (0, 0, 1))
    assert {k: v.item() for k, v in one.items()} == {k: v.item() for k, v in other.items()}
    assert (loss_of(one).item() != loss_of(elsewhere).item()) is objective.adversarial


def test_the_global_random_state_is_not_moved(objective):
    with torch.random.fork_rng():
        prepare(objective)  # building it seeds and moves the state, in `take_step`, too
        expected = torch.random.get_rng_state()
        take_step(objective)
        assert torch.equal(torch.random.get_rng_state(), expected)


# ---------------------------------------------------------------------- gradients, branches
def test_what_trains_gets_a_gradient_and_moves_and_nothing_else(objective):
    step = take_step(objective)
    start = {name: t.clone() for name, t in step.model.state_dict().items()}
    loss_of(step.terms).backward()
    parameters = dict(step.model.named_parameters())
    idle = {name for name in parameters if set(name.split(".")) & set(objective.idle_branches)}
    trains = {
        "all": lambda name: name not in idle,
        "classifier": lambda name: name.startswith("classifier."),
        "adapter": lambda name: name.startswith("classifier.") or "lora_" in name,
    }[objective.trains]
    trained = {name for name in parameters if trains(name)}
    assert {name for name, p in parameters.items() if p.grad is not None} == trained
    assert [name for name in trained if not bool(torch.isfinite(parameters[name].grad).all())] == []
    torch.optim.SGD([parameters[name] for name in sorted(trained)], lr=1.0).step()
    moved = {name for name, t in step.model.state_dict().items() if not torch.equal(t, start[name])}
    assert trained - CANCELLED <= moved <= trained
    if objective.trains != "all":  # and the passes before had left the encoder alone, buffers included
        fresh = prepare(objective).state_dict()
        assert {name for name in fresh if not torch.equal(fresh[name], start[name])} == set()


def test_declared_norm_branches_are_used_and_only_those(objective):
    declared = objective.norm_branches
    assert declared and len(set(declared)) == len(declared)
    spare = tuple(b for b in ("clean", "adv", "spare") if b not in declared)
    step = take_step(objective, norm_branches=(*declared, *spare))
    fresh = prepare(objective, norm_branches=(*declared, *spare)).state_dict()
    if objective.teacher_kind == "frozen":
        fresh |= tiny_teacher(objective, norm_branches=(*declared, *spare)).state_dict()
    trained = set(declared) - set(objective.idle_branches) if objective.trains == "all" else set()
    for network in filter(None, (step.model, step.teacher)):
        trained = trained if network is step.model or objective.teacher_kind == "ema" else set()
        state_dict = network.state_dict()
        statistics = [name for name in state_dict if re.search(r"running_(mean|var)$", name)]
        moved = {name for name in statistics if not torch.equal(state_dict[name], fresh[name])}
        found = {name: branch_of(name, (*declared, *spare)) for name in statistics}
        assert moved == {name for name in statistics if found[name] in trained or found[name] == "shared" and trained}


def test_running_statistics_move_once_per_pass_of_the_wrapped_model(objective):
    """No train-mode forward hides anywhere, unless the method says that it attacks in train mode."""
    branches = tuple(dict.fromkeys((*objective.norm_branches, "clean", "adv")))
    step = take_step(objective, norm_branches=branches)
    times = 1 if objective.attack_in_eval_mode else 1 + step.evaluations
    teacher_passes = [branch for branch, _ in step.teacher_passes]
    for network, passes in ((step.model, passes_of(step, objective)), (step.teacher, teacher_passes)):
        if network is None:
            continue
        expected = {b: times * passes.count(b) for b in branches}
        expected["shared"] = sum(n for b, n in expected.items() if b not in objective.network.get("branch_heads", {}))
        counts = {n: int(b) for n, b in network.named_buffers() if n.endswith("num_batches_tracked")}
        assert counts == {name: expected[branch_of(name, branches)] for name in counts}


def test_the_wrapped_model_is_called_exactly_once(objective):
    inner = []
    step = take_step(objective)
    assert len(step.wrapped.calls) == 1
    step.model.register_forward_hook(lambda *_: inner.append(1))
    objective(step.wrapped, step.batch, context_of(lambda _, x: x, step.teacher))
    assert len(inner) == 1  # not past the wrapper, either
    assert [branch for branch, _ in step.wrapped.calls[0]] == [branch for branch, _ in step.wrapped.calls[1]]


# ---------------------------------------------------------------------- attack
def test_the_attack_is_called_once_and_raises_its_loss(objective):
    step = take_step(objective)
    assert len(step.attacked) == objective.adversarial
    assert all(reached > max(start, random) + 0.005 for start, random, reached in step.losses)


def test_adversarial_images_are_inside_ball_and_box_and_reach_the_network(objective):
    step = take_step(objective)
    passes = [*step.wrapped.calls[0], *step.teacher_passes]
    by_path: dict[str, set[bytes]] = {path: set() for path in (*objective.paths, "adv")}
    for path, images in passes:
        by_path[path] |= rows([images])
    given = rows([step.batch[name] for name in objective.views])
    attacked = rows([x_adv for _, x_adv in step.attacked])
    assert not given & attacked
    reached = [by_path.pop(path) for path in list(by_path) if path.startswith("adv")]
    expected = attacked | (given if mixes(objective) else set())
    assert set().union(*reached) == expected and all(bool(part) is bool(expected) for part in reached)
    assert all(images <= given for images in by_path.values())
    for x, x_adv in step.attacked:
        assert rows([x]) <= given
        assert bool(((x_adv - x).abs() <= ATTACK.eps + 1e-6).all()) and bool((x_adv != x).any())
        assert x_adv.min() >= 0 and x_adv.max() <= 1 and not x_adv.requires_grad


def test_modes_flags_and_buffers_survive_the_attack(objective):
    step = take_step(objective)
    statistics = () if objective.attack_in_eval_mode else ("running_mean", "running_var", "num_batches_tracked")
    assert [name for name in step.disturbed if not name.endswith(statistics)] == []
    assert bool(step.disturbed) is not objective.attack_in_eval_mode
    fresh = prepare(objective)
    assert objective.trains != "all" or all(m.training for m in fresh.modules())
    assert [m.training for m in step.model.modules()] == [m.training for m in fresh.modules()]
    assert [p.requires_grad for p in step.model.parameters()] == [p.requires_grad for p in fresh.parameters()]
    assert all(p.grad is None for p in step.model.parameters())


def test_the_batch_is_left_alone(objective):
    step = take_step(objective)
    fresh = draw_batch(objective, torch.Generator().manual_seed(0))
    assert list(step.batch) == list(fresh)
    assert all(torch.equal(step.batch[name], fresh[name]) for name in fresh)


# ---------------------------------------------------------------------- candidates of a coreset
def attack_again(loss_fn: Any, x: Tensor) -> Tensor:
    return ATTACK(loss_fn, x, generator=torch.Generator().manual_seed(0))


def scores_candidates(objective: Objective) -> bool:
    """Methods of fine-tuning do not: coresets are chosen for long trainings."""
    return type(objective).candidate_passes is not Objective.candidate_passes


def candidate(objective: Objective) -> tuple[Any, dict[str, Tensor], list[tuple[str, Tensor]]]:
    """Model, batch and passes of one candidate minibatch; only the head has a gradient."""
    model = tiny_model(objective).eval().requires_grad_(False)
    batch = draw_batch(objective, torch.Generator().manual_seed(0))
    nobody = object()  # a momentum encoder would be embedded through, and fails
    before = state(model)
    passes = objective.candidate_passes(model, batch, StepContext(attack_again, PROGRESS, nobody))
    assert changes(before, state(model)) == []
    model.head_module.requires_grad_(True)
    return model, batch, passes


def test_candidates_are_scored_or_refused(objective):
    if not scores_candidates(objective):
        with pytest.raises(NotImplementedError, match=rf"{objective.title} has no loss .*--coreset random"):
            candidate(objective)
        return
    model, batch, passes = candidate(objective)
    given = rows(list(batch.values()))
    for branch, images in passes:
        assert branch in objective.norm_branches and not images.requires_grad
        assert branch == "adv" or rows([images]) <= given
    (x_adv,) = (images for branch, images in passes if branch == "adv")
    x = torch.cat([batch[name] for name in batch if name not in ("label", "original")])[: len(x_adv)]
    assert bool(((x_adv - x).abs() <= ATTACK.eps + 1e-6).all()) and bool((x_adv != x).any())
    with torch.no_grad():
        losses = objective.candidate_losses([model.embed(images, branch) for branch, images in passes], batch)
    assert losses.shape == (6,) and bool(torch.isfinite(losses).all()) and losses.std() > 0


def test_candidate_losses_add_up_to_the_unweighted_loss(objective):
    """Value and gradient of the head, at a progress where DynACL weights its streams and beside its first step."""
    if not scores_candidates(objective):
        pytest.skip("no loss by which images could be chosen")
    model, batch, passes = candidate(objective)
    losses = objective.candidate_losses([model.embed(images, branch) for branch, images in passes], batch)
    whole = getattr(objective, "base", objective)  # AIR leaves its regularisers out
    loss = sum(whole(model, batch, StepContext(attack_again, progress=0.0)).values())
    assert losses.mean().item() == pytest.approx(loss.item(), rel=1e-5)
    parameters = list(model.head_module.parameters())
    parts = [torch.autograd.grad(value, parameters, retain_graph=True) for value in losses]
    total = torch.autograd.grad(loss, parameters)
    for k, gradient in enumerate(total):
        torch.testing.assert_close(sum(part[k] for part in parts) / len(losses), gradient, atol=1e-6, rtol=1e-4)
    assert all(bool((part[-1] != 0).any()) for part in parts)


# ---------------------------------------------------------------------- the object itself
def test_the_objective_keeps_nothing_of_a_step(objective):
    fresh = copy.deepcopy(objective)
    assert not isinstance(objective, nn.Module)
    before = pickle.dumps(objective)
    take_step(objective)
    assert objective == fresh
    assert vars(objective) == vars(fresh)  # no attribute beside the fields, either
    assert pickle.dumps(objective) == before
    assert pickle.loads(before) == fresh


def rebuild(template: Objective, values: dict[str, Any]) -> Objective:
    """The way back from `dataclasses.asdict`: a nested objective is a mapping there."""
    nested = {
        name: rebuild(getattr(template, name), value)
        for name, value in values.items()
        if isinstance(getattr(template, name), Objective)
    }
    return type(template)(**{**values, **nested})


def test_fields_round_trip_and_explain_themselves(objective):
    assert dataclasses.is_dataclass(objective)
    assert rebuild(objective, dataclasses.asdict(objective)) == objective
    assert dataclasses.replace(objective) == objective
    for field in dataclasses.fields(objective):
        assert len(field.metadata.get("help", "")) > 10, f"{field.name} needs a help text: it becomes a flag"


def test_declarations(objective):
    assert objective.views and set(objective.views) <= {"view_1", "view_2", *FIXED_VIEWS}
    assert isinstance(objective.needs_labels, bool)
    assert objective.trains in ("all", "classifier", "adapter")
    assert set(objective.idle_branches) < set(objective.norm_branches)
    assert set(objective.paths) >= {"adv"} or not objective.adversarial
    request = objective.accuracy_request
    assert request is None or isinstance(request, AccuracyRequest) and request.path in objective.paths
    assert objective.teacher_kind in (None, "frozen", "ema")
    assert objective.title and objective.title == objective.title.strip()
    for progress in (0.0, 0.3, 1.0):
        assert 0 <= objective.strength(progress) <= 1
    assert "Source:" in type(objective).__doc__
    about = (sys.modules[type(objective).__module__].__doc__ or "").partition("\n")[0]
    assert re.fullmatch(r"[\w-]+: .+\.", about), "the first line of the file is the method's line in tables"
    assert bool(type(objective).take_when) or type(objective).needs_labels and objective.recipe


def test_the_recipe_is_made_of_training_arguments(objective, tmp_path):
    if not objective.recipe:
        assert objective.training_attack == getattr(objective, "base", Objective).training_attack
        return
    folder: dict[str, Any] = {"output_dir": str(tmp_path), "report_to": "none"}
    if objective.needs_labels:
        arguments: Any = RobustFinetuningArguments.of(objective, **folder)
        assert objective.training_attack.steps == 10 or not objective.adversarial
    else:
        arguments = RobustTrainingArguments(**objective.recipe, **folder)
    assert {name: getattr(arguments, name) for name in objective.recipe} == objective.recipe
    with pytest.raises(TypeError):
        objective.recipe["learning_rate"] = 1.0


def test_citation_is_one_bibtex_entry(objective):
    entry = objective.citation
    assert re.fullmatch(r"@\w+\{[\w:-]+,\n.*\n\}", entry, flags=re.DOTALL)
    for key in ("title", "author", "year"):
        assert re.search(rf"^\s*{key}\s*=\s*\{{.+\}},?$", entry, flags=re.MULTILINE), key
    assert entry.count("{") == entry.count("}")


# ---------------------------------------------------------------------- finding objectives
def test_names_are_the_files_and_every_file_holds_one_objective():
    assert objective_names() == sorted(objective_names())
    assert {"simclr", "acl", "dynacl", "air"} <= set(objective_names())
    assert "base" not in objective_names()
    for name in objective_names():
        found = load_objective(name)
        assert issubclass(found, Objective) and found.__module__ == f"hf_robust.objectives.{name}"
        assert found.__name__.lower() == name.replace("_", "")
    assert load_objective("DynACL") is DynACL


@pytest.mark.parametrize(
    ("name", "hint"), [("dynalc", "did you mean 'dynacl'. "), ("base", ""), ("moco", ""), ("../acl", "did you.*")]
)
def test_unknown_names_list_the_known_ones(name, hint):
    with pytest.raises(ValueError, match=rf"unknown objective '{name}': {hint}known objectives are .*acl, .*simclr"):
        load_objective(name)
