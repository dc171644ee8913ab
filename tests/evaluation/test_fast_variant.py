"""A fast variant is accepted by paired intervals, on the same prompts and seeds; it must be able to fail."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
import torch
from PIL import Image
from support.fast_variant import acceptance, estimate, make_export
from support.registry import make_adapter
from support.settings import encode_settings

from bestiary.diffusion.adapter import adapter_sha256, apply_adapter, save_adapter
from bestiary.diffusion.adapter_format import FILE_NAME, Provenance
from bestiary.diffusion.adapter_reading import read_adapter
from bestiary.diffusion.base import load_pipeline, load_scheduler, load_unet
from bestiary.diffusion.distillation import distill
from bestiary.diffusion.encoding import encode_images
from bestiary.diffusion.export_format import MANIFEST
from bestiary.diffusion.latents import Latents
from bestiary.errors import BestiaryError
from bestiary.evaluation.acceptance import Drawn, Identity, Measured, Way, as_markdown, as_text, decide, read_acceptance
from bestiary.evaluation.fast_variant import (
    Acceptance,
    DefaultWay,
    FastVariant,
    Trial,
    accept,
    count_passes,
    read_fast_variant,
    write,
)
from bestiary.evaluation.judge import Judge
from bestiary.evaluation.likeness import read_likeness
from bestiary.evaluation.pictures import PictureCache
from bestiary.evaluation.report import Row
from bestiary.params import Accept, Proof, load_params
from bestiary.samplers import Sampling
from bestiary.subjects import Subject, Subjects

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

ROOT = Path(__file__).parents[2]
RULES = Accept.model_validate(
    {
        "max_loss": {"clip_score": 2.0, "margin": 2.0, "top1": 3.0, "cmmd": 0.05, "likeness": 0.1},
        "min_diversity": 0.8,
        "max_copied": 0.1,
        "reference_steps": 2,
        "timed_pictures": 1,
        "extra_seeds": 2,
        "reference_seeds": 10,
    }
)
CLASSES = ("bee", "crab")
SAMPLING = Sampling("dpmsolver++", steps=4, guidance_scale=7.0, width=64, height=64)


# ---- the rules ----


def measured(difference: Row | None = None, **changes: object) -> Measured:
    """What a fast variant that loses nothing measures, with these changes; `difference` is against the default way."""
    report = acceptance("1" * 64, "2" * 64)
    row = {key: estimate(0.0, 0.01) for key in ("clip_score", "margin", "top1", "cmmd", "diversity")}
    differences = report.differences.model_copy(update={"fast_default": row | dict(difference or {})})
    return Measured(
        ways=report.ways,
        real=report.real,
        real_pictures=report.real_pictures,
        differences=differences,
        diversity_ratio=report.diversity_ratio,
    ).model_copy(update=changes)


def with_way(way: Way, **changes: object) -> dict[Way, Drawn]:
    ways = measured().ways
    return {**ways, way: ways[way].model_copy(update=changes)}


def test_a_fast_variant_that_loses_nothing_is_accepted_with_a_reason_for_each_rule() -> None:
    accepted, reasons = decide(measured(), RULES)
    assert accepted
    assert len(reasons) == 6


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"difference": {"clip_score": estimate(-1.8, 0.5)}}, r"CLIP score -1\.80 .* the limit is 2"),
        ({"difference": {"margin": estimate(-1.8, 0.5)}}, r"margin .* the limit is 2"),
        ({"difference": {"top1": estimate(-2.0, 1.5)}}, r"top-1\), points -2\.00 .* the limit is 3"),
        ({"difference": {"cmmd": estimate(0.04, 0.02)}}, r"CMMD \+0\.04 .* the limit is 0\.05"),
        ({"diversity_ratio": estimate(0.85, 0.1)}, r"diversity is 85%.*must be 80%"),
        ({"diversity_ratio": None}, r"the same picture for all seeds"),
        ({"ways": with_way("fast", copied=estimate(0.4, 0.2))}, r"copies its training images: 40%.*limit is 10%"),
        ({"ways": with_way("fast", pictures=19)}, r"only 19 pictures of the fast variant.*at least 20"),
        ({"ways": with_way("reference", pictures=19)}, r"only 19 pictures of the reference.*at least 20"),
        ({"real_pictures": 19}, r"only 19 real images.*at least 20"),
    ],
    ids=["clip", "margin", "top1", "cmmd", "diversity", "collapsed reference", "copies", "few", "reference", "real"],
)
def test_each_rule_alone_refuses_by_the_worse_end_of_its_interval(change: dict[str, Any], reason: str) -> None:
    accepted, reasons = decide(measured(**change), RULES)
    assert not accepted
    assert len(reasons) == 1
    assert re.search(reason, reasons[0])


def test_one_subject_is_judged_by_its_likeness_to_few_photos() -> None:
    def of_one(likeness: float) -> Measured:
        return measured(
            difference={"likeness": estimate(likeness, 0.05), "clip_score": estimate(-9.0), "cmmd": estimate(9.0)},
            real_pictures=4,
        )

    assert decide(of_one(-0.02), RULES).accepted
    accepted, reasons = decide(of_one(-0.08), RULES)
    assert not accepted
    assert len(reasons) == 1
    assert "likeness to the photos (0 others, 1 its own) -0.08" in reasons[0]


def test_one_class_is_judged_by_the_scores_that_it_has() -> None:
    row = {key: estimate(0.0, 0.01) for key in ("clip_score", "cmmd", "diversity")}
    of_one = measured()
    of_one = of_one.model_copy(update={"differences": of_one.differences.model_copy(update={"fast_default": row})})
    assert decide(of_one, RULES).accepted


def test_the_verdict_is_read_back_and_shown_with_its_intervals(tmp_path: Path) -> None:
    report = acceptance("1" * 64, "2" * 64, accepted=False)
    (tmp_path / "accept.json").write_text(report.model_dump_json())
    assert read_acceptance(tmp_path / "accept.json") == report
    text = "\n".join(as_text(report))
    assert "Fast variant refused: openvino in int8 with the tiny decoder, 2 passes" in text
    assert "+0.25 (-0.25 to +0.75)" in text
    assert text.endswith("It may lose too much: CLIP score -9.00.")
    assert "| CLIP score | 90.00 | 90.00 | 90.00 | +0.25 (-0.25 to +0.75) |" in "\n".join(as_markdown(report))
    halved = report.model_copy(update={"ways": {"default": report.ways["default"]}})
    for content in ("{}", halved.model_dump_json()):
        (tmp_path / "accept.json").write_text(content)
        with pytest.raises(BestiaryError, match=r"accept\.json is damaged\. Delete it and run `make fast`\."):
            read_acceptance(tmp_path / "accept.json")


def test_only_the_fast_variant_of_the_registered_adapter_is_measured(base_folder: Path, tmp_path: Path) -> None:
    few_step = make_adapter(base_folder, tmp_path / "few_step", 0)
    file, sampling = few_step / FILE_NAME, Sampling("lcm", steps=2, guidance_scale=1.0, timesteps=(999, 399))
    file.write_bytes(replace(read_adapter(file), few_step=sampling).to_bytes())
    export = make_export(tmp_path / "fast", adapter_sha256(few_step))
    read = read_fast_variant(few_step, export, adapter_sha256="1" * 64, side=64)
    assert (read.identity.adapter_sha256, read.few_step_sampling) == ("1" * 64, replace(sampling, width=64, height=64))
    manifest = json.loads((export / MANIFEST).read_text())
    (export / MANIFEST).write_text(json.dumps(manifest | {"distilled_from_sha256": "2" * 64}))
    with pytest.raises(BestiaryError, match="few_step was distilled from another adapter"):
        read_fast_variant(few_step, export, adapter_sha256="1" * 64, side=64)
    other = make_export(tmp_path / "other", "3" * 64)
    with pytest.raises(BestiaryError, match="other was not exported from"):
        read_fast_variant(few_step, other, adapter_sha256="1" * 64, side=64)


# ---- drawing ----


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifests of two classes of the bundled sample, as many images in each split."""
    split = tmp_path_factory.mktemp("split")
    for name, half in (("train", slice(0, 10)), ("val", slice(10, 20))):
        rows = [
            {"path": f"{folder}/{path.name}", "class": folder, "sha256": path.name, "width": 64, "height": 64}
            for folder in CLASSES
            for path in sorted((ROOT / "samples" / folder).iterdir())[half]
        ]
        pd.DataFrame(rows).to_csv(split / f"{name}.csv", index=False)
    return split


@pytest.fixture
def trial(pipeline: StableDiffusionPipeline, judge: Judge, split: Path) -> Trial:
    return Trial(
        pipeline,
        judge,
        ROOT / "samples",
        split,
        resamples=200,
        seed=0,
        batch_size=4,  # divides every part of the jobs: rounding depends on a batch's other pictures
        template="a drawing of {}",  # what the base knows without an adapter
        classes=None,
    )


def variant(few_step: Path, sampling: Sampling, load: Callable[[], StableDiffusionPipeline]) -> FastVariant:
    identity = Identity(
        adapter_sha256="1" * 64,
        few_step_sha256=adapter_sha256(few_step),
        export_sha256="2" * 64,
        engine="openvino",
        precision="fp32",
        decoder="full",
    )
    return FastVariant(identity, few_step, sampling, sampling, load)


def compare(
    trial: Trial, adapter: Path, load: Callable[[], StableDiffusionPipeline], cache: PictureCache
) -> Acceptance:
    default = DefaultWay(adapter, SAMPLING, seeds=8, cache=cache)
    # A reference of two steps draws noise, which is diverse.
    rules = RULES.model_copy(update={"min_diversity": 0.0})
    return accept(trial, default, variant(adapter, SAMPLING, load), rules, cache)


@pytest.mark.slow
def test_the_default_way_itself_is_accepted_and_noise_is_refused(
    trial: Trial, base_folder: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(base_folder, tmp_path / "adapter", 0, strength=0.01)

    def load() -> StableDiffusionPipeline:
        pipeline = load_pipeline(base_folder, device="cpu")
        apply_adapter(pipeline, adapter, 1.0)
        return pipeline

    def load_noise() -> StableDiffusionPipeline:
        pipeline = load()
        torch.manual_seed(0)
        for parameter in pipeline.unet.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        return pipeline

    cache = PictureCache(tmp_path / "cache", "of the base")
    same = compare(trial, adapter, load, cache)
    report = same.report
    assert report.accepted, report.reasons
    assert {way: drawn.pictures for way, drawn in report.ways.items()} == dict.fromkeys(report.ways, 20)
    assert {way: drawn.passes for way, drawn in report.ways.items()} == {
        "default": 8,
        "reference": 4,
        "few_step": 8,
        "fast": 8,
    }
    assert {(each.mean, *each.ci95) for each in report.differences.fast_default.values()} == {(0.0, 0.0, 0.0)}
    assert report.seconds.keys() == report.ways.keys()
    assert report.results().keys() >= {"accepted", "reasons", "ways", "differences", "diversity_ratio"}

    write(same, tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "pictures.csv")
    assert len(table) == 20
    assert table["default_clip_score"].equals(table["fast_clip_score"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "sheet.png",
        "quality_against_seconds.png",
        "pictures.csv",
    }

    assert cache.reused == 0
    noise = compare(trial, adapter, load_noise, cache)
    assert cache.reused == 40  # those of the default way and of the reference
    assert not noise.report.accepted
    assert any("CLIP score" in reason for reason in noise.report.reasons)
    # What was lost was lost by the export: the few-step adapter in torch draws as before.
    assert noise.report.differences.distillation["clip_score"].mean == 0
    assert noise.report.differences.export == noise.report.differences.fast_default


def test_likeness_tells_a_subjects_own_photos_from_those_of_others(trial: Trial, tmp_path: Path) -> None:
    examples = ROOT / "examples" / "pip" / "photos"
    photos = sorted((examples / "pip").glob("*.jpg"))
    for name, half in (("train", photos[:8]), ("val", photos[8:])):
        rows = [{"path": f"pip/{path.name}", "class": "pip"} for path in half]
        pd.DataFrame(rows).to_csv(tmp_path / f"{name}.csv", index=False)
    pip = Subject("pip", "sks penguin", "", class_word="penguin")
    Subjects({"pip": pip}).write_to(tmp_path)
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "pip").symlink_to(examples / "other-penguins")
    proof = Proof.model_validate(
        {
            "contexts": ["a photo of {}"],
            "unrelated": ["a photo of a bee"],
            "seeds": 2,
            "class_seeds": 2,
            "image_judge": {"model": str(ROOT / "models" / "image_judge"), "revision": None},
        }
    )
    sampling = replace(SAMPLING, steps=2)
    of_pip = replace(trial, clean=examples, split=tmp_path)
    likeness = read_likeness(of_pip, tmp_path / "others", proof, sampling, None)
    assert likeness is not None
    own, others = (
        likeness.way([Image.open(path) for path in paths])
        for paths in (photos[:8], sorted((examples / "other-penguins").glob("*.jpg")))
    )
    assert own is not None
    assert others is not None
    assert own.mean == pytest.approx(1.0)
    assert others.mean == pytest.approx(0.0)
    assert (own - others).ci95[0] > 0.1
    assert read_likeness(trial, tmp_path / "others", proof, sampling, None) is None  # two classes


@pytest.mark.slow
def test_a_distillation_of_20_steps_is_refused_for_what_distilling_lost(
    trial: Trial, split: Path, base_folder: Path, tmp_path: Path
) -> None:
    manifests = {name: split / f"{name}.csv" for name in ("train", "val")}
    encode_images(base_folder, ROOT / "samples", manifests, tmp_path / "latents", encode_settings(resolution=64))
    settings = load_params(ROOT / "params.yaml").distill.model_copy(update={"steps": 20, "batch_size": 8})
    unet = load_unet(base_folder)
    distill(unet, load_scheduler(base_folder), Latents.open(tmp_path / "latents"), settings, seed=0)
    few_step = save_adapter(unet, tmp_path / "few_step", Provenance()).parent

    def load() -> StableDiffusionPipeline:
        pipeline = load_pipeline(base_folder, device="cpu")
        apply_adapter(pipeline, few_step, 1.0)
        return pipeline

    adapter = make_adapter(base_folder, tmp_path / "adapter", 0, strength=0.01)
    default = DefaultWay(adapter, SAMPLING, seeds=8, cache=None)
    report = accept(
        trial, default, variant(few_step, replace(settings.sampling(), width=64, height=64), load), RULES
    ).report
    assert not report.accepted
    # Its pictures are almost the same and score well: the CLIP score alone would accept them.
    ratio = report.diversity_ratio
    assert ratio is not None
    assert ratio.ci95[1] < RULES.min_diversity
    assert not any("CLIP score" in reason for reason in report.reasons)
    assert any("CMMD" in reason for reason in report.reasons)
    assert report.ways["fast"].passes == 2
    assert report.differences.distillation["clip_score"].ci95[0] > 0
    assert report.differences.export["cmmd"].ci95 == (0.0, 0.0)


def test_passes_count_guided_steps_twice(pipeline: StableDiffusionPipeline) -> None:
    assert count_passes(pipeline, Sampling("lcm", steps=2, guidance_scale=1.0, timesteps=(999, 699))) == 2
    assert count_passes(pipeline, Sampling("ddpm", steps=100, guidance_scale=7.0)) == 200
    sampling = Sampling("dpmsolver++sde", steps=13, guidance_scale=7.0, guidance_interval=(2, 1000))
    assert count_passes(pipeline, sampling) == 19
