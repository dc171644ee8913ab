"""MLflow's SQLite database, read directly because importing MLflow takes longer than every query here together.

`store.check_database` verifies beforehand that the tables are those of the installed MLflow.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StoredRun:
    """A run: its id, its experiment's id, its start in milliseconds since 1970, and its tags."""

    run_id: str
    experiment_id: str
    start_time: int
    tags: dict[str, str]


class Database:
    """The queries that lineage and the registry need. They return what MLflow's client returns."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def run(self, run_id: str) -> StoredRun:
        """The run with this id. Raises KeyError when there is none."""
        query = "SELECT CAST(experiment_id AS TEXT), start_time FROM runs WHERE run_uuid = ?"
        found = self.connection.execute(query, [run_id]).fetchone()
        if found is None:
            raise KeyError(run_id)
        experiment_id, start_time = found
        tags = self.connection.execute("SELECT key, value FROM tags WHERE run_uuid = ?", [run_id])
        return StoredRun(run_id, experiment_id, start_time, dict(tags.fetchall()))

    def maker(self, experiment_id: str, path: str, content: str) -> StoredRun | None:
        """The newest finished run that made this content at this path; None when no run did."""
        query = """
            SELECT runs.run_uuid FROM runs JOIN tags ON tags.run_uuid = runs.run_uuid AND tags.key = ?
            WHERE tags.value = ? AND experiment_id = ? AND status = 'FINISHED' AND lifecycle_stage = 'active'
            ORDER BY start_time DESC, runs.run_uuid LIMIT 1
        """
        found = self.connection.execute(query, [f"output.{path}", content, int(experiment_id)]).fetchone()
        return self.run(found[0]) if found else None

    def models(self) -> list[str]:
        """The names of the registered models, sorted."""
        return [name for (name,) in self.connection.execute("SELECT name FROM registered_models ORDER BY name")]

    def aliases(self, model: str) -> dict[str, object]:
        """A registered model's aliases and the versions that they point to."""
        query = "SELECT alias, version FROM registered_model_aliases WHERE name = ?"
        return dict(self.connection.execute(query, [model]).fetchall())

    def versions(self, model: str) -> list[tuple[object, str, dict[str, str]]]:
        """A registered model's versions, oldest first, each as its number, its run's id and its tags."""
        query = "SELECT key, value FROM model_version_tags WHERE name = ? AND version = ?"
        present = """
            SELECT version, run_id FROM model_versions
            WHERE name = ? AND current_stage != 'Deleted_Internal' ORDER BY version
        """
        return [
            (version, run_id, dict(self.connection.execute(query, [model, version]).fetchall()))
            for version, run_id in self.connection.execute(present, [model]).fetchall()
        ]

    def files(self, model: str, version: int) -> str:
        """The location of a registered version's files: a path, or the address of an object store."""
        query = "SELECT COALESCE(storage_location, source) FROM model_versions WHERE name = ? AND version = ?"
        return str(self.connection.execute(query, [model, version]).fetchone()[0])


@contextlib.contextmanager
def open_database(path: Path) -> Iterator[Database]:
    """The database at `path`, opened read-only. Raises sqlite3.Error when it cannot be read."""
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=5)) as connection:
        yield Database(connection)
