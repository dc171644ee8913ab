"""Class folders on disk: `<root>/<class>/<file>`, listed, checked, and linked to another place."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from bestiary.errors import BestiaryError

_FICLONE = 0x40049409  # Linux: share the other file's blocks (btrfs, xfs)
_without_reflinks: set[Path] = set()  # folders where it was tried in vain


def link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`: a reflink or hard link where the file system can, else a copy."""
    if source.is_symlink():  # DVC may have linked it out of its cache
        source = source.resolve()
    if target.parent in _without_reflinks or not _reflink(source, target):
        _without_reflinks.add(target.parent)
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno == errno.EEXIST:
                raise
            shutil.copyfile(source, target)


def _reflink(source: Path, target: Path) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    with source.open("rb") as reading:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            fcntl.ioctl(descriptor, _FICLONE, reading.fileno())
        except OSError:
            target.unlink()
            return False
        finally:
            os.close(descriptor)
    return True


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A fresh folder beside `folder` that takes its place when the body ends well, and vanishes when it does not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(f".{folder.name}.part")
    if fresh.exists():  # of a run that was killed
        shutil.rmtree(fresh)
    fresh.mkdir()
    try:
        yield fresh
        if folder.exists():
            shutil.rmtree(folder)
        fresh.replace(folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def class_files(root: Path) -> dict[str, list[Path]]:
    """The files of each class folder of `root`, both in the order of their names; hidden ones left out."""
    if not root.is_dir():
        raise BestiaryError(f"The image folder {root} does not exist.")
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return {
        folder.name: sorted(entry for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))
        for folder in folders
    }


def choose(
    files: Mapping[str, Sequence[Path]], classes: Sequence[str] | None, images_per_class: int | None
) -> dict[str, list[Path]]:
    """The files of the wanted classes, the first `images_per_class` of each. Unknown classes raise BestiaryError."""
    missing = sorted(set(classes or ()) - set(files))
    if missing:
        raise BestiaryError(f"dataset.classes names {', '.join(missing)}, which the data does not have.")
    wanted = files if classes is None else dict.fromkeys(sorted(classes))
    return {name: list(files[name][:images_per_class]) for name in wanted}


def check_classes(counts: Mapping[str, int], where: str | Path) -> None:
    """Raise BestiaryError unless there are at least two classes with at least two images each."""
    if not counts or not any(counts.values()):
        raise BestiaryError(f"There are no images in {where}: put them there as {where}/<class>/<file>.")
    small = [name for name, count in counts.items() if count < 2]
    if small:
        one = f"{small[0]} has {('no image', 'one image')[counts[small[0]]]}"
        more = f" (and {len(small) - 1} other classes are as small)" if small[1:] else ""
        raise BestiaryError(
            f"The class {one} in {where}{more}: a class needs at least two, one of them to validate with."
        )
    if len(counts) < 2:
        raise BestiaryError(
            f"There is only one class in {where}, {next(iter(counts))}: an adapter is judged by telling two."
        )


def take(source: Path, target: Path, classes: Sequence[str] | None, images_per_class: int | None) -> dict[str, int]:
    """Link the wanted images of `source` into `target`, in the same class folders; how many each class has."""
    files = choose(class_files(source), classes, images_per_class)
    counts = {name: len(paths) for name, paths in files.items()}
    check_classes(counts, source)
    with replacing(target) as fresh:
        link_all(fresh, files)
    return counts


def link_all(target: Path, files: Mapping[str, Iterable[Path]]) -> None:
    """Link the files of each class to `target/<class>/<name>`."""
    for name, paths in tqdm(files.items(), desc="link", unit="class"):
        (target / name).mkdir()
        for path in paths:
            link(path, target / name / path.name)
