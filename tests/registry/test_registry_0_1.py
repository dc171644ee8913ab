"""A registry, a picture and a converted adapter that version 0.1.0 wrote still work: see fixtures/registry-0.1."""

import json
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pandas as pd
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from support.registry import DEFAULTS, RULES, make_adapter, submit

from bestiary import png_metadata
from bestiary.diffusion.adapter import adapter_sha256
from bestiary.diffusion.conversion import convert
from bestiary.errors import BestiaryError
from bestiary.evaluation.report import EvaluationReport, read_evaluation
from bestiary.params import Evaluate
from bestiary.png_metadata import read_settings, write_png
from bestiary.registry import model_card
from bestiary.registry.aliases import promote, rollback
from bestiary.registry.gate import CHALLENGER, CHAMPION, measurement_hash
from bestiary.registry.registering import Submission, register
from bestiary.registry.resolving import find_base, pull, resolve
from bestiary.registry.tags import defaults_of
from bestiary.registry.versions import artifact, find_version, versions, walk
from bestiary.samplers import DrawingDefaults, Sampling
from bestiary.tracking.store import open_client, tracking_uri

PICTURE = Path(__file__).parents[1] / "fixtures" / "registry-0.1" / "tiger-7.png"
SHA256 = "0f01765d39dc6a243f1664d7317de497674792caf8d7726201f1fd033f661cc6"
SAMPLING = Sampling(
    "dpmsolver++sde", steps=13, guidance_scale=7.0, guidance_interval=(2.0, 1000.0), width=64, height=64
)
# The sample profile's evaluation in 0.1.0.
EVALUATE = Evaluate(
    template="a photo of {}",
    bootstrap_resamples=10_000,
    seeds=24,
    steps=13,
    guidance_scale=7.0,
    scheduler="dpmsolver++sde",
    batch_size=24,
    guidance_interval=(2.0, 1000.0),
    classes=None,
    second_judge=None,
    proof=None,
    adapter_weight=None,
    sweep=None,
)


def old_evaluation(project: Path) -> EvaluationReport:
    _, steps = walk("models:/bestiary@champion")
    file = artifact(next(step.run_id for step in steps if step.stage == "evaluate"), "evaluate.json", project)
    assert file
    return read_evaluation(file)


# ---- reading ----


def test_its_champion_is_found_verified_and_draws_by_default_as_it_did(old_project: Path) -> None:
    (version,) = versions()
    assert (version.version, version.aliases) == (1, [CHAMPION])
    assert find_version("models:/bestiary@champion") == version
    assert defaults_of(version) == DrawingDefaults("a photo of {}", SAMPLING)
    assert json.loads(DrawingDefaults("a photo of {}", SAMPLING).to_json()) == json.loads(version.tags["usual"])
    adapter = resolve("models:/bestiary@champion")
    assert (adapter.uri, adapter.base, adapter.base_revision) == ("models:/bestiary/1", "./models/base", None)
    assert adapter_sha256(adapter.file) == SHA256
    assert adapter.defaults == defaults_of(version)
    assert Path(find_base(adapter)).samefile(old_project / "models" / "base")


def test_its_lineage_leads_back_to_the_data(old_project: Path) -> None:
    version, steps = walk("models:/bestiary/1")
    assert steps[0].run_id == version.run_id
    stages = {step.stage: step for step in steps}
    assert set(stages) == {"download", "clean", "split", "encode", "train", "evaluate", "benchmark", "register"}
    assert ("data", "b418edd8e7d2f846446a7cb7a023d1d8.dir", None) in stages["download"].inputs


@pytest.fixture
def old_base(old_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the bundled base were still that of 0.1, which no longer ships."""
    trained_on = versions()[0].tags["base_sha256"]
    for module in ("bestiary.diffusion.adapter", "bestiary.registry.registering"):
        if hasattr(sys.modules[module], "base_sha256"):
            monkeypatch.setattr(f"{module}.base_sha256", lambda *_: trained_on)


def test_it_does_not_draw_on_another_base(old_project: Path) -> None:
    with pytest.raises(BestiaryError, match=r"models:/bestiary/1 was trained on another base than .*--base"):
        pull("models:/bestiary@champion", old_project / "mine")


@pytest.mark.usefixtures("old_base")
def test_its_champion_can_be_pulled(old_project: Path) -> None:
    file = pull("models:/bestiary@champion", old_project / "mine")
    assert adapter_sha256(file) == SHA256


def test_a_model_card_can_be_written_of_it(old_project: Path) -> None:
    files = model_card.write("models:/bestiary@champion", old_project / "card")
    assert [file.name for file in files] == ["pytorch_lora_weights.safetensors", "sheet.png", "README.md"]
    card = ModelCard.load(old_project / "card" / "README.md")
    assert "| CLIP score | 54.67 | 92.12 | +37.45 (+34.20 to +40.82) | 94.52 |" in card.text
    assert 'pipeline("a photo of a tiger", num_inference_steps=13, guidance_scale=7, generator=seed)' in card.text
    assert "batch_size 24" in card.text  # the evaluation's settings


# ---- the gate ----


def test_its_measurement_hash_can_be_computed_again(old_project: Path) -> None:
    version, steps = walk("models:/bestiary@champion")
    inputs = {path: content for step in steps if step.stage == "evaluate" for path, content, _ in step.inputs}
    measured = measurement_hash(
        old_evaluation(old_project),
        EVALUATE,
        base_sha256=version.tags["base_sha256"],
        judge=inputs["models/judge"],
        resolution=64,
        seed=0,
    )
    assert measured == version.tags["measured"]


@pytest.mark.parametrize(("gain", "alias"), [(1.5, CHAMPION), (-1.5, CHALLENGER)])
def test_a_new_adapter_is_compared_with_its_champion(old_project: Path, gain: float, alias: str) -> None:
    champion = find_version("models:/bestiary@champion")
    table = artifact(champion.run_id, "gate/pictures.csv", old_project)
    assert table
    pictures = pd.read_csv(table)
    pictures["adapter_margin"] += gain
    pictures.to_csv(old_project / "pictures.csv", index=False)
    adapter = make_adapter(old_project / "models" / "base", old_project / "adapter", 0, named_base="models/base")
    client = open_client(tracking_uri(), old_project)
    registration = register(
        Submission(
            adapter=adapter,
            base="models/base",
            base_revision=None,
            evaluation=old_evaluation(old_project).model_copy(update={"adapter_sha256": adapter_sha256(adapter)}),
            reported={},
            pictures=old_project / "pictures.csv",
            defaults=DEFAULTS,
            measured=champion.tags["measured"],
            run_id=client.create_run("1").info.run_id,
        ),
        RULES,
    )
    assert (registration.version, registration.aliases) == (2, [alias])
    assert (
        f"version 1{', is better' if gain < 0 else ''}: margin over other subjects {gain:+.2f}"
        in registration.reasons[-1]
    )


@pytest.mark.usefixtures("old_base")
def test_its_adapter_is_registered_once(old_project: Path) -> None:
    adapter = resolve("models:/bestiary/1").file
    registration = submit(old_project, "models/base", adapter)
    assert (registration.version, registration.aliases) == (1, [CHAMPION])
    assert len(versions()) == 1


def test_its_champion_can_be_replaced_and_restored_by_hand(old_project: Path) -> None:
    adapter = make_adapter(old_project / "models" / "base", old_project / "adapter", 0, named_base="models/base")
    submit(old_project, "models/base", adapter)
    assert [version.aliases for version in versions()] == [[CHAMPION], [CHALLENGER]]
    promote(2, "it draws better owls")
    assert [version.aliases for version in versions()] == [[], [CHAMPION]]
    assert rollback("and worse tigers").version == 1
    assert find_version("models:/bestiary@champion").version == 1


# ---- pictures and converted adapters ----


def test_the_settings_of_its_picture_are_read_and_written_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read_settings(PICTURE)
    assert (settings.prompt, settings.seed, settings.sampling) == ("a photo of a tiger", 7, SAMPLING)
    assert (settings.base, settings.adapter, settings.adapter_sha256) == ("./models/base", "models:/bestiary/1", SHA256)
    monkeypatch.setattr(png_metadata, "__version__", "0.1.0")
    with Image.open(PICTURE) as picture:
        written = Image.open(BytesIO(write_png(picture, settings)))
        assert written.info == picture.info


@pytest.mark.slow
def test_its_picture_is_not_drawn_again_on_another_base(old_project: Path) -> None:
    command = [sys.executable, "-c", "from bestiary.cli import main; main()"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    arguments = ["generate", "--like", str(PICTURE), "--out", "again"]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "models:/bestiary/1 was trained on another base" in done.stderr.splitlines()[-1]
    assert not (old_project / "again").exists()


def test_its_converted_adapter_converts_back_to_the_same_weights(old_project: Path) -> None:
    back = convert(old_project / "kohya.safetensors", old_project / "back.safetensors", "diffusers")
    converted, original = load_file(back), load_file(resolve("models:/bestiary/1").file)
    assert converted.keys() == original.keys()
    assert all((converted[key] == original[key]).all() for key in original)
