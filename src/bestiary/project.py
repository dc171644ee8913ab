"""A checkout as a project: its parameters, and the results of its last run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bestiary.errors import BestiaryError
from bestiary.files import project_root
from bestiary.samplers import DrawingDefaults

if TYPE_CHECKING:
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


def last_results() -> tuple[EvaluationReport, Registration]:
    """What the last `dvc repro` measured and registered.

    Raises BestiaryError when there is no result yet, or a report is damaged.
    """
    from bestiary.evaluation.report import read_evaluation
    from bestiary.registry.registering import read_registration
    from bestiary.stage import RESULTS

    results = Path(os.path.relpath(project_root() / RESULTS))
    return read_evaluation(results / "evaluate.json"), read_registration(results / "register.json")


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
        raise BestiaryError("There is no project here. Run this in a checkout of Bestiary.")
    if not (clean / "manifest.csv").is_file():
        raise BestiaryError("No images have been cleaned yet. Run `dvc repro clean`.")
    base = project_base(params)
    text = load_text(base.model if base else params.base.model, params.base.revision)
    folders = check_captions(read_table(clean / "manifest.csv"), Subjects.read_from(clean), text, params.encode)
    yield from render_captions(folders, text[0].model_max_length)


def render_results(evaluation: EvaluationReport, registration: Registration, program: str) -> Iterator[str]:
    """The lines that `bestiary results` prints. `program` is how the user starts this program."""
    from bestiary.evaluation.report import as_text, heading

    yield f"{heading(evaluation)}\n"
    yield from as_text(evaluation)
    sheet = short_path(project_root() / "reports" / "evaluate" / "sheet.png")
    aliases = f" ({', '.join(registration.aliases)})" if registration.aliases else ""
    yield f"\nLook      {sheet}: the base beside the adapter"
    yield f"Version   models:/{registration.name}/{registration.version}{aliases}"
    for reason in registration.reasons:
        yield f"          {reason}"
    yield "\nNext"
    for command, purpose in (
        (f"{program} generate tiger panda --count 4", "draw with it"),
        ("make mlflow", "see every run in the browser"),
        (f"{program} pull models:/{registration.name}@champion --out my-adapter", "copy the adapter"),
    ):
        yield f"  {command:70}{purpose}"


def short_path(path: Path) -> str:
    """A path as the user would type it: relative to the working folder where it is below it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
