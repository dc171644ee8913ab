import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from support.registry import evaluation, make_adapter, one_subject, submit

from bestiary.diffusion.adapter import adapter_sha256
from bestiary.errors import BestiaryError
from bestiary.evaluation.report import EvaluationReport
from bestiary.registry import model_card
from bestiary.registry.versions import versions
from bestiary.subjects import Subject
from bestiary.tracking.store import open_client, tracking_uri

GAINS = {"antelope": 3.0, "bee": 9.0, "ladybugs": -2.0, "owl": 5.0, "tiger": 8.0, "zebra": 1.0}


def log_evaluation(project: Path, report: EvaluationReport) -> None:
    """An evaluation's run as the stage leaves it, and the registered version's run based on it."""
    client = open_client(tracking_uri(), project)
    (project / "evaluate.json").write_text(report.model_dump_json())
    Image.new("RGB", (8, 8)).save(project / "sheet.png")
    tags = {"stage": "evaluate", "output.reports/evaluate.json": "e1", "input.models/adapter": "a1"}
    run = client.create_run("0", tags=tags).info.run_id
    client.log_param(run, "evaluate.steps", 10)
    client.log_artifact(run, str(project / "evaluate.json"))
    client.log_artifact(run, str(project / "sheet.png"), "evaluate")
    client.set_terminated(run)
    registered = versions()[0].run_id
    client.set_tag(registered, "stage", "register")
    client.set_tag(registered, "input.reports/evaluate.json", "e1")


@pytest.fixture
def report(project: Path, base_folder: Path) -> EvaluationReport:
    """The report of the one registered version."""
    adapter = make_adapter(base_folder, project / "adapter", 0)
    submit(project, base_folder, adapter)
    return evaluation(adapter_sha256(adapter), gains_by_class=GAINS)


def test_a_card_holds_scores_pictures_and_provenance_and_the_hub_can_read_it(
    project: Path, report: EvaluationReport
) -> None:
    log_evaluation(project, report)
    files = model_card.write("models:/bestiary@champion", project / "out")
    assert [file.name for file in files] == ["pytorch_lora_weights.safetensors", "sheet.png", "README.md"]
    assert sorted(file.name for file in (project / "out").iterdir()) == sorted(file.name for file in files)
    read = ModelCard.load(project / "out" / "README.md")
    assert read.data.pipeline_tag == "text-to-image"
    assert read.data.eval_results is not None
    assert {result.metric_type: result.metric_value for result in read.data.eval_results} == {
        "clip_score": 25.0, "margin": 25.0, "top1": 25.0,
    }  # fmt: skip
    assert "| CLIP score | 20.00 | 25.00 | +5.00 (+4.00 to +6.00) | 30.00 |" in read.text
    assert "gains most on bee (+9.0), tiger (+8.0), owl (+5.0), and least on antelope (+3.0), zebra" in read.text
    assert "0.00 (95 % interval -0.10 to 0.10)" in read.text  # the share of copied pictures
    assert "](sheet.png)" in read.text
    assert 'pipeline("a drawing of a tiger", num_inference_steps=5, guidance_scale=3, generator=seed)' in read.text
    assert "| evaluate | " in read.text
    assert "models/adapter `a1`" in read.text
    assert "Settings of evaluate: steps 10." in read.text
    assert report.adapter_sha256 in read.text
    assert "an antelope" in read.content


def test_a_card_says_where_other_programs_want_the_adapter_and_which_base_they_need(
    project: Path, report: EvaluationReport
) -> None:
    version = versions()[0]
    hub = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    on_the_hub = replace(version, tags={**version.tags, "base": hub})
    card = model_card.render(on_the_hub, [], report, {})
    assert f"Both need `{hub}` as their checkpoint" in card
    assert "`models/Lora`" in card
    assert "`a drawing of a tiger <lora:my-adapter:1>`" in card
    assert "`models/loras`" in card
    bundled = replace(version, tags={**version.tags, "base": "./models/base"})
    card = model_card.render(bundled, [], report, {})
    assert "A1111 and ComfyUI cannot load this base" in card
    assert "lora:" not in card


@pytest.mark.parametrize("logged", ["nothing", "another adapter's"])
def test_a_card_is_written_from_the_versions_own_run_when_the_evaluations_run_is_gone(
    project: Path, report: EvaluationReport, logged: str
) -> None:
    if logged == "nothing":  # the database was made anew since the evaluation
        client = open_client(tracking_uri(), project)
        client.set_tag(versions()[0].run_id, "stage", "register")
    else:
        log_evaluation(project, report.model_copy(update={"adapter_sha256": "of another"}))
    model_card.write("models:/bestiary/1", project / "out")
    card = (project / "out" / "README.md").read_text()
    assert "| CLIP score | 20.00 | 25.00 | +5.00 (+4.00 to +6.00) | 30.00 |" in card


def test_no_card_is_written_without_the_versions_own_evaluation(project: Path, report: EvaluationReport) -> None:
    log_evaluation(project, report.model_copy(update={"adapter_sha256": "of another"}))
    (project / "mlruns" / "0" / versions()[0].run_id / "artifacts" / "gate" / "evaluate.json").unlink()
    with pytest.raises(BestiaryError, match=r"no evaluation of models:/bestiary/1\..* `dvc repro --force"):
        model_card.write("models:/bestiary/1", project / "out")
    assert not (project / "out").exists()


def test_a_card_of_one_subject_draws_that_subject_and_has_one_measure_of_copying(
    project: Path, report: EvaluationReport
) -> None:
    described = json.dumps({"pip": {**asdict(Subject("pip", "sks penguin", "", class_word="penguin", given=True))}})
    version = versions()[0]
    version = replace(version, tags={**version.tags, "subjects": described})
    alone = one_subject()
    alone = alone.model_copy(update={"per_class": {"pip": alone.per_class["owl"]}})
    card = model_card.render(version, [], alone, {})
    assert 'pipeline("a drawing of sks penguin", ' in card
    assert "tiger" not in card
    assert "Copying: 0.10 (95 % interval -0.20 to 0.40)" in card
    assert "look copied" not in card
    assert "look copied" in model_card.render(version, [], report, {})
