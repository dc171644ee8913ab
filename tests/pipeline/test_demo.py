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


def test_dvc_shows_the_metrics_and_draws_the_plots(demo: Project) -> None:
    told = demo.run(sys.executable, "-m", "dvc", "metrics", "show", "--json")
    metrics = {path: file["data"] for path, file in json.loads(told)[""]["data"].items()}
    assert set(metrics) == {f"reports/metrics/{stage}.json" for stage in STAGES}
    delta = demo.report("evaluate")["delta"]["margin"]["mean"]
    assert metrics["reports/metrics/evaluate.json"]["delta"]["margin"]["mean"] == delta
    told = demo.run(sys.executable, "-m", "dvc", "plots", "show", "--json")
    errors = json.loads(told).get("errors", [])
    assert not errors
    defined = yaml.safe_load((demo.folder / "dvc.yaml").read_text())["plots"]
    assert len(json.loads(told)["data"]) >= len(defined)


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
    typed = [command for command in commands(READMES[0]) if command.startswith("bestiary ")]
    assert len(typed) >= 5
    for command in typed:
        assert demo.bestiary(*shlex.split(command)[1:]).strip(), command
    assert len(list((demo.folder / "pictures").glob("panda-*.png"))) == 4
    assert (demo.folder / "my-adapter").is_dir()


def test_the_readmes_experiment_reruns_train_and_the_stages_after_it_only(demo: Project) -> None:
    for command in ("add --all", "commit --quiet --message demo"):
        demo.run("git", "-c", "user.name=demo", "-c", "user.email=demo@example.org", *shlex.split(command))
    typed = [shlex.split(command) for command in commands(READMES[0]) if command.startswith("dvc ")]
    told = {" ".join(words): demo.run(sys.executable, "-m", *words) for words in typed if words[1] != "add"}
    assert re.findall(r"^Running stage '(\w+)'", told["dvc exp run -S train.rank=8"], re.MULTILINE) == STAGES[4:]
    assert "trainable_parameters" in told["dvc metrics diff"]
    assert demo.report("register")["version"] == 2
    # What DVC did not run again is in the new version's lineage all the same.
    walk = json.loads(demo.bestiary("lineage", "models:/bestiary/2", "--json"))["steps"]
    assert sorted({step["stage"] for step in walk}) == sorted(STAGES)
    revisions = {step["stage"]: step["git"] for step in walk}
    assert not revisions["encode"]  # made before there was a commit
    assert demo.run("git", "rev-parse", "--short=10", "HEAD").strip() in revisions["train"]


def test_own_images_replace_the_sample(demo: Project) -> None:
    remove, add = [
        command for command in commands(READMES[0]) if "data" in command and not command.startswith("dvc exp")
    ]
    demo.run("sh", "-c", remove)
    for picture in (demo.folder / "data" / "tiger").iterdir():
        shutil.copy2(picture, demo.folder / "data" / "my-cat" / picture.name)
    shutil.rmtree(demo.folder / "data" / "tiger")
    demo.run(sys.executable, "-m", *shlex.split(add))
    assert demo.repro("split") == STAGES[:3]
    assert "my-cat" in (demo.folder / "build" / "split" / "train.csv").read_text()
