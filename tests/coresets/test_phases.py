"""Warm-up, selections and what a checkpoint keeps of them, with a method that only notes when it is asked."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import pytest
import torch
from selection_task import ATTACK, CPU
from training import tiny_images

from hf_robust.coresets import RCS, ChosenCoreset, Coreset, FullData, RandomCoreset, Selection, SelectionTask
from hf_robust.coresets.phases import CoresetPhases, seeded_generator
from hf_robust.data import ImageDataset


@dataclass
class Sliding(ChosenCoreset):
    """Chooses a window of the pool that moves on by half its width; `returns` replaces it."""

    returns: torch.Tensor | None = None
    calls: int = 0

    def select(self, task: SelectionTask) -> Selection:
        start = self.calls * (task.budget // 2)
        self.calls += 1
        chosen = task.pool[torch.arange(start, start + task.budget) % len(task.pool)]
        return Selection(chosen.flip(0) if self.returns is None else self.returns, [0.5, 0.25])


def make_phases(method=None, images: int = 40, batch_size: int = 4, epochs: float = 100.0, seed: int = 3):
    method = method or Sliding(fraction=0.25, warmup_epochs=2.0, interval=5)
    return CoresetPhases(method, tiny_images(images), batch_size, seed, epochs)


def task_of(phases: CoresetPhases, round: int) -> SelectionTask:
    return phases.task(
        round,
        device=CPU,
        model=None,
        objective=None,
        views=None,
        originals=None,
        attack=ATTACK,
        autocast=contextlib.nullcontext,
        progress=0.0,
    )


def select(phases: CoresetPhases, round: int) -> dict[str, float]:
    return phases.select(round, task_of(phases, round))


# ---------------------------------------------------------------------- when
def test_the_published_schedule_selects_45_times():
    method = Sliding(fraction=0.2, warmup_epochs=100, interval=20, validation_fraction=0.1)
    phases = make_phases(method, images=50, epochs=1000)
    found, round = [], 0
    while phases.rounds.epoch(round) < 1000:
        if phases.due(round):
            select(phases, round)
            found.append(phases.current.epoch)
        phases.sampler.set_epoch(round)
        assert len(list(phases.sampler)) == 9
        round += 1
    assert round == phases.rounds.rounds(1000) == 500 + 900
    assert found == list(range(100, 1000, 20)) and len(found) == 45


def test_a_selection_is_not_repeated_for_the_round_it_was_made_for():
    phases = make_phases()
    assert phases.rounds.warmup == 8
    assert [phases.due(round) for round in range(9)] == [*[False] * 8, True]
    select(phases, 8)
    assert not phases.due(8) and not phases.due(9) and phases.due(13)
    select(phases, 13)
    assert not phases.due(13) and [r for r in range(14, 30) if phases.due(r)] == [18, 23, 28]


def test_without_a_coreset_any_round_after_the_warm_up_asks_for_one():
    phases = make_phases()
    assert phases.due(10) and phases.due(11)  # e.g. a checkpoint that was made without
    select(phases, 8)
    phases.restart()
    assert phases.current is None and phases.sampler.indices is None and phases.due(9)


def test_full_data_is_chosen_once():
    phases = make_phases(FullData())
    assert phases.due(0) and phases.rounds.length == 40
    assert select(phases, 0) == {}  # nothing to log
    assert phases.current.effective_fraction == 1 and sorted(phases.sampler) == list(range(40))
    assert not any(phases.due(round) for round in range(1, 50))


# ---------------------------------------------------------------------- what
def test_the_task_holds_the_split_the_budget_and_named_generators():
    method = Sliding(fraction=0.25, warmup_epochs=2, interval=5, validation_fraction=0.1)
    phases = make_phases(method, seed=6)
    task = task_of(phases, 8)
    assert (len(task.pool), len(task.validation), task.budget, task.batch_size, task.seed) == (36, 4, 9, 4, 6)
    assert not set(task.pool.tolist()) & set(task.validation.tolist()) and task.dataset is phases.dataset

    def numbers(task: SelectionTask, name: str) -> tuple[float, ...]:
        return tuple(torch.rand(4, generator=task.generator(name)).tolist())

    assert numbers(task, "order") == numbers(task_of(phases, 8), "order")
    others = [(task, "attack"), (task_of(phases, 13), "order"), (task_of(make_phases(method, seed=7), 8), "order")]
    assert len({numbers(task, "order"), *(numbers(*other) for other in others)}) == 4


def test_a_coreset_is_recorded_sorted_with_what_made_it():
    phases = make_phases()
    logs = select(phases, 8)
    current = phases.current
    assert current.indices == list(range(10)) == phases.sampler.indices.tolist()
    assert (current.dataset, current.dataset_size, current.pool_size) == ("tiny", 40, 40)
    assert (current.fraction, current.effective_fraction) == (0.25, 0.25)
    assert (current.epoch, current.round, current.gains) == (2.0, 8, [0.5, 0.25])
    assert current.method.startswith("Sliding(fraction=0.25") and current.seconds == logs["coreset_seconds"] >= 0
    assert logs["coreset_images"] == 10 and logs["coreset_effective_fraction"] == 0.25
    assert "coreset_overlap" not in logs


def test_the_overlap_with_the_coreset_before_is_logged():
    phases = make_phases()
    select(phases, 8)
    assert select(phases, 13)["coreset_overlap"] == 0.5
    assert phases.sampler.indices.tolist() == list(range(5, 15))


def test_the_effective_fraction_is_that_of_the_pool():
    method = RCS(variant="released", fraction=0.3, warmup_epochs=0, validation_fraction=0.1)
    phases = make_phases(method, images=50)  # 13 of 45: three minibatches of 4
    assert phases.rounds.length == 12
    phases.method = Sliding(fraction=0.3, warmup_epochs=0)
    assert select(phases, 0)["coreset_effective_fraction"] == pytest.approx(12 / 45)
    assert phases.current.fraction == 0.3


@pytest.mark.parametrize(
    "indices",
    [
        range(9),
        range(11),
        [0, 0, 1, 2, 3, 4, 5, 6, 7, 8],
        [40, 1, 2, 3, 4, 5, 6, 7, 8, 9],
        [-1, 1, 2, 3, 4, 5, 6, 7, 8, 9],
        [],
    ],
    ids=["too few", "too many", "twice", "outside", "negative", "none"],
)
def test_other_than_the_budget_of_distinct_images_of_the_pool_is_refused(indices):
    phases = make_phases(Sliding(fraction=0.25, warmup_epochs=2, returns=torch.tensor(list(indices)).long()))
    with pytest.raises(RuntimeError, match="must choose 10 distinct images of its pool, got"):
        select(phases, 8)
    assert phases.current is None and phases.sampler.indices is None


def test_images_of_the_validation_split_are_refused():
    method = Sliding(fraction=0.25, warmup_epochs=2, validation_fraction=0.25)
    phases = make_phases(method)
    method.returns = torch.cat([phases.validation[:1], phases.pool[:7]])
    assert len(method.returns) == phases.rounds.length
    with pytest.raises(RuntimeError, match="distinct images of its pool"):
        select(phases, phases.rounds.warmup)


# ---------------------------------------------------------------------- files
def test_one_file_per_selection_numbered_by_the_epoch(tmp_path):
    phases = make_phases()
    assert phases.write(tmp_path / "run") is None
    select(phases, 8)
    assert phases.write(tmp_path / "run").name == "coreset-0002.json"
    first = phases.current
    select(phases, 13)
    assert phases.write(tmp_path / "run").name == "coreset-0007.json"
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["coreset-0002.json", "coreset-0007.json"]
    assert Coreset.load(tmp_path / "run" / "coreset-0002.json") == first


def test_a_checkpoint_takes_the_coreset_up_again(tmp_path):
    phases, fresh = make_phases(), make_phases()
    select(phases, 8)
    phases.save(tmp_path)
    fresh.load(tmp_path)
    assert fresh.current == phases.current
    phases.sampler.set_epoch(10)
    fresh.sampler.set_epoch(10)
    assert list(fresh.sampler) == list(phases.sampler)
    assert not fresh.due(8) and not fresh.due(12) and fresh.due(13)  # as if it had not been interrupted


def test_a_checkpoint_of_the_warm_up_has_no_coreset(tmp_path):
    phases = make_phases()
    phases.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    phases.load(tmp_path)
    assert phases.current is None and phases.due(8)


def test_full_data_leaves_no_file_in_a_checkpoint(tmp_path):
    phases = make_phases(FullData())
    select(phases, 0)
    phases.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_named(tmp_path):
    phases = make_phases()
    select(phases, 8)
    phases.save(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:40])
    with pytest.raises(ValueError, match=file.name):
        make_phases().load(tmp_path)


# ---------------------------------------------------------------------- refusals
def test_a_coreset_smaller_than_a_batch_is_refused():
    assert make_phases(RandomCoreset(fraction=0.1, warmup_epochs=1)).rounds.length == 4
    with pytest.raises(
        ValueError, match="0.1 of 40 images has 4, fewer than the batch of 5: raise --coreset_fraction"
    ):
        make_phases(RandomCoreset(fraction=0.1, warmup_epochs=1), batch_size=5)


def test_a_released_budget_below_one_minibatch_is_refused():
    with pytest.raises(ValueError, match="has 0, fewer than the batch of 4"):
        make_phases(RCS(variant="released", fraction=0.05, warmup_epochs=1, validation_fraction=0.1))


@pytest.mark.parametrize("fraction, left", [(0.99, "0 to train on"), (0.97, "1 to train on")])
def test_a_validation_split_that_leaves_nothing_to_train_on_is_refused(fraction, left):
    with pytest.raises(ValueError, match=left):
        make_phases(RandomCoreset(fraction=0.5, validation_fraction=fraction, warmup_epochs=1))


def test_the_way_out_of_a_bad_split_is_one():
    """The bounds in the message are values that work."""
    for fraction in (1 / 40, 1 - 2 / 40):
        phases = make_phases(RandomCoreset(fraction=1, validation_fraction=fraction, warmup_epochs=1), batch_size=2)
        assert len(phases.pool) >= 2 and len(phases.validation) >= 1


@pytest.mark.parametrize("epochs", [50.0, 100.0])
def test_a_warm_up_as_long_as_the_training_is_refused(epochs):
    method = Sliding(fraction=0.25, warmup_epochs=100.0)
    with pytest.raises(ValueError, match=rf"warm-up of 100 epochs takes the whole training of {epochs:g}"):
        make_phases(method, epochs=epochs)
    make_phases(method, epochs=101)
    make_phases(method, epochs=0)  # the length is not known: --max_steps


def test_full_data_trains_for_any_time():
    assert not make_phases(FullData(), epochs=0.5).rounds.warmup


# ---------------------------------------------------------------------- generators
def test_generators_are_told_apart_by_all_their_names():
    names = [(1, 0), (0, 1), (10,), (1, "0a"), (1, 0, ""), ("1/0", 1), (2**40, 0)]
    draws = {int(torch.randint(2**62, (), generator=seeded_generator(CPU, *n))) for n in names}
    assert len(draws) == len(names)
    one, other = (torch.rand(3, generator=seeded_generator(CPU, 3, "coreset", 20)) for _ in range(2))
    assert torch.equal(one, other)


def test_where_short_batches_are_dropped_a_coreset_is_whole_batches():
    """Otherwise several processes would train on less than the log says."""
    images = ImageDataset.from_tensors(torch.zeros(100, 3, 2, 2, dtype=torch.uint8))

    def length(fraction: float, whole: bool) -> int:
        method = RandomCoreset(fraction=fraction, warmup_epochs=1, interval=1)
        return CoresetPhases(method, images, 8, 0, 10, whole_batches=whole).rounds.length

    assert [length(f, False) for f in (0.1, 0.2, 0.99)] == [10, 20, 99]
    assert [length(f, True) for f in (0.1, 0.19, 0.99)] == [8, 16, 96]
    full = CoresetPhases(FullData(), images, 8, 0, 10, whole_batches=True)
    assert full.rounds.length == 100


def test_epochs_end_and_checkpoints_are_due():
    """Three rounds of warm-up to the epoch, then one, with a selection every second one."""
    images = ImageDataset.from_tensors(torch.zeros(24, 3, 2, 2, dtype=torch.uint8))
    phases = CoresetPhases(RandomCoreset(fraction=1 / 3, warmup_epochs=2, interval=2), images, 4, 0, 10)
    found = [phases.close(rounds) for rounds in range(1, 11)]
    assert [keep for *_, keep in found] == [False, False, True, False, False, True, False, True, False, True]
    assert [now for _, now, _ in found] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2, 3, 4, 5, 6])
    assert phases.close(6.5) == (2.0, 2.5, False)


def test_steps_of_a_training():
    images = ImageDataset.from_tensors(torch.zeros(24, 3, 2, 2, dtype=torch.uint8))
    phases = CoresetPhases(RandomCoreset(fraction=1 / 3, warmup_epochs=2, interval=2), images, 4, 0, 10)
    assert phases.steps(10, -1, 2) == (6 + 8) * 2
    assert phases.steps(10, 13, 2) == 13
    with pytest.raises(ValueError, match="whole training of 12 steps: lower --coreset_warmup_epochs"):
        phases.steps(10, 12, 2)
    assert CoresetPhases(FullData(), images, 4, 0, 10).steps(10, -1, 6) == -1
