"""Training on coresets: schedule, checkpoints, what a selection leaves alone, and what is refused before it starts."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from training import tiny_images, tiny_model, tiny_rcs, tiny_trainer

from hf_robust.coresets import Coreset, FullData, RandomCoreset, StoredCoreset
from hf_robust.data import ImageDataset
from hf_robust.objectives.acl import ACL
from hf_robust.objectives.air import AIR
from hf_robust.objectives.dynacl import DynACL
from hf_robust.objectives.sat import SAT
from hf_robust.objectives.simclr import SimCLR
from hf_robust.optim import warmup_cosine

STEPS = 18  # of `tiny_rcs` over 4 epochs: 3 warm-up rounds of 3 steps, then 3 coresets


def rcs_trainer(folder, objective=None, *, method=None, **arguments):
    objective = objective if objective is not None else ACL()
    if objective.needs_labels:
        arguments["model"] = tiny_model(objective)
    method = method if method is not None else tiny_rcs()
    return tiny_trainer(folder, objective, coreset=method, **{"num_train_epochs": 4, **arguments})


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def entries(trainer, key):
    return [e for e in trainer.state.log_history if key in e]


# ---------------------------------------------------------------------- schedule
def test_fraction_one_is_full_data(tmp_path):
    whole = RandomCoreset(fraction=1.0, warmup_epochs=1, interval=1)
    ends = []
    for name, method in (("none", None), ("full", FullData()), ("fraction", whole)):
        trainer = tiny_trainer(tmp_path / name, ACL(), coreset=method, num_train_epochs=3)
        trainer.train()
        ends.append(weights(trainer))
        assert not entries(trainer, "coreset_seconds") and not list((tmp_path / name).glob("coreset*"))
    assert_same(ends[0], ends[1])
    assert_same(ends[0], ends[2])


def test_rounds_selections_and_what_they_leave_behind(tmp_path):
    trainer = rcs_trainer(tmp_path)
    seen: list[list[int]] = [[]]
    prepare, start = trainer.prepare_batch, trainer.start_epoch

    def note(inputs, generator):
        if trainer.model.training:  # not the candidates of a selection
            seen[-1] += inputs["index"].tolist()
        return prepare(inputs, generator)

    def begin(round):
        start(round)
        seen.append([])

    trainer.prepare_batch, trainer.start_epoch = note, begin
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == STEPS
    assert trainer.epoch == 4.0
    rounds = seen[1:]
    assert [len(r) for r in rounds] == [10] * 6
    validation = set(trainer.phases.validation.tolist())
    pool = set(trainer.phases.pool.tolist())
    assert len(validation) == 3 and len(pool) == 21 and not validation & pool
    assert not validation & {k for r in rounds for k in r}
    warmup = sum(rounds[:3], [])
    assert set(warmup[:21]) == pool  # a full pass first
    files = sorted(tmp_path.glob("coreset-*.json"))
    assert [f.name for f in files] == ["coreset-0001.json", "coreset-0002.json", "coreset-0003.json"]
    for file, shown in zip(files, rounds[3:], strict=True):
        coreset = Coreset.load(file)
        assert coreset.indices == sorted(shown)
        assert (coreset.pool_size, coreset.dataset_size, coreset.fraction) == (21, 24, 0.5)
        assert coreset.effective_fraction == 10 / 21
    logs = entries(trainer, "coreset_seconds")
    assert [e["paper_epoch"] for e in logs] == [1, 2, 3]
    assert ["coreset_overlap" in e for e in logs] == [False, True, True]
    assert 0 < trainer.selection_seconds < trainer.training_seconds
    first, second = (Coreset.load(f) for f in files[:2])
    assert logs[1]["coreset_overlap"] == len(set(first.indices) & set(second.indices)) / 10


def test_learning_rate_and_strength_follow_paper_epochs(tmp_path):
    trainer = rcs_trainer(tmp_path, DynACL(period=0.25), learning_rate=0.2, warmup_epochs=0.5)
    trainer.train()
    rates = [e["learning_rate"] for e in trainer.state.log_history if "loss" in e]
    strengths = [e["strength"] for e in trainer.state.log_history if "loss" in e]
    clock = [step / 9 if step < 9 else 1 + (step - 9) / 3 for step in range(STEPS + 1)]
    assert rates == pytest.approx([warmup_cosine(u, base_lr=0.2, warmup_epochs=0.5, epochs=4) for u in clock[1:]])
    assert strengths == pytest.approx([1 - 0.25 * int(u + 1e-9) for u in clock[:-1]])


def test_max_steps_ends_a_run_on_coresets_early(tmp_path):
    trainer = rcs_trainer(tmp_path, max_steps=11)
    trainer.train()
    assert trainer.state.global_step == 11 and trainer.epoch == pytest.approx(1 + 2 / 3)
    assert trainer.progress == 1.0


def test_checkpoints_of_epochs_come_at_whole_epochs(tmp_path):
    rcs_trainer(tmp_path, save_strategy="epoch", save_total_limit=10).train()
    found = {int(p.name.split("-")[1]): (p / "coreset.json").exists() for p in tmp_path.glob("checkpoint-*")}
    assert found == {9: False, 12: True, 15: True, 18: True}


def test_probes_come_at_whole_epochs(tmp_path):
    trainer = rcs_trainer(tmp_path, probe_every=2)
    trainer.train()
    assert [e["paper_epoch"] for e in entries(trainer, "probe_standard_accuracy")] == [2, 4]


def test_a_fixed_subset_stays_and_a_refreshed_one_changes(tmp_path):
    def chosen(name, refresh):
        method = RandomCoreset(fraction=0.5, warmup_epochs=1, interval=1, refresh=refresh)
        rcs_trainer(tmp_path / name, method=method).train()
        return [Coreset.load(f).indices for f in sorted((tmp_path / name).glob("coreset-*.json"))]

    assert len(chosen("fixed", False)) == 1
    one, two, three = chosen("refreshed", True)
    assert one != two != three
    assert chosen("again", True) == [one, two, three]


def test_a_stored_coreset_is_trained_on(tmp_path):
    rcs_trainer(tmp_path / "first").train()
    path = tmp_path / "first" / "coreset-0003.json"
    trainer = rcs_trainer(tmp_path / "second", method=StoredCoreset(str(path)))
    trainer.train()
    assert trainer.phases.current.indices == Coreset.load(path).indices
    assert trainer.state.global_step == 4 * 3


# ---------------------------------------------------------------------- resume
@pytest.mark.parametrize("step", [4, 9, 11, 12, 16])  # in the warm-up, before, in and between coresets
def test_resume_repeats_the_run(tmp_path, step):
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 30}
    straight = rcs_trainer(tmp_path, **settings)
    straight.train()
    resumed = rcs_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert_same(weights(straight), weights(resumed))
    assert straight.phases.current.indices == resumed.phases.current.indices
    times = ("seconds", "coreset_seconds", "train_")
    logs = [
        [{k: v for k, v in e.items() if not k.startswith(times)} for e in t.state.log_history if "loss" in e]
        for t in (straight, resumed)
    ]
    assert logs[0] == logs[1]


def test_another_coreset_is_another_run(tmp_path):
    rcs_trainer(tmp_path, save_strategy="steps", save_steps=11).train()
    with pytest.raises(ValueError, match=r"coreset: RCS\(fraction=0.5.* there, RCS\(fraction=0.4.* here"):
        rcs_trainer(tmp_path, method=tiny_rcs(fraction=0.4)).train(resume_from_checkpoint=True)


# ---------------------------------------------------------------------- what a selection leaves alone
@pytest.mark.parametrize("objective", [ACL(), DynACL(ema_decay=0.9), AIR(), SAT()], ids=lambda o: o.title)
@pytest.mark.parametrize("changes", [{}, {"candidates": "sample"}], ids=["batch", "sample"])
def test_a_selection_leaves_no_trace_in_the_model(tmp_path, objective, changes):
    trainer = rcs_trainer(tmp_path, objective, method=tiny_rcs(**changes))
    trainer.train()
    trainer.model.backbone.conv1.weight.requires_grad_(False)  # a mixture of flags and modes, to be put back as it is
    trainer.model.backbone.layer1.eval()
    trainer.model.backbone.layer2.train()
    for p in trainer.model.backbone.layer3.parameters():
        p.grad = torch.ones_like(p)

    def everything():
        networks = [n for n in (trainer.model, trainer.teacher) if n is not None]
        return (
            [v.clone() for n in networks for v in n.state_dict().values()],
            [p.grad for n in networks for p in n.parameters()],
            [p.requires_grad for n in networks for p in n.parameters()],
            [m.training for n in networks for m in n.modules()],
            trainer.model.switch.branch,
            torch.random.get_rng_state(),
            np.random.get_state()[1].tolist(),
            random.getstate(),
        )

    before = everything()
    gradients = [None if g is None else g.clone() for g in before[1]]
    trainer._select_coreset(7)
    after = everything()
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert all(a is b for a, b in zip(before[1], after[1], strict=True))
    assert all(g is None or torch.equal(g, p) for g, p in zip(gradients, after[1], strict=True))
    assert before[2:5] == after[2:5] and before[6:] == after[6:]
    assert torch.equal(before[5], after[5])
    assert trainer.phases.current.round == 7


# ---------------------------------------------------------------------- refused before training starts
@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"fraction": 0.1}, r"a coreset of 0.1 of 21 images has 2, fewer than the batch of 4: raise"),
        ({"validation_fraction": 0.99}, r"validation_fraction 0.99 of 24 images leaves 0 to train on and 24"),
        ({"validation_fraction": 0.001}, r"leaves 23 to train on and 1|leaves 24 to train on and 0"),
        ({"warmup_epochs": 4}, r"warm-up of 4 epochs takes the whole training of 4: lower"),
    ],
)
def test_an_impossible_coreset_is_refused_at_construction(tmp_path, method, message):
    if method == {"validation_fraction": 0.001}:
        # one image is always kept out, however small the fraction: nothing to refuse
        assert len(rcs_trainer(tmp_path, method=tiny_rcs(**method)).phases.validation) == 1
        return
    with pytest.raises(ValueError, match=message):
        rcs_trainer(tmp_path, method=tiny_rcs(**method))


def test_methods_without_a_candidate_loss_are_refused(tmp_path):
    with pytest.raises(ValueError, match="SimCLR has no loss by which RCS could choose images: use --coreset random"):
        rcs_trainer(tmp_path, SimCLR())


@pytest.mark.parametrize(
    ("labels", "message"),
    [(None, "SAT is supervised and 'tensors' has no labels"), (torch.zeros(24, dtype=torch.int64), "one class only")],
)
def test_sat_needs_labels(tmp_path, labels, message):
    data = ImageDataset.from_tensors(tiny_images().images, labels)
    with pytest.raises(ValueError, match=message):
        rcs_trainer(tmp_path, SAT(), data=data)


def test_the_released_signature_is_refused_for_sat(tmp_path):
    with pytest.raises(ValueError, match="averages gradients over the classes"):
        rcs_trainer(tmp_path, SAT(), method=tiny_rcs(variant="released"))


@pytest.mark.parametrize(
    ("objective", "head", "message"),
    [(SAT(), {"head": "projector", "num_classes": None}, "head='classifier'"), (ACL(), {}, "head='projector'")],
)
def test_a_head_of_the_other_kind_is_refused(tmp_path, objective, head, message):
    config = head or {"head": "classifier", "num_classes": 3}
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, objective, model=tiny_model(objective, **config))


def test_coresets_that_an_earlier_run_left_in_the_folder_go_and_other_files_stay(tmp_path):
    stale, other = tmp_path / "coreset-0077.json", tmp_path / "coreset-mine.json"
    for file in (stale, other):
        file.write_text("{}")
    rcs_trainer(tmp_path, save_strategy="no").train()
    assert not stale.exists() and other.exists()
    assert (tmp_path / "coreset-0001.json").is_file()


def test_a_resumed_run_keeps_the_coresets_it_has_chosen_so_far(tmp_path):
    rcs_trainer(tmp_path, save_strategy="steps", save_steps=1).train()
    first = (tmp_path / "coreset-0001.json").read_bytes()
    rcs_trainer(tmp_path, save_strategy="steps", save_steps=1).train(
        resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS - 1}")
    )
    assert (tmp_path / "coreset-0001.json").read_bytes() == first
