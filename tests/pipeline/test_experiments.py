"""The train stage killed, shared by two processes, and queued: in a copy of a project that has run once."""

import shutil
import sqlite3
from pathlib import Path

import pytest
from support.project import Project

pytestmark = pytest.mark.slow

ADAPTER = Path("models/adapter/pytorch_lora_weights.safetensors")
SHEET = Path("reports/train/sheet.png")
# Kills the stage between its first checkpoint and the next step: whoever looked from outside could come too late.
KILLED_AFTER_A_CHECKPOINT = """
import os, runpy, signal, sys
from bestiary.diffusion import checkpoints

save = checkpoints.save_checkpoint
def save_and_die(*arguments):
    save(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
checkpoints.save_checkpoint = save_and_die
sys.path.insert(0, "stages")
runpy.run_path("stages/train.py", run_name="__main__")
"""


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Project:
    return Project(Path(shutil.copytree(finished, tmp_path / "project")))


def trainings(project: Project, what: str) -> list[str]:
    """`what` of each finished MLflow run of the train stage, in the order of their start."""
    query = f"""
        SELECT {what} FROM runs JOIN tags ON tags.run_uuid = runs.run_uuid
        JOIN params ON params.run_uuid = runs.run_uuid AND params.key = 'train.rank'
        JOIN latest_metrics ON latest_metrics.run_uuid = runs.run_uuid AND latest_metrics.key = 'val_loss'
        WHERE tags.key = 'stage' AND tags.value = 'train' AND runs.status = 'FINISHED' ORDER BY runs.start_time
    """
    with sqlite3.connect(project.folder / "mlflow.db") as database:
        return [row[0] for row in database.execute(query)]


def test_a_train_stage_killed_after_a_checkpoint_ends_with_the_same_adapter(project: Project) -> None:
    before, sheet = ((project.folder / path).read_bytes() for path in (ADAPTER, SHEET))
    (project.folder / ADAPTER).unlink()
    shutil.rmtree(project.folder / SHEET.parent)
    project.change(train={"checkpoint_seconds": 0.0})
    # As a queued experiment runs: in a copy that goes with it, while DVC_ROOT is the project.
    copy = Path(shutil.copytree(project.folder, project.folder.with_name("copy")))
    queued = Project(copy, {"DVC_ROOT": str(project.folder)})
    queued.run("sh", "-c", 'python -c "$1"; test $? = 137', "sh", KILLED_AFTER_A_CHECKPOINT)
    shutil.rmtree(copy)
    assert not (project.folder / ADAPTER).exists()
    assert " 50%" in project.run("python", "stages/train.py")  # where its bar begins
    assert (project.folder / ADAPTER).read_bytes() == before
    assert (project.folder / SHEET).read_bytes() == sheet  # with the rows that were drawn before the kill
    assert not list((project.folder / ".cache" / "train").iterdir())


def test_two_processes_of_a_stage_give_the_result_of_one_and_log_one_run(project: Project) -> None:
    before = {stage: project.report(stage) for stage in ("encode", "train", "evaluate")}
    runs = len(trainings(project, "runs.run_uuid"))
    project.environment["BESTIARY_LAUNCH"] = "torchrun --standalone --nproc_per_node 2"
    repro = ("--force", "--no-run-cache", "--single-item")
    assert project.repro(*repro, *before) == list(before)
    after = {stage: project.report(stage) for stage in before}
    assert {**after["encode"], **before["encode"]} == before["encode"]
    assert after["train"]["val_loss"] == pytest.approx(before["train"]["val_loss"], abs=1e-5)
    assert after["train"]["clip_score"] == pytest.approx(before["train"]["clip_score"], abs=0.5)
    assert len(trainings(project, "runs.run_uuid")) == runs + 1
    for row in ("base", "adapter"):
        scores = [report["evaluate"][row]["clip_score"]["mean"] for report in (before, after)]
        assert scores[0] == pytest.approx(scores[1], abs=0.5)
    project.environment["BESTIARY_LAUNCH"] = "accelerate launch --num_processes 1"  # more, on CPUs, would need MPI
    assert project.repro(*repro, "encode") == ["encode"]


def test_queued_experiments_are_side_by_side_in_mlflow(project: Project) -> None:
    for command in ("git add --all", "git -c user.name=a -c user.email=a@example.org commit --quiet --message before"):
        project.run(*command.split())
    project.run("dvc", "exp", "run", "--queue", "-S", "train.rank=2,8", "train")
    project.run("dvc", "exp", "run", "--run-all")
    assert sorted(int(rank) for rank in trainings(project, "params.value")) == [2, 4, 8]
    assert len(set(trainings(project, "latest_metrics.value"))) == 3
    told = project.run("dvc", "exp", "show", "--csv", "--only-changed")
    assert all(rank in told for rank in ("2", "8"))
    revision = project.run("git", "rev-parse", "HEAD").strip()
    with sqlite3.connect(project.folder / "mlflow.db") as database:
        query = "SELECT DISTINCT value FROM tags WHERE key = 'mlflow.source.git.commit'"
        assert database.execute(query).fetchall() == [(revision,)]
        query = "SELECT COUNT(*) FROM tags WHERE key = 'git_dirty'"
        assert database.execute(query).fetchone()[0] >= 4  # two trainings and their pipelines
