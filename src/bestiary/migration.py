"""From a local MLflow database to a team's server: every run and every registered version.

MLflow moves a file store into SQLite (`mlflow migrate-filestore`), but nothing onto a server; this goes through its API
instead. Runs get new ids there, and keep their times, tags, metrics with all steps, inputs and artifacts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from bestiary.errors import BestiaryError
from bestiary.files import project_root
from bestiary.registry import make_name, plain_errors, publish
from bestiary.tracking.store import EXPERIMENT, check_database, experiment_id, open_client

MIGRATED, MIGRATING = "migrated_from", "migrating_from"  # tags of a run that is there, and of one that is on its way


@dataclass(frozen=True)
class Migration:
    """What came over: counts, and the versions' numbers there by name and number here."""

    runs: int
    runs_there_already: int
    versions: dict[str, int]


def migrate(database: Path, server: str) -> Migration:
    """Copy all runs and registered versions of an SQLite database to the MLflow server at `server`.

    What an earlier call has copied is not copied again, so a call that was cut off can be repeated. An alias that the
    server has already stays where it is. Raises BestiaryError when there is no such database, `server` is no server,
    or one of the two cannot be used.
    """
    if not database.is_file():
        raise BestiaryError(f"There is no tracking database {database}.")
    if not server.startswith(("http://", "https://")):
        raise BestiaryError(f"{server} is no MLflow server: give its address, such as https://mlflow.example.org.")
    here = f"sqlite:///{database.resolve()}"
    check_database(here)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with plain_errors(server):
        root = project_root()
        target = open_client(server, root)
        from mlflow.tracking import MlflowClient

        source = MlflowClient(here, here)
        there = experiment_id(target, server, root)
        runs, copied, already = _runs(source, target, there)
        return Migration(copied, already, _versions(source, target, runs))


# ---- runs ----


def _runs(source: Any, target: Any, experiment: str) -> tuple[dict[str, str], int, int]:
    """Copy the runs. Returns their ids there by their ids here, how many were copied, how many were there already."""
    found = source.get_experiment_by_name(EXPERIMENT)
    if found is None:
        raise BestiaryError(f"The database has no experiment {EXPERIMENT!r}.")
    for unfinished in _search(target, experiment, f"tags.{MIGRATING} != ''"):
        target.delete_run(unfinished.info.run_id)
    known = {run.data.tags[MIGRATED]: run.info.run_id for run in _search(target, experiment, f"tags.{MIGRATED} != ''")}
    pipelines = {
        run.data.tags["pipeline"]: run.info.run_id
        for run in _search(target, experiment, "tags.stage = 'pipeline'")  # the oldest stays, as the stages find it
    }
    copied = 0
    runs = _search(source, found.experiment_id, "")
    runs.sort(key=lambda run: (run.data.tags.get("stage") != "pipeline", run.info.start_time))  # parents first
    for run in tqdm(runs, desc="runs", unit="run", leave=False):
        old, tags = run.info.run_id, run.data.tags
        if old in known:
            continue
        if tags.get("stage") == "pipeline" and tags["pipeline"] in pipelines:
            known[old] = pipelines[tags["pipeline"]]  # the team has run the same one
        else:
            known[old] = _copy(source, target, run, experiment, known)
            copied += 1
    return known, copied, len(runs) - copied


def _copy(source: Any, target: Any, run: Any, experiment: str, known: dict[str, str]) -> str:
    from mlflow.entities import Metric, Param, RunTag

    old, parent = run.info.run_id, run.data.tags.get("mlflow.parentRunId")
    tags = dict(run.data.tags) | {MIGRATED: old}
    if parent in known:
        tags["mlflow.parentRunId"] = known[parent]
    times = {"start_time": run.info.start_time, "run_name": run.info.run_name}
    new: str = target.create_run(experiment, tags={MIGRATING: old}, **times).info.run_id
    metrics = [
        Metric(point.key, point.value, point.timestamp, point.step)
        for key in run.data.metrics
        for point in source.get_metric_history(old, key)
    ]
    for start in range(0, len(metrics), 1000):  # MLflow's limit for one batch
        target.log_batch(new, metrics=metrics[start : start + 1000])
    params = [Param(key, value) for key, value in run.data.params.items()]
    for start in range(0, len(params), 100):
        target.log_batch(new, params=params[start : start + 100])
    if run.inputs.dataset_inputs:
        target.log_inputs(new, run.inputs.dataset_inputs)
    if source.list_artifacts(old):
        with TemporaryDirectory() as folder:
            target.log_artifacts(new, source.download_artifacts(old, "", folder))
    # One that still says RUNNING lost its stage.
    status = "KILLED" if run.info.status == "RUNNING" else run.info.status
    target.set_terminated(new, status, run.info.end_time or run.info.start_time)
    target.log_batch(new, tags=[RunTag(key, value) for key, value in tags.items()])  # last: now it is there
    target.delete_tag(new, MIGRATING)
    return new


def _search(client: Any, experiment: str, what: str) -> list[Any]:
    """All runs that match, newest first, page by page."""
    page = client.search_runs([experiment], what, max_results=1000)
    runs = list(page)
    while page.token:
        page = client.search_runs([experiment], what, max_results=1000, page_token=page.token)
        runs.extend(page)
    return runs


# ---- versions ----


def _versions(source: Any, target: Any, runs: dict[str, str]) -> dict[str, int]:
    """Copy the registered versions, oldest first, then the free aliases. Returns their numbers there."""
    from mlflow.models import Model

    numbers: dict[str, int] = {}
    for model in source.search_registered_models():
        make_name(target, model.name)
        taken = target.get_registered_model(model.name).aliases
        for version in _by_number(source, model.name):
            sha256 = version.tags.get("adapter_sha256")
            if sha256 is None:
                continue  # not made by this project's register stage
            same = target.search_model_versions(f"name = '{model.name}' AND tags.adapter_sha256 = '{sha256}'")
            if same:
                numbers[f"{model.name}/{version.version}"] = min(int(found.version) for found in same)
                continue
            if (run := runs.get(version.run_id)) is None:
                raise BestiaryError(
                    f"The run of version {version.version} of {model.name} was deleted: "
                    f"`mlflow runs restore --run-id {version.run_id}` brings it back, then try again."
                )
            tags = dict(version.tags)
            if before := tags.pop("champion_before", None):
                tags["champion_before"] = str(numbers.get(f"{model.name}/{before}", before))
            held = source.get_model_version_download_uri(model.name, version.version)

            def write(folder: Path, logged: Any, held: str = held, run: str = run) -> None:
                shutil.copytree(held.removeprefix("file://"), folder)
                about = Model.load(str(folder))
                about.run_id, about.model_id, about.artifact_path = run, logged.model_id, logged.artifact_location
                about.save(str(folder / "MLmodel"))

            numbers[f"{model.name}/{version.version}"] = publish(
                target, model.name, run, tags, version.description, write
            )
        for alias, number in source.get_registered_model(model.name).aliases.items():
            if alias not in taken and f"{model.name}/{number}" in numbers:
                target.set_registered_model_alias(model.name, alias, str(numbers[f"{model.name}/{number}"]))
    return numbers


def _by_number(client: Any, name: str) -> Iterator[Any]:
    found = client.search_model_versions(f"name = '{name}'", max_results=10_000)
    yield from sorted(found, key=lambda version: int(version.version))
