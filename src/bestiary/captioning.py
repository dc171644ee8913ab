"""Automatic captions: a captioning model describes the images that have no caption, in text files beside them."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from bestiary.data.captions import read_captions
from bestiary.data.images import open_rgb
from bestiary.errors import BestiaryError, shown
from bestiary.files import is_folder, write_new
from bestiary.hub import HubModel, download, is_hub_id
from bestiary.image_files import UnreadableImageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from bestiary.data.listing import Listing

# Takes B images; returns a caption for each.
Describe = Callable[[Sequence["Image"]], list[str]]

# The kinds of model that describe an image without a question beside it, by their names in transformers.
KINDS = ("blip", "git")
BATCH_SIZE = 8
BEAMS, MAX_TOKENS = 3, 30  # the search of BLIP's authors; a caption is one sentence
_SIDE = 1024  # pixels: a batch of large photographs would need gigabytes, and BLIP reads 384
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Captioner:
    """A captioning model of transformers, such as BLIP (arXiv:2201.12086), with its preprocessing."""

    def __init__(self, model: Any, processor: Any) -> None:
        self._model = model.eval()
        self._processor = processor

    @classmethod
    def load(cls, model: str | Path, revision: str | None = None) -> Captioner:
        """Load the model from a folder, or by its id and commit from the Hugging Face hub, on the best device.

        Raises BestiaryError when it does not exist, is of a kind that cannot caption, or lacks weights.
        """
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

        from bestiary.diffusion.base import device_and_dtype, quiet_loading

        folder = Path(model) if is_folder(model) else _download(str(model), revision)
        device, dtype = device_and_dtype()
        name = shown(str(model), 200)
        try:
            with quiet_loading():
                kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
                if kind in KINDS:
                    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
                    network, loading = AutoModelForImageTextToText.from_pretrained(
                        folder, dtype=dtype, output_loading_info=True, local_files_only=True
                    )
        except Exception as error:  # transformers and safetensors raise different types
            reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
            raise BestiaryError(
                f"The captioning model {name} cannot be loaded: {shown(reason, 200)}. Check `captioner` in params.yaml."
            ) from error
        if kind not in KINDS:
            raise BestiaryError(
                f"The captioning model {name} is of the kind {shown(kind)}. Choose one of the kind "
                f"{' or '.join(KINDS)}, which needs no question beside the image."
            )
        if loading["missing_keys"]:  # transformers would fill them with random numbers
            raise BestiaryError(
                f"The captioning model {name} is incomplete: it has no {min(loading['missing_keys'])}. Download it "
                "again."
            )
        return cls(network.to(device), processor)

    def describe(self, images: Sequence[Image]) -> list[str]:
        """One caption for each of B RGB images of any size."""
        import torch

        inputs = self._processor(images=list(images), return_tensors="pt")
        pixel_values = inputs["pixel_values"].to(self._model.device, self._model.dtype)  # (B, C, H, W)
        with torch.inference_mode():
            tokens = self._model.generate(pixel_values=pixel_values, num_beams=BEAMS, max_new_tokens=MAX_TOKENS)
        texts = self._processor.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


def _download(model: str, revision: str | None) -> Path:
    """The hub's snapshot of a model. Only downloaded files are loaded, so that loading asks no other server."""
    if not is_hub_id(model):
        raise BestiaryError(
            f"The captioning model {shown(model, 200)} does not exist. Give `captioner` in params.yaml a folder, or an "
            "owner/name on the Hugging Face hub."
        )
    if not _COMMIT.fullmatch(revision or ""):
        raise BestiaryError(
            f"The captioning model {shown(model, 200)} is not pinned. Give captioner.revision in params.yaml the "
            "commit on the Hugging Face hub, of 40 characters."
        )
    return download(on_hub(model, revision))


def on_hub(model: str, revision: str | None) -> HubModel:
    """The files of a captioning model on the hub."""
    return HubModel("captioning model", model, revision, key="captioner")


@dataclass(frozen=True)
class Uncaptioned:
    """The images that have no caption yet: those to describe, and those whose caption file is taken."""

    images: list[Path]
    without_place: list[Path]  # another file has the caption file's name, or an image of that name has a caption


def find_uncaptioned(listing: Listing, chosen: Mapping[str, Sequence[Path]]) -> Uncaptioned:
    """Find the images without a caption among the `chosen` ones of each class.

    Images that share a name up to the ending share a caption file. Raises BestiaryError when a caption file is wrong.
    """
    captions = read_captions(listing, chosen)
    found = Uncaptioned([], [])
    for name, images in chosen.items():
        sharing: defaultdict[Path, list[Path]] = defaultdict(list)  # images by their caption file
        for image in listing.images[name]:
            sharing[caption_file(image)].append(image)
        begun: set[Path] = set()
        for image in (image for image in images if image not in captions):
            file = caption_file(image)
            if os.path.lexists(file) or any(other in captions for other in sharing[file]):
                found.without_place.append(image)
            elif file not in begun:
                found.images.append(image)
                begun.add(file)
    return found


def caption_file(image: Path) -> Path:
    """Where the caption of an image is written.

    >>> caption_file(Path("data/my-cat/1.jpg")).as_posix()
    'data/my-cat/1.txt'
    """
    return image.with_name(f"{image.stem}.txt")


def write_captions(images: Sequence[Path], describe: Describe) -> Iterator[tuple[Path, str]]:
    """Write a caption file beside each image; yield the file and its caption, or the image and what went wrong.

    No file is overwritten. After an interruption, pass the images that have no file yet.
    """
    with tqdm(total=len(images), desc="write captions", unit="image") as bar:
        for start in range(0, len(images), BATCH_SIZE):
            paths, pictures = [], []
            for path in images[start : start + BATCH_SIZE]:
                try:
                    picture = open_rgb(path)
                except UnreadableImageError as error:
                    yield path, f"no caption: the image cannot be read ({error.reason})"
                    continue
                picture.thumbnail((_SIDE, _SIDE))
                paths.append(path)
                pictures.append(picture)
            for path, text in zip(paths, describe(pictures) if pictures else [], strict=True):
                if not text:
                    yield path, "no caption: the model found no words for this image"
                elif write_new(caption_file(path), f"{text}\n".encode()):
                    yield caption_file(path), text
                else:
                    yield caption_file(path), "not overwritten: the file was created in the meantime"
            bar.update(len(images[start : start + BATCH_SIZE]))
