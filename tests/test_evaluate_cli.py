"""The flags of evaluation: defaults, YAML, and mistakes that end in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_robust.evaluate_cli import EvaluateArguments, EvaluateDataArguments, parse_evaluate

CONFIG = Path(__file__).parents[1] / "examples" / "configs" / "evaluate" / "digits_cpu.yaml"


def parse(text: str, **settings):
    return parse_evaluate(text.split(), **settings)


def test_defaults_are_those_of_the_benchmark():
    run = parse("--model runs/x")
    assert run.model == "runs/x" and run.settings == EvaluateArguments() and run.data == EvaluateDataArguments()
    assert run.settings.metrics == ["accuracy", "pgd20", "autoattack", "corruptions"] and run.settings.eps == 8 / 255
    assert run.protocol.protocol is None and run.settings.resume is True and run.data.split == "test"


def test_flags_become_fields():
    run = parse(
        "--model user/name --dataset_name uoft-cs/cifar10 --metrics pgd50 autoattack --eps 4/255 --preset fast "
        "--n_examples 1000 --mean 0.5 0.4 0.3 --std 1 1 1 --resume false --subfolder native --update_card --strict"
    )
    assert run.settings.metrics == ["pgd50", "autoattack"] and run.settings.eps == 4 / 255
    assert run.loading.mean == [0.5, 0.4, 0.3] and run.loading.subfolder == "native"
    assert run.settings.n_examples == 1000 and not run.settings.resume and run.settings.update_card
    assert run.settings.strict and run.data.dataset_name == "uoft-cs/cifar10"


def test_protocols_take_further_flags_of_fine_tuning():
    argv = ["--model", "enc", "--protocol", "slf", "aff", "--finetune_args", "--num_train_epochs 2 --bf16 true"]
    run = parse_evaluate(argv)
    assert run.protocol.protocol == ["slf", "aff"] and run.protocol.finetune_args == "--num_train_epochs 2 --bf16 true"


def test_a_file_gives_defaults_and_flags_override_it(tmp_path):
    (tmp_path / "x.yaml").write_text("model: a\nmetrics: [accuracy]\neps: 2/255\nn_examples: 7\n")
    run = parse(f"--config {tmp_path / 'x.yaml'} --n_examples 9")
    assert (run.model, run.settings.metrics, run.settings.eps) == ("a", ["accuracy"], 2 / 255)
    assert run.settings.n_examples == 9
    assert parse("", default_config=tmp_path / "x.yaml").model == "a"
    assert parse("--model b", default_config=tmp_path / "x.yaml").settings == EvaluateArguments()


def test_the_example_without_arguments_evaluates_what_fine_tuning_leaves():
    run = parse("", default_config=CONFIG)
    assert run.model == "outputs/digits_finetune" and run.settings.n_examples == 100
    assert f"--config examples/configs/evaluate/{CONFIG.name}\n" in CONFIG.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--model is missing: name a folder that examples/finetune.py wrote, or a Hub repository"),
        ("--model x --metrics acuracy", "unknown metric 'acuracy': did you mean 'accuracy'?"),
        ("--model x --metrics pgd20 --norm l1", "for l1 leave it out"),
        ("--model x --eps eight", "cannot read 'eight' as a pixel budget"),
        ("--model x --preset quick", "invalid choice: 'quick'"),
        ("--model x --protocol slf alff", "unknown protocol 'alff': known are slf, alf, aff, autolora, lora"),
        ("--model x --finetune_args=--bf16=true", "--finetune_args is for --protocol"),
        ("--model x --protocol slf --finetune_args=--mode=aff", "must leave --mode out"),
        ("--model x --encoder y", "--encoder y (write --model ENCODER --protocol slf alf aff)"),
        ("--model x --steps 50", "the number of steps is part of the metric: --metrics pgd50"),
        ("--model x --n_example 5", "did you mean 'n_examples'?"),
        ("--model x --n_examples 0", "n_examples must be 1 or more, got 0"),
        ("--model x --eps 8", "eps must be in (0, 1], got 8.0: budgets are in pixels of [0, 1]"),
        ("--model x --batch_size 0", "batch_size must be 1 or more, got 0"),
        ("--model x --metrics accuracy,pgd20", "'accuracy,pgd20': leave spaces between them"),
        ("--model x --metrics pgd20 --corruptions here", "images of the metric corruptions: add it to --metrics"),
        ("--config no/such.yaml", "cannot read --config no/such.yaml"),
    ],
)
def test_mistakes_end_in_one_line(text, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(text, prog="hf-robust evaluate")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.startswith("hf-robust evaluate: error: ")
    assert len(error.splitlines()) == 2


def test_flags_of_fine_tuning_with_an_open_quote_say_so(capsys):
    with pytest.raises(SystemExit):
        parse_evaluate(["--model", "x", "--protocol", "slf", "--finetune_args", "--report_to 'none"])
    assert 'cannot read --finetune_args "--report_to \'none": No closing quotation' in capsys.readouterr().err


def test_help_shows_groups_and_budgets(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert "8/255" in text and "what is measured:" in text and "an encoder, fine-tuned first:" in text
