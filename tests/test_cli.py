"""The command line of pre-training: flags, YAML, and one clear message for everything that is wrong."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from hf_robust.attack_flags import AttackArguments, plain_attack_flags
from hf_robust.attacks import PGD
from hf_robust.cli import DataArguments, ModelArguments, PretrainRun, parse_pretrain
from hf_robust.coresets import RCS, Coreset, FullData, RandomCoreset, StoredCoreset, coreset_names, load_coreset_method
from hf_robust.flags import method_names
from hf_robust.objectives import load_objective
from hf_robust.objectives.acl import ACL
from hf_robust.objectives.advcl import AdvCL
from hf_robust.objectives.air import AIR
from hf_robust.objectives.dynacl import DynACL
from hf_robust.objectives.sat import SAT
from hf_robust.objectives.simclr import SimCLR
from hf_robust.training_args import WITHOUT_EFFECT, RobustTrainingArguments

METHODS = method_names(finetuning=False)


@pytest.fixture
def config(tmp_path):
    """Writes the lines of a YAML file, returns its path."""

    def write(*lines: str, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def refused(capsys):
    """Parses, expects exit status 2 and nothing on stdout, returns the message."""

    def parse(*argv: str, **options) -> str:
        with pytest.raises(SystemExit) as exit:
            parse_pretrain(argv, **options)
        assert exit.value.code == 2
        out, err = capsys.readouterr()
        message, advice = err.splitlines()  # two lines, no usage, no traceback
        assert out == "" and ": error: " in message and advice.endswith("--help lists all flags")
        return message.split(": error: ", 1)[1]

    return parse


# ---------------------------------------------------------------------- defaults
def test_without_flags_every_default_is_the_dataclass_default():
    run = parse_pretrain([])
    assert run == PretrainRun(DataArguments(), ModelArguments(), ACL(), PGD(), run.training)
    reference = RobustTrainingArguments()
    for field in dataclasses.fields(RobustTrainingArguments):
        assert getattr(run.training, field.name) == getattr(reference, field.name), field.name
    assert run.model_args == {} and run.coreset == FullData()


@pytest.mark.parametrize("name", METHODS)
def test_every_objective_on_disk_has_its_fields_as_flags(name):
    method = load_objective(name)()
    teacher = ["--teacher", "some/encoder"] if method.teacher_kind == "frozen" else []
    run = parse_pretrain(["--objective", name.upper(), *teacher])
    assert (run.objective, run.attack) == (method, method.training_attack)
    assert {key: getattr(run.training, key) for key in method.recipe} == method.recipe


def test_a_recipe_stands_under_yaml_and_flags(config):
    path = config("objective: fare", "teacher: some/encoder", "learning_rate: 2.0e-5", "eps: 2/255")
    run = parse_pretrain(["--config", path, "--steps", "3"])
    assert (run.training.learning_rate, run.attack.eps, run.attack.steps) == (2e-5, 2 / 255, 3)
    assert (run.training.optimizer, run.training.weight_decay, run.attack.step_size) == ("adamw", 1e-4, 1 / 255)
    assert parse_pretrain([]).training.optimizer == "lars" and parse_pretrain([]).attack == PGD()


def test_a_frozen_teacher_is_named_where_one_is_needed(refused):
    assert parse_pretrain(["--objective", "deacl", "--teacher", "some/encoder"]).model.teacher == "some/encoder"
    assert refused("--objective", "deacl").startswith(
        "DeACL learns from a frozen teacher: add --teacher with the folder of an encoder, a Hub repository or a timm"
    )
    assert refused("--objective", "acl", "--teacher", "x/y") == (
        "--teacher x/y has no meaning for ACL: only methods such as deacl and fare learn from a frozen one"
    )


def test_flags_reach_every_part():
    run = parse_pretrain(
        "--objective dynacl --dataset_name some/set --split unlabeled --max_examples 100 --backbone vit_tiny_patch4_32"
        " --projector_layers 2 --temperature 0.1 --period 0.1 --ema_decay 0.99 --eps 16/255 --step_size 0.01 --steps 3"
        " --norm l2 --learning_rate 1e-3 --optimizer adamw --num_train_epochs 2.5 --bf16 --seed 7".split()
    )
    assert run.data == DataArguments("some/set", "unlabeled", max_examples=100)
    assert run.model == ModelArguments("vit_tiny_patch4_32", projector_layers=2)
    assert run.objective == DynACL(0.1, period=0.1, ema_decay=0.99)
    assert run.attack == PGD(16 / 255, 0.01, 3, "l2")
    training = run.training
    assert (training.learning_rate, training.optimizer, training.num_train_epochs) == (1e-3, "adamw", 2.5)
    assert training.bf16 is True and training.seed == 7


def test_sources_of_pseudo_labels(refused, tmp_path):
    run = parse_pretrain(["--objective", "advcl", "--clusters", "2", "10", "--teacher", "some/encoder"])
    assert run.objective == AdvCL(clusters=[2, 10]) and run.model.teacher == "some/encoder"
    assert parse_pretrain(["--objective", "advcl", "--pseudo_labels", "a.json"]).model.pseudo_labels == "a.json"
    assert refused("--objective", "acl", "--pseudo_labels", "a.json") == (
        "--pseudo_labels a.json has no meaning for ACL: only methods such as advcl learn them"
    )
    both = refused("--objective", "advcl", "--pseudo_labels", "a.json", "--teacher", "some/encoder")
    assert both.startswith("--pseudo_labels are there already, so --teacher has nothing to cluster: give one")


# ---------------------------------------------------------------------- budgets
@pytest.mark.parametrize(("text", "value"), [("8/255", 8 / 255), ("4/255", 4 / 255), ("0.05", 0.05), ("1e-2", 0.01)])
def test_budgets_are_fractions_or_numbers_in_both_places(config, text, value):
    assert parse_pretrain(["--eps", text, "--step_size", text]).attack == PGD(value, value)
    assert parse_pretrain(["--config", config(f"eps: {text}", f"step_size: {text}")]).attack == PGD(value, value)


def test_the_start_of_the_attack_may_be_gaussian(config, refused):
    assert parse_pretrain([]).attack.start_std is None
    assert parse_pretrain(["--start_std", "0.001"]).attack == PGD(start_std=0.001)
    assert parse_pretrain(["--config", config("start_std: 1.0e-3")]).attack == PGD(start_std=0.001)
    assert parse_pretrain(["--config", config("start_std:")]).attack == PGD()
    assert refused("--start_std", "0.001", "--random_start", "false").startswith("start_std=0.001 asks for a random")


def test_impossible_budgets_tell_what_to_write(refused, config):
    assert refused("--eps", "8") == (
        "eps must be in (0, 1], got 8.0: budgets are in pixels of [0, 1], for 8 levels write 8/255"
    )
    assert "cannot read 'eight' as a pixel budget: write a fraction such as 8/255" in refused("--eps", "eight")
    assert "cannot read 'eight' as a pixel budget" in refused("--config", config("step_size: eight"))
    assert "cannot read 'True' as a pixel budget" in refused("--config", config("eps: true"))


# ---------------------------------------------------------------------- YAML
def test_yaml_keys_are_defaults_and_flags_override_them(config):
    path = config("objective: dynacl", "learning_rate: 2.5", "steps: 7", "eps: 4/255", "period: 0.25", "seed: 3")
    run = parse_pretrain(["--config", path])
    assert (run.objective, run.attack, run.training.seed) == (DynACL(period=0.25), PGD(4 / 255, steps=7), 3)
    assert run.training.learning_rate == 2.5
    run = parse_pretrain([f"--config={path}", "--learning_rate", "0.5", "--steps=2", "--seed", "4"])
    assert (run.objective, run.attack, run.training.seed) == (DynACL(period=0.25), PGD(4 / 255, steps=2), 4)
    assert run.training.learning_rate == 0.5


def test_scalars_of_yaml_get_the_type_of_the_flag(config):
    run = parse_pretrain(
        [
            "--config",
            config(
                "weight_decay: 1e-6",  # YAML 1.1 reads this as text
                "learning_rate: 3",
                "num_train_epochs: '12'",
                "max_examples: null",
                "ema_decay: ~",
                "objective: dynacl",
                "normalize: false",
                "bf16: 'true'",
                "channels_last: yes",
                "eval_split: null",
                "split: 2024",
                "report_to: [tensorboard]",
            ),
        ]
    )
    training = run.training
    assert (training.weight_decay, training.learning_rate, training.num_train_epochs) == (1e-6, 3.0, 12.0)
    assert all(isinstance(v, float) for v in (training.weight_decay, training.learning_rate))
    assert run.data.max_examples is None and run.data.eval_split is None and run.data.split == "2024"
    assert run.objective == DynACL(ema_decay=None)
    assert run.model.normalize is False and training.bf16 is True and training.channels_last is True
    assert training.report_to == ["tensorboard"]


def test_booleans_on_the_command_line_override_those_of_the_file(config):
    path = config("normalize: false", "channels_last: true")
    run = parse_pretrain(["--config", path, "--normalize", "true", "--channels_last", "false"])
    assert run.model.normalize is True and run.training.channels_last is False
    assert parse_pretrain(["--config", config("normalize: true"), "--no_normalize"]).model.normalize is False
    assert parse_pretrain([]).model.normalize is None  # as the method was published


def test_unknown_keys_are_errors_with_a_suggestion(refused, config):
    message = refused("--config", config("learning_rat: 1", "temprature: 0.5", "xyzzy: 1"))
    assert "unknown key in" in message and "run.yaml" in message
    assert "'learning_rat' (did you mean 'learning_rate'?), 'temprature' (did you mean 'temperature'?)" in message
    assert "'xyzzy';" in message
    message = refused("--config", config("objective: simclr", "period: 0.1", "lambda1: 1"))
    assert "'lambda1' (belongs to --objective air), 'period' (belongs to --objective dynacl);" in message


@pytest.mark.parametrize("name", [n for n in method_names(finetuning=False) if n not in ("deacl", "fare", "advcl")])
def test_one_word_changes_the_method_of_a_file(name, config):
    file = config("objective: air", "base: dynacl", "lambda1: 2", "period: 0.1", "seed: 3")
    run = parse_pretrain(["--config", file, "--objective", name])
    assert type(run.objective) is load_objective(name) and run.training.seed == 3
    if name == "air":  # the same word again changes nothing
        assert run.objective.lambda1 == 2 and run.objective.base.period == 0.1


def test_another_base_leaves_out_what_the_file_says_to_its_own(config):
    file = config("objective: air", "base: dynacl", "lambda1: 2", "period: 0.1")
    run = parse_pretrain(["--config", file, "--base", "acl"])
    assert run.objective.lambda1 == 2 and type(run.objective.base) is ACL


def test_the_shipped_digits_run_takes_every_method_that_needs_no_encoder(config):
    file = str(Path(__file__).parents[1] / "examples" / "configs" / "digits_cpu.yaml")
    for name in ("rocl", "a_infonce", "simclr", "sat"):
        assert parse_pretrain(["--config", file, "--objective", name]).model.projector_layers is None
    for name in ("deacl", "fare", "advcl"):
        assert parse_pretrain(["--config", file, "--objective", name, "--teacher", "resnet18.a1_in1k"]).model.teacher


@pytest.mark.parametrize("line", ["1: 2", "on: 3", "help: true", "config: other.yaml", "no_normalize: true"])
def test_keys_that_are_no_flags_are_errors(refused, config, line):
    assert "unknown key in" in refused("--config", config("seed: 1", line))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["steps: 5.5"], "--steps: invalid int value: '5.5'"),
        (["steps: true"], "--steps: invalid int value: 'True'"),
        (["temperature: warm"], "--temperature: invalid float value: 'warm'"),
        (["optimizer: adam"], "optimizer in .* must be one of .*'lars', 'sgd', 'adamw'.*, got 'adam'"),
        (["norm: null"], "norm in .* must be one of .*'linf', 'l2'.*, got None"),
        (["learning_rate: null"], "learning_rate must be a number, 0 or more, got None"),
        (["normalize: perhaps"], "Truthy value expected: got perhaps"),
        (["model_args: [1, 2]"], r"--model_args must be a JSON object such as '{}', got '\[1, 2\]'"),
        (["- seed"], "must hold 'flag: value' lines, got list"),
        ([""], "must hold 'flag: value' lines, got NoneType"),
        (["a: [1"], "is not valid YAML"),
    ],
)
def test_wrong_values_in_yaml_are_errors(capsys, config, lines, message):
    with pytest.raises(SystemExit) as exit:
        parse_pretrain(["--config", config(*lines)])
    assert exit.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_file_that_cannot_be_read_is_named(refused, tmp_path):
    assert refused("--config", "nowhere.yaml") == "cannot read --config nowhere.yaml: No such file or directory"
    assert f"cannot read --config {tmp_path}: " in refused("--config", str(tmp_path))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    assert "is not valid YAML" in refused("--config", str(tmp_path / "binary.yaml"))


# ---------------------------------------------------------------------- arguments of the architecture
def test_model_args_are_json_or_a_yaml_mapping(config):
    expected = {"channels": [16, 32, 64, 128], "stem_stride": 2}
    as_flag = '{"channels": [16, 32, 64, 128], "stem_stride": 2}'
    assert parse_pretrain(["--model_args", as_flag]).model_args == expected
    mapping = config("model_args: {channels: [16, 32, 64, 128], stem_stride: 2}")
    assert parse_pretrain(["--config", mapping]).model_args == expected
    assert parse_pretrain(["--config", config(f"model_args: '{as_flag}'")]).model_args == expected
    assert parse_pretrain(["--config", mapping, "--model_args", "{}"]).model_args == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{channels: 3}", "--model_args must be JSON, got '{channels: 3}'"),
        ("", "--model_args must be JSON, got ''"),
        ("[1]", "--model_args must be a JSON object such as '{}', got '[1]'"),
        ("null", "--model_args must be a JSON object such as '{}', got 'null'"),
    ],
)
def test_bad_model_args_are_errors(refused, text, message):
    assert message in refused("--model_args", text)


# ---------------------------------------------------------------------- objective and base
def test_base_gives_air_its_method_and_brings_its_flags(config):
    assert parse_pretrain(["--objective", "air"]).objective == AIR(ACL())
    argv = "--objective air --base dynacl --period 0.1 --temperature 0.2 --lambda1 1 --formulation paper".split()
    expected = AIR(DynACL(0.2, period=0.1), 1.0, 0.5, "paper")
    assert parse_pretrain(argv).objective == expected
    path = config("objective: air", "base: dynacl", "period: 0.1", "temperature: 0.2", "lambda1: 1")
    run = parse_pretrain(["--config", path, "--formulation", "paper"])
    assert run.objective == expected
    assert parse_pretrain(["--config", config("objective: air", "base: null")]).objective == AIR(ACL())
    assert parse_pretrain(["--config", config("objective: null")]).objective == ACL()


def test_objective_and_base_of_the_command_line_win(config):
    path = config("objective: acl", "temperature: 0.2")
    assert parse_pretrain(["--config", path, "--objective", "simclr"]).objective == SimCLR(0.2)
    path = config("objective: air", "base: acl")
    assert parse_pretrain(["--config", path, "--base", "dynacl"]).objective == AIR(DynACL())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--objective aclx", "unknown objective 'aclx': did you mean 'acl'? known objectives are a_infonce, acl, adv"),
        ("--objective", "argument --objective: expected one argument"),
        ("--objective AFF", "AFF fine-tunes an encoder: run examples/finetune.py --mode aff"),
        ("--objective air --base slf", "slf fine-tunes an encoder: run examples/finetune.py --mode slf"),
        ("--base dynacl", "--base dynacl has no meaning for acl: only methods such as air stand on another"),
        ("--objective air --base dynalc", "unknown objective 'dynalc': did you mean 'dynacl'?"),
        (
            "--objective air --base air",
            "--base air stands on another method itself: give one that does not, such as acl",
        ),
        ("--objective air --base simclr", "AIR needs a base with a clean and an adversarial stream (ACL or DynACL)"),
        ("--objective air --mode a2a", "AIR needs a base with a clean and an adversarial stream (ACL or DynACL)"),
        ("--objective air --base dynacl --ema_decay 0.99", "leave ema_decay of its base unset"),
        ("--objective dynacl --period 50", "period must be in (0, 1], got 50.0: published runs use 50/1000 epochs"),
        ("--mode s2s", "argument --mode: invalid choice: 's2s'"),
        ("--period 0.1", "unrecognized arguments: --period 0.1"),  # DynACL's, not ACL's
        ("--learning_rat 1", "unrecognized arguments: --learning_rat 1"),  # abbreviations hide typing errors
        ("--learning-rat=1", "unrecognized arguments: --learning-rat=1 (did you mean 'learning_rate'?)"),
        ("--period 0.1 --x 1 -2", "--period 0.1 (belongs to --objective dynacl), --x 1 -2"),
        ("--learning_rate -1", "learning_rate must be a number, 0 or more, got -1.0"),
        ("--learning_rate fast", "--learning-rate: invalid float value: 'fast'"),
        ("--steps -1", "steps must be 0 or more, got -1"),
        ("--optim sgd", "has no effect here: choose with --optimizer"),
        ("digits", "unrecognized arguments: digits"),
    ],
)
def test_wrong_flags_are_errors(refused, argv, message):
    assert message in refused(*argv.split())


def test_an_objective_of_yaml_that_is_no_name_is_an_error(refused, config):
    assert "unknown objective '5': known objectives are" in refused("--config", config("objective: 5"))
    assert "unknown objective '5': known objectives are" in refused("--config", config("objective: air", "base: 5"))


# ---------------------------------------------------------------------- coreset
@pytest.fixture
def stored(tmp_path):
    """A coreset file: three of six images."""
    path = tmp_path / "coreset.json"
    Coreset([0, 2, 5], "RCS()", "tiny", 6, 6, 0.5, 0.5, 2.0, 2, 0.1).save(path)
    return path


@pytest.mark.parametrize("name", [name for name in coreset_names() if name != "file"])
def test_every_coreset_method_on_disk_is_found_by_its_name(config, name):
    assert parse_pretrain(["--coreset", name]).coreset == load_coreset_method(name)()
    assert parse_pretrain(["--config", config(f"coreset: {name}")]).coreset == load_coreset_method(name)()
    assert parse_pretrain(["--config", config("coreset: null")]).coreset == FullData()


def test_flags_of_a_coreset_method_are_its_fields_with_a_prefix(config):
    argv = "--coreset rcs --coreset_fraction 0.1 --coreset_warmup_epochs 2.5 --coreset-interval 3"
    argv += " --coreset_validation_fraction 0.02 --coreset_candidates sample --coreset_attack_steps 1"
    expected = RCS(0.1, 2.5, 3, 0.02, "sample", attack_steps=1, reattack=False)
    for reattack in ("--coreset_reattack false", "--no_coreset_reattack", "--coreset_reattack=false"):
        assert parse_pretrain(f"{argv} {reattack}".split()).coreset == expected
    # the warm-up of the learning rate has the same name, without the prefix
    run = parse_pretrain("--coreset random --coreset_refresh false --warmup_epochs 4".split())
    assert run.coreset == RandomCoreset(refresh=False) and run.training.warmup_epochs == 4
    lines = ("coreset: random", "coreset_fraction: 5.0e-2", "coreset_interval: 7", "coreset_refresh: no")
    run = parse_pretrain(["--config", config(*lines), "--coreset_interval", "8"])
    assert run.coreset == RandomCoreset(0.05, interval=8, refresh=False)
    run = parse_pretrain(["--config", config("coreset: random", "seed: 3"), "--coreset", "rcs"])
    assert run.coreset == RCS() and run.training.seed == 3
    run = parse_pretrain("--objective sat --coreset rcs --augmentation resized_crop".split())
    assert (run.objective, run.coreset) == (SAT("resized_crop"), RCS())


def test_a_stored_coreset_is_named_by_its_file(config, stored):
    assert parse_pretrain(["--coreset", f"file:{stored}"]).coreset == StoredCoreset(str(stored))
    path = config(f"coreset: file:{stored}", "coreset_warmup_epochs: 2")
    assert parse_pretrain(["--config", path]).coreset == StoredCoreset(str(stored), 2.0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--coreset rsc", "unknown coreset method 'rsc': did you mean 'rcs'? known are file, full, random, rcs"),
        ("--coreset rcs:x.json", "--coreset rcs reads no file, got 'rcs:x.json': write --coreset rcs"),
        ("--coreset file", "--coreset file names no file: write --coreset file:PATH"),
        ("--coreset file:", "--coreset file: names no file: write --coreset file:PATH"),
        ("--coreset file:no/such.json", "cannot read the coreset 'no/such.json' (No such file or directory)"),
        (f"--coreset file:{__file__}", "is no coreset file"),
        ("--coreset rcs --coreset_fraction 0", "coreset fraction must be in (0, 1], got 0.0"),
        ("--coreset random --coreset_fraction 1.5", "coreset fraction must be in (0, 1], got 1.5"),
        ("--coreset rcs --coreset_interval 2.5", "--coreset-interval: invalid int value: '2.5'"),
        ("--coreset rcs --coreset_candidates image", "--coreset-candidates: invalid choice: 'image'"),
        ("--coreset rcs --coreset_validation_fraction 0", "RCS needs validation images"),
        ("--coreset_fraction 0.1", "--coreset_fraction 0.1 (belongs to --coreset random or rcs)"),
        ("--coreset random --coreset-candidates=batch", "--coreset-candidates=batch (belongs to --coreset rcs)"),
        ("--coreset rcs --coreset_refresh", "--coreset_refresh (belongs to --coreset random)"),
        ("--coreset rcs --fraction 0.1", "--fraction 0.1 (did you mean 'coreset_fraction'?)"),
    ],
)
def test_wrong_coresets_are_errors(refused, argv, message):
    assert message in refused(*argv.split())


def test_wrong_coresets_of_yaml_are_errors(refused, config):
    message = refused("--config", config("coreset: random", "coreset_candidates: batch", "coreset_fractoin: 0.1"))
    assert "'coreset_candidates' (belongs to --coreset rcs)" in message
    assert "'coreset_fractoin' (did you mean 'coreset_fraction'?)" in message
    assert "'coreset_path'" in refused("--config", config("coreset: file:x.json", "coreset_path: y.json"))
    assert "coreset_fraction in " in refused("--config", config("coreset: rcs", "coreset_fraction: null"))
    assert "unknown coreset method '0.2'" in refused("--config", config("coreset: 0.2"))


@pytest.mark.parametrize("name", coreset_names())
def test_help_shows_the_flags_of_the_chosen_coreset_method_alone(capsys, stored, name):
    with pytest.raises(SystemExit):
        parse_pretrain(["--coreset", f"file:{stored}" if name == "file" else name, "--help"])
    text = capsys.readouterr().out
    assert "full, random, rcs" in " ".join(text.split()) and "file:PATH" in text
    kind = load_coreset_method(name)
    own = {f.name for f in dataclasses.fields(kind)} - {"path"}
    shown = set(re.findall(r"^  --coreset_(\w+) ", text, re.MULTILINE))
    assert shown == own
    assert (f"\ncoreset {kind.__name__}:\n" in text) is bool(own)
    words = " ".join(text.split())
    for field in dataclasses.fields(kind):
        assert " ".join(field.metadata.get("help", "").split()) in words, field.name


# ---------------------------------------------------------------------- default configuration
def test_the_default_configuration_serves_only_a_bare_command_line(config):
    default = config("seed: 11", "dataset_name: digits", "objective: simclr", name="default.yaml")
    other = config("seed: 12", name="other.yaml")

    def seed(*argv):
        return parse_pretrain(argv, default_config=default).training.seed

    assert seed() == seed("--steps", "1") == 11
    assert isinstance(parse_pretrain([], default_config=default).objective, SimCLR)
    assert parse_pretrain(["--objective", "acl"], default_config=default).objective == ACL()
    assert seed("--config", other) == seed(f"--config={other}") == 12
    assert seed("--dataset_name", "some/set") == seed("--dataset-name=some/set") == RobustTrainingArguments.seed
    assert seed("--config", other, "--dataset_name", "some/set") == 12


def test_resume_true_is_not_the_name_of_a_folder(config):
    assert parse_pretrain(["--resume_from_checkpoint", "true"]).training.resume_from_checkpoint is True
    assert parse_pretrain(["--config", config("resume_from_checkpoint: true")]).training.resume_from_checkpoint is True
    assert parse_pretrain(["--resume_from_checkpoint", "a/b-1"]).training.resume_from_checkpoint == "a/b-1"


# ---------------------------------------------------------------------- help
@pytest.mark.parametrize("name", METHODS)
def test_help_explains_the_fields_of_every_part(capsys, name):
    with pytest.raises(SystemExit) as exit:
        parse_pretrain(["--objective", name, "--help"], description="First line.")
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert "First line." in text
    kinds = [DataArguments, ModelArguments, load_objective(name), plain_attack_flags(), AttackArguments]
    for field in (
        f for k in [*kinds, RobustTrainingArguments] for f in dataclasses.fields(k) if f.init and f.name != "base"
    ):
        assert (f"--{field.name} " in text) is (field.name not in WITHOUT_EFFECT), field.name
    assert text.index("--probe_every ") < text.index("--adam_beta1 ")  # ours before the stock trainer's hundred
    words = " ".join(text.split())
    for kind in kinds:
        for field in (f for f in dataclasses.fields(kind) if f.name != "base"):
            assert " ".join(field.metadata["help"].split()) in words, field.name
    assert "8/255" in words and ", ".join(METHODS) in words


def test_help_of_air_shows_the_flags_of_its_base(capsys):
    with pytest.raises(SystemExit):
        parse_pretrain(["--objective", "air", "--base", "dynacl", "--help"])
    text = capsys.readouterr().out
    assert all(f"--{flag} " in text for flag in ("base", "period", "weight_scale", "temperature", "lambda1"))


def test_the_process_arguments_are_the_default(monkeypatch):
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--seed", "5"])
    assert parse_pretrain().training.seed == 5
