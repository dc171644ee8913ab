import shutil
from pathlib import Path

import pytest

from bestiary.diffusion.latents import LatentCache
from bestiary.errors import BestiaryError


@pytest.mark.parametrize("damage", ["missing", "cut off", "shard lost"])
def test_broken_latents_are_rejected(latents_folder: Path, tmp_path: Path, damage: str) -> None:
    copy = Path(shutil.copytree(latents_folder, tmp_path / "latents"))
    shard = copy / "train-00000.safetensors"
    match damage:
        case "missing":
            shutil.rmtree(copy)
        case "cut off":
            shard.write_bytes(shard.read_bytes()[:1000])
        case "shard lost":
            shard.unlink()
    with pytest.raises(BestiaryError, match=str(tmp_path / "latents")):
        LatentCache.open(copy, "train")
