"""What lies in a folder of images: the images of each class, and what is left out, each file with the reason."""

from __future__ import annotations

import csv
import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bestiary.data.captions import CAPTIONS, METADATA, TEXT_SUFFIXES
from bestiary.data.images import EXTENSIONS
from bestiary.data.names import MAX_BYTES, printable
from bestiary.errors import BestiaryError
from bestiary.subjects import SUBJECTS_FILE

# Cameras' raw files are TIFFs to a decoder, which would take the small preview inside for the photo.
RAW_SUFFIXES = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw")
# Files that somebody means as an image, even if nothing here can decode them: they are counted and reported as images.
IMAGE_SUFFIXES = frozenset(
    (
        *(suffix for suffixes in EXTENSIONS.values() for suffix in suffixes),
        *(".heic", ".heif", ".hif", ".jfif", ".jpe", ".jxl", ".jp2", ".psd", ".svg", ".eps", ".ico", ".tga"),
        *RAW_SUFFIXES,
    )
)
_OTHER_CAPTIONS = (".tags", ".json")  # as other trainers keep them beside the images; not read here
_LITTER = (  # of systems, not of people
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", ".ds_store", ".gitkeep", ".gitignore", ".directory"),
    *("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"),  # folders
)
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\xff\x0a", b"8BPS")
_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1", b"avif", b"avis")  # of an ISO media file

_NAMED = 10  # files by name on the screen

LEFT_OUT = ".left_out.csv"  # hidden, so that it is never taken for a class


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file that is not used as an image. The path is relative; the class folder is "" where there is none."""

    path: str
    class_folder: str
    kind: str
    detail: str


@dataclass(frozen=True)
class Listing:
    """The image files and the caption files of each class folder, and everything else that was found."""

    images: dict[str, list[Path]] = field(default_factory=dict)
    captions: dict[str, list[Path]] = field(default_factory=dict)
    metadata: list[Path] = field(default_factory=list)  # captions of all classes, beside the class folders
    left_out: list[LeftOut] = field(default_factory=list)


def list_images(root: Path, trusted: Callable[[], Sequence[Path]] | None = None) -> Listing:
    """List `root`/<class>/<file>, sorted by name. A class has its folder's name in Unicode's composed form.

    A link is followed if it leads to a place inside `root` or inside one of the folders that `trusted` returns.
    Without `trusted`, all links are followed: for folders that the pipeline itself made.

    Raises BestiaryError when `root` is not a folder, when a class folder's name cannot be a class, or when a class
    folder is a link to a place outside.
    """
    if not root.is_dir():
        problem = "is a file" if root.exists() else "does not exist"
        raise BestiaryError(f"The image folder {root} {problem}. Create a folder with one folder of images per class.")
    links = _Links(root, trusted)
    listing = Listing()
    for entry in sorted(root.iterdir()):
        if _is_litter(entry):
            continue
        if entry.name.startswith("."):
            if entry.name not in (LEFT_OUT, CAPTIONS):
                listing.left_out.append(LeftOut(entry.name, "", "hidden", ""))
        elif entry.is_symlink() and (problem := links.problem(entry)):
            raise BestiaryError(
                f"{printable(str(entry))} is a link that {problem}, and such links are not followed. Put the folder "
                "itself in its place, or remove the link."
            )
        elif entry.is_dir():
            name = _class_name(entry)
            if name in listing.images:
                raise BestiaryError(
                    f"{root} has two folders named {name}, in two forms of Unicode. Rename one of them."
                )
            listing.images[name], listing.captions[name], left_out = _list_class(entry, name, links)
            listing.left_out.extend(left_out)
        elif entry.name in METADATA and entry.is_file():
            listing.metadata.append(entry)
        else:
            kind = "outside a class folder" if _is_image(entry) else "not an image"
            listing.left_out.append(LeftOut(entry.name, "", kind, f"in {root.name}"))
    return listing


def list_folder(folder: Path, name: str) -> Listing:
    """List one folder of images as the class `name`; all links are followed.

    Raises BestiaryError when there is no such folder.
    """
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        raise BestiaryError(f"{printable(str(folder))} {problem}. Give a folder of photos.")
    images, captions, left_out = _list_class(folder, name, _Links(folder, None))
    return Listing({name: images}, {name: captions}, left_out=left_out)


def write_left_out(folder: Path, left_out: Sequence[LeftOut]) -> None:
    """Write what was left out to a hidden table in `folder`, for cleaning to report. Nothing for nothing."""
    if left_out:
        with (folder / LEFT_OUT).open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            csv.writer(file).writerows((each.path, each.class_folder, each.kind, each.detail) for each in left_out)


def read_left_out(folder: Path) -> list[LeftOut]:
    """Read what `write_left_out` wrote."""
    if not (folder / LEFT_OUT).is_file():
        return []
    with (folder / LEFT_OUT).open(newline="", encoding="utf-8") as file:
        return [LeftOut(*row) for row in csv.reader(file)]


def describe_left_out(left_out: Sequence[LeftOut]) -> list[str]:
    """Say in lines what was left out: captions by their number, everything else by name, the first ten of each kind.

    >>> describe_left_out([LeftOut("owl/a.pdf", "owl", "not an image", "")])
    ['1 file left out (not an image): owl/a.pdf']
    """
    by_kind: defaultdict[str, list[str]] = defaultdict(list)
    for each in left_out:
        by_kind[each.kind].append(printable(each.path))
    lines = []
    for kind, paths in sorted(by_kind.items()):
        files = f"{len(paths)} file{'s'[: len(paths) != 1]} left out"
        if kind == "caption":
            lines.append(f"{files} (captions in a format that is not read): use .txt, .caption or metadata.jsonl.")
        else:
            more = f" and {len(paths) - _NAMED} more" if paths[_NAMED:] else ""
            lines.append(f"{files} ({kind}): {', '.join(paths[:_NAMED])}{more}")
    return lines


class _Links:
    """Decides which links may be followed."""

    def __init__(self, root: Path, trusted: Callable[[], Sequence[Path]] | None) -> None:
        self._root = root.resolve()
        self._trusted = trusted
        self._places: list[Path] | None = None

    def problem(self, link: Path) -> str:
        """Say why the link may not be followed, or return ""."""
        try:
            target = link.resolve(strict=True)
        except (OSError, RuntimeError):  # RuntimeError: a circle of links, up to Python 3.12
            return "leads nowhere"
        if self._trusted is None or target.is_relative_to(self._root):
            return ""
        if self._places is None:
            self._places = [place.resolve() for place in self._trusted()]
        return "" if any(target.is_relative_to(place) for place in self._places) else f"leaves {self._root.name}"


def _class_name(folder: Path) -> str:
    """Return the name of a class folder. Raises BestiaryError when no table or file could be named after it."""
    name = unicodedata.normalize("NFC", folder.name)
    problem = ""
    if printable(name) != name:
        problem = "is not UTF-8, or has characters that cannot be printed"
    elif len(name.encode()) > MAX_BYTES:
        problem = f"is longer than {MAX_BYTES} bytes"
    elif name.casefold() in ("manifest.csv", SUBJECTS_FILE):
        problem = "is the name of a file that cleaning writes beside the class folders"
    if problem:
        raise BestiaryError(f"The name of the folder {printable(str(folder))} {problem}. Rename the folder.")
    return name


def _list_class(folder: Path, name: str, links: _Links) -> tuple[list[Path], list[Path], list[LeftOut]]:
    images: list[Path] = []
    captions: list[Path] = []
    others: list[tuple[Path, str, str]] = []
    for entry in sorted(folder.iterdir()):
        if _is_litter(entry):
            continue
        if entry.is_symlink() and (problem := links.problem(entry)):
            others.append((entry, "link", problem))
        elif entry.is_dir():
            others += ((file, "in a sub-folder", "") for file in _files_below(entry))
        elif not entry.is_file():
            others.append((entry, "not a file", ""))
        elif entry.name.startswith("."):
            others.append((entry, "hidden", ""))
        elif entry.name in METADATA:
            captions.append(entry)
        elif _is_image(entry):
            images.append(entry)
        else:
            others.append((entry, "not an image", ""))
    stems = {image.stem: image.name for image in images}
    left_out = []
    for path, kind, detail in others:
        suffix = path.suffix.lower()
        if kind == "not an image" and suffix in TEXT_SUFFIXES:
            if path.stem in stems:
                captions.append(path)
                continue
            kind = "caption without image"
        elif kind == "not an image" and path.stem in stems and suffix in _OTHER_CAPTIONS:
            kind, detail = "caption", f"beside {stems[path.stem]}, in a format that is not read"
        left_out.append(LeftOut(f"{name}/{path.relative_to(folder).as_posix()}", name, kind, detail))
    return images, captions, left_out


def _files_below(folder: Path) -> Iterator[Path]:
    for here, _, names in sorted(os.walk(folder)):
        yield from (path for name in sorted(names) if not _is_litter(path := Path(here, name)))


def _is_litter(path: Path) -> bool:
    """Return whether an operating system or Git left this behind, such as the `._name.jpg` files of a Mac."""
    return path.name.startswith("._") or path.name.casefold() in _LITTER


def _is_image(path: Path) -> bool:
    """Judge by the name, and by the first bytes if the name says nothing."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError:
        return False
    if start[4:8] == b"ftyp":
        return start[8:12] in _BRANDS
    return start.startswith(_SIGNATURES) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
