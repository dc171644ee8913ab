"""Preservation: train the adapter to leave alone what the base predicts for prompts that are not about its subject.

Beside its images, each training step takes some noised latents with a prompt that it must not change: the class word
("a photo of a penguin"), another subject, or the empty prompt. Their target is the base's own prediction, computed once
before training. Prior preservation (DreamBooth, arXiv:2208.12242) takes the noise of pictures that the base drew as
their target instead; on the bundled base that unteaches the subject.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from bestiary.diffusion.base import encode_text
from bestiary.diffusion.batches import seeded_generator, seeded_number
from bestiary.diffusion.full_memory import explained
from bestiary.diffusion.low_memory import FULL_MEMORY
from bestiary.diffusion.sampling import generate
from bestiary.errors import BestiaryError
from bestiary.files import write_atomically
from bestiary.subjects import CAPTION_TEMPLATES, Subject, caption, subject_of, templates_of

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    from bestiary.diffusion.latents import LatentCache
    from bestiary.params import Train
    from bestiary.samplers import Sampling

POOL = 384  # predictions of the base, from which each step takes some at random
PICTURES = 48  # that the base draws for the kinds "drawn" and "both"
BATCH_SIZE = 16
CLASS_SHARE, OTHER_SHARE = 0.5, 0.4  # of the prompts; the rest is empty
DRAWING_TEMPLATES = ("a drawing of {}", "a sketch of {}", "an illustration of {}", "a simple drawing of {}")
TEMPLATES = CAPTION_TEMPLATES + DRAWING_TEMPLATES
OTHER_SUBJECTS = ("zebra", "elephant", "giraffe", "owl", "shark", "octopus", "butterfly", "lion")
VAGUE_PROMPTS = ("a photo of an animal", "a photo", "an animal", "a realistic image of an animal", "a nice photo")


class PreservedSample(NamedTuple):
    """Noised latents, and what the base predicts for them."""

    noisy: torch.Tensor  # (C, h, w), float32
    timesteps: torch.Tensor  # ()
    captions: torch.Tensor  # (), an index into the features
    target: torch.Tensor  # (C, h, w), float32


@dataclass(frozen=True)
class Preserved:
    """The predictions of the base that training preserves."""

    samples: Sequence[PreservedSample]
    features: torch.Tensor  # (captions, T, D)

    def to(self, device: torch.device, dtype: torch.dtype) -> Preserved:
        """A copy on the device, with the text features in this dtype."""
        samples = [PreservedSample(*(value.to(device) for value in sample)) for sample in self.samples]
        return Preserved(samples, self.features.to(device, dtype))

    def batches(self, seed: int, positions: range, *, one_at_a_time: bool = False) -> Iterator[PreservedSample]:
        """The samples at these positions of the run: (B, ...) each, stacked by size or one at a time.

        Like the images', a position's sample is a function of the seed, so a resumed run takes the same ones.
        """
        groups: defaultdict[object, list[PreservedSample]] = defaultdict(list)
        for position in positions:
            sample = self.samples[seeded_number(seed, "preserved", position) % len(self.samples)]
            groups[position if one_at_a_time else sample.noisy.shape].append(sample)
        for group in groups.values():
            yield PreservedSample(*(torch.stack(values) for values in zip(*group, strict=True)))


def class_word_of(subject: Subject) -> str:
    """The subject's class word: as subjects.yaml gives it, else the last word of its name.

    Raises BestiaryError when the name has only one word.

    >>> from bestiary.subjects import Subjects
    >>> class_word_of(Subjects().of("sks_penguin")), class_word_of(Subjects().of("my-red panda"))
    ('penguin', 'panda')
    """
    *rest, last = subject.name.split()
    if subject.class_word:
        return subject.class_word
    if not rest:
        raise BestiaryError(
            f"train.preservation needs the class word of {subject.folder}. Give it in subjects.yaml as its class, "
            "or set train.preservation.kind to none."
        )
    return last


@explained("Predicting what training preserves", FULL_MEMORY)
def preserve(
    pipeline: StableDiffusionPipeline,
    scheduler: DDPMScheduler,
    cache: LatentCache,
    settings: Train,
    sampling: Sampling,
    *,
    class_words: Sequence[str],
    seed: int,
    file: Path | None = None,
) -> Preserved:
    """Compute what the base predicts for prompts with the class words, other subjects and no words.

    `pipeline` must be the base without an adapter. `noised` takes the images in `cache`, `drawn` takes pictures that
    the base draws with `sampling`, `both` takes half of each. `file` keeps the result, for a run that is resumed.

    With `settings.low_memory`, pictures are drawn and predictions made one at a time.
    Raises BestiaryError when a prompt about a class word is also a caption of the training images, or is too long, and
    when the GPU's memory is full.
    """
    if file is not None and (stored := _read(file)):
        return stored
    about_class, others = _prompts(cache, class_words)
    prompts = ["", *about_class, *others]
    features = encode_text(pipeline.tokenizer, pipeline.text_encoder, prompts).clone()  # not an inference tensor
    kind, batch_size = settings.preservation.kind, 1 if settings.low_memory else BATCH_SIZE
    drawn = [] if kind == "noised" else _draw(pipeline, about_class, others, sampling, seed, batch_size)
    rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for number in range(POOL):
        generator = seeded_generator(seed, "preserved", "pool", number)
        share, place = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        timestep = int((number + place) / POOL * scheduler.config.num_train_timesteps)  # evenly over the schedule
        if kind == "noised" or (kind == "both" and number % 2 == 0):
            latents = _sample(cache, generator)
            prompt = _choose(about_class if share < CLASS_SHARE else others, generator)
        else:
            prompt, latents = drawn[int(torch.randint(len(drawn), (), generator=generator))]
        prompt = prompt if share < CLASS_SHARE + OTHER_SHARE else ""
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.tensor(timestep)
        noisy = scheduler.add_noise(latents[None], noise[None], timesteps[None])[0]
        rows.append((noisy, timesteps, torch.tensor(prompts.index(prompt))))
    preserved = Preserved(_predicted(pipeline.unet, rows, features, batch_size), features.cpu())
    if file is not None:
        write_atomically(file, _bytes(preserved))
    return preserved


def preservation_error(unet: Any, batch: PreservedSample, features: torch.Tensor) -> torch.Tensor:
    """What the UNet predicts minus what the base predicted, float32 (B, C, h, w)."""
    prediction = unet(batch.noisy.to(features.dtype), batch.timesteps, features[batch.captions]).sample
    error: torch.Tensor = prediction.float() - batch.target
    return error


def _prompts(cache: LatentCache, class_words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The prompts about the class words, and those about anything else."""
    known = [subject_of(word) for word in class_words]
    about_class = [
        caption(subject, template) for subject in known for template in (*templates_of([subject]), *DRAWING_TEMPLATES)
    ]
    taught = set(cache.captions["caption"])
    for prompt in about_class:
        if prompt in taught:
            raise BestiaryError(
                f"train.preservation would keep the base's pictures of {prompt!r}, which is a caption to train on. "
                "Give the subject a name that differs from its class word, or set train.preservation.kind to none."
            )
    keys = {subject.key for subject in known}
    unrelated = [subject_of(name) for name in OTHER_SUBJECTS]
    others = [caption(subject, template) for subject in unrelated if subject.key not in keys for template in TEMPLATES]
    return about_class, [prompt for prompt in (*others, *VAGUE_PROMPTS) if prompt not in taught]


def _choose(prompts: Sequence[str], generator: torch.Generator) -> str:
    return prompts[int(torch.randint(len(prompts), (), generator=generator))]


def _sample(cache: LatentCache, generator: torch.Generator) -> torch.Tensor:
    """Latents of a random training image: (C, h, w)."""
    image, variant = (int(torch.randint(count, (), generator=generator)) for count in (len(cache), cache.variants))
    mean, std = cache.posterior(image, variant)
    return mean + std * torch.randn(mean.shape, generator=generator)


def _draw(
    pipeline: StableDiffusionPipeline,
    about_class: Sequence[str],
    others: Sequence[str],
    sampling: Sampling,
    seed: int,
    batch_size: int,
) -> list[tuple[str, torch.Tensor]]:
    """Pictures that the base draws, half of them about a class word: prompts and latents (C, h, w)."""
    generator = seeded_generator(seed, "preserved", "prompts")
    prompts = [_choose(others if number % 2 else about_class, generator) for number in range(PICTURES)]
    seeds = [seeded_number(seed, "preserved", "picture", number) for number in range(PICTURES)]
    images = generate(pipeline, prompts, seeds, sampling, batch_size=batch_size)
    latents: list[torch.Tensor] = []
    for start in range(0, PICTURES, batch_size):
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images[start : start + batch_size]]))
        with torch.no_grad():
            values = (pixels.permute(0, 3, 1, 2) / 127.5 - 1).to(pipeline.device, pipeline.vae.dtype)
            latents.extend(pipeline.vae.encode(values).latent_dist.mean.float().cpu())
    return [(prompt, mean * pipeline.vae.config.scaling_factor) for prompt, mean in zip(prompts, latents, strict=True)]


@torch.no_grad()
def _predicted(
    unet: Any, rows: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], features: torch.Tensor, batch_size: int
) -> list[PreservedSample]:
    """The rows (noisy, timesteps, captions) with the UNet's prediction for each, in batches of one size."""
    groups: defaultdict[torch.Size, list[int]] = defaultdict(list)
    for number, (noisy, _, _) in enumerate(rows):
        groups[noisy.shape].append(number)
    targets: dict[int, torch.Tensor] = {}
    for numbers in groups.values():
        for start in range(0, len(numbers), batch_size):
            batch = numbers[start : start + batch_size]
            noisy, timesteps, captions = (
                torch.stack(values).to(features.device) for values in zip(*(rows[row] for row in batch), strict=True)
            )
            prediction = unet(noisy.to(unet.dtype), timesteps, features[captions].to(unet.dtype)).sample
            targets.update(zip(batch, prediction.float().cpu(), strict=True))
    return [PreservedSample(*row, targets[number]) for number, row in enumerate(rows)]


def _bytes(preserved: Preserved) -> bytes:
    tensors = {"features": preserved.features.contiguous()}
    for number, sample in enumerate(preserved.samples):
        tensors |= {f"{number}.{name}": value.contiguous() for name, value in sample._asdict().items()}
    return save(tensors)


def _read(file: Path) -> Preserved | None:
    """The stored predictions; None when there are none that can be read."""
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError):  # a power failure may break a file; computing it again gives the same
        return None
    samples = [
        PreservedSample(*(tensors[f"{number}.{name}"] for name in PreservedSample._fields)) for number in range(POOL)
    ]
    return Preserved(samples, tensors["features"])
