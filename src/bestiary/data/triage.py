"""The findings of cleaning as they are made, and which images they put into quarantine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bestiary import params
from bestiary.data.findings import Action, Decision, Finding
from bestiary.data.inspection import Inspection


@dataclass
class Triage:
    """The findings so far, and which images they put into quarantine."""

    overrides: Mapping[str, Decision]
    unused_overrides: list[str]
    findings: list[Finding] = field(default_factory=list)
    quarantined: set[str] = field(default_factory=set)

    def record(
        self,
        image: Inspection,
        kind: str,
        detail: str,
        action: Action,
        other: str = "",
        score: float | None = None,
    ) -> None:
        """Record a finding. An image with the override "keep" is not quarantined, unless it is unreadable."""
        if action == "quarantined" and kind != "unreadable" and self.overrides.get(image.path) == "keep":
            action = "kept"
        if action == "quarantined":
            self.quarantined.add(image.path)
        self.findings.append(Finding(image.path, image.class_folder, kind, detail, action, other, score))

    def apply_policy(self, policy: params.Policy, image: Inspection, kind: str, detail: str, score: float) -> None:
        """Quarantine the image, flag it, or ignore the observation, as `policy` says."""
        if policy != "off":
            self.record(image, kind, detail, "quarantined" if policy == "quarantine" else "flagged", score=score)

    def remaining(self, images: Sequence[Inspection]) -> list[Inspection]:
        return [image for image in images if image.path not in self.quarantined]

    def rank(self, image: Inspection) -> tuple[bool, int, int, str]:
        """Sort key for versions of one picture: "keep" overrides first, then more pixels, more bytes, the name."""
        return self.overrides.get(image.path) != "keep", -image.width * image.height, -image.bytes, image.path
