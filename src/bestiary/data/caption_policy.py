"""What cleaning does with captions from files: one without its subject's name, and an empty one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bestiary import params
from bestiary.data.captions import names_subject
from bestiary.data.inspection import Inspection
from bestiary.data.names import printable
from bestiary.data.triage import Triage
from bestiary.errors import BestiaryError
from bestiary.subjects import Subjects

NO_NAME = "caption without name"


def check_captions(
    triage: Triage,
    images: Sequence[Inspection],
    captions: Mapping[str, str],
    settings: params.Clean,
    subjects: Subjects,
) -> dict[str, str]:
    """Return the captions to train with, by path. An image with an empty caption uses the templates."""
    checked = {}
    for image in images:
        text, subject = captions.get(image.path), subjects.of(image.class_folder)
        if text is None:
            continue
        if not text:
            triage.record(image, "empty caption", "templates are used", "flagged")
            continue
        if not names_subject(text, subject):
            prepend = settings.caption_without_name == "prepend"
            triage.record(image, NO_NAME, f"{subject.name} not in: {text}", "repaired" if prepend else "flagged")
            text = f"{subject.name}, {text}" if prepend else text
        checked[image.path] = text
    return checked


def refuse_captions(triage: Triage, settings: params.Clean) -> None:
    """Raise BestiaryError when a caption lacks its subject's name and the settings refuse that."""
    nameless = [finding for finding in triage.findings if finding.kind == NO_NAME]
    if nameless and settings.caption_without_name == "refuse":
        more = f" and {len(nameless) - 1} more" if nameless[1:] else ""
        raise BestiaryError(
            f"The caption of {nameless[0].path}{more} lacks the subject's name: {printable(nameless[0].detail[:200])}. "
            "Add the name, or set clean.caption_without_name to prepend."
        )
