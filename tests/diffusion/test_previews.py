"""Previews are made while they are wanted, and cost nothing otherwise."""

from pathlib import Path

import pytest
from PIL.Image import Image

from bestiary.diffusion import previews
from bestiary.diffusion.base import load_pipeline
from bestiary.diffusion.sampling import generate
from bestiary.samplers import Sampling


def test_nothing_is_decoded_until_a_preview_is_wanted(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(previews, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(previews, "MAX_SHARE", 1e9)
    pipeline = load_pipeline(base, device="cpu")
    decoded: list[tuple[int, ...]] = []
    hook = pipeline.vae.decoder.register_forward_pre_hook(lambda _, inputs: decoded.append(tuple(inputs[0].shape)))
    shown: list[Image] = []
    asked = 0

    def is_wanted() -> bool:
        nonlocal asked
        asked += 1
        return asked == 3

    with previews.previews(pipeline, 3.0, shown.append, is_wanted):
        generate(pipeline, ["a cat"], [0], Sampling("euler", steps=5, guidance_scale=3.0), batch_size=1)
    hook.remove()
    assert asked == 5
    assert len(shown) == 1
    assert len(decoded) == 2  # the preview and the picture
