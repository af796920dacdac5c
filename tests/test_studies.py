"""The studies: their lists of runs, their resume, their reports."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from training import tiny_images, tiny_model

from hf_robust.attacks import PGD
from hf_robust.hub import save_encoder
from hf_robust.objectives.aff import AFF
from hf_robust.objectives.alf import ALF
from hf_robust.objectives.autolora import AutoLoRa
from hf_robust.objectives.sat import SAT
from hf_robust.pretrainer import RobustPretrainer

STUDIES = Path(__file__).parent.parent / "examples" / "studies"


def load_study(name: str) -> ModuleType:
    """Under a name of its own: tests have a `finetuning` too, and a folder `coresets`."""
    spec = importlib.util.spec_from_file_location(f"study_of_{name}", STUDIES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    sys.path.insert(0, str(STUDIES))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(STUDIES))
    return module


cells = load_study("cells")
study = load_study("coresets")
finetuning = load_study("finetuning")
attacks = load_study("attack_schedules")
SMALL = dataclasses.replace(attacks.SIZES["smoke"], batch_size=8, epochs=1)


# ---------------------------------------------------------------------- the list of cells
@dataclass(frozen=True)
class Task:
    name: str
    needs: str | None = None


def work(folder, *tasks, **options):
    """The names in the order in which they ran."""
    ran = []

    def run(task):
        ran.append(task.name)
        return {"name": task.name}

    cells.work_through(tasks, run, folder, needs=lambda task: task.needs, **options)
    return ran


def test_a_cell_of_a_living_process_is_left_alone(tmp_path):
    lock = tmp_path / "cell.lock"
    assert cells.claim(lock)
    assert not cells.claim(lock)
    lock.write_text("999999999")  # no such process
    assert cells.claim(lock)


def test_cells_run_in_order_and_once(tmp_path):
    a, b, c = Task("a"), Task("b"), Task("c")
    assert work(tmp_path, a, b) == ["a", "b"]
    assert work(tmp_path, a, b, c) == ["c"]
    assert json.loads((tmp_path / "cells" / "a.json").read_text()) == {"name": "a"}
    assert not list((tmp_path / "cells").glob("*.lock"))


def test_a_cell_waits_for_the_one_it_needs_and_then_goes_first(tmp_path, monkeypatch):
    (tmp_path / "cells").mkdir()
    lock = tmp_path / "cells" / "encoder.lock"
    lock.write_text(str(os.getpid()))  # another process, as far as the list can tell
    slept = []

    def finish(seconds):
        slept.append(seconds)
        (tmp_path / "cells" / "encoder.json").write_text("{}")
        lock.unlink()

    monkeypatch.setattr(cells.time, "sleep", finish)
    assert work(tmp_path, Task("encoder"), Task("on top", "encoder"), Task("other")) == ["other", "on top"]
    assert len(slept) == 1

    def finishes_meanwhile(task):
        (tmp_path / "cells" / "base.json").write_text("{}")
        return {"order": ran.append(task.name)}

    ran = []
    tasks = [Task("urgent", "base"), Task("x"), Task("y")]
    cells.work_through(tasks, finishes_meanwhile, tmp_path, needs=lambda task: task.needs)
    assert ran == ["x", "urgent", "y"]


def test_a_need_that_another_process_finishes_just_now_is_seen(tmp_path, monkeypatch):
    def ends(folder, name):
        (folder / "cells" / f"{name}.json").write_text("{}")
        return False

    monkeypatch.setattr(cells, "is_running", ends)
    monkeypatch.setattr(cells.time, "sleep", lambda seconds: None)
    assert work(tmp_path, Task("top", "base")) == ["top"]


def test_a_cell_whose_need_nobody_runs_is_named(tmp_path, capsys):
    assert work(tmp_path, Task("base"), Task("top", "base"), only="top") == []
    assert "top waits for base, which is neither finished nor running" in capsys.readouterr().out


def test_a_broken_cell_is_taken_up_again(tmp_path):
    def fail(task):
        raise ValueError("the disk is full")

    with pytest.raises(ValueError, match="the disk is full"):
        cells.work_through([Task("a")], fail, tmp_path)
    (tmp_path / "cells" / "a.lock").write_text("999999999")  # that process has ended
    assert work(tmp_path, Task("a")) == ["a"]


# ---------------------------------------------------------------------- coresets
def test_every_method_fraction_and_seed_is_on_the_list():
    names = [cell.name for cell in study.cells(3)]
    assert len(names) == len(set(names)) == 3 * (1 + 9 + 4 + 1 + 4)
    for seed in (1, 2, 3):
        assert f"acl-full-1-seed{seed}" in names and f"sat-rcs-0.1-seed{seed}" in names
        for fraction in ("0.05", "0.1", "0.2"):
            assert {f"acl-{m}-{fraction}-seed{seed}" for m in ("random_fixed", "random_refresh", "rcs")} <= set(names)


def test_methods_of_a_fraction_choose_equally_many_images_from_one_pool():
    for size in study.SIZES.values():
        images = size.images or 50000
        chosen = [study.Cell("acl", m, 0.1, 1).coreset(size) for m in ("random_fixed", "random_refresh", "rcs")]
        pools = [len(method.split(images, 1)[0]) for method in chosen]
        assert len(set(pools)) == 1
        assert len({method.budget(pool, size.batch_size) for method, pool in zip(chosen, pools, strict=True)}) == 1


def test_run_goes_on_where_it_stopped_and_report_tells_what_was_found(tmp_path, capsys):
    flags = ["--size", "smoke", "--seeds", "1", "--dataset_name", "digits", "--output_dir", str(tmp_path)]
    study.main(["run", *flags, "--only", "sat-rcs", "--probe_every", "1"])
    (path,) = (tmp_path / "cells").glob("*.json")
    record = json.loads(path.read_text())
    assert record["method"] == "rcs" and record["objective"] == "sat"
    assert 0 < record["selection_cpu_seconds"] < record["cpu_seconds"]
    assert record["environment"] and record["size"]["epochs"] == 2
    curve = record["curve"]
    assert [point["epoch"] for point in curve] == [1, 2] and {"standard_accuracy", "seconds"} <= set(curve[0])
    assert 0 < curve[0]["cpu_seconds"] < curve[1]["cpu_seconds"] <= record["cpu_seconds"]
    written = path.stat().st_mtime_ns
    study.main(["run", *flags, "--only", "sat-rcs"])
    assert path.stat().st_mtime_ns == written
    capsys.readouterr()
    study.main(["report", "--output_dir", str(tmp_path)])
    text = capsys.readouterr().out
    assert f"| SAT | rcs | 0.1 | 46 | 1 | {100 * record['standard_accuracy']:.1f} |" in text
    assert (tmp_path / "time_against_accuracy_sat.png").stat().st_size > 10_000
    assert (tmp_path / "learning_curves_sat.png").stat().st_size > 10_000


def test_the_time_of_a_probe_is_not_counted(monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(study.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(study.time, "process_time", lambda: 0.0)
    trainer = study.Timed.__new__(study.Timed)
    trainer.started, trainer.cpu_started, trainer.curve = 0.0, 0.0, []
    trainer.state, trainer.args = SimpleNamespace(log_history=[]), SimpleNamespace(probe_every=0.0)
    assert trainer.clocks["seconds"] == 0
    trainer.end_epoch(0.0, 1.0)  # looks at the clock at 10 and at 20: ten seconds of probing
    assert trainer.clocks["seconds"] == 30 - 10


def test_a_report_of_nothing_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="no finished cell in .*start with `run`"):
        study.main(["report", "--output_dir", str(tmp_path)])


# ---------------------------------------------------------------------- attacks
def test_attacks_are_compared_seed_by_seed():
    listed = list(attacks.cells(3))
    assert len({cell.name for cell in listed}) == len(listed) == 3 * len(attacks.ATTACKS)
    assert [cell.seed for cell in listed] == sorted(cell.seed for cell in listed)
    pgd = {cell.attack: cell.pgd() for cell in listed}
    assert repr(pgd["published"]) == repr(PGD()) and pgd["decay3"].steps == 3
    assert dataclasses.replace(pgd["replay2"], replay=False) == pgd["flat2"]  # what it is to be compared with
    assert dataclasses.replace(pgd["early_stop"], min_gain=0) == pgd["published"]


def test_the_study_of_attacks_tells_price_and_gain(tmp_path, capsys):
    given = ["--size", "smoke", "--seeds", "1", "--dataset_name", "digits", "--output_dir", str(tmp_path)]
    for only in ("published", "decay3", "replay2"):
        attacks.main(["run", *given, "--only", only])
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "cells").glob("*.json")}
    assert {name: record["passes"] for name, record in found.items()} == {
        "published-seed1": 16,
        "decay3-seed1": 12,
        "replay2-seed1": 10,
    }
    published, decay = found["published-seed1"], found["decay3-seed1"]
    assert published["gain"] > 0 and 50 < published["gain_percent"] < 200
    assert decay["gigaflop_per_image"] == pytest.approx(0.75 * published["gigaflop_per_image"])
    assert 0 <= decay["pgd20_linf_8_255_accuracy"] <= 1 and decay["n_eval"] == 32
    capsys.readouterr()
    attacks.main(["report", "--output_dir", str(tmp_path)])
    text = capsys.readouterr().out
    assert text.index("published: 5 x 2 | 1 | 16.0") < text.index("decay3: 8, 4, 2 | 1 | 12.0 ")
    assert (tmp_path / "table.md").read_text() in text
    assert (tmp_path / "attack_price_against_accuracy.png").stat().st_size > 10_000


def test_watching_an_attack_changes_nothing(tmp_path):
    """Counting and measuring leave the weights as an ordinary training has them."""
    weights = []
    for quarter in (0.0, 2.0):  # measured all the time, never
        train = tiny_images(24)
        trainer = attacks.build(attacks.Cell("decay3", 1), SMALL, train, train, tmp_path)
        trainer.measured_from = quarter
        trainer.train()
        weights.append(trainer.model.state_dict())
        assert bool(trainer.watch.gains) is (quarter == 0)
    plain = RobustPretrainer(
        attacks.build(attacks.Cell("decay3", 1), SMALL, train, train, tmp_path).model,
        trainer.args,
        trainer.objective,
        trainer.attack,
        train_dataset=train,
    )
    plain.train()
    weights.append(plain.model.state_dict())
    assert all(torch.equal(weights[0][name], other[name]) for other in weights[1:] for name in other)


# ---------------------------------------------------------------------- fine-tuning
def test_the_list_has_seed_1_of_every_mode_before_seed_2():
    listed = list(finetuning.cells(["acl", "air"], "cifar10", 3))
    names = [cell.name for cell in listed]
    assert len(names) == len(set(names)) == 3 * (4 + 4 + 3 + 3 + 3 + 1 + 4 + 2)
    for encoder, dataset in (("acl", "cifar10"), ("acl", "digits"), ("air", "cifar10"), ("air", "digits")):
        for mode in ("slf", "alf", "aff", "autolora"):
            places = [names.index(f"{encoder}-{dataset}-{mode}-seed{seed}") for seed in (1, 2, 3)]
            assert places == sorted(places)
    core = [cell for cell in listed if cell.encoder == "acl" and cell.mode != "autolora_milestones"]
    assert [cell.seed for cell in core] == sorted(cell.seed for cell in core)
    assert len({cell.mode for cell in listed if cell.encoder == "acl++"}) == 2


def test_post_processed_encoders_come_after_the_cell_that_makes_them():
    names = [cell.name for cell in finetuning.cells(["acl", "air"], "cifar10", 2)]
    waiting = [cell for cell in finetuning.cells(["acl", "air"], "cifar10", 2) if cell.needs]
    assert {cell.needs for cell in waiting} <= set(names) and len(waiting) == 8
    assert all(names.index(cell.needs) < names.index(cell.name) for cell in waiting)


def test_digits_as_the_only_data_set_are_listed_once():
    names = [cell.name for cell in finetuning.cells(["acl", "air"], "digits", 1)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("mode", "objective"), [("alf", ALF), ("aff", AFF), ("autolora", AutoLoRa)])
def test_the_published_size_is_the_recipe(tmp_path, mode, objective):
    args = finetuning.arguments(finetuning.Cell("acl", "cifar10", mode, 1), finetuning.SIZES["published"], tmp_path)
    for name, value in objective.recipe.items():
        assert getattr(args, name) == value, name
    assert args.keep == ("best" if mode == "autolora" else "last")


def test_shorter_runs_keep_the_shares_of_the_published_one(tmp_path):
    def of(mode):
        return finetuning.arguments(finetuning.Cell("acl", "cifar10", mode, 1), finetuning.SIZES["cpu"], tmp_path)

    assert of("aff").lr_milestones == [4.8, 6.4]  # 15 and 20 of 25
    assert of("slf").lr_milestones == [3.2, 6.4]  # 10 and 20 of 25
    assert of("autolora").auto_lr_epochs == [2, 3, 4, 5, 6]  # looks after 17, 25, 29, 37, 41 ... of 50
    assert len({of(mode).num_train_epochs for mode in finetuning.MODES}) == 1
    assert of("aff").learning_rate == of("autolora").learning_rate == 0.1
    assert of("lp_aff").weight_decay == 1e-4 and of("aff").weight_decay == 2e-4


def test_the_two_scales_of_the_published_size_are_no_shares(tmp_path):
    size = dataclasses.replace(finetuning.SIZES["published"], epochs=25)
    args = finetuning.arguments(finetuning.Cell("acl", "cifar10", "autolora", 1), size, tmp_path)
    assert args.auto_lr_epochs == sorted(set(args.auto_lr_epochs)) and args.auto_lr_epochs[-1] == 23


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_encoder(tiny_model(SAT()), tmp_path_factory.mktemp("encoder"))


def flags(encoder, folder, *more):
    given = ["--size", "smoke", "--seeds", "1", "--dataset_name", "digits", "--output_dir", str(folder)]
    return ["run", *given, "--encoder", f"tiny={encoder}", *more]


def test_the_fine_tuning_study_goes_through_and_tells_what_it_found(encoder, tmp_path, capsys):
    finetuning.main(flags(encoder, tmp_path))
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "cells").glob("*.json")}
    names = [cell.name for cell in finetuning.cells(["tiny"], "digits", 1)]
    assert set(found) == set(names) and len(names) == 8
    aff, lora = found["tiny-digits-aff-seed1"], found["tiny-digits-autolora-seed1"]
    assert aff["n_train"] == lora["n_train"] == 48 and aff["epochs"] == lora["epochs"] == 2
    assert (aff["n_held_out"], lora["n_held_out"]) == (0, 16)
    same = found["tiny-digits-autolora_milestones-seed1"]
    assert same["method"] == lora["method"] and same["n_held_out"] == 16
    assert [same[key] for key in ("lr_rule", "lr_milestones", "kept")] == [
        aff[k] for k in ("lr_rule", "lr_milestones", "kept")
    ]
    assert (aff["kept"], lora["kept"]) == ("last", "best") and lora["kept_epoch"] in (1, 2)
    assert lora["lambda_2_last"] == pytest.approx(6 * (1 - lora["lambda_1_last"]))
    assert "lambda_1_last" not in aff and aff["learning_rate_last"] == pytest.approx(0.001)
    assert 0 <= lora["pgd20_linf_8_255_accuracy"] <= 1 and lora["n_eval"] == 16
    assert aff["environment"] and aff["size"]["epochs"] == 2
    start, improved = found["tiny-digits-slf-seed1"], found["tiny++-digits-slf-seed1"]
    post = found["tiny-digits-lp_aff-seed1"]
    assert start["encoder_weights"] == post["encoder_weights"] != improved["encoder_weights"]
    assert post["n_train"] == 64 and "standard_accuracy" not in post
    assert str(tmp_path) not in json.dumps({key: value for key, value in aff.items() if key != "environment"})
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    finetuning.main(flags(encoder, tmp_path))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()} == written
    capsys.readouterr()
    finetuning.main(["report", "--output_dir", str(tmp_path)])
    text = capsys.readouterr().out
    assert f"| digits | tiny | aff | 1 | 48 | 2 | {100 * aff['standard_accuracy']:.1f} |" in text
    assert text.index("| tiny | slf") < text.index("| tiny | autolora") < text.index("| tiny++ | slf")
    assert "lp_aff" not in text
    assert (tmp_path / "standard_against_robust.png").stat().st_size > 10_000


def test_vanilla_modes_do_not_see_what_is_held_out(encoder, tmp_path, monkeypatch):
    """Wrong labels on the held-out images change nothing."""
    finetuning.main(flags(encoder, tmp_path / "a", "--only", "tiny-digits-aff"))
    split = finetuning.split_validation

    def poisoned(*args):
        train, held_out = split(*args)
        return train, held_out.relabelled((held_out.labels + 1) % 10)

    monkeypatch.setattr(finetuning, "split_validation", poisoned)
    finetuning.main(flags(encoder, tmp_path / "b", "--only", "tiny-digits-aff"))
    first, second = (json.loads(next((tmp_path / x / "cells").glob("*.json")).read_text()) for x in "ab")
    assert first["log"][0]["loss"] == second["log"][0]["loss"]
    assert first["log"][-1]["train_loss"] == second["log"][-1]["train_loss"]
    assert first["standard_accuracy"] == second["standard_accuracy"]


def test_the_report_gives_mean_and_spread_over_seeds(tmp_path, capsys):
    (tmp_path / "cells").mkdir()
    for seed, standard in ((1, 0.4), (2, 0.5), (3, 0.6)):
        record = {
            "encoder": "acl",
            "dataset": "cifar10",
            "mode": "autolora",
            "seed": seed,
            "standard_accuracy": standard,
            "pgd20_linf_8_255_accuracy": 0.25,
            "n_train": 2560,
            "epochs": 8,
            "kept_epoch": 8 - seed,
            "learning_rate_last": 0.05,
            "lambda_1_last": 0.5,
            "cpu_seconds": 100 * seed,
        }
        (tmp_path / "cells" / f"{seed}.json").write_text(json.dumps(record))
    finetuning.main(["report", "--output_dir", str(tmp_path)])
    row = "| cifar10 | acl | autolora | 3 | 2560 | 8 | 50.0 ± 10.0 | 25.0 ± 0.0 | 7, 6, 5 | 0.05, 0.05, 0.05 "
    assert row + "| 0.50 ± 0.00 | 200 |" in capsys.readouterr().out


@pytest.mark.parametrize("given", [["--encoder", "outputs/acl"], ["--encoder", "acl="], []])
def test_an_encoder_without_a_name_is_an_error(tmp_path, given):
    with pytest.raises(SystemExit, match="write --encoder NAME=DIR_OR_REPO"):
        finetuning.main(["run", "--size", "smoke", "--output_dir", str(tmp_path), *given])
