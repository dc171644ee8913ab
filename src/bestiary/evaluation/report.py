"""The evaluation report: every score with its interval, label, unit and direction, read and written as JSON.

The evaluate stage writes it. The command line, the registry, the model card and the page show it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from bestiary.errors import BestiaryError


@dataclass(frozen=True)
class Score:
    """What is measured: its key in the JSON, and how people read it.

    chinese is the label for Chinese readers. higher_is_better is None where neither direction is better. per_picture:
    every single picture has this score; the others describe a set of pictures. Percentages
    differ in percentage points.
    """

    key: str
    label: str
    chinese: str
    unit: str = ""
    higher_is_better: bool | None = True
    per_picture: bool = True

    @property
    def title(self) -> str:
        """The label with what a reader must know of the number.

        >>> [score.title for score in SCORES if score.key in ("top1", "cmmd")]
        ['recognised (top-1), %', 'CMMD (lower is better)']
        """
        unit = f", {self.unit}" if self.unit else ""
        return f"{self.label}{unit}{' (lower is better)' if self.higher_is_better is False else ''}"

    @property
    def chinese_title(self) -> str:
        """`title` in Chinese."""
        unit = f"，{self.unit}" if self.unit else ""
        return f"{self.chinese}{unit}{'（越低越好）' if self.higher_is_better is False else ''}"

    @property
    def difference_title(self) -> str:
        """The label with the unit of a difference.

        >>> [score.difference_title for score in SCORES if score.key in ("clip_score", "top1")]
        ['CLIP score', 'recognised (top-1), points']
        """
        return f"{self.label}, points" if self.unit == "%" else self.label


SCORES = (
    Score("clip_score", "CLIP score", "CLIP 分数"),
    Score("margin", "margin over other subjects", "相对其他主体的优势"),
    Score("top1", "recognised (top-1)", "识别正确率（top-1）", "%"),
    Score("top5", "recognised (top-5)", "识别正确率（top-5）", "%"),
    Score("fidelity", "fidelity to the real photos", "与真实照片的相似度", per_picture=False),
    Score("prompt_following", "prompt following in contexts", "情境中的提示词吻合度", per_picture=False),
    Score("cmmd", "CMMD", "CMMD", higher_is_better=False, per_picture=False),
    Score("diversity", "diversity", "多样性", higher_is_better=None, per_picture=False),
)
BY_KEY = {score.key: score for score in SCORES}
FIDELITY, PROMPT_FOLLOWING = "fidelity", "prompt_following"  # of one subject only
TABLE = tuple(score for score in SCORES if score.higher_is_better is not None)  # what a table of results shows
PER_PICTURE = tuple(score.key for score in SCORES if score.per_picture)
FEW_HELD_OUT = (
    5  # with fewer photos, the 95 % interval of fidelity held the true value in less than 92 % of simulations
)
HEADLINES = ("clip_score", "margin", "top1", FIDELITY)  # where there is room for a few numbers only


class _Table(BaseModel):
    """Reports of other versions may hold more keys: they are ignored."""

    model_config = ConfigDict(frozen=True)


class Estimate(_Table):
    """A mean with its 95 % interval."""

    mean: float
    ci95: tuple[float, float]

    def describe(self, sign: str = "") -> str:
        """The number in words.

        >>> Estimate(mean=18.193, ci95=(15.106, 21.361)).describe("+")
        '+18.19 (95 % interval +15.11 to +21.36)'
        """
        low, high = self.ci95
        return f"{self.mean:{sign}.2f} (95 % interval {low:{sign}.2f} to {high:{sign}.2f})"


Row = Mapping[str, Estimate]  # by score key


class ClassScores(_Table):
    """The mean scores of one class's pictures, and the paired difference."""

    base: Mapping[str, float]
    adapter: Mapping[str, float]
    delta: Row


class Memorisation(_Table):
    """How near pictures are to real images: cosines to the nearest one, and the share that looks copied."""

    nearest_train: Estimate
    nearest_validation: Estimate
    gap: Estimate
    copied: Estimate


class MemorisationRows(_Table):
    """The memorisation of the base's and of the adapter's pictures."""

    base: Memorisation
    adapter: Memorisation


class TemplateScores(_Table):
    """The CLIP score of the pictures against the captions of one template."""

    base: Estimate
    adapter: Estimate


class ScaleZero(_Table):
    """How many pictures were drawn with adapter weight 0, and how many differ from the base's."""

    pictures: int
    different: int


class OperatingPointReport(_Table):
    """The checkpoint, adapter weight (`scale`) and guidance scale that the pictures were drawn with."""

    checkpoint: str
    scale: float
    guidance_scale: float


class Rows(_Table):
    """Scores of the base, the adapter, their paired difference, real pictures, and pictures under wrong names."""

    base: Row
    adapter: Row
    delta: Row
    real: Row
    floor: Row


class Fidelity(_Table):
    """How much pictures look like the held-out photos: 100 x the mean centred cosine (docs/evaluation.md).

    way is the adapter's share of the way from other individuals (0) to the ceiling (1); None when the judge does not
    tell the two apart for certain. above_half is how far the adapter is above half of the way.
    """

    base: Estimate
    adapter: Estimate
    gain: Estimate
    others: Estimate
    ceiling: Estimate
    way: Estimate | None
    above_half: Estimate


class InContext(_Table):
    """Pictures of the subject in contexts, beside the base's of the class word there.

    The base of prompt_following and plain_fidelity is asked for the class word: it does not know the name.
    """

    pictures: int
    prompt_following: TemplateScores
    prompt_difference: Estimate
    fidelity: Estimate
    plain_fidelity: Estimate
    fidelity_gain: Estimate  # over the plain pictures


class Leakage(_Table):
    """What the adapter does to pictures that are not about the subject: 0 and 0 for the base.

    moved is 100 x (1 - cosine) between the adapter's and the base's picture, nearer by how much the adapter's is more
    like the subject's photos.
    """

    pictures: int
    moved: Estimate
    nearer: Estimate


class Copying(_Table):
    """The gap between a picture's cosines with its nearest training and its nearest held-out photo.

    share says where the gap lies between that of fresh photos (0) and that of exact copies (1).
    """

    gap: Estimate
    copies: Estimate
    fresh: Estimate
    share: Estimate | None


class SubjectProof(_Table):
    """What proves that the adapter draws this individual. others_from says what other individuals were taken from."""

    name: str
    class_word: str
    training_photos: int
    held_out_photos: int
    others_from: Literal["photos", "base"]
    photos_sha256: str  # of the held-out photos and of the others
    fidelity: Fidelity
    in_context: InContext
    class_leakage: Leakage
    unrelated_leakage: Leakage
    copying: Copying | None  # None with one held-out photo


class ScoreReport(Rows):
    """All scores by one judge. images is the number of pairs of pictures; per_class has the classes that were drawn."""

    images: int
    per_template: Mapping[str, TemplateScores]
    per_class: Mapping[str, ClassScores]
    worst_classes: tuple[str, ...]
    memorisation: MemorisationRows
    proofs: Mapping[str, SubjectProof] = {}  # by class folder

    @property
    def only_subject(self) -> SubjectProof | None:
        """The proof of the only class, if there is one class and it was proved."""
        several = "margin" in self.delta  # takes a second class
        return next(iter(self.proofs.values()), None) if not several else None


class EvaluationReport(ScoreReport):
    """What evaluate measured. Score rows hold an `Estimate` by the keys of SCORES.

    classes are all the classes that the judge chose among, drawn or not.
    """

    classes: tuple[str, ...]
    scale_zero: ScaleZero
    operating_point: OperatingPointReport
    second_judge: Rows | None = None
    adapter_sha256: str
    seconds: Mapping[str, int | float | None] = {}

    def with_rows(self, proof: SubjectProof) -> EvaluationReport:
        """This report with the scores of its only subject as rows of the result table."""
        fidelity, context = proof.fidelity, proof.in_context
        prompts = context.prompt_following

        def row(scores: Row, fidelity: Estimate, prompt_following: Estimate) -> Row:
            return {**scores, FIDELITY: fidelity, PROMPT_FOLLOWING: prompt_following}

        return self.model_copy(
            update={
                "base": row(self.base, fidelity.base, prompts.base),
                "adapter": row(self.adapter, fidelity.adapter, prompts.adapter),
                "delta": row(self.delta, fidelity.gain, context.prompt_difference),
                "real": {**self.real, FIDELITY: fidelity.ceiling},
            }
        )

    @property
    def table(self) -> list[Score]:
        """The scores to show. Reports of earlier versions lack some."""
        unknown = {"clip_score"} if self.only_subject else set()  # of an invented name, which says nothing
        return [score for score in TABLE if score.key in self.delta and score.key not in unknown]

    @property
    def headlines(self) -> tuple[str, ...]:
        """The keys of the numbers to compare between two evaluations, joined by dots."""
        adapter = (f"adapter.{score.key}.mean" for score in self.table)
        shown = {score.key for score in self.table}
        gains = (f"delta.{key}.mean" for key in HEADLINES if key in shown)
        return (*adapter, *gains, "memorisation.adapter.copied.mean")

    def results(self) -> dict[str, object]:
        """Everything but the seconds, which differ every time, ready for JSON."""
        absent = {key for key in ("second_judge", "proofs") if not getattr(self, key)}
        content = self.model_dump(exclude={"seconds", *absent})
        return {"images": content.pop("images"), **content}


def read_evaluation(path: Path) -> EvaluationReport:
    """Read the report of an evaluation. Raises BestiaryError when it is missing or damaged."""
    try:
        return EvaluationReport.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise BestiaryError(f"There are no results yet: {path} does not exist. Run `dvc repro`.") from None
    except ValidationError:
        raise BestiaryError(f"{path} is damaged. Delete it and run `dvc repro`.") from None


def describe_proof(proof: SubjectProof) -> Iterator[str]:
    """What was measured of one subject, each in a sentence."""
    others = "other individuals" if proof.others_from == "photos" else "the base's pictures of the class word"
    yield (
        f"{proof.name} was taught from {proof.training_photos} photos and compared with {proof.held_out_photos} others "
        "that training never saw."
    )
    if proof.held_out_photos < FEW_HELD_OUT:
        yield "With so few held-out photos, the intervals are too narrow: other photos would change more."
    if proof.others_from == "base":
        yield "Without photos of other individuals, looking like the subject is easier to pass than it should be."
    way = proof.fidelity.way
    if way:
        yield f"Fidelity: {way.describe()} of the way from {others} (0) to the real photos (1)."
    else:
        yield f"Fidelity: the judge does not tell {proof.name} from {others} for certain."
    context = proof.in_context
    yield (
        f"In contexts: {context.prompt_difference.describe('+')} CLIP score against the base's pictures of the class "
        f"word, with a fidelity of "
        f"{context.fidelity_gain.describe('+')} above theirs."
    )
    of_class, of_unrelated = proof.class_leakage.moved.describe(), proof.unrelated_leakage.moved.describe()
    yield (
        f"Leakage: {of_class} on the class word, {of_unrelated} on unrelated prompts (0: unchanged, 100: nothing in "
        "common)."
    )
    if proof.copying is None or proof.copying.share is None:
        yield "Copying: unknown, because too few photos are held out or copies look like new photos to the judge."
    else:
        yield f"Copying: {proof.copying.share.describe()} of the way from new photos (0) to exact copies (1)."


def heading(report: ScoreReport) -> str:
    """The sentence above the result table."""
    return f"{report.images} pictures by the base and by the adapter, from the same prompts and the same seeds:"


def as_text(report: EvaluationReport) -> Iterator[str]:
    """The lines of the result table for a terminal."""
    width = 2 + max(len(score.title) for score in report.table)
    yield f"{'':{width}}{'base':>8}{'adapter':>10}{'difference':>13}   {'95 % interval':17}{'real pictures':>16}"
    for score in report.table:
        delta = report.delta[score.key]
        low, high = delta.ci95
        real = f"{report.real[score.key].mean:.2f}" if score.key in report.real else "-"
        yield (
            f"{score.title:{width}}{report.base[score.key].mean:8.2f}{report.adapter[score.key].mean:10.2f}"
            f"{delta.mean:+13.2f}   {f'{low:+.2f} to {high:+.2f}':17}{real:>16}"
        )
    yield ""
    for proof in report.proofs.values():
        yield from describe_proof(proof)
    if not report.only_subject:
        yield f"Pictures that look copied (0: as by chance, 1: all): {report.memorisation.adapter.copied.describe()}."


def table_rows(report: EvaluationReport, *, chinese: bool = False) -> Iterator[tuple[str, str, str, str, str]]:
    """The result table's rows: score, base, adapter, difference with its interval, real pictures."""
    for score in report.table:
        base, adapter, delta = (row[score.key] for row in (report.base, report.adapter, report.delta))
        low, high = delta.ci95
        yield (
            score.chinese_title if chinese else score.title,
            f"{base.mean:.2f}",
            f"{adapter.mean:.2f}",
            f"{delta.mean:+.2f} ({low:+.2f} {'至' if chinese else 'to'} {high:+.2f})",
            f"{report.real[score.key].mean:.2f}" if score.key in report.real else "–",
        )


def as_markdown(report: EvaluationReport, *, chinese: bool = False) -> Iterator[str]:
    """The lines of the result table as Markdown, in English or in Chinese."""
    if chinese:
        yield "| 分数 | 基础模型 | 适配器 | 差值（95 % 置信区间） | 真实图片 |"
    else:
        yield "| score | base | adapter | difference (95 % interval) | real pictures |"
    yield "|---|---|---|---|---|"
    for cells in table_rows(report, chinese=chinese):
        yield f"| {' | '.join(cells)} |"
