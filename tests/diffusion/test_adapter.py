import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.adapters import ALL_LAYERS, PROVENANCE, TARGETS, make_adapter
from support.tiny import build_base

from bestiary.diffusion.adapter import (
    adapter_sha256,
    apply_adapter,
    apply_adapters,
    inject,
    read_provenance,
    remove,
    save_adapter,
    set_weight,
    set_weights,
    verify_adapter,
)
from bestiary.diffusion.adapter_format import FILE_NAME, Provenance
from bestiary.diffusion.adapter_reading import read_adapter
from bestiary.diffusion.base import base_sha256, load_pipeline, load_unet
from bestiary.diffusion.sampling import generate
from bestiary.errors import BestiaryError
from bestiary.samplers import Sampling

# Stable Diffusion 1.5's UNet, as its config.json has it.
STABLE_DIFFUSION = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(load_unet(base), tmp_path_factory.mktemp("adapter"))


def draw(pipeline: object) -> list[bytes]:
    sampling = Sampling("ddim", steps=3, guidance_scale=3.0)
    return [image.tobytes() for image in generate(pipeline, ["a zebra"] * 2, [0, 1], sampling, batch_size=2)]


def test_rank_2_on_stable_diffusion_has_398592_trainable_parameters() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**STABLE_DIFFUSION)
        parameters = inject(unet, rank=2, alpha=16, dropout=0.0, targets=TARGETS, seed=0)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964 + 398_592
    assert sum(parameter.numel() for parameter in parameters) == 398_592


def test_a_fresh_adapter_changes_nothing_and_trains_in_float32(base: Path) -> None:
    unet = load_unet(base)
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 32)
    before = unet(latents, 10, text).sample
    inject(unet, rank=2, alpha=16, dropout=0.0, targets=TARGETS, seed=0)
    assert torch.equal(unet(latents, 10, text).sample, before)
    parameters = inject(load_unet(base, dtype=torch.bfloat16), rank=2, alpha=2, dropout=0.0, targets=TARGETS, seed=0)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}


def test_a_target_that_the_base_does_not_have_is_named(base: Path) -> None:
    with pytest.raises(BestiaryError, match="no module 'to_nothing'"):
        inject(load_unet(base), rank=2, alpha=2, dropout=0.0, targets=["to_q", "to_nothing"], seed=0)


@pytest.mark.slow
def test_the_same_adapter_has_the_same_bytes_in_every_process(base: Path, tmp_path: Path) -> None:
    files = []
    for hash_seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-m", "support.adapters", str(base), str(tmp_path / hash_seed)],
            env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            check=True,
        )
        files.append((tmp_path / hash_seed / FILE_NAME).read_bytes())
    assert files[0] == files[1]


def test_alpha_and_provenance_survive_saving(base: Path, adapter: Path) -> None:
    assert read_provenance(adapter) == PROVENANCE
    assert verify_adapter(adapter, base).alpha == 16
    assert adapter_sha256(adapter.parent) == hashlib.sha256(adapter.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"targets": ALL_LAYERS},
        {"targets": ALL_LAYERS, "use_dora": True},
    ],
)
def test_an_adapter_is_verified_against_its_base(base: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    path = make_adapter(load_unet(base), tmp_path, **config)
    found = verify_adapter(path, base)
    assert (found.rank, found.alpha, found.keys) == (2, 16, len(load_file(path)))
    assert found.base_is_the_trained_one is False


def test_verification_recognizes_the_base_that_the_adapter_was_trained_on(base: Path, tmp_path: Path) -> None:
    unet = load_unet(base)
    make_adapter(unet, tmp_path)
    save_adapter(unet, tmp_path, Provenance(base_sha256=base_sha256(base)))
    assert verify_adapter(tmp_path, base).base_is_the_trained_one is True


def test_weight_0_draws_exactly_the_pictures_of_the_base_and_weight_1_does_not(base: Path, adapter: Path) -> None:
    pipeline = load_pipeline(base, device="cpu")
    plain = draw(pipeline)
    apply_adapter(pipeline, adapter)
    adapted = draw(pipeline)
    assert adapted != plain
    set_weight(pipeline, 0.0)
    assert draw(pipeline) == plain
    apply_adapter(pipeline, adapter.parent)
    assert draw(pipeline) == adapted
    remove(pipeline)
    assert draw(pipeline) == plain


@torch.inference_mode()
def output_of(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    """The UNet's output for one fixed input."""
    config, generator = pipeline.unet.config, torch.Generator().manual_seed(0)
    latents = torch.randn(1, config.in_channels, config.sample_size, config.sample_size, generator=generator)
    text = torch.randn(1, 4, config.cross_attention_dim, generator=generator)
    output: torch.Tensor = pipeline.unet(
        latents.to(pipeline.unet.dtype), torch.tensor([500]), text.to(pipeline.unet.dtype)
    ).sample
    return output


def test_several_adapters_add_up_by_their_weights(base: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(base, device="cpu")
    first = make_adapter(load_unet(base), tmp_path / "first")
    second = make_adapter(load_unet(base), tmp_path / "second", seed=1, rank=3, targets=["to_q", "conv1"])
    plain = output_of(pipeline)
    apply_adapter(pipeline, first)
    alone = output_of(pipeline)
    apply_adapters(pipeline, [first, second], [1, 0])
    assert torch.equal(output_of(pipeline), alone)
    set_weights(pipeline, [0, 0])
    assert torch.equal(output_of(pipeline), plain)
    set_weights(pipeline, [0.7, 0.5])
    pipeline.unet.double()
    both = output_of(pipeline)
    remove(pipeline)
    for path, weight in ((first, 0.7), (second, 0.5)):  # by hand: W + weight * alpha / rank * B A
        content = read_adapter(path)
        for key in (key for key in content.weights if "lora_A" in key):
            down, up = content.weights[key], content.weights[key.replace("lora_A", "lora_B")]
            module = pipeline.unet.get_submodule(key.removesuffix(".lora_A.weight"))
            delta = up.double().flatten(1) @ down.double().flatten(1) * content.config.lora_alpha / content.config.r
            module.weight.data += weight * delta.reshape(module.weight.shape)
    torch.testing.assert_close(both, output_of(pipeline), rtol=0, atol=1e-10)


def test_an_adapter_that_does_not_fit_beside_another_leaves_the_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(base, device="cpu")
    plain = output_of(pipeline)
    content = read_adapter(adapter)
    weights = {key: value[..., :-1] if "lora_A" in key else value for key, value in content.weights.items()}
    (tmp_path / "misfit.safetensors").write_bytes(replace(content, weights=weights).to_bytes())
    with pytest.raises(BestiaryError, match=r"misfit\.safetensors does not fit the base"):
        apply_adapters(pipeline, [adapter, tmp_path / "misfit.safetensors"], [1, 1])
    assert torch.equal(output_of(pipeline), plain)


def test_applying_an_adapter_replaces_the_previous_one(base: Path, adapter: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(base, device="cpu")
    apply_adapter(pipeline, adapter)
    expected = draw(pipeline)
    apply_adapter(pipeline, make_adapter(load_unet(base), tmp_path, seed=1, rank=3))
    assert draw(pipeline) != expected
    apply_adapter(pipeline, adapter)
    assert draw(pipeline) == expected


def test_diffusers_own_loader_applies_the_file_with_the_same_weight(base: Path, adapter: Path) -> None:
    ours, theirs = load_pipeline(base, device="cpu"), load_pipeline(base, device="cpu")
    apply_adapter(ours, adapter)
    theirs.load_lora_weights(adapter.parent)
    assert draw(theirs) == draw(ours)


def test_an_adapter_of_another_base_does_not_fit(adapter: Path, tmp_path: Path) -> None:
    other = build_base(tmp_path / "other", cross_attention_dim=64)
    with pytest.raises(BestiaryError, match=r"\(2, 32\) instead of \(2, 64\); .*models/base"):
        verify_adapter(adapter, other)


def change(
    adapter: Path, folder: Path, *, drop: int = 0, extra: str | None = None, metadata: str | None = None
) -> Path:
    weights = load_file(adapter)
    for key in sorted(weights)[:drop]:
        weights.pop(key)
    if extra:
        weights[extra] = torch.zeros(2, 2)
    length = int.from_bytes(adapter.read_bytes()[:8], "little")
    kept = json.loads(adapter.read_bytes()[8 : 8 + length])["__metadata__"]
    save_file(weights, folder / FILE_NAME, {"format": "pt", metadata: kept[metadata]} if metadata else {"format": "pt"})
    return folder


def test_a_partial_file_is_rejected(base: Path, adapter: Path, tmp_path: Path) -> None:
    partial = change(adapter, tmp_path, drop=2, metadata="lora_adapter_metadata")
    with pytest.raises(BestiaryError, match=r"lacks 2 weights, .* down_blocks"):
        verify_adapter(partial, base)


def test_a_weight_that_matches_no_module_is_rejected(base: Path, adapter: Path, tmp_path: Path) -> None:
    foreign = change(adapter, tmp_path, extra="unet.nowhere.lora_A.weight", metadata="lora_adapter_metadata")
    pipeline = load_pipeline(base, device="cpu")
    plain = draw(pipeline)
    with pytest.raises(BestiaryError, match=r"more than an adapter of the UNet and the text encoder.*nowhere"):
        apply_adapter(pipeline, foreign)
    assert draw(pipeline) == plain


def test_a_file_without_its_alpha_is_rejected(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match=r"does not store its alpha.*--alpha"):
        verify_adapter(change(adapter, tmp_path), base)


def test_an_adapter_that_changes_nothing_is_rejected(base: Path, tmp_path: Path) -> None:
    unet = load_unet(base)
    inject(unet, rank=2, alpha=16, dropout=0.0, targets=TARGETS, seed=0)
    with pytest.raises(BestiaryError, match=f"{tmp_path}.* has no effect"):
        verify_adapter(save_adapter(unet, tmp_path, Provenance()), base)


def test_weights_that_are_not_finite_are_rejected(adapter: Path, tmp_path: Path) -> None:
    weights = load_file(adapter)
    next(iter(weights.values())).view(-1)[0] = torch.nan
    with safe_open(adapter, framework="pt") as file:
        save_file(weights, tmp_path / FILE_NAME, file.metadata())
    with pytest.raises(BestiaryError, match=r"not finite numbers: .*lora_"):
        read_provenance(tmp_path)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.float8_e4m3fn])
def test_weights_of_a_type_that_would_lose_precision_are_rejected(
    adapter: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    with safe_open(adapter, framework="pt") as file:
        metadata = file.metadata()
    save_file({key: value.to(dtype) for key, value in load_file(adapter).items()}, tmp_path / FILE_NAME, metadata)
    with pytest.raises(BestiaryError, match=rf"lora_A\.weight as {str(dtype)[6:]}"):
        read_provenance(tmp_path)


def test_weights_that_overflow_in_the_base_do_not_verify(base: Path, adapter: Path, tmp_path: Path) -> None:
    with safe_open(adapter, framework="pt") as file:
        metadata = file.metadata()
    weights = {key: torch.full_like(value, 1e30) for key, value in load_file(adapter).items()}
    save_file(weights, tmp_path / FILE_NAME, metadata)
    with pytest.raises(BestiaryError, match=f"{tmp_path} .* not finite"):
        verify_adapter(tmp_path, base)
    pipeline = load_pipeline(base, device="cpu")
    apply_adapter(pipeline, tmp_path)
    with pytest.raises(BestiaryError, match="not finite"):
        draw(pipeline)


def test_a_missing_or_pickled_file_is_rejected(base: Path, tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match=f"no adapter at {tmp_path}"):
        verify_adapter(tmp_path, base)
    torch.save({"lora": torch.zeros(2)}, tmp_path / FILE_NAME)
    with pytest.raises(BestiaryError, match=FILE_NAME):
        verify_adapter(tmp_path, base)


def with_config(adapter: Path, folder: Path, **fields: object) -> Path:
    with safe_open(adapter, framework="pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata["lora_adapter_metadata"]) | {f"unet.{key}": value for key, value in fields.items()}
    save_file(load_file(adapter), folder / FILE_NAME, metadata | {"lora_adapter_metadata": json.dumps(config)})
    return folder


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bogus", 1),
        ("bias", "all"),
        ("lora_bias", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("fan_in_fan_out", True),
        ("modules_to_save", ["conv_in"]),
        ("use_qalora", True),
        ("peft_type", "LOHA"),
    ],
)
def test_a_field_of_the_config_that_may_change_the_effect_is_refused_by_name(
    adapter: Path, tmp_path: Path, field: str, value: object
) -> None:
    with pytest.raises(
        BestiaryError, match=rf"{FILE_NAME} sets {field} to .*{value if isinstance(value, str) else ''}"
    ):
        read_provenance(with_config(adapter, tmp_path, **{field: value}))


def test_the_fields_that_peft_writes_for_an_ordinary_adapter_are_accepted(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig

    ordinary = LoraConfig(r=2, lora_alpha=16, target_modules=TARGETS, lora_dropout=0.1, init_lora_weights="gaussian")
    fields = {key: sorted(value) if isinstance(value, set) else value for key, value in ordinary.to_dict().items()}
    fields |= {"layers_pattern": None, "runtime_config": {"ephemeral_gpu_offload": False}, "a_later_field": False}
    assert verify_adapter(with_config(adapter, tmp_path, **fields), base).alpha == 16


def test_a_config_that_cannot_be_applied_as_stored_is_rejected(base: Path, adapter: Path, tmp_path: Path) -> None:
    for pattern in ("(a+)+x", ".*to_q"):  # the first would take for ever to match
        uneven = with_config(adapter, tmp_path, alpha_pattern={pattern: 3})
        with pytest.raises(BestiaryError, match=r"alpha_pattern by the regular expression"):
            verify_adapter(uneven, base)
    save_file({}, tmp_path / FILE_NAME, {"lora_adapter_metadata": json.dumps(
        {"unet.r": 2, "unet.lora_alpha": 1, "unet.target_modules": ["nothing"]}
    )})  # fmt: skip
    with pytest.raises(BestiaryError, match="no LoRA weights"):
        verify_adapter(tmp_path, base)


@pytest.mark.parametrize(
    ("key", "content"),
    [
        ("lora_adapter_metadata", "[]"),
        ("lora_adapter_metadata", '{"unet.r": "2", "unet.lora_alpha": 1, "unet.target_modules": []}'),
        ("lora_adapter_metadata", '{"unet.r": 2, "unet.lora_alpha": NaN, "unet.target_modules": []}'),
        ("lora_adapter_metadata", '{"unet.r": 2, "unet.lora_alpha": 1, "unet.target_modules": [1]}'),
        (
            "lora_adapter_metadata",
            '{"unet.r": 2, "unet.lora_alpha": 1, "unet.target_modules": [], "unet.use_rslora": "no"}',
        ),
        (
            "lora_adapter_metadata",
            '{"unet.r": 2, "unet.lora_alpha": 1, "unet.target_modules": [], "unet.lora_dropout": "x"}',
        ),
        (
            "lora_adapter_metadata",
            '{"unet.r": 2, "unet.lora_alpha": 1, "unet.target_modules": [], "unet.lora_dropout": 5}',
        ),
        ("lora_adapter_metadata", '{"unet.r": 0, "unet.lora_alpha": 1, "unet.target_modules": []}'),
        ("lora_adapter_metadata", '{"a":' + "[" * 200_000),
        ("lora_adapter_metadata", f'{{"unet.r": 2, "unet.lora_alpha": 1{"0" * 400}, "unet.target_modules": []}}'),
        ("lora_adapter_metadata", f'{{"unet.r": 2{"0" * 5000}, "unet.lora_alpha": 1, "unet.target_modules": []}}'),
        ("bestiary", "null"),
        ("bestiary", '{"base": 1}'),
        ("bestiary", '{"base": "\\ud800"}'),
    ],
)
def test_a_header_that_was_tampered_with_is_rejected(tmp_path: Path, key: str, content: str) -> None:
    save_file({"unet.x": torch.zeros(1)}, tmp_path / FILE_NAME, {key: content})
    with pytest.raises(BestiaryError, match=f"{FILE_NAME} .*broken config"):
        read_provenance(tmp_path)


def with_header(folder: Path, metadata: dict[str, str], tensors: dict[str, object] | None = None) -> Path:
    """A file with this header and one stored number."""
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"__metadata__": metadata, **(tensors or {"unet.x": one})}).encode()
    header += b" " * (-len(header) % 8)
    (folder / FILE_NAME).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    return folder


MANY_TENSORS = {
    f"unet.{number}": {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]} for number in range(50_000)
} | {"unet.x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}


@pytest.mark.parametrize(
    ("metadata", "tensors", "limit"),
    [
        ({"lora_adapter_metadata": json.dumps({"unet.target_modules": ["x"] * 1_000_000})}, None, "1 MiB"),
        ({"lora_adapter_metadata": json.dumps({"unet.target_modules": ["x"] * 100_000})}, None, "100,000, .*2,000"),
        ({"bestiary": '{"a": [' + "[]," * 700_000 + "[]]}"}, None, "bestiary .*1 MiB"),
        ({"bestiary": '{"a": [' + "[]," * 16_000_000 + "[]]}"}, None, "header of 46 MiB .*8 MiB"),
        ({"bestiary": '{"params": {"a": ' + "[" * 200 + "]" * 200 + "}}"}, None, "nesting of bestiary .*32 levels"),
        ({"bestiary_config": json.dumps({"a": "x" * 2**20})}, None, "bestiary_config .*1 MiB"),
        ({"ss_tag_frequency": "x" * 20 * 2**20}, None, "header of 20 MiB .*8 MiB"),
        ({}, MANY_TENSORS, "50,001, .*20,000"),
        ({}, {"unet." + "x" * 600: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "500 characters"),
        ({"bestiary": json.dumps({"base": "x" * 5000})}, None, "base: .*at most 1000"),
    ],
)
def test_a_file_larger_than_any_adapter_is_refused_at_once_naming_the_limit(
    tmp_path: Path, metadata: dict[str, str], tensors: dict[str, object] | None, limit: str
) -> None:
    path = with_header(tmp_path, metadata, tensors)
    started = time.process_time()
    with pytest.raises(BestiaryError, match=limit):
        read_provenance(path)
    assert time.process_time() - started < 1


def test_metadata_as_large_as_kohyas_table_of_tags_is_no_obstacle(adapter: Path, tmp_path: Path) -> None:
    with safe_open(adapter, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(adapter), tmp_path / FILE_NAME, metadata | {"ss_tag_frequency": "x" * 3_000_000})
    assert read_provenance(tmp_path) == PROVENANCE


def test_control_characters_from_a_file_are_shown_as_escapes(tmp_path: Path) -> None:
    path = with_header(tmp_path, {"lora_adapter_metadata": json.dumps({"unet.\x1b]0;owned\x07\u202e": 1})})
    with pytest.raises(BestiaryError, match=r"\\x1b]0;owned\\x07\\u202e") as raised:
        read_provenance(path)
    assert str(raised.value).isprintable()


def test_a_name_too_long_for_any_file_is_no_adapter() -> None:
    with pytest.raises(BestiaryError, match=r"no adapter at x{100}"):
        read_provenance("x" * 5000)
