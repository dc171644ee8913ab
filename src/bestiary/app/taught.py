"""Which subjects an adapter was taught, as far as this project knows."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from bestiary.errors import BestiaryError
from bestiary.evaluation.report import read_evaluation
from bestiary.files import project_root
from bestiary.registry.tags import subjects_of
from bestiary.registry.versions import Version
from bestiary.subjects import Subject, Subjects

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluated:
    """The adapter that this project evaluated last: its SHA-256 and its subjects."""

    sha256: str = ""
    subjects: tuple[Subject, ...] = ()


def evaluated() -> Evaluated:
    """The adapter that this project's report of evaluate is about; an empty one when there is no report."""
    from bestiary.stage import REPORTS, RESULTS

    try:
        report = read_evaluation(Path(project_root(), RESULTS, "evaluate.json"))
        subjects = Subjects.read_from(Path(project_root(), REPORTS, "evaluate"))
    except BestiaryError:
        return Evaluated()
    return Evaluated(report.adapter_sha256, tuple(map(subjects.of, report.classes)))


def taught_by_file(sha256: str, last: Evaluated) -> tuple[Subject, ...] | None:
    """The subjects of an adapter that is not registered; None when nothing here says."""
    return last.subjects if last.subjects and sha256 == last.sha256 else None


def taught_by_version(version: Version, last: Evaluated) -> tuple[Subject, ...] | None:
    """The subjects of a registered version. One from before the tag is known by its hash; None when nothing says."""
    try:
        return subjects_of(version) or taught_by_file(version.tags.get("adapter_sha256", ""), last)
    except BestiaryError as error:  # drawing with this version reports it; others stay usable
        log.warning("%s", error)
        return None
