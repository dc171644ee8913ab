"""Content hashes of files and folders, equal to those that DVC writes to dvc.lock."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from fnmatch import translate
from pathlib import Path

from bestiary.files import project_root


def content_hash(path: Path) -> str:
    """The MD5 that DVC computes for a file, or for a folder (then with the suffix `.dir`).

    Names that the project's .dvcignore lists are skipped. Runs carry these hashes as tags, so a run and dvc.lock name
    the same content in the same way.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     file = Path(folder, "tiger.txt")
    ...     _ = file.write_text("stripes")
    ...     content_hash(file), content_hash(Path(folder))
    ('238a0a964769b4dad6e41653f3ee033b', '02be233f9ea54aab55e6418ac232b633.dir')
    """
    if not path.is_dir():
        return _md5(path)
    is_ignored = _dvcignore()
    listing = []
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not is_ignored(name)]
        prefix = "" if Path(folder) == path else f"{Path(folder).relative_to(path).as_posix()}/"
        for name in files:
            if not is_ignored(name):
                listing.append({"md5": _md5(Path(folder, name)), "relpath": prefix + name})
    listing.sort(key=lambda entry: entry["relpath"])
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb", buffering=0) as file:  # unbuffered: a buffer for each of many small pictures costs time
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _dvcignore() -> Callable[[str], object]:
    """A function that tells whether .dvcignore makes DVC skip a name."""
    file = project_root() / ".dvcignore"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    patterns = [line.strip().rstrip("/") for line in lines if line.strip() and not line.startswith("#")]
    return re.compile("|".join(map(translate, patterns)) or r"(?!)").match
