"""Runs that the tests of bestiary.tracking open and read back."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from bestiary.tracking.content import content_hash
from bestiary.tracking.runs import Run, open_run
from bestiary.tracking.store import EXPERIMENT, open_client, tracking_uri


def one_run(stage: str = "split", key: str = "a", inputs: Sequence[str] = ()) -> AbstractContextManager[Run]:
    """An open run of `stage` in the pipeline `key`."""
    return open_run(stage, {"seed": 1}, inputs, key)


def stored_runs(project: Path, stage: str) -> list[Any]:  # of mlflow.entities.Run, whose package has no type hints
    """The stage's runs in the project's database, oldest first."""
    client = open_client(tracking_uri(), project)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return list(client.search_runs([experiment.experiment_id], f"tags.stage = '{stage}'", order_by=["start_time ASC"]))


def write(path: Path, content: str) -> str:
    """Write a file. Returns its content hash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return content_hash(path)
