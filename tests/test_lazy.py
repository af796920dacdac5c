from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import hf_robust

ROOT = Path(hf_robust.__file__).parents[1]


def run(code: str, *paths: Path) -> str:
    """Standard output of a fresh interpreter that sees `paths` before everything else; warnings are errors."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT))), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def write(folder: Path, **files: str) -> Path:
    for name, source in files.items():
        path = folder / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
    for parent in {p.parent for p in folder.rglob("*.py")} - {folder}:
        (parent / "__init__.py").touch()
    return folder


# Stand-ins for our modules that say when they are imported.
PROBES = {"ours_timm": "import timm; print('registered with', timm.NAME)", "ours_auto": "print('registered auto')"}
PREPARE = """
import importlib, pickle, sys
import hf_robust
from hf_robust import _lazy
_lazy._REGISTRATIONS = {_lazy._TIMM: ("ours_timm",), _lazy._AUTO: ("ours_auto",)}
finders = lambda: [f for f in sys.meta_path if type(f).__name__ == "_Finder"]
"""


def test_import_is_cheap():
    out = run("import sys, hf_robust; print(sorted({'torch', 'timm', 'transformers', 'numpy'} & set(sys.modules)))")
    assert out.strip() == "[]"


def test_errors_of_timm_pass_through_and_a_second_try_registers(tmp_path):
    write(tmp_path, **PROBES)
    write(tmp_path, timm="import sys\nif not hasattr(sys, 'mended'): raise ImportError('broken timm')\nNAME = 'fake'")
    out = run(
        PREPARE
        + """
for _ in range(2):
    try:
        import timm
    except ImportError as error:
        print(error)
sys.mended = True
import timm
""",
        tmp_path,
    )
    assert out.split("\n")[:3] == ["broken timm", "broken timm", "registered with fake"]


def test_probing_copying_and_reloading_are_harmless(tmp_path):
    write(tmp_path, timm="NAME = 'fake'", **PROBES)
    out = run(
        PREPARE
        + """
import copy, importlib.util, inspect
spec = importlib.util.find_spec("timm")
assert spec.origin.endswith("timm.py") and "timm" not in sys.modules
assert spec.loader.get_source("timm") == "NAME = 'fake'"
twin = pickle.loads(pickle.dumps(spec))
assert twin.name == "timm" and copy.copy(spec.loader).get_filename("timm") == spec.origin
assert importlib.util.find_spec("no_such_package") is None
module = importlib.util.module_from_spec(spec)  # how plugins load a file by hand
print("probed")
import timm
assert type(timm.__spec__.loader).__name__ == type(timm.__loader__).__name__ == "SourceFileLoader"
assert inspect.getsource(timm).strip() == "NAME = 'fake'"
assert importlib.reload(timm) is timm
importlib.reload(hf_robust)
assert len(finders()) == 1
importlib.reload(_lazy)._REGISTRATIONS = {_lazy._TIMM: ("ours_timm",), _lazy._AUTO: ("ours_auto",)}
_lazy.install_import_hooks()
assert len(finders()) == 1
""",
        tmp_path,
    )
    assert out.split("\n") == ["probed", "registered with fake", ""]


def test_auto_classes_wait_for_the_end_of_the_outermost_transformers_import(tmp_path):
    write(
        tmp_path,
        timm="NAME = 'fake'",
        transformers__models__auto__configuration_auto="",
        transformers__pipelines="import transformers.models.auto.configuration_auto, timm\nLATE = 'late'",
        ours_timm=PROBES["ours_timm"],
        ours_auto="from transformers.pipelines import LATE; print('registered auto', LATE)",
    )
    out = run(PREPARE + "import transformers.pipelines; assert not finders()", tmp_path)
    # timm does not wait: it is complete, and the rest of the import may already build one of its networks
    assert out.split("\n") == ["registered with fake", "registered auto late", ""]


def test_nothing_is_registered_with_a_half_imported_timm(tmp_path):
    write(
        tmp_path,
        timm="import transformers.models.auto.configuration_auto\nNAME = 'fake'",
        transformers__models__auto__configuration_auto="",
        **PROBES,
    )
    assert run(PREPARE + "import timm", tmp_path).split("\n") == ["registered with fake", "registered auto", ""]


def test_hooks_before_transformers():
    # `pipeline` is the deepest chain: image processing imports the Auto configuration half-way.
    out = run("""
        import hf_robust, sys
        from transformers import pipeline, AutoConfig, AutoModel, AutoModelForPreTraining
        small = {"architecture": "resnet10_cifar", "model_args": {"channels": [2] * 4}}
        config = AutoConfig.for_model("hf_robust_timm", **small)
        print(type(AutoModel.from_config(config)).__name__)
        small = {"architecture": "wide_resnet28_10", "model_args": {"depth": 10, "width": 1}}
        config = AutoConfig.for_model("hf_robust_pretraining", **small)
        print(type(AutoModelForPreTraining.from_config(config)).__name__)
        assert not [f for f in sys.meta_path if type(f).__name__ == "_Finder"]
    """)
    assert out.split() == ["RobustTimmModel", "RobustModelForPreTraining"]


def test_hooks_after_timm_and_transformers():
    out = run("""
        import timm
        from transformers import AutoConfig
        import hf_robust
        print(timm.is_model("resnet18_cifar"), type(AutoConfig.for_model("hf_robust_timm")).__module__)
    """)
    assert out.split() == ["True", "hf_robust.models.encoder"]
