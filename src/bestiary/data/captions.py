"""Captions from files beside the images: `<image>.txt`, `<image>.caption`, `metadata.jsonl` and `metadata.csv`."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bestiary.data.names import printable
from bestiary.errors import BestiaryError
from bestiary.subjects import Subject

TEXT_SUFFIXES = (".txt", ".caption")  # as kohya's and OneTrainer's users keep them
METADATA = ("metadata.jsonl", "metadata.csv")  # Hugging Face's image folders
CAPTIONS = ".captions.csv"  # hidden, so that it is never taken for a class
MAX_BYTES = 16 * 2**20


def read_captions(files: Sequence[Path], images: Sequence[Path]) -> dict[Path, str]:
    """Return the captions that a class folder's caption files give its images, each on one line.

    Raises BestiaryError that names file and line when a file cannot be read, names an image that is not there, or gives
    an image a second caption.
    """
    captions: dict[Path, str] = {}
    came_from: dict[Path, Path] = {}
    by_name = {unicodedata.normalize("NFC", image.name): image for image in images}
    by_stem: defaultdict[str, list[Path]] = defaultdict(list)
    for image in images:
        by_stem[image.stem].append(image)

    def add(image: Path, text: str, file: Path) -> None:
        if image in captions:
            raise BestiaryError(
                f"{printable(str(file))} and {printable(str(came_from[image]))} both have a caption for "
                f"{printable(image.name)}. Remove one of the two."
            )
        captions[image], came_from[image] = " ".join(text.split()), file

    for file in files:
        content = _read(file)
        if file.name not in METADATA:
            for image in by_stem[file.stem]:
                add(image, content, file)
            continue
        rows = _json_lines(file, content) if file.suffix == ".jsonl" else _csv_rows(file, content)
        for line, name, text in rows:
            named = by_name.get(unicodedata.normalize("NFC", name.removeprefix("./")))
            if named is None:
                raise BestiaryError(
                    f"{printable(str(file))}, line {line} names {printable(name)!r}, and the folder has no such image. "
                    "Correct the name, or remove the line."
                )
            add(named, text, file)
    return captions


def write_captions(folder: Path, captions: Mapping[str, str]) -> None:
    """Write captions, by the paths of the images in `folder`, to a hidden table there. Nothing for nothing."""
    if captions:
        with (folder / CAPTIONS).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(captions.items())


def load_captions(folder: Path) -> dict[str, str]:
    """Read what `write_captions` wrote."""
    if not (folder / CAPTIONS).is_file():
        return {}
    with (folder / CAPTIONS).open(newline="", encoding="utf-8") as file:
        return dict(csv.reader(file))


def names_subject(caption: str, subject: Subject) -> bool:
    """Whether a caption has its subject's name in it, as whole words in any letter case.

    >>> names_subject("A photo of SKS cat, asleep", Subject("my-cat", "sks cat", ""))
    True
    >>> names_subject("a category", Subject("cat", "cat", ""))
    False
    >>> names_subject("小白在沙发上", Subject("cat", "小白", ""))
    True
    """
    words = re.escape(subject.key).replace(r"\ ", r"\s+")
    if not any(character >= "\u2e80" for character in subject.key):  # Chinese has no spaces between words
        words = rf"(?<!\w){words}(?!\w)"
    return re.search(words, unicodedata.normalize("NFKC", caption).casefold()) is not None


def _read(file: Path) -> str:
    if file.stat().st_size > MAX_BYTES:
        raise BestiaryError(f"{printable(str(file))} is too large for captions. Shorten or remove it.")
    content = file.read_bytes()
    try:
        return unicodedata.normalize("NFC", content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise BestiaryError(f"{printable(str(file))}, line {line} is not in UTF-8. Save the file in UTF-8.") from None


def _json_lines(file: Path, content: str) -> Iterator[tuple[int, str, str]]:
    """Each line's number, file name and text."""
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (ValueError, TypeError, KeyError, RecursionError):
            name = text = None
        if not isinstance(name, str) or not isinstance(text, str):
            raise BestiaryError(
                f"{printable(str(file))}, line {number} is not a caption. Write "
                '{"file_name": "1.jpg", "text": "a photo of ..."} on each line.'
            )
        yield number, name, text


def _csv_rows(file: Path, content: str) -> Iterator[tuple[int, str, str]]:
    """Each row's line, file name and text."""
    rows = csv.DictReader(io.StringIO(content), strict=True)
    try:
        if not {"file_name", "text"} <= set(rows.fieldnames or ()):
            raise BestiaryError(
                f"{printable(str(file))} has no columns file_name and text. Name them in its first line."
            )
        for row in rows:
            if row["file_name"] is None or row["text"] is None or None in row:
                raise BestiaryError(
                    f"{printable(str(file))}, line {rows.line_num} has not as many cells as the first line. Put a text "
                    "that holds commas between quotes."
                )
            yield rows.line_num, row["file_name"], row["text"]
    except csv.Error as error:
        raise BestiaryError(f"{printable(str(file))}, line {rows.line_num} is not CSV: {error}.") from None
