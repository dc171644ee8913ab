"""The model registry: one version for each adapter's content, and the gate that says which of them is the champion."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bestiary.errors import BestiaryError
from bestiary.files import project_root, write_atomically
from bestiary.params import Register
from bestiary.settings import Usual
from bestiary.tracking.database import Database, open_database
from bestiary.tracking.lineage import Server, Step, lineage
from bestiary.tracking.store import check_database, explain, locked, open_client, sqlite_path, tracking_uri

CHAMPION, CHALLENGER = "champion", "challenger"
ROLLED_BACK = "rolled_back_because"
CHAMPION_BEFORE = "champion_before"
USUAL = "usual"  # the tag of how a version draws unless told otherwise
GATE = "gate"  # the folder of a run's artifacts that holds what the next adapter is compared with
SCORES = ("clip_score", "top1", "top5", "cmmd")
Report = Mapping[str, Any]


@dataclass(frozen=True)
class Registration:
    """What `register` did: the content of reports/register.json."""

    name: str
    version: int
    aliases: list[str]
    adapter_sha256: str
    decision: str
    reasons: list[str]


@dataclass(frozen=True)
class Version:
    """A registered adapter."""

    name: str
    version: int
    aliases: list[str]
    tags: dict[str, str]
    run_id: str


@dataclass(frozen=True)
class Adapter:
    """An adapter on this disk, and the base it was trained on as far as that is known."""

    file: Path
    uri: str  # what it was asked for as, with the version in place of an alias
    base: str | None
    base_revision: str | None
    base_sha256: str | None
    usual: Usual | None = None  # how a registered one was evaluated


# ---- the gate ----


@dataclass(frozen=True)
class Comparison:
    """An adapter against the champion on the same prompts and seeds; no difference where they were measured unlike."""

    version: int
    difference: Mapping[str, Any] | None  # mean and ci95 of the score, paired


def decide(evaluation: Report, rules: Register, champion: Comparison | None) -> tuple[str, list[str]]:
    """The alias that an adapter earns by its reports/evaluate.json, and why, in words.

    It becomes the champion when it beats the base for certain (the whole 95 % interval above 0), is not memorising and
    is not worse than the champion before it.
    """
    gain = evaluation["delta"][rules.champion_score]
    copied = evaluation["memorisation"]["adapter"]["copied"]
    told = f"{rules.champion_score} {_told(gain)}"
    good, bad = [], []
    if gain["ci95"][0] > 0:
        good.append(f"It beats the base: {told}.")
    else:
        bad.append(f"It does not beat the base for certain: {told}.")
    if copied["ci95"][0] > rules.max_copied:
        low, high = copied["ci95"]
        bad.append(
            f"It copies its training images: {copied['mean']:.0%} of its pictures "
            f"(95 % interval {low:.0%} to {high:.0%}), and {rules.max_copied:.0%} may be copies."
        )
    if champion is None:
        good.append("There was no champion before it.")
    elif champion.difference is None:
        bad.append(
            f"The champion, version {champion.version}, was measured on another base, with other prompts, seeds or "
            "another judge, so nothing says which is better; a person can decide with `bestiary promote`."
        )
    else:
        told = f"{rules.champion_score} {_told(champion.difference)} on the same prompts and seeds"
        if champion.difference["mean"] < 0:
            bad.append(f"The champion, version {champion.version}, is better: {told}.")
        else:
            good.append(f"It is not worse than the champion before it, version {champion.version}: {told}.")
    return (CHALLENGER, bad) if bad else (CHAMPION, good)


def _told(difference: Mapping[str, Any]) -> str:
    low, high = difference["ci95"]
    return f"{difference['mean']:+.2f} (95 % interval {low:+.2f} to {high:+.2f})"


def register(
    adapter: Path,
    reports: Mapping[str, Report],
    pictures: Path,
    rules: Register,
    *,
    base: str,
    base_revision: str | None,
    run_id: str,
    measured: str,
    usual: Usual,
) -> Registration:
    """Register the verified adapter, once for its content, and give it the alias that it earns.

    `reports` holds the reports of train, evaluate and benchmark, `pictures` evaluate's table of scores by prompt and
    seed, `run_id` the MLflow run that the version belongs to, `measured` a hash of how evaluate measured (adapters
    compare only when measured alike), and `usual` how it drew: the version keeps that, and draws so from then on.
    Raises BestiaryError when a report speaks of another adapter, the adapter does not apply to the base, or
    MLflow cannot be written.
    """
    from bestiary.diffusion.adapter import adapter_file, adapter_sha256, check_trained_on, verify_adapter
    from bestiary.diffusion.base import base_sha256

    sha256 = adapter_sha256(adapter)
    for stage, report in reports.items():
        if report.get("adapter_sha256") != sha256:
            raise BestiaryError(f"reports/{stage}.json is not about the adapter in {adapter}: run `dvc repro {stage}`.")
    check_trained_on(adapter, base, base_revision)
    verification = verify_adapter(adapter, base, base_revision)
    evaluation, name = reports["evaluate"], rules.name
    tags = {
        "adapter_sha256": sha256,
        # The leading "./" says, to MLflow too, that it is a folder of the project and not an id on the hub.
        "base": f"./{base}" if Path(base).is_dir() and not Path(base).is_absolute() else base,
        "base_revision": base_revision or "",
        "base_sha256": base_sha256(base, base_revision),
        "rank": str(verification.rank),
        "alpha": str(verification.alpha),
        "measured": measured,
        USUAL: usual.to_json(),
        **{
            f"{who}.{score}": str(evaluation[who][score]["mean"])
            for who in ("base", "adapter", "delta")
            for score in SCORES
            if score in evaluation[who]
        },
    }
    uri = tracking_uri()
    check_database(uri)
    with plain_errors(uri):
        client = open_client(uri, project_root())
        with locked(uri):
            make_name(client, name)
            version = _version_of(client, name, sha256)
            if version is None:
                made = client.get_run(run_id).data.tags
                source = {"git_revision": made.get("mlflow.source.git.commit"), "git_dirty": made.get("git_dirty")}
                tags |= {key: value for key, value in source.items() if value is not None}
                version = _create(client, adapter_file(adapter), name, tags, run_id, evaluation, usual)
            else:
                for key, value in tags.items():  # it may have been evaluated again, otherwise
                    client.set_model_version_tag(name, str(version), key, value)
            _keep_pictures(client, name, version, pictures)
            present = None
            while present != (present := _aliases(client, name)):  # on a server, another registration may move them
                decision, reasons = _judge(client, version, present, evaluation, rules, measured, pictures)
            _give_alias(client, name, version, decision, present)
            client.set_model_version_tag(name, str(version), "decision", f"{decision}: {' '.join(reasons)}")
            aliases = sorted(alias for alias, number in _aliases(client, name).items() if number == version)
    return Registration(name, version, aliases, sha256, decision, reasons)


def _judge(
    client: Any,
    version: int,
    present: Mapping[str, int],
    evaluation: Report,
    rules: Register,
    measured: str,
    pictures: Path,
) -> tuple[str, list[str]]:
    number = present.get(CHAMPION)
    if number is None:
        return decide(evaluation, rules, None)
    if number == version:
        decision, reasons = decide(evaluation, rules, None)
        if decision == CHAMPION:
            return CHAMPION, [reasons[0], "It was the champion already."]
        # What was once given is not taken away by a re-run; that is `bestiary rollback`'s to do.
        return CHAMPION, [*reasons, "It was the champion already and stays it until somebody rolls back."]
    tags = client.get_model_version(rules.name, str(version)).tags
    if ROLLED_BACK in tags:
        return CHALLENGER, [f"It was the champion once and was rolled back: {tags[ROLLED_BACK]}"]
    champion = client.get_model_version(rules.name, str(number))
    difference = None
    if champion.tags.get("measured") == measured:
        theirs = client.download_artifacts(champion.run_id, f"{GATE}/{pictures.name}")
        difference = _paired(pictures, Path(theirs), rules.champion_score)
    return decide(evaluation, rules, Comparison(number, difference))


def _paired(mine: Path, theirs: Path, score: str) -> dict[str, Any] | None:
    """The mean difference of two tables of pictures with its interval; None when they are not of the same prompts."""
    import pandas as pd

    from bestiary.evaluation.scoring import bootstrap_mean, resample_counts

    tables = []
    for path in (mine, theirs):
        table = pd.read_csv(path).set_index(["prompt", "seed"]).sort_index()
        table["adapter_top1"] = 100.0 * (table["adapter_predicted"] == table["class"])
        tables.append(table[f"adapter_{score}"])
    if not tables[0].index.equals(tables[1].index):
        return None
    return bootstrap_mean(tables[0] - tables[1], resample_counts(len(tables[0]), 10_000, seed=0)).report()


def _keep_pictures(client: Any, name: str, version: int, pictures: Path) -> None:
    client.log_artifact(client.get_model_version(name, str(version)).run_id, str(pictures), GATE)


def _give_alias(client: Any, name: str, version: int, alias: str, present: Mapping[str, int]) -> None:
    if present.get(alias) != version:
        if alias == CHAMPION and CHAMPION in present:
            client.set_model_version_tag(name, str(version), CHAMPION_BEFORE, str(present[CHAMPION]))
        client.set_registered_model_alias(name, alias, str(version))
    other = CHALLENGER if alias == CHAMPION else CHAMPION
    if other == CHALLENGER and present.get(other) == version:
        client.delete_registered_model_alias(name, CHALLENGER)


def make_name(client: Any, name: str) -> None:
    """Make the registered model where it is not there yet."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description="LoRA adapters that teach Stable Diffusion animals.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _version_of(client: Any, name: str, sha256: str) -> int | None:
    """The version of this content; the oldest, where two registrations on a server have met."""
    found = client.search_model_versions(f"name = '{name}' AND tags.adapter_sha256 = '{sha256}'")
    return min((int(version.version) for version in found), default=None)


def _create(
    client: Any,
    file: Path,
    name: str,
    tags: Mapping[str, str],
    run_id: str,
    evaluation: Report,
    usual: Usual,
) -> int:
    import mlflow
    from mlflow.models import Model, ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import ColSpec

    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "prompt")]),
        outputs=Schema([ColSpec(DataType.binary, "image")]),
        params=ParamSchema(
            [
                ParamSpec("num_inference_steps", DataType.integer, usual.steps),
                ParamSpec("guidance_scale", DataType.double, float(usual.guidance_scale)),
                ParamSpec("height", DataType.integer, usual.resolution),
                ParamSpec("width", DataType.integer, usual.resolution),
                ParamSpec("negative_prompt", DataType.string, ""),
            ]
        ),
    )

    def write(folder: Path, logged: Any) -> None:
        mlflow.diffusers.save_model(
            str(file),
            str(folder),
            tags["base"],
            mlflow_model=Model(run_id=run_id, model_id=logged.model_id, artifact_path=logged.artifact_location),
            signature=signature,
            input_example={"prompt": "a photo of a tiger"},
            metadata={key: tags[key] for key in ("adapter_sha256", "base", "base_revision", "base_sha256")},
        )

    return publish(client, name, run_id, tags, _card(tags, evaluation), write)


def publish(
    client: Any,
    name: str,
    run_id: str,
    tags: Mapping[str, str],
    description: str,
    write: Callable[[Path, Any], None],
) -> int:
    """Make a version of the MLflow model that `write` puts into a folder for its logged model. Returns its number.

    It is the number of the version that has this content already, where two registrations on a server have met.
    """
    from mlflow.entities import LoggedModelStatus

    # mlflow.diffusers.log_model() in its parts: in one call it would set the whole process's tracking URI.
    logged = client.create_logged_model(client.get_run(run_id).info.experiment_id, "adapter", run_id)
    with TemporaryDirectory() as folder:
        model = Path(folder, "model")
        write(model, logged)
        client.log_model_artifacts(logged.model_id, str(model))
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    created = _numbered(client.create_model_version)(
        name,
        logged.artifact_location,  # and not its models:/ URI, which MLflow would look up in the process's own store
        run_id,
        tags=dict(tags),
        description=description,
        model_id=logged.model_id,
    )
    version = int(created.version)
    first = _version_of(client, name, tags["adapter_sha256"])
    if first is not None and first < version:
        client.delete_model_version(name, str(version))
        client.delete_logged_model(logged.model_id)
        return first
    return version


def _numbered(create: Callable[..., Any]) -> Callable[..., Any]:
    """MLflow's create_model_version, called again when others were first at the same number three times in a row."""
    from tenacity import retry, retry_if_exception_message, stop_after_attempt, wait_random_exponential

    overtaken = retry_if_exception_message(match=".*Giving up after")
    return retry(retry=overtaken, wait=wait_random_exponential(0.1, 2), stop=stop_after_attempt(8), reraise=True)(
        create
    )


def _card(tags: Mapping[str, str], evaluation: Report) -> str:
    lines = [
        f"A LoRA adapter (rank {tags['rank']}, alpha {tags['alpha']}) for `{tags['base']}`.",
        "",
        "| score | base | adapter | difference (95 % interval) |",
        "|---|---|---|---|",
    ]
    for score in SCORES:
        if score in evaluation["delta"]:
            base, adapter, delta = (evaluation[who][score] for who in ("base", "adapter", "delta"))
            low, high = delta["ci95"]
            lines.append(
                f"| {score} | {base['mean']:.2f} | {adapter['mean']:.2f} "
                f"| {delta['mean']:+.2f} ({low:+.2f} to {high:+.2f}) |"
            )
    return "\n".join(lines)


# ---- what is there ----


def versions(name: str = "bestiary") -> list[Version]:
    """All registered versions, oldest first. Raises BestiaryError when there is no registry or no such model."""
    if there := _local():
        with _opened(there) as database:
            aliases, found = database.aliases(name), database.versions(name)
            if not found and name not in (known := database.models()):
                raise BestiaryError(_unknown_name(name, known))
    else:
        uri, client = _open_registry()
        with plain_errors(uri):
            aliases = _aliases(client, name)
            items = client.search_model_versions(f"name = '{name}'", max_results=10_000)
        found = sorted((int(item.version), item.run_id, dict(item.tags)) for item in items)
    return [
        Version(name, number, sorted(alias for alias, its in aliases.items() if its == number), tags, run_id)
        for number, run_id, tags in found
    ]


def find_version(uri: str) -> Version:
    """The version that `models:/name@alias` or `models:/name/3` means; BestiaryError says what there is instead."""
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", uri)
    if match is None:
        raise BestiaryError(
            f"{uri} names no registered version: write models:/bestiary@champion or models:/bestiary/3."
        )
    name, alias, number = match.groups()
    there = versions(name)
    for version in there:
        if alias in version.aliases if alias else version.version == int(number):
            return version
    known = ", ".join(" = ".join([str(version.version), *version.aliases]) for version in there) or "none"
    raise BestiaryError(f"There is no {uri}; the versions of {name} are: {known}.")


def resolve(what: str) -> Adapter:
    """The adapter that `what` means: `models:/...`, a folder, or a file; its content checked where it is registered.

    Raises BestiaryError when there is none, or when a registered file is not the one that was registered.
    """
    from bestiary.diffusion.adapter import adapter_file, adapter_sha256, read_provenance

    if not what.startswith("models:"):
        file = adapter_file(what)
        made_from = read_provenance(file)
        return Adapter(file, what, made_from.get("base"), made_from.get("base_revision"), made_from.get("base_sha256"))
    version = find_version(what)
    file = adapter_file(_weights_folder(version))
    if adapter_sha256(file) != version.tags["adapter_sha256"]:
        raise BestiaryError(f"The file of {version.name} {version.version} is not the one that was registered: {file}.")
    tags = version.tags
    return Adapter(
        file,
        f"models:/{version.name}/{version.version}",
        tags["base"],
        tags["base_revision"] or None,
        tags["base_sha256"],
        usual_of(version),
    )


def _weights_folder(version: Version) -> Path:
    """Where a version's weights are on this disk, downloaded if they were elsewhere."""
    if there := _local():
        with _opened(there) as database:
            folder = Path(database.files(version.name, version.version), "adapter_weights")
        if folder.is_dir():
            return folder
    uri, client = _open_registry()
    with plain_errors(uri):
        import mlflow

        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        source = client.get_model_version_download_uri(version.name, str(version.version))
        return Path(mlflow.artifacts.download_artifacts(f"{source}/adapter_weights", tracking_uri=uri))


def usual_of(version: Version) -> Usual | None:
    """How a version was evaluated, and draws unless told otherwise; None where its tags do not say."""
    try:
        return Usual.from_json(version.tags[USUAL])
    except (KeyError, ValueError):
        return None


def find_base(adapter: Adapter, base: str | None = None) -> str:
    """Where the adapter's base is: `base` when given, else the one it names, looked for in the project's folder too.

    Raises BestiaryError when the adapter names none, or a folder that is not here.
    """
    named = base or adapter.base
    if named is None:
        raise BestiaryError(f"{adapter.uri} does not say which base it was trained on: name it with --base.")
    return locate_base(named, f" that {adapter.uri} was trained on")


def check_base(adapter: Adapter, model: str) -> None:
    """Raise BestiaryError when the folder `model` is another base than the adapter was trained on.

    A base of the same shape would draw without a word, and wrongly. One from the hub is pinned by its revision.
    """
    from bestiary.diffusion.base import base_sha256

    if adapter.base_sha256 and Path(model).is_dir() and base_sha256(model) != adapter.base_sha256:
        raise BestiaryError(
            f"{adapter.uri} was trained on another base than {model}: on {adapter.base} with the SHA-256 "
            f"{adapter.base_sha256[:12]}. Choose a base by hand to draw with it all the same."
        )


def locate_base(named: str, whose: str = "") -> str:
    """A base's folder, as it stands or from the project's root; or the id on the hub that `named` is."""
    for place in (Path(named), project_root() / named):
        if place.is_dir():
            return str(place.resolve())
    if named.startswith(("/", "./")):
        raise BestiaryError(
            f"The base {named}{whose} is not here: run this in a clone of its project, or name its folder with --base."
        )
    return named


def pull(what: str, out: Path, base: str | None = None) -> Path:
    """Put an adapter into the folder `out`, after proving that it applies to its base. Returns the file."""
    from bestiary.diffusion.adapter import verify_adapter

    adapter = resolve(what)
    verification = verify_adapter(adapter.file, find_base(adapter, base), None if base else adapter.base_revision)
    if verification.base_is_the_trained_one is False:
        raise BestiaryError(
            f"The base {find_base(adapter, base)} is not the one that {adapter.uri} was trained on: that is "
            f"{adapter.base} with the SHA-256 {adapter.base_sha256}."
        )
    target = out / adapter.file.name
    write_atomically(target, adapter.file.read_bytes())
    return target


def walk(what: str) -> tuple[Version, list[Step]]:
    """A registered version, and the runs that it rests on, register first."""
    version = find_version(what)
    if there := _local():
        with _opened(there) as database:
            try:
                return version, lineage(database, version.run_id)
            except KeyError:
                raise BestiaryError(f"The run of {version.name} {version.version} is not there any more.") from None
    uri, client = _open_registry()
    with plain_errors(uri):
        return version, lineage(Server(client), version.run_id)


def artifact(run_id: str, path: str, folder: Path) -> Path | None:
    """A file that a run left, copied into `folder`; None when it left none there."""
    uri, client = _open_registry()
    with plain_errors(uri):
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        if path not in {item.path for item in client.list_artifacts(run_id, path.rpartition("/")[0] or None)}:
            return None
        return Path(client.download_artifacts(run_id, path, str(folder)))


def parameters(run_id: str) -> dict[str, str]:
    """The parameters that a run was given."""
    uri, client = _open_registry()
    with plain_errors(uri):
        return dict(client.get_run(run_id).data.params)


# ---- the human's hand ----


def promote(number: int, because: str, name: str = "bestiary") -> Version:
    """Make a version the champion whatever the gate said; its tags keep the reason."""
    version = find_version(f"models:/{name}/{number}")
    uri, client = _open_registry()
    with plain_errors(uri), locked(uri):
        client.set_model_version_tag(name, str(number), "promoted_because", because)
        if ROLLED_BACK in version.tags:
            client.delete_model_version_tag(name, str(number), ROLLED_BACK)
        _give_alias(client, name, number, CHAMPION, _aliases(client, name))
    return version


def rollback(because: str, name: str = "bestiary") -> Version:
    """Make the champion before the present one champion again; the tags of the one that goes keep the reason.

    Raises BestiaryError when there was none, or when it has been deleted or rolled back itself.
    """
    uri, client = _open_registry()
    with plain_errors(uri), locked(uri):
        there = {version.version: version for version in versions(name)}
        champion = find_version(f"models:/{name}@{CHAMPION}")
        if CHAMPION_BEFORE not in champion.tags:
            raise BestiaryError(f"There is no champion before version {champion.version} to go back to.")
        before = int(champion.tags[CHAMPION_BEFORE])
        if before not in there or ROLLED_BACK in there[before].tags:
            what = "has been rolled back, too" if before in there else "has been deleted"
            raise BestiaryError(
                f"Version {before}, the champion before version {champion.version}, {what}: "
                "choose one with `bestiary promote`."
            )
        client.set_registered_model_alias(name, CHAMPION, str(before))
        if CHALLENGER in there[before].aliases:
            client.delete_registered_model_alias(name, CHALLENGER)
        client.set_model_version_tag(name, str(champion.version), ROLLED_BACK, because)
        client.delete_model_version_tag(name, str(champion.version), CHAMPION_BEFORE)  # or the next one would return
    return there[before]


def _open_registry() -> tuple[str, Any]:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # somebody waits; a recorder has more patience
    uri = tracking_uri()
    _check(uri)
    with plain_errors(uri):
        return uri, open_client(uri, project_root())


def needs_mlflow(what: str) -> bool:
    """Whether finding the adapter that `what` means takes MLflow, whose import takes as long as torch's."""
    return what.startswith("models:") and _local() is None


def _local() -> Path | None:
    """The SQLite database of the registry, which can be read without MLflow; None where a server has it."""
    uri = tracking_uri()
    if os.environ.get("MLFLOW_REGISTRY_URI", uri) != uri:
        return None
    _check(uri)
    return sqlite_path(uri)


def _check(uri: str) -> None:
    path = sqlite_path(uri)
    if path is not None and not path.is_file():
        raise BestiaryError(f"There is no registry yet ({path} does not exist): `dvc repro` makes one.")
    check_database(uri)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Database]:
    try:
        with open_database(path) as database:
            yield database
    except sqlite3.Error as error:
        raise BestiaryError(explain(error, f"sqlite:///{path}")) from None


def _aliases(client: Any, name: str) -> dict[str, int]:
    from mlflow.exceptions import MlflowException

    try:
        return {alias: int(number) for alias, number in client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = [model.name for model in client.search_registered_models()]
        raise BestiaryError(_unknown_name(name, known)) from None


def _unknown_name(name: str, known: Iterable[str]) -> str:
    return f"There is no registered model {name!r}; there is {', '.join(sorted(known)) or 'none'}."


@contextlib.contextmanager
def plain_errors(uri: str) -> Iterator[None]:
    """Turn what MLflow raises into a BestiaryError of one sentence."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        raise BestiaryError(explain(error, uri)) from error
