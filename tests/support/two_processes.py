"""Encode and train in one of several processes, and write what it did to a file.

python -m torch.distributed.run --nproc_per_node 2 two_processes.py BASE PICTURES OUT [ACCUMULATION]

With ACCUMULATION, training computes in bfloat16 without autocast, as on a GPU.
"""

import hashlib
import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from PIL import Image
from support.settings import encode_settings, train_settings
from support.tiny import manifests
from support.training import adapter_weights

from bestiary.data.images import open_rgb
from bestiary.diffusion.base import load_scheduler, load_unet, processes
from bestiary.diffusion.batches import TrainingStream
from bestiary.diffusion.encoding import encode_images
from bestiary.diffusion.latents import Latents
from bestiary.diffusion.training import train


def main() -> None:
    """Write the images that this process encoded, the positions that it trained on, and its losses."""
    base, pictures, out = map(Path, sys.argv[1:4])
    accumulation = sys.argv[4:]
    dtype = torch.bfloat16 if accumulation else torch.float32
    settings = train_settings(steps=15, accumulation=int(accumulation[0]) if accumulation else 1)
    encoded: list[str] = []
    positions: list[int] = []
    image_at = TrainingStream.image_at

    def note_image(path: Path) -> Image.Image:
        encoded.append(str(path))
        return open_rgb(path)

    def note_position(stream: TrainingStream, position: int) -> int:
        positions.append(position)
        return image_at(stream, position)

    with (
        patch("bestiary.diffusion.encoding.open_rgb", note_image),
        patch("bestiary.diffusion.encoding.SHARD_IMAGES", 4),
        patch.object(TrainingStream, "image_at", note_position),
        patch("bestiary.diffusion.training.device_and_dtype", lambda: (torch.device("cpu"), dtype)),
    ):
        encode_images(base, pictures, manifests(pictures), out / "latents", encode_settings())
        latents = Latents.open(out / "latents")
        unet = load_unet(base, dtype=dtype)
        result = train(unet, load_scheduler(base), latents, settings, seed=0)
    found = {
        "encoded": encoded,
        "positions": positions,
        "val_loss": result.val_loss,
        "train_loss": result.train_loss,
        "weights": hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in adapter_weights(unet))).hexdigest(),
    }
    (out / f"{processes().process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
