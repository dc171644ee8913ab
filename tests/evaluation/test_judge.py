import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bestiary.errors import BestiaryError
from bestiary.evaluation.judge import Judge


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 80, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


def copy_all_but_weights(judge_folder: Path, folder: Path) -> None:
    """Copy a judge's files to `folder` without its weights."""
    for file in judge_folder.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())


def test_features_of_pictures_and_texts_are_unit_vectors_of_equal_dimension(
    judge: Judge, pictures: list[Image.Image]
) -> None:
    images = judge.image_features(pictures[:3])
    texts = judge.text_features(["a photo of a tiger", "a photo of an antelope"])
    assert images.shape == (3, texts.shape[1])
    torch.testing.assert_close(images.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(2))


def test_a_judge_stored_in_half_precision_computes_in_single_precision(judge_folder: Path, tmp_path: Path) -> None:
    copy_all_but_weights(judge_folder, tmp_path)
    weights = load_file(judge_folder / "model.safetensors")
    halves = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
    save_file(halves, tmp_path / "model.safetensors", metadata={"format": "pt"})
    judge = Judge.load(str(tmp_path))
    assert {parameter.dtype for parameter in judge.model.parameters()} == {torch.float32}
    torch.testing.assert_close(judge.text_features(["a tiger"]).norm(), torch.tensor(1.0))


def test_features_of_more_pictures_than_a_batch_keep_their_order(judge: Judge, pictures: list[Image.Image]) -> None:
    together = judge.image_features(pictures)
    torch.testing.assert_close(together[[0, 66]], judge.image_features([pictures[0], pictures[66]]), atol=1e-5, rtol=0)


def test_a_texts_features_do_not_depend_on_the_other_texts(judge: Judge) -> None:
    together = judge.text_features(["a tiger", "a close-up of an antelope in its natural habitat"])
    torch.testing.assert_close(together[:1], judge.text_features(["a tiger"]), atol=1e-6, rtol=0)


def test_features_equal_those_of_transformers_clip(judge: Judge, pictures: list[Image.Image]) -> None:
    tokens = judge.tokenizer(["a photo of a tiger"], return_tensors="pt")
    pixel_values = judge.image_processor(pictures[:1], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        output = judge.model(**tokens, pixel_values=pixel_values)
    torch.testing.assert_close(judge.image_features(pictures[:1]), output.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(judge.text_features(["a photo of a tiger"]), output.text_embeds, atol=1e-5, rtol=0)


def test_class_tokens_are_what_transformers_projects(judge: Judge, pictures: list[Image.Image]) -> None:
    tokens = judge.class_tokens(pictures)
    assert tokens.shape == (70, judge.model.config.vision_config.hidden_size)
    torch.testing.assert_close(tokens.norm(dim=1), torch.ones(70))
    with torch.inference_mode():
        projected = judge.model.visual_projection(tokens)
    torch.testing.assert_close(
        projected / projected.norm(dim=1, keepdim=True), judge.image_features(pictures), atol=1e-5, rtol=0
    )
    assert judge.class_tokens([]).shape == (0, tokens.shape[1])


def test_probabilities_of_the_texts_sum_to_one(judge: Judge, pictures: list[Image.Image]) -> None:
    probabilities = judge.probabilities(pictures[:4], ["a tiger", "an antelope", "a bee"])
    assert probabilities.shape == (4, 3)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(4))


def test_no_pictures_give_no_features(judge: Judge) -> None:
    assert judge.image_features([]).shape == (0, judge.text_features(["a tiger"]).shape[1])


def test_a_missing_judge_is_named(tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match="nothing"):
        Judge.load(str(tmp_path / "nothing"))


def test_a_folder_without_a_judge_is_named(tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match=re.escape(str(tmp_path))):
        Judge.load(str(tmp_path))


def test_a_judge_with_missing_weights_is_refused(judge_folder: Path, tmp_path: Path) -> None:
    copy_all_but_weights(judge_folder, tmp_path)
    weights = load_file(judge_folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BestiaryError, match=r"text_projection\.weight"):
        Judge.load(str(tmp_path))
