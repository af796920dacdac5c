"""What is read of a file, and what is said of files that hold no weights."""

from __future__ import annotations

import collections
import hashlib
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

from hf_robust.converters.checkpoint_file import file_sha256, read_tensors

TENSORS = {"a.weight": torch.ones(2, 3), "b": torch.zeros(())}


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"state_dict": t, "epoch": 3}, lambda t: {"model": t}])
@pytest.mark.parametrize("zipped", [True, False])
def test_state_dictionaries_are_found(wrap, zipped, tmp_path):
    torch.save(wrap(collections.OrderedDict(TENSORS)), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    tensors, notes = read_tensors(tmp_path / "x.pt")
    assert list(tensors) == list(TENSORS) and torch.equal(tensors["a.weight"], torch.ones(2, 3))
    assert notes == (["left out: epoch, which the file holds beside 'state_dict'"] if "epoch" in wrap({}) else [])


def test_both_branches_come_before_one(tmp_path):
    torch.save({"state_dict": {"x": torch.ones(1)}, "state_dict_dual": TENSORS}, tmp_path / "x.pt")
    assert list(read_tensors(tmp_path / "x.pt")[0]) == list(TENSORS)


def test_safetensors_and_its_truncation(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(TENSORS, path)
    assert set(read_tensors(path)[0]) == set(TENSORS)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"x.safetensors' is damaged or incomplete \(\d+ bytes"):
        read_tensors(path)


class Thing:
    pass


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('run')",))


@pytest.mark.parametrize(
    "content", [Thing(), {"state_dict": TENSORS, "args": Thing()}, {"x": Bomb()}, nn.Linear(2, 2)]
)
def test_objects_are_refused_with_the_way_out(content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds objects besides tensors") as caught:
        read_tensors(tmp_path / "x.pt")
    text = str(caught.value)
    assert "weights_only=False, pickle_module=pickle" in text and "'x-tensors.pt'" in text and "dill" in text
    assert "(" in text.split(", and reading")[0], "the class that was met is named"


def test_the_way_out_leads_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": TENSORS, "args": Thing()}, "x.pt")
    with pytest.raises(ValueError) as caught:
        read_tensors(tmp_path / "x.pt")
    lines = [line.strip() for line in str(caught.value).splitlines() if line.startswith("    ")]
    exec("\n".join(lines), {})
    assert set(read_tensors(tmp_path / "x-tensors.pt")[0]) == set(TENSORS)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_files(zipped, share, tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.randn(100, 100)}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match="is damaged or incomplete.*download it again"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning", "is a web page .*Google Drive"),
        (b"\n <!-- x -->\n<HTML>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of git LFS.*git lfs pull"),
        (b"", "is empty: download it again"),
        (b"\x89PNG\r\n\x1a\n" + b"0" * 64, "is no file of torch or safetensors"),
        (pickle.dumps({"a": 1}, protocol=2), "no file of torch|damaged or incomplete|no state dictionary"),
        (b"just some text that somebody saved", "is no file of torch or safetensors|damaged or incomplete"),
    ],
)
def test_other_files(content, message, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_tensors(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [{"net": TENSORS}, {"epoch": 3}, {}, [torch.ones(1)], torch.ones(2)])
def test_files_without_a_state_dictionary(content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="no state dictionary|not a state dictionary"):
        read_tensors(tmp_path / "x.pt")


def test_places(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        read_tensors(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file .*download it from the authors"):
        read_tensors(tmp_path / "absent.pt")


def test_the_digest_is_that_of_the_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"weights" * 300_000)
    assert file_sha256(tmp_path / "x") == hashlib.sha256(b"weights" * 300_000).hexdigest()
