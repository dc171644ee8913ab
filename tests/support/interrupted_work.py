"""Encode and train in child processes that a test may kill: `python -m support.interrupted_work BASE PICTURES`.

For each folder on standard input, a child works in it. Prints the child's process id, then its exit status.
"""

import os
import sys
from pathlib import Path
from unittest.mock import patch

# Imported here once, although only the library uses them: otherwise each child would spend its time on importing them.
import peft  # noqa: F401
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel  # noqa: F401
from support.settings import encode_settings, train_settings
from support.tiny import manifests
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

from bestiary.diffusion.adapter import save_adapter
from bestiary.diffusion.adapter_format import Provenance
from bestiary.diffusion.base import load_scheduler, load_unet
from bestiary.diffusion.encoding import encode_images
from bestiary.diffusion.latents import Latents
from bestiary.diffusion.training import train


def work(base: Path, pictures: Path, out: Path) -> None:
    """Encode and train in `out`, or resume."""
    settings, unfinished = encode_settings(batch_size=2), out / "unfinished"
    with patch("bestiary.diffusion.encoding.SHARD_IMAGES", 2):
        encode_images(base, pictures, manifests(pictures), out / "latents", settings, unfinished=unfinished)
    unet = load_unet(base)
    train(
        unet,
        load_scheduler(base),
        Latents.open(out / "latents"),
        train_settings(steps=24, validate_every=4, dropout=0.1),
        seed=0,
        checkpoints=out / "checkpoints",
    )
    save_adapter(unet, out / "adapter", Provenance())


def main() -> None:
    """Serve the folders on standard input."""
    torch.set_num_threads(1)
    base, pictures = map(Path, sys.argv[1:])
    for line in sys.stdin:  # this process has started no thread yet, so forking it is safe
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work(base, pictures, Path(line.strip()))
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
