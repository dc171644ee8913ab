"""What each image will be trained with, before any training, and what is odd about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from bestiary.data.captions import names_subject
from bestiary.diffusion.base import encode_text
from bestiary.diffusion.encoding import caption_versions
from bestiary.subjects import Subject, Subjects, caption, subject_of, templates_of

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

    from bestiary.params import Encode

# How far the features of a name must be from those of its class word, as a share of their length. With the bundled base
# "sks penguin" is at 0.41, "pip penguin" at 0.37 and "hamster penguin" at 0.27.
DISTINCT = 0.3


@dataclass(frozen=True)
class CountedCaption:
    """A caption with its number of tokens, and the image that alone has it ("" for a template's)."""

    image: str
    text: str
    tokens: int


@dataclass(frozen=True)
class FolderCaptions:
    """The captions of one class folder: of images that have their own, and those that the others share."""

    subject: Subject
    images: int
    own: list[CountedCaption]
    shared: list[CountedCaption]
    odd: list[str]


def check_captions(
    manifest: pd.DataFrame,
    subjects: Subjects,
    text: tuple[CLIPTokenizer, CLIPTextModel],
    settings: Encode,
) -> list[FolderCaptions]:
    """The captions of each class of `manifest`, as encoding makes them for this tokenizer and text encoder."""
    tokenizer = text[0]

    def counted(image: str, words: str) -> CountedCaption:
        return CountedCaption(image, words, len(tokenizer(words).input_ids))

    folders = []
    for name, rows in manifest.groupby("class", sort=True):
        subject = subjects.of(str(name))
        texts = rows["caption"] if "caption" in rows else pd.Series("", index=rows.index)
        own = [
            counted(path, version)
            for path, words, sha256 in zip(rows["path"], texts, rows["sha256"], strict=True)
            if words
            for version in caption_versions(words, sha256, settings)
        ]
        uses_templates = bool((texts == "").any())
        shared = [counted("", caption(subject, each)) for each in templates_of([subject])] if uses_templates else []
        odd = [*_odd_captions(subject, own, shared, tokenizer.model_max_length), *_hardly_seen(subject, text)]
        if len(texts[texts != ""]) > 1 and texts[texts != ""].nunique() == 1:
            odd.append("All captions from files are the same, so nothing but the name can be told apart in prompts.")
        folders.append(FolderCaptions(subject, len(rows), own, shared, odd))
    return folders


def render_captions(folders: list[FolderCaptions], limit: int) -> Iterator[str]:
    """The lines that `bestiary captions` prints; `limit` is the number of tokens that the base reads."""
    for folder in folders:
        subject = folder.subject
        of_class = f", class {subject.class_word}" if subject.class_word else ""
        yield f"{subject.folder}: {subject.name} ({subject.kind}{of_class}), {_images(folder.images)}"
        captioned = len({each.image for each in folder.own})
        for each in folder.own:
            yield f"  {each.tokens:4} tokens  {each.image}  {each.text}"
        if folder.shared:
            yield f"  {_images(folder.images - captioned)} without a caption file, with one of these at each step:"
        for each in folder.shared:
            yield f"  {each.tokens:4} tokens  {each.text}"
        for line in folder.odd:
            yield f"  ! {line}"
    odd = sum(len(folder.odd) for folder in folders)
    yield f"The base reads {limit} tokens, with the first and the last one. {odd or 'Nothing'} odd."


def _images(count: int) -> str:
    return f"{count} image{'s'[: count != 1]}"


def _odd_captions(
    subject: Subject, own: list[CountedCaption], shared: list[CountedCaption], limit: int
) -> Iterator[str]:
    for each in (*own, *shared):
        where = each.image or repr(each.text[:80])
        if each.tokens > limit:
            yield f"{where} has {each.tokens} tokens, more than the base reads: encoding will refuse it. Shorten it."
        if each.image and not names_subject(each.text, subject):
            yield f"{where} lacks the name {subject.name}: {each.text[:80]!r}"


def _hardly_seen(subject: Subject, text: tuple[CLIPTokenizer, CLIPTextModel]) -> Iterator[str]:
    """A line if the text encoder hardly tells the name from the class word."""
    if not subject.class_word:
        return
    import torch

    template = "a photo of {}"
    words = [caption(subject, template), caption(subject_of(subject.class_word), template)]
    too_long = any(len(text[0](each).input_ids) > text[0].model_max_length for each in words)
    if too_long:
        return
    with torch.inference_mode():
        named, plain = encode_text(*text, words).double()
    difference = float((named - plain).norm() / plain.norm())
    if difference < DISTINCT:
        yield (
            f"The text encoder hardly tells {words[0]!r} from {words[1]!r} (difference {difference:.2f}, below "
            f"{DISTINCT}). The name may be lost in training: choose a rarer one."
        )
