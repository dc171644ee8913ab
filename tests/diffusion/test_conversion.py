import functools
import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.adapters import ALL_LAYERS, make_adapter

from bestiary.diffusion.adapter import (
    adapter_sha256,
    apply_adapter,
    inject,
    read_provenance,
    save_adapter,
    verify_adapter,
)
from bestiary.diffusion.adapter_format import FILE_NAME, Provenance
from bestiary.diffusion.base import load_pipeline, load_unet
from bestiary.diffusion.conversion import convert, read
from bestiary.diffusion.stored_adapter import is_pickle
from bestiary.errors import BestiaryError


@pytest.fixture(scope="module")
def on_all_layers(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on attention, feed-forward layers, projections and convolutions."""
    return make_adapter(load_unet(base), tmp_path_factory.mktemp("all"), targets=ALL_LAYERS)


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


@pytest.fixture(scope="module")
def adapted(base: Path, adapter: Path) -> torch.Tensor:
    """The UNet's output with the adapter."""
    return output(base, "ours", adapter)


def test_to_kohya_and_back_is_exact_to_the_byte(adapter: Path, tmp_path: Path) -> None:
    kohya = convert(adapter, tmp_path / "kohya.safetensors", "kohya")
    back = convert(kohya, tmp_path / "back", "diffusers")
    assert back.name == FILE_NAME
    assert back.read_bytes() == adapter.read_bytes()


def test_no_other_file_is_overwritten_and_converting_again_changes_nothing(adapter: Path, tmp_path: Path) -> None:
    kohya = convert(adapter, tmp_path / "kohya.safetensors", "kohya")
    converted = kohya.read_bytes()
    assert convert(adapter, kohya, "kohya") == convert(kohya, kohya, "kohya") == kohya
    assert kohya.read_bytes() == converted
    another = tmp_path / FILE_NAME
    for content in (b"another adapter", b""):
        another.write_bytes(content)
        with pytest.raises(BestiaryError, match=f"{FILE_NAME} exists and would be overwritten. Choose another name."):
            convert(kohya, tmp_path, "diffusers")
        assert another.read_bytes() == content
    with pytest.raises(BestiaryError, match=r"kohya\.safetensors exists and would be overwritten"):
        convert(kohya, kohya, "diffusers")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(BestiaryError, match=r"folder\.safetensors exists and would be overwritten"):
        convert(kohya, tmp_path / "folder.safetensors", "diffusers")
    assert kohya.read_bytes() == converted


def test_an_adapter_on_all_layers_is_converted_exactly_and_works_in_diffusers_own_loader(
    base: Path, on_all_layers: Path, tmp_path: Path
) -> None:
    kohya = convert(on_all_layers, tmp_path / "kohya.safetensors", "kohya")
    assert convert(kohya, tmp_path / "back", "diffusers").read_bytes() == on_all_layers.read_bytes()
    weights = load_file(kohya)
    for module in ("resnets_0_conv2", "attentions_0_proj_in", "attentions_0_transformer_blocks_0_ff_net_0_proj"):
        assert f"lora_unet_down_blocks_0_{module}.lora_up.weight" in weights
    expected = output(base, "ours", on_all_layers)
    for file in (on_all_layers, kohya):
        torch.testing.assert_close(output(base, "diffusers", file), expected, atol=1e-5, rtol=1e-5)


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
        ('{"r": 2, "lora_alpha": 5, "alpha_pattern": {"to_q": "9"}}', "broken config: alpha_pattern"),
        ('{"r": 2, "rank_pattern": {"to_q": 9}}', r"says r = 9, its weights have the rank 2 \(.*to_q"),
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
        (lambda weights, module: weights.pop(f"{module}.alpha"), "an alpha for 31 of its 32 modules"),
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


# ---- producers, told by their keys ----


def diffusers_weights(adapter: Path, form: str) -> dict[str, torch.Tensor]:
    """The weights as diffusers' training scripts named them: today's names, or those before version 0.22."""
    weights = {}
    for key, value in load_file(adapter).items():
        key = key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")
        if form == "old":
            key = key.replace(".to_out.0.lora.", ".processor.to_out_lora.")
            key = re.sub(r"\.(to_[qkv])\.lora\.", r".processor.\1_lora.", key)
        weights[key] = value
    return weights


@pytest.mark.parametrize("form", ["today", "old"])
@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", FILE_NAME])
def test_a_file_of_diffusers_scripts_without_alpha_has_the_strength_that_diffusers_gives_it(
    base: Path, adapter: Path, tmp_path: Path, form: str, name: str
) -> None:
    weights = diffusers_weights(adapter, form)
    (torch.save if name.endswith(".bin") else save_file)(weights, tmp_path / name)
    told: list[str] = []
    converted = convert(tmp_path / name, tmp_path / "converted", "diffusers", tell=told.append)
    assert read(converted).config.lora_alpha == 2
    assert told == [
        "The alpha 2 was assumed: diffusers' training scripts store no alpha when it is the rank, 2. "
        "Give another with --alpha.",
        "Converted 32 of 32 modules: 32 of the UNet.",
    ]
    theirs = output(base, "diffusers", tmp_path / name)
    assert torch.equal(output(base, "ours", tmp_path), output(base, "ours", converted))
    torch.testing.assert_close(output(base, "ours", tmp_path), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("rename", "rank"),
    [
        (lambda key: f"base_model.model.{key.removeprefix('unet.')}", 2),  # PEFT's file without its config
        (lambda key: key, 2),  # diffusers' names of today, without its metadata
        (lambda key: f"base_model.model.{key.removeprefix('unet.').replace('.weight', '.default.weight')}", 1),
    ],
)
def test_a_pickle_of_an_unknown_producer_needs_its_alpha(
    adapter: Path, tmp_path: Path, rename: Callable[[str], str], rank: int
) -> None:
    weights = {
        rename(key): (value[:rank] if "lora_A" in key else value[:, :rank]).clone()
        for key, value in load_file(adapter).items()
    }
    torch.save(weights, tmp_path / "unknown.bin")
    with pytest.raises(BestiaryError, match=r"unknown\.bin .*--alpha"):
        read(tmp_path / "unknown.bin")
    assert read(tmp_path / "unknown.bin", alpha=3.0).config.lora_alpha == 3.0


def test_kohyas_files_without_alpha_have_the_rank_as_alpha(adapter: Path, tmp_path: Path) -> None:
    weights = load_file(convert(adapter, tmp_path / "whole.safetensors", "kohya"))
    save_file({key: value for key, value in weights.items() if ".alpha" not in key}, tmp_path / "old.safetensors")
    found = read(tmp_path / "old.safetensors")
    assert (found.config.lora_alpha, found.alpha_rule) == (2, "kohya's tools store no alpha when it is the rank, 2")


def test_an_alpha_beside_a_stored_one_is_refused(adapter: Path, tmp_path: Path) -> None:
    kohya = convert(adapter, tmp_path / "kohya.safetensors", "kohya")
    for file in (adapter, kohya):
        with pytest.raises(BestiaryError, match=r"stores its alpha, 5, .*--alpha 4"):
            convert(file, tmp_path / "out", "diffusers", alpha=4.0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("alpha", [torch.tensor([5.0, 6.0]), torch.tensor(0.0), torch.tensor(torch.inf)])
def test_an_alpha_that_is_not_one_usable_number_is_refused(adapter: Path, tmp_path: Path, alpha: torch.Tensor) -> None:
    weights = load_file(convert(adapter, tmp_path / "whole.safetensors", "kohya"))
    weights = {key: alpha.clone() if ".alpha" in key else value for key, value in weights.items()}
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(BestiaryError, match=r"x\.safetensors .*alpha"):
        read(tmp_path / "x.safetensors")


def test_two_alphas_that_differ_are_refused(adapter: Path, tmp_path: Path) -> None:
    kohya = convert(adapter, tmp_path / "kohya.safetensors", "kohya")
    weights = {key: torch.tensor(9.0) if ".alpha" in key else value for key, value in load_file(kohya).items()}
    save_file(weights, tmp_path / "two.safetensors", header_of(kohya))
    with pytest.raises(BestiaryError, match=r"two alphas: 9 .* and 5"):
        read(tmp_path / "two.safetensors")


# ---- PEFT's folders ----


def peft_folder(adapter: Path, folder: Path, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    weights = {f"base_model.model.{key.removeprefix('unet.')}": value for key, value in load_file(adapter).items()}
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 5, "peft_type": "LORA"} | config))
    return folder


@pytest.mark.parametrize(
    "choice",
    [
        {"target_modules": r".*attn[12]\.to_([qkv]|out\.0)"},
        {"target_modules": "all-linear"},
        {"target_modules": ["to_q"]},
        {"target_modules": ["to_q", "to_k", "to_v", "to_out.0", "conv1"], "exclude_modules": ["conv1"]},
        {"target_modules": ["to_q", "to_k", "to_v", "to_out.0", "proj_in"], "layers_to_transform": [0]},
        {},
    ],
)
def test_the_weights_are_believed_however_the_config_chose_the_modules(
    base: Path, adapter: Path, adapted: torch.Tensor, tmp_path: Path, choice: dict[str, object]
) -> None:
    folder = peft_folder(adapter, tmp_path / "peft", **choice)
    assert torch.equal(output(base, "ours", folder), adapted)


def test_pissa_is_refused_by_the_name_of_its_setting(adapter: Path, tmp_path: Path) -> None:
    folder = peft_folder(adapter, tmp_path / "peft", target_modules=["to_q"], init_lora_weights="pissa")
    with pytest.raises(BestiaryError, match=r"adapter_model\.safetensors sets init_lora_weights to 'pissa'"):
        convert(folder, tmp_path / "out", "diffusers")


def test_the_hash_of_pefts_adapter_covers_its_config(adapter: Path, tmp_path: Path) -> None:
    first = adapter_sha256(peft_folder(adapter, tmp_path / "peft"))
    assert adapter_sha256(peft_folder(adapter, tmp_path / "peft", lora_alpha=6)) != first


def test_a_folder_with_two_adapters_is_refused(adapter: Path, tmp_path: Path) -> None:
    folder = peft_folder(adapter, tmp_path / "peft")
    (folder / FILE_NAME).write_bytes(adapter.read_bytes())
    with pytest.raises(BestiaryError, match=f"two adapters.*{FILE_NAME} or adapter_model"):
        read(folder)


def test_a_rank_that_the_weights_do_not_have_is_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match=r"r = 8, .*rank 2"):
        read(peft_folder(adapter, tmp_path / "peft", r=8))


# ---- other kinds and families ----

MODULE = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (f"lora_unet_{MODULE}.oft_blocks", "an OFT"),
        ("model.diffusion_model.input_blocks.0.0.weight", "a whole checkpoint"),
        ("emb_params", "a textual inversion"),
        ("unet:0:up", "cloneofsimo"),
    ],
)
def test_another_kind_of_file_is_refused_by_its_name(adapter: Path, tmp_path: Path, key: str, kind: str) -> None:
    weights = load_file(convert(adapter, tmp_path / "kohya.safetensors", "kohya"))
    save_file({**weights, key: torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(BestiaryError, match=rf"other\.safetensors is {kind}|other\.safetensors is .*{kind}"):
        read(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("key", "width", "family"),
    [
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight", 2048, "SDXL"),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora.down.weight", 2048, "SDXL"),
        ("unet.down_blocks.2.attentions.0.transformer_blocks.9.attn1.to_q.lora_A.weight", 1280, "SDXL"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight", 2048, "SDXL"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", 1280, "SDXL"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", 3072, "FLUX"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", 3072, "FLUX"),
        ("lora_unet_joint_blocks_0_context_block_attn_qkv.lora_down.weight", 1536, "Stable Diffusion 3"),
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.hada_w1_b", 2048, "SDXL"),
        ("unet.add_embedding.linear_1.lora_A.weight", 2816, "SDXL"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight", 1024, "Stable Diffusion 2.x"),
        (
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight",
            1024,
            "Stable Diffusion 2.x",
        ),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight", 1024, "Stable Diffusion 2.x"),
        ("diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight", 3072, "FLUX"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", 3072, "FLUX"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", 1536, "Stable Diffusion 3"),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight", 4096, "Stable Diffusion 3"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", 1920, "a diffusion transformer"),
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", 1536, "a diffusion transformer"),
    ],
)
def test_an_adapter_of_another_family_is_refused_by_its_name(
    base: Path, tmp_path: Path, key: str, width: int, family: str
) -> None:
    other = {"lora_A": "lora_B", "lora_down": "lora_up", ".down.weight": ".up.weight", "hada_w1_b": "hada_w1_a"}
    up = re.sub("|".join(map(re.escape, other)), lambda found: other[found[0]], key)
    save_file({key: torch.zeros(4, width), up: torch.zeros(8, 4)}, tmp_path / "x.safetensors")
    expected = rf"x\.safetensors: This adapter is for {family}; this base is Stable Diffusion 1\.x\."
    verify = functools.partial(verify_adapter, base=base)
    to_kohya = functools.partial(convert, target=tmp_path / "out", to="kohya")
    uses: list[Callable[[Path], object]] = [read, verify, to_kohya]
    # Adapters for Stable Diffusion 2.x can be converted, but not drawn with this base.
    for use in [verify] if family == "Stable Diffusion 2.x" else uses:
        with pytest.raises(BestiaryError, match=expected):
            use(tmp_path / "x.safetensors")


# ---- pickles ----


def test_drawing_does_not_guess_the_alpha_of_the_original_systems_pickle(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    pickled = original_pickle(adapter, tmp_path / "clip-31.475.safetensors")
    for use in (read_provenance, lambda path: verify_adapter(path, base)):
        with pytest.raises(BestiaryError, match="is a torch pickle: convert it with `bestiary adapter convert`"):
            use(pickled)


def test_a_pickle_that_would_take_more_memory_than_its_file_is_refused(tmp_path: Path) -> None:
    torch.save({"unet.x": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "expanded.bin")
    with pytest.raises(BestiaryError, match="what its tensors would hold is over the limit of its own size"):
        read(tmp_path / "expanded.bin")
    torch.save({"unet.x": torch.zeros(10**6)}, tmp_path / "whole.bin")
    with zipfile.ZipFile(tmp_path / "whole.bin") as whole, zipfile.ZipFile(tmp_path / "packed.bin", "w", 8) as packed:
        for part in whole.infolist():
            packed.writestr(part.filename, whole.read(part))
    with pytest.raises(BestiaryError, match=r"packed\.bin holds compressed parts"):
        read(tmp_path / "packed.bin")


def test_an_old_torch_pickle_is_known_and_a_header_of_640_bytes_is_not_taken_for_one(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert is_pickle(tmp_path / "old.pt")
    header = b"{}".ljust(640)
    (tmp_path / "640.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert not is_pickle(tmp_path / "640.safetensors")


def test_an_adapter_trained_with_dropout_draws_without_it_in_diffusers_too(base: Path, tmp_path: Path) -> None:
    unet = load_unet(base)
    for parameter in inject(unet, rank=2, alpha=2, dropout=0.5, targets=["to_q"], seed=0):
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    ours = save_adapter(unet, tmp_path / "ours", Provenance())
    assert torch.equal(output(base, "diffusers", ours), output(base, "diffusers", ours))
    weights = {f"base_model.model.{key.removeprefix('unet.')}": value for key, value in load_file(ours).items()}
    (tmp_path / "peft").mkdir()
    save_file(weights, tmp_path / "peft" / "adapter_model.safetensors")
    config = {"r": 2, "lora_alpha": 2, "lora_dropout": 0.5}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    assert torch.equal(output(base, "ours", tmp_path / "peft"), output(base, "ours", ours))
