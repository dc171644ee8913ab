import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bestiary.diffusion.base import (
    base_commit,
    base_sha256,
    device_and_dtype,
    encode_text,
    load_pipeline,
    load_scheduler,
    load_text,
    load_unet,
)
from bestiary.errors import BestiaryError


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


def test_a_cpu_computes_in_float32() -> None:
    device, dtype = device_and_dtype()
    assert device.type != "cpu" or dtype == torch.float32


def test_a_gpu_is_left_alone_by_a_launch_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    for asked, device in (("False", "cuda"), ("True", "cpu")):  # as accelerate launch sets it
        monkeypatch.setenv("ACCELERATE_USE_CPU", asked)
        assert device_and_dtype()[0].type == device
    monkeypatch.setenv("ACCELERATE_USE_CPU", "perhaps")
    with pytest.raises(BestiaryError, match="neither true nor false"):
        device_and_dtype()


def test_the_bundled_base_loads_as_a_pipeline(base_folder: Path) -> None:
    pipeline = load_pipeline(base_folder, device="cpu")
    assert pipeline.vae_scale_factor == 4
    assert pipeline.unet.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in pipeline.unet.parameters())


def test_loading_prints_nothing(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_pipeline(base, device="cpu")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("model", ["models/nothing", "/nowhere/base", "nothing"])
def test_a_missing_base_is_named(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])  # models/ is a folder there, so models/nothing is not a hub id
    with pytest.raises(BestiaryError, match=f"{model} does not exist"):
        load_unet(model)


def test_a_hub_id_without_a_network_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BestiaryError, match="nobody/nothing is not complete on this machine"):
        load_unet("nobody/nothing")


def test_a_base_from_the_hub_has_a_commit_and_a_folder_has_none(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert base_commit(base) is None
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--somebody--base"  # the layout of the hub client's cache
    shutil.copytree(base, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert base_commit("somebody/base") == commit
    assert load_unet("somebody/base", commit).config.sample_size == 8


def test_a_part_that_is_missing_from_the_base_is_named(copy: Path) -> None:
    shutil.rmtree(copy / "vae")
    with pytest.raises(BestiaryError, match="no vae"):
        load_pipeline(copy)


def test_a_truncated_weight_file_is_named(copy: Path) -> None:
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(BestiaryError, match="unet does not load"):
        load_unet(copy)


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "text_encoder/model"])
def test_missing_weights_are_noticed(copy: Path, part: str) -> None:
    file = copy / f"{part}.safetensors"
    weights = load_file(file)
    weights.pop(sorted(weights)[0])
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(BestiaryError, match="1 weights are not in the file"):
        load_pipeline(copy)


def test_weights_of_another_shape_are_noticed(copy: Path) -> None:
    config = json.loads((copy / "unet" / "config.json").read_text())
    (copy / "unet" / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 48}))
    with pytest.raises(BestiaryError, match="unet"):
        load_unet(copy)


def test_the_hash_covers_the_weights_but_no_other_files(copy: Path, base: Path) -> None:
    (copy / "README.md").write_text("a model card")
    (copy / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another precision")
    assert base_sha256(copy) == base_sha256(base)
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert base_sha256(copy) != base_sha256(base)


def test_the_scheduler_keeps_the_prediction_type_of_the_base(base: Path, v_prediction_base: Path) -> None:
    assert load_scheduler(base).config.prediction_type == "epsilon"
    assert load_scheduler(v_prediction_base).config.prediction_type == "v_prediction"


def test_a_text_that_is_too_long_for_the_encoder_is_rejected(base: Path) -> None:
    parts = load_text(base)
    assert encode_text(*parts, ["", "a zebra"]).shape == (2, 77, 32)
    with pytest.raises(BestiaryError, match=r"82 tokens .* 77: .*zzz"):
        encode_text(*parts, ["z" * 80])


def test_the_features_equal_those_of_the_pipeline(base: Path) -> None:
    pipeline = load_pipeline(base, device="cpu")
    ours = encode_text(pipeline.tokenizer, pipeline.text_encoder, ["a zebra"])
    theirs, _ = pipeline.encode_prompt("a zebra", "cpu", 1, False)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "name",
    [
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "vae/diffusion_pytorch_model.safetensors.index.json",
        "text_encoder/model.safetensors.index.json",
        "text_encoder/adapter_config.json",
        "text_encoder/modeling.py",
        "scheduler/other.json",
    ],
)
def test_a_file_that_loading_would_read_but_the_hash_does_not_cover_is_named(copy: Path, name: str) -> None:
    (copy / name).write_text("{}")
    for use in (base_sha256, load_unet, load_pipeline, load_scheduler):
        with pytest.raises(BestiaryError, match=f"{copy} has the file {name}"):
            use(copy)


def test_files_that_no_loader_reads_are_no_obstacle(copy: Path, base: Path) -> None:
    for name in (
        "model_index.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "text_encoder/README.md",
    ):
        (copy / name).write_text("{}")
    assert base_sha256(copy) == base_sha256(base)
    load_pipeline(copy, device="cpu")


def test_a_config_that_names_other_weights_is_refused(copy: Path) -> None:
    config = copy / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"transformers_weights": "other.safetensors"}))
    with pytest.raises(BestiaryError, match=r"text_encoder/config\.json .*transformers_weights"):
        base_sha256(copy)


def test_a_name_too_long_for_any_base_is_one_short_sentence() -> None:
    with pytest.raises(BestiaryError, match=r"x{200}… does not exist") as raised:
        base_sha256("x" * 5000)
    assert len(str(raised.value)) < 400
