"""Store an accepted fast variant with the registered version of its adapter. For a refused one, store the reasons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bestiary.diffusion.export_format import check_files, read_manifest
from bestiary.errors import BestiaryError
from bestiary.evaluation.acceptance import AcceptanceReport, as_markdown
from bestiary.files import project_root
from bestiary.registry.fast_variant import (
    ACCEPTED,
    ATTACH,
    DEFAULTS,
    EXPORT,
    EXPORT_FOLDER,
    FAST,
    FEW_STEP,
    FEW_STEP_FOLDER,
    PREFIX,
    REASONS,
    REFUSED,
    FastTags,
    export_sha256,
    is_intact,
)
from bestiary.registry.registering import GATE, Registration
from bestiary.registry.versions import (
    FAST_RUN,
    Version,
    file_store,
    find_version,
    local_files,
    plain_errors,
    with_fast_part,
)
from bestiary.tracking.store import check_database, locked, open_client, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

MAX_TAG = 5000  # characters that MLflow can store


@dataclass(frozen=True)
class Attachment:
    """The result of `attach`, as in reports/results/attach.json. stored is whether the registry has the files."""

    name: str
    version: int
    fast: str
    stored: bool
    reasons: list[str]
    few_step_sha256: str
    export_sha256: str


@dataclass(frozen=True)
class Candidate:
    """A measured fast variant: the folders of its two parts, and the report of the stage accept with its file."""

    few_step: Path
    export: Path
    report: AcceptanceReport
    report_file: Path


def attach(registration: Registration, candidate: Candidate, run_id: str, warn: Callable[[str], None]) -> Attachment:
    """Store an accepted fast variant with the registered version and set the version's tags.

    An earlier fast variant is replaced. For a refused one, only the reasons are stored, and an earlier variant is
    removed because the tags describe the last one. `run_id` is the MLflow run that does this. `warn` gets a sentence
    if the registry does not delete an earlier variant. Raises BestiaryError when the report is about another
    adapter or fast variant, the version does not exist, or MLflow cannot be written.
    """
    report = candidate.report
    tags = _check(registration, candidate)
    uri = tracking_uri()
    check_database(uri)
    with plain_errors(uri):
        client = open_client(uri, project_root())
        version = find_version(f"models:/{registration.name}/{registration.version}")
        if version.tags.get("adapter_sha256") != report.adapter_sha256:
            raise BestiaryError(
                f"{version.uri} is not the adapter that was measured. Run `dvc repro`, then `{ATTACH}`."
            )
        with locked(uri):
            if FAST in version.tags:
                client.delete_model_version_tag(version.name, str(version.version), FAST)
            if report.accepted:
                _store(client, version, candidate, tags)
            _mark(client, version, report, tags, run_id)
            if left := _drop_others(client, version, tags.folder if report.accepted else ""):
                warn(
                    f"The registry did not delete an earlier fast variant of {version.uri} "
                    f"({', '.join(left)}). Nothing uses it. Ask whoever runs the registry to delete it."
                )
            client.log_artifact(version.run_id, str(candidate.report_file), GATE)
    return Attachment(
        registration.name,
        registration.version,
        ACCEPTED if report.accepted else REFUSED,
        report.accepted,
        list(report.reasons),
        report.few_step_sha256,
        report.export_sha256,
    )


def _check(registration: Registration, candidate: Candidate) -> FastTags:
    """The tags for this fast variant. Raises BestiaryError when the report is about something else."""
    from bestiary.diffusion.adapter import adapter_sha256

    report, manifest = candidate.report, read_manifest(candidate.export)
    check_files(candidate.export, manifest)
    found = (registration.adapter_sha256, adapter_sha256(candidate.few_step), export_sha256(candidate.export))
    if found != (report.adapter_sha256, report.few_step_sha256, report.export_sha256):
        raise BestiaryError(
            f"{candidate.report_file} does not describe the fast variant in {candidate.few_step} and "
            f"{candidate.export}. Run `dvc repro fast/dvc.yaml`."
        )
    return FastTags(report.few_step_sha256, report.export_sha256, manifest.defaults)


def _store(client: MlflowClient, version: Version, candidate: Candidate, tags: FastTags) -> None:
    from bestiary.diffusion.stored_adapter import adapter_file

    store, files = file_store(client, version), local_files(version)
    if files and is_intact(files / tags.folder, tags, every_file=True):
        return
    store.log_artifact(str(adapter_file(candidate.few_step)), f"{tags.folder}/{FEW_STEP_FOLDER}")
    store.log_artifacts(str(candidate.export), f"{tags.folder}/{EXPORT_FOLDER}")
    if files and not is_intact(files / tags.folder, tags, every_file=True):
        raise BestiaryError(f"The fast variant in the registry's folder {files} is incomplete. Run `{ATTACH}` again.")


def _mark(client: MlflowClient, version: Version, report: AcceptanceReport, tags: FastTags, run_id: str) -> None:
    """Set the version's tags, the verdict last, so that readers never find a half-stored fast variant."""
    values = {
        REASONS: " ".join(report.reasons)[:MAX_TAG],
        FEW_STEP: tags.few_step_sha256,
        EXPORT: tags.export_sha256,
        DEFAULTS: tags.defaults.to_json(),
        FAST_RUN: run_id,
        FAST: ACCEPTED if report.accepted else REFUSED,
    }
    number = str(version.version)
    for key, value in values.items():
        client.set_model_version_tag(version.name, number, key, value)
    description = client.get_model_version(version.name, number).description or ""
    client.update_model_version(version.name, number, with_fast_part(description, "\n".join(as_markdown(report))))


def _drop_others(client: MlflowClient, version: Version, kept: str) -> list[str]:
    """Delete earlier fast variants from the version's files. Returns those that the registry did not delete."""
    from mlflow.exceptions import MlflowException

    forbidden, left = (MlflowException, NotImplementedError, OSError), []
    try:
        store = file_store(client, version)
        found = [item.path for item in store.list_artifacts() if item.path.startswith(PREFIX) and item.path != kept]
    except forbidden:
        return [f"{PREFIX}*"]
    for path in found:
        try:
            store.delete_artifacts(path)
        except forbidden:
            left.append(path)
    return left
