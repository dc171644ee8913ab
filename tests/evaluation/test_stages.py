"""The stages evaluate, benchmark and register as DVC runs them: scripts in a project's folder."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from support.stages import run_stage

from bestiary.diffusion.adapter import inject, save_adapter
from bestiary.diffusion.adapter_format import Provenance
from bestiary.diffusion.base import load_unet
from bestiary.evaluation.sweep import write_operating_point

ROOT = Path(__file__).parents[2]
CLASSES = ("antelope", "tiger")
RESOLUTION = 32  # half of the base's own size
LCM_SETTING = {
    "scheduler": "lcm",
    "batch": 1,
    "fused": False,
    "guidance": "interval",
    "dtype": "float32",
    "compiled": False,
    "vae": "full",
}

pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path: Path, adapter: Path) -> Path:
    """A project with a trained adapter and random pictures of two classes, as small as possible."""
    for name in ("stages", "src", *(f"models/{each}" for each in ("base", "judge", "image_judge", "tiny_decoder"))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "models" / "adapter").symlink_to(adapter)
    (tmp_path / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["profiles"]["sample"]["encode"]["resolution"] = RESOLUTION
    params["profiles"]["sample"]["evaluate"] |= {"seeds": 2, "steps": 1, "batch_size": 4}
    params["profiles"]["sample"]["benchmark"] |= {"schedulers": ["ddim", "lcm"], "steps": [1, 2], "repeats": 5}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    random = np.random.default_rng(0)
    split = tmp_path / "build" / "split"
    split.mkdir(parents=True)
    (tmp_path / "build" / "others").mkdir()
    for name, count in (("train", 4), ("val", 2)):
        rows = []
        for folder in CLASSES:
            for number in range(count):
                path = f"{folder}/{name}{number}.png"
                (tmp_path / "build" / "clean" / folder).mkdir(parents=True, exist_ok=True)
                pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "build" / "clean" / path)
                rows.append({"path": path, "class": folder})
        pd.DataFrame(rows).to_csv(split / f"{name}.csv", index=False)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_evaluate_writes_its_report_and_a_later_run_that_fails_leaves_it(project: Path) -> None:
    done = run_stage(project, "evaluate")
    assert done.returncode == 0, done.stderr
    report = json.loads((project / "reports" / "evaluate.json").read_text())
    assert report["images"] == 4
    assert len(report["adapter_sha256"]) == 64
    assert list(report["per_class"]) == list(CLASSES)
    results = json.loads((project / "reports" / "results" / "evaluate.json").read_text())
    assert {**results, "seconds": report["seconds"]} == report
    files = contents(project / "reports" / "evaluate")
    assert set(files) == {
        "pictures/antelope.jpg",
        "pictures/tiger.jpg",
        "sheet.png",
        "memorisation.png",
        "confusion.png",
        "per_class.png",
        "per_class.csv",
        "pictures.csv",
    }
    with Image.open(project / "reports" / "evaluate" / "pictures" / "tiger.jpg") as sheet:
        assert sheet.height < 4 * RESOLUTION  # two rows of pictures in the adapter's training resolution
    earlier = (project / "reports" / "evaluate.json").read_bytes()
    (project / "build" / "split" / "val.csv").write_text("path,class\n")
    done = run_stage(project, "evaluate")
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("evaluate: ")
    assert "build/split/val.csv" in message
    assert "Traceback" not in done.stderr
    assert (project / "reports" / "evaluate.json").read_bytes() == earlier
    assert contents(project / "reports" / "evaluate") == files


@pytest.mark.parametrize("name", ["evaluate", "benchmark"])
def test_an_adapter_for_another_base_is_refused_and_the_earlier_reports_stay(
    name: str, project: Path, base_folder: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "models" / "adapter"
    adapter.unlink()
    unet = load_unet(base_folder)
    inject(unet, rank=2, alpha=4, dropout=0.0, targets=["to_q"], seed=0)
    save_adapter(unet, adapter, Provenance(base_sha256="0" * 64))
    write_operating_point(project / "reports" / "operating_point", adapter, 1.0, 3.0)
    earlier = contents(project / "reports")
    done = run_stage(project, name)
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith(f"{name}: ")
    assert "models/adapter" in message
    assert "models/base" in message
    assert "Traceback" not in done.stderr
    assert contents(project / "reports") == earlier


def test_register_names_a_damaged_report(project: Path) -> None:
    write_operating_point(project / "reports" / "operating_point", project / "models" / "adapter", 1.0, 3.0)
    (project / "reports" / "evaluate").mkdir()
    results = project / "reports" / "results"
    results.mkdir()
    for name in ("train", "evaluate", "benchmark"):
        (results / f"{name}.json").write_text("{}")
    (results / "evaluate.json").write_text("<<<<<<< HEAD")
    done = run_stage(project, "register")
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("register: reports/results/evaluate.json is ")
    assert "dvc repro" in message
    (project / "reports" / "operating_point" / "operating_point.json").write_text("{}")
    message = run_stage(project, "register").stderr.strip().splitlines()[-1]
    assert message.startswith("register: reports/operating_point/operating_point.json is ")
    assert "dvc repro evaluate" in message


def test_benchmark_reports_the_environment_the_cold_start_and_every_setting(project: Path) -> None:
    point = write_operating_point(project / "reports" / "operating_point", project / "models" / "adapter", 1.0, 3.0)
    done = run_stage(project, "benchmark")
    assert done.returncode == 0, done.stderr
    report = json.loads((project / "reports" / "benchmark.json").read_text())
    settings = {(row["scheduler"], row["steps"], row["fused"]) for row in report["rows"]}
    assert settings >= {
        ("ddim", 1, False),
        ("ddim", 2, False),
        ("dpmsolver++sde", 1, False),
        ("dpmsolver++sde", 1, True),
    }
    assert report["cold_start_s"] > sum(report["cold_start"].values()) > 0
    assert report["fastest_good"] in report["rows"]
    assert report["environment"]["torch"]
    assert report["resolution"] == RESOLUTION
    assert report["adapter_sha256"] == point.adapter_sha256
    assert {row["guidance"] for row in report["rows"]} == {"always", "interval", "never"}
    assert report["skipped"] == [
        {**LCM_SETTING, "steps": steps, "reason": "the base is not a latent consistency model"} for steps in (1, 2)
    ]
    for row in report["rows"]:
        assert row["with_loading_s"] == pytest.approx(
            report["cold_start"]["import_s"] + report["cold_start"]["load_s"] + row["p50_s"]
        )
    assert (project / "reports" / "benchmark" / "quality_against_cost.png").is_file()
    assert (project / "reports" / "benchmark" / "settings.csv").is_file()
    results = json.loads((project / "reports" / "results" / "benchmark.json").read_text())
    assert list(results) == ["resolution", "adapter_sha256", "quality"]
    assert all(row.items() <= whole.items() for row, whole in zip(results["quality"], report["rows"], strict=True))
