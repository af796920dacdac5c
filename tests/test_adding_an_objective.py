"""One file and one test make a method: the toy of CONTRIBUTING.md, added to a copy of the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_FILE = re.compile(r"^<!-- file: (\S+) -->\n```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
FILES = dict(_FILE.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
METHOD, TEST = "hf_robust/objectives/pulled.py", "tests/objectives/test_pulled.py"
COPIED = ("hf_robust", "pyproject.toml", "tests/conftest.py", "tests/training.py")
COPIED += ("tests/objectives/test_contract.py", "tests/objectives/test_contract_training.py")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package, the contract and what it needs, and the two files of the toy."""
    folder = tmp_path_factory.mktemp("added")
    for name in COPIED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


def contract(folder: Path, chosen: str = "pulled") -> tuple[int, str]:
    found = run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/objectives", "-k", chosen)
    return found.returncode, found.stdout + found.stderr


def test_one_file_and_one_test_are_all(copy):
    assert set(FILES) == {METHOD, TEST}
    code, said = contract(copy)
    assert code == 0, said
    assert int(re.search(r"(\d+) passed", said)[1]) > 15, said  # its own two, and the contract


def test_the_command_line_knows_it(copy):
    asked = (
        "from hf_robust.cli import parse_pretrain as p; print(p(['--objective', 'pulled', '--weight', '2']).objective)"
    )
    found = run(copy, "-c", asked)
    assert found.stdout.strip() == "Pulled(weight=2.0)", found.stderr


def test_the_contract_refuses_a_toy_that_breaks_it(copy):
    """Such as one that calls the wrapped model twice, which a distributed wrapper would not forgive."""
    path = copy / METHOD
    right = path.read_text(encoding="utf-8")
    path.write_text(right.replace("        z_adv, z = model(", "        model([])\n        z_adv, z = model("))
    try:
        code, said = contract(copy, "pulled and exactly_once")
    finally:
        path.write_text(right, encoding="utf-8")
    assert (
        code == 1 and "FAILED tests/objectives/test_contract.py::test_the_wrapped_model_is_called_exactly_once" in said
    )
