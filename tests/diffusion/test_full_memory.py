"""A full GPU memory. Stubs raise torch's error, because these tests need no GPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.settings import encode_settings, train_settings
from support.tiny import manifests

from bestiary.diffusion.base import load_scheduler, load_unet
from bestiary.diffusion.encoding import VaeEncoder, encode_images
from bestiary.diffusion.full_memory import Halving
from bestiary.diffusion.latents import Latents
from bestiary.diffusion.training import train
from bestiary.errors import BestiaryError

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."


def fits(limit: int, seen: list[int]) -> Callable[[list[int]], list[int]]:
    """Doubles the numbers of a batch that is not longer than `limit`."""

    def double(batch: list[int]) -> list[int]:
        seen.append(len(batch))
        if len(batch) > limit:
            raise torch.OutOfMemoryError(FULL)
        return [2 * number for number in batch]

    return double


def test_a_batch_is_halved_once_and_later_batches_start_small(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []
    halving, work = Halving("Drawing", "evaluate.batch_size"), fits(2, seen)
    assert halving.parts(work, [1, 2, 3, 4, 5, 6, 7, 8]) == [[2, 4], [6, 8], [10, 12], [14, 16]]
    assert halving.parts(work, [1, 2, 3]) == [[2, 4], [6]]
    assert seen == [8, 4, 2, 2, 2, 2, 2, 1]
    assert "Drawing 4 at a time does not fit into the GPU's memory" in capsys.readouterr().out
    with pytest.raises(BestiaryError, match="does not fit into the GPU's memory, even one at a time"):
        Halving("Drawing", "evaluate.batch_size").parts(fits(0, seen), [1, 2])


def test_encoding_continues_with_smaller_batches_and_gives_the_same_latents(
    base: Path, pictures: Path, latents: Latents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = VaeEncoder.__call__

    def small(self: VaeEncoder, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if len(pixels) > 2:
            raise torch.OutOfMemoryError(FULL)
        return encode(self, pixels)

    monkeypatch.setattr(VaeEncoder, "__call__", small)
    encode_images(base, pictures, manifests(pictures), tmp_path / "latents", encode_settings())
    halved = Latents.open(tmp_path / "latents").training
    for index in range(len(halved)):
        torch.testing.assert_close(halved.posterior(index, 0), latents.training.posterior(index, 0))


def test_training_names_the_settings_that_need_less_memory(
    base: Path, latents: Latents, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = load_unet(base)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError(FULL)

    unet.register_forward_pre_hook(full)
    with pytest.raises(BestiaryError, match=r"Set train\.low_memory to true.* encode\.resolution"):
        train(unet, load_scheduler(base), latents, train_settings(), seed=0)
