"""The verdict on a fast variant: the measurements of the stage accept, the rules, and the text for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from bestiary.errors import BestiaryError
from bestiary.evaluation.report import BY_KEY, Estimate, Row, Score
from bestiary.params import Accept

Way = Literal["default", "reference", "few_step", "fast"]
LABELS: Mapping[Way, str] = {
    "default": "default",
    "reference": "reference",
    "few_step": "few-step, float32",
    "fast": "fast variant",
}
MAKE = "make fast"
MIN_PICTURES = 20  # with fewer, a bootstrap interval of CMMD or diversity is unreliable
LIKENESS = "likeness"
SCORES = {
    LIKENESS: Score(LIKENESS, "likeness to the photos (0 others, 1 its own)", "与真实照片的相似度", per_picture=False),
    **{key: BY_KEY[key] for key in ("clip_score", "margin", "top1", "cmmd", "diversity")},
}


class _Table(BaseModel):
    """Unknown keys are ignored, because reports of other versions may have more."""

    model_config = ConfigDict(frozen=True)


class Drawn(_Table):
    """How one way draws, and how the judge scores its pictures. passes is the number of UNet passes for a picture.

    copied is the share of pictures that look copied from training images.
    """

    sampler: str
    steps: int
    passes: int
    pictures: int
    scores: Row
    copied: Estimate


class Differences(_Table):
    """Paired differences of scores, on the same prompts and seeds.

    fast_default and fast_reference are the whole cost of the fast variant. distillation (few-step adapter in float32
    minus default) and export (fast variant minus few-step adapter in float32) are its two parts.
    """

    fast_default: Row
    fast_reference: Row
    distillation: Row
    export: Row


class Measured(_Table):
    """The measurements for the rules. diversity_ratio is the fast variant's diversity divided by the reference's."""

    ways: Mapping[Way, Drawn]
    real: Row
    real_pictures: int
    differences: Differences
    diversity_ratio: Estimate | None  # None if the reference has no diversity


class Identity(_Table):
    """Which fast variant was measured: the SHA-256 of its parts, and how the export computes and decodes."""

    adapter_sha256: str  # of the registered adapter that the fast variant was made from
    few_step_sha256: str
    export_sha256: str
    engine: str
    precision: str
    decoder: str


class AcceptanceReport(Measured, Identity):
    """The report of the stage accept. reasons are full sentences; a refused variant has only those against it."""

    accepted: bool
    reasons: tuple[str, ...]
    seconds: Mapping[Way, float] = {}  # of one picture, the median

    def results(self) -> dict[str, object]:
        """Everything except the seconds, which differ between runs, ready for JSON."""
        content = self.model_dump(exclude={"seconds"})
        return {"accepted": content.pop("accepted"), "reasons": content.pop("reasons"), **content}

    @property
    def is_whole(self) -> bool:
        """Whether all four ways and what the export costs have every score that is compared."""
        whole = set(self.differences.fast_default)
        rows = [*(drawn.scores for drawn in self.ways.values()), self.differences.export]
        return self.ways.keys() == LABELS.keys() and all(whole <= row.keys() for row in rows)

    @property
    def headlines(self) -> tuple[str, ...]:
        """The dotted keys of the numbers to compare between two runs."""
        return ("accepted", *(f"differences.fast_default.{key}.mean" for key in self.differences.fast_default))


class Verdict(NamedTuple):
    """Whether a fast variant is accepted, and why, in full sentences."""

    accepted: bool
    reasons: list[str]


def decide(measured: Measured, rules: Accept) -> Verdict:
    """Whether the fast variant loses no more than the rules allow.

    Each rule except the one on copying uses the worse end of a 95 % interval, so a measurement that is too uncertain
    leads to a refusal. All rules must pass, so testing several needs no correction (an intersection-union test, Berger
    1982).
    """
    good: list[str] = []
    bad: list[str] = []
    for passed, sentence in (
        *_enough(measured),
        *_losses(measured, rules),
        _diversity(measured, rules),
        _copying(measured, rules),
    ):
        (good if passed else bad).append(sentence)
    return Verdict(not bad, bad or good)


def _shows_likeness(measured: Measured) -> bool:
    """Whether likeness to its few photos decides: one subject, with a name that the judge does not know."""
    return LIKENESS in measured.differences.fast_default


def _enough(measured: Measured) -> Iterator[tuple[bool, str]]:
    for name, count in (
        ("real images", MIN_PICTURES if _shows_likeness(measured) else measured.real_pictures),
        ("pictures of the reference", measured.ways["reference"].pictures),
        ("pictures of the fast variant", measured.ways["fast"].pictures),
    ):
        if count < MIN_PICTURES:
            yield False, f"There are only {count} {name}, but a comparison needs at least {MIN_PICTURES}."


def _losses(measured: Measured, rules: Accept) -> Iterator[tuple[bool, str]]:
    """Non-inferiority to the default way for each score. One subject with a class word has only its likeness."""
    for key, limit in rules.max_loss.model_dump().items():
        difference = measured.differences.fast_default.get(key)
        if difference is None or (_shows_likeness(measured) and key != LIKENESS):
            continue
        score = SCORES[key]
        worst = -difference.ci95[0] if score.higher_is_better else difference.ci95[1]
        described = f"{score.difference_title} {difference.describe('+')} against the default; the limit is {limit:g}"
        passed = worst <= limit
        yield passed, f"{'It loses little' if passed else 'It may lose too much'}: {described}."


def _diversity(measured: Measured, rules: Accept) -> tuple[bool, str]:
    ratio = measured.diversity_ratio
    if ratio is None:
        return False, "Its diversity cannot be compared: the reference draws the same picture for all seeds."
    share = f"{ratio.mean:.0%} of the reference's (95 % interval {ratio.ci95[0]:.0%} to {ratio.ci95[1]:.0%})"
    if ratio.ci95[0] < rules.min_diversity:
        return (
            False,
            f"Its pictures may be too similar: diversity is {share}, but must be {rules.min_diversity:.0%}.",
        )
    return True, f"Its pictures are diverse enough: diversity is {share}."


def _copying(measured: Measured, rules: Accept) -> tuple[bool, str]:
    """The gate's rule for adapters: refuse when the whole interval is above the limit."""
    copied = measured.ways["fast"].copied
    low, high = copied.ci95
    share = f"{copied.mean:.0%} of its pictures look copied (95 % interval {low:.0%} to {high:.0%})"
    if low > rules.max_copied:
        return False, f"It copies its training images: {share}, and the limit is {rules.max_copied:.0%}."
    return True, f"It does not copy its training images: {share}."


def read_acceptance(path: Path) -> AcceptanceReport:
    """Read the report of the stage accept. Raises BestiaryError when it is missing or damaged."""
    try:
        report = AcceptanceReport.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise BestiaryError(f"There is no fast variant yet: {path} does not exist. Run `{MAKE}`.") from None
    except ValidationError:
        report = None
    if report is None or not report.is_whole:
        raise BestiaryError(f"{path} is damaged. Delete it and run `{MAKE}`.")
    return report


def heading(report: AcceptanceReport) -> str:
    """The verdict in one sentence."""
    default, reference, fast = (report.ways[way] for way in ("default", "reference", "fast"))
    passes = f"{fast.passes} pass{'es' if fast.passes > 1 else ''} of the UNet for a picture"
    return (
        f"Fast variant {'accepted' if report.accepted else 'refused'}: {report.engine} in {report.precision} with the "
        f"{report.decoder} decoder, {passes} (default {default.passes}, reference {reference.passes})."
    )


def table_rows(report: AcceptanceReport) -> Iterator[tuple[str, ...]]:
    """The rows of the table: score, default, reference, fast, fast minus default, and the export's share of that.

    Differences have their 95 % intervals.
    """
    for key, score in SCORES.items():
        if key not in report.differences.fast_default:
            continue
        means = (f"{report.ways[way].scores[key].mean:.2f}" for way in ("default", "reference", "fast"))
        whole, part = (row[key] for row in (report.differences.fast_default, report.differences.export))
        yield (score.title, *means, _signed(whole), _signed(part))


HEADER = ("score", "default", "reference", "fast", "fast minus default (95 %)", "of which the export (95 %)")


def as_text(report: AcceptanceReport) -> Iterator[str]:
    """The verdict and its table for a terminal."""
    yield heading(report)
    rows = [("", *HEADER[1:]), *table_rows(report)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    for first, *cells in rows:
        numbers = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        yield "  ".join([f"{first:{widths[0]}}", *numbers])
    if not report.accepted:
        yield from report.reasons


def as_markdown(report: AcceptanceReport) -> Iterator[str]:
    """The verdict, its table and its reasons as Markdown."""
    yield heading(report)
    yield ""
    yield f"| {' | '.join(HEADER)} |"
    yield "|---|---|---|---|---|---|"
    for cells in table_rows(report):
        yield f"| {' | '.join(cells)} |"
    yield ""
    for reason in report.reasons:
        yield f"- {reason}"


def _signed(difference: Estimate) -> str:
    low, high = difference.ci95
    return f"{difference.mean:+.2f} ({low:+.2f} to {high:+.2f})"
