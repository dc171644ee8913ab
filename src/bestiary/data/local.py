"""Somebody's own folder of images, `<root>/<class>/<file>`, laid out as class folders for cleaning."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from bestiary.data.captions import read_captions, write_captions
from bestiary.data.folder import check_classes, choose, link, replacing
from bestiary.data.images import open_rgb
from bestiary.data.listing import LeftOut, list_images, write_left_out
from bestiary.data.names import printable, safe_names
from bestiary.errors import BestiaryError
from bestiary.subjects import Subjects, check_folders

OTHERS_NOTE = "about.txt"  # in the folder of the photos of others
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar")


@dataclass(frozen=True)
class Taken:
    """What was taken from a folder: how many images of each class, how many under another name, and what was not.

    `captioned` counts the images that have a caption of their own.
    """

    per_class: dict[str, int]
    renamed: int
    left_out: list[LeftOut]
    captioned: int = 0


def take(
    source: Path,
    target: Path,
    classes: Sequence[str] | None,
    images_per_class: int | None,
    trusted: Callable[[], Sequence[Path]] = tuple,
    subjects: Subjects | None = None,
) -> Taken:
    """Link the chosen images of `source` to the same class folders of `target`.

    A file whose name not every file system accepts gets one that is. Links to places outside `source` are left out,
    but for the folders that `trusted` returns. What is left out is listed in `target` too, for cleaning to report.

    Raises BestiaryError when `source` does not hold the classes or a folder that `subjects` describes, when a class has
    too few images, when folders stand for the same subject, or when a caption file is wrong.
    """
    listing = list_images(source, trusted)
    subjects = subjects or Subjects()
    subjects.check_known(listing.images)
    others = subjects.folders_of_others.values()
    files = choose({n: files for n, files in listing.images.items() if n not in others}, classes, images_per_class)
    check_folders(files, subjects)
    left_out = [each for each in listing.left_out if each.class_folder in files or not each.class_folder]
    counts = {name: len(paths) for name, paths in files.items()}
    for name in (name for name, count in counts.items() if not count):
        if kinds := Counter(each.kind for each in left_out if each.class_folder == name):
            there = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
            raise BestiaryError(
                f"The class {name} has no image in {source}. These files are there: {there}. Put images into the "
                "folder itself, or remove it."
            )
    if not any(counts.values()):
        _check_layout(source, left_out)
    check_classes(counts, f"in {source}")
    captions = read_captions(listing, files)
    renamed, taken_captions = 0, dict[str, str]()
    with replacing(target) as fresh:
        for name, paths in tqdm(files.items(), desc="link images", unit="class"):
            (fresh / name).mkdir()
            for path, safe in zip(paths, safe_names(path.name for path in paths), strict=True):
                link(path, fresh / name / safe)
                if path in captions:
                    taken_captions[f"{name}/{safe}"] = captions[path]
                renamed += safe != unicodedata.normalize("NFC", path.name)
        write_left_out(fresh, left_out)
        write_captions(fresh, taken_captions)
        subjects.write_to(fresh)
    return Taken(counts, renamed, left_out, len(taken_captions))


def take_others(
    source: Path, target: Path, subjects: Subjects, trusted: Callable[[], Sequence[Path]] = tuple
) -> dict[str, int]:
    """Link the photos of other individuals to `target`/<subject folder>/, and return their number by subject folder.

    Links are followed as `take` does. Raises BestiaryError when a folder of others has fewer than two images, or an
    image that cannot be read.
    """
    images = list_images(source, trusted).images if subjects.folders_of_others else {}
    with replacing(target) as fresh:
        # DVC warns of an empty output.
        (fresh / OTHERS_NOTE).write_text("A folder for each subject, with photos of others of its class.\n")
        for folder, others in subjects.folders_of_others.items():
            paths = images[others]
            if len(paths) < 2:
                raise BestiaryError(
                    f"The folder {others} has {len(paths)} images in {source}, and comparing with other individuals "
                    "takes at least 2. Add images, or remove the key others from subjects.yaml."
                )
            (fresh / folder).mkdir()
            for path, safe in zip(paths, safe_names(path.name for path in paths), strict=True):
                open_rgb(path)  # evaluate reads it, after the training
                link(path, fresh / folder / safe)
    return {folder: len(images[others]) for folder, others in subjects.folders_of_others.items()}


def _check_layout(source: Path, left_out: Sequence[LeftOut]) -> None:
    """Raise BestiaryError when the files lie in `source` itself instead of in a folder for each class."""
    outside = [each for each in left_out if not each.class_folder and each.kind != "hidden"]
    if not outside:
        return
    archives = [each.path for each in outside if each.path.lower().endswith(_ARCHIVES)]
    if archives:
        raise BestiaryError(
            f"{source}/{printable(archives[0])} is an archive. Unpack it, so that each class has a folder of images in "
            f"{source}."
        )
    raise BestiaryError(
        f"{source} has no folder with images, only files such as {printable(outside[0].path)}. Put the images into a "
        f"folder that is named after what they show, such as {source}/my-cat."
    )
