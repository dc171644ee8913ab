import errno
import os
import signal
from pathlib import Path

import pytest
import torch
from support.adapters import PROVENANCE, make_adapter

from bestiary.diffusion.adapter_format import FILE_NAME
from bestiary.diffusion.base import load_unet
from bestiary.diffusion.checkpoints import (
    Checkpoint,
    keep_adapter,
    load_checkpoint,
    publish_kept_adapters,
    save_checkpoint,
    stop_on_sigterm,
)
from bestiary.diffusion.objective import Validation
from bestiary.diffusion.progress import ProgressState
from bestiary.errors import BestiaryError


def checkpoint(step: int) -> Checkpoint:
    weights = [torch.full((2,), float(step))]
    best = Validation(0.5, {"0-199": 0.4}, {"zebra": 0.5})
    progress = ProgressState(step=step, best=best, best_weights=weights, history=[{"step": 0.0, "val_loss": 0.5}])
    return Checkpoint(weights, weights, {"state": {0: {"step": torch.tensor(1.0)}}}, None, progress)


def test_the_newest_checkpoint_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "none") is None
    for step in (10, 20, 100):
        save_checkpoint(tmp_path, checkpoint(step))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000020.pt", "step-00000100.pt"]
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded.weights[0].tolist() == [100, 100]
    assert loaded.progress.step == 100
    assert loaded.progress.best == Validation(0.5, {"0-199": 0.4}, {"zebra": 0.5})
    assert loaded.progress.history == [{"step": 0.0, "val_loss": 0.5}]


def test_a_broken_checkpoint_is_skipped_for_the_one_before_it(tmp_path: Path) -> None:
    for step in (10, 20):
        save_checkpoint(tmp_path, checkpoint(step))
    (tmp_path / "step-00000020.pt").write_bytes(b"")
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded.progress.step == 10


def test_a_checkpoint_with_code_in_it_is_not_loaded(tmp_path: Path) -> None:
    torch.save({"code": Path("anything")}, tmp_path / "step-00000010.pt")
    assert load_checkpoint(tmp_path) is None


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, checkpoint(10))

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(BestiaryError, match=r"step-00000020\.pt"):
        save_checkpoint(tmp_path, checkpoint(20))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010.pt"]


def test_kept_adapters_are_published_in_place_of_earlier_ones(base: Path, tmp_path: Path) -> None:
    unet, out = load_unet(base), tmp_path / "models" / "checkpoints"
    expected = make_adapter(unet, tmp_path / "adapter").read_bytes()
    for step in (4, 8):
        keep_adapter(tmp_path / "run", step, unet, PROVENANCE)
    (tmp_path / "run" / "adapters" / "step-000012").mkdir()
    (tmp_path / "run" / "adapters" / "step-000012" / f".{FILE_NAME}.1").write_bytes(b"half")  # as a kill leaves it
    (out / "step-000099").mkdir(parents=True)
    publish_kept_adapters(tmp_path / "run", out)
    assert {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()} == {
        f"step-000004/{FILE_NAME}": expected,
        f"step-000008/{FILE_NAME}": expected,
    }
    assert not (out / "step-000099").exists()
    publish_kept_adapters(tmp_path / "none", out)
    assert not out.exists()


def test_sigterm_only_sets_a_flag_inside_the_block_and_its_handler_is_restored_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_sigterm() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) is before
