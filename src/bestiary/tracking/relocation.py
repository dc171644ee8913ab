"""MLflow stores absolute locations of artifacts. They are corrected here after a project was moved or copied."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from bestiary.tracking.addresses import local_path, location_of

ARTIFACTS = "mlruns"
LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def follow_project(database: sqlite3.Connection, path: Path, root: Path) -> None:
    """Make the locations in the database at `path` point to the folder `mlruns` beside it, if its project was moved.

    A database outside the project `root` may belong to several projects: its locations change only if what they point
    to is gone. Locations of runs and versions stay while their files are only in the old place; those of experiments,
    where new files go, always change. Raises sqlite3.Error.
    """
    new = path.absolute().parent / ARTIFACTS
    rows = database.execute("SELECT artifact_location FROM experiments").fetchall()
    folders = {folder for (location,) in rows if location and (folder := _artifact_folder(location))}
    moved = {folder for folder in folders if folder != new and not _same(folder, new)}
    if not _same(path.parent, root):
        moved = {folder for folder in moved if not folder.exists() and new.is_dir()}
    if not moved:
        return
    with database:
        database.execute("BEGIN IMMEDIATE")
        for table, column in LOCATIONS:
            for row, location in database.execute(f"SELECT rowid, {column} FROM {table}").fetchall():
                if changed := _moved(location, moved, new, always=table == "experiments"):
                    database.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", [changed, row])


def _artifact_folder(location: str) -> Path | None:
    """The folder `mlruns` that holds a location; None when there is none on this disk."""
    path = local_path(location)
    if path is None or ARTIFACTS not in path.parts:
        return None
    return next(folder for folder in (path, *path.parents) if folder.name == ARTIFACTS)


def _moved(location: object, folders: set[Path], new: Path, *, always: bool) -> str | None:
    """The location below `new` instead of one of `folders`; None when it stays."""
    old = local_path(location) if isinstance(location, str) else None
    folder = old and next((folder for folder in folders if old.is_relative_to(folder)), None)
    if old is None or folder is None:
        return None
    there = new / old.relative_to(folder)
    is_left_behind = old.exists() and not there.exists()
    return None if is_left_behind and not always else location_of(there)


def _same(one: Path, other: Path) -> bool:
    with contextlib.suppress(OSError):
        return one.samefile(other)
    return False
