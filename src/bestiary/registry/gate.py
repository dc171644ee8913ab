"""The gate: the rules that decide whether an adapter becomes the champion."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bestiary.evaluation.report import BY_KEY, Estimate, EvaluationReport, ScoreReport
from bestiary.params import Evaluate, Register

CHAMPION, CHALLENGER = "champion", "challenger"
# These settings change the cost or the precision of a measurement, not what is measured. The guidance scale is taken
# from the report, because a sweep may have chosen another one.
NOT_MEASURED = {"batch_size", "bootstrap_resamples", "second_judge", "sweep", "guidance_scale"}


class Decision(NamedTuple):
    """The alias that an adapter earned, and the reasons as full sentences."""

    alias: str
    reasons: list[str]


@dataclass(frozen=True)
class ChampionComparison:
    """The paired difference between an adapter and the champion; None when they were not measured alike."""

    version: int  # the champion's
    difference: Estimate | None
    has_pictures: bool = True  # False when the registry has lost what the champion was measured by


def decide(evaluation: ScoreReport, rules: Register, champion: ChampionComparison | None) -> Decision:
    """The alias that an adapter earns by its evaluation, and why.

    It becomes the champion when it beats the base (the whole 95 % interval of its gain is above 0), does not copy its
    training images, and is not worse than the present champion. Otherwise it becomes the challenger.
    """
    gain, copied = evaluation.delta[rules.champion_score], evaluation.memorisation.adapter.copied
    score = BY_KEY[rules.champion_score].difference_title
    described = f"{score} {gain.describe('+')}"
    good, bad = [], []
    if gain.ci95[0] > 0:
        good.append(f"The adapter beats the base: {described}.")
    else:
        bad.append(f"The adapter does not reliably beat the base: {described}.")
    if copied.ci95[0] > rules.max_copied:
        low, high = copied.ci95
        bad.append(
            f"The adapter copies its training images: {copied.mean:.0%} of its pictures look copied "
            f"(95 % interval {low:.0%} to {high:.0%}), and the limit is {rules.max_copied:.0%}."
        )
    if champion is None:
        good.append("There is no other champion.")
    elif not champion.has_pictures:
        bad.append(
            f"The registry has lost the scores of the champion, version {champion.version}, so the two cannot be "
            "compared. A person can decide with `bestiary promote`."
        )
    elif champion.difference is None:
        bad.append(
            f"The champion, version {champion.version}, was measured on another base, with other prompts or seeds, or "
            "by another judge, so the two cannot be compared. A person can decide with `bestiary promote`."
        )
    else:
        described = f"{score} {champion.difference.describe('+')} on the same prompts and seeds"
        if champion.difference.mean < 0:
            bad.append(f"The champion, version {champion.version}, is better: {described}.")
        else:
            good.append(f"The adapter is not worse than the champion, version {champion.version}: {described}.")
    return Decision(CHALLENGER, bad) if bad else Decision(CHAMPION, good)


def paired_difference(mine: Path, theirs: Path, score: str) -> Estimate | None:
    """The mean difference (mine less theirs) of a score between two tables of pictures, paired by prompt and seed.

    The tables are evaluate's pictures.csv. None when they are not about the same prompts and seeds.
    """
    from bestiary.evaluation.scoring import bootstrap_mean, resample_counts
    from bestiary.tables import read_table

    tables = []
    for path in (mine, theirs):
        table = read_table(path, {"seed": int, f"adapter_{score}": float}).set_index(["prompt", "seed"]).sort_index()
        table["adapter_top1"] = 100.0 * (table["adapter_predicted"] == table["class"])
        tables.append(table[f"adapter_{score}"])
    if not tables[0].index.equals(tables[1].index):
        return None
    return bootstrap_mean(tables[0] - tables[1], resample_counts(len(tables[0]), 10_000, seed=0)).estimate()


def measurement_hash(
    evaluation: EvaluationReport, settings: Evaluate, *, base_sha256: str, judge: str, resolution: int, seed: int
) -> str:
    """A SHA-256 of how an adapter was measured. Two adapters can be compared only if theirs are equal.

    It covers base, judge, sampling, prompts, seeds and classes. `judge` stands for the judge's content: a content hash,
    or an id with its revision.
    """
    measured = [
        base_sha256,
        judge,
        settings.model_dump(exclude=NOT_MEASURED),
        evaluation.operating_point.guidance_scale,
        sorted(evaluation.per_class),
        evaluation.classes,
        resolution,
        seed,
    ]
    return hashlib.sha256(json.dumps(measured).encode()).hexdigest()
