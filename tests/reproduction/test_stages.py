"""Commands of the published rows: all of them parse, with the settings that the hours are predicted from."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from hf_robust.cli import PretrainRun, parse_pretrain
from hf_robust.evaluate_cli import parse_evaluate
from hf_robust.finetune_cli import parse_finetune
from hf_robust.presets import load_preset
from hf_robust.reproduction.hours import Rate
from hf_robust.reproduction.stages import LastCheckpoint, Plan, Stage, row_stages, unique_stages
from hf_robust.reproduction.tables import choose_rows, load_dataset, load_table, table_names

ROOT = Path(__file__).parents[2]
PARSERS = {"pretrain": parse_pretrain, "finetune": parse_finetune, "evaluate": parse_evaluate}
TABLES = table_names()


@pytest.fixture(autouse=True)
def in_a_clone(monkeypatch):
    monkeypatch.chdir(ROOT)


def stages_of(table: str, row: str, plan: Plan | None = None) -> list[Stage]:
    (found,) = choose_rows(load_table(table), [row])
    return row_stages(found, plan or Plan())


def parsed(stage: Stage):
    """By the parser of the command; what it refuses fails the test with its message."""
    return PARSERS[stage.command]([*stage.words], prog=stage.name)


# ---------------------------------------------------------------------- the project's own parsers
@pytest.mark.parametrize("table", TABLES)
def test_every_command_parses(table, capsys):
    for stage in unique_stages(load_table(table).rows, Plan()):
        try:
            run = parsed(stage)
        except SystemExit:
            pytest.fail(f"{stage.shell}\n{capsys.readouterr().err}")
        folder = run.settings.output_dir if stage.command == "evaluate" else run.training.output_dir
        assert folder == stage.folder
        if stage.command == "pretrain":
            check_pretraining(stage, run)
            check_name(stage, run)
        if stage.command == "finetune":
            check_finetuning(stage, run)


def check_pretraining(stage: Stage, run: PretrainRun) -> None:
    """The settings that the hours are predicted from are those that the command trains with."""
    told = stage.settings
    assert float(told["num_train_epochs"]) == run.training.num_train_epochs
    assert int(told["per_device_train_batch_size"]) == run.training.per_device_train_batch_size
    assert type(run.objective).__name__.lower() == told["objective"] and run.training.bf16
    assert int(told.get("steps", 5)) == run.attack.steps
    assert bool(told.get("ema_decay")) == (run.objective.teacher_kind == "ema")
    assert told.get("coreset", "full") == type(run.coreset).__name__.lower().removesuffix("coreset").replace(
        "data", ""
    )
    for name, default in (("fraction", None), ("warmup_epochs", None), ("interval", None), ("attack_steps", None)):
        if told.get("coreset", "full") != "full" and f"coreset_{name}" in told and hasattr(run.coreset, name):
            assert float(told[f"coreset_{name}"]) == getattr(run.coreset, name), (stage.name, name, default)


def check_name(stage: Stage, run: PretrainRun) -> None:
    """What the name of a network says is what is trained."""
    name = stage.name.removeprefix("encoders/")
    kind = next((word for word in ("rcs", "random") if f"_{word}_" in name), "full")
    assert type(run.coreset).__name__ == {"rcs": "RCS", "random": "RandomCoreset", "full": "FullData"}[kind], name
    if kind != "full":
        told = re.search(r"_(0\.\d+)_", name)
        assert run.coreset.fraction == (float(told[1]) if told else 0.2), name
    assert getattr(run.coreset, "refresh", False) is False, name  # Random: one fixed subset
    epochs, batch, rate = (100, 256, 0.1) if name.startswith(("sat", "standard")) else (1000, 512, 5.0)
    epochs, rate = (200, 0.6) if "imagenet32" in name and batch == 512 else (epochs, rate)
    found = run.training
    assert (found.num_train_epochs, found.per_device_train_batch_size, found.learning_rate) == (epochs, batch, rate)


def check_finetuning(stage: Stage, run) -> None:
    """Likewise; a preset that is named exists and gives the epochs."""
    told = dict(stage.settings)
    if "preset" in told:
        told = {**load_preset(told["preset"], told["mode"]).flags, **told}
        assert run.preset is not None and run.training.keep == "last"
    assert float(told["num_train_epochs"]) == run.training.num_train_epochs
    assert float(told.get("validation_fraction", 0)) == run.training.validation_fraction
    if run.post is not None:
        assert float(told["probe_stage_epochs"]) == run.post.probe_stage_epochs
    if run.training.lr_rule == "auto":
        assert run.training.halving_epochs and run.training.keep == "best"


@pytest.mark.parametrize(
    ("table", "rows"),
    [("stl10", ["*/aff"]), ("rcs", ["dynacl-*/slf"]), ("autolora", []), ("sat", ["*/alf"]), ("transfer", ["*/acl/*"])],
)
def test_every_smoke_command_parses(table, rows, capsys):
    for stage in unique_stages(choose_rows(load_table(table), rows), Plan(smoke=True)):
        try:
            run = parsed(stage)
        except SystemExit:
            pytest.fail(f"{stage.shell}\n{capsys.readouterr().err}")
        assert run.data.dataset_name == "digits" and "path/to" not in " ".join(stage.words)
        if stage.command == "pretrain":
            assert run.training.num_train_epochs == 2 and not run.training.bf16


@pytest.mark.parametrize(
    ("table", "row", "batch", "rate"),
    [
        ("imagenet32-cifar10", "acl-rcs-0.05/slf", 64, 0.01),  # transfer.py of the released code
        ("imagenet32-cifar100", "acl-rcs-0.05/alf", 128, 0.01),  # adv_tune.py
        ("imagenet32-cifar10", "acl-rcs-0.05/aff", 128, 0.1),
        ("imagenet32-cifar100", "acl-rcs-0.05/aff", 128, 0.1),
        ("sat", "rcs-0.1/alf", 128, 0.01),
        ("sat", "rcs-0.1/aff", 128, 0.01),  # run.sh; 0.1 in the blog post
    ],
)
def test_the_protocol_of_the_imagenet_tables(table, row, batch, rate):
    run = parsed(stages_of(table, row)[1]).training
    assert (run.per_device_train_batch_size, run.learning_rate, run.num_train_epochs) == (batch, rate, 30)
    assert (run.weight_decay, run.momentum, run.nesterov) == (5e-4, 0.9, True)
    assert (run.lr_rule, run.min_learning_rate, run.validation_fraction, run.keep) == ("cosine", 1e-6, 0, "last")


@pytest.mark.parametrize(("mode", "objective"), [("slf", "SLF"), ("alf", "ALF"), ("aff", "AutoLoRa")])
def test_the_protocol_of_autolora(mode, objective):
    run = parsed(stages_of("autolora", f"cifar100-stl10/dynacl/{mode}")[1])
    training, linear = run.training, list(range(4, 50, 4))
    assert type(run.objective).__name__ == objective and run.data.image_size == 32
    assert training.auto_lr_epochs == (linear if mode != "aff" else [16, 24, 28, 36, 40, 42, 44, 46, 48])
    assert (training.per_device_train_batch_size, training.learning_rate, training.num_train_epochs) == (128, 0.1, 50)
    assert (training.weight_decay, training.momentum, training.validation_fraction) == (2e-4, 0.9, 0.05)


def test_the_check_of_commands_can_fail(capsys):
    good = stages_of("cifar10", "acl/slf")[0]
    with pytest.raises(SystemExit):
        parsed(dataclasses.replace(good, arguments=(*good.arguments, "--no_such_flag", "1")))
    assert "no_such_flag" in capsys.readouterr().err


@pytest.mark.parametrize("row", ["dynacl-air++/aff", "dynacl/slf"])
def test_a_shell_reads_the_printed_command_as_it_is_run(row):
    for stage in stages_of("cifar10", row):
        text = re.sub(r'"\$\(ls -d (\S+)/checkpoint-\* \| sort -V \| tail -n 1\)"', r"'\1/checkpoint-*'", stage.shell)
        text = text.replace("\\\n", "")
        assert shlex.split(text) == ["hf-robust", stage.command, *stage.words]
        assert all(len(line) <= 119 for line in stage.shell.splitlines())


def test_a_shell_finds_the_last_checkpoint(tmp_path):
    for name in ("checkpoint-98000", "checkpoint-970", "checkpoint-9"):  # the last in time is not the last in number
        (tmp_path / "a folder" / name).mkdir(parents=True)
    command = f"printf %s {LastCheckpoint(str(tmp_path / 'a folder')).shell}"
    found = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout
    assert found == str(tmp_path / "a folder" / "checkpoint-98000")


# ---------------------------------------------------------------------- what follows what
def names(table: str, row: str) -> list[str]:
    return [stage.name for stage in stages_of(table, row)]


def test_the_stages_of_a_row():
    assert names("cifar10", "dynacl++/alf") == [
        "encoders/dynacl_cifar10",
        "encoders/dynacl_cifar10++",
        "classifiers/dynacl_cifar10++-cifar10-alf",
        "classifiers/dynacl_cifar10++-cifar10-alf/evaluation",
    ]
    assert names("sat", "rcs-0.1/alf")[0] == "encoders/sat_rcs_0.1_imagenet32"
    assert [stage.needs for stage in stages_of("sat", "rcs-0.1/alf")][1:] == [
        ("encoders/sat_rcs_0.1_imagenet32",),
        ("classifiers/sat_rcs_0.1_imagenet32-cifar10-alf",),
    ]


def test_what_rows_share_stands_once():
    rows = [*load_table("cifar10").rows, *load_table("rcs").rows]
    found = unique_stages(rows, Plan())
    every = [stage for row in rows for stage in row_stages(row, Plan())]
    assert len({stage.name for stage in every}) == len(found) < len(every)
    by_name = {stage.name: stage for stage in found}
    assert all(by_name[stage.name].words == stage.words for stage in every), "one folder, two commands"
    position = {stage.name: number for number, stage in enumerate(found)}
    assert all(position[need] < position[stage.name] for stage in found for need in stage.needs)


def test_no_two_tables_give_one_folder_two_commands():
    found: dict[str, list[str]] = {}
    for table in TABLES:
        for stage in unique_stages(load_table(table).rows, Plan()):
            assert found.setdefault(stage.name, stage.words) == stage.words


@pytest.mark.parametrize(
    ("table", "row", "start"),
    [
        ("cifar10", "acl/slf", "outputs/reproduction/encoders/acl_cifar10/encoder"),
        ("cifar10", "acl/aff", LastCheckpoint("outputs/reproduction/encoders/acl_cifar10")),  # both branches
        ("cifar10", "dynacl/aff", "outputs/reproduction/encoders/dynacl_cifar10/encoder"),  # the momentum encoder
        ("cifar10", "dynacl-air++/aff", "outputs/reproduction/encoders/dynacl_air_cifar10++/encoder"),
        ("transfer", "cifar10-stl10/acl/aff", "outputs/reproduction/encoders/acl_cifar10/encoder"),  # one branch
        ("transfer", "cifar100-stl10/acl/aff", LastCheckpoint("outputs/reproduction/encoders/acl_cifar100")),
        ("sat", "entire/aff", "outputs/reproduction/encoders/sat_entire_imagenet32/encoder"),
    ],
)
def test_where_fine_tuning_starts(table, row, start):
    arguments = stages_of(table, row)[-2].arguments
    assert arguments[arguments.index("--encoder") + 1] == start


def test_clusters_come_from_the_clean_branch_where_there_is_one():
    dynacl, air = (stages_of("cifar100", f"{name}++/slf")[1] for name in ("dynacl", "dynacl-air"))
    assert dynacl.settings["clusters"] == "10" and dynacl.settings["encoder"].endswith("/encoder")
    assert air.settings["clusters"] == "100" and air.settings["encoder"].endswith("/checkpoint-*")


@pytest.mark.parametrize(
    ("table", "row", "metrics"),
    [
        ("transfer", "cifar10-stl10/acl/aff", ["accuracy", "pgd20", "autoattack"]),
        ("sat", "entire/aff", ["accuracy", "pgd20"]),
    ],
)
def test_what_is_measured(table, row, metrics):
    assert stages_of(table, row)[-1].settings["metrics"] == metrics


# ---------------------------------------------------------------------- the user's plan
def test_the_users_data_sets_and_flags():
    mine = dataclasses.replace(load_dataset("cifar10"), name="my/images", image_column="image", label_column="cls")
    plan = Plan(
        output_dir="out",
        data={"cifar10": mine},
        precision="fp32",
        n_examples=1000,
        pretrain_args=("--num_train_epochs", "200"),
        finetune_args=("--seed", "5"),
    )
    runs = [parsed(stage) for stage in stages_of("cifar10", "acl/slf", plan)]
    for run in runs:
        assert (run.data.dataset_name, run.data.image_column, run.data.label_column) == ("my/images", "image", "cls")
    assert runs[0].training.num_train_epochs == 200 and not runs[0].training.bf16
    assert (
        parsed(stages_of("cifar10", "acl/slf", dataclasses.replace(plan, smoke=True))[0]).training.num_train_epochs
        == 200
    )
    assert runs[1].training.seed == 5 and runs[2].settings.n_examples == 1000


def test_columns_of_a_data_set_of_ones_own_are_found_by_type():
    mine = dataclasses.replace(load_dataset("cifar10"), name="my/images", image_column=None, label_column=None)
    for stage in stages_of("cifar10", "acl/slf", Plan(data={"cifar10": mine})):
        data = parsed(stage).data
        assert (data.dataset_name, data.image_column or None, data.label_column or None) == ("my/images", None, None)


def test_hours_follow_the_flags():
    rate = Rate.assumed()

    def hours(plan: Plan) -> list[float]:
        return [rate.hours(stage.work) for stage in stages_of("cifar10", "acl/aff", plan)]

    full = hours(Plan())
    assert full[0] == pytest.approx(1000 * rate.epoch_seconds / 3600, rel=1e-3)
    short = hours(Plan(pretrain_args=("--num_train_epochs", "200"), n_examples=1000))
    assert short[0] == pytest.approx(full[0] / 5) and short[1] == full[1] and short[2] == pytest.approx(full[2] / 10)
    assert hours(Plan(precision="fp32"))[0] == pytest.approx(2 * full[0])


def test_slips():
    with pytest.raises(ValueError, match="precision must be bf16 or fp32, got 'fp16'"):
        Plan(precision="fp16")


def test_away_from_a_clone_the_message_says_so(monkeypatch, tmp_path):
    from hf_robust.reproduction import stages

    monkeypatch.chdir(tmp_path)
    assert stages_of("cifar10", "acl/slf")[0].settings["objective"] == "acl"  # installed from a clone
    stages._config.cache_clear()
    monkeypatch.setattr(stages.hf_robust, "__file__", str(tmp_path / "site-packages" / "hf_robust" / "__init__.py"))
    with pytest.raises(ValueError, match="the commands name files of a clone of the repository, install it there"):
        stages_of("cifar10", "acl/slf")
    stages._config.cache_clear()
