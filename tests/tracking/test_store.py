import sqlite3
from pathlib import Path

import pytest
from support.example_runs import one_run

from bestiary.errors import BestiaryError
from bestiary.tracking.store import check_database, explain, tracking_uri


def test_a_locked_database_stops_a_run_before_its_body(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bestiary.tracking.store.LOCK_TIMEOUT_SECONDS", 0.2)
    holder = sqlite3.connect(project / "mlflow.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(BestiaryError, match=r"mlflow\.db is locked"), one_run():
        pytest.fail("the stage must not start")
    holder.close()


@pytest.mark.parametrize(("revision", "words"), [("0123456789ab", "newer MLflow"), ("0584bdc529eb", "older MLflow")])
def test_a_database_of_another_mlflow_version_is_rejected_and_not_changed(
    project: Path, revision: str, words: str
) -> None:
    with sqlite3.connect(project / "mlflow.db") as database:
        database.execute("UPDATE alembic_version SET version_num = ?", [revision])
    database.close()
    before = (project / "mlflow.db").read_bytes()
    with pytest.raises(BestiaryError, match=words):
        check_database(tracking_uri())
    assert (project / "mlflow.db").read_bytes() == before


def test_a_file_that_is_not_a_database_is_rejected(project: Path) -> None:
    (project / "mlflow.db").write_text("not a database, but long enough to look like one at first" * 20)
    with pytest.raises(BestiaryError, match=r"mlflow\.db is not an MLflow database"):
        check_database(tracking_uri())


def test_a_database_in_a_missing_folder_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match=r"gone/mlflow\.db"):
        check_database(f"sqlite:///{tmp_path / 'gone' / 'mlflow.db'}")


def test_an_error_message_does_not_contain_the_password_of_an_address() -> None:
    address = "https://ada:secret@mlflow.example.org"
    message = explain(ConnectionError(f"no answer from {address}/api"), address)
    assert "secret" not in message
    assert "mlflow.example.org" in message
