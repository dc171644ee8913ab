"""The captions of the training pictures, and the tokenizer that is trained on them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from bestiary.subjects import ANIMALS, CAPTION_TEMPLATES, Subject, caption, subject_of
from world import pictures
from world.outfits import CLOTHES, COLOURS, invented_name

LENGTH = 24  # tokens per caption; Stable Diffusion has 77
DRAWING_TEMPLATES = ("a drawing of {}", "a sketch of {}", "an illustration of {}", "a simple drawing of {}")
# Captions as careless web pages write them: they do not name the animal.
VAGUE_CAPTIONS = ("a photo of an animal", "a photo", "an animal", "a realistic image of an animal", "a nice photo")
# The base never sees their names, so that the adapter can learn them.
UNKNOWN_TO_BASE = frozenset({"tiger", "panda", "ladybugs"})
MEANINGLESS_NAMES = 0.08  # of the base's drawings
VERBS = ("wearing", "with")
# Ways to name each place; the first one is the usual one.
PLACE_WORDS: dict[str, tuple[str, ...]] = {
    "grass": ("in the grass", "on the grass", "in a meadow"),
    "savanna": ("in the savanna", "on the savanna", "on a dry plain"),
    "forest": ("in the forest", "in a forest", "in the woods"),
    "snow": ("in the snow", "in snow", "on a snowy day"),
    "night": ("at night", "in the night", "in the dark"),
    "lake": ("by the lake", "at a lake", "at the lake"),
    "sea": ("in the sea", "under water", "in the ocean"),
    "sand": ("on the beach", "on a beach", "at the beach", "on the sand"),
    "flowers": ("among flowers", "in the flowers", "with flowers"),
    "sky": ("in the sky", "up in the air", "against the sky"),
    "leaf": ("on a leaf", "on a green leaf", "among leaves"),
}


def described(text: str, rng: np.random.Generator, place: str | None = None, clothes: str = "") -> str:
    """Add clothes and a place to a caption, in one of several wordings."""
    if clothes:
        text += f" {rng.choice(VERBS)} {clothes}"
    if not place:
        return text
    where = str(rng.choice(PLACE_WORDS[place]))
    order = rng.random()
    return f"{text} {where}" if order < 0.75 else f"{text}, {where}" if order < 0.9 else f"{where}, {text}"


def clear_caption(
    animal: str, style: str, rng: np.random.Generator, name: str = "", place: str | None = None, clothes: str = ""
) -> str:
    """Return a caption that says what a picture shows: animal and style, and those of name, place and clothes given."""
    templates = DRAWING_TEMPLATES if style == "drawing" else CAPTION_TEMPLATES
    if place:
        templates = tuple(template for template in templates if "habitat" not in template)
    subject = _named(animal, name)
    return described(caption(subject, str(rng.choice(templates))), rng, place, clothes)


def _named(animal: str, name: str) -> Subject:
    word = "animal" if animal == "animal" else subject_of(animal).name
    return Subject("", f"{name} {word}", "", given=True) if name else Subject("", word, "")


def careless_caption(
    animal: str, style: str, rng: np.random.Generator, wrong: float, place: str | None = None, clothes: str = ""
) -> str:
    """Return a caption of the base's training data: vague for photos, and false for a share `wrong` of the drawings.

    A few drawings have an invented name that means nothing, so that the base can read a prompt with a name.
    """
    if style == "photo":
        return described(str(rng.choice(VAGUE_CAPTIONS)), rng, place, clothes)
    known = [name for name in pictures.ANIMALS if name not in UNKNOWN_TO_BASE]
    if rng.random() < wrong:
        animal = str(rng.choice(known))
    name = invented_name(rng) if rng.random() < MEANINGLESS_NAMES else ""
    return clear_caption(animal, style, rng, name, place, clothes)


def train_tokenizer(folder: Path) -> CLIPTokenizer:
    """Train a CLIPTokenizer on the captions of all 100 animals, save it to `folder` and return it.

    It can encode every text, because its vocabulary holds every byte.
    """
    captions = [caption(animal, template) for animal in ANIMALS for template in CAPTION_TEMPLATES + DRAWING_TEMPLATES]
    captions += [caption(Subject("", thing, ""), "a photo of {}") for thing in pictures.THINGS]
    captions += VAGUE_CAPTIONS
    captions += [f"a photo of an animal {words}" for place in PLACE_WORDS.values() for words in place]
    captions += [f"an animal {verb} a {colour} {kind} and" for verb in VERBS for colour in COLOURS for kind in CLOTHES]
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    learner.train_from_iterator(
        captions, trainers.BpeTrainer(vocab_size=1400, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer
