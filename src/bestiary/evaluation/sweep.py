"""Where to run the adapter: its strength, its checkpoint and the guidance, tried out on seeds of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from bestiary.errors import BestiaryError
from bestiary.evaluation.scoring import SCORES, Pictures, Words, score
from bestiary.files import write_atomically

CHECKPOINTS = "checkpoints"  # the folder beside the adapter's file
POINT = "operating_point.json"


@dataclass(frozen=True)
class OperatingPoint:
    """What later stages run: an adapter at strength 1, and the guidance it is used with."""

    adapter: Path
    adapter_sha256: str
    checkpoint: str  # the file's folder before the scale went into it
    scale: float
    guidance_scale: float


def checkpoints(adapter: Path) -> list[Path]:
    """The adapter and the checkpoints beside it, the adapter first. Raises BestiaryError when there are none."""
    from bestiary.diffusion.adapter import FILE_NAME

    kept = sorted(path.parent for path in (adapter / CHECKPOINTS).glob(f"*/{FILE_NAME}"))
    if not kept:
        raise BestiaryError(f"There are no checkpoints in {adapter}: set train.keep_checkpoints and train again.")
    return [adapter, *kept]


def sweep(
    look: Callable[[Path, float, float], Pictures],
    words: Words,
    adapters: Sequence[Path],
    scales: Sequence[float],
    guidance_scales: Sequence[float],
) -> pd.DataFrame:
    """One row for each combination (checkpoint, scale, guidance_scale) with the scores of its pictures.

    `look(adapter, scale, guidance_scale)` draws and judges them.
    """
    rows = []
    for adapter, scale, guidance_scale in product(adapters, scales, guidance_scales):
        scores = score(look(adapter, scale, guidance_scale), words)
        rows.append(
            {"checkpoint": str(adapter), "scale": scale, "guidance_scale": guidance_scale, "pictures": len(scores)}
            | {key: float(scores[key].mean()) for key in SCORES}
        )
    return pd.DataFrame(rows)


def best(table: pd.DataFrame, key: str) -> dict[str, Any]:
    """The row with the highest `key`; of equals the first."""
    rows = table.to_dict("records")
    return {str(name): value for name, value in rows[int(table[key].argmax())].items()}


def settle(folder: Path, checkpoint: Path, scale: float, guidance_scale: float) -> OperatingPoint:
    """Write the operating point to `folder`, for the stages that follow.

    At another strength than 1 an adapter that has it built in is written beside it.
    """
    from bestiary.diffusion.adapter import adapter_sha256

    shutil.rmtree(folder, ignore_errors=True)  # one that an earlier sweep left
    adapter = checkpoint if scale == 1 else scaled_adapter(checkpoint, scale, folder)
    point = OperatingPoint(adapter, adapter_sha256(adapter), str(checkpoint), scale, guidance_scale)
    text = json.dumps(asdict(point) | {"adapter": adapter.as_posix()}, indent=2)
    write_atomically(folder / POINT, f"{text}\n".encode())
    return point


def read_operating_point(folder: Path) -> OperatingPoint:
    """What `settle` wrote. Raises BestiaryError when it is not there or damaged."""
    try:
        content = json.loads((folder / POINT).read_text(encoding="utf-8"))
        return OperatingPoint(**content | {"adapter": Path(content["adapter"])})
    except FileNotFoundError:
        raise BestiaryError(f"{folder / POINT} does not exist: run `dvc repro evaluate`.") from None
    except (ValueError, KeyError, TypeError):
        raise BestiaryError(f"{folder / POINT} is damaged: delete it and run `dvc repro evaluate`.") from None


def scaled_adapter(source: Path, scale: float, folder: Path) -> Path:
    """Write the adapter to `folder` with `scale` in its alpha: at strength 1 it is the source at strength `scale`."""
    from safetensors import safe_open
    from safetensors.torch import save

    from bestiary.diffusion.adapter import CONFIG_KEY, FILE_NAME, adapter_file, with_sorted_header

    with safe_open(adapter_file(source), framework="pt") as file:
        metadata = dict(file.metadata())
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    config = json.loads(metadata[CONFIG_KEY])
    config["unet.lora_alpha"] *= scale
    metadata[CONFIG_KEY] = json.dumps(config, sort_keys=True)
    write_atomically(folder / FILE_NAME, with_sorted_header(save(weights, metadata)))
    return folder
