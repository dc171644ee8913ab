import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from support.settings import encode_settings, train_settings
from support.stages import run_stage
from support.tiny import manifests
from support.training import adapter_weights, all_equal, in_training_batch, run_training

from bestiary.diffusion import preservation
from bestiary.diffusion.adapter import read_provenance, save_adapter
from bestiary.diffusion.adapter_format import Provenance
from bestiary.diffusion.base import load_pipeline, load_scheduler, load_unet
from bestiary.diffusion.encoding import encode_images
from bestiary.diffusion.latents import Latents
from bestiary.diffusion.low_memory import low_memory as settings_of
from bestiary.diffusion.preservation import Preserved, class_word_of, preservation_error, preserve
from bestiary.diffusion.sampling import generate
from bestiary.diffusion.training import train
from bestiary.errors import BestiaryError
from bestiary.evaluation import rates
from bestiary.evaluation.rates import StepPart
from bestiary.params import load_params
from bestiary.samplers import Sampling
from bestiary.subjects import Subject, subject_of

ROOT = Path(__file__).parents[2]
SAMPLING = Sampling("dpmsolver++", steps=2, guidance_scale=3.0, width=32, height=32)
NOISED = {"kind": "noised", "weight": 0.3, "samples": 4}


@pytest.fixture(autouse=True, scope="module")
def small_pool() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preservation, "POOL", 40)
        patch.setattr(preservation, "PICTURES", 6)
        yield


def predictions(
    base: Path, latents: Latents, kind: str = "noised", file: Path | None = None, word: str = "penguin", seed: int = 0
) -> Preserved:
    return preserve(
        load_pipeline(base, device="cpu"),
        load_scheduler(base),
        latents.training,
        train_settings(preservation={**NOISED, "kind": kind}),
        SAMPLING,
        class_words=[word],
        seed=seed,
        file=file,
    )


@pytest.fixture(scope="module")
def noised(base: Path, latents_folder: Path) -> Latents:
    """The tests' latents with what the base predicts for them."""
    latents = Latents.open(latents_folder)
    return replace(latents, preserved=predictions(base, latents))


@pytest.mark.parametrize("kind", ["noised", "drawn", "both"])
def test_the_targets_are_the_bases_own_predictions_at_all_noise_levels(base: Path, latents: Latents, kind: str) -> None:
    preserved = predictions(base, latents, kind)
    unet = load_unet(base)
    assert len(preserved.samples) == 40
    with torch.no_grad():
        for sample in preserved.samples[::7]:
            text = preserved.features[sample.captions][None]
            expected = unet(sample.noisy[None], sample.timesteps[None], text).sample[0]
            torch.testing.assert_close(sample.target, expected, rtol=1e-3, atol=1e-4)
    assert [int(sample.timesteps) // 25 for sample in preserved.samples] == list(range(40))


def test_half_of_the_prompts_name_the_class_and_a_tenth_are_empty(
    base: Path, latents: Latents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preservation, "POOL", 400)
    of_class = len(preservation.TEMPLATES)
    captions = torch.stack([sample.captions for sample in predictions(base, latents).samples])
    assert ((captions > 0) & (captions <= of_class)).float().mean() == pytest.approx(0.5, abs=0.08)
    assert (captions == 0).float().mean() == pytest.approx(0.1, abs=0.05)


def test_the_base_draws_the_class_and_other_subjects(
    base: Path, latents: Latents, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []

    def note(pipeline: Any, prompts: Sequence[str], *args: Any, **options: Any) -> Any:
        drawn.extend(prompts)
        return generate(pipeline, prompts, *args, **options)

    monkeypatch.setattr(preservation, "generate", note)
    predictions(base, latents, "noised")
    assert drawn == []
    predictions(base, latents, "drawn")
    assert ["penguin" in prompt for prompt in drawn] == [True, False] * 3


def test_without_preservation_a_step_computes_its_images_only(base: Path, latents: Latents, noised: Latents) -> None:
    def batches(latents: Latents, **changes: object) -> list[int]:
        unet, sizes = load_unet(base), []
        unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])) if module.training else None)
        train(unet, load_scheduler(base), latents, train_settings(steps=2, **changes), seed=0)
        return sizes

    assert batches(latents) == [4, 4]
    assert batches(noised, preservation={**NOISED, "samples": 3}) == [4, 3, 4, 3]


def test_a_fresh_adapter_has_no_preservation_loss(base: Path, noised: Latents) -> None:
    preserved, unet = noised.preserved, load_unet(base)
    assert preserved
    with torch.no_grad():
        for batch in preserved.batches(0, range(8)):
            assert preservation_error(unet, batch, preserved.features).abs().max() < 1e-4


def test_preservation_keeps_the_adapter_nearer_to_the_base(base: Path, noised: Latents, latents: Latents) -> None:
    preserved = noised.preserved
    assert preserved

    @torch.no_grad()
    def moved(unet: Any) -> float:
        batches = preserved.batches(1, range(40))
        return sum(float(preservation_error(unet, batch, preserved.features).square().mean()) for batch in batches)

    _, free = run_training(base, latents, steps=20, validate_every=20)
    _, kept = run_training(
        base, noised, steps=20, validate_every=20, preservation={"kind": "noised", "weight": 10.0, "samples": 8}
    )
    assert moved(kept) < 0.5 * moved(free)


def test_a_killed_training_with_preservation_resumes_to_the_same_bytes(
    base: Path, latents: Latents, tmp_path: Path
) -> None:
    settings = train_settings(steps=6, validate_every=3, dropout=0.1, accumulation=2, preservation=NOISED)

    def run(folder: Path, killed_in_batch: int = 0) -> bytes:
        def kill() -> None:
            raise KeyboardInterrupt

        kept = replace(latents, preserved=predictions(base, latents, file=folder / "preserved.safetensors"))
        unet = load_unet(base)
        in_training_batch(unet, killed_in_batch, kill)
        train(unet, load_scheduler(base), kept, settings, seed=0, checkpoints=folder)
        return save_adapter(unet, folder / "adapter", Provenance()).read_bytes()

    expected = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", 19)  # in step 5: a step has two batches of images and two of preserved samples
    assert [path.name for path in (tmp_path / "killed").glob("*.pt")] == ["step-00000003.pt"]
    assert run(tmp_path / "killed") == expected


def test_the_predictions_are_computed_once_and_again_when_their_file_is_broken(
    base: Path, latents: Latents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "preserved.safetensors"
    first = predictions(base, latents, file=file)
    content = file.read_bytes()
    file.write_bytes(b"broken")
    predictions(base, latents, file=file)
    assert file.read_bytes() == content
    monkeypatch.setattr(preservation, "_predicted", None)
    second = predictions(base, latents, file=file)
    assert torch.equal(first.features, second.features)
    for one, other in zip(first.samples, second.samples, strict=True):
        assert all_equal(list(one), list(other))


@pytest.mark.parametrize("samples", [1, 3])
def test_accumulated_parts_share_the_preserved_samples(base: Path, noised: Latents, samples: int) -> None:
    kept = {"kind": "noised", "weight": 3.0, "samples": samples}
    whole, parts = (
        adapter_weights(run_training(base, noised, steps=4, accumulation=accumulation, preservation=kept)[1])
        for accumulation in (1, 2)
    )
    for first, second in zip(whole, parts, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


def test_low_memory_takes_preserved_samples_one_at_a_time(base: Path, noised: Latents) -> None:
    unet, rows = load_unet(base), set()
    unet.register_forward_pre_hook(lambda _, inputs: rows.add(len(inputs[0])))
    settings: dict[str, Any] = {"steps": 4, "batch_size": 2, "preservation": NOISED}
    train(unet, load_scheduler(base), noised, train_settings(**settings, low_memory=True), seed=0)
    assert rows == {1}
    pipeline = load_pipeline(base, device="cpu")
    pipeline.unet.register_forward_pre_hook(lambda _, inputs: rows.add(len(inputs[0])))
    small = train_settings(preservation={**NOISED, "kind": "both"}, low_memory=True)
    words = ["penguin"]
    preserve(pipeline, load_scheduler(base), noised.training, small, SAMPLING, class_words=words, seed=0)
    assert rows == {1, 2}  # the base draws guided pictures
    whole = adapter_weights(run_training(base, noised, **settings)[1])
    for first, second in zip(adapter_weights(unet), whole, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("low_memory", [False, True])
def test_preflight_measures_the_step_that_training_takes(
    base: Path, noised: Latents, low_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of each forward pass, and how many of them share a backward pass."""
    settings = train_settings(steps=1, batch_size=1, preservation=NOISED, low_memory=low_memory)
    events: list[object] = []
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward

    def noted(loss: torch.Tensor) -> None:
        events.append("backward")
        backward(loss)

    def listen(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if module.training:
            events.append(len(inputs[0]))

    monkeypatch.setattr(torch.Tensor, "backward", noted)

    unet = load_unet(base)
    unet.register_forward_pre_hook(listen)
    train(unet, load_scheduler(base), noised, settings, seed=0)
    trained, settings, params = events.copy(), settings_of(settings, 1), load_params(ROOT / "params.yaml")
    events.clear()
    model, part = params.base.model_copy(update={"model": str(base)}), StepPart.of(settings, processes=1)
    bench = rates._Bench(params.model_copy(update={"base": model, "train": settings}), 1.0)
    bench.unet.register_forward_pre_hook(listen)
    rates._TrainingStep(bench, part)(rates.Size(part.rows, 32))
    assert events == trained == ([1, 1, 1, 1, 1, "backward"] if low_memory else [1, 4, "backward"])


def test_latents_of_several_sizes_are_preserved(base: Path, pictures: Path, tmp_path: Path) -> None:
    settings = encode_settings(flip=False, aspect_ratio_buckets=True)
    encode_images(base, pictures, manifests(pictures), tmp_path, settings)
    latents = Latents.open(tmp_path)
    preserved = predictions(base, latents, "both")
    assert {sample.noisy.shape for sample in preserved.samples} > {torch.Size([4, 8, 8])}
    run_training(base, replace(latents, preserved=preserved), preservation={**NOISED, "kind": "both"})


@pytest.mark.slow
def test_the_profile_for_one_subject_trains_the_bundled_base_in_its_stage(
    tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BESTIARY_TRACKING", "off")
    for name in ("stages", "src", "models/base", "models/judge"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["profile"] = "subject"
    changes = {"steps": 2, "batch_size": 2, "validate_every": 2, "sheet_steps": 1}
    params["profiles"]["subject"]["train"] |= changes
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    random, rows = np.random.default_rng(0), []
    (tmp_path / "clean" / "sks_penguin").mkdir(parents=True)
    for number in range(4):
        path = f"sks_penguin/{number}.png"
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "clean" / path)
        rows.append({"path": path, "class": "sks_penguin", "sha256": str(number), "width": 64, "height": 64})
    for split, images in (("train", rows[:3]), ("val", rows[3:])):
        pd.DataFrame(images).to_csv(tmp_path / "clean" / f"{split}.csv", index=False)
    settings = encode_settings(resolution=64, flip=False)
    clean = tmp_path / "clean"
    encode_images(base_folder, clean, manifests(clean), tmp_path / "build" / "latents", settings)
    done = run_stage(tmp_path, "train")
    assert done.returncode == 0, done.stderr[-2000:]
    params_of = read_provenance(tmp_path / "models" / "adapter").params
    assert params_of
    assert params_of["preservation"] == {"kind": "noised", "weight": 0.3, "samples": 4}
    report = json.loads((tmp_path / "reports" / "results" / "train.json").read_text())
    assert report["trainable_parameters"] > 100_000
    assert not list((tmp_path / ".cache" / "train").glob("*/preserved.safetensors"))


def test_the_class_word_is_given_or_the_last_word_of_the_name() -> None:
    assert class_word_of(subject_of("sks_penguin")) == "penguin"
    assert class_word_of(Subject("momo", "Momo", "", class_word="cat")) == "cat"
    with pytest.raises(BestiaryError, match=r"class word of momo.* train\.preservation\.kind to none"):
        class_word_of(subject_of("momo"))


def test_a_class_word_that_is_also_the_subjects_name_is_refused(base: Path, latents: Latents) -> None:
    with pytest.raises(BestiaryError, match=r"'a photo of a zebra'.* class word"):
        predictions(base, latents, word="zebra")


def test_a_subject_that_is_taught_is_not_preserved_among_the_others(base: Path, latents: Latents) -> None:
    _, others = preservation._prompts(latents.training, ["penguin"])
    assert "a photo of an owl" in others
    assert "a photo of a zebra" not in others  # the latents teach it


def test_predictions_that_do_not_fit_the_settings_are_refused(base: Path, latents: Latents, noised: Latents) -> None:
    with pytest.raises(BestiaryError, match=r"train\.preservation\.kind is noised.* no predictions"):
        run_training(base, latents, preservation=NOISED)
    with pytest.raises(BestiaryError, match=r"train\.preservation\.kind is none.* predictions"):
        run_training(base, noised)


def test_the_class_word_of_a_thing_has_no_prompts_about_wild_animals(latents: Latents) -> None:
    about_class, _ = preservation._prompts(latents.training, ["coffee mug"])
    assert "a detailed photo of a coffee mug" in about_class
    assert "a drawing of a coffee mug" in about_class
    assert not [prompt for prompt in about_class if "wild" in prompt or "cute" in prompt]
    of_penguin, _ = preservation._prompts(latents.training, ["penguin"])
    assert "a wild penguin in its natural habitat" in of_penguin
