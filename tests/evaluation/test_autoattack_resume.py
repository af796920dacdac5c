"""A kill in the middle of each attack, one after the other, changes nothing of the result."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from attacked import Ladder
from autoattack_child import Dying, evaluate, facts

from hf_robust.evaluation.autoattack_state import CascadeState

CHILD = Path(__file__).parent / "autoattack_child.py"
ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")


def test_sigkill_in_each_attack_and_resume_give_the_same_flags(tmp_path: Path) -> None:
    state = tmp_path / "state.npz"
    sizes = []
    for attack in ATTACKS:
        child = subprocess.run([sys.executable, CHILD, "kill", state, attack], timeout=200)
        assert child.returncode == -signal.SIGKILL
        with np.load(state, allow_pickle=False) as stored:
            sizes.append(len(stored["after"]))
    assert sizes == [0, 1, 2, 3], "each child went on where the one before had died"
    resumed = facts(evaluate(Dying(str(state), "none"), str(state)))
    straight = facts(evaluate(Ladder(), None))
    assert resumed == straight
    assert straight["robust"].count(False) >= 3 and straight["robust"].count(True) >= 4


def test_a_batch_that_is_over_is_not_attacked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after every single note, the cascade still asks the model exactly as often."""
    state, model, save, interruptions = tmp_path / "state.npz", Ladder(), CascadeState.save, 0

    def stop(self: CascadeState, path: Path, tag: dict) -> None:
        save(self, path, tag)
        raise KeyboardInterrupt

    monkeypatch.setattr(CascadeState, "save", stop)
    while True:
        try:
            result = evaluate(model, str(state))
            break
        except KeyboardInterrupt:
            interruptions += 1
            assert interruptions < 60
    assert interruptions >= 12
    assert facts(result) == facts(evaluate(Ladder(), None))


def test_a_file_that_is_no_state_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.npz"
    for content in (b"", b"PK\x03\x04 and then nothing", b"text"):
        state.write_bytes(content)
        with pytest.raises(ValueError, match="cannot read .*state.npz.*delete it to start again"):
            evaluate(Ladder(), str(state))
    np.savez(state, facts=np.array({"tag": {}}, dtype=object))  # a pickle inside
    with pytest.raises(ValueError, match="cannot read"):
        evaluate(Ladder(), str(state))
    np.savez(state, other=np.zeros(3))
    with pytest.raises(ValueError, match="cannot read"):
        evaluate(Ladder(), str(state))
