"""Safe file names: a path from the network never decides where a file is written."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

MAX_BYTES = 180  # file systems allow 255
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$)")
# Controls of a terminal, of lines and of the direction of writing, and bytes that are not UTF-8.
_CONTROLS = r"\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_UNPRINTABLE = re.compile(f"[{_CONTROLS}]")
_FORBIDDEN = re.compile(rf'[<>:"/\\|?*{_CONTROLS}]')


def parts(path: str) -> list[str]:
    r"""Return the parts of a path in POSIX or Windows notation, without empty parts and single dots.

    >>> parts("./Animal\\cat//1.jpg")
    ['Animal', 'cat', '1.jpg']
    """
    return [part for part in re.split(r"[/\\]", path) if part not in ("", ".")]


def is_hostile(path: str) -> bool:
    """Return whether a path that should stay inside an archive is absolute, names a drive, or leads upwards.

    >>> [is_hostile(path) for path in ("cat/1.jpg", "../1.jpg", "/etc/passwd", "C:1.jpg")]
    [False, True, True, True]
    """
    return path.startswith(("/", "\\")) or bool(re.match(r"[A-Za-z]:", path)) or ".." in parts(path)


def class_of(path: str, classes: Mapping[str, str]) -> str | None:
    """Return the nearest class folder above the file, or None. `classes` maps casefolded names to class folders.

    >>> class_of("/V1/Animal/Cat/more/1.jpg", {"cat": "cat"})
    'cat'
    """
    for part in reversed(parts(path)[:-1]):
        if part.casefold() in classes:
            return classes[part.casefold()]
    return None


def safe_name(name: str) -> str:
    """Return a file name that every file system accepts, as close to `name` as possible.

    >>> safe_name("a b (1).jpg"), safe_name("NUL.jpg"), safe_name("../x?.jpg")
    ('a b (1).jpg', '_NUL.jpg', '_x_.jpg')
    """
    name = _FORBIDDEN.sub("_", unicodedata.normalize("NFC", name)).strip(" ").rstrip(". ").lstrip(".")
    if not name or _RESERVED.fullmatch(name.split(".")[0].strip()):
        name = f"_{name}"
    if len(name.encode()) > MAX_BYTES:
        suffix = PurePosixPath(name).suffix
        suffix = suffix if len(suffix.encode()) <= 10 else ""
        stem = name.encode()[: MAX_BYTES - 9 - len(suffix.encode())].decode(errors="ignore").rstrip(". ")
        name = f"{stem}-{_short_hash(name)}{suffix}"
    return name


def safe_names(paths: Iterable[str]) -> list[str]:
    """Return a safe file name for each of `paths`. No two are equal in any letter case, and their order is irrelevant.

    >>> safe_names(["cat/1.jpg", "cat/2.jpg"])
    ['1.jpg', '2.jpg']
    """
    listed = list(paths)
    names = [""] * len(listed)
    taken: set[str] = set()
    for index in sorted(range(len(listed)), key=lambda index: (listed[index], index)):
        plain = name = safe_name((parts(listed[index]) or [""])[-1])
        attempt = 0
        while name.casefold() in taken:
            pure = PurePosixPath(plain)
            name = f"{pure.stem}-{_short_hash(listed[index] + '/' * attempt)}{pure.suffix}"
            attempt += 1
        taken.add(name.casefold())
        names[index] = name
    return names


def printable(text: str) -> str:
    r"""Return `text` with escapes in the place of what a terminal would obey, or what is not UTF-8.

    >>> printable("cat\x1b[2J"), printable("caf\udce9"), printable("café 猫")
    ('cat\\x1b[2J', 'caf\\udce9', 'café 猫')
    """
    return _UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
