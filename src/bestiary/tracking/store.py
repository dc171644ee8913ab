"""The MLflow store: where it is, whether it can be used, and the project's experiment in it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import importlib.util
import os
import re
import sqlite3
import uuid
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from bestiary.errors import BestiaryError
from bestiary.files import project_root
from bestiary.tracking.addresses import (
    SQLITE,
    absolute,
    is_valid,
    local_path,
    location_of,
    shown_address,
    sqlite_path,
    sqlite_uri,
    without_secrets,
)
from bestiary.tracking.relocation import follow_project

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

EXPERIMENT = "bestiary"
LOCK_TIMEOUT_SECONDS = 5.0


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, with a relative path read from the project's folder; else the project's own database.

    DVC runs experiments in temporary copies of the project, so the working folder must not decide where runs go.
    Raises BestiaryError when the variable holds no valid address.
    """
    return _from_environment("MLFLOW_TRACKING_URI") or sqlite_uri(project_root() / "mlflow.db")


def registry_uri() -> str:
    """`MLFLOW_REGISTRY_URI`, read as `tracking_uri` reads its variable; else the tracking store's address."""
    return _from_environment("MLFLOW_REGISTRY_URI") or tracking_uri()


def _from_environment(variable: str) -> str | None:
    uri = os.environ.get(variable, "").strip()
    if not uri:
        return None
    uri = absolute(uri, project_root())
    if not (uri.startswith((*SQLITE, "databricks")) or local_path(uri) or is_valid(uri)):
        raise BestiaryError(
            f"{variable} is not a valid address. Write https://HOST:PORT, and put the name and the password into "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
        )
    return uri


def switched_off() -> bool:
    """Whether BESTIARY_TRACKING=off disables recording, which is there to measure what recording costs."""
    return os.environ.get("BESTIARY_TRACKING") == "off"


def check_database(uri: str) -> None:
    """Check within seconds, without importing MLflow, that an SQLite database can be written by the installed MLflow.

    Corrects the locations in it when the project's folder has been moved or copied.
    Accepts any other store, and a database that does not exist yet.
    Raises BestiaryError when the database is locked, damaged, not writable or of another version of MLflow.
    """
    path = sqlite_path(uri)
    if path is None:
        return
    if not path.is_file():
        if not os.access(path.parent, os.W_OK):
            raise BestiaryError(
                f"The tracking database {path} cannot be created: its folder is missing or not writable. "
                "Create the folder, or set MLFLOW_TRACKING_URI to another database."
            )
        return
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=LOCK_TIMEOUT_SECONDS, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            revision = database.execute("SELECT version_num FROM alembic_version").fetchone()[0]
            database.execute("ROLLBACK")
    except (sqlite3.Error, TypeError) as error:
        raise BestiaryError(explain(error, uri)) from None
    known, newest = _schema_revisions()
    if revision not in known:
        raise BestiaryError(
            f"The tracking database {path} was written by a newer MLflow than the installed one "
            f"({version('mlflow')}). Install the newer version, or set MLFLOW_TRACKING_URI to another database."
        )
    if revision != newest:
        raise BestiaryError(
            f"The tracking database {path} was written by an older MLflow. "
            f"Back it up, then run `mlflow db upgrade {uri}`."
        )
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=LOCK_TIMEOUT_SECONDS)) as database:
            follow_project(database, path, project_root())
    except sqlite3.Error as error:
        raise BestiaryError(explain(error, uri)) from None


@functools.cache  # the page checks the database for each order
def _schema_revisions() -> tuple[frozenset[str], str]:
    """All schema revisions that the installed MLflow knows, and the newest one, from its migration scripts."""
    package = importlib.util.find_spec("mlflow")
    assert package is not None
    assert package.origin is not None
    known: set[str] = set()
    replaced: set[str] = set()
    for script in (Path(package.origin).parent / "store/db_migrations/versions").glob("*.py"):
        text = script.read_text(encoding="utf-8")
        known.update(re.findall(r"^revision\b.*?=\s*[\"'](\w+)[\"']", text, re.MULTILINE))
        replaced.update(re.findall(r"^down_revision\b.*?=\s*[\"'](\w+)[\"']", text, re.MULTILINE))
    return frozenset(known), (known - replaced).pop()


def explain(error: BaseException, uri: str) -> str:
    """An error of the store at `uri` as a plain message, without the password that a URI may contain.

    >>> explain(ConnectionError("Max retries exceeded"), "https://ada:secret@mlflow.example.org")
    'MLflow at https://mlflow.example.org cannot be reached. Check that the server is running.'
    """
    store, text = shown_address(uri), without_secrets(" ".join(str(error).split()), uri)
    if "No space left" in text or getattr(error, "errno", None) == errno.ENOSPC or "disk is full" in text:
        return f"The disk is full: no space is left for MLflow's runs at {store}."
    if "locked" in text:
        return f"The tracking database {store} is locked by another program. Close that program and try again."
    if "not a database" in text or "alembic_version" in text or "malformed" in text or isinstance(error, TypeError):
        return f"{store} is not an MLflow database. Move it away, and a new one will be created."
    if "Max retries exceeded" in text:
        return f"MLflow at {store} cannot be reached. Check that the server is running."
    return f"MLflow at {store} cannot be used: {text[:300]}."


def open_client(uri: str, root: Path) -> MlflowClient:
    """MLflow's client for the store at `uri`. Creates an SQLite database that does not exist yet.

    `root` is the project's folder, which holds the artifacts of a local store.
    """
    # MLflow's defaults retry silently for minutes while a stage waits.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        with locked(uri):
            if not path.exists():  # another process may have created it while this one waited
                _create_database(path, root)
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri, registry_uri() if uri == tracking_uri() else uri)


def _create_database(path: Path, root: Path) -> None:
    """Create the database under a temporary name, then rename it, so that no process sees half a database.

    MLflow's dozens of migrations wait for the disk after each statement, 13 s in all. Durability does not matter for a
    file that nothing uses yet, so it is switched off and the whole file is synced once at the end.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def skip_syncs(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA journal_mode = MEMORY")

    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    event.listen(Engine, "connect", skip_syncs)
    try:
        SqlAlchemyStore(sqlite_uri(temporary), location_of(root / "mlruns")).engine.dispose()
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        event.remove(Engine, "connect", skip_syncs)
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(uri: str) -> Iterator[None]:
    """Let one process at a time into the body, for an SQLite store. A server relies on its own transactions."""
    path = sqlite_path(uri)
    if path is None:
        yield
        return
    with path.with_name(f"{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def experiment_id(client: MlflowClient, uri: str, root: Path) -> str:
    """The id of the project's experiment in the store at `uri`. Creates the experiment when it does not exist."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        # Without a location, MLflow puts a local store's artifacts into the working folder of whoever starts it.
        location = location_of(root / "mlruns") if sqlite_path(uri) else None
        try:
            return str(client.create_experiment(EXPERIMENT, artifact_location=location))
        except MlflowException:  # another process has created it in the meantime
            found = client.get_experiment_by_name(EXPERIMENT)
    return str(found.experiment_id)
