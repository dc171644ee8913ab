"""The long benchmarks of `make bench`, as small as possible: they run, and their numbers agree with one another."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NEAR = ("resize", "re-encode", "crop", "mirror")

pytestmark = pytest.mark.slow


def quick(name: str, *options: str) -> tuple[str, dict[str, Any]]:  # JSON, whose keys each test knows
    """A benchmark's output, and its last line parsed."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--quick", *options]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return output, json.loads(output.splitlines()[-1])


def test_training_is_compared_with_the_originals_loop_the_matrix_product_and_the_bare_step() -> None:
    output, result = quick("training")
    for row in result["training"]:
        assert row["share_of_original"] == pytest.approx(row["seconds_per_image"] / row["original_seconds_per_image"])
        rate = row["gflop_per_image"] / row["seconds_per_image"]
        assert row["share_of_matmul_rate"] == pytest.approx(rate / result["matmul_gflops_per_second"])
        if not row["compiled"]:
            assert row["overhead_share_least"] <= row["overhead_share"] <= row["overhead_share_most"]
    assert result["bundled_overhead_share"] < 1
    for row in result["encoding"]:
        assert row["ratio_to_vae"] == pytest.approx(row["seconds_per_image"] / row["vae_seconds_per_image"])
    assert "| share_of_original |" in output
    assert f"cpus {result['environment']['cpus']}" in output


def test_a_gpus_speed_is_measured_beside_other_ways_and_each_row_says_what_it_is() -> None:
    _, result = quick("gpu")
    rows = result["rows"]
    assert {name.split(",")[0] for name in rows} == {
        "ours",
        "official script",
        "original's loop",
        "VAE encoder",
        "drawing",
        "memory",
        "low memory 8 GB",
    }
    assert all(row["images_per_second"] > 0 for row in rows.values())
    assert result["gpu"] == "cpu"  # the tests hide a GPU


@pytest.mark.parametrize(
    ("problem", "error", "kept"),
    [
        ("raise RuntimeError('out of luck')", "RuntimeError: out of luck", ["a", "b", "c"]),
        ("time.sleep(60)", "TooLongError: ", ["a", "b", "c"]),
        ("raise KeyboardInterrupt", None, ["a"]),
    ],
)
def test_a_row_that_fails_loses_no_other_row(problem: str, error: str | None, kept: list[str]) -> None:
    program = f"""if True:
        import sys, time
        sys.argv, sys.path[:0] = ["gpu.py", "--quick"], ["benchmarks"]
        import gpu
        def fail():
            {problem}
        gpu.ROW_SECONDS = 1
        gpu.low_memory = lambda *_: {{}}
        gpu.measurements = lambda *_: {{"a": lambda: {{"images_per_second": 1.0}}, "b": fail, "c": lambda: {{}}}}
        gpu.main()
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert done.returncode
    assert rows["a"]["images_per_second"] == 1
    assert list(rows) == kept
    assert rows.get("b", {}).get("error") == error


def test_make_bench_goes_through_all_scripts_and_fails_if_one_fails(tmp_path: Path) -> None:
    shutil.copy(ROOT / "benchmarks" / "__main__.py", tmp_path)
    (tmp_path / "a.py").write_text("print('{\"rows\": 1}')\nraise SystemExit(1)")
    (tmp_path / "b.py").write_text("raise SystemExit('broken')")
    (tmp_path / "c.py").write_text("print('{\"seconds\": 2}')")
    done = subprocess.run([sys.executable, str(tmp_path)], capture_output=True, text=True, check=False)
    results = json.loads(done.stdout.splitlines()[-1])
    assert results == {"a": {"rows": 1}, "c": {"seconds": 2}, "seconds": results["seconds"]}
    assert done.returncode
    assert done.stderr.splitlines()[-1] == "a.py, b.py failed."


def test_our_default_way_of_drawing_is_compared_with_the_originals() -> None:
    output, result = quick("inference")
    for size in ("bundled", "sd15_size"):
        original, default = (result[size][name] for name in ("original", "default"))
        assert original["scheduler"] == "ddpm"
        assert original["times_faster"] == 1
        assert default["times_faster"] > 0
    low, high = result["bundled"]["default"]["clip_score_minus_original"]["ci95"]
    assert low <= high
    assert "| times_faster | 1 |" in output


@pytest.mark.skipif(not find_spec("openvino"), reason="the extra openvino is not installed")
def test_the_fast_variant_is_timed_in_full_and_the_other_ways_are_extrapolated() -> None:
    output, result = quick("fast", "--part", "sd15", "--precision", "fp32")  # quantizing would take half a minute
    original, default, fast = (result["sd15_size"][name] for name in ("original", "default", "fast"))
    assert (original["passes"], fast["passes"]) == (200, 2)
    assert (original["extrapolated"], default["extrapolated"], fast["extrapolated"]) == (True, True, False)
    assert fast["times_faster"] == pytest.approx(original["total_s"] / fast["total_s"])
    assert result["cold"]["seconds"] > 0
    assert result["export"]["unet_error"] < 1e-3
    assert "| times_faster | 1 |" in output


def test_downloading_and_cleaning_are_compared_with_their_lower_bounds_and_planted_faults_are_found() -> None:
    output, result = quick("data")
    assert [row["kept"] for row in result["cleaning"]] == [200, 400]
    for row in result["cleaning"]:
        assert row["ratio"] == pytest.approx(row["clean_s"] / row["decode_s"])
        assert 0 < row["peak_memory_mib"] < 2048
    download = result["download"]
    assert download["ratio"] == pytest.approx(download["client_s"] / download["bare_loop_s"])
    assert download["requests"] == download["files"]
    assert download["most_requests_at_once"] <= download["connections"]
    assert result["near_duplicates"]["groups"] <= 0.95 * result["near_duplicates"]["hashes"]  # some by chance
    assert all(row["planted"] == 1 for row in result["copies"]["kinds"].values())
    assert result["copies"]["precision"] >= 0.99
    assert "| caption bar 10 % | 1 | 1.00 | 0 |" in output
    faults = result["planted_faults"]
    for kind, recall in (("broken", 0.95), ("exact", 0.95), *((near, 0.9) for near in NEAR), ("off topic", 0.8)):
        assert faults["kinds"][kind]["planted"] >= 0.015 * faults["images"], kind
        assert faults["kinds"][kind]["recall"] >= recall, kind
        assert f"| {kind} |" in output
    assert faults["kinds"]["off topic"]["precision"] >= 0.8
    assert faults["good_quarantined"] <= 0.01 * faults["images"]


@pytest.mark.skipif(not (ROOT / "mlflow.db").exists(), reason="draws with the champion that `dvc repro` registers")
def test_drawing_through_the_api_is_compared_with_the_commands_own_loop() -> None:
    output, result = quick("programs")
    both = (result["command_s"] + result["control_s"]) / 2
    assert result["overhead_share"] == pytest.approx(result["api_s"] / both - 1)
    assert "cpu_overhead_share" in output
