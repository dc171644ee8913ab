"""Copy a local MLflow database to a team's server: all runs and all registered versions.

MLflow moves a file store into SQLite (`mlflow migrate-filestore`) but has no command for a server, so this uses its
API. Runs get new ids there. They keep their times, tags, inputs, artifacts, and metrics with all steps.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tqdm import tqdm

from bestiary.errors import BestiaryError
from bestiary.files import project_root
from bestiary.registry.aliases import CHAMPION_BEFORE
from bestiary.registry.versions import FAST_RUN, hide_progress_bars, make_name, number_of, plain_errors, publish
from bestiary.tracking.addresses import local_path, shown_address, sqlite_uri
from bestiary.tracking.store import EXPERIMENT, check_database, experiment_id, open_client

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion

# Tags of a run on the server. The first marks a complete copy, the second one that is not complete yet.
MIGRATED, MIGRATING = "migrated_from", "migrating_from"


@dataclass(frozen=True)
class Migration:
    """How many runs were copied or already on the server, and the server's number for each local name/number."""

    runs: int
    runs_there_already: int
    versions: dict[str, int]


def migrate(database: Path, server: str) -> Migration:
    """Copy all runs and registered versions of an SQLite database to the MLflow server at `server`.

    An interrupted migration can be repeated: whatever an earlier call copied is skipped. Aliases that the server has
    already are not moved. Raises BestiaryError when there is no such database, when `server` is not a server's
    address, or when one of the two cannot be used.
    """
    if not database.is_file():
        raise BestiaryError(
            f"There is no tracking database {database}. Run this in the project's folder, or name the file with "
            "--database."
        )
    if not server.startswith(("http://", "https://")):
        raise BestiaryError(
            f"{shown_address(server)} is not the address of an MLflow server. Give one such as https://mlflow.example.org."
        )
    local = sqlite_uri(database.resolve())
    check_database(local)
    hide_progress_bars()
    with plain_errors(server):
        root = project_root()
        target = open_client(server, root)
        from mlflow.tracking import MlflowClient

        source = MlflowClient(local, local)
        runs, copied, skipped = _runs(source, target, experiment_id(target, server, root))
        return Migration(copied, skipped, _versions(source, target, runs))


# ---- runs ----


def _runs(source: MlflowClient, target: MlflowClient, experiment: str) -> tuple[dict[str, str], int, int]:
    """Copy the runs. Returns the server's run ids by local id, how many were copied, how many were there already."""
    found = source.get_experiment_by_name(EXPERIMENT)
    if found is None:
        raise BestiaryError(f"The database has no experiment {EXPERIMENT!r}, so there is nothing to migrate.")
    for unfinished in _search(target, experiment, f"tags.{MIGRATING} != ''"):
        target.delete_run(unfinished.info.run_id)
    known = {run.data.tags[MIGRATED]: run.info.run_id for run in _search(target, experiment, f"tags.{MIGRATED} != ''")}
    pipelines = {
        run.data.tags["pipeline"]: run.info.run_id
        for run in _search(
            target, experiment, "tags.stage = 'pipeline'"
        )  # newest first, so that the oldest run of a key wins
    }
    copied = 0
    runs = _search(source, found.experiment_id, "")
    runs.sort(key=lambda run: (run.data.tags.get("stage") != "pipeline", run.info.start_time))  # parents first
    for run in tqdm(runs, desc="copy runs", unit="run", leave=False):
        old, tags = run.info.run_id, run.data.tags
        if old in known:
            continue
        if tags.get("stage") == "pipeline" and tags["pipeline"] in pipelines:
            known[old] = pipelines[tags["pipeline"]]  # the team has run the same pipeline
        else:
            known[old] = _copy(source, target, run, experiment, known)
            copied += 1
    return known, copied, len(runs) - copied


def _copy(source: MlflowClient, target: MlflowClient, run: Run, experiment: str, known: Mapping[str, str]) -> str:
    """Copy one run. Returns its id on the server."""
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
    for start in range(0, len(metrics), 1000):  # MLflow accepts 1000 metrics and 100 parameters in one batch
        target.log_batch(new, metrics=metrics[start : start + 1000])
    params = [Param(key, value) for key, value in run.data.params.items()]
    for start in range(0, len(params), 100):
        target.log_batch(new, params=params[start : start + 100])
    if run.inputs.dataset_inputs:
        target.log_inputs(new, run.inputs.dataset_inputs)
    if source.list_artifacts(old):
        with TemporaryDirectory() as folder:
            target.log_artifacts(new, source.download_artifacts(old, "", folder))
    # A run that is still RUNNING in the local database lost its stage.
    status = "KILLED" if run.info.status == "RUNNING" else run.info.status
    target.set_terminated(new, status, run.info.end_time or run.info.start_time)
    # The tags come last, because MIGRATED declares the copy complete.
    target.log_batch(new, tags=[RunTag(key, value) for key, value in tags.items()])
    target.delete_tag(new, MIGRATING)
    if parent in known:
        _rename_in_description(target, known[parent], old, new)
    return new


def _rename_in_description(target: MlflowClient, run: str, old: str, new: str) -> None:
    """Let the description of `run` name a run by its new id: the pipeline's shows a picture of its evaluation."""
    from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

    text = target.get_run(run).data.tags.get(MLFLOW_RUN_NOTE, "")
    if old in text:
        target.set_tag(run, MLFLOW_RUN_NOTE, text.replace(old, new))


def _search(client: MlflowClient, experiment: str, what: str) -> list[Run]:
    """All runs that match, newest first, from all pages."""
    page = client.search_runs([experiment], what, max_results=1000)
    runs = list(page)
    while page.token:
        page = client.search_runs([experiment], what, max_results=1000, page_token=page.token)
        runs.extend(page)
    return runs


# ---- versions ----


def _versions(source: MlflowClient, target: MlflowClient, runs: Mapping[str, str]) -> dict[str, int]:
    """Copy the registered versions, oldest first, and then the aliases that are free on the server.

    Returns the server's number for each local name/number.
    """
    numbers: dict[str, int] = {}
    for model in source.search_registered_models():
        make_name(target, model.name)
        taken = target.get_registered_model(model.name).aliases
        found = source.search_model_versions(f"name = '{model.name}'", max_results=10_000)
        for version in sorted(found, key=lambda version: int(version.version)):
            sha256 = version.tags.get("adapter_sha256")
            if sha256 is None:
                continue  # not registered by this project
            number = number_of(target, model.name, sha256)
            if number is None:
                number = _copy_version(source, target, version, runs, numbers)
            numbers[f"{model.name}/{version.version}"] = number
        for alias, number in source.get_registered_model(model.name).aliases.items():
            if alias not in taken and f"{model.name}/{number}" in numbers:
                target.set_registered_model_alias(model.name, alias, str(numbers[f"{model.name}/{number}"]))
    return numbers


def _copy_version(
    source: MlflowClient,
    target: MlflowClient,
    version: ModelVersion,
    runs: Mapping[str, str],
    numbers: Mapping[str, int],
) -> int:
    """Copy one registered version. Returns its number on the server."""
    from mlflow.models import Model

    name, run = version.name, runs.get(version.run_id)
    if run is None:
        raise BestiaryError(
            f"The run of version {version.version} of {name} was deleted. Restore it with "
            f"`mlflow runs restore --run-id {version.run_id}`, then migrate again."
        )
    tags = dict(version.tags)
    if tags.get(FAST_RUN) in runs:
        tags[FAST_RUN] = runs[tags[FAST_RUN]]
    if before := tags.get(CHAMPION_BEFORE):
        tags[CHAMPION_BEFORE] = str(numbers.get(f"{name}/{before}", before))
    local = source.get_model_version_download_uri(name, version.version)

    def write(folder: Path, logged: LoggedModel) -> None:
        shutil.copytree(local_path(local) or local, folder)
        model = Model.load(str(folder))
        model.run_id, model.model_id, model.artifact_path = run, logged.model_id, None
        model.save(str(folder / "MLmodel"))

    return publish(target, name, run, tags, version.description, write)
