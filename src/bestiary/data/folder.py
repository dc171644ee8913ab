"""Class folders on disk, `<root>/<class>/<file>`: choosing, checking, linking and replacing them."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from bestiary.errors import BestiaryError

ALONE = 4  # images that a class needs if there is no other
_FICLONE = 0x40049409  # Linux ioctl: share another file's blocks (btrfs, xfs)
_without_reflinks: set[Path] = set()  # folders where reflinks have failed


def link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`: a reflink or a hard link where the file system can, otherwise a copy."""
    if source.is_symlink():  # DVC may have linked it from its cache
        source = source.resolve()
    if target.parent in _without_reflinks or not _reflink(source, target):
        _without_reflinks.add(target.parent)
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno == errno.EEXIST:
                raise
            shutil.copyfile(source, target)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give a new folder that replaces `folder` when the body succeeds and is deleted when it fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(f".{folder.name}.part")
    if fresh.exists():  # left by a run that was killed
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


def choose(
    files: Mapping[str, Sequence[Path]], classes: Sequence[str] | None, images_per_class: int | None
) -> dict[str, list[Path]]:
    """Return the first `images_per_class` files of each of `classes`; None means all.

    Raises BestiaryError when a class is not in `files`.

    >>> files = {"cat": [Path("1.jpg"), Path("2.jpg")], "owl": [Path("3.jpg")]}
    >>> [path.name for path in choose(files, ["cat"], 1)["cat"]]
    ['1.jpg']
    """
    missing = sorted(set(classes or ()) - set(files))
    if missing:
        raise BestiaryError(
            f"dataset.classes names {', '.join(missing)}, but the data has no such class folder. "
            "Correct the name or add the folder."
        )
    wanted = files if classes is None else dict.fromkeys(sorted(classes))
    return {name: list(files[name][:images_per_class]) for name in wanted}


def check_classes(counts: Mapping[str, int], where: str) -> None:
    """Check that each class has at least two images, and a class that is alone at least ALONE.

    `counts` holds the number of images per class, `where` the place as the message names it: "in data". Raises
    BestiaryError when there are fewer.
    """
    if not counts or not any(counts.values()):
        raise BestiaryError(
            f"There are no images {where}. Add a folder of images for each class: at least two in each, or {ALONE} if "
            "there is only one folder."
        )
    needed = 2 if len(counts) > 1 else ALONE
    small = [name for name, count in counts.items() if count < needed]
    if not small:
        return
    count = counts[small[0]]
    number = ("no image", "only one image")[count] if count < 2 else f"only {count} images"
    if len(counts) < 2:
        raise BestiaryError(
            f"The class {small[0]} has {number} {where}. A class that is alone needs at least {ALONE} images, one of "
            "them for validation. Add images."
        )
    others = f" (and {len(small) - 1} more classes are as small)" if small[1:] else ""
    raise BestiaryError(
        f"The class {small[0]} has {number} {where}{others}. A class needs at least two images, one of them for "
        "validation: add images, or remove the folder."
    )


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
