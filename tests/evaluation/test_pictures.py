from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bestiary.diffusion.adapter import inject, save_adapter
from bestiary.diffusion.adapter_format import FILE_NAME, Provenance
from bestiary.diffusion.base import load_unet
from bestiary.diffusion.sampling import generate
from bestiary.errors import BestiaryError
from bestiary.evaluation import pictures
from bestiary.evaluation.judge import Judge
from bestiary.evaluation.judging_ahead import JudgingAhead
from bestiary.evaluation.pictures import Jobs, PictureCache, draw, draw_pairs
from bestiary.samplers import Sampling

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

PROMPTS = ["a photo of a tiger", "a photo of an antelope", "a photo of a bee"]
JOBS = Jobs([0, 1, 2], PROMPTS, [1, 2, 3])
SAMPLING = Sampling("dpmsolver++", steps=2, guidance_scale=3.0)


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """A folder with the manifests of two classes and their images."""
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


def test_base_and_adapter_draw_the_same_prompts_from_the_same_noise(
    pipeline: StableDiffusionPipeline, adapter: Path
) -> None:
    base, adapted = draw_pairs(pipeline, adapter, JOBS, SAMPLING, batch_size=2)
    again, _ = draw_pairs(pipeline, adapter, JOBS, SAMPLING, batch_size=2)
    assert len(base) == len(adapted) == 3
    assert [image.tobytes() for image in base] != [image.tobytes() for image in adapted]
    for first, second in zip(base, again, strict=True):
        assert first.tobytes() == second.tobytes()


def test_an_adapter_that_changes_pictures_even_with_weight_0_is_refused(
    pipeline: StableDiffusionPipeline, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.utils.set_adapter_layers", lambda *_, **__: None)  # a weight of 0 does nothing
    with pytest.raises(BestiaryError, match="weight 0") as caught:
        draw_pairs(pipeline, adapter, JOBS, SAMPLING, batch_size=2)
    assert str(adapter) in str(caught.value)


def test_an_adapter_for_another_base_is_refused(
    pipeline: StableDiffusionPipeline, adapter: Path, tmp_path: Path
) -> None:
    weights = load_file(adapter / FILE_NAME)
    unet = load_unet(Path(pipeline.unet.config._name_or_path).parent)
    inject(unet, rank=2, alpha=4, dropout=0.0, targets=["to_q"], seed=0)
    save_adapter(unet, tmp_path, Provenance())
    with safe_open(tmp_path / FILE_NAME, framework="pt") as file:
        metadata = file.metadata()
    wider = {key: torch.nn.functional.pad(value, (0, 8)) for key, value in weights.items() if "to_q.lora_A" in key}
    other = {key: value for key, value in weights.items() if "to_q" in key} | wider
    save_file(other, tmp_path / FILE_NAME, metadata=metadata)
    with pytest.raises(BestiaryError, match="does not fit") as caught:
        draw_pairs(pipeline, tmp_path, JOBS, SAMPLING, batch_size=2)
    assert str(tmp_path) in str(caught.value)


def test_pictures_that_are_not_finite_are_refused(pipeline: StableDiffusionPipeline, adapter: Path) -> None:
    pipeline.vae.decoder.conv_out.bias.data[0] = torch.nan
    with pytest.raises(BestiaryError, match=r"base .*not finite"):
        draw_pairs(pipeline, adapter, JOBS, SAMPLING, batch_size=2)


@pytest.fixture
def drawn_seeds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of the pictures that were drawn instead of read from the cache, in order."""
    seeds: list[int] = []

    def record(
        pipeline: StableDiffusionPipeline,
        prompts: Sequence[str],
        batch_seeds: Sequence[int],
        sampling: Sampling,
        *,
        batch_size: int,
    ) -> list[Image.Image]:
        seeds.extend(batch_seeds)
        return generate(pipeline, prompts, batch_seeds, sampling, batch_size=batch_size)

    monkeypatch.setattr(pictures, "generate", record)
    return seeds


def test_cached_pictures_are_not_drawn_again_and_a_damaged_file_is(
    pipeline: StableDiffusionPipeline, adapter: Path, tmp_path: Path, drawn_seeds: list[int]
) -> None:
    cache = PictureCache(tmp_path / "cache", "one")

    def draw_all() -> list[bytes]:
        return [image.tobytes() for image in draw(pipeline, adapter, JOBS, SAMPLING, batch_size=2, cache=cache)]

    first = draw_all()
    assert drawn_seeds == [1, 2, 3]
    drawn_seeds.clear()
    damaged = next((tmp_path / "cache").glob("*/*.png"))
    damaged.write_bytes(damaged.read_bytes()[:200])  # as after a power failure
    assert draw_all() == first
    assert drawn_seeds in ([1, 2], [3])  # only the damaged batch
    assert cache.reused == 3 - len(drawn_seeds)


def test_the_cache_distinguishes_everything_that_decides_the_pixels(
    pipeline: StableDiffusionPipeline, adapter: Path, tmp_path: Path, drawn_seeds: list[int]
) -> None:
    cache, one = PictureCache(tmp_path / "cache", "one"), JOBS.take([0])
    for sampling in (
        SAMPLING,
        replace(SAMPLING, steps=1),
        replace(SAMPLING, guidance_scale=2.0),
        replace(SAMPLING, adapter_weight=0.5),
        replace(SAMPLING, height=32),
    ):
        draw(pipeline, adapter, one, sampling, batch_size=2, cache=cache)
    draw(pipeline, None, one, SAMPLING, batch_size=2, cache=cache)
    draw(pipeline, None, JOBS.take([1]), SAMPLING, batch_size=2, cache=cache)
    other_base = PictureCache(tmp_path / "cache", "another")
    draw(pipeline, None, one, SAMPLING, batch_size=2, cache=other_base)
    assert drawn_seeds == [1] * 6 + [2, 1]
    assert cache.reused == other_base.reused == 0
    other_base.drop_unused()
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_bases_pictures_do_not_depend_on_the_adapter_weight(
    pipeline: StableDiffusionPipeline, tmp_path: Path, drawn_seeds: list[int]
) -> None:
    cache = PictureCache(tmp_path / "cache", "one")
    for weight in (1.0, 0.5):
        draw(pipeline, None, JOBS.take([0]), replace(SAMPLING, adapter_weight=weight), batch_size=2, cache=cache)
    assert drawn_seeds == [1]


def test_pictures_that_are_not_square_come_from_the_cache_as_they_were_drawn(
    pipeline: StableDiffusionPipeline, tmp_path: Path, drawn_seeds: list[int]
) -> None:
    cache, sampling = PictureCache(tmp_path / "cache", "one"), replace(SAMPLING, width=64, height=32)
    first, second = (draw(pipeline, None, JOBS, sampling, batch_size=2, cache=cache) for _ in range(2))
    assert drawn_seeds == [1, 2, 3]
    assert {image.size for image in second} == {(64, 32)}
    assert [image.tobytes() for image in first] == [image.tobytes() for image in second]


def test_one_process_looks_for_each_cached_batch_once(
    pipeline: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Path] = []
    cached = pictures._cached

    def counted(path: Path, count: int) -> bytes | None:
        found.append(path)
        return cached(path, count)

    monkeypatch.setattr(pictures, "_cached", counted)
    for _ in range(2):
        draw(pipeline, None, JOBS, SAMPLING, batch_size=2, cache=PictureCache(tmp_path, "one"))
    assert len(found) == 2 * 2


@pytest.mark.slow
def test_a_process_for_each_core_draws_and_caches_the_same_pictures_as_one(
    pipeline: StableDiffusionPipeline, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = PictureCache(tmp_path / "cache", "one")
    alone = [image.tobytes() for image in draw(pipeline, adapter, JOBS, SAMPLING, batch_size=1)]
    monkeypatch.setattr(pictures, "MANY_STEPS", 1)
    monkeypatch.setattr(pictures, "generate", None)  # this process draws nothing
    for reused in (0, 3):
        images = draw(pipeline, adapter, JOBS, SAMPLING, batch_size=1, cache=cache)
        assert [image.tobytes() for image in images] == alone
        assert cache.reused == reused


@pytest.mark.slow
def test_a_process_for_each_core_draws_a_batch_that_occurs_twice_and_the_batches_after_it(
    pipeline: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = JOBS.take([0, 0, 1])
    alone = [image.tobytes() for image in draw(pipeline, None, jobs, SAMPLING, batch_size=1)]
    monkeypatch.setattr(pictures, "MANY_STEPS", 1)
    cache = PictureCache(tmp_path / "cache", "one")
    assert [image.tobytes() for image in draw(pipeline, None, jobs, SAMPLING, batch_size=1, cache=cache)] == alone


@pytest.mark.slow
def test_two_processes_draw_and_judge_the_same_as_one(base_folder: Path, judge_folder: Path, tmp_path: Path) -> None:
    program = """
import json, os, sys
from bestiary.diffusion.base import load_pipeline, processes
from bestiary.evaluation.judge import Judge
from bestiary.evaluation.pictures import Jobs, draw, view
from bestiary.samplers import Sampling

assert processes().num_processes == int(os.environ["WORLD_SIZE"])
pipeline, judge = load_pipeline(sys.argv[1], device="cpu"), Judge.load(sys.argv[2])
jobs = Jobs([0, 1, 2], ["a tiger", "a bee", "a cat"], [1, 2, 3])
images = draw(pipeline, None, jobs, Sampling("ddim", steps=1, guidance_scale=3.0), batch_size=1)
judged = view(judge, images, jobs.labels)
if os.environ["RANK"] == "0":
    print(json.dumps([[image.tobytes().hex() for image in images], judged.features.tolist()]))
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
        outputs = [process.communicate()[0] for process in group]
        assert [process.returncode for process in group] == [0] * processes
        results.append(json.loads(outputs[0].splitlines()[-1]))
    assert results[0] == results[1]


def test_a_class_that_the_split_does_not_have_is_named() -> None:
    assert pictures.choose(["bee", "owl", "tiger"], ["tiger", "bee"]) == ["bee", "tiger"]
    with pytest.raises(BestiaryError, match=r"evaluate\.classes .*cat"):
        pictures.choose(["bee", "owl"], ["cat"])


def test_class_texts_hold_the_prompts_and_every_template_with_the_right_article(judge: Judge) -> None:
    texts = pictures.read_class_texts(judge, ["antelope", "ladybugs"], "a photo of {}")
    expected = judge.text_features(["a photo of an antelope", "a photo of a ladybug"]).numpy()
    np.testing.assert_allclose(texts.prompts, expected, atol=1e-6)
    assert len(texts.templates) == 7
    np.testing.assert_allclose(np.linalg.norm(texts.ensemble, axis=1), 1)


def test_files_are_judged_in_the_order_of_their_manifest(judge: Judge, split: Path) -> None:
    train, _ = pictures.read_manifests(split)
    judged = pictures.view_files(judge, split, train, ["bee", "tiger"])
    assert judged.labels.tolist() == [0, 0, 0, 1, 1, 1]
    one = pictures.view(judge, [Image.open(split / train["path"].iloc[4])], [1])
    np.testing.assert_allclose(judged.features[4], one.features[0], atol=1e-5)


@pytest.mark.parametrize(("name", "meaning"), [("train", "training"), ("val", "validation")])
def test_a_manifest_without_images_is_named(split: Path, name: str, meaning: str) -> None:
    (split / f"{name}.csv").write_text("path,class\n")
    with pytest.raises(BestiaryError, match=rf"{meaning} .*{name}\.csv"):
        pictures.read_manifests(split)


def test_a_class_without_validation_images_is_named(split: Path) -> None:
    (split / "val.csv").write_text("path,class\nbee/val0.png,bee\n")
    with pytest.raises(BestiaryError, match=r"tiger .*validation"):
        pictures.read_manifests(split)


def test_pictures_that_do_not_fit_together_are_drawn_one_by_one(
    pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    together = draw(pipeline, None, JOBS, SAMPLING, batch_size=3)

    def small(*arguments: object, batch_size: int) -> list[Image.Image]:
        if batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(*arguments, batch_size=batch_size)  # type: ignore[arg-type]

    monkeypatch.setattr(pictures, "generate", small)
    alone = draw(pipeline, None, JOBS, SAMPLING, batch_size=3)
    for one, other in zip(together, alone, strict=True):
        assert np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 1
    assert "Continuing with 1 at a time. Lower evaluate.batch_size" in capsys.readouterr().out


def test_pictures_judged_while_others_are_drawn_have_the_features_of_pictures_judged_afterwards(
    pipeline: StableDiffusionPipeline, judge: Judge, tmp_path: Path
) -> None:
    ahead, cache = JudgingAhead([judge]), PictureCache(tmp_path, "base")
    drawn = draw(pipeline, None, JOBS, SAMPLING, batch_size=2, cache=cache, on_drawn=ahead.see)
    unseen = Image.new("RGB", (64, 64), "red")
    images = [*drawn, unseen, drawn[0]]
    torch.testing.assert_close(ahead.features(judge, images), judge.image_features(images), atol=1e-5, rtol=0)
    assert len(ahead._known) == 3
    assert len(ahead.features(judge, [])) == 0
    again: list[object] = []
    draw(pipeline, None, JOBS, SAMPLING, batch_size=2, cache=cache, on_drawn=again.append)
    assert again == []  # nothing is drawn, so nothing can be judged meanwhile
