import logging
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.example_runs import one_run, stored_runs, write

from bestiary.errors import BestiaryError
from bestiary.tracking.content import content_hash
from bestiary.tracking.runs import Run
from bestiary.tracking.store import open_client, tracking_uri

ROOT = Path(__file__).parents[2]


def test_runs_with_the_same_pipeline_key_share_a_parent(project: Path) -> None:
    for stage, key in (("clean", "a"), ("clean", "b"), ("split", "a")):
        with one_run(stage, key):
            pass
    parents = {run.data.tags["pipeline"]: run.info.run_id for run in stored_runs(project, "pipeline")}
    assert sorted(parents) == ["a", "b"]
    for run in stored_runs(project, "clean") + stored_runs(project, "split"):
        assert run.data.tags["mlflow.parentRunId"] == parents[run.data.tags["pipeline"]]


def test_a_run_carries_params_metrics_artifacts_inputs_and_outputs(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a stage's paths are relative to the working folder
    data = write(tmp_path / "data" / "tiger.txt", "stripes") and content_hash(Path("data"))
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"png")
    made = write(tmp_path / "build" / "split" / "train.csv", "path") and content_hash(Path("build/split"))
    with one_run(inputs=["data", "gone"]) as run:
        for step in range(3):
            run.log_metrics({"loss": 1.0 / (step + 1)}, step)
        run.log_summary({"rows{scheduler=dpmsolver++}": 2, "loss": 0.25})
        run.log_artifact(picture, "pictures")
        run.log_outputs(["build/split", "gone"])
        run_id = run.id
    client = open_client(tracking_uri(), project)
    stored = client.get_run(run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"seed": "1"}
    assert stored.data.metrics == {"loss": pytest.approx(1 / 3), "rows_scheduler_dpmsolver___": 2.0}
    assert [point.step for point in client.get_metric_history(run_id, "loss")] == [0, 1, 2]
    assert stored.data.tags["input.data"] == data
    assert stored.data.tags["output.build/split"] == made
    assert not [key for key in stored.data.tags if key.endswith(".gone")]
    assert [entry.dataset.digest for entry in stored.inputs.dataset_inputs] == [data]
    assert (project / "mlruns" / run_id / "artifacts" / "pictures" / "picture.png").read_bytes() == b"png"
    results = client.get_run(stored.data.tags["mlflow.parentRunId"]).data.metrics
    assert results == {"split.rows_scheduler_dpmsolver___": 2.0, "split.loss": 0.25}


def test_the_pipelines_run_has_the_headlines_and_a_description_with_the_sheet(project: Path) -> None:
    with one_run("evaluate") as run:
        run.log_summary({"adapter.margin.mean": 76.9, "floor.margin.mean": -4.4}, ["adapter.margin.mean"])
        run.describe_pipeline("| score | base |\n|---|---|\n| CLIP score | 54.67 |", "evaluate/sheet.png")
        run_id = run.id
    (pipeline,) = stored_runs(project, "pipeline")
    assert pipeline.data.metrics == {"evaluate.adapter.margin.mean": 76.9}
    description = pipeline.data.tags["mlflow.note.content"]
    assert "| CLIP score | 54.67 |" in description
    assert f"(get-artifact?path=evaluate%2Fsheet.png&run_uuid={run_id})" in description


def test_a_failing_body_leaves_a_failed_run_with_its_error(project: Path) -> None:
    with pytest.raises(BestiaryError), one_run():
        raise BestiaryError("The data folder is empty.")
    run = stored_runs(project, "split")[0]
    assert run.info.status == "FAILED"
    assert run.data.tags["error"] == "The data folder is empty."


def test_a_killed_stage_is_marked_killed(project: Path) -> None:
    code = "from bestiary.tracking.runs import open_run\nimport time\nwith open_run('split', {}, [], 'a') as run:\n"
    code += "    print(run.id, flush=True)\n    time.sleep(600)"
    stage = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        text=True,
    )
    assert stage.stdout is not None
    run_id = stage.stdout.readline().strip()
    stage.send_signal(signal.SIGKILL)
    stage.wait()
    client = open_client(tracking_uri(), project)
    for _ in range(600):
        run = client.get_run(run_id)
        if run.info.status != "RUNNING":
            break
        time.sleep(0.1)
    assert run.info.status == "KILLED"
    assert run.data.tags["error"] == "the stage was killed"


def start_recorder_and_kill_it(project: Path) -> str:
    """Open a run whose recorder and stage are killed, as by a power failure. Returns the run's id."""
    code = (
        "from bestiary.tracking.runs import open_run\nimport os, signal\nwith open_run('split', {}, [], 'a') as run:\n"
    )
    code += "    print(run.id, flush=True)\n    os.kill(run._recorder.pid, signal.SIGKILL)\n    os.kill(os.getpid(), 9)"
    stage = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False, text=True)
    return stage.stdout.strip()


@pytest.mark.slow
def test_the_next_run_marks_orphaned_runs_as_killed_and_no_other(project: Path) -> None:
    dead = start_recorder_and_kill_it(project)
    client = open_client(tracking_uri(), project)
    assert client.get_run(dead).info.status == "RUNNING"
    with one_run(key="alive") as run:
        # The same host name and the id of a process that is not in this container: a run of another one.
        client.set_tag(run.id, "host", platform.node())
        client.set_tag(run.id, "recorder", "4194304")
        with one_run(key="next"):
            pass
        assert client.get_run(run.id).info.status == "RUNNING"
    killed = client.get_run(dead)
    assert (killed.info.status, killed.data.tags["error"]) == ("KILLED", "the machine went down")
    assert list((project / ".cache" / "running").iterdir()) == []


def test_a_run_with_odd_tags_does_not_stop_the_next_run(project: Path) -> None:
    with one_run() as run:
        run_id = run.id
    client = open_client(tracking_uri(), project)
    client.set_tag(run_id, "recorder", "abc")
    client.delete_tag(run_id, "mlflow.parentRunId")
    client.update_run(run_id, "RUNNING")
    with one_run(key="next"):
        pass
    assert stored_runs(project, "split")[-1].info.status == "FINISHED"


def test_artifacts_are_stored_in_the_project_from_any_working_folder(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    Path("note.txt").write_text("x")
    with one_run() as run:
        run.log_artifact("note.txt")
        run_id = run.id
    assert (project / "mlruns" / run_id / "artifacts" / "note.txt").is_file()
    assert [path.name for path in elsewhere.iterdir()] == ["note.txt"]


def test_nothing_is_recorded_when_tracking_is_off(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BESTIARY_TRACKING", "off")
    before = (project / "mlflow.db").read_bytes()
    with one_run() as run:
        run.log_metrics({"loss": 0.5})
        run.log_artifact(project / "mlflow.db")
        with pytest.raises(BestiaryError, match="BESTIARY_TRACKING=off"):
            _ = run.id
    assert (project / "mlflow.db").read_bytes() == before
    assert [path.name for path in project.iterdir()] == ["mlflow.db"]


def test_runs_are_named_after_their_dvc_experiment(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "rank-8")
    with one_run():
        pass
    assert [run.info.run_name for run in stored_runs(project, "split") + stored_runs(project, "pipeline")] == [
        "split rank-8",
        "rank-8",
    ]


def test_a_run_has_system_metrics_and_a_series_of_pictures(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    with one_run() as run:
        for step in (0, 100):
            Image.new("RGB", (8, 8), (step, 0, 0)).save(tmp_path / f"{step}.png")
            run.log_image(tmp_path / f"{step}.png", "sheet", step)
        run_id = run.id
        client = open_client(tracking_uri(), project)
        for _ in range(600):
            if "system/cpu_utilization_percentage" in (metrics := client.get_run(run_id).data.metrics):
                break
            time.sleep(0.1)
    assert 0 <= metrics["system/cpu_utilization_percentage"] <= 100
    assert metrics["system/system_memory_usage_megabytes"] > 0
    images = [entry.path for entry in client.list_artifacts(run_id, "images") if entry.path.endswith("png")]
    assert {re.split(r"\W", path.rpartition("/")[2])[2] for path in images} == {"0", "100"}


@pytest.mark.slow
def test_runs_that_start_at_the_same_time_create_one_complete_database(project: Path) -> None:
    (project / "mlflow.db").unlink()
    code = "from bestiary.tracking.runs import open_run\nwith open_run('split', {}, [], 'a'): pass"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    stages = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [stage.wait() for stage in stages] == [0, 0, 0]
    assert len(stored_runs(project, "split")) == 3
    assert len(stored_runs(project, "pipeline")) == 1
    assert sorted(path.name for path in project.iterdir()) == [".cache", "mlflow.db", "mlflow.db.lock"]


def test_logging_returns_without_waiting_for_mlflow(project: Path) -> None:
    with one_run() as run:
        started = time.perf_counter()
        for step in range(500):
            run.log_metrics({"loss": 1.0}, step)
        assert time.perf_counter() - started < 2  # MLflow itself takes longer for 500 calls
    assert isinstance(run, Run)


def test_a_closed_run_logs_for_how_long_recording_delayed_the_stage(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "bestiary.tracking")
    started = time.perf_counter()
    with one_run() as run:
        time.sleep(0.2)
    total = time.perf_counter() - started
    (record,) = caplog.records
    assert record.__dict__["waited_seconds"] == run.waited_seconds
    assert 0 < run.waited_seconds <= total - 0.2
