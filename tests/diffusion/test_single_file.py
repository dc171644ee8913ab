import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from support.single_file import write_single_file
from transformers import CLIPTextConfig, CLIPTextModel

from bestiary.diffusion import base as bases
from bestiary.diffusion import single_file
from bestiary.diffusion.base import base_commit, base_sha256, load_pipeline, size_factors
from bestiary.diffusion.sampling import generate
from bestiary.errors import BestiaryError
from bestiary.generation import named_base, portable_base
from bestiary.samplers import Sampling

TINY = {
    "unet": {"block_out_channels": [8, 8, 16, 16], "cross_attention_dim": 16, "attention_head_dim": 2,
             "norm_num_groups": 4, "sample_size": 8},
    "vae": {"block_out_channels": [4, 4, 8, 8], "norm_num_groups": 2, "sample_size": 64},
    "text_encoder": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configs of Stable Diffusion 1.5 with other widths: the layout is the same."""
    folder = tmp_path_factory.mktemp("configs") / "tiny"
    shutil.copytree(single_file.CONFIGS, folder)
    for part, changes in TINY.items():
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.fixture(scope="module")
def original(configs: Path) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    text = CLIPTextModel(CLIPTextConfig.from_pretrained(configs / "text_encoder"))
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(AutoencoderKL.load_config(configs / "vae")),
        text_encoder=text.eval(),
        tokenizer=single_file.clip_tokenizer(),
        unet=UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(configs / "unet")).eval(),
        scheduler=PNDMScheduler.from_pretrained(configs / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.vae.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def checkpoint(original: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(original, tmp_path_factory.mktemp("models") / "tiny.safetensors")


@pytest.fixture
def tiny(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "CONFIGS", configs)


def changed(checkpoint: Path, folder: Path, rename: dict[str, str], drop: str = "-") -> Path:
    """A copy of the checkpoint with other names, and without those that begin with `drop`."""
    weights: dict[str, Any] = {}
    for name, value in load_file(checkpoint).items():
        for before, after in rename.items():
            name = name.replace(before, after)
        if not name.startswith(drop):
            weights[name] = value
    save_file(weights, folder / "changed.safetensors")
    return folder / "changed.safetensors"


@pytest.mark.usefixtures("tiny")
def test_a_single_file_draws_what_the_same_weights_draw_in_a_folder(
    original: StableDiffusionPipeline, checkpoint: Path
) -> None:
    loaded = load_pipeline(checkpoint, device="cpu")
    for part in ("unet", "vae", "text_encoder"):
        expected, found = getattr(original, part).state_dict(), getattr(loaded, part).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    sampling = Sampling("ddim", steps=2, guidance_scale=3.0)
    ours, theirs = (generate(each, ["a zebra"], [0], sampling, batch_size=1)[0] for each in (loaded, original))
    assert ours.tobytes() == theirs.tobytes()
    assert ours.size == (64, 64)


@pytest.mark.usefixtures("tiny")
def test_the_older_names_of_a_vae_and_half_precision_are_read(
    original: StableDiffusionPipeline, checkpoint: Path, tmp_path: Path
) -> None:
    other = changed(checkpoint, tmp_path, {"first_stage_model.": "vae."})
    vae = bases.load_vae(other, dtype=torch.float16)
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float16}
    half = write_single_file(original, tmp_path / "half.safetensors", torch.float16)
    unet = bases.load_unet(half)
    expected = original.unet.state_dict()
    assert all(torch.equal(value, expected[name].half().float()) for name, value in unet.state_dict().items())


def test_the_layout_is_that_of_stable_diffusion() -> None:
    config = json.loads((single_file.CONFIGS / "unet" / "config.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        vae = AutoencoderKL.from_config(json.loads((single_file.CONFIGS / "vae" / "config.json").read_text()))
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(single_file.CONFIGS / "text_encoder"))
    counts = [sum(each.numel() for each in part.parameters()) for part in (unet, vae, text)]
    assert counts == [859_520_964, 83_653_863, 123_060_480]


def test_the_tokenizer_is_clips() -> None:
    tokenizer = single_file.clip_tokenizer()
    assert len(tokenizer) == 49_408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = tokenizer(["Hello, WORLD!"], padding="max_length", max_length=77).input_ids[0]
    assert padded[:6] == [49406, 3306, 267, 1002, 256, 49407]
    assert padded[6:] == [49407] * 71


def test_a_single_file_is_known_by_its_own_hash_and_read_without_the_hub(
    checkpoint: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    import hashlib

    assert base_sha256(checkpoint) == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert base_commit(checkpoint) is None
    assert size_factors(checkpoint) == (8, 64)
    inside = project / "models" / "mine.safetensors"
    inside.parent.mkdir()
    inside.symlink_to(checkpoint)
    assert portable_base(str(inside)) == "./models/mine.safetensors"
    monkeypatch.chdir(project)
    found = named_base("models/mine.safetensors")
    assert found is not None
    assert found.model == str(checkpoint)
    with pytest.raises(BestiaryError, match=r"no\.safetensors does not exist here"):
        named_base("no.safetensors")


@pytest.mark.parametrize("name", ["v1-5.ckpt", "model.bin"])
def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02")
    with pytest.raises(BestiaryError, match=rf"{name} is a pickle, .* docs/drawing\.md"):
        named_base(str(tmp_path / name))
    with pytest.raises(BestiaryError, match="is a pickle"):
        load_pipeline(tmp_path / name)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("rename", "drop", "words"),
    [
        ({"cond_stage_model.transformer": "conditioner.embedders.0.transformer"}, "-", "is SDXL"),
        ({"cond_stage_model.transformer": "cond_stage_model.model"}, "-", r"is Stable Diffusion 2\.x"),
        ({}, "first_stage_model.", "holds no vae"),
        ({"model.diffusion_model": "lora_unet", "first_stage": "x", "cond_": "y"}, "-", r"use it with --adapter"),
        ({}, "model.diffusion_model.middle_block", r"is broken: its unet does not load"),
    ],
)
def test_what_is_no_whole_checkpoint_of_stable_diffusion_1_is_named(
    checkpoint: Path, tmp_path: Path, rename: dict[str, str], drop: str, words: str
) -> None:
    with pytest.raises(BestiaryError, match=rf"changed\.safetensors .*{words}"):
        load_pipeline(changed(checkpoint, tmp_path, rename, drop))


def test_a_checkpoint_for_inpainting_and_a_broken_file_are_named(tmp_path: Path) -> None:
    names = ("cond_stage_model.transformer.x", "first_stage_model.x")
    first = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1, 9, 1, 1)}
    save_file({**first, **{name: torch.zeros(1) for name in names}}, tmp_path / "inpainting.safetensors")
    with pytest.raises(BestiaryError, match=r"inpainting or editing \(9 input channels\)"):
        bases.load_unet(tmp_path / "inpainting.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(BestiaryError, match=r"broken\.safetensors is not a readable safetensors file"):
        bases.load_unet(tmp_path / "broken.safetensors")
