"""Adapters of other programs are applied as their programs mean them, compared with W + delta computed by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from support.foreign_adapters import (
    ATTENTION,
    KINDS,
    TEXT,
    Base,
    Foreign,
    kohya,
    peft_folder,
    peft_model,
)
from support.tiny import build_base

from bestiary.diffusion.adapter import apply_adapter, apply_adapters, remove, set_weights, verify_adapter
from bestiary.diffusion.adapter_format import FILE_NAME
from bestiary.diffusion.base import load_pipeline, load_text, load_unet
from bestiary.diffusion.conversion import convert, read
from bestiary.diffusion.sampling import generate
from bestiary.errors import BestiaryError
from bestiary.evaluation.sweep import write_weighted_adapter
from bestiary.samplers import Sampling

TOLERANCE = 1e-4  # of the effect: the networks compute in float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with Stable Diffusion's two layers in each block, by which the first code's names count."""
    return build_base(tmp_path_factory.mktemp("base"), layers_per_block=2)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> StableDiffusionPipeline:
    return load_pipeline(folder, device="cpu")


@pytest.fixture
def base(pipeline: StableDiffusionPipeline) -> Base:
    remove(pipeline)
    text = {f"text_model.{name}": value.clone() for name, value in pipeline.text_encoder.state_dict().items()}
    return Base({name: value.clone() for name, value in pipeline.unet.state_dict().items()}, text)


@torch.inference_mode()
def outputs(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    """What text encoder and UNet make of one text and fixed noise, side by side."""
    ids = pipeline.tokenizer(["a zebra"], padding="max_length", return_tensors="pt").input_ids
    text = pipeline.text_encoder(ids).last_hidden_state
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sample = pipeline.unet(latents, torch.tensor([500]), text).sample
    return torch.cat([text.flatten(), sample.flatten()])


def reference(pipeline: StableDiffusionPipeline, adapter: Foreign, weight: float = 1.0) -> torch.Tensor:
    """The outputs without any adapter, but with its changes added to the networks' own parameters for the while."""
    remove(pipeline)
    before = {}
    for part, prefix in (("unet", ""), ("text_encoder", "text_model.")):
        for name, value in getattr(pipeline, part).named_parameters():
            if f"{prefix}{name}" in adapter.added:
                before[value] = value.data
                value.data = value.data + weight * adapter.added[f"{prefix}{name}"]
    found = outputs(pipeline)
    for value, own in before.items():
        value.data = own
    return found


def distance(found: torch.Tensor, truth: torch.Tensor, plain: torch.Tensor) -> float:
    """How far the found output is from the truth, relative to the effect."""
    return float((found - truth).norm() / (truth - plain).norm())


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_program_has_the_effect_that_its_program_gives_it(
    pipeline: StableDiffusionPipeline, base: Base, tmp_path: Path, kind: str
) -> None:
    adapter = KINDS[kind](base, tmp_path / "adapter.safetensors")
    plain = outputs(pipeline)
    whole = reference(pipeline, adapter)
    (applied,) = apply_adapters(pipeline, [adapter.path], [1.0])
    assert distance(outputs(pipeline), whole, plain) < TOLERANCE
    if not adapter.by_rule_of_peft:
        set_weights(pipeline, [0.5])
        found = outputs(pipeline)
        assert distance(found, reference(pipeline, adapter, 0.5), plain) < TOLERANCE  # which removes the adapter
        apply_adapter(pipeline, adapter.path)
    set_weights(pipeline, [0.0])
    assert torch.equal(outputs(pipeline), plain)
    remove(pipeline)
    assert torch.equal(outputs(pipeline), plain)
    modules = {name.rpartition(".")[0] for name in adapter.added}
    text = sum(name.startswith("text_model.") for name in modules)
    assert (applied.unet, applied.text_encoder) == (len(modules) - text, text)


HELD_BY_DIFFUSERS = [
    "kohya without alphas",
    "kohya with ranks and alphas by module",
    "LoCon",
    "DoRA",
    "OneTrainer, newer",
    "diffusers before 0.22",
]
NOT_HELD = [
    "LoCon with a core tensor",
    "LoHa with DoRA",
    "LoKr of convolutions",
    "DoRA by column",
    "whole differences and norms",
    "LoHa, LoRA and LoCon in one file",
    "ComfyUI's extraction",
]


@pytest.mark.parametrize("kind", [*HELD_BY_DIFFUSERS, *NOT_HELD])
def test_converting_keeps_the_whole_effect_or_names_what_the_format_cannot_hold(
    pipeline: StableDiffusionPipeline, base: Base, tmp_path: Path, kind: str
) -> None:
    adapter = KINDS[kind](base, tmp_path / "adapter.safetensors").path
    apply_adapter(pipeline, adapter)
    expected = outputs(pipeline)
    as_kohya = convert(adapter, tmp_path / "kohya.safetensors", "kohya")
    apply_adapter(pipeline, as_kohya)
    torch.testing.assert_close(outputs(pipeline), expected, atol=1e-6, rtol=1e-6)
    if kind not in HELD_BY_DIFFUSERS:
        with pytest.raises(BestiaryError, match=r"holds a (LoHa|LoKr|LoCon with|DoRA|weight difference).*--to kohya"):
            convert(adapter, tmp_path / "diffusers", "diffusers")
        assert not (tmp_path / "diffusers").exists()
        return
    as_diffusers = convert(adapter, tmp_path / "diffusers", "diffusers")
    assert convert(as_kohya, tmp_path / "back", "diffusers").read_bytes() == as_diffusers.read_bytes()
    remove(pipeline)
    pipeline.load_lora_weights(as_diffusers.parent)
    torch.testing.assert_close(outputs(pipeline), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_folder_that_peft_saved_has_the_effect_of_pefts_own_merge(
    pipeline: StableDiffusionPipeline, base: Base, folder: Path, tmp_path: Path, part: str
) -> None:
    network = load_unet(folder) if part == "unet" else load_text(folder)[1]
    targets = ["to_q", "to_v", "conv1"] if part == "unet" else ["q_proj", "fc1"]
    first, last = targets[0], targets[-1]
    config = {"target_modules": targets, "rank_pattern": {first: 3}, "alpha_pattern": {last: 5, first: 1}}
    plain = outputs(pipeline)
    adapter = peft_folder(base, tmp_path / "peft", network, config)
    truth = reference(pipeline, adapter)
    apply_adapter(pipeline, adapter.path)
    assert distance(outputs(pipeline), truth, plain) < TOLERANCE


def test_the_folders_of_pefts_scripts_for_each_network_are_named(tmp_path: Path) -> None:
    for part in ("unet", "text_encoder"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "adapter_config.json").write_text("{}")
    with pytest.raises(BestiaryError, match=r"no adapter at .*/unet and .*/text_encoder\. Name them"):
        read(tmp_path)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_a_file_that_diffusers_saved_of_both_networks_is_read_with_its_config(
    pipeline: StableDiffusionPipeline, base: Base, folder: Path, tmp_path: Path, options: dict[str, bool]
) -> None:
    plain, state = outputs(pipeline), {}
    added: dict[str, torch.Tensor] = {}
    for part, network, prefix in (
        ("unet", load_unet(folder), ""),
        ("text_encoder", load_text(folder)[1], "text_model."),
    ):
        targets = ["to_q", "conv2"] if part == "unet" else ["k_proj", "fc2"]
        config = {"target_modules": targets, "rank_pattern": {targets[0]: 4}, **options}
        model, delta = peft_model(base, network, config)
        added |= {f"{prefix}{name}": value for name, value in delta.items()}
        weights = get_peft_model_state_dict(model)
        state[f"{part}_lora_layers"] = {key.removeprefix("base_model.model."): value for key, value in weights.items()}
        metadata = model.peft_config["default"].to_dict()
        state[f"{part}_lora_adapter_metadata"] = metadata | {"target_modules": targets}
    StableDiffusionPipeline.save_lora_weights(tmp_path, **state)
    truth = reference(pipeline, Foreign(tmp_path, added))
    apply_adapter(pipeline, tmp_path / FILE_NAME)
    assert distance(outputs(pipeline), truth, plain) < TOLERANCE


def test_adapters_of_different_kinds_add_up_by_their_weights(
    pipeline: StableDiffusionPipeline, base: Base, tmp_path: Path
) -> None:
    first = KINDS["LoHa"](base, tmp_path / "loha.safetensors")
    second = KINDS["kohya with the text encoder"](base, tmp_path / "kohya.safetensors")
    third = KINDS["whole differences and norms"](base, tmp_path / "differences.safetensors")
    plain = outputs(pipeline)
    apply_adapter(pipeline, first.path)
    alone = outputs(pipeline)
    apply_adapters(pipeline, [first.path, second.path, third.path], [1, 0, 0])
    assert torch.equal(outputs(pipeline), alone)
    set_weights(pipeline, [0.7, 0.5, 0.2])
    found = outputs(pipeline)
    set_weights(pipeline, [0, 0, 0])
    assert torch.equal(outputs(pipeline), plain)
    added: dict[str, torch.Tensor] = {}
    for adapter, weight in ((first, 0.7), (second, 0.5), (third, 0.2)):
        for name, value in adapter.added.items():
            added[name] = added.get(name, torch.zeros(())) + weight * value
    assert distance(found, reference(pipeline, Foreign(tmp_path, added)), plain) < TOLERANCE


@pytest.mark.parametrize("kind", ["kohya with the text encoder", "LoKr", "kohya, only the text encoder"])
def test_verification_covers_both_networks_and_every_kind(folder: Path, base: Base, tmp_path: Path, kind: str) -> None:
    adapter = KINDS[kind](base, tmp_path / "adapter.safetensors")
    proof = verify_adapter(adapter.path, folder)
    assert proof.applied.unet + proof.applied.text_encoder == len(adapter.added)


def test_an_adapter_whose_text_encoder_part_has_no_effect_is_not_verified(
    folder: Path, base: Base, tmp_path: Path
) -> None:
    adapter = KINDS["kohya with the text encoder"](base, tmp_path / "adapter.safetensors")
    weights = load_file(adapter.path)
    dead = {key: value * 0 if "lora_te_" in key and "up" in key else value for key, value in weights.items()}
    save_file(dead, adapter.path)
    with pytest.raises(BestiaryError, match="no effect on the text encoder of"):
        verify_adapter(adapter.path, folder)


def test_a_few_step_adapter_of_any_kind_draws_with_the_sampler_lcm(
    pipeline: StableDiffusionPipeline, base: Base, tmp_path: Path
) -> None:
    sampling = Sampling("lcm", steps=2, guidance_scale=1.0)
    with pytest.raises(BestiaryError, match="needs a latent consistency model"):
        generate(pipeline, ["a zebra"], [0], sampling, batch_size=1)
    apply_adapter(pipeline, KINDS["LoKr"](base, tmp_path / "lcm.safetensors").path)
    assert read(tmp_path / "lcm.safetensors").few_step == Sampling("lcm", steps=4, guidance_scale=1.0)
    assert len(generate(pipeline, ["a zebra"], [0], sampling, batch_size=1)) == 1


def test_kinds_draw_in_half_precision_and_weight_0_is_exactly_the_base_there_too(
    folder: Path, base: Base, tmp_path: Path
) -> None:
    half = load_pipeline(folder, device="cpu", dtype=torch.bfloat16)
    sampling = Sampling("ddim", steps=2, guidance_scale=3.0)

    def drawn() -> bytes:
        return generate(half, ["a zebra"], [0], sampling, batch_size=1)[0].tobytes()

    plain = drawn()
    kinds = ["kohya with the text encoder", "LoHa, LoRA and LoCon in one file", "DoRA by column"]
    paths = [KINDS[kind](base, tmp_path / f"{number}.safetensors").path for number, kind in enumerate(kinds)]
    for path in paths:
        apply_adapter(half, path)
        assert drawn() != plain
    apply_adapters(half, paths, [0.3, 0.3, 0.3])
    assert drawn() != plain
    set_weights(half, [0, 0, 0])
    assert drawn() == plain


def test_an_adapter_written_with_a_weight_has_the_weight_in_all_its_alphas(
    pipeline: StableDiffusionPipeline, base: Base, tmp_path: Path
) -> None:
    path = KINDS["kohya with ranks and alphas by module"](base, tmp_path / "adapter.safetensors").path
    source = convert(path, tmp_path / "source", "diffusers")
    assert read(source).config.alpha_pattern
    apply_adapter(pipeline, source, 0.5)
    expected = outputs(pipeline)
    apply_adapter(pipeline, write_weighted_adapter(source, 0.5, tmp_path / "half"))
    torch.testing.assert_close(outputs(pipeline), expected, atol=1e-6, rtol=1e-6)


# ---- what is refused ----

QUERY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("kind", "change", "problem"),
    [
        ("LoHa", lambda weights: weights.pop(f"{QUERY}.hada_w2_b"), r"incomplete: of .*to_q it holds only hada_w1_a"),
        ("LoKr", lambda weights: weights.pop(f"{QUERY}.lokr_w1"), r"incomplete: of .*to_q it holds only lokr_w2_a"),
        ("LoHa", lambda weights: weights.pop(f"{QUERY}.alpha"), r"does not store the alpha of .*attn1\.to_q, a LoHa"),
        ("LoHa", lambda weights: weights.update({f"{QUERY}.alpha": torch.zeros(())}), "stores the alpha 0"),
        (
            "LoHa",
            lambda weights: weights.update({f"{QUERY}.hada_w1_a": torch.ones(8, 2)}),
            r"does not fit the base: the LoHa of .*attn1\.to_q does not have the sizes of its weight",
        ),
        (
            "LoKr",
            lambda weights: weights.update({f"{QUERY}.lokr_w1": torch.ones(8, 4)}),
            r"does not fit the base: the LoKr of .*attn1\.to_q does not have the sizes of its weight",
        ),
        (
            "whole differences and norms",
            lambda weights: weights.update({f"{QUERY}.diff_b": torch.ones(16)}),
            r"attn1\.to_q does not have the sizes of its bias",
        ),
        (
            "whole differences and norms",
            lambda weights: weights.update({"lora_unet_down_blocks_7_conv.diff": torch.ones(2)}),
            r"it changes down_blocks\.7\.conv, which the UNet does not have",
        ),
        ("kohya", lambda weights: weights.update({"lora_te_text_model_encoder_layers_9_mlp_fc1.diff": torch.ones(2)}),
         r"text_model\.encoder\.layers\.9\.mlp\.fc1, which the text encoder does not have"),
        ("kohya", lambda weights: weights.update({f"{QUERY}.bias_values": torch.ones(2)}), "bias_values"),
        ("kohya", lambda weights: weights.update({f"{QUERY}.oft_blocks": torch.ones(2)}), "is an OFT"),
        ("kohya", lambda weights: weights.update({f"{QUERY}.a1.weight": torch.ones(2)}), "is a GLoRA"),
        ("kohya", lambda weights: weights.update({"bundle_emb.cat.clip_l": torch.ones(2)}), "inversion of OneTrainer"),
        ("LoHa", lambda weights: weights.update({f"{QUERY}.hada_w1_a": torch.full((16, 2), torch.inf)}), "not finite"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_applied_is_refused_by_what_is_wrong_with_it(
    pipeline: StableDiffusionPipeline,
    base: Base,
    tmp_path: Path,
    kind: str,
    change: Callable[[dict[str, torch.Tensor]], object],
    problem: str,
) -> None:
    path = KINDS[kind](base, tmp_path / "adapter.safetensors").path
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    plain = outputs(pipeline)
    with pytest.raises(BestiaryError, match=problem):
        apply_adapter(pipeline, path)
    assert torch.equal(outputs(pipeline), plain)


def test_a_change_that_would_take_terabytes_is_refused_without_computing_it(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    wide = {f"{QUERY}.lokr_w1": torch.ones(2000, 2000), f"{QUERY}.lokr_w2": torch.ones(2000, 2000)}
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(BestiaryError, match="does not have the sizes of its weight"):
        apply_adapter(pipeline, tmp_path / "wide.safetensors")


def test_an_adapter_of_the_whole_attention_keeps_its_ranks_in_its_config(base: Base, tmp_path: Path) -> None:
    path = kohya(base, tmp_path / "adapter.safetensors", (ATTENTION, TEXT), rank=lambda name: 1 + ("to_k" in name)).path
    content = read(path)
    assert (content.config.r, content.config.rank_of("x.to_k")) == (1, 1)
    ranks = {name: rank for name, rank in content.config.rank_pattern.items() if not name.endswith("to_k") or rank != 2}
    assert content.config.rank_pattern
    assert ranks == {}
    assert content.text_config is not None
    assert content.text_config.rank_pattern == {}
    stored = json.loads(json.dumps(content.text_config.stored()))
    assert "rank_pattern" not in stored
