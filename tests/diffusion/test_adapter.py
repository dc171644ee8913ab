import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import build_base

from bestiary.diffusion.adapter import (
    FILE_NAME,
    adapter_sha256,
    apply_adapter,
    inject,
    read_provenance,
    remove,
    save_adapter,
    set_scale,
    verify_adapter,
)
from bestiary.diffusion.base import base_sha256, load_pipeline, load_unet
from bestiary.diffusion.sampling import generate
from bestiary.errors import BestiaryError

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
# Stable Diffusion 1.5's UNet, as its config.json has it.
STABLE_DIFFUSION = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}


def make_adapter(unet: UNet2DConditionModel, folder: Path, seed: int = 0, **config: object) -> Path:
    """An adapter as if trained: no weight of it is zero."""
    options = {"rank": 2, "alpha": 16, "dropout": 0.0, "targets": TARGETS, "seed": seed} | config
    parameters = inject(unet, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return save_adapter(unet, folder, {"base": "models/base", "base_sha256": "of the base", "params": {"rank": 2}})


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(load_unet(base), tmp_path_factory.mktemp("adapter"))


def draw(pipeline: object) -> list[bytes]:
    how = {"steps": 3, "guidance_scale": 3.0, "scheduler": "ddim", "batch_size": 2}
    return [image.tobytes() for image in generate(pipeline, ["a zebra"] * 2, [0, 1], **how)]  # type: ignore[arg-type]


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


def test_a_target_that_the_base_does_not_have_is_a_plain_sentence(base: Path) -> None:
    with pytest.raises(BestiaryError, match="no module 'to_nothing'"):
        inject(load_unet(base), rank=2, alpha=2, dropout=0.0, targets=["to_q", "to_nothing"], seed=0)


@pytest.mark.slow
def test_the_same_adapter_has_the_same_bytes_in_every_process(base: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from test_adapter import load_unet, make_adapter\n"
        "print(make_adapter(load_unet(sys.argv[2]), Path(sys.argv[3])).read_bytes().hex())"
    )
    here = str(Path(__file__).parent)
    runs = [
        subprocess.run(
            [sys.executable, "-c", code, here, str(base), str(tmp_path / seed)],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(filter(None, sys.path))},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]


def test_alpha_and_provenance_survive_saving(adapter: Path) -> None:
    assert read_provenance(adapter) == {"base": "models/base", "base_sha256": "of the base", "params": {"rank": 2}}
    assert adapter_sha256(adapter.parent) == hashlib.sha256(adapter.read_bytes()).hexdigest()


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"use_dora": True}, {"targets": ["to_q", "conv1"]}])
def test_an_adapter_is_verified_against_its_base(base: Path, tmp_path: Path, config: dict[str, object]) -> None:
    path = make_adapter(load_unet(base), tmp_path, **config)
    found = verify_adapter(path, base)
    assert (found.rank, found.alpha, found.keys) == (2, 16, len(load_file(path)))
    assert found.base_is_the_trained_one is False


def test_verification_knows_the_base_it_was_trained_on(base: Path, tmp_path: Path) -> None:
    unet = load_unet(base)
    make_adapter(unet, tmp_path)
    save_adapter(unet, tmp_path, {"base_sha256": base_sha256(base)})
    assert verify_adapter(tmp_path, base).base_is_the_trained_one is True


def test_at_scale_0_the_pictures_are_the_bases_exactly_and_at_1_they_are_not(base: Path, adapter: Path) -> None:
    pipeline = load_pipeline(base, device="cpu")
    plain = draw(pipeline)
    apply_adapter(pipeline, adapter)
    adapted = draw(pipeline)
    assert adapted != plain
    set_scale(pipeline, 0.0)
    assert draw(pipeline) == plain
    apply_adapter(pipeline, adapter.parent)
    assert draw(pipeline) == adapted
    remove(pipeline)
    assert draw(pipeline) == plain


def test_one_adapter_takes_the_place_of_another(base: Path, adapter: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(base, device="cpu")
    apply_adapter(pipeline, adapter)
    expected = draw(pipeline)
    apply_adapter(pipeline, make_adapter(load_unet(base), tmp_path, seed=1, rank=3))
    assert draw(pipeline) != expected
    apply_adapter(pipeline, adapter)
    assert draw(pipeline) == expected


def test_diffusers_itself_loads_the_file_at_the_same_strength(base: Path, adapter: Path) -> None:
    ours, theirs = load_pipeline(base, device="cpu"), load_pipeline(base, device="cpu")
    apply_adapter(ours, adapter)
    theirs.load_lora_weights(adapter.parent)
    assert draw(theirs) == draw(ours)


def test_an_adapter_of_another_base_does_not_fit(adapter: Path, tmp_path: Path) -> None:
    other = build_base(tmp_path / "other", cross_attention_dim=64)
    misfit = r"does not fit the base: .*has the shape \(2, 32\) and needs \(2, 64\); it was trained on models/base"
    with pytest.raises(BestiaryError, match=misfit):
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


def test_a_partial_file_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    partial = change(adapter, tmp_path, drop=2, metadata="lora_adapter_metadata")
    with pytest.raises(BestiaryError, match="it lacks 2 weights, the first is down_blocks"):
        verify_adapter(partial, base)


def test_a_weight_without_a_place_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    foreign = change(adapter, tmp_path, extra="unet.nowhere.lora_A.weight", metadata="lora_adapter_metadata")
    pipeline = load_pipeline(base, device="cpu")
    plain = draw(pipeline)
    with pytest.raises(BestiaryError, match="1 of its 65 weights have no place there, the first is nowhere"):
        apply_adapter(pipeline, foreign)
    assert draw(pipeline) == plain


def test_a_file_without_its_alpha_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match="does not say its rank, alpha and targets"):
        verify_adapter(change(adapter, tmp_path), base)


def test_an_adapter_that_changes_nothing_is_refused(base: Path, tmp_path: Path) -> None:
    unet = load_unet(base)
    inject(unet, rank=2, alpha=16, dropout=0.0, targets=TARGETS, seed=0)
    with pytest.raises(BestiaryError, match="changes nothing"):
        verify_adapter(save_adapter(unet, tmp_path, {}), base)


def test_weights_that_are_no_numbers_are_a_plain_sentence(adapter: Path, tmp_path: Path) -> None:
    weights = load_file(adapter)
    next(iter(weights.values())).view(-1)[0] = torch.nan
    with safe_open(adapter, framework="pt") as file:
        save_file(weights, tmp_path / FILE_NAME, file.metadata())
    with pytest.raises(BestiaryError, match="holds values that are not finite numbers"):
        read_provenance(tmp_path)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.float8_e4m3fn])
def test_weights_that_would_lose_something_are_a_plain_sentence(
    adapter: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    with safe_open(adapter, framework="pt") as file:
        metadata = file.metadata()
    save_file({key: value.to(dtype) for key, value in load_file(adapter).items()}, tmp_path / FILE_NAME, metadata)
    with pytest.raises(BestiaryError, match=rf"lora_A\.weight as {str(dtype)[6:]}: not supported"):
        read_provenance(tmp_path)


def test_weights_too_large_for_the_base_do_not_verify(base: Path, adapter: Path, tmp_path: Path) -> None:
    with safe_open(adapter, framework="pt") as file:
        metadata = file.metadata()
    weights = {key: torch.full_like(value, 1e30) for key, value in load_file(adapter).items()}
    save_file(weights, tmp_path / FILE_NAME, metadata)
    with pytest.raises(BestiaryError, match="gives values that are not finite numbers"):
        verify_adapter(tmp_path, base)
    pipeline = load_pipeline(base, device="cpu")
    apply_adapter(pipeline, tmp_path)
    with pytest.raises(BestiaryError, match="The adapter draws pictures that are not finite numbers"):
        draw(pipeline)


def test_a_missing_or_pickled_file_is_a_plain_sentence(base: Path, tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match="There is no adapter at"):
        verify_adapter(tmp_path, base)
    torch.save({"lora": torch.zeros(2)}, tmp_path / FILE_NAME)
    with pytest.raises(BestiaryError, match="not a readable safetensors file"):
        verify_adapter(tmp_path, base)


def with_config(adapter: Path, folder: Path, **fields: object) -> Path:
    with safe_open(adapter, framework="pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata["lora_adapter_metadata"]) | {f"unet.{key}": value for key, value in fields.items()}
    save_file(load_file(adapter), folder / FILE_NAME, metadata | {"lora_adapter_metadata": json.dumps(config)})
    return folder


@pytest.mark.parametrize("field", [{"bogus": 1}, {"bias": "weird"}, {"init_lora_weights": "nonsense"}])
def test_a_field_that_decides_nothing_is_passed_over(
    base: Path, adapter: Path, tmp_path: Path, field: dict[str, object]
) -> None:
    assert verify_adapter(with_config(adapter, tmp_path, **field), base).rank == 2


def test_what_would_be_applied_otherwise_than_it_says_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    uneven = with_config(adapter, tmp_path, alpha_pattern={"to_q": 3})
    with pytest.raises(BestiaryError, match="different ranks or alphas"):
        verify_adapter(uneven, base)
    save_file({}, tmp_path / FILE_NAME, {"lora_adapter_metadata": json.dumps(
        {"unet.r": 2, "unet.lora_alpha": 1, "unet.target_modules": ["nothing"]}
    )})  # fmt: skip
    with pytest.raises(BestiaryError, match="holds no LoRA weights"):
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
def test_a_header_that_somebody_tampered_with_is_a_plain_sentence(tmp_path: Path, key: str, content: str) -> None:
    save_file({"unet.x": torch.zeros(1)}, tmp_path / FILE_NAME, {key: content})
    with pytest.raises(BestiaryError, match="has a broken config"):
        read_provenance(tmp_path)
