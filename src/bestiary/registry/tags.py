"""The tags of a registered version, which anybody with access to the registry can edit: checked before use."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bestiary.errors import BestiaryError, short
from bestiary.samplers import DrawingDefaults

if TYPE_CHECKING:
    from bestiary.registry.versions import Version

DEFAULTS_TAG = "usual"  # holds a version's drawing defaults
MAX_BASE_LENGTH = 1000  # of a path or an id on the hub


@dataclass(frozen=True)
class AdapterTags:
    """What a version's tags say of its adapter. `defaults` is None for versions from before they were stored."""

    adapter_sha256: str
    base: str
    base_revision: str | None
    base_sha256: str
    defaults: DrawingDefaults | None


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
    if not re.fullmatch(r"[1-9]\d{0,8}", value):
        raise odd(version, key, "the number of a version")
    return int(value)


def odd(version: Version, key: str, expected: str) -> BestiaryError:
    """The error for a tag whose value is not what is expected."""
    return BestiaryError(
        f"The tag {key} of {version.uri} is {short(version.tags[key])}, which is not {expected}. Choose another "
        "version, or register the adapter again."
    )


def _sha256(version: Version, key: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text(version, key)):
        raise odd(version, key, "a SHA-256")
    return version.tags[key]


def _defaults(version: Version) -> DrawingDefaults | None:
    if DEFAULTS_TAG not in version.tags:
        return None
    try:
        return DrawingDefaults.from_json(version.tags[DEFAULTS_TAG])
    except (ValueError, RecursionError):
        raise odd(version, DEFAULTS_TAG, "a description of how to draw") from None
