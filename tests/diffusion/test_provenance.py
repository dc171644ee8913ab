import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.settings import train_settings
from support.training import run_training

from bestiary.diffusion import provenance
from bestiary.diffusion.adapter import save_adapter
from bestiary.diffusion.adapter_format import Provenance
from bestiary.diffusion.base import base_sha256
from bestiary.diffusion.latents import Latents
from bestiary.diffusion.provenance import checkpoint_key, training_provenance
from bestiary.errors import BestiaryError
from bestiary.params import Model


@pytest.fixture
def model(base: Path) -> Model:
    return Model(model=str(base), revision=None)


def test_the_adapters_file_holds_these_keys_and_no_others(
    base: Path, model: Model, latents: Latents, tmp_path: Path
) -> None:
    """The file's hash is the adapter's name in the registry, so a key more or less gives every adapter another name."""
    provenance = training_provenance(model, latents, train_settings(), seed=7, resolution=32)
    _, unet = run_training(base, latents, steps=1)
    with safe_open(save_adapter(unet, tmp_path, provenance), framework="pt") as file:
        text = file.metadata()["bestiary"]
    expected = {
        "base": str(base),
        "base_sha256": base_sha256(base),
        "data_sha256": latents.training.data_sha256,
        "resolution": 32,
        "params": {
            "accumulation": 1,
            "alpha": 8.0,
            "batch_size": 4,
            "caption_dropout": 0.1,
            "compile": "never",
            "criterion": "val_loss",
            "dropout": 0.0,
            "ema_decay": 0.9,
            "gradient_checkpointing": False,
            "huber_c": None,
            "learning_rate": 0.01,
            "learning_rate_schedule": "cosine",
            "max_grad_norm": 1.0,
            "min_delta": 0.0,
            "min_snr_gamma": 5.0,
            "noise_offset": 0.0,
            "optimizer": "adamw",
            "patience": None,
            "rank": 2,
            "seed": 7,
            "steps": 8,
            "targets": ["to_q", "to_k", "to_v", "to_out.0"],
            "timestep_sampling": "uniform",
            "use_dora": False,
            "use_rslora": False,
            "validate_every": 4,
            "warmup_steps": 2,
            "weight_decay": 0.01,
        },
    }
    assert text == json.dumps(expected, sort_keys=True)


def test_the_adapters_file_says_what_was_preserved(model: Model, latents: Latents) -> None:
    def params(kind: str) -> dict[str, object]:
        settings = train_settings(preservation={"kind": kind, "weight": 0.3, "samples": 4})
        return training_provenance(model, latents, settings, seed=7, resolution=32).params or {}

    assert params("noised").keys() - params("none").keys() == {"preservation"}
    assert params("drawn").keys() - params("noised").keys() == {"sheet_steps", "sheet_guidance_scale"}
    assert params("both")["preservation"] == {"kind": "both", "weight": 0.3, "samples": 4}


def test_latents_of_another_base_are_rejected(v_prediction_base: Path, latents: Latents) -> None:
    other = Model(model=str(v_prediction_base), revision=None)
    with pytest.raises(BestiaryError, match=str(v_prediction_base)):
        training_provenance(other, latents, train_settings(), seed=0, resolution=32)


def test_the_checkpoint_key_changes_with_everything_that_decides_the_result(model: Model, latents: Latents) -> None:
    def key(judge: str = "judge", seed: int = 0, resolution: int = 32, **changes: object) -> str:
        settings = train_settings(**changes)
        return checkpoint_key(
            training_provenance(model, latents, settings, seed=seed, resolution=resolution), settings, judge
        )

    assert key() == key(checkpoint_seconds=60.0)
    assert key() == key(preservation={"kind": "none", "weight": 1.0, "samples": 1})
    changed = [
        key(judge="another"),
        key(seed=1),
        key(resolution=64),
        key(rank=4),
        key(patience=2),
        key(sheet_animals=1),
        key(sheet_seeds=2),
        key(preservation={"kind": "noised", "weight": 0.3, "samples": 4}),
        key(preservation={"kind": "drawn", "weight": 0.3, "samples": 4}),
        key(preservation={"kind": "noised", "weight": 1.0, "samples": 4}),
        key(preservation={"kind": "noised", "weight": 0.3, "samples": 2}),
        key(keep_checkpoints=True),
        key(low_memory=True),
    ]
    assert len({key(), *changed}) == 1 + len(changed)


def test_a_gpus_checkpoints_are_not_resumed_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for device, dtype in (("cuda", torch.bfloat16), ("cuda", torch.float16), ("cpu", torch.float32)):
        found = torch.device(device), dtype
        monkeypatch.setattr(provenance, "device_and_dtype", lambda found=found: found)
        keys.add(checkpoint_key(Provenance(), train_settings(), ""))
    assert len(keys) == 3


def test_the_checkpoint_key_does_not_depend_on_the_order_of_the_settings() -> None:
    first, second = Provenance(params={"rank": 2, "seed": 0}), Provenance(params={"seed": 0, "rank": 2})
    assert checkpoint_key(first, train_settings(), "") == checkpoint_key(second, train_settings(), "")


def test_the_checkpoint_key_changes_with_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bestiary.diffusion.provenance.PACKAGE", tmp_path)
    keys = []
    for code in ("a = 1", "a = 2"):
        (tmp_path / "module.py").write_text(code)
        keys.append(checkpoint_key(Provenance(), train_settings(), ""))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "train.py").touch()
    keys.append(checkpoint_key(Provenance(), train_settings(), ""))
    monkeypatch.setattr(provenance, "version", lambda _: "3.0")
    keys.append(checkpoint_key(Provenance(), train_settings(), ""))
    assert len(set(keys)) == 4
