"""The whole pipeline with its real stages, on a few pictures, in a copy of the project."""

import csv
import hashlib
import json
import re
import shlex
import shutil
import sqlite3
import sys

import pytest
import yaml
from support.project import STAGES, Project
from support.readme import READMES, commands

pytestmark = pytest.mark.slow

CLASSES, PICTURES = ("panda", "tiger", "zebra"), 12  # of the fixture


def test_every_stage_leaves_its_report(demo: Project) -> None:
    assert demo.report("clean")["images_kept"] > 0
    assert demo.report("split")["leaked_groups"] == 0
    assert demo.report("train")["steps"] == 6
    sha256 = hashlib.sha256((demo.folder / "models/adapter/pytorch_lora_weights.safetensors").read_bytes()).hexdigest()
    assert demo.report("evaluate")["adapter_sha256"] == demo.report("register")["adapter_sha256"] == sha256
    assert demo.report("register")["version"] == 1
    assert "models:/bestiary/1" in demo.bestiary("results")


def test_the_training_curve_is_in_the_report_and_under_the_same_names_in_mlflow(demo: Project) -> None:
    with (demo.folder / "reports/train/history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "epoch", "train_loss", "val_loss", "clip_score", "learning_rate", "grad_norm"]
    assert [row["step"] for row in rows if row["clip_score"]] == ["0", "3", "6"]
    query = """
        SELECT metrics.step, metrics.key, metrics.value FROM metrics
        JOIN tags ON tags.run_uuid = metrics.run_uuid AND tags.key = 'stage' AND tags.value = 'train'
    """
    with sqlite3.connect(demo.folder / "mlflow.db") as database:
        logged = {(str(step), key): value for step, key, value in database.execute(query)}
    for row in rows:
        for name in row.keys() - {"step"}:
            if row[name]:
                assert logged[row["step"], name] == pytest.approx(float(row[name]))
    assert ("6", "images_per_second") in logged  # in MLflow only, because it differs every time
    assert {path.name for path in (demo.folder / "reports/train/steps").iterdir()} == {"0.png", "3.png", "6.png"}


def test_a_second_repro_runs_no_stage(demo: Project) -> None:
    assert demo.repro() == []


def test_the_registered_version_draws_a_tiger(demo: Project) -> None:
    from PIL import Image

    alias = demo.report("register")["aliases"][0]
    told = demo.bestiary("generate", "tiger", "--adapter", f"models:/bestiary@{alias}", "--steps", "2")
    path = next(line for line in told.splitlines() if line.endswith(".png"))  # among the progress bar's lines
    picture = Image.open(demo.folder / path)
    assert picture.size == (64, 64)


def test_dvc_shows_a_few_metrics_and_draws_the_plots(demo: Project) -> None:
    told = demo.run(sys.executable, "-m", "dvc", "metrics", "show", "--json")
    metrics = {path: file["data"] for path, file in json.loads(told)[""]["data"].items()}
    with_metrics = set(STAGES) - {"encode", "benchmark"}  # their results are not for comparing two runs
    assert set(metrics) == {f"reports/metrics/{stage}.json" for stage in with_metrics}
    delta = demo.report("evaluate")["delta"]
    gains = {score: {"mean": delta[score]["mean"]} for score in ("clip_score", "margin", "top1")}
    assert metrics["reports/metrics/evaluate.json"]["delta"] == gains
    assert len(re.findall(r": -?[\d.\"]", json.dumps(metrics))) <= 30
    told = demo.run(sys.executable, "-m", "dvc", "plots", "show", "--json")
    errors = json.loads(told).get("errors", [])
    assert not errors
    defined = yaml.safe_load((demo.folder / "dvc.yaml").read_text())["plots"]
    assert len(json.loads(told)["data"]) >= len(defined)


def test_the_pipelines_run_in_mlflow_has_headlines_a_table_and_the_sheet(demo: Project) -> None:
    query = """
        SELECT (SELECT COUNT(*) FROM latest_metrics WHERE run_uuid = runs.run_uuid), note.value, evaluation.run_uuid
        FROM runs JOIN tags stage ON stage.run_uuid = runs.run_uuid AND stage.key = 'stage' AND stage.value = 'pipeline'
        JOIN tags note ON note.run_uuid = runs.run_uuid AND note.key = 'mlflow.note.content'
        JOIN tags parent ON parent.key = 'mlflow.parentRunId' AND parent.value = runs.run_uuid
        JOIN tags evaluation ON evaluation.run_uuid = parent.run_uuid AND evaluation.key = 'stage'
            AND evaluation.value = 'evaluate'
    """
    with sqlite3.connect(demo.folder / "mlflow.db") as database:
        ((metrics, note, evaluation),) = database.execute(query).fetchall()
    assert metrics <= 30
    assert "| margin over other subjects |" in note
    assert f"path=evaluate%2Fsheet.png&run_uuid={evaluation}" in note
    assert (demo.folder / "mlruns" / evaluation / "artifacts/evaluate/sheet.png").is_file()


def test_lineage_leads_from_the_version_back_to_the_data(demo: Project) -> None:
    told = json.loads(demo.bestiary("lineage", "models:/bestiary/1", "--json"))
    steps = {step["stage"]: step for step in told["steps"]}
    assert sorted(steps) == sorted(STAGES)
    data = yaml.safe_load((demo.folder / "data.dvc").read_text())["outs"][0]["md5"]
    assert ["data", data, None] in steps["download"]["inputs"]


def test_two_runs_from_scratch_give_the_same_adapter_to_the_byte(demo: Project) -> None:
    adapter = demo.folder / "models/adapter/pytorch_lora_weights.safetensors"
    first = adapter.read_bytes()
    assert demo.repro("--force", "--no-run-cache", "train") == STAGES[:5]
    assert adapter.read_bytes() == first


def test_the_readmes_bestiary_commands_work(demo: Project) -> None:
    demo.bestiary("promote", "1", "--because", "six steps do not earn it")
    typed = [command for command in commands(READMES[0], "Use the adapter") if command.startswith("bestiary ")]
    assert len(typed) >= 5
    for command in typed:
        assert demo.bestiary(*shlex.split(command)[1:]).strip(), command
    assert len(list((demo.folder / "pictures").glob("panda-*.png"))) == 4
    assert (demo.folder / "my-adapter").is_dir()


def test_the_readmes_commands_make_store_and_draw_a_fast_variant(demo: Project) -> None:
    pytest.importorskip("openvino")
    everything_passes = dict.fromkeys(("clip_score", "margin", "top1", "cmmd", "likeness"), 1000.0)
    demo.change(
        distill={"steps": 2, "batch_size": 4, "validate_every": 2, "sheet_animals": 1, "teacher_steps": 5},
        accept={"max_loss": everything_passes, "min_diversity": 0.0, "max_copied": 1.0, "reference_steps": 2},
    )
    demo.change(accept={"extra_seeds": 6, "reference_seeds": 7, "timed_pictures": 1})
    make, *typed = commands(READMES[0], "Draw faster")
    assert make == "make fast"
    recipe = (demo.folder / "Makefile").read_text().partition("\nfast:")[2].split("\n")[1].strip()
    assert recipe == "@dvc repro fast/dvc.yaml"
    told = demo.run(sys.executable, "-m", *shlex.split(recipe.removeprefix("@")))
    stages = re.findall(r"^Running stage 'fast/dvc.yaml:(\w+)'", told, re.MULTILINE)
    assert stages == ["distill", "export", "accept", "attach"]
    for command in typed:
        assert demo.bestiary(*shlex.split(command)[1:]).strip(), command
    assert (demo.folder / "my-fast-adapter" / "openvino" / "unet" / "openvino_model.xml").is_file()
    assert len(list((demo.folder / "fast-pictures").glob("tiger-*.png"))) == 5


def test_the_readmes_experiment_reruns_train_and_the_stages_after_it_only(demo: Project) -> None:
    for command in ("add --all", "commit --quiet --message demo"):
        demo.run("git", "-c", "user.name=demo", "-c", "user.email=demo@example.org", *shlex.split(command))
    told = {}
    for command in commands(READMES[0], "How it works"):
        program, *words = shlex.split(command)
        told[command] = (
            demo.bestiary(*words) if program == "bestiary" else demo.run(sys.executable, "-m", program, *words)
        )
    assert re.findall(r"^Running stage '(\w+)'", told["dvc exp run -S train.rank=8"], re.MULTILINE) == STAGES[4:]
    head, *lines = told["bestiary compare"].splitlines()
    assert head.split()[:2] == ["workspace", "HEAD"]  # and the experiment
    rows = {line[:33].strip(): line[33:].split()[:2] for line in lines}
    assert rows["train.rank"] == ["8", "4"]
    assert rows["registered version"] == ["2", "1"]
    assert len(rows) <= 20
    assert demo.report("register")["version"] == 2
    # What DVC did not run again is in the new version's lineage all the same.
    walk = json.loads(demo.bestiary("lineage", "models:/bestiary/2", "--json"))["steps"]
    assert sorted({step["stage"] for step in walk}) == sorted(STAGES)
    revisions = {step["stage"]: step["git"] for step in walk}
    assert not revisions["encode"]  # made before there was a commit
    assert demo.run("git", "rev-parse", "--short=10", "HEAD").strip() in revisions["train"]


def test_after_the_demo_ones_own_images_replace_the_drawings_and_the_drawings_come_back(demo: Project) -> None:
    remove, make, add, repro = commands(READMES[0], "Your own images")
    for command in (remove, make):
        demo.run("sh", "-c", command)
    for number, picture in enumerate(sorted((demo.folder / "samples" / "tiger").iterdir())):
        shutil.copy2(picture, demo.folder / "data" / ("my-cat" if number % 2 else "my-dog") / picture.name)
    demo.run(sys.executable, "-m", *shlex.split(add))
    assert demo.repro(*shlex.split(repro)[2:], "split") == STAGES[:3]
    assert set(demo.report("split")["per_class"]) == {"my-cat", "my-dog"}
    assert demo.report("download")["images"] == PICTURES
    demo.run("sh", "-c", "rm -rf data && git checkout --quiet HEAD data.dvc")
    demo.repro("split")
    assert set(demo.report("split")["per_class"]) == set(CLASSES)
