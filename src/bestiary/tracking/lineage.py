"""Lineage: the runs that a result was made from, found by the content of their inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from bestiary.errors import BestiaryError, short
from bestiary.tracking.database import StoredRun

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

MAX_STEPS = 1000  # a server may answer with ever new runs


@dataclass(frozen=True)
class Step:
    """One stage's run in a lineage. Each input is its path, its content hash, and the stage that made it or None."""

    stage: str
    run_id: str
    started: str
    git: str
    inputs: list[tuple[str, str, str | None]]


class Runs(Protocol):
    """A source of runs: `Server`, or `database.Database`."""

    def run(self, run_id: str) -> StoredRun:
        """The run with this id."""

    def maker(self, experiment_id: str, path: str, content: str) -> StoredRun | None:
        """The newest finished run that made this content at this path; None when no run did."""


class Server:
    """Runs through MLflow's client."""

    def __init__(self, client: MlflowClient) -> None:
        self.client = client

    def run(self, run_id: str) -> StoredRun:
        """The run with this id."""
        return _stored_run(self.client.get_run(run_id))

    def maker(self, experiment_id: str, path: str, content: str) -> StoredRun | None:
        """The newest finished run that made this content at this path; None when no run did."""
        found = self.client.search_runs(
            [experiment_id],
            f"tags.`output.{path}` = '{content}' AND attributes.status = 'FINISHED'",
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
        return _stored_run(found[0]) if found else None


def _stored_run(run: Any) -> StoredRun:  # mlflow.entities.Run, whose package has no type hints for mypy
    return StoredRun(run.info.run_id, run.info.experiment_id, run.info.start_time, dict(run.data.tags))


def lineage(runs: Runs, run_id: str) -> list[Step]:
    """The run `run_id` and all runs that it builds on, nearest first.

    An input leads to the run that made the same content at the same path, whenever that was. So lineage also covers
    stages that DVC restored from its cache: it finds the run that first made the restored content.
    """
    steps: list[Step] = []
    pending, seen = [runs.run(run_id)], {run_id}
    while pending and len(steps) < MAX_STEPS:
        run = pending.pop(0)
        tags = run.tags
        inputs = []
        for key, content in sorted(tags.items()):
            if key.startswith("input."):
                path = key.removeprefix("input.")
                maker = runs.maker(run.experiment_id, path, content)
                inputs.append((path, content, _stage_of(maker) if maker else None))
                if maker and maker.run_id not in seen:
                    seen.add(maker.run_id)
                    pending.append(maker)
        revision = tags.get("mlflow.source.git.commit", "")[:10]
        changed = " with changes" if tags.get("git_dirty") == "true" else ""
        steps.append(Step(_stage_of(run), run.run_id, _started(run), revision + changed, inputs))
    if pending:
        raise BestiaryError(f"The run {run_id} is based on more than {MAX_STEPS} others, which no pipeline has.")
    return steps


def _stage_of(run: StoredRun) -> str:
    if "stage" not in run.tags:
        raise BestiaryError(f"The run {run.run_id} has no tag stage, so its lineage is unknown.")
    return run.tags["stage"]


def _started(run: StoredRun) -> str:
    try:
        return datetime.fromtimestamp(run.start_time / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OSError, OverflowError, TypeError, ValueError):
        raise BestiaryError(f"The run {run.run_id} has an invalid start time: {short(run.start_time)}.") from None
