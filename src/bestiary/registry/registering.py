"""Register an adapter: verify it, create its version once, and let the gate decide its alias."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from bestiary.errors import BestiaryError
from bestiary.evaluation.report import EvaluationReport, as_markdown, heading
from bestiary.files import project_root
from bestiary.params import Register
from bestiary.registry.aliases import ROLLED_BACK, give_alias
from bestiary.registry.gate import (
    CHALLENGER,
    CHAMPION,
    ChampionComparison,
    Decision,
    champion_score,
    decide,
    paired_difference,
)
from bestiary.registry.tags import DEFAULTS_TAG, SUBJECTS_TAG, subjects_of, subjects_tag
from bestiary.registry.versions import (
    REGISTER,
    Version,
    aliases_of,
    artifact,
    fast_part,
    find_version,
    make_name,
    number_of,
    plain_errors,
    publish,
    weights,
    with_fast_part,
)
from bestiary.samplers import SAMPLERS, DrawingDefaults, Sampling
from bestiary.subjects import Subjects
from bestiary.tracking.store import check_database, locked, open_client, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.models import ModelSignature

MAX_TRIES = 10  # to decide while other registrations move the aliases
SERVED_MODEL = Path(__file__).with_name("served_model.py")  # MLflow stores a copy with each version
GATE = "gate"  # where a run logs its table of pictures, for comparison with later adapters


@dataclass(frozen=True)
class Submission:
    """A trained and evaluated adapter that is to be registered."""

    adapter: Path
    base: str
    base_revision: str | None
    evaluation: EvaluationReport
    reported: Mapping[str, str | None]  # by stage: the SHA-256 of the adapter that the stage's report is about
    pictures: Path  # evaluate's table of scores by prompt and seed
    defaults: DrawingDefaults  # how it was evaluated: the version draws like this by default
    measured: str  # `measurement_hash` of its evaluation
    run_id: str  # the MLflow run that the version belongs to


@dataclass(frozen=True)
class Registration:
    """What `register` did: the content of reports/results/register.json."""

    name: str
    version: int
    aliases: list[str]
    adapter_sha256: str
    decision: str
    reasons: list[str]


def read_registration(path: Path) -> Registration:
    """Read reports/register.json. Raises BestiaryError when it is missing or damaged."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Registration).validate_json(path.read_bytes())
    except FileNotFoundError:
        raise BestiaryError(f"No adapter is registered yet: {path} does not exist. Run `dvc repro`.") from None
    except ValidationError:
        raise BestiaryError(f"{path} is damaged. Delete it and run `dvc repro`.") from None


def register(submission: Submission, rules: Register) -> Registration:
    """Verify the adapter, register it once for its content, and give it the alias that it earns.

    An adapter that is registered already keeps its version, whose tags are updated; a file that the registry has lost
    is stored again. Raises BestiaryError when a report is about another adapter, the adapter does not apply to the
    base, MLflow cannot be written, or the registry cannot serve the version's file afterwards.
    """
    tags = _tags(submission)
    name, sha256 = rules.name, tags["adapter_sha256"]
    uri = tracking_uri()
    check_database(uri)
    with plain_errors(uri):
        client = open_client(uri, project_root())
        with locked(uri):
            make_name(client, name)
            version = number_of(client, name, sha256)
            if version is None:
                version = _create(client, submission, name, tags)
            else:
                for key, value in tags.items():  # it may have been evaluated again, with other settings
                    client.set_model_version_tag(name, str(version), key, value)
                said = fast_part(client.get_model_version(name, str(version)).description)
                description = with_fast_part(_description(submission, tags), said)
                client.update_model_version(name, str(version), description)
            _check_served(client, submission, name, version, tags)
            _log_evaluation(client, client.get_model_version(name, str(version)).run_id, submission)
            decision = _give_earned_alias(client, submission, rules, version)
            client.set_model_version_tag(
                name, str(version), "decision", f"{decision.alias}: {' '.join(decision.reasons)}"
            )
            aliases = sorted(alias for alias, number in aliases_of(client, name).items() if number == version)
    return Registration(name, version, aliases, sha256, decision.alias, decision.reasons)


def _tags(submission: Submission) -> dict[str, str]:
    """The tags of the submission's version, after the adapter has been verified."""
    from bestiary.diffusion.adapter import adapter_sha256, check_trained_on, verify_adapter
    from bestiary.diffusion.base import base_commit, base_sha256

    adapter, base, revision = submission.adapter, submission.base, submission.base_revision
    sha256, evaluation = adapter_sha256(adapter), submission.evaluation
    for stage, reported in {**submission.reported, "evaluate": evaluation.adapter_sha256}.items():
        if reported != sha256:
            raise BestiaryError(
                f"reports/results/{stage}.json describes another adapter than {adapter}. Run `dvc repro {stage}`."
            )
    check_trained_on(adapter, base, revision)
    verification = verify_adapter(adapter, base, revision)
    rows = {"base": evaluation.base, "adapter": evaluation.adapter, "delta": evaluation.delta}
    return {
        "adapter_sha256": sha256,
        # The leading "./" marks a folder of the project, for MLflow too, instead of an id on the hub.
        "base": f"./{base}" if Path(base).is_dir() and not Path(base).is_absolute() else base,
        "base_revision": base_commit(base, revision) or revision or "",  # a branch moves, a commit does not
        "base_sha256": base_sha256(base, revision),
        "rank": str(verification.rank),
        "alpha": str(verification.alpha),
        "measured": submission.measured,
        DEFAULTS_TAG: submission.defaults.to_json(),
        SUBJECTS_TAG: subjects_tag(evaluation.classes, Subjects.read_from(submission.pictures.parent)),
        **{f"{name}.{score.key}": str(row[score.key].mean) for name, row in rows.items() for score in evaluation.table},
    }


def _give_earned_alias(client: MlflowClient, submission: Submission, rules: Register, version: int) -> Decision:
    aliases = aliases_of(client, rules.name)
    decision = _decide(client, submission, rules, version, aliases)
    # On a server, another registration may move the aliases while this one decides.
    for _ in range(MAX_TRIES):
        if aliases == (now := aliases_of(client, rules.name)):
            break
        aliases = now
        decision = _decide(client, submission, rules, version, aliases)
    give_alias(client, rules.name, version, decision.alias, aliases)
    return decision


def _decide(
    client: MlflowClient, submission: Submission, rules: Register, version: int, aliases: Mapping[str, int]
) -> Decision:
    number = aliases.get(CHAMPION)
    if number is None:
        return decide(submission.evaluation, rules, None)
    if number == version:
        alias, reasons = decide(submission.evaluation, rules, None)
        if alias == CHAMPION:
            return Decision(CHAMPION, [reasons[0], "The adapter is the champion already."])
        # A re-run does not take the alias away: that is for a person to do, with `bestiary rollback`.
        return Decision(CHAMPION, [*reasons, "The adapter stays the champion until a person rolls it back."])
    tags = client.get_model_version(rules.name, str(version)).tags
    if ROLLED_BACK in tags:
        return Decision(CHALLENGER, [f"The adapter was the champion and was rolled back: {tags[ROLLED_BACK]}"])
    champion = client.get_model_version(rules.name, str(number))
    if teaches := _other_subjects(champion.tags, submission):
        return decide(submission.evaluation, rules, ChampionComparison(number, None, teaches=teaches))
    if champion.tags.get("measured") != submission.measured:
        return decide(submission.evaluation, rules, ChampionComparison(number, None))
    with TemporaryDirectory() as folder:
        theirs = artifact(champion.run_id, f"{GATE}/{submission.pictures.name}", Path(folder))
        score = champion_score(submission.evaluation, rules)
        difference = paired_difference(submission.pictures, theirs, score) if theirs else None
    return decide(submission.evaluation, rules, ChampionComparison(number, difference, has_pictures=theirs is not None))


def _other_subjects(champion: Mapping[str, str], submission: Submission) -> str | None:
    """The names of the champion's subjects when the submission teaches none of them, else None."""
    subjects = Subjects.read_from(submission.pictures.parent)
    taught = {subjects.of(folder).key for folder in submission.evaluation.classes}
    version = Version(CHAMPION, 1, [], {SUBJECTS_TAG: champion.get(SUBJECTS_TAG, "{}")}, "")
    with contextlib.suppress(BestiaryError):  # a damaged tag
        theirs = subjects_of(version)
        if theirs and not taught & {subject.key for subject in theirs}:
            names = [subject.name for subject in theirs]
            return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return None


def _create(client: MlflowClient, submission: Submission, name: str, tags: Mapping[str, str]) -> int:
    """Create the submission's version. Returns its number."""
    run_tags = client.get_run(submission.run_id).data.tags
    source = {"git_revision": run_tags.get("mlflow.source.git.commit"), "git_dirty": run_tags.get("git_dirty")}

    def write(folder: Path, logged: LoggedModel) -> None:
        _write_model(folder, logged.model_id, submission, tags)

    all_tags = {**tags, **{key: value for key, value in source.items() if value is not None}}
    return publish(client, name, submission.run_id, all_tags, _description(submission, tags), write)


def _description(submission: Submission, tags: Mapping[str, str]) -> str:
    """What MLflow's page shows of the version: what it is, and its result table as Markdown."""
    what = f"A LoRA adapter (rank {tags['rank']}, alpha {float(tags['alpha']):g}) for `{tags['base']}`."
    return "\n".join([what, "", heading(submission.evaluation), "", *as_markdown(submission.evaluation)])


def _write_model(folder: Path, model_id: str | None, submission: Submission, tags: Mapping[str, str]) -> None:
    """Save the submission's adapter as an MLflow model, which mlflow.diffusers loads and MLflow's server draws with."""
    import mlflow
    from mlflow.models import Model

    from bestiary.diffusion.stored_adapter import adapter_file

    revision = tags["base_revision"]

    mlflow.diffusers.save_model(
        str(adapter_file(submission.adapter)),
        str(folder),
        tags["base"],
        # No artifact_path: MLflow would store this machine's path, which says nothing elsewhere.
        mlflow_model=Model(run_id=submission.run_id, model_id=model_id),
        signature=_signature(submission.defaults.sampling),
        input_example={"prompt": "a photo of a tiger"},
        metadata={key: tags[key] for key in ("adapter_sha256", "base", "base_revision", "base_sha256")},
    )
    model = Model.load(str(folder))
    adapter = {**model.flavors["diffusers"], "base_model_revision": revision or None}  # MLflow takes the hub's newest
    model.add_flavor("diffusers", **adapter)
    shutil.copyfile(SERVED_MODEL, folder / SERVED_MODEL.name)
    environment = model.flavors["python_function"]["env"]
    mlflow.pyfunc.add_to_model(
        model,
        loader_module="mlflow.pyfunc.model",
        conda_env=environment["conda"],
        python_env=environment["virtualenv"],
        model_config=_served_config(tags["base"], revision, submission.defaults.sampling),
        model_code_path=SERVED_MODEL.name,
        artifacts={"adapter": {"path": adapter["adapter_weights"], "uri": adapter["adapter_weights"]}},
    )
    model.save(str(folder / "MLmodel"))


def _served_config(base: str, revision: str, sampling: Sampling) -> dict[str, object]:
    """What `served_model` draws with, ready for JSON. device is empty for the best one."""
    sampler = SAMPLERS[sampling.sampler]
    interval = sampling.guidance_interval
    return {
        "base_model": base,
        "base_model_revision": revision,
        "device": "",
        "scheduler": sampler.scheduler,
        "scheduler_options": dict(sampler.options),
        "eta": sampler.eta,
        "guidance_interval": list(interval) if interval else None,
        "adapter_weight": sampling.adapter_weight,
    }


def _check_served(
    client: MlflowClient, submission: Submission, name: str, number: int, tags: Mapping[str, str]
) -> None:
    """Check that the registry serves the file of a version. If it has lost the file, store it again."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    uri, sha256 = tracking_uri(), tags["adapter_sha256"]
    if _served_sha256(name, number) == sha256:
        return
    place = client.get_model_version_download_uri(name, str(number))
    with TemporaryDirectory() as folder:
        model = Path(folder, "model")
        known = re.search(r"/(m-[0-9a-f]{32})/", place)  # MLflow does not store a version's model_id
        _write_model(model, known[1] if known else None, submission, tags)
        get_artifact_repository(place, tracking_uri=uri).log_artifacts(str(model))
    if _served_sha256(name, number) != sha256:
        raise BestiaryError(
            f"The registry cannot serve the file of models:/{name}/{number}. Delete that version in MLflow, then run "
            f"`{REGISTER}` to register the adapter anew."
        )


def _served_sha256(name: str, number: int) -> str | None:
    """The SHA-256 of the file that the registry serves for a version; None when it serves none."""
    from bestiary.diffusion.adapter import adapter_sha256

    with TemporaryDirectory() as folder, contextlib.suppress(BestiaryError):
        return adapter_sha256(weights(find_version(f"models:/{name}/{number}"), Path(folder)))
    return None


def _log_evaluation(client: MlflowClient, run_id: str, submission: Submission) -> None:
    """Store what the gate and the model card need with the version's own run, which outlives the evaluation's run."""
    with TemporaryDirectory() as folder:
        report = Path(folder, "evaluate.json")
        report.write_text(submission.evaluation.model_dump_json(), encoding="utf-8")
        for file in (report, submission.pictures, submission.pictures.with_name("sheet.png")):
            if file.exists():
                client.log_artifact(run_id, str(file), GATE)


def _signature(sampling: Sampling) -> ModelSignature:
    """What MLflow's server accepts and returns for the version, with its sampling as the defaults."""
    from mlflow.models import ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import ColSpec

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "prompt")]),
        outputs=Schema([ColSpec(DataType.binary, "image")]),
        params=ParamSchema(
            [
                ParamSpec("seed", DataType.long, 0),
                ParamSpec("num_inference_steps", DataType.integer, sampling.steps),
                ParamSpec("guidance_scale", DataType.double, float(sampling.guidance_scale)),
                ParamSpec("height", DataType.integer, sampling.height),
                ParamSpec("width", DataType.integer, sampling.width),
                ParamSpec("negative_prompt", DataType.string, sampling.negative_prompt),
            ]
        ),
    )
