import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bestiary.database import open_database
from bestiary.errors import BestiaryError
from bestiary.tracking import (
    Run,
    Server,
    check_database,
    content_hash,
    explain,
    lineage,
    open_client,
    open_run,
    tracking_uri,
)

ROOT = Path(__file__).parents[1]


def runs(project: Path, stage: str) -> list[Any]:
    client = open_client(tracking_uri(), project)
    experiment = client.get_experiment_by_name("bestiary")
    return list(client.search_runs([experiment.experiment_id], f"tags.stage = '{stage}'", order_by=["start_time ASC"]))


def one_run(stage: str = "split", key: str = "a", inputs: Sequence[str] = ()) -> Any:
    return open_run(stage, {"seed": 1}, inputs, key)


def write(path: Path, content: str) -> str:
    """A file with this content, and its content hash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return content_hash(path)


def test_runs_of_one_pipeline_share_a_parent_that_is_found_by_content(project: Path) -> None:
    for stage, key in (("clean", "a"), ("clean", "b"), ("split", "a")):
        with one_run(stage, key):
            pass
    parents = {run.data.tags["pipeline"]: run.info.run_id for run in runs(project, "pipeline")}
    assert sorted(parents) == ["a", "b"]
    for run in runs(project, "clean") + runs(project, "split"):
        assert run.data.tags["mlflow.parentRunId"] == parents[run.data.tags["pipeline"]]


def test_a_run_carries_params_metrics_artifacts_inputs_and_outputs(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a stage's paths begin
    data = write(tmp_path / "data" / "tiger.txt", "stripes") and content_hash(Path("data"))
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"png")
    with one_run(inputs=["data"]) as run:
        for step in range(3):
            run.log_metrics({"loss": 1.0 / (step + 1)}, step)
        run.log_summary({"rows{scheduler=dpmsolver++}": 2, "loss": 0.25})
        run.log_artifact(picture, "pictures")
        run.log_outputs({"build/split": "5678.dir"})
        run_id = run.id
    client = open_client(tracking_uri(), project)
    stored = client.get_run(run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"seed": "1"}
    assert stored.data.metrics == {"loss": pytest.approx(1 / 3), "rows_scheduler_dpmsolver___": 2.0}
    assert [point.step for point in client.get_metric_history(run_id, "loss")] == [0, 1, 2]
    assert stored.data.tags["input.data"] == data
    assert stored.data.tags["output.build/split"] == "5678.dir"
    assert [entry.dataset.digest for entry in stored.inputs.dataset_inputs] == [data]
    assert (project / "mlruns" / run_id / "artifacts" / "pictures" / "picture.png").read_bytes() == b"png"
    results = client.get_run(stored.data.tags["mlflow.parentRunId"]).data.metrics
    assert results == {"split.rows_scheduler_dpmsolver___": 2.0, "split.loss": 0.25}


def test_a_failing_body_leaves_a_failed_run_with_its_error(project: Path) -> None:
    with pytest.raises(BestiaryError), one_run():
        raise BestiaryError("The data folder is empty.")
    run = runs(project, "split")[0]
    assert run.info.status == "FAILED"
    assert run.data.tags["error"] == "The data folder is empty."


def test_a_killed_stage_is_marked_killed(project: Path) -> None:
    code = "from bestiary.tracking import open_run\nimport time\nwith open_run('split', {}, [], 'a') as run:\n"
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


def test_a_run_whose_recorder_died_too_is_marked_at_the_next_start(project: Path) -> None:
    with one_run() as run:
        run_id = run.id
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    client = open_client(tracking_uri(), project)
    client.set_tag(run_id, "recorder", str(gone.pid))
    client.update_run(run_id, "RUNNING")
    with one_run():
        pass
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["error"]) == ("KILLED", "the machine went down")


def test_artifacts_stay_in_the_project_whatever_the_working_folder(
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


def test_a_locked_database_is_said_within_seconds(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bestiary.tracking.LOCK_PATIENCE_SECONDS", 0.2)
    holder = sqlite3.connect(project / "mlflow.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(BestiaryError, match=r"mlflow\.db is locked: another program holds it"), one_run():
        pytest.fail("the stage must not start")
    holder.close()


@pytest.mark.parametrize(("revision", "words"), [("0123456789ab", "newer MLflow"), ("0584bdc529eb", "older MLflow")])
def test_a_database_of_another_version_of_mlflow_is_said_and_left_alone(
    project: Path, revision: str, words: str
) -> None:
    with sqlite3.connect(project / "mlflow.db") as database:
        database.execute("UPDATE alembic_version SET version_num = ?", [revision])
    database.close()
    before = (project / "mlflow.db").read_bytes()
    with pytest.raises(BestiaryError, match=words):
        check_database(tracking_uri())
    assert (project / "mlflow.db").read_bytes() == before


def test_a_file_that_is_no_database_is_said(project: Path) -> None:
    (project / "mlflow.db").write_text("not a database, but long enough to be taken for one at first sight" * 20)
    with pytest.raises(BestiaryError, match=r"mlflow\.db is no MLflow database"):
        check_database(tracking_uri())


@pytest.mark.slow
def test_a_run_that_cannot_be_sent_is_kept_and_sent_by_the_next_one(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"first")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    content = content_hash(picture)
    with one_run(key="lost", inputs=[str(picture)]) as run:
        run.log_metrics({"loss": 0.5})
        run.log_artifact(picture)
    told = capsys.readouterr().err
    assert "cannot be reached: is it running?" in told
    assert "will be sent by the next one" in told
    picture.write_bytes(b"changed since")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with one_run(key="next"):
        pass
    (sent,) = [run for run in runs(project, "split") if run.data.tags["pipeline"] == "lost"]
    assert sent.info.status == "FINISHED"
    assert sent.data.metrics == {"loss": 0.5}
    assert sent.data.tags[f"input.{picture}"] == content
    assert (project / "mlruns" / sent.info.run_id / "artifacts" / "picture.png").read_bytes() == b"first"
    assert list((project / "mlruns" / "unsent").iterdir()) == []


@pytest.mark.slow
def test_a_run_that_loses_mlflow_halfway_is_kept_and_goes_on_as_the_same_run(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    holder = sqlite3.connect(project / "mlflow.db", isolation_level=None, timeout=30)
    with one_run(key="lost") as run:
        run_id = run.id
        holder.execute("BEGIN EXCLUSIVE")
        run.log_metrics({"loss": 0.5})
    holder.close()
    assert "will be sent by the next one" in capsys.readouterr().err
    with one_run(key="next"):
        pass
    (sent,) = [run for run in runs(project, "split") if run.data.tags["pipeline"] == "lost"]
    assert (sent.info.run_id, sent.info.status) == (run_id, "FINISHED")
    assert "error" not in sent.data.tags
    assert sent.data.metrics["loss"] == 0.5


def test_what_cannot_be_sent_again_does_not_stop_the_next_run(project: Path) -> None:
    broken = project / "mlruns" / "unsent" / "broken"
    broken.mkdir(parents=True)
    (broken / "messages.jsonl").write_text("{}\n")
    with one_run():
        pass
    assert runs(project, "split")[0].info.status == "FINISHED"
    assert broken.is_dir()


def test_switched_off_it_records_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BESTIARY_TRACKING", "off")
    before = (project / "mlflow.db").read_bytes()
    with one_run() as run:
        run.log_metrics({"loss": 0.5})
        run.log_artifact(project / "mlflow.db")
        with pytest.raises(BestiaryError, match="BESTIARY_TRACKING=off"):
            _ = run.id
    assert (project / "mlflow.db").read_bytes() == before
    assert [path.name for path in project.iterdir()] == ["mlflow.db"]


def test_the_name_of_a_dvc_experiment_names_its_runs(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "rank-8")
    with one_run():
        pass
    assert [run.info.run_name for run in runs(project, "split") + runs(project, "pipeline")] == [
        "split rank-8",
        "rank-8",
    ]


def test_a_run_has_the_machines_load_and_a_series_of_pictures(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")  # MLflow's own switch
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


def test_a_password_in_an_address_is_not_told() -> None:
    address = "https://ada:secret@mlflow.example.org"
    told = explain(ConnectionError(f"no answer from {address}/api"), address)
    assert "secret" not in told
    assert "mlflow.example.org" in told


@pytest.mark.slow
def test_first_runs_at_the_same_time_share_one_whole_database(project: Path) -> None:
    (project / "mlflow.db").unlink()
    code = "from bestiary.tracking import open_run\nwith open_run('split', {}, [], 'a'): pass"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    stages = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [stage.wait() for stage in stages] == [0, 0, 0]
    assert len(runs(project, "split")) == 3
    assert len(runs(project, "pipeline")) == 1
    assert sorted(path.name for path in project.iterdir()) == ["mlflow.db", "mlflow.db.lock"]


def test_lineage_walks_by_content_through_a_stage_that_did_not_run_again(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)

    def made(stage: str, key: str, out: str, content: str, *inputs: str) -> str:
        with open_run(stage, {}, inputs, key) as run:
            run.log_outputs({out: write(Path(out), content)})
            return run.id

    data, base = write(Path("data"), "d1"), write(Path("models/base"), "b1")
    clean = made("clean", "first", "build/clean", "c1", "data")
    split = made("split", "first", "build/split", "s1", "build/clean")
    write(Path("data"), "d2")
    made("clean", "second", "build/clean", "c2", "data")
    # The third pipeline's clean and split came from DVC's cache: it has no runs of its own for them.
    train = made("train", "third", "models/adapter", "a1", "build/split", "models/base")
    client = open_client(tracking_uri(), project)
    steps = lineage(Server(client), train)
    assert [(step.stage, step.run_id) for step in steps] == [("train", train), ("split", split), ("clean", clean)]
    assert steps[0].inputs == [("build/split", content_hash(Path("build/split")), "split"), ("models/base", base, None)]
    assert steps[2].inputs == [("data", data, None)]
    with open_database(project / "mlflow.db") as database:  # read without MLflow, it says the same
        assert lineage(database, train) == steps
        with pytest.raises(KeyError):
            database.run("gone")


@pytest.mark.slow
def test_lineage_among_a_thousand_runs_takes_a_moment(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    write(Path("data"), "photos")
    chain = [("clean", "data", "build/clean"), ("split", "build/clean", "build/split"), ("train", "build/split", "a")]
    for stage, read, made in chain:
        with open_run(stage, {}, [read], "first") as run:
            run.log_outputs({made: write(Path(made), stage)})
    last = runs(project, "train")[0].info.run_id
    with contextlib.closing(sqlite3.connect(project / "mlflow.db")) as connection, connection:
        # The same three stages a few hundred times more, with other content: through MLflow it would take minutes.
        columns = [row[1] for row in connection.execute("PRAGMA table_info(runs)") if row[1] != "run_uuid"]
        originals = connection.execute("SELECT run_uuid FROM runs").fetchall()
        for number in range(1, 334):
            for (run_id,) in originals:
                copied = f"INSERT INTO runs (run_uuid, {', '.join(columns)}) SELECT ?, {', '.join(columns)} FROM runs"
                connection.execute(f"{copied} WHERE run_uuid = ?", [f"{run_id}-{number}", run_id])
                connection.execute(
                    "INSERT INTO tags (key, value, run_uuid) SELECT key, value || ?, ? FROM tags WHERE run_uuid = ?",
                    [f"-{number}", f"{run_id}-{number}", run_id],
                )
    with open_database(project / "mlflow.db") as database:
        for source in (Server(open_client(tracking_uri(), project)), database):
            started = time.process_time()
            steps = lineage(source, last)
            assert time.process_time() - started < 2.0
            assert [step.stage for step in steps] == ["train", "split", "clean"]


def test_calls_of_an_open_run_return_at_once(project: Path) -> None:
    with one_run() as run:
        started = time.perf_counter()
        for step in range(500):
            run.log_metrics({"loss": 1.0}, step)
        assert time.perf_counter() - started < 2  # waiting for MLflow 500 times takes longer
    assert isinstance(run, Run)


def test_content_hashes_are_dvcs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    (tmp_path / ".dvcignore").write_text("__pycache__\n*.pyc\n")
    folder = tmp_path / "data"
    for name in ("b/2.txt", "a/1.txt", "z.txt", "a.txt", "瓢虫/一.txt", "b/__pycache__/x.pyc"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    # What `dvc add data` wrote for this folder with DVC 3.67.1.
    assert content_hash(folder) == "7fe951f1965de24030a9b14c361249bb.dir"
    assert content_hash(folder / "z.txt") == "4d68c7de7e4246157111d3f7637d8ac6"
