"""The tags of a registered version, which anybody with access to the registry can edit: checked before use."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from bestiary.errors import BestiaryError, short
from bestiary.samplers import DrawingDefaults
from bestiary.subjects import Subject, Subjects, subject_of

if TYPE_CHECKING:
    from bestiary.registry.versions import Version

DEFAULTS_TAG = "usual"  # holds a version's drawing defaults
SUBJECTS_TAG = "subjects"  # holds the words of a version's subjects, by class folder
VERSION_NUMBER = re.compile(r"[1-9]\d{0,8}")
MAX_BASE_LENGTH = 1000  # of a path or an id on the hub


@dataclass(frozen=True)
class AdapterTags:
    """What a version's tags say of its adapter. `defaults` is None for versions from before they were stored."""

    adapter_sha256: str
    base: str
    base_revision: str | None
    base_sha256: str
    defaults: DrawingDefaults | None
    subjects: tuple[Subject, ...]


def read_tags(version: Version) -> AdapterTags:
    """The version's tags. Raises BestiaryError that names the first one that is missing or makes no sense."""
    base = text(version, "base")
    if not base or len(base) > MAX_BASE_LENGTH or not base.isprintable():
        raise odd(version, "base", "the name of a base")
    revision = version.tags.get("base_revision", "")
    if not re.fullmatch(r"[\w./-]{0,200}", revision):
        raise odd(version, "base_revision", "a revision")
    return AdapterTags(
        adapter_sha256=_sha256(version, "adapter_sha256"),
        base=base,
        base_revision=revision or None,
        base_sha256=_sha256(version, "base_sha256"),
        defaults=_defaults(version),
        subjects=subjects_of(version),
    )


def text(version: Version, key: str) -> str:
    """The value of a tag. Raises BestiaryError when the version has no such tag."""
    if key not in version.tags:
        raise BestiaryError(
            f"{version.uri} has no tag {key}, so it cannot be used. Choose another version, or register the adapter "
            "again."
        )
    return version.tags[key]


def number(version: Version, key: str) -> float:
    """The value of a tag as a finite number. Raises BestiaryError when it is missing or no number."""
    value = text(version, key)
    if not re.fullmatch(r"-?\d{1,20}(\.\d{1,30})?(e-?\d{1,2})?", value):
        raise odd(version, key, "a number")
    return float(value)


def whole_number(version: Version, key: str) -> int:
    """The value of a tag as the number of a version. Raises BestiaryError when it is missing or no such number."""
    value = text(version, key)
    if not VERSION_NUMBER.fullmatch(value):
        raise odd(version, key, "the number of a version")
    return int(value)


def odd(version: Version, key: str, expected: str) -> BestiaryError:
    """The error for a tag whose value is not what is expected."""
    return BestiaryError(
        f"The tag {key} of {version.uri} is {short(version.tags[key])}, which is not {expected}. Choose another "
        "version, or register the adapter again."
    )


def defaults_of(version: Version) -> DrawingDefaults | None:
    """How a version was evaluated, and how it draws by default. None when its tags do not say, or make no sense.

    >>> from bestiary.registry.versions import Version
    >>> tag = '{"template": "{}", "steps": 9, "guidance_scale": 3.0, "scheduler": "ddim", "resolution": 64}'
    >>> defaults_of(Version("bestiary", 1, [], {"usual": tag}, "run")).sampling.steps
    9
    >>> defaults_of(Version("bestiary", 2, [], {}, "run")) is None
    True
    """
    try:
        return DrawingDefaults.from_json(version.tags[DEFAULTS_TAG])
    except (KeyError, ValueError, RecursionError):
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

    >>> from bestiary.registry.versions import Version
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


def _sha256(version: Version, key: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text(version, key)):
        raise odd(version, key, "a SHA-256")
    return version.tags[key]


def _defaults(version: Version) -> DrawingDefaults | None:
    defaults = defaults_of(version)
    if defaults is None and DEFAULTS_TAG in version.tags:
        raise odd(version, DEFAULTS_TAG, "a description of how to draw")
    return defaults
