"""Watch a training run: at each validation, draw the same prompts and seeds and score the pictures with the judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bestiary.diffusion.full_memory import Halving
from bestiary.diffusion.sampling import generate
from bestiary.diffusion.sheet import Sheet
from bestiary.subjects import Subject, caption, templates_of

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL.Image import Image

    from bestiary.evaluation.judge import Judge
    from bestiary.params import AdapterTraining
    from bestiary.samplers import Sampling

BATCH_SIZE = 8


@dataclass(frozen=True)
class SheetPlan:
    """What each validation draws: `sheet_animals` of the subjects, evenly chosen, with `sheet_seeds` seeds each."""

    subjects: Sequence[Subject]
    settings: AdapterTraining
    sampling: Sampling
    seed: int  # the first one
    at_once: int | None = None  # pictures that are drawn at once; None: eight, and fewer if the GPU's memory is full

    @property
    def shown(self) -> list[Subject]:
        """The subjects that are drawn."""
        count = min(self.settings.sheet_animals, len(self.subjects))
        return [self.subjects[number * len(self.subjects) // count] for number in range(count)]

    def jobs(self) -> list[tuple[str, int]]:
        """The prompt and the seed of each picture: all subjects with the first seed, then with the next one."""
        prompts = [caption(subject, templates_of([subject])[0]) for subject in self.shown]
        return [(prompt, self.seed + number) for number in range(self.settings.sheet_seeds) for prompt in prompts]


class TrainingWatch:
    """Draws what the plan says with the adapter in training, scores it, and keeps a sheet."""

    def __init__(
        self, pipeline: StableDiffusionPipeline, judge: Judge, plan: SheetPlan, *, folder: Path, first: str = "base"
    ) -> None:
        """`folder` keeps the sheet's rows until the run finishes, so that a resumed run still has them.

        `first` labels the row of step 0.
        """
        self.pipeline = pipeline
        self.judge = judge
        self.sampling = plan.sampling
        self.jobs = plan.jobs()
        self.fitting = Halving("Drawing the sheet", "train.sheet_animals", largest=plan.at_once)
        self.text_features = judge.text_features([prompt for prompt, _ in self.jobs])  # (B, D)
        self.sheet = Sheet(folder, [subject.name for subject in plan.shown], first)
        self._saved: set[int] = set()  # steps

    def draw(self, step: int) -> float:
        """Add the pictures of this step to the sheet and return their CLIP score, 100 x the mean cosine."""
        pictures = [picture for part in self.fitting.parts(self._generate, self.jobs) for picture in part]
        self.sheet.add(step, pictures[: len(self.sheet.columns)])  # only the first seed
        return 100 * float((self.judge.image_features(pictures) * self.text_features).sum(dim=1).mean())

    def _generate(self, jobs: Sequence[tuple[str, int]]) -> list[Image]:
        prompts, seeds = zip(*jobs, strict=True)
        return generate(self.pipeline, prompts, seeds, self.sampling, batch_size=BATCH_SIZE)

    def save_sheet(self, path: Path) -> dict[int, Path]:
        """Write the sheet so far to `path`; returns the files of the rows that are new since the last call, by step."""
        new = {step: row for step, row in self.sheet.save(path).items() if step not in self._saved}
        self._saved.update(new)
        return new
