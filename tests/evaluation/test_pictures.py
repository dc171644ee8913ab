import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bestiary.diffusion.adapter import FILE_NAME, inject, save_adapter
from bestiary.diffusion.base import load_unet
from bestiary.errors import BestiaryError
from bestiary.evaluation import pictures
from bestiary.evaluation.judge import Judge

PROMPTS = ["a photo of a tiger", "a photo of an antelope", "a photo of a bee"]
SETTINGS = {"steps": 2, "guidance_scale": 3.0, "scheduler": "dpmsolver++", "batch_size": 2}


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """Manifests of two classes with their images beside them."""
    for name, count in (("train", 3), ("val", 1)):
        rows = []
        for folder in ("bee", "tiger"):
            for index in range(count):
                path = tmp_path / folder / f"{name}{index}.png"
                path.parent.mkdir(exist_ok=True)
                Image.new("RGB", (70, 90), (80 * index, 120, 200)).save(path)
                rows.append({"path": str(path.relative_to(tmp_path)), "class": folder})
        pd.DataFrame(rows).to_csv(tmp_path / f"{name}.csv", index=False)
    return tmp_path


def test_base_and_adapter_draw_the_same_prompts_from_the_same_noise(pipeline, adapter: Path) -> None:
    base, adapted = pictures.draw_pairs(pipeline, adapter, PROMPTS, [1, 2, 3], **SETTINGS)
    again, _ = pictures.draw_pairs(pipeline, adapter, PROMPTS, [1, 2, 3], **SETTINGS)
    assert len(base) == len(adapted) == 3
    assert [image.tobytes() for image in base] != [image.tobytes() for image in adapted]
    for first, second in zip(base, again, strict=True):
        assert first.tobytes() == second.tobytes()


def test_an_adapter_that_changes_the_base_even_at_scale_0_fails(
    pipeline, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = pictures.apply_adapter
    monkeypatch.setattr(pictures, "apply_adapter", lambda pipeline, path, scale=1.0: honest(pipeline, path, 0.5))
    with pytest.raises(BestiaryError, match="at scale 0 does not give the base's pictures"):
        pictures.draw_pairs(pipeline, adapter, PROMPTS, [1, 2, 3], **SETTINGS)


def test_an_adapter_for_another_base_is_refused_before_anything_long(pipeline, adapter: Path, tmp_path: Path) -> None:
    weights = load_file(adapter / FILE_NAME)
    unet = load_unet(Path(pipeline.unet.config._name_or_path).parent)
    inject(unet, rank=2, alpha=4, dropout=0.0, targets=["to_q"], seed=0)
    save_adapter(unet, tmp_path, {})
    from safetensors import safe_open

    with safe_open(tmp_path / FILE_NAME, framework="pt") as file:
        metadata = file.metadata()
    other = {key: torch.nn.functional.pad(value, (0, 8)) for key, value in weights.items() if "to_q" in key}
    save_file(other, tmp_path / FILE_NAME, metadata=metadata)
    with pytest.raises(BestiaryError, match="does not fit the base"):
        pictures.draw_pairs(pipeline, tmp_path, PROMPTS, [1, 2, 3], **SETTINGS)


def test_pictures_that_are_not_finite_are_refused(pipeline, adapter: Path) -> None:
    pipeline.vae.decoder.conv_out.bias.data[0] = torch.nan
    with pytest.raises(BestiaryError, match=r"^The base draws pictures that are not finite numbers"):
        pictures.draw_pairs(pipeline, adapter, PROMPTS, [1, 2, 3], **SETTINGS)


def test_pictures_that_were_drawn_once_are_not_drawn_again(
    pipeline, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = pictures.Kept(tmp_path / "kept", {"base_sha256": "one"})
    how = SETTINGS | {"kept": kept}
    first = [image.tobytes() for image in pictures.draw(pipeline, adapter, PROMPTS, [1, 2, 3], **how)]
    broken = next(path for path in (tmp_path / "kept").glob("*/*.png") if path.stat().st_size)
    broken.write_bytes(broken.read_bytes()[:200])  # as a disk that lost power may leave it
    drawn: list[int] = []
    honest = pictures.generate

    def count(pipeline, prompts, seeds, **settings):
        drawn.extend(seeds)
        return honest(pipeline, prompts, seeds, **settings)

    monkeypatch.setattr(pictures, "generate", count)
    assert [image.tobytes() for image in pictures.draw(pipeline, adapter, PROMPTS, [1, 2, 3], **how)] == first
    assert drawn in ([1, 2], [3])  # the broken batch only
    assert kept.reused == 3 - len(drawn)

    drawn.clear()
    for change in ({"steps": 1}, {"guidance_scale": 2.0}, {"scale": 0.5}):
        pictures.draw(pipeline, adapter, PROMPTS[:1], [1], **how | change)
    pictures.draw(pipeline, None, PROMPTS[:1], [1], **how)
    other_base = pictures.Kept(tmp_path / "kept", {"base_sha256": "another"})
    pictures.draw(pipeline, None, PROMPTS[:1], [1], **SETTINGS | {"kept": other_base})
    assert drawn == [1] * 5
    other_base.drop_unused()
    assert len(list((tmp_path / "kept").iterdir())) == 1


@pytest.mark.slow
def test_two_processes_draw_and_judge_what_one_does(base_folder: Path, judge_folder: Path, tmp_path: Path) -> None:
    program = """
import json, os, sys
from bestiary.diffusion.base import load_pipeline, processes
from bestiary.evaluation import pictures
from bestiary.evaluation.judge import Judge

assert processes().num_processes == int(os.environ["WORLD_SIZE"])
pipeline, judge = load_pipeline(sys.argv[1], device="cpu"), Judge.load(sys.argv[2])
how = {"steps": 1, "guidance_scale": 3.0, "scheduler": "ddim", "batch_size": 1}
images = pictures.draw(pipeline, None, ["a tiger", "a bee", "a cat"], [1, 2, 3], **how)
seen = pictures.view(judge, images, [0, 1, 2])
if os.environ["RANK"] == "0":
    print(json.dumps([[image.tobytes().hex() for image in images], seen.features.tolist()]))
"""
    results = []
    for processes in (1, 2):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = str(listener.getsockname()[1])
        group = [
            subprocess.Popen(
                [sys.executable, "-c", program, str(base_folder), str(judge_folder)],
                env=os.environ
                | {"PYTHONPATH": str(Path(pictures.__file__).parents[2])}
                | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                | {"WORLD_SIZE": str(processes), "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for rank in range(processes)
        ]
        told = [process.communicate()[0] for process in group]
        assert [process.returncode for process in group] == [0] * processes
        results.append(json.loads(told[0].splitlines()[-1]))
    assert results[0] == results[1]


def test_classes_that_the_split_does_not_have_are_named() -> None:
    assert pictures.choose(["bee", "owl", "tiger"], ["tiger", "bee"]) == ["bee", "tiger"]
    with pytest.raises(BestiaryError, match=r"^evaluate\.classes names cat, and the split has no images of it\.$"):
        pictures.choose(["bee", "owl"], ["cat"])


def test_words_hold_the_prompts_and_every_template_in_right_english(judge: Judge) -> None:
    words = pictures.read_words(judge, ["antelope", "ladybugs"], "a photo of {}")
    expected = judge.text_features(["a photo of an antelope", "a photo of a ladybug"]).numpy()
    np.testing.assert_allclose(words.prompts, expected, atol=1e-6)
    assert len(words.templates) == 7
    np.testing.assert_allclose(np.linalg.norm(words.ensemble, axis=1), 1)


def test_files_are_seen_in_the_order_of_their_manifest(judge: Judge, split: Path) -> None:
    train, _ = pictures.read_manifests(split)
    seen = pictures.view_files(judge, split, train, ["bee", "tiger"])
    assert seen.labels.tolist() == [0, 0, 0, 1, 1, 1]
    one = pictures.view(judge, [Image.open(split / train["path"].iloc[4])], [1])
    np.testing.assert_allclose(seen.features[4], one.features[0], atol=1e-5)


@pytest.mark.parametrize(("name", "meaning"), [("train", "training"), ("val", "validation")])
def test_a_split_without_images_is_one_plain_sentence(split: Path, name: str, meaning: str) -> None:
    (split / f"{name}.csv").write_text("path,class\n")
    with pytest.raises(BestiaryError, match=rf"^There are no {meaning} images: .* is missing or lists none\.$"):
        pictures.read_manifests(split)


def test_a_class_without_validation_images_is_named(split: Path) -> None:
    (split / "val.csv").write_text("path,class\nbee/val0.png,bee\n")
    with pytest.raises(BestiaryError, match="The class tiger has images for only one of training and validation"):
        pictures.read_manifests(split)
