"""The documentation tells the truth: its code runs, commands parse, links lead somewhere, tables are current.

A page may say, in comments right above a block of code, what a test does differently from a reader:

    <!-- test: setup
    code that runs first, such as a tiny encoder in the place of a trained one
    -->
    <!-- test: replace `num_train_epochs=12` with `max_steps=1` -->
    <!-- test: skip, why -->
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SITE = DOCS / "site"
README = ROOT / "README.md"
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if page.name != "architecture.md"]
ALL = [README, ROOT / "CONTRIBUTING.md", DOCS / "architecture.md", *PAGES]
MOST_SKIPS = 2

_FENCE = re.compile(
    r"(?P<marks>(?:^<!-- test: (?:(?!-->).)*?-->\n)*)^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    flags=re.MULTILINE | re.DOTALL,
)
_MARK = re.compile(r"<!-- test: (setup|replace|skip)(.*?)-->", flags=re.DOTALL)
_REPLACE = re.compile(r"`(.+?)` with `(.+?)`", flags=re.DOTALL)


def title(page: Path) -> str:
    return str(page.relative_to(ROOT))


@dataclass
class Block:
    """A fenced block and what its comments say."""

    language: str
    code: str
    setup: str = ""
    replacements: list[tuple[str, str]] = field(default_factory=list)
    skip: str = ""

    @property
    def tested(self) -> str:
        """What runs; every replacement must apply."""
        code = self.code
        for old, new in self.replacements:
            assert old in code, f"{old!r} is not in the block any more"
            code = code.replace(old, new)
        return f"{self.setup}\n{code}"


def blocks(page: Path, language: str | None = None) -> list[Block]:
    found = []
    for match in _FENCE.finditer(page.read_text(encoding="utf-8")):
        block = Block(match["language"], match["code"])
        for kind, text in _MARK.findall(match["marks"]):
            if kind == "setup":
                block.setup += text
            elif kind == "replace":
                block.replacements += _REPLACE.findall(text)
            else:
                block.skip = text.strip(" ,\n")
        found.append(block)
    return [block for block in found if language in (None, block.language)]


# ------------------------------------------------------------------------------------------------------- Python
WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=title)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    module = types.ModuleType(f"docs_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses look their annotations up
    for number, block in enumerate(blocks(page, "python"), 1):
        if not block.skip:
            exec(compile(block.tested, f"{title(page)}, block {number}", "exec", dont_inherit=True), vars(module))


def test_few_blocks_are_left_out_and_each_says_why():
    skipped = [block for page in PAGES for block in blocks(page) if block.skip]
    assert all(len(block.skip) > 20 for block in skipped)
    assert len([block for block in skipped if block.language == "python"]) <= MOST_SKIPS


def test_marks_stand_above_a_block():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        used = sum(len(_MARK.findall(match["marks"])) for match in _FENCE.finditer(text))
        assert used == text.count("<!-- test:"), f"{title(page)}: a test comment is not right above a block"


# ----------------------------------------------------------------------------------------------------- commands
def lines_of(code: str) -> Iterator[str]:
    """Commands, one per line: continued ones joined, comments and variables gone."""
    joined = re.sub(r"\\\n\s*", " ", code)
    joined = re.sub(r"bash -c '(.*?)'$", r"\1", joined, flags=re.MULTILINE)
    joined = re.sub(r"\$\(\(.*?\)\)|\$\([^)]*\)|\$\{?\w+\}?", "2", joined)
    for line in joined.splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield shlex.join(words)


def commands() -> list[Any]:
    return [
        pytest.param(page, line, id=f"{title(page)}-{number}")
        for page in ALL
        for number, line in enumerate(line for block in blocks(page, "bash") for line in lines_of(block.code))
    ]


def parse_run(name: str, arguments: list[str]) -> None:
    """Flags of one of our commands, by its own parser."""
    modules = {"pretrain": "cli", "finetune": "finetune_cli", "evaluate": "evaluate_cli"}
    parser = importlib.import_module(f"hf_robust.{modules.get(name, f'{name}_cli')}")
    parse: Callable[..., Any] = getattr(parser, f"parse_{name}")
    if "--help" in arguments:
        with pytest.raises(SystemExit) as stopped:
            parse(arguments)
        assert stopped.value.code == 0
        return
    default = {
        "pretrain": "digits_cpu.yaml",
        "finetune": "finetune/digits_cpu.yaml",
        "evaluate": "evaluate/digits_cpu.yaml",
    }.get(name)
    settings = {"default_config": ROOT / "examples" / "configs" / default} if default else {}
    parse(arguments, **settings)


def check_script(words: list[str]) -> None:
    """A program of the repository: the scripts by their parsers, others by whether they know the flags."""
    script, *arguments = words
    assert (ROOT / script).is_file(), script
    name = Path(script).stem
    if script in ("examples/pretrain.py", "examples/finetune.py", "examples/evaluate.py"):
        return parse_run(name, arguments)
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / script).parent.glob("*.py"))
    for flag in (word for word in arguments if word.startswith("--")):
        assert f'"{flag}"' in text, f"{script} knows no {flag}"


def check_launch(words: list[str]) -> None:
    """`accelerate launch`, by accelerate's own parser."""
    from accelerate.commands.launch import launch_command_parser

    parsed = launch_command_parser().parse_args(words)
    if parsed.config_file:
        assert (ROOT / parsed.config_file).is_file(), parsed.config_file
    if parsed.module:
        assert parsed.training_script == "hf_robust.commands"
        return check_ours(parsed.training_script_args)
    check_script([parsed.training_script, *parsed.training_script_args])


def check_torchrun(words: list[str]) -> None:
    """`torchrun`, by torch's own parser."""
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(words)
    check_script([parsed.training_script, *parsed.training_script_args])


def check_ours(words: list[str]) -> None:
    """`hf-robust COMMAND`."""
    if words[0].startswith("--"):
        assert words in (["--help"], ["--version"])
    else:
        parse_run(words[0], words[1:])


def check_python(words: list[str]) -> None:
    """`python SCRIPT` or `python -m MODULE`."""
    if words[0] != "-m":
        return check_script(words)
    if words[1] == "benchmarks":
        return check_script(["benchmarks/__main__.py", *words[2:]])
    assert words[1] in ("pytest", "venv"), words


def check_pip(words: list[str]) -> None:
    """Extras exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    wanted = [extra for group in re.findall(r"\[([\w,]+)\]", " ".join(words)) for extra in group.split(",")]
    assert words[0] == "install" and set(wanted) <= extras.keys(), f"{wanted} of {sorted(extras)}"


def check_mkdocs(words: list[str]) -> None:
    """The configuration that is named exists."""
    assert words[0] in ("build", "serve") and (ROOT / words[words.index("-f") + 1]).is_file()


def nothing_to_check(words: list[str]) -> None:
    """Programs that are not ours."""


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "accelerate": lambda words: check_launch(words[1:]),
    "torchrun": check_torchrun,
    "hf-robust": check_ours,
    "python": check_python,
    "pip": check_pip,
    "mkdocs": check_mkdocs,
    **dict.fromkeys(("export", "source", "ruff", "mypy", "hf"), nothing_to_check),
}


def words_of(line: str) -> list[str]:
    """The command of a line, without what starts it."""
    words = shlex.split(line)
    return words[1:] if words[0] == "srun" else words


@pytest.mark.parametrize(("page", "line"), commands())
def test_command_parses(page, line, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for shell_part in line.split(" '&&' "):
        program, *words = words_of(shell_part)
        assert program in CHECKS, f"what is {program}? Say in CHECKS how it is tested"
        try:
            CHECKS[program](words)
        except SystemExit as stopped:
            pytest.fail(f"{line}\n{capsys.readouterr().err}exit status {stopped.code}")


def test_the_check_of_commands_can_fail(monkeypatch):
    monkeypatch.chdir(ROOT)
    for wrong in (
        "accelerate launch examples/pretrain.py --objectiv acl",
        "accelerate launch --gpus 4 examples/pretrain.py",
        "hf-robust evaluate --model x --metrics pdg20",
        "hf-robust finetune --encoder x --mode aff --rank 8",
        "torchrun --nproc 2 examples/nothing.py",
        "python examples/compare.py outputs/a --picture x.png",
        "pip install -e .[nothing]",
        "accelerate launch --config_file examples/accelerate/none.yaml examples/pretrain.py",
    ):
        program, *words = words_of(wrong)
        with pytest.raises((AssertionError, SystemExit, ModuleNotFoundError)):
            CHECKS[program](words)


# -------------------------------------------------------------------------------------------- links and pictures
def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as mkdocs makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE):
        plain = re.sub(r"[`*]|\[([^]]+)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
        found.add(slug if slug not in found else f"{slug}_1")
    return found


@pytest.mark.parametrize("page", ALL, ids=title)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"!?\[(?:[^]]*)\]\(([^)\s]+)\)", text):
        assert not target.startswith(("http:", "//")), target
        if target.startswith("https:"):
            continue
        path, _, anchor = unquote(target).partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.is_file(), f"{title(page)} links to {target}"
        if anchor:
            assert anchor in anchors(place), (
                f"{title(page)} links to {target}; {place.name} has {sorted(anchors(place))}"
            )


def test_every_page_can_be_reached():
    (navigation,) = re.findall(r"^nav:\n(.*)", (SITE / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.M | re.S)
    listed = set(re.findall(r"[\w/]+\.md", navigation))
    assert listed == {str(page.relative_to(DOCS)) for page in (*PAGES, DOCS / "architecture.md")} | {"contributing.md"}


def test_pictures_are_shown():
    shown = {Path(name).name for page in ALL for name in re.findall(r"\(([^)]+\.png)\)", page.read_text())}
    assert {picture.name for picture in (DOCS / "images").glob("*.png")} <= shown


def test_nothing_is_loaded_from_elsewhere():
    config = (SITE / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in config and "http" not in config


# ------------------------------------------------------------------------------------------------ tables, numbers
def flag_tables() -> Any:
    spec = importlib.util.spec_from_file_location("flag_tables", SITE / "flag_tables.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_of_flags_are_current():
    tables = flag_tables()
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.rewritten(text) == text, f"{title(page)}: run python docs/site/flag_tables.py"


@pytest.mark.parametrize(
    ("page", "old", "new"),
    [
        (DOCS / "methods" / "acl.md", "`--temperature`", "`--warmth`"),
        (DOCS / "methods" / "index.md", "you want the plain robust baseline", "never"),
        (README, "[DeACL](docs/methods/deacl.md)", "DeACL"),
    ],
    ids=["flags", "methods", "readme"],
)
def test_tables_can_be_out_of_date(page, old, new):
    text = page.read_text(encoding="utf-8")
    assert old in text and flag_tables().rewritten(text.replace(old, new)) == text


def test_every_method_has_a_page_with_its_parts():
    from hf_robust.coresets import coreset_names
    from hf_robust.finetune_cli import finetune_modes
    from hf_robust.flags import method_names

    overview = (DOCS / "methods" / "index.md").read_text(encoding="utf-8")
    for name in [*method_names(finetuning=False), *finetune_modes()]:
        assert f"`{name}`" in overview, name
    for page in sorted((DOCS / "methods").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if page.stem != "index":
            for part in ("**When.**", "## Equation", "$$", "## Run", "## Flags", "## Source", "## Cost"):
                assert part in text, f"{title(page)} has no {part}"
    assert all(
        f"--coreset {name}" in (DOCS / "methods" / "rcs.md").read_text() for name in coreset_names() if name != "full"
    )


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "results.md"], ids=title)
def test_accuracies_are_those_of_the_results(page):
    """A percentage on a page stands in the measured results or the README as well, with command, commit and seed."""
    known = set(re.findall(r"\d+\.\d", (DOCS / "results.md").read_text() + README.read_text()))
    text = re.sub(r"^```.*?^```$|<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = {number for number in re.findall(r"(\d+\.\d)(?= %| and \d+\.\d %|, \d+\.\d and)", text)}
    assert found <= known, f"{title(page)}: {sorted(found - known)}"


def test_accelerate_files_are_read_by_accelerate():
    from accelerate.commands.config.config_args import load_config_from_file

    files = {path.stem: load_config_from_file(str(path)) for path in (ROOT / "examples" / "accelerate").glob("*.yaml")}
    assert sorted(files) == ["fsdp2", "multi_gpu", "two_cpu_processes"]
    two = files["two_cpu_processes"]
    # with MULTI_CPU accelerate starts one process without a word
    assert (str(two.distributed_type), two.use_cpu, two.num_processes) == ("DistributedType.MULTI_GPU", True, 2)
    assert not files["multi_gpu"].use_cpu


# -------------------------------------------------------------------------------------------------------- the site
@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="the site is built where the extra [docs] is installed")
    pytest.importorskip("latex2mathml")
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-f", str(SITE / "mkdocs.yml")]
    done = subprocess.run(
        [*command, "-d", str(target)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def test_the_site_is_built_without_a_warning(site):
    assert yaml.safe_load((SITE / "mkdocs.yml").read_text(encoding="utf-8"))["strict"]
    assert (site / "index.html").is_file()
    assert (site / "contributing.html").is_file() and not list(site.rglob("*.py"))


def test_equations_are_drawn_without_scripts(site):
    page = (site / "methods" / "acl.html").read_text(encoding="utf-8")
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in page
    for built in site.rglob("*.html"):
        text = built.read_text(encoding="utf-8")
        assert "arithmatex" not in text and "$$" not in text, built
        assert not re.search(r'(?:src|href)="(?:https?:)?//(?!squidfunk\.github\.io)', text), built
