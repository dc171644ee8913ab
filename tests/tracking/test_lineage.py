import contextlib
import sqlite3
import time
from pathlib import Path

import pytest
from support.example_runs import one_run, stored_runs, write

from bestiary.tracking.content import content_hash
from bestiary.tracking.database import open_database
from bestiary.tracking.lineage import Server, lineage
from bestiary.tracking.store import open_client, tracking_uri


def test_lineage_includes_stages_that_dvc_restored_from_its_cache(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)

    def run_stage(stage: str, key: str, out: str, content: str, *inputs: str) -> str:
        with one_run(stage, key, inputs) as run:
            write(Path(out), content)
            run.log_outputs([out])
            return run.id

    data, base = write(Path("data"), "d1"), write(Path("models/base"), "b1")
    clean = run_stage("clean", "first", "build/clean", "c1", "data")
    split = run_stage("split", "first", "build/split", "s1", "build/clean")
    write(Path("data"), "d2")
    run_stage("clean", "second", "build/clean", "c2", "data")
    # In the third pipeline DVC restored clean and split from its cache, so it has no runs for them.
    train = run_stage("train", "third", "models/adapter", "a1", "build/split", "models/base")
    client = open_client(tracking_uri(), project)
    steps = lineage(Server(client), train)
    assert [(step.stage, step.run_id) for step in steps] == [("train", train), ("split", split), ("clean", clean)]
    assert steps[0].inputs == [("build/split", content_hash(Path("build/split")), "split"), ("models/base", base, None)]
    assert steps[2].inputs == [("data", data, None)]
    with open_database(project / "mlflow.db") as database:  # without MLflow
        assert lineage(database, train) == steps
        with pytest.raises(KeyError):
            database.run("gone")


@pytest.mark.slow
def test_lineage_among_a_thousand_runs_takes_less_than_two_seconds(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    write(Path("data"), "photos")
    chain = [("clean", "data", "build/clean"), ("split", "build/clean", "build/split"), ("train", "build/split", "a")]
    for stage, read, made in chain:
        with one_run(stage, "first", [read]) as run:
            write(Path(made), stage)
            run.log_outputs([made])
    last = stored_runs(project, "train")[0].info.run_id
    with contextlib.closing(sqlite3.connect(project / "mlflow.db")) as connection, connection:
        # Copy the three runs hundreds of times with other content. MLflow would take minutes for that.
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
