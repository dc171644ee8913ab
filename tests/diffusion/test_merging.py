from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.adapters import ALL_LAYERS, PROVENANCE, TARGETS, make_adapter
from support.tiny import build_base

from bestiary.diffusion.adapter import adapter_sha256, apply_adapters, save_adapter
from bestiary.diffusion.adapter_format import DOWN, FILE_NAME, UP, AdapterConfig, Provenance
from bestiary.diffusion.adapter_reading import read_adapter
from bestiary.diffusion.base import load_pipeline, load_unet
from bestiary.diffusion.merging import Parent, merge, write_verified
from bestiary.errors import BestiaryError
from bestiary.samplers import Sampling


@pytest.fixture(scope="module")
def parents(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Parent]:
    """Three adapters of different ranks, layers and scalings."""
    folder = tmp_path_factory.mktemp("parents")
    files = [
        make_adapter(load_unet(base), folder / "a", rank=2),
        make_adapter(load_unet(base), folder / "b", seed=1, rank=3, targets=[*TARGETS, "conv1"], use_rslora=True),
        make_adapter(load_unet(base), folder / "c", seed=2, rank=4, targets=ALL_LAYERS),
    ]
    for file in files:  # as strong as trained ones: a stronger change multiplies every rounding
        content = read_adapter(file)
        weights = {key: value * 0.1 if key.endswith(UP) else value for key, value in content.weights.items()}
        file.write_bytes(replace(content, weights=weights).to_bytes())
    return [Parent(name, file, weight) for name, file, weight in zip("abc", files, (0.7, 0.5, 1.3), strict=True)]


def output_of(base: Path, files: Sequence[Path], weights: Sequence[float]) -> torch.Tensor:
    """The UNet's output in float64 with these adapters."""
    pipeline = load_pipeline(base, device="cpu")
    apply_adapters(pipeline, files, weights)
    unet, generator = pipeline.unet.double(), torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator).double()
    with torch.inference_mode():
        sample: torch.Tensor = unet(latents, torch.tensor([500]), torch.randn(1, 4, 32, generator=generator).double())[
            0
        ]
    return sample


def test_the_exact_merge_equals_the_adapters_together(base: Path, parents: list[Parent], tmp_path: Path) -> None:
    merged = merge(parents)
    assert (merged.error, merged.content.config.r) == (0.0, 9)
    file = tmp_path / "out" / FILE_NAME
    proof = write_verified(merged, file, str(base), None)
    together = output_of(base, [parent.file for parent in parents], [parent.weight for parent in parents])
    alone = output_of(base, [file], [1.0])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    assert (proof.rank, proof.alpha) == (9, 9)


def test_text_encoders_and_ranks_that_differ_by_module_are_merged_too(
    base: Path, parents: list[Parent], tmp_path: Path
) -> None:
    content = read_adapter(parents[0].file)
    module = "text_model.encoder.layers.0.self_attn.q_proj"
    generator = torch.Generator().manual_seed(0)
    text = {
        f"{module}{DOWN}": torch.randn(3, 32, generator=generator),
        f"{module}{UP}": torch.randn(32, 3, generator=generator) * 0.01,
    }
    config = AdapterConfig(r=3, lora_alpha=6, target_modules=[module])
    first = next(key.removesuffix(DOWN) for key in content.weights if key.endswith(DOWN))
    weights = {**content.weights, f"{first}{DOWN}": content.weights[f"{first}{DOWN}"][:1]}
    weights[f"{first}{UP}"] = content.weights[f"{first}{UP}"][:, :1]
    uneven = content.config.model_copy(update={"rank_pattern": {first: 1}, "alpha_pattern": {first: 4}})
    mixed = replace(content, weights=weights, config=uneven, text_weights=text, text_config=config)
    (tmp_path / "mixed.safetensors").write_bytes(mixed.to_bytes())
    both = [Parent("mixed", tmp_path / "mixed.safetensors", 0.5), parents[1]]
    file = tmp_path / "out" / FILE_NAME
    write_verified(merge(both), file, str(base), None)
    merged = read_adapter(file)
    change = merged.text_weights[f"{module}{UP}"] @ merged.text_weights[f"{module}{DOWN}"]
    torch.testing.assert_close(change, 0.5 * 6 / 3 * text[f"{module}{UP}"] @ text[f"{module}{DOWN}"])
    together = output_of(base, [parent.file for parent in both], [parent.weight for parent in both])
    torch.testing.assert_close(output_of(base, [file], [1.0]), together, rtol=0, atol=1e-5)


def test_a_merge_names_its_base_and_its_parents(parents: list[Parent]) -> None:
    provenance = merge(parents[:2]).content.provenance
    assert (provenance.base, provenance.base_sha256) == (PROVENANCE.base, PROVENANCE.base_sha256)
    assert provenance.model_extra == {
        "merged_from": [
            {"adapter": "a", "adapter_sha256": adapter_sha256(parents[0].file), "weight": 0.7},
            {"adapter": "b", "adapter_sha256": adapter_sha256(parents[1].file), "weight": 0.5},
        ],
        "merged_by": "concatenation",
    }


def test_a_merge_with_a_few_step_adapter_is_drawn_at_its_timesteps(parents: list[Parent], tmp_path: Path) -> None:
    sampling = Sampling("lcm", steps=2, guidance_scale=1.0, timesteps=(999, 399))
    few_step = tmp_path / FILE_NAME
    few_step.write_bytes(replace(read_adapter(parents[1].file), few_step=sampling).to_bytes())
    assert merge([parents[0], Parent("few", few_step)]).content.few_step == sampling
    assert merge(parents).content.few_step is None


def test_the_same_merge_has_the_same_bytes(parents: list[Parent]) -> None:
    assert merge(parents, 3).content.to_bytes() == merge(parents, 3).content.to_bytes()


def test_a_lower_rank_is_the_best_one_and_its_error_is_right(parents: list[Parent]) -> None:
    exact, merged = merge(parents), merge(parents, 2)
    lost = whole = largest = 0.0
    for key in (key for key in exact.content.weights if "lora_A" in key):
        up = key.replace("lora_A", "lora_B")
        change, kept = (
            (adapter.content.weights[up].double().flatten(1) @ adapter.content.weights[key].double().flatten(1))
            for adapter in (exact, merged)
        )
        singular = torch.linalg.svdvals(change)
        torch.testing.assert_close((change - kept).norm(), singular[2:].norm(), rtol=1e-5, atol=1e-5)
        lost, whole = lost + float((change - kept).square().sum()), whole + float(change.square().sum())
        largest = max(largest, float((change - kept).norm() / change.norm()))
    assert merged.error == pytest.approx((lost / whole) ** 0.5, rel=1e-5)
    assert merged.largest_error == pytest.approx(largest, rel=1e-5)
    assert merged.content.config.r == 2
    assert merged.content.provenance.model_extra is not None
    assert merged.content.provenance.model_extra["relative_error"] == merged.error


def test_a_merge_of_an_adapter_with_itself_has_no_error_at_its_own_rank(base: Path, parents: list[Parent]) -> None:
    merged = merge([parents[0], parents[0]], 2)
    assert merged.error < 1e-7


def test_a_higher_rank_than_the_exact_one_is_refused(parents: list[Parent]) -> None:
    with pytest.raises(BestiaryError, match=r"--rank 5 is not below 5, the rank without a loss"):
        merge(parents[:2], 5)


def test_a_dora_a_weight_of_0_and_another_base_are_refused(base: Path, parents: list[Parent], tmp_path: Path) -> None:
    dora = Parent("dora", make_adapter(load_unet(base), tmp_path / "dora", use_dora=True))
    with pytest.raises(BestiaryError, match="dora holds DoRA"):
        merge([parents[0], dora])
    with pytest.raises(BestiaryError, match="b has weight 0"):
        merge([parents[0], Parent("b", parents[1].file, 0.0)])
    unet = load_unet(base)
    make_adapter(unet, tmp_path)
    elsewhere = Parent("elsewhere", save_adapter(unet, tmp_path, Provenance(base_sha256="of another base")))
    with pytest.raises(BestiaryError, match="a and elsewhere were trained on different bases"):
        merge([parents[0], elsewhere])


def test_a_merge_that_does_not_apply_is_not_written(parents: list[Parent], tmp_path: Path) -> None:
    other = build_base(tmp_path / "other", cross_attention_dim=64)
    with pytest.raises(BestiaryError, match="does not fit the base"):
        write_verified(merge(parents), tmp_path / "out.safetensors", str(other), None)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_parent_is_never_overwritten(base: Path, parents: list[Parent]) -> None:
    before = parents[0].file.read_bytes()
    with pytest.raises(BestiaryError, match="exists and would be overwritten"):
        write_verified(merge(parents), parents[0].file, str(base), None)
    assert parents[0].file.read_bytes() == before
    assert read_adapter(parents[0].file).config.r == 2


def test_another_adapter_is_never_overwritten_and_no_error_names_a_temporary_file(
    base: Path, parents: list[Parent], tmp_path: Path
) -> None:
    forgotten = tmp_path / "c.safetensors"  # the last adapter to merge, where OUT was forgotten
    forgotten.write_bytes(parents[2].file.read_bytes())
    with pytest.raises(BestiaryError, match=r"c\.safetensors exists and would be overwritten"):
        write_verified(merge(parents[:2]), forgotten, str(base), None)
    assert forgotten.read_bytes() == parents[2].file.read_bytes()
    for _ in range(2):  # the same merge again changes nothing
        write_verified(merge(parents), tmp_path / "out.safetensors", str(base), None)
    other = build_base(tmp_path / "other", cross_attention_dim=64)
    with pytest.raises(BestiaryError, match=f"^The adapter {tmp_path / 'new.safetensors'} does not fit the base"):
        write_verified(merge(parents), tmp_path / "new.safetensors", str(other), None)
