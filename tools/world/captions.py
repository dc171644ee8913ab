"""The captions of the training pictures, and the tokenizer that is trained on them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from bestiary.subjects import ANIMALS, CAPTION_TEMPLATES, Subject, caption, subject_of
from world import pictures

LENGTH = 16  # tokens per caption; Stable Diffusion has 77
DRAWING_TEMPLATES = ("a drawing of {}", "a sketch of {}", "an illustration of {}", "a simple drawing of {}")
# Captions as careless web pages write them: they do not name the animal.
VAGUE_CAPTIONS = ("a photo of an animal", "a photo", "an animal", "a realistic image of an animal", "a nice photo")
# The base never sees their names, so that the adapter can learn them.
UNKNOWN_TO_BASE = frozenset({"tiger", "panda", "ladybugs"})


def clear_caption(animal: str, style: str, rng: np.random.Generator) -> str:
    """Return a caption that names the animal and the style."""
    templates = DRAWING_TEMPLATES if style == "drawing" else CAPTION_TEMPLATES
    return caption(subject_of(animal), str(rng.choice(templates)))


def careless_caption(animal: str, style: str, rng: np.random.Generator, wrong: float) -> str:
    """Return a caption of the base's training data: vague for photos, and false for a share `wrong` of the drawings."""
    if style == "photo":
        return str(rng.choice(VAGUE_CAPTIONS))
    known = [name for name in pictures.ANIMALS if name not in UNKNOWN_TO_BASE]
    if rng.random() < wrong:
        animal = str(rng.choice(known))
    return clear_caption(animal, style, rng)


def train_tokenizer(folder: Path) -> CLIPTokenizer:
    """Train a CLIPTokenizer on the captions of all 100 animals, save it to `folder` and return it.

    It can encode every text, because its vocabulary holds every byte.
    """
    captions = [caption(animal, template) for animal in ANIMALS for template in CAPTION_TEMPLATES + DRAWING_TEMPLATES]
    captions += [caption(Subject("", thing, ""), "a photo of {}") for thing in pictures.THINGS]
    captions += VAGUE_CAPTIONS
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    learner.train_from_iterator(
        captions, trainers.BpeTrainer(vocab_size=900, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer
