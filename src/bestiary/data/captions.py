"""Captions from files: `<image>.txt` and `<image>.caption` beside an image, `metadata.jsonl` and `metadata.csv`."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bestiary.data.names import parts, printable
from bestiary.errors import BestiaryError
from bestiary.subjects import Subject

if TYPE_CHECKING:
    from bestiary.data.listing import Listing

TEXT_SUFFIXES = (".txt", ".caption")  # as kohya's and OneTrainer's users keep them
METADATA = ("metadata.jsonl", "metadata.csv")  # Hugging Face's image folders
CAPTIONS = ".captions.csv"  # hidden, so that it is never taken for a class
MAX_BYTES = 16 * 2**20


def read_captions(listing: Listing, classes: Iterable[str]) -> dict[Path, str]:
    """Return the captions that caption files give the images of `classes`, each on one line.

    Files in a class folder name its images; those beside the class folders name <class>/<image>.

    Raises BestiaryError that names file and line when a file cannot be read, names an image that is not there, or gives
    an image a second caption.
    """
    chosen = list(classes)
    reader = _Reader()
    for name in chosen:
        images = {_composed(image.name): image for image in listing.images[name]}
        by_stem: defaultdict[str, list[Path]] = defaultdict(list)
        for image in listing.images[name]:
            by_stem[image.stem].append(image)
        for file in listing.captions[name]:
            if file.name in METADATA:
                reader.read_table(file, images, "the folder has no such image")
                continue
            content = _read(file)
            for image in by_stem[file.stem]:
                reader.add(image, content, file)
    everywhere = {f"{name}/{_composed(image.name)}": image for name in listing.images for image in listing.images[name]}
    for file in listing.metadata:
        reader.read_table(file, everywhere, "no class folder has such an image")
    wanted = {image for name in chosen for image in listing.images[name]}
    return {image: text for image, text in reader.captions.items() if image in wanted}


class _Reader:
    """The captions that were read so far, and the file of each."""

    def __init__(self) -> None:
        self.captions: dict[Path, str] = {}
        self._came_from: dict[Path, Path] = {}

    def add(self, image: Path, text: str, file: Path) -> None:
        """Add a caption. Raises BestiaryError when the image has one already."""
        if image in self.captions:
            first, name = self._came_from[image], printable(f"{image.parent.name}/{image.name}")
            if first == file:
                raise BestiaryError(f"{printable(str(file))} has two captions for {name}. Remove one of them.")
            raise BestiaryError(
                f"{printable(str(file))} and {printable(str(first))} both have a caption for {name}. Remove one of the "
                "two."
            )
        self.captions[image], self._came_from[image] = " ".join(text.split()), file

    def read_table(self, file: Path, images: Mapping[str, Path], problem: str) -> None:
        """Add the captions of a metadata file, which names `images` by their keys."""
        content = _read(file)
        rows = _json_lines(file, content) if file.suffix == ".jsonl" else _csv_rows(file, content)
        for line, name, text in rows:
            image = images.get(_composed(name)) or images.get("/".join(parts(_composed(name))))
            if image is None:
                raise BestiaryError(
                    f"{printable(str(file))}, line {line} names {printable(name)!r}, and {problem}. Correct the name, "
                    "or remove the line."
                )
            self.add(image, text, file)


def _composed(name: str) -> str:
    """The name in Unicode's composed form."""
    return unicodedata.normalize("NFC", name)


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
                    f"{printable(str(file))}, line {rows.line_num} does not have as many cells as the first line. "
                    "Put a text that holds commas between quotes."
                )
            yield rows.line_num, row["file_name"], row["text"]
    except csv.Error as error:
        raise BestiaryError(
            f"{printable(str(file))}, line {rows.line_num + 1} is not CSV: {error}. Check its quotes."
        ) from None
