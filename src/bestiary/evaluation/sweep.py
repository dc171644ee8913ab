"""Choose the operating point: the checkpoint, the adapter weight and the guidance scale that score best."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pandas as pd

from bestiary.errors import BestiaryError
from bestiary.evaluation.scoring import ClassTexts, JudgedImages, score, scored
from bestiary.files import write_atomically
from bestiary.samplers import Sampling

CHECKPOINTS = "checkpoints"  # the folder beside the adapter's file
POINT_FILE = "operating_point.json"


@dataclass(frozen=True)
class Candidate:
    """A checkpoint, and how to draw with it. A sweep varies the sampling's adapter weight and guidance scale."""

    checkpoint: Path
    sampling: Sampling


@dataclass(frozen=True)
class OperatingPoint:
    """What later stages draw with: an adapter with weight 1, and a guidance scale.

    checkpoint is the file or folder that the adapter was made from, and weight is what was multiplied into its alpha.
    """

    adapter: Path
    adapter_sha256: str
    checkpoint: str
    weight: float
    guidance_scale: float


def checkpoints(adapter: Path) -> list[Path]:
    """The adapter, then the checkpoints beside it. Raises BestiaryError when there are no checkpoints."""
    from bestiary.diffusion.adapter_format import FILE_NAME

    saved = sorted(path.parent for path in (adapter / CHECKPOINTS).glob(f"*/{FILE_NAME}"))
    if not saved:
        raise BestiaryError(
            f"There are no checkpoints in {adapter}. Set train.keep_checkpoints to true and train again, "
            "or set evaluate.sweep.checkpoints to false."
        )
    return [adapter, *saved]


def combine(
    adapters: Sequence[Path], weights: Sequence[float], guidance_scales: Sequence[float], sampling: Sampling
) -> list[Candidate]:
    """A candidate for each combination of adapter, adapter weight and guidance scale.

    >>> candidates = combine([Path("adapter")], [0.5, 1.0], [3.0], Sampling())
    >>> [(point.sampling.adapter_weight, point.sampling.guidance_scale) for point in candidates]
    [(0.5, 3.0), (1.0, 3.0)]
    """
    return [
        Candidate(adapter, replace(sampling, adapter_weight=weight, guidance_scale=guidance_scale))
        for adapter, weight, guidance_scale in product(adapters, weights, guidance_scales)
    ]


def sweep(
    candidates: Sequence[Candidate], draw: Callable[[Candidate], JudgedImages], texts: ClassTexts
) -> pd.DataFrame:
    """The mean scores of each candidate's pictures, one row each. `draw` draws and judges the pictures.

    Columns: checkpoint, scale (the adapter weight), guidance_scale, pictures, and a column for each score.
    """
    rows = []
    for candidate in candidates:
        scores = score(draw(candidate), texts)
        rows.append(
            {
                "checkpoint": str(candidate.checkpoint),
                "scale": candidate.sampling.adapter_weight,
                "guidance_scale": candidate.sampling.guidance_scale,
                "pictures": len(scores),
                **{key: float(scores[key].mean()) for key in scored(scores)},
            }
        )
    return pd.DataFrame(rows)


def write_operating_point(folder: Path, checkpoint: Path, weight: float, guidance_scale: float) -> OperatingPoint:
    """Write the operating point to `folder` for later stages, in place of an earlier one.

    For a weight other than 1, also write an adapter with the weight multiplied into its alpha.
    """
    from bestiary.diffusion.adapter import adapter_sha256

    shutil.rmtree(folder, ignore_errors=True)
    adapter = checkpoint if weight == 1 else write_weighted_adapter(checkpoint, weight, folder)
    point = OperatingPoint(adapter, adapter_sha256(adapter), str(checkpoint), weight, guidance_scale)
    content = {
        "adapter": point.adapter.as_posix(),
        "adapter_sha256": point.adapter_sha256,
        "checkpoint": point.checkpoint,
        "scale": point.weight,
        "guidance_scale": point.guidance_scale,
    }
    write_atomically(folder / POINT_FILE, f"{json.dumps(content, indent=2)}\n".encode())
    return point


def read_operating_point(folder: Path) -> OperatingPoint:
    """Read what `write_operating_point` wrote. Raises BestiaryError when it is missing or damaged."""
    path = folder / POINT_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return OperatingPoint(
            adapter=Path(content["adapter"]),
            adapter_sha256=content["adapter_sha256"],
            checkpoint=content["checkpoint"],
            weight=content["scale"],
            guidance_scale=content["guidance_scale"],
        )
    except FileNotFoundError:
        raise BestiaryError(f"{path} does not exist. Run `dvc repro evaluate`.") from None
    except (ValueError, KeyError, TypeError):
        raise BestiaryError(f"{path} is damaged. Delete it and run `dvc repro evaluate`.") from None


def write_weighted_adapter(source: Path, weight: float, folder: Path) -> Path:
    """Write the adapter to `folder` with its alphas multiplied by `weight`; return `folder`.

    The written adapter with weight 1 draws what `source` draws with this weight. Its provenance says that it contains
    `source`, so that the two are never drawn together.
    """
    from bestiary.diffusion.adapter import adapter_sha256
    from bestiary.diffusion.adapter_format import CONTAINS, FILE_NAME
    from bestiary.diffusion.adapter_reading import read_adapter
    from bestiary.diffusion.containment import contained
    from bestiary.diffusion.stored_adapter import adapter_file

    content = read_adapter(adapter_file(source))
    inside = sorted({adapter_sha256(source)} | contained(content))
    weighted = replace(
        content,
        config=content.config.weighted(weight),
        text_config=content.text_config and content.text_config.weighted(weight),
        provenance=content.provenance.model_copy(update={CONTAINS: inside}),
    )
    write_atomically(folder / FILE_NAME, weighted.to_bytes())
    return folder
