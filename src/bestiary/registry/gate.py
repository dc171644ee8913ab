"""The gate: the rules that decide whether an adapter becomes the champion."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bestiary.evaluation.report import BY_KEY, FIDELITY, Estimate, EvaluationReport, ScoreReport, SubjectProof
from bestiary.params import Evaluate, Register

# Copies lie at 1 and new photos at 0; between 4 and 12 photos, a lower bound above this told the two apart.
COPIED_SHARE = 0.5
CHAMPION, CHALLENGER = "champion", "challenger"
# These settings change the cost or the precision of a measurement, not what is measured. The guidance scale is taken
# from the report, because a sweep may have chosen another one.
NOT_MEASURED = {"batch_size", "bootstrap_resamples", "second_judge", "adapter_weight", "sweep", "guidance_scale"}


class Decision(NamedTuple):
    """The alias that an adapter earned, and the reasons as full sentences."""

    alias: str
    reasons: list[str]


@dataclass(frozen=True)
class ChampionComparison:
    """The paired difference between an adapter and the champion; None when they were not measured alike."""

    version: int  # the champion's
    difference: Estimate | None
    teaches: str | None = None  # its subjects, if the adapter teaches none of them
    has_pictures: bool = True  # False when the registry has lost what the champion was measured by


def decide(evaluation: ScoreReport, rules: Register, champion: ChampionComparison | None) -> Decision:
    """The alias that an adapter earns by its evaluation, and why.

    It becomes the champion when it passes the rules for several classes or for one subject, and is not worse than the
    present champion. Otherwise it becomes the challenger.
    """
    proof = evaluation.only_subject
    good, bad = _judge_one_subject(proof, rules) if proof else _judge_classes(evaluation, rules)
    if proof is None:
        for each in evaluation.proofs.values():  # of subjects that a text judge does not know by their names
            passed, failed = _judge_one_subject(each, rules)
            good.extend(f"{each.name}: {sentence}" for sentence in passed)
            bad.extend(f"{each.name}: {sentence}" for sentence in failed)
    if proof is None and len(evaluation.per_class) == 1 and "margin" not in evaluation.delta:
        bad.append(
            "One subject alone is proved by its pictures, and this evaluation has no proof. Give a thing its class in "
            "subjects.yaml, and set evaluate.proof (profile subject or photos). A style cannot be proved, because the "
            "judge sees what is drawn and not how: look at the pictures, and decide with `bestiary promote`."
        )
    score = BY_KEY[champion_score(evaluation, rules)].difference_title
    if champion is None:
        good.append("There is no other champion.")
    elif champion.teaches is not None:
        bad.append(
            f"The champion, version {champion.version}, teaches something else ({champion.teaches}), so the two are "
            "not compared. Make this one the champion with `bestiary promote`, or give it a registered model of its "
            "own: set register.name in params.yaml and run `dvc repro`."
        )
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


def champion_score(evaluation: ScoreReport, rules: Register) -> str:
    """The key of the score by which an adapter is compared with the champion: of one subject, the fidelity."""
    if evaluation.only_subject:
        return FIDELITY
    # One class without a proof has no margin and no top-1.
    return rules.champion_score if rules.champion_score in evaluation.delta else "clip_score"


def _judge_classes(evaluation: ScoreReport, rules: Register) -> tuple[list[str], list[str]]:
    """What speaks for and against an adapter of several classes: it must beat the base and must not copy."""
    good, bad = [], []
    key = champion_score(evaluation, rules)
    gain, copied = evaluation.delta[key], evaluation.memorisation.adapter.copied
    described = f"{BY_KEY[key].difference_title} {gain.describe('+')}"
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
    return good, bad


def _judge_one_subject(proof: SubjectProof, rules: Register) -> tuple[list[str], list[str]]:
    """What speaks for and against an adapter of one subject, each rule in a sentence."""
    context, leakage = proof.in_context, proof.class_leakage.moved
    followed = context.prompt_difference.describe("+")
    copies = proof.copying.share if proof.copying else None
    others = "other individuals" if proof.others_from == "photos" else "the base's pictures of the class word"
    way = f" ({proof.fidelity.way.describe()} of the way)" if proof.fidelity.way else ""
    half = f"half of the way from {others} to the real photos"
    checks = [
        (
            proof.fidelity.way is not None,
            f"The judge tells {proof.name} from {others}.",
            f"The judge does not tell {proof.name} from {others} for certain, so likeness to photos proves nothing. "
            "Add photos, or set evaluate.proof.image_judge.",
        ),
        (
            proof.fidelity.above_half.ci95[0] > 0,
            f"Its pictures look like {proof.name}: fidelity is above {half}{way}.",
            f"Its pictures may not show {proof.name}: fidelity is not reliably above {half}{way}.",
        ),
        (
            proof.fidelity.gain.ci95[0] > 0,
            f"It beats the base: fidelity {proof.fidelity.gain.describe('+')}.",
            f"It does not reliably beat the base: fidelity {proof.fidelity.gain.describe('+')}.",
        ),
        (
            context.fidelity_gain.ci95[0] > 0,
            f"It does not ignore the name in new contexts: fidelity there is {context.fidelity_gain.describe('+')} "
            "above the base's pictures of the class word.",
            f"It may ignore the name in new contexts: fidelity there is {context.fidelity_gain.describe('+')} above "
            "the base's pictures of the class word.",
        ),
        (
            context.prompt_difference.ci95[0] >= -rules.max_prompt_loss,
            f"It follows prompts: {followed} CLIP score against the base's pictures of the class word.",
            f"It may follow prompts worse than the base does with the class word: {followed} CLIP score in contexts, "
            f"and the limit is -{rules.max_prompt_loss:g}.",
        ),
        (
            leakage.ci95[1] <= rules.max_leakage,
            f"It leaves pictures of the class word alone: leakage {leakage.describe()}.",
            f"It changes pictures of the class word: leakage {leakage.describe()}, and the limit is "
            f"{rules.max_leakage:g}.",
        ),
        (
            copies is not None and copies.ci95[0] <= COPIED_SHARE,
            "It does not copy its training photos.",
            f"It copies its training photos: {copies.describe()} of the way from new photos to exact copies, and the "
            f"limit is {COPIED_SHARE:g}."
            if copies
            else "Whether it copies its training photos is unknown: too few photos are held out. Add photos.",
        ),
    ]
    return [good for passed, good, _ in checks if passed], [bad for passed, _, bad in checks if not passed]


def paired_difference(mine: Path, theirs: Path, score: str) -> Estimate | None:
    """The mean difference (mine less theirs) of a score between two tables of pictures, paired by prompt and seed.

    The tables are evaluate's pictures.csv. None when they are not about the same prompts and seeds.
    """
    from bestiary.evaluation.scoring import bootstrap_mean, resample_counts_by_class
    from bestiary.tables import read_table

    tables = []
    for path in (mine, theirs):
        table = read_table(path, {"seed": int, f"adapter_{score}": float}).set_index(["prompt", "seed"]).sort_index()
        table["adapter_top1"] = 100.0 * (table["adapter_predicted"] == table["class"])
        if f"adapter_{score}" not in table:
            return None
        tables.append(table[f"adapter_{score}"])
    if not tables[0].index.equals(tables[1].index):
        return None
    labels = table["class"].factorize()[0]  # of both tables
    return bootstrap_mean(tables[0] - tables[1], resample_counts_by_class(labels, 10_000, seed=0)).estimate()


def measurement_hash(
    evaluation: EvaluationReport, settings: Evaluate, *, base_sha256: str, judge: str, resolution: int, seed: int
) -> str:
    """A SHA-256 of how an adapter was measured. Two adapters can be compared only if theirs are equal.

    It covers base, judge, sampling, prompts, seeds and classes. `judge` stands for the judge's content: a content hash,
    or an id with its revision.
    """
    # Without a proof, the hash is that of the versions that knew no proofs.
    left_out = NOT_MEASURED if settings.proof else NOT_MEASURED | {"proof"}
    measured = [
        base_sha256,
        judge,
        settings.model_dump(exclude=left_out),
        evaluation.operating_point.guidance_scale,
        sorted(evaluation.per_class),
        evaluation.classes,
        resolution,
        seed,
        *(proof.photos_sha256 for proof in evaluation.proofs.values()),
    ]
    return hashlib.sha256(json.dumps(measured).encode()).hexdigest()
