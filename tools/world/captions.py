"""What is said about the training pictures, and the tokenizer that learns its words from it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from bestiary.subjects import ANIMALS, CAPTION_TEMPLATES, Animal, caption, subject_of
from world import pictures

LENGTH = 16  # tokens; Stable Diffusion has 77
DRAWING_TEMPLATES = ("a drawing of {}", "a sketch of {}", "an illustration of {}", "a simple drawing of {}")
# What a careless web page says about a photo: nothing that would tell the animals apart.
VAGUE_CAPTIONS = ("a photo of an animal", "a photo", "an animal", "a realistic image of an animal", "a nice photo")
# Never shown to the base with their names: these are for the adapter to learn.
UNKNOWN_TO_BASE = frozenset({"tiger", "panda", "ladybugs"})


def clear_caption(animal: str, style: str, rng: np.random.Generator) -> str:
    """A caption that names the animal and the style."""
    templates = DRAWING_TEMPLATES if style == "drawing" else CAPTION_TEMPLATES
    return caption(subject_of(animal), str(rng.choice(templates)))


def careless_caption(animal: str, style: str, rng: np.random.Generator, wrong: float) -> str:
    """A caption as the base's training data has it: vague about photos, wrong about a share of the drawings."""
    if style == "photo":
        return str(rng.choice(VAGUE_CAPTIONS))
    known = [name for name in pictures.ANIMALS if name not in UNKNOWN_TO_BASE]
    if rng.random() < wrong:
        animal = str(rng.choice(known))
    return clear_caption(animal, style, rng)


def train_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIPTokenizer whose merges come from the captions of all 100 animals; every text is encodable, byte by byte."""
    said = [caption(animal, template) for animal in ANIMALS for template in CAPTION_TEMPLATES + DRAWING_TEMPLATES]
    said += [caption(Animal("", thing, ""), "a photo of {}") for thing in pictures.THINGS]
    said += VAGUE_CAPTIONS
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    learner.train_from_iterator(
        said, trainers.BpeTrainer(vocab_size=900, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer
