"""Names from strangers, made safe: what a path on the network says never decides where a file is written."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

_LONGEST = 180  # bytes; file systems take 255
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$)")
_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]')


def parts(path: str) -> list[str]:
    """The parts of a path in either notation, without empty ones and single dots."""
    return [part for part in re.split(r"[/\\]", path) if part not in ("", ".")]


def is_hostile(path: str) -> bool:
    """Whether a path that should lie inside an archive leads out of it: absolute, with a drive, or upwards."""
    return path.startswith(("/", "\\")) or bool(re.match(r"[A-Za-z]:", path)) or ".." in parts(path)


def class_of(path: str, classes: Mapping[str, str]) -> str | None:
    """The nearest class folder above the file; `classes` gives the class folders by their casefolded names."""
    for part in reversed(parts(path)[:-1]):
        if part.casefold() in classes:
            return classes[part.casefold()]
    return None


def safe_name(name: str) -> str:
    """One file name that every file system takes, as near to `name` as can be."""
    name = _FORBIDDEN.sub("_", unicodedata.normalize("NFC", name)).strip(" ").rstrip(". ").lstrip(".")
    if not name or _RESERVED.fullmatch(name.split(".")[0].strip()):
        name = f"_{name}"
    if len(name.encode()) > _LONGEST:
        suffix = PurePosixPath(name).suffix
        suffix = suffix if len(suffix.encode()) <= 10 else ""
        stem = name.encode()[: _LONGEST - 9 - len(suffix.encode())].decode(errors="ignore").rstrip(". ")
        name = f"{stem}-{_mark(name)}{suffix}"
    return name


def safe_names(paths: Iterable[str]) -> list[str]:
    """A safe name for the file of each of `paths`, no two the same in any letter case, in whatever order they come."""
    listed = list(paths)
    names = [""] * len(listed)
    taken: set[str] = set()
    for index in sorted(range(len(listed)), key=lambda index: (listed[index], index)):
        plain = name = safe_name((parts(listed[index]) or [""])[-1])
        attempt = 0
        while name.casefold() in taken:
            pure = PurePosixPath(plain)
            name = f"{pure.stem}-{_mark(listed[index] + '/' * attempt)}{pure.suffix}"
            attempt += 1
        taken.add(name.casefold())
        names[index] = name
    return names


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
