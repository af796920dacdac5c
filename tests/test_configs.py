"""The YAML files of published runs: well formed, every value with its source, accepted by the command line."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_robust.cli import parse_pretrain
from hf_robust.runs.pretrain import NETWORK_FLAGS, model_config

CONFIGS = Path(__file__).parent.parent / "examples" / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
PUBLISHED = sorted(
    f"{method}_{data}"
    for method in ("acl", "dynacl", "acl_air", "dynacl_air")
    for data in ("cifar10", "cifar100", "stl10")
)
SELECTED = sorted(f"{method}_rcs_{data}" for method in ("acl", "dynacl") for data in ("cifar10", "cifar100", "stl10"))
IMAGENET = ["acl_rcs_imagenet32", "sat_rcs_imagenet224", "sat_rcs_imagenet32"]
LEADERBOARD = ["advcl_cifar10", "advcl_cifar100", "rocl_cifar10", "rocl_cifar100"]
TAUGHT = ["deacl_cifar10", "deacl_cifar100", "fare_imagenet224"]
HOSTED = [f"a_infonce_{host}_{data}" for host in ("advcl", "rocl") for data in ("cifar10", "cifar100")]
# "ACL, train_simCLR.py: --lr 5.0", or "ours: why".
SOURCE = re.compile(r"(?P<code>[A-Za-z]+), [\w/.-]+\.(py|sh|md): \S.*|ours: \S.*")
BUDGET = re.compile(r"\d+/\d+")


class UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; this one refuses."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        doubled = sorted({key for key in keys if keys.count(key) > 1})
        if doubled:
            raise yaml.constructor.ConstructorError(
                problem=f"keys given twice: {doubled}", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep)


def read(text: str) -> dict[str, Any]:
    values = yaml.load(text, Loader=UniqueKeyLoader)
    assert isinstance(values, dict)
    return values


def scalars(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for item in value.values():
            yield from scalars(item)
    elif isinstance(value, list):
        for item in value:
            yield from scalars(item)
    else:
        yield value


def numbers_written_as_text(values: dict[str, Any]) -> list[str]:
    """Strings that Python reads as a number: YAML 1.1 takes `1e-6` for text, only `1.0e-6` is a number."""
    found = []
    for value in scalars(values):
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                float(value)
                found.append(value)
    return found


def lines_without_source(text: str) -> list[str]:
    """Value lines of a published run whose comment names neither a file of the released code nor `ours: ...`."""
    codes = set(re.findall(r"^#   (\w+) = [\w-]+/[\w-]+ at [0-9a-f]{7} ", text, flags=re.MULTILINE))
    missing = []
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        source = SOURCE.fullmatch(line.partition("  # ")[2] or line.partition(" # ")[2])
        if source is None or (source["code"] and source["code"] not in codes):
            missing.append(line)
    return missing


def test_one_file_per_published_run_and_the_small_ones():
    assert [path.stem for path in FILES] == sorted(
        [*PUBLISHED, *SELECTED, *IMAGENET, *LEADERBOARD, *TAUGHT, *HOSTED, "cifar10_cpu", "digits_cpu"]
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_well_formed(path):
    text = path.read_text(encoding="utf-8")
    values = read(text)
    assert numbers_written_as_text(values) == []
    assert all(value is not None for value in scalars(values))
    assert f"--config examples/configs/{path.name}" in text
    for budget in ("eps", "step_size"):
        assert BUDGET.fullmatch(values[budget]), f"write {budget} as a fraction of 255"


@pytest.mark.parametrize("name", [*PUBLISHED, *SELECTED, *IMAGENET, *LEADERBOARD, *TAUGHT, *HOSTED])
def test_every_value_of_a_published_run_names_its_source(name):
    assert lines_without_source((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_runs_share_what_the_papers_share(name):
    values = read((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    method, _, data = name.rpartition("_")
    shared = {
        "temperature": 0.5,
        "eps": "8/255",
        "step_size": "2/255",
        "steps": 5,
        "num_train_epochs": 1000,
        "per_device_train_batch_size": 512,
        "optimizer": "lars",
        "learning_rate": 5.0,
        "momentum": 0.9,
        "weight_decay": 1e-6,
        "warmup_epochs": 10,
        "min_learning_rate": 1e-6,
        "projector_layers": 3,
        "output_dir": f"outputs/{name}",
    }
    assert {key: values.get(key) for key in shared} == shared
    assert (values["image_size"], values["backbone"]) == (
        (96, "resnet18_stl") if data == "stl10" else (32, "resnet18_cifar")
    )
    assert values["split"] == ("unlabeled" if data == "stl10" else "train")
    official = method == "dynacl"
    assert values["interpolation"] == ("bilinear" if official else "bicubic")
    assert values["lr_granularity"] == ("epoch" if official else "step")
    assert values.get("ema_decay") == (0.99 if official else None)
    assert (values["objective"], values.get("base")) == {
        "acl": ("acl", None),
        "dynacl": ("dynacl", None),
        "acl_air": ("air", "acl"),
        "dynacl_air": ("air", "dynacl"),
    }[method]
    assert (values.get("lambda1"), values.get("lambda2")) == (
        (0.5, 0.5) if values["objective"] == "air" else (None, None)
    )
    if "dynacl" in method:
        assert values["weight_scale"] == pytest.approx(2 / 3, abs=1e-15)
        assert values["period"] == 50 / 1000
    else:
        assert "weight_scale" not in values and "period" not in values


@pytest.mark.parametrize("name", SELECTED)
def test_coreset_runs_are_those_of_the_method_with_a_selection(name):
    """The recipe of RCS is that of AIR's repository for the method alone, plus the schedule of the selection."""
    values = read((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    selection = {key: values.pop(key) for key in list(values) if key.startswith("coreset")}
    assert selection == {
        "coreset": "rcs",
        "coreset_fraction": 0.2,
        "coreset_warmup_epochs": 100,
        "coreset_interval": 20,
        "coreset_validation_fraction": 0.01,
        "coreset_distance": "kl_minmax",
        "coreset_head_step_size": 0.01,
        "coreset_validation_steps": 3,
        "coreset_variant": "fixed",
    }
    method, _, data = name.split("_")
    alone = read((CONFIGS / f"{method}_air_{data}.yaml").read_text(encoding="utf-8"))
    for values_of_air in ("lambda1", "lambda2", "formulation", "base"):
        alone.pop(values_of_air, None)
    alone.update(objective=method, output_dir=f"outputs/{name}")
    values.pop("mode", None)
    alone.pop("mode", None)
    assert values == alone


@pytest.mark.parametrize("name", [*SELECTED, *IMAGENET])
@pytest.mark.parametrize("control", ["random", "full"])
def test_the_control_of_a_coreset_run_is_one_flag_away(name, control):
    run = parse_pretrain(["--config", str(CONFIGS / f"{name}.yaml"), "--coreset", control])
    assert type(run.coreset).__module__ == f"hf_robust.coresets.{control}"
    if control == "random":
        values = read((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
        kept = ("fraction", "warmup_epochs", "interval", "validation_fraction")
        assert [getattr(run.coreset, key) for key in kept] == [values[f"coreset_{key}"] for key in kept]


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_runs(name):
    values = read((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    keys = ("num_train_epochs", "per_device_train_batch_size", "optimizer", "learning_rate", "weight_decay", "seed")
    keys += ("eps", "step_size", "steps", "coreset_fraction", "coreset_warmup_epochs", "coreset_interval")
    expected = {
        "acl_rcs_imagenet32": (200, 512, "lars", 0.6, 1e-6, 1, "8/255", "2/255", 5, 0.05, 20, 10),
        "sat_rcs_imagenet32": (100, 256, "sgd", 0.1, 5e-4, 7, "8/255", "2/255", 10, 0.1, 10, 10),
        "sat_rcs_imagenet224": (90, 256, "sgd", 0.1, 1e-4, 7, "4/255", "8/765", 3, 0.1, 10, 10),
    }
    assert tuple(values[key] for key in keys) == expected[name]
    assert Fraction("8/765") == Fraction(4, 255) * 2 / 3
    assert values["coreset_validation_fraction"] == 0.005 and values["normalize"] is False
    assert values.get("lr_milestones") == ([29, 59] if name.endswith("224") else None)


@pytest.mark.parametrize("name", ["advcl", "rocl", "deacl", "a_infonce_advcl", "a_infonce_rocl"])
def test_what_a_run_on_cifar100_changes(name):
    """Data, names, and what its own script says: nothing else, so that a change of one file reaches the other."""
    ten, hundred = (
        read((CONFIGS / f"{name}_{data}.yaml").read_text(encoding="utf-8")) for data in ("cifar10", "cifar100")
    )
    changed = {key: value for key, value in hundred.items() if ten.get(key) != value}
    own = {
        "a_infonce_advcl": {"sigma": 0.3, "pair_weight": 1.5, "sigma_warmup": 0.05, "minimal_distance": 0.5}
        | {"tau_plus": 0.01},
        "a_infonce_rocl": {"tau_plus": 0.1, "learning_rate": 3.0},
        "deacl": {"teacher": "outputs/simclr_cifar100/encoder"},
    }
    data = {"dataset_name": "uoft-cs/cifar100", "label_column": "fine_label", "output_dir": f"outputs/{name}_cifar100"}
    assert ten.keys() == hundred.keys() and changed == data | own.get(name, {})


@pytest.mark.parametrize("name", [*LEADERBOARD, *TAUGHT])
def test_the_defaults_of_a_method_are_those_of_its_published_run(name):
    """So that the name of the method alone, with data of one's own, trains as published."""
    run = parse_pretrain(["--config", str(CONFIGS / f"{name}.yaml")])
    method, dataset = type(run.objective).__module__.rpartition(".")[2], run.data.dataset_name
    teacher = ["--teacher", "some/encoder"] if run.objective.teacher_kind == "frozen" else []
    plain = parse_pretrain(["--objective", method, "--dataset_name", dataset, *teacher])
    assert plain.objective == run.objective and plain.attack == run.attack
    recipe = dict(run.objective.recipe)
    assert {key: getattr(run.training, key) for key in recipe} == recipe
    assert {key: getattr(plain.training, key) for key in recipe} == recipe
    chosen = {key: getattr(run.model, key) for key in NETWORK_FLAGS if getattr(run.model, key) is not None}
    assert chosen.items() <= run.objective.network.items()
    decided = None if run.objective.starts_from_teacher else "mean" not in run.objective.network
    assert run.model.normalize is decided


def test_the_network_is_the_methods_unless_flags_say_otherwise():
    def network(*flags):
        run = parse_pretrain(["--dataset_name", "some/set", "--objective", *flags])
        return model_config(run, run.objective, 32, 10)

    published = network("advcl", "--clusters", "2", "10")
    assert (published.projector_layers, published.projector_dim, published.mean) == (2, 128, None)
    assert (published.projector_norms, published.projector_norm_branches) == ("hidden", "shared")
    assert published.branch_heads == {"adv_ce": [2, 10]} and published.norm_branches == ("clean", "adv", "adv_ce")
    other = network("advcl", "--projector_layers", "3", "--projector_norm_branches", "own", "--normalize", "true")
    assert (other.projector_layers, other.projector_dim, other.projector_norm_branches) == (3, 128, "own")
    assert other.mean == network("acl").mean == (0.485, 0.456, 0.406)
    assert network("acl", "--normalize", "false").mean is None
    assert (network("acl").projector_layers, network("sat").head, network("sat").num_classes) == (3, "classifier", 10)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_command_line_reads_every_value_as_written(path):
    run = parse_pretrain(["--config", str(path)])
    values = read(path.read_text(encoding="utf-8"))
    method, base = values.pop("objective"), values.pop("base", None)
    assert type(run.objective).__module__ == f"hf_robust.objectives.{method}"
    places = [run.data, run.model, run.objective, run.attack, run.training]
    if base is not None:
        assert type(run.objective.base).__module__ == f"hf_robust.objectives.{base}"
        places.append(run.objective.base)
    for key, value in values.items():
        found = (
            [run.model_args]
            if key == "model_args"
            else [getattr(place, key) for place in places if hasattr(place, key)]
        )
        if key == "coreset":
            found, value = [type(run.coreset).__name__.lower()], value.lower()
        elif key.startswith("coreset_"):
            found = [getattr(run.coreset, key.removeprefix("coreset_"))]
        expected = float(Fraction(value)) if key in ("eps", "step_size") else value
        assert expected in found, f"{key}: wrote {value}, parsed {found}"


@pytest.mark.parametrize("flags", [["simclr"], ["air", "--base", "acl"]], ids=["simclr", "air"])
def test_the_small_run_serves_the_methods_to_compare(flags):
    run = parse_pretrain(["--config", str(CONFIGS / "cifar10_cpu.yaml"), "--objective", *flags])
    assert type(run.objective).__module__ == f"hf_robust.objectives.{flags[0]}"


def test_the_checks_above_can_fail():
    with pytest.raises(yaml.constructor.ConstructorError, match="keys given twice: .'steps'"):
        read("steps: 5\neps: 8/255\nsteps: 10\n")
    assert numbers_written_as_text(read("a: 1e-6\nb: 1.0e-6\nc: '5'\nd: 8/255\ne: {f: ['2.5', lars]}\n")) == [
        "1e-6",
        "5",
        "2.5",
    ]
    header = "#   ACL = owner/name at 0123abc (paper)\n"
    good = "a: 1  # ACL, train.py: --a 1\nb: 2  # ours: a folder\n"
    assert lines_without_source(header + good) == []
    bad = ["a: 1", "a: 1  # one", "a: 1  # AIR, train.py: --a 1", "a: 1  # ours:", "a: 1  # ACL, train.py"]
    assert lines_without_source(header + good + "\n".join(bad)) == bad
