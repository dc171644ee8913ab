"""The image-only judge, with a random DINOv2 of its exact kind."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from bestiary.errors import BestiaryError
from bestiary.evaluation.image_judge import ImageJudge


@pytest.fixture
def dinov2(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path)
    BitImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_convert_rgb=True
    ).save_pretrained(tmp_path)
    return tmp_path


def test_it_sees_the_class_token_of_each_picture(dinov2: Path) -> None:
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(3)]
    judge = ImageJudge.load(str(dinov2))
    tokens = judge.class_tokens(pictures)
    assert tokens.shape == (3, 16)
    assert torch.allclose(tokens.norm(dim=-1), torch.ones(3))
    pixels = judge.image_processor(pictures[1:2], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        pooled = judge.model(pixel_values=pixels).pooler_output[0]
    assert torch.allclose(tokens[1], pooled / pooled.norm(), atol=1e-5)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match=r"The image judge .* cannot be loaded"):
        ImageJudge.load(str(tmp_path))


def test_a_model_without_a_class_token_is_refused_when_it_is_loaded(dinov2: Path, tmp_path: Path) -> None:
    """A ResNet's last hidden state has no tokens, and its first row would pass for one."""
    folder = tmp_path / "resnet"
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])).save_pretrained(folder)
    shutil.copy(dinov2 / "preprocessor_config.json", folder)
    with pytest.raises(BestiaryError, match="has no class token"):
        ImageJudge.load(str(folder))
