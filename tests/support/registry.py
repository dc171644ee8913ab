"""Adapters, reports and registrations for tests of the model registry."""

import csv
import os
from pathlib import Path
from typing import Any

from bestiary import tracking
from bestiary.params import Register
from bestiary.registry import Registration, register
from bestiary.settings import Usual

RULES = Register(name="bestiary", champion_score="margin", max_copied=0.1)
USUAL = Usual(template="a drawing of {}", steps=5, guidance_scale=3.0, scheduler="ddim", resolution=64)


def evaluation(sha256: str = "", gain: float = 5.0, half_width: float = 1.0, copied: float = 0.0) -> dict[str, Any]:
    """The evaluation report of an adapter whose scores beat the base's by `gain`."""

    def estimate(mean: float) -> dict[str, Any]:
        return {"mean": mean, "ci95": [mean - half_width, mean + half_width]}

    return {
        "images": 4,
        "adapter_sha256": sha256,
        "base": {score: estimate(20.0) for score in ("clip_score", "margin", "top1")},
        "adapter": {score: estimate(20.0 + gain) for score in ("clip_score", "margin", "top1")},
        "delta": {score: estimate(gain) for score in ("clip_score", "margin", "top1")},
        "memorisation": {"adapter": {"copied": {"mean": copied, "ci95": [copied - 0.1, copied + 0.1]}}},
    }


def write_pictures(path: Path, gain: float, seeds: int = 8) -> Path:
    """The table of judged pictures that goes with a report: the margin of each picture."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["class", "prompt", "seed", "adapter_margin", "adapter_predicted"])
        table.writerows(["cat", "a photo of a cat", seed, 20 + gain + seed / 10, "cat"] for seed in range(seeds))
    return path


def make_adapter(base: Path, folder: Path, seed: int, strength: float = 0.1, told_base: str | None = None) -> Path:
    """Save a rank-2 adapter with random weights; its metadata names `told_base`, or else `base`."""
    import torch

    from bestiary.diffusion.adapter import inject, save_adapter
    from bestiary.diffusion.base import base_sha256, load_unet

    unet = load_unet(base)
    parameters = inject(unet, rank=2, alpha=4, dropout=0.0, targets=["to_q", "to_v"], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data = strength * torch.randn(parameter.shape, generator=generator)
    save_adapter(unet, folder, {"base": told_base or str(base), "base_sha256": base_sha256(base)})
    return folder


def submit(project: Path, base: Path | str, adapter: Path, gain: float = 5.0, **changes: Any) -> Registration:
    """Register the adapter with a report in which it beats the base by `gain`; `changes` override the arguments."""
    from bestiary.diffusion.adapter import adapter_sha256

    client = tracking.open_client(tracking.tracking_uri(), project)
    report = evaluation(adapter_sha256(adapter), gain)
    arguments: dict[str, Any] = {
        "base": str(base),
        "base_revision": None,
        "run_id": client.create_run("0").info.run_id,
        "measured": "alike",
        "usual": USUAL,
    }
    reports = {"evaluate": report | changes.pop("report", {})} | changes.pop("reports", {})
    rules = RULES.model_copy(update={"name": changes.pop("name", RULES.name)})
    own = project / f"of-process-{os.getpid()}"
    own.mkdir(exist_ok=True)
    table = write_pictures(own / "pictures.csv", gain)
    return register(adapter, reports, table, rules, **arguments | changes)
