"""The state on disk: equal after reading, one move, and a fingerprint that sees every bit."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

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
