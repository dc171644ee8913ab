import errno
import os
import signal
from pathlib import Path

import pytest
import torch

from bestiary.diffusion.checkpoints import checkpoint_key, load_checkpoint, save_checkpoint, stop_on_sigterm
from bestiary.errors import BestiaryError


def test_the_newest_checkpoint_is_loaded_and_old_ones_go(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "none") is None
    for step in (10, 20, 100):
        save_checkpoint(tmp_path, step, {"step": step, "weights": [torch.full((2,), float(step))]})
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000020.pt", "step-00000100.pt"]
    state = load_checkpoint(tmp_path)
    assert state is not None
    assert state["step"] == 100
    assert state["weights"][0].tolist() == [100, 100]


def test_a_broken_checkpoint_gives_way_to_the_one_before_it(tmp_path: Path) -> None:
    for step in (10, 20):
        save_checkpoint(tmp_path, step, {"step": step})
    (tmp_path / "step-00000020.pt").write_bytes(b"")
    state = load_checkpoint(tmp_path)
    assert state is not None
    assert state["step"] == 10


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 10, {"step": 10})

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(BestiaryError, match="There is no space left"):
        save_checkpoint(tmp_path, 20, {"step": 20})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010.pt"]


def test_the_key_follows_what_decides_the_result() -> None:
    assert checkpoint_key({"rank": 2, "seed": 0}) == checkpoint_key({"seed": 0, "rank": 2})
    assert checkpoint_key({"rank": 2}) != checkpoint_key({"rank": 4})


def test_sigterm_is_a_wish_inside_and_itself_again_outside() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_sigterm() as stop:
        assert not stop.made
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.made
    assert signal.getsignal(signal.SIGTERM) is before
