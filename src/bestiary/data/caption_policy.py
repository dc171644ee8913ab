"""What cleaning does with captions from files: one without its subject's name, and an empty one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from bestiary import params
from bestiary.data.captions import names_subject
from bestiary.data.findings import Finding
from bestiary.data.inspection import Inspection
from bestiary.data.names import printable
from bestiary.data.triage import Triage
from bestiary.errors import BestiaryError
from bestiary.subjects import Subjects

EMPTY, NO_NAME = "empty caption", "caption without name"


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
            triage.record(image, EMPTY, "the templates are used", "flagged")
            continue
        if not names_subject(text, subject):
            prepend = settings.caption_without_name == "prepend"
            detail = f"{subject.name} is not in: {text}"
            triage.record(image, NO_NAME, detail, "repaired" if prepend else "flagged")
            text = f"{subject.name}, {text}" if prepend else text
        checked[image.path] = text
    return checked


def describe_captions(findings: Iterable[Finding], settings: params.Clean) -> list[str]:
    """Say in lines how many captions are empty or lack the name, and what is done about it."""
    kinds = Counter(finding.kind for finding in findings)
    lines = []
    if empty := kinds[EMPTY]:
        lines.append(f"{empty} caption{'s are' if empty > 1 else ' is'} empty: the templates are used instead.")
    nameless = kinds[NO_NAME]
    if nameless and settings.caption_without_name != "refuse":
        lack = f"{nameless} caption{'s lack' if nameless > 1 else ' lacks'} the subject's name"
        done = "it is put in front" if settings.caption_without_name == "prepend" else "nothing is changed"
        lines.append(f"{lack}: {done} (clean.caption_without_name).")
    return lines


def refuse_captions(findings: Iterable[Finding], settings: params.Clean) -> None:
    """Raise BestiaryError when a caption lacks its subject's name and the settings refuse that."""
    nameless = [finding for finding in findings if finding.kind == NO_NAME]
    if nameless and settings.caption_without_name == "refuse":
        first, others = nameless[0], len(nameless) - 1
        more = f" ({others} more lack{'s' * (others == 1)} it too)" if others else ""
        raise BestiaryError(
            f"The caption of {first.path} lacks its subject's name: {printable(first.detail[:200])}{more}. Add the "
            "name, or set clean.caption_without_name to prepend."
        )
