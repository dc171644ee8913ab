"""Watching a training: pictures of the same prompts and seeds at each validation, and what the judge says of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bestiary.diffusion.sampling import generate
from bestiary.diffusion.sheet import Sheet
from bestiary.subjects import CAPTION_TEMPLATES, caption, subject_of

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from bestiary.evaluation.judge import Judge
    from bestiary.params import Train


class Watch:
    """Draws some of the classes, evenly chosen, with the adapter that is in training, and keeps a sheet of it."""

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        judge: Judge,
        classes: Sequence[str],
        settings: Train,
        *,
        seed: int,
        resolution: int,
        kept: Path,
    ) -> None:
        """`kept` is the folder of the sheet's rows, for a training that goes on after it was killed."""
        count = min(settings.sheet_animals, len(classes))
        shown = [classes[number * len(classes) // count] for number in range(count)]
        self.pipeline = pipeline
        self.judge = judge
        self.settings = settings
        self.resolution = resolution
        self.prompts = [caption(subject_of(folder), CAPTION_TEMPLATES[0]) for folder in shown] * settings.sheet_seeds
        self.seeds = [seed + number for number in range(settings.sheet_seeds) for _ in shown]
        self.words = judge.text_features(self.prompts)
        self.sheet = Sheet(kept, [subject_of(folder).name for folder in shown])
        self._told: set[int] = set()

    def draw(self, step: int) -> float:
        """Add the pictures of this step to the sheet and return their CLIP score, 100 x the mean cosine."""
        pictures = generate(
            self.pipeline,
            self.prompts,
            self.seeds,
            steps=self.settings.sheet_steps,
            guidance_scale=self.settings.sheet_guidance_scale,
            scheduler="dpmsolver++",
            batch_size=8,
            resolution=self.resolution,
        )
        self.sheet.add(step, pictures[: len(self.sheet.columns)])
        return 100 * float((self.judge.image_features(pictures) * self.words).sum(dim=1).mean())

    def save(self, path: Path) -> dict[int, Path]:
        """Write the sheet so far to `path`; returns each row that was not there before by itself, by its step."""
        new = {step: row for step, row in self.sheet.save(path).items() if step not in self._told}
        self._told.update(new)
        return new
