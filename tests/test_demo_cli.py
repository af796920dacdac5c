"""The flags of the demo: defaults, and mistakes that end in one line."""

from __future__ import annotations

import pytest

from hf_robust.demo_cli import parse_demo


def test_everything_has_a_default():
    run = parse_demo([])
    assert run.models.model is None and run.data.images is None and run.serving.space_dir is None
    assert not run.serving.share and run.data.probe_images == 5000


def test_flags_become_fields():
    text = "--model user/robust --plain runs/plain --images a.png b --port 7000 --share --titles a b"
    run = parse_demo(text.split())
    assert (run.models.model, run.models.plain, run.data.images) == ("user/robust", "runs/plain", ["a.png", "b"])
    assert run.serving.port == 7000 and run.serving.share and run.models.titles == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--plain x", "--plain is compared with --model, which is not given"),
        ("--port 99999", "port must be from 1 to 65535, got 99999"),
        ("--model x --eps 8/255", "--eps 8/255 (attack and budget are chosen on the page)"),
        ("--encoder x", "(write --model ENCODER)"),
        ("--space_dir x --share", "--space_dir writes a folder and serves nothing"),
        ("--model x --titles a b", "titles must be one per model, got 2 for 1"),
        ("--probe_images 1", "probe_images must be 2 or more, got 1"),
        ("--image_size 0", "image_size must be 1 or more, got 0"),
    ],
)
def test_mistakes_end_in_one_line(text, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_demo(text.split(), prog="hf-robust demo")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
