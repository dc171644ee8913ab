"""Prove an adapter of one subject: draw it in contexts, and what it should not change, and measure what that shows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bestiary.data.images import open_rgb
from bestiary.evaluation import fidelity as measures
from bestiary.evaluation.fidelity import SubjectPhotos
from bestiary.evaluation.judge import BATCH_SIZE
from bestiary.evaluation.pictures import Jobs
from bestiary.evaluation.report import (
    Copying,
    Estimate,
    Fidelity,
    InContext,
    Leakage,
    SubjectProof,
    TemplateScores,
)
from bestiary.evaluation.scoring import Array, Bootstrap, bootstrap_mean, resample_counts, unit
from bestiary.params import Proof
from bestiary.subjects import Subject, caption

if TYPE_CHECKING:
    from PIL.Image import Image

    from bestiary.evaluation.image_judge import ImageJudge
    from bestiary.evaluation.judge import Judge

# Draws the base's pictures of the jobs, and the adapter's.
DrawPairs = Callable[[Jobs], tuple[list["Image"], list["Image"]]]
DrawBase = Callable[[Jobs], list["Image"]]
SCALE = 100  # of cosines, as for the CLIP score
PART = 100_000  # seeds between two parts of a proof


@dataclass(frozen=True)
class Photos:
    """The files of the subject's photos, and of photos of other individuals of its class, if there are any."""

    training: Sequence[Path]
    held_out: Sequence[Path]
    others: Sequence[Path]

    @property
    def sha256(self) -> str:
        """A hash of what fidelity is measured against."""
        digest = hashlib.sha256()
        for path in (*self.held_out, *self.others):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class Named:
    """The pictures that evaluate drew of the subject by its name, from the same prompt and noise."""

    base: Sequence[Image]
    adapter: Sequence[Image]


@dataclass(frozen=True)
class Proved:
    """The proof of one subject, the fidelity of each named picture (N,), and pictures in contexts for a sheet.

    contexts holds, by context, the base's pictures of the name and the adapter's.
    """

    report: SubjectProof
    base_fidelity: Array
    adapter_fidelity: Array
    contexts: dict[str, tuple[list[Image], list[Image]]]


def photos_of_others(folder: Path, subject: Subject) -> list[Path]:
    """The photos of other individuals that `download` put below `folder` for this subject."""
    return sorted((folder / subject.folder).iterdir()) if (folder / subject.folder).is_dir() else []


@dataclass(frozen=True)
class Prover:
    """Measures the adapter's pictures of one subject at a time: fidelity, contexts, leakage and copying.

    `judge` scores prompt following; `image_judge` sees everything else and may be the same. `template` is the prompt of
    the class word's pictures. `draw_pairs` and `draw_base` draw at the operating point.
    """

    judge: Judge
    image_judge: Judge | ImageJudge
    settings: Proof
    template: str
    draw_pairs: DrawPairs
    draw_base: DrawBase
    resamples: int
    seed: int

    def prove(self, subject: Subject, named: Named, photos: Photos) -> Proved:
        """The proof of one subject. Raises BestiaryError when there are too few photos of it or of others."""
        plain = Subject("", subject.class_word, "")
        of_class = self._jobs([caption(plain, self.template)], self.settings.class_seeds, part=0)
        # Other seeds than those that are measured, or what is measured would be subtracted from itself.
        base_class = self._see(self.draw_base(self._jobs(of_class.prompts[:1], self.settings.class_seeds, part=1)))
        class_base, class_adapter = (self._see(images) for images in self.draw_pairs(of_class))
        features = SubjectPhotos(
            training=self._see_files(photos.training),
            held_out=self._see_files(photos.held_out),
            others=self._see_files(photos.others) if photos.others else class_base,
            base_class=base_class,
        )
        base, adapter = self._see(named.base), self._see(named.adapter)
        unrelated = self.draw_pairs(self._jobs(self.settings.unrelated, self.settings.seeds, part=2))
        unrelated_base, unrelated_adapter = (self._see(images) for images in unrelated)
        context, contexts = self._in_context(subject, plain, features)
        return Proved(
            report=SubjectProof(
                name=subject.name,
                class_word=subject.class_word,
                training_photos=len(photos.training),
                held_out_photos=len(photos.held_out),
                others_from="photos" if photos.others else "base",
                photos_sha256=photos.sha256,
                fidelity=self._fidelity(adapter, base, features),
                in_context=context,
                class_leakage=self._leakage(class_adapter, class_base, features),
                unrelated_leakage=self._leakage(unrelated_adapter, unrelated_base, features),
                copying=self._copying(adapter, features),
            ),
            base_fidelity=SCALE * measures.likeness(base, features),
            adapter_fidelity=SCALE * measures.likeness(adapter, features),
            contexts=contexts,
        )

    def _jobs(self, prompts: Sequence[str], seeds: int, part: int) -> Jobs:
        """Jobs for `seeds` pictures of each prompt. No two parts share seeds with each other or with evaluate."""
        wanted = [prompt for prompt in prompts for _ in range(seeds)]
        first = self.seed + PART * (part + 1)
        return Jobs([0] * len(wanted), wanted, [first + index for index in range(len(wanted))])

    def _see(self, images: Sequence[Image]) -> Array:
        return unit(self.image_judge.class_tokens(images).double().numpy())

    def _see_files(self, paths: Sequence[Path]) -> Array:
        """Features of photos, of which only one batch is in memory at a time."""
        batches = [paths[start : start + BATCH_SIZE] for start in range(0, len(paths), BATCH_SIZE)]
        return np.concatenate([self._see([open_rgb(path) for path in batch]) for batch in batches])

    def _fidelity(self, adapter: Array, base: Array, photos: SubjectPhotos) -> Fidelity:
        measured = measures.fidelity(adapter, base, photos, resamples=self.resamples, seed=self.seed)
        return Fidelity(
            base=_scaled(measured.base),
            adapter=_scaled(measured.adapter),
            gain=_scaled(measured.gain),
            others=_scaled(measured.others),
            ceiling=_scaled(measured.ceiling),
            way=measured.way.estimate() if measured.way else None,
            above_half=_scaled(measured.above(0.5)),
        )

    def _in_context(
        self, subject: Subject, plain: Subject, photos: SubjectPhotos
    ) -> tuple[InContext, dict[str, tuple[list[Image], list[Image]]]]:
        """The measurement, and the pictures by context."""
        contexts, seeds = self.settings.contexts, self.settings.seeds
        by_class = [caption(plain, context) for context in contexts]
        jobs = self._jobs([caption(subject, context) for context in contexts], seeds, part=3)
        base, adapter = self.draw_pairs(jobs)
        plain_pictures = self.draw_base(self._jobs(by_class, seeds, part=3))
        class_in_context = self._see(self.draw_base(self._jobs(by_class, seeds, part=4)))
        likeness = measures.in_context(
            self._see(adapter),
            self._see(plain_pictures),
            class_in_context,
            np.arange(len(contexts), dtype=np.int64).repeat(seeds),
            photos,
            resamples=self.resamples,
            seed=self.seed,
        )
        texts = unit(self.judge.text_features(by_class).double().numpy()).repeat(seeds, axis=0)  # (N, D)
        counts = resample_counts(len(texts), self.resamples, self.seed)
        of_base, of_adapter = (
            bootstrap_mean(SCALE * (unit(self.judge.image_features(side).double().numpy()) * texts).sum(axis=1), counts)
            for side in (plain_pictures, adapter)  # the base is asked for what is scored, not for an unknown name
        )
        report = InContext(
            pictures=len(adapter),
            prompt_following=TemplateScores(base=of_base.estimate(), adapter=of_adapter.estimate()),
            prompt_difference=(of_adapter - of_base).estimate(),
            fidelity=_scaled(likeness.adapter),
            plain_fidelity=_scaled(likeness.plain),
            fidelity_gain=_scaled(likeness.gain),
        )
        return report, {
            context: (base[first : first + seeds], adapter[first : first + seeds])
            for context, first in zip(contexts, range(0, len(base), seeds), strict=True)
        }

    def _leakage(self, adapter: Array, base: Array, photos: SubjectPhotos) -> Leakage:
        measured = measures.leakage(adapter, base, photos, resamples=self.resamples, seed=self.seed)
        return Leakage(pictures=len(base), moved=measured.moved.estimate(), nearer=_scaled(measured.nearer))

    def _copying(self, adapter: Array, photos: SubjectPhotos) -> Copying | None:
        if len(photos.held_out) < 2:  # what new photos look like is known from one held-out photo beside another
            return None
        measured = measures.copying(adapter, photos.training, photos.held_out, resamples=self.resamples, seed=self.seed)
        return Copying(
            gap=_scaled(measured.gap),
            copies=_scaled(measured.copies),
            fresh=_scaled(measured.fresh),
            share=measured.share.estimate() if measured.share else None,
        )


def _scaled(bootstrap: Bootstrap) -> Estimate:
    return Bootstrap(SCALE * bootstrap.mean, SCALE * bootstrap.resampled).estimate()
