"""The flags of `hf-robust convert`, and what the run says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from hf_robust.convert_cli import ConvertArguments, parse_convert
from hf_robust.runs import console
from hf_robust.runs import convert as run_convert

sys.path.insert(0, str(Path(__file__).parent / "converters"))
from authors_networks import AclProjector, Net, trained  # noqa: E402


def test_defaults_and_flags():
    run = parse_convert(["x/ACL.pt"])
    assert (run.file, run.settings) == ("x/ACL.pt", ConvertArguments())
    assert run.folder == Path("outputs/converted/ACL")
    run = parse_convert("a.pt --format dynacl --branch clean --classifier --label_names cat dog --mean 0 0 0".split())
    assert run.settings.label_names == ["cat", "dog"] and run.settings.mean == [0, 0, 0] and run.settings.classifier
    assert run.folder == Path("outputs/converted/a-clean")
    assert parse_convert(["a.pt", "--output_dir", "there"]).folder == Path("there")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no file: name the checkpoint"),
        (["a.pt", "--format", "acll"], "unknown format 'acll': did you mean 'acl'"),
        (["a.pt", "--metrics", "pgd20"], "measure the converted folder with hf-robust evaluate"),
        (["a.pt", "--branhc", "adv"], "did you mean 'branch'"),
        (["a.pt", "--image_size", "big"], "invalid int value"),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_convert(argv, prog="hf-robust convert")
    text = capsys.readouterr().err
    assert stop.value.code == 2 and message in text and len(text.splitlines()) == 2


def test_help_lists_the_formats(capsys):
    with pytest.raises(SystemExit):
        parse_convert(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "auto (by the keys), a-infonce, acl, advcl" in text


def test_the_run_says_what_it_recognised_and_left_out(tmp_path, capsys):
    torch.save(trained(Net(head={"fc": AclProjector(32, 2)})).state_dict(), tmp_path / "m.pt")
    run_convert.main([str(tmp_path / "m.pt"), "--output_dir", str(tmp_path / "out"), "--branch", "clean"])
    text = capsys.readouterr().out
    assert "m.pt: format acl (a ResNet with bn_list.0 and bn_list.1" in text and "left out: the projector" in text
    assert "encoder, norm branch clean, images of 32 pixels, input normalisation: mean (0.485" in text
    assert f"Output folder: {tmp_path / 'out'}" in text and "nothing was measured yet" in text
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_web_page_ends_in_one_message(tmp_path, capsys):
    (tmp_path / "m.pt").write_bytes(b"<!DOCTYPE html><html>")
    with pytest.raises(SystemExit, match="error: .*is a web page"):
        console.run_or_exit(run_convert.main, [str(tmp_path / "m.pt")])
