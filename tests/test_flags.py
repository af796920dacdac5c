"""What both command lines have in common: dataclasses as flags, budgets, YAML defaults, hints."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from transformers import TrainingArguments

from hf_robust import flags
from hf_robust.attack_flags import plain_attack_flags
from hf_robust.attacks import PGD
from hf_robust.flags import FlagParser, as_flags, belongs_to, given, method_names, read_yaml, set_defaults, take
from hf_robust.objectives import load_objective, objective_names
from hf_robust.training_args import RobustTrainingArguments


@dataclass
class Cake:
    """What the parsers of these tests read."""

    layers: int = field(default=3, metadata={"help": "Layers."})
    sugar: float = field(default=0.5, metadata={"help": "Share of sugar."})
    glaze: Literal["dark", "white"] = field(default="dark", metadata={"help": "Chocolate."})
    tops: list[float] | None = field(default=None, metadata={"help": "Fruit."})
    names: list[str] = field(default_factory=lambda: ["a", "b"], metadata={"help": "Guests."})


@pytest.fixture
def parser():
    return FlagParser([("cake", Cake)], lambda key: "belongs to --meal soup" if key == "salt" else "", prog="bake")


@pytest.fixture
def refusal(capsys):
    """Calls, expects exit status 2 and two lines on stderr, returns the first without the name of the program."""

    def call(function: Any, *arguments: Any, **named: Any) -> str:
        with pytest.raises(SystemExit) as exit:
            function(*arguments, **named)
        assert exit.value.code == 2
        message, advice = capsys.readouterr().err.splitlines()
        assert advice == "bake: --help lists all flags"
        return message.removeprefix("bake: error: ")

    return call


# ---------------------------------------------------------------------- parsing
def test_fields_are_flags_and_take_builds_the_dataclass_back(parser):
    values = vars(parser.parse_args("--layers 4 --sugar=1e-1 --tops 1 2.5 --glaze white".split()))
    assert take(Cake, {**values, "other": 1}) == Cake(4, 0.1, "white", [1.0, 2.5])
    assert take(Cake, values, layers=9).layers == 9
    assert take(Cake, vars(parser.parse_args([]))) == Cake()


def test_unknown_flags_say_where_they_belong_or_which_is_meant(parser, refusal):
    message = refusal(parser.parse_args, "--salt 1 --suger 0.1 --xyzzy".split())
    assert message == (
        "unrecognized arguments: --salt 1 (belongs to --meal soup), --suger 0.1 (did you mean 'sugar'?), --xyzzy"
    )
    assert "--lay 4" in refusal(parser.parse_args, ["--lay", "4"])  # no abbreviations
    assert "invalid choice: 'green'" in refusal(parser.parse_args, ["--glaze", "green"])


def test_help_shows_group_default_and_text(parser):
    text = parser.format_help()
    assert "\ncake:\n" in text and "Share of sugar. (default: 0.5)" in text


@pytest.mark.parametrize("kind", [RobustTrainingArguments])
def test_training_arguments_come_in_two_groups_ours_first(kind):
    parser = FlagParser([("training", kind)], lambda key: "")
    ours, rest = (
        {a.dest for a in g._group_actions} for g in parser._action_groups if g.title and g.title.startswith("training")
    )
    assert {"optimizer", "warmup_epochs", "learning_rate"} <= ours
    assert {"adam_beta1", "seed"} <= rest and not ours & rest
    assert ours | rest >= {f.name for f in dataclasses.fields(TrainingArguments) if f.init}


def test_arguments_of_a_subclass_count_as_ours():
    @dataclass
    class More(RobustTrainingArguments):
        extra: int = field(default=1, metadata={"help": "More."})

    parser = FlagParser([("training", More)], lambda key: "")
    ours = next(g for g in parser._action_groups if g.title == "training")
    assert {"extra", "optimizer"} <= {a.dest for a in ours._group_actions}


# ---------------------------------------------------------------------- dataclasses as flags
def test_as_flags_leaves_fields_out_and_prefixes_names():
    assert as_flags(Cake) is Cake and as_flags(Cake, ["absent"]) is Cake
    view = as_flags(Cake, ["sugar", "tops"])
    assert [f.name for f in dataclasses.fields(view)] == ["layers", "glaze", "names"]
    assert view().names == ["a", "b"] and view().names is not view().names
    view = as_flags(Cake, prefix="my_")
    assert [f.name for f in dataclasses.fields(view)][:2] == ["my_layers", "my_sugar"]
    parser = FlagParser([("cake", view)], lambda key: "")
    assert parser.parse_args("--my_tops 1 2 --my-glaze white".split()).my_tops == [1.0, 2.0]


def test_belongs_to_names_all_owners():
    fields_of = {"a": {"x", "y"}, "b": {"y"}, "c": {"z"}}
    assert belongs_to("y", "mode", fields_of) == "belongs to --mode a or b"
    assert belongs_to("z", "mode", fields_of) == "belongs to --mode c"
    assert belongs_to("w", "mode", fields_of) == ""


def test_given_sees_both_spellings_and_no_values():
    argv = ["--my-flag=3", "--other_one", "name", "--third"]
    assert given(argv, "my_flag") and given(argv, "other_one") and given(argv, "third")
    assert not given(argv, "name") and not given(argv, "my") and not given(argv, "my_flag_more")


def test_methods_of_the_two_stages_are_all_methods():
    first, second = method_names(finetuning=False), method_names(finetuning=True)
    assert sorted([*first, *second]) == objective_names() and not set(first) & set(second)
    assert {"acl", "air", "dynacl", "sat", "simclr"} <= set(first)
    assert {"aff", "alf", "autolora", "lora", "slf"} <= set(second)
    known = {f.name for f in dataclasses.fields(RobustTrainingArguments)}
    assert {"learning_rate", "num_train_epochs"} <= set(load_objective("aff").recipe) & known


# ---------------------------------------------------------------------- the attack's flags
def test_budgets_are_read_and_shown_as_fractions():
    parser = FlagParser([("attack", plain_attack_flags())], lambda key: "", prog="bake")
    assert "(default: 8/255)" in parser.format_help()
    assert take(PGD, vars(parser.parse_args([]))) == PGD()
    assert parser.parse_args(["--eps", "16/255"]).eps == 16 / 255
    assert [flags.show_budget(b) for b in (8 / 255, 1.0, 0.05)] == ["8/255", "255/255", "0.05"]


def test_the_gaussian_start_can_be_taken_off_again(refusal):
    parser = FlagParser([("attack", plain_attack_flags())], lambda key: "", prog="bake")
    parser.set_defaults(start_std=0.001)
    assert parser.parse_args([]).start_std == 0.001
    assert parser.parse_args(["--start_std", "none"]).start_std is None
    assert parser.parse_args(["--start_std", "0.01"]).start_std == 0.01
    assert "write a number or none, got 'some'" in refusal(parser.parse_args, ["--start_std", "some"])


# ---------------------------------------------------------------------- YAML
def test_values_of_yaml_become_defaults_of_the_type_of_the_flag(parser):
    set_defaults(parser, {"layers": "5", "sugar": 1, "tops": [1, 2], "glaze": "white"}, "x.yaml")
    values = parser.parse_args(["--sugar", "0.25"])
    assert (values.layers, values.sugar, values.tops, values.glaze) == (5, 0.25, [1, 2], "white")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"salt": 1, "suger": 2}, "unknown key in x.yaml: 'salt' (belongs to --meal soup), 'suger' (did you mean"),
        ({"config": "y"}, "unknown key in x.yaml: 'config'"),
        ({"glaze": "green"}, "glaze in x.yaml must be one of ['dark', 'white'], got 'green'"),
        ({"layers": None}, "layers in x.yaml needs a value, got null: leave the line out for 3"),
    ],
)
def test_what_cannot_be_a_default_is_an_error(parser, refusal, values, message):
    assert message in refusal(set_defaults, parser, values, "x.yaml", never_null="lay")


def test_null_is_a_value_unless_forbidden(parser):
    set_defaults(parser, {"sugar": None}, "x.yaml", never_null="lay")
    assert parser.parse_args([]).sugar is None


def test_files_are_read_or_named(tmp_path, refusal):
    parser = flags.ShortErrors(prog="bake")
    path = tmp_path / "x.yaml"
    path.write_text("1: 2\nlayers: 3\n")
    assert read_yaml(parser, str(path)) == {"1": 2, "layers": 3}
    path.write_text("- 1\n")
    assert "must hold 'flag: value' lines, got list" in refusal(read_yaml, parser, str(path))
    assert "cannot read --config nowhere: No such file" in refusal(read_yaml, parser, "nowhere")


def test_a_budget_that_cannot_be_read_is_an_argument_error():
    with pytest.raises(argparse.ArgumentTypeError, match="cannot read 'x' as a pixel budget"):
        flags.pixel_budget("x")
