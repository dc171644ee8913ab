"""Registered versions: list them, find one, trace its runs, and publish a new one.

A local SQLite database is read directly, because importing MLflow takes seconds. A server is read through MLflow.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from bestiary.errors import BestiaryError, short
from bestiary.files import find_project, project_root
from bestiary.registry.tags import VERSION_NUMBER
from bestiary.tracking.addresses import local_path, shown_address, sqlite_path, sqlite_uri, without_secrets
from bestiary.tracking.database import Database, open_database
from bestiary.tracking.lineage import Runs, Server, Step, lineage
from bestiary.tracking.store import check_database, explain, open_client, registry_uri, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

WEIGHTS = "adapter_weights"  # the folder in a version's files that mlflow.diffusers keeps an adapter in
REGISTER = "dvc repro --force --single-item register"

FAST_RUN = "fast_run"  # the tag for the run that stored a version's fast variant
FAST_PART = "\n\n### Fast variant\n\n"  # starts the last part of a version's description


@dataclass(frozen=True)
class Version:
    """A registered adapter."""

    name: str
    version: int
    aliases: list[str]
    tags: dict[str, str]
    run_id: str

    @property
    def uri(self) -> str:
        """The address that always means this version, such as models:/bestiary/3."""
        return f"models:/{self.name}/{self.version}"


# ---- reading ----


def versions(name: str = "bestiary") -> list[Version]:
    """All registered versions, oldest first. Raises BestiaryError when there is no registry or no such model."""
    if path := local_database():
        with open_local(path) as database:
            aliases = {alias: version_number(number) for alias, number in database.aliases(name).items()}
            found = [(version_number(number), run_id, tags) for number, run_id, tags in database.versions(name)]
            if not found and name not in (known := database.models()):
                raise BestiaryError(_unknown_name(name, known))
    else:
        uri, client = open_registry()
        with plain_errors(uri):
            aliases = aliases_of(client, name)
            items = client.search_model_versions(f"name = '{name}'", max_results=10_000)
            found = sorted((version_number(item.version), str(item.run_id), dict(item.tags)) for item in items)
    return [
        Version(name, number, sorted(alias for alias, its in aliases.items() if its == number), tags, run_id)
        for number, run_id, tags in found
    ]


def find_version(uri: str) -> Version:
    """The version that `models:/name@alias` or `models:/name/3` means.

    Raises BestiaryError, with the versions that exist, when there is no such version.
    """
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", uri)
    if match is None:
        raise BestiaryError(
            f"{uri} is not the address of a registered version. Write models:/bestiary@champion or models:/bestiary/3."
        )
    name, alias, number = match.groups()
    existing = versions(name)
    for version in existing:
        if alias in version.aliases if alias else version.version == int(number):
            return version
    known = ", ".join(" = ".join([str(version.version), *version.aliases]) for version in existing)
    raise BestiaryError(
        f"There is no {uri}. " + (f"The versions of {name} are: {known}." if known else how_to_register())
    )


def walk(uri: str) -> tuple[Version, list[Step]]:
    """A registered version and the runs that it is based on, the register run first.

    Raises BestiaryError when there is no such version, or when its run has been deleted.
    """
    version = find_version(uri)
    if path := local_database():
        with open_local(path) as database:
            try:
                return version, _with_fast_steps(database, version)
            except KeyError as error:
                if error.args != (version.run_id,):
                    raise
                raise BestiaryError(
                    f"The run {version.run_id} of {version.uri} has been deleted, so its lineage is unknown."
                ) from None
    address, client = open_registry()
    with plain_errors(address):
        return version, _with_fast_steps(Server(client), version)


def _with_fast_steps(runs: Runs, version: Version) -> list[Step]:
    """The runs behind a version, then those behind only its fast variant."""
    steps = lineage(runs, version.run_id)
    if FAST_RUN not in version.tags:
        return steps
    known = {step.run_id for step in steps}
    try:
        return steps + [step for step in lineage(runs, version.tags[FAST_RUN]) if step.run_id not in known]
    except KeyError:
        return steps  # the run was deleted


def artifact(run_id: str, path: str, folder: Path) -> Path | None:
    """Copy a file that a run logged into `folder`. None when the run logged no such file."""
    uri, client = open_registry()
    with plain_errors(uri):
        hide_progress_bars()
        if path not in {item.path for item in client.list_artifacts(run_id, path.rpartition("/")[0] or None)}:
            return None
        return Path(client.download_artifacts(run_id, path, str(folder)))


def parameters(run_id: str) -> dict[str, str]:
    """The parameters that a run logged."""
    uri, client = open_registry()
    with plain_errors(uri):
        return dict(client.get_run(run_id).data.params)


def aliases_of(client: MlflowClient, name: str) -> dict[str, int]:
    """The aliases of a registered model with the version that each stands for.

    Raises BestiaryError when there is no such model.
    """
    from mlflow.exceptions import MlflowException

    try:
        aliases = client.get_registered_model(name).aliases
        return {str(alias): version_number(number) for alias, number in aliases.items()}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = [model.name for model in client.search_registered_models()]
        raise BestiaryError(_unknown_name(name, known)) from None


def number_of(client: MlflowClient, name: str, sha256: str) -> int | None:
    """The number of the version with this content (the lowest, if two were registered at the same time), or None."""
    found = client.search_model_versions(f"name = '{name}' AND tags.adapter_sha256 = '{sha256}'")
    return min((version_number(version.version) for version in found), default=None)


def version_number(value: object) -> int:
    """The number of a version as MLflow gives it. Raises BestiaryError when it is none."""
    if not VERSION_NUMBER.fullmatch(str(value)):
        raise BestiaryError(f"The registry holds a version with the number {short(value)}, which is not a number.")
    return int(str(value))


def weights(version: Version, folder: Path) -> Path:
    """The folder with a version's weights: where the registry keeps them, or a copy in `folder` if that is elsewhere.

    Raises BestiaryError when the registry has lost them.
    """
    if files := local_files(version):
        if not (files / WEIGHTS).is_dir():
            raise lost_error(version, str(files / WEIGHTS))
        return files / WEIGHTS
    return download(version, WEIGHTS, folder)


def local_files(version: Version) -> Path | None:
    """The folder of a version's files on this disk; None if the registry stores them elsewhere."""
    path = local_database()
    if path is None:
        return None
    with open_local(path) as database:
        return local_path(database.files(version.name, version.version))


def download(version: Version, name: str, folder: Path) -> Path:
    """Copy the folder `name` of a version's files from the registry's store to `folder` and return the copy."""
    uri, client = open_registry()
    with plain_errors(uri):
        import mlflow

        hide_progress_bars()
        source = client.get_model_version_download_uri(version.name, str(version.version))
        copy = mlflow.artifacts.download_artifacts(f"{source}/{name}", dst_path=str(folder), tracking_uri=uri)
        return Path(copy)


def file_store(client: MlflowClient, version: Version) -> ArtifactRepository:
    """MLflow's artifact store of a version, to list, add and delete files."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    hide_progress_bars()
    place = client.get_model_version_download_uri(version.name, str(version.version))
    return get_artifact_repository(place, tracking_uri=tracking_uri())


def lost_error(version: Version, what: str) -> BestiaryError:
    """The error for a version whose file the registry has lost."""
    return BestiaryError(
        f"The registry has lost the file of {version.uri}: {what} does not exist. If it is the adapter in "
        f"models/adapter, `{REGISTER}` stores it again; otherwise restore it from a backup."
    )


def with_fast_part(description: str, part: str) -> str:
    """A version's description with this part about its fast variant, replacing an earlier part."""
    return f"{description.partition(FAST_PART)[0]}{FAST_PART}{part}" if part else description


def fast_part(description: str | None) -> str:
    """The part of a version's description about its fast variant; empty if there is none.

    >>> fast_part(with_fast_part(with_fast_part("An adapter.", "refused"), "accepted"))
    'accepted'
    """
    return (description or "").partition(FAST_PART)[2]


def how_to_register() -> str:
    """The sentence that tells how to register this project's adapter."""
    root = find_project()
    if root is None:
        return "Run this in the project's folder, or set MLFLOW_TRACKING_URI to a team's server."
    is_trained = any((root / "models" / "adapter").glob("*.safetensors"))
    if is_trained and (root / "reports" / "operating_point").exists():
        return f"Run `{REGISTER}` to register the adapter in models/adapter."
    return f"Run `dvc repro`, and if that restores earlier results, `{REGISTER}`."


# ---- writing ----


def make_name(client: MlflowClient, name: str) -> None:
    """Create the registered model if it does not exist yet."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description="LoRA adapters that teach Stable Diffusion new subjects.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def publish(
    client: MlflowClient,
    name: str,
    run_id: str,
    tags: Mapping[str, str],
    description: str,
    write: Callable[[Path, LoggedModel], None],
) -> int:
    """Create a version from the MLflow model that `write` saves in a folder. Returns the version's number.

    When another registration published the same content at the same time, the older version stays and its number is
    returned.
    """
    from mlflow.entities import LoggedModelStatus
    from tenacity import Retrying, retry_if_exception_message, stop_after_attempt, wait_random_exponential

    # These are the steps of mlflow.diffusers.log_model(), which would also set the tracking URI of the whole process.
    logged = client.create_logged_model(client.get_run(run_id).info.experiment_id, "adapter", run_id)
    with TemporaryDirectory() as folder:
        model = Path(folder, "model")
        write(model, logged)
        client.log_model_artifacts(logged.model_id, str(model))
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    # MLflow gives up when other processes took the same number three times in a row.
    overtaken = retry_if_exception_message(match=".*Giving up after")
    retrying = Retrying(retry=overtaken, wait=wait_random_exponential(0.1, 2), stop=stop_after_attempt(8), reraise=True)
    created = retrying(
        client.create_model_version,
        name,
        logged.artifact_location,  # MLflow would look up a models:/ URI in the process's own store
        run_id,
        tags=dict(tags),
        description=description,
        model_id=logged.model_id,
    )
    version = version_number(created.version)
    first = number_of(client, name, tags["adapter_sha256"])
    if first is not None and first < version:
        client.delete_model_version(name, str(version))
        client.delete_logged_model(logged.model_id)
        return first
    return version


# ---- access ----


def open_registry() -> tuple[str, MlflowClient]:
    """The registry's address and MLflow's client for it. Raises BestiaryError when there is no usable registry."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # a person is waiting, unlike with a run's recorder
    uri = tracking_uri()
    _check(uri)
    with plain_errors(uri):
        return uri, open_client(uri, project_root())


def local_database() -> Path | None:
    """The registry's SQLite database, which can be read without MLflow. None when a server holds the registry."""
    uri = tracking_uri()
    if registry_uri() != uri:
        return None
    _check(uri)
    return sqlite_path(uri)


@contextlib.contextmanager
def open_local(path: Path) -> Iterator[Database]:
    """The SQLite database at `path`, read-only. Raises BestiaryError when it cannot be read."""
    try:
        with open_database(path) as database:
            yield database
    except sqlite3.Error as error:
        raise BestiaryError(explain(error, sqlite_uri(path))) from None


@contextlib.contextmanager
def plain_errors(uri: str) -> Iterator[None]:
    """Turn MLflow's exceptions into a BestiaryError of one sentence."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        raise BestiaryError(explain(error, uri)) from error
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        if sqlite_path(uri):
            raise
        # MLflow's client does not check what a server answers.
        found = without_secrets(f"{type(error).__name__}: {error}", uri)[:200]
        raise BestiaryError(f"MLflow at {shown_address(uri)} gave an answer that makes no sense ({found}).") from error


def hide_progress_bars() -> None:
    """Keep MLflow's progress bars for artifacts off the screen, unless the user asked for them."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def _check(uri: str) -> None:
    path = sqlite_path(uri)
    if path is not None and not path.is_file():
        place = "yet" if find_project() else "here"
        raise BestiaryError(f"There is no registry {place}: {path} does not exist. {how_to_register()}")
    check_database(uri)


def _unknown_name(name: str, known: Iterable[str]) -> str:
    there = f"The registered models are: {', '.join(sorted(known))}." if known else how_to_register()
    return f"There is no registered model {name!r}. {there}"
