import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from support.example_runs import one_run, stored_runs

from bestiary.tracking.relocation import LOCATIONS
from bestiary.tracking.store import check_database, open_client, tracking_uri


def recorded(project: Path) -> str:
    """Record a run with an artifact. Returns its id."""
    note = project.parent / "note.txt"
    note.write_text("x")
    with one_run() as run:
        run.log_artifact(note)
        return run.id


def locations(database: Path) -> set[str]:
    with closing(sqlite3.connect(database)) as connection:
        return {
            str(location)
            for table, column in LOCATIONS
            for (location,) in connection.execute(f"SELECT {column} FROM {table}")
        }


def test_a_renamed_project_finds_its_files_and_writes_into_its_new_folder(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = recorded(project)
    moved = project.rename(tmp_path / "another name")
    monkeypatch.setenv("DVC_ROOT", str(moved))
    new = recorded(moved)
    client = open_client(tracking_uri(), moved)
    for run_id in (old, new):
        assert [file.path for file in client.list_artifacts(run_id)] == ["note.txt"]
        assert (moved / "mlruns" / run_id / "artifacts" / "note.txt").is_file()
    assert not project.exists()


def test_a_copied_project_leaves_the_original_as_it_was(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(project)
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    copy = tmp_path / "copy"
    shutil.copytree(project, copy)
    monkeypatch.setenv("DVC_ROOT", str(copy))
    recorded(copy)
    assert len(stored_runs(copy, "split")) == 2
    assert {path: path.read_bytes() for path in project.rglob("*") if path.is_file()} == before
    assert not [location for location in locations(copy / "mlflow.db") if location.startswith(f"{project}/")]


def test_files_that_were_left_in_the_old_place_are_still_found(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = recorded(project)
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy2(project / "mlflow.db", copy)
    monkeypatch.setenv("DVC_ROOT", str(copy))
    check_database(tracking_uri())
    assert [file.path for file in open_client(tracking_uri(), copy).list_artifacts(run_id)] == ["note.txt"]
    new = recorded(copy)
    assert (copy / "mlruns" / new / "artifacts" / "note.txt").is_file()


def test_a_database_that_several_projects_share_is_not_changed(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared" / "mlflow.db"
    shared.parent.mkdir()
    shutil.copy2(project / "mlflow.db", shared)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shared}")
    recorded(project)
    before = locations(shared)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    check_database(tracking_uri())
    assert locations(shared) == before
    assert str(project / "mlruns") in before


def test_the_same_folder_by_another_name_is_no_move(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(project)
    before = locations(project / "mlflow.db")
    (tmp_path / "link").symlink_to(project)
    check_database(f"sqlite:///{tmp_path / 'link' / 'mlflow.db'}")
    assert locations(project / "mlflow.db") == before
