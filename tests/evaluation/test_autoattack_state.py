"""The state on disk: equal after reading, one move, and a fingerprint that sees every bit."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_robust.evaluation.autoattack_findings import Findings
from hf_robust.evaluation.autoattack_state import CascadeState, StageCount, fingerprint, model_fingerprint

FLAGS = torch.tensor([True, False, True])
TAG = {"eps": 8 / 255, "model": "abc", "process": "0 of 1"}


def state() -> CascadeState:
    return CascadeState(
        clean=FLAGS,
        robust=FLAGS.flip(0),
        entered=FLAGS.roll(1),
        predictions=torch.tensor([3, 1, 2]),
        distances=torch.tensor([0.0, 0.1, 8 / 255]),
        logits=torch.randn(2, 4, generator=torch.Generator().manual_seed(0)),
        batches=2,
        counts=[StageCount("apgd-ce", 0.1, 3, 2), StageCount("apgd-t", 1 / 3, 30, 20)],
        after=[FLAGS],
        findings=Findings(weights={"float16"}, examined=2),
    )


def test_a_state_reads_back_equal(tmp_path: Path) -> None:
    path, wanted = tmp_path / "folder" / "state.npz", state()
    wanted.save(path, TAG)
    found = CascadeState.load(path, TAG)
    for entry in fields(CascadeState):
        a, b = getattr(wanted, entry.name), getattr(found, entry.name)
        assert (
            all(map(torch.equal, a, b))
            if entry.name == "after"
            else torch.equal(a, b)
            if isinstance(a, Tensor)
            else a == b
        )
    with pytest.raises(ValueError, match=r"differs in: eps \(there 0.031.*, here 0.1\), model\. A state goes on"):
        CascadeState.load(path, {**TAG, "eps": 0.1, "model": "xyz"})
    with pytest.raises(ValueError, match="differs in: process .there '0 of 1', here None"):
        CascadeState.load(path, {name: value for name, value in TAG.items() if name != "process"})


def spoiled(path: Path, what: str) -> None:
    """A state in which one thing is wrong; the tag is right."""
    state().save(path, TAG)
    with np.load(path, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    facts = json.loads(str(arrays["facts"]))
    if what == "an array for all":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
        return
    if what in ("null", "{}", "[]", '{"tag": 3}'):
        facts = json.loads(what)
    elif what == "another version's findings":
        facts["findings"]["later"] = 1
    elif what == "counts":
        facts["counts"] = "none"
    elif what == "a missing array":
        del arrays["robust"]
    elif what == "a short array":
        arrays["robust"] = arrays["robust"][:2]
    np.savez(path, **{**arrays, "facts": np.array(json.dumps(facts))})


@pytest.mark.parametrize(
    "what",
    [
        *("an array for all", "null", "{}", "[]", '{"tag": 3}'),
        *("another version's findings", "counts", "a missing array", "a short array"),
    ],
)
def test_a_foreign_or_damaged_file_is_refused_with_the_way_out(tmp_path: Path, what: str) -> None:
    path = tmp_path / "state.npz"
    spoiled(path, what)
    with pytest.raises(
        ValueError, match="cannot read .*state.npz.* as the state of an AutoAttack .*delete it to start"
    ):
        CascadeState.load(path, TAG)


def test_no_flipped_bit_gets_through(tmp_path: Path) -> None:
    path, wanted = tmp_path / "state.npz", state()
    wanted.save(path, TAG)
    whole = path.read_bytes()
    for place in range(0, len(whole), 13):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = CascadeState.load(path, TAG)
        except ValueError:
            continue
        # Dates and the like: what is read is what was written.
        assert torch.equal(found.robust, wanted.robust) and torch.equal(found.after[0], wanted.after[0])
        assert found.counts == wanted.counts and found.findings == wanted.findings and found.batches == 2


@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
def test_a_write_that_fails_leaves_the_old_state(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.npz"
    state().save(path, TAG)
    before = path.read_bytes()
    monkeypatch.setattr(step, lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        state().save(path, {**TAG, "eps": 1.0})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_logits_may_differ_by_rounding_only(tmp_path: Path) -> None:
    found, path = state(), tmp_path / "state.npz"
    found.check_logits(found.logits * (1 + 1e-5), path)
    for other in (found.logits * 1.1, found.logits[:, :3]):
        with pytest.raises(ValueError, match="begun with a model that gave other logits"):
            found.check_logits(other, path)


def test_the_fingerprint_sees_names_types_shapes_and_bits() -> None:
    tensor = torch.arange(6.0)
    seen = {
        fingerprint([("a", tensor)]),
        fingerprint([("b", tensor)]),
        fingerprint([("a", tensor.double())]),
        fingerprint([("a", tensor.view(2, 3))]),
        fingerprint([("a", torch.nextafter(tensor, tensor + 1))]),
        fingerprint([("a", tensor.to(torch.bfloat16))]),
        fingerprint([("a", torch.tensor(0.0))]),
    }
    assert len(seen) == 7 and fingerprint([("a", tensor.view(2, 3).t().contiguous().t())]) in seen
    norm = nn.BatchNorm1d(2)
    before = model_fingerprint(norm)
    norm.running_mean[0] = 1
    assert before != model_fingerprint(norm) and model_fingerprint(lambda x: x) == "function"
