"""What each class lost in cleaning and why: said on the screen, and an error when a class lost everything."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bestiary.data.findings import Finding
from bestiary.errors import BestiaryError

MUCH = 1 / 3  # share of a class's images from which on the loss is no longer usual
_NAMED = 20  # classes on the screen

# Which setting, or which deed, decides about a kind of finding.
_DECIDES = {
    "off topic": "set clean.off_topic to flag",
    "blank": "set clean.blank to flag",
    "blurred": "set clean.blurred to flag",
    "dark": "set clean.exposure to flag",
    "bright": "set clean.exposure to flag",
    "too small": "lower clean.min_side",
    "extreme aspect ratio": "raise clean.max_aspect_ratio",
    "near duplicate": "lower clean.near_duplicate_bits",
    "mirror image": "lower clean.near_duplicate_bits",
    "conflict": "remove the copies from the other class",
    "exact duplicate": "add other images",
    "unreadable": "save the files as JPEG or PNG",
    "dropped by hand": "remove lines from overrides.csv",
    "link": "put the files themselves in the place of the links",
}
_NOUNS = ("near duplicate", "mirror image", "conflict", "exact duplicate", "link")  # among the kinds of findings


@dataclass(frozen=True)
class Loss:
    """How many images a class had and lost, and how many of them for each kind of finding."""

    class_folder: str
    images: int
    lost: int
    reasons: Mapping[str, int]

    @property
    def share(self) -> float:
        """The share of the images that were lost."""
        return self.lost / self.images

    def describe(self) -> str:
        """The loss in words: 3 of 40 images (2 near duplicates, 1 unreadable)."""
        reasons = ", ".join(
            f"{count} {kind}{'s' * (kind in _NOUNS and count > 1)}" for kind, count in self.reasons.items()
        )
        return f"{self.lost} of {self.images} images ({reasons})"

    @property
    def advice(self) -> str:
        """What to do if the images are good, for the most frequent reason."""
        kind = next(iter(self.reasons))
        judge = "The judge may not know such images. " if kind == "off topic" else ""
        return f"{judge}If the images are good, {_DECIDES.get(kind, 'keep them with overrides.csv')}"


def losses(images: Mapping[str, int], findings: Iterable[Finding]) -> list[Loss]:
    """Return the classes that lost images, the largest share first. `images` has the number of images of each class.

    A link that was not followed counts as a lost image: somebody meant one.
    """
    lost: set[str] = set()  # paths: an image may have several findings, and the first one cost it
    reasons: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for finding in findings:
        if finding.path not in lost and (finding.kind == "link" or finding.action == "quarantined"):
            lost.add(finding.path)
            reasons[finding.class_folder][finding.kind] += 1
    found = []
    for name, kinds in reasons.items():
        of_images = images.get(name, 0) + kinds["link"]
        found.append(
            Loss(name, of_images, kinds.total(), {kind: count for kind, count in kinds.most_common() if count})
        )
    return sorted(found, key=lambda loss: (-loss.share, loss.class_folder))


def describe_losses(found: Iterable[Loss]) -> list[str]:
    """Say in lines what each class lost and why, with advice for those that lost more than a third of their images.

    Classes that lost everything are left to `check_losses`.
    """
    listed = [loss for loss in found if loss.lost < loss.images]
    lines = [
        f"{loss.class_folder} lost {loss.describe()}{f'. {loss.advice}.' if loss.share > MUCH else '.'}"
        for loss in listed
    ]
    much = sum(loss.share > MUCH for loss in listed)
    shown = max(_NAMED, much)
    return lines[:shown] + [f"and {len(lines) - shown} more classes lost images."] * bool(lines[shown:])


def check_losses(found: Iterable[Loss]) -> None:
    """Check that no class lost all its images. Raises BestiaryError that names class, reason and a way out."""
    gone = [loss for loss in found if loss.lost == loss.images]
    if gone:
        classes = "; ".join(f"{loss.class_folder} lost {loss.describe()}" for loss in gone)
        raise BestiaryError(
            f"No image is left of {'a class' if len(gone) == 1 else f'{len(gone)} classes'}: {classes}. "
            f"{gone[0].advice}, keep single images with overrides.csv, or remove the folder. reports/clean shows them."
        )
