import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bestiary.diffusion.adapter import apply_adapter, inject, read_provenance, save_adapter
from bestiary.diffusion.adapter_format import FILE_NAME, Provenance
from bestiary.diffusion.base import load_pipeline, load_unet
from bestiary.diffusion.conversion import convert, read
from bestiary.errors import BestiaryError


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    unet = load_unet(base)
    parameters = inject(unet, rank=2, alpha=5, dropout=0.0, targets=["to_q", "to_k", "to_v", "to_out.0"], seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return save_adapter(unet, tmp_path_factory.mktemp("adapter"), Provenance(base="somewhere"))


def header_of(file: Path) -> dict[str, str]:
    """The metadata in a safetensors file's header."""
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata())


def original_pickle(adapter: Path, path: Path) -> Path:
    """The same weights as the original system saved them: a torch zip with a safetensors name and without alpha."""
    weights = {
        f"base_model.model.{key.removeprefix('unet.').replace('.weight', '.default.weight')}": value
        for key, value in load_file(adapter).items()
    }
    torch.save(weights, path)
    return path


def output(base: Path, loader: Literal["ours", "diffusers"], adapter: Path) -> torch.Tensor:
    """The UNet's output with the adapter."""
    pipeline = load_pipeline(base, device="cpu")
    if loader == "ours":
        apply_adapter(pipeline, adapter)
    else:
        pipeline.load_lora_weights(str(adapter.parent), weight_name=adapter.name)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        latents = torch.randn(1, 4, 8, 8, generator=generator)
        text = torch.randn(1, 4, 32, generator=generator)
        sample: torch.Tensor = pipeline.unet(latents, torch.tensor([500]), text).sample
    return sample


def test_to_kohya_and_back_is_exact_to_the_byte(adapter: Path, tmp_path: Path) -> None:
    kohya = convert(adapter, tmp_path / "kohya.safetensors", "kohya")
    back = convert(kohya, tmp_path / "back", "diffusers")
    assert back.name == FILE_NAME
    assert back.read_bytes() == adapter.read_bytes()


def test_provenance_keys_of_another_version_survive_a_conversion(adapter: Path, tmp_path: Path) -> None:
    text = json.dumps({"base": "models/base", "later": [1, {"a": None}]}, sort_keys=True)
    save_file(load_file(adapter), tmp_path / "later.safetensors", header_of(adapter) | {"bestiary": text})
    kohya = convert(tmp_path / "later.safetensors", tmp_path / "kohya.safetensors", "kohya")
    back = convert(kohya, tmp_path / "back", "diffusers")
    assert header_of(kohya)["bestiary"] == header_of(back)["bestiary"] == text


def test_kohya_files_store_their_alpha_and_work_in_diffusers_own_loader(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    kohya = convert(adapter, tmp_path / "kohya.safetensors", "kohya")
    weights = load_file(kohya)
    assert {float(value) for key, value in weights.items() if key.endswith(".alpha")} == {5.0}
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_down.weight" in weights
    torch.testing.assert_close(output(base, "diffusers", kohya), output(base, "ours", adapter), atol=1e-6, rtol=0)


def test_kohya_files_have_the_metadata_that_other_tools_need(adapter: Path, tmp_path: Path) -> None:
    kohya = convert(adapter, tmp_path / "kohya.safetensors", "kohya")
    metadata = header_of(kohya)
    for key in ("sai_model_spec", "architecture", "implementation", "title", "resolution"):  # that ModelSpec requires
        assert metadata[f"modelspec.{key}"]
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert (metadata["ss_network_module"], metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (
        "networks.lora", "2", "5.0",
    )  # fmt: skip
    assert metadata["modelspec.resolution"] == "512x512"  # the default, because this file does not say its resolution
    # A1111 hashes everything after the header.
    data = kohya.read_bytes()
    tensors = data[8 + int.from_bytes(data[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(tensors).hexdigest()


def test_the_original_systems_pickle_is_read_with_its_alpha(base: Path, adapter: Path, tmp_path: Path) -> None:
    pickled = original_pickle(adapter, tmp_path / "clip-31.475.safetensors")
    found = read(pickled)
    assert (found.config.r, found.config.lora_alpha) == (2, 16.0)
    converted = convert(pickled, tmp_path / "converted", "diffusers", alpha=5.0)
    assert torch.equal(output(base, "ours", converted), output(base, "ours", adapter))


def test_a_peft_folder_is_read_with_its_config(base: Path, adapter: Path, tmp_path: Path) -> None:
    weights = {f"base_model.model.{key.removeprefix('unet.')}": value for key, value in load_file(adapter).items()}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    config = {"r": 2, "lora_alpha": 5, "target_modules": targets, "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    converted = convert(tmp_path, tmp_path / "converted", "diffusers")
    assert torch.equal(output(base, "ours", converted), output(base, "ours", adapter))
    assert read_provenance(converted) == Provenance()


def test_files_that_would_be_misread_are_rejected(adapter: Path, tmp_path: Path) -> None:
    weights = {f"base_model.model.{key.removeprefix('unet.')}": value for key, value in load_file(adapter).items()}
    torch.save(weights, tmp_path / "adapter_model.bin")
    for text, problem in (
        ('{"r": 2, "lora_alpha": 5, "alpha_pattern": {"to_q": 9}}', "different ranks or alphas"),
        ('{"r": 2, "rank_pattern": {"to_q": 9}}', "different ranks or alphas"),
        ("[]", "broken config"),
        ("\xff", "broken config"),
    ):
        (tmp_path / "adapter_config.json").write_text(text, encoding="latin-1")
        with pytest.raises(BestiaryError, match=problem):
            read(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 5}')
    assert read(tmp_path).config.lora_alpha == 5
    half = dict(list(load_file(adapter).items())[1:])
    save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(BestiaryError, match=r"half\.safetensors .*one half of"):
        read(tmp_path / "half.safetensors", alpha=1)
    key = next(iter(weights))
    save_file({key.replace("lora_A", "lora_mid"): weights[key]}, tmp_path / "locon.safetensors")
    with pytest.raises(BestiaryError, match=r"locon\.safetensors .*lora_mid"):
        read(tmp_path / "locon.safetensors", alpha=1)


@pytest.mark.parametrize("change", [{"unet.lora_alpha": "x"}, {"unet.target_modules": 5}, {"unet.use_rslora": "no"}])
def test_a_config_that_was_tampered_with_is_rejected(adapter: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    metadata = header_of(adapter)
    metadata["lora_adapter_metadata"] = json.dumps(json.loads(metadata["lora_adapter_metadata"]) | change)
    save_file(load_file(adapter), tmp_path / "x.safetensors", metadata)
    for form in ("diffusers", "kohya"):
        with pytest.raises(BestiaryError, match=r"x\.safetensors .*broken config"):
            convert(tmp_path / "x.safetensors", tmp_path / "out.safetensors", form)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda weights, module: weights.pop(f"{module}.alpha"), "different ranks or alphas"),
        (lambda weights, module: weights.update({f"{module}.lora.down.weight": torch.ones(2, 32)}), "twice"),
        (lambda weights, module: weights.update({f"{module}.lora_down.weight": torch.ones(2)}), "different ranks"),
        (
            lambda weights, module: weights.update({f"{module}.lora_up.weight": torch.ones(32, 2, dtype=torch.int8)}),
            "int8",
        ),
    ],
)
def test_a_kohya_file_that_would_be_misread_is_rejected(
    adapter: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor], str], object], problem: str
) -> None:
    weights = load_file(convert(adapter, tmp_path / "whole.safetensors", "kohya"))
    change(weights, next(iter(weights)).partition(".")[0])
    save_file(weights, tmp_path / "changed.safetensors")
    with pytest.raises(BestiaryError, match=problem):
        read(tmp_path / "changed.safetensors")


def test_a_target_with_another_suffix_is_rejected(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match=r"x\.ckpt .*\.safetensors"):
        convert(adapter, tmp_path / "x.ckpt", "kohya")


def test_a_file_without_alpha_is_rejected_until_alpha_is_given(adapter: Path, tmp_path: Path) -> None:
    save_file(load_file(adapter), tmp_path / "bare.safetensors")
    with pytest.raises(BestiaryError, match=r"bare\.safetensors .*--alpha"):
        read(tmp_path / "bare.safetensors")
    assert read(tmp_path / "bare.safetensors", alpha=5.0).config.lora_alpha == 5.0


class Attack:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.mark,)  # type: ignore[return-value]


def test_code_in_a_pickle_is_rejected_and_never_runs(tmp_path: Path) -> None:
    torch.save({"base_model.model.x": Attack(tmp_path / "ran")}, tmp_path / "attack.safetensors")
    with pytest.raises(BestiaryError, match=r"attack\.safetensors holds code"):
        read(tmp_path / "attack.safetensors")
    (tmp_path / "bare.safetensors").write_bytes(pickle.dumps(Attack(tmp_path / "ran")))
    with pytest.raises(BestiaryError, match=r"bare\.safetensors"):
        read(tmp_path / "bare.safetensors")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", ["safetensors", "pickle"])
def test_a_truncated_file_is_rejected(adapter: Path, tmp_path: Path, form: str) -> None:
    whole = adapter if form == "safetensors" else original_pickle(adapter, tmp_path / "whole.safetensors")
    data = whole.read_bytes()
    (tmp_path / "half.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(BestiaryError, match=r"half\.safetensors"):
        convert(tmp_path / "half.safetensors", tmp_path / "out.safetensors", "kohya")
    assert not (tmp_path / "out.safetensors").exists()


def test_weights_of_a_text_encoder_are_rejected(adapter: Path, tmp_path: Path) -> None:
    weights = {**load_file(adapter), "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 2)}
    save_file(weights, tmp_path / "with-text.safetensors")
    with pytest.raises(BestiaryError, match=r"with-text\.safetensors .*lora_te_text_model"):
        read(tmp_path / "with-text.safetensors")
