"""A checkout as a project: its parameters, and the results of its last run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bestiary.errors import BestiaryError
from bestiary.files import check_writable, find_project, is_folder, no_project_error, project_root
from bestiary.samplers import DrawingDefaults

if TYPE_CHECKING:
    from bestiary.evaluation.acceptance import AcceptanceReport
    from bestiary.evaluation.report import EvaluationReport
    from bestiary.generation import Base
    from bestiary.params import Params
    from bestiary.registry.registering import Registration

DEFAULT_NAME = "bestiary"  # of the registered model


def project_params() -> Params | None:
    """The project's parameters; None outside a project. Raises BestiaryError when they are invalid."""
    from bestiary.params import load_params

    path = project_root() / "params.yaml"
    return load_params(path) if path.is_file() else None


def registered_name() -> str:
    """The name of the project's registered model."""
    params = project_params()
    return params.register_.name if params else DEFAULT_NAME


def drawing_defaults(params: Params | None) -> DrawingDefaults:
    """How to draw with an adapter that is not registered: as this project evaluates."""
    return params.evaluate.defaults() if params else DrawingDefaults()


def project_base(params: Params | None) -> Base | None:
    """The base that params.yaml names; None outside a project."""
    from bestiary.generation import located_base

    return located_base(params.base.model, params.base.revision) if params else None


def known_bases() -> list[str]:
    """The bases on the hub that an adapter may name without the user confirming them with --base."""
    base = project_base(project_params())
    return [base.model] if base else []


def project_tiny_decoder(params: Params | None) -> Base | None:
    """The tiny decoder that params.yaml names; None if it names none, or outside a project."""
    from bestiary.generation import located_base

    tiny = params.tiny_decoder if params else None
    return located_base(tiny.model, tiny.revision) if tiny else None


def last_results() -> tuple[EvaluationReport, Registration | None]:
    """What the last `dvc repro` measured, and the registration of that adapter; None when it is not registered.

    An experiment may stop before the adapter is registered, and then the report of an earlier registration is still
    here. Raises BestiaryError outside a project, when there is no result yet, or when a report is damaged.
    """
    from bestiary.evaluation.report import read_evaluation
    from bestiary.registry.registering import read_registration
    from bestiary.stage import RESULTS

    if find_project() is None:
        raise no_project_error()
    results = Path(os.path.relpath(project_root() / RESULTS))
    evaluation = read_evaluation(results / "evaluate.json")
    path = results / "register.json"
    registration = read_registration(path) if path.exists() else None
    is_of_this = registration is not None and registration.adapter_sha256 == evaluation.adapter_sha256
    return evaluation, registration if is_of_this else None


def last_acceptance(evaluation: EvaluationReport) -> AcceptanceReport | None:
    """The last `make fast` report about the evaluated adapter's fast variant; None if there is none.

    Raises BestiaryError when the report is damaged.
    """
    from bestiary.evaluation.acceptance import read_acceptance
    from bestiary.stage import RESULTS

    path = Path(os.path.relpath(project_root() / RESULTS)) / "accept.json"
    report = read_acceptance(path) if path.exists() else None
    return report if report and report.adapter_sha256 == evaluation.adapter_sha256 else None


def project_captions() -> Iterator[str]:
    """The lines that `bestiary captions` prints about the cleaned images.

    Raises BestiaryError outside a project, before images were cleaned, and when the base does not load.
    """
    from bestiary.diffusion.base import load_text
    from bestiary.diffusion.caption_check import check_captions, render_captions
    from bestiary.subjects import Subjects
    from bestiary.tables import read_table

    params, clean = project_params(), project_root() / "build" / "clean"
    if params is None:
        raise no_project_error()
    if not (clean / "manifest.csv").is_file():
        raise BestiaryError("No images have been cleaned yet. Run `dvc repro clean`.")
    base = project_base(params)
    text = load_text(base.model if base else params.base.model, params.base.revision)
    folders = check_captions(read_table(clean / "manifest.csv"), Subjects.read_from(clean), text, params.encode)
    yield from render_captions(folders, text[0].model_max_length)


def write_project_captions() -> Iterator[str]:
    """Let the project's captioning model describe the images in data/ that have no caption; yield a line for each.

    Raises BestiaryError outside a project, when there is no captioning model or it does not load, when a caption file
    is wrong, and when data/ is not the project's own.
    """
    from bestiary.data.folder import choose
    from bestiary.data.listing import list_images
    from bestiary.files import dvc_cache

    params, data = project_params(), project_root() / "data"
    if params is None:
        raise no_project_error()
    _check_own(params, data)
    listing = list_images(data, dvc_cache)
    chosen = choose(listing.images, params.dataset.classes, params.dataset.images_per_class)
    from bestiary import captioning

    found, wanted = captioning.find_uncaptioned(listing, chosen), params.captioner
    for image in found.without_place:
        yield f"{short_path(image)}  no caption: {captioning.caption_file(image).name} belongs to another file"
    if not found.images:
        yield f"No image in {short_path(data)} lacks a caption."
        return
    if wanted is None:
        raise BestiaryError(
            f"profiles.{params.profile}.captioner in params.yaml is empty. Give it the model and the revision of a "
            "captioning model, as profiles.sciencedb has them."
        )
    own = project_root() / wanted.model  # "models/blip" also has the form of a hub id
    for folder in sorted({image.parent for image in found.images}):
        check_writable(folder)
    captioner = captioning.Captioner.load(own if is_folder(own.parent) else wanted.model, wanted.revision)
    for path, text in captioning.write_captions(found.images, captioner.describe):
        yield f"{short_path(path)}  {text}"
    yield f"{_NAMES[params.clean.caption_without_name]} (clean.caption_without_name)."
    yield "Correct the captions, then run `dvc add data` and `dvc repro clean`. `bestiary captions` shows the result."


# What becomes of captions that lack the subject's name, by clean.caption_without_name.
_NAMES = {
    "prepend": "The model does not know your subjects' names. Cleaning puts them in front",
    "keep": "The model does not know your subjects' names. Add them, because cleaning does not",
    "refuse": "The model does not know your subjects' names. Add them, because cleaning refuses captions without",
}


def _check_own(params: Params, data: Path) -> None:
    """Raise BestiaryError when files that are written to data/ would not be used, or be deleted."""
    from bestiary.yaml_file import read_yaml

    if params.dataset.source != "folder":
        raise BestiaryError(
            "dataset.source is sciencedb, whose images have no caption files. Put images into data/ and set "
            f"profiles.{params.profile}.dataset.source to folder."
        )
    pointer = data.with_name("data.dvc")
    content = read_yaml(pointer) if pointer.is_file() else {}
    if isinstance(content, dict) and content.get("deps"):
        raise BestiaryError(
            "data/ is an import (data.dvc), so `dvc repro` would delete caption files in it. Run "
            "`rm data.dvc && dvc add data` to make the images your own."
        )


def render_results(
    evaluation: EvaluationReport,
    registration: Registration | None,
    program: str,
    acceptance: AcceptanceReport | None = None,
) -> Iterator[str]:
    """The lines that `bestiary results` prints. `program` is how the user starts this program.

    `acceptance` is the report about the adapter's fast variant.
    """
    from bestiary.evaluation.report import as_text, heading
    from bestiary.registry.result_page.page import is_about

    yield f"{heading(evaluation)}\n"
    yield from as_text(evaluation)
    sheet = short_path(project_root() / "reports" / "evaluate" / "sheet.png")
    yield f"\nLook      {sheet}: the base beside the adapter"
    page = project_root() / "reports" / "index.html"
    if is_about(page, evaluation.adapter_sha256):
        yield f"          {short_path(page)}: the result as one page to pass on"
    alone = evaluation.only_subject
    known = [name for name in ("tiger", "panda") if name in evaluation.classes]
    subjects = [alone.name] if alone else known or evaluation.classes[:1]
    draw, pull = f"generate {' '.join(map(shlex.quote, subjects))}", None
    if not _holds_adapter(evaluation):
        yield f"Version   These scores are of another adapter than the one in {evaluation.operating_point.checkpoint}."
        yield "          `dvc repro` evaluates and registers that one."
    elif registration is None:
        yield f"Version   The adapter in {evaluation.operating_point.checkpoint} is not registered."
        yield "          `dvc repro` registers it."
        draw = f"{draw} --adapter {evaluation.operating_point.checkpoint}{_weight(evaluation)}"
    else:
        yield from _version_lines(registration)
        version = f"models:/{registration.name}/{registration.version}"
        is_champion = "champion" in registration.aliases
        draw = draw if is_champion else f"{draw} --adapter {version}"
        pull = f"pull {f'models:/{registration.name}@champion' if is_champion else version} --out my-adapter"
    if acceptance:
        yield ""
        yield from _fast_lines(acceptance)
    fast = f"{program} {pull} --fast" if pull and acceptance and acceptance.accepted else ""
    yield "\nNext"
    steps = [
        (f"{program} {draw} --count 4", "draw with it"),
        ("make mlflow", "see every run in the browser"),
        (f"{program} {pull}" if pull else "", "copy the adapter"),
        (fast, "copy its fast variant"),
        ("make fast" if pull and not acceptance else "", "distil it to a few steps and export it for CPUs"),
    ]
    width = max(len(command) for command, _ in steps)
    yield from (f"  {command:{width}}  {purpose}" for command, purpose in steps if command)


def _fast_lines(acceptance: AcceptanceReport) -> Iterator[str]:
    from bestiary.evaluation.acceptance import as_text
    from bestiary.registry.result_page.page import is_about

    yield from as_text(acceptance)
    sheet, page = (project_root() / "reports" / name for name in ("accept/sheet.png", "fast.html"))
    if sheet.exists():
        yield f"\nLook      {short_path(sheet)}: the default way, the reference and the fast variant"
    if is_about(page, acceptance.adapter_sha256):
        yield f"          {short_path(page)}: the result with the fast variant as one page to pass on"


def _holds_adapter(evaluation: EvaluationReport) -> bool:
    """Whether the evaluated adapter is still in its folder. True if there is no adapter, as in a fresh clone.

    With a weight other than 1, the evaluated adapter is a copy in reports/operating_point that names its source.
    """
    from bestiary.diffusion.adapter_format import CONTAINS, FILE_NAME
    from bestiary.diffusion.stored_adapter import stored_provenance

    root, point = project_root(), evaluation.operating_point
    place = root / point.checkpoint
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    found = {_sha256(file) for file in files if file.is_file()}
    if not found or evaluation.adapter_sha256 in found:
        return True
    copy = root / "reports" / "operating_point" / FILE_NAME
    if point.scale == 1 or not copy.is_file() or _sha256(copy) != evaluation.adapter_sha256:
        return False
    return not found.isdisjoint(stored_provenance(copy).get(CONTAINS) or [])


def _weight(evaluation: EvaluationReport) -> str:
    """The adapter's weight as `--adapter` takes it; empty for 1."""
    scale = evaluation.operating_point.scale
    return "" if scale == 1 else f":{scale:g}"


def _sha256(file: Path) -> str:
    import hashlib

    return hashlib.sha256(file.read_bytes()).hexdigest()


def _version_lines(registration: Registration) -> Iterator[str]:
    """The adapter's version as the registry has it now, which may have lost it or moved its aliases since."""
    from bestiary.registry.versions import REGISTER, versions

    try:
        sha256 = registration.adapter_sha256
        found = [version for version in versions(registration.name) if version.tags.get("adapter_sha256") == sha256]
        problem = "" if found else f"The registry does not hold it any more. `{REGISTER}` registers it again."
    except BestiaryError as error:
        found, problem = [], str(error)
    number, aliases = (found[0].version, found[0].aliases) if found else (registration.version, registration.aliases)
    yield f"Version   models:/{registration.name}/{number}" + (f" ({', '.join(aliases)})" if aliases else "")
    for reason in registration.reasons:
        yield f"          {reason}"
    if problem:
        yield f"          This is how it was registered. {problem}"


def short_path(path: Path) -> str:
    """A path as the user would type it: relative to the working folder where it is below it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
