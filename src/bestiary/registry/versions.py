"""Registered versions: list them, find one, trace its runs, and publish a new one.

A local SQLite database is read directly, because importing MLflow takes seconds. A server is read through MLflow.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from bestiary.errors import BestiaryError
from bestiary.files import project_root
from bestiary.samplers import DrawingDefaults
from bestiary.subjects import Subject, Subjects, subject_of
from bestiary.tracking.database import Database, open_database
from bestiary.tracking.lineage import Server, Step, lineage
from bestiary.tracking.store import check_database, explain, open_client, sqlite_path, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

DEFAULTS_TAG = "usual"  # the tag that holds a version's drawing defaults
SUBJECTS_TAG = "subjects"  # the tag that holds the words of a version's subjects, by class folder


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
            aliases, found = database.aliases(name), database.versions(name)
            if not found and name not in (known := database.models()):
                raise BestiaryError(_unknown_name(name, known))
    else:
        uri, client = open_registry()
        with plain_errors(uri):
            aliases = aliases_of(client, name)
            items = client.search_model_versions(f"name = '{name}'", max_results=10_000)
        found = sorted((int(item.version), item.run_id, dict(item.tags)) for item in items)
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
    known = ", ".join(" = ".join([str(version.version), *version.aliases]) for version in existing) or "none"
    raise BestiaryError(f"There is no {uri}. The versions of {name} are: {known}.")


def defaults_of(version: Version) -> DrawingDefaults | None:
    """How a version was evaluated, and how it draws by default. None when its tags do not say.

    >>> tag = '{"template": "{}", "steps": 9, "guidance_scale": 3.0, "scheduler": "ddim", "resolution": 64}'
    >>> defaults_of(Version("bestiary", 1, [], {"usual": tag}, "run")).sampling.steps
    9
    >>> defaults_of(Version("bestiary", 2, [], {}, "run")) is None
    True
    """
    try:
        return DrawingDefaults.from_json(version.tags[DEFAULTS_TAG])
    except (KeyError, ValueError):
        return None


def subjects_tag(folders: Iterable[str], subjects: Subjects) -> str:
    """The content of SUBJECTS_TAG for an adapter that was taught these class folders.

    >>> subjects_tag(["my_owl"], Subjects())
    '{"my_owl": "my owl"}'
    """
    content = {
        folder: asdict(subjects.of(folder)) if folder in subjects.described else subjects.of(folder).name
        for folder in folders
    }
    return json.dumps(content, ensure_ascii=False)


def subjects_of(version: Version) -> tuple[Subject, ...]:
    """The subjects that a version was taught, in the words of its captions. Empty when its tags do not say.

    Raises BestiaryError when the tag is damaged.

    >>> subjects_of(Version("bestiary", 1, [], {"subjects": '{"my_owl": "my owl"}'}, "run"))[0].with_article
    'my owl'
    """
    if SUBJECTS_TAG not in version.tags:
        return ()
    try:
        words = json.loads(version.tags[SUBJECTS_TAG])
    except (ValueError, RecursionError):
        words = None
    try:
        return tuple(_taught(folder, said) for folder, said in words.items())
    except (AttributeError, TypeError, ValueError):
        raise BestiaryError(
            f"The tag {SUBJECTS_TAG} of {version.uri} is damaged. Delete the tag to use the names that you type."
        ) from None


def _taught(folder: str, said: object) -> Subject:
    """The subject of a folder from what the tag says: its name, or all fields of one that subjects.yaml described."""
    name = said.get("name") if isinstance(said, dict) else said
    if not isinstance(name, str) or not name.strip():
        raise ValueError("a name is missing")
    return Subject(**said) if isinstance(said, dict) else replace(subject_of(folder), folder=folder, name=name)


def walk(uri: str) -> tuple[Version, list[Step]]:
    """A registered version and the runs that it is based on, the register run first.

    Raises BestiaryError when there is no such version, or when its run has been deleted.
    """
    version = find_version(uri)
    if path := local_database():
        with open_local(path) as database:
            try:
                return version, lineage(database, version.run_id)
            except KeyError:
                raise BestiaryError(
                    f"The run {version.run_id} of {version.uri} has been deleted, so its lineage is unknown."
                ) from None
    address, client = open_registry()
    with plain_errors(address):
        return version, lineage(Server(client), version.run_id)


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
        return {alias: int(number) for alias, number in client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = [model.name for model in client.search_registered_models()]
        raise BestiaryError(_unknown_name(name, known)) from None


def number_of(client: MlflowClient, name: str, sha256: str) -> int | None:
    """The number of the version with this content (the lowest, if two were registered at the same time), or None."""
    found = client.search_model_versions(f"name = '{name}' AND tags.adapter_sha256 = '{sha256}'")
    return min((int(version.version) for version in found), default=None)


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
    version = int(created.version)
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
    if os.environ.get("MLFLOW_REGISTRY_URI", uri) != uri:
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
        raise BestiaryError(explain(error, f"sqlite:///{path}")) from None


@contextlib.contextmanager
def plain_errors(uri: str) -> Iterator[None]:
    """Turn MLflow's exceptions into a BestiaryError of one sentence."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        raise BestiaryError(explain(error, uri)) from error


def hide_progress_bars() -> None:
    """Keep MLflow's progress bars for artifacts off the screen, unless the user asked for them."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def _check(uri: str) -> None:
    path = sqlite_path(uri)
    if path is not None and not path.is_file():
        raise BestiaryError(f"There is no registry yet: {path} does not exist. Run `dvc repro` to create it.")
    check_database(uri)


def _unknown_name(name: str, known: Iterable[str]) -> str:
    return f"There is no registered model {name!r}. The registered models are: {', '.join(sorted(known)) or 'none'}."
