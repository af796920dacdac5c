"""The house rules that a reader cannot check by eye: who imports whom, and what no file may hold."""

from __future__ import annotations

import ast
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "hf_robust"

# A file imports lower floors only. Changing this table is a decision of its own: docs/architecture.md shows it too.
# "" is hf_robust/__init__.py, "objectives" is hf_robust/objectives/__init__.py.
FLOORS: tuple[tuple[str, ...], ...] = (
    (
        *("losses", "multiview_losses", "distillation", "clustering", "frequencies"),
        "loss_record",
        "attacks",
        "optim",
        "auto_lr",
        "crops",
        "device_memory",
        *("models.norm", "models.heads"),
        "image_decoding",
        "image_sources",
        *("evaluation.leaderboard", "evaluation.autoattack_findings", "evaluation.autoattack_plan"),
        *("evaluation.corruption_constants", "evaluation.corruption_filters"),
        *("runs", "runs.console", "demo"),
        *("reproduction", "reproduction.hours", "converters.layouts", "converters.checkpoint_file"),
    ),
    (
        *("data", "views", "attack_replay", "attack_schedules"),
        *("models.backbones", "models.checkpointing", "models.configuration", "models.modeling"),
        *("models.encoder", "models.native", "models.folded"),
        *("evaluation.autoattack_model", "evaluation.autoattack_state"),
        *("evaluation.corruption_images", "evaluation.corruption_arrays", "reproduction.tables"),
    ),
    ("objectives.base", "models", "models.lora", "_lazy", "evaluation.pixel_classifier", "converters.base"),
    (
        "objectives.*",  # every method: adding one touches no list
        *("model_fit", "memory_model", "training_attack"),
        *("coresets.base", "coresets.*"),  # every way to choose, likewise
        *("evaluation.linear_probe", "evaluation.accuracy", "evaluation.probe", "evaluation.pictures"),
        *("evaluation.environment", "evaluation.report", "evaluation.coreset_pictures"),
        *("evaluation.picture_style", "evaluation.curves"),
        *("evaluation.robustness_pictures", "evaluation.report_texts", "evaluation.html_page"),
        *("evaluation.autoattack_cascade", "evaluation.corruption_generator"),
        *("hub_files", "hub_folders", "demo.comparison"),
        "converters.*",  # every format
    ),
    (
        *(
            "objectives",
            "coresets",
            "evaluation",
            "training_args",
            "callbacks",
            "checkpoints",
            "model_card_texts",
            "hub",
        ),
        *("evaluation.autoattack", "evaluation.corruptions", "evaluation.judged_images", "evaluation.classifier"),
        *("evaluation.evaluation_report", "evaluation.html_report"),
        *("hub_failures", "release_folder", "model_card_metadata", "run_facts", "demo.rendering"),
    ),
    (
        *("finetuning_args", "flags", "held_out", "adapters", "classifiers"),
        *("model_card_citations", "model_card_tables", "model_card_conversion", "sharding"),
        *("evaluation.evaluation_parts", "evaluation.embedding", "evaluation.robustness_files"),
    ),
    ("model_card", "demo.sources", "attack_flags", "teachers"),
    ("publishing", "converters.converting", "demo.page", "pseudo_labels"),
    ("hub_callback", "converters"),
    ("trainer", "evaluation.evaluation_job"),
    ("pretrainer", "finetuner", "evaluation.robustness"),
    ("postprocessing", "presets", "push_cli"),
    ("cli", "finetune_cli", "evaluate_cli", "card_cli", "convert_cli", "demo_cli", "runs.push", "reproduction.stages"),
    (
        "",
        "runs.finetune",
        "runs.convert",
        "runs.card",
        "runs.students",
        "demo.space",
        "reproduction.running",
        "reproduce_cli",
    ),
    ("runs.pretrain", "reproduction.results"),
    ("runs.evaluate", "runs.demo", "runs.reproduce"),
    ("commands",),
)
# Within a floor, only these: a method that builds on another, and the models' common architectures.
SIBLINGS: dict[str, tuple[str, ...]] = {
    "models.modeling": ("models.backbones", "models.checkpointing", "models.configuration"),
    "models.encoder": ("models.backbones",),
    "models.folded": ("models.modeling",),
    "objectives.*": ("objectives.*",),
    "coresets.*": ("coresets.base", "coresets.*"),
    "converters.*": ("converters.*",),
    "evaluation.coreset_pictures": ("coresets.base", "evaluation.picture_style"),
    "evaluation.report": ("evaluation.environment",),
    "evaluation.accuracy": ("evaluation.linear_probe", "evaluation.report"),
    "evaluation.probe": ("evaluation.accuracy", "evaluation.linear_probe", "evaluation.report"),
    "evaluation.curves": ("evaluation.picture_style", "evaluation.report"),
    "evaluation.pictures": ("evaluation.picture_style", "evaluation.report"),
    "evaluation.robustness_pictures": ("evaluation.picture_style", "evaluation.report"),
    "evaluation.report_texts": ("evaluation.report",),
    "evaluation.html_page": ("evaluation.environment",),
    "hub_folders": ("evaluation.environment",),
    "evaluation.autoattack_cascade": ("evaluation.accuracy",),
    "evaluation.corruption_generator": ("evaluation.accuracy",),
}
# What any floor may read from the root: plain texts, no doors.
ROOT_TEXTS = ("__file__", "__version__")
# Files copied next to published weights: a reader without hf_robust must be able to import them.
TRAVELLING = {
    "models.backbones": {"timm", "torch"},
    "models.encoder": {"timm", "torch", "transformers", ".backbones"},
}
# Slow to import, or absent on a training machine: imported inside the function that needs them.
LAZY = {"datasets", "gradio", "matplotlib", "peft", "pyautoattack", "sklearn", "tensorboard", "trackio"}
MAX_LINES = 400
NO_DRAWER = re.compile(r"(utils?|helpers?|misc|common)\.py")


def modules(package: Path) -> dict[str, Path]:
    """Every file of the package by its name within it; a folder's `__init__.py` by the folder's name."""
    return {
        ".".join(path.relative_to(package).with_suffix("").parts).removesuffix("__init__").removesuffix("."): path
        for path in sorted(package.rglob("*.py"))
    }


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def house_imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """(line, module) of each import of the house in one file, at any depth, named by string included."""
    package = ["hf_robust", *name.split(".")] if path.name == "__init__.py" else ["hf_robust", *name.split(".")[:-1]]
    package = [part for part in package if part]
    for node in ast.walk(tree_of(path)):
        for target in import_targets(node, package):
            inner = target.removeprefix("hf_robust").removeprefix(".")
            if target.split(".")[0] != "hf_robust" or inner in ROOT_TEXTS:
                continue
            # `from hf_robust.losses import nt_xent` names a file, then something in it.
            yield node.lineno, inner if inner in known else inner.rpartition(".")[0]


def import_targets(node: ast.AST, package: list[str]) -> list[str]:
    """Full dotted names one node reaches for: an import, `import_module("...")`, or an attribute of our root."""
    if isinstance(node, ast.Import):
        # The root alone is nothing yet: what is read from it, below, decides.
        return [alias.name for alias in node.names if alias.name != "hf_robust"]
    if isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else []
        source = ".".join([*base, *([node.module] if node.module else [])])
        return [f"{source}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
        first = node.args[0]
        return [first.value] if isinstance(first, ast.Constant) and isinstance(first.value, str) else []
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hf_robust":
        return [f"hf_robust.{node.attr}"]
    return []


def place(name: str) -> str:
    """The name under which a file stands in the tables: a method's or a format's file is one of `folder.*`."""
    folder, _, file = name.partition(".")
    own = {"", "base", "layouts", "checkpoint_file", "converting"} if folder == "converters" else {"", "base"}
    return f"{folder}.*" if folder in ("objectives", "coresets", "converters") and file not in own else name


def violations(package: Path) -> list[str]:
    """What breaks the table: a file without a floor, or an import that does not go down."""
    floor_of = {name: number for number, names in enumerate(FLOORS) for name in names}
    known = modules(package)
    found = []
    for name, path in known.items():
        label = path.relative_to(package).as_posix()
        if place(name) not in floor_of:
            found.append(f"{label} has no floor: give it one in FLOORS and in docs/architecture.md")
            continue
        for line, target in house_imports(name, path, known):
            floor = floor_of.get(place(target), len(FLOORS))
            if floor < floor_of[place(name)] or place(target) in SIBLINGS.get(place(name), ()):
                continue
            found.append(f"{label}:{line} (floor {floor_of[place(name)]}) imports hf_robust.{target} (floor {floor})")
    return found


def outer_imports(path: Path, *, top_level: bool) -> set[str]:
    """Root names of what a file imports; relative ones keep their dots. `top_level`: only what runs on import."""
    names: set[str] = set()
    pending: list[ast.AST] = [tree_of(path)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or "") if node.level else (node.module or "").split(".")[0])
        if top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if top_level and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending.extend(node.orelse)
            continue
        pending.extend(ast.iter_child_nodes(node))
    return names


def copy_of_the_house(folder: Path) -> Path:
    """The package in a temporary folder, to be spoiled there."""
    return Path(shutil.copytree(PACKAGE, folder / "hf_robust", ignore=shutil.ignore_patterns("__pycache__")))


def test_every_import_goes_down():
    assert violations(PACKAGE) == []


def test_floors_name_each_file_once_and_only_files_that_exist():
    names = [name for floor in FLOORS for name in floor]
    assert len(names) == len(set(names))
    assert sorted(set(names) - {place(name) for name in modules(PACKAGE)}) == []


def test_siblings_share_a_floor():
    floor_of = {name: number for number, names in enumerate(FLOORS) for name in names}
    for name, siblings in SIBLINGS.items():
        assert {floor_of[sibling] for sibling in siblings} == {floor_of[name]}
        assert not any(name in SIBLINGS.get(s, ()) for s in siblings if s != name), "a circle"


def test_the_document_shows_the_same_floors():
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", text, flags=re.MULTILINE)
    shown = {int(number): set(re.findall(r"`([^`]+)`", names)) for number, names in rows}
    assert shown == {number: {name or "__init__" for name in names} for number, names in enumerate(FLOORS)}


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        (
            "losses.py",
            "from hf_robust.trainer import RobustPretrainer",
            r"losses.py:\d+ \(floor 0\) .*trainer \(floor \d+\)",
        ),
        ("losses.py", "def f():\n    import hf_robust.cli", r"losses.py:\d+ .*hf_robust.cli"),
        (
            "losses.py",
            "import importlib\nimportlib.import_module('hf_robust.data')",
            r"losses.py:\d+ .*hf_robust.data",
        ),
        ("objectives/base.py", "from ..hub import save_encoder", r"objectives/base.py:\d+ .*hf_robust.hub"),
        ("objectives/base.py", "from . import acl", r"objectives/base.py:\d+ .*hf_robust.objectives.acl"),
        ("models/backbones.py", "from . import modeling", r"models/backbones.py:\d+ .*models.modeling"),
        ("evaluation/__init__.py", "from ..trainer import RobustPretrainer", r"evaluation/__init__.py:\d+ .*trainer"),
        ("attacks.py", "from hf_robust import PGD", r"attacks.py:\d+ .*hf_robust\. \(floor \d+\)"),
        (
            "attacks.py",
            "import hf_robust\ncard = hf_robust.save_encoder",
            r"attacks.py:\d+ .*hf_robust\. \(floor \d+\)",
        ),
        ("newcomer.py", "", "newcomer.py has no floor"),
    ],
)
def test_a_planted_import_is_caught(tmp_path, file, line, complaint):
    package = copy_of_the_house(tmp_path)
    for name in ("trainer", "cli", "hub", "data", "objectives/acl", "models/modeling"):
        (package / f"{name}.py").touch()  # `from . import acl` is an import of a file only where that file is
    before = violations(package)
    path = package / file
    path.write_text((path.read_text(encoding="utf-8") if path.exists() else "") + f"\n{line}\n", encoding="utf-8")
    new = [text for text in violations(package) if text not in before]
    assert len(new) == 1 and re.match(complaint, new[0]), new


@pytest.mark.parametrize(
    "line", ["from hf_robust.losses import nt_xent", "from .acl import ACL", "import hf_robust\nhf_robust.__version__"]
)
def test_a_planted_import_that_goes_down_is_not_reported(tmp_path, line):
    package = copy_of_the_house(tmp_path)
    (package / "objectives" / "acl.py").touch()
    before = violations(package)
    path = package / "objectives" / "dynacl.py"
    path.write_text((path.read_text(encoding="utf-8") if path.exists() else "") + f"\n{line}\n", encoding="utf-8")
    assert violations(package) == before


@pytest.mark.parametrize("name", sorted(TRAVELLING))
def test_a_file_that_travels_needs_nothing_of_ours(name):
    stdlib = set(sys.stdlib_module_names)
    assert outer_imports(modules(PACKAGE)[name], top_level=False) - stdlib - TRAVELLING[name] == set()


@pytest.mark.parametrize("name", sorted(modules(PACKAGE)))
def test_slow_packages_are_imported_inside_functions(name):
    assert outer_imports(modules(PACKAGE)[name], top_level=True) & LAZY == set()


@pytest.mark.parametrize("name", sorted(modules(PACKAGE)))
def test_house_rules_of_a_file(name):
    path = modules(PACKAGE)[name]
    tree = tree_of(path)
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{lines} lines: split it along a seam of its subject"
    prints = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    ]
    assert prints == [], "use logging: a library does not print"
    assert ast.get_docstring(tree), "say in one line what the file is for"
    if len(tree.body) > 1:
        assert "annotations" in {
            alias.name
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and node.module == "__future__"
            for alias in node.names
        }, "from __future__ import annotations"


def test_no_drawer_for_odds_and_ends():
    folders = ("hf_robust", "examples", "tests", "benchmarks")
    found = [
        path for folder in folders for path in (REPOSITORY / folder).rglob("*.py") if NO_DRAWER.fullmatch(path.name)
    ]
    assert found == [], "name the file after what it holds"
