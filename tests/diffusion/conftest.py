import json
import string
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from bestiary.diffusion.latents import LatentCache, encode_images

CLASSES = ("antelope", "ladybugs", "zebra")


def build_base(folder: Path, prediction_type: str = "epsilon", cross_attention_dim: int = 32) -> Path:
    """A base with every part of Stable Diffusion, tiny, with random weights: 32 x 32 pixels, 4 x 8 x 8 latents."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    letters = [*string.ascii_lowercase, *string.digits, ".", ","]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    (tokenizer / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    (tokenizer / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"})
    )
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=cross_attention_dim,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
    ).save_pretrained(folder / "vae")
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=cross_attention_dim,
    ).save_pretrained(folder / "unet")
    DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        prediction_type=prediction_type,
    ).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def v_prediction_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("v-base"), prediction_type="v_prediction")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean folder with its manifests: three classes, 5 pictures each to train and 2 to validate, oblong ones too."""
    folder = tmp_path_factory.mktemp("clean")
    random = np.random.default_rng(0)
    rows: dict[str, list[dict[str, object]]] = {"train": [], "val": []}
    for name in CLASSES:
        (folder / name).mkdir()
        for number in range(7):
            path = f"{name}/{number}.png"
            pixels = random.integers(0, 255, (6, 8 if number % 2 else 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((64 if number % 2 else 48, 48)).save(folder / path)
            split = "train" if number < 5 else "val"
            width = 64 if number % 2 else 48
            rows[split].append({"path": path, "class": name, "sha256": f"{name}{number}", "width": width, "height": 48})
    for split, table in rows.items():
        pd.DataFrame(table).to_csv(folder / f"{split}.csv", index=False)
    return folder


def manifests(pictures: Path) -> dict[str, Path]:
    return {"train": pictures / "train.csv", "val": pictures / "val.csv"}


@pytest.fixture(scope="session")
def latents(base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    encode_images(base, pictures, manifests(pictures), folder, resolution=32, flip=True, batch_size=4)
    return folder


@pytest.fixture
def caches(latents: Path) -> tuple[LatentCache, LatentCache]:
    return LatentCache.open(latents, "train"), LatentCache.open(latents, "val")
