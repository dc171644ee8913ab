from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
from PIL import Image

from bestiary.evaluation import plots
from bestiary.evaluation.benchmark import Quality, Row, Setting
from bestiary.evaluation.profiling import Cost
from bestiary.evaluation.report import ClassScores, Estimate
from bestiary.params import Sweep


def test_every_figure_is_a_picture_that_opens(tmp_path: Path) -> None:
    tile = Image.new("RGB", (64, 64), "teal")
    delta = Estimate(mean=2.0, ci95=(2.5, 3.0))  # the interval of a skewed sample may not contain its mean
    names = ["antelope", "tiger"]
    per_class = {name: ClassScores(base={}, adapter={}, delta={"clip_score": delta, "top1": delta}) for name in names}
    cost = Cost(0.2, 0.3, 5.0, 0.01, 0.15, 0.02, 900.0, peak_device_memory_mib=None)
    setting = Setting("ddpm", 5, batch=1, fused=True, guidance="never")
    rows = [Row(setting, cost, Quality(30.0, 50.0, distance)) for distance in (None, 4.0)]
    swept = {"checkpoint": ["a", "a"], "scale": [0.5, 1.0], "guidance_scale": [3.0, 3.0], "top1": [10.0, 20.0]}
    plots.confusion_matrix(pd.DataFrame(np.eye(2, dtype=int) * 3, index=names, columns=names), tmp_path / "a.png")
    plots.class_differences(per_class, tmp_path / "b.png")
    plots.base_beside_adapter([("antelope", [tile], [tile])], tmp_path / "c.png")
    plots.closest([(0.9, tile, tile)], tmp_path / "d.png")
    plots.quality_against_cost(rows, tmp_path / "e.png")
    table = pd.DataFrame(swept)
    for score in get_args(Sweep.model_fields["score"].annotation):
        plots.sweep_heat_map(table.rename(columns={"top1": score}), score, tmp_path / "f.png")
    plots.pair_sheet([[tile] * 2, [tile] * 2], [0, 1], tmp_path / "g.png")
    for name in "abcdefg":
        with Image.open(tmp_path / f"{name}.png") as image:
            image.load()
            assert min(image.size) > 100


def test_a_figure_of_the_same_numbers_has_the_same_bytes(tmp_path: Path) -> None:
    counts = pd.DataFrame([[1, 2], [3, 4]], index=["a", "b"], columns=["a", "b"])
    for name in ("first", "second"):
        plots.confusion_matrix(counts, tmp_path / f"{name}.png")
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
