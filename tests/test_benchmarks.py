"""The benchmarks of `make bench` that are long, as small as they can be: that they run and say what they are for."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def quick(name: str) -> tuple[str, dict[str, Any]]:
    """What a benchmark prints, and its last line."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--quick"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return told, json.loads(told.splitlines()[-1])


def test_training_is_set_beside_the_originals_loop_the_machines_rate_and_the_bare_step() -> None:
    told, result = quick("training")
    (row,), (encoding,) = result["training"], result["encoding"]
    assert row["share_of_original"] == pytest.approx(row["seconds_per_image"] / row["original_seconds_per_image"])
    rate = row["gflop_per_image"] / row["seconds_per_image"]
    assert row["share_of_matmul_rate"] == pytest.approx(rate / result["matmul_gflops_per_second"])
    assert row["overhead_share"] < 1
    assert result["embedded_overhead_share"] < 1
    assert encoding["ratio_to_vae"] == pytest.approx(encoding["seconds_per_image"] / encoding["vae_seconds_per_image"])
    assert "| share_of_original |" in told
    assert f"cpus {result['environment']['cpus']}" in told


def test_our_default_way_of_drawing_is_set_beside_the_originals() -> None:
    told, result = quick("inference")
    for size in ("embedded", "sd15_size"):
        original, default = (result[size][name] for name in ("original", "default"))
        assert original["scheduler"] == "ddpm"
        assert (original["fused"], default["fused"]) == (False, True)
        assert original["times_faster"] == 1
        assert default["times_faster"] > 0
    low, high = result["embedded"]["default"]["clip_score_minus_original"]["ci95"]
    assert low <= high
    assert "| times_faster | 1 |" in told
